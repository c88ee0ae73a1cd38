//! Which chunks need not be verified again when they are copied from the page cache.
//!
//! The page cache is memory, as the pool is, and what lies in the pool is not verified over and over either. So a chunk that
//! was copied from there and matched its checksum is taken as it is from then on, for [`TRUST`], if it comes from the page
//! cache again and its file has not changed. What is read from the disk is always verified. One thing stays open: the kernel
//! may drop a page and read it again for somebody else, from a disk that has gone bad within these minutes.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::fstat;
use tangram_checkpoint::Checksum;

/// For how long a match counts.
const TRUST: Duration = Duration::from_secs(600);
/// Clocks of file systems may tick this slowly: of a file that was changed later than that ago, the next change may not
/// be seen.
const TICK: Duration = Duration::from_secs(2);
/// Most chunks that are remembered, which is some megabytes: enough for 128 GiB.
const MOST_CHUNKS: usize = 1 << 16;

/// What a file is known by, and what changes with each change of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Stamp {
    disk: u64,
    number: u64,
    bytes: i64,
    /// Seconds and nanoseconds of the last changes of bytes and of anything, since 1970.
    modified: (i64, i64),
    changed: (i64, i64),
}

/// A chunk: its file as it is, and its place in it.
type Key = (Stamp, u64);

/// What has matched.
pub(crate) struct Trust {
    tick: Duration,
    matched: Mutex<HashMap<Key, (Checksum, Instant)>>,
}

impl Default for Trust {
    fn default() -> Trust {
        Trust::with_tick(TICK)
    }
}

impl Trust {
    /// With file systems whose clocks tick so slowly.
    pub(crate) fn with_tick(tick: Duration) -> Trust {
        Trust { tick, matched: Mutex::default() }
    }

    /// What the file is like now; `None` if that is not known, or a later change might not be seen.
    pub(crate) fn stamp(&self, file: &File) -> Option<Stamp> {
        let status = fstat(file).ok()?;
        let changed = (status.st_ctime as i64, status.st_ctime_nsec as i64);
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        let changed_at = Duration::new(u64::try_from(changed.0).ok()?, u32::try_from(changed.1).ok()?);
        let settled = since_1970.checked_sub(changed_at)? >= self.tick;
        settled.then_some(Stamp {
            disk: status.st_dev,
            number: status.st_ino,
            bytes: status.st_size,
            modified: (status.st_mtime as i64, status.st_mtime_nsec as i64),
            changed,
        })
    }

    /// Whether the chunk at `offset` matched `sum` not long before `now`.
    pub(crate) fn holds(&self, stamp: Stamp, offset: u64, sum: Checksum, now: Instant) -> bool {
        let matched = self.matched.lock().unwrap_or_else(PoisonError::into_inner);
        let matched = matched.get(&(stamp, offset));
        matched.is_some_and(|&(of, at)| of == sum && now.saturating_duration_since(at) < TRUST)
    }

    /// The chunk at `offset` matched, as it came from the page cache.
    pub(crate) fn note(&self, stamp: Stamp, offset: u64, sum: Checksum, now: Instant) {
        let mut matched = self.matched.lock().unwrap_or_else(PoisonError::into_inner);
        if matched.len() >= MOST_CHUNKS && !matched.contains_key(&(stamp, offset)) {
            matched.retain(|_, (_, at)| now.saturating_duration_since(*at) < TRUST);
            if matched.len() >= MOST_CHUNKS {
                matched.clear();
            }
        }
        matched.insert((stamp, offset), (sum, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_match_counts_for_a_while_and_for_the_same_file_place_and_checksum() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        std::fs::write(&path, b"before").unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(Trust::default().stamp(&file), None, "a further change now might not be seen");
        let trust = Trust::with_tick(Duration::ZERO);
        let stamp = trust.stamp(&file).unwrap();
        let (sum, now) = (Checksum::of(b"x"), Instant::now());
        assert!(!trust.holds(stamp, 0, sum, now));
        trust.note(stamp, 0, sum, now);
        assert!(trust.holds(stamp, 0, sum, now));
        assert!(trust.holds(stamp, 0, sum, now + TRUST - Duration::from_secs(1)));
        assert!(!trust.holds(stamp, 0, sum, now + TRUST), "not for ever");
        assert!(!trust.holds(stamp, 1, sum, now), "another place");
        assert!(!trust.holds(stamp, 0, Checksum::of(b"y"), now), "another checksum");
        std::fs::write(&path, b"behind").unwrap();
        let changed = trust.stamp(&file).unwrap();
        assert_ne!(changed, stamp);
        assert!(!trust.holds(changed, 0, sum, now), "the file has changed");
    }

    #[test]
    fn what_is_remembered_is_limited() {
        let trust = Trust::with_tick(Duration::ZERO);
        let stamp = Stamp { disk: 0, number: 0, bytes: 0, modified: (0, 0), changed: (0, 0) };
        let (sum, now) = (Checksum::of(b"x"), Instant::now());
        (0..=MOST_CHUNKS as u64).for_each(|offset| trust.note(stamp, offset, sum, now));
        assert!(trust.matched.lock().unwrap().len() <= MOST_CHUNKS);
        assert!(trust.holds(stamp, MOST_CHUNKS as u64, sum, now), "the last one is");
    }
}
