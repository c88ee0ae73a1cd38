//! The pool: catalogue of tensors by content, activation, eviction, and the accounts.
//!
//! Everything that is decided is decided by [`Retention`]; this file carries it out and must not rank anything itself.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use tangram_checkpoint::ContentId;
use tangram_device::{DeviceError, Extent, Memory};
use tangram_policy::eviction::{self, Candidate};
use tangram_policy::{Baseline, Baselines, Event, Retention, TensorKey};

use crate::host::HostTier;
use crate::paged::Paged;
use crate::prefix::PublishedBlock;
use crate::room::{Backend, Home, KvReserve, KvSpace, Place, Room};
use crate::segment::Segment;
use crate::tensor::{LoadFailure, Tensor, Vacancy};

/// A tensor as the catalogue knows it.
#[derive(Clone, Debug)]
pub struct CatalogueEntry {
    /// Identity of the content.
    pub id: ContentId,
    /// Checkpoint whose data file has the bytes.
    pub checkpoint: String,
    /// Offset in that file and in the arena that mirrors it, bytes.
    pub offset: u64,
    /// Size, bytes.
    pub bytes: u64,
    /// Place in the model's forward pass, 0 (first) to 1 (last).
    pub depth: f64,
}

/// Pages of `page_bytes` that tensors at these places (checkpoint, offset, bytes) take when all of them are resident
/// and nothing else is.
pub fn pages_alone<'a>(tensors: impl Iterator<Item = (&'a str, u64, u64)>, page_bytes: u64) -> u64 {
    let mut pages = BTreeSet::new();
    for (checkpoint, offset, bytes) in tensors {
        pages.extend(
            (offset / page_bytes..(offset + bytes).div_ceil(page_bytes)).map(|page| (checkpoint, page)),
        );
    }
    pages.len() as u64
}

/// The request cannot be met now: what is leased leaves too little room, or (`needed` is 0) the loader still holds the
/// room of a tensor that was given up. Nothing was changed; it may work when a lease or a load has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// Bytes needed.
    pub needed: u64,
    /// Bytes free, and bytes that evicting everything idle would free. They may exceed `needed` where they lie in pieces
    /// between leased tensors.
    pub available: u64,
}

impl Shortage {
    pub(crate) const NOTHING: Shortage = Shortage { needed: 0, available: 0 };
}

/// Why room was not given.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// There is too little now; waiting for others to end may help.
    #[error("{} bytes of device memory are needed, {} are free or idle", .0.needed, .0.available)]
    Short(Shortage),
    /// The device does not do it: more mappings than the system allows, say, or a tensor that reaches beyond its file.
    /// Waiting does not help, so the request must end.
    #[error(transparent)]
    Device(DeviceError),
}

impl From<Shortage> for Refusal {
    fn from(shortage: Shortage) -> Refusal {
        Refusal::Short(shortage)
    }
}

pub(crate) struct Slot {
    id: ContentId,
    pub(crate) checkpoint: String,
    /// Place in its address range, bytes. In a segment it changes, and says nothing while the tensor is absent.
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
    /// Models that have it.
    pub(crate) models: u32,
    /// Leases on it.
    pub(crate) leases: u32,
    place: Place,
    /// Whether its bytes could not be read, so that trying again is for a request to do.
    pub(crate) damaged: bool,
    pub(crate) tensor: Option<Arc<Tensor>>,
}

/// The right to use a set of tensors. Give it back with [`Pool::release`].
#[derive(Debug, Default)]
pub struct Lease {
    tensors: Vec<Arc<Tensor>>,
}

impl Lease {
    pub(crate) fn push(&mut self, tensor: Arc<Tensor>) {
        self.tensors.push(tensor);
    }

    /// The tensors, in the order of the keys that were asked for.
    pub fn tensors(&self) -> &[Arc<Tensor>] {
        &self.tensors
    }

    /// Keeps the first `at` tensors (at most all) and gives the right to the others away: what was leased together can
    /// end apart.
    pub fn split_off(&mut self, at: usize) -> Lease {
        Lease { tensors: self.tensors.split_off(at.min(self.tensors.len())) }
    }
}

/// What an activation gives.
#[derive(Debug)]
pub struct Activation {
    /// The right to use the tensors.
    pub lease: Lease,
    /// Room for those that have to be brought in, in the order of the keys.
    pub missing: Vec<Vacancy>,
    /// Bytes of `missing`.
    pub bytes_loaded: u64,
    /// Bytes that were resident or already on their way.
    pub bytes_reused: u64,
}

/// What a recorded pool has been through: enough to replay every decision.
#[derive(Clone, Debug, PartialEq)]
pub enum Logged {
    /// The policy learned something.
    Learned(Event),
    /// The policy was asked for room.
    Asked {
        /// Bytes wanted.
        shortage: u64,
        /// What it chose to evict.
        victims: Vec<TensorKey>,
    },
    /// The policy was asked what may go for a tensor that nobody has asked for.
    AskedFor {
        /// Which tensor.
        tensor: TensorKey,
        /// Bytes wanted.
        shortage: u64,
        /// What it chose to evict.
        victims: Vec<TensorKey>,
    },
}

/// Accounts of the pool, all in bytes unless named otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Tensors that have room on the device, arrived or arriving.
    pub resident_bytes: u64,
    /// Of these, leased.
    pub leased_bytes: u64,
    /// KV blocks in use.
    pub kv_bytes: u64,
    /// Number of KV blocks in use.
    pub kv_blocks: u64,
    /// KV blocks that no sequence uses, kept as cached prefixes.
    pub kv_cached_bytes: u64,
    /// Brought in for requests since the start.
    pub loaded_total: u64,
    /// Brought in before anybody asked, since the start.
    pub fetched_total: u64,
    /// Of both, from copies in host memory.
    pub from_host_total: u64,
    /// Found resident since the start.
    pub reused_total: u64,
    /// Evicted since the start.
    pub evicted_total: u64,
    /// Moved inside the device since the start, to make room.
    pub moved_total: u64,
}

/// One device's memory as a cache of tensors.
pub struct Pool {
    pub(crate) memory: Arc<Memory>,
    pub(crate) retention: Retention,
    pub(crate) room: Room,
    pub(crate) slots: Vec<Option<Slot>>,
    pub(crate) vacant_keys: Vec<TensorKey>,
    by_id: HashMap<ContentId, TensorKey>,
    /// Tensors without a lease that are not evictable yet: still arriving, or just being let go by the loader.
    unsettled: Vec<TensorKey>,
    pub(crate) kv: Vec<Option<KvSpace>>,
    pub(crate) published: HashMap<TensorKey, PublishedBlock>,
    /// Copies of tensors in host memory, where that is not the device's own.
    pub(crate) host: Option<HostTier>,
    /// Rules that decide in the policy's place, in measurements.
    baseline: Option<Baselines>,
    pub(crate) stats: PoolStats,
    log: Option<Vec<Logged>>,
}

impl Pool {
    /// An empty pool over all of `memory`, which nobody else may use.
    ///
    /// # Errors
    /// When the device refuses to map a segment.
    pub fn new(memory: Arc<Memory>, backend: Backend) -> Result<Pool, DeviceError> {
        let room = match backend {
            Backend::Paged => Room::Paged(Paged::new(memory.clone())),
            Backend::Segment => Room::Segment(Box::new(Segment::new(memory.clone())?)),
        };
        Ok(Pool {
            memory,
            retention: Retention::new(),
            room,
            slots: Vec::new(),
            vacant_keys: Vec::new(),
            by_id: HashMap::new(),
            unsettled: Vec::new(),
            kv: Vec::new(),
            published: HashMap::new(),
            host: None,
            baseline: None,
            stats: PoolStats::default(),
            log: None,
        })
    }

    /// Keeps by this rule instead of by worth, for measurements; a segment is then packed as published. To be called before
    /// anything is catalogued.
    pub fn keep_by(&mut self, rule: Baseline) {
        self.baseline = Some(Baselines::new(rule));
        if let Room::Segment(segment) = &mut self.room {
            segment.pack_as_published();
        }
    }

    /// Records every event from now on, so that a test can replay the decisions.
    pub fn record_events(&mut self) {
        self.log = Some(Vec::new());
    }

    /// The recorded events.
    pub fn events(&self) -> &[Logged] {
        self.log.as_deref().unwrap_or_default()
    }

    /// The accounts.
    pub fn stats(&self) -> PoolStats {
        self.stats
    }

    /// Takes the place of another pool with these accounts, whose totals go on.
    pub fn succeed(&mut self, other: PoolStats) {
        let stats = &mut self.stats;
        stats.loaded_total += other.loaded_total;
        stats.fetched_total += other.fetched_total;
        stats.from_host_total += other.from_host_total;
        stats.reused_total += other.reused_total;
        stats.evicted_total += other.evicted_total;
        stats.moved_total += other.moved_total;
    }

    /// How it is laid out.
    pub fn backend(&self) -> Backend {
        match &self.room {
            Room::Paged(_) => Backend::Paged,
            Room::Segment(_) => Backend::Segment,
        }
    }

    /// Bytes that nothing lies in: of free pages, or of the holes of a segment.
    pub fn free_bytes(&self) -> u64 {
        match &self.room {
            Room::Paged(_) => (self.memory.free_pages() * self.memory.page_bytes()) as u64,
            Room::Segment(segment) => segment.free_bytes() as u64,
        }
    }

    /// The device's memory.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Moves a tensor or a published block in the accounts.
    pub(crate) fn set_place(&mut self, key: TensorKey, to: Place) {
        if let Some(Some(slot)) = self.slots.get_mut(key.0 as usize) {
            let from = std::mem::replace(&mut slot.place, to);
            let home = Home::Checkpoint(&slot.checkpoint);
            self.room.change(home, (slot.offset, slot.bytes), Some(key), from, to);
        } else if let Some(block) = self.published.get_mut(&key) {
            let from = std::mem::replace(&mut block.place, to);
            let span = (block.extent.offset(), block.extent.len());
            self.room.change(Home::Kv(block.kv), span, Some(key), from, to);
        }
    }

    pub(crate) fn apply(&mut self, event: Event) {
        match event {
            Event::Leased { tensor, .. } | Event::Fetched { tensor } => self.set_place(tensor, Place::Pinned),
            Event::Idle { tensor } => self.set_place(tensor, Place::Idle),
            Event::Evicted { tensor } => self.set_place(tensor, Place::Absent),
            _ => {}
        }
        if let Some(log) = &mut self.log {
            log.push(Logged::Learned(event));
        }
        self.retention.apply(event);
        self.tell_host(event);
    }

    /// A key that nothing has. Goes back by `vacant_keys`.
    pub(crate) fn new_key(&mut self) -> TensorKey {
        let key = self.vacant_keys.pop().unwrap_or(TensorKey(self.slots.len() as u32));
        if key.0 as usize == self.slots.len() {
            self.slots.push(None);
        }
        key
    }

    pub(crate) fn slot(&self, key: TensorKey) -> Option<&Slot> {
        self.slots.get(key.0 as usize)?.as_ref()
    }

    pub(crate) fn slot_mut(&mut self, key: TensorKey) -> Option<&mut Slot> {
        self.slots.get_mut(key.0 as usize)?.as_mut()
    }

    /// Makes the tensors of one more model known, and their checkpoints' files (`data_bytes` gives their sizes).
    /// Takes no device memory. `entries` must not name a content twice.
    ///
    /// # Errors
    /// When address space for a checkpoint is not to be had; nothing is catalogued then.
    pub fn catalogue(
        &mut self,
        entries: &[CatalogueEntry],
        data_bytes: impl Fn(&str) -> u64,
    ) -> Result<Vec<TensorKey>, DeviceError> {
        let new = || entries.iter().filter(|entry| !self.by_id.contains_key(&entry.id));
        for (done, entry) in new().enumerate() {
            let bytes = || data_bytes(&entry.checkpoint);
            if let Err(error) = self.room.add_tensor(&entry.checkpoint, bytes) {
                new().take(done).for_each(|entry| self.room.remove_tensor(&entry.checkpoint));
                return Err(error);
            }
        }
        let mut keys = Vec::with_capacity(entries.len());
        for entry in entries {
            let key = match self.by_id.get(&entry.id) {
                Some(&key) => key,
                None => {
                    let key = self.new_key();
                    self.slots[key.0 as usize] = Some(Slot {
                        id: entry.id,
                        checkpoint: entry.checkpoint.clone(),
                        offset: entry.offset as usize,
                        bytes: entry.bytes as usize,
                        models: 0,
                        leases: 0,
                        place: Place::Absent,
                        damaged: false,
                        tensor: None,
                    });
                    self.by_id.insert(entry.id, key);
                    key
                }
            };
            if let Some(slot) = self.slot_mut(key) {
                slot.models += 1;
            }
            self.apply(Event::Catalogued { tensor: key, bytes: entry.bytes, depth: entry.depth });
            self.note_stand_in(key);
            keys.push(key);
        }
        if let Some(baseline) = &mut self.baseline {
            let tensors: Vec<(TensorKey, u64)> =
                keys.iter().copied().zip(entries.iter().map(|entry| entry.bytes)).collect();
            baseline.catalogue(&tensors);
        }
        Ok(keys)
    }

    /// Contents that were catalogued under identities that stood for their own (first of each pair) get their own
    /// (second), and keep what they have on the device. One whose own is catalogued already stays what it is: it goes with
    /// the model that brought it.
    pub fn identify(&mut self, pairs: &[(ContentId, ContentId)]) {
        for &(stand_in, own) in pairs {
            if self.by_id.contains_key(&own) {
                continue;
            }
            if let Some(key) = self.by_id.remove(&stand_in) {
                self.by_id.insert(own, key);
                if let Some(slot) = self.slot_mut(key) {
                    slot.id = own;
                }
            }
        }
    }

    /// One model with these tensors is gone. Tensors that no model has any more leave the device, and their place in
    /// the address space is given up. The model must hold no lease.
    pub fn forget(&mut self, keys: &[TensorKey]) {
        self.settle();
        let mut freed = Vec::new();
        for &key in keys {
            let Some(slot) = self.slot_mut(key) else { continue };
            slot.models -= 1;
            if slot.models > 0 || slot.leases > 0 {
                continue;
            }
            // A tensor that is still arriving for nobody stays catalogued until it has settled; see `settle`.
            if !self.unsettled.contains(&key) {
                self.evict(key, &mut freed);
                self.forget_if_unused(key);
            }
        }
        Extent::release_all(freed);
    }

    fn forget_if_unused(&mut self, key: TensorKey) {
        if !self.slot(key).is_some_and(|slot| slot.models == 0 && slot.tensor.is_none()) {
            return;
        }
        let Some(slot) = self.slots[key.0 as usize].take() else { return };
        self.apply(Event::Forgotten { tensor: key });
        self.by_id.remove(&slot.id);
        self.vacant_keys.push(key);
        self.room.remove_tensor(&slot.checkpoint);
    }

    /// Bytes of these tensors that are on the device, arrived or arriving.
    pub fn resident_bytes(&self, keys: &[TensorKey]) -> u64 {
        let resident = |key: &TensorKey| {
            self.slot(*key).filter(|slot| slot.tensor.is_some()).map_or(0, |slot| slot.bytes as u64)
        };
        keys.iter().map(resident).sum()
    }

    /// Bytes of these tensors that more than one catalogued model has.
    pub fn shared_bytes(&self, keys: &[TensorKey]) -> u64 {
        let shared = |key: &TensorKey| {
            self.slot(*key).filter(|slot| slot.models > 1).map_or(0, |slot| slot.bytes as u64)
        };
        keys.iter().map(shared).sum()
    }

    /// Leases all of these tensors (no key twice): resident ones at once, ones that are arriving by joining, missing
    /// ones by making room for them, evicting what is worth least. Room for `reserve`, the KV that this request and
    /// others will take, must be free or evictable beside them. `now` is in seconds.
    ///
    /// # Errors
    /// [`Refusal::Short`] when even evicting everything idle would not make enough room; [`Refusal::Device`] when the
    /// device refuses.
    pub fn activate(
        &mut self,
        keys: &[TensorKey],
        reserve: &[KvReserve],
        now: f64,
    ) -> Result<Activation, Refusal> {
        self.settle();
        let (mut missing, mut own_idle) = (Vec::new(), Vec::new());
        for &key in keys {
            match self.slot(key) {
                Some(Slot { tensor: None, .. }) => missing.push(key),
                Some(Slot { place: Place::Idle, .. }) => own_idle.push(key),
                _ => {}
            }
        }
        own_idle.sort_unstable();
        match self.room {
            Room::Paged(_) => self.check_paged(&missing, &own_idle, reserve),
            Room::Segment(_) => self.check_segment(&missing, &own_idle, reserve),
        }?;
        // All are joined before a lease is counted, so that a refusal leaves no trace here either. And no handle to
        // what was idle is given out before it lies where it will stay.
        let mut joined = Vec::with_capacity(keys.len());
        for &key in keys {
            match self.slot(key).map(|slot| slot.tensor.as_ref()) {
                Some(None) => {}
                Some(Some(tensor)) if tensor.join() => joined.push(key),
                _ => {
                    // Given up a moment ago, but the loader has not let go of its room yet.
                    let tensors = joined.iter().filter_map(|&key| self.slot(key)?.tensor.as_ref());
                    tensors.for_each(|tensor| tensor.leave());
                    return Err(Shortage::NOTHING.into());
                }
            }
        }
        joined.iter().for_each(|&key| self.count_lease(key, now));
        let placed = match self.room {
            Room::Paged(_) => self.place_paged(&missing),
            Room::Segment(_) => self.place_segment(&missing, &own_idle, reserve),
        };
        let mut extents = match placed {
            Ok(extents) => extents,
            Err(refusal) => {
                let tensors = joined.iter().filter_map(|&key| self.slot(key)?.tensor.clone()).collect();
                self.release_all(tensors);
                return Err(refusal);
            }
        };
        let mut vacancies = Vec::with_capacity(missing.len());
        let mut tensors = Vec::with_capacity(keys.len());
        let (mut bytes_loaded, mut bytes_reused) = (0, 0);
        for &key in keys {
            if let Some(tensor) = self.slot(key).and_then(|slot| slot.tensor.clone()) {
                bytes_reused += tensor.len() as u64;
                tensors.push(tensor);
            } else if let Some(extent) = extents.remove(&key) {
                bytes_loaded += extent.len() as u64;
                let vacancy = Vacancy::new(key, extent);
                let tensor = vacancy.tensor().clone();
                if let Some(slot) = self.slot_mut(key) {
                    slot.tensor = Some(tensor.clone());
                    slot.leases = 1;
                    slot.damaged = false;
                }
                self.stats.resident_bytes += tensor.len() as u64;
                self.stats.leased_bytes += tensor.len() as u64;
                self.apply(Event::Leased { tensor: key, at: now });
                tensors.push(tensor);
                vacancies.push(vacancy);
            }
        }
        self.supply(&mut vacancies);
        self.stats.loaded_total += bytes_loaded;
        self.stats.reused_total += bytes_reused;
        if let Some((baseline, &first)) = self.baseline.as_mut().zip(keys.first()) {
            baseline.used(first);
        }
        Ok(Activation { lease: Lease { tensors }, missing: vacancies, bytes_loaded, bytes_reused })
    }

    /// Counts one more use of leased tensors, for a request that joins an active model.
    pub fn used_again(&mut self, lease: &Lease, now: f64) {
        for tensor in &lease.tensors {
            self.stats.reused_total += tensor.len() as u64;
            self.apply(Event::Used { tensor: tensor.key(), at: now });
        }
    }

    /// Counts a lease on a tensor that has been joined.
    fn count_lease(&mut self, key: TensorKey, now: f64) {
        let Some(slot) = self.slot_mut(key) else { return };
        let bytes = slot.bytes as u64;
        slot.leases += 1;
        if slot.leases == 1 {
            self.stats.leased_bytes += bytes;
            self.unsettled.retain(|&unsettled| unsettled != key);
            self.apply(Event::Leased { tensor: key, at: now });
        } else {
            self.apply(Event::Used { tensor: key, at: now });
        }
    }

    /// Ends a lease. Tensors without any lease stay until their room is needed; ones that are still arriving and that
    /// nobody wants now are given up.
    pub fn release(&mut self, lease: Lease) {
        self.release_all(lease.tensors);
    }

    fn release_all(&mut self, tensors: Vec<Arc<Tensor>>) {
        for tensor in tensors {
            let (key, len) = (tensor.key(), tensor.len() as u64);
            tensor.leave();
            drop(tensor);
            let Some(slot) = self.slot_mut(key) else { continue };
            slot.leases -= 1;
            if slot.leases == 0 {
                self.stats.leased_bytes -= len;
                self.unsettled.push(key);
            }
        }
        self.settle();
        if self.baseline.as_ref().is_some_and(Baselines::keeps_nothing) {
            self.evict_bytes(u64::MAX);
        }
    }

    /// Looks after tensors without a lease that were arriving when they lost it: those that arrived become evictable,
    /// those that failed or were given up are gone. Everything that makes room does this first; whoever goes on without
    /// that has to, or what was given up stays counted.
    pub fn settle(&mut self) {
        for key in std::mem::take(&mut self.unsettled) {
            let Some(tensor) = self.slot(key).and_then(|slot| slot.tensor.as_ref()) else { continue };
            // While the loader still holds the tensor its bytes are in flight, or it is just letting go.
            let alone = Arc::strong_count(tensor) == 1;
            let (ready, failed) = (tensor.is_ready(), tensor.failure().is_some());
            let damaged = matches!(tensor.failure(), Some(LoadFailure::Failed(_)));
            if ready && alone {
                self.apply(Event::Idle { tensor: key });
                if self.slot(key).is_some_and(|slot| slot.models == 0) {
                    let mut freed = Vec::new();
                    self.evict(key, &mut freed);
                    Extent::release_all(freed);
                    self.forget_if_unused(key);
                }
            } else if failed {
                if let Some(slot) = self.slot_mut(key) {
                    slot.tensor = None;
                    slot.damaged = damaged;
                    self.stats.resident_bytes -= self.slot(key).map_or(0, |slot| slot.bytes as u64);
                }
                self.apply(Event::Evicted { tensor: key });
                self.drop_failed_copy(key);
                self.forget_if_unused(key);
            } else {
                self.unsettled.push(key);
            }
        }
    }

    /// What could be evicted, least worth first.
    pub(crate) fn candidates(&self) -> impl Iterator<Item = Candidate> {
        self.retention.idle().filter_map(|tensor| {
            let log2_worth = self.retention.log2_worth(tensor)?;
            let block = self.published.get(&tensor).map(|block| block.extent.len());
            let bytes = block.or_else(|| self.slot(tensor).map(|slot| slot.bytes))? as u64;
            Some(Candidate { tensor, bytes, log2_worth })
        })
    }

    /// Evicts what the policy chooses, of at least `shortage` bytes together, or everything idle if that is less;
    /// `false` if there is nothing.
    pub(crate) fn evict_bytes(&mut self, shortage: u64) -> bool {
        let victims = match &self.baseline {
            None => eviction::choose(self.candidates(), shortage),
            Some(baseline) => {
                let idle = self.candidates().map(|candidate| (candidate.tensor, candidate.bytes));
                baseline.victims(idle, shortage)
            }
        };
        self.record(|| Logged::Asked { shortage, victims: victims.clone() });
        self.evict_all(victims)
    }

    pub(crate) fn record(&mut self, what: impl FnOnce() -> Logged) {
        if let Some(log) = &mut self.log {
            log.push(what());
        }
    }

    /// Evicts what was chosen; `false` if nothing was.
    pub(crate) fn evict_all(&mut self, victims: Vec<TensorKey>) -> bool {
        let mut freed = Vec::new();
        for victim in victims {
            self.evict(victim, &mut freed);
        }
        let any = !freed.is_empty();
        Extent::release_all(freed);
        any
    }

    /// Takes an idle tensor or published block off the device; its extent goes to `freed`. Gives its bytes. A tensor that
    /// anybody holds cannot be unwrapped and so cannot be evicted, whatever the accounts say.
    fn evict(&mut self, key: TensorKey, freed: &mut Vec<Extent>) -> usize {
        if self.published.contains_key(&key) {
            return self.evict_block(key, freed);
        }
        let Some(slot) = self.slot_mut(key) else { return 0 };
        let Some(tensor) = slot.tensor.take() else { return 0 };
        let len = tensor.len();
        match Arc::try_unwrap(tensor) {
            Ok(tensor) => freed.extend(tensor.into_extent()),
            Err(held) => {
                debug_assert!(false, "an idle tensor is held by nobody");
                slot.tensor = Some(held);
                self.apply(Event::Leased { tensor: key, at: f64::NEG_INFINITY });
                self.unsettled.push(key);
                return 0;
            }
        }
        self.stats.resident_bytes -= len as u64;
        self.stats.evicted_total += len as u64;
        self.apply(Event::Evicted { tensor: key });
        len
    }
}

#[cfg(test)]
mod tests;
