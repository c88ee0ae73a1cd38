//! Which pages evicting everything idle would free, kept up to date extent by extent.
//!
//! Extents are not rounded to pages, so the first and the last page of one may be shared with its neighbours; only
//! those need counting.

use rustc_hash::FxHashMap;

use crate::room::Place;

/// How many extents on the device begin or end in a page, and how many of them are pinned.
#[derive(Clone, Copy, Debug, Default)]
struct Edge {
    resident: u32,
    pinned: u32,
}

impl Edge {
    fn is_idle(self) -> bool {
        self.resident > 0 && self.pinned == 0
    }
}

/// The pages of one arena at which extents begin or end.
#[derive(Debug, Default)]
pub(crate) struct PageAccount {
    edges: FxHashMap<usize, Edge>,
}

impl PageAccount {
    /// Moves the extent of `len` bytes (at least 1) at `offset` from one place to another; `idle_pages` is the number
    /// of pages that evicting everything idle would free.
    pub(crate) fn change(
        &mut self,
        (offset, len, page_bytes): (usize, usize, usize),
        from: Place,
        to: Place,
        idle_pages: &mut usize,
    ) {
        if from == to {
            return;
        }
        let (first, last) = (offset / page_bytes, (offset + len - 1) / page_bytes);
        let inside = last.saturating_sub(first + 1);
        *idle_pages -= if from == Place::Idle { inside } else { 0 };
        *idle_pages += if to == Place::Idle { inside } else { 0 };
        for page in (first..=last).step_by((last - first).max(1)) {
            let edge = self.edges.entry(page).or_default();
            *idle_pages -= usize::from(edge.is_idle());
            edge.resident -= u32::from(from != Place::Absent);
            edge.resident += u32::from(to != Place::Absent);
            edge.pinned -= u32::from(from == Place::Pinned);
            edge.pinned += u32::from(to == Place::Pinned);
            *idle_pages += usize::from(edge.is_idle());
            if edge.resident == 0 {
                self.edges.remove(&page);
            }
        }
    }
}
