//! Norms, activations, head preparation (head norm and rotation), and sums of rows.
//!
//! Every function gives an element the same value wherever it sits: the last, incomplete vector of a row goes through
//! the same vector code, padded. Sums over a row have one order of additions: element `k`
//! goes, in ascending order, into partial sum `k mod 32`, and the partial sums are combined by one fixed tree.
#![allow(unsafe_code)]

use tangram_checkpoint::{Mlp, Norm};

use super::buffer::Disjoint;
use super::format::GROUP;
use super::simd::{LANES, PARTS, Simd, cap_softly, exp, load_partial, store_partial};
use super::{Isa, Kernel};
use crate::pool::Pool;

/// Elements of a task of an element-wise function.
const TASK_ELEMENTS: usize = 1 << 14;

/// A normalisation with its parameters at hand.
#[derive(Clone, Copy)]
pub struct NormWeights<'a> {
    /// Kind and epsilon.
    pub norm: Norm,
    /// `[width]`.
    pub weight: &'a [f32],
    /// `[width]`; only used by layer norm.
    pub bias: Option<&'a [f32]>,
}

/// Normalises the rows of `x` (`[rows, width]`, the width of the weights) into `out`.
pub fn normalise(isa: Isa, pool: &Pool, norm: NormWeights<'_>, x: &[f32], out: &mut [f32]) {
    assert_eq!(x.len(), out.len());
    let width = norm.weight.len();
    for_rows(pool, out, width, |first, out| {
        for (index, out) in out.chunks_exact_mut(width).enumerate() {
            let start = (first + index) * width;
            out.copy_from_slice(&x[start..start + width]);
            isa.dispatch(NormRow { norm, x: out });
        }
    });
}

/// Normalises the rows of `x` (`[rows, width]`) in place.
pub fn normalise_in_place(isa: Isa, pool: &Pool, norm: NormWeights<'_>, x: &mut [f32]) {
    let width = norm.weight.len();
    for_rows(pool, x, width, |_, rows| {
        rows.chunks_exact_mut(width).for_each(|x| isa.dispatch(NormRow { norm, x }));
    });
}

/// Shares out the rows of `data`: `body(first row, rows)`.
fn for_rows(pool: &Pool, data: &mut [f32], width: usize, body: impl Fn(usize, &mut [f32]) + Sync) {
    assert_eq!(data.len() % width, 0);
    let rows = data.len() / width;
    let per_task = (TASK_ELEMENTS / width).max(1);
    let work = data.len() / 2;
    let data = Disjoint::new(data);
    pool.run(rows.div_ceil(per_task), 0, work, &|task, _| {
        let first = task * per_task;
        let count = per_task.min(rows - first);
        // SAFETY: tasks take disjoint rows.
        body(first, unsafe { data.part(first * width, count * width) });
    });
}

/// The sum of the elements of `x`, or of their squares, in the order of additions of the crate.
#[inline(always)]
fn sum<S: Simd, const SQUARED: bool>(s: S, x: &[f32]) -> f32 {
    let mut parts = [s.splat(0.0); PARTS];
    let (groups, tail) = x.as_chunks::<GROUP>();
    let mut padded = [0.0; GROUP];
    padded[..tail.len()].copy_from_slice(tail);
    // Adding the zeros of an empty tail changes nothing.
    for group in groups.iter().chain([&padded]) {
        for (u, part) in parts.iter_mut().enumerate() {
            // SAFETY: a group has 32 elements.
            let v = unsafe { s.load(group.as_ptr().add(u * LANES)) };
            *part = s.add(*part, if SQUARED { s.mul(v, v) } else { v });
        }
    }
    s.sum(s.add(s.add(parts[0], parts[1]), s.add(parts[2], parts[3])))
}

/// A function of two vectors. Not a closure: those are not inlined reliably, and vector code that is not inlined is
/// not compiled for the instruction set.
trait Pairwise: Copy {
    fn apply<S: Simd>(self, s: S, x: S::V, y: S::V) -> S::V;
}

/// Replaces every vector of `x` by its function with the vector at the same place in `y` (as long as `x`).
#[inline(always)]
fn update<S: Simd, F: Pairwise>(s: S, x: &mut [f32], y: &[f32], f: F) {
    assert_eq!(x.len(), y.len());
    let (whole, tail) = (x.len() / LANES, x.len() % LANES);
    let (x, y) = (x.as_mut_ptr(), y.as_ptr());
    // SAFETY: all offsets are below the common length.
    unsafe {
        for i in 0..whole {
            s.store(x.add(i * LANES), f.apply(s, s.load(x.add(i * LANES)), s.load(y.add(i * LANES))));
        }
        if tail > 0 {
            let (x, y) = (x.add(whole * LANES), y.add(whole * LANES));
            let value = f.apply(s, load_partial(s, x, tail), load_partial(s, y, tail));
            store_partial(s, x, value, tail);
        }
    }
}

/// x · scale · weight.
#[derive(Clone, Copy)]
struct Scale(f32);

impl Pairwise for Scale {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V, weight: S::V) -> S::V {
        s.mul(s.mul(x, s.splat(self.0)), weight)
    }
}

/// x + y.
#[derive(Clone, Copy)]
struct Add;

impl Pairwise for Add {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V, y: S::V) -> S::V {
        s.add(x, y)
    }
}

/// x + y · scale.
#[derive(Clone, Copy)]
struct AddScaled(f32);

impl Pairwise for AddScaled {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V, y: S::V) -> S::V {
        s.fma(y, s.splat(self.0), x)
    }
}

/// gelu(gate) · up by the tanh approximation.
#[derive(Clone, Copy)]
struct GeluTanhTimes;

impl Pairwise for GeluTanhTimes {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, gate: S::V, up: S::V) -> S::V {
        s.mul(GeluTanh.apply(s, gate), up)
    }
}

/// silu(gate) · up.
#[derive(Clone, Copy)]
struct SiluTimes;

impl Pairwise for SiluTimes {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, gate: S::V, up: S::V) -> S::V {
        let silu = s.div(gate, s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), gate))));
        s.mul(silu, up)
    }
}

struct NormRow<'a> {
    norm: NormWeights<'a>,
    x: &'a mut [f32],
}

impl Kernel for NormRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let NormRow { norm: NormWeights { norm, weight, bias }, x } = self;
        let width = x.len() as f32;
        let epsilon = match norm {
            Norm::Rms { epsilon } => epsilon,
            Norm::Layer { epsilon } => {
                let mean = sum::<S, false>(s, x) / width;
                x.iter_mut().for_each(|x| *x -= mean);
                epsilon
            }
        };
        let mean_square = sum::<S, true>(s, x) / width;
        update(s, x, weight, Scale(1.0 / (mean_square + epsilon).sqrt()));
        if let (Norm::Layer { .. }, Some(bias)) = (norm, bias) {
            update(s, x, bias, Add);
        }
    }
}

/// `gate = activation(gate) · up`, element by element, with the activation of a gated `mlp`.
pub fn activate_gate(isa: Isa, pool: &Pool, mlp: Mlp, gate: &mut [f32], up: &[f32]) {
    match mlp {
        Mlp::GatedGeluTanh => update_all(isa, pool, gate, up, GeluTanhTimes),
        _ => update_all(isa, pool, gate, up, SiluTimes),
    }
}

/// The activation of an `mlp` without a gate, in place.
pub fn activate(isa: Isa, pool: &Pool, mlp: Mlp, x: &mut [f32]) {
    match mlp {
        Mlp::Relu => map_all(isa, pool, x, Relu),
        Mlp::GeluTanh => map_all(isa, pool, x, GeluTanh),
        _ => map_all(isa, pool, x, Gelu),
    }
}

/// Replaces every element by `cap · tanh(element / cap)`.
pub fn cap(isa: Isa, pool: &Pool, cap: f32, x: &mut [f32]) {
    map_all(isa, pool, x, Cap(cap));
}

/// `x += y`, element by element.
pub fn add(isa: Isa, pool: &Pool, x: &mut [f32], y: &[f32]) {
    update_all(isa, pool, x, y, Add);
}

/// `x[row] += y · weight` for one row of `x` (as wide as `y`).
pub fn add_scaled(isa: Isa, x: &mut [f32], y: &[f32], weight: f32) {
    isa.dispatch(Update { x, y, f: AddScaled(weight) });
}

fn update_all<F: Pairwise + Sync>(isa: Isa, pool: &Pool, x: &mut [f32], y: &[f32], f: F) {
    assert_eq!(x.len(), y.len());
    for_elements(pool, x, |start, x| {
        isa.dispatch(Update { y: &y[start..start + x.len()], x, f });
    });
}

fn map_all<F: Single + Sync>(isa: Isa, pool: &Pool, x: &mut [f32], f: F) {
    for_elements(pool, x, |_, x| isa.dispatch(Map { x, f }));
}

/// Shares out the elements of `data`: `body(first element, elements)`.
fn for_elements(pool: &Pool, data: &mut [f32], body: impl Fn(usize, &mut [f32]) + Sync) {
    let len = data.len();
    let data = Disjoint::new(data);
    pool.run(len.div_ceil(TASK_ELEMENTS / 4), 0, len * 4, &|task, _| {
        let start = task * (TASK_ELEMENTS / 4);
        // SAFETY: tasks take disjoint elements.
        body(start, unsafe { data.part(start, (TASK_ELEMENTS / 4).min(len - start)) });
    });
}

struct Update<'a, F> {
    x: &'a mut [f32],
    y: &'a [f32],
    f: F,
}

impl<F: Pairwise> Kernel for Update<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        update(s, self.x, self.y, self.f);
    }
}

/// A function of one vector; see [`Pairwise`].
trait Single: Copy {
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V;
}

struct Map<'a, F> {
    x: &'a mut [f32],
    f: F,
}

impl<F: Single> Kernel for Map<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Map { x, f } = self;
        let (whole, tail) = (x.len() / LANES, x.len() % LANES);
        let x = x.as_mut_ptr();
        // SAFETY: all offsets are below the length.
        unsafe {
            for i in 0..whole {
                s.store(x.add(i * LANES), f.apply(s, s.load(x.add(i * LANES))));
            }
            if tail > 0 {
                let x = x.add(whole * LANES);
                store_partial(s, x, f.apply(s, load_partial(s, x, tail)), tail);
            }
        }
    }
}

/// max(x, 0); NaN stays.
#[derive(Clone, Copy)]
struct Relu;

impl Single for Relu {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        s.max(s.splat(0.0), x)
    }
}

/// cap · tanh(x / cap).
#[derive(Clone, Copy)]
struct Cap(f32);

impl Single for Cap {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        cap_softly(s, x, self.0)
    }
}

/// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`, which is `x / (1 + e^−2u)` with the argument `u` of the tangent.
#[derive(Clone, Copy)]
struct GeluTanh;

impl Single for GeluTanh {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        let one = s.splat(1.0);
        let factor = s.fma(s.mul(x, x), s.splat(0.044_715), one);
        let minus_twice = s.mul(s.mul(x, factor), s.splat(-1.595_769));
        s.div(x, s.add(one, exp(s, minus_twice)))
    }
}

/// The exact GELU, `x/2 · (1 + erf(x/√2))`.
#[derive(Clone, Copy)]
struct Gelu;

impl Single for Gelu {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, x: S::V) -> S::V {
        gelu_vector(s, x)
    }
}

/// GELU with erf by Abramowitz and Stegun, formula 7.1.26 (absolute error of erf below 1.5e-7).
#[inline(always)]
fn gelu_vector<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    let z = s.mul(s.abs(x), s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = s.div(one, s.fma(s.splat(0.327_591_1), z, one));
    let mut p = s.splat(1.061_405_4);
    for c in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        p = s.fma(p, t, s.splat(c));
    }
    let complement = s.mul(s.mul(p, t), exp(s, s.sub(s.splat(0.0), s.mul(z, z))));
    let erf = s.copysign(s.sub(one, complement), x);
    s.mul(s.mul(s.splat(0.5), x), s.add(one, erf))
}

/// Prepares the heads of one token in place: RMS norm of each head if `norm` is given, then rotation of the first
/// `2 · cos.len()` elements of each head by the angles with these cosines and sines (pairs are `i`, `i + cos.len()`).
pub(crate) fn prepare_heads(
    isa: Isa,
    heads: &mut [f32],
    head_dim: usize,
    norm: Option<NormWeights<'_>>,
    cos: &[f32],
    sin: &[f32],
) {
    isa.dispatch(PrepareHeads { heads, head_dim, norm, cos, sin });
}

struct PrepareHeads<'a> {
    heads: &'a mut [f32],
    head_dim: usize,
    norm: Option<NormWeights<'a>>,
    cos: &'a [f32],
    sin: &'a [f32],
}

impl Kernel for PrepareHeads<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let half = self.cos.len();
        assert!(self.sin.len() == half && 2 * half <= self.head_dim);
        let (whole, tail) = (half / LANES, half % LANES);
        for head in self.heads.chunks_exact_mut(self.head_dim) {
            if let Some(norm) = self.norm {
                NormRow { norm, x: head }.run(s);
            }
            let (a, b) = (head.as_mut_ptr(), head.as_mut_ptr().wrapping_add(half));
            let (cos, sin) = (self.cos.as_ptr(), self.sin.as_ptr());
            // SAFETY: pairs are inside the head, angles inside the tables (asserted).
            unsafe {
                for i in (0..whole).map(|i| i * LANES) {
                    let angle = (s.load(cos.add(i)), s.load(sin.add(i)));
                    let (x, y) = rotate(s, s.load(a.add(i)), s.load(b.add(i)), angle);
                    s.store(a.add(i), x);
                    s.store(b.add(i), y);
                }
                if tail > 0 {
                    let i = whole * LANES;
                    let angle = (load_partial(s, cos.add(i), tail), load_partial(s, sin.add(i), tail));
                    let (x, y) =
                        rotate(s, load_partial(s, a.add(i), tail), load_partial(s, b.add(i), tail), angle);
                    store_partial(s, a.add(i), x, tail);
                    store_partial(s, b.add(i), y, tail);
                }
            }
        }
    }
}

/// The pair (a, b) turned by the angle with this cosine and sine.
#[inline(always)]
fn rotate<S: Simd>(s: S, a: S::V, b: S::V, (cos, sin): (S::V, S::V)) -> (S::V, S::V) {
    (s.sub(s.mul(a, cos), s.mul(b, sin)), s.add(s.mul(b, cos), s.mul(a, sin)))
}

/// The Euclidean length of `x`.
pub fn length(isa: Isa, x: &[f32]) -> f32 {
    isa.dispatch(SumOfSquares { x }).sqrt()
}

struct SumOfSquares<'a> {
    x: &'a [f32],
}

impl Kernel for SumOfSquares<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        sum::<S, true>(s, self.x)
    }
}
