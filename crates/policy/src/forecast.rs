//! What a model takes before anything of it is loaded: room in a pool of pages, and the time to a first token.
//!
//! The arithmetic only: sizes come from whoever knows the executor, rates from whoever has measured them.

use serde::{Deserialize, Serialize};

use crate::stall::{Link, Prediction, Stage, predict_beside};

/// What a model takes of a pool of equal pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// Bytes per page.
    pub page_bytes: u64,
    /// Pages that all weights take.
    pub weight_pages: u64,
    /// Bytes of a KV block; 0 if the model caches nothing.
    pub block_bytes: u64,
    /// Tokens in a KV block, at least 1.
    pub block_tokens: u64,
}

impl Footprint {
    /// KV blocks for a sequence of this many tokens.
    pub fn kv_blocks(&self, tokens: u64) -> u64 {
        if self.block_bytes == 0 { 0 } else { tokens.div_ceil(self.block_tokens) }
    }

    /// KV bytes of a sequence of this many tokens.
    pub fn kv_bytes(&self, tokens: u64) -> u64 {
        self.kv_blocks(tokens) * self.block_bytes
    }

    /// KV bytes per token of a full block.
    pub fn kv_bytes_per_token(&self) -> u64 {
        self.block_bytes / self.block_tokens
    }

    /// Pages that so many KV blocks take when they lie side by side.
    pub fn kv_pages(&self, blocks: u64) -> u64 {
        (blocks * self.block_bytes).div_ceil(self.page_bytes)
    }

    /// Tokens whose KV fits beside all weights into a pool of `pages` pages; `None` if the weights alone do not fit.
    /// A model that caches nothing has room for any number.
    pub fn tokens_beside(&self, pages: u64) -> Option<u64> {
        let left = pages.checked_sub(self.weight_pages)? * self.page_bytes;
        Some(left.checked_div(self.block_bytes).map_or(u64::MAX, |blocks| blocks * self.block_tokens))
    }

    /// Longest sequence that can run in a pool of `pages` pages, up to the model's own `limit`; 0 if none can.
    pub fn context(&self, limit: u64, pages: u64) -> u64 {
        self.tokens_beside(pages).map_or(0, |tokens| tokens.min(limit))
    }
}

/// How fast weights arrive, and what that takes from computing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loading {
    /// The link into device memory.
    pub link: Link,
    /// The share (0 to 1) of the device's arithmetic that a running load takes: 0 where copies are made by an engine of
    /// their own, up to 1 where the processor that computes also copies and verifies.
    pub share: f64,
}

/// The time to a first token when the first pass computes `first_pass` seconds per stage, misses `missing` bytes per
/// stage, and `later_passes` seconds of further passes follow.
pub fn first_token(loading: Loading, missing: &[u64], first_pass: &[f64], later_passes: f64) -> Prediction {
    let stages =
        first_pass.iter().zip(missing.iter().chain(std::iter::repeat(&0))).map(|(&seconds, &bytes)| {
            let transfers = u32::from(bytes > 0);
            Stage { load_seconds: loading.link.seconds(bytes, transfers), compute_seconds: seconds }
        });
    let prediction = predict_beside(stages, 0.0, loading.share);
    Prediction { compute: prediction.compute + later_passes, ..prediction }
}

/// How much longer something takes than was foretold, from what it took lately: the geometric mean of measured over
/// foretold, in which a sample counts for less the older it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Correction {
    log_ratio: f64,
    samples: u32,
}

impl Correction {
    /// The weight of a sample when there have been enough: the mean is over some five samples.
    const LEAST_WEIGHT: f64 = 0.2;
    /// A single sample says no more than that things are so many times slower or faster: what interferes with one
    /// measurement need not come again.
    const MOST: f64 = 16.0;

    /// Something that was foretold to take `foretold` seconds took `measured`.
    pub fn observe(&mut self, foretold: f64, measured: f64) {
        if !(foretold > 0.0 && measured > 0.0) {
            return;
        }
        let ratio = (measured / foretold).ln().clamp(-Self::MOST.ln(), Self::MOST.ln());
        self.samples = self.samples.saturating_add(1);
        let weight = f64::from(self.samples).recip().max(Self::LEAST_WEIGHT);
        self.log_ratio += weight * (ratio - self.log_ratio);
    }

    /// What to multiply a forecast with.
    pub fn factor(&self) -> f64 {
        self.log_ratio.exp()
    }

    /// A correction that starts from this one and is soon its own.
    pub fn seed(&self) -> Correction {
        Correction { samples: self.samples.min(1), ..*self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LINK: Link = Link { bytes_per_second: 1e9, transfer_seconds: 0.0 };

    #[test]
    fn room_beside_the_weights() {
        let footprint = Footprint { page_bytes: 4096, weight_pages: 10, block_bytes: 1000, block_tokens: 16 };
        assert_eq!(footprint.tokens_beside(9), None);
        assert_eq!((footprint.context(512, 9), footprint.context(512, 10)), (0, 0));
        assert_eq!(footprint.tokens_beside(11), Some(64));
        assert_eq!((footprint.context(512, 11), footprint.context(50, 11)), (64, 50));
        assert_eq!((footprint.kv_blocks(17), footprint.kv_bytes(17), footprint.kv_pages(5)), (2, 2000, 2));
        let encoder = Footprint { block_bytes: 0, ..footprint };
        assert_eq!((encoder.context(512, 10), encoder.kv_bytes(100)), (512, 0));
    }

    proptest! {
        #[test]
        fn what_fits_fits_and_one_block_more_does_not(
            pages in 0u64..5000, weight_pages in 0u64..5000, block_bytes in 1u64..100_000, block_tokens in 1u64..64
        ) {
            let footprint = Footprint { page_bytes: 4096, weight_pages, block_bytes, block_tokens };
            match footprint.tokens_beside(pages) {
                None => prop_assert!(weight_pages > pages),
                Some(tokens) => {
                    let blocks = footprint.kv_blocks(tokens);
                    prop_assert!(weight_pages + footprint.kv_pages(blocks) <= pages);
                    prop_assert!(weight_pages + footprint.kv_pages(blocks + 1) > pages);
                }
            }
        }
    }

    #[test]
    fn a_load_hides_behind_computing_unless_it_takes_the_same_processor() {
        let missing = [1_000_000_000, 1_000_000_000];
        let compute = [2.0, 2.0];
        let apart = first_token(Loading { link: LINK, share: 0.0 }, &missing, &compute, 3.0);
        assert_eq!((apart.load, apart.compute, apart.stall), (2.0, 7.0, 1.0));
        let together = first_token(Loading { link: LINK, share: 1.0 }, &missing, &compute, 3.0);
        assert_eq!(together.first_token(), 9.0);
        assert_eq!(
            first_token(Loading { link: LINK, share: 1.0 }, &[0, 0], &compute, 0.0).first_token(),
            4.0
        );
        assert_eq!(first_token(Loading { link: LINK, share: 1.0 }, &[], &compute, 0.0).first_token(), 4.0);
    }

    #[test]
    fn corrections_follow_what_is_measured() {
        let mut correction = Correction::default();
        assert_eq!(correction.factor(), 1.0);
        correction.observe(1.0, 2.0);
        assert!((correction.factor() - 2.0).abs() < 1e-12);
        (0..40).for_each(|_| correction.observe(2.0, 1.0));
        assert!((correction.factor() - 0.5).abs() < 1e-3);
        let before = correction.factor();
        correction.observe(1.0, f64::INFINITY);
        assert!(correction.factor() < before * 2.5, "one outlier moves little");
        correction.observe(0.0, 1.0);
        assert!(correction.factor().is_finite());
        let mut seeded = correction.seed();
        seeded.observe(1.0, 1.0);
        assert!((seeded.factor() - correction.factor().sqrt()).abs() < 1e-12);
    }
}
