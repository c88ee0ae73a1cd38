//! Writes random decoder models as GGUF files, versions 1 to 3.

use std::fs;
use std::path::Path;

use crate::model::{Family, RandomModel, Scaling, Tensor};
use crate::quant::GgmlType;
use crate::tokenizer::{CHAT_TEMPLATE, EOS_TOKEN, token_texts};

/// How a GGUF file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgufOptions {
    /// Format version: 1, 2 or 3.
    pub version: u32,
    /// Type of the matrices; vectors are always f32.
    pub dtype: GgmlType,
}

impl Default for GgufOptions {
    fn default() -> Self {
        GgufOptions { version: 3, dtype: GgmlType::F32 }
    }
}

/// Writes a decoder model with the values that [`crate::write_hf_model`] gives for the same arguments. Llama's query
/// and key rows are in Meta's order. From a vocabulary of 259 on the file holds a gpt2-style byte tokenizer and a
/// chat template. Panics for BERT and for llama3 scaling, which such files express otherwise.
pub fn write_gguf(path: &Path, model: &RandomModel, options: GgufOptions) {
    assert!(model.family != Family::Bert, "not written as GGUF");
    let mut writer = Writer { version: options.version, bytes: Vec::new() };
    let mut metadata = Metadata { writer: Writer { version: options.version, bytes: Vec::new() }, count: 0 };
    let family = model.family.name();
    metadata.text("general.architecture", family);
    metadata.text("general.name", "random");
    metadata.number("general.alignment", 32);
    for (key, value) in [
        ("context_length", model.context),
        ("embedding_length", model.hidden),
        ("block_count", model.layers),
        ("feed_forward_length", model.intermediate),
        ("attention.head_count", model.heads),
        ("attention.head_count_kv", model.kv_heads),
        ("attention.key_length", model.head_dim),
        ("attention.value_length", model.head_dim),
        ("rope.dimension_count", model.head_dim),
    ] {
        metadata.number(&format!("{family}.{key}"), value as u32);
    }
    metadata.float(&format!("{family}.attention.layer_norm_rms_epsilon"), 1e-6);
    metadata.float(&format!("{family}.rope.freq_base"), 10_000.0);
    match model.scaling {
        Scaling::Plain => {}
        Scaling::Linear(factor) => {
            metadata.text(&format!("{family}.rope.scaling.type"), "linear");
            metadata.float(&format!("{family}.rope.scaling.factor"), factor as f32);
        }
        Scaling::Llama3(_) => panic!("llama3 scaling is not written as GGUF"),
    }
    if model.vocab >= 259 {
        metadata.text("tokenizer.ggml.model", "gpt2");
        metadata.text("tokenizer.ggml.pre", "gpt-2");
        metadata.texts("tokenizer.ggml.tokens", &token_texts(model.vocab, model.family));
        let types: Vec<i32> =
            (0..model.vocab).map(|id| if (256..259).contains(&id) { 3 } else { 1 }).collect();
        metadata.integers("tokenizer.ggml.token_type", &types);
        metadata.texts("tokenizer.ggml.merges", &[]);
        metadata.number("tokenizer.ggml.bos_token_id", 257);
        metadata.number("tokenizer.ggml.eos_token_id", EOS_TOKEN);
        metadata.number("tokenizer.ggml.padding_token_id", 256);
        metadata.text("tokenizer.chat_template", CHAT_TEMPLATE);
    }
    let tensors = model.tensors();
    writer.bytes.extend(b"GGUF");
    writer.u32(options.version);
    writer.count(tensors.len());
    writer.count(metadata.count);
    writer.bytes.extend(metadata.writer.bytes);
    let mut data: Vec<u8> = Vec::new();
    for tensor in tensors {
        data.resize(data.len().next_multiple_of(32), 0);
        writer.text(&gguf_name(&tensor.name));
        writer.u32(tensor.shape.len() as u32);
        for &dim in tensor.shape.iter().rev() {
            writer.count(dim);
        }
        let dtype = if tensor.shape.len() == 1 { GgmlType::F32 } else { options.dtype };
        writer.u32(dtype.number());
        writer.bytes.extend((data.len() as u64).to_le_bytes());
        data.extend(dtype.encode(&values_in_file_order(model, &tensor)));
    }
    writer.bytes.resize(writer.bytes.len().next_multiple_of(32), 0);
    writer.bytes.extend(data);
    fs::write(path, writer.bytes).unwrap();
}

/// Llama's query and key rows pairwise interleaved, everything else as it is.
fn values_in_file_order(model: &RandomModel, tensor: &Tensor) -> Vec<f32> {
    let rotated = tensor.name.contains("q_proj.") || tensor.name.contains("k_proj.");
    if model.family != Family::Llama || !rotated {
        return tensor.values.clone();
    }
    let rows: Vec<&[f32]> = tensor.values.chunks(tensor.values.len() / tensor.shape[0]).collect();
    let half = model.head_dim / 2;
    let mut values = Vec::with_capacity(tensor.values.len());
    for head in rows.chunks(model.head_dim) {
        for pair in 0..half {
            values.extend(head[pair]);
            values.extend(head[half + pair]);
        }
    }
    values
}

fn gguf_name(name: &str) -> String {
    [
        ("model.embed_tokens", "token_embd"),
        ("model.layers.", "blk."),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ]
    .iter()
    .fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

struct Writer {
    version: u32,
    bytes: Vec<u8>,
}

impl Writer {
    fn u32(&mut self, value: u32) {
        self.bytes.extend(value.to_le_bytes());
    }

    /// A count or length: 32 bits in version 1, else 64.
    fn count(&mut self, value: usize) {
        match self.version {
            1 => self.u32(value as u32),
            _ => self.bytes.extend((value as u64).to_le_bytes()),
        }
    }

    fn text(&mut self, text: &str) {
        self.count(text.len());
        self.bytes.extend(text.as_bytes());
    }
}

struct Metadata {
    writer: Writer,
    count: usize,
}

impl Metadata {
    fn key(&mut self, key: &str, kind: u32) {
        self.writer.text(key);
        self.writer.u32(kind);
        self.count += 1;
    }

    fn number(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.writer.u32(value);
    }

    fn float(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.writer.bytes.extend(value.to_le_bytes());
    }

    fn text(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        self.writer.text(value);
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        self.key(key, 9);
        self.writer.u32(8);
        self.writer.count(values.len());
        for value in values {
            self.writer.text(value);
        }
    }

    fn integers(&mut self, key: &str, values: &[i32]) {
        self.key(key, 9);
        self.writer.u32(5);
        self.writer.count(values.len());
        for value in values {
            self.writer.bytes.extend(value.to_le_bytes());
        }
    }
}
