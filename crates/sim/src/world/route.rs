//! Which waiting request starts where.

use std::time::Instant;

use tangram_policy::placement::{
    Candidate, DAMAGE_WEIGHT, Placement, Startable, Tenant, crowding, next_to_start, place,
};
use tangram_policy::stall::{Stage, predict};

use super::{Event, Pending, World};
use crate::system::Route;
use crate::trace::{nanos, seconds};

/// Waiting requests that are looked at. The authors' number is 8; ours sees further because it groups by model.
const WINDOW_JOINT: usize = 8;
const WINDOW_OURS: usize = 32;

/// Up to so many devices all of them are candidates; in larger clusters those that had the model lately and a few idle
/// ones.
const ALL_DEVICES: usize = 16;
const IDLE_CANDIDATES: usize = 4;

/// Models for which a device prefetches ahead of the queue.
const AWAITED: usize = 3;

/// Weight of the value lost in LayerWeave's score, and the authors' bounds on waiting.
const JOINT_WEIGHT: f64 = 0.1;
const JOINT_WAIT: f64 = 0.150;
const JOINT_HYSTERESIS: f64 = 0.025;

/// The value lost counts within ± so many seconds in LayerWeave's score.
const JOINT_CLAMP: f64 = 0.1;

impl World<'_> {
    /// Starts what can start.
    pub(super) fn dispatch(&mut self) {
        loop {
            let began = Instant::now();
            let choice = if self.pending.is_empty() || self.idle.is_empty() {
                None
            } else {
                match self.system.route {
                    Route::MostResident => self.first(|world, model, device| {
                        world.devices[device as usize].resident_of(model) as f64
                    }),
                    Route::Locality => self.first(|world, model, device| {
                        let missing = world.models[model as usize].weight_bytes
                            - world.devices[device as usize].resident_of(model);
                        -(missing as f64) / world.bytes_per_second(model, device)
                    }),
                    Route::Joint => self.joint(),
                    Route::Predicted => self.predicted(),
                }
            };
            self.spent(began);
            let Some((position, device)) = choice else { break };
            for pending in self.pending.iter_mut().take(position) {
                pending.overtaken += 1;
            }
            if let Some(pending) = self.pending.remove(position) {
                self.start(pending.request, device);
            }
        }
        if self.system.prefetch {
            self.announce();
        }
    }

    fn waited(&self, request: u32) -> f64 {
        seconds(self.now - self.request(request).arrival.min(self.now))
    }

    /// Devices that a request for the model is considered for.
    fn candidates(&self, model: u32) -> Vec<u32> {
        let count = self.devices.len() as u32;
        if count as usize <= ALL_DEVICES {
            return (0..count).collect();
        }
        let mut candidates = self.models[model as usize].devices.clone();
        // The idle ones from a place that moves on, so that load spreads.
        let from = (self.sequence % u64::from(count)) as u32;
        let idle = self.idle.range(from..).chain(self.idle.range(..from)).copied();
        for device in idle.take(IDLE_CANDIDATES) {
            if !candidates.contains(&device) {
                candidates.push(device);
            }
        }
        candidates
    }

    /// First come, first served, on the idle device with the best score; of equals the one with most free bytes, then
    /// the lowest number.
    fn first(&self, score: impl Fn(&Self, u32, u32) -> f64) -> Option<(usize, u32)> {
        let model = self.request(self.pending.front()?.request).model;
        let idle = self.candidates(model).into_iter().filter(|device| self.idle.contains(device));
        let rank = |device: &u32| (score(self, model, *device), self.devices[*device as usize].free_bytes());
        let best = idle
            .map(|device| (rank(&device), device))
            .max_by(|(a, one), (b, other)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)).then(other.cmp(one)));
        best.map(|(_, device)| (0, device))
    }

    /// What starting the request on the device would cost when that is free, with what is there now: predicted stall in
    /// seconds, and the bytes that would have to go.
    fn predicted_cost(&self, request: u32, device_index: u32) -> (f64, u64) {
        let request = self.request(request);
        let known = &self.models[request.model as usize];
        let (prompt, _) = self.tokens(request);
        let profile = &self.scenario.profile;
        let compute = known.prefill_seconds(profile, prompt);
        let seconds_per_byte = 1.0 / self.bytes_per_second(request.model, device_index);
        let device = &self.devices[device_index as usize];
        let slots = device.slots_of(request.model);
        let mut missing = 0;
        let stage = |(index, &(_, bytes)): (usize, &(u32, u64))| {
            let here = slots.is_some_and(|slots| device.is_here(slots[index]));
            missing += if here { 0 } else { bytes };
            let load = profile.link.transfer_seconds + bytes as f64 * seconds_per_byte;
            Stage {
                load_seconds: if here { 0.0 } else { load },
                compute_seconds: known.shares[index] * compute,
            }
        };
        let start = self.now.max(device.running.map_or(0, |running| running.until));
        let busy = seconds(device.link_free.saturating_sub(start));
        let stall = predict(known.groups.iter().enumerate().map(stage), busy).stall;
        let shortage =
            (missing + self.kv_bytes(request)).saturating_sub(device.free_bytes() + device.kv_bytes);
        (stall, shortage)
    }

    /// LayerWeave: up to eight waiting requests in order; one is held back while a busy device is clearly better.
    fn joint(&mut self) -> Option<(usize, u32)> {
        for position in 0..self.pending.len().min(WINDOW_JOINT) {
            let request = self.pending[position].request;
            let model = self.request(request).model;
            // The best score and its device, of the busy ones and of the idle ones.
            let mut bests: [Option<(f64, u32)>; 2] = [None; 2];
            for device in self.candidates(model) {
                let (stall, shortage) = self.predicted_cost(request, device);
                let lost =
                    self.cheapest_suffixes(device as usize, model, shortage).map_or(0.0, |(_, cost)| cost);
                let score = self.wait(device) + stall + JOINT_WEIGHT * lost.clamp(-JOINT_CLAMP, JOINT_CLAMP);
                let best = &mut bests[usize::from(self.idle.contains(&device))];
                if best.is_none_or(|(best, _)| score < best) {
                    *best = Some((score, device));
                }
            }
            let [busy, Some((idle_score, device))] = bests else { continue };
            let waited = self.waited(request);
            let hold = busy.is_some_and(|(score, busy)| {
                score + JOINT_HYSTERESIS <= idle_score && self.wait(busy) <= JOINT_WAIT && waited < JOINT_WAIT
            });
            if !hold {
                return Some((position, device));
            }
            self.come_back(request);
        }
        None
    }

    /// An event for the moment when the request will not be held back any longer.
    fn come_back(&mut self, request: u32) {
        let at = self.request(request).arrival + nanos(JOINT_WAIT);
        if at > self.now && self.retry.is_none_or(|retry| at < retry) {
            self.retry = Some(at);
            self.schedule(at, Event::Retry);
        }
    }

    fn tenant(&self, model: u32) -> Tenant {
        let known = &self.models[model as usize];
        Tenant {
            share: self.popularity.share(model, seconds(self.now)),
            felt_bytes: known.weight_bytes as f64
                - known.compute_seconds * self.scenario.profile.link.bytes_per_second,
        }
    }

    /// What the model's living on the device costs per use. In a large cluster only some devices are candidates, and
    /// there it is not asked: it would take longer than all the rest of the decision.
    fn crowding(&self, model: u32, device_index: u32) -> f64 {
        if self.devices.len() > ALL_DEVICES {
            return 0.0;
        }
        let device = &self.devices[device_index as usize];
        let lives_here = |&other: &u32| {
            other != model && self.models[other as usize].devices.first() == Some(&device_index)
        };
        let mut others: Vec<Tenant> =
            device.models().filter(lives_here).map(|other| self.tenant(other)).collect();
        others.sort_by(|a, b| b.share.total_cmp(&a.share));
        crowding(self.tenant(model), &others, device.pool_bytes, self.scenario.profile.link.bytes_per_second)
    }

    fn placement(&self, pending: Pending) -> Placement {
        let Pending { request, overtaken } = pending;
        let model = self.request(request).model;
        let now = seconds(self.now);
        let cost = |device| {
            let (stall, shortage) = self.predicted_cost(request, device);
            (self.wait(device), stall, shortage, device)
        };
        let mut costs: Vec<(f64, f64, u64, u32)> = self.candidates(model).into_iter().map(cost).collect();
        costs.sort_by(|a, b| (a.0 + a.1).total_cmp(&(b.0 + b.1)));
        let mut candidates: Vec<Candidate> = Vec::new();
        // Lowest cost so far of a busy device and of an idle one: the damage of what is dearer without it is not asked.
        let mut best = [f64::INFINITY; 2];
        for (wait, stall, shortage, device) in costs {
            let best = &mut best[usize::from(wait <= 0.0)];
            if wait + stall >= *best {
                continue;
            }
            let damage =
                self.economies[device as usize].damage(shortage, now, (*best - wait - stall) / DAMAGE_WEIGHT);
            let crowding = self.crowding(model, device);
            // Prompts are cut so that weights and KV fit on an empty device; nothing else stays while one runs.
            let candidate = Candidate { device, wait, stall, damage, crowding, fits: true };
            *best = best.min(candidate.cost_of_living());
            candidates.push(candidate);
        }
        place(&candidates, overtaken)
    }

    /// Ours: the cheapest of the waiting requests within the bounds on overtaking, on the device that costs least.
    fn predicted(&self) -> Option<(usize, u32)> {
        let window = if self.system.overtaking { WINDOW_OURS } else { 1 };
        let mut startable = Vec::new();
        let mut devices = Vec::new();
        // Requests for one model differ by little more than their prompts: the first speaks for all.
        let mut seen: Vec<u32> = Vec::new();
        for position in 0..self.pending.len().min(window) {
            let pending = self.pending[position];
            let model = self.request(pending.request).model;
            if seen.contains(&model) {
                continue;
            }
            seen.push(model);
            match self.placement(pending) {
                Placement::Start { device, cost } => {
                    startable.push(Startable { position, overtaken: pending.overtaken, cost });
                    devices.push(device);
                }
                // What it waits for ends, and then it is asked again.
                Placement::Wait { .. } | Placement::Never => {}
            }
        }
        let next = next_to_start(&startable)?;
        Some((startable[next].position, devices[next]))
    }

    /// Tells each device for which models requests wait that will probably go there.
    fn announce(&mut self) {
        let began = Instant::now();
        let mut awaited: Vec<(u32, Vec<u32>)> = Vec::new();
        for position in 0..self.pending.len().min(WINDOW_JOINT) {
            let pending = self.pending[position];
            let model = self.request(pending.request).model;
            let device = match self.placement(pending) {
                Placement::Start { device, .. } | Placement::Wait { device } => device,
                Placement::Never => continue,
            };
            match awaited.iter_mut().find(|(other, _)| *other == device) {
                Some((_, models)) if models.contains(&model) || models.len() == AWAITED => {}
                Some((_, models)) => models.push(model),
                None => awaited.push((device, vec![model])),
            }
        }
        let told = std::mem::take(&mut self.told);
        for &device in &told {
            if !awaited.iter().any(|(other, _)| *other == device) {
                self.economies[device as usize].await_models(&self.devices[device as usize], &[]);
            }
        }
        self.told = awaited.iter().map(|(device, _)| *device).collect();
        for (device, models) in &awaited {
            self.economies[*device as usize].await_models(&self.devices[*device as usize], models);
        }
        self.spent(began);
        for (device, _) in awaited {
            self.pump(device);
        }
    }
}
