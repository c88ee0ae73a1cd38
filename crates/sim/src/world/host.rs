//! Host memory under ours, where it is limited: what comes from it, what it keeps, and what the devices are told of that.

use super::World;
use crate::host::Changes;

impl World<'_> {
    /// The node of a device.
    fn node(&self, d: usize) -> usize {
        d / self.scenario.profile.devices_per_node
    }

    /// Bytes per second at which a model's groups come to a device on average; `None` without such host memory.
    pub(super) fn tier_bytes_per_second(&self, model: u32, device: u32) -> Option<f64> {
        let tier = self.tiers.get(self.node(device as usize))?;
        let (mut all, mut hosted) = (0, 0);
        for &(content, bytes) in &self.models[model as usize].groups {
            all += bytes;
            hosted += if tier.has(content) { bytes } else { 0 };
        }
        let share = hosted as f64 / (all as f64).max(1.0);
        let link = self.scenario.profile.link.bytes_per_second;
        Some(1.0 / (share / link + (1.0 - share) / self.disk_bytes_per_second()))
    }

    /// Bytes per second at which one group comes to device `d`, if its model comes at `rate`.
    pub(super) fn group_bytes_per_second(&self, d: usize, slot: u32, rate: f64) -> f64 {
        match self.tiers.get(self.node(d)) {
            None => rate,
            Some(tier) if tier.has(self.devices[d].slots[slot as usize].content) => {
                self.scenario.profile.link.bytes_per_second
            }
            Some(_) => self.disk_bytes_per_second(),
        }
    }

    /// A request on device `d` uses these groups.
    pub(super) fn use_in_tier(&mut self, d: usize, slots: &[u32], now: f64) {
        let node = self.node(d);
        let Some(tier) = self.tiers.get_mut(node) else { return };
        for &slot in slots {
            let found = self.devices[d].is_here(slot);
            let slot = self.devices[d].slots[slot as usize];
            tier.used(slot.content, slot.bytes, found, now);
        }
    }

    /// The model of these groups is new on device `d`, which is told what host memory has of it.
    pub(super) fn tell_hosted(&mut self, d: usize, slots: &[u32]) {
        let node = self.node(d);
        let (Some(tier), Some(economy)) = (self.tiers.get(node), self.economies.get_mut(d)) else { return };
        for &slot in slots {
            economy.hosted(slot, tier.has(self.devices[d].slots[slot as usize].content));
        }
    }

    /// A group leaves device `d`.
    pub(super) fn leave(&mut self, d: usize, slot: u32) {
        let (node, content) = (self.node(d), self.devices[d].slots[slot as usize].content);
        if let Some(tier) = self.tiers.get_mut(node) {
            tier.left(content);
        }
    }

    /// A group comes to device `d`: from host memory, or from disk, and then it may stay in host memory.
    pub(super) fn bring(&mut self, d: usize, slot: u32) {
        let (node, content) = (self.node(d), self.devices[d].slots[slot as usize].content);
        let Some(tier) = self.tiers.get_mut(node) else { return };
        if tier.has(content) {
            return;
        }
        let Changes { kept, dropped } = tier.read(content);
        let per_node = self.scenario.profile.devices_per_node;
        let devices = node * per_node..((node + 1) * per_node).min(self.devices.len());
        for (content, hosted) in
            kept.into_iter().map(|kept| (kept, true)).chain(dropped.into_iter().map(|gone| (gone, false)))
        {
            for d in devices.clone() {
                if let Some(slot) = self.devices[d].slot_of(content) {
                    self.economies[d].hosted(slot, hosted);
                }
            }
        }
    }
}
