//! Writes random LoRA adapters in PEFT's layout, and their bases with the adapter merged in: the reference for what an
//! adapter computes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use serde_json::{Map, Value, json};

use crate::hugging_face::write_safetensors;
use crate::model::{Float, Tensor};

/// Names of the matrices of attention and feed-forward blocks, in all families.
const MODULES: [&str; 19] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
    "query_key_value",
    "dense",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "c_attn",
    "c_proj",
    "c_fc",
    "fc1",
    "fc2",
];

/// What a random adapter looks like.
#[derive(Clone, Debug, PartialEq)]
pub struct RandomAdapter {
    /// Rank of every update.
    pub rank: usize,
    /// `lora_alpha`.
    pub alpha: f64,
    /// `use_rslora`.
    pub root_scale: bool,
    /// Last parts of the names of the adapted modules; `None` for all matrices of attention and of feed-forward blocks
    /// without experts.
    pub modules: Option<Vec<String>>,
    /// Element type of the file.
    pub dtype: Float,
    /// Where the random values come from.
    pub seed: u64,
}

impl RandomAdapter {
    /// Rank 4, alpha 8, all modules, f32.
    pub fn new(seed: u64) -> RandomAdapter {
        RandomAdapter { rank: 4, alpha: 8.0, root_scale: false, modules: None, dtype: Float::F32, seed }
    }

    fn adapts(&self, module: &str) -> bool {
        let last = module.rsplit('.').next().unwrap_or(module);
        let wanted = match &self.modules {
            Some(modules) => modules.iter().any(|name| name == last),
            None => MODULES.contains(&last),
        };
        wanted && !module.contains("experts")
    }
}

/// Writes a random adapter for the Hugging Face model in `base` (one safetensors file) to `dir`, which is created if
/// needed.
pub fn write_adapter(base: &Path, dir: &Path, adapter: &RandomAdapter) {
    let transposed = is_transposed(base);
    let tensors = read_safetensors(&base.join("model.safetensors"));
    let modules: Vec<(&str, usize, usize)> = tensors
        .iter()
        .filter_map(|(name, tensor)| {
            let module = name.strip_suffix(".weight").filter(|module| adapter.adapts(module))?;
            match (tensor.shape.as_slice(), transposed) {
                (&[outputs, inputs], false) | (&[inputs, outputs], true) => Some((module, outputs, inputs)),
                _ => None,
            }
        })
        .collect();
    write_adapter_of(&modules, dir, adapter);
}

/// Writes a random adapter for these modules (their names in the base, their outputs and inputs) to `dir`, which is
/// created if needed.
pub fn write_adapter_of(modules: &[(&str, usize, usize)], dir: &Path, adapter: &RandomAdapter) {
    fs::create_dir_all(dir).unwrap();
    let mut random = Xoshiro256PlusPlus::seed_from_u64(adapter.seed);
    let mut tensors = Vec::new();
    let mut targets: Vec<String> = Vec::new();
    for &(module, outputs, inputs) in modules {
        let mut factor = |name: &str, shape: [usize; 2], spread: f32| {
            let values = (0..shape[0] * shape[1]).map(|_| random.random_range(-spread..=spread)).collect();
            let name = format!("base_model.model.{module}.{name}.weight");
            tensors.push(Tensor { name, shape: shape.to_vec(), values });
        };
        factor("lora_A", [adapter.rank, inputs], (3.0 / inputs as f32).sqrt());
        factor("lora_B", [outputs, adapter.rank], 0.2);
        let last = module.rsplit('.').next().unwrap_or(module).to_owned();
        if !targets.contains(&last) {
            targets.push(last);
        }
    }
    assert!(!tensors.is_empty(), "there is no module to adapt");
    write_safetensors(&dir.join("adapter_model.safetensors"), &tensors, adapter.dtype);
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "bias": "none",
        "r": adapter.rank, "lora_alpha": adapter.alpha, "use_rslora": adapter.root_scale, "use_dora": false,
        "target_modules": targets, "modules_to_save": null, "rank_pattern": {}, "alpha_pattern": {},
        "fan_in_fan_out": false, "lora_dropout": 0.05, "inference_mode": true,
    });
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
}

/// Copies the model in `base` to `target` with the adapter in `dir` added to its matrices, computed in f64 and stored in
/// f32.
pub fn write_merged(base: &Path, dir: &Path, target: &Path) {
    fs::create_dir_all(target).unwrap();
    for entry in fs::read_dir(base).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, target.join(path.file_name().unwrap())).unwrap();
        }
    }
    let config: Value = serde_json::from_slice(&fs::read(dir.join("adapter_config.json")).unwrap()).unwrap();
    let rank = config["r"].as_u64().unwrap() as usize;
    let divisor = if config["use_rslora"] == true { (rank as f64).sqrt() } else { rank as f64 };
    let scale = config["lora_alpha"].as_f64().unwrap() / divisor;
    let transposed = is_transposed(base);
    let factors = read_safetensors(&dir.join("adapter_model.safetensors"));
    let mut tensors = read_safetensors(&base.join("model.safetensors"));
    for (name, a) in &factors {
        let Some(module) = name.strip_suffix(".lora_A.weight") else { continue };
        let b = &factors[&format!("{module}.lora_B.weight")];
        let module = module.strip_prefix("base_model.model.").unwrap();
        let weight = tensors.get_mut(&format!("{module}.weight")).unwrap();
        let (inputs, outputs) = (a.shape[1], b.shape[0]);
        for output in 0..outputs {
            for input in 0..inputs {
                let product = |j: usize| {
                    f64::from(b.values[output * rank + j]) * f64::from(a.values[j * inputs + input])
                };
                let at = if transposed { input * outputs + output } else { output * inputs + input };
                let update = scale * (0..rank).map(product).sum::<f64>();
                weight.values[at] = (f64::from(weight.values[at]) + update) as f32;
            }
        }
    }
    let tensors: Vec<Tensor> = tensors.into_values().collect();
    write_safetensors(&target.join("model.safetensors"), &tensors, Float::F32);
}

/// Whether the family stores its matrices as `[in_features, out_features]`.
fn is_transposed(base: &Path) -> bool {
    let config: Value = serde_json::from_slice(&fs::read(base.join("config.json")).unwrap()).unwrap();
    config["model_type"] == "gpt2"
}

fn read_safetensors(path: &Path) -> BTreeMap<String, Tensor> {
    let file = fs::read(path).unwrap();
    let header_bytes = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&file[8..8 + header_bytes]).unwrap();
    let data = &file[8 + header_bytes..];
    let tensor = |(name, entry): (String, Value)| {
        let dtype = match entry["dtype"].as_str().unwrap() {
            "F32" => Float::F32,
            "F16" => Float::F16,
            "BF16" => Float::BF16,
            other => panic!("{name} has type {other}"),
        };
        let numbers = |value: &Value| -> Vec<usize> {
            value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap() as usize).collect()
        };
        let place = numbers(&entry["data_offsets"]);
        let values = dtype.decode(&data[place[0]..place[1]]);
        (name.clone(), Tensor { name, shape: numbers(&entry["shape"]), values })
    };
    header.into_iter().filter(|(name, _)| name != "__metadata__").map(tensor).collect()
}
