//! Pipeline stall estimator: what loading costs a request when the forward pass runs while the weights arrive.
//!
//! A forward pass is a row of stages (embedding, layers, head). The link brings the missing bytes in the order of the
//! stages; a stage starts when the one before it is done and its own bytes are there. Time that computing spends
//! waiting for bytes is the *exposed stall*; only that part of a load is seen by the user. The model is the one that
//! the Tangram authors fit for LayerWeave (their "PSE": a fixed cost per transfer, bytes over bandwidth, copy beside
//! compute); it is exact for one copy stream and one compute stream.
//!
//! Never measures anything: bandwidths and times are the caller's.

/// A link into device memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Seconds that every transfer costs beside its bytes.
    pub transfer_seconds: f64,
}

impl Link {
    /// Seconds for `transfers` transfers of `bytes` bytes together.
    pub fn seconds(&self, bytes: u64, transfers: u32) -> f64 {
        bytes as f64 / self.bytes_per_second + f64::from(transfers) * self.transfer_seconds
    }
}

/// One stage of a forward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stage {
    /// Seconds until its last missing byte has crossed the link, counted from the end of the stage before it.
    pub load_seconds: f64,
    /// Seconds that it computes.
    pub compute_seconds: f64,
}

/// What a forward pass that starts with a load is predicted to take, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prediction {
    /// The link is busy.
    pub load: f64,
    /// The stages compute.
    pub compute: f64,
    /// Computing waits for bytes.
    pub stall: f64,
}

impl Prediction {
    /// Seconds from the start to the first token.
    pub fn first_token(&self) -> f64 {
        self.stall + self.compute
    }
}

/// Predicts a pass over `stages`, in their order, when the link is free after `link_busy` seconds. A pass that misses
/// nothing does not wait for the link.
pub fn predict(stages: impl IntoIterator<Item = Stage>, link_busy: f64) -> Prediction {
    let (mut load, mut compute, mut done) = (0.0, 0.0, 0.0_f64);
    for stage in stages {
        if stage.load_seconds > 0.0 {
            load += stage.load_seconds;
            done = done.max(link_busy + load);
        }
        done += stage.compute_seconds;
        compute += stage.compute_seconds;
    }
    Prediction { load, compute, stall: (done - compute).max(0.0) }
}

/// [`predict`] where a running load takes a `share` (0 to 1) of the arithmetic that the pass needs, as on a processor
/// that copies and verifies with the cores that compute: the pass computes at `1 - share` of its speed until the last
/// byte is there. (Where both really share the cores, the load takes longer and the pass less; its end is the same.)
pub fn predict_beside(stages: impl IntoIterator<Item = Stage>, link_busy: f64, share: f64) -> Prediction {
    let stages: Vec<Stage> = stages.into_iter().collect();
    let all: f64 = stages.iter().map(|stage| stage.load_seconds).sum();
    let last_byte = if all > 0.0 { link_busy + all } else { 0.0 };
    let speed = (1.0 - share).clamp(0.0, 1.0);
    let (mut load, mut compute, mut done) = (0.0, 0.0, 0.0_f64);
    for stage in stages {
        if stage.load_seconds > 0.0 {
            load += stage.load_seconds;
            done = done.max(link_busy + load);
        }
        let beside = (last_byte - done).max(0.0) * speed;
        done = if stage.compute_seconds <= beside {
            // `speed` is above 0 here unless there is nothing to compute.
            done + if stage.compute_seconds > 0.0 { stage.compute_seconds / speed } else { 0.0 }
        } else {
            done.max(last_byte) + stage.compute_seconds - beside
        };
        compute += stage.compute_seconds;
    }
    Prediction { load, compute, stall: (done - compute).max(0.0) }
}

/// The exposed stall, in seconds, of a pass that has only its first `n` stages, for every `n` from 0 to all of them, on
/// an idle link. Entry `n` of the result is for `n`, so it never rises and ends with 0.
pub fn suffix_stalls(stages: &[Stage]) -> Vec<f64> {
    // With stages n.. missing the stall is the largest, over k ≥ n with bytes, of load(n..=k) − compute(0..k).
    let mut stalls = vec![0.0; stages.len() + 1];
    let mut before: f64 = stages.iter().map(|stage| stage.compute_seconds).sum();
    let mut slack = f64::NEG_INFINITY;
    for (n, stage) in stages.iter().enumerate().rev() {
        before -= stage.compute_seconds;
        if stage.load_seconds > 0.0 {
            slack = stage.load_seconds + slack.max(-before);
        }
        stalls[n] = slack.max(0.0);
    }
    stalls
}

/// What each stage's absence exposes, as a share (0 to 1) of its load time, when stages go from the last to the first:
/// the stall with stages `s..` missing less the stall with stages `s + 1..` missing, over stage `s`'s load time, on
/// average over the prompts in `compute` (each: its weight, and the seconds of every stage). Never rises with `s`, so
/// an order by it keeps a prefix. A stage without bytes gets the share of the one after it.
pub fn marginal_exposure(load_seconds: &[f64], compute: &[(f64, Vec<f64>)]) -> Vec<f64> {
    let weight: f64 = compute.iter().map(|(weight, _)| weight).sum();
    let mut exposure = vec![0.0; load_seconds.len()];
    for (share, seconds) in compute {
        let pairs = load_seconds.iter().zip(seconds);
        let stages: Vec<Stage> =
            pairs.map(|(&load_seconds, &compute_seconds)| Stage { load_seconds, compute_seconds }).collect();
        let stalls = suffix_stalls(&stages);
        for (s, stage) in stages.iter().enumerate().filter(|(_, stage)| stage.load_seconds > 0.0) {
            exposure[s] += (stalls[s] - stalls[s + 1]) / stage.load_seconds * share / weight;
        }
    }
    let mut floor = 0.0_f64;
    for exposure in exposure.iter_mut().rev() {
        floor = floor.max(exposure.clamp(0.0, 1.0));
        *exposure = floor;
    }
    exposure
}

/// Share of a load that counts even where the pipeline hides all of it: the link is busy meanwhile.
const LEAST_EXPOSURE: f64 = 0.05;

/// What having something saves at its next use, in seconds: its load time times the exposure of its absence.
pub fn saved_seconds(load_seconds: f64, exposure: f64) -> f64 {
    load_seconds * exposure.max(LEAST_EXPOSURE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stage(load_seconds: f64, compute_seconds: f64) -> Stage {
        Stage { load_seconds, compute_seconds }
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn nothing_missing_stalls_nothing_even_on_a_busy_link() {
        let prediction = predict([stage(0.0, 1.0), stage(0.0, 2.0)], 9.0);
        assert_eq!(prediction, Prediction { load: 0.0, compute: 3.0, stall: 0.0 });
    }

    #[test]
    fn what_comes_late_hides_behind_what_comes_early() {
        assert!(close(predict([stage(1.0, 1.0), stage(0.0, 1.0)], 0.0).stall, 1.0));
        assert!(close(predict([stage(0.0, 1.0), stage(1.0, 1.0)], 0.0).stall, 0.0));
        assert!(close(predict([stage(0.0, 1.0), stage(3.0, 1.0)], 0.0).stall, 2.0));
        assert!(close(predict([stage(1.0, 1.0), stage(1.0, 1.0)], 0.5).first_token(), 3.5));
    }

    #[test]
    fn short_prompts_hide_nothing_and_long_ones_all_but_the_front() {
        let loads = [1.0; 4];
        let short = marginal_exposure(&loads, &[(1.0, vec![0.01; 4])]);
        assert!(short[..3].iter().all(|&share| share > 0.95), "{short:?}");
        let long = marginal_exposure(&loads, &[(1.0, vec![1.0; 4])]);
        assert_eq!(long, [1.0, 0.0, 0.0, 0.0]);
        let mixed = marginal_exposure(&loads, &[(1.0, vec![0.0; 4]), (3.0, vec![1.0; 4])]);
        assert_eq!(mixed, [1.0, 0.25, 0.25, 0.25]);
    }

    #[test]
    fn the_link() {
        let link = Link { bytes_per_second: 1e9, transfer_seconds: 1e-3 };
        assert!(close(link.seconds(2_000_000_000, 3), 2.003));
    }

    proptest! {
        /// The marginal exposures add up to the stall of the whole suffix, whenever the stall is convex in it.
        #[test]
        fn exposures_agree_with_predictions(
            loads in proptest::collection::vec(0.01f64..2.0, 1..12), compute in 0.0f64..2.0
        ) {
            let seconds = vec![compute; loads.len()];
            let all: Vec<Stage> = loads.iter().map(|&load| stage(load, compute)).collect();
            let exposure = marginal_exposure(&loads, &[(1.0, seconds)]);
            for pair in exposure.windows(2) {
                prop_assert!(pair[0] >= pair[1]);
            }
            for first in 0..loads.len() {
                let stages = loads.iter().enumerate().map(|(s, &load)| {
                    stage(if s < first { 0.0 } else { load }, compute)
                });
                let stall = predict(stages.clone(), 0.0).stall;
                prop_assert!((suffix_stalls(&all)[first] - stall).abs() < 1e-9);
                let sum: f64 = (first..loads.len()).map(|s| exposure[s] * loads[s]).sum();
                prop_assert!(sum >= stall - 1e-9, "{sum} < {stall}");
            }
        }

        /// On shared cores a pass never ends before both the load and the computing are done, one after the other.
        #[test]
        fn a_shared_processor_does_both(
            pairs in proptest::collection::vec((0.0f64..2.0, 0.0f64..2.0), 1..12), share in 0.0f64..=1.0
        ) {
            let stages: Vec<Stage> = pairs.iter().map(|&(load, compute)| stage(load, compute)).collect();
            let apart = predict(stages.clone(), 0.0);
            let shared = predict_beside(stages.clone(), 0.0, share);
            let together = predict_beside(stages.clone(), 0.0, 1.0);
            prop_assert!(close(predict_beside(stages, 0.0, 0.0).first_token(), apart.first_token()));
            prop_assert!(apart.first_token() <= shared.first_token() + 1e-9);
            prop_assert!(shared.first_token() <= together.first_token() + 1e-9);
            prop_assert!(close(together.first_token(), together.load + together.compute));
        }

        #[test]
        fn more_missing_never_helps(loads in proptest::collection::vec(0.0f64..2.0, 1..12), compute in 0.0f64..2.0) {
            let stages = |missing: usize| {
                let of = move |(s, &load): (usize, &f64)| stage(if s < missing { load } else { 0.0 }, compute);
                loads.iter().enumerate().map(of).collect::<Vec<_>>()
            };
            let mut last = 0.0;
            for missing in 0..=loads.len() {
                let stall = predict(stages(missing), 0.0).stall;
                prop_assert!(stall >= last - 1e-12);
                last = stall;
            }
        }
    }
}
