//! Deploying from a web server: the same model as from this disk, whatever the server does.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::{config, deploy, eventually, finish, request, run};
use tangram_node::{
    Backend, DeployError, DeployedModel, Node, NodeConfig, RemoteOptions, RemoteSource, RequestError,
};
use tangram_testkit::web::{Fault, Server};
use tangram_testkit::{Family, GgmlType, GgufOptions, RandomModel, mutate_layer, write_gguf, write_hf_model};

const POOL: u64 = 16 << 20;
const PROMPT: [u32; 5] = [3, 1, 4, 1, 5];

/// Settings under which nothing takes long.
fn quick(data: &Path) -> NodeConfig {
    let mut remote = RemoteOptions {
        chunk_bytes: 16 << 10,
        stall: Duration::from_millis(250),
        give_up: Duration::from_secs(10),
        start_jitter: Duration::ZERO,
        ..RemoteOptions::default()
    };
    remote.backoff.base = Duration::from_millis(1);
    remote.backoff.cap = Duration::from_millis(8);
    remote.backoff.attempts = 40;
    NodeConfig { remote, ..config(data, POOL) }
}

fn deploy_remote(node: &Arc<Node>, name: &str, url: &str) -> Result<Arc<DeployedModel>, DeployError> {
    let source = RemoteSource::parse(url).unwrap().unwrap();
    node.deploy_remote(name, &source, &mut |_| ControlFlow::Continue(()))
}

/// Entries of a folder; none if it is not there.
fn count(folder: &Path) -> usize {
    std::fs::read_dir(folder).map_or(0, Iterator::count)
}

#[test]
fn a_remote_model_is_the_same_as_a_local_one() {
    let (data, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_hf_model(files.path(), &RandomModel { shards: 2, ..RandomModel::tiny(Family::Llama) });
    let server = Server::start();
    server.put_folder("/org/tiny", files.path());
    server.random_faults(7, 0.2);
    let node = Node::open(quick(data.path())).unwrap();
    let remote = deploy_remote(&node, "remote", &server.url("/org/tiny")).unwrap();
    let tokens = run(&node, request(&remote, &PROMPT, 20)).tokens;
    let local = deploy(&node, "local", files.path());
    assert_eq!(run(&node, request(&local, &PROMPT, 20)).tokens, tokens);
    let shared = node.list().into_iter().find(|status| status.name == "local").unwrap().shared_bytes;
    assert_eq!(shared, local.weight_bytes, "the contents are the same");
    assert_eq!(count(&data.path().join("downloads")), 0, "a finished download is not kept");
}

#[test]
fn a_download_that_fails_leaves_no_model_and_goes_on_the_next_time() {
    let (data, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_hf_model(files.path(), &RandomModel::tiny(Family::Llama));
    let server = Server::start();
    server.put_folder("/tiny", files.path());
    let size = std::fs::metadata(files.path().join("model.safetensors")).unwrap().len();
    // The last chunk never comes.
    server.faults(move |_, range| match range {
        Some((_, last)) if last + 1 == size => Fault::Unavailable,
        _ => Fault::None,
    });
    let url = server.url("/tiny");
    let node = Node::open(quick(data.path())).unwrap();
    let error = deploy_remote(&node, "m", &url).unwrap_err();
    assert!(error.to_string().contains("503") && node.model("m").is_none(), "{error}");
    eventually("its files are gone", || count(&data.path().join("checkpoints")) == 0);
    drop(node);
    let node = Node::open(quick(data.path())).unwrap();
    assert!(node.model("m").is_none() && count(&data.path().join("downloads")) == 1);
    server.faults(|_, _| Fault::None);
    let before = server.state.sent.load(Ordering::Relaxed);
    let model = deploy_remote(&node, "m", &url).unwrap();
    let sent = server.state.sent.load(Ordering::Relaxed) - before;
    assert!(sent < size / 2, "{sent} bytes of {size} were sent again");
    let tokens = run(&node, request(&model, &PROMPT, 20)).tokens;
    let local = deploy(&node, "local", files.path());
    assert_eq!(run(&node, request(&local, &PROMPT, 20)).tokens, tokens);
}

#[test]
fn what_is_no_checkpoint_is_refused_with_its_address() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start();
    let node = Node::open(quick(data.path())).unwrap();
    let error = deploy_remote(&node, "m", &server.url("/nothing")).unwrap_err().to_string();
    assert!(error.contains("/nothing") && error.contains("config.json"), "{error}");
    server.put("/x.gguf", b"this is not a model");
    let error = deploy_remote(&node, "m", &server.url("/x.gguf")).unwrap_err().to_string();
    assert!(error.contains("x.gguf") && error.contains("not a GGUF file"), "{error}");
    assert_eq!(count(&data.path().join("downloads")), 0, "it is not kept");
}

/// A server with the model in `files` at `/m` that keeps the last chunk of the weights until it is told.
fn holding_back(files: &Path, headers: &[(&str, &str)]) -> (Server, Arc<AtomicBool>) {
    let (server, open) = (Server::start(), Arc::new(AtomicBool::new(false)));
    server.put_folder("/m", files);
    let weights = std::fs::read(files.join("model.safetensors")).unwrap();
    let size = weights.len() as u64;
    server.put_with("/m/model.safetensors", &weights, headers);
    let opened = open.clone();
    server.faults(move |_, range| match range {
        Some((_, last)) if last + 1 == size && !opened.load(Ordering::Relaxed) => Fault::Unavailable,
        _ => Fault::None,
    });
    (server, open)
}

/// With patience for a server that holds something back.
fn patient(data: &Path, backend: Backend) -> NodeConfig {
    let mut config = NodeConfig { backend, ..quick(data) };
    config.remote.backoff.attempts = 1_000_000;
    config
}

fn shared_bytes(node: &Node, name: &str) -> u64 {
    node.list().into_iter().find(|status| status.name == name).unwrap().shared_bytes
}

/// Requests are accepted while the model is still coming, and what they brought to the device stays when it has come.
#[test]
fn a_model_is_served_while_it_is_downloaded() {
    for backend in [Backend::Paged, Backend::Segment] {
        let (data, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write_hf_model(files.path(), &RandomModel::tiny(Family::Llama));
        let (server, open) = holding_back(files.path(), &[]);
        let node = Node::open(patient(data.path(), backend)).unwrap();
        let url = server.url("/m");
        let (deployed, early) = std::thread::scope(|scope| {
            let deploying = scope.spawn(|| deploy_remote(&node, "m", &url));
            eventually("the model is announced", || node.model("m").is_some());
            let model = node.model("m").unwrap();
            let generation = node.generate(request(&model, &PROMPT, 20)).unwrap();
            eventually("the request runs", || node.status().running == 1);
            assert!(!deploying.is_finished(), "the last bytes are not there");
            assert!(matches!(node.remove("m"), Err(DeployError::Arriving(_))), "it is not catalogued yet");
            open.store(true, Ordering::Relaxed);
            (deploying.join().unwrap().unwrap(), finish(generation).unwrap())
        });
        assert_eq!(early.timing.bytes_loaded, deployed.weight_bytes, "{backend:?}");
        let again = run(&node, request(&deployed, &PROMPT, 20));
        assert_eq!(again.tokens, early.tokens);
        assert_eq!(again.timing.bytes_loaded, 0, "what was brought to the device is not loaded again");
        let local = deploy(&node, "local", files.path());
        assert_eq!(shared_bytes(&node, "local"), local.weight_bytes, "it got its true identities");
        assert_eq!(run(&node, request(&local, &PROMPT, 20)).tokens, early.tokens);
        drop(node);
        let node = Node::open(quick(data.path())).unwrap();
        let kept = node.model("m").unwrap();
        assert_eq!(run(&node, request(&kept, &PROMPT, 20)).tokens, early.tokens, "after a restart");
    }
}

/// What this disk has already is referenced when the rest has come.
#[test]
fn an_arriving_model_shares_what_is_there() {
    let (data, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (base, tuned) = (files.path().join("base"), files.path().join("tuned"));
    write_hf_model(&base, &RandomModel::tiny(Family::Llama));
    mutate_layer(&base, &tuned, 1);
    let (server, open) = holding_back(&tuned, &[]);
    let node = Node::open(patient(data.path(), Backend::Paged)).unwrap();
    let first = deploy(&node, "base", &base);
    let before = run(&node, request(&first, &PROMPT, 20));
    let url = server.url("/m");
    let (deployed, early) = std::thread::scope(|scope| {
        let deploying = scope.spawn(|| deploy_remote(&node, "m", &url));
        eventually("the model is announced", || node.model("m").is_some());
        let generation = node.generate(request(&node.model("m").unwrap(), &PROMPT, 20)).unwrap();
        open.store(true, Ordering::Relaxed);
        (deploying.join().unwrap().unwrap(), finish(generation).unwrap())
    });
    let shared = shared_bytes(&node, "m");
    assert!(shared > 0 && shared < deployed.weight_bytes, "{shared} of {}", deployed.weight_bytes);
    assert_eq!(run(&node, request(&deployed, &PROMPT, 20)).tokens, early.tokens);
    node.remove("base").unwrap();
    drop(node);
    let node = Node::open(quick(data.path())).unwrap();
    assert_eq!(run(&node, request(&node.model("m").unwrap(), &PROMPT, 20)).tokens, early.tokens);
    let again = deploy(&node, "base", &base);
    assert_eq!(run(&node, request(&again, &PROMPT, 20)).tokens, before.tokens);
}

/// Runs a request on a model that is arriving, lets the deployment fail, and gives both errors.
fn failing(headers: &[(&str, &str)], end: impl Fn(&Server)) -> (String, String) {
    let (data, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_hf_model(files.path(), &RandomModel { context: 8192, ..RandomModel::tiny(Family::Llama) });
    let (server, open) = holding_back(files.path(), headers);
    let node = Node::open(patient(data.path(), Backend::Paged)).unwrap();
    let url = server.url("/m");
    let (deployment, request) = std::thread::scope(|scope| {
        let deploying = scope.spawn(|| deploy_remote(&node, "m", &url));
        eventually("the model is announced", || node.model("m").is_some());
        // So long that it cannot end before the deployment does.
        let generation = node.generate(common::request(&node.model("m").unwrap(), &PROMPT, 8000)).unwrap();
        eventually("the request runs", || node.status().running == 1);
        end(&server);
        open.store(true, Ordering::Relaxed);
        (deploying.join().unwrap().unwrap_err(), finish(generation).err())
    });
    assert!(node.model("m").is_none() && node.list().is_empty());
    eventually("everything is given back", || {
        let status = node.status();
        status.resident_bytes == 0 && status.kv_blocks == 0 && count(&data.path().join("checkpoints")) == 0
    });
    let request = match request {
        Some(RequestError::LoadFailed { reason, .. }) => reason,
        other => panic!("the request must fail: {other:?}"),
    };
    // And it is not in the way of another attempt.
    server.put_folder("/m", files.path());
    let model = deploy_remote(&node, "m", &url).unwrap();
    assert_eq!(run(&node, common::request(&model, &PROMPT, 5)).tokens.len(), 5);
    (deployment.to_string(), request)
}

#[test]
fn a_model_that_does_not_come_is_withdrawn() {
    let (deployment, request) = failing(&[], |server| {
        server.state.objects.lock().unwrap().remove("/m/model.safetensors");
    });
    assert!(deployment.contains("not there any more"), "{deployment}");
    assert_eq!(deployment, request);
}

#[test]
fn a_model_whose_bytes_do_not_match_their_hash_is_withdrawn() {
    let wrong = "0".repeat(64);
    let (deployment, request) = failing(&[("x-linked-etag", &wrong)], |_| ());
    assert!(deployment.contains("SHA-256"), "{deployment}");
    assert_eq!(deployment, request);
}

#[test]
fn a_gguf_file_arrives_as_it_is_imported() {
    let (data, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let path = files.path().join("m.gguf");
    let options = GgufOptions { dtype: GgmlType::Q4_0, ..GgufOptions::default() };
    write_gguf(&path, &RandomModel::tiny(Family::Llama), options);
    let server = Server::start();
    server.put_folder("/x", files.path());
    server.random_faults(3, 0.2);
    let node = Node::open(quick(data.path())).unwrap();
    let remote = deploy_remote(&node, "remote", &server.url("/x/m.gguf")).unwrap();
    let local = deploy(&node, "local", &path);
    assert_eq!(shared_bytes(&node, "local"), local.weight_bytes);
    let tokens = |model| run(&node, request(model, &PROMPT, 20)).tokens;
    assert_eq!(tokens(&remote), tokens(&local));
}
