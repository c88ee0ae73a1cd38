//! A checkpoint on its way to this disk: several connections fetch chunks of its files, a thread compares what came with
//! the hashes that the source states, and readers wait for the bytes that they need.
//!
//! The files lie in their place at their full size from the beginning, with holes where nothing has arrived. Nobody may
//! read a byte of them without [`Fetch::ensure`] or [`Fetch::wait`] having said that it is there.

use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::backoff::Backoff;
use crate::grid::Grid;
use crate::object::{Failure, Object, Stat};
use crate::open::is_weights;
use crate::plan::{Piece, Plan};
use crate::{Options, RemoteError, journal};

/// An attempt that brings fewer bytes than this was for nothing, and so is a stall's time with fewer.
const LEAST_PROGRESS: u64 = 64 << 10;
/// Chunks after which a file's journal is written: about so many are fetched again after a crash.
const JOURNAL_INTERVAL: u64 = 4;
/// How often a waiting caller is asked whether it still waits.
const TICK: Duration = Duration::from_millis(100);

/// How far a download is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FetchProgress {
    /// Here, from this or an earlier attempt.
    pub bytes_done: u64,
    /// Of all files.
    pub bytes_total: u64,
}

/// One file of a checkpoint.
pub(crate) struct RemoteFile {
    pub(crate) object: Arc<dyn Object>,
    pub(crate) stat: Stat,
    /// Where it goes.
    pub(crate) path: PathBuf,
}

struct LocalFile {
    object: Arc<dyn Object>,
    stat: Stat,
    path: PathBuf,
    file: File,
    /// Bytes that arrived since the journal was written.
    unwritten: AtomicU64,
    /// Held while the journal is written. Whether there is to be none: what is here is of no use.
    spoiled: Mutex<bool>,
}

impl LocalFile {
    /// What is here is of no use to anybody.
    fn spoil(&self) -> Result<(), RemoteError> {
        let mut spoiled = self.spoiled.lock().unwrap_or_else(PoisonError::into_inner);
        *spoiled = true;
        journal::forget(&self.path)
    }
}

struct State {
    plan: Plan,
    /// Files whose hash was compared, or that have none.
    checked: Vec<bool>,
    error: Option<RemoteError>,
}

struct Shared {
    files: Vec<LocalFile>,
    state: Mutex<State>,
    /// Something arrived, was checked, or failed.
    changed: Condvar,
    /// There may be more to do for the connections.
    work: Notify,
    stopped: AtomicBool,
    chunk_bytes: u64,
    backoff: Backoff,
    stall: Duration,
    give_up: Duration,
    bytes_done: AtomicU64,
    bytes_total: u64,
    epoch: Instant,
    /// Milliseconds after `epoch` at which the last byte came.
    last_progress: AtomicU64,
}

/// A checkpoint on its way. Dropping it stops the download; what has arrived is kept for the next attempt.
pub struct Fetch {
    shared: Arc<Shared>,
    tasks: Vec<AbortHandle>,
    /// The directory of the download.
    directory: PathBuf,
    path: PathBuf,
    discard: AtomicBool,
}

impl std::fmt::Debug for Fetch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fetch").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Fetch {
    /// Starts, or goes on with, fetching `files` below `directory`. `path` is what a reader of checkpoints opens. Must
    /// be called inside the runtime that is to do it.
    pub(crate) fn start(
        files: Vec<RemoteFile>,
        directory: PathBuf,
        path: PathBuf,
        options: &Options,
    ) -> Result<Fetch, RemoteError> {
        let (mut local, mut grids, mut checked) = (Vec::new(), Vec::new(), Vec::new());
        for RemoteFile { object, stat, path } in files {
            let (file, grid, was_checked) = journal::open(&path, &stat, options.chunk_bytes)?;
            checked.push(was_checked || stat.digest.is_none());
            grids.push(grid);
            let (unwritten, spoiled) = (AtomicU64::new(0), Mutex::new(false));
            local.push(LocalFile { object, stat, path, file, unwritten, spoiled });
        }
        let bytes_done = grids.iter().map(Grid::bytes_here).sum();
        let bytes_total = local.iter().map(|file| file.stat.size).sum();
        let mut plan = Plan::new(grids);
        // Readers begin with all headers.
        plan.arrange(local.iter().enumerate().map(|(index, _)| (index, 0..1)));
        let shared = Arc::new(Shared {
            files: local,
            state: Mutex::new(State { plan, checked, error: None }),
            changed: Condvar::new(),
            work: Notify::new(),
            stopped: AtomicBool::new(false),
            chunk_bytes: options.chunk_bytes,
            backoff: options.backoff,
            stall: options.stall,
            give_up: options.give_up,
            bytes_done: AtomicU64::new(bytes_done),
            bytes_total,
            epoch: Instant::now(),
            last_progress: AtomicU64::new(0),
        });
        let mut tasks: Vec<AbortHandle> = (0..options.connections.max(1))
            .map(|_| tokio::spawn(work(shared.clone())).abort_handle())
            .collect();
        let checker = shared.clone();
        tasks.push(tokio::task::spawn_blocking(move || checker.check_hashes()).abort_handle());
        Ok(Fetch { shared, tasks, directory, path, discard: AtomicBool::new(false) })
    }

    /// What a reader of checkpoints opens: a directory or a file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it has ended with an error, so that joining it is of no use.
    pub(crate) fn has_failed(&self) -> bool {
        self.shared.lock().error.is_some()
    }

    /// How far it is.
    pub fn progress(&self) -> FetchProgress {
        let bytes_done = self.shared.bytes_done.load(Ordering::Relaxed);
        FetchProgress { bytes_done, bytes_total: self.shared.bytes_total }
    }

    /// Waits until everything is here and was checked. `progress` is told every tenth of a second and may stop it.
    ///
    /// # Errors
    /// When the download failed for good, or was stopped.
    pub fn wait(
        &self,
        progress: &mut dyn FnMut(FetchProgress) -> ControlFlow<()>,
    ) -> Result<(), RemoteError> {
        let mut state = self.shared.lock();
        loop {
            if let Some(error) = &state.error {
                return Err(error.clone());
            }
            if state.plan.is_complete() && state.checked.iter().all(|&checked| checked) {
                return Ok(());
            }
            drop(state);
            if progress(self.progress()).is_break() {
                return Err(RemoteError::Cancelled);
            }
            state = self.shared.lock();
            let waited = self.shared.changed.wait_timeout(state, TICK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until these bytes of a file of the download are here, and has them fetched before others. Bytes of other
    /// files, and beyond a file's end, count as here. They come as the server sent them: hashes of whole files are
    /// known only at the end, so what was made of them is good only after [`Fetch::wait`]. `progress` is told every
    /// tenth of a second and may stop the waiting.
    ///
    /// # Errors
    /// When the download failed for good, or `progress` breaks.
    pub fn ensure(
        &self,
        path: &Path,
        bytes: &Range<u64>,
        progress: &mut dyn FnMut(FetchProgress) -> ControlFlow<()>,
    ) -> Result<(), RemoteError> {
        let Some(index) = self.shared.files.iter().position(|file| file.path == path) else { return Ok(()) };
        let mut state = self.shared.lock();
        let mut hurried = false;
        loop {
            if let Some(error) = &state.error {
                return Err(error.clone());
            }
            if state.plan.has_bytes(index, bytes) {
                return Ok(());
            }
            if !std::mem::replace(&mut hurried, true) {
                state.plan.hurry(index, bytes);
                self.shared.work.notify_waiters();
            }
            let (locked, waited) =
                self.shared.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner);
            state = locked;
            if waited.timed_out() {
                drop(state);
                if progress(self.progress()).is_break() {
                    return Err(RemoteError::Cancelled);
                }
                state = self.shared.lock();
            }
        }
    }

    /// Waits until everything but the weights is here, as [`Fetch::ensure`] does.
    ///
    /// # Errors
    /// As [`Fetch::ensure`].
    pub fn ensure_assets(
        &self,
        progress: &mut dyn FnMut(FetchProgress) -> ControlFlow<()>,
    ) -> Result<(), RemoteError> {
        let files = self.shared.files.iter();
        for file in files.filter(|file| !file.path.to_str().is_some_and(is_weights)) {
            self.ensure(&file.path, &(0..file.stat.size), progress)?;
        }
        Ok(())
    }

    /// Whether bytes cannot have been changed on their way here, so that they may be used before their files' hashes are
    /// compared: they come over TLS, or from this machine.
    pub fn is_guarded(&self) -> bool {
        self.shared.files.iter().all(|file| file.object.is_guarded())
    }

    /// Says in which order the bytes will be needed.
    pub fn arrange<'a>(&self, needed: impl Iterator<Item = (&'a Path, Range<u64>)>) {
        let index = |path: &Path| self.shared.files.iter().position(|file| file.path == path);
        let needed = needed.filter_map(|(path, bytes)| Some((index(path)?, bytes)));
        self.shared.lock().plan.arrange(needed);
        self.shared.work.notify_waiters();
    }

    /// What was fetched is not needed any more: it is removed when the last holder lets go.
    pub fn discard(&self) {
        self.discard.store(true, Ordering::Release);
    }
}

impl Drop for Fetch {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.tasks.iter().for_each(AbortHandle::abort);
        self.shared.changed.notify_all();
        if self.discard.load(Ordering::Acquire) {
            if let Err(error) = std::fs::remove_dir_all(&self.directory) {
                tracing::warn!(%error, "could not remove a finished download; it goes when it is old");
            }
            return;
        }
        for index in 0..self.shared.files.len() {
            if let Err(error) = self.shared.write_journal(index) {
                tracing::warn!(%error, "what was downloaded last will be downloaded again");
            }
        }
    }
}

/// One connection: fetches one chunk after the other.
async fn work(shared: Arc<Shared>) {
    loop {
        let more = shared.work.notified();
        tokio::pin!(more);
        more.as_mut().enable();
        let piece = {
            let mut state = shared.lock();
            if state.error.is_some() || state.plan.is_complete() {
                return;
            }
            state.plan.next()
        };
        let Some(piece) = piece else {
            more.await;
            continue;
        };
        match shared.bring(piece).await {
            Ok(()) => Shared::arrived(&shared, piece),
            Err(error) => return shared.fail(error),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, error: RemoteError) {
        self.lock().error.get_or_insert(error);
        self.changed.notify_all();
        self.work.notify_waiters();
    }

    fn arrived(shared: &Arc<Shared>, piece: Piece) {
        let bytes = {
            let mut state = shared.lock();
            state.plan.arrived(piece);
            state.plan.grids().get(piece.file).map(|grid| grid.range(piece.chunk))
        };
        shared.changed.notify_all();
        shared.work.notify_waiters();
        let (Some(file), Some(bytes)) = (shared.files.get(piece.file), bytes) else { return };
        let len = bytes.end - bytes.start;
        if file.unwritten.fetch_add(len, Ordering::AcqRel) + len >= JOURNAL_INTERVAL * shared.chunk_bytes {
            let shared = shared.clone();
            tokio::task::spawn_blocking(move || {
                if let Err(error) = shared.write_journal(piece.file) {
                    shared.fail(error);
                }
            });
        }
    }

    fn write_journal(&self, index: usize) -> Result<(), RemoteError> {
        let Some(file) = self.files.get(index) else { return Ok(()) };
        let spoiled = file.spoiled.lock().unwrap_or_else(PoisonError::into_inner);
        if *spoiled || file.unwritten.swap(0, Ordering::AcqRel) == 0 {
            return Ok(());
        }
        let (grid, checked) = {
            let state = self.lock();
            let checked = state.checked.get(index).copied().unwrap_or(false) && file.stat.digest.is_some();
            match state.plan.grids().get(index) {
                Some(grid) => (grid.clone(), checked),
                None => return Ok(()),
            }
        };
        journal::write(&file.path, &file.file, &file.stat, &grid, checked)
    }

    /// Fetches one chunk into its place, however often it has to be tried.
    async fn bring(&self, piece: Piece) -> Result<(), RemoteError> {
        let grid_range = self.lock().plan.grids().get(piece.file).map(|grid| grid.range(piece.chunk));
        let (Some(file), Some(range)) = (self.files.get(piece.file), grid_range) else { return Ok(()) };
        let name = || file.object.name().to_owned();
        let (mut at, mut failures) = (range.start, 0);
        loop {
            let before = at;
            let (problem, wish) = match self.attempt(file, &mut at, range.end).await {
                Ok(()) => return Ok(()),
                Err(Failure::Retry { problem, wish }) => (problem, wish),
                Err(Failure::NoRanges) => ("the server sends everything instead of a range".to_owned(), None),
                Err(Failure::Missing) => {
                    return Err(RemoteError::refused(file.object.name(), "it is not there any more"));
                }
                Err(Failure::Changed) => {
                    file.spoil()?;
                    return Err(RemoteError::Changed { object: name() });
                }
                Err(Failure::Fatal(error)) => return Err(error),
            };
            failures = if at - before >= LEAST_PROGRESS { 1 } else { failures + 1 };
            if !file.stat.ranges {
                // Nothing can be taken up in the middle.
                self.bytes_done.fetch_sub(at - range.start, Ordering::Relaxed);
                at = range.start;
            }
            let idle = self.epoch.elapsed().as_millis() as u64 - self.last_progress.load(Ordering::Relaxed);
            let wait = self.backoff.wait(failures, wish, rand::random());
            let Some(wait) = wait.filter(|_| u128::from(idle) < self.give_up.as_millis()) else {
                return Err(RemoteError::GaveUp { object: name(), problem, attempts: failures });
            };
            tracing::debug!(object = file.object.name(), problem, ?wait, "trying again");
            tokio::time::sleep(wait).await;
        }
    }

    /// One request for what is missing of a chunk. `at` moves with what has been written.
    async fn attempt(&self, file: &LocalFile, at: &mut u64, end: u64) -> Result<(), Failure> {
        let (first, range) = (*at, file.stat.ranges.then_some(*at..end));
        let mut body = file.object.read(range, file.stat.clone()).await?;
        let (mut since, mut lately) = (Instant::now(), 0);
        while let Some(data) = body.next().await {
            let data = match data {
                Ok(data) => data,
                // However the connection ended, all that was asked for is here.
                Err(_) if *at == end => break,
                Err(failure) => return Err(failure),
            };
            let len = data.len() as u64;
            if len > end - *at {
                // An answer that is not what it says it is: nothing of it counts.
                self.bytes_done.fetch_sub(*at - first, Ordering::Relaxed);
                *at = first;
                return Err(Failure::retry("the server sends more than was asked for"));
            }
            let io = |error| Failure::Fatal(RemoteError::io(&file.path, error));
            file.file.write_all_at(&data, *at).map_err(io)?;
            *at += len;
            lately += len;
            self.bytes_done.fetch_add(len, Ordering::Relaxed);
            self.last_progress.store(self.epoch.elapsed().as_millis() as u64, Ordering::Relaxed);
            if since.elapsed() >= self.stall && *at < end {
                if lately < LEAST_PROGRESS {
                    return Err(Failure::retry("the server sends next to nothing"));
                }
                (since, lately) = (Instant::now(), 0);
            }
        }
        if *at < end {
            return Err(Failure::retry("the answer ended before its time"));
        }
        Ok(())
    }

    /// Compares files with their hashes as they arrive, from the first byte on; one thread for all files.
    fn check_hashes(&self) {
        let mut buffer = Vec::new();
        for (index, file) in self.files.iter().enumerate() {
            let Some(digest) = &file.stat.digest else { continue };
            if self.lock().checked.get(index).copied().unwrap_or(true) {
                continue;
            }
            let (mut hasher, mut at) = (digest.hasher(), 0);
            while at < file.stat.size {
                let next = at..(at + (1 << 20)).min(file.stat.size);
                if !self.wait_for(index, &next) {
                    return;
                }
                buffer.resize((next.end - next.start) as usize, 0);
                if let Err(error) = file.file.read_exact_at(&mut buffer, at) {
                    return self.fail(RemoteError::io(&file.path, error));
                }
                hasher.update(&buffer);
                at = next.end;
            }
            if hasher.finish() != *digest {
                let object = file.object.name().to_owned();
                let corrupted = RemoteError::Corrupted { object, digest: digest.name() };
                return self.fail(file.spoil().err().unwrap_or(corrupted));
            }
            if let Some(checked) = self.lock().checked.get_mut(index) {
                *checked = true;
            }
            // So that the journal tells it.
            file.unwritten.fetch_add(1, Ordering::AcqRel);
            self.changed.notify_all();
        }
    }

    /// Waits for bytes without hurrying them; `false` if they will not come.
    fn wait_for(&self, index: usize, bytes: &Range<u64>) -> bool {
        let mut state = self.lock();
        while !state.plan.has_bytes(index, bytes) {
            if state.error.is_some() || self.stopped.load(Ordering::Acquire) {
                return false;
            }
            state = self.changed.wait_timeout(state, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}
