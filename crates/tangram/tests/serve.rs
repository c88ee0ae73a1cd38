//! What users do with a server: deploy, list, ask, share, protect, stop.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{
    Server, cli, cli_json, cli_result, entries, eventually, ran, shared, streamed_tokens, tangram, text,
    token_stream, write_slow, write_tiny,
};
use serde_json::{Value, json};
use tangram_testkit::{Family, mutate_layer};
use tempfile::tempdir;

const PROMPT: [u32; 6] = [10, 200, 33, 47, 90, 121];

#[tokio::test]
async fn models_are_managed_with_and_without_a_server() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let (first, second) =
        (write_tiny(sources.path(), "a", Family::Qwen3, 1), write_tiny(sources.path(), "b", Family::Bert, 2));
    let data = data.path();
    let said = cli(data, &["deploy", "org/first", text(&first)]);
    assert!(said.starts_with("org/first is deployed: qwen3"), "{said}");
    for part in ["tokens of KV fit", "predicted first token for 128 prompt tokens"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let names = |listing: Value| {
        let models = listing["models"].as_array().unwrap().iter();
        models.map(|model| model["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(cli_json(data, &["ls", "--json"])), ["org/first"]);
    let alone = cli(data, &["run", "org/first", "Hello", "--max-tokens", "12", "--temperature", "0"]);

    let mut server = Server::start(data, &[]);
    let said = cli(data, &["deploy", "second", text(&second)]);
    assert!(said.starts_with("second is deployed: bert"), "{said}");
    assert_eq!(server.names().await, ["org/first", "second"], "the running server took the deployment");
    let with_server = cli(data, &["run", "org/first", "Hello", "--max-tokens", "12", "--temperature", "0"]);
    assert_eq!(alone, with_server);
    let listing = cli_json(data, &["ls", "--json"]);
    assert_eq!(names(listing.clone()), ["org/first", "second"]);
    assert_eq!(
        (&listing["models"][0]["task"], &listing["models"][1]["task"]),
        (&json!("generate"), &json!("embed"))
    );
    eventually("the status shows what is resident", async || {
        let status = cli_json(data, &["ps", "--json"]);
        status["models"][0]["resident_bytes"] == listing["models"][0]["weight_bytes"]
    })
    .await;
    let forecast = &listing["models"][0]["forecast"];
    let figure = |key: &str| forecast[key].as_f64().unwrap_or_else(|| panic!("{key}: {forecast}"));
    assert!(figure("cold_first_token_seconds") > figure("resident_first_token_seconds"));
    assert!(figure("tokens_beside_weights") > 0.0 && figure("scratch_bytes") > 0.0);
    assert_eq!(listing["models"][1]["forecast"]["tokens_beside_weights"], Value::Null, "BERT caches nothing");
    assert!(cli(data, &["ls"]).contains("TOKENS FIT"));
    for args in [&["ls"][..], &["ps"]] {
        assert!(cli(data, args).contains("org/first"), "{args:?}");
    }
    assert!(cli(data, &["rm", "org/first"]).contains("removed"));
    let missing = cli_result(data, &["rm", "org/first"]);
    assert!(!missing.success && missing.stderr.contains("org/first"), "{missing:?}");
    assert_eq!(server.names().await, ["second"]);
    server.terminate();
    assert!(server.ended().await.success());

    assert!(cli(data, &["rm", "second"]).contains("removed"));
    assert_eq!(names(cli_json(data, &["ls", "--json"])), Vec::<String>::new());
    assert_eq!(entries(data, "checkpoints"), Vec::<String>::new());
    assert!(!data.join("server.json").exists(), "no server runs any more");
}

#[tokio::test]
async fn chat_completions_and_embeddings() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let server = Server::start(data.path(), &[]);
    server.deploy("chat", &write_tiny(sources.path(), "a", Family::Llama, 1)).await.unwrap();
    server.deploy("embed", &write_tiny(sources.path(), "b", Family::Bert, 2)).await.unwrap();

    let mut body = json!({
        "model": "chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "temperature": 0,
        "ignore_eos": true,
    });
    let whole = server.post("/v1/chat/completions", &body).await;
    assert_eq!((whole.status, &whole.body["object"]), (200, &json!("chat.completion")));
    assert_eq!(whole.body["choices"][0]["finish_reason"], "length");
    assert_eq!(whole.body["usage"]["completion_tokens"], 20);
    let content = whole.body["choices"][0]["message"]["content"].as_str().unwrap();
    assert!(!content.is_empty());
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let mut events = server.stream("/v1/chat/completions", &body).await;
    assert!(events.headers["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    let events = events.rest().await;
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let parts = events.iter().filter_map(|event| event["choices"].get(0)?["delta"]["content"].as_str());
    assert_eq!(parts.collect::<String>(), content);
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 20);
    assert_eq!(events.last().unwrap()["choices"], json!([]));

    let tokens = server.complete("chat", &PROMPT, 12).await.tokens();
    assert_eq!(tokens.len(), 12);
    let events = server.stream("/v1/completions", &token_stream("chat", &PROMPT, 12)).await.rest().await;
    assert_eq!(streamed_tokens(&events), tokens);

    let embedded = server.post("/v1/embeddings", &json!({"model": "embed", "input": ["one", "two"]})).await;
    let vector = |index: usize| -> Vec<f64> {
        serde_json::from_value(embedded.body["data"][index]["embedding"].clone()).unwrap()
    };
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    assert!((product(&vector(0), &vector(0)) - 1.0).abs() < 1e-4);
    assert!(product(&vector(0), &vector(1)) < 0.9999, "different texts have different vectors");

    for (path, body, status, word) in [
        ("/v1/completions", json!({"model": "gone", "prompt": "x"}), 404, "gone"),
        ("/v1/completions", json!({"model": "embed", "prompt": "x"}), 400, "embed"),
        ("/v1/embeddings", json!({"model": "chat", "input": "x"}), 400, "chat"),
        ("/v1/completions", json!({"model": "chat", "prompt": vec![1; 300]}), 400, "256"),
        ("/v1/completions", json!({"model": "chat", "prompt": [320]}), 400, "320"),
        ("/v1/completions", json!({"model": "chat", "prompt": "x", "temperature": -1}), 400, "temperature"),
    ] {
        let reply = server.post(path, &body).await;
        assert_eq!(reply.status, status, "{}", reply.body);
        assert!(reply.body["error"]["message"].as_str().unwrap().contains(word), "{}", reply.body);
    }
}

/// Bytes of a layer's tensors in a model's safetensors file.
fn layer_bytes(model: &Path, layer: usize) -> u64 {
    let file = std::fs::read(model.join("model.safetensors")).unwrap();
    let header_bytes = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header: BTreeMap<String, Value> = serde_json::from_slice(&file[8..8 + header_bytes]).unwrap();
    let of_layer = header.iter().filter(|(name, _)| name.contains(&format!("layers.{layer}.")));
    of_layer
        .map(|(_, entry)| {
            let offset = |index: usize| entry["data_offsets"][index].as_u64().unwrap();
            offset(1) - offset(0)
        })
        .sum()
}

#[tokio::test]
async fn a_copy_loads_nothing_and_a_changed_layer_that_layer() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let base = write_tiny(sources.path(), "base", Family::Qwen2, 5);
    let tuned = sources.path().join("tuned");
    mutate_layer(&base, &tuned, 1);
    let changed = layer_bytes(&tuned, 1);
    let server = Server::start(data.path(), &[]);
    let weights = server.deploy("base", &base).await.unwrap()["weight_bytes"].as_u64().unwrap();
    server.deploy("copy", &base).await.unwrap();
    server.deploy("tuned", &tuned).await.unwrap();
    assert!(changed > 0 && changed < weights / 2);

    let mut outputs = Vec::new();
    for (name, loaded) in [("base", weights), ("copy", 0), ("tuned", changed), ("base", 0), ("tuned", 0)] {
        let reply = server.complete(name, &PROMPT, 16).await;
        outputs.push(reply.tokens());
        assert_eq!(reply.bytes_loaded(), loaded, "{name}");
        assert_eq!(reply.header("x-tangram-bytes-reused"), (weights - loaded).to_string(), "{name}");
        let timing = reply.header("server-timing").to_owned();
        for phase in ["queue;dur=", "load;dur=", "prefill;dur="] {
            assert!(timing.contains(phase), "{timing}");
        }
        let mut events = server.stream("/v1/completions", &token_stream(name, &PROMPT, 16)).await;
        assert_eq!(events.headers["x-tangram-bytes-loaded"], "0", "{name} again");
        let events = events.rest().await;
        let usage = &events.last().unwrap()["usage"]["tangram"];
        assert_eq!((&usage["bytes_loaded"], &usage["bytes_reused"]), (&json!(0), &json!(weights)));
        assert_eq!(streamed_tokens(&events), *outputs.last().unwrap());
    }
    assert_eq!(outputs[0], outputs[1]);
    assert_ne!(outputs[0], outputs[2], "the changed layer matters");
    assert_eq!((&outputs[0], &outputs[2]), (&outputs[3], &outputs[4]));
    let metrics =
        server.http.get(format!("{}/metrics", server.url)).send().await.unwrap().text().await.unwrap();
    let counted = format!("tangram_bytes_loaded_total {}", weights + changed);
    assert!(metrics.lines().any(|line| line == counted), "no {counted:?} in {metrics}");
}

#[tokio::test]
async fn a_start_that_cannot_work_says_why() {
    let data = tempdir().unwrap();
    let _server = Server::start(data.path(), &[]);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let config = data.path().join("bad.toml");
    std::fs::write(&config, "device-memroy = \"64MiB\"\n").unwrap();
    let other = tempdir().unwrap();
    let file = other.path().join("file");
    std::fs::write(&file, "").unwrap();
    for (args, words) in [
        (&["--listen", &taken, "--data", text(other.path())][..], "--listen"),
        (&["--listen", "127.0.0.1:0", "--data", text(data.path())], "in use by another tangram process"),
        (&["--listen", "127.0.0.1:0", "--data", text(&file)], "creating"),
        (&["--config", text(&config)], "device-memroy"),
        (&["--config", "/nonexistent.toml"], "/nonexistent.toml"),
        (&["--device", "cuda:0"], "device 'cuda:0' cannot be used: "),
        (&["--device", "tpu"], "'tpu' is none of auto, cpu and cuda:N"),
        (&["--device-memory", "7 apples"], "--device-memory"),
        (&["--listen", "127.0.0.1:0", "--device-memory", "1KiB", "--data", text(other.path())], "1048576"),
    ] {
        let mut command = tangram();
        command.arg("serve").args(args);
        if !args.contains(&"--device-memory") {
            command.env("TANGRAM_DEVICE_MEMORY", "64MiB");
        }
        let ran = ran(&mut command);
        assert!(!ran.success && ran.stderr.contains(words), "{args:?}: {ran:?}");
        assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    }
}

#[tokio::test]
async fn what_models_run_on_is_said_once_unless_it_was_asked_for() {
    for (args, times) in [(&[][..], 1), (&["--device", "auto"], 1), (&["--device", "cpu"], 0)] {
        let data = tempdir().unwrap();
        let mut server = Server::start(data.path(), args);
        server.get("/health").await;
        let stderr = server.stderr();
        assert_eq!(stderr.matches("models run on the CPU: ").count(), times, "{args:?}: {stderr}");
    }
}

#[tokio::test]
async fn settings_come_from_flags_then_variables_then_the_file() {
    let (data, wrong) = (tempdir().unwrap(), tempdir().unwrap());
    let config = data.path().join("tangram.toml");
    let settings = format!(
        "data = {:?}\nlisten = \"127.0.0.1:0\"\ndevice-memory = \"8MiB\"\nthreads = 1\nmax-waiting = 3\n",
        text(data.path())
    );
    std::fs::write(&config, settings).unwrap();
    let mut command = tangram();
    command.args(["serve", "--device-memory", "16MiB", "--config", text(&config)]);
    command.env("TANGRAM_DEVICE_MEMORY", "32MiB");
    let server = Server::spawn(&mut command);
    assert_eq!(server.node().await["pool_bytes"], 16 << 20);
    assert_eq!(entries(wrong.path(), "."), Vec::<String>::new());
    assert!(data.path().join("catalog.redb").exists());
}

#[tokio::test]
async fn the_key_protects_everything_but_health() {
    let data = tempdir().unwrap();
    let mut command = tangram();
    command.arg("serve").args(Server::args(data.path(), "64MiB")).env("TANGRAM_API_KEY", "s3cret");
    let server = Server::spawn(&mut command);
    for path in ["/v1/models", "/admin/models", "/admin/status", "/metrics"] {
        let request = || server.http.get(format!("{}{path}", server.url));
        assert_eq!(request().send().await.unwrap().status(), 401, "{path}");
        assert_eq!(request().bearer_auth("s3creT").send().await.unwrap().status(), 401, "{path}");
        assert_eq!(request().bearer_auth("s3cret").send().await.unwrap().status(), 200, "{path}");
    }
    assert_eq!(server.get("/health").await["status"], "ok");
    let refused = cli_result(data.path(), &["ls", "--server", &server.url]);
    assert!(!refused.success && refused.stderr.contains("key"), "{refused:?}");
    cli(data.path(), &["ls", "--json", "--server", &server.url, "--api-key", "s3cret"]);
    cli(data.path(), &["ls", "--json", "--api-key", "s3cret"]);
}

#[tokio::test]
async fn sigterm_lets_a_stream_finish() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let mut server = Server::start(data.path(), &[]);
    server.deploy("slow", &write_slow(sources.path(), "slow")).await.unwrap();
    let mut stream = server.stream("/v1/completions", &token_stream("slow", &PROMPT, 1000)).await;
    for _ in 0..5 {
        stream.next().await.unwrap();
    }
    server.terminate();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let late = server.try_post("/v1/completions", &json!({"model": "slow", "prompt": [1]})).await;
    assert!(late.is_err() || late.is_ok_and(|reply| reply.status == 503), "new requests are refused");
    let events = stream.rest().await;
    assert!(events.len() > 100, "most of the stream came after the signal: {}", events.len());
    assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], 1000);
    let reasons: Vec<&Value> =
        events.iter().filter_map(|event| Some(&event["choices"].get(0)?["finish_reason"])).collect();
    assert_eq!(reasons.last(), Some(&&json!("length")));
    assert_eq!(server.ended().await.code(), Some(0), "{}", server.stderr());
    assert!(!data.path().join("server.json").exists());
}

#[tokio::test]
async fn a_client_that_leaves_frees_its_memory() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let server = Server::start(data.path(), &[]);
    server.deploy("slow", &write_slow(sources.path(), "slow")).await.unwrap();
    let mut stream = server.stream("/v1/completions", &token_stream("slow", &PROMPT, 4000)).await;
    stream.next().await.unwrap();
    eventually("the sequence shows in the status", async || server.node().await["kv_blocks"] != 0).await;
    let left = Instant::now();
    drop(stream);
    // Also one that leaves while its answer is not a stream.
    let body = common::token_request("slow", &PROMPT, 4000);
    let whole = server.http.post(format!("{}/v1/completions", server.url)).json(&body).send();
    assert!(
        tokio::time::timeout(Duration::from_millis(100), whole).await.is_err(),
        "4000 tokens take longer"
    );
    eventually("all KV is back", async || {
        let node = server.node().await;
        node["kv_blocks"] == 0 && node["running"] == 0 && node["leased_bytes"] == 0
    })
    .await;
    assert!(left.elapsed() < Duration::from_secs(3), "cancelled, not finished: {:?}", left.elapsed());
}

#[tokio::test]
async fn golden_tokens_over_http() {
    let Some(parity) = shared("models/parity") else { return };
    let data = tempdir().unwrap();
    let server = Server::start(data.path(), &[]);
    for family in ["llama", "llama3rope", "qwen2", "qwen3"] {
        let source = parity.join(family);
        server.deploy(family, &source).await.unwrap();
        let golden: Value =
            serde_json::from_slice(&std::fs::read(source.join("golden.json")).unwrap()).unwrap();
        for prompt in golden["prompts"].as_array().unwrap() {
            let ids = |key: &str| serde_json::from_value::<Vec<u32>>(prompt[key].clone()).unwrap();
            let (input, expected) = (ids("prompt_ids"), ids("output_ids"));
            assert_eq!(server.complete(family, &input, expected.len()).await.tokens(), expected, "{family}");
            let stream = token_stream(family, &input, expected.len());
            let events = server.stream("/v1/completions", &stream).await.rest().await;
            assert_eq!(streamed_tokens(&events), expected, "{family}, streamed");
        }
    }
}

#[tokio::test]
async fn a_bad_checkpoint_is_refused_and_leaves_nothing() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let truncated = write_tiny(sources.path(), "truncated", Family::Llama, 1);
    let weights = truncated.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 1000]).unwrap();
    let slow = write_slow(sources.path(), "slow");
    let server = Server::with_pool(data.path(), "8MiB", &[]);
    for (source, words) in [
        (truncated.as_path(), "model.safetensors"),
        (&sources.path().join("missing"), "missing"),
        (sources.path(), "config.json"),
        (&slow, "does not fit"),
    ] {
        let ran = cli_result(data.path(), &["deploy", "bad", text(source)]);
        assert!(!ran.success && ran.stderr.contains(words), "{ran:?}");
    }
    let ran = cli_result(data.path(), &["deploy", "a b", text(&slow)]);
    assert!(!ran.success && ran.stderr.contains("a b"), "{ran:?}");
    assert_eq!(server.names().await, Vec::<String>::new());
    assert_eq!((entries(data.path(), "checkpoints"), entries(data.path(), "staging")), (vec![], vec![]));
}

#[tokio::test]
async fn damage_on_disk_is_found_at_load_and_repaired_by_deploying_again() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let (hurt, well) = (
        write_tiny(sources.path(), "hurt", Family::Llama, 1),
        write_tiny(sources.path(), "well", Family::Qwen3, 2),
    );
    let server = Server::start(data.path(), &[]);
    server.deploy("hurt", &hurt).await.unwrap();
    let directory = entries(data.path(), "checkpoints").remove(0);
    server.deploy("well", &well).await.unwrap();
    let file = data.path().join("checkpoints").join(directory).join("data.bin");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let reply = server.complete("hurt", &PROMPT, 8).await;
    assert_eq!(reply.status, 500, "{}", reply.body);
    let message = reply.body["error"]["message"].as_str().unwrap();
    assert!(message.contains("hurt") && message.contains("deploy"), "{message}");
    assert_eq!(server.complete("well", &PROMPT, 8).await.tokens().len(), 8);
    server.deploy("hurt", &hurt).await.unwrap();
    let repaired = server.complete("hurt", &PROMPT, 8).await.tokens();
    server.deploy("fresh", &hurt).await.unwrap();
    assert_eq!(server.complete("fresh", &PROMPT, 8).await.tokens(), repaired);
}
