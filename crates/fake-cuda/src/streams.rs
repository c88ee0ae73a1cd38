//! Streams as queues of work that nobody has waited for yet, and events as places in them.

use std::collections::{BTreeMap, VecDeque};

use crate::emulator::{self, Kernel};

/// Something that a stream was given to do. Addresses and sizes are in bytes.
#[derive(Clone, Debug)]
pub(crate) enum Work {
    /// Fills device memory with a byte.
    Fill { to: usize, bytes: usize, value: u8 },
    /// From pinned host memory to the device.
    ToDevice { from: usize, to: usize, bytes: usize },
    /// From host memory that is not pinned, read when the copy was asked for.
    Write { from: Vec<u8>, to: usize },
    /// From the device to pinned host memory.
    ToHost { from: usize, to: usize, bytes: usize },
    /// Within the device.
    Within { from: usize, to: usize, bytes: usize },
    /// A kernel, if there is an emulator to run it: its blocks, bytes of shared memory and arguments, and the graph by which
    /// it was launched, if it was.
    Kernel {
        kernel: Option<Kernel>,
        blocks: [u32; 3],
        shared_bytes: u32,
        arguments: Vec<u8>,
        graph: Option<usize>,
    },
}

impl Work {
    pub(crate) fn device_ranges(&self) -> impl Iterator<Item = (usize, usize)> {
        let (first, second) = match *self {
            Work::Fill { to, bytes, .. } | Work::ToDevice { to, bytes, .. } => (Some((to, bytes)), None),
            Work::Write { ref from, to } => (Some((to, from.len())), None),
            Work::ToHost { from, bytes, .. } => (Some((from, bytes)), None),
            Work::Within { from, to, bytes } => (Some((from, bytes)), Some((to, bytes))),
            // What a kernel accesses only it knows; what is not accessible faults.
            Work::Kernel { .. } => (None, None),
        };
        first.into_iter().chain(second)
    }

    pub(crate) fn host_ranges(&self) -> impl Iterator<Item = (usize, usize)> {
        match *self {
            Work::ToDevice { from, bytes, .. } => Some((from, bytes)),
            Work::ToHost { to, bytes, .. } => Some((to, bytes)),
            _ => None,
        }
        .into_iter()
    }

    /// Whether it copies a range of the device over itself, of which the driver says that the result is undefined.
    pub(crate) fn overlaps(&self) -> bool {
        matches!(*self, Work::Within { from, to, bytes } if from < to + bytes && to < from + bytes)
    }

    /// `false` if it failed.
    ///
    /// # Safety
    /// The device ranges must be accessible and the host ranges pinned, and so must all that a kernel accesses.
    pub(crate) unsafe fn run(self) -> bool {
        // SAFETY: the caller has checked all ranges; `copy` allows overlap, which is refused earlier.
        unsafe {
            match self {
                Work::Kernel { kernel, blocks, shared_bytes, arguments, graph: _ } => {
                    return kernel.zip(emulator::get()).is_none_or(|(kernel, emulator)| {
                        emulator.run(kernel, blocks, shared_bytes, &arguments)
                    });
                }
                Work::Fill { to, bytes, value } => std::ptr::write_bytes(to as *mut u8, value, bytes),
                Work::Write { from, to } => {
                    std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len());
                }
                Work::ToDevice { from, to, bytes }
                | Work::ToHost { from, to, bytes }
                | Work::Within { from, to, bytes } => {
                    std::ptr::copy(from as *const u8, to as *mut u8, bytes);
                }
            }
        }
        true
    }
}

#[derive(Default)]
struct Stream {
    queue: VecDeque<Work>,
    submitted: u64,
    done: u64,
}

/// The streams and events of a context.
#[derive(Default)]
pub(crate) struct Streams {
    streams: BTreeMap<usize, Stream>,
    /// Where an event was last recorded: stream and how much had been submitted.
    events: BTreeMap<usize, Option<(usize, u64)>>,
    next: usize,
}

impl Streams {
    pub(crate) fn count(&self) -> usize {
        self.streams.len()
    }

    pub(crate) fn events(&self) -> usize {
        self.events.len()
    }

    fn new_name(&mut self) -> usize {
        self.next += 1;
        self.next
    }

    pub(crate) fn create(&mut self) -> usize {
        let name = self.new_name();
        self.streams.insert(name, Stream::default());
        name
    }

    pub(crate) fn destroy(&mut self, stream: usize) -> bool {
        self.streams.remove(&stream).is_some()
    }

    pub(crate) fn exists(&self, stream: usize) -> bool {
        self.streams.contains_key(&stream)
    }

    pub(crate) fn create_event(&mut self) -> usize {
        let name = self.new_name();
        self.events.insert(name, None);
        name
    }

    pub(crate) fn destroy_event(&mut self, event: usize) -> bool {
        self.events.remove(&event).is_some()
    }

    pub(crate) fn record(&mut self, event: usize, stream: usize) -> bool {
        let at = self.streams.get(&stream).map(|found| (stream, found.submitted));
        match (at, self.events.get_mut(&event)) {
            (Some(at), Some(event)) => {
                *event = Some(at);
                true
            }
            _ => false,
        }
    }

    /// What an event waits for; `None` if there is no such event.
    pub(crate) fn awaited(&self, event: usize) -> Option<Option<(usize, u64)>> {
        self.events.get(&event).copied()
    }

    pub(crate) fn push(&mut self, stream: usize, work: Work) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.queue.push_back(work);
            stream.submitted += 1;
        }
    }

    pub(crate) fn pop(&mut self, stream: usize) -> Option<Work> {
        let stream = self.streams.get_mut(&stream)?;
        let work = stream.queue.pop_front()?;
        stream.done += 1;
        Some(work)
    }

    pub(crate) fn submitted(&self, stream: usize) -> u64 {
        self.streams.get(&stream).map_or(0, |stream| stream.submitted)
    }

    /// How much of a stream's work has been done; all of it for a stream that is gone.
    pub(crate) fn done(&self, stream: usize) -> u64 {
        self.streams.get(&stream).map_or(u64::MAX, |stream| stream.done)
    }

    /// One of the streams with something to do.
    pub(crate) fn busy(&self, choice: usize) -> Option<usize> {
        let busy: Vec<usize> = self
            .streams
            .iter()
            .filter(|(_, stream)| !stream.queue.is_empty())
            .map(|(&name, _)| name)
            .collect();
        busy.get(choice % busy.len().max(1)).copied()
    }

    /// Whether work of a graph has not been done.
    pub(crate) fn runs(&self, exec: usize) -> bool {
        let mut works = self.streams.values().flat_map(|stream| &stream.queue);
        works.any(|work| matches!(work, Work::Kernel { graph: Some(graph), .. } if *graph == exec))
    }

    /// Whether work that has not been done uses any byte of a range.
    pub(crate) fn touches(&self, address: usize, bytes: usize) -> bool {
        let overlaps = |(at, len): (usize, usize)| at < address + bytes && address < at + len;
        let works = self.streams.values().flat_map(|stream| &stream.queue);
        works.into_iter().any(|work| work.device_ranges().any(overlaps) || work.host_ranges().any(overlaps))
    }
}
