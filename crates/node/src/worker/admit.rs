//! Starting sequences: leases for their model, the loads that this needs, cached prefixes.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tangram_policy::{Attempt, TensorKey};
use tangram_store::TensorLoad;

use super::step::note_arrivals;
use super::{Active, Worker};
use crate::sequence::Sequence;

/// Sequences of one model that run at once. Bounds the scratch memory of a step.
const MAX_BATCH: usize = 64;

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
            entry.prefixes.found(prefix.len());
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
}
