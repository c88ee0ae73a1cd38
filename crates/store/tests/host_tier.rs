//! Host memory between the disk and a device that the host cannot address, on stand-ins: what comes from it is byte for
//! byte what was on the disk, it holds no more than it may, and nothing is left behind.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use tangram_checkpoint::{CHUNK_BYTES, Hash};
use tangram_device::HostPool;
use tangram_device::cuda::stand_in::{self, Delay, Left, Options, StandIn};
use tangram_policy::TensorKey;
use tangram_pool::{Activation, Backend, CatalogueEntry, Lease, LoadFailure, Pool, Tensor, Vacancy};
use tangram_store::{Store, TensorLoad, Wake};

const CHUNK: usize = CHUNK_BYTES as usize;
const PAGE: usize = 64 << 10;
const MIB: usize = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
const INVALID_VALUE: i32 = 1;
const ECC_UNCORRECTABLE: i32 = 214;

/// Tensors of one file on a disk, a device, and host memory between them.
struct World {
    stand_in: StandIn,
    host: HostPool,
    pool: Pool,
    store: Arc<Store>,
    path: PathBuf,
    _dir: tempfile::TempDir,
    data: Vec<Vec<u8>>,
    offsets: Vec<u64>,
    keys: Vec<TensorKey>,
    now: f64,
}

struct Loading {
    activation: Activation,
    woken: Receiver<()>,
    waited_for: usize,
}

/// Tries again until something is so.
fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    for _ in 0..PATIENCE.as_millis() {
        if so() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("{what} never");
}

impl World {
    /// `sizes` bytes per tensor, `device` and `host` bytes of memory.
    fn new(sizes: &[usize], device: usize, host: usize, delay: Delay) -> World {
        let options =
            Options { memory_bytes: device + 2 * PAGE, granularity: PAGE, delay, abort_on_misuse: true };
        let (stand_in, opened) = stand_in::open(options, device, PAGE);
        let memory = opened.unwrap().into_memory();
        let host_pool = memory.host_pool().unwrap();
        host_pool.grow(host).unwrap();
        let mut pool = Pool::new(memory.clone(), Backend::Paged).unwrap();
        pool.keep_in_host(host_pool.clone());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data.bin");
        let bytes = |(t, &len): (usize, &usize)| (0..len).map(|i| (i * 7 + i / 251 + t * 13) as u8).collect();
        let data: Vec<Vec<u8>> = sizes.iter().enumerate().map(bytes).collect();
        let (mut file, mut offsets) = (Vec::new(), Vec::new());
        for bytes in &data {
            file.resize(file.len().next_multiple_of(256), 0);
            offsets.push(file.len() as u64);
            file.extend(bytes);
        }
        std::fs::write(&path, &file).unwrap();
        let (store, keys) = (Store::new(memory), Vec::new());
        let mut world =
            World { stand_in, host: host_pool, pool, store, path, _dir: dir, data, offsets, keys, now: 0.0 };
        world.keys = (0..sizes.len()).map(|tensor| world.catalogue(tensor)).collect();
        world
    }

    fn catalogue(&mut self, tensor: usize) -> TensorKey {
        let entry = CatalogueEntry {
            id: Hash::of(&(tensor as u64).to_le_bytes()),
            checkpoint: "c".into(),
            offset: self.offsets[tensor],
            bytes: self.data[tensor].len() as u64,
            depth: 0.0,
        };
        let file = self.offsets.last().unwrap() + self.data.last().unwrap().len() as u64;
        self.pool.catalogue(&[entry], |_| file).unwrap()[0]
    }

    fn located(&self, vacancy: Vacancy) -> TensorLoad {
        let i = self.keys.iter().position(|key| *key == vacancy.tensor().key()).unwrap();
        TensorLoad {
            file: self.path.clone(),
            offset: self.offsets[i],
            chunks: self.data[i].chunks(CHUNK).map(tangram_checkpoint::Checksum::of).collect(),
            compressed: None,
            name: format!("t{i}"),
            vacancy,
        }
    }

    /// Starts bringing in these tensors, if they fit beside what is leased.
    fn start(&mut self, tensors: &[usize]) -> Option<Loading> {
        self.now += 1.0;
        let keys: Vec<TensorKey> = tensors.iter().map(|&tensor| self.keys[tensor]).collect();
        let mut activation = self.pool.activate(&keys, &[], self.now).ok()?;
        let missing = std::mem::take(&mut activation.missing);
        let (sender, woken) = channel();
        let sender = Mutex::new(sender);
        let wake: Wake = Arc::new(move || sender.lock().unwrap().send(()).unwrap_or(()));
        let waited_for = missing.len();
        self.store.load(missing.into_iter().map(|vacancy| self.located(vacancy)).collect(), &wake);
        Some(Loading { activation, woken, waited_for })
    }

    fn end(&self, loading: Loading) -> Lease {
        for _ in 0..loading.waited_for {
            loading.woken.recv_timeout(PATIENCE).expect("the load ends");
        }
        // Others may be bringing the rest.
        for tensor in loading.activation.lease.tensors() {
            wait_until("a joined load ends", || tensor.is_ready() || tensor.failure().is_some());
        }
        loading.activation.lease
    }

    /// Brings in these tensors, compares every byte, and lets them go.
    fn visit(&mut self, tensors: &[usize]) {
        let loading = self.start(tensors).expect("they fit");
        let lease = self.end(loading);
        for (&i, tensor) in tensors.iter().zip(lease.tensors()) {
            let right = tensor.extent().is_some_and(|extent| extent.to_vec().unwrap() == self.data[i]);
            assert!(right, "tensor {i}: {:?}", tensor.failure());
        }
        self.release(lease);
    }

    /// Gives a lease back, and waits until nobody holds its tensors any more.
    fn release(&mut self, lease: Lease) {
        self.release_all(vec![lease]);
    }

    fn release_all(&mut self, leases: Vec<Lease>) {
        let tensors: Vec<Arc<Tensor>> = leases.iter().flat_map(|lease| lease.tensors().to_vec()).collect();
        leases.into_iter().for_each(|lease| self.pool.release(lease));
        let tensors: Vec<_> = tensors.into_iter().map(|tensor| Arc::downgrade(&tensor)).collect();
        for tensor in tensors {
            // The pool has one; whoever has just settled it may have another for a moment.
            wait_until("a tensor is let go", || tensor.strong_count() <= 1);
        }
        self.pool.release(Lease::default());
    }

    /// Bytes that came from host memory so far.
    fn hits(&self) -> u64 {
        self.pool.stats().from_host_total
    }

    /// Tensors in host memory, and the bytes that they take.
    fn kept(&self) -> (u64, u64) {
        let host = self.pool.host().unwrap();
        (host.tensors, host.used_bytes)
    }

    /// Ends everything; nothing may be left.
    fn finish(self) {
        let World { stand_in, host, pool, store, .. } = self;
        let memory = pool.memory().clone();
        drop((store, pool));
        wait_until("the store's threads end", || Arc::strong_count(&memory) == 1);
        wait_until("host memory is free", || host.free() == host.bytes());
        drop((host, memory));
        assert_eq!((stand_in.left(), stand_in.violations()), (Left::default(), Vec::new()));
    }
}

#[test]
fn what_host_memory_has_comes_back_without_the_disk() {
    let sizes = [1, 255, 4097, PAGE, CHUNK - 1, CHUNK + 1, 3 * CHUNK + 12_345, 4 * MIB, 6 * MIB];
    let (first, second) = (&[0, 1, 2, 3, 4, 5, 6], &[7, 8]);
    for delay in [Delay::Latest, Delay::Random(1), Delay::Random(2)] {
        let mut world = World::new(&sizes, 11 * MIB, 24 * MIB, delay);
        world.visit(first);
        world.visit(second);
        assert_eq!((world.hits(), world.kept().0), (0, 9));
        // All of it comes again and is right, and there is no file.
        std::fs::remove_file(&world.path).unwrap();
        for _ in 0..3 {
            world.visit(first);
            world.visit(second);
        }
        assert!(world.hits() > 3 * 10 * MIB as u64);
        world.finish();
    }
}

#[test]
fn a_model_four_times_host_memory_streams_through_and_a_quarter_is_found_again() {
    let mut world = World::new(&[MIB; 32], 32 * MIB, 8 * MIB, Delay::Random(7));
    let model: Vec<usize> = (0..32).collect();
    for round in 0..5 {
        let before = world.hits();
        world.visit(&model);
        assert_eq!(world.hits() - before, if round == 0 { 0 } else { 8 * MIB as u64 }, "round {round}");
        assert_eq!(world.kept(), (8, 8 << 20));
        // Something that needs the whole device.
        let kv = world.pool.add_kv(Hash([1; 32]), 32 * MIB).unwrap();
        let block = world.pool.take_kv(kv, 1).unwrap();
        assert_eq!(world.pool.resident_bytes(&world.keys), 0);
        world.pool.give_kv(kv, block);
        world.pool.remove_kv(kv);
    }
    world.finish();
}

/// Host memory is given out in units, so that a byte of a small tensor takes far more than a byte of it.
#[test]
fn small_tensors_do_not_crowd_out_large_ones() {
    let mut sizes = vec![500; 8];
    sizes.extend([2 * PAGE; 4]);
    // The small ones fill host memory, then the large ones are asked for more often.
    let mut world = World::new(&sizes, MIB, 8 * PAGE, Delay::Latest);
    let (small, large): (Vec<usize>, Vec<usize>) = ((0..8).collect(), (8..12).collect());
    world.visit(&small);
    assert_eq!(world.kept(), (8, 8 * PAGE as u64));
    for _ in 0..4 {
        world.visit(&large);
        let kv = world.pool.add_kv(Hash([1; 32]), MIB).unwrap();
        let block = world.pool.take_kv(kv, 1).unwrap();
        world.pool.give_kv(kv, block);
        world.pool.remove_kv(kv);
    }
    assert_eq!(world.pool.hosted_bytes(&world.keys[8..]), 8 * PAGE as u64);
    world.finish();
}

#[test]
fn what_is_wrong_on_the_disk_is_not_kept_and_what_was_right_is() {
    let mut world = World::new(&[3 * CHUNK, MIB], 8 * MIB, 8 * MIB, Delay::Latest);
    let right = std::fs::read(&world.path).unwrap();
    let mut wrong = right.clone();
    wrong[2 * CHUNK + 5] ^= 1;
    std::fs::write(&world.path, wrong).unwrap();
    let loading = world.start(&[0, 1]).unwrap();
    let lease = world.end(loading);
    assert!(
        matches!(lease.tensors()[0].failure(), Some(LoadFailure::Failed(why)) if why.contains("checksum"))
    );
    assert!(lease.tensors()[1].is_ready());
    world.release(lease);
    assert_eq!(world.kept(), (1, MIB as u64));
    std::fs::write(&world.path, right).unwrap();
    world.visit(&[0, 1]);
    assert_eq!(world.kept().0, 2);
    world.finish();
}

/// Two tensors that take turns on a device with room for one.
fn turns() -> World {
    let mut world = World::new(&[5 * MIB, 5 * MIB], 6 * MIB, 12 * MIB, Delay::Latest);
    world.visit(&[0]);
    world.visit(&[1]);
    world
}

#[test]
fn a_copy_to_the_device_that_fails_fails_its_tensor_and_loses_nothing() {
    let mut world = turns();
    // The second part of three.
    world.stand_in.fail("cuMemcpyHtoDAsync_v2", 2, INVALID_VALUE);
    let loading = world.start(&[0]).unwrap();
    let lease = world.end(loading);
    let Some(LoadFailure::Failed(why)) = lease.tensors()[0].failure() else { panic!("must fail") };
    assert!(why.contains("copying to the GPU"), "{why}");
    world.release(lease);
    assert_eq!(world.stand_in.pending_faults(), 0);
    std::fs::remove_file(&world.path).unwrap();
    world.visit(&[0]);
    world.visit(&[1]);
    world.finish();
}

#[test]
fn a_device_that_is_lost_under_copies_says_so_and_leaves_nothing() {
    let mut world = turns();
    world.stand_in.fail("execution", 1, ECC_UNCORRECTABLE);
    let loading = world.start(&[0]).unwrap();
    let lease = world.end(loading);
    let Some(LoadFailure::Failed(why)) = lease.tensors()[0].failure() else { panic!("must fail") };
    assert!(why.contains("lost"), "{why}");
    world.release(lease);
    assert!(world.pool.memory().lost().is_some());
    world.finish();
}

#[test]
fn what_no_model_has_any_more_leaves_host_memory() {
    let mut world = turns();
    assert_eq!(world.kept(), (2, 10 << 20));
    let keys = world.keys.clone();
    world.pool.forget(&keys);
    assert_eq!(world.kept(), (0, 0));
    world.finish();
}

#[test]
fn a_load_that_nobody_wants_any_more_ends_and_its_copy_stays() {
    let mut world = turns();
    std::fs::remove_file(&world.path).unwrap();
    let Loading { activation, woken, .. } = world.start(&[0]).unwrap();
    world.release(activation.lease);
    woken.recv_timeout(PATIENCE).expect("the load ends");
    let mut started = None;
    wait_until("the room is let go", || {
        started = world.start(&[0]);
        started.is_some()
    });
    let lease = world.end(started.unwrap());
    assert!(lease.tensors()[0].is_ready(), "{:?}", lease.tensors()[0].failure());
    world.release(lease);
    world.finish();
}

/// Prefetches of several times what may be under way do not hold up a request, nor one that is hastened the others.
#[test]
fn a_request_overtakes_prefetches_from_host_memory() {
    const SIZES: [usize; 4] = [48 * MIB, 48 * MIB, 12 * MIB, MIB];
    let mut world = World::new(&SIZES, 110 * MIB, 120 * MIB, Delay::Latest);
    for hasten in [false, true] {
        (0..4).for_each(|tensor| world.visit(&[tensor]));
        let kv = world.pool.add_kv(Hash([1; 32]), 110 * MIB).unwrap();
        let block = world.pool.take_kv(kv, 1).unwrap();
        world.pool.give_kv(kv, block);
        world.pool.remove_kv(kv);
        // Whoever is told of this one holds the others up until all are there.
        let ((reached, gate), (open, opened)) = (channel(), channel::<()>());
        let (reached, opened) = (Mutex::new(reached), Mutex::new(opened));
        let mut first = world.pool.activate(&[world.keys[3]], &[], world.now).unwrap();
        let load = first.missing.drain(..).map(|vacancy| world.located(vacancy)).collect();
        let hold: Wake = Arc::new(move || {
            reached.lock().unwrap().send(()).unwrap();
            let _ = opened.lock().unwrap().recv();
        });
        world.store.load(load, &hold);
        gate.recv_timeout(PATIENCE).expect("the first one comes");
        let (sender, woken) = channel();
        let mut held = vec![first.lease];
        for tensor in 0..3 {
            let mut activation = world.pool.activate(&[world.keys[tensor]], &[], world.now).unwrap();
            let loads: Vec<_> = activation.missing.drain(..).map(|vacancy| world.located(vacancy)).collect();
            assert!(loads[0].vacancy.is_in_host());
            let sender = Mutex::new(sender.clone());
            let wake: Wake = Arc::new(move || sender.lock().unwrap().send(tensor).unwrap_or(()));
            match (tensor, hasten) {
                (2, false) => world.store.load(loads, &wake),
                (2, true) => {
                    let load = world.store.prefetch(loads, &wake);
                    world.store.hasten(load);
                }
                _ => drop(world.store.prefetch(loads, &wake)),
            }
            held.push(activation.lease);
        }
        open.send(()).unwrap();
        assert_eq!(woken.recv_timeout(PATIENCE), Ok(2), "hastened: {hasten}");
        let others = (0..2).map(|_| woken.recv_timeout(PATIENCE).expect("the loads end"));
        assert_eq!(others.sum::<usize>(), 1, "the other two");
        held.into_iter().for_each(|lease| world.release(lease));
    }
    world.finish();
}

#[derive(Clone, Debug)]
enum Step {
    /// Starts loading these tensors.
    Start(Vec<usize>),
    /// Waits for one of the loads and compares the bytes.
    End(usize),
    /// Gives up one of them.
    GiveUp(usize),
    /// Ends everything and forgets these tensors, then knows them again.
    Redeploy(Vec<usize>),
    /// Lets a copy to the device fail.
    Fail(u64),
}

const TENSORS: usize = 12;

fn some_tensors() -> impl Strategy<Value = Vec<usize>> {
    proptest::sample::subsequence((0..TENSORS).collect::<Vec<_>>(), 1..6)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => some_tensors().prop_map(Step::Start),
        6 => (0usize..8).prop_map(Step::End),
        2 => (0usize..8).prop_map(Step::GiveUp),
        1 => some_tensors().prop_map(Step::Redeploy),
        1 => (1u64..6).prop_map(Step::Fail),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever is loaded side by side, given up, evicted, failed and removed: what arrives is what was deployed, host
    /// memory is never more than there is, and in the end all of it is free again.
    #[test]
    fn random_programs_find_every_byte(
        steps in proptest::collection::vec(step(), 1..60), seed in any::<u64>(),
        device in 6usize..14, host in 0usize..12,
    ) {
        let size = |i: usize| match i % 4 {
            0 => 1000 + i,
            1 => 300_000 + i * 7919,
            2 => MIB,
            _ => CHUNK + 100_000 * i,
        };
        let sizes: Vec<usize> = (0..TENSORS).map(size).collect();
        let delay = if seed % 2 == 0 { Delay::Latest } else { Delay::Random(seed) };
        let mut world = World::new(&sizes, device * MIB, host * MIB, delay);
        let mut loads: Vec<(Vec<usize>, Loading)> = Vec::new();
        for step in steps {
            match step {
                Step::Start(tensors) => {
                    let loading = world.start(&tensors);
                    loads.extend(loading.map(|loading| (tensors, loading)));
                }
                Step::End(which) if !loads.is_empty() => {
                    let (tensors, loading) = loads.swap_remove(which % loads.len());
                    let lease = world.end(loading);
                    for (&i, tensor) in tensors.iter().zip(lease.tensors()) {
                        match tensor.failure() {
                            None => prop_assert!(tensor.extent().unwrap().to_vec().unwrap() == world.data[i]),
                            Some(LoadFailure::Failed(why)) => prop_assert!(why.contains("copying to the GPU")),
                            Some(LoadFailure::Abandoned) => prop_assert!(false, "it was wanted"),
                        }
                    }
                    world.pool.release(lease);
                }
                Step::GiveUp(which) if !loads.is_empty() => {
                    let (_, loading) = loads.swap_remove(which % loads.len());
                    world.pool.release(loading.activation.lease);
                }
                Step::Redeploy(tensors) => {
                    let leases = loads.drain(..).map(|(_, loading)| world.end(loading)).collect();
                    world.release_all(leases);
                    for tensor in tensors {
                        world.pool.forget(&[world.keys[tensor]]);
                        world.keys[tensor] = world.catalogue(tensor);
                        prop_assert_eq!(world.pool.hosted_bytes(&[world.keys[tensor]]), 0);
                    }
                }
                Step::Fail(nth) => world.stand_in.fail("cuMemcpyHtoDAsync_v2", nth, INVALID_VALUE),
                _ => {}
            }
            let stats = world.pool.host().unwrap();
            prop_assert!(stats.used_bytes <= stats.bytes && stats.bytes <= (host * MIB) as u64);
        }
        world.stand_in.clear_faults();
        let leases = loads.into_iter().map(|(_, loading)| world.end(loading)).collect();
        world.release_all(leases);
        world.finish();
    }
}
