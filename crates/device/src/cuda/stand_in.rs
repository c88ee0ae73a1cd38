//! The stand-in driver of the tests as a device. It shows misuse of the driver; it cannot show what a GPU does.
//!
//! A suite that asks [`memory_under_test`] for its devices runs on the processor's memory, and a second time on stand-ins
//! when one of its tests calls [`run_suite_again`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use tangram_fake_cuda::{Delay, Left, Options, StandIn, build_emulator, order_threads, run_kernels};

use super::{ALIGNMENT, CudaConfig, CudaDevice, Driver};
use crate::cpu::CpuDevice;
use crate::{DeviceError, Memory};

/// A driver that has the stand-in devices of this process.
///
/// # Panics
/// When the stand-in lacks a function, or no [`StandIn`] has been made yet.
pub fn driver() -> Arc<Driver> {
    // SAFETY: the stand-in's functions are written to do what the driver's are documented to do.
    let driver =
        unsafe { Driver::from_symbols(&|name| name.to_str().ok().and_then(tangram_fake_cuda::symbol)) };
    driver.unwrap_or_else(|problem| panic!("{problem}"))
}

/// A device on a stand-in of its own, which is returned too, with nothing kept in reserve and few buffers.
///
/// # Errors
/// What the stand-in was told to answer.
pub fn open(
    options: Options,
    pool_bytes: usize,
    page_bytes: usize,
) -> (StandIn, Result<CudaDevice, DeviceError>) {
    let stand_in = StandIn::new(options);
    let device = CudaDevice::open(&driver(), &config(&stand_in, pool_bytes, page_bytes));
    (stand_in, device)
}

/// What [`open`] opens a stand-in with.
pub fn config(stand_in: &StandIn, pool_bytes: usize, page_bytes: usize) -> CudaConfig {
    CudaConfig {
        pool_bytes: Some(pool_bytes),
        page_bytes: Some(page_bytes),
        reserve_bytes: Some(0),
        buffers: 3,
        ..CudaConfig::new(stand_in.ordinal())
    }
}

/// The memory of a stand-in that ends the process on misuse, and whose work is done as late as it may be or at random
/// moments, in turn.
///
/// # Panics
/// When it cannot be set up.
pub fn memory(pool_bytes: usize, page_bytes: usize) -> Arc<Memory> {
    static SEED: AtomicU64 = AtomicU64::new(0);
    let seed = SEED.fetch_add(1, Ordering::Relaxed);
    let options = Options {
        memory_bytes: pool_bytes + page_bytes,
        granularity: page_bytes.min(2 << 20),
        delay: if seed.is_multiple_of(2) { Delay::Latest } else { Delay::Random(seed) },
        abort_on_misuse: true,
    };
    let (_, device) = open(options, pool_bytes, page_bytes);
    device.unwrap_or_else(|error| panic!("{error}")).into_memory()
}

/// Set to anything, suites run on stand-ins.
const VARIABLE: &str = "TANGRAM_TEST_STAND_IN";

/// The number of a real GPU on which suites run that ask for pages of at least 2 MiB.
const GPU_VARIABLE: &str = "TANGRAM_TEST_GPU";

fn gpu_under_test() -> Option<i32> {
    std::env::var(GPU_VARIABLE).ok()?.parse().ok()
}

/// By how much a suite must multiply pages of 4 KiB so that the device under test can have them.
pub fn page_scale() -> usize {
    if gpu_under_test().is_some() { (2 << 20) / 4096 } else { 1 }
}

/// The memory that a suite is about: the processor's, a stand-in's, or a real GPU's.
///
/// # Panics
/// When it cannot be set up.
pub fn memory_under_test(pool_bytes: usize, page_bytes: usize) -> Arc<Memory> {
    if std::env::var_os(VARIABLE).is_some() {
        return memory(pool_bytes, page_bytes);
    }
    if let Some(ordinal) = gpu_under_test() {
        let config = CudaConfig {
            pool_bytes: Some(pool_bytes),
            page_bytes: Some(page_bytes),
            reserve_bytes: Some(0),
            // No part of a random program is longer than a pool.
            buffer_bytes: pool_bytes + ALIGNMENT,
            buffers: 3,
            ..CudaConfig::new(ordinal)
        };
        let driver = Driver::load().unwrap_or_else(|problem| panic!("{problem}"));
        let device = CudaDevice::open(&driver, &config);
        return device.unwrap_or_else(|error| panic!("{error}")).into_memory();
    }
    CpuDevice::open(pool_bytes, page_bytes).unwrap_or_else(|error| panic!("{error}"))
}

/// Runs all tests of the calling program once more, on stand-ins, with these variables set besides. Does nothing in that
/// second run, nor on a real GPU.
///
/// # Panics
/// When one of the tests fails; says what they printed.
pub fn run_suite_again(variables: &[(&str, String)]) {
    if std::env::var_os(VARIABLE).is_some() || gpu_under_test().is_some() {
        return;
    }
    let program = std::env::current_exe().unwrap_or_else(|error| panic!("{error}"));
    let run = std::process::Command::new(program)
        .env(VARIABLE, "1")
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .output()
        .unwrap_or_else(|error| panic!("{error}"));
    let [out, problems] = [&run.stdout, &run.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(run.status.success(), "on stand-ins ({}):\n{out}{problems}", run.status);
    let summary = out.lines().rfind(|line| line.starts_with("test result"));
    println!("on stand-ins: {}", summary.unwrap_or_default());
}
