//! Pinned host memory that keeps bytes for longer than one copy: made in slabs, given out in runs of whole units.
//!
//! Bytes here have one owner, like an extent's, and can be shared for reading; a copy to the GPU holds a share until it
//! has ended, so memory is never used again under a copy. What a piece of memory lies in are few, long runs where there
//! are such, and many short ones where there are not: as long as enough units are free, no request is refused.
//! What is kept here, and for how long, is decided above.

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::gpu::Gpu;
use super::pinned::pin;
use crate::DeviceError;
use crate::pages::FreePages;

/// Bytes of a unit. What is kept is rounded up to it: small against a weight matrix, large against the cost of one copy.
const UNIT: usize = 64 << 10;

/// Units of a slab but for the last one: pinning takes the driver so long that nobody should wait for more at a time.
const SLAB_UNITS: usize = (256 << 20) / UNIT;

/// First unit of a slab after that of the slab before: there is none between them, so no run reaches across.
const STRIDE: usize = SLAB_UNITS + 1;

#[derive(Default)]
struct State {
    /// Address and bytes, in the order of their units.
    slabs: Vec<(usize, usize)>,
    free: FreePages,
}

struct Shared {
    gpu: Arc<Gpu>,
    state: Mutex<State>,
}

/// The pinned memory of one GPU. Clones are the same memory.
#[derive(Clone)]
pub struct HostPool {
    shared: Arc<Shared>,
}

/// Bytes in one or more runs.
#[derive(Clone, Copy, Debug)]
struct Run {
    address: usize,
    bytes: usize,
    first: u32,
}

struct Held {
    shared: Arc<Shared>,
    runs: Vec<Run>,
}

/// Pinned bytes that are somebody's. Whoever holds all of what was taken together can put it together again; the memory is
/// free when the last of it is dropped.
pub struct HostBytes {
    held: Arc<Held>,
    /// First byte in the runs.
    at: usize,
    len: usize,
    /// Whose bytes these are, where they are only for reading.
    of: Option<Arc<HostBytes>>,
}

impl HostPool {
    pub(super) fn new(gpu: &Arc<Gpu>) -> HostPool {
        HostPool { shared: Arc::new(Shared { gpu: gpu.clone(), state: Mutex::default() }) }
    }

    /// Pins one more slab near the GPU, of at most `bytes`; gives its size, which is 0 if that is less than the smallest
    /// amount. Takes long, so it is nothing for the path of a request.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when the system does not give so much, [`DeviceError::Lost`].
    pub fn grow(&self, bytes: usize) -> Result<usize, DeviceError> {
        let units = (bytes / UNIT).min(SLAB_UNITS);
        if units == 0 {
            return Ok(0);
        }
        let (gpu, bytes) = (&self.shared.gpu, units * UNIT);
        let base = pin(gpu, bytes)?;
        let mut state = self.shared.state();
        let first = state.slabs.len() * STRIDE;
        state.slabs.push((base, bytes));
        state.free.give(first as u32, units as u32);
        Ok(bytes)
    }

    /// Bytes pinned so far.
    pub fn bytes(&self) -> usize {
        self.shared.state().slabs.iter().map(|&(_, bytes)| bytes).sum()
    }

    /// Bytes that nobody has.
    pub fn free(&self) -> usize {
        self.shared.state().free.free() * UNIT
    }

    /// Bytes that something of `len` bytes takes.
    pub fn rounded(len: usize) -> usize {
        len.next_multiple_of(UNIT)
    }

    /// Takes `len` bytes, with anything in them; `None` if there are not so many.
    pub fn take(&self, len: usize) -> Option<HostBytes> {
        let mut state = self.shared.state();
        let taken = state.free.take(len.div_ceil(UNIT))?;
        let run = |&(first, units): &(u32, u32)| {
            let (slab, unit) = (first as usize / STRIDE, first as usize % STRIDE);
            let (base, _) = state.slabs[slab];
            Run { address: base + unit * UNIT, bytes: units as usize * UNIT, first }
        };
        let runs = taken.iter().map(run).collect();
        drop(state);
        Some(HostBytes { held: Arc::new(Held { shared: self.shared.clone(), runs }), at: 0, len, of: None })
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic between its changes is not possible.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        for &(base, _) in &state.slabs {
            // SAFETY: pinned in `grow`, freed once; no bytes are held any more, so no copy runs either.
            let _ = self
                .gpu
                .must("freeing host memory", |driver| unsafe { (driver.cuMemFreeHost)(base as *mut c_void) });
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        for run in &self.runs {
            state.free.give(run.first, (run.bytes / UNIT) as u32);
        }
    }
}

impl std::fmt::Debug for HostBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostBytes({}+{} of {:?})", self.at, self.len, self.held.runs)
    }
}

impl HostBytes {
    /// How many bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The same bytes once more, `len` of them from `at` on (at most all), for reading: nobody can write to them as long as
    /// these exist, since whoever has them shared cannot have them alone.
    pub fn part(of: &Arc<HostBytes>, at: usize, len: usize) -> HostBytes {
        let at = at.min(of.len);
        let len = len.min(of.len - at);
        HostBytes { held: of.held.clone(), at: of.at + at, len, of: Some(of.clone()) }
    }

    fn assert_owned(&self) {
        assert!(self.of.is_none(), "bytes that are shared are only for reading");
    }

    /// Keeps the first `at` bytes (at most all) and gives the others away.
    pub fn split_off(&mut self, at: usize) -> HostBytes {
        let at = at.min(self.len);
        let rest =
            HostBytes { held: self.held.clone(), at: self.at + at, len: self.len - at, of: self.of.clone() };
        self.len = at;
        rest
    }

    /// Takes in what [`HostBytes::split_off`] gave away.
    ///
    /// # Panics
    /// When `next` does not follow upon this, or either is only for reading.
    pub fn join(&mut self, next: HostBytes) {
        self.assert_owned();
        next.assert_owned();
        let follows = Arc::ptr_eq(&self.held, &next.held) && self.at + self.len == next.at;
        assert!(follows, "only what follows can be joined");
        self.len += next.len;
    }

    /// The bytes, where they lie in one piece.
    ///
    /// # Panics
    /// When they are only for reading.
    pub fn whole(&mut self) -> Option<&mut [u8]> {
        self.assert_owned();
        let (address, bytes) = self.spans(0, self.len).next().filter(|&(_, bytes)| bytes == self.len)?;
        // SAFETY: the span is pinned and initialised (the system's fresh pages are) while `held` lives and lies in this
        // object's share of it, which is nobody else's, as `&mut self` says.
        Some(unsafe { std::slice::from_raw_parts_mut(address as *mut u8, bytes) })
    }

    /// Copies bytes in, from `at` on.
    ///
    /// # Panics
    /// When they reach beyond the end, or are only for reading.
    pub fn write(&mut self, at: usize, from: &[u8]) {
        self.assert_owned();
        let mut from = from;
        for (address, bytes) in self.spans(at, from.len()) {
            let (now, later) = from.split_at(bytes);
            // SAFETY: the span is pinned while `held` lives and lies in this object's share of it, which is nobody else's,
            // as `&mut self` says; `from` has that many bytes.
            unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), address as *mut u8, bytes) };
            from = later;
        }
    }

    /// Copies bytes out, from `at` on.
    ///
    /// # Panics
    /// When they reach beyond the end.
    pub fn read(&self, at: usize, into: &mut [u8]) {
        let mut into = into;
        for (address, bytes) in self.spans(at, into.len()) {
            let (now, later) = into.split_at_mut(bytes);
            // SAFETY: as in `write`; writing needs `&mut self`. Memory that was never written has the zeros of fresh pages.
            unsafe { std::ptr::copy_nonoverlapping(address as *const u8, now.as_mut_ptr(), bytes) };
            into = later;
        }
    }

    /// Whether this is memory of that GPU.
    pub(super) fn is_of(&self, gpu: &Arc<Gpu>) -> bool {
        Arc::ptr_eq(&self.held.shared.gpu, gpu)
    }

    /// Where `len` bytes from `at` on are: addresses and how many are at each.
    ///
    /// # Panics
    /// When they reach beyond the end.
    pub(super) fn spans(&self, at: usize, len: usize) -> impl Iterator<Item = (usize, usize)> {
        let end = at.checked_add(len).filter(|&end| end <= self.len);
        let Some(end) = end else { panic!("{len} bytes at {at} of {}", self.len) };
        let (mut skip, mut left) = (self.at + at, end - at);
        self.held.runs.iter().filter_map(move |run| {
            let from = skip.min(run.bytes);
            skip -= from;
            let bytes = left.min(run.bytes - from);
            left -= bytes;
            (bytes > 0).then_some((run.address + from, bytes))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use proptest::prelude::*;
    use tangram_fake_cuda::{Delay, Left, Options};

    use super::super::stand_in;
    use super::*;
    use crate::{Arena, Memory};

    const PAGE: usize = 4096;

    fn device(delay: Delay, pages: usize) -> (tangram_fake_cuda::StandIn, Arc<Memory>) {
        let options =
            Options { memory_bytes: (pages + 2) * PAGE, granularity: PAGE, delay, ..Options::default() };
        let (stand_in, device) = stand_in::open(options, pages * PAGE, PAGE);
        (stand_in, device.unwrap().into_memory())
    }

    fn pattern(seed: usize, len: usize) -> Vec<u8> {
        (0..len).map(|i| (i / 255 + i * 3 + seed * 7) as u8).collect()
    }

    #[test]
    fn bytes_stay_and_go_to_the_device_from_where_they_are() {
        for delay in [Delay::Latest, Delay::Random(3), Delay::Random(4)] {
            let (stand_in, memory) = device(delay, 64);
            let pool = memory.host_pool().unwrap();
            assert_eq!((pool.grow(UNIT - 1).unwrap(), pool.grow(5 * UNIT + 9).unwrap()), (0, 5 * UNIT));
            // Every other unit is taken, so what comes next lies in pieces.
            let taken: Vec<HostBytes> = (0..5).map(|_| pool.take(1).unwrap()).collect();
            let between: Vec<HostBytes> = taken
                .into_iter()
                .enumerate()
                .filter_map(|(i, bytes)| (i % 2 == 1).then_some(bytes))
                .collect();
            assert_eq!((pool.bytes(), pool.free()), (5 * UNIT, 3 * UNIT));
            assert!(pool.take(3 * UNIT + 1).is_none());
            assert!(pool.take(UNIT + 1).unwrap().whole().is_none(), "it lies in two pieces");
            assert_eq!(pool.take(UNIT).unwrap().whole().unwrap().len(), UNIT);
            let content = pattern(1, 2 * UNIT + 77);
            let mut whole = pool.take(content.len()).unwrap();
            let (mut head, mut at) = (whole.split_off(0), 0);
            let mut pieces = Vec::new();
            while head.len() > 30_000 {
                let tail = head.split_off(30_000);
                pieces.push(std::mem::replace(&mut head, tail));
            }
            pieces.push(head);
            for piece in &mut pieces {
                let len = piece.len();
                piece.write(0, &content[at..at + len]);
                at += len;
            }
            pieces.into_iter().for_each(|piece| whole.join(piece));
            let mut read = vec![0; content.len()];
            whole.read(0, &mut read);
            assert!(read == content);

            let arena = Arena::reserve(memory.clone(), 64 * PAGE).unwrap();
            let whole = Arc::new(whole);
            let (sender, ended) = channel();
            for (at, len) in [(0, content.len()), (UNIT - 10, 20), (100, 1)] {
                let extent = arena.claim(0, len).unwrap();
                let sender = sender.clone();
                memory.upload_kept(whole.clone(), at, extent, move |extent, result| {
                    sender.send((extent, result)).unwrap();
                });
                let (extent, result) = ended.recv_timeout(Duration::from_secs(30)).unwrap();
                result.unwrap();
                assert!(extent.to_vec().unwrap() == content[at..at + len]);
            }
            drop((whole, between));
            assert_eq!(pool.free(), 5 * UNIT);
            drop((arena, memory, pool));
            assert_eq!((stand_in.left(), stand_in.violations()), (Left::default(), Vec::new()));
        }
    }

    #[test]
    fn shared_bytes_are_read_and_never_written() {
        let (stand_in, memory) = device(Delay::Latest, 64);
        let pool = memory.host_pool().unwrap();
        pool.grow(3 * UNIT).unwrap();
        let content = pattern(2, 2 * UNIT);
        let mut bytes = pool.take(content.len()).unwrap();
        bytes.write(0, &content);
        let bytes = Arc::new(bytes);
        let parts = [(0, 9), (UNIT - 7, 20), (9, 2 * UNIT)];
        let parts = parts.map(|(at, len)| (at, HostBytes::part(&bytes, at, len)));
        drop(bytes);
        assert_eq!(pool.free(), UNIT, "the parts keep the bytes");
        for (at, mut part) in parts {
            let mut read = vec![0; part.len()];
            part.read(0, &mut read);
            assert!(read == content[at..at + read.len()] && read.len() == part.len());
            let tail = part.split_off(part.len() / 2);
            for mut part in [tail, part] {
                let written = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| part.write(0, &[1])));
                assert!(written.is_err());
            }
        }
        assert_eq!((pool.free(), stand_in.violations()), (3 * UNIT, Vec::new()));
    }

    /// The stand-in does nothing before somebody waits, so the bytes are read long after the owner has let go.
    #[test]
    fn memory_is_not_used_again_under_a_copy() {
        let (stand_in, memory) = device(Delay::Latest, 64);
        let pool = memory.host_pool().unwrap();
        pool.grow(2 * UNIT).unwrap();
        let arena = Arena::reserve(memory.clone(), 64 * PAGE).unwrap();
        let (sender, ended) = channel();
        for round in 0..40 {
            let mut bytes = pool.take(UNIT).or_else(|| {
                // Both are under copies: wait for one.
                let (extent, expected): (crate::Extent, Vec<u8>) = ended.recv().unwrap();
                assert!(extent.to_vec().unwrap() == expected);
                pool.take(UNIT)
            });
            let Some(bytes) = bytes.take() else { continue };
            let (mut bytes, content) = (bytes, pattern(round, UNIT));
            bytes.write(0, &content);
            let extent = arena.claim(round % 2 * 16 * PAGE, UNIT);
            let Ok(extent) = extent else { continue };
            let sender = sender.clone();
            memory.upload_kept(Arc::new(bytes), 0, extent, move |extent, result| {
                result.unwrap();
                sender.send((extent, content)).unwrap();
            });
        }
        drop(sender);
        assert!(ended.iter().all(|(extent, content)| extent.to_vec().unwrap() == content));
        assert_eq!((pool.free(), stand_in.violations()), (2 * UNIT, Vec::new()));
    }

    #[test]
    fn what_the_driver_refuses_is_an_answer() {
        let (stand_in, memory) = device(Delay::Latest, 8);
        let pool = memory.host_pool().unwrap();
        stand_in.fail("cuMemHostAlloc", 1, 2);
        assert!(matches!(pool.grow(UNIT), Err(DeviceError::Cuda { .. })));
        assert_eq!((pool.bytes(), pool.grow(UNIT).unwrap()), (0, UNIT));
        let arena = Arena::reserve(memory.clone(), 8 * PAGE).unwrap();
        let bytes = Arc::new(pool.take(PAGE).unwrap());
        stand_in.fail("cuMemcpyHtoDAsync_v2", 1, 1);
        let (sender, ended) = channel();
        memory.upload_kept(bytes.clone(), 0, arena.claim(0, PAGE).unwrap(), move |extent, result| {
            drop(extent);
            sender.send(result).unwrap();
        });
        assert!(matches!(ended.recv().unwrap(), Err(DeviceError::Cuda { .. })));
        assert_eq!(Arc::strong_count(&bytes), 1);
        assert!(crate::cpu::CpuDevice::open(1 << 20, 4096).unwrap().host_pool().is_none());
    }

    proptest! {
        /// Owners never share a byte, and everything comes back.
        #[test]
        fn owners_are_apart(steps in proptest::collection::vec((0usize..5 * UNIT, any::<u8>()), 1..60)) {
            let (_stand_in, memory) = device(Delay::Latest, 8);
            let pool = memory.host_pool().unwrap();
            pool.grow(7 * UNIT).unwrap();
            pool.grow(4 * UNIT).unwrap();
            let mut owned: Vec<(HostBytes, Vec<u8>)> = Vec::new();
            for (len, choice) in steps {
                if choice < 100 && !owned.is_empty() {
                    owned.swap_remove(usize::from(choice) % owned.len());
                }
                let content = pattern(usize::from(choice), len.max(1));
                let free = pool.free();
                prop_assert_eq!(free, 11 * UNIT - owned.iter().map(|(_, content)| HostPool::rounded(content.len())).sum::<usize>());
                match pool.take(content.len()) {
                    None => prop_assert!(free < content.len()),
                    Some(mut bytes) => {
                        bytes.write(0, &content);
                        owned.push((bytes, content));
                    }
                }
                for (bytes, content) in &owned {
                    let mut read = vec![0; content.len()];
                    bytes.read(0, &mut read);
                    prop_assert!(read == *content);
                }
            }
            drop(owned);
            prop_assert_eq!(pool.free(), 11 * UNIT);
        }
    }
}
