//! Opens checkpoints in the Hugging Face layout: `config.json`, safetensors (sharded or not), tokenizer files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::config::{self, ConfigError};
use crate::file::{Presence, ReadAt, SourceFile, read_limited, read_optional};
use crate::fused::Whole;
use crate::names::{self, Fused, Name};
use crate::source::{Source, TextAssets, list_files};
use crate::{
    CheckpointError, GenerationDefaults, ModelSpec, Output, Pooling, layout, quantised, safetensors,
    serverlessllm, tekken, tokenizer,
};

/// Largest JSON file other than the tokenizer, in bytes.
pub(crate) const MAX_JSON_BYTES: u64 = 64 << 20;
/// Largest chat template in bytes.
const MAX_TEMPLATE_BYTES: u64 = 4 << 20;
/// More shards than any model has; each one stays open.
const MAX_SHARDS: usize = 512;

/// Opens a directory with `config.json` and safetensors files, or with what ServerlessLLM makes of them.
pub(crate) fn open_directory(
    directory: &Path,
    presence: Option<&Arc<dyn Presence>>,
) -> Result<Source, CheckpointError> {
    if serverlessllm::is_here(directory) && list_files(directory, "safetensors")?.is_empty() {
        return open(directory, || serverlessllm::read_headers(directory));
    }
    let shards = find_shards(directory)?;
    open(directory, || read_headers(&shards, presence))
}

/// Opens one safetensors file with `config.json` beside it.
pub(crate) fn open_file(
    file: &Path,
    presence: Option<&Arc<dyn Presence>>,
) -> Result<Source, CheckpointError> {
    let directory = match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    open(directory, || read_headers(&[file.to_path_buf()], presence))
}

/// `model.safetensors`, else the shards that the index names, else every safetensors file.
fn find_shards(directory: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    let whole = directory.join("model.safetensors");
    if whole.exists() {
        return Ok(vec![whole]);
    }
    let index_path = directory.join("model.safetensors.index.json");
    let shards = match read_optional(&index_path, MAX_JSON_BYTES)? {
        Some(bytes) => {
            let index = parse_json(&index_path, &bytes)?;
            let map = index
                .get("weight_map")
                .and_then(Value::as_object)
                .ok_or_else(|| CheckpointError::invalid(&index_path, "has no weight_map object"))?;
            let mut names = BTreeSet::new();
            for (tensor, file) in map {
                // A plain name: the index must not lead out of the directory.
                let name = file.as_str().filter(|name| Path::new(name).file_name() == Some(name.as_ref()));
                let name = name.ok_or_else(|| {
                    CheckpointError::invalid(
                        &index_path,
                        format!("puts tensor {tensor} into {file}, not a file name"),
                    )
                })?;
                names.insert(name);
            }
            names.into_iter().map(|name| directory.join(name)).collect()
        }
        None => list_files(directory, "safetensors")?,
    };
    if shards.is_empty() && serverlessllm::is_for_vllm(directory) {
        return Err(CheckpointError::unsupported(
            directory,
            "was saved by ServerlessLLM for vLLM, whose tensors are fused and cut for one version of it; \
             deploy the original, or what ServerlessLLM saves for Transformers",
        ));
    }
    if shards.is_empty() {
        return Err(CheckpointError::invalid(
            directory,
            "has a config.json but no .safetensors file; weights in other formats must be converted to safetensors",
        ));
    }
    if shards.len() > MAX_SHARDS {
        return Err(CheckpointError::invalid(
            directory,
            format!("has more than {MAX_SHARDS} safetensors files"),
        ));
    }
    Ok(shards)
}

/// Opens what `config.json` in `directory` describes; `headers` opens the files with its tensors.
fn open(
    directory: &Path,
    headers: impl FnOnce() -> Result<Headers, CheckpointError>,
) -> Result<Source, CheckpointError> {
    let config_path = directory.join("config.json");
    let config = parse_json(&config_path, &read_limited(&config_path, MAX_JSON_BYTES)?)?;
    let config::Parsed { mut spec, biases, quantisation } =
        config::parse(&config).map_err(|error| match error {
            ConfigError::Invalid(message) => CheckpointError::invalid(&config_path, message),
            ConfigError::Unsupported(message) => CheckpointError::unsupported(&config_path, message),
        })?;
    if matches!(spec.output, Output::Embedding { .. }) {
        apply_sentence_settings(directory, &mut spec)?;
    }
    let (files, mut tensors) = headers()?;
    let paths: Vec<PathBuf> = files.iter().map(|file| file.path.clone()).collect();
    let (matrices, warnings) = match quantisation {
        Some(quantisation) => quantised::gather(quantisation, &files, &mut tensors)?,
        None => (Vec::new(), Vec::new()),
    };
    let path_of = |file: usize| paths.get(file).map_or(directory, PathBuf::as_path);
    let mut found = Vec::new();
    for (file, tensor) in tensors {
        let path = path_of(file);
        let Some(name) = meaning(path, &spec, &tensor.name)? else { continue };
        let Some(dtype) = tensor.element_type() else {
            return Err(CheckpointError::unsupported(
                path,
                format!(
                    "tensor {} has type {}; supported are F32, F16 and BF16, so convert the checkpoint",
                    tensor.name, tensor.dtype
                ),
            ));
        };
        let safetensors::Tensor { name: tensor_name, shape, offset, bytes, .. } = tensor;
        let whole = Whole { name: tensor_name, dtype, shape, bytes, file, offset };
        found.extend(
            whole.take_apart(&spec, name).map_err(|message| CheckpointError::invalid(path, message))?,
        );
    }
    let mut files: Vec<Arc<dyn ReadAt>> = files.into_iter().map(|file| file as Arc<dyn ReadAt>).collect();
    for matrix in matrices {
        let path = path_of(matrix.file);
        let Some(name) = meaning(path, &spec, &matrix.name)? else { continue };
        if matches!(name, Name::Transposed(_) | Name::Fused(_, Fused::QueryKeyValueTransposed)) {
            let message = format!("quantised weights of a {} model are not supported", spec.family);
            return Err(CheckpointError::unsupported(path, message));
        }
        let (name_of, dtype, shape, bytes) =
            (matrix.name.clone(), matrix.dtype, matrix.shape.to_vec(), matrix.bytes);
        let whole = Whole { name: name_of, dtype, shape, bytes, file: files.len(), offset: 0 };
        found.extend(
            whole.take_apart(&spec, name).map_err(|message| CheckpointError::invalid(path, message))?,
        );
        files.push(Arc::new(matrix));
    }
    let mut text = read_text_assets(directory, &config, &spec)?;
    text.warnings.extend(warnings);
    let described_by = if let [path] = paths.as_slice() { path } else { directory };
    Source::assemble(described_by, spec, found, &biases, files, text)
}

/// What a tensor of this name is for; `None` if the model does not need it.
fn meaning(path: &Path, spec: &ModelSpec, tensor: &str) -> Result<Option<Name>, CheckpointError> {
    let family = &spec.family;
    match names::hugging_face(family, tensor, layout::is_tied(spec), spec.scores()) {
        Name::Ignored => Ok(None),
        Name::Unknown => Err(CheckpointError::unsupported(
            path,
            format!(
                "tensor {tensor} is not part of a {family} model as this build knows it; \
                 leaving it out would give wrong answers"
            ),
        )),
        name => Ok(Some(name)),
    }
}

/// Open files, and their tensors with the index of theirs.
pub(crate) type Headers = (Vec<Arc<SourceFile>>, Vec<(usize, safetensors::Tensor)>);

/// Opens the files and lists their tensors, each with the index of its file. No name comes twice.
fn read_headers(
    shards: &[PathBuf],
    presence: Option<&Arc<dyn Presence>>,
) -> Result<Headers, CheckpointError> {
    let mut files = Vec::with_capacity(shards.len());
    let mut tensors = Vec::new();
    let mut origin: BTreeMap<String, usize> = BTreeMap::new();
    for (index, path) in shards.iter().enumerate() {
        let file = SourceFile::open_arriving(path, presence)?;
        for tensor in safetensors::read_header(&file)? {
            if let Some(other) = origin.insert(tensor.name.clone(), index) {
                let other = shards.get(other).map(|path| path.display().to_string()).unwrap_or_default();
                return Err(CheckpointError::invalid(
                    path,
                    format!("tensor {} is in {other} too", tensor.name),
                ));
            }
            tensors.push((index, tensor));
        }
        files.push(Arc::new(file));
    }
    Ok((files, tensors))
}

pub(crate) fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value, CheckpointError> {
    serde_json::from_slice(bytes)
        .map_err(|error| CheckpointError::invalid(path, format!("is not valid JSON: {error}")))
}

pub(crate) fn read_json(path: &Path) -> Result<Option<Value>, CheckpointError> {
    read_optional(path, MAX_JSON_BYTES)?.map(|bytes| parse_json(path, &bytes)).transpose()
}

/// Applies the files that sentence-transformers lays beside an embedding model: pooling, normalisation, length.
fn apply_sentence_settings(directory: &Path, spec: &mut ModelSpec) -> Result<(), CheckpointError> {
    let modules_path = directory.join("modules.json");
    let mut pooling_directory = "1_Pooling".to_owned();
    let mut normalise = false;
    if let Some(modules) = read_json(&modules_path)? {
        let Value::Array(modules) = modules else {
            return Err(CheckpointError::invalid(&modules_path, "is not a list of modules"));
        };
        for module in &modules {
            let kind = module.get("type").and_then(Value::as_str).unwrap_or_default();
            match kind.rsplit('.').next().unwrap_or_default() {
                "Transformer" => {}
                "Normalize" => normalise = true,
                "Pooling" => {
                    let path = module.get("path").and_then(Value::as_str).unwrap_or_default();
                    if Path::new(path).file_name() != Some(path.as_ref()) {
                        return Err(CheckpointError::invalid(
                            &modules_path,
                            format!("{path:?} is not a folder name"),
                        ));
                    }
                    pooling_directory = path.to_owned();
                }
                _ => {
                    return Err(CheckpointError::unsupported(
                        &modules_path,
                        format!(
                            "module {kind:?} is not supported; supported are Transformer, Pooling and Normalize"
                        ),
                    ));
                }
            }
        }
    }
    let pooling_path = directory.join(pooling_directory).join("config.json");
    let pooling = match read_json(&pooling_path)? {
        Some(settings) => {
            pooling(&settings).map_err(|message| CheckpointError::unsupported(&pooling_path, message))?
        }
        None => Pooling::Mean,
    };
    spec.output = Output::Embedding { pooling, normalise };
    let length_path = directory.join("sentence_bert_config.json");
    if let Some(settings) = read_json(&length_path)?
        && let Some(length) = settings.get("max_seq_length").filter(|length| !length.is_null())
    {
        let length = length.as_u64().filter(|&length| length > 0).ok_or_else(|| {
            CheckpointError::invalid(
                &length_path,
                format!("max_seq_length is {length}, not a positive count"),
            )
        })?;
        spec.context = spec.context.min(usize::try_from(length).unwrap_or(usize::MAX));
    }
    Ok(())
}

fn pooling(settings: &Value) -> Result<Pooling, String> {
    let modes: Vec<&str> = settings
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| key.starts_with("pooling_mode_") && value.as_bool() == Some(true))
        .map(|(key, _)| key.as_str())
        .collect();
    match modes.as_slice() {
        [] | ["pooling_mode_mean_tokens"] => Ok(Pooling::Mean),
        ["pooling_mode_cls_token"] => Ok(Pooling::Cls),
        other => {
            Err(format!("{} is not supported; supported are mean and cls pooling", other.join(" with ")))
        }
    }
}

/// Tokenizer, chat template, special tokens and sampling defaults.
fn read_text_assets(
    directory: &Path,
    config: &Value,
    spec: &ModelSpec,
) -> Result<TextAssets, CheckpointError> {
    let mut text = TextAssets::default();
    // ServerlessLLM's command line puts what belongs to the tokenizer into a folder of its own.
    let own = directory.join("tokenizer");
    let has_own = !directory.join("tokenizer.json").exists() && own.join("tokenizer.json").exists();
    let tokenizer_directory = if has_own { own.as_path() } else { directory };
    let settings_path = tokenizer_directory.join("tokenizer_config.json");
    let settings = read_json(&settings_path)?.unwrap_or(Value::Null);
    for key in ["bos_token", "eos_token", "unk_token", "pad_token"] {
        let value = settings.get(key);
        if let Some(token) = value.and_then(Value::as_str).or_else(|| value?.get("content")?.as_str()) {
            text.special_tokens.insert(key.into(), token.into());
        }
    }
    text.chat_template = read_chat_template(tokenizer_directory, &settings)?;

    let tokenizer_path = tokenizer_directory.join("tokenizer.json");
    let tokenizer = match read_optional(&tokenizer_path, tokenizer::MAX_TOKENIZER_BYTES)? {
        Some(json) => {
            let wants_bos = settings.get("add_bos_token").and_then(Value::as_bool) == Some(true);
            let bos = text.special_tokens.get("bos_token").filter(|_| wants_bos);
            let prepared = tokenizer::prepare(json, bos.map(String::as_str))
                .map_err(|message| CheckpointError::invalid(&tokenizer_path, message))?;
            text.tokenizer_json = Some(prepared.json);
            Some(prepared.tokenizer)
        }
        None => read_tekken(directory, &mut text)?,
    };

    let largest = tokenizer.as_ref().and_then(|tokenizer| tokenizer.get_vocab(true).into_values().max());
    if largest.is_some_and(|id| id as usize >= spec.vocab) {
        text.warnings.push(format!(
            "the tokenizer knows tokens beyond the model's vocabulary of {}; prompts that use them are refused",
            spec.vocab
        ));
    }

    let generation_path = directory.join("generation_config.json");
    let generation = read_json(&generation_path)?.unwrap_or(Value::Null);
    text.generation = generation_defaults(&generation, config)
        .map_err(|message| CheckpointError::invalid(&generation_path, message))?;
    if let (Some(tokenizer), Some(eos)) = (&tokenizer, text.special_tokens.get("eos_token"))
        && let Some(id) = tokenizer.token_to_id(eos)
        && !text.generation.eos.contains(&id)
    {
        text.generation.eos.push(id);
    }
    Ok(text)
}

/// Mistral's own tokenizer file, where there is no other.
fn read_tekken(directory: &Path, text: &mut TextAssets) -> Result<Option<Tokenizer>, CheckpointError> {
    let path = directory.join(tekken::FILE);
    let Some(json) = read_optional(&path, tokenizer::MAX_TOKENIZER_BYTES)? else {
        text.warnings.push(tokenizer::MISSING.into());
        return Ok(None);
    };
    let prepared = tekken::convert(&json).map_err(|message| CheckpointError::invalid(&path, message))?;
    for (key, token) in [("bos_token", tekken::BOS), ("eos_token", tekken::EOS)] {
        text.special_tokens.entry(key.into()).or_insert_with(|| token.into());
    }
    text.tokenizer_json = Some(prepared.json);
    Ok(Some(prepared.tokenizer))
}

/// `chat_template.jinja`, else the template in `tokenizer_config.json` (of several the one called "default").
pub(crate) fn read_chat_template(
    directory: &Path,
    settings: &Value,
) -> Result<Option<String>, CheckpointError> {
    let path = directory.join("chat_template.jinja");
    if let Some(bytes) = read_optional(&path, MAX_TEMPLATE_BYTES)? {
        return String::from_utf8(bytes)
            .map(Some)
            .map_err(|_| CheckpointError::invalid(&path, "is not valid UTF-8"));
    }
    Ok(match settings.get("chat_template") {
        Some(Value::String(template)) => Some(template.clone()),
        Some(Value::Array(templates)) => templates
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template")?.as_str())
            .map(str::to_owned),
        _ => None,
    })
}

/// Sampling defaults from `generation_config.json`; the special tokens fall back to `config.json`.
fn generation_defaults(generation: &Value, config: &Value) -> Result<GenerationDefaults, String> {
    let token = |key: &str| generation.get(key).or_else(|| config.get(key)).filter(|value| !value.is_null());
    let id = |key: &str, value: &Value| {
        value
            .as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| format!("{key} is {value}, not a token id"))
    };
    let mut eos = Vec::new();
    match token("eos_token_id") {
        Some(Value::Array(ids)) => {
            for value in ids {
                let value = id("eos_token_id", value)?;
                if !eos.contains(&value) {
                    eos.push(value);
                }
            }
        }
        Some(value) => eos.push(id("eos_token_id", value)?),
        None => {}
    }
    let number = |key: &str, allowed: std::ops::RangeInclusive<f32>| match generation.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64().map(|number| number as f32) {
            Some(number) if allowed.contains(&number) => Ok(Some(number)),
            _ => Err(format!("{key} is {value}, not between {} and {}", allowed.start(), allowed.end())),
        },
    };
    let top_k = match generation.get("top_k") {
        None | Some(Value::Null) => None,
        Some(value) => Some(
            value
                .as_u64()
                .and_then(|count| u32::try_from(count).ok())
                .ok_or_else(|| format!("top_k is {value}, not a count"))?,
        ),
    };
    Ok(GenerationDefaults {
        eos,
        bos: token("bos_token_id").and_then(|value| u32::try_from(value.as_u64()?).ok()),
        temperature: number("temperature", 0.0..=100.0)?,
        top_p: number("top_p", 0.0..=1.0)?,
        top_k,
        min_p: number("min_p", 0.0..=1.0)?,
        repetition_penalty: number("repetition_penalty", f32::MIN_POSITIVE..=100.0)?,
    })
}
