//! Starting sequences: leases for their model, the loads that this needs, cached prefixes.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tangram_device::DeviceError;
use tangram_policy::pressure::{self, Growing};
use tangram_policy::{Attempt, TensorKey};
use tangram_pool::{KvReserve, Refusal, Vacancy};

use super::adapters::ActiveAdapter;
use super::step::note_arrivals;
use super::{Active, ModelEntry, Worker};
use crate::api::RequestError;
use crate::arrival::sort_out;
use crate::forecast::LoadMeter;
use crate::model::{Location, loads};
use crate::sequence::Sequence;

/// Sequences of one model that run at once. Bounds the scratch memory of a step.
pub(crate) const MAX_BATCH: usize = 64;

impl Worker {
    pub(super) fn admit(&mut self) {
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

    /// Starts the loads of tensors that have come to this disk meanwhile.
    pub(super) fn start_arrived(&mut self) {
        if !self.waiting.is_empty() {
            let (ready, waiting) = sort_out(std::mem::take(&mut self.waiting));
            self.waiting = waiting;
            self.store.load(ready, &self.wake);
        }
    }

    /// KV that running sequences of this and other models will still take for the tokens that they have.
    fn promised(&self) -> Vec<KvReserve> {
        let lacking = |entry: &ModelEntry, sequence: &Sequence| {
            entry.plan.kv_blocks(sequence.tokens.len() + 1).saturating_sub(sequence.blocks())
        };
        let reserve = |entry: &ModelEntry| {
            let sequences = entry.active.as_ref()?.sequences.iter();
            Some(KvReserve {
                kv: entry.kv?,
                blocks: sequences.map(|sequence| lacking(entry, sequence)).sum(),
            })
        };
        self.models.iter().flatten().filter_map(reserve).collect()
    }

    /// Makes room ahead of what running sequences will take next, so that no step has to.
    pub(super) fn keep_headroom(&mut self) {
        let (mut low, mut high) = (Vec::new(), Vec::new());
        for entry in self.models.iter().flatten() {
            let (Some(active), Some(kv), Some(layout)) = (&entry.active, entry.kv, entry.plan.engine.kv())
            else {
                continue;
            };
            let growing = active.sequences.iter().map(|sequence| Growing {
                held: sequence.blocks() * layout.block_tokens,
                tokens: sequence.tokens.len(),
                left: sequence.left(),
            });
            let marks = pressure::watermarks(growing, layout.block_tokens);
            low.push(KvReserve { kv, blocks: marks.low });
            high.push(KvReserve { kv, blocks: marks.high });
        }
        if !low.is_empty() && !self.pool.has_room(&low) {
            self.pool.reclaim(&high);
        }
    }

    /// Starts a sequence if there is room for its model and for the KV of the tokens that it has.
    fn start(&mut self, mut sequence: Box<Sequence>) -> Result<Attempt, Box<Sequence>> {
        let now = Instant::now();
        let mut reserve = self.promised();
        let seconds = now.duration_since(self.epoch).as_secs_f64();
        let model = sequence.model;
        let Some(runner) = self.runner(model) else { return Err(sequence) };
        let Some(entry) = self.models[runner].as_ref() else { return Err(sequence) };
        let block_tokens = entry.plan.engine.kv().map_or(usize::MAX, |kv| kv.block_tokens);
        sequence.set_long(entry.plan.engine.is_long(sequence.tokens.len()));
        // At least one token has to be computed, or there would be no logits to go on from.
        let full = sequence.pending().saturating_sub(1) / block_tokens;
        let tokens = pressure::admission_tokens(sequence.tokens.len(), sequence.left(), sequence.preempted);
        let hashes = sequence.block_hashes(full, block_tokens);
        if let Some(kv) = entry.kv {
            let blocks = entry.plan.kv_blocks(tokens) - self.pool.blocks_in_use(kv, hashes);
            reserve.push(KvReserve { kv, blocks });
        }
        if entry.active.as_ref().is_some_and(|active| active.sequences.len() >= MAX_BATCH) {
            return Err(sequence);
        }
        let (loaded, reused) = match self.lease(runner, model, &reserve, seconds) {
            None => return Err(sequence),
            Some(Ok(bytes)) => bytes,
            Some(Err(error)) => {
                self.refuse(*sequence, &error);
                return Ok(Attempt::Gone);
            }
        };
        let Some(entry) = self.models[runner].as_mut() else { return Err(sequence) };
        if let Some(kv) = entry.kv {
            let saved = entry.prefixes.block_seconds(block_tokens);
            let hashes = sequence.block_hashes(full, block_tokens);
            let prefix = self.pool.lease_prefix(kv, hashes, saved, seconds);
            entry.prefixes.found(prefix.len());
            sequence.computed = prefix.len() * block_tokens;
            sequence.prefix = prefix;
            if let Some(swapped) = sequence.swapped.take().filter(|saved| saved.tokens > sequence.computed) {
                let cached = sequence.prefix.len();
                let mut blocks =
                    self.pool.take_kv(kv, swapped.len().saturating_sub(cached)).unwrap_or_default();
                let restored = blocks.iter_mut().zip(cached..).all(|(block, at)| swapped.restore(at, block));
                if restored && cached + blocks.len() == swapped.len() {
                    sequence.kv = blocks;
                    sequence.computed = swapped.tokens;
                } else {
                    self.pool.give_kv(kv, blocks);
                }
            }
        }
        if let Some(entry) = self.models[model].as_mut() {
            entry.waiting -= 1;
            entry.running += 1;
            if sequence.admitted.is_none() {
                entry.prompts.observe(sequence.tokens.len());
                if entry.prompts.changed().is_some() {
                    self.unappraised.push(model);
                }
            }
        }
        self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
        if sequence.admitted.is_none() {
            self.expectations.observe(sequence.model as u32);
            sequence.admitted = Some(now);
            sequence.timing.queue = now.duration_since(sequence.submitted);
            sequence.timing.cached_tokens = sequence.computed as u64;
            self.cached_tokens += sequence.computed as u64;
        }
        sequence.timing.bytes_loaded += loaded;
        sequence.timing.bytes_reused = reused;
        let Some(entry) = self.models[runner].as_mut() else { return Err(sequence) };
        let Some(active) = entry.active.as_mut() else { return Err(sequence) };
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
        let _ = note_arrivals(active, &entry.plan.forecast);
        for adapter in active.adapters.iter_mut().filter(|adapter| adapter.model == model) {
            let _ = adapter.note_arrivals();
        }
        Ok(Attempt::Started)
    }

    /// Leases what one more sequence of `model` in the batch of `runner` needs, and starts loading what is missing: the
    /// model's tensors unless the batch holds them already, and those of its adapter before them. Gives the bytes that
    /// are loaded and reused; `None`, with nothing changed, if there is no room.
    fn lease(
        &mut self,
        runner: usize,
        model: usize,
        reserve: &[KvReserve],
        now: f64,
    ) -> Option<Result<(u64, u64), DeviceError>> {
        let (base, entry) = (self.models[runner].as_ref()?, self.models[model].as_ref()?);
        let adapter = entry.plan.adapter.as_ref();
        let own = adapter.map_or(&[][..], |adapter| &adapter.own);
        let own_is_held = base.active.as_ref().is_some_and(|active| active.adapter(model).is_some());
        let own_keys = own.iter().filter_map(|&unique| entry.keys.get(unique).copied());
        let mut keys: Vec<TensorKey> = own_keys.filter(|_| !own_is_held).collect();
        let new_own = keys.len();
        if base.active.is_none() {
            keys.extend(&base.keys);
        }
        let (mut loaded, mut reused, mut meter) = (0, 0, LoadMeter::default());
        let mut lease = if keys.is_empty() {
            if !self.pool.can_reserve(reserve) {
                return None;
            }
            None
        } else {
            let mut activation = self.pool.activate(&keys, reserve, now);
            if let Some((prefetching, load)) = self.prefetching.take() {
                // What this request does not share of it is given up, and the rest is urgent now.
                self.store.hasten(load);
                self.pool.release(prefetching);
                if activation.is_err() {
                    activation = self.pool.activate(&keys, reserve, now);
                }
            }
            let activation = match activation {
                Ok(activation) => activation,
                Err(Refusal::Short(_)) => return None,
                Err(Refusal::Device(error)) => return Some(Err(error)),
            };
            // How fast weights come from host memory says nothing about the disk.
            let from_disk = !activation.missing.iter().any(Vacancy::is_in_host);
            if !activation.missing.is_empty() && from_disk && !base.plan.is_arriving() {
                let tensors = activation.lease.tensors().iter();
                meter = LoadMeter::new(tensors.map(|tensor| (tensor.len() as u64, !tensor.is_ready())));
            }
            loaded += activation.bytes_loaded;
            reused += activation.bytes_reused;
            let (ready, waiting) = loads(located(activation.missing, [entry, base]), &self.wake);
            self.waiting.extend(waiting);
            self.store.load(ready, &self.wake);
            Some(activation.lease)
        };
        if let Some(active) = &base.active {
            self.pool.used_again(&active.lease, now);
            reused += base.plan.unique_bytes();
            if let Some(adapter) = active.adapter(model) {
                self.pool.used_again(&adapter.lease, now);
                reused += adapter.lease.tensors().iter().map(|tensor| tensor.len() as u64).sum::<u64>();
            }
        }
        let new_adapter =
            adapter.filter(|_| !own_is_held).map(|plan| (plan.engine.clone(), plan.places.clone()));
        let base_lease = lease.as_mut().map(|lease| lease.split_off(new_own));
        let active = &mut self.models[runner].as_mut()?.active;
        if active.is_none() {
            self.activations += 1;
        }
        let active = match (active, base_lease) {
            (Some(active), _) => active,
            (none, base_lease) => none.insert(Active {
                lease: base_lease?,
                arrived: 0,
                complete: None,
                sequences: Vec::new(),
                adapters: Vec::new(),
                step: None,
                meter,
            }),
        };
        if let Some((engine, places)) = new_adapter {
            let lease = lease.unwrap_or_default();
            active.adapters.push(ActiveAdapter {
                model,
                engine,
                places,
                lease,
                complete: None,
                sequences: 0,
            });
        }
        for adapter in active.adapters.iter_mut().filter(|adapter| adapter.model == model) {
            adapter.sequences += 1;
        }
        Some(Ok((loaded, reused)))
    }

    /// Ends a sequence that would wait for ever, because what the device refuses it will refuse again.
    fn refuse(&mut self, sequence: Sequence, error: &DeviceError) {
        let model = sequence.model;
        tracing::error!(%error, "a request was refused by the device");
        self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
        let mut name = String::new();
        if let Some(entry) = self.models[model].as_mut() {
            entry.waiting -= 1;
            name.clone_from(&entry.deployed.name);
        }
        let error = RequestError::LoadFailed { model: name, reason: format!("no place for it: {error}") };
        let error = self.cause(error);
        self.end(sequence, |sequence| sequence.fail(error));
    }

    /// Leases what others have computed of a sequence's prompt since it was admitted, as long as it has computed
    /// nothing itself: the choices of one prompt arrive together, and only the first needs to compute it.
    pub(super) fn share_prefixes(&mut self, model: usize) {
        let Some(entry) = self.models[model].as_mut() else { return };
        let Some((active, kv, layout)) =
            entry.active.as_mut().zip(entry.kv).zip(entry.plan.engine.kv()).map(|((a, k), l)| (a, k, l))
        else {
            return;
        };
        let seconds = self.epoch.elapsed().as_secs_f64();
        for sequence in &mut active.sequences {
            let held = sequence.prefix.len();
            // As when it was admitted: at least one token has to be computed.
            let full = sequence.tokens.len().saturating_sub(1) / layout.block_tokens;
            let untouched = sequence.kv.is_empty() && sequence.computed == held * layout.block_tokens;
            if !untouched || full <= held {
                continue;
            }
            let hashes = sequence.block_hashes(full, layout.block_tokens);
            if self.pool.blocks_in_use(kv, &hashes[held..=held]) == 0 {
                continue;
            }
            let saved = entry.prefixes.block_seconds(layout.block_tokens);
            let prefix = self.pool.lease_prefix(kv, hashes, saved, seconds);
            let more = prefix.len().saturating_sub(held);
            self.pool.release_prefix(std::mem::replace(&mut sequence.prefix, prefix));
            sequence.computed = sequence.prefix.len() * layout.block_tokens;
            entry.prefixes.found(more);
            if sequence.first_token.is_none() {
                let tokens = (more * layout.block_tokens) as u64;
                sequence.timing.cached_tokens += tokens;
                self.cached_tokens += tokens;
            }
        }
    }
}

/// Where the bytes of tensors without any are to come from: for the base's, where the base has them now.
fn located(
    missing: Vec<Vacancy>,
    adapter_and_base: [&ModelEntry; 2],
) -> impl Iterator<Item = (Vacancy, &Location)> {
    let mut locations: HashMap<TensorKey, &Location> = HashMap::new();
    if !missing.is_empty() {
        for entry in adapter_and_base {
            locations.extend(entry.keys.iter().copied().zip(&entry.plan.locations));
        }
    }
    missing.into_iter().filter_map(move |vacancy| {
        let location = *locations.get(&vacancy.tensor().key())?;
        Some((vacancy, location))
    })
}
