//! Where a request starts, and which of the waiting ones does: by predicted start time, not by bytes alone.
//!
//! Cost of a device = wait for it + exposed stall there + the damage that the eviction does to later requests + how
//! crowded the device would be with this model as one of its own. Damage looks at the next requests, crowding at the
//! long run: a model goes where it was last, so where a few models that do not fit together have once met they would
//! push each other out for ever, although another device has room ([`crowding`]).
//! A request may be overtaken by ones that can start more cheaply, but only [`MAX_OVERTAKES`] times. It may wait for a
//! busy device that already has its weights, while others start on the idle ones, and keeps that right when it has been
//! overtaken so often (then it is next on the device that it waits for), but not beyond [`HELD_OVERTAKES`]: then it
//! starts on an idle device. So nobody starves.
//! The form is that of the Tangram authors' second generation; their weight of the damage is 0.1, and a request is held
//! back for 150 ms after it came and no longer. Ours are larger, because our damage counts what an eviction really costs
//! (a reload if the tensor is used within about [`crate::retention::DAMAGE_HORIZON`] requests), and because waiting is
//! charged in full, so a long wait is chosen only where loading would take longer. A bound on the time since a request
//! came would end all waiting just where there is a queue, and there large models would be loaded on two devices at once.
//! Chosen by simulation over some 90 workloads on 1 to 8 devices.

use crate::admission::MAX_OVERTAKES;

/// Weight of the damage to later requests, in their seconds per second of this request.
pub const DAMAGE_WEIGHT: f64 = 1.0;

/// Uses for which a model is expected to stay where it is: so often what [`crowding`] costs per use counts.
pub const CROWDING_USES: f64 = 10.0;

/// Longest predicted wait, in seconds from now, for a busy device that would be better than the best idle one.
pub const AFFINITY_WAIT: f64 = 1.0;

/// How often later requests may start before one that waits for a busy device.
pub const HELD_OVERTAKES: u32 = 2 * MAX_OVERTAKES;

/// By how many seconds a busy device must beat the best idle one, or a later request an earlier one.
pub const HYSTERESIS: f64 = 0.025;

/// A device that a request could run on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Which.
    pub device: u32,
    /// Seconds until it is free, 0 if it is idle.
    pub wait: f64,
    /// Seconds of exposed stall there, loads in flight counted.
    pub stall: f64,
    /// Expected seconds that the eviction costs later requests.
    pub damage: f64,
    /// Expected seconds per use that the model's living there costs, it and the others ([`crowding`]).
    pub crowding: f64,
    /// Whether the weights and the KV of the whole answer fit there together.
    pub fits: bool,
}

impl Candidate {
    /// Predicted cost in seconds of running there this once.
    pub fn cost(&self) -> f64 {
        self.wait + self.stall + DAMAGE_WEIGHT * self.damage
    }

    /// Predicted cost in seconds of living there from now on.
    pub fn cost_of_living(&self) -> f64 {
        self.cost() + CROWDING_USES * self.crowding
    }
}

/// How often each model is asked for, over all devices: requests with exponential decay. Models are named by small
/// numbers.
#[derive(Debug)]
pub struct Popularity {
    half_life: f64,
    /// Decayed count of each model's requests, and when it was right, in seconds.
    counts: Vec<(f64, f64)>,
    all: (f64, f64),
}

impl Popularity {
    /// Requests that every model is taken to have had before anything is known.
    const PRIOR: f64 = 0.5;

    /// Nothing is known; counts halve in `half_life` seconds.
    pub fn new(half_life: f64) -> Self {
        Popularity { half_life, counts: Vec::new(), all: (0.0, 0.0) }
    }

    fn decayed(&self, (count, at): (f64, f64), now: f64) -> f64 {
        count * ((at - now) / self.half_life).exp2()
    }

    /// A request for `model` at `now` seconds.
    pub fn observe(&mut self, model: u32, now: f64) {
        if self.counts.len() <= model as usize {
            self.counts.resize(model as usize + 1, (0.0, now));
        }
        self.counts[model as usize] = (self.decayed(self.counts[model as usize], now) + 1.0, now);
        self.all = (self.decayed(self.all, now) + 1.0, now);
    }

    /// The share of all requests that ask for `model`; above 0.
    pub fn share(&self, model: u32, now: f64) -> f64 {
        let count = self.counts.get(model as usize).map_or(0.0, |&count| self.decayed(count, now));
        let models = self.counts.len().max(model as usize + 1) as f64;
        (count + Self::PRIOR) / (self.decayed(self.all, now) + models * Self::PRIOR)
    }
}

/// A model that lives on a device: it was used there last.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tenant {
    /// Its share of all requests, above 0.
    pub share: f64,
    /// Bytes of it whose absence a request would feel: all but what loads while the pass computes.
    pub felt_bytes: f64,
}

/// Seconds per request that tenants feel in the long run if they keep their places in the order of their shares: each
/// misses what of its felt bytes does not fit beside those of the more popular ones. A lower bound, because a model that
/// does not fit also pushes the others aside while it runs.
fn crowd(tenants: impl Iterator<Item = Tenant>, room: u64, bytes_per_second: f64) -> f64 {
    let (mut left, mut missing) = (room as f64, 0.0);
    for Tenant { share, felt_bytes } in tenants {
        let kept = felt_bytes.clamp(0.0, left);
        left -= kept;
        missing += share * (felt_bytes.max(0.0) - kept);
    }
    missing / bytes_per_second
}

/// Seconds that one use of a model costs in the long run, it and the others, if it lives on a device with `room` bytes
/// and a link of `bytes_per_second`, beside the tenants `others` in descending order of share. Takes a step per tenant.
pub fn crowding(model: Tenant, others: &[Tenant], room: u64, bytes_per_second: f64) -> f64 {
    let (before, after) = others.split_at(others.partition_point(|other| other.share >= model.share));
    let with = before.iter().chain([&model]).chain(after).copied();
    let without = others.iter().copied();
    (crowd(with, room, bytes_per_second) - crowd(without, room, bytes_per_second)).max(0.0) / model.share
}

/// What to do with a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Placement {
    /// Start it on this idle device, at this predicted cost in seconds.
    Start {
        /// Which.
        device: u32,
        /// Predicted cost in seconds.
        cost: f64,
    },
    /// Wait for this device: none is idle, or this busy one is worth waiting for.
    Wait {
        /// Which.
        device: u32,
    },
    /// It fits nowhere.
    Never,
}

/// Chooses a device for a request before which `overtaken` later ones have started. Ties go to the candidate named first.
pub fn place(candidates: &[Candidate], overtaken: u32) -> Placement {
    let best = |idle: bool| {
        let of = candidates.iter().filter(|candidate| candidate.fits && (candidate.wait <= 0.0) == idle);
        of.min_by(|a, b| a.cost_of_living().total_cmp(&b.cost_of_living()))
    };
    match (best(true), best(false)) {
        (Some(idle), Some(busy))
            if busy.cost_of_living() + HYSTERESIS <= idle.cost_of_living()
                && busy.wait <= AFFINITY_WAIT
                && overtaken < HELD_OVERTAKES =>
        {
            Placement::Wait { device: busy.device }
        }
        (Some(idle), _) => Placement::Start { device: idle.device, cost: idle.cost() },
        (None, Some(busy)) => Placement::Wait { device: busy.device },
        (None, None) => Placement::Never,
    }
}

/// A waiting request that could start now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Startable {
    /// Its place among all waiting ones, which are in order of arrival.
    pub position: usize,
    /// How often later ones have started before it.
    pub overtaken: u32,
    /// Predicted cost of starting it now, in seconds.
    pub cost: f64,
}

/// Which of the startable requests, given in order of arrival, starts next: the cheapest, unless an earlier one costs
/// hardly more or has been overtaken often enough. Gives an index into the list.
pub fn next_to_start(startable: &[Startable]) -> Option<usize> {
    let must = startable.iter().position(|request| request.overtaken >= MAX_OVERTAKES);
    let upto = must.map_or(startable.len(), |index| index + 1);
    if must == Some(0) {
        return Some(0);
    }
    // Whoever stands behind one that may not be overtaken any more has to wait for it.
    let cheapest = startable[..upto].iter().map(|request| request.cost).min_by(f64::total_cmp)?;
    startable[..upto].iter().position(|request| request.cost <= cheapest + HYSTERESIS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(device: u32, wait: f64, stall: f64) -> Candidate {
        Candidate { device, wait, stall, damage: 0.0, crowding: 0.0, fits: true }
    }

    #[test]
    fn the_cheapest_idle_device() {
        let expensive = Candidate { damage: 5.0 / DAMAGE_WEIGHT, ..candidate(1, 0.0, 0.2) };
        let placement = place(&[candidate(0, 0.0, 0.5), expensive, candidate(2, 0.0, 0.6)], 0);
        assert_eq!(placement, Placement::Start { device: 0, cost: 0.5 });
        let tight = Candidate { fits: false, ..candidate(0, 0.0, 0.0) };
        assert_eq!(place(&[tight], 0), Placement::Never);
    }

    #[test]
    fn popularity_decays_and_adds_up() {
        let mut popularity = Popularity::new(10.0);
        assert_eq!(popularity.share(3, 0.0), 0.25);
        (0..4).for_each(|_| popularity.observe(0, 0.0));
        popularity.observe(1, 20.0);
        let shares = [0, 1].map(|model| popularity.share(model, 20.0));
        assert!((shares[0] - shares[1]).abs() < 1e-9 && (shares[0] + shares[1] - 1.0).abs() < 1e-9);
        assert!(popularity.share(0, 30.0) > 0.4);
    }

    #[test]
    fn crowding_is_what_does_not_fit() {
        let tenant = |share, felt_bytes| Tenant { share, felt_bytes };
        let others = [tenant(0.4, 10.0), tenant(0.1, 20.0)];
        assert_eq!(crowding(tenant(0.2, 10.0), &others, 40, 1.0), 0.0);
        // The rare one loses five bytes, half as often.
        assert!((crowding(tenant(0.2, 10.0), &others, 35, 1.0) - 2.5).abs() < 1e-9);
        // The rarest loses its own.
        assert!((crowding(tenant(0.05, 10.0), &others, 35, 5.0) - 1.0).abs() < 1e-9);
        // A model that nobody feels crowds nobody.
        assert_eq!(crowding(tenant(0.2, -1.0), &others, 5, 1.0), 0.0);
    }

    #[test]
    fn a_model_moves_out_of_a_crowd_when_that_pays() {
        let home = Candidate { crowding: 0.2, ..candidate(0, 0.0, 0.0) };
        let away = |stall| candidate(1, 0.0, stall);
        assert_eq!(place(&[home, away(1.9)], 0), Placement::Start { device: 1, cost: 1.9 });
        assert_eq!(place(&[home, away(2.1)], 0), Placement::Start { device: 0, cost: 0.0 });
    }

    #[test]
    fn waiting_for_the_weights_is_bounded() {
        let (idle, start) = (candidate(0, 0.0, 2.5), Placement::Start { device: 0, cost: 2.5 });
        let near = candidate(1, AFFINITY_WAIT * 0.9, 0.0);
        for overtaken in [0, MAX_OVERTAKES, HELD_OVERTAKES - 1] {
            assert_eq!(place(&[idle, near], overtaken), Placement::Wait { device: 1 });
        }
        assert_eq!(place(&[idle, near], HELD_OVERTAKES), start, "it has been passed over often enough");
        assert_eq!(
            place(&[idle, candidate(1, AFFINITY_WAIT * 1.1, 0.0)], 0),
            start,
            "the wait would be too long"
        );
        let hardly = candidate(1, AFFINITY_WAIT * 0.9, 2.5 - AFFINITY_WAIT * 0.9 - HYSTERESIS / 2.0);
        assert_eq!(place(&[idle, hardly], 0), start, "hardly better");
        assert_eq!(place(&[candidate(1, 9.0, 0.0)], HELD_OVERTAKES), Placement::Wait { device: 1 });
    }

    #[test]
    fn cheap_requests_overtake_dear_ones_up_to_the_bound() {
        let startable = |overtaken, cost| Startable { position: 0, overtaken, cost };
        assert_eq!(next_to_start(&[]), None);
        assert_eq!(next_to_start(&[startable(0, 1.0), startable(0, 0.0)]), Some(1));
        assert_eq!(next_to_start(&[startable(0, 0.02), startable(0, 0.0)]), Some(0));
        assert_eq!(next_to_start(&[startable(MAX_OVERTAKES, 1.0), startable(0, 0.0)]), Some(0));
        let second_must = [startable(0, 1.0), startable(MAX_OVERTAKES, 0.5), startable(0, 0.0)];
        assert_eq!(next_to_start(&second_must), Some(1));
    }

    proptest! {
        /// Crowding is never negative, and more room never makes it worse than all of the model's and the others' bytes.
        #[test]
        fn crowding_is_bounded(
            mut others in proptest::collection::vec((0.01f64..1.0, 0.0f64..50.0), 0..8),
            own in (0.01f64..1.0, 0.0f64..50.0), room in 0u64..200
        ) {
            others.sort_by(|a, b| b.0.total_cmp(&a.0));
            let tenant = |&(share, felt_bytes): &(f64, f64)| Tenant { share, felt_bytes };
            let others: Vec<Tenant> = others.iter().map(tenant).collect();
            let seconds = crowding(tenant(&own), &others, room, 1.0);
            // What it takes from the others, each byte is worth no more than its own.
            prop_assert!((0.0..=own.1 + 1e-6).contains(&seconds), "{}", seconds);
        }

        #[test]
        fn nobody_is_overtaken_beyond_the_bound(costs in proptest::collection::vec(0.0f64..2.0, 1..120)) {
            let mut waiting: Vec<Startable> = costs
                .iter()
                .enumerate()
                .map(|(position, &cost)| Startable { position, overtaken: 0, cost })
                .collect();
            while let Some(next) = next_to_start(&waiting) {
                for request in &mut waiting[..next] {
                    request.overtaken += 1;
                    prop_assert!(request.overtaken <= MAX_OVERTAKES);
                }
                waiting.remove(next);
            }
            prop_assert!(waiting.is_empty());
        }
    }
}
