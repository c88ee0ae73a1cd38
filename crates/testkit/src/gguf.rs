//! Writes random decoder models as GGUF files, versions 1 to 3.

use std::fs;
use std::path::Path;

use crate::model::{EXPERTS, Family, RandomModel, Scaling, Tensor, WINDOW};
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

/// Writes a decoder model with the values that [`crate::write_hf_model`] gives for the same arguments, as llama.cpp's
/// converter would: query and key rows of llama, mistral and mixtral in Meta's order, experts stacked, GPT-2's
/// matrices turned, GPT-NeoX's heads sorted, Gemma's norm weights whole. From a vocabulary of 259 on the file holds a
/// gpt2-style byte tokenizer and a chat template. Panics for BERT and OPT, and for llama3 scaling, which such files
/// express otherwise.
pub fn write_gguf(path: &Path, model: &RandomModel, options: GgufOptions) {
    write(path, model, model.tensors(), options);
}

/// Writes the same model with the tensors of one layer drawn from another seed, as a fine-tune of that layer would be.
pub fn write_tuned_gguf(path: &Path, model: &RandomModel, options: GgufOptions, layer: usize, seed: u64) {
    let of_layer = format!(".{layer}.");
    let mut tensors = model.tensors();
    for (tensor, other) in tensors.iter_mut().zip(RandomModel { seed, ..model.clone() }.tensors()) {
        if tensor.name.contains(&of_layer) {
            *tensor = other;
        }
    }
    write(path, model, tensors, options);
}

fn write(path: &Path, model: &RandomModel, tensors: Vec<Tensor>, options: GgufOptions) {
    assert!(!matches!(model.family, Family::Bert | Family::Opt), "not written as GGUF");
    let mut writer = Writer { version: options.version, bytes: Vec::new() };
    let mut metadata = Metadata { writer: Writer { version: options.version, bytes: Vec::new() }, count: 0 };
    let family = architecture(model.family);
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
        (
            "rope.dimension_count",
            if model.family == Family::GptNeox { model.head_dim / 4 } else { model.head_dim },
        ),
    ] {
        metadata.number(&format!("{family}.{key}"), value as u32);
    }
    if model.family.ungrouped() {
        metadata.float(&format!("{family}.attention.layer_norm_epsilon"), 1e-5);
    } else {
        metadata.float(&format!("{family}.attention.layer_norm_rms_epsilon"), 1e-6);
    }
    let theta = if model.family == Family::Gemma3 { 1_000_000.0 } else { 10_000.0 };
    metadata.float(&format!("{family}.rope.freq_base"), theta);
    if matches!(model.family, Family::Mistral | Family::Gemma2 | Family::Gemma3) {
        metadata.number(&format!("{family}.attention.sliding_window"), WINDOW as u32);
    }
    if matches!(model.family, Family::Mixtral | Family::Qwen3Moe) {
        metadata.number(&format!("{family}.expert_count"), EXPERTS as u32);
        metadata.number(&format!("{family}.expert_used_count"), 2);
    }
    if model.family == Family::Qwen3Moe {
        metadata.number(&format!("{family}.expert_feed_forward_length"), model.intermediate as u32 / 2);
    }
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
    let tensors = stack_experts(tensors.into_iter().map(|tensor| in_file_order(model, tensor)).collect());
    writer.bytes.extend(b"GGUF");
    writer.u32(options.version);
    writer.count(tensors.len());
    writer.count(metadata.count);
    writer.bytes.extend(metadata.writer.bytes);
    let mut data: Vec<u8> = Vec::new();
    for tensor in tensors {
        data.resize(data.len().next_multiple_of(32), 0);
        writer.text(&tensor.name);
        writer.u32(tensor.shape.len() as u32);
        for &dim in tensor.shape.iter().rev() {
            writer.count(dim);
        }
        let plain = tensor.shape.len() == 1 || tensor.name.contains("ffn_gate_inp");
        let dtype = if plain { GgmlType::F32 } else { options.dtype };
        writer.u32(dtype.number());
        writer.bytes.extend((data.len() as u64).to_le_bytes());
        data.extend(dtype.encode(&tensor.values));
    }
    writer.bytes.resize(writer.bytes.len().next_multiple_of(32), 0);
    writer.bytes.extend(data);
    fs::write(path, writer.bytes).unwrap();
}

fn architecture(family: Family) -> &'static str {
    match family {
        Family::Mistral | Family::Mixtral => "llama",
        Family::Qwen3Moe => "qwen3moe",
        Family::Gemma3 => "gemma3",
        Family::GptNeox => "gptneox",
        other => other.name(),
    }
}

/// A tensor under its name in such files, its values as the converter leaves them.
fn in_file_order(model: &RandomModel, tensor: Tensor) -> Tensor {
    let Tensor { name, mut shape, mut values } = tensor;
    let columns = values.len() / shape[0];
    let row = |row: usize| values[row * columns..(row + 1) * columns].iter().copied();
    let pairs = model.head_dim / 2;
    match model.family {
        Family::Llama | Family::Mistral | Family::Mixtral
            if name.contains("q_proj.") || name.contains("k_proj.") =>
        {
            let order = (0..shape[0]).map(|i| {
                let (head, within) = (i / model.head_dim, i % model.head_dim);
                head * model.head_dim + within % 2 * pairs + within / 2
            });
            values = order.flat_map(row).collect();
        }
        Family::GptNeox if name.contains("query_key_value") => {
            let d = model.head_dim;
            let order = (0..shape[0]).map(|i| {
                let (part, head, within) = (i / (d * model.heads), i / d % model.heads, i % d);
                (head * 3 + part) * d + within
            });
            values = order.flat_map(row).collect();
        }
        Family::Gpt2 if name.contains(".c_") && shape.len() == 2 => {
            values = (0..columns)
                .flat_map(|column| values.iter().skip(column).step_by(columns))
                .copied()
                .collect();
            shape.reverse();
        }
        Family::Gemma2 | Family::Gemma3 if name.contains("norm") => {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        _ => {}
    }
    Tensor { name: gguf_name(model.family, &name), shape, values }
}

/// Makes one tensor of the experts' matrices of a kind; experts come in their order.
fn stack_experts(tensors: Vec<Tensor>) -> Vec<Tensor> {
    let mut stacked: Vec<Tensor> = Vec::new();
    for mut tensor in tensors {
        let parts: Vec<&str> = tensor.name.split('.').collect();
        let &["blk", layer, "experts", _, matrix, "weight"] = parts.as_slice() else {
            stacked.push(tensor);
            continue;
        };
        tensor.name = format!("blk.{layer}.{matrix}_exps.weight");
        match stacked.iter_mut().find(|other| other.name == tensor.name) {
            Some(other) => {
                other.shape[0] += 1;
                other.values.extend(tensor.values);
            }
            None => {
                tensor.shape.insert(0, 1);
                stacked.push(tensor);
            }
        }
    }
    stacked
}

fn gguf_name(family: Family, name: &str) -> String {
    let gemma = matches!(family, Family::Gemma2 | Family::Gemma3);
    let own: &[(&str, &str)] = match family {
        _ if gemma => {
            &[("post_attention_layernorm", "post_attention_norm"), ("pre_feedforward_layernorm", "ffn_norm")]
        }
        Family::Gpt2 => &[
            ("transformer.wte", "token_embd"),
            ("transformer.wpe", "position_embd"),
            ("transformer.ln_f", "output_norm"),
            ("transformer.h.", "blk."),
            ("ln_1", "attn_norm"),
            ("ln_2", "ffn_norm"),
            ("attn.c_attn", "attn_qkv"),
            ("attn.c_proj", "attn_output"),
            ("mlp.c_fc", "ffn_up"),
            ("mlp.c_proj", "ffn_down"),
        ],
        Family::GptNeox => &[
            ("gpt_neox.embed_in", "token_embd"),
            ("gpt_neox.final_layer_norm", "output_norm"),
            ("gpt_neox.layers.", "blk."),
            ("embed_out", "output"),
            ("attention.query_key_value", "attn_qkv"),
            ("attention.dense", "attn_output"),
            ("mlp.dense_h_to_4h", "ffn_up"),
            ("mlp.dense_4h_to_h", "ffn_down"),
        ],
        _ => &[],
    };
    let common = [
        ("model.embed_tokens", "token_embd"),
        ("model.layers.", "blk."),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("self_attn.qkv_proj", "attn_qkv"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("block_sparse_moe.", "mlp."),
        ("mlp.experts.", "experts."),
        (".w1", ".ffn_gate"),
        (".w2", ".ffn_down"),
        (".w3", ".ffn_up"),
        ("mlp.gate.", "ffn_gate_inp."),
        ("mlp.gate_up_proj", "ffn_up"),
        ("mlp.", ""),
        ("gate_proj", "ffn_gate"),
        ("up_proj", "ffn_up"),
        ("down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    ];
    own.iter().chain(&common).fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
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
