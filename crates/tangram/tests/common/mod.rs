//! The real binary as a server process or a command, and a small HTTP client for it.
#![allow(dead_code)]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use reqwest::header::HeaderMap;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tangram_testkit::{Family, RandomModel, write_hf_model};

/// How long anything here may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The folder beside the repository with reference models, or a printed word that a test skips.
pub fn shared(part: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(part);
    if !path.exists() {
        println!("SKIPPED: ../shared/{part} is not here");
        return None;
    }
    Some(path)
}

/// A command without the settings of whoever runs the tests.
pub fn clean(program: &str) -> Command {
    let mut command = Command::new(program);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TANGRAM_")) {
        command.env_remove(name);
    }
    command
}

/// The binary under test.
pub fn tangram() -> Command {
    clean(env!("CARGO_BIN_EXE_tangram"))
}

/// What a finished command left.
#[derive(Debug)]
pub struct Ran {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

pub fn ran(command: &mut Command) -> Ran {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { success: output.status.success(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Runs `tangram` on a data directory with a small pool; it must succeed. Gives what it printed.
pub fn cli(data: &Path, args: &[&str]) -> String {
    let ran = cli_result(data, args);
    assert!(ran.success, "tangram {args:?} failed: {}", ran.stderr);
    ran.stdout
}

pub fn cli_result(data: &Path, args: &[&str]) -> Ran {
    let mut command = tangram();
    ran(command.args(args).arg("--data").arg(data).args(["--device-memory", "64MiB", "--threads", "2"]))
}

pub fn cli_json(data: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&cli(data, args)).unwrap()
}

/// A tiny random model at `DIRECTORY/name`.
pub fn write_tiny(directory: &Path, name: &str, family: Family, seed: u64) -> PathBuf {
    let path = directory.join(name);
    write_hf_model(&path, &RandomModel { seed, ..RandomModel::tiny(family) });
    path
}

/// A model whose tokens take a millisecond or so, with room for thousands of them.
pub fn write_slow(directory: &Path, name: &str) -> PathBuf {
    let path = directory.join(name);
    let model = RandomModel {
        hidden: 256,
        intermediate: 512,
        layers: 8,
        heads: 8,
        kv_heads: 4,
        head_dim: 32,
        context: 8192,
        ..RandomModel::tiny(Family::Llama)
    };
    write_hf_model(&path, &model);
    path
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Entries of a directory below the data directory.
pub fn entries(data: &Path, directory: &str) -> Vec<String> {
    let entries = std::fs::read_dir(data.join(directory)).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Waits until something holds that nobody announces.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !holds().await {
        assert!(Instant::now() < deadline, "never happened: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A running `tangram serve`; killed when dropped.
pub struct Server {
    child: Child,
    stderr: File,
    pub url: String,
    pub http: reqwest::Client,
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Value,
}

impl Reply {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("no header {name}: {self:?}")).to_str().unwrap()
    }

    pub fn bytes_loaded(&self) -> u64 {
        self.header("x-tangram-bytes-loaded").parse().unwrap()
    }

    /// The token ids of the first choice.
    pub fn tokens(&self) -> Vec<u32> {
        assert_eq!(self.status, 200, "{}", self.body);
        serde_json::from_value(self.body["choices"][0]["token_ids"].clone()).unwrap()
    }
}

impl Server {
    /// Starts a server on a free port with a pool of 64 MiB and waits until it listens.
    pub fn start(data: &Path, args: &[&str]) -> Server {
        Self::with_pool(data, "64MiB", args)
    }

    pub fn with_pool(data: &Path, pool: &str, args: &[&str]) -> Server {
        let mut command = tangram();
        command.arg("serve").args(Self::args(data, pool)).args(args);
        Self::spawn(&mut command)
    }

    /// The arguments of [`Server::start`].
    pub fn args(data: &Path, pool: &str) -> Vec<String> {
        let fixed =
            ["--listen", "127.0.0.1:0", "--threads", "2", "--device-memory", pool, "--data", text(data)];
        fixed.map(str::to_owned).to_vec()
    }

    pub fn spawn(command: &mut Command) -> Server {
        let mut stderr = tempfile::tempfile().unwrap();
        let streams = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr.try_clone().unwrap());
        let mut child = streams.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let Some(url) = line.split_whitespace().find(|word| word.starts_with("http://")) else {
            let _ = child.kill();
            panic!("the server did not start: {line}{}", read_all(&mut stderr));
        };
        let http = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap();
        Server { url: url.to_owned(), child, stderr, http }
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn terminate(&self) {
        kill_process(self.pid(), Signal::TERM).unwrap();
    }

    /// SIGKILL, and waits for the process to be gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// Waits for the process to end by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the server does not end: {}", self.stderr());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// What the server has written to its standard error.
    pub fn stderr(&mut self) -> String {
        read_all(&mut self.stderr)
    }

    /// A request has failed; that must be because the process is dead.
    pub async fn assert_gone(&self) {
        let alive = self.http.get(format!("{}/health", self.url)).send().await;
        assert!(alive.is_err(), "a request failed though the server lives");
    }

    pub async fn get(&self, path: &str) -> Value {
        let response = self.http.get(format!("{}{path}", self.url)).send().await.unwrap();
        assert!(response.status().is_success(), "GET {path}: {response:?}");
        response.json().await.unwrap()
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.try_post(path, body).await.unwrap()
    }

    /// As [`Server::post`], for servers that may die in between.
    pub async fn try_post(&self, path: &str, body: &Value) -> reqwest::Result<Reply> {
        let response = self.http.post(format!("{}{path}", self.url)).json(body).send().await?;
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Ok(Reply { status, headers, body: response.json().await? })
    }

    /// Starts a streamed answer.
    pub async fn stream(&self, path: &str, body: &Value) -> Events {
        let response = self.http.post(format!("{}{path}", self.url)).json(body).send().await.unwrap();
        assert_eq!(response.status(), 200);
        Events { headers: response.headers().clone(), response, buffer: Vec::new(), ready: VecDeque::new() }
    }

    /// Deploys through the admin API; the error is the server's message, or that it went away.
    pub async fn deploy(&self, name: &str, source: &Path) -> Result<Value, String> {
        self.deploy_with(&json!({ "name": name, "source": source })).await
    }

    /// As [`Server::deploy`], with any request.
    pub async fn deploy_with(&self, body: &Value) -> Result<Value, String> {
        let request = self.http.post(format!("{}/admin/models", self.url)).json(body);
        let answer = async { request.send().await?.text().await };
        let answer: String = answer.await.map_err(|error| error.to_string())?;
        let last = answer.lines().last().unwrap_or_default();
        let last: Value = serde_json::from_str(last).map_err(|error| format!("{error}: {answer:?}"))?;
        match last["error"]["message"].as_str() {
            Some(message) => Err(message.to_owned()),
            None if last["status"] == "ready" => Ok(last["model"].clone()),
            None => Err(format!("the deployment broke off: {last}")),
        }
    }

    pub async fn remove(&self, name: &str) -> reqwest::Result<u16> {
        let response = self.http.delete(format!("{}/admin/models/{name}", self.url)).send().await?;
        Ok(response.status().as_u16())
    }

    /// Names of the deployed models, sorted.
    pub async fn names(&self) -> Vec<String> {
        let listing = self.get("/v1/models").await;
        let names = listing["data"].as_array().unwrap().iter();
        let mut names: Vec<String> = names.map(|model| model["id"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    }

    /// The node's figures.
    pub async fn node(&self) -> Value {
        self.get("/admin/status").await["node"].take()
    }

    /// Greedy token ids after a prompt of token ids.
    pub async fn complete(&self, model: &str, prompt: &[u32], max_tokens: usize) -> Reply {
        self.post("/v1/completions", &token_request(model, prompt, max_tokens)).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

fn read_all(file: &mut File) -> String {
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

/// A greedy request by token ids that goes on to `max_tokens`.
pub fn token_request(model: &str, prompt: &[u32], max_tokens: usize) -> Value {
    json!({
        "model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true,
    })
}

/// As [`token_request`], as a stream with usage.
pub fn token_stream(model: &str, prompt: &[u32], max_tokens: usize) -> Value {
    let mut body = token_request(model, prompt, max_tokens);
    body["stream"] = true.into();
    body["stream_options"] = json!({ "include_usage": true });
    body
}

/// The server-sent events of an answer.
pub struct Events {
    pub headers: HeaderMap,
    response: reqwest::Response,
    buffer: Vec<u8>,
    ready: VecDeque<String>,
}

impl Events {
    /// The data of the next event; `None` at the end of the stream.
    pub async fn next(&mut self) -> Option<String> {
        while self.ready.is_empty() {
            self.buffer.extend_from_slice(&self.response.chunk().await.unwrap()?);
            while let Some(end) = self.buffer.windows(2).position(|window| window == b"\n\n") {
                let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
                let event = String::from_utf8(event).unwrap();
                self.ready.push_back(event.trim_end().strip_prefix("data: ").unwrap().to_owned());
            }
        }
        self.ready.pop_front()
    }

    /// All events that are left, without `[DONE]`, which must be the last.
    pub async fn rest(&mut self) -> Vec<Value> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await {
            if event == "[DONE]" {
                assert_eq!(self.next().await, None, "nothing follows [DONE]");
                assert!(self.buffer.is_empty());
                return events;
            }
            events.push(serde_json::from_str(&event).unwrap());
        }
        panic!("the stream ended without [DONE]");
    }
}

/// The token ids in the events of a streamed text completion.
pub fn streamed_tokens(events: &[Value]) -> Vec<u32> {
    let ids = events.iter().filter_map(|event| event["choices"].get(0)?["token_ids"].as_array());
    ids.flatten().map(|id| id.as_u64().unwrap() as u32).collect()
}
