//! `tangram sim`: the policies and their rivals on simulated machines, side by side.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tangram_sim::{
    Model, Pattern, Profile, Scenario, Summary, System, chart, generate, model, run, system, table, trace,
};

/// Flags of `tangram sim`.
#[derive(Args)]
pub(crate) struct Options {
    /// Replay a trace: CSV with arrival_s,model,input_tokens,output_tokens, Azure's CSV, or Mooncake's JSON lines.
    #[arg(long, value_name = "FILE", conflicts_with = "workload")]
    trace: Option<PathBuf>,
    /// Generate requests.
    #[arg(long, value_enum, default_value = "zipf")]
    workload: Workload,
    /// Mean number of other models between two uses of one, for `--workload distance`.
    #[arg(long, value_name = "N", default_value_t = 2)]
    distance: usize,
    /// Generated requests per second.
    #[arg(long, value_name = "X", default_value_t = 0.67, value_parser = parse_positive)]
    rate: f64,
    /// Models that are served.
    #[arg(long, value_enum, default_value = "reference")]
    models: Models,
    /// Number of models, for `--models fleet`.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    fleet: usize,
    /// Machine: l40, 4090, a100, h100 or cpu.
    #[arg(long, default_value = "l40", value_parser = parse_profile)]
    profile: Profile,
    /// Number of devices.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse_count)]
    devices: usize,
    /// Bytes per device for weights and KV [default: the profile's].
    #[arg(long, value_name = "BYTES")]
    pool: Option<ByteSize>,
    /// Bytes of host memory per node for checkpoints; beyond, they come from disk [default: all fit].
    #[arg(long, value_name = "BYTES")]
    host_memory: Option<ByteSize>,
    /// Number of requests.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = parse_count)]
    requests: usize,
    /// Multiply a trace's times by this (the Tangram authors replay theirs at 150 on one GPU); 0 sends each request
    /// when the one before it has ended, whatever the trace or workload says.
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = parse_scale)]
    time_scale: f64,
    /// Shorten answers to at most N tokens.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = parse_count)]
    max_output: usize,
    /// KV takes no memory.
    #[arg(long)]
    no_kv: bool,
    /// Systems to run; ours/no-PART leaves a part of ours out (per-byte, decay, exposure, forecast, prefetch,
    /// overtaking, placement, sharing).
    #[arg(long, value_name = "A,B,...", value_delimiter = ',', default_values_t = system::NAMES.map(str::to_owned))]
    systems: Vec<String>,
    /// Seed of everything that is drawn.
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write charts into this directory.
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Write each system's event log into this directory.
    #[arg(long, value_name = "DIR")]
    log: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Workload {
    /// Popularity 1/rank.
    Zipf,
    /// Bursts of each model (Gamma, coefficient of variation 4).
    Bursts,
    /// One model after the other.
    Cyclic,
    /// Controlled reuse distance.
    Distance,
    /// Small models are hot.
    SmallHot,
    /// Large models are hot.
    LargeHot,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Models {
    /// The eight of the authors' evaluation.
    Reference,
    /// One base, 15 fine-tunes that share 60 to 95 % of its bytes, 16 adapters.
    Family,
    /// Very many.
    Fleet,
}

fn parse_profile(text: &str) -> Result<Profile, String> {
    let names = Profile::all().map(|profile| profile.name).join(", ");
    Profile::named(text).ok_or_else(|| format!("not one of {names}"))
}

fn parse_count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count > 0).ok_or_else(|| "not a whole number of at least 1".to_owned())
}

fn parse_scale(text: &str) -> Result<f64, String> {
    let scale = text.parse().ok().filter(|scale: &f64| scale.is_finite() && *scale >= 0.0);
    scale.ok_or_else(|| "not a number of at least 0".to_owned())
}

fn parse_positive(text: &str) -> Result<f64, String> {
    parse_scale(text).ok().filter(|scale| *scale > 0.0).ok_or_else(|| "not a number above 0".to_owned())
}

/// Runs the simulations and prints the comparison.
pub(crate) fn run_sim(options: &Options) -> anyhow::Result<()> {
    let systems: Vec<System> =
        options.systems.iter().map(|name| named(name)).collect::<anyhow::Result<_>>()?;
    let scenario = scenario(options)?;
    for folder in [&options.svg, &options.log].into_iter().flatten() {
        std::fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    let bar = ProgressBar::with_draw_target(
        Some((scenario.requests.len() * systems.len()) as u64),
        ProgressDrawTarget::stderr(),
    );
    bar.set_style(
        ProgressStyle::with_template("{msg:12} [{bar:30}] {pos}/{len} requests {eta}")
            .context("progress bar")?
            .progress_chars("=> "),
    );
    let started = Instant::now();
    let mut recorded = Vec::with_capacity(systems.len());
    for (index, system) in systems.iter().enumerate() {
        bar.set_message(system.name.clone());
        let before = (index * scenario.requests.len()) as u64;
        let mut result =
            run(&scenario, system, options.log.is_some(), |done| bar.set_position(before + done as u64));
        if let (Some(folder), Some(log)) = (&options.log, result.log.take()) {
            let file = folder.join(format!("{}.log", system.name.replace('/', "-")));
            std::fs::write(&file, log).with_context(|| format!("writing {}", file.display()))?;
        }
        recorded.push(result);
    }
    bar.finish_and_clear();
    let summaries: Vec<Summary> = recorded.iter().map(tangram_sim::Recorded::summary).collect();
    if let Some(folder) = &options.svg {
        let names: Vec<&str> = scenario.models.iter().map(|model| model.name.as_str()).collect();
        for (name, text) in chart::all(&recorded, &names) {
            let file = folder.join(name);
            std::fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
        }
    }
    let profile = &scenario.profile;
    if options.json {
        let report = json!({
            "profile": profile.name,
            "devices": scenario.devices,
            "pool_bytes": profile.pool_bytes,
            "requests": scenario.requests.len(),
            "seed": options.seed,
            "closed_loop": scenario.closed_loop.is_some(),
            "systems": summaries,
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!(
            "{} x {}, pool {}, {} models, {} requests, seed {}, {:.1} s",
            scenario.devices,
            profile.name,
            ByteSize::b(profile.pool_bytes),
            scenario.models.len(),
            scenario.requests.len(),
            options.seed,
            started.elapsed().as_secs_f64(),
        );
        print!("{}", table(&summaries));
    }
    Ok(())
}

fn named(name: &str) -> anyhow::Result<System> {
    let of = || {
        format!("no system {name:?}; there are {}, cb-suffix-lru, and ours/no-PART", system::NAMES.join(", "))
    };
    System::named(name).with_context(of)
}

fn scenario(options: &Options) -> anyhow::Result<Scenario> {
    let models = match options.models {
        Models::Reference => model::reference_models(),
        Models::Family => model::family(15, 16),
        Models::Fleet => model::fleet(options.fleet),
    };
    let mut profile = options.profile.clone();
    if let Some(pool) = options.pool {
        profile.pool_bytes = pool.as_u64();
    }
    let largest = models.iter().map(Model::weight_bytes).max().unwrap_or(0);
    if largest >= profile.pool_bytes {
        bail!(
            "the largest model ({}) does not fit the pool ({})",
            ByteSize::b(largest),
            ByteSize::b(profile.pool_bytes)
        );
    }
    let requests = if let Some(file) = &options.trace {
        let reading = || format!("reading {}", file.display());
        let text = std::fs::read_to_string(file).with_context(reading)?;
        trace::parse(&text, models.len(), options.requests, options.time_scale, options.seed)
            .with_context(reading)?
    } else {
        let pattern = match options.workload {
            Workload::Zipf => Pattern::Zipf { exponent: 1.0 },
            Workload::Bursts => Pattern::Bursts { variation: 4.0 },
            Workload::Cyclic => Pattern::Cyclic,
            Workload::Distance => Pattern::Distance { mean: options.distance },
            Workload::SmallHot => Pattern::SmallHot,
            Workload::LargeHot => Pattern::LargeHot,
        };
        let sizes: Vec<u64> = models.iter().map(Model::weight_bytes).collect();
        generate(pattern, &sizes, options.requests, options.rate, options.seed)
    };
    Ok(Scenario {
        profile,
        devices: options.devices,
        host_bytes: options.host_memory.map(|bytes| bytes.as_u64()),
        models,
        requests,
        closed_loop: (options.time_scale == 0.0).then_some(0),
        max_output: options.max_output as u64,
        kv: !options.no_kv,
    })
}
