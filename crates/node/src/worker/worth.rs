//! What the pool is told of worth beside uses: what is expected of the models, and what the absence of each tensor would
//! expose.
//!
//! Ranks nothing; takes a step for every tensor of the models concerned, so it must not be on the way of a request.

use tangram_policy::forecast::Loading;
use tangram_policy::stall::{self, Link};

use super::{ModelEntry, Worker};
use crate::model::ModelPlan;

/// Waiting models that are looked at; those further back have time.
const MOST_AWAITED: usize = 6;

/// What a copy from host memory costs beside its bytes.
const HOST_TRANSFER_SECONDS: f64 = 10e-6;

/// The prompts of a model's requests, as far as worth depends on them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Prompts {
    /// Smoothed logarithm of their length in tokens.
    log2_tokens: f64,
    /// Rounded logarithm for which the model's tensors were appraised.
    appraised: Option<i32>,
}

impl Prompts {
    /// The weight of one more prompt.
    const WEIGHT: f64 = 0.2;

    /// A request with a prompt of so many tokens has started.
    pub(super) fn observe(&mut self, tokens: usize) {
        let log2 = (tokens.max(1) as f64).log2();
        let known = self.log2_tokens > 0.0;
        self.log2_tokens =
            if known { self.log2_tokens + Self::WEIGHT * (log2 - self.log2_tokens) } else { log2 };
    }

    /// Length to appraise for, if it is another than before.
    pub(super) fn changed(&self) -> Option<i32> {
        let rounded = self.log2_tokens.round() as i32;
        (self.appraised != Some(rounded)).then_some(rounded)
    }
}

impl Worker {
    /// Tells the pool what has changed since it was told last.
    pub(super) fn tell_worth(&mut self) {
        let mut waiting: Vec<u32> = Vec::new();
        for sequence in self.queue.iter() {
            let model = sequence.model as u32;
            let active = |entry: &ModelEntry| entry.active.is_some();
            if !waiting.contains(&model) && !self.models[sequence.model].as_ref().is_some_and(active) {
                waiting.push(model);
            }
            if waiting.len() == MOST_AWAITED {
                break;
            }
        }
        self.expectations.await_models(&waiting);
        for model in self.expectations.take_changed() {
            let Some(Some(entry)) = self.models.get_mut(model as usize) else { continue };
            self.pool.expect(&entry.keys, |owners| self.expectations.log2(model, owners));
        }
        for model in std::mem::take(&mut self.unappraised) {
            let Some(Some(entry)) = self.models.get_mut(model) else { continue };
            if let Some(log2_tokens) = entry.prompts.changed()
                && let Some(seconds) = exposed_seconds(&entry.plan, log2_tokens, None)
            {
                self.pool.appraise(entry.keys.iter().copied().zip(seconds));
                entry.prompts.appraised = Some(log2_tokens);
                let from_host = from_host(self.store.host_rate());
                if let Some(seconds) =
                    from_host.and_then(|link| exposed_seconds(&entry.plan, log2_tokens, Some(link)))
                {
                    self.pool.appraise_from_host(entry.keys.iter().copied().zip(seconds));
                }
            }
        }
    }
}

/// How weights come from host memory, once that was seen: by a link that takes nothing from computing.
fn from_host(bytes_per_second: Option<f64>) -> Option<Loading> {
    let bytes_per_second = bytes_per_second?;
    Some(Loading { link: Link { bytes_per_second, transfer_seconds: HOST_TRANSFER_SECONDS }, share: 0.0 })
}

/// For each of a model's tensors, how much later the first token would be if it and all after it were missing, less the
/// same with only those after it missing. They come as the machine's disk was measured to bring them, unless `loading` says
/// otherwise. `None` before this machine was measured.
fn exposed_seconds(plan: &ModelPlan, log2_tokens: i32, loading: Option<Loading>) -> Option<Vec<f64>> {
    let tokens = 1usize << log2_tokens.clamp(0, 20);
    let (from_disk, compute) = plan.forecast.nominal(tokens)?;
    let loading = loading.unwrap_or(from_disk);
    let load: Vec<f64> = plan
        .forecast
        .bytes_by_stage()
        .iter()
        .map(|&bytes| loading.link.seconds(bytes, u32::from(bytes > 0)))
        .collect();
    // What a load takes from computing hides nothing.
    let hiding: Vec<f64> = compute.iter().map(|seconds| seconds * (1.0 - loading.share)).collect();
    let exposure = stall::marginal_exposure(&load, &[(1.0, hiding)]);
    let mut stage = 0;
    let seconds = plan.entries.iter().enumerate().map(|(tensor, entry)| {
        while plan.needed_by_stage.get(stage).is_some_and(|&needed| needed <= tensor) {
            stage += 1;
        }
        let exposed = exposure.get(stage).copied().unwrap_or(1.0);
        stall::saved_seconds(loading.link.seconds(entry.bytes, 1), exposed)
    });
    Some(seconds.collect())
}
