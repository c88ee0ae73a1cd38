//! What a model will take on this node before anything of it is loaded: room, and time to a first token.
//!
//! Composes what the executor knows of its work, what the machine was measured to do and the arithmetic of the policy
//! crate. Learns from every load and from passes that ran undisturbed; must never be on the way of either.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use tangram_checkpoint::DType;
use tangram_engine::{KvLayout, Model, PassShape};
use tangram_policy::forecast::{self, Footprint};
use tangram_policy::stall::Prediction;
use tangram_pool::ALIGNMENT;

use crate::api::{ModelForecast, PromptProfile};
use crate::machine::{Corrections, Machine};
use crate::worker::{MAX_BATCH, step_tokens};

/// Prompt length for which listings show times.
pub const SHOWN_PROMPT_TOKENS: usize = 128;
/// Passes of at least this many tokens are prompts to the corrections; smaller ones are decoding.
const PROMPT_TOKENS: usize = 16;
/// Of the passes that decode, one in so many is compared with its forecast, which costs more than nothing.
const DECODING_SAMPLE: u32 = 32;
/// Loads of fewer bytes say more about the time to begin than about the link.
const TELLING_BYTES: u64 = 4 << 20;

/// What a model takes of a pool.
pub(crate) fn footprint(engine: &Model, weight_pages: u64, page_bytes: u64) -> Footprint {
    let block = |kv: KvLayout| (kv.block_bytes.next_multiple_of(ALIGNMENT), kv.block_tokens);
    let (block_bytes, block_tokens) = engine.kv().map_or((0, 1), block);
    Footprint { page_bytes, weight_pages, block_bytes: block_bytes as u64, block_tokens: block_tokens as u64 }
}

/// The weight types that have to be measured for forecasts of a model.
pub(crate) fn weight_types(engine: &Model) -> Vec<DType> {
    let stages = engine.work(std::slice::from_ref(&(0..1)), 1);
    let mut dtypes = Vec::new();
    for (dtype, _) in stages.iter().flat_map(|stage| &stage.weights) {
        if !dtypes.contains(dtype) {
            dtypes.push(*dtype);
        }
    }
    dtypes
}

/// The forecast for one deployed model on this node's device. Times are those of a device that does nothing else.
pub struct Forecast {
    engine: Arc<Model>,
    machine: Arc<Machine>,
    footprint: Footprint,
    /// Bytes of the tensors that each stage needs first.
    bytes_by_stage: Vec<u64>,
    /// Most bytes of weights that each stage multiplies with.
    most_bytes: Vec<u64>,
    /// Most tokens of a step.
    step_tokens: usize,
    /// Host memory of the largest batch and the longest sequence.
    most_scratch_bytes: u64,
    own: Mutex<Own>,
    /// Uncorrected times of the prompt that listings show; asked for often.
    shown: OnceLock<Passes>,
}

/// What a model's own runs have taught.
struct Own {
    corrections: Corrections,
    decoded: u32,
}

/// Seconds of the passes over a prompt.
#[derive(Clone)]
struct Passes {
    /// Of the first one, per stage.
    first: Vec<f64>,
    /// Of all others together.
    later: f64,
}

impl std::fmt::Debug for Forecast {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forecast").field("footprint", &self.footprint).finish_non_exhaustive()
    }
}

impl Forecast {
    pub(crate) fn new(
        engine: Arc<Model>,
        machine: Arc<Machine>,
        footprint: Footprint,
        bytes_by_stage: Vec<u64>,
    ) -> Forecast {
        let own = Mutex::new(Own { corrections: machine.corrections(), decoded: 0 });
        // A sequence that cannot be cut may be longer than a step.
        let longest = engine.spec().context;
        let step_tokens = step_tokens(machine.computes());
        let tokens = if engine.kv().is_some() { step_tokens.min(longest) } else { step_tokens.max(longest) };
        // The last stage may multiply with the table that the first one needs.
        let mut most_bytes = bytes_by_stage.clone();
        if let [first, .., last] = &mut most_bytes[..] {
            *last += *first;
        }
        let shape = PassShape { tokens, output_rows: MAX_BATCH.min(tokens), longest };
        let most_scratch_bytes = match machine.computes() {
            true => engine.scratch_bytes(shape, machine.threads()) as u64,
            false => 0,
        };
        let shown = OnceLock::new();
        Forecast {
            engine,
            machine,
            footprint,
            bytes_by_stage,
            most_bytes,
            step_tokens,
            most_scratch_bytes,
            own,
            shown,
        }
    }

    fn own(&self) -> MutexGuard<'_, Own> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages and KV blocks.
    pub fn footprint(&self) -> &Footprint {
        &self.footprint
    }

    /// Bytes of the tensors that each stage of the forward pass needs first; together all weights.
    pub fn bytes_by_stage(&self) -> &[u64] {
        &self.bytes_by_stage
    }

    /// Most bytes of host memory that the executor holds for passes of at most this shape, beside the pool.
    pub fn scratch_bytes(&self, shape: PassShape) -> u64 {
        self.engine.scratch_bytes(shape, self.machine.threads()) as u64
    }

    /// Seconds that each stage of the first pass over a prompt of so many tokens computes: what a load can hide behind.
    /// A prompt longer than a step takes further passes. `None` before this machine was measured.
    pub fn stage_compute_seconds(&self, prompt_tokens: usize) -> Option<Vec<f64>> {
        Some(self.corrected(prompt_tokens)?.first)
    }

    /// Bytes per second at which weights arrive while nothing computes; `None` before it was measured.
    pub fn load_bytes_per_second(&self) -> Option<f64> {
        Some(self.loading()?.link.bytes_per_second)
    }

    /// How weights arrive, and what that takes from computing; `None` before it was measured.
    pub fn loading(&self) -> Option<forecast::Loading> {
        let mut loading = self.machine.loading()?;
        loading.link.bytes_per_second /= self.own().corrections.loads.factor();
        Some(loading)
    }

    /// How weights arrive and what each stage computes, as first measured and not corrected since: what models are
    /// compared by must not change with the weather. `None` before this machine was measured.
    pub(crate) fn nominal(&self, prompt_tokens: usize) -> Option<(forecast::Loading, Vec<f64>)> {
        Some((self.machine.loading()?, self.uncorrected(prompt_tokens)?.first))
    }

    /// From submission to the first token (or the embedding) of a prompt of so many tokens, none of them cached, when
    /// `missing` bytes per stage have to be loaded: [`Forecast::bytes_by_stage`] for a cold start, nothing for a
    /// resident model. `None` before this machine was measured.
    pub fn first_token(&self, prompt_tokens: usize, missing: &[u64]) -> Option<Prediction> {
        let passes = self.corrected(prompt_tokens)?;
        Some(forecast::first_token(self.loading()?, missing, &passes.first, passes.later))
    }

    /// Prefills of prompts of 1, 2, 4... tokens up to `longest`, for a simulator; empty before this machine was measured.
    pub(crate) fn prompts(&self, longest: usize) -> Vec<PromptProfile> {
        let profile = |tokens: usize| {
            let seconds = self.first_token(tokens, &[])?.first_token();
            Some(PromptProfile { tokens, seconds, stage_seconds: self.stage_compute_seconds(tokens)? })
        };
        let lengths = (0..).map(|log2| 1usize << log2).take_while(|&tokens| tokens <= longest);
        lengths.map_while(profile).collect()
    }

    /// What listings show, for a pool of `pages` pages.
    pub(crate) fn listed(&self, pages: u64) -> ModelForecast {
        let spec = self.engine.spec();
        let prompt_tokens = SHOWN_PROMPT_TOKENS.min(spec.context);
        let seconds = |missing: &[u64]| Some(self.first_token(prompt_tokens, missing)?.first_token());
        ModelForecast {
            tokens_beside_weights: (self.footprint.block_bytes > 0)
                .then(|| self.footprint.tokens_beside(pages).unwrap_or(0)),
            scratch_bytes: self.most_scratch_bytes,
            prompt_tokens,
            cold_first_token_seconds: seconds(&self.bytes_by_stage),
            resident_first_token_seconds: seconds(&[]),
            load_bytes_per_second: self.load_bytes_per_second(),
        }
    }

    /// The weight types that have to be measured.
    pub(crate) fn dtypes(&self) -> Vec<DType> {
        weight_types(&self.engine)
    }

    fn corrected(&self, prompt_tokens: usize) -> Option<Passes> {
        // What is known of a GPU changes with every pass.
        let is_kept = prompt_tokens == SHOWN_PROMPT_TOKENS && self.machine.computes();
        let Passes { mut first, later } = match self.shown.get() {
            Some(passes) if is_kept => passes.clone(),
            _ => self.uncorrected(prompt_tokens)?,
        };
        if is_kept {
            let _ = self.shown.set(Passes { first: first.clone(), later });
        }
        let factor = self.own().factor(prompt_tokens);
        first.iter_mut().for_each(|seconds| *seconds *= factor);
        Some(Passes { first, later: later * factor })
    }

    /// The passes of a prompt as [`tangram_policy::compose`] cuts it.
    fn uncorrected(&self, prompt_tokens: usize) -> Option<Passes> {
        let tokens = prompt_tokens.max(1);
        let step = if self.engine.kv().is_some() { self.step_tokens } else { tokens };
        let pass = |start: usize| {
            let end = tokens.min(start + step);
            let work = self.engine.work(std::slice::from_ref(&(start..end)), usize::from(end == tokens));
            self.machine.seconds(&work, &self.most_bytes)
        };
        let first = pass(0)?;
        let mut later = 0.0;
        for start in (step..tokens).step_by(step) {
            later += pass(start)?.iter().sum::<f64>();
        }
        Some(Passes { first, later })
    }

    /// A pass computed these positions of its sequences in `seconds`; `undisturbed` if all weights were resident and no
    /// adapter had a part in it.
    pub(crate) fn computed(
        &self,
        chunks: &[Range<usize>],
        output_rows: usize,
        undisturbed: bool,
        seconds: f64,
    ) {
        if !undisturbed && self.machine.computes() {
            return;
        }
        let tokens = chunks.iter().map(Range::len).sum();
        let mut own = self.own();
        if tokens < PROMPT_TOKENS {
            own.decoded = own.decoded.wrapping_add(1);
            if !own.decoded.is_multiple_of(DECODING_SAMPLE) && !self.machine.awaits_a_pass() {
                return;
            }
        }
        let work = self.engine.work(chunks, output_rows);
        self.machine.observe(&work, &self.most_bytes, tokens >= PROMPT_TOKENS, seconds);
        if !undisturbed {
            return;
        }
        let Some(stages) = self.machine.seconds(&work, &self.most_bytes) else { return };
        let foretold = stages.iter().sum();
        own.corrections.of(tokens).observe(foretold, seconds);
        drop(own);
        self.machine.learn(|corrections| corrections.of(tokens).observe(foretold, seconds));
    }

    /// `bytes` arrived in `seconds` in which the model computed nothing.
    fn loaded(&self, bytes: u64, seconds: f64) {
        let Some(loading) = self.machine.loading() else { return };
        let foretold = loading.link.seconds(bytes, 0);
        self.own().corrections.loads.observe(foretold, seconds);
        self.machine.learn(|corrections| corrections.loads.observe(foretold, seconds));
    }
}

impl Own {
    fn factor(&mut self, tokens: usize) -> f64 {
        self.corrections.of(tokens).factor()
    }
}

impl Corrections {
    fn of(&mut self, tokens: usize) -> &mut forecast::Correction {
        if tokens < PROMPT_TOKENS { &mut self.decoding } else { &mut self.prompts }
    }
}

/// Measures a load under way by what arrives while the model's own passes stand still.
#[derive(Default)]
pub(crate) struct LoadMeter {
    /// Missing bytes among the leading tensors, for every number of them.
    missing: Vec<u64>,
    /// When the model was last seen to wait, with so many leading tensors there.
    waits: Option<(Instant, usize)>,
    bytes: u64,
    seconds: f64,
}

impl LoadMeter {
    /// For tensors of these sizes, of which some are missing.
    pub(crate) fn new(tensors: impl Iterator<Item = (u64, bool)>) -> LoadMeter {
        let mut missing = vec![0];
        for (bytes, is_missing) in tensors {
            let before = missing.last().copied().unwrap_or(0);
            missing.push(before + if is_missing { bytes } else { 0 });
        }
        LoadMeter { missing, ..LoadMeter::default() }
    }

    /// `arrived` leading tensors are there; the forecast learns when it is all of them.
    pub(crate) fn arrived(&mut self, arrived: usize, forecast: &Forecast) {
        if self.missing.is_empty() {
            return;
        }
        let now = Instant::now();
        if let Some((since, before)) = self.waits.replace((now, arrived)) {
            let until = |tensors: usize| self.missing.get(tensors).copied().unwrap_or(0);
            self.bytes += until(arrived) - until(before);
            self.seconds += (now - since).as_secs_f64();
        }
        if arrived + 1 == self.missing.len() {
            if self.bytes >= TELLING_BYTES {
                forecast.loaded(self.bytes, self.seconds);
            }
            *self = LoadMeter::default();
        }
    }

    /// The model has computed: what arrived meanwhile says nothing about the link alone.
    pub(crate) fn computed(&mut self) {
        self.waits = None;
    }
}
