//! What a random model looks like and which tensors it has, before any file format.

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};

/// Model families that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// `LlamaForCausalLM`.
    Llama,
    /// `Qwen2ForCausalLM`: biases on query, key and value.
    Qwen2,
    /// `Qwen3ForCausalLM`: normalised query and key heads.
    Qwen3,
    /// `MistralForCausalLM` with a window of [`WINDOW`] tokens.
    Mistral,
    /// `MixtralForCausalLM` with [`EXPERTS`] experts, two per token.
    Mixtral,
    /// `Qwen3MoeForCausalLM` with [`EXPERTS`] experts of half the intermediate width, two per token.
    Qwen3Moe,
    /// `Gemma2ForCausalLM` with a window of [`WINDOW`] tokens in every second layer.
    Gemma2,
    /// `Gemma3ForCausalLM` (text only) with a window of [`WINDOW`] tokens in the layers that are no multiple of six.
    Gemma3,
    /// `Phi3ForCausalLM`: fused projections.
    Phi3,
    /// `GPT2LMHeadModel`: transposed matrices, learned positions.
    Gpt2,
    /// `GPTNeoXForCausalLM`: query, key and value interleaved by head, a quarter of each head rotated.
    GptNeox,
    /// `OPTForCausalLM`.
    Opt,
    /// `BertModel` with mean pooling and normalisation.
    Bert,
}

/// Tokens that a token of a local layer looks at.
pub const WINDOW: usize = 16;
/// Experts of a layer.
pub const EXPERTS: usize = 4;

impl Family {
    /// The `model_type` of its config.
    pub const fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Mistral => "mistral",
            Family::Mixtral => "mixtral",
            Family::Qwen3Moe => "qwen3_moe",
            Family::Gemma2 => "gemma2",
            Family::Gemma3 => "gemma3_text",
            Family::Phi3 => "phi3",
            Family::Gpt2 => "gpt2",
            Family::GptNeox => "gpt_neox",
            Family::Opt => "opt",
            Family::Bert => "bert",
        }
    }

    /// Whether every query head has a key/value head of its own.
    pub const fn ungrouped(self) -> bool {
        matches!(self, Family::Bert | Family::Gpt2 | Family::GptNeox | Family::Opt)
    }

    /// Whether the output matrix is always the token embedding.
    pub const fn always_tied(self) -> bool {
        matches!(self, Family::Gemma2 | Family::Gemma3 | Family::Gpt2 | Family::Opt)
    }
}

/// Element types of safetensors files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Float {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// Upper half of a binary32.
    BF16,
}

/// Rotary scaling in the config.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    /// None.
    Plain,
    /// `linear` with this factor.
    Linear(f64),
    /// `llama3` with this factor, low 1, high 4, original context a quarter of the context.
    Llama3(f64),
}

/// A small random model. Sizes are element counts.
#[derive(Clone, Debug, PartialEq)]
pub struct RandomModel {
    /// Which family.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the feed-forward block.
    pub intermediate: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads (equal to `heads` for families without groups).
    pub kv_heads: usize,
    /// Elements per head (hidden / heads for families without groups, and for Phi-3).
    pub head_dim: usize,
    /// Rows of the token embedding; a tokenizer is written from 259 on.
    pub vocab: usize,
    /// `max_position_embeddings`.
    pub context: usize,
    /// Element type in safetensors files.
    pub dtype: Float,
    /// Whether the output matrix is the token embedding.
    pub tied: bool,
    /// Rotary scaling.
    pub scaling: Scaling,
    /// Bias on all attention and feed-forward matrices (llama), on the attention's (qwen3).
    pub bias: bool,
    /// `config.json` with the keys of transformers 5 instead of the older ones.
    pub new_config_keys: bool,
    /// Safetensors files to spread the tensors over.
    pub shards: usize,
    /// Where the random values come from.
    pub seed: u64,
}

impl RandomModel {
    /// A tiny model: 3 layers, hidden 64, 4 heads of 16, vocabulary 320, context 256, f32, seed 1.
    pub fn tiny(family: Family) -> Self {
        RandomModel {
            family,
            hidden: 64,
            intermediate: 96,
            layers: 3,
            heads: 4,
            kv_heads: if family.ungrouped() { 4 } else { 2 },
            head_dim: 16,
            vocab: 320,
            context: 256,
            dtype: Float::F32,
            tied: family.always_tied(),
            scaling: Scaling::Plain,
            bias: false,
            new_config_keys: false,
            shards: 1,
            seed: 1,
        }
    }

    /// All tensors under their Hugging Face names with random values, in no order of use.
    pub(crate) fn tensors(&self) -> Vec<Tensor> {
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(self.seed);
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize], centre: f32, spread: f32| {
            let count = shape.iter().product();
            let values = (0..count).map(|_| centre + rng.random_range(-spread..=spread)).collect();
            tensors.push(Tensor { name, shape: shape.to_vec(), values });
        };
        // Uniform values of this spread keep the size of what a matrix with `inputs` columns is applied to.
        let spread = |inputs: usize| (3.0 / inputs as f32).sqrt();
        let (hidden, queries, keys) =
            (self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim);
        if self.family == Family::Bert {
            let norm = |name: &str| [format!("{name}.LayerNorm.weight"), format!("{name}.LayerNorm.bias")];
            add("embeddings.word_embeddings.weight".into(), &[self.vocab, hidden], 0.0, 1.0);
            add("embeddings.position_embeddings.weight".into(), &[self.context, hidden], 0.0, 0.5);
            add("embeddings.token_type_embeddings.weight".into(), &[2, hidden], 0.0, 0.5);
            let [weight, bias] = norm("embeddings");
            add(weight, &[hidden], 1.0, 0.2);
            add(bias, &[hidden], 0.0, 0.2);
            for layer in 0..self.layers {
                let prefix = format!("encoder.layer.{layer}");
                for (name, rows, columns) in [
                    ("attention.self.query", queries, hidden),
                    ("attention.self.key", keys, hidden),
                    ("attention.self.value", keys, hidden),
                    ("attention.output.dense", hidden, queries),
                    ("intermediate.dense", self.intermediate, hidden),
                    ("output.dense", hidden, self.intermediate),
                ] {
                    add(format!("{prefix}.{name}.weight"), &[rows, columns], 0.0, spread(columns));
                    add(format!("{prefix}.{name}.bias"), &[rows], 0.0, 0.2);
                }
                for name in ["attention.output", "output"] {
                    let [weight, bias] = norm(&format!("{prefix}.{name}"));
                    add(weight, &[hidden], 1.0, 0.2);
                    add(bias, &[hidden], 0.0, 0.2);
                }
            }
            return tensors;
        }
        if self.family.ungrouped() {
            self.ungated(&mut add);
            return tensors;
        }
        add("model.embed_tokens.weight".into(), &[self.vocab, hidden], 0.0, 1.0);
        let llama_bias = self.bias && self.family == Family::Llama;
        let attention_bias = llama_bias || (self.bias && self.family == Family::Qwen3);
        let query_bias = attention_bias || self.family == Family::Qwen2;
        let gemma = matches!(self.family, Family::Gemma2 | Family::Gemma3);
        // Gemma stores the distance from 1.
        let centre = if gemma { 0.0 } else { 1.0 };
        let inner = self.intermediate;
        for layer in 0..self.layers {
            let prefix = format!("model.layers.{layer}");
            let mut matrix = |name: &str, rows, columns, bias| {
                add(format!("{prefix}.{name}.weight"), &[rows, columns], 0.0, spread(columns));
                if bias {
                    add(format!("{prefix}.{name}.bias"), &[rows], 0.0, 0.2);
                }
            };
            if self.family == Family::Phi3 {
                matrix("self_attn.qkv_proj", queries + 2 * keys, hidden, false);
                matrix("mlp.gate_up_proj", 2 * inner, hidden, false);
            } else {
                matrix("self_attn.q_proj", queries, hidden, query_bias);
                matrix("self_attn.k_proj", keys, hidden, query_bias);
                matrix("self_attn.v_proj", keys, hidden, query_bias);
            }
            matrix("self_attn.o_proj", hidden, queries, attention_bias);
            match self.family {
                Family::Phi3 => matrix("mlp.down_proj", hidden, inner, false),
                Family::Mixtral => {
                    matrix("block_sparse_moe.gate", EXPERTS, hidden, false);
                    for expert in 0..EXPERTS {
                        matrix(&format!("block_sparse_moe.experts.{expert}.w1"), inner, hidden, false);
                        matrix(&format!("block_sparse_moe.experts.{expert}.w3"), inner, hidden, false);
                        matrix(&format!("block_sparse_moe.experts.{expert}.w2"), hidden, inner, false);
                    }
                }
                Family::Qwen3Moe => {
                    matrix("mlp.gate", EXPERTS, hidden, false);
                    for expert in 0..EXPERTS {
                        matrix(&format!("mlp.experts.{expert}.gate_proj"), inner / 2, hidden, false);
                        matrix(&format!("mlp.experts.{expert}.up_proj"), inner / 2, hidden, false);
                        matrix(&format!("mlp.experts.{expert}.down_proj"), hidden, inner / 2, false);
                    }
                }
                _ => {
                    matrix("mlp.gate_proj", inner, hidden, llama_bias);
                    matrix("mlp.up_proj", inner, hidden, llama_bias);
                    matrix("mlp.down_proj", hidden, inner, llama_bias);
                }
            }
            let mut norm = |name: &str, width| {
                add(format!("{prefix}.{name}.weight"), &[width], centre, 0.2);
            };
            if matches!(self.family, Family::Qwen3 | Family::Qwen3Moe | Family::Gemma3) {
                norm("self_attn.q_norm", self.head_dim);
                norm("self_attn.k_norm", self.head_dim);
            }
            norm("input_layernorm", hidden);
            norm("post_attention_layernorm", hidden);
            if gemma {
                norm("pre_feedforward_layernorm", hidden);
                norm("post_feedforward_layernorm", hidden);
            }
        }
        add("model.norm.weight".into(), &[hidden], centre, 0.2);
        if !self.tied {
            add("lm_head.weight".into(), &[self.vocab, hidden], 0.0, 1.0);
        }
        tensors
    }

    /// Tensors of the families with layer norms and without a gate.
    fn ungated(&self, add: &mut impl FnMut(String, &[usize], f32, f32)) {
        let (hidden, inner) = (self.hidden, self.intermediate);
        struct Names {
            embedding: &'static str,
            positions: Option<(&'static str, usize)>,
            layer: &'static str,
            norms: [&'static str; 2],
            /// Rows, columns as the matrix is applied.
            matrices: Vec<(&'static str, usize, usize)>,
            last: &'static str,
            output: &'static str,
        }
        let names = match self.family {
            Family::Gpt2 => Names {
                embedding: "transformer.wte",
                positions: Some(("transformer.wpe", self.context)),
                layer: "transformer.h",
                norms: ["ln_1", "ln_2"],
                matrices: vec![
                    ("attn.c_attn", 3 * hidden, hidden),
                    ("attn.c_proj", hidden, hidden),
                    ("mlp.c_fc", inner, hidden),
                    ("mlp.c_proj", hidden, inner),
                ],
                last: "transformer.ln_f",
                output: "lm_head",
            },
            Family::GptNeox => Names {
                embedding: "gpt_neox.embed_in",
                positions: None,
                layer: "gpt_neox.layers",
                norms: ["input_layernorm", "post_attention_layernorm"],
                matrices: vec![
                    ("attention.query_key_value", 3 * hidden, hidden),
                    ("attention.dense", hidden, hidden),
                    ("mlp.dense_h_to_4h", inner, hidden),
                    ("mlp.dense_4h_to_h", hidden, inner),
                ],
                last: "gpt_neox.final_layer_norm",
                output: "embed_out",
            },
            _ => Names {
                embedding: "model.decoder.embed_tokens",
                positions: Some(("model.decoder.embed_positions", self.context + 2)),
                layer: "model.decoder.layers",
                norms: ["self_attn_layer_norm", "final_layer_norm"],
                matrices: vec![
                    ("self_attn.q_proj", hidden, hidden),
                    ("self_attn.k_proj", hidden, hidden),
                    ("self_attn.v_proj", hidden, hidden),
                    ("self_attn.out_proj", hidden, hidden),
                    ("fc1", inner, hidden),
                    ("fc2", hidden, inner),
                ],
                last: "model.decoder.final_layer_norm",
                output: "lm_head",
            },
        };
        let transposed = self.family == Family::Gpt2;
        add(format!("{}.weight", names.embedding), &[self.vocab, hidden], 0.0, 1.0);
        if let Some((name, rows)) = names.positions {
            add(format!("{name}.weight"), &[rows, hidden], 0.0, 0.5);
        }
        for layer in 0..self.layers {
            let prefix = format!("{}.{layer}", names.layer);
            for &(name, rows, columns) in &names.matrices {
                let shape = if transposed { [columns, rows] } else { [rows, columns] };
                add(format!("{prefix}.{name}.weight"), &shape, 0.0, (3.0 / columns as f32).sqrt());
                add(format!("{prefix}.{name}.bias"), &[rows], 0.0, 0.2);
            }
            for name in names.norms {
                add(format!("{prefix}.{name}.weight"), &[hidden], 1.0, 0.2);
                add(format!("{prefix}.{name}.bias"), &[hidden], 0.0, 0.2);
            }
        }
        add(format!("{}.weight", names.last), &[hidden], 1.0, 0.2);
        add(format!("{}.bias", names.last), &[hidden], 0.0, 0.2);
        if !self.tied {
            add(format!("{}.weight", names.output), &[self.vocab, hidden], 0.0, 1.0);
        }
    }
}

/// A tensor with its values.
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}
