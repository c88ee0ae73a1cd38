//! An idle link brings in what the economy wants most, into free memory or over what is worth clearly less.

use std::fmt::Write;
use std::time::Instant;

use tangram_policy::prefetch::BATCH_BYTES;

use super::{Event, World};
use crate::trace::seconds;

/// Wanted groups that are looked at before a device's link stays idle.
const TRIED: usize = 8;

/// A transfer can be given up between pieces of so many bytes.
const PIECE_BYTES: f64 = 16e6;

impl World<'_> {
    /// Starts the next prefetch on a device whose link is free; if it is busy, comes back when it is.
    pub(super) fn pump(&mut self, index: u32) {
        let d = index as usize;
        // Where the processor that computes also copies, a prefetch would take from what runs.
        let busy = self.scenario.profile.load_share > 0.0 && self.devices[d].running.is_some();
        if !self.system.prefetch || busy {
            return;
        }
        if self.devices[d].link_free > self.now {
            if !self.devices[d].link_event {
                self.devices[d].link_event = true;
                let at = self.devices[d].link_free;
                self.schedule(at, Event::Link(index));
            }
            return;
        }
        self.settle_fetch(index);
        let began = Instant::now();
        let chosen = self.choose_fetch(index);
        self.spent(began);
        let Some((slot, victims)) = chosen else { return };
        let evicted = self.evict_all(d, &victims);
        let device = &mut self.devices[d];
        let (bytes, loader) = (device.slots[slot as usize].bytes, device.slots[slot as usize].loader);
        let slots = &device.slots;
        // What computes now, and its KV, are walls.
        let moved = match &mut device.layout {
            Some(layout) => layout.place(&[slot], &[bytes], |other| slots[other as usize].holders == 0),
            None => Some(0),
        };
        self.totals.evicted_bytes += evicted;
        let Some(moved) = moved else { return };
        let rate = self.group_bytes_per_second(d, slot, self.bytes_per_second(loader, index));
        self.bring(d, slot);
        let profile = &self.scenario.profile;
        let copying = profile.link.transfer_seconds + bytes as f64 / rate;
        let at = self.after(copying + moved as f64 / profile.move_bytes_per_second);
        let device = &mut self.devices[d];
        device.slots[slot as usize].arriving = Some(at);
        device.resident_bytes += bytes;
        device.fetching = Some(slot);
        device.link_free = at;
        device.link_event = true;
        self.economies[d].fetched(slot);
        self.totals.fetched_bytes += bytes;
        self.totals.background_moved += moved;
        self.note(|log| {
            write!(log, "fetch device={index} slot={slot} bytes={bytes} evicted={evicted} moved={moved}")
        });
        self.schedule(at, Event::Link(index));
    }

    /// What to bring in, and what goes for it.
    fn choose_fetch(&self, index: u32) -> Option<(u32, Vec<u32>)> {
        let device = &self.devices[index as usize];
        let economy = self.economies.get(index as usize)?;
        for slot in economy.wanted().take(TRIED) {
            let entry = &device.slots[slot as usize];
            if !economy.awaits(entry.loader)
                && self.models[entry.loader as usize].devices.first() != Some(&index)
            {
                continue;
            }
            let needed = entry.bytes.saturating_sub(device.free_bytes());
            return Some((slot, economy.victims_for(device, slot, needed)?));
        }
        None
    }

    /// Gives up a prefetch under way on a device whose link a request needs for something else: what has arrived of it
    /// is lost, and the link is free after the piece that it is carrying.
    pub(super) fn cancel_fetch(&mut self, index: u32) {
        let profile = &self.scenario.profile;
        let device = &mut self.devices[index as usize];
        let rest = seconds(device.link_free.saturating_sub(self.now));
        if profile.load_share > 0.0 && rest * profile.link.bytes_per_second <= BATCH_BYTES as f64 {
            return;
        }
        let Some(slot) = device.fetching.take_if(|slot| device.slots[*slot as usize].holders == 0) else {
            return;
        };
        let bytes = device.slots[slot as usize].bytes;
        device.slots[slot as usize].arriving = None;
        device.resident_bytes -= bytes;
        if let Some(layout) = &mut device.layout {
            layout.remove(slot);
        }
        self.economies[index as usize].evicted(slot);
        self.totals.fetched_bytes -= bytes.min((rest * profile.link.bytes_per_second) as u64);
        let piece = self.after(rest.min(PIECE_BYTES / profile.link.bytes_per_second));
        self.devices[index as usize].link_free = piece;
        self.note(|log| write!(log, "give-up device={index} slot={slot}"));
    }

    /// Notes that a prefetched group has arrived, if it has.
    pub(super) fn settle_fetch(&mut self, index: u32) {
        let device = &mut self.devices[index as usize];
        let Some(slot) = device.fetching else { return };
        let entry = &mut device.slots[slot as usize];
        if entry.arriving.is_some_and(|at| at <= self.now) {
            entry.arriving = None;
            entry.resident = true;
            device.fetching = None;
            if entry.holders == 0
                && let Some(economy) = self.economies.get_mut(index as usize)
            {
                economy.idle(slot);
            }
        }
    }
}
