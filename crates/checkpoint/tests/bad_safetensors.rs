//! Damaged and hostile Hugging Face directories: each is refused with a message that names the file and the fault.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};
use tangram_checkpoint::open;
use tangram_testkit::{Family, RandomModel, write_hf_model};

fn model(family: Family) -> tempfile::TempDir {
    let temp = tempfile::tempdir().unwrap();
    write_hf_model(temp.path(), &RandomModel { layers: 2, ..RandomModel::tiny(family) });
    temp
}

fn refused(path: &Path, words: &[&str]) {
    let error = open(path).expect_err(&format!("{words:?}")).to_string();
    assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
}

/// Rewrites a safetensors file with its header (length included) and data changed.
fn rewrite(file: &Path, change: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) {
    let bytes = fs::read(file).unwrap();
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&bytes[8..end]).unwrap();
    let mut data = bytes[end..].to_vec();
    change(&mut header, &mut data);
    write_raw(file, Value::Object(header).to_string().as_bytes(), &data);
}

fn write_raw(file: &Path, header: &[u8], data: &[u8]) {
    fs::write(file, [&(header.len() as u64).to_le_bytes(), header, data].concat()).unwrap();
}

#[test]
fn containers_that_are_not_what_they_claim() {
    let dir = model(Family::Llama);
    let file = dir.path().join("model.safetensors");
    let good = fs::read(&file).unwrap();
    let expect = |bytes: &[u8], words: &[&str]| {
        fs::write(&file, bytes).unwrap();
        refused(dir.path(), &[&["model.safetensors"], words].concat());
    };
    expect(b"", &["too few"]);
    expect(&good[..7], &["too few"]);
    expect(&good[..8], &["truncated"]);
    expect(&good[..200], &["truncated"]);
    expect(&good[..good.len() - 1], &["truncated"]);
    for length in [u64::MAX, 1 << 63, good.len() as u64 - 7, 100_000_001] {
        expect(&[&length.to_le_bytes(), &good[8..]].concat(), &["header"]);
    }
    expect(&[&good[..8], b"x", &good[9..]].concat(), &["not valid JSON"]);
    let deep = "[".repeat(100_000);
    for header in ["[]", "{}x", "{\"a\": 1}", "{\"a\": {\"dtype\": \"F32\"}}", "\u{fffd}", deep.as_str()] {
        write_raw(&file, header.as_bytes(), &[]);
        refused(dir.path(), &["model.safetensors", "JSON"]);
    }
    let twice = r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#;
    write_raw(&file, twice.as_bytes(), &[]);
    refused(dir.path(), &["tensor a is described twice"]);
}

#[test]
fn offsets_and_shapes_that_cannot_be() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let huge = 1u64 << 63;
    for (entry, word) in [
        (json!({"data_offsets": [0, 24576]}), "overlap"),
        (json!({"data_offsets": [huge, huge + 24576]}), "truncated or corrupted"),
        (json!({"data_offsets": [0, huge]}), "truncated or corrupted"),
        (json!({"data_offsets": [24576, 0]}), "truncated or corrupted"),
        (json!({"data_offsets": [-1, 24576]}), "JSON"),
        (json!({"data_offsets": [0.5, 1]}), "JSON"),
        (json!({"data_offsets": [0]}), "JSON"),
        (json!({"shape": [huge, huge]}), "does not fill"),
        (json!({"shape": [1u64 << 32, 1u64 << 32]}), "does not fill"),
        (json!({"shape": [96, 65]}), "does not fill"),
        (json!({"shape": [64, 96]}), "asks for [96, 64]"),
        (json!({"shape": [6144]}), "asks for [96, 64]"),
        (json!({"dtype": "F16"}), "does not fill"),
        (json!({"dtype": "I32"}), "I32"),
        (json!({"dtype": "F4", "shape": [1]}), "F4"),
        (json!({"dtype": 7}), "JSON"),
    ] {
        let dir = model(Family::Llama);
        rewrite(&dir.path().join("model.safetensors"), |header, _| {
            for (key, value) in entry.as_object().unwrap() {
                header[name][key] = value.clone();
            }
        });
        refused(dir.path(), &["model.safetensors", word]);
    }
}

#[test]
fn tensors_missing_or_unknown() {
    let missing = |family: Family, name: &str, role: &str| {
        let dir = model(family);
        rewrite(&dir.path().join("model.safetensors"), |header, _| {
            header.shift_remove(name).unwrap();
        });
        refused(dir.path(), &["model.safetensors", role]);
    };
    missing(Family::Llama, "model.embed_tokens.weight", "TokenEmbedding");
    missing(Family::Llama, "lm_head.weight", "Output");
    missing(Family::Llama, "model.layers.1.mlp.up_proj.weight", "Layer(1, Up)");
    missing(Family::Qwen2, "model.layers.1.self_attn.k_proj.bias", "KeyBias is there for 1 of 2 layers");
    missing(Family::Qwen3, "model.layers.0.self_attn.q_norm.weight", "QueryNorm");
    missing(Family::Bert, "encoder.layer.0.output.LayerNorm.bias", "MlpNormBias");
    missing(Family::Bert, "encoder.layer.1.output.dense.bias", "DownBias");

    // Gone from all layers: only the config says that the model needs it.
    let dir = model(Family::Qwen2);
    rewrite(&dir.path().join("model.safetensors"), |header, _| {
        header.retain(|name, _| !name.ends_with("k_proj.bias"))
    });
    refused(dir.path(), &["model.safetensors", "needs KeyBias"]);

    let add = |family: Family, name: &str, shape: &[u64]| {
        let dir = model(family);
        let shape = shape.to_vec();
        rewrite(&dir.path().join("model.safetensors"), |header, data| {
            let begin = data.len();
            data.resize(begin + 4 * shape.iter().product::<u64>() as usize, 0);
            let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [begin, data.len()]});
            header.insert(name.to_owned(), entry);
        });
        dir
    };
    for (family, name) in [
        (Family::Llama, "model.layers.0.mlp.experts.0.side_proj.weight"),
        (Family::Llama, "score.weight"),
        (Family::Llama, "model.layers.0.self_attn.q_norm.weight"),
        (Family::Llama, "model.layers.2.mlp.up_proj.weight"),
        (Family::Llama, "embed_tokens.weight"),
        (Family::Bert, "classifier.weight"),
    ] {
        refused(add(family, name, &[4]).path(), &["model.safetensors", name]);
    }
    for (family, name) in [
        (Family::Llama, "model.layers.0.self_attn.rotary_emb.inv_freq"),
        (Family::Bert, "embeddings.position_ids"),
        (Family::Bert, "pooler.dense.weight"),
        (Family::Bert, "cls.predictions.bias"),
    ] {
        open(add(family, name, &[4]).path()).unwrap();
    }
}

#[test]
fn a_written_out_head_of_a_tied_model_is_left_out() {
    let dir = model(Family::Llama);
    let config = dir.path().join("config.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    let whole = open(dir.path()).unwrap().weight_bytes();
    value["tie_word_embeddings"] = json!(true);
    fs::write(&config, value.to_string()).unwrap();
    assert_eq!(open(dir.path()).unwrap().weight_bytes(), whole - 320 * 64 * 4);
}

#[test]
fn shards() {
    let sharded = || {
        let dir = tempfile::tempdir().unwrap();
        write_hf_model(dir.path(), &RandomModel { shards: 3, ..RandomModel::tiny(Family::Llama) });
        dir
    };
    let second = "model-00002-of-00003.safetensors";
    let index = "model.safetensors.index.json";

    let dir = sharded();
    let with_index = open(dir.path()).unwrap().weight_bytes();
    fs::remove_file(dir.path().join(index)).unwrap();
    assert_eq!(open(dir.path()).unwrap().weight_bytes(), with_index);
    fs::copy(dir.path().join(second), dir.path().join("copy.safetensors")).unwrap();
    refused(dir.path(), &["copy.safetensors", "too"]);

    let dir = sharded();
    fs::remove_file(dir.path().join(second)).unwrap();
    refused(dir.path(), &[second]);
    refused(&dir.path().join("model-00001-of-00003.safetensors"), &["missing"]);

    for place in
        [json!("../model.safetensors"), json!("/etc/passwd"), json!("a/b"), json!(".."), json!(""), json!(3)]
    {
        let dir = sharded();
        fs::write(dir.path().join(index), json!({"weight_map": {"x": place}}).to_string()).unwrap();
        refused(dir.path(), &[index, "not a file name"]);
    }
    for text in ["", "{", "{}", "[]", "{\"weight_map\": 3}"] {
        let dir = sharded();
        fs::write(dir.path().join(index), text).unwrap();
        refused(dir.path(), &[index]);
    }
}

#[test]
fn paths_that_hold_no_model() {
    let dir = tempfile::tempdir().unwrap();
    refused(dir.path(), &["neither"]);
    refused(&dir.path().join("missing"), &["missing", "No such file"]);
    fs::write(dir.path().join("weights.bin"), "x").unwrap();
    refused(&dir.path().join("weights.bin"), &["weights.bin", ".gguf"]);
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    refused(dir.path(), &["no .safetensors file"]);
    fs::write(dir.path().join("model.safetensors"), "x").unwrap();
    refused(dir.path(), &["config.json", "model_type"]);
    fs::write(dir.path().join("config.json"), b"\xff").unwrap();
    refused(dir.path(), &["config.json", "JSON"]);
    let dir = model(Family::Llama);
    fs::remove_file(dir.path().join("config.json")).unwrap();
    refused(&dir.path().join("model.safetensors"), &["config.json"]);
}
