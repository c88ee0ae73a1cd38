//! The overlap picture: for each stage when its bytes arrived and when it was computed, as SVG.

use std::fmt::Write;

use super::report::Cold;

const WIDTH: f64 = 900.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 24.0;
const ROW: f64 = 12.0;
/// Above the rows of a run, for its title and the key.
const TOP: f64 = 54.0;
/// Below the rows of a run, for the axis.
const BOTTOM: f64 = 40.0;
const LOADED: &str = "#4e79a7";
const COMPUTED: &str = "#f28e2b";

/// A picture of some runs of a model of so many stages, one below the other.
pub(super) fn draw(stages: usize, runs: &[Cold]) -> String {
    let panel = TOP + ROW * stages as f64 + BOTTOM;
    let height = panel * runs.len() as f64;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (run, index) in runs.iter().zip(0u32..) {
        // Writing to a string does not fail.
        let _ = draw_run(&mut text, panel * f64::from(index), stages, run);
    }
    text.push_str("</svg>\n");
    text
}

fn draw_run(text: &mut String, top: f64, stages: usize, run: &Cold) -> std::fmt::Result {
    let end = 1.04 * run.first_token.max(run.disk).max(run.prefill);
    let x = |seconds: f64| LEFT + (WIDTH - LEFT - RIGHT) * seconds / end;
    let (first, last) = (top + TOP, top + TOP + ROW * stages as f64);
    writeln!(
        text,
        "<text x=\"{LEFT}\" y=\"{:.1}\" font-size=\"13\">{} tokens of prompt: first token after {:.0} ms; reading alone \
         {:.0} ms, computing alone {:.0} ms</text>",
        top + 18.0,
        run.prompt_tokens,
        run.first_token * 1e3,
        run.disk * 1e3,
        run.prefill * 1e3
    )?;
    for (colour, name, at) in [(LOADED, "bytes arrive", LEFT), (COMPUTED, "computed", LEFT + 110.0)] {
        let y = top + 28.0;
        writeln!(
            text,
            "<rect x=\"{at}\" y=\"{y}\" width=\"10\" height=\"10\" fill=\"{colour}\"/><text x=\"{}\" y=\"{}\">{name}</text>",
            at + 15.0,
            y + 9.0
        )?;
    }
    let step = step(end);
    let mut at = 0.0;
    while at < end {
        writeln!(
            text,
            "<line x1=\"{0:.1}\" y1=\"{first:.1}\" x2=\"{0:.1}\" y2=\"{last:.1}\" stroke=\"#ddd\"/><text x=\"{0:.1}\" \
             y=\"{1:.1}\" text-anchor=\"middle\">{2:.0} ms</text>",
            x(at),
            last + 15.0,
            at * 1e3
        )?;
        at += step;
    }
    for stage in 0..stages {
        let y = first + ROW * stage as f64;
        let name = match stage {
            0 => "embedding".to_owned(),
            stage if stage + 1 == stages => "head".to_owned(),
            stage => format!("layer {}", stage - 1),
        };
        writeln!(text, "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>", LEFT - 6.0, y + 9.5)?;
        let mut bar = |from: f64, to: f64, y: f64, colour: &str| {
            // Wide enough to be seen, however short.
            let width = (x(to) - x(from)).max(1.0);
            writeln!(
                text,
                "<rect x=\"{:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>",
                x(from),
                ROW / 2.0 - 1.0
            )
        };
        let arrivals = run.arrivals.iter().filter(|arrival| arrival.stage == stage).map(|arrival| arrival.at);
        let (from, to) = arrivals.fold((f64::INFINITY, 0.0), |(from, to), at| (at.min(from), at.max(to)));
        if from <= to {
            bar(from, to, y + 1.0, LOADED)?;
        }
        for computed in run.stages.iter().filter(|computed| computed.stage == stage) {
            bar(computed.from, computed.to, y + ROW / 2.0, COMPUTED)?;
        }
    }
    writeln!(
        text,
        "<line x1=\"{0:.1}\" y1=\"{first:.1}\" x2=\"{0:.1}\" y2=\"{last:.1}\" stroke=\"#333\"/>",
        x(run.first_token)
    )
}

/// Seconds between two lines: 1, 2 or 5 of a power of ten, so that there are about eight.
fn step(end: f64) -> f64 {
    let rough = end / 8.0;
    let power = 10f64.powf(rough.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|factor| factor * power)
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(rough)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_at_round_times() {
        assert_eq!([0.9, 1.7, 3.0].map(|end| (step(end) * 1e3).round() as u32), [200, 500, 500]);
    }
}
