//! Speed of the executor beside llama.cpp: the same GGUF files, tokens and threads, taking turns, medians.
//!
//! `cargo run --release -- make DIR` writes random models in the shape of Qwen2.5-0.5B as bf16, Q8_0 and Q4_K_M;
//! `cargo run --release -- compare FILE...` measures. Building needs a C++ compiler, cmake and libclang (Debian:
//! `g++ cmake libclang-dev`) and takes minutes, which is why this crate is a workspace of its own.
//! It measures executors only: no tokenizer, sampler or server. Nothing in the product may depend on it.

mod files;
mod ours;
mod report;
mod theirs;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use clap::Parser;

use rustix::time::{ClockId, clock_gettime};

use report::{Cell, Losses, Report};

#[derive(Parser)]
enum Command {
    /// Writes the random models into a folder.
    Make {
        /// Where to.
        dir: PathBuf,
    },
    /// Runs both engines in turn.
    Compare {
        /// GGUF files.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Threads of each engine. With one, times are that thread's own processor time, so that a machine with other
        /// work gives usable ratios too.
        #[arg(long, default_value_t = 2)]
        threads: usize,
        /// Turns per cell.
        #[arg(long, default_value_t = 7)]
        rounds: usize,
        /// Measure decoding beside this many busy loops instead of on an idle machine.
        #[arg(long, default_value_t = 0)]
        busy: usize,
        /// Also compare perplexities of these texts, by llama.cpp's tokens, in windows of 512.
        #[arg(long, value_name = "FILE", value_delimiter = ',')]
        text: Vec<PathBuf>,
        /// Write the measurements here.
        #[arg(long)]
        json: Option<PathBuf>,
    },
}

/// Tokens in the cache before the first decoding step that is measured.
const PROMPT: usize = 128;
/// Tokens of a text that are read together, as llama.cpp's own perplexity tool does it.
const WINDOW: usize = 512;
/// Steps of a turn.
const STEPS: usize = 16;
/// Between two turns, so that the other engine's threads have gone to sleep.
const PAUSE: Duration = Duration::from_millis(100);

/// Measures a time: of the wall, or of the calling thread.
#[derive(Clone, Copy)]
struct Clock {
    id: ClockId,
}

impl Clock {
    fn for_threads(threads: usize) -> Clock {
        Clock { id: if threads == 1 { ClockId::ThreadCPUTime } else { ClockId::Monotonic } }
    }

    /// Seconds since some beginning.
    fn now(self) -> f64 {
        let time = clock_gettime(self.id);
        time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
    }
}

/// What both engines can do. A time is in seconds.
trait Engine {
    /// The time of a prompt of `tokens` tokens, logits of the last included.
    fn prefill(&mut self, tokens: usize) -> Result<f64>;
    /// The median time of a decoding step of `batch` sequences with [`PROMPT`] tokens and more in the cache.
    fn decode(&mut self, batch: usize) -> Result<f64>;
    /// The mean negative logarithm of the probability of each token after the first.
    fn loss(&mut self, tokens: &[u32]) -> Result<f64>;
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Make { dir } => files::make(&dir),
        Command::Compare { files, threads, rounds, busy, text, json } => {
            let mut report = Report::new(threads, rounds, busy);
            let stop = Arc::new(AtomicBool::new(false));
            let loops: Vec<_> = (0..busy).map(|_| busy_loop(Arc::clone(&stop))).collect();
            for file in &files {
                compare(file, threads, rounds, busy > 0, &text, &mut report)?;
            }
            stop.store(true, Ordering::Relaxed);
            for busy in loops {
                let _ = busy.join();
            }
            println!("{}", report.table());
            if let Some(path) = json {
                std::fs::write(path, serde_json::to_vec_pretty(&report.json())?)?;
            }
            Ok(())
        }
    }
}

fn busy_loop(stop: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        while !stop.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
    })
}

fn compare(
    file: &std::path::Path,
    threads: usize,
    rounds: usize,
    busy: bool,
    texts: &[PathBuf],
    report: &mut Report,
) -> Result<()> {
    let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let library = theirs::Library::open(file)?;
    let mut ours = ours::Ours::open(file, threads)?;
    let mut theirs = library.engine(threads)?;
    let mut all = Losses::default();
    for text in texts {
        let tokens = library.tokens(&std::fs::read_to_string(text)?);
        let mut losses = Losses::default();
        for window in tokens.chunks(WINDOW).filter(|window| window.len() > 1) {
            losses.add(window.len() - 1, ours.loss(window)?, theirs.loss(window)?);
        }
        all.merge(&losses);
        let text = text.file_name().unwrap_or_default().to_string_lossy();
        report.perplexity(format!("{name}, {text}"), losses);
    }
    if texts.len() > 1 {
        report.perplexity(format!("{name}, all texts"), all);
    }
    let cells: &[Cell] = if busy {
        &[Cell::Decode(1)]
    } else {
        &[Cell::Decode(1), Cell::Decode(8), Cell::Prefill(128), Cell::Prefill(512)]
    };
    for &cell in cells {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let mut bandwidth = Vec::new();
        // The first turn warms up.
        for round in 0..=rounds {
            let turn = |engine: &mut dyn Engine, times: &mut Vec<f64>| -> Result<()> {
                std::thread::sleep(PAUSE);
                let seconds = match cell {
                    Cell::Prefill(tokens) => engine.prefill(tokens)? / tokens as f64,
                    Cell::Decode(batch) => engine.decode(batch)? / batch as f64,
                };
                if round > 0 {
                    times.push(1.0 / seconds);
                }
                Ok(())
            };
            if round % 2 == 0 {
                turn(&mut ours, &mut a)?;
                turn(&mut theirs, &mut b)?;
            } else {
                turn(&mut theirs, &mut b)?;
                turn(&mut ours, &mut a)?;
            }
            if cell == Cell::Decode(1) {
                bandwidth.push(ours::read_bandwidth(threads));
            }
        }
        let decoded = if cell == Cell::Decode(1) { Some((ours.step_bytes(), bandwidth)) } else { None };
        report.cell(&name, cell, a, b, decoded);
    }
    Ok(())
}
