//! Files as the page cache has them, mapped: copying out of it at the speed of memory.
//!
//! `read` takes twice the time for the same bytes. A mapping is made when a file is first loaded, its page tables chunk by
//! chunk as chunks are loaded out of the page cache, and both are kept for the next load; a file that is gone or that no
//! model has any more is let go ([`drop_unused`]), or its room on the disk would stay taken. Nothing here waits for the disk:
//! what the page cache does not have, or is still reading, is not touched. (Were it dropped between the question and the
//! copy, the copy would bring it back. And of a file that it may only read the kernel does not say what is still being
//! read.)
//!
//! Memory behind a mapping can vanish: somebody cuts the file short, or the disk cannot give a dropped page again. The
//! kernel then sends SIGBUS to whoever copies. While a copy goes on it is entered in [`COPIES`], and the handler, which looks
//! at its own thread's entry only, puts zeros where the bytes were and marks the mapping as broken; a copy from a broken
//! mapping has failed. (Wayland's compositors guard themselves so against their clients.) No other access is made to mapped
//! bytes, and none without that entry.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicUsize, Ordering, compiler_fence};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};

use tangram_checkpoint::ChecksumRun;

use crate::ring::cached_bytes;
use crate::stream_copy::stream_copy;

/// What page tables are made for at a time: what one entry of theirs can cover where the page cache has it in one piece.
const BLOCK: usize = 2 << 20;
/// Bytes that are copied right after they went into the checksum: the first cache has them still, while those after them
/// are on their way to it. Fewer would cost the checksum's start too often.
const HOT_BYTES: usize = 16 << 10;
/// Copies that can be guarded at a time; more are told to go another way.
const MOST_COPIES: usize = 64;

/// A copy that goes on.
struct Copy {
    taken: AtomicBool,
    /// The thread that copies; 0 while the rest does not hold. Nobody else looks at the rest.
    thread: AtomicI32,
    /// Addresses, in whole pages.
    start: AtomicUsize,
    end: AtomicUsize,
    /// The mark of its mapping.
    broken: AtomicPtr<AtomicBool>,
}

static COPIES: [Copy; MOST_COPIES] = [const {
    Copy {
        taken: AtomicBool::new(false),
        thread: AtomicI32::new(0),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        broken: AtomicPtr::new(std::ptr::null_mut()),
    }
}; MOST_COPIES];

/// What SIGBUS did before; `None` if the handler could not be set.
static BEFORE: OnceLock<Option<libc::sigaction>> = OnceLock::new();

/// Mapped files, by file system and number on it.
type Mapped = HashMap<(u64, u64), Arc<Mapping>>;

static MAPPED: LazyLock<Mutex<Mapped>> = LazyLock::new(Mutex::default);

fn mapped() -> MutexGuard<'static, Mapped> {
    MAPPED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The mapping of the file at `path`, open as `file`, made if there is none; `None` where there can be none.
pub(crate) fn mapping_of(path: &Path, file: &File) -> Option<Arc<Mapping>> {
    let mut mapped = mapped();
    // Asked under the lock: what was removed before `drop_unused` looked is not entered after it.
    let metadata = file.metadata().ok()?;
    let (key, bytes) = ((metadata.dev(), metadata.ino()), metadata.len());
    if let Some(known) = mapped.get(&key)
        && known.bytes as u64 == bytes
        && !known.is_broken()
    {
        return Some(known.clone());
    }
    let mapping = Arc::new(Mapping::new(path, file).ok()?);
    let replaced = if metadata.nlink() > 0 { mapped.insert(key, mapping.clone()) } else { None };
    drop(mapped);
    drop(replaced);
    Some(mapping)
}

/// Lets go of files that no model has any more, by their paths when they were mapped, and of those that were removed or
/// replaced: their room is free once nobody loads from them.
pub fn drop_unused(is_used: impl Fn(&Path) -> bool) {
    let known: Vec<_> = mapped().iter().map(|(&key, mapping)| (key, mapping.clone())).collect();
    // Nobody waits while the file systems are asked, nor while the last reference to a large file goes.
    let stays = |path: &Path, key| {
        let is_there =
            || std::fs::metadata(path).is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == key);
        is_used(path) && is_there()
    };
    for (key, mapping) in known {
        if !stays(&mapping.path, key) {
            let mut mapped = mapped();
            let is_same = mapped.get(&key).is_some_and(|other| Arc::ptr_eq(other, &mapping));
            let dropped = if is_same { mapped.remove(&key) } else { None };
            drop(mapped);
            drop(dropped);
        }
    }
}

/// Lets go of a file, if it is mapped: what the page cache has of it can be dropped from there then.
pub fn unmap(file: &File) {
    let Ok(status) = rustix::fs::fstat(file) else { return };
    let dropped = mapped().remove(&(status.st_dev, status.st_ino));
    drop(dropped);
}

/// A file in the address space.
pub(crate) struct Mapping {
    /// The file's, when it was mapped.
    path: PathBuf,
    /// Where its first byte lies, a multiple of [`BLOCK`], and how many it has.
    address: usize,
    bytes: usize,
    /// The whole range of addresses, which is more.
    reserved: Range<usize>,
    /// Whether page tables were made for each block.
    populated: Box<[AtomicBool]>,
    /// Some of its bytes were replaced by zeros.
    broken: AtomicBool,
}

impl Mapping {
    fn new(path: &Path, file: &File) -> io::Result<Mapping> {
        let handled = BEFORE.get_or_init(handle_bus_errors).is_some();
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        if !handled || bytes == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let len = bytes.next_multiple_of(rustix::param::page_size()) + BLOCK;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new range of addresses, chosen by the kernel, that nothing can be read from or written to.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let reserved = start as usize..start as usize + len;
        let address = reserved.start.next_multiple_of(BLOCK);
        let populated = (0..bytes.div_ceil(BLOCK)).map(|_| AtomicBool::new(false)).collect();
        let mapping = Mapping {
            path: path.to_owned(),
            address,
            bytes,
            reserved,
            populated,
            broken: AtomicBool::new(false),
        };
        let (to, fd) = (address as *mut libc::c_void, file.as_raw_fd());
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: replaces a part of the range above, which nobody else knows of.
        let at = unsafe { libc::mmap(to, bytes, libc::PROT_READ, flags, fd, 0) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(mapping) }
    }

    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Bytes of the file in whole pages around these, and no further than the page that it ends in.
    fn pages(&self, offset: u64, len: usize) -> Option<Range<usize>> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(len).filter(|&end| len > 0 && end <= self.bytes)?;
        let page = rustix::param::page_size();
        Some(start / page * page..end.next_multiple_of(page))
    }

    /// Whether the page cache has so many bytes of the file from `offset` on, and page tables were made for them so that copying them
    /// meets no fault; `None` where the kernel cannot say or do that.
    pub(crate) fn is_ready(&self, file: &File, offset: u64, len: usize) -> Option<bool> {
        let pages = self.pages(offset, len)?;
        let cached = |pages: &Range<usize>| {
            cached_bytes(file, pages.start as u64, pages.len() as u64)
                .map(|bytes| bytes >= pages.len() as u64)
        };
        let blocks = pages.start / BLOCK..pages.end.div_ceil(BLOCK);
        let marks = self.populated.get(blocks.clone())?;
        if !cached(&pages)? {
            marks.iter().for_each(|populated| populated.store(false, Ordering::Relaxed));
            return Some(false);
        }
        for (block, populated) in blocks.zip(marks) {
            if populated.load(Ordering::Relaxed) {
                continue;
            }
            // All of the block, if that is there too: then the next chunk finds it done.
            let end = ((block + 1) * BLOCK).min(self.bytes.next_multiple_of(rustix::param::page_size()));
            let whole = block * BLOCK..end;
            let is_whole = cached(&whole)?;
            let part = if is_whole { whole } else { whole.start.max(pages.start)..end.min(pages.end) };
            // Its first page alone at first: where one entry of the page tables covers the block, this makes it, and the
            // rest is answered by a look at that.
            let first = part.start..part.start + rustix::param::page_size();
            if !self.populate(first)? || !self.populate(part)? {
                return Some(false);
            }
            populated.store(is_whole, Ordering::Relaxed);
        }
        Some(true)
    }

    /// Makes page tables for whole pages of the mapping, unless some are not there or still being read, which counts as
    /// cached; `None` where the kernel cannot do that.
    fn populate(&self, pages: Range<usize>) -> Option<bool> {
        let at = (self.address + pages.start) as *mut libc::c_void;
        let mut there = vec![0u8; pages.len() / rustix::param::page_size()];
        // SAFETY: the pages lie in the mapping, and there is a byte for each.
        if unsafe { libc::mincore(at, pages.len(), there.as_mut_ptr()) } != 0 {
            return None;
        }
        if there.contains(&0) {
            return Some(false);
        }
        // SAFETY: makes page tables within the mapping; no byte changes.
        (unsafe { libc::madvise(at, pages.len(), libc::MADV_POPULATE_READ) } == 0).then_some(true)
    }

    /// Copies what lies from `offset` on, past the caches if the copy is not used soon, and takes it into a checksum.
    /// `false` if it cannot be had so; what was copied then is of no use.
    pub(crate) fn copy(&self, offset: u64, to: &mut [u8], soon: bool, sum: Option<&mut ChecksumRun>) -> bool {
        let Some(pages) = self.pages(offset, to.len()) else { return false };
        let Some(_guard) = Guard::enter(self, pages) else { return false };
        let from = (self.address + offset as usize) as *const u8;
        // SAFETY: `pages` has checked that the bytes lie in the mapping, which `self` keeps; where the file has lost them
        // since, the handler puts zeros, as the guard has it do. Another process that writes to the file can change them at
        // any time: nothing is concluded from what they are but their checksum, and whoever asks for that finds out
        // whether the file has changed meanwhile (`crate::job`).
        let bytes = unsafe { std::slice::from_raw_parts(from, to.len()) };
        match sum {
            None if soon => to.copy_from_slice(bytes),
            None => stream_copy(bytes, to, &[]),
            Some(sum) => {
                let nexts = bytes.chunks(HOT_BYTES).skip(1).chain([&[][..]]);
                for ((bytes, next), to) in bytes.chunks(HOT_BYTES).zip(nexts).zip(to.chunks_mut(HOT_BYTES)) {
                    sum.update(bytes);
                    if soon { to.copy_from_slice(bytes) } else { stream_copy(bytes, to, next) }
                }
            }
        }
        // The handler runs on this thread, so it is the compiler alone that could look too early.
        compiler_fence(Ordering::SeqCst);
        !self.is_broken()
    }

    /// Takes what there is of these bytes out of the address space, without which it cannot be taken out of the page cache.
    pub(crate) fn let_go(&self, start: u64, end: u64) {
        let len = end.min(self.bytes as u64).saturating_sub(start);
        let Some(pages) = self.pages(start, len as usize) else { return };
        let blocks = pages.start / BLOCK..pages.end.div_ceil(BLOCK);
        self.populated
            .get(blocks)
            .unwrap_or_default()
            .iter()
            .for_each(|of| of.store(false, Ordering::Relaxed));
        let at = (self.address + pages.start) as *mut libc::c_void;
        // SAFETY: the pages lie in the mapping, which is of a file and shared: they come back when they are touched.
        let _ = unsafe { libc::madvise(at, pages.len(), libc::MADV_DONTNEED) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was reserved for this mapping, and copies from it borrow it.
        unsafe { libc::munmap(self.reserved.start as *mut libc::c_void, self.reserved.len()) };
    }
}

/// An entry in [`COPIES`], as long as a copy goes on.
struct Guard<'a> {
    copy: &'static Copy,
    _mapping: &'a Mapping,
}

impl<'a> Guard<'a> {
    /// Enters a copy of these bytes (whole pages) of a mapping; `None` if there are too many.
    fn enter(mapping: &'a Mapping, pages: Range<usize>) -> Option<Guard<'a>> {
        let free = |copy: &&Copy| {
            copy.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let copy = COPIES.iter().find(free)?;
        copy.broken.store((&raw const mapping.broken).cast_mut(), Ordering::Relaxed);
        copy.start.store(mapping.address + pages.start, Ordering::Relaxed);
        copy.end.store(mapping.address + pages.end, Ordering::Relaxed);
        // The handler looks at entries of its own thread, so there is only the compiler to be kept from changing the order:
        // this comes after the rest and before the copy.
        compiler_fence(Ordering::SeqCst);
        copy.thread.store(thread_id(), Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        Some(Guard { copy, _mapping: mapping })
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        compiler_fence(Ordering::SeqCst);
        self.copy.thread.store(0, Ordering::Relaxed);
        self.copy.taken.store(false, Ordering::Release);
    }
}

/// The number of the calling thread, which is never 0. May be called in a signal handler.
fn thread_id() -> i32 {
    // SAFETY: has no arguments and always succeeds.
    unsafe { libc::syscall(libc::SYS_gettid) as i32 }
}

/// Sets the handler for all of the process; gives what was there before.
fn handle_bus_errors() -> Option<libc::sigaction> {
    // SAFETY: all zeros is a valid `sigaction` (no handler, empty mask); the handler has the signature that SA_SIGINFO asks
    // for and does only what a signal handler may.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        let mut before: libc::sigaction = std::mem::zeroed();
        (libc::sigaction(libc::SIGBUS, &raw const action, &raw mut before) == 0).then_some(before)
    }
}

/// Puts zeros where mapped bytes have vanished under a copy. For whatever else raised the signal, sets the handler that was
/// there before and returns: the access is tried again and meets that one. Atomics and system calls only.
extern "C" fn on_bus_error(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure, and SIGBUS has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    let thread = thread_id();
    for copy in &COPIES {
        // What is this thread's does not change while it is here.
        if copy.thread.load(Ordering::Relaxed) != thread {
            continue;
        }
        let (end, start) = (copy.end.load(Ordering::Relaxed), copy.start.load(Ordering::Relaxed));
        if !(start..end).contains(&address) {
            continue;
        }
        let broken = copy.broken.load(Ordering::Relaxed);
        // SAFETY: the entry is this thread's, which is in the middle of that copy: its guard borrows the mapping with
        // that mark.
        unsafe { (*broken).store(true, Ordering::Release) };
        // SAFETY: always valid, it is the calling thread's own.
        let errno = unsafe { *libc::__errno_location() };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: the pages are a part of that mapping, which the guard keeps and only copies read: they see zeros from here
        // on, and that the mapping is broken, for it was marked before.
        let zeros =
            unsafe { libc::mmap(start as *mut libc::c_void, end - start, libc::PROT_READ, flags, -1, 0) };
        // SAFETY: as above.
        unsafe { *libc::__errno_location() = errno };
        if zeros != libc::MAP_FAILED {
            return;
        }
    }
    if let Some(Some(before)) = BEFORE.get() {
        // SAFETY: what the system gave as the handler that was there.
        unsafe { libc::sigaction(libc::SIGBUS, before, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;
    use std::os::unix::process::ExitStatusExt;
    use tangram_checkpoint::Checksum;

    fn written(bytes: &[u8]) -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        std::fs::write(&path, bytes).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        (dir, file)
    }

    fn mapping(dir: &tempfile::TempDir, file: &File) -> Arc<Mapping> {
        mapping_of(&dir.path().join("data"), file).unwrap()
    }

    fn random(len: usize) -> Vec<u8> {
        let byte = |at: u64| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
        (0..len as u64).map(byte).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn copies_are_exact_and_what_they_sum_up(
            start in 0usize..BLOCK + 9000, len in 1usize..2 * BLOCK, soon in any::<bool>(), skew in 0usize..70,
        ) {
            static FILE: LazyLock<(Vec<u8>, tempfile::TempDir, File)> = LazyLock::new(|| {
                let bytes = random(2 * BLOCK + 5001);
                let (dir, file) = written(&bytes);
                (bytes, dir, file)
            });
            let (bytes, dir, file) = &*FILE;
            let mapping = mapping(dir, file);
            let mut to = vec![0; len + skew];
            let there = start + len <= bytes.len();
            if there && mapping.is_ready(file, start as u64, len).is_none() {
                println!("skipped: this kernel does not say what is cached");
            }
            let expected = bytes.get(start..start + len).unwrap_or_default();
            let sum = Checksum::of(expected);
            let mut run = sum.run();
            prop_assert_eq!(mapping.copy(start as u64, &mut to[skew..], soon, Some(&mut run)), there);
            if there {
                prop_assert!(&to[skew..] == expected && to[..skew].iter().all(|&byte| byte == 0));
                prop_assert_eq!(run.finish(), sum);
            }
        }
    }

    #[test]
    fn bytes_that_vanish_fail_the_copy_and_nothing_else() {
        let bytes = random(3 * BLOCK);
        let (dir, file) = written(&bytes);
        let mapping = mapping(&dir, &file);
        let mut to = vec![0; BLOCK];
        assert!(mapping.copy(BLOCK as u64, &mut to, false, None));
        file.set_len(100).unwrap();
        assert!(!mapping.copy(BLOCK as u64, &mut to, false, None), "the file was cut short");
        assert!(!mapping.copy(0, &mut to[..100], false, None), "nothing is taken from it any more");
        file.write_all_at(&bytes, 0).unwrap();
        let again = mapping_of(&dir.path().join("data"), &file).unwrap();
        assert!(!Arc::ptr_eq(&again, &mapping), "it is mapped anew");
        assert!(again.copy(BLOCK as u64, &mut to, false, None) && to == bytes[BLOCK..2 * BLOCK]);
        // Many at once, of which the signal must find the right one.
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let again = again.clone();
                scope.spawn(move || {
                    let (at, mut to) = (thread as u64 * 9000, vec![0; 2 * BLOCK]);
                    while again.copy(at, &mut to, false, None) {}
                });
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
            file.set_len(BLOCK as u64).unwrap();
        });
        assert!(again.is_broken());
    }

    /// The part of the next test that ends its process.
    #[test]
    fn unguarded() {
        if std::env::var_os("TANGRAM_TEST_UNGUARDED").is_none() {
            return;
        }
        let (dir, file) = written(&random(5000));
        let mapping = mapping(&dir, &file);
        file.set_len(0).unwrap();
        // SAFETY: there is no such memory any more, so the access ends the process.
        unsafe { (mapping.address as *const u8).read_volatile() };
    }

    #[test]
    fn a_bus_error_that_is_not_ours_ends_the_process() {
        let program = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["unguarded", "--test-threads", "1"])
            .env("TANGRAM_TEST_UNGUARDED", "1")
            .output();
        assert_eq!(program.unwrap().status.signal(), Some(libc::SIGBUS));
    }

    #[test]
    fn only_what_is_cached_is_ready_and_it_can_be_dropped() {
        let bytes = random(2 * BLOCK + 100);
        let (dir, file) = written(&bytes);
        file.sync_all().unwrap();
        let mapping = mapping(&dir, &file);
        let Some(ready) = mapping.is_ready(&file, 5, 2 * BLOCK) else {
            println!("skipped: this kernel does not say what is cached");
            return;
        };
        assert!(ready);
        assert_eq!(mapping.is_ready(&file, 5, 3 * BLOCK), None, "beyond the end");
        mapping.let_go(0, 3 * BLOCK as u64);
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        if cached_bytes(&file, 0, bytes.len() as u64) != Some(0) {
            println!("skipped: this file system keeps what it is told to drop");
            return;
        }
        assert_eq!(mapping.is_ready(&file, 5, 100), Some(false));
        assert_eq!(cached_bytes(&file, 0, bytes.len() as u64), Some(0), "asking brings nothing in");
        file.read_exact_at(&mut [0; 4096], 8192).unwrap();
        assert_eq!(mapping.is_ready(&file, 8200, 100), Some(true));
    }

    #[test]
    fn removed_and_unused_files_are_let_go() {
        let (dir, file) = written(&random(5000));
        let mapped = Arc::downgrade(&mapping(&dir, &file));
        drop_unused(|_| true);
        assert!(mapped.upgrade().is_some());
        // Other tests' files stay.
        drop_unused(|path| !path.starts_with(dir.path()));
        assert!(mapped.upgrade().is_none());
        let mapped = Arc::downgrade(&mapping(&dir, &file));
        assert!(mapped.upgrade().is_some());
        dir.close().unwrap();
        assert!(mapping_of(Path::new("gone"), &file).is_some(), "whoever loads from it still can");
        drop_unused(|_| true);
        assert!(mapped.upgrade().is_none());
        let late = Arc::downgrade(&mapping_of(Path::new("gone"), &file).unwrap());
        assert!(late.upgrade().is_none(), "it is not kept for the next load");
        let (dir, file) = written(&random(5000));
        let mapped = Arc::downgrade(&mapping(&dir, &file));
        unmap(&file);
        assert!(mapped.upgrade().is_none());
    }
}
