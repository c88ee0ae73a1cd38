//! Two models of one shape that take turns in a pool with room for one: cold from pinned host memory, resident, prefill and
//! decoding.

use std::error::Error;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use serde_json::json;
use tangram_device::cuda::Driver;
use tangram_node::{Arrived, Backend, Computed, Node, NodeConfig, Observer, Trial};

use crate::alone::first_token;
use crate::ask::{ask, close, config, exposed, finish, model, run as request};
use crate::link::{self, Limits};
use crate::report::{Goal, goal, mean, percentile, say};
use crate::shapes::{Shape, describe, fill};

/// Cold starts.
const COLD_ROUNDS: usize = 6;
/// Times that a resident first token is measured.
const RESIDENT_ROUNDS: usize = 15;
/// Sequences that decode together.
const BATCHES: [usize; 2] = [1, 32];
const DECODED: usize = 64;

pub(crate) fn run(driver: &Arc<Driver>, shape: &Shape, path: &Path) -> Result<(), Box<dyn Error>> {
    let measured = measure(driver, shape, path);
    let _ = std::fs::remove_dir_all(path);
    measured
}

fn measure(driver: &Arc<Driver>, shape: &Shape, path: &Path) -> Result<(), Box<dyn Error>> {
    let name = shape.name;
    let prompt = if shape.is_tiny() { 16 } else { 1024 };
    let limits = link::measure(driver, if shape.is_tiny() { 8 << 20 } else { 1 << 30 })?;
    say(
        name,
        "limits",
        json!({ "plain_upload_gb_per_s": limits.upload / 1e9, "memory_gb_per_s": limits.memory / 1e9 }),
    );
    let alone = first_token(driver, shape, &path.join("alone"), prompt)?;
    say(name, "first_token_of_the_executor_alone", json!({ "prompt": prompt, "median_seconds": alone }));
    describe(&["a", "b"].map(|of| (of.to_owned(), *shape)), path)?;
    // Room for one, its keys and values, and no more.
    let pool = shape.bytes() + if shape.is_tiny() { 6 << 20 } else { 1536 << 20 };
    let block = (2 * shape.largest()).max(8 << 20) as usize;
    let with = |backend: Backend, observer: Option<Arc<dyn Observer>>| NodeConfig {
        device_memory: Some(pool),
        backend,
        trial: Trial { weights: Some((block, fill())), ..Trial::default() },
        observer,
        ..config(driver, path)
    };
    for backend in [Backend::Paged, Backend::Segment] {
        let started = Instant::now();
        let node = Node::open(with(backend, None))?;
        let layout = node.status().backend;
        let seconds = started.elapsed().as_secs_f64();
        say(
            name,
            "node_opened",
            json!({ "layout": layout, "seconds": seconds, "pool_bytes": node.pool_bytes() }),
        );
        let resident = resident(&node, shape, prompt, alone)?;
        cold(&node, shape, prompt, limits, resident)?;
        if backend == Backend::Paged {
            prefill(&node, shape, prompt)?;
            decode(&node, shape, limits)?;
            say(name, "status", json!({ "scratch_bytes": node.status().scratch_bytes }));
        }
        close(node);
        let watch = Arc::new(Watch::default());
        let node = Node::open(with(backend, Some(watch.clone())))?;
        start_of_computing(&node, shape, prompt, &watch)?;
        close(node);
    }
    Ok(())
}

/// First tokens when everything is there; gives the median of their seconds.
fn resident(node: &Node, shape: &Shape, prompt: usize, alone: f64) -> Result<f64, Box<dyn Error>> {
    let model = model(node, "a")?;
    request(node, ask(&model, prompt, 1, 1))?;
    let (mut seconds, mut activations) = (Vec::new(), Vec::new());
    for round in 0..RESIDENT_ROUNDS {
        // Other tokens each time, or the prefix would be found.
        let timing = request(node, ask(&model, prompt, 1, 2 + round))?;
        seconds.push(timing.first_token.as_secs_f64());
        activations.push(timing.load.as_secs_f64() * 1e3);
    }
    let median = percentile(seconds.iter().copied(), 50);
    let (typical, most) =
        (percentile(activations.iter().copied(), 50), percentile(activations.into_iter(), 100));
    say(
        shape.name,
        "resident_first_token",
        json!({
            "layout": node.status().backend, "prompt": prompt, "median_seconds": median, "least_seconds": percentile(seconds.into_iter(), 1),
            "activation_median_ms": typical, "activation_most_ms": most,
        }),
    );
    let layout = node.status().backend;
    goal(2, &format!("activation of a resident model ({layout}), ms, median"), typical, Goal::AtMost(1.0));
    let beside = median / alone;
    goal(
        3,
        &format!("resident first token beside the executor alone ({layout})"),
        beside,
        Goal::AtMost(1.02),
    );
    Ok(median)
}

fn cold(
    node: &Node,
    shape: &Shape,
    prompt: usize,
    limits: Limits,
    resident: f64,
) -> Result<(), Box<dyn Error>> {
    let (mut over, mut rates) = (Vec::new(), Vec::new());
    for round in 0..COLD_ROUNDS {
        let of = model(node, if round % 2 == 0 { "b" } else { "a" })?;
        let timing = request(node, ask(&of, prompt, 1, 40 + round))?;
        let (bytes, load) = (timing.bytes_loaded as f64, timing.load.as_secs_f64());
        let first_token = timing.first_token.as_secs_f64();
        // What a resident request does not wait for, and the bytes.
        let bound = 1.05 * (bytes / limits.upload).max(resident) + 0.01;
        over.push(first_token / bound);
        rates.push(bytes / load.max(1e-9));
        say(
            shape.name,
            "cold_first_token_from_host_memory",
            json!({
                "seconds": first_token, "load_seconds": load, "exposed_seconds": exposed(&timing),
                "computing_seconds": timing.prefill.as_secs_f64(), "bytes_loaded": timing.bytes_loaded,
                "bound_seconds": bound,
            }),
        );
    }
    let rate = percentile(rates.into_iter(), 50);
    let (layout, beside) = (node.status().backend, rate / limits.upload);
    goal(2, &format!("load from host memory beside a plain copy ({layout})"), beside, Goal::AtLeast(0.95));
    let what = format!("cold first token / (1.05 max(bytes/link, prefill) + 10 ms) ({layout})");
    goal(3, &what, percentile(over.into_iter(), 50), Goal::AtMost(1.0));
    Ok(())
}

fn prefill(node: &Node, shape: &Shape, prompt: usize) -> Result<(), Box<dyn Error>> {
    let model = model(node, "a")?;
    request(node, ask(&model, 1, 1, 60))?;
    let timings = (0..3).map(|round| request(node, ask(&model, 2 * prompt, 1, 61 + round)));
    let seconds = timings.map(|timing| Ok(timing?.prefill.as_secs_f64()));
    let seconds = percentile(seconds.collect::<Result<Vec<f64>, Box<dyn Error>>>()?.into_iter(), 50);
    say(
        shape.name,
        "prefill",
        json!({
            "tokens": 2 * prompt, "seconds": seconds, "tokens_per_second": (2 * prompt) as f64 / seconds,
            "tflop_per_s": shape.operations(2 * prompt) / seconds / 1e12,
        }),
    );
    Ok(())
}

fn decode(node: &Node, shape: &Shape, limits: Limits) -> Result<(), Box<dyn Error>> {
    let model = model(node, "a")?;
    for batch in BATCHES {
        // Sequences that decode together, from prompts of a block each.
        let all = (0..batch).map(|index| node.generate(ask(&model, 16, DECODED, 100 + index)));
        let all = all.collect::<Result<Vec<_>, _>>()?;
        let timings = all.into_iter().map(finish).collect::<Result<Vec<_>, _>>()?;
        let seconds = timings.iter().map(|timing| timing.decode.as_secs_f64()).fold(0.0, f64::max);
        // What is read of the weights once per step, whatever the batch; of the embedding next to nothing.
        let table = if shape.is_tiny() { 0 } else { (shape.vocab * shape.hidden * 2) as u64 };
        let read = shape.bytes() - if shape.tied { 0 } else { table };
        let rate = read as f64 * (DECODED - 1) as f64 / seconds;
        say(
            shape.name,
            "decoding",
            json!({
                "sequences": batch, "tokens_per_second": (batch * (DECODED - 1)) as f64 / seconds,
                "seconds_per_token": seconds / (DECODED - 1) as f64, "weight_bytes_per_second": rate,
                "of_memory": rate / limits.memory,
            }),
        );
        if batch == 1 {
            goal(
                6,
                "decoding of one sequence, of the memory's bandwidth",
                rate / limits.memory,
                Goal::AtLeast(0.75),
            );
        }
    }
    Ok(())
}

/// When passes began.
#[derive(Debug, Default)]
struct Watch(Mutex<Vec<Instant>>);

impl Observer for Watch {
    fn arrived(&self, _: Arrived<'_>) {}

    fn computed(&self, computed: Computed) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(computed.started);
    }
}

fn start_of_computing(
    node: &Node,
    shape: &Shape,
    prompt: usize,
    watch: &Watch,
) -> Result<(), Box<dyn Error>> {
    let mut waits = Vec::new();
    for round in 0..COLD_ROUNDS {
        let of = model(node, if round % 2 == 0 { "b" } else { "a" })?;
        watch.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let asked = Instant::now();
        request(node, ask(&of, prompt, 1, 200 + round))?;
        let started = watch.0.lock().unwrap_or_else(PoisonError::into_inner).first().copied();
        let started = started.ok_or("nothing was computed")?;
        waits.push(started.saturating_duration_since(asked).as_secs_f64() * 1e3);
    }
    let median = percentile(waits.iter().copied(), 50);
    say(
        shape.name,
        "start_of_computing",
        json!({ "layout": node.status().backend, "median_ms": median, "mean_ms": mean(waits.into_iter()), "weight_bytes": shape.bytes() }),
    );
    let layout = node.status().backend;
    goal(2, &format!("cold from host memory: start of computing ({layout}), ms"), median, Goal::AtMost(5.0));
    Ok(())
}
