//! Tables that kernels read in every pass of a model and that follow from the model and from where its tensors lie:
//! frequencies of rotations, addresses of experts.
//!
//! Working memory serves one model after the other, so it is remembered what lies there, and only what differs is brought
//! to the GPU: a step that is replayed finds its tables without a copy. Nothing else may write this buffer.

use std::collections::BTreeMap;
use std::sync::Arc;

use tangram_device::DeviceError;

use super::{Buffer, Launcher};

/// What tables are aligned to, bytes.
pub(crate) const ALIGNMENT: usize = 16;

/// The tables of the model that used this memory last.
pub(crate) struct Constants {
    pub(super) buffer: Buffer,
    model: Option<u64>,
    /// Where the buffer was, and how large, when the tables were brought there.
    place: (u64, usize),
    /// By where they begin.
    tables: BTreeMap<usize, Vec<u8>>,
    version: u64,
}

impl Constants {
    pub(super) fn new(gpu: &Arc<dyn Launcher>) -> Constants {
        let (buffer, tables) = (Buffer::new(gpu), BTreeMap::new());
        Constants { buffer, model: None, place: (0, 0), tables, version: 0 }
    }

    /// Makes room for all tables of a model.
    ///
    /// # Errors
    /// As [`Buffer::reserve`].
    pub(super) fn begin(&mut self, model: u64, bytes: usize) -> Result<(), DeviceError> {
        self.buffer.reserve(bytes)?;
        let place = (self.buffer.address(), self.buffer.bytes());
        if (self.model, self.place) != (Some(model), place) {
            (self.model, self.place) = (Some(model), place);
            self.tables.clear();
            self.version += 1;
        }
        Ok(())
    }

    /// Sees to it that a table lies `start` bytes behind the beginning, and gives its address. A model's tables are always
    /// at the same places and of the same lengths.
    ///
    /// # Errors
    /// As [`Buffer::fill`].
    pub(super) fn put(&mut self, start: usize, table: &[u8]) -> Result<u64, DeviceError> {
        if self.tables.get(&start).is_none_or(|known| known != table) {
            // Until it is there nothing is known of it.
            self.tables.remove(&start);
            self.version += 1;
            self.buffer.write_at(start, table)?;
            self.tables.insert(start, table.to_vec());
        }
        Ok(self.buffer.address() + start as u64)
    }

    /// Changes whenever a table does.
    pub(super) fn version(&self) -> u64 {
        self.version
    }
}
