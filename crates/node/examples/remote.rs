//! Time to the first token of a model that is on no disk yet, beside what its link and its computation take alone.
//!
//! A web server in this process sends at a bounded rate. Per round, one after the other: the files are downloaded and
//! nothing else; a resident model computes the same prompt and is removed; the model is deployed from the server, and a
//! request is sent as soon as it is accepted. Prints the ratio of the last to the larger of the others.
//!
//! Usage: remote [ROUNDS] [MICROSECONDS between 16 KiB on a connection] [PROMPT TOKENS]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tangram_node::{
    DeployedModel, GenerateEvent, GenerateRequest, Node, NodeConfig, RemoteOptions, RemoteSource,
    SamplingParams,
};
use tangram_remote::Remote;
use tangram_testkit::web::Server;
use tangram_testkit::{Family, RandomModel, write_hf_model};

const POOL: u64 = 512 << 20;

fn main() {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u64>().unwrap());
    let rounds = arguments.next().unwrap_or(3);
    let pace = Duration::from_micros(arguments.next().unwrap_or(1500));
    let prompt_tokens = arguments.next().unwrap_or(128) as u32;
    let files = tempfile::tempdir().unwrap();
    let model = RandomModel {
        hidden: 512,
        intermediate: 1536,
        layers: 12,
        heads: 8,
        kv_heads: 8,
        head_dim: 64,
        vocab: 8000,
        context: 2048,
        ..RandomModel::tiny(Family::Llama)
    };
    write_hf_model(files.path(), &model);
    let server = Server::start();
    server.put_folder("/m", files.path());
    *server.state.pace.lock().unwrap() = pace;
    let source = RemoteSource::parse(&server.url("/m")).unwrap().unwrap();
    let prompt: Vec<u32> = (0..prompt_tokens).map(|i| 5 + i % 300).collect();
    println!("MiB\tlink s\tprefill s\tfirst token s\tdeployed s\tfirst token / max(link, prefill)");
    for _ in 0..rounds {
        let dir = tempfile::tempdir().unwrap();
        let start = Instant::now();
        let remote = Remote::new(dir.path().to_path_buf(), options()).unwrap();
        let fetch = remote.download(&source, &mut |_| ControlFlow::Continue(())).unwrap();
        let link = start.elapsed().as_secs_f64();
        let mebibytes = fetch.progress().bytes_total >> 20;
        drop((fetch, remote));

        let dir = tempfile::tempdir().unwrap();
        let node = open(dir.path());
        let local = node.deploy("m", files.path(), &mut |_| ControlFlow::Continue(())).unwrap();
        first_token(&node, &local, &[9, 8, 7]);
        let start = Instant::now();
        first_token(&node, &local, &prompt);
        let prefill = start.elapsed().as_secs_f64();
        // The node has measured its machine; nothing of the model is left on its disk or device.
        node.remove("m").unwrap();
        while node.status().resident_bytes > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }

        let start = Instant::now();
        let (first, deployed) = std::thread::scope(|scope| {
            let deploying = scope.spawn(|| {
                node.deploy_remote("m", &source, &mut |_| ControlFlow::Continue(())).unwrap();
                start.elapsed().as_secs_f64()
            });
            let model = loop {
                if let Some(model) = node.model("m") {
                    break model;
                }
                std::thread::sleep(Duration::from_millis(1));
            };
            first_token(&node, &model, &prompt);
            (start.elapsed().as_secs_f64(), deploying.join().unwrap())
        });
        let ratio = first / link.max(prefill);
        println!("{mebibytes}\t{link:.3}\t{prefill:.3}\t{first:.3}\t{deployed:.3}\t{ratio:.3}");
    }
}

fn options() -> RemoteOptions {
    RemoteOptions { start_jitter: Duration::ZERO, ..RemoteOptions::default() }
}

fn open(data: &std::path::Path) -> Arc<Node> {
    Node::open(NodeConfig { remote: options(), ..NodeConfig::new(data.to_path_buf(), POOL) }).unwrap()
}

fn first_token(node: &Node, model: &Arc<DeployedModel>, prompt: &[u32]) {
    let request = GenerateRequest {
        model: model.clone(),
        prompt: prompt.to_vec(),
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens: Some(1),
        ignore_eos: true,
        stop_token_ids: Vec::new(),
        grammar: None,
    };
    let mut generation = node.generate(request).unwrap();
    loop {
        match generation.next_blocking().unwrap() {
            GenerateEvent::Token(_) => return,
            GenerateEvent::Failed(error) => panic!("{error}"),
            _ => {}
        }
    }
}
