//! Which tensors host memory keeps, between the disk and a device that the host cannot address.
//!
//! The measure is the device's ([`crate::retention`]): worth per byte = expected uses × time saved at the next use. What
//! host memory saves is the time of the disk less that of the link.
//!
//! Tensors get in when they are read from disk, since their bytes pass through host memory anyway: into free memory, or
//! over what is worth clearly less. So a model that is larger than all of host memory, or a row of models in turn, does
//! not wash out what is there, and the part that is kept is found the next time.
//!
//! So the tiers are inclusive: what a device has may be here too. The other way, to copy back what a device evicts and to
//! keep nothing else, would take the link twice and hold up the request for which room is made; in the simulator
//! (`docs/measurements/2026-11-simulator.md`) it hardly exposes less even with copies back that cost nothing, because what was
//! found on the device at its last use counts for less here ([`STAYS`]): likely it will be found there again.
//!
//! Learns the events of a device's retention. Never frees anything: it answers, the pool carries it out.

use crate::eviction::Candidate;
use crate::prefetch;
use crate::retention::{Event, HOST_SHARE, Retention, TensorKey};

/// Doublings of worth that a tensor has less while it stays on the device. Everything that is on the device must not count
/// for less: what has just been loaded is what is evicted soon.
const STAYS: f64 = -4.0;

#[derive(Clone, Copy, Debug, Default)]
struct Known {
    hosted: bool,
    on_device: bool,
    /// It is on the device, and its last use found it there: likely so will the next.
    stays: bool,
    expected: f64,
    /// What was appraised.
    from_disk: Option<f64>,
    from_host: Option<f64>,
}

/// Demand and worth of every catalogued tensor as host memory sees them.
#[derive(Debug, Default)]
pub struct HostRetention {
    /// What is in host memory is idle here, everything else absent.
    retention: Retention,
    known: Vec<Known>,
}

impl HostRetention {
    /// Nothing is catalogued.
    pub fn new() -> Self {
        Self::default()
    }

    /// Learns an event of a device whose tensors these are.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Catalogued { tensor, .. } => {
                let index = tensor.0 as usize;
                if self.known.len() <= index {
                    self.known.resize(index + 1, Known::default());
                }
                self.retention.apply(event);
            }
            Event::Forgotten { tensor } => {
                self.set_hosted(tensor, false);
                self.retention.apply(event);
                self.known[tensor.0 as usize] = Known::default();
            }
            Event::Leased { tensor, at } => {
                self.change(tensor, |known| known.stays = std::mem::replace(&mut known.on_device, true));
                self.retention.apply(Event::Used { tensor, at });
            }
            Event::Fetched { tensor } => self.change(tensor, |known| known.on_device = true),
            Event::Evicted { tensor } => {
                self.change(tensor, |known| (known.on_device, known.stays) = (false, false));
            }
            Event::Expected { tensor, log2 } => self.change(tensor, |known| known.expected = log2),
            Event::Used { .. } => self.retention.apply(event),
            Event::Idle { .. } => {}
            Event::Appraised { tensor, seconds } => {
                self.revalue(tensor, |known| known.from_disk = Some(seconds));
            }
            Event::AppraisedFromHost { tensor, seconds } => {
                self.revalue(tensor, |known| known.from_host = Some(seconds));
            }
            Event::Hosted { tensor, hosted } => self.set_hosted(tensor, hosted),
        }
    }

    /// Whether host memory was said to have a tensor.
    pub fn has(&self, tensor: TensorKey) -> bool {
        self.known.get(tensor.0 as usize).is_some_and(|known| known.hosted)
    }

    /// What goes so that `shortage` bytes become free for a tensor that is about to be read from disk; `None` if it is
    /// not worth that. `size` says how many bytes a tensor's going would free, and `None` of one that cannot go now.
    pub fn room(
        &self,
        tensor: TensorKey,
        shortage: u64,
        size: impl Fn(TensorKey) -> Option<u64>,
    ) -> Option<Vec<TensorKey>> {
        let worth = self.retention.log2_worth(tensor)?;
        prefetch::room(self.candidates(size), shortage, worth)
    }

    /// What is in host memory, least worth first, with what each one's going would free.
    pub fn candidates(&self, size: impl Fn(TensorKey) -> Option<u64>) -> impl Iterator<Item = Candidate> {
        self.retention.idle().filter_map(move |tensor| {
            let log2_worth = self.retention.log2_worth(tensor)?;
            Some(Candidate { tensor, bytes: size(tensor)?, log2_worth })
        })
    }

    fn set_hosted(&mut self, tensor: TensorKey, hosted: bool) {
        let Some(known) = self.known.get_mut(tensor.0 as usize) else { return };
        match (std::mem::replace(&mut known.hosted, hosted), hosted) {
            (false, true) => {
                self.retention.apply(Event::Fetched { tensor });
                self.retention.apply(Event::Idle { tensor });
            }
            (true, false) => self.retention.apply(Event::Evicted { tensor }),
            _ => {}
        }
    }

    /// Changes what is expected of a tensor.
    fn change(&mut self, tensor: TensorKey, change: impl FnOnce(&mut Known)) {
        let Some(known) = self.known.get_mut(tensor.0 as usize) else { return };
        change(known);
        let log2 = known.expected + if known.stays { STAYS } else { 0.0 };
        self.retention.apply(Event::Expected { tensor, log2 });
    }

    /// Changes what is known of a tensor's cost, and its worth with it.
    fn revalue(&mut self, tensor: TensorKey, change: impl FnOnce(&mut Known)) {
        let Some(known) = self.known.get_mut(tensor.0 as usize) else { return };
        change(known);
        let &mut Known { from_disk, from_host, .. } = known;
        if let Some(from_disk) = from_disk {
            let seconds = from_disk - from_host.unwrap_or(from_disk * HOST_SHARE);
            self.retention.apply(Event::Appraised { tensor, seconds });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn key(i: u32) -> TensorKey {
        TensorKey(i)
    }

    /// Host memory that keeps what it is told to, of tensors of 1 MiB each.
    struct Host {
        retention: HostRetention,
        free: u64,
        hits: u64,
        now: f64,
    }

    impl Host {
        fn new(tensors: u32, room: u64) -> Host {
            let mut retention = HostRetention::new();
            for i in 0..tensors {
                retention.apply(Event::Catalogued { tensor: key(i), bytes: MIB, depth: 0.0 });
            }
            Host { retention, free: room * MIB, hits: 0, now: 0.0 }
        }

        /// A request needs these, and the device has none of them.
        fn request(&mut self, tensors: std::ops::Range<u32>) {
            self.now += 10.0;
            for tensor in tensors.clone().map(key) {
                self.retention.apply(Event::Leased { tensor, at: self.now });
            }
            for tensor in tensors.map(key) {
                if self.retention.has(tensor) {
                    self.hits += 1;
                } else if let Some(victims) =
                    self.retention.room(tensor, MIB.saturating_sub(self.free), |_| Some(MIB))
                {
                    for &tensor in &victims {
                        self.retention.apply(Event::Hosted { tensor, hosted: false });
                    }
                    self.free = self.free + victims.len() as u64 * MIB - MIB;
                    self.retention.apply(Event::Hosted { tensor, hosted: true });
                }
            }
        }
    }

    #[test]
    fn a_model_four_times_as_large_finds_a_quarter_of_itself_again() {
        let mut host = Host::new(40, 10);
        (0..20).for_each(|_| host.request(0..40));
        assert_eq!(host.hits, 19 * 10);
    }

    #[test]
    fn what_is_asked_for_more_often_takes_the_place() {
        let mut host = Host::new(20, 10);
        (0..3).for_each(|_| host.request(0..10));
        assert_eq!(host.hits, 20);
        (0..8).for_each(|_| host.request(10..20));
        let before = host.hits;
        host.request(10..20);
        assert_eq!(host.hits - before, 10);
        host.request(0..10);
        assert_eq!(host.hits - before, 10, "nothing of the other is left");
    }

    #[test]
    fn what_saves_least_goes_first() {
        let mut host = HostRetention::new();
        for tensor in (0..4).map(key) {
            host.apply(Event::Catalogued { tensor, bytes: MIB, depth: 0.0 });
            host.apply(Event::Leased { tensor, at: 0.0 });
            host.apply(Event::Hosted { tensor, hosted: true });
            host.apply(Event::Appraised { tensor, seconds: 1e-3 });
        }
        // The link to this one is hardly faster than the disk.
        host.apply(Event::AppraisedFromHost { tensor: key(2), seconds: 0.9e-3 });
        let order = |host: &HostRetention| -> Vec<u32> {
            host.candidates(|_| Some(MIB)).map(|candidate| candidate.tensor.0).collect()
        };
        assert_eq!(order(&host), [2, 0, 1, 3]);
        host.apply(Event::Leased { tensor: key(3), at: 0.0 });
        assert_eq!(order(&host), [2, 3, 0, 1], "it was found on the device, so it stays there");
        host.apply(Event::Evicted { tensor: key(3) });
        assert_eq!(order(&host), [2, 0, 1, 3], "it did not");
        host.apply(Event::Expected { tensor: key(2), log2: 6.0 });
        host.apply(Event::Forgotten { tensor: key(3) });
        assert_eq!(order(&host), [0, 1, 2]);
        assert!(!host.has(key(3)));
        let only = |tensor: TensorKey| (tensor != key(0)).then_some(MIB);
        assert_eq!(host.candidates(only).count(), 2, "what cannot go now is not offered");
    }

    proptest! {
        /// Room is never more than there is, whatever is asked for.
        #[test]
        fn the_budget_holds(requests in proptest::collection::vec((0u32..30, 1u32..15), 1..80), room in 0u64..20) {
            let mut host = Host::new(45, room);
            for (first, len) in requests {
                host.request(first..first + len);
                let held = (0..45).filter(|&i| host.retention.has(key(i))).count() as u64;
                prop_assert_eq!(held * MIB + host.free, room * MIB);
            }
        }
    }
}
