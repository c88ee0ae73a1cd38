//! Which chunk comes next: those that somebody waits for, then the rest in the order in which they will be needed. Pure:
//! no clock, no I/O. A chunk is handed out to one worker at a time.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;

use crate::grid::Grid;

/// A chunk of one of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Piece {
    /// Index of the file.
    pub(crate) file: usize,
    /// Index of the chunk in it.
    pub(crate) chunk: usize,
}

/// The files of a download and what is still to be done.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    grids: Vec<Grid>,
    /// Awaited, in the order in which they were asked for.
    urgent: VecDeque<Piece>,
    /// The rest in the order in which it will be needed; may name what is here or urgent already.
    order: VecDeque<Piece>,
    in_flight: BTreeSet<Piece>,
}

impl Plan {
    /// Files in this order, each from its beginning.
    pub(crate) fn new(grids: Vec<Grid>) -> Plan {
        let pieces = |(file, grid): (usize, &Grid)| (0..grid.len()).map(move |chunk| Piece { file, chunk });
        let order = grids.iter().enumerate().flat_map(pieces).collect();
        Plan { grids, order, ..Plan::default() }
    }

    pub(crate) fn grids(&self) -> &[Grid] {
        &self.grids
    }

    fn has(&self, piece: Piece) -> bool {
        self.grids.get(piece.file).is_none_or(|grid| grid.has(piece.chunk))
    }

    /// Whether these bytes of a file are here.
    pub(crate) fn has_bytes(&self, file: usize, bytes: &Range<u64>) -> bool {
        self.grids.get(file).is_some_and(|grid| grid.has_bytes(bytes))
    }

    /// Somebody waits for these bytes of a file.
    pub(crate) fn hurry(&mut self, file: usize, bytes: &Range<u64>) {
        let Some(grid) = self.grids.get(file) else { return };
        for chunk in grid.covering(bytes) {
            let piece = Piece { file, chunk };
            if !self.has(piece) && !self.in_flight.contains(&piece) && !self.urgent.contains(&piece) {
                self.urgent.push_back(piece);
            }
        }
    }

    /// What will be needed, in this order; what is not named comes after it as before.
    pub(crate) fn arrange(&mut self, needed: impl Iterator<Item = (usize, Range<u64>)>) {
        let (mut seen, mut order) = (BTreeSet::new(), VecDeque::new());
        for (file, bytes) in needed {
            let Some(grid) = self.grids.get(file) else { continue };
            let pieces = grid.covering(&bytes).map(|chunk| Piece { file, chunk });
            order.extend(pieces.filter(|&piece| seen.insert(piece)));
        }
        order.extend(self.order.drain(..).filter(|piece| !seen.contains(piece)));
        self.order = order;
    }

    /// The next chunk to fetch; it is in flight from now on.
    pub(crate) fn next(&mut self) -> Option<Piece> {
        loop {
            let piece = self.urgent.pop_front().or_else(|| self.order.pop_front())?;
            if !self.has(piece) && self.in_flight.insert(piece) {
                return Some(piece);
            }
        }
    }

    /// A chunk that was in flight is here.
    pub(crate) fn arrived(&mut self, piece: Piece) {
        self.in_flight.remove(&piece);
        if let Some(grid) = self.grids.get_mut(piece.file) {
            grid.insert(piece.chunk);
        }
    }

    /// Whether everything is here.
    pub(crate) fn is_complete(&self) -> bool {
        self.grids.iter().all(Grid::is_complete)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_awaited_comes_first_and_the_rest_as_it_will_be_needed() {
        let mut plan = Plan::new(vec![Grid::new(40, 10), Grid::new(20, 10)]);
        plan.arrange([(1, 5..6), (0, 30..40)].into_iter());
        plan.hurry(0, &(15..25));
        let order: Vec<_> =
            std::iter::from_fn(|| plan.next()).map(|piece| (piece.file, piece.chunk)).collect();
        assert_eq!(order, [(0, 1), (0, 2), (1, 0), (0, 3), (0, 0), (1, 1)]);
    }

    #[derive(Clone, Debug)]
    enum Act {
        Next,
        Arrive(usize),
        Hurry(usize, u64, u64),
        Arrange(Vec<(usize, u64, u64)>),
    }

    fn act() -> impl Strategy<Value = Act> {
        let span = (0usize..4, 0u64..300, 0u64..120);
        prop_oneof![
            4 => Just(Act::Next),
            3 => (0usize..8).prop_map(Act::Arrive),
            1 => span.clone().prop_map(|(file, start, len)| Act::Hurry(file, start, start + len)),
            1 => proptest::collection::vec(span, 0..6).prop_map(Act::Arrange),
        ]
    }

    proptest! {
        #[test]
        fn every_chunk_is_fetched_once_whatever_happens(
            sizes in proptest::collection::vec(0u64..200, 1..4), acts in proptest::collection::vec(act(), 0..60),
        ) {
            let mut plan = Plan::new(sizes.iter().map(|&size| Grid::new(size, 16)).collect());
            let (mut flying, mut given) = (Vec::new(), BTreeSet::new());
            // At the end everything is taken.
            let rest = std::iter::repeat_n([Act::Next, Act::Arrive(0)], 60).flatten();
            for act in acts.into_iter().chain(rest) {
                match act {
                    Act::Next => if let Some(piece) = plan.next() {
                        prop_assert!(given.insert(piece), "{piece:?} twice");
                        flying.push(piece);
                    },
                    Act::Arrive(at) if at < flying.len() => plan.arrived(flying.swap_remove(at)),
                    Act::Arrive(_) => {}
                    Act::Hurry(file, start, end) => plan.hurry(file, &(start..end)),
                    Act::Arrange(spans) => plan.arrange(spans.into_iter().map(|(file, start, len)| (file, start..start + len))),
                }
            }
            prop_assert!(plan.is_complete() && plan.next().is_none());
            prop_assert_eq!(given.len() as u64, sizes.iter().map(|size| size.div_ceil(16)).sum::<u64>());
        }
    }
}
