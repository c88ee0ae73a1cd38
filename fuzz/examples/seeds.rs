//! Writes the seeds of the corpus, small checkpoints of many kinds: `cargo run --example seeds`, in this folder.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use tangram_checkpoint::{MANIFEST_FILE, import, import_in_place, open};
use tangram_codec::{Format, encode};
use tangram_testkit::{
    Family, Float, GgmlType, GgufOptions, RandomModel, write_gguf, write_hf_model, write_serverlessllm,
};

fn main() {
    let scratch = tempfile::tempdir().unwrap();
    let seed = |target: &str, name: &str, bytes: &[u8]| {
        let dir = Path::new("corpus").join(target);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(name), bytes).unwrap();
    };
    let small = |family| RandomModel {
        vocab: 16,
        hidden: 8,
        intermediate: 8,
        layers: 1,
        heads: 2,
        kv_heads: if matches!(family, Family::Gpt2 | Family::GptNeox | Family::Opt | Family::Bert) {
            2
        } else {
            1
        },
        head_dim: 4,
        context: 16,
        dtype: Float::BF16,
        ..RandomModel::tiny(family)
    };
    for family in [Family::Llama, Family::Qwen2, Family::Phi3, Family::Gpt2, Family::Mixtral, Family::Bert] {
        let name = family.name();
        let model =
            RandomModel { ..if family == Family::Llama { tangram_fuzz::model() } else { small(family) } };
        let dir = scratch.path().join(name);
        write_hf_model(&dir, &model);
        let file = fs::read(dir.join("model.safetensors")).unwrap();
        let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        seed("safetensors", &format!("{name}-header"), &file[8..8 + header]);
        if family == Family::Llama {
            seed("safetensors", &format!("{name}-file"), &file[..8 + header]);
        }
        let saved = scratch.path().join(format!("{name}-saved"));
        write_serverlessllm(&dir, &saved, 256);
        seed("serverlessllm", name, &fs::read(saved.join("tensor_index.json")).unwrap());
        for in_place in [false, true] {
            let target = scratch.path().join(format!("{name}-{in_place}"));
            fs::create_dir(&target).unwrap();
            let source = open(&dir).unwrap();
            let go_on = &mut |_| ControlFlow::Continue(());
            if in_place {
                import_in_place(&source, &target, "c", &|_| None, go_on).unwrap();
            } else {
                import(&source, &target, "c", &|_| None, go_on).unwrap();
            }
            let mut manifest = fs::read_to_string(target.join(MANIFEST_FILE)).unwrap();
            // Where the models lay is nobody's business.
            manifest = manifest.replace(scratch.path().to_str().unwrap(), "/models");
            seed(
                "manifest",
                &format!("{name}-{}", if in_place { "in-place" } else { "imported" }),
                manifest.as_bytes(),
            );
        }
    }
    for family in [Family::Llama, Family::Qwen3Moe, Family::Gemma2, Family::Gpt2, Family::Phi3] {
        for (version, dtype) in [(1, GgmlType::F32), (3, GgmlType::F16)] {
            let path = scratch.path().join("model.gguf");
            let model = RandomModel { vocab: if version == 3 { 260 } else { 16 }, ..small(family) };
            write_gguf(&path, &model, GgufOptions { version, dtype });
            let file = fs::read(&path).unwrap();
            let weights = open(&path).unwrap().weight_bytes() as usize;
            // The weights are at the end, and any will do.
            seed("gguf", &format!("{}-{version}", family.name()), &file[..file.len() - weights]);
        }
    }
    for (code, format) in Format::ALL.into_iter().enumerate() {
        // Few exponents, so that it compresses; some rare ones, so that there are escapes; not a whole round.
        let plain: Vec<u8> = (0u16..1900)
            .flat_map(|i| {
                let exponent = if i % 211 == 0 { i / 211 } else { 12 + (i % 7) / 3 };
                let low = i.wrapping_mul(40_503);
                let word = match format {
                    Format::Bf16 => (exponent << 7) | (low & 0x807f),
                    Format::F16 => (exponent << 10) | (low & 0x83ff),
                };
                word.to_le_bytes()
            })
            .collect();
        let with = |how: usize, bytes: &[u8]| [&[how as u8], bytes].concat();
        seed("codec", &format!("{format:?}-plain"), &with(code | 2, &plain));
        let frame = encode(format, &plain).unwrap();
        seed("codec", &format!("{format:?}-frame"), &with(code, &frame));
        // One block that is stored as it is, of four elements.
        let mut stored = vec![1, code as u8 + 1, 0, 0, 4, 0, 0, 0, 20, 0, 0, 0];
        stored.extend([0; 12]);
        stored.extend(1..=8);
        seed("codec", &format!("{format:?}-stored"), &with(code, &stored));
    }
}
