//! Arenas, extents and the device's memory: who owns which bytes, and which pages are therefore mapped.
//!
//! Neighbouring extents share the page that their border falls into, so nothing is rounded up to a page on its own.
//! Here is the one place that maps, unmaps and scrubs.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::cuda::Transfer;
use crate::pages::FreePages;
use crate::{Device, DeviceError, HostBytes, HostPool, Mapping, Pinned, Staging, Stream};

/// A device with its free physical pages.
pub struct Memory {
    device: Box<dyn Device>,
    free: Mutex<FreePages>,
    /// Physical pages that were under an extent at some time.
    used: Box<[AtomicBool]>,
    /// How many of them there are: asked for with every status.
    used_count: AtomicUsize,
}

impl Memory {
    /// All pages of `device` are free.
    pub fn new(device: Box<dyn Device>) -> Arc<Memory> {
        let pages = device.page_count();
        let free = Mutex::new(FreePages::new(pages as u32));
        let used = (0..pages).map(|_| AtomicBool::new(false)).collect();
        Arc::new(Memory { device, free, used, used_count: AtomicUsize::new(0) })
    }

    /// The device's name for people.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Bytes per physical page.
    pub fn page_bytes(&self) -> usize {
        self.device.page_bytes()
    }

    /// Physical pages, free or not.
    pub fn page_count(&self) -> usize {
        self.device.page_count()
    }

    /// Physical pages that no extent uses.
    pub fn free_pages(&self) -> usize {
        lock(&self.free).free()
    }

    /// Bytes of this process's memory that the pages have taken from the system: they keep what was once written. 0 on a
    /// device with memory of its own.
    pub fn host_bytes_taken(&self) -> usize {
        if !self.device.host_accessible() {
            return 0;
        }
        self.used_count.load(Ordering::Relaxed) * self.page_bytes()
    }

    /// A physical page is under an extent now; `true` if it never was before.
    fn is_first_use(&self, page: u32) -> bool {
        let used = self.used.get(page as usize);
        let first = used.is_some_and(|used| !used.swap(true, Ordering::Relaxed));
        self.used_count.fetch_add(usize::from(first), Ordering::Relaxed);
        first
    }

    /// The device's copy streams.
    pub fn streams(&self) -> &[Stream] {
        self.device.streams()
    }

    /// Where a load puts its bytes, on a device that the host cannot address.
    pub fn staging(&self) -> Option<&Staging> {
        self.device.staging()
    }

    /// Pinned host memory that keeps bytes for this device, none of it taken yet. `None` where the device's memory is the
    /// host's own.
    pub fn host_pool(&self) -> Option<HostPool> {
        self.device.host_pool()
    }

    /// Why the device works no more, if that is so: [`DeviceError::Lost`].
    pub fn lost(&self) -> Option<DeviceError> {
        self.device.lost()
    }

    /// Copies bytes of a staging buffer to extents of this memory. `done` gets the extents back when their bytes are
    /// there, or with an error; it is called once, perhaps on a thread that other copies wait for, and the buffer is
    /// free by then.
    ///
    /// # Panics
    /// When a piece reaches beyond the buffer, or buffer or extents are of another device.
    pub fn upload(
        self: &Arc<Self>,
        buffer: Pinned,
        pieces: Vec<Piece>,
        done: impl FnOnce(Vec<Extent>, Result<(), DeviceError>) + Send + 'static,
    ) {
        let Some(staging) = self.staging().filter(|staging| buffer.is_of(staging)) else {
            panic!("a buffer of another device");
        };
        let transfer = |piece: &Piece| {
            let (from, bytes) = (piece.from, piece.extent.len);
            assert!(from.checked_add(bytes).is_some_and(|end| end <= buffer.len()), "beyond the buffer");
            assert!(Arc::ptr_eq(&piece.extent.arena.memory, self), "an extent of another device");
            Transfer { from, to: piece.extent.address(), bytes }
        };
        let transfers: Vec<Transfer> = pieces.iter().map(transfer).collect();
        let extents: Vec<Extent> = pieces.into_iter().map(|piece| piece.extent).collect();
        // SAFETY: the destinations are under these extents, which `done` holds until it is called.
        unsafe { staging.upload(buffer, &transfers, Box::new(move |result| done(extents, result))) };
    }

    /// Fills an extent of this memory with the bytes from `at` on that host memory keeps. `done` gets the extent back when
    /// they are there, or with an error; it is called once, perhaps on a thread that other copies wait for, and must not
    /// ask for another copy.
    ///
    /// # Panics
    /// When so many bytes are not there, or bytes or extent are of another device.
    pub fn upload_kept(
        self: &Arc<Self>,
        bytes: Arc<HostBytes>,
        at: usize,
        extent: Extent,
        done: impl FnOnce(Extent, Result<(), DeviceError>) + Send + 'static,
    ) {
        let Some(staging) = self.staging() else { panic!("host memory of another device") };
        assert!(Arc::ptr_eq(&extent.arena.memory, self), "an extent of another device");
        let (to, len) = (extent.address(), extent.len);
        // SAFETY: the destination is under this extent, which `done` holds until it is called.
        unsafe { staging.upload_kept(bytes, at, to, len, Box::new(move |result| done(extent, result))) };
    }
}

/// An extent that is to get the bytes of a staging buffer from `from` on.
#[derive(Debug)]
pub struct Piece {
    /// First byte in the buffer.
    pub from: usize,
    /// Where they go, and how many.
    pub extent: Extent,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The state behind these locks is consistent at every point where a panic could leave them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the new owner of an extent finds in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Zeros.
    Zeroed,
    /// Whatever the pages held: the owner promises to overwrite every byte before anybody may read one.
    Overwritten,
}

/// A wish for an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Offset in the arena, bytes.
    pub offset: usize,
    /// Length, bytes.
    pub len: usize,
}

#[derive(Default)]
struct ArenaState {
    /// Live extents: offset -> length.
    claims: BTreeMap<usize, usize>,
    /// Mapped pages of the arena: page index -> (physical page, extents over it).
    mapped: BTreeMap<usize, (u32, u32)>,
}

/// A stable virtual range on one device.
pub struct Arena {
    memory: Arc<Memory>,
    address: usize,
    bytes: usize,
    state: Mutex<ArenaState>,
    /// Whether the arena itself holds every page, so that claims neither map nor unmap.
    segment: bool,
}

impl Arena {
    /// Reserves a range of at least `bytes` bytes; takes no physical memory.
    ///
    /// # Errors
    /// [`DeviceError::System`] when the address space is exhausted.
    pub fn reserve(memory: Arc<Memory>, bytes: usize) -> Result<Arc<Arena>, DeviceError> {
        let bytes = bytes.max(1).next_multiple_of(memory.page_bytes());
        let address = memory.device.reserve(bytes)?;
        Ok(Arc::new(Arena { memory, address, bytes, state: Mutex::default(), segment: false }))
    }

    /// A contiguous segment: a range that all physical pages of `memory` are mapped into from now on, in their order.
    /// Claims in it cost no mapping, may start anywhere, and can be moved ([`Extent::move_to`]).
    ///
    /// # Errors
    /// [`DeviceError::OutOfPages`] when a page is in use already; [`DeviceError::System`] when the system refuses.
    pub fn segment(memory: Arc<Memory>) -> Result<Arc<Arena>, DeviceError> {
        let pages = memory.page_count();
        let bytes = pages.max(1) * memory.page_bytes();
        let address = memory.device.reserve(bytes)?;
        let arena = Arena { memory, address, bytes, state: Mutex::default(), segment: true };
        let all: Vec<usize> = (0..pages).collect();
        let mut state = lock(&arena.state);
        arena.map_fresh(&mut state, &all)?;
        state.mapped.values_mut().for_each(|(_, users)| *users = 1);
        drop(state);
        Ok(Arc::new(arena))
    }

    /// Size of the range in bytes, a multiple of the page size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn pages_under(&self, claim: Claim) -> Range<usize> {
        let page_bytes = self.memory.page_bytes();
        claim.offset / page_bytes..(claim.offset + claim.len).div_ceil(page_bytes)
    }

    /// How many physical pages these claims would take now.
    pub fn pages_needed(&self, claims: &[Claim]) -> usize {
        let state = lock(&self.state);
        self.unmapped_pages(&state, claims).len()
    }

    /// Sorted, without doubles.
    fn unmapped_pages(&self, state: &ArenaState, claims: &[Claim]) -> Vec<usize> {
        let mut pages: Vec<usize> = claims
            .iter()
            .flat_map(|&claim| self.pages_under(claim))
            .filter(|page| !state.mapped.contains_key(page))
            .collect();
        pages.sort_unstable();
        pages.dedup();
        pages
    }

    /// One extent with zeros in it.
    ///
    /// # Errors
    /// As [`Arena::claim_all`].
    pub fn claim(self: &Arc<Self>, offset: usize, len: usize) -> Result<Extent, DeviceError> {
        let mut extents = self.claim_all(&[Claim { offset, len }], Contents::Zeroed)?;
        extents.pop().ok_or(DeviceError::BadClaim { offset, len, arena_bytes: self.bytes, problem: "lost" })
    }

    /// Takes all of these extents or none: maps the pages under them that are not mapped yet, in as few runs as the
    /// free pages allow, and scrubs every byte of a fresh page that the claims do not promise to overwrite.
    ///
    /// # Errors
    /// [`DeviceError::OutOfPages`] when there are not enough free pages; [`DeviceError::BadClaim`] for a claim that is
    /// empty, out of range or overlaps a live one; [`DeviceError::System`] when the system refuses to map.
    pub fn claim_all(
        self: &Arc<Self>,
        claims: &[Claim],
        contents: Contents,
    ) -> Result<Vec<Extent>, DeviceError> {
        let mut state = lock(&self.state);
        for (done, &claim) in claims.iter().enumerate() {
            if let Err(problem) = self.insert(&mut state, claim) {
                for claim in &claims[..done] {
                    state.claims.remove(&claim.offset);
                }
                return Err(DeviceError::BadClaim {
                    offset: claim.offset,
                    len: claim.len,
                    arena_bytes: self.bytes,
                    problem,
                });
            }
        }
        let fresh = self.unmapped_pages(&state, claims);
        if let Err(error) = self.map_fresh(&mut state, &fresh) {
            for claim in claims {
                state.claims.remove(&claim.offset);
            }
            return Err(error);
        }
        let mut untouched = vec![false; claims.len()];
        for (&claim, untouched) in claims.iter().zip(&mut untouched) {
            for page in self.pages_under(claim) {
                if let Some((physical, users)) = state.mapped.get_mut(&page) {
                    *users += 1;
                    *untouched |= self.memory.is_first_use(*physical);
                }
            }
        }
        if let Err(error) = self.scrub(&fresh, claims, contents) {
            let offsets: Vec<usize> = claims.iter().map(|claim| claim.offset).collect();
            self.release_in(&mut state, &offsets);
            return Err(error);
        }
        Ok(claims
            .iter()
            .zip(untouched)
            .map(|(&claim, untouched)| Extent {
                arena: self.clone(),
                offset: claim.offset,
                len: claim.len,
                untouched,
            })
            .collect())
    }

    fn insert(&self, state: &mut ArenaState, claim: Claim) -> Result<(), &'static str> {
        let end = claim.offset.checked_add(claim.len).ok_or("out of range")?;
        if claim.len == 0 {
            return Err("empty");
        }
        if end > self.bytes {
            return Err("out of range");
        }
        if state.claims.range(..end).next_back().is_some_and(|(&offset, &len)| offset + len > claim.offset) {
            return Err("already taken");
        }
        state.claims.insert(claim.offset, claim.len);
        Ok(())
    }

    /// Pages (index in the arena, physical page), ascending, as few runs that are contiguous in both.
    fn runs(&self, pages: impl Iterator<Item = (usize, u32)>) -> Vec<Mapping> {
        let page_bytes = self.memory.page_bytes();
        let mut runs: Vec<Mapping> = Vec::new();
        for (page, physical) in pages {
            let address = self.address + page * page_bytes;
            match runs.last_mut() {
                Some(last)
                    if last.address + last.pages as usize * page_bytes == address
                        && last.first_page + last.pages == physical =>
                {
                    last.pages += 1;
                }
                _ => runs.push(Mapping { address, first_page: physical, pages: 1 }),
            }
        }
        runs
    }

    fn map_fresh(&self, state: &mut ArenaState, fresh: &[usize]) -> Result<(), DeviceError> {
        if fresh.is_empty() {
            return Ok(());
        }
        let page_bytes = self.memory.page_bytes();
        let mut free = lock(&self.memory.free);
        let runs = free.take(fresh.len()).ok_or(DeviceError::OutOfPages {
            needed: fresh.len(),
            free: free.free(),
            page_bytes,
        })?;
        drop(free);
        let physical: Vec<u32> = runs.iter().flat_map(|&(start, length)| start..start + length).collect();
        let batch = self.runs(fresh.iter().copied().zip(physical.iter().copied()));
        // SAFETY: the addresses are pages of this arena's own reservation that are not in `mapped`; the physical
        // pages were free until now, so they are mapped nowhere.
        if let Err(error) = unsafe { self.memory.device.map(&batch) } {
            let mut free = lock(&self.memory.free);
            for (start, length) in runs {
                free.give(start, length);
            }
            return Err(error);
        }
        state.mapped.extend(fresh.iter().copied().zip(physical.into_iter().map(|page| (page, 0))));
        Ok(())
    }

    /// Zeroes what an earlier owner may have left: the claims themselves if they ask for zeros, and the bytes of
    /// fresh pages outside the claims always.
    fn scrub(&self, fresh: &[usize], claims: &[Claim], contents: Contents) -> Result<(), DeviceError> {
        let page_bytes = self.memory.page_bytes();
        let mut dirty: Vec<(usize, usize)> = Vec::new();
        let mut zero = |range: Range<usize>| {
            if !range.is_empty() {
                dirty.push((self.address + range.start, range.len()));
            }
        };
        let mut sorted: Vec<Claim> = claims.to_vec();
        sorted.sort_unstable_by_key(|claim| claim.offset);
        let mut run_start = 0;
        while run_start < fresh.len() {
            let mut run_end = run_start + 1;
            while run_end < fresh.len() && fresh[run_end] == fresh[run_end - 1] + 1 {
                run_end += 1;
            }
            let (first, last) = (fresh[run_start] * page_bytes, (fresh[run_end - 1] + 1) * page_bytes);
            let mut at = first;
            let from = sorted.partition_point(|claim| claim.offset + claim.len <= first);
            for claim in sorted[from..].iter().take_while(|claim| claim.offset < last) {
                zero(at..claim.offset.max(at));
                at = at.max((claim.offset + claim.len).min(last));
            }
            zero(at..last);
            run_start = run_end;
        }
        if contents == Contents::Zeroed {
            for claim in claims {
                zero(claim.offset..claim.offset + claim.len);
            }
        }
        // SAFETY: every range is inside a page mapped for the first time by this call or inside a claim that this call
        // has just made exclusive, so nobody else can access it.
        unsafe { self.memory.device.zero(&dirty) }
    }

    /// Ends the claims at these offsets and frees the pages that nobody uses any more.
    fn release(&self, offsets: &[usize]) {
        self.release_in(&mut lock(&self.state), offsets);
    }

    fn release_in(&self, state: &mut ArenaState, offsets: &[usize]) {
        let mut emptied: Vec<(usize, u32)> = Vec::new();
        for &offset in offsets {
            let Some(len) = state.claims.remove(&offset) else { continue };
            for page in self.pages_under(Claim { offset, len }) {
                if let Some((physical, users)) = state.mapped.get_mut(&page) {
                    *users -= 1;
                    if *users == 0 {
                        emptied.push((page, *physical));
                        state.mapped.remove(&page);
                    }
                }
            }
        }
        self.unmap_emptied(emptied);
    }

    /// Unmaps pages (index, physical page) that are no longer in `mapped`, and frees them.
    fn unmap_emptied(&self, mut emptied: Vec<(usize, u32)>) {
        emptied.sort_unstable();
        let runs = self.runs(emptied.iter().copied());
        if runs.is_empty() {
            return;
        }
        // SAFETY: no live extent covers these pages, so nobody holds references into them.
        if unsafe { self.memory.device.unmap(&runs) }.is_ok() {
            let mut free = lock(&self.memory.free);
            for run in runs {
                free.give(run.first_page, run.pages);
            }
        }
        // If the system refused to unmap, the pages stay out of circulation rather than being mapped twice.
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // Every extent holds its arena, so nothing is mapped any more but what a segment holds itself.
        if self.segment {
            let mapped = std::mem::take(&mut lock(&self.state).mapped);
            self.unmap_emptied(mapped.into_iter().map(|(page, (physical, _))| (page, physical)).collect());
        }
        // SAFETY: the reservation was made by `reserve` with this size and no extent is left.
        unsafe { self.memory.device.unreserve(self.address, self.bytes) };
    }
}

/// Exclusive ownership of a byte range of an arena; its pages stay mapped as long as it lives.
pub struct Extent {
    arena: Arc<Arena>,
    offset: usize,
    len: usize,
    /// Some of its pages were under no extent before, so that the system has yet to give memory for them.
    untouched: bool,
}

impl std::fmt::Debug for Extent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Extent({:#x}+{})", self.address(), self.len)
    }
}

impl Extent {
    /// Length in bytes, never 0.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Offset in the arena, bytes.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// The device address of the first byte; the same every time this part of the arena is claimed.
    pub fn address(&self) -> usize {
        self.arena.address + self.offset
    }

    /// The bytes, if the host can address this device's memory.
    pub fn host_bytes(&self) -> Option<&[u8]> {
        // SAFETY: the range is mapped while `self` lives, initialised (pages come zeroed or written), and writes need
        // `&mut self`, of which there is one per range.
        self.host().then(|| unsafe { std::slice::from_raw_parts(self.address() as *const u8, self.len) })
    }

    /// The bytes for writing, if the host can address this device's memory.
    pub fn host_bytes_mut(&mut self) -> Option<&mut [u8]> {
        // SAFETY: as `host_bytes`, and `&mut self` is the only access.
        self.host().then(|| unsafe { std::slice::from_raw_parts_mut(self.address() as *mut u8, self.len) })
    }

    fn span(&self, at: usize, bytes: usize) -> usize {
        assert!(at.checked_add(bytes).is_some_and(|end| end <= self.len), "beyond the extent");
        self.address() + at
    }

    /// Copies bytes from `at` on to host memory; works on every device.
    ///
    /// # Errors
    /// When the device refuses or is lost.
    pub fn read(&self, at: usize, into: &mut [u8]) -> Result<(), DeviceError> {
        let address = self.span(at, into.len());
        if into.is_empty() {
            return Ok(());
        }
        // SAFETY: the range is mapped while `self` lives, and writes need `&mut self`.
        unsafe { self.arena.memory.device.read(address, into) }
    }

    /// A copy of all bytes; works on every device.
    ///
    /// # Errors
    /// When the device refuses or is lost.
    pub fn to_vec(&self) -> Result<Vec<u8>, DeviceError> {
        match self.host_bytes() {
            Some(bytes) => Ok(bytes.to_vec()),
            None => {
                let mut bytes = vec![0; self.len];
                self.read(0, &mut bytes)?;
                Ok(bytes)
            }
        }
    }

    /// Copies host memory to the bytes from `at` on; works on every device.
    ///
    /// # Errors
    /// When the device refuses or is lost.
    pub fn write(&mut self, at: usize, from: &[u8]) -> Result<(), DeviceError> {
        let address = self.span(at, from.len());
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the range is mapped while `self` lives and `&mut self` is the only access.
        unsafe { self.arena.memory.device.write(from, address) }
    }

    /// The memory that it is part of.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.arena.memory
    }

    /// Prepares the bytes for being written from end to end, where that makes the writing cheaper.
    pub fn prepare_write(&mut self) {
        // A segment's pages are mapped for good, so its page tables fill once and never have to again; and a page that was
        // written once keeps its memory wherever it is mapped.
        if self.arena.segment || !self.untouched {
            return;
        }
        // SAFETY: the range is mapped while `self` lives and `&mut self` is the only access.
        unsafe { self.arena.memory.device.prepare_write(self.address(), self.len) };
    }

    /// Moves the extent and its bytes to another place of its segment, which may overlap the old one; nobody else may
    /// have the old address, which `&mut self` says.
    ///
    /// # Errors
    /// [`DeviceError::BadClaim`], and no change, if the new place is out of range or overlaps another extent, or the
    /// arena is no segment; [`DeviceError::Lost`].
    pub fn move_to(&mut self, offset: usize) -> Result<(), DeviceError> {
        let arena = self.arena.clone();
        let bad =
            |problem| DeviceError::BadClaim { offset, len: self.len, arena_bytes: arena.bytes, problem };
        if !arena.segment {
            return Err(bad("not in a segment"));
        }
        let mut state = lock(&arena.state);
        state.claims.remove(&self.offset);
        if let Err(problem) = arena.insert(&mut state, Claim { offset, len: self.len }) {
            state.claims.insert(self.offset, self.len);
            return Err(bad(problem));
        }
        // Every page of a segment has one user more than extents on it, so none is unmapped by moving the counts.
        for (place, up) in [(self.offset, false), (offset, true)] {
            for page in arena.pages_under(Claim { offset: place, len: self.len }) {
                if let Some((_, users)) = state.mapped.get_mut(&page) {
                    *users = if up { *users + 1 } else { *users - 1 };
                }
            }
        }
        // SAFETY: both ranges are mapped, as all of a segment is; this extent owns the old one and, since the claim
        // above, the new one; the lock keeps both from anybody else until the copy is done.
        let moved = unsafe {
            arena.memory.device.copy(arena.address + self.offset, arena.address + offset, self.len)
        };
        drop(state);
        self.offset = offset;
        moved
    }

    fn host(&self) -> bool {
        self.arena.memory.device.host_accessible()
    }

    /// Splits the extent in two at `at` bytes from its start (0 < at < len).
    pub fn split_off(&mut self, at: usize) -> Extent {
        assert!(at > 0 && at < self.len, "split point must lie inside the extent");
        let arena = self.arena.clone();
        let mut state = lock(&arena.state);
        let boundary = self.offset + at;
        let tail = self.len - at;
        state.claims.insert(self.offset, at);
        state.claims.insert(boundary, tail);
        // A page that the cut goes through now has one extent more over it.
        if !boundary.is_multiple_of(arena.memory.page_bytes())
            && let Some((_, users)) = state.mapped.get_mut(&(boundary / arena.memory.page_bytes()))
        {
            *users += 1;
        }
        drop(state);
        self.len = at;
        Extent { arena, offset: boundary, len: tail, untouched: self.untouched }
    }

    /// Undoes [`Extent::split_off`]: appends the extent that starts where this one ends.
    pub fn join(&mut self, next: Extent) {
        assert!(
            Arc::ptr_eq(&self.arena, &next.arena) && self.offset + self.len == next.offset,
            "only neighbours can be joined"
        );
        let mut state = lock(&self.arena.state);
        state.claims.remove(&next.offset);
        state.claims.insert(self.offset, self.len + next.len);
        let page_bytes = self.arena.memory.page_bytes();
        if !next.offset.is_multiple_of(page_bytes)
            && let Some((_, users)) = state.mapped.get_mut(&(next.offset / page_bytes))
        {
            *users -= 1;
        }
        drop(state);
        self.len += next.len;
        self.untouched |= next.untouched;
        next.forget();
    }

    /// Ends the extent without releasing its range; gives its arena.
    fn forget(self) -> Arc<Arena> {
        let extent = std::mem::ManuallyDrop::new(self);
        // SAFETY: `extent` is never used again and its Drop does not run, so the Arc is moved exactly once.
        unsafe { std::ptr::read(&extent.arena) }
    }

    /// Drops many extents at once, unmapping neighbouring pages together.
    pub fn release_all(extents: Vec<Extent>) {
        let mut by_arena: BTreeMap<usize, (Arc<Arena>, Vec<usize>)> = BTreeMap::new();
        for extent in extents {
            let offset = extent.offset;
            // `release` below does what Drop would.
            let arena = extent.forget();
            by_arena
                .entry(Arc::as_ptr(&arena) as usize)
                .or_insert_with(|| (arena, Vec::new()))
                .1
                .push(offset);
        }
        for (arena, offsets) in by_arena.into_values() {
            arena.release(&offsets);
        }
    }
}

impl Drop for Extent {
    fn drop(&mut self) {
        self.arena.release(&[self.offset]);
    }
}

#[cfg(test)]
mod tests;
