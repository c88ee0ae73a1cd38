//! The real binary with the stand-in in the place of NVIDIA's driver library, which it finds as it finds the real one.
//!
//! What kernels compute is proved elsewhere (`crates/node/tests/cuda.rs`); this is about what users say and are told.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;
use std::process::Command;

use common::{Server, ran, tangram, write_tiny};
use serde_json::json;
use tangram_fake_cuda::build_emulator;
use tangram_testkit::Family;
use tempfile::{TempDir, tempdir};

/// A directory in which the stand-in is the driver's library.
fn driver() -> TempDir {
    let library = std::env::current_exe().unwrap().with_file_name("libtangram_fake_cuda.so");
    let directory = tempdir().unwrap();
    std::os::unix::fs::symlink(library, directory.path().join("libcuda.so.1")).unwrap();
    directory
}

/// `tangram serve` with a GPU of so many bytes (`FAKE_CUDA_DEVICES` says otherwise), of which 1 GiB is held in reserve.
fn serve(driver: &Path, data: &Path, memory: usize, args: &[&str]) -> Command {
    let mut command = tangram();
    command.arg("serve").args(["--listen", "127.0.0.1:0", "--data"]).arg(data).args(args);
    command.env("LD_LIBRARY_PATH", driver).env("FAKE_CUDA_DEVICES", "1");
    command.env("FAKE_CUDA_MEMORY", memory.to_string());
    command
}

const GIB: usize = 1 << 30;

#[tokio::test]
async fn models_are_served_on_a_gpu_that_is_asked_for_or_found() {
    let Some(emulator) = build_emulator(Path::new(env!("CARGO_TARGET_TMPDIR"))) else {
        println!("SKIPPED: no C++ compiler here that can compile the kernels");
        return;
    };
    let (driver, sources, data) = (driver(), tempdir().unwrap(), tempdir().unwrap());
    let source = write_tiny(sources.path(), "m", Family::Qwen3, 1);
    let body = json!({
        "model": "m", "prompt": [10, 200, 33, 47], "max_tokens": 3, "temperature": 0, "return_token_ids": true
    });
    let on_cpu = {
        let server = Server::start(data.path(), &["--device", "cpu"]);
        server.deploy("m", &source).await.unwrap();
        server.post("/v1/completions", &body).await.tokens()
    };
    for device in ["auto", "cuda:0"] {
        // All that is free less the reserve, and one page for moves.
        let mut command = serve(driver.path(), data.path(), GIB + (20 << 20), &["--device", device]);
        let mut server = Server::spawn(command.env("FAKE_CUDA_KERNELS", &emulator));
        let node = server.node().await;
        assert!(node["device"].as_str().unwrap().starts_with("cuda:0 (stand-in"), "{node}");
        assert_eq!(node["pool_bytes"], 18 << 20);
        let (cold, resident) =
            (server.post("/v1/completions", &body).await, server.post("/v1/completions", &body).await);
        assert_eq!((cold.tokens(), resident.tokens()), (on_cpu.clone(), on_cpu.clone()), "{device}");
        assert!(cold.bytes_loaded() > 0 && resident.bytes_loaded() == 0);
        assert!(!server.stderr().contains("models run on the CPU"), "{}", server.stderr());
    }
}

#[tokio::test]
async fn several_gpus_serve_as_one() {
    let Some(emulator) = build_emulator(Path::new(env!("CARGO_TARGET_TMPDIR"))) else {
        println!("SKIPPED: no C++ compiler here that can compile the kernels");
        return;
    };
    let (driver, sources, data) = (driver(), tempdir().unwrap(), tempdir().unwrap());
    let source = write_tiny(sources.path(), "m", Family::Qwen3, 1);
    for (device, names) in [("auto", ["cuda:0 ", "cuda:1 "]), ("cuda:1,cuda:0", ["cuda:1 ", "cuda:0 "])] {
        let mut command = serve(driver.path(), data.path(), GIB + (20 << 20), &["--device", device]);
        command.env("FAKE_CUDA_KERNELS", &emulator).env("FAKE_CUDA_DEVICES", "2");
        let server = Server::spawn(&mut command);
        if device == "auto" {
            server.deploy("m", &source).await.unwrap();
        }
        let body =
            json!({"model": "m", "prompt": [10, 200, 33, 47], "max_tokens": 3, "return_token_ids": true});
        let (cold, resident) =
            (server.post("/v1/completions", &body).await, server.post("/v1/completions", &body).await);
        assert!(cold.bytes_loaded() > 0 && resident.bytes_loaded() == 0, "the same GPU has it");
        let node = server.node().await;
        assert_eq!(node["pool_bytes"], 2 * (18 << 20));
        for (device, name) in node["devices"].as_array().unwrap().iter().zip(names) {
            assert!(device["device"].as_str().unwrap().starts_with(name), "{node}");
            assert_eq!((&device["pool_bytes"], &device["lost"]), (&json!(18 << 20), &json!(false)));
        }
        let metrics = server.http.get(format!("{}/metrics", server.url)).send().await.unwrap();
        let metrics = metrics.text().await.unwrap();
        assert!(metrics.contains("tangram_device_pool_bytes{device=\"cuda:1\"} 18874368"), "{metrics}");
    }
}

#[tokio::test]
async fn a_gpu_that_cannot_be_set_up_is_named() {
    let (driver, data) = (driver(), tempdir().unwrap());
    let with = |args: &[&str]| serve(driver.path(), data.path(), GIB / 2, args);
    let mut server = Server::spawn(&mut with(&["--device", "auto", "--device-memory", "16MiB"]));
    assert_eq!(server.node().await["device"], "cpu");
    let said = server.stderr();
    assert!(
        said.contains("models run on the CPU: there is a GPU, but") && said.contains("bytes free"),
        "{said}"
    );
    drop(server);
    // Of two the one that can be used is.
    let mut one = with(&["--device", "auto"]);
    one.env("FAKE_CUDA_DEVICES", "2").env("FAKE_CUDA_MEMORY", format!("{},{}", GIB / 2, GIB + (20 << 20)));
    let mut server = Server::spawn(&mut one);
    assert!(server.node().await["device"].as_str().unwrap().starts_with("cuda:1 (stand-in"));
    let said = server.stderr();
    assert!(said.contains("a GPU is not used: ") && said.contains("cuda:0 (stand-in"), "{said}");
    drop(server);
    let asked = ran(&mut with(&["--device", "cuda:0"]));
    assert!(!asked.success && asked.stderr.contains("bytes free"), "{asked:?}");
    let missing = ran(&mut with(&["--device", "cuda:1"]));
    assert!(!missing.success && missing.stderr.contains("there is no GPU 1"), "{missing:?}");
}
