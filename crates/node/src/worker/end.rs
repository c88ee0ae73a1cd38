//! Endings: finished, cancelled, preempted and failed sequences. Every way out gives the KV back.

use std::sync::atomic::Ordering;

use super::{ModelEntry, Worker};
use crate::api::RequestError;
use crate::sequence::Sequence;

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

    /// Takes the KV of the sequence that arrived last and puts it back into the queue; its tokens are kept and
    /// computed again later, with the same result. The oldest sequence is never chosen while there is another, so
    /// somebody always gets on. `false` if nobody holds any KV.
    pub(super) fn preempt_youngest(&mut self) -> bool {
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
    pub(super) fn fail_model(&mut self, model: usize, error: &RequestError) {
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
