//! The machine: virtual ranges, physical pages, mapping, copy streams and events.
//!
//! A device has a fixed number of physical pages, made once at start. [`Arena`]s are stable virtual ranges; an
//! [`Extent`] is the exclusive right to some bytes of an arena, and exactly the pages under live extents are mapped.
//! Dropping an extent takes the pages and leaves the address. What is kept, and for how long, is decided above.
//!
//! This crate is one of the two places where `unsafe` is allowed. Its invariants:
//! 1. every mapped page of an arena is under at least one live extent, every other page of it is inaccessible; a
//!    segment ([`Arena::segment`]) alone keeps all pages mapped for as long as it lives;
//! 2. live extents of an arena never overlap, so an extent is a unique owner like a `Box<[u8]>`;
//! 3. a physical page is mapped at no more than one address;
//! 4. no byte is readable through an extent that an earlier owner wrote, unless the new owner asked for an extent
//!    that it will overwrite ([`Contents::Overwritten`]).

#![allow(unsafe_code)]

mod arena;
pub mod cpu;
pub mod cuda;
mod pages;
mod stream;

pub use arena::{Arena, Claim, Contents, Extent, Memory, Piece};
pub use cuda::{HostBytes, HostPool, Pinned, Staging};
pub use stream::{Copy, Event, Stream};

/// What can go wrong on a device.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Not enough free physical pages; nothing was changed.
    #[error("device memory is exhausted: {needed} pages of {page_bytes} bytes are needed, {free} are free")]
    OutOfPages {
        /// Pages asked for.
        needed: usize,
        /// Pages free.
        free: usize,
        /// Bytes per page.
        page_bytes: usize,
    },
    /// A claim reaches outside its arena, is empty, or overlaps a live one.
    #[error("claim of {len} bytes at offset {offset} of an arena of {arena_bytes} bytes is {problem}")]
    BadClaim {
        /// Offset in the arena, bytes.
        offset: usize,
        /// Length, bytes.
        len: usize,
        /// Size of the arena, bytes.
        arena_bytes: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The operating system or driver refused.
    #[error("{operation} failed: {source}")]
    System {
        /// What was attempted.
        operation: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// There is no GPU that can be used.
    #[error(transparent)]
    NoGpu(#[from] cuda::NoGpu),
    /// What was asked for cannot be had.
    #[error("{0}")]
    BadConfig(String),
    /// The pool and the reserve are larger than what is free.
    #[error(
        "{device} has {free} bytes free, of which {reserve} are left for others: a pool of {wanted} bytes does not fit"
    )]
    TooLarge {
        /// Which device.
        device: String,
        /// Bytes of the pool.
        wanted: usize,
        /// Bytes free.
        free: usize,
        /// Bytes left alone.
        reserve: usize,
    },
    /// The GPU's driver refused; the device works on.
    #[error("{operation} failed on {device}: {error}")]
    Cuda {
        /// What was attempted.
        operation: &'static str,
        /// Which device.
        device: String,
        /// The driver's name for what went wrong.
        error: String,
    },
    /// The device does not work any more, and what was in its memory is gone. It can be opened anew when nothing of it
    /// is left.
    #[error("{device} is lost ({reason}); its memory has to be set up anew")]
    Lost {
        /// Which device.
        device: String,
        /// What happened.
        reason: String,
    },
}

/// A contiguous run of physical pages mapped, or to be mapped, at a contiguous range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address, a multiple of the page size.
    pub address: usize,
    /// Index of the first physical page.
    pub first_page: u32,
    /// Pages in the run.
    pub pages: u32,
}

/// One device's memory operations, in the shape of CUDA's virtual-memory calls: address reservation, physical pages
/// that exist from the start, mapping in batches, fills, and copy streams. Callers go through [`Arena`].
///
/// # Safety
/// Implementations must keep reserved ranges disjoint from all other memory of the process, must make a mapped
/// range readable and writable until it is unmapped, and must make an unmapped range inaccessible.
pub unsafe trait Device: Send + Sync {
    /// A name for people, e.g. `cpu`.
    fn name(&self) -> &str;

    /// Bytes per physical page, a power of two.
    fn page_bytes(&self) -> usize;

    /// Physical pages on the device.
    fn page_count(&self) -> usize;

    /// Reserves `bytes` (a multiple of the page size) of inaccessible address space and gives its first address.
    ///
    /// # Errors
    /// [`DeviceError::System`] when the address space is exhausted.
    fn reserve(&self, bytes: usize) -> Result<usize, DeviceError>;

    /// Gives a reservation back.
    ///
    /// # Safety
    /// The range must be exactly one reservation with nothing mapped in it and nobody holding addresses into it.
    unsafe fn unreserve(&self, address: usize, bytes: usize);

    /// Maps physical pages. On error nothing of the batch stays mapped.
    ///
    /// # Errors
    /// [`DeviceError::System`] when the system refuses.
    ///
    /// # Safety
    /// The addresses must lie in a reservation and be unmapped; the pages must be mapped nowhere else.
    unsafe fn map(&self, batch: &[Mapping]) -> Result<(), DeviceError>;

    /// Unmaps runs of pages; the ranges stay reserved.
    ///
    /// # Errors
    /// [`DeviceError::System`] when the system refuses; the pages then count as lost.
    ///
    /// # Safety
    /// Exactly these pages must be mapped there, and nobody may hold references into them.
    unsafe fn unmap(&self, batch: &[Mapping]) -> Result<(), DeviceError>;

    /// Fills mapped ranges (address, bytes) with zeros before returning.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], [`DeviceError::Cuda`]; the ranges then have anything in them.
    ///
    /// # Safety
    /// The ranges must be mapped and nobody else may access them.
    unsafe fn zero(&self, batch: &[(usize, usize)]) -> Result<(), DeviceError>;

    /// Copies mapped bytes to another mapped range before returning; the two may overlap.
    ///
    /// # Errors
    /// [`DeviceError::Lost`].
    ///
    /// # Safety
    /// Both ranges must be mapped and nobody else may access either.
    unsafe fn copy(&self, from: usize, to: usize, bytes: usize) -> Result<(), DeviceError>;

    /// Copies mapped bytes to host memory before returning.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], [`DeviceError::Cuda`].
    ///
    /// # Safety
    /// As many bytes as `into` has must be mapped there, and nobody may write them.
    unsafe fn read(&self, address: usize, into: &mut [u8]) -> Result<(), DeviceError>;

    /// Copies host memory to mapped bytes before returning.
    ///
    /// # Errors
    /// [`DeviceError::Lost`], [`DeviceError::Cuda`].
    ///
    /// # Safety
    /// As many bytes as `from` has must be mapped there, and nobody else may access them.
    unsafe fn write(&self, from: &[u8], address: usize) -> Result<(), DeviceError>;

    /// Prepares a mapped range for being written from end to end, where that makes the writing cheaper.
    ///
    /// # Safety
    /// The range must be mapped and nobody else may access it.
    unsafe fn prepare_write(&self, address: usize, bytes: usize);

    /// Whether the host can read and write mapped ranges by their address.
    fn host_accessible(&self) -> bool;

    /// The device's copy streams; each runs its copies in order, different streams run side by side.
    fn streams(&self) -> &[Stream];

    /// Where a load puts its bytes on a device that the host cannot address.
    fn staging(&self) -> Option<&Staging> {
        None
    }

    /// Pinned host memory for this device, none of it taken yet, where the host's memory is not the device's own.
    fn host_pool(&self) -> Option<HostPool> {
        None
    }

    /// Why the device works no more, if that is so: [`DeviceError::Lost`].
    fn lost(&self) -> Option<DeviceError> {
        None
    }
}
