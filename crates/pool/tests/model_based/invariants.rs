//! What must hold after every step, whatever the backend: accounts, bytes, addresses. What only one backend promises is
//! in a module of its own.

use std::collections::BTreeMap;

use tangram_pool::{Backend, LoadFailure, PoolStats};

use crate::program::{Evictions, Held, Program};
use crate::reference::{Failure, Slot, Stage};
use crate::sequences::{hash, word};
use crate::{paged, segment};

impl Program {
    /// Everything that holds after every step.
    pub fn check(&mut self, evictions: Evictions) {
        self.learn_evictions(evictions);
        self.check_accounts();
        self.check_bytes();
        match self.universe.backend {
            Backend::Paged => paged::check(self),
            Backend::Segment => segment::check(self),
        }
    }

    /// Finds out which idle tensors the pool has evicted: only idle ones, and only where it was asked for room.
    pub fn learn_evictions(&mut self, evictions: Evictions) {
        for (content, slot) in &mut self.reference.slots {
            let bytes = self.pool.resident_bytes(&[slot.key]);
            let expected = if slot.resident.is_some() { slot.len as u64 } else { 0 };
            if bytes == expected {
                continue;
            }
            assert!(slot.is_idle(), "content {content}: {bytes} bytes are there, {slot:?}");
            assert_eq!(bytes, 0);
            assert!(
                evictions == Evictions::Allowed,
                "content {content} was evicted and nobody asked for room"
            );
            slot.resident = None;
            self.reference.evicted_total += slot.len as u64;
        }
        let cached = self.pool.stats().kv_cached_bytes;
        if evictions == Evictions::Allowed {
            assert!(cached <= self.reference.cached_bytes, "cached blocks out of nothing");
            self.reference.cached_bytes = cached;
        }
        assert_eq!(cached, self.reference.cached_bytes, "cached bytes");
        let moved = self.pool.stats().moved_total;
        if evictions == Evictions::Allowed && self.universe.backend == Backend::Segment {
            assert!(moved >= self.reference.moved_total);
            self.reference.moved_total = moved;
        }
        assert_eq!(moved, self.reference.moved_total, "something moved and nobody asked for room");
        assert!(cached <= self.reference.cached_at_most(&self.universe.block_bytes));
    }

    fn check_accounts(&self) {
        let (reference, stats) = (&self.reference, self.pool.stats());
        let resident = reference.slots.values().filter(|slot| slot.resident.is_some());
        let resident_bytes: u64 = resident.map(|slot| slot.len as u64).sum();
        let (mut kv_blocks, mut kv_bytes) = reference.published_in_use(&self.universe.block_bytes);
        for sequence in &self.sequences {
            kv_blocks += sequence.own.len() as u64;
            kv_bytes += (sequence.own.len() * self.universe.block_bytes[sequence.identity]) as u64;
        }
        let expected = PoolStats {
            resident_bytes,
            leased_bytes: reference.leased_bytes(),
            kv_bytes,
            kv_blocks,
            kv_cached_bytes: reference.cached_bytes,
            loaded_total: reference.loaded_total,
            fetched_total: reference.fetched_total,
            from_host_total: reference.from_host_total,
            reused_total: reference.reused_total,
            evicted_total: reference.evicted_total,
            moved_total: reference.moved_total,
        };
        assert_eq!(stats, expected);
        let gone = reference.evicted_total + reference.failed_total;
        let came = reference.loaded_total + reference.fetched_total;
        assert_eq!(resident_bytes, came - gone, "bytes that came are here or have gone");
        assert!(reference.relocated_total <= reference.moved_total, "more moved than was counted");
        let shared = |slot: &Slot| if slot.models > 1 { slot.len as u64 } else { 0 };
        for slot in reference.slots.values() {
            assert_eq!(self.pool.shared_bytes(&[slot.key]), shared(slot));
            let hosted = self.pool.hosted_bytes(&[slot.key]);
            let possible = slot.was_ready && slot.resident.is_none();
            assert!(hosted == 0 || possible && hosted == slot.len as u64, "{hosted} bytes of {slot:?}");
        }
    }

    /// Whether what is at this address is read after this step: everything unless somebody asked for less, then one piece of
    /// so many, others after each step, and now and then everything.
    fn is_read(&self, address: usize) -> bool {
        let one_of = crate::number("TANGRAM_MODEL_READS", 1).max(1);
        let mixed = (address as u64 / 512 + self.step as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        self.step.is_multiple_of(250) || mixed.is_multiple_of(one_of)
    }

    /// Everything that somebody holds has the bytes that it must have, and lies where nothing else lies.
    fn check_bytes(&self) {
        let read = |address: usize| self.is_read(address);
        let mut spans: BTreeMap<usize, usize> = BTreeMap::new();
        let mut span = |address: usize, len: usize| {
            assert!(
                spans.insert(address, len).is_none_or(|known| known == len),
                "two extents at {address:#x}"
            );
        };
        let mut seen: BTreeMap<usize, usize> = BTreeMap::new();
        for Held { contents, lease, .. } in &self.leases {
            for (content, tensor) in contents.iter().zip(lease.tensors()) {
                let resident = self.reference.slots[content].resident.as_ref().expect("leased");
                let failure = tensor.failure().map(|failure| match failure {
                    LoadFailure::Abandoned => Failure::Abandoned,
                    LoadFailure::Failed(_) => Failure::Failed,
                });
                match resident.stage {
                    Stage::Arriving => assert!(!tensor.is_ready() && failure.is_none()),
                    Stage::Failed(expected) => assert_eq!(failure, Some(expected)),
                    Stage::Ready => {
                        let extent = tensor.extent().expect("ready");
                        let address = extent.address();
                        assert_eq!(Some(address), resident.address, "it moved under a lease");
                        if seen.insert(*content, address).is_none() {
                            if read(address) {
                                let bytes = extent.to_vec().expect("readable");
                                assert!(bytes == self.universe.contents[*content].bytes, "content {content}");
                            }
                            span(address, extent.len());
                        }
                        continue;
                    }
                }
                assert!(tensor.extent().is_none(), "content {content} can be read before it is there");
            }
        }
        for slot in self.reference.slots.values() {
            if let Some(resident) = &slot.resident {
                let address = resident.address.unwrap_or_default();
                for (range, _) in resident.parts.iter().filter(|(_, live)| *live) {
                    span(address + range.start, range.len());
                }
            }
        }
        for sequence in &self.sequences {
            for (block, tag) in &sequence.own {
                let right = !read(block.address()) || reads(&block.to_vec().unwrap(), *tag);
                assert!(right, "a block at {:#x} changed", block.offset());
                span(block.address(), block.len());
            }
            for (end, block) in sequence.prefix.blocks().iter().enumerate() {
                let name = &sequence.blocks[..=end];
                let hash = hash(sequence.identity, name);
                let right = !read(block.address()) || reads(&block.to_vec().unwrap(), word(&hash));
                assert!(right, "published block {name:?} changed");
                let published = &self.reference.kv[sequence.identity].published[name];
                assert_eq!(published.offset, block.offset(), "a block in use moved");
                span(block.address(), block.len());
            }
        }
        let mut end = 0;
        for (address, len) in spans {
            assert!(address >= end, "extents overlap at {address:#x}");
            end = address + len;
        }
    }
}

fn reads(bytes: &[u8], word: u64) -> bool {
    let word = word.to_le_bytes();
    let chunks = bytes.chunks_exact(8);
    let rest = chunks.remainder();
    rest == &word[..rest.len()] && chunks.into_iter().all(|chunk| chunk == word)
}
