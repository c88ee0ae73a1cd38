//! A queue of work on the GPU (a CUDA stream of our own), and the kinds of work that memory needs.

use std::ffi::c_void;
use std::sync::Arc;

use super::driver::{EventHandle, STREAM_NON_BLOCKING, StreamHandle};
use super::gpu::Gpu;
use crate::DeviceError;

/// What is put in runs in order, beside other queues.
pub(super) struct Queue {
    gpu: Arc<Gpu>,
    stream: StreamHandle,
}

// SAFETY: the stream is a name that the driver takes from any thread.
unsafe impl Send for Queue {}
// SAFETY: as above; the driver orders what several threads put in.
unsafe impl Sync for Queue {}

impl Queue {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Queue, DeviceError> {
        let mut stream = std::ptr::null_mut();
        gpu.call("making a stream", |driver| {
            // SAFETY: the pointer is to a live variable.
            unsafe { (driver.cuStreamCreate)(&mut stream, STREAM_NON_BLOCKING) }
        })?;
        Ok(Queue { gpu: gpu.clone(), stream })
    }

    /// For what is put in elsewhere.
    pub(super) fn stream(&self) -> StreamHandle {
        self.stream
    }

    /// Waits until everything put in so far is done.
    pub(super) fn wait(&self) -> Result<(), DeviceError> {
        // SAFETY: the stream is ours and alive.
        self.gpu.must("working on the GPU", |driver| unsafe { (driver.cuStreamSynchronize)(self.stream) })
    }

    /// Lets an event come when everything put in so far is done.
    pub(super) fn record(&self, event: EventHandle) -> Result<(), DeviceError> {
        // SAFETY: stream and event are of this GPU and alive.
        self.gpu.call("recording an event", |driver| unsafe { (driver.cuEventRecord)(event, self.stream) })
    }

    /// # Safety
    /// Both ranges must be valid, the device's mapped and nobody else's, until the copy is done; a source that is not
    /// pinned is read before this returns.
    pub(super) unsafe fn to_device(
        &self,
        from: *const c_void,
        to: usize,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        self.gpu.call("copying to the GPU", |driver| {
            // SAFETY: as the caller says.
            unsafe { (driver.cuMemcpyHtoDAsync_v2)(to as u64, from, bytes, self.stream) }
        })
    }

    /// # Safety
    /// As [`Queue::to_device`], with the roles exchanged.
    pub(super) unsafe fn to_host(
        &self,
        from: usize,
        to: *mut c_void,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        self.gpu.call("copying from the GPU", |driver| {
            // SAFETY: as the caller says.
            unsafe { (driver.cuMemcpyDtoHAsync_v2)(to, from as u64, bytes, self.stream) }
        })
    }

    /// # Safety
    /// Both ranges must be mapped, nobody else's, and apart, until the copy is done.
    pub(super) unsafe fn within(&self, from: usize, to: usize, bytes: usize) -> Result<(), DeviceError> {
        // A move that ends half-way leaves torn bytes behind.
        self.gpu.must("copying on the GPU", |driver| {
            // SAFETY: as the caller says.
            unsafe { (driver.cuMemcpyDtoDAsync_v2)(to as u64, from as u64, bytes, self.stream) }
        })
    }

    /// # Safety
    /// The range must be mapped and nobody else's until it is filled.
    pub(super) unsafe fn zero(&self, address: usize, bytes: usize) -> Result<(), DeviceError> {
        self.gpu.call("clearing device memory", |driver| {
            // SAFETY: as the caller says.
            unsafe { (driver.cuMemsetD8Async)(address as u64, 0, bytes, self.stream) }
        })
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: made in `new`, destroyed once. The driver lets what was put in end first. (What it refuses to end goes
        // with the context of a lost GPU.)
        let _ =
            self.gpu.must("ending a stream", |driver| unsafe { (driver.cuStreamDestroy_v2)(self.stream) });
    }
}
