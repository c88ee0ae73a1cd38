//! The figures of `tangram bench load`: medians over the rounds, as a table, JSON and a chart.

use std::fmt::Write;

use serde::Serialize;
use tangram_store::Measured;

use super::Cost;
use crate::output;

/// One run within a round.
pub(super) struct Run {
    name: String,
    cost: Cost,
    /// Its rate over that of the limit that was measured in the same round.
    share: f64,
}

impl Run {
    /// A limit itself.
    pub(super) fn limit(name: &str, cost: Cost) -> Run {
        Run { name: name.to_owned(), cost, share: 1.0 }
    }

    /// A run that is held against a limit.
    pub(super) fn of(name: &str, cost: Cost, limit: Cost) -> Run {
        Run { name: name.to_owned(), cost, share: rate(cost) / rate(limit) }
    }
}

fn rate(cost: Cost) -> f64 {
    cost.bytes as f64 / cost.seconds.max(1e-9)
}

/// The middle one, or the mean of the two in the middle.
pub(in super::super) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match (values.get(middle), values.len() % 2) {
        (Some(&upper), 1) => upper,
        (Some(&upper), _) => (upper + values.get(middle.wrapping_sub(1)).copied().unwrap_or(upper)) / 2.0,
        (None, _) => f64::NAN,
    }
}

/// Medians of one kind of run.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    seconds: f64,
    bytes_per_second: f64,
    /// Of the limit above it, within a round.
    share: f64,
    cpu_seconds_per_gib: f64,
    /// The largest of all rounds.
    peak_bytes: Option<u64>,
}

/// Everything that `tangram bench load` reports.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    source: String,
    bytes: u64,
    rounds: usize,
    /// How the disk was read, as it was measured before; absent if it could not be.
    disk: Option<Measured>,
    rows: Vec<Row>,
    /// Time of a request's load of a sixteenth of the bytes among prefetching over that when alone.
    urgent_slowdown: f64,
    /// Seconds of 16 loads at once over those of one load of the same bytes.
    many_over_one: f64,
}

/// The figures so far.
pub(super) struct Report {
    source: String,
    bytes: u64,
    disk: Option<Measured>,
    rounds: Vec<Vec<Run>>,
    slowdowns: Vec<f64>,
}

impl Report {
    pub(super) fn new(source: String, bytes: u64, disk: Option<Measured>) -> Report {
        Report { source, bytes, disk, rounds: Vec::new(), slowdowns: Vec::new() }
    }

    /// Adds a round, with the same runs as those before.
    pub(super) fn add(&mut self, runs: Vec<Run>) {
        self.rounds.push(runs);
    }

    /// Adds the seconds of an urgent load alone and among others.
    pub(super) fn urgent(&mut self, alone: f64, among: f64) {
        self.slowdowns.push(among / alone.max(1e-9));
    }

    fn rows(&self) -> Vec<Row> {
        let names = self.rounds.first().into_iter().flatten().map(|run| &run.name);
        let row = |name: &String| {
            let runs = || self.rounds.iter().flatten().filter(|run| run.name == *name);
            let gib = |run: &Run| run.cost.bytes as f64 / f64::from(1 << 30);
            Row {
                name: name.clone(),
                seconds: median(runs().map(|run| run.cost.seconds)),
                bytes_per_second: median(runs().map(|run| rate(run.cost))),
                share: median(runs().map(|run| run.share)),
                cpu_seconds_per_gib: median(runs().map(|run| run.cost.cpu_seconds / gib(run))),
                peak_bytes: runs().filter_map(|run| run.cost.peak_bytes).max(),
            }
        };
        names.map(row).collect()
    }

    /// All figures.
    pub(super) fn summary(&self) -> Summary {
        let seconds = |round: &[Run], name: &str| {
            round.iter().find(|run| run.name == name).map_or(f64::NAN, |run| run.cost.seconds)
        };
        let ratio = |round: &Vec<Run>| seconds(round, "cold, 16 loads at once") / seconds(round, "cold");
        Summary {
            source: self.source.clone(),
            bytes: self.bytes,
            rounds: self.rounds.len(),
            disk: self.disk,
            rows: self.rows(),
            urgent_slowdown: median(self.slowdowns.iter().copied()),
            many_over_one: median(self.rounds.iter().map(ratio)),
        }
    }

    /// Prints the table.
    pub(super) fn print(&self) {
        let summary = self.summary();
        println!(
            "{} of {}, medians of {} rounds",
            output::bytes(summary.bytes),
            summary.source,
            summary.rounds
        );
        match summary.disk {
            Some(Measured { tuning, bytes_per_second }) => println!(
                "disk read by {} reads of {} at a time, which gave {:.2} GB/s\n",
                tuning.depth,
                output::bytes(tuning.block as u64),
                bytes_per_second / 1e9
            ),
            None => println!("the disk could not be measured: no direct reads through io_uring\n"),
        }
        let cells = |row: &Row| {
            vec![
                row.name.clone(),
                output::milliseconds(row.seconds * 1e3),
                format!("{:.2}", row.bytes_per_second / 1e9),
                format!("{:.1} %", row.share * 100.0),
                format!("{:.3}", row.cpu_seconds_per_gib),
                row.peak_bytes.map_or_else(|| "-".to_owned(), output::bytes),
            ]
        };
        let rows: Vec<_> = summary.rows.iter().map(cells).collect();
        output::table(&["LOAD", "TIME", "GB/s", "OF LIMIT", "CPU s/GiB", "PEAK MEMORY"], &rows);
        println!(
            "(cold is held against raw direct reads, warm against the memory copy, both of the same round; PEAK MEMORY of \
             tangram is what it took beside the pool)"
        );
        println!(
            "16 loads at once took {:.3} times as long as one of the same bytes; an urgent load among 15 prefetches {:.3} \
             times as long as alone",
            summary.many_over_one, summary.urgent_slowdown
        );
    }

    /// Bars of bytes per second, as SVG.
    pub(super) fn chart(&self) -> String {
        const BAR: f64 = 24.0;
        const LEFT: f64 = 230.0;
        const WIDTH: f64 = 900.0;
        let rows = self.rows();
        let top = rows.iter().map(|row| row.bytes_per_second).fold(1.0, f64::max);
        let height = 50.0 + BAR * rows.len() as f64;
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{}\" y=\"20\" \
             text-anchor=\"middle\">Loading {}: GB/s, and share of the limit</text>\n",
            WIDTH / 2.0,
            output::bytes(self.bytes)
        );
        for (row, index) in rows.iter().zip(0u32..) {
            let y = 34.0 + BAR * f64::from(index);
            let width = (WIDTH - LEFT - 110.0) * row.bytes_per_second / top;
            let colour = if row.share == 1.0 { "#8a8a8a" } else { "#4e79a7" };
            let name = row.name.replace('&', "&amp;").replace('<', "&lt;");
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{name}</text><rect x=\"{LEFT}\" y=\"{y}\" \
                 width=\"{width:.1}\" height=\"{}\" fill=\"{colour}\"/><text x=\"{:.1}\" y=\"{}\">{:.2}, {:.0} %</text>",
                LEFT - 8.0,
                y + BAR - 9.0,
                BAR - 6.0,
                LEFT + width + 6.0,
                y + BAR - 9.0,
                row.bytes_per_second / 1e9,
                row.share * 100.0
            );
        }
        text.push_str("</svg>\n");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_shares_within_a_round() {
        assert!(median(std::iter::empty()).is_nan());
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
        let cost =
            |seconds| Cost { bytes: 1 << 30, seconds, cpu_seconds: 0.5, peak_bytes: Some(seconds as u64) };
        let mut report = Report::new("a<b".to_owned(), 1 << 30, None);
        for (limit, ours, many) in [(1.0, 2.0, 2.0), (2.0, 2.0, 3.0), (4.0, 5.0, 5.0)] {
            let limit = cost(limit);
            report.add(vec![
                Run::limit("raw", limit),
                Run::of("cold", cost(ours), limit),
                Run::of("cold, 16 loads at once", cost(many), limit),
            ]);
            report.urgent(1.0, ours);
        }
        let summary = report.summary();
        let cold = &summary.rows[1];
        assert_eq!((cold.share, cold.seconds, cold.peak_bytes), (0.8, 2.0, Some(5)));
        assert_eq!(
            (summary.many_over_one, summary.urgent_slowdown, cold.cpu_seconds_per_gib),
            (1.0, 2.0, 0.5)
        );
        assert!(report.chart().starts_with("<svg") && report.chart().ends_with("</svg>\n"));
        assert_eq!(serde_json::to_value(&summary).unwrap()["rows"][0]["share"], 1.0);
    }
}
