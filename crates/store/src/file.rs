//! Data files, opened for reading through the page cache and past it.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::{Advice, AtFlags, Mode, OFlags, StatxFlags, fadvise, statx};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use crate::mapping::{Mapping, mapping_of};
use crate::plan::Alignment;
use crate::ring::cached_bytes;

/// What direct reads are aligned to where the kernel does not say what they need: it suits every disk.
const SAFE_ALIGNMENT: usize = 4096;
/// The page cache may have so many bytes in one piece, which it drops as a whole or not at all.
const CACHED_PIECE: u64 = 2 << 20;

/// An open data file.
pub(crate) struct DataFile {
    path: PathBuf,
    disk: u64,
    identity: (u64, i64),
    cached: Arc<File>,
    direct: Option<(Arc<File>, Alignment)>,
    /// From the first copy out of the page cache on; `None` where it cannot be mapped.
    mapping: OnceLock<Option<Arc<Mapping>>>,
    /// The file system has refused a direct read although it opened the file for them.
    refused: AtomicBool,
    /// What was last asked of it was in the page cache.
    cached_so_far: AtomicBool,
}

impl DataFile {
    /// Opens a file both ways, or through the cache only where the file system knows no other.
    pub(crate) fn open(path: &Path) -> io::Result<DataFile> {
        let cached = File::open(path)?;
        let metadata = cached.metadata()?;
        let changed = metadata.mtime().wrapping_mul(1_000_000_000).wrapping_add(metadata.mtime_nsec());
        let (disk, identity) = (metadata.dev(), (metadata.ino(), changed));
        let direct = alignment(&cached).and_then(|alignment| {
            let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
            let file = rustix::fs::open(path, flags, Mode::empty()).ok()?;
            Some((Arc::new(File::from(file)), alignment))
        });
        Ok(DataFile {
            path: path.to_owned(),
            disk,
            identity,
            cached: Arc::new(cached),
            direct,
            mapping: OnceLock::new(),
            refused: AtomicBool::new(false),
            cached_so_far: AtomicBool::new(false),
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Number of the file system that it lies on.
    pub(crate) fn disk(&self) -> u64 {
        self.disk
    }

    /// What no other file on that file system has, nor one that takes this one's number later: its number, and when it
    /// was last changed in nanoseconds since 1970.
    pub(crate) fn identity(&self) -> (u64, i64) {
        self.identity
    }

    /// The file for reads through the page cache.
    pub(crate) fn cached(&self) -> &Arc<File> {
        &self.cached
    }

    /// The file as the page cache has it, if it can be mapped.
    pub(crate) fn mapping(&self) -> Option<&Arc<Mapping>> {
        self.mapping.get_or_init(|| mapping_of(&self.path, &self.cached)).as_ref()
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

    /// Whether a range is worth a try in the page cache: the one before it was there, or all of it is. Asking the kernel
    /// costs a look at every page, a twentieth of what copying them does; a copy that does not wait says it too.
    pub(crate) fn may_be_cached(&self, offset: u64, len: usize) -> bool {
        let cached =
            || cached_bytes(&self.cached, offset, len as u64).is_none_or(|cached| cached >= len as u64);
        let worth_a_try = self.cached_so_far.load(Ordering::Relaxed) || cached();
        self.cached_so_far.store(worth_a_try, Ordering::Relaxed);
        worth_a_try
    }

    /// Something that was worth a try was not there.
    pub(crate) fn is_not_cached(&self) {
        self.cached_so_far.store(false, Ordering::Relaxed);
    }

    /// Copies from the page cache by reads that never wait for the disk; `false` if not all of it is there.
    pub(crate) fn read_cached(&self, mut at: u64, mut into: &mut [u8]) -> bool {
        while !into.is_empty() {
            match preadv2(&*self.cached, &mut [IoSliceMut::new(into)], at, ReadWriteFlags::NOWAIT) {
                Ok(0) => return false,
                Ok(read) => {
                    at += read as u64;
                    into = into.get_mut(read..).unwrap_or_default();
                }
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        true
    }

    /// Takes a range out of the page cache, so that it is next read from the disk; and what lies around it, for the page
    /// cache drops nothing in part.
    pub(crate) fn drop_from_cache(&self, offset: u64, len: usize) {
        let start = offset / CACHED_PIECE * CACHED_PIECE;
        let end = offset.saturating_add(len as u64).next_multiple_of(CACHED_PIECE);
        if let Some(mapping) = self.mapping() {
            mapping.let_go(start, end);
        }
        let _ = fadvise(&*self.cached, start, NonZeroU64::new(end - start), Advice::DontNeed);
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
