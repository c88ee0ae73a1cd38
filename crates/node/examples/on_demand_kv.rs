//! What taking KV on demand costs: decode with blocks from the pool as tokens need them, in either layout, against the
//! same decode with every block taken before the first step. `on_demand_kv [batch] [tokens] [rounds]`.

use std::error::Error;
use std::time::Instant;

use tangram_checkpoint::{
    Attention, DType, Hash, Mlp, ModelSpec, Norm, NormPlacement, Output, Rope, RopeScaling,
};
use tangram_device::Extent;
use tangram_device::cpu::CpuDevice;
use tangram_engine::{Chunk, Executor, KvBlocks, LogitRows, Model, TensorDesc, Weights};
use tangram_pool::{Backend, KvKey, Pool};

const POOL: usize = 2 << 30;

struct Bytes(Vec<Vec<u8>>);

impl Weights for Bytes {
    fn tensor(&self, index: usize) -> &[u8] {
        &self.0[index]
    }
}

/// Half the layers of Qwen2.5-0.5B, with a small vocabulary: little beside the KV takes time in it.
fn spec() -> ModelSpec {
    ModelSpec {
        family: "qwen2".into(),
        vocab: 4096,
        hidden: 896,
        intermediate: 4864,
        layers: 12,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        context: 4096,
        norm: Norm::Rms { epsilon: 1e-6 },
        norm_placement: NormPlacement::Pre,
        rope: Some(Rope { theta: 1e6, dims: 64, scaling: RopeScaling::None }),
        mlp: Mlp::GatedSilu,
        attention: Attention::Causal,
        output: Output::Logits { tied: true },
        ..ModelSpec::default()
    }
}

struct Bench {
    model: Model,
    weights: Bytes,
    executor: Executor,
}

impl Bench {
    /// Decodes `tokens` tokens in each of `batch` sequences; seconds per step, everything included.
    fn decode(
        &self,
        pool: &mut Pool,
        kv: KvKey,
        batch: usize,
        tokens: usize,
        before: bool,
    ) -> Result<f64, Box<dyn Error>> {
        let block_tokens = self.model.kv().ok_or("the model has no KV")?.block_tokens;
        let mut blocks: Vec<Vec<Extent>> = (0..batch).map(|_| Vec::new()).collect();
        if before {
            for own in &mut blocks {
                *own = pool.take_kv(kv, tokens.div_ceil(block_tokens))?;
            }
        }
        let start = Instant::now();
        for position in 0..tokens {
            let lacking = blocks.iter().filter(|own| own.len() * block_tokens <= position).count();
            let mut taken = pool.take_kv(kv, lacking)?.into_iter();
            for own in blocks.iter_mut().filter(|own| own.len() * block_tokens <= position) {
                own.extend(taken.next());
            }
            let chunks = vec![Chunk { tokens: &[7], position, logits: LogitRows::Last }; batch];
            let mut views: Vec<KvBlocks<'_>> =
                blocks.iter_mut().map(|own| own.as_mut_slice().into()).collect();
            let mut pass = self.executor.begin(&self.model, &chunks)?;
            self.executor.advance(&mut pass, &self.model, &self.weights, &mut views, usize::MAX)?;
            self.executor.recycle(pass);
        }
        let seconds = start.elapsed().as_secs_f64() / tokens as f64;
        for own in blocks {
            pool.give_kv(kv, own);
        }
        Ok(seconds)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<usize>());
    let mut number = |default: usize| args.next().transpose().map(|given| given.unwrap_or(default));
    let (batch, tokens, rounds) = (number(8)?, number(512)?, number(7)?);
    let spec = spec();
    let (mut descs, mut bytes) = (Vec::new(), Vec::new());
    for role in spec.required_roles() {
        let shape = spec.shape(role);
        let dtype = if shape.len() == 1 { DType::F32 } else { DType::BF16 };
        let len = dtype.tensor_bytes(&shape).ok_or("a tensor of impossible size")?;
        bytes.push(vec![0x2c; len as usize]);
        descs.push(TensorDesc { role, dtype, shape });
    }
    let model = Model::new(spec, &descs)?;
    let block_bytes = model.kv().ok_or("the model has no KV")?.block_bytes;
    let threads = std::thread::available_parallelism()?.get();
    let bench = Bench { model, weights: Bytes(bytes), executor: Executor::new(threads) };
    println!("{batch} sequences of {tokens} tokens, KV blocks of {block_bytes} bytes, {threads} threads");
    let mut pools = Vec::new();
    for (name, backend, page) in [
        ("paged, 4 KiB pages", Backend::Paged, 4 << 10),
        ("paged, 64 KiB pages", Backend::Paged, 64 << 10),
        ("paged, 2 MiB pages", Backend::Paged, 2 << 20),
        ("segment", Backend::Segment, 2 << 20),
    ] {
        let mut pool = Pool::new(CpuDevice::open(POOL, page)?, backend)?;
        let kv = pool.add_kv(Hash([0; 32]), block_bytes)?;
        pools.push((name, pool, kv, Vec::new()));
    }
    for _ in 0..rounds {
        for (_, pool, kv, ratios) in &mut pools {
            // Before and after, so that a machine that gets slower or faster meanwhile does not show.
            let first = bench.decode(pool, *kv, batch, tokens, true)?;
            let demand = bench.decode(pool, *kv, batch, tokens, false)?;
            let second = bench.decode(pool, *kv, batch, tokens, true)?;
            ratios.push((demand / (0.5 * (first + second)), demand));
        }
    }
    for (name, _, _, mut ratios) in pools {
        ratios.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (ratio, seconds) = ratios[ratios.len() / 2];
        println!(
            "{name:20} {:8.3} ms per step on demand, {:+.2} % against all blocks taken before ({:+.2} to {:+.2})",
            seconds * 1e3,
            (ratio - 1.0) * 100.0,
            (ratios[0].0 - 1.0) * 100.0,
            (ratios[ratios.len() - 1].0 - 1.0) * 100.0,
        );
    }
    Ok(())
}
