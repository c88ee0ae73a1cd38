//! Opens LoRA adapters in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! An adapter is read against the manifest of its base. What PEFT can express and this build cannot compute is refused
//! with its name: leaving a part of an adapter out would give wrong answers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::adapter_config::AdapterConfig;
use crate::file::{ReadAt, SourceFile};
use crate::fused::Whole;
use crate::hugging_face::{MAX_JSON_BYTES, parse_json, read_chat_template, read_json};
use crate::names::{self, Fused, Name};
use crate::source::SourceTensor;
use crate::{
    CheckpointError, DType, Factor, LayerRole, LowRank, Manifest, ModelSpec, Role, layout, safetensors,
};

/// The weights of an adapter.
const WEIGHTS: &str = "adapter_model.safetensors";
/// Its settings.
const CONFIG: &str = "adapter_config.json";

/// An adapter found outside, checked against its base. Tensor bytes are read on demand.
#[derive(Debug)]
pub struct AdapterSource {
    spec: ModelSpec,
    /// The adapter's own, in execution order.
    tensors: Vec<AdapterTensor>,
    file: Arc<dyn ReadAt>,
    chat_template: Option<String>,
}

/// One factor of an update.
#[derive(Debug)]
pub(crate) struct AdapterTensor {
    pub(crate) role: Role,
    pub(crate) dtype: DType,
    /// Outermost dimension first, as the spec wants it.
    pub(crate) shape: Vec<u64>,
    pub(crate) bytes: u64,
    /// As it lies in the file: a `B` is `[out_features, rank]` there.
    stored: SourceTensor,
}

/// The two factors of a module as the file has them.
#[derive(Default)]
struct Module {
    a: Option<safetensors::Tensor>,
    b: Option<safetensors::Tensor>,
}

impl AdapterSource {
    /// Opens the PEFT directory at `directory`, an adapter on the model of `base`.
    ///
    /// Reads headers and small files only. Errors name the file, what is wrong with it and what to do.
    pub fn open(directory: &Path, base: &Manifest) -> Result<AdapterSource, CheckpointError> {
        let config_path = directory.join(CONFIG);
        if !base.spec.updates.is_empty() {
            let message = "an adapter on an adapter is not supported; deploy it on the base model";
            return Err(CheckpointError::unsupported(directory, message));
        }
        if !base.spec.generates() {
            let message = format!("adapters on embedding models ({}) are not supported", base.spec.family);
            return Err(CheckpointError::unsupported(directory, message));
        }
        let json = crate::file::read_limited(&config_path, MAX_JSON_BYTES)?;
        let config = AdapterConfig::parse(&parse_json(&config_path, &json)?)
            .map_err(|message| CheckpointError::unsupported(&config_path, message))?;
        let file = SourceFile::open(&weights_path(directory)?)?;
        let unsupported = |message| CheckpointError::unsupported(&file.path, message);
        let mut modules: BTreeMap<String, Module> = BTreeMap::new();
        for tensor in safetensors::read_header(&file)? {
            let (module, factor) = module_of(&tensor.name).map_err(unsupported)?;
            let module = modules.entry(module.to_owned()).or_default();
            let place = if factor == Factor::A { &mut module.a } else { &mut module.b };
            if let Some(other) = place.replace(tensor) {
                let message = format!("holds two adapters: tensor {} is there twice", other.name);
                return Err(CheckpointError::unsupported(&file.path, message));
            }
        }
        config
            .check_modules(modules.keys().map(String::as_str))
            .map_err(|message| CheckpointError::invalid(&file.path, message))?;
        let mut spec = base.spec.clone();
        let mut tensors = Vec::new();
        for (module, factors) in modules {
            let Module { a: Some(a), b: Some(b) } = factors else {
                let message = format!("module {module} has only one of lora_A and lora_B");
                return Err(CheckpointError::invalid(&file.path, message));
            };
            let (rank, scale) = config
                .rank_and_scale(&module)
                .map_err(|message| CheckpointError::invalid(&config_path, message))?;
            let found = take_apart(&base.spec, &module, rank, a, b).map_err(unsupported)?;
            for (layer, matrix, factors) in found {
                spec.updates.push(LowRank { layer, matrix, rank: rank as usize, scale });
                tensors.extend(factors);
            }
        }
        if spec.updates.is_empty() {
            return Err(CheckpointError::invalid(&file.path, "holds no adapter: there is no lora_A tensor"));
        }
        spec.updates.sort_by_key(|update| (update.layer, update.matrix));
        tensors.sort_by_key(|tensor| (spec.stage(tensor.role), tensor.role));
        let invalid = |message| CheckpointError::invalid(&file.path, message);
        layout::check_spec(&spec).map_err(invalid)?;
        let names: Vec<String> = tensors.iter().map(|tensor| role_name(tensor.role)).collect();
        let own = tensors.iter().zip(&names).map(|(tensor, name)| {
            (tensor.role, tensor.dtype, tensor.shape.as_slice(), tensor.bytes, name.as_str())
        });
        let of_base = base
            .tensors
            .iter()
            .map(|tensor| (tensor.role, tensor.dtype, tensor.shape.as_slice(), tensor.bytes, "of the base"));
        layout::check_tensors(&spec, of_base.chain(own)).map_err(invalid)?;
        let settings = read_json(&directory.join("tokenizer_config.json"))?.unwrap_or_default();
        let chat_template = read_chat_template(directory, &settings)?;
        Ok(AdapterSource { spec, tensors, file: Arc::new(file), chat_template })
    }

    /// The base's description with the adapter's updates.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Bytes of the adapter's own tensors.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// The adapter's own chat template, which then takes the place of the base's.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    pub(crate) fn tensors(&self) -> &[AdapterTensor] {
        &self.tensors
    }

    /// All bytes of a tensor in the order that the spec asks for. Needs memory for it twice.
    pub(crate) fn read(&self, tensor: &AdapterTensor) -> Result<Vec<u8>, CheckpointError> {
        let mut stored = vec![0; tensor.bytes as usize];
        tensor.stored.read_at(std::slice::from_ref(&self.file), 0, &mut stored)?;
        let [rank, width] = tensor.shape.as_slice() else { return Ok(stored) };
        if matches!(tensor.role, Role::LowRank(_, _, Factor::A)) {
            return Ok(stored);
        }
        let (rank, width) = (*rank as usize, *width as usize);
        let element = stored.len() / (rank * width).max(1);
        let mut turned = vec![0; stored.len()];
        for (column, row) in stored.chunks_exact((rank * element).max(1)).enumerate() {
            for (index, value) in row.chunks_exact(element).enumerate() {
                let to = (index * width + column) * element;
                if let Some(to) = turned.get_mut(to..to + element) {
                    to.copy_from_slice(value);
                }
            }
        }
        Ok(turned)
    }
}

fn role_name(role: Role) -> String {
    match role {
        Role::LowRank(layer, matrix, factor) => format!("lora_{factor:?} of {matrix:?} in layer {layer}"),
        other => format!("{other:?}"),
    }
}

fn weights_path(directory: &Path) -> Result<PathBuf, CheckpointError> {
    let path = directory.join(WEIGHTS);
    if !path.exists() && directory.join("adapter_model.bin").exists() {
        let message = format!("is a pickle, which is not read; convert the adapter to {WEIGHTS}");
        return Err(CheckpointError::unsupported(&directory.join("adapter_model.bin"), message));
    }
    Ok(path)
}

/// The module that a tensor belongs to, as the base model calls it, and which factor it is.
fn module_of(name: &str) -> Result<(&str, Factor), String> {
    let inner = name.strip_prefix("base_model.").unwrap_or(name);
    let inner = inner.strip_prefix("model.").filter(|_| inner.len() < name.len()).unwrap_or(inner);
    for (mark, factor) in [(".lora_A.", Factor::A), (".lora_B.", Factor::B)] {
        if let Some((module, rest)) = inner.split_once(mark) {
            // The adapter's name stands in between in files that were not written by PEFT's own saving.
            return match rest.rsplit_once('.').map_or(rest, |(_, last)| last) {
                "weight" => Ok((module, factor)),
                _ => {
                    Err(format!("tensor {name} is not supported: adapters with biases of their own are not"))
                }
            };
        }
    }
    let reason = if name.contains("lora_magnitude_vector") {
        "it belongs to DoRA, which is not supported"
    } else if name.contains("lora_embedding_") {
        "adapters on embeddings are not supported"
    } else {
        "only lora_A and lora_B of attention and feed-forward matrices are supported, \
         and leaving it out would give wrong answers"
    };
    Err(format!("tensor {name} cannot be used: {reason}"))
}

/// What the tensors of a module's update are called in the base's checkpoint; GGUF has names of its own for some
/// families.
fn hugging_face_family(family: &str) -> &str {
    match family {
        "gptneox" => "gpt_neox",
        "qwen3moe" => "qwen3_moe",
        other => other,
    }
}

type Part = (u32, LayerRole, [AdapterTensor; 2]);

/// The updates of matrices that the update of a module amounts to: several where the family's files store several
/// matrices as one. `A` is then the same for all.
fn take_apart(
    spec: &ModelSpec,
    module: &str,
    rank: u64,
    a: safetensors::Tensor,
    b: safetensors::Tensor,
) -> Result<Vec<Part>, String> {
    let family = hugging_face_family(&spec.family);
    let name = names::hugging_face(family, &format!("{module}.weight"), false, false);
    // The factors are not transposed in the families that store their matrices so.
    let name = match name {
        Name::Transposed(role) => Name::Role(role),
        Name::Fused(layer, Fused::QueryKeyValueTransposed) => Name::Fused(layer, Fused::QueryKeyValue),
        other => other,
    };
    let can_be_updated = match name {
        Name::Role(Role::Layer(_, role)) => LowRank::MATRICES.contains(&role),
        Name::Fused(_, fused) => {
            matches!(fused, Fused::QueryKeyValue | Fused::QueryKeyValueByHead | Fused::GateUp)
        }
        _ => false,
    };
    if !can_be_updated {
        let family = &spec.family;
        return Err(format!(
            "an adapter on module {module} of a {family} model is not supported; supported are the matrices of \
             attention and of feed-forward blocks without experts"
        ));
    }
    if a.shape.first() != Some(&rank)
        || b.shape.last() != Some(&rank)
        || a.shape.len() != 2
        || b.shape.len() != 2
    {
        return Err(format!(
            "module {module} has lora_A of shape {:?} and lora_B of shape {:?}, but the config asks for rank {rank}",
            a.shape, b.shape
        ));
    }
    let whole = |tensor: safetensors::Tensor| -> Result<Whole, String> {
        let Some(dtype) = tensor.element_type() else {
            return Err(format!(
                "tensor {} has type {}; supported are F32, F16 and BF16, so convert the adapter",
                tensor.name, tensor.dtype
            ));
        };
        let safetensors::Tensor { name, shape, offset, bytes, .. } = tensor;
        Ok(Whole { name, dtype, shape, bytes, file: 0, offset })
    };
    let (a, b) = (whole(a)?, whole(b)?);
    // The rows of B are divided as the rows of the matrix are.
    let parts = b.take_apart(spec, name)?;
    let mut found = Vec::with_capacity(parts.len());
    for part in parts {
        let of_b = part.tensor;
        let Role::Layer(layer, matrix) = of_b.role else { continue };
        let of_a = a.plain(of_b.role);
        let a = AdapterTensor {
            role: Role::LowRank(layer, matrix, Factor::A),
            dtype: of_a.dtype,
            shape: of_a.shape.clone(),
            bytes: of_a.bytes,
            stored: of_a,
        };
        let b = AdapterTensor {
            role: Role::LowRank(layer, matrix, Factor::B),
            dtype: of_b.dtype,
            shape: of_b.shape.iter().rev().copied().collect(),
            bytes: of_b.bytes,
            stored: of_b,
        };
        found.push((layer, matrix, [a, b]));
    }
    Ok(found)
}
