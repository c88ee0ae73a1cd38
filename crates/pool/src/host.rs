//! Host memory as the tier between the disk and a device that the host cannot address: pinned copies of tensors, from which
//! they are brought back without a disk and without verifying them again.
//!
//! What is kept is [`HostRetention`]'s to say; this file carries it out. A copy is made while the tensor is loaded from
//! disk: parts are read to their places in it and go to the device from there, and it counts once all of them are verified.
//! A load that reads a copy holds it, so that its memory is not used for anything else under the load.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use tangram_device::{HostBytes, HostPool};
use tangram_policy::{Event, HostRetention, TensorKey};

use crate::pool::Pool;
use crate::room::ALIGNMENT;
use crate::tensor::Vacancy;

/// A tensor's bytes in host memory, once all of them are there.
#[derive(Debug, Default)]
pub(crate) struct HostCopy {
    bytes: OnceLock<Arc<HostBytes>>,
}

impl HostCopy {
    /// All bytes are there and verified.
    pub(crate) fn complete(&self, bytes: HostBytes) {
        // A tensor is filled once.
        let _ = self.bytes.set(Arc::new(bytes));
    }

    /// How many bytes of host memory are free when the copy goes; `None` while somebody fills or reads it.
    fn frees(self: &Arc<HostCopy>) -> Option<u64> {
        let bytes = self.bytes.get().filter(|bytes| Arc::strong_count(bytes) == 1)?;
        (Arc::strong_count(self) == 1).then(|| HostPool::rounded(bytes.len()) as u64)
    }
}

/// Where a missing tensor's bytes come from.
#[derive(Debug, Default)]
pub(crate) enum Supply {
    /// From disk, and nothing is kept.
    #[default]
    Disk,
    /// From disk, and a copy is kept here.
    Kept(HostBytes, Arc<HostCopy>),
    /// From host memory.
    Host(Arc<HostBytes>),
}

/// Host memory, bytes unless named otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostStats {
    /// Pinned so far.
    pub bytes: u64,
    /// Of these, taken by copies, of whole tensors or being made.
    pub used_bytes: u64,
    /// Number of tensors of which there is a copy, or one being made.
    pub tensors: u64,
}

/// The copies and the memory that they are in.
pub(crate) struct HostTier {
    memory: HostPool,
    retention: HostRetention,
    copies: HashMap<TensorKey, Arc<HostCopy>>,
    /// In measurements, bytes that stand for all tensors.
    stand_in: Option<Arc<HostBytes>>,
}

impl Pool {
    /// Keeps copies of tensors in this memory from now on; what is pinned in it later is used too. To be called before
    /// anything is catalogued.
    pub fn keep_in_host(&mut self, memory: HostPool) {
        debug_assert!(self.slots.is_empty(), "tensors that host memory does not know");
        let (retention, copies) = (HostRetention::new(), HashMap::new());
        self.host = Some(HostTier { memory, retention, copies, stand_in: None });
    }

    /// Brings every tensor in from a part of these bytes, whatever its content is: for measurements with more models than
    /// host memory holds. They must be at least as many as the largest tensor has. To be called after
    /// [`Pool::keep_in_host`] and before anything is catalogued.
    pub fn stand_in_for_all(&mut self, bytes: HostBytes) {
        if let Some(host) = &mut self.host {
            host.stand_in = Some(Arc::new(bytes));
        }
    }

    /// Where something stands for all tensors, host memory has each of them.
    pub(crate) fn note_stand_in(&mut self, tensor: TensorKey) {
        if self.host.as_ref().is_some_and(|host| host.stand_in.is_some()) {
            self.apply(Event::Hosted { tensor, hosted: true });
        }
    }

    /// The accounts of host memory, if copies are kept there.
    pub fn host(&self) -> Option<HostStats> {
        let host = self.host.as_ref()?;
        let bytes = host.memory.bytes() as u64;
        let used_bytes = bytes - host.memory.free() as u64;
        Some(HostStats { bytes, used_bytes, tensors: host.copies.len() as u64 })
    }

    /// Bytes of these tensors that are not on the device and would come from host memory.
    pub fn hosted_bytes(&self, keys: &[TensorKey]) -> u64 {
        let Some(host) = &self.host else { return 0 };
        let absent = |key: &&TensorKey| {
            let copied = host.copies.get(key).is_some_and(|copy| copy.bytes.get().is_some());
            copied && self.slot(**key).is_some_and(|slot| slot.tensor.is_none())
        };
        keys.iter().filter(absent).filter_map(|&key| self.slot(key)).map(|slot| slot.bytes as u64).sum()
    }

    /// Tells host memory what the device's retention learns.
    pub(crate) fn tell_host(&mut self, event: Event) {
        if let Some(host) = &mut self.host {
            host.retention.apply(match event {
                // Worth is per byte of what it takes here: small tensors must not crowd out large ones.
                Event::Catalogued { tensor, bytes, depth } => {
                    Event::Catalogued { tensor, bytes: HostPool::rounded(bytes as usize) as u64, depth }
                }
                event => event,
            });
            if let Event::Forgotten { tensor } = event {
                host.copies.remove(&tensor);
            }
        }
    }

    /// The bytes of a tensor, verified when they came, if host memory has them.
    pub fn host_bytes(&self, tensor: TensorKey) -> Option<Arc<HostBytes>> {
        let host = self.host.as_ref()?;
        let Some(stand_in) = &host.stand_in else { return host.copies.get(&tensor)?.bytes.get().cloned() };
        // Anywhere, so that no cache has what the tensor before it had.
        let len = self.slot(tensor)?.bytes;
        let places = stand_in.len().saturating_sub(len) / ALIGNMENT + 1;
        let at = tensor.0.wrapping_mul(0x9E37_79B1) as usize % places * ALIGNMENT;
        Some(Arc::new(HostBytes::part(stand_in, at, len)))
    }

    /// Settles for tensors that are about to be loaded whether their bytes come from host memory, and whether a copy of
    /// those that come from disk is kept.
    pub(crate) fn supply(&mut self, vacancies: &mut [Vacancy]) {
        // Copies that are going to be read are held before any other makes room.
        for vacancy in vacancies.iter_mut() {
            if let Some(bytes) = self.host_bytes(vacancy.tensor().key()) {
                self.stats.from_host_total += bytes.len() as u64;
                vacancy.supply = Supply::Host(bytes);
            }
        }
        for vacancy in vacancies {
            if matches!(vacancy.supply, Supply::Disk)
                && let Some(supply) = self.keep(vacancy.tensor().key(), vacancy.tensor().len())
            {
                vacancy.supply = supply;
            }
        }
    }

    /// Room for a copy, if that is worth what has to go for it.
    fn keep(&mut self, tensor: TensorKey, len: usize) -> Option<Supply> {
        let host = self.host.as_ref()?;
        if host.copies.contains_key(&tensor) {
            return None;
        }
        let shortage = (HostPool::rounded(len) as u64).saturating_sub(host.memory.free() as u64);
        let frees = |other: TensorKey| host.copies.get(&other)?.frees();
        for tensor in host.retention.room(tensor, shortage, frees)? {
            self.drop_copy(tensor);
        }
        let copy = Arc::<HostCopy>::default();
        let host = self.host.as_mut()?;
        let bytes = host.memory.take(len)?;
        host.copies.insert(tensor, copy.clone());
        self.apply(Event::Hosted { tensor, hosted: true });
        Some(Supply::Kept(bytes, copy))
    }

    fn drop_copy(&mut self, tensor: TensorKey) {
        if let Some(host) = &mut self.host {
            host.copies.remove(&tensor);
            self.apply(Event::Hosted { tensor, hosted: false });
        }
    }

    /// A tensor's load has failed, and with it the copy that it was to leave.
    pub(crate) fn drop_failed_copy(&mut self, tensor: TensorKey) {
        let copy = self.host.as_ref().and_then(|host| host.copies.get(&tensor));
        if copy.is_some_and(|copy| copy.bytes.get().is_none()) {
            self.drop_copy(tensor);
        }
    }
}
