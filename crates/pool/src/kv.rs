//! KV blocks of one model, whatever names it is deployed under: numbered places in an arena of its own, out of the device's common pages.
//!
//! A model's arena only reserves addresses; pages come with the blocks and go with them. The lowest free number is
//! used first, so that blocks smaller than a page stay together. A full block can be published under the hash of all
//! tokens up to its end; then sequences share it, and it stays as a cached prefix until its room is worth more.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use tangram_checkpoint::Hash;
use tangram_device::{Arena, DeviceError, Extent, Memory};
use tangram_policy::TensorKey;

use crate::pages::PageAccount;

/// Names the KV blocks of one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvKey(pub(crate) usize);

/// Identity of a full block: a hash over all tokens of the sequence up to the block's end.
pub type BlockHash = [u8; 32];

/// Leases on the cached blocks that a sequence begins with, in order. Give it back with `Pool::release_prefix`.
#[derive(Debug, Default)]
pub struct Prefix {
    pub(crate) keys: Vec<TensorKey>,
    pub(crate) blocks: Vec<Arc<Extent>>,
}

impl Prefix {
    /// The blocks.
    pub fn blocks(&self) -> &[Arc<Extent>] {
        &self.blocks
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

/// Where the KV blocks of one model lie.
pub(crate) struct KvArena {
    arena: Arc<Arena>,
    block_bytes: usize,
    free: BinaryHeap<Reverse<usize>>,
    next: usize,
    pub(crate) pages: PageAccount,
    pub(crate) published: HashMap<BlockHash, TensorKey>,
    pub(crate) identity: Hash,
    /// Deployed models with this identity.
    pub(crate) models: usize,
}

impl KvArena {
    /// Reserves addresses for as many blocks of `block_bytes` as the whole device could hold.
    pub(crate) fn reserve(
        memory: Arc<Memory>,
        identity: Hash,
        block_bytes: usize,
    ) -> Result<KvArena, DeviceError> {
        let blocks = (memory.page_count() * memory.page_bytes()) / block_bytes + 1;
        let arena = Arena::reserve(memory, blocks * block_bytes)?;
        let (free, pages, published) = (BinaryHeap::new(), PageAccount::default(), HashMap::new());
        Ok(KvArena { arena, block_bytes, free, next: 0, pages, published, identity, models: 1 })
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

    /// The place of a block that is about to be released is free again.
    pub(crate) fn give(&mut self, block: &Extent) {
        self.free.push(Reverse(block.offset() / self.block_bytes));
    }
}
