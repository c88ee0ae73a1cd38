//! NVIDIA GPUs as devices: physical pages that are made once at start, mapped where arenas want them.
//!
//! Everything goes through the driver library, which is loaded only when somebody asks for a GPU, so that the same
//! program runs where there is none. On the path of a request nothing is allocated: pages, pinned buffers, streams and
//! events exist from the start. The host cannot address this memory; loads go through [`Staging`].
//!
//! Memory operations here wait for themselves and for nothing else: whoever frees or reuses memory must first know
//! that no kernel uses it any more.

mod driver;
mod gpu;
mod graph;
mod host;
mod numa;
mod pinned;
mod program;
mod queue;
mod staging;
#[cfg(any(test, feature = "stand-in"))]
pub mod stand_in;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::sync::Arc;

pub use driver::{Driver, NoGpu};
pub use gpu::{Gpu, MemoryInfo};
pub use graph::{Graph, Launched};
pub use host::{HostBytes, HostPool};
pub use pinned::PinnedBytes;
pub use program::{Grid, Kernel, Program};
pub(crate) use staging::Transfer;
pub use staging::{ALIGNMENT, Pinned, Staging};

use crate::{Device, DeviceError, Mapping, Memory, Stream};
use driver::MemoryHandle;
use queue::Queue;

/// What a device is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaConfig {
    /// Which GPU, from 0.
    pub ordinal: i32,
    /// Bytes of the pool; all that is free but the reserve if `None`. Rounded down to whole pages.
    pub pool_bytes: Option<usize>,
    /// Bytes of a physical page, a power of two from the driver's granularity (2 MiB) to 32 times that; by the size of
    /// the pool if `None`.
    pub page_bytes: Option<usize>,
    /// Bytes of free memory that are left for the buffers of the executor, its libraries and other users of the GPU;
    /// by the GPU's memory if `None`.
    pub reserve_bytes: Option<usize>,
    /// Pinned host buffers for loading.
    pub buffers: usize,
    /// Bytes of each.
    pub buffer_bytes: usize,
}

impl CudaConfig {
    /// All that is free of this GPU but the default reserve. Buffers hold 2 MiB and what reading past the page cache
    /// adds on both sides; 32 of them keep a PCIe link busy while others are filled and verified.
    pub fn new(ordinal: i32) -> CudaConfig {
        CudaConfig {
            ordinal,
            pool_bytes: None,
            page_bytes: None,
            reserve_bytes: None,
            buffers: 32,
            buffer_bytes: (2 << 20) + 2 * ALIGNMENT,
        }
    }
}

/// Pages beyond which a pool gets larger ones: to make one takes the driver some 0.2 ms.
const PAGES: usize = 8192;
/// Largest page, in units of the driver's granularity.
const LARGEST_PAGE: usize = 32;
/// Largest piece in which overlapping ranges are moved through the scratch page rather than directly.
const DIRECT_MOVE: usize = 1 << 20;

/// Bytes from which on copies to and from memory that is not pinned go through pinned buffers: the driver would do the
/// same for them in smaller pieces, one after the other.
const LEAST_STAGED: usize = 64 << 10;

/// One GPU's memory as a device.
pub struct CudaDevice {
    gpu: Arc<Gpu>,
    queue: Queue,
    staging: Staging,
    streams: Vec<Stream>,
    page_bytes: usize,
    /// The physical pages.
    handles: Vec<MemoryHandle>,
    /// A page of its own for moving what overlaps: handle and address. Mapped as long as the device lives.
    scratch: Option<(MemoryHandle, usize)>,
}

/// A reserve that lets libraries and the executor's buffers live beside the pool.
fn default_reserve(total: usize) -> usize {
    (total / 32).max(1 << 30)
}

/// The smallest page with which the pool has not too many of them.
fn default_page_bytes(pool_bytes: usize, granularity: usize) -> usize {
    (pool_bytes / PAGES).next_power_of_two().clamp(granularity, granularity * LARGEST_PAGE)
}

impl CudaDevice {
    /// Sets the GPU up and takes its physical pages. A GPU that was lost can be opened again once nothing of the old
    /// device is left.
    ///
    /// # Errors
    /// [`DeviceError::NoGpu`], [`DeviceError::BadConfig`], [`DeviceError::TooLarge`] when less is free than the pool
    /// and the reserve take, [`DeviceError::Cuda`] when the driver refuses.
    pub fn open(driver: &Arc<Driver>, config: &CudaConfig) -> Result<CudaDevice, DeviceError> {
        let gpu = Gpu::open(driver, config.ordinal)?;
        let granularity = gpu.granularity()?.max(1);
        let staging = Staging::new(&gpu, config.buffers.max(1), config.buffer_bytes)?;
        let queue = Queue::new(&gpu)?;
        // After everything else that takes device memory.
        let memory = gpu.memory()?;
        let reserve = config.reserve_bytes.unwrap_or_else(|| default_reserve(memory.total));
        let available = memory.free.saturating_sub(reserve);
        let wanted = config.pool_bytes.unwrap_or(available);
        let page_bytes = config.page_bytes.unwrap_or_else(|| default_page_bytes(wanted, granularity));
        let largest = granularity * LARGEST_PAGE;
        if !page_bytes.is_power_of_two() || !(granularity..=largest).contains(&page_bytes) {
            return Err(DeviceError::BadConfig(format!(
                "a page of {page_bytes} bytes cannot be had: a power of two from {granularity} to {largest} can"
            )));
        }
        let device = gpu.name().to_owned();
        let too_large =
            |wanted, free| DeviceError::TooLarge { device: device.clone(), wanted, free, reserve };
        // The scratch page is taken from the reserve's side if the pool's size was said.
        let pages = match config.pool_bytes {
            Some(bytes) => bytes / page_bytes,
            None => (available / page_bytes).saturating_sub(1),
        };
        if pages == 0 || (pages + 1) * page_bytes > available {
            return Err(too_large(config.pool_bytes.unwrap_or(page_bytes), memory.free));
        }
        let threads = std::thread::available_parallelism().map_or(2, |threads| threads.get()).clamp(2, 8);
        let streams = (0..threads)
            .map(|i| Stream::start(&format!("cuda{}-fill-{i}", config.ordinal)))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| DeviceError::System { operation: "starting a copy thread", source })?;
        let (handles, scratch) = (Vec::with_capacity(pages), None);
        // From here on dropping the device gives back what it has taken.
        let mut device = CudaDevice { gpu, queue, staging, streams, page_bytes, handles, scratch };
        let gpu = device.gpu.clone();
        // Another process may have taken what was free a moment ago.
        let create = || match gpu.create(page_bytes)? {
            Some(handle) => Ok(handle),
            None => Err(too_large(pages * page_bytes, gpu.memory()?.free)),
        };
        let scratch = create()?;
        device.scratch = Some((scratch, 0));
        let address = gpu.reserve(page_bytes, page_bytes)?;
        device.scratch = Some((scratch, address));
        gpu.map(address, page_bytes, scratch)?;
        gpu.allow_access(address, page_bytes)?;
        for _ in 0..pages {
            device.handles.push(create()?);
        }
        Ok(device)
    }

    /// The GPU, for launching kernels on it.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// A file descriptor by which another process can map a physical page.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] where the driver does not share memory.
    pub fn export_page(&self, page: u32) -> Result<OwnedFd, DeviceError> {
        match self.handles.get(page as usize) {
            Some(&handle) => self.gpu.export(handle),
            None => Err(DeviceError::BadConfig(format!("there is no page {page}"))),
        }
    }

    /// The device with all its pages free.
    pub fn into_memory(self) -> Arc<Memory> {
        Memory::new(Box::new(self))
    }

    fn unmap_pages(&self, address: usize, bytes: usize) -> Result<(), DeviceError> {
        // The driver unmaps what was mapped by one call by one call.
        (address..address + bytes)
            .step_by(self.page_bytes)
            .try_for_each(|page| self.gpu.unmap(page, self.page_bytes))
    }

    fn map_run(&self, mapping: &Mapping, mapped: &mut Vec<(usize, usize)>) -> Result<(), DeviceError> {
        let first = mapping.first_page as usize;
        let pages = self.handles.get(first..first + mapping.pages as usize).unwrap_or_default();
        assert_eq!(pages.len(), mapping.pages as usize, "pages that the device does not have");
        for (index, &handle) in pages.iter().enumerate() {
            let address = mapping.address + index * self.page_bytes;
            self.gpu.map(address, self.page_bytes, handle)?;
            match mapped.last_mut() {
                Some((start, bytes)) if *start + *bytes == address => *bytes += self.page_bytes,
                _ => mapped.push((address, self.page_bytes)),
            }
        }
        Ok(())
    }

    /// Moves bytes within the device, to a range that may overlap the old one.
    fn enqueue_move(&self, from: usize, to: usize, bytes: usize) -> Result<(), DeviceError> {
        let distance = from.abs_diff(to);
        // SAFETY (of all copies below): the caller of `Device::copy` owns both ranges; the scratch page is this
        // device's own and moves take turns by the order of the queue. No piece overlaps where it goes.
        if distance >= bytes {
            // SAFETY: see above.
            return unsafe { self.queue.within(from, to, bytes) };
        }
        let direct = distance >= DIRECT_MOVE.min(self.page_bytes);
        let piece = if direct { distance } else { self.page_bytes };
        let pieces = bytes.div_ceil(piece);
        for step in 0..pieces {
            // What lies in the way of others goes first.
            let index = if to < from { step } else { pieces - 1 - step };
            let (at, len) = (index * piece, piece.min(bytes - index * piece));
            if direct {
                // SAFETY: see above; a piece is no longer than the way it goes.
                unsafe { self.queue.within(from + at, to + at, len) }?;
            } else if let Some((_, scratch)) = self.scratch {
                // SAFETY: see above; the scratch page is apart from every arena.
                unsafe {
                    self.queue.within(from + at, scratch, len)?;
                    self.queue.within(scratch, to + at, len)?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        // Arenas hold the device, so none is left. If the GPU is lost, it gives everything back itself.
        if let Some((handle, address)) = self.scratch {
            if address != 0 {
                // If it was never mapped, this loses the GPU, which cleans up what is left.
                let _ = self.gpu.unmap(address, self.page_bytes);
                let _ = self.gpu.unreserve(address, self.page_bytes);
            }
            let _ = self.gpu.release(handle);
        }
        for &handle in &self.handles {
            let _ = self.gpu.release(handle);
        }
    }
}

// SAFETY: the driver reserves addresses apart from all others of the process; a range is readable and writable (for the
// GPU, as `host_accessible` says) from `map`, which gives access, until `unmap`.
unsafe impl Device for CudaDevice {
    fn name(&self) -> &str {
        self.gpu.name()
    }

    fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    fn page_count(&self) -> usize {
        self.handles.len()
    }

    fn reserve(&self, bytes: usize) -> Result<usize, DeviceError> {
        self.gpu.reserve(bytes, self.page_bytes)
    }

    unsafe fn unreserve(&self, address: usize, bytes: usize) {
        // An error loses the GPU, which keeps the account of what is left.
        let _ = self.gpu.unreserve(address, bytes);
    }

    unsafe fn map(&self, batch: &[Mapping]) -> Result<(), DeviceError> {
        let mut mapped = Vec::new();
        let result = batch
            .iter()
            .try_for_each(|mapping| self.map_run(mapping, &mut mapped))
            // Access is what costs; neighbours get it together.
            .and_then(|()| {
                mapped.iter().try_for_each(|&(address, bytes)| self.gpu.allow_access(address, bytes))
            });
        if result.is_err() {
            // On an error of this the GPU is lost, and nothing of it stays mapped.
            let _ = mapped.iter().try_for_each(|&(address, bytes)| self.unmap_pages(address, bytes));
        }
        result
    }

    unsafe fn unmap(&self, batch: &[Mapping]) -> Result<(), DeviceError> {
        let unmap = |run: &Mapping| self.unmap_pages(run.address, run.pages as usize * self.page_bytes);
        batch.iter().try_for_each(unmap)
    }

    unsafe fn zero(&self, batch: &[(usize, usize)]) -> Result<(), DeviceError> {
        if batch.is_empty() {
            return Ok(());
        }
        // SAFETY: as the caller says; the ranges are his until this has waited.
        let enqueued =
            batch.iter().try_for_each(|&(address, bytes)| unsafe { self.queue.zero(address, bytes) });
        self.queue.wait().and(enqueued)
    }

    unsafe fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<(), DeviceError> {
        let enqueued = self.enqueue_move(from, to, bytes);
        self.queue.wait().and(enqueued)
    }

    unsafe fn read(&self, address: usize, into: &mut [u8]) -> Result<(), DeviceError> {
        // SAFETY: as the caller says.
        if into.len() >= LEAST_STAGED && unsafe { self.staging.download(&self.queue, address, into) }? {
            return Ok(());
        }
        // SAFETY: the device's range is mapped, as the caller says; the host's is ours until this has waited.
        let enqueued = unsafe { self.queue.to_host(address, into.as_mut_ptr().cast(), into.len()) };
        self.queue.wait().and(enqueued)
    }

    unsafe fn write(&self, from: &[u8], address: usize) -> Result<(), DeviceError> {
        // SAFETY: as the caller says.
        if from.len() >= LEAST_STAGED && unsafe { self.staging.upload_from(&self.queue, from, address) }? {
            return Ok(());
        }
        // SAFETY: as in `read`.
        let enqueued = unsafe { self.queue.to_device(from.as_ptr().cast(), address, from.len()) };
        self.queue.wait().and(enqueued)
    }

    unsafe fn prepare_write(&self, _address: usize, _bytes: usize) {
        // Mapped pages are there; there is nothing to make cheaper.
    }

    fn host_accessible(&self) -> bool {
        false
    }

    fn streams(&self) -> &[Stream] {
        &self.streams
    }

    fn staging(&self) -> Option<&Staging> {
        Some(&self.staging)
    }

    fn host_pool(&self) -> Option<HostPool> {
        Some(HostPool::new(&self.gpu))
    }

    fn lost(&self) -> Option<DeviceError> {
        self.gpu.lost()
    }
}
