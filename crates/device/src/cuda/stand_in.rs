//! The stand-in driver of the tests as a device. It shows misuse of the driver; it cannot show what a GPU does.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tangram_fake_cuda::{Delay, Options, StandIn};

use super::{CudaConfig, CudaDevice, Driver};
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
