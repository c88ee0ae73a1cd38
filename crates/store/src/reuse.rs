//! Which parts are read through the page cache, so that it has them the next time: those that come again, as far as there
//! is memory for them. A pure state machine.
//!
//! Reading past the cache is fastest and leaves nothing behind. A model that is loaded again and again, because the pool has
//! no room for all, is better kept in memory that is idle anyway. So a part's first read goes past the cache, and its second
//! through it (as in the 2Q replacement of Johnson and Shasha, VLDB 1994: what came once need not come again). If the
//! system then takes it out again, memory is short, and neither the part is tried any more nor what was kept until then:
//! reads through the cache are slower, and what the system reads ahead would hide for long that the rest is gone too.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// A file (as [`crate::file::DataFile::identity`] has it) and the offset of a part in it.
pub(crate) type Key = ((u64, i64), u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    Once,
    /// Before so many losses.
    Kept(u64),
    GivenUp,
}

/// What has been read of a disk.
pub(crate) struct Reuse {
    /// Bytes of the parts that may be kept.
    budget: u64,
    /// Bytes of those that are kept since the last loss.
    kept: u64,
    /// How often something that was kept was gone.
    losses: u64,
    parts: HashMap<Key, Known>,
}

impl Reuse {
    /// Nothing has been read; up to `budget` bytes may be kept.
    pub(crate) fn new(budget: u64) -> Reuse {
        Reuse { budget, kept: 0, losses: 0, parts: HashMap::new() }
    }

    /// The cache has a part of `len` bytes. If that was read past it before, it was read ahead with others and counts as
    /// they do.
    pub(crate) fn found(&mut self, key: Key, len: u64) {
        if let Some(known @ Known::Once) = self.parts.get_mut(&key) {
            *known = Known::Kept(self.losses);
            self.kept += len;
        }
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
                    known.insert(Known::Kept(self.losses));
                    self.kept += len;
                    true
                }
                Known::Once | Known::GivenUp => false,
                Known::Kept(losses) => {
                    if *losses == self.losses {
                        self.losses += 1;
                        self.kept = 0;
                    }
                    known.insert(Known::GivenUp);
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
    use std::collections::HashSet;

    fn key(offset: u64) -> Key {
        ((1, 2), offset)
    }

    #[test]
    fn the_second_read_goes_through_the_cache_once() {
        let mut reuse = Reuse::new(10);
        let reads: Vec<bool> = (0..5).map(|_| reuse.read(key(0), 10)).collect();
        assert_eq!(reads, [false, true, false, false, false], "then it was not kept, so memory is short");
        assert_eq!(
            [reuse.read(key(10), 10), reuse.read(key(10), 10)],
            [false, true],
            "its room is free again"
        );
        assert!(budget() > 0);
    }

    #[test]
    fn when_one_is_gone_none_is_counted_on() {
        let mut reuse = Reuse::new(20);
        let read = |reuse: &mut Reuse, part| reuse.read(key(part), 10);
        for part in [0, 10, 20] {
            assert!(!read(&mut reuse, part));
        }
        assert_eq!(
            [0, 10, 20].map(|part| read(&mut reuse, part)),
            [true, true, false],
            "there is room for two"
        );
        assert!(!read(&mut reuse, 0), "memory is short");
        assert!(!read(&mut reuse, 10), "so this one was given up too, and is no second loss");
        assert!(read(&mut reuse, 20), "what was not kept then has not been tried");
        assert_eq!(reuse.losses, 1);
        assert!(!read(&mut reuse, 20));
        assert_eq!(reuse.losses, 2);
    }

    #[test]
    fn what_was_read_ahead_is_kept_too() {
        let mut reuse = Reuse::new(20);
        assert!(!reuse.read(key(0), 10) && !reuse.read(key(10), 10));
        assert!(reuse.read(key(0), 10));
        reuse.found(key(10), 10);
        assert_eq!(reuse.kept, 20);
        assert!(!reuse.read(key(0), 10));
        assert!(!reuse.read(key(10), 10), "not tried again");
        reuse.found(key(20), 10);
        assert!(!reuse.read(key(20), 10), "what an import left there was not brought in by loads");
    }

    proptest! {
        #[test]
        fn no_more_is_kept_than_there_is_room_for(reads in prop::collection::vec(0u64..20, 0..200)) {
            let mut reuse = Reuse::new(30);
            let (mut kept, mut tried): (HashMap<u64, u64>, HashSet<u64>) = Default::default();
            for part in reads {
                // A part always has the same length.
                let len = part % 7 + 1;
                if reuse.read(key(part), len) {
                    prop_assert!(tried.insert(part), "read through the cache once");
                    kept.insert(part, len);
                } else if kept.contains_key(&part) {
                    kept.clear();
                }
                prop_assert!(kept.values().sum::<u64>() <= 30);
                prop_assert_eq!(kept.values().sum::<u64>(), reuse.kept);
            }
        }
    }
}
