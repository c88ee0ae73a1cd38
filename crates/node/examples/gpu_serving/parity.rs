//! The same models on the GPU and on the processor, and against what others computed: all families that a random model can
//! be written of, in all types that GGUF files of it can have; and reference models with their tokens, where there are some.
//!
//! Tokens of random models may differ where two are equally likely, so probabilities are compared.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::json;
use tangram_device::cuda::Driver;
use tangram_node::{GenerateEvent, GenerateRequest, GeneratedToken, Node, NodeConfig, SamplingParams};
use tangram_testkit::{Family, GgmlType, GgufOptions, RandomModel, write_gguf};

use crate::ask::{ask, close, config};
use crate::report::{Goal, goal, say};

const FAMILIES: [Family; 11] = [
    Family::Llama,
    Family::Mistral,
    Family::Mixtral,
    Family::Qwen2,
    Family::Qwen3,
    Family::Qwen3Moe,
    Family::Phi3,
    Family::Gemma2,
    Family::Gemma3,
    Family::Gpt2,
    Family::GptNeox,
];
const TYPES: [GgmlType; 6] =
    [GgmlType::F32, GgmlType::F16, GgmlType::BF16, GgmlType::Q8_0, GgmlType::Q4_0, GgmlType::Q4_1];
const PROMPTS: usize = 3;
/// How far apart logarithms of probabilities may be: activations are rounded to 16 bits where weights have fewer than 32.
fn allowed(dtype: GgmlType) -> f64 {
    match dtype {
        GgmlType::F32 => 0.001,
        GgmlType::BF16 => 0.25,
        _ => 0.06,
    }
}

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<GoldenPrompt>,
}

#[derive(Deserialize)]
struct GoldenPrompt {
    prompt_ids: Vec<u32>,
    output_ids: Vec<u32>,
}

/// `options`: `goldens=DIRECTORY` (of models with `golden.json`), `families=N` (only the first).
pub(crate) fn run(driver: &Arc<Driver>, path: &Path, options: &[String]) -> Result<(), Box<dyn Error>> {
    let option = |key: &str| options.iter().find_map(|option| option.strip_prefix(key)?.strip_prefix('='));
    let families = option("families").map_or(Ok(FAMILIES.len()), str::parse)?;
    let path = path.join("parity");
    std::fs::create_dir_all(&path)?;
    let pool = 64 << 20;
    let on_gpu = Node::open(NodeConfig { device_memory: Some(pool), ..config(driver, &path.join("gpu")) })?;
    let on_cpu = Node::open(NodeConfig::new(path.join("cpu"), pool))?;
    let mut result = Ok(());
    if let Some(goldens) = option("goldens") {
        result = result.and(check_goldens(&on_gpu, Path::new(goldens)));
    }
    result = result.and(random(&on_gpu, &on_cpu, &path, families));
    close(on_cpu);
    close(on_gpu);
    let _ = std::fs::remove_dir_all(&path);
    result
}

fn deploy(node: &Node, name: &str, source: &Path) -> Result<(), Box<dyn Error>> {
    node.deploy(name, source, &mut |_| ControlFlow::Continue(()))?;
    Ok(())
}

fn tokens(node: &Node, request: GenerateRequest) -> Result<Vec<GeneratedToken>, Box<dyn Error>> {
    let mut generation = node.generate(request)?;
    let mut tokens = Vec::new();
    while let Some(event) = generation.next_blocking() {
        match event {
            GenerateEvent::Token(token) => tokens.push(token),
            GenerateEvent::Failed(error) => return Err(error.into()),
            _ => {}
        }
    }
    Ok(tokens)
}

/// Every reference model's tokens, cold and resident.
fn check_goldens(node: &Node, directory: &Path) -> Result<(), Box<dyn Error>> {
    let (mut right, mut all) = (0, 0);
    let mut families: Vec<_> = std::fs::read_dir(directory)?.collect::<Result<_, _>>()?;
    families.sort_by_key(|entry| entry.file_name());
    for entry in families {
        let name = entry.file_name().to_string_lossy().into_owned();
        let golden: Golden = serde_json::from_slice(&std::fs::read(entry.path().join("golden.json"))?)?;
        deploy(node, &name, &entry.path())?;
        let model = crate::ask::model(node, &name)?;
        for round in ["cold", "resident"] {
            for (index, prompt) in golden.prompts.iter().enumerate() {
                let request = GenerateRequest {
                    prompt: prompt.prompt_ids.clone(),
                    ..ask(&model, 1, prompt.output_ids.len(), 0)
                };
                let found: Vec<u32> = tokens(node, request)?.into_iter().map(|token| token.id).collect();
                all += 1;
                right += usize::from(found == prompt.output_ids);
                if found != prompt.output_ids {
                    say(
                        &name,
                        "other tokens than the reference",
                        json!({ "prompt": index, "round": round, "found": found, "reference": prompt.output_ids }),
                    );
                }
            }
        }
        node.remove(&name)?;
    }
    let share = f64::from(right as u32) / f64::from(all.max(1) as u32);
    goal(1, &format!("prompts of reference models with their tokens, of {all}"), share, Goal::AtLeast(1.0));
    Ok(())
}

fn random(on_gpu: &Node, on_cpu: &Node, path: &Path, families: usize) -> Result<(), Box<dyn Error>> {
    // As shares of what is allowed.
    let mut worst = 0.0f64;
    for dtype in TYPES {
        let mut of_type = 0.0f64;
        for family in FAMILIES.into_iter().take(families) {
            // Blocks of quantised types have 32 elements, and so have rows whole ones.
            let model = RandomModel { intermediate: 128, seed: 5, ..RandomModel::tiny(family) };
            let file = path.join("m.gguf");
            write_gguf(&file, &model, GgufOptions { dtype, ..GgufOptions::default() });
            let mut apart = 0.0f64;
            for node in [on_gpu, on_cpu] {
                deploy(node, "m", &file)?;
            }
            for seed in 0..PROMPTS {
                let [gpu, cpu] = [on_gpu, on_cpu].map(|node| {
                    let request = ask(&crate::ask::model(node, "m")?, 20 + 9 * seed, 1, seed);
                    let sampling = SamplingParams { logprobs: Some(20), ..request.sampling.clone() };
                    let token = tokens(node, GenerateRequest { sampling, ..request })?.pop();
                    token.and_then(|token| token.logprob).ok_or_else(|| Box::<dyn Error>::from("no token"))
                });
                let (gpu, cpu) = (gpu?, cpu?);
                for (token, logprob) in &cpu.top[..5] {
                    let other = gpu.top.iter().find(|(other, _)| other == token);
                    // One of the first five that is not among the first twenty is as wrong as can be.
                    let difference = other.map_or(f32::INFINITY, |(_, other)| (other - logprob).abs());
                    apart = apart.max(f64::from(difference));
                }
            }
            if apart > allowed(dtype) {
                say(
                    "parity",
                    "far apart",
                    json!({ "family": format!("{family:?}"), "type": format!("{dtype:?}"), "apart": apart }),
                );
            }
            of_type = of_type.max(apart);
        }
        say(
            "parity",
            &format!("{dtype:?}"),
            json!({ "families": families, "apart": of_type, "allowed": allowed(dtype) }),
        );
        worst = worst.max(of_type / allowed(dtype));
    }
    let types = TYPES.len();
    let what =
        format!("GPU and processor, {families} families in {types} types: probabilities apart / allowed");
    goal(1, &what, worst, Goal::AtMost(1.0));
    Ok(())
}
