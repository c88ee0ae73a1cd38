//! Imports quantised Hugging Face checkpoints and compares the stored values with what the formats say, in f64.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tangram_checkpoint::{CheckpointError, DType, ExpertRole, LayerRole, Role, Source, SourceTensor, open};
use tangram_testkit::{EXPERTS, Family, Float, Quantised, RandomModel, write_quantised_model};

fn model(family: Family) -> RandomModel {
    // Widths that are no multiple of a block of 48, and no power of two.
    RandomModel { intermediate: 160, dtype: Float::BF16, ..RandomModel::tiny(family) }
}

fn half(bytes: &[u8]) -> f64 {
    let bits = u16::from_le_bytes([bytes[0], bytes[1]]);
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023) / 1024.0);
    assert_ne!(exponent, 31, "no number");
    let size =
        if exponent == 0 { fraction * 2f64.powi(-14) } else { (1.0 + fraction) * 2f64.powi(exponent - 15) };
    if bits >> 15 == 1 { -size } else { size }
}

/// Stored values by the definition of their type.
fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let nibbles = |bytes: &[u8]| {
        let low = bytes.iter().map(|byte| byte & 15);
        low.chain(bytes.iter().map(|byte| byte >> 4)).map(f64::from).collect::<Vec<f64>>()
    };
    match dtype {
        DType::BF16 => bytes
            .chunks(2)
            .map(|pair| f64::from(f32::from_bits(u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16)))
            .collect(),
        DType::F16 => bytes.chunks(2).map(half).collect(),
        DType::Q4_0 => bytes
            .chunks(18)
            .flat_map(|block| nibbles(&block[2..]).into_iter().map(|q| half(block) * (q - 8.0)))
            .collect(),
        DType::Q5_0 => bytes
            .chunks(22)
            .flat_map(|block| {
                let fifth = u32::from_le_bytes(block[2..6].try_into().unwrap());
                let value = move |(at, q): (usize, f64)| q + f64::from(fifth >> at & 1) * 16.0 - 16.0;
                nibbles(&block[6..]).into_iter().enumerate().map(value).map(|q| half(block) * q)
            })
            .collect(),
        other => panic!("{other}"),
    }
}

fn tensor(source: &Source, role: Role) -> &SourceTensor {
    source.tensors().iter().find(|tensor| tensor.role == role).unwrap()
}

fn stored(source: &Source, role: Role) -> (DType, Vec<f64>) {
    let tensor = tensor(source, role);
    let mut bytes = vec![0; tensor.bytes as usize];
    source.read_at(tensor, 0, &mut bytes).unwrap();
    // However it is cut.
    let mut piece = vec![0; 1 + bytes.len() / 3];
    for start in [0, 1, bytes.len() / 2 + 1] {
        source.read_at(tensor, start as u64, &mut piece).unwrap();
        assert_eq!(piece, bytes[start..start + piece.len()], "{role:?} from {start}");
    }
    (tensor.dtype, decode(tensor.dtype, &bytes))
}

/// The matrices of a llama-like layer by their names.
fn roles() -> [(&'static str, LayerRole); 7] {
    [
        ("self_attn.q_proj", LayerRole::Query),
        ("self_attn.k_proj", LayerRole::Key),
        ("self_attn.v_proj", LayerRole::Value),
        ("self_attn.o_proj", LayerRole::AttnOut),
        ("mlp.gate_proj", LayerRole::Gate),
        ("mlp.up_proj", LayerRole::Up),
        ("mlp.down_proj", LayerRole::Down),
    ]
}

fn write(dir: &Path, family: Family, how: Quantised) -> (Source, BTreeMap<String, Vec<f64>>) {
    let values = write_quantised_model(dir, &model(family), how);
    (open(dir).unwrap(), values)
}

/// No rounding.
const EXACT: i32 = 1000;

/// Compares all matrices of a llama, whose values may be rounded to the nearest of so many significant bits.
fn compare(how: Quantised, dtype: DType, bits: i32) {
    let temp = tempfile::tempdir().unwrap();
    let (source, values) = write(temp.path(), Family::Llama, how);
    for layer in 0..3 {
        for (name, role) in roles() {
            let expected = &values[&format!("model.layers.{layer}.{name}.weight")];
            let (found_type, found) = stored(&source, Role::Layer(layer, role));
            assert_eq!((found_type, found.len()), (dtype, expected.len()));
            for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
                let error = (found - expected).abs();
                let half_unit = if *expected == 0.0 {
                    0.0
                } else {
                    2f64.powi(expected.abs().log2().floor() as i32 - bits)
                };
                assert!(error <= half_unit, "{how:?} {name} {at}: {found} instead of {expected}");
            }
        }
    }
    let warning = source.warnings().iter().find(|warning| warning.contains("21 matrices")).unwrap();
    assert!(warning.contains(dtype.name()), "{warning}");
    let embedding = tensor(&source, Role::TokenEmbedding);
    assert_eq!(embedding.dtype, DType::BF16);
}

const GPTQ: Quantised = Quantised::Gptq { group: 32, act_order: false, symmetric: true, less: 1 };

#[test]
fn symmetric_gptq_becomes_q4_0_without_loss() {
    compare(GPTQ, DType::Q4_0, EXACT);
    // The second version of the format, and such zero points under the first one's name.
    compare(Quantised::Gptq { group: 32, act_order: false, symmetric: true, less: 0 }, DType::Q4_0, EXACT);
    // A group for a whole input, and one that ends early.
    compare(Quantised::Gptq { group: 64, act_order: false, symmetric: true, less: 1 }, DType::Q4_0, EXACT);
    let temp = tempfile::tempdir().unwrap();
    write(
        temp.path(),
        Family::Llama,
        Quantised::Gptq { group: 32, act_order: false, symmetric: true, less: 0 },
    );
    change_settings(temp.path(), json!({"checkpoint_format": "gptq"}));
    stored(&open(temp.path()).unwrap(), Role::Layer(0, LayerRole::Up));
}

#[test]
fn asymmetric_groups_become_q5_0_without_loss() {
    for less in [0, 1] {
        compare(Quantised::Gptq { group: 32, act_order: false, symmetric: false, less }, DType::Q5_0, EXACT);
    }
    compare(Quantised::Awq { group: 32 }, DType::Q5_0, EXACT);
    compare(Quantised::Awq { group: 64 }, DType::Q5_0, EXACT);
}

#[test]
fn groups_out_of_order_become_f16() {
    for symmetric in [true, false] {
        compare(Quantised::Gptq { group: 32, act_order: true, symmetric, less: 1 }, DType::F16, 11);
    }
    // Groups that are no whole blocks.
    compare(Quantised::Gptq { group: 16, act_order: false, symmetric: true, less: 1 }, DType::F16, 11);
    compare(Quantised::Awq { group: 16 }, DType::F16, 11);
}

#[test]
fn fp8_becomes_bf16() {
    for block in [[128, 128], [48, 32], [16, 48]] {
        compare(Quantised::Fp8Block(block), DType::BF16, 8);
    }
    compare(Quantised::Fp8Channel, DType::BF16, 8);
    compare(Quantised::Fp8Tensor, DType::BF16, 8);
    let temp = tempfile::tempdir().unwrap();
    let (source, _) = write(temp.path(), Family::Llama, Quantised::Fp8Tensor);
    assert!(source.warnings().iter().any(|warning| warning.contains("scales of activations")));
}

#[test]
fn parts_of_a_matrix_may_lie_in_different_files() {
    let temp = tempfile::tempdir().unwrap();
    let sharded = RandomModel { shards: 4, ..model(Family::Llama) };
    let values = write_quantised_model(temp.path(), &sharded, GPTQ);
    let source = open(temp.path()).unwrap();
    let (_, found) = stored(&source, Role::Layer(1, LayerRole::Down));
    assert_eq!(found, values["model.layers.1.mlp.down_proj.weight"]);
}

#[test]
fn fused_matrices_and_experts_are_quantised_too() {
    let temp = tempfile::tempdir().unwrap();
    let awq = Quantised::Awq { group: 32 };
    let (source, values) = write(&temp.path().join("phi3"), Family::Phi3, awq);
    let whole = &values["model.layers.2.self_attn.qkv_proj.weight"];
    let parts = [LayerRole::Query, LayerRole::Key, LayerRole::Value]
        .map(|role| stored(&source, Role::Layer(2, role)).1);
    assert_eq!(&parts.concat(), whole);
    let parts = [LayerRole::Gate, LayerRole::Up].map(|role| stored(&source, Role::Layer(2, role)).1);
    assert_eq!(parts.concat(), values["model.layers.2.mlp.gate_up_proj.weight"]);

    let (source, values) = write(&temp.path().join("mixtral"), Family::Mixtral, awq);
    for expert in 0..EXPERTS as u32 {
        let role = LayerRole::Expert(expert, ExpertRole::Down);
        let (_, found) = stored(&source, Role::Layer(1, role));
        assert_eq!(found, values[&format!("model.layers.1.block_sparse_moe.experts.{expert}.w2.weight")]);
    }
    assert_eq!(tensor(&source, Role::Layer(1, LayerRole::Router)).dtype, DType::BF16);

    // Query, key and value of a head beside each other.
    let (source, values) = write(&temp.path().join("neox"), Family::GptNeox, awq);
    let whole = &values["gpt_neox.layers.0.attention.query_key_value.weight"];
    let (_, keys) = stored(&source, Role::Layer(0, LayerRole::Key));
    let (head, row) = (16, 64);
    for (at, value) in keys.iter().enumerate() {
        let (of_head, within) = (at / row / head, at / row % head);
        assert_eq!(*value, whole[((of_head * 3 + 1) * head + within) * row + at % row]);
    }
}

fn change_settings(dir: &Path, changes: Value) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        config["quantization_config"][key] = value.clone();
    }
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn other_variants_are_refused_by_name() {
    let temp = tempfile::tempdir().unwrap();
    let float = |weights: Value| json!({"config_groups": {"group_0": {"weights": weights}}});
    for (how, changes, word) in [
        (GPTQ, json!({"bits": 8}), "8 bits"),
        (GPTQ, json!({"bits": 3}), "3 bits"),
        (GPTQ, json!({"checkpoint_format": "marlin"}), "marlin"),
        (GPTQ, json!({"is_marlin_format": true}), "is_marlin_format"),
        (GPTQ, json!({"dynamic": {"+:.*down.*": {"bits": 8}}}), "down"),
        (GPTQ, json!({"pack_dtype": "int16"}), "int16"),
        (GPTQ, json!({"quant_method": "bitsandbytes"}), "bitsandbytes"),
        (Quantised::Awq { group: 32 }, json!({"version": "gemv"}), "gemv"),
        (Quantised::Awq { group: 32 }, json!({"zero_point": false}), "zero_point"),
        (Quantised::Awq { group: 32 }, json!({"bits": 8}), "8 bits"),
        (Quantised::Fp8Tensor, json!({"fmt": "e5m2"}), "e5m2"),
        (Quantised::Fp8Channel, json!({"format": "pack-quantized"}), "pack-quantized"),
        (Quantised::Fp8Channel, json!({"format": "int-quantized"}), "int-quantized"),
        (Quantised::Fp8Channel, float(json!({"num_bits": 8, "type": "int"})), "int"),
        (Quantised::Fp8Channel, float(json!({"num_bits": 4, "type": "float"})), "4 bits"),
        (Quantised::Fp8Channel, float(json!({"type": "float", "strategy": "group"})), "group"),
        // What the parts themselves contradict.
        (GPTQ, json!({"group_size": 64}), "groups of 64"),
        (Quantised::Awq { group: 32 }, json!({"quant_method": "gptq", "sym": false}), "scales"),
    ] {
        write(temp.path(), Family::Llama, how);
        change_settings(temp.path(), changes);
        match open(temp.path()) {
            Err(CheckpointError::Unsupported { message, .. } | CheckpointError::Invalid { message, .. }) => {
                assert!(message.contains(word), "{word}: {message}");
            }
            Err(other) => panic!("{word}: {other}"),
            Ok(_) => panic!("{word}: opened"),
        }
    }
    // An order of inputs that is promised and not there.
    let ordered = Quantised::Gptq { group: 32, act_order: true, symmetric: true, less: 1 };
    write(temp.path(), Family::Llama, ordered);
    let path = temp.path().join("model.safetensors");
    let mut file = fs::read(&path).unwrap();
    let places: Vec<usize> = (0..file.len() - 6).filter(|&at| &file[at..at + 6] == b".g_idx").collect();
    assert_eq!(places.len(), 21);
    places.iter().for_each(|&at| file[at + 1] = b'h');
    fs::write(&path, file).unwrap();
    let error = open(temp.path()).unwrap_err().to_string();
    assert!(error.contains("there is no model.layers.0.mlp.down_proj.g_idx"), "{error}");
    // Without settings the parts mean nothing.
    write(temp.path(), Family::Llama, GPTQ);
    let path = temp.path().join("config.json");
    let config = fs::read_to_string(&path).unwrap().replace("quantization_config", "other_config");
    fs::write(path, config).unwrap();
    assert!(open(temp.path()).unwrap_err().to_string().contains("is not part of a llama model"));
}

#[test]
fn zero_points_that_contradict_the_settings_are_found() {
    let temp = tempfile::tempdir().unwrap();
    write(
        temp.path(),
        Family::Llama,
        Quantised::Gptq { group: 32, act_order: false, symmetric: false, less: 1 },
    );
    change_settings(temp.path(), json!({"sym": true}));
    let source = open(temp.path()).unwrap();
    let tensor = tensor(&source, Role::Layer(0, LayerRole::Up));
    let error = source.read_at(tensor, 0, &mut vec![0; tensor.bytes as usize]).unwrap_err();
    assert!(error.to_string().contains("zero point"), "{error}");
}
