//! Endings: finished, cancelled, preempted and failed sequences. Every way out gives the KV back.

use std::sync::atomic::Ordering;

use tangram_policy::pressure::{self, Parting};

use super::{ModelEntry, Worker};
use crate::api::RequestError;
use crate::sequence::Sequence;
use crate::swap::Swapped;

impl Worker {
    /// Takes a running sequence out, with its KV given back. A step under way must not include it.
    pub(super) fn take_sequence(&mut self, model: usize, index: usize) -> Option<Sequence> {
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
        if let Some(entry) = self.models[sequence.model].as_mut() {
            entry.running -= 1;
        }
        self.leave_adapter(model, sequence.model);
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

    pub(super) fn deactivate_if_over(&mut self, model: usize) {
        let Some(entry) = self.models[model].as_mut() else { return };
        if let Some(active) = entry.active.take_if(|active| active.sequences.is_empty()) {
            if let Some(step) = active.step {
                self.executor.recycle(step.pass);
            }
            self.pool.release(active.lease);
        }
        self.retire_if_over(model);
    }

    pub(super) fn drop_cancelled(&mut self) {
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

    /// Takes the KV of the sequence that the policy names and puts it back into the queue; its tokens are kept, and
    /// their keys and values copied to host memory or computed again later, with the same result. `false` if nobody
    /// holds any KV.
    pub(super) fn preempt_one(&mut self) -> bool {
        let running = |entry: &ModelEntry| entry.active.as_ref().map_or(0, |active| active.sequences.len());
        let places: Vec<(usize, usize)> = self
            .models
            .iter()
            .enumerate()
            .filter_map(|(model, entry)| Some((model, running(entry.as_ref()?))))
            .flat_map(|(model, count)| (0..count).map(move |index| (model, index)))
            .collect();
        let arrival = |&(model, index): &(usize, usize)| {
            let sequence = &self.models[model].as_ref()?.active.as_ref()?.sequences[index];
            (sequence.blocks() > 0).then_some(sequence.arrival)
        };
        let Some(chosen) = pressure::whom_to_preempt(places.iter().map(arrival)) else { return false };
        let (model, index) = places[chosen];
        self.abandon_step_with(model, index);
        let swapped = self.swap_out(model, index);
        let Some(mut sequence) = self.take_sequence(model, index) else { return false };
        let arrival = sequence.arrival;
        sequence.computed = 0;
        sequence.preempted = true;
        self.preemptions += 1;
        self.swaps += u64::from(swapped.is_some());
        sequence.swapped = swapped;
        self.shared.waiting.fetch_add(1, Ordering::AcqRel);
        if let Some(entry) = self.models[sequence.model].as_mut() {
            entry.waiting += 1;
        }
        self.queue.push_back_in_order(Box::new(sequence), |other| other.arrival > arrival);
        self.deactivate_if_over(model);
        true
    }

    /// Copies a sequence's keys and values to host memory if that is cheaper than computing them again.
    fn swap_out(&mut self, model: usize, index: usize) -> Option<Swapped> {
        let entry = self.models[model].as_ref()?;
        let sequence = entry.active.as_ref()?.sequences.get(index)?;
        let layout = entry.plan.engine.kv()?;
        let used = sequence.computed.div_ceil(layout.block_tokens);
        let blocks = sequence.prefix.blocks().iter().map(|block| &**block).chain(&sequence.kv).take(used);
        let bytes = (used * layout.block_bytes) as u64;
        let token_seconds = entry.prefixes.block_seconds(1);
        let (rate, free) = (self.host.rate(), self.host.free());
        match pressure::parting(sequence.computed, token_seconds, bytes, rate, free) {
            Parting::Recompute => None,
            Parting::Swap => self.host.save(blocks, sequence.computed),
        }
    }

    /// Ends every running sequence of a model with an error.
    pub(super) fn fail_model(&mut self, model: usize, error: &RequestError) {
        let error = self.cause(error.clone());
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

    /// Ends every sequence of a model, running or not, with an error: what its answers are computed from is not what it
    /// should be.
    pub(super) fn withdraw(&mut self, model: usize, reason: &str) {
        let Some(entry) = self.models.get(model).and_then(Option::as_ref) else { return };
        let error =
            RequestError::LoadFailed { model: entry.deployed.name.clone(), reason: reason.to_owned() };
        for sequence in self.queue.remove(|sequence| sequence.model == model) {
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
            if let Some(entry) = self.models[model].as_mut() {
                entry.waiting -= 1;
            }
            let error = error.clone();
            self.end(*sequence, |sequence| sequence.fail(error));
        }
        if self.models[model].as_ref().is_some_and(|entry| entry.active.is_some()) {
            self.fail_model(model, &error);
        }
        self.start_arrived();
    }

    fn take_last(&mut self, model: usize) -> Option<Sequence> {
        let active = self.models[model].as_ref()?.active.as_ref()?;
        self.take_sequence(model, active.sequences.len().checked_sub(1)?)
    }

    pub(super) fn fail_everything(&mut self) {
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
}
