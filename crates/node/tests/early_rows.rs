//! Cold starts of models whose token embedding comes last and whose passes begin with rows of it.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{config, deploy, finish, open, request, run};
use tangram_checkpoint::{Manifest, Role};
use tangram_node::{DeployedModel, Node};
use tangram_testkit::{Family, Float, RandomAdapter, RandomModel, write_adapter, write_hf_model};
use tempfile::tempdir;

/// Room for one of the models below.
const MEMORY: u64 = 8 << 20;
const PROMPT: [u32; 7] = [5, 11_999, 3, 40, 11_999, 9_000, 7];

/// Its token embedding has 1.5 or 3 MB.
fn model(family: Family, dtype: Float, tied: bool) -> RandomModel {
    RandomModel { dtype, tied, vocab: 12_000, ..RandomModel::tiny(family) }
}

fn answer(node: &Node, model: &Arc<DeployedModel>) -> Vec<u32> {
    run(node, request(model, &PROMPT, 8)).tokens
}

fn manifest(model: &DeployedModel) -> Manifest {
    serde_json::from_slice(&fs::read(model.directory.join("manifest.json")).unwrap()).unwrap()
}

/// Answers of models by a node that has room for all of them, twice each.
fn expected(sources: &[impl AsRef<Path>]) -> Vec<Vec<u32>> {
    let data = tempdir().unwrap();
    let node = open(data.path(), 256 << 20);
    let answers = sources.iter().enumerate().map(|(index, source)| {
        let model = deploy(&node, &format!("m{index}"), source.as_ref());
        let cold = answer(&node, &model);
        assert_eq!(answer(&node, &model), cold, "resident");
        cold
    });
    answers.collect()
}

#[test]
fn cold_and_resident_answers_are_the_same() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let models = [
        model(Family::Llama, Float::BF16, true),
        model(Family::Qwen3, Float::F32, false),
        model(Family::Gemma3, Float::F16, true),
        model(Family::Gpt2, Float::F32, true),
    ];
    let sources: Vec<_> = models
        .iter()
        .enumerate()
        .map(|(index, model)| {
            let source = sources.path().join(index.to_string());
            write_hf_model(&source, model);
            source
        })
        .collect();
    let expected = expected(&sources);
    let node = open(data.path(), MEMORY);
    let models: Vec<_> = sources
        .iter()
        .enumerate()
        .map(|(index, source)| deploy(&node, &format!("m{index}"), source))
        .collect();
    // There is room for hardly more than one, so each is cold when its turn comes.
    for _ in 0..3 {
        for (model, expected) in models.iter().zip(&expected) {
            let outcome = run(&node, request(model, &PROMPT, 8));
            assert_eq!(outcome.tokens, *expected, "{}", model.name);
        }
    }
}

#[test]
fn adapters_find_the_tensors_of_their_base() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let (base, adapter) = (sources.path().join("base"), sources.path().join("adapter"));
    write_hf_model(&base, &model(Family::Llama, Float::BF16, true));
    write_adapter(&base, &adapter, &RandomAdapter::new(3));
    let node = open(data.path(), MEMORY);
    let plain = deploy(&node, "base", &base);
    let adapted = node
        .deploy_adapter("adapted", &adapter, "base", &mut |_| std::ops::ControlFlow::Continue(()))
        .unwrap();
    let resident = [answer(&node, &plain), answer(&node, &adapted)];
    assert_ne!(resident[0], resident[1]);
    drop(node);
    // Cold, the adapter first.
    let node = open(data.path(), MEMORY);
    let [plain, adapted] = ["base", "adapted"].map(|name| node.model(name).unwrap());
    assert_eq!(answer(&node, &adapted), resident[1]);
    assert_eq!(answer(&node, &plain), resident[0]);
}

#[test]
fn a_damaged_row_is_never_answered_with() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let source = sources.path().join("m");
    write_hf_model(&source, &model(Family::Llama, Float::F32, true));
    let node = open(data.path(), MEMORY);
    let model = deploy(&node, "m", &source);
    let before = answer(&node, &model);
    drop(node);
    let manifest = manifest(&model);
    let embedding = manifest.tensors.iter().find(|tensor| tensor.role == Role::TokenEmbedding).unwrap();
    let file = model.directory.join("data.bin");
    let mut bytes = fs::read(&file).unwrap();
    let row = (embedding.bytes / 12_000) as usize;
    bytes[embedding.offset as usize + 40 * row + 5] ^= 0x40;
    fs::write(&file, &bytes).unwrap();
    let node = Node::open(config(data.path(), MEMORY)).unwrap();
    let model = node.model("m").unwrap();
    let error = finish(node.generate(request(&model, &PROMPT, 8)).unwrap()).err().unwrap().to_string();
    assert!(error.contains("checksum") && error.contains("token_embedding"), "{error}");
    let model = deploy(&node, "m", &source);
    assert_eq!(answer(&node, &model), before, "repaired");
}
