//! Ours on one device: `tangram_policy::Retention` and `Expectations`, told what happens and asked what should go and
//! come.
//!
//! Ranks nothing itself. A slot's number is its tensor key.

use tangram_policy::eviction::{self, Candidate};
use tangram_policy::stall::{marginal_exposure, saved_seconds};
use tangram_policy::{Event, Expectations, Retention, TensorKey, prefetch};

use crate::device::Device;
use crate::system::Worth;

/// Doublings by which Belady's eviction prefers a use that comes one request sooner: more than any other difference.
const ORACLE_STEP: f64 = 4.0;

/// Retention and expectations of one device.
#[derive(Debug)]
pub(crate) struct Economy {
    parts: Worth,
    half_life: f64,
    retention: Retention,
    expectations: Expectations,
    /// Requests seen, decayed, at the time `seen_at` (seconds).
    seen: f64,
    seen_at: f64,
}

impl Economy {
    pub(crate) fn new(parts: Worth) -> Economy {
        let half_life = if parts.decay { 600.0 } else { f64::INFINITY };
        Economy {
            parts,
            half_life,
            retention: Retention::with_half_life(half_life),
            expectations: Expectations::new(),
            seen: 0.0,
            seen_at: 0.0,
        }
    }

    fn key(slot: u32) -> TensorKey {
        TensorKey(slot)
    }

    /// A model is new on the device.
    pub(crate) fn catalogue(&mut self, device: &Device, slots: &[u32]) {
        let count = slots.len().max(2) as f64 - 1.0;
        for (index, &slot) in slots.iter().enumerate() {
            let bytes = device.slots[slot as usize].bytes;
            let event = Event::Catalogued { tensor: Self::key(slot), bytes, depth: index as f64 / count };
            self.retention.apply(event);
        }
    }

    /// What the absence of each of the model's groups would expose, for prompts that compute these seconds per group
    /// (each with its weight).
    pub(crate) fn appraise(
        &mut self,
        device: &Device,
        slots: &[u32],
        load_seconds: &[f64],
        prompts: &[(f64, Vec<f64>)],
    ) {
        let seconds = self.exposed(device, slots, load_seconds, prompts);
        for (&slot, seconds) in slots.iter().zip(seconds) {
            self.retention.apply(Event::Appraised { tensor: Self::key(slot), seconds });
        }
    }

    /// What [`Economy::appraise`] appraises, in seconds.
    pub(crate) fn exposed(
        &self,
        device: &Device,
        slots: &[u32],
        load_seconds: &[f64],
        prompts: &[(f64, Vec<f64>)],
    ) -> Vec<f64> {
        let exposure = if self.parts.exposure {
            marginal_exposure(load_seconds, prompts)
        } else {
            vec![1.0; load_seconds.len()]
        };
        let mean = slots.iter().map(|&slot| device.slots[slot as usize].bytes).sum::<u64>() as f64
            / slots.len() as f64;
        let each = slots.iter().zip(load_seconds).zip(&exposure).map(|((&slot, &load), &exposure)| {
            let bytes = device.slots[slot as usize].bytes as f64;
            let per_byte = if self.parts.per_byte { 1.0 } else { bytes / mean };
            saved_seconds(load, exposure) * per_byte
        });
        each.collect()
    }

    /// What the absence of the model's groups exposes while host memory has them, in seconds, in their order.
    pub(crate) fn appraise_from_host(&mut self, slots: &[u32], seconds: &[f64]) {
        for (&slot, &seconds) in slots.iter().zip(seconds) {
            self.retention.apply(Event::AppraisedFromHost { tensor: Self::key(slot), seconds });
        }
    }

    /// Host memory has a group from now on, or has it no longer.
    pub(crate) fn hosted(&mut self, slot: u32, hosted: bool) {
        self.retention.apply(Event::Hosted { tensor: Self::key(slot), hosted });
    }

    /// The model is forgotten; these slots were only its.
    pub(crate) fn forget(&mut self, model: u32, slots: &[u32]) {
        self.expectations.forget(model);
        for &slot in slots {
            self.retention.apply(Event::Expected { tensor: Self::key(slot), log2: 0.0 });
            self.retention.apply(Event::Forgotten { tensor: Self::key(slot) });
        }
    }

    /// A request starts: all of its model's groups are leased, whether they are here already or not.
    pub(crate) fn lease(
        &mut self,
        device: &Device,
        model: u32,
        slots: &[u32],
        now: f64,
        next_use: Option<u32>,
    ) {
        for &slot in slots {
            self.retention.apply(Event::Leased { tensor: Self::key(slot), at: now });
        }
        self.seen = self.seen * ((self.seen_at - now) / self.half_life).exp2() + 1.0;
        self.seen_at = now;
        if self.parts.oracle {
            let boost = -ORACLE_STEP * f64::from(next_use.unwrap_or(u32::MAX >> 8));
            self.expectations.set_boost(model, boost);
        } else if self.parts.forecast {
            self.expectations.observe(model);
        }
        self.tell(device);
    }

    /// These models wait for the device now, the first to be served first.
    pub(crate) fn await_models(&mut self, device: &Device, models: &[u32]) {
        self.expectations.await_models(models);
        self.tell(device);
    }

    /// Another device has used the model since, or this one does again.
    pub(crate) fn set_elsewhere(&mut self, device: &Device, model: u32, elsewhere: bool) {
        self.expectations.set_elsewhere(model, elsewhere);
        self.tell(device);
    }

    /// Whether a request for the model waits for this device.
    pub(crate) fn awaits(&self, model: u32) -> bool {
        self.expectations.awaits(model)
    }

    fn tell(&mut self, device: &Device) {
        for model in self.expectations.take_changed() {
            let Some(slots) = device.slots_of(model) else {
                // Whatever is known of a model that is not here counts from when it comes.
                self.expectations.forget(model);
                continue;
            };
            for &slot in slots {
                // The oracle knows for what it speaks.
                let owners = if self.parts.oracle { 1 } else { device.slots[slot as usize].models };
                let log2 = self.expectations.log2(model, owners);
                self.retention.apply(Event::Expected { tensor: Self::key(slot), log2 });
            }
        }
    }

    pub(crate) fn idle(&mut self, slot: u32) {
        self.retention.apply(Event::Idle { tensor: Self::key(slot) });
    }

    pub(crate) fn evicted(&mut self, slot: u32) {
        self.retention.apply(Event::Evicted { tensor: Self::key(slot) });
    }

    pub(crate) fn fetched(&mut self, slot: u32) {
        self.retention.apply(Event::Fetched { tensor: Self::key(slot) });
    }

    fn candidates(&self, device: &Device) -> impl Iterator<Item = Candidate> {
        self.retention.idle().map(|tensor| Candidate {
            tensor,
            bytes: device.slots[tensor.0 as usize].bytes,
            log2_worth: self.retention.log2_worth(tensor).unwrap_or(f64::NEG_INFINITY),
        })
    }

    /// What should go so that `bytes` become free; everything idle if that is too little.
    pub(crate) fn victims(&self, device: &Device, bytes: u64) -> Vec<u32> {
        let victims = eviction::choose(self.candidates(device), bytes);
        victims.into_iter().map(|tensor| tensor.0).collect()
    }

    /// Absent groups in the order in which they should be prefetched.
    pub(crate) fn wanted(&self) -> impl Iterator<Item = u32> {
        self.retention.wanted().map(|tensor| tensor.0)
    }

    /// What should go so that `slot` can be prefetched into `bytes`; `None` if it is not worth that.
    pub(crate) fn victims_for(&self, device: &Device, slot: u32, bytes: u64) -> Option<Vec<u32>> {
        let worth = self.retention.log2_worth(Self::key(slot))?;
        let victims = prefetch::room(self.candidates(device), bytes, worth)?;
        Some(victims.into_iter().map(|tensor| tensor.0).collect())
    }

    /// Seconds that evicting `bytes` is expected to cost later requests on this device; above `limit` not exactly.
    pub(crate) fn damage(&self, bytes: u64, now: f64, limit: f64) -> f64 {
        if bytes == 0 {
            return 0.0;
        }
        let requests = self.seen * ((self.seen_at - now) / self.half_life).exp2();
        self.retention.damage(bytes, requests, now, limit)
    }
}
