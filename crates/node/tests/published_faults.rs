//! Faults of the published prototype (Tangram, arXiv 2512.01357, first generation) that concern the node: tensors that
//! are double in one model, statistics, and what names and settings mean. The others are in the pool's tests of the
//! same name.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::ops::Range;
use std::path::Path;

use common::{deploy, eventually, open, request, run};
use tangram_testkit::{Family, RandomModel, write_hf_model};

fn model(dir: &Path, seed: u64) {
    write_hf_model(dir, &RandomModel { seed, ..RandomModel::tiny(Family::Llama) });
}

/// Where the bytes of a tensor are in a safetensors file.
fn bytes_of(file: &[u8], name: &str) -> Range<usize> {
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&file[8..header]).unwrap();
    let offset = |index: usize| json[name]["data_offsets"][index].as_u64().unwrap() as usize;
    header + offset(0)..header + offset(1)
}

/// B5: equal contents inside one model (tied weights that the file has twice) were allocated twice, and the first was
/// charged for ever and never found. Here they are one tensor: loaded once, charged once, gone at once.
#[test]
fn b05_a_content_that_a_model_has_twice_is_one_tensor() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (plain_dir, double_dir) = (sources.path().join("plain"), sources.path().join("double"));
    let shape = RandomModel { tied: false, seed: 5, ..RandomModel::tiny(Family::Llama) };
    for dir in [&plain_dir, &double_dir] {
        write_hf_model(dir, &shape);
    }
    let path = double_dir.join("model.safetensors");
    let mut file = std::fs::read(&path).unwrap();
    let (embedding, head) = (bytes_of(&file, "model.embed_tokens.weight"), bytes_of(&file, "lm_head.weight"));
    let twice = embedding.len() as u64;
    assert_eq!(embedding.len(), head.len());
    file.copy_within(embedding, head.start);
    std::fs::write(&path, file).unwrap();

    let node = open(data.path(), 32 << 20);
    let plain = deploy(&node, "plain", &plain_dir);
    let full = run(&node, request(&plain, &[5, 6, 7], 4)).timing.bytes_loaded;
    node.remove("plain").unwrap();
    eventually("the plain one is gone", || node.status().resident_bytes == 0);

    let double = deploy(&node, "double", &double_dir);
    let first = run(&node, request(&double, &[5, 6, 7], 4));
    assert_eq!(first.timing.bytes_loaded, full - twice);
    eventually("it is charged once", || node.status().resident_bytes == full - twice);
    let again = run(&node, request(&double, &[5, 6, 7], 4));
    assert_eq!((again.timing.bytes_loaded, again.timing.bytes_reused), (0, full - twice));
    assert_eq!(again.tokens, first.tokens);
    node.remove("double").unwrap();
    eventually("nothing is orphaned", || {
        let status = node.status();
        status.resident_bytes == 0 && status.free_bytes == status.pool_bytes
    });
}

/// B14: times were noted for misses only and read for all, so the averages were of numbers that were never written.
/// Here every request has figures of its own, hits have noughts, and the node's totals are their sums.
#[test]
fn b14_totals_are_the_sums_of_what_the_requests_were_told() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Room for about one model, so that hits and misses take turns.
    let node = open(data.path(), 2 << 20);
    let models: Vec<_> = (0..3)
        .map(|seed| {
            let dir = sources.path().join(format!("m{seed}"));
            model(&dir, seed);
            deploy(&node, &format!("m{seed}"), &dir)
        })
        .collect();
    let (mut loaded, mut reused, mut hits, mut misses) = (0, 0, 0, 0);
    for which in [0, 0, 1, 1, 2, 0, 0, 2, 2, 1, 0, 1] {
        let timing = run(&node, request(&models[which], &[which as u32 + 5, 9], 3)).timing;
        assert_eq!(timing.bytes_loaded + timing.bytes_reused, models[which].weight_bytes);
        loaded += timing.bytes_loaded;
        reused += timing.bytes_reused;
        (hits, misses) = if timing.bytes_loaded == 0 { (hits + 1, misses) } else { (hits, misses + 1) };
    }
    assert!(hits >= 4 && misses >= 3, "{hits} hits, {misses} misses");
    eventually("the totals are the sums", || {
        let status = node.status();
        (status.bytes_loaded_total, status.bytes_reused_total) == (loaded, reused)
    });
}

/// B15: `tmp` in a model's name chose how it was loaded, and one setting meant the size of the pool here and what to
/// leave outside it there. Here a name is a name, and the size of the pool is the setting.
#[test]
fn b15_a_name_is_only_a_name_and_the_pool_is_as_large_as_set() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let dir = sources.path().join("source");
    model(&dir, 1);
    let memory = 16 << 20;
    let node = open(data.path(), memory);
    assert_eq!(node.status().pool_bytes, memory);
    let mut answers = Vec::new();
    for name in ["plain", "tmp", "my-tmp-model", "cpu", "gpu.0"] {
        let model = deploy(&node, name, &dir);
        answers.push(run(&node, request(&model, &[5, 6, 7], 6)).tokens);
    }
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{answers:?}");
    assert_eq!(node.status().pool_bytes, memory);
}
