//! What can go wrong with a checkpoint: every message names the file and says what to do about it.

use std::path::{Path, PathBuf};

/// Why a checkpoint could not be read or imported.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The operating system refused: missing file, disk full, permissions.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory concerned.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file contradicts its format or its own description: truncated, corrupted or wrongly converted.
    #[error("{}: {message}", path.display())]
    Invalid {
        /// The file concerned.
        path: PathBuf,
        /// The tensor or key, what is wrong with it, what to do.
        message: String,
    },
    /// A sound checkpoint that needs something this build cannot do.
    #[error("{}: {message}", path.display())]
    Unsupported {
        /// The file concerned.
        path: PathBuf,
        /// What is missing, and what works instead.
        message: String,
    },
    /// The progress callback asked to stop.
    #[error("the import was cancelled")]
    Cancelled,
}

impl CheckpointError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        CheckpointError::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn invalid(path: &Path, message: impl Into<String>) -> Self {
        CheckpointError::Invalid { path: path.to_path_buf(), message: message.into() }
    }

    pub(crate) fn unsupported(path: &Path, message: impl Into<String>) -> Self {
        CheckpointError::Unsupported { path: path.to_path_buf(), message: message.into() }
    }
}
