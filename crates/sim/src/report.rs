//! What a run recorded, and the figures made of it.

use serde::Serialize;

use crate::trace::{Nanos, seconds};

/// One request's course. Times are simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Index in the trace.
    pub request: u32,
    /// Device that served it.
    pub device: u32,
    /// Its model.
    pub model: u32,
    /// When it arrived.
    pub arrival: Nanos,
    /// When the device turned to it.
    pub start: Nanos,
    /// From the start until its last missing byte was there, moves included; 0 if nothing was missing.
    pub load: Nanos,
    /// From the start to the first token, less the time that prefill computes: the exposed load.
    pub stall: Nanos,
    /// When its first token was there.
    pub first_token: Nanos,
    /// When its last token was there.
    pub finish: Nanos,
    /// Bytes of its model.
    pub weight_bytes: u64,
    /// Bytes that were missing at its start.
    pub loaded_bytes: u64,
    /// Resident bytes moved to make contiguous room for it.
    pub moved_bytes: u64,
    /// Real nanoseconds that policy code took since the start before.
    pub thinking: u64,
}

/// What a device held at a moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Residency {
    /// Seconds.
    pub at: f64,
    /// Resident bytes of the first models (a byte that two of them share counts for both).
    pub bytes: Vec<u64>,
}

/// All that a run recorded.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Name of the system.
    pub system: String,
    /// In the order of their starts.
    pub records: Vec<Record>,
    /// When the last request ended.
    pub end: Nanos,
    /// Bytes brought in without a request.
    pub fetched_bytes: u64,
    /// Bytes moved for those.
    pub background_moved_bytes: u64,
    /// Bytes evicted.
    pub evicted_bytes: u64,
    /// Device 0 over time.
    pub residency: Vec<Residency>,
    /// The event log, if it was asked for.
    pub log: Option<String>,
}

/// Mean and percentiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Distribution {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Distribution {
    /// Of these values; all 0 if there are none. The q-th percentile is the smallest value that at least q of all
    /// values do not exceed.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (share * sorted.len() as f64).ceil() as usize;
            sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        let mean = sorted.iter().sum::<f64>() / sorted.len().max(1) as f64;
        Distribution { mean, p50: at(0.50), p95: at(0.95), p99: at(0.99), max: at(1.0) }
    }
}

/// The figures of one system.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Its name.
    pub system: String,
    /// Requests served.
    pub requests: usize,
    /// From a request's start until its bytes are there, ms.
    pub load_ms: Distribution,
    /// Of the time to the first token after the start, what is not computing, ms.
    pub exposed_ms: Distribution,
    /// From arrival to the first token, queueing included, ms.
    pub ttft_ms: Distribution,
    /// From the start to the first token, ms.
    pub service_ms: Distribution,
    /// Bytes of all models asked for.
    pub asked_bytes: u64,
    /// Bytes that requests had to load.
    pub loaded_bytes: u64,
    /// Bytes prefetched.
    pub fetched_bytes: u64,
    /// Share of the bytes asked for that were there when a request started.
    pub avoided: f64,
    /// Requests that missed nothing.
    pub full_hits: usize,
    /// Resident bytes moved to make contiguous room.
    pub moved_bytes: u64,
    /// Bytes evicted.
    pub evicted_bytes: u64,
    /// Real time of policy code per request, µs; not deterministic.
    pub decision_us: Distribution,
    /// Simulated seconds until the last answer ended.
    pub makespan_s: f64,
}

impl Recorded {
    /// The figures.
    pub fn summary(&self) -> Summary {
        let records = &self.records;
        let milliseconds =
            |of: fn(&Record) -> Nanos| Distribution::of(records.iter().map(|r| seconds(of(r)) * 1e3));
        let sum = |of: fn(&Record) -> u64| records.iter().map(of).sum::<u64>();
        let (asked, loaded) = (sum(|r| r.weight_bytes), sum(|r| r.loaded_bytes));
        Summary {
            system: self.system.clone(),
            requests: records.len(),
            load_ms: milliseconds(|r| r.load),
            exposed_ms: milliseconds(|r| r.stall),
            ttft_ms: milliseconds(|r| r.first_token - r.arrival),
            service_ms: milliseconds(|r| r.first_token - r.start),
            asked_bytes: asked,
            loaded_bytes: loaded,
            fetched_bytes: self.fetched_bytes,
            avoided: 1.0 - loaded as f64 / asked.max(1) as f64,
            full_hits: records.iter().filter(|r| r.loaded_bytes == 0).count(),
            moved_bytes: sum(|r| r.moved_bytes) + self.background_moved_bytes,
            evicted_bytes: self.evicted_bytes,
            decision_us: Distribution::of(records.iter().map(|r| r.thinking as f64 / 1e3)),
            makespan_s: seconds(self.end),
        }
    }
}

/// A table of the figures, one system a line.
pub fn table(summaries: &[Summary]) -> String {
    let width = summaries.iter().map(|summary| summary.system.len()).max().unwrap_or(0).max(6);
    let mut text = format!(
        "{:width$} {:>7} {:>8} {:>7} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>7} {:>7} {:>7} {:>7} {:>7}\n",
        "system",
        "load",
        "exposed",
        "p50",
        "p95",
        "p99",
        "ttft",
        "p50",
        "p95",
        "p99",
        "avoided",
        "loaded",
        "fetched",
        "moved",
        "dec.",
        "p99"
    );
    text += &format!(
        "{:width$} {:>7} {:>8} {:>7} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>7} {:>7} {:>7} {:>7} {:>7}\n",
        "", "ms", "ms", "ms", "ms", "ms", "ms", "ms", "ms", "ms", "%", "TB", "TB", "TB", "us", "us"
    );
    for s in summaries {
        let tb = |bytes: u64| bytes as f64 / 1e12;
        text += &format!(
            "{:width$} {:>7.1} {:>8.1} {:>7.1} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>8.1} {:>7.3} {:>7.3} \
             {:>7.3} {:>7.1} {:>7.1}\n",
            s.system,
            s.load_ms.mean,
            s.exposed_ms.mean,
            s.exposed_ms.p50,
            s.exposed_ms.p95,
            s.exposed_ms.p99,
            s.ttft_ms.mean,
            s.ttft_ms.p50,
            s.ttft_ms.p95,
            s.ttft_ms.p99,
            s.avoided * 100.0,
            tb(s.loaded_bytes),
            tb(s.fetched_bytes),
            tb(s.moved_bytes),
            s.decision_us.mean,
            s.decision_us.p99,
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles() {
        let distribution = Distribution::of((1..=100).map(f64::from));
        assert_eq!(distribution, Distribution { mean: 50.5, p50: 50.0, p95: 95.0, p99: 99.0, max: 100.0 });
        assert_eq!(Distribution::of([]), Distribution::default());
        assert_eq!(Distribution::of([7.0]).p99, 7.0);
    }
}
