//! Grouped low-rank products: `out[t] += scale · B (A x[t])`, each row of a batch with the factors of its own adapter.
//!
//! Rows with the same adapter are taken together, so that its factors are read once for several of them. **The order
//! of additions**: in an element of `A x`, product `k` goes, in ascending order, into partial sum `k mod 32`, and the
//! partial sums are combined by one fixed tree; an element of the product adds the elements of `A x` in ascending order
//! and is then added to `out`. So a row's result does not depend on the other rows.
#![allow(unsafe_code)]

use std::marker::PhantomData;

use tangram_checkpoint::DType;

use super::buffer::Disjoint;
use super::format::{Bf16, F16, F32, Format, GROUP, load_tail};
use super::simd::{LANES, PARTS, Simd};
use super::{Isa, Kernel};
use crate::pool::Pool;

/// Rows of a task at most: what is worth reading the factors for once.
const PIECE_ROWS: usize = 8;
/// How many bytes ahead `A`, which is read from front to back, is asked for.
const BYTES_AHEAD: usize = 1024;
/// Rows that the inner loops work on together.
const TILE: usize = 2;

/// A factor as stored, `[rank, width]`, in a type without blocks.
#[derive(Clone, Copy)]
pub struct FactorBytes<'a> {
    /// Its bytes.
    pub bytes: &'a [u8],
    /// Their element type: f32, f16 or bf16.
    pub dtype: DType,
}

/// An update's factors and what their product is multiplied with.
#[derive(Clone, Copy)]
pub struct Factors<'a> {
    /// `A`, `[rank, columns of x]`.
    pub a: FactorBytes<'a>,
    /// `B` transposed, `[rank, columns of out]`.
    pub b: FactorBytes<'a>,
    /// Rows of both.
    pub rank: usize,
    /// Factor of the product.
    pub scale: f32,
}

/// Which rows of a batch belong to which adapter, cut into pieces of work.
#[derive(Default)]
pub struct Grouping {
    /// Rows of the batch, those of an adapter together.
    rows: Vec<usize>,
    /// Adapter, and its part of `rows`.
    pieces: Vec<(usize, std::ops::Range<usize>)>,
}

impl Grouping {
    /// Groups the rows by their adapter; rows without one are left out.
    pub fn new(adapter_of_row: impl Iterator<Item = Option<usize>>) -> Grouping {
        let mut pairs: Vec<(usize, usize)> =
            adapter_of_row.enumerate().filter_map(|(row, adapter)| Some((adapter?, row))).collect();
        pairs.sort_unstable();
        let rows = pairs.iter().map(|&(_, row)| row).collect();
        let mut pieces = Vec::new();
        let mut start = 0;
        for group in pairs.chunk_by(|a, b| a.0 == b.0) {
            for piece in group.chunks(PIECE_ROWS) {
                pieces.push((piece[0].0, start..start + piece.len()));
                start += piece.len();
            }
        }
        Grouping { rows, pieces }
    }

    /// Adapters that some row has, ascending.
    pub fn adapters(&self) -> impl Iterator<Item = usize> {
        self.pieces.chunk_by(|a, b| a.0 == b.0).map(|pieces| pieces[0].0)
    }
}

/// Adds the updates of several matrices that share their input `x` (`[rows, columns]`). `outs[m]` is `[rows, widths[m]]`;
/// `factors(adapter, m)` are those of an adapter for matrix `m`, if it has any. Panics if a slice does not have the
/// length that the shapes demand.
pub fn add_low_rank<'a, const N: usize>(
    isa: Isa,
    pool: &Pool,
    grouping: &Grouping,
    x: &[f32],
    columns: usize,
    outs: [(&mut [f32], usize); N],
    factors: &(dyn Fn(usize, usize) -> Option<Factors<'a>> + Sync),
) {
    let pieces = &grouping.pieces;
    let mut work = 0;
    let mut scratch = 0;
    for (adapter, rows) in pieces {
        for (matrix, (_, width)) in outs.iter().enumerate() {
            let rank = factors(*adapter, matrix).map_or(0, |factors| factors.rank);
            work += rows.len() * rank * (columns + width) / LANES;
            scratch = scratch.max(PIECE_ROWS * rank);
        }
    }
    if work == 0 {
        return;
    }
    let outs = outs.map(|(out, width)| (Disjoint::new(out), width));
    // What the task has to read first that this thread will probably take next.
    let next = |task: usize| {
        let task = task + pool.threads();
        let (adapter, _) = pieces.get(task / N)?;
        factors(*adapter, task % N).map(|factors| factors.a.bytes)
    };
    pool.run(pieces.len() * N, scratch, work, &|task, inner| {
        let ((adapter, rows), matrix) = (&pieces[task / N], task % N);
        let Some(Factors { a, b, rank, scale }) = factors(*adapter, matrix) else { return };
        let (out, width) = &outs[matrix];
        let width = *width;
        for factor in [(a, columns), (b, width)] {
            let expected = factor.0.dtype.tensor_bytes(&[rank as u64, factor.1 as u64]);
            assert_eq!(expected, Some(factor.0.bytes.len() as u64), "bytes of a factor");
        }
        for (tile, rows) in grouping.rows[rows.clone()].chunks(TILE).enumerate() {
            // Factors are read where they lie, each of them once: memory is asked for what comes next in good time.
            let (after_a, after_b) =
                if tile == 0 { (b.bytes, next(task).unwrap_or_default()) } else { Default::default() };
            let row = |tile: usize| rows[tile.min(rows.len() - 1)];
            let input = |tile| &x[row(tile) * columns..(row(tile) + 1) * columns];
            let inner = &mut inner[..TILE * rank];
            // SAFETY: a row belongs to one piece, and a piece's rows are taken one tile after the other; the second
            // part is taken only where the tile has a second row, which is another one.
            let output = |tile: usize| unsafe { out.part(row(tile) * width, width) };
            macro_rules! run {
                ($a:ty, $b:ty) => {
                    match rows.len() {
                        1 => {
                            let x = [input(0)];
                            isa.dispatch(Shrink::<$a, 1> {
                                a: a.bytes,
                                scale,
                                x,
                                inner,
                                next: after_a,
                                format: PhantomData,
                            });
                            let out = [output(0)];
                            isa.dispatch(Expand::<$b, 1> {
                                b: b.bytes,
                                inner,
                                out,
                                next: after_b,
                                format: PhantomData,
                            });
                        }
                        _ => {
                            let x = [input(0), input(1)];
                            isa.dispatch(Shrink::<$a, 2> {
                                a: a.bytes,
                                scale,
                                x,
                                inner,
                                next: after_a,
                                format: PhantomData,
                            });
                            let out = [output(0), output(1)];
                            isa.dispatch(Expand::<$b, 2> {
                                b: b.bytes,
                                inner,
                                out,
                                next: after_b,
                                format: PhantomData,
                            });
                        }
                    }
                };
            }
            macro_rules! run_b {
                ($a:ty) => {
                    match b.dtype {
                        DType::F32 => run!($a, F32),
                        DType::F16 => run!($a, F16),
                        DType::BF16 => run!($a, Bf16),
                        other => panic!("a factor stored as {other}"),
                    }
                };
            }
            match a.dtype {
                DType::F32 => run_b!(F32),
                DType::F16 => run_b!(F16),
                DType::BF16 => run_b!(Bf16),
                other => panic!("a factor stored as {other}"),
            }
        }
    });
}

/// `inner[j · T + t] = scale · Σ_k a[j][k] · x[t][k]`.
struct Shrink<'a, F, const T: usize> {
    a: &'a [u8],
    scale: f32,
    x: [&'a [f32]; T],
    inner: &'a mut [f32],
    /// What is read afterwards.
    next: &'a [u8],
    format: PhantomData<F>,
}

/// Asks for memory bit by bit.
struct Ahead {
    at: *const u8,
    /// Bytes of a step.
    share: usize,
}

impl Ahead {
    /// For all of `bytes` in this many steps.
    fn new(bytes: &[u8], steps: usize) -> Ahead {
        Ahead { at: bytes.as_ptr(), share: bytes.len().div_ceil(steps.max(1)) }
    }

    #[inline(always)]
    fn step<S: Simd>(&mut self, s: S) {
        for line in (0..self.share).step_by(64) {
            s.ask_for(self.at.wrapping_add(line));
        }
        self.at = self.at.wrapping_add(self.share);
    }
}

impl<F: Format, const T: usize> Kernel for Shrink<'_, F, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let columns = self.x[0].len();
        let (groups, tail) = (columns / GROUP, columns % GROUP);
        let row_bytes = groups * F::BLOCK_BYTES + tail * (F::BLOCK_BYTES / GROUP);
        let mut x_tail = [[0.0; GROUP]; T];
        for (to, x) in x_tail.iter_mut().zip(&self.x) {
            assert_eq!(x.len(), columns);
            to[..tail].copy_from_slice(&x[columns - tail..]);
        }
        let mut ahead = Ahead::new(self.next, groups * self.a.len() / row_bytes.max(1));
        for (row, inner) in self.a.chunks_exact(row_bytes).zip(self.inner.chunks_exact_mut(T)) {
            let mut parts = [[s.splat(0.0); PARTS]; T];
            let mut weights = row.as_ptr();
            // SAFETY: a row holds `columns` elements, as do the slices of `x`: `groups` whole groups and a tail.
            unsafe {
                for group in 0..groups {
                    ahead.step(s);
                    s.ask_for(weights.wrapping_add(BYTES_AHEAD));
                    let w = F::load32(s, weights, F::common(s, weights), 0);
                    for (parts, x) in parts.iter_mut().zip(&self.x) {
                        let x = x.as_ptr().add(group * GROUP);
                        for u in 0..PARTS {
                            parts[u] = s.fma(w[u], s.load(x.add(u * LANES)), parts[u]);
                        }
                    }
                    weights = weights.add(F::BLOCK_BYTES);
                }
                if tail > 0 {
                    let w = load_tail::<S, F>(s, weights, tail);
                    for (parts, x) in parts.iter_mut().zip(&x_tail) {
                        for u in 0..PARTS {
                            parts[u] = s.fma(w[u], s.load(x.as_ptr().add(u * LANES)), parts[u]);
                        }
                    }
                }
            }
            for (inner, parts) in inner.iter_mut().zip(&parts) {
                let sum = s.sum(s.add(s.add(parts[0], parts[1]), s.add(parts[2], parts[3])));
                *inner = self.scale * sum;
            }
        }
    }
}

/// `out[t][n] += Σ_j inner[j · T + t] · b[j][n]`.
struct Expand<'a, F, const T: usize> {
    b: &'a [u8],
    inner: &'a [f32],
    out: [&'a mut [f32]; T],
    /// What is read afterwards.
    next: &'a [u8],
    format: PhantomData<F>,
}

impl<F: Format, const T: usize> Kernel for Expand<'_, F, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let width = self.out[0].len();
        let (groups, tail) = (width / GROUP, width % GROUP);
        let row_bytes = groups * F::BLOCK_BYTES + tail * (F::BLOCK_BYTES / GROUP);
        let mut ahead = Ahead::new(self.next, groups);
        for group in 0..groups + usize::from(tail > 0) {
            ahead.step(s);
            let mut sums = [[s.splat(0.0); PARTS]; T];
            for (row, inner) in self.b.chunks_exact(row_bytes).zip(self.inner.chunks_exact(T)) {
                // SAFETY: a row holds `width` elements: `groups` whole groups and a tail.
                let w = unsafe {
                    let weights = row.as_ptr().add(group * F::BLOCK_BYTES);
                    if group < groups {
                        F::load32(s, weights, F::common(s, weights), 0)
                    } else {
                        load_tail::<S, F>(s, weights, tail)
                    }
                };
                for (sums, &inner) in sums.iter_mut().zip(inner) {
                    let inner = s.splat(inner);
                    for u in 0..PARTS {
                        sums[u] = s.fma(w[u], inner, sums[u]);
                    }
                }
            }
            for (out, sums) in self.out.iter_mut().zip(&sums) {
                let start = group * GROUP;
                let count = GROUP.min(width - start);
                let out = &mut out[start..start + count];
                let mut padded = [0.0; GROUP];
                padded[..count].copy_from_slice(out);
                for (u, &sum) in sums.iter().enumerate() {
                    // SAFETY: `padded` has 32 elements.
                    unsafe {
                        let p = padded.as_mut_ptr().add(u * LANES);
                        s.store(p, s.add(s.load(p), sum));
                    }
                }
                out.copy_from_slice(&padded[..count]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        (0..count as u32)
            .map(|i| ((i.wrapping_mul(2654435761) ^ seed) % 2001) as f32 / 1000.0 - 1.0)
            .collect()
    }

    fn stored(values: &[f32], dtype: DType) -> Vec<u8> {
        match dtype {
            DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        }
    }

    fn rounded(value: f32, dtype: DType) -> f64 {
        match dtype {
            DType::F32 => f64::from(value),
            DType::F16 => f16::from_f32(value).to_f64(),
            _ => bf16::from_f32(value).to_f64(),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_row_gets_its_own_update_whatever_the_others_are(
            columns in 1usize..100, width in 1usize..100, rank in 1usize..20, of_row in proptest::collection::vec(
                proptest::option::of(0usize..3), 1..24), a_type in 0usize..3, b_type in 0usize..3, seed: u32
        ) {
            let types = [DType::F32, DType::F16, DType::BF16];
            let (a_type, b_type) = (types[a_type], types[b_type]);
            let rows = of_row.len();
            let x = numbers(rows * columns, seed);
            let before = numbers(rows * width, seed ^ 77);
            let a: Vec<Vec<f32>> = (0..3).map(|i| numbers(rank * columns, seed ^ (i + 1))).collect();
            let b: Vec<Vec<f32>> = (0..3).map(|i| numbers(rank * width, seed ^ (i + 101))).collect();
            let a_bytes: Vec<Vec<u8>> = a.iter().map(|a| stored(a, a_type)).collect();
            let b_bytes: Vec<Vec<u8>> = b.iter().map(|b| stored(b, b_type)).collect();
            let scale = |adapter: usize| 0.5 + adapter as f32;
            let factors = |adapter: usize, _: usize| Some(Factors {
                a: FactorBytes { bytes: &a_bytes[adapter], dtype: a_type },
                b: FactorBytes { bytes: &b_bytes[adapter], dtype: b_type },
                rank,
                scale: scale(adapter),
            });
            let run = |isa: Isa, threads: usize, of_row: &[Option<usize>], x: &[f32], before: &[f32]| {
                let mut out = before.to_vec();
                let grouping = Grouping::new(of_row.iter().copied());
                let pool = Pool::new(threads);
                add_low_rank(isa, &pool, &grouping, x, columns, [(&mut out, width)], &factors);
                out
            };
            for isa in Isa::available() {
                let out = run(isa, 1, &of_row, &x, &before);
                for row in 0..rows {
                    let (x, before) = (&x[row * columns..][..columns], &before[row * width..][..width]);
                    let found = &out[row * width..][..width];
                    let alone = run(isa, 2, &of_row[row..=row], x, before);
                    prop_assert_eq!(found, &alone[..], "row {} depends on the others", row);
                    for n in 0..width {
                        let update = of_row[row].map_or(0.0, |adapter| (0..rank).map(|j| {
                            let inner: f64 = (0..columns)
                                .map(|k| rounded(a[adapter][j * columns + k], a_type) * f64::from(x[k]))
                                .sum();
                            f64::from(scale(adapter)) * inner * rounded(b[adapter][j * width + n], b_type)
                        }).sum::<f64>());
                        let error = (f64::from(found[n]) - f64::from(before[n]) - update).abs();
                        prop_assert!(error < 1e-4, "{} {}: {error}", row, n);
                    }
                }
            }
        }
    }
}
