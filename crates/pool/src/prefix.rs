//! KV blocks through the pool: taking and giving them back, and the prefix cache.
//!
//! A sequence owns the blocks that it writes. When a block is full it is published: from then on nobody writes it,
//! every sequence of the model that begins with the same tokens can use it, and without a user it stays as long as
//! it is worth its room, in the same order as weights: worth per byte is expected uses × the prefill time that it saves.

use std::collections::HashMap;
use std::sync::Arc;

use tangram_checkpoint::Hash;
use tangram_device::{DeviceError, Extent};
use tangram_policy::{Event, TensorKey};

use crate::kv::{BlockHash, KvKey, Prefix};
use crate::pool::{Pool, Refusal};
use crate::room::{Home, KvReserve, KvSpace, Place, Room};

/// A full block that sequences can share.
pub(crate) struct PublishedBlock {
    pub(crate) kv: KvKey,
    pub(crate) hash: BlockHash,
    pub(crate) extent: Arc<Extent>,
    pub(crate) leases: u32,
    pub(crate) place: Place,
    /// Blocks before it in its prefix.
    pub(crate) index: usize,
    /// Whether a later sequence has found it.
    pub(crate) found: bool,
}

impl Pool {
    /// Makes room in the address space for one model's KV blocks of `block_bytes` each; takes no device memory.
    /// Models of equal `identity` compute equal keys and values, so they have their blocks and prefixes together.
    ///
    /// # Errors
    /// When the address space is exhausted.
    pub fn add_kv(&mut self, identity: Hash, block_bytes: usize) -> Result<KvKey, DeviceError> {
        let same = |kv: &KvSpace| kv.identity == identity;
        if let Some(index) = self.kv.iter().position(|kv| kv.as_ref().is_some_and(same)) {
            self.kv[index].iter_mut().for_each(|kv| kv.models += 1);
            return Ok(KvKey(index));
        }
        let index = self.kv.iter().position(Option::is_none).unwrap_or(self.kv.len());
        self.room.add_kv(KvKey(index), block_bytes)?;
        if index == self.kv.len() {
            self.kv.push(None);
        }
        self.kv[index] = Some(KvSpace { block_bytes, published: HashMap::new(), identity, models: 1 });
        Ok(KvKey(index))
    }

    /// A model is gone. The last one of its identity takes the cached prefixes with it; none of its blocks may be in
    /// use then.
    pub fn remove_kv(&mut self, key: KvKey) {
        let Some(kv) = self.space(key) else { return };
        kv.models -= 1;
        if kv.models > 0 {
            return;
        }
        let keys: Vec<TensorKey> =
            self.space(key).map_or(Vec::new(), |kv| kv.published.values().copied().collect());
        let mut freed = Vec::new();
        for key in keys {
            self.evict_block(key, &mut freed);
        }
        Extent::release_all(freed);
        if let Some(place) = self.kv.get_mut(key.0) {
            *place = None;
        }
        self.room.remove_kv(key);
    }

    fn space(&mut self, key: KvKey) -> Option<&mut KvSpace> {
        self.kv.get_mut(key.0)?.as_mut()
    }

    /// Whether these blocks would find room if everything idle went: if they are of one model, taking them then works.
    /// The paged layout is cautious, for it counts no page that is shared with blocks in use.
    pub fn can_reserve(&mut self, reserve: &[KvReserve]) -> bool {
        match self.room {
            Room::Paged(_) => self.can_reserve_paged(reserve),
            Room::Segment(_) => self.can_reserve_segment(reserve),
        }
    }

    /// Whether these blocks find room as things are: if they are of one model, taking them then evicts nothing. As
    /// cautious as [`Pool::can_reserve`].
    pub fn has_room(&mut self, reserve: &[KvReserve]) -> bool {
        match self.room {
            Room::Paged(_) => self.has_room_paged(reserve),
            Room::Segment(_) => self.has_room_segment(reserve),
        }
    }

    /// Evicts what is idle, as far as that is possible, so that these blocks find room when they are taken.
    pub fn reclaim(&mut self, reserve: &[KvReserve]) {
        self.settle();
        match self.room {
            Room::Paged(_) => self.reclaim_paged(reserve),
            Room::Segment(_) => self.reclaim_segment(reserve),
        }
    }

    /// Takes `count` KV blocks with zeros in them, or none, evicting what is idle if there is no room for them.
    ///
    /// # Errors
    /// [`Refusal::Short`] when what is leased leaves too little room; nothing was evicted then. [`Refusal::Device`] when
    /// the device refuses.
    pub fn take_kv(&mut self, key: KvKey, count: usize) -> Result<Vec<Extent>, Refusal> {
        if count == 0 {
            return Ok(Vec::new());
        }
        self.settle();
        let blocks = match self.room {
            Room::Paged(_) => self.take_kv_paged(key, count),
            Room::Segment(_) => self.take_kv_segment(key, count),
        }?;
        for block in &blocks {
            self.room.change(
                Home::Kv(key),
                (block.offset(), block.len()),
                None,
                Place::Absent,
                Place::Pinned,
            );
            self.stats.kv_blocks += 1;
            self.stats.kv_bytes += block.len() as u64;
        }
        Ok(blocks)
    }

    /// Gives blocks back that their sequence owned alone.
    pub fn give_kv(&mut self, key: KvKey, blocks: Vec<Extent>) {
        for block in &blocks {
            self.room.change(
                Home::Kv(key),
                (block.offset(), block.len()),
                None,
                Place::Pinned,
                Place::Absent,
            );
            self.room.give_block(key, block.offset());
            self.stats.kv_blocks -= 1;
            self.stats.kv_bytes -= block.len() as u64;
        }
        Extent::release_all(blocks);
    }

    /// How many blocks a sequence with these block hashes would share with one that is running: it needs no room for
    /// them. Cached blocks that nobody uses are not counted, for their room is counted as available.
    pub fn blocks_in_use(&self, key: KvKey, hashes: &[BlockHash]) -> usize {
        let Some(Some(kv)) = self.kv.get(key.0) else { return 0 };
        let found = hashes.iter().map_while(|hash| self.published.get(kv.published.get(hash)?));
        found.filter(|block| block.leases > 0).count()
    }

    /// Leases the cached blocks that a sequence with these block hashes begins with, as many as there are without a
    /// gap. Each saved `seconds` of prefill, which is what it is worth from now on; 0 if that is not known, for another name
    /// of the model may have appraised it.
    pub fn lease_prefix(&mut self, key: KvKey, hashes: &[BlockHash], seconds: f64, now: f64) -> Prefix {
        let mut prefix = Prefix::default();
        for (index, hash) in hashes.iter().enumerate() {
            let Some(&block) = self.space(key).and_then(|kv| kv.published.get(hash)) else { break };
            if seconds > 0.0 {
                self.apply(Event::Appraised { tensor: block, seconds: front_first(seconds, index) });
            }
            self.lease_block(block, now, &mut prefix);
        }
        prefix
    }

    fn lease_block(&mut self, key: TensorKey, now: f64, prefix: &mut Prefix) {
        let Some(block) = self.published.get_mut(&key) else { return };
        block.leases += 1;
        block.found = true;
        prefix.keys.push(key);
        prefix.blocks.push(block.extent.clone());
        if block.leases == 1 {
            let bytes = block.extent.len() as u64;
            self.stats.kv_blocks += 1;
            self.stats.kv_bytes += bytes;
            self.stats.kv_cached_bytes -= bytes;
            self.apply(Event::Leased { tensor: key, at: now });
        } else {
            self.apply(Event::Used { tensor: key, at: now });
        }
    }

    /// Publishes the block that follows `prefix`: it is full, and `hash` names all tokens up to its end. `seconds` is
    /// the prefill time that it is expected to save. If the same block is there already, that one is used and this one
    /// is given back; their contents are equal, because results do not depend on the batch.
    pub fn publish(
        &mut self,
        key: KvKey,
        prefix: &mut Prefix,
        hash: BlockHash,
        block: Extent,
        seconds: f64,
        now: f64,
    ) {
        let Some(kv) = self.space(key) else { return };
        if let Some(&known) = kv.published.get(&hash) {
            self.give_kv(key, vec![block]);
            self.lease_block(known, now, prefix);
            return;
        }
        // The owner changes, and with it who may be asked to move it.
        let (span, extent) = ((block.offset(), block.len()), Arc::new(block));
        let bytes = span.1 as u64;
        let tensor = self.new_key();
        if let Some(kv) = self.space(key) {
            kv.published.insert(hash, tensor);
        }
        self.room.change(Home::Kv(key), span, None, Place::Pinned, Place::Absent);
        self.room.change(Home::Kv(key), span, Some(tensor), Place::Absent, Place::Pinned);
        let entry = PublishedBlock {
            kv: key,
            hash,
            extent: extent.clone(),
            leases: 1,
            place: Place::Pinned,
            index: prefix.len(),
            found: false,
        };
        self.published.insert(tensor, entry);
        self.apply(Event::Catalogued { tensor, bytes, depth: 0.0 });
        self.apply(Event::Appraised { tensor, seconds: front_first(seconds, prefix.len()) });
        self.apply(Event::Leased { tensor, at: now });
        prefix.keys.push(tensor);
        prefix.blocks.push(extent);
    }

    /// Says how many `seconds` of prefill a block of the model is expected to save that no later sequence has found yet.
    pub fn appraise_unfound(&mut self, key: KvKey, seconds: f64) {
        let blocks = self.kv.get(key.0).and_then(Option::as_ref).map(|kv| kv.published.values().copied());
        let mut blocks: Vec<TensorKey> = blocks.into_iter().flatten().collect();
        // Of equally worthy blocks the order decides, and a map's differs from run to run.
        blocks.sort_unstable();
        for tensor in blocks {
            if let Some(block) = self.published.get(&tensor).filter(|block| !block.found) {
                let seconds = front_first(seconds, block.index);
                self.apply(Event::Appraised { tensor, seconds });
            }
        }
    }

    /// Ends the leases; blocks without any stay as cached prefixes until their room is worth more.
    pub fn release_prefix(&mut self, prefix: Prefix) {
        let Prefix { keys, blocks } = prefix;
        drop(blocks);
        for key in keys {
            let Some(block) = self.published.get_mut(&key) else { continue };
            block.leases -= 1;
            if block.leases == 0 {
                let bytes = block.extent.len() as u64;
                self.stats.kv_blocks -= 1;
                self.stats.kv_bytes -= bytes;
                self.stats.kv_cached_bytes += bytes;
                self.apply(Event::Idle { tensor: key });
            }
        }
    }

    /// Takes a published block without leases off the device; its extent goes to `freed`. Gives its bytes.
    pub(crate) fn evict_block(&mut self, key: TensorKey, freed: &mut Vec<Extent>) -> usize {
        self.apply(Event::Evicted { tensor: key });
        let Some(PublishedBlock { kv, hash, extent, .. }) = self.published.remove(&key) else { return 0 };
        self.apply(Event::Forgotten { tensor: key });
        self.vacant_keys.push(key);
        let bytes = extent.len();
        if let Some(space) = self.space(kv) {
            space.published.remove(&hash);
        }
        self.room.give_block(kv, extent.offset());
        self.stats.kv_cached_bytes -= bytes as u64;
        // A block that somebody still held would stay mapped until they let go; without leases nobody does.
        debug_assert_eq!(Arc::strong_count(&extent), 1);
        freed.extend(Arc::try_unwrap(extent));
        bytes
    }
}

/// Blocks further back are of no use without those before them, so of two that are used equally often the later one
/// must go first: it is taken to save a little less.
fn front_first(seconds: f64, index: usize) -> f64 {
    seconds * (1.0 + 1.0 / (index as f64 + 2.0))
}
