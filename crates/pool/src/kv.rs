//! What sequences hold of a model's KV: names of models' KV, of full blocks, and leases on cached prefixes.
//!
//! A full block can be published under the hash of all tokens up to its end; then sequences share it, and it stays as a
//! cached prefix until its room is worth more.

use std::sync::Arc;

use tangram_device::Extent;
use tangram_policy::TensorKey;

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
