//! The real server killed before each single system call by which a deployment or a removal changes the disk, and the
//! same with a disk that is full from that call on. Every restart must find the old state or the new one, whole.
//!
//! The calls are counted by strace, which attaches to the running server; without it, or where it may not attach, the
//! tests say so and skip (`crash.rs` kills at random moments everywhere). By default some of the points are tried;
//! `TANGRAM_CRASH_POINTS=all` tries every one.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Server, entries, write_tiny};
use serde_json::json;
use tangram_testkit::{
    Family, GgufOptions, RandomAdapter, RandomModel, mutate_layer, write_adapter, write_gguf,
};
use tempfile::tempdir;

/// Calls that change a file or a directory.
const CHANGES: [&str; 12] = [
    "openat",
    "pwrite64",
    "ftruncate",
    "fallocate",
    "fsync",
    "fdatasync",
    "?mkdir,mkdirat",
    "?rename,?renameat,renameat2",
    "?link,linkat",
    "?unlink",
    "unlinkat",
    "?rmdir",
];

/// What is done to a server when a fault strikes.
#[derive(Clone, Copy, Debug)]
enum Operation {
    /// A model is replaced by one that shares most tensors with another.
    Replace,
    /// A model is replaced by one in place, some of whose tensors are stored converted.
    ReplaceInPlace,
    /// An adapter comes.
    Adapt,
    /// A model goes.
    Remove,
}

impl Operation {
    const ALL: [Operation; 4] =
        [Operation::Replace, Operation::ReplaceInPlace, Operation::Adapt, Operation::Remove];

    /// How many checkpoints there are when all is done.
    fn checkpoints(self) -> usize {
        match self {
            Operation::Remove => 1,
            Operation::Replace | Operation::ReplaceInPlace => 2,
            Operation::Adapt => 3,
        }
    }

    async fn run(self, server: &Server, world: &World) -> Result<(), String> {
        let source = |name: &str| world.files.join(name);
        match self {
            Operation::Replace => server.deploy("changing", &source("tuned")).await.map(drop),
            Operation::ReplaceInPlace => {
                let body = json!({ "name": "changing", "source": source("placed.gguf"), "in_place": true });
                server.deploy_with(&body).await.map(drop)
            }
            Operation::Adapt => {
                let body = json!({ "name": "added", "adapter": source("adapter"), "base": "kept" });
                server.deploy_with(&body).await.map(drop)
            }
            Operation::Remove => match server.remove("changing").await {
                Ok(200) => Ok(()),
                Ok(status) => Err(format!("status {status}")),
                Err(error) => Err(error.to_string()),
            },
        }
    }
}

/// What each name may answer; `None` for a name that is not deployed.
type State = BTreeMap<&'static str, Option<Vec<u32>>>;

struct World {
    files: PathBuf,
    /// A data directory with `kept` and `changing` deployed.
    template: PathBuf,
    before: State,
}

async fn state(server: &Server) -> State {
    let names = server.names().await;
    let mut state = State::new();
    for name in ["added", "changing", "kept"] {
        let answer = match names.iter().any(|found| found == name) {
            true => Some(server.complete(name, &[5, 17, 3, 40, 8], 12).await.tokens()),
            false => None,
        };
        state.insert(name, answer);
    }
    state
}

impl World {
    async fn new(files: &Path) -> World {
        let kept = write_tiny(files, "kept", Family::Llama, 1);
        let other = write_tiny(files, "other", Family::Llama, 2);
        mutate_layer(&kept, &files.join("tuned"), 1);
        write_adapter(&kept, &files.join("adapter"), &RandomAdapter::new(5));
        let model = RandomModel { seed: 6, ..RandomModel::tiny(Family::Llama) };
        write_gguf(&files.join("placed.gguf"), &model, GgufOptions::default());
        let template = files.join("template");
        let server = Server::start(&template, &[]);
        server.deploy("kept", &kept).await.unwrap();
        server.deploy("changing", &other).await.unwrap();
        let before = state(&server).await;
        World { files: files.to_path_buf(), template, before }
    }

    /// A fresh data directory in the state before.
    fn copy(&self, to: &Path) {
        let _ = fs::remove_dir_all(to);
        copy(&self.template, to);
    }

    /// The state after `operation`.
    async fn after(&self, operation: Operation, data: &Path) -> State {
        self.copy(data);
        let server = Server::start(data, &[]);
        operation.run(&server, self).await.unwrap();
        state(&server).await
    }

    /// What a start after a fault finds must be whole, and nothing else may be there. Gives whether it is the new state.
    async fn check(&self, data: &Path, after: &State, what: &str) -> bool {
        let server = Server::start(data, &[]);
        let found = state(&server).await;
        assert!(found == self.before || found == *after, "{what}: found {found:?}");
        assert_eq!(entries(data, "staging"), Vec::<String>::new(), "{what}");
        let deployed = found.values().flatten().count();
        let checkpoints = entries(data, "checkpoints").len();
        assert!(
            (deployed..=deployed + 1).contains(&checkpoints),
            "{what}: {checkpoints} for {deployed} models"
        );
        let source = self.files.join("tuned");
        server.deploy("next", &source).await.unwrap_or_else(|error| panic!("{what}: then {error}"));
        found == *after
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Lets strace bring about `fault` in the server, and log its calls; `None` where that is not possible.
fn inject(server: &Server, fault: &str, log: &Path) -> Option<Child> {
    let calls = fault.split(':').next().unwrap();
    let mut command = Command::new("strace");
    command.args(["-f", "-q", "-o"]).arg(log).args(["-e", &format!("trace={calls}"), "-e"]);
    command.arg(format!("inject={fault}")).args(["-p", &server.pid().as_raw_nonzero().to_string()]);
    // Without -q it would say that it has attached; the status of the process says so too.
    let mut strace = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().ok()?;
    let threads = format!("/proc/{}/task", server.pid().as_raw_nonzero());
    let traced = |task: fs::DirEntry| {
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
    };
    loop {
        if strace.try_wait().unwrap().is_some() {
            let said = BufReader::new(strace.stderr.take().unwrap()).lines().map_while(Result::ok);
            println!("SKIPPED: strace cannot attach: {}", said.collect::<Vec<_>>().join("; "));
            return None;
        }
        if fs::read_dir(&threads).unwrap().all(|task| traced(task.unwrap())) {
            return Some(strace);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The points that are tried: all, or fewer and fewer.
fn points() -> impl Iterator<Item = usize> {
    let all = std::env::var("TANGRAM_CRASH_POINTS").is_ok_and(|points| points == "all");
    std::iter::successors(Some(1), move |&point| Some(if all || point < 2 { point + 1 } else { point * 2 }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_before_each_change_of_the_disk() {
    let (files, data) = (tempdir().unwrap(), tempdir().unwrap());
    let world = World::new(files.path()).await;
    let (data, log) = (data.path().join("data"), data.path().join("strace"));
    for operation in Operation::ALL {
        let after = world.after(operation, &data).await;
        let (mut kills, mut new) = (0, 0);
        for call in CHANGES {
            for point in points() {
                let what = format!("{operation:?} killed before {call} number {point}");
                world.copy(&data);
                let server = Server::start(&data, &[]);
                let fault = format!("{call}:signal=KILL:when={point}");
                let Some(mut strace) = inject(&server, &fault, &log) else { return };
                let done = operation.run(&server, &world).await;
                // What a removal leaves to do goes on behind the answer.
                let settled = done.is_ok() && settles(&server, &data, operation.checkpoints()).await;
                drop(server);
                strace.wait().unwrap();
                if settled {
                    break;
                }
                kills += 1;
                let is_new = world.check(&data, &after, &what).await;
                assert!(is_new || done.is_err(), "{what}: what was confirmed is lost");
                new += usize::from(is_new);
            }
        }
        println!("{operation:?}: {kills} kills, after {new} of them it was done");
        assert!(kills > new && new > 0, "both sides of the commit are tried");
    }
}

/// Waits until an operation that was confirmed has removed the files that it makes useless; `false` if the server dies.
async fn settles(server: &Server, data: &Path, checkpoints: usize) -> bool {
    loop {
        if server.http.get(format!("{}/health", server.url)).send().await.is_err() {
            return false;
        }
        if entries(data, "checkpoints").len() == checkpoints {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Errors of a disk that is full, or broken, from some call on (`+`) or once.
const ERRORS: [(&str, &str); 8] = [
    ("pwrite64:error=ENOSPC", "+"),
    ("pwrite64:error=EIO", ""),
    ("ftruncate:error=ENOSPC", "+"),
    ("fsync:error=EIO", "+"),
    ("fdatasync:error=EIO", "+"),
    ("?mkdir,mkdirat:error=ENOSPC", "+"),
    ("?rename,?renameat,renameat2:error=ENOSPC", "+"),
    ("openat:error=ENOSPC", ""),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_fails_at_any_change_leaves_the_server_whole() {
    let (files, data) = (tempdir().unwrap(), tempdir().unwrap());
    let world = World::new(files.path()).await;
    let (data, log) = (data.path().join("data"), data.path().join("strace"));
    for operation in Operation::ALL {
        let after = world.after(operation, &data).await;
        let mut failures = 0;
        for (error, from) in ERRORS {
            for point in points() {
                let what = format!("{operation:?} with {error} at call {point}{from}");
                world.copy(&data);
                let mut server = Server::start(&data, &[]);
                let Some(mut strace) = inject(&server, &format!("{error}:when={point}{from}"), &log) else {
                    return;
                };
                let done = operation.run(&server, &world).await;
                let pid = rustix::process::Pid::from_child(&strace);
                rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
                strace.wait().unwrap();
                if !fs::read_to_string(&log).unwrap().contains("INJECTED") {
                    assert!(done.is_ok(), "{what}: {done:?}");
                    break;
                }
                failures += 1;
                let now = state(&server).await;
                assert_eq!(
                    now,
                    if done.is_ok() { after.clone() } else { world.before.clone() },
                    "{what}: {done:?}"
                );
                // The disk has room again.
                let next = server.deploy("next", &world.files.join("tuned")).await;
                next.unwrap_or_else(|error| panic!("{what}: {done:?}, and then {error}"));
                assert_eq!(server.remove("next").await.unwrap(), 200, "{what}");
                assert_eq!(state(&server).await, now, "{what}");
                let said = server.stderr();
                assert!(!said.contains("panicked"), "{what}: {said}");
                drop(server);
                let is_new = world.check(&data, &after, &what).await;
                assert_eq!(is_new, done.is_ok(), "{what}: {done:?}");
            }
        }
        println!("{operation:?}: {failures} failures");
        assert!(failures > 0);
    }
}
