//! Copy streams: threads that bring bytes into extents, in order per stream, and events that say how far they are.
//!
//! On the CPU a stream's thread writes straight into the destination. A device that the host cannot address fills a
//! pinned buffer instead and copies from there; the interface is the same.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

/// One unit of work for a stream: it owns its destination, fills it and reports.
pub type Copy = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Progress {
    queue: VecDeque<Copy>,
    submitted: u64,
    completed: u64,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    progress: Mutex<Progress>,
    changed: Condvar,
}

/// An ordered queue of copies with a worker thread of its own. Dropping it finishes what was submitted.
pub struct Stream {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

/// A point in a stream; complete when everything submitted before it is done.
pub struct Event {
    shared: Arc<Shared>,
    at: u64,
}

impl Stream {
    /// Starts a stream whose thread carries `name`.
    ///
    /// # Errors
    /// When the system cannot start a thread.
    pub fn start(name: &str) -> std::io::Result<Stream> {
        let shared = Arc::new(Shared::default());
        let for_worker = shared.clone();
        let worker = std::thread::Builder::new().name(name.to_owned()).spawn(move || run(&for_worker))?;
        Ok(Stream { shared, worker: Some(worker) })
    }

    /// Puts a copy at the end of the queue.
    pub fn submit(&self, copy: Copy) {
        let mut progress = self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner);
        progress.queue.push_back(copy);
        progress.submitted += 1;
        drop(progress);
        self.shared.changed.notify_all();
    }

    /// An event for everything submitted so far.
    pub fn record(&self) -> Event {
        let progress = self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner);
        Event { shared: self.shared.clone(), at: progress.submitted }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.shared.changed.notify_all();
        if let Some(worker) = self.worker.take() {
            // A stream may be dropped by its own last copy; joining oneself would wait for ever.
            if worker.thread().id() != std::thread::current().id() {
                let _ = worker.join();
            }
        }
    }
}

impl Event {
    /// Whether everything before the event is done.
    pub fn is_complete(&self) -> bool {
        self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner).completed >= self.at
    }

    /// Blocks until everything before the event is done.
    pub fn wait(&self) {
        let mut progress = self.shared.progress.lock().unwrap_or_else(PoisonError::into_inner);
        while progress.completed < self.at {
            progress = self.shared.changed.wait(progress).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn run(shared: &Shared) {
    loop {
        let mut progress = shared.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = loop {
            if let Some(copy) = progress.queue.pop_front() {
                break copy;
            }
            if progress.closed {
                return;
            }
            progress = shared.changed.wait(progress).unwrap_or_else(PoisonError::into_inner);
        };
        drop(progress);
        // A copy that panics must not take the stream with it: whoever waits for a later event would wait for ever.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(copy));
        shared.progress.lock().unwrap_or_else(PoisonError::into_inner).completed += 1;
        shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_run_in_order_and_events_wait_for_what_came_before() {
        let stream = Stream::start("test-copy").unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        for i in 0..100 {
            let log = log.clone();
            stream.submit(Box::new(move || log.lock().unwrap().push(i)));
        }
        let event = stream.record();
        event.wait();
        assert!(event.is_complete());
        assert_eq!(*log.lock().unwrap(), (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_panicking_copy_does_not_stop_the_stream() {
        let stream = Stream::start("test-copy").unwrap();
        stream.submit(Box::new(|| panic!("expected by the test")));
        stream.record().wait();
        assert!(stream.record().is_complete());
    }
}
