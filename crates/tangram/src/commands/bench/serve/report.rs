//! Figures of a comparison: per turn, medians and spread over the turns, ratios of neighbouring turns.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::super::report::Percentiles;
use super::measure::Timed;
use crate::output::{bytes, milliseconds, table};

/// What was asked for.
#[derive(Debug, Serialize)]
pub(super) struct Settings {
    /// URLs, the first server first.
    pub(super) servers: Vec<String>,
    /// By server.
    pub(super) models: Vec<Vec<String>>,
    pub(super) rounds: usize,
    /// Per turn.
    pub(super) requests: usize,
    pub(super) input_tokens: usize,
    pub(super) output_tokens: usize,
    pub(super) seed: u64,
    /// Files that were dropped from the page cache before each request.
    pub(super) dropped_files: usize,
}

/// One turn of one server.
#[derive(Debug, Serialize)]
pub(super) struct Turn {
    pub(super) wall_s: f64,
    pub(super) requests: usize,
    /// Messages of failed requests and how often each came.
    pub(super) errors: BTreeMap<String, usize>,
    /// Over all requests that succeeded.
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
    pub(super) requests_per_s: f64,
    /// Generated tokens.
    pub(super) tokens_per_s: f64,
    pub(super) ttft_ms: Option<Percentiles>,
    pub(super) ttft_mean_ms: f64,
    pub(super) total_ms: Option<Percentiles>,
    /// With several models.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) loading: Option<Loading>,
}

/// What loading models cost in a turn.
#[derive(Debug, Serialize)]
pub(super) struct Loading {
    /// Mean over all requests of what their first token took longer than it takes when the model is there.
    pub(super) mean_ms: f64,
    /// Time to the first token of each model when it is there, in the order of `--model`.
    pub(super) resident_ttft_ms: Vec<f64>,
    /// Where the server says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bytes_loaded: Option<u64>,
}

/// The mean; 0 of nothing.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), value| (sum + value, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

/// The middle value; of an even number, the mean of the two in the middle.
pub(super) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let upper = values.get(values.len() / 2)?;
    let lower = values.get((values.len() - 1) / 2)?;
    Some((lower + upper) / 2.0)
}

impl Turn {
    /// Sums up. An outcome has the place of its model; `resident` is by model.
    pub(super) fn new(
        wall: Duration,
        outcomes: &[(usize, Result<Timed, String>)],
        resident: Option<&[f64]>,
    ) -> Turn {
        let mut errors = BTreeMap::new();
        let mut timed = Vec::with_capacity(outcomes.len());
        for (model, outcome) in outcomes {
            match outcome {
                Ok(outcome) => timed.push((*model, *outcome)),
                Err(message) => *errors.entry(message.clone()).or_insert(0) += 1,
            }
        }
        let of = |figure: fn(&Timed) -> f64| timed.iter().map(move |(_, timed)| figure(timed));
        let sum = |figure: fn(&Timed) -> u64| timed.iter().map(|(_, timed)| figure(timed)).sum::<u64>();
        let loading = resident.map(|resident| Loading {
            mean_ms: mean(timed.iter().map(|(model, timed)| {
                let there = resident.get(*model).copied().unwrap_or(0.0);
                (timed.ttft_ms - there).max(0.0)
            })),
            resident_ttft_ms: resident.to_vec(),
            bytes_loaded: timed.iter().map(|(_, timed)| timed.bytes_loaded).sum(),
        });
        let wall_s = wall.as_secs_f64();
        let completion_tokens = sum(|timed| timed.completion_tokens);
        Turn {
            wall_s,
            requests: outcomes.len(),
            errors,
            prompt_tokens: sum(|timed| timed.prompt_tokens),
            completion_tokens,
            requests_per_s: timed.len() as f64 / wall_s.max(f64::MIN_POSITIVE),
            tokens_per_s: completion_tokens as f64 / wall_s.max(f64::MIN_POSITIVE),
            ttft_ms: Percentiles::of(of(|timed| timed.ttft_ms)),
            ttft_mean_ms: mean(of(|timed| timed.ttft_ms)),
            total_ms: Percentiles::of(of(|timed| timed.total_ms)),
            loading,
        }
    }

    /// A figure of the table.
    fn figure(&self, figure: Figure) -> Option<f64> {
        match figure {
            Figure::Requests => Some(self.requests_per_s),
            Figure::Tokens => Some(self.tokens_per_s),
            Figure::FirstMean => Some(self.ttft_mean_ms),
            Figure::FirstMedian => Some(self.ttft_ms?.p50),
            Figure::FirstTail => Some(self.ttft_ms?.p95),
            Figure::Loading => Some(self.loading.as_ref()?.mean_ms),
        }
    }
}

/// What a column of the table shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Figure {
    Requests,
    Tokens,
    FirstMean,
    FirstMedian,
    FirstTail,
    Loading,
}

const FIGURES: [(Figure, &str, &str); 6] = [
    (Figure::Requests, "requests_per_s", "REQUESTS/s"),
    (Figure::Tokens, "tokens_per_s", "TOKENS/s"),
    (Figure::FirstMean, "ttft_mean_ms", "TTFT mean"),
    (Figure::FirstMedian, "ttft_p50_ms", "p50"),
    (Figure::FirstTail, "ttft_p95_ms", "p95"),
    (Figure::Loading, "loading_mean_ms", "LOADING mean"),
];

/// A figure over the turns of a server.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64> + Clone) -> Option<Spread> {
        Some(Spread {
            median: median(values.clone())?,
            least: values.clone().reduce(f64::min)?,
            most: values.reduce(f64::max)?,
        })
    }
}

/// All turns at one concurrency.
#[derive(Debug, Serialize)]
pub(super) struct Level {
    pub(super) concurrency: usize,
    /// By server and figure.
    pub(super) servers: Vec<BTreeMap<&'static str, Spread>>,
    /// By figure: the median over the rounds of the first server's figure divided by the second's, which a machine
    /// with other work disturbs less than the figures themselves.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) ratios: BTreeMap<&'static str, f64>,
    /// By server and round.
    pub(super) turns: Vec<Vec<Turn>>,
}

impl Level {
    /// Sums up the turns of the servers.
    pub(super) fn new(concurrency: usize, turns: Vec<Vec<Turn>>) -> Level {
        let spread = |turns: &Vec<Turn>| {
            let figures = FIGURES.iter().filter_map(|&(figure, name, _)| {
                let values: Vec<f64> = turns.iter().filter_map(|turn| turn.figure(figure)).collect();
                Some((name, Spread::of(values.iter().copied())?))
            });
            figures.collect()
        };
        let mut ratios = BTreeMap::new();
        if let [first, second] = turns.as_slice() {
            for (figure, name, _) in FIGURES {
                let pairs = first.iter().zip(second);
                let ratio = |(first, second): (&Turn, &Turn)| {
                    let ratio = first.figure(figure)? / second.figure(figure)?;
                    ratio.is_finite().then_some(ratio)
                };
                ratios.extend(median(pairs.filter_map(ratio)).map(|ratio| (name, ratio)));
            }
        }
        Level { concurrency, servers: turns.iter().map(spread).collect(), ratios, turns }
    }
}

/// Everything that `tangram bench serve` reports.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) settings: Settings,
    pub(super) levels: Vec<Level>,
}

impl Report {
    fn turns(&self) -> impl Iterator<Item = &Turn> {
        self.levels.iter().flat_map(|level| level.turns.iter().flatten())
    }

    /// Why the figures are not what they should be: requests failed, or the servers did different work.
    pub(super) fn problem(&self) -> Option<String> {
        let errors = self.turns().flat_map(|turn| &turn.errors);
        if let Some((message, _)) = errors.max_by_key(|(_, count)| **count) {
            let failed: usize = self.turns().flat_map(|turn| turn.errors.values()).sum();
            return Some(format!("{failed} requests failed, most with: {message}"));
        }
        let settings = &self.settings;
        let wanted = |tokens: usize| (settings.requests * tokens) as u64;
        let (prompt, completion) = (wanted(settings.input_tokens), wanted(settings.output_tokens));
        let other = |turn: &&Turn| (turn.prompt_tokens, turn.completion_tokens) != (prompt, completion);
        let turn = self.turns().find(other)?;
        Some(format!(
            "a turn was to have {prompt} prompt and {completion} generated tokens, but a server counted {} and {}: \
             the figures cannot be compared",
            turn.prompt_tokens, turn.completion_tokens
        ))
    }

    /// Prints the table.
    pub(super) fn print(&self) {
        let settings = &self.settings;
        for (letter, (url, models)) in ["A", "B"].iter().zip(settings.servers.iter().zip(&settings.models)) {
            println!("{letter}: {url}, {}", models.join(", "));
        }
        println!(
            "{} turns each of {} requests, {} prompt and {} generated tokens; median (least to most) of the turns{}\n",
            settings.rounds,
            settings.requests,
            settings.input_tokens,
            settings.output_tokens,
            match settings.dropped_files {
                0 => String::new(),
                files => format!("; {files} files dropped from the page cache before each request"),
            }
        );
        let mut header = vec!["CONCURRENCY", "SERVER"];
        let shown = FIGURES.iter().filter(|(_, name, _)| {
            self.levels.iter().any(|level| level.servers.iter().any(|figures| figures.contains_key(name)))
        });
        let shown: Vec<_> = shown.collect();
        header.extend(shown.iter().map(|(.., title)| title));
        let mut rows = Vec::new();
        for level in &self.levels {
            for (letter, figures) in ["A", "B"].iter().zip(&level.servers) {
                let mut row = vec![level.concurrency.to_string(), (*letter).to_owned()];
                row.extend(
                    shown
                        .iter()
                        .map(|(_, name, _)| figures.get(name).map_or_else(String::new, |s| cell(name, s))),
                );
                rows.push(row);
            }
            if !level.ratios.is_empty() {
                let mut row = vec![level.concurrency.to_string(), "A / B".to_owned()];
                let ratio =
                    |name: &str| level.ratios.get(name).map_or_else(String::new, |r| format!("{r:.2}"));
                row.extend(shown.iter().map(|(_, name, _)| ratio(name)));
                rows.push(row);
            }
        }
        table(&header, &rows);
        let loaded = self.turns().filter_map(|turn| turn.loading.as_ref()?.bytes_loaded).sum::<u64>();
        if loaded > 0 {
            println!("\n{} of weights loaded, by the servers that say it", bytes(loaded));
        }
        if settings.models.iter().any(|models| models.len() > 1) {
            println!(
                "(LOADING: what the first token took longer than the median of the same model and server when the model \
                 was there)"
            );
        }
    }
}

fn cell(name: &str, spread: &Spread) -> String {
    let show = |value: f64| if name.ends_with("_ms") { milliseconds(value) } else { format!("{value:.2}") };
    format!("{} ({} to {})", show(spread.median), show(spread.least), show(spread.most))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timed(ttft_ms: f64) -> Timed {
        Timed {
            ttft_ms,
            total_ms: 2.0 * ttft_ms,
            prompt_tokens: 10,
            completion_tokens: 5,
            bytes_loaded: Some(7),
        }
    }

    fn report(turns: Vec<Vec<Turn>>) -> Report {
        let settings = Settings {
            servers: vec!["http://a".into(), "http://b".into()],
            models: vec![vec!["m".into()], vec!["m".into()]],
            rounds: turns[0].len(),
            requests: 2,
            input_tokens: 10,
            output_tokens: 5,
            seed: 1,
            dropped_files: 0,
        };
        Report { settings, levels: vec![Level::new(4, turns)] }
    }

    fn turn(seconds: f64, ttft_ms: f64) -> Turn {
        let outcomes = [(0, Ok(timed(ttft_ms))), (0, Ok(timed(3.0 * ttft_ms)))];
        Turn::new(Duration::from_secs_f64(seconds), &outcomes, None)
    }

    #[test]
    fn medians() {
        assert_eq!(median([].into_iter()), None);
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
    }

    #[test]
    fn loading_is_what_exceeds_the_resident_model() {
        let outcomes =
            [(0, Ok(timed(50.0))), (1, Ok(timed(30.0))), (1, Ok(timed(15.0))), (0, Err("no".into()))];
        let turn = Turn::new(Duration::from_secs(2), &outcomes, Some(&[10.0, 20.0]));
        let loading = turn.loading.unwrap();
        // 40, 10 and, faster than usual, 0.
        assert!((loading.mean_ms - 50.0 / 3.0).abs() < 1e-9);
        assert_eq!(loading.bytes_loaded, Some(21));
        assert_eq!((turn.requests, turn.errors["no"]), (4, 1));
        assert_eq!((turn.requests_per_s, turn.tokens_per_s), (1.5, 7.5));
    }

    #[test]
    fn ratios_are_of_neighbouring_turns() {
        // The second server's last turn was disturbed; the medians of the rates would say 1.5, the ratios 2.
        let first = vec![turn(1.0, 10.0), turn(1.0, 10.0), turn(4.0, 40.0)];
        let second = vec![turn(2.0, 20.0), turn(2.0, 30.0), turn(8.0, 40.0)];
        let report = report(vec![first, second]);
        let level = &report.levels[0];
        assert_eq!(level.ratios["requests_per_s"], 2.0);
        assert_eq!(level.ratios["ttft_mean_ms"], 0.5);
        assert_eq!(level.servers[0]["tokens_per_s"], Spread { median: 10.0, least: 2.5, most: 10.0 });
        assert_eq!(report.problem(), None);
        assert!(!level.servers[0].contains_key("loading_mean_ms"));
    }

    #[test]
    fn different_work_and_failed_requests_are_problems() {
        let mut other = turn(1.0, 10.0);
        other.prompt_tokens += 1;
        let problem = report(vec![vec![turn(1.0, 10.0)], vec![other]]).problem().unwrap();
        assert!(problem.contains("20 prompt") && problem.contains("21"), "{problem}");
        let failed = Turn::new(Duration::from_secs(1), &[(0, Err("broken".into()))], None);
        let problem = report(vec![vec![turn(1.0, 10.0)], vec![failed]]).problem().unwrap();
        assert!(problem.contains("1 requests failed") && problem.contains("broken"), "{problem}");
    }
}
