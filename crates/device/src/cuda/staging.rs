//! Pinned host buffers, and the copies from them to the GPU.
//!
//! A ring of buffers of one size is all the host memory that loading takes, however much is loaded: whoever wants one
//! more waits until a copy has ended. A buffer is filled by a reader, then handed over with the extents that its bytes
//! are for; a thread of its own waits for the copy's event and reports. Nothing is made or freed on the way.

use std::ffi::c_void;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::driver::{EVENT_FLAGS, EventHandle, HOST_PORTABLE};
use super::gpu::Gpu;
use super::numa;
use super::queue::Queue;
use crate::DeviceError;

/// Where buffers begin, bytes: what reading past the page cache asks of its destination.
pub const ALIGNMENT: usize = 4096;

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
    /// One per buffer.
    events: Vec<EventHandle>,
    /// Buffers that nobody has.
    free: Mutex<Vec<usize>>,
    freed: Condvar,
}

// SAFETY: the events are names that the driver takes from any thread; everything else is synchronised by itself.
unsafe impl Send for Shared {}
// SAFETY: as above; the memory at `base` is reached through `Pinned` alone, of which there is one per buffer.
unsafe impl Sync for Shared {}

struct InFlight {
    buffer: Pinned,
    done: Done,
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
            free: Mutex::new((0..buffers).collect()),
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
        for _ in 0..buffers {
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
            if let Some(index) = free.pop() {
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
        let index = self.shared.free().pop();
        Ok(index.map(|index| Pinned { shared: self.shared.clone(), index }))
    }

    /// Copies parts of a buffer to the GPU; `done` is called when all of them are there, or on an error.
    ///
    /// # Safety
    /// The destinations must be mapped and nobody else's until `done` is called, and `buffer` of this ring.
    pub(crate) unsafe fn upload(&self, buffer: Pinned, transfers: &[Transfer], done: Done) {
        let shared = &self.shared;
        let event = shared.events[buffer.index];
        let enqueued = transfers
            .iter()
            .try_for_each(|transfer| {
                assert!(transfer.from + transfer.bytes <= shared.buffer_bytes, "more than the buffer has");
                let from =
                    (shared.base + buffer.index * shared.buffer_bytes + transfer.from) as *const c_void;
                // SAFETY: the source is part of a pinned buffer that stays taken until the event has come, the
                // destination as the caller says.
                unsafe { shared.queue.to_device(from, transfer.to, transfer.bytes) }
            })
            .and_then(|()| shared.queue.record(event));
        if let Err(error) = enqueued {
            // What was enqueued before the error still uses the buffer.
            let _ = shared.queue.wait();
            drop(buffer);
            return done(Err(error));
        }
        if let Some(in_flight) = &self.in_flight {
            // The thread ends only after the sender is gone.
            let _ = in_flight.send(InFlight { buffer, done });
        }
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
    for InFlight { buffer, done } in in_flight {
        let event = buffer.shared.events[buffer.index];
        // An error leaves unknown whether the copy still runs, so it loses the GPU, and with it the copy.
        let copied = buffer.shared.gpu.must("copying to the GPU", |driver| {
            // SAFETY: the event is the buffer's own and lives as long as the ring.
            unsafe { (driver.cuEventSynchronize)(event) }
        });
        drop(buffer);
        // Whoever is told may panic; the copies after this one must be reported all the same.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| done(copied)));
    }
}

impl Shared {
    fn free(&self) -> MutexGuard<'_, Vec<usize>> {
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
        self.shared.free().push(self.index);
        // All wake: on a lost GPU each of them has to hear of it.
        self.shared.freed.notify_all();
    }
}
