//! Buffers for direct reads, and for what is stored otherwise than it is used.
//!
//! Large ones lie in huge pages: the kernel handles each page of a direct read by itself, which with small ones takes as
//! long as the read.

#![allow(unsafe_code)]

use std::ptr::NonNull;

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;
/// Buffers from here on are large.
const LARGE: usize = 256 << 10;

/// Zeroed memory at an address that suits every disk's direct reads.
pub(crate) struct Buffer(Memory);

enum Memory {
    /// On the heap, from this byte on.
    Heap(Vec<u8>, usize),
    Mapped(Mapped),
}

/// Memory of its own.
struct Mapped {
    /// The whole range.
    range: NonNull<u8>,
    range_len: usize,
    /// Where the buffer begins in it, and how long it is.
    start: usize,
    len: usize,
}

// SAFETY: the memory is the value's own, as a vector's is.
unsafe impl Send for Mapped {}

impl Mapped {
    /// `None` if the system does not give it.
    fn new(len: usize) -> Option<Mapped> {
        let range_len = len.checked_next_multiple_of(HUGE)? + HUGE;
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: new memory, where the kernel has room for it.
        let range = unsafe { libc::mmap(std::ptr::null_mut(), range_len, access, flags, -1, 0) };
        if range == libc::MAP_FAILED {
            return None;
        }
        let start = (range as usize).next_multiple_of(HUGE) - range as usize;
        let mapped = Mapped { range: NonNull::new(range.cast())?, range_len, start, len };
        // SAFETY: advice on that memory. Where it is not taken, the pages are small.
        let _ = unsafe { libc::madvise(range, range_len, libc::MADV_HUGEPAGE) };
        Some(mapped)
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and borrowed from the value by whoever used it.
        unsafe { libc::munmap(self.range.as_ptr().cast(), self.range_len) };
    }
}

impl Buffer {
    /// What addresses are multiples of.
    pub(crate) const ALIGNMENT: usize = 4096;

    /// A buffer of at least `len` bytes.
    pub(crate) fn new(len: usize) -> Buffer {
        if len >= LARGE
            && let Some(mapped) = Mapped::new(len)
        {
            return Buffer(Memory::Mapped(mapped));
        }
        let bytes = vec![0; len + Buffer::ALIGNMENT];
        let address = bytes.as_ptr() as usize;
        Buffer(Memory::Heap(bytes, address.next_multiple_of(Buffer::ALIGNMENT) - address))
    }

    /// Its bytes; as long as the buffer lives they stay where they are.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        match &mut self.0 {
            Memory::Heap(bytes, start) => {
                let end = bytes.len() - Buffer::ALIGNMENT + *start;
                &mut bytes[*start..end]
            }
            Memory::Mapped(Mapped { range, start, len, .. }) => {
                // SAFETY: within the mapped range, whose only owner is borrowed.
                unsafe { std::slice::from_raw_parts_mut(range.as_ptr().add(*start), *len) }
            }
        }
    }

    /// How many bytes it has.
    pub(crate) fn len(&self) -> usize {
        match &self.0 {
            Memory::Heap(bytes, _) => bytes.len() - Buffer::ALIGNMENT,
            Memory::Mapped(mapped) => mapped.len,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_all_sizes_are_aligned_zeroed_and_their_own() {
        for len in [0, 1, 5000, LARGE - 1, LARGE, HUGE, HUGE + 4097] {
            let mut pair = [Buffer::new(len), Buffer::new(len)];
            for (fill, buffer) in (1..).zip(&mut pair) {
                assert_eq!((buffer.len(), buffer.bytes().len()), (len, len));
                assert!((buffer.bytes().as_ptr() as usize).is_multiple_of(Buffer::ALIGNMENT));
                assert!(buffer.bytes().iter().all(|&byte| byte == 0));
                buffer.bytes().fill(fill);
            }
            let [first, second] = &mut pair;
            assert!(
                first.bytes().iter().all(|&byte| byte == 1) && second.bytes().iter().all(|&byte| byte == 2)
            );
        }
    }
}
