//! Eight models of 6 to 41 GB in turn, in a pool of 42 GiB, all weights in pinned host memory: under ours, and under what
//! ours is measured against, in this process and with this executor.
//!
//! Every rule serves the same requests one after the other, with one token each. From their times follows what a client
//! waits when requests come at the trace's times, since rivals serve them in order; ours is run at these times too
//! (`ours-queued`), as it makes something of knowing who waits, and, if that is named, at times further apart
//! (`ours-stretched`), as it makes something of idle time, or in a segment instead of pages (`ours-segment`). Without reuse a request does not depend on those before, so
//! only some are run and counted for the others of their model.
//!
//! `KEY=VALUE`:
//! - `trace=FILE`: CSV, arrival_s,model,input_tokens,...; else requests are drawn that ask for the same models as often,
//!   switch as often and have prompts as long on average
//! - `requests=1000`, `prompt=16384` (longest), `stretch=30` (of `ours-stretched`)
//! - `policies=ours,published,...`, `seconds=90` (limit of each; they are compared over what all have served)
//! - `saved=FILE`: several runs, each of some policies, are compared
//! - `pool=BYTES`, `models=tiny|sixteenth` (for the stand-in of the driver, with and without kernels)

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tangram_device::cuda::{Driver, Gpu};
use tangram_node::{Backend, Baseline, Node, NodeConfig, Timing, Trial};

use crate::ask::{ask, close, config, exposed, finish, model, run as request};
use crate::report::{Goal, goal, mean, percentile, say};
use crate::shapes::{EIGHT, EIGHT_TINY, Shape, describe, fill};

/// Of the first 1,000 requests of `servegen8.csv`: how many ask for each model, and the mean length of their prompts.
const ASKED: [(u32, u32); 8] =
    [(168, 98), (186, 639), (207, 355), (251, 694), (53, 341), (71, 1040), (33, 95), (31, 229)];
/// How often a request asks for the model of the one before without looking, so that 651 of 1,000 do not.
const STAYS: f64 = 0.2075;
/// Requests per second of the trace.
const PER_SECOND: f64 = 150.0;
/// Requests that are run of each model without reuse.
const SAMPLED: usize = 6;

#[derive(Clone, Copy, Debug)]
struct Asked {
    arrival: f64,
    model: usize,
    prompt: usize,
}

/// What a request cost, in milliseconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Served {
    load: f64,
    /// From admission.
    first_token: f64,
    exposed: f64,
    /// From arrival, at the trace's times.
    queued: f64,
    loaded: u64,
    reused: u64,
}

/// What is run, and how.
#[derive(Clone, Copy)]
struct Policy {
    name: &'static str,
    rule: Option<Baseline>,
    backend: Backend,
    /// Whether it is run unless others are named.
    usual: bool,
}

const OURS: Policy = Policy { name: "ours", rule: None, backend: Backend::Paged, usual: true };

const POLICIES: [Policy; 7] = [
    OURS,
    Policy { name: "ours-queued", ..OURS },
    Policy { name: "ours-stretched", usual: false, ..OURS },
    Policy { name: "ours-segment", backend: Backend::Segment, ..OURS },
    // As published: one range, kept together by moving.
    Policy { name: "published", rule: Some(Baseline::Published), backend: Backend::Segment, usual: true },
    Policy { name: "whole-models", rule: Some(Baseline::WholeModels), ..OURS },
    Policy { name: "no-reuse", rule: Some(Baseline::NoReuse), ..OURS },
];

struct Plan {
    models: Vec<(String, Shape)>,
    requests: Vec<Asked>,
    limit: Duration,
    pool: u64,
    /// How many times as far apart requests come under `ours-stretched`.
    stretch: f64,
    policies: Vec<Policy>,
    /// Where what other runs of the same requests have found is, and this one's is put.
    saved: Option<PathBuf>,
}

pub(crate) fn run(driver: &Arc<Driver>, path: &Path, options: &[String]) -> Result<(), Box<dyn Error>> {
    let plan = Plan::new(options)?;
    let data = path.join("switching");
    let measured = measure(driver, &data, &plan);
    let _ = std::fs::remove_dir_all(&data);
    measured
}

impl Plan {
    fn new(options: &[String]) -> Result<Plan, Box<dyn Error>> {
        let pairs =
            options.iter().map(|option| option.split_once('=').ok_or(format!("'{option}' is no KEY=VALUE")));
        let options: BTreeMap<&str, &str> = pairs.collect::<Result<_, _>>()?;
        let number = |key: &str, usual: u64| options.get(key).map_or(Ok(usual), |text| text.parse::<u64>());
        let (shapes, pool) = match options.get("models").copied() {
            None => (EIGHT, 42 << 30),
            Some("sixteenth") => (EIGHT.map(Shape::sixteenth), (42 << 30) / 256),
            Some("tiny") => (EIGHT_TINY, 10 << 20),
            Some(other) => return Err(format!("no models '{other}'").into()),
        };
        let count = number("requests", 1000)? as usize;
        let mut requests = match options.get("trace") {
            Some(file) => read(Path::new(file))?,
            None => draw(count),
        };
        requests.truncate(count);
        let most = number("prompt", 16_384)? as usize;
        requests.iter_mut().for_each(|asked| asked.prompt = asked.prompt.min(most));
        let find = |name: &str| {
            let found = POLICIES.into_iter().find(|policy| policy.name == name);
            found.ok_or_else(|| format!("no policy '{name}'"))
        };
        let policies = match options.get("policies") {
            None => POLICIES.into_iter().filter(|policy| policy.usual).collect(),
            Some(names) => names.split(',').map(find).collect::<Result<_, _>>()?,
        };
        Ok(Plan {
            models: shapes.map(|shape| (shape.name.to_owned(), shape)).to_vec(),
            requests,
            limit: Duration::from_secs(number("seconds", 90)?),
            pool: number("pool", pool)?,
            stretch: number("stretch", 30)? as f64,
            policies,
            saved: options.get("saved").map(PathBuf::from),
        })
    }
}

/// The requests of a trace whose models are numbers below eight.
fn read(path: &Path) -> Result<Vec<Asked>, Box<dyn Error>> {
    let text = std::fs::read_to_string(path)?;
    let line = |line: &str| {
        let mut fields = line.split(',');
        let mut next = || fields.next().ok_or(format!("'{line}' is too short"));
        let asked = Asked { arrival: next()?.parse()?, model: next()?.parse()?, prompt: next()?.parse()? };
        if asked.model < ASKED.len() { Ok(asked) } else { Err(format!("'{line}' has no such model").into()) }
    };
    text.lines().skip(1).map(line).collect()
}

/// Requests like those of the trace.
fn draw(count: usize) -> Vec<Asked> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(7);
    let mut uniform = move || (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let mut model = 0;
    let of_model = |mut at: f64| {
        let found = ASKED.iter().position(|&(count, _)| {
            at -= f64::from(count);
            at < 0.0
        });
        found.unwrap_or(0)
    };
    let all = f64::from(ASKED.iter().map(|&(count, _)| count).sum::<u32>());
    let requests = (0..count).map(|index| {
        if uniform() >= STAYS {
            model = of_model(uniform() * all);
        }
        (index, model, uniform(), uniform())
    });
    let asked = requests.map(|(index, model, a, b)| {
        // Logarithms of lengths are normal with a deviation of 1 (Box and Muller), which makes the mean e^½ medians.
        let normal = (-2.0 * (1.0 - a).ln()).sqrt() * (std::f64::consts::TAU * b).cos();
        let prompt = f64::from(ASKED[model].1) * (normal - 0.5).exp();
        Asked { arrival: index as f64 / PER_SECOND, model, prompt: prompt.clamp(1.0, 16_384.0) as usize }
    });
    asked.collect()
}

fn measure(driver: &Arc<Driver>, data: &Path, plan: &Plan) -> Result<(), Box<dyn Error>> {
    let all: u64 = plan.models.iter().map(|(_, shape)| shape.bytes()).sum();
    say(
        "switching",
        "models",
        json!({
            "bytes": plan.models.iter().map(|(name, shape)| (name.clone(), json!(shape.bytes()))).collect::<serde_json::Map<_, _>>(),
            "all": all, "pool_bytes": plan.pool, "requests": plan.requests.len(),
        }),
    );
    let saved = plan.saved.as_ref().and_then(|path| std::fs::read(path).ok());
    let mut results: BTreeMap<String, Vec<Served>> =
        saved.map_or(Ok(BTreeMap::new()), |text| serde_json::from_slice(&text))?;
    let gpu = Gpu::open(driver, 0)?;
    let free = gpu.memory()?.free;
    let mut lost = 0;
    for policy in &plan.policies {
        let name = policy.name;
        // The files are only described, and a node drops what it cannot use: made anew.
        let _ = std::fs::remove_dir_all(data.join("checkpoints"));
        let _ = std::fs::remove_file(data.join("catalog.redb"));
        describe(&plan.models, data)?;
        let started = Instant::now();
        let node = Node::open(node_config(driver, data, plan, policy))?;
        for (model, _) in &plan.models {
            crate::ask::model(&node, model)?;
        }
        let opened = started.elapsed();
        let (before, free_before) = (node.status(), gpu.memory()?.free);
        let started = Instant::now();
        let served = match name {
            "ours-queued" => queued(&node, plan, 1.0)?,
            "ours-stretched" => queued(&node, plan, plan.stretch)?,
            "no-reuse" => sampled(&node, plan)?,
            _ => in_turn(&node, plan, &plan.requests, started)?,
        };
        let status = node.status();
        // While it ran nothing was to be allocated.
        lost = lost.max(free_before.saturating_sub(gpu.memory()?.free));
        say(
            "switching",
            name,
            json!({
                "requests": served.len(), "all_requests": plan.requests.len(),
                "load_ms": figures(served.iter().map(|one| one.load)),
                "exposed_ms": figures(served.iter().map(|one| one.exposed)),
                "ttft_ms": figures(served.iter().map(|one| one.first_token)),
                "ttft_with_queue_ms": figures(served.iter().map(|one| one.queued)),
                "bytes_loaded": served.iter().map(|one| one.loaded).sum::<u64>(),
                "bytes_reused": served.iter().map(|one| one.reused).sum::<u64>(),
                "bytes_prefetched": status.bytes_prefetched_total - before.bytes_prefetched_total,
                "bytes_moved": status.bytes_moved_total - before.bytes_moved_total,
                "pool_bytes": status.pool_bytes, "opened_seconds": opened.as_secs_f64(),
                "seconds": started.elapsed().as_secs_f64(),
            }),
        );
        results.insert(name.to_owned(), served);
        if let Some(path) = &plan.saved {
            std::fs::write(path, serde_json::to_vec(&results)?)?;
        }
        close(node);
    }
    lost = lost.max(free.saturating_sub(gpu.memory()?.free));
    let requests: usize = results.values().map(Vec::len).sum();
    let what = format!("device memory lost in {requests} requests of switching, by the driver, MiB");
    goal(1, &what, (lost >> 20) as f64, Goal::AtMost(32.0));
    compare(&results);
    Ok(())
}

fn node_config(driver: &Arc<Driver>, data: &Path, plan: &Plan, policy: &Policy) -> NodeConfig {
    let largest = plan.models.iter().map(|(_, shape)| shape.largest()).max().unwrap_or(0);
    let block = (2 * largest as usize).max(8 << 20);
    NodeConfig {
        device_memory: Some(plan.pool),
        backend: policy.backend,
        trial: Trial { baseline: policy.rule, weights: Some((block, fill())) },
        ..config(driver, data)
    }
}

fn figures(values: impl Iterator<Item = f64> + Clone) -> serde_json::Value {
    json!({
        "mean": mean(values.clone()), "p50": percentile(values.clone(), 50), "p95": percentile(values.clone(), 95),
        "p99": percentile(values, 99),
    })
}

/// What to ask for, cut to what the model takes here.
fn prepare(
    node: &Node,
    plan: &Plan,
    asked: &Asked,
    seed: usize,
) -> Result<tangram_node::GenerateRequest, Box<dyn Error>> {
    let model = model(node, &plan.models[asked.model].0)?;
    let prompt = asked.prompt.clamp(1, model.context.saturating_sub(1).max(1));
    Ok(ask(&model, prompt, 1, seed))
}

fn served(timing: &Timing) -> Served {
    let milliseconds = |duration: Duration| duration.as_secs_f64() * 1e3;
    Served {
        load: milliseconds(timing.load),
        first_token: milliseconds(timing.first_token.saturating_sub(timing.queue)),
        exposed: exposed(timing) * 1e3,
        queued: milliseconds(timing.first_token),
        loaded: timing.bytes_loaded,
        reused: timing.bytes_reused,
    }
}

/// One after the other. What a client would wait follows from when each would have begun.
fn in_turn(
    node: &Node,
    plan: &Plan,
    requests: &[Asked],
    started: Instant,
) -> Result<Vec<Served>, Box<dyn Error>> {
    let mut all = Vec::with_capacity(requests.len());
    let mut free = 0.0f64;
    for (index, asked) in requests.iter().enumerate() {
        if started.elapsed() > plan.limit {
            eprintln!("{index} of {} requests before the time was over", requests.len());
            break;
        }
        let mut one = served(&request(node, prepare(node, plan, asked, index)?)?);
        let begin = free.max(asked.arrival * 1e3);
        // The only token is the last one.
        free = begin + one.queued;
        one.queued = free - asked.arrival * 1e3;
        all.push(one);
        if index % 100 == 99 {
            eprintln!("{} requests after {:.0} s", index + 1, started.elapsed().as_secs_f64());
        }
    }
    Ok(all)
}

/// Some requests of each model, each counted for as many as it stands for.
fn sampled(node: &Node, plan: &Plan) -> Result<Vec<Served>, Box<dyn Error>> {
    let mut all = Vec::with_capacity(plan.requests.len());
    for model in 0..plan.models.len() {
        let of: Vec<Asked> = plan.requests.iter().copied().filter(|asked| asked.model == model).collect();
        let step = of.len().div_ceil(SAMPLED).max(1);
        for part in of.chunks(step) {
            let one = in_turn(node, plan, &part[part.len() / 2..][..1], Instant::now())?;
            all.extend(part.iter().flat_map(|_| one.iter().copied()));
        }
    }
    // Who comes when is not known any more, and nobody is reused for anybody.
    let mut free = 0.0f64;
    for (one, asked) in all.iter_mut().zip(&plan.requests) {
        free = free.max(asked.arrival * 1e3) + one.first_token;
        one.queued = free - asked.arrival * 1e3;
    }
    Ok(all)
}

/// All at the trace's times, so many times as far apart.
fn queued(node: &Node, plan: &Plan, stretch: f64) -> Result<Vec<Served>, Box<dyn Error>> {
    let started = Instant::now();
    let mut running = Vec::with_capacity(plan.requests.len());
    for (index, asked) in plan.requests.iter().enumerate() {
        let due = started + Duration::from_secs_f64(asked.arrival * stretch);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        running.push(node.generate(prepare(node, plan, asked, index)?)?);
    }
    running.into_iter().map(|generation| Ok(served(&finish(generation)?))).collect()
}

/// The goals, over the requests that all rules have served.
fn compare(results: &BTreeMap<String, Vec<Served>>) {
    let both = |one: &str, other: &str, of: fn(&Served) -> f64| {
        let (one, other) = (results.get(one)?, results.get(other)?);
        let count = one.len().min(other.len());
        let ours = mean(one.iter().take(count).map(of));
        Some((ours, mean(other.iter().take(count).map(of))))
    };
    // Without reuse the order of the models is not that of the requests: over all of them.
    let all = |name: &str, of: fn(&Served) -> f64| Some(mean(results.get(name)?.iter().map(of)));
    let ratio = |(ours, theirs): (f64, f64)| theirs / ours.max(1e-6);
    for name in ["ours", "ours-queued", "ours-stretched", "ours-segment"] {
        if let Some(pair) = all(name, |one| one.load).zip(all("no-reuse", |one| one.load)) {
            goal(5, &format!("mean load: without reuse / {name}"), ratio(pair), Goal::AtLeast(6.2));
        }
        if let Some((ours, none)) =
            all(name, |one| one.first_token).zip(all("no-reuse", |one| one.first_token))
        {
            let what = format!("mean first token from admission, {name}: how much lower than without reuse");
            goal(5, &what, 1.0 - ours / none, Goal::AtLeast(0.55));
        }
        if let Some(pair) = both(name, "published", |one| one.exposed) {
            goal(5, &format!("mean exposed load: published / {name}"), ratio(pair), Goal::AtLeast(2.0));
        }
        if let Some(pair) = both(name, "whole-models", |one| one.exposed) {
            say("switching", &format!("mean exposed load: whole models / {name}"), json!(ratio(pair)));
        }
    }
    for name in ["ours", "ours-queued"] {
        for other in ["published", "whole-models", "no-reuse"] {
            if let Some(pair) = both(name, other, |one| one.queued) {
                say(
                    "switching",
                    &format!("mean first token with queue: {other} / {name}"),
                    json!(ratio(pair)),
                );
            }
        }
    }
}
