//! Opens GGUF files: turns their metadata into a spec and their tensor table into tensors by role.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::file::{Presence, ReadAt, SourceFile};
use crate::fused::Whole;
use crate::gguf::{self, Value};
use crate::names::{self, Name};
use crate::source::{RowOrder, Source};
use crate::{CheckpointError, DType, LayerRole, Role, gguf_spec, gguf_tokenizer};

/// Tensors that hold divisors of the rotary frequencies and become part of the spec: llama's, and Phi-3's two.
const ROPE_FACTORS: &str = "rope_freqs.weight";
const ROPE_FACTORS_SHORT: &str = "rope_factors_short.weight";
const ROPE_FACTORS_LONG: &str = "rope_factors_long.weight";

/// Opens a `.gguf` file.
pub(crate) fn open(path: &Path, presence: Option<&Arc<dyn Presence>>) -> Result<Source, CheckpointError> {
    let file = SourceFile::open_arriving(path, presence)?;
    let gguf::Header { metadata, tensors } = gguf::read_header(&file)?;
    let metadata = Metadata { path, map: metadata };
    let family = metadata.text("general.architecture")?.unwrap_or_default().to_owned();
    if !gguf_spec::SUPPORTED.split(", ").any(|supported| supported == family) {
        return Err(metadata.unsupported(format!(
            "architecture {family:?} is not supported in GGUF files; supported are {}",
            gguf_spec::SUPPORTED
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
    let mut spec = gguf_spec::read(&metadata, &family, usize::try_from(vocab).unwrap_or(usize::MAX), tied)?;
    let factors = |name: &str| {
        let tensor = tensors.iter().find(|tensor| tensor.name == name);
        tensor.map(|tensor| read_rope_factors(&file, tensor)).transpose()
    };
    if let Some(factors) = factors(ROPE_FACTORS)? {
        gguf_spec::apply_factors(&metadata, &mut spec, factors)?;
    }
    let pair = (factors(ROPE_FACTORS_SHORT)?, factors(ROPE_FACTORS_LONG)?);
    gguf_spec::apply_longrope(&metadata, &mut spec, pair)?;
    let text = gguf_tokenizer::read(&metadata, spec.vocab)?;

    let mut found = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        if [ROPE_FACTORS, ROPE_FACTORS_SHORT, ROPE_FACTORS_LONG].contains(&tensor.name.as_str()) {
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
    let biases = gguf_spec::biases(&family);
    Source::assemble(path, spec, found, biases, vec![Arc::new(file)], text)
}

/// Divisors of rotary frequencies.
fn read_rope_factors(file: &SourceFile, tensor: &gguf::Tensor) -> Result<Vec<f32>, CheckpointError> {
    /// More pairs than any head has.
    const MAX_PAIRS: u64 = 1 << 12;
    if tensor.dtype != DType::F32 || tensor.shape.len() != 1 || tensor.bytes > MAX_PAIRS * 4 {
        let message = format!("{}: has type {} and shape {:?}", tensor.name, tensor.dtype, tensor.shape);
        return Err(CheckpointError::invalid(&file.path, message));
    }
    let mut bytes = vec![0; tensor.bytes as usize];
    file.read_exact_at(&mut bytes, tensor.offset)?;
    Ok(bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect())
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

    pub(crate) fn unsupported(&self, message: impl Into<String>) -> CheckpointError {
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

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
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

    pub(crate) fn required_count(&self, key: &str) -> Result<usize, CheckpointError> {
        self.count(key)?.ok_or_else(|| self.invalid(format!("metadata key {key} is missing")))
    }
}
