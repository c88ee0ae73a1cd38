//! Evacuation: room for a tensor by moving the residents of one window into holes elsewhere that fit them.
//!
//! Merging holes moves all that lies between them. Evacuating moves only what lies in a window of the tensor's own
//! length, if other holes take it: where models come and go, a resident often has just the size of one that went.
//! What no hole takes is slid aside inside the window, so that merging is the case in which nothing fits elsewhere.

use super::layout::{Demand, Layout, footprint};
use super::plan::{Budget, Plan};
use super::{Extent, Move, Packing};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Hole,
    /// A resident, with its bytes.
    Resident(u64),
    /// A tensor that is to be placed, with its index: moving it costs nothing, as it is not there yet.
    Tensor(u32),
    Wall,
}

/// A piece of the segment, linked to its neighbours.
#[derive(Clone, Copy, Debug)]
struct Block {
    offset: u64,
    len: u64,
    kind: Kind,
    before: u32,
    after: u32,
    /// The last walk that came by.
    walk: u32,
}

/// What a block costs a walk.
const STEPS_PER_BLOCK: usize = 8;

/// The wall before the first block, and after the last.
const ENDS: u32 = 0;

/// The segment as it is after the moves planned so far.
#[derive(Debug, Default)]
pub(super) struct Evacuation {
    blocks: Vec<Block>,
    /// Length and block of every hole, ascending.
    holes: Vec<(u64, u32)>,
    /// Per hole of the layout: its block, which is another kind of block once it is full.
    of_hole: Vec<u32>,
    /// Per run: tensors that need no moves.
    placed: Vec<u32>,
    /// Of the present walk: who leaves the window, and for which hole.
    leaving: Vec<(u32, u32)>,
    walk: u32,
    pub(super) packing: Packing,
}

impl Evacuation {
    /// Lays out the segment with the tensors that `plan`, in which nothing is merged, places.
    pub(super) fn start(&mut self, layout: &Layout, residents: &[Extent], demand: &Demand, plan: &Plan) {
        self.blocks.clear();
        self.of_hole.clear();
        self.walk = 0;
        self.push(0, 0, Kind::Wall);
        let mut holes = layout.holes.iter().peekable();
        for index in 0..=residents.len() {
            if let Some(hole) = holes.next_if(|hole| hole.next == index) {
                // Marks of no length have no block.
                self.of_hole.push(if hole.len > 0 { self.blocks.len() as u32 } else { ENDS });
                if hole.len > 0 {
                    self.push(hole.offset, hole.len, Kind::Hole);
                }
            }
            if let Some(resident) = residents.get(index) {
                let kind = if resident.movable { Kind::Resident(resident.len) } else { Kind::Wall };
                let len = footprint(resident.len, layout.alignment).unwrap_or(resident.len);
                self.push(resident.offset, len, kind);
            }
        }
        let last = self.blocks.len() - 1;
        self.blocks[ENDS as usize].before = last as u32;
        self.blocks[last].after = ENDS;

        self.placed.clear();
        self.placed.resize(demand.runs.len(), 0);
        for assignment in &plan.assigned {
            let (hole, run) = (self.of_hole[assignment.hole as usize], assignment.run as usize);
            for _ in 0..assignment.count {
                let (size, tensor) = demand.order[(demand.runs[run].next + self.placed[run]) as usize];
                self.carve(hole, size, Kind::Tensor(tensor));
                self.placed[run] += 1;
            }
        }
        self.holes.clear();
        let holes = self.of_hole.iter().map(|&hole| (&self.blocks[hole as usize], hole));
        let holes =
            holes.filter(|(block, _)| block.kind == Kind::Hole).map(|(block, hole)| (block.len, hole));
        self.holes.extend(holes);
        self.holes.sort_unstable();
    }

    /// Finds room for the tensors that [`Evacuation::start`] did not place; the outcome is in `packing`. False if there
    /// is none for one of them, or past the budget.
    pub(super) fn run(&mut self, demand: &Demand, budget: &mut Budget) -> bool {
        self.packing.moves.clear();
        self.packing.moved_bytes = 0;
        for index in 0..demand.runs.len() {
            let run = &demand.runs[index];
            for &(size, tensor) in &demand.order[(run.next + self.placed[index]) as usize..]
                [..(run.count - self.placed[index]) as usize]
            {
                let at = self.holes.partition_point(|hole| hole.0 < size);
                let found = match self.holes.get(at) {
                    Some(&(_, hole)) => Some(hole),
                    None => self.make_room(size, budget),
                };
                let Some(hole) = found else { return false };
                self.fill(hole, size, Kind::Tensor(tensor));
            }
        }
        self.packing.placements.clear();
        self.packing.placements.extend(self.blocks.iter().filter_map(|block| match block.kind {
            Kind::Tensor(tensor) => Some((tensor as usize, block.offset)),
            _ => None,
        }));
        true
    }

    fn push(&mut self, offset: u64, len: u64, kind: Kind) {
        let index = self.blocks.len() as u32;
        let before = index.saturating_sub(1);
        self.blocks.push(Block { offset, len, kind, before, after: index + 1, walk: 0 });
    }

    fn forget_hole(&mut self, hole: u32) {
        let key = (self.blocks[hole as usize].len, hole);
        if let Ok(at) = self.holes.binary_search(&key) {
            self.holes.remove(at);
        }
    }

    fn note_hole(&mut self, hole: u32) {
        let key = (self.blocks[hole as usize].len, hole);
        let at = self.holes.partition_point(|&other| other < key);
        self.holes.insert(at, key);
    }

    fn unlink(&mut self, block: u32) {
        let Block { before, after, .. } = self.blocks[block as usize];
        self.blocks[before as usize].after = after;
        self.blocks[after as usize].before = before;
    }

    /// Puts something at the low end of a hole.
    fn fill(&mut self, hole: u32, len: u64, kind: Kind) {
        self.forget_hole(hole);
        if self.carve(hole, len, kind) {
            self.note_hole(hole);
        }
    }

    /// That, for a hole that is not among the holes; whether anything is left of it.
    fn carve(&mut self, hole: u32, len: u64, kind: Kind) -> bool {
        let Block { offset, len: free, before, .. } = self.blocks[hole as usize];
        if free == len {
            self.blocks[hole as usize].kind = kind;
            return false;
        }
        let new = self.blocks.len() as u32;
        self.blocks.push(Block { offset, len, kind, before, after: hole, walk: 0 });
        self.blocks[before as usize].after = new;
        let rest = &mut self.blocks[hole as usize];
        (rest.before, rest.offset, rest.len) = (new, offset + len, free - len);
        true
    }

    /// Makes a hole of at least `size` bytes by moving as few as it can see.
    fn make_room(&mut self, size: u64, budget: &mut Budget) -> Option<u32> {
        let limit = budget.bytes.checked_sub(self.packing.moved_bytes)?;
        let mut best = limit;
        let mut window = None;
        for at in (0..self.holes.len()).rev() {
            let (_, hole) = self.holes[at];
            for upward in [true, false] {
                if let Some((bytes, _)) = self.walk(hole, upward, size, best, budget) {
                    (best, window) = (bytes, Some((hole, upward)));
                }
            }
            if best == 0 || budget.steps == 0 {
                break;
            }
        }
        let (hole, upward) = window?;
        let (_, last) = self.walk(hole, upward, size, limit, budget)?;
        if upward { self.clear(hole, last) } else { self.clear(last, hole) }
    }

    /// Walks from a hole over its neighbours until the window has room for `size` bytes; resident bytes in it and the
    /// last block. `None` at a wall, and where `limit` bytes or more would have to be moved.
    fn walk(
        &mut self,
        hole: u32,
        upward: bool,
        size: u64,
        limit: u64,
        budget: &mut Budget,
    ) -> Option<(u64, u32)> {
        self.walk += 1;
        self.leaving.clear();
        let (mut room, mut bytes) = (0, 0);
        let mut at = hole;
        loop {
            if !budget.spend(STEPS_PER_BLOCK) {
                return None;
            }
            let block = &mut self.blocks[at as usize];
            let taken = std::mem::replace(&mut block.walk, self.walk) == self.walk;
            let (len, after) = (block.len, if upward { block.after } else { block.before });
            match block.kind {
                Kind::Wall => return None,
                // Somebody who leaves the window has moved in.
                Kind::Hole if taken => return None,
                Kind::Hole => room += len,
                Kind::Resident(_) | Kind::Tensor(_) => {
                    if let Kind::Resident(len) = block.kind {
                        bytes += len;
                    }
                    if bytes >= limit {
                        return None;
                    }
                    if let Some(hole) = self.elsewhere(len) {
                        self.blocks[hole as usize].walk = self.walk;
                        self.leaving.push((at, hole));
                        room += len;
                    }
                }
            }
            if room >= size {
                return Some((bytes, at));
            }
            at = after;
        }
    }

    /// The tightest hole for `len` bytes that is not in the window, nor spoken for.
    fn elsewhere(&self, len: u64) -> Option<u32> {
        let at = self.holes.partition_point(|hole| hole.0 < len);
        self.holes[at..]
            .iter()
            .map(|&(_, hole)| hole)
            .find(|&hole| self.blocks[hole as usize].walk != self.walk)
    }

    /// Carries out the last walk, over the blocks `first..=last`; the hole that it leaves.
    fn clear(&mut self, first: u32, last: u32) -> Option<u32> {
        for index in 0..self.leaving.len() {
            let (leaver, hole) = self.leaving[index];
            let Block { offset, len, kind, .. } = self.blocks[leaver as usize];
            self.record(kind, offset, self.blocks[hole as usize].offset);
            self.fill(hole, len, kind);
            // Not among the holes yet: the window becomes one hole below.
            self.blocks[leaver as usize].kind = Kind::Hole;
        }
        let (mut to, end) = {
            let (first, last) = (&self.blocks[first as usize], &self.blocks[last as usize]);
            (first.offset, last.offset + last.len)
        };
        let outside = self.blocks[last as usize].after;
        let mut at = first;
        while at != outside {
            let Block { offset, len, kind, after, .. } = self.blocks[at as usize];
            if kind == Kind::Hole {
                self.forget_hole(at);
                self.unlink(at);
            } else {
                self.record(kind, offset, to);
                self.blocks[at as usize].offset = to;
                to += len;
            }
            at = after;
        }
        // One hole at the high end, joined with the holes that it touches.
        let (mut from, mut until) = (to, end);
        let (mut before, mut after) = (self.blocks[outside as usize].before, outside);
        if self.blocks[before as usize].kind == Kind::Hole {
            from = self.blocks[before as usize].offset;
            self.forget_hole(before);
            before = self.blocks[before as usize].before;
        }
        if self.blocks[after as usize].kind == Kind::Hole {
            until += self.blocks[after as usize].len;
            self.forget_hole(after);
            after = self.blocks[after as usize].after;
        }
        let hole = self.blocks.len() as u32;
        let walk = 0;
        self.blocks.push(Block { offset: from, len: until - from, kind: Kind::Hole, before, after, walk });
        self.blocks[before as usize].after = hole;
        self.blocks[after as usize].before = hole;
        self.note_hole(hole);
        Some(hole)
    }

    fn record(&mut self, kind: Kind, from: u64, to: u64) {
        if let Kind::Resident(len) = kind
            && from != to
        {
            self.packing.moves.push(Move { from, to, len });
            self.packing.moved_bytes += len;
        }
    }
}
