//! Sequences beyond longrope's original context: which factors they get, from where on, and what they share.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use common::{deploy, finish, open, request, run};
use serde_json::{Value, json};
use tangram_checkpoint::{Manifest, import, open as open_checkpoint};
use tangram_device::Arena;
use tangram_device::cpu::CpuDevice;
use tangram_engine::{Chunk, Executor, LogitRows, Model, TensorDesc, Weights};
use tangram_testkit::{Family, RandomModel, write_hf_model};

/// Tokens before the stretching: more than a step takes, so that a long prompt begins with a chunk that would be short.
const ORIGINAL: usize = 300;
const POOL: u64 = 64 << 20;

fn write(dir: &Path) {
    write_hf_model(dir, &RandomModel { context: 640, ..RandomModel::tiny(Family::Phi3) });
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let factors = |first: f64| (0..8).map(|pair| first + f64::from(pair)).collect::<Vec<f64>>();
    config["original_max_position_embeddings"] = json!(ORIGINAL);
    config["rope_scaling"] =
        json!({"type": "longrope", "short_factor": factors(1.0), "long_factor": factors(3.0)});
    fs::write(path, config.to_string()).unwrap();
}

struct HeapWeights(Vec<Vec<u8>>);

impl Weights for HeapWeights {
    fn tensor(&self, index: usize) -> &[u8] {
        &self.0[index]
    }
}

/// The model without a node.
struct Alone {
    model: Model,
    weights: HeapWeights,
}

impl Alone {
    fn new(source: &Path, dir: &Path) -> Alone {
        fs::create_dir_all(dir).unwrap();
        let source = open_checkpoint(source).unwrap();
        assert_eq!(source.spec().context, 640);
        let manifest: Manifest =
            import(&source, dir, "alone", &|_| None, &mut |_| ControlFlow::Continue(())).unwrap();
        let data = fs::read(dir.join("data.bin")).unwrap();
        let describe = |t: &tangram_checkpoint::TensorEntry| TensorDesc {
            role: t.role,
            dtype: t.dtype,
            shape: t.shape.clone(),
        };
        let descs: Vec<TensorDesc> = manifest.tensors.iter().map(describe).collect();
        let bytes = manifest.tensors.iter().map(|t| data[t.offset as usize..][..t.bytes as usize].to_vec());
        Alone { model: Model::new(manifest.spec, &descs).unwrap(), weights: HeapWeights(bytes.collect()) }
    }

    /// The likeliest token after these, all computed anew.
    fn next(&self, tokens: &[u32]) -> u32 {
        let executor = Executor::new(1);
        let layout = self.model.kv().unwrap();
        let count = tokens.len().div_ceil(layout.block_tokens);
        let memory = CpuDevice::open(16 << 20, 4096).unwrap();
        let arena = Arena::reserve(memory, count * layout.block_bytes).unwrap();
        let mut kv: Vec<_> =
            (0..count).map(|i| arena.claim(i * layout.block_bytes, layout.block_bytes).unwrap()).collect();
        let chunk = Chunk { tokens, position: 0, logits: LogitRows::Last };
        let mut pass = executor.begin(&self.model, &[chunk]).unwrap();
        let kv = &mut [kv.as_mut_slice().into()];
        assert!(executor.advance(&mut pass, &self.model, &self.weights, kv, usize::MAX).unwrap());
        let logits = pass.logits(0);
        (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap() as u32
    }

    /// What follows a prompt when every token is chosen by a pass over all tokens before it.
    fn follow(&self, prompt: &[u32], count: usize) -> Vec<u32> {
        let mut tokens = prompt.to_vec();
        for _ in 0..count {
            tokens.push(self.next(&tokens));
        }
        tokens.split_off(prompt.len())
    }
}

fn prompt(length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| (i * i * 7 + i * 3 + 11) % 256).collect()
}

#[test]
fn a_sequence_is_rotated_by_its_length() {
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("model");
    write(&source);
    let alone = Alone::new(&source, &temp.path().join("alone"));
    assert_eq!(alone.model.short_context(), Some(ORIGINAL));
    let node = open(&temp.path().join("data"), POOL);
    let model = deploy(&node, "phi", &source);
    assert_eq!(model.context, 640);

    // Short, then across the border: all of it anew with the long factors.
    let crossing = prompt(ORIGINAL - 6);
    let expected = alone.follow(&crossing, 16);
    assert_eq!(run(&node, request(&model, &crossing, 16)).tokens, expected);
    // With the beginning cached, which is of use up to the border only.
    let again = run(&node, request(&model, &crossing, 16));
    assert_eq!(again.tokens, expected);
    assert!(again.timing.cached_tokens >= 256);

    // Long from the start: what a shorter one has left in the cache is not for it.
    let long = prompt(ORIGINAL + 40);
    let expected = alone.follow(&long, 4);
    let first = run(&node, request(&model, &long, 4));
    // The sequences above have become long with the same beginning.
    assert_eq!(first.tokens, expected);
    assert_eq!(run(&node, request(&model, &long, 4)).tokens, expected);

    let fresh = open(&temp.path().join("fresh"), POOL);
    let model = deploy(&fresh, "phi", &source);
    run(&fresh, request(&model, &prompt(ORIGINAL - 20), 1));
    let alone_there = run(&fresh, request(&model, &long, 4));
    assert_eq!((alone_there.tokens, alone_there.timing.cached_tokens), (expected, 0));
}

#[test]
fn crossing_together_changes_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("model");
    write(&source);
    let alone = Alone::new(&source, &temp.path().join("alone"));
    let node = open(&temp.path().join("data"), POOL);
    let model = deploy(&node, "phi", &source);
    let prompts: Vec<Vec<u32>> =
        [ORIGINAL - 9, 40, ORIGINAL - 3, ORIGINAL, ORIGINAL + 1].map(prompt).into_iter().collect();
    let running: Vec<_> =
        prompts.iter().map(|prompt| node.generate(request(&model, prompt, 12)).unwrap()).collect();
    for (prompt, generation) in prompts.iter().zip(running) {
        assert_eq!(finish(generation).unwrap().tokens, alone.follow(prompt, 12), "{}", prompt.len());
    }
}
