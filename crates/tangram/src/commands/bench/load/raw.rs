//! The limits: what the disk gives to the simplest reader past the page cache, and what a plain copy of memory takes.

use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::fs::{Advice, OFlags, fadvise};
use rustix::time::{ClockId, clock_gettime};
use tangram_device::cpu::CpuDevice;
use tangram_device::{Arena, Claim, Contents};

use super::Cost;

/// Threads of the simplest reader, each with one read under way: more did not give more on any disk tried.
const READERS: usize = 4;
/// Bytes of each of its reads.
const READ: usize = 4 << 20;
/// Bytes that an import writes at a time.
const BLOCK: usize = 2 << 20;
/// A file that was not changed for so long is taken as it is.
const SETTLED: Duration = Duration::from_millis(2500);
/// Suits the direct reads of every disk.
const ALIGNMENT: usize = 4096;
/// Threads of the memory copy: as many as the CPU device has copy streams.
const COPIERS: usize = 2;
/// Each copier's memory, far more than a cache holds.
const COPIED: usize = 128 << 20;

/// Takes a file out of the page cache.
pub(in super::super) fn drop_cache(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    file.sync_all()?;
    // What is mapped stays.
    tangram_store::unmap(&file);
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}

/// Writes a file anew, as an import writes it, so that the page cache has it as an import leaves it.
pub(super) fn write_anew(path: &Path) -> anyhow::Result<()> {
    let copy = path.with_extension("anew");
    let (from, to, mut buffer, mut at) = (File::open(path)?, File::create(&copy)?, vec![0; BLOCK], 0);
    let bytes = from.metadata()?.len();
    while at < bytes {
        let block = buffer.get_mut(..(bytes - at).min(BLOCK as u64) as usize).unwrap_or_default();
        from.read_exact_at(block, at)?;
        to.write_all_at(block, at)?;
        at += block.len() as u64;
    }
    to.sync_all()?;
    std::fs::rename(&copy, path)?;
    // Of a file that was changed a moment ago the store does not know whether it is still being changed.
    std::thread::sleep(SETTLED);
    Ok(())
}

/// Brings a file into the page cache.
pub(super) fn fill_cache(path: &Path) -> anyhow::Result<()> {
    let (file, mut buffer, mut at) = (File::open(path)?, vec![0; READ], 0);
    loop {
        match file.read_at(&mut buffer, at)? {
            0 => return Ok(()),
            read => at += read as u64,
        }
    }
}

/// User and system time of this process so far.
pub(super) fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads a whole file with direct reads.
pub(in super::super) fn direct(path: &Path) -> anyhow::Result<Cost> {
    let flags = OFlags::DIRECT.bits() as i32;
    let file = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = file.with_context(|| format!("{} cannot be read past the page cache", path.display()))?;
    let bytes = file.metadata()?.len();
    // A pool's memory, written before, with room for all of it: a load does not read everything into the same few bytes,
    // which would stay in a cache.
    let reads = bytes.div_ceil(READ as u64) as usize;
    let memory = CpuDevice::open(reads * READ, READ)?;
    let arena = Arena::reserve(memory, reads * READ)?;
    let claims: Vec<Claim> = (0..reads).map(|read| Claim { offset: read * READ, len: READ }).collect();
    let mut extents = arena.claim_all(&claims, Contents::Zeroed)?;
    extents.reverse();
    // What was read stays until all is, as a load's does.
    let (places, done) = (Mutex::new(extents), Mutex::new(Vec::with_capacity(reads)));
    let reader = || -> std::io::Result<()> {
        loop {
            let Some(mut place) = lock(&places).pop() else { return Ok(()) };
            let at = place.offset() as u64;
            let whole = (bytes - at).next_multiple_of(ALIGNMENT as u64).min(READ as u64) as usize;
            let into = place.host_bytes_mut().and_then(|into| into.get_mut(..whole)).unwrap_or_default();
            if file.read_at(into, at)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            lock(&done).push(place);
        }
    };
    let (started, cpu) = (Instant::now(), cpu_time());
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(reader)).collect();
        readers.into_iter().try_for_each(|reader| {
            reader.join().unwrap_or_else(|_| Err(std::io::Error::other("a reader panicked")))
        })
    })?;
    Ok(Cost {
        bytes,
        seconds: started.elapsed().as_secs_f64(),
        cpu_seconds: (cpu_time() - cpu).as_secs_f64(),
        peak_bytes: None,
    })
}

/// Copies as many bytes within memory that has been written before.
pub(super) fn copy(bytes: u64) -> Cost {
    let share = bytes as usize / COPIERS;
    let mut memory: Vec<[Vec<u8>; 2]> =
        (0..COPIERS).map(|i| [i as u8, 9].map(|b| vec![b | 1; COPIED])).collect();
    let (started, cpu) = (Instant::now(), cpu_time());
    std::thread::scope(|scope| {
        for [from, to] in &mut memory {
            scope.spawn(move || {
                let mut left = share;
                while left > 0 {
                    let len = left.min(COPIED);
                    to[..len].copy_from_slice(std::hint::black_box(&from[..len]));
                    std::hint::black_box(&*to);
                    left -= len;
                }
            });
        }
    });
    Cost {
        bytes: (share * COPIERS) as u64,
        seconds: started.elapsed().as_secs_f64(),
        cpu_seconds: (cpu_time() - cpu).as_secs_f64(),
        peak_bytes: None,
    }
}
