//! The sampling and output options that chat and text completions share, validated.

use std::collections::HashMap;

use serde_json::Number;
use tangram_node::{CompiledGrammar, DeployedModel, SamplingParams};

use super::error::ApiError;
use super::fields::Fields;

/// Stop strings per request; OpenAI allows 4, vLLM any number.
const MAX_STOPS: usize = 16;
/// Bytes of one stop string.
const MAX_STOP_BYTES: usize = 1024;
/// Alternatives per token that logprobs may ask for.
pub(crate) const MAX_LOGPROBS: i64 = 20;
/// Most choices of one request over all its prompts.
pub(crate) const MAX_CHOICES: usize = 1024;

/// What a request wants besides its prompt and its length.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) sampling: SamplingParams,
    /// Choices per prompt.
    pub(crate) choices: usize,
    pub(crate) stops: Vec<String>,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) ignore_eos: bool,
    pub(crate) skip_special_tokens: bool,
    /// Special tokens that are text nevertheless.
    pub(crate) shown_tokens: Vec<(u32, String)>,
    pub(crate) grammar: Option<CompiledGrammar>,
    pub(crate) return_token_ids: bool,
    pub(crate) stream: bool,
    /// Whether a stream ends with a chunk that carries the usage.
    pub(crate) include_usage: bool,
}

impl Options {
    /// Reads the options; what the request leaves open is as the model's author recommends, else as OpenAI has it.
    /// `logprobs` are not read: the two APIs spell them differently. Nor are the grammar and the shown tokens, which
    /// need the tokenizer.
    pub(crate) fn read(fields: &Fields<'_>, model: &DeployedModel) -> Result<Self, ApiError> {
        let stream = fields.boolean("stream", false)?;
        let include_usage = match fields.object("stream_options")? {
            Some(_) if !stream => {
                return Err(ApiError::param(
                    "stream_options",
                    "'stream_options' is only allowed with 'stream'",
                ));
            }
            Some(stream_options) => stream_options.boolean("include_usage", false)?,
            None => false,
        };
        let options = Options {
            sampling: read_sampling(fields, model)?,
            choices: fields.integer("n", 1..=128)?.unwrap_or(1) as usize,
            stops: read_stops(fields)?,
            stop_token_ids: fields.get("stop_token_ids", "a list of token ids")?.unwrap_or_default(),
            ignore_eos: fields.boolean("ignore_eos", false)?,
            skip_special_tokens: fields.boolean("skip_special_tokens", true)?,
            shown_tokens: Vec::new(),
            grammar: None,
            return_token_ids: fields.boolean("return_token_ids", false)?,
            stream,
            include_usage,
        };
        check_tokens(&options.stop_token_ids, model, "stop_token_ids")?;
        if !options.stops.is_empty() && model.tokenizer.is_none() {
            let message =
                format!("The model `{}` has no tokenizer, so there is no text to find 'stop' in", model.name);
            return Err(ApiError::param("stop", message));
        }
        Ok(options)
    }
}

/// Refuses token ids that the model does not have.
pub(crate) fn check_tokens(tokens: &[u32], model: &DeployedModel, param: &str) -> Result<(), ApiError> {
    match tokens.iter().find(|&&token| token as usize >= model.spec.vocab) {
        None => Ok(()),
        Some(token) => Err(ApiError::param(
            param,
            format!(
                "'{param}' has token id {token}, but the model's vocabulary has {} tokens",
                model.spec.vocab
            ),
        )),
    }
}

fn read_sampling(fields: &Fields<'_>, model: &DeployedModel) -> Result<SamplingParams, ApiError> {
    let defaults = &model.generation;
    let top_p = fields.number("top_p", 0.0..=1.0)?.or(defaults.top_p).unwrap_or(1.0);
    if top_p <= 0.0 {
        return Err(ApiError::param("top_p", "'top_p' must be greater than 0"));
    }
    let repetition_penalty =
        fields.number("repetition_penalty", 0.0..=100.0)?.or(defaults.repetition_penalty).unwrap_or(1.0);
    if repetition_penalty <= 0.0 {
        return Err(ApiError::param("repetition_penalty", "'repetition_penalty' must be greater than 0"));
    }
    let top_k = match fields.integer("top_k", -1..=i64::from(u32::MAX))? {
        Some(count) => u32::try_from(count).ok(),
        None => defaults.top_k,
    };
    let sampling = SamplingParams {
        temperature: fields.number("temperature", 0.0..=2.0)?.or(defaults.temperature).unwrap_or(1.0),
        top_k: top_k.filter(|&count| count > 0),
        top_p,
        min_p: fields.number("min_p", 0.0..=1.0)?.or(defaults.min_p).unwrap_or(0.0),
        repetition_penalty,
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        // Negative seeds are as good as others.
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
        logprobs: None,
        logit_bias: read_logit_bias(fields, model)?,
    };
    sampling.validate().map_err(ApiError::invalid)?;
    Ok(sampling)
}

fn read_logit_bias(fields: &Fields<'_>, model: &DeployedModel) -> Result<Vec<(u32, f32)>, ApiError> {
    let error = |message: String| ApiError::param("logit_bias", message);
    let biases: Option<HashMap<String, Number>> =
        fields.get("logit_bias", "an object of numbers by token id")?;
    let mut result = Vec::new();
    for (token, bias) in biases.unwrap_or_default() {
        let id: u32 = token
            .parse()
            .map_err(|_| error(format!("'logit_bias' has the key '{token}', not a token id")))?;
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let bias =
            bias.ok_or_else(|| error(format!("'logit_bias' for token {id} must be between -100 and 100")))?;
        result.push((id, bias as f32));
    }
    result.sort_unstable_by_key(|&(id, _)| id);
    let ids: Vec<u32> = result.iter().map(|&(id, _)| id).collect();
    check_tokens(&ids, model, "logit_bias")?;
    Ok(result)
}

fn read_stops(fields: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let stops = match fields.raw("stop") {
        None => return Ok(Vec::new()),
        Some(raw) if raw.starts_with('"') => fields.string("stop")?.into_iter().collect(),
        Some(_) => fields.get::<Vec<String>>("stop", "a string or a list of strings")?.unwrap_or_default(),
    };
    if stops.len() > MAX_STOPS {
        return Err(ApiError::param(
            "stop",
            format!("'stop' may have at most {MAX_STOPS} strings, got {}", stops.len()),
        ));
    }
    if stops.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
        return Err(ApiError::param(
            "stop",
            format!("each string of 'stop' must have 1 to {MAX_STOP_BYTES} bytes"),
        ));
    }
    Ok(stops)
}

/// Checks a prompt's length against the context and gives the limit for the node. `requested` is what the request
/// says; `default` is taken, cut to the context, where it says nothing. The wording is vLLM's.
pub(crate) fn check_length(
    model: &DeployedModel,
    prompt_param: &str,
    prompt_tokens: usize,
    requested: Option<usize>,
    default: Option<usize>,
) -> Result<Option<usize>, ApiError> {
    let context = model.context;
    if prompt_tokens == 0 {
        return Err(ApiError::param(prompt_param, "The prompt must have at least one token"));
    }
    if prompt_tokens >= context {
        return Err(too_long(model, prompt_param, &prompt_tokens.to_string()));
    }
    let room = context - prompt_tokens;
    match requested {
        Some(tokens) if tokens > room => Err(ApiError::context_length(
            "max_tokens",
            format!(
                "'max_tokens' or 'max_completion_tokens' is too large: {tokens}. This model's maximum context length \
                 is {context} tokens and your request has {prompt_tokens} input tokens \
                 ({tokens} > {context} - {prompt_tokens})."
            ),
        )),
        Some(tokens) => Ok(Some(tokens)),
        None => Ok(default.map(|tokens| tokens.min(room))),
    }
}

/// The error for a prompt that leaves no room for a token.
pub(crate) fn too_long(model: &DeployedModel, prompt_param: &str, tokens: &str) -> ApiError {
    ApiError::context_length(
        prompt_param,
        format!(
            "This model's maximum context length is {} tokens. However, your request has {tokens} input tokens. \
             Please reduce the length of the input.",
            model.context
        ),
    )
}
