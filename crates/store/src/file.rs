//! Data files, opened for reading through the page cache and past it.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{Advice, AtFlags, Mode, OFlags, StatxFlags, fadvise, statx};

use crate::plan::Alignment;

/// What direct reads are aligned to where the kernel does not say what they need: it suits every disk.
const SAFE_ALIGNMENT: usize = 4096;

/// An open data file.
pub(crate) struct DataFile {
    path: PathBuf,
    disk: u64,
    number: u64,
    cached: Arc<File>,
    direct: Option<(Arc<File>, Alignment)>,
    /// The file system has refused a direct read although it opened the file for them.
    refused: AtomicBool,
}

impl DataFile {
    /// Opens a file both ways, or through the cache only where the file system knows no other.
    pub(crate) fn open(path: &Path) -> io::Result<DataFile> {
        let cached = File::open(path)?;
        let metadata = cached.metadata()?;
        let (disk, number) = (metadata.dev(), metadata.ino());
        let direct = alignment(&cached).and_then(|alignment| {
            let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
            let file = rustix::fs::open(path, flags, Mode::empty()).ok()?;
            Some((Arc::new(File::from(file)), alignment))
        });
        let refused = AtomicBool::new(false);
        Ok(DataFile { path: path.to_owned(), disk, number, cached: Arc::new(cached), direct, refused })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Number of the file system that it lies on.
    pub(crate) fn disk(&self) -> u64 {
        self.disk
    }

    /// Its number on that file system.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// The file for reads through the page cache.
    pub(crate) fn cached(&self) -> &Arc<File> {
        &self.cached
    }

    /// The file for reads past the page cache, and what they have to be aligned to.
    pub(crate) fn direct(&self) -> Option<(&Arc<File>, Alignment)> {
        let (file, alignment) = self.direct.as_ref().filter(|_| !self.refused.load(Ordering::Relaxed))?;
        Some((file, *alignment))
    }

    /// No more direct reads of this file.
    pub(crate) fn refuse_direct(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    /// Takes a range out of the page cache, so that it is next read from the disk.
    pub(crate) fn drop_from_cache(&self, offset: u64, len: usize) {
        let _ = fadvise(&*self.cached, offset, NonZeroU64::new(len as u64), Advice::DontNeed);
    }
}

/// What direct reads of a file need; `None` if it cannot be read so.
fn alignment(file: &File) -> Option<Alignment> {
    let safe = Alignment { offset: SAFE_ALIGNMENT, memory: SAFE_ALIGNMENT };
    let Ok(status) = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else { return Some(safe) };
    if status.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Some(safe);
    }
    let (offset, memory) = (status.stx_dio_offset_align as usize, status.stx_dio_mem_align as usize);
    // Both are 0 where there are no direct reads.
    (offset.is_power_of_two() && memory.is_power_of_two()).then_some(Alignment { offset, memory })
}
