//! Moves tensor bytes from disk to the device, verified, in execution order.
//!
//! A load is a list of tensors in the order in which the forward pass needs them. Its parts go to the device's copy
//! streams one at a time, several loads in turn, so that neither a large load nor a slow one holds up another. Every
//! part is verified against its chunk hash before anybody can read it. The store decides nothing about what is loaded.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{Advice, fadvise};
use tangram_checkpoint::{CHUNK_BYTES, Hash};
use tangram_device::Memory;
use tangram_pool::{LoadFailure, Part, Vacancy};

/// Where the bytes of one missing tensor are.
#[derive(Debug)]
pub struct TensorLoad {
    /// Room for it.
    pub vacancy: Vacancy,
    /// File that holds it.
    pub file: PathBuf,
    /// First byte in the file.
    pub offset: u64,
    /// BLAKE3 of each chunk of [`CHUNK_BYTES`].
    pub chunks: Arc<[Hash]>,
    /// What to call it in an error.
    pub name: String,
}

/// Called whenever a tensor has arrived or failed; must not block.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

struct Job {
    part: Part,
    file: Arc<io::Result<File>>,
    path: Arc<Path>,
    offset: u64,
    hash: Option<Hash>,
    name: Arc<str>,
    wake: Wake,
}

#[derive(Default)]
struct Queue {
    loads: VecDeque<VecDeque<Job>>,
    idle_streams: Vec<usize>,
}

/// The disk tier of one device.
pub struct Store {
    memory: Arc<Memory>,
    queue: Mutex<Queue>,
}

impl Store {
    /// A store that fills `memory`.
    pub fn new(memory: Arc<Memory>) -> Arc<Store> {
        let idle_streams = (0..memory.streams().len()).collect();
        Arc::new(Store { memory, queue: Mutex::new(Queue { idle_streams, ..Queue::default() }) })
    }

    /// Starts bringing in tensors, in this order, and returns. `wake` is called after each of them.
    pub fn load(self: &Arc<Self>, tensors: Vec<TensorLoad>, wake: &Wake) {
        let mut files: HashMap<PathBuf, (Arc<Path>, Arc<io::Result<File>>)> = HashMap::new();
        let mut jobs = VecDeque::new();
        for tensor in tensors {
            let (path, file) = files
                .entry(tensor.file)
                .or_insert_with_key(|path| (Arc::from(path.as_path()), Arc::new(File::open(path))))
                .clone();
            if let Ok(file) = file.as_ref() {
                // Starts the kernel's read-ahead for what the page cache does not have; harmless where refused.
                let len = std::num::NonZeroU64::new(tensor.vacancy.tensor().len() as u64);
                let _ = fadvise(file, tensor.offset, len, Advice::WillNeed);
            }
            let name: Arc<str> = tensor.name.into();
            for part in tensor.vacancy.into_parts(CHUNK_BYTES as usize) {
                let index = part.index();
                jobs.push_back(Job {
                    offset: tensor.offset + index as u64 * CHUNK_BYTES,
                    hash: tensor.chunks.get(index).copied(),
                    part,
                    file: file.clone(),
                    path: path.clone(),
                    name: name.clone(),
                    wake: wake.clone(),
                });
            }
        }
        if jobs.is_empty() {
            return;
        }
        let mut queue = self.lock();
        queue.loads.push_back(jobs);
        let streams = std::mem::take(&mut queue.idle_streams);
        drop(queue);
        for stream in streams {
            self.feed(stream);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a stream its next part: one of each load in turn.
    fn feed(self: &Arc<Self>, stream: usize) {
        let mut queue = self.lock();
        let job = loop {
            let Some(mut load) = queue.loads.pop_front() else {
                queue.idle_streams.push(stream);
                return;
            };
            if let Some(job) = load.pop_front() {
                if !load.is_empty() {
                    queue.loads.push_back(load);
                }
                break job;
            }
        };
        drop(queue);
        let next = Next { store: self.clone(), stream };
        if let Some(worker) = self.memory.streams().get(stream) {
            worker.submit(Box::new(move || {
                let _next = next;
                run(job);
            }));
        }
    }
}

/// Feeds a stream again when its part is over, however that ended: a stream that is not fed is lost to all loads.
struct Next {
    store: Arc<Store>,
    stream: usize,
}

impl Drop for Next {
    fn drop(&mut self) {
        self.store.feed(self.stream);
    }
}

fn run(job: Job) {
    let Job { mut part, file, path, offset, hash, name, wake } = job;
    let result = if part.is_unwanted() {
        Err(LoadFailure::Abandoned)
    } else {
        fill(&mut part, file.as_ref().as_ref(), offset, hash).map_err(|problem| {
            LoadFailure::Failed(format!(
                "tensor {name}: {problem} (file {}); deploy the model again from its source",
                path.display()
            ))
        })
    };
    if part.finish(result) {
        wake();
    }
}

fn fill(
    part: &mut Part,
    file: Result<&File, &io::Error>,
    offset: u64,
    hash: Option<Hash>,
) -> Result<(), String> {
    let file = file.map_err(|error| format!("its data file cannot be opened: {error}"))?;
    let bytes = part.bytes_mut().ok_or("the device has no memory that the host can write")?;
    file.read_exact_at(bytes, offset).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => "its data file is truncated".to_owned(),
        _ => format!("its data file cannot be read: {error}"),
    })?;
    if hash.is_none_or(|hash| *blake3::hash(bytes).as_bytes() != hash.0) {
        return Err(format!(
            "the stored bytes at offset {offset} do not match their hash: the file is damaged"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Condvar;
    use std::time::{Duration, Instant};

    use super::*;
    use tangram_device::cpu::CpuDevice;
    use tangram_policy::TensorKey;
    use tangram_pool::{Backend, CatalogueEntry, Pool, Tensor};

    struct World {
        _dir: tempfile::TempDir,
        path: PathBuf,
        pool: Pool,
        store: Arc<Store>,
        keys: Vec<TensorKey>,
        data: Vec<Vec<u8>>,
        offsets: Vec<u64>,
    }

    /// Tensors of these sizes in one file, in order.
    fn world(sizes: &[usize]) -> World {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.bin");
        let data: Vec<Vec<u8>> = sizes
            .iter()
            .enumerate()
            .map(|(t, &len)| (0..len).map(|i| (i * 7 + i / 251 + t * 13) as u8).collect())
            .collect();
        let (mut file, mut offsets) = (Vec::new(), Vec::new());
        for bytes in &data {
            file.resize(file.len().next_multiple_of(256), 0);
            offsets.push(file.len() as u64);
            file.extend(bytes);
        }
        std::fs::write(&path, &file).unwrap();
        let memory = CpuDevice::open(64 << 20, 16384).unwrap();
        let mut pool = Pool::new(memory.clone(), Backend::Paged).unwrap();
        let entries: Vec<_> = (0..sizes.len())
            .map(|i| CatalogueEntry {
                id: Hash([i as u8; 32]),
                checkpoint: "c".into(),
                offset: offsets[i],
                bytes: sizes[i] as u64,
                depth: 0.0,
            })
            .collect();
        let keys = pool.catalogue(&entries, |_| file.len() as u64).unwrap();
        World { path, pool, store: Store::new(memory), keys, data, offsets, _dir: dir }
    }

    impl World {
        fn load(&mut self) -> Vec<Arc<Tensor>> {
            let activation = self.pool.activate(&self.keys, &[], 0.0).unwrap();
            let tensors = activation.lease.tensors().to_vec();
            let woken = Arc::new((Mutex::new(0), Condvar::new()));
            let for_wake = woken.clone();
            let wake: Wake = Arc::new(move || {
                *for_wake.0.lock().unwrap() += 1;
                for_wake.1.notify_all();
            });
            let loads = activation
                .missing
                .into_iter()
                .map(|vacancy| {
                    let i = vacancy.tensor().key().0 as usize;
                    let chunks =
                        self.data[i].chunks(CHUNK_BYTES as usize).map(|c| Hash(*blake3::hash(c).as_bytes()));
                    TensorLoad {
                        file: self.path.clone(),
                        offset: self.offsets[i],
                        chunks: chunks.collect(),
                        name: format!("t{i}"),
                        vacancy,
                    }
                })
                .collect();
            self.store.load(loads, &wake);
            let deadline = Instant::now() + Duration::from_secs(30);
            let mut count = woken.0.lock().unwrap();
            while *count < tensors.len() {
                assert!(Instant::now() < deadline, "the load does not finish");
                count = woken.1.wait_timeout(count, Duration::from_millis(100)).unwrap().0;
            }
            tensors
        }
    }

    #[test]
    fn every_byte_arrives_whatever_the_sizes() {
        let chunk = CHUNK_BYTES as usize;
        let mut world = world(&[1, 255, 256, 257, chunk - 1, chunk, chunk + 1, 3 * chunk + 12345]);
        let tensors = world.load();
        for (tensor, data) in tensors.iter().zip(&world.data) {
            assert!(tensor.bytes() == Some(data), "{} bytes", data.len());
        }
    }

    #[test]
    fn a_flipped_bit_fails_its_tensor_by_name_and_no_other() {
        let mut world = world(&[1000, 3 << 20, 1000]);
        let mut file = std::fs::read(&world.path).unwrap();
        file[world.offsets[1] as usize + (5 << 19)] ^= 4;
        std::fs::write(&world.path, file).unwrap();
        let tensors = world.load();
        assert!(tensors[0].is_ready() && tensors[2].is_ready());
        let Some(LoadFailure::Failed(message)) = tensors[1].failure() else { panic!("must fail") };
        assert!(
            message.contains("t1") && message.contains("hash") && message.contains("deploy"),
            "{message}"
        );
    }

    #[test]
    fn truncated_and_missing_files_fail_with_what_to_do() {
        let mut short = world(&[1000, 5000]);
        std::fs::write(&short.path, vec![0; 100]).unwrap();
        let Some(LoadFailure::Failed(message)) = short.load()[1].failure().cloned() else {
            panic!("must fail")
        };
        assert!(message.contains("truncated"), "{message}");
        let mut gone = world(&[1000]);
        std::fs::remove_file(&gone.path).unwrap();
        let Some(LoadFailure::Failed(message)) = gone.load()[0].failure().cloned() else {
            panic!("must fail")
        };
        assert!(message.contains("cannot be opened"), "{message}");
    }

    #[test]
    fn a_panic_on_the_way_loses_no_stream() {
        let mut world = world(&[1000, 1000, 1000, 1000, 1000]);
        let activation = world.pool.activate(&world.keys, &[], 0.0).unwrap();
        let mut vacancies = activation.missing.into_iter().enumerate();
        let load = |i: usize, vacancy: Vacancy| TensorLoad {
            file: world.path.clone(),
            offset: world.offsets[i],
            chunks: [Hash(*blake3::hash(&world.data[i]).as_bytes())].into(),
            name: format!("t{i}"),
            vacancy,
        };
        let bad: Wake = Arc::new(|| panic!("expected by the test"));
        let loads = vacancies.by_ref().take(4).map(|(i, vacancy)| load(i, vacancy)).collect();
        world.store.load(loads, &bad);
        let (woken, wait) = std::sync::mpsc::channel();
        let good: Wake = Arc::new(move || woken.send(()).unwrap());
        world.store.load(vacancies.map(|(i, vacancy)| load(i, vacancy)).collect(), &good);
        wait.recv_timeout(Duration::from_secs(30)).expect("the streams go on");
        assert!(activation.lease.tensors()[4].is_ready());
    }

    #[test]
    fn loads_side_by_side_take_turns() {
        let mut world = world(&[32 << 20, 100]);
        let keys = world.keys.clone();
        let big = world.pool.activate(&keys[..1], &[], 0.0).unwrap();
        let small = world.pool.activate(&keys[1..], &[], 0.0).unwrap();
        let order = Arc::new(Mutex::new(Vec::new()));
        let tensors = [big.lease.tensors()[0].clone(), small.lease.tensors()[0].clone()];
        let store = world.store.clone();
        for (i, activation) in [big, small].into_iter().enumerate() {
            let order = order.clone();
            let wake: Wake = Arc::new(move || order.lock().unwrap().push(i));
            let chunks =
                world.data[i].chunks(CHUNK_BYTES as usize).map(|c| Hash(*blake3::hash(c).as_bytes()));
            let vacancy = activation.missing.into_iter().next().unwrap();
            let (file, offset) = (world.path.clone(), world.offsets[i]);
            store.load(
                vec![TensorLoad { vacancy, file, offset, chunks: chunks.collect(), name: "t".into() }],
                &wake,
            );
        }
        let deadline = Instant::now() + Duration::from_secs(30);
        while order.lock().unwrap().len() < 2 {
            assert!(Instant::now() < deadline, "the loads do not finish");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(tensors.iter().all(|tensor| tensor.is_ready()));
        assert_eq!(*order.lock().unwrap(), [1, 0], "the small load must not wait for the large one");
    }
}
