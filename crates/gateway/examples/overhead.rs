//! What the gateway itself costs: the executor is replaced by one that plays tokens back.
//!
//! ```text
//! cargo run --release -p tangram-gateway --example overhead [REQUESTS [STREAMS [TOKENS]]]
//! ```
//!
//! Two measurements over real connections on this machine. *Requests*: chat completions of 16 tokens that the executor
//! has at once, one after the other on as many connections as there are cores (with more the time would be that of the
//! queue), so the time a client waits is all overhead (with the client's own part in it); the memory of the process is shown along the way. *Streams*: STREAMS clients at once, each
//! of which gets 40 tokens a second; how long a token takes from the executor to the client, and the processor time of
//! the gateway's threads per token. Linux only.

#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use serde_json::json;
use tangram_gateway::{GatewayConfig, router_with_generator};
use tangram_node::{
    FinishReason, GenerateEvent, GenerateRequest, GeneratedToken, Generation, Generator, Node, NodeConfig,
    RequestError, Timing,
};
use tangram_testkit::{Family, RandomModel, write_hf_model};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// Between two tokens of a stream.
const PACE: Duration = Duration::from_millis(25);

/// Gives short generations all their tokens at once, and long ones to the thread that plays them at a pace.
struct Recording {
    epoch: Instant,
    paced: Sender<UnboundedSender<GenerateEvent>>,
    streams: AtomicUsize,
    all_there: AtomicBool,
}

fn token(index: usize) -> GenerateEvent {
    GenerateEvent::Token(GeneratedToken { id: u32::from(b'a') + (index % 26) as u32, logprob: None })
}

fn finished() -> GenerateEvent {
    GenerateEvent::Finished { reason: FinishReason::Length, timing: Timing::default() }
}

impl Generator for Recording {
    fn generate(&self, request: GenerateRequest) -> Result<Generation, RequestError> {
        let (events, receiver) = unbounded_channel();
        let _ = events.send(GenerateEvent::Started(Timing::default()));
        match request.max_tokens {
            Some(tokens) if tokens <= 16 => {
                (0..tokens).for_each(|index| drop(events.send(token(index))));
                let _ = events.send(finished());
            }
            _ => {
                self.streams.fetch_add(1, Ordering::AcqRel);
                let _ = self.paced.send(events);
            }
        }
        Ok(receiver.into())
    }
}

/// Plays `tokens` tokens to each of `streams` clients, evenly spread over the pace. `sent` says when, by stream and
/// token, in nanoseconds since the epoch of the recording; a stream is known to its client by its first token.
fn play(
    queue: &Receiver<UnboundedSender<GenerateEvent>>,
    streams: usize,
    tokens: usize,
    epoch: Instant,
    sent: &[AtomicU64],
) {
    let events: Vec<_> = queue.iter().take(streams).collect();
    // The first token of every stream is sent at once: the response heads wait for it.
    for (stream, events) in events.iter().enumerate() {
        let id = token(stream % 26);
        let _ = events.send(id);
    }
    std::thread::sleep(Duration::from_millis(500));
    let start = Instant::now();
    let mut at = Duration::ZERO;
    for index in 0..tokens {
        for (stream, events) in events.iter().enumerate() {
            at += PACE / streams as u32;
            while let Some(wait) = at.checked_sub(start.elapsed()).filter(|wait| !wait.is_zero()) {
                std::thread::sleep(wait);
            }
            sent[stream * tokens + index].store(epoch.elapsed().as_nanos() as u64, Ordering::Release);
            let _ = events.send(token(index));
        }
    }
    for events in &events {
        let _ = events.send(finished());
    }
}

/// Nanoseconds that the threads of this name have run.
fn thread_time(name: &str) -> u64 {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let named = tasks
        .filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name));
    named
        .filter_map(|task| {
            fs::read_to_string(task.path().join("schedstat")).ok()?.split(' ').next()?.parse::<u64>().ok()
        })
        .sum()
}

/// Resident bytes of this process.
fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn percentile(sorted: &[u64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share) as usize] as f64 / 1e3
}

fn request(body: &serde_json::Value) -> Vec<u8> {
    let body = body.to_string();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

/// Reads one response with a known length.
async fn read_answer(stream: &mut TcpStream, buffer: &mut Vec<u8>) {
    buffer.clear();
    loop {
        stream.read_buf(buffer).await.unwrap();
        let Some(head) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else { continue };
        let text = std::str::from_utf8(&buffer[..head]).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        let length = text.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
        if buffer.len() >= head + 4 + length.parse::<usize>().unwrap() {
            return;
        }
    }
}

async fn measure_requests(address: std::net::SocketAddr, requests: usize) {
    let words = "The quick brown fox jumps over the lazy dog. ".repeat(10);
    let body = json!({"model": "m", "max_tokens": 16, "messages": [{"role": "user", "content": words}]});
    let request: Arc<[u8]> = request(&body).into();
    let connections = std::thread::available_parallelism().map_or(1, usize::from);
    println!("requests  p50 us  p99 us  p99.9 us  gateway cpu us  resident MiB");
    for _ in 0..10 {
        let cpu = thread_time("gateway");
        let share = requests / 10 / connections;
        let clients = (0..connections).map(|_| {
            let request = request.clone();
            tokio::spawn(async move {
                let mut stream = TcpStream::connect(address).await.unwrap();
                stream.set_nodelay(true).unwrap();
                let (mut times, mut buffer) = (Vec::with_capacity(share), Vec::new());
                for _ in 0..share {
                    let start = Instant::now();
                    stream.write_all(&request).await.unwrap();
                    read_answer(&mut stream, &mut buffer).await;
                    times.push(start.elapsed().as_nanos() as u64);
                }
                times
            })
        });
        let mut times: Vec<u64> = Vec::new();
        for client in clients.collect::<Vec<_>>() {
            times.extend(client.await.unwrap());
        }
        let cpu = (thread_time("gateway") - cpu) as f64 / 1e3 / times.len() as f64;
        times.sort_unstable();
        let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|share| percentile(&times, share));
        let mib = resident() as f64 / f64::from(1 << 20);
        println!("{:8} {p50:7.0} {p99:7.0} {p999:9.0} {cpu:15.1} {mib:13.1}", times.len());
    }
}

async fn measure_streams(
    address: std::net::SocketAddr,
    recording: Arc<Recording>,
    streams: usize,
    tokens: usize,
    sent: Arc<Vec<AtomicU64>>,
) {
    let body = json!({"model": "m", "stream": true, "max_tokens": tokens + 1,
                      "messages": [{"role": "user", "content": "Hi"}]});
    let request: Arc<[u8]> = request(&body).into();
    let mut clients = Vec::new();
    for stream in 0..streams {
        let mut connection = TcpStream::connect(address).await.unwrap();
        connection.write_all(&request).await.unwrap();
        // Streams are numbered by the order in which the executor sees them.
        while recording.streams.load(Ordering::Acquire) <= stream {
            tokio::task::yield_now().await;
        }
        let (recording, sent) = (recording.clone(), sent.clone());
        clients.push(tokio::spawn(async move {
            let (mut times, mut buffer) = (Vec::with_capacity(tokens), Vec::new());
            // The role and the first token come before what is measured.
            let mut seen = 0usize;
            while times.len() < tokens {
                assert!(connection.read_buf(&mut buffer).await.unwrap() > 0);
                let now = recording.epoch.elapsed().as_nanos() as u64;
                while let Some(at) = buffer.windows(7).position(|window| window == b"data: {") {
                    buffer.drain(..at + 7);
                    seen += 1;
                    if seen > 2 && times.len() < tokens {
                        times.push(now - sent[stream * tokens + seen - 3].load(Ordering::Acquire));
                    }
                }
            }
            times
        }));
    }
    let cpu = thread_time("gateway");
    recording.all_there.store(true, Ordering::Release);
    let mut times: Vec<u64> = Vec::new();
    for client in clients {
        times.extend(client.await.unwrap());
    }
    let cpu = (thread_time("gateway") - cpu) as f64 / 1e3 / times.len() as f64;
    times.sort_unstable();
    let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|share| percentile(&times, share));
    println!("\nstreams  tokens  p50 us  p99 us  p99.9 us  gateway cpu us per token");
    println!("{streams:7} {:7} {p50:7.0} {p99:7.0} {p999:9.0} {cpu:25.1}", times.len());
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<usize>().unwrap());
    let requests = arguments.next().unwrap_or(100_000);
    let streams = arguments.next().unwrap_or(256);
    let tokens = arguments.next().unwrap_or(200);

    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    write_hf_model(&source, &RandomModel { context: 16_384, ..RandomModel::tiny(Family::Llama) });
    let data = directory.path().join("data");
    let node = Node::open(NodeConfig { threads: Some(1), ..NodeConfig::new(data, 96 << 20) }).unwrap();
    node.deploy("m", &source, &mut |_| ControlFlow::Continue(())).unwrap();

    let (paced, queue) = channel();
    let epoch = Instant::now();
    let recording =
        Arc::new(Recording { epoch, paced, streams: AtomicUsize::new(0), all_there: AtomicBool::new(false) });
    let sent: Arc<Vec<AtomicU64>> = Arc::new((0..streams * tokens).map(|_| AtomicU64::new(0)).collect());
    let (player, times) = (recording.clone(), sent.clone());
    std::thread::spawn(move || {
        while !player.all_there.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(5));
        }
        play(&queue, streams, tokens, epoch, &times);
    });

    let server = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("gateway")
        .enable_all()
        .build()
        .unwrap();
    let router = router_with_generator(node, recording.clone(), GatewayConfig::default());
    let listener = server.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    server.spawn(async move { axum::serve(listener, router).await });
    let client = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    client.block_on(async {
        measure_requests(address, requests).await;
        measure_streams(address, recording, streams, tokens, sent).await;
    });
    server.shutdown_background();
}
