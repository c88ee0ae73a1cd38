//! Matrix products: `out[t][n] (+)= Σ_k weight[n][k] · x[t][k] + bias[n]` with the weights as stored.
//!
//! **The order of additions of every output element** is the same in both paths below: element `k` goes, in
//! ascending order, into partial sum `k mod 32` (four vectors of eight lanes, the row padded with zeros to whole
//! groups of 32), and the 32 partial sums are combined by one fixed tree (`combine`, then [`Simd::sum`]). So a
//! token's result does not depend on the number of tokens or on the blocking.
//!
//! * One token: memory-bound. Weights are widened in registers, one row at a time with prefetch: a single linear
//!   stream is what this kind of processor reads fastest.
//! * More tokens: compute-bound. Four rows are widened into a panel in the first-level cache and multiplied with three
//!   tokens at a time; panel and tokens are laid out in the order in which the inner loop reads them.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;

use tangram_checkpoint::DType;

use super::buffer::{Buffer, Disjoint};
use super::format::{Bf16, F16, F32, Format, GROUP, load_tail};
use super::lanes::MOST_LANES;
use super::simd::{LANES, PANEL_ROWS, PANEL_TOKENS, PARTS, Simd};
use super::{Isa, Kernel, blocks, quantised};
use crate::pool::Pool;

/// How far ahead of the reading position the single-token path prefetches, in bytes.
const PREFETCH: usize = 2048;
/// The tokens of a block should take no more than this many bytes of the second-level cache.
const TOKEN_BLOCK_BYTES: usize = 512 << 10;
/// A block has at least this many tokens, so that widening the weights stays cheap against using them.
const MIN_TOKEN_BLOCK: usize = 24;
/// Weights that make a task worth handing to another thread.
const TASK_WEIGHTS: usize = 1 << 15;

/// Chooses the format of a plain type: `$run` is a macro that is given the format.
macro_rules! with_plain_format {
    ($dtype:expr, $run:ident) => {
        match $dtype {
            DType::F32 => $run!(F32),
            DType::F16 => $run!(F16),
            DType::BF16 => $run!(Bf16),
            quantised => unreachable!("{quantised} has a product of its own"),
        }
    };
}

/// One product over the tokens of a [`matmul`].
pub struct Linear<'a> {
    /// The stored bytes of the `[rows, columns]` matrix.
    pub weight: &'a [u8],
    /// Their element type.
    pub dtype: DType,
    /// Rows of the matrix: features of the output.
    pub rows: usize,
    /// `[rows]`.
    pub bias: Option<&'a [f32]>,
    /// `[tokens, rows]`.
    pub out: &'a mut [f32],
    /// Whether the product is added to `out` (a residual) instead of replacing it.
    pub accumulate: bool,
}

/// A [`Linear`] as the tasks see it, with its tasks' place in the numbering.
struct Product<'a> {
    weight: &'a [u8],
    dtype: DType,
    rows: usize,
    row_bytes: usize,
    bias: Option<&'a [f32]>,
    out: Disjoint<'a>,
    accumulate: bool,
    rows_per_task: usize,
    row_tasks: usize,
}

/// Multiplies `tokens` rows of `x` (`[tokens, columns]`) with several matrices. `packed` is memory for a rearranged copy
/// of `x`. Panics if a slice does not have the length that the shapes demand.
pub fn matmul<const N: usize>(
    isa: Isa,
    pool: &Pool,
    packed: &mut Buffer,
    x: &[f32],
    columns: usize,
    tokens: usize,
    linears: [Linear<'_>; N],
) {
    assert!(columns > 0 && x.len() == tokens * columns);
    if tokens == 0 {
        return;
    }
    let products = linears.map(|linear| {
        let bytes = linear.dtype.tensor_bytes(&[linear.rows as u64, columns as u64]);
        assert_eq!(bytes, Some(linear.weight.len() as u64), "bytes of a {} matrix", linear.dtype);
        assert_eq!(linear.out.len(), tokens * linear.rows);
        assert!(linear.bias.is_none_or(|bias| bias.len() == linear.rows));
        let rows_per_task = rows_per_task(linear.rows, columns, pool.threads());
        Product {
            weight: linear.weight,
            dtype: linear.dtype,
            rows: linear.rows,
            row_bytes: linear.weight.len() / linear.rows.max(1),
            bias: linear.bias,
            out: Disjoint::new(linear.out),
            accumulate: linear.accumulate,
            rows_per_task,
            row_tasks: linear.rows.div_ceil(rows_per_task),
        }
    });
    let quantised = products.iter().any(|product| product.dtype.is_quantised());
    let plain = products.iter().any(|product| !product.dtype.is_quantised());
    let padded = padded_columns(columns);
    let groups = Groups { tokens, count: tokens.div_ceil(PANEL_TOKENS) };
    let layout = quantised::Layout::new(padded, tokens);
    let record_elements = if quantised { layout.elements() } else { 0 };
    let plain_elements = if plain && tokens > 1 { tokens * padded } else { 0 };
    let (records, packed) = packed.get_mut(record_elements + plain_elements).split_at_mut(record_elements);
    if quantised {
        quantised::pack(isa, pool, layout, x, records);
    }
    if !packed.is_empty() {
        pack(isa, pool, x, columns, &groups, packed);
    }
    let (records, packed) = (&*records, &*packed);

    // A task is some rows of a product and a block of tokens.
    let plain_blocks = if tokens == 1 { 1 } else { token_blocks(columns, tokens) };
    let blocks =
        |product: &Product<'_>| if product.dtype.is_quantised() { layout.blocks } else { plain_blocks };
    let tasks = products.iter().map(|product| product.row_tasks * blocks(product)).sum();
    let work = products.iter().map(|product| product.rows * columns * tokens / LANES).sum();
    let row_bytes = products.iter().filter(|product| product.dtype.is_quantised());
    let scratch = row_bytes.map(|product| layout.scratch(product.row_bytes)).max().unwrap_or(0);
    let scratch = scratch.max(if plain_elements > 0 { panel_elements(columns) } else { 0 });
    pool.run(tasks, scratch, work, &|mut task, scratch| {
        for product in &products {
            let blocks = blocks(product);
            if task >= product.row_tasks * blocks {
                task -= product.row_tasks * blocks;
                continue;
            }
            let first = task % product.row_tasks * product.rows_per_task;
            let rows = first..product.rows.min(first + product.rows_per_task);
            let block = task / product.row_tasks;
            if product.dtype.is_quantised() {
                product.quantised(isa, layout, block, records, rows, scratch);
            } else if tokens == 1 {
                product.one_token(isa, x, rows);
            } else {
                let range = block * groups.count / blocks..(block + 1) * groups.count / blocks;
                let panel = &mut scratch[..PANEL_ROWS * padded];
                product.many_tokens(isa, packed, columns, &groups, range, rows, panel);
            }
            return;
        }
    });
}

/// Elements of a row padded to whole groups.
pub(crate) fn padded_columns(columns: usize) -> usize {
    columns.next_multiple_of(GROUP)
}

/// Elements of a panel, which each thread has.
pub(crate) fn panel_elements(columns: usize) -> usize {
    PANEL_ROWS * padded_columns(columns)
}

/// Blocks into which several tokens are divided; every weight is widened once for each.
pub(crate) fn token_blocks(columns: usize, tokens: usize) -> usize {
    let block_tokens = (TOKEN_BLOCK_BYTES / (padded_columns(columns) * 4)).max(MIN_TOKEN_BLOCK);
    tokens.div_ceil(PANEL_TOKENS).div_ceil(block_tokens / PANEL_TOKENS)
}

/// Rows of a task: whole panels, enough work to be worth it, and some tasks per thread to level out.
fn rows_per_task(rows: usize, columns: usize, threads: usize) -> usize {
    let worth = TASK_WEIGHTS.div_ceil(columns.max(1));
    let level = rows.div_ceil(threads * 4);
    let most = (TASK_WEIGHTS * 8).div_ceil(columns.max(1));
    level.clamp(worth, most).max(1).next_multiple_of(MOST_LANES)
}

/// How tokens are divided into groups of two or three (one only where there is a single token).
struct Groups {
    tokens: usize,
    count: usize,
}

impl Groups {
    fn tokens(&self, group: usize) -> Range<usize> {
        group * self.tokens / self.count..(group + 1) * self.tokens / self.count
    }
}

impl Product<'_> {
    fn quantised(
        &self,
        isa: Isa,
        layout: quantised::Layout,
        block: usize,
        records: &[f32],
        rows: Range<usize>,
        scratch: &mut [f32],
    ) {
        let product = quantised::Product {
            weight: &self.weight[rows.start * self.row_bytes..rows.end * self.row_bytes],
            rows,
            out: &self.out,
            all_rows: self.rows,
            bias: self.bias,
            accumulate: self.accumulate,
        };
        macro_rules! multiply {
            ($format:ident) => {
                // SAFETY: tasks take disjoint rows or disjoint tokens.
                unsafe { product.multiply::<blocks::$format>(isa, layout, block, records, scratch) }
            };
        }
        match self.dtype {
            DType::F32 | DType::F16 | DType::BF16 => unreachable!("{} is not quantised", self.dtype),
            DType::Q8_0 => multiply!(Q8_0),
            DType::Q4_0 => multiply!(Q4_0),
            DType::Q4_1 => multiply!(Q4_1),
            DType::Q5_0 => multiply!(Q5_0),
            DType::Q5_1 => multiply!(Q5_1),
            DType::Q2K => multiply!(Q2K),
            DType::Q3K => multiply!(Q3K),
            DType::Q4K => multiply!(Q4K),
            DType::Q5K => multiply!(Q5K),
            DType::Q6K => multiply!(Q6K),
            DType::Iq4Nl => multiply!(Iq4Nl),
        }
    }

    fn one_token(&self, isa: Isa, x: &[f32], rows: Range<usize>) {
        // SAFETY: tasks take disjoint ranges of rows.
        let out = unsafe { self.out.part(rows.start, rows.len()) };
        macro_rules! run {
            ($format:ty) => {
                isa.dispatch(OneToken::<$format> {
                    product: self,
                    x,
                    first: rows.start,
                    out,
                    format: PhantomData,
                })
            };
        }
        with_plain_format!(self.dtype, run)
    }

    #[expect(clippy::too_many_arguments, reason = "a kernel's operands")]
    fn many_tokens(
        &self,
        isa: Isa,
        packed: &[f32],
        columns: usize,
        groups: &Groups,
        range: Range<usize>,
        rows: Range<usize>,
        panel: &mut [f32],
    ) {
        for first in rows.clone().step_by(PANEL_ROWS) {
            let count = PANEL_ROWS.min(rows.end - first);
            macro_rules! widen {
                ($format:ty) => {
                    isa.dispatch(Widen::<$format> {
                        rows: &self.weight[first * self.row_bytes..(first + count) * self.row_bytes],
                        row_bytes: self.row_bytes,
                        count,
                        columns,
                        panel,
                        format: PhantomData,
                    })
                };
            }
            with_plain_format!(self.dtype, widen);
            isa.dispatch(ManyTokens {
                product: self,
                packed,
                groups,
                range: range.clone(),
                first,
                count,
                panel,
            });
        }
    }

    /// What happens to a finished sum.
    #[inline(always)]
    fn finish(&self, row: usize, sum: f32, out: &mut f32) {
        let value = match self.bias {
            Some(bias) => sum + bias[row],
            None => sum,
        };
        *out = if self.accumulate { *out + value } else { value };
    }
}

/// The first level of the tree that combines partial sums.
#[inline(always)]
fn combine<S: Simd>(s: S, parts: [S::V; PARTS]) -> S::V {
    s.add(s.add(parts[0], parts[1]), s.add(parts[2], parts[3]))
}

/// Asks for as many bytes as a block has, some way ahead.
#[inline(always)]
fn prefetch<S: Simd, F: Format>(s: S, weights: *const u8) {
    for line in (0..F::BLOCK_BYTES).step_by(64) {
        s.prefetch(weights.wrapping_add(PREFETCH + line));
    }
}

struct OneToken<'a, F> {
    product: &'a Product<'a>,
    x: &'a [f32],
    first: usize,
    out: &'a mut [f32],
    format: PhantomData<F>,
}

impl<F: Format> Kernel for OneToken<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let columns = self.x.len();
        let (blocks, tail) = (columns / (GROUP * F::BLOCK_GROUPS), columns % GROUP);
        let mut x_tail = [0.0; GROUP];
        x_tail[..tail].copy_from_slice(&self.x[columns - tail..]);
        for (index, out) in self.out.iter_mut().enumerate() {
            let row = self.first + index;
            let bytes =
                &self.product.weight[row * self.product.row_bytes..(row + 1) * self.product.row_bytes];
            let mut weights = bytes.as_ptr();
            let mut x = self.x.as_ptr();
            let mut parts = [s.splat(0.0); PARTS];
            // SAFETY: `bytes` holds `columns` elements (checked by `matmul`): `blocks` whole blocks and a tail; `x`
            // holds as many.
            unsafe {
                for _ in 0..blocks {
                    prefetch::<S, F>(s, weights);
                    let common = F::common(s, weights);
                    for group in 0..F::BLOCK_GROUPS {
                        let w = F::load32(s, weights, common, group);
                        for u in 0..PARTS {
                            parts[u] = s.fma(w[u], s.load(x.add(u * LANES)), parts[u]);
                        }
                        x = x.add(GROUP);
                    }
                    weights = weights.add(F::BLOCK_BYTES);
                }
                if tail > 0 {
                    let w = load_tail::<S, F>(s, weights, tail);
                    for u in 0..PARTS {
                        parts[u] = s.fma(w[u], s.load(x_tail.as_ptr().add(u * LANES)), parts[u]);
                    }
                }
            }
            self.product.finish(row, s.sum(combine(s, parts)), out);
        }
    }
}

/// Widens up to four rows into a panel laid out for [`Simd::panel_times_tokens`].
struct Widen<'a, F> {
    rows: &'a [u8],
    row_bytes: usize,
    count: usize,
    columns: usize,
    panel: &'a mut [f32],
    format: PhantomData<F>,
}

impl<F: Format> Kernel for Widen<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (blocks, tail) = (self.columns / (GROUP * F::BLOCK_GROUPS), self.columns % GROUP);
        let groups = self.columns.div_ceil(GROUP);
        assert_eq!(self.panel.len(), groups * GROUP * PANEL_ROWS);
        assert_eq!(self.rows.len(), self.count * self.row_bytes);
        let layout = Interleaved::new::<S>(PANEL_ROWS, groups);
        for row in 0..self.count {
            // SAFETY: `rows` holds `count` rows of `columns` elements; the panel has room for four rows of `groups`
            // groups (both asserted).
            unsafe {
                let mut weights = self.rows.as_ptr().add(row * self.row_bytes);
                let mut to = self.panel.as_mut_ptr().add(row * layout.lanes);
                for _ in 0..blocks {
                    prefetch::<S, F>(s, weights);
                    let common = F::common(s, weights);
                    for group in 0..F::BLOCK_GROUPS {
                        let w = F::load32(s, weights, common, group);
                        for (u, &w) in w.iter().enumerate() {
                            s.store(to.add(layout.part(u)), w);
                        }
                        to = to.add(layout.group_stride);
                    }
                    weights = weights.add(F::BLOCK_BYTES);
                }
                if tail > 0 {
                    let w = load_tail::<S, F>(s, weights, tail);
                    for (u, &w) in w.iter().enumerate() {
                        s.store(to.add(layout.part(u)), w);
                    }
                }
            }
        }
    }
}

/// Multiplies a panel with the token groups of `range`.
struct ManyTokens<'a> {
    product: &'a Product<'a>,
    packed: &'a [f32],
    groups: &'a Groups,
    range: Range<usize>,
    first: usize,
    count: usize,
    panel: &'a [f32],
}

impl Kernel for ManyTokens<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let padded = self.panel.len() / PANEL_ROWS;
        for group in self.range.clone() {
            let tokens = self.groups.tokens(group);
            let x = &self.packed[tokens.start * padded..tokens.end * padded];
            let mut sums = [0.0; PANEL_ROWS * (PANEL_TOKENS + 1)];
            match tokens.len() {
                3 => panel_times_tokens::<S, 3>(s, self.panel, x, &mut sums),
                2 => panel_times_tokens::<S, 2>(s, self.panel, x, &mut sums),
                _ => panel_times_tokens::<S, 1>(s, self.panel, x, &mut sums),
            }
            for (token, sums) in tokens.zip(sums.chunks_exact(PANEL_ROWS)) {
                // SAFETY: this task alone writes these rows of these tokens.
                let out =
                    unsafe { self.product.out.part(token * self.product.rows + self.first, self.count) };
                for (index, (out, &sum)) in out.iter_mut().zip(sums).enumerate() {
                    self.product.finish(self.first + index, sum, out);
                }
            }
        }
    }
}

/// `sums[token][row]` for the four rows of a panel and `T` tokens.
#[inline(always)]
fn panel_times_tokens<S: Simd, const T: usize>(
    s: S,
    panel: &[f32],
    x: &[f32],
    sums: &mut [f32; PANEL_ROWS * (PANEL_TOKENS + 1)],
) {
    let groups = panel.len() / (GROUP * PANEL_ROWS);
    assert_eq!(panel.len(), groups * GROUP * PANEL_ROWS);
    assert_eq!(x.len(), groups * GROUP * T);
    // SAFETY: the lengths are asserted.
    let totals = unsafe { s.panel_times_tokens::<T>(panel.as_ptr(), x.as_ptr(), groups) };
    for (half, out) in sums.chunks_exact_mut(LANES).enumerate().take((T * PANEL_ROWS).div_ceil(LANES)) {
        let mut eight = [totals[0]; LANES];
        eight.copy_from_slice(&totals[half * LANES..(half + 1) * LANES]);
        // SAFETY: `out` has eight elements.
        unsafe { s.store(out.as_mut_ptr(), s.sums(eight)) };
    }
}

/// Where the parts of interleaved rows are (see [`Simd::panel_times_tokens`]).
struct Interleaved {
    /// Lanes of a row in a group in a pass.
    lanes: usize,
    /// From a group to the next.
    group_stride: usize,
    /// From a pass to the next.
    pass_stride: usize,
}

impl Interleaved {
    #[inline(always)]
    fn new<S: Simd>(rows: usize, groups: usize) -> Interleaved {
        let lanes = GROUP / S::PASSES;
        Interleaved { lanes, group_stride: rows * lanes, pass_stride: groups * rows * lanes }
    }

    /// From the beginning of a row in a group to its partial vector `part`.
    #[inline(always)]
    fn part(&self, part: usize) -> usize {
        let vectors = self.lanes / LANES;
        part / vectors * self.pass_stride + part % vectors * LANES
    }
}

/// Rearranges tokens into their groups, each laid out for [`Simd::panel_times_tokens`] and padded with zeros.
fn pack(isa: Isa, pool: &Pool, x: &[f32], columns: usize, groups: &Groups, packed: &mut [f32]) {
    let padded = columns.next_multiple_of(GROUP);
    assert_eq!(packed.len(), groups.tokens * padded);
    let packed_vectors = packed.len() / LANES;
    let packed = Disjoint::new(packed);
    let per_task = (TASK_WEIGHTS / (padded * PANEL_TOKENS)).max(1);
    pool.run(groups.count.div_ceil(per_task), 0, packed_vectors, &|task, _| {
        for group in task * per_task..groups.count.min((task + 1) * per_task) {
            let tokens = groups.tokens(group);
            // SAFETY: groups are disjoint ranges of tokens.
            let out = unsafe { packed.part(tokens.start * padded, tokens.len() * padded) };
            isa.dispatch(Pack { x: &x[tokens.start * columns..tokens.end * columns], columns, out });
        }
    });
}

struct Pack<'a> {
    x: &'a [f32],
    columns: usize,
    out: &'a mut [f32],
}

impl Kernel for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let tokens = self.x.len() / self.columns;
        let (whole, tail) = (self.columns / GROUP, self.columns % GROUP);
        let groups = self.columns.div_ceil(GROUP);
        assert_eq!(self.out.len(), groups * GROUP * tokens);
        let layout = Interleaved::new::<S>(tokens, groups);
        for (token, x) in self.x.chunks_exact(self.columns).enumerate() {
            // SAFETY: `x` has `whole` groups and a tail; `out` has room for `groups` groups of every token (asserted).
            unsafe {
                let mut to = self.out.as_mut_ptr().add(token * layout.lanes);
                for group in 0..whole {
                    let from = x.as_ptr().add(group * GROUP);
                    for u in 0..PARTS {
                        s.store(to.add(layout.part(u)), s.load(from.add(u * LANES)));
                    }
                    to = to.add(layout.group_stride);
                }
                if tail > 0 {
                    let mut padded = [0.0; GROUP];
                    padded[..tail].copy_from_slice(&x[whole * GROUP..]);
                    for u in 0..PARTS {
                        s.store(to.add(layout.part(u)), s.load(padded.as_ptr().add(u * LANES)));
                    }
                }
            }
        }
    }
}
