//! Steps: composing a batch, running its forward pass as far as the weights have arrived, taking the results.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use tangram_engine::sampling::Wish;
use tangram_engine::{Chunk, DeviceExecutor, DevicePass, HostBuffer, KvBlocks, LogitRows, Whole};
use tangram_policy::{Runnable, Share, compose};
use tangram_pool::{LoadFailure, Pool, Refusal, Tensor};
use tangram_store::{RowRead, RowSource, Store, Wake};

use super::adapters::ActiveAdapter;
use super::{Active, AwaitedRows, Step, Worker};
use crate::api::{FinishReason, GenerateEvent, GeneratedToken, RequestError};
use crate::forecast::Forecast;
use crate::model::{EarlyRows, LeasedTensors, Location, ModelPlan};
use crate::observe::Computed;
use crate::sequence::{Sequence, Sink};

/// Tokens per step on the processor. Bounds how long a long prompt holds up everybody else.
const STEP_TOKENS: usize = 256;
/// The same on a GPU, whose multiprocessors want more rows for each weight that is read. The working memory for them comes
/// out of the reserve.
const GPU_STEP_TOKENS: usize = 1024;

/// Most tokens of a step, on the processor or on a GPU.
pub(crate) fn step_tokens(on_processor: bool) -> usize {
    if on_processor { STEP_TOKENS } else { GPU_STEP_TOKENS }
}

/// What came of composing a step.
enum Begun {
    /// It can run.
    Ready,
    /// There is no page for the KV that it needs, and nobody to take one from; or every sequence waits for its adapter.
    NoRoom,
    /// A sequence gave its KV up; the step has to be composed anew.
    Preempted,
    /// The model's sequences have ended.
    Failed,
}

/// How a step came along.
pub(super) enum Progress {
    /// The step went on.
    Advanced,
    /// It cannot go on before something else happens.
    Stalled,
}

impl Worker {
    /// Most tokens of a step on this node's device, but for a sequence that cannot be cut.
    pub(super) fn step_tokens(&self) -> usize {
        step_tokens(self.setup.device.is_cpu())
    }

    pub(super) fn step(&mut self, model: usize) -> Progress {
        let Some(entry) = self.models[model].as_mut() else { return Progress::Stalled };
        let Some(active) = entry.active.as_mut() else { return Progress::Stalled };
        if active.arrived < entry.keys.len()
            && let Err(reason) = note_arrivals(active, &entry.plan.forecast)
        {
            let error = RequestError::LoadFailed { model: entry.deployed.name.clone(), reason };
            self.fail_model(model, &error);
            return Progress::Advanced;
        }
        if self.note_adapters(model) {
            return Progress::Advanced;
        }
        let Some(entry) = self.models[model].as_mut() else { return Progress::Stalled };
        let Some(active) = entry.active.as_mut() else { return Progress::Stalled };
        let ready_stages = if active.arrived == entry.keys.len() {
            usize::MAX
        } else if !self.setup.trial.is_ours() {
            0
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
        self.share_prefixes(model);
        let step_tokens = self.step_tokens();
        let Some(entry) = self.models[model].as_mut() else { return Begun::Failed };
        let Some(active) = entry.active.as_mut() else { return Begun::Failed };
        let indivisible = entry.plan.engine.kv().is_none();
        let runnable: Vec<Runnable> = active
            .sequences
            .iter()
            .map(|sequence| {
                let waits = active.adapter(sequence.model).is_some_and(|adapter| adapter.complete.is_none());
                Runnable { pending: if waits { 0 } else { sequence.pending() }, indivisible }
            })
            .collect();
        let shares = compose(&runnable, step_tokens);
        if shares.is_empty() {
            return Begun::NoRoom;
        }
        if let Some(kv) = entry.kv {
            let lacking = |share: &Share| {
                let sequence = &active.sequences[share.sequence];
                entry.plan.kv_blocks(sequence.computed + share.tokens).saturating_sub(sequence.blocks())
            };
            let lacking: Vec<usize> = shares.iter().map(lacking).collect();
            match self.pool.take_kv(kv, lacking.iter().sum()) {
                Ok(blocks) => {
                    let mut blocks = blocks.into_iter();
                    for (share, count) in shares.iter().zip(lacking) {
                        active.sequences[share.sequence].kv.extend(blocks.by_ref().take(count));
                    }
                }
                Err(Refusal::Short(_)) if self.preempt_one() => return Begun::Preempted,
                Err(Refusal::Short(_)) => return Begun::NoRoom,
                Err(Refusal::Device(error)) => {
                    // It would be refused again; nobody waits for that.
                    let error = RequestError::Internal(format!("no place for keys and values: {error}"));
                    self.fail_model(model, &error);
                    return Begun::Failed;
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
        let whole = |share: &Share| {
            let sequence = &active.sequences[share.sequence];
            Whole { tokens: sequence.tokens.len(), second: sequence.second }
        };
        let wholes: Vec<Whole> = shares.iter().map(whole).collect();
        let mut adapters: Vec<usize> = Vec::new();
        let mut engines = Vec::new();
        let of_chunk: Vec<Option<usize>> = shares
            .iter()
            .map(|share| {
                let adapter = active.adapter(active.sequences[share.sequence].model)?;
                Some(adapters.iter().position(|&model| model == adapter.model).unwrap_or_else(|| {
                    adapters.push(adapter.model);
                    engines.push(adapter.engine.clone());
                    adapters.len() - 1
                }))
            })
            .collect();
        let model_plan = &entry.plan.engine;
        match self.executor.begin(model_plan, &chunks, &wholes, engines, &of_chunk) {
            Ok(mut pass) => {
                if pass.can_select() {
                    let wish = |share: &Share| wish(&active.sequences[share.sequence]);
                    pass.select(&shares.iter().map(wish).collect::<Vec<_>>());
                }
                let undisturbed = active.complete.is_some() && adapters.is_empty();
                let embedding =
                    entry.plan.early_rows.filter(|rows| !is_ready(active.lease.tensors(), rows.unique));
                let rows = embedding.map(|rows| {
                    let from = source_of(&self.pool, &entry.plan, active.lease.tensors(), rows);
                    let tokens: Vec<u32> = chunks.iter().flat_map(|chunk| chunk.tokens).copied().collect();
                    let room = pass.early_room(tokens.len() * rows.row_bytes);
                    let read = from.map(|from| RowRead { from, row_bytes: rows.row_bytes, rows: tokens });
                    read_rows(&self.store, read, room, self.wake.clone())
                });
                active.step = Some(Step { pass, shares, adapters, rows, spent: Duration::ZERO, undisturbed });
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
        if before >= ready_stages || !rows_are_here(step, entry.plan.early_rows, active.lease.tensors()) {
            return Progress::Stalled;
        }
        let adapter = |model: &usize| active.adapters.iter().find(|adapter| adapter.model == *model);
        let tensors = LeasedTensors {
            tensors: active.lease.tensors(),
            unique_of: &entry.plan.unique_of,
            adapters: step.adapters.iter().filter_map(adapter).map(ActiveAdapter::weights).collect(),
        };
        let mut shares = step.shares.iter().peekable();
        let mut kv: Vec<KvBlocks<'_>> = Vec::with_capacity(step.shares.len());
        for (index, sequence) in active.sequences.iter_mut().enumerate() {
            if shares.next_if(|share| share.sequence == index).is_some() {
                kv.push(KvBlocks { shared: sequence.prefix.blocks(), own: &mut sequence.kv });
            }
        }
        // Who watches is told of each stage by itself.
        let ready_stages = match self.observer {
            Some(_) => ready_stages.min(before + 1),
            None => ready_stages,
        };
        let started = Instant::now();
        let result =
            self.executor.advance(&mut step.pass, &entry.plan.engine, &tensors, &mut kv, ready_stages);
        let spent = started.elapsed();
        step.spent += spent;
        if let Some(observer) = &self.observer {
            let tokens = step.shares.iter().map(|share| share.tokens).sum();
            observer.computed(Computed { stage: before, tokens, started });
        }
        active.meter.computed();
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
        let Some(Step { mut pass, shares, spent, undisturbed, .. }) = active.step.take() else {
            return;
        };
        let now = Instant::now();
        let seconds = now.duration_since(self.epoch).as_secs_f64();
        let tokens = shares.iter().map(|share| share.tokens).sum();
        entry.prefixes.measured(tokens, spent.as_secs_f64());
        let computed = |share: &Share| {
            let start = active.sequences[share.sequence].computed;
            start..start + share.tokens
        };
        let chunks: Vec<_> = shares.iter().map(computed).collect();
        entry.plan.forecast.computed(&chunks, pass.output_rows(), undisturbed, spent.as_secs_f64());
        let mut over: Vec<(usize, Outcome)> = Vec::new();
        for (chunk, share) in shares.iter().enumerate() {
            let complete = active.complete(active.sequences[share.sequence].model);
            let sequence = &mut active.sequences[share.sequence];
            sequence.computed += share.tokens;
            if let Some((kv, layout)) = entry.kv.zip(entry.plan.engine.kv()) {
                let full = sequence.computed / layout.block_tokens;
                while sequence.prefix.len() < full && !sequence.kv.is_empty() {
                    let index = sequence.prefix.len();
                    let hash = sequence.block_hashes(index + 1, layout.block_tokens)[index];
                    let worth = entry.prefixes.publish(layout.block_tokens);
                    let block = sequence.kv.remove(0);
                    self.pool.publish(kv, &mut sequence.prefix, hash, block, worth, seconds);
                }
                if let Some(worth) = entry.prefixes.reappraised(layout.block_tokens) {
                    self.pool.appraise_unfound(kv, worth);
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
                Sink::Generate(_) => sample(sequence, &self.executor, &mut pass, chunk, now),
            };
            // A sequence that has grown beyond longrope's original context goes on as a long one: as if it had
            // started with the tokens that it has now.
            if outcome.is_none() && sequence.set_long(entry.plan.engine.is_long(sequence.tokens.len())) {
                let (prefix, blocks) = sequence.forget();
                self.pool.release_prefix(prefix);
                if let Some(kv) = entry.kv {
                    self.pool.give_kv(kv, blocks);
                }
            }
            over.extend(outcome.map(|outcome| (share.sequence, outcome)));
        }
        self.executor.recycle(pass);
        // From the back, so that the indices of the others stay right.
        for (index, outcome) in over.into_iter().rev() {
            let Some(sequence) = self.take_sequence(model, index) else { continue };
            let outcome = match outcome {
                Outcome::Failed(error) => Outcome::Failed(self.cause(error)),
                outcome => outcome,
            };
            self.end(sequence, |sequence| match outcome {
                Outcome::Vector(vector) => sequence.deliver(vector, now),
                Outcome::Finished(reason) => sequence.finish(reason, now),
                Outcome::Failed(error) => sequence.fail(error),
                Outcome::Gone => drop(sequence),
            });
        }
        self.deactivate_if_over(model);
    }
}

/// How a sequence came out of a step in which it ended.
enum Outcome {
    Vector(Vec<f32>),
    Finished(FinishReason),
    Failed(RequestError),
    /// The client has gone.
    Gone,
}

/// Moves `arrived` on; notes when the last tensor was there. The error is the failed tensor's, for the user.
pub(super) fn note_arrivals(active: &mut Active, forecast: &Forecast) -> Result<(), String> {
    let result = count_arrivals(active);
    active.meter.arrived(active.arrived, forecast);
    result
}

fn count_arrivals(active: &mut Active) -> Result<(), String> {
    while let Some(tensor) = active.lease.tensors().get(active.arrived) {
        if !tensor.is_ready() {
            // A failure further back is reported at once, not when the forward pass gets there.
            return first_failure(&active.lease.tensors()[active.arrived..]);
        }
        active.arrived += 1;
    }
    active.complete.get_or_insert_with(Instant::now);
    Ok(())
}

fn is_ready(tensors: &[Arc<Tensor>], unique: usize) -> bool {
    tensors.get(unique).is_some_and(|tensor| tensor.is_ready())
}

/// Where rows of a token embedding that is on its way are read: where host memory has it, that is as good as what comes.
fn source_of(pool: &Pool, plan: &ModelPlan, tensors: &[Arc<Tensor>], early: EarlyRows) -> Option<RowSource> {
    if let Some(bytes) = pool.host_bytes(tensors.get(early.unique)?.key()) {
        return Some(RowSource::Host(bytes));
    }
    let Location { file, offset, .. } = plan.locations.get(early.unique)?;
    Some(RowSource::File { path: file.clone(), offset: *offset })
}

/// Reads rows of the token embedding.
fn read_rows(store: &Store, read: Option<RowRead>, room: HostBuffer, wake: Wake) -> AwaitedRows {
    let (sender, rows) = channel();
    let verified = read.as_ref().is_some_and(|read| matches!(read.from, RowSource::Host(_)));
    if let Some(read) = read {
        store.read_rows(read, room, move |rows| {
            // Nobody waits for them any more if the embedding was faster.
            let _ = sender.send(rows);
            wake();
        });
    }
    AwaitedRows { rows, verified }
}

/// Whether the first stage has the rows that it takes from the token embedding. Where they cannot be read early it waits
/// for the embedding.
fn rows_are_here(step: &mut Step, early: Option<EarlyRows>, tensors: &[Arc<Tensor>]) -> bool {
    let Some(AwaitedRows { rows, verified }) = &step.rows else { return true };
    let here = match rows.try_recv() {
        Ok(Ok(rows)) => {
            step.pass.set_early_rows(rows, *verified);
            true
        }
        _ => early.is_none_or(|early| is_ready(tensors, early.unique)),
    };
    if here {
        step.rows = None;
    }
    here
}

/// The first failure among these tensors, for the user.
pub(super) fn first_failure(tensors: &[Arc<Tensor>]) -> Result<(), String> {
    match tensors.iter().find_map(|tensor| tensor.failure()) {
        None => Ok(()),
        Some(LoadFailure::Failed(reason)) => Err(reason.clone()),
        Some(LoadFailure::Abandoned) => Err("its load was given up".to_owned()),
    }
}

/// What a sequence wants to know of its logits.
fn wish(sequence: &Sequence) -> Option<Wish> {
    match &sequence.sink {
        Sink::Generate(generate) => generate.sampler.wish(),
        Sink::Embed { .. } => None,
    }
}

/// Chooses the next token of a sequence whose tokens are all computed, and tells the client. The logits themselves are
/// looked at only where what the device found out about them does not suffice.
fn sample(
    sequence: &mut Sequence,
    executor: &DeviceExecutor,
    pass: &mut DevicePass,
    chunk: usize,
    now: Instant,
) -> Option<Outcome> {
    let Sink::Generate(generate) = &mut sequence.sink else { return None };
    let from_list = pass.shortlist(chunk).and_then(|list| generate.sampler.sample_from(list));
    let sampled = match from_list {
        Some(sampled) => Ok(sampled),
        None => match executor.row(pass, chunk) {
            Ok(logits) => generate.sampler.sample(logits).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        },
    };
    let sampled = match sampled {
        Ok(sampled) => sampled,
        Err(problem) => return Some(Outcome::Failed(RequestError::Internal(problem))),
    };
    generate.generated += 1;
    let ended = sampled.complete || generate.end_tokens.contains(&sampled.token);
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
