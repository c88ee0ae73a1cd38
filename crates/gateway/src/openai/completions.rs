//! `POST /v1/completions`: text or token ids in, text and token ids out.

use std::sync::Arc;

use axum::Extension;
use axum::extract::State;
use axum::response::Response;
use tangram_node::DeployedModel;

use super::FinishedChoice;
use super::error::ApiError;
use super::fields::Fields;
use super::options::{MAX_CHOICES, MAX_LOGPROBS, Options, check_length, check_tokens};
use super::run::{Delta, Prompt, Run};
use super::stream::{self, Chunks, EventWriter};
use super::structured::Wanted;
use super::types::{Completion, TextChoice, TokenTexts, Usage};
use crate::body::RequestBody;
use crate::text::TextTokenizer;
use crate::{Gateway, RequestId};

/// OpenAI's default for `max_tokens` on this endpoint.
const DEFAULT_MAX_TOKENS: usize = 16;

/// OpenAI's limit for `best_of`.
const MAX_BEST_OF: i64 = 20;

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
    let mut options = Options::read(&fields, &model)?;
    let logprobs = fields.integer("logprobs", 0..=MAX_LOGPROBS)?;
    options.sampling.logprobs = logprobs.map(|count| count as u32);
    let wanted = Wanted::read(&fields)?;
    let returned = options.choices;
    let best_of = fields.integer("best_of", 1..=MAX_BEST_OF)?.map_or(returned, |best_of| best_of as usize);
    check_best_of(best_of, &options)?;
    if best_of > returned {
        options.choices = best_of;
        // By which the best are found, also where the request does not ask to see them.
        options.sampling.logprobs.get_or_insert(0);
    }
    let echo = fields.boolean("echo", false)?;
    refuse_unsupported(&fields, logprobs.is_some(), echo)?;
    let requested = fields.integer("max_tokens", 1..=i64::MAX)?;
    let requested = requested.map(|tokens| usize::try_from(tokens).unwrap_or(usize::MAX));

    let tokenizer = super::tokenizer(gateway, &model).await?;
    let inputs = read_inputs(&fields, "prompt")?;
    if inputs.len() * options.choices > MAX_CHOICES {
        let message = format!("one request may have at most {MAX_CHOICES} choices over all its prompts");
        return Err(ApiError::param("n", message));
    }
    let add_special_tokens = fields.boolean("add_special_tokens", true)?;
    let echoed = echo.then(|| inputs.echo(tokenizer.as_deref()));
    let tokens = tokenize(inputs, &model, tokenizer.as_ref(), add_special_tokens, "prompt").await?;
    let mut prompts = Vec::with_capacity(tokens.len());
    for tokens in tokens {
        let max_tokens = check_length(&model, "prompt", tokens.len(), requested, Some(DEFAULT_MAX_TOKENS))?;
        prompts.push(Prompt { tokens, max_tokens });
    }
    if let Some(wanted) = wanted {
        options.grammar = Some(wanted.compile(&model, tokenizer.as_ref()).await?);
    }
    let mut run = Run::start(gateway, &model, tokenizer.as_ref(), &prompts, &options)?;
    let mut chunks = TextChunks {
        id: format!("cmpl-{}", id.0),
        created: super::now(),
        model: model.name.clone(),
        prompts: prompts.into_iter().map(|prompt| prompt.tokens).collect(),
        choices: returned,
        echoed,
        offsets: vec![0; run.choices()],
        texts: TokenTexts(tokenizer),
        with_logprobs: logprobs.is_some(),
        return_token_ids: options.return_token_ids,
        include_usage: options.include_usage,
    };
    if options.stream {
        return stream::respond(run, chunks, options.include_usage).await;
    }
    let mut finished = super::collect(&mut run).await?;
    if best_of > returned {
        finished = best(finished, best_of, returned);
    }
    let mut choices = Vec::with_capacity(finished.len());
    for (index, choice) in finished.into_iter().enumerate() {
        let parts = chunks.parts(index, choice.delta);
        choices.push((index, choice.reason, parts));
    }
    let choices = choices.into_iter().map(|(index, reason, parts)| TextChoice {
        index,
        text: chunks.echo(index).to_owned() + &parts.text,
        logprobs: parts.logprobs,
        finish_reason: reason,
        token_ids: parts.token_ids,
        prompt_token_ids: chunks.prompt(index),
    });
    let completion = Completion {
        id: &chunks.id,
        object: "text_completion",
        created: chunks.created,
        model: &model.name,
        choices: choices.collect(),
        prompt_token_ids: None,
        usage: Some(Some(run.usage())),
    };
    Ok(super::respond(&completion, &run.timing()))
}

fn refuse_unsupported(fields: &Fields<'_>, logprobs: bool, echo: bool) -> Result<(), ApiError> {
    if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::unsupported("suffix", "'suffix' is not supported"));
    }
    if echo && logprobs {
        return Err(ApiError::unsupported(
            "echo",
            "'echo' with 'logprobs' is not supported: prompts have no logprobs",
        ));
    }
    Ok(())
}

fn check_best_of(best_of: usize, options: &Options) -> Result<(), ApiError> {
    if best_of < options.choices {
        let message = format!("'best_of' must be at least 'n', got {best_of} < {}", options.choices);
        return Err(ApiError::param("best_of", message));
    }
    if best_of > options.choices && options.stream {
        return Err(ApiError::param("best_of", "the best of several cannot be streamed"));
    }
    Ok(())
}

/// Of every `best_of` choices the `returned` ones with the highest mean logprob per token, best first.
fn best(finished: Vec<FinishedChoice>, best_of: usize, returned: usize) -> Vec<FinishedChoice> {
    let mean = |choice: &FinishedChoice| {
        let logprobs = &choice.delta.logprobs;
        let sum: f64 = logprobs.iter().map(|(_, logprob)| f64::from(logprob.logprob)).sum();
        sum / logprobs.len().max(1) as f64
    };
    let mut finished = finished.into_iter();
    let mut kept = Vec::new();
    loop {
        let mut of_prompt: Vec<FinishedChoice> = finished.by_ref().take(best_of).collect();
        if of_prompt.is_empty() {
            return kept;
        }
        of_prompt.sort_by(|left, right| mean(right).total_cmp(&mean(left)));
        kept.extend(of_prompt.into_iter().take(returned));
    }
}

/// A prompt or an input for embeddings in one of OpenAI's four forms.
#[derive(Debug, PartialEq)]
pub(super) enum Inputs {
    Texts(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

impl Inputs {
    pub(super) fn len(&self) -> usize {
        match self {
            Inputs::Texts(texts) => texts.len(),
            Inputs::Tokens(lists) => lists.len(),
        }
    }

    /// The text of each, as `echo` gives it back.
    fn echo(&self, tokenizer: Option<&TextTokenizer>) -> Vec<String> {
        match self {
            Inputs::Texts(texts) => texts.clone(),
            Inputs::Tokens(lists) => {
                let decode = |tokens: &Vec<u32>| tokenizer.map(|tokenizer| tokenizer.decode(tokens, false));
                lists.iter().map(|tokens| decode(tokens).unwrap_or_default()).collect()
            }
        }
    }
}

/// Reads a string, a list of strings, a list of token ids or a list of such lists; at least one, none empty.
pub(super) fn read_inputs(fields: &Fields<'_>, name: &str) -> Result<Inputs, ApiError> {
    const EXPECTED: &str = "a string, a list of strings, a list of token ids or a list of lists of token ids";
    let Some(raw) = fields.raw(name) else {
        return Err(ApiError::param(name, format!("'{name}' is required")));
    };
    let inside = raw.strip_prefix('[').map(str::trim_start);
    let inputs = match inside.and_then(|inside| inside.chars().next()) {
        None => Inputs::Texts(fields.get::<String>(name, EXPECTED)?.into_iter().collect()),
        Some('"') => Inputs::Texts(fields.get(name, EXPECTED)?.unwrap_or_default()),
        Some('[') => Inputs::Tokens(fields.get(name, EXPECTED)?.unwrap_or_default()),
        Some(_) => {
            let tokens: Vec<u32> = fields.get(name, EXPECTED)?.unwrap_or_default();
            Inputs::Tokens(if tokens.is_empty() { vec![] } else { vec![tokens] })
        }
    };
    let empty = match &inputs {
        Inputs::Texts(texts) => texts.is_empty(),
        Inputs::Tokens(lists) => lists.is_empty() || lists.iter().any(Vec::is_empty),
    };
    if empty {
        return Err(ApiError::param(name, format!("'{name}' must not be empty")));
    }
    Ok(inputs)
}

/// Token ids of all inputs, checked against the vocabulary.
pub(super) async fn tokenize(
    inputs: Inputs,
    model: &DeployedModel,
    tokenizer: Option<&Arc<TextTokenizer>>,
    add_special_tokens: bool,
    param: &str,
) -> Result<Vec<Vec<u32>>, ApiError> {
    match (inputs, tokenizer) {
        (Inputs::Texts(texts), Some(tokenizer)) => {
            super::encode(model, tokenizer, texts, add_special_tokens, param).await
        }
        (Inputs::Texts(_), None) => {
            let message = format!("The model `{}` has no tokenizer; give '{param}' as token ids", model.name);
            Err(ApiError::param(param, message))
        }
        (Inputs::Tokens(lists), _) => {
            for tokens in &lists {
                check_tokens(tokens, model, param)?;
            }
            Ok(lists)
        }
    }
}

struct TextChunks {
    id: String,
    created: u64,
    model: String,
    prompts: Vec<Vec<u32>>,
    /// Choices per prompt.
    choices: usize,
    /// By prompt.
    echoed: Option<Vec<String>>,
    /// By choice: characters that logprobs have covered.
    offsets: Vec<usize>,
    texts: TokenTexts,
    with_logprobs: bool,
    return_token_ids: bool,
    include_usage: bool,
}

/// What a delta contributes to a choice.
struct Parts {
    text: String,
    logprobs: Option<super::types::TextLogprobs>,
    token_ids: Option<Vec<u32>>,
}

impl TextChunks {
    fn parts(&mut self, index: usize, delta: Delta) -> Parts {
        let mut unused = 0;
        let offset = self.offsets.get_mut(index).unwrap_or(&mut unused);
        Parts {
            text: delta.text,
            logprobs: self.with_logprobs.then(|| self.texts.legacy(&delta.logprobs, offset)),
            token_ids: self.return_token_ids.then_some(delta.tokens),
        }
    }

    /// The text that a choice begins with.
    fn echo(&self, index: usize) -> &str {
        self.echoed.as_ref().and_then(|texts| texts.get(index / self.choices)).map_or("", String::as_str)
    }

    /// The prompt of a choice if token ids are wanted.
    fn prompt(&self, index: usize) -> Option<&[u32]> {
        let prompt = self.prompts.get(index / self.choices).filter(|_| self.return_token_ids);
        prompt.map(Vec::as_slice)
    }

    fn write(&self, choice: Option<TextChoice<'_>>, usage: Option<Usage>, out: &mut EventWriter) {
        out.event(&Completion {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.model,
            choices: choice.into_iter().collect(),
            prompt_token_ids: None,
            usage: self.include_usage.then_some(usage),
        });
    }

    fn write_parts(&self, index: usize, parts: Parts, reason: Option<&'static str>, out: &mut EventWriter) {
        let choice = TextChoice {
            index,
            text: parts.text,
            logprobs: parts.logprobs,
            finish_reason: reason,
            token_ids: parts.token_ids,
            prompt_token_ids: None,
        };
        self.write(Some(choice), None, out);
    }
}

impl Chunks for TextChunks {
    fn started(&mut self, index: usize, out: &mut EventWriter) {
        let (text, prompt_token_ids) = (self.echo(index).to_owned(), self.prompt(index));
        if text.is_empty() && prompt_token_ids.is_none() {
            return;
        }
        let token_ids = self.return_token_ids.then(Vec::new);
        let choice =
            TextChoice { index, text, logprobs: None, finish_reason: None, token_ids, prompt_token_ids };
        self.write(Some(choice), None, out);
    }

    fn delta(&mut self, index: usize, delta: Delta, out: &mut EventWriter) {
        if delta.text.is_empty() && !self.with_logprobs && !self.return_token_ids {
            return;
        }
        let parts = self.parts(index, delta);
        self.write_parts(index, parts, None, out);
    }

    fn finished(&mut self, index: usize, delta: Delta, reason: &'static str, out: &mut EventWriter) {
        let mut parts = self.parts(index, delta);
        parts.logprobs = parts.logprobs.filter(|logprobs| !logprobs.is_empty());
        self.write_parts(index, parts, Some(reason), out);
    }

    fn usage(&mut self, usage: Usage, out: &mut EventWriter) {
        self.write(None, Some(usage), out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(prompt: &str) -> Result<Inputs, ApiError> {
        let body = format!("{{\"prompt\": {prompt}}}");
        read_inputs(&Fields::parse(body.as_bytes()).unwrap(), "prompt")
    }

    #[test]
    fn the_four_forms_of_prompts() {
        assert_eq!(inputs("\"a\"").unwrap(), Inputs::Texts(vec!["a".into()]));
        assert_eq!(inputs("[ \"a\", \"\"]").unwrap(), Inputs::Texts(vec!["a".into(), String::new()]));
        assert_eq!(inputs("[ 1, 2]").unwrap(), Inputs::Tokens(vec![vec![1, 2]]));
        assert_eq!(inputs("[[1], [2, 3]]").unwrap(), Inputs::Tokens(vec![vec![1], vec![2, 3]]));
    }

    #[test]
    fn the_best_have_the_highest_mean_logprob() {
        let choice = |text: &str, logprobs: &[f32]| {
            let logprob = |&logprob: &f32| (0, tangram_node::TokenLogprob { logprob, top: vec![] });
            let logprobs = logprobs.iter().map(logprob).collect();
            FinishedChoice { delta: Delta { text: text.to_owned(), tokens: vec![], logprobs }, reason: None }
        };
        let finished = vec![
            choice("a", &[-1.0, -1.0, -1.0]),
            choice("b", &[-1.5]),
            choice("c", &[-0.5, -0.5]),
            choice("d", &[-3.0]),
            choice("e", &[-4.0]),
            choice("f", &[-2.0]),
        ];
        let texts: Vec<String> = best(finished, 3, 2).into_iter().map(|choice| choice.delta.text).collect();
        assert_eq!(texts, ["c", "a", "f", "d"]);
    }

    #[test]
    fn bad_prompts_are_refused() {
        for prompt in [
            "null",
            "[]",
            "[[]]",
            "[[1], []]",
            "5",
            "{}",
            "[1, \"a\"]",
            "[\"a\", 1]",
            "[-1]",
            "[1.5]",
            "[4294967296]",
            "[[1], 2]",
            "true",
            "[null]",
        ] {
            let error = inputs(prompt).unwrap_err();
            assert_eq!(error.body()["error"]["param"], "prompt", "{prompt}");
            assert_eq!(error.status, 400);
        }
    }
}
