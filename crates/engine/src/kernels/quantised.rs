//! The matrix product with quantised weights: integers multiplied with integers.
//!
//! Each group of 32 activations of a token is rounded to integers of up to ±[`LIMIT`] with a common factor, which are
//! kept as two signed bytes: `x ≈ factor · (BASE · upper + lower)`. Fifteen bits instead of the eight that are usual
//! make the rounding as small as that of the f32 sums themselves, so that the product is that of the weights as
//! stored, not of a coarser neighbour.
//!
//! **The order of additions of every output element**: the groups of 32 weights in ascending order, each adding
//! `(scale · Σ q·x) · factor` and then `minimum · (factor · Σ x)`, where the sums over integers are exact. It does not
//! depend on the number of tokens or rows.
//!
//! 32 weights of each row of a panel are unpacked into registers and multiplied with all tokens of a block.
#![allow(unsafe_code)]

use std::marker::PhantomData;

use super::blocks::{Blocks, Group};
use super::buffer::Disjoint;
use super::format::GROUP;
use super::lanes::Lanes;
use super::panels::{Layout, PanelSums};
use super::simd::{LANES, PARTS, Simd};
use super::{Isa, Kernel};
use crate::pool::Pool;

/// What the upper byte counts.
const BASE: f32 = 254.0;
/// The largest integer: both bytes then stay in −127..=127.
const LIMIT: f32 = 127.0 * BASE + 126.0;
/// A record is 32 activations of a token, in f32 elements: eight numbers, then the upper and the lower bytes.
const RECORD: usize = NUMBERS + 2 * GROUP / 4;
/// Elements of the numbers of a record: the factor, the sums of the activations (all, first and last sixteen), the
/// sums of upper and of lower bytes (as i32), two unused.
const NUMBERS: usize = 8;
/// Activations that make a packing task worth handing to another thread.
const TASK_ACTIVATIONS: usize = 1 << 14;

/// Elements of a token's records.
pub(super) fn token_elements(columns: usize) -> usize {
    columns / GROUP * RECORD
}

/// Rounds `x` (`[tokens, columns]`) to records, laid out as `[block][group][token of the block]`.
pub(super) fn pack(isa: Isa, pool: &Pool, layout: Layout, x: &[f32], columns: usize, records: &mut [f32]) {
    assert_eq!(records.len(), layout.elements());
    let per_task = (TASK_ACTIVATIONS / columns).max(1);
    let records = Disjoint::new(records);
    for block in 0..layout.blocks {
        let tokens = layout.tokens(block);
        let step = tokens.len() * RECORD;
        let work = tokens.len() * columns / 2;
        pool.run(tokens.len().div_ceil(per_task), 0, work, &|task, _| {
            for token in task * per_task..tokens.len().min((task + 1) * per_task) {
                let x = &x[(tokens.start + token) * columns..][..columns];
                let first = layout.place(block).start + token * RECORD;
                isa.dispatch(Pack { x, records: &records, first, step });
            }
        });
    }
}

/// Rounds one token.
struct Pack<'a> {
    x: &'a [f32],
    records: &'a Disjoint<'a>,
    /// Its first record.
    first: usize,
    /// From a record to its next.
    step: usize,
}

impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let zero = s.splat(0.0);
        for (group, x) in self.x.as_chunks::<GROUP>().0.iter().enumerate() {
            // SAFETY: the records of a token are its own, and a task packs a token alone.
            let record = unsafe { self.records.part(self.first + group * self.step, RECORD) };
            // SAFETY: `x` has 32 elements, `record` eight numbers and twice 32 bytes.
            unsafe {
                let mut v = [zero; PARTS];
                let (mut largest, mut strange) = (zero, zero);
                for (u, v) in v.iter_mut().enumerate() {
                    *v = s.load(x.as_ptr().add(u * LANES));
                    largest = s.max(s.abs(*v), largest);
                    // NaN if anything is infinite or NaN, else 0.
                    strange = s.fma(*v, zero, strange);
                }
                let mut lanes = [0.0f32; LANES];
                s.store(lanes.as_mut_ptr(), largest);
                let largest = lanes.iter().fold(0.0f32, |a, &b| a.max(b));
                let factor = largest / LIMIT;
                // Where the inverse of the factor overflows, the group is as good as zero.
                let inverse = if factor > f32::MIN_POSITIVE { 1.0 / factor } else { 0.0 };
                let bytes = record.as_mut_ptr().add(NUMBERS).cast::<i8>();
                let mut sums = [zero; PARTS];
                let (mut upper_sum, mut lower_sum) = (zero, zero);
                for u in 0..PARTS {
                    let n = s.mul(v[u], s.splat(inverse));
                    let n = s.min(s.max(s.round(n), s.splat(-LIMIT)), s.splat(LIMIT));
                    let upper = s.round(s.mul(n, s.splat(1.0 / BASE)));
                    let lower = s.fma(upper, s.splat(-BASE), n);
                    s.store_i8(bytes.add(u * LANES), upper);
                    s.store_i8(bytes.add(GROUP + u * LANES), lower);
                    sums[u] = n;
                    upper_sum = s.add(upper_sum, upper);
                    lower_sum = s.add(lower_sum, lower);
                }
                // All sums of integers are exact.
                let factor = factor + s.sum(strange);
                let halves = [s.sum(s.add(sums[0], sums[1])), s.sum(s.add(sums[2], sums[3]))];
                record[0] = factor;
                record[1] = factor * (halves[0] + halves[1]);
                record[2] = factor * halves[0];
                record[3] = factor * halves[1];
                record[4] = f32::from_bits(s.sum(upper_sum) as i32 as u32);
                record[5] = f32::from_bits(s.sum(lower_sum) as i32 as u32);
            }
        }
    }
}

/// [`PanelSums`] of a block format.
pub(super) struct QuantisedSums<F>(PhantomData<F>);

impl<F: Blocks> PanelSums for QuantisedSums<F> {
    #[inline(always)]
    fn most_vectors<L: Lanes>(_: usize) -> usize {
        1
    }

    #[inline(always)]
    unsafe fn add<L: Lanes>(
        l: L,
        panel: *const u8,
        row_bytes: usize,
        _: usize,
        tokens: usize,
        x: &[f32],
        sums: &mut [f32],
    ) {
        let blocks = row_bytes / F::BYTES;
        assert_eq!(sums.len(), tokens * L::ROWS);
        assert_eq!(x.len(), blocks * F::GROUPS * tokens * RECORD);
        let mut record = x.as_ptr();
        // The next panel follows in memory; a share of it is asked for with every group of this one.
        let share = L::ROWS * F::BYTES / F::GROUPS;
        let mut ahead = panel.wrapping_add(L::ROWS * row_bytes);
        for block in 0..blocks {
            // SAFETY: the block is inside every row; `record` advances over `groups · tokens` records, `sums` has a
            // sum per lane and token.
            unsafe {
                let bytes = panel.add(block * F::BYTES);
                let common = F::common(l, bytes, row_bytes);
                for first in (0..F::GROUPS).step_by(F::TOGETHER) {
                    let raw = F::raw(l, bytes, row_bytes, first);
                    for index in first..first + F::TOGETHER {
                        for line in (0..share).step_by(64) {
                            l.prefetch(ahead.wrapping_add(line));
                        }
                        ahead = ahead.wrapping_add(share);
                        let group = F::group(l, &common, &raw, index);
                        let mut sum = sums.as_mut_ptr();
                        for _ in 0..tokens {
                            l.store(sum, add_group::<L, F>(l, &group, record, l.load(sum)));
                            sum = sum.add(L::ROWS);
                            record = record.add(RECORD);
                        }
                    }
                }
            }
        }
    }
}

/// Adds the products of a group of every row with a record.
///
/// # Safety
/// `record` is readable for a record.
#[inline(always)]
unsafe fn add_group<L: Lanes, F: Blocks>(l: L, group: &Group<L>, record: *const f32, sum: L::F) -> L::F {
    // SAFETY: a record has two integers after four numbers, and twice 32 bytes.
    unsafe {
        let (upper, lower) = (dot::<L, F>(l, group, record, 0), dot::<L, F>(l, group, record, 1));
        let base = l.splat(BASE);
        let factor = l.broadcast(record);
        if F::HALVES {
            let products = [l.fma(upper[0], base, lower[0]), l.fma(upper[1], base, lower[1])];
            let scaled = l.fma(products[1], group.scales[1], l.mul(products[0], group.scales[0]));
            let sum = l.fma(scaled, factor, sum);
            let sum = l.fma(group.minima[0], l.broadcast(record.add(2)), sum);
            l.fma(group.minima[1], l.broadcast(record.add(3)), sum)
        } else {
            let product = l.fma(upper[0], base, lower[0]);
            let sum = l.fma(l.mul(product, group.scales[0]), factor, sum);
            l.fma(group.minima[0], l.broadcast(record.add(1)), sum)
        }
    }
}

/// The sums of products with the upper or the lower bytes of a record: of each half, or twice that of both.
///
/// # Safety
/// `record` is readable for a record.
#[inline(always)]
unsafe fn dot<L: Lanes, F: Blocks>(l: L, group: &Group<L>, record: *const f32, plane: usize) -> [L::F; 2] {
    // SAFETY: a record has two integers after four numbers, and twice 32 bytes.
    let [a, b] = unsafe {
        let x = record.add(NUMBERS).cast::<i8>().add(plane * GROUP);
        let sum = record.add(4 + plane).cast::<i32>();
        match F::BITS {
            2 => l.dot::<2>(&group.weights, x, sum),
            3 => l.dot::<3>(&group.weights, x, sum),
            4 => l.dot::<4>(&group.weights, x, sum),
            5 => l.dot::<5>(&group.weights, x, sum),
            6 => l.dot::<6>(&group.weights, x, sum),
            _ => l.dot::<8>(&group.weights, x, sum),
        }
    };
    if F::HALVES { [l.to_float(a), l.to_float(b)] } else { [l.to_float(l.add_ints(a, b)); 2] }
}
