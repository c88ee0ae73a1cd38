//! Request generators: popularity, bursts, cycles, controlled reuse distance, hotness by size. All seeded.

use crate::rng::{Rng, Weighted};
use crate::trace::{Request, nanos};

/// Which model each request asks for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// Independent draws, popularity 1/rank^exponent.
    Zipf {
        /// The exponent.
        exponent: f64,
    },
    /// Each model is a Gamma renewal process with this coefficient of variation; rates as in `Zipf` with exponent 1.
    Bursts {
        /// Coefficient of variation of the times between a model's requests.
        variation: f64,
    },
    /// One model after the other, round and round.
    Cyclic,
    /// Stack distances (distinct other models since the last use) uniform around this mean.
    Distance {
        /// The mean.
        mean: usize,
    },
    /// The authors' hotness counts (58, 42, 40, 35, 11, 9, 3, 2 of 200), the smallest model hottest.
    SmallHot,
    /// The same, the largest model hottest.
    LargeHot,
}

/// How many of 200 requests go to the models in the order of hotness; further models get what the last has.
const HOTNESS: [f64; 8] = [58.0, 42.0, 40.0, 35.0, 11.0, 9.0, 3.0, 2.0];

/// Generates `count` requests for models of `sizes` bytes: Poisson arrivals at `per_second` (but for `Bursts`), prompts
/// log-normal with median 250 tokens and σ 1.2, answers with median 60 and σ 1.
pub fn generate(pattern: Pattern, sizes: &[u64], count: usize, per_second: f64, seed: u64) -> Vec<Request> {
    let mut rng = Rng::new(seed);
    let n = sizes.len();
    if n == 0 {
        return Vec::new();
    }
    let arrivals = match pattern {
        Pattern::Bursts { variation } => bursts(n, variation, count, per_second, &mut rng),
        _ => {
            let models = sequence(pattern, sizes, count, &mut rng);
            let mut at = 0.0;
            let arrival = |model| {
                at -= rng.uniform().ln() / per_second;
                (at, model)
            };
            models.into_iter().map(arrival).collect()
        }
    };
    let request = |(at, model): (f64, usize)| Request {
        arrival: nanos(at),
        model: model as u32,
        prompt: rng.log_normal(250.0, 1.2).clamp(1.0, 32_768.0) as u64,
        output: rng.log_normal(60.0, 1.0).clamp(1.0, 4_096.0) as u64,
    };
    arrivals.into_iter().map(request).collect()
}

fn sequence(pattern: Pattern, sizes: &[u64], count: usize, rng: &mut Rng) -> Vec<usize> {
    let n = sizes.len();
    match pattern {
        Pattern::Zipf { exponent } => draws(&Weighted::zipf(n, exponent), count, rng),
        Pattern::Bursts { .. } | Pattern::Cyclic => (0..count).map(|index| index % n).collect(),
        Pattern::SmallHot | Pattern::LargeHot => {
            let mut order: Vec<usize> = (0..n).collect();
            order.sort_by_key(|&model| sizes[model]);
            if pattern == Pattern::LargeHot {
                order.reverse();
            }
            let mut weights = vec![0.0; n];
            for (rank, model) in order.into_iter().enumerate() {
                weights[model] = HOTNESS[rank.min(HOTNESS.len() - 1)];
            }
            draws(&Weighted::new(weights), count, rng)
        }
        Pattern::Distance { mean } => {
            let (low, high) = ((2 * mean).saturating_sub(n - 1).min(n - 1), (2 * mean).min(n - 1));
            let mut stack: Vec<usize> = (0..n).collect();
            let next = |_| {
                let model = stack.remove(low + rng.below(high - low + 1));
                stack.insert(0, model);
                model
            };
            (0..count).map(next).collect()
        }
    }
}

fn draws(weights: &Weighted, count: usize, rng: &mut Rng) -> Vec<usize> {
    (0..count).map(|_| weights.draw(rng)).collect()
}

fn bursts(n: usize, variation: f64, count: usize, per_second: f64, rng: &mut Rng) -> Vec<(f64, usize)> {
    let harmonic: f64 = (1..=n).map(|rank| 1.0 / rank as f64).sum();
    let mean = |model: usize| harmonic * (model + 1) as f64 / per_second;
    let mut next: Vec<f64> = (0..n).map(|model| rng.uniform() * mean(model)).collect();
    let mut arrivals = Vec::with_capacity(count);
    for _ in 0..count {
        let Some(model) = (0..n).min_by(|&a, &b| next[a].total_cmp(&next[b])) else { break };
        arrivals.push((next[model], model));
        next[model] += mean(model) * rng.gamma(variation);
    }
    arrivals
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: [u64; 8] = [6, 7, 16, 17, 29, 41, 14, 30];

    fn models(pattern: Pattern) -> Vec<u32> {
        generate(pattern, &SIZES, 20_000, 1.0, 5).iter().map(|request| request.model).collect()
    }

    fn mean_distance(models: &[u32]) -> f64 {
        let mut stack: Vec<u32> = (0..8).collect();
        let mut sum = 0;
        for &model in models {
            let place = stack.iter().position(|&other| other == model).unwrap();
            sum += place;
            stack.remove(place);
            stack.insert(0, model);
        }
        sum as f64 / models.len() as f64
    }

    #[test]
    fn patterns_are_what_they_say() {
        assert!((mean_distance(&models(Pattern::Distance { mean: 2 })) - 2.0).abs() < 0.05);
        assert!((mean_distance(&models(Pattern::Distance { mean: 5 })) - 5.0).abs() < 0.05);
        assert!((mean_distance(&models(Pattern::Distance { mean: 7 })) - 7.0).abs() < 0.05);
        assert!((mean_distance(&models(Pattern::Cyclic)) - 7.0).abs() < 0.05);
        let count = |models: &[u32], model: u32| models.iter().filter(|&&other| other == model).count();
        assert!(count(&models(Pattern::SmallHot), 0).abs_diff(5_800) < 250);
        assert!(count(&models(Pattern::LargeHot), 5).abs_diff(5_800) < 250);
        let bursty = mean_distance(&models(Pattern::Bursts { variation: 6.0 }));
        assert!(bursty < mean_distance(&models(Pattern::Zipf { exponent: 1.0 })) * 0.8, "{bursty}");
    }

    #[test]
    fn rates_hold_and_seeds_repeat() {
        for pattern in [Pattern::Cyclic, Pattern::Bursts { variation: 1.0 }] {
            let requests = generate(pattern, &SIZES, 10_000, 4.0, 9);
            let last = requests.last().unwrap().arrival as f64 / 1e9;
            assert!((last / 2500.0 - 1.0).abs() < 0.1, "{last}");
            assert!(requests.windows(2).all(|pair| pair[0].arrival <= pair[1].arrival));
            assert_eq!(requests, generate(pattern, &SIZES, 10_000, 4.0, 9));
            assert_ne!(requests, generate(pattern, &SIZES, 10_000, 4.0, 10));
        }
        assert!(generate(Pattern::Cyclic, &[], 5, 1.0, 0).is_empty());
    }
}
