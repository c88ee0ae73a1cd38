//! A GPU on which nothing is done: what is launched on it is written down, to be put together as a graph.

use std::ffi::CStr;
use std::sync::{Mutex, PoisonError};

use tangram_device::DeviceError;
use tangram_device::cuda::{Grid, Launched};

use super::{Kernel, Launch, Launcher};
use crate::device::HostBuffer;

/// Writes launches down.
#[derive(Default)]
pub(super) struct Recorder {
    multiprocessors: u32,
    launches: Mutex<Vec<Launched>>,
}

impl Recorder {
    /// For kernels of a GPU with so many multiprocessors.
    pub(super) fn new(multiprocessors: u32) -> Recorder {
        Recorder { multiprocessors, launches: Mutex::default() }
    }

    /// What has been launched, in its order.
    pub(super) fn take(&self) -> Vec<Launched> {
        std::mem::take(&mut *self.launches.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn refused<T>() -> Result<T, DeviceError> {
    Err(DeviceError::BadConfig("only launches can be written down".to_owned()))
}

// SAFETY: it gives no memory.
unsafe impl Launcher for Recorder {
    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn kernel(&self, _name: &CStr, _shared_bytes: u32) -> Result<Kernel, DeviceError> {
        refused()
    }

    unsafe fn launch(&self, kernel: Kernel, launch: Launch, arguments: &[u8]) -> Result<(), DeviceError> {
        let Launch { grid, threads, shared_bytes } = launch;
        let grid = Grid { blocks: grid, threads, shared_bytes };
        let mut launches = self.launches.lock().unwrap_or_else(PoisonError::into_inner);
        launches.push(Launched { kernel, grid, arguments: arguments.to_vec() });
        Ok(())
    }

    fn allocate(&self, _bytes: usize) -> Result<u64, DeviceError> {
        refused()
    }

    unsafe fn free(&self, _address: u64) {}

    fn pin(&self, _bytes: usize) -> Result<HostBuffer, DeviceError> {
        refused()
    }

    unsafe fn upload(&self, _to: u64, _bytes: &[u8]) -> Result<(), DeviceError> {
        refused()
    }

    unsafe fn copy(&self, _from: u64, _to: u64, _bytes: usize) -> Result<(), DeviceError> {
        refused()
    }

    unsafe fn download(&self, _from: u64, _bytes: &mut [u8]) -> Result<(), DeviceError> {
        refused()
    }
}
