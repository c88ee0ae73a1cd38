//! A model hub, an S3 service, and what is told about credentials: nothing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{Fault, Server, download, options, random_bytes, sha256};
use tangram_remote::RemoteError;

/// A hub with one repository, whose large file lies on another server.
fn hub(token: Option<&str>) -> (Server, Server, Vec<u8>) {
    let (hub, storage) = (Server::start(), Server::start());
    let weights = random_bytes(1, 500_000);
    let sha = "0123456789abcdef0123456789abcdef01234567";
    let listing = format!(
        r#"{{"sha": "{sha}", "siblings": [{{"rfilename": "README.md"}}, {{"rfilename": "config.json"}},
        {{"rfilename": "model.safetensors"}}, {{"rfilename": "onnx/model.onnx"}}]}}"#
    );
    hub.put("/api/models/org/name/revision/main", listing.as_bytes());
    // Git's hash is as long as a SHA-1 and no hash of the bytes alone.
    hub.put_with(&format!("/org/name/resolve/{sha}/config.json"), b"{}", &[("x-linked-etag", sha)]);
    let large = format!("/org/name/resolve/{sha}/model.safetensors");
    hub.put_with(&large, b"", &[("x-linked-etag", &format!("\"{}\"", sha256(&weights)))]);
    storage.put("/blobs/1", &weights);
    hub.state.redirects.lock().unwrap().insert(large, storage.url("/blobs/1?signature=s3cr3t"));
    if let Some(token) = token {
        *hub.state.protected.lock().unwrap() = Some(("/".into(), format!("Bearer {token}")));
    }
    (hub, storage, weights)
}

fn environment(pairs: &[(&str, &str)]) -> tangram_remote::Options {
    let environment = pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
    tangram_remote::Options { environment, ..options() }
}

#[test]
fn a_repository_of_a_hub_is_fetched_by_commit_and_its_token_goes_nowhere_else() {
    let ((hub, storage, weights), dir) = (hub(Some("hf_s3cr3t")), tempfile::tempdir().unwrap());
    let endpoint = hub.url("");
    let error = download(dir.path(), environment(&[("HF_ENDPOINT", &endpoint)]), "hf:org/name").unwrap_err();
    assert!(error.to_string().contains("HF_TOKEN"), "{error}");
    let options = environment(&[("HF_ENDPOINT", &endpoint), ("HF_TOKEN", "hf_s3cr3t")]);
    let files = download(dir.path(), options.clone(), "hf:org/name").unwrap();
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["config.json", "model.safetensors"]);
    assert!(files[1].1 == weights);
    let told = storage.state.requests.lock().unwrap().concat().to_lowercase();
    assert!(told.contains("/blobs/1") && !told.contains("authorization"), "{told}");
    let error = download(dir.path(), options, "hf:org/other").unwrap_err().to_string();
    assert!(error.contains("no such repository"), "{error}");
}

#[test]
fn a_hub_states_what_large_files_must_hash_to() {
    let ((hub, storage, _), dir) = (hub(None), tempfile::tempdir().unwrap());
    storage.faults(|_, range| if range == Some((65_536, 131_071)) { Fault::WrongBytes } else { Fault::None });
    let options = environment(&[("HF_ENDPOINT", &hub.url("/"))]);
    let error = download(dir.path(), options, "hf:org/name/model.safetensors").unwrap_err();
    assert!(matches!(error, RemoteError::Corrupted { .. }), "{error}");
}

/// Serves the buckets below `root` as S3 does, for one pair of keys. Gives its address.
fn s3(root: &Path, runtime: &tokio::runtime::Runtime) -> String {
    let storage = s3s_fs::FileSystem::new(root).unwrap();
    let mut builder = s3s::service::S3ServiceBuilder::new(storage);
    builder.set_auth(s3s::auth::SimpleAuth::from_single("AKIDTEST", "s3cr3t/key"));
    let service = builder.build();
    let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    runtime.spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let stream = hyper_util::rt::TokioIo::new(stream);
            let connection =
                hyper::server::conn::http1::Builder::new().serve_connection(stream, service.clone());
            tokio::spawn(connection);
        }
    });
    format!("http://{address}")
}

#[test]
fn a_checkpoint_in_an_s3_bucket_comes_as_it_is() {
    let (root, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let endpoint = s3(root.path(), &runtime);
    let folder = root.path().join("models/tiny/v 1");
    std::fs::create_dir_all(&folder).unwrap();
    let weights = random_bytes(1, 700_000);
    std::fs::write(folder.join("config.json"), b"{}").unwrap();
    std::fs::write(folder.join("model.safetensors"), &weights).unwrap();
    std::fs::write(folder.join("training.log"), b"...").unwrap();
    let settings = |secret| {
        environment(&[
            ("AWS_ACCESS_KEY_ID", "AKIDTEST"),
            ("AWS_SECRET_ACCESS_KEY", secret),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ENDPOINT_URL", &endpoint),
        ])
    };
    let files = download(dir.path(), settings("s3cr3t/key"), "s3://models/tiny/v%201").unwrap();
    let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["config.json", "model.safetensors"]);
    assert!(files[1].1 == weights);
    let one =
        download(dir.path(), settings("s3cr3t/key"), "s3://models/tiny/v%201/model.safetensors").unwrap();
    assert!(one.iter().any(|(_, bytes)| *bytes == weights));
    let error = download(dir.path(), settings("s3cr3t/other"), "s3://models/tiny").unwrap_err().to_string();
    assert!(
        error.contains("403") && error.contains("AWS_SECRET_ACCESS_KEY") && !error.contains("s3cr3t"),
        "{error}"
    );
    let error = download(dir.path(), settings("s3cr3t/key"), "s3://models/none").unwrap_err().to_string();
    assert!(error.contains("neither a config.json"), "{error}");
}

/// Collects what is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The part of the next test that logs everything; alone in its process, as a log is for all of one.
#[test]
fn logged() {
    let Ok(endpoint) = std::env::var("TANGRAM_REMOTE_TEST_S3") else { return };
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
        .with_writer(move || writer.clone())
        .init();
    let dir = tempfile::tempdir().unwrap();
    let mut told = String::new();
    let mut tell =
        |result: Result<_, RemoteError>| told.push_str(&format!("{:?}\n", result.map(|_: Vec<_>| ())));
    let (hub, _storage, _) = hub(Some("hf_s3cr3t"));
    let hubs = |token| environment(&[("HF_ENDPOINT", &hub.url("")), ("HF_TOKEN", token)]);
    tell(download(dir.path(), hubs("hf_s3cr3t"), "hf:org/name"));
    tell(download(dir.path(), hubs("hf_s3cr3t-wrong"), "hf:org/name"));
    tell(download(dir.path(), hubs("hf_s3cr3t-\u{7f}"), "hf:org/name"));
    let web = Server::start();
    *web.state.protected.lock().unwrap() = Some(("/private".into(), "Basic YW5uOnMzY3IzdA==".into()));
    web.put("/private/model.gguf", &random_bytes(1, 100_000));
    let address = web.url("/private/model.gguf?X-Amz-Signature=s3cr3t").replace("//", "//ann:s3cr3t@");
    tell(download(dir.path(), options(), &address));
    tell(download(dir.path(), options(), &address.replace("ann", "bob")));
    tell(download(dir.path(), options(), &address.replace("model", "other")));
    for secret in ["s3cr3t/key", "s3cr3t/other"] {
        let settings = environment(&[
            ("AWS_ACCESS_KEY_ID", "AKIDTEST"),
            ("AWS_SECRET_ACCESS_KEY", secret),
            ("AWS_SESSION_TOKEN", "session-s3cr3t"),
            ("AWS_ENDPOINT_URL", &endpoint),
        ]);
        tell(download(dir.path(), settings, "s3://models/tiny"));
    }
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap() + &told;
    assert!(text.lines().count() > 50 && text.contains("hf:org/name"), "something was logged: {text}");
    for secret in ["s3cr3t", "YW5uOnMzY3IzdA", "Ym9iOnMzY3IzdA"] {
        let leak = text.lines().find(|line| line.contains(secret));
        assert!(leak.is_none(), "{secret} is told: {leak:?}");
    }
}

#[test]
fn credentials_are_neither_logged_nor_part_of_an_error() {
    let root = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let endpoint = s3(root.path(), &runtime);
    let folder = root.path().join("models/tiny");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("config.json"), b"{}").unwrap();
    std::fs::write(folder.join("model.safetensors"), random_bytes(1, 100_000)).unwrap();
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "logged", "--nocapture"])
        .env("TANGRAM_REMOTE_TEST_S3", endpoint)
        .output()
        .unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}
