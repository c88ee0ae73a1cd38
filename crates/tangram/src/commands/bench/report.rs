//! Figures of a replay: percentiles, sums per model and overall, as tables and as JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use super::simulated::Agreement;

use crate::output::{bytes, milliseconds, table};

/// What one request cost, in milliseconds and bytes.
#[derive(Clone, Debug, Default)]
pub(super) struct Cost {
    /// From the request's arrival until `--concurrency` let it go.
    pub(super) held_ms: f64,
    /// Seen by the client: from the request's arrival to its first token.
    pub(super) ttft_ms: f64,
    /// The server's phases.
    pub(super) queue_ms: f64,
    pub(super) load_ms: f64,
    pub(super) prefill_ms: f64,
    pub(super) decode_ms: f64,
    pub(super) bytes_loaded: u64,
    pub(super) bytes_reused: u64,
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
}

impl Cost {
    /// From the request's arrival at the server to its last token.
    pub(super) fn served_ms(&self) -> f64 {
        self.queue_ms + self.load_ms + self.prefill_ms + self.decode_ms
    }
}

/// How one request ended.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    /// Deployed name.
    pub(super) model: String,
    /// What it cost, or why it failed.
    pub(super) result: Result<Cost, String>,
}

/// What the replay was asked to do.
#[derive(Debug, Serialize)]
pub(super) struct Settings {
    pub(super) trace: String,
    pub(super) requests: usize,
    pub(super) time_scale: f64,
    pub(super) concurrency: usize,
    pub(super) max_input: Option<usize>,
    pub(super) max_output: Option<usize>,
    /// Requests whose prompt or answer was shortened to fit its model's context.
    pub(super) shortened_to_context: usize,
    /// Trace id to deployed name.
    pub(super) models: BTreeMap<String, String>,
}

/// What the server says about itself; counters over the time of the replay.
#[derive(Debug, Serialize)]
pub(super) struct ServerFigures {
    pub(super) device: String,
    pub(super) pool_bytes: u64,
    pub(super) bytes_evicted: u64,
    pub(super) preemptions: u64,
}

/// Nearest-rank percentiles; absent if there is nothing to rank.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Percentiles {
    pub(super) p50: f64,
    pub(super) p95: f64,
    pub(super) p99: f64,
}

impl Percentiles {
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Option<Percentiles> {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        // Nearest rank: the smallest value that at least this share of all values does not exceed.
        let rank = |percent: usize| values.get((values.len() * percent).div_ceil(100).max(1) - 1).copied();
        Some(Percentiles { p50: rank(50)?, p95: rank(95)?, p99: rank(99)? })
    }
}

/// Sums and percentiles over some requests.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    pub(super) requests: usize,
    pub(super) errors: usize,
    pub(super) prompt_tokens: u64,
    pub(super) completion_tokens: u64,
    /// At the client.
    pub(super) ttft_ms: Option<Percentiles>,
    /// Kept back by `--concurrency`.
    pub(super) held_ms: Option<Percentiles>,
    /// The server's phases.
    pub(super) queue_ms: Option<Percentiles>,
    pub(super) load_ms: Option<Percentiles>,
    pub(super) prefill_ms: Option<Percentiles>,
    pub(super) decode_ms: Option<Percentiles>,
    pub(super) bytes_loaded: u64,
    pub(super) bytes_reused: u64,
    /// Of all weight bytes that the requests needed, the share that was not loaded for them.
    pub(super) reused_share: Option<f64>,
    /// Requests that loaded nothing.
    pub(super) resident_requests: usize,
    /// `load_ms` of these. With requests side by side, some of them waited for bytes that another request was loading
    /// already; with one at a time it is what activating a resident model takes.
    pub(super) activation_ms: Option<Percentiles>,
}

impl Summary {
    fn of<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> Summary {
        let (mut costs, mut errors) = (Vec::new(), 0);
        for outcome in outcomes {
            match &outcome.result {
                Ok(cost) => costs.push(cost),
                Err(_) => errors += 1,
            }
        }
        let sum = |figure: fn(&Cost) -> u64| costs.iter().map(|cost| figure(cost)).sum::<u64>();
        let rank = |figure: fn(&Cost) -> f64| Percentiles::of(costs.iter().map(|cost| figure(cost)));
        let (loaded, reused) = (sum(|cost| cost.bytes_loaded), sum(|cost| cost.bytes_reused));
        let resident = || costs.iter().filter(|cost| cost.bytes_loaded == 0);
        Summary {
            requests: costs.len() + errors,
            errors,
            prompt_tokens: sum(|cost| cost.prompt_tokens),
            completion_tokens: sum(|cost| cost.completion_tokens),
            ttft_ms: rank(|cost| cost.ttft_ms),
            held_ms: rank(|cost| cost.held_ms),
            queue_ms: rank(|cost| cost.queue_ms),
            load_ms: rank(|cost| cost.load_ms),
            prefill_ms: rank(|cost| cost.prefill_ms),
            decode_ms: rank(|cost| cost.decode_ms),
            bytes_loaded: loaded,
            bytes_reused: reused,
            reused_share: (loaded + reused > 0).then(|| reused as f64 / (loaded + reused) as f64),
            resident_requests: resident().count(),
            activation_ms: Percentiles::of(resident().map(|cost| cost.load_ms)),
        }
    }

    fn row(&self, name: &str) -> Vec<String> {
        let cell = |percentiles: Option<Percentiles>, which: fn(Percentiles) -> f64| {
            percentiles.map_or_else(|| "-".to_owned(), |percentiles| milliseconds(which(percentiles)))
        };
        vec![
            name.to_owned(),
            self.requests.to_string(),
            self.errors.to_string(),
            cell(self.ttft_ms, |p| p.p50),
            cell(self.ttft_ms, |p| p.p95),
            cell(self.ttft_ms, |p| p.p99),
            bytes(self.bytes_loaded),
            bytes(self.bytes_reused),
            self.reused_share.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", share * 100.0)),
            self.resident_requests.to_string(),
            cell(self.activation_ms, |p| p.p50),
            cell(self.activation_ms, |p| p.p99),
        ]
    }
}

const HEADER: [&str; 12] = [
    "MODEL",
    "REQUESTS",
    "ERRORS",
    "TTFT p50",
    "p95",
    "p99",
    "LOADED",
    "REUSED",
    "REUSED %",
    "RESIDENT",
    "ACTIVATION p50",
    "p99",
];

/// Everything that `tangram bench switch` reports.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) settings: Settings,
    pub(super) server: ServerFigures,
    pub(super) wall_s: f64,
    pub(super) requests_per_s: f64,
    pub(super) prompt_tokens_per_s: f64,
    pub(super) completion_tokens_per_s: f64,
    pub(super) overall: Summary,
    /// By deployed name.
    pub(super) models: BTreeMap<String, Summary>,
    /// Messages of failed requests and how often each came.
    pub(super) errors: BTreeMap<String, usize>,
    /// The simulator's figures for the same requests, if they were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) simulated: Option<Agreement>,
}

impl Report {
    /// Sums up.
    pub(super) fn new(
        settings: Settings,
        server: ServerFigures,
        wall_s: f64,
        outcomes: &[Outcome],
    ) -> Report {
        let overall = Summary::of(outcomes.iter());
        let names = settings.models.values();
        let of_name = |name: &String| Summary::of(outcomes.iter().filter(|outcome| outcome.model == *name));
        let models = names.map(|name| (name.clone(), of_name(name))).collect();
        let mut errors = BTreeMap::new();
        for message in outcomes.iter().filter_map(|outcome| outcome.result.as_ref().err()) {
            *errors.entry(message.clone()).or_insert(0) += 1;
        }
        let rate = |count: f64| if wall_s > 0.0 { count / wall_s } else { 0.0 };
        Report {
            requests_per_s: rate((overall.requests - overall.errors) as f64),
            prompt_tokens_per_s: rate(overall.prompt_tokens as f64),
            completion_tokens_per_s: rate(overall.completion_tokens as f64),
            settings,
            server,
            wall_s,
            overall,
            models,
            errors,
            simulated: None,
        }
    }

    /// Prints the tables.
    pub(super) fn print(&self) {
        let (settings, server) = (&self.settings, &self.server);
        let cap = |cap: Option<usize>| {
            cap.map_or_else(|| "as in the trace".to_owned(), |cap| format!("at most {cap}"))
        };
        println!(
            "{} requests of {}, arrivals x {}, at most {} outstanding; prompt tokens {}, answer tokens {}{}",
            settings.requests,
            settings.trace,
            settings.time_scale,
            settings.concurrency,
            cap(settings.max_input),
            cap(settings.max_output),
            match settings.shortened_to_context {
                0 => String::new(),
                count => format!("; {count} requests shortened to their model's context"),
            }
        );
        let models = settings.models.iter().map(|(id, name)| format!("{id}={name}"));
        println!("models: {}", models.collect::<Vec<_>>().join(", "));
        println!(
            "{} with a pool of {}: {} evicted, {} preemptions",
            server.device,
            bytes(server.pool_bytes),
            bytes(server.bytes_evicted),
            server.preemptions
        );
        println!(
            "{:.1} s: {:.2} requests/s, {:.1} prompt tokens/s, {:.1} generated tokens/s\n",
            self.wall_s, self.requests_per_s, self.prompt_tokens_per_s, self.completion_tokens_per_s
        );
        let mut rows: Vec<_> = self.models.iter().map(|(name, summary)| summary.row(name)).collect();
        rows.push(self.overall.row("all"));
        table(&HEADER, &rows);
        println!(
            "(RESIDENT: requests that loaded nothing; ACTIVATION: their load phase, which includes waiting for bytes that \
             another request was loading already)"
        );
        let overall = &self.overall;
        let phases = [
            ("held back by --concurrency", overall.held_ms),
            ("queue", overall.queue_ms),
            ("load", overall.load_ms),
            ("prefill", overall.prefill_ms),
            ("decode", overall.decode_ms),
            ("TTFT at the client", overall.ttft_ms),
        ];
        let phase = |(name, percentiles): (&str, Option<Percentiles>)| {
            let Percentiles { p50, p95, p99 } = percentiles?;
            let mut row = vec![name.to_owned()];
            row.extend([p50, p95, p99].map(milliseconds));
            Some(row)
        };
        println!();
        table(&["PHASE", "p50", "p95", "p99"], &phases.into_iter().filter_map(phase).collect::<Vec<_>>());
        if let Some(simulated) = &self.simulated {
            println!(
                "\nsimulated: {} loaded and {} prefetched (live {} and {}; loaded: live / simulated = {:.3}), mean TTFT \
                 {} (live {}; {:.3})",
                bytes(simulated.simulated_bytes),
                bytes(simulated.simulated_prefetched_bytes),
                bytes(simulated.live_bytes),
                bytes(simulated.live_prefetched_bytes),
                simulated.bytes_ratio,
                milliseconds(simulated.simulated_mean_ttft_ms),
                milliseconds(simulated.live_mean_ttft_ms),
                simulated.ttft_ratio,
            );
        }
        if !self.errors.is_empty() {
            println!();
            let errors = self.errors.iter().map(|(message, count)| vec![count.to_string(), message.clone()]);
            table(&["COUNT", "ERROR"], &errors.collect::<Vec<_>>());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn percentiles(values: &[f64]) -> Option<Percentiles> {
        Percentiles::of(values.iter().copied())
    }

    #[test]
    fn nearest_rank() {
        assert_eq!(percentiles(&[]), None);
        assert_eq!(percentiles(&[3.0]), Some(Percentiles { p50: 3.0, p95: 3.0, p99: 3.0 }));
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentiles(&hundred), Some(Percentiles { p50: 50.0, p95: 95.0, p99: 99.0 }));
        assert_eq!(percentiles(&[4.0, 1.0, 3.0, 2.0]), Some(Percentiles { p50: 2.0, p95: 4.0, p99: 4.0 }));
    }

    proptest! {
        #[test]
        fn a_percentile_is_the_least_value_that_covers_its_share(values in prop::collection::vec(-1e6..1e6, 1..300)) {
            let Percentiles { p50, p95, p99 } = percentiles(&values).unwrap();
            for (value, percent) in [(p50, 50), (p95, 95), (p99, 99)] {
                let share = |limit: &dyn Fn(f64) -> bool| values.iter().filter(|v| limit(**v)).count() * 100;
                prop_assert!(share(&|v| v <= value) >= percent * values.len());
                prop_assert!(share(&|v| v < value) < percent * values.len());
            }
        }
    }

    #[test]
    fn sums_per_model_and_overall() {
        let outcome =
            |model: &str, ttft_ms: f64, load_ms: f64, bytes_loaded: u64, bytes_reused: u64| Outcome {
                model: model.to_owned(),
                result: Ok(Cost {
                    ttft_ms,
                    load_ms,
                    bytes_loaded,
                    bytes_reused,
                    prompt_tokens: 10,
                    completion_tokens: 5,
                    ..Cost::default()
                }),
            };
        let outcomes = [
            outcome("a", 100.0, 80.0, 300, 0),
            outcome("a", 10.0, 0.5, 0, 300),
            outcome("b", 50.0, 20.0, 100, 300),
            Outcome { model: "b".to_owned(), result: Err("no".to_owned()) },
        ];
        let settings = Settings {
            trace: "t.csv".to_owned(),
            requests: 4,
            time_scale: 0.0,
            concurrency: 1,
            max_input: None,
            max_output: Some(5),
            shortened_to_context: 0,
            models: [("0", "a"), ("1", "b"), ("2", "c")]
                .map(|(id, name)| (id.to_owned(), name.to_owned()))
                .into_iter()
                .collect(),
        };
        let server =
            ServerFigures { device: "cpu".to_owned(), pool_bytes: 1000, bytes_evicted: 5, preemptions: 0 };
        let report = Report::new(settings, server, 2.0, &outcomes);
        let overall = &report.overall;
        assert_eq!((overall.requests, overall.errors, overall.resident_requests), (4, 1, 1));
        assert_eq!((overall.bytes_loaded, overall.bytes_reused, overall.reused_share), (400, 600, Some(0.6)));
        assert_eq!(overall.activation_ms.map(|p| p.p99), Some(0.5));
        assert_eq!((report.completion_tokens_per_s, report.requests_per_s), (7.5, 1.5));
        assert_eq!(report.models["a"].ttft_ms.map(|p| (p.p50, p.p99)), Some((10.0, 100.0)));
        assert_eq!((report.models["b"].errors, report.models["c"].requests), (1, 0));
        assert_eq!(report.errors["no"], 1);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["models"]["c"]["ttft_ms"], serde_json::Value::Null);
        assert_eq!(json["settings"]["max_output"], 5);
    }
}
