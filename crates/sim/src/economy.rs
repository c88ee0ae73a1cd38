//! Ours on one device: `tangram_policy::Retention` and `Forecast`, told what happens and asked what should go and come.
//!
//! Ranks nothing itself. A slot's number is its tensor key.

use std::collections::HashMap;

use tangram_policy::eviction::{self, Candidate};
use tangram_policy::stall::marginal_exposure;
use tangram_policy::{Event, Forecast, Retention, TensorKey, prefetch};

use crate::device::Device;
use crate::system::Worth;

/// Doublings of worth for what a waiting request will use, and fewer for each request in front of it.
const AWAITED: f64 = 12.0;

/// Doublings for what another device has too, or had later: the next request may well go there.
const SECOND_COPY: f64 = -3.0;

/// Boosts that changed less are left as they are.
const COARSENESS: f64 = 0.25;

/// Share of a load that counts even where the pipeline hides all of it: the link is busy meanwhile.
const LEAST_EXPOSURE: f64 = 0.05;

/// Doublings by which Belady's eviction prefers a use that comes one request sooner: more than any other difference.
const ORACLE_STEP: f64 = 4.0;

#[derive(Clone, Copy, Debug, Default)]
struct Expectation {
    boost: f64,
    awaited: f64,
    /// Whether another device used the model later than this one.
    elsewhere: bool,
}

/// Retention and forecast of one device.
#[derive(Debug)]
pub(crate) struct Economy {
    parts: Worth,
    half_life: f64,
    retention: Retention,
    forecast: Forecast,
    expected: HashMap<u32, Expectation>,
    /// Models that wait for this device, the first to be served first.
    awaited: Vec<u32>,
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
            forecast: Forecast::new(),
            expected: HashMap::new(),
            awaited: Vec::new(),
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
        let exposure = if self.parts.exposure {
            marginal_exposure(load_seconds, prompts)
        } else {
            vec![1.0; load_seconds.len()]
        };
        let mean = slots.iter().map(|&slot| device.slots[slot as usize].bytes).sum::<u64>() as f64
            / slots.len() as f64;
        for ((&slot, &load), &exposure) in slots.iter().zip(load_seconds).zip(&exposure) {
            let bytes = device.slots[slot as usize].bytes as f64;
            let per_byte = if self.parts.per_byte { 1.0 } else { bytes / mean };
            let seconds = load * exposure.max(LEAST_EXPOSURE) * per_byte;
            self.retention.apply(Event::Appraised { tensor: Self::key(slot), seconds });
        }
    }

    /// The model is forgotten; these slots were only its.
    pub(crate) fn forget(&mut self, model: u32, slots: &[u32]) {
        self.expected.remove(&model);
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
            self.expected.entry(model).or_default().boost = boost;
            self.tell(device, model, slots);
        } else if self.parts.forecast {
            self.forecast.observe(model);
            self.refresh(device);
        }
    }

    fn refresh(&mut self, device: &Device) {
        for index in 0..self.forecast.watched().len() {
            let model = self.forecast.watched()[index];
            let Some(slots) = device.slots_of(model) else { continue };
            let boost = self.forecast.boost(model);
            let expectation = self.expected.entry(model).or_default();
            if (boost - expectation.boost).abs() >= COARSENESS {
                expectation.boost = boost;
                self.tell(device, model, slots);
            }
        }
    }

    /// These models wait for the device now, the first to be served first.
    pub(crate) fn await_models(&mut self, device: &Device, models: &[u32]) {
        if self.awaited == models {
            return;
        }
        let before = std::mem::replace(&mut self.awaited, models.to_vec());
        for &model in before.iter().filter(|model| !models.contains(model)) {
            self.set_awaited(device, model, 0.0);
        }
        for (index, &model) in models.iter().enumerate() {
            self.set_awaited(device, model, AWAITED - 2.0 * index as f64);
        }
    }

    fn set_awaited(&mut self, device: &Device, model: u32, awaited: f64) {
        let Some(slots) = device.slots_of(model) else { return };
        let expectation = self.expected.entry(model).or_default();
        if expectation.awaited != awaited {
            expectation.awaited = awaited;
            self.tell(device, model, slots);
        }
    }

    /// Another device has used the model since, or this one does again.
    pub(crate) fn set_elsewhere(&mut self, device: &Device, model: u32, elsewhere: bool) {
        let Some(slots) = device.slots_of(model) else { return };
        let expectation = self.expected.entry(model).or_default();
        if expectation.elsewhere != elsewhere {
            expectation.elsewhere = elsewhere;
            self.tell(device, model, slots);
        }
    }

    /// Whether a request for the model waits for this device.
    pub(crate) fn awaits(&self, model: u32) -> bool {
        self.awaited.contains(&model)
    }

    fn tell(&mut self, device: &Device, model: u32, slots: &[u32]) {
        let Expectation { boost, awaited, elsewhere } =
            self.expected.get(&model).copied().unwrap_or_default();
        let second = if elsewhere { SECOND_COPY } else { 0.0 };
        for &slot in slots {
            // A group of several models is used whenever one of them is; what is expected of one says little about it.
            let own = device.slots[slot as usize].models == 1 || self.parts.oracle;
            let log2 = awaited + if own { boost + second } else { boost.max(0.0) };
            self.retention.apply(Event::Expected { tensor: Self::key(slot), log2 });
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
