//! Whatever a server does, a download ends with the right bytes or with an error that says why.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::ops::ControlFlow;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::{Fault, Server, download, options, random_bytes, sha256, source};
use tangram_remote::{Remote, RemoteError};

/// A checkpoint in two shards, all bytes random.
fn sharded(server: &Server, seed: u64, bytes: usize) -> Vec<(String, Vec<u8>)> {
    let index = br#"{"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}"#.to_vec();
    let mut files = vec![
        ("config.json".to_owned(), b"{}".to_vec()),
        ("m-1.safetensors".to_owned(), random_bytes(seed, bytes)),
        ("m-2.safetensors".to_owned(), random_bytes(seed + 1, bytes / 3 + 1)),
        ("model.safetensors.index.json".to_owned(), index),
        ("tokenizer.json".to_owned(), random_bytes(seed + 2, 70_001)),
    ];
    for (name, bytes) in &files {
        server.put_with(
            &format!("/org/{name}"),
            bytes,
            &[("x-linked-etag", &format!("\"{}\"", sha256(bytes)))],
        );
    }
    files.sort();
    files
}

#[test]
fn a_checkpoint_comes_as_it_is() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    let files = sharded(&server, 1, 700_000);
    assert!(download(dir.path(), options(), &server.url("/org")).unwrap() == files);
    // Everything is there: only the listing and what the files are is asked again.
    let sent = server.state.sent.load(Ordering::Relaxed);
    assert!(download(dir.path(), options(), &server.url("/org/")).unwrap() == files);
    let again = server.state.sent.load(Ordering::Relaxed) - sent;
    assert!(again < 1000, "{again} bytes were sent again");
}

#[test]
fn faults_of_every_kind_never_lead_to_a_wrong_byte() {
    let mut errors = 0;
    for seed in 0..24 {
        let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
        let files = sharded(&server, 10 * seed, 400_000);
        server.random_faults(seed, 0.1 + 0.02 * seed as f64);
        match download(dir.path(), options(), &server.url("/org")) {
            Ok(found) => assert!(found == files, "seed {seed}"),
            Err(error) => {
                assert!(matches!(error, RemoteError::GaveUp { .. }), "seed {seed}: {error}");
                errors += 1;
            }
        }
    }
    assert!(errors < 12, "{errors} of 24 were given up, although every fault goes away");
}

#[test]
fn each_fault_that_does_not_go_away_is_named() {
    for (fault, expected) in [
        (Fault::Reset, "broke off"),
        (Fault::Stall, "sends nothing more"),
        (Fault::Unavailable, "503"),
        (Fault::WrongLength, "announces"),
        (Fault::ShortRange, "another range"),
        (Fault::OtherRange, "another range"),
        (Fault::Whole, "everything instead of a range"),
        (Fault::TooLong, "more than was asked for"),
        (Fault::Noise, "broke off"),
    ] {
        let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
        server.put("/model.gguf", &random_bytes(1, 300_000));
        // What it is can be asked; reading is what fails.
        server.faults(move |_, range| if range == Some((0, 0)) { Fault::None } else { fault });
        let mut options = options();
        options.backoff.attempts = 3;
        options.stall = Duration::from_millis(100);
        let error = download(dir.path(), options, &server.url("/model.gguf")).unwrap_err();
        let RemoteError::GaveUp { problem, attempts: 3, .. } = &error else { panic!("{fault:?}: {error}") };
        assert!(problem.contains(expected), "{fault:?}: {problem}");
        assert!(error.to_string().contains("deploy again to go on"), "{error}");
    }
}

#[test]
fn wrong_bytes_of_the_right_length_are_found_by_the_hash_and_thrown_away() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    let bytes = random_bytes(1, 300_000);
    server.put_with("/model.gguf", &bytes, &[("x-linked-etag", &sha256(&bytes))]);
    server.faults(|_, range| if range == Some((131_072, 196_607)) { Fault::WrongBytes } else { Fault::None });
    let error = download(dir.path(), options(), &server.url("/model.gguf")).unwrap_err();
    assert!(matches!(error, RemoteError::Corrupted { digest: "SHA-256", .. }), "{error}");
    server.faults(|_, _| Fault::None);
    assert!(download(dir.path(), options(), &server.url("/model.gguf")).unwrap()[0].1 == bytes);
}

#[test]
fn an_object_that_changes_meanwhile_is_begun_anew() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    let (old, new) = (random_bytes(1, 900_000), random_bytes(2, 800_000));
    server.put("/model.gguf", &old);
    let (state, replacement) = (Arc::downgrade(&server.state), new.clone());
    let count = AtomicUsize::new(0);
    server.faults(move |path, _| {
        if count.fetch_add(1, Ordering::Relaxed) == 5 {
            // In the middle of the download.
            let (state, path, bytes) = (state.clone(), path.to_owned(), replacement.clone());
            std::thread::spawn(move || {
                let served =
                    common::Served { bytes: Arc::new(bytes), etag: Some("\"new\"".into()), headers: vec![] };
                state.upgrade().unwrap().objects.lock().unwrap().insert(path, served);
            })
            .join()
            .unwrap();
        }
        Fault::None
    });
    assert!(download(dir.path(), options(), &server.url("/model.gguf")).unwrap()[0].1 == new);
}

#[test]
fn a_server_without_ranges_is_read_in_one_piece() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    let bytes = random_bytes(1, 500_000);
    server.put("/model.gguf", &bytes);
    let count = AtomicUsize::new(0);
    // The first long answer breaks off, and there is no taking up in the middle.
    server.faults(
        move |_, _| if count.fetch_add(1, Ordering::Relaxed) == 1 { Fault::Reset } else { Fault::Whole },
    );
    assert!(download(dir.path(), options(), &server.url("/model.gguf")).unwrap()[0].1 == bytes);
}

#[test]
fn what_is_not_there_and_what_is_not_allowed_is_said_at_once() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    let error = |path: &str| download(dir.path(), options(), &server.url(path)).unwrap_err().to_string();
    assert!(error("/model.gguf").contains("no such object"));
    assert!(error("/org").contains("neither model.safetensors nor model.safetensors.index.json"));
    server.put("/org/model.safetensors", b"x");
    assert!(error("/org").contains("config.json: there is no such object"));
    *server.state.protected.lock().unwrap() = Some(("/".into(), "Basic YW5uOmh1bnRlcjI=".into()));
    assert!(error("/org").contains("401"));
    assert!(server.state.requests.lock().unwrap().len() < 40, "what will not go away is not tried again");
    server.put("/org/config.json", b"{}");
    let with_password = server.url("/org").replace("http://", "http://ann:hunter2@");
    download(dir.path(), options(), &with_password).unwrap();
}

#[test]
fn two_that_want_the_same_share_one_download() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    let bytes = random_bytes(1, 2_000_000);
    server.put("/model.gguf", &bytes);
    *server.state.pace.lock().unwrap() = Duration::from_millis(2);
    let remote = Remote::new(dir.path().to_path_buf(), options()).unwrap();
    let url = source(&server.url("/model.gguf"));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let fetch = remote.download(&url, &mut |_| ControlFlow::Continue(())).unwrap();
                assert!(std::fs::read(fetch.path()).unwrap() == bytes);
            });
        }
    });
    let sent = server.state.sent.load(Ordering::Relaxed);
    assert!(sent < 2_100_000, "{sent} bytes for four");
}

#[test]
fn bytes_that_somebody_waits_for_come_first() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    let bytes = random_bytes(1, 4 << 20);
    server.put("/model.gguf", &bytes);
    // Nothing but the beginning and the end comes before it is allowed to.
    let open = Arc::new(AtomicUsize::new(0));
    let gate = open.clone();
    server.faults(move |_, range| match range {
        Some((first, _)) if gate.load(Ordering::Relaxed) == 0 && (1 << 20..3 << 20).contains(&first) => {
            Fault::Unavailable
        }
        _ => Fault::None,
    });
    let mut options = options();
    options.backoff.attempts = 100_000;
    let remote = Remote::new(dir.path().to_path_buf(), options).unwrap();
    let fetch = remote.fetch(&source(&server.url("/model.gguf")), &|| false).unwrap();
    let path = fetch.path().to_path_buf();
    let (first, last) = (0..100, (4 << 20) - 10..4 << 20);
    fetch.ensure(&path, &first, &mut |_| ControlFlow::Continue(())).unwrap();
    fetch.arrange([(path.as_path(), last.clone())].into_iter());
    open.store(1, Ordering::Relaxed);
    fetch.ensure(&path, &last, &mut |_| ControlFlow::Continue(())).unwrap();
    let file = std::fs::read(&path).unwrap();
    assert!(file[..100] == bytes[..100] && file[(4 << 20) - 10..] == bytes[(4 << 20) - 10..]);
    fetch.wait(&mut |_| ControlFlow::Continue(())).unwrap();
    assert!(std::fs::read(&path).unwrap() == bytes);
    fetch.discard();
    drop(fetch);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "a finished download is removed");
}

/// The part of the next test that is killed: downloads what its arguments say.
#[test]
fn child() {
    let Ok(url) = std::env::var("TANGRAM_REMOTE_TEST_URL") else { return };
    let dir = std::env::var("TANGRAM_REMOTE_TEST_DIR").unwrap();
    download(dir.as_ref(), options(), &url).unwrap();
}

#[test]
fn a_killed_download_goes_on_where_it_was() {
    let (server, dir) = (Server::start(), tempfile::tempdir().unwrap());
    let size = 8 << 20;
    let bytes = random_bytes(1, size);
    server.put_with("/model.gguf", &bytes, &[("x-linked-etag", &sha256(&bytes))]);
    *server.state.pace.lock().unwrap() = Duration::from_millis(1);
    for quarter in 1..4 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child"])
            .env("TANGRAM_REMOTE_TEST_URL", server.url("/model.gguf"))
            .env("TANGRAM_REMOTE_TEST_DIR", dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        while server.state.sent.load(Ordering::Relaxed) < (quarter * size / 4) as u64 {
            assert!(child.try_wait().unwrap().is_none(), "it must not end before it is killed");
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    *server.state.pace.lock().unwrap() = Duration::ZERO;
    assert!(download(dir.path(), options(), &server.url("/model.gguf")).unwrap()[0].1 == bytes);
    // At each kill what the journal did not know yet is lost: some chunks, and what was under way.
    let sent = server.state.sent.load(Ordering::Relaxed) as usize;
    assert!(sent < size + 3 * (2 << 20), "{sent} bytes were sent for {size}");
}
