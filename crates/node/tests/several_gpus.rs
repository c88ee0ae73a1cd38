//! A node with two GPUs that are none (as in `cuda.rs`): which of them a request goes to, and what one does without the
//! other. The processor has the same tokens.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use common::gpu::{PAGE, gpu, on_gpu};
use common::{deploy, eventually, finish, open, request, run};
use tangram_device::cuda::stand_in::{Delay, Left, StandIn};
use tangram_node::{DeployedModel, Generation, Node, NodeConfig, RequestError};
use tangram_testkit::{Family, RandomAdapter, RandomModel, write_adapter, write_hf_model};
use tempfile::{TempDir, tempdir};

const PROMPT: [u32; 4] = [9, 8, 7, 25];

/// Two stand-ins, with room for pools of these bytes.
fn gpus(pools: [usize; 2]) -> Option<[StandIn; 2]> {
    Some([gpu(pools[0], Delay::Latest)?, gpu(pools[1], Delay::Random(3))?])
}

/// One node on both.
fn on_both(gpus: &[StandIn; 2], data: &Path, pool: Option<usize>) -> NodeConfig {
    let [first, second] = gpus.each_ref().map(|gpu| on_gpu(gpu, data, 0));
    let devices = [first.devices.clone(), second.devices].concat();
    NodeConfig { devices, device_memory: pool.map(|bytes| bytes as u64), ..first }
}

/// Two models that fill most of a pool with positions that cost no time, and what the processor answers with.
struct Two {
    sources: TempDir,
    data: TempDir,
    weights: u64,
    expected: [Vec<u32>; 2],
}

impl Two {
    fn new() -> Two {
        let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
        for (name, seed) in [("a", 21), ("b", 22)] {
            let model = RandomModel { seed, context: 4000, ..RandomModel::tiny(Family::Gpt2) };
            write_hf_model(&sources.path().join(name), &model);
        }
        let on_cpu = open(data.path(), 64 << 20);
        let models = ["a", "b"].map(|name| deploy(&on_cpu, name, &sources.path().join(name)));
        let expected = models.each_ref().map(|model| run(&on_cpu, request(model, &PROMPT, 3)).tokens);
        Two { weights: models[0].weight_bytes, sources, data, expected }
    }

    /// A pool with room for one of them.
    fn pool_for_one(&self) -> usize {
        (self.weights as usize + (512 << 10)).next_multiple_of(PAGE)
    }
}

/// Ends the node.
fn nothing_is_left(node: Arc<Node>, gpus: &[StandIn; 2]) {
    drop(node);
    for gpu in gpus {
        eventually("everything is given back", || gpu.left() == Left::default());
        assert_eq!(gpu.violations(), Vec::<String>::new());
    }
}

/// Bytes loaded by each device.
fn loaded(node: &Node) -> Vec<u64> {
    node.status().devices.iter().map(|device| device.bytes_loaded_total).collect()
}

fn model(node: &Node, name: &str) -> Arc<DeployedModel> {
    node.model(name).unwrap()
}

/// So many requests for one token at once.
fn many(node: &Node, name: &str, count: usize) -> Vec<Generation> {
    let ask = |_| node.generate(request(&model(node, name), &PROMPT[..1], 1)).unwrap();
    (0..count).map(ask).collect()
}

#[test]
fn models_that_do_not_fit_together_live_on_both_and_stay() {
    let two = Two::new();
    let pool = two.pool_for_one();
    let Some(gpus) = gpus([pool; 2]) else { return };
    let config = NodeConfig { host_memory: 4 << 20, ..on_both(&gpus, two.data.path(), Some(pool)) };
    let node = Node::open(config).unwrap();
    assert_eq!(node.pool_bytes(), 2 * pool as u64);
    // Half of host memory is for each, an eighth of it not for weights.
    let (tier, page) = ((2 << 20) * 7 / 8, PAGE as u64);
    eventually("host memory is pinned", || {
        node.status().devices.iter().all(|gpu| (tier + 1 - page..=tier).contains(&gpu.host_tier_bytes))
    });
    for round in 0..6 {
        for (name, expected) in ["a", "b"].iter().zip(&two.expected) {
            let outcome = run(&node, request(&model(&node, name), &PROMPT, 3));
            assert_eq!(&outcome.tokens, expected, "{name}, round {round}");
            let cold = if round == 0 { two.weights } else { 0 };
            assert_eq!(outcome.timing.bytes_loaded, cold, "{name}, round {round}");
        }
    }
    eventually("the loads are counted", || loaded(&node) == [two.weights; 2]);
    let status = node.status();
    assert_eq!((status.bytes_loaded_total, status.bytes_evicted_total), (2 * two.weights, 0));
    assert_eq!((status.pool_bytes, status.devices.len()), (2 * pool as u64, 2));
    assert!(status.device.matches("stand-in").count() == 2 && status.devices[1].device.contains("stand-in"));
    for (model, resident) in node.list().iter().zip([[two.weights, 0], [0, two.weights]]) {
        assert_eq!((model.resident_bytes, &model.resident_by_device[..]), (two.weights, &resident[..]));
    }
    nothing_is_left(node, &gpus);
}

/// More requests for one model than run at once on a device, and no other requests.
#[test]
fn a_long_queue_is_shared() {
    let two = Two::new();
    let pool = 64 << 20;
    let Some(gpus) = gpus([pool; 2]) else { return };
    let node = Node::open(on_both(&gpus, two.data.path(), Some(pool))).unwrap();
    let alone = run(&node, request(&model(&node, "a"), &PROMPT[..1], 1)).tokens;
    for generation in many(&node, "a", 80) {
        assert_eq!(finish(generation).unwrap().tokens, alone);
    }
    eventually("both have it", || loaded(&node) == [two.weights; 2]);
    nothing_is_left(node, &gpus);
}

/// What runs on a lost GPU fails and says so, what runs on the other does not notice, and until the lost one is back
/// everything goes to the other.
#[test]
fn one_gpu_is_lost_and_the_other_serves() {
    const ECC: i32 = 214;
    let two = Two::new();
    let pool = 16 << 20;
    let Some(gpus) = gpus([pool; 2]) else { return };
    let node = Node::open(on_both(&gpus, two.data.path(), Some(pool))).unwrap();
    let ask = |name: &str| node.generate(request(&model(&node, name), &PROMPT, 3));
    assert_eq!(finish(ask("a").unwrap()).unwrap().tokens, two.expected[0]);
    eventually("the load is counted", || loaded(&node) == [two.weights, 0]);
    // Another process has the memory, so that it cannot be set up again.
    gpus[0].occupy(2 << 30);
    gpus[0].fail("execution", 1, ECC);
    let Err(error) = finish(ask("a").unwrap()) else { panic!("nobody was told") };
    assert!(matches!(&error, RequestError::DeviceLost(_)), "{error}");
    eventually("it is lost", || node.status().devices[0].lost);
    for _ in 0..3 {
        for (name, expected) in ["a", "b"].iter().zip(&two.expected) {
            assert_eq!(&finish(ask(name).unwrap()).unwrap().tokens, expected);
        }
    }
    gpus[0].occupy(0);
    eventually("it is back", || !node.status().devices[0].lost);
    eventually("the rebuild is counted", || node.status().device_rebuilds_total == 1);
    // It is empty now, so models go on where they are.
    assert_eq!(finish(ask("a").unwrap()).unwrap().tokens, two.expected[0]);
    eventually("everything is on the other", || loaded(&node) == [two.weights, 2 * two.weights]);
    // When the other one is lost, it serves what it knew before.
    gpus[1].occupy(2 << 30);
    gpus[1].fail("execution", 1, ECC);
    assert!(finish(ask("b").unwrap()).is_err());
    eventually("the other one is lost", || node.status().devices[1].lost);
    assert_eq!(finish(ask("b").unwrap()).unwrap().tokens, two.expected[1]);
    eventually("the first one has loaded", || loaded(&node) == [2 * two.weights, 2 * two.weights]);
    nothing_is_left(node, &gpus);
}

/// More than both run at once when one is lost: of what it ran nothing comes, what waited for it comes from the other.
#[test]
fn what_waits_for_a_lost_gpu_goes_to_the_other() {
    const LAUNCH_FAILED: i32 = 719;
    const MOST_AT_ONCE: usize = 64;
    let two = Two::new();
    let pool = 16 << 20;
    let Some(gpus) = gpus([pool; 2]) else { return };
    let node = Node::open(on_both(&gpus, two.data.path(), Some(pool))).unwrap();
    let alone = run(&node, request(&model(&node, "a"), &PROMPT[..1], 1)).tokens;
    gpus[0].occupy(2 << 30);
    // In one of its first steps, when more are waiting than run.
    gpus[0].fail("execution", 30, LAUNCH_FAILED);
    let outcomes: Vec<_> = many(&node, "a", 200).into_iter().map(finish).collect();
    let mut failed = 0;
    for outcome in outcomes {
        match outcome {
            Ok(outcome) => assert_eq!(outcome.tokens, alone),
            Err(error) => {
                assert!(matches!(error, RequestError::DeviceLost(_)), "{error}");
                failed += 1;
            }
        }
    }
    println!("{failed} failed");
    assert!((1..=MOST_AT_ONCE).contains(&failed), "{failed} failed");
    gpus[0].occupy(0);
    nothing_is_left(node, &gpus);
}

/// Deployments, removals and adapters reach both; files go when the last of both has let go.
#[test]
fn deployments_and_removals_reach_both() {
    let two = Two::new();
    let pool = 16 << 20;
    let Some(gpus) = gpus([pool; 2]) else { return };
    let node = Node::open(on_both(&gpus, two.data.path(), Some(pool))).unwrap();
    let source = |name: &str| two.sources.path().join(name);
    write_adapter(&source("a"), &source("x"), &RandomAdapter::new(3));
    let adapter = node.deploy_adapter("x", &source("x"), "a", &mut |_| ControlFlow::Continue(())).unwrap();
    let alone = ["a", "x"].map(|name| run(&node, request(&model(&node, name), &PROMPT[..1], 1)).tokens);
    assert_ne!(run(&node, request(&adapter, &PROMPT, 3)).tokens, two.expected[0]);
    // Enough that both take part.
    let (base, adapted) = (many(&node, "a", 70), many(&node, "x", 70));
    node.remove("x").unwrap();
    assert!(node.model("x").is_none());
    for (generations, alone) in [(base, &alone[0]), (adapted, &alone[1])] {
        for generation in generations {
            assert_eq!(&finish(generation).unwrap().tokens, alone);
        }
    }
    eventually("both have the base", || {
        node.list().iter().any(|model| model.resident_by_device == [two.weights; 2])
    });
    // Under its name there is another model now.
    let anew = deploy(&node, "a", &source("b"));
    assert_eq!(run(&node, request(&anew, &PROMPT, 3)).tokens, two.expected[1]);
    node.remove("a").unwrap();
    node.remove("b").unwrap();
    eventually("nothing is resident", || node.status().resident_bytes == 0);
    let checkpoints = || std::fs::read_dir(two.data.path().join("checkpoints")).unwrap().count();
    eventually("the files are gone", || checkpoints() == 0);
    nothing_is_left(node, &gpus);
}

/// GPUs of different size: a model that only the large one holds goes there, also while that is busy.
#[test]
fn what_does_not_fit_on_the_small_one_goes_to_the_large_one() {
    let two = Two::new();
    let sizes = [two.weights as usize / 2, 2 * two.weights as usize + (4 << 20)];
    let Some(gpus) = gpus(sizes.map(|bytes| bytes.next_multiple_of(PAGE))) else { return };
    // What is left free is the pool, the reserve and a page for moves.
    gpus.iter().for_each(|gpu| gpu.occupy((1 << 30) - PAGE));
    let node = Node::open(on_both(&gpus, two.data.path(), None)).unwrap();
    assert_eq!(run(&node, request(&model(&node, "a"), &PROMPT, 3)).tokens, two.expected[0]);
    many(&node, "a", 70).into_iter().for_each(|generation| drop(finish(generation).unwrap()));
    assert!(model(&node, "a").context > 100, "that of the large one");
    eventually("it is on the large one", || loaded(&node) == [0, two.weights]);
    nothing_is_left(node, &gpus);
}

#[test]
fn lists_of_devices_that_make_no_sense_are_refused() {
    let Some(gpus) = gpus([4 << 20; 2]) else { return };
    let data = tempdir().unwrap();
    let both = on_both(&gpus, data.path(), Some(4 << 20));
    let gpu = both.devices[0].clone();
    for (devices, word) in [
        (vec![gpu.clone(), gpu.clone()], "twice"),
        (vec![gpu, tangram_node::Device::Cpu], "processor"),
        (vec![], "no device"),
    ] {
        let error = Node::open(NodeConfig { devices, ..both.clone() }).err().unwrap();
        assert!(error.to_string().contains(word), "{error}");
    }
}
