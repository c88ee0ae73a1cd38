//! What serving costs on a GPU: deploying, cold and resident first tokens, prefill and decoding of random models in the
//! shapes of known ones, which are written first. Prints a line of JSON per finding; needs the NVIDIA driver alone.
//!
//! ```text
//! cargo build --release -p tangram-node --example gpu_serving
//! target/release/examples/gpu_serving DIRECTORY [SHAPE...]
//! ```
//!
//! A model takes as much of the disk as it has weights, and is removed at the end. "Cold" is from the page cache: the
//! file was just written and read.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};
use serde_json::json;
use tangram_device::cuda::Driver;
use tangram_node::{
    DeployedModel, Device, GenerateEvent, GenerateRequest, Node, NodeConfig, SamplingParams, Timing,
};

/// A decoder of Llama's family.
#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
    /// Tokens of the prompts whose first token is timed.
    prompt: usize,
}

const SHAPES: [Shape; 4] = [
    // For trying the program out where there is only the stand-in of the driver.
    Shape {
        name: "tiny",
        hidden: 64,
        intermediate: 96,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        vocab: 320,
        prompt: 16,
    },
    Shape {
        name: "llama-3.2-1b",
        hidden: 2048,
        intermediate: 8192,
        layers: 16,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        vocab: 128_256,
        prompt: 1024,
    },
    Shape {
        name: "llama-3-8b",
        hidden: 4096,
        intermediate: 14_336,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        vocab: 128_256,
        prompt: 1024,
    },
    Shape {
        name: "qwen2-14b",
        hidden: 5120,
        intermediate: 13_824,
        layers: 48,
        heads: 40,
        kv_heads: 8,
        head_dim: 128,
        vocab: 152_064,
        prompt: 1024,
    },
];

/// Shapes that are measured unless others are named.
const USUAL: [&str; 2] = ["llama-3.2-1b", "llama-3-8b"];
/// Times that a first token is measured.
const ROUNDS: usize = 5;
/// Cold starts of a model; each begins with an empty pool.
const COLD_ROUNDS: usize = 3;
/// Sequences that decode together.
const BATCHES: [usize; 2] = [1, 32];
const DECODED: usize = 64;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().ok_or("usage: gpu_serving DIRECTORY [SHAPE...]")?;
    let mut names: Vec<String> = arguments.collect();
    if names.is_empty() {
        names.extend(USUAL.map(str::to_owned));
    }
    let driver = Driver::load()?;
    println!("{}", json!({ "gpu": driver.gpu_name(0)?, "cuda": format!("{:?}", driver.cuda_version()) }));
    for name in names {
        let shape = SHAPES.iter().find(|shape| shape.name == name).ok_or(format!("no shape '{name}'"))?;
        let path = Path::new(&directory).join(shape.name);
        let measured = measure(&driver, shape, &path);
        let _ = std::fs::remove_dir_all(&path);
        measured?;
    }
    Ok(())
}

fn measure(driver: &Arc<Driver>, shape: &Shape, path: &Path) -> Result<(), Box<dyn Error>> {
    let (source, data) = (path.join("source"), path.join("data"));
    let started = Instant::now();
    let bytes = write(shape, &source)?;
    let say = |finding: &str, value: serde_json::Value| {
        println!("{}", json!({ "shape": shape.name, "finding": finding, "value": value }));
    };
    say("written", json!({ "bytes": bytes, "seconds": started.elapsed().as_secs_f64() }));
    let open = || {
        let device = Device::Cuda { driver: driver.clone(), ordinal: 0 };
        let config = NodeConfig { device, device_memory: None, ..NodeConfig::new(data.clone(), 0) };
        Node::open(config)
    };
    let started = Instant::now();
    let mut node = open()?;
    say(
        "node_opened",
        json!({ "seconds": started.elapsed().as_secs_f64(), "pool_bytes": node.pool_bytes() }),
    );
    let started = Instant::now();
    node.deploy_in_place("m", &source, &mut |_| ControlFlow::Continue(()))?;
    say("deployed", json!({ "seconds": started.elapsed().as_secs_f64() }));
    for _ in 0..COLD_ROUNDS {
        let model = node.model("m").ok_or("the model is gone")?;
        let (timing, _) = generate(&node, &model, shape.prompt, 1, 1)?.remove(0);
        say("cold_first_token", first_token(&timing));
        drop(model);
        drop(node);
        // Threads that read for it end a moment later, and hold the memory until then.
        std::thread::sleep(Duration::from_millis(500));
        node = open()?;
    }
    let model = node.model("m").ok_or("the model is gone")?;
    generate(&node, &model, shape.prompt, 1, 1)?;
    for round in 0..ROUNDS {
        // Other tokens each time, or the prefix would be found.
        let (timing, _) = generate(&node, &model, shape.prompt, 1, 2 + round)?.remove(0);
        say("resident_first_token", first_token(&timing));
    }
    let (timing, _) = generate(&node, &model, 2 * shape.prompt, 1, 20)?.remove(0);
    let tokens_per_second = (2 * shape.prompt) as f64 / timing.prefill.as_secs_f64();
    say("prefill", json!({ "tokens": 2 * shape.prompt, "tokens_per_second": tokens_per_second }));
    for batch in BATCHES {
        let all = many(&node, &model, batch)?;
        let seconds = all.iter().map(|(_, seconds)| *seconds).fold(0.0, f64::max);
        let tokens = (batch * (DECODED - 1)) as f64;
        // What is read of the weights once per step, whatever the batch.
        let weights = (model.weight_bytes as f64) * (DECODED - 1) as f64 / seconds;
        say(
            "decoding",
            json!({
                "sequences": batch, "tokens_per_second": tokens / seconds, "weight_bytes_per_second": weights
            }),
        );
    }
    say("status", json!({ "scratch_bytes": node.status().scratch_bytes }));
    Ok(())
}

fn first_token(timing: &Timing) -> serde_json::Value {
    json!({
        "seconds": timing.first_token.as_secs_f64(), "load_seconds": timing.load.as_secs_f64(),
        "computing_seconds": timing.prefill.as_secs_f64(), "bytes_loaded": timing.bytes_loaded,
    })
}

fn ask(model: &Arc<DeployedModel>, prompt: usize, tokens: usize, seed: usize) -> GenerateRequest {
    let id = |at: usize| ((at * 7919 + seed * 104_729) % model.spec.vocab) as u32;
    GenerateRequest {
        model: model.clone(),
        prompt: (0..prompt).map(id).collect(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens: Some(tokens),
        ignore_eos: true,
        stop_token_ids: Vec::new(),
        grammar: None,
    }
}

/// The timing of one request, and the seconds from its first token to its last.
type Run = (Timing, f64);

fn generate(
    node: &Node,
    model: &Arc<DeployedModel>,
    prompt: usize,
    tokens: usize,
    seed: usize,
) -> Result<Vec<Run>, Box<dyn Error>> {
    collect(vec![node.generate(ask(model, prompt, tokens, seed))?])
}

/// Sequences that decode together, from prompts of a block each.
fn many(node: &Node, model: &Arc<DeployedModel>, count: usize) -> Result<Vec<Run>, Box<dyn Error>> {
    let requests = (0..count).map(|index| node.generate(ask(model, 16, DECODED, 100 + index)));
    collect(requests.collect::<Result<Vec<_>, _>>()?)
}

fn collect(generations: Vec<tangram_node::Generation>) -> Result<Vec<Run>, Box<dyn Error>> {
    let mut runs = Vec::new();
    for mut generation in generations {
        loop {
            match generation.next_blocking() {
                Some(GenerateEvent::Finished { timing, .. }) => {
                    runs.push((timing, timing.decode.as_secs_f64()));
                    break;
                }
                Some(GenerateEvent::Failed(error)) => return Err(error.into()),
                Some(_) => {}
                None => return Err("a generation ended without an end".into()),
            }
        }
    }
    Ok(runs)
}

/// Writes a random bf16 model, as fast as the disk takes it; gives its bytes.
fn write(shape: &Shape, path: &Path) -> Result<u64, Box<dyn Error>> {
    std::fs::create_dir_all(path)?;
    let Shape { hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, prompt, .. } = *shape;
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "max_position_embeddings": (4 * prompt).max(256), "hidden_act": "silu",
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "eos_token_id": 2, "bos_token_id": 1,
    });
    std::fs::write(path.join("config.json"), config.to_string())?;
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![vocab, hidden])];
    for layer in 0..layers {
        let mut add = |name: &str, shape: Vec<usize>| {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape));
        };
        add("input_layernorm", vec![hidden]);
        add("self_attn.q_proj", vec![heads * head_dim, hidden]);
        add("self_attn.k_proj", vec![kv_heads * head_dim, hidden]);
        add("self_attn.v_proj", vec![kv_heads * head_dim, hidden]);
        add("self_attn.o_proj", vec![hidden, heads * head_dim]);
        add("post_attention_layernorm", vec![hidden]);
        add("mlp.gate_proj", vec![intermediate, hidden]);
        add("mlp.up_proj", vec![intermediate, hidden]);
        add("mlp.down_proj", vec![hidden, intermediate]);
    }
    tensors.push(("model.norm.weight".to_owned(), vec![hidden]));
    tensors.push(("lm_head.weight".to_owned(), vec![vocab, hidden]));
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (name, shape) in &tensors {
        let end = at + shape.iter().product::<usize>() * 2;
        header.insert(name.clone(), json!({ "dtype": "BF16", "shape": shape, "data_offsets": [at, end] }));
        at = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(8 << 20, File::create(path.join("model.safetensors"))?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    // Of about a fiftieth, of both signs. Each tensor begins elsewhere in it, so that no two are the same content.
    let mut random = Xoshiro256PlusPlus::seed_from_u64(1);
    let mut numbers = || ((random.next_u32() & 0x80ff) as u16 | 0x3c00).to_le_bytes();
    let piece: Vec<u8> = (0..1 << 23).flat_map(|_| numbers()).collect();
    for (index, (_, shape)) in tensors.iter().enumerate() {
        let mut left = shape.iter().product::<usize>() * 2;
        if let [width] = shape[..] {
            // Norms: about 1.
            (0..width)
                .try_for_each(|at| file.write_all(&(0x3f80 + (at % 7 + index % 5) as u16).to_le_bytes()))?;
            continue;
        }
        let mut from = index * 30_014 % piece.len();
        while left > 0 {
            let count = left.min(piece.len() - from);
            file.write_all(&piece[from..from + count])?;
            (left, from) = (left - count, 0);
        }
    }
    file.flush()?;
    Ok(at as u64)
}
