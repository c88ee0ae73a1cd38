//! Imports that leave the tensors in the user's files, and imports of ServerlessLLM's format.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tangram_checkpoint::{
    Checksum, ContentId, DATA_FILE, InPlaceFile, KnownTensor, LayerRole, MANIFEST_FILE, Manifest, Role,
    Source, TENSOR_ALIGNMENT, import, import_in_place, open, read_manifest,
};
use tangram_testkit::{
    Family, Float, GgmlType, GgufOptions, Quantised, RandomModel, write_gguf, write_hf_model,
    write_quantised_model, write_serverlessllm,
};

const FAMILIES: [Family; 13] = [
    Family::Llama,
    Family::Qwen2,
    Family::Qwen3,
    Family::Mistral,
    Family::Mixtral,
    Family::Qwen3Moe,
    Family::Gemma2,
    Family::Gemma3,
    Family::Phi3,
    Family::Gpt2,
    Family::GptNeox,
    Family::Opt,
    Family::Bert,
];

fn alone(dir: &Path) -> Manifest {
    fs::create_dir_all(dir).unwrap();
    let id = dir.file_name().unwrap().to_str().unwrap();
    import(&open(&source_of(dir)).unwrap(), dir, id, &|_| None, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// The model at `X` is imported to `X-imported`, `X-in-place` and so on.
fn source_of(dir: &Path) -> PathBuf {
    let name = dir.file_name().unwrap().to_str().unwrap();
    dir.with_file_name(name.split('-').next().unwrap())
}

fn in_place(source: &Source, dir: &Path) -> Manifest {
    fs::create_dir_all(dir).unwrap();
    let id = dir.file_name().unwrap().to_str().unwrap();
    import_in_place(source, dir, id, &|_| None, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn ids(manifest: &Manifest) -> Vec<(Role, ContentId)> {
    manifest.tensors.iter().map(|entry| (entry.role, entry.id)).collect()
}

/// Bytes of every tensor, read where the manifest says.
fn bytes(dir: &Path, manifest: &Manifest) -> Vec<Vec<u8>> {
    let data = fs::File::open(dir.join(DATA_FILE)).unwrap();
    let read = |file: &fs::File, offset, bytes: u64| {
        let mut buffer = vec![0; bytes as usize];
        file.read_exact_at(&mut buffer, offset).unwrap();
        buffer
    };
    let files = manifest.in_place.iter().flat_map(|in_place| &in_place.files);
    let files: Vec<fs::File> = files.map(|file| fs::File::open(&file.path).unwrap()).collect();
    let tensors = manifest.tensors.iter().map(|entry| match entry.in_place {
        None => read(&data, entry.offset, entry.bytes),
        Some(place) => read(&files[place.file as usize], place.offset, entry.bytes),
    });
    tensors.collect()
}

/// Imports `X` and deploys it in place; both must be the same tensors. Gives the roles that had to be stored.
fn compare(temp: &Path, name: &str) -> Vec<Role> {
    let [source, copied, referred] =
        ["", "-imported", "-placed"].map(|suffix| temp.join(format!("{name}{suffix}")));
    let before: HashMap<PathBuf, Vec<u8>> = files_of(&source);
    let imported = alone(&copied);
    let placed = in_place(&open(&source).unwrap(), &referred);
    assert_eq!(read_manifest(&referred).unwrap(), placed, "{name}");
    assert_eq!(ids(&imported), ids(&placed), "{name}");
    assert!(bytes(&copied, &imported) == bytes(&referred, &placed), "{name}: other bytes");
    assert_eq!(files_of(&source), before, "{name}: the user's files are the user's");
    let stored: Vec<_> = placed.tensors.iter().filter(|entry| entry.in_place.is_none()).collect();
    let room: u64 = stored.iter().map(|entry| entry.bytes.next_multiple_of(4096)).sum();
    assert!(placed.data_bytes <= room.next_multiple_of(4096), "{name}: {}", placed.data_bytes);
    let mut end = 0;
    for entry in placed.tensors.iter().filter(|entry| entry.in_place.is_some()) {
        assert!(entry.offset >= end && entry.offset % TENSOR_ALIGNMENT == 0, "{name}: places in memory");
        end = entry.offset + entry.bytes;
        let chunks: Vec<Checksum> = imported
            .tensors
            .iter()
            .find(|imported| imported.role == entry.role)
            .map(|imported| imported.chunks.clone())
            .unwrap();
        assert_eq!(entry.chunks, chunks);
    }
    assert_eq!(placed.in_place.unwrap().range_bytes, end);
    stored.iter().map(|entry| entry.role).collect()
}

fn files_of(path: &Path) -> HashMap<PathBuf, Vec<u8>> {
    if path.is_file() {
        return HashMap::from([(path.to_path_buf(), fs::read(path).unwrap())]);
    }
    let files = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    files.map(|path| (path.clone(), fs::read(&path).unwrap())).collect()
}

#[test]
fn every_family_in_place_is_the_same_tensors_and_stores_only_what_is_turned() {
    let temp = tempfile::tempdir().unwrap();
    for family in FAMILIES {
        for (dtype, shards) in [(Float::F32, 1), (Float::BF16, 3)] {
            let name = format!("{}{dtype:?}", family.name().replace('-', ""));
            let random = RandomModel { dtype, shards, ..RandomModel::tiny(family) };
            write_hf_model(&temp.path().join(&name), &random);
            let stored = compare(temp.path(), &name);
            match family {
                // Matrices as [in, out]; heads that interleave query, key and value.
                Family::Gpt2 => assert!(stored.contains(&Role::Layer(0, LayerRole::Query))),
                Family::GptNeox => {
                    assert!(stored.iter().all(|role| matches!(
                        role,
                        Role::Layer(
                            _,
                            LayerRole::Query
                                | LayerRole::Key
                                | LayerRole::Value
                                | LayerRole::QueryBias
                                | LayerRole::KeyBias
                                | LayerRole::ValueBias
                        )
                    )));
                }
                // Fused projections lie one after the other and are read where they are.
                _ => assert_eq!(stored, [], "{name}"),
            }
        }
    }
}

#[test]
fn gguf_in_place_stores_only_what_metas_order_needs() {
    let temp = tempfile::tempdir().unwrap();
    for (family, dtype) in [
        (Family::Llama, GgmlType::Q4_0),
        (Family::Qwen2, GgmlType::Q8_0),
        (Family::Qwen3Moe, GgmlType::F16),
        (Family::Gemma2, GgmlType::F32),
    ] {
        let name = format!("{}.gguf", family.name());
        write_gguf(&temp.path().join(&name), &RandomModel::tiny(family), GgufOptions { version: 3, dtype });
        let stored = compare(temp.path(), &name);
        let turned = |role: &Role| matches!(role, Role::Layer(_, LayerRole::Query | LayerRole::Key));
        assert!(stored.iter().all(turned), "{stored:?}");
        assert_eq!(stored.is_empty(), family != Family::Llama);
    }
}

#[test]
fn of_a_quantised_checkpoint_only_what_is_converted_is_stored() {
    let temp = tempfile::tempdir().unwrap();
    let model = RandomModel { intermediate: 160, dtype: Float::BF16, ..RandomModel::tiny(Family::Llama) };
    for (name, how) in [("awq", Quantised::Awq { group: 32 }), ("fp8", Quantised::Fp8Block([16, 32]))] {
        write_quantised_model(&temp.path().join(name), &model, how);
        let stored = compare(temp.path(), name);
        let plain = |role: &Role| {
            let norm = matches!(role, Role::Layer(_, LayerRole::AttnNorm | LayerRole::MlpNorm));
            norm || !matches!(role, Role::Layer(..))
        };
        assert!(!stored.is_empty() && !stored.iter().any(plain), "{stored:?}");
    }
}

#[test]
fn what_an_imported_checkpoint_holds_is_not_stored_again() {
    let temp = tempfile::tempdir().unwrap();
    let name = temp.path().join("llama.gguf");
    write_gguf(&name, &RandomModel::tiny(Family::Llama), GgufOptions::default());
    let imported = alone(&temp.path().join("llama.gguf-imported"));
    let known: HashMap<ContentId, KnownTensor> =
        imported.tensors.iter().map(|entry| (entry.id, KnownTensor::from(entry))).collect();
    let dir = temp.path().join("placed");
    fs::create_dir(&dir).unwrap();
    let source = open(&name).unwrap();
    let mut last = Default::default();
    let placed = import_in_place(&source, &dir, "placed", &|id| known.get(id).cloned(), &mut |progress| {
        last = progress;
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(placed.data_bytes, 0);
    assert_eq!(last.bytes_reused, source.weight_bytes(), "nothing took room");
    for entry in &placed.tensors {
        assert_ne!(entry.in_place.is_some(), entry.checkpoint == imported.checkpoint, "{:?}", entry.role);
    }
}

#[test]
fn a_file_that_changes_meanwhile_is_not_deployed() {
    let temp = tempfile::tempdir().unwrap();
    let (model, dir) = (temp.path().join("model"), temp.path().join("placed"));
    write_hf_model(&model, &RandomModel::tiny(Family::Qwen3));
    fs::create_dir(&dir).unwrap();
    let source = open(&model).unwrap();
    let weights = model.join("model.safetensors");
    let mut changed = false;
    let error = import_in_place(&source, &dir, "placed", &|_| None, &mut |progress| {
        if progress.bytes_done > 0 && !std::mem::replace(&mut changed, true) {
            let file = fs::OpenOptions::new().append(true).open(&weights).unwrap();
            file.write_all_at(&[1], file.metadata().unwrap().len()).unwrap();
        }
        ControlFlow::Continue(())
    })
    .unwrap_err()
    .to_string();
    assert!(error.contains("has changed") && error.contains("model.safetensors"), "{error}");
    assert!(!dir.join(MANIFEST_FILE).exists());
}

#[test]
fn changes_are_found_and_said() {
    let temp = tempfile::tempdir().unwrap();
    let model = temp.path().join("model");
    write_hf_model(&model, &RandomModel::tiny(Family::Qwen3));
    let manifest = in_place(&open(&model).unwrap(), &temp.path().join("placed"));
    let [file]: [InPlaceFile; 1] = manifest.in_place.unwrap().files.try_into().unwrap();
    let weights = model.join("model.safetensors");
    assert_eq!(file.path, fs::canonicalize(&weights).unwrap());
    assert_eq!(file.check(), Ok(()));
    let changed = |what: &str| {
        let message = file.check().unwrap_err();
        assert!(message.contains(what) && message.contains("deploy the model again"), "{message}");
        assert!(message.contains("model.safetensors"), "{message}");
    };
    let time = fs::metadata(&weights).unwrap().modified().unwrap();
    let set_time = |time: SystemTime| fs::File::open(&weights).unwrap().set_modified(time).unwrap();
    set_time(time + Duration::from_nanos(1_000_000));
    changed("written to");
    set_time(time);
    assert_eq!(file.check(), Ok(()));
    let kept = fs::read(&weights).unwrap();
    fs::OpenOptions::new().write(true).open(&weights).unwrap().set_len(kept.len() as u64 - 1).unwrap();
    changed("bytes instead of");
    // Another file with the same bytes and the same time.
    let other = model.join("other");
    fs::write(&other, &kept).unwrap();
    fs::rename(&other, &weights).unwrap();
    set_time(time);
    changed("another file");
    fs::remove_file(&weights).unwrap();
    changed("cannot be read");
}

#[test]
fn manifests_that_contradict_themselves_about_places_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let (model, target) = (temp.path().join("model"), temp.path().join("placed"));
    write_hf_model(&model, &RandomModel::tiny(Family::Llama));
    let good = in_place(&open(&model).unwrap(), &target);
    let refused = |what: &str, change: &dyn Fn(&mut Manifest)| {
        let mut manifest = good.clone();
        change(&mut manifest);
        fs::write(target.join(MANIFEST_FILE), serde_json::to_vec(&manifest).unwrap()).unwrap();
        let error = read_manifest(&target).expect_err(what).to_string();
        assert!(error.contains(MANIFEST_FILE) && error.contains("deploy"), "{what}: {error}");
    };
    let place = |manifest: &mut Manifest| manifest.tensors[1].in_place.unwrap();
    refused("no list", &|manifest| manifest.in_place = None);
    refused("no such file", &|manifest| {
        let place = place(manifest);
        manifest.tensors[1].in_place = Some(tangram_checkpoint::FilePlace { file: 7, ..place });
    });
    for offset in [u64::MAX - 3, good.in_place.as_ref().unwrap().files[0].bytes] {
        refused("beyond the end", &|manifest| {
            let place = place(manifest);
            manifest.tensors[1].in_place = Some(tangram_checkpoint::FilePlace { offset, ..place });
        });
    }
    refused("alignment", &|manifest| manifest.tensors[1].offset += 1);
    refused("wrapping place", &|manifest| manifest.tensors[1].offset = u64::MAX - 255);
    refused("huge range", &|manifest| manifest.in_place.as_mut().unwrap().range_bytes = u64::MAX);
    refused("relative path", &|manifest| {
        manifest.in_place.as_mut().unwrap().files[0].path = "model.safetensors".into();
    });
}

#[test]
fn serverlessllms_format_is_the_same_model() {
    let temp = tempfile::tempdir().unwrap();
    for (family, dtype) in [
        (Family::Llama, Float::F16),
        (Family::Qwen2, Float::BF16),
        (Family::Phi3, Float::F32),
        (Family::Opt, Float::F16),
        (Family::Gpt2, Float::F32),
    ] {
        // Odd vocabularies make odd lengths.
        let random = RandomModel { dtype, vocab: 259, ..RandomModel::tiny(family) };
        let original = temp.path().join(family.name());
        write_hf_model(&original, &random);
        let expected = alone(&temp.path().join(format!("{}-imported", family.name())));
        for (number, file_bytes) in [usize::MAX, 64 << 10, 1].into_iter().enumerate() {
            let name = format!("{}sllm{number}", family.name());
            let saved = temp.path().join(&name);
            write_serverlessllm(&original, &saved, file_bytes);
            assert_eq!(saved.join("tensor.data_1").exists(), file_bytes < usize::MAX);
            compare(temp.path(), &name);
            let manifest = read_manifest(&temp.path().join(format!("{name}-imported"))).unwrap();
            assert_eq!(ids(&manifest), ids(&expected), "{name}");
            assert_eq!(manifest.spec, expected.spec);
            assert!(manifest.has_tokenizer, "{name}");
            // A lost end, of the first or the last file.
            let first = saved.join("tensor.data_0");
            let length = fs::metadata(&first).unwrap().len();
            fs::OpenOptions::new().write(true).open(&first).unwrap().set_len(length / 512 * 512 / 2).unwrap();
            let error = open(&saved).unwrap_err().to_string();
            assert!(error.contains("tensor.data_") && error.contains("original"), "{error}");
        }
    }
}

#[test]
fn what_serverlessllm_saves_for_vllm_is_refused_with_what_to_do() {
    let temp = tempfile::tempdir().unwrap();
    let (original, saved) = (temp.path().join("original"), temp.path().join("saved"));
    write_hf_model(&original, &RandomModel::tiny(Family::Llama));
    write_serverlessllm(&original, &saved.join("rank_0"), usize::MAX);
    fs::copy(original.join("config.json"), saved.join("config.json")).unwrap();
    let error = open(&saved).unwrap_err().to_string();
    assert!(error.contains("vLLM") && error.contains("original"), "{error}");
}
