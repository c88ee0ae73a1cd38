//! Measures what adapters cost: 32 sequences in one batch, spread over 16 adapters of one base, against 32 sequences of
//! the base itself; and which bytes the adapters load.
//!
//! `cargo run --release -p tangram-node --example adapters -- MODEL [RANK] [all|attention|qv] [f32|bf16]`
//!
//! MODEL is a decoder with Llama's module names: Hugging Face directory or .gguf file. The adapters are random. Rounds
//! of base and adapters take turns; a round's prompts are new, so that no cached prefix helps.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use tangram_checkpoint::{LayerRole, LowRank, ModelSpec, Role};
use tangram_node::{DeployedModel, GenerateEvent, GenerateRequest, Node, NodeConfig, SamplingParams};
use tangram_testkit::{Float, RandomAdapter, write_adapter_of};

const ADAPTERS: usize = 16;
const SEQUENCES: usize = 32;
const PROMPT_TOKENS: u32 = 8;
const OUTPUT_TOKENS: usize = 32;
const ROUNDS: u32 = 3;

/// The modules of a model with Llama's names: name, outputs, inputs.
fn modules(spec: &ModelSpec, which: &str) -> Vec<(String, usize, usize)> {
    let module = |layer: u32, matrix: LayerRole| {
        let name = match matrix {
            LayerRole::Query => "self_attn.q_proj",
            LayerRole::Key => "self_attn.k_proj",
            LayerRole::Value => "self_attn.v_proj",
            LayerRole::AttnOut => "self_attn.o_proj",
            LayerRole::Gate => "mlp.gate_proj",
            LayerRole::Up => "mlp.up_proj",
            _ => "mlp.down_proj",
        };
        let shape = spec.shape(Role::Layer(layer, matrix));
        (format!("model.layers.{layer}.{name}"), shape[0] as usize, shape[1] as usize)
    };
    let matrices = match which {
        "qv" => vec![LayerRole::Query, LayerRole::Value],
        "attention" => LowRank::MATRICES[..4].to_vec(),
        _ => LowRank::MATRICES.to_vec(),
    };
    (0..spec.layers as u32)
        .flat_map(|layer| matrices.iter().map(move |&matrix| (layer, matrix)))
        .map(|(layer, matrix)| module(layer, matrix))
        .collect()
}

/// Runs a round: 32 sequences over these models. Gives tokens per second and the bytes loaded.
fn round(node: &Node, models: &[Arc<DeployedModel>], seed: u32) -> (f64, u64) {
    let started = Instant::now();
    let running: Vec<_> = (0..SEQUENCES)
        .map(|index| {
            let token = |i| 100 + (seed * 7919 + index as u32 * 613 + i * 31) % 20_000;
            let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
            let request = GenerateRequest {
                model: models[index % models.len()].clone(),
                prompt: (0..PROMPT_TOKENS).map(token).collect(),
                sampling,
                max_tokens: Some(OUTPUT_TOKENS),
                ignore_eos: true,
                stop_token_ids: Vec::new(),
                grammar: None,
            };
            node.generate(request).unwrap()
        })
        .collect();
    let mut loaded = 0;
    for mut generation in running {
        while let Some(event) = generation.next_blocking() {
            match event {
                GenerateEvent::Finished { timing, .. } => loaded += timing.bytes_loaded,
                GenerateEvent::Failed(error) => panic!("{error}"),
                _ => {}
            }
        }
    }
    ((SEQUENCES * OUTPUT_TOKENS) as f64 / started.elapsed().as_secs_f64(), loaded)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let source = arguments.next().expect("MODEL");
    let rank: usize = arguments.next().map_or(16, |rank| rank.parse().expect("a rank"));
    let which = arguments.next().unwrap_or("all".to_owned());
    let dtype = if arguments.next().as_deref() == Some("f32") { Float::F32 } else { Float::BF16 };
    let data = tempfile::tempdir().unwrap();
    let node = Node::open(NodeConfig::new(data.path().join("data"), 2 << 30)).unwrap();
    let go_on = &mut |_| ControlFlow::Continue(());
    let base = node.deploy("base", Path::new(&source), go_on).unwrap();
    let modules = modules(&base.spec, &which);
    let modules: Vec<_> = modules.iter().map(|(name, out, inputs)| (name.as_str(), *out, *inputs)).collect();
    let adapters: Vec<_> = (0..ADAPTERS)
        .map(|index| {
            let dir = data.path().join(format!("peft-{index}"));
            let adapter = RandomAdapter { rank, dtype, ..RandomAdapter::new(index as u64) };
            write_adapter_of(&modules, &dir, &adapter);
            node.deploy_adapter(&format!("adapter-{index}"), &dir, "base", go_on).unwrap()
        })
        .collect();
    let own: u64 = adapters.iter().map(|adapter| adapter.weight_bytes - base.weight_bytes).sum();
    round(&node, std::slice::from_ref(&base), 0);
    let (_, loaded) = round(&node, &adapters, 1);
    let (mut of_base, mut of_adapters) = (Vec::new(), Vec::new());
    for index in 0..ROUNDS {
        of_base.push(round(&node, std::slice::from_ref(&base), 2 + 2 * index).0);
        of_adapters.push(round(&node, &adapters, 3 + 2 * index).0);
    }
    let spread = |values: &[f64]| {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        format!("{low:.0} to {:.0}", values.iter().copied().fold(0.0, f64::max))
    };
    println!(
        "{ADAPTERS} adapters of rank {rank} ({which}, {}), {} bytes each, on {} bytes of base: {loaded} bytes were \
         loaded for them, {own} are theirs",
        if dtype == Float::F32 { "f32" } else { "bf16" },
        own / ADAPTERS as u64,
        base.weight_bytes
    );
    println!("base     {:7.1} tokens/s ({})", median(of_base.clone()), spread(&of_base));
    println!("adapters {:7.1} tokens/s ({})", median(of_adapters.clone()), spread(&of_adapters));
    println!("share    {:7.1} %", 100.0 * median(of_adapters) / median(of_base));
}
