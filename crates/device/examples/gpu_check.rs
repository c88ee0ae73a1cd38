//! The CUDA device on a real GPU: does it keep bytes, what do its calls cost, how near do uploads come to the link.
//!
//! `gpu_check [ORDINAL [POOL_BYTES]]` needs only a driver. Prints a line of JSON per finding; ends with an error at the
//! first wrong byte, and when in the end the driver lacks more memory than it may keep for itself.

use std::error::Error;
use std::sync::{Arc, mpsc};
use std::time::Instant;

use tangram_device::cuda::{CudaConfig, CudaDevice, Driver, Gpu};
use tangram_device::{Arena, Claim, Contents, DeviceError, Extent, Memory, Piece};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const MIB: usize = 1 << 20;
/// Of a finding that is repeated, the best of so many.
const ROUNDS: usize = 5;

/// xorshift64; the seed must not be 0.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % limit
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.below(256) as u8).collect()
    }
}

/// What work gives, and how many seconds it took.
fn timed<T>(work: impl FnOnce() -> Outcome<T>) -> Outcome<(T, f64)> {
    let started = Instant::now();
    let result = work()?;
    Ok((result, started.elapsed().as_secs_f64()))
}

fn best(mut work: impl FnMut() -> Outcome<f64>) -> Outcome<f64> {
    (0..ROUNDS).try_fold(f64::INFINITY, |best, _| Ok(best.min(work()?)))
}

/// Uploads `content` to the extent by pieces of whole buffers, several on their way at once.
fn upload(memory: &Arc<Memory>, mut extent: Extent, content: &[u8]) -> Outcome<Extent> {
    let staging = memory.staging().ok_or("no staging")?;
    let (sender, ended) = mpsc::channel();
    let (mut parts, mut from) = (0, 0);
    loop {
        let len = staging.buffer_bytes().min(extent.len());
        let rest = (extent.len() > len).then(|| extent.split_off(len));
        let mut buffer = staging.take()?;
        buffer[..len].copy_from_slice(&content[from..from + len]);
        let sender = sender.clone();
        memory.upload(buffer, vec![Piece { from: 0, extent }], move |extents, result| {
            // The receiver is gone only after another piece has failed.
            let _ = sender.send(result.map(|()| extents));
        });
        (parts, from) = (parts + 1, from + len);
        match rest {
            Some(rest) => extent = rest,
            None => break,
        }
    }
    let arrived = (0..parts).map(|_| ended.recv()?.map_err(Box::from)).collect::<Outcome<Vec<_>>>()?;
    let mut extents: Vec<Extent> = arrived.into_iter().flatten().collect();
    extents.sort_by_key(Extent::offset);
    let joined = extents.into_iter().reduce(|mut whole, next| {
        whole.join(next);
        whole
    });
    joined.ok_or_else(|| "nothing was uploaded".into())
}

fn same(extent: &Extent, content: &[u8], what: &str) -> Outcome {
    if extent.to_vec()? == content { Ok(()) } else { Err(format!("wrong bytes: {what}").into()) }
}

/// Random claims, uploads, moves and releases, every byte compared.
fn keeps_bytes(memory: &Arc<Memory>) -> Outcome<usize> {
    const OPERATIONS: usize = 300;
    let mut random = Random(0x7a61_6e67_7261_6d31);
    let page = memory.page_bytes();
    let arena = Arena::reserve(memory.clone(), 12 * page)?;
    let mut live: Vec<(Extent, Vec<u8>)> = Vec::new();
    for _ in 0..OPERATIONS {
        let claim = Claim { offset: random.below(11 * page), len: 1 + random.below(page * 3 / 2) };
        match arena.claim_all(&[claim], Contents::Zeroed) {
            Ok(mut extents) => {
                let extent = extents.pop().ok_or("no extent")?;
                same(&extent, &vec![0; extent.len()], "leftovers")?;
                let content = random.bytes(extent.len());
                live.push((upload(memory, extent, &content)?, content));
            }
            Err(DeviceError::BadClaim { .. } | DeviceError::OutOfPages { .. }) if !live.is_empty() => {
                let (extent, content) = live.swap_remove(random.below(live.len()));
                same(&extent, &content, "after a while")?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    live.iter().try_for_each(|(extent, content)| same(extent, content, "in the end"))?;
    drop(live);
    drop(arena);
    let segment = Arena::segment(memory.clone())?;
    let content = random.bytes(3 * page + 77);
    let mut extent = upload(memory, segment.claim(0, content.len())?, &content)?;
    for distance in [page, 1, 256, page / 2 + 3, 2 * MIB + 1, 3 * page] {
        for place in [extent.offset() + distance, extent.offset()] {
            extent.move_to(place)?;
            same(&extent, &content, "after a move")?;
        }
    }
    Ok(OPERATIONS)
}

/// Bytes per second at which `bytes` come to an arena where nothing is mapped, mapping included, from pinned memory and by
/// parts as a load has them.
fn loads(memory: &Arc<Memory>, arena: &Arc<Arena>, bytes: usize) -> Outcome<f64> {
    const PART: usize = 2 * MIB;
    let host = memory.host_pool().ok_or("no host memory")?;
    let wanted = (256 * MIB).min(bytes);
    while host.bytes() < wanted {
        host.grow(wanted - host.bytes())?;
    }
    let source = Arc::new(host.take(wanted).ok_or("too little host memory")?);
    let parts = bytes / PART;
    let claims: Vec<Claim> = (0..parts).map(|i| Claim { offset: i * PART, len: PART }).collect();
    let seconds = best(|| {
        let (sender, ended) = mpsc::channel();
        let (extents, seconds) = timed(|| {
            for (index, extent) in arena.claim_all(&claims, Contents::Overwritten)?.into_iter().enumerate() {
                let at = index * PART % wanted;
                let sender = sender.clone();
                memory.upload_kept(source.clone(), at, extent, move |extent, result| {
                    // Its pages go when all have come.
                    let _ = sender.send((extent, result));
                });
            }
            let arrived = (0..parts).map(|_| {
                let (extent, result) = ended.recv()?;
                result.map(|()| extent).map_err(Box::from)
            });
            arrived.collect::<Outcome<Vec<Extent>>>()
        })?;
        Extent::release_all(extents);
        Ok(seconds)
    })?;
    Ok((parts * PART) as f64 / seconds / 1e9)
}

/// What pages take beyond the bytes in them, as a share of these, of a model like Llama 3 8B of which one tensor of `every`
/// is resident.
fn waste(page: usize, every: usize) -> f64 {
    const LAYER: [usize; 9] =
        [8192, 33_554_432, 8_388_608, 8_388_608, 33_554_432, 8192, 117_440_512, 117_440_512, 117_440_512];
    const TABLE: usize = 128_256 * 4096 * 2;
    let layers = (0..32).flat_map(|_| LAYER);
    let tensors = [TABLE].into_iter().chain(layers).chain([8192, TABLE]);
    let (mut at, mut bytes, mut pages) = (0usize, 0, std::collections::BTreeSet::new());
    for (index, tensor) in tensors.enumerate() {
        if index % every == 0 {
            bytes += tensor;
            pages.extend(at / page..(at + tensor).div_ceil(page));
        }
        at += tensor;
    }
    (pages.len() * page) as f64 / bytes as f64 - 1.0
}

/// What mapping, clearing and copying cost with pages of this size.
fn costs(driver: &Arc<Driver>, config: &CudaConfig) -> Outcome {
    let (device, open) = timed(|| Ok(CudaDevice::open(driver, config)?))?;
    let memory = device.into_memory();
    let (page, pages) = (memory.page_bytes(), memory.page_count());
    let bytes = (pages / 2).max(1) * page;
    let arena = Arena::reserve(memory.clone(), bytes)?;
    let claim = [Claim { offset: 0, len: bytes }];
    let (mut map, mut unmap, mut clear) = (f64::INFINITY, f64::INFINITY, f64::INFINITY);
    for _ in 0..ROUNDS {
        let (extents, seconds) = timed(|| Ok(arena.claim_all(&claim, Contents::Overwritten)?))?;
        map = map.min(seconds);
        let ((), seconds) = timed(|| {
            Extent::release_all(extents);
            Ok(())
        })?;
        unmap = unmap.min(seconds);
        clear = clear.min(timed(|| Ok(arena.claim_all(&claim, Contents::Zeroed)?))?.1);
    }
    let (load, waste) = (loads(&memory, &arena, bytes)?, [waste(page, 1), waste(page, 2)]);
    let per_page = |seconds: f64, count: usize| seconds / count as f64 * 1e6;
    println!(
        "{{\"page_bytes\":{page},\"load_gb_per_s\":{load:.2},\"waste_of_whole\":{:.5},\"waste_of_half\":{:.4},\"open_us_per_page\":{:.1},\"map_us_per_page\":{:.1},\"unmap_us_per_page\":{:.1},\
         \"map_ms_per_gib\":{:.3},\"clear_gb_per_s\":{:.1}}}",
        waste[0],
        waste[1],
        per_page(open, pages),
        per_page(map, bytes / page),
        per_page(unmap, bytes / page),
        map * 1e3 / bytes as f64 * (1 << 30) as f64,
        bytes as f64 / (clear - map).max(1e-9) / 1e9,
    );
    Ok(())
}

/// Bytes per second of uploads of `bytes` in all: through the ring as loads do it, beside one large pinned buffer.
fn uploads(driver: &Arc<Driver>, config: &CudaConfig, bytes: usize) -> Outcome {
    let rate = |memory: &Arc<Memory>, fill: Option<&[u8]>| -> Outcome<f64> {
        let staging = memory.staging().ok_or("no staging")?;
        let arena = Arena::reserve(memory.clone(), bytes)?;
        let step = staging.buffer_bytes().min(bytes);
        let seconds = best(|| {
            let claims: Vec<Claim> =
                (0..bytes / step).map(|i| Claim { offset: i * step, len: step }).collect();
            let extents = arena.claim_all(&claims, Contents::Overwritten)?;
            let (sender, ended) = mpsc::channel();
            let count = extents.len();
            let copied = timed(|| {
                for extent in extents {
                    let mut buffer = staging.take()?;
                    if let Some(content) = fill {
                        buffer[..step].copy_from_slice(&content[..step]);
                    }
                    let sender = sender.clone();
                    memory.upload(buffer, vec![Piece { from: 0, extent }], move |extents, result| {
                        // Whoever hears of it may want the place again.
                        drop(extents);
                        let _ = sender.send(result);
                    });
                }
                (0..count).try_for_each(|_| ended.recv()?.map_err(Box::from))
            })?;
            Ok(copied.1)
        })?;
        Ok((bytes / step * step) as f64 / seconds / 1e9)
    };
    let content = vec![7; 4 * MIB];
    let memory = CudaDevice::open(driver, config)?.into_memory();
    let (ring, filled) = (rate(&memory, None)?, rate(&memory, Some(&content))?);
    // There need not be room for another one beside it.
    drop(memory);
    let large = CudaConfig { buffers: 1, buffer_bytes: (256 * MIB).min(bytes), ..*config };
    let plain = rate(&CudaDevice::open(driver, &large)?.into_memory(), None)?;
    println!(
        "{{\"upload_plain_gb_per_s\":{plain:.2},\"upload_ring_gb_per_s\":{ring:.2},\
         \"upload_filled_by_one_thread_gb_per_s\":{filled:.2}}}"
    );
    let share = ring / plain;
    println!(
        "{{\"line\":2,\"goal\":\"uploads through the ring beside a plain copy\",\"value\":{share:.3},\
         \"wanted\":{{\"at_least\":0.95}},\"met\":{}}}",
        share >= 0.95
    );
    Ok(())
}

fn main() -> Outcome {
    let mut arguments = std::env::args().skip(1);
    let ordinal = arguments.next().map_or(Ok(0), |text| text.parse())?;
    let driver = Driver::load()?;
    let gpu = Gpu::open(&driver, ordinal)?;
    let before = gpu.memory()?;
    let pool_bytes = match arguments.next() {
        Some(text) => text.parse()?,
        None => (8 << 30).min(before.free / 2),
    };
    let (major, minor) = gpu.capability();
    let cuda = driver.cuda_version();
    let node = gpu.numa_node().map_or_else(|| "null".to_owned(), |node| node.to_string());
    println!(
        "{{\"gpu\":{:?},\"capability\":\"{major}.{minor}\",\"cuda\":\"{}.{}\",\"free\":{},\"total\":{},\"numa_node\":{node}}}",
        gpu.name(),
        cuda.0,
        cuda.1,
        before.free,
        before.total
    );
    let config =
        CudaConfig { pool_bytes: Some(pool_bytes), reserve_bytes: Some(0), ..CudaConfig::new(ordinal) };
    let memory = CudaDevice::open(
        &driver,
        &CudaConfig { pool_bytes: Some(64 * MIB), page_bytes: Some(2 * MIB), ..config },
    )?;
    let operations = keeps_bytes(&memory.into_memory())?;
    println!("{{\"bytes_kept_through_operations\":{operations}}}");
    for page_bytes in (1..=6).map(|power| MIB << power) {
        costs(&driver, &CudaConfig { page_bytes: Some(page_bytes), ..config })?;
    }
    uploads(&driver, &config, pool_bytes / 2)?;
    let after = gpu.memory()?;
    println!("{{\"free_before\":{},\"free_after\":{}}}", before.free, after.free);
    // The driver loads what it clears memory with when that is first asked for.
    let kept = before.free.saturating_sub(after.free) / MIB;
    println!(
        "{{\"line\":1,\"goal\":\"device memory that is not given back, MiB\",\"value\":{kept},\"wanted\":{{\"at_most\":32}},\
         \"met\":{}}}",
        kept <= 32
    );
    if kept > 32 { Err("device memory is lost".into()) } else { Ok(()) }
}
