//! Prefetching: room for what nobody has asked for yet, where the policy finds it worth that.
//!
//! A fetch is no use of a tensor, and never takes what is worth more. It is a lease like any other, so a request that
//! wants the same tensor joins it, and when it is released before its bytes are there they are given up.

use std::collections::HashMap;

use tangram_device::Extent;
use tangram_policy::{Event, TensorKey, prefetch};

use crate::pool::{Lease, Logged, Pool};
use crate::room::Room;
use crate::tensor::Vacancy;

/// Tensors to bring in, most wanted first.
#[derive(Debug)]
pub struct Fetch {
    /// Keeps them from being given up while they arrive.
    pub lease: Lease,
    /// Room for them.
    pub missing: Vec<Vacancy>,
}

impl Pool {
    /// Says what is expected of a model's tensors: `log2` gives it by the number of models that have one.
    pub fn expect(&mut self, keys: &[TensorKey], log2: impl Fn(u32) -> f64) {
        for &tensor in keys {
            if let Some(models) = self.slot(tensor).map(|slot| slot.models) {
                self.apply(Event::Expected { tensor, log2: log2(models) });
            }
        }
    }

    /// Says by how many seconds the next use of tensors would be later if they were absent.
    pub fn appraise(&mut self, tensors: impl Iterator<Item = (TensorKey, f64)>) {
        for (tensor, seconds) in tensors {
            self.apply(Event::Appraised { tensor, seconds });
        }
    }

    /// As [`Pool::appraise`], for while host memory has a copy of them.
    pub fn appraise_from_host(&mut self, tensors: impl Iterator<Item = (TensorKey, f64)>) {
        for (tensor, seconds) in tensors {
            self.apply(Event::AppraisedFromHost { tensor, seconds });
        }
    }

    /// Makes room for the absent tensors that would be worth most, in memory that is free or over what is worth clearly
    /// less, until they are `bytes` together. `None` if nothing is worth bringing in.
    pub fn fetch(&mut self, bytes: u64) -> Option<Fetch> {
        self.settle();
        let mut fetch = Fetch { lease: Lease::default(), missing: Vec::new() };
        let mut left = bytes;
        // What has just gone is not brought back over what was worth even less: its bytes would have moved for nothing.
        let mut gone = Vec::new();
        while left > 0
            && let Some(key) = self.most_wanted()
            && !gone.contains(&key)
            && let Some(extent) = self.room_for_fetch(key, &mut gone)
        {
            left = left.saturating_sub(extent.len() as u64);
            let vacancy = Vacancy::new(key, extent);
            let tensor = vacancy.tensor().clone();
            self.stats.resident_bytes += tensor.len() as u64;
            self.stats.leased_bytes += tensor.len() as u64;
            self.stats.fetched_total += tensor.len() as u64;
            if let Some(slot) = self.slot_mut(key) {
                slot.tensor = Some(tensor.clone());
                slot.leases = 1;
            }
            self.apply(Event::Fetched { tensor: key });
            fetch.lease.push(tensor);
            fetch.missing.push(vacancy);
        }
        self.supply(&mut fetch.missing);
        (!fetch.missing.is_empty()).then_some(fetch)
    }

    fn most_wanted(&self) -> Option<TensorKey> {
        let readable = |key: &TensorKey| self.slot(*key).is_some_and(|slot| !slot.damaged);
        self.retention.wanted().find(readable)
    }

    /// A place for an absent tensor, if it is worth what has to go for it. What goes is added to `gone`.
    fn room_for_fetch(&mut self, key: TensorKey, gone: &mut Vec<TensorKey>) -> Option<Extent> {
        let worth = self.retention.log2_worth(key)?;
        loop {
            // What has to be free may change as tensors that share a page with the wanted one go.
            let needed = match self.room {
                Room::Paged(_) => self.bytes_needed_paged(key),
                Room::Segment(_) => self.slot(key)?.bytes as u64,
            };
            let shortage = needed.saturating_sub(self.free_bytes());
            if shortage == 0 {
                break;
            }
            let victims = prefetch::room(self.candidates(), shortage, worth)?;
            self.record(|| Logged::AskedFor { tensor: key, shortage, victims: victims.clone() });
            gone.extend(&victims);
            if !self.evict_all(victims) {
                return None;
            }
        }
        let mut placed: HashMap<TensorKey, Extent> = match self.room {
            Room::Paged(_) => self.claim_paged(&[key]),
            Room::Segment(_) => self.claim_segment(&[key]),
        }
        .ok()?;
        placed.remove(&key)
    }
}
