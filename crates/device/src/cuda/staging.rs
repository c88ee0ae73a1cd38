//! Pinned host buffers, and the copies from them to the GPU.
//!
//! A ring of buffers of one size is all the host memory that loading takes, however much is loaded: whoever wants one
//! more waits until a copy has ended. A buffer is filled by a reader, then handed over with the extents that its bytes
//! are for; a thread of its own waits for the copy's event and reports. What host memory keeps is copied the same way, from
//! where it is. Nothing is made or freed on the way.

use std::ffi::c_void;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::driver::{EVENT_FLAGS, EventHandle, HOST_PORTABLE};
use super::gpu::Gpu;
use super::host::HostBytes;
use super::numa;
use super::queue::Queue;
use crate::DeviceError;

/// Where buffers begin, bytes: what reading past the page cache asks of its destination.
pub const ALIGNMENT: usize = 4096;

/// Copies from memory that is kept which may be under way at once; whoever wants one more waits.
const KEPT_COPIES: usize = 32;

/// Called once, when a copy has ended or failed; must not wait for another copy.
pub(crate) type Done = Box<dyn FnOnce(Result<(), DeviceError>) + Send>;

/// Bytes of a buffer to be copied to the GPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    /// First byte in the buffer.
    pub(crate) from: usize,
    /// Where they go.
    pub(crate) to: usize,
    /// How many.
    pub(crate) bytes: usize,
}

struct Shared {
    gpu: Arc<Gpu>,
    queue: Queue,
    base: usize,
    buffer_bytes: usize,
    /// All events that there are: one per buffer, and for copies of what is kept.
    events: Vec<EventHandle>,
    free: Mutex<Free>,
    freed: Condvar,
}

/// What nobody has.
struct Free {
    buffers: Vec<usize>,
    /// Indices of events for copies of what is kept.
    events: Vec<usize>,
}

// SAFETY: the events are names that the driver takes from any thread; everything else is synchronised by itself.
unsafe impl Send for Shared {}
// SAFETY: as above; the memory at `base` is reached through `Pinned` alone, of which there is one per buffer.
unsafe impl Sync for Shared {}

struct InFlight {
    source: InUse,
    done: Done,
}

/// What a copy reads, and whose event tells its end.
enum InUse {
    Buffer(Pinned),
    Kept { event: KeptEvent, _bytes: Arc<HostBytes> },
}

/// An event that is somebody's until dropped.
struct KeptEvent {
    shared: Arc<Shared>,
    index: usize,
}

impl Drop for KeptEvent {
    fn drop(&mut self) {
        self.shared.free().events.push(self.index);
        self.shared.freed.notify_all();
    }
}

impl InUse {
    fn shared(&self) -> &Arc<Shared> {
        match self {
            InUse::Buffer(buffer) => &buffer.shared,
            InUse::Kept { event, .. } => &event.shared,
        }
    }

    fn event(&self) -> EventHandle {
        match self {
            InUse::Buffer(buffer) => buffer.shared.events[buffer.index],
            InUse::Kept { event, .. } => event.shared.events[event.index],
        }
    }
}

/// The buffers of one GPU.
pub struct Staging {
    shared: Arc<Shared>,
    in_flight: Option<Sender<InFlight>>,
    waiter: Option<JoinHandle<()>>,
}

/// A buffer that is somebody's until dropped or handed over.
pub struct Pinned {
    shared: Arc<Shared>,
    index: usize,
}

impl Staging {
    /// Pins `buffers` buffers of `buffer_bytes` (rounded up to [`ALIGNMENT`]) near the GPU.
    pub(super) fn new(gpu: &Arc<Gpu>, buffers: usize, buffer_bytes: usize) -> Result<Staging, DeviceError> {
        let buffer_bytes = buffer_bytes.max(1).next_multiple_of(ALIGNMENT);
        let mut shared = Shared {
            gpu: gpu.clone(),
            queue: Queue::new(gpu)?,
            base: 0,
            buffer_bytes,
            events: Vec::new(),
            free: Mutex::new(Free {
                buffers: (0..buffers).collect(),
                events: (buffers..buffers + KEPT_COPIES).collect(),
            }),
            freed: Condvar::new(),
        };
        numa::near(gpu.numa_node(), || {
            let mut base = std::ptr::null_mut();
            let pinned = gpu.call("pinning host memory", |driver| {
                // SAFETY: the pointer is to a live variable.
                unsafe { (driver.cuMemHostAlloc)(&mut base, buffers * buffer_bytes, HOST_PORTABLE) }
            });
            pinned.map(|()| shared.base = base as usize)
        })?;
        for _ in 0..buffers + KEPT_COPIES {
            let mut event = std::ptr::null_mut();
            gpu.call("making an event", |driver| {
                // SAFETY: the pointer is to a live variable.
                unsafe { (driver.cuEventCreate)(&mut event, EVENT_FLAGS) }
            })?;
            shared.events.push(event);
        }
        let (shared, (in_flight, receiver)) = (Arc::new(shared), channel());
        let waiter = std::thread::Builder::new()
            .name("upload".to_owned())
            .spawn(move || wait_for_copies(&receiver))
            .map_err(|source| DeviceError::System { operation: "starting the upload thread", source })?;
        Ok(Staging { shared, in_flight: Some(in_flight), waiter: Some(waiter) })
    }

    /// Bytes of a buffer.
    pub fn buffer_bytes(&self) -> usize {
        self.shared.buffer_bytes
    }

    /// A buffer, with anything in it; waits until there is one. Who holds buffers must not wait for more of them.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub fn take(&self) -> Result<Pinned, DeviceError> {
        let mut free = self.shared.free();
        loop {
            if let Some(lost) = self.shared.gpu.lost() {
                return Err(lost);
            }
            if let Some(index) = free.buffers.pop() {
                return Ok(Pinned { shared: self.shared.clone(), index });
            }
            free = self.shared.freed.wait(free).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A buffer, with anything in it, if there is one.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub fn try_take(&self) -> Result<Option<Pinned>, DeviceError> {
        if let Some(lost) = self.shared.gpu.lost() {
            return Err(lost);
        }
        let index = self.shared.free().buffers.pop();
        Ok(index.map(|index| Pinned { shared: self.shared.clone(), index }))
    }

    /// Copies parts of a buffer to the GPU; `done` is called when all of them are there, or on an error.
    ///
    /// # Safety
    /// The destinations must be mapped and nobody else's until `done` is called, and `buffer` of this ring.
    pub(crate) unsafe fn upload(&self, buffer: Pinned, transfers: &[Transfer], done: Done) {
        let base = self.shared.base + buffer.index * self.shared.buffer_bytes;
        let copies = transfers.iter().map(|&Transfer { from, to, bytes }| {
            assert!(from + bytes <= self.shared.buffer_bytes, "more than the buffer has");
            (base + from, to, bytes)
        });
        let copies: Vec<_> = copies.collect();
        // SAFETY: the sources are parts of the buffer, the destinations as the caller says.
        unsafe { self.start(copies.into_iter(), InUse::Buffer(buffer), done) };
    }

    /// Copies `len` bytes from `at` on of what is kept to the GPU; `done` is called when they are there, or on an error.
    /// Waits while many such copies are under way.
    ///
    /// # Safety
    /// The destination must be mapped and nobody else's until `done` is called.
    pub(crate) unsafe fn upload_kept(
        &self,
        bytes: Arc<HostBytes>,
        at: usize,
        to: usize,
        len: usize,
        done: Done,
    ) {
        assert!(bytes.is_of(&self.shared.gpu), "host memory of another device");
        let mut free = self.shared.free();
        let index = loop {
            match free.events.pop() {
                Some(index) => break index,
                None => free = self.shared.freed.wait(free).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(free);
        let mut gone = 0;
        let copies: Vec<_> = bytes
            .spans(at, len)
            .map(|(from, bytes)| {
                gone += bytes;
                (from, to + gone - bytes, bytes)
            })
            .collect();
        let event = KeptEvent { shared: self.shared.clone(), index };
        // SAFETY: the sources are kept by `bytes`, the destination is as the caller says.
        unsafe { self.start(copies.into_iter(), InUse::Kept { event, _bytes: bytes }, done) };
    }

    /// Puts copies (from, to, bytes) in the queue.
    ///
    /// # Safety
    /// The sources must be pinned and unchanged while `source` lives, the destinations mapped and nobody else's until
    /// `done` is called.
    unsafe fn start(
        &self,
        mut copies: impl Iterator<Item = (usize, usize, usize)>,
        source: InUse,
        done: Done,
    ) {
        let queue = &self.shared.queue;
        let enqueued = copies
            // SAFETY: as the caller says; `source` lives until the event has come.
            .try_for_each(|(from, to, bytes)| unsafe { queue.to_device(from as *const c_void, to, bytes) })
            .and_then(|()| queue.record(source.event()));
        if let Err(error) = enqueued {
            // What was enqueued before the error still reads the source.
            let _ = queue.wait();
            drop(source);
            return done(Err(error));
        }
        if let Some(in_flight) = &self.in_flight {
            // The thread ends only after the sender is gone.
            let _ = in_flight.send(InFlight { source, done });
        }
    }
}

impl Staging {
    /// Copies from the GPU to memory that is not pinned, by way of two buffers: while one is filled over the link, the
    /// other is emptied. `false`, and nothing is done, if nobody can spare them.
    ///
    /// # Safety
    /// The source must be mapped, and nobody may write it.
    pub(super) unsafe fn download(
        &self,
        queue: &Queue,
        from: usize,
        into: &mut [u8],
    ) -> Result<bool, DeviceError> {
        let Some(mut buffers) = self.pair()? else { return Ok(false) };
        let piece = self.shared.buffer_bytes;
        let mut full: Option<&mut [u8]> = None;
        let mut pieces = into.chunks_mut(piece).chain([&mut [][..]]).enumerate();
        let copied: Result<(), DeviceError> = pieces.try_for_each(|(index, to)| {
            let (bytes, at) = (to.len(), from + index * piece);
            let [own, other] = self.turn(&mut buffers, index);
            if bytes > 0 {
                // SAFETY: the source is as the caller says; the buffer is ours until this has waited, below.
                unsafe { queue.to_host(at, own.address() as *mut c_void, bytes) }?;
                queue.record(self.shared.events[own.index])?;
            }
            if let Some(to) = full.replace(to).filter(|to| !to.is_empty()) {
                self.wait(other)?;
                to.copy_from_slice(&other[..to.len()]);
            }
            Ok(())
        });
        if copied.is_err() {
            // What was enqueued before still uses the buffers.
            let _ = queue.wait();
        }
        copied.map(|()| true)
    }

    /// The other way round.
    ///
    /// # Safety
    /// The destination must be mapped and nobody else's.
    pub(super) unsafe fn upload_from(
        &self,
        queue: &Queue,
        from: &[u8],
        to: usize,
    ) -> Result<bool, DeviceError> {
        let Some(mut buffers) = self.pair()? else { return Ok(false) };
        let piece = self.shared.buffer_bytes;
        let copied = from.chunks(piece).enumerate().try_for_each(|(index, bytes)| {
            let [own, _] = self.turn(&mut buffers, index);
            if index >= 2 {
                self.wait(own)?;
            }
            own[..bytes.len()].copy_from_slice(bytes);
            // SAFETY: the destination is as the caller says; the buffer is ours until this has waited, below.
            unsafe { queue.to_device(own.address() as *const c_void, to + index * piece, bytes.len()) }?;
            queue.record(self.shared.events[own.index])
        });
        queue.wait().and(copied)?;
        Ok(true)
    }

    fn pair(&self) -> Result<Option<[Pinned; 2]>, DeviceError> {
        Ok(self.try_take()?.zip(self.try_take()?).map(|(first, second)| [first, second]))
    }

    /// The buffer whose turn it is, and the other one.
    fn turn<'a>(&self, [even, odd]: &'a mut [Pinned; 2], index: usize) -> [&'a mut Pinned; 2] {
        if index.is_multiple_of(2) { [even, odd] } else { [odd, even] }
    }

    /// Waits for the last copy of a buffer.
    fn wait(&self, buffer: &Pinned) -> Result<(), DeviceError> {
        let event = self.shared.events[buffer.index];
        // SAFETY: the event is the buffer's own and lives as long as the ring.
        self.shared.gpu.must("copying", |driver| unsafe { (driver.cuEventSynchronize)(event) })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        self.in_flight = None;
        if let Some(waiter) = self.waiter.take() {
            // The last report may be what drops the device; joining oneself would wait for ever.
            if waiter.thread().id() != std::thread::current().id() {
                let _ = waiter.join();
            }
        }
    }
}

fn wait_for_copies(in_flight: &Receiver<InFlight>) {
    for InFlight { source, done } in in_flight {
        let event = source.event();
        // An error leaves unknown whether the copy still runs, so it loses the GPU, and with it the copy.
        let copied = source.shared().gpu.must("copying to the GPU", |driver| {
            // SAFETY: the event is the copy's own and lives as long as the ring.
            unsafe { (driver.cuEventSynchronize)(event) }
        });
        drop(source);
        // Whoever is told may panic; the copies after this one must be reported all the same.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| done(copied)));
    }
}

impl Shared {
    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // No buffer is taken any more, so no copy runs. What the driver refuses to end goes with the context of a lost
        // GPU.
        for &event in &self.events {
            // SAFETY: made in `new`, destroyed once.
            let _ = self.gpu.must("ending an event", |driver| unsafe { (driver.cuEventDestroy_v2)(event) });
        }
        if self.base != 0 {
            let base = self.base as *mut c_void;
            // SAFETY: pinned in `new`, freed once, and no `Pinned` is left.
            let _ = self.gpu.must("freeing host memory", |driver| unsafe { (driver.cuMemFreeHost)(base) });
        }
    }
}

impl std::fmt::Debug for Pinned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pinned({})", self.index)
    }
}

impl Pinned {
    fn address(&self) -> usize {
        self.shared.base + self.index * self.shared.buffer_bytes
    }

    /// Whether it is a buffer of this ring.
    pub(crate) fn is_of(&self, staging: &Staging) -> bool {
        Arc::ptr_eq(&self.shared, &staging.shared)
    }
}

impl std::ops::Deref for Pinned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the memory is pinned and initialised (the system's fresh pages are) while the ring lives, which
        // `self` keeps alive; there is one `Pinned` per buffer, and no copy runs while somebody has it.
        unsafe { std::slice::from_raw_parts(self.address() as *const u8, self.shared.buffer_bytes) }
    }
}

impl std::ops::DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as `deref`, and `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.address() as *mut u8, self.shared.buffer_bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.shared.free().buffers.push(self.index);
        // All wake: on a lost GPU each of them has to hear of it.
        self.shared.freed.notify_all();
    }
}
