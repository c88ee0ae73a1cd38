//! What kernels need to know of a batch, as tables: positions, sequences, and how attention is cut into blocks.
//!
//! Pure. How attention is cut changes no bit of a result (see `kernels/cuda/attention.cu`).

use super::launch::{attention_rows, heads_together};
use super::{Item, Merge};
use crate::executor::Place;

/// Positions of a partition of attention.
pub(crate) const PARTITION: usize = 256;
/// The slot of an item whose result is final.
const FINAL: u32 = u32::MAX;

/// How attention over cached keys and values is cut.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Cut {
    /// For the kernel with few query rows per block.
    pub(crate) few: Vec<ItemOf>,
    /// For the one with many.
    pub(crate) many: Vec<ItemOf>,
    pub(crate) merges: Vec<MergeOf>,
    /// Slots for partial results.
    pub(crate) slots: usize,
}

/// [`Item`], for comparing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ItemOf {
    pub(crate) row: usize,
    pub(crate) tokens: usize,
    pub(crate) sequence: usize,
    /// Partition and slot, if it is only one.
    pub(crate) part: Option<(usize, usize)>,
}

/// [`Merge`], for comparing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct MergeOf {
    pub(crate) row: usize,
    pub(crate) first_slot: usize,
    pub(crate) slots: usize,
}

impl From<ItemOf> for Item {
    fn from(item: ItemOf) -> Item {
        let (partition, slot) = item.part.map_or((0, FINAL), |(part, slot)| (part as u32, slot as u32));
        let ItemOf { row, tokens, sequence, .. } = item;
        Item { row: row as u32, tokens: tokens as u32, sequence: sequence as u32, partition, slot }
    }
}

impl From<MergeOf> for Merge {
    fn from(merge: MergeOf) -> Merge {
        let MergeOf { row, first_slot, slots } = merge;
        Merge { row: row as u32, first_slot: first_slot as u32, slots: slots as u32 }
    }
}

impl Cut {
    /// For heads of the kernel's `size` and groups of `group` query heads. Single tokens are cut into partitions when
    /// the batch has fewer blocks than `enough`.
    pub(crate) fn new(places: &[Place], size: usize, group: usize, kv_heads: usize, enough: usize) -> Cut {
        let together = heads_together(group);
        let (few, many) = (attention_rows(size, false) / together, attention_rows(size, true) / together);
        let blocks: usize = places.iter().map(|place| place.tokens.div_ceil(many) * kv_heads).sum();
        let mut cut = Cut::default();
        for (sequence, place) in places.iter().enumerate() {
            let end = place.position + place.tokens;
            let partitions = end.div_ceil(PARTITION);
            if place.tokens == 1 && partitions > 1 && blocks < enough {
                let first_slot = cut.slots;
                cut.merges.push(MergeOf { row: place.row, first_slot, slots: partitions });
                cut.few.extend((0..partitions).map(|partition| ItemOf {
                    row: place.row,
                    tokens: 1,
                    sequence,
                    part: Some((partition, first_slot + partition)),
                }));
                cut.slots += partitions;
                continue;
            }
            let (items, most) = if place.tokens <= few { (&mut cut.few, few) } else { (&mut cut.many, many) };
            // The last piece sees most and takes longest: first.
            items.extend((0..place.tokens).step_by(most).rev().map(|first| ItemOf {
                row: place.row + first,
                tokens: most.min(place.tokens - first),
                sequence,
                part: None,
            }));
        }
        cut
    }
}

impl Cut {
    /// Fills up a cut of single tokens of `rows` sequences so that there are only few different numbers of items and merges:
    /// with items without tokens, and merges without slots, of which kernels make nothing.
    pub(crate) fn fill_up(&mut self, rows: usize) {
        if !self.few.is_empty() {
            let nothing = ItemOf { row: 0, tokens: 0, sequence: 0, part: None };
            self.few.resize(self.few.len().next_power_of_two(), nothing);
        }
        if !self.merges.is_empty() {
            self.merges.resize(rows, MergeOf { row: 0, first_slot: 0, slots: 0 });
            self.slots = self.few.len();
        }
    }
}

/// Tables that are brought to the GPU together.
#[derive(Default)]
pub(crate) struct Tables {
    bytes: Vec<u8>,
}

/// Where a table begins, bytes after the first one's address.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Offset(pub(crate) u64);

impl Tables {
    /// Appends a table.
    pub(crate) fn push<T: Element>(&mut self, values: impl IntoIterator<Item = T>) -> Offset {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let offset = Offset(self.bytes.len() as u64);
        values.into_iter().for_each(|value| value.put(&mut self.bytes));
        offset
    }

    /// All of them.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// What tables are made of, in the layout of the sources.
pub(crate) trait Element {
    fn put(self, bytes: &mut Vec<u8>);
}

impl Element for u32 {
    fn put(self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_le_bytes());
    }
}

impl Element for f32 {
    fn put(self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_le_bytes());
    }
}

impl Element for f64 {
    fn put(self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_le_bytes());
    }
}

impl Element for u64 {
    fn put(self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_le_bytes());
    }
}

impl Element for Item {
    fn put(self, bytes: &mut Vec<u8>) {
        let Item { row, tokens, sequence, partition, slot } = self;
        [row, tokens, sequence, partition, slot].into_iter().for_each(|number| number.put(bytes));
    }
}

impl Element for Merge {
    fn put(self, bytes: &mut Vec<u8>) {
        let Merge { row, first_slot, slots } = self;
        [row, first_slot, slots].into_iter().for_each(|number| number.put(bytes));
    }
}

impl Element for super::FactorsEntry {
    fn put(self, bytes: &mut Vec<u8>) {
        self.a.put(bytes);
        self.b.put(bytes);
        [self.a_type, self.b_type, self.rank].into_iter().for_each(|number| number.put(bytes));
        self.scale.put(bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Every row is computed once: by one item, or by one per partition that are then merged.
        #[test]
        fn every_row_is_computed_once(
            chunks in proptest::collection::vec((0usize..2000, 1usize..200), 1..8),
            size in 0usize..5, group in 1usize..40, enough in 0usize..2000
        ) {
            let mut row = 0;
            let places: Vec<Place> = chunks.iter().map(|&(position, tokens)| {
                row += tokens;
                Place { row: row - tokens, tokens, position, long: false, second: usize::MAX, output_row: 0, output_rows: 0 }
            }).collect();
            let cut = Cut::new(&places, size, group, 2, enough);
            let mut computed = vec![0; row];
            for (items, many) in [(&cut.few, false), (&cut.many, true)] {
                for item in items {
                    let place = places[item.sequence];
                    prop_assert!(item.tokens > 0 && item.tokens * group.min(16) <= attention_rows(size, many));
                    prop_assert!(item.row >= place.row && item.row + item.tokens <= place.row + place.tokens);
                    if item.part.is_none() {
                        computed[item.row..item.row + item.tokens].iter_mut().for_each(|count| *count += 1);
                    }
                }
            }
            let mut slots = 0;
            for merge in &cut.merges {
                computed[merge.row] += 1;
                prop_assert_eq!(merge.first_slot, slots);
                slots += merge.slots;
                let of_row: Vec<_> = cut.few.iter().filter(|item| item.row == merge.row).collect();
                let place = places[of_row[0].sequence];
                prop_assert_eq!(merge.slots, (place.position + 1).div_ceil(PARTITION));
                for (partition, item) in of_row.iter().enumerate() {
                    prop_assert_eq!(item.part, Some((partition, merge.first_slot + partition)));
                }
                prop_assert_eq!(of_row.len(), merge.slots);
            }
            prop_assert_eq!(slots, cut.slots);
            prop_assert!(computed.iter().all(|&count| count == 1));
        }

        /// Filling up adds what kernels make nothing of, and changes nothing else.
        #[test]
        fn filled_up_cuts_do_the_same(
            positions in proptest::collection::vec(0usize..3000, 1..20), group in 1usize..9, enough in 0usize..60
        ) {
            let place = |(row, &position): (usize, &usize)| Place {
                row, tokens: 1, position, long: false, second: usize::MAX, output_row: row, output_rows: 1
            };
            let places: Vec<Place> = positions.iter().enumerate().map(place).collect();
            let cut = || Cut::new(&places, 2, group, 2, enough);
            let (cut, mut filled) = (cut(), cut());
            filled.fill_up(places.len());
            prop_assert!(filled.many.is_empty());
            prop_assert!(filled.few.len().is_power_of_two() && filled.few.len() < 2 * cut.few.len());
            prop_assert!(filled.few.starts_with(&cut.few) && filled.merges.starts_with(&cut.merges));
            prop_assert!(filled.few[cut.few.len()..].iter().all(|item| item.tokens == 0));
            prop_assert!(filled.merges[cut.merges.len()..].iter().all(|merge| merge.slots == 0));
            let merges = if cut.merges.is_empty() { 0 } else { places.len() };
            prop_assert!(filled.merges.len() == merges && filled.slots >= cut.slots);
        }
    }
}
