//! The chunks of one file: which are here. Pure.

use std::ops::Range;

/// A file cut into chunks of equal size (the last may be shorter), each here or not.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Grid {
    size: u64,
    chunk: u64,
    here: Vec<bool>,
    missing: usize,
}

impl Grid {
    /// Nothing is here. `chunk` is not 0.
    pub(crate) fn new(size: u64, chunk: u64) -> Grid {
        let count = size.div_ceil(chunk.max(1)) as usize;
        Grid { size, chunk: chunk.max(1), here: vec![false; count], missing: count }
    }

    /// Bytes of a chunk that is not the last.
    pub(crate) fn chunk_bytes(&self) -> u64 {
        self.chunk
    }

    /// Number of chunks.
    pub(crate) fn len(&self) -> usize {
        self.here.len()
    }

    /// The bytes of a chunk.
    pub(crate) fn range(&self, index: usize) -> Range<u64> {
        let start = (index as u64).saturating_mul(self.chunk).min(self.size);
        start..start.saturating_add(self.chunk).min(self.size)
    }

    /// The chunks that these bytes lie in.
    pub(crate) fn covering(&self, bytes: &Range<u64>) -> Range<usize> {
        let end = bytes.end.min(self.size);
        if bytes.start >= end {
            return 0..0;
        }
        (bytes.start / self.chunk) as usize..end.div_ceil(self.chunk) as usize
    }

    pub(crate) fn has(&self, index: usize) -> bool {
        self.here.get(index).copied().unwrap_or(false)
    }

    /// Whether all of these bytes are here; those beyond the end count as here.
    pub(crate) fn has_bytes(&self, bytes: &Range<u64>) -> bool {
        self.covering(bytes).all(|index| self.has(index))
    }

    pub(crate) fn insert(&mut self, index: usize) {
        if let Some(here) = self.here.get_mut(index)
            && !std::mem::replace(here, true)
        {
            self.missing -= 1;
        }
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.missing == 0
    }

    /// Bytes that are here.
    pub(crate) fn bytes_here(&self) -> u64 {
        let here = (0..self.len()).filter(|&index| self.has(index));
        here.map(|index| self.range(index)).map(|range| range.end - range.start).sum()
    }

    /// What is here as digits, four chunks each.
    pub(crate) fn to_hex(&self) -> String {
        let nibble = |four: &[bool]| four.iter().rev().fold(0, |value, &here| value * 2 + u32::from(here));
        self.here.chunks(4).filter_map(|four| char::from_digit(nibble(four), 16)).collect()
    }

    /// Takes over what [`Grid::to_hex`] gave for a grid of the same measures; `None` if it is of another.
    pub(crate) fn with_hex(mut self, digits: &str) -> Option<Grid> {
        if digits.len() != self.here.len().div_ceil(4) {
            return None;
        }
        for (digit, place) in digits.chars().zip(0..) {
            let value = digit.to_digit(16)?;
            for bit in (0..4).filter(|bit| value >> bit & 1 == 1) {
                let index = place * 4 + bit;
                if index >= self.here.len() {
                    return None;
                }
                self.insert(index);
            }
        }
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chunks_tile_the_file_and_survive_being_written_down(
            size in 0u64..5000, chunk in 1u64..700, some in proptest::collection::vec(0usize..5000, 0..40),
            start in 0u64..6000, len in 0u64..3000,
        ) {
            let mut grid = Grid::new(size, chunk);
            let mut at = 0;
            for index in 0..grid.len() {
                let range = grid.range(index);
                prop_assert!(range.start == at && range.end > at && range.end - at <= chunk);
                at = range.end;
            }
            prop_assert_eq!(at, size);
            some.iter().for_each(|&index| grid.insert(index));
            let bytes = start..start + len;
            let expected = (start..(start + len).min(size)).all(|byte| grid.has((byte / chunk) as usize));
            prop_assert_eq!(grid.has_bytes(&bytes), expected);
            prop_assert_eq!(grid.is_complete(), (0..grid.len()).all(|index| grid.has(index)));
            prop_assert_eq!(grid.is_complete(), grid.bytes_here() == size);
            let read = Grid::new(size, chunk).with_hex(&grid.to_hex());
            prop_assert_eq!(read, Some(grid));
        }
    }

    #[test]
    fn a_record_of_another_file_is_not_taken() {
        assert!(Grid::new(100, 10).with_hex("fff").is_none(), "more chunks than there are");
        assert!(Grid::new(100, 10).with_hex("ff").is_none());
        assert!(Grid::new(100, 10).with_hex("0g0").is_none());
        assert!(Grid::new(100, 10).with_hex("ff3").unwrap().is_complete());
    }
}
