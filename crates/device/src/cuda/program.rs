//! Code on a GPU: a loaded module, launches of its kernels in order, and the memory that they work in.
//!
//! An error of a kernel shows in a later call. It ends the context, and so loses the GPU with all that is in its memory.

use std::ffi::{CStr, c_void};
use std::sync::Arc;

use super::driver::{FunctionHandle, MOST_SHARED_BYTES, ModuleHandle, StreamHandle, attribute};
use super::gpu::Gpu;
use super::pinned::PinnedBytes;
use super::queue::Queue;
use crate::DeviceError;

/// Kernels of one module, run in the order in which they are launched.
pub struct Program {
    gpu: Arc<Gpu>,
    queue: Queue,
    module: ModuleHandle,
    multiprocessors: u32,
}

/// A kernel of a [`Program`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kernel(pub(super) usize);

/// How many threads run a kernel, and with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Blocks in each dimension.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared_bytes: u32,
}

// SAFETY: the module is a name that the driver takes from any thread.
unsafe impl Send for Program {}
// SAFETY: as above.
unsafe impl Sync for Program {}

impl Program {
    /// Loads a module.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when the driver cannot: code for other GPUs, say, or not enough memory.
    ///
    /// # Safety
    /// `image` must be a whole cubin or fat binary, or PTX that ends with a 0: the driver is not told where it ends.
    pub unsafe fn load(gpu: &Arc<Gpu>, image: &[u8]) -> Result<Program, DeviceError> {
        let queue = Queue::new(gpu)?;
        let mut module = std::ptr::null_mut();
        gpu.call("loading kernels", |driver| {
            // SAFETY: the pointers are to a live variable and to an image that is whole, as the caller says.
            unsafe { (driver.cuModuleLoadData)(&mut module, image.as_ptr().cast()) }
        })?;
        let multiprocessors = gpu.attribute(attribute::MULTIPROCESSORS);
        let multiprocessors = multiprocessors.and_then(|count| count.try_into().ok()).unwrap_or(1);
        Ok(Program { gpu: gpu.clone(), queue, module, multiprocessors })
    }

    pub(super) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    pub(super) fn stream(&self) -> StreamHandle {
        self.queue.stream()
    }

    /// How many multiprocessors the GPU has.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// The kernel of this name, allowed to use up to `shared_bytes` of shared memory.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] if there is none, or it cannot have so much.
    pub fn kernel(&self, name: &CStr, shared_bytes: u32) -> Result<Kernel, DeviceError> {
        let mut function: FunctionHandle = std::ptr::null_mut();
        self.gpu.call("finding a kernel", |driver| {
            // SAFETY: the pointers are to a live variable and a string that ends with 0; the module is loaded.
            unsafe { (driver.cuModuleGetFunction)(&mut function, self.module, name.as_ptr()) }
        })?;
        self.gpu.call("giving a kernel shared memory", |driver| {
            // SAFETY: the function was just found.
            unsafe { (driver.cuFuncSetAttribute)(function, MOST_SHARED_BYTES, shared_bytes as i32) }
        })?;
        Ok(Kernel(function as usize))
    }

    /// Launches a kernel, whose one parameter is a structure.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when the driver refuses; [`DeviceError::Lost`] also for a kernel launched earlier.
    ///
    /// # Safety
    /// The kernel must be of this program and `arguments` point to its structure, and all that the kernel accesses by it
    /// must stay mapped or allocated, and nobody else's, until the kernel is done.
    pub unsafe fn launch(
        &self,
        kernel: Kernel,
        grid: Grid,
        arguments: *const c_void,
    ) -> Result<(), DeviceError> {
        let ([x, y, z], stream, mut parameters) = (grid.blocks, self.queue.stream(), [arguments]);
        self.gpu.call("launching a kernel", |driver| {
            // SAFETY: the driver copies the structure before it returns; the rest is the caller's promise.
            unsafe {
                (driver.cuLaunchKernel)(
                    kernel.0 as FunctionHandle,
                    x,
                    y,
                    z,
                    grid.threads,
                    1,
                    1,
                    grid.shared_bytes,
                    stream,
                    parameters.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            }
        })
    }

    /// Waits for everything launched and copied so far.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    pub fn wait(&self) -> Result<(), DeviceError> {
        self.queue.wait()
    }

    /// Allocates `bytes` (more than 0) beside the pool, aligned to 256, with anything in them.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when there is not enough memory; [`DeviceError::Lost`].
    pub fn allocate(&self, bytes: usize) -> Result<usize, DeviceError> {
        let mut address = 0;
        self.gpu.call("allocating working memory", |driver| {
            // SAFETY: the pointer is to a live variable.
            unsafe { (driver.cuMemAlloc_v2)(&mut address, bytes) }
        })?;
        Ok(address as usize)
    }

    /// Frees what was allocated, when everything launched so far is done. On a lost GPU it goes with the context.
    ///
    /// # Safety
    /// The address must come from [`Program::allocate`], once, and nothing launched later may use it.
    pub unsafe fn free(&self, address: usize) {
        let _ = self.wait();
        // SAFETY: allocated and unused, as the caller says.
        let _ = self
            .gpu
            .must("freeing working memory", |driver| unsafe { (driver.cuMemFree_v2)(address as u64) });
    }

    /// Pins `bytes` (more than 0) of host memory for uploads.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when the system does not give so much, [`DeviceError::Lost`].
    pub fn pin(&self, bytes: usize) -> Result<PinnedBytes, DeviceError> {
        PinnedBytes::new(&self.gpu, bytes)
    }

    /// Copies to the GPU, after everything launched so far. The bytes have been read when it returns, unless they are
    /// pinned.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`], [`DeviceError::Lost`].
    ///
    /// # Safety
    /// The destination must be mapped or allocated, and nobody else's, until the copy is done; so long pinned bytes must
    /// stay as they are.
    pub unsafe fn upload(&self, to: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        // SAFETY: as the caller says; memory that is not pinned is copied aside before this returns.
        unsafe { self.queue.to_device(bytes.as_ptr().cast(), to, bytes.len()) }
    }

    /// Copies on the GPU, after everything launched so far.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`], [`DeviceError::Lost`].
    ///
    /// # Safety
    /// Both ranges must be mapped or allocated until the copy is done, apart from each other, and nobody may write the one
    /// or access the other meanwhile.
    pub unsafe fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<(), DeviceError> {
        let stream = self.queue.stream();
        self.gpu.call("copying on the GPU", |driver| {
            // SAFETY: as the caller says.
            unsafe { (driver.cuMemcpyDtoDAsync_v2)(to as u64, from as u64, bytes, stream) }
        })
    }

    /// Copies from the GPU, after everything launched so far, and waits for it.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`], [`DeviceError::Lost`].
    ///
    /// # Safety
    /// The source must be mapped or allocated.
    pub unsafe fn download(&self, from: usize, bytes: &mut [u8]) -> Result<(), DeviceError> {
        // SAFETY: as the caller says; the destination is ours until this has waited.
        let enqueued = unsafe { self.queue.to_host(from, bytes.as_mut_ptr().cast(), bytes.len()) };
        self.queue.wait().and(enqueued)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.wait();
        let module = self.module;
        // SAFETY: loaded by `load`, and no kernel of it runs any more.
        let _ = self.gpu.must("unloading kernels", |driver| unsafe { (driver.cuModuleUnload)(module) });
    }
}
