//! What a soak counted, what the server held while it was idle, and what of that is a leak.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tangram_gateway::ProcessStatus;
use tangram_node::NodeStatus;

use super::super::report::Percentiles;
use crate::output::{bytes, milliseconds, table};

/// Private memory may grow by this share of what it was after the first round, and by these bytes: allocators keep
/// what was freed, and the largest batch so far may still come.
const GROWTH_SHARE: f64 = 0.1;
const GROWTH_BYTES: u64 = 32 << 20;

/// Bytes of the pool that nobody accounts for may grow by this share of it: what rounding to pages leaves between the
/// residents differs from moment to moment.
const LOST_SHARE: f64 = 0.05;

/// Different violations that are kept; the rest is counted together.
const MOST_VIOLATIONS: usize = 50;

/// Durations that are kept per phase: the first ones, then every so many, so that the report does not grow with time.
const MOST_DURATIONS: usize = 20_000;

/// The server while nothing ran.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Sample {
    /// Since the load began.
    pub(super) after_s: f64,
    /// Sent so far.
    pub(super) requests: usize,
    /// Absent where the system does not say.
    pub(super) process: Option<ProcessStatus>,
    pub(super) running: usize,
    pub(super) waiting: usize,
    pub(super) leased_bytes: u64,
    /// In use by sequences.
    pub(super) kv_blocks: u64,
    /// Of preempted sequences.
    pub(super) host_kv_bytes: u64,
    pub(super) pool_bytes: u64,
    pub(super) pool_free_bytes: u64,
    pub(super) pool_weight_bytes: u64,
    pub(super) pool_cached_kv_bytes: u64,
    /// Of the pool, bytes that are neither free nor held by anything.
    pub(super) pool_lost_bytes: u64,
}

impl Sample {
    /// From what the server says.
    pub(super) fn new(
        after: Duration,
        requests: usize,
        node: &NodeStatus,
        process: Option<ProcessStatus>,
    ) -> Sample {
        let held = node.free_bytes + node.resident_bytes + node.kv_bytes + node.kv_cached_bytes;
        Sample {
            after_s: after.as_secs_f64(),
            requests,
            process,
            running: node.running,
            waiting: node.waiting,
            leased_bytes: node.leased_bytes,
            kv_blocks: node.kv_blocks,
            host_kv_bytes: node.host_kv_bytes,
            pool_bytes: node.pool_bytes,
            pool_free_bytes: node.free_bytes,
            pool_weight_bytes: node.resident_bytes,
            pool_cached_kv_bytes: node.kv_cached_bytes,
            pool_lost_bytes: node.pool_bytes.saturating_sub(held),
        }
    }

    /// Whether nothing is held for any request.
    pub(super) fn is_idle(&self) -> bool {
        self.running == 0
            && self.waiting == 0
            && self.leased_bytes == 0
            && self.kv_blocks == 0
            && self.host_kv_bytes == 0
    }

    /// Whether no more files are open and no more threads run.
    pub(super) fn holds_no_more_than(&self, first: &Sample) -> bool {
        let (Some(now), Some(then)) = (self.process, first.process) else { return true };
        now.open_files <= then.open_files && now.threads <= then.threads
    }

    /// What this sample holds that it must not, when `first` was taken after the first round.
    fn leaks(&self, first: &Sample) -> Vec<String> {
        let mut leaks = Vec::new();
        if !self.is_idle() {
            leaks.push(format!(
                "after the load the server is not idle: {} running, {} waiting, {} leased, {} KV blocks, {} of KV in \
                 host memory",
                self.running,
                self.waiting,
                bytes(self.leased_bytes),
                self.kv_blocks,
                bytes(self.host_kv_bytes)
            ));
        }
        let lost = self.pool_lost_bytes.saturating_sub(first.pool_lost_bytes);
        if lost as f64 > self.pool_bytes as f64 * LOST_SHARE {
            leaks.push(format!("{} more of the pool are neither free nor held by anything", bytes(lost)));
        }
        if let (Some(now), Some(then)) = (self.process, first.process) {
            if !self.holds_no_more_than(first) {
                leaks.push(format!(
                    "{} open files and {} threads, after the first round {} and {}",
                    now.open_files, now.threads, then.open_files, then.threads
                ));
            }
            let allowed = GROWTH_BYTES.max((then.private_bytes as f64 * GROWTH_SHARE) as u64);
            let grown = now.private_bytes.saturating_sub(then.private_bytes);
            if grown > allowed {
                leaks.push(format!(
                    "private memory grew by {} since the first round, {:.0} bytes per request",
                    bytes(grown),
                    grown as f64 / (self.requests - first.requests).max(1) as f64
                ));
            }
        }
        leaks
    }
}

/// Durations of a phase, thinned out as they become many.
#[derive(Debug, Default)]
struct Durations {
    kept: Vec<f64>,
    seen: usize,
    /// Of so many, one is kept.
    stride: usize,
}

impl Durations {
    fn add(&mut self, milliseconds: f64) {
        let stride = self.stride.max(1);
        if self.seen.is_multiple_of(stride) {
            self.kept.push(milliseconds);
        }
        self.seen += 1;
        if self.kept.len() >= MOST_DURATIONS {
            let mut odd = false;
            self.kept.retain(|_| {
                odd = !odd;
                odd
            });
            self.stride = stride * 2;
        }
    }
}

/// Requests of a kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Count {
    pub(super) sent: usize,
    /// Of these, requests whose client left before the answer.
    pub(super) left: usize,
}

/// What clients count.
#[derive(Debug, Default)]
pub(super) struct Tally {
    kinds: BTreeMap<&'static str, Count>,
    models: BTreeMap<String, usize>,
    phases: [Durations; PHASES.len()],
    violations: BTreeMap<String, usize>,
}

/// Names in the usage, and in the table.
const PHASES: [(&str, &str); 5] = [
    ("queue_ms", "queue"),
    ("load_ms", "load"),
    ("prefill_ms", "prefill"),
    ("decode_ms", "decode"),
    ("ttft_ms", "first token"),
];

impl Tally {
    /// Counts a request that is over.
    pub(super) fn count(&mut self, model: &str, kind: &'static str, left: bool) {
        let count = self.kinds.entry(kind).or_default();
        count.sent += 1;
        count.left += usize::from(left);
        *self.models.entry(model.to_owned()).or_default() += 1;
    }

    /// Adds where a request's time went, as its usage says.
    pub(super) fn phases(&mut self, usage: &Value) {
        for (durations, (name, _)) in self.phases.iter_mut().zip(PHASES) {
            if let Some(milliseconds) = usage[name].as_f64() {
                durations.add(milliseconds);
            }
        }
    }

    /// Notes something that must not be.
    pub(super) fn violation(&mut self, what: String) {
        let known = self.violations.contains_key(&what) || self.violations.len() < MOST_VIOLATIONS;
        let what = if known { what } else { "others".to_owned() };
        *self.violations.entry(what).or_default() += 1;
    }

    /// Adds what another client counted.
    pub(super) fn add(&mut self, other: Tally) {
        for (kind, count) in other.kinds {
            let sum = self.kinds.entry(kind).or_default();
            sum.sent += count.sent;
            sum.left += count.left;
        }
        for (model, count) in other.models {
            *self.models.entry(model).or_default() += count;
        }
        for (sum, durations) in self.phases.iter_mut().zip(other.phases) {
            durations.kept.into_iter().for_each(|milliseconds| sum.add(milliseconds));
        }
        for (what, count) in other.violations {
            for _ in 0..count {
                self.violation(what.clone());
            }
        }
    }

    /// Requests sent.
    pub(super) fn sent(&self) -> usize {
        self.kinds.values().map(|count| count.sent).sum()
    }
}

/// What the server counted during the soak.
#[derive(Debug, Default, Serialize)]
pub(super) struct Pressure {
    pub(super) bytes_loaded: u64,
    pub(super) bytes_reused: u64,
    pub(super) bytes_evicted: u64,
    pub(super) bytes_moved: u64,
    pub(super) preemptions: u64,
    pub(super) swaps: u64,
    pub(super) cached_tokens: u64,
    pub(super) activations: u64,
}

/// Everything that `tangram bench soak` reports.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Layout and size of the pool.
    pub(super) backend: String,
    pub(super) pool_bytes: u64,
    pub(super) requests: usize,
    pub(super) kinds: BTreeMap<&'static str, Count>,
    /// Requests by deployed name.
    pub(super) models: BTreeMap<String, usize>,
    pub(super) pressure: Pressure,
    pub(super) phases_ms: BTreeMap<&'static str, Percentiles>,
    /// One per round of load.
    pub(super) samples: Vec<Sample>,
    /// What must not have been, and how often it was.
    pub(super) violations: BTreeMap<String, usize>,
    #[serde(skip)]
    pub(super) tally: Tally,
}

impl Report {
    /// An empty report over these models.
    pub(super) fn new(models: Vec<String>) -> Report {
        Report {
            backend: String::new(),
            pool_bytes: 0,
            requests: 0,
            kinds: BTreeMap::new(),
            models: models.into_iter().map(|name| (name, 0)).collect(),
            pressure: Pressure::default(),
            phases_ms: BTreeMap::new(),
            samples: Vec::new(),
            violations: BTreeMap::new(),
            tally: Tally::default(),
        }
    }

    /// Sums up, given the server's figures before and after.
    pub(super) fn finish(&mut self, before: &NodeStatus, after: &NodeStatus) {
        if let [first, .., last] = self.samples.as_slice() {
            for leak in last.leaks(first) {
                self.tally.violation(leak);
            }
        }
        let tally = std::mem::take(&mut self.tally);
        self.backend = after.backend.clone();
        self.pool_bytes = after.pool_bytes;
        self.requests = tally.sent();
        self.kinds = tally.kinds;
        self.models.extend(tally.models);
        self.violations = tally.violations;
        let durations = tally.phases.into_iter().zip(PHASES);
        self.phases_ms = durations
            .filter_map(|(durations, (_, name))| Some((name, Percentiles::of(durations.kept.into_iter())?)))
            .collect();
        let since = |figure: fn(&NodeStatus) -> u64| figure(after).saturating_sub(figure(before));
        self.pressure = Pressure {
            bytes_loaded: since(|node| node.bytes_loaded_total),
            bytes_reused: since(|node| node.bytes_reused_total),
            bytes_evicted: since(|node| node.bytes_evicted_total),
            bytes_moved: since(|node| node.bytes_moved_total),
            preemptions: since(|node| node.preemptions_total),
            swaps: since(|node| node.swaps_total),
            cached_tokens: since(|node| node.cached_tokens_total),
            activations: since(|node| node.activations_total),
        };
    }

    /// Prints the tables.
    pub(super) fn print(&self) {
        let pressure = &self.pressure;
        println!(
            "{} requests to {} models in a pool of {} ({}): {} loaded, {} reused, {} evicted, {} moved, {} preemptions \
             ({} to host memory), {} cached prompt tokens, {} activations\n",
            self.requests,
            self.models.len(),
            bytes(self.pool_bytes),
            self.backend,
            bytes(pressure.bytes_loaded),
            bytes(pressure.bytes_reused),
            bytes(pressure.bytes_evicted),
            bytes(pressure.bytes_moved),
            pressure.preemptions,
            pressure.swaps,
            pressure.cached_tokens,
            pressure.activations
        );
        let kinds = self.kinds.iter();
        let kinds = kinds
            .map(|(kind, count)| vec![(*kind).to_owned(), count.sent.to_string(), count.left.to_string()]);
        table(&["KIND", "SENT", "LEFT EARLY"], &kinds.collect::<Vec<_>>());
        println!();
        let models = self.models.iter().map(|(name, count)| vec![name.clone(), count.to_string()]);
        table(&["MODEL", "REQUESTS"], &models.collect::<Vec<_>>());
        println!();
        let phases = self.phases_ms.iter().map(|(name, Percentiles { p50, p95, p99 })| {
            let mut row = vec![(*name).to_owned()];
            row.extend([p50, p95, p99].map(|ms| milliseconds(*ms)));
            row
        });
        table(&["PHASE", "p50", "p95", "p99"], &phases.collect::<Vec<_>>());
        println!("\nidle after each round of load:");
        let rows = self.samples.iter().map(|sample| {
            let process = sample.process.unwrap_or_default();
            vec![
                format!("{:.0} s", sample.after_s),
                sample.requests.to_string(),
                bytes(process.private_bytes),
                bytes(process.resident_bytes),
                process.open_files.to_string(),
                process.threads.to_string(),
                bytes(sample.leased_bytes),
                sample.kv_blocks.to_string(),
                bytes(sample.pool_weight_bytes),
                bytes(sample.pool_cached_kv_bytes),
                bytes(sample.pool_free_bytes),
                bytes(sample.pool_lost_bytes),
            ]
        });
        let header = [
            "AFTER",
            "REQUESTS",
            "PRIVATE",
            "RESIDENT",
            "FILES",
            "THREADS",
            "LEASED",
            "KV BLOCKS",
            "WEIGHTS",
            "CACHED KV",
            "FREE",
            "LOST",
        ];
        table(&header, &rows.collect::<Vec<_>>());
        if self.violations.is_empty() {
            println!("\nno violation");
        } else {
            println!();
            let rows = self.violations.iter().map(|(what, count)| vec![count.to_string(), what.clone()]);
            table(&["COUNT", "VIOLATION"], &rows.collect::<Vec<_>>());
        }
        if pressure.bytes_evicted == 0 {
            println!("\n(nothing was evicted: a pool too small for all models is the harder test)");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(private_mib: u64, open_files: u64, node: NodeStatus) -> Sample {
        let process = ProcessStatus {
            resident_bytes: private_mib << 21,
            private_bytes: private_mib << 20,
            open_files,
            threads: 9,
        };
        Sample::new(Duration::from_secs(60), private_mib as usize, &node, Some(process))
    }

    #[test]
    fn what_is_a_leak_and_what_is_not() {
        let idle =
            || NodeStatus { pool_bytes: 1000, free_bytes: 200, resident_bytes: 790, ..NodeStatus::default() };
        let first = sample(100, 30, idle());
        assert_eq!(sample(131, 30, idle()).leaks(&first), Vec::<String>::new());
        for (last, word) in [
            (sample(140, 30, idle()), "private memory grew by 40.0 MiB"),
            (sample(100, 31, idle()), "31 open files"),
            (sample(100, 30, NodeStatus { leased_bytes: 1, ..idle() }), "not idle"),
            (sample(100, 30, NodeStatus { kv_blocks: 2, ..idle() }), "2 KV blocks"),
            (sample(100, 30, NodeStatus { running: 1, ..idle() }), "1 running"),
            (sample(100, 30, NodeStatus { free_bytes: 140, ..idle() }), "60 B more of the pool"),
        ] {
            let leaks = last.leaks(&first);
            assert!(leaks.len() == 1 && leaks[0].contains(word), "{word}: {leaks:?}");
        }
        let rounded = sample(100, 30, NodeStatus { free_bytes: 160, ..idle() });
        assert!(rounded.leaks(&first).is_empty(), "pages are rounded");
        let big = sample(1000, 30, idle());
        assert!(sample(1090, 30, idle()).leaks(&big).is_empty(), "a share of what is there already");
    }

    #[test]
    fn durations_are_thinned_evenly() {
        let mut durations = Durations::default();
        (0..100_000).for_each(|number| durations.add(f64::from(number)));
        assert!(durations.kept.len() < MOST_DURATIONS);
        let percentiles = Percentiles::of(durations.kept.into_iter()).unwrap();
        assert!((percentiles.p50 - 50_000.0).abs() < 100.0, "{percentiles:?}");
    }

    #[test]
    fn tallies_add_up_and_violations_stay_bounded() {
        let (mut sum, mut other) = (Tally::default(), Tally::default());
        sum.count("a", "chat", false);
        other.count("a", "chat", true);
        other.count("b", "invalid", false);
        (0..100).for_each(|number| other.violation(format!("violation {number}")));
        sum.add(other);
        assert_eq!((sum.sent(), sum.kinds["chat"]), (3, Count { sent: 2, left: 1 }));
        assert_eq!(sum.models["a"], 2);
        assert!(sum.violations.len() <= MOST_VIOLATIONS + 1, "{}", sum.violations.len());
        assert_eq!(sum.violations.values().sum::<usize>(), 100);
    }
}
