//! Which parts are read through the page cache, so that it has them the next time: those that come again, as far as there
//! is memory for them. A pure state machine.
//!
//! Reading past the cache is fastest and leaves nothing behind. A model that is loaded again and again, because the pool has
//! no room for all, is better kept in memory that is idle anyway. So a part's first read goes past the cache, and its second
//! through it (as in the 2Q replacement of Johnson and Shasha, VLDB 1994: what came once need not come again). If the
//! system then takes it out again, memory is short, and the part is not tried any more.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// A file (its number on its disk) and the offset of a part in it.
pub(crate) type Key = (u64, u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Once,
    Kept,
    GivenUp,
}

/// What has been read of a disk.
pub(crate) struct Reuse {
    /// Bytes of the parts that may be kept.
    budget: u64,
    kept: u64,
    parts: HashMap<Key, Known>,
}

impl Reuse {
    /// Nothing has been read; up to `budget` bytes may be kept.
    pub(crate) fn new(budget: u64) -> Reuse {
        Reuse { budget, kept: 0, parts: HashMap::new() }
    }

    /// A part of `len` bytes that the cache does not have is about to be read; `true` if it is to be read through it.
    pub(crate) fn read(&mut self, key: Key, len: u64) -> bool {
        match self.parts.entry(key) {
            Entry::Vacant(new) => {
                new.insert(Known::Once);
                false
            }
            Entry::Occupied(mut known) => match known.get() {
                Known::Once if self.kept + len <= self.budget => {
                    known.insert(Known::Kept);
                    self.kept += len;
                    true
                }
                Known::Once | Known::GivenUp => false,
                Known::Kept => {
                    known.insert(Known::GivenUp);
                    self.kept = self.kept.saturating_sub(len);
                    false
                }
            },
        }
    }
}

/// Half of the memory that the system could still give, in bytes.
pub(crate) fn budget() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024 / 2
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_second_read_goes_through_the_cache_once() {
        let mut reuse = Reuse::new(10);
        let reads: Vec<bool> = (0..5).map(|_| reuse.read((1, 0), 10)).collect();
        assert_eq!(reads, [false, true, false, false, false], "then it was not kept, so memory is short");
        assert_eq!(
            [reuse.read((1, 10), 10), reuse.read((1, 10), 10)],
            [false, true],
            "its room is free again"
        );
        assert!(budget() > 0);
    }

    proptest! {
        #[test]
        fn no_more_is_kept_than_there_is_room_for(reads in prop::collection::vec((0u64..20, 1u64..8), 0..200)) {
            let mut reuse = Reuse::new(30);
            let mut kept: HashMap<u64, u64> = HashMap::new();
            for (part, _) in reads {
                // A part always has the same length.
                let len = part % 7 + 1;
                if reuse.read((0, part), len) {
                    prop_assert!(kept.insert(part, len).is_none(), "read through the cache once");
                } else {
                    kept.remove(&part);
                }
                prop_assert!(kept.values().sum::<u64>() <= 30);
                prop_assert_eq!(kept.values().sum::<u64>(), reuse.kept);
            }
        }
    }
}
