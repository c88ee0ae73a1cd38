//! Copying and verifying what has come, on the device's copy streams: those of all disks share them, by urgency.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tangram_device::Memory;

use crate::buffer::Buffer;
use crate::job::{Arrival, Job, Landed};
use crate::reuse::Key;
use crate::schedule::URGENCIES;
use crate::source::Source;

/// As many light jobs can wait for the streams that are busy.
const FEW: usize = 2;

type Landing = (Job, Arrival, Arc<Source>);

#[derive(Default)]
struct Queue {
    waiting: [VecDeque<Landing>; URGENCIES],
    idle_streams: Vec<usize>,
}

/// What waits for being copied or verified.
pub(crate) struct Landings {
    memory: Arc<Memory>,
    queue: Mutex<Queue>,
}

impl Landings {
    pub(crate) fn new(memory: Arc<Memory>) -> Arc<Landings> {
        let idle_streams = (0..memory.streams().len()).collect();
        Arc::new(Landings { memory, queue: Mutex::new(Queue { idle_streams, ..Queue::default() }) })
    }

    /// How many jobs are worked on at once.
    pub(crate) fn workers(&self) -> usize {
        self.memory.streams().len()
    }

    /// Adds a job of a disk, which is told when it is over.
    pub(crate) fn push(self: &Arc<Self>, job: Job, arrival: Arrival, source: Arc<Source>) {
        let mut queue = self.lock();
        let is_light = job.is_light(&arrival);
        queue.waiting[job.urgency as usize].push_back((job, arrival, source));
        let waiting: usize = queue.waiting.iter().map(VecDeque::len).sum();
        let busy = self.workers() - queue.idle_streams.len();
        // One stream keeps up with a disk; a second one would only take the memory's time from what is still being read.
        let suffices = is_light && busy > 0 && waiting <= FEW;
        let stream = if suffices { None } else { queue.idle_streams.pop() };
        drop(queue);
        if let Some(stream) = stream {
            self.feed(stream);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a stream its next job.
    fn feed(self: &Arc<Self>, stream: usize) {
        let mut queue = self.lock();
        let Some((job, arrival, source)) = queue.waiting.iter_mut().find_map(VecDeque::pop_front) else {
            queue.idle_streams.push(stream);
            return;
        };
        drop(queue);
        let next = Next { landings: self.clone(), stream };
        if let Some(worker) = self.memory.streams().get(stream) {
            worker.submit(Box::new(move || {
                let _next = next;
                let mut over = Over { source, buffer: None, found: None };
                let cached = matches!(arrival, Arrival::Cached);
                let found = cached.then(|| ((job.file.identity(), job.offset), job.len as u64));
                match job.land(arrival) {
                    Landed::Over(buffer) => (over.buffer, over.found) = (buffer, found),
                    Landed::Again(job) => over.source.put_back(*job),
                }
            }));
        }
    }
}

/// Feeds a stream again when its job is over, however that ended: a stream that is not fed is lost to all loads.
struct Next {
    landings: Arc<Landings>,
    stream: usize,
}

impl Drop for Next {
    fn drop(&mut self) {
        self.landings.feed(self.stream);
    }
}

/// Tells a disk that a job of its is over, however that ended: what it may have under way is limited.
struct Over {
    source: Arc<Source>,
    buffer: Option<Buffer>,
    /// What the page cache had, and bytes of that.
    found: Option<(Key, u64)>,
}

impl Drop for Over {
    fn drop(&mut self) {
        self.source.landed(self.buffer.take(), self.found);
    }
}
