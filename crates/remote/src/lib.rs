//! Brings checkpoints from web servers, object stores and model hubs to this disk.
//!
//! Blocking outside, asynchronous inside: a [`Remote`] has a small runtime of its own, and whoever holds a [`Fetch`] may
//! wait for all of it or for the bytes that are needed next. Depends on no other part of Tangram.
//!
//! # What is promised
//! - **Never a wrong byte.** An answer counts only if it is of the version of the object that was found at the start
//!   (`If-Match` where the tag allows, compared in every answer), of exactly the range that was asked for, and as long as
//!   that range. A file whose source states a hash (the hub's SHA-256; S3's, Google's and Azure's checksums; the MD5 that
//!   S3 uses as a tag) counts only when all of it matches. Where a source states none, transport is trusted: a server that
//!   sends other bytes of the right length without TLS is not found out here.
//! - **Either it ends, or it says why.** What may go away by itself is tried again with backoff and full jitter
//!   ([`Backoff`]); a server that stops sending, or all but stops, is left after [`Options::stall`]; without any byte for
//!   [`Options::give_up`] everything ends with an error that says what happened last.
//! - **Nothing is fetched twice.** A journal beside each file (`journal.rs`) says which chunks are on the disk; the next
//!   attempt, after a crash too, fetches the others, if the object is still the same. Two that want the same source at
//!   the same time share one download.
//! - **No credential is shown.** Sources are shown without user, password and query; errors are made of our own words
//!   and a server's status; headers are marked so that no library logs them.
//!
//! # On disk
//! ```text
//! DIR/KEY/model/…          the files, at their full size from the beginning, holes where nothing has arrived
//! DIR/KEY/model/….journal  which chunks of a file are there, and of which version
//! ```
//! A download that nobody went on with for a week is removed when the next [`Remote`] is made.
//!
//! # Reading while it arrives
//! [`Fetch::ensure`] blocks until a range is there, and has it fetched before others; [`Fetch::arrange`] tells the order
//! in which ranges will be needed. That is all that reading headers first, importing while downloading, and serving while
//! downloading need of this crate. What is read so has not been compared with a hash of its whole file yet, so whoever
//! does it must take back what was made of it when [`Fetch::wait`] fails.

mod backoff;
mod cloud;
mod error;
mod fetch;
mod grid;
mod http;
mod hub;
mod journal;
mod listing;
mod object;
mod open;
mod plan;
mod source;
mod web;

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use tokio::runtime::Runtime;

pub use backoff::Backoff;
pub use error::RemoteError;
pub use fetch::{Fetch, FetchProgress};
pub use source::RemoteSource;

/// After this time without progress a download is removed.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// How downloads behave. The defaults suit all but tests.
#[derive(Clone)]
pub struct Options {
    /// Requests under way at once, per download.
    pub connections: usize,
    /// Bytes that a request asks for: so many that its round trip does not count, so few that connections share a file.
    pub chunk_bytes: u64,
    /// When to try again, and how often without progress.
    pub backoff: Backoff,
    /// Longest wait for the next piece of an answer.
    pub stall: Duration,
    /// Longest time without a single byte before a download is given up.
    pub give_up: Duration,
    /// Longest pause before the first request, drawn at random, so that a cluster that starts at once does not ask at
    /// once.
    pub start_jitter: Duration,
    /// Settings of sources, by the names that their own tools use in the environment.
    pub environment: Vec<(String, String)>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            connections: 8,
            chunk_bytes: 8 << 20,
            backoff: Backoff::default(),
            stall: Duration::from_secs(20),
            give_up: Duration::from_secs(300),
            start_jitter: Duration::from_millis(100),
            environment: Vec::new(),
        }
    }
}

impl Options {
    /// The defaults with the settings of this process's environment that concern sources.
    pub fn from_environment() -> Options {
        let ours =
            |name: &str| ["AWS_", "GOOGLE_", "AZURE_", "HF_"].iter().any(|prefix| name.starts_with(prefix));
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .filter(|(name, _)| ours(name))
            .collect();
        Options { environment, ..Options::default() }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.environment.iter().map(|(name, _)| name.as_str()).collect();
        f.debug_struct("Options")
            .field("connections", &self.connections)
            .field("chunk_bytes", &self.chunk_bytes)
            .field("backoff", &self.backoff)
            .field("stall", &self.stall)
            .field("give_up", &self.give_up)
            .field("start_jitter", &self.start_jitter)
            .field("environment", &names)
            .finish()
    }
}

/// One download at a time of each source: whoever comes second joins.
type Flight = Arc<tokio::sync::Mutex<Weak<Fetch>>>;

/// Downloads into one directory.
pub struct Remote {
    runtime: Option<Runtime>,
    directory: PathBuf,
    options: Options,
    http: Mutex<Option<http::Http>>,
    flights: Mutex<HashMap<String, Flight>>,
}

impl Remote {
    /// Downloads into `directory`, which nobody else may use; it is made when it is needed. Removes downloads that were
    /// forgotten there.
    ///
    /// # Errors
    /// When no threads can be started.
    pub fn new(directory: PathBuf, options: Options) -> Result<Remote, RemoteError> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(2).thread_name("remote").enable_all().build();
        let runtime = runtime.map_err(|error| RemoteError::io(&directory, error))?;
        remove_forgotten(&directory);
        let (http, flights) = (Mutex::default(), Mutex::default());
        Ok(Remote { runtime: Some(runtime), directory, options, http, flights })
    }

    /// Starts bringing a checkpoint here, or joins or goes on with what was started before. Returns when it is known
    /// what there is to fetch. Blocks; not for use inside an async runtime. `cancelled` is asked every tenth of a second.
    ///
    /// # Errors
    /// When the source cannot be reached or has no checkpoint.
    pub fn fetch(
        &self,
        source: &RemoteSource,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Arc<Fetch>, RemoteError> {
        let Some(runtime) = &self.runtime else { return Err(RemoteError::Cancelled) };
        let http = {
            let mut http = self.http.lock().unwrap_or_else(PoisonError::into_inner);
            match &*http {
                Some(http) => http.clone(),
                None => http.insert(http::Http::new(self.options.stall)?).clone(),
            }
        };
        let flight: Flight = {
            let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
            flights.retain(|_, flight| {
                Arc::strong_count(flight) > 1 || flight.try_lock().is_ok_and(|f| f.strong_count() > 0)
            });
            flights.entry(source.key()).or_default().clone()
        };
        let start = async {
            let mut flight = flight.lock().await;
            if let Some(running) = flight.upgrade().filter(|running| !running.has_failed()) {
                return Ok(running);
            }
            tokio::time::sleep(self.options.start_jitter.mul_f64(rand::random())).await;
            let directory = self.directory.join(source.key());
            let fetch = Arc::new(open::open(source, &http, directory, &self.options).await?);
            *flight = Arc::downgrade(&fetch);
            Ok(fetch)
        };
        let gone = async {
            while !cancelled() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        runtime.block_on(async {
            tokio::select! {
                fetch = start => fetch,
                () = gone => Err(RemoteError::Cancelled),
            }
        })
    }

    /// Brings a checkpoint here, all of it. One that changes meanwhile is begun anew once.
    ///
    /// # Errors
    /// When it cannot be brought here, or `progress` breaks; what has arrived is kept for the next attempt.
    pub fn download(
        &self,
        source: &RemoteSource,
        progress: &mut dyn FnMut(FetchProgress) -> ControlFlow<()>,
    ) -> Result<Arc<Fetch>, RemoteError> {
        let mut anew = true;
        loop {
            let stopped = std::cell::RefCell::new(&mut *progress);
            let fetch =
                self.fetch(source, &|| (stopped.borrow_mut())(FetchProgress::default()).is_break())?;
            match fetch.wait(progress) {
                Ok(()) => return Ok(fetch),
                Err(RemoteError::Changed { object }) if std::mem::take(&mut anew) => {
                    tracing::warn!(object, "it was changed at its source; the download begins anew");
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // A runtime must not be waited for where another one may be running.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Removes downloads without progress for [`KEPT`]. What cannot be removed is left for the next start.
fn remove_forgotten(directory: &Path) {
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let files = std::fs::read_dir(entry.path().join(open::MODEL)).into_iter().flatten().flatten();
        let times = files
            .chain(std::iter::once(entry))
            .filter_map(|entry| Some((entry.path(), entry.metadata().ok()?.modified().ok()?)));
        let times: Vec<(PathBuf, SystemTime)> = times.collect();
        let latest = times.iter().map(|(_, time)| *time).max();
        let old = latest.is_some_and(|time| time.elapsed().is_ok_and(|age| age > KEPT));
        if let Some((path, _)) = times.last().filter(|_| old) {
            let _ = std::fs::remove_dir_all(path);
        }
    }
}
