//! What a node computes on, set up as a whole: the device's memory as a pool, the executor, and the store that fills it.
//!
//! Everything is made once at start. When a GPU is lost all three go and are made anew (`worker/mend.rs`).

use std::sync::Arc;

use tangram_device::cpu::CpuDevice;
use tangram_device::cuda::{CudaConfig, CudaDevice, Driver};
use tangram_engine::cuda::{CudaExecutor, load};
use tangram_engine::{DeviceExecutor, Executor};
use tangram_pool::{Backend, Pool};
use tangram_store::{Options, Store};

use crate::host::keep_weights;
use crate::swap::HostMemory;
use crate::trial::Trial;

/// What a node computes on.
#[derive(Clone, Debug, Default)]
pub enum Device {
    /// The processor, and memory of this machine.
    #[default]
    Cpu,
    /// An NVIDIA GPU.
    Cuda {
        /// The driver, loaded.
        driver: Arc<Driver>,
        /// Which GPU, from 0.
        ordinal: i32,
    },
}

impl Device {
    /// Whether nothing is left of it that was lost: it can then be set up again.
    pub(crate) fn is_clear(&self) -> bool {
        match self {
            Device::Cpu => true,
            Device::Cuda { driver, ordinal } => !driver.has_remains(*ordinal),
        }
    }

    /// Which GPU it is.
    fn ordinal(&self) -> Option<i32> {
        match self {
            Device::Cpu => None,
            Device::Cuda { ordinal, .. } => Some(*ordinal),
        }
    }

    /// Whether passes run on the processor, whose speed this machine's figures are.
    pub(crate) fn is_cpu(&self) -> bool {
        matches!(self, Device::Cpu)
    }
}

/// Smallest pool that makes sense, bytes.
const MIN_POOL_BYTES: u64 = 1 << 20;

/// How a device is set up.
pub(crate) struct Setup {
    /// Its place among the node's devices.
    pub(crate) place: usize,
    pub(crate) device: Device,
    /// `None` for all that a GPU has free but a reserve.
    pub(crate) pool_bytes: Option<u64>,
    pub(crate) page_bytes: Option<u64>,
    /// Host memory beside it, for copies of weights and for the KV of preempted sequences (`host.rs`).
    pub(crate) host_bytes: u64,
    pub(crate) backend: Backend,
    /// Of the executor for the processor.
    pub(crate) threads: usize,
    pub(crate) options: Options,
    pub(crate) trial: Trial,
}

/// Sets all devices of a node up, which get pages of one size. Several at once: most of the time goes into making pages.
///
/// # Errors
/// The place of one that cannot be set up, and what is wrong, for the user.
pub(crate) fn open_all(setups: &mut [Setup]) -> Result<Vec<Opened>, (usize, String)> {
    for (place, setup) in setups.iter().enumerate() {
        if setup.device.is_cpu() && setups.len() > 1 {
            return Err((place, "the processor cannot be one of several devices".to_owned()));
        }
        if setups.iter().take(place).any(|other| other.device.ordinal() == setup.device.ordinal()) {
            return Err((place, "a GPU is named twice".to_owned()));
        }
    }
    let Some((first, others)) = setups.split_first_mut() else {
        return Err((0, "there is no device".to_owned()));
    };
    let mut opened = vec![first.open().map_err(|problem| (0, problem))?];
    let page_bytes = first.page_bytes;
    let opened_others: Vec<Result<Opened, String>> = std::thread::scope(|scope| {
        let open = |setup: &mut Setup| {
            setup.page_bytes = page_bytes;
            setup.open()
        };
        let threads: Vec<_> = others.iter_mut().map(|setup| scope.spawn(move || open(setup))).collect();
        let result = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|_| Err("setting it up failed".to_owned()))
        };
        threads.into_iter().map(result).collect()
    });
    for (place, other) in (1..).zip(opened_others) {
        opened.push(other.map_err(|problem| (place, problem))?);
    }
    Ok(opened)
}

/// A device that is set up.
pub(crate) struct Opened {
    pub(crate) pool: Pool,
    pub(crate) executor: DeviceExecutor,
    pub(crate) store: Arc<Store>,
    /// For the KV of preempted sequences.
    pub(crate) host: HostMemory,
}

impl Setup {
    /// Sets the device up. The pool has the same size every time.
    ///
    /// # Errors
    /// What is wrong, for the user.
    pub(crate) fn open(&mut self) -> Result<Opened, String> {
        if self.pool_bytes.is_some_and(|bytes| bytes < MIN_POOL_BYTES) {
            return Err(format!("at least {MIN_POOL_BYTES} bytes are needed"));
        }
        let (memory, executor) = match &self.device {
            Device::Cpu => {
                let bytes = self.pool_bytes.ok_or("it has to be said how many bytes the pool has")? as usize;
                let page_bytes = match self.page_bytes {
                    None => CpuDevice::default_page_bytes(bytes),
                    Some(page_bytes) => CpuDevice::checked_page_bytes(bytes, page_bytes as usize)?,
                };
                let memory = CpuDevice::open(bytes, page_bytes).map_err(|error| error.to_string())?;
                (memory, DeviceExecutor::Cpu(Executor::new(self.threads)))
            }
            Device::Cuda { driver, ordinal } => {
                let config = CudaConfig {
                    pool_bytes: self.pool_bytes.map(|bytes| bytes as usize),
                    page_bytes: self.page_bytes.map(|bytes| bytes as usize),
                    ..CudaConfig::new(*ordinal)
                };
                let device = CudaDevice::open(driver, &config).map_err(|error| error.to_string())?;
                let executor = load(device.gpu()).and_then(CudaExecutor::new);
                let executor = executor.map_err(|error| error.to_string())?;
                (device.into_memory(), DeviceExecutor::Cuda(Box::new(executor)))
            }
        };
        self.pool_bytes = Some((memory.page_count() * memory.page_bytes()) as u64);
        self.page_bytes = Some(memory.page_bytes() as u64);
        let mut pool = Pool::new(memory.clone(), self.backend).map_err(|error| error.to_string())?;
        let host = HostMemory::new(keep_weights(&mut pool, self.host_bytes));
        self.trial.apply(&mut pool)?;
        Ok(Opened { pool, executor, store: Store::with_options(memory, self.options.clone()), host })
    }

    /// What stands in for a device that is not there: a pool without room, on the processor.
    ///
    /// # Errors
    /// When the system refuses a page of memory.
    pub(crate) fn nothing(&self) -> Result<Opened, String> {
        let page_bytes = CpuDevice::default_page_bytes(0);
        let memory = CpuDevice::open(page_bytes, page_bytes).map_err(|error| error.to_string())?;
        let pool = Pool::new(memory.clone(), self.backend).map_err(|error| error.to_string())?;
        let executor = DeviceExecutor::Cpu(Executor::new(1));
        let store = Store::with_options(memory, self.options.clone());
        Ok(Opened { pool, executor, store, host: HostMemory::new(0) })
    }
}
