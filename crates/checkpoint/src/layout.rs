//! What a complete checkpoint must hold: limits on the numbers of a spec, and which tensors it needs or may have.

use std::collections::BTreeMap;

use crate::{DType, LayerRole, LowRank, ModelSpec, Norm, Output, Role, Rope, RopeScaling};

const MAX_VOCAB: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
pub(crate) const MAX_LAYERS: usize = 4096;
/// Of a layer.
const MAX_EXPERTS: usize = 1 << 12;
/// Of all layers together: what is needed is listed tensor by tensor.
const MAX_ALL_EXPERTS: usize = 1 << 16;
const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_DIM: usize = 1 << 12;
/// Of a low-rank update.
const MAX_RANK: usize = 1 << 12;
const MAX_CONTEXT: usize = 1 << 28;

/// Refuses a spec whose numbers are zero, absurd or contradict each other, so that arithmetic on it cannot overflow.
pub(crate) fn check_spec(spec: &ModelSpec) -> Result<(), String> {
    let bounded = [
        ("vocabulary size", spec.vocab, MAX_VOCAB),
        ("hidden size", spec.hidden, MAX_WIDTH),
        ("feed-forward size", spec.intermediate, MAX_WIDTH),
        ("number of layers", spec.layers, MAX_LAYERS),
        ("number of heads", spec.heads, MAX_HEADS),
        ("number of key/value heads", spec.kv_heads, MAX_HEADS),
        ("head size", spec.head_dim, MAX_HEAD_DIM),
        ("context length", spec.context, MAX_CONTEXT),
        ("number of positions", spec.learned_positions.unwrap_or(1), MAX_CONTEXT),
        ("number of token types", spec.token_types.unwrap_or(1), MAX_WIDTH),
    ];
    for (what, value, limit) in bounded {
        if value == 0 || value > limit {
            return Err(format!("the {what} is {value}, which is not between 1 and {limit}"));
        }
    }
    if !spec.heads.is_multiple_of(spec.kv_heads) {
        return Err(format!("{} heads cannot share {} key/value heads evenly", spec.heads, spec.kv_heads));
    }
    let (Norm::Rms { epsilon } | Norm::Layer { epsilon }) = spec.norm;
    if !(epsilon > 0.0 && epsilon < 1.0) {
        return Err(format!("the norm's epsilon is {epsilon}, which is not between 0 and 1"));
    }
    let usable = spec.learned_positions.map(|positions| positions.checked_sub(spec.position_offset));
    if usable.is_some_and(|usable| usable.is_none_or(|usable| usable < spec.context)) {
        return Err(format!("a context of {} tokens exceeds the learned positions", spec.context));
    }
    let factors = [
        ("embedding scale", spec.embedding_scale),
        ("query scale", spec.query_scale),
        ("cap of attention scores", spec.attention_cap),
        ("cap of logits", spec.logit_cap),
    ];
    for (what, factor) in factors {
        if let Some(factor) = factor.filter(|&factor| !positive(f64::from(factor))) {
            return Err(format!("the {what} is {factor}, which is not a positive number"));
        }
    }
    if let Some(rope) = &spec.rope {
        check_rope(rope, spec.head_dim)?;
    }
    if let Some(local) = &spec.local {
        if local.window == 0 || local.window > MAX_CONTEXT {
            return Err(format!("the window is {}, which is not between 1 and {MAX_CONTEXT}", local.window));
        }
        check_layers("local", &local.layers, spec.layers)?;
        if let Some(rope) = &local.rope {
            check_rope(rope, spec.head_dim)?;
        }
    }
    if let Some(experts) = &spec.experts {
        for (what, value, limit) in [
            ("number of experts", experts.count, MAX_EXPERTS.min(MAX_ALL_EXPERTS / spec.layers)),
            ("number of experts per token", experts.per_token, experts.count),
            ("feed-forward size of an expert", experts.intermediate, MAX_WIDTH),
        ] {
            if value == 0 || value > limit {
                return Err(format!("the {what} is {value}, which is not between 1 and {limit}"));
            }
        }
        check_layers("dense", &experts.dense_layers, spec.layers)?;
        if !spec.mlp.gated() {
            return Err("experts without a gate are not known".into());
        }
    }
    check_updates(spec)
}

fn check_updates(spec: &ModelSpec) -> Result<(), String> {
    if !spec.updates.is_sorted_by(|a, b| (a.layer, a.matrix) < (b.layer, b.matrix)) {
        return Err("the low-rank updates are not in ascending order".into());
    }
    for &LowRank { layer, matrix, rank, scale } in &spec.updates {
        let dense = spec.layer_experts(layer as usize).is_none();
        let there = match matrix {
            LayerRole::Query | LayerRole::Key | LayerRole::Value | LayerRole::AttnOut => true,
            LayerRole::Gate => dense && spec.mlp.gated(),
            LayerRole::Up | LayerRole::Down => dense,
            _ => false,
        };
        if layer as usize >= spec.layers || !there {
            return Err(format!(
                "a low-rank update is for {matrix:?} of layer {layer}, which a {} model of {} layers does not have",
                spec.family, spec.layers
            ));
        }
        if rank == 0 || rank > MAX_RANK {
            return Err(format!("the rank of an update is {rank}, which is not between 1 and {MAX_RANK}"));
        }
        if !scale.is_finite() {
            return Err(format!("the scale of an update is {scale}, which is no number"));
        }
    }
    Ok(())
}

fn check_layers(what: &str, layers: &[u32], count: usize) -> Result<(), String> {
    let ascending = layers.is_sorted_by(|a, b| a < b);
    if !ascending || layers.last().is_some_and(|&last| last as usize >= count) {
        return Err(format!("the {what} layers {layers:?} are not an ascending choice of {count}"));
    }
    Ok(())
}

fn check_rope(rope: &Rope, head_dim: usize) -> Result<(), String> {
    if !positive(rope.theta) {
        return Err(format!("the rotary base is {}, which is not a positive number", rope.theta));
    }
    if rope.dims == 0 || rope.dims > head_dim || !rope.dims.is_multiple_of(2) {
        return Err(format!(
            "{} rotated elements do not fit heads of {head_dim} (even, at most all)",
            rope.dims
        ));
    }
    check_scaling(&rope.scaling, rope.dims)
}

fn check_scaling(scaling: &RopeScaling, dims: usize) -> Result<(), String> {
    match scaling {
        RopeScaling::None => Ok(()),
        RopeScaling::Linear { factor } => {
            if positive(*factor) {
                Ok(())
            } else {
                Err(format!("the rotary scaling factor is {factor}, which is not a positive number"))
            }
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            if [*factor, *low_freq_factor, *high_freq_factor, *original_context].into_iter().all(positive)
                && high_freq_factor > low_freq_factor
            {
                Ok(())
            } else {
                Err("the llama3 rotary scaling needs positive numbers and high_freq_factor > low_freq_factor"
                    .into())
            }
        }
        RopeScaling::Factors { factors } => check_factors(factors, dims),
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, magnitude, truncate: _ } => {
            if [*factor, *beta_fast, *beta_slow, *original_context, *magnitude].into_iter().all(positive) {
                Ok(())
            } else {
                Err("the yarn rotary scaling needs positive numbers".into())
            }
        }
        RopeScaling::LongRope { short, long, original_context, magnitude } => {
            check_factors(short, dims)?;
            check_factors(long, dims)?;
            if positive(*original_context) && positive(*magnitude) {
                Ok(())
            } else {
                Err("the longrope rotary scaling needs positive numbers".into())
            }
        }
    }
}

fn check_factors(factors: &[f32], dims: usize) -> Result<(), String> {
    if factors.len() == dims / 2 && factors.iter().all(|&factor| positive(f64::from(factor))) {
        Ok(())
    } else {
        Err(format!("the rotary frequency factors must be {} positive numbers", dims / 2))
    }
}

fn positive(value: f64) -> bool {
    value.is_finite() && value > 0.0
}

/// Biases that the executor applies where a checkpoint has them and does without where it has not.
const OPTIONAL: [LayerRole; 7] = [
    LayerRole::QueryBias,
    LayerRole::KeyBias,
    LayerRole::ValueBias,
    LayerRole::AttnOutBias,
    LayerRole::GateBias,
    LayerRole::UpBias,
    LayerRole::DownBias,
];

/// Whether an optional role has its place in this layer.
fn has_bias(spec: &ModelSpec, layer: usize, role: LayerRole) -> bool {
    match role {
        LayerRole::GateBias => spec.mlp.gated() && spec.layer_experts(layer).is_none(),
        LayerRole::UpBias | LayerRole::DownBias => spec.layer_experts(layer).is_none(),
        _ => true,
    }
}

/// Checks a set of tensors against a (checked) spec: every role at most once, all required ones there, optional ones
/// in all layers or in none, shapes as the spec says, and byte sizes that follow from shape and type. `name` is what
/// messages call the tensor.
pub(crate) fn check_tensors<'a>(
    spec: &ModelSpec,
    tensors: impl Iterator<Item = (Role, DType, &'a [u64], u64, &'a str)>,
) -> Result<(), String> {
    let mut seen: BTreeMap<Role, &str> = BTreeMap::new();
    let mut optional_counts: BTreeMap<LayerRole, usize> = BTreeMap::new();
    let required = spec.required_roles();
    let required_set: std::collections::BTreeSet<Role> = required.iter().copied().collect();
    for (role, dtype, shape, bytes, name) in tensors {
        if let Role::Layer(layer, layer_role) = role {
            if layer as usize >= spec.layers {
                return Err(format!(
                    "tensor {name} belongs to layer {layer}, but the model has {} layers",
                    spec.layers
                ));
            }
            if OPTIONAL.contains(&layer_role) && has_bias(spec, layer as usize, layer_role) {
                *optional_counts.entry(layer_role).or_default() += 1;
            } else if !required_set.contains(&role) {
                return Err(format!(
                    "tensor {name} is not part of a {} model as its config describes it",
                    spec.family
                ));
            }
        } else if !required_set.contains(&role) {
            return Err(format!(
                "tensor {name} is not part of a {} model as its config describes it",
                spec.family
            ));
        }
        if let Some(other) = seen.insert(role, name) {
            return Err(format!("tensors {other} and {name} are for the same purpose"));
        }
        let expected = spec.shape(role);
        if shape != expected {
            return Err(format!("tensor {name} has shape {shape:?}, but the config asks for {expected:?}"));
        }
        if dtype.is_quantised() && shape.len() == 1 {
            return Err(format!(
                "tensor {name} is a vector stored as {dtype}; vectors must be f32, f16 or bf16"
            ));
        }
        if dtype.is_quantised() && matches!(role, Role::LowRank(..)) {
            return Err(format!("tensor {name} is stored as {dtype}; adapters must be f32, f16 or bf16"));
        }
        match dtype.tensor_bytes(shape) {
            Some(size) if size == bytes => {}
            Some(size) => {
                return Err(format!(
                    "tensor {name} of shape {shape:?} and type {dtype} takes {size} bytes, not {bytes}"
                ));
            }
            None => {
                return Err(format!(
                    "tensor {name} of shape {shape:?} cannot be stored in blocks of type {dtype}"
                ));
            }
        }
    }
    if let Some(missing) = required.iter().find(|role| !seen.contains_key(role)) {
        return Err(format!("the tensor for {missing:?} is missing; is the download complete?"));
    }
    for (role, count) in optional_counts {
        let needed = (0..spec.layers).filter(|&layer| has_bias(spec, layer, role)).count();
        if count != needed {
            return Err(format!(
                "{role:?} is there for {count} of {needed} layers; is the download complete?"
            ));
        }
    }
    Ok(())
}

/// The biases of attention.
pub(crate) const ATTENTION_BIASES: [LayerRole; 4] =
    [LayerRole::QueryBias, LayerRole::KeyBias, LayerRole::ValueBias, LayerRole::AttnOutBias];

/// The biases of a gated feed-forward block.
pub(crate) const GATED_BIASES: [LayerRole; 3] = [LayerRole::GateBias, LayerRole::UpBias, LayerRole::DownBias];

/// All biases of a layer without a gate.
pub(crate) const UNGATED_BIASES: [LayerRole; 6] = [
    LayerRole::QueryBias,
    LayerRole::KeyBias,
    LayerRole::ValueBias,
    LayerRole::AttnOutBias,
    LayerRole::UpBias,
    LayerRole::DownBias,
];

/// Whether the output matrix is the token embedding.
pub(crate) fn is_tied(spec: &ModelSpec) -> bool {
    matches!(spec.output, Output::Logits { tied: true })
}
