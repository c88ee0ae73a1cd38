//! How a part of a tensor is read past the page cache: which blocks go straight to where the part's bytes belong, and
//! which through an aligned buffer. Arithmetic only.
//!
//! Direct reads transfer whole blocks of the disk to addresses that suit its controller. What of a part is whole blocks
//! at such addresses needs no buffer; the torn blocks at its ends, and parts that have no aligned middle worth a transfer
//! of its own, do.

use std::ops::Range;

/// What direct reads of a file must be aligned to, in bytes; powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Offset in the file, and length.
    pub(crate) offset: usize,
    /// Address in memory.
    pub(crate) memory: usize,
}

/// A smaller middle of a part costs more as a transfer of its own than as a copy.
const LEAST_DIRECT: usize = 64 << 10;

/// Which memory a piece is read into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The part's own.
    Part,
    /// The buffer.
    Buffer,
}

/// One read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where in the file.
    pub(crate) offset: u64,
    /// Which memory.
    pub(crate) place: Place,
    /// Where in it, bytes from its start.
    pub(crate) at: Range<usize>,
    /// Leading bytes without which the file is too short. The rest is there only because blocks are whole.
    pub(crate) needed: usize,
}

/// How to read one part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// The reads, in any order.
    pub(crate) pieces: Vec<Piece>,
    /// Bytes of the buffer, 0 if there is no need for one.
    pub(crate) buffer: usize,
    /// What to copy from the buffer into the part afterwards: from where, to where.
    pub(crate) copies: Vec<(Range<usize>, usize)>,
}

/// The plan for `len` bytes at `offset` of a file, for memory at `address`, in reads of at most `block` bytes (a multiple
/// of the alignment).
pub(crate) fn direct(offset: u64, len: usize, address: usize, alignment: Alignment, block: usize) -> Plan {
    // Where a part lies in memory as it does in the file, what suits the one suits the other.
    let both = alignment.offset.max(alignment.memory);
    let alike = address % both == (offset % both as u64) as usize;
    let unit = if alike { both } else { alignment.offset } as u64;
    let end = offset + len as u64;
    let inner = offset.next_multiple_of(unit)..end / unit * unit;
    let head = (inner.start - offset) as usize;
    let suits = (address + head).is_multiple_of(alignment.memory);
    let mut plan = Plan::default();
    if !suits || inner.end < inner.start + LEAST_DIRECT as u64 {
        return whole(offset, len, unit as usize, block);
    }
    // Edges lie in the buffer at multiples of what suits both.
    let (unit, slot) = (unit as usize, both);
    if head > 0 {
        plan.read(inner.start - unit as u64, Place::Buffer, 0..unit, unit, unit);
        plan.copies.push((unit - head..unit, 0));
        plan.buffer = slot;
    }
    let middle = (inner.end - inner.start) as usize;
    plan.read(inner.start, Place::Part, head..head + middle, middle, block);
    let tail = (end - inner.end) as usize;
    if tail > 0 {
        let at = plan.buffer;
        plan.read(inner.end, Place::Buffer, at..at + unit, tail, unit);
        plan.copies.push((at..at + tail, head + middle));
        plan.buffer = at + slot;
    }
    plan
}

/// The plan for `len` bytes at `offset` that all go through the buffer, in blocks of `unit` bytes (1 where alignment does
/// not matter). It has one copy.
pub(crate) fn whole(offset: u64, len: usize, unit: usize, block: usize) -> Plan {
    let unit = unit as u64;
    let start = offset / unit * unit;
    let buffer = ((offset + len as u64).next_multiple_of(unit) - start) as usize;
    let skipped = (offset - start) as usize;
    let mut plan = Plan { buffer, copies: vec![(skipped..skipped + len, 0)], ..Plan::default() };
    plan.read(start, Place::Buffer, 0..buffer, skipped + len, block);
    plan
}

/// The plan for reading through the page cache, which knows no alignment.
pub(crate) fn buffered(offset: u64, len: usize, block: usize) -> Plan {
    let mut plan = Plan::default();
    plan.read(offset, Place::Part, 0..len, len, block);
    plan
}

impl Plan {
    /// Adds reads of at most `block` bytes for `at`, of which the first `needed` bytes must be in the file.
    fn read(&mut self, mut offset: u64, place: Place, at: Range<usize>, needed: usize, block: usize) {
        let (mut start, mut needed) = (at.start, needed);
        while start < at.end {
            let len = block.min(at.end - start);
            self.pieces.push(Piece { offset, place, at: start..start + len, needed: needed.min(len) });
            offset += len as u64;
            start += len;
            needed -= needed.min(len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FILE: usize = 1 << 20;

    fn byte(at: u64) -> u8 {
        (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
    }

    /// Carries a plan out on a file whose bytes are [`byte`] and that ends after `file` bytes.
    fn carry_out(plan: &Plan, len: usize, file: u64) -> Vec<u8> {
        let (mut part, mut buffer) = (vec![0; len], vec![0; plan.buffer]);
        for piece in &plan.pieces {
            let memory = match piece.place {
                Place::Part => &mut part,
                Place::Buffer => &mut buffer,
            };
            let there = file.saturating_sub(piece.offset).min(piece.at.len() as u64) as usize;
            assert!(there >= piece.needed, "what is needed is in the file");
            for (to, at) in memory[piece.at.clone()][..there].iter_mut().zip(piece.offset..) {
                *to = byte(at);
            }
        }
        for (from, to) in &plan.copies {
            part[*to..to + from.len()].copy_from_slice(&buffer[from.clone()]);
        }
        part
    }

    proptest! {
        #[test]
        fn every_byte_arrives_by_aligned_reads(
            offset in 0..FILE as u64, len in 1..FILE, address in (0usize..1 << 16).prop_map(|a| a * 8),
            same in any::<bool>(), units in (0u32..5, 0u32..5), block in 0u32..4,
        ) {
            let alignment = Alignment { offset: 512 << (units.0 % 4), memory: 1 << (units.1 * 3) };
            // As in a paged pool: the address is the offset plus whole pages.
            let address = if same { offset as usize + (3 << 20) } else { address };
            let block = (64 << 10) << block;
            let plan = direct(offset, len, address, alignment, block);
            for piece in &plan.pieces {
                prop_assert!(piece.offset.is_multiple_of(alignment.offset as u64));
                prop_assert!(piece.at.len().is_multiple_of(alignment.offset) && piece.at.len() <= block);
                let base = if piece.place == Place::Part { address } else { 0 };
                prop_assert!((base + piece.at.start).is_multiple_of(alignment.memory));
                prop_assert!(piece.needed > 0 && piece.needed <= piece.at.len());
            }
            let expected: Vec<u8> = (offset..offset + len as u64).map(byte).collect();
            // The file may end with the part: its last block is then torn.
            prop_assert!(carry_out(&plan, len, offset + len as u64) == expected);
            prop_assert!(carry_out(&buffered(offset, len, block), len, offset + len as u64) == expected);
            if same && len >= 2 * LEAST_DIRECT && alignment.memory <= 4096 && alignment.offset <= 4096 {
                prop_assert!(plan.buffer <= 2 * 4096, "only torn blocks take the way through the buffer");
            }
        }
    }

    #[test]
    fn an_aligned_part_needs_no_buffer() {
        let alignment = Alignment { offset: 512, memory: 512 };
        let plan = direct(8192, 2 << 20, 0x10_0000, alignment, 1 << 20);
        assert_eq!((plan.buffer, plan.copies.len(), plan.pieces.len()), (0, 0, 2));
        // Large tensors begin at whole pages of an imported file, and anywhere that suits a segment in memory.
        let plan = direct(4096, 2 << 20, tangram_pool::ALIGNMENT, alignment, 1 << 20);
        assert_eq!(plan.buffer, 0);
    }
}
