//! A stand-in for NVIDIA's driver library: strict, deterministic, without a GPU. For tests only.
//!
//! It has the entry points that `tangram-device` uses, under their names. Physical memory is a memory file per handle,
//! mapped where `cuMemMap` says and accessible only after `cuMemSetAccess`, so that a stray access faults. What a
//! stream is given runs as late as it may, or at moments that a seed chooses, never on its own: whoever reads before
//! synchronising reads old bytes, and reads them every time. Kernels are run by an emulator where there is one
//! ([`run_kernels`]), else they do nothing. What the driver leaves undefined is an error here, and
//! is remembered ([`StandIn::violations`]).
//!
//! Every [`StandIn`] is a device of its own with its own faults and counts, so that tests run side by side. As a
//! shared library it has as many devices from the start as `FAKE_CUDA_DEVICES` says (none if unset), each of
//! `FAKE_CUDA_MEMORY` bytes (or, with a comma between them, one figure for each) in pages of `FAKE_CUDA_GRANULARITY`, with
//! the emulator that `FAKE_CUDA_KERNELS` names.
//!
//! It must never be more lenient than the driver is documented to be, and it is no simulator: its times mean nothing.

#![allow(unsafe_code)]

mod api;
mod emulator;
mod gpu;
mod graphs;
mod streams;

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use gpu::Gpu;

pub use emulator::{build_emulator, order_threads, run_kernels};

/// When the work of a stream is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delay {
    /// Not before somebody waits for it.
    Latest,
    /// Before or during any call, as the seed has it.
    Random(u64),
}

/// What a stand-in device is like.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Device memory, bytes.
    pub memory_bytes: usize,
    /// What sizes and addresses of device memory are multiples of, bytes; a multiple of the system's page.
    pub granularity: usize,
    /// When the work of a stream is done.
    pub delay: Delay,
    /// Whether misuse ends the process, after saying what it was, rather than only being refused and remembered.
    pub abort_on_misuse: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            memory_bytes: 256 << 20,
            granularity: 2 << 20,
            delay: Delay::Latest,
            abort_on_misuse: false,
        }
    }
}

/// What is left on a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// Users of the primary context.
    pub contexts: usize,
    /// Physical handles.
    pub handles: usize,
    /// Mapped ranges.
    pub mappings: usize,
    /// Address reservations.
    pub reservations: usize,
    /// Pinned host ranges.
    pub pinned: usize,
    /// Streams.
    pub streams: usize,
    /// Events.
    pub events: usize,
    /// Loaded modules.
    pub modules: usize,
    /// Graphs, and what has been made of them.
    pub graphs: usize,
    /// Plain allocations.
    pub allocations: usize,
}

static DEVICES: OnceLock<Mutex<Vec<Arc<Mutex<Gpu>>>>> = OnceLock::new();

/// All devices, by ordinal.
fn devices() -> MutexGuard<'static, Vec<Arc<Mutex<Gpu>>>> {
    let first = || {
        let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
        let mut options = Options::default();
        options.granularity = number("FAKE_CUDA_GRANULARITY").unwrap_or(options.granularity);
        let memory = std::env::var("FAKE_CUDA_MEMORY").unwrap_or_default();
        let memory: Vec<usize> = memory.split(',').filter_map(|bytes| bytes.parse().ok()).collect();
        let device = |index: usize| {
            let bytes = memory.get(index).or(memory.last());
            let options = Options { memory_bytes: *bytes.unwrap_or(&options.memory_bytes), ..options };
            Arc::new(Mutex::new(Gpu::new(options)))
        };
        Mutex::new((0..number("FAKE_CUDA_DEVICES").unwrap_or(0)).map(device).collect())
    };
    DEVICES.get_or_init(first).lock().unwrap_or_else(PoisonError::into_inner)
}

fn device(ordinal: i32) -> Option<Arc<Mutex<Gpu>>> {
    devices().get(usize::try_from(ordinal).ok()?).cloned()
}

/// A device, and what a test does to it behind the driver's back.
pub struct StandIn {
    ordinal: i32,
    gpu: Arc<Mutex<Gpu>>,
}

impl StandIn {
    /// One more device.
    pub fn new(options: Options) -> StandIn {
        let gpu = Arc::new(Mutex::new(Gpu::new(options)));
        let mut devices = devices();
        devices.push(gpu.clone());
        StandIn { ordinal: devices.len() as i32 - 1, gpu }
    }

    /// Its number.
    pub fn ordinal(&self) -> i32 {
        self.ordinal
    }

    fn gpu(&self) -> MutexGuard<'_, Gpu> {
        self.gpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the `nth` call (from 1, counted from now) of an entry point fail with `code` and do nothing; `"*"` is any
    /// entry point, `"execution"` the work of a stream. A code that ends a context ends it.
    pub fn fail(&self, call: &str, nth: u64, code: i32) {
        self.gpu().fail(call, nth, code);
    }

    /// Faults that have not come to pass yet.
    pub fn pending_faults(&self) -> usize {
        self.gpu().pending_faults()
    }

    /// Forgets faults that have not come to pass yet.
    pub fn clear_faults(&self) {
        self.gpu().clear_faults();
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        self.gpu().calls()
    }

    /// What was done that the driver forbids or leaves undefined.
    pub fn violations(&self) -> Vec<String> {
        self.gpu().violations().to_vec()
    }

    /// What is left.
    pub fn left(&self) -> Left {
        self.gpu().left()
    }

    /// Takes memory as another process on the same GPU does.
    pub fn occupy(&self, bytes: usize) {
        self.gpu().occupy(bytes);
    }
}

/// The entry point of this name.
pub fn symbol(name: &str) -> Option<*const c_void> {
    api::symbol(name)
}
