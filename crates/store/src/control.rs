//! Corrects how a disk is read by what reading it gives: pure state machines, the clock is an argument.
//!
//! A probe of a second chooses among settings ([`crate::probe`]) and may meet a bad moment. While loads keep the disk busy,
//! the setting in use and one of its neighbours take turns, so that a disk whose speed changes from minute to minute
//! changes for both, and pairs of neighbouring windows are compared. A neighbour that gives clearly more takes over; when
//! none does, there is a long rest. So about one window in twenty is read by something worse, and few by something much
//! worse.

use std::time::Instant;

use crate::probe::{Measured, Tuning, settings};

/// Bytes of a window.
const WINDOW: u64 = 64 << 20;
/// Bytes in front of a window that are still under way by the setting before it, or fill the empty queue.
const SETTLING: u64 = 16 << 20;
/// Pairs of windows that decide; odd.
const PAIRS: usize = 5;
/// What a neighbour must give of the setting in use, by the median of the pairs, to take over.
const CLEARLY_MORE: f64 = 1.04;
/// Less than this twice in a row, and it is not tried any further.
const MUCH_LESS: f64 = 0.9;
/// Windows without a trial when the first loads come, and after all neighbours were tried in vain.
const FIRST_REST: usize = 2;
const REST: usize = 400;

#[derive(Debug)]
enum Phase {
    /// Windows until the next trial.
    Resting(usize),
    /// The next window is read by the setting in use.
    Own,
    /// The next window is read by the neighbour; the one before gave this.
    Neighbour(f64),
}

/// Which setting a disk is read by.
#[derive(Debug)]
pub(crate) struct Control {
    current: Tuning,
    neighbours: Vec<Tuning>,
    /// Which neighbour is tried, or will be.
    trial: usize,
    phase: Phase,
    /// What the neighbour gave, as a share of what the setting in use gave just before.
    pairs: Vec<f64>,
}

impl Control {
    /// Starts from a setting.
    pub(crate) fn new(tuning: Tuning) -> Control {
        let phase = Phase::Resting(FIRST_REST);
        Control { current: tuning, neighbours: neighbours(tuning), trial: 0, phase, pairs: Vec::new() }
    }

    /// How to read now.
    pub(crate) fn tuning(&self) -> Tuning {
        match (&self.phase, self.neighbours.get(self.trial)) {
            (Phase::Neighbour(_), Some(&neighbour)) => neighbour,
            _ => self.current,
        }
    }

    /// The disk was kept busy for a window and gave so many bytes per second. Gives the new setting if there is one.
    pub(crate) fn window(&mut self, rate: f64) -> Option<Measured> {
        match self.phase {
            Phase::Resting(left) if left > 1 => self.phase = Phase::Resting(left - 1),
            Phase::Resting(_) if self.neighbours.is_empty() => self.phase = Phase::Resting(REST),
            Phase::Resting(_) => self.phase = Phase::Own,
            Phase::Own => self.phase = Phase::Neighbour(rate),
            Phase::Neighbour(own) => {
                self.phase = Phase::Own;
                self.pairs.push(rate / own.max(1.0));
                return self.judge(rate);
            }
        }
        None
    }

    /// The disk was not kept busy: what follows is not to be compared with what was before.
    pub(crate) fn interrupted(&mut self) {
        if matches!(self.phase, Phase::Neighbour(_)) {
            self.phase = Phase::Own;
        }
    }

    fn judge(&mut self, rate: f64) -> Option<Measured> {
        let hopeless = matches!(*self.pairs.as_slice(), [a, b] if a.max(b) < MUCH_LESS);
        if self.pairs.len() < PAIRS && !hopeless {
            return None;
        }
        self.pairs.sort_by(f64::total_cmp);
        let better = self.pairs.get(PAIRS / 2).is_some_and(|&median| median >= CLEARLY_MORE);
        self.pairs.clear();
        if let Some(&tuning) = self.neighbours.get(self.trial).filter(|_| better && !hopeless) {
            *self = Control { phase: Phase::Own, ..Control::new(tuning) };
            return Some(Measured { tuning, bytes_per_second: rate });
        }
        self.trial += 1;
        if self.trial >= self.neighbours.len() {
            self.trial = 0;
            self.phase = Phase::Resting(REST);
        }
        None
    }
}

/// Settings with twice or half as many reads, or reads twice or half as large; those with more under way first.
fn neighbours(of: Tuning) -> Vec<Tuning> {
    let near = |a: usize, b: usize| a == 2 * b || b == 2 * a;
    let mut near: Vec<Tuning> = settings()
        .filter(|&Tuning { block, depth }| {
            (block == of.block && near(depth, of.depth)) || (depth == of.depth && near(block, of.block))
        })
        .collect();
    near.sort_by_key(|tuning| std::cmp::Reverse(tuning.block * tuning.depth));
    near
}

/// Tells windows in which the disk was kept busy from everything else.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// Bytes that are still to come before the window begins.
    settling: u64,
    window: Option<(Instant, u64)>,
}

impl Meter {
    /// The disk had less to do than it could take.
    pub(crate) fn interrupted(&mut self) {
        *self = Meter { settling: SETTLING, window: None };
    }

    /// The disk, kept busy, has given `bytes` more. Gives the bytes per second of a window that has ended with them.
    pub(crate) fn read(&mut self, bytes: u64, now: Instant) -> Option<f64> {
        let Some((started, so_far)) = self.window else {
            self.settling = self.settling.saturating_sub(bytes);
            self.window = (self.settling == 0).then_some((now, 0));
            return None;
        };
        let bytes = so_far + bytes;
        self.window = Some((started, bytes));
        let seconds = now.saturating_duration_since(started).as_secs_f64();
        if bytes < WINDOW || seconds == 0.0 {
            return None;
        }
        self.interrupted();
        Some(bytes as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    fn tuning(block_mib: usize, depth: usize) -> Tuning {
        Tuning { block: block_mib << 20, depth }
    }

    /// Reads windows by what the control says; gives the setting at the end, and the share of windows read by another.
    fn drive(control: &mut Control, windows: usize, rate: impl Fn(Tuning, usize) -> f64) -> f64 {
        let mut others = 0;
        for at in 0..windows {
            others += usize::from(control.tuning() != control.current);
            control.window(rate(control.tuning(), at));
        }
        others as f64 / windows as f64
    }

    #[test]
    fn too_few_reads_are_corrected_while_the_disk_drifts() {
        // As more is under way it gives more, up to 16 MiB; and it is three times as fast now as a while ago.
        let disk = |tuning: Tuning, at: usize| {
            (tuning.block * tuning.depth).min(16 << 20) as f64 * (1.0 + at as f64 / 30.0)
        };
        let mut control = Control::new(tuning(1, 16));
        drive(&mut control, 60, disk);
        assert_eq!(control.current.block * control.current.depth, 16 << 20);
        let share = drive(&mut control, 5000, disk);
        assert_eq!(control.current.block * control.current.depth, 16 << 20, "it stays");
        assert!(share < 0.05, "{share} of the windows were read otherwise");
    }

    #[test]
    fn fewer_reads_take_over_where_many_hurt() {
        let disk = |tuning: Tuning, _| 1e9 / (tuning.block * tuning.depth) as f64;
        let mut control = Control::new(tuning(2, 16));
        drive(&mut control, 100, disk);
        assert_eq!(control.current.block * control.current.depth, 16 << 20);
    }

    #[test]
    fn windows_of_different_busy_periods_are_no_pair() {
        let mut control = Control::new(tuning(1, 16));
        for _ in 0..=FIRST_REST {
            control.window(1.0);
        }
        assert_ne!(control.tuning(), control.current);
        control.interrupted();
        assert_eq!(control.tuning(), control.current, "the pair begins anew");
    }

    #[test]
    fn a_window_is_measured_while_the_disk_is_busy() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut meter = Meter::default();
        meter.interrupted();
        assert_eq!(meter.read(SETTLING - 1, at(0)), None);
        assert_eq!(meter.read(1, at(10)), None, "from here on it counts");
        assert_eq!(meter.read(WINDOW / 2, at(20)), None);
        assert_eq!(meter.read(WINDOW / 2, at(74)), Some(WINDOW as f64 / 0.064));
        assert_eq!(meter.read(WINDOW, at(80)), None, "the next one settles first");
        meter.interrupted();
        assert_eq!(meter.read(WINDOW, at(90)), None);
        assert_eq!(meter.read(WINDOW, at(100)), Some(WINDOW as f64 / 0.01));
    }

    proptest! {
        #[test]
        fn noise_neither_breaks_it_nor_leads_it_out_of_the_grid(
            rates in prop::collection::vec((0.0..1e10f64, 0u8..20), 0..400),
        ) {
            let mut control = Control::new(Tuning::default());
            for (rate, dice) in rates {
                if dice == 0 {
                    control.interrupted();
                }
                if let Some(measured) = control.window(rate) {
                    prop_assert_eq!(measured.tuning, control.tuning());
                }
                prop_assert!(settings().any(|tuning| tuning == control.tuning()));
            }
        }
    }
}
