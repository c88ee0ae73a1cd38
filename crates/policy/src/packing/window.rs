//! Greedy window: for one tensor after the other, the cheapest span of neighbouring holes that is large enough.

use super::layout::{Demand, Layout, WALL};
use super::plan::{Budget, Plan};

/// A hole, or several that are merged already.
#[derive(Clone, Copy, Debug)]
struct Span {
    /// Its first hole.
    hole: usize,
    /// Its last hole.
    last: usize,
    free: u64,
}

/// The spans, as merged so far, in address order.
#[derive(Debug, Default)]
pub(super) struct Windows {
    spans: Vec<Span>,
}

impl Windows {
    /// Places what is `wanted` into holes with `capacity` bytes free each. False if a tensor fits no compartment, or
    /// past the budget.
    pub(super) fn run(
        &mut self,
        layout: &Layout,
        demand: &Demand,
        capacity: &[u64],
        wanted: &[u32],
        budget: &mut Budget,
        plan: &mut Plan,
    ) -> bool {
        self.spans.clear();
        self.spans.extend(capacity.iter().enumerate().map(|(hole, &free)| Span { hole, last: hole, free }));
        for (index, (run, &wanted)) in demand.runs.iter().zip(wanted).enumerate() {
            // Spans before `from` have no room for this size, and get none.
            let mut from = 0;
            if !budget.spend(self.spans.len() / 2) {
                return false;
            }
            for _ in 0..wanted {
                let fits = self.spans[from..].iter().position(|span| span.free >= run.size);
                let at = match fits {
                    Some(at) => Some(from + at),
                    None if budget.spend(self.spans.len()) => self.merge_cheapest(layout, run.size, plan),
                    None => None,
                };
                let Some(at) = at else { return false };
                if plan.moved_bytes >= budget.bytes {
                    return false;
                }
                from = at;
                self.spans[at].free -= run.size;
                plan.assign(self.spans[at].hole, index, 1);
            }
        }
        true
    }

    /// Merges the spans with `size` bytes together that have the fewest resident bytes between them.
    fn merge_cheapest(&mut self, layout: &Layout, size: u64, plan: &mut Plan) -> Option<usize> {
        let mut cheapest: Option<(u64, usize, usize)> = None;
        let (mut first, mut free, mut between) = (0, 0, 0);
        for (last, span) in self.spans.iter().enumerate() {
            free += span.free;
            while free - self.spans[first].free >= size {
                free -= self.spans[first].free;
                between -= layout.gaps[self.spans[first].last];
                first += 1;
            }
            if free >= size && cheapest.is_none_or(|(bytes, ..)| between < bytes) {
                cheapest = Some((between, first, last));
            }
            match layout.gaps[span.last] {
                WALL => (first, free, between) = (last + 1, 0, 0),
                gap => between += gap,
            }
        }
        let (_, first, last) = cheapest?;
        let (hole, end) = (self.spans[first].hole, self.spans[last].last);
        plan.merge(layout, hole, end);
        self.spans[first].last = end;
        self.spans[first].free = self.spans[first..=last].iter().map(|span| span.free).sum();
        self.spans.drain(first + 1..=last);
        Some(first)
    }
}
