//! Writes the random models that `bench/servers/router.sh` switches between: five GGUF files of 0.2 to 0.5 billion
//! parameters, two of which are another one with one layer changed. Equal on every machine. Takes 5 GB of memory.
//!
//! ```text
//! cargo run --release -p tangram-testkit --example write_router_models -- DIRECTORY
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;

use tangram_testkit::{Family, GgmlType, GgufOptions, RandomModel, write_gguf, write_tuned_gguf};

fn main() {
    let directory = std::env::args().nth(1).expect("usage: write_router_models DIRECTORY");
    let directory = Path::new(&directory);
    std::fs::create_dir_all(directory).unwrap();
    let file = |name: &str| directory.join(format!("{name}.gguf"));
    let options = |dtype: GgmlType| GgufOptions { version: 3, dtype };
    let model = |family: Family, hidden: usize, layers: usize, vocab: usize, seed: u64| RandomModel {
        family,
        hidden,
        intermediate: hidden * 4,
        layers,
        heads: hidden / 64,
        kv_heads: hidden / 128,
        head_dim: 64,
        vocab,
        context: 4096,
        tied: true,
        seed,
        ..RandomModel::tiny(family)
    };
    let base = model(Family::Llama, 1024, 16, 32_000, 1);
    write_gguf(&file("llama"), &base, options(GgmlType::Q8_0));
    for (name, layer) in [("llama-tuned-4", 4), ("llama-tuned-11", 11)] {
        write_tuned_gguf(&file(name), &base, options(GgmlType::Q8_0), layer, 100 + layer as u64);
    }
    // The shape of Qwen2.5-0.5B.
    let large = RandomModel {
        intermediate: 4864,
        heads: 14,
        kv_heads: 2,
        ..model(Family::Qwen2, 896, 24, 151_936, 2)
    };
    write_gguf(&file("qwen2"), &large, options(GgmlType::Q8_0));
    write_gguf(&file("qwen3"), &model(Family::Qwen3, 1024, 20, 32_000, 3), options(GgmlType::Q4_0));
}
