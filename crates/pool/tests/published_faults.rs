//! One test for each fault that was found in the published prototype (Tangram, arXiv 2512.01357, first generation) and
//! that concerns memory, loading or placing. B5, B14 and B15 concern the node and are in its tests of the same name.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::sync::mpsc;

use tangram_checkpoint::Hash;
use tangram_device::cuda::stand_in;
use tangram_device::{Contents, Extent, Memory};
use tangram_policy::admission::{Admission, Attempt, MAX_OVERTAKES};
use tangram_policy::packing::{self, Move, Packer, Strategy};
use tangram_policy::placement::{Candidate, Placement, place};
use tangram_policy::{TensorKey, eviction};
use tangram_pool::{Backend, CatalogueEntry, KvKey, KvReserve, Lease, Pool, Refusal, Shortage, Vacancy};

const PAGE: usize = 4096;

/// What does not depend on the layout is tested in both.
const BOTH: [Backend; 2] = [Backend::Paged, Backend::Segment];

fn pool(backend: Backend, pages: usize) -> Pool {
    Pool::new(stand_in::memory_under_test(pages * PAGE, PAGE), backend).unwrap()
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

fn take(pool: &mut Pool, kv: KvKey) -> Result<Extent, Shortage> {
    pool.take_kv(kv, 1).map(|mut blocks| blocks.pop().unwrap()).map_err(short)
}

/// The bytes that the tensor `id` must have.
fn content(id: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| id.wrapping_mul(29).wrapping_add((at / 3) as u8) | 1).collect()
}

fn entry(id: u8, checkpoint: &str, offset: usize, bytes: usize) -> CatalogueEntry {
    let (offset, bytes) = (offset as u64, bytes as u64);
    CatalogueEntry { id: Hash([id; 32]), checkpoint: checkpoint.to_owned(), offset, bytes, depth: 0.5 }
}

/// A deployed model: its keys and the ids of its tensors.
struct Model {
    keys: Vec<TensorKey>,
    ids: Vec<u8>,
}

fn deploy(pool: &mut Pool, entries: &[CatalogueEntry]) -> Model {
    let keys = pool.catalogue(entries, |_| 1 << 20).unwrap();
    Model { keys, ids: entries.iter().map(|entry| entry.id.0[0]).collect() }
}

fn fill(vacancy: Vacancy, id: u8) {
    let bytes = content(id, vacancy.tensor().len());
    for mut part in vacancy.into_parts(1000) {
        let from = part.index() * 1000;
        part.stage(from).unwrap();
        let room = part.bytes_mut().unwrap();
        room.copy_from_slice(&bytes[from..from + room.len()]);
        part.finish(Ok(()));
    }
}

/// Leases a model and brings in what is missing; gives the bytes that this took.
fn load(pool: &mut Pool, model: &Model, now: f64) -> Result<(Lease, u64), Shortage> {
    let activation = pool.activate(&model.keys, &[], now).map_err(short)?;
    for vacancy in activation.missing {
        let index = model.keys.iter().position(|&key| key == vacancy.tensor().key()).unwrap();
        fill(vacancy, model.ids[index]);
    }
    Ok((activation.lease, activation.bytes_loaded))
}

fn check(model: &Model, lease: &Lease) {
    for (tensor, &id) in lease.tensors().iter().zip(&model.ids) {
        assert!(tensor.extent().unwrap().to_vec().unwrap() == content(id, tensor.len()), "tensor {id}");
    }
}

fn addresses(lease: &Lease) -> Vec<usize> {
    lease.tensors().iter().map(|tensor| tensor.extent().unwrap().address()).collect()
}

fn resident(offset: u64, len: u64, movable: bool) -> packing::Extent {
    packing::Extent { offset, len, movable }
}

#[test]
fn all_of_this_holds_on_a_stand_in_too() {
    stand_in::run_suite_again(&[]);
}

/// B1: the addresses of tensors that were found resident were noted before compaction, which then moved just these.
/// Here what somebody holds is a wall, and nobody is told where a tensor is before it lies where it will stay.
#[test]
fn b01_no_address_is_stale_after_compaction() {
    let mut pool = pool(Backend::Segment, 12);
    let small = |id: u8| entry(id, "a", usize::from(id) * 2 * PAGE, 2 * PAGE);
    let parts: Vec<Model> = (0..6).map(|id| deploy(&mut pool, &[small(id)])).collect();
    let mut leases: Vec<Lease> = parts.iter().map(|part| load(&mut pool, part, 0.0).unwrap().0).collect();
    let old: Vec<usize> = leases.iter().map(|lease| addresses(lease)[0]).collect();
    // 5 stays in use. The others are idle; 0 and 2 go, so that there are holes before and behind 1.
    let held = leases.pop().unwrap();
    leases.into_iter().for_each(|lease| pool.release(lease));
    for gone in [0, 2] {
        pool.forget(&parts[gone].keys);
    }
    // The request finds 1, 3 and 4, and the hole that 6 needs is there only if 1 moves.
    let request = deploy(&mut pool, &[small(1), small(3), small(4), entry(6, "b", 0, 4 * PAGE)]);
    let (lease, loaded) = load(&mut pool, &request, 1.0).unwrap();
    assert_eq!(loaded, 4 * PAGE as u64);
    assert_eq!(pool.stats().moved_total, 2 * PAGE as u64, "the case is about compaction");
    check(&request, &lease);
    assert_ne!(addresses(&lease)[0], old[1], "and about a hit that moves");
    assert_eq!(addresses(&held)[0], old[5], "what is in use stays");
    check(&parts[5], &held);
}

/// B2: a shared tensor carried only its last loader's name, so it could be evicted in the very call that had counted
/// it as a hit. Here a hit is leased before anything is evicted.
#[test]
fn b02_a_shared_tensor_is_not_evicted_under_a_hit() {
    for backend in BOTH {
        let mut pool = pool(backend, 6);
        let shared = entry(1, "a", 0, 2 * PAGE);
        let first = deploy(&mut pool, &[shared.clone(), entry(2, "a", 2 * PAGE, 2 * PAGE)]);
        let second = deploy(&mut pool, &[shared, entry(3, "b", 0, 4 * PAGE)]);
        let (lease, _) = load(&mut pool, &first, 0.0).unwrap();
        pool.release(lease);
        // Room for tensor 3 is there only if tensor 2 goes, and tensor 1, which has as little worth, stays.
        let (lease, loaded) = load(&mut pool, &second, 1.0).unwrap();
        assert_eq!(loaded, 4 * PAGE as u64);
        check(&second, &lease);
        assert_eq!(pool.stats().evicted_total, 2 * PAGE as u64);
    }
}

/// B3: compaction and eviction knew nothing of running engines, and every load freed the KV of all others. Here leases
/// and KV blocks in use outlast any load, at their addresses, with their bytes.
#[test]
fn b03_loads_leave_running_models_alone() {
    for backend in BOTH {
        let mut pool = pool(backend, 12);
        let running = deploy(&mut pool, &[entry(1, "a", 0, 3 * PAGE - 100), entry(2, "a", 3 * PAGE, 200)]);
        let kv = pool.add_kv(Hash([1; 32]), PAGE + 300).unwrap();
        let others: Vec<Model> =
            (0..6).map(|i| deploy(&mut pool, &[entry(10 + i, &format!("b{i}"), 0, 5 * PAGE)])).collect();
        let (lease, _) = load(&mut pool, &running, 0.0).unwrap();
        let mut block = take(&mut pool, kv).unwrap();
        fill_block(&mut block, 0x77);
        let (before, block_address) = (addresses(&lease), block.address());
        for round in 0..30 {
            let other = &others[round % others.len()];
            let (other_lease, _) = load(&mut pool, other, round as f64).unwrap();
            check(other, &other_lease);
            pool.release(other_lease);
            check(&running, &lease);
            assert_eq!(addresses(&lease), before);
            assert_eq!(block.address(), block_address);
            assert!(block_is(&block, 0x77));
        }
        assert!(pool.stats().evicted_total > 0, "the case is about eviction");
    }
}

/// B4: the store answered nobody while it loaded. Here a load under way, however slow, holds up neither KV blocks nor
/// questions nor other models.
#[test]
fn b04_a_load_under_way_holds_nobody_up() {
    for backend in BOTH {
        let memory: Arc<Memory> = stand_in::memory_under_test(12 * PAGE, PAGE);
        let mut pool = Pool::new(memory.clone(), backend).unwrap();
        let slow = deploy(&mut pool, &[entry(1, "a", 0, 3 * PAGE)]);
        let quick = deploy(&mut pool, &[entry(2, "b", 0, 3 * PAGE)]);
        let kv = pool.add_kv(Hash([1; 32]), PAGE).unwrap();
        let activation = pool.activate(&slow.keys, &[], 0.0).unwrap();
        let vacancy = activation.missing.into_iter().next().unwrap();
        let (go, wait) = mpsc::channel::<()>();
        memory.streams()[0].submit(Box::new(move || {
            wait.recv().unwrap();
            fill(vacancy, 1);
        }));
        // All of this ends although the load does not.
        let block = take(&mut pool, kv).unwrap();
        assert_eq!(pool.resident_bytes(&slow.keys), 3 * PAGE as u64);
        let (lease, _) = load(&mut pool, &quick, 1.0).unwrap();
        check(&quick, &lease);
        pool.release(lease);
        pool.give_kv(kv, vec![block]);
        assert!(!activation.lease.tensors()[0].is_ready());
        go.send(()).unwrap();
        memory.streams()[0].record().wait();
        check(&slow, &activation.lease);
    }
}

/// B6: merged groups of tensors were shifted by the size of the current group instead of the sum of all before, and
/// merging changed their identity. Here groups have no part in where a tensor is (in pages: its offset in its file), and
/// each is shared and moved on its own.
#[test]
fn b06_every_tensor_of_many_is_bound_at_its_own_offset() {
    for backend in BOTH {
        let mut pool = pool(backend, 64);
        let sizes: Vec<usize> = (0..40).map(|i| 1 + (i * 997) % 6000).collect();
        let mut entries = Vec::new();
        let mut offset = 0usize;
        for (id, &size) in sizes.iter().enumerate() {
            offset = offset.next_multiple_of(256);
            entries.push(entry(id as u8, "a", offset, size));
            offset += size;
        }
        let all = deploy(&mut pool, &entries);
        let (lease, _) = load(&mut pool, &all, 0.0).unwrap();
        check(&all, &lease);
        if backend == Backend::Paged {
            let base = addresses(&lease)[0];
            for (entry, address) in entries.iter().zip(addresses(&lease)) {
                assert_eq!(address - base, entry.offset as usize);
            }
        }
        // Every second one in another order, in another model, is the same bytes.
        let some: Vec<CatalogueEntry> = entries.iter().rev().step_by(2).cloned().collect();
        let some = deploy(&mut pool, &some);
        let (other, loaded) = load(&mut pool, &some, 1.0).unwrap();
        assert_eq!(loaded, 0);
        check(&some, &other);
        pool.release(lease);
        pool.release(other);
        // What only the first had goes; then many slide together at once, each by the sum of the holes before it.
        pool.forget(&all.keys);
        let bytes = pool.free_bytes() as usize;
        let large = deploy(&mut pool, &[entry(99, "b", 0, bytes)]);
        let (lease, _) = load(&mut pool, &large, 2.0).unwrap();
        check(&large, &lease);
        let moves = pool.stats().moved_total > sizes.iter().sum::<usize>() as u64 / 4;
        assert_eq!(moves, backend == Backend::Segment);
        let (other, loaded) = load(&mut pool, &some, 3.0).unwrap();
        assert_eq!(loaded, 0, "{backend:?}");
        check(&some, &other);
    }
}

/// B7: asking what a model would have to load ended in undefined behaviour if nothing of it was there, and gave the
/// least over all devices without saying of which. Here what is not known has no bytes, and a placement names its
/// device.
#[test]
fn b07_what_is_missing_is_told_for_any_model_and_for_a_named_device() {
    let mut pool = pool(Backend::Paged, 4);
    let absent = deploy(&mut pool, &[entry(1, "a", 0, PAGE)]);
    assert_eq!(pool.resident_bytes(&absent.keys), 0);
    assert_eq!(pool.resident_bytes(&[]), 0);
    pool.forget(&absent.keys);
    assert_eq!(pool.resident_bytes(&absent.keys), 0, "of a model that is gone");
    assert_eq!(pool.resident_bytes(&[TensorKey(u32::MAX)]), 0, "of one that never was");
    let candidate =
        |device, stall| Candidate { device, wait: 0.0, stall, damage: 0.0, crowding: 0.0, fits: true };
    let placement = place(&[candidate(3, 0.5), candidate(7, 0.2)], 0);
    assert_eq!(placement, Placement::Start { device: 7, cost: 0.2 });
    assert_eq!(place(&[], 0), Placement::Never);
}

/// B8: the size of the pool was what happened to be free. Here it is what was asked for, in whole pages, all free.
#[test]
fn b08_the_pool_is_as_large_as_asked_for() {
    for backend in BOTH {
        // A second one beside it is no smaller.
        let memories = [(); 2].map(|()| stand_in::memory_under_test(10 * PAGE + 123, PAGE));
        let pools = memories.clone().map(|memory| Pool::new(memory, backend).unwrap());
        for (memory, pool) in memories.iter().zip(pools) {
            assert_eq!((memory.page_count(), memory.page_bytes()), (10, PAGE));
            assert_eq!(pool.free_bytes(), 10 * PAGE as u64);
        }
    }
}

/// B9: any KV block on the device made the eviction of weights fail. Here both live side by side and either can push
/// out the other's idle part.
#[test]
fn b09_weights_are_evicted_while_kv_is_in_use() {
    for backend in BOTH {
        let mut pool = pool(backend, 4);
        let first = deploy(&mut pool, &[entry(1, "a", 0, 2 * PAGE)]);
        let second = deploy(&mut pool, &[entry(2, "b", 0, 2 * PAGE)]);
        let kv = pool.add_kv(Hash([1; 32]), PAGE).unwrap();
        let block = take(&mut pool, kv).unwrap();
        let (lease, _) = load(&mut pool, &first, 0.0).unwrap();
        pool.release(lease);
        let (lease, _) = load(&mut pool, &second, 1.0).unwrap();
        assert_eq!(pool.resident_bytes(&first.keys), 0);
        pool.release(lease);
        let more = [take(&mut pool, kv).unwrap(), take(&mut pool, kv).unwrap()];
        assert_eq!(pool.resident_bytes(&second.keys), 0, "and KV pushes out weights");
        pool.give_kv(kv, more.into_iter().chain([block]).collect());
        assert_eq!(pool.free_bytes(), 4 * PAGE as u64);
    }
}

/// B10: loading without reuse freed the pool and made another one, so that all handles given out before died. Here the
/// pool is made once: nothing that is held changes its address or its bytes, whatever is asked for, even too much.
#[test]
fn b10_nothing_that_is_held_dies_with_a_load() {
    for backend in BOTH {
        let mut pool = pool(backend, 8);
        let held = deploy(&mut pool, &[entry(1, "a", 0, 3 * PAGE)]);
        let large = deploy(&mut pool, &[entry(2, "b", 0, 8 * PAGE)]);
        let (lease, _) = load(&mut pool, &held, 0.0).unwrap();
        let before = addresses(&lease);
        assert_eq!(
            load(&mut pool, &large, 1.0).err(),
            Some(Shortage { needed: 8 * PAGE as u64, available: 5 * PAGE as u64 })
        );
        assert_eq!(addresses(&lease), before);
        check(&held, &lease);
    }
}

/// B11: every copy was synchronous, and sliding a tensor over a small gap was cut into copies of the gap's size, 800
/// for 800 MB over 1 MB. Here a move is one copy however small the gap, no resident moves twice in a slide, and a load
/// is under way while the caller goes on.
#[test]
fn b11_a_slide_over_a_small_gap_is_one_copy_and_loads_are_asynchronous() {
    const MB: u64 = 1 << 20;
    // 1 MB free, 800 MB resident, 1 MB free: 2 MB are wanted.
    let residents = [resident(MB, 800 * MB, true)];
    for strategy in [Strategy::PartitionedGain, Strategy::Published, Strategy::MoveEverything] {
        let mut packer = Packer::new(802 * MB, 256);
        let packing = packer.pack(strategy, &residents, &[2 * MB]).unwrap();
        assert_eq!(packing.moves, [Move { from: MB, to: 0, len: 800 * MB }], "{strategy:?}");
    }
    // The same in a pool: what lies behind a hole of one page moves once, whole, and no more is counted.
    let mut pool = pool(Backend::Segment, 34);
    let [first, behind] = [(1, 1), (2, 30)].map(|(id, pages)| entry(id, "a", 0, pages * PAGE));
    let [first, behind] = [first, behind].map(|entry| deploy(&mut pool, &[entry]));
    for model in [&first, &behind] {
        let (lease, _) = load(&mut pool, model, 0.0).unwrap();
        pool.release(lease);
    }
    pool.forget(&first.keys);
    let wanted = deploy(&mut pool, &[entry(3, "b", 0, 4 * PAGE)]);
    let (lease, _) = load(&mut pool, &wanted, 1.0).unwrap();
    assert_eq!(pool.stats().moved_total, 30 * PAGE as u64);
    assert_eq!(pool.stats().evicted_total, PAGE as u64);
    check(&wanted, &lease);
    let (lease, loaded) = load(&mut pool, &behind, 2.0).unwrap();
    assert_eq!(loaded, 0);
    check(&behind, &lease);
    let memory: Arc<Memory> = stand_in::memory_under_test(4 * PAGE, PAGE);
    let (go, wait) = mpsc::channel::<()>();
    memory.streams()[0].submit(Box::new(move || wait.recv().unwrap()));
    let under_way = memory.streams()[0].record();
    // The other stream does not wait for the first, and the caller for neither.
    memory.streams()[1].submit(Box::new(|| {}));
    memory.streams()[1].record().wait();
    assert!(!under_way.is_complete());
    go.send(()).unwrap();
    under_way.wait();
}

/// B12: without memory the list of blocks came back empty and was indexed all the same, and one table of blocks served
/// several sequences. Here there is a block or an error with the numbers, and a block has one owner.
#[test]
fn b12_no_block_is_an_error_and_every_block_has_one_owner() {
    for backend in BOTH {
        let mut pool = pool(backend, 5);
        let kv = [1, 2].map(|identity| pool.add_kv(Hash([identity; 32]), PAGE / 2 + 100).unwrap());
        let mut sequences: [Vec<Extent>; 2] = Default::default();
        let shortage = 'full: loop {
            for (sequence, &kv) in sequences.iter_mut().zip(&kv) {
                match take(&mut pool, kv) {
                    Ok(block) => sequence.push(block),
                    Err(shortage) => break 'full shortage,
                }
            }
        };
        assert!(shortage.needed > shortage.available, "{shortage:?}");
        let mut spans: Vec<(usize, usize)> =
            sequences.iter().flatten().map(|block| (block.address(), block.len())).collect();
        assert!(spans.len() >= 6);
        spans.sort_unstable();
        assert!(spans.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0), "{spans:?}");
        for (tag, block) in sequences.iter_mut().flatten().enumerate() {
            fill_block(block, tag as u8 + 1);
        }
        for (tag, block) in sequences.iter().flatten().enumerate() {
            assert!(block_is(block, tag as u8 + 1));
        }
    }
}

/// B13: the scheduler knew a constant bandwidth and nothing of queues, eviction, KV or fairness, and polled. Here the
/// cost of a device has all of these in it, what does not fit is no candidate, and overtaking is bounded. (Nothing
/// polls: the engine loop waits on a channel, which needs no test of its own.)
#[test]
fn b13_placing_knows_queues_damage_and_room_and_starves_nobody() {
    let free = Candidate { device: 0, wait: 0.0, stall: 0.3, damage: 0.0, crowding: 0.0, fits: true };
    let cheaper_to_load = [
        ("but damages others more", Candidate { device: 1, stall: 0.1, damage: 0.5, ..free }),
        ("but has no room for the KV", Candidate { device: 1, stall: 0.0, fits: false, ..free }),
        ("but is busy for longer", Candidate { device: 1, stall: 0.0, wait: 0.5, ..free }),
    ];
    for (why, other) in cheaper_to_load {
        assert_eq!(place(&[free, other], 0), Placement::Start { device: 0, cost: 0.3 }, "{why}");
    }
    // Somebody who can never start is overtaken so often and no more.
    let mut queue = Admission::default();
    let mut started_behind = 0;
    for request in 0..10 * MAX_OVERTAKES {
        queue.push(request);
        queue.admit(|request| {
            if request == 0 {
                return Err(request);
            }
            started_behind += 1;
            Ok(Attempt::Started)
        });
    }
    assert!((1..=MAX_OVERTAKES).contains(&started_behind), "{started_behind} overtook");
}

/// B16: an allocation that came up short lost the blocks that it had taken, free regions smaller than a block were of
/// no use to KV, and eviction threw out more than was needed. Here too much is refused whole, scattered pages serve,
/// and no more goes than has to.
#[test]
fn b16_a_shortage_loses_nothing_scattered_pages_serve_and_no_more_goes_than_needed() {
    // All or nothing.
    let memory: Arc<Memory> = stand_in::memory_under_test(4 * PAGE, PAGE);
    let arena = tangram_device::Arena::reserve(memory.clone(), 16 * PAGE).unwrap();
    let claims = [0, 2, 4, 6, 8].map(|page| tangram_device::Claim { offset: page * PAGE, len: PAGE });
    assert!(arena.claim_all(&claims, Contents::Zeroed).is_err());
    assert_eq!(memory.free_pages(), 4);
    for backend in BOTH {
        let mut pool = pool(backend, 8);
        let small = pool.add_kv(Hash([1; 32]), PAGE).unwrap();
        let large = pool.add_kv(Hash([2; 32]), 3 * PAGE).unwrap();
        let mut blocks = pool.take_kv(small, 3).unwrap();
        let shortage = short(pool.take_kv(small, 6).unwrap_err());
        assert_eq!(shortage, Shortage { needed: 6 * PAGE as u64, available: 5 * PAGE as u64 });
        assert_eq!((pool.free_bytes(), pool.stats().kv_blocks), (5 * PAGE as u64, 3));
        // Every second page is free. In pages, a block of three finds room there; in a segment, blocks of one do.
        blocks.extend(pool.take_kv(small, 5).unwrap());
        let mut index = 0;
        let every_second = |_: &mut Extent| {
            index += 1;
            index % 2 == 0
        };
        let given: Vec<Extent> = blocks.extract_if(.., every_second).collect();
        assert_eq!(given.len(), 4);
        pool.give_kv(small, given);
        let (kv, blocks_each) = if backend == Backend::Paged { (large, 1) } else { (small, 4) };
        assert!(pool.has_room(&[KvReserve { kv, blocks: blocks_each }]));
        let scattered = pool.take_kv(kv, blocks_each).unwrap();
        pool.give_kv(kv, scattered);
        pool.give_kv(small, blocks);
        // One page is needed: of four idle tensors of two pages each, one goes.
        let tensors = (0..4).map(|i| entry(i, "a", usize::from(i) * 2 * PAGE, 2 * PAGE));
        let idle = deploy(&mut pool, &tensors.collect::<Vec<_>>());
        let (lease, _) = load(&mut pool, &idle, 0.0).unwrap();
        pool.release(lease);
        let _block = take(&mut pool, small).unwrap();
        assert_eq!(pool.stats().evicted_total, 2 * PAGE as u64);
    }
    // And of one large and several small ones, no more than covers the shortage.
    let candidate = |key, bytes| eviction::Candidate { tensor: TensorKey(key), bytes, log2_worth: 0.0 };
    let victims = eviction::choose([candidate(0, 10), candidate(1, 100), candidate(2, 10)].into_iter(), 100);
    assert_eq!(victims, [TensorKey(1)], "the small one before it is spared when the large one has to go");
}
