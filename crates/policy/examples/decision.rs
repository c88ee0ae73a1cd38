//! What a decision costs on a node that knows very many tensors: 10,000 models of 100 tensors, of which 64 models'
//! worth fits. A request leases its model's tensors, evicts what it needs, and is over when the next one comes.
//! Prints the distribution of the time per request; run it with `--release`.

use std::time::Instant;

use tangram_policy::eviction::{self, Candidate};
use tangram_policy::{Event, Forecast, Retention, TensorKey};

const MODELS: u32 = 10_000;
const TENSORS: u32 = 100;
const ROOM: u64 = 64 * TENSORS as u64 * BYTES;
const BYTES: u64 = 100 << 20;
const REQUESTS: u32 = 200_000;

fn main() {
    let mut retention = Retention::new();
    let mut forecast = Forecast::new();
    let keys = |model: u32| (0..TENSORS).map(move |tensor| TensorKey(model * TENSORS + tensor));
    for model in 0..MODELS {
        for (depth, tensor) in keys(model).enumerate() {
            let depth = depth as f64 / f64::from(TENSORS);
            retention.apply(Event::Catalogued { tensor, bytes: BYTES, depth });
        }
    }
    let mut resident = vec![false; (MODELS * TENSORS) as usize];
    let (mut used, mut evicted, mut state) = (0, 0u64, 1u64);
    let mut micros: Vec<f64> = Vec::with_capacity(REQUESTS as usize);
    for request in 0..REQUESTS {
        // Popularity falls with the square: about one request in two finds its model.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let uniform = (state >> 11) as f64 / (1u64 << 53) as f64;
        let model = ((f64::from(MODELS) + 1.0).powf(uniform * uniform) as u32 - 1).min(MODELS - 1);
        let now = f64::from(request);
        let started = Instant::now();
        forecast.observe(model);
        let boost = forecast.boost(model);
        let mut needed = 0;
        for tensor in keys(model) {
            retention.apply(Event::Leased { tensor, at: now });
            needed += if resident[tensor.0 as usize] { 0 } else { BYTES };
        }
        let shortage = (used + needed).saturating_sub(ROOM);
        let candidate = |tensor: TensorKey| Candidate {
            tensor,
            bytes: BYTES,
            log2_worth: retention.log2_worth(tensor).unwrap_or(f64::NEG_INFINITY),
        };
        let victims = eviction::choose(retention.idle().map(candidate), shortage);
        for &tensor in &victims {
            retention.apply(Event::Evicted { tensor });
        }
        std::hint::black_box(boost);
        for tensor in keys(model) {
            retention.apply(Event::Idle { tensor });
        }
        micros.push(started.elapsed().as_secs_f64() * 1e6);
        used = used + needed - victims.len() as u64 * BYTES;
        evicted += victims.len() as u64;
        victims.iter().for_each(|tensor| resident[tensor.0 as usize] = false);
        keys(model).for_each(|tensor| resident[tensor.0 as usize] = true);
    }
    micros.sort_by(f64::total_cmp);
    let at = |share: f64| micros[((micros.len() - 1) as f64 * share) as usize];
    println!(
        "{MODELS} models, {} tensors, {REQUESTS} requests, {evicted} evictions; per request: mean {:.1} us, \
         p50 {:.1} us, p99 {:.1} us, p99.9 {:.1} us",
        MODELS * TENSORS,
        micros.iter().sum::<f64>() / micros.len() as f64,
        at(0.5),
        at(0.99),
        at(0.999)
    );
}
