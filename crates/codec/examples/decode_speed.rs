//! How small tensors become and how fast they come back, on one core, by processor time.
//!
//! `cargo run --release -p tangram-codec --example decode_speed -- [bf16|f16] [FILE]...`
//!
//! Each file holds nothing but elements of that format. Without files: normally distributed weights and random bits.
#![allow(clippy::expect_used)]

use std::hint::black_box;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rustix::time::{ClockId, clock_gettime};
use tangram_codec::{Format, Isa, decode_with, encode};

/// Bytes compressed at a time: what the store reads at a time.
const CHUNK: usize = 2 << 20;
/// Repetitions, of which the fastest counts.
const RUNS: usize = 15;

/// Processor seconds of this thread.
fn processor_seconds() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// The least processor time of several runs, in seconds.
fn fastest(mut run: impl FnMut()) -> f64 {
    let seconds = (0..RUNS).map(|_| {
        let before = processor_seconds();
        run();
        processor_seconds() - before
    });
    seconds.fold(f64::INFINITY, f64::min)
}

/// Normally distributed weights of one scale.
fn weights(format: Format, elements: usize) -> Vec<u8> {
    let mut random = SmallRng::seed_from_u64(1);
    let mut normal = || {
        let (radius, angle) = (random.random::<f32>().max(1e-30), random.random::<f32>());
        0.02 * (-2.0 * radius.ln()).sqrt() * (std::f32::consts::TAU * angle).cos()
    };
    let bits = |value: f32| match format {
        Format::Bf16 => half::bf16::from_f32(value).to_bits(),
        Format::F16 => half::f16::from_f32(value).to_bits(),
    };
    (0..elements).flat_map(|_| bits(normal()).to_le_bytes()).collect()
}

/// Bits per element that the exponents carry, by chunk.
fn entropy(format: Format, plain: &[u8]) -> f64 {
    let (bits, mask) = match format {
        Format::Bf16 => (7, 255),
        Format::F16 => (10, 31),
    };
    let mut counts = [0u64; 256];
    for &bytes in plain.as_chunks().0 {
        counts[usize::from(u16::from_le_bytes(bytes) >> bits & mask)] += 1;
    }
    let total = (plain.len() / 2) as f64;
    counts
        .iter()
        .filter(|&&count| count > 0)
        .map(|&count| (total / count as f64).log2() * count as f64 / total)
        .sum()
}

fn measure(name: &str, format: Format, plain: &[u8]) {
    let plain = &plain[..plain.len() & !1];
    let chunks: Vec<&[u8]> = plain.chunks(CHUNK).collect();
    let before = processor_seconds();
    let frames: Vec<Option<Vec<u8>>> = chunks.iter().map(|chunk| encode(format, chunk)).collect();
    let encoding = processor_seconds() - before;
    let stored: usize = frames.iter().zip(&chunks).map(|(f, c)| f.as_ref().map_or(c.len(), Vec::len)).sum();
    let left = frames.iter().filter(|frame| frame.is_none()).count();
    println!(
        "{name}: {} bytes as {format:?} -> {:.2} % ({left} of {} chunks plain); exponents {:.3} bits of entropy per \
         element; encoding {:.2} GB/s",
        plain.len(),
        100.0 * stored as f64 / plain.len() as f64,
        chunks.len(),
        entropy(format, plain),
        plain.len() as f64 / encoding / 1e9
    );
    let mut out = vec![0u8; CHUNK];
    let copying = fastest(|| {
        for chunk in &chunks {
            out[..chunk.len()].copy_from_slice(black_box(chunk));
        }
    });
    print!("  GB/s of output on one core: copy {:.1}", plain.len() as f64 / copying / 1e9);
    for isa in Isa::available() {
        let decoding = fastest(|| {
            for (frame, chunk) in frames.iter().zip(&chunks) {
                let out = &mut out[..chunk.len()];
                match frame {
                    Some(frame) => decode_with(isa, format, black_box(frame), out).expect("sound"),
                    None => out.copy_from_slice(black_box(chunk)),
                }
            }
        });
        print!(", {} {:.2}", isa.name(), plain.len() as f64 / decoding / 1e9);
    }
    println!();
}

fn main() {
    let mut arguments = std::env::args().skip(1).peekable();
    let format = match arguments.next_if(|argument| matches!(argument.as_str(), "bf16" | "f16")).as_deref() {
        Some("f16") => Format::F16,
        _ => Format::Bf16,
    };
    if arguments.peek().is_none() {
        measure("normal", format, &weights(format, 32 << 20));
        let mut random = SmallRng::seed_from_u64(2);
        measure("random bits", format, &(0..16 << 20).map(|_| random.random()).collect::<Vec<u8>>());
        return;
    }
    for path in arguments {
        match std::fs::read(&path) {
            Ok(plain) => measure(&path, format, &plain),
            Err(error) => eprintln!("{path}: {error}"),
        }
    }
}
