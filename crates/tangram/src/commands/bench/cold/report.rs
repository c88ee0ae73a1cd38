//! The figures of `tangram bench cold`: medians over the rounds, as a table and JSON.

use serde::Serialize;
use tangram_checkpoint::Manifest;

use super::super::load::report::median;
use super::chart;
use crate::output;

/// A cold start is as good as can be expected if it takes at most so many times as long as the longer of reading and
/// computing alone ...
const FACTOR: f64 = 1.10;
/// ... and so many seconds.
const GRACE: f64 = 0.020;

/// A part of a stage's tensors that arrived.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Arrival {
    pub(super) stage: usize,
    pub(super) bytes: usize,
    /// Seconds since the request.
    pub(super) at: f64,
}

/// A stage that was computed.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Stage {
    pub(super) stage: usize,
    /// Of the pass.
    pub(super) tokens: usize,
    /// Seconds since the request.
    pub(super) from: f64,
    /// Seconds since the request.
    pub(super) to: f64,
}

/// A request for a model that was not in memory.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Cold {
    pub(super) prompt_tokens: usize,
    /// Seconds from the request to the first token.
    pub(super) first_token: f64,
    /// Seconds that reading the model takes the simplest reader.
    pub(super) disk: f64,
    /// Seconds from request to first token for a prompt of this length when everything is in memory.
    pub(super) prefill: f64,
    pub(super) arrivals: Vec<Arrival>,
    pub(super) stages: Vec<Stage>,
}

impl Cold {
    /// Time over that of the longer of its two parts.
    fn over_longer(&self) -> f64 {
        self.first_token / self.disk.max(self.prefill)
    }

    /// Time over what can be expected.
    fn of_limit(&self) -> f64 {
        self.first_token / (FACTOR * self.disk.max(self.prefill) + GRACE)
    }
}

/// Medians of the requests with prompts of one length.
#[derive(Debug, Serialize)]
struct Row {
    prompt_tokens: usize,
    first_token: f64,
    disk: f64,
    prefill: f64,
    /// First token over the larger of disk and prefill, within a round.
    over_longer: f64,
    /// First token over 1.10 times the larger of disk and prefill and 20 ms, within a round.
    of_limit: f64,
}

/// Everything that `tangram bench cold` reports.
#[derive(Debug, Serialize)]
pub(super) struct Summary<'a> {
    source: &'a str,
    bytes: u64,
    rows: Vec<Row>,
    runs: &'a [Cold],
}

/// The figures so far.
pub(super) struct Report {
    source: String,
    bytes: u64,
    stages: usize,
    runs: Vec<Cold>,
}

impl Report {
    pub(super) fn new(source: String, manifest: &Manifest) -> Report {
        Report { source, bytes: manifest.weight_bytes(), stages: manifest.spec.stages(), runs: Vec::new() }
    }

    pub(super) fn add(&mut self, run: Cold) {
        self.runs.push(run);
    }

    /// The runs by the length of their prompts.
    fn by_length(&self) -> Vec<(usize, Vec<&Cold>)> {
        let mut lengths: Vec<(usize, Vec<&Cold>)> = Vec::new();
        for run in &self.runs {
            match lengths.iter_mut().find(|(tokens, _)| *tokens == run.prompt_tokens) {
                Some((_, runs)) => runs.push(run),
                None => lengths.push((run.prompt_tokens, vec![run])),
            }
        }
        lengths
    }

    fn rows(&self) -> Vec<Row> {
        let row = |(prompt_tokens, runs): (usize, Vec<&Cold>)| {
            let of = |figure: fn(&Cold) -> f64| median(runs.iter().map(|run| figure(run)));
            Row {
                prompt_tokens,
                first_token: of(|run| run.first_token),
                disk: of(|run| run.disk),
                prefill: of(|run| run.prefill),
                over_longer: of(Cold::over_longer),
                of_limit: of(Cold::of_limit),
            }
        };
        self.by_length().into_iter().map(row).collect()
    }

    /// All figures.
    pub(super) fn summary(&self) -> Summary<'_> {
        Summary { source: &self.source, bytes: self.bytes, rows: self.rows(), runs: &self.runs }
    }

    /// Prints the table.
    pub(super) fn print(&self) {
        println!("{} of {}\n", output::bytes(self.bytes), self.source);
        let cells = |row: &Row| {
            let milliseconds = |seconds: f64| output::milliseconds(seconds * 1e3);
            vec![
                row.prompt_tokens.to_string(),
                milliseconds(row.first_token),
                milliseconds(row.disk),
                milliseconds(row.prefill),
                format!("{:.3}", row.over_longer),
                format!("{:.3}", row.of_limit),
            ]
        };
        let rows: Vec<_> = self.rows().iter().map(cells).collect();
        output::table(
            &["PROMPT", "FIRST TOKEN", "DISK ALONE", "PREFILL ALONE", "OVER LONGER", "OF LIMIT"],
            &rows,
        );
        println!(
            "(medians; OVER LONGER is the first token over the longer of disk and prefill, OF LIMIT over 1.10 times that \
             and 20 ms, each within a round)"
        );
    }

    /// For each length of prompt the run in the middle, as SVG.
    pub(super) fn chart(&self) -> String {
        let middle = |(_, mut runs): (usize, Vec<&Cold>)| {
            runs.sort_by(|a, b| f64::total_cmp(&a.over_longer(), &b.over_longer()));
            runs.get(runs.len() / 2).copied().cloned()
        };
        let runs: Vec<Cold> = self.by_length().into_iter().filter_map(middle).collect();
        chart::draw(self.stages, &runs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_within_a_round() {
        let mut report = Report { source: "m".to_owned(), bytes: 100, stages: 3, runs: Vec::new() };
        for (first_token, disk, prefill) in [(0.2, 0.1, 0.2), (1.12, 1.0, 0.3), (0.9, 0.3, 0.3)] {
            report.add(Cold {
                prompt_tokens: 128,
                first_token,
                disk,
                prefill,
                arrivals: vec![Arrival { stage: 0, bytes: 100, at: 0.1 }],
                stages: vec![Stage { stage: 2, tokens: 128, from: 0.1, to: 0.2 }],
            });
        }
        let summary = serde_json::to_value(report.summary()).unwrap();
        let row = &summary["rows"][0];
        assert_eq!((row["over_longer"].as_f64(), row["of_limit"].as_f64()), (Some(1.12), Some(1.0)));
        let chart = report.chart();
        assert!(chart.contains("after 1120 ms"), "the run in the middle is drawn: {chart}");
        assert!(chart.ends_with("</svg>\n"));
    }
}
