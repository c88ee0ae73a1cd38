//! The objects of OpenAI's responses, with vLLM's `token_ids` and Tangram's timing.

use std::sync::Arc;
use std::time::Duration;

use serde::{Serialize, Serializer};
use tangram_node::{Timing, TokenLogprob};

use super::tools::ToolCall;
use crate::text::TextTokenizer;

/// Tokens of a request and where its time went.
#[derive(Debug, Serialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) completion_tokens: Option<usize>,
    pub(crate) total_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_tokens_details: Option<PromptTokensDetails>,
    pub(crate) tangram: TimingReport,
}

impl Usage {
    pub(crate) fn of_generation(prompt_tokens: usize, completion_tokens: usize, timing: &Timing) -> Self {
        Usage {
            prompt_tokens,
            completion_tokens: Some(completion_tokens),
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: Some(PromptTokensDetails { cached_tokens: timing.cached_tokens as usize }),
            tangram: TimingReport::new(timing),
        }
    }

    pub(crate) fn of_embeddings(prompt_tokens: usize, timing: &Timing) -> Self {
        Usage {
            prompt_tokens,
            completion_tokens: None,
            total_tokens: prompt_tokens,
            prompt_tokens_details: None,
            tangram: TimingReport::new(timing),
        }
    }
}

/// Part of [`Usage`].
#[derive(Debug, Serialize)]
pub(crate) struct PromptTokensDetails {
    /// Prompt tokens whose KV was found rather than computed.
    pub(crate) cached_tokens: usize,
}

/// [`Timing`] as the usage shows it: milliseconds with three decimals.
#[derive(Debug, Serialize)]
pub(crate) struct TimingReport {
    queue_ms: f64,
    load_ms: f64,
    prefill_ms: f64,
    decode_ms: f64,
    ttft_ms: f64,
    bytes_loaded: u64,
    bytes_reused: u64,
}

impl TimingReport {
    fn new(timing: &Timing) -> Self {
        let milliseconds = |duration: Duration| duration.as_micros() as f64 / 1000.0;
        TimingReport {
            queue_ms: milliseconds(timing.queue),
            load_ms: milliseconds(timing.load),
            prefill_ms: milliseconds(timing.prefill),
            decode_ms: milliseconds(timing.decode),
            ttft_ms: milliseconds(timing.first_token),
            bytes_loaded: timing.bytes_loaded,
            bytes_reused: timing.bytes_reused,
        }
    }
}

/// A response or chunk of `/v1/chat/completions` or `/v1/completions`, as `C` says.
#[derive(Debug, Serialize)]
pub(crate) struct Completion<'a, C> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) choices: Vec<C>,
    /// Chat only, on request; text completions have it in each choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<&'a [u32]>,
    /// Absent, `null` (chunks of a stream that ends with the usage) or there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Option<Usage>>,
}

/// A choice of a chat completion.
#[derive(Debug, Serialize)]
pub(crate) struct ChatChoice {
    pub(crate) index: usize,
    pub(crate) message: ChatMessage,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
}

/// A choice of a chunk of a chat completion.
#[derive(Debug, Serialize)]
pub(crate) struct ChatChunkChoice {
    pub(crate) index: usize,
    pub(crate) delta: ChatMessage,
    pub(crate) logprobs: Option<ChatLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
}

/// The assistant's message, or the part of it that a chunk adds.
#[derive(Debug, Default, Serialize)]
pub(crate) struct ChatMessage {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    /// Absent, `null` (a message that only calls functions) or there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<Option<String>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<ToolCall>,
}

/// A choice of a text completion or of a chunk of one.
#[derive(Debug, Serialize)]
pub(crate) struct TextChoice<'a> {
    pub(crate) index: usize,
    pub(crate) text: String,
    pub(crate) logprobs: Option<TextLogprobs>,
    pub(crate) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<&'a [u32]>,
}

/// Logprobs of a chat completion.
#[derive(Debug, Serialize)]
pub(crate) struct ChatLogprobs {
    content: Vec<ChatLogprob>,
}

#[derive(Debug, Serialize)]
struct ChatLogprob {
    #[serde(flatten)]
    token: TokenEntry,
    top_logprobs: Vec<TokenEntry>,
}

#[derive(Debug, Serialize)]
struct TokenEntry {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// Logprobs of a text completion.
#[derive(Debug, Serialize)]
pub(crate) struct TextLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<TopLogprobs>,
    text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// Whether it covers no token.
    pub(crate) fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// Written as an object in the order of the list; equal texts of different tokens appear once, the best first.
#[derive(Debug)]
struct TopLogprobs(Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

/// Writes tokens as text for logprobs.
#[derive(Debug)]
pub(crate) struct TokenTexts(pub(crate) Option<Arc<TextTokenizer>>);

impl TokenTexts {
    /// Logprobs of chat completions.
    pub(crate) fn chat(&self, tokens: &[(u32, TokenLogprob)]) -> ChatLogprobs {
        let content = tokens.iter().map(|(id, logprob)| ChatLogprob {
            token: self.entry(*id, logprob.logprob),
            top_logprobs: logprob.top.iter().map(|&(id, logprob)| self.entry(id, logprob)).collect(),
        });
        ChatLogprobs { content: content.collect() }
    }

    /// Logprobs of text completions. `offset` is where the tokens' text begins in the choice's text, in characters;
    /// it is moved to their end.
    pub(crate) fn legacy(&self, tokens: &[(u32, TokenLogprob)], offset: &mut usize) -> TextLogprobs {
        let mut result = TextLogprobs {
            tokens: vec![],
            token_logprobs: vec![],
            top_logprobs: vec![],
            text_offset: vec![],
        };
        for (id, logprob) in tokens {
            let TokenEntry { token, logprob: own, .. } = self.entry(*id, logprob.logprob);
            let mut top: Vec<(String, f32)> = Vec::new();
            for &(id, logprob) in &logprob.top {
                let entry = self.entry(id, logprob);
                if top.iter().all(|(token, _)| *token != entry.token) {
                    top.push((entry.token, entry.logprob));
                }
            }
            // The chosen token is always among them, as OpenAI and vLLM have it.
            if top.iter().all(|(other, _)| *other != token) {
                top.push((token.clone(), own));
            }
            result.text_offset.push(*offset);
            *offset += token.chars().count();
            result.tokens.push(token);
            result.token_logprobs.push(own);
            result.top_logprobs.push(TopLogprobs(top));
        }
        result
    }

    fn entry(&self, id: u32, logprob: f32) -> TokenEntry {
        let bytes = match &self.0 {
            Some(tokenizer) => tokenizer.token_bytes(id),
            None => format!("token_id:{id}").into_bytes(),
        };
        // JSON has no infinity; vLLM writes this instead.
        let logprob = if logprob.is_finite() { logprob } else { -9999.0 };
        TokenEntry { token: String::from_utf8_lossy(&bytes).into_owned(), logprob, bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn token(id: u32, logprob: f32, top: &[(u32, f32)]) -> (u32, TokenLogprob) {
        (id, TokenLogprob { logprob, top: top.to_vec() })
    }

    #[test]
    fn logprobs_in_both_formats() {
        let texts = TokenTexts(Some(crate::text::test_tokenizer()));
        let h = 'h' as u32;
        let tokens =
            [token(h, -0.5, &[(h, -0.5), (0xE2, -1.0)]), token(0xE2, f32::NEG_INFINITY, &[(h, -0.25)])];
        assert_eq!(
            serde_json::to_value(texts.chat(&tokens)).unwrap(),
            json!({"content": [
                {"token": "h", "logprob": -0.5, "bytes": [104], "top_logprobs": [
                    {"token": "h", "logprob": -0.5, "bytes": [104]},
                    {"token": "\u{FFFD}", "logprob": -1.0, "bytes": [0xE2]}]},
                {"token": "\u{FFFD}", "logprob": -9999.0, "bytes": [0xE2],
                 "top_logprobs": [{"token": "h", "logprob": -0.25, "bytes": [104]}]}]})
        );
        let mut offset = 7;
        assert_eq!(
            serde_json::to_value(texts.legacy(&tokens, &mut offset)).unwrap(),
            json!({"tokens": ["h", "\u{FFFD}"], "token_logprobs": [-0.5, -9999.0], "text_offset": [7, 8],
                   "top_logprobs": [{"h": -0.5, "\u{FFFD}": -1.0}, {"h": -0.25, "\u{FFFD}": -9999.0}]})
        );
        assert_eq!(offset, 9);
    }

    #[test]
    fn usage_shows_milliseconds() {
        let timing = Timing { queue: Duration::from_nanos(1_234_567), bytes_reused: 5, ..Timing::default() };
        let usage = serde_json::to_value(Usage::of_generation(3, 4, &timing)).unwrap();
        assert_eq!(usage["total_tokens"], 7);
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
        assert_eq!(usage["tangram"]["queue_ms"], 1.234);
        assert_eq!(usage["tangram"]["bytes_reused"], 5);
        let usage = serde_json::to_value(Usage::of_embeddings(3, &timing)).unwrap();
        assert!(usage.get("completion_tokens").is_none());
    }
}
