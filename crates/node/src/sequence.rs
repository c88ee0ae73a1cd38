//! One sequence from submission to its last event: a generation, or one input of an embedding request.
//!
//! It owns its KV blocks; whoever drops a sequence gives them back to the pool first.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tangram_checkpoint::Hash;
use tangram_device::Extent;
use tangram_engine::sampling::Sampler;
use tangram_pool::{BlockHash, Prefix};
use tokio::sync::{mpsc, oneshot};

use crate::api::{Embeddings, FinishReason, GenerateEvent, RequestError, Timing};
use crate::fleet::Ticket;
use crate::swap::Swapped;

/// Where a sequence's results go.
pub(crate) enum Sink {
    /// Tokens of a generation.
    Generate(Box<Generate>),
    /// Input `index` of a request for embeddings or scores.
    Embed { group: Arc<EmbedGroup>, index: usize },
}

impl Sink {
    /// No more than so many tokens are generated.
    pub(crate) fn limit(&mut self, most: usize) {
        if let Sink::Generate(generate) = self {
            generate.max_tokens = generate.max_tokens.min(most);
        }
    }

    /// Tokens that can still be generated.
    pub(crate) fn left(&self) -> usize {
        match self {
            Sink::Generate(generate) => generate.max_tokens.saturating_sub(generate.generated),
            Sink::Embed { .. } => 0,
        }
    }
}

/// The generating side of a sequence.
pub(crate) struct Generate {
    pub(crate) sampler: Sampler,
    pub(crate) max_tokens: usize,
    pub(crate) end_tokens: Vec<u32>,
    pub(crate) generated: usize,
    pub(crate) events: mpsc::UnboundedSender<GenerateEvent>,
}

/// The inputs of one embedding request, which end together.
pub(crate) struct EmbedGroup {
    pub(crate) state: Mutex<EmbedState>,
}

pub(crate) struct EmbedState {
    pub(crate) vectors: Vec<Option<Vec<f32>>>,
    pub(crate) timing: Timing,
    pub(crate) result: Option<oneshot::Sender<Result<Embeddings, RequestError>>>,
}

/// A sequence, waiting or running.
pub(crate) struct Sequence {
    /// Order of arrival on this node; a preempted sequence keeps it.
    pub(crate) arrival: u64,
    /// Key of the model.
    pub(crate) model: usize,
    /// Prompt and generated tokens.
    pub(crate) tokens: Vec<u32>,
    /// Tokens whose keys and values are in the KV blocks.
    pub(crate) computed: usize,
    /// Full blocks that it shares with other sequences, and the ones after them that it owns.
    pub(crate) prefix: Prefix,
    pub(crate) kv: Vec<Extent>,
    /// Hashes of the leading full blocks of `tokens`, as far as they have been needed.
    hashes: Vec<BlockHash>,
    /// Where the second of two texts begins.
    pub(crate) second: Option<usize>,
    /// Whether it is rotated as a long one ([`tangram_engine::Model::is_long`]).
    long: bool,
    /// Identity of its adapter: what its keys and values depend on besides the tokens.
    pub(crate) adapter: Option<Hash>,
    pub(crate) cancelled: Arc<AtomicBool>,
    pub(crate) sink: Sink,
    /// Counts it on its device.
    pub(crate) ticket: Option<Ticket>,
    pub(crate) submitted: Instant,
    /// First admission; a preemption does not reset it.
    pub(crate) admitted: Option<Instant>,
    /// Whether its KV has been taken from it before.
    pub(crate) preempted: bool,
    /// Its keys and values, while it waits to come back.
    pub(crate) swapped: Option<Swapped>,
    pub(crate) started: bool,
    pub(crate) first_token: Option<Instant>,
    pub(crate) timing: Timing,
}

impl Sequence {
    /// A sequence that has just been submitted.
    pub(crate) fn new(
        arrival: u64,
        model: usize,
        tokens: Vec<u32>,
        cancelled: Arc<AtomicBool>,
        sink: Sink,
    ) -> Sequence {
        Sequence {
            arrival,
            model,
            tokens,
            computed: 0,
            prefix: Prefix::default(),
            kv: Vec::new(),
            hashes: Vec::new(),
            second: None,
            long: false,
            adapter: None,
            cancelled,
            sink,
            ticket: None,
            submitted: Instant::now(),
            admitted: None,
            preempted: false,
            swapped: None,
            started: false,
            first_token: None,
            timing: Timing::default(),
        }
    }

    /// Says how it is rotated. `true` if that changes: then what has been computed of it is worth nothing.
    pub(crate) fn set_long(&mut self, long: bool) -> bool {
        let changed = std::mem::replace(&mut self.long, long) != long;
        if changed {
            self.hashes.clear();
            self.swapped = None;
        }
        changed
    }

    /// Gives up what has been computed of it, for the pool to take back: its shared blocks and its own.
    pub(crate) fn forget(&mut self) -> (Prefix, Vec<Extent>) {
        self.computed = 0;
        (std::mem::take(&mut self.prefix), std::mem::take(&mut self.kv))
    }

    /// Hashes of the first `count` blocks of `block_tokens` tokens, which must all be full. Each covers everything
    /// before it, the adapter and the rotation, so equal hashes mean equal keys and values.
    pub(crate) fn block_hashes(&mut self, count: usize, block_tokens: usize) -> &[BlockHash] {
        for index in self.hashes.len()..count {
            let before = self.hashes.last().or(self.adapter.as_ref().map(|identity| &identity.0));
            let mut bytes = before.map_or(Vec::new(), |hash| hash.to_vec());
            if self.long && index == 0 {
                bytes.extend(b"long");
            }
            let tokens = &self.tokens[index * block_tokens..(index + 1) * block_tokens];
            bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
            self.hashes.push(Hash::of(&bytes).0);
        }
        &self.hashes[..count]
    }

    /// KV blocks that it holds.
    pub(crate) fn blocks(&self) -> usize {
        self.prefix.len() + self.kv.len()
    }

    /// Tokens that it can still get.
    pub(crate) fn left(&self) -> usize {
        self.sink.left()
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Tokens that the next steps have to compute.
    pub(crate) fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// The first result is there: fixes the phases before it.
    pub(crate) fn first_result(&mut self, now: Instant) {
        if self.first_token.is_none() {
            self.first_token = Some(now);
            self.timing.first_token = now.duration_since(self.submitted);
        }
    }

    /// Ends the sequence with an error. The KV must have been given back.
    pub(crate) fn fail(self, error: RequestError) {
        match self.sink {
            Sink::Generate(generate) => {
                // Nobody listens any more when the client has gone; that is no error of ours.
                let _ = generate.events.send(GenerateEvent::Failed(error));
            }
            Sink::Embed { group, .. } => {
                let mut state = group.state.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(result) = state.result.take() {
                    let _ = result.send(Err(error));
                }
            }
        }
    }

    /// Ends a generation in good order. The KV must have been given back.
    pub(crate) fn finish(mut self, reason: FinishReason, now: Instant) {
        self.timing.decode = self.first_token.map_or(Duration::ZERO, |first| now.duration_since(first));
        if let Sink::Generate(generate) = self.sink {
            let _ = generate.events.send(GenerateEvent::Finished { reason, timing: self.timing });
        }
    }

    /// Delivers the vector of an embedding input; the last one of its request sends the result.
    pub(crate) fn deliver(mut self, vector: Vec<f32>, now: Instant) {
        self.first_result(now);
        let Sink::Embed { group, index } = self.sink else { return };
        let mut state = group.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = state.vectors.get_mut(index) {
            *place = Some(vector);
        }
        let (sum, own) = (&mut state.timing, self.timing);
        sum.queue = sum.queue.max(own.queue);
        sum.load = sum.load.max(own.load);
        sum.prefill = sum.prefill.max(own.prefill);
        sum.first_token = sum.first_token.max(own.first_token);
        // One activation serves all inputs: only the input that caused it has loaded bytes.
        if own.bytes_loaded >= sum.bytes_loaded {
            sum.bytes_loaded = own.bytes_loaded;
            sum.bytes_reused = own.bytes_reused;
        }
        if state.vectors.iter().all(Option::is_some)
            && let Some(result) = state.result.take()
        {
            let vectors = state.vectors.iter_mut().filter_map(Option::take).collect();
            let _ = result.send(Ok(Embeddings { vectors, timing: state.timing }));
        }
    }
}
