//! The paged layout: an address range per checkpoint file and per model's KV, and physical pages under what is resident.
//!
//! A tensor's place in its range is its offset in the file; a range only reserves addresses. KV blocks take the lowest
//! free number first, so that blocks smaller than a page stay together. Nothing here ever moves.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use tangram_device::{Arena, Claim, Contents, DeviceError, Extent, Memory};
use tangram_policy::TensorKey;

use crate::kv::KvKey;
use crate::pages::PageAccount;
use crate::pool::{Pool, Refusal, Shortage};
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
    /// Numbers below `next` that nothing lies at.
    free: BTreeSet<usize>,
    next: usize,
    pages: PageAccount,
}

impl KvArena {
    /// The lowest `count` numbers that are free, or that `cached` blocks would free. `None` if the range has not so many:
    /// in one that is as large as the device, cached blocks may hold addresses although their pages would do.
    fn lowest(&self, count: usize, cached: impl Iterator<Item = usize>) -> Option<Vec<usize>> {
        let mut numbers: Vec<usize> = self.free.iter().copied().take(count).chain(cached).collect();
        numbers.sort_unstable();
        numbers.truncate(count);
        numbers.extend((self.next..self.arena.bytes() / self.block_bytes).take(count - numbers.len()));
        (numbers.len() == count).then_some(numbers)
    }

    fn claims(&self, numbers: &[usize]) -> Vec<Claim> {
        let claim = |&number: &usize| Claim { offset: number * self.block_bytes, len: self.block_bytes };
        numbers.iter().map(claim).collect()
    }
}

/// Where blocks are to lie, and the cached blocks of their model that lie there now.
struct BlockPlan {
    numbers: Vec<usize>,
    victims: Vec<TensorKey>,
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
        let (free, pages) = (BTreeSet::new(), PageAccount::default());
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
            kv.free.insert(offset / kv.block_bytes);
        }
    }

    /// Takes the blocks with these numbers, which are free, with zeros in them.
    fn take_blocks(&mut self, kv: KvKey, numbers: &[usize]) -> Result<Vec<Extent>, DeviceError> {
        let Some(kv) = self.kv.get_mut(&kv) else { return Ok(Vec::new()) };
        let blocks = kv.arena.claim_all(&kv.claims(numbers), Contents::Zeroed)?;
        for &number in numbers {
            kv.free.remove(&number);
            kv.free.extend(kv.next..number);
            kv.next = kv.next.max(number + 1);
        }
        Ok(blocks)
    }

    /// Whether there would be pages for the blocks with these numbers if everything else that is idle went. A block is
    /// `cached` if one without users lies there now.
    fn check_blocks(
        &mut self,
        kv: KvKey,
        numbers: &[usize],
        cached: &BTreeSet<usize>,
    ) -> Result<(), Shortage> {
        let Some(entry) = self.kv.get_mut(&kv) else { return Ok(()) };
        let needed = entry.arena.pages_needed(&entry.claims(numbers));
        if needed <= self.memory.free_pages() {
            return Ok(());
        }
        // A page that a block would share with something idle is not to be had by evicting that.
        let place = |number| if cached.contains(number) { Place::Idle } else { Place::Absent };
        let home = Home::Kv(kv);
        let span = |number: &usize, bytes: usize| (number * bytes, bytes);
        let bytes = entry.block_bytes;
        numbers
            .iter()
            .for_each(|number| self.change(home, span(number, bytes), place(number), Place::Pinned));
        let room = self.check_pages(needed);
        numbers
            .iter()
            .for_each(|number| self.change(home, span(number, bytes), Place::Pinned, place(number)));
        room
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

    /// Pages that suffice for these blocks. As the lowest free numbers are taken, a run of them begins at a page's start or
    /// behind a block in use, whose page is there, and every run but the last ends before one.
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
    ) -> Result<HashMap<TensorKey, Extent>, Refusal> {
        let groups = self.groups(missing);
        // What has to be free may change as tensors that share a page with the wanted ones go.
        self.free_pages(|| pages_needed(&groups))?;
        self.claim_paged(missing)
    }

    /// Bytes of pages that an absent tensor needs and that are not there yet.
    pub(crate) fn bytes_needed_paged(&self, key: TensorKey) -> u64 {
        (pages_needed(&self.groups(&[key])) * self.memory.page_bytes()) as u64
    }

    /// Claims the places of absent tensors, if there are pages for all of them.
    pub(crate) fn claim_paged(&mut self, keys: &[TensorKey]) -> Result<HashMap<TensorKey, Extent>, Refusal> {
        let mut extents = HashMap::new();
        for Group { arena, keys, claims } in self.groups(keys) {
            let claimed = arena.claim_all(&claims, Contents::Overwritten);
            extents.extend(keys.into_iter().zip(claimed.map_err(|error| self.refusal(error))?));
        }
        Ok(extents)
    }

    /// Want of pages may pass; any other error of the device would come again.
    fn refusal(&mut self, error: DeviceError) -> Refusal {
        match (error, self.paged()) {
            (DeviceError::OutOfPages { needed, .. }, Some(paged)) => paged.shortage(needed).into(),
            (error, _) => Refusal::Device(error),
        }
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

    pub(crate) fn take_kv_paged(&mut self, key: KvKey, count: usize) -> Result<Vec<Extent>, Refusal> {
        let BlockPlan { numbers, victims } = self.plan_blocks(key, count)?;
        self.evict_all(victims);
        let Some(kv) = self.paged().and_then(|paged| paged.kv.get(&key)) else {
            return Err(Shortage::NOTHING.into());
        };
        let (arena, claims) = (kv.arena.clone(), kv.claims(&numbers));
        self.free_pages(|| arena.pages_needed(&claims))?;
        let taken = self.paged().map_or(Ok(Vec::new()), |paged| paged.take_blocks(key, &numbers));
        taken.map_err(|error| self.refusal(error))
    }

    /// Where `count` blocks can lie. Nothing is changed, so that a refusal leaves no trace.
    ///
    /// Where blocks are smaller than a page, cached ones share pages with blocks in use: evicting them frees no page, but
    /// each is room for one. Where free places do not do, those of more and more cached ones of the same model are taken
    /// too, least worth first.
    fn plan_blocks(&mut self, key: KvKey, count: usize) -> Result<BlockPlan, Shortage> {
        let Some(paged) = self.paged() else { return Err(Shortage::NOTHING) };
        let Some(kv) = paged.kv.get(&key) else { return Err(Shortage::NOTHING) };
        let block_bytes = kv.block_bytes;
        let mut shortage = paged.shortage(paged.pages_for(&[KvReserve { kv: key, blocks: count }]));
        if let Some(numbers) = kv.lowest(count, std::iter::empty()) {
            match paged.check_blocks(key, &numbers, &BTreeSet::new()) {
                Ok(()) => return Ok(BlockPlan { numbers, victims: Vec::new() }),
                Err(found) => shortage = found,
            }
        }
        let own = |block: TensorKey| {
            let published = self.published.get(&block).filter(|published| published.kv == key)?;
            Some((published.extent.offset() / block_bytes, block))
        };
        let own: Vec<(usize, TensorKey)> = self.retention.idle().filter_map(own).collect();
        let mut tried = 0;
        while tried < own.len() {
            tried = (tried * 2).clamp(1, own.len());
            let cached: BTreeSet<usize> = own[..tried].iter().map(|&(number, _)| number).collect();
            let Some(paged) = self.paged() else { break };
            let Some(kv) = paged.kv.get(&key) else { break };
            let Some(numbers) = kv.lowest(count, cached.iter().copied()) else { continue };
            if paged.check_blocks(key, &numbers, &cached).is_ok() {
                let taken = |(number, _): &&(usize, TensorKey)| numbers.binary_search(number).is_ok();
                let victims = own[..tried].iter().filter(taken).map(|&(_, block)| block).collect();
                return Ok(BlockPlan { numbers, victims });
            }
        }
        Err(shortage)
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
