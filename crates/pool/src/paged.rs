//! The paged layout: an address range per checkpoint file and per model's KV, and physical pages under what is resident.
//!
//! A tensor's place in its range is its offset in the file; a range only reserves addresses. KV blocks take the lowest
//! free number first, so that blocks smaller than a page stay together. Nothing here ever moves.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use tangram_device::{Arena, Claim, Contents, DeviceError, Extent, Memory};
use tangram_policy::TensorKey;

use crate::kv::KvKey;
use crate::pages::PageAccount;
use crate::pool::{Pool, Shortage};
use crate::room::{Home, KvReserve, Place, Room};

struct CheckpointArena {
    arena: Arc<Arena>,
    /// Catalogued tensors in it.
    tensors: usize,
    pages: PageAccount,
}

struct KvArena {
    arena: Arc<Arena>,
    block_bytes: usize,
    free: BinaryHeap<Reverse<usize>>,
    next: usize,
    pages: PageAccount,
}

/// The ranges and the account of pages.
pub(crate) struct Paged {
    memory: Arc<Memory>,
    checkpoints: HashMap<String, CheckpointArena>,
    kv: HashMap<KvKey, KvArena>,
    /// Pages that evicting everything idle would free.
    idle_pages: usize,
}

/// Claims in the arena of one checkpoint, and the tensors they are for.
struct Group {
    arena: Arc<Arena>,
    keys: Vec<TensorKey>,
    claims: Vec<Claim>,
}

impl Paged {
    pub(crate) fn new(memory: Arc<Memory>) -> Paged {
        Paged { memory, checkpoints: HashMap::new(), kv: HashMap::new(), idle_pages: 0 }
    }

    pub(crate) fn add_tensor(
        &mut self,
        checkpoint: &str,
        bytes: impl Fn() -> u64,
    ) -> Result<(), DeviceError> {
        if !self.checkpoints.contains_key(checkpoint) {
            let arena = Arena::reserve(self.memory.clone(), bytes() as usize)?;
            let entry = CheckpointArena { arena, tensors: 0, pages: PageAccount::default() };
            self.checkpoints.insert(checkpoint.to_owned(), entry);
        }
        if let Some(entry) = self.checkpoints.get_mut(checkpoint) {
            entry.tensors += 1;
        }
        Ok(())
    }

    pub(crate) fn remove_tensor(&mut self, checkpoint: &str) {
        if let Some(entry) = self.checkpoints.get_mut(checkpoint) {
            entry.tensors -= 1;
            if entry.tensors == 0 {
                self.checkpoints.remove(checkpoint);
            }
        }
    }

    /// Reserves addresses for as many blocks as the whole device could hold.
    pub(crate) fn add_kv(&mut self, kv: KvKey, block_bytes: usize) -> Result<(), DeviceError> {
        let blocks = (self.memory.page_count() * self.memory.page_bytes()) / block_bytes + 1;
        let arena = Arena::reserve(self.memory.clone(), blocks * block_bytes)?;
        let (free, pages) = (BinaryHeap::new(), PageAccount::default());
        self.kv.insert(kv, KvArena { arena, block_bytes, free, next: 0, pages });
        Ok(())
    }

    pub(crate) fn remove_kv(&mut self, kv: KvKey) {
        self.kv.remove(&kv);
    }

    pub(crate) fn change(&mut self, home: Home<'_>, (offset, len): (usize, usize), from: Place, to: Place) {
        let pages = match home {
            Home::Checkpoint(name) => self.checkpoints.get_mut(name).map(|entry| &mut entry.pages),
            Home::Kv(kv) => self.kv.get_mut(&kv).map(|entry| &mut entry.pages),
        };
        if let Some(pages) = pages {
            pages.change((offset, len, self.memory.page_bytes()), from, to, &mut self.idle_pages);
        }
    }

    pub(crate) fn give_block(&mut self, kv: KvKey, offset: usize) {
        if let Some(kv) = self.kv.get_mut(&kv) {
            kv.free.push(Reverse(offset / kv.block_bytes));
        }
    }

    /// Takes blocks with zeros in them, all or none.
    fn take_blocks(&mut self, kv: KvKey, count: usize) -> Result<Vec<Extent>, DeviceError> {
        let Some(kv) = self.kv.get_mut(&kv) else { return Ok(Vec::new()) };
        let mut indices: Vec<usize> = Vec::with_capacity(count);
        indices.extend(std::iter::from_fn(|| kv.free.pop().map(|index| index.0)).take(count));
        let reused = indices.len();
        indices.extend((kv.next..).take(count - reused));
        let claim = |&index: &usize| Claim { offset: index * kv.block_bytes, len: kv.block_bytes };
        let claims: Vec<Claim> = indices.iter().map(claim).collect();
        match kv.arena.claim_all(&claims, Contents::Zeroed) {
            Ok(blocks) => {
                kv.next += count - reused;
                Ok(blocks)
            }
            Err(error) => {
                kv.free.extend(indices[..reused].iter().copied().map(Reverse));
                Err(error)
            }
        }
    }

    /// Pages that are free or that evicting everything idle would free.
    pub(crate) fn available_pages(&self) -> usize {
        self.memory.free_pages() + self.idle_pages
    }

    fn shortage(&self, pages: usize) -> Shortage {
        let page_bytes = self.memory.page_bytes() as u64;
        Shortage { needed: pages as u64 * page_bytes, available: self.available_pages() as u64 * page_bytes }
    }

    fn check_pages(&self, needed: usize) -> Result<(), Shortage> {
        if needed <= self.available_pages() { Ok(()) } else { Err(self.shortage(needed)) }
    }

    /// Pages for these blocks, if none of them finds one that is there already.
    fn pages_for(&self, reserve: &[KvReserve]) -> usize {
        let page_bytes = self.memory.page_bytes();
        let pages = |reserve: &KvReserve| {
            let bytes = self.kv.get(&reserve.kv).map_or(0, |kv| reserve.blocks * kv.block_bytes);
            bytes.div_ceil(page_bytes)
        };
        reserve.iter().map(pages).sum()
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.checkpoints.is_empty() && self.kv.is_empty()
    }
}

fn pages_needed(groups: &[Group]) -> usize {
    groups.iter().map(|group| group.arena.pages_needed(&group.claims)).sum()
}

impl Pool {
    fn paged(&mut self) -> Option<&mut Paged> {
        match &mut self.room {
            Room::Paged(paged) => Some(paged),
            Room::Segment(_) => None,
        }
    }

    fn groups(&self, keys: &[TensorKey]) -> Vec<Group> {
        let Room::Paged(paged) = &self.room else { return Vec::new() };
        let mut groups: Vec<Group> = Vec::new();
        for &key in keys {
            let Some(slot) = self.slot(key) else { continue };
            let Some(CheckpointArena { arena, .. }) = paged.checkpoints.get(&slot.checkpoint) else {
                continue;
            };
            let claim = Claim { offset: slot.offset, len: slot.bytes };
            match groups.iter_mut().find(|group| Arc::ptr_eq(&group.arena, arena)) {
                Some(group) => {
                    group.keys.push(key);
                    group.claims.push(claim);
                }
                None => groups.push(Group { arena: arena.clone(), keys: vec![key], claims: vec![claim] }),
            }
        }
        groups
    }

    /// Whether there would be pages for `missing` and `reserve` if everything idle went but `own_idle`.
    pub(crate) fn check_paged(
        &mut self,
        missing: &[TensorKey],
        own_idle: &[TensorKey],
        reserve: &[KvReserve],
    ) -> Result<(), Shortage> {
        let groups = self.groups(missing);
        let Some(paged) = self.paged() else { return Ok(()) };
        let needed = pages_needed(&groups) + paged.pages_for(reserve);
        if needed <= paged.memory.free_pages() {
            return Ok(());
        }
        // What this very request needs is not for eviction, nor is a page that a missing tensor shares with an idle
        // neighbour. Only the accounts are touched before it is certain that there is room, so an attempt that fails
        // neither evicts anything nor counts as demand.
        own_idle.iter().chain(missing).for_each(|&key| self.set_place(key, Place::Pinned));
        let room = self.paged().map_or(Ok(()), |paged| paged.check_pages(needed));
        own_idle.iter().for_each(|&key| self.set_place(key, Place::Idle));
        missing.iter().for_each(|&key| self.set_place(key, Place::Absent));
        room
    }

    /// Evicts as much as it takes and claims the places of `missing`.
    pub(crate) fn place_paged(
        &mut self,
        missing: &[TensorKey],
    ) -> Result<HashMap<TensorKey, Extent>, Shortage> {
        let groups = self.groups(missing);
        // What has to be free may change as tensors that share a page with the wanted ones go.
        self.free_pages(|| pages_needed(&groups))?;
        let needed = pages_needed(&groups);
        let short = |pool: &mut Pool| pool.paged().map_or(Shortage::NOTHING, |paged| paged.shortage(needed));
        self.claim_paged(missing).ok_or_else(|| short(self))
    }

    /// Bytes of pages that an absent tensor needs and that are not there yet.
    pub(crate) fn bytes_needed_paged(&self, key: TensorKey) -> u64 {
        (pages_needed(&self.groups(&[key])) * self.memory.page_bytes()) as u64
    }

    /// Claims the places of absent tensors, if there are pages for all of them.
    pub(crate) fn claim_paged(&mut self, keys: &[TensorKey]) -> Option<HashMap<TensorKey, Extent>> {
        let mut extents = HashMap::new();
        for Group { arena, keys, claims } in self.groups(keys) {
            let claimed = arena.claim_all(&claims, Contents::Overwritten).ok()?;
            extents.extend(keys.into_iter().zip(claimed));
        }
        Some(extents)
    }

    /// Evicts until as many pages are free as `needed` says.
    fn free_pages(&mut self, needed: impl Fn() -> usize) -> Result<(), Shortage> {
        loop {
            let (needed, free) = (needed(), self.memory.free_pages());
            if free >= needed {
                return Ok(());
            }
            let bytes = ((needed - free) * self.memory.page_bytes()) as u64;
            if !self.evict_bytes(bytes) {
                return Err(self.paged().map_or(Shortage::NOTHING, |paged| paged.shortage(needed)));
            }
        }
    }

    pub(crate) fn take_kv_paged(&mut self, key: KvKey, count: usize) -> Result<Vec<Extent>, Shortage> {
        loop {
            let Some(paged) = self.paged() else { return Err(Shortage::NOTHING) };
            match paged.take_blocks(key, count) {
                Ok(blocks) => return Ok(blocks),
                Err(DeviceError::OutOfPages { needed, .. }) => match paged.check_pages(needed) {
                    Ok(()) => self.free_pages(|| needed)?,
                    Err(shortage) if !self.evict_cached(key) => return Err(shortage),
                    Err(_) => {}
                },
                Err(_) => return Err(Shortage::NOTHING),
            }
        }
    }

    /// Evicts the cached block of this model that is worth least; `false` if there is none. Where blocks are smaller than a
    /// page, cached ones share pages with blocks in use: evicting them frees no page, but each is room for one.
    fn evict_cached(&mut self, key: KvKey) -> bool {
        let own = |block: &TensorKey| self.published.get(block).is_some_and(|block| block.kv == key);
        let victim = self.retention.idle().find(own);
        victim.is_some_and(|victim| self.evict_all(vec![victim]))
    }

    pub(crate) fn can_reserve_paged(&mut self, reserve: &[KvReserve]) -> bool {
        self.paged().is_some_and(|paged| paged.pages_for(reserve) <= paged.available_pages())
    }

    pub(crate) fn has_room_paged(&mut self, reserve: &[KvReserve]) -> bool {
        self.paged().is_some_and(|paged| paged.pages_for(reserve) <= paged.memory.free_pages())
    }

    pub(crate) fn reclaim_paged(&mut self, reserve: &[KvReserve]) {
        let Some(paged) = self.paged() else { return };
        let wanted = paged.pages_for(reserve).min(paged.available_pages());
        // Less may be had than the accounts say when a loader is just letting go; the next round tries again.
        let _ = self.free_pages(|| wanted);
    }
}
