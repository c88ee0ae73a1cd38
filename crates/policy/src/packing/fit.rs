//! Placing tensors into holes as they are: best fit, largest first.

use super::layout::{Demand, Layout, WALL};
use super::plan::Plan;

/// Bins by free bytes. A bin is a hole, or a compartment under the number of its first hole.
#[derive(Debug, Default)]
pub(super) struct BestFit {
    /// Free bytes and hole, ascending.
    bins: Vec<(u64, u32)>,
    /// Bins used in the present matching.
    used: Vec<(u64, u32)>,
    /// As many as `bins`, in address order.
    compartments: Vec<(u64, u32)>,
}

impl BestFit {
    /// One bin per hole that has free bytes.
    pub(super) fn load(&mut self, capacity: &[u64]) {
        self.bins.clear();
        self.bins.extend(
            capacity.iter().zip(0..).filter(|&(&free, _)| free > 0).map(|(&free, hole)| (free, hole)),
        );
        self.bins.sort_unstable();
    }

    /// Writes back what is left in each hole.
    pub(super) fn store(&self, capacity: &mut [u64]) {
        for &(free, hole) in &self.bins {
            capacity[hole as usize] = free;
        }
    }

    /// Best fit, largest first. Takes what it places out of `wanted`; returns whether that is all.
    ///
    /// A bin that is the tightest for one tensor of a run is the tightest for the next of the run too while it has
    /// room, so whole runs are placed in one sweep over the bins.
    pub(super) fn place(&mut self, demand: &Demand, wanted: &mut [u32], plan: &mut Plan) -> bool {
        for (index, (run, wanted)) in demand.runs.iter().zip(&mut *wanted).enumerate() {
            let mut at = self.bins.partition_point(|bin| bin.0 < run.size);
            while *wanted > 0 && at < self.bins.len() {
                let (free, hole) = self.bins[at];
                let count = (free / run.size).min(u64::from(*wanted));
                plan.assign(hole as usize, index, count as u32);
                *wanted -= count as u32;
                let rest = (free - count * run.size, hole);
                let to = self.bins[..at].partition_point(|&bin| bin < rest);
                self.bins.copy_within(to..at, to + 1);
                self.bins[to] = rest;
                at += 1;
            }
        }
        wanted.iter().all(|&wanted| wanted == 0)
    }

    /// Matchings of tensors to bins, one tensor per bin, until nothing fits any more.
    ///
    /// Every bin that takes a tensor takes all smaller ones too. So giving each tensor, largest first, the tightest
    /// bin that is still unused yields a matching with the most tensors, and of those the one with the least space
    /// left over: what a maximum-weight bipartite matching would find.
    pub(super) fn matchings(&mut self, demand: &Demand, wanted: &mut [u32], plan: &mut Plan) {
        loop {
            self.used.clear();
            for (index, (run, wanted)) in demand.runs.iter().zip(&mut *wanted).enumerate() {
                let at = self.bins.partition_point(|bin| bin.0 < run.size);
                let count = (self.bins.len() - at).min(*wanted as usize);
                for (free, hole) in self.bins.drain(at..at + count) {
                    plan.assign(hole as usize, index, 1);
                    self.used.push((free - run.size, hole));
                }
                *wanted -= count as u32;
            }
            if self.used.is_empty() {
                return;
            }
            self.bins.append(&mut self.used);
            self.bins.sort_unstable();
        }
    }

    /// Assigns all tensors to whole compartments, by best fit, or else by first fit; false if neither succeeds.
    pub(super) fn compartments(
        &mut self,
        layout: &Layout,
        demand: &Demand,
        wanted: &mut [u32],
        plan: &mut Plan,
    ) -> bool {
        self.compartments.clear();
        let mut begins = true;
        for (hole, (at, &gap)) in layout.holes.iter().zip(&layout.gaps).enumerate() {
            match self.compartments.last_mut() {
                Some(compartment) if !begins => compartment.0 += at.len,
                _ => self.compartments.push((at.len, hole as u32)),
            }
            begins = gap == WALL;
        }
        self.bins.clone_from(&self.compartments);
        self.bins.sort_unstable();
        let assigned = plan.assigned.len();
        if self.place(demand, wanted, plan) {
            return true;
        }
        plan.assigned.truncate(assigned);
        for (index, run) in demand.runs.iter().enumerate() {
            let mut left = u64::from(run.count);
            for (free, hole) in &mut self.compartments {
                let count = (*free / run.size).min(left);
                plan.assign(*hole as usize, index, count as u32);
                *free -= count * run.size;
                left -= count;
            }
            if left > 0 {
                return false;
            }
        }
        true
    }
}
