//! What the matrix products of all weight types share: panels of rows, a lane for each, against a block of tokens.
//!
//! A panel's weights are read once for all tokens of a block, in the order in which they lie in memory; the sums of
//! the block stay in the first-level cache. How a panel is multiplied is [`PanelSums`].
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;

use super::Isa;
use super::buffer::Disjoint;
use super::lanes::{Lanes, LanesKernel, MOST_LANES};

/// Rows of a panel at most.
pub(super) const MOST_ROWS: usize = 2 * MOST_LANES;
/// The tokens of a block should take no more than this many bytes of the second-level cache.
const BLOCK_BYTES: usize = 512 << 10;
/// f32 per cache line.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 16;
/// A block has at least this many tokens, so that unpacking the weights stays cheap against using them.
const MIN_BLOCK: usize = 32;

/// How the tokens of a product are divided into blocks, and where their rearranged activations are.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    /// Elements of a token's rearranged activations.
    token_elements: usize,
    pub(super) tokens: usize,
    /// Tokens of a block at most.
    pub(super) most: usize,
    pub(super) blocks: usize,
}

impl Layout {
    /// Blocks that stay in the second-level cache while rows are multiplied with them.
    pub(super) fn new(token_elements: usize, tokens: usize) -> Layout {
        let most = (BLOCK_BYTES / (token_elements * 4).max(1)).max(MIN_BLOCK);
        Layout::with_most(token_elements, most, tokens)
    }

    /// Blocks of at most `most` tokens.
    pub(super) fn with_most(token_elements: usize, most: usize, tokens: usize) -> Layout {
        Layout { token_elements, tokens, most, blocks: tokens.div_ceil(most) }
    }

    /// Elements of all tokens.
    pub(super) fn elements(&self) -> usize {
        self.tokens * self.token_elements
    }

    pub(super) fn tokens(&self, block: usize) -> Range<usize> {
        block * self.tokens / self.blocks..(block + 1) * self.tokens / self.blocks
    }

    /// Where the elements of a block are.
    pub(super) fn place(&self, block: usize) -> Range<usize> {
        let tokens = self.tokens(block);
        tokens.start * self.token_elements..tokens.end * self.token_elements
    }

    /// Scratch elements that a [`Task`] needs for rows of `row_bytes`; never fewer for more tokens.
    pub(super) fn scratch(&self, row_bytes: usize) -> usize {
        self.tokens.min(self.most) * MOST_ROWS + (MOST_LANES * row_bytes).div_ceil(4)
    }
}

/// Multiplies panels for one weight type.
pub(super) trait PanelSums {
    /// Vectors of rows of a panel at most, for blocks of so many tokens: a power of two, at most [`MOST_ROWS`] rows.
    fn most_vectors<L: Lanes>(tokens: usize) -> usize;

    /// Adds to `sums` (`[token][lane]`, zeros) the products of a panel of `vectors · L::ROWS` rows of `row_bytes` with
    /// `tokens` tokens, rearranged as the weight type wants them.
    ///
    /// # Safety
    /// The panel's rows are readable from `panel` on; `vectors` is a power of two and at most `most_vectors`.
    unsafe fn add<L: Lanes>(
        l: L,
        panel: *const u8,
        row_bytes: usize,
        vectors: usize,
        tokens: usize,
        x: &[f32],
        sums: &mut [f32],
    );
}

/// Rows of a matrix, tokens that they are multiplied with, and where the product goes.
pub(super) struct Task<'a> {
    /// Stored bytes of the rows.
    pub(super) weight: &'a [u8],
    pub(super) row_bytes: usize,
    /// Their place in the matrix, and how many rows that has.
    pub(super) rows: Range<usize>,
    pub(super) all_rows: usize,
    pub(super) tokens: Range<usize>,
    /// Rearranged activations of the tokens.
    pub(super) x: &'a [f32],
    /// `[all tokens, all rows]`.
    pub(super) out: &'a Disjoint<'a>,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) accumulate: bool,
    /// See [`Layout::scratch`].
    pub(super) scratch: &'a mut [f32],
}

impl Task<'_> {
    /// # Safety
    /// No other thread touches these rows of these tokens in `out`.
    pub(super) unsafe fn run<P: PanelSums>(self, isa: Isa) {
        assert_eq!(self.weight.len(), self.rows.len() * self.row_bytes);
        isa.dispatch_lanes(Run::<P> { task: self, panel_sums: PhantomData });
    }

    /// Asks for the cache lines that [`Task::finish`] will write.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) fn ask_for_out(&self, first: usize, count: usize) {
        for token in self.tokens.clone() {
            let at = token * self.all_rows + self.rows.start + first;
            for line in (0..count).step_by(LINE) {
                self.out.ask_for(at + line);
            }
        }
    }

    /// What happens to the finished sums of `count` rows from `first` on.
    #[inline(always)]
    pub(super) fn finish(&self, first: usize, count: usize, sums: &[f32], sums_step: usize) {
        let row = self.rows.start + first;
        let bias = self.bias.map(|bias| &bias[row..row + count]);
        for (token, sums) in self.tokens.clone().zip(sums.chunks_exact(sums_step)) {
            // SAFETY: these rows of these tokens are this task's by the contract of `run`.
            let out = unsafe { self.out.part(token * self.all_rows + row, count) };
            // Whole panels have a length that the compiler knows.
            match <&mut [f32; MOST_ROWS]>::try_from(&mut *out) {
                Ok(out) => finish_rows(out, &sums[..MOST_ROWS], bias, self.accumulate),
                Err(_) => finish_rows(out, &sums[..count], bias, self.accumulate),
            }
        }
    }
}

/// Adds bias and what is there already to the sums of a token.
#[inline(always)]
fn finish_rows(out: &mut [f32], sums: &[f32], bias: Option<&[f32]>, accumulate: bool) {
    match (bias, accumulate) {
        (None, false) => out.copy_from_slice(sums),
        (None, true) => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum),
        (Some(bias), false) => {
            out.iter_mut().zip(sums).zip(bias).for_each(|((out, sum), bias)| *out = sum + bias)
        }
        (Some(bias), true) => {
            out.iter_mut().zip(sums).zip(bias).for_each(|((out, sum), bias)| *out += sum + bias)
        }
    }
}

struct Run<'a, P> {
    task: Task<'a>,
    panel_sums: PhantomData<P>,
}

impl<P: PanelSums> LanesKernel for Run<'_, P> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let mut task = self.task;
        let (rows, row_bytes, tokens) = (task.rows.len(), task.row_bytes, task.tokens.len());
        let scratch = std::mem::take(&mut task.scratch);
        let (sums, copy) = scratch.split_at_mut(tokens * MOST_ROWS);
        let mut first = 0;
        while first < rows {
            let vectors = ((rows - first) / L::ROWS).clamp(1, P::most_vectors::<L>(tokens));
            let vectors = 1 << vectors.ilog2();
            let count = (vectors * L::ROWS).min(rows - first);
            let bytes = &task.weight[first * row_bytes..(first + count) * row_bytes];
            let panel = if count < L::ROWS { with_zeros(bytes, copy) } else { bytes.as_ptr() };
            let sums = &mut sums[..tokens * vectors * L::ROWS];
            sums.fill(0.0);
            // SAFETY: the panel has as many rows as there are lanes.
            unsafe { P::add(l, panel, row_bytes, vectors, tokens, task.x, sums) };
            task.finish(first, count, sums, vectors * L::ROWS);
            first += count;
        }
    }
}

/// A copy of fewer rows than there are lanes, followed by zeros.
fn with_zeros(bytes: &[u8], copy: &mut [f32]) -> *const u8 {
    copy.fill(0.0);
    assert!(bytes.len() <= copy.len() * 4);
    let to = copy.as_mut_ptr().cast::<u8>();
    // SAFETY: the copy is long enough (asserted), any bytes are f32s, and the two do not overlap.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    to
}
