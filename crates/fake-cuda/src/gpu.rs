//! One stand-in device: memory, mappings, pinned host ranges, faults, and the checks of all of them.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, c_void};
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};

use crate::emulator::{self, Kernel};
use crate::graphs::Graphs;
use crate::streams::{Streams, Work};
use crate::{Delay, Left, Options};

pub(crate) const SUCCESS: i32 = 0;
pub(crate) const INVALID_VALUE: i32 = 1;
pub(crate) const OUT_OF_MEMORY: i32 = 2;
pub(crate) const INVALID_DEVICE: i32 = 101;
pub(crate) const INVALID_CONTEXT: i32 = 201;
pub(crate) const INVALID_HANDLE: i32 = 400;
const NOT_FOUND: i32 = 500;
const ILLEGAL_ADDRESS: i32 = 700;
const LAUNCH_FAILED: i32 = 719;

/// Codes after which a context answers nothing else.
const STICKY: [i32; 11] = [214, 220, 700, 702, 710, 714, 715, 716, 717, 718, 719];

/// What fresh device memory has in it. Zeros would hide that somebody forgot to write them.
const GARBAGE: u8 = 0xa5;

/// Bytes of the inaccessible page behind a plain allocation.
const GUARD: usize = 4096;

/// How a call ends that does not succeed.
pub(crate) type Outcome = Result<(), i32>;

struct Physical {
    file: OwnedFd,
    bytes: usize,
    /// Whether the handle is still held.
    held: bool,
}

struct Mapping {
    bytes: usize,
    handle: u64,
    accessible: bool,
}

/// A kernel as the driver hands it out.
struct Function {
    kernel: Option<Kernel>,
    most_shared: u32,
}

struct Fault {
    call: String,
    left: u64,
    code: i32,
}

pub(crate) struct Gpu {
    options: Options,
    contexts: usize,
    occupied: usize,
    handles: HashMap<u64, Physical>,
    reservations: BTreeMap<usize, usize>,
    mappings: BTreeMap<usize, Mapping>,
    pinned: BTreeMap<usize, usize>,
    /// Plain allocations: address and bytes.
    plain: BTreeMap<usize, usize>,
    pub(crate) modules: usize,
    functions: Vec<Function>,
    pub(crate) streams: Streams,
    pub(crate) graphs: Graphs,
    next: u64,
    sticky: i32,
    faults: Vec<Fault>,
    calls: u64,
    violations: Vec<String>,
    random: u64,
}

impl Gpu {
    pub(crate) fn new(options: Options) -> Gpu {
        let random = match options.delay {
            Delay::Latest => 0,
            Delay::Random(seed) => seed.wrapping_mul(2).wrapping_add(1),
        };
        Gpu {
            options,
            contexts: 0,
            occupied: 0,
            handles: HashMap::new(),
            reservations: BTreeMap::new(),
            mappings: BTreeMap::new(),
            pinned: BTreeMap::new(),
            plain: BTreeMap::new(),
            modules: 0,
            functions: Vec::new(),
            streams: Streams::default(),
            graphs: Graphs::default(),
            next: 1,
            sticky: SUCCESS,
            faults: Vec::new(),
            calls: 0,
            violations: Vec::new(),
            random,
        }
    }

    pub(crate) fn fail(&mut self, call: &str, nth: u64, code: i32) {
        self.faults.push(Fault { call: call.to_owned(), left: nth, code });
    }

    pub(crate) fn pending_faults(&self) -> usize {
        self.faults.len()
    }

    pub(crate) fn clear_faults(&mut self) {
        self.faults.clear();
    }

    pub(crate) fn calls(&self) -> u64 {
        self.calls
    }

    pub(crate) fn violations(&self) -> &[String] {
        &self.violations
    }

    pub(crate) fn occupy(&mut self, bytes: usize) {
        self.occupied = bytes;
    }

    pub(crate) fn left(&self) -> Left {
        Left {
            contexts: self.contexts,
            handles: self.handles.len(),
            mappings: self.mappings.len(),
            reservations: self.reservations.len(),
            pinned: self.pinned.len(),
            streams: self.streams.count(),
            events: self.streams.events(),
            modules: self.modules,
            graphs: self.graphs.count(),
            allocations: self.plain.len(),
        }
    }

    /// Notes what must not be done, and refuses it.
    pub(crate) fn violation(&mut self, what: String) -> Outcome {
        if self.options.abort_on_misuse {
            eprintln!("misuse of the driver: {what}");
            std::process::abort();
        }
        self.violations.push(what);
        Err(INVALID_VALUE)
    }

    fn fault(&mut self, call: &str) -> Outcome {
        let mut fired = None;
        for (index, fault) in self.faults.iter_mut().enumerate() {
            if fault.call == call || (fault.call == "*" && call != "execution") {
                fault.left = fault.left.saturating_sub(1);
                if fault.left == 0 && fired.is_none() {
                    fired = Some(index);
                }
            }
        }
        match fired {
            None => Ok(()),
            Some(index) => {
                let code = self.faults.swap_remove(index).code;
                self.end_with(code);
                Err(code)
            }
        }
    }

    fn end_with(&mut self, code: i32) {
        if self.contexts > 0 && self.sticky == SUCCESS && STICKY.contains(&code) {
            self.sticky = code;
        }
    }

    /// What precedes every call: it is counted, may be meant to fail, and finds a dead context dead.
    pub(crate) fn enter(&mut self, call: &str) -> Outcome {
        self.calls += 1;
        self.fault(call)?;
        if self.sticky != SUCCESS {
            return Err(self.sticky);
        }
        if matches!(self.options.delay, Delay::Random(_)) {
            while self.draw().is_multiple_of(2) {
                let choice = self.draw();
                if !self.run_one_of(choice) {
                    break;
                }
            }
        }
        if self.sticky == SUCCESS { Ok(()) } else { Err(self.sticky) }
    }

    /// xorshift64.
    fn draw(&mut self) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 33) as usize
    }

    pub(crate) fn retain(&mut self) {
        self.contexts += 1;
    }

    pub(crate) fn release(&mut self) -> Outcome {
        match self.contexts {
            0 => self.violation("a context is released that nobody holds".to_owned()),
            _ => {
                self.contexts -= 1;
                Ok(())
            }
        }
    }

    pub(crate) fn has_context(&self) -> bool {
        self.contexts > 0
    }

    /// Ends the context's life and begins another: streams, events, graphs, modules, plain allocations and pinned memory go.
    /// Memory that is mapped is not part of a context; whether the driver takes it too is not documented, so it stays.
    pub(crate) fn reset(&mut self) {
        self.sticky = SUCCESS;
        self.streams = Streams::default();
        self.graphs = Graphs::default();
        self.modules = 0;
        self.functions.clear();
        for address in self.plain.keys().copied().collect::<Vec<_>>() {
            let _ = self.free_plain(address);
        }
        for (address, bytes) in std::mem::take(&mut self.pinned) {
            // SAFETY: mapped by `pin` with this size and not unmapped since; its users are told that it is gone.
            let _ = unsafe { munmap(address as *mut c_void, bytes) };
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.options.memory_bytes
    }

    pub(crate) fn granularity(&self) -> usize {
        self.options.granularity
    }

    pub(crate) fn free(&self) -> usize {
        let taken: usize = self.handles.values().map(|physical| physical.bytes).sum();
        let plain: usize = self.plain.values().sum();
        self.options.memory_bytes.saturating_sub(taken + plain + self.occupied)
    }

    fn is_granular(&self, value: usize) -> bool {
        value.is_multiple_of(self.options.granularity)
    }

    pub(crate) fn create(&mut self, bytes: usize) -> Result<u64, i32> {
        if bytes == 0 || !self.is_granular(bytes) {
            self.violation(format!("a handle of {bytes} bytes is created"))?;
        }
        if bytes > self.free() {
            return Err(OUT_OF_MEMORY);
        }
        let file = memfd_create("fake-cuda", MemfdFlags::CLOEXEC).map_err(|_| OUT_OF_MEMORY)?;
        ftruncate(&file, bytes as u64).map_err(|_| OUT_OF_MEMORY)?;
        let garbage = vec![GARBAGE; bytes.min(1 << 20)];
        let mut at = 0;
        while at < bytes {
            let piece = &garbage[..garbage.len().min(bytes - at)];
            at += rustix::io::pwrite(&file, piece, at as u64).map_err(|_| OUT_OF_MEMORY)?;
        }
        let handle = self.next;
        self.next += 1;
        self.handles.insert(handle, Physical { file, bytes, held: true });
        Ok(handle)
    }

    pub(crate) fn release_handle(&mut self, handle: u64) -> Outcome {
        match self.handles.get_mut(&handle) {
            Some(physical) if physical.held => {
                physical.held = false;
                self.free_if_unused(handle);
                Ok(())
            }
            _ => self.violation(format!("handle {handle} is released and not held")),
        }
    }

    /// Memory goes when neither a handle nor a mapping is left.
    fn free_if_unused(&mut self, handle: u64) {
        let mapped = self.mappings.values().any(|mapping| mapping.handle == handle);
        if !mapped && self.handles.get(&handle).is_some_and(|physical| !physical.held) {
            self.handles.remove(&handle);
        }
    }

    pub(crate) fn export(&mut self, handle: u64) -> Result<OwnedFd, i32> {
        match self.handles.get(&handle) {
            Some(physical) if physical.held => physical.file.try_clone().map_err(|_| OUT_OF_MEMORY),
            _ => {
                self.violation(format!("handle {handle} is exported and not held"))?;
                Err(INVALID_VALUE)
            }
        }
    }

    pub(crate) fn reserve(&mut self, bytes: usize, alignment: usize) -> Result<usize, i32> {
        let alignment = alignment.max(self.options.granularity);
        if bytes == 0 || !self.is_granular(bytes) || !alignment.is_power_of_two() {
            self.violation(format!("{bytes} bytes are reserved at a multiple of {alignment}"))?;
        }
        let padded = bytes.checked_add(alignment).ok_or(OUT_OF_MEMORY)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            mmap_anonymous(std::ptr::null_mut(), padded, ProtFlags::empty(), flags)
        }
        .map_err(|_| OUT_OF_MEMORY)? as usize;
        let address = start.next_multiple_of(alignment);
        // SAFETY: both parts belong to the mapping made above, and nobody has seen their addresses.
        unsafe {
            if address > start {
                let _ = munmap(start as *mut c_void, address - start);
            }
            let tail = start + padded - (address + bytes);
            if tail > 0 {
                let _ = munmap((address + bytes) as *mut c_void, tail);
            }
        }
        self.reservations.insert(address, bytes);
        Ok(address)
    }

    pub(crate) fn unreserve(&mut self, address: usize, bytes: usize) -> Outcome {
        if self.reservations.get(&address) != Some(&bytes) {
            return self.violation(format!("{address:#x}+{bytes} is given back and is no reservation"));
        }
        if let Some((mapped, _)) = self.mappings.range(address..address + bytes).next() {
            let mapped = *mapped;
            return self.violation(format!("a reservation is given back in which {mapped:#x} is mapped"));
        }
        self.reservations.remove(&address);
        // SAFETY: this is one whole reservation, made above, with nothing mapped in it.
        let _ = unsafe { munmap(address as *mut c_void, bytes) };
        Ok(())
    }

    fn overlaps(&self, address: usize, bytes: usize) -> bool {
        let before = self.mappings.range(..address + bytes).next_back();
        before.is_some_and(|(&start, mapping)| start + mapping.bytes > address)
    }

    pub(crate) fn map(&mut self, address: usize, bytes: usize, offset: usize, handle: u64) -> Outcome {
        if !self.is_granular(address) || !self.is_granular(bytes) || offset != 0 {
            return self.violation(format!("{address:#x}+{bytes} is mapped at offset {offset}"));
        }
        let reserved = self.reservations.range(..=address).next_back();
        if reserved.is_none_or(|(&start, &size)| address + bytes > start + size) {
            return self.violation(format!("{address:#x}+{bytes} is mapped and not reserved"));
        }
        if self.overlaps(address, bytes) {
            return self.violation(format!("{address:#x}+{bytes} is mapped twice"));
        }
        if self.mappings.values().any(|mapping| mapping.handle == handle) {
            return self.violation(format!("handle {handle} is mapped at two addresses"));
        }
        let Some(physical) = self.handles.get(&handle).filter(|physical| physical.held) else {
            return self.violation(format!("handle {handle} is mapped and not held"));
        };
        if physical.bytes != bytes {
            let has = physical.bytes;
            return self.violation(format!("{bytes} of the {has} bytes of handle {handle} are mapped"));
        }
        // SAFETY: the range lies in a reservation of ours and nothing is mapped in it, so nothing is destroyed.
        let mapped = unsafe {
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            mmap(address as *mut c_void, bytes, ProtFlags::empty(), flags, &physical.file, 0)
        };
        mapped.map_err(|_| OUT_OF_MEMORY)?;
        self.mappings.insert(address, Mapping { bytes, handle, accessible: false });
        Ok(())
    }

    pub(crate) fn set_access(&mut self, address: usize, bytes: usize) -> Outcome {
        let mut at = address;
        while at < address + bytes {
            match self.mappings.get(&at) {
                Some(mapping) => at += mapping.bytes,
                None => {
                    return self.violation(format!("access to {address:#x}+{bytes}: {at:#x} is not mapped"));
                }
            }
        }
        if at != address + bytes || bytes == 0 {
            return self.violation(format!("access to {address:#x}+{bytes} ends inside a mapping"));
        }
        // SAFETY: the whole range is mapped by us.
        let protected =
            unsafe { mprotect(address as *mut c_void, bytes, MprotectFlags::READ | MprotectFlags::WRITE) };
        protected.map_err(|_| OUT_OF_MEMORY)?;
        self.mappings.range_mut(address..address + bytes).for_each(|(_, mapping)| mapping.accessible = true);
        Ok(())
    }

    pub(crate) fn unmap(&mut self, address: usize, bytes: usize) -> Outcome {
        match self.mappings.get(&address) {
            Some(mapping) if mapping.bytes == bytes => {}
            _ => return self.violation(format!("{address:#x}+{bytes} is unmapped and is no mapping")),
        }
        if self.streams.touches(address, bytes) {
            return self
                .violation(format!("{address:#x}+{bytes} is unmapped under work that has not been done"));
        }
        // SAFETY: the range is one mapping of ours; it stays reserved as inaccessible memory.
        let hidden = unsafe {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
            mmap_anonymous(address as *mut c_void, bytes, ProtFlags::empty(), flags)
        };
        hidden.map_err(|_| OUT_OF_MEMORY)?;
        if let Some(mapping) = self.mappings.remove(&address) {
            self.free_if_unused(mapping.handle);
        }
        Ok(())
    }

    pub(crate) fn pin(&mut self, bytes: usize) -> Result<usize, i32> {
        if bytes == 0 {
            self.violation("no bytes are pinned".to_owned())?;
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let address = unsafe {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            mmap_anonymous(std::ptr::null_mut(), bytes, protection, MapFlags::PRIVATE)
        }
        .map_err(|_| OUT_OF_MEMORY)? as usize;
        self.pinned.insert(address, bytes);
        Ok(address)
    }

    pub(crate) fn unpin(&mut self, address: usize) -> Outcome {
        let Some(&bytes) = self.pinned.get(&address) else {
            return self.violation(format!("{address:#x} is freed and is not pinned"));
        };
        if self.streams.touches(address, bytes) {
            return self.violation(format!("{address:#x} is freed under work that has not been done"));
        }
        self.pinned.remove(&address);
        // SAFETY: mapped by `pin` with this size; nothing that is still to be done uses it.
        let _ = unsafe { munmap(address as *mut c_void, bytes) };
        Ok(())
    }

    /// Takes memory that ends, but for alignment to 16, at an inaccessible page. It is full of numbers that are none.
    pub(crate) fn allocate(&mut self, bytes: usize) -> Result<usize, i32> {
        if bytes == 0 {
            self.violation("no bytes are allocated".to_owned())?;
        }
        if bytes > self.free() {
            return Err(OUT_OF_MEMORY);
        }
        let whole = bytes.next_multiple_of(GUARD);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            mmap_anonymous(std::ptr::null_mut(), whole + GUARD, protection, MapFlags::PRIVATE)
        }
        .map_err(|_| OUT_OF_MEMORY)? as usize;
        let address = start + whole - bytes.next_multiple_of(16);
        // SAFETY: both ranges are of the mapping made above.
        unsafe {
            mprotect((start + whole) as *mut c_void, GUARD, MprotectFlags::empty())
                .map_err(|_| OUT_OF_MEMORY)?;
            std::ptr::write_bytes(address as *mut u8, 0xff, bytes);
        }
        self.plain.insert(address, bytes);
        Ok(address)
    }

    pub(crate) fn free_plain(&mut self, address: usize) -> Outcome {
        let Some(&bytes) = self.plain.get(&address) else {
            return self.violation(format!("{address:#x} is freed and was not allocated"));
        };
        if self.streams.touches(address, bytes) {
            return self.violation(format!("{address:#x} is freed under work that has not been done"));
        }
        self.plain.remove(&address);
        let start = address / GUARD * GUARD;
        // SAFETY: this is the mapping that `allocate` made; whoever still uses it faults.
        let _ = unsafe { munmap(start as *mut c_void, bytes.next_multiple_of(GUARD) + GUARD) };
        Ok(())
    }

    /// Finds a kernel. Without an emulator there is every kernel.
    pub(crate) fn function(&mut self, name: &CStr) -> Result<usize, i32> {
        let kernel = match emulator::get() {
            Some(emulator) => Some(emulator.find(name).ok_or(NOT_FOUND)?),
            None => None,
        };
        self.functions.push(Function { kernel, most_shared: 48 << 10 });
        Ok(self.functions.len() - 1)
    }

    /// Allows a kernel so much shared memory.
    pub(crate) fn allow_shared(&mut self, function: usize, bytes: u32) -> Outcome {
        // What one block may have at most on a GPU of capability 9.0.
        const MOST_SHARED_BYTES: u32 = 227 << 10;
        let function = self.functions.get_mut(function).ok_or(INVALID_HANDLE)?;
        if bytes > MOST_SHARED_BYTES {
            return Err(INVALID_VALUE);
        }
        function.most_shared = bytes;
        Ok(())
    }

    /// The work of a launch with these threads per block.
    ///
    /// # Safety
    /// `arguments` must point to the kernel's argument structure.
    pub(crate) unsafe fn launch(
        &self,
        function: usize,
        blocks: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        arguments: *const c_void,
    ) -> Result<Work, i32> {
        let &Function { kernel, most_shared } = self.functions.get(function).ok_or(INVALID_HANDLE)?;
        let [x, y, z] = blocks;
        let grid = x > 0 && x <= i32::MAX as u32 && y > 0 && z > 0 && y.max(z) <= 65_535;
        let wanted = kernel.map_or(threads, |kernel| kernel.threads);
        if !grid || !(1..=1024).contains(&threads) || threads != wanted || shared_bytes > most_shared {
            return Err(INVALID_VALUE);
        }
        let bytes = kernel.map_or(0, |kernel| kernel.argument_bytes) as usize;
        // SAFETY: the structure has so many bytes.
        let arguments = unsafe { std::slice::from_raw_parts(arguments.cast::<u8>(), bytes) }.to_vec();
        Ok(Work::Kernel { kernel, blocks, shared_bytes, arguments, graph: None })
    }

    /// Whether copies read and write this host range later, and not at once.
    pub(crate) fn is_pinned(&self, address: usize, bytes: usize) -> bool {
        let before = self.pinned.range(..=address).next_back();
        before.is_some_and(|(&start, &size)| address + bytes <= start + size)
    }

    /// Whether the device may access all of a device range.
    pub(crate) fn is_accessible(&self, address: usize, bytes: usize) -> bool {
        let plain = self.plain.range(..=address).next_back();
        if plain.is_some_and(|(&start, &size)| address + bytes <= start + size) {
            return true;
        }
        let mut at = address;
        while at < address + bytes {
            match self.mappings.range(..=at).next_back() {
                Some((&start, mapping)) if mapping.accessible && start + mapping.bytes > at => {
                    at = start + mapping.bytes;
                }
                _ => return false,
            }
        }
        true
    }

    /// Puts work at the end of a stream.
    pub(crate) fn submit(&mut self, stream: usize, work: Work) -> Outcome {
        if !self.streams.exists(stream) {
            return Err(INVALID_HANDLE);
        }
        if let Some((address, bytes)) = work.device_ranges().find(|&(at, len)| !self.is_accessible(at, len)) {
            return self.violation(format!("work on {address:#x}+{bytes}, which is not accessible"));
        }
        if work.overlaps() {
            return self.violation("a copy within the device overlaps itself".to_owned());
        }
        self.streams.push(stream, work);
        Ok(())
    }

    /// Does what a stream was given, up to its `until`th piece of work.
    pub(crate) fn run_until(&mut self, stream: usize, until: u64) -> Outcome {
        while self.streams.done(stream) < until && self.run_next(stream) {}
        if self.sticky == SUCCESS { Ok(()) } else { Err(self.sticky) }
    }

    fn run_one_of(&mut self, choice: usize) -> bool {
        self.streams.busy(choice).is_some_and(|stream| self.run_next(stream))
    }

    /// Does the next piece of a stream's work, `false` if there is none. A dead context does nothing any more.
    fn run_next(&mut self, stream: usize) -> bool {
        if self.sticky != SUCCESS {
            return false;
        }
        let Some(work) = self.streams.pop(stream) else { return false };
        if let Err(code) = self.fault("execution") {
            // Whatever the code, work that fails on the device ends the context.
            self.sticky = code;
            return false;
        }
        let device = work.device_ranges().all(|(address, bytes)| self.is_accessible(address, bytes));
        let host = work.host_ranges().all(|(address, bytes)| self.is_pinned(address, bytes));
        if !device || !host {
            let _ = self.violation(format!("{work:?} finds its memory gone"));
            self.end_with(ILLEGAL_ADDRESS);
            return false;
        }
        // SAFETY: the device ranges are mapped and accessible and the host ranges pinned, as was just checked; what a
        // kernel accesses is for whoever launched it to know.
        let done = unsafe { work.run() };
        if !done {
            self.end_with(LAUNCH_FAILED);
        }
        done
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    fn gpu(delay: Delay) -> Gpu {
        Gpu::new(Options { memory_bytes: 8 * PAGE, granularity: PAGE, delay, abort_on_misuse: false })
    }

    /// Two accessible pages at the address that is returned, and one reserved page behind them.
    fn two_pages(gpu: &mut Gpu) -> (usize, [u64; 2]) {
        let address = gpu.reserve(3 * PAGE, PAGE).unwrap();
        let handles = [0, 1].map(|page| {
            let handle = gpu.create(PAGE).unwrap();
            gpu.map(address + page * PAGE, PAGE, 0, handle).unwrap();
            handle
        });
        gpu.set_access(address, 2 * PAGE).unwrap();
        (address, handles)
    }

    #[test]
    fn misuse_is_refused_and_remembered() {
        let mut gpu = gpu(Delay::Latest);
        let (address, [first, _]) = two_pages(&mut gpu);
        let stream = gpu.streams.create();
        let third = gpu.create(PAGE).unwrap();
        let pinned = gpu.pin(PAGE).unwrap();
        let mut expected = 0;
        let mut refused = |gpu: &mut Gpu, outcome: Outcome, what: &str| {
            assert_eq!(outcome, Err(INVALID_VALUE), "{what}");
            expected += 1;
            assert_eq!(gpu.violations().len(), expected, "{what}");
        };
        let outcome = gpu.map(address, PAGE, 0, third);
        refused(&mut gpu, outcome, "mapped twice");
        let outcome = gpu.map(address + 2 * PAGE, PAGE, 0, first);
        refused(&mut gpu, outcome, "one page at two addresses");
        let outcome = gpu.map(address + 3 * PAGE, PAGE, 0, third);
        refused(&mut gpu, outcome, "mapped outside");
        let outcome = gpu.set_access(address, 3 * PAGE);
        refused(&mut gpu, outcome, "access to what is not mapped");
        for (at, bytes) in [(address + 2 * PAGE, PAGE), (address, 2 * PAGE), (address, PAGE / 2)] {
            let outcome = gpu.unmap(at, bytes);
            refused(&mut gpu, outcome, "unmapped what is no mapping");
        }
        let outcome = gpu.unreserve(address, 3 * PAGE);
        refused(&mut gpu, outcome, "given back with mappings");
        let outcome = gpu.submit(stream, Work::Fill { to: address + PAGE, bytes: PAGE + 1, value: 0 });
        refused(&mut gpu, outcome, "filled beyond what is mapped");
        let outcome = gpu.submit(stream, Work::Within { from: address, to: address + 10, bytes: 11 });
        refused(&mut gpu, outcome, "copied over itself");
        gpu.submit(stream, Work::ToDevice { from: pinned, to: address, bytes: 5 }).unwrap();
        let outcome = gpu.unmap(address, PAGE);
        refused(&mut gpu, outcome, "unmapped under work");
        let outcome = gpu.unpin(pinned);
        refused(&mut gpu, outcome, "freed under work");
        gpu.release_handle(third).unwrap();
        let outcome = gpu.release_handle(third);
        refused(&mut gpu, outcome, "released twice");
        let outcome = gpu.create(PAGE + 1);
        refused(&mut gpu, outcome.map(drop), "half a page");
    }

    #[test]
    fn work_is_done_when_it_is_waited_for_and_not_before() {
        let mut gpu = gpu(Delay::Latest);
        let (address, _) = two_pages(&mut gpu);
        let (stream, other) = (gpu.streams.create(), gpu.streams.create());
        let event = gpu.streams.create_event();
        // SAFETY: the address is mapped and accessible, and no other thread knows it.
        let read = |at: usize| unsafe { std::ptr::read_volatile((address + at) as *const u8) };
        gpu.submit(stream, Work::Fill { to: address, bytes: 1, value: 1 }).unwrap();
        assert!(gpu.streams.record(event, stream));
        gpu.submit(stream, Work::Fill { to: address + 1, bytes: 1, value: 1 }).unwrap();
        gpu.submit(other, Work::Fill { to: address + 2, bytes: 1, value: 1 }).unwrap();
        gpu.enter("anything").unwrap();
        assert_eq!([read(0), read(1), read(2)], [GARBAGE; 3]);
        let (of, until) = gpu.streams.awaited(event).unwrap().unwrap();
        gpu.run_until(of, until).unwrap();
        assert_eq!([read(0), read(1), read(2)], [1, GARBAGE, GARBAGE]);
        gpu.run_until(stream, gpu.streams.submitted(stream)).unwrap();
        assert_eq!([read(0), read(1), read(2)], [1, 1, GARBAGE]);
    }

    #[test]
    fn with_a_seed_work_is_done_at_any_time() {
        let done_after = |seed| {
            let mut gpu = gpu(Delay::Random(seed));
            let (address, _) = two_pages(&mut gpu);
            let stream = gpu.streams.create();
            gpu.submit(stream, Work::Fill { to: address, bytes: 1, value: 1 }).unwrap();
            (1..100).find(|_| gpu.enter("anything").is_ok() && gpu.streams.done(stream) == 1).unwrap()
        };
        let moments: Vec<u32> = (0..20).map(done_after).collect();
        assert!(moments.contains(&1) && moments.iter().any(|&moment| moment > 1), "{moments:?}");
    }

    #[test]
    fn an_error_that_ends_the_context_is_all_it_says_until_it_is_reset() {
        let mut gpu = gpu(Delay::Latest);
        gpu.retain();
        let (address, _) = two_pages(&mut gpu);
        let stream = gpu.streams.create();
        gpu.fail("execution", 2, 719);
        for at in 0..3 {
            gpu.submit(stream, Work::Fill { to: address + at, bytes: 1, value: 1 }).unwrap();
        }
        assert_eq!(gpu.run_until(stream, 3), Err(719));
        assert_eq!(gpu.enter("anything"), Err(719));
        gpu.reset();
        assert_eq!(gpu.enter("anything"), Ok(()));
        assert_eq!((gpu.left().streams, gpu.left().mappings), (0, 2), "device memory outlives the context");
    }
}
