//! Choosing the next token from logits, with vLLM's parameters and meanings.
//!
//! Pure: the same parameters, seed and logits give the same tokens, on every machine and in every batch. Nothing
//! here panics on what a client sends; [`SamplingParams::validate`] says what is wrong with it.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};

use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};

use crate::constraint::Constraint;

mod shortlist;

pub use shortlist::{CANDIDATES, Drawn, Shortlist, Wish};

/// Below this temperature sampling is greedy, as in vLLM.
const GREEDY_BELOW: f32 = 1e-5;
/// Most alternatives that can be asked for per token.
const MAX_LOGPROBS: u32 = 20;
/// How many of the most likely tokens are sorted first in the search for the nucleus.
const FIRST_NUCLEUS: usize = 256;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 chooses the most likely token.
    pub temperature: f32,
    /// Only this many most likely tokens; `None` or 0 for all.
    pub top_k: Option<u32>,
    /// Only the most likely tokens that together have this probability.
    pub top_p: f32,
    /// Only tokens with at least this share of the most likely token's probability.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens of the prompt and the output.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens of the output.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token once per occurrence in the output.
    pub frequency_penalty: f32,
    /// For reproducible choices; `None` differs every time.
    pub seed: Option<u64>,
    /// Whether log-probabilities are wanted, and of how many alternatives.
    pub logprobs: Option<u32>,
    /// Added to the logits of these tokens. Ids outside the vocabulary are ignored.
    pub logit_bias: Vec<(u32, f32)>,
}

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            logprobs: None,
            logit_bias: Vec::new(),
        }
    }
}

impl SamplingParams {
    /// Checks the ranges.
    ///
    /// # Errors
    /// What is wrong, in the words of OpenAI and vLLM.
    pub fn validate(&self) -> Result<(), String> {
        let check = |good: bool, demand: &str, value: f32| {
            if good { Ok(()) } else { Err(format!("{demand}, got {value}.")) }
        };
        // A comparison with NaN is false, so NaN fails every check.
        check(
            self.temperature >= 0.0 && self.temperature.is_finite(),
            "temperature must be a non-negative number",
            self.temperature,
        )?;
        check(self.top_p > 0.0 && self.top_p <= 1.0, "top_p must be in (0, 1]", self.top_p)?;
        check((0.0..=1.0).contains(&self.min_p), "min_p must be in [0, 1]", self.min_p)?;
        check(
            self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite(),
            "repetition_penalty must be greater than zero",
            self.repetition_penalty,
        )?;
        let two = -2.0..=2.0;
        check(
            two.contains(&self.presence_penalty),
            "presence_penalty must be in [-2, 2]",
            self.presence_penalty,
        )?;
        check(
            two.contains(&self.frequency_penalty),
            "frequency_penalty must be in [-2, 2]",
            self.frequency_penalty,
        )?;
        for &(token, bias) in &self.logit_bias {
            let demand = format!("logit_bias of token {token} must be in [-100, 100]");
            check((-100.0..=100.0).contains(&bias), &demand, bias)?;
        }
        match self.logprobs {
            Some(logprobs) if logprobs > MAX_LOGPROBS => {
                Err(format!("logprobs must be at most {MAX_LOGPROBS}, got {logprobs}."))
            }
            _ => Ok(()),
        }
    }

    fn greedy(&self) -> bool {
        self.temperature < GREEDY_BELOW
    }
}

/// A chosen token.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// Its id.
    pub token: u32,
    /// Present if asked for.
    pub logprob: Option<TokenLogprob>,
    /// The constraint is fulfilled and lets nothing follow: this is the last token.
    pub complete: bool,
}

/// Log-probabilities before penalties, bias, constraint and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// Of the chosen token.
    pub logprob: f32,
    /// The most likely tokens with theirs, most likely first; the chosen token need not be among them.
    pub top: Vec<(u32, f32)>,
}

/// Why no token can be chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    /// The model gave NaN or infinity, or −infinity only: broken weights.
    #[error("the model's logits are not numbers")]
    NotFinite,
    /// The logits are not one row over the vocabulary.
    #[error("{found} logits for a vocabulary of {vocab}")]
    Length {
        /// Logits given.
        found: usize,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The constraint lets no token follow, or became too complex.
    #[error("constrained output: {0}")]
    Constraint(String),
}

/// Chooses the tokens of one sequence.
pub struct Sampler {
    params: SamplingParams,
    vocab: usize,
    random: Xoshiro256PlusPlus,
    constraint: Option<Constraint>,
    /// Tokens of prompt and output; kept only for the repetition penalty.
    seen: HashSet<u32>,
    /// Occurrences in the output; kept only for presence and frequency penalty.
    counts: HashMap<u32, u32>,
    /// Reused memory: logits before changes, weights, candidates.
    raw: Vec<f32>,
    weights: Vec<f32>,
    candidates: Vec<Candidate>,
}

/// A token with its logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Its id.
    pub token: u32,
    /// As the model gave it, or changed by bias and penalties.
    pub logit: f32,
}

impl Candidate {
    /// Most likely first; of equals the lower id.
    fn order(&self, other: &Candidate) -> Ordering {
        other.logit.total_cmp(&self.logit).then(self.token.cmp(&other.token))
    }
}

impl Sampler {
    /// A sampler for a sequence that begins with `prompt`, over `vocab` tokens. `params` should be valid.
    pub fn new(params: SamplingParams, prompt: &[u32], vocab: usize) -> Sampler {
        let seed = params.seed.unwrap_or_else(|| RandomState::new().hash_one(vocab));
        let seen =
            if params.repetition_penalty != 1.0 { prompt.iter().copied().collect() } else { HashSet::new() };
        Sampler {
            params,
            vocab,
            random: Xoshiro256PlusPlus::seed_from_u64(seed),
            constraint: None,
            seen,
            counts: HashMap::new(),
            raw: Vec::new(),
            weights: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// The same with an output as `constraint` says.
    pub fn constrained(self, constraint: Option<Constraint>) -> Sampler {
        Sampler { constraint, ..self }
    }

    /// Chooses the next token and remembers it. `logits` (one row over the vocabulary) are changed on the way.
    ///
    /// # Errors
    /// [`SampleError`] if the logits are of the wrong number or no numbers, or the constraint cannot go on.
    pub fn sample(&mut self, logits: &mut [f32]) -> Result<Sampled, SampleError> {
        if logits.len() != self.vocab || logits.is_empty() {
            return Err(SampleError::Length { found: logits.len(), vocab: self.vocab });
        }
        highest(logits)?;
        if self.params.logprobs.is_some() {
            self.raw.clear();
            self.raw.extend_from_slice(logits);
        }
        self.penalise(logits);
        // Last, so that nothing makes a token possible again.
        if let Some(constraint) = &mut self.constraint {
            constraint.restrict(logits).map_err(SampleError::Constraint)?;
        }
        let (best, logit) = highest(logits)?;
        let token = if self.params.greedy() { best } else { self.draw(logits, logit) };
        let logprob = self.params.logprobs.map(|count| self.logprobs(token, count as usize));
        if self.params.repetition_penalty != 1.0 {
            self.seen.insert(token);
        }
        if self.params.presence_penalty != 0.0 || self.params.frequency_penalty != 0.0 {
            *self.counts.entry(token).or_default() += 1;
        }
        let complete = match &mut self.constraint {
            Some(constraint) => constraint.accept(token).map_err(SampleError::Constraint)?,
            None => false,
        };
        Ok(Sampled { token, logprob, complete })
    }

    /// Bias, then penalties.
    fn penalise(&self, logits: &mut [f32]) {
        for &(token, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        let repetition = self.params.repetition_penalty;
        for &token in &self.seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            }
        }
        for (&token, &count) in &self.counts {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= self.params.frequency_penalty * count as f32;
                *logit -= self.params.presence_penalty;
            }
        }
    }

    /// A random token by temperature, then top-k, then top-p, then min-p.
    fn draw(&mut self, logits: &[f32], highest: f32) -> u32 {
        let SamplingParams { temperature, top_p, min_p, .. } = self.params;
        let weight = |logit: f32| ((logit - highest) / temperature).exp();
        let top_k = self.params.effective_top_k(logits.len());
        let random = unit(&mut self.random);
        if top_k.is_none() && top_p >= 1.0 {
            self.weights.clear();
            self.weights.extend(
                logits.iter().map(|&logit| Some(weight(logit)).filter(|&w| w >= min_p).unwrap_or(0.0)),
            );
            return pick(&self.weights, random) as u32;
        }
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend(
            logits.iter().enumerate().map(|(token, &logit)| Candidate { token: token as u32, logit }),
        );
        // What top-p is a share of: the probability of all tokens that top-k leaves.
        let (mut sorted, total) = match top_k {
            Some(k) => {
                keep_most_likely(candidates, k);
                (k, candidates.iter().map(|c| f64::from(weight(c.logit))).sum::<f64>())
            }
            None => (0, logits.iter().map(|&logit| f64::from(weight(logit))).sum()),
        };
        let nucleus = f64::from(top_p) * total;
        let mut kept = 0;
        let mut before = 0.0;
        self.weights.clear();
        while kept < candidates.len() && (before < nucleus || kept == 0) {
            if kept == sorted {
                // Sorting the whole vocabulary is seldom needed: sort ever longer beginnings of it.
                let more = (sorted * 8).max(FIRST_NUCLEUS).min(candidates.len());
                sort_beginning(&mut candidates[sorted..], more - sorted);
                sorted = more;
            }
            let weight = weight(candidates[kept].logit);
            if weight < min_p && kept > 0 {
                break;
            }
            self.weights.push(weight);
            before += f64::from(weight);
            kept += 1;
        }
        candidates[pick(&self.weights, random)].token
    }

    /// Log-probabilities of `token` and of the `count` most likely tokens, from the logits as the model gave them.
    fn logprobs(&mut self, token: u32, count: usize) -> TokenLogprob {
        let highest = self.raw.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = self.raw.iter().map(|&logit| f64::from((logit - highest).exp())).sum();
        let normaliser = f64::from(highest) + sum.ln();
        let logprob = |logit: f32| (f64::from(logit) - normaliser) as f32;
        let mut top = Vec::new();
        if count > 0 {
            let candidates = &mut self.candidates;
            candidates.clear();
            let all = self.raw.iter().enumerate();
            candidates.extend(all.map(|(token, &logit)| Candidate { token: token as u32, logit }));
            keep_most_likely(candidates, count.min(self.vocab));
            top.extend(candidates.iter().map(|c| (c.token, logprob(c.logit))));
        }
        TokenLogprob { logprob: logprob(self.raw[token as usize]), top }
    }
}

/// The most likely token (of equals the lowest id) and its logit.
fn highest(logits: &[f32]) -> Result<(u32, f32), SampleError> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // `f32::max` passes NaN over.
    let nan = logits.iter().any(|logit| logit.is_nan());
    match logits.iter().position(|&logit| logit == highest) {
        Some(token) if highest.is_finite() && !nan => Ok((token as u32, highest)),
        _ => Err(SampleError::NotFinite),
    }
}

/// Leaves the `count` most likely candidates, sorted.
fn keep_most_likely(candidates: &mut Vec<Candidate>, count: usize) {
    sort_beginning(candidates, count);
    candidates.truncate(count);
}

/// Moves the `count` most likely candidates to the beginning, sorted.
fn sort_beginning(candidates: &mut [Candidate], count: usize) {
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count, Candidate::order);
    }
    candidates[..count].sort_unstable_by(Candidate::order);
}

/// Uniform in [0, 1), from the upper 53 bits.
fn unit(random: &mut Xoshiro256PlusPlus) -> f64 {
    (random.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// The index at which the running sum of the weights passes the share `random` of their total.
fn pick(weights: &[f32], random: f64) -> usize {
    let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
    let target = random * total;
    let mut sum = 0.0;
    let mut last = 0;
    for (index, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            last = index;
            sum += f64::from(weight);
            if sum > target {
                break;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn params() -> SamplingParams {
        SamplingParams { seed: Some(7), ..SamplingParams::default() }
    }

    fn token(sampler: &mut Sampler, logits: &[f32]) -> u32 {
        sampler.sample(&mut logits.to_vec()).expect("a token").token
    }

    fn draws(params: SamplingParams, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(params, &[], logits.len());
        (0..count).map(|_| token(&mut sampler, logits)).collect()
    }

    /// The tokens that can come out at all, by sampling often.
    fn support(params: SamplingParams, logits: &[f32]) -> Vec<u32> {
        let mut tokens = draws(params, logits, 4000);
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let mut sampler = Sampler::new(SamplingParams { temperature: 0.0, ..params() }, &[], 5);
        assert_eq!(token(&mut sampler, &[1.0, 3.0, 2.0, 3.0, -1.0]), 1);
        assert_eq!(token(&mut sampler, &[f32::NEG_INFINITY, -5.0, -6.0, -5.0, -9.0]), 1);
    }

    #[test]
    fn broken_logits_are_an_error() {
        for temperature in [0.0, 1.0] {
            let mut sampler = Sampler::new(SamplingParams { temperature, ..params() }, &[], 3);
            for bad in [[1.0, f32::NAN, 2.0], [f32::INFINITY, 0.0, 0.0], [f32::NEG_INFINITY; 3]] {
                assert_eq!(sampler.sample(&mut bad.clone()), Err(SampleError::NotFinite));
            }
            let short = sampler.sample(&mut [1.0, 2.0]);
            assert_eq!(short, Err(SampleError::Length { found: 2, vocab: 3 }));
        }
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let probabilities = [0.5f32, 0.25, 0.125, 0.125];
        let logits = probabilities.map(f32::ln);
        for (temperature, expected) in [(1.0, probabilities), (0.5, [0.7272, 0.1818, 0.0455, 0.0455])] {
            let tokens = draws(SamplingParams { temperature, ..params() }, &logits, 20000);
            for (token, expected) in expected.iter().enumerate() {
                let share = tokens.iter().filter(|&&t| t as usize == token).count() as f32 / 20000.0;
                assert!((share - expected).abs() < 0.015, "token {token}: {share}, expected {expected}");
            }
        }
    }

    #[test]
    fn filters_cut_where_they_should() {
        let logits = [0.1f32, 0.4, 0.2, 0.3].map(f32::ln);
        assert_eq!(support(params(), &logits), [0, 1, 2, 3]);
        assert_eq!(support(SamplingParams { top_k: Some(2), ..params() }, &logits), [1, 3]);
        assert_eq!(support(SamplingParams { top_k: Some(0), ..params() }, &logits), [0, 1, 2, 3]);
        assert_eq!(support(SamplingParams { top_k: Some(9), ..params() }, &logits), [0, 1, 2, 3]);
        assert_eq!(support(SamplingParams { top_p: 0.65, ..params() }, &logits), [1, 3]);
        assert_eq!(support(SamplingParams { top_p: 0.75, ..params() }, &logits), [1, 2, 3]);
        assert_eq!(support(SamplingParams { top_p: 1e-9, ..params() }, &logits), [1]);
        assert_eq!(support(SamplingParams { min_p: 0.6, ..params() }, &logits), [1, 3]);
        assert_eq!(support(SamplingParams { min_p: 1.0, ..params() }, &logits), [1]);
        // top-p is a share of what top-k leaves: 0.4 of 0.7 is 0.57.
        let both = SamplingParams { top_k: Some(2), top_p: 0.55, ..params() };
        assert_eq!(support(both, &logits), [1]);
        assert_eq!(support(SamplingParams { top_p: 0.95, min_p: 0.6, ..params() }, &logits), [1, 3]);
    }

    #[test]
    fn penalties_are_vllms() {
        let logits = [2.0, 1.9, -1.0, -1.05];
        let greedy = SamplingParams { temperature: 0.0, ..params() };
        let one = |params: &SamplingParams, prompt: &[u32], logits: &[f32]| {
            token(&mut Sampler::new(params.clone(), prompt, logits.len()), logits)
        };
        // Repetition looks at the prompt, presence and frequency do not.
        assert_eq!(one(&SamplingParams { repetition_penalty: 1.1, ..greedy.clone() }, &[0, 99], &logits), 1);
        assert_eq!(one(&SamplingParams { repetition_penalty: 1.1, ..greedy.clone() }, &[2], &logits[2..]), 0);
        assert_eq!(one(&SamplingParams { repetition_penalty: 1.1, ..greedy.clone() }, &[0], &logits[2..]), 1);
        assert_eq!(one(&SamplingParams { presence_penalty: 1.0, ..greedy.clone() }, &[0], &logits), 0);
        // 2.0 falls by 0.06 with every use: below 1.9 after the second, below 1.84 again after the third.
        let mut sampler = Sampler::new(SamplingParams { frequency_penalty: 0.06, ..greedy.clone() }, &[], 4);
        let tokens: Vec<u32> = (0..5).map(|_| token(&mut sampler, &logits)).collect();
        assert_eq!(tokens, [0, 0, 1, 0, 1]);
        let mut sampler = Sampler::new(SamplingParams { presence_penalty: 0.06, ..greedy.clone() }, &[], 4);
        let tokens: Vec<u32> = (0..3).map(|_| token(&mut sampler, &logits)).collect();
        assert_eq!(tokens, [0, 0, 0], "presence counts once");
        let bias = SamplingParams { logit_bias: vec![(2, 50.0), (7, 100.0)], ..greedy };
        assert_eq!(one(&bias, &[], &logits), 2);
    }

    #[test]
    fn logprobs_are_raw() {
        let probabilities = [0.1f32, 0.4, 0.2, 0.3];
        let logits = probabilities.map(|p| p.ln() + 5.0);
        let params =
            SamplingParams { temperature: 0.0, logprobs: Some(2), logit_bias: vec![(0, 100.0)], ..params() };
        let sampled = Sampler::new(params, &[], 4).sample(&mut logits.clone()).expect("a token");
        assert_eq!(sampled.token, 0);
        let logprob = sampled.logprob.expect("log-probabilities");
        assert!((logprob.logprob - 0.1f32.ln()).abs() < 1e-5);
        assert_eq!(logprob.top.iter().map(|top| top.0).collect::<Vec<_>>(), [1, 3]);
        assert!((logprob.top[1].1 - 0.3f32.ln()).abs() < 1e-5);
    }

    #[test]
    fn seeds_reproduce_and_differ() {
        let logits: Vec<f32> = (0..1000).map(|i| (i % 37) as f32 * 0.1).collect();
        let with =
            |seed, top_p| draws(SamplingParams { seed, top_p, ..SamplingParams::default() }, &logits, 50);
        assert_eq!(with(Some(1), 1.0), with(Some(1), 1.0));
        assert_eq!(with(Some(1), 0.9), with(Some(1), 0.9));
        assert_ne!(with(Some(1), 1.0), with(Some(2), 1.0));
        assert_ne!(with(None, 1.0), with(None, 1.0));
    }

    #[test]
    fn bad_parameters_are_named() {
        let nan = f32::NAN;
        let bad = [
            ("temperature", SamplingParams { temperature: -0.1, ..params() }),
            ("temperature", SamplingParams { temperature: nan, ..params() }),
            ("top_p", SamplingParams { top_p: 0.0, ..params() }),
            ("top_p", SamplingParams { top_p: nan, ..params() }),
            ("min_p", SamplingParams { min_p: 1.5, ..params() }),
            ("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..params() }),
            ("presence_penalty", SamplingParams { presence_penalty: 2.5, ..params() }),
            ("frequency_penalty", SamplingParams { frequency_penalty: nan, ..params() }),
            ("logit_bias", SamplingParams { logit_bias: vec![(1, nan)], ..params() }),
            ("logprobs", SamplingParams { logprobs: Some(21), ..params() }),
        ];
        for (name, params) in bad {
            let message = params.validate().expect_err(name);
            assert!(message.starts_with(name), "{message}");
        }
        assert_eq!(params().validate(), Ok(()));
    }

    proptest! {
        /// The fast search for the nucleus finds what a full sort finds.
        #[test]
        fn nucleus_equals_full_sort(
            logits in prop::collection::vec(-8.0f32..8.0, 1..1500),
            top_p in 0.01f32..1.0,
            min_p in prop::sample::select(vec![0.0f32, 0.0, 0.01]),
            seed: u64,
        ) {
            let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut all: Vec<(f64, u32)> =
                logits.iter().zip(0..).map(|(&l, token)| (f64::from((l - highest).exp()), token)).collect();
            all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            let total: f64 = all.iter().map(|c| c.0).sum();
            let params = SamplingParams { top_p, min_p, seed: Some(seed), ..SamplingParams::default() };
            let token = draws(params, &logits, 1)[0];
            let rank = all.iter().position(|c| c.1 == token).expect("a token of the vocabulary");
            let before: f64 = all[..rank].iter().map(|c| c.0).sum();
            prop_assert!(before < f64::from(top_p) * total * (1.0 + 1e-6) + 1e-9);
            prop_assert!(all[rank].0 >= f64::from(min_p) * (1.0 - 1e-6));
        }
    }
}
