//! How fast a GPU computes, from the passes that it has run: how many bytes of weights it reads in a second, and how many
//! products it makes.
//!
//! A stage takes as long as the slower of the two (the roofline of Williams, Waterman and Patterson, 2009). Both rates are
//! the best that were seen, as nothing makes a GPU faster than it is; so passes beside a load can be looked at too. By how
//! much passes take longer, for launches and whatever else, the corrections learn. Nothing is measured beside requests.

use serde::{Deserialize, Serialize};
use tangram_checkpoint::DType;
use tangram_engine::StageWork;

/// What a stage of a pass is for a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct GpuWork {
    /// Bytes of weights that are read.
    bytes: f64,
    /// Multiplications, each with an addition.
    products: f64,
}

impl GpuWork {
    /// The work of a stage whose weights have so many bytes in all.
    pub(crate) fn of(work: &StageWork, most_bytes: u64) -> GpuWork {
        let per_weight = |dtype: DType| dtype.block_bytes() as f64 / dtype.block_elements() as f64;
        let (mut bytes, mut products) = (0.0, 2.0 * work.attention);
        for (dtype, weights) in &work.weights {
            // The processor reads weights once for every block of tokens, a GPU (nearly) once for all.
            bytes += (weights.single + weights.widened) * per_weight(*dtype);
            products += weights.single + weights.products;
        }
        GpuWork { bytes: bytes.min(most_bytes as f64), products }
    }
}

/// Rates of a GPU, per second; 0 before a pass was seen that tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct GpuSpeed {
    bytes: f64,
    products: f64,
}

impl GpuSpeed {
    /// A pass of these stages took so many seconds. Only one over a prompt says how fast products can be: otherwise their
    /// rate is that at which weights are read.
    pub(crate) fn observe(&mut self, stages: &[GpuWork], is_prompt: bool, seconds: f64) {
        let sum = |of: fn(&GpuWork) -> f64| stages.iter().map(of).sum::<f64>();
        if seconds > 0.0 && seconds.is_finite() {
            self.bytes = self.bytes.max(sum(|stage| stage.bytes) / seconds);
            if is_prompt {
                self.products = self.products.max(sum(|stage| stage.products) / seconds);
            }
        }
    }

    /// Seconds of each stage; `None` before a prompt was seen.
    pub(crate) fn seconds(&self, stages: &[GpuWork]) -> Option<Vec<f64>> {
        let known = self.bytes > 0.0 && self.products > 0.0;
        let of = |stage: &GpuWork| (stage.bytes / self.bytes).max(stage.products / self.products);
        known.then(|| stages.iter().map(of).collect())
    }
}

#[cfg(test)]
mod tests {
    use tangram_engine::WeightWork;

    use super::*;

    fn layer(single: f64, widened: f64, products: f64) -> StageWork {
        let weights = vec![(DType::BF16, WeightWork { single, widened, products })];
        StageWork { weights, attention: 50.0, ..StageWork::default() }
    }

    #[test]
    fn weights_are_read_once_and_multiplied_for_every_token() {
        assert_eq!(GpuWork::of(&layer(1000.0, 0.0, 0.0), 2000), GpuWork { bytes: 2000.0, products: 1100.0 });
        // The processor would read them three times.
        let many = GpuWork::of(&layer(0.0, 3000.0, 64_000.0), 2000);
        assert_eq!(many, GpuWork { bytes: 2000.0, products: 64_100.0 });
    }

    /// Of a GPU that takes at least what the roofline says no rate is overestimated, and where a pass ran at the limit it
    /// is found.
    #[test]
    fn rates_are_found_from_passes() {
        let (bytes, products) = (3e12, 4e14);
        let limit = |stage: &GpuWork| (stage.bytes / bytes).max(stage.products / products);
        let mut speed = GpuSpeed::default();
        speed.observe(&[GpuWork { bytes: 1.0, products: 1.0 }], false, 1.0);
        assert_eq!(speed.seconds(&[]), None);
        for (weight_bytes, tokens, slower) in
            [(1e9, 20.0, 3.0), (1e9, 1.0, 1.4), (1.6e10, 500.0, 1.2), (1.6e10, 32.0, 1.1), (1e6, 2000.0, 1.0)]
        {
            let of = |share: f64| GpuWork {
                bytes: weight_bytes * share,
                products: weight_bytes / 2.0 * tokens * share,
            };
            let stages = [of(0.25), of(0.75)];
            let seconds = stages.iter().map(limit).sum::<f64>() * slower;
            speed.observe(&stages, tokens > 16.0, seconds);
            let foretold: f64 = speed.seconds(&stages).unwrap().iter().sum();
            assert!(foretold <= seconds * (1.0 + 1e-9), "{foretold} of {seconds}");
        }
        assert!(speed.bytes <= bytes && (speed.products / products - 1.0).abs() < 1e-9, "{speed:?}");
        speed.observe(&[GpuWork { bytes, products }], false, 1.0);
        assert!((speed.bytes / bytes - 1.0).abs() < 1e-9);
        speed.observe(&[GpuWork { bytes, products }], true, f64::INFINITY);
        speed.observe(&[GpuWork { bytes, products }], true, 0.0);
        assert!(speed.bytes.is_finite() && speed.products <= products * (1.0 + 1e-9));
    }
}
