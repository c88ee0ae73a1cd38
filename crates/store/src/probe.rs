//! What a disk gives to direct reads, and how many of which size it takes for that.
//!
//! Measured with reads of a file that is already there; nothing is written. Takes about a second, so it is for the first
//! start on a disk and not for the path of a request.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tangram_device::cpu::CpuDevice;
use tangram_device::{Arena, Claim, Contents, Extent};

use crate::file::DataFile;
use crate::plan::{Piece, Place};
use crate::ring::{Bell, Ring};

/// How a disk is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tuning {
    /// Bytes of one read, at most a chunk of a tensor.
    pub block: usize,
    /// Reads under way at a time.
    pub depth: usize,
}

impl Default for Tuning {
    /// For a disk that was not measured: enough for most, little enough that urgent reads do not wait long.
    fn default() -> Self {
        Tuning { block: 2 << 20, depth: 6 }
    }
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// How to read it.
    pub tuning: Tuning,
    /// What it gives then.
    pub bytes_per_second: f64,
}

/// Sizes of reads that are tried.
const BLOCKS: [usize; 3] = [512 << 10, 1 << 20, 2 << 20];
/// Numbers of reads that are tried.
const DEPTHS: [usize; 7] = [6, 8, 12, 16, 24, 32, 64];
/// Less under way leaves the disk idle whenever the reading thread has to wait for a core.
const LEAST_UNDER_WAY: usize = 12 << 20;
/// More is not kept under way: what is urgent waits behind it.
const MOST_UNDER_WAY: usize = 32 << 20;
/// One trial.
const TRIAL: Duration = Duration::from_millis(30);
/// All trials.
const PATIENCE: Duration = Duration::from_millis(1200);
/// A smaller file says nothing.
const LEAST_FILE: u64 = 64 << 20;
/// Of what settings that give nearly as much as the best, the one with the least under way is taken.
const NEARLY: f64 = 0.98;

/// All settings that are tried, here and later.
pub(crate) fn settings() -> impl Iterator<Item = Tuning> {
    BLOCKS
        .into_iter()
        .flat_map(|block| DEPTHS.map(|depth| Tuning { block, depth }))
        .filter(|tuning| (LEAST_UNDER_WAY..=MOST_UNDER_WAY).contains(&(tuning.block * tuning.depth)))
}

/// The number of the file system that a path lies on, and what to know it again by when another has that number.
///
/// # Errors
/// When the system cannot tell.
pub fn disk_of(path: &Path) -> io::Result<(u64, String)> {
    let file = File::open(path)?;
    let number = file.metadata()?.dev();
    let status = rustix::fs::fstatvfs(&file)?;
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let (id, blocks, block) = (status.f_fsid, status.f_blocks, status.f_frsize);
    Ok((number, format!("{major}:{minor}, file system {id:x}, {blocks} blocks of {block} bytes")))
}

/// Measures the disk that a file lies on. `None` if there is nothing to measure: the file is too small, cannot be read past
/// the page cache, or there is no io_uring.
///
/// # Errors
/// When the file cannot be read.
pub fn measure(path: &Path) -> io::Result<Option<Measured>> {
    let file = DataFile::open(path)?;
    let bytes = file.cached().metadata()?.len();
    let Some((direct, _)) = file.direct().filter(|_| bytes >= LEAST_FILE) else { return Ok(None) };
    let Ok(mut ring) = Bell::new().and_then(|bell| Ring::new(Arc::new(bell))) else { return Ok(None) };
    // Memory as a pool has it: how the disk gets at it is a part of what is measured.
    let memory = CpuDevice::open(MOST_UNDER_WAY, 2 << 20).map_err(io::Error::other)?;
    let arena = Arena::reserve(memory, MOST_UNDER_WAY).map_err(io::Error::other)?;
    let mut trials: Vec<Measured> =
        settings().map(|tuning| Measured { tuning, bytes_per_second: 0.0 }).collect();
    // The lightest first: a slow disk is through its patience before the heavy ones.
    trials.sort_by_key(|trial| trial.tuning.block * trial.tuning.depth);
    let (started, mut at) = (Instant::now(), 0);
    // Twice in turn, so that a moment's disturbance spoils no setting.
    for _ in 0..2 {
        for trial in &mut trials {
            if started.elapsed() >= PATIENCE {
                break;
            }
            let rate = try_out(&mut ring, &arena, (direct, bytes), trial.tuning, &mut at)?;
            trial.bytes_per_second = trial.bytes_per_second.max(rate);
        }
    }
    Ok(choose(&trials))
}

/// The setting with the least under way of those that give nearly as much as the best.
fn choose(trials: &[Measured]) -> Option<Measured> {
    let best = trials.iter().map(|trial| trial.bytes_per_second).fold(0.0, f64::max);
    let good = trials.iter().filter(|trial| best > 0.0 && trial.bytes_per_second >= NEARLY * best);
    // Of equals the larger reads: they cost less.
    let load = |trial: &&Measured| (trial.tuning.block * trial.tuning.depth, trial.tuning.depth);
    good.min_by_key(load).copied()
}

/// Bytes per second of one setting. `at` goes on through the file, so that no trial reads what the one before has read.
fn try_out(
    ring: &mut Ring<Extent>,
    arena: &Arc<Arena>,
    (file, file_bytes): (&Arc<File>, u64),
    tuning: Tuning,
    at: &mut u64,
) -> io::Result<f64> {
    let Tuning { block, depth } = tuning;
    let claims: Vec<Claim> = (0..depth).map(|read| Claim { offset: read * block, len: block }).collect();
    let mut memory = arena.claim_all(&claims, Contents::Overwritten).map_err(io::Error::other)?;
    memory.iter_mut().for_each(Extent::prepare_write);
    let mut start = |ring: &mut Ring<Extent>, extent: Extent| {
        if *at + block as u64 > file_bytes {
            *at = 0;
        }
        let piece = Piece { offset: *at, place: Place::Part, at: 0..block, needed: block };
        *at = (*at + block as u64).next_multiple_of(block as u64);
        ring.start(extent, file.clone(), vec![piece]);
    };
    let started = Instant::now();
    memory.into_iter().for_each(|extent| start(ring, extent));
    let mut read = 0;
    while ring.operations() > 0 {
        for (extent, result) in ring.wait() {
            result?;
            read += block;
            if started.elapsed() < TRIAL {
                start(ring, extent);
            }
        }
    }
    Ok(read as f64 / started.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lightest_of_the_good_ones_is_taken() {
        let trial = |block: usize, depth, bytes_per_second| Measured {
            tuning: Tuning { block: block << 20, depth },
            bytes_per_second,
        };
        let trials = [trial(1, 1, 1e9), trial(1, 16, 1.98e9), trial(2, 8, 1.97e9), trial(2, 16, 2e9)];
        assert_eq!(choose(&trials).unwrap().tuning, Tuning { block: 2 << 20, depth: 8 });
        assert_eq!(choose(&[]), None);
        assert_eq!(choose(&[trial(1, 1, 0.0)]), None);
    }

    #[test]
    fn a_disk_is_measured_and_known_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        std::fs::write(&path, vec![7; LEAST_FILE as usize]).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        assert_eq!(disk_of(&path).unwrap(), disk_of(dir.path()).unwrap());
        match measure(&path).unwrap() {
            Some(Measured { tuning, bytes_per_second }) => {
                assert!(BLOCKS.contains(&tuning.block) && DEPTHS.contains(&tuning.depth));
                assert!(bytes_per_second > 0.0);
            }
            None => println!("skipped: no direct reads through io_uring here"),
        }
        std::fs::write(&path, [7; 1000]).unwrap();
        assert_eq!(measure(&path).unwrap(), None, "too small");
    }
}
