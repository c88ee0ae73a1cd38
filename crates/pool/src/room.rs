//! The two layouts of device memory, and what the pool asks of either: [`Paged`] and [`Segment`].
//!
//! *Paged*: every checkpoint file and every model's KV has an address range of its own, into which physical pages are
//! mapped under what is resident. Addresses are stable and there is no external fragmentation; mapping costs time.
//! *Segment*: everything lies in one range that is mapped once. Placing costs no mapping, but the free bytes are in
//! pieces, so making room may mean moving idle residents together.
//!
//! Neither ranks anything: what goes is the policy's to say.

use tangram_checkpoint::Hash;
use tangram_device::DeviceError;
use tangram_policy::TensorKey;

use crate::kv::KvKey;
use crate::paged::Paged;
use crate::segment::Segment;

/// How device memory is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// Pages mapped under stable addresses.
    #[default]
    Paged,
    /// Contiguous extents in one range, kept together by Partitioned-Gain Packing.
    Segment,
}

/// Alignment of extents in a segment and of KV blocks, bytes: a block of a disk, so that a tensor whose place in its file
/// is whole blocks is read straight to where it belongs; and more than kernels ask for.
pub const ALIGNMENT: usize = 512;

/// KV blocks of one model that must find room later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvReserve {
    /// Whose.
    pub kv: KvKey,
    /// How many.
    pub blocks: usize,
}

/// Where an extent is in the accounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Not on the device.
    Absent,
    /// On the device, or arriving, and not evictable.
    Pinned,
    /// On the device and evictable.
    Idle,
}

/// Whose address range an extent belongs to, where there are several.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Home<'a> {
    /// A checkpoint file's.
    Checkpoint(&'a str),
    /// A model's KV.
    Kv(KvKey),
}

/// One of the two.
pub(crate) enum Room {
    Paged(Paged),
    Segment(Box<Segment>),
}

impl Room {
    /// A tensor of this checkpoint, whose file has `bytes()` bytes, is about to be catalogued.
    pub(crate) fn add_tensor(
        &mut self,
        checkpoint: &str,
        bytes: impl Fn() -> u64,
    ) -> Result<(), DeviceError> {
        match self {
            Room::Paged(paged) => paged.add_tensor(checkpoint, bytes),
            Room::Segment(_) => Ok(()),
        }
    }

    /// A tensor of this checkpoint is no longer catalogued.
    pub(crate) fn remove_tensor(&mut self, checkpoint: &str) {
        if let Room::Paged(paged) = self {
            paged.remove_tensor(checkpoint);
        }
    }

    pub(crate) fn add_kv(&mut self, kv: KvKey, block_bytes: usize) -> Result<(), DeviceError> {
        match self {
            Room::Paged(paged) => paged.add_kv(kv, block_bytes),
            Room::Segment(_) => Ok(()),
        }
    }

    pub(crate) fn remove_kv(&mut self, kv: KvKey) {
        if let Room::Paged(paged) = self {
            paged.remove_kv(kv);
        }
    }

    /// Something of `len` bytes at `offset` (`owner`: the tensor or published block that it is; `None` for the KV of
    /// one sequence) goes from one place to another.
    pub(crate) fn change(
        &mut self,
        home: Home<'_>,
        (offset, len): (usize, usize),
        owner: Option<TensorKey>,
        from: Place,
        to: Place,
    ) {
        match self {
            Room::Paged(paged) => paged.change(home, (offset, len), from, to),
            Room::Segment(segment) => segment.change((offset, len), owner, from, to),
        }
    }

    /// A KV block's place is free again.
    pub(crate) fn give_block(&mut self, kv: KvKey, offset: usize) {
        if let Room::Paged(paged) = self {
            paged.give_block(kv, offset);
        }
    }
}

/// Published blocks and users of one model's KV, whatever names the model is deployed under.
pub(crate) struct KvSpace {
    pub(crate) block_bytes: usize,
    pub(crate) published: std::collections::HashMap<crate::BlockHash, TensorKey>,
    pub(crate) identity: Hash,
    /// Deployed models with this identity.
    pub(crate) models: usize,
}
