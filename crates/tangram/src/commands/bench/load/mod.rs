//! `tangram bench load`: how fast a checkpoint gets from disk into the pool, beside what the disk and the memory give.
//!
//! Everything runs in turn within each round, so that a disturbance meets all of it; a share is taken within a round, and
//! the median of the rounds is reported. Page faults of a new pool are no part of any figure: a pool pays them once.

mod ours;
mod peers;
pub(super) mod raw;
pub(super) mod report;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use tangram_checkpoint::{DATA_FILE, Layout, Source, TensorEntry, codec_format};
use tangram_node::Backend;
use tangram_store::Measured;

use self::ours::Bench;
use self::report::{Report, Run};
use crate::config::PoolLayout;

/// What to load, and beside what.
#[derive(Args)]
pub(crate) struct Options {
    /// Checkpoint: Hugging Face directory, .safetensors file with its config.json beside it, or .gguf file.
    source: PathBuf,
    /// Directory on the disk that is to be measured; the checkpoint is imported to it and removed afterwards [default:
    /// the directory of the checkpoint].
    #[arg(long)]
    scratch: Option<PathBuf>,
    /// How often everything is run.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// How the pool is laid out.
    #[arg(long, value_enum, default_value = "paged")]
    pool: PoolLayout,
    /// A Python with safetensors, fastsafetensors or runai-model-streamer, which then load the same files in turn.
    #[arg(long)]
    peers: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Write a chart.
    #[arg(long)]
    svg: Option<PathBuf>,
}

/// How one run went.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    pub(super) bytes: u64,
    pub(super) seconds: f64,
    /// User and system time of the process.
    cpu_seconds: f64,
    /// Most memory that was resident beside what was loaded into, if that is known.
    peak_bytes: Option<u64>,
}

/// Measures and reports.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let scratch = Scratch::create(options.scratch.as_deref(), &options.source)?;
    let source = tangram_checkpoint::open(&options.source)?;
    let bytes = source.weight_bytes();
    eprintln!("importing {} into {}", crate::output::bytes(bytes), scratch.0.display());
    let go_on = &mut |_| ControlFlow::Continue(());
    let manifest = tangram_checkpoint::import(&source, &scratch.0, "bench", &|_| None, go_on)?;
    let file = scratch.0.join(DATA_FILE);
    let measured = tangram_store::measure(&file)?;
    let backend = options.pool.into();
    let mut compressed = import_compressed(&source, &scratch.0.join("compressed"), (measured, backend))?;
    drop(source);
    let peers = match &options.peers {
        Some(python) => peers::Peers::find(python, &options.source)?,
        None => peers::Peers::none(),
    };
    let mut bench = Bench::new(&manifest, &file, measured, backend)?;
    let mut report = Report::new(options.source.display().to_string(), bytes, measured);
    // Not counted: everything is touched for the first time.
    bench.whole(ours::Mode::COLD)?;
    compressed.iter_mut().try_for_each(|bench| bench.whole(ours::Mode::COLD).map(drop))?;
    for round in 0..options.rounds.max(1) {
        eprintln!("round {} of {}", round + 1, options.rounds.max(1));
        let mut runs = Vec::new();
        raw::drop_cache(&file)?;
        let disk = bench.raw()?;
        runs.push(Run::limit("raw direct reads", disk));
        for (name, mode) in [
            ("cold", ours::Mode::COLD),
            ("cold, sampled", ours::Mode { sampled: true, ..ours::Mode::COLD }),
            ("cold, 16 loads at once", ours::Mode { loads: 16, ..ours::Mode::COLD }),
        ] {
            runs.push(Run::of(name, bench.whole(mode)?, disk));
        }
        if let Some(compressed) = &mut compressed {
            runs.push(Run::of("cold, compressed", compressed.whole(ours::Mode::COLD)?, disk));
        }
        runs.extend(peers.cold()?.into_iter().map(|(name, cost)| Run::of(&name, cost, disk)));
        let [alone, among] = bench.urgent()?;
        report.urgent(alone, among);
        raw::write_anew(&file)?;
        let memory = raw::copy(bytes);
        runs.push(Run::limit("memory copy", memory));
        let warm = ours::Mode { cold: false, ..ours::Mode::COLD };
        for (name, mode) in [
            ("warm", warm),
            ("warm, again", ours::Mode { again: true, ..warm }),
            ("warm, sampled", ours::Mode { sampled: true, ..warm }),
        ] {
            runs.push(Run::of(name, bench.whole(mode)?, memory));
        }
        if let Some(compressed) = &mut compressed {
            raw::write_anew(compressed.file())?;
            runs.push(Run::of("warm, compressed", compressed.whole(warm)?, memory));
        }
        runs.extend(peers.warm()?.into_iter().map(|(name, cost)| Run::of(&name, cost, memory)));
        report.add(runs);
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

/// The same checkpoint with its tensors compressed; `None` if none of them is smaller that way.
fn import_compressed(
    source: &Source,
    dir: &Path,
    (measured, backend): (Option<Measured>, Backend),
) -> anyhow::Result<Option<Bench>> {
    if !source.tensors().iter().any(|tensor| codec_format(tensor.dtype).is_some()) {
        return Ok(None);
    }
    std::fs::create_dir(dir).with_context(|| format!("creating {}", dir.display()))?;
    let go_on = &mut |_| ControlFlow::Continue(());
    let manifest =
        tangram_checkpoint::import_as(Layout::Compressed, source, dir, "compressed", &|_| None, go_on)?;
    let stored: u64 = manifest.tensors.iter().map(TensorEntry::stored_bytes).sum();
    eprintln!(
        "compressed: {} of {}",
        crate::output::bytes(stored),
        crate::output::bytes(source.weight_bytes())
    );
    if stored == source.weight_bytes() {
        return Ok(None);
    }
    Bench::new(&manifest, &dir.join(DATA_FILE), measured, backend).map(Some)
}

/// A directory that goes when this does.
pub(super) struct Scratch(pub(super) PathBuf);

impl Scratch {
    /// In `parent`, or beside the source.
    pub(super) fn create(parent: Option<&Path>, source: &Path) -> anyhow::Result<Scratch> {
        let beside = if source.is_dir() { source } else { source.parent().unwrap_or(Path::new("")) };
        let parent = parent.unwrap_or(beside);
        let dir = parent.join(format!("tangram-bench-load-{}", std::process::id()));
        std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        Ok(Scratch(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("warning: {} was not removed: {error}", self.0.display());
        }
    }
}
