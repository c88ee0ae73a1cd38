//! LoRA adapters from outside: what is refused, and that it is refused by name; damage never panics.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tangram_checkpoint::{
    AdapterSource, Base, CheckpointError, Manifest, Role, import, import_adapter, open,
};
use tangram_testkit::{Family, RandomAdapter, RandomModel, write_adapter, write_hf_model};

struct Setup {
    temp: tempfile::TempDir,
    base: Manifest,
}

impl Setup {
    fn new(family: Family) -> Setup {
        let temp = tempfile::tempdir().unwrap();
        let (source, dir) = (temp.path().join("hf"), temp.path().join("base"));
        write_hf_model(&source, &RandomModel::tiny(family));
        fs::create_dir(&dir).unwrap();
        let go_on = &mut |_| ControlFlow::Continue(());
        let base = import(&open(&source).unwrap(), &dir, "base", &|_| None, go_on).unwrap();
        Setup { temp, base }
    }

    fn adapter(&self) -> PathBuf {
        let dir = self.temp.path().join("peft");
        write_adapter(&self.temp.path().join("hf"), &dir, &RandomAdapter::new(1));
        dir
    }

    fn refusal(&self, dir: &Path) -> String {
        AdapterSource::open(dir, &self.base).unwrap_err().to_string()
    }
}

/// Header and data of the adapter's safetensors file.
fn read(dir: &Path) -> (Map<String, Value>, Vec<u8>) {
    let file = fs::read(dir.join("adapter_model.safetensors")).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    (serde_json::from_slice(&file[8..8 + length]).unwrap(), file[8 + length..].to_vec())
}

fn write(dir: &Path, header: &Map<String, Value>, data: &[u8]) {
    let header = serde_json::to_vec(header).unwrap();
    let file = [&(header.len() as u64).to_le_bytes()[..], &header, data].concat();
    fs::write(dir.join("adapter_model.safetensors"), file).unwrap();
}

/// Renames one tensor.
fn rename(dir: &Path, from: &str, to: &str) {
    let (header, data) = read(dir);
    let rename = |name: String| if name.contains(from) { name.replace(from, to) } else { name };
    write(dir, &header.into_iter().map(|(name, entry)| (rename(name), entry)).collect(), &data);
}

#[test]
fn an_imported_adapter_refers_to_its_base() {
    let setup = Setup::new(Family::Phi3);
    let source = AdapterSource::open(&setup.adapter(), &setup.base).unwrap();
    let dir = setup.temp.path().join("adapter");
    fs::create_dir(&dir).unwrap();
    let base = Base { name: "phi", manifest: &setup.base, dir: &setup.temp.path().join("base") };
    let go_on = &mut |_| ControlFlow::Continue(());
    let manifest = import_adapter(&source, base, &dir, "adapter", &|_| None, go_on).unwrap();
    let of_base = manifest.tensors.iter().filter(|tensor| !matches!(tensor.role, Role::LowRank(..)));
    assert!(of_base.clone().eq(&setup.base.tensors));
    assert!(of_base.clone().all(|tensor| tensor.checkpoint == "base"));
    // The A of a fused module lies in the file once, although three matrices use it.
    let stored = (read(&setup.temp.path().join("peft")).1.len() as u64).next_multiple_of(4096);
    assert!(manifest.data_bytes <= stored + 256 * 60, "{} for {stored}", manifest.data_bytes);
    assert!(dir.join("tokenizer.json").exists());
    assert_eq!(manifest.without_adapter().spec, setup.base.spec);
    let chained = AdapterSource::open(&setup.temp.path().join("peft"), &manifest).unwrap_err();
    assert!(chained.to_string().contains("adapter on an adapter"), "{chained}");
}

#[test]
fn tensors_that_cannot_be_used_are_refused_by_name() {
    let module = "layers.1.self_attn.q_proj";
    for (from, to, says) in [
        (format!("{module}.lora_A.weight"), format!("{module}.lora_magnitude_vector"), "DoRA"),
        (format!("{module}.lora_A.weight"), format!("{module}.lora_embedding_A"), "embeddings"),
        (format!("{module}.lora_A.weight"), format!("{module}.lora_A.bias"), "biases"),
        (format!("{module}.lora_A.weight"), format!("{module}.weight"), "leaving it out"),
        (format!("{module}.lora_A.weight"), format!("{module}.lora_C.weight"), "lora_C"),
        (format!("{module}.lora_A.weight"), "layers.1.x.q_proj.lora_A.weight".to_owned(), "only one of"),
        (
            "model.layers.1.self_attn.q_proj.".to_owned(),
            "model.layers.9.self_attn.q_proj.".to_owned(),
            "layer 9",
        ),
        (
            "model.layers.1.self_attn.q_proj.".to_owned(),
            "vision.layers.1.q_proj.".to_owned(),
            "vision.layers.1.q_proj",
        ),
    ] {
        let setup = Setup::new(Family::Llama);
        let dir = setup.adapter();
        rename(&dir, &from, &to);
        let message = setup.refusal(&dir);
        assert!(message.contains(says), "{to}: {message}");
    }
    let setup = Setup::new(Family::Llama);
    let dir = setup.adapter();
    for (name, value, says) in [
        ("r", json!(3), "rank 3"),
        ("target_modules", json!(["q_proj"]), "does not name"),
        ("use_dora", json!(true), "DoRA"),
        ("modules_to_save", json!(["embed_tokens"]), "embed_tokens"),
    ] {
        let path = dir.join("adapter_config.json");
        let before = fs::read(&path).unwrap();
        let mut config: Value = serde_json::from_slice(&before).unwrap();
        config[name] = value;
        fs::write(&path, config.to_string()).unwrap();
        let message = setup.refusal(&dir);
        assert!(message.contains(says), "{name}: {message}");
        fs::write(&path, before).unwrap();
    }
    let weights = dir.join("adapter_model.safetensors");
    fs::rename(&weights, dir.join("adapter_model.bin")).unwrap();
    assert!(setup.refusal(&dir).contains("pickle"));
    let bert = Setup::new(Family::Bert);
    assert!(bert.refusal(&dir).contains("embedding models"));
}

#[test]
fn adapters_on_experts_are_refused_and_on_their_attention_are_not() {
    for family in [Family::Mixtral, Family::Qwen3Moe] {
        let setup = Setup::new(family);
        let dir = setup.adapter();
        AdapterSource::open(&dir, &setup.base).unwrap();
        rename(&dir, "layers.1.self_attn.q_proj", "layers.1.mlp.experts.0.up_proj");
        let config = dir.join("adapter_config.json");
        let text = fs::read_to_string(&config).unwrap().replace("q_proj\"", "q_proj\",\"up_proj\"");
        fs::write(config, text).unwrap();
        let message = setup.refusal(&dir);
        assert!(message.contains("without experts"), "{message}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn damage_is_an_error_or_harmless(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), in_config: bool,
        cut in proptest::option::of(any::<prop::sample::Index>())
    ) {
        use std::sync::LazyLock;
        static SETUP: LazyLock<(Setup, PathBuf)> = LazyLock::new(|| {
            let setup = Setup::new(Family::GptNeox);
            let dir = setup.adapter();
            (setup, dir)
        });
        let (setup, original) = &*SETUP;
        let dir = tempfile::tempdir().unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            let mut bytes = fs::read(original.join(name)).unwrap();
            if in_config == name.ends_with("json") {
                // Of the weights only the header: any value is a sound weight.
                let length = bytes.len().min(6000);
                for (index, value) in &changes {
                    bytes[index.index(length)] = *value;
                }
                if let Some(cut) = &cut {
                    bytes.truncate(cut.index(bytes.len()));
                }
            }
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        if let Err(error) = AdapterSource::open(dir.path(), &setup.base) {
            prop_assert!(!matches!(error, CheckpointError::Cancelled));
            prop_assert!(error.to_string().contains("adapter_"), "{error}");
        }
    }
}
