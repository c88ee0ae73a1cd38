//! How fast this machine executes: seconds per unit of [`StageWork`], measured by running the kernels themselves.
//!
//! A measurement takes some tens of milliseconds. Each figure is the best of several runs by the clock: it says what the
//! machine can do when it does nothing else. Whoever uses it on a machine that does other things too corrects it by what
//! passes really take.

use std::hint::black_box;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tangram_checkpoint::{Attention, DType, Mlp, Norm};

use crate::cost::StageWork;
use crate::executor::Executor;
use crate::kernels::Buffer;
use crate::kernels::attention::{Heads, Keys, Scoring, Spans, attend};
use crate::kernels::elementwise::{NormWeights, activate_gate, normalise_in_place};
use crate::kernels::matmul::{Linear, matmul};

/// Runs of which none is better than the best before them; then that one counts. Few suffice on a machine that does
/// nothing else, where all are equal.
const RUNS_IN_VAIN: usize = 4;
/// Runs at most.
const MAX_RUNS: usize = 16;
/// Columns of the matrices that are measured.
const COLUMNS: usize = 1024;
/// Bytes of weights that are streamed; few caches hold them.
const STREAMED_BYTES: usize = 48 << 20;
/// Bytes of weights that are widened.
const WIDENED_BYTES: usize = 6 << 20;
/// Rows of the matrices that are multiplied with many tokens.
const ROWS: usize = 1024;
/// Tokens of the products by which widening is measured; few, so that it shows.
const FEW: usize = 3;
/// Tokens of the other measurements.
const TOKENS: usize = 96;

/// Seconds per unit of work. Serialises, so that it need not be measured at every start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    weights: Vec<(DType, WeightSeconds)>,
    attention: f64,
    element: f64,
    activation: f64,
    angle: f64,
    phase: f64,
}

/// Seconds per weight of one type.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct WeightSeconds {
    single: f64,
    widened: f64,
    /// Of a product with an element of one of several tokens.
    product: f64,
}

impl Rates {
    /// Measures everything but the weight types.
    pub fn measure(executor: &Executor) -> Rates {
        let Executor { isa, pool, .. } = executor;
        let phase =
            best(|| (0..64).for_each(|_| pool.run(pool.threads() * 4, 0, usize::MAX, &|_, _| {}))) / 64.0;
        let mut x = vec![0.5f32; TOKENS * COLUMNS];
        let weight = vec![1.0f32; COLUMNS];
        let element = best(|| {
            let norm = NormWeights { norm: Norm::Rms { epsilon: 1e-5 }, weight: &weight, bias: None };
            normalise_in_place(*isa, pool, norm, &mut x);
        });
        let up = vec![0.5f32; x.len()];
        let activation = best(|| activate_gate(*isa, pool, Mlp::GatedSilu, &mut x, &up));
        let elements = x.len() as f64;

        let shape = Heads { heads: 16, kv_heads: 4, head_dim: COLUMNS / 16 };
        let mut spans = Spans::default();
        spans.push(TOKENS, 0, Attention::Causal, shape.heads / shape.kv_heads);
        let keys = vec![0.25f32; TOKENS * shape.kv_heads * shape.head_dim];
        let queries = vec![0.5f32; TOKENS * COLUMNS];
        let scoring = Scoring { scale: 0.125, cap: None, window: None };
        let attention =
            best(|| attend(*isa, pool, shape, scoring, &spans, Keys::Fresh(&keys, &keys), &queries, &mut x));
        let products = (TOKENS * (TOKENS + 1) * COLUMNS) as f64;

        let angles = 1024;
        let angle = best(|| {
            (0..angles).for_each(|i| {
                let angle = f64::from(black_box(i as f32 * 0.37));
                black_box((angle.cos() as f32, angle.sin() as f32));
            });
        });
        let after = |seconds: f64| (seconds - phase).max(seconds / 4.0);
        Rates {
            weights: Vec::new(),
            attention: after(attention) / products,
            element: after(element) / elements,
            activation: after(activation) / elements,
            angle: angle / f64::from(angles),
            phase,
        }
    }

    /// Whether weights of this type have been measured.
    pub fn knows(&self, dtype: DType) -> bool {
        self.weights.iter().any(|(known, _)| *known == dtype)
    }

    /// Measures weight types; what is known already is measured anew.
    pub fn measure_weights(&mut self, executor: &Executor, dtypes: &[DType]) {
        if dtypes.is_empty() {
            return;
        }
        // 0x2c is a small number in every type and at every place.
        let bytes = vec![0x2c; STREAMED_BYTES];
        for &dtype in dtypes {
            let Some(row_bytes) = dtype.tensor_bytes(&[1, COLUMNS as u64]) else { continue };
            let matrix = |most: usize| &bytes[..most / (row_bytes as usize * 4) * row_bytes as usize * 4];
            let weights = |matrix: &[u8]| (matrix.len() / row_bytes as usize * COLUMNS) as f64;
            let (streamed, widened) = (matrix(STREAMED_BYTES), matrix(WIDENED_BYTES));
            let multiplied = &bytes[..ROWS * row_bytes as usize];
            let seconds =
                |matrix: &[u8], tokens| product_seconds(executor, dtype, matrix, tokens) / weights(matrix);
            let single = seconds(streamed, 1);
            let (few, many) = (seconds(widened, FEW), seconds(multiplied, TOKENS));
            let product = (many - few).max(many / 4.0) / (TOKENS - FEW) as f64;
            let widened = (few - FEW as f64 * product).max(few / 8.0);
            let seconds = WeightSeconds { single, widened, product };
            self.weights.retain(|(known, _)| *known != dtype);
            self.weights.push((dtype, seconds));
        }
    }

    /// Seconds that a stage computes; `None` if it has weights of a type that has not been measured.
    pub fn seconds(&self, work: &StageWork) -> Option<f64> {
        let mut seconds = work.attention * self.attention
            + work.elements * self.element
            + work.activations * self.activation
            + work.angles * self.angle
            + work.phases * self.phase;
        for (dtype, weights) in &work.weights {
            let (_, rate) = self.weights.iter().find(|(known, _)| known == dtype)?;
            seconds += weights.single * rate.single
                + weights.widened * rate.widened
                + weights.products * rate.product;
        }
        Some(seconds)
    }
}

/// The best of some runs, in seconds by the clock: what work that does not share out evenly takes is not seen in the
/// processor time of all threads.
fn best(mut run: impl FnMut()) -> f64 {
    let (mut best, mut in_vain) = (f64::INFINITY, 0);
    for _ in 0..MAX_RUNS {
        let start = Instant::now();
        run();
        let seconds = start.elapsed().as_secs_f64();
        in_vain = if seconds < best * 0.97 { 0 } else { in_vain + 1 };
        best = best.min(seconds);
        if in_vain == RUNS_IN_VAIN {
            break;
        }
    }
    best
}

/// Seconds of the product of a matrix of [`COLUMNS`] columns with some tokens.
fn product_seconds(executor: &Executor, dtype: DType, weight: &[u8], tokens: usize) -> f64 {
    let rows =
        dtype.tensor_bytes(&[1, COLUMNS as u64]).map_or(0, |row_bytes| weight.len() / row_bytes as usize);
    let x = vec![0.5f32; tokens * COLUMNS];
    let mut out = vec![0.0f32; tokens * rows];
    let mut packed = Buffer::new();
    best(|| {
        let linear = Linear { weight, dtype, rows, bias: None, out: &mut out, accumulate: false };
        matmul(executor.isa, &executor.pool, &mut packed, &x, COLUMNS, tokens, [linear]);
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::WeightWork;

    #[test]
    fn what_was_not_measured_has_no_time() {
        let executor = Executor::new(2);
        let mut rates = Rates::measure(&executor);
        let with_products = |products| {
            let weights = vec![(DType::Q4_0, WeightWork { single: 1e6, widened: 1e6, products })];
            StageWork { weights, phases: 2.0, ..StageWork::default() }
        };
        let work = with_products(3e6);
        assert_eq!(rates.seconds(&work), None);
        rates.measure_weights(&executor, &[DType::Q4_0]);
        assert!(rates.knows(DType::Q4_0) && !rates.knows(DType::F16));
        let seconds = rates.seconds(&work).unwrap();
        assert!(seconds.is_finite() && seconds > 0.0);
        assert!(rates.seconds(&with_products(6e6)).unwrap() > seconds);
        let copy: Rates = serde_json::from_str(&serde_json::to_string(&rates).unwrap()).unwrap();
        // Written out in decimals and read back, a rate may differ in its last bit.
        let ratio = copy.seconds(&work).unwrap() / rates.seconds(&work).unwrap();
        assert!((ratio - 1.0).abs() < 1e-12, "{ratio}");
    }
}
