//! A device's pool as one contiguous segment: where everything lies, and what placing something new moves.

use tangram_policy::packing::{Extent, Packer, Strategy};

use crate::model::ALIGNMENT;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    Slot(u32),
    Kv,
}

#[derive(Clone, Copy, Debug)]
struct Placed {
    offset: u64,
    len: u64,
    owner: Owner,
}

/// The segment.
#[derive(Debug)]
pub(crate) struct Layout {
    len: u64,
    strategy: Strategy,
    packer: Packer,
    /// In address order.
    placed: Vec<Placed>,
    /// Offset by slot; meaningless for slots that are not placed.
    offsets: Vec<u64>,
    residents: Vec<Extent>,
}

impl Layout {
    pub(crate) fn new(len: u64, strategy: Strategy) -> Layout {
        let packer = Packer::new(len, ALIGNMENT);
        Layout { len, strategy, packer, placed: Vec::new(), offsets: Vec::new(), residents: Vec::new() }
    }

    /// Places slots of these sizes, moving what `movable` allows. Gives the bytes moved; `None` if they do not fit.
    pub(crate) fn place(
        &mut self,
        slots: &[u32],
        sizes: &[u64],
        movable: impl Fn(u32) -> bool,
    ) -> Option<u64> {
        self.residents.clear();
        self.residents.extend(self.placed.iter().map(|placed| Extent {
            offset: placed.offset,
            len: placed.len,
            movable: matches!(placed.owner, Owner::Slot(slot) if movable(slot)),
        }));
        let packing = self.packer.pack(self.strategy, &self.residents, sizes)?;
        for step in &packing.moves {
            // Moves may change the order, so there is nothing to search by.
            if let Some(placed) = self.placed.iter_mut().find(|placed| placed.offset == step.from) {
                debug_assert_eq!((placed.offset, placed.len), (step.from, step.len));
                placed.offset = step.to;
                if let Owner::Slot(slot) = placed.owner {
                    self.offsets[slot as usize] = step.to;
                }
            }
        }
        for &(index, offset) in &packing.placements {
            let slot = slots[index];
            if self.offsets.len() <= slot as usize {
                self.offsets.resize(slot as usize + 1, 0);
            }
            self.offsets[slot as usize] = offset;
            self.placed.push(Placed { offset, len: sizes[index], owner: Owner::Slot(slot) });
        }
        // Nearly sorted: the stable sort finds the runs.
        self.placed.sort_by_key(|placed| placed.offset);
        Some(packing.moved_bytes)
    }

    /// Frees a slot's bytes.
    pub(crate) fn remove(&mut self, slot: u32) {
        let Some(&offset) = self.offsets.get(slot as usize) else { return };
        let index = self.placed.partition_point(|placed| placed.offset < offset);
        if self.placed.get(index).is_some_and(|placed| placed.owner == Owner::Slot(slot)) {
            self.placed.remove(index);
        }
    }

    /// Takes `bytes` for KV out of whatever is free, from the low end, in as many pieces as it needs.
    pub(crate) fn take_kv(&mut self, bytes: u64) {
        let (mut left, mut end) = (bytes, 0);
        let mut pieces = Vec::new();
        for (offset, len) in
            self.placed.iter().map(|placed| (placed.offset, placed.len)).chain([(self.len, 0)])
        {
            let piece = left.min(offset.saturating_sub(end));
            if piece > 0 {
                pieces.push(Placed { offset: end, len: piece, owner: Owner::Kv });
                left -= piece;
            }
            end = offset + len;
        }
        debug_assert_eq!(left, 0, "KV has its room");
        self.placed.extend(pieces);
        self.placed.sort_by_key(|placed| placed.offset);
    }

    /// Gives all KV back.
    pub(crate) fn give_kv(&mut self) {
        self.placed.retain(|placed| placed.owner != Owner::Kv);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_moves_and_frees() {
        let mut layout = Layout::new(10 * ALIGNMENT, Strategy::PartitionedGain);
        let sizes = [4 * ALIGNMENT, 2 * ALIGNMENT, 4 * ALIGNMENT];
        assert_eq!(layout.place(&[0, 1, 2], &sizes, |_| true), Some(0));
        let mut order = [0, 1, 2];
        order.sort_by_key(|&slot| layout.offsets[slot]);
        let middle = order[1];
        let others: Vec<u32> = (0..3).filter(|&slot| slot != middle as u32).collect();
        others.iter().for_each(|&slot| layout.remove(slot));
        assert_eq!(layout.place(&[7], &[6 * ALIGNMENT], |_| false), None, "the middle is a wall");
        let moved = layout.place(&[7], &[10 * ALIGNMENT - sizes[middle]], |_| true);
        assert_eq!(moved, Some(sizes[middle]));
        layout.remove(7);
        layout.take_kv(3 * ALIGNMENT);
        assert_eq!(layout.placed.len(), 2);
        layout.give_kv();
        assert_eq!(layout.placed.len(), 1);
    }
}
