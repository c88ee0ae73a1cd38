//! KV blocks of one model: numbered places in an arena of its own, out of the device's common pages.
//!
//! A model's arena only reserves addresses; pages come with the blocks and go with them. The lowest free number is
//! used first, so that blocks smaller than a page stay together.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use tangram_device::{Arena, DeviceError, Extent, Memory};

/// Where the KV blocks of one model lie.
pub struct KvArena {
    arena: Arc<Arena>,
    block_bytes: usize,
    free: BinaryHeap<Reverse<usize>>,
    next: usize,
}

impl KvArena {
    /// Reserves addresses for as many blocks of `block_bytes` as the whole device could hold.
    ///
    /// # Errors
    /// When the address space is exhausted.
    pub fn reserve(memory: Arc<Memory>, block_bytes: usize) -> Result<KvArena, DeviceError> {
        let blocks = (memory.page_count() * memory.page_bytes()) / block_bytes + 1;
        let arena = Arena::reserve(memory, blocks * block_bytes)?;
        Ok(KvArena { arena, block_bytes, free: BinaryHeap::new(), next: 0 })
    }

    /// Bytes per block.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Takes a block with zeros in it.
    pub(crate) fn take(&mut self) -> Result<Extent, DeviceError> {
        let index = self.free.peek().map_or(self.next, |index| index.0);
        let extent = self.arena.claim(index * self.block_bytes, self.block_bytes)?;
        if self.free.pop().is_none() {
            self.next += 1;
        }
        Ok(extent)
    }

    /// Gives blocks back.
    pub(crate) fn give(&mut self, blocks: Vec<Extent>) {
        self.free.extend(blocks.iter().map(|block| Reverse(block.offset() / self.block_bytes)));
        Extent::release_all(blocks);
    }
}
