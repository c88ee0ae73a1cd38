//! Speed of whole forward passes with random weights in the shape of Qwen2.5-0.5B, and what the measured rates of the
//! kernels predict: `model [threads] [type]`.

use std::error::Error;
use std::ops::Range;
use std::time::Instant;

use tangram_checkpoint::{
    Attention, DType, Mlp, ModelSpec, Norm, NormPlacement, Output, Role, Rope, RopeScaling,
};
use tangram_device::cpu::CpuDevice;
use tangram_device::{Arena, Extent};
use tangram_engine::{Chunk, Executor, KvBlocks, LogitRows, Model, Rates, TensorDesc, Weights};

struct Bytes(Vec<Vec<u8>>);

impl Weights for Bytes {
    fn tensor(&self, index: usize) -> &[u8] {
        &self.0[index]
    }
}

fn spec() -> ModelSpec {
    ModelSpec {
        family: "qwen2".into(),
        vocab: 151_936,
        hidden: 896,
        intermediate: 4864,
        layers: 24,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        context: 4096,
        norm: Norm::Rms { epsilon: 1e-6 },
        norm_placement: NormPlacement::Pre,
        qk_norm: false,
        rope: Some(Rope { theta: 1e6, dims: 64, scaling: RopeScaling::None }),
        learned_positions: None,
        token_types: None,
        mlp: Mlp::GatedSilu,
        attention: Attention::Causal,
        output: Output::Logits { tied: true },
        ..ModelSpec::default()
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let threads = args.next().and_then(|arg| arg.parse().ok()).unwrap_or(2);
    let dtype = match args.next().as_deref() {
        Some("f32") => DType::F32,
        Some("f16") => DType::F16,
        Some("q8_0") => DType::Q8_0,
        Some("q4_0") => DType::Q4_0,
        Some("q4_1") => DType::Q4_1,
        _ => DType::BF16,
    };
    let spec = spec();
    let mut descs = Vec::new();
    let mut bytes = Vec::new();
    for role in spec.required_roles() {
        let shape = spec.shape(role);
        let dtype = if shape.len() == 1 { DType::F32 } else { dtype };
        let len = dtype.tensor_bytes(&shape).ok_or("a tensor of impossible size")?;
        // 0x2c and 0x3c are small numbers in every type and at every place.
        bytes.push(vec![if matches!(role, Role::Layer(..)) { 0x2c } else { 0x3c }; len as usize]);
        descs.push(TensorDesc { role, dtype, shape });
    }
    let weight_bytes: usize = bytes.iter().map(Vec::len).sum();
    let model = Model::new(spec, &descs)?;
    let weights = Bytes(bytes);
    let executor = Executor::new(threads);
    let start = Instant::now();
    let mut rates = Rates::measure(&executor);
    rates.measure_weights(&executor, &[dtype, DType::F32]);
    println!("rates measured in {:.0} ms", start.elapsed().as_secs_f64() * 1e3);
    let predicted = |chunks: &[Range<usize>]| -> Option<f64> {
        model.work(chunks, chunks.len()).iter().map(|stage| rates.seconds(stage)).sum()
    };
    let block_bytes = model.kv().ok_or("no KV layout")?.block_bytes;
    let memory = CpuDevice::open(1 << 30, 2 << 20)?;
    let arena = Arena::reserve(memory, 1 << 30)?;
    let mut next = 0;
    let mut sequence = |tokens: usize| -> Result<Vec<Extent>, Box<dyn Error>> {
        let mut blocks = Vec::new();
        for _ in 0..tokens.div_ceil(16) {
            blocks.push(arena.claim(next, block_bytes)?);
            next += block_bytes;
        }
        Ok(blocks)
    };
    println!("{dtype} with {threads} threads, {:.2} GB of weights", weight_bytes as f64 / 1e9);
    for count in [128, 512, 2048] {
        let mut blocks = sequence(count)?;
        let tokens = vec![7u32; count];
        let chunk = Chunk { tokens: &tokens, position: 0, logits: LogitRows::Last };
        let mut best = f64::INFINITY;
        for _ in 0..2 {
            let start = Instant::now();
            let mut pass = executor.begin(&model, &[chunk])?;
            executor.advance(&mut pass, &model, &weights, &mut [blocks.as_mut_slice().into()], usize::MAX)?;
            executor.recycle(pass);
            best = best.min(start.elapsed().as_secs_f64());
        }
        let predicted = predicted(std::slice::from_ref(&(0..count))).ok_or("a type without a rate")?;
        println!(
            "prefill {count:4}: {:8.1} tokens/s ({:.1} predicted)",
            count as f64 / best,
            count as f64 / predicted
        );
    }
    for batch in [1, 4, 8] {
        let mut blocks = (0..batch).map(|_| sequence(256)).collect::<Result<Vec<_>, _>>()?;
        let mut times = Vec::new();
        for position in 100..132 {
            let chunks = vec![Chunk { tokens: &[7], position, logits: LogitRows::Last }; batch];
            let mut kv: Vec<KvBlocks<'_>> =
                blocks.iter_mut().map(|blocks| blocks.as_mut_slice().into()).collect();
            let start = Instant::now();
            let mut pass = executor.begin(&model, &chunks)?;
            executor.advance(&mut pass, &model, &weights, &mut kv, usize::MAX)?;
            executor.recycle(pass);
            times.push(start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let (best, median) = (times[0], times[times.len() / 2]);
        let predicted = predicted(&vec![116..117; batch]).ok_or("a type without a rate")?;
        println!(
            "decode of {batch}: {:8.1} tokens/s (best {:.1}, {:.1} predicted, {:.1} GB/s)",
            batch as f64 / median,
            batch as f64 / best,
            batch as f64 / predicted,
            weight_bytes as f64 / best / 1e9
        );
    }
    Ok(())
}
