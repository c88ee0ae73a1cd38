//! The plain model: which tensors are catalogued, on the device and wanted, which KV blocks are published, and the
//! accounts that follow from it. It holds no bytes and knows no pages; what the pool may choose (whom to evict) it is
//! told afterwards, and says whether that was allowed.

use std::collections::BTreeMap;
use std::ops::Range;

use tangram_policy::TensorKey;

/// Why a tensor will not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    Abandoned,
    Failed,
}

/// How far a tensor on the device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Arriving,
    Ready,
    Failed(Failure),
}

/// A tensor that has room on the device, or had until a moment ago.
#[derive(Debug)]
pub struct Resident {
    pub stage: Stage,
    /// Leases on it.
    pub wanted: usize,
    /// The loader has been told that nobody wants it: it cannot be joined any more.
    pub given_up: bool,
    /// Evictable: it arrived, nobody has a lease on it, and the pool has seen both.
    pub idle: bool,
    /// Byte ranges of its parts while it arrives, and whether the part still holds its bytes.
    pub parts: Vec<(Range<usize>, bool)>,
    unfinished: usize,
    failure: Option<Failure>,
    /// Where its first byte is, as of when it was last leased; what is idle may move. `None` if nobody was told.
    pub address: Option<usize>,
}

/// A catalogued tensor.
#[derive(Debug)]
pub struct Slot {
    pub key: TensorKey,
    pub len: usize,
    pub models: usize,
    /// (checkpoint, offset) of whoever brought it into the catalogue.
    pub home: (usize, usize),
    pub resident: Option<Resident>,
    /// Whether a request has ever asked for it.
    pub used: bool,
    /// Whether its bytes could not be read the last time.
    pub damaged: bool,
    /// Whether its bytes have been there since it was catalogued.
    pub was_ready: bool,
    /// Where it was last, for backends with stable addresses.
    pub last_address: Option<usize>,
}

/// A published KV block: in use, or cached unless it has been evicted since.
#[derive(Debug)]
pub struct Published {
    pub leases: usize,
    /// Offset in the arena of its identity.
    pub offset: usize,
}

/// The tokens of a sequence, one number per block; a block is named by everything up to its end.
pub type Blocks = Vec<u8>;

/// KV of one identity.
#[derive(Debug, Default)]
pub struct Kv {
    /// Deployments that use it.
    pub models: usize,
    pub published: BTreeMap<Blocks, Published>,
}

/// The plain model.
#[derive(Debug, Default)]
pub struct Reference {
    pub slots: BTreeMap<usize, Slot>,
    pub kv: [Kv; 3],
    pub loaded_total: u64,
    pub fetched_total: u64,
    pub from_host_total: u64,
    pub reused_total: u64,
    pub evicted_total: u64,
    /// Bytes of tensors that had room and never arrived.
    pub failed_total: u64,
    /// As of the pool's last word.
    pub moved_total: u64,
    /// Bytes of what was found in another place than before: the least that must have been moved.
    pub relocated_total: u64,
    /// Bytes of cached blocks, as of the pool's last word.
    pub cached_bytes: u64,
}

impl Slot {
    pub fn is_leased(&self) -> bool {
        self.resident.as_ref().is_some_and(|resident| resident.wanted > 0)
    }

    /// Whether an activation has to wait for somebody to let go of what failed or was given up.
    pub fn blocks_activation(&self) -> bool {
        self.resident.as_ref().is_some_and(|resident| match resident.stage {
            Stage::Arriving => resident.given_up,
            Stage::Ready => false,
            Stage::Failed(_) => resident.wanted > 0,
        })
    }

    /// On the device and evictable.
    pub fn is_idle(&self) -> bool {
        self.resident.as_ref().is_some_and(|resident| resident.idle)
    }
}

impl Reference {
    /// What the pool does at the start of an operation: what nobody wants is evictable if it has arrived, and gone if
    /// it failed or no model has it any more.
    pub fn settle(&mut self) {
        let mut gone = Vec::new();
        for (&content, slot) in &mut self.slots {
            let Some(resident) = &mut slot.resident else { continue };
            resident.idle = resident.stage == Stage::Ready && resident.wanted == 0;
            match resident.stage {
                Stage::Failed(failure) if resident.wanted == 0 => {
                    self.failed_total += slot.len as u64;
                    slot.damaged = failure == Failure::Failed;
                }
                Stage::Ready if resident.wanted == 0 && slot.models == 0 => {
                    self.evicted_total += slot.len as u64;
                }
                _ => continue,
            }
            slot.resident = None;
            if slot.models == 0 {
                gone.push(content);
            }
        }
        for content in gone {
            self.slots.remove(&content);
        }
    }

    /// A model that has this content is gone.
    pub fn forget(&mut self, content: usize) {
        let slot = self.slots.get_mut(&content).expect("catalogued");
        slot.models -= 1;
        if slot.models > 0 || slot.resident.as_ref().is_some_and(|r| r.wanted > 0 || r.stage != Stage::Ready)
        {
            return;
        }
        if slot.resident.is_some() {
            self.evicted_total += slot.len as u64;
        }
        self.slots.remove(&content);
    }

    /// Room was made for a tensor, cut into parts of `part_bytes`, and somebody waits for it: a request, or nobody yet.
    pub fn arriving(&mut self, content: usize, address: Option<usize>, part_bytes: usize, fetched: bool) {
        let slot = self.slots.get_mut(&content).expect("catalogued");
        let len = slot.len;
        let parts: Vec<(Range<usize>, bool)> =
            (0..len).step_by(part_bytes).map(|start| (start..(start + part_bytes).min(len), true)).collect();
        let unfinished = parts.len();
        assert!(slot.resident.is_none(), "content {content} is loaded although it is on the device");
        let (stage, wanted) = (Stage::Arriving, 1);
        slot.resident = Some(Resident {
            stage,
            wanted,
            given_up: false,
            idle: false,
            parts,
            unfinished,
            failure: None,
            address,
        });
        slot.used |= !fetched;
        slot.damaged &= fetched;
        *(if fetched { &mut self.fetched_total } else { &mut self.loaded_total }) += len as u64;
    }

    /// The tensor is arriving or failing.
    pub fn resident_mut(&mut self, content: usize) -> &mut Resident {
        self.slots.get_mut(&content).and_then(|slot| slot.resident.as_mut()).expect("on the device")
    }

    /// What `Part::is_unwanted` has to say; asking settles the matter.
    pub fn ask_unwanted(&mut self, content: usize) -> bool {
        let resident = self.resident_mut(content);
        resident.given_up |= resident.wanted == 0;
        resident.given_up || resident.failure.is_some()
    }

    /// A request more has a lease; the tensor, if it can be read, is at `address`. Gives the address from before if the
    /// tensor had to stay there.
    pub fn lease(&mut self, content: usize, address: Option<usize>) -> Option<usize> {
        self.slots.get_mut(&content).expect("catalogued").used = true;
        let resident = self.resident_mut(content);
        let bound = resident.address.filter(|_| !resident.idle);
        let relocated = resident.idle && resident.address != address;
        resident.address = address.or(resident.address);
        resident.wanted += 1;
        resident.idle = false;
        self.relocated_total += if relocated { self.slots[&content].len as u64 } else { 0 };
        bound
    }

    /// A part is finished; `true` if that settled the tensor.
    pub fn part_finished(&mut self, content: usize, part: usize, failure: Option<Failure>) -> bool {
        let resident = self.resident_mut(content);
        resident.unfinished -= 1;
        if let Some(failure) = failure {
            resident.parts[part].1 = false;
            if resident.failure != Some(Failure::Failed) {
                resident.failure = Some(failure);
            }
        }
        if resident.unfinished > 0 {
            return false;
        }
        if resident.failure.is_none() && resident.given_up {
            resident.failure = Some(Failure::Abandoned);
        }
        resident.parts.clear();
        resident.stage = resident.failure.map_or(Stage::Ready, Stage::Failed);
        let ready = resident.stage == Stage::Ready;
        self.slots.get_mut(&content).expect("catalogued").was_ready |= ready;
        true
    }

    /// All of a tensor's room was dropped before it was cut into parts.
    pub fn dropped_whole(&mut self, content: usize) {
        let resident = self.resident_mut(content);
        resident.parts.clear();
        resident.stage = Stage::Failed(Failure::Failed);
    }

    /// Bytes of leased tensors.
    pub fn leased_bytes(&self) -> u64 {
        self.slots.values().filter(|slot| slot.is_leased()).map(|slot| slot.len as u64).sum()
    }

    /// Published blocks in use: number and bytes.
    pub fn published_in_use(&self, block_bytes: &[usize; 3]) -> (u64, u64) {
        let mut sum = (0, 0);
        for (kv, &bytes) in self.kv.iter().zip(block_bytes) {
            let blocks = kv.published.values().filter(|block| block.leases > 0).count() as u64;
            sum = (sum.0 + blocks, sum.1 + blocks * bytes as u64);
        }
        sum
    }

    /// Bytes of published blocks without leases, counting those that may have been evicted unseen.
    pub fn cached_at_most(&self, block_bytes: &[usize; 3]) -> u64 {
        let idle = |kv: &Kv| kv.published.values().filter(|block| block.leases == 0).count() as u64;
        self.kv.iter().zip(block_bytes).map(|(kv, &bytes)| idle(kv) * bytes as u64).sum()
    }
}
