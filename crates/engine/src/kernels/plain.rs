//! The matrix product with weights of plain types: widened to f32 and multiplied in f32.
//!
//! **The order of additions of every output element**: the products in ascending order of the columns, one after the
//! other, fused where the hardware can. It does not depend on the number of tokens or rows.
#![allow(unsafe_code)]

use std::marker::PhantomData;

use super::buffer::Disjoint;
use super::lanes::Lanes;
use super::panels::{Layout, MOST_ROWS, PanelSums};
use crate::pool::Pool;

/// Columns that are unpacked at a time.
const GROUP: usize = 32;
/// Columns of which the weights are in registers while tokens pass by.
const STEP: usize = 8;
/// Bytes of a group of the widest type.
const MOST_GROUP_BYTES: usize = 4 * GROUP;
/// How many groups ahead every row is asked for. So much of 32 rows leaves room for everything else in the first-level
/// cache, where a whole panel would not fit.
const GROUPS_AHEAD: usize = 6;
/// Activations that make a packing task worth handing to another thread.
const TASK_ACTIVATIONS: usize = 1 << 14;

/// A plain element type.
pub(super) trait Plain {
    /// Bytes of an element.
    const SIZE: usize;

    /// 32 consecutive weights of the row of every lane.
    ///
    /// # Safety
    /// `32 · SIZE` bytes are readable at `p + row · stride` for each of the `ROWS` rows.
    unsafe fn group<L: Lanes>(l: L, p: *const u8, stride: usize) -> [L::F; GROUP];
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl Plain for F32 {
    const SIZE: usize = 4;

    #[inline(always)]
    unsafe fn group<L: Lanes>(l: L, p: *const u8, stride: usize) -> [L::F; GROUP] {
        let mut weights = [l.splat(0.0); GROUP];
        for (half, weights) in weights.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            // SAFETY: twice 64 bytes.
            let words = unsafe { l.line(p.add(64 * half), stride) };
            for (weight, word) in weights.iter_mut().zip(words) {
                *weight = l.bits(word);
            }
        }
        weights
    }
}

impl Plain for F16 {
    const SIZE: usize = 2;

    #[inline(always)]
    unsafe fn group<L: Lanes>(l: L, p: *const u8, stride: usize) -> [L::F; GROUP] {
        let mut weights = [l.splat(0.0); GROUP];
        // SAFETY: 64 bytes.
        let words = unsafe { l.line(p, stride) };
        for (weights, word) in weights.as_chunks_mut::<2>().0.iter_mut().zip(words) {
            *weights = [l.lower_half(word), l.upper_half(word)];
        }
        weights
    }
}

impl Plain for Bf16 {
    const SIZE: usize = 2;

    #[inline(always)]
    unsafe fn group<L: Lanes>(l: L, p: *const u8, stride: usize) -> [L::F; GROUP] {
        let mut weights = [l.splat(0.0); GROUP];
        // SAFETY: 64 bytes.
        let words = unsafe { l.line(p, stride) };
        for (weights, word) in weights.as_chunks_mut::<2>().0.iter_mut().zip(words) {
            *weights = [l.lower_bf16(word), l.upper_bf16(word)];
        }
        weights
    }
}

/// Elements of a token's rearranged activations.
pub(super) fn token_elements(columns: usize) -> usize {
    columns.next_multiple_of(GROUP)
}

/// Rearranges `x` (`[tokens, columns]`) to `[block][step of eight columns][token of the block][column]`, with zeros
/// after the last column up to a whole group.
pub(super) fn pack(pool: &Pool, layout: Layout, x: &[f32], columns: usize, packed: &mut [f32]) {
    assert_eq!(packed.len(), layout.elements());
    let steps = columns.div_ceil(GROUP) * GROUP / STEP;
    let per_task = (TASK_ACTIVATIONS / columns).max(1);
    let packed = Disjoint::new(packed);
    for block in 0..layout.blocks {
        let tokens = layout.tokens(block);
        let work = tokens.len() * columns / STEP;
        pool.run(tokens.len().div_ceil(per_task), 0, work, &|task, _| {
            for token in task * per_task..tokens.len().min((task + 1) * per_task) {
                let row = &x[(tokens.start + token) * columns..][..columns];
                let whole = row.chunks(STEP).chain(std::iter::repeat(&[][..]));
                for (step, from) in whole.take(steps).enumerate() {
                    let at = layout.place(block).start + (step * tokens.len() + token) * STEP;
                    // SAFETY: each token has elements of its own, and a task takes a token alone.
                    let to = unsafe { packed.part(at, STEP) };
                    to[..from.len()].copy_from_slice(from);
                    to[from.len()..].fill(0.0);
                }
            }
        });
    }
}

/// [`PanelSums`] of a plain type.
pub(super) struct PlainSums<P>(PhantomData<P>);

impl<P: Plain> PanelSums for PlainSums<P> {
    #[inline(always)]
    fn most_vectors<L: Lanes>(tokens: usize) -> usize {
        // A sum waits for the one before it, so a single token needs many rows to keep the processor busy.
        if tokens == 1 { MOST_ROWS / L::ROWS } else { L::VECTORS }
    }

    #[inline(always)]
    unsafe fn add<L: Lanes>(
        l: L,
        panel: *const u8,
        row_bytes: usize,
        vectors: usize,
        tokens: usize,
        x: &[f32],
        sums: &mut [f32],
    ) {
        // SAFETY: the contract is the same.
        unsafe {
            match vectors {
                4.. => add::<L, P, 4>(l, panel, row_bytes, tokens, x, sums),
                2 | 3 => add::<L, P, 2>(l, panel, row_bytes, tokens, x, sums),
                _ => add::<L, P, 1>(l, panel, row_bytes, tokens, x, sums),
            }
        }
    }
}

/// [`PanelSums::add`] for `V` vectors.
///
/// # Safety
/// The panel's rows are readable from `panel` on.
#[inline(always)]
unsafe fn add<L: Lanes, P: Plain, const V: usize>(
    l: L,
    panel: *const u8,
    row_bytes: usize,
    tokens: usize,
    x: &[f32],
    sums: &mut [f32],
) {
    let columns = row_bytes / P::SIZE;
    let (whole, tail) = (columns / GROUP, columns % GROUP);
    let rows = V * L::ROWS;
    assert!(rows <= MOST_ROWS && sums.len() == tokens * rows);
    assert_eq!(x.len(), columns.div_ceil(GROUP) * GROUP * tokens);
    let (mut x, sums) = (x.as_ptr(), sums.as_mut_ptr());
    // SAFETY: every group is inside the rows; the groups of `x` follow each other; `sums` has `tokens · rows` elements.
    unsafe {
        if tokens == 1 {
            // The sums stay in registers.
            let mut own = [l.splat(0.0); V];
            for group in 0..whole {
                ask_ahead::<L, P>(l, panel, row_bytes, rows, group + GROUPS_AHEAD);
                add_single::<L, P, V>(l, panel.add(group * GROUP * P::SIZE), row_bytes, x, &mut own);
                x = x.add(GROUP);
            }
            if tail > 0 {
                let copy = tail_copy::<P>(panel, row_bytes, rows);
                add_single::<L, P, V>(l, copy.as_ptr().cast(), MOST_GROUP_BYTES, x, &mut own);
            }
            for (v, &sum) in own.iter().enumerate() {
                l.store(sums.add(v * L::ROWS), sum);
            }
            return;
        }
        for group in 0..whole {
            ask_ahead::<L, P>(l, panel, row_bytes, rows, group + GROUPS_AHEAD);
            add_group::<L, P, V>(l, panel.add(group * GROUP * P::SIZE), row_bytes, tokens, x, sums);
            x = x.add(tokens * GROUP);
        }
        if tail > 0 {
            let copy = tail_copy::<P>(panel, row_bytes, rows);
            add_group::<L, P, V>(l, copy.as_ptr().cast(), MOST_GROUP_BYTES, tokens, x, sums);
        }
    }
}

/// Asks for a group of every row; beyond their end, for the beginning of the next panel's.
#[inline(always)]
fn ask_ahead<L: Lanes, P: Plain>(l: L, panel: *const u8, row_bytes: usize, rows: usize, group: usize) {
    let at = group * GROUP * P::SIZE;
    let next_panel = if at < row_bytes { 0 } else { (rows - 1) * row_bytes };
    for row in 0..rows {
        let from = panel.wrapping_add(next_panel + row * row_bytes + at);
        for line in (0..GROUP * P::SIZE).step_by(64) {
            l.prefetch(from.wrapping_add(line));
        }
    }
}

/// The columns after the last whole group of every row, followed by zeros.
///
/// # Safety
/// `rows`, at most [`MOST_ROWS`], rows of `row_bytes` are readable from `panel` on.
#[inline(always)]
unsafe fn tail_copy<P: Plain>(
    panel: *const u8,
    row_bytes: usize,
    rows: usize,
) -> [[u8; MOST_GROUP_BYTES]; MOST_ROWS] {
    let mut copies = [[0; MOST_GROUP_BYTES]; MOST_ROWS];
    let bytes = row_bytes % (GROUP * P::SIZE);
    for (row, copy) in copies.iter_mut().enumerate().take(rows) {
        // SAFETY: the last bytes of a row; fewer than a group has, which is at most MOST_GROUP_BYTES.
        unsafe {
            let from = panel.add((row + 1) * row_bytes - bytes);
            std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), bytes);
        }
    }
    copies
}

/// Adds the products of a group of columns with the activations of a single token.
///
/// # Safety
/// 32 weights are readable at `panel + row · stride` for each of `V · ROWS` rows, 32 elements at `x`.
#[inline(always)]
unsafe fn add_single<L: Lanes, P: Plain, const V: usize>(
    l: L,
    panel: *const u8,
    stride: usize,
    x: *const f32,
    sums: &mut [L::F; V],
) {
    for (v, sum) in sums.iter_mut().enumerate() {
        // SAFETY: by contract.
        unsafe {
            let weights = P::group(l, panel.add(v * L::ROWS * stride), stride);
            for (k, &weight) in weights.iter().enumerate() {
                *sum = l.fma(weight, l.broadcast(x.add(k)), *sum);
            }
        }
    }
}

/// Adds the products of a group of columns with the activations of all tokens.
///
/// # Safety
/// 32 weights are readable at `panel + row · stride` for each of `V · ROWS` rows, `tokens` times 32 elements at `x`;
/// `sums` is writable for `tokens · V · ROWS`.
#[inline(always)]
unsafe fn add_group<L: Lanes, P: Plain, const V: usize>(
    l: L,
    panel: *const u8,
    stride: usize,
    tokens: usize,
    x: *const f32,
    sums: *mut f32,
) {
    let mut weights = [[l.splat(0.0); GROUP]; V];
    for (v, weights) in weights.iter_mut().enumerate() {
        // SAFETY: by contract.
        *weights = unsafe { P::group(l, panel.add(v * L::ROWS * stride), stride) };
    }
    for step in 0..GROUP / STEP {
        let mut near = [[l.splat(0.0); STEP]; V];
        for (near, weights) in near.iter_mut().zip(&weights) {
            near.copy_from_slice(&weights[step * STEP..(step + 1) * STEP]);
        }
        // SAFETY: the steps of `x` follow each other.
        unsafe { add_step::<L, V>(l, &near, tokens, x.add(step * tokens * STEP), sums) };
    }
}

/// Adds the products of eight columns.
///
/// # Safety
/// `x` is readable for `tokens` times eight elements, `sums` writable for `tokens · V · ROWS`.
#[inline(always)]
unsafe fn add_step<L: Lanes, const V: usize>(
    l: L,
    weights: &[[L::F; STEP]; V],
    tokens: usize,
    x: *const f32,
    sums: *mut f32,
) {
    let (mut x, mut at) = (x, sums);
    for _ in 0..tokens {
        // SAFETY: both pointers advance over as many tokens as there are.
        unsafe {
            let mut sum = [l.splat(0.0); V];
            for (v, sum) in sum.iter_mut().enumerate() {
                *sum = l.load(at.add(v * L::ROWS));
            }
            for k in 0..STEP {
                let x = l.broadcast(x.add(k));
                for (sum, weights) in sum.iter_mut().zip(weights) {
                    *sum = l.fma(weights[k], x, *sum);
                }
            }
            for (v, &sum) in sum.iter().enumerate() {
                l.store(at.add(v * L::ROWS), sum);
            }
            at = at.add(V * L::ROWS);
            x = x.add(STEP);
        }
    }
}
