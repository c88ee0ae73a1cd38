//! What sequences do in a random program: start behind cached prefixes, take blocks, publish them, end; and room that is
//! made ahead of them.

use rand::RngExt;
use tangram_device::Extent;
use tangram_pool::{ALIGNMENT, Backend, BlockHash, KvReserve};

use crate::program::{Deployment, Evictions, Program, Sequence, short};
use crate::reference::{Blocks, Published};
use crate::segment;

impl Program {
    pub fn start_sequence(&mut self) -> Option<Evictions> {
        let deployment = self.any(self.deployments.len())?;
        if self.sequences.len() >= 8 {
            return None;
        }
        let Deployment { model, kv, .. } = self.deployments[deployment];
        let identity = self.universe.models[model].identity;
        // Few different tokens, so that sequences often begin alike.
        let length = self.random.random_range(1..7);
        let blocks: Blocks = (0..length).map(|_| u8::from(self.random.random_bool(0.25))).collect();
        let hashes: Vec<BlockHash> = (1..=length).map(|end| hash(identity, &blocks[..end])).collect();
        let known = &mut self.reference.kv[identity].published;
        let in_use = (1..=length)
            .take_while(|&end| known.get(&blocks[..end]).is_some_and(|block| block.leases > 0))
            .count();
        assert_eq!(self.pool.blocks_in_use(kv, &hashes), in_use, "blocks in use");
        let prefix = self.pool.lease_prefix(kv, &hashes, 0.01, self.now);
        assert!(prefix.len() >= in_use && prefix.len() <= length);
        for end in 1..=prefix.len() {
            let block = known.get_mut(&blocks[..end]).expect("a cached block was published");
            if block.leases == 0 {
                self.reference.cached_bytes -= self.universe.block_bytes[identity] as u64;
                let offset = prefix.blocks()[end - 1].offset();
                if block.offset != offset {
                    self.reference.relocated_total += self.universe.block_bytes[identity] as u64;
                }
                block.offset = offset;
            }
            block.leases += 1;
        }
        if prefix.len() < length {
            // It was evicted at some time.
            let gone = known.remove(&blocks[..=prefix.len()]);
            assert!(gone.is_none_or(|block| block.leases == 0), "a block in use was evicted");
        }
        let found = prefix.len();
        self.counts.add("cached blocks found", found as u64);
        self.note(|| format!("start {blocks:?} of identity {identity}, {found} blocks cached"));
        self.sequences.push(Sequence { identity, kv, blocks, prefix, own: Vec::new() });
        Some(Evictions::Forbidden)
    }

    pub fn grow_sequence(&mut self) -> Option<Evictions> {
        let index = self.any(self.sequences.len())?;
        let (kv, identity) = (self.sequences[index].kv, self.sequences[index].identity);
        let bytes = self.universe.block_bytes[identity];
        let count = self.random.random_range(1..9usize).saturating_sub(4).max(1);
        let one = [KvReserve { kv, blocks: count }];
        let (has, can) = (self.pool.has_room(&one), self.pool.can_reserve(&one));
        assert!(can || !has, "there is room, and could not be");
        self.reference.settle();
        let fits = match self.universe.backend {
            Backend::Paged => None,
            Backend::Segment => segment::blocks_that_fit(self, bytes).map(|most| count <= most),
        };
        let before = self.pool.stats();
        let result = self.pool.take_kv(kv, count).map_err(short);
        self.note(|| {
            let outcome = result.as_ref().map(|blocks| blocks.iter().map(Extent::offset).collect::<Vec<_>>());
            format!("take {count} blocks of identity {identity}: {outcome:?}")
        });
        match result {
            Ok(blocks) => {
                assert!(fits != Some(false), "blocks out of nothing");
                assert_eq!(blocks.len(), count);
                for mut block in blocks {
                    assert_eq!(block.len(), bytes);
                    let mut room = block.to_vec().unwrap();
                    assert!(room.iter().all(|&byte| byte == 0), "leftovers in a block");
                    self.tag += 1;
                    write_words(&mut room, self.tag);
                    block.write(0, &room).unwrap();
                    self.sequences[index].own.push((block, self.tag));
                }
                self.counts.add("blocks taken", count as u64);
                Some(if has { Evictions::Forbidden } else { Evictions::Allowed })
            }
            Err(shortage) => {
                assert!(!can && fits != Some(true), "{shortage:?} although there is room");
                match self.universe.backend {
                    Backend::Paged => assert!(shortage.needed > 0, "{shortage:?} of nothing"),
                    Backend::Segment => {
                        assert_eq!(shortage, segment::shortage(self, &[], &[(identity, count)]))
                    }
                }
                self.nothing_changed(before);
                self.counts.add("blocks refused", count as u64);
                Some(Evictions::Forbidden)
            }
        }
    }

    pub fn publish_block(&mut self) -> Option<Evictions> {
        let index = self.any(self.sequences.len())?;
        let sequence = &mut self.sequences[index];
        let at = sequence.prefix.len();
        if sequence.own.is_empty() || at >= sequence.blocks.len() {
            return None;
        }
        let name = sequence.blocks[..=at].to_vec();
        let hash = hash(sequence.identity, &name);
        let (mut block, _) = sequence.own.remove(0);
        let mut bytes = vec![0; block.len()];
        write_words(&mut bytes, word(&hash));
        block.write(0, &bytes).unwrap();
        let (identity, bytes) = (sequence.identity, block.len() as u64);
        let cached = self.pool.stats().kv_cached_bytes;
        self.pool.publish(sequence.kv, &mut sequence.prefix, hash, block, 0.01, self.now);
        assert_eq!(sequence.prefix.len(), at + 1);
        let extent = &sequence.prefix.blocks()[at];
        let offset = extent.offset();
        let known = self.reference.kv[identity].published.entry(name.clone());
        let known = known.or_insert(Published { leases: 0, offset });
        if known.leases > 0 {
            assert_eq!(known.offset, offset, "a block that is in use is published twice");
        }
        let revived = self.pool.stats().kv_cached_bytes != cached;
        if revived {
            assert_eq!(known.leases, 0, "cached bytes of a block that was in use");
            self.reference.cached_bytes -= bytes;
            self.counts.add("cached blocks published again", 1);
        }
        *known = Published { leases: known.leases + 1, offset };
        self.note(|| format!("publish {name:?} of identity {identity}, revived: {revived}"));
        Some(Evictions::Forbidden)
    }

    pub fn end_sequence(&mut self) -> Option<Evictions> {
        let index = self.any(self.sequences.len())?;
        self.end(index);
        Some(Evictions::Forbidden)
    }

    pub fn end(&mut self, index: usize) {
        let Sequence { identity, kv, blocks, prefix, own } = self.sequences.swap_remove(index);
        for end in 1..=prefix.len() {
            let block = self.reference.kv[identity].published.get_mut(&blocks[..end]).unwrap();
            block.leases -= 1;
            if block.leases == 0 {
                self.reference.cached_bytes += self.universe.block_bytes[identity] as u64;
            }
        }
        self.note(|| format!("end {blocks:?} of identity {identity}"));
        self.pool.release_prefix(prefix);
        self.pool.give_kv(kv, own.into_iter().map(|(block, _)| block).collect());
    }

    /// Makes room ahead of need.
    pub fn reclaim(&mut self) -> Option<Evictions> {
        let index = self.any(self.deployments.len())?;
        let probes = self.random.random_bool(0.5);
        let units = self.universe.bytes()
            / if self.universe.backend == Backend::Paged { self.universe.page_bytes } else { ALIGNMENT };
        let one = match probes {
            true => KvReserve { kv: self.probe, blocks: self.random.random_range(0..units) },
            false => KvReserve { kv: self.deployments[index].kv, blocks: self.random.random_range(0..9) },
        };
        let (had, can) = (self.pool.has_room(&[one]), self.pool.can_reserve(&[one]));
        self.reference.settle();
        self.pool.reclaim(&[one]);
        self.note(|| format!("reclaim {one:?}: there is room: {had}, can be: {can}"));
        self.counts.add("reclaims", 1);
        // Blocks as large as what is counted find room wherever there is some; so does any in pages.
        if can && (probes || self.universe.backend == Backend::Paged) {
            assert!(self.pool.has_room(&[one]), "{one:?} found no room although there is some");
        }
        assert_eq!(self.pool.stats().moved_total, self.reference.moved_total, "reclaiming moves nothing");
        Some(if had { Evictions::Forbidden } else { Evictions::Allowed })
    }
}

/// Names a block by everything up to its end.
pub fn hash(identity: usize, blocks: &[u8]) -> BlockHash {
    let mut hash = [0xff; 32];
    hash[0] = identity as u8;
    hash[1..=blocks.len()].copy_from_slice(blocks);
    hash
}

/// The word that a published block is full of.
pub fn word(hash: &BlockHash) -> u64 {
    let named = hash
        .iter()
        .fold(0xcbf2_9ce4_8422_2325u64, |sum, &byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    named | 1 << 63
}

fn write_words(bytes: &mut [u8], word: u64) {
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
}
