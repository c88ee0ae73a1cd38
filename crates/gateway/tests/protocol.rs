//! What surrounds generation: errors, keys, limits, other endpoints, disconnection, shutdown.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{
    BARE, CHAT, CONTEXT, EMBED, Server, events, eventually, only, start, start_with, with, write_model,
};
use futures::StreamExt;
use reqwest::StatusCode;
use serde_json::{Value, json};
use tangram_gateway::GatewayConfig;
use tangram_testkit::{Family, RandomModel};

const CHAT_PATH: &str = "/v1/chat/completions";
const TEXT_PATH: &str = "/v1/completions";
const EMBED_PATH: &str = "/v1/embeddings";

fn long_stream() -> Value {
    json!({"model": CHAT, "prompt": "x", "max_tokens": CONTEXT - 1, "ignore_eos": true, "temperature": 0, "stream": true,
           "logit_bias": only(&[97])})
}

async fn error_of(server: &Server, path: &str, body: &Value) -> (u16, Value) {
    let response = server.send(path, body).await;
    let status = response.status().as_u16();
    assert!(response.headers().contains_key("x-request-id"));
    let answer: Value = response.json().await.unwrap();
    let error = answer["error"].clone();
    assert!(error["message"].is_string() && error["type"].is_string(), "{body} -> {answer}");
    (status, error)
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_name_the_parameter() {
    let server = start().await;
    let message = json!([{"role": "user", "content": "Hi"}]);
    let chat = |fields: Value| (CHAT_PATH, with(json!({"model": CHAT, "messages": message}), fields));
    let text = |fields: Value| (TEXT_PATH, with(json!({"model": CHAT, "prompt": "x"}), fields));
    let embed = |fields: Value| (EMBED_PATH, with(json!({"model": EMBED, "input": "x"}), fields));
    let cases = [
        (chat(json!({"model": null})), "model"),
        (chat(json!({"model": 5})), "model"),
        (chat(json!({"model": EMBED})), "model"),
        (chat(json!({"messages": null})), "messages"),
        (chat(json!({"messages": "Hi"})), "messages"),
        (chat(json!({"messages": []})), "messages"),
        (chat(json!({"messages": [{"role": "user", "content": "x".repeat(CONTEXT)}]})), "messages"),
        (chat(json!({"temperature": 2.1})), "temperature"),
        (chat(json!({"temperature": -0.1})), "temperature"),
        (chat(json!({"temperature": "hot"})), "temperature"),
        (chat(json!({"top_p": 0})), "top_p"),
        (chat(json!({"top_p": 1.5})), "top_p"),
        (chat(json!({"top_k": -2})), "top_k"),
        (chat(json!({"min_p": 2})), "min_p"),
        (chat(json!({"repetition_penalty": 0})), "repetition_penalty"),
        (chat(json!({"presence_penalty": 3})), "presence_penalty"),
        (chat(json!({"frequency_penalty": -3})), "frequency_penalty"),
        (chat(json!({"n": 0})), "n"),
        (chat(json!({"n": 129})), "n"),
        (chat(json!({"max_tokens": 0})), "max_tokens"),
        (chat(json!({"max_tokens": -1})), "max_tokens"),
        (chat(json!({"max_tokens": 1.5})), "max_tokens"),
        (chat(json!({"max_completion_tokens": CONTEXT})), "max_tokens"),
        (chat(json!({"seed": "x"})), "seed"),
        (chat(json!({"stop": 5})), "stop"),
        (chat(json!({"stop": [""]})), "stop"),
        (chat(json!({"stop": vec!["x"; 17]})), "stop"),
        (chat(json!({"stop_token_ids": [-1]})), "stop_token_ids"),
        (chat(json!({"stop_token_ids": [100_000]})), "stop_token_ids"),
        (chat(json!({"logit_bias": {"x": 1}})), "logit_bias"),
        (chat(json!({"logit_bias": {"1": 101}})), "logit_bias"),
        (chat(json!({"logit_bias": {"100000": 1}})), "logit_bias"),
        (chat(json!({"logprobs": 5})), "logprobs"),
        (chat(json!({"top_logprobs": 5})), "top_logprobs"),
        (chat(json!({"stream": "yes"})), "stream"),
        (chat(json!({"stream_options": {"include_usage": true}})), "stream_options"),
        (chat(json!({"response_format": {"type": "yaml"}})), "response_format"),
        (chat(json!({"guided_json": {"type": "array", "contains": {"type": "null"}}})), "guided_json"),
        (text(json!({"structured_outputs": {"regex": "("}})), "structured_outputs.regex"),
        (text(json!({"model": BARE, "prompt": [1], "guided_regex": "a"})), "guided_regex"),
        (chat(json!({"tool_choice": "required"})), "tool_choice"),
        (chat(json!({"tools": 5})), "tools"),
        (text(json!({"prompt": null})), "prompt"),
        (text(json!({"prompt": ""})), "prompt"),
        (text(json!({"prompt": [400]})), "prompt"),
        (text(json!({"prompt": vec![1; CONTEXT]})), "prompt"),
        (text(json!({"max_tokens": CONTEXT})), "max_tokens"),
        (text(json!({"logprobs": 21})), "logprobs"),
        (text(json!({"logprobs": true})), "logprobs"),
        (text(json!({"suffix": "x"})), "suffix"),
        (text(json!({"best_of": 2, "stream": true})), "best_of"),
        (text(json!({"best_of": 2, "n": 3})), "best_of"),
        (text(json!({"echo": true, "logprobs": 1})), "echo"),
        (text(json!({"n": 100, "prompt": vec!["x"; 100]})), "n"),
        (embed(json!({"model": CHAT})), "model"),
        (embed(json!({"input": []})), "input"),
        (embed(json!({"input": "x".repeat(300)})), "input"),
        (embed(json!({"input": vec!["x"; 2049]})), "input"),
        (embed(json!({"dimensions": 5})), "dimensions"),
        (embed(json!({"encoding_format": "hex"})), "encoding_format"),
    ];
    for ((path, body), param) in cases {
        let (status, error) = error_of(&server, path, &body).await;
        assert_eq!((status, &error["param"]), (400, &json!(param)), "{error}");
        assert_eq!(error["type"], "invalid_request_error");
    }
    let (_, error) =
        error_of(&server, TEXT_PATH, &json!({"model": CHAT, "prompt": [1, 2], "max_tokens": CONTEXT})).await;
    let text = error["message"].as_str().unwrap();
    assert!(text.contains(&format!("{CONTEXT} > {CONTEXT} - 2")), "{text}");
    let (status, error) =
        error_of(&server, CHAT_PATH, &json!({"model": "nobody", "messages": message})).await;
    assert_eq!((status, &error["code"]), (404, &json!("model_not_found")));
    for body in ["{", "[]", "{\"temperature\": NaN}", "\u{0}"] {
        let response =
            server.client.post(format!("{}{CHAT_PATH}", server.url)).body(body).send().await.unwrap();
        assert_eq!(response.status(), 400);
    }
    let response = server
        .client
        .post(format!("{}{CHAT_PATH}", server.url))
        .body(&b"{\"a\": \"\xFF\"}"[..])
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 400);
    // Nothing of all this has left anything running.
    eventually("idle", || server.node.status().running == 0 && server.node.status().waiting == 0).await;
}

/// Every field with every kind of value: an answer or a complaint, never a fault.
#[tokio::test(flavor = "multi_thread")]
async fn odd_values_never_break_anything() {
    let server = start().await;
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(0),
        json!(1),
        json!(0.5),
        json!(1e308),
        json!(-1e308),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(""),
        json!("x"),
        json!([]),
        json!([[]]),
        json!([1]),
        json!([-1]),
        json!(["x"]),
        json!([{}]),
        json!({}),
        json!({"1": 1}),
        json!({"type": "x"}),
        json!([null]),
    ];
    let fields = [
        "model",
        "messages",
        "prompt",
        "input",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "n",
        "stop",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "stream",
        "stream_options",
        "user",
        "echo",
        "suffix",
        "best_of",
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "return_token_ids",
        "ignore_eos",
        "min_p",
        "top_k",
        "repetition_penalty",
        "stop_token_ids",
        "skip_special_tokens",
        "add_special_tokens",
        "chat_template_kwargs",
        "dimensions",
        "encoding_format",
        "unknown",
    ];
    for (path, base) in [
        (CHAT_PATH, json!({"model": CHAT, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1})),
        (TEXT_PATH, json!({"model": CHAT, "prompt": "x", "max_tokens": 1})),
        (EMBED_PATH, json!({"model": EMBED, "input": "x"})),
    ] {
        for field in fields {
            for value in &values {
                // Without a limit this would run up to the context.
                if field.starts_with("max") && value.is_null() && path == CHAT_PATH {
                    continue;
                }
                let body = with(base.clone(), json!({field: value}));
                let response = server.send(path, &body).await;
                let status = response.status().as_u16();
                assert!(matches!(status, 200 | 400 | 404), "{path} {field}={value}: {status}");
                response.bytes().await.unwrap();
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_and_methods() {
    let server = start().await;
    assert_eq!(server.get("/health").await.json::<Value>().await.unwrap(), json!({"status": "ok"}));
    let list: Value = server.get("/v1/models").await.json().await.unwrap();
    let names: Vec<&str> =
        list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(names, [BARE, EMBED, CHAT]);
    for path in ["/v1/models/tiny/llama", "/v1/models/tiny%2Fllama"] {
        let model: Value = server.get(path).await.json().await.unwrap();
        assert_eq!((&model["id"], &model["object"]), (&json!(CHAT), &json!("model")));
        assert_eq!(model["max_model_len"], CONTEXT);
    }
    for (path, status, code) in [
        ("/v1/models/nobody", 404, "model_not_found"),
        ("/v2/models", 404, "unknown_url"),
        ("/", 404, "unknown_url"),
        (CHAT_PATH, 405, "method_not_allowed"),
        ("/admin/models/tiny/llama", 405, "method_not_allowed"),
    ] {
        let response = server.get(path).await;
        assert_eq!(response.status(), status, "{path}");
        assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], code);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn embeddings() {
    let server = start().await;
    let body = json!({"model": EMBED, "input": ["one", "three"]});
    let response = server.send(EMBED_PATH, &body).await;
    assert!(response.headers()["server-timing"].to_str().unwrap().contains("load;dur="));
    let both: Value = response.json().await.unwrap();
    assert_eq!(both["object"], "list");
    // One token per byte, and one special token at each end.
    assert_eq!(both["usage"]["prompt_tokens"], 3 + 2 + 5 + 2);
    assert_eq!(both["usage"]["total_tokens"], 12);
    let vector = |answer: &Value, index: usize| -> Vec<f32> {
        assert_eq!(answer["data"][index]["index"], index);
        serde_json::from_value(answer["data"][index]["embedding"].clone()).unwrap()
    };
    assert_eq!(vector(&both, 0).len(), 64);
    assert_ne!(vector(&both, 0), vector(&both, 1));
    let one = server.post(EMBED_PATH, json!({"model": EMBED, "input": "three", "dimensions": 64})).await;
    assert_eq!(vector(&one, 0), vector(&both, 1), "company in the batch changes nothing");
    let tokens: Vec<u32> = [257].into_iter().chain("three".bytes().map(u32::from)).chain([258]).collect();
    let by_ids = server.post(EMBED_PATH, json!({"model": EMBED, "input": tokens})).await;
    assert_eq!(vector(&by_ids, 0), vector(&both, 1));
    let encoded = server.post(EMBED_PATH, with(body, json!({"encoding_format": "base64"}))).await;
    let bytes = base64::Engine::decode(
        &base64::engine::general_purpose::STANDARD,
        encoded["data"][1]["embedding"].as_str().unwrap(),
    );
    let bytes = bytes.unwrap();
    let decoded: Vec<f32> = bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
    assert_eq!(decoded, vector(&both, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys() {
    let server =
        start_with(GatewayConfig { api_key: Some("secret".into()), ..GatewayConfig::default() }, 10).await;
    assert_eq!(server.get("/health").await.status(), 200);
    for path in ["/v1/models", "/metrics", "/admin/status", "/admin/models", "/nowhere"] {
        let response = server.get(path).await;
        assert_eq!(response.status(), 401, "{path}");
        assert_eq!(response.headers()["www-authenticate"], "Bearer");
        assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "invalid_api_key");
        let get = |key: &str| server.client.get(format!("{}{path}", server.url)).bearer_auth(key).send();
        assert_eq!(get("wrong!").await.unwrap().status(), 401);
        assert_ne!(get("secret").await.unwrap().status(), 401);
    }
    assert_eq!(server.send(CHAT_PATH, &json!({})).await.status(), 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits() {
    let server = start_with(GatewayConfig { max_body_bytes: 1000, ..GatewayConfig::default() }, 0).await;
    let (status, error) =
        error_of(&server, TEXT_PATH, &json!({"model": CHAT, "prompt": "x".repeat(2000)})).await;
    assert_eq!((status, &error["code"]), (413, &json!("request_too_large")));
    // No more than is read of it all the same, or the connection could be closed before the answer has been read.
    let pieces = futures::stream::iter((0..30).map(|_| Ok::<_, std::io::Error>(vec![b' '; 100])));
    let request =
        server.client.post(format!("{}{TEXT_PATH}", server.url)).body(reqwest::Body::wrap_stream(pieces));
    assert_eq!(request.send().await.unwrap().status(), 413, "without a length, too");
    for body in [json!({"model": CHAT, "prompt": "x"}), json!({"model": CHAT, "prompt": "x", "stream": true})]
    {
        let response = server.send(TEXT_PATH, &body).await;
        assert_eq!(response.status(), 429, "the queue has no room");
        assert!(response.headers().contains_key("retry-after"));
        assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "rate_limit_exceeded");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_cancels_its_request() {
    let server = start().await;
    let idle = || {
        let status = server.node.status();
        status.running == 0 && status.waiting == 0 && status.kv_bytes == 0
    };
    let response = server.send(TEXT_PATH, &long_stream()).await;
    let mut body = response.bytes_stream();
    for _ in 0..3 {
        assert!(body.next().await.unwrap().is_ok());
    }
    eventually("running", || server.node.status().running == 1).await;
    drop(body);
    eventually("idle after a stream was dropped", idle).await;
    // Without a stream the client hears nothing until the end; leaving must be noticed all the same.
    let whole = with(long_stream(), json!({"stream": false}));
    let request = server.client.post(format!("{}{TEXT_PATH}", server.url)).json(&whole);
    let waiting = tokio::spawn(request.send());
    eventually("running again", || server.node.status().running == 1).await;
    waiting.abort();
    eventually("idle after a request was dropped", idle).await;
    // Neither got far, so it was not the end that made them stop.
    eventually("counted", || server.node.status().running == 0).await;
    let metrics = server.get("/metrics").await.text().await.unwrap();
    let line =
        metrics.lines().find(|line| line.starts_with("tangram_generated_tokens_total{model=\"tiny/llama\"}"));
    let generated: usize = line.unwrap().rsplit(' ').next().unwrap().parse().unwrap();
    assert!(generated < CONTEXT, "{generated} tokens");
    assert!(
        metrics.contains("tangram_requests_total{endpoint=\"completions\",model=\"\",status=\"499\"} 1"),
        "{metrics}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_lets_streams_finish() {
    let mut server = start().await;
    let body = with(long_stream(), json!({"max_tokens": 300}));
    let mut stream = server.send(TEXT_PATH, &body).await.bytes_stream();
    let mut received = stream.next().await.unwrap().unwrap().to_vec();
    server.stop();
    while let Some(piece) = stream.next().await {
        received.extend(piece.unwrap());
    }
    let events = events(std::str::from_utf8(&received).unwrap());
    assert_eq!(events.last().unwrap()["choices"][0]["finish_reason"], "length");
    assert_eq!(
        events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap().len()).sum::<usize>(),
        300
    );
    (&mut server.task).await.unwrap().unwrap();
    assert!(server.client.get(&server.url).send().await.is_err(), "nobody listens any more");
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_does_not_wait_for_ever() {
    let config = GatewayConfig { shutdown_grace: Duration::from_millis(100), ..GatewayConfig::default() };
    let mut server = start_with(config, 10).await;
    let mut stream = server.send(TEXT_PATH, &long_stream()).await.bytes_stream();
    let mut received = stream.next().await.unwrap().unwrap().to_vec();
    let begin = Instant::now();
    server.stop();
    while let Some(piece) = stream.next().await {
        received.extend(piece.unwrap());
    }
    let events = events(std::str::from_utf8(&received).unwrap());
    assert_eq!(events.last().unwrap()["error"]["code"], "shutting_down");
    (&mut server.task).await.unwrap().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(3), "{:?}", begin.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_does_not_wait_for_idle_connections() {
    use tokio::io::AsyncWriteExt;
    let mut server = start().await;
    let address = server.url.strip_prefix("http://").unwrap();
    let _silent = tokio::net::TcpStream::connect(address).await.unwrap();
    let mut halfway = tokio::net::TcpStream::connect(address).await.unwrap();
    halfway.write_all(b"GET /hea").await.unwrap();
    assert_eq!(server.get("/health").await.status(), 200);
    let begin = Instant::now();
    server.stop();
    (&mut server.task).await.unwrap().unwrap();
    assert!(begin.elapsed() < Duration::from_secs(10), "{:?}", begin.elapsed());
}

async fn deploy(server: &Server, name: &str, source: &str) -> (StatusCode, Vec<Value>) {
    let response = server.send("/admin/models", &json!({"name": name, "source": source})).await;
    let status = response.status();
    let text = response.text().await.unwrap();
    (status, text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn administration() {
    let server = start().await;
    let source = write_model(
        server.directory.path(),
        "new",
        &RandomModel { seed: 9, ..RandomModel::tiny(Family::Qwen2) },
    );
    let (status, lines) = deploy(&server, "org/new:1", source.to_str().unwrap()).await;
    assert_eq!(status, 200);
    let (last, progress) = lines.split_last().unwrap();
    assert_eq!((&last["status"], &last["model"]["name"]), (&json!("ready"), &json!("org/new:1")), "{last}");
    for line in progress {
        assert_eq!(line["status"], "importing");
        assert!(line["bytes_done"].as_u64() <= line["bytes_total"].as_u64());
        assert!(line["bytes_reused"].is_u64());
    }
    let answer = server.post(TEXT_PATH, json!({"model": "org/new:1", "prompt": "x", "max_tokens": 2})).await;
    assert_eq!(answer["model"], "org/new:1");
    let list: Value = server.get("/admin/models").await.json().await.unwrap();
    assert_eq!(list["models"].as_array().unwrap().len(), 4);
    let status: Value = server.get("/admin/status").await.json().await.unwrap();
    assert!(status["node"]["pool_bytes"].as_u64().unwrap() > 0);
    assert_eq!(status["models"].as_array().unwrap().len(), 4);
    let delete = |name: &str| server.client.delete(format!("{}/admin/models/{name}", server.url)).send();
    assert_eq!(delete("org/new:1").await.unwrap().status(), 200);
    assert_eq!(delete("org/new:1").await.unwrap().status(), 404);
    assert_eq!(error_of(&server, TEXT_PATH, &json!({"model": "org/new:1", "prompt": "x"})).await.0, 404);
    for (name, source, param) in
        [("a b", source.to_str().unwrap(), "name"), ("new", "/nowhere/at/all", "source")]
    {
        let (status, error) =
            error_of(&server, "/admin/models", &json!({"name": name, "source": source})).await;
        assert_eq!((status, &error["param"]), (400, &json!(param)), "{error}");
    }
    assert_eq!(error_of(&server, "/admin/models", &json!({"name": "x"})).await.1["param"], "source");
    let simple = server.client.post(format!("{}/admin/models", server.url)).body("{}").send().await.unwrap();
    assert_eq!(simple.status(), 415, "what a foreign page could send is refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn adapters() {
    let server = start().await;
    let directory = server.directory.path();
    let source = write_model(directory, "of-adapter", &RandomModel::tiny(Family::Llama));
    assert_eq!(deploy(&server, "base", source.to_str().unwrap()).await.0, 200);
    let adapter = directory.join("peft");
    tangram_testkit::write_adapter(&source, &adapter, &tangram_testkit::RandomAdapter::new(1));
    let body = json!({"name": "tuned", "adapter": adapter, "base": "base"});
    let response = server.send("/admin/models", &body).await;
    let text = response.text().await.unwrap();
    assert!(text.lines().last().unwrap().contains("\"ready\""), "{text}");
    let model: Value = server.get("/v1/models/tuned").await.json().await.unwrap();
    assert_eq!(model["parent"], "base");
    let prompt = |model: &str| json!({"model": model, "prompt": "abc", "max_tokens": 8, "temperature": 0});
    let of_base = server.post(TEXT_PATH, prompt("base")).await;
    let of_adapter = server.post(TEXT_PATH, prompt("tuned")).await;
    assert_ne!(of_base["choices"], of_adapter["choices"]);
    let cost = |answer: &Value, key: &str| answer["usage"]["tangram"][key].as_u64().unwrap();
    assert_eq!(cost(&of_adapter, "bytes_reused"), cost(&of_base, "bytes_loaded"));
    assert!(cost(&of_adapter, "bytes_loaded") > 0);
    for (change, status, param) in [
        (json!({"base": null}), 400, json!("base")),
        (json!({"base": "nobody"}), 404, json!("model")),
        (json!({"source": source}), 400, json!("adapter")),
        (json!({"name": "base"}), 400, json!("name")),
        (json!({"adapter": directory.join("nothing")}), 400, json!("adapter")),
    ] {
        let (found, error) = error_of(&server, "/admin/models", &with(body.clone(), change)).await;
        assert_eq!((found, &error["param"]), (status, &param), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics() {
    let server = start().await;
    server
        .post(TEXT_PATH, json!({"model": CHAT, "prompt": "xyz", "max_tokens": 2, "ignore_eos": true}))
        .await;
    server.post(EMBED_PATH, json!({"model": EMBED, "input": "xyz"})).await;
    for name in ["nobody", "somebody"] {
        server.send(TEXT_PATH, &json!({"model": name, "prompt": "x"})).await;
    }
    let response = server.get("/metrics").await;
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    let text = response.text().await.unwrap();
    for line in [
        "tangram_requests_total{endpoint=\"completions\",model=\"tiny/llama\",status=\"200\"} 1",
        "tangram_requests_total{endpoint=\"completions\",model=\"\",status=\"404\"} 2",
        "tangram_prompt_tokens_total{model=\"tiny/llama\"} 3",
        "tangram_generated_tokens_total{model=\"tiny/llama\"} 2",
        "tangram_request_first_token_seconds_count{model=\"tiny-bert\"} 1",
        "tangram_request_decode_seconds_count{model=\"tiny/llama\"} 1",
        "tangram_kv_blocks 0",
        "tangram_preemptions_total 0",
        "tangram_model_running{model=\"bare\"} 0",
    ] {
        assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
    }
    for name in [
        "tangram_request_queue_seconds_bucket",
        "tangram_request_load_seconds_sum",
        "tangram_pool_bytes ",
        "tangram_request_bytes_loaded_total{",
        "tangram_request_bytes_reused_total{",
        "tangram_bytes_evicted_total ",
        "tangram_pool_free_bytes ",
        "tangram_model_resident_bytes{",
    ] {
        assert!(text.contains(name), "no {name} in\n{text}");
    }
    assert!(!text.contains("somebody"), "unknown models make no labels");
}
