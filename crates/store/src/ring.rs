//! Reads by io_uring, and what of a file is in the page cache: the calls for which there is no safe interface.
//!
//! A read under way owns the memory that it fills: [`Ring`] takes the
//! [`Target`], does not touch it and gives it back when the kernel is done with it, or never.

#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};
use slab::Slab;

use crate::plan::{Piece, Place};

/// Reads that can be under way at once; more wait in line.
const ENTRIES: u32 = 128;
/// Marks completions of the bell.
const BELL: u64 = u64::MAX;
/// Pieces of one reading that its number leaves room for.
const MAX_PIECES: usize = 1 << 16;

/// Memory that reads fill.
///
/// # Safety
/// Until the value is dropped, each slice that [`Target::memory`] gives must stay valid at its address when the value is
/// moved, and nobody else may read or write it.
pub(crate) unsafe trait Target: Send {
    /// The memory of this kind, empty if there is none; always the same.
    fn memory(&mut self, place: Place) -> &mut [u8];
}

// SAFETY: a part's bytes are those of the extent that it owns, or of the pinned or host memory that it was given on its way
// there: mapped at its address until the part gives it up, and without another owner; a buffer's are memory of its own that stays where it is.
unsafe impl Target for crate::job::Job {
    fn memory(&mut self, place: Place) -> &mut [u8] {
        match place {
            Place::Part => self.part.bytes_mut().unwrap_or_default(),
            Place::Buffer => self.buffer.as_mut().map(|buffer| buffer.bytes()).unwrap_or_default(),
        }
    }
}

// SAFETY: the bytes are mapped at their address until the extent is dropped, and it is their only owner.
unsafe impl Target for tangram_device::Extent {
    fn memory(&mut self, place: Place) -> &mut [u8] {
        match place {
            Place::Part => self.host_bytes_mut().unwrap_or_default(),
            Place::Buffer => &mut [],
        }
    }
}

// SAFETY: the bytes are memory of the buffer's own and stay where they are when it is moved.
unsafe impl Target for crate::buffer::Buffer {
    fn memory(&mut self, place: Place) -> &mut [u8] {
        match place {
            Place::Part => &mut [],
            Place::Buffer => self.bytes(),
        }
    }
}

/// Wakes a thread that waits for completions.
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> io::Result<Bell> {
        Ok(Bell(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    /// Ends the wait that goes on, or the next one.
    pub(crate) fn ring(&self) {
        // Full only after 2^64 - 2 rings that nobody answered; then it is rung.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    fn silence(&self) {
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }
}

/// Some reads into one target.
struct Reading<T> {
    target: T,
    file: Arc<File>,
    pieces: Vec<Piece>,
    /// First addresses of the two memories.
    base: [*mut u8; 2],
    left: usize,
    result: io::Result<()>,
}

/// Reads under way.
pub(crate) struct Ring<T: Target> {
    ring: IoUring,
    readings: Slab<Reading<T>>,
    /// Pieces (reading, number) that the queue has no room for yet.
    line: VecDeque<(usize, usize)>,
    operations: usize,
    bell: Arc<Bell>,
    listening: bool,
}

// SAFETY: the raw pointers point into targets that the ring owns and that can be sent; nothing is tied to a thread.
unsafe impl<T: Target> Send for Ring<T> {}

impl<T: Target> Ring<T> {
    /// A ring whose waits `bell` ends.
    ///
    /// # Errors
    /// When the system knows no io_uring or does not allow it.
    pub(crate) fn new(bell: Arc<Bell>) -> io::Result<Ring<T>> {
        let ring = IoUring::builder().setup_clamp().build(ENTRIES)?;
        let mut known = io_uring::Probe::new();
        ring.submitter().register_probe(&mut known)?;
        if !known.is_supported(opcode::Read::CODE) || !known.is_supported(opcode::PollAdd::CODE) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let (readings, line) = (Slab::new(), VecDeque::new());
        Ok(Ring { ring, readings, line, operations: 0, bell, listening: false })
    }

    /// Reads that have not ended.
    pub(crate) fn operations(&self) -> usize {
        self.operations
    }

    /// Starts the reads of `pieces` of `file` into `target`.
    pub(crate) fn start(&mut self, mut target: T, file: Arc<File>, pieces: Vec<Piece>) {
        let mut base = [std::ptr::null_mut(); 2];
        let mut result = Ok(());
        for (place, base) in [Place::Part, Place::Buffer].into_iter().zip(&mut base) {
            let mut pieces = pieces.iter().filter(|piece| piece.place == place).peekable();
            if pieces.peek().is_some() {
                let memory = target.memory(place);
                *base = memory.as_mut_ptr();
                if !pieces.all(|piece| piece.at.start <= piece.at.end && piece.at.end <= memory.len()) {
                    result = Err(io::ErrorKind::InvalidInput.into());
                }
            }
        }
        if pieces.len() > MAX_PIECES {
            result = Err(io::ErrorKind::InvalidInput.into());
        }
        let pieces = if result.is_ok() { pieces } else { Vec::new() };
        let count = pieces.len();
        let key = self.readings.insert(Reading { target, file, pieces, base, left: count, result });
        if count == 0 {
            // Ends with the next wait, which must then not sleep.
            self.bell.ring();
        }
        self.operations += count;
        self.line.extend((0..count).map(|piece| (key, piece)));
    }

    /// Sleeps until a read ends or the bell rings; gives the targets whose reads have all ended.
    pub(crate) fn wait(&mut self) -> Vec<(T, io::Result<()>)> {
        self.fill_queue();
        if let Err(error) = self.ring.submit_and_wait(1)
            && error.kind() != io::ErrorKind::Interrupted
        {
            // The kernel is short of something; what is under way goes on, and the rest is submitted again.
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        self.reap();
        let over: Vec<usize> =
            self.readings.iter().filter(|(_, reading)| reading.left == 0).map(|(key, _)| key).collect();
        let over = over.into_iter().map(|key| self.readings.remove(key));
        over.map(|reading| (reading.target, reading.result)).collect()
    }

    fn fill_queue(&mut self) {
        let mut queue = self.ring.submission();
        if !self.listening {
            let poll = opcode::PollAdd::new(types::Fd(self.bell.0.as_raw_fd()), libc::POLLIN as u32);
            // SAFETY: a poll has no memory; the ring keeps the bell open.
            self.listening = unsafe { queue.push(&poll.build().user_data(BELL)) }.is_ok();
        }
        while let Some(&(key, number)) = self.line.front() {
            let Some(entry) = self.readings.get(key).and_then(|reading| reading.entry(key, number)) else {
                self.line.pop_front();
                continue;
            };
            // SAFETY: the entry's memory lies in the target, which the reading owns and gives back only when none of
            // its reads is left; its file is held open as long. See `Target` for why the memory stays.
            if unsafe { queue.push(&entry) }.is_err() {
                break;
            }
            self.line.pop_front();
        }
    }

    fn reap(&mut self) {
        for completion in self.ring.completion() {
            if completion.user_data() == BELL {
                self.bell.silence();
                self.listening = false;
                continue;
            }
            let (key, number) = split(completion.user_data());
            let Some(reading) = self.readings.get_mut(key) else { continue };
            if reading.advance(number, completion.result()) {
                self.line.push_back((key, number));
            } else {
                self.operations -= 1;
                reading.left -= 1;
            }
        }
    }
}

fn join(key: usize, number: usize) -> u64 {
    (key * MAX_PIECES + number) as u64
}

fn split(user_data: u64) -> (usize, usize) {
    (user_data as usize / MAX_PIECES, user_data as usize % MAX_PIECES)
}

impl<T> Reading<T> {
    fn entry(&self, key: usize, number: usize) -> Option<squeue::Entry> {
        let piece = self.pieces.get(number)?;
        let base = self.base[piece.place as usize];
        // SAFETY: `start` has checked that the piece lies in the memory that begins there, and it only ever shrinks.
        let address = unsafe { base.add(piece.at.start) };
        let read = opcode::Read::new(types::Fd(self.file.as_raw_fd()), address, piece.at.len() as u32);
        Some(read.offset(piece.offset).build().user_data(join(key, number)))
    }

    /// Notes what a read has brought; `true` if it has to go on.
    fn advance(&mut self, number: usize, result: i32) -> bool {
        let Some(piece) = self.pieces.get_mut(number) else { return false };
        let retry = [libc::EINTR, libc::EAGAIN].map(|errno| -errno);
        match usize::try_from(result) {
            Err(_) if retry.contains(&result) => true,
            Err(_) => {
                self.result = Err(io::Error::from_raw_os_error(-result));
                false
            }
            Ok(read) if read >= piece.needed => false,
            // Only the end of a file cuts a block.
            Ok(read) if read == 0 || !read.is_multiple_of(512) => {
                self.result = Err(io::ErrorKind::UnexpectedEof.into());
                false
            }
            Ok(read) => {
                piece.offset += read as u64;
                piece.at.start += read;
                piece.needed -= read;
                true
            }
        }
    }
}

impl<T: Target> Drop for Ring<T> {
    fn drop(&mut self) {
        // The kernel writes to the targets of what is under way, so they must outlive it. What it has not been told of
        // is forgotten.
        let queued: Vec<(usize, usize)> = self.line.drain(..).collect();
        for (key, _) in queued {
            self.operations -= 1;
            if let Some(reading) = self.readings.get_mut(key) {
                reading.left -= 1;
            }
        }
        while self.operations > 0 {
            if let Err(error) = self.ring.submit_and_wait(1)
                && error.kind() != io::ErrorKind::Interrupted
            {
                // No way to learn when the kernel is done: the memory is never used for anything else.
                std::mem::forget(std::mem::take(&mut self.readings));
                return;
            }
            self.reap();
            for _ in self.line.drain(..) {
                self.operations -= 1;
            }
        }
    }
}

/// How many bytes of a range of a file are in the page cache, in whole pages; `None` where the kernel does not tell.
pub(crate) fn cached_bytes(file: &File, offset: u64, len: u64) -> Option<u64> {
    /// Number of the call on every architecture of 64 bits that Rust knows but for mips.
    const CACHESTAT: libc::c_long = 451;
    #[repr(C)]
    struct Range {
        offset: u64,
        len: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Pages {
        cached: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let (range, mut pages) = (Range { offset, len }, Pages::default());
    // SAFETY: cachestat (Linux 6.5) reads one structure and writes the other; both have the layout of its interface and
    // live until it returns. Older kernels answer ENOSYS.
    let answer =
        unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut pages, 0u32) };
    (answer == 0).then(|| pages.cached * rustix::param::page_size() as u64)
}
