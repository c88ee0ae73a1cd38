//! Bounded reading of files from outside: nothing here maps a file or allocates more than the file holds.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::CheckpointError;

/// An open file of known length with its path for messages. Reads are positioned, so it can be shared.
#[derive(Debug)]
pub(crate) struct SourceFile {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    /// Bytes when it was opened.
    pub(crate) length: u64,
    /// What the system said of it then.
    pub(crate) opened: std::fs::Metadata,
}

impl SourceFile {
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(|error| CheckpointError::io(path, error))?;
        let metadata = file.metadata().map_err(|error| CheckpointError::io(path, error))?;
        if !metadata.is_file() {
            return Err(CheckpointError::invalid(path, "not a regular file"));
        }
        Ok(SourceFile { path: path.to_path_buf(), file, length: metadata.len(), opened: metadata })
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
