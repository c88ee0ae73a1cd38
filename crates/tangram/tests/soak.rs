//! `tangram bench soak` and `tangram bench serve`: short runs against the real server.

#![allow(clippy::unwrap_used)]

mod common;

use common::{Server, cli_result, text, write_tiny};
use serde_json::Value;
use tangram_testkit::{Family, RandomAdapter, mutate_layer, write_adapter};
use tempfile::tempdir;

/// A server with a pool that holds some of the models only, and its models.
async fn crowded(data: &std::path::Path, sources: &std::path::Path, args: &[&str]) -> Server {
    let server = Server::with_pool(data, "1536KiB", args);
    let base = write_tiny(sources, "base", Family::Llama, 1);
    let (tuned, adapter) = (sources.join("tuned"), sources.join("adapter"));
    mutate_layer(&base, &tuned, 1);
    write_adapter(&base, &adapter, &RandomAdapter::new(3));
    for (name, family, seed) in
        [("qwen", Family::Qwen2, 4), ("gemma", Family::Gemma3, 5), ("embed", Family::Bert, 6)]
    {
        server.deploy(name, &write_tiny(sources, name, family, seed)).await.unwrap();
    }
    server.deploy("base", &base).await.unwrap();
    server.deploy("tuned", &tuned).await.unwrap();
    common::cli(data, &["deploy", "adapter", "--adapter", text(&adapter), "--base", "base"]);
    server
}

#[tokio::test]
async fn a_short_soak_finds_nothing_in_either_layout() {
    for layout in ["paged", "segment"] {
        let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
        let _server = crowded(data.path(), sources.path(), &["--pool", layout]).await;
        let args =
            ["bench", "soak", "--json", "--minutes", "0.05", "--concurrency", "8", "--max-input", "120"];
        let ran = cli_result(data.path(), &args);
        let report: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(report["violations"], serde_json::json!({}), "{report:#}");
        assert!(ran.success, "{}", ran.stderr);
        assert_eq!(report["backend"], layout);
        assert!(report["kinds"]["recorded"]["sent"].as_u64().unwrap() > 0, "{report:#}");
        assert_eq!(report["models"].as_object().unwrap().len(), 6);
        assert!(report["pressure"]["bytes_evicted"].as_u64().unwrap() > 0, "{report:#}");
        let samples = report["samples"].as_array().unwrap();
        assert!(samples.len() > 1 && samples.iter().all(|sample| sample["process"]["threads"].is_u64()));
    }
}

#[tokio::test]
async fn a_soak_tells_another_answer() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let server = Server::start(data.path(), &[]);
    let first = write_tiny(sources.path(), "first", Family::Llama, 1);
    let second = write_tiny(sources.path(), "second", Family::Llama, 2);
    server.deploy("model", &first).await.unwrap();
    let directory = data.path().to_owned();
    let soak = std::thread::spawn(move || {
        cli_result(&directory, &["bench", "soak", "--json", "--minutes", "0.05", "--concurrency", "2"])
    });
    // Once load is there, another model takes the name: what it answers is not what was recorded.
    common::eventually("recording is over", async || {
        server.node().await["running"].as_u64().is_some_and(|running| running > 1)
    })
    .await;
    server.deploy("model", &second).await.unwrap();
    let ran = soak.join().unwrap();
    assert!(!ran.success, "{ran:?}");
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    let violations = report["violations"].as_object().unwrap();
    assert!(
        violations.keys().any(|what| what.contains("not the answer that it had alone")),
        "{violations:?}"
    );
    assert!(ran.stderr.contains("violations"), "{}", ran.stderr);
}

#[tokio::test]
async fn two_servers_are_compared_by_the_same_work() {
    let (sources, data, other) = (tempdir().unwrap(), tempdir().unwrap(), tempdir().unwrap());
    let (a, b) = (
        write_tiny(sources.path(), "a", Family::Llama, 1),
        write_tiny(sources.path(), "b", Family::Qwen2, 2),
    );
    let first = Server::start(data.path(), &[]);
    let second = Server::start(other.path(), &[]);
    for (name, source) in [("a", &a), ("b", &b)] {
        first.deploy(name, source).await.unwrap();
        second.deploy(&format!("{name}2"), source).await.unwrap();
    }
    let compare = |extra: &[&str]| {
        let servers = ["bench", "serve", "--url", &first.url, "--against", &second.url];
        let size = ["--requests", "6", "--rounds", "2", "--input-tokens", "20", "--output-tokens", "5"];
        let mut command = common::tangram();
        common::ran(command.args(servers).args(size).args(extra))
    };
    let ran = compare(&["--model", "a", "--against-model", "a2", "--concurrency", "1,3", "--json"]);
    assert!(ran.success, "{ran:?}");
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    let levels = report["levels"].as_array().unwrap();
    assert_eq!(levels.len(), 2);
    for level in levels {
        for turn in level["turns"].as_array().unwrap().iter().flat_map(|turns| turns.as_array().unwrap()) {
            assert_eq!((&turn["prompt_tokens"], &turn["completion_tokens"]), (&120.into(), &30.into()));
        }
        assert!(level["ratios"]["requests_per_s"].as_f64().unwrap() > 0.0);
        assert!(level["servers"][1]["ttft_p95_ms"]["median"].as_f64().unwrap() > 0.0);
    }
    let cached = first.node().await["cached_tokens_total"].as_u64();
    assert_eq!(cached, Some(0), "no prompt begins like another");

    let models = ["--models", "a,b", "--against-models", "a2,b2", "--concurrency", "1"];
    let ran = compare(&[&models[..], &["--drop-cache", text(data.path())]].concat());
    assert!(ran.success && ran.stdout.contains("LOADING mean"), "{ran:?}");
    assert!(ran.stdout.contains("dropped from the page cache"), "{}", ran.stdout);

    for (extra, words) in [
        (&["--model", "a", "--against-model", "gone"][..], "gone"),
        (&["--model", "a", "--against-model", "a2,b2"], "--against-model 2"),
        (&["--model", "a", "--against-model", "a2", "--drop-cache", "/nonexistent"], "/nonexistent"),
    ] {
        let ran = compare(extra);
        assert!(!ran.success && ran.stderr.contains(words), "{ran:?}");
    }
}
