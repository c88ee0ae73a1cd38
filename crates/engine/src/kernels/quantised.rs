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
//! A panel of as many rows as there are lanes is read once for a block of tokens: 32 weights of each row are unpacked
//! into registers and multiplied with all tokens of the block.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;

use super::blocks::{Blocks, Group};
use super::buffer::Disjoint;
use super::format::GROUP;
use super::lanes::{Lanes, LanesKernel, MOST_LANES};
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
/// The tokens of a block should take no more than this many bytes of the second-level cache.
const BLOCK_BYTES: usize = 512 << 10;
/// A block has at least this many tokens, so that unpacking the weights stays cheap against using them.
const MIN_BLOCK: usize = 32;
/// Activations that make a packing task worth handing to another thread.
const TASK_ACTIVATIONS: usize = 1 << 14;

/// How the tokens of a product are divided into blocks, and where their records are.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    columns: usize,
    tokens: usize,
    pub(super) blocks: usize,
}

impl Layout {
    /// For `tokens` (at least one) rows of `columns` activations, a multiple of 32.
    pub(super) fn new(columns: usize, tokens: usize) -> Layout {
        let block = (BLOCK_BYTES / (columns / GROUP * RECORD * 4)).max(MIN_BLOCK);
        Layout { columns, tokens, blocks: tokens.div_ceil(block) }
    }

    /// Elements of all records.
    pub(super) fn elements(&self) -> usize {
        self.tokens * self.token_elements()
    }

    fn token_elements(&self) -> usize {
        self.columns / GROUP * RECORD
    }

    fn block_tokens(&self, block: usize) -> Range<usize> {
        block * self.tokens / self.blocks..(block + 1) * self.tokens / self.blocks
    }

    /// Scratch elements that [`Product::multiply`] needs for rows of `row_bytes`.
    pub(super) fn scratch(&self, row_bytes: usize) -> usize {
        self.tokens.div_ceil(self.blocks) * MOST_LANES + (MOST_LANES * row_bytes).div_ceil(4)
    }
}

/// Rounds `x` (`[tokens, columns]`) to records, laid out as `[block][group][token of the block]`.
pub(super) fn pack(isa: Isa, pool: &Pool, layout: Layout, x: &[f32], records: &mut [f32]) {
    assert!(x.len() == layout.tokens * layout.columns && records.len() == layout.elements());
    let Layout { columns, blocks, .. } = layout;
    let work = x.len() / 2;
    let per_task = (TASK_ACTIVATIONS / columns).max(1);
    let records = Disjoint::new(records);
    for block in 0..blocks {
        let tokens = layout.block_tokens(block);
        let first = tokens.start * layout.token_elements();
        pool.run(tokens.len().div_ceil(per_task), 0, work / blocks, &|task, _| {
            for token in task * per_task..tokens.len().min((task + 1) * per_task) {
                let x = &x[(tokens.start + token) * columns..][..columns];
                isa.dispatch(Pack {
                    x,
                    records: &records,
                    first: first + token * RECORD,
                    step: tokens.len() * RECORD,
                });
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

/// One matrix and where its product goes.
pub(super) struct Product<'a> {
    /// Stored bytes of the rows that are to be multiplied, with their place in the matrix.
    pub(super) weight: &'a [u8],
    pub(super) rows: Range<usize>,
    /// `[tokens, all rows]`.
    pub(super) out: &'a Disjoint<'a>,
    pub(super) all_rows: usize,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) accumulate: bool,
}

impl Product<'_> {
    /// Multiplies the rows with the tokens of a block.
    ///
    /// # Safety
    /// No other thread touches these rows of these tokens in `out`.
    pub(super) unsafe fn multiply<F: Blocks>(
        &self,
        isa: Isa,
        layout: Layout,
        block: usize,
        records: &[f32],
        scratch: &mut [f32],
    ) {
        let tokens = layout.block_tokens(block);
        let records = &records[tokens.start * layout.token_elements()..tokens.end * layout.token_elements()];
        let groups = layout.columns / GROUP;
        let row_bytes = groups / F::GROUPS * F::BYTES;
        assert!(groups.is_multiple_of(F::GROUPS) && self.weight.len() == self.rows.len() * row_bytes);
        let (sums, copy) = scratch.split_at_mut(tokens.len() * MOST_LANES);
        isa.dispatch_lanes(Multiply::<F> {
            product: self,
            tokens,
            records,
            row_bytes,
            sums,
            copy: &mut copy[..(MOST_LANES * row_bytes).div_ceil(4)],
            format: PhantomData,
        });
    }
}

struct Multiply<'a, F> {
    product: &'a Product<'a>,
    tokens: Range<usize>,
    /// `[group][token]`.
    records: &'a [f32],
    row_bytes: usize,
    /// `[token][lane]`.
    sums: &'a mut [f32],
    /// Room for a panel that has fewer rows than there are lanes.
    copy: &'a mut [f32],
    format: PhantomData<F>,
}

impl<F: Blocks> LanesKernel for Multiply<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, l: L) {
        let (rows, stride) = (self.product.rows.len(), self.row_bytes);
        for first in (0..rows).step_by(L::ROWS) {
            let count = L::ROWS.min(rows - first);
            let bytes = &self.product.weight[first * stride..(first + count) * stride];
            let panel = if count == L::ROWS { bytes.as_ptr() } else { self.copy_panel(bytes) };
            // SAFETY: `panel` has as many rows as there are lanes.
            unsafe { self.panel(l, panel) };
            for (token, sums) in self.tokens.clone().zip(self.sums.chunks_exact(L::ROWS)) {
                let row = self.product.rows.start + first;
                // SAFETY: these rows of these tokens are this task's by the contract of `multiply`.
                let out = unsafe { self.product.out.part(token * self.product.all_rows + row, count) };
                match self.product.bias {
                    Some(bias) => finish(out, sums, |i| bias[row + i], self.product.accumulate),
                    None => finish(out, sums, |_| 0.0, self.product.accumulate),
                }
            }
        }
    }
}

/// What happens to finished sums.
#[inline(always)]
fn finish(out: &mut [f32], sums: &[f32], bias: impl Fn(usize) -> f32, accumulate: bool) {
    for (i, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
        let value = sum + bias(i);
        *out = if accumulate { *out + value } else { value };
    }
}

impl<F: Blocks> Multiply<'_, F> {
    /// Rows to which zeros are added until there are as many as there may be lanes.
    fn copy_panel(&mut self, bytes: &[u8]) -> *const u8 {
        self.copy.fill(0.0);
        let copy = self.copy.as_mut_ptr().cast::<u8>();
        assert!(bytes.len() <= self.copy.len() * 4);
        // SAFETY: the copy is long enough (asserted), any bytes are f32s, and the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), copy, bytes.len()) };
        copy
    }

    /// The sums of a panel.
    ///
    /// # Safety
    /// `panel` is readable for `L::ROWS` rows.
    #[inline(always)]
    unsafe fn panel<L: Lanes>(&mut self, l: L, panel: *const u8) {
        let (stride, tokens) = (self.row_bytes, self.tokens.len());
        let sums = &mut self.sums[..tokens * L::ROWS];
        sums.fill(0.0);
        let groups = stride / F::BYTES * F::GROUPS;
        assert_eq!(self.records.len(), groups * tokens * RECORD);
        let mut record = self.records.as_ptr();
        // The next panel follows in memory; a share of it is asked for with every group of this one.
        let share = L::ROWS * F::BYTES / F::GROUPS;
        let mut ahead = panel.wrapping_add(L::ROWS * stride);
        for block in 0..stride / F::BYTES {
            // SAFETY: the block is inside every row; `record` advances over `groups · tokens` records, `sums` has a
            // sum per lane and token.
            unsafe {
                let bytes = panel.add(block * F::BYTES);
                let common = F::common(l, bytes, stride);
                for first in (0..F::GROUPS).step_by(F::TOGETHER) {
                    let raw = F::raw(l, bytes, stride, first);
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
