//! The embedded kernels on a GPU of the device crate.

use std::ffi::CStr;
use std::sync::Arc;

use tangram_device::DeviceError;
use tangram_device::cuda::{self, Graph, Grid, Launched, Program};

use super::{Kernel, Launch, Launcher, bundle};
use crate::device::HostBuffer;

/// Loads the embedded kernels on a GPU, with a stream of their own.
///
/// # Errors
/// [`DeviceError::Cuda`] when the driver has no use for them or not enough memory.
pub fn load(gpu: &Arc<cuda::Gpu>) -> Result<Arc<dyn Launcher>, DeviceError> {
    // SAFETY: the image is a whole container, as the tests of `bundle` check.
    Ok(Arc::new(unsafe { Program::load(gpu, bundle::IMAGE) }?))
}

// SAFETY: the driver gives memory of its own, which stays until it is freed.
unsafe impl Launcher for Program {
    fn multiprocessors(&self) -> u32 {
        Program::multiprocessors(self)
    }

    fn kernel(&self, name: &CStr, shared_bytes: u32) -> Result<Kernel, DeviceError> {
        Program::kernel(self, name, shared_bytes)
    }

    unsafe fn launch(&self, kernel: Kernel, launch: Launch, arguments: &[u8]) -> Result<(), DeviceError> {
        let Launch { grid, threads, shared_bytes } = launch;
        let (grid, arguments) = (Grid { blocks: grid, threads, shared_bytes }, arguments.as_ptr().cast());
        // SAFETY: as the caller says.
        unsafe { Program::launch(self, kernel, grid, arguments) }
    }

    unsafe fn graph(&self, launches: &[Launched]) -> Result<Graph, DeviceError> {
        // SAFETY: as the caller says.
        unsafe { Program::graph(self, launches) }
    }

    unsafe fn replay(&self, graph: &Graph) -> Result<(), DeviceError> {
        // SAFETY: as the caller says.
        unsafe { Program::replay(self, graph) }
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        Ok(Program::allocate(self, bytes)? as u64)
    }

    unsafe fn free(&self, address: u64) {
        // SAFETY: as the caller says.
        unsafe { Program::free(self, address as usize) }
    }

    fn pin(&self, bytes: usize) -> Result<HostBuffer, DeviceError> {
        Ok(Box::new(Program::pin(self, bytes)?))
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        // SAFETY: as the caller says.
        unsafe { Program::upload(self, to as usize, bytes) }
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: as the caller says.
        unsafe { Program::copy(self, from as usize, to as usize, bytes) }
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), DeviceError> {
        // SAFETY: as the caller says.
        unsafe { Program::download(self, from as usize, bytes) }
    }
}
