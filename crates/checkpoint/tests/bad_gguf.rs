//! Damaged and hostile GGUF files: each is refused with a message that names the file and the fault.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;

use tangram_checkpoint::{CheckpointError, DType, RopeScaling, open};
use tangram_testkit::{Family, GgmlType, GgufOptions, RandomModel, Scaling, write_gguf};

/// A value of the metadata with its type number.
enum Meta<'a> {
    U32(u32),
    F32(f32),
    Text(&'a str),
    Texts(&'a [&'a str]),
    /// Type number and bytes as they are.
    Raw(u32, &'a [u8]),
}

/// Builds a file by hand, version 3.
struct Builder {
    metadata: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, u64)>,
    data: Vec<u8>,
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

impl Builder {
    /// A llama of one layer, hidden 32, two heads, no tokenizer, in f32.
    fn llama() -> Self {
        Builder::stored(0, DType::F32, 32)
    }

    /// A llama of one layer, two heads and this hidden size, with matrices of the type that has this number.
    fn stored(kind: u32, dtype: DType, hidden: u64) -> Self {
        let mut builder = Builder { metadata: vec![], tensors: vec![], data: vec![] };
        builder.set("general.architecture", Meta::Text("llama"));
        for (key, value) in [
            ("context_length", 64),
            ("embedding_length", hidden as u32),
            ("block_count", 1),
            ("feed_forward_length", 2 * hidden as u32),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
        ] {
            builder.set(&format!("llama.{key}"), Meta::U32(value));
        }
        builder.set("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5));
        for (name, dims) in [
            ("token_embd", [hidden, 8].as_slice()),
            ("output_norm", &[hidden]),
            ("blk.0.attn_norm", &[hidden]),
            ("blk.0.attn_q", &[hidden, hidden]),
            ("blk.0.attn_k", &[hidden, hidden / 2]),
            ("blk.0.attn_v", &[hidden, hidden / 2]),
            ("blk.0.attn_output", &[hidden, hidden]),
            ("blk.0.ffn_norm", &[hidden]),
            ("blk.0.ffn_gate", &[hidden, 2 * hidden]),
            ("blk.0.ffn_up", &[hidden, 2 * hidden]),
            ("blk.0.ffn_down", &[2 * hidden, hidden]),
        ] {
            let (kind, dtype) = if dims.len() == 1 { (0, DType::F32) } else { (kind, dtype) };
            let shape: Vec<u64> = dims.iter().rev().copied().collect();
            builder.add(&format!("{name}.weight"), dims, kind, dtype.tensor_bytes(&shape).unwrap());
        }
        builder
    }

    fn set(&mut self, key: &str, value: Meta<'_>) {
        let (kind, bytes) = match value {
            Meta::U32(value) => (4, value.to_le_bytes().to_vec()),
            Meta::F32(value) => (6, value.to_le_bytes().to_vec()),
            Meta::Text(value) => (8, text(value)),
            Meta::Texts(values) => {
                let mut bytes = [&8u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
                values.iter().for_each(|value| bytes.extend(text(value)));
                (9, bytes)
            }
            Meta::Raw(kind, bytes) => (kind, bytes.to_vec()),
        };
        let value = [&u32::to_le_bytes(kind)[..], &bytes].concat();
        self.metadata.retain(|(other, _)| other != key);
        self.metadata.push((key.to_owned(), value));
    }

    fn unset(&mut self, key: &str) {
        self.metadata.retain(|(other, _)| other != key);
    }

    fn add(&mut self, name: &str, dims: &[u64], kind: u32, bytes: u64) {
        self.tensors.push((name.to_owned(), dims.to_vec(), kind, self.data.len() as u64));
        self.data.resize((self.data.len() + bytes as usize).next_multiple_of(32), 0);
    }

    fn tensor(&mut self, name: &str) -> &mut (String, Vec<u64>, u32, u64) {
        self.tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            bytes.extend(text(key));
            bytes.extend(value);
        }
        for (name, dims, kind, offset) in &self.tensors {
            bytes.extend(text(name));
            bytes.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| bytes.extend(dim.to_le_bytes()));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&self.data);
        bytes
    }
}

fn try_open(bytes: &[u8]) -> Result<tangram_checkpoint::Source, CheckpointError> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    fs::write(&file, bytes).unwrap();
    open(&file)
}

fn refused(bytes: &[u8], words: &[&str]) {
    let error = try_open(bytes).expect_err(&format!("{words:?}")).to_string();
    assert!(
        error.contains("model.gguf") && words.iter().all(|word| error.contains(word)),
        "{words:?}: {error}"
    );
}

/// The llama file with one thing changed is refused with these words.
fn changed(change: impl FnOnce(&mut Builder), words: &[&str]) {
    let mut builder = Builder::llama();
    change(&mut builder);
    refused(&builder.bytes(), words);
}

#[test]
fn the_hand_made_file_is_sound() {
    let source = try_open(&Builder::llama().bytes()).unwrap();
    assert_eq!((source.tensors().len(), source.spec().vocab), (11, 8));
    assert_eq!(source.tokenizer_json(), None);
}

#[test]
fn every_truncation_is_refused() {
    let bytes = Builder::llama().bytes();
    for length in (0..bytes.len()).filter(|length| *length < 2048 || length % 509 == 0) {
        refused(&bytes[..length], &[]);
    }
}

#[test]
fn versions_and_counts() {
    let bytes = Builder::llama().bytes();
    let patched = |at: usize, patch: &[u8]| [&bytes[..at], patch, &bytes[at + patch.len()..]].concat();
    refused(&patched(0, b"GGML"), &["not a GGUF file"]);
    refused(&patched(4, &0u32.to_le_bytes()), &["version 0"]);
    refused(&patched(4, &4u32.to_le_bytes()), &["version 4"]);
    refused(&patched(4, &3u32.to_be_bytes()), &["big-endian"]);
    for count in [u64::MAX, 1 << 63, 1 << 32, 1 << 17] {
        refused(&patched(8, &count.to_le_bytes()), &["number of tensors"]);
        refused(&patched(16, &count.to_le_bytes()), &["number of metadata keys"]);
        refused(&patched(24, &count.to_le_bytes()), &["length of the metadata key"]);
    }
    refused(&patched(8, &60_000u64.to_le_bytes()), &["model.gguf"]);
}

#[test]
fn strings_and_arrays() {
    let huge = u64::MAX.to_le_bytes();
    changed(|file| file.set("x", Meta::Raw(8, &huge)), &["value of x"]);
    changed(|file| file.set("x", Meta::Raw(8, &(15u64 << 20).to_le_bytes())), &["truncated"]);
    changed(|file| file.set("x", Meta::Raw(8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff])), &["UTF-8"]);
    changed(|file| file.set("x", Meta::Raw(13, &[])), &["unknown type 13"]);
    let array = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    for kind in [0, 4, 6, 8, 12] {
        changed(|file| file.set("x", Meta::Raw(9, &array(kind, u64::MAX))), &["length of x"]);
        changed(|file| file.set("x", Meta::Raw(9, &array(kind, 4_000_000))), &["model.gguf"]);
    }
    changed(|file| file.set("x", Meta::Raw(9, &array(9, 1))), &["array of arrays"]);
    changed(|file| file.set("x", Meta::Raw(9, &array(77, 1))), &["unknown type 77"]);
    changed(|file| file.metadata.push(file.metadata[3].clone()), &["comes twice"]);
    // Many arrays that are each below the limit.
    let bytes = [array(0, 3 << 20), vec![0; 3 << 20]].concat();
    changed(
        |file| {
            file.set("x", Meta::Raw(9, &bytes));
            file.set("y", Meta::Raw(9, &bytes));
        },
        &["arrays"],
    );
}

#[test]
fn tensors_that_cannot_be() {
    let q = "blk.0.attn_q.weight";
    changed(|file| file.tensor(q).1 = vec![1 << 63, 2], &["impossible shape"]);
    changed(|file| file.tensor(q).1 = vec![u64::MAX, u64::MAX], &["impossible shape"]);
    changed(|file| file.tensor(q).1 = vec![1 << 61], &["ends after"]);
    changed(|file| file.tensor(q).1 = vec![], &["0 dimensions"]);
    changed(|file| file.tensor(q).1 = vec![1; 5], &["5 dimensions"]);
    changed(|file| file.tensor(q).1 = vec![16, 64], &["asks for"]);
    changed(|file| file.tensor(q).3 += 1, &["not aligned"]);
    changed(|file| file.tensor(q).3 = u64::MAX - 31, &["ends after"]);
    changed(|file| file.tensor(q).3 = 1 << 62, &["ends after"]);
    changed(|file| file.tensor(q).3 = 0, &["overlap"]);
    changed(|file| file.tensor(q).2 = 23, &[q, "IQ4_XS", "not supported yet"]);
    changed(|file| file.tensor(q).2 = 999, &[q, "number 999"]);
    changed(|file| file.tensor(q).0 = "blk.0.attn_k.weight".into(), &["described twice"]);
    changed(|file| file.tensor(q).0 = "blk.1.attn_q.weight".into(), &["layer 1"]);
    changed(|file| file.tensor(q).0 = "blk.0.attn_qkv.weight".into(), &["blk.0.attn_qkv.weight"]);
    changed(|file| file.tensors.retain(|tensor| tensor.0 != q), &["Layer(0, Query)"]);
    changed(|file| file.tensors.retain(|tensor| tensor.0 != "token_embd.weight"), &["token_embd.weight"]);
    changed(|file| file.tensor("blk.0.attn_norm.weight").2 = 8, &["blk.0.attn_norm.weight", "vector"]);
    changed(|file| file.add("blk.0.attn_q_norm.weight", &[16], 0, 64), &["attn_q_norm"]);
    changed(
        |file| {
            file.set("general.alignment", Meta::U32(64));
            file.tensor("output_norm.weight").3 += 32;
        },
        &["not aligned to 64"],
    );
    for alignment in [0, 3, 1 << 31] {
        changed(|file| file.set("general.alignment", Meta::U32(alignment)), &["general.alignment"]);
    }
}

#[test]
fn metadata_that_this_build_cannot_run() {
    let key = |name: &str| format!("llama.{name}");
    for missing in
        ["context_length", "block_count", "attention.head_count", "attention.layer_norm_rms_epsilon"]
    {
        changed(|file| file.unset(&key(missing)), &[missing, "missing"]);
    }
    for (name, value, words) in [
        ("block_count", Meta::U32(0), "layers"),
        ("block_count", Meta::U32(u32::MAX), "layers"),
        ("block_count", Meta::Text("one"), "block_count"),
        ("attention.head_count", Meta::U32(0), "heads"),
        ("attention.head_count", Meta::U32(3), "heads"),
        ("attention.head_count_kv", Meta::U32(0), "heads"),
        ("embedding_length", Meta::U32(64), "asks for"),
        ("attention.key_length", Meta::U32(15), "elements"),
        ("attention.value_length", Meta::U32(8), "different length"),
        ("attention.layer_norm_rms_epsilon", Meta::F32(f32::NAN), "epsilon"),
        ("rope.dimension_count", Meta::U32(8), "rotating only a part"),
        ("rope.freq_base", Meta::F32(f32::INFINITY), "rotary base"),
        ("rope.scaling.type", Meta::Text("yarn"), "factor"),
        ("rope.scaling.type", Meta::Text("longrope"), "longrope"),
        ("rope.scaling.type", Meta::Text("linear"), "factor"),
        ("rope.scale_linear", Meta::F32(-2.0), "factor"),
        ("expert_count", Meta::U32(8), "expert_used_count"),
    ] {
        changed(|file| file.set(&key(name), value), &[words]);
    }
    changed(
        |file| file.set("general.architecture", Meta::Text("falcon")),
        &["falcon", "llama, qwen2, qwen3, qwen3moe"],
    );
    changed(|file| file.unset("general.architecture"), &["architecture"]);
    changed(|file| file.set("general.architecture", Meta::Text("qwen2")), &["qwen2.context_length"]);
    changed(|file| file.set("split.count", Meta::U32(2)), &["merge"]);
}

#[test]
fn tokenizers_that_do_not_fit() {
    let tokens = |file: &mut Builder, model: &str, tokens: &[&str]| {
        file.set("tokenizer.ggml.model", Meta::Text(model));
        file.set("tokenizer.ggml.tokens", Meta::Texts(tokens));
    };
    changed(|file| tokens(file, "gpt2", &["a"; 9]), &["9 tokens", "8 rows"]);
    changed(|file| tokens(file, "llama", &["a", "b"]), &["2 tokens", "0 scores"]);
    changed(
        |file| {
            tokens(file, "gpt2", &["a", "b"]);
            file.set("tokenizer.ggml.merges", Meta::Texts(&["a c"]));
        },
        &["tokenizer cannot be read"],
    );
    changed(
        |file| {
            tokens(file, "gpt2", &["a", "b"]);
            file.set("tokenizer.ggml.token_type", Meta::Raw(9, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
        },
        &["0 token types"],
    );
    let mut file = Builder::llama();
    tokens(&mut file, "t5", &["a"]);
    let source = try_open(&file.bytes()).unwrap();
    assert!(source.tokenizer_json().is_none() && source.warnings()[0].contains("t5"));
}

#[test]
fn rotary_factors_and_scaling_become_part_of_the_spec() {
    let mut file = Builder::llama();
    file.add("rope_freqs.weight", &[8], 0, 32);
    refused(&file.bytes(), &["rope_freqs.weight", "positive"]);
    let start = file.data.len() - 32;
    file.data[start..].copy_from_slice(&2f32.to_le_bytes().repeat(8));
    let source = try_open(&file.bytes()).unwrap();
    let scaling = source.spec().rope.as_ref().unwrap().scaling.clone();
    assert_eq!(scaling, RopeScaling::Factors { factors: vec![2.0; 8] });
    file.set("llama.rope.scale_linear", Meta::F32(2.0));
    refused(&file.bytes(), &["together"]);
    changed(|file| file.add("rope_freqs.weight", &[4], 0, 16), &["rope_freqs.weight", "8 positive"]);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("linear.gguf");
    let model = RandomModel { scaling: Scaling::Linear(4.0), ..RandomModel::tiny(Family::Llama) };
    write_gguf(&path, &model, GgufOptions::default());
    assert_eq!(scaling_of(&path), RopeScaling::Linear { factor: 4.0 });
}

fn scaling_of(path: &Path) -> RopeScaling {
    open(path).unwrap().spec().rope.as_ref().unwrap().scaling.clone()
}

#[test]
fn quantised_types_go_by_ggmls_numbers_and_sizes() {
    for (kind, dtype, elements, bytes) in [
        (2, DType::Q4_0, 32, 18),
        (3, DType::Q4_1, 32, 20),
        (6, DType::Q5_0, 32, 22),
        (7, DType::Q5_1, 32, 24),
        (8, DType::Q8_0, 32, 34),
        (10, DType::Q2K, 256, 84),
        (11, DType::Q3K, 256, 110),
        (12, DType::Q4K, 256, 144),
        (13, DType::Q5K, 256, 176),
        (14, DType::Q6K, 256, 210),
        (20, DType::Iq4Nl, 32, 18),
    ] {
        assert_eq!((dtype.block_elements(), dtype.block_bytes()), (elements, bytes));
        let source = try_open(&Builder::stored(kind, dtype, 256).bytes()).unwrap();
        assert!(source.tensors().iter().all(|tensor| tensor.dtype == dtype || tensor.shape.len() == 1));
        let json = serde_json::to_string(&dtype).unwrap();
        assert_eq!(json.trim_matches('"'), dtype.name());
    }
    let mut file = Builder::llama();
    file.tensor("blk.0.attn_q.weight").2 = 12;
    refused(&file.bytes(), &["impossible shape", "q4_k"]);
    file.tensor("blk.0.attn_q.weight").2 = 23;
    refused(&file.bytes(), &["IQ4_XS", "Q2_K to Q6_K"]);
}

#[test]
fn every_type_is_kept_as_stored() {
    let dir = tempfile::tempdir().unwrap();
    for (written, read) in [
        (GgmlType::F32, DType::F32),
        (GgmlType::F16, DType::F16),
        (GgmlType::BF16, DType::BF16),
        (GgmlType::Q8_0, DType::Q8_0),
        (GgmlType::Q4_0, DType::Q4_0),
        (GgmlType::Q4_1, DType::Q4_1),
    ] {
        let file = dir.path().join(format!("{read}.gguf"));
        write_gguf(&file, &RandomModel::tiny(Family::Qwen2), GgufOptions { version: 2, dtype: written });
        let source = open(&file).unwrap();
        for tensor in source.tensors() {
            assert_eq!(tensor.dtype, if tensor.shape.len() == 1 { DType::F32 } else { read });
        }
    }
}

#[test]
fn a_directory_with_one_file_is_that_file() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str| {
        write_gguf(&dir.path().join(name), &RandomModel::tiny(Family::Llama), GgufOptions::default());
    };
    write("one.gguf");
    assert_eq!(open(dir.path()).unwrap().spec(), open(&dir.path().join("one.gguf")).unwrap().spec());
    write("two.gguf");
    assert!(open(dir.path()).unwrap_err().to_string().contains("2 .gguf files"));
}
