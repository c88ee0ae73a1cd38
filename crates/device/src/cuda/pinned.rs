//! Pinned host memory of a single owner, for what goes to the GPU often and must not take the time to be copied aside.

use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use super::driver::HOST_PORTABLE;
use super::gpu::Gpu;
use super::numa;
use crate::DeviceError;

/// Pinned bytes, near the GPU; they are let go when this is dropped, so no copy may still be reading them then.
pub struct PinnedBytes {
    gpu: Arc<Gpu>,
    base: usize,
    bytes: usize,
}

/// Pins `bytes` (more than 0) of host memory near a GPU and gives its address. Takes milliseconds.
pub(super) fn pin(gpu: &Gpu, bytes: usize) -> Result<usize, DeviceError> {
    numa::near(gpu.numa_node(), || {
        let mut base = std::ptr::null_mut();
        let pinned = gpu.call("pinning host memory", |driver| {
            // SAFETY: the pointer is to a live variable.
            unsafe { (driver.cuMemHostAlloc)(&mut base, bytes, HOST_PORTABLE) }
        });
        pinned.map(|()| base as usize)
    })
}

impl PinnedBytes {
    /// Pins `bytes` (more than 0). Takes milliseconds, so it is nothing for the path of a request.
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<PinnedBytes, DeviceError> {
        Ok(PinnedBytes { gpu: gpu.clone(), base: pin(gpu, bytes)?, bytes })
    }
}

impl Deref for PinnedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: pinned in `new` with so many bytes, initialised (the system's fresh pages are), and written through
        // `deref_mut` alone.
        unsafe { std::slice::from_raw_parts(self.base as *const u8, self.bytes) }
    }
}

impl DerefMut for PinnedBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `&mut self` says that nobody else reads or writes.
        unsafe { std::slice::from_raw_parts_mut(self.base as *mut u8, self.bytes) }
    }
}

impl Drop for PinnedBytes {
    fn drop(&mut self) {
        let base = self.base as *mut c_void;
        // SAFETY: pinned in `new`, freed once; no copy reads it any more, as whoever submitted one has seen to.
        let _ = self.gpu.must("freeing host memory", |driver| unsafe { (driver.cuMemFreeHost)(base) });
    }
}
