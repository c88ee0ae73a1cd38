//! Checkpoints that are served from the user's own files: which files, what they were when they were deployed, and how
//! a change is found.
//!
//! Only tensors whose bytes lie in a file exactly as they are needed can be read there; an import in place stores the
//! others converted, in its own data file. Nothing here, and nobody who reads a manifest, may ever write to or remove
//! one of these files.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::file::SourceFile;
use crate::manifest::TENSOR_ALIGNMENT;
use crate::{CheckpointError, TensorEntry};

/// Where a tensor's bytes are in a file of the user's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePlace {
    /// Index into [`InPlace::files`].
    pub file: u32,
    /// First byte in that file; of any alignment.
    pub offset: u64,
}

/// The user's files that a model is served from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InPlace {
    /// The files.
    pub files: Vec<InPlaceFile>,
    /// Bytes of the range in which the tensors that are read in place have their places.
    pub range_bytes: u64,
}

/// A file of the user's as it was when its tensors were hashed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InPlaceFile {
    /// Absolute and free of symbolic links.
    pub path: PathBuf,
    /// Size in bytes.
    pub bytes: u64,
    /// Last modification, nanoseconds since 1970.
    pub modified: i64,
    /// Inode number: another file under the same name has another one.
    pub inode: u64,
}

impl InPlaceFile {
    /// The file that is open as `file`, as it was before anything was read of it.
    pub(crate) fn of(file: &SourceFile) -> Result<InPlaceFile, CheckpointError> {
        let io_error = |error| CheckpointError::io(&file.path, error);
        let path = std::fs::canonicalize(&file.path).map_err(io_error)?;
        if path.to_str().is_none() {
            return Err(CheckpointError::unsupported(
                &path,
                "has a name that is not valid UTF-8; rename it, or deploy without --in-place",
            ));
        }
        let opened = &file.opened;
        Ok(InPlaceFile { path, bytes: opened.len(), modified: modified(opened), inode: opened.ino() })
    }

    /// Whether the file is still the one that was deployed, as far as the file system knows. Costs one system call;
    /// whether its bytes are the same is found by their checksums when they are read.
    ///
    /// # Errors
    /// What is different and what to do, for the user.
    pub fn check(&self) -> Result<(), String> {
        let advice = "deploy the model again, or bring the file back as it was";
        let path = self.path.display();
        let metadata = match std::fs::metadata(&self.path) {
            Ok(metadata) => metadata,
            Err(error) => {
                return Err(format!(
                    "{path}, from which the model is served in place, cannot be read: {error}; {advice}"
                ));
            }
        };
        let difference = if metadata.len() != self.bytes {
            format!("it has {} bytes instead of {}", metadata.len(), self.bytes)
        } else if modified(&metadata) != self.modified {
            "it was written to".to_owned()
        } else if metadata.ino() != self.inode {
            "another file has taken its place".to_owned()
        } else {
            return Ok(());
        };
        Err(format!(
            "{path}, from which the model is served in place, has changed since it was deployed ({difference}); {advice}"
        ))
    }
}

fn modified(metadata: &Metadata) -> i64 {
    metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec())
}

/// Checks what a manifest says about the tensors that are read in place; the error names a tensor by `names`.
pub(crate) fn check(
    in_place: Option<&InPlace>,
    tensors: &[TensorEntry],
    names: &[String],
) -> Result<(), String> {
    let mut range_bytes = 0;
    for (entry, name) in tensors.iter().zip(names) {
        let Some(place) = entry.in_place else { continue };
        let file = in_place.and_then(|in_place| in_place.files.get(place.file as usize));
        let file =
            file.ok_or_else(|| format!("tensor {name} is said to lie in a file that is not listed"))?;
        if place.offset.checked_add(entry.bytes).is_none_or(|end| end > file.bytes) {
            return Err(format!(
                "tensor {name} cannot start at byte {} of {}, which has {}",
                place.offset,
                file.path.display(),
                file.bytes
            ));
        }
        let end =
            entry.offset.checked_add(entry.bytes).filter(|_| entry.offset.is_multiple_of(TENSOR_ALIGNMENT));
        range_bytes = end.ok_or_else(|| format!("tensor {name} has no possible place"))?.max(range_bytes);
    }
    let Some(in_place) = in_place else { return Ok(()) };
    if in_place.range_bytes != range_bytes {
        return Err(format!(
            "the tensors read in place need {range_bytes} bytes, not {}",
            in_place.range_bytes
        ));
    }
    match in_place.files.iter().find(|file| !is_plain_absolute(&file.path)) {
        Some(file) => Err(format!("{} is not an absolute path", file.path.display())),
        None => Ok(()),
    }
}

fn is_plain_absolute(path: &Path) -> bool {
    path.is_absolute() && path.components().all(|part| part != std::path::Component::ParentDir)
}
