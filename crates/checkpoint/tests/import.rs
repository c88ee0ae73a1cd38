//! Imports whole checkpoints and checks what lies on disk afterwards.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::HashMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use tangram_checkpoint::{
    CHUNK_BYTES, CheckpointError, Checksum, ContentId, DATA_FILE, Hash, ImportProgress, KnownTensor, Layout,
    MANIFEST_FILE, Manifest, Mlp, Role, Source, TENSOR_ALIGNMENT, TOKENIZER_FILE, TensorEntry, codec_format,
    import, import_as, open, read_manifest, stored_chunk_bytes,
};
use tangram_testkit::{
    EXPERTS, Family, Float, GgmlType, GgufOptions, RandomModel, WINDOW, mutate_layer, write_gguf,
    write_hf_model,
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

fn import_alone(source: &Source, dir: &Path, id: &str) -> Manifest {
    fs::create_dir_all(dir).unwrap();
    import(source, dir, id, &|_| None, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn read_tensor(source: &Source, role: Role) -> Vec<u8> {
    let tensor = source.tensors().iter().find(|tensor| tensor.role == role).unwrap();
    let mut bytes = vec![0; tensor.bytes as usize];
    source.read_at(tensor, 0, &mut bytes).unwrap();
    bytes
}

fn ids(manifest: &Manifest) -> HashMap<Role, ContentId> {
    manifest.tensors.iter().map(|entry| (entry.role, entry.id)).collect()
}

fn known(manifest: &Manifest) -> impl Fn(&ContentId) -> Option<KnownTensor> + use<> {
    let places: HashMap<ContentId, KnownTensor> =
        manifest.tensors.iter().map(|entry| (entry.id, KnownTensor::from(entry))).collect();
    move |id| places.get(id).cloned()
}

#[test]
fn every_family_is_written_in_order_aligned_and_verifiable() {
    let temp = tempfile::tempdir().unwrap();
    for family in FAMILIES {
        for dtype in [Float::F32, Float::BF16, Float::F16] {
            let name = format!("{}-{dtype:?}", family.name());
            let (model, target) = (temp.path().join(&name), temp.path().join(format!("{name}-imported")));
            let shards = if dtype == Float::F16 { 3 } else { 1 };
            let random = RandomModel {
                dtype,
                shards,
                new_config_keys: dtype == Float::BF16,
                ..RandomModel::tiny(family)
            };
            write_hf_model(&model, &random);
            let source = open(&model).unwrap();
            let manifest = import_alone(&source, &target, &name);
            assert_eq!(read_manifest(&target).unwrap(), manifest);
            assert_eq!(manifest.weight_bytes(), source.weight_bytes());
            let data = fs::read(target.join(DATA_FILE)).unwrap();
            assert_eq!(data.len() as u64, manifest.data_bytes);
            assert_eq!(data.len() % 4096, 0);
            let mut end = 0;
            for entry in &manifest.tensors {
                let alignment = if entry.bytes >= 65536 { 4096 } else { TENSOR_ALIGNMENT };
                assert!(entry.offset % alignment == 0 && entry.offset >= end);
                assert!(data[end as usize..entry.offset as usize].iter().all(|&byte| byte == 0));
                end = entry.offset + entry.bytes;
                let bytes = &data[entry.offset as usize..end as usize];
                assert_eq!(bytes, read_tensor(&source, entry.role));
                let sums: Vec<Checksum> = bytes.chunks(CHUNK_BYTES as usize).map(Checksum::of).collect();
                assert_eq!(entry.chunks, sums);
            }
            assert!(manifest.has_tokenizer && target.join(TOKENIZER_FILE).exists());
        }
    }
}

#[test]
fn identity_depends_on_dtype_shape_and_bytes() {
    let id = |dtype, shape: &[u64], bytes: &[u8]| ContentId::of_tensor(dtype, shape, bytes);
    use tangram_checkpoint::DType::{BF16, F16};
    let one = id(F16, &[2, 4], &[1; 16]);
    assert_eq!(one, id(F16, &[2, 4], &[1; 16]));
    assert_ne!(one, id(BF16, &[2, 4], &[1; 16]));
    assert_ne!(one, id(F16, &[4, 2], &[1; 16]));
    assert_ne!(one, id(F16, &[8], &[1; 16]));
    assert_ne!(one, id(F16, &[2, 4], &[2; 16]));
}

#[test]
fn a_copy_with_one_changed_layer_brings_only_that_layer() {
    let temp = tempfile::tempdir().unwrap();
    let [base, copy, first, second] = ["base", "copy", "first", "second"].map(|name| temp.path().join(name));
    write_hf_model(&base, &RandomModel::tiny(Family::Llama));
    mutate_layer(&base, &copy, 1);
    let original = import_alone(&open(&base).unwrap(), &first, "first");
    fs::create_dir(&second).unwrap();
    let mut last = ImportProgress::default();
    let changed = import(&open(&copy).unwrap(), &second, "second", &known(&original), &mut |progress| {
        last = progress;
        ControlFlow::Continue(())
    })
    .unwrap();
    let mut new_bytes = 0;
    for (old, new) in original.tensors.iter().zip(&changed.tensors) {
        let in_layer = matches!(new.role, Role::Layer(1, _));
        assert_eq!(old.id != new.id, in_layer, "{:?}", new.role);
        assert_eq!(new.checkpoint, if in_layer { "second" } else { "first" });
        if in_layer {
            new_bytes += new.bytes;
        } else {
            assert_eq!((new.offset, &new.chunks), (old.offset, &old.chunks));
        }
    }
    assert_eq!(last.bytes_done, changed.weight_bytes());
    assert_eq!(last.bytes_done, last.bytes_total);
    assert_eq!(last.bytes_reused, changed.weight_bytes() - new_bytes);
    assert!(changed.data_bytes >= new_bytes && changed.data_bytes < new_bytes + 8192);
    assert_eq!(read_manifest(&second).unwrap(), changed);
    // The gaps hold no pieces of tensors that were not kept.
    let data = fs::read(second.join(DATA_FILE)).unwrap();
    let mut end = 0;
    for entry in changed.tensors.iter().filter(|entry| entry.checkpoint == "second") {
        assert!(data[end as usize..entry.offset as usize].iter().all(|&byte| byte == 0));
        end = entry.offset + entry.bytes;
    }
    assert!(data[end as usize..].iter().all(|&byte| byte == 0));
}

#[test]
fn an_exact_copy_needs_no_room_and_equal_tensors_lie_once() {
    let temp = tempfile::tempdir().unwrap();
    let model = temp.path().join("model");
    write_hf_model(&model, &RandomModel::tiny(Family::Qwen2));
    let source = open(&model).unwrap();
    let first = import_alone(&source, &temp.path().join("first"), "first");
    let second = temp.path().join("second");
    fs::create_dir(&second).unwrap();
    let manifest =
        import(&source, &second, "second", &known(&first), &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(manifest.data_bytes, 0);
    assert_eq!(fs::metadata(second.join(DATA_FILE)).unwrap().len(), 0);

    // Tensor bytes set to one value everywhere: equal shapes become equal tensors.
    let file = model.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[start..].fill(0);
    fs::write(&file, bytes).unwrap();
    let zeros = import_alone(&open(&model).unwrap(), &temp.path().join("zeros"), "zeros");
    let mut distinct: HashMap<ContentId, u64> = HashMap::new();
    for entry in &zeros.tensors {
        distinct.insert(entry.id, entry.bytes);
    }
    assert!(distinct.len() < zeros.tensors.len() / 3);
    assert!(zeros.data_bytes < distinct.values().sum::<u64>() + 8192 * distinct.len() as u64);
    assert_eq!(read_manifest(&temp.path().join("zeros")).unwrap(), zeros);
}

#[test]
fn the_same_model_in_both_formats_has_the_same_tensors() {
    let temp = tempfile::tempdir().unwrap();
    for (family, bias, tied) in [
        (Family::Llama, false, true),
        (Family::Llama, true, false),
        (Family::Qwen2, false, false),
        (Family::Qwen3, true, true),
    ] {
        for version in [1, 2, 3] {
            let random = RandomModel { bias, tied, ..RandomModel::tiny(family) };
            let name = format!("{}-{bias}-{version}", family.name());
            let (model, file) = (temp.path().join(&name), temp.path().join(format!("{name}.gguf")));
            write_hf_model(&model, &random);
            write_gguf(&file, &random, GgufOptions { version, dtype: GgmlType::F32 });
            let (directory, gguf) = (open(&model).unwrap(), open(&file).unwrap());
            assert_eq!(directory.spec(), gguf.spec());
            let one = import_alone(&directory, &temp.path().join(format!("{name}-a")), "a");
            let two = import_alone(&gguf, &temp.path().join(format!("{name}-b")), "b");
            assert_eq!(ids(&one), ids(&two));
            assert_eq!(one.generation.eos, two.generation.eos);
            assert_eq!(one.chat_template, two.chat_template);
            let [first, second] = [&directory, &gguf].map(|source| {
                let tokenizer = tokenizers::Tokenizer::from_bytes(source.tokenizer_json().unwrap()).unwrap();
                tokenizer.encode("<|im_start|>user\nHi, é!<|im_end|>", true).unwrap().get_ids().to_vec()
            });
            assert_eq!(first, second);
        }
    }
}

/// Fused, transposed, stacked and interleaved tensors come out the same whichever way they were stored.
#[test]
fn new_families_in_both_formats_are_the_same_model() {
    let temp = tempfile::tempdir().unwrap();
    for family in FAMILIES.into_iter().filter(|family| !matches!(family, Family::Bert | Family::Opt)) {
        for new_config_keys in [false, true] {
            let random = RandomModel { new_config_keys, layers: 7, ..RandomModel::tiny(family) };
            let name = format!("{}-{new_config_keys}", family.name());
            let (model, file) = (temp.path().join(&name), temp.path().join(format!("{name}.gguf")));
            write_hf_model(&model, &random);
            write_gguf(&file, &random, GgufOptions::default());
            let (directory, gguf) = (open(&model).unwrap(), open(&file).unwrap());
            let gemma = matches!(family, Family::Gemma2 | Family::Gemma3);
            let mut spec = directory.spec().clone();
            assert_eq!(spec.norm_plus_one, gemma);
            // What the formats say differently.
            spec.family.clone_from(&gguf.spec().family);
            spec.norm_plus_one = false;
            if family == Family::GptNeox {
                assert_eq!((spec.mlp, gguf.spec().mlp), (Mlp::Gelu, Mlp::GeluTanh));
                spec.mlp = Mlp::GeluTanh;
            }
            assert_eq!(&spec, gguf.spec(), "{name}");
            assert_eq!(directory.tensors().len(), gguf.tensors().len());
            for (one, two) in directory.tensors().iter().zip(gguf.tensors()) {
                assert_eq!((one.role, &one.shape), (two.role, &two.shape));
                let (one, two) = (read_tensor(&directory, one.role), read_tensor(&gguf, one.role));
                assert!(one == two || gemma && one.len() < 1000, "{name}");
            }
        }
    }
}

#[test]
fn what_a_family_is_shows_in_its_spec() {
    let temp = tempfile::tempdir().unwrap();
    let spec = |family: Family| {
        let dir = temp.path().join(family.name());
        write_hf_model(&dir, &RandomModel { layers: 7, ..RandomModel::tiny(family) });
        open(&dir).unwrap().spec().clone()
    };
    let local =
        |family: Family| spec(family).local.map(|local| (local.window, local.layers, local.rope.is_some()));
    assert_eq!(local(Family::Llama), None);
    assert_eq!(local(Family::Mistral), Some((WINDOW, (0..7).collect(), false)));
    assert_eq!(local(Family::Gemma2), Some((WINDOW, vec![0, 2, 4, 6], false)));
    assert_eq!(local(Family::Gemma3), Some((WINDOW, vec![0, 1, 2, 3, 4, 6], true)));
    let experts = spec(Family::Qwen3Moe).experts.unwrap();
    assert_eq!((experts.count, experts.per_token, experts.intermediate), (EXPERTS, 2, 48));
    let gemma = spec(Family::Gemma2);
    assert_eq!((gemma.attention_cap, gemma.logit_cap), (Some(50.0), Some(30.0)));
    assert_eq!((gemma.embedding_scale, gemma.query_scale), (Some(8.0), Some(0.25)));
    let neox = spec(Family::GptNeox);
    assert_eq!((neox.rope.unwrap().dims, neox.parallel_residual), (4, true));
    let opt = spec(Family::Opt);
    assert_eq!((opt.learned_positions, opt.position_offset, opt.context), (Some(258), 2, 256));
}

#[test]
fn reading_in_pieces_gives_the_same_bytes() {
    let temp = tempfile::tempdir().unwrap();
    let file = temp.path().join("model.gguf");
    write_gguf(&file, &RandomModel::tiny(Family::Llama), GgufOptions { version: 3, dtype: GgmlType::Q8_0 });
    let mut sources = vec![open(&file).unwrap()];
    for (family, dtype) in
        [(Family::Gpt2, Float::BF16), (Family::Gpt2, Float::F32), (Family::GptNeox, Float::F16)]
    {
        let dir = temp.path().join(format!("{}-{dtype:?}", family.name()));
        write_hf_model(&dir, &RandomModel { dtype, ..RandomModel::tiny(family) });
        sources.push(open(&dir).unwrap());
    }
    for source in sources {
        for tensor in source.tensors() {
            let whole = read_tensor(&source, tensor.role);
            let mut pieces = Vec::new();
            for piece in whole.chunks(101) {
                let mut bytes = vec![0; piece.len()];
                source.read_at(tensor, pieces.len() as u64, &mut bytes).unwrap();
                pieces.extend(bytes);
            }
            assert!(whole == pieces, "{:?}", tensor.role);
            assert!(source.read_at(tensor, 1, &mut vec![0; whole.len()]).is_err());
            assert!(source.read_at(tensor, u64::MAX, &mut [0; 2]).is_err());
        }
    }
}

/// A manifest of a build that knew fewer families reads as the same model.
#[test]
fn manifests_without_the_later_fields_still_read() {
    let temp = tempfile::tempdir().unwrap();
    let (model, target) = (temp.path().join("model"), temp.path().join("target"));
    write_hf_model(&model, &RandomModel::tiny(Family::Qwen3));
    let manifest = import_alone(&open(&model).unwrap(), &target, "target");
    let mut json: serde_json::Value = serde_json::to_value(&manifest).unwrap();
    let spec = json["spec"].as_object_mut().unwrap();
    for later in [
        "norm_plus_one",
        "parallel_residual",
        "embedding_scale",
        "query_scale",
        "attention_cap",
        "logit_cap",
        "local",
        "position_offset",
        "experts",
    ] {
        assert!(spec.remove(later).is_some(), "{later}");
    }
    fs::write(target.join(MANIFEST_FILE), json.to_string()).unwrap();
    assert_eq!(read_manifest(&target).unwrap(), manifest);
}

#[test]
fn cancelling_stops_the_import() {
    let temp = tempfile::tempdir().unwrap();
    let (model, target) = (temp.path().join("model"), temp.path().join("target"));
    write_hf_model(&model, &RandomModel::tiny(Family::Llama));
    fs::create_dir(&target).unwrap();
    let mut calls = 0;
    let result = import(&open(&model).unwrap(), &target, "target", &|_| None, &mut |_| {
        calls += 1;
        if calls == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert!(matches!(result, Err(CheckpointError::Cancelled)));
    assert_eq!(calls, 3);
    assert!(!target.join(MANIFEST_FILE).exists());
}

#[test]
fn a_source_cut_short_after_opening_is_an_error() {
    let temp = tempfile::tempdir().unwrap();
    let (model, target) = (temp.path().join("model"), temp.path().join("target"));
    write_hf_model(&model, &RandomModel::tiny(Family::Llama));
    let source = open(&model).unwrap();
    let file = fs::OpenOptions::new().write(true).open(model.join("model.safetensors")).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    fs::create_dir(&target).unwrap();
    let error =
        import(&source, &target, "t", &|_| None, &mut |_| ControlFlow::Continue(())).unwrap_err().to_string();
    assert!(error.contains("model.safetensors") && error.contains("cut short"), "{error}");
}

#[test]
fn a_target_that_cannot_be_written_is_an_io_error_that_names_the_file() {
    let temp = tempfile::tempdir().unwrap();
    let model = temp.path().join("model");
    write_hf_model(&model, &RandomModel::tiny(Family::Llama));
    let missing = temp.path().join("missing");
    let result = import(&open(&model).unwrap(), &missing, "t", &|_| None, &mut |_| ControlFlow::Continue(()));
    assert!(matches!(result, Err(CheckpointError::Io { path, .. }) if path == missing.join(DATA_FILE)));
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let model = temp.path().join("model");
    write_hf_model(&model, &RandomModel::tiny(Family::Llama));
    let source = open(&model).unwrap();
    for name in ["", ".", "..", "a/b", "/a", "../a", "a/"] {
        let result = import(&source, temp.path(), name, &|_| None, &mut |_| ControlFlow::Continue(()));
        assert!(matches!(result, Err(CheckpointError::Invalid { .. })), "{name:?}");
    }
}

/// What `data` holds of a tensor, decoded.
fn stored_tensor(data: &[u8], entry: &TensorEntry) -> Vec<u8> {
    let mut bytes = vec![0; entry.bytes as usize];
    for (index, chunk) in bytes.chunks_mut(CHUNK_BYTES as usize).enumerate() {
        let start = entry.offset as usize + index * CHUNK_BYTES as usize;
        let stored = &data[start..start + stored_chunk_bytes(&entry.stored, entry.bytes, index) as usize];
        assert_eq!(Checksum::of(stored), entry.chunks[index]);
        if stored.len() == chunk.len() {
            chunk.copy_from_slice(stored);
        } else {
            tangram_codec::decode(codec_format(entry.dtype).unwrap(), stored, chunk).unwrap();
        }
    }
    bytes
}

#[test]
fn compressed_tensors_are_the_same_tensors_in_less_room() {
    let go_on = &mut |_| ControlFlow::Continue(());
    for (dtype, most) in [(Float::BF16, 0.75), (Float::F16, 0.90)] {
        let temp = tempfile::tempdir().unwrap();
        let [model, plain, target, again] =
            ["model", "plain", "target", "again"].map(|name| temp.path().join(name));
        // Tensors of one chunk, of several with a short last one, and two that are equal.
        write_hf_model(&model, &RandomModel { dtype, vocab: 40_000, ..RandomModel::tiny(Family::Llama) });
        let source = open(&model).unwrap();
        let expected = import_alone(&source, &plain, "plain");
        [&target, &again].into_iter().for_each(|dir| fs::create_dir(dir).unwrap());
        let manifest = import_as(Layout::Compressed, &source, &target, "target", &|_| None, go_on).unwrap();
        assert_eq!(read_manifest(&target).unwrap(), manifest);
        assert_eq!(ids(&manifest), ids(&expected));
        let file = fs::File::open(target.join(DATA_FILE)).unwrap();
        let data = fs::read(target.join(DATA_FILE)).unwrap();
        assert_eq!(data.len() as u64, manifest.data_bytes);
        for entry in &manifest.tensors {
            assert!(stored_tensor(&data, entry) == read_tensor(&source, entry.role), "{:?}", entry.role);
        }
        let stored: u64 = manifest.tensors.iter().map(TensorEntry::stored_bytes).sum();
        assert!((stored as f64) < most * manifest.weight_bytes() as f64, "{stored}");
        // What is not stored is a hole, up to a page for each chunk.
        let on_disk = 512 * std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        assert!(on_disk < manifest.data_bytes || !has_holes(temp.path()), "{on_disk}");

        // Whoever has the same tensors refers to them as they are stored.
        let manifest = import_as(Layout::Plain, &source, &again, "again", &known(&manifest), go_on).unwrap();
        assert_eq!(manifest.data_bytes, 0);
        assert!(manifest.tensors.iter().any(|entry| !entry.stored.is_empty()));
        let mut changed = manifest.clone();
        let entry = changed.tensors.iter_mut().find(|entry| !entry.stored.is_empty()).unwrap();
        entry.stored[0] = entry.bytes as u32 + 1;
        fs::write(again.join(MANIFEST_FILE), serde_json::to_vec(&changed).unwrap()).unwrap();
        assert!(read_manifest(&again).unwrap_err().to_string().contains("stored lengths"));
    }
}

/// Whether the file system leaves out what was never written.
fn has_holes(dir: &Path) -> bool {
    let path = dir.join("hole");
    let file = fs::File::create(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) == 0
}

#[test]
fn manifests_of_earlier_versions_are_read() {
    let temp = tempfile::tempdir().unwrap();
    let (model, target) = (temp.path().join("model"), temp.path().join("target"));
    write_hf_model(&model, &RandomModel::tiny(Family::Llama));
    let mut manifest = import_alone(&open(&model).unwrap(), &target, "target");
    let data = fs::read(target.join(DATA_FILE)).unwrap();
    for tensor in &mut manifest.tensors {
        let bytes = &data[tensor.offset as usize..][..tensor.bytes as usize];
        tensor.chunks = bytes.chunks(CHUNK_BYTES as usize).map(|c| Checksum::Blake3(Hash::of(c))).collect();
    }
    for version in [1, 2] {
        manifest.version = version;
        fs::write(target.join(MANIFEST_FILE), serde_json::to_vec(&manifest).unwrap()).unwrap();
        assert_eq!(read_manifest(&target).unwrap(), manifest);
    }
}

#[test]
fn changed_manifests_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let (model, target) = (temp.path().join("model"), temp.path().join("target"));
    write_hf_model(&model, &RandomModel::tiny(Family::Llama));
    let good = import_alone(&open(&model).unwrap(), &target, "target");
    let refused = |what: &str, change: &dyn Fn(&mut Manifest)| {
        let mut manifest = good.clone();
        change(&mut manifest);
        fs::write(target.join(MANIFEST_FILE), serde_json::to_vec(&manifest).unwrap()).unwrap();
        let error = read_manifest(&target).expect_err(what).to_string();
        assert!(error.contains(MANIFEST_FILE) && error.contains("deploy"), "{what}: {error}");
    };
    refused("version", &|manifest| manifest.version = Manifest::VERSION + 1);
    refused("no version", &|manifest| manifest.version = 0);
    refused("name", &|manifest| manifest.checkpoint = "../other".into());
    refused("zero size", &|manifest| manifest.spec.hidden = 0);
    refused("huge size", &|manifest| manifest.spec.vocab = usize::MAX);
    refused("missing tensor", &|manifest| manifest.tensors.truncate(5));
    refused("tensor twice", &|manifest| manifest.tensors.push(manifest.tensors[0].clone()));
    refused("order", &|manifest| manifest.tensors.reverse());
    refused("shape", &|manifest| manifest.tensors[1].shape = vec![1]);
    refused("bytes", &|manifest| manifest.tensors[1].bytes += 1);
    refused("chunks", &|manifest| manifest.tensors[1].chunks.clear());
    refused("stored f32", &|manifest| manifest.tensors[1].stored = vec![1]);
    refused("alignment", &|manifest| manifest.tensors[1].offset += 1);
    refused("offset", &|manifest| manifest.tensors[1].offset = manifest.data_bytes);
    refused("wrapping offset", &|manifest| manifest.tensors[1].offset = u64::MAX - 255);
    refused("stage", &|manifest| manifest.tensors[1].stage = 3);
    refused("other place", &|manifest| manifest.tensors[1].checkpoint = "/etc".into());
    refused("data size", &|manifest| manifest.data_bytes = 0);
    fs::write(target.join(MANIFEST_FILE), b"{\"version\": 1").unwrap();
    assert!(read_manifest(&target).is_err());
    fs::remove_file(target.join(MANIFEST_FILE)).unwrap();
    assert!(matches!(read_manifest(&target), Err(CheckpointError::Io { .. })));
}
