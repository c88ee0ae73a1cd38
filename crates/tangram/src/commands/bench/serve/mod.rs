//! `tangram bench serve`: load on one OpenAI-compatible server, or on two in turn, and what their clients see.
//!
//! Nothing here is particular to Tangram: what is measured is measured on the client's clock, the same way for both.

mod measure;
mod page_cache;
mod report;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use futures::StreamExt;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

use self::measure::Timed;
use self::page_cache::Files;
use self::report::{Level, Report, Settings, Turn};
use super::{parse_count, trace};
use crate::client::Client;

/// Flags of `tangram bench serve`.
#[derive(Args)]
pub(crate) struct Options {
    /// URL of an OpenAI-compatible server.
    #[arg(long)]
    url: String,
    /// URL of a second one to compare it with; the two take turns.
    #[arg(long)]
    against: Option<String>,
    /// Model to ask for. With several, each request goes to a random one of them, and the report says what loading
    /// them costs.
    #[arg(long, visible_alias = "models", value_name = "NAME,...", value_delimiter = ',', required = true)]
    model: Vec<String>,
    /// The same models' names at the second server [default: the same names].
    #[arg(
        long,
        visible_alias = "against-models",
        value_name = "NAME,...",
        value_delimiter = ',',
        requires = "against"
    )]
    against_model: Vec<String>,
    /// Requests outstanding at a time; each number is measured on its own.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,4,16", value_parser = parse_count)]
    concurrency: Vec<usize>,
    /// Turns of each server at each concurrency.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = parse_count)]
    rounds: usize,
    /// Requests of a turn.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = parse_count)]
    requests: usize,
    /// Tokens of each prompt. All prompts differ, so that no server has any of them in a cache.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = parse_count)]
    input_tokens: usize,
    /// Tokens of each answer; end tokens are ignored.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = parse_count)]
    output_tokens: usize,
    /// Where prompts and the order of models come from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Drop these files, and those in these directories, from the page cache before each request. Pages that a process
    /// has mapped stay.
    #[arg(long, value_name = "PATH,...", value_delimiter = ',')]
    drop_cache: Vec<PathBuf>,
    /// Key that the servers want.
    #[arg(long, env = "TANGRAM_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write the JSON to this file too.
    #[arg(long, value_name = "FILE")]
    save: Option<PathBuf>,
}

/// Between two turns, so that the threads of the server before have gone to sleep.
const PAUSE: Duration = Duration::from_millis(300);

/// Requests to each of several models before a turn, of which the first may load it and the others say what the model
/// takes when it is there.
const RESIDENT_REQUESTS: usize = 4;

/// A server under load.
struct Side {
    client: Client,
    url: String,
    /// In the order of `--model`.
    models: Vec<String>,
}

/// A request: which model (by its place in `--model`) and where its prompt comes from.
#[derive(Clone, Copy)]
struct Planned {
    model: usize,
    seed: u64,
}

/// Measures and prints the report.
pub(crate) async fn run(options: Options) -> anyhow::Result<()> {
    let sides = sides(&options)?;
    let files = Files::find(&options.drop_cache)?;
    let turns = options.concurrency.len() * options.rounds * sides.len();
    let bar =
        ProgressBar::with_draw_target(Some((turns * options.requests) as u64), ProgressDrawTarget::stderr());
    bar.set_style(
        ProgressStyle::with_template("measuring [{bar:30}] {pos}/{len} requests {per_sec} {eta}")
            .context("progress bar")?
            .progress_chars("=> "),
    );
    let mut levels = Vec::new();
    for (level, &concurrency) in options.concurrency.iter().enumerate() {
        let mut turns: Vec<Vec<Turn>> = sides.iter().map(|_| Vec::new()).collect();
        // The first round warms up what each server makes when it is first asked.
        for side in &sides {
            warm_up(side, &options, Place { level, round: 0, concurrency }).await?;
        }
        for round in 0..options.rounds {
            // Whoever was first before is second now: what one leaves behind does not always meet the other.
            let mut order: Vec<usize> = (0..sides.len()).collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for index in order {
                tokio::time::sleep(PAUSE).await;
                let place = Place { level, round, concurrency };
                turns[index].push(turn(&sides[index], &options, &files, place, &bar).await?);
            }
        }
        levels.push(Level::new(concurrency, turns));
    }
    bar.finish_and_clear();
    let report = Report {
        settings: Settings {
            servers: sides.iter().map(|side| side.url.clone()).collect(),
            models: sides.iter().map(|side| side.models.clone()).collect(),
            rounds: options.rounds,
            requests: options.requests,
            input_tokens: options.input_tokens,
            output_tokens: options.output_tokens,
            seed: options.seed,
            dropped_files: files.len(),
        },
        levels,
    };
    let json = serde_json::to_string_pretty(&report)?;
    if let Some(path) = &options.save {
        std::fs::write(path, &json).with_context(|| format!("writing {}", path.display()))?;
    }
    if options.json {
        println!("{json}");
    } else {
        report.print();
    }
    match report.problem() {
        None => Ok(()),
        Some(problem) => bail!("{problem}"),
    }
}

fn sides(options: &Options) -> anyhow::Result<Vec<Side>> {
    let side = |url: &str, models: &[String]| -> anyhow::Result<Side> {
        // Servers close connections as they please; one that was kept may be gone just when the next request is sent.
        let client = Client::without_reuse(url, options.api_key.clone())?;
        Ok(Side { client, url: url.to_owned(), models: models.to_vec() })
    };
    let mut sides = vec![side(&options.url, &options.model)?];
    if let Some(url) = &options.against {
        let models = if options.against_model.is_empty() { &options.model } else { &options.against_model };
        ensure!(
            models.len() == options.model.len(),
            "--model names {} models and --against-model {}",
            options.model.len(),
            models.len()
        );
        sides.push(side(url, models)?);
    }
    Ok(sides)
}

/// Why a request is sent.
#[derive(Clone, Copy)]
enum Purpose {
    Load,
    WarmUp,
    Resident,
}

/// Which turn a request belongs to.
#[derive(Clone, Copy)]
struct Place {
    level: usize,
    round: usize,
    concurrency: usize,
}

/// Where a request's prompt comes from: the same for both servers, and never twice for one.
fn seed(options: &Options, purpose: Purpose, place: Place, index: usize) -> u64 {
    let place = ((purpose as u64) << 60) | ((place.level as u64) << 48) | ((place.round as u64) << 32);
    options.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ place ^ index as u64
}

fn plan(options: &Options, place: Place) -> Vec<Planned> {
    let request = |index| seed(options, Purpose::Load, place, index);
    let mut random = Xoshiro256PlusPlus::seed_from_u64(request(0));
    let mut model = || random.random_range(0..options.model.len());
    (0..options.requests).map(|index| Planned { model: model(), seed: request(index) }).collect()
}

/// Token ids that are printable characters in vocabularies which begin with bytes. Small models repeat what they were
/// given; bytes that make no character would be held back, by each server according to rules of its own.
fn prompt(seed: u64, tokens: usize) -> Vec<u32> {
    trace::prompt(seed, tokens).into_iter().map(|id| 33 + id % 94).collect()
}

async fn ask(side: &Side, options: &Options, request: Planned) -> anyhow::Result<Timed> {
    let model = side.models.get(request.model).context("a model that is not among the server's")?;
    let prompt = prompt(request.seed, options.input_tokens);
    measure::complete(&side.client, model, &prompt, options.output_tokens).await
}

/// As many requests at a time as the turns will have, to every model.
async fn warm_up(side: &Side, options: &Options, place: Place) -> anyhow::Result<()> {
    let models = side.models.len();
    let requests = (0..models * place.concurrency)
        .map(|index| Planned { model: index % models, seed: seed(options, Purpose::WarmUp, place, index) });
    let sending = futures::stream::iter(requests).map(|request| ask(side, options, request));
    let mut sending = std::pin::pin!(sending.buffer_unordered(place.concurrency));
    while let Some(result) = sending.next().await {
        result.with_context(|| format!("the first requests to {}", side.url))?;
    }
    Ok(())
}

/// What the first token of each model takes when the model is there, in milliseconds.
async fn resident(side: &Side, options: &Options, place: Place) -> anyhow::Result<Vec<f64>> {
    let mut medians = Vec::with_capacity(side.models.len());
    for model in 0..side.models.len() {
        let mut times = Vec::new();
        for index in 0..RESIDENT_REQUESTS {
            let seed = seed(options, Purpose::Resident, place, RESIDENT_REQUESTS * model + index);
            times.push(ask(side, options, Planned { model, seed }).await?.ttft_ms);
        }
        medians.push(report::median(times.iter().skip(1).copied()).context("no request was sent")?);
    }
    Ok(medians)
}

async fn turn(
    side: &Side,
    options: &Options,
    files: &Files,
    place: Place,
    bar: &ProgressBar,
) -> anyhow::Result<Turn> {
    let resident = match side.models.len() {
        1 => None,
        _ => Some(resident(side, options, place).await?),
    };
    let start = Instant::now();
    let sending = futures::stream::iter(plan(options, place)).map(async |request| {
        files.drop_from_cache();
        (request.model, ask(side, options, request).await)
    });
    let mut sending = std::pin::pin!(sending.buffer_unordered(place.concurrency));
    let mut outcomes = Vec::with_capacity(options.requests);
    while let Some((model, result)) = sending.next().await {
        outcomes.push((model, result.map_err(|error| format!("{error:#}"))));
        bar.inc(1);
    }
    Ok(Turn::new(start.elapsed(), &outcomes, resident.as_deref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_prompt_comes_twice_and_both_servers_get_the_same() {
        let options = Options {
            url: String::new(),
            against: None,
            model: ["a", "b", "c"].map(str::to_owned).to_vec(),
            against_model: vec![],
            concurrency: vec![1, 4],
            rounds: 3,
            requests: 50,
            input_tokens: 8,
            output_tokens: 1,
            seed: 1,
            drop_cache: vec![],
            api_key: None,
            json: false,
            save: None,
        };
        let mut seen = std::collections::BTreeSet::new();
        for (level, round) in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)] {
            let place = Place { level, round, concurrency: 1 };
            let planned = plan(&options, place);
            let again = plan(&options, place);
            assert!(planned.iter().zip(&again).all(|(a, b)| (a.model, a.seed) == (b.model, b.seed)));
            assert!((0..3).all(|model| planned.iter().any(|request| request.model == model)));
            let others =
                [Purpose::WarmUp, Purpose::Resident].map(|purpose| seed(&options, purpose, place, 3));
            for seed in planned.iter().map(|request| request.seed).chain(others) {
                let prompt = prompt(seed, options.input_tokens);
                assert!(prompt.iter().all(|id| (33..127).contains(id)));
                assert!(seen.insert(prompt), "a prompt comes twice");
            }
        }
    }
}
