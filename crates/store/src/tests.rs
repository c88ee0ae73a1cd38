//! Loads from real files into a real pool, by both engines, from the page cache and past it.

use std::io::Write;
use std::sync::Condvar;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use super::*;
use tangram_device::cuda::stand_in;
use tangram_policy::TensorKey;
use tangram_pool::{Activation, Backend, CatalogueEntry, Pool, Tensor};

const CHUNK: usize = CHUNK_BYTES as usize;
const PATIENCE: Duration = Duration::from_secs(30);

struct World {
    _dir: tempfile::TempDir,
    path: PathBuf,
    pool: Pool,
    store: Arc<Store>,
    keys: Vec<TensorKey>,
    data: Vec<Vec<u8>>,
    offsets: Vec<u64>,
    damage: Arc<Mutex<Vec<Damage>>>,
}

#[derive(Clone, Copy, Debug)]
struct Setup {
    engine: Engine,
    backend: Backend,
    verification: Verification,
    /// Tensors start at multiples of this.
    alignment: usize,
    /// Where the file lies.
    dir: &'static str,
}

/// Beside the sources, and not in a directory for temporary files, which may be in memory.
const BESIDE: &str = env!("CARGO_MANIFEST_DIR");

const SETUP: Setup = Setup {
    engine: Engine::Best,
    backend: Backend::Paged,
    verification: Verification::Full,
    alignment: 256,
    dir: BESIDE,
};

/// Tensors of these sizes in one file, in order.
fn world(sizes: &[usize]) -> World {
    world_of(sizes, SETUP)
}

fn world_of(sizes: &[usize], setup: Setup) -> World {
    let dir = tempfile::tempdir_in(setup.dir).unwrap();
    let path = dir.path().join("data.bin");
    let data: Vec<Vec<u8>> = sizes
        .iter()
        .enumerate()
        .map(|(t, &len)| (0..len).map(|i| (i * 7 + i / 251 + t * 13) as u8).collect())
        .collect();
    let (mut file, mut offsets) = (Vec::new(), Vec::new());
    for bytes in &data {
        file.resize(file.len().next_multiple_of(setup.alignment), 0);
        offsets.push(file.len() as u64);
        file.extend(bytes);
    }
    let mut written = std::fs::File::create(&path).unwrap();
    written.write_all(&file).unwrap();
    written.sync_all().unwrap();
    let total: usize = sizes.iter().sum();
    let pool_bytes = (total + sizes.len() * (128 << 10)).next_power_of_two().max(1 << 20);
    let memory = stand_in::memory_under_test(pool_bytes, 64 << 10);
    let mut pool = Pool::new(memory.clone(), setup.backend).unwrap();
    let entries: Vec<_> = (0..sizes.len())
        .map(|i| CatalogueEntry {
            id: tangram_checkpoint::Hash::of(&(i as u64).to_le_bytes()),
            checkpoint: "c".into(),
            offset: (offsets[i] as usize).next_multiple_of(256) as u64
                + 256 * i as u64 * u64::from(setup.alignment < 256),
            bytes: sizes[i] as u64,
            depth: 0.0,
        })
        .collect();
    let room = file.len() as u64 + 512 * sizes.len() as u64;
    let keys = pool.catalogue(&entries, |_| room).unwrap();
    let damage = Arc::new(Mutex::new(Vec::new()));
    let for_store = damage.clone();
    let options = Options {
        verification: setup.verification,
        damaged: Arc::new(move |damage| for_store.lock().unwrap().push(damage.clone())),
        observe: None,
    };
    let store = Store::with_engine(memory, options, setup.engine);
    World { path, pool, store, keys, data, offsets, damage, _dir: dir }
}

/// A wake that can be waited for.
fn wake() -> (Wake, Receiver<()>) {
    let (sender, woken) = channel();
    let sender = Mutex::new(sender);
    (Arc::new(move || sender.lock().unwrap().send(()).unwrap_or(())), woken)
}

impl World {
    fn drop_cache(&self) {
        let file = std::fs::File::open(&self.path).unwrap();
        crate::unmap(&file);
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }

    fn loads(&self, activation: &mut Activation) -> Vec<TensorLoad> {
        let load = |vacancy: Vacancy| {
            let i = self.keys.iter().position(|key| *key == vacancy.tensor().key()).unwrap();
            let chunks = self.data[i].chunks(CHUNK).map(Checksum::of);
            TensorLoad {
                file: self.path.clone(),
                offset: self.offsets[i],
                chunks: chunks.collect(),
                compressed: None,
                name: format!("t{i}"),
                vacancy,
            }
        };
        std::mem::take(&mut activation.missing).into_iter().map(load).collect()
    }

    fn load(&mut self) -> Vec<Arc<Tensor>> {
        let mut activation = self.pool.activate(&self.keys, &[], 0.0).unwrap();
        let tensors = activation.lease.tensors().to_vec();
        let (wake, woken) = wake();
        self.store.load(self.loads(&mut activation), &wake);
        for _ in 0..tensors.len() {
            woken.recv_timeout(PATIENCE).expect("the load ends");
        }
        tensors
    }

    /// Whether all tensors begin at multiples of what direct reads are aligned to at most places.
    fn starts_at_blocks(&mut self) -> bool {
        let activation = self.pool.activate(&self.keys, &[], 0.0).unwrap();
        let mut tensors = activation.lease.tensors().iter();
        tensors.all(|tensor| tensor.extent().unwrap().address().is_multiple_of(512))
    }

    /// Loads everything and compares every byte.
    fn check(&mut self, what: &str) {
        let tensors = self.load();
        for (i, (tensor, data)) in tensors.iter().zip(&self.data).enumerate() {
            assert!(
                tensor.extent().unwrap().to_vec().unwrap() == *data,
                "{what}: tensor {i} of {} bytes: {:?}",
                data.len(),
                tensor.failure()
            );
        }
    }
}

#[test]
fn all_of_this_holds_on_a_stand_in_too() {
    stand_in::run_suite_again(&[]);
}

#[test]
fn every_byte_arrives_whatever_the_sizes_and_the_way() {
    let sizes = [
        1,
        255,
        256,
        257,
        511,
        513,
        4095,
        4096,
        4097,
        70_001,
        CHUNK - 1,
        CHUNK,
        CHUNK + 1,
        3 * CHUNK + 12345,
        3,
    ];
    for engine in [Engine::Best, Engine::Threads] {
        for (backend, alignment) in
            [(Backend::Paged, 256), (Backend::Paged, 4096), (Backend::Segment, 256), (Backend::Paged, 1)]
        {
            for cold in [false, true] {
                let setup = Setup { engine, backend, alignment, ..SETUP };
                let mut world = world_of(&sizes, setup);
                world.store.tune(disk_of(&world.path).unwrap().0, Tuning { block: 1 << 19, depth: 3 });
                if cold {
                    world.drop_cache();
                }
                world.check(&format!("{setup:?}, cold: {cold}"));
                if backend == Backend::Segment {
                    assert!(
                        world.starts_at_blocks(),
                        "what is whole blocks of the file is read straight to its place"
                    );
                }
            }
        }
    }
}

/// Loads a tensor of bf16 that is stored as `change` makes it of the frames of its chunks.
fn load_compressed(setup: Setup, cold: bool, change: impl Fn(&mut Vec<Vec<u8>>)) -> (World, Arc<Tensor>) {
    // Exponents that are certain; the last chunk is noise, which is stored as it is.
    let mut data: Vec<u8> = (0..CHUNK).flat_map(|i| [(i * 37 + i / 300) as u8, 0x3f]).collect();
    data.extend((0..3000u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()));
    let mut world = world_of(&[100, data.len()], setup);
    let mut frames: Vec<Vec<u8>> = data.chunks(CHUNK).map(<[u8]>::to_vec).collect();
    for frame in &mut frames[..2] {
        *frame = tangram_codec::encode(Format::Bf16, frame).unwrap();
    }
    change(&mut frames);
    let mut file = std::fs::read(&world.path).unwrap();
    for (i, frame) in frames.iter().enumerate() {
        let start = world.offsets[1] as usize + i * CHUNK;
        file[start..start + frame.len()].copy_from_slice(frame);
    }
    std::fs::write(&world.path, file).unwrap();
    std::fs::File::open(&world.path).unwrap().sync_all().unwrap();
    world.data[1] = data;
    if cold {
        world.drop_cache();
    }
    let mut activation = world.pool.activate(&world.keys[1..], &[], 0.0).unwrap();
    let mut loads = world.loads(&mut activation);
    loads[0].chunks = frames.iter().map(|frame| Checksum::of(frame)).collect();
    let stored = frames.iter().map(|frame| frame.len() as u32).collect();
    loads[0].compressed = Some(Compressed { format: Format::Bf16, stored });
    let (wake, woken) = wake();
    world.store.load(loads, &wake);
    woken.recv_timeout(PATIENCE).expect("the load ends");
    let tensor = activation.lease.tensors()[0].clone();
    world.pool.release(activation.lease);
    (world, tensor)
}

#[test]
fn compressed_chunks_arrive_decoded() {
    for engine in [Engine::Best, Engine::Threads] {
        for (backend, alignment) in [(Backend::Paged, 4096), (Backend::Segment, 256), (Backend::Paged, 1)] {
            for verification in [Verification::Full, Verification::Sampled] {
                for cold in [false, true] {
                    let setup = Setup { engine, backend, alignment, verification, ..SETUP };
                    let (world, tensor) = load_compressed(setup, cold, |_| {});
                    let right =
                        tensor.extent().is_some_and(|extent| extent.to_vec().unwrap() == world.data[1]);
                    assert!(right, "{setup:?}, cold: {cold}: {:?}", tensor.failure());
                }
            }
        }
    }
}

#[test]
fn frames_that_decode_to_nothing_fail_the_tensor() {
    // Their hashes are right: a manifest is not trusted either.
    for cold in [false, true] {
        let (_world, tensor) = load_compressed(SETUP, cold, |frames| frames[1].truncate(1000));
        let Some(LoadFailure::Failed(message)) = tensor.failure() else { panic!("must fail") };
        assert!(message.contains("t1") && message.contains("no use"), "{message}");
    }
}

#[test]
fn files_in_memory_load_too() {
    const MEMORY: &str = "/dev/shm";
    if tempfile::tempdir_in(MEMORY).is_err() {
        println!("skipped: no {MEMORY} here");
        return;
    }
    for engine in [Engine::Best, Engine::Threads] {
        let setup = Setup { engine, dir: MEMORY, ..SETUP };
        world_of(&[1, 4097, CHUNK + 1], setup).check("in memory");
    }
}

#[test]
fn what_is_loaded_again_stays_in_the_page_cache_unless_the_system_takes_it_out() {
    const CHUNKS: usize = 8;
    let setup = Setup { alignment: 4096, ..SETUP };
    let mut world = world_of(&[CHUNKS * CHUNK; 5], setup);
    let file = std::fs::File::open(&world.path).unwrap();
    let bytes = (CHUNKS * CHUNK) as u64;
    let cached = || ring::cached_bytes(&file, 0, bytes);
    let direct = DataFile::open(&world.path).unwrap().direct().is_some();
    world.drop_cache();
    if cached() != Some(0) || !direct {
        println!("skipped: the page cache cannot be looked into or passed by here");
        return;
    }
    // The bytes of the first tensor, each time to another place.
    world.data = vec![world.data[0].clone(); 5];
    world.offsets = vec![0; 5];
    let load = |world: &mut World, i: usize| {
        let mut activation = world.pool.activate(&world.keys[i..=i], &[], 0.0).unwrap();
        let (wake, woken) = wake();
        world.store.load(world.loads(&mut activation), &wake);
        woken.recv_timeout(PATIENCE).expect("the load ends");
        assert!(activation.lease.tensors()[0].extent().unwrap().to_vec().unwrap() == world.data[0]);
        cached().unwrap() >= bytes
    };
    assert_eq!([0, 1, 2].map(|i| load(&mut world, i)), [false, true, true]);
    // Parts that others were read ahead with are no more tried again than those that were asked for.
    world.drop_cache();
    assert_eq!([3, 4].map(|i| load(&mut world, i)), [false, false]);
    assert_eq!(cached(), Some(0), "nothing of it is read through the cache any more");
}

#[test]
fn what_the_cache_gives_again_is_not_hashed_again_but_what_the_disk_gives_is() {
    let mut world = world(&[CHUNK, CHUNK, CHUNK]);
    let trust = Arc::new(Trust::with_tick(Duration::ZERO));
    Arc::get_mut(&mut world.store).unwrap().trust = trust.clone();
    let file = std::fs::File::open(&world.path).unwrap();
    let stamp = |trust: &Trust| trust.stamp(&file).unwrap();
    let (right, wrong) = (Checksum::of(&world.data[0]), Checksum::of(b"something else"));
    // The bytes of the first tensor, each time to another place.
    world.data = vec![world.data[0].clone(); 3];
    world.offsets = vec![0; 3];
    let load = |world: &mut World, i: usize, sum: Checksum| {
        let mut activation = world.pool.activate(&world.keys[i..=i], &[], 0.0).unwrap();
        let (wake, woken) = wake();
        let mut loads = world.loads(&mut activation);
        loads[0].chunks = [sum].into();
        world.store.load(loads, &wake);
        woken.recv_timeout(PATIENCE).expect("the load ends");
        activation.lease.tensors()[0].is_ready()
    };
    if ring::cached_bytes(&file, 0, CHUNK_BYTES) != Some(CHUNK_BYTES) {
        println!("skipped: the page cache cannot be looked into here");
        return;
    }
    assert!(load(&mut world, 0, right));
    assert!(trust.holds(stamp(&trust), 0, right, Instant::now()), "it was found right");
    // Nobody could have found this right; so whether it is taken says whether it was looked at.
    trust.note(stamp(&trust), 0, wrong, Instant::now());
    assert!(load(&mut world, 1, wrong), "not hashed again");
    world.drop_cache();
    if ring::cached_bytes(&file, 0, CHUNK_BYTES) == Some(0) {
        assert!(!load(&mut world, 2, wrong), "the disk is never trusted");
    }
}

/// The page cache has files in pieces, and parts begin and end within them.
#[test]
fn what_is_read_again_comes_from_the_disk() {
    const BLOCK: usize = 2 << 20;
    let dir = tempfile::tempdir_in(BESIDE).unwrap();
    let path = dir.path().join("data.bin");
    let mut written = std::fs::File::create(&path).unwrap();
    (0..3).for_each(|_| written.write_all(&vec![1; BLOCK]).unwrap());
    written.sync_all().unwrap();
    let (file, reading) = (DataFile::open(&path).unwrap(), std::fs::File::open(&path).unwrap());
    let cached = |offset, bytes| ring::cached_bytes(&reading, offset, bytes);
    if cached(0, 4096) != Some(4096) {
        println!("skipped: the page cache cannot be looked into here");
        return;
    }
    // As after a load through the mapping.
    let mut to = vec![0; 3 * BLOCK];
    let mapping = file.mapping().unwrap();
    assert_eq!(mapping.is_ready(&reading, 0, 3 * BLOCK), Some(true));
    assert!(mapping.copy(0, &mut to, false, None));
    file.drop_from_cache(BLOCK as u64 / 2 + 256, 300);
    if cached(0, 3 * BLOCK as u64) == Some(3 * BLOCK as u64) {
        println!("skipped: this file system keeps what it is told to drop");
        return;
    }
    assert_eq!(cached(BLOCK as u64 / 2, 4096), Some(0), "a small tensor");
    file.drop_from_cache(BLOCK as u64 + 4096, BLOCK);
    assert_eq!(cached(BLOCK as u64 + 4096, BLOCK as u64), Some(0), "a chunk that lies in two pieces");
}

#[test]
fn what_is_partly_cached_arrives_whole() {
    let mut world = world(&[5 * CHUNK + 777]);
    world.drop_cache();
    let file = std::fs::File::open(&world.path).unwrap();
    let mut piece = vec![0; 100_000];
    for at in [1000u64, 3_000_000, 5_000_000] {
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut piece, at).unwrap();
    }
    world.check("partly cached");
}

#[test]
fn a_flipped_bit_fails_its_tensor_by_name_and_no_other() {
    for cold in [false, true] {
        let mut world = world(&[1000, 3 << 20, 1000]);
        let mut file = std::fs::read(&world.path).unwrap();
        file[world.offsets[1] as usize + (5 << 19)] ^= 4;
        std::fs::write(&world.path, file).unwrap();
        std::fs::File::open(&world.path).unwrap().sync_all().unwrap();
        if cold {
            world.drop_cache();
        }
        let tensors = world.load();
        assert!(tensors[0].is_ready() && tensors[2].is_ready());
        let Some(LoadFailure::Failed(message)) = tensors[1].failure() else { panic!("must fail") };
        assert!(
            message.contains("t1") && message.contains("checksum") && message.contains("deploy"),
            "{message}"
        );
        let damage = Damage { file: world.path.clone(), tensor: "t1".to_owned(), offset: world.offsets[1] };
        assert_eq!(*world.damage.lock().unwrap(), [damage]);
    }
}

#[test]
fn sampling_finds_damage_in_time_and_takes_most_on_trust() {
    let setup = Setup { verification: Verification::Sampled, ..SETUP };
    let mut world = world_of(&[4096; 300], setup);
    let mut file = std::fs::read(&world.path).unwrap();
    for offset in &world.offsets {
        file[*offset as usize] ^= 1;
    }
    std::fs::write(&world.path, file).unwrap();
    let verified = world.load().iter().filter(|tensor| tensor.failure().is_some()).count();
    // 19 on average; fewer than 1 or more than 60 come once in 10^8 runs.
    assert!((1..=60).contains(&verified), "{verified} of 300 parts were verified");
}

#[test]
fn truncated_and_missing_files_fail_with_what_to_do() {
    for engine in [Engine::Best, Engine::Threads] {
        let setup = Setup { engine, ..SETUP };
        for left in [100, 1500, 4096] {
            let mut short = world_of(&[1000, 5000], setup);
            std::fs::write(&short.path, vec![0; left]).unwrap();
            let Some(LoadFailure::Failed(message)) = short.load()[1].failure().cloned() else {
                panic!("must fail")
            };
            assert!(message.contains("truncated"), "{message}");
        }
        let mut gone = world_of(&[1000], setup);
        std::fs::remove_file(&gone.path).unwrap();
        let Some(LoadFailure::Failed(message)) = gone.load()[0].failure().cloned() else {
            panic!("must fail")
        };
        assert!(message.contains("cannot be opened") && message.contains("t0"), "{message}");
    }
}

#[test]
fn a_panic_on_the_way_loses_no_stream() {
    let mut world = world(&[1000, 1000, 1000, 1000, 1000]);
    let mut activation = world.pool.activate(&world.keys, &[], 0.0).unwrap();
    let mut loads = world.loads(&mut activation);
    let last = loads.split_off(4);
    let bad: Wake = Arc::new(|| panic!("expected by the test"));
    world.store.load(loads, &bad);
    let (good, woken) = wake();
    world.store.load(last, &good);
    woken.recv_timeout(PATIENCE).expect("the streams go on");
    assert!(activation.lease.tensors()[4].is_ready());
}

/// A gate that holds the copy streams until it is opened.
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn close(memory: &Memory) -> Gate {
        let gate = Arc::new((Mutex::new(false), Condvar::new()));
        for stream in memory.streams() {
            let gate = gate.clone();
            stream.submit(Box::new(move || {
                let mut open = gate.0.lock().unwrap();
                while !*open {
                    open = gate.1.wait(open).unwrap();
                }
            }));
        }
        Gate(gate)
    }

    fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }
}

/// Loads one tensor each as `start` says, with the streams held until all are there; gives the order of arrival.
fn order_of(world: &mut World, start: impl Fn(&Store, usize, Vec<TensorLoad>, &Wake)) -> Vec<usize> {
    let gate = Gate::close(world.pool.memory());
    let (sender, woken) = channel();
    let mut held = Vec::new();
    for i in 0..world.keys.len() {
        let mut activation = world.pool.activate(&world.keys[i..=i], &[], 0.0).unwrap();
        let loads = world.loads(&mut activation);
        held.push(activation);
        let sender = Mutex::new(sender.clone());
        let wake: Wake = Arc::new(move || sender.lock().unwrap().send(i).unwrap_or(()));
        start(&world.store, i, loads, &wake);
    }
    gate.open();
    let order = held.iter().map(|_| woken.recv_timeout(PATIENCE).expect("the loads end")).collect();
    assert!(held.iter().all(|activation| activation.lease.tensors()[0].is_ready()));
    order
}

#[test]
fn loads_side_by_side_take_turns() {
    for engine in [Engine::Best, Engine::Threads] {
        let mut world = world_of(&[64 << 20, 100], Setup { engine, ..SETUP });
        let order = order_of(&mut world, |store, _, loads, wake| store.load(loads, wake));
        assert_eq!(order, [1, 0], "the small load must not wait for the large one");
    }
}

#[test]
fn a_request_overtakes_prefetching_and_a_hastened_prefetch_the_others() {
    // The prefetches are several times what may be under way, which nothing overtakes.
    const SIZES: [usize; 3] = [48 << 20, 48 << 20, 12 << 20];
    let mut world = world(&SIZES);
    let order = order_of(&mut world, |store, i, loads, wake| {
        if i < 2 {
            store.prefetch(loads, wake);
        } else {
            store.load(loads, wake);
        }
    });
    assert_eq!(order[0], 2, "{order:?}");
    let mut world = world_of(&SIZES, SETUP);
    let order = order_of(&mut world, |store, i, loads, wake| {
        let load = store.prefetch(loads, wake);
        if i == 2 {
            store.hasten(load);
        }
    });
    assert_eq!(order[0], 2, "{order:?}");
}

#[test]
fn what_nobody_waits_for_is_given_up() {
    let mut world = world(&[64 << 20, 100]);
    world.drop_cache();
    let gate = Gate::close(world.pool.memory());
    let mut big = world.pool.activate(&world.keys[..1], &[], 0.0).unwrap();
    let (wake, woken) = wake();
    let loads = world.loads(&mut big);
    world.store.load(loads, &wake);
    let tensor = big.lease.tensors()[0].clone();
    world.pool.release(big.lease);
    gate.open();
    woken.recv_timeout(PATIENCE).expect("the load ends");
    assert_eq!(tensor.failure(), Some(&LoadFailure::Abandoned));
}

#[test]
fn a_store_that_goes_away_fails_what_waits() {
    for engine in [Engine::Best, Engine::Threads] {
        let mut world = world_of(&[64 << 20], Setup { engine, ..SETUP });
        world.drop_cache();
        let gate = Gate::close(world.pool.memory());
        let mut activation = world.pool.activate(&world.keys, &[], 0.0).unwrap();
        let (wake, _woken) = wake();
        let loads = world.loads(&mut activation);
        let store = std::mem::replace(&mut world.store, Store::new(world.pool.memory().clone()));
        store.load(loads, &wake);
        drop(store);
        gate.open();
        let tensor = &activation.lease.tensors()[0];
        let deadline = Instant::now() + PATIENCE;
        while tensor.failure().is_none() {
            assert!(Instant::now() < deadline, "it is never settled");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
