//! Moves tensor bytes from disk, or from host memory that has them already, to the device, verified, in execution order.
//!
//! A load is a list of tensors in the order in which the forward pass needs them, cut into parts of a chunk. Each disk has a
//! queue ([`schedule`]) and threads that read ([`source`]): past the page cache and straight to the part's place where
//! that can be, several reads at a time. What the page cache has is copied from there instead ([`mapping`]). Copying and
//! verifying are done on the device's copy streams ([`landing`]), so a slow disk holds up no other; what the page cache
//! gives again is not hashed again for a while ([`trust`]). What a copy is kept of in host memory (the pool settles that) comes by a queue of
//! its own ([`host`]) and needs no disk. What is under way is limited, whatever
//! the size of a model. The store decides nothing about what is loaded, and nobody can read a part before it is complete.

mod buffer;
mod control;
mod file;
mod host;
mod job;
mod landing;
mod mapping;
mod plan;
mod probe;
mod reuse;
mod ring;
mod rows;
mod schedule;
mod source;
mod stream_copy;
mod trust;

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::ops::DerefMut;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tangram_checkpoint::{CHUNK_BYTES, Checksum, TensorEntry, codec_format};
use tangram_codec::Format;
use tangram_device::Memory;
use tangram_pool::{LoadFailure, Vacancy};

pub use job::Damage;
pub use mapping::{drop_unused, unmap};
pub use probe::{Measured, Tuning, disk_of, measure};
pub use rows::{RowRead, RowSource};
pub use schedule::LoadId;

use file::DataFile;
use host::{HostJob, HostSource};
use job::{Frame, Job};
use landing::Landings;
use schedule::Urgency;
use source::{Engine, Source};
use trust::Trust;

/// Of how many parts one is verified where not all are.
const SAMPLED: u64 = 16;

/// Where the bytes of one missing tensor are.
#[derive(Debug)]
pub struct TensorLoad {
    /// Room for it.
    pub vacancy: Vacancy,
    /// File that holds it.
    pub file: PathBuf,
    /// First byte in the file.
    pub offset: u64,
    /// The checksum of each chunk of [`CHUNK_BYTES`] as it is stored.
    pub chunks: Arc<[Checksum]>,
    /// How its chunks are stored, if not as they are.
    pub compressed: Option<Compressed>,
    /// What to call it in an error.
    pub name: String,
}

/// How the chunks of a compressed tensor are stored: each where its plain bytes would begin.
#[derive(Clone, Debug)]
pub struct Compressed {
    /// What the elements are.
    pub format: Format,
    /// Stored bytes of each chunk. One that is as long as its plain bytes is stored as it is.
    pub stored: Arc<[u32]>,
}

impl Compressed {
    /// How a tensor is stored, if it is compressed.
    pub fn of(tensor: &TensorEntry) -> Option<Compressed> {
        let format = codec_format(tensor.dtype).filter(|_| !tensor.stored.is_empty())?;
        Some(Compressed { format, stored: tensor.stored.as_slice().into() })
    }

    /// Format and length of what is stored instead of a chunk of `plain` bytes, if it is another form of it.
    fn frame(&self, index: usize, plain: usize) -> Option<(Format, usize)> {
        let stored = *self.stored.get(index)? as usize;
        (stored != plain).then_some((self.format, stored))
    }
}

/// Called whenever a tensor has arrived or failed; must not block.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Called when stored bytes do not match their checksum; must not block.
pub type Notify = Arc<dyn Fn(&Damage) + Send + Sync>;

/// A part of a tensor that lies in its place now, verified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrived<'a> {
    /// The file that it came from.
    pub file: &'a Path,
    /// First byte of the tensor in the file.
    pub tensor: u64,
    /// Bytes of the part in memory.
    pub bytes: usize,
}

/// Called when a part has arrived, on a thread that copies; must not block.
pub type Observe = Arc<dyn Fn(Arrived<'_>) + Send + Sync>;

/// How much of what is loaded is compared with its checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verification {
    /// All of it that comes from the disk. What comes from the page cache as it was found right within the last ten
    /// minutes is taken as it is, as long as its file has not changed.
    #[default]
    Full,
    /// One part of sixteen, others each time: damage is found sooner or later, but may be computed with until then. What
    /// host memory has a copy of comes as it was read.
    Sampled,
}

/// How a store works.
#[derive(Clone)]
pub struct Options {
    /// How much is verified.
    pub verification: Verification,
    /// Is told of damaged files.
    pub damaged: Notify,
    /// Is told of every part that has arrived: for whoever draws a picture of a load.
    pub observe: Option<Observe>,
}

impl Default for Options {
    fn default() -> Self {
        Options { verification: Verification::Full, damaged: Arc::new(|_| ()), observe: None }
    }
}

/// The disk tier of one device.
pub struct Store {
    options: Options,
    engine: Engine,
    landings: Arc<Landings>,
    trust: Arc<Trust>,
    disks: Mutex<Disks>,
    loads: AtomicU64,
    random: RandomState,
}

#[derive(Default)]
struct Disks {
    /// By number of the file system.
    sources: HashMap<u64, Arc<Source>>,
    tunings: HashMap<u64, Tuning>,
    /// From the first load of something that host memory has.
    host: Option<Arc<HostSource>>,
}

impl Store {
    /// A store that fills `memory` and verifies everything.
    pub fn new(memory: Arc<Memory>) -> Arc<Store> {
        Store::with_options(memory, Options::default())
    }

    /// A store that fills `memory`.
    pub fn with_options(memory: Arc<Memory>, options: Options) -> Arc<Store> {
        Store::with_engine(memory, options, Engine::Best)
    }

    fn with_engine(memory: Arc<Memory>, options: Options, engine: Engine) -> Arc<Store> {
        Arc::new(Store {
            options,
            engine,
            landings: Landings::new(memory),
            trust: Arc::default(),
            disks: Mutex::default(),
            loads: AtomicU64::new(0),
            random: RandomState::new(),
        })
    }

    /// How a disk ([`disk_of`]) is read from now on. Starts the threads that read it, so that no load has to.
    pub fn tune(&self, disk: u64, tuning: Tuning) {
        self.disks().tunings.insert(disk, tuning);
        // Where none can be started, a load says so.
        if let Ok(source) = self.source(disk) {
            source.tune(tuning);
        }
    }

    /// How disks (as [`Store::tune`] names them) are read better than they were told to be, by what loads have reached.
    pub fn corrections(&self) -> Vec<(u64, Measured)> {
        let disks = self.disks();
        disks.sources.iter().filter_map(|(&disk, source)| Some((disk, source.corrected()?))).collect()
    }

    /// Starts bringing in tensors that a request waits for, in this order, and returns. `wake` is called after each of
    /// them.
    pub fn load(&self, tensors: Vec<TensorLoad>, wake: &Wake) {
        self.start(tensors, Urgency::Request, wake);
    }

    /// As [`Store::load`], for tensors that nobody waits for yet: they come when nothing else does.
    pub fn prefetch(&self, tensors: Vec<TensorLoad>, wake: &Wake) -> LoadId {
        self.start(tensors, Urgency::Prefetch, wake)
    }

    /// Reads some rows of a matrix before all of it is there, one after the other to the beginning of `room`, compared
    /// with nothing. `done` gets the room back, or an error; it is called once, on another thread, and not at all when
    /// no thread can be started.
    pub fn read_rows<R: DerefMut<Target = [u8]> + Send + ?Sized + 'static>(
        &self,
        read: RowRead,
        mut room: Box<R>,
        done: impl FnOnce(io::Result<Box<R>>) + Send + 'static,
    ) {
        let body = move || done(read.read(&mut room).map(|()| room));
        // Without it the rows come with their matrix.
        let _ = std::thread::Builder::new().name("rows".to_owned()).spawn(body);
    }

    fn start(&self, tensors: Vec<TensorLoad>, urgency: Urgency, wake: &Wake) -> LoadId {
        let load = LoadId(self.loads.fetch_add(1, Ordering::Relaxed));
        let mut files: HashMap<PathBuf, Result<Arc<DataFile>, String>> = HashMap::new();
        let mut jobs: HashMap<u64, VecDeque<Job>> = HashMap::new();
        let mut copies = VecDeque::new();
        for tensor in tensors {
            if tensor.vacancy.is_in_host() {
                let parts = tensor.vacancy.into_parts(CHUNK_BYTES as usize);
                copies.extend(parts.into_iter().map(|part| HostJob { part, wake: wake.clone() }));
                continue;
            }
            let open = |path: &PathBuf| {
                let problem = |error: io::Error| {
                    let path = path.display();
                    format!(
                        "its data file cannot be opened: {error} (file {path}); deploy the model again from its source"
                    )
                };
                DataFile::open(path).map(Arc::new).map_err(problem)
            };
            let file = files.entry(tensor.file).or_insert_with_key(open);
            let name: Arc<str> = tensor.name.into();
            let len = tensor.vacancy.tensor().len() as u64;
            for part in tensor.vacancy.into_parts(CHUNK_BYTES as usize) {
                let file = match &*file {
                    Ok(file) => file.clone(),
                    Err(problem) => {
                        let problem = format!("tensor {name}: {problem}");
                        if part.finish(Err(LoadFailure::Failed(problem))) {
                            wake();
                        }
                        continue;
                    }
                };
                let start = part.index() as u64 * CHUNK_BYTES;
                let sum = tensor.chunks.get(part.index()).copied();
                let plain = CHUNK_BYTES.min(len - start) as usize;
                let frame = tensor.compressed.as_ref();
                let frame = frame.and_then(|compressed| compressed.frame(part.index(), plain));
                jobs.entry(file.disk()).or_default().push_back(Job {
                    load,
                    urgency,
                    tensor_offset: tensor.offset,
                    offset: tensor.offset + start,
                    len: frame.map_or(plain, |(_, stored)| stored),
                    frame: frame.map(|(format, _)| Frame { format, at: 0 }),
                    sum: sum.filter(|_| self.is_verified(load, tensor.offset + start)),
                    part,
                    file,
                    name: name.clone(),
                    wake: wake.clone(),
                    damaged: self.options.damaged.clone(),
                    observe: self.options.observe.clone(),
                    trust: self.trust.clone(),
                    uncached: false,
                    buffer: None,
                    copies: Vec::new(),
                });
            }
        }
        if !copies.is_empty() {
            match self.host() {
                Ok(host) => host.push(load, urgency, copies),
                Err(error) => {
                    for HostJob { part, wake } in copies {
                        let problem = format!("no thread that copies can be started: {error}");
                        if part.finish(Err(LoadFailure::Failed(problem))) {
                            wake();
                        }
                    }
                }
            }
        }
        for (disk, jobs) in jobs {
            match self.source(disk) {
                Ok(source) => source.push(load, urgency, jobs),
                Err(error) => {
                    for job in jobs {
                        job.finish(Err(format!("no thread that reads can be started: {error}")));
                    }
                }
            }
        }
        load
    }

    /// What is left of a load is wanted by a request from now on.
    pub fn hasten(&self, load: LoadId) {
        let disks = self.disks();
        disks.sources.values().for_each(|source| source.hasten(load));
        disks.host.iter().for_each(|host| host.hasten(load));
    }

    /// Bytes per second at which tensors come from host memory, once that has been seen.
    pub fn host_rate(&self) -> Option<f64> {
        self.disks().host.as_ref()?.rate()
    }

    /// Whether a load verifies the part at this offset.
    fn is_verified(&self, load: LoadId, offset: u64) -> bool {
        match self.options.verification {
            Verification::Full => true,
            Verification::Sampled => self.random.hash_one((load, offset)).is_multiple_of(SAMPLED),
        }
    }

    fn disks(&self) -> MutexGuard<'_, Disks> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn host(&self) -> io::Result<Arc<HostSource>> {
        let mut disks = self.disks();
        if let Some(host) = &disks.host {
            return Ok(host.clone());
        }
        let host = HostSource::start()?;
        Ok(disks.host.insert(host).clone())
    }

    fn source(&self, disk: u64) -> io::Result<Arc<Source>> {
        let mut disks = self.disks();
        let tuning = disks.tunings.get(&disk).copied().unwrap_or_default();
        match disks.sources.entry(disk) {
            Entry::Occupied(known) => Ok(known.get().clone()),
            Entry::Vacant(new) => {
                let source = Source::start(tuning, self.engine, &self.landings, "read")?;
                Ok(new.insert(source).clone())
            }
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let disks = self.disks();
        disks.sources.values().for_each(|source| source.close());
        disks.host.iter().for_each(|host| host.close());
    }
}

#[cfg(test)]
mod tests;
