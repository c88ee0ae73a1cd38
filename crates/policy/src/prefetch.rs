//! Forecast: which models are likelier, or less likely, to be asked for next than their popularity says.
//!
//! Three experts watch the order of requests on a device:
//! - *popularity*: uses with exponential decay;
//! - *recency*: how often the next request went to the model used 0, 1, 2... models ago (a histogram of stack
//!   distances, Mattson et al. 1970), which sees bursts, cycles and any fixed reuse distance;
//! - *succession*: which model followed which, counted with decay.
//!
//! Their weights follow from how likely each found what then happened (Bayesian mixture with forgetting, Herbster and
//! Warmuth 1998). For every expert the *outlook* of a model is the discounted number of requests until its next use,
//! Σ γ^k·P(first use after k requests), so that what comes next weighs more than what comes sometime. The boost is
//! log2(outlook of the mixture / outlook by popularity); [`crate::Retention`] takes it as `Event::Expected`, and its
//! order then says both what to bring in when link and memory are idle (`most_wanted`) and what may go for it
//! (`least_worth`): never what is worth more.
//!
//! State is bounded per model; a request costs O([`WATCHED`]).

use std::collections::HashMap;

use crate::eviction::{self, Candidate};
use crate::retention::TensorKey;

/// Bytes brought in at a time where the processor that computes also copies. They are not given up, so a request that
/// comes meanwhile waits for no more than these.
pub const BATCH_BYTES: u64 = 4 << 20;

/// Something is brought in over others only if its worth per byte is this many doublings above each of theirs.
pub const MARGIN: f64 = 0.5;

/// Models whose recency is followed; ones used longer ago count as popular only.
pub const WATCHED: usize = 32;

/// Discount per request.
const DISCOUNT: f64 = 0.7;

/// Requests after which counts of the recency and succession experts have halved.
const HALF_LIFE_REQUESTS: f64 = 200.0;

/// Successors remembered per model.
const SUCCESSORS: usize = 16;

/// Weight of popularity in a model's successor counts, in requests.
const PRIOR_REQUESTS: f64 = 4.0;

/// Part of what the weights have learned that one request keeps.
const WEIGHT_MEMORY: f64 = 0.98;

/// Boosts stay within ± this many doublings.
const LARGEST_BOOST: f64 = 6.0;

const POPULARITY: usize = 0;
const RECENCY: usize = 1;
const SUCCESSION: usize = 2;

#[derive(Debug, Default)]
struct Successors {
    total: f64,
    counts: Vec<(u32, f64)>,
}

/// What goes so that `shortage` bytes become free for something whose worth per byte is `log2_worth`: chosen as for a
/// request ([`eviction::choose`]), but only among what is worth clearly less ([`MARGIN`]). `candidates` come in ascending
/// order of worth. `None` if that is too little: then nothing should be brought in.
pub fn room(
    candidates: impl Iterator<Item = Candidate>,
    shortage: u64,
    log2_worth: f64,
) -> Option<Vec<TensorKey>> {
    let mut offered = 0;
    let lesser = candidates.take_while(|candidate| candidate.log2_worth + MARGIN <= log2_worth);
    let victims = eviction::choose(lesser.inspect(|candidate| offered += candidate.bytes), shortage);
    (offered >= shortage).then_some(victims)
}

/// Arrival statistics of one device and what they foretell. Models are named by any numbers.
#[derive(Debug)]
pub struct Forecast {
    /// What one request counts now: it grows instead of all counts shrinking ("forward decay").
    step: f64,
    popularity: HashMap<u32, f64>,
    all: f64,
    /// Most recently used first.
    recent: Vec<u32>,
    /// Requests by the place in `recent` of the model that they asked for; the last entry: not there.
    distances: [f64; WATCHED + 1],
    /// Outlook of each place in `recent`, from `distances`.
    outlooks: [f64; WATCHED + 1],
    successors: HashMap<u32, Successors>,
    log_weights: [f64; 3],
}

impl Default for Forecast {
    fn default() -> Self {
        Forecast {
            step: 1.0,
            popularity: HashMap::new(),
            all: 0.0,
            recent: Vec::new(),
            distances: [0.0; WATCHED + 1],
            outlooks: [0.0; WATCHED + 1],
            successors: HashMap::new(),
            log_weights: [0.0; 3],
        }
    }
}

/// Discounted requests until the next use of what each request asks for with probability `p`.
fn outlook(p: f64) -> f64 {
    p / (1.0 - DISCOUNT * (1.0 - p))
}

impl Forecast {
    /// Nothing is known.
    pub fn new() -> Self {
        Self::default()
    }

    /// A request for `model` has arrived.
    pub fn observe(&mut self, model: u32) {
        let place = self.place(model);
        if self.all > 0.0 {
            let likelihoods = self.probabilities(model, place);
            for (weight, p) in self.log_weights.iter_mut().zip(likelihoods) {
                *weight = *weight * WEIGHT_MEMORY + p.max(1e-4).ln();
            }
        }
        self.step *= (1.0 / HALF_LIFE_REQUESTS).exp2();
        if self.step > 1e200 {
            self.rescale();
        }
        if self.all > 0.0 {
            self.distances[place] += self.step;
        }
        if let Some(&last) = self.recent.first() {
            self.count_successor(last, model);
        }
        *self.popularity.entry(model).or_default() += self.step;
        self.all += self.step;
        if place < self.recent.len() {
            self.recent.remove(place);
        }
        self.recent.insert(0, model);
        self.recent.truncate(WATCHED);
        self.look_ahead();
    }

    /// Models whose boost may differ from 0, most recently used first.
    pub fn watched(&self) -> &[u32] {
        &self.recent
    }

    /// Share of the requests, with decay, that asked for `model`.
    pub fn share(&self, model: u32) -> f64 {
        let count = self.popularity.get(&model).copied().unwrap_or(0.0);
        if self.all > 0.0 { count / self.all } else { 0.0 }
    }

    /// Probability that the next request asks for `model`.
    pub fn probability(&self, model: u32) -> f64 {
        let of = self.probabilities(model, self.place(model));
        self.weights().iter().zip(of).map(|(weight, p)| weight * p).sum()
    }

    /// log2 of how much better the outlook of `model` is than its popularity says.
    pub fn boost(&self, model: u32) -> f64 {
        let popular = outlook(self.share(model));
        if popular <= 0.0 {
            return 0.0;
        }
        let place = self.place(model);
        let successor = self.probabilities(model, place)[SUCCESSION];
        let known = place < WATCHED && self.distances.iter().any(|&count| count > 0.0);
        let recency = if known { self.outlooks[place] } else { popular };
        let succession = successor + (1.0 - successor) * DISCOUNT * popular;
        let weights = self.weights();
        let mixed =
            weights[POPULARITY] * popular + weights[RECENCY] * recency + weights[SUCCESSION] * succession;
        (mixed / popular).log2().clamp(-LARGEST_BOOST, LARGEST_BOOST)
    }

    fn place(&self, model: u32) -> usize {
        self.recent.iter().position(|&recent| recent == model).unwrap_or(WATCHED)
    }

    fn weights(&self) -> [f64; 3] {
        let best = self.log_weights.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights = self.log_weights.map(|weight| (weight - best).exp());
        let sum: f64 = weights.iter().sum();
        weights.map(|weight| weight / sum)
    }

    /// What each expert says about the next request.
    fn probabilities(&self, model: u32, place: usize) -> [f64; 3] {
        let popular = self.share(model);
        let seen: f64 = self.distances.iter().sum();
        let recency = if seen <= 0.0 {
            popular
        } else if place < WATCHED {
            self.distances[place] / seen
        } else {
            popular * self.distances[WATCHED] / seen
        };
        let succession =
            self.recent.first().and_then(|last| self.successors.get(last)).map_or(popular, |row| {
                let count =
                    row.counts.iter().find(|&&(next, _)| next == model).map_or(0.0, |&(_, count)| count);
                (count + PRIOR_REQUESTS * self.step * popular) / (row.total + PRIOR_REQUESTS * self.step)
            });
        [popular, recency, succession]
    }

    fn count_successor(&mut self, last: u32, next: u32) {
        let step = self.step;
        let row = self.successors.entry(last).or_default();
        row.total += step;
        if let Some((_, count)) = row.counts.iter_mut().find(|(model, _)| *model == next) {
            *count += step;
        } else if row.counts.len() < SUCCESSORS {
            row.counts.push((next, step));
        } else if let Some(least) = row.counts.iter_mut().min_by(|a, b| a.1.total_cmp(&b.1)) {
            *least = (next, step);
        }
    }

    /// Outlook of each place: p_r now, or it stays (somebody in front is asked for) or moves back by one (somebody
    /// behind is): V_r = (p_r + γ·P(>r)·V_{r+1}) / (1 − γ·P(<r)).
    fn look_ahead(&mut self) {
        let seen: f64 = self.distances.iter().sum();
        if seen <= 0.0 {
            return;
        }
        let mut behind = self.distances[WATCHED] / seen;
        self.outlooks[WATCHED] = 0.0;
        for place in (0..WATCHED).rev() {
            let p = self.distances[place] / seen;
            let before = (1.0 - behind - p).max(0.0);
            let next = self.outlooks[place + 1];
            self.outlooks[place] = (p + DISCOUNT * behind * next) / (1.0 - DISCOUNT * before);
            behind += p;
        }
    }

    /// Brings all counts back to where one request counts 1.
    fn rescale(&mut self) {
        let factor = 1.0 / self.step;
        self.step = 1.0;
        self.all *= factor;
        self.popularity.values_mut().for_each(|count| *count *= factor);
        self.popularity.retain(|_, count| *count > 1e-12);
        self.distances.iter_mut().for_each(|count| *count *= factor);
        for row in self.successors.values_mut() {
            row.total *= factor;
            row.counts.iter_mut().for_each(|(_, count)| *count *= factor);
        }
        self.successors.retain(|_, row| row.total > 1e-12);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(models: impl IntoIterator<Item = u32>) -> Forecast {
        let mut forecast = Forecast::new();
        models.into_iter().for_each(|model| forecast.observe(model));
        forecast
    }

    #[test]
    fn nothing_is_foretold_from_nothing() {
        let forecast = Forecast::new();
        assert_eq!((forecast.boost(3), forecast.probability(3), forecast.share(3)), (0.0, 0.0, 0.0));
        assert_eq!(after([7]).boost(7), 0.0);
    }

    #[test]
    fn a_cycle_is_recognised() {
        let forecast = after((0..80).map(|i| i % 8));
        // 7 was last, so 0 is next, then 1; 7 is the last of all.
        let boosts: Vec<f64> = (0..8).map(|model| forecast.boost(model)).collect();
        assert!(forecast.probability(0) > 0.8, "{}", forecast.probability(0));
        assert!(boosts.windows(2).all(|pair| pair[0] >= pair[1]), "{boosts:?}");
        assert!(boosts[0] > 1.0 && boosts[7] < 0.0, "{boosts:?}");
    }

    #[test]
    fn a_burst_is_recognised() {
        // Each model is used eight times in a row.
        let forecast = after((0..400).map(|i| (i / 8) % 5 * 3 % 7));
        let last = forecast.watched()[0];
        assert!(forecast.probability(last) > 0.6);
        assert!(forecast.boost(last) > 0.5);
    }

    #[test]
    fn who_follows_whom_is_recognised() {
        // After 1 always comes 9, whatever else happens.
        let forecast = after((0..300u32).flat_map(|i| [2 + i * i % 5, 1, 9]).chain([3, 1]));
        assert!(forecast.probability(9) > 0.7);
        assert!(forecast.boost(9) > forecast.boost(2));
    }

    #[test]
    fn independent_requests_are_left_to_popularity() {
        let mut state = 1u64;
        let forecast = after((0..3000).map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % 6) as u32
        }));
        for model in 0..6 {
            assert!(forecast.boost(model).abs() < 0.6, "{model}: {}", forecast.boost(model));
        }
    }

    #[test]
    fn room_is_made_only_over_what_is_worth_clearly_less() {
        let candidates = |worths: &[f64]| {
            let of = |(i, &log2_worth): (usize, &f64)| Candidate {
                tensor: TensorKey(i as u32),
                bytes: 10,
                log2_worth,
            };
            worths.iter().enumerate().map(of).collect::<Vec<_>>().into_iter()
        };
        let keys = |keys: &[u32]| Some(keys.iter().map(|&key| TensorKey(key)).collect());
        assert_eq!(room(candidates(&[0.0, 1.0, 2.0]), 20, 1.0 + MARGIN), keys(&[0, 1]));
        assert_eq!(room(candidates(&[0.0, 1.0, 2.0]), 21, 1.0 + MARGIN), None);
        assert_eq!(room(candidates(&[0.0, 1.0, 2.0]), 20, 1.0 + 0.9 * MARGIN), None);
        assert_eq!(room(candidates(&[]), 0, 0.0), keys(&[]));
    }

    #[test]
    fn long_runs_stay_finite() {
        let forecast = after((0..200_000).map(|i| i % 40));
        assert!(forecast.step.is_finite() && forecast.all.is_finite() && forecast.boost(3).is_finite());
        assert!(forecast.recent.len() <= WATCHED);
    }
}
