//! The real server deploys from a web server, is killed in the middle, and goes on.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{PATIENCE, Server, cli, cli_result, entries, eventually, text, write_tiny};
use tangram_testkit::web;
use tangram_testkit::{Family, RandomModel, write_hf_model};

#[test]
fn the_command_line_deploys_from_an_address() {
    let (data, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let local = write_tiny(files.path(), "m", Family::Llama, 1);
    let server = web::Server::start();
    server.put_folder("/org/m", &local);
    let url = server.url("/org/m");
    let said = cli(data.path(), &["deploy", "remote", &url]);
    assert!(said.contains("remote is deployed"), "{said}");
    let said = cli(data.path(), &["deploy", "local", text(&local)]);
    assert!(said.contains("local is deployed"), "{said}");
    let address = url.replace("http://", "http://ann:hunter2@").replace("/m", "/none");
    let failed = cli_result(data.path(), &["deploy", "other", &address]);
    let said = failed.stdout + &failed.stderr;
    assert!(!failed.success && said.contains("/org/none") && !said.contains("hunter2"), "{said}");
}

#[tokio::test]
async fn a_server_killed_while_it_downloads_goes_on_after_its_restart() {
    let (data, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Of several chunks, as the server cuts them.
    let model = RandomModel { vocab: 40_000, hidden: 256, ..RandomModel::tiny(Family::Llama) };
    write_hf_model(files.path(), &model);
    let size = std::fs::metadata(files.path().join("model.safetensors")).unwrap().len();
    assert!(size > 64 << 20, "{size} bytes are too few for this test");
    let source = web::Server::start();
    source.put_folder("/m", files.path());
    *source.state.pace.lock().unwrap() = Duration::from_millis(1);
    let url = source.url("/m");
    let sent = || source.state.sent.load(Ordering::Relaxed);
    let mut server = Server::with_pool(data.path(), "256MiB", &[]);
    let deploying = async {
        // It never ends: the server dies.
        let _ = server.deploy("m", Path::new(&url)).await;
    };
    let written_down = || async {
        let downloads = std::fs::read_dir(data.path().join("downloads")).into_iter().flatten().flatten();
        downloads.map(|entry| entry.path().join("model/model.safetensors.journal")).any(|path| path.exists())
    };
    tokio::select! {
        () = deploying => panic!("the deployment must not end before the server is killed"),
        () = eventually("something is written down", written_down) => {}
    }
    server.kill();
    let before = sent();
    *source.state.pace.lock().unwrap() = Duration::ZERO;
    let server = Server::with_pool(data.path(), "256MiB", &[]);
    assert!(server.names().await.is_empty() && entries(data.path(), "checkpoints").is_empty());
    let deployed = tokio::time::timeout(PATIENCE, server.deploy("m", Path::new(&url))).await.unwrap();
    assert!(deployed.is_ok(), "{deployed:?}");
    let again = sent() - before;
    assert!(again < size * 3 / 4, "{again} bytes of {size} were sent again");
    let remote = server.complete("m", &[3, 1, 4], 8).await;
    let local = server.deploy("local", files.path()).await.unwrap();
    assert_eq!(local["shared_bytes"], local["weight_bytes"], "the same contents as from this disk");
    assert_eq!(server.complete("local", &[3, 1, 4], 8).await.body["choices"], remote.body["choices"]);
    assert!(entries(data.path(), "downloads").is_empty(), "the download is not kept");
}
