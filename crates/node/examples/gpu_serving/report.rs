//! What is printed: a line of JSON per finding and per goal, at once, so that a run that is cut off has told what it found.

use serde_json::{Value, json};

/// A finding.
pub(crate) fn say(of: &str, finding: &str, value: Value) {
    println!("{}", json!({ "of": of, "finding": finding, "value": value }));
}

/// What a number has to be.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

/// A number that there is a goal for. `line` is that of the list of what has to be reached.
pub(crate) fn goal(line: u8, what: &str, value: f64, goal: Goal) {
    let (wanted, met) = match goal {
        Goal::AtLeast(wanted) => (json!({ "at_least": wanted }), value >= wanted),
        Goal::AtMost(wanted) => (json!({ "at_most": wanted }), value <= wanted),
    };
    println!("{}", json!({ "line": line, "goal": what, "value": value, "wanted": wanted, "met": met }));
}

/// Mean of some numbers; 0 of none.
pub(crate) fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / f64::from(count) }
}

/// The smallest number that at least this share of all does not exceed; 0 of none.
pub(crate) fn percentile(values: impl Iterator<Item = f64>, percent: usize) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get((values.len() * percent).div_ceil(100).max(1) - 1).copied().unwrap_or(0.0)
}
