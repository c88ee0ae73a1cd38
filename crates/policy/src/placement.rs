//! Where a request starts, and which of the waiting ones does: by predicted start time, not by bytes alone.
//!
//! Cost of a device = wait for it + exposed stall there + a share of the damage that the eviction does to later
//! requests. A request may wait for a busy device that already has its weights, but only for a bounded time, and a
//! request may be overtaken by ones that can start more cheaply, but only [`MAX_OVERTAKES`] times, so nobody starves.
//! The form is that of the Tangram authors' second generation; their weight of the damage is 0.1 and their bound on the
//! wait 150 ms. Ours are larger, because our damage counts what an eviction really costs (a reload if the tensor is used
//! within about [`crate::retention::DAMAGE_HORIZON`] requests), and because waiting is charged in full, so a long
//! wait is chosen only where loading would take longer. Chosen by simulation over 32 workloads on 1 to 8 devices.

use crate::admission::MAX_OVERTAKES;

/// Weight of the damage to later requests, in their seconds per second of this request.
pub const DAMAGE_WEIGHT: f64 = 1.0;

/// Longest predicted wait, in seconds, for a busy device that would be better than the best idle one; also the longest
/// that a request is held back for that.
pub const AFFINITY_WAIT: f64 = 1.0;

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
    /// Whether the weights and the KV of the whole answer fit there together.
    pub fits: bool,
}

impl Candidate {
    /// Predicted cost in seconds.
    pub fn cost(&self) -> f64 {
        self.wait + self.stall + DAMAGE_WEIGHT * self.damage
    }
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

/// Chooses a device for a request that has been waiting for `waited` seconds. Ties go to the candidate named first.
pub fn place(candidates: &[Candidate], waited: f64) -> Placement {
    let best = |idle: bool| {
        let of = candidates.iter().filter(|candidate| candidate.fits && (candidate.wait <= 0.0) == idle);
        of.min_by(|a, b| a.cost().total_cmp(&b.cost()))
    };
    match (best(true), best(false)) {
        (Some(idle), Some(busy))
            if busy.cost() + HYSTERESIS <= idle.cost()
                && busy.wait <= AFFINITY_WAIT
                && waited < AFFINITY_WAIT =>
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
        Candidate { device, wait, stall, damage: 0.0, fits: true }
    }

    #[test]
    fn the_cheapest_idle_device() {
        let expensive = Candidate { damage: 5.0 / DAMAGE_WEIGHT, ..candidate(1, 0.0, 0.2) };
        let placement = place(&[candidate(0, 0.0, 0.5), expensive, candidate(2, 0.0, 0.6)], 0.0);
        assert_eq!(placement, Placement::Start { device: 0, cost: 0.5 });
        let tight = Candidate { fits: false, ..candidate(0, 0.0, 0.0) };
        assert_eq!(place(&[tight], 0.0), Placement::Never);
    }

    #[test]
    fn waiting_for_the_weights_is_bounded() {
        let (idle, start) = (candidate(0, 0.0, 2.5), Placement::Start { device: 0, cost: 2.5 });
        let near = candidate(1, AFFINITY_WAIT * 0.9, 0.0);
        assert_eq!(place(&[idle, near], 0.0), Placement::Wait { device: 1 });
        assert_eq!(place(&[idle, near], AFFINITY_WAIT), start, "it has waited long enough");
        assert_eq!(
            place(&[idle, candidate(1, AFFINITY_WAIT * 1.1, 0.0)], 0.0),
            start,
            "the wait would be too long"
        );
        let hardly = candidate(1, AFFINITY_WAIT * 0.9, 2.5 - AFFINITY_WAIT * 0.9 - HYSTERESIS / 2.0);
        assert_eq!(place(&[idle, hardly], 0.0), start, "hardly better");
        assert_eq!(place(&[candidate(1, 9.0, 0.0)], 1.0), Placement::Wait { device: 1 });
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
