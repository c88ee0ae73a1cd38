//! The stock `openai` Python client against the server, where Python has it.

mod common;

use std::path::Path;
use std::process::Command;

use common::{Server, ran, write_tiny};
use tangram_testkit::Family;
use tempfile::tempdir;

#[tokio::test]
async fn the_stock_client_is_served() {
    let has_client = ran(Command::new("python3").args(["-c", "import openai"]));
    if !has_client.success {
        println!("SKIPPED: python3 has no openai client; `pip install openai` gives it one");
        return;
    }
    let (sources, data) = (tempdir().unwrap(), tempdir().unwrap());
    let server = Server::start(data.path(), &[]);
    server.deploy("chat", &write_tiny(sources.path(), "chat", Family::Llama, 1)).await.unwrap();
    server.deploy("embed", &write_tiny(sources.path(), "embed", Family::Bert, 2)).await.unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts/openai_client_check.py");
    let url = format!("{}/v1", server.url);
    let mut command = common::clean("python3");
    command.arg(script).args(["--base-url", &url, "--model", "chat", "--embedding-model", "embed"]);
    let ran = ran(&mut command);
    assert!(ran.success, "{}{}", ran.stdout, ran.stderr);
}
