//! `tangram bench cold`: the time to the first token of a model that lies on the disk only, beside what reading its bytes
//! and computing its prompt take alone, and which layer was loaded and computed when.
//!
//! A node in this process, as `tangram serve` has it. Before each cold request the disk is read by the simplest reader, the
//! page cache is dropped, and another model fills the pool, so that the request evicts, reads and computes; right after it
//! a prompt of the same length is computed with everything resident. Everything in turn.

mod chart;
mod filler;
mod report;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use tangram_checkpoint::{DATA_FILE, Manifest, read_manifest};
use tangram_node::{
    Arrived, Computed, DeployedModel, GenerateEvent, GenerateRequest, Generation, Node, NodeConfig, Observer,
    SamplingParams, Timing, WeightLayout,
};

use self::report::{Arrival, Cold, Report, Stage};
use super::load::{Scratch, raw};
use crate::config::PoolLayout;

/// Beside the weights, the pool has room for the keys and values of the prompts.
const KV_BYTES: u64 = 128 << 20;

/// Tokens that the other model generates: enough that it does so when the request comes.
const FILLER_TOKENS: usize = 4;

/// What to load, and what to compute.
#[derive(Args)]
pub(crate) struct Options {
    /// Checkpoint: Hugging Face directory, .safetensors file with its config.json beside it, or .gguf file.
    source: PathBuf,
    /// Directory on the disk that is to be measured; the checkpoint is imported to it and removed afterwards [default:
    /// the directory of the checkpoint].
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// Lengths of the prompts.
    #[arg(long, value_delimiter = ',', default_value = "128,512")]
    prompt_tokens: Vec<usize>,
    /// How often everything is run.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How the pool is laid out.
    #[arg(long, value_enum, default_value = "paged")]
    pool: PoolLayout,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write a picture of what was loaded and computed when, in the round whose time is in the middle.
    #[arg(long)]
    svg: Option<PathBuf>,
}

/// Measures and reports.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let scratch = Scratch::create(options.scratch.as_deref(), &options.source)?;
    let mut bench = Bench::new(&scratch.0, &options.source, options.pool)?;
    let mut report = Report::new(options.source.display().to_string(), &bench.manifest);
    // Not counted. What is loaded for the second time is read through the page cache, and when it is then dropped all the
    // same, no more after that.
    for _ in 0..3 {
        bench.cold(1)?;
    }
    for round in 0..options.rounds.max(1) {
        eprintln!("round {} of {}", round + 1, options.rounds.max(1));
        for &tokens in &options.prompt_tokens {
            report.add(bench.cold(tokens)?);
        }
    }
    if let Some(path) = &options.svg {
        std::fs::write(path, report.chart()).with_context(|| format!("writing {}", path.display()))?;
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&report.summary())?);
    } else {
        report.print();
    }
    Ok(())
}

/// What happened, in any order.
#[derive(Debug, Default)]
struct Recorder(Mutex<Recorded>);

#[derive(Debug, Default)]
struct Recorded {
    /// First byte of the tensor in its file, bytes, when.
    arrived: Vec<(u64, usize, Instant)>,
    /// What, and when it ended.
    computed: Vec<(Computed, Instant)>,
}

impl Recorder {
    /// What was seen since this was last asked.
    fn take(&self) -> Recorded {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Observer for Recorder {
    fn arrived(&self, arrived: Arrived<'_>) {
        let now = Instant::now();
        let mut recorded = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        recorded.arrived.push((arrived.tensor, arrived.bytes, now));
    }

    fn computed(&self, computed: Computed) {
        let now = Instant::now();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).computed.push((computed, now));
    }
}

/// A node with the model, and one that takes its place in the pool.
struct Bench {
    node: Arc<Node>,
    recorder: Arc<Recorder>,
    model: Arc<DeployedModel>,
    filler: Arc<DeployedModel>,
    manifest: Manifest,
    file: PathBuf,
    /// Prompts so far: no two begin alike, or the second would find the keys and values of the first.
    prompts: u32,
}

impl Bench {
    fn new(dir: &Path, source: &Path, pool: PoolLayout) -> anyhow::Result<Bench> {
        let bytes = tangram_checkpoint::open(source)?.weight_bytes();
        let recorder = Arc::new(Recorder::default());
        let mut config = NodeConfig::new(dir.join("data"), bytes + KV_BYTES);
        config.backend = pool.into();
        config.observer = Some(recorder.clone());
        let node = Node::open(config)?;
        eprintln!("importing {} into {}", crate::output::bytes(bytes), dir.display());
        let go_on = &mut |_| ControlFlow::Continue(());
        // Stored as they are computed with, so that bytes over rate is what reading takes.
        let model = node.deploy_as(WeightLayout::Plain, "model", source, go_on)?;
        let filling = dir.join("filler");
        filler::write(&filling, bytes + KV_BYTES)?;
        let filler = node.deploy_in_place("filler", &filling, go_on)?;
        let manifest = read_manifest(&model.directory)?;
        let file = model.directory.join(DATA_FILE);
        Ok(Bench { node, recorder, model, filler, manifest, file, prompts: 0 })
    }

    /// The time to the first token with nothing of the model in memory, and what it consists of.
    fn cold(&mut self, tokens: usize) -> anyhow::Result<Cold> {
        raw::drop_cache(&self.file)?;
        let disk = raw::direct(&self.file)?;
        // The other model is still busy when the request comes, and ends then: a node with nothing to do fetches what is
        // asked for next, and here that is no secret. The time counts from when the request's turn has come.
        let mut filling = self.start(&self.filler.clone(), 1, FILLER_TOKENS)?;
        first_token(&mut filling)?;
        self.recorder.take();
        let submitted = Instant::now();
        let mut generation = self.start(&self.model.clone(), tokens, 1)?;
        let timing = first_token(&mut generation)?;
        let recorded = self.recorder.take();
        let loaded = timing.bytes_loaded;
        let there = self.model.weight_bytes - loaded;
        // Beside the other model is hardly any room.
        if there > self.model.weight_bytes / 10 {
            bail!("{} of the model were in memory", crate::output::bytes(there));
        }
        let mut resident = self.start(&self.model.clone(), tokens, 1)?;
        let resident = first_token(&mut resident)?;
        let prefill = (resident.first_token - resident.queue).as_secs_f64();
        let started = submitted + timing.queue;
        let since = |at: Instant| at.saturating_duration_since(started).as_secs_f64();
        let stage = |offset| self.manifest.tensors.iter().find(|tensor| tensor.offset == offset);
        let arrivals = recorded.arrived.iter().filter_map(|&(offset, bytes, at)| {
            Some(Arrival { stage: stage(offset)?.stage as usize, bytes, at: since(at) })
        });
        let own = recorded.computed.iter().filter(|(computed, _)| computed.started >= started);
        let stages = own.map(|&(Computed { stage, tokens, started }, ended)| Stage {
            stage,
            tokens,
            from: since(started),
            to: since(ended),
        });
        Ok(Cold {
            prompt_tokens: tokens,
            first_token: (timing.first_token - timing.queue).as_secs_f64(),
            disk: loaded as f64 * disk.seconds / disk.bytes as f64,
            prefill,
            arrivals: arrivals.collect(),
            stages: stages.collect(),
        })
    }

    /// Asks for so many tokens after a prompt of so many.
    fn start(
        &mut self,
        model: &Arc<DeployedModel>,
        tokens: usize,
        max_tokens: usize,
    ) -> anyhow::Result<Generation> {
        self.prompts += 1;
        let vocab = model.spec.vocab as u32;
        let token = |at: u32| (self.prompts + at).wrapping_mul(2_654_435_761) % vocab;
        let request = GenerateRequest {
            model: model.clone(),
            prompt: (0..tokens as u32).map(token).collect(),
            sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            stop_token_ids: Vec::new(),
            grammar: None,
        };
        Ok(self.node.generate(request)?)
    }
}

/// Waits for the first token; gives where the time until then went.
fn first_token(generation: &mut Generation) -> anyhow::Result<Timing> {
    let mut timing = Timing::default();
    loop {
        match generation.next_blocking().context("the node has ended")? {
            GenerateEvent::Started(until_now) => timing = until_now,
            GenerateEvent::Token(_) => return Ok(timing),
            GenerateEvent::Finished { .. } => bail!("there is no token"),
            GenerateEvent::Failed(error) => return Err(error.into()),
        }
    }
}
