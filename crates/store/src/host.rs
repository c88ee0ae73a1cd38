//! Loads of what host memory has: copies to the device, in the order and by the urgency that hold for disks.
//!
//! A thread of its own hands parts over to the link, a bounded number at a time: enough to keep it busy, few enough that a
//! request's next part does not wait long behind a prefetch. Reads nothing, verifies nothing and copies nothing in host
//! memory; the bytes were verified when they came from disk.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tangram_pool::{LoadFailure, Part};

use crate::Wake;
use crate::schedule::{LoadId, Schedule, Urgency};

/// Parts that may be on the link at a time.
const UNDER_WAY: usize = 16;

/// Bytes from which on a row of copies tells how fast the link is.
const TELLING_BYTES: u64 = 16 << 20;

/// A part that is copied from host memory.
pub(crate) struct HostJob {
    pub(crate) part: Part,
    pub(crate) wake: Wake,
}

#[derive(Default)]
struct State {
    schedule: Schedule<HostJob>,
    under_way: usize,
    /// Since when parts have been under way without a pause, and their bytes.
    busy: Option<(Instant, u64)>,
    /// Bytes per second of the last such row that was long enough.
    rate: Option<f64>,
    closed: bool,
}

/// Host memory as a place from which tensors are loaded.
#[derive(Default)]
pub(crate) struct HostSource {
    state: Mutex<State>,
    changed: Condvar,
}

impl HostSource {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system does not give one.
    pub(crate) fn start() -> io::Result<Arc<HostSource>> {
        let source = Arc::<HostSource>::default();
        let for_thread = source.clone();
        std::thread::Builder::new().name("copy-host".to_owned()).spawn(move || for_thread.run())?;
        Ok(source)
    }

    /// Adds a load's parts.
    pub(crate) fn push(&self, load: LoadId, urgency: Urgency, jobs: VecDeque<HostJob>) {
        self.lock().schedule.push(load, urgency, jobs);
        self.changed.notify_all();
    }

    /// Makes what is left of a load urgent.
    pub(crate) fn hasten(&self, load: LoadId) {
        self.lock().schedule.hasten(load);
    }

    /// Bytes per second that the link to the device was measured to carry.
    pub(crate) fn rate(&self) -> Option<f64> {
        self.lock().rate
    }

    /// Gives up everything that waits; the thread ends.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let jobs = state.schedule.drain();
        drop(state);
        drop(jobs);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(self: &Arc<Self>) {
        while let Some(HostJob { part, wake }) = self.next() {
            let over = Over { source: self.clone(), bytes: part.len() as u64 };
            let then = move |whole| {
                // The next part can go before anybody is told of this one.
                drop(over);
                if whole {
                    // The thread that reports copies must survive what a caller does.
                    let _ = catch_unwind(AssertUnwindSafe(|| wake()));
                }
            };
            if part.is_unwanted() {
                part.finish_then(Err(LoadFailure::Abandoned), then);
            } else {
                part.copy_from_host(then);
            }
        }
    }

    /// The next part, when the link has room for it; `None` when everything is over.
    fn next(&self) -> Option<HostJob> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if state.under_way < UNDER_WAY
                && let Some((_, _, job)) = state.schedule.next()
            {
                state.under_way += 1;
                state.busy.get_or_insert_with(|| (Instant::now(), 0));
                return Some(job);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Counts a part out, however it ended: what may be under way is limited.
struct Over {
    source: Arc<HostSource>,
    bytes: u64,
}

impl Drop for Over {
    fn drop(&mut self) {
        let mut state = self.source.lock();
        state.under_way -= 1;
        if let Some((_, bytes)) = &mut state.busy {
            *bytes += self.bytes;
        }
        if state.under_way == 0
            && let Some((since, bytes)) = state.busy.take()
            && bytes >= TELLING_BYTES
        {
            state.rate = Some(bytes as f64 / since.elapsed().as_secs_f64().max(1e-9));
        }
        drop(state);
        self.source.changed.notify_all();
    }
}
