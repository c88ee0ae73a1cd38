//! Execution on NVIDIA GPUs: kernels, their launches, and the order in which a forward pass needs them.
//!
//! The kernels are CUDA C++ (`kernels/cuda`), compiled ahead by `scripts/cuda-kernels.sh` and embedded
//! ([`bundle`]); nothing is compiled at run time, and building this crate needs no CUDA. The GPU belongs to the device
//! crate; kernels run on it as a [`Program`](tangram_device::cuda::Program) of theirs. The promise of this crate holds here too: a row's result does
//! not depend on the rest of the batch.
#![allow(unsafe_code)]

pub mod bundle;
mod constants;
mod early;
mod executor;
mod experts;
mod forward;
mod graphs;
mod head;
mod kernels;
pub mod launch;
mod lent;
mod memory;
mod plan;
mod program;
mod record;
mod room;
mod select;
mod working;

pub use executor::{ALIGNMENT, Addresses, Counts, CudaExecutor, CudaPass, ExecuteError, Region};
pub use kernels::*;
pub use launch::{Launch, ProductKind};
pub use memory::Buffer;
pub use program::load;
pub use tangram_device::cuda::Kernel;

use std::ffi::CStr;

use tangram_device::DeviceError;
use tangram_device::cuda::{Graph, Launched};

use crate::device::HostBuffer;

/// A GPU with kernels loaded and a stream on which they run. Calls take effect in their order. An error that is
/// [`DeviceError::Lost`] ends all use of it.
///
/// # Safety
/// Memory that was allocated must be readable and writable by kernels until it is freed, and disjoint from all other.
pub unsafe trait Launcher: Send + Sync {
    /// How many multiprocessors it has.
    fn multiprocessors(&self) -> u32;

    /// The kernel of this name, allowed to use up to `shared_bytes` of shared memory.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] if there is none, or it cannot have so much.
    fn kernel(&self, name: &CStr, shared_bytes: u32) -> Result<Kernel, DeviceError>;

    /// Launches a kernel.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when the driver refuses. That the kernel itself failed shows in a later call.
    ///
    /// # Safety
    /// `arguments` must be the bytes of the kernel's argument structure, and all that the kernel accesses by it must stay
    /// allocated until the kernel is done.
    unsafe fn launch(&self, kernel: Kernel, launch: Launch, arguments: &[u8]) -> Result<(), DeviceError>;

    /// Puts launches together, to be done in their order by [`Launcher::replay`].
    ///
    /// # Errors
    /// [`DeviceError`] where there are no graphs, or the driver refuses.
    ///
    /// # Safety
    /// The kernels must be of this GPU, and the arguments of each the bytes of its structure.
    unsafe fn graph(&self, launches: &[Launched]) -> Result<Graph, DeviceError> {
        let _ = launches;
        Err(DeviceError::BadConfig("there are no graphs here".to_owned()))
    }

    /// Launches all that a graph holds.
    ///
    /// # Errors
    /// As [`Launcher::launch`].
    ///
    /// # Safety
    /// The graph must be of this GPU, live until it has been waited for, and be replayed by one thread at a time; for each
    /// of its launches what [`Launcher::launch`] demands must hold.
    unsafe fn replay(&self, graph: &Graph) -> Result<(), DeviceError> {
        let _ = graph;
        Err(DeviceError::BadConfig("there are no graphs here".to_owned()))
    }

    /// Allocates `bytes` (more than 0), aligned to 256 on a real GPU and to 16 at least; contents are undefined.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when there is not enough memory.
    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError>;

    /// Frees what was allocated, when everything submitted so far is done.
    ///
    /// # Safety
    /// The address must come from [`Launcher::allocate`], once, and nothing submitted later may use it.
    unsafe fn free(&self, address: u64);

    /// Pins `bytes` (more than 0) of host memory, from which uploads are fastest.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when the system does not give so much.
    fn pin(&self, bytes: usize) -> Result<HostBuffer, DeviceError>;

    /// Copies to the GPU. The bytes have been read when it returns, unless they are pinned.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when the driver refuses.
    ///
    /// # Safety
    /// The destination must be allocated, and pinned bytes must stay as they are until the copy is done.
    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), DeviceError>;

    /// Copies on the GPU, after everything submitted so far.
    ///
    /// # Errors
    /// [`DeviceError`] when the driver refuses.
    ///
    /// # Safety
    /// Both ranges must be allocated or a tensor's, apart from each other, and stay until the copy is done.
    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), DeviceError>;

    /// Copies from the GPU, after everything submitted so far; waits for it.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when the driver refuses, or an earlier launch failed.
    ///
    /// # Safety
    /// The source must be allocated.
    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), DeviceError>;
}
