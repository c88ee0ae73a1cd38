//! Our own loads: an imported checkpoint through the store into a pool that has room for it once.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use rustix::fs::OFlags;
use tangram_checkpoint::{CHUNK_BYTES, Checksum, Hash, Manifest};
use tangram_device::cpu::CpuDevice;
use tangram_policy::TensorKey;
use tangram_pool::{Backend, CatalogueEntry, Lease, Pool};
use tangram_store::{Compressed, Measured, Options, Store, TensorLoad, Verification, Wake, disk_of};

use super::Cost;
use super::raw::{cpu_time, drop_cache};

/// A load that takes longer has failed.
const PATIENCE: Duration = Duration::from_secs(600);
/// For this long prefetching goes on before a request comes.
const HEAD_START: Duration = Duration::from_millis(30);
/// Bytes per page of the pool, as a pool from 8 GiB has them.
const PAGE_BYTES: usize = 2 << 20;
/// Threads of the simplest reader, each with one read of a part under way: more did not give more on any disk tried.
const READERS: usize = 8;
/// Suits the direct reads of every disk.
const ALIGNMENT: usize = 4096;
/// Loads of the comparison with one that is urgent.
const LOADS: usize = 16;

/// How to load.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    /// With nothing in the page cache.
    pub(super) cold: bool,
    pub(super) sampled: bool,
    /// What the store has loaded right before, from the page cache too.
    pub(super) again: bool,
    /// The tensors are divided among as many loads that start together.
    pub(super) loads: usize,
}

impl Mode {
    pub(super) const COLD: Mode = Mode { cold: true, sampled: false, again: false, loads: 1 };
}

struct Place {
    offset: u64,
    bytes: u64,
    chunks: Arc<[Checksum]>,
    compressed: Option<Compressed>,
    name: String,
}

/// A pool and what is loaded into it.
pub(super) struct Bench {
    file: PathBuf,
    pool: Pool,
    places: Vec<Place>,
    /// The same tensors under two identities, so that each set pushes the other out.
    sets: [Vec<TensorKey>; 2],
    turn: usize,
    measured: Option<Measured>,
}

impl Bench {
    /// `measured` is how the disk is to be read.
    pub(super) fn new(
        manifest: &Manifest,
        file: &Path,
        measured: Option<Measured>,
        backend: Backend,
    ) -> anyhow::Result<Bench> {
        let mut seen = HashSet::new();
        let tensors = manifest.tensors.iter().filter(|tensor| seen.insert(tensor.id));
        let place = |tensor: &tangram_checkpoint::TensorEntry| Place {
            offset: tensor.offset,
            bytes: tensor.bytes,
            chunks: tensor.chunks.clone().into(),
            compressed: Compressed::of(tensor),
            name: format!("{:?}", tensor.role),
        };
        let places: Vec<Place> = tensors.map(place).collect();
        let bytes = manifest.data_bytes;
        // Small checkpoints get small pages: there must be no room for two.
        let large = bytes >= 256 * PAGE_BYTES as u64;
        let page = if large { PAGE_BYTES } else { CpuDevice::default_page_bytes(bytes as usize) };
        let memory = CpuDevice::open((bytes as usize).next_multiple_of(page), page)?;
        let mut pool = Pool::new(memory, backend)?;
        let mut set = |set: u64| {
            let entry = |(tensor, place): (u64, &Place)| CatalogueEntry {
                id: Hash::of(&[set, tensor].map(u64::to_le_bytes).concat()),
                checkpoint: set.to_string(),
                offset: place.offset,
                bytes: place.bytes,
                depth: 0.0,
            };
            let entries: Vec<_> = (0..).zip(&places).map(entry).collect();
            pool.catalogue(&entries, |_| bytes)
        };
        let sets = [set(0)?, set(1)?];
        Ok(Bench { file: file.to_owned(), pool, places, sets, turn: 0, measured })
    }

    /// The data file that it loads from.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    fn store(&self, sampled: bool) -> anyhow::Result<Arc<Store>> {
        let verification = if sampled { Verification::Sampled } else { Verification::Full };
        let options = Options { verification, ..Options::default() };
        let store = Store::with_options(self.pool.memory().clone(), options);
        if let Some(measured) = self.measured {
            store.tune(disk_of(&self.file)?.0, measured.tuning);
        }
        Ok(store)
    }

    /// Makes room for all tensors, in which none of them is.
    fn activate(&mut self) -> anyhow::Result<(Lease, Vec<TensorLoad>)> {
        let keys = &self.sets[self.turn];
        self.turn = 1 - self.turn;
        let activation = self.pool.activate(keys, &[], 0.0);
        let activation = activation.map_err(|refusal| anyhow::anyhow!("no room: {refusal:?}"))?;
        // Tensors that fit into what is left over stay; they are hardly any bytes.
        if activation.bytes_loaded < activation.bytes_reused.saturating_mul(100) {
            bail!("{} of the tensors' bytes were there", crate::output::bytes(activation.bytes_reused));
        }
        let places: HashMap<TensorKey, &Place> = keys.iter().copied().zip(&self.places).collect();
        let loads = activation.missing.into_iter().filter_map(|vacancy| {
            let place = places.get(&vacancy.tensor().key())?;
            Some(TensorLoad {
                vacancy,
                file: self.file.clone(),
                offset: place.offset,
                chunks: place.chunks.clone(),
                compressed: place.compressed.clone(),
                name: place.name.clone(),
            })
        });
        Ok((activation.lease, loads.collect()))
    }

    /// Divides loads into groups of about as many bytes, in order.
    fn divide(loads: Vec<TensorLoad>, groups: usize) -> Vec<Vec<TensorLoad>> {
        let total: u64 = loads.iter().map(|load| load.vacancy.tensor().len() as u64).sum();
        let (mut divided, mut before): (Vec<Vec<TensorLoad>>, u64) = (Vec::new(), 0);
        divided.resize_with(groups, Vec::new);
        for load in loads {
            let group = (before * groups as u64 / total.max(1)) as usize;
            before += load.vacancy.tensor().len() as u64;
            if let Some(group) = divided.get_mut(group) {
                group.push(load);
            }
        }
        divided
    }

    /// Loads everything.
    pub(super) fn whole(&mut self, mode: Mode) -> anyhow::Result<Cost> {
        if mode.cold {
            drop_cache(&self.file)?;
        }
        let store = self.store(mode.sampled)?;
        if mode.again {
            let (lease, _) = self.fill(&store, 1)?;
            self.pool.release(lease);
        }
        // Resets the most memory that was resident; where that is not allowed the figure is too high.
        let _ = std::fs::write("/proc/self/clear_refs", "5");
        let (started, cpu) = (Instant::now(), cpu_time());
        let (lease, bytes) = self.fill(&store, mode.loads)?;
        let (seconds, cpu_seconds) = (started.elapsed().as_secs_f64(), (cpu_time() - cpu).as_secs_f64());
        let pool = (self.pool.memory().page_bytes() * self.pool.memory().page_count()) as u64;
        // What is mapped of the file is the page cache's.
        let beside = |most: u64, mapped: u64| most.saturating_sub(pool + mapped);
        let peak_bytes = memory("VmHWM").zip(memory("RssFile")).map(|(most, mapped)| beside(most, mapped));
        self.pool.release(lease);
        // The next store begins with what this one has learnt, as one that goes on would.
        self.measured = store.corrections().first().map(|&(_, better)| better).or(self.measured);
        Ok(Cost { bytes, seconds, cpu_seconds, peak_bytes })
    }

    /// The simplest way past the page cache: threads that each read one part after the other, straight to where a load
    /// would put it. How fast a disk gets at memory differs from place to place, so it must be the same memory.
    pub(super) fn raw(&mut self) -> anyhow::Result<Cost> {
        let flags = OFlags::DIRECT.bits() as i32;
        let file = File::options().read(true).custom_flags(flags).open(&self.file);
        let file =
            file.with_context(|| format!("{} cannot be read past the page cache", self.file.display()))?;
        let (lease, tensors) = self.activate()?;
        let parts = tensors.into_iter().flat_map(|tensor| {
            let parts = tensor.vacancy.into_parts(CHUNK_BYTES as usize).into_iter();
            parts.map(move |part| (tensor.offset + part.index() as u64 * CHUNK_BYTES, part))
        });
        let (parts, bytes) = (Mutex::new(parts.collect::<VecDeque<_>>()), AtomicU64::new(0));
        let reader = || -> anyhow::Result<()> {
            loop {
                let next = parts.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                let Some((at, mut part)) = next else { return Ok(()) };
                part.stage(at as usize)?;
                let into = part.bytes_mut().unwrap_or_default();
                // Small tensors lie anywhere, and are hardly any bytes.
                let aligned =
                    [at as usize, into.as_ptr() as usize].iter().all(|at| at.is_multiple_of(ALIGNMENT));
                let whole = if aligned { into.len() / ALIGNMENT * ALIGNMENT } else { 0 };
                if let Some(into) = into.get_mut(..whole).filter(|into| !into.is_empty()) {
                    file.read_exact_at(into, at)?;
                    bytes.fetch_add(whole as u64, Ordering::Relaxed);
                }
                part.finish(Ok(()));
            }
        };
        let (started, cpu) = (Instant::now(), cpu_time());
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(reader)).collect();
            readers
                .into_iter()
                .try_for_each(|reader| reader.join().map_err(|_| anyhow!("a reader panicked"))?)
        })?;
        let (seconds, cpu_seconds) = (started.elapsed().as_secs_f64(), (cpu_time() - cpu).as_secs_f64());
        self.pool.release(lease);
        Ok(Cost { bytes: bytes.into_inner(), seconds, cpu_seconds, peak_bytes: None })
    }

    /// Seconds of a sixteenth of the bytes, cold: alone, and for a request while the rest is being prefetched.
    pub(super) fn urgent(&mut self) -> anyhow::Result<[f64; 2]> {
        let mut seconds = [0.0; 2];
        for (among, seconds) in seconds.iter_mut().enumerate() {
            drop_cache(&self.file)?;
            let store = self.store(false)?;
            let (lease, loads) = self.activate()?;
            let mut groups = Bench::divide(loads, LOADS).into_iter();
            let urgent = groups.next().unwrap_or_default();
            let (others_wake, others_woken) = counter();
            let mut others = 0;
            if among == 1 {
                for group in groups {
                    others += group.len();
                    store.prefetch(group, &others_wake);
                }
                std::thread::sleep(HEAD_START);
            }
            let (wake, woken) = counter();
            let count = urgent.len();
            let started = Instant::now();
            store.load(urgent, &wake);
            wait(&woken, count)?;
            *seconds = started.elapsed().as_secs_f64();
            wait(&others_woken, others)?;
            self.pool.release(lease);
        }
        Ok(seconds)
    }

    /// Loads everything by so many loads that start together; gives the bytes too.
    fn fill(&mut self, store: &Store, loads: usize) -> anyhow::Result<(Lease, u64)> {
        let (lease, tensors) = self.activate()?;
        let count = tensors.len();
        let bytes = tensors.iter().map(|load| load.vacancy.tensor().len() as u64).sum();
        let (wake, woken) = counter();
        for group in Bench::divide(tensors, loads) {
            store.load(group, &wake);
        }
        wait(&woken, count)?;
        match lease.tensors().iter().find_map(|tensor| tensor.failure()) {
            None => Ok((lease, bytes)),
            Some(failure) => bail!("a load failed: {failure:?}"),
        }
    }
}

fn counter() -> (Wake, Receiver<()>) {
    let (sender, woken) = channel();
    let sender = Mutex::new(sender);
    let wake: Wake = Arc::new(move || {
        let _ = sender.lock().unwrap_or_else(PoisonError::into_inner).send(());
    });
    (wake, woken)
}

fn wait(woken: &Receiver<()>, tensors: usize) -> anyhow::Result<()> {
    (0..tensors).try_for_each(|_| woken.recv_timeout(PATIENCE)).context("the load does not end")
}

/// A figure of this process's memory, in bytes: `VmHWM` is the most that was resident since that was reset, `RssFile` what
/// files stand behind.
fn memory(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}
