//! What the loop publishes about itself.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use tangram_checkpoint::{ModelSpec, Output, TensorEntry};
use tangram_pool::Backend;

use super::{Published, Worker};
use crate::api::{ModelStatus, NodeStatus};
use crate::model::ModelPlan;

/// How old the published status may get while work is going on.
const STATUS_AGE: Duration = Duration::from_millis(50);

impl Worker {
    pub(super) fn publish(&mut self, now: bool) {
        if !now && self.published.elapsed() < STATUS_AGE {
            return;
        }
        self.published = Instant::now();
        let (stats, memory) = (self.pool.stats(), self.pool.memory());
        let page_bytes = memory.page_bytes() as u64;
        let host = self.pool.host().unwrap_or_default();
        let counts = self.executor.counts();
        let mut node = NodeStatus {
            device: memory.name().to_owned(),
            devices: Vec::new(),
            backend: match self.pool.backend() {
                Backend::Paged => "paged",
                Backend::Segment => "segment",
            }
            .to_owned(),
            pool_bytes: memory.page_count() as u64 * page_bytes,
            free_bytes: self.pool.free_bytes(),
            pool_taken_bytes: memory.host_bytes_taken() as u64,
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
            bytes_prefetched_total: stats.fetched_total,
            bytes_moved_total: stats.moved_total,
            preemptions_total: self.preemptions,
            swaps_total: self.swaps,
            host_kv_bytes: self.host.used(),
            host_tier_bytes: host.bytes,
            host_weight_bytes: host.used_bytes,
            host_tensors: host.tensors,
            bytes_from_host_total: stats.from_host_total,
            activations_total: self.activations,
            device_rebuilds_total: self.rebuilds,
            graphs: counts.graphs,
            replayed_steps_total: self.replays + counts.replays,
            copied_rows_total: self.rows_copied + counts.rows_copied,
            scratch_bytes: self.executor.scratch_bytes() as u64,
        };
        let running = self.models.iter().flatten().filter_map(|entry| entry.active.as_ref());
        let running = running.flat_map(|active| &active.sequences);
        let started = running.filter(|sequence| sequence.first_token.is_some()).count();
        let mut models: Vec<ModelStatus> = Vec::new();
        for entry in self.models.iter().flatten().filter(|entry| entry.retire.is_none()) {
            node.running += entry.running;
            let runner = entry.base.map_or(Some(entry), |base| self.models[base].as_ref());
            let active = runner.and_then(|entry| entry.active.as_ref()).filter(|_| entry.running > 0);
            let state = match active {
                None => "idle",
                Some(active) if active.complete(entry.deployed.index).is_none() => "loading",
                Some(_) => "active",
            };
            let (deployed, plan) = (&entry.deployed, &entry.plan);
            models.push(ModelStatus {
                name: deployed.name.clone(),
                base: plan.manifest.base.clone(),
                family: deployed.spec.family.clone(),
                task: task(&deployed.spec).to_owned(),
                dtype: dominant_dtype(plan),
                weight_bytes: plan.unique_bytes(),
                stored_bytes: plan.manifest.tensors.iter().map(TensorEntry::stored_bytes).sum(),
                in_place_bytes: plan.manifest.in_place.is_some().then(|| plan.in_place_bytes()),
                shared_bytes: self.pool.shared_bytes(&entry.keys),
                resident_bytes: self.pool.resident_bytes(&entry.keys),
                resident_by_device: Vec::new(),
                hosted_bytes: self.pool.hosted_bytes(&entry.keys),
                kv_bytes_per_token: deployed.kv_bytes_per_token,
                context: deployed.context,
                forecast: plan.forecast.listed(memory.page_count() as u64),
                state: state.to_owned(),
                running: entry.running,
                waiting: entry.waiting,
                created: deployed.created,
            });
        }
        models.sort_by(|a, b| a.name.cmp(&b.name));
        let host_bytes_per_second = self.store.host_rate();
        *self.shared.status.lock().unwrap_or_else(PoisonError::into_inner) =
            Published { node, models, started, at: Some(self.published), host_bytes_per_second };
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

/// What a model is for, as listings have it.
fn task(spec: &ModelSpec) -> &'static str {
    match spec.output {
        Output::Logits { .. } => "generate",
        Output::Embedding { .. } => "embed",
        Output::Score { .. } => "score",
    }
}
