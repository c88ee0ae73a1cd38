//! The pool against a plain model, and one test for each fault that the published prototype has
//! (stale addresses after compaction, shared tensors evicted under a hit, running KV freed by a load, lost doubles).

use std::collections::BTreeMap;

use proptest::prelude::*;
use tangram_checkpoint::Hash;
use tangram_device::cuda::stand_in;

use super::*;
use crate::{LoadFailure, Part};

const PAGE: usize = 4096;

struct World {
    pool: Pool,
    now: f64,
}

/// The bytes that a tensor's content id stands for.
fn content(id: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| id.wrapping_mul(31).wrapping_add(i as u8) | 1).collect()
}

fn entry(id: u8, checkpoint: &str, offset: usize, bytes: usize) -> CatalogueEntry {
    let (offset, bytes) = (offset as u64, bytes as u64);
    CatalogueEntry { id: Hash([id; 32]), checkpoint: checkpoint.to_owned(), offset, bytes, depth: 0.5 }
}

fn fill(vacancy: Vacancy, id: u8) {
    let len = vacancy.tensor().len();
    let content = content(id, len);
    for mut part in vacancy.into_parts(3000) {
        let at = part.index() * 3000;
        part.stage(at).unwrap();
        let bytes = part.bytes_mut().unwrap();
        bytes.copy_from_slice(&content[at..at + bytes.len()]);
        part.finish(Ok(()));
    }
}

fn fill_block(block: &mut Extent, value: u8) {
    block.write(0, &vec![value; block.len()]).unwrap();
}

fn block_is(block: &Extent, value: u8) -> bool {
    block.to_vec().unwrap().iter().all(|&byte| byte == value)
}

fn short(refusal: Refusal) -> Shortage {
    match refusal {
        Refusal::Short(shortage) => shortage,
        Refusal::Device(error) => panic!("{error}"),
    }
}

impl World {
    fn new(pages: usize) -> World {
        World::on(Backend::Paged, pages)
    }

    fn on(backend: Backend, pages: usize) -> World {
        World::over(backend, stand_in::memory_under_test(pages * PAGE, PAGE))
    }

    fn over(backend: Backend, memory: Arc<Memory>) -> World {
        World { pool: Pool::new(memory, backend).unwrap(), now: 0.0 }
    }

    fn model(&mut self, entries: &[CatalogueEntry]) -> Vec<TensorKey> {
        self.pool.catalogue(entries, |_| 1 << 20).unwrap()
    }

    fn activate(&mut self, keys: &[TensorKey]) -> Result<Activation, Shortage> {
        self.now += 1.0;
        self.pool.activate(keys, &[], self.now).map_err(short)
    }

    /// Activates and fills what is missing; gives the ids that had to be loaded.
    fn load(&mut self, keys: &[TensorKey]) -> (Lease, Vec<u8>) {
        let activation = self.activate(keys).unwrap();
        let mut loaded = Vec::new();
        for vacancy in activation.missing {
            let id = self.pool.slot(vacancy.tensor().key()).unwrap().id.0[0];
            fill(vacancy, id);
            loaded.push(id);
        }
        (activation.lease, loaded)
    }

    fn check(&self, lease: &Lease) {
        for tensor in lease.tensors() {
            let id = self.pool.slot(tensor.key()).unwrap().id.0[0];
            assert_eq!(
                tensor.extent().unwrap().to_vec().unwrap(),
                content(id, tensor.len()),
                "bytes of tensor {id}"
            );
        }
    }
}

#[test]
fn all_of_this_holds_on_a_stand_in_too() {
    stand_in::run_suite_again(&[]);
}

#[test]
fn resident_bytes_are_never_loaded_again_whoever_brought_them() {
    let mut world = World::new(16);
    let first = world.model(&[entry(1, "a", 0, 5000), entry(2, "a", 5120, 100), entry(3, "a", 5376, 9000)]);
    // A fine-tune: only tensor 4 is its own, the others are referenced in the first model's file.
    let second = world.model(&[entry(1, "a", 0, 5000), entry(4, "b", 0, 100), entry(3, "a", 5376, 9000)]);
    let (lease, loaded) = world.load(&first);
    assert_eq!(loaded, [1, 2, 3]);
    world.pool.release(lease);
    let (lease, loaded) = world.load(&second);
    assert_eq!(loaded, [4]);
    world.check(&lease);
    let again = world.activate(&second).unwrap();
    assert_eq!((again.bytes_loaded, again.bytes_reused), (0, 14_100));
}

/// More parts than a GPU has buffers, several of them handed over before the first has arrived.
#[test]
fn parts_can_be_handed_over_without_waiting_for_them() {
    const LEN: usize = 10 * 3000 + 17;
    let mut world = World::new(16);
    let keys = world.model(&[entry(1, "a", 4096 + 300, LEN)]);
    let activation = world.activate(&keys).unwrap();
    let (content, tensor) = (content(1, LEN), activation.lease.tensors()[0].clone());
    let (sender, settled) = std::sync::mpsc::channel();
    let parts = activation.missing.into_iter().next().unwrap().into_parts(3000);
    let address = parts[0].address().unwrap();
    for mut part in parts {
        let at = part.index() * 3000;
        assert_eq!((part.address(), part.len()), (Some(address + at), 3000.min(LEN - at)));
        part.stage(300 + at).unwrap();
        part.unstage();
        part.stage(300 + at).unwrap();
        assert!(part.try_stage(0).unwrap(), "a staged part stays staged");
        let bytes = part.bytes_mut().unwrap();
        assert_eq!(bytes.as_ptr() as usize % 4096, (300 + at) % 4096, "as it lies in the file");
        bytes.copy_from_slice(&content[at..at + bytes.len()]);
        let sender = sender.clone();
        part.finish_then(Ok(()), move |whole| sender.send(whole).unwrap());
    }
    drop(sender);
    let answers: Vec<bool> = settled.iter().collect();
    assert_eq!(answers.len(), 11);
    assert_eq!(answers.iter().filter(|&&whole| whole).count(), 1, "one part is the last");
    assert!(tensor.extent().unwrap().to_vec().unwrap() == content);
}

/// A GPU that an error has ended: loads fail with the reason, requests are refused for good, and when the pool is gone
/// another on the same GPU serves the same tensors.
#[test]
fn a_pool_on_a_lost_gpu_says_so_and_can_be_made_anew() {
    const ECC_UNCORRECTABLE: i32 = 214;
    let options = stand_in::Options { memory_bytes: 9 * PAGE, granularity: PAGE, ..Default::default() };
    let (gpu, device) = stand_in::open(options, 8 * PAGE, PAGE);
    let mut world = World::over(Backend::Paged, device.unwrap().into_memory());
    let entries = [entry(1, "a", 0, 2 * PAGE), entry(2, "a", 2 * PAGE, 2 * PAGE)];
    let keys = world.model(&entries);
    let (kept, _) = world.load(&keys[..1]);
    let kv = world.pool.add_kv(Hash([1; 32]), PAGE).unwrap();
    let block = world.pool.take_kv(kv, 1).unwrap();
    let activation = world.activate(&keys[1..]).unwrap();
    gpu.fail("execution", 1, ECC_UNCORRECTABLE);
    for mut part in activation.missing.into_iter().flat_map(|vacancy| vacancy.into_parts(1 << 20)) {
        part.stage(0).unwrap();
        assert!(part.finish(Ok(())), "the only part");
    }
    let Some(LoadFailure::Failed(reason)) = activation.lease.tensors()[0].failure() else {
        panic!("must fail")
    };
    assert!(reason.contains("ECC_UNCORRECTABLE") && reason.contains("lost"), "{reason}");
    assert!(world.pool.memory().lost().is_some());
    world.pool.release(activation.lease);
    assert!(matches!(
        world.pool.activate(&keys[1..], &[], 9.0),
        Err(Refusal::Device(DeviceError::Lost { .. }))
    ));
    assert!(matches!(world.pool.take_kv(kv, 1), Err(Refusal::Device(DeviceError::Lost { .. }))));
    world.pool.give_kv(kv, block);
    drop((world, kept));
    assert_eq!(gpu.left(), stand_in::Left::default(), "the last lease was all that held it");
    let config = stand_in::config(&gpu, 8 * PAGE, PAGE);
    let device = tangram_device::cuda::CudaDevice::open(&stand_in::driver(), &config).unwrap();
    let mut world = World::over(Backend::Paged, device.into_memory());
    let keys = world.model(&entries);
    let (lease, loaded) = world.load(&keys);
    assert_eq!(loaded, [1, 2]);
    world.check(&lease);
}

#[test]
fn contents_that_get_their_own_identity_stay_where_they_are() {
    let mut world = World::new(16);
    let there = world.model(&[entry(1, "a", 0, 5000)]);
    // Three tensors under identities that stand for their own: two turn out to be equal, one is there already.
    let arriving =
        world.model(&[entry(101, "b", 0, 5000), entry(102, "b", 5120, 900), entry(103, "b", 6144, 900)]);
    let (lease, loaded) = world.load(&arriving);
    assert_eq!(loaded, [101, 102, 103]);
    let hash = |id: u8| Hash([id; 32]);
    world.pool.identify(&[(hash(101), hash(1)), (hash(102), hash(2)), (hash(103), hash(2))]);
    let arrived = world.model(&[entry(1, "a", 0, 5000), entry(2, "b", 5120, 900)]);
    assert_eq!(arrived, [there[0], arriving[1]]);
    // Who leased them before goes on, and what has no own identity goes with the model that brought it.
    assert_eq!(lease.tensors()[2].extent().unwrap().to_vec().unwrap(), content(103, 900));
    world.pool.release(lease);
    world.pool.forget(&arriving);
    assert_eq!(world.pool.stats().resident_bytes, 900);
    let activation = world.activate(&arrived).unwrap();
    assert_eq!((activation.bytes_loaded, activation.bytes_reused), (5000, 900));
    assert_eq!(activation.lease.tensors()[1].extent().unwrap().to_vec().unwrap(), content(102, 900));
}

#[test]
fn a_vacancy_that_nobody_wants_or_that_cannot_be_filled_gives_its_room_back() {
    let mut world = World::new(4);
    let keys = world.model(&[entry(1, "a", 0, 3 * PAGE)]);
    let mut activation = world.activate(&keys).unwrap();
    let vacancy = activation.missing.remove(0);
    assert!(!vacancy.is_unwanted());
    world.pool.release(activation.lease);
    assert!(vacancy.is_unwanted());
    vacancy.fail(LoadFailure::Abandoned);
    let mut activation = world.activate(&keys).unwrap();
    activation.missing.remove(0).fail(LoadFailure::Failed("gone".to_owned()));
    assert_eq!(activation.lease.tensors()[0].failure(), Some(&LoadFailure::Failed("gone".to_owned())));
    world.pool.release(activation.lease);
    let (lease, loaded) = world.load(&keys);
    assert_eq!(loaded, [1]);
    world.check(&lease);
}

#[test]
fn addresses_are_stable_across_eviction() {
    let mut world = World::new(4);
    let a = world.model(&[entry(1, "a", 0, 3 * PAGE)]);
    let b = world.model(&[entry(2, "b", 0, 3 * PAGE)]);
    let (lease, _) = world.load(&a);
    let address = lease.tensors()[0].extent().unwrap().address();
    world.pool.release(lease);
    let (lease, _) = world.load(&b);
    assert_eq!(world.pool.stats().evicted_total, 3 * PAGE as u64);
    world.pool.release(lease);
    let (lease, loaded) = world.load(&a);
    assert_eq!(loaded, [1]);
    assert_eq!(lease.tensors()[0].extent().unwrap().address(), address);
    world.check(&lease);
}

#[test]
fn a_hit_is_not_evicted_to_make_room_for_the_misses_of_the_same_model() {
    let mut world = World::new(4);
    let shared = entry(1, "a", 0, 2 * PAGE);
    let a = world.model(std::slice::from_ref(&shared));
    let b = world.model(&[shared, entry(2, "b", 0, 3 * PAGE)]);
    let (lease, _) = world.load(&a);
    world.pool.release(lease);
    let shortage = world.activate(&b).unwrap_err();
    assert_eq!(shortage, Shortage { needed: 3 * PAGE as u64, available: 2 * PAGE as u64 });
    assert_eq!(world.pool.stats().evicted_total, 0, "a plan that cannot work evicts nothing");
    assert_eq!(world.pool.resident_bytes(&a), 2 * PAGE as u64);
}

#[test]
fn kv_pushes_out_idle_weights_but_never_leased_ones_and_weights_never_push_out_kv() {
    let mut world = World::new(4);
    let a = world.model(&[entry(1, "a", 0, 2 * PAGE)]);
    let b = world.model(&[entry(2, "b", 0, 2 * PAGE)]);
    let kv = world.pool.add_kv(Hash([1; 32]), PAGE).unwrap();
    let (lease_a, _) = world.load(&a);
    let (lease_b, _) = world.load(&b);
    assert!(world.pool.take_kv(kv, 1).is_err(), "everything is leased");
    world.pool.release(lease_b);
    let mut blocks = world.pool.take_kv(kv, 1).unwrap();
    assert_eq!(world.pool.resident_bytes(&b), 0);
    fill_block(&mut blocks[0], 7);
    assert!(world.activate(&b).is_err(), "one page is free, two are needed, and KV in use is not evictable");
    assert!(block_is(&blocks[0], 7));
    world.check(&lease_a);
    world.pool.give_kv(kv, blocks);
    assert_eq!(world.pool.stats().kv_bytes, 0);
    assert!(world.activate(&b).is_ok());
}

#[test]
fn a_load_in_flight_is_joined_and_one_that_nobody_wants_is_given_up() {
    let mut world = World::new(8);
    let a = world.model(&[entry(1, "a", 0, 8000)]);
    let first = world.activate(&a).unwrap();
    let second = world.activate(&a).unwrap();
    assert!(second.missing.is_empty(), "the second request joins");
    world.pool.release(first.lease);
    let mut parts = first.missing.into_iter().next().unwrap().into_parts(3000);
    assert!(!parts[0].is_unwanted(), "the second request still waits");
    world.pool.release(second.lease);
    assert!(parts.iter().all(Part::is_unwanted));
    // A new request must not join what was given up.
    let third = world.activate(&a);
    assert_eq!(third.unwrap_err().needed, 0, "its room is not free before the loader lets go");
    for part in parts.drain(..) {
        part.finish(Err(LoadFailure::Abandoned));
    }
    let (lease, loaded) = world.load(&a);
    assert_eq!(loaded, [1]);
    world.check(&lease);
}

#[test]
fn a_failed_load_leaves_nothing_behind() {
    let mut world = World::new(8);
    let a = world.model(&[entry(1, "a", 0, 8000)]);
    let activation = world.activate(&a).unwrap();
    let vacancy = activation.missing.into_iter().next().unwrap();
    let mut parts = vacancy.into_parts(3000);
    parts.pop().unwrap().finish(Err(LoadFailure::Failed("bad hash".to_owned())));
    drop(parts);
    let tensor = &activation.lease.tensors()[0];
    assert_eq!(tensor.failure(), Some(&LoadFailure::Failed("bad hash".to_owned())));
    assert!(tensor.extent().is_none());
    world.pool.release(activation.lease);
    assert_eq!(world.pool.memory().free_pages(), 8);
    assert_eq!(world.pool.stats().resident_bytes, 0);
}

/// Many small idle tensors, each on a page of its own, are few bytes but many pages: evicting them makes room.
#[test]
fn scattered_small_tensors_do_not_block_a_large_model() {
    let mut world = World::new(8);
    let small = world.model(&(0..8).map(|i| entry(i, "a", i as usize * 2 * PAGE, 100)).collect::<Vec<_>>());
    let large = world.model(&[entry(9, "b", 0, 8 * PAGE)]);
    let (lease, _) = world.load(&small);
    world.pool.release(lease);
    let (lease, loaded) = world.load(&large);
    assert_eq!(loaded, [9]);
    world.check(&lease);
}

#[test]
fn forgetting_a_model_frees_what_only_it_had() {
    let mut world = World::new(8);
    let shared = entry(1, "a", 0, PAGE);
    let a = world.model(&[shared.clone(), entry(2, "a", PAGE, PAGE)]);
    let b = world.model(&[shared]);
    let (lease, _) = world.load(&a);
    world.pool.release(lease);
    world.pool.forget(&a);
    assert_eq!(world.pool.memory().free_pages(), 7);
    let (lease, loaded) = world.load(&b);
    assert!(loaded.is_empty());
    world.pool.release(lease);
    world.pool.forget(&b);
    assert_eq!(world.pool.memory().free_pages(), 8);
    assert!(world.pool.by_id.is_empty());
    assert!(matches!(&world.pool.room, Room::Paged(paged) if paged.is_empty()));
}

/// Blocks smaller than a page: every page holds one in use, so no page can be had, but a cached one makes room.
#[test]
fn a_cached_block_makes_room_for_one_of_its_model_even_where_it_frees_no_page() {
    let mut world = World::new(2);
    let kv = world.pool.add_kv(Hash([1; 32]), PAGE / 2).unwrap();
    let mut blocks: Vec<Extent> = world.pool.take_kv(kv, 4).unwrap();
    for (hash, index) in [(1, 2), (2, 0)] {
        let mut block = blocks.remove(index);
        fill_block(&mut block, 0x5e);
        let mut prefix = crate::Prefix::default();
        world.pool.publish(kv, &mut prefix, [hash; 32], block, 0.01 * f64::from(hash), 0.0);
        world.pool.release_prefix(prefix);
    }
    assert!(!world.pool.has_room(&[KvReserve { kv, blocks: 1 }]));
    for left in [1, 0] {
        let block = world.pool.take_kv(kv, 1).unwrap().pop().unwrap();
        assert!(block_is(&block, 0), "leftovers in a block");
        blocks.push(block);
        assert_eq!(world.pool.stats().kv_cached_bytes, left * PAGE as u64 / 2);
        let prefix = world.pool.lease_prefix(kv, &[[2; 32]], 0.01, 1.0);
        assert_eq!(prefix.len(), left as usize, "the one that is worth less goes first");
        world.pool.release_prefix(prefix);
    }
    assert!(world.pool.take_kv(kv, 1).is_err());
    world.pool.give_kv(kv, blocks);
    assert_eq!(world.pool.memory().free_pages(), 2);
}

/// The one page of the idle tensor is shared with the tensor that is asked for, so evicting it would gain nothing.
#[test]
fn a_page_that_is_shared_with_an_idle_neighbour_is_not_counted_as_room() {
    let mut world = World::new(2);
    let idle = world.model(&[entry(1, "a", 0, 100)]);
    let large = world.model(&[entry(2, "a", 256, 3 * PAGE - 256)]);
    let (lease, _) = world.load(&idle);
    world.pool.release(lease);
    assert_eq!(
        world.activate(&large).unwrap_err(),
        Shortage { needed: 2 * PAGE as u64, available: PAGE as u64 }
    );
    assert_eq!(world.pool.resident_bytes(&idle), 100, "a plan that cannot work evicts nothing");
}

#[test]
fn a_request_that_is_refused_is_no_demand() {
    let mut world = World::new(8);
    let first = world.model(&[entry(1, "a", 0, 100)]);
    let both = world.model(&[entry(1, "a", 0, 100), entry(2, "b", 0, 100)]);
    let (lease, _) = world.load(&first);
    world.pool.release(lease);
    let activation = world.activate(&both).unwrap();
    let vacancy = activation.missing.into_iter().next().unwrap();
    world.pool.release(activation.lease);
    let parts = vacancy.into_parts(100);
    assert!(parts[0].is_unwanted());
    world.pool.record_events();
    assert_eq!(world.activate(&both).unwrap_err().needed, 0);
    assert_eq!(world.pool.events(), [], "an attempt that the loader holds up counts as demand");
}

#[test]
fn a_tensor_that_was_given_up_can_be_asked_for_again_even_if_its_loader_went_on() {
    let mut world = World::new(8);
    let a = world.model(&[entry(1, "a", 0, 100)]);
    let activation = world.activate(&a).unwrap();
    world.pool.release(activation.lease);
    for part in activation.missing.into_iter().flat_map(|vacancy| vacancy.into_parts(100)) {
        assert!(part.is_unwanted());
        part.finish(Ok(()));
    }
    let (lease, loaded) = world.load(&a);
    assert_eq!(loaded, [1]);
    world.check(&lease);
}

#[test]
fn room_that_is_dropped_fails_its_tensor() {
    let mut world = World::new(8);
    let a = world.model(&[entry(1, "a", 0, 100)]);
    let activation = world.activate(&a).unwrap();
    drop(activation.missing);
    assert!(activation.lease.tensors()[0].failure().is_some(), "its requests would wait for ever");
    world.pool.release(activation.lease);
    assert_eq!(world.pool.memory().free_pages(), 8);
    let (lease, _) = world.load(&a);
    world.check(&lease);
}

/// The many parts that were filled before another one failed take a while to be let go of.
#[test]
fn whoever_sees_a_failure_finds_the_room_free() {
    let mut world = World::new(256);
    let a = world.model(&[entry(1, "a", 0, 256 * PAGE)]);
    for _ in 0..20 {
        let activation = world.activate(&a).unwrap();
        let tensor = activation.lease.tensors()[0].clone();
        let mut parts = activation.missing.into_iter().next().unwrap().into_parts(PAGE);
        let last = parts.pop().unwrap();
        parts.into_iter().for_each(|part| assert!(!part.finish(Ok(()))));
        let loader = std::thread::spawn(move || last.finish(Err(LoadFailure::Failed("bad hash".to_owned()))));
        while tensor.failure().is_none() {
            std::hint::spin_loop();
        }
        assert_eq!(world.pool.memory().free_pages(), 256, "its room is still held");
        drop(tensor);
        world.pool.release(activation.lease);
        assert!(loader.join().unwrap());
    }
}

#[test]
fn a_model_whose_files_find_no_addresses_leaves_nothing_behind() {
    let mut world = World::new(8);
    let entries = [entry(1, "a", 0, 100), entry(2, "b", 0, 100)];
    let bytes = |name: &str| if name == "a" { PAGE as u64 } else { 1 << 60 };
    assert!(world.pool.catalogue(&entries, bytes).is_err());
    // "a" has another size by the time that it is deployed again.
    let a = world.model(&[entry(3, "a", 2 * PAGE, 100)]);
    let (lease, _) = world.load(&a);
    world.check(&lease);
}

/// Of three blocks' room one is in use and one cached: three blocks more are refused, and the cached one stays.
#[test]
fn a_take_that_is_refused_evicts_nothing() {
    for backend in [Backend::Paged, Backend::Segment] {
        let mut world = World::on(backend, 3);
        let kv = world.pool.add_kv(Hash([1; 32]), PAGE).unwrap();
        let mut blocks = world.pool.take_kv(kv, 2).unwrap();
        let mut prefix = crate::Prefix::default();
        world.pool.publish(kv, &mut prefix, [1; 32], blocks.pop().unwrap(), 0.01, 0.0);
        world.pool.release_prefix(prefix);
        let shortage = short(world.pool.take_kv(kv, 3).unwrap_err());
        assert_eq!(shortage, Shortage { needed: 3 * PAGE as u64, available: 2 * PAGE as u64 });
        assert_eq!(world.pool.stats().kv_cached_bytes, PAGE as u64, "{backend:?}");
        blocks.extend(world.pool.take_kv(kv, 2).unwrap());
        assert_eq!(world.pool.stats().kv_cached_bytes, 0);
        world.pool.give_kv(kv, blocks);
    }
}

/// Blocks of three eighths of a page: 0 and 1 lie in the first page, 2 in the first and the second, and so on. With 1 and 4
/// cached and the others in use, evicting both frees no page, and two more blocks but not three find room in their place.
#[test]
fn a_take_that_is_refused_evicts_none_of_its_own_cached_blocks() {
    let mut world = World::new(2);
    let kv = world.pool.add_kv(Hash([1; 32]), PAGE * 3 / 8).unwrap();
    let mut blocks: Vec<Extent> = world.pool.take_kv(kv, 5).unwrap();
    for index in [4, 1] {
        let mut prefix = crate::Prefix::default();
        let block = blocks.remove(index);
        world.pool.publish(kv, &mut prefix, [index as u8; 32], block, 0.01, 0.0);
        world.pool.release_prefix(prefix);
    }
    let cached = world.pool.stats().kv_cached_bytes;
    assert!(world.pool.take_kv(kv, 3).is_err());
    assert_eq!(world.pool.stats().kv_cached_bytes, cached, "refused, and so nothing was changed");
    assert_eq!(world.pool.lease_prefix(kv, &[[4; 32]], 0.0, 0.0).len(), 1);
    assert_eq!(world.pool.lease_prefix(kv, &[[1; 32]], 0.0, 0.0).len(), 1);
}

/// A model's range has addresses for what the device can hold and one block more. Cached blocks hold some of them.
#[test]
fn cached_blocks_make_room_for_their_model_where_only_addresses_are_short() {
    let mut world = World::new(3);
    let kv = world.pool.add_kv(Hash([1; 32]), PAGE).unwrap();
    for (hash, block) in (0..).zip(world.pool.take_kv(kv, 3).unwrap()) {
        let mut prefix = crate::Prefix::default();
        world.pool.publish(kv, &mut prefix, [hash; 32], block, 0.01, 0.0);
        world.pool.release_prefix(prefix);
    }
    let mut blocks = world.pool.take_kv(kv, 1).unwrap();
    blocks.extend(world.pool.take_kv(kv, 2).unwrap());
    assert_eq!(world.pool.stats().kv_cached_bytes, 0);
    world.pool.give_kv(kv, blocks);
}

/// A tensor that reaches beyond its file can never be placed: that is no want of room, for which a request would wait.
#[test]
fn what_the_device_refuses_is_told_from_a_shortage() {
    let mut world = World::new(8);
    let keys = world.pool.catalogue(&[entry(1, "a", 0, PAGE), entry(2, "a", PAGE, PAGE)], |_| 1).unwrap();
    let before = world.pool.stats();
    assert!(matches!(
        world.pool.activate(&keys, &[], 0.0).unwrap_err(),
        Refusal::Device(DeviceError::BadClaim { .. })
    ));
    assert_eq!(world.pool.stats(), before, "nothing is left behind");
    assert_eq!(world.pool.memory().free_pages(), 8);
    let (lease, _) = world.load(&keys[..1]);
    world.pool.activate(&keys, &[], 1.0).unwrap_err();
    world.check(&lease);
    world.pool.release(lease);
    world.pool.forget(&keys);
    assert_eq!(world.pool.stats().resident_bytes, 0);
}

/// A second name of a model shares its prefixes, but has measured nothing yet when it first finds one.
#[test]
fn a_prefix_keeps_its_worth_when_found_by_who_does_not_know_it() {
    let mut world = World::new(4);
    let kv = world.pool.add_kv(Hash([1; 32]), PAGE).unwrap();
    let block = world.pool.take_kv(kv, 1).unwrap().pop().unwrap();
    let mut prefix = crate::Prefix::default();
    world.pool.publish(kv, &mut prefix, [1; 32], block, 0.01, 0.0);
    let worth =
        |world: &World, prefix: &crate::Prefix| world.pool.retention.log2_worth(prefix.keys[0]).unwrap();
    let before = worth(&world, &prefix);
    let found = world.pool.lease_prefix(kv, &[[1; 32]], 0.0, 0.0);
    assert!(worth(&world, &found) >= before, "one use more, and no less saved");
    world.pool.release_prefix(prefix);
    world.pool.release_prefix(found);
}

fn candidates(retention: &Retention, sizes: &BTreeMap<TensorKey, u64>) -> impl Iterator<Item = Candidate> {
    retention.idle().map(|tensor| {
        let log2_worth = retention.log2_worth(tensor).unwrap();
        Candidate { tensor, bytes: sizes[&tensor], log2_worth }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Random activations, releases, KV blocks and removals over models that share tensors: every leased byte is
    /// right at every step, and the accounts and the page count agree with what is held.
    #[test]
    fn the_pool_keeps_every_leased_byte(
        sizes in proptest::collection::vec(1usize..3 * PAGE, 12),
        models in proptest::collection::vec(proptest::collection::btree_set(0usize..12, 1..6), 6),
        steps in proptest::collection::vec((0u8..11, any::<proptest::sample::Index>()), 1..120),
        backend in prop_oneof![Just(Backend::Paged), Just(Backend::Segment)],
    ) {
        let mut world = World::on(backend, 14);
        world.pool.record_events();
        let mut offset = 0;
        let entries: Vec<_> = sizes.iter().enumerate().map(|(i, &len)| {
            let entry = entry(i as u8, "a", offset, len);
            offset = (offset + len).next_multiple_of(256);
            entry
        }).collect();
        let keys: Vec<_> = models.iter().map(|model| {
            let entries: Vec<_> = model.iter().map(|&i| entries[i].clone()).collect();
            world.model(&entries)
        }).collect();
        let kv = world.pool.add_kv(Hash([1; 32]), 1500).unwrap();
        let mut leases: Vec<Lease> = Vec::new();
        let mut blocks: Vec<(Extent, u8)> = Vec::new();
        // Sequences that share prefixes: block `i` of any sequence holds the byte `i + 1`.
        let mut prefixes: Vec<crate::Prefix> = Vec::new();
        let hashes: Vec<crate::BlockHash> = (0..6).map(|i| [i; 32]).collect();
        for (step, (action, index)) in steps.into_iter().enumerate() {
            match action {
                0..=2 => if let Ok(activation) = world.activate(&keys[index.index(keys.len())]) {
                    for vacancy in activation.missing {
                        let id = world.pool.slot(vacancy.tensor().key()).unwrap().id.0[0];
                        fill(vacancy, id);
                    }
                    leases.push(activation.lease);
                },
                3 if !leases.is_empty() => {
                    let lease = leases.swap_remove(index.index(leases.len()));
                    world.pool.release(lease);
                }
                4 => for mut block in world.pool.take_kv(kv, 1 + index.index(3)).unwrap_or_default() {
                    prop_assert!(block_is(&block, 0));
                    fill_block(&mut block, step as u8);
                    blocks.push((block, step as u8));
                },
                5 if !blocks.is_empty() => {
                    let (block, _) = blocks.swap_remove(index.index(blocks.len()));
                    world.pool.give_kv(kv, vec![block]);
                }
                6 => {
                    let length = index.index(hashes.len()) + 1;
                    let mut prefix = world.pool.lease_prefix(kv, &hashes[..length], 0.01, world.now);
                    while prefix.len() < length && let Ok(mut taken) = world.pool.take_kv(kv, 1) {
                        let mut block = taken.pop().unwrap();
                        fill_block(&mut block, prefix.len() as u8 + 1);
                        let hash = hashes[prefix.len()];
                        world.pool.publish(kv, &mut prefix, hash, block, 0.01, world.now);
                    }
                    prefixes.push(prefix);
                }
                7 | 8 if !prefixes.is_empty() => {
                    let prefix = prefixes.swap_remove(index.index(prefixes.len()));
                    world.pool.release_prefix(prefix);
                }
                9 => {
                    let model = index.index(keys.len());
                    world.pool.expect(&keys[model], |models| (step % 7) as f64 - models as f64);
                }
                10 => if let Some(fetch) = world.pool.fetch(1 + index.index(4 * PAGE) as u64) {
                    for (i, vacancy) in fetch.missing.into_iter().enumerate() {
                        let id = world.pool.slot(vacancy.tensor().key()).unwrap().id.0[0];
                        // Some are let go of before they are there.
                        if (step + i) % 5 > 0 { fill(vacancy, id) }
                    }
                    world.pool.release(fetch.lease);
                },
                _ => {}
            }
            for prefix in &prefixes {
                for (i, block) in prefix.blocks().iter().enumerate() {
                    prop_assert!(block_is(block, i as u8 + 1));
                }
            }
            for lease in &leases {
                world.check(lease);
            }
            for (block, value) in &blocks {
                prop_assert!(block_is(block, *value));
            }
            let leased: BTreeMap<_, _> = leases.iter().flat_map(|lease| lease.tensors())
                .map(|tensor| (tensor.key(), tensor.len() as u64)).collect();
            prop_assert_eq!(world.pool.stats().leased_bytes, leased.values().sum::<u64>());
            let shared: BTreeMap<usize, &Arc<Extent>> = prefixes.iter().flat_map(|prefix| prefix.blocks())
                .map(|block| (block.offset(), block)).collect();
            prop_assert_eq!(world.pool.stats().kv_blocks, (blocks.len() + shared.len()) as u64);
            match &world.pool.room {
                Room::Segment(segment) => prop_assert!(segment.is_consistent()),
                Room::Paged(paged) => {
            // What the accounts promise is what evicting everything idle would free.
            let pinned: std::collections::BTreeSet<usize> = leases.iter().flat_map(|lease| lease.tensors())
                .flat_map(|tensor| {
                    let slot = world.pool.slot(tensor.key()).unwrap();
                    slot.offset / PAGE..(slot.offset + slot.bytes).div_ceil(PAGE)
                }).collect();
            let kv_pages: std::collections::BTreeSet<usize> = blocks.iter().map(|(block, _)| block)
                .chain(shared.values().map(|block| &***block))
                .flat_map(|block| block.offset() / PAGE..(block.offset() + block.len()).div_ceil(PAGE)).collect();
            prop_assert_eq!(paged.available_pages(), 14 - pinned.len() - kv_pages.len());
                }
            }
        }
        for lease in leases {
            world.pool.release(lease);
        }
        world.pool.give_kv(kv, blocks.into_iter().map(|(block, _)| block).collect());
        for prefix in prefixes {
            world.pool.release_prefix(prefix);
        }
        prop_assert_eq!(world.pool.stats().kv_blocks, 0);
        // The log alone leads a fresh policy to the same evictions.
        let mut replayed = Retention::new();
        let mut sizes: BTreeMap<TensorKey, u64> = BTreeMap::new();
        for logged in world.pool.events() {
            match logged {
                Logged::Learned(event) => {
                    if let Event::Catalogued { tensor, bytes, .. } = event {
                        sizes.insert(*tensor, *bytes);
                    }
                    replayed.apply(*event);
                }
                Logged::Asked { shortage, victims } => {
                    prop_assert_eq!(&eviction::choose(candidates(&replayed, &sizes), *shortage), victims);
                }
                Logged::AskedFor { tensor, shortage, victims } => {
                    let worth = replayed.log2_worth(*tensor).unwrap();
                    let chosen = tangram_policy::prefetch::room(candidates(&replayed, &sizes), *shortage, worth);
                    prop_assert_eq!(chosen.as_ref(), Some(victims));
                }
            }
        }
        for keys in &keys {
            world.pool.forget(keys);
        }
        world.pool.remove_kv(kv);
        match &world.pool.room {
            Room::Paged(_) => prop_assert_eq!(world.pool.memory().free_pages(), 14),
            Room::Segment(segment) => prop_assert!(segment.is_empty() && segment.is_consistent()),
        }
        prop_assert_eq!(world.pool.stats().resident_bytes, 0);
    }
}

/// The published prototype answers with the addresses from before it compacts (its fault B1); here what moved is found
/// where it is, with its bytes, and what is leased stays.
#[test]
fn a_hit_that_packing_moves_is_found_where_it_is() {
    let mut world = World::on(Backend::Segment, 8);
    let size = 2 * PAGE;
    let parts: Vec<_> = (0..4).map(|i| world.model(&[entry(i, "a", i as usize * size, size)])).collect();
    // Both: what is resident and small, and what needs two of the holes together.
    let both = world.model(&[entry(1, "a", size, size), entry(9, "b", 0, 2 * size)]);
    let leases: Vec<_> = parts.iter().map(|keys| world.load(keys).0).collect();
    let before = leases[1].tensors()[0].extent().unwrap().address();
    let mut leases = leases.into_iter();
    let (first, hit, third, last) =
        (leases.next().unwrap(), leases.next().unwrap(), leases.next().unwrap(), leases.next().unwrap());
    let last_address = last.tensors()[0].extent().unwrap().address();
    [first, hit, third].into_iter().for_each(|lease| world.pool.release(lease));
    let (lease, loaded) = world.load(&both);
    assert_eq!(loaded, [9]);
    world.check(&lease);
    assert!(world.pool.stats().moved_total > 0, "the hit lay between the holes");
    assert_ne!(lease.tensors()[0].extent().unwrap().address(), before);
    world.check(&last);
    assert_eq!(last.tensors()[0].extent().unwrap().address(), last_address, "what is leased is a wall");
}

#[test]
fn room_in_a_segment_is_counted_between_walls() {
    let mut world = World::on(Backend::Segment, 6);
    let keys: Vec<_> =
        (0..3).map(|i| world.model(&[entry(i, "a", i as usize * 2 * PAGE, 2 * PAGE)])).collect();
    let large = world.model(&[entry(7, "b", 0, 3 * PAGE)]);
    let kv = world.pool.add_kv(Hash([1; 32]), PAGE).unwrap();
    let leases: Vec<_> = keys.iter().map(|keys| world.load(keys).0).collect();
    let mut leases = leases.into_iter();
    let (first, middle, last) = (leases.next().unwrap(), leases.next().unwrap(), leases.next().unwrap());
    world.pool.release(first);
    world.pool.release(last);
    // Four pages would be free, but in two pieces on both sides of what is leased.
    let shortage = world.activate(&large).unwrap_err();
    assert!(shortage.available > shortage.needed, "{shortage:?}");
    assert_eq!(world.pool.stats().evicted_total, 0, "a plan that cannot work evicts nothing");
    assert!(world.pool.can_reserve(&[KvReserve { kv, blocks: 4 }]));
    assert!(!world.pool.can_reserve(&[KvReserve { kv, blocks: 5 }]));
    let blocks = world.pool.take_kv(kv, 4).unwrap();
    world.check(&middle);
    assert!(world.pool.take_kv(kv, 1).is_err());
    world.pool.give_kv(kv, blocks);
    world.pool.release(middle);
    let (lease, _) = world.load(&large);
    world.check(&lease);
}
