//! Constrained output against many JSON schemas: is every finished document valid, and what does it cost?
//!
//! ```text
//! cargo run --release -p tangram-gateway --example schemas -- MODEL SCHEMAS [COUNT [MAX_TOKENS [CONCURRENCY]]]
//! ```
//!
//! MODEL is a checkpoint or GGUF file of a chat model, or `random` for a small one of noise, which says more about
//! validity in less time and nothing about speed; SCHEMAS a folder with one schema per `.json` file, such as the
//! `data` folder of JSONSchemaBench. COUNT schemas (200) are taken evenly over all files, without those that no
//! validator can read. For each, one document of at most MAX_TOKENS (600) is generated with and one without the
//! constraint, alternately; the `jsonschema` crate judges. A schema that is refused is counted, its reason shown, and
//! the next one takes its place.

#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tangram_gateway::{GatewayConfig, serve};
use tangram_node::{Node, NodeConfig};
use tangram_testkit::{Family, RandomModel, write_hf_model};
use tokio::net::TcpListener;

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "json") {
            files.push(path);
        }
    }
}

#[derive(Default)]
struct Tally {
    finished: usize,
    cut: usize,
    invalid: Vec<String>,
    refused: BTreeMap<String, usize>,
    /// Tokens after the first and milliseconds of decoding, with and without the constraint.
    constrained: (f64, f64),
    free: (f64, f64),
}

struct Bench {
    url: String,
    client: reqwest::Client,
    max_tokens: usize,
}

impl Bench {
    async fn post(&self, fields: Value) -> Result<Value, String> {
        let mut body = json!({"model": "m", "temperature": 1, "messages": [
            {"role": "user", "content": "Give me an example of such a JSON document, short and without line breaks."}]});
        for (name, value) in fields.as_object().unwrap() {
            body[name] = value.clone();
        }
        let response = self.client.post(&self.url).json(&body).send().await.unwrap();
        let status = response.status();
        let answer: Value = response.json().await.unwrap();
        if status.is_success() {
            Ok(answer)
        } else {
            Err(answer["error"]["message"].as_str().unwrap().to_owned())
        }
    }

    /// Whether the schema was accepted.
    async fn try_schema(
        &self,
        path: &Path,
        schema: &Value,
        judge: &jsonschema::Validator,
        tally: &Mutex<Tally>,
    ) -> bool {
        let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
        // Every schema gets other words, and the same ones in every run.
        let seed = path
            .to_string_lossy()
            .bytes()
            .fold(0i64, |seed, byte| seed.wrapping_mul(31).wrapping_add(i64::from(byte)));
        let fields = json!({"response_format": format, "max_tokens": self.max_tokens, "seed": seed});
        let answer = match self.post(fields).await {
            Ok(answer) => answer,
            Err(message) => {
                let reason: String = message.lines().next().unwrap_or_default().chars().take(110).collect();
                *tally.lock().unwrap().refused.entry(reason).or_default() += 1;
                return false;
            }
        };
        let tokens = answer["usage"]["completion_tokens"].as_u64().unwrap();
        let free = self.post(json!({"ignore_eos": true, "max_tokens": tokens, "seed": seed})).await.unwrap();
        let cost = |answer: &Value| {
            (tokens.saturating_sub(1) as f64, answer["usage"]["tangram"]["decode_ms"].as_f64().unwrap())
        };
        let mut tally = tally.lock().unwrap();
        for (sum, (tokens, ms)) in [(0, cost(&answer)), (1, cost(&free))] {
            let sum = if sum == 0 { &mut tally.constrained } else { &mut tally.free };
            sum.0 += tokens;
            sum.1 += ms;
        }
        let choice = &answer["choices"][0];
        if choice["finish_reason"] == "length" {
            tally.cut += 1;
            return true;
        }
        tally.finished += 1;
        if tally.finished.is_multiple_of(20) {
            eprintln!("{} finished", tally.finished);
        }
        let text = choice["message"]["content"].as_str().unwrap();
        let verdict = match serde_json::from_str::<Value>(text) {
            Ok(document) => judge.validate(&document).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = verdict {
            tally.invalid.push(format!("{}: {error}: {text}", path.display()));
        }
        true
    }
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut model = PathBuf::from(arguments.next().unwrap());
    let folder = PathBuf::from(arguments.next().unwrap());
    let mut number = |default: usize| arguments.next().map_or(default, |argument| argument.parse().unwrap());
    let (count, max_tokens, concurrency) = (number(200), number(600), number(1));

    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let node = Node::open(NodeConfig::new(data, 2 << 30)).unwrap();
    if model == Path::new("random") {
        model = directory.path().join("source");
        write_hf_model(&model, &RandomModel { context: 16_384, ..RandomModel::tiny(Family::Llama) });
    }
    node.deploy("m", &model, &mut |_| ControlFlow::Continue(())).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1/chat/completions", listener.local_addr().unwrap());
    tokio::spawn(serve(listener, node, GatewayConfig::default(), std::future::pending()));
    let bench = Arc::new(Bench { url, client: reqwest::Client::new(), max_tokens });

    let mut files = Vec::new();
    collect(&folder, &mut files);
    files.sort();
    // Evenly over the folder, then the ones in between.
    let stride = (files.len() / (count * 2)).max(1);
    let order = (0..stride).flat_map(|from| files.iter().skip(from).step_by(stride).cloned());
    let queue: Arc<Mutex<VecDeque<PathBuf>>> = Arc::new(Mutex::new(order.collect()));
    let (tally, left) = (Arc::new(Mutex::new(Tally::default())), Arc::new(Mutex::new(count)));
    let workers: Vec<_> = (0..concurrency)
        .map(|_| {
            let (bench, queue, tally, left) = (bench.clone(), queue.clone(), tally.clone(), left.clone());
            tokio::spawn(async move {
                loop {
                    let Some(path) = queue.lock().unwrap().pop_front() else { return };
                    let Ok(schema) = serde_json::from_slice::<Value>(&std::fs::read(&path).unwrap()) else {
                        continue;
                    };
                    let Ok(judge) = jsonschema::validator_for(&schema) else { continue };
                    if *left.lock().unwrap() == 0 {
                        return;
                    }
                    *left.lock().unwrap() -= 1;
                    if !bench.try_schema(&path, &schema, &judge, &tally).await {
                        *left.lock().unwrap() += 1;
                    }
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.unwrap();
    }
    let tally = tally.lock().unwrap();
    for (reason, count) in &tally.refused {
        println!("refused {count:4}  {reason}");
    }
    for invalid in &tally.invalid {
        println!("INVALID {invalid}");
    }
    let speed = |(tokens, ms): (f64, f64)| tokens / ms * 1000.0;
    let (constrained, free) = (speed(tally.constrained), speed(tally.free));
    let refused: usize = tally.refused.values().sum();
    println!(
        "{} schemas: {} documents finished, {} cut at {max_tokens} tokens, {} invalid; {refused} other schemas refused",
        tally.finished + tally.cut,
        tally.finished,
        tally.cut,
        tally.invalid.len()
    );
    println!(
        "decode, {concurrency} at once: constrained {constrained:.1} tokens/s per stream, free {free:.1}: {:+.1} %",
        (constrained / free - 1.0) * 100.0
    );
}
