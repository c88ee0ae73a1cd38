//! Bounded reading of files from outside: nothing here maps a file or allocates more than the file holds.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::CheckpointError;

/// Knows which bytes of files that are still arriving can be read.
pub trait Presence: Send + Sync + std::fmt::Debug {
    /// Returns when these bytes of a file can be read.
    ///
    /// # Errors
    /// When they never will be.
    fn wait_for(&self, path: &Path, bytes: Range<u64>) -> std::io::Result<()>;
}

/// An open file of known length with its path for messages. Reads are positioned, so it can be shared.
#[derive(Debug)]
pub(crate) struct SourceFile {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    /// Bytes when it was opened.
    pub(crate) length: u64,
    /// What the system said of it then.
    pub(crate) opened: std::fs::Metadata,
    /// Of a file that is still arriving; everything that is read is waited for.
    presence: Option<Arc<dyn Presence>>,
}

impl SourceFile {
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        SourceFile::open_arriving(path, None)
    }

    /// Opens a file that lies at its full size already but whose bytes may still be coming.
    pub(crate) fn open_arriving(
        path: &Path,
        presence: Option<&Arc<dyn Presence>>,
    ) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(|error| CheckpointError::io(path, error))?;
        let metadata = file.metadata().map_err(|error| CheckpointError::io(path, error))?;
        if !metadata.is_file() {
            return Err(CheckpointError::invalid(path, "not a regular file"));
        }
        Ok(SourceFile {
            path: path.to_path_buf(),
            file,
            length: metadata.len(),
            opened: metadata,
            presence: presence.cloned(),
        })
    }

    fn wait_for(&self, bytes: Range<u64>) -> std::io::Result<()> {
        self.presence.as_ref().map_or(Ok(()), |presence| presence.wait_for(&self.path, bytes))
    }

    /// Reads front to back from the beginning.
    pub(crate) fn reader(&self) -> impl Read {
        FromStart { file: self, at: 0 }
    }
}

/// Bytes that can be read from any place: a file, or what is made of one.
pub(crate) trait ReadAt: std::fmt::Debug + Send + Sync {
    /// Fills `buffer` from byte `offset` on.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), CheckpointError>;

    /// The file itself, if these are its bytes.
    fn as_file(&self) -> Option<&SourceFile> {
        None
    }
}

impl ReadAt for SourceFile {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), CheckpointError> {
        let end = offset.saturating_add(buffer.len() as u64);
        self.wait_for(offset..end).map_err(|error| CheckpointError::io(&self.path, error))?;
        self.file.read_exact_at(buffer, offset).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => CheckpointError::invalid(
                &self.path,
                format!(
                    "ended while {} bytes at offset {offset} were read; it was changed or cut short",
                    buffer.len()
                ),
            ),
            _ => CheckpointError::io(&self.path, error),
        })
    }

    fn as_file(&self) -> Option<&SourceFile> {
        Some(self)
    }
}

struct FromStart<'a> {
    file: &'a SourceFile,
    at: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let end = self.at.saturating_add(buffer.len() as u64).min(self.file.length.max(self.at));
        self.file.wait_for(self.at..end)?;
        let read = self.file.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// Reads a whole small file; one of more than `limit` bytes is refused.
pub(crate) fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, CheckpointError> {
    let file = SourceFile::open(path)?;
    let mut bytes = Vec::new();
    (&file.file)
        .take(limit.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(|error| CheckpointError::io(path, error))?;
    if bytes.len() as u64 > limit {
        return Err(CheckpointError::invalid(
            path,
            format!("larger than {limit} bytes, which no sound file of this kind is"),
        ));
    }
    Ok(bytes)
}

/// Like [`read_limited`], but a missing file is `None`.
pub(crate) fn read_optional(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
    match read_limited(path, limit) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(CheckpointError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
