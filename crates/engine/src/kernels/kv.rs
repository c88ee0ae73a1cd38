//! Keys and values of cached tokens in their blocks.
//!
//! A block holds 16 tokens of all layers as `[layer][key|value][kv head][token][head_dim]`. Blocks are memory of the
//! pool, lent for a call; this module never keeps their addresses beyond it.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

use tangram_device::Extent;

use super::simd::{LANES, Simd, load_partial};
use super::{Isa, Kernel};

/// Tokens per block.
pub const BLOCK_TOKENS: usize = 16;

/// How cached keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvElement {
    /// binary32.
    F32,
    /// binary16.
    F16,
}

impl KvElement {
    /// Bytes per element.
    pub const fn bytes(self) -> usize {
        match self {
            KvElement::F32 => 4,
            KvElement::F16 => 2,
        }
    }
}

/// The shape of a model's blocks.
#[derive(Clone, Copy, Debug)]
pub struct KvShape {
    /// Transformer layers.
    pub layers: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Element type.
    pub element: KvElement,
}

impl KvShape {
    /// Bytes of a block, `None` if that overflows.
    pub fn block_bytes(&self) -> Option<usize> {
        [2, self.kv_heads, BLOCK_TOKENS, self.head_dim, self.element.bytes()]
            .iter()
            .try_fold(self.layers, |bytes, &factor| bytes.checked_mul(factor))
    }

    /// Bytes of one head of 16 tokens: what attention reads at a time.
    fn tile_bytes(&self) -> usize {
        BLOCK_TOKENS * self.head_dim * self.element.bytes()
    }

    fn tile_offset(&self, layer: usize, value: bool, head: usize) -> usize {
        ((layer * 2 + usize::from(value)) * self.kv_heads + head) * self.tile_bytes()
    }
}

/// The KV blocks of one sequence in the order of its tokens: full ones that it shares with other sequences and that
/// nobody writes any more, then its own.
pub struct KvBlocks<'a> {
    /// Full blocks of a common prefix.
    pub shared: &'a [Arc<Extent>],
    /// Blocks that only this sequence has.
    pub own: &'a mut [Extent],
}

impl<'a> From<&'a mut [Extent]> for KvBlocks<'a> {
    fn from(own: &'a mut [Extent]) -> Self {
        KvBlocks { shared: &[], own }
    }
}

struct Block(*mut u8);

// SAFETY: a block is only accessed through a `KvView`, which borrows own extents exclusively and never writes shared
// ones (checked by `KvTable::bind`).
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

/// Why blocks cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvProblem {
    /// There are too few blocks for the chunk's tokens.
    TooFew {
        /// Which chunk.
        chunk: usize,
        /// Blocks needed.
        needed: usize,
        /// Blocks given.
        given: usize,
    },
    /// An extent is shorter than a block.
    Short {
        /// Which chunk.
        chunk: usize,
    },
    /// The chunk would write into blocks that the sequence shares with others.
    Shared {
        /// Which chunk.
        chunk: usize,
    },
    /// The processor cannot reach the memory.
    NotHost {
        /// Which chunk.
        chunk: usize,
    },
}

/// Reusable memory for the addresses of a step's blocks.
#[derive(Default)]
pub struct KvTable {
    blocks: Vec<Block>,
    /// Per chunk: the index of its first block.
    first: Vec<usize>,
}

/// The blocks of a step, borrowed.
pub struct KvView<'a> {
    shape: KvShape,
    blocks: &'a [Block],
    first: &'a [usize],
    exclusive: PhantomData<&'a mut [Extent]>,
}

impl KvTable {
    /// Borrows the blocks of every chunk. `tokens` gives, per chunk, the positions that it writes.
    ///
    /// # Errors
    /// [`KvProblem`] if blocks are missing, short, out of the processor's reach, or shared where they are written.
    pub fn bind<'a>(
        &'a mut self,
        shape: KvShape,
        kv: &'a mut [KvBlocks<'_>],
        tokens: impl Iterator<Item = Range<usize>>,
    ) -> Result<KvView<'a>, KvProblem> {
        self.blocks.clear();
        self.first.clear();
        let bytes = shape.block_bytes().unwrap_or(usize::MAX);
        for (chunk, (KvBlocks { shared, own }, tokens)) in kv.iter_mut().zip(tokens).enumerate() {
            let needed = tokens.end.div_ceil(BLOCK_TOKENS);
            let given = shared.len() + own.len();
            if given < needed {
                return Err(KvProblem::TooFew { chunk, needed, given });
            }
            if tokens.start < shared.len() * BLOCK_TOKENS {
                return Err(KvProblem::Shared { chunk });
            }
            self.first.push(self.blocks.len());
            for extent in *shared {
                let memory = extent.host_bytes().ok_or(KvProblem::NotHost { chunk })?;
                if memory.len() < bytes {
                    return Err(KvProblem::Short { chunk });
                }
                // Only read: the chunk's tokens, which alone are written, lie behind all shared blocks.
                self.blocks.push(Block(memory.as_ptr().cast_mut()));
            }
            for extent in own.iter_mut().take(needed - shared.len()) {
                let memory = extent.host_bytes_mut().ok_or(KvProblem::NotHost { chunk })?;
                if memory.len() < bytes {
                    return Err(KvProblem::Short { chunk });
                }
                self.blocks.push(Block(memory.as_mut_ptr()));
            }
        }
        self.first.push(self.blocks.len());
        Ok(KvView { shape, blocks: &self.blocks, first: &self.first, exclusive: PhantomData })
    }
}

impl KvView<'_> {
    /// The tile of a head in the block that holds `position`.
    fn tile(&self, chunk: usize, position: usize, layer: usize, value: bool, head: usize) -> *mut u8 {
        let index = self.first[chunk] + position / BLOCK_TOKENS;
        assert!(index < self.first[chunk + 1] && layer < self.shape.layers && head < self.shape.kv_heads);
        // SAFETY: a block has `block_bytes`, and the indices are in range (asserted), so the tile lies inside.
        unsafe { self.blocks[index].0.add(self.shape.tile_offset(layer, value, head)) }
    }

    /// Stores a token's keys or values, `[kv_heads, head_dim]`.
    ///
    /// # Safety
    /// Nobody else accesses this token's keys and values in this layer meanwhile.
    pub(super) unsafe fn store(
        &self,
        isa: Isa,
        chunk: usize,
        position: usize,
        layer: usize,
        value: bool,
        heads: &[f32],
    ) {
        let KvShape { head_dim, element, .. } = self.shape;
        for (index, head) in heads.chunks_exact(head_dim).enumerate() {
            let tile = self.tile(chunk, position, layer, value, index);
            // SAFETY: the token's row lies in the tile; nobody else accesses it by contract.
            unsafe {
                let row = tile.add(position % BLOCK_TOKENS * head_dim * element.bytes());
                match element {
                    KvElement::F32 => std::ptr::copy_nonoverlapping(head.as_ptr().cast(), row, head_dim * 4),
                    KvElement::F16 => isa.dispatch(Narrow { head, row }),
                }
            }
        }
    }

    /// Widens the first `count` tokens of a head's tile that starts at `position` into rows of `stride` elements,
    /// which must be the head dimension rounded up to whole vectors; the padding becomes 0.
    ///
    /// # Safety
    /// Nobody writes these tokens' keys and values in this layer meanwhile.
    #[expect(clippy::too_many_arguments, reason = "the address of a tile has five parts")]
    #[inline(always)]
    pub(super) unsafe fn load_tile<S: Simd>(
        &self,
        s: S,
        chunk: usize,
        position: usize,
        layer: usize,
        value: bool,
        head: usize,
        count: usize,
        out: &mut [f32],
    ) {
        let head_dim = self.shape.head_dim;
        let tile = self.tile(chunk, position, layer, value, head);
        assert!(count <= BLOCK_TOKENS);
        // SAFETY: `count` rows of the tile, not being written by contract.
        unsafe {
            match self.shape.element {
                KvElement::F32 => widen_rows_f32(s, tile.cast(), head_dim, head_dim, count, out),
                KvElement::F16 => widen_rows_f16(s, tile, head_dim, count, out),
            }
        }
    }
}

struct Narrow<'a> {
    head: &'a [f32],
    row: *mut u8,
}

impl Kernel for Narrow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (whole, tail) = (self.head.len() / LANES, self.head.len() % LANES);
        // SAFETY: `row` has room for as many binary16 as `head` has elements (see `KvView::store`).
        unsafe {
            for i in (0..whole).map(|i| i * LANES) {
                s.store_f16(self.row.add(i * 2), s.load(self.head.as_ptr().add(i)));
            }
            if tail > 0 {
                let mut narrow = [0u8; LANES * 2];
                s.store_f16(
                    narrow.as_mut_ptr(),
                    load_partial(s, self.head.as_ptr().add(whole * LANES), tail),
                );
                std::ptr::copy_nonoverlapping(narrow.as_ptr(), self.row.add(whole * LANES * 2), tail * 2);
            }
        }
    }
}

/// Copies `count` rows of `width` elements, `from_stride` elements apart, into rows padded to whole vectors.
///
/// # Safety
/// `from` is readable for these rows.
#[inline(always)]
pub(super) unsafe fn widen_rows_f32<S: Simd>(
    s: S,
    from: *const f32,
    from_stride: usize,
    width: usize,
    count: usize,
    out: &mut [f32],
) {
    let (whole, tail) = (width / LANES, width % LANES);
    let stride = width.next_multiple_of(LANES);
    assert!(out.len() >= count * stride);
    for row in 0..count {
        // SAFETY: readable by contract, writable by the assertion.
        unsafe {
            let (from, to) = (from.add(row * from_stride), out.as_mut_ptr().add(row * stride));
            for i in (0..whole).map(|i| i * LANES) {
                s.store(to.add(i), s.load(from.add(i)));
            }
            if tail > 0 {
                s.store(to.add(whole * LANES), load_partial(s, from.add(whole * LANES), tail));
            }
        }
    }
}

/// Widens `count` consecutive rows of `width` binary16 into rows padded to whole vectors.
///
/// # Safety
/// `from` is readable for these rows.
#[inline(always)]
unsafe fn widen_rows_f16<S: Simd>(s: S, from: *const u8, width: usize, count: usize, out: &mut [f32]) {
    let (whole, tail) = (width / LANES, width % LANES);
    let stride = width.next_multiple_of(LANES);
    assert!(out.len() >= count * stride);
    for row in 0..count {
        // SAFETY: readable by contract, writable by the assertion.
        unsafe {
            let (from, to) = (from.add(row * width * 2), out.as_mut_ptr().add(row * stride));
            for i in (0..whole).map(|i| i * LANES) {
                s.store(to.add(i), s.load_f16(from.add(i * 2)));
            }
            if tail > 0 {
                let mut padded = [0u8; LANES * 2];
                std::ptr::copy_nonoverlapping(from.add(whole * LANES * 2), padded.as_mut_ptr(), tail * 2);
                s.store(to.add(whole * LANES), s.load_f16(padded.as_ptr()));
            }
        }
    }
}
