//! Models served from the user's own files: same answers, nothing copied, nothing of the user's touched.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{deploy, eventually, finish, open, request, run, shared};
use tangram_node::{DeployedModel, Node, RequestError};
use tangram_testkit::{
    Family, GgmlType, GgufOptions, RandomAdapter, RandomModel, write_adapter, write_gguf, write_hf_model,
    write_serverlessllm,
};
use tempfile::tempdir;

const MEMORY: u64 = 32 << 20;
const PROMPT: [u32; 9] = [5, 17, 3, 40, 8, 99, 23, 7, 11];

fn in_place(node: &Arc<Node>, name: &str, source: &Path) -> Arc<DeployedModel> {
    node.deploy_in_place(name, source, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn answer(node: &Node, model: &Arc<DeployedModel>) -> Vec<u32> {
    run(node, request(model, &PROMPT, 24)).tokens
}

fn entries(dir: PathBuf) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// Bytes of all data files.
fn stored(data: &Path) -> u64 {
    let checkpoints = fs::read_dir(data.join("checkpoints")).unwrap();
    let file = |entry: fs::DirEntry| entry.path().join(tangram_checkpoint::DATA_FILE);
    checkpoints.map(|entry| fs::metadata(file(entry.unwrap())).unwrap().len()).sum()
}

/// Deploys the same source both ways on fresh nodes, and in place on a node that has it imported.
fn same_answers(source: &Path) {
    let what = source.display();
    let (imported, placed) = (tempdir().unwrap(), tempdir().unwrap());
    let node = open(imported.path(), MEMORY);
    let model = deploy(&node, "imported", source);
    let embeds = !model.spec.generates();
    let vectors = |node: &Node, model: &Arc<DeployedModel>| {
        node.embed(model, vec![PROMPT.to_vec()]).unwrap().result_blocking().unwrap()
    };
    if embeds {
        let expected = vectors(&node, &model);
        let node = open(placed.path(), MEMORY);
        let model = in_place(&node, "placed", source);
        let found = vectors(&node, &model);
        assert_eq!(found.vectors, expected.vectors, "{what}");
        assert_eq!(found.timing.bytes_loaded, expected.timing.bytes_loaded);
        return;
    }
    let expected = answer(&node, &model);
    let twin = in_place(&node, "placed", source);
    let outcome = run(&node, request(&twin, &PROMPT, 24));
    assert_eq!(outcome.tokens, expected, "{what}");
    assert_eq!(outcome.timing.bytes_loaded, 0, "{what}: the same content under both names");
    drop(node);
    for _ in 0..2 {
        // The first round deploys, the second finds it after a restart.
        let node = open(placed.path(), MEMORY);
        let model = node.model("placed").unwrap_or_else(|| in_place(&node, "placed", source));
        let outcome = run(&node, request(&model, &PROMPT, 24));
        assert_eq!(outcome.tokens, expected, "{what}");
        assert_eq!(outcome.timing.bytes_loaded, model.weight_bytes, "{what}: cold");
        let of = |node: &Node| node.list().into_iter().find(|status| status.name == "placed");
        eventually("the model is listed", || of(&node).is_some());
        let in_place_bytes = of(&node).unwrap().in_place_bytes.unwrap();
        assert!(in_place_bytes <= model.weight_bytes && in_place_bytes > 0, "{what}");
        assert!(
            stored(placed.path()) <= (model.weight_bytes - in_place_bytes) * 2 + 4096 * 64,
            "{what}: {} of {}",
            stored(placed.path()),
            model.weight_bytes
        );
    }
}

#[test]
fn the_parity_models_answer_alike() {
    let Some(parity) = shared("models/parity") else { return };
    let mut families = 0;
    for family in fs::read_dir(parity).unwrap() {
        let family = family.unwrap().path();
        if family.join("config.json").exists() {
            same_answers(&family);
            families += 1;
        }
    }
    assert!(families >= 13);
}

#[test]
fn random_models_of_every_kind_answer_alike() {
    let sources = tempdir().unwrap();
    for (seed, family) in
        [Family::Llama, Family::Qwen3Moe, Family::Gemma3, Family::Gpt2, Family::Bert].into_iter().enumerate()
    {
        let dir = sources.path().join(family.name());
        let model = RandomModel { seed: seed as u64, shards: 2, ..RandomModel::tiny(family) };
        write_hf_model(&dir, &model);
        same_answers(&dir);
    }
    for (family, dtype) in [(Family::Llama, GgmlType::Q4_0), (Family::Qwen2, GgmlType::Q8_0)] {
        let file = sources.path().join(format!("{}.gguf", family.name()));
        write_gguf(&file, &RandomModel::tiny(family), GgufOptions { version: 3, dtype });
        same_answers(&file);
    }
    let (original, saved) = (sources.path().join("original"), sources.path().join("saved"));
    write_hf_model(&original, &RandomModel { seed: 77, ..RandomModel::tiny(Family::Qwen2) });
    write_serverlessllm(&original, &saved, 100_000);
    same_answers(&saved);
}

#[test]
fn a_changed_file_fails_its_model_with_what_to_do_and_no_other() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let (changing, steady) = (sources.path().join("changing"), sources.path().join("steady"));
    write_hf_model(&changing, &RandomModel::tiny(Family::Llama));
    write_hf_model(&steady, &RandomModel { seed: 3, ..RandomModel::tiny(Family::Llama) });
    let expected = {
        let node = open(data.path(), MEMORY);
        in_place(&node, "steady", &steady);
        let model = in_place(&node, "changing", &changing);
        answer(&node, &model)
    };
    let weights = changing.join("model.safetensors");
    let refused = |node: &Node, what: &str| {
        for _ in 0..2 {
            let model = node.model("changing").unwrap();
            let error = finish(node.generate(request(&model, &PROMPT, 4)).unwrap()).err().unwrap();
            let RequestError::LoadFailed { model, reason } = error else { panic!("{error}") };
            assert_eq!(model, "changing");
            assert!(reason.contains(what) && reason.contains("deploy the model again"), "{reason}");
            assert!(reason.contains("model.safetensors"), "{reason}");
            let steady = node.model("steady").unwrap();
            assert_eq!(run(node, request(&steady, &PROMPT, 4)).tokens.len(), 4);
        }
        eventually("nothing is left behind", || {
            let status = node.status();
            (status.leased_bytes, status.waiting, status.kv_blocks) == (0, 0, 0)
        });
    };
    let time = fs::metadata(&weights).unwrap().modified().unwrap();
    let set_time = || fs::File::open(&weights).unwrap().set_modified(time).unwrap();
    let write_at = |at: u64, byte: u8| {
        let file = fs::OpenOptions::new().write(true).open(&weights).unwrap();
        file.write_all_at(&[byte], at).unwrap();
    };
    let bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 5;

    // Found while the node runs, before anything is read; and put right without deploying again.
    let node = open(data.path(), MEMORY);
    write_at(last as u64, bytes[last]);
    refused(&node, "was written to");
    set_time();
    let model = node.model("changing").unwrap();
    assert_eq!(answer(&node, &model), expected, "the file is back as it was");
    drop(node);

    // Found at the next start.
    fs::OpenOptions::new().write(true).open(&weights).unwrap().set_len(last as u64).unwrap();
    let node = open(data.path(), MEMORY);
    refused(&node, "bytes instead of");
    drop(node);

    // Not to be found by size and time: the hashes find it.
    fs::write(&weights, &bytes).unwrap();
    write_at(last as u64, bytes[last] ^ 1);
    set_time();
    let node = open(data.path(), MEMORY);
    refused(&node, "do not match their checksum");

    // Deploying again is what helps.
    fs::write(&weights, &bytes).unwrap();
    let model = in_place(&node, "changing", &changing);
    assert_eq!(answer(&node, &model), expected);
    fs::remove_file(&weights).unwrap();
    assert_eq!(answer(&node, &model), expected, "what is in memory needs no file");
    drop(node);
    refused(&open(data.path(), MEMORY), "cannot be read");
}

#[test]
fn removing_never_touches_the_users_files_and_imports_do_not_need_them() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let file = sources.path().join("llama.gguf");
    let options = GgufOptions { version: 3, dtype: GgmlType::F16 };
    write_gguf(&file, &RandomModel::tiny(Family::Llama), options);
    let look = || {
        let metadata = fs::metadata(&file).unwrap();
        (fs::read(&file).unwrap(), metadata.ino(), metadata.mtime_nsec(), metadata.blocks())
    };
    let before = look();
    let node = open(data.path(), MEMORY);
    let placed = in_place(&node, "placed", &file);
    let expected = answer(&node, &placed);
    let imported = deploy(&node, "imported", &file);
    assert!(stored(data.path()) >= imported.weight_bytes, "an import does not lean on the user's files");
    // Replaced, removed, and removed while what was stored converted is still in use.
    in_place(&node, "placed", &file);
    node.remove("placed").unwrap();
    eventually("it is gone", || node.list().len() == 1);
    assert_eq!(look(), before);
    drop(node);
    let gone = sources.path().join("elsewhere");
    fs::rename(&file, &gone).unwrap();
    let node = open(data.path(), MEMORY);
    let imported = node.model("imported").unwrap();
    assert_eq!(answer(&node, &imported), expected);
    fs::rename(&gone, &file).unwrap();
    let placed = in_place(&node, "placed", &file);
    node.remove("imported").unwrap();
    drop(node);
    let node = open(data.path(), MEMORY);
    assert_eq!(answer(&node, &node.model("placed").unwrap()), expected);
    assert_eq!(placed.weight_bytes, imported.weight_bytes);
    node.remove("placed").unwrap();
    eventually("nothing is left", || entries(data.path().join("checkpoints")) == 0);
    assert_eq!(entries(data.path().join("staging")), 0);
    assert_eq!(look(), before);
}

#[test]
fn an_adapter_on_a_model_in_place_outlives_its_bases_name() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let (base, adapter) = (sources.path().join("base"), sources.path().join("adapter"));
    write_hf_model(&base, &RandomModel::tiny(Family::Llama));
    write_adapter(&base, &adapter, &RandomAdapter::new(9));
    let go_on = &mut |_| ControlFlow::Continue(());
    let expected = {
        let other = tempdir().unwrap();
        let node = open(other.path(), MEMORY);
        deploy(&node, "base", &base);
        let model = node.deploy_adapter("adapted", &adapter, "base", go_on).unwrap();
        answer(&node, &model)
    };
    let node = open(data.path(), MEMORY);
    in_place(&node, "base", &base);
    let model = node.deploy_adapter("adapted", &adapter, "base", go_on).unwrap();
    assert_eq!(answer(&node, &model), expected);
    node.remove("base").unwrap();
    drop(node);
    let node = open(data.path(), MEMORY);
    let model = node.model("adapted").unwrap();
    assert_eq!(answer(&node, &model), expected);
    node.remove("adapted").unwrap();
    eventually("nothing is left", || entries(data.path().join("checkpoints")) == 0);
    assert!(base.join("model.safetensors").exists() && adapter.join("adapter_model.safetensors").exists());
}
