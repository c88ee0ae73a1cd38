//! What a plan is made for: the holes of a segment, and the tensors to place, as runs of equal size.

use super::Extent;

/// Resident bytes between two holes that lie on different sides of a leased extent.
pub(super) const WALL: u64 = u64::MAX;

/// A maximal free range.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hole {
    pub(super) offset: u64,
    /// Bytes. 0 for the mark at the end of a compartment whose last bytes are taken.
    pub(super) len: u64,
    /// Index of the first resident after it.
    pub(super) next: usize,
}

/// The holes of a segment in address order.
#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) holes: Vec<Hole>,
    /// Resident bytes between a hole and the next, or [`WALL`]; one per hole, the last is [`WALL`].
    pub(super) gaps: Vec<u64>,
    pub(super) alignment: u64,
    /// Bytes of all holes.
    pub(super) free: u64,
}

/// Bytes that something of `len` bytes takes from the segment, `None` on overflow. The alignment is a power of two.
pub(super) fn footprint(len: u64, alignment: u64) -> Option<u64> {
    Some(len.max(1).checked_add(alignment - 1)? & !(alignment - 1))
}

impl Layout {
    /// False if the residents break the contract of [`super::Packer::pack`].
    pub(super) fn read(&mut self, len: u64, alignment: u64, residents: &[Extent]) -> bool {
        self.holes.clear();
        self.gaps.clear();
        self.alignment = alignment;
        self.free = 0;
        let mut end = 0;
        let mut gap = WALL;
        for (next, resident) in residents.iter().enumerate() {
            let Some(size) = footprint(resident.len, alignment) else { return false };
            if resident.offset & (alignment - 1) != 0 || resident.offset < end || resident.offset > len {
                return false;
            }
            if resident.offset > end {
                self.push(Hole { offset: end, len: resident.offset - end, next }, gap);
                gap = 0;
            }
            if !resident.movable {
                self.close(end, next, gap);
                gap = WALL;
            } else if gap != WALL {
                gap += resident.len;
            }
            match resident.offset.checked_add(size) {
                Some(after) if after <= len => end = after,
                _ => return false,
            }
        }
        if len > end {
            self.push(Hole { offset: end, len: len - end, next: residents.len() }, gap);
        } else {
            self.close(end, residents.len(), gap);
        }
        if !self.holes.is_empty() {
            self.gaps.push(WALL);
        }
        true
    }

    /// `gap`: resident bytes since the hole before, [`WALL`] if a compartment begins in between.
    fn push(&mut self, hole: Hole, gap: u64) {
        if !self.holes.is_empty() {
            self.gaps.push(gap);
        }
        self.free += hole.len;
        self.holes.push(hole);
    }

    /// Marks the end of a compartment that has holes, but not at its end: what lies there can be slid too.
    fn close(&mut self, end: u64, next: usize, gap: u64) {
        if gap != WALL && self.holes.last().is_some_and(|hole| hole.next < next) {
            self.push(Hole { offset: end, len: 0, next }, gap);
        }
    }
}

/// Tensors of the same footprint.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// Bytes each takes from the segment.
    pub(super) size: u64,
    pub(super) count: u32,
    /// Where its next tensor that has no offset yet stands in [`Demand::order`].
    pub(super) next: u32,
}

/// The tensors to place.
#[derive(Debug, Default)]
pub(super) struct Demand {
    /// Footprint and index among the sizes asked for; largest first.
    pub(super) order: Vec<(u64, u32)>,
    /// Largest first.
    pub(super) runs: Vec<Run>,
    /// Bytes that all of them take from the segment.
    pub(super) bytes: u64,
}

impl Demand {
    /// False if they cannot fit any segment of `len` bytes.
    pub(super) fn read(&mut self, len: u64, alignment: u64, sizes: &[u64]) -> bool {
        self.order.clear();
        self.runs.clear();
        self.bytes = 0;
        for (index, &size) in sizes.iter().enumerate() {
            let (Some(size), Ok(index)) = (footprint(size, alignment), u32::try_from(index)) else {
                return false;
            };
            if size > len - self.bytes {
                return false;
            }
            self.bytes += size;
            self.order.push((size, index));
        }
        self.order.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        for (next, &(size, _)) in self.order.iter().enumerate() {
            match self.runs.last_mut() {
                Some(run) if run.size == size => run.count += 1,
                _ => self.runs.push(Run { size, count: 1, next: next as u32 }),
            }
        }
        true
    }
}
