//! Requests: checked against their model, cut into sequences, sent to a device, and what their clients hold.
//!
//! Whatever can be refused is refused here; the engine loop takes what it is given.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use tangram_checkpoint::Output;
use tangram_engine::sampling::Sampler;
use tokio::sync::{mpsc, oneshot};

use crate::Node;
use crate::api::{
    DeployedModel, Embeddings, GenerateEvent, GenerateRequest, Generator, RequestError, TextPair, Timing,
};
use crate::sequence::{EmbedGroup, EmbedState, Generate, Sequence, Sink};
use crate::worker::Command;

/// Tokens for which a GPU must have room to be given a request that does not say how many it wants; or as many as its prompt
/// has, if that is more. The answer goes on as long as this GPU's memory lets it.
const OPEN_ENDED_TOKENS: usize = 8192;

impl Node {
    /// Submits a request for tokens.
    ///
    /// # Errors
    /// As [`Generator::generate`].
    pub fn generate(&self, request: GenerateRequest) -> Result<Generation, RequestError> {
        let GenerateRequest { model, prompt, sampling, max_tokens, ignore_eos, stop_token_ids, grammar } =
            request;
        if !model.spec.generates() {
            let name = &model.name;
            return Err(RequestError::Invalid(format!(
                "model '{name}' gives embeddings; use /v1/embeddings"
            )));
        }
        check_tokens(&model, &prompt)?;
        let room = model.context.saturating_sub(prompt.len());
        if room == 0 || max_tokens.is_some_and(|max| max > room) {
            return Err(too_long(&model, prompt.len(), max_tokens));
        }
        if max_tokens == Some(0) {
            return Err(RequestError::Invalid("max_tokens must be at least 1".to_owned()));
        }
        sampling.validate().map_err(RequestError::Invalid)?;
        let mut end_tokens = stop_token_ids;
        if !ignore_eos {
            end_tokens.extend(&model.generation.eos);
        }
        let (events, receiver) = mpsc::unbounded_channel();
        let constraint = grammar.map(|grammar| grammar.start(&end_tokens));
        let sampler = Sampler::new(sampling, &prompt, model.spec.vocab).constrained(constraint);
        let sink = Sink::Generate(Box::new(Generate {
            sampler,
            max_tokens: max_tokens.unwrap_or(room),
            end_tokens,
            generated: 0,
            events,
        }));
        let needs = match max_tokens {
            Some(max) => prompt.len() + max,
            None => prompt.len() + room.min(OPEN_ENDED_TOKENS.max(prompt.len())),
        };
        let cancel = self.submit(&model, needs, vec![(prompt, None, sink)])?;
        Ok(Generation { events: receiver, _cancel: Some(cancel) })
    }

    /// Submits texts for embedding, as token ids with the special tokens already in place.
    ///
    /// # Errors
    /// As [`Node::generate`].
    pub fn embed(
        &self,
        model: &Arc<DeployedModel>,
        inputs: Vec<Vec<u32>>,
    ) -> Result<Embedding, RequestError> {
        if !matches!(model.spec.output, Output::Embedding { .. }) {
            let name = &model.name;
            return Err(RequestError::Invalid(format!("model '{name}' gives no embeddings")));
        }
        self.read(model, inputs.into_iter().map(|tokens| TextPair { tokens, second: None }).collect())
    }

    /// Submits pairs of texts for scoring.
    ///
    /// # Errors
    /// As [`Node::generate`].
    pub fn score(&self, model: &Arc<DeployedModel>, pairs: Vec<TextPair>) -> Result<Embedding, RequestError> {
        if !model.spec.scores() {
            let name = &model.name;
            return Err(RequestError::Invalid(format!("model '{name}' does not score pairs of texts")));
        }
        self.read(model, pairs)
    }

    /// Submits inputs that are read as a whole.
    fn read(&self, model: &Arc<DeployedModel>, inputs: Vec<TextPair>) -> Result<Embedding, RequestError> {
        if inputs.is_empty() {
            return Err(RequestError::Invalid("input must not be empty".to_owned()));
        }
        for TextPair { tokens, .. } in &inputs {
            check_tokens(model, tokens)?;
            if tokens.len() > model.context {
                return Err(too_long(model, tokens.len(), None));
            }
        }
        let (result, receiver) = oneshot::channel();
        let state =
            EmbedState { vectors: vec![None; inputs.len()], timing: Timing::default(), result: Some(result) };
        let group = Arc::new(EmbedGroup { state: Mutex::new(state) });
        let longest = inputs.iter().map(|input| input.tokens.len()).max().unwrap_or(0);
        let inputs = inputs
            .into_iter()
            .enumerate()
            .map(|(index, input)| (input.tokens, input.second, Sink::Embed { group: group.clone(), index }))
            .collect();
        let cancel = self.submit(model, longest, inputs)?;
        Ok(Embedding { result: receiver, _cancel: cancel })
    }

    /// Sends sequences to a device, all to the same, on which the longest can have at least `needs` tokens.
    fn submit(
        &self,
        model: &DeployedModel,
        needs: usize,
        sequences: Vec<(Vec<u32>, Option<usize>, Sink)>,
    ) -> Result<Cancel, RequestError> {
        if self.closing.load(Ordering::Acquire) {
            return Err(RequestError::ShuttingDown);
        }
        let waiting = self.fleet.waiting();
        if waiting >= self.max_waiting {
            return Err(RequestError::QueueFull { waiting });
        }
        // Whether it fits on the largest was asked before.
        let device = self.fleet.choose(model, sequences.iter().map(|(tokens, ..)| tokens.len()), needs);
        let device = device.ok_or_else(|| too_long(model, needs, None))?;
        let cancel = Cancel::new(&self.fleet.member(device).commands);
        let context = self.fleet.context(device, model);
        for (tokens, second, mut sink) in sequences {
            sink.limit(context.saturating_sub(tokens.len()));
            let arrival = self.next_arrival.fetch_add(1, Ordering::Relaxed);
            let mut sequence = Sequence::new(arrival, model.index, tokens, cancel.flag.clone(), sink);
            sequence.second = second;
            if !self.fleet.send(device, model, Box::new(sequence)) {
                return Err(RequestError::ShuttingDown);
            }
        }
        Ok(cancel)
    }
}

impl Generator for Node {
    fn generate(&self, request: GenerateRequest) -> Result<Generation, RequestError> {
        Node::generate(self, request)
    }
}

/// Ends requests whose client has gone: set on drop, seen by the engine loop before its next step.
struct Cancel {
    flag: Arc<AtomicBool>,
    commands: Sender<Command>,
}

impl Cancel {
    fn new(commands: &Sender<Command>) -> Cancel {
        Cancel { flag: Arc::new(AtomicBool::new(false)), commands: commands.clone() }
    }
}

impl Drop for Cancel {
    fn drop(&mut self) {
        self.flag.store(true, Ordering::Release);
        let _ = self.commands.send(Command::Wake);
    }
}

/// A generation under way. Dropping it cancels the request; its KV is free before the next step.
pub struct Generation {
    events: mpsc::UnboundedReceiver<GenerateEvent>,
    /// `None` if the events come from elsewhere, where a closed channel says the same.
    _cancel: Option<Cancel>,
}

impl From<mpsc::UnboundedReceiver<GenerateEvent>> for Generation {
    fn from(events: mpsc::UnboundedReceiver<GenerateEvent>) -> Generation {
        Generation { events, _cancel: None }
    }
}

impl Generation {
    /// The next event; `None` after [`GenerateEvent::Finished`] or [`GenerateEvent::Failed`].
    pub async fn next(&mut self) -> Option<GenerateEvent> {
        self.events.recv().await
    }

    /// As [`Generation::next`], blocking the thread; not for use inside an async runtime.
    pub fn next_blocking(&mut self) -> Option<GenerateEvent> {
        self.events.blocking_recv()
    }
}

/// An embedding request under way. Dropping it cancels the request.
pub struct Embedding {
    result: oneshot::Receiver<Result<Embeddings, RequestError>>,
    _cancel: Cancel,
}

impl Embedding {
    /// Waits for the result.
    ///
    /// # Errors
    /// When the request failed.
    pub async fn result(self) -> Result<Embeddings, RequestError> {
        self.result.await.unwrap_or(Err(RequestError::ShuttingDown))
    }

    /// As [`Embedding::result`], blocking the thread; not for use inside an async runtime.
    ///
    /// # Errors
    /// When the request failed.
    pub fn result_blocking(self) -> Result<Embeddings, RequestError> {
        self.result.blocking_recv().unwrap_or(Err(RequestError::ShuttingDown))
    }
}

fn check_tokens(model: &DeployedModel, tokens: &[u32]) -> Result<(), RequestError> {
    if tokens.is_empty() {
        return Err(RequestError::Invalid("the prompt is empty; it needs at least one token".to_owned()));
    }
    if model.context == 0 {
        return Err(RequestError::Invalid(format!(
            "model '{}' ({} bytes) does not fit into this server's device memory; start it with more",
            model.name, model.weight_bytes
        )));
    }
    match tokens.iter().find(|&&token| token as usize >= model.spec.vocab) {
        Some(token) => Err(RequestError::Invalid(format!(
            "token id {token} is outside the vocabulary of '{}' ({} tokens)",
            model.name, model.spec.vocab
        ))),
        None => Ok(()),
    }
}

fn too_long(model: &DeployedModel, prompt: usize, max_tokens: Option<usize>) -> RequestError {
    let asked = match max_tokens {
        Some(max) => format!("{} tokens ({prompt} in the prompt, {max} to generate)", prompt + max),
        None => format!("{prompt} tokens in the prompt"),
    };
    let limit = if model.context < model.spec.context {
        format!("{} tokens (what this server's device memory holds beside the weights)", model.context)
    } else {
        format!("{} tokens", model.context)
    };
    RequestError::Invalid(format!(
        "This model's maximum context length is {limit}, but you asked for {asked}."
    ))
}
