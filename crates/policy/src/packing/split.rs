//! The descent of Partitioned-Gain Packing: spans of holes, cut in two wherever that saves the most resident bytes and
//! the tensors of the span can be shared out to the two sides.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;

use super::layout::{Demand, Layout, Run, WALL};
use super::plan::{Budget, Plan};

/// How the tensors of a span are shared out to the two sides of a cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ShareOut {
    /// As published: each tensor, largest first, to the side with more room left.
    Level,
    /// That, else the left side filled first, else the right side.
    Any,
}

/// `count` tensors of run `run`, which take `size` bytes each.
#[derive(Clone, Copy, Debug)]
struct Part {
    size: u64,
    run: u32,
    count: u32,
}

/// The holes `first..=last` and the tensors that they have to take together.
#[derive(Clone, Debug)]
struct Span {
    first: usize,
    last: usize,
    parts: Range<usize>,
    /// A cut above all cuts of the span in the tree of cuts.
    top: u32,
}

const NONE: u32 = u32::MAX;

/// Spans still to be cut, and the cuts (numbered like the hole before them) in a Cartesian tree: in address order from
/// left to right, each with at least as many resident bytes as those below it, so that the best cut of any range is
/// found from any cut above it.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    left: Vec<u32>,
    right: Vec<u32>,
    root: u32,
    /// Per hole: free bytes of all holes before it; one more at the end.
    free_before: Vec<u64>,
    spans: Vec<Span>,
    parts: Vec<Part>,
    /// Of the parts of the present span: how many tensors go to the left.
    to_left: Vec<u32>,
    /// Cuts to try next: resident bytes, cut.
    cuts: BinaryHeap<(u64, Reverse<u32>)>,
    path: Vec<u32>,
}

impl Splitter {
    /// Builds the tree of cuts.
    pub(super) fn prepare(&mut self, layout: &Layout) {
        let cuts = layout.holes.len().saturating_sub(1);
        self.left.clear();
        self.left.resize(cuts, NONE);
        self.right.clear();
        self.right.resize(cuts, NONE);
        self.path.clear();
        for cut in 0..cuts {
            let mut below = NONE;
            while let Some(&above) = self.path.last()
                && layout.gaps[above as usize] < layout.gaps[cut]
            {
                below = above;
                self.path.pop();
            }
            self.left[cut] = below;
            if let Some(&above) = self.path.last() {
                self.right[above as usize] = cut as u32;
            }
            self.path.push(cut as u32);
        }
        self.root = self.path.first().copied().unwrap_or(NONE);
    }

    /// Forgets the spans of the last descent.
    pub(super) fn clear(&mut self) {
        self.spans.clear();
        self.parts.clear();
    }

    /// One span over all holes, with all that is `wanted`.
    pub(super) fn push_all(&mut self, layout: &Layout, demand: &Demand, wanted: &[u32]) {
        let parts = self.parts.len();
        for (run, (&Run { size, .. }, &count)) in (0..).zip(demand.runs.iter().zip(wanted)) {
            if count > 0 {
                self.parts.push(Part { size, run, count });
            }
        }
        let last = layout.holes.len().saturating_sub(1);
        self.spans.push(Span { first: 0, last, parts: parts..self.parts.len(), top: self.root });
    }

    /// The spans of a plan that have tensors.
    pub(super) fn push_spans(&mut self, plan: &mut Plan, demand: &Demand) {
        plan.find_heads();
        let head = &plan.head;
        plan.assigned.sort_unstable_by_key(|assigned| (head[assigned.hole as usize], assigned.run));
        for of_span in plan.assigned.chunk_by(|a, b| head[a.hole as usize] == head[b.hole as usize]) {
            let parts = self.parts.len();
            for of_run in of_span.chunk_by(|a, b| a.run == b.run) {
                let count = of_run.iter().map(|assigned| assigned.count).sum();
                self.parts.push(Part {
                    size: demand.runs[of_run[0].run as usize].size,
                    run: of_run[0].run,
                    count,
                });
            }
            let first = head[of_span[0].hole as usize] as usize;
            let last = plan.span_end(first);
            self.spans.push(Span { first, last, parts: parts..self.parts.len(), top: self.root });
        }
    }

    /// Cuts the spans for as long as there is a cut that the tensors allow, and adds the outcome to `plan`. False if a
    /// span with a wall in it is left, or if that moves as many bytes as the budget says. Out of steps, spans stay whole.
    pub(super) fn run(
        &mut self,
        layout: &Layout,
        capacity: &[u64],
        share_out: ShareOut,
        budget: &mut Budget,
        plan: &mut Plan,
    ) -> bool {
        self.free_before.clear();
        self.free_before.push(0);
        let mut free = 0;
        self.free_before.extend(capacity.iter().map(|bytes| {
            free += bytes;
            free
        }));
        while let Some(span) = self.spans.pop() {
            let one_hole = span.first == span.last;
            if !one_hole && let Some(cut) = self.best_cut(&span, layout, share_out, budget) {
                self.divide(&span, cut);
                continue;
            }
            if !plan.merge(layout, span.first, span.last) || plan.moved_bytes >= budget.bytes {
                return false;
            }
            for part in &self.parts[span.parts] {
                plan.assign(span.first, part.run as usize, part.count);
            }
        }
        true
    }

    /// The cut with the most resident bytes that the tensors allow; leaves their division in `to_left`.
    fn best_cut(
        &mut self,
        span: &Span,
        layout: &Layout,
        share_out: ShareOut,
        budget: &mut Budget,
    ) -> Option<usize> {
        self.cuts.clear();
        self.push_cut(span.top, span, layout);
        let mut walled = false;
        while let Some((bytes, Reverse(cut))) = self.cuts.pop() {
            // Walls come first, and a span that has some must be cut at one of them.
            if walled && bytes != WALL {
                return None;
            }
            walled = bytes == WALL;
            let at = cut as usize;
            let middle = self.free_before[at + 1];
            let (left, right) =
                (middle - self.free_before[span.first], self.free_before[span.last + 1] - middle);
            let parts = &self.parts[span.parts.clone()];
            let to_left = &mut self.to_left;
            if !budget.spend(4 + 2 * parts.len()) {
                return None;
            }
            let allowed = level(parts, left, right, to_left)
                || share_out == ShareOut::Any
                    && (fill(parts, left, right, to_left) || {
                        let allowed = fill(parts, right, left, to_left);
                        for (to_left, part) in to_left.iter_mut().zip(parts) {
                            *to_left = part.count - *to_left;
                        }
                        allowed
                    });
            if allowed {
                return Some(at);
            }
            self.push_cut(self.left[at], span, layout);
            self.push_cut(self.right[at], span, layout);
        }
        None
    }

    /// Adds the best cut inside the span at or below `cut`, if there is one.
    fn push_cut(&mut self, mut cut: u32, span: &Span, layout: &Layout) {
        while cut != NONE {
            let at = cut as usize;
            if at < span.first {
                cut = self.right[at];
            } else if at >= span.last {
                cut = self.left[at];
            } else {
                self.cuts.push((layout.gaps[at], Reverse(cut)));
                return;
            }
        }
    }

    /// Replaces a span by those left and right of the cut, as far as they have tensors.
    fn divide(&mut self, span: &Span, cut: usize) {
        for left in [true, false] {
            let parts = self.parts.len();
            for (index, &to_left) in span.parts.clone().zip(&self.to_left) {
                let Part { size, run, count } = self.parts[index];
                let count = if left { to_left } else { count - to_left };
                if count > 0 {
                    self.parts.push(Part { size, run, count });
                }
            }
            if self.parts.len() > parts {
                let (first, last) = if left { (span.first, cut) } else { (cut + 1, span.last) };
                self.spans.push(Span { first, last, parts: parts..self.parts.len(), top: span.top });
            }
        }
    }
}

/// Each tensor, largest first, to the side with more room left, the left if both have the same; false if one fits
/// neither. A run at a time: first the larger side takes what levels the two, then they take turns.
fn level(parts: &[Part], mut left: u64, mut right: u64, to_left: &mut Vec<u32>) -> bool {
    to_left.clear();
    for part in parts {
        let (size, count) = (part.size, u64::from(part.count));
        let left_first = left >= right;
        let (more, less) = if left_first { (&mut left, &mut right) } else { (&mut right, &mut left) };
        let mut to_more = if count == 1 {
            1
        } else if left_first {
            ((*more - *less) / size + 1).min(count)
        } else {
            (*more - *less).div_ceil(size).min(count)
        };
        let rest = count - to_more;
        let to_less = rest.div_ceil(2);
        to_more += rest / 2;
        let room = |free: u64, count: u64| size.checked_mul(count).and_then(|bytes| free.checked_sub(bytes));
        let (Some(more_left), Some(less_left)) = (room(*more, to_more), room(*less, to_less)) else {
            return false;
        };
        (*more, *less) = (more_left, less_left);
        to_left.push(if left_first { to_more } else { to_less } as u32);
    }
    true
}

/// Each tensor, largest first, to the first side if it fits there, else to the second. `to_first` has what goes to
/// the first side; unfinished if the answer is no.
fn fill(parts: &[Part], mut first: u64, mut second: u64, to_first: &mut Vec<u32>) -> bool {
    to_first.clear();
    for part in parts {
        let (size, count) = (part.size, u64::from(part.count));
        let fits = (first / size).min(count);
        first -= fits * size;
        match ((count - fits).checked_mul(size)).and_then(|bytes| second.checked_sub(bytes)) {
            Some(rest) => second = rest,
            None => return false,
        }
        to_first.push(fits as u32);
    }
    true
}
