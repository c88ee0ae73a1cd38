//! Writes random models in the Hugging Face layout, and copies of them with one layer changed.

use std::fs;
use std::path::Path;

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use serde_json::{Map, Value, json};

use crate::model::{EXPERTS, Family, Float, RandomModel, Scaling, Tensor, WINDOW};
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

/// Writes a cross-encoder with one label, `BertForSequenceClassification` or (`roberta`)
/// `XLMRobertaForSequenceClassification`, of a model of [`Family::Bert`] whose `context` counts learned positions.
/// The score goes through the `activation` that the config names, if it names one.
pub fn write_cross_encoder(dir: &Path, model: &RandomModel, roberta: bool, activation: Option<&str>) {
    write_hf_model(dir, &RandomModel { shards: 1, ..model.clone() });
    fs::remove_file(dir.join("modules.json")).unwrap();
    let prefix = if roberta { "roberta" } else { "bert" };
    let mut tensors = model.tensors();
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(model.seed ^ 0xc1a55);
    for tensor in &mut tensors {
        tensor.name = format!("{prefix}.{}", tensor.name);
        if roberta && tensor.name.contains("token_type") {
            tensor.shape[0] = 1;
            tensor.values.truncate(model.hidden);
        }
    }
    let (pooler, classifier) = match roberta {
        true => ("classifier.dense", "classifier.out_proj"),
        false => ("bert.pooler.dense", "classifier"),
    };
    let mut add = |name: String, shape: &[usize]| {
        let spread = (3.0 / model.hidden as f32).sqrt();
        let values = (0..shape.iter().product()).map(|_| rng.random_range(-spread..=spread)).collect();
        tensors.push(Tensor { name, shape: shape.to_vec(), values });
    };
    for (name, rows) in [(pooler, model.hidden), (classifier, 1)] {
        add(format!("{name}.weight"), &[rows, model.hidden]);
        add(format!("{name}.bias"), &[rows]);
    }
    write_safetensors(&dir.join("model.safetensors"), &tensors, model.dtype);
    let mut config = config(model);
    config["id2label"] = json!({"0": "LABEL_0"});
    config["architectures"] = json!(["BertForSequenceClassification"]);
    if roberta {
        config["architectures"] = json!(["XLMRobertaForSequenceClassification"]);
        config["model_type"] = json!("xlm-roberta");
        config["type_vocab_size"] = json!(1);
        config["pad_token_id"] = json!(1);
    }
    if let Some(activation) = activation {
        config["sentence_transformers"] = json!({"activation_fn": activation});
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
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
    let mut config = match model.family {
        Family::Gpt2 => json!({
            "architectures": ["GPT2LMHeadModel"], "n_embd": model.hidden, "n_inner": model.intermediate,
            "n_layer": model.layers, "n_head": model.heads, "n_positions": model.context,
            "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
        }),
        Family::Opt => json!({
            "architectures": ["OPTForCausalLM"], "hidden_size": model.hidden, "ffn_dim": model.intermediate,
            "num_hidden_layers": model.layers, "num_attention_heads": model.heads,
            "max_position_embeddings": model.context, "activation_function": "relu",
            "do_layer_norm_before": true, "word_embed_proj_dim": model.hidden,
        }),
        _ => llama_like(model),
    };
    let object = config.as_object_mut().unwrap();
    for (key, value) in [
        ("model_type", json!(model.family.name())),
        ("vocab_size", json!(model.vocab)),
        ("tie_word_embeddings", json!(model.tied)),
        ("eos_token_id", json!(tokenizer::EOS_TOKEN)),
        (dtype_key, json!(dtype)),
    ] {
        object.insert(key.into(), value);
    }
    config
}

/// The keys of the families with rotary positions.
fn llama_like(model: &RandomModel) -> Value {
    let scaling = match model.scaling {
        Scaling::Plain => json!({"rope_type": "default"}),
        Scaling::Linear(factor) => json!({"rope_type": "linear", "factor": factor}),
        Scaling::Llama3(factor) => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": model.context / 4,
        }),
    };
    let mut config = json!({
        "hidden_size": model.hidden, "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers, "num_attention_heads": model.heads,
        "max_position_embeddings": model.context,
    });
    let own = match model.family {
        Family::GptNeox => json!({
            "architectures": ["GPTNeoXForCausalLM"], "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        }),
        _ => json!({
            "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim, "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
        }),
    };
    let family = match model.family {
        Family::Llama => json!({
            "architectures": ["LlamaForCausalLM"], "attention_bias": model.bias, "mlp_bias": model.bias,
        }),
        Family::Qwen2 => json!({"architectures": ["Qwen2ForCausalLM"]}),
        Family::Qwen3 => json!({"architectures": ["Qwen3ForCausalLM"], "attention_bias": model.bias}),
        Family::Mistral => json!({"architectures": ["MistralForCausalLM"], "sliding_window": WINDOW}),
        Family::Mixtral => json!({
            "architectures": ["MixtralForCausalLM"], "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
            "sliding_window": null,
        }),
        Family::Qwen3Moe => json!({
            "architectures": ["Qwen3MoeForCausalLM"], "num_experts": EXPERTS, "num_experts_per_tok": 2,
            "moe_intermediate_size": model.intermediate / 2, "norm_topk_prob": true,
        }),
        Family::Gemma2 => json!({
            "architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": model.head_dim, "sliding_window": WINDOW,
            "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        }),
        Family::Gemma3 => json!({
            "architectures": ["Gemma3ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": model.head_dim, "sliding_window": WINDOW, "sliding_window_pattern": 6,
        }),
        Family::Phi3 => json!({"architectures": ["Phi3ForCausalLM"], "sliding_window": null}),
        _ => json!({}),
    };
    let object = config.as_object_mut().unwrap();
    for keys in [own, family] {
        object.extend(keys.as_object().unwrap().clone());
    }
    let theta = if model.family == Family::Gemma3 { 1_000_000.0 } else { 10_000.0 };
    if model.new_config_keys {
        let mut parameters = scaling;
        parameters["rope_theta"] = json!(theta);
        if model.family == Family::Gemma3 {
            let local = json!({"rope_type": "default", "rope_theta": 10_000.0});
            parameters = json!({"full_attention": parameters, "sliding_attention": local});
        } else if model.family == Family::GptNeox {
            parameters["partial_rotary_factor"] = json!(0.25);
        }
        object.insert("rope_parameters".into(), parameters);
    } else {
        let key = if model.family == Family::GptNeox { "rotary_emb_base" } else { "rope_theta" };
        object.insert(key.into(), json!(theta));
        let plain = model.scaling == Scaling::Plain;
        object.insert("rope_scaling".into(), if plain { Value::Null } else { scaling });
    }
    config
}

pub(crate) fn write_safetensors(path: &Path, tensors: &[Tensor], dtype: Float) {
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
pub(crate) fn container(header: &Value, data: &[u8]) -> Vec<u8> {
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
        if !["layers", "layer", "h"].iter().any(|list| name.contains(&format!("{list}.{layer}."))) {
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
