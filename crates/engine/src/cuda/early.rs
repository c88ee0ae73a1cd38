//! Rows of the token embedding that come before the embedding does: the first stage reads them in its place.
//!
//! They lie in a buffer, one after the other, and behind them a table of which of them each row of the batch is; so the
//! kernel reads them as it reads the embedding. On their way there they lie in pinned memory that a pass has to lend. What
//! came from a file unverified is compared with the embedding in the last stage, whose result is given to nobody where the
//! two differ.

use super::executor::{CudaPass, ExecuteError};
use super::forward::Step;
use super::plan::Tables;
use crate::device::HostBuffer;
use crate::executor::PassError;

/// Rows of the token embedding, one per token of the batch, as they are stored.
pub(crate) struct EarlyRows {
    pub(super) rows: HostBuffer,
    /// Whether they are known to be those of the embedding.
    pub(super) verified: bool,
}

impl CudaPass {
    /// Room for so many bytes of rows, to be filled and given to [`CudaPass::set_early_rows`].
    pub fn early_room(&self, bytes: usize) -> HostBuffer {
        self.memory.early_on_host.lend(bytes).unwrap_or_else(|| Box::new(vec![0; bytes]))
    }

    /// As [`crate::Pass::set_early_rows`]; to be called before the pass advances. Rows that are known to be those of the
    /// embedding (`verified`) are not compared with it.
    pub fn set_early_rows(&mut self, rows: HostBuffer, verified: bool) {
        self.early = Some(EarlyRows { rows, verified });
    }
}

impl Step<'_> {
    /// Brings the early rows of the pass, if it has some, to the GPU. Gives the addresses of the table that stands for the
    /// tokens, and of the rows.
    pub(super) fn early_rows(&mut self) -> Result<Option<(u64, u64)>, ExecuteError> {
        let (rows, count, pass) = (self.rows(), self.pass.tokens.len(), &mut *self.pass);
        let Some(early) = &pass.early else { return Ok(None) };
        let bytes = early.rows.get(..count * self.model.token_row_bytes()).ok_or(PassError::EarlyRows)?;
        let mut table = Tables::default();
        // Rows that fill a decode step up are of any token.
        table.push((0..rows as u32).map(|row| if row < count as u32 { row } else { 0 }));
        let start = bytes.len().next_multiple_of(16);
        let address = pass.memory.early.reserve(start + table.bytes().len())?;
        // SAFETY: there is room for them, and the pass keeps them as they are beyond this call, which waits for the GPU.
        unsafe { self.kernels.gpu().upload(address, bytes) }?;
        pass.memory.early.write_at(start, table.bytes())?;
        Ok(Some((address + start as u64, address)))
    }

    /// Compares early rows that nobody has verified with the embedding, which was.
    pub(super) fn check_early_rows(&mut self) -> Result<(), ExecuteError> {
        let Some(early) = self.pass.early.take().filter(|early| !early.verified) else { return Ok(()) };
        let embedding = self.address(&self.model.token_embedding)?;
        let row_bytes = self.model.token_row_bytes();
        let bytes = self.pass.tokens.len() * row_bytes;
        let to = self.pass.memory.early.reserve(bytes)?;
        for (index, &token) in self.pass.tokens.iter().enumerate() {
            let (from, at) = (u64::from(token) * row_bytes as u64, (index * row_bytes) as u64);
            // SAFETY: the embedding has its bytes (checked) and a row for each token (checked in `begin`), the buffer room
            // for as many rows as there are tokens; stages that read it have been launched before.
            unsafe { self.kernels.gpu().copy(embedding + from, to + at, row_bytes) }?;
        }
        let mut rows = vec![0; bytes];
        self.pass.memory.early.read(&mut rows)?;
        if early.rows.starts_with(&rows) { Ok(()) } else { Err(PassError::EarlyRows.into()) }
    }
}
