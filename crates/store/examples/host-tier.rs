//! What host memory saves: the same tensors loaded from disk, from disk with a copy kept, and from the copy, beside one
//! plain copy from pinned memory. On the stand-in for NVIDIA's driver, whose copies are the processor's, or with
//! `TANGRAM_TEST_GPU=N` on a GPU:
//!
//! `cargo run --release -p tangram-store --example host-tier -- [MIB] [MIB per tensor] [directory]`

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tangram_checkpoint::{CHUNK_BYTES, Checksum, Hash};
use tangram_device::cuda::{CudaConfig, CudaDevice, Driver, stand_in};
use tangram_device::{Arena, HostPool, Memory};
use tangram_policy::TensorKey;
use tangram_pool::{Backend, CatalogueEntry, KvReserve, Pool};
use tangram_store::{Store, TensorLoad, Wake};

const MIB: usize = 1 << 20;
const PAGE: usize = 2 * MIB;

/// User and system seconds of this process so far, to a hundredth.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn device(pool_bytes: usize) -> Arc<Memory> {
    let Some(ordinal) = std::env::var("TANGRAM_TEST_GPU").ok().and_then(|number| number.parse().ok()) else {
        return stand_in::memory(pool_bytes, PAGE);
    };
    let config =
        CudaConfig { pool_bytes: Some(pool_bytes), page_bytes: Some(PAGE), ..CudaConfig::new(ordinal) };
    CudaDevice::open(&Driver::load().unwrap(), &config).unwrap().into_memory()
}

struct World {
    pool: Pool,
    store: Arc<Store>,
    path: PathBuf,
    tensor_bytes: usize,
    chunks: Vec<Arc<[Checksum]>>,
    keys: Vec<TensorKey>,
}

impl World {
    /// Loads everything onto an empty device, and says what that took.
    fn load(&mut self, what: &str) {
        let (cpu, started) = (cpu_seconds(), Instant::now());
        let activation = self.pool.activate(&self.keys, &[], 1.0).unwrap();
        let located = activation.missing.into_iter().enumerate().map(|(i, vacancy)| TensorLoad {
            vacancy,
            file: self.path.clone(),
            offset: (i * self.tensor_bytes) as u64,
            chunks: self.chunks[i].clone(),
            compressed: None,
            name: format!("t{i}"),
        });
        let (sender, woken) = channel();
        let sender = Mutex::new(sender);
        let wake: Wake = Arc::new(move || sender.lock().unwrap().send(Instant::now()).unwrap());
        self.store.load(located.collect(), &wake);
        let moments: Vec<Instant> = self.keys.iter().map(|_| woken.recv().unwrap()).collect();
        let last = (*moments.last().unwrap() - started).as_secs_f64();
        let first = (moments[0] - started).as_secs_f64();
        assert!(activation.lease.tensors().iter().all(|tensor| tensor.is_ready()));
        self.pool.release(activation.lease);
        let gib = (self.keys.len() * self.tensor_bytes) as f64 / f64::from(1 << 30);
        println!(
            "{what:34} {:6.2} GiB/s  first tensor after {:7.2} ms  {:5.2} CPU seconds per GiB",
            gib / last,
            first * 1e3,
            (cpu_seconds() - cpu) / gib
        );
    }

    /// Takes everything off the device.
    fn empty(&mut self) {
        let bytes = self.pool.memory().page_count() * PAGE;
        let kv = self.pool.add_kv(Hash([1; 32]), bytes).unwrap();
        while !self.pool.has_room(&[KvReserve { kv, blocks: 1 }]) {
            self.pool.reclaim(&[KvReserve { kv, blocks: 1 }]);
            std::thread::yield_now();
        }
        self.pool.remove_kv(kv);
        assert_eq!(self.pool.resident_bytes(&self.keys), 0);
    }
}

fn open(
    path: &Path,
    tensors: usize,
    tensor_bytes: usize,
    host: Option<HostPool>,
    memory: &Arc<Memory>,
) -> World {
    let mut pool = Pool::new(memory.clone(), Backend::Paged).unwrap();
    if let Some(host) = host {
        pool.keep_in_host(host);
    }
    let data = std::fs::read(path).unwrap();
    let chunks = data
        .chunks(tensor_bytes)
        .map(|tensor| tensor.chunks(CHUNK_BYTES as usize).map(Checksum::of).collect());
    let chunks = chunks.collect();
    let entries: Vec<CatalogueEntry> = (0..tensors)
        .map(|i| CatalogueEntry {
            id: Hash::of(&(i as u64).to_le_bytes()),
            checkpoint: "c".into(),
            offset: (i * tensor_bytes) as u64,
            bytes: tensor_bytes as u64,
            depth: i as f64 / tensors as f64,
        })
        .collect();
    let keys = pool.catalogue(&entries, |_| data.len() as u64).unwrap();
    World { store: Store::new(memory.clone()), pool, path: path.to_owned(), tensor_bytes, chunks, keys }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number =
        |default: usize| arguments.next().map_or(default, |text| text.parse().expect("a number"));
    let (mib, tensor_mib) = (number(512), number(8));
    let dir = arguments.next().unwrap_or_else(|| ".".to_owned());
    let (tensors, tensor_bytes) = (mib / tensor_mib, tensor_mib * MIB);
    let bytes = tensors * tensor_bytes;
    let dir = tempfile::tempdir_in(dir).unwrap();
    let path = dir.path().join("data.bin");
    let mut file = std::fs::File::create(&path).unwrap();
    let mut random = 1u64;
    for _ in 0..bytes / MIB {
        let block = std::iter::repeat_with(|| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            random.to_le_bytes()
        });
        file.write_all(&block.take(MIB / 8).flatten().collect::<Vec<u8>>()).unwrap();
    }
    file.sync_all().unwrap();

    let memory = device(bytes + 8 * PAGE);
    println!("{}: {tensors} tensors of {tensor_mib} MiB", memory.name());
    let mut world = open(&path, tensors, tensor_bytes, None, &memory);
    world.load("from disk (or page cache)");
    world.empty();
    world.load("again");
    drop(world);

    let host = memory.host_pool().expect("a device that the host cannot address");
    let started = Instant::now();
    while host.bytes() < bytes {
        host.grow(bytes - host.bytes()).unwrap();
    }
    println!(
        "pinning takes {:.2} s per GiB",
        started.elapsed().as_secs_f64() / (bytes as f64 / f64::from(1 << 30))
    );
    // A driver pins memory that is there; the stand-in's comes with the first touch.
    host.take(bytes).unwrap().write(0, &vec![0; bytes]);
    let mut world = open(&path, tensors, tensor_bytes, Some(host), &memory);
    world.load("from disk, with a copy kept");
    for _ in 0..3 {
        world.empty();
        world.load("from host memory");
    }
    world.empty();
    drop(world);

    let host = memory.host_pool().unwrap();
    while host.bytes() < bytes {
        host.grow(bytes - host.bytes()).unwrap();
    }
    let whole = Arc::new(host.take(bytes).unwrap());
    let arena = Arena::reserve(memory.clone(), bytes).unwrap();
    for _ in 0..3 {
        let extent = arena.claim(0, bytes).unwrap();
        let (sender, ended) = channel();
        let started = Instant::now();
        memory.upload_kept(whole.clone(), 0, extent, move |extent, result| {
            result.unwrap();
            sender.send((Instant::now(), extent)).unwrap();
        });
        let (at, extent) = ended.recv().unwrap();
        drop(extent);
        let rate = bytes as f64 / f64::from(1 << 30) / (at - started).as_secs_f64();
        println!("{:34} {rate:6.2} GiB/s", "one plain pinned copy");
    }
}
