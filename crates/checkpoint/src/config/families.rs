//! What the keys of each family of decoders mean, with the family's own defaults.

use std::collections::BTreeSet;

use serde_json::Value;

use super::ConfigError::{Invalid, Unsupported};
use super::{Config, ConfigError, Family};
use crate::layout::{ATTENTION_BIASES, GATED_BIASES, UNGATED_BIASES};
use crate::{Experts, LayerRole, LocalLayers, Mlp, ModelSpec, Norm, NormPlacement, Output};

/// Keys, defaults and restrictions that families with llama's keys differ in.
struct LlamaLike {
    /// The key of the activation.
    activation_key: &'static str,
    mlp: Mlp,
    /// Head size where the config names none; `None` for hidden / heads.
    head_dim: Option<usize>,
    /// Whether the output matrix is the token embedding where the config does not say.
    tied: bool,
}

const LLAMA_LIKE: LlamaLike =
    LlamaLike { activation_key: "hidden_act", mlp: Mlp::GatedSilu, head_dim: None, tied: false };

impl Config<'_> {
    pub(super) fn llama(&self) -> Family {
        let spec = self.llama_like(LLAMA_LIKE)?;
        let spec = ModelSpec { local: self.upper_local_layers(&spec)?, ..spec };
        let mut biases = Vec::new();
        if self.flag("attention_bias")? {
            biases.extend(ATTENTION_BIASES);
        }
        if self.flag("mlp_bias")? {
            biases.extend(GATED_BIASES);
        }
        Ok((spec, biases))
    }

    pub(super) fn mistral(&self) -> Family {
        let spec = self.llama_like(LLAMA_LIKE)?;
        Ok((ModelSpec { local: self.local_layers(&spec, |_| true, None)?, ..spec }, Vec::new()))
    }

    pub(super) fn mixtral(&self) -> Family {
        let spec = self.llama_like(LLAMA_LIKE)?;
        let experts = Experts {
            count: self.optional_count("num_local_experts")?.unwrap_or(8),
            per_token: self.optional_count("num_experts_per_tok")?.unwrap_or(2),
            intermediate: spec.intermediate,
            normalise: true,
            dense_layers: Vec::new(),
        };
        let local = self.local_layers(&spec, |_| true, None)?;
        Ok((ModelSpec { local, experts: Some(experts), ..spec }, Vec::new()))
    }

    pub(super) fn qwen2(&self) -> Family {
        let spec = self.llama_like(LLAMA_LIKE)?;
        let local = self.upper_local_layers(&spec)?;
        // None on the attention's output, whatever the config says.
        Ok((ModelSpec { local, ..spec }, ATTENTION_BIASES[..3].to_vec()))
    }

    pub(super) fn qwen3(&self) -> Family {
        let spec = self.llama_like(LlamaLike { head_dim: Some(128), ..LLAMA_LIKE })?;
        let spec = ModelSpec { local: self.upper_local_layers(&spec)?, qk_norm: true, ..spec };
        let biases = if self.flag("attention_bias")? { ATTENTION_BIASES.to_vec() } else { Vec::new() };
        Ok((spec, biases))
    }

    pub(super) fn qwen3_moe(&self) -> Family {
        let spec = self.llama_like(LLAMA_LIKE)?;
        let dense_step = self.optional_count("decoder_sparse_step")?.unwrap_or(1);
        if dense_step == 0 {
            return Err(Invalid("decoder_sparse_step is 0".into()));
        }
        let listed: BTreeSet<u64> =
            self.list("mlp_only_layers")?.unwrap_or_default().iter().filter_map(Value::as_u64).collect();
        let experts = Experts {
            count: match self.optional_count("num_experts")? {
                Some(count) => count,
                None => self.optional_count("num_local_experts")?.unwrap_or(128),
            },
            per_token: self.optional_count("num_experts_per_tok")?.unwrap_or(8),
            intermediate: self.count("moe_intermediate_size")?,
            normalise: self.flag("norm_topk_prob")?,
            dense_layers: layers_where(&spec, |layer| {
                !(layer + 1).is_multiple_of(dense_step) || listed.contains(&(layer as u64))
            })?,
        };
        let local = match self.flag("use_sliding_window")? {
            true => self.local_layers(&spec, |_| true, None)?,
            false => None,
        };
        let biases = if self.flag("attention_bias")? { ATTENTION_BIASES.to_vec() } else { Vec::new() };
        Ok((ModelSpec { local, qk_norm: true, experts: Some(experts), ..spec }, biases))
    }

    pub(super) fn gemma2(&self) -> Family {
        let spec = self.gemma()?;
        let spec = ModelSpec {
            local: self.local_layers(&spec, |layer| layer.is_multiple_of(2), None)?,
            attention_cap: self.cap("attn_logit_softcapping", 50.0)?,
            logit_cap: self.cap("final_logit_softcapping", 30.0)?,
            ..spec
        };
        self.with_attention_bias(spec)
    }

    pub(super) fn gemma3(&self) -> Family {
        let spec = self.gemma()?;
        let pattern = match self.optional_count("sliding_window_pattern")? {
            Some(pattern) => pattern,
            None => self.optional_count("_sliding_window_pattern")?.unwrap_or(6),
        };
        if pattern == 0 {
            return Err(Invalid("sliding_window_pattern is 0".into()));
        }
        let rope = self.local_rope(spec.head_dim)?;
        let spec = ModelSpec {
            local: self.local_layers(&spec, |layer| !(layer + 1).is_multiple_of(pattern), Some(rope))?,
            attention_cap: self.number("attn_logit_softcapping")?.map(|cap| cap as f32),
            logit_cap: self.number("final_logit_softcapping")?.map(|cap| cap as f32),
            qk_norm: true,
            ..spec
        };
        self.with_attention_bias(spec)
    }

    pub(super) fn phi3(&self) -> Family {
        let spec = self.llama_like(LLAMA_LIKE)?;
        let epsilon = self.number("rms_norm_eps")?.unwrap_or(1e-5) as f32;
        let local = self.local_layers(&spec, |_| true, None)?;
        Ok((ModelSpec { local, norm: Norm::Rms { epsilon }, ..spec }, Vec::new()))
    }

    pub(super) fn gpt2(&self) -> Family {
        self.refuse("scale_attn_by_inverse_layer_idx", true)?;
        self.refuse("add_cross_attention", true)?;
        let hidden = self.count_of(["n_embd", "hidden_size"])?;
        let heads = self.count_of(["n_head", "num_attention_heads"])?;
        let positions = self.count_of(["n_positions", "max_position_embeddings"])?;
        let inner = self.optional_count("n_inner")?;
        let spec = ModelSpec {
            vocab: self.count("vocab_size")?,
            hidden,
            intermediate: inner.unwrap_or(hidden.saturating_mul(4)),
            layers: self.count_of(["n_layer", "num_hidden_layers"])?,
            heads,
            kv_heads: heads,
            head_dim: divided(hidden, heads)?,
            context: positions,
            norm: Norm::Layer { epsilon: self.number("layer_norm_epsilon")?.unwrap_or(1e-5) as f32 },
            query_scale: (!self.flag_or("scale_attn_weights", true)?).then_some(1.0),
            learned_positions: Some(positions),
            mlp: self.ungated("activation_function", "gelu_new")?,
            output: Output::Logits { tied: self.flag_or("tie_word_embeddings", true)? },
            ..ModelSpec::default()
        };
        Ok((spec, UNGATED_BIASES.to_vec()))
    }

    pub(super) fn gpt_neox(&self) -> Family {
        let hidden = self.count("hidden_size")?;
        let heads = self.count("num_attention_heads")?;
        let head_dim = divided(hidden, heads)?;
        let spec = ModelSpec {
            vocab: self.count("vocab_size")?,
            hidden,
            intermediate: self.count("intermediate_size")?,
            layers: self.count("num_hidden_layers")?,
            heads,
            kv_heads: heads,
            head_dim,
            context: self.count("max_position_embeddings")?,
            norm: Norm::Layer { epsilon: self.number("layer_norm_eps")?.unwrap_or(1e-5) as f32 },
            parallel_residual: self.flag_or("use_parallel_residual", true)?,
            rope: Some(self.rope(head_dim, true)?),
            mlp: self.ungated("hidden_act", "gelu")?,
            output: Output::Logits { tied: self.flag("tie_word_embeddings")? },
            ..ModelSpec::default()
        };
        let mut biases = vec![LayerRole::UpBias, LayerRole::DownBias];
        if self.flag_or("attention_bias", true)? {
            biases.extend(ATTENTION_BIASES);
        }
        Ok((spec, biases))
    }

    pub(super) fn opt(&self) -> Family {
        self.refuse("do_layer_norm_before", false)?;
        self.refuse("_remove_final_layer_norm", true)?;
        self.refuse("layer_norm_elementwise_affine", false)?;
        let hidden = self.count("hidden_size")?;
        if let Some(width) = self.optional_count("word_embed_proj_dim")?.filter(|&width| width != hidden) {
            return Err(Unsupported(format!(
                "token embeddings of another width ({width}, projected by project_in and project_out) than the \
                 model's {hidden} are not supported"
            )));
        }
        let heads = self.count("num_attention_heads")?;
        let context = self.count("max_position_embeddings")?;
        let spec = ModelSpec {
            vocab: self.count("vocab_size")?,
            hidden,
            intermediate: self.count_of(["ffn_dim", "intermediate_size"])?,
            layers: self.count("num_hidden_layers")?,
            heads,
            kv_heads: heads,
            head_dim: divided(hidden, heads)?,
            context,
            // The reference implementation leaves PyTorch's default.
            norm: Norm::Layer { epsilon: 1e-5 },
            // Two rows in front once stood for padding.
            learned_positions: Some(context.saturating_add(2)),
            position_offset: 2,
            mlp: self.ungated("activation_function", "relu")?,
            output: Output::Logits { tied: self.flag_or("tie_word_embeddings", true)? },
            ..ModelSpec::default()
        };
        let biases = if self.flag_or("enable_bias", true)? { UNGATED_BIASES.to_vec() } else { Vec::new() };
        Ok((spec, biases))
    }

    /// What all families with llama's keys have in common.
    fn llama_like(&self, family: LlamaLike) -> Result<ModelSpec, ConfigError> {
        self.require_activation(family.activation_key, family.mlp)?;
        let hidden = self.count("hidden_size")?;
        let heads = self.count("num_attention_heads")?;
        let head_dim = match (family.head_dim, self.optional_count("head_dim")?) {
            (Some(default), None) => default,
            _ => self.head_dim(hidden, heads)?,
        };
        let partial = self.text("model_type")? == Some("phi3");
        Ok(ModelSpec {
            vocab: self.count("vocab_size")?,
            hidden,
            intermediate: self.count("intermediate_size")?,
            layers: self.count("num_hidden_layers")?,
            heads,
            kv_heads: self.optional_count("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            context: self.count("max_position_embeddings")?,
            norm: Norm::Rms { epsilon: self.number("rms_norm_eps")?.unwrap_or(1e-6) as f32 },
            rope: Some(self.rope(head_dim, partial)?),
            mlp: family.mlp,
            output: Output::Logits { tied: self.flag_or("tie_word_embeddings", family.tied)? },
            ..ModelSpec::default()
        })
    }

    /// What Gemma 2 and 3 have in common.
    fn gemma(&self) -> Result<ModelSpec, ConfigError> {
        self.refuse("use_bidirectional_attention", true)?;
        let spec = self.llama_like(LlamaLike {
            activation_key: "hidden_activation",
            mlp: Mlp::GatedGeluTanh,
            head_dim: Some(256),
            tied: true,
        })?;
        let scalar = self.number("query_pre_attn_scalar")?.unwrap_or(256.0);
        if scalar.is_nan() || scalar <= 0.0 {
            return Err(Invalid(format!("query_pre_attn_scalar is {scalar}, not a positive number")));
        }
        Ok(ModelSpec {
            norm_placement: NormPlacement::Sandwich,
            norm_plus_one: true,
            embedding_scale: Some((spec.hidden as f64).sqrt() as f32),
            query_scale: Some(scalar.powf(-0.5) as f32),
            ..spec
        })
    }

    fn with_attention_bias(&self, spec: ModelSpec) -> Family {
        let biases = if self.flag("attention_bias")? { ATTENTION_BIASES.to_vec() } else { Vec::new() };
        Ok((spec, biases))
    }

    fn require_activation(&self, key: &str, mlp: Mlp) -> Result<(), ConfigError> {
        let (default, names): (_, &[&str]) = match mlp {
            Mlp::GatedGeluTanh => ("gelu_pytorch_tanh", &["gelu_pytorch_tanh", "gelu_new"]),
            _ => ("silu", &["silu", "swish"]),
        };
        let activation = self.text(key)?.unwrap_or(default);
        if names.contains(&activation) {
            return Ok(());
        }
        let family = self.text("model_type")?.unwrap_or_default();
        Err(Unsupported(format!("{key} {activation} is not supported in a {family} model (only {default})")))
    }

    /// The feed-forward block of families without a gate.
    fn ungated(&self, key: &str, default: &str) -> Result<Mlp, ConfigError> {
        match self.text(key)?.unwrap_or(default) {
            "relu" => Ok(Mlp::Relu),
            "gelu" => Ok(Mlp::Gelu),
            // One formula, written in different orders.
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Mlp::GeluTanh),
            other => Err(Unsupported(format!(
                "{key} {other} is not supported; supported are relu, gelu, gelu_new, gelu_fast and gelu_pytorch_tanh"
            ))),
        }
    }

    /// A cap that an explicit null switches off.
    fn cap(&self, key: &str, default: f64) -> Result<Option<f32>, ConfigError> {
        match self.0.get(key) {
            Some(Value::Null) => Ok(None),
            _ => Ok(Some(self.number(key)?.unwrap_or(default) as f32)),
        }
    }

    /// Which layers `layer_types` calls local, if the config has that key.
    fn layer_types(&self, spec: &ModelSpec) -> Result<Option<Vec<bool>>, ConfigError> {
        let Some(types) = self.list("layer_types")? else { return Ok(None) };
        if types.len() < spec.layers {
            return Err(Invalid(format!(
                "layer_types has {} entries for {} layers",
                types.len(),
                spec.layers
            )));
        }
        let local = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(Unsupported(format!(
                "layer type {kind} is not supported (only full_attention and sliding_attention)"
            ))),
        };
        types.iter().map(local).collect::<Result<_, _>>().map(Some)
    }

    /// Local layers as `layer_types` says, else those for which `rule` holds. None where the config has no window, or
    /// one that hides nothing and brings no rotation of its own.
    fn local_layers(
        &self,
        spec: &ModelSpec,
        rule: impl Fn(usize) -> bool,
        rope: Option<crate::Rope>,
    ) -> Result<Option<LocalLayers>, ConfigError> {
        let layers = match self.layer_types(spec)? {
            None => layers_where(spec, rule)?,
            Some(types) => layers_where(spec, |layer| types.get(layer) == Some(&true))?,
        };
        let gemma = spec.norm_placement == NormPlacement::Sandwich;
        let window = self.optional_count("sliding_window")?.or(gemma.then_some(4096));
        Ok(window
            .filter(|&window| !layers.is_empty() && (window < spec.context || rope.is_some()))
            .map(|window| LocalLayers { window, layers, rope }))
    }

    /// The rule of Qwen2 and Qwen3: a window only if `use_sliding_window`, and only from `max_window_layers` on.
    fn upper_local_layers(&self, spec: &ModelSpec) -> Result<Option<LocalLayers>, ConfigError> {
        self.layer_types(spec)?;
        if !self.flag("use_sliding_window")? {
            return Ok(None);
        }
        let full_layers = self.optional_count("max_window_layers")?.unwrap_or(28);
        self.local_layers(spec, |layer| layer >= full_layers, None)
    }
}

fn divided(hidden: usize, heads: usize) -> Result<usize, ConfigError> {
    if heads > 0 && hidden.is_multiple_of(heads) {
        return Ok(hidden / heads);
    }
    Err(Invalid(format!("{hidden} elements do not divide into {heads} heads")))
}

/// The layers for which `rule` holds.
fn layers_where(spec: &ModelSpec, rule: impl Fn(usize) -> bool) -> Result<Vec<u32>, ConfigError> {
    // The number of layers is checked with the rest of the spec, but a list must not be made of an absurd one.
    let layers =
        u32::try_from(spec.layers).ok().filter(|&layers| layers as usize <= crate::layout::MAX_LAYERS);
    let layers =
        layers.ok_or_else(|| Invalid(format!("{} layers are more than any model has", spec.layers)))?;
    Ok((0..layers).filter(|&layer| rule(layer as usize)).collect())
}
