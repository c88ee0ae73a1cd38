//! Pinned host memory that is lent to whoever fills it for a pass, and comes back by itself.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use super::Launcher;
use crate::device::HostBuffer;

/// Where the memory is while nobody has it.
type Home = Arc<Mutex<Option<HostBuffer>>>;

/// Memory of which one at a time may have all.
pub(crate) struct Lender {
    gpu: Arc<dyn Launcher>,
    home: Home,
    bytes: usize,
}

/// Memory that is somebody's until it is dropped.
struct Lent {
    /// `None` only while it is dropped.
    buffer: Option<HostBuffer>,
    home: Home,
}

impl Lender {
    /// Has nothing yet.
    pub(super) fn new(gpu: &Arc<dyn Launcher>) -> Lender {
        Lender { gpu: gpu.clone(), home: Home::default(), bytes: 0 }
    }

    /// Pins memory of at least so many bytes. Where the system does not give it there is none to lend.
    pub(super) fn reserve(&mut self, bytes: usize) {
        if self.bytes < bytes
            && let Ok(buffer) = self.gpu.pin(bytes)
        {
            (self.home, self.bytes) = (Arc::new(Mutex::new(Some(buffer))), bytes);
        }
    }

    /// All of it, if it has at least so many bytes and nobody has it.
    pub(super) fn lend(&self, bytes: usize) -> Option<HostBuffer> {
        let mut home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        let buffer = home.take_if(|buffer| buffer.len() >= bytes)?;
        Some(Box::new(Lent { buffer: Some(buffer), home: self.home.clone() }))
    }
}

impl Deref for Lent {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.buffer.as_deref().map_or(&[], |buffer| buffer)
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.buffer.as_deref_mut().map_or(&mut [], |buffer| buffer)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        *self.home.lock().unwrap_or_else(PoisonError::into_inner) = self.buffer.take();
    }
}
