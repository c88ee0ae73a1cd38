//! Where to put tensors in a contiguous segment, and which residents to move for it: Partitioned-Gain Packing, the
//! published algorithm (Tangram, arXiv 2512.01357, section on fragmentation) and the baselines it was compared with.
//!
//! The free bytes of a segment lie in *holes* between resident extents. A tensor that fits no hole needs several of
//! them merged, which costs the resident bytes in between: they slide toward the low end. Leased extents never move;
//! they are walls, and only holes of one *compartment* (the space between two walls) can be merged. So a plan is a
//! set of spans of neighbouring holes to merge, and an assignment of the tensors to spans; it is good if it moves
//! little.
//! - [`Strategy::Published`] starts with one span over everything and cuts it where most resident bytes lie, as long
//!   as the tensors can be shared out to both sides.
//! - [`Strategy::PartitionedGain`] moves nothing where best fit needs no move. Else it takes the cheapest of the
//!   published plan, the greedy window, the published descent with more ways to share out, the better one of these
//!   with its spans cut further, and an evacuation (residents move into holes elsewhere instead of aside). As the
//!   published plan is among them, it never moves more than that; as it falls back on moving everything, it finds
//!   room wherever that does. The searches beyond the published one are bounded by a count of steps.
//!
//! Pure, and it allocates only while its buffers grow. It moves no bytes and knows no tensors: the caller carries out
//! the moves one after the other in the given order, then fills the placements.

mod evacuate;
mod fit;
mod layout;
mod plan;
mod split;
mod window;

#[cfg(test)]
mod tests;

use evacuate::Evacuation;
use fit::BestFit;
use layout::{Demand, Layout};
use plan::{Budget, Plan};
use split::{ShareOut, Splitter};
use window::Windows;

/// A resident extent of the segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte, counted from the start of the segment; a multiple of the alignment.
    pub offset: u64,
    /// Bytes. The rest of the last alignment unit belongs to the extent too.
    pub len: u64,
    /// Whether nobody holds a lease on it. An extent that is not movable stays where it is.
    pub movable: bool,
}

/// A resident extent to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// Its offset before, in bytes.
    pub from: u64,
    /// Its offset after, in bytes. If the two ranges overlap, it is less than `from`: a copy from the low end upward,
    /// or `memmove`, does it.
    pub to: u64,
    /// Bytes to copy.
    pub len: u64,
}

/// What to do with a segment so that all tensors asked for have their place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Packing {
    /// To be carried out one after the other, in this order, before anything is written to the placements: each goes
    /// to bytes that are free by then. An extent can be moved twice; `from` is where it is by then.
    pub moves: Vec<Move>,
    /// For every tensor asked for, once: its index among the sizes, and its offset in bytes.
    pub placements: Vec<(usize, u64)>,
    /// Sum of the lengths of all moves.
    pub moved_bytes: u64,
}

/// How to make room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// The one to use: see the head of this module.
    PartitionedGain,
    /// Partitioned-Gain Packing as published, walls being cuts that it has to make.
    Published,
    /// Slide everything to the low end of its compartment, then best fit.
    MoveEverything,
    /// Per tensor, largest first: the first hole that fits, else the span of holes with the fewest resident bytes.
    GreedyWindow,
    /// Maximum matchings of tensors to holes with the least space left over, as long as there are any; the remaining
    /// tensors by [`Strategy::GreedyWindow`].
    BestFitThenGreedy,
}

/// Plans for one segment; holds the buffers between plans.
#[derive(Debug)]
pub struct Packer {
    len: u64,
    alignment: u64,
    layout: Layout,
    demand: Demand,
    fit: BestFit,
    splitter: Splitter,
    windows: Windows,
    evacuation: Evacuation,
    /// Free bytes per hole that a search works on.
    capacity: Vec<u64>,
    /// Tensors per size that a search still has to place.
    wanted: Vec<u32>,
    /// What needs no moves, as far as it goes.
    unmoved: Plan,
    best: Plan,
    trial: Plan,
    packing: Packing,
}

/// Steps that the published search and those beyond it may take together; it is not cut short itself. That keeps the
/// planning time under 100 microseconds with 2,000 residents and about a hundred holes.
const STEPS: usize = 12_000;

impl Packer {
    /// For a segment of `len` bytes in which every extent starts at a multiple of `alignment` bytes, a power of two.
    pub fn new(len: u64, alignment: u64) -> Self {
        debug_assert!(alignment.is_power_of_two());
        let alignment = alignment.checked_next_power_of_two().unwrap_or(1);
        Self {
            len: len - len % alignment,
            alignment,
            layout: Layout::default(),
            demand: Demand::default(),
            fit: BestFit::default(),
            splitter: Splitter::default(),
            windows: Windows::default(),
            evacuation: Evacuation::default(),
            capacity: Vec::new(),
            wanted: Vec::new(),
            unmoved: Plan::default(),
            best: Plan::default(),
            trial: Plan::default(),
            packing: Packing::default(),
        }
    }

    /// Plans the placement of tensors of `sizes` bytes among `residents`, which are in address order and disjoint,
    /// each with its offset aligned and inside the segment (else: panics in debug builds, `None` in release builds).
    ///
    /// `None` if there is no room even after all compartments are compacted. Without walls that is exact. With walls
    /// it is a question of packing several bins, for which best fit, first fit and repeated division in two are
    /// tried: a fit with hardly a byte to spare can be missed.
    pub fn pack(&mut self, strategy: Strategy, residents: &[Extent], sizes: &[u64]) -> Option<&Packing> {
        let readable = self.layout.read(self.len, self.alignment, residents);
        debug_assert!(readable, "residents overlap, are out of order or not aligned");
        if !readable || !self.demand.read(self.len, self.alignment, sizes) {
            return None;
        }
        if self.demand.bytes > self.layout.free {
            return None;
        }
        let found = match strategy {
            Strategy::PartitionedGain => return self.partitioned_gain(residents),
            Strategy::Published => self.published(&mut Budget::unlimited()),
            Strategy::MoveEverything => self.move_everything(),
            Strategy::GreedyWindow => self.greedy_window(),
            Strategy::BestFitThenGreedy => self.best_fit_then_greedy(),
        };
        if found { Some(self.emit_trial(residents)) } else { None }
    }

    fn emit_trial(&mut self, residents: &[Extent]) -> &Packing {
        plan::emit(&mut self.trial, &self.layout, &mut self.demand, residents, &mut self.packing);
        &self.packing
    }

    /// Starts a new trial with all holes empty and all tensors to place.
    fn reset(&mut self) {
        self.trial.reset(self.layout.holes.len());
        self.capacity.clear();
        self.capacity.extend(self.layout.holes.iter().map(|hole| hole.len));
        self.wanted.clear();
        self.wanted.extend(self.demand.runs.iter().map(|run| run.count));
    }

    /// Descends from one span over all holes; leaves the result in `trial`.
    fn descend(&mut self, share_out: ShareOut, budget: &mut Budget) -> bool {
        self.splitter.clear();
        self.splitter.push_all(&self.layout, &self.demand, &self.wanted);
        self.split(share_out, budget)
    }

    fn published(&mut self, budget: &mut Budget) -> bool {
        self.reset();
        self.splitter.prepare(&self.layout);
        self.descend(ShareOut::Level, budget)
    }

    fn move_everything(&mut self) -> bool {
        self.reset();
        self.trial.merge_everything(&self.layout);
        self.fit.compartments(&self.layout, &self.demand, &mut self.wanted, &mut self.trial)
    }

    fn greedy_window(&mut self) -> bool {
        self.reset();
        self.open_windows(&mut Budget::unlimited())
    }

    fn best_fit_then_greedy(&mut self) -> bool {
        self.reset();
        self.fit.load(&self.capacity);
        self.fit.matchings(&self.demand, &mut self.wanted, &mut self.trial);
        self.fit.store(&mut self.capacity);
        self.open_windows(&mut Budget::unlimited())
    }

    fn partitioned_gain(&mut self, residents: &[Extent]) -> Option<&Packing> {
        self.reset();
        self.fit.load(&self.capacity);
        if self.fit.place(&self.demand, &mut self.wanted, &mut self.trial) {
            return Some(self.emit_trial(residents));
        }
        std::mem::swap(&mut self.trial, &mut self.unmoved);

        let mut budget = Budget::unlimited();
        let published = self.published(&mut budget);
        if published || self.move_everything() {
            self.keep(&mut budget);
        }
        if published {
            budget.steps = STEPS.saturating_sub(usize::MAX - budget.steps);
            self.try_windows(&mut budget);
            self.reset();
            if self.descend(ShareOut::Any, &mut budget) {
                self.keep(&mut budget);
            }
            self.refine(&mut budget);
        } else {
            // Walls have defeated the descent, but it can go on from how the compartments share out the tensors.
            budget.steps = STEPS;
            self.refine(&mut budget);
            self.try_windows(&mut budget);
        }
        let found = budget.bytes < u64::MAX;
        if budget.bytes > 0 && budget.spend(residents.len()) {
            self.evacuation.start(&self.layout, residents, &self.demand, &self.unmoved);
            if self.evacuation.run(&self.demand, &mut budget) {
                return Some(&self.evacuation.packing);
            }
        }
        if !found {
            return None;
        }
        std::mem::swap(&mut self.best, &mut self.trial);
        Some(self.emit_trial(residents))
    }

    fn try_windows(&mut self, budget: &mut Budget) {
        self.reset();
        if self.open_windows(budget) {
            self.keep(budget);
        }
    }

    /// Cuts the spans of the best plan so far, if there is one, further wherever their tensors can be shared out.
    fn refine(&mut self, budget: &mut Budget) {
        if budget.bytes < u64::MAX {
            self.reset();
            self.splitter.clear();
            self.splitter.push_spans(&mut self.best, &self.demand);
            if self.split(ShareOut::Any, budget) {
                self.keep(budget);
            }
        }
    }

    /// The trial is the best plan so far; later ones have to move less than that.
    fn keep(&mut self, budget: &mut Budget) {
        budget.bytes = self.trial.moved_bytes;
        std::mem::swap(&mut self.best, &mut self.trial);
    }

    /// Goes on from the spans that the splitter was given.
    fn split(&mut self, share_out: ShareOut, budget: &mut Budget) -> bool {
        self.splitter.run(&self.layout, &self.capacity, share_out, budget, &mut self.trial)
    }

    /// Places what is wanted, merging the cheapest window wherever nothing fits.
    fn open_windows(&mut self, budget: &mut Budget) -> bool {
        self.windows.run(&self.layout, &self.demand, &self.capacity, &self.wanted, budget, &mut self.trial)
    }
}
