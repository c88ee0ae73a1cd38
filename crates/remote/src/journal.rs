//! What has arrived of a file, written down beside it, so that a download goes on where a killed process stopped.
//!
//! ```text
//! NAME            the file, at its full size from the beginning, holes where nothing has arrived
//! NAME.journal    {"size", "version", "chunk_bytes", "here"}; replaced as a whole
//! ```
//! A journal never claims a chunk whose bytes are not on the disk: data is synced before the journal is written. It
//! counts only for the version of the object that it names; without marks of a version it counts for none.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::RemoteError;
use crate::grid::Grid;
use crate::object::{Stat, Version};

/// A journal is a few digits per GiB.
const MAX_JOURNAL_BYTES: u64 = 4 << 20;

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    size: u64,
    version: Version,
    chunk_bytes: u64,
    here: String,
    /// Whether the whole file was compared with its hash, where its source states one.
    checked: bool,
}

fn journal_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".journal");
    name.into()
}

/// Opens or makes the file for an object, and says what of it is here, and whether it was checked.
pub(crate) fn open(path: &Path, stat: &Stat, chunk_bytes: u64) -> Result<(File, Grid, bool), RemoteError> {
    let io = |error| RemoteError::io(path, error);
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(io)?;
    }
    let fresh = stat.grid(chunk_bytes);
    if let Some((grid, checked)) = read(path, stat, &fresh)
        && let Ok(file) = File::options().read(true).write(true).open(path)
        && file.metadata().map_err(io)?.len() == stat.size
    {
        return Ok((file, grid, checked));
    }
    forget(path)?;
    // Another file and not the same one emptied: whoever still writes to the old one does no harm.
    let _ = fs::remove_file(path);
    let file = File::options().read(true).write(true).create_new(true).open(path).map_err(io)?;
    file.set_len(stat.size).map_err(io)?;
    Ok((file, fresh, false))
}

fn read(path: &Path, stat: &Stat, fresh: &Grid) -> Option<(Grid, bool)> {
    let path = journal_path(path);
    if fs::metadata(&path).ok()?.len() > MAX_JOURNAL_BYTES {
        return None;
    }
    let record: Record = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    let same = record.size == stat.size && record.chunk_bytes == fresh.chunk_bytes();
    let same = same && record.version.is_same(&stat.version);
    if !same {
        return None;
    }
    Some((fresh.clone().with_hex(&record.here)?, record.checked))
}

/// Writes down what is here; the bytes are synced first.
pub(crate) fn write(
    path: &Path,
    file: &File,
    stat: &Stat,
    grid: &Grid,
    checked: bool,
) -> Result<(), RemoteError> {
    file.sync_data().map_err(|error| RemoteError::io(path, error))?;
    let record = Record {
        size: stat.size,
        version: stat.version.clone(),
        chunk_bytes: grid.chunk_bytes(),
        here: grid.to_hex(),
        checked,
    };
    let journal = journal_path(path);
    let new = journal.with_extension("journal.new");
    let written = serde_json::to_vec(&record).map_err(std::io::Error::other).and_then(|json| {
        fs::write(&new, json)?;
        File::open(&new)?.sync_all()?;
        fs::rename(&new, &journal)
    });
    written.map_err(|error| RemoteError::io(&journal, error))
}

/// Nothing of the file counts any more.
pub(crate) fn forget(path: &Path) -> Result<(), RemoteError> {
    let journal = journal_path(path);
    match fs::remove_file(&journal) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(RemoteError::io(&journal, error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK_BYTES: u64 = 1000;

    fn stat(size: u64, etag: Option<&str>) -> Stat {
        let version = Version { etag: etag.map(str::to_owned), modified: None };
        Stat { size, version, digest: None, ranges: true }
    }

    #[test]
    fn what_was_written_down_is_there_again_for_the_same_version_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/model.safetensors");
        let ours = stat(3 * CHUNK_BYTES + 5, Some("\"a\""));
        let (file, mut grid, _) = open(&path, &ours, CHUNK_BYTES).unwrap();
        assert_eq!((file.metadata().unwrap().len(), grid.bytes_here()), (ours.size, 0));
        grid.insert(3);
        write(&path, &file, &ours, &grid, false).unwrap();
        assert_eq!(open(&path, &ours, CHUNK_BYTES).unwrap().1, grid);
        for other in
            [stat(ours.size, Some("\"b\"")), stat(ours.size, None), stat(ours.size + 1, Some("\"a\""))]
        {
            assert_eq!(open(&path, &other, CHUNK_BYTES).unwrap().1.bytes_here(), 0, "{other:?}");
            write(&path, &file, &ours, &grid, false).unwrap();
        }
    }

    #[test]
    fn a_damaged_journal_counts_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let ours = stat(CHUNK_BYTES, Some("\"a\""));
        let (file, mut grid, _) = open(&path, &ours, CHUNK_BYTES).unwrap();
        grid.insert(0);
        write(&path, &file, &ours, &grid, true).unwrap();
        let whole = fs::read(journal_path(&path)).unwrap();
        for len in 0..whole.len() {
            fs::write(journal_path(&path), &whole[..len]).unwrap();
            assert_eq!(open(&path, &ours, CHUNK_BYTES).unwrap().1.bytes_here(), 0, "{len}");
        }
        fs::write(journal_path(&path), &whole).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(5).unwrap();
        assert_eq!(open(&path, &ours, CHUNK_BYTES).unwrap().1.bytes_here(), 0, "the file was cut short");
    }
}
