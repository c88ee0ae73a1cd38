//! Sends one request of a soak and reads what comes back, streamed or whole, into one form.

use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};

use crate::client::{self, Client};

/// How long an answer may take before it counts as missing.
const PATIENCE: Duration = Duration::from_secs(180);

/// A request as it is sent.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) path: &'static str,
    pub(super) body: Body,
    /// When the client goes away.
    pub(super) leave: Option<Leave>,
}

/// What a request carries.
#[derive(Clone, Debug)]
pub(super) enum Body {
    Json(Value),
    /// Whatever it is.
    Text(&'static str),
}

/// When a client goes away.
#[derive(Clone, Copy, Debug)]
pub(super) enum Leave {
    /// After so many events of a stream.
    Events(usize),
    /// After this time.
    After(Duration),
}

/// A generated choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Choice {
    pub(super) text: String,
    pub(super) tokens: Vec<u32>,
    /// `finish_reason`.
    pub(super) reason: Option<String>,
}

/// An answer. Two that are equal in choices and vectors are the same answer.
#[derive(Clone, Debug, Default)]
pub(super) struct Answer {
    pub(super) choices: Vec<Choice>,
    /// Embeddings as they were written.
    pub(super) vectors: Vec<Value>,
    pub(super) usage: Value,
}

/// What came of a request.
#[derive(Debug)]
pub(super) enum Reply {
    Answer(Answer),
    /// Status, and the message of the error object if that is what came.
    Refused(u16, Option<String>),
    /// The client left.
    Left,
}

impl Request {
    /// A request that waits for its answer.
    pub(super) fn new(path: &'static str, body: Value) -> Request {
        Request { path, body: Body::Json(body), leave: None }
    }

    /// The same as a stream with usage.
    pub(super) fn streamed(mut self) -> Request {
        if let Body::Json(body) = &mut self.body {
            body["stream"] = true.into();
            body["stream_options"] = json!({ "include_usage": true });
        }
        self
    }

    /// Sends it.
    ///
    /// # Errors
    /// When no answer came, or something that is none.
    pub(super) async fn send(&self, client: &Client) -> anyhow::Result<Reply> {
        if let Some(Leave::After(time)) = self.leave {
            return tokio::time::timeout(time, self.exchange(client)).await.unwrap_or(Ok(Reply::Left));
        }
        let reply = tokio::time::timeout(PATIENCE, self.exchange(client)).await;
        reply.with_context(|| format!("no answer within {} s", PATIENCE.as_secs()))?
    }

    async fn exchange(&self, client: &Client) -> anyhow::Result<Reply> {
        let request = client.request(reqwest::Method::POST, self.path);
        let (request, streamed) = match &self.body {
            Body::Json(body) => (request.json(body), body["stream"] == true),
            Body::Text(text) => (request.header("content-type", "application/json").body(*text), false),
        };
        let response = request.send().await.context("no answer")?;
        let status = response.status();
        if !status.is_success() {
            let body: Value = response.json().await.unwrap_or_default();
            return Ok(Reply::Refused(status.as_u16(), body["error"]["message"].as_str().map(str::to_owned)));
        }
        let mut answer = Answer::default();
        if !streamed {
            answer.add(&response.json().await.context("an answer that is no JSON")?)?;
            return Ok(Reply::Answer(answer));
        }
        let (mut events, mut left) = (0, false);
        let read = client::read_lines(response, |line| {
            events += 1;
            left = matches!(self.leave, Some(Leave::Events(most)) if events >= most);
            anyhow::ensure!(!left, "the client leaves");
            answer.add(&line)
        });
        match read.await {
            _ if left => Ok(Reply::Left),
            Ok(()) => Ok(Reply::Answer(answer)),
            Err(error) => Err(error),
        }
    }
}

impl Answer {
    /// Adds a whole answer or a chunk of one.
    fn add(&mut self, part: &Value) -> anyhow::Result<()> {
        for choice in part["choices"].as_array().into_iter().flatten() {
            let index = choice["index"].as_u64().context("a choice without an index")? as usize;
            anyhow::ensure!(index < 1024, "a choice with the index {index}");
            if self.choices.len() <= index {
                self.choices.resize(index + 1, Choice::default());
            }
            let Some(sum) = self.choices.get_mut(index) else { continue };
            let texts = [&choice["text"], &choice["message"]["content"], &choice["delta"]["content"]];
            sum.text.extend(texts.into_iter().filter_map(Value::as_str));
            let tokens = choice["token_ids"].as_array().into_iter().flatten();
            sum.tokens.extend(tokens.filter_map(|token| u32::try_from(token.as_u64()?).ok()));
            if let Some(reason) = choice["finish_reason"].as_str() {
                sum.reason = Some(reason.to_owned());
            }
        }
        for item in part["data"].as_array().into_iter().flatten() {
            self.vectors.push(item["embedding"].clone());
        }
        if part["usage"].is_object() {
            self.usage = part["usage"].clone();
        }
        Ok(())
    }

    /// Whether another answer to the same request says the same.
    pub(super) fn same(&self, other: &Answer) -> bool {
        self.choices == other.choices && self.vectors == other.vectors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_add_up_to_the_whole() {
        let mut whole = Answer::default();
        whole
            .add(&json!({"choices": [
                {"index": 0, "text": "abc", "token_ids": [1, 2], "finish_reason": "length"},
                {"index": 1, "text": "x", "token_ids": [3], "finish_reason": "stop"},
            ], "usage": {"prompt_tokens": 4}}))
            .unwrap();
        let mut streamed = Answer::default();
        for chunk in [
            json!({"choices": [{"index": 1, "delta": {"content": "x"}, "token_ids": [3], "finish_reason": "stop"}]}),
            json!({"choices": [{"index": 0, "text": "a", "token_ids": [1], "finish_reason": null}]}),
            json!({"choices": [{"index": 0, "text": "bc", "token_ids": [2], "finish_reason": "length"}]}),
        ] {
            assert!(!streamed.same(&whole));
            streamed.add(&chunk).unwrap();
        }
        assert!(streamed.same(&whole));
        streamed.add(&json!({"choices": [], "usage": {"prompt_tokens": 4}})).unwrap();
        assert!(streamed.same(&whole));
        assert_eq!(streamed.usage, whole.usage);
        streamed.add(&json!({"data": [{"embedding": [1.0]}]})).unwrap();
        assert!(!streamed.same(&whole));
        assert!(Answer::default().add(&json!({"choices": [{"index": 5000}]})).is_err());
    }
}
