//! Memory for activations: cache-line-aligned buffers that only grow, and disjoint writing from several threads.
#![allow(unsafe_code)]

use std::marker::PhantomData;

/// f32 per cache line.
const LINE: usize = 16;

#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([f32; LINE]);

/// A growing f32 buffer that starts at a cache line.
#[derive(Default)]
pub struct Buffer {
    lines: Vec<Line>,
}

impl Buffer {
    /// An empty buffer; allocates nothing.
    pub const fn new() -> Buffer {
        Buffer { lines: Vec::new() }
    }

    /// Makes room for at least `len` elements. Contents are kept, new elements are 0.
    pub fn reserve(&mut self, len: usize) {
        let lines = len.div_ceil(LINE);
        if self.lines.len() < lines {
            self.lines.reserve_exact(lines - self.lines.len());
            self.lines.resize(lines, Line([0.0; LINE]));
        }
    }

    /// The first `len` elements, which must have been reserved.
    pub fn get(&self, len: usize) -> &[f32] {
        assert!(len <= self.lines.len() * LINE, "buffer of {} lines read to {len}", self.lines.len());
        // SAFETY: a Line is 16 f32 without padding, and the length was checked.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), len) }
    }

    /// The first `len` elements, reserved if need be. Their contents are what was there before.
    pub fn get_mut(&mut self, len: usize) -> &mut [f32] {
        self.reserve(len);
        // SAFETY: a Line is 16 f32 without padding, and `reserve` made the length available.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }

    /// Bytes that a buffer for `len` elements holds.
    pub const fn bytes_for(len: usize) -> usize {
        len.div_ceil(LINE) * size_of::<Line>()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.lines.capacity() * size_of::<Line>()
    }
}

/// A slice of which several threads write disjoint parts.
pub(crate) struct Disjoint<'a> {
    data: *mut f32,
    len: usize,
    exclusive: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for an exclusive borrow; `part` demands that threads take disjoint parts.
unsafe impl Sync for Disjoint<'_> {}
// SAFETY: as above.
unsafe impl Send for Disjoint<'_> {}

impl<'a> Disjoint<'a> {
    pub(crate) fn new(slice: &'a mut [f32]) -> Disjoint<'a> {
        Disjoint { data: slice.as_mut_ptr(), len: slice.len(), exclusive: PhantomData }
    }

    /// Asks for the cache line of an element, which will be written; nothing happens if it does not exist.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(crate) fn ask_for(&self, index: usize) {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        // SAFETY: a prefetch of an invalid address does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(self.data.wrapping_add(index).cast_const().cast()) }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// No two parts that live at the same time overlap.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the contract")]
    #[inline(always)]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start <= self.len && len <= self.len - start, "part {start}+{len} of {}", self.len);
        // SAFETY: inside the slice by the assertion; exclusive by contract.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_is_aligned_and_keeps_contents() {
        let mut buffer = Buffer::new();
        buffer.get_mut(3).copy_from_slice(&[1.0, 2.0, 3.0]);
        let big = buffer.get_mut(1000);
        assert_eq!(big[..4], [1.0, 2.0, 3.0, 0.0]);
        assert_eq!(big.as_ptr() as usize % 64, 0);
        assert!(buffer.bytes() >= 4000);
    }

    #[test]
    #[should_panic(expected = "part 3+2 of 4")]
    fn part_outside_panics() {
        let mut data = [0.0; 4];
        let shared = Disjoint::new(&mut data);
        // SAFETY: a single part.
        unsafe { shared.part(3, 2) };
    }
}
