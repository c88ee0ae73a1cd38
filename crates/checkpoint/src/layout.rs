//! What a complete checkpoint must hold: limits on the numbers of a spec, and which tensors it needs or may have.

use std::collections::BTreeMap;

use crate::{DType, LayerRole, ModelSpec, Norm, NormPlacement, Output, Role, RopeScaling};

const MAX_VOCAB: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 20;
const MAX_LAYERS: usize = 4096;
const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_DIM: usize = 1 << 12;
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
    if spec.learned_positions.is_some_and(|positions| positions < spec.context) {
        return Err(format!("a context of {} tokens exceeds the learned positions", spec.context));
    }
    if let Some(rope) = &spec.rope {
        if !positive(rope.theta) {
            return Err(format!("the rotary base is {}, which is not a positive number", rope.theta));
        }
        if rope.dims == 0 || rope.dims > spec.head_dim || !rope.dims.is_multiple_of(2) {
            return Err(format!(
                "{} rotated elements do not fit heads of {} (even, at most all)",
                rope.dims, spec.head_dim
            ));
        }
        check_scaling(&rope.scaling, rope.dims)?;
    }
    Ok(())
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
        RopeScaling::Factors { factors } => {
            if factors.len() == dims / 2 && factors.iter().all(|&factor| positive(f64::from(factor))) {
                Ok(())
            } else {
                Err(format!("the rotary frequency factors must be {} positive numbers", dims / 2))
            }
        }
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
            if OPTIONAL.contains(&layer_role) {
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
        if count != spec.layers {
            return Err(format!(
                "{role:?} is there for {count} of {} layers; is the download complete?",
                spec.layers
            ));
        }
    }
    Ok(())
}

/// Biases without which a family gives wrong answers, although the executor could run it.
pub(crate) fn family_biases(spec: &ModelSpec, attention_bias: bool, mlp_bias: bool) -> Vec<LayerRole> {
    let mut roles = Vec::new();
    let bert = spec.norm_placement == NormPlacement::Post;
    if bert || attention_bias || spec.family == "qwen2" {
        roles.extend([LayerRole::QueryBias, LayerRole::KeyBias, LayerRole::ValueBias]);
    }
    // Qwen2 has none there, whatever its config says.
    if bert || (attention_bias && spec.family != "qwen2") {
        roles.push(LayerRole::AttnOutBias);
    }
    if bert || mlp_bias {
        roles.extend([LayerRole::UpBias, LayerRole::DownBias]);
    }
    if mlp_bias && !bert {
        roles.push(LayerRole::GateBias);
    }
    roles
}

/// Whether the output matrix is the token embedding.
pub(crate) fn is_tied(spec: &ModelSpec) -> bool {
    matches!(spec.output, Output::Logits { tied: true })
}
