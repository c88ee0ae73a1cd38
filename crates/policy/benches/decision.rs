//! What a decision costs on a node that knows very many tensors: 10,000 models of 100 tensors, of which 64 models'
//! worth fits. A request leases its model's tensors, evicts what it needs, and is over when the next one comes.
//!
//! `cargo bench -p tangram-policy --bench decision`. Criterion reports means; the percentiles of single decisions, which
//! the bound of 50 µs is about, are printed after them.

use std::time::{Duration, Instant};

use criterion::Criterion;
use tangram_policy::eviction::{self, Candidate};
use tangram_policy::{Event, Forecast, Retention, TensorKey};

const MODELS: u32 = 10_000;
const TENSORS: u32 = 100;
const BYTES: u64 = 100 << 20;
const ROOM: u64 = 64 * TENSORS as u64 * BYTES;
/// Requests before anything is measured: every popular model has been here.
const WARM_UP: u32 = 50_000;
/// Decisions of which the percentiles are.
const MEASURED: u32 = 200_000;

fn keys(model: u32) -> impl Iterator<Item = TensorKey> {
    (0..TENSORS).map(move |tensor| TensorKey(model * TENSORS + tensor))
}

struct Node {
    retention: Retention,
    forecast: Forecast,
    resident: Vec<bool>,
    used: u64,
    evicted: u64,
    requests: u32,
    random: u64,
}

impl Node {
    fn new() -> Node {
        let mut retention = Retention::new();
        for model in 0..MODELS {
            for (depth, tensor) in keys(model).enumerate() {
                let depth = depth as f64 / f64::from(TENSORS);
                retention.apply(Event::Catalogued { tensor, bytes: BYTES, depth });
            }
        }
        let resident = vec![false; (MODELS * TENSORS) as usize];
        let forecast = Forecast::new();
        let mut node = Node { retention, forecast, resident, used: 0, evicted: 0, requests: 0, random: 1 };
        for _ in 0..WARM_UP {
            node.request();
        }
        node
    }

    /// Everything that the policy is asked and told for one request; the time that this takes.
    fn request(&mut self) -> Duration {
        // Popularity falls with the square: about one request in two finds its model.
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = (self.random >> 11) as f64 / (1u64 << 53) as f64;
        let model = ((f64::from(MODELS) + 1.0).powf(uniform * uniform) as u32 - 1).min(MODELS - 1);
        let now = f64::from(self.requests);
        self.requests += 1;
        let missing = keys(model).filter(|tensor| !self.resident[tensor.0 as usize]).count() as u64;
        let started = Instant::now();
        let retention = &mut self.retention;
        self.forecast.observe(model);
        std::hint::black_box(self.forecast.boost(model));
        for tensor in keys(model) {
            retention.apply(Event::Leased { tensor, at: now });
        }
        let shortage = (self.used + missing * BYTES).saturating_sub(ROOM);
        let candidate = |tensor: TensorKey| Candidate {
            tensor,
            bytes: BYTES,
            log2_worth: retention.log2_worth(tensor).unwrap_or(f64::NEG_INFINITY),
        };
        let victims = eviction::choose(retention.idle().map(candidate), shortage);
        for &tensor in &victims {
            retention.apply(Event::Evicted { tensor });
        }
        for tensor in keys(model) {
            retention.apply(Event::Idle { tensor });
        }
        let took = started.elapsed();
        self.used = self.used + missing * BYTES - victims.len() as u64 * BYTES;
        self.evicted += victims.len() as u64;
        victims.iter().for_each(|tensor| self.resident[tensor.0 as usize] = false);
        keys(model).for_each(|tensor| self.resident[tensor.0 as usize] = true);
        took
    }
}

fn main() {
    let mut node = Node::new();
    let mut criterion = Criterion::default().configure_from_args();
    criterion.bench_function("decision, 10,000 models, 1,000,000 tensors", |bencher| {
        bencher.iter_custom(|iterations| (0..iterations).map(|_| node.request()).sum());
    });
    criterion.final_summary();
    let before = node.evicted;
    let mut micros: Vec<f64> = (0..MEASURED).map(|_| node.request().as_secs_f64() * 1e6).collect();
    micros.sort_by(f64::total_cmp);
    let at = |share: f64| micros[((micros.len() - 1) as f64 * share) as usize];
    println!(
        "{MEASURED} decisions, {:.0} evictions each: mean {:.1} us, p50 {:.1} us, p95 {:.1} us, p99 {:.1} us, \
         p99.9 {:.1} us",
        (node.evicted - before) as f64 / f64::from(MEASURED),
        micros.iter().sum::<f64>() / f64::from(MEASURED),
        at(0.5),
        at(0.95),
        at(0.99),
        at(0.999)
    );
}
