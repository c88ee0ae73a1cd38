//! Loads on the device's copy streams while the pool goes on. What happens depends on timing here, so this asserts only
//! what holds at any moment: what is leased and ready has its bytes, what fails is told, the accounts are those of the
//! leases, and once the streams are idle nothing is in anybody's way.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use tangram_checkpoint::Hash;
use tangram_device::Extent;
use tangram_policy::TensorKey;
use tangram_pool::{Fetch, KvKey, Lease, LoadFailure, Part, Pool, Vacancy};

use crate::program::short;
use crate::universe::{Universe, copy, pool};

struct Race {
    universe: Arc<Universe>,
    pool: Pool,
    models: Vec<Vec<TensorKey>>,
    kv: KvKey,
    /// What tensors have in them, by their keys.
    contents: BTreeMap<TensorKey, usize>,
    leases: Vec<Lease>,
    /// Where tensors are that were leased and could be read after the last step.
    addresses: BTreeMap<TensorKey, usize>,
    blocks: Vec<(Extent, u8)>,
    random: Xoshiro256PlusPlus,
}

/// What the loader makes of a part.
fn load(mut part: Part, from: usize, content: usize, universe: &Universe, fails: bool) {
    if part.is_unwanted() {
        part.finish(Err(LoadFailure::Abandoned));
        return;
    }
    if part.is_in_host() && !fails {
        copy(part);
        return;
    }
    part.stage(from).unwrap();
    let room = part.bytes_mut().unwrap();
    room.copy_from_slice(&universe.contents[content].bytes[from..from + room.len()]);
    part.finish(if fails { Err(LoadFailure::Failed("the program says so".to_owned())) } else { Ok(()) });
}

impl Race {
    fn new(universe: Universe, random: Xoshiro256PlusPlus) -> Race {
        let mut pool = pool(universe.backend, universe.page_bytes, universe.pages);
        let deploy = |model: &crate::universe::Model| {
            let entries: Vec<_> = model.contents.iter().map(|&content| universe.entry(content, 0)).collect();
            pool.catalogue(&entries, |name| universe.file_bytes(name)).unwrap()
        };
        let models: Vec<Vec<TensorKey>> = universe.models.iter().map(deploy).collect();
        let pairs = |(keys, model): (&Vec<TensorKey>, &crate::universe::Model)| {
            keys.iter().copied().zip(model.contents.clone()).collect::<Vec<_>>()
        };
        let contents = models.iter().zip(&universe.models).flat_map(pairs).collect();
        let kv = pool.add_kv(Hash([1; 32]), universe.block_bytes[0]).unwrap();
        let (leases, blocks) = (Vec::new(), Vec::new());
        let (universe, addresses) = (Arc::new(universe), BTreeMap::new());
        Race { universe, pool, models, kv, contents, leases, addresses, blocks, random }
    }

    fn submit(&mut self, vacancy: Vacancy) {
        let (content, len) = (self.contents[&vacancy.tensor().key()], vacancy.tensor().len());
        let part_bytes = self.random.random_range(len.div_ceil(6)..=len);
        for part in vacancy.into_parts(part_bytes) {
            let (universe, from) = (self.universe.clone(), part.index() * part_bytes);
            let (fails, lost) = (self.random.random_bool(0.01), self.random.random_bool(0.005));
            let streams = self.pool.memory().streams();
            let stream = &streams[self.random.random_range(0..streams.len())];
            stream.submit(Box::new(move || {
                if !lost {
                    load(part, from, content, &universe, fails);
                }
            }));
        }
    }

    fn activate(&mut self, now: f64) {
        let model = self.random.random_range(0..self.models.len());
        let Ok(activation) = self.pool.activate(&self.models[model], &[], now).map_err(short) else { return };
        activation.missing.into_iter().for_each(|vacancy| self.submit(vacancy));
        self.leases.push(activation.lease);
    }

    fn fetch(&mut self) {
        let model = self.random.random_range(0..self.models.len());
        let log2 = self.random.random_range(-20.0..20.0);
        self.pool.expect(&self.models[model], |_| log2);
        let Some(Fetch { lease, missing }) = self.pool.fetch(3 * self.universe.page_bytes as u64) else {
            return;
        };
        missing.into_iter().for_each(|vacancy| self.submit(vacancy));
        self.leases.push(lease);
    }

    fn release(&mut self, index: usize) {
        let lease = self.leases.swap_remove(index);
        self.pool.release(lease);
    }

    fn take_block(&mut self, tag: u8) {
        let Ok(blocks) = self.pool.take_kv(self.kv, 1).map_err(short) else { return };
        for mut block in blocks {
            let mut bytes = block.to_vec().unwrap();
            assert!(bytes.iter().all(|&byte| byte == 0), "leftovers in a block");
            bytes.fill(tag);
            block.write(0, &bytes).unwrap();
            self.blocks.push((block, tag));
        }
    }

    fn check(&mut self) {
        let mut leased: BTreeMap<TensorKey, u64> = BTreeMap::new();
        let mut addresses = BTreeMap::new();
        for tensor in self.leases.iter().flat_map(|lease| lease.tensors()) {
            let content = self.contents[&tensor.key()];
            if let Some(extent) = tensor.extent() {
                assert!(
                    extent.to_vec().unwrap() == self.universe.contents[content].bytes,
                    "content {content}"
                );
                addresses.insert(tensor.key(), extent.address());
            }
            leased.insert(tensor.key(), tensor.len() as u64);
        }
        // Between two steps a lease can end or begin, not both.
        for (key, address) in &addresses {
            let before = self.addresses.get(key).unwrap_or(address);
            assert_eq!(before, address, "content {} moved under a lease", self.contents[key]);
        }
        self.addresses = addresses;
        for (block, tag) in &self.blocks {
            assert!(block.to_vec().unwrap().iter().all(|byte| byte == tag), "a block changed");
        }
        let stats = self.pool.stats();
        assert_eq!(stats.leased_bytes, leased.values().sum::<u64>());
        assert_eq!(stats.kv_blocks, self.blocks.len() as u64);
        assert!(stats.resident_bytes >= stats.leased_bytes);
    }

    /// Waits for the streams. Then every tensor has arrived or failed, and whoever lets go of what failed can go on.
    fn quiesce(&mut self, now: f64) {
        for stream in self.pool.memory().streams() {
            stream.record().wait();
        }
        let failed = |lease: &Lease| lease.tensors().iter().any(|tensor| tensor.failure().is_some());
        for lease in &self.leases {
            assert!(lease.tensors().iter().all(|tensor| tensor.is_ready() || tensor.failure().is_some()));
        }
        while let Some(index) = self.leases.iter().position(failed) {
            self.release(index);
        }
        let model = self.random.random_range(0..self.models.len());
        match self.pool.activate(&self.models[model], &[], now).map_err(short) {
            Ok(activation) => {
                // Dropping the room fails what was missing.
                drop(activation.missing);
                self.pool.release(activation.lease);
            }
            Err(shortage) => assert!(shortage.needed > 0, "a loader that has ended is in the way"),
        }
    }

    fn end(mut self) {
        self.quiesce(f64::MAX);
        while !self.leases.is_empty() {
            self.release(0);
        }
        self.pool.give_kv(self.kv, self.blocks.drain(..).map(|(block, _)| block).collect());
        for keys in &self.models {
            self.pool.forget(keys);
        }
        self.pool.remove_kv(self.kv);
        assert_eq!(self.pool.stats().resident_bytes, 0);
        assert_eq!(self.pool.free_bytes(), self.universe.bytes() as u64);
    }
}

/// One program of `steps` operations.
pub fn race(universe: Universe, seed: u64, steps: usize) {
    let mut race = Race::new(universe, Xoshiro256PlusPlus::seed_from_u64(seed));
    for step in 0..steps {
        let now = step as f64;
        match race.random.random_range(0..100) {
            0..=34 => race.activate(now),
            35..=39 => race.fetch(),
            40..=79 if !race.leases.is_empty() => {
                let index = race.random.random_range(0..race.leases.len());
                race.release(index);
            }
            80..=88 => race.take_block(step as u8 | 1),
            89..=97 if !race.blocks.is_empty() => {
                let index = race.random.random_range(0..race.blocks.len());
                let (block, _) = race.blocks.swap_remove(index);
                race.pool.give_kv(race.kv, vec![block]);
            }
            98 => race.quiesce(now),
            _ => {}
        }
        race.check();
    }
    race.end();
}
