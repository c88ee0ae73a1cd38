//! The CPU as a device: physical pages are offsets of one memory file, mapped shared at fixed addresses.
//!
//! The file takes memory from the system only when a page is first written. It must never be mapped twice at once:
//! the resident set would count such a page twice and the aliasing rules of [`crate::Arena`] would break.

use std::ffi::c_void;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::{Device, DeviceError, Mapping, Memory, Stream};

/// Copy threads of the CPU device. One keeps a page-cache copy going, the second hides the time in which the first
/// hashes; more would take cores from the forward pass.
const STREAMS: usize = 2;

/// Alignment of reservations, so that a huge page can back an aligned part of any arena.
const RESERVATION_ALIGNMENT: usize = 2 << 20;

/// Pages of one memory file.
pub struct CpuDevice {
    file: OwnedFd,
    page_bytes: usize,
    page_count: usize,
    streams: Vec<Stream>,
}

fn system(operation: &'static str) -> impl Fn(rustix::io::Errno) -> DeviceError {
    move |errno| DeviceError::System { operation, source: errno.into() }
}

impl CpuDevice {
    /// A page size that bounds the number of mappings (the kernel allows a process 65,530) and the rounding of
    /// small pools: a 4096th of the pool, between the system page and 2 MiB, more only for pools over 16 GiB.
    pub fn default_page_bytes(pool_bytes: usize) -> usize {
        let wanted = (pool_bytes / 4096).next_power_of_two();
        let upper = if pool_bytes > (16 << 30) { wanted } else { 2 << 20 };
        wanted.clamp(rustix::param::page_size(), upper)
    }

    /// A page size that a user asked for, if a pool of `pool_bytes` can have it.
    ///
    /// # Errors
    /// What is wrong with it, for the user.
    pub fn checked_page_bytes(pool_bytes: usize, page_bytes: usize) -> Result<usize, String> {
        let least = rustix::param::page_size();
        if !page_bytes.is_power_of_two() || page_bytes < least || page_bytes > pool_bytes {
            return Err(format!(
                "a page of {page_bytes} bytes cannot be had: a power of two from {least} to the pool's size can"
            ));
        }
        Ok(page_bytes)
    }

    /// Makes a device of `pool_bytes / page_bytes` pages (rounded down) and opens its memory.
    ///
    /// # Errors
    /// [`DeviceError::System`] when the memory file or the copy threads cannot be made.
    pub fn open(pool_bytes: usize, page_bytes: usize) -> Result<Arc<Memory>, DeviceError> {
        assert!(page_bytes.is_power_of_two() && page_bytes >= rustix::param::page_size());
        let page_count = pool_bytes / page_bytes;
        let file = memfd_create("tangram-pool", MemfdFlags::CLOEXEC)
            .map_err(system("creating the pool's memory file"))?;
        ftruncate(&file, (page_count * page_bytes) as u64)
            .map_err(system("sizing the pool's memory file"))?;
        let streams = (0..STREAMS)
            .map(|i| Stream::start(&format!("copy-{i}")))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| DeviceError::System { operation: "starting a copy thread", source })?;
        Ok(Memory::new(Box::new(CpuDevice { file, page_bytes, page_count, streams })))
    }
}

// SAFETY: reservations come from the kernel as fresh anonymous mappings and so are disjoint from everything else;
// `map` replaces parts of them by shared read-write mappings of the memory file; `unmap` puts inaccessible
// anonymous memory back.
unsafe impl Device for CpuDevice {
    fn name(&self) -> &str {
        "cpu"
    }

    fn page_bytes(&self) -> usize {
        self.page_bytes
    }

    fn page_count(&self) -> usize {
        self.page_count
    }

    fn reserve(&self, bytes: usize) -> Result<usize, DeviceError> {
        let alignment = RESERVATION_ALIGNMENT.max(self.page_bytes);
        let padded = bytes.checked_add(alignment).ok_or(DeviceError::System {
            operation: "reserving address space",
            source: std::io::ErrorKind::OutOfMemory.into(),
        })?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                padded,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .map_err(system("reserving address space"))? as usize;
        let address = start.next_multiple_of(alignment);
        let tail = start + padded - (address + bytes);
        // SAFETY: both trimmed parts belong to the mapping made above and nobody has seen their addresses.
        unsafe {
            if address > start {
                let _ = munmap(start as *mut c_void, address - start);
            }
            if tail > 0 {
                let _ = munmap((address + bytes) as *mut c_void, tail);
            }
        }
        Ok(address)
    }

    unsafe fn unreserve(&self, address: usize, bytes: usize) {
        // SAFETY: the caller says that this is one whole reservation that nobody uses any more.
        let _ = unsafe { munmap(address as *mut c_void, bytes) };
    }

    unsafe fn map(&self, batch: &[Mapping]) -> Result<(), DeviceError> {
        for (done, mapping) in batch.iter().enumerate() {
            let bytes = mapping.pages as usize * self.page_bytes;
            // SAFETY: the caller says that the range lies in a reservation and is unmapped, so replacing it
            // destroys nothing; the pages are mapped nowhere else.
            let mapped = unsafe {
                mmap(
                    mapping.address as *mut c_void,
                    bytes,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED | MapFlags::FIXED,
                    &self.file,
                    mapping.first_page as u64 * self.page_bytes as u64,
                )
            };
            if let Err(errno) = mapped {
                let undo: Vec<_> =
                    batch[..done].iter().map(|m| (m.address, m.pages as usize * self.page_bytes)).collect();
                // SAFETY: these runs were mapped by this call and nobody has been told.
                let _ = unsafe { self.unmap(&undo) };
                return Err(system("mapping pages")(errno));
            }
            if bytes >= RESERVATION_ALIGNMENT {
                // Advice only: a kernel without huge pages for shared memory refuses it, and nothing is lost.
                // SAFETY: the range was mapped just above.
                let _ = unsafe { madvise(mapping.address as *mut c_void, bytes, Advice::LinuxHugepage) };
            }
        }
        Ok(())
    }

    unsafe fn unmap(&self, batch: &[(usize, usize)]) -> Result<(), DeviceError> {
        for &(address, bytes) in batch {
            // SAFETY: the caller says that nobody uses the range; it stays reserved as inaccessible memory.
            unsafe {
                mmap_anonymous(
                    address as *mut c_void,
                    bytes,
                    ProtFlags::empty(),
                    MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
                )
            }
            .map_err(system("unmapping pages"))?;
        }
        Ok(())
    }

    unsafe fn zero(&self, batch: &[(usize, usize)]) -> Result<(), DeviceError> {
        for &(address, bytes) in batch {
            // SAFETY: the caller says that the range is mapped and exclusively his.
            unsafe { std::ptr::write_bytes(address as *mut u8, 0, bytes) };
        }
        Ok(())
    }

    unsafe fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller says that both ranges are mapped and exclusively his; `copy` allows overlap.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn read(&self, address: usize, into: &mut [u8]) -> Result<(), DeviceError> {
        // SAFETY: the caller says that the range is mapped and that nobody writes it.
        into.copy_from_slice(unsafe { std::slice::from_raw_parts(address as *const u8, into.len()) });
        Ok(())
    }

    unsafe fn write(&self, from: &[u8], address: usize) -> Result<(), DeviceError> {
        // SAFETY: the caller says that the range is mapped and exclusively his.
        unsafe { std::slice::from_raw_parts_mut(address as *mut u8, from.len()) }.copy_from_slice(from);
        Ok(())
    }

    unsafe fn prepare_write(&self, address: usize, bytes: usize) {
        // One call fills the page tables of the whole range, where writing would fault page by page. Populating for
        // reading maps the pages around each fault as well, and writable like the mapping, which takes two thirds of the
        // time that populating for writing does. Advice only: older kernels refuse, and nothing is lost.
        let page = rustix::param::page_size();
        let (start, end) = (address / page * page, (address + bytes).next_multiple_of(page));
        // SAFETY: the caller says that the range is mapped; populating changes no byte. The pages at its ends are
        // mapped whole.
        let _ = unsafe { madvise(start as *mut c_void, end - start, Advice::LinuxPopulateRead) };
    }

    fn host_accessible(&self) -> bool {
        true
    }

    fn streams(&self) -> &[Stream] {
        &self.streams
    }
}
