//! `tangram bench switch`: replays a trace over many models and reports what switching between them costs.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use futures::StreamExt;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Deserialize;
use serde_json::{Value, json};
use tangram_node::{MachineProfile, ModelStatus, NodeStatus};

use super::parse_count;
use super::report::{Cost, Outcome, Report, ServerFigures, Settings};
use super::simulated::{self, Simulated};
use super::trace::{self, TraceRequest};
use crate::Target;
use crate::client::Client;

/// Flags of `tangram bench switch`.
#[derive(Args)]
pub(crate) struct Options {
    /// CSV file with the columns arrival_s,model,input_tokens,output_tokens.
    trace: PathBuf,
    /// Deployed models that stand for the trace's models [default: in order of first appearance, the deployed models
    /// that generate text, by name].
    #[arg(long, value_name = "ID=NAME,...", value_delimiter = ',', value_parser = trace::parse_mapping)]
    map: Vec<(String, String)>,
    /// Replay only the first N requests.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Multiply arrival times by this; 0 sends each request as soon as --concurrency allows.
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = parse_scale)]
    time_scale: f64,
    /// Most requests outstanding at a time.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = parse_count)]
    concurrency: usize,
    /// Shorten prompts to at most N tokens.
    #[arg(long, value_name = "N", value_parser = parse_count)]
    max_input: Option<usize>,
    /// Shorten answers to at most N tokens.
    #[arg(long, value_name = "N", value_parser = parse_count)]
    max_output: Option<usize>,
    /// Simulate the same requests with the server's measured rates, and print how far the two agree. The simulator runs one
    /// request at a time, so they do where requests do not wait for each other: with --time-scale 0 --concurrency 1.
    #[arg(long)]
    simulate: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: Target,
}

fn parse_scale(text: &str) -> Result<f64, String> {
    let scale = text.parse().ok().filter(|scale: &f64| scale.is_finite() && *scale >= 0.0);
    scale.ok_or_else(|| "not a number of at least 0".to_owned())
}

/// Replays the trace and prints the report.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let reading = || format!("reading {}", options.trace.display());
    let text = std::fs::read_to_string(&options.trace).with_context(reading)?;
    let mut requests = trace::parse(&text).with_context(reading)?;
    requests.truncate(options.limit.unwrap_or(usize::MAX));
    if requests.is_empty() {
        bail!("{} has no requests to replay", options.trace.display());
    }
    if options.simulate && options.time_scale == 0.0 && options.concurrency != 1 {
        bail!("--simulate with --time-scale 0 is for one request after the other; add --concurrency 1");
    }
    let client = Client::connect(options.target.clone()).await?;
    let result = replay(&client, &options, requests).await;
    client.close().await?;
    let report = result?;
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        report.print();
    }
    if report.overall.errors == report.overall.requests {
        bail!("no request succeeded");
    }
    Ok(())
}

#[derive(Deserialize)]
struct Status {
    node: NodeStatus,
    models: Vec<ModelStatus>,
}

/// A request as it is sent.
struct Planned {
    model: String,
    due: Duration,
    input: usize,
    output: usize,
    body: Value,
}

async fn replay(client: &Client, options: &Options, requests: Vec<TraceRequest>) -> anyhow::Result<Report> {
    let before: Status = client.get("/admin/status").await?;
    let generating = || before.models.iter().filter(|model| model.task == "generate");
    let names: Vec<&str> = generating().map(|model| model.name.as_str()).collect();
    let models = trace::assign(&requests, &options.map, &names)?;
    let mut shortened = 0;
    let mut planned = Vec::with_capacity(requests.len());
    for (request, seed) in requests.iter().zip(0u64..) {
        let name = models.get(&request.model).context("a model of the trace has no deployed model")?;
        let context = generating().find(|model| model.name == *name).map_or(0, |model| model.context);
        let wanted_input = request.input_tokens.clamp(1, options.max_input.unwrap_or(usize::MAX));
        let wanted_output = request.output_tokens.clamp(1, options.max_output.unwrap_or(usize::MAX));
        let (input, output) = trace::fit(wanted_input, wanted_output, context);
        shortened += usize::from((input, output) != (wanted_input, wanted_output));
        let due =
            Duration::try_from_secs_f64(request.arrival_s * options.time_scale).context("--time-scale")?;
        planned.push(Planned {
            model: name.clone(),
            due,
            input,
            output,
            body: body(name, seed, input, output),
        });
    }
    let bar = ProgressBar::with_draw_target(Some(planned.len() as u64), ProgressDrawTarget::stderr());
    bar.set_style(
        ProgressStyle::with_template("replaying [{bar:30}] {pos}/{len} requests {per_sec} {eta}")
            .context("progress bar")?
            .progress_chars("=> "),
    );
    let settings = Settings {
        trace: options.trace.display().to_string(),
        requests: planned.len(),
        time_scale: options.time_scale,
        concurrency: options.concurrency,
        max_input: options.max_input,
        max_output: options.max_output,
        shortened_to_context: shortened,
        models,
    };
    let shapes: Vec<(String, Duration, usize, usize)> = planned
        .iter()
        .map(|request| (request.model.clone(), request.due, request.input, request.output))
        .collect();
    let start = Instant::now();
    let closed_loop = options.time_scale == 0.0;
    // Requests are in order of arrival, so those that wait here for their time never keep back one that is due.
    let sending = futures::stream::iter(planned).map(|request| send(client, request, start, closed_loop));
    let mut sending = std::pin::pin!(sending.buffer_unordered(options.concurrency));
    let mut outcomes = Vec::with_capacity(settings.requests);
    while let Some(outcome) = sending.next().await {
        outcomes.push(outcome);
        bar.inc(1);
    }
    let wall = start.elapsed();
    bar.finish_and_clear();
    let after: Status = client.get("/admin/status").await?;
    let server = ServerFigures {
        device: after.node.device.clone(),
        pool_bytes: after.node.pool_bytes,
        bytes_evicted: after.node.bytes_evicted_total.saturating_sub(before.node.bytes_evicted_total),
        preemptions: after.node.preemptions_total.saturating_sub(before.node.preemptions_total),
    };
    let mut report = Report::new(settings, server, wall.as_secs_f64(), &outcomes);
    if options.simulate {
        let profile: MachineProfile = client.get("/admin/profile").await?;
        let requests: Vec<Simulated<'_>> = shapes
            .iter()
            .map(|(model, due, input, output)| Simulated {
                model,
                arrival_s: due.as_secs_f64(),
                prompt: *input,
                output: *output,
            })
            .collect();
        let times: Vec<f64> =
            outcomes.iter().filter_map(|outcome| Some(outcome.result.as_ref().ok()?.ttft_ms)).collect();
        let prefetched = after.node.bytes_prefetched_total.saturating_sub(before.node.bytes_prefetched_total);
        let mean = times.iter().sum::<f64>() / times.len().max(1) as f64;
        let live = (report.overall.bytes_loaded, prefetched, mean);
        let served_ms: f64 =
            outcomes.iter().filter_map(|outcome| Some(outcome.result.as_ref().ok()?.served_ms())).sum();
        let pause = (wall.as_secs_f64() - served_ms / 1000.0) / outcomes.len().max(1) as f64;
        let pause = closed_loop.then_some(pause.max(0.0));
        report.simulated = Some(simulated::compare(&profile, &requests, pause, live)?);
    }
    Ok(report)
}

fn body(model: &str, seed: u64, input_tokens: usize, output_tokens: usize) -> Value {
    json!({
        "model": model,
        "prompt": trace::prompt(seed, input_tokens),
        "max_tokens": output_tokens,
        "ignore_eos": true,
        "temperature": 0,
        "stream": true,
        "stream_options": { "include_usage": true },
        // Tokens without text of their own (half a character) are seen too.
        "return_token_ids": true,
    })
}

/// Sends a request when it is due. The time to the first token counts from the moment that the request was due, so
/// that requests held back by `--concurrency` are not made to look fast; in a closed loop from the moment of sending.
async fn send(client: &Client, request: Planned, start: Instant, closed_loop: bool) -> Outcome {
    let due = start + request.due;
    tokio::time::sleep_until(due.into()).await;
    let from = if closed_loop { Instant::now() } else { due };
    let result = measure(client, &request.body, from).await.map_err(|error| format!("{error:#}"));
    Outcome { model: request.model, result }
}

async fn measure(client: &Client, body: &Value, from: Instant) -> anyhow::Result<Cost> {
    let sent = Instant::now();
    let mut first_token = None;
    let mut usage = Value::Null;
    client
        .post_lines("/v1/completions", body, |mut line| {
            let tokens = line["choices"][0]["token_ids"].as_array();
            if first_token.is_none() && tokens.is_some_and(|tokens| !tokens.is_empty()) {
                first_token = Some(Instant::now());
            }
            if line["usage"].is_object() {
                usage = line["usage"].take();
            }
            Ok(())
        })
        .await?;
    let first_token = first_token.context("the stream ended without a token")?;
    let count = |figure: &Value| figure.as_u64().context("the stream ended without its usage");
    let duration = |figure: &Value| figure.as_f64().context("the stream ended without its phases");
    let phases = &usage["tangram"];
    let milliseconds = |to: Instant| to.duration_since(from).as_secs_f64() * 1000.0;
    Ok(Cost {
        held_ms: milliseconds(sent),
        ttft_ms: milliseconds(first_token),
        queue_ms: duration(&phases["queue_ms"])?,
        load_ms: duration(&phases["load_ms"])?,
        prefill_ms: duration(&phases["prefill_ms"])?,
        decode_ms: duration(&phases["decode_ms"])?,
        bytes_loaded: count(&phases["bytes_loaded"])?,
        bytes_reused: count(&phases["bytes_reused"])?,
        prompt_tokens: count(&usage["prompt_tokens"])?,
        completion_tokens: count(&usage["completion_tokens"])?,
    })
}
