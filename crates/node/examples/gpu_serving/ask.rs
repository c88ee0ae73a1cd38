//! Requests of a measurement, and their timings.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tangram_device::cuda::Driver;
use tangram_node::{
    DeployedModel, Device, GenerateEvent, GenerateRequest, Generation, Node, NodeConfig, SamplingParams,
    Timing,
};

/// A node on GPU 0 over this data directory, with all memory.
pub(crate) fn config(driver: &Arc<Driver>, data: &Path) -> NodeConfig {
    let device = Device::Cuda { driver: driver.clone(), ordinal: 0 };
    NodeConfig {
        devices: vec![device],
        device_memory: None,
        max_waiting: 100_000,
        ..NodeConfig::new(data.to_owned(), 0)
    }
}

/// Ends a node. Threads that read for it end a moment later, and hold the memory until then.
pub(crate) fn close(node: Arc<Node>) {
    drop(node);
    std::thread::sleep(Duration::from_millis(500));
}

/// The model of this name.
pub(crate) fn model(node: &Node, name: &str) -> Result<Arc<DeployedModel>, Box<dyn Error>> {
    Ok(node.model(name).ok_or_else(|| format!("model '{name}' could not be used"))?)
}

/// A request with a prompt that no other seed has.
pub(crate) fn ask(model: &Arc<DeployedModel>, prompt: usize, tokens: usize, seed: usize) -> GenerateRequest {
    let id = |at: usize| ((at * 7919 + seed * 104_729) % model.spec.vocab) as u32;
    GenerateRequest {
        model: model.clone(),
        prompt: (0..prompt).map(id).collect(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens: Some(tokens),
        ignore_eos: true,
        stop_token_ids: Vec::new(),
        grammar: None,
    }
}

/// Waits for the end.
pub(crate) fn finish(mut generation: Generation) -> Result<Timing, Box<dyn Error>> {
    loop {
        match generation.next_blocking() {
            Some(GenerateEvent::Finished { timing, .. }) => return Ok(timing),
            Some(GenerateEvent::Failed(error)) => return Err(error.into()),
            Some(_) => {}
            None => return Err("a generation ended without an end".into()),
        }
    }
}

/// One request, alone.
pub(crate) fn run(node: &Node, request: GenerateRequest) -> Result<Timing, Box<dyn Error>> {
    finish(node.generate(request)?)
}

/// Seconds from admission to the first token in which the pass stood waiting for weights.
pub(crate) fn exposed(timing: &Timing) -> f64 {
    timing.first_token.saturating_sub(timing.queue + timing.prefill).as_secs_f64()
}
