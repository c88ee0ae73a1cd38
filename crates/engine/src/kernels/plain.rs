//! The matrix product with weights of plain types: widened to f32 and multiplied in f32.
//!
//! **The order of additions of every output element**: the products in ascending order of the columns, one after the
//! other, fused where the hardware can. It does not depend on the number of tokens or rows.
#![allow(unsafe_code)]

use std::marker::PhantomData;

use super::buffer::Disjoint;
use super::lanes::Lanes;
use super::panels::{Ahead, Layout, MOST_ROWS, PanelSums};
use crate::pool::Pool;

/// Columns that are unpacked at a time.
const STEP: usize = 8;
/// Activations that make a packing task worth handing to another thread.
const TASK_ACTIVATIONS: usize = 1 << 14;

/// A plain element type.
pub(super) trait Plain {
    /// Bytes of an element.
    const SIZE: usize;

    /// Eight consecutive weights of the row of every lane.
    ///
    /// # Safety
    /// `8 · SIZE` bytes are readable at `p + row · stride` for each of the `ROWS` rows.
    unsafe fn eight<L: Lanes>(l: L, p: *const u8, stride: usize) -> [L::F; STEP];
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;

impl Plain for F32 {
    const SIZE: usize = 4;

    #[inline(always)]
    unsafe fn eight<L: Lanes>(l: L, p: *const u8, stride: usize) -> [L::F; STEP] {
        // SAFETY: twice sixteen bytes.
        let ([a, b, c, d], [e, f, g, h]) = unsafe { (l.sixteen(p, stride), l.sixteen(p.add(16), stride)) };
        [l.bits(a), l.bits(b), l.bits(c), l.bits(d), l.bits(e), l.bits(f), l.bits(g), l.bits(h)]
    }
}

impl Plain for F16 {
    const SIZE: usize = 2;

    #[inline(always)]
    unsafe fn eight<L: Lanes>(l: L, p: *const u8, stride: usize) -> [L::F; STEP] {
        // SAFETY: sixteen bytes.
        let [a, b, c, d] = unsafe { l.sixteen(p, stride) };
        let (low, high) = (L::lower_half, L::upper_half);
        [low(l, a), high(l, a), low(l, b), high(l, b), low(l, c), high(l, c), low(l, d), high(l, d)]
    }
}

impl Plain for Bf16 {
    const SIZE: usize = 2;

    #[inline(always)]
    unsafe fn eight<L: Lanes>(l: L, p: *const u8, stride: usize) -> [L::F; STEP] {
        // SAFETY: sixteen bytes.
        let [a, b, c, d] = unsafe { l.sixteen(p, stride) };
        let (low, high) = (L::lower_bf16, L::upper_bf16);
        [low(l, a), high(l, a), low(l, b), high(l, b), low(l, c), high(l, c), low(l, d), high(l, d)]
    }
}

/// Elements of a token's rearranged activations.
pub(super) fn token_elements(columns: usize) -> usize {
    columns.next_multiple_of(STEP)
}

/// Rearranges `x` (`[tokens, columns]`) to `[block][step of eight columns][token of the block][column]`, with zeros
/// after the last column.
pub(super) fn pack(pool: &Pool, layout: Layout, x: &[f32], columns: usize, packed: &mut [f32]) {
    assert_eq!(packed.len(), layout.elements());
    let per_task = (TASK_ACTIVATIONS / columns).max(1);
    let packed = Disjoint::new(packed);
    for block in 0..layout.blocks {
        let tokens = layout.tokens(block);
        let work = tokens.len() * columns / STEP;
        pool.run(tokens.len().div_ceil(per_task), 0, work, &|task, _| {
            for token in task * per_task..tokens.len().min((task + 1) * per_task) {
                let row = &x[(tokens.start + token) * columns..][..columns];
                for (step, from) in row.chunks(STEP).enumerate() {
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
    let (whole, tail) = (columns / STEP, columns % STEP);
    let rows = V * L::ROWS;
    assert!(rows <= MOST_ROWS && sums.len() == tokens * rows);
    assert_eq!(x.len(), columns.div_ceil(STEP) * STEP * tokens);
    let mut ahead = Ahead::new(panel.wrapping_add(rows * row_bytes), rows * STEP * P::SIZE);
    let (mut x, sums) = (x.as_ptr(), sums.as_mut_ptr());
    // SAFETY: every step is inside the rows; the steps of `x` follow each other; `sums` has `tokens · rows` elements.
    unsafe {
        if tokens == 1 {
            // The sums stay in registers.
            let mut own = [l.splat(0.0); V];
            for step in 0..whole {
                ahead.next(l);
                let at = panel.add(step * STEP * P::SIZE);
                add_single::<L, P, V>(l, at, row_bytes, x, &mut own);
                x = x.add(STEP);
            }
            if tail > 0 {
                let copy = tail_copy::<P>(panel, row_bytes, rows);
                add_single::<L, P, V>(l, copy.as_ptr().cast(), TAIL_STRIDE, x, &mut own);
            }
            for (v, &sum) in own.iter().enumerate() {
                l.store(sums.add(v * L::ROWS), sum);
            }
            return;
        }
        for step in 0..whole {
            ahead.next(l);
            let at = panel.add(step * STEP * P::SIZE);
            add_step::<L, P, V>(l, at, row_bytes, tokens, x, sums);
            x = x.add(tokens * STEP);
        }
        if tail > 0 {
            let copy = tail_copy::<P>(panel, row_bytes, rows);
            add_step::<L, P, V>(l, copy.as_ptr().cast(), TAIL_STRIDE, tokens, x, sums);
        }
    }
}

/// Bytes of a row in a copy of the last columns.
const TAIL_STRIDE: usize = 4 * STEP;

/// The columns after the last whole step of every row, followed by zeros.
///
/// # Safety
/// `rows`, at most [`MOST_ROWS`], rows of `row_bytes` are readable from `panel` on.
#[inline(always)]
unsafe fn tail_copy<P: Plain>(
    panel: *const u8,
    row_bytes: usize,
    rows: usize,
) -> [[u8; TAIL_STRIDE]; MOST_ROWS] {
    let mut copies = [[0; TAIL_STRIDE]; MOST_ROWS];
    let bytes = row_bytes % (STEP * P::SIZE);
    for (row, copy) in copies.iter_mut().enumerate().take(rows) {
        // SAFETY: the last bytes of a row; fewer than a step has, which is at most TAIL_STRIDE.
        unsafe {
            let from = panel.add((row + 1) * row_bytes - bytes);
            std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), bytes);
        }
    }
    copies
}

/// Adds the products of eight columns with the activations of a single token.
///
/// # Safety
/// Eight weights are readable at `panel + row · stride` for each of `V · ROWS` rows, eight elements at `x`.
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
            let weights = P::eight(l, panel.add(v * L::ROWS * stride), stride);
            for (k, &weight) in weights.iter().enumerate() {
                *sum = l.fma(weight, l.broadcast(x.add(k)), *sum);
            }
        }
    }
}

/// Adds the products of eight columns with the activations of all tokens.
///
/// # Safety
/// Eight weights are readable at `panel + row · stride` for each of `V · ROWS` rows, `tokens` times eight elements at
/// `x`; `sums` is writable for `tokens · V · ROWS`.
#[inline(always)]
unsafe fn add_step<L: Lanes, P: Plain, const V: usize>(
    l: L,
    panel: *const u8,
    stride: usize,
    tokens: usize,
    x: *const f32,
    sums: *mut f32,
) {
    let mut weights = [[l.splat(0.0); STEP]; V];
    for (v, weights) in weights.iter_mut().enumerate() {
        // SAFETY: by contract.
        *weights = unsafe { P::eight(l, panel.add(v * L::ROWS * stride), stride) };
    }
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
                for (sum, weights) in sum.iter_mut().zip(&weights) {
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
