//! The CPU as a device: physical pages are parts of one private range, their home, and mapping moves them elsewhere.
//!
//! `mremap` moves entries of page tables, 2 MiB by one entry where huge pages or whole tables can move, so that a page which
//! was written once is mapped again without a fault: mapping and unmapping a GiB takes a fraction of a millisecond of
//! processor time, where a memory file that is mapped and populated takes 28 (`examples/map_cost.rs`). Memory is taken from the
//! system when a page is first written. Nobody may touch the home of a page: it would get other memory there.

use std::ffi::c_void;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, MremapFlags, ProtFlags, madvise, mmap_anonymous, mremap_fixed, munmap};

use crate::{Device, DeviceError, Mapping, Memory, Stream};

/// Copy threads of the CPU device. One keeps a page-cache copy going, the second hides the time in which the first
/// verifies; more would take cores from the forward pass.
const STREAMS: usize = 2;

/// Bytes of a huge page, and of what one page table maps. Reservations are aligned to it, so that whole ones can move.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Pages with a home in one private range.
pub struct CpuDevice {
    /// Where page 0 is at home.
    home: usize,
    page_bytes: usize,
    page_count: usize,
    streams: Vec<Stream>,
}

fn system(operation: &'static str) -> impl Fn(rustix::io::Errno) -> DeviceError {
    move |errno| DeviceError::System { operation, source: errno.into() }
}

impl CpuDevice {
    /// A page size that bounds the number of mappings (the kernel allows a process 65,530) and the rounding of
    /// small pools: huge pages for 512 MiB and more, larger ones only for pools over 16 GiB; a 4096th of a small pool, but not
    /// less than the system's page.
    pub fn default_page_bytes(pool_bytes: usize) -> usize {
        let share = (pool_bytes / 4096).next_power_of_two();
        match pool_bytes >> 20 {
            0..512 => share.max(rustix::param::page_size()),
            512..=16_384 => HUGE_PAGE_BYTES,
            _ => share,
        }
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

    /// Makes a device of `pool_bytes / page_bytes` pages (rounded down), which take no memory yet.
    ///
    /// # Errors
    /// [`DeviceError::System`] when the address space is exhausted or the copy threads cannot be made.
    pub fn open(pool_bytes: usize, page_bytes: usize) -> Result<Arc<Memory>, DeviceError> {
        assert!(page_bytes.is_power_of_two() && page_bytes >= rustix::param::page_size());
        let page_count = pool_bytes / page_bytes;
        let streams = (0..STREAMS)
            .map(|i| Stream::start(&format!("copy-{i}")))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| DeviceError::System { operation: "starting a copy thread", source })?;
        let home = make_home(page_count * page_bytes, page_bytes)?;
        Ok(Memory::new(Box::new(CpuDevice { home, page_bytes, page_count, streams })))
    }

    fn home_of(&self, page: u32) -> usize {
        self.home + page as usize * self.page_bytes
    }
}

impl Drop for CpuDevice {
    fn drop(&mut self) {
        // SAFETY: made by `make_home` with this size. Every arena holds the device, so all pages are at home.
        let _ = unsafe { munmap(self.home as *mut c_void, home_bytes(self.page_count * self.page_bytes)) };
    }
}

/// Bytes of the home of pages of so many bytes: with the page that keeps it one mapping.
fn home_bytes(pages_bytes: usize) -> usize {
    pages_bytes + rustix::param::page_size()
}

/// Makes a private range for `bytes` bytes of pages.
fn make_home(bytes: usize, page_bytes: usize) -> Result<usize, DeviceError> {
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let home = reserve_aligned(home_bytes(bytes), HUGE_PAGE_BYTES.max(page_bytes), protection)?;
    // SAFETY: the range was mapped just above and nobody knows of it. Both advices change no byte: memory in huge pages is
    // read into with less work even where it is mapped in parts, and a child process that is yet to become another
    // program needs no copy of the pool. The write to the page behind the last one gives the range its reverse mapping
    // before anything is moved: what is moved shares it, and so joins its neighbours again when it comes back. Without it
    // each piece would stay a mapping of its own, and a move of several would be refused.
    unsafe {
        for advice in [Advice::LinuxHugepage, Advice::LinuxDontFork] {
            let _ = madvise(home as *mut c_void, home_bytes(bytes), advice);
        }
        std::ptr::write_volatile((home + bytes) as *mut u8, 1);
    }
    Ok(home)
}

/// Maps fresh private memory at an aligned address.
fn reserve_aligned(bytes: usize, alignment: usize, protection: ProtFlags) -> Result<usize, DeviceError> {
    let padded = bytes.checked_add(alignment).ok_or(DeviceError::System {
        operation: "reserving address space",
        source: std::io::ErrorKind::OutOfMemory.into(),
    })?;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), padded, protection, flags) }
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

/// Moves the pages of a mapped range to another, whose mapping is replaced. The old range stays mapped, with nothing in it.
///
/// # Safety
/// The caller must own both ranges, and nobody may hold references into either.
unsafe fn move_pages(from: usize, to: usize, bytes: usize) -> Result<(), rustix::io::Errno> {
    // SAFETY: as the caller says. Without `DONTUNMAP` the old range would be a hole, which another thread's mapping could
    // fall into.
    unsafe {
        mremap_fixed(
            from as *mut c_void,
            bytes,
            bytes,
            MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP,
            to as *mut c_void,
        )
    }
    .map(|_| ())
}

// SAFETY: reservations come from the kernel as fresh anonymous mappings and so are disjoint from everything else;
// `map` moves readable and writable memory to parts of them; `unmap` moves it back and leaves inaccessible memory.
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
        reserve_aligned(bytes, HUGE_PAGE_BYTES.max(self.page_bytes), ProtFlags::empty())
    }

    unsafe fn unreserve(&self, address: usize, bytes: usize) {
        // SAFETY: the caller says that this is one whole reservation that nobody uses any more.
        let _ = unsafe { munmap(address as *mut c_void, bytes) };
    }

    unsafe fn map(&self, batch: &[Mapping]) -> Result<(), DeviceError> {
        for (done, mapping) in batch.iter().enumerate() {
            let (from, bytes) = (self.home_of(mapping.first_page), mapping.pages as usize * self.page_bytes);
            // SAFETY: the caller says that the range lies in a reservation and is unmapped, so replacing it destroys
            // nothing, and that the pages are mapped nowhere else, so they are at home, where nobody looks.
            if let Err(errno) = unsafe { move_pages(from, mapping.address, bytes) } {
                // SAFETY: these runs were mapped by this call and nobody has been told.
                let _ = unsafe { self.unmap(&batch[..done]) };
                return Err(system("mapping pages (which takes Linux 5.7 or newer)")(errno));
            }
        }
        Ok(())
    }

    unsafe fn unmap(&self, batch: &[Mapping]) -> Result<(), DeviceError> {
        for mapping in batch {
            let bytes = mapping.pages as usize * self.page_bytes;
            // SAFETY: the caller says that nobody uses the range. Its pages go home, which is empty since they left. What
            // is left in their place is replaced by inaccessible memory, so it stays reserved.
            unsafe {
                move_pages(mapping.address, self.home_of(mapping.first_page), bytes)
                    .map_err(system("unmapping pages"))?;
                mmap_anonymous(
                    mapping.address as *mut c_void,
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
        // One call takes all the memory that the range lacks, where writing would fault page by page. Advice only: older
        // kernels refuse, and nothing is lost.
        let page = rustix::param::page_size();
        let (start, end) = (address / page * page, (address + bytes).next_multiple_of(page));
        // SAFETY: the caller says that the range is mapped; populating changes no byte. The pages at its ends are
        // mapped whole.
        let _ = unsafe { madvise(start as *mut c_void, end - start, Advice::LinuxPopulateWrite) };
    }

    fn host_accessible(&self) -> bool {
        true
    }

    fn streams(&self) -> &[Stream] {
        &self.streams
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Arena;
    use crate::arena::{Claim, Contents};

    /// Mappings of this process that lie in a range.
    fn mappings(start: usize, bytes: usize) -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let starts =
            maps.lines().map(|line| usize::from_str_radix(line.split('-').next().unwrap(), 16).unwrap());
        starts.filter(|at| (start..start + bytes).contains(at)).count()
    }

    #[test]
    fn pages_that_were_moved_about_join_again_at_home() {
        for (page, pages) in [(rustix::param::page_size(), 64), (HUGE_PAGE_BYTES, 8)] {
            let memory = CpuDevice::open(pages * page, page).unwrap();
            let arena = Arena::reserve(memory.clone(), 4 * pages * page).unwrap();
            assert_eq!(memory.host_bytes_taken(), 0);
            // Every other page first, so that the rest is mapped in pieces.
            let half = pages / 2;
            let even: Vec<_> = (0..half).map(|i| arena.claim((2 * i) * page, page).unwrap()).collect();
            let start = even[0].address();
            let mut odd = Vec::new();
            for index in 0..half {
                let claim = Claim { offset: (2 * index + 1) * page, len: page };
                let mut extents = arena.claim_all(&[claim], Contents::Overwritten).unwrap();
                extents[0].write(0, &[index as u8; 8]).unwrap();
                odd.append(&mut extents);
            }
            drop(even);
            // One claim over what is free, which lies in pieces, and then over everything at once.
            let large = arena.claim(2 * pages * page, half * page).unwrap();
            assert!(large.host_bytes().unwrap().iter().all(|&byte| byte == 0));
            for (index, extent) in odd.iter().enumerate() {
                assert_eq!(extent.host_bytes().unwrap()[..8], [index as u8; 8]);
            }
            drop((large, odd));
            assert_eq!((memory.free_pages(), memory.host_bytes_taken()), (pages, pages * page));
            let all = arena.claim(0, pages * page).unwrap();
            assert_eq!(mappings(start, pages * page), 1, "the pages came back in pieces that did not join");
            assert!(all.host_bytes().unwrap().iter().all(|&byte| byte == 0));
        }
    }
}
