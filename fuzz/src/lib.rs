//! What the fuzz targets do with an input: a file is made of it, opened as a user's checkpoint, and read to its end; or it
//! is decoded as the stored form of a compressed chunk.
//!
//! Nothing may panic, and nothing may allocate more than [`LIMIT`]: the allocator refuses, which ends the process. A new
//! target is a function here, a file in `fuzz_targets` that calls it, and a `[[bin]]`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::alloc::System;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, OnceLock};

use tangram_checkpoint::{MANIFEST_FILE, Manifest, Source, read_manifest};
use tangram_codec::{Format, Isa, decode_with, encode};
use tangram_device::cpu::CpuDevice;
use tangram_device::{Arena, Extent};
use tangram_engine::{Model, TensorDesc};
use tangram_testkit::{Family, RandomModel, write_hf_model};

/// Most bytes that may be allocated at any time. Inputs are smaller than a megabyte; the largest fixed buffers that the
/// readers have take a few.
pub const LIMIT: usize = 192 << 20;

#[global_allocator]
static ALLOCATOR: cap::Cap<System> = cap::Cap::new(System, LIMIT);

/// Bytes behind a header, for tensors to lie in. They are a hole and cost nothing.
const DATA_BYTES: u64 = 1 << 20;

/// A directory in memory, one per process, with what does not change from input to input.
fn scratch(prepare: impl FnOnce(&Path)) -> &'static Path {
    static SCRATCH: OnceLock<PathBuf> = OnceLock::new();
    SCRATCH.get_or_init(|| {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_path_buf() } else { std::env::temp_dir() };
        let path = parent.join(format!("tangram-fuzz-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        prepare(&path);
        path
    })
}

/// The model whose config lies beside the weights: small, with every kind of tensor that a llama can have.
pub fn model() -> RandomModel {
    RandomModel {
        vocab: 16,
        hidden: 8,
        intermediate: 8,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 4,
        ..RandomModel::tiny(Family::Llama)
    }
}

fn write_config(dir: &Path) {
    let whole = dir.join("whole");
    write_hf_model(&whole, &model());
    fs::copy(whole.join("config.json"), dir.join("config.json")).unwrap();
    fs::remove_dir_all(&whole).unwrap();
}

/// Writes a file of these pieces and then `zeros` zeros.
fn write(path: &Path, pieces: &[&[u8]], zeros: u64) {
    let mut file = File::create(path).unwrap();
    let mut length = zeros;
    for piece in pieces {
        file.write_all(piece).unwrap();
        length += piece.len() as u64;
    }
    file.set_len(length).unwrap();
}

/// Opens what lies at `path`; what is accepted is read, every tensor, and must become a model.
fn open(path: &Path) {
    let Ok(source) = tangram_checkpoint::open(path) else { return };
    read_all(&source);
    let descs = source.tensors().iter();
    let descs: Vec<_> = descs
        .map(|tensor| TensorDesc { role: tensor.role, dtype: tensor.dtype, shape: tensor.shape.clone() })
        .collect();
    let _ = Model::new(source.spec().clone(), &descs);
}

fn read_all(source: &Source) {
    // The tensors lie in a file of little more than a megabyte, so this ends soon.
    let mut buffer = vec![0; 1 << 16];
    for tensor in source.tensors() {
        let mut at = 0;
        while at < tensor.bytes {
            let part = (tensor.bytes - at).min(buffer.len() as u64);
            source.read_at(tensor, at, &mut buffer[..part as usize]).expect("what was accepted can be read");
            at += part;
        }
    }
}

/// A safetensors file beside a config. An input that begins with `{` is its header; any other is the file.
pub fn safetensors(input: &[u8]) {
    let dir = scratch(write_config);
    let file = dir.join("model.safetensors");
    match input.first() {
        Some(b'{') => write(&file, &[&(input.len() as u64).to_le_bytes(), input], DATA_BYTES),
        _ => write(&file, &[input], DATA_BYTES),
    }
    open(dir);
}

/// A GGUF file up to its tensors.
pub fn gguf(input: &[u8]) {
    let file = scratch(|_| {}).join("model.gguf");
    write(&file, &[input], DATA_BYTES);
    open(&file);
}

/// A manifest in the directory of a checkpoint.
pub fn manifest(input: &[u8]) {
    let dir = scratch(|_| {});
    write(&dir.join(MANIFEST_FILE), &[input], 0);
    let Ok(manifest) = read_manifest(dir) else { return };
    let again: Manifest = serde_json::from_slice(&serde_json::to_vec(&manifest).unwrap()).unwrap();
    assert_eq!(again, manifest, "what is read can be written");
    let descs = manifest.tensors.iter();
    let descs: Vec<_> = descs
        .map(|tensor| TensorDesc { role: tensor.role, dtype: tensor.dtype, shape: tensor.shape.clone() })
        .collect();
    let _ = Model::new(manifest.spec.clone(), &descs);
    let _ = Model::new(manifest.without_adapter().spec, &descs);
    for file in manifest.in_place.iter().flat_map(|in_place| &in_place.files) {
        let _ = file.check();
    }
}

/// The index of a ServerlessLLM checkpoint, whose data is in two files.
pub fn serverlessllm(input: &[u8]) {
    let dir = scratch(|dir| {
        write_config(dir);
        write(&dir.join("tensor.data_0"), &[], 256);
        write(&dir.join("tensor.data_1"), &[], DATA_BYTES);
    });
    write(&dir.join("tensor_index.json"), &[input], 0);
    open(dir);
}

/// Most bytes that the codec's target decodes from, and to.
const CODEC_BYTES: usize = 1 << 18;

/// Bytes with nothing mapped behind them: an access beyond their end, which only unsafe code can make, ends the process.
fn guarded() -> Extent {
    let page = 4096;
    let memory = CpuDevice::open(CODEC_BYTES, page).unwrap();
    Arena::reserve(memory, CODEC_BYTES + page).unwrap().claim(0, CODEC_BYTES).unwrap()
}

/// A compressed chunk. Of the first byte, bit 0 is the format; bit 1 says whether what follows is to be decoded, or is
/// compressed first.
pub fn codec(input: &[u8]) {
    static MEMORY: LazyLock<Mutex<[Extent; 2]>> = LazyLock::new(|| Mutex::new([guarded(), guarded()]));
    let Some((&how, input)) = input.split_first() else { return };
    let format = Format::ALL[usize::from(how & 1)];
    let plain = (how & 2 != 0).then_some(input);
    let frame = match plain {
        Some(plain) => match encode(format, plain) {
            Some(frame) => frame,
            None => return,
        },
        None => input.to_vec(),
    };
    // As many elements as it claims to have, or some: the manifest says how many, and need not agree.
    let claimed = frame.get(4..8).map_or(0, |bytes| u32::from_le_bytes(bytes.try_into().unwrap()) as usize);
    let bytes = claimed.saturating_mul(2).min(CODEC_BYTES);
    let mut memory = MEMORY.lock().unwrap();
    let [from, to] = &mut *memory;
    let from = from.host_bytes_mut().unwrap();
    let Some(start) = from.len().checked_sub(frame.len()) else { return };
    let stored = &mut from[start..];
    stored.copy_from_slice(&frame);
    let mut first = None;
    for isa in Isa::available() {
        let to = to.host_bytes_mut().unwrap();
        let end = to.len();
        let result = decode_with(isa, format, stored, &mut to[end - bytes..]);
        if let Some(plain) = plain {
            assert_eq!(result, Ok(()), "what was compressed decodes, by {}", isa.name());
            assert!(to[end - bytes..] == *plain, "and comes back, by {}", isa.name());
        }
        let outcome = result.map(|()| to[end - bytes..].to_vec());
        let first = first.get_or_insert_with(|| outcome.clone());
        assert!(*first == outcome, "{} decodes as the others do", isa.name());
    }
}
