//! The executor alone, without pool and node: what a first token takes when nothing has to be decided, leased or sampled.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use tangram_device::cuda::{CudaConfig, CudaDevice, Driver};
use tangram_device::{Arena, Claim, Contents, Extent};
use tangram_engine::cuda::{CudaExecutor, load};
use tangram_engine::{Chunk, DeviceExecutor, LogitRows, Model, TensorDesc, Tensors, Whole};

use crate::report::percentile;
use crate::shapes::{Shape, fill, source};

const ROUNDS: usize = 12;
/// Tokens of a step, as the node has them on a GPU.
const STEP_TOKENS: usize = 1024;

struct Weights(Vec<Extent>);

impl Tensors for Weights {
    fn tensor(&self, index: usize) -> Option<&Extent> {
        self.0.get(index)
    }
}

/// Median seconds of a pass over a prompt of so many tokens, up to the logits of its last token on the host.
pub(crate) fn first_token(
    driver: &Arc<Driver>,
    shape: &Shape,
    path: &Path,
    prompt: usize,
) -> Result<f64, Box<dyn Error>> {
    let source = source(shape, path)?;
    let tensors = source.tensors().iter();
    let descs: Vec<TensorDesc> = tensors
        .map(|tensor| TensorDesc { role: tensor.role, dtype: tensor.dtype, shape: tensor.shape.clone() })
        .collect();
    let model = Model::new(source.spec().clone(), &descs)?;
    let kv = model.kv().ok_or("it generates nothing")?;
    let blocks = prompt.div_ceil(kv.block_tokens);
    let mut end = 0;
    let mut claims = Vec::new();
    let mut claim = |len: usize| {
        claims.push(Claim { offset: end, len });
        end = (end + len).next_multiple_of(512);
    };
    source.tensors().iter().for_each(|tensor| claim(tensor.bytes as usize));
    (0..blocks).for_each(|_| claim(kv.block_bytes));
    let config = CudaConfig { pool_bytes: Some(end + (64 << 20)), ..CudaConfig::new(0) };
    let device = CudaDevice::open(driver, &config)?;
    let executor = CudaExecutor::new(load(device.gpu())?)?;
    executor.prepare(&model, None, (64, STEP_TOKENS), prompt + STEP_TOKENS)?;
    let executor = DeviceExecutor::Cuda(Box::new(executor));
    let arena = Arena::segment(device.into_memory())?;
    let mut extents = arena.claim_all(&claims, Contents::Overwritten)?;
    let mut own = extents.split_off(source.tensors().len());
    let (fill, mut piece) = (fill(), vec![0; 8 << 20]);
    for extent in &mut extents {
        for at in (0..extent.len()).step_by(piece.len()) {
            let piece = &mut piece[..(8 << 20).min(extent.len() - at)];
            fill(piece);
            extent.write(at, piece)?;
        }
    }
    let weights = Weights(extents);
    let mut seconds = Vec::new();
    for round in 0..ROUNDS {
        let tokens: Vec<u32> =
            (0..prompt).map(|at| ((at * 7919 + round * 104_729) % shape.vocab) as u32).collect();
        let started = Instant::now();
        for at in (0..prompt).step_by(STEP_TOKENS) {
            let end = prompt.min(at + STEP_TOKENS);
            let logits = if end == prompt { LogitRows::Last } else { LogitRows::None };
            let chunk = Chunk { tokens: &tokens[at..end], position: at, logits };
            let whole = Whole { tokens: prompt, second: None };
            let mut pass = executor.begin(&model, &[chunk], &[whole], Vec::new(), &[None])?;
            let mut kv = [own.as_mut_slice().into()];
            if !executor.advance(&mut pass, &model, &weights, &mut kv, usize::MAX)? {
                return Err("the pass did not end".into());
            }
            executor.recycle(pass);
        }
        seconds.push(started.elapsed().as_secs_f64());
    }
    // The first ones are for warming up.
    Ok(percentile(seconds.into_iter().skip(2), 50))
}
