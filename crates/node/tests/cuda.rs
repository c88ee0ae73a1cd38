//! The node on a GPU that is none: the stand-in of the driver, which runs the kernels' own sources on the processor.
//!
//! Weights, KV blocks, addresses, copies and launches come together here as on a real GPU; what a stream is given is done
//! as late as it may be or at random moments, what nobody wrote is not a number, and misuse of the driver ends the
//! process. Needs a C++ compiler; says so otherwise. Speed it cannot show.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use common::gpu::{PAGE, gpu, nothing_is_left, on_gpu};
use common::{deploy, eventually, finish, open, request, run, shared};
use serde::Deserialize;
use serde_json::{Value, json};
use tangram_checkpoint::{Manifest, Role, TensorEntry};
use tangram_device::cuda::stand_in::Delay;
use tangram_node::{
    Arrived, Backend, Baseline, Computed, DeployedModel, GenerateRequest, Grammar, Node, NodeConfig,
    Observer, RequestError, SamplingParams, TextPair, TokenText, Trial, Vocabulary,
};
use tangram_testkit::{
    Family, Float, GgmlType, GgufOptions, RandomAdapter, RandomModel, write_adapter, write_cross_encoder,
    write_gguf, write_hf_model,
};

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<GoldenPrompt>,
}

#[derive(Deserialize)]
struct GoldenPrompt {
    prompt_ids: Vec<u32>,
    output_ids: Vec<u32>,
}

/// Deploys families with their goldens, of which the first `tokens` tokens are asked for.
fn goldens(node: &Arc<Node>, parity: &Path, families: &[&str]) -> Vec<(Arc<DeployedModel>, GoldenPrompt)> {
    let mut cases = Vec::new();
    for family in families {
        let model = match node.model(family) {
            Some(model) => model,
            None => deploy(node, family, &parity.join(family)),
        };
        let golden = std::fs::read(parity.join(family).join("golden.json")).unwrap();
        let golden: Golden = serde_json::from_slice(&golden).unwrap();
        cases.extend(golden.prompts.into_iter().map(|prompt| (model.clone(), prompt)));
    }
    cases
}

/// All cases at once, up to `tokens` tokens each.
fn check_together(node: &Arc<Node>, cases: &[(Arc<DeployedModel>, GoldenPrompt)], tokens: usize, what: &str) {
    let running: Vec<_> = cases
        .iter()
        .map(|(model, prompt)| {
            let count = tokens.min(prompt.output_ids.len());
            (node.generate(request(model, &prompt.prompt_ids, count)).unwrap(), &prompt.output_ids[..count])
        })
        .collect();
    for ((generation, expected), (model, _)) in running.into_iter().zip(cases) {
        assert_eq!(finish(generation).unwrap().tokens, expected, "{}, {what}", model.name);
    }
}

#[test]
fn golden_tokens_cold_and_resident() {
    let Some(parity) = shared("models/parity") else { return };
    let pool = 16 << 20;
    let Some(stand_in) = gpu(pool, Delay::Latest) else { return };
    let data = tempfile::tempdir().unwrap();
    let node = Node::open(on_gpu(&stand_in, data.path(), pool)).unwrap();
    assert!(node.status().device.contains("stand-in"), "{}", node.status().device);
    let families = [
        "gemma2",
        "gemma3",
        "gpt2",
        "gptneox",
        "llama",
        "llama3rope",
        "mistral",
        "mixtral",
        "opt",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3moe",
    ];
    let cases = goldens(&node, &parity, &families);
    let scratch = node.status().scratch_bytes;
    for (model, prompt) in cases.iter().step_by(3) {
        let cold = run(&node, request(model, &prompt.prompt_ids, 2));
        assert_eq!(cold.tokens, prompt.output_ids[..2], "{}, cold", model.name);
        assert!(cold.timing.bytes_loaded > 0);
    }
    let loaded = node.status().bytes_loaded_total;
    check_together(&node, &cases, 6, "resident");
    let after = node.status();
    assert_eq!(after.bytes_loaded_total, loaded, "everything was resident");
    assert_eq!(after.scratch_bytes, scratch, "everything was allocated when models were deployed");
    eventually("steps are replayed", || node.status().replayed_steps_total > 0);
    assert_eq!(after.copied_rows_total, 0, "greedy tokens are found on the GPU");
    nothing_is_left(node, &stand_in);
}

/// Models that push each other out, and sequences whose KV does not fit: sampled, with a grammar, with an adapter, and
/// texts to be embedded. The processor has the same tokens, a GPU with room the same vectors.
#[test]
fn the_same_results_under_eviction_and_preemption() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = |name: &str| sources.path().join(name);
    // Learned positions fill the pool and cost no time.
    let tiny = |seed, family, context| RandomModel { seed, context, ..RandomModel::tiny(family) };
    write_hf_model(&path("a"), &tiny(11, Family::Gpt2, 2200));
    write_hf_model(&path("b"), &tiny(12, Family::Qwen2, 96));
    write_hf_model(&path("e"), &tiny(13, Family::Bert, 96));
    write_adapter(&path("a"), &path("x"), &RandomAdapter::new(3));
    let grammar = {
        let tokens: Vec<TokenText> = (0u8..=255).map(|byte| TokenText::Bytes(vec![byte])).collect();
        Vocabulary::new(&tokens).unwrap().compile(&Grammar::Regex("([a-f]{3}-){6}z".into())).unwrap()
    };
    let ask = |node: &Node, index: u32| {
        let model = node.model(["a", "b", "x"][index as usize % 3]).unwrap();
        let prompt: Vec<u32> = (0..8).map(|j| 3 + index * 7 + j).collect();
        let sampling = SamplingParams { seed: Some(u64::from(index)), ..SamplingParams::default() };
        let grammar = index.is_multiple_of(4).then(|| grammar.clone());
        GenerateRequest { sampling, grammar, ..request(&model, &prompt, 28) }
    };
    let texts: Vec<Vec<u32>> = vec![vec![5, 9, 30, 7], vec![8; 12]];
    let embed = |node: &Node| {
        let model = node.model("e").unwrap();
        node.embed(&model, texts.clone()).unwrap()
    };
    let on_cpu = open(data.path(), 64 << 20);
    let model = deploy(&on_cpu, "a", &path("a"));
    deploy(&on_cpu, "b", &path("b"));
    deploy(&on_cpu, "e", &path("e"));
    on_cpu.deploy_adapter("x", &path("x"), "a", &mut |_| ControlFlow::Continue(())).unwrap();
    let kv_of_one = 48 * model.kv_bytes_per_token;
    let weights: u64 = on_cpu.models().iter().map(|model| model.weight_bytes).max().unwrap();
    // These models are stored in f32, and the arithmetic of both devices is near enough for the same tokens.
    let alone: Vec<_> = (0..6).map(|index| run(&on_cpu, ask(&on_cpu, index)).tokens).collect();
    drop(on_cpu);
    let Some(stand_in) = gpu(64 << 20, Delay::Latest) else { return };
    let roomy = Node::open(on_gpu(&stand_in, data.path(), 64 << 20)).unwrap();
    let vectors = embed(&roomy).result_blocking().unwrap().vectors;
    drop(roomy);
    let pool = ((weights + 2 * kv_of_one) as usize + PAGE).max(1 << 20).next_multiple_of(PAGE);
    println!("{weights} bytes of weights, {kv_of_one} of keys and values of one sequence");
    for (backend, delay, host_memory) in
        [(Backend::Paged, Delay::Random(7), 1 << 20), (Backend::Segment, Delay::Latest, 0)]
    {
        let Some(stand_in) = gpu(pool, delay) else { return };
        let tight = NodeConfig { backend, host_memory, ..on_gpu(&stand_in, data.path(), pool) };
        let tight = Node::open(tight).unwrap();
        let running: Vec<_> = (0..6).map(|index| tight.generate(ask(&tight, index)).unwrap()).collect();
        let embedding = embed(&tight);
        for (index, (generation, expected)) in running.into_iter().zip(&alone).enumerate() {
            assert_eq!(&finish(generation).unwrap().tokens, expected, "request {index}");
        }
        assert_eq!(embedding.result_blocking().unwrap().vectors, vectors);
        let status = tight.status();
        println!(
            "{backend:?}: a pool of {pool} bytes, {} evicted, {} preempted, {} swapped",
            status.bytes_evicted_total, status.preemptions_total, status.swaps_total
        );
        assert!(status.bytes_evicted_total > 0 && status.preemptions_total > 0, "the pool was large enough");
        nothing_is_left(tight, &stand_in);
    }
}

/// Two models that take turns in a pool with room for one: what host memory has of them is not read from the disk again,
/// and a model four times as large as host memory loads and serves.
#[test]
fn models_that_take_turns_come_from_host_memory() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = |name: &str| sources.path().join(name);
    let tiny = |seed, family, context| RandomModel { seed, context, ..RandomModel::tiny(family) };
    write_hf_model(&path("a"), &tiny(21, Family::Gpt2, 4000));
    write_hf_model(&path("b"), &tiny(22, Family::Gpt2, 4000));
    let prompt = [9, 8, 7, 25];
    let on_cpu = open(data.path(), 64 << 20);
    let models = ["a", "b"].map(|name| deploy(&on_cpu, name, &path(name)));
    let expected = models.each_ref().map(|model| run(&on_cpu, request(model, &prompt, 3)).tokens);
    let weights = models[0].weight_bytes;
    drop(on_cpu);
    let pool = (weights as usize + (512 << 10)).next_multiple_of(PAGE);
    for host_memory in [8 * weights, weights / 4] {
        let Some(stand_in) = gpu(pool, Delay::Random(host_memory)) else { return };
        let config = NodeConfig { host_memory, ..on_gpu(&stand_in, data.path(), pool) };
        let node = Node::open(config).unwrap();
        eventually("host memory is pinned", || {
            node.status().host_tier_bytes + PAGE as u64 > host_memory * 7 / 8
        });
        for round in 0..4 {
            let before = node.status().bytes_from_host_total;
            let mut loaded = 0;
            for (name, expected) in ["a", "b"].iter().zip(&expected) {
                let outcome = run(&node, request(&node.model(name).unwrap(), &prompt, 3));
                assert_eq!(&outcome.tokens, expected, "{name}, round {round}");
                loaded += outcome.timing.bytes_loaded;
            }
            let status = node.status();
            let hits = status.bytes_from_host_total - before;
            println!(
                "{host_memory} bytes of host memory, round {round}: {hits} of {loaded} bytes from it: {} tensors",
                status.host_tensors
            );
            assert!(loaded >= weights, "the pool has room for both");
            assert!(
                status.host_weight_bytes <= status.host_tier_bytes && status.host_tier_bytes <= host_memory
            );
            if round > 0 && host_memory > weights {
                assert_eq!(hits, loaded, "all of it is in host memory");
            } else if round > 0 {
                assert!(hits < loaded);
            }
        }
        assert!(node.status().bytes_from_host_total > 0);
        // Graphs hold the addresses of tensors, which leave and come back to them. Each model made one in its first round.
        eventually("the last steps are counted", || node.status().replayed_steps_total == 2 * 3 * 2);
        assert_eq!(node.status().graphs, 2);
        nothing_is_left(node, &stand_in);
    }
}

/// What a GPU can die of, at any moment of a request: the request fails and says why, the next one is served.
#[test]
fn a_lost_gpu_is_set_up_anew() {
    const LAUNCH_FAILED: i32 = 719;
    const ECC: i32 = 214;
    const OUT_OF_MEMORY: i32 = 2;
    let pool = 4 << 20;
    let Some(stand_in) = gpu(pool, Delay::Latest) else { return };
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_hf_model(sources.path(), &RandomModel { seed: 11, ..RandomModel::tiny(Family::Llama) });
    let node = Node::open(on_gpu(&stand_in, data.path(), pool)).unwrap();
    let model = deploy(&node, "m", sources.path());
    let ask = || finish(node.generate(request(&model, &[9, 8, 7, 250], 4)).unwrap());
    let expected = ask().unwrap().tokens;
    for (rebuilds, (call, nth, code)) in (1..).zip([
        // A kernel of a pass over resident weights.
        ("execution", 20, LAUNCH_FAILED),
        // Of the next, cold pass: making room, a copy of weights, later work.
        ("execution", 1, ECC),
        ("execution", 30, ECC),
        ("cuMemcpyHtoDAsync_v2", 3, ECC),
        ("cuMemSetAccess", 1, ECC),
        ("cuLaunchKernel", 20, LAUNCH_FAILED),
        // Of a step that is replayed, and while a graph is made.
        ("cuGraphLaunch", 2, LAUNCH_FAILED),
        ("cuGraphLaunch", 3, ECC),
    ]) {
        stand_in.fail(call, nth, code);
        let error = match ask() {
            Err(error) => error,
            Ok(_) => panic!("{call} {nth} failed and nobody was told"),
        };
        assert!(matches!(&error, RequestError::DeviceLost(_)), "{call} {nth}: {error}");
        assert!(error.to_string().contains("is lost"), "{error}");
        let again = ask().unwrap();
        assert_eq!(again.tokens, expected, "{call} {nth}");
        assert_eq!(again.timing.bytes_loaded, model.weight_bytes, "nothing is left of what was there");
        eventually("the rebuild is counted", || node.status().device_rebuilds_total == rebuilds);
    }
    // Without a graph steps are launched one by one.
    stand_in.fail("execution", 1, ECC);
    assert!(ask().is_err());
    eventually("the last rebuild is counted", || node.status().device_rebuilds_total == 9);
    let replayed = node.status().replayed_steps_total;
    assert!(replayed > 0, "totals go on when the GPU is set up anew");
    stand_in.fail("cuGraphInstantiateWithFlags", 1, OUT_OF_MEMORY);
    assert_eq!(ask().unwrap().tokens, expected);
    assert_eq!(ask().unwrap().tokens, expected);
    assert_eq!(stand_in.pending_faults(), 0);
    eventually("the steps are counted", || node.status().graphs == 0 && node.status().running == 0);
    assert_eq!(node.status().replayed_steps_total, replayed);
    // A launch that is refused ends a request and nothing else.
    stand_in.fail("cuLaunchKernel", 5, 1);
    assert!(matches!(ask(), Err(RequestError::Internal(_))));
    assert_eq!(ask().unwrap().tokens, expected);
    // While another process has the memory, requests are refused rather than let wait.
    stand_in.occupy(2 << 30);
    stand_in.fail("execution", 1, ECC);
    assert!(ask().is_err());
    assert!(matches!(ask(), Err(RequestError::DeviceLost(_))));
    stand_in.occupy(0);
    eventually("the GPU is back", || ask().is_ok_and(|outcome| outcome.tokens == expected));
    nothing_is_left(node, &stand_in);
}

/// Times are foretold once a pass was seen, from then on at every start.
#[test]
fn times_are_foretold_from_what_passes_took() {
    let pool = 4 << 20;
    let Some(stand_in) = gpu(pool, Delay::Latest) else { return };
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_hf_model(sources.path(), &RandomModel { seed: 31, ..RandomModel::tiny(Family::Llama) });
    let node = Node::open(on_gpu(&stand_in, data.path(), pool)).unwrap();
    let model = deploy(&node, "m", sources.path());
    assert!(node.list()[0].forecast.resident_first_token_seconds.is_none(), "nothing was seen yet");
    // The first prompt is too short to say anything.
    for prompt in [5, 20] {
        run(&node, request(&model, &(3..3 + prompt).collect::<Vec<u32>>(), 3));
    }
    let foretold = |node: &Node| {
        let forecast = node.list()[0].forecast;
        forecast.cold_first_token_seconds.zip(forecast.resident_first_token_seconds)
    };
    eventually("times are foretold", || foretold(&node).is_some_and(|(cold, resident)| cold > resident));
    let stages = model.forecast().stage_compute_seconds(40).unwrap();
    assert_eq!(stages.len(), model.forecast().bytes_by_stage().len());
    assert!(stages.iter().sum::<f64>() > 0.0);
    nothing_is_left(node, &stand_in);
    let again = Node::open(on_gpu(&stand_in, data.path(), pool)).unwrap();
    assert!(foretold(&again).is_some());
    nothing_is_left(again, &stand_in);
}

/// Scores of pairs of texts, and sequences that grow beyond longrope's original context or begin there.
#[test]
fn pairs_and_stretched_contexts_are_as_on_the_processor() {
    const ORIGINAL: u32 = 40;
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = |name: &str| sources.path().join(name);
    for (name, roberta, activation) in [
        ("r", true, Some("torch.nn.modules.activation.Sigmoid")),
        ("b", false, Some("torch.nn.modules.linear.Identity")),
    ] {
        write_cross_encoder(&path(name), &RandomModel::tiny(Family::Bert), roberta, activation);
    }
    write_hf_model(&path("l"), &RandomModel { context: 96, ..RandomModel::tiny(Family::Phi3) });
    let mut config: Value = serde_json::from_slice(&std::fs::read(path("l/config.json")).unwrap()).unwrap();
    let factors = |first: f64| (0..8).map(|pair| first + f64::from(pair)).collect::<Vec<f64>>();
    config["original_max_position_embeddings"] = json!(ORIGINAL);
    config["rope_scaling"] =
        json!({"type": "longrope", "short_factor": factors(1.0), "long_factor": factors(3.0)});
    std::fs::write(path("l/config.json"), config.to_string()).unwrap();
    let pairs: Vec<TextPair> = [(vec![5, 9, 30, 7, 8], 2), (vec![8; 12], 7), (vec![9, 10, 11], 1)]
        .map(|(tokens, second)| TextPair { tokens, second: Some(second) })
        .to_vec();
    let prompt = |length: u32| (0..length).map(|i| (i * i * 7 + i * 3 + 11) % 256).collect::<Vec<u32>>();
    let all = |node: &Arc<Node>| {
        let scores = ["r", "b"].map(|name| {
            let scores = node.score(&node.model(name).unwrap(), pairs.clone()).unwrap();
            scores.result_blocking().unwrap().vectors.concat()
        });
        let model = node.model("l").unwrap();
        let ask = |length| node.generate(request(&model, &prompt(length), 9)).unwrap();
        let running = [ORIGINAL - 4, 7, ORIGINAL + 5].map(ask);
        (scores.concat(), running.map(|generation| finish(generation).unwrap().tokens))
    };
    let on_cpu = open(data.path(), 16 << 20);
    ["r", "b", "l"].iter().for_each(|name| drop(deploy(&on_cpu, name, &path(name))));
    let (scores, tokens) = all(&on_cpu);
    drop(on_cpu);
    let Some(stand_in) = gpu(16 << 20, Delay::Random(5)) else { return };
    let node = Node::open(on_gpu(&stand_in, data.path(), 16 << 20)).unwrap();
    let found = all(&node);
    assert_eq!(found.1, tokens);
    assert_eq!(found.0.len(), 6);
    for (found, expected) in found.0.iter().zip(&scores) {
        assert!((found - expected).abs() < 1e-5, "{found}, not {expected}");
    }
    nothing_is_left(node, &stand_in);
}

/// What measurements compare ours with runs on the same device with the same tokens, and keeps what its rule says.
#[test]
fn rivals_of_measurements_have_the_same_tokens() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = |name: &str| sources.path().join(name);
    for (name, seed) in [("a", 31), ("b", 32), ("c", 33)] {
        write_hf_model(&path(name), &RandomModel { seed, context: 4000, ..RandomModel::tiny(Family::Gpt2) });
    }
    let on_cpu = open(data.path(), 64 << 20);
    let models = ["a", "b", "c"].map(|name| deploy(&on_cpu, name, &path(name)));
    let prompt = [9, 8, 7, 25];
    let expected = models.each_ref().map(|model| run(&on_cpu, request(model, &prompt, 2)).tokens);
    let weights = models[0].weight_bytes;
    drop(on_cpu);
    let pool = (2 * weights as usize + (512 << 10)).next_multiple_of(PAGE);
    for (rule, backend) in [
        (Baseline::NoReuse, Backend::Paged),
        (Baseline::WholeModels, Backend::Paged),
        (Baseline::Published, Backend::Segment),
    ] {
        let Some(stand_in) = gpu(pool, Delay::Random(rule as u64)) else { return };
        let trial = Trial { baseline: Some(rule), ..Trial::default() };
        let node = NodeConfig { backend, trial, ..on_gpu(&stand_in, data.path(), pool) };
        let node = Node::open(node).unwrap();
        let mut loaded = Vec::new();
        for model in [0, 1, 0, 0, 2, 0, 1] {
            let outcome = run(&node, request(&node.model(["a", "b", "c"][model]).unwrap(), &prompt, 2));
            assert_eq!(outcome.tokens, expected[model], "{rule:?}");
            loaded.push(outcome.timing.bytes_loaded);
        }
        println!("{rule:?}: of {weights} bytes {loaded:?}");
        match rule {
            Baseline::NoReuse => assert_eq!(loaded, [weights; 7]),
            // The second goes for the third, and the third for the second.
            Baseline::WholeModels => {
                assert_eq!(loaded, [weights, weights, 0, 0, weights, 0, weights]);
            }
            Baseline::Published => {
                // Worth is not per byte, so small parts even of the one that is used most have gone.
                assert_eq!(loaded[..5], [weights, weights, 0, 0, weights]);
                assert!(loaded[5] > 0 && loaded[5] < weights);
            }
        }
        nothing_is_left(node, &stand_in);
    }
}

/// Weights that stand for others, so that models can be measured that no disk would hold.
#[test]
fn one_block_of_host_memory_stands_for_all_weights() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let pool = 4 << 20;
    let Some(stand_in) = gpu(pool, Delay::Latest) else { return };
    write_hf_model(sources.path(), &RandomModel { seed: 41, ..RandomModel::tiny(Family::Llama) });
    let fill =
        |bytes: &mut [u8]| bytes.as_chunks_mut::<4>().0.iter_mut().for_each(|b| *b = 0.01f32.to_le_bytes());
    let config = || NodeConfig {
        trial: Trial { weights: Some((1 << 20, Arc::new(fill))), ..Trial::default() },
        ..on_gpu(&stand_in, data.path(), pool)
    };
    let node = Node::open(config()).unwrap();
    deploy(&node, "m", sources.path());
    let ask = |node: &Node| run(node, request(&node.model("m").unwrap(), &[9, 8, 7, 250], 3));
    let (cold, resident) = (ask(&node), ask(&node));
    assert_eq!(cold.timing.bytes_loaded, node.model("m").unwrap().weight_bytes);
    assert_eq!((cold.tokens.clone(), resident.timing.bytes_loaded), (resident.tokens, 0));
    let status = node.status();
    assert_eq!(status.bytes_from_host_total, status.bytes_loaded_total + status.bytes_prefetched_total);
    nothing_is_left(node, &stand_in);
    // They are not the model's own.
    let own = Node::open(NodeConfig { trial: Trial::default(), ..config() }).unwrap();
    assert_ne!(ask(&own).tokens, cold.tokens);
    nothing_is_left(own, &stand_in);
}

/// Lets no copy but the first arrive, while it is told to, before the first stage of a pass over so many tokens has been
/// computed. The thread on which it is told of arrivals is the one by which all of them become known.
#[derive(Debug, Default)]
struct Gate {
    tokens: Mutex<Option<usize>>,
    computed: Condvar,
    /// Whether something was let arrive all the same.
    late: AtomicBool,
}

impl Gate {
    fn close(&self, tokens: usize) {
        *self.tokens.lock().unwrap() = Some(tokens);
    }

    /// Whether the stage has been computed before anything else was let arrive.
    fn is_open(&self) -> bool {
        self.tokens.lock().unwrap().is_none() && !self.late.load(Ordering::Relaxed)
    }
}

impl Observer for Gate {
    fn arrived(&self, _: Arrived<'_>) {
        let closed = self.tokens.lock().unwrap();
        // So that a failure is one, and no test that hangs.
        let most = Duration::from_secs(if self.late.load(Ordering::Relaxed) { 0 } else { 20 });
        let waited = self.computed.wait_timeout_while(closed, most, |tokens| tokens.is_some()).unwrap();
        self.late.fetch_or(waited.1.timed_out(), Ordering::Relaxed);
    }

    fn computed(&self, computed: Computed) {
        let mut tokens = self.tokens.lock().unwrap();
        if computed.stage == 0 && *tokens == Some(computed.tokens) {
            *tokens = None;
            self.computed.notify_all();
        }
    }
}

fn token_embedding(model: &DeployedModel) -> TensorEntry {
    let manifest = std::fs::read(model.directory.join("manifest.json")).unwrap();
    let manifest: Manifest = serde_json::from_slice(&manifest).unwrap();
    manifest.tensors.into_iter().find(|tensor| tensor.role == Role::TokenEmbedding).unwrap()
}

/// Changes a byte of the row of a token on the disk.
fn damage(model: &DeployedModel, token: usize, vocab: usize) {
    let (embedding, file) = (token_embedding(model), model.directory.join("data.bin"));
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[embedding.offset as usize + token * (embedding.bytes as usize / vocab) + 5] ^= 0x40;
    std::fs::write(&file, &bytes).unwrap();
}

const VOCAB: usize = 16_000;
const PROMPT: [u32; 7] = [5, 15_999, 3, 40, 15_999, 9_000, 7];

/// A model of 2 to 5 MB, most of which is its token embedding, and its output matrix if it has one of its own.
fn with_many_tokens(seed: u64, family: Family, dtype: Float, tied: bool) -> RandomModel {
    RandomModel { seed, dtype, tied, vocab: VOCAB, layers: 2, ..RandomModel::tiny(family) }
}

/// The first stage is computed before the embedding, or anything else, has arrived from the disk.
#[test]
fn cold_passes_begin_with_rows_of_the_embedding() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = |name: &str| sources.path().join(name);
    for (seed, (name, family, dtype, tied)) in (51..).zip([
        ("tied", Family::Llama, Float::BF16, true),
        ("untied", Family::Qwen3, Float::F16, false),
        ("scaled", Family::Gemma3, Float::BF16, true),
        ("positions", Family::Gpt2, Float::F32, true),
    ]) {
        write_hf_model(&path(name), &with_many_tokens(seed, family, dtype, tied));
    }
    let options = GgufOptions { dtype: GgmlType::Q8_0, ..GgufOptions::default() };
    write_gguf(&path("q8.gguf"), &with_many_tokens(55, Family::Llama, Float::F32, true), options);
    let names = ["tied", "untied", "scaled", "positions", "q8.gguf"];
    for (backend, delay, names) in
        [(Backend::Paged, Delay::Latest, &names[..]), (Backend::Segment, Delay::Random(9), &names[..2])]
    {
        let Some(stand_in) = gpu(64 << 20, delay) else { return };
        let gate = Arc::new(Gate::default());
        let config = || NodeConfig { backend, ..on_gpu(&stand_in, data.path(), 64 << 20) };
        let node = Node::open(NodeConfig { observer: Some(gate.clone()), ..config() }).unwrap();
        let scratch = |node: &Node| node.status().scratch_bytes;
        for &name in names {
            let model = node.model(name).unwrap_or_else(|| deploy(&node, name, &path(name)));
            let prepared = scratch(&node);
            // Learned positions are added in the first stage, which waits for them.
            if name != "positions" {
                gate.close(PROMPT.len());
            }
            let cold = run(&node, request(&model, &PROMPT, 2));
            assert!(gate.is_open(), "{name}: the first stage waited for tensors");
            assert_eq!(cold.timing.bytes_loaded, model.weight_bytes);
            let resident = run(&node, request(&model, &PROMPT, 2));
            assert_eq!(cold.tokens, resident.tokens, "{name}");
            assert_eq!(resident.timing.bytes_loaded, 0);
            eventually("everything was allocated when it was deployed", || scratch(&node) == prepared);
        }
        nothing_is_left(node, &stand_in);
    }
}

/// Rows that lie in ordinary memory, that are under way when the GPU is lost, or that are damaged on the disk.
#[test]
fn rows_of_the_embedding_meet_misfortune() {
    const OUT_OF_MEMORY: i32 = 2;
    const ECC: i32 = 214;
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_hf_model(sources.path(), &with_many_tokens(57, Family::Llama, Float::BF16, true));
    let Some(stand_in) = gpu(16 << 20, Delay::Latest) else { return };
    let node = Node::open(on_gpu(&stand_in, data.path(), 16 << 20)).unwrap();
    // Nothing is pinned for rows.
    (1..9).for_each(|nth| stand_in.fail("cuMemHostAlloc", nth, OUT_OF_MEMORY));
    let model = deploy(&node, "m", sources.path());
    stand_in.clear_faults();
    let ask = || finish(node.generate(request(&model, &PROMPT, 3)).unwrap());
    let cold = ask().unwrap();
    assert_eq!((cold.timing.bytes_loaded, &ask().unwrap().tokens), (model.weight_bytes, &cold.tokens));
    // From the second on each time in a cold pass.
    for nth in [1, 2, 3, 5, 9, 20] {
        stand_in.fail("execution", nth, ECC);
        assert!(matches!(ask(), Err(RequestError::DeviceLost(_))), "{nth}");
    }
    let again = ask().unwrap();
    assert_eq!((again.timing.bytes_loaded, &again.tokens), (model.weight_bytes, &cold.tokens));
    nothing_is_left(node, &stand_in);
    let Some(stand_in) = gpu(16 << 20, Delay::Latest) else { return };
    let node = Node::open(on_gpu(&stand_in, data.path(), 16 << 20)).unwrap();
    let model = node.model("m").unwrap();
    damage(&model, 40, VOCAB);
    let error = finish(node.generate(request(&model, &PROMPT, 3)).unwrap()).err().unwrap().to_string();
    assert!(error.contains("checksum") && error.contains("token_embedding"), "{error}");
    nothing_is_left(node, &stand_in);
}

/// What host memory has is not looked for on the disk, where it has changed since.
#[test]
fn rows_of_the_embedding_come_from_host_memory() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Room for two.
    let pool = 6 << 20;
    let Some(stand_in) = gpu(pool, Delay::Random(3)) else { return };
    let gate = Arc::new(Gate::default());
    let config = NodeConfig {
        host_memory: 24 << 20,
        observer: Some(gate.clone()),
        ..on_gpu(&stand_in, data.path(), pool)
    };
    let node = Node::open(config).unwrap();
    eventually("host memory is pinned", || node.status().host_tier_bytes > 20 << 20);
    let models = [61, 62, 63, 64].map(|seed| {
        let source = sources.path().join(seed.to_string());
        write_hf_model(&source, &with_many_tokens(seed, Family::Llama, Float::BF16, true));
        deploy(&node, &seed.to_string(), &source)
    });
    let prompt = [&PROMPT[..], &[11, 12]].concat();
    let expected = run(&node, request(&models[0], &prompt, 3)).tokens;
    for model in &models[1..3] {
        run(&node, request(model, &PROMPT, 3));
    }
    damage(&models[0], 40, VOCAB);
    // Nothing of the last arrives, and nothing that comes after it, before the first has begun.
    gate.close(prompt.len());
    let other = node.generate(request(&models[3], &PROMPT, 3)).unwrap();
    let before = node.status().bytes_from_host_total;
    let again = run(&node, request(&models[0], &prompt, 3));
    assert!(gate.is_open(), "the first stage waited for tensors");
    assert_eq!(again.tokens, expected);
    let from_host = node.status().bytes_from_host_total - before;
    assert!(from_host >= token_embedding(&models[0]).bytes, "it was resident");
    assert_eq!(from_host, again.timing.bytes_loaded);
    finish(other).unwrap();
    nothing_is_left(node, &stand_in);
}
