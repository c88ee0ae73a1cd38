//! Starting a request on a device: room, loads, and the time line of its forward pass.

use std::fmt::Write;
use std::time::Instant;

use tangram_policy::stall::{Link, Stage, predict_beside};

use super::{Event, HALF_LIFE_SECONDS, Host, LENGTHS, World};
use crate::device::Running;
use crate::report::Record;
use crate::system::Keep;
use crate::trace::{nanos, seconds};

impl World<'_> {
    /// Starts a pending request on an idle device.
    pub(super) fn start(&mut self, index: u32, device_index: u32) {
        let request = self.request(index);
        let (model, d) = (request.model, device_index as usize);
        let (prompt, output) = self.tokens(request);
        let now = seconds(self.now);
        self.settle_fetch(device_index);
        self.idle.remove(&device_index);
        self.sequence += 1;
        self.learn(model, prompt, device_index);

        // Everything of the model becomes wanted; what is not here is missing.
        let groups = std::mem::take(&mut self.models[model as usize].groups);
        let new_here = self.devices[d].use_model(model, &groups, self.sequence);
        self.models[model as usize].groups = groups;
        let slots: Vec<u32> = self.devices[d].slots_of(model).unwrap_or_default().to_vec();
        let began = Instant::now();
        self.use_in_tier(d, &slots, now);
        self.tell_economy(index, device_index, &slots, new_here);
        self.spent(began);
        if matches!(self.system.keep, Keep::Nothing | Keep::LastModel) {
            self.clear(d, model);
        }
        let device = &mut self.devices[d];
        let mut missing = Vec::new();
        for (&slot, order) in slots.iter().zip(0..) {
            let entry = &mut device.slots[slot as usize];
            entry.holders += 1;
            entry.loader = model;
            entry.last_use = self.sequence << 16 | self.system.order_in_pass(order);
            if !entry.resident && entry.arriving.is_none() {
                missing.push(slot);
            }
        }
        if !missing.is_empty() {
            self.cancel_fetch(device_index);
        }
        let device = &self.devices[d];
        let sizes: Vec<u64> = missing.iter().map(|&slot| device.slots[slot as usize].bytes).collect();
        let missing_bytes: u64 = sizes.iter().sum();
        let kv_bytes = self.kv_bytes(request);

        let began = Instant::now();
        let evicted = self.make_room(d, model, missing_bytes + kv_bytes);
        let device = &mut self.devices[d];
        let mut moved_bytes = 0;
        if let Some(layout) = &mut device.layout
            && !missing.is_empty()
        {
            // Nothing computes on this device now, so everything may move, what is arriving as soon as it is there.
            let placed = layout.place(&missing, &sizes, |_| true);
            debug_assert!(
                placed.is_some(),
                "the bytes are free, and without walls they can be brought together"
            );
            moved_bytes = placed.unwrap_or(0);
        }
        self.spent(began);
        let device = &mut self.devices[d];
        for &slot in &missing {
            device.slots[slot as usize].resident = true;
        }
        device.resident_bytes += missing_bytes;
        device.kv_bytes = kv_bytes;
        if let Some(layout) = &mut device.layout {
            layout.take_kv(kv_bytes);
        }

        // The link brings the missing groups in the order of the pass, after what it is busy with and after the moves.
        let rate = self.bytes_per_second(model, device_index);
        let rates: Vec<f64> = slots.iter().map(|&slot| self.group_bytes_per_second(d, slot, rate)).collect();
        missing.iter().for_each(|&slot| self.bring(d, slot));
        let profile = &self.scenario.profile;
        let device = &self.devices[d];
        let link_start = if missing.is_empty() { now } else { now.max(seconds(device.link_free)) }
            + moved_bytes as f64 / profile.move_bytes_per_second;
        let known = &self.models[model as usize];
        let compute = known.prefill_seconds(profile, prompt);
        let (mut link, mut done, mut ready) = (link_start, now, now);
        let mut next_missing = missing.iter().copied().peekable();
        for ((&slot, &share), rate) in slots.iter().zip(&known.shares).zip(&rates) {
            let entry = &device.slots[slot as usize];
            if next_missing.next_if_eq(&slot).is_some() {
                link += profile.link.transfer_seconds + entry.bytes as f64 / rate;
                ready = link;
            } else if let Some(at) = entry.arriving {
                ready = ready.max(seconds(at));
            }
            if self.system.overlap {
                done = done.max(ready) + share * compute;
            }
        }
        if !self.system.overlap {
            done = ready + compute;
        } else if profile.load_share > 0.0 {
            let stages = slots.iter().zip(&known.shares).zip(&rates).map(|((slot, &share), rate)| {
                let bytes = device.slots[*slot as usize].bytes;
                let load = profile.link.transfer_seconds + bytes as f64 / rate;
                let load_seconds = if missing.contains(slot) { load } else { 0.0 };
                Stage { load_seconds, compute_seconds: share * compute }
            });
            let beside = predict_beside(stages, link_start - now, profile.load_share);
            done = done.max(now + beside.first_token());
        }
        let first_token = self.now + nanos(done - now);
        let decode = (output - 1) as f64 * known.prefill_seconds(profile, 1);
        let finish = first_token + nanos(decode);
        let record = Record {
            request: index,
            device: device_index,
            model,
            arrival: if self.scenario.closed_loop.is_some() { self.now } else { request.arrival },
            start: self.now,
            load: if missing.is_empty() { 0 } else { nanos(link - now) },
            stall: nanos((done - now - compute).max(0.0)),
            first_token,
            finish,
            weight_bytes: known.weight_bytes,
            loaded_bytes: missing_bytes,
            moved_bytes,
            thinking: std::mem::take(&mut self.totals.thinking),
        };
        self.totals.evicted_bytes += evicted;
        self.note(|log| {
            write!(
                log,
                "start request={index} device={device_index} model={model} missing={missing_bytes} evicted={evicted} \
                 moved={moved_bytes} stall={} first={first_token}",
                record.stall
            )
        });
        self.records.push(record);
        let link_free = self.now + nanos(link - now);
        let device = &mut self.devices[d];
        if !missing.is_empty() {
            device.link_free = link_free;
        }
        device.running = Some(Running { model, until: finish });
        self.keep_in_host(model, device_index);
        self.forget(d);
        self.schedule(finish, Event::Finish(device_index));
        self.pump(device_index);
    }

    /// Statistics that policies may use.
    fn learn(&mut self, model: u32, prompt: u64, device: u32) {
        let now = seconds(self.now);
        self.popularity.observe(model, now);
        let known = &mut self.models[model as usize];
        known.demand = known.demand * ((known.demand_at - now) / HALF_LIFE_SECONDS).exp2() + 1.0;
        known.demand_at = now;
        known.uses += 1;
        if known.lengths.len() == LENGTHS {
            known.lengths.pop_front();
        }
        known.lengths.push_back(prompt);
        let before = known.devices.first().copied().filter(|&before| before != device);
        known.devices.retain(|&other| other != device);
        known.devices.insert(0, device);
        known.devices.truncate(8);
        for (other, elsewhere) in before.map(|before| [(before, true), (device, false)]).into_iter().flatten()
        {
            if let Some(economy) = self.economies.get_mut(other as usize) {
                economy.set_elsewhere(&self.devices[other as usize], model, elsewhere);
            }
        }
    }

    fn tell_economy(&mut self, index: u32, device_index: u32, slots: &[u32], new_here: bool) {
        let model = self.request(index).model;
        let next_use = self.next_use(model, index);
        let now = seconds(self.now);
        let from_disk = self.disk_bytes_per_second();
        let node = device_index as usize / self.scenario.profile.devices_per_node;
        let tier = self.tiers.get_mut(node);
        let known = &mut self.models[model as usize];
        // Prompts are looked at again when there are four times as many.
        let appraise =
            new_here || known.uses.is_power_of_two() && known.uses.trailing_zeros().is_multiple_of(2);
        let device = &self.devices[device_index as usize];
        let Some(economy) = self.economies.get_mut(device_index as usize) else { return };
        if new_here {
            economy.catalogue(device, slots);
        }
        if appraise {
            let profile = &self.scenario.profile;
            let seconds = |&(_, bytes): &(u32, u64)| profile.link.seconds(bytes, 1);
            let load: Vec<f64> = known.groups.iter().map(seconds).collect();
            let disk = Link { bytes_per_second: from_disk, ..profile.link };
            let load_from_disk: Vec<f64> =
                known.groups.iter().map(|&(_, bytes)| disk.seconds(bytes, 1)).collect();
            let mut lengths: Vec<u64> = known.lengths.iter().copied().collect();
            lengths.sort_unstable();
            let median = lengths.get(lengths.len() / 2).copied().unwrap_or(1);
            known.compute_seconds = known.prefill_seconds(profile, median);
            let step = lengths.len().div_ceil(4);
            let prompt = |&tokens: &u64| {
                // What a load takes from computing hides nothing.
                let hiding = known.prefill_seconds(profile, tokens) * (1.0 - profile.load_share);
                (1.0, known.shares.iter().map(|share| share * hiding).collect())
            };
            let prompts: Vec<(f64, Vec<f64>)> =
                lengths.iter().skip(step / 2).step_by(step).map(prompt).collect();
            match tier {
                None => economy.appraise(device, slots, &load, &prompts),
                Some(tier) => {
                    let from_host = economy.exposed(device, slots, &load, &prompts);
                    let from_disk = economy.exposed(device, slots, &load_from_disk, &prompts);
                    economy.appraise_from_host(slots, &from_host);
                    economy.appraise(device, slots, &load_from_disk, &prompts);
                    for ((&slot, disk), host) in slots.iter().zip(from_disk).zip(from_host) {
                        tier.appraise(device.slots[slot as usize].content, disk, host);
                    }
                }
            }
        }
        economy.lease(device, model, slots, now, next_use);
        if new_here {
            self.tell_hosted(device_index as usize, slots);
        }
    }

    /// The model's checkpoint is in host memory from now on.
    fn keep_in_host(&mut self, model: u32, device: u32) {
        let Some(limit) = self.scenario.host_bytes.filter(|_| self.tiers.is_empty()) else { return };
        let bytes = |model: u32| self.models[model as usize].weight_bytes;
        let Host { bytes: used, last_use } =
            &mut self.hosts[device as usize / self.scenario.profile.devices_per_node];
        if last_use.insert(model, self.sequence).is_none() {
            *used += bytes(model);
        }
        while *used > limit && last_use.len() > 1 {
            let Some((&oldest, _)) = last_use.iter().min_by_key(|&(_, last)| *last) else { break };
            last_use.remove(&oldest);
            *used -= bytes(oldest);
        }
    }

    /// Lets the device forget a model of which it has nothing, if it knows too many.
    fn forget(&mut self, d: usize) {
        if let Some((model, slots)) = self.devices[d].forget_one() {
            self.models[model as usize].devices.retain(|&device| device as usize != d);
            if let Some(economy) = self.economies.get_mut(d) {
                economy.forget(model, &slots);
            }
        }
    }
}
