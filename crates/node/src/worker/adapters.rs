//! Adapters in the loop: whose batch their sequences join, and the leases on their tensors while they do.
//!
//! A sequence of an adapter runs in the batch of its base, beside the base's own sequences and those of other
//! adapters. Its own tensors are few and come first; until they are there it takes no part in steps, and nobody waits
//! for it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use tangram_checkpoint::Hash;
use tangram_engine::Adapter;
use tangram_pool::{Lease, Tensor};

use super::step::first_failure;
use super::{Active, Worker};
use crate::api::RequestError;
use crate::model::AdapterPlace;

/// An adapter with sequences in a batch.
pub(super) struct ActiveAdapter {
    /// Key of its model.
    pub(super) model: usize,
    pub(super) engine: Arc<Adapter>,
    pub(super) places: Arc<[AdapterPlace]>,
    pub(super) lease: Lease,
    /// When its last tensor was there.
    pub(super) complete: Option<Instant>,
    /// Its sequences in this batch.
    pub(super) sequences: usize,
}

impl ActiveAdapter {
    /// Notes whether all tensors are there. The error is the failed tensor's, for the user.
    pub(super) fn note_arrivals(&mut self) -> Result<(), String> {
        if self.complete.is_none() {
            match self.lease.tensors().iter().all(|tensor| tensor.is_ready()) {
                true => self.complete = Some(Instant::now()),
                false => first_failure(self.lease.tensors())?,
            }
        }
        Ok(())
    }

    /// For the executor: the tensors and which of them are which.
    pub(super) fn weights(&self) -> (&[Arc<Tensor>], &[AdapterPlace]) {
        (self.lease.tensors(), &self.places)
    }
}

impl Active {
    /// An adapter of this batch.
    pub(super) fn adapter(&self, model: usize) -> Option<&ActiveAdapter> {
        self.adapters.iter().find(|adapter| adapter.model == model)
    }

    /// When everything that a sequence of `model` needs was there.
    pub(super) fn complete(&self, model: usize) -> Option<Instant> {
        match self.adapter(model) {
            Some(adapter) => Some(self.complete?.max(adapter.complete?)),
            None => self.complete,
        }
    }
}

impl Worker {
    /// The model in whose batch the sequences of `model` run.
    pub(super) fn runner(&self, model: usize) -> Option<usize> {
        let entry = self.models.get(model)?.as_ref()?;
        if entry.plan.adapter.is_some() { entry.base } else { Some(model) }
    }

    /// Chooses for every adapter the model in whose batch its sequences start from now on: of the models that are its
    /// base, one that is deployed, and the newest. Models that have lost their last adapter this way may be over.
    pub(super) fn bind_adapters(&mut self) {
        let mut best: HashMap<Hash, (bool, usize)> = HashMap::new();
        for (model, entry) in self.models.iter().enumerate() {
            if let Some(entry) = entry.as_ref().filter(|entry| entry.plan.adapter.is_none()) {
                let rank = (entry.retire.is_none(), model);
                best.entry(entry.plan.identity).and_modify(|known| *known = rank.max(*known)).or_insert(rank);
            }
        }
        let mut adapters = vec![0; self.models.len()];
        for entry in self.models.iter_mut().flatten() {
            let Some(plan) = &entry.plan.adapter else { continue };
            entry.base = best.get(&plan.base).map(|&(_, model)| model);
            if let Some(count) = entry.base.and_then(|model| adapters.get_mut(model)) {
                *count += 1;
            }
        }
        for (entry, count) in self.models.iter_mut().zip(adapters) {
            if let Some(entry) = entry {
                entry.adapters = count;
            }
        }
        for model in 0..self.models.len() {
            if self.models[model].as_ref().is_some_and(|entry| entry.plan.adapter.is_none()) {
                self.retire_if_over(model);
            }
        }
    }

    /// Ends the sequences of adapters of this batch whose tensors could not be loaded. Says whether there were any.
    pub(super) fn note_adapters(&mut self, model: usize) -> bool {
        let Some(active) = self.models[model].as_mut().and_then(|entry| entry.active.as_mut()) else {
            return false;
        };
        let note = |adapter: &mut ActiveAdapter| Some((adapter.model, adapter.note_arrivals().err()?));
        let failed: Vec<(usize, String)> = active.adapters.iter_mut().filter_map(note).collect();
        for (adapter, reason) in &failed {
            let name = self.models[*adapter].as_ref().map(|entry| entry.deployed.name.clone());
            let error = RequestError::LoadFailed { model: name.unwrap_or_default(), reason: reason.clone() };
            let error = self.cause(error);
            tracing::error!(%error, "requests failed");
            // None of them has taken part in a step.
            while let Some(index) = self.models[model].as_ref().and_then(|entry| {
                entry.active.as_ref()?.sequences.iter().position(|sequence| sequence.model == *adapter)
            }) {
                let Some(sequence) = self.take_sequence(model, index) else { break };
                self.end(sequence, |sequence| sequence.fail(error.clone()));
            }
        }
        if !failed.is_empty() {
            self.deactivate_if_over(model);
        }
        !failed.is_empty()
    }

    /// One sequence of an adapter has left the batch of `runner`; the last one ends the lease.
    pub(super) fn leave_adapter(&mut self, runner: usize, model: usize) {
        let Some(active) = self.models[runner].as_mut().and_then(|entry| entry.active.as_mut()) else {
            return;
        };
        let Some(index) = active.adapters.iter().position(|adapter| adapter.model == model) else { return };
        active.adapters[index].sequences -= 1;
        if active.adapters[index].sequences == 0 {
            let adapter = active.adapters.remove(index);
            self.pool.release(adapter.lease);
        }
    }
}
