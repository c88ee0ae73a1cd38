//! The random program: one operation on the pool and the same one on the plain model, what they answer held against
//! each other, then everything that must hold after any step. Invariants that only one backend has are in a module of
//! their own.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use rand::rngs::Xoshiro256PlusPlus;
use rand::{RngExt, SeedableRng};
use tangram_checkpoint::Hash;
use tangram_device::Extent;
use tangram_policy::TensorKey;
use tangram_pool::{
    ALIGNMENT, Backend, Fetch, KvKey, KvReserve, Lease, LoadFailure, Part, Pool, PoolStats, Prefix, Refusal,
    Shortage, Vacancy,
};

use crate::reference::{Blocks, Failure, Reference, Slot};
use crate::universe::{Universe, fill, pool};
use crate::{paged, segment};

/// Operations that are shown when something is wrong.
const SHOWN: usize = 40;

/// A deployed model.
pub struct Deployment {
    pub model: usize,
    pub keys: Vec<TensorKey>,
    pub kv: KvKey,
}

/// A lease and what it is on.
pub struct Held {
    pub contents: Vec<usize>,
    /// By nobody's request.
    fetched: bool,
    pub lease: Lease,
}

/// A tensor under way: the parts that are not finished.
struct Load {
    content: usize,
    part_bytes: usize,
    parts: Vec<Part>,
}

/// A sequence with its KV blocks.
pub struct Sequence {
    pub identity: usize,
    pub kv: KvKey,
    pub blocks: Blocks,
    pub prefix: Prefix,
    /// Its own blocks and the words that they are full of.
    pub own: Vec<(Extent, u64)>,
}

/// The pool, the plain model, and all that a program holds.
pub struct Program {
    pub universe: Universe,
    pub pool: Pool,
    /// Address of the segment.
    pub base: usize,
    /// Never taken; its blocks are so small that room for them is counted exactly.
    pub probe: KvKey,
    pub reference: Reference,
    pub sequences: Vec<Sequence>,
    pub deployments: Vec<Deployment>,
    pub leases: Vec<Held>,
    loads: Vec<Load>,
    pub random: Xoshiro256PlusPlus,
    pub now: f64,
    pub tag: u64,
    pub step: usize,
    name: String,
    trace: VecDeque<String>,
    pub counts: Counts,
}

impl Drop for Program {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("VIOLATION at step {} of {}; the last operations:", self.step, self.name);
            self.trace.iter().for_each(|line| eprintln!("  {line}"));
        }
    }
}

/// How often the things happened for which the programs are there.
#[derive(Debug, Default)]
pub struct Counts(pub BTreeMap<&'static str, u64>);

impl Counts {
    /// What must have happened in a run of any length.
    pub const ALL: [&str; 17] = [
        "activations",
        "refused although the bytes would do",
        "fetches",
        "fetches of nothing",
        "reclaims",
        "refused for want of room",
        "refused because of a loader",
        "bytes loaded",
        "bytes moved",
        "bytes reused",
        "bytes evicted",
        "bytes failed",
        "bytes from host memory",
        "blocks taken",
        "blocks refused",
        "cached blocks found",
        "cached blocks published again",
    ];

    pub fn add(&mut self, what: &'static str, number: u64) {
        debug_assert!(Self::ALL.contains(&what));
        *self.0.entry(what).or_default() += number;
    }
}

/// What a step may have done to idle tensors and cached blocks.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Evictions {
    Allowed,
    Forbidden,
}

impl Program {
    /// Nothing is deployed. `name` says how to run this program again.
    pub fn new(backend: Backend, page_bytes: usize, seed: u64, name: String) -> Program {
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
        let universe = Universe::random(backend, page_bytes, &mut random);
        let mut pool = pool(backend, page_bytes, universe.pages);
        let probe_bytes = if backend == Backend::Paged { page_bytes } else { ALIGNMENT };
        let probe = pool.add_kv(Hash([0xee; 32]), probe_bytes).unwrap();
        let mut base = 0;
        if backend == Backend::Segment {
            let block = pool.take_kv(probe, 1).unwrap();
            base = block[0].address() - block[0].offset();
            pool.give_kv(probe, block);
        }
        Program {
            universe,
            pool,
            base,
            probe,
            reference: Reference::default(),
            sequences: Vec::new(),
            deployments: Vec::new(),
            leases: Vec::new(),
            loads: Vec::new(),
            random,
            now: 0.0,
            tag: 0,
            step: 0,
            name,
            trace: VecDeque::new(),
            counts: Counts::default(),
        }
    }

    /// Runs `steps` operations, then gives everything back.
    pub fn run(mut self, steps: usize) -> Counts {
        for _ in 0..steps {
            self.step += 1;
            self.now += self.random.random_range(0.0..2.0);
            let evictions = self.operation();
            self.check(evictions);
        }
        self.drain();
        let memory = self.pool.memory().clone();
        if let Some(host) = self.pool.host() {
            self.counts.add("bytes from host memory", self.reference.from_host_total);
            assert_eq!(host.tensors == 0, host.used_bytes == 0, "{host:?}");
        }
        drop(std::mem::replace(&mut self.pool, pool(self.universe.backend, self.universe.page_bytes, 1)));
        assert_eq!(Arc::strong_count(&memory), 1, "an arena outlived everything in it");
        let mut counts = std::mem::take(&mut self.counts);
        counts.add("bytes loaded", self.reference.loaded_total);
        counts.add("bytes moved", self.reference.moved_total);
        counts.add("bytes reused", self.reference.reused_total);
        counts.add("bytes evicted", self.reference.evicted_total);
        counts.add("bytes failed", self.reference.failed_total);
        counts
    }

    pub fn note(&mut self, line: impl FnOnce() -> String) {
        if self.trace.len() == SHOWN {
            self.trace.pop_front();
        }
        self.trace.push_back(format!("{}: {}", self.step, line()));
    }

    pub fn any(&mut self, len: usize) -> Option<usize> {
        (len > 0).then(|| self.random.random_range(0..len))
    }

    /// Draws until there is something to do.
    fn operation(&mut self) -> Evictions {
        loop {
            let done = match self.random.random_range(0..100) {
                0..=3 => self.deploy(),
                4..=5 => self.remove(),
                6..=21 => self.activate(),
                22 => self.expect_some(),
                23..=24 => self.fetch(),
                25..=27 => self.use_again(),
                28..=43 => self.release(),
                44..=60 => self.finish_a_part(),
                61..=66 => self.finish_loads_on_threads(),
                67..=71 => self.finish_everything(),
                72..=78 => self.start_sequence(),
                79..=87 => self.grow_sequence(),
                88..=93 => self.publish_block(),
                94..=97 => self.end_sequence(),
                98 if self.random.random_bool(0.3) => self.refuse_nonsense(),
                98 => self.reclaim(),
                _ => self.random.random_bool(0.2).then(|| self.drain()).map(|()| Evictions::Forbidden),
            };
            if let Some(evictions) = done {
                return evictions;
            }
        }
    }

    fn deploy(&mut self) -> Option<Evictions> {
        let model = self.random.random_range(0..self.universe.models.len());
        if self.deployments.len() >= 8 {
            return None;
        }
        let contents = self.universe.models[model].contents.clone();
        let places: Vec<usize> = contents.iter().map(|_| self.random.random_range(0..2)).collect();
        let entries: Vec<_> = contents
            .iter()
            .zip(&places)
            .map(|(&content, &place)| self.universe.entry(content, place))
            .collect();
        let universe = &self.universe;
        let keys = self.pool.catalogue(&entries, |name| universe.file_bytes(name)).unwrap();
        assert_eq!(keys.len(), contents.len());
        for ((&content, &key), place) in contents.iter().zip(&keys).zip(places) {
            let taken = |slot: &Slot| slot.key == key;
            match self.reference.slots.get_mut(&content) {
                Some(slot) => {
                    assert_eq!(slot.key, key, "equal content is one tensor");
                    slot.models += 1;
                }
                None => {
                    assert!(!self.reference.slots.values().any(taken), "key {key:?} is given twice");
                    let places = &self.universe.contents[content].places;
                    let home = places[place % places.len()];
                    let len = self.universe.contents[content].bytes.len();
                    let slot = Slot {
                        key,
                        len,
                        models: 1,
                        home,
                        resident: None,
                        used: false,
                        damaged: false,
                        was_ready: false,
                        last_address: None,
                    };
                    self.reference.slots.insert(content, slot);
                }
            }
        }
        let identity = self.universe.models[model].identity;
        let kv = self.pool.add_kv(Hash([identity as u8; 32]), self.universe.block_bytes[identity]).unwrap();
        self.reference.kv[identity].models += 1;
        self.deployments.push(Deployment { model, keys, kv });
        self.note(|| format!("deploy model {model}: contents {contents:?}"));
        Some(Evictions::Forbidden)
    }

    fn remove(&mut self) -> Option<Evictions> {
        let index = self.any(self.deployments.len())?;
        self.remove_deployment(index);
        Some(Evictions::Forbidden)
    }

    /// Removes a deployment, whatever leases there are on its tensors. The last one of an identity ends the sequences
    /// that use its blocks, as the node does.
    fn remove_deployment(&mut self, index: usize) {
        let Deployment { model, keys, kv } = self.deployments.swap_remove(index);
        let identity = self.universe.models[model].identity;
        self.note(|| format!("remove a deployment of model {model}"));
        self.reference.settle();
        for content in self.universe.models[model].contents.clone() {
            self.reference.forget(content);
        }
        self.pool.forget(&keys);
        self.reference.kv[identity].models -= 1;
        if self.reference.kv[identity].models == 0 {
            while let Some(index) = self.sequences.iter().position(|sequence| sequence.identity == identity) {
                self.end(index);
            }
            self.pool.remove_kv(kv);
            self.reference.kv[identity].published.clear();
            self.reference.cached_bytes = self.pool.stats().kv_cached_bytes;
        } else {
            self.pool.remove_kv(kv);
        }
    }

    /// Whether `blocks` blocks of the probe find room as things are.
    pub fn has_probe(&mut self, blocks: usize) -> bool {
        self.pool.has_room(&[KvReserve { kv: self.probe, blocks }])
    }

    /// Whether `blocks` blocks of the probe would find room if everything idle went.
    pub fn can_probe(&mut self, blocks: usize) -> bool {
        self.pool.can_reserve(&[KvReserve { kv: self.probe, blocks }])
    }

    /// Blocks that others are to take later: for the pool, and with their identities.
    fn reserve(&mut self) -> (Vec<KvReserve>, Vec<(usize, usize)>) {
        let kinds = self.random.random_range(0..7usize).saturating_sub(3);
        let kinds = (0..kinds).filter_map(|_| {
            let index =
                (!self.deployments.is_empty()).then(|| self.random.random_range(0..self.deployments.len()));
            let Deployment { model, kv, .. } = &self.deployments[index?];
            let blocks = self.random.random_range(0..5);
            Some((KvReserve { kv: *kv, blocks }, (self.universe.models[*model].identity, blocks)))
        });
        kinds.collect()
    }

    fn activate(&mut self) -> Option<Evictions> {
        let index = self.any(self.deployments.len())?;
        let (reserve, identities) = self.reserve();
        let Deployment { model, keys, .. } = &self.deployments[index];
        let (model, keys) = (*model, keys.clone());
        let contents = self.universe.models[model].contents.clone();
        self.reference.settle();
        let blocked = contents.iter().any(|content| self.reference.slots[content].blocks_activation());
        let feasible = match self.universe.backend {
            Backend::Paged => Some(paged::fits(self, &contents, &identities)),
            Backend::Segment => segment::fits(self, &contents, &identities),
        };
        let before = self.pool.stats();
        let result = self.pool.activate(&keys, &reserve, self.now).map_err(short);
        self.note(|| {
            let outcome = result.as_ref().map(|a| (a.missing.len(), a.bytes_loaded)).map_err(|s| *s);
            format!("activate model {model} with {contents:?}, reserve {identities:?}: {outcome:?}")
        });
        let activation = match result {
            Ok(activation) => activation,
            Err(shortage) => {
                assert!(blocked || feasible != Some(true), "{shortage:?} although there is room");
                let fits = shortage.needed <= shortage.available;
                match self.universe.backend {
                    Backend::Paged => assert!(blocked || !fits, "{shortage:?} is none"),
                    Backend::Segment if blocked => {}
                    Backend::Segment => assert_eq!(shortage, segment::shortage(self, &contents, &identities)),
                }
                let why = match (shortage.needed, fits) {
                    (0, _) => "refused because of a loader",
                    (_, true) => "refused although the bytes would do",
                    (_, false) => "refused for want of room",
                };
                self.counts.add(why, 1);
                self.nothing_changed(before);
                return Some(Evictions::Forbidden);
            }
        };
        self.counts.add("activations", 1);
        assert!(!blocked, "a tensor that was given up is joined");
        assert!(feasible != Some(false), "there was no room");
        let mut missing = activation.missing.into_iter();
        for ((&content, &key), tensor) in contents.iter().zip(&keys).zip(activation.lease.tensors()) {
            assert_eq!((tensor.key(), tensor.len()), (key, self.reference.slots[&content].len));
            if self.reference.slots[&content].resident.is_some() {
                self.reference.reused_total += tensor.len() as u64;
                let address = tensor.extent().map(Extent::address);
                let bound = self.reference.lease(content, address);
                if let (Some(bound), Some(address)) = (bound, address) {
                    assert_eq!(address, bound, "content {content} moved under a lease");
                }
                self.check_place(content);
                continue;
            }
            let vacancy = missing.next().unwrap();
            assert!(Arc::ptr_eq(vacancy.tensor(), tensor), "room for another tensor than the missing one");
            self.begin_load(content, vacancy, false);
        }
        assert!(missing.next().is_none(), "room for more than what is missing");
        assert_eq!(activation.bytes_loaded + before.loaded_total, self.reference.loaded_total);
        assert_eq!(activation.bytes_reused + before.reused_total, self.reference.reused_total);
        if let [one] = reserve[..] {
            assert!(self.pool.can_reserve(&[one]), "no room is left for what was to be reserved");
        }
        self.leases.push(Held { contents, fetched: false, lease: activation.lease });
        Some(Evictions::Allowed)
    }

    /// Where addresses are stable, a tensor is where it always was.
    fn check_place(&mut self, content: usize) {
        let slot = self.reference.slots.get_mut(&content).unwrap();
        let Some(address) = slot.resident.as_ref().and_then(|resident| resident.address) else { return };
        let last = slot.last_address.replace(address);
        if self.universe.backend == Backend::Paged {
            assert_eq!(address, last.unwrap_or(address), "the address of a catalogued tensor is stable");
        }
    }

    /// Room for a tensor was made: it is cut into parts, or now and then dropped as it is.
    fn begin_load(&mut self, content: usize, vacancy: Vacancy, fetched: bool) {
        let len = vacancy.tensor().len();
        if vacancy.is_in_host() {
            self.reference.from_host_total += len as u64;
            assert!(self.reference.slots[&content].was_ready, "a copy of what has never been there");
        }
        if self.random.random_bool(0.02) {
            self.reference.arriving(content, None, len, fetched);
            self.reference.dropped_whole(content);
            return;
        }
        let part_bytes = self.random.random_range(len.div_ceil(9)..=len);
        let mut parts = vacancy.into_parts(part_bytes);
        let address = parts[0].address().unwrap();
        self.reference.arriving(content, Some(address), part_bytes, fetched);
        self.check_place(content);
        for part in &mut parts {
            let (start, len) = (part.index() * part_bytes, part.len());
            assert_eq!(part.address(), Some(address + start));
            assert_eq!(self.reference.resident_mut(content).parts[part.index()].0, start..start + len);
        }
        self.loads.push(Load { content, part_bytes, parts });
    }

    /// A refused request leaves everything as it was, but for what had to be settled anyway.
    pub fn nothing_changed(&self, before: PoolStats) {
        let after = self.pool.stats();
        assert_eq!(after.evicted_total, self.reference.evicted_total, "a refused request evicts nothing");
        let kept = |stats: PoolStats| {
            (
                stats.loaded_total,
                stats.reused_total,
                stats.fetched_total,
                stats.leased_bytes,
                stats.moved_total,
            )
        };
        assert_eq!(kept(after), kept(before), "a refused request changes nothing");
        let kv = |stats: PoolStats| (stats.kv_blocks, stats.kv_bytes, stats.kv_cached_bytes);
        assert_eq!(kv(after), kv(before), "a refused request changes nothing");
    }

    /// Somebody foretells what a model's tensors are worth, or says what their absence would cost.
    fn expect_some(&mut self) -> Option<Evictions> {
        let index = self.any(self.deployments.len())?;
        let (log2, appraised) = (self.random.random_range(-20.0..20.0), self.random.random_bool(0.5));
        let Deployment { model, keys, .. } = &self.deployments[index];
        let contents = &self.universe.models[*model].contents;
        let known: BTreeMap<usize, usize> = contents
            .iter()
            .map(|content| self.reference.slots[content].models)
            .map(|models| (models, 0))
            .collect();
        self.pool.expect(keys, |models| {
            assert!(known.contains_key(&(models as usize)), "{models} models");
            log2 / f64::from(models)
        });
        if appraised {
            self.pool.appraise_from_host(keys.iter().map(|&key| (key, f64::exp2(-log2) * 0.3)));
            self.pool.appraise(keys.iter().map(|&key| (key, f64::exp2(-log2))));
        }
        let model = *model;
        self.note(|| format!("expect {log2} of model {model}, appraised: {appraised}"));
        Some(Evictions::Forbidden)
    }

    /// Brings in what the pool thinks best, for nobody.
    fn fetch(&mut self) -> Option<Evictions> {
        let bytes = self.random.random_range(1..6 * self.universe.page_bytes as u64);
        self.reference.settle();
        let wanted = |slot: &Slot| slot.resident.is_none() && slot.used && !slot.damaged;
        let slots = self.reference.slots.iter();
        let wanted: Vec<usize> =
            slots.filter(|(_, slot)| wanted(slot)).map(|(&content, _)| content).collect();
        let free = match self.universe.backend {
            Backend::Paged => paged::is_free(self, &wanted),
            Backend::Segment => segment::is_free(self, &wanted),
        };
        let fetch = self.pool.fetch(bytes);
        let Some(Fetch { lease, missing }) = fetch else {
            self.note(|| format!("fetch {bytes} bytes: nothing"));
            assert!(wanted.is_empty() || !free, "{wanted:?} could be fetched over nothing");
            self.counts.add("fetches of nothing", 1);
            return Some(Evictions::Allowed);
        };
        assert_eq!(lease.tensors().len(), missing.len());
        let mut contents = Vec::new();
        let mut fetched = 0;
        for (vacancy, tensor) in missing.into_iter().zip(lease.tensors()) {
            assert!(Arc::ptr_eq(vacancy.tensor(), tensor), "room for another tensor than the leased one");
            let slots = &mut self.reference.slots.iter();
            let content =
                slots.find(|(_, slot)| slot.key == tensor.key()).map(|(&content, _)| content).unwrap();
            assert!(wanted.contains(&content), "content {content} is fetched");
            assert!(fetched < bytes, "more is fetched than was asked for");
            fetched += tensor.len() as u64;
            contents.push(content);
            self.begin_load(content, vacancy, true);
        }
        self.counts.add("fetches", 1);
        self.note(|| format!("fetch {bytes} bytes: {contents:?}"));
        self.leases.push(Held { contents, fetched: true, lease });
        if self.random.random_bool(0.3) {
            // A request has come.
            self.learn_evictions(Evictions::Allowed);
            self.release_lease(self.leases.len() - 1);
        }
        Some(Evictions::Allowed)
    }

    fn use_again(&mut self) -> Option<Evictions> {
        let index = self.any(self.leases.len())?;
        let held = &self.leases[index];
        if held.fetched {
            return None;
        }
        self.pool.used_again(&held.lease, self.now);
        let bytes = held.lease.tensors().iter().map(|tensor| tensor.len() as u64).sum::<u64>();
        self.reference.reused_total += bytes;
        Some(Evictions::Forbidden)
    }

    fn release(&mut self) -> Option<Evictions> {
        let index = self.any(self.leases.len())?;
        self.release_lease(index);
        Some(Evictions::Forbidden)
    }

    fn release_lease(&mut self, index: usize) {
        let Held { contents, lease, .. } = self.leases.swap_remove(index);
        self.note(|| format!("release a lease on {contents:?}"));
        for content in contents {
            self.reference.resident_mut(content).wanted -= 1;
        }
        self.pool.release(lease);
        self.reference.settle();
    }

    /// Finishes one part of one load, in one of the ways in which a loader can.
    fn finish_a_part(&mut self) -> Option<Evictions> {
        let load = self.any(self.loads.len())?;
        if self.random.random_bool(0.02) {
            // Whoever was to load it is gone, with all its parts.
            let Load { content, parts, .. } = self.loads.swap_remove(load);
            self.note(|| format!("drop the rest of content {content}"));
            for part in parts {
                self.reference.part_finished(content, part.index(), Some(Failure::Failed));
                drop(part);
            }
            return Some(Evictions::Forbidden);
        }
        let part = self.random.random_range(0..self.loads[load].parts.len());
        let (content, part_bytes) = (self.loads[load].content, self.loads[load].part_bytes);
        let part = self.loads[load].parts.swap_remove(part);
        if self.loads[load].parts.is_empty() {
            self.loads.swap_remove(load);
        }
        let index = part.index();
        let asks = self.random.random_bool(0.7);
        let failure = if asks {
            let unwanted = part.is_unwanted();
            assert_eq!(unwanted, self.reference.ask_unwanted(content), "whether content {content} is wanted");
            // A loader that goes on all the same does no harm.
            (unwanted && self.random.random_bool(0.9)).then_some(Failure::Abandoned)
        } else {
            None
        };
        let failure = failure.or(self.random.random_bool(0.03).then_some(Failure::Failed));
        self.note(|| format!("part {index} of content {content}: {failure:?}"));
        let settles = self.reference.part_finished(content, index, failure);
        let settled = match failure {
            None => fill(part, &self.universe.contents[content].bytes, part_bytes),
            Some(Failure::Abandoned) => part.finish(Err(LoadFailure::Abandoned)),
            Some(Failure::Failed) => part.finish(Err(LoadFailure::Failed("the program says so".to_owned()))),
        };
        assert_eq!(settled, settles, "whether part {index} settles content {content}");
        Some(Evictions::Forbidden)
    }

    /// Finishes all loads well, each thread its share of the parts of all of them.
    fn finish_loads_on_threads(&mut self) -> Option<Evictions> {
        // Starting threads is dear; few loads at once would test nothing anyway.
        if self.loads.len() < 2 || !self.random.random_bool(0.3) {
            return None;
        }
        let loads = std::mem::take(&mut self.loads);
        self.note(|| format!("two threads finish {} loads", loads.len()));
        let mut shares: [Vec<(usize, usize, Part)>; 2] = Default::default();
        for Load { content, part_bytes, parts } in loads {
            for part in parts {
                self.reference.part_finished(content, part.index(), None);
                shares[self.random.random_range(0..2)].push((content, part_bytes, part));
            }
        }
        let contents = &self.universe.contents;
        std::thread::scope(|scope| {
            for share in shares {
                scope.spawn(move || {
                    for (content, part_bytes, part) in share {
                        fill(part, &contents[content].bytes, part_bytes);
                    }
                });
            }
        });
        Some(Evictions::Forbidden)
    }

    fn finish_everything(&mut self) -> Option<Evictions> {
        if self.loads.is_empty() {
            return None;
        }
        self.finish_all_loads();
        Some(Evictions::Forbidden)
    }

    /// Finishes all loads well.
    fn finish_all_loads(&mut self) {
        self.note(|| "finish all loads".to_owned());
        for Load { content, part_bytes, parts } in std::mem::take(&mut self.loads) {
            for part in parts {
                let settles = self.reference.part_finished(content, part.index(), None);
                assert_eq!(fill(part, &self.universe.contents[content].bytes, part_bytes), settles);
            }
        }
    }

    /// What cannot be done is refused and changes nothing.
    fn refuse_nonsense(&mut self) -> Option<Evictions> {
        let deployment = self.any(self.deployments.len())?;
        self.reference.settle();
        let Deployment { keys, kv, .. } = &self.deployments[deployment];
        let (keys, kv) = (keys.clone(), *kv);
        let before = self.pool.stats();
        let smallest = self.universe.block_bytes.iter().min().unwrap();
        let reserve = [KvReserve { kv, blocks: self.universe.bytes() / smallest + 1 }];
        assert!(self.pool.activate(&keys, &reserve, self.now).is_err());
        assert!(self.pool.take_kv(kv, reserve[0].blocks).is_err());
        assert!(!self.pool.can_reserve(&reserve) && !self.pool.has_room(&reserve));
        self.note(|| "ask for more than the device has".to_owned());
        self.nothing_changed(before);
        Some(Evictions::Forbidden)
    }

    /// Gives everything back: then every byte must be free.
    fn drain(&mut self) {
        while !self.sequences.is_empty() {
            self.end(0);
        }
        while !self.leases.is_empty() {
            self.release_lease(0);
        }
        self.finish_all_loads();
        while !self.deployments.is_empty() {
            self.remove_deployment(0);
        }
        // What arrived for nobody goes when the pool is next asked for anything.
        self.pool.forget(&[]);
        self.reference.settle();
        let PoolStats { resident_bytes, leased_bytes, kv_bytes, kv_blocks, kv_cached_bytes, .. } =
            self.pool.stats();
        let left = [resident_bytes, leased_bytes, kv_bytes, kv_blocks, kv_cached_bytes];
        assert_eq!(left, [0; 5], "left in the accounts of an empty pool");
        assert!(self.reference.slots.is_empty(), "left in the catalogue of an empty pool");
        assert_eq!(self.pool.free_bytes(), self.universe.bytes() as u64, "bytes of an empty pool");
    }
}

/// No program does anything that the device refuses.
pub fn short(refusal: Refusal) -> Shortage {
    match refusal {
        Refusal::Short(shortage) => shortage,
        Refusal::Device(error) => panic!("{error}"),
    }
}
