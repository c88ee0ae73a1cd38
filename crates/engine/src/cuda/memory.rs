//! Working memory on a GPU: buffers that only grow.

use std::sync::Arc;

use tangram_device::DeviceError;

use super::Launcher;

/// Memory on a GPU, freed when it is dropped.
pub struct Buffer {
    gpu: Arc<dyn Launcher>,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// An empty buffer; allocates nothing.
    pub fn new(gpu: &Arc<dyn Launcher>) -> Buffer {
        Buffer { gpu: gpu.clone(), address: 0, bytes: 0 }
    }

    /// Makes room for at least `bytes` and gives the address. Contents are lost when it grows.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when there is not enough memory; the buffer is then empty.
    pub fn reserve(&mut self, bytes: usize) -> Result<u64, DeviceError> {
        if self.bytes < bytes {
            self.release();
            self.address = self.gpu.allocate(bytes)?;
            self.bytes = bytes;
        }
        Ok(self.address)
    }

    /// A buffer with these bytes; empty if there are none.
    ///
    /// # Errors
    /// As [`Buffer::reserve`].
    pub fn with(gpu: &Arc<dyn Launcher>, bytes: &[u8]) -> Result<Buffer, DeviceError> {
        let mut buffer = Buffer::new(gpu);
        buffer.fill(bytes)?;
        Ok(buffer)
    }

    /// Replaces the contents.
    ///
    /// # Errors
    /// As [`Buffer::reserve`].
    pub fn fill(&mut self, bytes: &[u8]) -> Result<u64, DeviceError> {
        self.reserve(bytes.len())?;
        if !bytes.is_empty() {
            // SAFETY: there is room for them.
            unsafe { self.gpu.upload(self.address, bytes) }?;
        }
        Ok(self.address)
    }

    /// Replaces some of the contents. Panics if it is not that long.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when the driver refuses.
    pub fn write_at(&mut self, start: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        let end = start + bytes.len();
        assert!(end <= self.bytes, "bytes {start} to {end} of a buffer of {}", self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the buffer is that long.
        unsafe { self.gpu.upload(self.address + start as u64, bytes) }
    }

    /// Reads the beginning; waits for everything submitted so far. Panics if it is not that long.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when the driver refuses, or an earlier launch failed.
    pub fn read(&self, bytes: &mut [u8]) -> Result<(), DeviceError> {
        self.read_at(0, bytes)
    }

    /// [`Buffer::read`] from the byte `start` on.
    ///
    /// # Errors
    /// As [`Buffer::read`].
    pub fn read_at(&self, start: usize, bytes: &mut [u8]) -> Result<(), DeviceError> {
        let end = start + bytes.len();
        assert!(end <= self.bytes, "bytes {start} to {end} of a buffer of {}", self.bytes);
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the buffer is that long.
        unsafe { self.gpu.download(self.address + start as u64, bytes) }
    }

    /// Where it is; 0 while it is empty.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    fn release(&mut self) {
        if self.bytes > 0 {
            // SAFETY: allocated by `reserve`, and given away nowhere else.
            unsafe { self.gpu.free(self.address) };
        }
        (self.address, self.bytes) = (0, 0);
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.release();
    }
}
