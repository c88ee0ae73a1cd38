//! The segment layout: everything in one contiguous range, placed by Partitioned-Gain Packing
//! ([`tangram_policy::packing`]), which says what idle residents to move so that all missing tensors fit.
//!
//! Tensors settle at the low end, toward which packing slides; the KV of sequences is taken from the high end. What is
//! leased or still arriving is a wall. A resident is moved through the only handle to it, so nobody can have its old
//! address.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tangram_device::{Arena, Claim, Contents, DeviceError, Extent, Memory};
use tangram_policy::TensorKey;
use tangram_policy::packing::{self, Move, Packer, Strategy};

use crate::kv::KvKey;
use crate::pool::{Pool, Refusal, Shortage};
use crate::room::{ALIGNMENT, KvReserve, Place, Room};

#[derive(Clone, Copy, Debug)]
struct Resident {
    bytes: usize,
    owner: Option<TensorKey>,
    idle: bool,
}

/// The range, what lies where, and what is free between.
pub(crate) struct Segment {
    arena: Arc<Arena>,
    len: usize,
    residents: BTreeMap<usize, Resident>,
    /// Maximal free ranges: offset -> bytes.
    holes: BTreeMap<usize, usize>,
    free: usize,
    idle: usize,
    packer: Packer,
    strategy: Strategy,
    /// Residents as the packer reads them, and the sizes asked for; kept between plans.
    extents: Vec<packing::Extent>,
    sizes: Vec<u64>,
}

fn footprint(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

impl Segment {
    pub(crate) fn new(memory: Arc<Memory>) -> Result<Segment, DeviceError> {
        let len = memory.page_count() * memory.page_bytes();
        Ok(Segment {
            arena: Arena::segment(memory)?,
            len,
            residents: BTreeMap::new(),
            holes: BTreeMap::from([(0, len)]),
            free: len,
            idle: 0,
            packer: Packer::new(len as u64, ALIGNMENT as u64),
            strategy: Strategy::PartitionedGain,
            extents: Vec::new(),
            sizes: Vec::new(),
        })
    }

    pub(crate) fn pack_as_published(&mut self) {
        self.strategy = Strategy::Published;
    }

    pub(crate) fn change(
        &mut self,
        (offset, bytes): (usize, usize),
        owner: Option<TensorKey>,
        from: Place,
        to: Place,
    ) {
        if from == to {
            return;
        }
        self.idle -= if from == Place::Idle { footprint(bytes) } else { 0 };
        self.idle += if to == Place::Idle { footprint(bytes) } else { 0 };
        if to == Place::Absent {
            self.residents.remove(&offset);
            self.add_hole(offset, footprint(bytes));
            return;
        }
        if from == Place::Absent {
            self.take_hole(offset, footprint(bytes));
        }
        self.residents.insert(offset, Resident { bytes, owner, idle: to == Place::Idle });
    }

    fn add_hole(&mut self, offset: usize, bytes: usize) {
        self.free += bytes;
        let (mut start, mut end) = (offset, offset + bytes);
        if let Some(after) = self.holes.remove(&end) {
            end += after;
        }
        if let Some((&before, len)) = self.holes.range(..start).next_back()
            && before + len == start
        {
            start = before;
        }
        self.holes.insert(start, end - start);
    }

    fn take_hole(&mut self, offset: usize, bytes: usize) {
        let found = self.holes.range(..=offset).next_back().map(|(&start, &len)| (start, len));
        let Some((start, len)) = found.filter(|(start, len)| start + len >= offset + bytes) else {
            debug_assert!(false, "{bytes} bytes at {offset} are not free");
            return;
        };
        self.free -= bytes;
        self.holes.remove(&start);
        if offset > start {
            self.holes.insert(start, offset - start);
        }
        if start + len > offset + bytes {
            self.holes.insert(offset + bytes, start + len - offset - bytes);
        }
    }

    /// Whether blocks of these sizes (bytes, how many) find place in ranges of these lengths.
    fn fit(ranges: impl Iterator<Item = usize>, blocks: &[(usize, usize)]) -> bool {
        let mut left: Vec<(usize, usize)> = blocks.to_vec();
        left.sort_unstable_by(|a, b| b.cmp(a));
        for mut range in ranges {
            for (bytes, count) in &mut left {
                let here = (range / *bytes).min(*count);
                *count -= here;
                range -= here * *bytes;
            }
        }
        left.iter().all(|&(_, count)| count == 0)
    }

    /// Lengths of what lies between two residents that are not idle.
    fn compartments(&self) -> impl Iterator<Item = usize> {
        let mut from = 0;
        let walls = self.residents.iter().filter(|(_, resident)| !resident.idle);
        let walls = walls.map(|(&offset, resident)| (offset, offset + footprint(resident.bytes)));
        walls.chain([(self.len, self.len)]).map(move |(start, end)| start - std::mem::replace(&mut from, end))
    }

    /// Plans room for `sizes`, with the residents that `keep` lets stay and says may move.
    fn plan(
        &mut self,
        keep: impl Fn(&Resident) -> Option<bool>,
        sizes: impl Iterator<Item = usize>,
    ) -> Option<&packing::Packing> {
        self.extents.clear();
        for (&offset, resident) in &self.residents {
            if let Some(movable) = keep(resident) {
                let (offset, len) = (offset as u64, resident.bytes as u64);
                self.extents.push(packing::Extent { offset, len, movable });
            }
        }
        self.sizes.clear();
        self.sizes.extend(sizes.map(|bytes| bytes as u64));
        self.packer.pack(self.strategy, &self.extents, &self.sizes)
    }

    /// Takes blocks with zeros in them from the high end; `None` if the holes do not hold so many.
    fn take_blocks(&self, bytes: usize, count: usize) -> Option<Result<Vec<Extent>, DeviceError>> {
        let mut claims = Vec::with_capacity(count);
        for (&start, &len) in self.holes.iter().rev() {
            let mut end = (start + len) / ALIGNMENT * ALIGNMENT;
            while claims.len() < count && end >= start + footprint(bytes) {
                end -= footprint(bytes);
                claims.push(Claim { offset: end, len: bytes });
            }
            if claims.len() == count {
                return Some(self.arena.claim_all(&claims, Contents::Zeroed));
            }
        }
        None
    }

    /// Bytes that nothing lies in.
    pub(crate) fn free_bytes(&self) -> usize {
        self.free
    }

    fn shortage(&self, needed: usize) -> Shortage {
        Shortage { needed: needed as u64, available: (self.free + self.idle) as u64 }
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.residents.is_empty()
    }

    #[cfg(test)]
    pub(crate) fn is_consistent(&self) -> bool {
        let mut at = 0;
        let mut holes = BTreeMap::new();
        for (&offset, resident) in &self.residents {
            if offset < at {
                return false;
            }
            if offset > at {
                holes.insert(at, offset - at);
            }
            at = offset + footprint(resident.bytes);
        }
        if at < self.len {
            holes.insert(at, self.len - at);
        }
        holes == self.holes && self.free == holes.values().sum::<usize>()
    }
}

impl Pool {
    fn segment(&mut self) -> Option<&mut Segment> {
        match &mut self.room {
            Room::Segment(segment) => Some(segment),
            Room::Paged(_) => None,
        }
    }

    /// Sizes and numbers of the blocks.
    fn block_sizes(&self, reserve: &[KvReserve]) -> Vec<(usize, usize)> {
        let size = |reserve: &KvReserve| {
            let bytes = self.kv.get(reserve.kv.0)?.as_ref()?.block_bytes;
            Some((footprint(bytes), reserve.blocks)).filter(|&(_, blocks)| blocks > 0)
        };
        reserve.iter().filter_map(size).collect()
    }

    fn sizes(&self, missing: &[TensorKey], reserve: &[KvReserve]) -> Vec<usize> {
        let tensors = missing.iter().filter_map(|&key| Some(self.slot(key)?.bytes));
        let blocks = self.block_sizes(reserve);
        let blocks = blocks.into_iter().flat_map(|(bytes, count)| std::iter::repeat_n(bytes, count));
        tensors.chain(blocks).collect()
    }

    /// Whether there would be room for `missing` and `reserve` if everything idle went but `own_idle` (ascending).
    pub(crate) fn check_segment(
        &mut self,
        missing: &[TensorKey],
        own_idle: &[TensorKey],
        reserve: &[KvReserve],
    ) -> Result<(), Shortage> {
        let blocks = self.block_sizes(reserve);
        let Some(segment) = self.segment() else { return Ok(()) };
        if missing.is_empty() && Segment::fit(segment.holes.values().copied(), &blocks) {
            return Ok(());
        }
        let sizes = self.sizes(missing, reserve);
        let Some(segment) = self.segment() else { return Ok(()) };
        let needed = sizes.iter().copied().map(footprint).sum();
        let shortage = segment.shortage(needed);
        let keep = |resident: &Resident| match resident {
            Resident { idle: false, .. } => Some(false),
            Resident { owner: Some(key), .. } if own_idle.binary_search(key).is_ok() => Some(true),
            _ => None,
        };
        segment.plan(keep, sizes.into_iter()).map(drop).ok_or(shortage)
    }

    /// Evicts and moves as much as it takes and claims places for `missing`, such that `reserve` finds place too.
    /// `own` (ascending) are tensors of the same request that were idle before it: they stay, but may move, for nobody
    /// has been told where they are.
    pub(crate) fn place_segment(
        &mut self,
        missing: &[TensorKey],
        own: &[TensorKey],
        reserve: &[KvReserve],
    ) -> Result<HashMap<TensorKey, Extent>, Refusal> {
        let blocks = self.block_sizes(reserve);
        if missing.is_empty()
            && self.segment().is_some_and(|segment| Segment::fit(segment.holes.values().copied(), &blocks))
        {
            return Ok(HashMap::new());
        }
        let sizes = self.sizes(missing, reserve);
        let placements = self.pack(&sizes, own)?;
        self.claim_placements(missing, &placements)
    }

    /// Claims places for absent tensors, if that takes no eviction.
    pub(crate) fn claim_segment(
        &mut self,
        keys: &[TensorKey],
    ) -> Result<HashMap<TensorKey, Extent>, Refusal> {
        let sizes = self.sizes(keys, &[]);
        let placements = self.pack_once(&sizes, &[]).unwrap_or(Err(Shortage::NOTHING.into()))?;
        self.claim_placements(keys, &placements)
    }

    fn claim_placements(
        &mut self,
        keys: &[TensorKey],
        placements: &[(usize, u64)],
    ) -> Result<HashMap<TensorKey, Extent>, Refusal> {
        let mut claims = vec![Claim { offset: 0, len: 0 }; keys.len()];
        for &(index, offset) in placements {
            if let (Some(claim), Some(slot)) =
                (claims.get_mut(index), keys.get(index).and_then(|&key| self.slot(key)))
            {
                *claim = Claim { offset: offset as usize, len: slot.bytes };
            }
        }
        let Some(segment) = self.segment() else { return Ok(HashMap::new()) };
        let arena = segment.arena.clone();
        let extents = arena.claim_all(&claims, Contents::Overwritten).map_err(Refusal::Device)?;
        for (&key, claim) in keys.iter().zip(&claims) {
            if let Some(slot) = self.slot_mut(key) {
                slot.offset = claim.offset;
            }
        }
        Ok(keys.iter().copied().zip(extents).collect())
    }

    /// Evicts and moves until `sizes` fit; gives the place of each.
    fn pack(&mut self, sizes: &[usize], own: &[TensorKey]) -> Result<Vec<(usize, u64)>, Refusal> {
        let needed: usize = sizes.iter().copied().map(footprint).sum();
        let mut more = sizes.iter().copied().max().unwrap_or(0);
        loop {
            let free = self.segment().map_or(0, |segment| segment.free);
            if let Some(placements) = self.pack_once(sizes, own) {
                return placements;
            }
            // Where the bytes would do but lie on the wrong sides of what is leased, more has to go, and then more.
            let shortage = if free < needed { needed - free } else { more };
            more += more * usize::from(free >= needed);
            if !self.evict_bytes(shortage as u64) {
                let shortage = self.segment().map_or(Shortage::NOTHING, |segment| segment.shortage(needed));
                return Err(shortage.into());
            }
        }
    }

    /// Moves residents so that `sizes` fit as things are; gives the place of each, or `None` if that is not possible.
    fn pack_once(
        &mut self,
        sizes: &[usize],
        own: &[TensorKey],
    ) -> Option<Result<Vec<(usize, u64)>, Refusal>> {
        let segment = self.segment()?;
        if segment.free < sizes.iter().copied().map(footprint).sum() {
            return None;
        }
        let movable = |resident: &Resident| {
            Some(resident.idle || resident.owner.is_some_and(|key| own.binary_search(&key).is_ok()))
        };
        let packing = segment.plan(movable, sizes.iter().copied())?;
        let (moves, placements) = (packing.moves.clone(), packing.placements.clone());
        Some(self.carry_out(&moves).map(|()| placements))
    }

    fn carry_out(&mut self, moves: &[Move]) -> Result<(), Refusal> {
        for &Move { from, to, len } in moves {
            let (from, to) = (from as usize, to as usize);
            let resident = self.segment().and_then(|segment| segment.residents.get(&from)).copied();
            let extent = match resident {
                Some(Resident { owner: Some(key), .. }) => self.extent_mut(key),
                _ => None,
            };
            let moved = match extent {
                Some(extent) => extent.move_to(to),
                None => Err(DeviceError::BadClaim {
                    offset: from,
                    len: len as usize,
                    arena_bytes: self.segment().map_or(0, |segment| segment.len),
                    problem: "held by somebody",
                }),
            };
            debug_assert!(
                !matches!(moved, Err(DeviceError::BadClaim { .. })),
                "a plan moves what nobody holds, to where nothing is"
            );
            moved.map_err(Refusal::Device)?;
            let Some(Resident { bytes, owner: Some(key), idle }) = resident else { continue };
            let place = if idle { Place::Idle } else { Place::Pinned };
            if let Some(segment) = self.segment() {
                segment.change((from, bytes), Some(key), place, Place::Absent);
                segment.change((to, bytes), Some(key), Place::Absent, place);
            }
            if let Some(slot) = self.slot_mut(key) {
                slot.offset = to;
            }
            self.stats.moved_total += len;
        }
        Ok(())
    }

    /// The extent of a resident tensor or published block that nobody holds.
    fn extent_mut(&mut self, key: TensorKey) -> Option<&mut Extent> {
        if let Some(block) = self.published.get_mut(&key) {
            return Arc::get_mut(&mut block.extent);
        }
        let tensor = self.slots.get_mut(key.0 as usize)?.as_mut()?.tensor.as_mut()?;
        Arc::get_mut(tensor)?.extent_mut()
    }

    pub(crate) fn take_kv_segment(&mut self, key: KvKey, count: usize) -> Result<Vec<Extent>, Refusal> {
        let Some(bytes) = self.kv.get(key.0).and_then(Option::as_ref).map(|kv| kv.block_bytes) else {
            return Err(Shortage::NOTHING.into());
        };
        let mut tried = false;
        loop {
            let Some(segment) = self.segment() else { return Err(Shortage::NOTHING.into()) };
            if let Some(blocks) = segment.take_blocks(bytes, count) {
                return blocks.map_err(Refusal::Device);
            }
            let shortage = segment.shortage(count * footprint(bytes));
            if tried || !Segment::fit(segment.compartments(), &[(footprint(bytes), count)]) {
                return Err(shortage.into());
            }
            tried = true;
            self.pack(&vec![bytes; count], &[])?;
        }
    }

    pub(crate) fn can_reserve_segment(&mut self, reserve: &[KvReserve]) -> bool {
        let blocks = self.block_sizes(reserve);
        self.segment().is_some_and(|segment| Segment::fit(segment.compartments(), &blocks))
    }

    pub(crate) fn has_room_segment(&mut self, reserve: &[KvReserve]) -> bool {
        let blocks = self.block_sizes(reserve);
        self.segment().is_some_and(|segment| Segment::fit(segment.holes.values().copied(), &blocks))
    }

    pub(crate) fn reclaim_segment(&mut self, reserve: &[KvReserve]) {
        let blocks = self.block_sizes(reserve);
        let needed: usize = blocks.iter().map(|(bytes, count)| bytes * count).sum();
        let Some(segment) = self.segment() else { return };
        if segment.free < needed && Segment::fit(segment.compartments(), &blocks) {
            let shortage = (needed - segment.free) as u64;
            self.evict_bytes(shortage);
        }
    }
}
