//! One streamed completion of any OpenAI-compatible server on the client's clock.

use std::time::Instant;

use anyhow::Context;
use serde_json::{Value, json};

use crate::client::Client;

/// What a client saw of its request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timed {
    /// From sending to the first piece of the answer, milliseconds.
    pub(super) ttft_ms: f64,
    /// From sending to the end, milliseconds.
    pub(super) total_ms: f64,
    /// As the server counts them.
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
    /// Weight bytes that were brought in for the request, where the server says it.
    pub(super) bytes_loaded: Option<u64>,
}

/// Sends a prompt of token ids and reads the answer to its end.
///
/// # Errors
/// When the server refuses, breaks off, or does not say how many tokens there were.
pub(super) async fn complete(
    client: &Client,
    model: &str,
    prompt: &[u32],
    max_tokens: usize,
) -> anyhow::Result<Timed> {
    let body = json!({
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": true,
        "temperature": 0,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    let start = Instant::now();
    let since = |start: Instant| start.elapsed().as_secs_f64() * 1000.0;
    let (mut ttft_ms, mut usage) = (None, Value::Null);
    client
        .post_lines("/v1/completions", &body, |mut line| {
            if line["choices"].get(0).is_some() {
                ttft_ms.get_or_insert_with(|| since(start));
            }
            if line["usage"].is_object() {
                usage = line["usage"].take();
            }
            Ok(())
        })
        .await?;
    let count =
        |name: &str| usage[name].as_u64().with_context(|| format!("the stream's usage has no '{name}'"));
    Ok(Timed {
        total_ms: since(start),
        ttft_ms: ttft_ms.context("the stream ended without a token")?,
        prompt_tokens: count("prompt_tokens")?,
        completion_tokens: count("completion_tokens")?,
        bytes_loaded: usage["tangram"]["bytes_loaded"].as_u64(),
    })
}
