//! The CUDA device on the stand-in driver: what is set up, copied, refused, lost and opened anew.

use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;
use tangram_fake_cuda::{Delay, Left, Options, StandIn};

use super::*;
use crate::{Arena, Claim, Contents, Extent, Piece};

const PAGE: usize = 4096;
const OUT_OF_MEMORY: i32 = 2;
const ECC_UNCORRECTABLE: i32 = 214;
const LAUNCH_FAILED: i32 = 719;
/// Nothing here takes so long.
const PATIENCE: Duration = Duration::from_secs(30);

fn options(pages: usize) -> Options {
    // A page for moving, and one beside the pool.
    Options { memory_bytes: (pages + 2) * PAGE, granularity: PAGE, ..Options::default() }
}

fn device(pages: usize) -> (StandIn, Arc<Memory>) {
    let (stand_in, device) = stand_in::open(options(pages), pages * PAGE, PAGE);
    (stand_in, device.unwrap().into_memory())
}

fn bytes(extent: &Extent) -> Vec<u8> {
    let mut bytes = vec![0; extent.len()];
    extent.read(0, &mut bytes).unwrap();
    bytes
}

/// Uploads to one extent, and gives it back when the copy has ended.
fn upload(memory: &Arc<Memory>, extent: Extent, content: &[u8]) -> (Extent, Result<(), DeviceError>) {
    let mut buffer = memory.staging().unwrap().take().unwrap();
    buffer[..content.len()].copy_from_slice(content);
    let (sender, ended) = mpsc::channel();
    memory.upload(buffer, vec![Piece { from: 0, extent }], move |mut extents, result| {
        sender.send((extents.pop().unwrap(), result)).unwrap();
    });
    ended.recv_timeout(PATIENCE).unwrap()
}

#[test]
fn nothing_is_left_when_all_is_dropped() {
    let (stand_in, memory) = device(6);
    assert_eq!((memory.page_count(), memory.page_bytes(), memory.free_pages()), (6, PAGE, 6));
    assert!(memory.name().starts_with("cuda:"), "{}", memory.name());
    let arena = Arena::reserve(memory.clone(), 8 * PAGE).unwrap();
    let extents = [arena.claim(100, 2 * PAGE).unwrap(), arena.claim(5 * PAGE, 3 * PAGE).unwrap()];
    assert!(extents[0].host_bytes().is_none(), "the host cannot address a GPU's memory");
    assert_eq!(stand_in.left().mappings, 6 + 1, "the pages under the extents, and the scratch page");
    drop(extents);
    assert_eq!(stand_in.left().mappings, 1);
    drop((arena, memory));
    assert_eq!(stand_in.left(), Left::default());
    assert_eq!(stand_in.violations(), [""; 0]);
}

#[test]
fn uploads_bring_the_pieces_of_a_buffer_where_they_belong() {
    for delay in [Delay::Latest, Delay::Random(5), Delay::Random(6)] {
        let (stand_in, device) = stand_in::open(Options { delay, ..options(8) }, 8 * PAGE, PAGE);
        let memory = device.unwrap().into_memory();
        let arena = Arena::reserve(memory.clone(), 8 * PAGE).unwrap();
        let claims =
            [(0, 700), (PAGE, 3 * PAGE), (5 * PAGE + 1, 1)].map(|(offset, len)| Claim { offset, len });
        let (sender, ended) = mpsc::channel();
        // More rounds than there are buffers, so that they go round.
        for round in 0..10u8 {
            let extents = arena.claim_all(&claims, Contents::Overwritten).unwrap();
            let mut buffer = memory.staging().unwrap().take().unwrap();
            let (mut pieces, mut from) = (Vec::new(), 9);
            for (number, extent) in (1..).zip(extents) {
                buffer[from..from + extent.len()].fill(round * 10 + number);
                let len = extent.len();
                pieces.push(Piece { from, extent });
                from += len + 3;
            }
            let sender = sender.clone();
            memory.upload(buffer, pieces, move |extents, result| sender.send((extents, result)).unwrap());
            let (extents, result) = ended.recv_timeout(PATIENCE).unwrap();
            result.unwrap();
            for (number, extent) in (1..).zip(&extents) {
                assert!(bytes(extent).iter().all(|&byte| byte == round * 10 + number));
            }
        }
        drop((arena, memory));
        assert_eq!((stand_in.left(), stand_in.violations()), (Left::default(), Vec::new()));
    }
}

/// The first piece is on its way when the second is refused: neither buffer nor extents may go before it has arrived.
#[test]
fn an_upload_that_is_refused_half_way_ends_before_it_is_reported() {
    let (stand_in, memory) = device(4);
    let arena = Arena::reserve(memory.clone(), 4 * PAGE).unwrap();
    let claims = [0, 2 * PAGE].map(|offset| Claim { offset, len: PAGE });
    let extents = arena.claim_all(&claims, Contents::Overwritten).unwrap();
    let pieces = extents.into_iter().map(|extent| Piece { from: 0, extent }).collect();
    let buffer = memory.staging().unwrap().take().unwrap();
    stand_in.fail("cuMemcpyHtoDAsync_v2", 2, 1);
    let (sender, ended) = mpsc::channel();
    memory.upload(buffer, pieces, move |extents, result| {
        drop(extents);
        sender.send(result).unwrap();
    });
    assert!(matches!(ended.recv_timeout(PATIENCE).unwrap(), Err(DeviceError::Cuda { .. })));
    assert_eq!((memory.free_pages(), stand_in.violations()), (4, Vec::new()));
    assert!(memory.lost().is_none());
}

#[test]
fn the_ring_bounds_what_is_taken() {
    let (_stand_in, memory) = device(4);
    let staging = memory.staging().unwrap();
    assert!(staging.buffer_bytes() >= 2 << 20);
    let mut held: Vec<Pinned> = (0..3).map(|_| staging.take().unwrap()).collect();
    assert!(held.iter().all(|buffer| (buffer.as_ptr() as usize).is_multiple_of(ALIGNMENT)));
    assert!(staging.try_take().unwrap().is_none());
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| staging.take().unwrap().len());
        held.pop();
        assert_eq!(waiting.join().unwrap(), staging.buffer_bytes());
    });
    assert!(staging.try_take().unwrap().is_some());
}

#[test]
fn an_exported_page_is_the_page() {
    let (_stand_in, device) = stand_in::open(options(2), 2 * PAGE, PAGE);
    let device = device.unwrap();
    let pages = [0, 1].map(|page| std::fs::File::from(device.export_page(page).unwrap()));
    assert!(device.export_page(2).is_err());
    let memory = device.into_memory();
    let arena = Arena::reserve(memory, 2 * PAGE).unwrap();
    let mut extent = arena.claim(0, 2 * PAGE).unwrap();
    extent.write(PAGE, b"here").unwrap();
    let mut read = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&pages[1], &mut read, 0).unwrap();
    assert_eq!(&read, b"here");
}

#[test]
fn what_cannot_be_had_is_refused_with_a_reason_and_leaves_nothing() {
    let stand_in = StandIn::new(options(8));
    let config = stand_in::config(&stand_in, 4 * PAGE, PAGE);
    let open =
        |config: CudaConfig| CudaDevice::open(&stand_in::driver(), &config).map(CudaDevice::into_memory);
    let refused = |config| match open(config) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("it must be refused"),
    };
    let text = refused(CudaConfig { ordinal: 1 << 20, ..config });
    assert!(text.contains("no GPU 1048576"), "{text}");
    for page_bytes in [3 * PAGE, PAGE / 2, 64 * PAGE] {
        let text = refused(CudaConfig { page_bytes: Some(page_bytes), ..config });
        assert!(text.contains(&format!("a page of {page_bytes} bytes")), "{text}");
    }
    // 10 pages are free, and one is needed for moving.
    let text = refused(CudaConfig { pool_bytes: Some(10 * PAGE), ..config });
    assert!(text.contains(&(10 * PAGE).to_string()), "{text}");
    assert!(open(CudaConfig { pool_bytes: Some(9 * PAGE), ..config }).is_ok());
    assert!(refused(CudaConfig { reserve_bytes: Some(6 * PAGE), ..config }).contains("left for others"));
    assert!(refused(CudaConfig { pool_bytes: Some(0), ..config }).contains("does not fit"));
    // Another process has most of it.
    stand_in.occupy(6 * PAGE);
    assert!(matches!(open(config), Err(DeviceError::TooLarge { free, .. }) if free == 4 * PAGE));
    let all = open(CudaConfig { pool_bytes: None, ..config }).unwrap();
    assert_eq!(all.page_count(), 3);
    drop(all);
    stand_in.occupy(0);
    // Another process takes it between the question and the taking.
    stand_in.fail("cuMemCreate", 4, OUT_OF_MEMORY);
    assert!(matches!(open(config), Err(DeviceError::TooLarge { .. })));
    assert_eq!((stand_in.left(), stand_in.violations()), (Left::default(), Vec::new()));
}

#[test]
fn by_default_pages_grow_with_the_pool_and_something_is_left() {
    const GIB: usize = 1 << 30;
    let page = |pool: usize| default_page_bytes(pool, 2 << 20) >> 20;
    assert_eq!([GIB, 16 * GIB, 17 * GIB, 76 * GIB, 140 * GIB, 2000 * GIB].map(page), [2, 2, 4, 16, 32, 64]);
    assert_eq!([8 * GIB, 80 * GIB].map(default_reserve), [GIB, 2 * GIB + GIB / 2]);
}

#[test]
fn a_refused_mapping_is_undone_and_can_be_tried_again() {
    for (call, nth) in [("cuMemMap", 1), ("cuMemMap", 3), ("cuMemSetAccess", 1)] {
        let (stand_in, memory) = device(4);
        let arena = Arena::reserve(memory.clone(), 4 * PAGE).unwrap();
        stand_in.fail(call, nth, OUT_OF_MEMORY);
        let error = arena.claim(0, 4 * PAGE).unwrap_err();
        assert!(matches!(error, DeviceError::Cuda { .. }), "{error}");
        assert!(error.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY"), "{error}");
        assert_eq!(memory.free_pages(), 4);
        let extent = arena.claim(0, 4 * PAGE).unwrap();
        assert!(bytes(&extent).iter().all(|&byte| byte == 0));
        drop((extent, arena, memory));
        assert_eq!((stand_in.left(), stand_in.violations()), (Left::default(), Vec::new()));
    }
}

#[test]
fn a_lost_gpu_says_so_everywhere_and_can_be_opened_anew() {
    let (stand_in, memory) = device(4);
    let arena = Arena::reserve(memory.clone(), 4 * PAGE).unwrap();
    let mut kept = arena.claim(0, PAGE).unwrap();
    let extent = arena.claim(PAGE, PAGE).unwrap();
    assert!(memory.lost().is_none());
    stand_in.fail("execution", 1, ECC_UNCORRECTABLE);
    let (extent, result) = upload(&memory, extent, &[1; PAGE]);
    let text = result.unwrap_err().to_string();
    assert!(text.contains("ECC_UNCORRECTABLE") && text.contains("lost"), "{text}");
    let calls = stand_in.calls();
    let is_lost = |result: Result<(), DeviceError>| matches!(result, Err(DeviceError::Lost { .. }));
    assert!(memory.lost().is_some());
    assert!(is_lost(kept.write(0, &[1])) && is_lost(kept.read(0, &mut [0])));
    assert!(is_lost(arena.claim(2 * PAGE, 1).map(drop)));
    assert!(is_lost(Arena::reserve(memory.clone(), PAGE).map(drop)));
    assert!(is_lost(memory.staging().unwrap().take().map(drop)));
    assert!(is_lost(memory.staging().unwrap().try_take().map(drop)));
    assert!(is_lost(upload_of_nothing(&memory)));
    drop((kept, extent));
    assert_eq!(stand_in.calls(), calls, "nothing asks a dead driver");
    drop((arena, memory));
    assert_eq!(stand_in.left(), Left::default());
    let config = stand_in::config(&stand_in, 4 * PAGE, PAGE);
    let memory = CudaDevice::open(&stand_in::driver(), &config).unwrap().into_memory();
    let arena = Arena::reserve(memory.clone(), 4 * PAGE).unwrap();
    let (extent, result) = upload(&memory, arena.claim(0, 4 * PAGE).unwrap(), &[7; 4 * PAGE]);
    result.unwrap();
    assert!(bytes(&extent).iter().all(|&byte| byte == 7));
}

/// On a lost device there is no buffer to be had, so not even this can be tried.
fn upload_of_nothing(memory: &Arc<Memory>) -> Result<(), DeviceError> {
    let buffer = memory.staging().map_or_else(|| panic!("a GPU has buffers"), Staging::take)?;
    memory.upload(buffer, Vec::new(), |_, _| {});
    Ok(())
}

#[test]
fn a_gpu_beside_a_lost_one_goes_on() {
    let ((first, lost), (_second, memory)) = (device(2), device(2));
    let arenas = [&lost, &memory].map(|memory| Arena::reserve(memory.clone(), 2 * PAGE).unwrap());
    let [mut one, mut other] = arenas.each_ref().map(|arena| arena.claim(0, PAGE).unwrap());
    other.write(0, &[5; PAGE]).unwrap();
    first.fail("cuStreamSynchronize", 1, LAUNCH_FAILED);
    assert!(one.write(0, &[1]).is_err() && lost.lost().is_some());
    assert!(bytes(&other) == [5; PAGE] && memory.lost().is_none());
    drop((one, lost));
    let (extent, result) = upload(&memory, arenas[1].claim(PAGE, PAGE).unwrap(), &[6; PAGE]);
    result.unwrap();
    assert!(bytes(&extent) == [6; PAGE]);
}

#[test]
fn who_waits_for_a_buffer_hears_of_the_loss() {
    let (stand_in, memory) = device(2);
    let arena = Arena::reserve(memory.clone(), PAGE).unwrap();
    let mut extent = arena.claim(0, PAGE).unwrap();
    let staging = memory.staging().unwrap();
    let held: Vec<Pinned> = (0..3).map(|_| staging.take().unwrap()).collect();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| staging.take().map(drop));
        stand_in.fail("cuStreamSynchronize", 1, LAUNCH_FAILED);
        assert!(extent.write(0, &[1]).is_err());
        drop(held);
        assert!(matches!(waiting.join().unwrap(), Err(DeviceError::Lost { .. })));
    });
}

/// Loads kernels, launches one, and takes a number through memory beside the pool.
fn run_a_kernel(gpu: &Arc<Gpu>) -> Result<(), DeviceError> {
    // SAFETY: the stand-in reads nothing of the image, kernels do nothing, and the allocation lives until it is freed.
    unsafe {
        let program = Program::load(gpu, b"\0")?;
        let kernel = program.kernel(c"some", 64 << 10)?;
        let grid = Grid { blocks: [3, 1, 1], threads: 128, shared_bytes: 64 << 10 };
        program.launch(kernel, grid, (&raw const grid).cast())?;
        let launched = Launched { kernel, grid, arguments: vec![0; 16] };
        let graph = program.graph(&[launched.clone(), launched])?;
        program.replay(&graph)?;
        program.wait()?;
        drop(graph);
        let working = program.allocate(100)?;
        let (mut read, copied) = ([0; 5], program.upload(working + 50, b"bytes"));
        let copied = copied.and_then(|()| program.download(working + 50, &mut read));
        program.free(working);
        copied?;
        assert_eq!(&read, b"bytes");
        program.wait()
    }
}

#[test]
fn a_kernel_that_cannot_be_launched_is_refused_and_one_that_fails_loses_the_gpu() {
    let (stand_in, device) = stand_in::open(options(2), PAGE, PAGE);
    let device = device.unwrap();
    let gpu = device.gpu().clone();
    run_a_kernel(&gpu).unwrap();
    let memory = device.into_memory();
    // SAFETY: as in `run_a_kernel`.
    let program = unsafe { Program::load(&gpu, b"\0") }.unwrap();
    assert_eq!(program.multiprocessors(), 4);
    assert!(matches!(program.kernel(c"large", 1 << 20), Err(DeviceError::Cuda { .. })));
    let kernel = program.kernel(c"small", 0).unwrap();
    let launch = |threads| {
        let grid = Grid { blocks: [1, 1, 1], threads, shared_bytes: 0 };
        // SAFETY: as above.
        unsafe { program.launch(kernel, grid, (&raw const grid).cast()) }
    };
    assert!(matches!(launch(2048), Err(DeviceError::Cuda { .. })));
    stand_in.fail("execution", 1, LAUNCH_FAILED);
    launch(32).unwrap();
    assert!(matches!(program.wait(), Err(DeviceError::Lost { .. })));
    let text = memory.lost().unwrap().to_string();
    assert!(text.contains("CUDA_ERROR_LAUNCH_FAILED"), "{text}");
    drop((memory, gpu));
    assert!(stand_in.left().contexts > 0, "the program still holds the GPU");
    drop(program);
    assert_eq!(stand_in.left(), Left::default());
}

#[test]
fn a_graph_does_all_that_it_was_made_of_each_time() {
    let (stand_in, device) = stand_in::open(options(2), PAGE, PAGE);
    let device = device.unwrap();
    // SAFETY: as in `run_a_kernel`.
    let program = unsafe { Program::load(device.gpu(), b"\0") }.unwrap();
    let kernel = program.kernel(c"some", 0).unwrap();
    let launched = |threads| {
        let grid = Grid { blocks: [1, 1, 1], threads, shared_bytes: 0 };
        Launched { kernel, grid, arguments: vec![0; 16] }
    };
    // SAFETY: as above.
    let make = |launches: &[Launched]| unsafe { program.graph(launches) };
    assert!(matches!(make(&[launched(32), launched(2048)]), Err(DeviceError::Cuda { .. })));
    assert_eq!(stand_in.left().graphs, 0);
    let graph = make(&[launched(32), launched(64), launched(32)]).unwrap();
    assert_eq!((graph.launches(), stand_in.left().graphs), (3, 1));
    // SAFETY: as above; the graph lives until it has been waited for.
    let replay = || unsafe { program.replay(&graph) }.and_then(|()| program.wait());
    replay().unwrap();
    replay().unwrap();
    // The third of the next three.
    stand_in.fail("execution", 3, LAUNCH_FAILED);
    assert!(matches!(replay(), Err(DeviceError::Lost { .. })));
    drop((graph, program, device));
    assert_eq!((stand_in.left(), stand_in.violations()), (Left::default(), Vec::new()));
}

#[test]
fn a_graph_that_goes_before_its_work_is_done_is_misuse() {
    let (stand_in, device) = stand_in::open(options(2), PAGE, PAGE);
    let device = device.unwrap();
    // SAFETY: as in `run_a_kernel`; the stand-in's kernels do nothing, whenever that is.
    unsafe {
        let program = Program::load(device.gpu(), b"\0").unwrap();
        let kernel = program.kernel(c"some", 0).unwrap();
        let grid = Grid { blocks: [1, 1, 1], threads: 32, shared_bytes: 0 };
        let graph = program.graph(&[Launched { kernel, grid, arguments: vec![0; 16] }]).unwrap();
        program.replay(&graph).unwrap();
        drop(graph);
    }
    assert_eq!(stand_in.violations().len(), 1);
    drop(device);
    assert_eq!(stand_in.left(), Left::default());
}

/// Everything that a device does, once.
fn everything(stand_in: &StandIn) -> Result<(), DeviceError> {
    let config = stand_in::config(stand_in, 6 * PAGE, PAGE);
    let device = CudaDevice::open(&stand_in::driver(), &config)?;
    run_a_kernel(device.gpu())?;
    let memory = device.into_memory();
    let segment = Arena::segment(memory.clone())?;
    let mut moved = segment.claim(0, PAGE + 5)?;
    moved.write(3, &[1, 2, 3])?;
    moved.move_to(PAGE / 2)?;
    drop((moved, segment));
    let arena = Arena::reserve(memory.clone(), 8 * PAGE)?;
    let claims = [Claim { offset: 10, len: PAGE }, Claim { offset: 4 * PAGE, len: 2 * PAGE }];
    let mut extents = arena.claim_all(&claims, Contents::Overwritten)?;
    let small = arena.claim(PAGE + 10, 100)?;
    if let Some(extent) = extents.pop() {
        let mut buffer = memory.staging().map_or_else(|| panic!("a GPU has buffers"), Staging::take)?;
        buffer[..2 * PAGE].fill(9);
        let (sender, ended) = mpsc::channel();
        memory.upload(buffer, vec![Piece { from: 0, extent }], move |extents, result| {
            drop(extents);
            let _ = sender.send(result);
        });
        ended.recv_timeout(PATIENCE).expect("every upload is reported")?;
    }
    let host = memory.host_pool().expect("a GPU has host memory beside it");
    host.grow(64 << 10)?;
    if let Some(kept) = host.take(PAGE) {
        let (sender, ended) = mpsc::channel();
        memory.upload_kept(Arc::new(kept), 0, arena.claim(7 * PAGE, PAGE)?, move |extent, result| {
            drop(extent);
            let _ = sender.send(result);
        });
        ended.recv_timeout(PATIENCE).expect("every upload is reported")?;
    }
    small.read(0, &mut [0; 100])
}

#[test]
fn whichever_call_fails_the_process_goes_on_and_the_gpu_can_be_opened_anew() {
    for code in [1, OUT_OF_MEMORY, LAUNCH_FAILED] {
        for delay in [Delay::Latest, Delay::Random(11)] {
            for nth in 1.. {
                let stand_in = StandIn::new(Options { delay, ..options(6) });
                stand_in.fail("*", nth, code);
                let result = everything(&stand_in);
                if stand_in.pending_faults() > 0 {
                    result.unwrap();
                    assert!(nth > 60, "{nth} calls are not everything");
                    break;
                }
                // Only the share in the context can be refused to go, and only by that very call.
                let left = stand_in.left();
                assert_eq!(
                    left,
                    Left { contexts: left.contexts, ..Left::default() },
                    "call {nth}, code {code}"
                );
                if code == LAUNCH_FAILED && left.contexts == 0 {
                    assert!(result.is_err() || nth > 60, "call {nth} failed and nobody was told");
                }
                let again = everything(&stand_in);
                assert!(again.is_ok() || left.contexts > 0, "call {nth}, code {code}: {again:?}");
            }
        }
    }
}

#[test]
fn work_that_fails_on_the_gpu_is_reported_by_whoever_waits_for_it() {
    for nth in 1.. {
        let stand_in = StandIn::new(options(6));
        stand_in.fail("execution", nth, LAUNCH_FAILED);
        let result = everything(&stand_in);
        if stand_in.pending_faults() > 0 {
            result.unwrap();
            assert!(nth > 5);
            break;
        }
        assert!(matches!(result, Err(DeviceError::Lost { .. })), "work {nth}: {result:?}");
        assert_eq!(stand_in.left(), Left::default());
        everything(&stand_in).unwrap();
    }
}

proptest! {
    /// Uploads from two threads at random moments into memory that is claimed and released meanwhile.
    #[test]
    fn uploads_side_by_side_never_mix(
        seed in any::<u64>(), sizes in proptest::collection::vec(1usize..3 * PAGE, 1..24)
    ) {
        let (stand_in, device) =
            stand_in::open(Options { delay: Delay::Random(seed), ..options(24) }, 24 * PAGE, PAGE);
        let memory = device.unwrap().into_memory();
        std::thread::scope(|scope| {
            for (thread, sizes) in (1u8..).zip(sizes.chunks(sizes.len().div_ceil(2))) {
                let memory = &memory;
                scope.spawn(move || {
                    let arena = Arena::reserve(memory.clone(), 4 * PAGE).unwrap();
                    for (round, &len) in (0u8..).zip(sizes) {
                        let extent =
                            arena.claim_all(&[Claim { offset: 50, len }], Contents::Overwritten).unwrap().remove(0);
                        let content = vec![thread * 100 + round; len];
                        let (extent, result) = upload(memory, extent, &content);
                        result.unwrap();
                        assert!(bytes(&extent) == content);
                    }
                });
            }
        });
        drop(memory);
        prop_assert_eq!((stand_in.left(), stand_in.violations()), (Left::default(), Vec::new()));
    }
}

#[test]
fn without_a_driver_the_reason_is_given() {
    match Driver::load() {
        Err(problem) => {
            let text = problem.to_string();
            assert!(text.contains("NVIDIA") && text.contains("libcuda.so.1"), "{text}");
        }
        Ok(driver) => println!("skipped: a driver with {} GPUs is installed here", driver.gpus()),
    }
}

/// Runs in the process that the test below starts.
#[test]
#[ignore = "needs the stand-in in the place of the driver's library"]
fn in_the_place_of_the_drivers_library() {
    let driver = Driver::load().unwrap();
    assert_eq!((driver.gpus(), driver.cuda_version()), (2, (13, 0)));
    let gpu = Gpu::open(&driver, 1).unwrap();
    assert_eq!((gpu.capability(), gpu.numa_node()), ((9, 0), None));
    let config = CudaConfig { reserve_bytes: Some(16 << 20), buffers: 2, ..CudaConfig::new(1) };
    let memory = CudaDevice::open(&driver, &config).unwrap().into_memory();
    assert_eq!((memory.page_bytes(), memory.page_count()), (2 << 20, 23));
    let arena = Arena::reserve(memory.clone(), 5 << 20).unwrap();
    let (extent, result) = upload(&memory, arena.claim(100, 2 << 20).unwrap(), &vec![3; 2 << 20]);
    result.unwrap();
    assert!(bytes(&extent).iter().all(|&byte| byte == 3));
}

#[test]
fn the_stand_in_can_be_loaded_as_the_driver() {
    let program = std::env::current_exe().unwrap();
    let library = program.with_file_name("libtangram_fake_cuda.so");
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(library, dir.path().join("libcuda.so.1")).unwrap();
    let run = std::process::Command::new(program)
        .args(["--exact", "cuda::tests::in_the_place_of_the_drivers_library", "--ignored", "--nocapture"])
        .env("LD_LIBRARY_PATH", dir.path())
        .env("FAKE_CUDA_DEVICES", "2")
        .env("FAKE_CUDA_MEMORY", (64 << 20).to_string())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&run.stdout);
    assert!(
        run.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&run.stderr)
    );
}

#[test]
fn large_copies_go_through_pinned_buffers_and_keep_their_bytes() {
    const LARGE: usize = 64 << 10;
    for delay in [Delay::Latest, Delay::Random(3)] {
        let options =
            Options { memory_bytes: 256 * LARGE, granularity: LARGE, delay, abort_on_misuse: false };
        let (stand_in, device) = stand_in::open(options, 128 * LARGE, LARGE);
        let memory = device.unwrap().into_memory();
        let staging = memory.staging().unwrap();
        let buffer = staging.buffer_bytes();
        let arena = Arena::reserve(memory.clone(), 128 * LARGE).unwrap();
        // Fewer pieces than there are buffers, as many, more, and a last one that is not whole.
        for len in [LARGE, buffer, buffer + 1, 2 * buffer, 3 * buffer + 12_345] {
            let mut extent = arena.claim(5, len).unwrap();
            let content: Vec<u8> = (0..len).map(|at| (at * 31 + at / 4096) as u8).collect();
            extent.write(0, &content).unwrap();
            assert!(bytes(&extent) == content, "{len} bytes");
            // All buffers are elsewhere: the driver's own way.
            let held: Vec<Pinned> = (0..3).map(|_| staging.take().unwrap()).collect();
            extent.write(0, &content[3..]).unwrap();
            assert!(bytes(&extent)[..len - 3] == content[3..], "{len} bytes without a buffer");
            drop(held);
        }
        drop((arena, memory));
        assert_eq!((stand_in.left(), stand_in.violations()), (Left::default(), Vec::new()));
    }
}
