//! How fast the kernels that matter are, in the shapes of Llama 3 8B, as shares of what must be moved and computed.
//!
//! Times are medians of rounds of launches that follow each other, so that a launch costs what it costs in a pass. Weights
//! are taken in turn from copies that do not fit into a cache together.
#![allow(unsafe_code)]

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use half::bf16;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};
use tangram_checkpoint::DType;
use tangram_device::DeviceError;
use tangram_engine::cuda::*;

/// Bytes that the copies of a matrix should have together.
const ROTATION: usize = 512 << 20;
const LAUNCHES: usize = 20;
const ROUNDS: usize = 7;

pub fn run(gpu: &Arc<dyn Launcher>) -> Result<(), Box<dyn Error>> {
    let kernels = Kernels::load(gpu.clone())?;
    println!("{:>6} {:>14} {:>7} {:>10} {:>9} {:>9}", "type", "matrix", "tokens", "us", "GB/s", "TFLOP/s");
    for dtype in [DType::BF16, DType::Q8_0, DType::Q4K] {
        for (rows, columns) in [(4096, 4096), (14336, 4096), (4096, 14336)] {
            products(gpu, &kernels, dtype, rows, columns)?;
        }
    }
    println!("{:>20} {:>10} {:>9} {:>9}", "attention", "us", "GB/s", "TFLOP/s");
    for (sequences, position, tokens) in [(1, 4095, 1), (32, 4095, 1), (1, 0, 2048), (1, 6144, 2048)] {
        attention(gpu, &kernels, sequences, position, tokens)?;
    }
    Ok(())
}

/// Seconds of one launch.
fn time(
    done: &Buffer,
    mut launch: impl FnMut(usize) -> Result<(), DeviceError>,
) -> Result<f64, Box<dyn Error>> {
    let mut seconds = Vec::new();
    for round in 0..ROUNDS + 2 {
        done.read(&mut [0; 4])?;
        let start = Instant::now();
        for index in 0..LAUNCHES {
            launch(round * LAUNCHES + index)?;
        }
        done.read(&mut [0; 4])?;
        seconds.push(start.elapsed().as_secs_f64() / LAUNCHES as f64);
    }
    // The first ones are for warming up.
    let mut seconds = seconds.split_off(2);
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[ROUNDS / 2])
}

/// Stored numbers of about 1; repeated from a piece of moderate size.
fn numbers(dtype: DType, bytes: usize) -> Vec<u8> {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
    let block = dtype.block_bytes() as usize;
    let mut piece = vec![0; block * (1 << 16)];
    random.fill_bytes(&mut piece);
    if dtype == DType::BF16 {
        for element in piece.as_chunks_mut().0 {
            let value = f32::from(u16::from_le_bytes(*element)) / 32768.0 - 1.0;
            *element = bf16::from_f32(value).to_le_bytes();
        }
    } else {
        // Factors at the front, small and positive.
        for block in piece.chunks_exact_mut(block) {
            (block[1], block[3]) = (0x10, 0x10);
        }
    }
    piece.into_iter().cycle().take(bytes).collect()
}

fn products(
    gpu: &Arc<dyn Launcher>,
    kernels: &Kernels,
    dtype: DType,
    rows: usize,
    columns: usize,
) -> Result<(), Box<dyn Error>> {
    let bytes = dtype.tensor_bytes(&[rows as u64, columns as u64]).unwrap_or(0) as usize;
    let stored = numbers(dtype, bytes);
    let copies = (0..ROTATION.div_ceil(bytes)).map(|_| Buffer::with(gpu, &stored));
    let copies = copies.collect::<Result<Vec<Buffer>, _>>()?;
    for tokens in [1, 8, 32, 128, 512, 2048] {
        let x = Buffer::with(gpu, &numbers(DType::BF16, tokens * columns * 2))?;
        let scales = Buffer::with(gpu, &1f32.to_le_bytes().repeat(tokens))?;
        let mut out = Buffer::new(gpu);
        let kind = ProductKind::for_tokens(tokens);
        let arguments = ProductArguments {
            x: x.address(),
            scales: if dtype == DType::BF16 { 0 } else { scales.address() },
            out: out.reserve(tokens * rows * 4)?,
            row_bytes: (bytes / rows) as u64,
            rows: rows as u32,
            columns: columns as u32,
            tokens: tokens as u32,
            aligned: 1,
            ..ProductArguments::default()
        };
        let seconds = time(&out, |index| {
            let arguments = ProductArguments { weight: copies[index % copies.len()].address(), ..arguments };
            // SAFETY: all buffers have their rows and columns.
            unsafe { kernels.product(kind, dtype, tokens.div_ceil(kind.tile_tokens()), &arguments) }
        })?;
        let operations = 2.0 * (rows * columns * tokens) as f64;
        println!(
            "{dtype:>6} {:>14} {tokens:>7} {:>10.1} {:>9.0} {:>9.1}",
            format!("{rows}x{columns}"),
            seconds * 1e6,
            bytes as f64 / seconds / 1e9,
            operations / seconds / 1e12,
        );
    }
    Ok(())
}

/// Sequences that go on by `tokens` tokens from `position` on: 32 heads of 128, eight key/value heads.
fn attention(
    gpu: &Arc<dyn Launcher>,
    kernels: &Kernels,
    sequences: usize,
    position: usize,
    tokens: usize,
) -> Result<(), Box<dyn Error>> {
    let (heads, kv_heads, head_dim, size) = (32, 8, 128, 3);
    let rows = sequences * tokens;
    let end = position + tokens;
    let blocks_each = end.div_ceil(16);
    let block_bytes = 2 * kv_heads * 16 * head_dim * 2;
    // Halves between −1 and 1 have the bits of small bf16 numbers: any finite values do.
    let values = numbers(DType::BF16, sequences * blocks_each * block_bytes);
    let cache = Buffer::with(gpu, &values)?;
    let query = Buffer::with(gpu, &numbers(DType::BF16, rows * heads * head_dim * 2))?;
    let words = |values: &[u32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let addresses: Vec<u8> = (0..sequences * blocks_each)
        .flat_map(|block| (cache.address() + (block * block_bytes) as u64).to_le_bytes())
        .collect();
    let blocks = Buffer::with(gpu, &addresses)?;
    let first_blocks: Vec<u32> = (0..sequences).map(|index| (index * blocks_each) as u32).collect();
    let first_block = Buffer::with(gpu, &words(&first_blocks))?;
    let of_rows: Vec<u32> = (0..rows).map(|row| (position + row % tokens) as u32).collect();
    let positions = Buffer::with(gpu, &words(&of_rows))?;

    let many = tokens > 1;
    let together = launch::heads_together(heads / kv_heads);
    let most = launch::attention_rows(size, many) / together;
    let partitions = end.div_ceil(256);
    let (mut items, mut merges) = (Vec::new(), Vec::new());
    for sequence in 0..sequences {
        if many {
            for first in (0..tokens).step_by(most).rev() {
                let count = most.min(tokens - first);
                items.extend([sequence * tokens + first, count, sequence, 0, u32::MAX as usize]);
            }
        } else {
            merges.extend([sequence, sequence * partitions, partitions].map(|number| number as u32));
            for part in 0..partitions {
                items.extend([sequence, 1, sequence, part, sequence * partitions + part]);
            }
        }
    }
    let items: Vec<u32> = items.into_iter().map(|number| number as u32).collect();
    let (on_gpu, of_merges) = (Buffer::with(gpu, &words(&items))?, Buffer::with(gpu, &words(&merges))?);
    let (mut out, mut partials) = (Buffer::new(gpu), Buffer::new(gpu));
    let out_address = out.reserve(rows * heads * head_dim * 4)?;
    let partials_address = partials.reserve(sequences * partitions * heads * (2 + head_dim) * 4)?;
    let attend = AttendArguments {
        query: query.address(),
        out: out_address,
        items: on_gpu.address(),
        positions: positions.address(),
        blocks: blocks.address(),
        first_block: first_block.address(),
        partials: partials_address,
        layer_offset: 0,
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        head_dim: head_dim as u32,
        window: 0,
        scale: 0.088,
        cap: 0.0,
    };
    let merge = MergeArguments {
        partials: partials_address,
        out: out_address,
        merges: of_merges.address(),
        heads: heads as u32,
        head_dim: head_dim as u32,
    };
    let seconds = time(&out, |_| {
        // SAFETY: items, merges, rows and blocks are there.
        unsafe {
            kernels.attend(size, many, items.len() / 5, &attend)?;
            if !many {
                kernels.attend_merge(launch::heads(merges.len() / 3, heads), &merge)?;
            }
        }
        Ok(())
    })?;
    let pairs: usize = (position + 1..=end).sum();
    println!(
        "{:>20} {:>10.1} {:>9.0} {:>9.1}",
        format!("{sequences} x {tokens} at {position}"),
        seconds * 1e6,
        (sequences * end * kv_heads * head_dim * 4) as f64 / seconds / 1e9,
        (sequences * pairs * heads * head_dim * 4) as f64 / seconds / 1e12,
    );
    Ok(())
}
