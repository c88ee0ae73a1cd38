//! Models whose weights are stored compressed: same answers, same identities, less room on the disk.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use common::{eventually, finish, open, request, run};
use tangram_checkpoint::DATA_FILE;
use tangram_node::{DeployedModel, Node, WeightLayout};
use tangram_testkit::{Family, Float, RandomModel, mutate_layer, write_hf_model};
use tempfile::tempdir;

const MEMORY: u64 = 32 << 20;
const PROMPT: [u32; 9] = [5, 17, 3, 40, 8, 99, 23, 7, 11];

fn deploy(node: &Arc<Node>, layout: WeightLayout, name: &str, source: &Path) -> Arc<DeployedModel> {
    node.deploy_as(layout, name, source, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn answer(node: &Node, model: &Arc<DeployedModel>) -> Vec<u32> {
    run(node, request(model, &PROMPT, 24)).tokens
}

fn stored_bytes(node: &Node, name: &str) -> u64 {
    let mut stored = None;
    eventually("the model is listed", || {
        stored = node.list().into_iter().find(|model| model.name == name).map(|model| model.stored_bytes);
        stored.is_some()
    });
    stored.unwrap()
}

#[test]
fn the_same_answers_from_fewer_bytes() {
    for (dtype, most) in [(Float::BF16, 75), (Float::F16, 90)] {
        let sources = tempdir().unwrap();
        let (source, tuned) = (sources.path().join("base"), sources.path().join("tuned"));
        // The embedding has more than one chunk.
        write_hf_model(&source, &RandomModel { dtype, vocab: 20_000, ..RandomModel::tiny(Family::Qwen3) });
        mutate_layer(&source, &tuned, 1);
        let data = [tempdir().unwrap(), tempdir().unwrap()];
        let [plain, compressed] = [0, 1].map(|i: usize| open(data[i].path(), MEMORY));
        let expected = deploy(&plain, WeightLayout::Plain, "m", &source);
        let expected_tuned = deploy(&plain, WeightLayout::Plain, "tuned", &tuned);
        let model = deploy(&compressed, WeightLayout::Compressed, "m", &source);
        let tokens = answer(&plain, &expected);
        assert_eq!(answer(&compressed, &model), tokens);
        assert_eq!(model.weight_bytes, expected.weight_bytes);
        assert_eq!(stored_bytes(&plain, "m"), model.weight_bytes);
        let stored = stored_bytes(&compressed, "m");
        assert!(stored * 100 < model.weight_bytes * most, "{stored} of {}", model.weight_bytes);

        // What another model has of it is referred to as it is stored, whatever layout is asked for.
        let fine_tuned = deploy(&compressed, WeightLayout::Plain, "tuned", &tuned);
        assert!(stored_bytes(&compressed, "tuned") < fine_tuned.weight_bytes);
        assert_eq!(answer(&compressed, &fine_tuned), answer(&plain, &expected_tuned));

        // A start finds it again; the layout is nothing that a base's death would change.
        compressed.remove("m").unwrap();
        drop(compressed);
        let compressed = open(data[1].path(), MEMORY);
        let fine_tuned = compressed.model("tuned").unwrap();
        assert_eq!(answer(&compressed, &fine_tuned), answer(&plain, &expected_tuned));
    }
}

#[test]
fn damage_is_found_and_repaired_by_deploying_again() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let source = sources.path().join("m");
    write_hf_model(&source, &RandomModel { dtype: Float::BF16, ..RandomModel::tiny(Family::Llama) });
    let node = open(data.path(), MEMORY);
    let model = deploy(&node, WeightLayout::Compressed, "m", &source);
    let file = model.directory.join(DATA_FILE);
    let mut bytes = fs::read(&file).unwrap();
    // The embedding is first; its frame begins with the version.
    bytes[200] ^= 1;
    fs::write(&file, bytes).unwrap();
    let error = finish(node.generate(request(&model, &PROMPT, 4)).unwrap()).err().unwrap().to_string();
    assert!(error.contains("checksum") && error.contains("deploy"), "{error}");
    let again = deploy(&node, WeightLayout::Compressed, "m", &source);
    assert_eq!(answer(&node, &again).len(), 24);
}

#[test]
fn small_models_are_not_worth_measuring_a_disk_for() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let source = sources.path().join("m");
    write_hf_model(&source, &RandomModel { dtype: Float::BF16, ..RandomModel::tiny(Family::Llama) });
    let node = open(data.path(), MEMORY);
    let model = deploy(&node, WeightLayout::Auto, "m", &source);
    assert_eq!(stored_bytes(&node, "m"), model.weight_bytes);
}
