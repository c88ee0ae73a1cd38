//! The matrix product with bf16 weights as integers, for processors that multiply pairs of 16-bit integers
//! (`pairs_avx512`): twice the rate of f32.
//!
//! [`GROUP`] columns share factors, powers of two. The weights of a row's group become integers of up to ±2¹²: exact
//! for all that are at least 1/16 of the group's largest, to half of 1/2048 of it for the others. The activations of a
//! token's group become integers of up to ±2¹⁵, to half of 1/16384 of the largest. Sixteen products of the largest
//! fit 32 bits.
//!
//! **The order of additions of every output element**: sixteen sums, of which sum `l` has columns `2 l` and `2 l + 1` of
//! every 32. The groups in ascending order; of a group, each sum adds its sixteen products, which are added exactly, times
//! the product of the factors. Then the sixteen are added as `pairs_avx512::add_lanes` does. It does not depend on
//! the number of tokens or rows.
//!
//! Beyond [`HUGE_ACTIVATION`] and [`HUGE_WEIGHT`], as with infinities and NaN, products are NaN.
#![allow(unsafe_code)]

use super::Isa;
use super::buffer::Disjoint;
#[cfg(target_arch = "x86_64")]
use super::pairs_avx512 as kernel;
use super::panels::{Layout, MOST_ROWS, Task};
use crate::pool::Pool;

/// Columns with common factors.
pub(super) const GROUP: usize = 256;
/// f32 elements that the integers of a group of activations take.
pub(super) const GROUP_ELEMENTS: usize = GROUP / 2;
/// Groups of which the weights of some rows, as integers, stay in the first-level cache.
pub(super) const SEGMENT: usize = 4;
/// Tokens of a block at most.
const MOST_TOKENS: usize = 256;
/// Rows that are multiplied together.
pub(super) const QUAD: usize = 4;
/// Sums in the making of an output element.
pub(super) const LANES: usize = 16;
/// The exponent, as f32 stores it, from which on the activations of a token make its products NaN: 2⁶⁵. Below, no sum
/// of exponents leaves the range of f32 at its upper end; at its lower end factors become 0.
pub(super) const HUGE_ACTIVATION: u32 = 192;
/// The same for weights: 2⁸⁹.
#[cfg(target_arch = "x86_64")]
pub(super) const HUGE_WEIGHT: u32 = 216;
/// Activations that make a packing task worth handing to another thread.
const TASK_ACTIVATIONS: usize = 1 << 14;

/// That the processor has the instructions.
#[cfg(target_arch = "x86_64")]
pub(super) type Proof = super::lanes_avx512::Lanes16<true>;
/// That the processor has the instructions: none of this kind has.
#[cfg(not(target_arch = "x86_64"))]
pub(super) type Proof = std::convert::Infallible;

/// Elements of a token's integers, factors and mark; blocks of tokens begin at cache lines.
pub(super) fn token_elements(columns: usize) -> usize {
    (columns.div_ceil(GROUP) * (GROUP_ELEMENTS + 1) + 1).next_multiple_of(16)
}

/// How the tokens of a product are divided: the activations of a segment should stay in the second-level cache, and with
/// them, where there are several, the sums in the making.
pub(super) fn layout(columns: usize, tokens: usize) -> Layout {
    let most = if columns <= SEGMENT * GROUP { MOST_TOKENS } else { MOST_TOKENS / 2 };
    Layout::with_most(token_elements(columns), most, tokens)
}

/// Where the activations of a block of tokens are, counted in elements from its beginning: `[segment][token][group]`
/// integers, `[token][group]` factors, `[token]` marks.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub(super) groups: usize,
    pub(super) tokens: usize,
    columns: usize,
}

impl Places {
    pub(super) fn new(columns: usize, tokens: usize) -> Places {
        Places { groups: columns.div_ceil(GROUP), tokens, columns }
    }

    /// Vectors of 32 columns that a group has.
    pub(super) fn vectors(&self, group: usize) -> usize {
        (self.columns - group * GROUP).min(GROUP).div_ceil(32)
    }

    /// Groups of a segment, of which `first` is the first.
    pub(super) fn segment(&self, first: usize) -> usize {
        SEGMENT.min(self.groups - first)
    }

    /// The integers of a token's groups from `first`, the first of a segment, to the end of the segment.
    pub(super) fn integers(&self, token: usize, first: usize) -> usize {
        (first * self.tokens + token * self.segment(first)) * GROUP_ELEMENTS
    }

    /// The factors of a token.
    pub(super) fn factors(&self, token: usize) -> usize {
        self.groups * (self.tokens * GROUP_ELEMENTS + token)
    }

    /// What the sums of a token start with: 0, or NaN for one with numbers that have no integers.
    pub(super) fn mark(&self, token: usize) -> usize {
        self.groups * self.tokens * (GROUP_ELEMENTS + 1) + token
    }
}

/// Scratch elements of a [`Task`]: the integers of a segment of four rows, their factors, the sums of a panel and,
/// with several segments, the sums in the making.
pub(super) fn scratch(layout: &Layout, columns: usize) -> usize {
    let tokens = layout.tokens.min(layout.most);
    let unfinished = if columns > SEGMENT * GROUP { tokens * MOST_ROWS * LANES } else { 0 };
    SEGMENT * QUAD * (GROUP_ELEMENTS + 1) + tokens * MOST_ROWS + unfinished
}

/// Rounds `x` (`[tokens, columns]`) to integers.
pub(super) fn pack(proof: Proof, pool: &Pool, layout: Layout, x: &[f32], columns: usize, packed: &mut [f32]) {
    assert_eq!(packed.len(), layout.elements());
    let per_task = (TASK_ACTIVATIONS / columns).max(1);
    let packed = Disjoint::new(packed);
    for block in 0..layout.blocks {
        let tokens = layout.tokens(block);
        let start = layout.place(block).start;
        let places = Places::new(columns, tokens.len());
        let work = tokens.len() * columns / 8;
        pool.run(tokens.len().div_ceil(per_task), 0, work, &|task, _| {
            for token in task * per_task..tokens.len().min((task + 1) * per_task) {
                let row = &x[(tokens.start + token) * columns..][..columns];
                // SAFETY: the places of tokens are disjoint, and a task takes a token alone.
                let (factors, mark) = unsafe {
                    let factors = packed.part(start + places.factors(token), places.groups);
                    (factors, packed.part(start + places.mark(token), 1))
                };
                mark[0] = 0.0;
                for (group, (x, factor)) in row.chunks(GROUP).zip(factors).enumerate() {
                    let (first, index) = (group / SEGMENT * SEGMENT, group % SEGMENT);
                    let at = start + places.integers(token, first) + index * GROUP_ELEMENTS;
                    // SAFETY: as above.
                    let to = unsafe { packed.part(at, GROUP_ELEMENTS) };
                    let exponent = pack_group(proof, x, to);
                    *factor = f32::from_bits((255 - exponent) << 23);
                    if exponent >= HUGE_ACTIVATION {
                        mark[0] = f32::NAN;
                    }
                }
            }
        });
    }
}

/// Rounds at most [`GROUP`] numbers to integers, with zeros after them, and says what they are to be multiplied with,
/// as the biased exponent of the largest: `2^(exponent - 141)`.
fn pack_group(proof: Proof, x: &[f32], to: &mut [f32]) -> u32 {
    assert!(x.len() <= GROUP && to.len() == GROUP_ELEMENTS);
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the proof; the lengths were asserted.
    unsafe {
        let _ = proof;
        kernel::pack_group(x, to.as_mut_ptr().cast())
    }
    #[cfg(not(target_arch = "x86_64"))]
    match proof {}
}

impl Isa {
    /// Whether, and with what, bf16 weights are multiplied as integers.
    pub(super) fn pairs(self) -> Option<Proof> {
        match self.lanes {
            #[cfg(target_arch = "x86_64")]
            super::LanesKind::Avx512Vnni(proof) => Some(proof),
            _ => None,
        }
    }
}

impl Task<'_> {
    /// Multiplies bf16 rows with tokens that [`pack`] has rounded.
    ///
    /// # Safety
    /// No other thread touches these rows of these tokens in `out`.
    pub(super) unsafe fn run_pairs(self, proof: Proof) {
        assert_eq!(self.weight.len(), self.rows.len() * self.row_bytes);
        let columns = self.row_bytes / 2;
        assert_eq!(self.x.len(), self.tokens.len() * token_elements(columns));
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the proof; rows and activations were just asserted to be there; the contract is the same.
        unsafe {
            let _ = proof;
            kernel::run(self, columns)
        }
        #[cfg(not(target_arch = "x86_64"))]
        match proof {}
    }
}
