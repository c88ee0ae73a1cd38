//! Writes random models in the Hugging Face layout, and copies of them with one layer changed.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::model::{Family, Float, RandomModel, Scaling, Tensor};
use crate::tokenizer;

/// Writes `config.json`, safetensors (with an index if sharded), `generation_config.json` and, from a vocabulary of
/// 259 on, a byte-level `tokenizer.json` with `tokenizer_config.json`. `dir` is created if needed.
pub fn write_hf_model(dir: &Path, model: &RandomModel) {
    fs::create_dir_all(dir).unwrap();
    let write_json = |name: &str, value: &Value| fs::write(dir.join(name), value.to_string()).unwrap();
    write_json("config.json", &config(model));
    let tensors = model.tensors();
    if model.shards <= 1 {
        write_safetensors(&dir.join("model.safetensors"), &tensors, model.dtype);
    } else {
        let mut weight_map = Map::new();
        for (index, shard) in tensors.chunks(tensors.len().div_ceil(model.shards)).enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", index + 1, model.shards);
            write_safetensors(&dir.join(&name), shard, model.dtype);
            weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(name))));
        }
        write_json("model.safetensors.index.json", &json!({"metadata": {}, "weight_map": weight_map}));
    }
    if model.family == Family::Bert {
        let module = |idx: u32, path: &str, kind: &str| {
            json!({"idx": idx, "name": idx.to_string(), "path": path,
                   "type": format!("sentence_transformers.models.{kind}")})
        };
        let modules = [
            module(0, "", "Transformer"),
            module(1, "1_Pooling", "Pooling"),
            module(2, "2_Normalize", "Normalize"),
        ];
        write_json("modules.json", &json!(modules));
        fs::create_dir_all(dir.join("1_Pooling")).unwrap();
        write_json("1_Pooling/config.json", &json!({"pooling_mode_mean_tokens": true}));
    } else {
        write_json("generation_config.json", &json!({"eos_token_id": tokenizer::EOS_TOKEN}));
    }
    if let Some(tokenizer) = tokenizer::tokenizer_json(model) {
        write_json("tokenizer.json", &tokenizer);
        write_json("tokenizer_config.json", &tokenizer::tokenizer_config(model));
    }
}

fn config(model: &RandomModel) -> Value {
    let dtype = match model.dtype {
        Float::F32 => "float32",
        Float::F16 => "float16",
        Float::BF16 => "bfloat16",
    };
    let dtype_key = if model.new_config_keys { "dtype" } else { "torch_dtype" };
    if model.family == Family::Bert {
        return json!({
            "architectures": ["BertModel"], "model_type": "bert", "vocab_size": model.vocab,
            "hidden_size": model.hidden, "intermediate_size": model.intermediate,
            "num_hidden_layers": model.layers, "num_attention_heads": model.heads,
            "max_position_embeddings": model.context, "type_vocab_size": 2, "hidden_act": "gelu",
            "layer_norm_eps": 1e-12, "position_embedding_type": "absolute", dtype_key: dtype,
        });
    }
    let architecture = match model.family {
        Family::Llama => "LlamaForCausalLM",
        Family::Qwen2 => "Qwen2ForCausalLM",
        _ => "Qwen3ForCausalLM",
    };
    let scaling = match model.scaling {
        Scaling::Plain => json!({"rope_type": "default"}),
        Scaling::Linear(factor) => json!({"rope_type": "linear", "factor": factor}),
        Scaling::Llama3(factor) => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": model.context / 4,
        }),
    };
    let mut config = json!({
        "architectures": [architecture], "model_type": model.family.name(), "vocab_size": model.vocab,
        "hidden_size": model.hidden, "intermediate_size": model.intermediate, "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim,
        "max_position_embeddings": model.context, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": model.tied, "eos_token_id": tokenizer::EOS_TOKEN, dtype_key: dtype,
    });
    let object = config.as_object_mut().unwrap();
    if model.family != Family::Qwen2 {
        object.insert("attention_bias".into(), json!(model.bias));
    }
    if model.family == Family::Llama {
        object.insert("mlp_bias".into(), json!(model.bias));
    }
    if model.new_config_keys {
        let mut parameters = scaling;
        parameters["rope_theta"] = json!(10_000.0);
        object.insert("rope_parameters".into(), parameters);
    } else {
        object.insert("rope_theta".into(), json!(10_000.0));
        let plain = model.scaling == Scaling::Plain;
        object.insert("rope_scaling".into(), if plain { Value::Null } else { scaling });
    }
    config
}

fn write_safetensors(path: &Path, tensors: &[Tensor], dtype: Float) {
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut data = Vec::new();
    for tensor in tensors {
        let begin = data.len();
        data.extend(dtype.encode(&tensor.values));
        let entry =
            json!({"dtype": dtype.name(), "shape": tensor.shape, "data_offsets": [begin, data.len()]});
        header.insert(tensor.name.clone(), entry);
    }
    fs::write(path, container(&Value::Object(header), &data)).unwrap();
}

/// A safetensors file: header length, header padded to 8 bytes, data.
fn container(header: &Value, data: &[u8]) -> Vec<u8> {
    let mut header = header.to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    file
}

/// Copies a Hugging Face model from `source` to `target` and changes every tensor of layer `layer` on the way;
/// everything else stays the same to the byte. Panics if there is no such layer.
pub fn mutate_layer(source: &Path, target: &Path, layer: usize) {
    fs::create_dir_all(target).unwrap();
    let mut changed = 0;
    for entry in fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        let copy = target.join(path.file_name().unwrap());
        if path.is_dir() {
            fs::create_dir_all(&copy).unwrap();
            for file in fs::read_dir(&path).unwrap() {
                let file = file.unwrap().path();
                fs::copy(&file, copy.join(file.file_name().unwrap())).unwrap();
            }
        } else if path.extension().is_some_and(|extension| extension == "safetensors") {
            let mut bytes = fs::read(&path).unwrap();
            changed += mutate_safetensors(&mut bytes, layer);
            fs::write(&copy, bytes).unwrap();
        } else {
            fs::copy(&path, &copy).unwrap();
        }
    }
    assert!(changed > 0, "{} has no layer {layer}", source.display());
}

/// Changes every tensor of a layer in place; returns how many.
fn mutate_safetensors(file: &mut [u8], layer: usize) -> usize {
    let header_bytes = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&file[8..8 + header_bytes]).unwrap();
    let data = &mut file[8 + header_bytes..];
    let mut changed = 0;
    for (name, entry) in &header {
        if !name.contains(&format!("layers.{layer}.")) && !name.contains(&format!("layer.{layer}.")) {
            continue;
        }
        let dtype = match entry["dtype"].as_str().unwrap() {
            "F32" => Float::F32,
            "F16" => Float::F16,
            "BF16" => Float::BF16,
            other => panic!("{name} has type {other}"),
        };
        let offset = |index: usize| entry["data_offsets"][index].as_u64().unwrap() as usize;
        let bytes = &mut data[offset(0)..offset(1)];
        let values: Vec<f32> = dtype.decode(bytes).iter().map(|value| value * 0.875 + 0.015625).collect();
        bytes.copy_from_slice(&dtype.encode(&values));
        changed += 1;
    }
    changed
}
