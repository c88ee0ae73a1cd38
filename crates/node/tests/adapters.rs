//! LoRA adapters as models: the same as merged weights, one batch with their base, only their own bytes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use common::{deploy, eventually, finish, open, request, run, shared};
use tangram_checkpoint::{
    AdapterSource, Base, Manifest, Role, import, import_adapter, open as open_checkpoint, read_manifest,
};
use tangram_device::Arena;
use tangram_device::cpu::CpuDevice;
use tangram_engine::{Adapter, Chunk, Executor, LogitRows, Model, TensorDesc, Weights};
use tangram_node::{DeployError, DeployedModel, Node};
use tangram_testkit::{
    Family, Float, GgufOptions, RandomAdapter, RandomModel, mutate_layer, write_adapter, write_gguf,
    write_hf_model, write_merged,
};

const FAMILIES: [Family; 12] = [
    Family::Llama,
    Family::Qwen2,
    Family::Qwen3,
    Family::Mistral,
    Family::Mixtral,
    Family::Qwen3Moe,
    Family::Gemma2,
    Family::Gemma3,
    Family::Phi3,
    Family::Gpt2,
    Family::GptNeox,
    Family::Opt,
];

const PROMPT: [u32; 9] = [7, 250, 31, 8, 99, 180, 4, 77, 12];

fn deploy_adapter(node: &Arc<Node>, name: &str, adapter: &Path, base: &str) -> Arc<DeployedModel> {
    node.deploy_adapter(name, adapter, base, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn file_bytes(dir: &Path) -> u64 {
    let safetensors = std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    safetensors.len() as u64 - 8 - u64::from_le_bytes(safetensors[..8].try_into().unwrap())
}

struct HeapWeights {
    base: Vec<Vec<u8>>,
    adapter: Vec<Vec<u8>>,
}

impl Weights for HeapWeights {
    fn tensor(&self, index: usize) -> &[u8] {
        &self.base[index]
    }

    fn adapter_tensor(&self, _: usize, index: usize) -> &[u8] {
        &self.adapter[index]
    }
}

fn is_adapters(role: Role) -> bool {
    matches!(role, Role::LowRank(..))
}

/// The logits of all tokens by the engine alone, from the imported checkpoints under `root`.
fn logits(root: &Path, manifest: &Manifest, tokens: &[u32]) -> Vec<f32> {
    let files = |checkpoint: &str| std::fs::read(root.join(checkpoint).join("data.bin")).unwrap();
    let pick = |wanted: bool| -> (Vec<TensorDesc>, Vec<Vec<u8>>) {
        let tensors = manifest.tensors.iter().filter(|tensor| is_adapters(tensor.role) == wanted);
        let part = |t: &tangram_checkpoint::TensorEntry| {
            let desc = TensorDesc { role: t.role, dtype: t.dtype, shape: t.shape.clone() };
            (desc, files(&t.checkpoint)[t.offset as usize..(t.offset + t.bytes) as usize].to_vec())
        };
        tensors.map(part).unzip()
    };
    let ((descs, base), (own, adapter)) = (pick(false), pick(true));
    let model = Model::new(manifest.spec.base(), &descs).unwrap();
    let weights = HeapWeights { base, adapter };
    let executor = Executor::new(1);
    let layout = model.kv().unwrap();
    let memory = CpuDevice::open(64 << 20, 4096).unwrap();
    let count = tokens.len().div_ceil(layout.block_tokens);
    let arena = Arena::reserve(memory, count * layout.block_bytes).unwrap();
    let mut kv: Vec<_> =
        (0..count).map(|i| arena.claim(i * layout.block_bytes, layout.block_bytes).unwrap()).collect();
    let chunk = Chunk { tokens, position: 0, logits: LogitRows::All };
    let mut pass = if own.is_empty() {
        executor.begin(&model, &[chunk]).unwrap()
    } else {
        let adapter = Arc::new(Adapter::new(&manifest.spec, &own).unwrap());
        executor.begin_adapted(&model, &[chunk], &[], vec![adapter], &[Some(0)]).unwrap()
    };
    assert!(
        executor.advance(&mut pass, &model, &weights, &mut [kv.as_mut_slice().into()], usize::MAX).unwrap()
    );
    pass.logits(0).to_vec()
}

/// Imports a model, the same with an adapter, and the same with the adapter merged in; compares the last two.
fn compare_with_merged(
    what: &str,
    source: &Path,
    hugging_face: &Path,
    adapter: &RandomAdapter,
    tokens: &[u32],
) {
    let temp = tempfile::tempdir().unwrap();
    let dir = |name: &str| {
        let dir = temp.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        dir
    };
    let go_on = &mut |_| ControlFlow::Continue(());
    write_adapter(hugging_face, &dir("peft"), adapter);
    write_merged(hugging_face, &dir("peft"), &dir("merged-hf"));
    let base = import(&open_checkpoint(source).unwrap(), &dir("base"), "base", &|_| None, go_on).unwrap();
    let merged_source = open_checkpoint(&dir("merged-hf")).unwrap();
    let merged = import(&merged_source, &dir("merged"), "merged", &|_| None, go_on).unwrap();
    let adapter_source = AdapterSource::open(&dir("peft"), &base).unwrap();
    let of = Base { name: "base", manifest: &base, dir: &dir("base") };
    import_adapter(&adapter_source, of, &dir("adapted"), "adapted", &|_| None, go_on).unwrap();
    let adapted = read_manifest(&dir("adapted")).unwrap();
    assert!(adapted.data_bytes <= file_bytes(&dir("peft")).next_multiple_of(4096) + 256 * 200, "{what}");
    let found = logits(temp.path(), &adapted, tokens);
    let expected = logits(temp.path(), &merged, tokens);
    let plain = logits(temp.path(), &base, tokens);
    let vocab = base.spec.vocab;
    let mut moved = 0.0f32;
    for (row, (found, expected)) in found.chunks(vocab).zip(expected.chunks(vocab)).enumerate() {
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|&a, &b| expected[b].total_cmp(&expected[a]));
        let largest = expected.iter().fold(0.0f32, |a, &b| a.max(b.abs()));
        for &token in &order[..16] {
            let error = (found[token] - expected[token]).abs() / expected[token].abs().max(largest / 10.0);
            assert!(
                error < 1e-3,
                "{what}: row {row} token {token}: {} not {}",
                found[token],
                expected[token]
            );
        }
        let best = (0..vocab).max_by(|&a, &b| found[a].total_cmp(&found[b])).unwrap();
        if expected[order[0]] - expected[order[1]] > 1e-3 * largest {
            assert_eq!(best, order[0], "{what}: row {row}");
        }
        let of_plain = &plain[row * vocab..(row + 1) * vocab];
        moved = (0..vocab).fold(moved, |a, i| a.max((of_plain[i] - found[i]).abs() / largest));
    }
    assert!(moved > 0.02, "{what}: the adapter changes too little to tell: {moved}");
}

#[test]
fn every_family_agrees_with_its_merged_weights() {
    let temp = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..40u32).map(|i| 1 + (i * 37 + i * i * 11) % 255).collect();
    for family in FAMILIES {
        let dir = temp.path().join(family.name());
        let model = RandomModel::tiny(family);
        write_hf_model(&dir, &model);
        let adapter = RandomAdapter { root_scale: family == Family::Qwen2, ..RandomAdapter::new(3) };
        compare_with_merged(family.name(), &dir, &dir, &adapter, &tokens);
        if family != Family::Opt {
            let gguf = temp.path().join(format!("{}.gguf", family.name()));
            write_gguf(&gguf, &model, GgufOptions::default());
            compare_with_merged(&format!("{} from GGUF", family.name()), &gguf, &dir, &adapter, &tokens);
        }
    }
}

#[test]
fn the_reference_models_agree_with_their_merged_weights() {
    let Some(parity) = shared("models/parity") else { return };
    let tokens: Vec<u32> = (0..24u32).map(|i| 1 + (i * 37 + i * i * 11) % 90).collect();
    let mut tried = 0;
    for entry in std::fs::read_dir(parity).unwrap() {
        let dir = entry.unwrap().path();
        if dir.join("model.safetensors").exists() {
            compare_with_merged(&dir.display().to_string(), &dir, &dir, &RandomAdapter::new(5), &tokens);
            tried += 1;
        }
    }
    assert_eq!(tried, 13);
}

/// A deployed base with adapters a0, a1, ...
struct Deployed {
    _temp: tempfile::TempDir,
    node: Arc<Node>,
    base: Arc<DeployedModel>,
    adapters: Vec<Arc<DeployedModel>>,
    /// Of each adapter's tensors.
    bytes: u64,
}

fn deployed(count: u64) -> Deployed {
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("base");
    write_hf_model(&source, &RandomModel::tiny(Family::Llama));
    let node = open(&temp.path().join("data"), 64 << 20);
    let base = deploy(&node, "base", &source);
    let adapters = (0..count).map(|index| {
        let dir = temp.path().join(format!("adapter-{index}"));
        write_adapter(&source, &dir, &RandomAdapter::new(index));
        deploy_adapter(&node, &format!("a{index}"), &dir, "base")
    });
    let adapters: Vec<_> = adapters.collect();
    let bytes = file_bytes(&temp.path().join("adapter-0"));
    Deployed { _temp: temp, node, base, adapters, bytes }
}

#[test]
fn an_adapter_loads_its_own_bytes_and_the_base_stays() {
    let Deployed { _temp, node, base, adapters, bytes } = deployed(2);
    assert_eq!(adapters[0].base.as_deref(), Some("base"));
    let first = run(&node, request(&base, &PROMPT, 8));
    assert_eq!(first.timing.bytes_loaded, base.weight_bytes);
    for adapter in &adapters {
        let cold = run(&node, request(adapter, &PROMPT, 8));
        assert_eq!((cold.timing.bytes_loaded, cold.timing.bytes_reused), (bytes, base.weight_bytes));
        let again = run(&node, request(adapter, &PROMPT, 8));
        assert_eq!((again.timing.bytes_loaded, again.timing.bytes_reused), (0, base.weight_bytes + bytes));
        assert_eq!(cold.tokens, again.tokens);
        assert_ne!(cold.tokens, first.tokens, "the adapter changes what is said");
        let status = node.list().into_iter().find(|status| status.name == adapter.name).unwrap();
        assert_eq!(status.weight_bytes, base.weight_bytes + bytes);
        assert_eq!(status.shared_bytes, base.weight_bytes);
        assert_eq!(status.base.as_deref(), Some("base"));
    }
    assert_eq!(run(&node, request(&base, &PROMPT, 8)).tokens, first.tokens);
}

#[test]
fn adapters_and_their_base_share_batches_and_prefixes_are_kept_apart() {
    let Deployed { _temp, node, base, adapters, .. } = deployed(4);
    let models: Vec<_> = adapters.iter().chain([&base]).cloned().collect();
    // Long enough for cached prefixes; the same prompt for all.
    let prompt: Vec<u32> = (0..50).map(|i| i * 5 % 250).collect();
    let alone: Vec<Vec<u32>> =
        models.iter().map(|model| run(&node, request(model, &prompt, 24)).tokens).collect();
    for pair in alone.windows(2) {
        assert_ne!(pair[0], pair[1], "adapters differ");
    }
    for _ in 0..3 {
        let running: Vec<_> =
            (0..30).map(|i| (i % 5, node.generate(request(&models[i % 5], &prompt, 24)).unwrap())).collect();
        for (model, generation) in running {
            let outcome = finish(generation).unwrap();
            assert_eq!(outcome.tokens, alone[model], "{}", models[model].name);
            assert!(outcome.timing.cached_tokens > 0, "its own prefix is cached");
        }
    }
    // A batch is activated when its first sequence starts. Were there a batch per model, a round would need five.
    let activations = node.status().activations_total;
    assert!(activations < 5 + 3 * 5, "{activations}");
}

#[test]
fn a_cold_adapter_with_a_cold_base_and_after_a_restart() {
    let Deployed { _temp: temp, node, adapters, base, bytes } = deployed(2);
    let expected = run(&node, request(&adapters[1], &PROMPT, 12)).tokens;
    drop((adapters, node));
    let node = open(&temp.path().join("data"), 64 << 20);
    let adapter = node.model("a1").unwrap();
    let outcome = run(&node, request(&adapter, &PROMPT, 12));
    assert_eq!(outcome.tokens, expected);
    assert_eq!(outcome.timing.bytes_loaded, base.weight_bytes + bytes);
    assert_eq!(node.list().len(), 3);
}

#[test]
fn the_base_may_go_and_may_change_without_changing_its_adapters() {
    let Deployed { _temp: temp, node, base, adapters, .. } = deployed(2);
    let expected: Vec<_> = adapters.iter().map(|a| run(&node, request(a, &PROMPT, 12)).tokens).collect();
    let of_base = run(&node, request(&base, &PROMPT, 12)).tokens;
    // Other weights under the base's name.
    let changed = temp.path().join("changed");
    mutate_layer(&temp.path().join("base"), &changed, 1);
    let other = deploy(&node, "base", &changed);
    assert_ne!(run(&node, request(&other, &PROMPT, 12)).tokens, of_base);
    assert_eq!(run(&node, request(&adapters[0], &PROMPT, 12)).tokens, expected[0]);
    // No base at all.
    node.remove("base").unwrap();
    for (adapter, expected) in adapters.iter().zip(&expected) {
        assert_eq!(&run(&node, request(adapter, &PROMPT, 12)).tokens, expected);
    }
    assert_eq!(node.list().len(), 2, "a base that is not deployed is not listed");
    drop(node);
    let node = open(&temp.path().join("data"), 64 << 20);
    let adapter = node.model("a0").unwrap();
    assert_eq!(run(&node, request(&adapter, &PROMPT, 12)).tokens, expected[0]);
    // The same weights again: adapters and base share a batch once more, and nothing is loaded twice.
    let again = deploy(&node, "base", &temp.path().join("base"));
    let outcome = run(&node, request(&again, &PROMPT, 12));
    assert_eq!((outcome.tokens, outcome.timing.bytes_loaded), (of_base, 0));
    assert_eq!(run(&node, request(&adapter, &PROMPT, 12)).tokens, expected[0]);
    for name in ["base", "a0", "a1"] {
        node.remove(name).unwrap();
    }
    let checkpoints = temp.path().join("data/checkpoints");
    eventually("all files are gone", || std::fs::read_dir(&checkpoints).unwrap().count() == 0);
    eventually("all memory is free", || node.status().resident_bytes == 0);
}

#[test]
fn tight_memory_and_damage_hit_the_right_requests() {
    let Deployed { _temp: temp, node, base, adapters, bytes } = deployed(3);
    let expected: Vec<_> = adapters.iter().map(|a| run(&node, request(a, &PROMPT, 40)).tokens).collect();
    let of_base = run(&node, request(&base, &PROMPT, 40)).tokens;
    let needed = base.weight_bytes + bytes;
    drop(node);
    // Room for the base, about one adapter and some KV.
    let node = open(&temp.path().join("data"), (needed + needed / 2).next_multiple_of(1 << 20).max(1 << 20));
    for _ in 0..2 {
        let running: Vec<_> = (0..12)
            .map(|i| match i % 4 {
                3 => (&of_base, node.generate(request(&node.model("base").unwrap(), &PROMPT, 40)).unwrap()),
                a => (
                    &expected[a],
                    node.generate(request(&node.model(&format!("a{a}")).unwrap(), &PROMPT, 40)).unwrap(),
                ),
            })
            .collect();
        for (expected, generation) in running {
            assert_eq!(&finish(generation).unwrap().tokens, expected);
        }
    }
    drop(node);
    // An adapter whose file is damaged fails alone.
    let node = open(&temp.path().join("data"), 64 << 20);
    let damaged = node.model("a1").unwrap().directory.join("data.bin");
    let length = std::fs::metadata(&damaged).unwrap().len() as usize;
    std::fs::write(&damaged, vec![0x55; length]).unwrap();
    let names = ["base", "a0", "a1"];
    let running: Vec<_> = (0..9)
        .map(|i| node.generate(request(&node.model(names[i % 3]).unwrap(), &PROMPT, 40)).unwrap())
        .collect();
    for (i, generation) in running.into_iter().enumerate() {
        match (i % 3, finish(generation)) {
            (2, Err(error)) => assert!(error.to_string().contains("'a1'"), "{error}"),
            (model, outcome) => {
                assert_eq!(outcome.unwrap().tokens, if model == 0 { &of_base } else { &expected[0] }[..]);
            }
        }
    }
}

#[test]
fn what_cannot_be_deployed_says_why() {
    let Deployed { _temp: temp, node, .. } = deployed(1);
    let adapter = temp.path().join("adapter-0");
    let deploy = |name: &str, adapter: &Path, base: &str| {
        node.deploy_adapter(name, adapter, base, &mut |_| ControlFlow::Continue(())).map(drop).unwrap_err()
    };
    assert!(matches!(deploy("x", &adapter, "nobody"), DeployError::UnknownModel(name) if name == "nobody"));
    assert!(matches!(deploy("base", &adapter, "base"), DeployError::BadName(_)));
    assert!(deploy("x", &adapter, "a0").to_string().contains("adapter on an adapter"));
    assert!(matches!(deploy("x", &temp.path().join("nothing"), "base"), DeployError::Checkpoint(_)));
    assert!(node.model("x").is_none());
    // For another base.
    let wide = temp.path().join("wide");
    write_hf_model(
        &wide,
        &RandomModel { hidden: 128, dtype: Float::BF16, ..RandomModel::tiny(Family::Llama) },
    );
    let other = temp.path().join("other");
    write_adapter(&wide, &other, &RandomAdapter { dtype: Float::BF16, ..RandomAdapter::new(1) });
    assert!(deploy("x", &other, "base").to_string().contains("shape"));
}
