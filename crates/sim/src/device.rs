//! One simulated device: which tensor groups it holds, its link, its running request.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasherDefault, Hasher};

use crate::layout::Layout;
use crate::trace::Nanos;

/// Models that a device remembers; beyond, ones of which nothing is resident are forgotten, the least recent first.
const KNOWN_MODELS: usize = 48;

/// Hashes the dense numbers of models and contents: one multiplication (Knuth) instead of SipHash.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u32(u32::from(byte)));
    }

    fn write_u32(&mut self, number: u32) {
        let mixed = (self.0.rotate_left(32) ^ u64::from(number)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        self.0 = mixed ^ mixed >> 32;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Map by a dense number. Never iterated over.
type ByNumber<T> = HashMap<u32, T, BuildHasherDefault<NumberHasher>>;

/// A tensor group that the device knows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Slot {
    pub(crate) content: u32,
    pub(crate) bytes: u64,
    pub(crate) resident: bool,
    /// While it is being brought in by a prefetch: when it will be there.
    pub(crate) arriving: Option<Nanos>,
    /// Running requests that use it.
    pub(crate) holders: u32,
    /// Models known here that have it.
    pub(crate) models: u32,
    /// Model that loaded it last.
    pub(crate) loader: u32,
    /// Order of last uses.
    pub(crate) last_use: u64,
}

/// The request that a device runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Running {
    pub(crate) model: u32,
    pub(crate) until: Nanos,
}

/// A device.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) pool_bytes: u64,
    pub(crate) resident_bytes: u64,
    pub(crate) kv_bytes: u64,
    pub(crate) slots: Vec<Slot>,
    vacant: Vec<u32>,
    of_content: ByNumber<u32>,
    of_model: ByNumber<Box<[u32]>>,
    /// Models by their last use.
    recency: BTreeSet<(u64, u32)>,
    last_use: ByNumber<u64>,
    pub(crate) layout: Option<Layout>,
    pub(crate) running: Option<Running>,
    pub(crate) link_free: Nanos,
    /// Whether an event will come when the link is free.
    pub(crate) link_event: bool,
    /// The group that is being prefetched.
    pub(crate) fetching: Option<u32>,
}

impl Device {
    pub(crate) fn new(pool_bytes: u64, layout: Option<Layout>) -> Device {
        Device {
            pool_bytes,
            resident_bytes: 0,
            kv_bytes: 0,
            slots: Vec::new(),
            vacant: Vec::new(),
            of_content: ByNumber::default(),
            of_model: ByNumber::default(),
            recency: BTreeSet::new(),
            last_use: ByNumber::default(),
            layout,
            running: None,
            link_free: 0,
            link_event: false,
            fetching: None,
        }
    }

    /// The model's groups in the order of its forward pass, if the model is known here.
    pub(crate) fn slots_of(&self, model: u32) -> Option<&[u32]> {
        self.of_model.get(&model).map(|slots| &**slots)
    }

    /// The slot of a content, if it is known here.
    pub(crate) fn slot_of(&self, content: u32) -> Option<u32> {
        self.of_content.get(&content).copied()
    }

    /// Models known here, the least recently used first.
    pub(crate) fn models(&self) -> impl Iterator<Item = u32> {
        self.recency.iter().map(|&(_, model)| model)
    }

    /// Makes a model known and notes its use. Gives whether it is new here.
    pub(crate) fn use_model(&mut self, model: u32, groups: &[(u32, u64)], sequence: u64) -> bool {
        if let Some(last) = self.last_use.insert(model, sequence) {
            self.recency.remove(&(last, model));
        }
        self.recency.insert((sequence, model));
        if self.of_model.contains_key(&model) {
            return false;
        }
        let slots = groups.iter().map(|&(content, bytes)| {
            let slot = *self.of_content.entry(content).or_insert_with(|| {
                let slot = self.vacant.pop().unwrap_or(self.slots.len() as u32);
                if slot as usize == self.slots.len() {
                    self.slots.push(Slot::default());
                }
                self.slots[slot as usize] = Slot { content, bytes, ..Slot::default() };
                slot
            });
            self.slots[slot as usize].models += 1;
            slot
        });
        let slots = slots.collect();
        self.of_model.insert(model, slots);
        true
    }

    /// Forgets a model of which nothing is resident, if too many are known. Gives it and its slots that no other model
    /// here has.
    pub(crate) fn forget_one(&mut self) -> Option<(u32, Vec<u32>)> {
        if self.of_model.len() <= KNOWN_MODELS {
            return None;
        }
        let absent = |slot: &u32| {
            let slot = &self.slots[*slot as usize];
            !slot.resident && slot.arriving.is_none() && slot.holders == 0
        };
        let gone = |&&(_, model): &&(u64, u32)| self.of_model[&model].iter().all(absent);
        let &(last, model) = self.recency.iter().take(16).find(gone)?;
        self.recency.remove(&(last, model));
        self.last_use.remove(&model);
        let mut free = Vec::new();
        for &slot in self.of_model.remove(&model)?.iter() {
            let entry = &mut self.slots[slot as usize];
            entry.models -= 1;
            if entry.models == 0 {
                self.of_content.remove(&entry.content);
                self.vacant.push(slot);
                free.push(slot);
            }
        }
        Some((model, free))
    }

    /// Bytes of the model that are here or on their way.
    pub(crate) fn resident_of(&self, model: u32) -> u64 {
        let here = |slot: &&u32| self.is_here(**slot);
        let slots = self.slots_of(model).unwrap_or_default();
        slots.iter().filter(here).map(|&slot| self.slots[slot as usize].bytes).sum()
    }

    /// Whether the group is resident or on its way.
    pub(crate) fn is_here(&self, slot: u32) -> bool {
        let slot = &self.slots[slot as usize];
        slot.resident || slot.arriving.is_some()
    }

    /// Bytes neither weights nor KV have.
    pub(crate) fn free_bytes(&self) -> u64 {
        self.pool_bytes.saturating_sub(self.resident_bytes + self.kv_bytes)
    }

    /// Takes a group off the device. Gives its bytes.
    pub(crate) fn evict(&mut self, slot: u32) -> u64 {
        let entry = &mut self.slots[slot as usize];
        debug_assert!(entry.resident && entry.holders == 0, "only idle groups are evicted");
        entry.resident = false;
        self.resident_bytes -= entry.bytes;
        let bytes = entry.bytes;
        if let Some(layout) = &mut self.layout {
            layout.remove(slot);
        }
        bytes
    }

    /// Resident groups that nobody uses.
    pub(crate) fn idle_slots(&self) -> impl Iterator<Item = u32> {
        let idle = |&slot: &u32| {
            let slot = &self.slots[slot as usize];
            slot.resident && slot.holders == 0
        };
        (0..self.slots.len() as u32).filter(idle)
    }
}
