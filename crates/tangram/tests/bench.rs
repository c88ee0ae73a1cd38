//! `tangram bench`: `switch`, against a running server and on its own, and `load`.

mod common;

use common::{Server, cli_json, cli_result, text, write_tiny};
use tangram_testkit::{Family, mutate_layer};
use tempfile::tempdir;

#[tokio::test]
async fn a_trace_is_replayed_and_added_up() {
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let base = write_tiny(sources.path(), "base", Family::Llama, 1);
    let tuned = sources.path().join("tuned");
    mutate_layer(&base, &tuned, 1);
    let server = Server::start(data.path(), &[]);
    let weights = server.deploy("base", &base).await.unwrap()["weight_bytes"].as_u64().unwrap();
    server.deploy("tuned", &tuned).await.unwrap();
    server.deploy("embed", &write_tiny(sources.path(), "embed", Family::Bert, 2)).await.unwrap();
    let trace = sources.path().join("trace.csv");
    // The third request is longer than the model's context of 256.
    let rows =
        "arrival_s,model,input_tokens,output_tokens\n0,9,20,8\n0.01,4,30,16\n0.02,9,400,4\n0.5,4,1,1\n";
    std::fs::write(&trace, rows).unwrap();

    let args = ["bench", "switch", text(&trace), "--json", "--limit", "3", "--max-output", "6"];
    let report = cli_json(data.path(), &args);
    assert_eq!(report["settings"]["models"], serde_json::json!({"4": "tuned", "9": "base"}));
    assert_eq!(
        (&report["overall"]["requests"], &report["overall"]["errors"]),
        (&3.into(), &0.into()),
        "{report}"
    );
    assert_eq!(report["settings"]["shortened_to_context"], 1);
    assert_eq!(report["overall"]["completion_tokens"], 6 + 6 + 4);
    assert_eq!(report["overall"]["prompt_tokens"], 20 + 30 + 252);
    assert_eq!(report["models"]["base"]["bytes_loaded"], weights);
    let loaded = report["models"]["tuned"]["bytes_loaded"].as_u64().unwrap();
    assert!(0 < loaded && loaded < weights, "the tuned model loads its layer: {loaded}");
    assert!(report["overall"]["ttft_ms"]["p99"].as_f64().unwrap() > 0.0);
    assert_eq!(
        server.node().await["bytes_loaded_total"].as_u64(),
        report["overall"]["bytes_loaded"].as_u64()
    );

    let mapped =
        [&args[..], &["--map", "9=tuned,4=tuned", "--time-scale", "0", "--concurrency", "1"]].concat();
    let report = cli_json(data.path(), &mapped);
    assert_eq!(report["overall"]["resident_requests"], 3, "{report}");
    assert_eq!(report["overall"]["reused_share"], 1.0);
    assert!(report["overall"]["activation_ms"]["p50"].is_number());

    drop(server);
    let report = cli_json(data.path(), &args);
    assert_eq!(
        (&report["overall"]["errors"], &report["server"]["pool_bytes"]),
        (&0.into(), &(64 << 20).into())
    );
    let table = common::cli(data.path(), &["bench", "switch", text(&trace)]);
    assert!(table.contains("MODEL") && table.lines().any(|line| line.starts_with("all ")), "{table}");
    for (args, words) in [
        (&["--map", "9=embed,4=base"][..], "embed"),
        (&["--map", "9=base"], "'4'"),
        (&["--time-scale", "x"], "--time-scale"),
        (&["--limit", "0"], "no requests"),
    ] {
        let ran = cli_result(data.path(), &[&["bench", "switch", text(&trace)], args].concat());
        assert!(!ran.success && ran.stderr.contains(words), "{ran:?}");
    }
}

#[test]
fn a_checkpoint_is_loaded_in_every_way() {
    // On the disk of the build and not in a directory for temporary files, which may be in memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = write_tiny(dir.path(), "source", Family::Llama, 1);
    let chart = dir.path().join("load.svg");
    let load = ["bench", "load", text(&source), "--scratch", text(dir.path()), "--rounds", "2"];
    let print = |more: &[&str]| {
        let ran = common::ran(common::tangram().args(load).args(more));
        assert!(ran.success, "{}", ran.stderr);
        ran.stdout
    };
    let report: serde_json::Value = serde_json::from_str(&print(&["--json", "--svg", text(&chart)])).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    let expected = [
        "raw direct reads",
        "cold",
        "cold, sampled",
        "cold, 16 loads at once",
        "memory copy",
        "warm",
        "warm, again",
        "warm, sampled",
    ];
    assert_eq!(names, expected);
    for row in rows {
        assert!(
            row["bytes_per_second"].as_f64().unwrap() > 0.0 && row["share"].as_f64().unwrap() > 0.0,
            "{row}"
        );
    }
    assert!(report["urgent_slowdown"].as_f64().unwrap() > 0.0);
    assert!(std::fs::read_to_string(&chart).unwrap().starts_with("<svg"));
    let table = print(&["--pool", "segment"]);
    assert!(table.contains("OF LIMIT"), "{table}");
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("tangram-bench")), "{left:?}");
}
