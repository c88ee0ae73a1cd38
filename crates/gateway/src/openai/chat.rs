//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use serde_json::{Map, Value as Json};
use tangram_node::DeployedModel;

use super::error::ApiError;
use super::fields::Fields;
use super::options::{MAX_LOGPROBS, Options, check_length};
use super::run::{Delta, Prompt, Run};
use super::stream::{self, Chunks, EventWriter};
use super::structured::Wanted;
use super::tools::{ChoiceText, MessagePart, ToolUse};
use super::types::{ChatChoice, ChatChunkChoice, ChatMessage, Completion, TokenTexts, Usage};
use crate::body::RequestBody;
use crate::text::ChatInput;
use crate::{Gateway, RequestId};

/// Answers a request.
pub(crate) async fn create(
    State(gateway): State<Arc<Gateway>>,
    Extension(id): Extension<RequestId>,
    body: RequestBody,
) -> Response {
    let mut model = None;
    let result = answer(&gateway, &id, &body, &mut model).await;
    super::finish(model, result)
}

async fn answer(
    gateway: &Gateway,
    id: &RequestId,
    body: &RequestBody,
    served: &mut Option<Arc<DeployedModel>>,
) -> Result<Response, ApiError> {
    let (fields, model) = super::read_request(gateway, body, served)?;
    let tools = ToolUse::read(&fields, &model)?;
    let wanted = Wanted::read(&fields)?;
    let mut options = Options::read(&fields, &model)?;
    options.sampling.logprobs = read_logprobs(&fields)?;
    let requested = match fields.integer("max_completion_tokens", 1..=i64::MAX)? {
        Some(tokens) => Some(tokens),
        None => fields.integer("max_tokens", 1..=i64::MAX)?,
    };
    let text = render(gateway, &model, &fields, tools.shown())?;
    let Some(tokenizer) = super::tokenizer(gateway, &model).await? else {
        let message = format!(
            "The model `{}` has no tokenizer; use /v1/completions with token ids as the prompt",
            model.name
        );
        return Err(ApiError::param("model", message));
    };
    // The template writes the special tokens itself.
    let add_special_tokens = fields.boolean("add_special_tokens", false)?;
    let tokens = super::encode(&model, &tokenizer, vec![text], add_special_tokens, "messages").await?;
    let tokens = tokens.into_iter().next().unwrap_or_default();
    let requested = requested.map(|tokens| usize::try_from(tokens).unwrap_or(usize::MAX));
    let max_tokens = check_length(&model, "messages", tokens.len(), requested, None)?;
    let prompts = [Prompt { tokens, max_tokens }];
    if let Some(wanted) = tools.required(&tokenizer).or(wanted) {
        options.grammar = Some(wanted.compile(&model, Some(&tokenizer)).await?);
    }
    if options.skip_special_tokens {
        options.shown_tokens = tools.special_tokens(&tokenizer);
    }
    let mut run = Run::start(gateway, &model, Some(&tokenizer), &prompts, &options)?;
    let [Prompt { tokens: prompt, .. }] = prompts;
    let texts = TokenTexts(Some(tokenizer));
    let id = format!("chatcmpl-{}", id.0);
    let choice_texts: Vec<ChoiceText> =
        (0..options.choices).map(|index| ChoiceText::new(&tools, &id, index)).collect();
    let with_logprobs = options.sampling.logprobs.is_some();
    if options.stream {
        let chunks = ChatChunks {
            id,
            created: super::now(),
            model: model.name.clone(),
            prompt: options.return_token_ids.then_some(prompt),
            choices: choice_texts,
            texts,
            with_logprobs,
            return_token_ids: options.return_token_ids,
            include_usage: options.include_usage,
        };
        return stream::respond(run, chunks, options.include_usage).await;
    }
    let choices = super::collect(&mut run).await?;
    let choices = choices.into_iter().zip(choice_texts).enumerate().map(|(index, (choice, text))| {
        let (content, tool_calls, called) = text.whole(choice.delta.text);
        let content = Some(content).filter(|content| !called || !content.is_empty());
        ChatChoice {
            index,
            message: ChatMessage { role: Some("assistant"), content: Some(content), tool_calls },
            logprobs: with_logprobs.then(|| texts.chat(&choice.delta.logprobs)),
            finish_reason: choice.reason.map(|reason| finish_reason(reason, called)),
            token_ids: options.return_token_ids.then_some(choice.delta.tokens),
        }
    });
    let completion = Completion {
        id: &id,
        object: "chat.completion",
        created: super::now(),
        model: &model.name,
        choices: choices.collect(),
        prompt_token_ids: options.return_token_ids.then_some(prompt.as_slice()),
        usage: Some(Some(run.usage())),
    };
    Ok(super::respond(&completion, &run.timing()))
}

/// OpenAI's reason for an end: a model that stops after calls wants their results.
fn finish_reason(reason: &'static str, called: bool) -> &'static str {
    if called && reason == "stop" { "tool_calls" } else { reason }
}

/// Number of alternatives per token, if logprobs are asked for.
fn read_logprobs(fields: &Fields<'_>) -> Result<Option<u32>, ApiError> {
    let wanted = fields.boolean("logprobs", false)?;
    match fields.integer("top_logprobs", 0..=MAX_LOGPROBS)? {
        Some(count) if count > 0 && !wanted => {
            Err(ApiError::param("top_logprobs", "'top_logprobs' is only allowed with 'logprobs'"))
        }
        count => Ok(wanted.then_some(count.unwrap_or(0) as u32)),
    }
}

/// The prompt's text.
fn render(
    gateway: &Gateway,
    model: &DeployedModel,
    fields: &Fields<'_>,
    tools: Option<&Json>,
) -> Result<String, ApiError> {
    let messages: Vec<Json> = fields
        .tree("messages", "a list of messages")?
        .ok_or_else(|| ApiError::param("messages", "'messages' is required"))?;
    let messages = prepare_messages(messages)?;
    let kwargs: Option<Map<String, Json>> = fields.tree("chat_template_kwargs", "an object")?;
    let template = gateway.texts.template(model).map_err(|error| {
        ApiError::invalid(format!(
            "The chat template of `{}` cannot be used ({error}); use /v1/completions",
            model.name
        ))
    })?;
    let Some(template) = template else {
        let message = format!("The model `{}` has no chat template; use /v1/completions", model.name);
        return Err(ApiError::param("model", message));
    };
    let input = ChatInput {
        messages: &messages,
        tools,
        special_tokens: &model.special_tokens,
        kwargs: kwargs.as_ref(),
    };
    template.render(&input).map_err(|message| ApiError::param("messages", message))
}

/// Brings messages into the form that templates expect: `content` is a string (parts are joined by line breaks, as
/// in vLLM), the arguments of earlier tool calls are objects.
fn prepare_messages(mut messages: Vec<Json>) -> Result<Vec<Json>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::param("messages", "'messages' must have at least one message"));
    }
    for (index, message) in messages.iter_mut().enumerate() {
        let name = format!("messages[{index}]");
        let Json::Object(message) = message else {
            return Err(ApiError::param(
                &name,
                format!("'{name}' must be an object with 'role' and 'content'"),
            ));
        };
        match message.get("role") {
            Some(Json::String(role)) if !role.is_empty() => {}
            _ => {
                return Err(ApiError::param(
                    &format!("{name}.role"),
                    format!("'{name}.role' must be a string"),
                ));
            }
        }
        let content = match message.remove("content") {
            None | Some(Json::Null) => String::new(),
            Some(Json::String(text)) => text,
            Some(Json::Array(parts)) => flatten(&parts, &format!("{name}.content"))?,
            Some(_) => {
                let name = format!("{name}.content");
                let message = format!("'{name}' must be a string or a list of parts");
                return Err(ApiError::param(&name, message));
            }
        };
        message.insert("content".to_owned(), Json::String(content));
        let calls = message.get_mut("tool_calls").and_then(Json::as_array_mut);
        for call in calls.into_iter().flatten() {
            if let Some(arguments) = call.pointer_mut("/function/arguments")
                && let Some(Ok(object)) = arguments.as_str().map(serde_json::from_str::<Map<String, Json>>)
            {
                *arguments = Json::Object(object);
            }
        }
    }
    Ok(messages)
}

fn flatten(parts: &[Json], name: &str) -> Result<String, ApiError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let text = match part.get("type").and_then(Json::as_str) {
            Some("text") => part.get("text").and_then(Json::as_str),
            Some(kind) => {
                let message = format!("'{name}[{index}]' is of type '{kind}'; this server takes only text");
                return Err(ApiError::param(name, message));
            }
            None => part.as_str(),
        };
        let message = || format!("'{name}[{index}]' must be an object with 'type' \"text\" and 'text'");
        texts.push(text.ok_or_else(|| ApiError::param(name, message()))?);
    }
    Ok(texts.join("\n"))
}

struct ChatChunks {
    id: String,
    created: u64,
    model: String,
    /// Sent with the first chunk.
    prompt: Option<Vec<u32>>,
    choices: Vec<ChoiceText>,
    texts: TokenTexts,
    with_logprobs: bool,
    return_token_ids: bool,
    include_usage: bool,
}

impl ChatChunks {
    fn write(&mut self, choice: Option<ChatChunkChoice>, usage: Option<Usage>, out: &mut EventWriter) {
        let prompt = self.prompt.take();
        out.event(&Completion {
            id: &self.id,
            object: "chat.completion.chunk",
            created: self.created,
            model: &self.model,
            choices: choice.into_iter().collect(),
            prompt_token_ids: prompt.as_deref(),
            usage: self.include_usage.then_some(usage),
        });
    }

    /// A chunk's choice, with the logprobs and token ids of `delta`.
    fn choice(&self, index: usize, delta: Delta, message: ChatMessage) -> ChatChunkChoice {
        ChatChunkChoice {
            index,
            delta: message,
            logprobs: (self.with_logprobs && !delta.logprobs.is_empty())
                .then(|| self.texts.chat(&delta.logprobs)),
            finish_reason: None,
            token_ids: self.return_token_ids.then_some(delta.tokens),
        }
    }

    /// Writes a chunk for each part that the delta's text makes; the first carries logprobs and token ids.
    fn grow(&mut self, index: usize, mut delta: Delta, last: bool, out: &mut EventWriter) {
        let text = std::mem::take(&mut delta.text);
        let parts = self.choices.get_mut(index).map(|choice| choice.push(text, last)).unwrap_or_default();
        let carries = (self.with_logprobs || self.return_token_ids) && !delta.tokens.is_empty();
        if parts.is_empty() && carries {
            let message = ChatMessage { content: Some(Some(String::new())), ..ChatMessage::default() };
            self.write(Some(self.choice(index, std::mem::take(&mut delta), message)), None, out);
        }
        for part in parts {
            let message = match part {
                MessagePart::Content(text) => {
                    ChatMessage { content: Some(Some(text)), ..ChatMessage::default() }
                }
                MessagePart::Call(call) => ChatMessage { tool_calls: vec![call], ..ChatMessage::default() },
            };
            self.write(Some(self.choice(index, std::mem::take(&mut delta), message)), None, out);
        }
    }
}

impl Chunks for ChatChunks {
    fn started(&mut self, index: usize, out: &mut EventWriter) {
        let message = ChatMessage {
            role: Some("assistant"),
            content: Some(Some(String::new())),
            ..ChatMessage::default()
        };
        self.write(Some(self.choice(index, Delta::default(), message)), None, out);
    }

    fn delta(&mut self, index: usize, delta: Delta, out: &mut EventWriter) {
        self.grow(index, delta, false, out);
    }

    fn finished(&mut self, index: usize, delta: Delta, reason: &'static str, out: &mut EventWriter) {
        self.grow(index, delta, true, out);
        let mut choice = self.choice(index, Delta::default(), ChatMessage::default());
        let called = self.choices.get(index).is_some_and(ChoiceText::has_calls);
        choice.finish_reason = Some(finish_reason(reason, called));
        self.write(Some(choice), None, out);
    }

    fn usage(&mut self, usage: Usage, out: &mut EventWriter) {
        self.write(None, Some(usage), out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn prepare(messages: Json) -> Result<Json, Json> {
        prepare_messages(serde_json::from_value(messages).unwrap())
            .map(Json::Array)
            .map_err(|error| error.body()["error"]["param"].clone())
    }

    #[test]
    fn contents_become_strings() {
        let messages = json!([
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}], "name": "x"},
            {"role": "assistant", "content": null,
             "tool_calls": [{"function": {"name": "f", "arguments": "{\"x\": 1}"}}, {"function": {"arguments": "no"}}]}]);
        assert_eq!(
            prepare(messages).unwrap(),
            json!([
                {"role": "user", "name": "x", "content": "a\nb\nc"},
                {"role": "assistant", "content": "",
                 "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}, {"function": {"arguments": "no"}}]}])
        );
    }

    #[test]
    fn bad_messages_are_named() {
        assert_eq!(prepare(json!([])).unwrap_err(), "messages");
        assert_eq!(prepare(json!([{"role": "user", "content": ""}, 5])).unwrap_err(), "messages[1]");
        assert_eq!(prepare(json!([{"content": "x"}])).unwrap_err(), "messages[0].role");
        assert_eq!(prepare(json!([{"role": "user", "content": 5}])).unwrap_err(), "messages[0].content");
        let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]);
        assert_eq!(prepare(image).unwrap_err(), "messages[0].content");
    }

    #[test]
    fn logprobs_are_asked_for_in_two_fields() {
        let logprobs = |body: &str| read_logprobs(&Fields::parse(body.as_bytes()).unwrap());
        assert_eq!(logprobs(r#"{"logprobs": true, "top_logprobs": 3}"#).unwrap(), Some(3));
        assert_eq!(logprobs(r#"{"logprobs": true}"#).unwrap(), Some(0));
        assert_eq!(logprobs(r#"{"top_logprobs": 0}"#).unwrap(), None);
        assert!(logprobs(r#"{"top_logprobs": 3}"#).is_err());
        assert!(logprobs(r#"{"logprobs": true, "top_logprobs": 21}"#).is_err());
    }
}
