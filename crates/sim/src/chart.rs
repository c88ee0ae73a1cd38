//! Charts as SVG text: distribution of the time to the first token, exposed stall by system, residency over time.

use std::fmt::Write;

use crate::report::{Recorded, Residency};
use crate::trace::seconds;

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 480.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;

/// Tableau's ten colours.
const COLOURS: [&str; 10] = [
    "#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f",
    "#8a8a8a",
];

/// All charts of a comparison: file name and content. `models` are the models' names.
pub fn all(recorded: &[Recorded], models: &[&str]) -> Vec<(String, String)> {
    let mut charts =
        vec![("ttft.svg".to_owned(), ttft(recorded)), ("exposed.svg".to_owned(), exposed(recorded))];
    for run in recorded.iter().filter(|run| run.residency.len() > 1) {
        let name = format!("residency-{}.svg", run.system.replace('/', "-"));
        charts.push((name, residency(&run.system, &run.residency, models)));
    }
    charts
}

struct Canvas {
    text: String,
}

impl Canvas {
    fn new(title: &str, x: &str, y: &str) -> Canvas {
        let mut canvas = Canvas { text: String::new() };
        canvas.add(format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>"
        ));
        canvas.label(WIDTH / 2.0, TOP / 2.0, "middle", title);
        canvas.label((LEFT + WIDTH - RIGHT) / 2.0, HEIGHT - 12.0, "middle", x);
        canvas.label(LEFT, TOP - 6.0, "end", y);
        canvas
    }

    fn add(&mut self, what: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = self.text.write_fmt(what);
        self.text.push('\n');
    }

    fn label(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let escaped = text.replace('&', "&amp;").replace('<', "&lt;");
        self.add(format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{escaped}</text>"));
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64)) {
        self.add(format_args!(
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"#ccc\"/>",
            from.0, from.1, to.0, to.1
        ));
    }

    fn rows(&mut self, top: f64, label: impl Fn(f64) -> String) {
        for step in 0..=4 {
            let share = f64::from(step) / 4.0;
            let y = y_at(share);
            self.line((LEFT, y), (WIDTH - RIGHT, y));
            self.label(LEFT - 6.0, y + 4.0, "end", &label(share * top));
        }
    }

    fn key(&mut self, index: usize, text: &str) {
        let y = TOP + 18.0 * index as f64;
        let (x, colour) = (WIDTH - RIGHT + 14.0, colour(index));
        self.add(format_args!(
            "<rect x=\"{x}\" y=\"{:.1}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>",
            y - 10.0
        ));
        self.label(x + 18.0, y, "start", text);
    }

    fn done(mut self) -> String {
        self.text.push_str("</svg>\n");
        self.text
    }
}

fn colour(index: usize) -> &'static str {
    COLOURS[index % COLOURS.len()]
}

fn x_at(share: f64) -> f64 {
    LEFT + share * (WIDTH - LEFT - RIGHT)
}

fn y_at(share: f64) -> f64 {
    HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
}

/// Cumulative distribution over a logarithmic axis from 10 ms.
fn ttft(recorded: &[Recorded]) -> String {
    let mut canvas = Canvas::new("Time to the first token, queueing included", "milliseconds", "requests");
    let times = |run: &Recorded| {
        let of = run.records.iter().map(|record| seconds(record.first_token - record.arrival) * 1e3);
        let mut times: Vec<f64> = of.collect();
        times.sort_by(f64::total_cmp);
        times
    };
    let all: Vec<Vec<f64>> = recorded.iter().map(times).collect();
    let largest = all.iter().filter_map(|times| times.last()).copied().fold(100.0, f64::max);
    let decades = (largest / 10.0).log10().ceil().max(1.0);
    let x = |ms: f64| x_at(((ms / 10.0).log10() / decades).clamp(0.0, 1.0));
    for decade in 0..=decades as i32 {
        let ms = 10f64.powi(decade + 1);
        canvas.line((x(ms), y_at(0.0)), (x(ms), y_at(1.0)));
        canvas.label(x(ms), HEIGHT - BOTTOM + 16.0, "middle", &format!("{ms}"));
    }
    canvas.rows(1.0, |share| format!("{:.0} %", share * 100.0));
    for (index, (run, times)) in recorded.iter().zip(&all).enumerate() {
        let mut points = String::new();
        let step = (times.len() / 500).max(1);
        for (rank, &ms) in
            times.iter().enumerate().filter(|(rank, _)| rank % step == 0 || rank + 1 == times.len())
        {
            let _ = write!(points, "{:.1},{:.1} ", x(ms), y_at((rank + 1) as f64 / times.len() as f64));
        }
        let (colour, dash) = (colour(index), if index < COLOURS.len() { "none" } else { "5 3" });
        canvas.add(format_args!(
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\" \
             stroke-dasharray=\"{dash}\"/>"
        ));
        canvas.key(index, &run.system);
    }
    canvas.done()
}

fn exposed(recorded: &[Recorded]) -> String {
    let mut canvas = Canvas::new("Exposed load: mean (wide) and 99th percentile (narrow)", "", "ms");
    let summaries: Vec<_> = recorded.iter().map(Recorded::summary).collect();
    let top = summaries.iter().map(|summary| summary.exposed_ms.p99).fold(1.0, f64::max);
    canvas.rows(top, |ms| format!("{ms:.0}"));
    let slot = (WIDTH - LEFT - RIGHT) / summaries.len().max(1) as f64;
    for (index, summary) in summaries.iter().enumerate() {
        let x = LEFT + slot * (index as f64 + 0.15);
        let mut bar = |value: f64, width: f64, opacity: f64| {
            let y = y_at(value / top);
            let (height, colour) = (HEIGHT - BOTTOM - y, colour(index));
            canvas.add(format_args!(
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\" \
                 fill-opacity=\"{opacity}\"/>"
            ));
        };
        bar(summary.exposed_ms.p99, slot * 0.25, 0.5);
        bar(summary.exposed_ms.mean, slot * 0.7, 1.0);
        canvas.key(
            index,
            &format!("{} {:.0} / {:.0}", summary.system, summary.exposed_ms.mean, summary.exposed_ms.p99),
        );
    }
    canvas.done()
}

fn residency(system: &str, points: &[Residency], models: &[&str]) -> String {
    let title = format!("What device 0 holds: {system}");
    let mut canvas = Canvas::new(&title, "seconds", "GB");
    let sum = |point: &Residency| point.bytes.iter().sum::<u64>() as f64;
    let top = points.iter().map(sum).fold(1.0, f64::max);
    let end = points.last().map_or(1.0, |point| point.at).max(f64::MIN_POSITIVE);
    canvas.rows(top / 1e9, |gb| format!("{gb:.0}"));
    for step in 0..=4 {
        let share = f64::from(step) / 4.0;
        canvas.label(x_at(share), HEIGHT - BOTTOM + 16.0, "middle", &format!("{:.0}", end * share));
    }
    let count = points.first().map_or(0, |point| point.bytes.len());
    let mut below = vec![0.0; points.len()];
    for model in 0..count {
        let mut outline = String::new();
        for (point, &below) in points.iter().zip(&below) {
            let _ = write!(outline, "{:.1},{:.1} ", x_at(point.at / end), y_at(below / top));
        }
        for (point, below) in points.iter().zip(&mut below) {
            *below += point.bytes[model] as f64;
        }
        for (point, &above) in points.iter().zip(&below).rev() {
            let _ = write!(outline, "{:.1},{:.1} ", x_at(point.at / end), y_at(above / top));
        }
        let colour = colour(model);
        canvas.add(format_args!("<polygon points=\"{outline}\" fill=\"{colour}\"/>"));
        canvas.key(model, models.get(model).copied().unwrap_or("?"));
    }
    canvas.done()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Record;

    #[test]
    fn charts_show_every_system_and_stay_inside() {
        let record = |first_token: u64| Record {
            request: 0,
            device: 0,
            model: 0,
            arrival: 0,
            start: 0,
            load: 5,
            stall: first_token / 2,
            first_token,
            finish: first_token,
            weight_bytes: 7,
            loaded_bytes: 7,
            moved_bytes: 0,
            thinking: 1,
        };
        let run = |system: &str| Recorded {
            system: system.to_owned(),
            records: (1..50).map(|i| record(i * 30_000_000)).collect(),
            end: 9,
            fetched_bytes: 0,
            background_moved_bytes: 0,
            evicted_bytes: 0,
            residency: (0..5).map(|i| Residency { at: f64::from(i), bytes: vec![5, 6] }).collect(),
            log: None,
        };
        let charts = all(&[run("a<b"), run("ours/no-decay")], &["one", "two"]);
        let names: Vec<&str> = charts.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["ttft.svg", "exposed.svg", "residency-a<b.svg", "residency-ours-no-decay.svg"]);
        for (_, text) in &charts {
            assert!(text.starts_with("<svg") && text.ends_with("</svg>\n") && !text.contains("NaN"));
        }
        assert!(charts[0].1.contains("a&lt;b") && charts[2].1.contains("two"));
    }
}
