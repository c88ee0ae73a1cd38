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
    /// `BertModel` with mean pooling and normalisation.
    Bert,
}

impl Family {
    /// The `model_type` of its config.
    pub const fn name(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Bert => "bert",
        }
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
    /// Key/value heads (equal to `heads` for BERT).
    pub kv_heads: usize,
    /// Elements per head (hidden / heads for BERT).
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
            kv_heads: if family == Family::Bert { 4 } else { 2 },
            head_dim: 16,
            vocab: 320,
            context: 256,
            dtype: Float::F32,
            tied: false,
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
        add("model.embed_tokens.weight".into(), &[self.vocab, hidden], 0.0, 1.0);
        let llama_bias = self.bias && self.family == Family::Llama;
        let attention_bias = llama_bias || (self.bias && self.family == Family::Qwen3);
        for layer in 0..self.layers {
            let prefix = format!("model.layers.{layer}");
            for (name, rows, columns, bias) in [
                ("self_attn.q_proj", queries, hidden, attention_bias || self.family == Family::Qwen2),
                ("self_attn.k_proj", keys, hidden, attention_bias || self.family == Family::Qwen2),
                ("self_attn.v_proj", keys, hidden, attention_bias || self.family == Family::Qwen2),
                ("self_attn.o_proj", hidden, queries, attention_bias),
                ("mlp.gate_proj", self.intermediate, hidden, llama_bias),
                ("mlp.up_proj", self.intermediate, hidden, llama_bias),
                ("mlp.down_proj", hidden, self.intermediate, llama_bias),
            ] {
                add(format!("{prefix}.{name}.weight"), &[rows, columns], 0.0, spread(columns));
                if bias {
                    add(format!("{prefix}.{name}.bias"), &[rows], 0.0, 0.2);
                }
            }
            if self.family == Family::Qwen3 {
                add(format!("{prefix}.self_attn.q_norm.weight"), &[self.head_dim], 1.0, 0.2);
                add(format!("{prefix}.self_attn.k_norm.weight"), &[self.head_dim], 1.0, 0.2);
            }
            add(format!("{prefix}.input_layernorm.weight"), &[hidden], 1.0, 0.2);
            add(format!("{prefix}.post_attention_layernorm.weight"), &[hidden], 1.0, 0.2);
        }
        add("model.norm.weight".into(), &[hidden], 1.0, 0.2);
        if !self.tied {
            add("lm_head.weight".into(), &[self.vocab, hidden], 0.0, 1.0);
        }
        tensors
    }
}

/// A tensor with its values.
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f32>,
}
