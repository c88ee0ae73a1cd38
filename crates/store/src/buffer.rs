//! Aligned memory for what cannot be read straight to its place.

/// Bytes at an aligned address.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    /// Alignment of every buffer: no disk asks for more.
    pub(crate) const ALIGNMENT: usize = 4096;

    /// A buffer of at least `len` bytes.
    pub(crate) fn new(len: usize) -> Buffer {
        let bytes = vec![0; len + Buffer::ALIGNMENT];
        let address = bytes.as_ptr() as usize;
        Buffer { start: address.next_multiple_of(Buffer::ALIGNMENT) - address, bytes }
    }

    /// Its bytes; as long as the buffer lives they stay where they are.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        let end = self.bytes.len() - Buffer::ALIGNMENT + self.start;
        &mut self.bytes[self.start..end]
    }

    /// How many bytes it has.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - Buffer::ALIGNMENT
    }
}
