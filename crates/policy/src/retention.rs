//! Which resident tensors are worth their place: worth per byte, and the order of eviction that follows from it.
//!
//! worth per byte = expected uses per second × time saved per byte if resident at the next use × exposure.
//! - Uses are counted per tensor over all models that share it and decay with a half-life. The logarithm of the
//!   decayed count is kept relative to time zero ("forward decay", Cormode et al. 2009), so that the order between two
//!   tensors does not change while neither is used and an ordered set suffices: O(log n) per decision.
//! - Time saved per byte = 1/bandwidth of the tier it would come back from + a fixed cost per tensor / its bytes. What
//!   host memory has too ([`Event::Hosted`], decided by [`crate::host`]) is cheaper to bring back, so it goes earlier than
//!   an equal one that is only on disk.
//! - Exposure falls with the layer: what comes late in the forward pass can be loaded behind the computation of what
//!   comes early, so its absence costs less. Until somebody who knows the model's timing says what a tensor's absence
//!   would expose ([`Event::Appraised`], computed by [`crate::stall`]), its depth stands in for that.
//! - A forecast may say that a tensor's use is likelier or unlikelier just now than its history says
//!   ([`Event::Expected`]): somebody waits for it, or [`crate::prefetch`] has seen the pattern.
//!
//! The same order, turned round, says which absent tensor would be worth most: what to prefetch.
//!
//! Never holds a pointer and never frees anything: it answers who should go next, the pool carries it out.

mod order;

use serde::{Deserialize, Serialize};

use order::{CohortKey, Order, Side};

/// Dense key of a catalogued tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TensorKey(pub u32);

/// Seconds in which the remembered demand for a tensor halves.
const HALF_LIFE_SECONDS: f64 = 600.0;

/// Bytes per second of the disk, until somebody appraises. Only ratios between tensors matter.
const TIER_BYTES_PER_SECOND: f64 = 2e9;

/// Seconds that bringing in one tensor costs beside its bytes (request, mapping).
const TENSOR_SECONDS: f64 = 20e-6;

/// What bringing a tensor in from host memory takes of what it takes from disk, until somebody appraises: a PCIe link
/// against a fast disk.
pub(crate) const HOST_SHARE: f64 = 0.1;

/// Part of the last layer's load time that the pipeline is expected to hide; the first layer's is never hidden.
const HIDDEN_AT_THE_END: f64 = 0.5;

/// Requests within which a use has to come for its tensor's eviction to count as damage: about as long as an evicted
/// tensor would otherwise have stayed.
pub const DAMAGE_HORIZON: f64 = 30.0;

/// Everything that the retention state learns, in order. A log of these replays to the same state.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// A tensor is catalogued, or another model with it is: `depth` is its place in that model's forward pass, from
    /// 0 (needed first) to 1 (needed last). The smallest depth counts.
    Catalogued {
        /// Which tensor.
        tensor: TensorKey,
        /// Its size.
        bytes: u64,
        /// Its place in the forward pass.
        depth: f64,
    },
    /// No model has the tensor any more; it must not be resident.
    Forgotten {
        /// Which tensor.
        tensor: TensorKey,
    },
    /// A request uses the tensor and holds a lease on it (its first); it becomes resident if it was not.
    Leased {
        /// Which tensor.
        tensor: TensorKey,
        /// Seconds since any fixed moment.
        at: f64,
    },
    /// A further lease-worthy use by a request that finds the tensor leased already, or one that leaves it where it is.
    Used {
        /// Which tensor.
        tensor: TensorKey,
        /// Seconds.
        at: f64,
    },
    /// The last lease ended; the tensor may be evicted.
    Idle {
        /// Which tensor.
        tensor: TensorKey,
    },
    /// The tensor left the device.
    Evicted {
        /// Which tensor.
        tensor: TensorKey,
    },
    /// Somebody computed what the tensor's absence would cost; this replaces the estimate from its depth.
    Appraised {
        /// Which tensor.
        tensor: TensorKey,
        /// Seconds by which the next use would be delayed if only it were absent, above 0.
        seconds: f64,
    },
    /// As [`Event::Appraised`], for while host memory has the tensor.
    AppraisedFromHost {
        /// Which tensor.
        tensor: TensorKey,
        /// Seconds by which the next use would then be delayed if only it were absent, above 0.
        seconds: f64,
    },
    /// Host memory has the tensor from now on, or has it no longer.
    Hosted {
        /// Which tensor.
        tensor: TensorKey,
        /// Whether it has.
        hosted: bool,
    },
    /// A forecast for the tensor, in place of the one before.
    Expected {
        /// Which tensor.
        tensor: TensorKey,
        /// log2 of how much likelier its next use is than its demand so far says; 0 if nothing is known.
        log2: f64,
    },
    /// The absent tensor is being brought in although nobody has asked for it. That is no use; [`Event::Idle`] follows
    /// when it is there.
    Fetched {
        /// Which tensor.
        tensor: TensorKey,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Absent,
    Leased,
    Idle,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    bytes: u64,
    /// Seconds saved per byte times exposure, if it would come from disk...
    from_disk: f64,
    /// ...and from host memory, where that was appraised.
    from_host: Option<f64>,
    /// Whether host memory has it.
    hosted: bool,
    /// log2 of what is saved per byte.
    value: f64,
    /// Whether `value` was appraised and no longer follows from the depth.
    appraised: bool,
    depth: f64,
    state: State,
    /// Its history: log2 of the decayed number of uses, as seen from time 0 (−∞ if never used), and of the forecast's
    /// factor.
    cohort: CohortKey,
}

impl Entry {
    /// Seconds per byte that having it saves at its next use.
    fn saved(&self) -> f64 {
        match (self.hosted, self.from_host) {
            (false, _) => self.from_disk,
            (true, Some(seconds)) => seconds,
            (true, None) => self.from_disk * HOST_SHARE,
        }
    }

    fn per_byte(&self, seconds: f64) -> f64 {
        (seconds / self.bytes.max(1) as f64).max(f64::MIN_POSITIVE)
    }
}

/// Demand and residency of every catalogued tensor, and the order in which idle ones should go.
#[derive(Debug)]
pub struct Retention {
    half_life: f64,
    entries: Vec<Option<Entry>>,
    /// Idle tensors, and absent ones that have been used.
    order: Order,
    idle_bytes: u64,
    /// The last sum of demands and what it was of.
    last_sum: ((f64, f64), f64),
}

/// log2(2^a + 2^b) without overflow, however long the process has been running.
fn log2_sum(a: f64, b: f64) -> f64 {
    let (high, low) = if a > b { (a, b) } else { (b, a) };
    if high == f64::NEG_INFINITY { high } else { high + (low - high).exp2().ln_1p() / std::f64::consts::LN_2 }
}

impl Default for Retention {
    fn default() -> Self {
        Self::with_half_life(HALF_LIFE_SECONDS)
    }
}

impl Retention {
    /// Nothing is catalogued.
    pub fn new() -> Self {
        Self::default()
    }

    /// Nothing is catalogued; remembered demand halves in `seconds` (above 0; infinite for never).
    pub fn with_half_life(seconds: f64) -> Self {
        Retention {
            half_life: seconds,
            entries: Vec::new(),
            order: Order::default(),
            idle_bytes: 0,
            last_sum: ((0.0, 0.0), 1.0),
        }
    }

    /// Learns an event. Events that contradict the state (evicting a leased tensor, say) are programming errors and
    /// panic in debug builds; in release builds they are ignored, which leaves the tensor where it is.
    pub fn apply(&mut self, event: Event) {
        match event {
            Event::Catalogued { tensor, bytes, depth } => self.catalogue(tensor, bytes, depth),
            Event::Forgotten { tensor } => {
                debug_assert!(matches!(self.entry(tensor), Some(Entry { state: State::Absent, .. })));
                self.unlist(tensor);
                if let Some(entry) = self.entries.get_mut(tensor.0 as usize).and_then(Option::take) {
                    self.order.leave(entry.cohort);
                }
            }
            Event::Leased { tensor, at } => {
                self.unlist(tensor);
                self.set_state(tensor, State::Leased);
                self.count_use(tensor, at);
            }
            Event::Used { tensor, at } => {
                self.unlist(tensor);
                self.count_use(tensor, at);
                self.list(tensor);
            }
            Event::Fetched { tensor } => {
                debug_assert!(matches!(self.entry(tensor), Some(Entry { state: State::Absent, .. })));
                self.unlist(tensor);
                self.set_state(tensor, State::Leased);
            }
            Event::Idle { tensor } => {
                debug_assert!(matches!(self.entry(tensor), Some(Entry { state: State::Leased, .. })));
                self.set_state(tensor, State::Idle);
                self.list(tensor);
            }
            Event::Evicted { tensor } => {
                self.unlist(tensor);
                self.set_state(tensor, State::Absent);
                self.list(tensor);
            }
            Event::Appraised { tensor, seconds } => self.revalue(tensor, |entry| {
                entry.from_disk = entry.per_byte(seconds);
                entry.appraised = true;
            }),
            Event::AppraisedFromHost { tensor, seconds } => {
                self.revalue(tensor, |entry| entry.from_host = Some(entry.per_byte(seconds)));
            }
            Event::Hosted { tensor, hosted } => self.revalue(tensor, |entry| entry.hosted = hosted),
            Event::Expected { tensor, log2 } => {
                let Some((demand, expected)) = self.history(tensor) else { return };
                if expected != log2 {
                    self.unlist(tensor);
                    self.rejoin(tensor, demand, log2);
                    self.list(tensor);
                }
            }
        }
    }

    /// The idle tensor that is worth least per byte; ties go to the lower key.
    pub fn least_worth(&self) -> Option<TensorKey> {
        self.idle().next()
    }

    /// All idle resident tensors, the one that is worth least per byte first.
    pub fn idle(&self) -> impl Iterator<Item = TensorKey> {
        self.order.iter(Side::Idle)
    }

    /// Bytes of all idle resident tensors.
    pub fn idle_bytes(&self) -> u64 {
        self.idle_bytes
    }

    /// The absent tensor that would be worth most per byte, of those used before; ties go to the higher key.
    pub fn most_wanted(&self) -> Option<TensorKey> {
        self.wanted().next()
    }

    /// All absent tensors that have been used, the one that would be worth most per byte first.
    pub fn wanted(&self) -> impl Iterator<Item = TensorKey> {
        self.order.iter(Side::Absent)
    }

    /// log2 of a tensor's worth per byte in seconds saved per byte, times the uses remembered at time 0: comparable
    /// between tensors at any time. −∞ for one that was never used; `None` for one that is not catalogued.
    pub fn log2_worth(&self, tensor: TensorKey) -> Option<f64> {
        let entry = self.entry(tensor)?;
        let (demand, expected) = self.order.history(entry.cohort);
        Some(demand + expected + entry.value)
    }

    /// What evicting the idle tensors that are worth least, `bytes` of them, would cost at time `now`, in seconds:
    /// the sum of what each saves at its next use, times the probability that this use comes within about
    /// [`DAMAGE_HORIZON`] requests if it has its share of `requests`, the decayed number of all requests so far.
    /// Takes as many steps as tensors would go, or until the sum is above `limit`, beyond which the caller does not care.
    pub fn damage(&self, bytes: u64, requests: f64, now: f64, limit: f64) -> f64 {
        let (mut left, mut damage) = (bytes, 0.0);
        // Tensors of one model mostly have the same demand and stand together.
        let (mut demand, mut soon) = (f64::NAN, 0.0);
        for tensor in self.idle() {
            if left == 0 || damage > limit {
                break;
            }
            let Some(entry) = self.entry(tensor) else { continue };
            let (its_demand, _) = self.order.history(entry.cohort);
            if its_demand != demand {
                demand = its_demand;
                let share = ((demand - now / self.half_life).exp2() / requests.max(1.0)).min(1.0);
                soon = share / (share + (1.0 - share) / DAMAGE_HORIZON);
            }
            damage += soon * entry.saved() * entry.bytes as f64;
            left = left.saturating_sub(entry.bytes);
        }
        damage
    }

    fn entry(&self, tensor: TensorKey) -> Option<&Entry> {
        self.entries.get(tensor.0 as usize)?.as_ref()
    }

    fn entry_mut(&mut self, tensor: TensorKey) -> Option<&mut Entry> {
        self.entries.get_mut(tensor.0 as usize)?.as_mut()
    }

    fn catalogue(&mut self, tensor: TensorKey, bytes: u64, depth: f64) {
        let index = tensor.0 as usize;
        if self.entries.len() <= index {
            self.entries.resize(index + 1, None);
        }
        if self.entries[index].is_none() {
            self.entries[index] = Some(Entry {
                bytes,
                from_disk: 1.0,
                from_host: None,
                hosted: false,
                value: 0.0,
                appraised: false,
                depth: 1.0,
                state: State::Absent,
                cohort: self.order.join(f64::NEG_INFINITY, 0.0),
            });
        }
        self.revalue(tensor, |entry| {
            entry.depth = entry.depth.min(depth.clamp(0.0, 1.0));
            if !entry.appraised {
                let seconds_per_byte =
                    1.0 / TIER_BYTES_PER_SECOND + TENSOR_SECONDS / entry.bytes.max(1) as f64;
                entry.from_disk = seconds_per_byte * (1.0 - HIDDEN_AT_THE_END * entry.depth);
            }
        });
    }

    /// Changes what a tensor is worth, and its place in the order with it.
    fn revalue(&mut self, tensor: TensorKey, change: impl FnOnce(&mut Entry)) {
        self.unlist(tensor);
        if let Some(entry) = self.entry_mut(tensor) {
            change(entry);
            entry.value = entry.saved().log2();
        }
        self.list(tensor);
    }

    fn count_use(&mut self, tensor: TensorKey, at: f64) {
        let now = at / self.half_life;
        let Some((old, expected)) = self.history(tensor) else { return };
        // The tensors of a model mostly have the same history, one after the other.
        let (of, sum) = self.last_sum;
        let sum = if of == (now, old) { sum } else { log2_sum(now, old) };
        self.last_sum = ((now, old), sum);
        self.rejoin(tensor, sum, expected);
    }

    fn history(&self, tensor: TensorKey) -> Option<(f64, f64)> {
        self.entry(tensor).map(|entry| self.order.history(entry.cohort))
    }

    /// Gives a tensor, which must not be listed, another history.
    fn rejoin(&mut self, tensor: TensorKey, demand: f64, expected: f64) {
        let Some(Some(entry)) = self.entries.get_mut(tensor.0 as usize) else { return };
        let before = std::mem::replace(&mut entry.cohort, self.order.join(demand, expected));
        self.order.leave(before);
    }

    /// Takes a tensor out of the order that it is in.
    fn unlist(&mut self, tensor: TensorKey) {
        let Some(&Entry { state, bytes, value, cohort, .. }) = self.entry(tensor) else { return };
        match state {
            State::Idle => {
                self.idle_bytes -= bytes;
                self.order.remove(cohort, Side::Idle, value, tensor);
            }
            State::Absent => self.order.remove(cohort, Side::Absent, value, tensor),
            State::Leased => {}
        }
    }

    /// Puts a tensor into the order where it belongs, if any.
    fn list(&mut self, tensor: TensorKey) {
        let Some(&Entry { state, bytes, value, cohort, .. }) = self.entry(tensor) else { return };
        match state {
            State::Idle => {
                self.idle_bytes += bytes;
                self.order.insert(cohort, Side::Idle, value, tensor);
            }
            State::Absent if self.order.history(cohort).0 > f64::NEG_INFINITY => {
                self.order.insert(cohort, Side::Absent, value, tensor);
            }
            State::Absent | State::Leased => {}
        }
    }

    fn set_state(&mut self, tensor: TensorKey, state: State) {
        if let Some(entry) = self.entry_mut(tensor) {
            entry.state = state;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(i: u32) -> TensorKey {
        TensorKey(i)
    }

    fn with_idle(tensors: &[(u64, f64, &[f64])]) -> Retention {
        let mut retention = Retention::new();
        for (i, &(bytes, depth, uses)) in tensors.iter().enumerate() {
            let tensor = key(i as u32);
            retention.apply(Event::Catalogued { tensor, bytes, depth });
            for &at in uses {
                retention.apply(Event::Leased { tensor, at });
                retention.apply(Event::Idle { tensor });
            }
        }
        retention
    }

    fn eviction_order(mut retention: Retention) -> Vec<u32> {
        let mut order = Vec::new();
        while let Some(tensor) = retention.least_worth() {
            retention.apply(Event::Evicted { tensor });
            order.push(tensor.0);
        }
        assert_eq!(retention.idle_bytes(), 0);
        order
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn rarely_used_goes_first() {
        let retention =
            with_idle(&[(MIB, 0.5, &[0.0, 1.0, 2.0]), (MIB, 0.5, &[2.0]), (MIB, 0.5, &[1.0, 2.0])]);
        assert_eq!(eviction_order(retention), [1, 2, 0]);
    }

    #[test]
    fn old_demand_decays() {
        // Three uses four half-lives ago are worth 3/16 of a use now.
        let retention = with_idle(&[(MIB, 0.5, &[0.0, 0.0, 0.0]), (MIB, 0.5, &[4.0 * HALF_LIFE_SECONDS])]);
        assert_eq!(eviction_order(retention), [0, 1]);
        let retention = with_idle(&[(MIB, 0.5, &[0.0, 0.0, 0.0]), (MIB, 0.5, &[1.0 * HALF_LIFE_SECONDS])]);
        assert_eq!(eviction_order(retention), [1, 0]);
    }

    #[test]
    fn tail_layers_go_before_front_layers() {
        let retention = with_idle(&[(MIB, 0.0, &[0.0]), (MIB, 1.0, &[0.0]), (MIB, 0.5, &[0.0])]);
        assert_eq!(eviction_order(retention), [1, 2, 0]);
    }

    #[test]
    fn per_byte_small_tensors_are_dearer_to_bring_back() {
        let retention = with_idle(&[(64 * MIB, 0.5, &[0.0]), (1024, 0.5, &[0.0])]);
        assert_eq!(eviction_order(retention), [0, 1]);
    }

    #[test]
    fn a_model_that_needs_it_earlier_raises_a_shared_tensor() {
        let mut retention = with_idle(&[(MIB, 0.9, &[0.0]), (MIB, 0.5, &[0.0])]);
        retention.apply(Event::Catalogued { tensor: key(0), bytes: MIB, depth: 0.1 });
        assert_eq!(eviction_order(retention), [1, 0]);
    }

    #[test]
    fn an_appraisal_replaces_the_guess_from_the_depth() {
        let mut retention = with_idle(&[(MIB, 0.0, &[0.0]), (MIB, 1.0, &[0.0])]);
        retention.apply(Event::Appraised { tensor: key(0), seconds: 1e-6 });
        retention.apply(Event::Appraised { tensor: key(1), seconds: 2e-6 });
        retention.apply(Event::Catalogued { tensor: key(0), bytes: MIB, depth: 0.0 });
        let soon = 0.5 / (0.5 + 0.5 / DAMAGE_HORIZON);
        let cost = retention.damage(2 * MIB, 2.0, 0.0, f64::INFINITY);
        assert!(retention.damage(2 * MIB, 2.0, 0.0, 0.0) < cost, "it stops at the limit");
        assert!((cost - soon * 3e-6).abs() < 1e-12, "{cost}");
        assert!((retention.damage(1, 1.0, HALF_LIFE_SECONDS, f64::INFINITY) - soon * 1e-6).abs() < 1e-12);
        assert_eq!(eviction_order(retention), [0, 1]);
    }

    #[test]
    fn what_host_memory_has_too_goes_first() {
        let mut retention = with_idle(&[(MIB, 0.5, &[0.0, 0.0]), (MIB, 0.5, &[0.0])]);
        retention.apply(Event::Hosted { tensor: key(0), hosted: true });
        assert_eq!(retention.least_worth(), Some(key(0)), "although it is used more");
        retention.apply(Event::AppraisedFromHost { tensor: key(0), seconds: 1.0 });
        assert_eq!(retention.least_worth(), Some(key(1)), "that link is slower than the disk");
        retention.apply(Event::AppraisedFromHost { tensor: key(0), seconds: 1e-9 });
        retention.apply(Event::Hosted { tensor: key(0), hosted: false });
        assert_eq!(eviction_order(retention), [1, 0]);
    }

    #[test]
    fn a_forecast_moves_a_tensor_and_goes_again() {
        let mut retention = with_idle(&[(MIB, 0.5, &[0.0]), (MIB, 0.5, &[0.0, 0.0, 0.0])]);
        retention.apply(Event::Expected { tensor: key(0), log2: 3.0 });
        assert_eq!(retention.least_worth(), Some(key(1)));
        retention.apply(Event::Expected { tensor: key(0), log2: 0.0 });
        assert_eq!(eviction_order(retention), [0, 1]);
    }

    #[test]
    fn absent_tensors_are_wanted_in_the_order_of_worth() {
        let mut retention = with_idle(&[(MIB, 0.5, &[0.0]), (MIB, 0.5, &[0.0, 0.0]), (MIB, 0.5, &[])]);
        assert_eq!(retention.most_wanted(), None);
        retention.apply(Event::Evicted { tensor: key(0) });
        retention.apply(Event::Evicted { tensor: key(1) });
        assert_eq!(retention.wanted().collect::<Vec<_>>(), [key(1), key(0)]);
        retention.apply(Event::Fetched { tensor: key(1) });
        assert_eq!((retention.most_wanted(), retention.least_worth()), (Some(key(0)), None));
        retention.apply(Event::Idle { tensor: key(1) });
        assert_eq!(retention.least_worth(), Some(key(1)));
        assert!(retention.log2_worth(key(1)) > retention.log2_worth(key(0)));
        retention.apply(Event::Forgotten { tensor: key(0) });
        assert_eq!((retention.most_wanted(), retention.log2_worth(key(0))), (None, None));
    }

    #[test]
    fn without_decay_only_the_number_of_uses_counts() {
        let mut retention = Retention::with_half_life(f64::INFINITY);
        for (tensor, uses) in [(key(0), &[0.0, 0.0][..]), (key(1), &[1e6])] {
            retention.apply(Event::Catalogued { tensor, bytes: MIB, depth: 0.0 });
            for &at in uses {
                retention.apply(Event::Leased { tensor, at });
                retention.apply(Event::Idle { tensor });
            }
        }
        assert_eq!(eviction_order(retention), [1, 0]);
    }

    #[test]
    fn leased_tensors_are_never_offered() {
        let mut retention = with_idle(&[(MIB, 0.5, &[0.0]), (MIB, 0.5, &[0.0, 1.0])]);
        retention.apply(Event::Leased { tensor: key(0), at: 2.0 });
        assert_eq!(retention.least_worth(), Some(key(1)));
        retention.apply(Event::Evicted { tensor: key(1) });
        assert_eq!(retention.least_worth(), None);
    }

    #[test]
    fn demand_survives_eviction() {
        let mut retention = with_idle(&[(MIB, 0.5, &[0.0, 1.0, 2.0]), (MIB, 0.5, &[2.0])]);
        for tensor in [key(0), key(1)] {
            retention.apply(Event::Evicted { tensor });
            retention.apply(Event::Leased { tensor, at: 3.0 });
            retention.apply(Event::Idle { tensor });
        }
        assert_eq!(eviction_order(retention), [1, 0]);
    }

    #[test]
    fn years_of_uptime_do_not_overflow() {
        let retention = with_idle(&[(MIB, 0.5, &[1e9, 1e9]), (MIB, 0.5, &[1e9])]);
        assert_eq!(eviction_order(retention), [1, 0]);
    }

    /// The formula, computed directly: no cohorts, no order.
    #[derive(Clone, Copy)]
    struct Naive {
        bytes: u64,
        seconds: Option<f64>,
        from_host: Option<f64>,
        hosted: bool,
        depth: f64,
        demand: f64,
        expected: f64,
        state: State,
    }

    impl Naive {
        fn worth(&self) -> f64 {
            let bytes = self.bytes as f64;
            let tier = 1.0 / TIER_BYTES_PER_SECOND + TENSOR_SECONDS / bytes;
            let saved = match self.seconds {
                Some(seconds) => seconds / bytes,
                None => tier * (1.0 - HIDDEN_AT_THE_END * self.depth),
            };
            let saved = match (self.hosted, self.from_host) {
                (false, _) => saved,
                (true, Some(seconds)) => seconds / bytes,
                (true, None) => saved * HOST_SHARE,
            };
            self.demand + self.expected + saved.log2()
        }
    }

    proptest! {
        /// Whatever happens to 48 tensors, in groups that are used together or alone, both orders are those that
        /// sorting by worth gives.
        #[test]
        fn the_orders_are_those_of_a_naive_ranking(
            steps in proptest::collection::vec((0u32..12, 0u32..5, 0u8..12, 0.0f64..900.0), 1..250)
        ) {
            const TENSORS: u32 = 48;
            let mut retention = Retention::new();
            let mut naive: Vec<Naive> = (0..TENSORS)
                .map(|i| Naive {
                    bytes: 1000 * (1 + u64::from(i % 5)), seconds: None, from_host: None, hosted: false,
                    depth: f64::from(i % 4) / 3.0,
                    demand: f64::NEG_INFINITY, expected: 0.0, state: State::Absent,
                })
                .collect();
            for (i, known) in naive.iter().enumerate() {
                let tensor = key(i as u32);
                retention.apply(Event::Catalogued { tensor, bytes: known.bytes, depth: known.depth });
            }
            let mut now = 0.0;
            for (group, part, action, number) in steps {
                now += if action == 0 { number } else { 0.0 };
                // Four tensors together, or one of them.
                let of = group * 4..group * 4 + 4;
                for i in of.filter(|i| part == 4 || i % 4 == part) {
                    let (tensor, known) = (key(i), &mut naive[i as usize]);
                    let (event, state) = match (action, known.state) {
                        (0, State::Idle | State::Absent) => {
                            known.demand = log2_sum(now / HALF_LIFE_SECONDS, known.demand);
                            (Event::Leased { tensor, at: now }, State::Leased)
                        }
                        (0, State::Leased) => {
                            known.demand = log2_sum(now / HALF_LIFE_SECONDS, known.demand);
                            (Event::Used { tensor, at: now }, State::Leased)
                        }
                        (1 | 2, State::Leased) => (Event::Idle { tensor }, State::Idle),
                        (3 | 4, State::Idle) => (Event::Evicted { tensor }, State::Absent),
                        (5, State::Absent) => (Event::Fetched { tensor }, State::Leased),
                        (6, state) => {
                            known.expected = (number / 300.0).floor();
                            (Event::Expected { tensor, log2: known.expected }, state)
                        }
                        (7, state) => {
                            known.seconds = Some(1e-6 * (1.0 + number.floor()));
                            (Event::Appraised { tensor, seconds: known.seconds.unwrap() }, state)
                        }
                        (9, state) => {
                            known.hosted = number < 500.0;
                            (Event::Hosted { tensor, hosted: known.hosted }, state)
                        }
                        (10, state) => {
                            known.from_host = Some(1e-7 * (1.0 + number.floor()));
                            (Event::AppraisedFromHost { tensor, seconds: known.from_host.unwrap() }, state)
                        }
                        (11, state) => {
                            known.demand = log2_sum(now / HALF_LIFE_SECONDS, known.demand);
                            (Event::Used { tensor, at: now }, state)
                        }
                        (8, State::Absent) if number < 100.0 => {
                            retention.apply(Event::Forgotten { tensor });
                            (known.demand, known.expected, known.seconds) = (f64::NEG_INFINITY, 0.0, None);
                            (known.from_host, known.hosted) = (None, false);
                            (Event::Catalogued { tensor, bytes: known.bytes, depth: known.depth }, State::Absent)
                        }
                        _ => continue,
                    };
                    known.state = state;
                    retention.apply(event);
                }
                let worth = |tensor: &TensorKey| naive[tensor.0 as usize].worth();
                let sorted = |state: State| {
                    let of = |&i: &u32| {
                        let known = &naive[i as usize];
                        known.state == state && (state == State::Idle || known.demand > f64::NEG_INFINITY)
                    };
                    let mut all: Vec<TensorKey> = (0..TENSORS).filter(of).map(key).collect();
                    all.sort_by(|a, b| worth(a).total_cmp(&worth(b)).then(a.cmp(b)));
                    all
                };
                let (idle, mut absent) = (sorted(State::Idle), sorted(State::Absent));
                absent.reverse();
                for (order, expected) in [(retention.idle().collect::<Vec<_>>(), idle), (retention.wanted().collect(), absent)] {
                    let (mut a, mut b) = (order.clone(), expected.clone());
                    a.sort_unstable();
                    b.sort_unstable();
                    prop_assert_eq!(a, b);
                    for (a, b) in order.iter().zip(&expected) {
                        prop_assert_eq!(worth(a), worth(b));
                        prop_assert_eq!(retention.log2_worth(*a), Some(worth(a)));
                    }
                }
                let bytes = naive.iter().filter(|known| known.state == State::Idle).map(|known| known.bytes);
                prop_assert_eq!(retention.idle_bytes(), bytes.sum::<u64>());
            }
        }

        /// A recorded log replays to the same victims, and the order agrees with the formula computed directly.
        #[test]
        fn a_log_replays_to_the_same_decisions(
            steps in proptest::collection::vec((0u32..12, 0u8..4, 0.0f64..500.0), 1..200)
        ) {
            let mut log = Vec::new();
            let mut live = Retention::new();
            let mut state = [(false, false); 12];
            let mut victims = Vec::new();
            let mut now = 0.0;
            let mut record = |live: &mut Retention, event| { live.apply(event); log.push(event); };
            for i in 0..12 {
                let event = Event::Catalogued {
                    tensor: key(i), bytes: 1000 << i, depth: f64::from(i % 4) / 3.0
                };
                record(&mut live, event);
            }
            for (i, action, gap) in steps {
                now += gap;
                let tensor = key(i);
                let (resident, leased) = &mut state[i as usize];
                match action {
                    0 if !*leased => {
                        record(&mut live, Event::Leased { tensor, at: now });
                        (*resident, *leased) = (true, true);
                    }
                    1 if *leased => record(&mut live, Event::Used { tensor, at: now }),
                    2 if *leased => {
                        record(&mut live, Event::Idle { tensor });
                        *leased = false;
                    }
                    3 => if let Some(tensor) = live.least_worth() {
                        let (resident, leased) = &mut state[tensor.0 as usize];
                        prop_assert!(*resident && !*leased);
                        *resident = false;
                        victims.push(tensor);
                        record(&mut live, Event::Evicted { tensor });
                    }
                    _ => {}
                }
            }
            let mut replayed = Retention::new();
            let mut replayed_victims = Vec::new();
            for event in log {
                if let Event::Evicted { tensor } = event {
                    replayed_victims.push(replayed.least_worth().unwrap());
                    prop_assert_eq!(*replayed_victims.last().unwrap(), tensor);
                }
                replayed.apply(event);
            }
            prop_assert_eq!(replayed_victims, victims);
            prop_assert_eq!(replayed.idle_bytes(), live.idle_bytes());
        }
    }
}
