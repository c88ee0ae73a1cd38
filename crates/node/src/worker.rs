//! The engine loop: one thread that admits, steps and ends sequences, and the only one that changes the pool.
//!
//! Decisions are the policy crate's: who may start (`Admission`), what a step computes (`compose`), what is evicted
//! (`Retention`). This file carries them out. It never waits for a load: a forward pass whose next layer has not
//! arrived is set aside while other models run, and taken up again where it stopped.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tangram_engine::{Chunk, Executor, KvBlocks, LogitRows, Pass};
use tangram_policy::{Admission, Attempt, Runnable, Share, TensorKey, compose};
use tangram_pool::{KvKey, Lease, LoadFailure, Pool};
use tangram_store::{Store, TensorLoad, Wake};

use crate::api::{
    DeployedModel, FinishReason, GenerateEvent, GeneratedToken, ModelStatus, NodeStatus, RequestError,
};
use crate::model::{LeasedWeights, ModelPlan};
use crate::sequence::{Sequence, Sink};

/// Sequences of one model that run at once. Bounds the scratch memory of a step.
const MAX_BATCH: usize = 64;

/// Tokens per step. Bounds how long a long prompt holds up everybody else.
const STEP_TOKENS: usize = 256;

/// How long the loop sleeps at most when nothing can go on; every event that matters wakes it before.
const IDLE_WAIT: Duration = Duration::from_millis(500);

/// How old the published status may get while work is going on.
const STATUS_AGE: Duration = Duration::from_millis(50);

/// What the loop is told.
pub(crate) enum Command {
    /// A new sequence.
    Submit(Box<Sequence>),
    /// A model is deployed under this key. The answer says why it could not be taken up.
    Register { deployed: Arc<DeployedModel>, plan: Box<ModelPlan>, answer: Sender<Result<(), String>> },
    /// A model is no longer deployed. It goes when its last sequence has ended; then `done` runs, which must not block.
    Retire { model: usize, done: Box<dyn FnOnce() + Send> },
    /// Something happened elsewhere: a tensor arrived, a client went away.
    Wake,
    /// End the loop; running sequences fail.
    Stop,
}

/// What the loop publishes for everybody else.
#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) status: Mutex<(NodeStatus, Vec<ModelStatus>)>,
    /// Sequences submitted and not admitted yet.
    pub(crate) waiting: AtomicUsize,
    /// Sequences submitted and not ended yet.
    pub(crate) in_flight: AtomicUsize,
}

struct ModelEntry {
    deployed: Arc<DeployedModel>,
    plan: ModelPlan,
    keys: Vec<TensorKey>,
    kv: Option<KvKey>,
    prefixes: PrefixUse,
    active: Option<Active>,
    waiting: usize,
    retire: Option<Box<dyn FnOnce() + Send>>,
}

/// What is known of a model's prefixes: how dear they are to compute and how often they come again.
#[derive(Default)]
struct PrefixUse {
    /// Seconds of prefill per token, smoothed.
    token_seconds: f64,
    /// Blocks published, and blocks found by later sequences.
    published: u64,
    found: u64,
}

impl PrefixUse {
    /// Prefills of at least this many tokens tell what a token costs; smaller steps mostly tell what a step costs.
    const TELLING_TOKENS: usize = 16;

    fn measured(&mut self, tokens: usize, seconds: f64) {
        if tokens >= Self::TELLING_TOKENS {
            let sample = seconds / tokens as f64;
            let known = self.token_seconds > 0.0;
            self.token_seconds = if known { self.token_seconds.mul_add(0.9, 0.1 * sample) } else { sample };
        }
    }

    /// Seconds that a cached block saves when it is found.
    fn block_seconds(&self, block_tokens: usize) -> f64 {
        self.token_seconds * block_tokens as f64
    }

    /// Chance that a new block is ever found again: a block that nobody has asked for twice must not push out weights
    /// that somebody has. Starts at one in twenty.
    fn reuse_chance(&self) -> f64 {
        (1 + self.found) as f64 / (20 + self.published) as f64
    }
}

/// A model with running sequences: its lease, and the step under way.
struct Active {
    lease: Lease,
    /// Leading tensors known to have arrived. When it reaches all of them, nothing is checked any more.
    arrived: usize,
    /// When the last tensor was there.
    complete: Option<Instant>,
    sequences: Vec<Sequence>,
    step: Option<Step>,
}

/// A forward pass under way and whose tokens it computes; `shares[i].sequence` indexes `Active::sequences`.
struct Step {
    pass: Pass,
    shares: Vec<Share>,
    /// Time computed so far.
    spent: Duration,
}

/// What came of composing a step.
enum Begun {
    /// It can run.
    Ready,
    /// There is no page for the KV that it needs, and nobody to take one from.
    NoRoom,
    /// A sequence gave its KV up; the step has to be composed anew.
    Preempted,
    /// The model's sequences have ended.
    Failed,
}

enum Progress {
    /// The step went on.
    Advanced,
    /// It cannot go on before something else happens.
    Stalled,
}

/// The loop's state.
pub(crate) struct Worker {
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    executor: Executor,
    pool: Pool,
    store: Arc<Store>,
    models: Vec<Option<ModelEntry>>,
    queue: Admission<Box<Sequence>>,
    epoch: Instant,
    wake: Wake,
    wake_pending: Arc<AtomicBool>,
    preemptions: u64,
    activations: u64,
    cached_tokens: u64,
    published: Instant,
    stopping: bool,
}

impl Worker {
    pub(crate) fn new(
        pool: Pool,
        threads: usize,
        commands: Receiver<Command>,
        wake_sender: Sender<Command>,
        shared: Arc<Shared>,
    ) -> Worker {
        let store = Store::new(pool.memory().clone());
        let wake_pending = Arc::new(AtomicBool::new(false));
        let pending = wake_pending.clone();
        let wake: Wake = Arc::new(move || {
            // One wake in the channel is enough, however many tensors arrive before it is read.
            if !pending.swap(true, Ordering::AcqRel) {
                let _ = wake_sender.send(Command::Wake);
            }
        });
        let now = Instant::now();
        Worker {
            commands,
            shared,
            executor: Executor::new(threads),
            pool,
            store,
            models: Vec::new(),
            queue: Admission::default(),
            epoch: now,
            wake,
            wake_pending,
            preemptions: 0,
            activations: 0,
            cached_tokens: 0,
            published: now,
            stopping: false,
        }
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self) {
        self.publish(true);
        while !self.stopping {
            self.read_commands();
            self.drop_cancelled();
            self.admit();
            let mut advanced = false;
            for model in 0..self.models.len() {
                if self.models[model].as_ref().is_some_and(|entry| entry.active.is_some()) {
                    advanced |= matches!(self.step(model), Progress::Advanced);
                }
            }
            self.publish(!advanced);
            if !advanced && !self.stopping {
                self.wait();
            }
        }
        self.fail_everything();
        self.publish(true);
    }

    fn read_commands(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.handle(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.stopping = true;
                    return;
                }
            }
        }
    }

    fn wait(&mut self) {
        match self.commands.recv_timeout(IDLE_WAIT) {
            Ok(command) => self.handle(command),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.stopping = true,
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit(sequence) => match self.models.get_mut(sequence.model) {
                Some(Some(entry)) => {
                    entry.waiting += 1;
                    self.queue.push(sequence);
                }
                _ => {
                    self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
                    self.end(*sequence, |sequence| {
                        sequence.fail(RequestError::UnknownModel("(removed)".to_owned()));
                    });
                }
            },
            Command::Register { deployed, plan, answer } => {
                let _ = answer.send(self.register(deployed, *plan));
            }
            Command::Retire { model, done } => {
                match self.models.get_mut(model) {
                    Some(Some(entry)) => entry.retire = Some(done),
                    _ => done(),
                }
                self.retire_if_over(model);
            }
            Command::Wake => {
                self.wake_pending.store(false, Ordering::Release);
            }
            Command::Stop => self.stopping = true,
        }
    }

    fn register(&mut self, deployed: Arc<DeployedModel>, plan: ModelPlan) -> Result<(), String> {
        let sizes: HashMap<&str, u64> =
            plan.data_bytes.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
        let keys = self
            .pool
            .catalogue(&plan.entries, |checkpoint| sizes.get(checkpoint).copied().unwrap_or(0))
            .map_err(|error| error.to_string())?;
        let kv = match plan.engine.kv() {
            None => None,
            Some(layout) => match self.pool.add_kv(layout.block_bytes) {
                Ok(kv) => Some(kv),
                Err(error) => {
                    self.pool.forget(&keys);
                    return Err(error.to_string());
                }
            },
        };
        let index = deployed.index;
        if self.models.len() <= index {
            self.models.resize_with(index + 1, || None);
        }
        self.models[index] =
            Some(ModelEntry {
            deployed,
            plan,
            keys,
            kv,
            prefixes: PrefixUse::default(),
            active: None,
            waiting: 0,
            retire: None,
        });
        Ok(())
    }

    fn retire_if_over(&mut self, model: usize) {
        let over =
            |entry: &ModelEntry| entry.retire.is_some() && entry.active.is_none() && entry.waiting == 0;
        if self.models.get(model).and_then(Option::as_ref).is_some_and(over)
            && let Some(entry) = self.models[model].take()
        {
            self.pool.forget(&entry.keys);
            if let Some(kv) = entry.kv {
                self.pool.remove_kv(kv);
            }
            if let Some(done) = entry.retire {
                done();
            }
        }
    }

    /// Counts a sequence out and tells its client.
    fn end(&mut self, sequence: Sequence, tell: impl FnOnce(Sequence)) {
        debug_assert!(sequence.blocks() == 0, "KV goes back to the pool before its sequence ends");
        self.shared.in_flight.fetch_sub(1, Ordering::AcqRel);
        tell(sequence);
    }

    // ---- admission ----------------------------------------------------------------------------------------------

    fn admit(&mut self) {
        if self.queue.is_empty() {
            return;
        }
        let mut blocked = vec![false; self.models.len()];
        let mut queue = std::mem::take(&mut self.queue);
        queue.admit(|sequence| {
            let model = sequence.model;
            if blocked[model] {
                return Err(sequence);
            }
            self.start(sequence).inspect_err(|_| blocked[model] = true)
        });
        self.queue = queue;
    }

    /// Pages that running sequences of this and other models will still take for the tokens that they have.
    fn promised_pages(&self) -> usize {
        let page_bytes = self.pool.memory().page_bytes();
        let entries = self.models.iter().flatten();
        entries
            .filter_map(|entry| {
                let active = entry.active.as_ref()?;
                let blocks: usize = active
                    .sequences
                    .iter()
                    .map(|sequence| {
                        entry.plan.kv_blocks(sequence.tokens.len() + 1).saturating_sub(sequence.blocks())
                    })
                    .sum();
                Some((blocks * entry.plan.kv_block_bytes()).div_ceil(page_bytes))
            })
            .sum()
    }

    /// Starts a sequence if there is room for its model and for the KV of the tokens that it has.
    fn start(&mut self, mut sequence: Box<Sequence>) -> Result<Attempt, Box<Sequence>> {
        let now = Instant::now();
        let promised = self.promised_pages();
        let page_bytes = self.pool.memory().page_bytes();
        let seconds = now.duration_since(self.epoch).as_secs_f64();
        let Some(entry) = self.models[sequence.model].as_mut() else { return Err(sequence) };
        let block_tokens = entry.plan.engine.kv().map_or(usize::MAX, |kv| kv.block_tokens);
        // At least one token has to be computed, or there would be no logits to go on from.
        let full = sequence.pending().saturating_sub(1) / block_tokens;
        let hashes = sequence.block_hashes(full, block_tokens);
        let in_use = entry.kv.map_or(0, |kv| self.pool.blocks_in_use(kv, hashes));
        let own = (entry.plan.kv_blocks(sequence.tokens.len() + 1) - in_use) * entry.plan.kv_block_bytes();
        let reserve = promised + own.div_ceil(page_bytes);
        let (mut loaded, mut reused) = (0, 0);
        match &mut entry.active {
            Some(active) => {
                if active.sequences.len() >= MAX_BATCH || reserve > self.pool.available_pages() {
                    return Err(sequence);
                }
                self.pool.used_again(&active.lease, seconds);
                reused = entry.plan.unique_bytes();
            }
            None => {
                let Ok(activation) = self.pool.activate(&entry.keys, reserve, seconds) else {
                    return Err(sequence);
                };
                loaded += activation.bytes_loaded;
                reused += activation.bytes_reused;
                self.activations += 1;
                let missing = !activation.missing.is_empty();
                let locations: HashMap<TensorKey, usize> =
                    if missing { entry.keys.iter().copied().zip(0..).collect() } else { HashMap::new() };
                let loads = activation.missing.into_iter().filter_map(|vacancy| {
                    let location = entry.plan.locations.get(*locations.get(&vacancy.tensor().key())?)?;
                    Some(TensorLoad {
                        vacancy,
                        file: location.file.clone(),
                        offset: location.offset,
                        chunks: location.chunks.clone(),
                        name: location.name.clone(),
                    })
                });
                self.store.load(loads.collect(), &self.wake);
                entry.active = Some(Active {
                    lease: activation.lease,
                    arrived: 0,
                    complete: None,
                    sequences: Vec::new(),
                    step: None,
                });
            }
        }
        let Some(active) = &mut entry.active else { return Err(sequence) };
        if let Some(kv) = entry.kv {
            let saved = entry.prefixes.block_seconds(block_tokens);
            let hashes = sequence.block_hashes(full, block_tokens);
            let prefix = self.pool.lease_prefix(kv, hashes, saved, seconds);
            entry.prefixes.found += prefix.len() as u64;
            sequence.computed = prefix.len() * block_tokens;
            sequence.prefix = prefix;
        }
        entry.waiting -= 1;
        self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
        if sequence.admitted.is_none() {
            sequence.admitted = Some(now);
            sequence.timing.queue = now.duration_since(sequence.submitted);
            sequence.timing.cached_tokens = sequence.computed as u64;
            self.cached_tokens += sequence.computed as u64;
        }
        sequence.timing.bytes_loaded += loaded;
        sequence.timing.bytes_reused = reused;
        // Order of arrival, so that the step's budget goes to the oldest prompts first.
        let at = active.sequences.partition_point(|other| other.arrival < sequence.arrival);
        if let Some(step) = &mut active.step {
            for share in step.shares.iter_mut().filter(|share| share.sequence >= at) {
                share.sequence += 1;
            }
        }
        active.sequences.insert(at, *sequence);
        // Noted at once, so that a resident model's activation is measured as what it is. A failed tensor is found
        // again, and reported, by the next step.
        let _ = note_arrivals(active);
        Ok(Attempt::Started)
    }

    // ---- steps --------------------------------------------------------------------------------------------------

    fn step(&mut self, model: usize) -> Progress {
        let Some(entry) = self.models[model].as_mut() else { return Progress::Stalled };
        let Some(active) = entry.active.as_mut() else { return Progress::Stalled };
        if active.arrived < entry.keys.len()
            && let Err(reason) = note_arrivals(active)
        {
            let error = RequestError::LoadFailed { model: entry.deployed.name.clone(), reason };
            self.fail_model(model, &error);
            return Progress::Advanced;
        }
        let ready_stages = if active.arrived == entry.keys.len() {
            usize::MAX
        } else {
            entry.plan.needed_by_stage.partition_point(|&needed| needed <= active.arrived)
        };
        if active.step.is_none() {
            if ready_stages == 0 {
                return Progress::Stalled;
            }
            // A preemption frees room for the one who needed it, who must get it before anybody else is admitted:
            // else the preempted sequence could come back and take it, for ever.
            loop {
                match self.begin_step(model) {
                    Begun::Ready => break,
                    Begun::NoRoom => return Progress::Stalled,
                    Begun::Preempted => {}
                    Begun::Failed => return Progress::Advanced,
                }
                if self.models[model].as_ref().is_none_or(|entry| entry.active.is_none()) {
                    return Progress::Advanced;
                }
            }
        }
        self.advance(model, ready_stages)
    }

    /// Composes the next step and takes the KV blocks that it needs.
    fn begin_step(&mut self, model: usize) -> Begun {
        let Some(entry) = self.models[model].as_mut() else { return Begun::Failed };
        let Some(active) = entry.active.as_mut() else { return Begun::Failed };
        let indivisible = entry.plan.engine.kv().is_none();
        let runnable: Vec<Runnable> = active
            .sequences
            .iter()
            .map(|sequence| Runnable { pending: sequence.pending(), indivisible })
            .collect();
        let shares = compose(&runnable, STEP_TOKENS);
        for share in &shares {
            let sequence = &mut active.sequences[share.sequence];
            let blocks = entry.plan.kv_blocks(sequence.computed + share.tokens);
            while sequence.blocks() < blocks {
                let Some(kv) = entry.kv else { break };
                match self.pool.take_kv(kv) {
                    Ok(block) => sequence.kv.push(block),
                    Err(_) if self.preempt_youngest() => return Begun::Preempted,
                    Err(_) => return Begun::NoRoom,
                }
            }
        }
        let chunks: Vec<Chunk<'_>> = shares
            .iter()
            .map(|share| {
                let sequence = &active.sequences[share.sequence];
                let end = sequence.computed + share.tokens;
                let last = end == sequence.tokens.len();
                Chunk {
                    tokens: &sequence.tokens[sequence.computed..end],
                    position: sequence.computed,
                    logits: if last { LogitRows::Last } else { LogitRows::None },
                }
            })
            .collect();
        match self.executor.begin(&entry.plan.engine, &chunks) {
            Ok(pass) => {
                active.step = Some(Step { pass, shares, spent: Duration::ZERO });
                Begun::Ready
            }
            Err(error) => {
                self.fail_model(model, &RequestError::Internal(error.to_string()));
                Begun::Failed
            }
        }
    }

    fn advance(&mut self, model: usize, ready_stages: usize) -> Progress {
        let Some(entry) = self.models[model].as_mut() else { return Progress::Stalled };
        let Some(active) = entry.active.as_mut() else { return Progress::Stalled };
        let Some(step) = active.step.as_mut() else { return Progress::Stalled };
        let before = step.pass.stage();
        if before >= ready_stages {
            return Progress::Stalled;
        }
        let weights = LeasedWeights { tensors: active.lease.tensors(), unique_of: &entry.plan.unique_of };
        let mut shares = step.shares.iter().peekable();
        let mut kv: Vec<KvBlocks<'_>> = Vec::with_capacity(step.shares.len());
        for (index, sequence) in active.sequences.iter_mut().enumerate() {
            if shares.next_if(|share| share.sequence == index).is_some() {
                kv.push(KvBlocks { shared: sequence.prefix.blocks(), own: &mut sequence.kv });
            }
        }
        let started = Instant::now();
        let result =
            self.executor.advance(&mut step.pass, &entry.plan.engine, &weights, &mut kv, ready_stages);
        let spent = started.elapsed();
        step.spent += spent;
        for share in &step.shares {
            let sequence = &mut active.sequences[share.sequence];
            if sequence.first_token.is_none() {
                sequence.timing.prefill += spent;
            }
        }
        match result {
            Ok(false) => {
                if step.pass.stage() > before {
                    Progress::Advanced
                } else {
                    Progress::Stalled
                }
            }
            Ok(true) => {
                self.complete_step(model);
                Progress::Advanced
            }
            Err(error) => {
                self.fail_model(model, &RequestError::Internal(error.to_string()));
                Progress::Advanced
            }
        }
    }

    /// Takes the results of a finished pass: samples, delivers, ends what is over.
    fn complete_step(&mut self, model: usize) {
        let Some(entry) = self.models[model].as_mut() else { return };
        let Some(active) = entry.active.as_mut() else { return };
        let Some(Step { mut pass, shares, spent }) = active.step.take() else { return };
        let complete = active.complete;
        let now = Instant::now();
        let seconds = now.duration_since(self.epoch).as_secs_f64();
        let tokens = shares.iter().map(|share| share.tokens).sum();
        entry.prefixes.measured(tokens, spent.as_secs_f64());
        let mut over: Vec<(usize, Outcome)> = Vec::new();
        for (chunk, share) in shares.iter().enumerate() {
            let sequence = &mut active.sequences[share.sequence];
            sequence.computed += share.tokens;
            if let Some((kv, layout)) = entry.kv.zip(entry.plan.engine.kv()) {
                let full = sequence.computed / layout.block_tokens;
                while sequence.prefix.len() < full && !sequence.kv.is_empty() {
                    let index = sequence.prefix.len();
                    let hash = sequence.block_hashes(index + 1, layout.block_tokens)[index];
                    let uses = &mut entry.prefixes;
                    let worth = uses.block_seconds(layout.block_tokens) * uses.reuse_chance();
                    uses.published += 1;
                    let block = sequence.kv.remove(0);
                    self.pool.publish(kv, &mut sequence.prefix, hash, block, worth, seconds);
                }
            }
            if sequence.pending() > 0 {
                continue;
            }
            if sequence.first_token.is_none() {
                let load = complete
                    .zip(sequence.admitted)
                    .map(|(complete, admitted)| complete - admitted.min(complete));
                sequence.timing.load = load.unwrap_or_default();
            }
            let outcome = match &sequence.sink {
                Sink::Embed { .. } => Some(Outcome::Vector(pass.embedding(chunk).to_vec())),
                Sink::Generate(_) => sample(sequence, pass.logits_mut(chunk), now),
            };
            over.extend(outcome.map(|outcome| (share.sequence, outcome)));
        }
        self.executor.recycle(pass);
        // From the back, so that the indices of the others stay right.
        for (index, outcome) in over.into_iter().rev() {
            let Some(sequence) = self.take_sequence(model, index) else { continue };
            self.end(sequence, |sequence| match outcome {
                Outcome::Vector(vector) => sequence.deliver(vector, now),
                Outcome::Finished(reason) => sequence.finish(reason, now),
                Outcome::Failed(message) => sequence.fail(RequestError::Internal(message)),
                Outcome::Gone => drop(sequence),
            });
        }
        self.deactivate_if_over(model);
    }

    // ---- endings ------------------------------------------------------------------------------------------------

    /// Takes a running sequence out, with its KV given back. A step under way must not include it.
    fn take_sequence(&mut self, model: usize, index: usize) -> Option<Sequence> {
        let active = self.models[model].as_mut()?.active.as_mut()?;
        debug_assert!(
            active.step.as_ref().is_none_or(|step| step.shares.iter().all(|s| s.sequence != index))
        );
        if let Some(step) = &mut active.step {
            for share in step.shares.iter_mut().filter(|share| share.sequence > index) {
                share.sequence -= 1;
            }
        }
        let mut sequence = active.sequences.remove(index);
        let (prefix, blocks) = (std::mem::take(&mut sequence.prefix), std::mem::take(&mut sequence.kv));
        self.pool.release_prefix(prefix);
        if let Some(kv) = self.models[model].as_ref().and_then(|entry| entry.kv) {
            self.pool.give_kv(kv, blocks);
        }
        Some(sequence)
    }

    /// Gives up the step under way if it includes the sequence; what it computed so far is computed again.
    fn abandon_step_with(&mut self, model: usize, index: usize) {
        let Some(active) = self.models[model].as_mut().and_then(|entry| entry.active.as_mut()) else {
            return;
        };
        if let Some(step) =
            active.step.take_if(|step| step.shares.iter().any(|share| share.sequence == index))
        {
            self.executor.recycle(step.pass);
        }
    }

    fn deactivate_if_over(&mut self, model: usize) {
        let Some(entry) = self.models[model].as_mut() else { return };
        if let Some(active) = entry.active.take_if(|active| active.sequences.is_empty()) {
            if let Some(step) = active.step {
                self.executor.recycle(step.pass);
            }
            self.pool.release(active.lease);
        }
        self.retire_if_over(model);
    }

    fn drop_cancelled(&mut self) {
        for sequence in self.queue.remove(|sequence| sequence.is_cancelled()) {
            let model = sequence.model;
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
            if let Some(entry) = self.models[model].as_mut() {
                entry.waiting -= 1;
            }
            self.end(*sequence, drop);
            self.retire_if_over(model);
        }
        for model in 0..self.models.len() {
            let cancelled =
                |entry: &ModelEntry| entry.active.as_ref()?.sequences.iter().position(Sequence::is_cancelled);
            while let Some(index) = self.models[model].as_ref().and_then(cancelled) {
                self.abandon_step_with(model, index);
                if let Some(sequence) = self.take_sequence(model, index) {
                    self.end(sequence, drop);
                }
                self.deactivate_if_over(model);
            }
        }
    }

    /// Takes the KV of the sequence that arrived last and puts it back into the queue; its tokens are kept and
    /// computed again later, with the same result. The oldest sequence is never chosen while there is another, so
    /// somebody always gets on. `false` if nobody holds any KV.
    fn preempt_youngest(&mut self) -> bool {
        let candidates = self.models.iter().enumerate().filter_map(|(model, entry)| {
            let sequences = entry.as_ref()?.active.as_ref()?.sequences.iter().enumerate();
            sequences.filter(|(_, s)| s.blocks() > 0).map(|(index, s)| (s.arrival, model, index)).max()
        });
        let Some((arrival, model, index)) = candidates.max() else { return false };
        self.abandon_step_with(model, index);
        let Some(mut sequence) = self.take_sequence(model, index) else { return false };
        sequence.computed = 0;
        self.preemptions += 1;
        self.shared.waiting.fetch_add(1, Ordering::AcqRel);
        if let Some(entry) = self.models[model].as_mut() {
            entry.waiting += 1;
        }
        self.queue.push_back_in_order(Box::new(sequence), |other| other.arrival > arrival);
        self.deactivate_if_over(model);
        true
    }

    /// Ends every running sequence of a model with an error.
    fn fail_model(&mut self, model: usize, error: &RequestError) {
        tracing::error!(%error, "requests failed");
        if let Some(active) = self.models[model].as_mut().and_then(|entry| entry.active.as_mut())
            && let Some(step) = active.step.take()
        {
            self.executor.recycle(step.pass);
        }
        while let Some(sequence) = self.take_last(model) {
            self.end(sequence, |sequence| sequence.fail(error.clone()));
        }
        self.deactivate_if_over(model);
    }

    fn take_last(&mut self, model: usize) -> Option<Sequence> {
        let active = self.models[model].as_ref()?.active.as_ref()?;
        self.take_sequence(model, active.sequences.len().checked_sub(1)?)
    }

    fn fail_everything(&mut self) {
        self.read_commands();
        for sequence in self.queue.remove(|_| true) {
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
            if let Some(entry) = self.models[sequence.model].as_mut() {
                entry.waiting -= 1;
            }
            self.end(*sequence, |sequence| sequence.fail(RequestError::ShuttingDown));
        }
        for model in 0..self.models.len() {
            if self.models[model].as_ref().is_some_and(|entry| entry.active.is_some()) {
                self.fail_model(model, &RequestError::ShuttingDown);
            }
            self.retire_if_over(model);
        }
    }

    // ---- status -------------------------------------------------------------------------------------------------

    fn publish(&mut self, now: bool) {
        if !now && self.published.elapsed() < STATUS_AGE {
            return;
        }
        self.published = Instant::now();
        let (stats, memory) = (self.pool.stats(), self.pool.memory());
        let page_bytes = memory.page_bytes() as u64;
        let mut node = NodeStatus {
            device: memory.name().to_owned(),
            pool_bytes: memory.page_count() as u64 * page_bytes,
            free_bytes: memory.free_pages() as u64 * page_bytes,
            resident_bytes: stats.resident_bytes,
            leased_bytes: stats.leased_bytes,
            kv_bytes: stats.kv_bytes,
            kv_blocks: stats.kv_blocks,
            kv_cached_bytes: stats.kv_cached_bytes,
            cached_tokens_total: self.cached_tokens,
            running: 0,
            waiting: self.queue.len(),
            bytes_loaded_total: stats.loaded_total,
            bytes_reused_total: stats.reused_total,
            bytes_evicted_total: stats.evicted_total,
            preemptions_total: self.preemptions,
            activations_total: self.activations,
        };
        let mut models: Vec<ModelStatus> = Vec::new();
        for entry in self.models.iter().flatten().filter(|entry| entry.retire.is_none()) {
            let running = entry.active.as_ref().map_or(0, |active| active.sequences.len());
            node.running += running;
            let state = match &entry.active {
                None => "idle",
                Some(active) if active.arrived < entry.keys.len() => "loading",
                Some(_) => "active",
            };
            let (deployed, plan) = (&entry.deployed, &entry.plan);
            models.push(ModelStatus {
                name: deployed.name.clone(),
                family: deployed.spec.family.clone(),
                task: if deployed.spec.generates() { "generate" } else { "embed" }.to_owned(),
                dtype: dominant_dtype(plan),
                weight_bytes: plan.unique_bytes(),
                shared_bytes: self.pool.shared_bytes(&entry.keys),
                resident_bytes: self.pool.resident_bytes(&entry.keys),
                kv_bytes_per_token: deployed.kv_bytes_per_token,
                context: deployed.context,
                state: state.to_owned(),
                running,
                waiting: entry.waiting,
                created: deployed.created,
            });
        }
        models.sort_by(|a, b| a.name.cmp(&b.name));
        *self.shared.status.lock().unwrap_or_else(PoisonError::into_inner) = (node, models);
    }
}

/// How a sequence came out of a step in which it ended.
enum Outcome {
    Vector(Vec<f32>),
    Finished(FinishReason),
    Failed(String),
    /// The client has gone.
    Gone,
}

/// Moves `arrived` on; notes when the last tensor was there. The error is the failed tensor's, for the user.
fn note_arrivals(active: &mut Active) -> Result<(), String> {
    while let Some(tensor) = active.lease.tensors().get(active.arrived) {
        if !tensor.is_ready() {
            // A failure further back is reported at once, not when the forward pass gets there.
            let failure = active.lease.tensors()[active.arrived..].iter().find_map(|tensor| tensor.failure());
            return match failure {
                None => Ok(()),
                Some(LoadFailure::Failed(reason)) => Err(reason.clone()),
                Some(LoadFailure::Abandoned) => Err("its load was given up".to_owned()),
            };
        }
        active.arrived += 1;
    }
    active.complete.get_or_insert_with(Instant::now);
    Ok(())
}

/// Chooses the next token of a sequence whose tokens are all computed, and tells the client.
fn sample(sequence: &mut Sequence, logits: &mut [f32], now: Instant) -> Option<Outcome> {
    let Sink::Generate(generate) = &mut sequence.sink else { return None };
    let sampled = match generate.sampler.sample(logits) {
        Ok(sampled) => sampled,
        Err(error) => return Some(Outcome::Failed(error.to_string())),
    };
    generate.generated += 1;
    let ended = generate.end_tokens.contains(&sampled.token);
    let full = generate.generated >= generate.max_tokens;
    sequence.tokens.push(sampled.token);
    sequence.first_result(now);
    let Sink::Generate(generate) = &mut sequence.sink else { return None };
    if !std::mem::replace(&mut sequence.started, true) {
        let _ = generate.events.send(GenerateEvent::Started(sequence.timing));
    }
    let token = GeneratedToken { id: sampled.token, logprob: sampled.logprob };
    if generate.events.send(GenerateEvent::Token(token)).is_err() {
        return Some(Outcome::Gone);
    }
    match (ended, full) {
        (true, _) => Some(Outcome::Finished(FinishReason::Stop)),
        (false, true) => Some(Outcome::Finished(FinishReason::Length)),
        (false, false) => None,
    }
}

/// The type of most of a model's weight bytes.
fn dominant_dtype(plan: &ModelPlan) -> String {
    let mut bytes: HashMap<&str, u64> = HashMap::new();
    for tensor in &plan.manifest.tensors {
        *bytes.entry(tensor.dtype.name()).or_default() += tensor.bytes;
    }
    bytes
        .into_iter()
        .max_by_key(|&(name, bytes)| (bytes, name))
        .map_or(String::new(), |(name, _)| name.to_owned())
}
