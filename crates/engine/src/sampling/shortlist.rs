//! Choosing a token from what a device found out about a row of logits, without the row.
//!
//! It must never give another token than the whole row would. A device's exponentials and sums differ from the host's in
//! their last digits; where that could change the choice there is none, and the row has to be asked for.

use super::{Candidate, Sampled, Sampler, SamplingParams, pick, unit};

/// How many of the most likely tokens a device lists.
pub const CANDIDATES: usize = 128;

/// By how much a device's sums of weights may differ from the host's, as a share of the total. Exponentials in f32 are
/// wrong by at most two units in the last place on a GPU and one on the host, 3.6e-7 together, for a sum and for the
/// total that it is compared with; the sums themselves are in f64.
const MARGIN: f64 = 1e-6;

/// What a device is to find out about a row for the next token of a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wish {
    /// Up to [`CANDIDATES`] of the most likely tokens are wanted; otherwise one is enough.
    pub several: bool,
    /// Divides the logits before they become weights.
    pub temperature: f32,
    /// In [0, 1): the share of the total weight at which a token is drawn.
    pub random: f64,
}

/// What a device found out about a row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shortlist {
    /// The most likely tokens, most likely first, of equals the one with the lower id.
    pub candidates: Vec<Candidate>,
    /// The sum of the weights of all tokens, relative to the most likely one; NaN if the row has anything that is not a
    /// number.
    pub total: f64,
    /// The token on which the random number of the wish falls.
    pub drawn: Drawn,
}

/// A token, and the sums of the weights of all tokens before it and up to it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Drawn {
    /// Its id.
    pub token: u32,
    /// Without its own weight.
    pub below: f64,
    /// With it.
    pub upto: f64,
}

impl SamplingParams {
    /// How many tokens top-k leaves of a vocabulary, if it takes any away.
    pub(super) fn effective_top_k(&self, vocab: usize) -> Option<usize> {
        self.top_k.map(|k| k as usize).filter(|&k| k > 0 && k < vocab)
    }

    /// Whether the logits are used as the model gives them.
    fn leaves_logits_alone(&self) -> bool {
        let unpenalised = self.presence_penalty == 0.0 && self.frequency_penalty == 0.0;
        self.repetition_penalty == 1.0 && unpenalised && self.logit_bias.is_empty()
    }
}

impl Sampler {
    /// What a device should find out about the next row; `None` if the whole row is needed in any case: for a
    /// constraint, penalties, bias, log-probabilities, or a large top-k.
    pub fn wish(&self) -> Option<Wish> {
        let params = &self.params;
        if self.constraint.is_some() || params.logprobs.is_some() || !params.leaves_logits_alone() {
            return None;
        }
        if params.greedy() {
            return Some(Wish { several: false, temperature: 1.0, random: 0.0 });
        }
        let top_k = params.effective_top_k(self.vocab);
        if top_k.is_some_and(|k| k > CANDIDATES) {
            return None;
        }
        let any = top_k.is_none() && params.top_p >= 1.0 && params.min_p == 0.0;
        let random = unit(&mut self.random.clone());
        Some(Wish { several: !any, temperature: params.temperature, random })
    }

    /// Chooses the next token as [`Sampler::sample`] does from the row that `list` is of, and remembers it. `list` must be
    /// the answer to [`Sampler::wish`]. `None` if the row itself is needed; then nothing has changed.
    pub fn sample_from(&mut self, list: &Shortlist) -> Option<Sampled> {
        let wish = self.wish()?;
        let best = list.candidates.first()?;
        // What is wrong with a row, the row shows.
        if !best.logit.is_finite() || !list.total.is_finite() {
            return None;
        }
        let token = if self.params.greedy() {
            // Zeros of either sign are the same to the host, which takes the first, but not in the list's order.
            (best.logit != 0.0).then_some(best.token)?
        } else {
            let token = self.draw_from(list, wish.random)?;
            // The number that the wish looked at is used up.
            unit(&mut self.random);
            token
        };
        Some(Sampled { token, logprob: None, complete: false })
    }

    /// `Sampler::draw`, as far as the list reaches.
    fn draw_from(&mut self, list: &Shortlist, random: f64) -> Option<u32> {
        let SamplingParams { temperature, top_p, min_p, .. } = self.params;
        let highest = list.candidates.first()?.logit;
        let weight = |candidate: &Candidate| ((candidate.logit - highest) / temperature).exp();
        let top_k = self.params.effective_top_k(self.vocab);
        if top_k.is_none() && top_p >= 1.0 {
            if min_p == 0.0 {
                let Drawn { token, below, upto } = list.drawn;
                let (target, margin) = (random * list.total, MARGIN * list.total);
                return (below + margin <= target && target < upto - margin).then_some(token);
            }
            // All that min-p leaves is listed if something is that it does not leave. They are drawn from in the order
            // of their ids.
            let left = list.candidates.iter().take_while(|candidate| weight(candidate) >= min_p);
            let mut left: Vec<Candidate> = left.copied().collect();
            if left.len() == list.candidates.len() && left.len() < self.vocab {
                return None;
            }
            left.sort_unstable_by_key(|candidate| candidate.token);
            self.weights.clear();
            self.weights.extend(left.iter().map(weight));
            return left.get(pick(&self.weights, random)).map(|candidate| candidate.token);
        }
        let (most, least_total, most_total) = match top_k {
            Some(k) => {
                let kept = list.candidates.get(..k)?;
                let total = kept.iter().map(|candidate| f64::from(weight(candidate))).sum::<f64>();
                (k, total, total)
            }
            None => (self.vocab, list.total * (1.0 - MARGIN), list.total * (1.0 + MARGIN)),
        };
        let mut before = 0.0;
        self.weights.clear();
        while self.weights.len() < most {
            let kept = self.weights.len();
            if kept > 0 && before >= f64::from(top_p) * least_total {
                if before >= f64::from(top_p) * most_total {
                    break;
                }
                return None;
            }
            let weight = weight(list.candidates.get(kept)?);
            if weight < min_p && kept > 0 {
                break;
            }
            self.weights.push(weight);
            before += f64::from(weight);
        }
        list.candidates.get(pick(&self.weights, random)).map(|candidate| candidate.token)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a device would find out, with sums that are wrong by `error`.
    fn shortlist(logits: &[f32], wish: Wish, error: f64) -> Shortlist {
        let mut candidates: Vec<Candidate> =
            (0..).zip(logits).map(|(token, &logit)| Candidate { token, logit }).collect();
        candidates.sort_by(Candidate::order);
        candidates.truncate(if wish.several { CANDIDATES } else { 1 });
        let highest = candidates[0].logit;
        let mut sums = vec![0.0];
        for &logit in logits {
            let weight = f64::from(((logit - highest) / wish.temperature).exp());
            sums.push(sums[sums.len() - 1] + weight * (1.0 + error));
        }
        let total = sums[logits.len()];
        let token = sums[1..].iter().position(|&sum| sum > wish.random * total).unwrap_or(logits.len() - 1);
        let drawn = Drawn { token: token as u32, below: sums[token], upto: sums[token + 1] };
        Shortlist { candidates, total, drawn }
    }

    /// Draws `count` tokens from lists where they suffice; both samplers must choose the same. Gives how often they did
    /// suffice.
    fn agree(params: &SamplingParams, logits: &[f32], count: usize, error: f64) -> usize {
        let mut with_rows = Sampler::new(params.clone(), &[], logits.len());
        let mut with_lists = Sampler::new(params.clone(), &[], logits.len());
        let mut sufficed = 0;
        for _ in 0..count {
            let expected = with_rows.sample(&mut logits.to_vec()).unwrap();
            let list = with_lists.wish().map(|wish| shortlist(logits, wish, error));
            match list.and_then(|list| with_lists.sample_from(&list)) {
                Some(found) => {
                    assert_eq!(found, expected);
                    sufficed += 1;
                }
                None => assert_eq!(with_lists.sample(&mut logits.to_vec()).unwrap(), expected),
            }
        }
        sufficed
    }

    fn params() -> SamplingParams {
        SamplingParams { seed: Some(3), ..SamplingParams::default() }
    }

    #[test]
    fn lists_suffice_for_what_is_usual() {
        let logits: Vec<f32> = (0..5000).map(|i| 12.0 - (i as f32 * 0.37).sin().abs() * 18.0).collect();
        for params in [
            SamplingParams { temperature: 0.0, ..params() },
            params(),
            SamplingParams { temperature: 0.6, top_p: 0.8, top_k: Some(20), ..params() },
            SamplingParams { top_k: Some(CANDIDATES as u32), ..params() },
            SamplingParams { temperature: 0.2, top_p: 0.3, ..params() },
            SamplingParams { temperature: 0.2, min_p: 0.5, ..params() },
        ] {
            let sufficed = agree(&params, &logits, 200, 3e-7);
            assert!(sufficed >= 190, "{sufficed} of 200: {params:?}");
        }
    }

    #[test]
    fn what_lists_cannot_prove_needs_the_row() {
        let flat = vec![1.0; 1000];
        let none = |params: SamplingParams, logits: &[f32]| assert_eq!(agree(&params, logits, 50, 0.0), 0);
        // More tokens than are listed.
        none(SamplingParams { top_p: 0.9, ..params() }, &flat);
        none(SamplingParams { min_p: 0.1, ..params() }, &flat);
        none(SamplingParams { top_k: Some(CANDIDATES as u32 + 1), ..params() }, &flat);
        // Half of the total is reached exactly: the last digit of a sum decides.
        none(SamplingParams { top_p: 0.5, ..params() }, &[2.0; 4]);
        // The first of two zeros, of which the second is the greater one in the list's order.
        none(SamplingParams { temperature: 0.0, ..params() }, &[-0.0, 0.0, -1.0]);
        for changed in [
            SamplingParams { repetition_penalty: 1.1, ..params() },
            SamplingParams { presence_penalty: 0.1, ..params() },
            SamplingParams { frequency_penalty: 0.1, ..params() },
            SamplingParams { logit_bias: vec![(1, 1.0)], ..params() },
            SamplingParams { logprobs: Some(0), ..params() },
        ] {
            none(changed, &[1.0, 2.0, 3.0]);
        }
        let mut sampler = Sampler::new(params(), &[], 3);
        let broken =
            Shortlist { total: f64::NAN, ..shortlist(&[1.0, 2.0, 3.0], sampler.wish().unwrap(), 0.0) };
        assert_eq!(sampler.sample_from(&broken), None);
        assert_eq!(sampler.sample_from(&Shortlist::default()), None);
    }

    proptest! {
        /// Whatever the parameters, a list gives the row's token or none.
        #[test]
        fn lists_choose_as_rows(
            logits in prop::collection::vec(
                prop_oneof![(-9.0f32..9.0), (-4i8..4).prop_map(|logit| f32::from(logit) * 0.5)], 1..700
            ),
            temperature in prop::sample::select(vec![0.0f32, 0.1, 0.7, 1.0, 2.0]),
            top_k in prop::sample::select(vec![None, Some(0), Some(1), Some(5), Some(128), Some(500)]),
            top_p in prop::sample::select(vec![1.0f32, 1.0, 0.99, 0.9, 0.5, 0.01]),
            min_p in prop::sample::select(vec![0.0f32, 0.0, 0.05, 0.5, 1.0]),
            seed: u64,
            error in -3.6e-7f64..3.6e-7,
        ) {
            let seed = Some(seed);
            let params = SamplingParams { temperature, top_k, top_p, min_p, seed, ..SamplingParams::default() };
            agree(&params, &logits, 8, error);
        }
    }
}
