//! Turns the metadata of a GGUF file into a [`ModelSpec`]. What files do not say (which layers are local, which
//! activation) is what llama.cpp, the reference implementation of the format, does for the architecture.

use crate::gguf::Value;
use crate::gguf_model::Metadata;
use crate::layout::{self, ATTENTION_BIASES, UNGATED_BIASES};
use crate::{
    CheckpointError, Experts, LayerRole, LocalLayers, Mlp, ModelSpec, Norm, NormPlacement, Output, Rope,
    RopeScaling,
};

/// Architectures that this build can run. Mistral and Mixtral files call themselves llama.
pub(crate) const SUPPORTED: &str = "llama, qwen2, qwen3, qwen3moe, gemma2, gemma3, phi3, gpt2, gptneox";

/// Biases without which an architecture gives wrong answers.
pub(crate) fn biases(family: &str) -> &'static [LayerRole] {
    match family {
        "qwen2" => &ATTENTION_BIASES[..3],
        "gpt2" | "gptneox" => &UNGATED_BIASES,
        _ => &[],
    }
}

/// The spec of a file with a supported architecture. `tied` says that there is no output matrix.
pub(crate) fn read(
    metadata: &Metadata<'_>,
    family: &str,
    vocab: usize,
    tied: bool,
) -> Result<ModelSpec, CheckpointError> {
    let key = |name: &str| format!("{family}.{name}");
    let context = metadata.required_count(&key("context_length"))?;
    let hidden = metadata.required_count(&key("embedding_length"))?;
    let heads = metadata.required_count(&key("attention.head_count"))?;
    let layers = metadata.required_count(&key("block_count"))?;
    let head_dim = match metadata.count(&key("attention.key_length"))? {
        Some(length) => length,
        None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
        None => return Err(metadata.invalid(format!("{hidden} elements do not divide into {heads} heads"))),
    };
    if metadata.count(&key("attention.value_length"))?.is_some_and(|length| length != head_dim) {
        return Err(metadata.unsupported("keys and values of different length are not supported"));
    }
    let centred = matches!(family, "gpt2" | "gptneox");
    let epsilon_key =
        key(if centred { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" });
    let Some(epsilon) = metadata.number(&epsilon_key)? else {
        return Err(metadata.invalid(format!("metadata key {epsilon_key} is missing")));
    };
    let epsilon = epsilon as f32;
    let expert_count = metadata.count(&key("expert_count"))?.unwrap_or(0);
    let experts = match (family, expert_count) {
        (_, 0) => None,
        ("llama" | "qwen3moe", count) => Some(Experts {
            count,
            per_token: metadata.required_count(&key("expert_used_count"))?,
            intermediate: match metadata.count(&key("expert_feed_forward_length"))? {
                Some(length) => length,
                None => metadata.required_count(&key("feed_forward_length"))?,
            },
            normalise: true,
            dense_layers: Vec::new(),
        }),
        _ => return Err(metadata.unsupported(format!("a {family} model with experts is not supported"))),
    };
    let intermediate = match (metadata.count(&key("feed_forward_length"))?, &experts) {
        (Some(length), _) if length > 0 => length,
        (_, Some(experts)) => experts.intermediate,
        _ => metadata.required_count(&key("feed_forward_length"))?,
    };
    let spec = ModelSpec {
        family: family.into(),
        vocab,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads: metadata.count(&key("attention.head_count_kv"))?.unwrap_or(heads),
        head_dim,
        context,
        norm: if centred { Norm::Layer { epsilon } } else { Norm::Rms { epsilon } },
        qk_norm: matches!(family, "qwen3" | "qwen3moe" | "gemma3"),
        rope: if family == "gpt2" { None } else { Some(rope(metadata, family, head_dim)?) },
        experts,
        output: Output::Logits { tied },
        ..ModelSpec::default()
    };
    let spec = match family {
        "gpt2" => ModelSpec { learned_positions: Some(context), mlp: Mlp::GeluTanh, ..spec },
        "gptneox" => ModelSpec {
            parallel_residual: metadata.flag(&key("use_parallel_residual"))?.unwrap_or(true),
            mlp: Mlp::GeluTanh,
            ..spec
        },
        "gemma2" => ModelSpec {
            attention_cap: Some(metadata.number(&key("attn_logit_softcapping"))?.unwrap_or(50.0) as f32),
            logit_cap: Some(metadata.number(&key("final_logit_softcapping"))?.unwrap_or(30.0) as f32),
            // The largest model, known by its depth, divides by another number than its head size.
            ..gemma(spec, layers == 46)
        },
        "gemma3" => ModelSpec {
            logit_cap: metadata.number(&key("final_logit_softcapping"))?.map(|cap| cap as f32),
            ..gemma(spec, layers == 62)
        },
        _ => spec,
    };
    let spec = ModelSpec { local: local_layers(metadata, family, &spec)?, ..spec };
    layout::check_spec(&spec).map_err(|message| metadata.invalid(message))?;
    Ok(spec)
}

/// What Gemma 2 and 3 have in common. Their files hold whole norm weights.
fn gemma(spec: ModelSpec, largest: bool) -> ModelSpec {
    let divisor = if largest { spec.hidden / spec.heads.max(1) } else { spec.head_dim };
    ModelSpec {
        norm_placement: NormPlacement::Sandwich,
        embedding_scale: Some((spec.hidden as f64).sqrt() as f32),
        query_scale: Some((divisor as f64).powf(-0.5) as f32),
        mlp: Mlp::GatedGeluTanh,
        ..spec
    }
}

fn rope(metadata: &Metadata<'_>, family: &str, head_dim: usize) -> Result<Rope, CheckpointError> {
    let key = |name: &str| format!("{family}.{name}");
    let dims = metadata.count(&key("rope.dimension_count"))?.unwrap_or(head_dim);
    if dims != head_dim && !matches!(family, "gptneox" | "phi3") {
        return Err(
            metadata.unsupported(format!("rotating only a part of the {head_dim} elements is not supported"))
        );
    }
    let default = if family == "gemma3" { 1_000_000.0 } else { 10_000.0 };
    let theta = metadata.number(&key("rope.freq_base"))?.unwrap_or(default);
    Ok(Rope { theta, dims, scaling: rope_scaling(metadata, family)? })
}

fn rope_scaling(metadata: &Metadata<'_>, family: &str) -> Result<RopeScaling, CheckpointError> {
    let key = |name: &str| format!("{family}.rope.scaling.{name}");
    let factor = metadata.number(&key("factor"))?;
    // An old key says the same as type linear with its factor.
    let old_factor = metadata.number(&format!("{family}.rope.scale_linear"))?.filter(|&factor| factor != 1.0);
    match (metadata.text(&key("type"))?, factor, old_factor) {
        (None | Some("none"), _, None) => Ok(RopeScaling::None),
        // The factors themselves are tensors.
        (Some("longrope"), _, None) if family == "phi3" => Ok(RopeScaling::None),
        (Some("linear"), Some(factor), _) | (None, _, Some(factor)) => Ok(RopeScaling::Linear { factor }),
        (Some("linear" | "yarn"), None, _) => {
            Err(metadata.invalid(format!("{family}.rope.scaling.factor is missing")))
        }
        (Some("yarn"), Some(factor), None) => {
            if metadata.number(&key("attn_factor"))?.is_some_and(|factor| factor != 1.0) {
                return Err(metadata.unsupported("yarn with an attn_factor is not supported"));
            }
            let context = match metadata.number(&key("original_context_length"))? {
                Some(length) => length,
                None => metadata.required_count(&format!("{family}.context_length"))? as f64,
            };
            Ok(RopeScaling::Yarn {
                factor,
                beta_fast: 32.0,
                beta_slow: 1.0,
                original_context: context,
                truncate: true,
                magnitude: if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 },
            })
        }
        (Some("none"), _, Some(_)) => {
            Err(metadata.invalid("rope.scaling.type contradicts rope.scale_linear"))
        }
        (Some(other), _, _) => Err(metadata.unsupported(format!(
            "rotary scaling {other} is not supported; supported are none, linear, yarn, and longrope in phi3"
        ))),
    }
}

/// Which layers have a window: all of llama's (Mistral) and phi3's, every second one of Gemma 2, five of six of
/// Gemma 3, whose windows come with a rotation of their own.
fn local_layers(
    metadata: &Metadata<'_>,
    family: &str,
    spec: &ModelSpec,
) -> Result<Option<LocalLayers>, CheckpointError> {
    let key = |name: &str| format!("{family}.{name}");
    let default = if family == "gemma2" { Some(4096) } else { None };
    let window = metadata.count(&key("attention.sliding_window"))?.or(default).filter(|&window| window > 0);
    let Some(window) = window else {
        if family == "gemma3" {
            return Err(metadata.invalid("metadata key gemma3.attention.sliding_window is missing"));
        }
        return Ok(None);
    };
    let layers = u32::try_from(spec.layers.min(layout::MAX_LAYERS)).unwrap_or(0);
    let pattern = metadata.map.get(&key("attention.sliding_window_pattern"));
    let local: Vec<u32> = match (family, pattern) {
        (_, Some(Value::Integers(flags))) if flags.len() == spec.layers => {
            (0..layers).filter(|&layer| flags.get(layer as usize).is_some_and(|&flag| flag != 0)).collect()
        }
        ("gemma2" | "gemma3", pattern) => {
            let period = match (family, pattern) {
                (_, Some(Value::Unsigned(period))) if (1..=1 << 16).contains(period) => *period as u32,
                (_, Some(_)) => {
                    return Err(
                        metadata.invalid("attention.sliding_window_pattern is neither a period nor a list")
                    );
                }
                ("gemma2", None) => 2,
                (_, None) => 6,
            };
            (0..layers).filter(|layer| (layer + 1) % period != 0).collect()
        }
        (_, Some(_)) => return Err(metadata.unsupported("attention.sliding_window_pattern is not supported")),
        ("llama" | "phi3", None) => (0..layers).collect(),
        _ if window >= spec.context => return Ok(None),
        _ => {
            return Err(
                metadata.unsupported(format!("sliding window attention in a {family} file is not supported"))
            );
        }
    };
    let rope = match family {
        "gemma3" => Some(Rope {
            theta: metadata.number(&key("rope.freq_base_swa"))?.unwrap_or(10_000.0),
            dims: spec.head_dim,
            scaling: RopeScaling::None,
        }),
        _ => None,
    };
    if local.is_empty() || (window >= spec.context && rope.is_none()) {
        return Ok(None);
    }
    Ok(Some(LocalLayers { window, layers: local, rope }))
}

/// Divisors of the rotary frequencies, as llama files have them.
pub(crate) fn apply_factors(
    metadata: &Metadata<'_>,
    spec: &mut ModelSpec,
    factors: Vec<f32>,
) -> Result<(), CheckpointError> {
    let Some(rope) = &mut spec.rope else {
        return Err(metadata.invalid("rope_freqs.weight: the model has no rotary positions"));
    };
    if rope.scaling != RopeScaling::None {
        return Err(metadata.unsupported("rope_freqs.weight together with rope.scaling is not supported"));
    }
    rope.scaling = RopeScaling::Factors { factors };
    layout::check_spec(spec).map_err(|message| metadata.invalid(format!("rope_freqs.weight: {message}")))
}

/// The short and long divisors of phi3 files.
pub(crate) fn apply_longrope(
    metadata: &Metadata<'_>,
    spec: &mut ModelSpec,
    factors: (Option<Vec<f32>>, Option<Vec<f32>>),
) -> Result<(), CheckpointError> {
    let (short, long) = match factors {
        (Some(short), Some(long)) if spec.family == "phi3" => (short, long),
        (None, None) if metadata.text("phi3.rope.scaling.type")? == Some("longrope") => {
            return Err(metadata.invalid("has longrope scaling, but no rope_factors tensors"));
        }
        (None, None) => return Ok(()),
        _ => {
            return Err(
                metadata.unsupported("rope_factors tensors other than a pair in phi3 are not supported")
            );
        }
    };
    let original_context = match metadata.number("phi3.rope.scaling.original_context_length")? {
        Some(length) => length,
        None => spec.context as f64,
    };
    let magnitude = metadata.number("phi3.rope.scaling.attn_factor")?.unwrap_or(1.0);
    if let Some(rope) = &mut spec.rope {
        rope.scaling = RopeScaling::LongRope { short, long, original_context, magnitude };
    }
    layout::check_spec(spec).map_err(|message| metadata.invalid(message))
}
