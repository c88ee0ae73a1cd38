//! Golden parity: tiny models of real families against what transformers computes in float32.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;

use common::{deploy, finish, open, request, run, shared};
use serde::Deserialize;
use tangram_checkpoint::{Manifest, import, read_manifest};
use tangram_device::Arena;
use tangram_device::cpu::CpuDevice;
use tangram_engine::{Chunk, Executor, LogitRows, Model, TensorDesc, Weights};

/// The families that this build serves.
const FAMILIES: [&str; 13] = [
    "gemma2",
    "gemma3",
    "gpt2",
    "gptneox",
    "llama",
    "llama3rope",
    "mistral",
    "mixtral",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3moe",
];

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<GoldenPrompt>,
}

#[derive(Deserialize)]
struct GoldenPrompt {
    prompt_ids: Vec<u32>,
    output_ids: Vec<u32>,
    last_logits_top: Vec<(u32, f32)>,
}

fn golden(family: &Path) -> Golden {
    serde_json::from_slice(&std::fs::read(family.join("golden.json")).unwrap()).unwrap()
}

struct HeapWeights(Vec<Vec<u8>>);

impl Weights for HeapWeights {
    fn tensor(&self, index: usize) -> &[u8] {
        &self.0[index]
    }
}

fn heap_weights(dir: &Path, manifest: &Manifest) -> HeapWeights {
    let data = std::fs::read(dir.join(tangram_checkpoint::DATA_FILE)).unwrap();
    let bytes = |at: u64, len: u64| data[at as usize..(at + len) as usize].to_vec();
    HeapWeights(manifest.tensors.iter().map(|tensor| bytes(tensor.offset, tensor.bytes)).collect())
}

#[test]
fn logits_agree_with_the_reference() {
    let Some(parity) = shared("models/parity") else { return };
    for family in FAMILIES {
        let dir = tempfile::tempdir().unwrap();
        let source = tangram_checkpoint::open(&parity.join(family)).unwrap();
        let go_on = &mut |_| std::ops::ControlFlow::Continue(());
        import(&source, dir.path(), "c", &|_| None, go_on).unwrap();
        let manifest = read_manifest(dir.path()).unwrap();
        let weights = heap_weights(dir.path(), &manifest);
        let descs: Vec<_> = manifest
            .tensors
            .iter()
            .map(|t| TensorDesc { role: t.role, dtype: t.dtype, shape: t.shape.clone() })
            .collect();
        let model = Model::new(manifest.spec.clone(), &descs).unwrap();
        let layout = model.kv().unwrap();
        let executor = Executor::new(2);
        let memory = CpuDevice::open(64 << 20, 4096).unwrap();
        for prompt in golden(&parity.join(family)).prompts {
            let tokens: Vec<u32> = prompt.prompt_ids.iter().chain(&prompt.output_ids).copied().collect();
            let blocks = tokens.len().div_ceil(layout.block_tokens);
            let arena = Arena::reserve(memory.clone(), blocks * layout.block_bytes).unwrap();
            let mut kv: Vec<_> = (0..blocks)
                .map(|i| arena.claim(i * layout.block_bytes, layout.block_bytes).unwrap())
                .collect();
            let chunk = Chunk { tokens: &tokens, position: 0, logits: LogitRows::All };
            let mut pass = executor.begin(&model, &[chunk]).unwrap();
            assert!(
                executor
                    .advance(&mut pass, &model, &weights, &mut [kv.as_mut_slice().into()], usize::MAX)
                    .unwrap()
            );
            let rows: Vec<&[f32]> = pass.logits(0).chunks(manifest.spec.vocab).collect();
            for (i, &expected) in prompt.output_ids.iter().enumerate() {
                let row = rows[prompt.prompt_ids.len() - 1 + i];
                let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
                assert_eq!(best as u32, expected, "{family}: token {i}");
            }
            let last = rows.last().unwrap();
            for &(token, expected) in &prompt.last_logits_top {
                let error = (last[token as usize] - expected).abs() / expected.abs().max(1e-6);
                assert!(
                    error < 1e-3,
                    "{family}: logit of {token} is {} not {expected}",
                    last[token as usize]
                );
            }
        }
    }
}

#[test]
fn golden_tokens_alone_and_mixed_cold_and_resident() {
    let Some(parity) = shared("models/parity") else { return };
    let data = tempfile::tempdir().unwrap();
    let node = open(data.path(), 16 << 20);
    let mut cases = Vec::new();
    for family in FAMILIES {
        let model = deploy(&node, family, &parity.join(family));
        for prompt in golden(&parity.join(family)).prompts {
            cases.push((request(&model, &prompt.prompt_ids, prompt.output_ids.len()), prompt.output_ids));
        }
    }
    let mut cold = 0;
    for round in ["cold or first", "resident"] {
        for (request, expected) in &cases {
            let outcome = run(&node, request.clone());
            cold += usize::from(outcome.timing.bytes_loaded > 0);
            assert_eq!(&outcome.tokens, expected, "alone, {round}: {}", request.model.name);
        }
    }
    assert_eq!(cold, FAMILIES.len(), "each family is loaded once");
    drop(node);
    // A fresh node on the same data directory: everything is cold again, all requests at once.
    let node = open(data.path(), 16 << 20);
    for round in ["cold", "resident"] {
        let running: Vec<_> = cases
            .iter()
            .map(|(request, expected)| {
                let model = node.model(&request.model.name).unwrap();
                (node.generate(tangram_node::GenerateRequest { model, ..request.clone() }).unwrap(), expected)
            })
            .collect();
        for (generation, expected) in running {
            assert_eq!(&finish(generation).unwrap().tokens, expected, "mixed, {round}");
        }
    }
}

#[test]
fn the_same_model_from_gguf_and_safetensors_is_the_same_bytes() {
    let Some(stories) = shared("models/stories260k") else { return };
    let data = tempfile::tempdir().unwrap();
    let node = open(data.path(), 16 << 20);
    let hf = deploy(&node, "hf", &stories);
    let gguf = deploy(&node, "gguf", &stories.join("stories260k-v1.gguf"));
    let prompt = [1, 403, 407, 261, 378];
    let first = run(&node, request(&hf, &prompt, 60));
    let second = run(&node, request(&gguf, &prompt, 60));
    assert_eq!(first.tokens, second.tokens);
    assert!(first.timing.bytes_loaded > 1_000_000);
    assert_eq!(second.timing.bytes_loaded, 0, "the second form brings no bytes of its own");
}
