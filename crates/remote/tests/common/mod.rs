//! What the tests of downloads share.
#![allow(clippy::unwrap_used, clippy::expect_used, dead_code, unused_imports, unreachable_pub)]

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use tangram_remote::{Backoff, Options, Remote, RemoteError, RemoteSource};
pub use tangram_testkit::web::{Fault, Served, Server};

/// Settings under which nothing takes long.
pub fn options() -> Options {
    let backoff = Backoff {
        base: Duration::from_millis(1),
        cap: Duration::from_millis(8),
        longest_wish: Duration::from_millis(10),
        attempts: 40,
    };
    Options {
        connections: 4,
        chunk_bytes: 64 << 10,
        backoff,
        stall: Duration::from_millis(250),
        give_up: Duration::from_secs(10),
        start_jitter: Duration::ZERO,
        environment: Vec::new(),
    }
}

/// Bytes that differ everywhere.
pub fn random_bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut bytes = vec![0; len];
    rng.fill(&mut bytes[..]);
    bytes
}

pub fn source(text: &str) -> RemoteSource {
    RemoteSource::parse(text).unwrap().unwrap()
}

/// Downloads all of a source into `dir`; gives the folder or file that a reader opens.
pub fn download(dir: &Path, options: Options, text: &str) -> Result<Vec<(String, Vec<u8>)>, RemoteError> {
    let remote = Remote::new(dir.to_path_buf(), options)?;
    let fetch = remote.download(&source(text), &mut |_| ControlFlow::Continue(()))?;
    Ok(files(fetch.path()))
}

/// The files of a finished download, without the journals.
pub fn files(path: &Path) -> Vec<(String, Vec<u8>)> {
    let folder = if path.is_dir() { path } else { path.parent().unwrap() };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            found.extend(
                files(&entry.path()).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)),
            );
        } else if !name.ends_with(".journal") {
            found.push((name, std::fs::read(entry.path()).unwrap()));
        }
    }
    found.sort();
    found
}

/// SHA-256 in hexadecimal.
pub fn sha256(bytes: &[u8]) -> String {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
