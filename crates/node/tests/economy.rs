//! The memory economy through the node: sharing by content, eviction, on-demand KV, preemption, cancellation, faults.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::{config, deploy, eventually, finish, greedy, open, request, run, shared};
use rand::{RngExt, SeedableRng};
use tangram_node::{
    Backend, DeployedModel, FinishReason, GenerateRequest, Generation, Node, NodeConfig, RequestError,
    SamplingParams,
};
use tangram_testkit::{Family, RandomModel, mutate_layer, write_hf_model};

fn random_model(dir: &Path, seed: u64) {
    let family = [Family::Llama, Family::Qwen2, Family::Qwen3][seed as usize % 3];
    write_hf_model(dir, &RandomModel { seed, ..RandomModel::tiny(family) });
}

fn all_kv_is_back(node: &Node) {
    eventually("all KV is back", || {
        let status = node.status();
        status.kv_blocks == 0 && status.kv_bytes == 0 && status.running == 0 && status.leased_bytes == 0
    });
}

#[test]
fn a_copy_costs_nothing_and_a_changed_layer_costs_that_layer() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (base_dir, tuned_dir) = (sources.path().join("base"), sources.path().join("tuned"));
    random_model(&base_dir, 3);
    mutate_layer(&base_dir, &tuned_dir, 1);
    let node = open(data.path(), 32 << 20);
    let base = deploy(&node, "base", &base_dir);
    let before = du(data.path());
    let copy = deploy(&node, "copy", &base_dir);
    let tuned = deploy(&node, "tuned", &tuned_dir);
    assert!(du(data.path()) - before < base.weight_bytes, "copies are referenced on disk, not stored again");

    let layer_bytes: u64 = {
        let read = |dir: &Path| tangram_checkpoint::open(dir).unwrap();
        let in_layer = |role| matches!(role, tangram_checkpoint::Role::Layer(1, _));
        read(&tuned_dir).tensors().iter().filter(|t| in_layer(t.role)).map(|t| t.bytes).sum()
    };
    let first = run(&node, request(&base, &[5, 6, 7], 8));
    assert_eq!(first.timing.bytes_loaded, base.weight_bytes);
    let second = run(&node, request(&copy, &[5, 6, 7], 8));
    assert_eq!((second.timing.bytes_loaded, second.timing.bytes_reused), (0, base.weight_bytes));
    assert_eq!(first.tokens, second.tokens);
    let third = run(&node, request(&tuned, &[5, 6, 7], 8));
    assert_eq!(third.timing.bytes_loaded, layer_bytes);
    assert_eq!(third.timing.bytes_reused, tuned.weight_bytes - layer_bytes);
    eventually("the counter agrees", || node.status().bytes_loaded_total == base.weight_bytes + layer_bytes);
}

fn du(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| if path.is_dir() { du(&path) } else { path.metadata().unwrap().len() }).sum()
}

/// The resident set of this process in bytes.
fn resident_set() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

struct Expected {
    request: GenerateRequest,
    tokens: Vec<u32>,
}

/// Line 4 of the main job's definition of done: many random requests over many models that share tensors, a pool of
/// 60 % of the working set, cancellations; every output equals the one of the same request alone.
/// `TANGRAM_STRESS_REQUESTS` sets their number.
#[test]
fn random_requests_over_more_models_than_fit() {
    let total: usize =
        std::env::var("TANGRAM_STRESS_REQUESTS").ok().and_then(|text| text.parse().ok()).unwrap_or(10_000);
    let seed: u64 =
        std::env::var("TANGRAM_STRESS_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(20261121);
    println!("{total} requests, seed {seed}");
    let mut random = rand::rngs::Xoshiro256PlusPlus::seed_from_u64(seed);
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut directories = Vec::new();
    match shared("models/parity") {
        Some(parity) => {
            let families = ["llama", "llama3rope", "qwen2", "qwen3"];
            directories.extend(families.map(|family| (family.to_owned(), parity.join(family))));
        }
        None => {
            for seed in 0..4 {
                let dir = sources.path().join(format!("random-{seed}"));
                random_model(&dir, seed);
                directories.push((format!("random-{seed}"), dir));
            }
        }
    }
    for (name, dir) in directories.clone() {
        for layer in 0..2 {
            let tuned = sources.path().join(format!("{name}-tuned-{layer}"));
            mutate_layer(&dir, &tuned, layer);
            directories.push((format!("{name}-tuned-{layer}"), tuned));
        }
    }
    let deploy_all = |node: &Arc<Node>| -> Vec<Arc<DeployedModel>> {
        directories.iter().map(|(name, dir)| deploy(node, name, dir)).collect()
    };
    let node = open(data.path(), 256 << 20);
    let models = deploy_all(&node);
    // Each distinct request alone, on a node where everything fits.
    let mut expected: Vec<Expected> = Vec::new();
    for i in 0..240 {
        let model = &models[i % models.len()];
        let length = random.random_range(1..=60);
        let prompt: Vec<u32> = (0..length).map(|_| random.random_range(3..model.spec.vocab as u32)).collect();
        let mut request = request(model, &prompt, random.random_range(1..=24));
        if i % 3 == 0 {
            request.sampling = SamplingParams { temperature: 1.0, seed: Some(i as u64), ..greedy() };
        }
        let tokens = run(&node, request.clone()).tokens;
        expected.push(Expected { request, tokens });
    }
    let working_set = node.status().resident_bytes;
    println!("working set {working_set}");
    drop(node);

    let pool = working_set * 6 / 10;
    let paged = config(data.path(), pool);
    under_pressure(paged.clone(), &expected, total, &mut random);
    let segment = NodeConfig { backend: Backend::Segment, host_memory: pool / 4, ..paged };
    under_pressure(segment, &expected, total / 2, &mut random);
}

/// Sends `total` of the requests to a node in a random order, some of which are cancelled.
fn under_pressure(
    config: NodeConfig,
    expected: &[Expected],
    total: usize,
    random: &mut rand::rngs::Xoshiro256PlusPlus,
) {
    let pool = config.device_memory.unwrap();
    let node = Node::open(config).unwrap();
    let by_name: HashMap<String, Arc<DeployedModel>> =
        node.models().into_iter().map(|model| (model.name.clone(), model)).collect();
    let mut running: Vec<(Generation, usize)> = Vec::new();
    let (mut finished, mut cancelled, mut loaded, mut peak) = (0, 0, 0u64, 0);
    let check = |generation: Generation, case: usize, loaded: &mut u64| {
        let outcome = finish(generation).unwrap();
        *loaded += outcome.timing.bytes_loaded;
        assert_eq!(
            outcome.tokens, expected[case].tokens,
            "request {case} to {}",
            expected[case].request.model.name
        );
    };
    for i in 0..total {
        // Popularity by Zipf over the cases, so that some models stay and some come and go.
        let case = (expected.len() as f64).powf(random.random_range(0.0..1.0)) as usize % expected.len();
        let Expected { request, .. } = &expected[case];
        let model = by_name[&request.model.name].clone();
        running.push((node.generate(GenerateRequest { model, ..request.clone() }).unwrap(), case));
        if i % 17 == 0 {
            let (generation, _) = running.swap_remove(random.random_range(0..running.len()));
            drop(generation);
            cancelled += 1;
        }
        while running.len() >= 24 {
            let (generation, case) = running.swap_remove(random.random_range(0..running.len()));
            check(generation, case, &mut loaded);
            finished += 1;
        }
        peak = peak.max(resident_set());
    }
    for (generation, case) in running {
        check(generation, case, &mut loaded);
        finished += 1;
    }
    all_kv_is_back(&node);
    let status = node.status();
    println!(
        "{}: {finished} finished, {cancelled} cancelled, pool {pool}, loaded {loaded}, evicted {}, moved {}, \
         preempted {}, swapped {}, peak resident set {peak}",
        status.backend,
        status.bytes_evicted_total,
        status.bytes_moved_total,
        status.preemptions_total,
        status.swaps_total
    );
    assert!(status.bytes_evicted_total > 0, "the pool was never under pressure");
    assert!(peak < pool + (300 << 20), "resident set of {peak} bytes with a pool of {pool}");
}

/// More KV than the pool has: sequences are preempted and come back with the same tokens, in either layout of the pool,
/// computed again or copied back.
#[test]
fn preempted_sequences_lose_no_token() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_hf_model(
        sources.path(),
        &RandomModel { seed: 11, context: 256, ..RandomModel::tiny(Family::Llama) },
    );
    let roomy = open(data.path(), 64 << 20);
    let model = deploy(&roomy, "m", sources.path());
    let prompts: Vec<Vec<u32>> = (0..12).map(|i| (0..8).map(|j| 3 + i * 7 + j).collect()).collect();
    let alone: Vec<_> =
        prompts.iter().map(|prompt| run(&roomy, request(&model, prompt, 200)).tokens).collect();
    drop(roomy);
    let kv_of_one = 208 * model.kv_bytes_per_token;
    let pool = (model.weight_bytes + 3 * kv_of_one + (256 << 10)).max(1 << 20);
    for backend in [Backend::Paged, Backend::Segment] {
        for host_memory in [0, 64 << 20] {
            let tight = NodeConfig { backend, host_memory, ..config(data.path(), pool) };
            let tight = Node::open(tight).unwrap();
            let model = tight.model("m").unwrap();
            let running: Vec<_> =
                prompts.iter().map(|prompt| tight.generate(request(&model, prompt, 200)).unwrap()).collect();
            for (generation, expected) in running.into_iter().zip(&alone) {
                assert_eq!(&finish(generation).unwrap().tokens, expected);
            }
            all_kv_is_back(&tight);
            let status = tight.status();
            assert!(status.preemptions_total > 0, "the pool was large enough for everybody");
            assert_eq!(status.swaps_total > 0, host_memory > 0, "{status:?}");
            assert_eq!(status.host_kv_bytes, 0, "what was copied out is given back");
        }
    }
}

/// A sequence alone on a segment gets as long as the node said that it can, however its model's tensors came to lie.
#[test]
fn a_segment_holds_the_context_that_was_promised() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let roomy = open(data.path(), 64 << 20);
    for seed in 0..3u64 {
        let dir = sources.path().join(seed.to_string());
        let model = RandomModel { seed, context: 1 << 16, ..RandomModel::tiny(Family::Llama) };
        write_hf_model(&dir, &model);
        deploy(&roomy, &seed.to_string(), &dir);
    }
    let weights = roomy.models()[0].weight_bytes;
    drop(roomy);
    let segment = NodeConfig { backend: Backend::Segment, ..config(data.path(), (2 * weights).max(1 << 20)) };
    let node = Node::open(segment).unwrap();
    // Pieces of all three models lie in the segment, so that its free room is in pieces.
    for round in 0..6u32 {
        for name in ["0", "1", "2"] {
            run(&node, request(&node.model(name).unwrap(), &[5 + round; 40], 24));
        }
    }
    let model = node.model("1").unwrap();
    assert!(model.context < 1 << 16, "the pool is the limit");
    let outcome = run(&node, request(&model, &[9; 10], model.context - 10));
    assert_eq!(outcome.tokens.len(), model.context - 10);
    all_kv_is_back(&node);
}

/// Four models of which two and a half fit, asked for in turn: in the pause before each request the node brings in what
/// the earlier ones pushed out, and the answers stay the same.
#[test]
fn what_comes_next_is_brought_in_while_nobody_asks() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let large = |seed| RandomModel { seed, layers: 12, vocab: 2048, ..RandomModel::tiny(Family::Llama) };
    let names = ["0", "1", "2", "3"];
    for name in names {
        write_hf_model(&sources.path().join(name), &large(name.parse().unwrap()));
    }
    let roomy = open(data.path(), 64 << 20);
    let models = names.map(|name| deploy(&roomy, name, &sources.path().join(name)));
    let alone = models.each_ref().map(|model| run(&roomy, request(model, &[5, 6, 7], 8)).tokens);
    let weights = models[0].weight_bytes;
    drop(roomy);
    for backend in [Backend::Paged, Backend::Segment] {
        let node = NodeConfig { backend, ..config(data.path(), weights * 5 / 2) };
        let node = Node::open(node).unwrap();
        let models = names.map(|name| node.model(name).unwrap());
        let mut loaded = Vec::new();
        for turn in 0..28 {
            let outcome = run(&node, request(&models[turn % 4], &[5, 6, 7], 8));
            assert_eq!(outcome.tokens, alone[turn % 4]);
            loaded.push(outcome.timing.bytes_loaded);
            if turn >= 20 {
                // The status may be a little old while there is work.
                let mut fetched = None;
                loop {
                    let now = node.status().bytes_prefetched_total;
                    if fetched.replace(now) == Some(now) {
                        break;
                    }
                    std::thread::sleep(Duration::from_millis(120));
                }
            }
        }
        // Its last tensor may not be worth what would have to go for it, for loading it is hidden behind the others.
        assert!(loaded[21..].iter().all(|&bytes| bytes <= weights / 4), "{backend:?}: {loaded:?}");
        assert!(node.status().bytes_prefetched_total > weights);
    }
}

/// A prompt that begins as an earlier one is computed from where they part, with the same tokens; the cached blocks
/// give way when their room is needed.
#[test]
fn common_prefixes_are_computed_once() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    random_model(sources.path(), 3);
    let node = open(data.path(), 32 << 20);
    let model = deploy(&node, "m", sources.path());
    let system: Vec<u32> = (0..40).map(|i| 3 + i % 50).collect();
    let prompt = |end: u32| system.iter().copied().chain([end, end + 1]).collect::<Vec<u32>>();
    let first = run(&node, request(&model, &prompt(60), 30));
    assert_eq!(first.timing.cached_tokens, 0);
    let again = run(&node, request(&model, &prompt(60), 30));
    assert_eq!((again.timing.cached_tokens, &again.tokens), (32, &first.tokens));
    let other = run(&node, request(&model, &prompt(90), 30));
    assert_eq!(other.timing.cached_tokens, 32);
    // A conversation that goes on finds what was generated, too.
    let longer: Vec<u32> = prompt(60).into_iter().chain(first.tokens.iter().copied()).chain([7]).collect();
    assert_eq!(run(&node, request(&model, &longer, 4)).timing.cached_tokens, 64);
    // The same model under another name has the same keys and values.
    let copy = deploy(&node, "copy", sources.path());
    let from_copy = run(&node, request(&copy, &prompt(60), 30));
    assert_eq!((from_copy.timing.cached_tokens, &from_copy.tokens), (32, &first.tokens));
    all_kv_is_back(&node);
    node.remove("copy").unwrap();
    assert_eq!(run(&node, request(&model, &prompt(60), 30)).timing.cached_tokens, 32);
    eventually("cached prefixes are shown", || node.status().kv_cached_bytes > 0);
    // The same answers from a node that has cached nothing.
    let fresh = tempfile::tempdir().unwrap();
    let node = open(fresh.path(), 32 << 20);
    let model = deploy(&node, "m", sources.path());
    assert_eq!(run(&node, request(&model, &prompt(90), 30)).tokens, other.tokens);
}

#[test]
fn a_client_that_goes_away_frees_its_kv() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    random_model(sources.path(), 0);
    let node = open(data.path(), 32 << 20);
    let model = deploy(&node, "m", sources.path());
    for _ in 0..20 {
        let mut generation = node.generate(request(&model, &[5; 40], 64)).unwrap();
        generation.next_blocking();
        drop(generation);
    }
    all_kv_is_back(&node);
}

/// Without a request that comes after it, or anything else that makes room.
#[test]
fn what_was_loading_for_a_client_that_went_away_leaves_with_its_model() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_hf_model(
        sources.path(),
        &RandomModel { hidden: 256, intermediate: 2048, layers: 8, ..RandomModel::tiny(Family::Llama) },
    );
    let node = open(data.path(), 128 << 20);
    for turn in 0..10 {
        let model = deploy(&node, "m", sources.path());
        let generation = node.generate(request(&model, &[5; 40], 64)).unwrap();
        eventually("it begins to load", || node.status().activations_total > turn);
        drop(generation);
        node.remove("m").unwrap();
        eventually("everything is given back", || node.status().resident_bytes == 0);
    }
}

#[test]
fn a_damaged_file_fails_its_model_by_name_and_others_go_on() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for (name, seed) in [("good", 1), ("bad", 2)] {
        random_model(&sources.path().join(name), seed);
    }
    let node = open(data.path(), 32 << 20);
    let good = deploy(&node, "good", &sources.path().join("good"));
    let bad = deploy(&node, "bad", &sources.path().join("bad"));
    let file = bad.directory.join(tangram_checkpoint::DATA_FILE);
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    for _ in 0..3 {
        let error = finish(node.generate(request(&bad, &[5, 6], 4)).unwrap()).err().unwrap();
        let RequestError::LoadFailed { model, reason } = &error else { panic!("{error}") };
        assert_eq!(model, "bad");
        assert!(reason.contains("deploy"), "{reason}");
        assert_eq!(run(&node, request(&good, &[5, 6], 4)).reason, FinishReason::Length);
    }
    all_kv_is_back(&node);
    // Deploying again repairs it; the damaged content is not taken for known.
    let repaired = deploy(&node, "bad", &sources.path().join("bad"));
    assert_eq!(run(&node, request(&repaired, &[5, 6], 4)).tokens.len(), 4);
}

#[test]
fn what_cannot_run_is_refused_with_the_numbers() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    random_model(&sources.path().join("small"), 0);
    let large = RandomModel { vocab: 4096, hidden: 256, seed: 1, ..RandomModel::tiny(Family::Llama) };
    write_hf_model(&sources.path().join("large"), &large);
    let node = open(data.path(), 2 << 20);
    let error = node
        .deploy("large", &sources.path().join("large"), &mut |_| std::ops::ControlFlow::Continue(()))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("does not fit") && error.contains("bytes"), "{error}");
    assert!(node.model("large").is_none());
    let model = deploy(&node, "small", &sources.path().join("small"));
    let refused = |request: GenerateRequest| node.generate(request).err().unwrap().to_string();
    assert!(refused(request(&model, &[], 4)).contains("empty"));
    assert!(refused(request(&model, &[u32::MAX], 4)).contains("vocabulary"));
    assert!(refused(request(&model, &[5; 10], 100_000)).contains("maximum context length"));
    assert!(node.embed(&model, vec![vec![5]]).is_err());
}

#[test]
fn removing_and_replacing_leaves_no_files_and_loses_no_shared_tensor() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (base_dir, tuned_dir) = (sources.path().join("base"), sources.path().join("tuned"));
    random_model(&base_dir, 4);
    mutate_layer(&base_dir, &tuned_dir, 0);
    let node = open(data.path(), 32 << 20);
    let base = deploy(&node, "base", &base_dir);
    let tuned = deploy(&node, "tuned", &tuned_dir);
    let expected = run(&node, request(&tuned, &[9, 8, 7], 12)).tokens;
    run(&node, request(&base, &[9, 8, 7], 12));
    node.remove("base").unwrap();
    assert!(node.model("base").is_none());
    eventually("the removed model is no longer listed", || node.list().len() == 1);
    drop(node);
    let node = open(data.path(), 32 << 20);
    let tuned = node.model("tuned").unwrap();
    assert_eq!(
        run(&node, request(&tuned, &[9, 8, 7], 12)).tokens,
        expected,
        "base's file still serves tuned"
    );
    deploy(&node, "tuned", &base_dir);
    node.remove("tuned").unwrap();
    let checkpoints = data.path().join("checkpoints");
    eventually("no files are left", || std::fs::read_dir(&checkpoints).unwrap().count() == 0);
    assert_eq!(std::fs::read_dir(data.path().join("staging")).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_put_into_service_leaves_what_it_was_to_replace() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (old_dir, new_dir) = (sources.path().join("old"), sources.path().join("new"));
    for (seed, dir) in [(4, &old_dir), (5, &new_dir)] {
        write_hf_model(dir, &RandomModel { seed, vocab: 300, ..RandomModel::tiny(Family::Llama) });
    }
    let node = open(data.path(), 32 << 20);
    let old = deploy(&node, "m", &old_dir);
    assert!(old.tokenizer.is_some());
    let expected = run(&node, request(&old, &[9, 8, 7], 12)).tokens;
    // The tokenizer is written through a link that leads nowhere once the checkpoint has its final place: the model is
    // catalogued, and then cannot be taken up.
    let staging = data.path().join("staging");
    std::fs::create_dir(staging.join("here")).unwrap();
    let mut link = |_| {
        for dir in std::fs::read_dir(&staging).unwrap().map(|entry| entry.unwrap().path()) {
            let _ = std::os::unix::fs::symlink("../here/tokenizer", dir.join("tokenizer.json"));
        }
        std::ops::ControlFlow::Continue(())
    };
    let error = node.deploy("m", &new_dir, &mut link).unwrap_err().to_string();
    assert!(error.contains("tokenizer.json"), "{error}");
    let serves = |node: &Arc<Node>| {
        let model = node.model("m").unwrap();
        assert_eq!(run(node, request(&model, &[9, 8, 7], 12)).tokens, expected);
    };
    serves(&node);
    let checkpoints = data.path().join("checkpoints");
    eventually("the files of the other are gone", || std::fs::read_dir(&checkpoints).unwrap().count() == 1);
    drop(node);
    let node = open(data.path(), 32 << 20);
    serves(&node);
    assert_eq!(std::fs::read_dir(&checkpoints).unwrap().count(), 1);
}

#[test]
fn the_data_directory_has_one_owner() {
    let data = tempfile::tempdir().unwrap();
    let node = open(data.path(), 4 << 20);
    let config = config(data.path(), 4 << 20);
    let error = Node::open(config.clone()).err().unwrap().to_string();
    assert!(error.contains("in use"), "{error}");
    drop(node);
    assert!(Node::open(config).is_ok());
}

#[test]
fn an_import_that_is_cancelled_or_litter_of_a_crash_leaves_nothing() {
    let (sources, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    random_model(sources.path(), 5);
    let node = open(data.path(), 32 << 20);
    let error = node.deploy("m", sources.path(), &mut |_| std::ops::ControlFlow::Break(())).err().unwrap();
    assert!(matches!(error, tangram_node::DeployError::Cancelled), "{error}");
    drop(node);
    for litter in ["staging/0123", "checkpoints/4567"] {
        std::fs::create_dir_all(data.path().join(litter)).unwrap();
        std::fs::write(data.path().join(litter).join("data.bin"), b"half").unwrap();
    }
    let node = open(data.path(), 32 << 20);
    assert!(node.models().is_empty());
    for dir in ["staging", "checkpoints"] {
        assert_eq!(std::fs::read_dir(data.path().join(dir)).unwrap().count(), 0, "{dir}");
    }
}
