//! What is read around the weights of a Hugging Face directory: tokenizer, template, special tokens, pooling.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;

use base64::Engine;
use serde_json::{Value, json};
use tangram_checkpoint::{Output, Pooling, Source, open};
use tangram_testkit::{CHAT_TEMPLATE, EOS_TOKEN, Family, RandomModel, write_hf_model};
use tokenizers::Tokenizer;

fn model(family: Family) -> tempfile::TempDir {
    let temp = tempfile::tempdir().unwrap();
    write_hf_model(temp.path(), &RandomModel { layers: 1, ..RandomModel::tiny(family) });
    temp
}

fn edit(dir: &Path, name: &str, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(dir.join(name)).unwrap()).unwrap();
    change(&mut value);
    fs::write(dir.join(name), value.to_string()).unwrap();
}

fn tokenizer(source: &Source) -> Tokenizer {
    Tokenizer::from_bytes(source.tokenizer_json().unwrap()).unwrap()
}

fn refused(dir: &Path, words: &[&str]) {
    let error = open(dir).unwrap_err().to_string();
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
}

#[test]
fn defaults_of_a_plain_directory() {
    let dir = model(Family::Llama);
    let source = open(dir.path()).unwrap();
    assert_eq!(source.chat_template(), Some(CHAT_TEMPLATE));
    assert_eq!(source.special_tokens()["eos_token"], "<|im_end|>");
    assert_eq!(source.generation().eos, [EOS_TOKEN]);
    assert_eq!(source.warnings(), [] as [&str; 0]);
    assert_eq!(source.tokenizer_json().unwrap(), fs::read(dir.path().join("tokenizer.json")).unwrap());
    let ids = tokenizer(&source).encode("Hi é<|im_end|>", true).unwrap().get_ids().to_vec();
    assert_eq!(ids, [72, 105, 32, 0xC3, 0xA9, EOS_TOKEN]);
}

#[test]
fn a_single_file_finds_its_neighbours() {
    let dir = model(Family::Qwen3);
    let whole = open(dir.path()).unwrap();
    let file = open(&dir.path().join("model.safetensors")).unwrap();
    assert_eq!((whole.spec(), whole.tensors()), (file.spec(), file.tensors()));
    assert!(file.tokenizer_json().is_some());
}

#[test]
fn templates_from_a_list_and_from_a_file() {
    let dir = model(Family::Llama);
    let list = json!([{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]);
    edit(dir.path(), "tokenizer_config.json", |config| config["chat_template"] = list);
    assert_eq!(open(dir.path()).unwrap().chat_template(), Some("yes"));
    fs::write(dir.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(open(dir.path()).unwrap().chat_template(), Some("file"));
    fs::write(dir.path().join("chat_template.jinja"), b"\xff").unwrap();
    refused(dir.path(), &["chat_template.jinja", "UTF-8"]);
}

#[test]
fn end_tokens_and_sampling_defaults() {
    let dir = model(Family::Llama);
    let settings = json!({"eos_token_id": [7, 9, 7], "bos_token_id": 3, "temperature": 0.6, "top_p": 0.9, "top_k": 20,
                          "min_p": null, "repetition_penalty": 1.1});
    fs::write(dir.path().join("generation_config.json"), settings.to_string()).unwrap();
    let source = open(dir.path()).unwrap();
    let generation = source.generation();
    // The tokenizer's own end token counts too.
    assert_eq!((generation.eos.as_slice(), generation.bos), ([7, 9, EOS_TOKEN].as_slice(), Some(3)));
    assert_eq!(
        (generation.temperature, generation.top_p, generation.top_k),
        (Some(0.6), Some(0.9), Some(20))
    );
    assert_eq!((generation.min_p, generation.repetition_penalty), (None, Some(1.1)));

    fs::remove_file(dir.path().join("generation_config.json")).unwrap();
    edit(dir.path(), "config.json", |config| config["eos_token_id"] = json!(11));
    edit(dir.path(), "tokenizer_config.json", |config| {
        config["eos_token"] = json!({"content": "<|endoftext|>"})
    });
    let source = open(dir.path()).unwrap();
    assert_eq!(source.generation().eos, [11, 256]);
    assert_eq!(source.special_tokens()["eos_token"], "<|endoftext|>");

    for bad in [
        json!({"eos_token_id": -1}),
        json!({"temperature": "hot"}),
        json!({"top_p": 1.5}),
        json!({"top_k": -1}),
    ] {
        fs::write(dir.path().join("generation_config.json"), bad.to_string()).unwrap();
        refused(dir.path(), &["generation_config.json", bad.as_object().unwrap().keys().next().unwrap()]);
    }
}

#[test]
fn a_missing_tokenizer_is_fine_and_a_broken_one_is_not() {
    let dir = model(Family::Llama);
    fs::remove_file(dir.path().join("tokenizer.json")).unwrap();
    let source = open(dir.path()).unwrap();
    assert!(source.tokenizer_json().is_none() && source.warnings()[0].contains("token ids only"));
    fs::write(dir.path().join("tokenizer.json"), b"{\"model\": {}}").unwrap();
    refused(dir.path(), &["tokenizer.json", "cannot be read"]);
    fs::write(dir.path().join("tokenizer_config.json"), b"{").unwrap();
    refused(dir.path(), &["tokenizer_config.json", "JSON"]);
}

#[test]
fn tokenizers_that_make_the_library_panic_are_refused() {
    let dir = model(Family::Bert);
    edit(dir.path(), "tokenizer.json", |tokenizer| tokenizer["post_processor"]["special_tokens"] = json!({}));
    refused(dir.path(), &["tokenizer.json", "cannot be read"]);
}

#[test]
fn truncation_and_padding_are_taken_out_and_bos_is_put_in() {
    let dir = model(Family::Llama);
    edit(dir.path(), "tokenizer.json", |tokenizer| {
        tokenizer["truncation"] =
            json!({"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0});
        tokenizer["padding"] = json!({"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null,
                                      "pad_id": 0, "pad_type_id": 0, "pad_token": "x"});
    });
    let source = open(dir.path()).unwrap();
    assert_eq!(tokenizer(&source).encode("abcdef", true).unwrap().len(), 6);
    edit(dir.path(), "tokenizer_config.json", |config| config["add_bos_token"] = json!(true));
    let source = open(dir.path()).unwrap();
    assert_eq!(tokenizer(&source).encode("ab", true).unwrap().get_ids(), [257, 97, 98]);
    assert_eq!(tokenizer(&source).encode("ab", false).unwrap().get_ids(), [97, 98]);
}

#[test]
fn a_tokenizer_larger_than_the_model_warns() {
    let dir = model(Family::Llama);
    edit(dir.path(), "tokenizer.json", |tokenizer| tokenizer["model"]["vocab"]["beyond"] = json!(320));
    assert!(open(dir.path()).unwrap().warnings()[0].contains("320"));
}

#[test]
fn embedding_settings() {
    let dir = model(Family::Bert);
    let source = open(dir.path()).unwrap();
    assert_eq!(source.spec().output, Output::Embedding { pooling: Pooling::Mean, normalise: true });
    assert_eq!(source.spec().context, 256);
    assert_eq!(tokenizer(&source).encode("a", true).unwrap().get_ids(), [257, 97, 258]);

    let write = |name: &str, value: Value| fs::write(dir.path().join(name), value.to_string()).unwrap();
    write(
        "1_Pooling/config.json",
        json!({"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}),
    );
    write("sentence_bert_config.json", json!({"max_seq_length": 100}));
    write("modules.json", json!([{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]));
    let source = open(dir.path()).unwrap();
    assert_eq!(source.spec().output, Output::Embedding { pooling: Pooling::Cls, normalise: false });
    assert_eq!((source.spec().context, source.spec().learned_positions), (100, Some(256)));
    write("sentence_bert_config.json", json!({"max_seq_length": 1000}));
    assert_eq!(open(dir.path()).unwrap().spec().context, 256);

    write("sentence_bert_config.json", json!({"max_seq_length": 0}));
    refused(dir.path(), &["sentence_bert_config.json", "max_seq_length"]);
    write("1_Pooling/config.json", json!({"pooling_mode_max_tokens": true}));
    refused(dir.path(), &["pooling_mode_max_tokens"]);
    write("modules.json", json!([{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]));
    refused(dir.path(), &["modules.json", "Dense"]);
    write("modules.json", json!([{"type": "sentence_transformers.models.Pooling", "path": "../1_Pooling"}]));
    refused(dir.path(), &["modules.json", "folder"]);

    for name in ["modules.json", "1_Pooling/config.json", "sentence_bert_config.json"] {
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    let output = open(dir.path()).unwrap().spec().output;
    assert_eq!(output, Output::Embedding { pooling: Pooling::Mean, normalise: false });
}

#[test]
fn a_tekken_file_stands_in_for_a_tokenizer() {
    let dir = model(Family::Mistral);
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::remove_file(dir.path().join(name)).unwrap();
    }
    let encode = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    let vocab: Vec<Value> =
        (0..=255u8).map(|byte| json!({"rank": byte, "token_bytes": encode(&[byte])})).collect();
    let file = json!({
        "config": {"pattern": r"\p{L}+|\s+|[^\s\p{L}]+", "default_vocab_size": 280, "default_num_special_tokens": 24},
        "vocab": vocab,
    });
    fs::write(dir.path().join("tekken.json"), file.to_string()).unwrap();
    let source = open(dir.path()).unwrap();
    let ids = tokenizer(&source).encode("[INST]é", true).unwrap().get_ids().to_vec();
    assert_eq!(ids, [1, 3, 24 + 0xC3, 24 + 0xA9]);
    assert_eq!(source.special_tokens()["eos_token"], "</s>");
    assert_eq!(source.generation().eos, [EOS_TOKEN, 2]);
    fs::write(dir.path().join("tekken.json"), "{}").unwrap();
    refused(dir.path(), &["tekken.json", "config"]);
}
