//! The order of tensors by worth, kept cheaply: tensors with one history stand in one *cohort*.
//!
//! A tensor's worth is demand + forecast + value (all log2). The tensors of a model are used together, so they have one
//! demand and one forecast, and only their values differ. A cohort holds such tensors, and in two rows, sorted by value,
//! those that are idle and those that are absent. Its order within does not change when it is used; only its place among
//! the other cohorts does. So using, evicting or expecting a model's tensors one after the other costs a few operations
//! on short rows that are in the processor's cache, and a handful of operations on the trees that order the cohorts.
//!
//! A few cohorts that were touched last are *open*: not in the trees, because they are about to change again. Whoever
//! asks for an order gets a merge of the open cohorts and of the trees, lazily.
//!
//! Exact: the order is the one that sorting all tensors by worth would give. Must not know what the numbers mean.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque, btree_map};

use super::TensorKey;

/// Cohorts that may be open at a time: a request's own before and after its use, those of its victims.
const OPEN: usize = 8;

/// A number and a tensor as one integer that orders by the number, then the tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rank(u128);

impl Rank {
    fn new(number: f64, tensor: TensorKey, side: Side) -> Self {
        // The order of floats as integers, as in `f64::total_cmp`: negative ones turned round, and below the others.
        let bits = number.to_bits();
        let ordered = if bits >> 63 == 1 { !bits } else { bits | 1 << 63 };
        let rank = u128::from(ordered) << 32 | u128::from(tensor.0);
        Rank(if side == Side::Absent { !rank } else { rank })
    }

    fn tensor(self, side: Side) -> TensorKey {
        TensorKey(if side == Side::Absent { !self.0 } else { self.0 } as u32)
    }

    fn number(self, side: Side) -> f64 {
        let ordered = (if side == Side::Absent { !self.0 } else { self.0 } >> 32) as u64;
        f64::from_bits(if ordered >> 63 == 1 { ordered & !(1 << 63) } else { !ordered })
    }
}

/// Which of the two orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Ascending: what goes first.
    Idle,
    /// Descending: what comes first.
    Absent,
}

const SIDES: [Side; 2] = [Side::Idle, Side::Absent];

/// Ranks by value, ascending.
#[derive(Debug, Default)]
struct Row(VecDeque<Rank>);

impl Row {
    /// Models are used, and evicted, in order, so nearly everything happens at an end.
    fn insert(&mut self, rank: Rank) {
        if self.0.back().is_none_or(|&last| last < rank) {
            self.0.push_back(rank);
        } else if self.0.front().is_some_and(|&first| rank < first) {
            self.0.push_front(rank);
        } else if let Err(index) = self.0.binary_search(&rank) {
            self.0.insert(index, rank);
        }
    }

    fn remove(&mut self, rank: Rank) {
        if self.0.front() == Some(&rank) {
            self.0.pop_front();
        } else if self.0.back() == Some(&rank) {
            self.0.pop_back();
        } else if let Ok(index) = self.0.binary_search(&rank) {
            self.0.remove(index);
        }
    }
}

/// Number of a cohort.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CohortKey(u32);

#[derive(Debug, Default)]
struct Cohort {
    demand: f64,
    expected: f64,
    /// Tensors in it, listed or not.
    members: usize,
    rows: [Row; 2],
    /// Its keys in the trees, while it is not open.
    listed: [Option<Rank>; 2],
}

impl Cohort {
    /// The worth of what stands at `index` of a row.
    fn rank(&self, side: Side, index: u32) -> Option<Rank> {
        let &rank = self.rows[side as usize].0.get(index as usize)?;
        Some(Rank::new(self.demand + self.expected + rank.number(side), rank.tensor(side), side))
    }
}

/// All cohorts.
#[derive(Debug, Default)]
pub(super) struct Order {
    cohorts: Vec<Cohort>,
    vacant: Vec<CohortKey>,
    /// The one touched last at the end.
    open: Vec<CohortKey>,
    /// The others, by the worth of their first.
    trees: [BTreeMap<Rank, CohortKey>; 2],
}

impl Order {
    fn cohort(&self, key: CohortKey) -> &Cohort {
        &self.cohorts[key.0 as usize]
    }

    fn cohort_mut(&mut self, key: CohortKey) -> &mut Cohort {
        &mut self.cohorts[key.0 as usize]
    }

    /// The demand and the forecast of a cohort's tensors.
    pub(super) fn history(&self, key: CohortKey) -> (f64, f64) {
        let cohort = self.cohort(key);
        (cohort.demand, cohort.expected)
    }

    /// Counts one more tensor with this history, and gives its cohort.
    pub(super) fn join(&mut self, demand: f64, expected: f64) -> CohortKey {
        let same = |key: &&CohortKey| self.history(**key) == (demand, expected);
        if let Some(&key) = self.open.iter().rev().find(same) {
            self.cohort_mut(key).members += 1;
            return key;
        }
        let key = self.vacant.pop().unwrap_or(CohortKey(self.cohorts.len() as u32));
        if key.0 as usize == self.cohorts.len() {
            self.cohorts.push(Cohort::default());
        }
        let cohort = self.cohort_mut(key);
        (cohort.demand, cohort.expected, cohort.members) = (demand, expected, 1);
        self.touch(key);
        key
    }

    /// One tensor less; it must not be listed.
    pub(super) fn leave(&mut self, key: CohortKey) {
        let cohort = self.cohort_mut(key);
        cohort.members -= 1;
        if cohort.members == 0 {
            debug_assert!(cohort.rows.iter().all(|row| row.0.is_empty()));
            self.unlist(key);
            self.open.retain(|&open| open != key);
            self.vacant.push(key);
        }
    }

    /// Puts a tensor of the cohort into one of its rows.
    pub(super) fn insert(&mut self, key: CohortKey, side: Side, value: f64, tensor: TensorKey) {
        self.touch(key);
        self.cohort_mut(key).rows[side as usize].insert(Rank::new(value, tensor, side));
    }

    /// Takes a tensor of the cohort out of a row; no effect if it is not there.
    pub(super) fn remove(&mut self, key: CohortKey, side: Side, value: f64, tensor: TensorKey) {
        self.touch(key);
        self.cohort_mut(key).rows[side as usize].remove(Rank::new(value, tensor, side));
    }

    /// Opens a cohort, and closes the one that was not touched for longest if there are too many open.
    fn touch(&mut self, key: CohortKey) {
        if self.open.last() == Some(&key) {
            return;
        }
        if let Some(index) = self.open.iter().position(|&open| open == key) {
            self.open.remove(index);
        } else {
            self.unlist(key);
            if self.open.len() == OPEN {
                let oldest = self.open.remove(0);
                for side in SIDES {
                    if let Some(rank) = self.cohort(oldest).rank(side, 0) {
                        self.cohort_mut(oldest).listed[side as usize] = Some(rank);
                        self.trees[side as usize].insert(rank, oldest);
                    }
                }
            }
        }
        self.open.push(key);
    }

    fn unlist(&mut self, key: CohortKey) {
        for side in SIDES {
            if let Some(rank) = self.cohort_mut(key).listed[side as usize].take() {
                self.trees[side as usize].remove(&rank);
            }
        }
    }

    /// The tensors of one side: idle ones in ascending order of worth, absent ones in descending order. Of equal worth
    /// the lower key comes first among idle ones, the higher among absent ones (where the sum rounds different values of
    /// one cohort to one worth, the values decide first).
    pub(super) fn iter(&self, side: Side) -> Merge<'_> {
        let head = |&key: &CohortKey| Some(Reverse((self.cohort(key).rank(side, 0)?, key, 0)));
        let mut closed = self.trees[side as usize].iter();
        let next = closed.next().map(|(&rank, &key)| (rank, key));
        let heads = self.open.iter().filter_map(head).collect();
        Merge { order: self, side, heads, closed, next, current: None }
    }
}

/// Merges the cohorts' rows.
#[derive(Debug)]
pub(super) struct Merge<'a> {
    order: &'a Order,
    side: Side,
    /// Worth, cohort, and place in its row.
    heads: BinaryHeap<Reverse<(Rank, CohortKey, u32)>>,
    closed: btree_map::Iter<'a, Rank, CohortKey>,
    /// The closed cohort that is not among the heads yet.
    next: Option<(Rank, CohortKey)>,
    /// What comes now if it is before all heads and the next closed cohort.
    current: Option<(Rank, CohortKey, u32)>,
}

impl Merge<'_> {
    /// The first of all heads.
    fn first(&mut self) -> Option<(Rank, CohortKey, u32)> {
        if let Some((rank, key)) = self.next
            && self.heads.peek().is_none_or(|&Reverse((first, ..))| rank < first)
        {
            self.next = self.closed.next().map(|(&rank, &key)| (rank, key));
            return Some((rank, key, 0));
        }
        self.heads.pop().map(|Reverse(head)| head)
    }
}

impl Iterator for Merge<'_> {
    type Item = TensorKey;

    fn next(&mut self) -> Option<TensorKey> {
        let (rank, key, index) = match self.current.take() {
            Some(current) => current,
            None => self.first()?,
        };
        if let Some(following) = self.order.cohort(key).rank(self.side, index + 1) {
            // Mostly it is the next again: the tensors of one model stand together.
            if self.heads.peek().is_none_or(|&Reverse((first, ..))| following < first)
                && self.next.is_none_or(|(first, _)| following < first)
            {
                self.current = Some((following, key, index + 1));
            } else {
                self.heads.push(Reverse((following, key, index + 1)));
            }
        }
        Some(rank.tensor(self.side))
    }
}
