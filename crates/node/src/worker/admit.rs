//! Starting sequences: leases for their model, the loads that this needs, cached prefixes.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tangram_policy::pressure::{self, Growing};
use tangram_policy::{Attempt, TensorKey};
use tangram_pool::KvReserve;

use super::step::note_arrivals;
use super::{Active, ModelEntry, Worker};
use crate::forecast::LoadMeter;
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
        let Some(entry) = self.models[sequence.model].as_mut() else { return Err(sequence) };
        let block_tokens = entry.plan.engine.kv().map_or(usize::MAX, |kv| kv.block_tokens);
        // At least one token has to be computed, or there would be no logits to go on from.
        let full = sequence.pending().saturating_sub(1) / block_tokens;
        let tokens = pressure::admission_tokens(sequence.tokens.len(), sequence.left(), sequence.preempted);
        let hashes = sequence.block_hashes(full, block_tokens);
        if let Some(kv) = entry.kv {
            let blocks = entry.plan.kv_blocks(tokens) - self.pool.blocks_in_use(kv, hashes);
            reserve.push(KvReserve { kv, blocks });
        }
        let (mut loaded, mut reused) = (0, 0);
        match &mut entry.active {
            Some(active) => {
                if active.sequences.len() >= MAX_BATCH || !self.pool.can_reserve(&reserve) {
                    return Err(sequence);
                }
                self.pool.used_again(&active.lease, seconds);
                reused = entry.plan.unique_bytes();
            }
            None => {
                let mut activation = self.pool.activate(&entry.keys, &reserve, seconds);
                if let Some(lease) = self.prefetching.take() {
                    // What this request does not share of it is given up.
                    self.pool.release(lease);
                    if activation.is_err() {
                        activation = self.pool.activate(&entry.keys, &reserve, seconds);
                    }
                }
                let Ok(activation) = activation else { return Err(sequence) };
                loaded += activation.bytes_loaded;
                reused += activation.bytes_reused;
                self.activations += 1;
                let missing = !activation.missing.is_empty();
                let locations: HashMap<TensorKey, usize> =
                    if missing { entry.keys.iter().copied().zip(0..).collect() } else { HashMap::new() };
                let meter = if missing {
                    let tensors = activation.lease.tensors().iter();
                    LoadMeter::new(tensors.map(|tensor| (tensor.len() as u64, !tensor.is_ready())))
                } else {
                    LoadMeter::default()
                };
                let loads = activation.missing.into_iter().filter_map(|vacancy| {
                    let location = entry.plan.locations.get(*locations.get(&vacancy.tensor().key())?)?;
                    Some(location.load(vacancy))
                });
                self.store.load(loads.collect(), &self.wake);
                entry.active = Some(Active {
                    lease: activation.lease,
                    arrived: 0,
                    complete: None,
                    sequences: Vec::new(),
                    step: None,
                    meter,
                });
            }
        }
        let Some(active) = &mut entry.active else { return Err(sequence) };
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
        entry.waiting -= 1;
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
        Ok(Attempt::Started)
    }
}
