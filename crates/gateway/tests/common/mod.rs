//! A gateway over a real node with tiny random models, and helpers to talk to it.
#![allow(dead_code, clippy::unwrap_used)]

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use tangram_gateway::{GatewayConfig, serve};
use tangram_node::{Node, NodeConfig};
use tangram_testkit::{Family, RandomModel, write_hf_model};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Chat model with the byte tokenizer; a name with a slash, and room for long generations.
pub const CHAT: &str = "tiny/llama";
/// Embedding model.
pub const EMBED: &str = "tiny-bert";
/// Generates, but has no tokenizer.
pub const BARE: &str = "bare";
/// Context of [`CHAT`] in tokens.
pub const CONTEXT: usize = 16_384;

pub struct Server {
    pub url: String,
    pub client: Client,
    pub node: Arc<Node>,
    pub task: JoinHandle<std::io::Result<()>>,
    pub directory: TempDir,
    shutdown: Option<oneshot::Sender<()>>,
}

pub fn write_model(directory: &Path, name: &str, model: &RandomModel) -> std::path::PathBuf {
    let path = directory.join(name);
    write_hf_model(&path, model);
    path
}

pub async fn start() -> Server {
    start_with(GatewayConfig::default(), 1000).await
}

pub async fn start_with(config: GatewayConfig, max_waiting: usize) -> Server {
    let directory = TempDir::new().unwrap();
    let data = directory.path().join("data");
    let node =
        Node::open(NodeConfig { threads: Some(1), max_waiting, ..NodeConfig::new(data, 96 << 20) }).unwrap();
    let models = [
        (CHAT, RandomModel { context: CONTEXT, ..RandomModel::tiny(Family::Llama) }),
        (EMBED, RandomModel::tiny(Family::Bert)),
        (BARE, RandomModel { vocab: 100, ..RandomModel::tiny(Family::Qwen3) }),
    ];
    for (index, (name, model)) in models.iter().enumerate() {
        let source = write_model(directory.path(), &format!("source{index}"), model);
        node.deploy(name, &source, &mut |_| ControlFlow::Continue(())).unwrap();
    }
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (shutdown, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(serve(listener, node.clone(), config, async move {
        let _ = stopped.await;
    }));
    Server { url, client: Client::new(), node, task, directory, shutdown: Some(shutdown) }
}

impl Server {
    pub fn stop(&mut self) {
        let _ = self.shutdown.take().unwrap().send(());
    }

    pub async fn send(&self, path: &str, body: &Value) -> Response {
        self.client.post(format!("{}{path}", self.url)).json(body).send().await.unwrap()
    }

    /// A successful answer.
    pub async fn post(&self, path: &str, body: Value) -> Value {
        let response = self.send(path, &body).await;
        let status = response.status();
        let answer: Value = response.json().await.unwrap();
        assert_eq!(status, StatusCode::OK, "{body} -> {answer}");
        answer
    }

    pub async fn get(&self, path: &str) -> Response {
        self.client.get(format!("{}{path}", self.url)).send().await.unwrap()
    }

    /// Text completion with the given further fields.
    pub async fn complete(&self, fields: Value) -> Value {
        self.post("/v1/completions", with(json!({"model": CHAT, "temperature": 0}), fields)).await
    }

    /// The events of a stream, which must end with `[DONE]`.
    pub async fn stream(&self, path: &str, body: Value) -> Vec<Value> {
        let response = self.send(path, &with(body, json!({"stream": true}))).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        events(&response.text().await.unwrap())
    }
}

/// `base` with the fields of `more`.
pub fn with(mut base: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        base[name] = value.clone();
    }
    base
}

/// The JSON of every event but the last, which must be `[DONE]`.
pub fn events(body: &str) -> Vec<Value> {
    let mut events: Vec<&str> = body
        .split_terminator("\n\n")
        .map(|event| event.strip_prefix("data: ").unwrap_or_else(|| panic!("not an event: {event:?}")))
        .collect();
    assert_eq!(events.pop(), Some("[DONE]"), "{body}");
    events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

/// Waits until something holds.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A bias that makes greedy choices fall on these tokens.
pub fn only(tokens: &[u32]) -> Value {
    tokens.iter().map(|token| (token.to_string(), json!(100))).collect::<serde_json::Map<_, _>>().into()
}
