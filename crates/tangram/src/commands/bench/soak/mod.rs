//! `tangram bench soak`: random load on whatever is deployed, every answer checked, leaks looked for.
//!
//! Before the load each model's answers to some requests are recorded while nothing else runs; under load the same
//! requests come again and again and must get the same tokens. Everything else is judged by what was asked for. Between
//! rounds of load the server is left alone until it is idle, and then holds no more than it did after the first round.

mod answer;
mod forms;
mod plan;
mod report;
mod subject;

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget};
use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use serde::Deserialize;
use tangram_gateway::ProcessStatus;
use tangram_node::{ModelStatus, NodeStatus};

use self::answer::Reply;
use self::plan::Limits;
use self::report::{Report, Sample, Tally};
use self::subject::Subject;
use super::{parse_count, trace};
use crate::Target;
use crate::client::Client;

/// Flags of `tangram bench soak`.
#[derive(Args)]
pub(crate) struct Options {
    /// Minutes of load.
    #[arg(long, value_name = "X", default_value_t = 15.0, value_parser = parse_minutes)]
    minutes: f64,
    /// Where the requests come from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Clients, each with one request at a time.
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = parse_count)]
    concurrency: usize,
    /// Longest prompt in tokens.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = parse_count)]
    max_input: usize,
    /// Longest answer in tokens; requests that will be cancelled ask for eight times as much.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = parse_count)]
    max_output: usize,
    /// Models to ask [default: all that are deployed].
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    models: Vec<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

fn parse_minutes(text: &str) -> Result<f64, String> {
    let minutes = text.parse().ok().filter(|minutes: &f64| minutes.is_finite() && *minutes > 0.0);
    minutes.ok_or_else(|| "not a number above 0".to_owned())
}

/// Rounds of load. After the first, everything that is made when first needed is there.
const ROUNDS: usize = 5;

/// How long the server may take to become idle, and to close what nobody uses: idle threads of the runtime end after
/// ten seconds.
const IDLE_PATIENCE: Duration = Duration::from_secs(60);
const CLOSE_PATIENCE: Duration = Duration::from_secs(20);

/// Between two looks at the server.
const LOOK: Duration = Duration::from_millis(50);

/// Soaks the server, prints the report, and fails if anything was not as it must be.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let client = Client::connect(options.target.clone()).await?;
    let result = soak(&client, &options).await;
    client.close().await?;
    let report = result?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        report.print();
    }
    match report.violations.values().sum::<usize>() {
        0 => Ok(()),
        count => bail!("{count} violations"),
    }
}

#[derive(Deserialize)]
struct Status {
    node: NodeStatus,
    models: Vec<ModelStatus>,
    process: Option<ProcessStatus>,
}

async fn soak(client: &Client, options: &Options) -> anyhow::Result<Report> {
    let before: Status = client.get("/admin/status").await?;
    let subjects = meet(client, options, &before.models).await?;
    let length = Duration::from_secs_f64(options.minutes * 60.0);
    let bar = ProgressBar::with_draw_target(Some(ROUNDS as u64), ProgressDrawTarget::stderr());
    let mut report = Report::new(subjects.iter().map(|subject| subject.name.clone()).collect());
    let start = Instant::now();
    for round in 0..ROUNDS {
        // Connections of its own, which are closed at the end of the round.
        let load = client.another()?;
        let until = Instant::now() + length / ROUNDS as u32;
        let workers = (0..options.concurrency).map(|worker| {
            let seed = options.seed.wrapping_mul(1 << 32) ^ ((round as u64) << 24) ^ worker as u64;
            work(&load, &subjects, options, Xoshiro256PlusPlus::seed_from_u64(seed), until)
        });
        for tally in futures::future::join_all(workers).await {
            report.tally.add(tally);
        }
        drop(load);
        let sample = rest(client, report.samples.first(), start, report.tally.sent()).await;
        report.samples.push(sample.context("the server does not answer any more")?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    for subject in &subjects {
        if let Some(problem) = subject.confirm(client).await? {
            report.tally.violation(problem);
        }
    }
    let after: Status = client.get("/admin/status").await?;
    report.finish(&before.node, &after.node);
    Ok(report)
}

async fn meet(client: &Client, options: &Options, models: &[ModelStatus]) -> anyhow::Result<Vec<Subject>> {
    for name in &options.models {
        ensure!(models.iter().any(|model| model.name == *name), "no model '{name}' is deployed");
    }
    let wanted = |model: &&ModelStatus| options.models.is_empty() || options.models.contains(&model.name);
    let mut subjects = Vec::new();
    for model in models.iter().filter(wanted) {
        subjects.push(Subject::meet(client, model, options.max_input).await?);
    }
    ensure!(!subjects.is_empty(), "no model is deployed; `tangram deploy` does that");
    Ok(subjects)
}

/// One client: a request after the other, until it is time.
async fn work(
    client: &Client,
    subjects: &[Subject],
    options: &Options,
    mut random: Xoshiro256PlusPlus,
    until: Instant,
) -> Tally {
    let limits = Limits { input: options.max_input, output: options.max_output };
    let mut tally = Tally::default();
    while Instant::now() < until {
        let Some(subject) = plan::pick(subjects, &mut random) else { break };
        let planned = plan::draw(subject, limits, &mut random);
        let reply = planned.request.send(client).await;
        let problem = match &reply {
            Ok(reply) => planned.judge(reply),
            Err(error) => Some(format!("{error:#}")),
        };
        tally.count(&subject.name, planned.kind, matches!(reply, Ok(Reply::Left)));
        match &reply {
            Ok(Reply::Answer(answer)) => tally.phases(&answer.usage["tangram"]),
            Ok(_) => {}
            // A server that is gone is asked no faster than this.
            Err(_) => tokio::time::sleep(LOOK).await,
        }
        if let Some(problem) = problem {
            tally.violation(format!("{}, {}: {problem}", subject.name, planned.kind));
        }
    }
    tally
}

/// Waits until the server is idle and holds no more connections and threads than `first`; in vain if it never does,
/// which the sample then shows.
async fn rest(
    client: &Client,
    first: Option<&Sample>,
    start: Instant,
    requests: usize,
) -> anyhow::Result<Sample> {
    let began = Instant::now();
    loop {
        let status: Status = client.get("/admin/status").await?;
        let sample = Sample::new(start.elapsed(), requests, &status.node, status.process);
        let patience = if sample.is_idle() { CLOSE_PATIENCE } else { IDLE_PATIENCE };
        let done = sample.is_idle() && first.is_none_or(|first| sample.holds_no_more_than(first));
        if done || began.elapsed() > patience {
            return Ok(sample);
        }
        tokio::time::sleep(LOOK).await;
    }
}
