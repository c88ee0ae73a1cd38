//! `kill -9` at random moments while requests and deployments run; every restart must find exactly what was promised.
//!
//! Runs for some seconds; `TANGRAM_CRASH_SECONDS=120` makes it the two-minute trial. `TANGRAM_CRASH_SEED` repeats one.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::{Server, entries, eventually, token_request, write_slow, write_tiny};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use tangram_testkit::{Family, GgufOptions, RandomModel, mutate_layer, write_gguf};
use tempfile::tempdir;

const DEFAULT_SECONDS: u64 = 8;
/// A pool that holds the large model and little else, so that weights keep moving.
const POOL: &str = "22MiB";
/// Bound on a restart that holds on a busy machine too; the trial prints what it really was.
const SLOWEST_RESTART: Duration = Duration::from_secs(10);

/// What is known of a deployed name that clients keep changing: the sources that it may be deployed from, `None` for
/// "not deployed".
type Possible = Vec<Option<usize>>;

/// A model directory or file with what it answers.
struct Source {
    path: PathBuf,
    answers: Vec<Vec<u32>>,
}

fn prompts() -> Vec<Vec<u32>> {
    vec![vec![7], (20..60).collect(), vec![5, 4, 200, 3, 90, 91, 92]]
}

async fn answers(server: &Server, model: &str) -> Vec<Vec<u32>> {
    let mut answers = Vec::new();
    for prompt in prompts() {
        answers.push(server.complete(model, &prompt, 10).await.tokens());
    }
    answers
}

fn number(variable: &str, default: impl FnOnce() -> u64) -> u64 {
    std::env::var(variable).ok().map_or_else(default, |text| text.parse().unwrap())
}

/// Sends requests until the server dies; whatever is answered must be right. Returns how many answers there were.
async fn ask(server: Arc<Server>, models: Vec<(String, Arc<Source>)>, seed: u64) -> u64 {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut answered = 0;
    loop {
        let (name, source) = &models[random.random_range(0..models.len())];
        let which = random.random_range(0..source.answers.len());
        let body = token_request(name, &prompts()[which], 10);
        let Ok(reply) = server.try_post("/v1/completions", &body).await else {
            server.assert_gone().await;
            return answered;
        };
        assert_eq!(reply.tokens(), source.answers[which], "{name}, prompt {which}");
        answered += 1;
    }
}

/// Deploys and removes `name` until the server dies. Returns what may be deployed under it then.
async fn redeploy(
    server: Arc<Server>,
    name: String,
    sources: Vec<Arc<Source>>,
    now: Possible,
    seed: u64,
) -> Possible {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut possible = now;
    loop {
        let next = random.random_range(0..=sources.len()).checked_sub(1);
        let before = possible.clone();
        possible.push(next);
        let done = match next {
            Some(source) => server.deploy(&name, &sources[source].path).await.is_ok(),
            None => match server.remove(&name).await {
                Ok(status) => {
                    let expected = if status == 404 {
                        before.contains(&None)
                    } else {
                        before.iter().any(Option::is_some)
                    };
                    assert!(expected && [200, 404].contains(&status), "{name}: {status} but {before:?}");
                    true
                }
                Err(_) => false,
            },
        };
        if !done {
            server.assert_gone().await;
            return possible;
        }
        possible = vec![next];
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_at_any_moment_nothing_is_lost_and_nothing_is_left() {
    let seconds = number("TANGRAM_CRASH_SECONDS", || DEFAULT_SECONDS);
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    let seed = number("TANGRAM_CRASH_SEED", clock);
    println!("TANGRAM_CRASH_SECONDS={seconds} TANGRAM_CRASH_SEED={seed}");
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);

    let (files, data) = (tempdir().unwrap(), tempdir().unwrap());
    let (files, data) = (files.path(), data.path());
    let large = write_slow(files, "large");
    let tuned = files.join("tuned");
    mutate_layer(&large, &tuned, 3);
    let gguf = files.join("qwen3.gguf");
    write_gguf(&gguf, &RandomModel { seed: 9, ..RandomModel::tiny(Family::Qwen3) }, GgufOptions::default());
    let paths = [large, tuned, gguf, write_tiny(files, "tiny", Family::Qwen2, 4)];

    let mut server = Server::with_pool(data, POOL, &[]);
    let mut sources = Vec::new();
    let mut kept = Vec::new();
    for (index, path) in paths.into_iter().enumerate() {
        let name = format!("kept-{index}");
        server.deploy(&name, &path).await.unwrap();
        let source = Arc::new(Source { path, answers: answers(&server, &name).await });
        kept.push((name, source.clone()));
        sources.push(source);
    }
    assert!(sources.windows(2).all(|pair| pair[0].answers != pair[1].answers));
    let mut changing: BTreeMap<String, Possible> =
        ["changing-a", "changing-b"].map(|name| (name.to_owned(), vec![None])).into_iter().collect();

    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut kills, mut imports, mut answered, mut slowest) = (0, 0, 0, Duration::ZERO);
    while Instant::now() < end {
        let running = Arc::new(server);
        let askers: Vec<_> = (0..2)
            .map(|_| tokio::spawn(ask(running.clone(), kept.clone(), random.random_range(0..=u64::MAX))))
            .collect();
        let mut changers = Vec::new();
        for (name, possible) in std::mem::take(&mut changing) {
            let seed = random.random_range(0..=u64::MAX);
            let task = redeploy(running.clone(), name.clone(), sources.clone(), possible, seed);
            changers.push((name, tokio::spawn(task)));
        }
        tokio::time::sleep(Duration::from_micros(random.random_range(0..600_000))).await;
        rustix::process::kill_process(running.pid(), rustix::process::Signal::KILL).unwrap();
        kills += 1;
        for asker in askers {
            answered += asker.await.unwrap();
        }
        for (name, changer) in changers {
            changing.insert(name, changer.await.unwrap());
        }
        drop(running);
        imports += usize::from(!entries(data, "staging").is_empty());

        let restart = Instant::now();
        server = Server::with_pool(data, POOL, &[]);
        let (name, source) = &kept[random.random_range(0..kept.len())];
        let first = server.complete(name, &prompts()[0], 1).await;
        let elapsed = restart.elapsed();
        assert_eq!(first.tokens()[..], source.answers[0][..1], "{name} after a restart");
        assert!(elapsed < SLOWEST_RESTART, "restart to first token took {elapsed:?}");
        slowest = slowest.max(elapsed);
        assert_eq!(entries(data, "staging"), Vec::<String>::new(), "the start removes what an import left");
        let names = server.names().await;
        for (name, source) in &kept {
            assert!(names.contains(name), "{name} is lost: {names:?}");
            assert_eq!(answers(&server, name).await, source.answers, "{name}");
        }
        for (name, possible) in &mut changing {
            let found = match names.contains(name) {
                false => None,
                true => {
                    let answers = answers(&server, name).await;
                    let source = sources.iter().position(|source| source.answers == answers);
                    Some(source.unwrap_or_else(|| panic!("{name} answers like none of its sources")))
                }
            };
            assert!(possible.contains(&found), "{name}: found {found:?}, possible were {possible:?}");
            *possible = vec![found];
        }
        let known = |name: &String| changing.contains_key(name) || kept.iter().any(|(kept, _)| kept == name);
        assert!(names.iter().all(known), "{names:?}");
    }
    println!(
        "{kills} kills and restarts, {imports} of them within an import, {answered} answers before a kill; \
         slowest restart to first token {slowest:?}"
    );
    assert!(kills > 0 && answered > 0);

    for name in server.names().await {
        assert_eq!(server.remove(&name).await.unwrap(), 200);
    }
    eventually("the checkpoints of removed models go", async || entries(data, "checkpoints").is_empty())
        .await;
    assert_eq!(entries(data, "staging"), Vec::<String>::new());
}

/// A deployment that is killed with half of its file written: the next start shows no model and keeps no bytes.
#[tokio::test]
async fn killed_in_the_middle_of_an_import() {
    let (files, data) = (tempdir().unwrap(), tempdir().unwrap());
    let large = write_slow(files.path(), "large");
    let server = Server::start(data.path(), &[]);
    // The system kills a process that writes beyond this size with SIGXFSZ: deterministic, and as final as SIGKILL.
    limit_file_size(&server, 6 << 20);
    server.deploy("large", &large).await.unwrap_err();
    assert_eq!(entries(data.path(), "staging").len(), 1, "it was killed while it wrote");
    drop(server);
    let server = Server::start(data.path(), &[]);
    assert_eq!(server.names().await, Vec::<String>::new());
    assert_eq!((entries(data.path(), "staging"), entries(data.path(), "checkpoints")), (vec![], vec![]));
    server.deploy("large", &large).await.unwrap();
    assert_eq!(server.complete("large", &[1, 2, 3], 5).await.tokens().len(), 5);
}

/// Files that this process writes from now on may not grow beyond `bytes`.
fn limit_file_size(server: &Server, bytes: u64) {
    use rustix::process::{Resource, Rlimit, prlimit};
    let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
    prlimit(Some(server.pid()), Resource::Fsize, limit).unwrap();
}

/// As when the disk is full: writing fails, the server says so, keeps nothing and goes on.
#[tokio::test]
async fn an_import_that_cannot_be_written() {
    let (files, data) = (tempdir().unwrap(), tempdir().unwrap());
    let (large, tiny) =
        (write_slow(files.path(), "large"), write_tiny(files.path(), "tiny", Family::Llama, 1));
    let mut command = common::clean("sh");
    let script = "trap '' XFSZ; exec \"$0\" serve \"$@\"";
    command.args(["-c", script, env!("CARGO_BIN_EXE_tangram")]).args(Server::args(data.path(), "64MiB"));
    let server = Server::spawn(&mut command);
    server.deploy("before", &tiny).await.unwrap();
    limit_file_size(&server, 6 << 20);
    let said = server.deploy("large", &large).await.unwrap_err();
    assert!(
        said.starts_with("writing ")
            && said.contains("data.bin")
            && said.to_lowercase().contains("file too large"),
        "{said}"
    );
    assert_eq!(entries(data.path(), "staging"), Vec::<String>::new());
    assert_eq!(entries(data.path(), "checkpoints").len(), 1);
    assert_eq!(server.names().await, ["before"]);
    assert_eq!(server.complete("before", &[1, 2, 3], 5).await.tokens().len(), 5);
    server.deploy("after", &tiny).await.unwrap();
}

/// A disk that really is full, where a small file system can be mounted without being anybody special.
#[tokio::test]
async fn a_full_disk() {
    let files = tempdir().unwrap();
    let (large, data) = (write_slow(files.path(), "large"), files.path().join("data"));
    std::fs::create_dir(&data).unwrap();
    let script = "mount -t tmpfs -o size=8m tmpfs \"$1\" || exit 99
        \"$0\" deploy large \"$2\" --data \"$1\" --device-memory 64MiB
        echo \"exit $?\"; ls \"$1/staging\" \"$1/checkpoints\"";
    let mut command = common::clean("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script, env!("CARGO_BIN_EXE_tangram")]);
    let Ok(output) = command.arg(&data).arg(&large).output() else {
        println!("SKIPPED: there is no unshare");
        return;
    };
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !stdout.contains("exit ") {
        println!("SKIPPED: no file system can be mounted here: {stderr}");
        return;
    }
    assert!(stdout.contains("exit 1"), "{stdout}{stderr}");
    assert!(stderr.contains("No space left on device"), "{stderr}");
    assert!(stderr.contains("writing ") && stderr.contains("data.bin"), "{stderr}");
    let listed =
        stdout.lines().filter(|line| !line.is_empty() && !line.ends_with(':') && !line.starts_with("exit"));
    assert_eq!(listed.collect::<Vec<_>>(), Vec::<&str>::new(), "nothing is left");
}
