//! Writes random models in the Hugging Face layout with quantised matrices, and says what their values are.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use half::{bf16, f16};
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use serde_json::{Map, Value, json};

use crate::hugging_face::{container, write_hf_model};
use crate::model::{Float, RandomModel, Tensor};

/// How the matrices of the layers are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Quantised {
    /// `quant_method` "fp8" with one scale for each block of these rows and columns (`weight_scale_inv`).
    Fp8Block([usize; 2]),
    /// `quant_method` "fp8" with one scale for each matrix (`weight_scale`) and one for activations.
    Fp8Tensor,
    /// `quant_method` "compressed-tensors" with one bf16 scale for each output.
    Fp8Channel,
    /// `quant_method` "gptq".
    Gptq {
        /// Inputs of a group.
        group: usize,
        /// Whether inputs are spread over the groups at random.
        act_order: bool,
        /// Whether every zero point is 8.
        symmetric: bool,
        /// How much less than the zero point is stored: 1 in the first version of the format.
        less: u8,
    },
    /// `quant_method` "awq", version "gemm".
    Awq {
        /// Inputs of a group.
        group: usize,
    },
}

/// A tensor as it is written.
struct Raw {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// Writes `model` as [`write_hf_model`] does, but with all matrices of its layers quantised at random (their values
/// in `model` are not used). Gives the values of those matrices, row by row, by the names that they would have.
pub fn write_quantised_model(dir: &Path, model: &RandomModel, how: Quantised) -> BTreeMap<String, Vec<f64>> {
    write_hf_model(dir, &RandomModel { shards: 1, ..model.clone() });
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(model.seed ^ 0x5eed);
    let mut values = BTreeMap::new();
    let mut raw = Vec::new();
    for tensor in model.tensors() {
        let router = tensor.name.ends_with(".gate.weight");
        match tensor.shape.as_slice() {
            &[rows, columns] if tensor.name.contains("layers.") && !router => {
                let module = tensor.name.strip_suffix(".weight").unwrap();
                values.insert(tensor.name.clone(), quantise(&mut rng, &mut raw, module, rows, columns, how));
            }
            _ => raw.push(plain(&tensor, model.dtype)),
        }
    }
    // In an order in which parts of a matrix do not lie beside each other.
    raw.shuffle(&mut rng);
    write_raw(dir, &raw, model.shards);
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["quantization_config"] = settings(how);
    fs::write(path, config.to_string()).unwrap();
    values
}

fn settings(how: Quantised) -> Value {
    match how {
        Quantised::Fp8Block(block) => json!({
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block,
            "modules_to_not_convert": ["lm_head"],
        }),
        Quantised::Fp8Tensor => json!({"quant_method": "fp8", "activation_scheme": "static"}),
        Quantised::Fp8Channel => json!({
            "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
            "config_groups": {"group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true},
            }},
        }),
        Quantised::Gptq { group, act_order, symmetric, less } => json!({
            "quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": act_order, "sym": symmetric,
            "checkpoint_format": if less == 1 { "gptq" } else { "gptq_v2" },
        }),
        Quantised::Awq { group } => json!({
            "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": true, "version": "gemm",
        }),
    }
}

fn plain(tensor: &Tensor, dtype: Float) -> Raw {
    let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
    Raw { name, dtype: dtype.name(), shape, bytes: dtype.encode(&tensor.values) }
}

/// Draws a matrix, adds its parts, gives its values.
fn quantise(
    rng: &mut Xoshiro256PlusPlus,
    raw: &mut Vec<Raw>,
    module: &str,
    rows: usize,
    columns: usize,
    how: Quantised,
) -> Vec<f64> {
    let spread = (3.0 / columns as f32).sqrt();
    let mut add = |suffix: &str, dtype, shape: &[usize], bytes: Vec<u8>| {
        raw.push(Raw { name: format!("{module}.{suffix}"), dtype, shape: shape.to_vec(), bytes });
    };
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    match how {
        Quantised::Fp8Block(_) | Quantised::Fp8Tensor | Quantised::Fp8Channel => {
            let mut codes: Vec<u8> = (0..rows * columns).map(|_| rng.random_range(0..=255u8)).collect();
            // Not the two that stand for no number.
            codes.iter_mut().filter(|code| **code & 127 == 127).for_each(|code| *code -= 1);
            let ([high, wide], [down, across]) = match how {
                Quantised::Fp8Block([high, wide]) => {
                    ([high, wide], [rows.div_ceil(high), columns.div_ceil(wide)])
                }
                Quantised::Fp8Channel => ([1, columns], [rows, 1]),
                _ => ([rows, columns], [1, 1]),
            };
            let mut scales: Vec<f32> =
                (0..down * across).map(|_| rng.random_range(0.2..1.0) * spread / 448.0).collect();
            add("weight", "F8_E4M3", &[rows, columns], codes.clone());
            match how {
                Quantised::Fp8Block(_) => {
                    add("weight_scale_inv", "F32", &[down, across], Float::F32.encode(&scales))
                }
                Quantised::Fp8Channel => {
                    scales.iter_mut().for_each(|scale| *scale = bf16::from_f32(*scale).to_f32());
                    add("weight_scale", "BF16", &[rows, 1], Float::BF16.encode(&scales));
                }
                _ => {
                    add("weight_scale", "F32", &[], Float::F32.encode(&scales));
                    add("input_scale", "F32", &[], Float::F32.encode(&[0.5]));
                }
            }
            let scale = |at: usize| f64::from(scales[at / columns / high * across + at % columns / wide]);
            codes.iter().enumerate().map(|(at, &code)| e4m3(code) * scale(at)).collect()
        }
        Quantised::Gptq { group, act_order, symmetric, less } => {
            let quantised = FourBits::random(rng, rows, columns, group, symmetric);
            let groups = columns.div_ceil(group);
            let mut order: Vec<u32> = (0..columns).map(|input| (input / group) as u32).collect();
            if act_order {
                order.shuffle(rng);
            }
            let mut values = vec![0u32; columns / 8 * rows];
            for (at, &code) in quantised.codes.iter().enumerate() {
                let (row, column) = (at / columns, at % columns);
                values[column / 8 * rows + row] |= u32::from(code) << (4 * (column % 8));
            }
            let mut zeros = vec![0u32; groups * rows / 8];
            for (at, &zero) in quantised.zeros.iter().enumerate() {
                zeros[at / 8] |= u32::from(zero.wrapping_sub(less) & 15) << (4 * (at % 8));
            }
            add("qweight", "I32", &[columns / 8, rows], words(&values));
            add("qzeros", "I32", &[groups, rows / 8], words(&zeros));
            add("scales", "F16", &[groups, rows], Float::F16.encode(&quantised.scales));
            add("g_idx", "I32", &[columns], words(&order));
            quantised.values(rows, columns, |column| order[column] as usize)
        }
        Quantised::Awq { group } => {
            const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
            let quantised = FourBits::random(rng, rows, columns, group, false);
            let groups = columns.div_ceil(group);
            let place = |output: usize| 4 * ORDER.iter().position(|&of| of == output % 8).unwrap();
            let mut values = vec![0u32; columns * rows / 8];
            for (at, &code) in quantised.codes.iter().enumerate() {
                let (row, column) = (at / columns, at % columns);
                values[column * (rows / 8) + row / 8] |= u32::from(code) << place(row);
            }
            let mut zeros = vec![0u32; groups * rows / 8];
            for (at, &zero) in quantised.zeros.iter().enumerate() {
                zeros[at / 8] |= u32::from(zero) << place(at % rows);
            }
            add("qweight", "I32", &[columns, rows / 8], words(&values));
            add("qzeros", "I32", &[groups, rows / 8], words(&zeros));
            add("scales", "F16", &[groups, rows], Float::F16.encode(&quantised.scales));
            quantised.values(rows, columns, |column| column / group)
        }
    }
}

/// A matrix of 4-bit values.
struct FourBits {
    /// Row by row.
    codes: Vec<u8>,
    /// Group by group, a zero point and a scale for each row.
    zeros: Vec<u8>,
    scales: Vec<f32>,
}

impl FourBits {
    fn random(
        rng: &mut Xoshiro256PlusPlus,
        rows: usize,
        columns: usize,
        group: usize,
        symmetric: bool,
    ) -> FourBits {
        let spread = (3.0 / columns as f32).sqrt();
        let count = columns.div_ceil(group) * rows;
        let scale =
            |rng: &mut Xoshiro256PlusPlus| f16::from_f32(rng.random_range(0.05..0.15) * spread).to_f32();
        FourBits {
            codes: (0..rows * columns).map(|_| rng.random_range(0..16)).collect(),
            zeros: (0..count).map(|_| if symmetric { 8 } else { rng.random_range(0..16) }).collect(),
            scales: (0..count).map(|_| scale(rng)).collect(),
        }
    }

    fn values(&self, rows: usize, columns: usize, group_of: impl Fn(usize) -> usize) -> Vec<f64> {
        let value = |at: usize| {
            let place = group_of(at % columns) * rows + at / columns;
            f64::from(self.scales[place]) * (f64::from(self.codes[at]) - f64::from(self.zeros[place]))
        };
        (0..rows * columns).map(value).collect()
    }
}

/// An e4m3 number by its definition.
fn e4m3(code: u8) -> f64 {
    let exponent = i32::from(code >> 3 & 15);
    let fraction = f64::from(code & 7) / 8.0;
    let size =
        if exponent == 0 { fraction * 2f64.powi(-6) } else { (1.0 + fraction) * 2f64.powi(exponent - 7) };
    size * if code >= 128 { -1.0 } else { 1.0 }
}

/// Writes the tensors into `shards` files.
fn write_raw(dir: &Path, tensors: &[Raw], shards: usize) {
    let write = |path: &Path, tensors: &[Raw]| {
        let (mut header, mut data) = (Map::new(), Vec::new());
        for tensor in tensors {
            let begin = data.len();
            data.extend(&tensor.bytes);
            let entry =
                json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, data.len()]});
            header.insert(tensor.name.clone(), entry);
        }
        fs::write(path, container(&Value::Object(header), &data)).unwrap();
    };
    if shards <= 1 {
        return write(&dir.join("model.safetensors"), tensors);
    }
    fs::remove_file(dir.join("model.safetensors")).unwrap();
    let mut weight_map = Map::new();
    for (index, shard) in tensors.chunks(tensors.len().div_ceil(shards)).enumerate() {
        let name = format!("model-{:05}-of-{shards:05}.safetensors", index + 1);
        write(&dir.join(&name), shard);
        weight_map.extend(shard.iter().map(|tensor| (tensor.name.clone(), json!(name))));
    }
    let index = json!({"metadata": {}, "weight_map": weight_map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}
