//! Writes the models of the measurements in `docs/measurements/`: six random bf16 decoders, two of which are copies
//! of another with one layer changed, as a fine-tune of that layer would be. Equal on every machine.
//!
//! ```text
//! cargo run --release -p tangram-testkit --example write_models -- DIRECTORY
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;

use tangram_testkit::{Family, Float, RandomModel, mutate_layer, write_hf_model};

fn main() {
    let directory = std::env::args().nth(1).expect("usage: write_models DIRECTORY");
    let directory = Path::new(&directory);
    let model = |family: Family, hidden: usize, layers: usize, seed: u64| RandomModel {
        family,
        hidden,
        intermediate: hidden * 11 / 4,
        layers,
        heads: hidden / 64,
        kv_heads: hidden / 128,
        head_dim: 64,
        vocab: 8192,
        context: 4096,
        dtype: Float::BF16,
        tied: true,
        seed,
        ..RandomModel::tiny(family)
    };
    for (name, model) in [
        ("llama-large", model(Family::Llama, 512, 10, 1)),
        ("qwen2-medium", model(Family::Qwen2, 512, 6, 2)),
        ("qwen3-medium", model(Family::Qwen3, 384, 10, 3)),
        ("llama-small", model(Family::Llama, 256, 8, 4)),
    ] {
        write_hf_model(&directory.join(name), &model);
    }
    let base = directory.join("llama-large");
    mutate_layer(&base, &directory.join("llama-large-tuned-2"), 2);
    mutate_layer(&base, &directory.join("llama-large-tuned-7"), 7);
}
