//! What can go wrong on the way. No text here ever holds a credential: addresses are shown without their user part and
//! their query, answers of servers only by status, and nothing of what a library says about a request is passed on.

use std::path::PathBuf;
use std::sync::Arc;

/// Why a checkpoint could not be brought here. Cheap to clone: everybody who waits for a download gets it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum RemoteError {
    /// The text names no source that can be read.
    #[error("{0}")]
    BadSource(String),
    /// The server refuses, or has not what was asked for; trying again does not help.
    #[error("{object}: {problem}")]
    Refused {
        /// What was asked for.
        object: String,
        /// What was answered, and what to do.
        problem: String,
    },
    /// It was tried again as often as is sensible.
    #[error(
        "{object}: {problem}; given up after {attempts} attempts without progress, what has arrived is kept: deploy again to go on"
    )]
    GaveUp {
        /// What was asked for.
        object: String,
        /// What happened last.
        problem: String,
        /// Failures in a row.
        attempts: u32,
    },
    /// The object was replaced while it was read.
    #[error(
        "{object}: it was changed at its source while it was downloaded; deploy again to get what is there now"
    )]
    Changed {
        /// Which object.
        object: String,
    },
    /// All bytes arrived, but they are not those that the source says it has.
    #[error("{object}: what arrived does not match its {digest}; it was thrown away, deploy again")]
    Corrupted {
        /// Which object.
        object: String,
        /// The kind of hash.
        digest: &'static str,
    },
    /// The files of the source make no checkpoint that can be read.
    #[error("{object}: {problem}")]
    NoCheckpoint {
        /// The source.
        object: String,
        /// What is missing, and what to do.
        problem: String,
    },
    /// This machine's disk failed.
    #[error("{}: {source}", path.display())]
    Io {
        /// File concerned.
        path: PathBuf,
        /// The system's answer.
        source: Arc<std::io::Error>,
    },
    /// The caller went away.
    #[error("the download was cancelled")]
    Cancelled,
}

impl RemoteError {
    pub(crate) fn io(path: &std::path::Path, source: std::io::Error) -> RemoteError {
        RemoteError::Io { path: path.to_path_buf(), source: Arc::new(source) }
    }

    pub(crate) fn refused(object: &str, problem: impl Into<String>) -> RemoteError {
        RemoteError::Refused { object: object.to_owned(), problem: problem.into() }
    }
}
