//! Which physical pages are free. Hands them out in few, long runs, because mapping costs per run and not per page.
//! Knows nothing of addresses.

use std::collections::{BTreeMap, BTreeSet};

/// The free physical pages of one device, as maximal runs.
#[derive(Debug, Default)]
pub(crate) struct FreePages {
    by_start: BTreeMap<u32, u32>,
    by_length: BTreeSet<(u32, u32)>,
    free: usize,
}

impl FreePages {
    /// All of `pages` pages are free.
    pub(crate) fn new(pages: u32) -> Self {
        let mut free = FreePages { by_start: BTreeMap::new(), by_length: BTreeSet::new(), free: 0 };
        if pages > 0 {
            free.give(0, pages);
        }
        free
    }

    /// Free pages.
    pub(crate) fn free(&self) -> usize {
        self.free
    }

    /// Takes exactly `count` pages as (first, length) runs: one run if one is long enough (the shortest such), else
    /// the longest ones. `None`, and no change, if there are not enough.
    pub(crate) fn take(&mut self, count: usize) -> Option<Vec<(u32, u32)>> {
        if count > self.free {
            return None;
        }
        let mut runs = Vec::new();
        let mut left = count as u32;
        while left > 0 {
            let fitting = self.by_length.range((left, 0)..).next().copied();
            let (length, start) = fitting.or_else(|| self.by_length.last().copied())?;
            self.by_length.remove(&(length, start));
            self.by_start.remove(&start);
            let taken = length.min(left);
            if taken < length {
                self.by_start.insert(start + taken, length - taken);
                self.by_length.insert((length - taken, start + taken));
            }
            self.free -= taken as usize;
            left -= taken;
            runs.push((start, taken));
        }
        Some(runs)
    }

    /// Gives a run back and joins it with its neighbours.
    pub(crate) fn give(&mut self, start: u32, length: u32) {
        let (mut start, mut length) = (start, length);
        self.free += length as usize;
        if let Some((&before, &before_length)) = self.by_start.range(..start).next_back() {
            assert!(before + before_length <= start, "physical page given back twice");
            if before + before_length == start {
                self.by_start.remove(&before);
                self.by_length.remove(&(before_length, before));
                start = before;
                length += before_length;
            }
        }
        if let Some((&after, &after_length)) = self.by_start.range(start + 1..).next() {
            assert!(start + length <= after, "physical page given back twice");
            if start + length == after {
                self.by_start.remove(&after);
                self.by_length.remove(&(after_length, after));
                length += after_length;
            }
        }
        self.by_start.insert(start, length);
        self.by_length.insert((length, start));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_long_run_is_preferred_and_neighbours_join() {
        let mut pages = FreePages::new(10);
        assert_eq!(pages.take(4), Some(vec![(0, 4)]));
        assert_eq!(pages.take(2), Some(vec![(4, 2)]));
        pages.give(0, 4);
        assert_eq!(pages.take(4), Some(vec![(0, 4)]), "best fit takes the run of exactly four");
        pages.give(0, 4);
        pages.give(4, 2);
        assert_eq!(pages.take(10), Some(vec![(0, 10)]));
        assert_eq!(pages.take(1), None);
    }

    proptest! {
        #[test]
        fn pages_are_never_lost_or_doubled(steps in proptest::collection::vec((any::<bool>(), 1usize..20), 1..200)) {
            let mut pages = FreePages::new(64);
            let mut held: Vec<(u32, u32)> = Vec::new();
            for (take, amount) in steps {
                if take {
                    if let Some(runs) = pages.take(amount) {
                        prop_assert_eq!(runs.iter().map(|run| run.1 as usize).sum::<usize>(), amount);
                        held.extend(runs);
                    }
                } else if !held.is_empty() {
                    let (start, length) = held.swap_remove(amount % held.len());
                    pages.give(start, length);
                }
                let mut used = [false; 64];
                for &(start, length) in &held {
                    for page in start..start + length {
                        prop_assert!(!std::mem::replace(&mut used[page as usize], true));
                    }
                }
                prop_assert_eq!(pages.free(), used.iter().filter(|page| !**page).count());
            }
        }
    }
}
