//! Opens GGUF files: turns their metadata into a spec and their tensor table into tensors by role.

use std::collections::BTreeMap;
use std::path::Path;

use crate::file::SourceFile;
use crate::fused::Whole;
use crate::gguf::{self, Value};
use crate::names::{self, Name};
use crate::source::{RowOrder, Source};
use crate::{
    Attention, CheckpointError, DType, LayerRole, Mlp, ModelSpec, Norm, NormPlacement, Output, Role, Rope,
    RopeScaling, gguf_tokenizer, layout,
};

/// Architectures that this build can run.
const SUPPORTED: &str = "llama, qwen2, qwen3";

/// A tensor that holds divisors of the rotary frequencies and becomes part of the spec.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Opens a `.gguf` file.
pub(crate) fn open(path: &Path) -> Result<Source, CheckpointError> {
    let file = SourceFile::open(path)?;
    let gguf::Header { metadata, tensors } = gguf::read_header(&file)?;
    let metadata = Metadata { path, map: metadata };
    let family = metadata.text("general.architecture")?.unwrap_or_default().to_owned();
    if !SUPPORTED.split(", ").any(|supported| supported == family) {
        return Err(metadata.unsupported(format!(
            "architecture {family:?} is not supported in GGUF files; supported are {SUPPORTED}"
        )));
    }
    if metadata.count("split.count")?.is_some_and(|count| count > 1) {
        return Err(metadata.unsupported("is one part of several; merge them first (gguf-split --merge)"));
    }
    let shape_of =
        |name: &str| tensors.iter().find(|tensor| tensor.name == name).map(|tensor| tensor.shape.as_slice());
    let Some(&[vocab, _]) = shape_of("token_embd.weight") else {
        return Err(metadata.invalid("has no matrix token_embd.weight; is the download complete?"));
    };
    let tied = shape_of("output.weight").is_none();
    let mut spec = metadata.spec(&family, usize::try_from(vocab).unwrap_or(usize::MAX), tied)?;
    let text = gguf_tokenizer::read(&metadata, &spec)?;

    let mut found = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        if tensor.name == ROPE_FACTORS {
            apply_rope_factors(&file, &tensor, &mut spec)?;
            continue;
        }
        let name = names::gguf(&family, &tensor.name);
        if name == Name::Unknown {
            return Err(metadata.unsupported(format!(
                "tensor {} is not part of a {family} model as this build knows it; \
                 leaving it out would give wrong answers",
                tensor.name
            )));
        }
        let gguf::Tensor { name: tensor_name, dtype, shape, offset, bytes } = tensor;
        let whole = Whole { name: tensor_name, dtype, shape, bytes, file: 0, offset };
        let mut parts = whole.take_apart(&spec, name).map_err(|message| metadata.invalid(message))?;
        for part in &mut parts {
            use LayerRole::{Key, KeyBias, Query, QueryBias};
            if family == "llama"
                && matches!(part.tensor.role, Role::Layer(_, Query | QueryBias | Key | KeyBias))
            {
                part.tensor.location.rows = RowOrder::InterleavedPairs { head_dim: spec.head_dim as u64 };
            }
        }
        found.append(&mut parts);
    }
    let biases = if family == "qwen2" { layout::ATTENTION_BIASES[..3].to_vec() } else { Vec::new() };
    Source::assemble(path, spec, found, &biases, vec![file], text)
}

fn apply_rope_factors(
    file: &SourceFile,
    tensor: &gguf::Tensor,
    spec: &mut ModelSpec,
) -> Result<(), CheckpointError> {
    let invalid =
        |message: String| CheckpointError::invalid(&file.path, format!("{ROPE_FACTORS}: {message}"));
    let Some(rope) = &mut spec.rope else {
        return Err(invalid("the model has no rotary positions".into()));
    };
    if tensor.dtype != DType::F32 || tensor.shape != [rope.dims as u64 / 2] {
        return Err(invalid(format!("has type {} and shape {:?}", tensor.dtype, tensor.shape)));
    }
    if rope.scaling != RopeScaling::None {
        return Err(CheckpointError::unsupported(
            &file.path,
            format!("{ROPE_FACTORS} together with rope.scaling is not supported"),
        ));
    }
    let mut bytes = vec![0; tensor.bytes as usize];
    file.read_exact_at(&mut bytes, tensor.offset)?;
    let factors = bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    rope.scaling = RopeScaling::Factors { factors };
    layout::check_spec(spec).map_err(invalid)
}

/// Metadata with typed access to its keys.
pub(crate) struct Metadata<'a> {
    pub(crate) path: &'a Path,
    pub(crate) map: BTreeMap<String, Value>,
}

impl Metadata<'_> {
    pub(crate) fn invalid(&self, message: impl Into<String>) -> CheckpointError {
        CheckpointError::invalid(self.path, message)
    }

    fn unsupported(&self, message: impl Into<String>) -> CheckpointError {
        CheckpointError::unsupported(self.path, message)
    }

    fn typed<'v, T>(
        &'v self,
        key: &str,
        what: &str,
        convert: impl FnOnce(&'v Value) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        self.map
            .get(key)
            .map(|value| {
                convert(value).ok_or_else(|| self.invalid(format!("metadata key {key} is not {what}")))
            })
            .transpose()
    }

    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>, CheckpointError> {
        self.typed(
            key,
            "a string",
            |value| {
                if let Value::Text(text) = value { Some(text.as_str()) } else { None }
            },
        )
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        self.typed(key, "a boolean", |value| if let Value::Bool(flag) = value { Some(*flag) } else { None })
    }

    pub(crate) fn texts(&self, key: &str) -> Result<Option<&[String]>, CheckpointError> {
        self.typed(key, "a list of strings", |value| match value {
            Value::Texts(texts) => Some(texts.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn integers(&self, key: &str) -> Result<Option<&[i64]>, CheckpointError> {
        self.typed(key, "a list of integers", |value| match value {
            Value::Integers(integers) => Some(integers.as_slice()),
            _ => None,
        })
    }

    pub(crate) fn floats(&self, key: &str) -> Result<Option<&[f32]>, CheckpointError> {
        self.typed(key, "a list of numbers", |value| match value {
            Value::Floats(floats) => Some(floats.as_slice()),
            _ => None,
        })
    }

    fn number(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        self.typed(key, "a number", |value| match value {
            Value::Float(number) => Some(*number),
            Value::Unsigned(number) => Some(*number as f64),
            Value::Signed(number) => Some(*number as f64),
            _ => None,
        })
    }

    /// A count; a list that says the same for every layer counts as one.
    pub(crate) fn count(&self, key: &str) -> Result<Option<usize>, CheckpointError> {
        self.typed(key, "a count, equal for all layers", |value| match value {
            Value::Unsigned(count) => usize::try_from(*count).ok(),
            Value::Signed(count) => usize::try_from(*count).ok(),
            Value::Integers(counts) => match counts.split_first() {
                Some((first, rest)) if rest.iter().all(|count| count == first) => {
                    usize::try_from(*first).ok()
                }
                _ => None,
            },
            _ => None,
        })
    }

    fn required_count(&self, key: &str) -> Result<usize, CheckpointError> {
        self.count(key)?.ok_or_else(|| self.invalid(format!("metadata key {key} is missing")))
    }

    fn spec(&self, family: &str, vocab: usize, tied: bool) -> Result<ModelSpec, CheckpointError> {
        let key = |name: &str| format!("{family}.{name}");
        if self.count(&key("expert_count"))?.is_some_and(|count| count > 0) {
            return Err(self.unsupported("mixtures of experts are not supported"));
        }
        let context = self.required_count(&key("context_length"))?;
        if self.count(&key("attention.sliding_window"))?.is_some_and(|window| window > 0 && window < context)
        {
            return Err(self.unsupported("sliding window attention is not supported"));
        }
        let hidden = self.required_count(&key("embedding_length"))?;
        let heads = self.required_count(&key("attention.head_count"))?;
        let head_dim = match self.count(&key("attention.key_length"))? {
            Some(length) => length,
            None if heads > 0 && hidden.is_multiple_of(heads) => hidden / heads,
            None => return Err(self.invalid(format!("{hidden} elements do not divide into {heads} heads"))),
        };
        if self.count(&key("attention.value_length"))?.is_some_and(|length| length != head_dim) {
            return Err(self.unsupported("keys and values of different length are not supported"));
        }
        if self.count(&key("rope.dimension_count"))?.is_some_and(|dims| dims != head_dim) {
            return Err(
                self.unsupported(format!("rotating only a part of the {head_dim} elements is not supported"))
            );
        }
        let Some(epsilon) = self.number(&key("attention.layer_norm_rms_epsilon"))? else {
            return Err(
                self.invalid(format!("metadata key {} is missing", key("attention.layer_norm_rms_epsilon")))
            );
        };
        let spec = ModelSpec {
            family: family.into(),
            vocab,
            hidden,
            intermediate: self.required_count(&key("feed_forward_length"))?,
            layers: self.required_count(&key("block_count"))?,
            heads,
            kv_heads: self.count(&key("attention.head_count_kv"))?.unwrap_or(heads),
            head_dim,
            context,
            norm: Norm::Rms { epsilon: epsilon as f32 },
            norm_placement: NormPlacement::Pre,
            qk_norm: family == "qwen3",
            rope: Some(Rope {
                theta: self.number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
                dims: head_dim,
                scaling: self.rope_scaling(family)?,
            }),
            learned_positions: None,
            token_types: None,
            mlp: Mlp::GatedSilu,
            attention: Attention::Causal,
            output: Output::Logits { tied },
            ..ModelSpec::default()
        };
        layout::check_spec(&spec).map_err(|message| self.invalid(message))?;
        Ok(spec)
    }

    fn rope_scaling(&self, family: &str) -> Result<RopeScaling, CheckpointError> {
        let factor = self.number(&format!("{family}.rope.scaling.factor"))?;
        // An old key says the same as type linear with its factor.
        let old_factor = self.number(&format!("{family}.rope.scale_linear"))?.filter(|&factor| factor != 1.0);
        match (self.text(&format!("{family}.rope.scaling.type"))?, factor, old_factor) {
            (None | Some("none"), _, None) => Ok(RopeScaling::None),
            (Some("linear"), Some(factor), _) | (None, _, Some(factor)) => Ok(RopeScaling::Linear { factor }),
            (Some("linear"), None, _) => {
                Err(self.invalid(format!("{family}.rope.scaling.factor is missing")))
            }
            (Some("none"), _, Some(_)) => {
                Err(self.invalid("rope.scaling.type contradicts rope.scale_linear"))
            }
            (Some(other), _, _) => Err(self
                .unsupported(format!("rotary scaling {other} is not supported; supported are none, linear"))),
        }
    }
}
