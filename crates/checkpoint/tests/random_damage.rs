//! Random damage to sound checkpoints: opening and importing them gives a model or an error, never a panic, and never
//! takes memory by the numbers in a file. The whole test process runs under a limit on its address space, so a large
//! allocation would abort it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use tangram_checkpoint::{MANIFEST_FILE, import, open, read_manifest};
use tangram_testkit::{Family, GgmlType, GgufOptions, RandomModel, write_gguf, write_hf_model};

/// Address space of this process in bytes.
const MEMORY: u64 = 1 << 30;

/// Families that differ in how their tensors are stored.
const FAMILIES: [Family; 6] =
    [Family::Llama, Family::Qwen3Moe, Family::Gemma3, Family::Phi3, Family::Gpt2, Family::GptNeox];

fn small(family: Family) -> RandomModel {
    RandomModel {
        hidden: 32,
        intermediate: 64,
        layers: 1,
        heads: 2,
        kv_heads: if family.ungrouped() { 2 } else { 1 },
        vocab: 259,
        new_config_keys: family == Family::Gemma3,
        ..RandomModel::tiny(family)
    }
}

/// The files of a Hugging Face directory, and GGUF files of versions 1 and 3.
struct Sound {
    directory: tempfile::TempDir,
    safetensors: Vec<u8>,
    config: Value,
    manifest: Vec<u8>,
    gguf: [Vec<u8>; 2],
}

static SOUND: LazyLock<[Sound; FAMILIES.len()]> = LazyLock::new(|| {
    let limit = Rlimit { current: Some(MEMORY), maximum: getrlimit(Resource::As).maximum };
    setrlimit(Resource::As, limit).unwrap();
    FAMILIES.map(sound)
});

fn sound(family: Family) -> Sound {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    write_hf_model(path, &small(family));
    let imported = path.join("imported");
    fs::create_dir(&imported).unwrap();
    import(&open(path).unwrap(), &imported, "sound", &|_| None, &mut |_| ControlFlow::Continue(())).unwrap();
    let gguf = [(1, GgmlType::F32), (3, GgmlType::Q4_1)].map(|(version, dtype)| {
        let file = path.join("sound.gguf");
        write_gguf(&file, &small(family), GgufOptions { version, dtype });
        fs::read(file).unwrap()
    });
    Sound {
        safetensors: fs::read(path.join("model.safetensors")).unwrap(),
        config: serde_json::from_slice(&fs::read(path.join("config.json")).unwrap()).unwrap(),
        manifest: fs::read(imported.join(MANIFEST_FILE)).unwrap(),
        gguf,
        directory,
    }
}

/// Opens and, if that works, imports; the result is of no interest.
fn exercise(path: &Path) {
    if let Ok(source) = open(path) {
        let target = tempfile::tempdir().unwrap();
        if import(&source, target.path(), "damaged", &|_| None, &mut |_| ControlFlow::Continue(())).is_ok() {
            read_manifest(target.path()).unwrap();
        }
    }
}

/// A change of some bytes at a place given as a fraction of the header.
#[derive(Clone, Debug)]
struct Damage {
    place: f64,
    bytes: Vec<u8>,
}

fn damage() -> impl Strategy<Value = Damage> {
    let bytes = prop_oneof![
        prop::collection::vec(any::<u8>(), 1..4),
        Just(vec![0xff; 8]),
        Just(vec![0; 8]),
        Just((1u64 << 63).to_le_bytes().to_vec()),
        (0u32..40).prop_map(|shift| (1u64 << shift).to_le_bytes().to_vec()),
        prop::sample::select(vec!["9", "-", "\"", "}", "1e9", "99999999999999999999", "null", "[["])
            .prop_map(|text| text.as_bytes().to_vec()),
    ];
    (0.0..1.0, bytes).prop_map(|(place, bytes)| Damage { place, bytes })
}

/// Applies damages to the first `header` bytes and cuts the file.
fn damaged(sound: &[u8], header: usize, damages: &[Damage], cut: Option<f64>) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    for Damage { place, bytes: patch } in damages {
        let at = (place * header as f64) as usize;
        let end = (at + patch.len()).min(bytes.len());
        bytes[at..end].copy_from_slice(&patch[..end - at]);
    }
    if let Some(cut) = cut {
        bytes.truncate((cut * bytes.len() as f64) as usize);
    }
    bytes
}

fn value() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        json!(null),
        json!(true),
        json!(0),
        json!(1),
        json!(-1),
        json!(7),
        json!(1u64 << 31),
        json!(u64::MAX),
        json!(1e300),
        json!(0.5),
        json!(""),
        json!("silu"),
        json!([]),
        json!({}),
        json!({"rope_type": "linear", "factor": 0}),
    ])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn safetensors(sound in 0..FAMILIES.len(), damages in prop::collection::vec(damage(), 0..4), cut in prop::option::of(0.0..1.0f64)) {
        let sound = &SOUND[sound];
        let header = 8 + u64::from_le_bytes(sound.safetensors[..8].try_into().unwrap()) as usize;
        let dir = tempfile::tempdir().unwrap();
        fs::copy(sound.directory.path().join("config.json"), dir.path().join("config.json")).unwrap();
        fs::write(dir.path().join("model.safetensors"), damaged(&sound.safetensors, header, &damages, cut)).unwrap();
        exercise(dir.path());
    }

    #[test]
    fn gguf(
        sound in 0..FAMILIES.len(),
        version in 0usize..2,
        damages in prop::collection::vec(damage(), 0..4),
        cut in prop::option::of(0.0..1.0f64),
    ) {
        let sound = &SOUND[sound].gguf[version];
        let table = sound.windows(11).rposition(|name| name == b"output_norm" || name == b"output.weig").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.gguf");
        fs::write(&file, damaged(sound, table + 64, &damages, cut)).unwrap();
        exercise(&file);
    }

    #[test]
    fn config(sound in 0..FAMILIES.len(), changes in prop::collection::vec((any::<prop::sample::Index>(), value()), 1..4)) {
        let dir = tempfile::tempdir().unwrap();
        let sound = &SOUND[sound];
        let mut config = sound.config.clone();
        let object = config.as_object_mut().unwrap();
        let keys: Vec<String> = object.keys().cloned().collect();
        for (key, value) in changes {
            object.insert(key.get(&keys).clone(), value);
        }
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        fs::copy(sound.directory.path().join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
        exercise(dir.path());
    }

    #[test]
    fn manifest(sound in 0..FAMILIES.len(), damages in prop::collection::vec(damage(), 0..4), cut in prop::option::of(0.0..1.0f64)) {
        let dir = tempfile::tempdir().unwrap();
        let bytes = damaged(&SOUND[sound].manifest, SOUND[sound].manifest.len(), &damages, cut);
        fs::write(dir.path().join(MANIFEST_FILE), bytes).unwrap();
        // Whatever is accepted has sizes that can be added up.
        if let Ok(manifest) = read_manifest(dir.path()) {
            prop_assert!(manifest.weight_bytes() < MEMORY);
        }
    }
}
