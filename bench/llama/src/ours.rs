//! Our executor over an imported checkpoint in an arena, as the node runs it.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use tangram_checkpoint::{DATA_FILE, Role};
use tangram_device::cpu::CpuDevice;
use tangram_device::{Arena, Extent};
use tangram_engine::{Chunk, Executor, KvBlocks, LogitRows, Model, TensorDesc, Weights};

use crate::{Clock, Engine, PROMPT, STEPS};

/// Room for keys and values.
const KV_BYTES: usize = 1 << 30;
const PAGE_BYTES: usize = 2 << 20;
/// Tokens of a KV block.
const BLOCK: usize = 16;

struct Stored {
    extent: Extent,
    places: Vec<(usize, usize)>,
}

impl Weights for Stored {
    fn tensor(&self, index: usize) -> &[u8] {
        let (offset, bytes) = self.places[index];
        self.extent.host_bytes().map_or(&[], |all| &all[offset..offset + bytes])
    }
}

/// A model and an executor.
pub struct Ours {
    executor: Executor,
    model: Model,
    weights: Stored,
    kv: Arc<Arena>,
    embedding_only: usize,
    clock: Clock,
}

impl Ours {
    /// Imports the file and reads its tensors into memory.
    pub fn open(file: &Path, threads: usize) -> Result<Ours> {
        let source = tangram_checkpoint::open(file)?;
        let dir = tempfile::tempdir()?;
        let manifest = tangram_checkpoint::import(&source, dir.path(), "bench", &|_| None, &mut |_| {
            ControlFlow::Continue(())
        })?;
        let data = std::fs::read(dir.path().join(DATA_FILE))?;
        let room = data.len().next_multiple_of(PAGE_BYTES);
        let arena = Arena::reserve(CpuDevice::open(room, PAGE_BYTES)?, room)?;
        let mut extent = arena.claim(0, room)?;
        extent.prepare_write();
        extent.host_bytes_mut().context("memory of the host")?[..data.len()].copy_from_slice(&data);
        let mut descs = Vec::new();
        let mut places = Vec::new();
        for entry in &manifest.tensors {
            descs.push(TensorDesc { role: entry.role, dtype: entry.dtype, shape: entry.shape.clone() });
            places.push((entry.offset as usize, entry.bytes as usize));
        }
        // An embedding that is not the output matrix too is not read as a whole.
        let output = descs.iter().any(|desc| desc.role == Role::Output);
        let embedding = descs.iter().position(|desc| desc.role == Role::TokenEmbedding);
        let embedding_only = embedding.filter(|_| output).map_or(0, |index| places[index].1);
        let model = Model::new(manifest.spec.clone(), &descs)?;
        let kv = Arena::reserve(CpuDevice::open(KV_BYTES, PAGE_BYTES)?, KV_BYTES)?;
        let weights = Stored { extent, places };
        let clock = Clock::for_threads(threads);
        Ok(Ours { executor: Executor::new(threads), model, weights, kv, embedding_only, clock })
    }

    /// Bytes of weights that a decoding step reads.
    pub fn step_bytes(&self) -> usize {
        self.weights.places.iter().map(|(_, bytes)| bytes).sum::<usize>() - self.embedding_only
    }

    fn sequences(&self, count: usize, tokens: usize) -> Result<Vec<Vec<Extent>>> {
        let bytes = self.model.kv().context("a model that generates")?.block_bytes;
        let blocks = tokens.div_ceil(BLOCK);
        let block = |i: usize| self.kv.claim(i * bytes, bytes);
        (0..count).map(|i| Ok((i * blocks..(i + 1) * blocks).map(block).collect::<Result<_, _>>()?)).collect()
    }

    /// Runs one batch and gives the logits of its last chunk to `read`.
    fn run(&self, batch: &[Chunk<'_>], kv: &mut [Vec<Extent>], read: &mut dyn FnMut(&[f32])) -> Result<()> {
        let mut kv: Vec<KvBlocks<'_>> = kv.iter_mut().map(|blocks| blocks.as_mut_slice().into()).collect();
        let mut pass = self.executor.begin(&self.model, batch)?;
        self.executor.advance(&mut pass, &self.model, &self.weights, &mut kv, usize::MAX)?;
        read(pass.logits(batch.len() - 1));
        self.executor.recycle(pass);
        Ok(())
    }
}

/// Token ids of a prompt that is the same for both engines.
pub fn prompt(tokens: usize) -> Vec<u32> {
    (0..tokens).map(|i| (i * 37 % 200 + 5) as u32).collect()
}

impl Engine for Ours {
    fn prefill(&mut self, tokens: usize) -> Result<f64> {
        let mut kv = self.sequences(1, tokens)?;
        let tokens = prompt(tokens);
        let start = self.clock.now();
        let chunk = Chunk { tokens: &tokens, position: 0, logits: LogitRows::Last };
        self.run(&[chunk], &mut kv, &mut |_| ())?;
        Ok(self.clock.now() - start)
    }

    fn decode(&mut self, batch: usize) -> Result<f64> {
        let mut kv = self.sequences(batch, PROMPT + STEPS)?;
        let tokens = prompt(PROMPT);
        let chunk = Chunk { tokens: &tokens, position: 0, logits: LogitRows::None };
        self.run(&vec![chunk; batch], &mut kv, &mut |_| ())?;
        let mut times = Vec::new();
        for step in 0..STEPS {
            let start = self.clock.now();
            let chunk = Chunk { tokens: &[7], position: PROMPT + step, logits: LogitRows::Last };
            self.run(&vec![chunk; batch], &mut kv, &mut |_| ())?;
            times.push(self.clock.now() - start);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[STEPS / 2])
    }

    fn loss(&mut self, tokens: &[u32]) -> Result<f64> {
        let mut kv = self.sequences(1, tokens.len())?;
        let width = self.model.spec().vocab;
        let chunk = Chunk { tokens, position: 0, logits: LogitRows::All };
        let mut loss = 0.0;
        self.run(&[chunk], &mut kv, &mut |logits| {
            loss = logits.chunks_exact(width).zip(&tokens[1..]).map(|(row, &next)| surprise(row, next)).sum();
        })?;
        Ok(loss / (tokens.len() - 1) as f64)
    }
}

/// −ln of the probability of a token.
pub fn surprise(logits: &[f32], token: u32) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - most).exp()).sum();
    most + sum.ln() - f64::from(logits[token as usize])
}

/// Bytes per second that `threads` threads read from memory.
pub fn read_bandwidth(threads: usize) -> f64 {
    const BYTES: usize = 256 << 20;
    let memory: Vec<Vec<u64>> = (0..threads).map(|i| vec![i as u64 + 1; BYTES / 8]).collect();
    let clock = Clock::for_threads(threads);
    let start = clock.now();
    std::thread::scope(|scope| {
        // The calling thread reads too: with one thread it is its processor time that counts.
        let (own, others) = memory.split_at(1);
        for part in others {
            scope.spawn(|| read(part));
        }
        own.iter().for_each(|part| read(part));
    });
    (BYTES * threads) as f64 / (clock.now() - start)
}

fn read(memory: &[u64]) {
    let mut sums = [0u64; 32];
    for line in memory.as_chunks::<32>().0 {
        for (sum, &word) in sums.iter_mut().zip(line) {
            *sum = sum.wrapping_add(word);
        }
    }
    std::hint::black_box(sums);
}
