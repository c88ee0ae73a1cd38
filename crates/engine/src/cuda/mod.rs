//! Execution on NVIDIA GPUs: kernels, their launches, and the order in which a forward pass needs them.
//!
//! The kernels are CUDA C++ (`kernels/cuda`), compiled ahead by `scripts/cuda-kernels.sh` and embedded
//! ([`bundle`]); nothing is compiled at run time, and building this crate needs no CUDA. Whoever owns the GPU is behind
//! [`Gpu`]; [`Driver`] is the installed driver. The promise of this crate holds here too: a row's result does not
//! depend on the rest of the batch.
#![allow(unsafe_code)]

pub mod bundle;
mod driver;
mod executor;
mod experts;
mod forward;
mod kernels;
pub mod launch;
mod memory;
mod plan;

pub use driver::Driver;
pub use executor::{ALIGNMENT, Addresses, CudaExecutor, CudaPass, ExecuteError, Region};
pub use kernels::*;
pub use launch::{Launch, ProductKind};
pub use memory::Buffer;

use std::ffi::{CStr, c_void};

/// What a GPU, or its driver, cannot do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// There is no driver, or no GPU.
    #[error("no GPU: {0}")]
    Missing(String),
    /// The driver refused. After a failed launch it refuses everything.
    #[error("{operation}: {error}")]
    Driver {
        /// What was attempted.
        operation: &'static str,
        /// The driver's name for the error.
        error: String,
    },
}

/// A kernel that is ready to be launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function(pub usize);

/// A GPU with the embedded kernels loaded and a stream on which they run. Calls take effect in their order.
///
/// # Safety
/// Memory that was allocated must be readable and writable by kernels until it is freed, and disjoint from all other.
pub unsafe trait Gpu: Send + Sync {
    /// How many multiprocessors it has.
    fn multiprocessors(&self) -> u32;

    /// The kernel of this name, allowed to use up to `shared_bytes` of shared memory.
    ///
    /// # Errors
    /// [`GpuError::Driver`] if there is none, or it cannot have so much.
    fn function(&self, name: &CStr, shared_bytes: u32) -> Result<Function, GpuError>;

    /// Launches a kernel.
    ///
    /// # Errors
    /// [`GpuError::Driver`] when the driver refuses. That the kernel itself failed shows in a later call.
    ///
    /// # Safety
    /// `arguments` must point to the kernel's argument structure, and all that the kernel accesses by it must stay
    /// allocated until the kernel is done.
    unsafe fn launch(
        &self,
        function: Function,
        launch: Launch,
        arguments: *const c_void,
    ) -> Result<(), GpuError>;

    /// Allocates `bytes` (more than 0), aligned to 256 on a real GPU and to 16 at least; contents are undefined.
    ///
    /// # Errors
    /// [`GpuError::Driver`] when there is not enough memory.
    fn allocate(&self, bytes: usize) -> Result<u64, GpuError>;

    /// Frees what was allocated, when everything submitted so far is done.
    ///
    /// # Safety
    /// The address must come from [`Gpu::allocate`], once, and nothing submitted later may use it.
    unsafe fn free(&self, address: u64);

    /// Copies to the GPU. The bytes have been read when it returns.
    ///
    /// # Errors
    /// [`GpuError::Driver`] when the driver refuses.
    ///
    /// # Safety
    /// The destination must be allocated.
    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), GpuError>;

    /// Copies from the GPU, after everything submitted so far; waits for it.
    ///
    /// # Errors
    /// [`GpuError::Driver`] when the driver refuses, or an earlier launch failed.
    ///
    /// # Safety
    /// The source must be allocated.
    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), GpuError>;
}
