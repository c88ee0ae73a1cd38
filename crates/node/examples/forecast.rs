//! Forecasts against what happened: `forecast [rounds] [model ...]` deploys random models of several sizes and those
//! named, predicts first-token times before anything runs, runs cold and resident prompts, and prints both with the
//! relative error. The second part predicts again after the node has learned from the first. On a machine that does
//! other things too, the processor time of all threads divided by their number says what would have been without them.

use std::collections::BTreeMap;
use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tangram_node::{
    DeployedModel, GenerateEvent, GenerateRequest, Node, NodeConfig, PassShape, SamplingParams, Timing,
};
use tangram_testkit::{Family, Float, RandomModel, write_hf_model};

/// Prompt lengths, tokens.
const PROMPTS: [usize; 3] = [32, 128, 300];

/// Processor time that all threads of this process have used.
fn processor_time() -> std::time::Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    std::time::Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec.clamp(0, 999_999_999) as u32)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let rounds = args.next().and_then(|arg| arg.parse().ok()).unwrap_or(5);
    let (sources, data) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let mut models: Vec<(String, std::path::PathBuf)> =
        args.map(|path| (path.rsplit('/').next().unwrap_or(&path).to_owned(), path.into())).collect();
    let random = |hidden: usize, layers: usize, dtype, seed| RandomModel {
        hidden,
        intermediate: hidden * 3,
        layers,
        heads: hidden / 64,
        kv_heads: 2,
        head_dim: 64,
        vocab: 4096,
        context: 2048,
        dtype,
        seed,
        ..RandomModel::tiny(Family::Llama)
    };
    // The last one pushes everything else out.
    for (name, model) in [
        ("llama-256x6-bf16", random(256, 6, Float::BF16, 1)),
        ("llama-512x8-f16", random(512, 8, Float::F16, 2)),
        ("llama-768x10-f32", random(768, 10, Float::F32, 3)),
        ("other-768x10-f32", random(768, 10, Float::F32, 4)),
    ] {
        let directory = sources.path().join(name);
        write_hf_model(&directory, &model);
        models.push((name.to_owned(), directory));
    }
    let largest = models.iter().map(|(_, path)| size(path)).max().unwrap_or(0);
    let device_memory = largest + (6 << 20);
    let config = NodeConfig::new(data.path().to_owned(), device_memory);
    let node = Node::open(config)?;
    let mut deployed = Vec::new();
    for (name, source) in &models {
        let started = Instant::now();
        deployed.push(node.deploy(name, source, &mut |_| ControlFlow::Continue(()))?);
        println!("{name}: deployed in {:.0} ms", started.elapsed().as_secs_f64() * 1e3);
    }
    let other = deployed.pop().ok_or("no model")?;
    let (mut salt, mut other_salt) = (1, 1);
    let threads = std::thread::available_parallelism()?.get();
    for part in ["before anything ran", "after that"] {
        println!("\nfirst tokens predicted {part}, ms; medians of {rounds}");
        println!(
            "{:36} {:>6} {:8} {:>9} {:>9} {:>7} {:>9} {:>7}",
            "model", "prompt", "weights", "predicted", "measured", "error", "processor", "error"
        );
        let mut predicted = BTreeMap::new();
        for (index, model) in deployed.iter().enumerate() {
            for prompt in PROMPTS {
                let forecast = model.forecast();
                let seconds = |missing: &[u64]| Some(forecast.first_token(prompt, missing)?.first_token());
                let cold = seconds(forecast.bytes_by_stage()).ok_or("not measured")?;
                predicted.insert((index, prompt), (cold, seconds(&[]).ok_or("not measured")?));
            }
        }
        for (index, model) in deployed.iter().enumerate() {
            for prompt in PROMPTS {
                let (mut cold, mut resident, mut missing) = (Vec::new(), Vec::new(), 1.0);
                let mut timed = |tokens| -> Result<_, Box<dyn Error>> {
                    let before = processor_time();
                    let timing = run(&node, model, tokens, &mut salt)?;
                    let seconds = (processor_time() - before).as_secs_f64() / threads as f64;
                    Ok((timing, (timing.first_token.as_secs_f64(), seconds)))
                };
                for _ in 0..rounds {
                    run(&node, &other, 16, &mut other_salt)?;
                    let (timing, times) = timed(prompt)?;
                    // A few tensors may have stayed; then the forecast is for what was missing.
                    let share = timing.bytes_loaded as f64 / model.weight_bytes as f64;
                    if share > 0.8 {
                        missing = share;
                        cold.push(times);
                    }
                    let (timing, times) = timed(prompt)?;
                    if timing.bytes_loaded == 0 {
                        resident.push(times);
                    }
                }
                let (cold_seconds, resident_seconds) = predicted[&(index, prompt)];
                let cold_seconds = resident_seconds + (cold_seconds - resident_seconds) * missing;
                for (what, seconds, times) in
                    [("absent", cold_seconds, cold), ("resident", resident_seconds, resident)]
                {
                    let Some(wall) = median(times.iter().map(|times| times.0)) else { continue };
                    let Some(processor) = median(times.iter().map(|times| times.1)) else { continue };
                    let error = |measured: f64| (seconds / measured - 1.0) * 100.0;
                    println!(
                        "{:36} {prompt:6} {what:8} {:9.2} {:9.2} {:+6.1}% {:9.2} {:+6.1}%",
                        model.name,
                        seconds * 1e3,
                        wall * 1e3,
                        error(wall),
                        processor * 1e3,
                        error(processor)
                    );
                }
            }
        }
    }
    // The node publishes its status twice a second when idle.
    std::thread::sleep(Duration::from_millis(600));
    let shape = PassShape { tokens: 256, output_rows: 1, longest: 512 };
    let most = deployed.iter().map(|model| model.forecast().scratch_bytes(shape)).max().unwrap_or(0);
    println!("\nscratch: {most} bytes predicted for the largest, {} held", node.status().scratch_bytes);
    Ok(())
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// Bytes of a file, or of the files in a directory.
fn size(path: &Path) -> u64 {
    match std::fs::read_dir(path) {
        Ok(entries) => entries.flatten().map(|entry| size(&entry.path())).sum(),
        Err(_) => std::fs::metadata(path).map_or(0, |metadata| metadata.len()),
    }
}

/// Runs a prompt that no earlier one begins like.
fn run(
    node: &Node,
    model: &Arc<DeployedModel>,
    tokens: usize,
    salt: &mut u32,
) -> Result<Timing, Box<dyn Error>> {
    *salt += 1;
    let vocab = model.spec.vocab as u32;
    let prompt = (0..tokens as u32).map(|i| (i * 31 + *salt * 97) % vocab).collect();
    let mut generation = node.generate(GenerateRequest {
        model: model.clone(),
        prompt,
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens: Some(1),
        ignore_eos: true,
        stop_token_ids: Vec::new(),
        grammar: None,
    })?;
    while let Some(event) = generation.next_blocking() {
        match event {
            GenerateEvent::Finished { timing, .. } => return Ok(timing),
            GenerateEvent::Failed(error) => return Err(error.into()),
            _ => {}
        }
    }
    Err("the generation ended without an end".into())
}
