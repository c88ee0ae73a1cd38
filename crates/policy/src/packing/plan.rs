//! A plan while it is searched for, and how it becomes moves and offsets.

use super::layout::{Demand, Layout, WALL, footprint};
use super::{Extent, Move, Packing};

/// `count` tensors of run `run` go to the span that hole `hole` is in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Assignment {
    pub(super) hole: u32,
    pub(super) run: u32,
    pub(super) count: u32,
}

/// How far a search may go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Budget {
    /// It gives up where a plan moves this many bytes, or more.
    pub(super) bytes: u64,
    /// Units of work left, of about two nanoseconds; counted rather than timed, so that plans can be replayed.
    pub(super) steps: usize,
}

impl Budget {
    /// As far as it takes.
    pub(super) fn unlimited() -> Self {
        Self { bytes: u64::MAX, steps: usize::MAX }
    }

    /// Takes steps off; false if there are not enough left.
    pub(super) fn spend(&mut self, steps: usize) -> bool {
        let enough = steps <= self.steps;
        self.steps = self.steps.saturating_sub(steps);
        enough
    }
}

/// Which neighbouring holes are merged, and which tensors go where.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Per hole: whether it is merged with the next one.
    pub(super) merged: Vec<bool>,
    pub(super) assigned: Vec<Assignment>,
    pub(super) moved_bytes: u64,
    /// Per hole, once computed: the first hole of its span.
    pub(super) head: Vec<u32>,
    /// Per hole, while emitting: where the free bytes of the span that it heads begin.
    free_from: Vec<u64>,
}

impl Plan {
    /// Nothing merged, nothing assigned.
    pub(super) fn reset(&mut self, holes: usize) {
        self.merged.clear();
        self.merged.resize(holes, false);
        self.assigned.clear();
        self.moved_bytes = 0;
    }

    pub(super) fn assign(&mut self, hole: usize, run: usize, count: u32) {
        if count > 0 {
            self.assigned.push(Assignment { hole: hole as u32, run: run as u32, count });
        }
    }

    /// Merges the holes `first..=last`; false if there is a wall between them.
    pub(super) fn merge(&mut self, layout: &Layout, first: usize, last: usize) -> bool {
        for hole in first..last {
            if layout.gaps[hole] == WALL {
                return false;
            }
            if !std::mem::replace(&mut self.merged[hole], true) {
                self.moved_bytes += layout.gaps[hole];
            }
        }
        true
    }

    /// Merges whatever no wall divides.
    pub(super) fn merge_everything(&mut self, layout: &Layout) {
        for hole in 0..layout.holes.len() {
            self.merge(layout, hole, hole + usize::from(layout.gaps[hole] != WALL));
        }
    }

    /// Computes [`Plan::head`].
    pub(super) fn find_heads(&mut self) {
        self.head.clear();
        while self.head.len() < self.merged.len() {
            let first = self.head.len();
            self.head.resize(self.span_end(first) + 1, first as u32);
        }
    }

    /// The last hole of the span that begins with hole `first`.
    pub(super) fn span_end(&self, first: usize) -> usize {
        first + self.merged[first..].iter().take_while(|&&merged| merged).count()
    }
}

/// Writes out the moves and offsets of a plan.
pub(super) fn emit(
    plan: &mut Plan,
    layout: &Layout,
    demand: &mut Demand,
    residents: &[Extent],
    packing: &mut Packing,
) {
    packing.moves.clear();
    packing.placements.clear();
    packing.moved_bytes = plan.moved_bytes;
    plan.find_heads();
    plan.free_from.clear();
    let holes = &layout.holes;
    while plan.free_from.len() < holes.len() {
        let first = plan.free_from.len();
        let last = plan.span_end(first);
        let mut to = holes[first].offset;
        for resident in &residents[holes[first].next..holes[last].next] {
            packing.moves.push(Move { from: resident.offset, to, len: resident.len });
            to += footprint(resident.len, layout.alignment).unwrap_or(resident.len);
        }
        plan.free_from.resize(last + 1, to);
    }
    for assignment in &plan.assigned {
        let free_from = &mut plan.free_from[plan.head[assignment.hole as usize] as usize];
        let run = &mut demand.runs[assignment.run as usize];
        for &(size, index) in &demand.order[run.next as usize..][..assignment.count as usize] {
            packing.placements.push((index as usize, *free_from));
            *free_from += size;
        }
        run.next += assignment.count;
    }
}
