//! The running generations behind one request, merged: tokens become text, stop strings end choices, figures add up.
//!
//! Dropping a [`Run`] drops its generations, which cancels them.

use std::sync::Arc;
use std::time::Instant;

use futures::stream::{BoxStream, SelectAll, StreamExt};
use tangram_node::{
    DeployedModel, FinishReason, GenerateEvent, GenerateRequest, GeneratedToken, Generation, RequestError,
    Timing, TokenLogprob,
};
use tokio::sync::watch;

use super::error::ApiError;
use super::options::Options;
use super::types::Usage;
use crate::metrics::Metrics;
use crate::text::{Detokenizer, StopMatcher, StopOutcome, TextTokenizer};
use crate::{ActiveRequest, Gateway};

/// What a choice has grown by.
#[derive(Debug, Default)]
pub(crate) struct Delta {
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    /// One for each of `tokens` when asked for.
    pub(crate) logprobs: Vec<(u32, TokenLogprob)>,
}

impl Delta {
    pub(crate) fn append(&mut self, other: Delta) {
        self.text.push_str(&other.text);
        self.tokens.extend(other.tokens);
        self.logprobs.extend(other.logprobs);
    }
}

/// What happens to a choice.
#[derive(Debug)]
pub(crate) enum ChoiceEvent {
    /// The first token is about to follow.
    Started(Timing),
    /// More text or tokens.
    Delta(Delta),
    /// The last part and OpenAI's `finish_reason`.
    Finished { delta: Delta, reason: &'static str, timing: Timing },
    /// The end by an error.
    Failed(RequestError),
}

/// A prompt, and how many tokens may follow it (`None`: up to the context).
#[derive(Debug)]
pub(crate) struct Prompt {
    pub(crate) tokens: Vec<u32>,
    pub(crate) max_tokens: Option<usize>,
}

/// One generation that becomes text.
struct Choice {
    /// `None` after the end.
    generation: Option<Generation>,
    /// `None` for models without a tokenizer, whose text is empty.
    detokenizer: Option<Detokenizer>,
    stops: StopMatcher,
    /// Tokens that end the sequence and are not part of the text.
    end_tokens: Vec<u32>,
    /// Special tokens that are part of the text nevertheless.
    shown_tokens: Vec<(u32, String)>,
    timing: Timing,
    first_token: Option<Instant>,
}

impl Choice {
    async fn next(&mut self) -> Option<ChoiceEvent> {
        let generation = self.generation.as_mut()?;
        let event = match generation.next().await {
            Some(GenerateEvent::Started(timing)) => {
                self.timing = timing;
                ChoiceEvent::Started(timing)
            }
            Some(GenerateEvent::Token(token)) => self.token(token),
            Some(GenerateEvent::Finished { reason, timing }) => self.finish(reason, timing),
            Some(GenerateEvent::Failed(error)) => ChoiceEvent::Failed(error),
            None => {
                ChoiceEvent::Failed(RequestError::Internal("the generation ended without a result".into()))
            }
        };
        if matches!(event, ChoiceEvent::Finished { .. } | ChoiceEvent::Failed(_)) {
            self.generation = None;
        }
        Some(event)
    }

    fn token(&mut self, token: GeneratedToken) -> ChoiceEvent {
        let first_token = *self.first_token.get_or_insert_with(Instant::now);
        let text = match &mut self.detokenizer {
            Some(detokenizer) if !self.end_tokens.contains(&token.id) => {
                match self.shown_tokens.iter().find(|(id, _)| *id == token.id) {
                    Some((_, text)) => detokenizer.show(text),
                    None => detokenizer.push(token.id),
                }
            }
            _ => String::new(),
        };
        let logprobs = token.logprob.map(|logprob| (token.id, logprob)).into_iter().collect();
        let delta = |text| Delta { text, tokens: vec![token.id], logprobs };
        match self.stops.push(&text) {
            StopOutcome::Continue(text) => ChoiceEvent::Delta(delta(text)),
            StopOutcome::Stopped(text) => {
                let timing = Timing { decode: first_token.elapsed(), ..self.timing };
                ChoiceEvent::Finished { delta: delta(text), reason: "stop", timing }
            }
        }
    }

    fn finish(&mut self, reason: FinishReason, timing: Timing) -> ChoiceEvent {
        let rest = self.detokenizer.as_mut().map(Detokenizer::finish).unwrap_or_default();
        let (text, stopped) = match self.stops.push(&rest) {
            StopOutcome::Continue(text) => (text + &self.stops.finish(), false),
            StopOutcome::Stopped(text) => (text, true),
        };
        let reason = if stopped || reason == FinishReason::Stop { "stop" } else { "length" };
        ChoiceEvent::Finished { delta: Delta { text, ..Delta::default() }, reason, timing }
    }
}

/// All choices of a request. Choice `i` continues prompt `i / choices`.
pub(crate) struct Run {
    events: SelectAll<BoxStream<'static, (usize, ChoiceEvent)>>,
    /// By choice, as far as known.
    timings: Vec<Option<Timing>>,
    finished: usize,
    prompt_tokens: usize,
    completion_tokens: usize,
    /// Becomes true when the server cannot wait for its requests any longer.
    cut: watch::Receiver<bool>,
    metrics: Arc<Metrics>,
    model: String,
    _active: ActiveRequest,
}

impl Run {
    /// Submits everything. If one submission is refused, all are cancelled.
    pub(crate) fn start(
        gateway: &Gateway,
        model: &Arc<DeployedModel>,
        tokenizer: Option<&Arc<TextTokenizer>>,
        prompts: &[Prompt],
        options: &Options,
    ) -> Result<Run, ApiError> {
        let mut end_tokens = options.stop_token_ids.clone();
        if !options.ignore_eos {
            end_tokens.extend(&model.generation.eos);
        }
        let mut events = SelectAll::new();
        for index in 0..prompts.len() * options.choices {
            let Some(prompt) = prompts.get(index / options.choices) else { break };
            let mut sampling = options.sampling.clone();
            // Choices of one prompt with a seed differ from each other, but not from run to run (as in vLLM).
            sampling.seed = sampling.seed.map(|seed| seed.wrapping_add((index % options.choices) as u64));
            let generation = gateway.generator.generate(GenerateRequest {
                model: model.clone(),
                prompt: prompt.tokens.clone(),
                sampling,
                max_tokens: prompt.max_tokens,
                ignore_eos: options.ignore_eos,
                stop_token_ids: options.stop_token_ids.clone(),
                grammar: options.grammar.clone(),
            })?;
            let detokenizer = |tokenizer: &Arc<TextTokenizer>| {
                Detokenizer::new(tokenizer.clone(), &prompt.tokens, options.skip_special_tokens)
            };
            let choice = Choice {
                generation: Some(generation),
                detokenizer: tokenizer.map(detokenizer),
                stops: StopMatcher::new(options.stops.clone()),
                end_tokens: end_tokens.clone(),
                shown_tokens: options.shown_tokens.clone(),
                timing: Timing::default(),
                first_token: None,
            };
            let stream = futures::stream::unfold(choice, async |mut choice| {
                let event = choice.next().await?;
                Some((event, choice))
            });
            events.push(stream.map(move |event| (index, event)).boxed());
        }
        Ok(Run {
            timings: vec![None; events.len()],
            events,
            finished: 0,
            prompt_tokens: prompts.iter().map(|prompt| prompt.tokens.len()).sum(),
            completion_tokens: 0,
            cut: gateway.cut.subscribe(),
            metrics: gateway.metrics.clone(),
            model: model.name.clone(),
            _active: gateway.begin_request(),
        })
    }

    /// Number of choices.
    pub(crate) fn choices(&self) -> usize {
        self.timings.len()
    }

    /// The next event of any choice; `None` when all have finished. After an error nothing else is worth asking for.
    pub(crate) async fn next(&mut self) -> Result<Option<(usize, ChoiceEvent)>, ApiError> {
        let next = tokio::select! {
            next = self.events.next() => next,
            Ok(_) = self.cut.wait_for(|cut| *cut) => return Err(RequestError::ShuttingDown.into()),
        };
        let Some((index, event)) = next else {
            return Ok(None);
        };
        let (tokens, timing) = match &event {
            ChoiceEvent::Started(timing) => (0, Some(*timing)),
            ChoiceEvent::Delta(delta) => (delta.tokens.len(), None),
            ChoiceEvent::Finished { delta, timing, .. } => {
                self.finished += 1;
                (delta.tokens.len(), Some(*timing))
            }
            ChoiceEvent::Failed(error) => return Err(error.clone().into()),
        };
        self.completion_tokens += tokens;
        if let (Some(timing), Some(slot)) = (timing, self.timings.get_mut(index)) {
            *slot = Some(timing);
        }
        Ok(Some((index, event)))
    }

    /// The slowest choice's figures, with the bytes of all.
    pub(crate) fn timing(&self) -> Timing {
        self.timings.iter().flatten().fold(Timing::default(), |all, one| Timing {
            queue: all.queue.max(one.queue),
            load: all.load.max(one.load),
            prefill: all.prefill.max(one.prefill),
            decode: all.decode.max(one.decode),
            first_token: all.first_token.max(one.first_token),
            // Choices of one prompt find what the first of them computed; no more than the prompt can be cached.
            cached_tokens: (all.cached_tokens + one.cached_tokens).min(self.prompt_tokens as u64),
            bytes_loaded: all.bytes_loaded + one.bytes_loaded,
            bytes_reused: all.bytes_reused + one.bytes_reused,
        })
    }

    /// Tokens and figures so far.
    pub(crate) fn usage(&self) -> Usage {
        Usage::of_generation(self.prompt_tokens, self.completion_tokens, &self.timing())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let finished = self.finished == self.choices();
        self.metrics.observe_tokens(&self.model, self.prompt_tokens, self.completion_tokens);
        for timing in self.timings.iter().flatten() {
            self.metrics.observe_timing(&self.model, timing, finished);
        }
    }
}
