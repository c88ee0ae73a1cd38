//! Server-sent events of a streamed completion: one per change, the usage if asked for, `[DONE]` last.
//!
//! The response head waits for the first token, so that a request that fails before has a proper status and the
//! headers can say where the time went.

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::error::ApiError;
use super::run::{ChoiceEvent, Delta, Run};
use super::types::Usage;
use crate::headers::add_timing;

/// Writes the chunks of one API.
pub(crate) trait Chunks: Send + 'static {
    /// A choice is about to get its first token.
    fn started(&mut self, index: usize, out: &mut EventWriter);
    /// A choice has grown.
    fn delta(&mut self, index: usize, delta: Delta, out: &mut EventWriter);
    /// A choice has grown for the last time.
    fn finished(&mut self, index: usize, delta: Delta, reason: &'static str, out: &mut EventWriter);
    /// The last chunk of a stream that carries the usage.
    fn usage(&mut self, usage: Usage, out: &mut EventWriter);
}

/// Collects events that go out together.
#[derive(Debug, Default)]
pub(crate) struct EventWriter {
    out: Vec<u8>,
}

impl EventWriter {
    /// Adds an event.
    pub(crate) fn event(&mut self, data: &impl Serialize) {
        self.out.extend_from_slice(b"data: ");
        if let Err(error) = serde_json::to_writer(&mut self.out, data) {
            tracing::error!(%error, "a chunk could not be written");
        }
        self.out.extend_from_slice(b"\n\n");
    }

    fn done(&mut self) {
        self.out.extend_from_slice(b"data: [DONE]\n\n");
    }
}

struct StreamState<C> {
    run: Run,
    chunks: C,
    include_usage: bool,
    /// The event that the response head waited for.
    first: Option<(usize, ChoiceEvent)>,
    done: bool,
}

impl<C: Chunks> StreamState<C> {
    /// The next bytes to send: at least one event, `None` at the end.
    async fn next(&mut self) -> Option<Bytes> {
        let mut writer = EventWriter::default();
        while writer.out.is_empty() && !self.done {
            let event = match self.first.take() {
                Some(first) => Ok(Some(first)),
                None => self.run.next().await,
            };
            match event {
                Ok(Some((index, ChoiceEvent::Started(_)))) => self.chunks.started(index, &mut writer),
                Ok(Some((index, ChoiceEvent::Delta(delta)))) => self.chunks.delta(index, delta, &mut writer),
                Ok(Some((index, ChoiceEvent::Finished { delta, reason, .. }))) => {
                    self.chunks.finished(index, delta, reason, &mut writer);
                }
                Ok(Some((_, ChoiceEvent::Failed(error)))) => self.fail(&error.into(), &mut writer),
                Ok(None) => {
                    if self.include_usage {
                        self.chunks.usage(self.run.usage(), &mut writer);
                    }
                    writer.done();
                    self.done = true;
                }
                Err(error) => self.fail(&error, &mut writer),
            }
        }
        if writer.out.is_empty() { None } else { Some(writer.out.into()) }
    }

    fn fail(&mut self, error: &ApiError, writer: &mut EventWriter) {
        writer.event(&error.body());
        writer.done();
        self.done = true;
    }
}

/// Waits for the first token and answers with the stream. When the client goes, the body and the run are dropped.
pub(crate) async fn respond(
    mut run: Run,
    chunks: impl Chunks,
    include_usage: bool,
) -> Result<Response, ApiError> {
    let first = run.next().await?;
    let timing = run.timing();
    let state = StreamState { run, chunks, include_usage, first, done: false };
    let stream = futures::stream::unfold(state, async |mut state| {
        let bytes = state.next().await?;
        Some((Ok::<_, std::convert::Infallible>(bytes), state))
    });
    let mut response = Body::from_stream(stream).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    add_timing(headers, &timing, false);
    Ok(response)
}
