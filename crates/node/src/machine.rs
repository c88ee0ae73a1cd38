//! What this machine was measured to do: seconds per unit of work, bytes per second of a load, and by how much both
//! missed lately. Kept in the data directory, so that a start finds it.
//!
//! Measuring takes cores for some tens of milliseconds and is done when a type of weights is deployed for the first time,
//! never on the path of a request and never before a server is ready. A GPU is not measured but watched (`speed.rs`).

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tangram_checkpoint::{CHUNK_BYTES, Checksum, DType, Hash};
use tangram_codec::Format;
use tangram_device::cpu::CpuDevice;
use tangram_engine::{Executor, Rates, StageWork};
use tangram_policy::forecast::{Correction, Loading};
use tangram_policy::stall::Link;
use tangram_pool::{Backend, CatalogueEntry, Pool};
use tangram_store::{Store, TensorLoad};

use crate::speed::{GpuSpeed, GpuWork};

/// In the data directory.
const FILE: &str = "rates.json";
/// Tensors of a measured load, each of [`CHUNK_BYTES`].
const LOAD_TENSORS: u64 = 16;
/// A load that takes longer is not measured.
const LOAD_PATIENCE: Duration = Duration::from_secs(5);

/// What was measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Measured {
    /// Processor, threads and build; the figures of another are worth nothing.
    machine: String,
    rates: Option<Rates>,
    /// Of a load through the store that finds its file in the page cache.
    load_bytes_per_second: Option<f64>,
    /// Plain bytes that one core makes of compressed ones.
    #[serde(default)]
    decoded_bytes_per_second: Option<f64>,
    corrections: Corrections,
    #[serde(default)]
    gpu: Option<WatchedGpu>,
}

/// What was seen of a GPU.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct WatchedGpu {
    /// Its kind; the figures of another are worth nothing.
    kind: String,
    speed: GpuSpeed,
    corrections: Corrections,
}

impl Measured {
    /// Of the device on which passes run.
    fn corrections(&mut self) -> &mut Corrections {
        match &mut self.gpu {
            Some(gpu) => &mut gpu.corrections,
            None => &mut self.corrections,
        }
    }
}

/// By how much forecasts missed.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Corrections {
    /// Passes over many tokens.
    pub(crate) prompts: Correction,
    /// Passes over few.
    pub(crate) decoding: Correction,
    /// Loads.
    pub(crate) loads: Correction,
}

impl Corrections {
    /// Corrections that start from these.
    fn seed(&self) -> Corrections {
        let Corrections { prompts, decoding, loads } = self;
        Corrections { prompts: prompts.seed(), decoding: decoding.seed(), loads: loads.seed() }
    }
}

/// The machine as it was measured.
pub(crate) struct Machine {
    data: PathBuf,
    threads: usize,
    /// Threads that bring bytes in, and decode them.
    streams: usize,
    /// The share of the arithmetic that a running load takes: of the cores, where these compute.
    load_share: f64,
    /// Whether passes run on the processor, whose speed is measured here. Else `measured` has a GPU.
    computes: bool,
    measured: Mutex<Measured>,
    /// Held while measuring: two measurements at once would disturb each other.
    measuring: Mutex<()>,
}

impl Machine {
    /// Reads what was measured before, if it was this machine with as many threads. `streams` is the number of copy
    /// threads of the device. Where passes run on a GPU (its name) that is watched instead.
    pub(crate) fn open(data: &Path, threads: usize, streams: usize, gpu: Option<&str>) -> Machine {
        let machine = describe(threads);
        let kept = std::fs::read(data.join(FILE)).ok();
        let kept = kept.and_then(|bytes| serde_json::from_slice::<Measured>(&bytes).ok());
        let kept = kept.filter(|kept| kept.machine == machine);
        let mut measured = kept.unwrap_or(Measured { machine, ..Measured::default() });
        let computes = gpu.is_none();
        // Without its number: GPUs of a kind are alike.
        let kind = gpu.map(|name| name.split_once(' ').map_or(name, |(_, kind)| kind));
        measured.gpu = kind.map(|kind| {
            let known = measured.gpu.take().filter(|gpu| gpu.kind == kind);
            known.unwrap_or_else(|| WatchedGpu { kind: kind.to_owned(), ..WatchedGpu::default() })
        });
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        // Cores that the executor leaves idle are there for the copies.
        let taken = (threads + streams).saturating_sub(cores);
        Machine {
            data: data.to_owned(),
            threads,
            streams: streams.min(cores),
            load_share: if computes { (taken as f64 / threads as f64).min(1.0) } else { 0.0 },
            computes,
            measured: Mutex::new(measured),
            measuring: Mutex::new(()),
        }
    }

    /// What tells this machine from others.
    pub(crate) fn describe(&self) -> String {
        self.lock().machine.clone()
    }

    /// Threads of the executor.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Whether passes run on the processor.
    pub(crate) fn computes(&self) -> bool {
        self.computes
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Measured> {
        self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nothing has to be measured for forecasts for models with weights of these types.
    pub(crate) fn knows(&self, dtypes: &[DType]) -> bool {
        let measured = self.lock();
        let rates = measured.rates.as_ref();
        let computing = || rates.is_some_and(|rates| dtypes.iter().all(|&dtype| rates.knows(dtype)));
        measured.load_bytes_per_second.is_some() && (!self.computes || computing())
    }

    /// Measures what is not known yet of these types of weights and of loads, and keeps it.
    pub(crate) fn measure(&self, dtypes: &[DType]) {
        let _measuring = self.measuring.lock().unwrap_or_else(PoisonError::into_inner);
        if self.knows(dtypes) {
            return;
        }
        let started = Instant::now();
        let (known, load) = {
            let measured = self.lock();
            (measured.rates.clone(), measured.load_bytes_per_second)
        };
        let rates = if self.computes { Some(self.measure_processor(known, dtypes)) } else { known };
        let load = load.or_else(|| match measure_load(&self.data) {
            Ok(rate) => Some(rate),
            Err(problem) => {
                tracing::warn!("the speed of loads was not measured: {problem}");
                None
            }
        });
        let mut measured = self.lock();
        measured.rates = rates;
        measured.load_bytes_per_second = load;
        drop(measured);
        tracing::debug!(milliseconds = started.elapsed().as_millis() as u64, "measured this machine");
        self.keep();
    }

    fn measure_processor(&self, known: Option<Rates>, dtypes: &[DType]) -> Rates {
        let executor = Executor::new(self.threads);
        let mut rates = known.unwrap_or_else(|| Rates::measure(&executor));
        let new: Vec<DType> = dtypes.iter().copied().filter(|&dtype| !rates.knows(dtype)).collect();
        rates.measure_weights(&executor, &new);
        rates
    }

    /// Plain bytes per second that all copy threads together make of compressed ones, measured when it is asked for the
    /// first time.
    pub(crate) fn decoding(&self) -> f64 {
        let _measuring = self.measuring.lock().unwrap_or_else(PoisonError::into_inner);
        let known = self.lock().decoded_bytes_per_second;
        let decoded = known.unwrap_or_else(measure_decoding);
        self.lock().decoded_bytes_per_second = Some(decoded);
        self.keep();
        decoded * self.streams as f64
    }

    /// Writes what was measured, and the corrections so far, to the data directory.
    pub(crate) fn keep(&self) {
        let measured = self.lock().clone();
        if measured.rates.is_none() && measured.load_bytes_per_second.is_none() {
            return;
        }
        let (path, part) = (self.data.join(FILE), self.data.join("rates.json.part"));
        let written = serde_json::to_vec(&measured)
            .map_err(std::io::Error::from)
            .and_then(|bytes| std::fs::write(&part, bytes))
            .and_then(|()| std::fs::rename(&part, &path));
        if let Err(error) = written {
            tracing::warn!("the measured rates were not kept in {}: {error}", path.display());
        }
    }

    /// Seconds of each stage, uncorrected; `None` before everything that they need was measured. `most_bytes` is what the
    /// weights of each stage come to.
    pub(crate) fn seconds(&self, stages: &[StageWork], most_bytes: &[u64]) -> Option<Vec<f64>> {
        let measured = self.lock();
        match &measured.gpu {
            Some(gpu) => gpu.speed.seconds(&gpu_work(stages, most_bytes)),
            None => {
                let rates = measured.rates.as_ref()?;
                stages.iter().map(|stage| rates.seconds(stage)).collect()
            }
        }
    }

    /// Whether a GPU computes of which too little has been seen to foretell anything.
    pub(crate) fn awaits_a_pass(&self) -> bool {
        self.lock().gpu.as_ref().is_some_and(|gpu| gpu.speed.seconds(&[]).is_none())
    }

    /// A pass of these stages, over a prompt or not, took so many seconds on the GPU, if there is one.
    pub(crate) fn observe(&self, stages: &[StageWork], most_bytes: &[u64], is_prompt: bool, seconds: f64) {
        if let Some(gpu) = &mut self.lock().gpu {
            gpu.speed.observe(&gpu_work(stages, most_bytes), is_prompt, seconds);
        }
    }

    /// How weights arrive, uncorrected; `None` before it was measured.
    pub(crate) fn loading(&self) -> Option<Loading> {
        let bytes_per_second = self.lock().load_bytes_per_second?;
        Some(Loading { link: Link { bytes_per_second, transfer_seconds: 0.0 }, share: self.load_share })
    }

    /// Corrections for a model of which nothing is known: by how much others missed.
    pub(crate) fn corrections(&self) -> Corrections {
        self.lock().corrections().seed()
    }

    /// Learns from a forecast that was made without any correction.
    pub(crate) fn learn(&self, learn: impl Fn(&mut Corrections)) {
        learn(self.lock().corrections());
    }
}

fn gpu_work(stages: &[StageWork], most_bytes: &[u64]) -> Vec<GpuWork> {
    let most_bytes = most_bytes.iter().copied().chain(std::iter::repeat(u64::MAX));
    stages.iter().zip(most_bytes).map(|(stage, most_bytes)| GpuWork::of(stage, most_bytes)).collect()
}

/// What the figures hold for.
fn describe(threads: usize) -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpu.lines().find(|line| line.starts_with("model name"));
    let name = name.and_then(|line| line.split(':').nth(1)).unwrap_or(std::env::consts::ARCH).trim();
    let profile = if cfg!(debug_assertions) { "debug" } else { "release" };
    format!("{name}, {threads} threads, tangram {} {profile}", env!("CARGO_PKG_VERSION"))
}

/// Bytes per second of a load from a file in `data` that was just written, through a store of its own.
fn measure_load(data: &Path) -> Result<f64, String> {
    let path = data.join("rates.load");
    let result = measure_load_of(&path);
    let _ = std::fs::remove_file(&path);
    result
}

fn measure_load_of(path: &Path) -> Result<f64, String> {
    let fault = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let chunk: Vec<u8> = (0..CHUNK_BYTES).map(|i| (i * 7 + i / 251) as u8).collect();
    let mut file = File::create(path).map_err(|error| fault(&error))?;
    (0..LOAD_TENSORS).try_for_each(|_| file.write_all(&chunk)).map_err(|error| fault(&error))?;
    drop(file);
    let bytes = LOAD_TENSORS * CHUNK_BYTES;
    let pool_bytes = bytes as usize;
    let memory = CpuDevice::open(pool_bytes, CpuDevice::default_page_bytes(pool_bytes));
    let memory = memory.map_err(|error| fault(&error))?;
    let store = Store::new(memory.clone());
    let mut pool = Pool::new(memory, Backend::Paged).map_err(|error| fault(&error))?;
    // Two sets of tensors with the same bytes, which push each other out.
    let entries = |set: u64| -> Vec<CatalogueEntry> {
        let entry = |tensor: u64| CatalogueEntry {
            id: Hash::of(&[set, tensor].map(u64::to_le_bytes).concat()),
            checkpoint: set.to_string(),
            offset: tensor * CHUNK_BYTES,
            bytes: CHUNK_BYTES,
            depth: 0.0,
        };
        (0..LOAD_TENSORS).map(entry).collect()
    };
    let sets = [0, 1].map(|set| pool.catalogue(&entries(set), |_| bytes));
    let chunks: Arc<[Checksum]> = [Checksum::of(&chunk)].into();
    let mut best = f64::INFINITY;
    // Pages are new the first time and used from then on, as in a server that has run for a while.
    for keys in [&sets[0], &sets[1], &sets[0]] {
        let keys = keys.as_ref().map_err(|error| fault(error))?;
        let (sender, woken) = mpsc::channel();
        let sender = Mutex::new(sender);
        let wake: tangram_store::Wake = Arc::new(move || {
            let _ = sender.lock().unwrap_or_else(PoisonError::into_inner).send(());
        });
        let started = Instant::now();
        let activation = pool.activate(keys, &[], 0.0).map_err(|error| fault(&error))?;
        let loads = activation.missing.into_iter().zip(0..).map(|(vacancy, tensor)| TensorLoad {
            vacancy,
            file: path.to_owned(),
            offset: tensor * CHUNK_BYTES,
            chunks: chunks.clone(),
            compressed: None,
            name: "measurement".to_owned(),
        });
        store.load(loads.collect(), &wake);
        for _ in 0..LOAD_TENSORS {
            woken.recv_timeout(LOAD_PATIENCE).map_err(|error| fault(&error))?;
        }
        best = best.min(started.elapsed().as_secs_f64());
        if !activation.lease.tensors().iter().all(|tensor| tensor.is_ready()) {
            return Err(fault(&"the load failed"));
        }
        pool.release(activation.lease);
    }
    Ok(bytes as f64 / best)
}

/// Plain bytes per second that one core makes of compressed ones.
pub(crate) fn measure_decoding() -> f64 {
    // Exponents as trained weights have them: each half as frequent as the one above.
    let mut random = 1u64;
    let mut element = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bits = random >> 33;
        let exponent = 122 - (bits >> 16 | 1 << 14).trailing_zeros() as u16;
        (exponent << 7 | bits as u16 & 0x807f).to_le_bytes()
    };
    let plain: Vec<u8> = (0..CHUNK_BYTES as usize / 2).flat_map(|_| element()).collect();
    let Some(frame) = tangram_codec::encode(Format::Bf16, &plain) else { return 0.0 };
    let mut out = vec![0; plain.len()];
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let started = Instant::now();
        if tangram_codec::decode(Format::Bf16, &frame, &mut out).is_err() {
            return 0.0;
        }
        best = best.min(started.elapsed().as_secs_f64());
    }
    plain.len() as f64 / best
}

#[cfg(test)]
mod tests {
    use tangram_engine::WeightWork;

    use super::*;

    #[test]
    fn what_was_measured_is_kept_for_the_same_machine() {
        let data = tempfile::tempdir().unwrap();
        let machine = Machine::open(data.path(), 2, 2, None);
        assert!(!machine.knows(&[]) && machine.loading().is_none());
        machine.measure(&[DType::F32]);
        assert!(machine.knows(&[DType::F32]) && !machine.knows(&[DType::Q8_0]));
        let rate = machine.loading().unwrap().link.bytes_per_second;
        assert!(rate.is_finite() && rate > 0.0);
        machine.learn(|corrections| corrections.loads.observe(1.0, 2.0));
        machine.keep();
        let again = Machine::open(data.path(), 2, 2, None);
        assert!(again.knows(&[DType::F32]));
        assert!((again.corrections().loads.factor() - 2.0).abs() < 1e-9);
        assert!(!Machine::open(data.path(), 1, 2, None).knows(&[]), "other threads, other figures");
        let work = [StageWork { attention: 5.0, ..StageWork::default() }];
        let weights = vec![(DType::F16, WeightWork { single: 100.0, ..WeightWork::default() })];
        let work = [&work[..], &[StageWork { weights, ..StageWork::default() }]].concat();
        let on_gpu = |name| Machine::open(data.path(), 2, 2, Some(name));
        let gpu = on_gpu("cuda:0 (some GPU)");
        assert!(gpu.knows(&[DType::Q8_0]) && gpu.awaits_a_pass() && gpu.seconds(&work, &[]).is_none());
        assert_eq!((gpu.corrections().loads.factor(), gpu.loading().unwrap().share), (1.0, 0.0));
        gpu.observe(&work, &[0, 150], true, 2.0);
        assert_eq!(gpu.seconds(&work, &[0, 150]), Some(vec![10.0 / 55.0, 2.0]));
        gpu.keep();
        assert!(!on_gpu("cuda:1 (some GPU)").awaits_a_pass(), "one of a kind");
        assert!(on_gpu("cuda:0 (another GPU)").awaits_a_pass());
        assert!(Machine::open(data.path(), 2, 2, None).seconds(&work, &[]).is_none(), "no rates of F16");
        std::fs::write(data.path().join(FILE), "{").unwrap();
        assert!(!Machine::open(data.path(), 2, 2, None).knows(&[]), "a damaged file is as none");
        let left: Vec<_> =
            std::fs::read_dir(data.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, [FILE], "nothing else is left behind");
    }
}
