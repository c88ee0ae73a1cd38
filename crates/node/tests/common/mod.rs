//! Helpers for the node's integration tests.
#![allow(dead_code, clippy::unwrap_used)]

pub mod gpu;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tangram_node::{
    DeployedModel, FinishReason, GenerateEvent, GenerateRequest, Generation, Node, NodeConfig, RequestError,
    SamplingParams, Timing,
};

/// The folder beside the repository with reference models, or a printed word that a test skips.
pub fn shared(part: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(part);
    if !path.exists() {
        println!("SKIPPED: ../shared/{part} is not here");
        return None;
    }
    Some(path)
}

pub fn open(data: &Path, device_memory: u64) -> Arc<Node> {
    Node::open(config(data, device_memory)).unwrap()
}

pub fn config(data: &Path, device_memory: u64) -> NodeConfig {
    NodeConfig {
        threads: Some(2),
        max_waiting: 100_000,
        ..NodeConfig::new(data.to_path_buf(), device_memory)
    }
}

pub fn deploy(node: &Arc<Node>, name: &str, source: &Path) -> Arc<DeployedModel> {
    node.deploy(name, source, &mut |_| ControlFlow::Continue(())).unwrap()
}

pub fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, ..SamplingParams::default() }
}

pub fn request(model: &Arc<DeployedModel>, prompt: &[u32], max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        model: model.clone(),
        prompt: prompt.to_vec(),
        sampling: greedy(),
        max_tokens: Some(max_tokens),
        ignore_eos: true,
        stop_token_ids: Vec::new(),
        grammar: None,
    }
}

pub struct Outcome {
    pub tokens: Vec<u32>,
    pub reason: FinishReason,
    pub timing: Timing,
}

pub fn finish(mut generation: Generation) -> Result<Outcome, RequestError> {
    let mut tokens = Vec::new();
    while let Some(event) = generation.next_blocking() {
        match event {
            GenerateEvent::Started(_) => {}
            GenerateEvent::Token(token) => tokens.push(token.id),
            GenerateEvent::Finished { reason, timing } => return Ok(Outcome { tokens, reason, timing }),
            GenerateEvent::Failed(error) => return Err(error),
        }
    }
    panic!("the generation ended without an end");
}

pub fn run(node: &Node, request: GenerateRequest) -> Outcome {
    finish(node.generate(request).unwrap()).unwrap()
}

/// Waits until a condition on the node's published status holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
