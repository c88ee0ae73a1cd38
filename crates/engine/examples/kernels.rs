//! Speed of matrix products per weight type and number of tokens: `kernels [threads] [instruction set] [type]`.

use std::time::Instant;

use tangram_checkpoint::DType;
use tangram_engine::kernels::matmul::{Linear, matmul};
use tangram_engine::kernels::{Buffer, Isa};
use tangram_engine::pool::Pool;

const COLUMNS: usize = 1024;
const ROWS: usize = 4096;
/// Matrices per type, so that together they fit no cache.
const BYTES: usize = 128 << 20;
/// Calls of which the fastest counts.
const CALLS: usize = 60;

fn main() {
    let threads = std::env::args().nth(1).and_then(|arg| arg.parse().ok()).unwrap_or(2);
    let name = std::env::args().nth(2);
    let named = |isa: &Isa| name.as_deref() == Some(isa.name());
    let only = std::env::args().nth(3);
    let isa = Isa::available().into_iter().find(named).unwrap_or(Isa::detect());
    let pool = Pool::new(threads);
    println!("{} with {threads} threads, {ROWS} rows of {COLUMNS} columns", isa.name());
    println!("type     tokens   GFLOP/s      GB/s");
    for dtype in [
        DType::F32,
        DType::F16,
        DType::BF16,
        DType::Q8_0,
        DType::Q4_0,
        DType::Q4_1,
        DType::Q5_0,
        DType::Q2K,
        DType::Q3K,
        DType::Q4K,
        DType::Q5K,
        DType::Q6K,
        DType::Iq4Nl,
    ] {
        if only.as_ref().is_some_and(|only| *only != dtype.to_string()) {
            continue;
        }
        let Some(bytes) = dtype.tensor_bytes(&[ROWS as u64, COLUMNS as u64]) else { continue };
        // 0x2c is a small number in every type and at every place.
        let matrices = vec![vec![0x2cu8; bytes as usize]; BYTES / bytes as usize];
        for tokens in [1, 2, 4, 8, 16, 64, 512] {
            let x = vec![0.5f32; tokens * COLUMNS];
            let mut out = vec![0.0f32; tokens * ROWS];
            let mut packed = Buffer::new();
            let calls = if tokens < 64 { CALLS } else { CALLS / 4 };
            // Single calls, so that on a busy machine some are not interrupted.
            let seconds = (0..calls)
                .map(|call| {
                    let weight = &matrices[call % matrices.len()];
                    let start = Instant::now();
                    let linear =
                        Linear { weight, dtype, rows: ROWS, bias: None, out: &mut out, accumulate: false };
                    matmul(isa, &pool, &mut packed, &x, COLUMNS, tokens, [linear]);
                    start.elapsed().as_secs_f64()
                })
                .fold(f64::INFINITY, f64::min);
            let flop = 2.0 * (ROWS * COLUMNS * tokens) as f64;
            let read = bytes as f64;
            println!("{dtype:8} {tokens:6} {:9.1} {:9.1}", flop / seconds / 1e9, read / seconds / 1e9);
        }
    }
}
