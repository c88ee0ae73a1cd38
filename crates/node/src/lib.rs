//! One machine: composes catalog, store, pool and engine; owns threads and lifecycles.
//!
//! [`Node`] is what the layers above hold. It checks requests (`requests.rs`) and hands them to the engine loop (`worker/`)
//! of a device (`fleet.rs`), which alone touches that device's memory; deployments change the data directory (`catalog.rs`)
//! and are then announced to all loops.

mod api;
mod arrival;
mod catalog;
mod damage;
mod device;
mod disks;
mod fleet;
mod forecast;
mod host;
mod machine;
mod model;
mod observe;
mod remote;
mod requests;
mod sequence;
mod speed;
mod swap;
mod totals;
mod trial;
mod worker;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::Duration;

use tangram_checkpoint::{AdapterSource, DType, Layout, Manifest, Source, TOKENIZER_FILE, codec_format};
use tangram_codec::Speeds;
use tangram_engine::{Model, TensorDesc};
pub use tangram_pool::Backend;
use tangram_remote::Remote;
pub use tangram_store::{Arrived, Verification};
use tangram_store::{Damage, Options};

pub use api::*;
use arrival::Arrival;
pub use catalog::CatalogError;
use catalog::{Catalog, Deployment, Import};
pub use device::Device;
use device::{Opened, Setup};
use disks::Disks;
use fleet::{Done, Fleet, Member};
pub use forecast::{Forecast, SHOWN_PROMPT_TOKENS};
use forecast::{footprint, weight_types};
use machine::Machine;
use model::ModelPlan;
pub use observe::{Computed, Observer};
pub use requests::{Embedding, Generation};
pub use tangram_engine::PassShape;
pub use tangram_policy::Baseline;
pub use tangram_remote::{Options as RemoteOptions, RemoteError, RemoteSource};
pub use trial::{Fill, Trial};
use worker::{Shared, Worker};

/// How a node is set up.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Data directory; made if it does not exist.
    pub data: PathBuf,
    /// What it computes on: the processor alone, or one or more GPUs.
    pub devices: Vec<Device>,
    /// Size of each device's pool in bytes, for weights and KV together; `None` for all that a GPU has free, but a reserve.
    pub device_memory: Option<u64>,
    /// How the pool is laid out.
    pub backend: Backend,
    /// Bytes per page of the pool, a power of two and at least the system's page; `None` chooses by the pool's size.
    pub page_bytes: Option<u64>,
    /// Bytes of host memory beside the pools for what has to leave them for a while: the KV of preempted sequences, and on a
    /// device that the host cannot address copies of weights too. Each device gets an equal part.
    pub host_memory: u64,
    /// Threads of the executor; `None` means as many as this process may use.
    pub threads: Option<usize>,
    /// Requests that may wait before further ones are refused.
    pub max_waiting: usize,
    /// How much of what is loaded is compared with its hash.
    pub verification: Verification,
    /// How checkpoints are downloaded, and with whose credentials.
    pub remote: RemoteOptions,
    /// Sees what is loaded and computed when. Passes then run stage by stage.
    pub observer: Option<Arc<dyn Observer>>,
    /// What a measurement changes; the default changes nothing.
    pub trial: Trial,
}

impl NodeConfig {
    /// The processor, a paged pool with pages by its size, no host memory beside it, all threads, a long queue, everything
    /// verified, the credentials of this process's environment, and nobody who watches.
    pub fn new(data: PathBuf, device_memory: u64) -> NodeConfig {
        NodeConfig {
            data,
            devices: vec![Device::Cpu],
            device_memory: Some(device_memory),
            backend: Backend::Paged,
            page_bytes: None,
            host_memory: 0,
            threads: None,
            max_waiting: 1024,
            verification: Verification::Full,
            remote: RemoteOptions::from_environment(),
            observer: None,
            trial: Trial::default(),
        }
    }
}

/// Why a node could not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The data directory cannot be used.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// A device cannot be used.
    #[error("device memory cannot be set up: {problem}")]
    Device {
        /// Which of [`NodeConfig::devices`].
        place: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A thread could not be started.
    #[error("starting the engine loop: {0}")]
    Thread(#[from] std::io::Error),
}

/// A running node.
pub struct Node {
    catalog: Arc<Mutex<Catalog>>,
    models: RwLock<BTreeMap<String, Arc<DeployedModel>>>,
    fleet: Arc<Fleet>,
    /// Takes the manifests of deployments whose last request has ended, and removes their files.
    retired: Option<Sender<Arc<Manifest>>>,
    workers: Vec<JoinHandle<()>>,
    janitor: Option<JoinHandle<()>>,
    machine: Arc<Machine>,
    disks: Arc<Disks>,
    /// Measures the machine where a start found deployments of which it knows nothing.
    measuring: Mutex<Option<JoinHandle<()>>>,
    max_waiting: usize,
    next_index: AtomicUsize,
    next_arrival: AtomicU64,
    closing: AtomicBool,
    /// Where downloads go, and how.
    downloads: (PathBuf, RemoteOptions),
    /// Made when the first remote source is deployed.
    remote: Mutex<Option<Arc<Remote>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Node {
    /// Opens the data directory, makes the pools of the devices and starts their engine loops.
    ///
    /// # Errors
    /// When another process holds the data directory, or it or the pool cannot be set up.
    pub fn open(config: NodeConfig) -> Result<Arc<Node>, NodeError> {
        let (catalog, problems) = Catalog::open(&config.data)?;
        for problem in problems {
            tracing::error!("{problem}");
        }
        let threads = config
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |threads| threads.get()));
        let damaged = catalog.damaged().clone();
        let damaged =
            Arc::new(move |damage: &Damage| damaged.add(&damage.file, damage.offset, &damage.tensor));
        let observe = config.observer.clone();
        let observe =
            observe.map(|observer| Arc::new(move |arrived: Arrived<'_>| observer.arrived(arrived)) as _);
        let options = Options { verification: config.verification, damaged, observe };
        let setup = |(place, device): (usize, &Device)| Setup {
            place,
            device: device.clone(),
            pool_bytes: config.device_memory,
            page_bytes: config.page_bytes,
            host_bytes: config.host_memory / config.devices.len() as u64,
            backend: config.backend,
            threads,
            options: options.clone(),
            trial: config.trial.clone(),
        };
        let mut setups: Vec<Setup> = config.devices.iter().enumerate().map(setup).collect();
        let opened = device::open_all(&mut setups);
        let opened = opened.map_err(|(place, problem)| NodeError::Device { place, problem })?;
        let machine = Arc::new(open_machine(&config, threads, &opened));
        let stores = opened.iter().map(|opened| opened.store.clone()).collect();
        let disks = Arc::new(Disks::open(&config.data, machine.describe(), stores));
        let page_bytes = setups.first().and_then(|setup| setup.page_bytes).unwrap_or(0);
        let member = |opened: &Opened| {
            let (commands, receiver) = channel();
            let memory = opened.pool.memory();
            let (name, pages) = (memory.name().to_owned(), memory.page_count() as u64);
            (Member { commands, shared: Arc::new(Shared::default()), name, pages }, receiver)
        };
        let (members, receivers): (Vec<_>, Vec<_>) = opened.iter().map(member).unzip();
        let fleet = Arc::new(Fleet::new(members, page_bytes));
        let mut workers = Vec::new();
        for ((setup, opened), receiver) in setups.into_iter().zip(opened).zip(receivers) {
            let thread = match fleet.len() {
                1 => "engine".to_owned(),
                _ => format!("engine-{}", setup.place),
            };
            let worker = Worker::new(setup, opened, disks.clone(), receiver, fleet.clone());
            let worker = worker.observed_by(config.observer.clone());
            workers.push(std::thread::Builder::new().name(thread).spawn(move || worker.run())?);
        }
        let catalog = Arc::new(Mutex::new(catalog));
        let (retired, receiver) = channel::<Arc<Manifest>>();
        let for_janitor = catalog.clone();
        let janitor = std::thread::Builder::new().name("janitor".to_owned()).spawn(move || {
            for manifest in receiver {
                lock(&for_janitor).retired(&manifest);
            }
        })?;
        let node = Arc::new(Node {
            catalog,
            models: RwLock::default(),
            fleet,
            retired: Some(retired),
            workers,
            janitor: Some(janitor),
            machine,
            disks,
            measuring: Mutex::new(None),
            max_waiting: config.max_waiting,
            next_index: AtomicUsize::new(0),
            next_arrival: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            downloads: (config.data.join("downloads"), config.remote),
            remote: Mutex::default(),
        });
        let catalog = lock(&node.catalog);
        // Bases first: an adapter then finds its own already there.
        let (adapters, others): (Vec<_>, Vec<_>) =
            catalog.models().iter().partition(|(_, deployment)| deployment.manifest.base.is_some());
        for (name, deployment) in others.into_iter().chain(adapters) {
            if let Err(reason) = node.announce(&catalog, name, deployment, None) {
                tracing::error!("model '{name}' cannot be used: {reason}");
            }
        }
        let models = catalog.models().values();
        let checkpoints = models.map(|deployment| deployment.manifest.checkpoint.as_str());
        let largest = checkpoints.max_by_key(|checkpoint| catalog.data_bytes(checkpoint));
        let largest = largest.map(|checkpoint| catalog.data_file(checkpoint));
        drop(catalog);
        node.measure_in_background(largest);
        Ok(node)
    }

    /// Measures what forecasts for the deployed models need and the disk of a data file, if no earlier run has.
    fn measure_in_background(&self, data_file: Option<PathBuf>) {
        let dtypes: Vec<_> = self.models().iter().flat_map(|model| model.forecast.dtypes()).collect();
        let data_file = data_file.filter(|file| !self.disks.tune(file));
        let known = dtypes.is_empty() || self.machine.knows(&dtypes);
        if known && data_file.is_none() {
            return;
        }
        let (machine, disks) = (self.machine.clone(), self.disks.clone());
        let thread = std::thread::Builder::new().name("measure".to_owned());
        let measure = move || {
            data_file.iter().for_each(|file| disks.measure(file));
            if !known {
                machine.measure(&dtypes);
            }
        };
        // Without it there are no times in the forecasts before the next deployment.
        *lock(&self.measuring) = thread.spawn(measure).ok();
    }

    /// Makes a deployment available to requests: a catalogued one, or one whose tensors are told to arrive.
    fn announce(
        &self,
        catalog: &Catalog,
        name: &str,
        deployment: &Deployment,
        arrival: Option<&Arc<Arrival>>,
    ) -> Result<Arc<DeployedModel>, String> {
        let page_bytes = self.fleet.page_bytes();
        let plan = ModelPlan::new(catalog, deployment, &self.machine, page_bytes, arrival)?;
        let manifest = &deployment.manifest;
        let base = match &manifest.base {
            None => None,
            Some(base) => {
                let manifest = Arc::new(manifest.without_adapter());
                let deployment = Deployment { created: deployment.created, manifest };
                let plan = ModelPlan::new(catalog, &deployment, &self.machine, page_bytes, None)?;
                Some((self.describe(catalog, base, &deployment, &plan)?, Arc::new(plan)))
            }
        };
        let deployed = self.describe(catalog, name, deployment, &plan)?;
        self.fleet.register(&deployed, &Arc::new(plan), base.as_ref())?;
        self.put(name, &deployed);
        Ok(deployed)
    }

    /// From now on a name means this model.
    fn put(&self, name: &str, model: &Arc<DeployedModel>) {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        models.insert(name.to_owned(), model.clone());
        drop(models);
        self.fleet.set_models(|| self.models());
    }

    /// What the layers above see of a model. Gives it a key.
    fn describe(
        &self,
        catalog: &Catalog,
        name: &str,
        deployment: &Deployment,
        plan: &ModelPlan,
    ) -> Result<Arc<DeployedModel>, String> {
        let manifest = &deployment.manifest;
        let footprint = plan.forecast.footprint();
        let directory = catalog.checkpoint_dir(&manifest.checkpoint);
        let tokenizer = match manifest.has_tokenizer {
            true => {
                let path = directory.join(TOKENIZER_FILE);
                let bytes = std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
                Some(blake3::hash(&bytes).to_hex().to_string())
            }
            false => None,
        };
        Ok(Arc::new(DeployedModel {
            name: name.to_owned(),
            spec: manifest.spec.clone(),
            base: manifest.base.clone(),
            directory,
            tokenizer,
            chat_template: manifest.chat_template.clone(),
            special_tokens: manifest.special_tokens.clone(),
            generation: manifest.generation.clone(),
            context: footprint.context(manifest.spec.context as u64, self.fleet.most_pages()) as usize,
            weight_bytes: plan.unique_bytes(),
            kv_bytes_per_token: footprint.kv_bytes_per_token(),
            created: deployment.created,
            index: self.next_index.fetch_add(1, Ordering::Relaxed),
            sent: (0..self.fleet.len()).map(|_| AtomicUsize::new(0)).collect(),
            tensors: plan.tensor_profiles(),
            forecast: plan.forecast.clone(),
        }))
    }

    /// Bytes of the devices' pools together.
    pub fn pool_bytes(&self) -> u64 {
        self.fleet.pool_bytes()
    }

    /// Bytes of the largest pool: what does not fit there does not fit.
    fn largest_pool(&self) -> u64 {
        self.fleet.most_pages() * self.fleet.page_bytes()
    }

    /// What a simulator needs to know of this node.
    pub fn profile(&self) -> MachineProfile {
        let generating = self.models().into_iter().filter(|model| model.spec.generates());
        let models: Vec<Arc<DeployedModel>> = generating.collect();
        let loading = models.iter().find_map(|model| model.forecast().loading());
        let (pool_bytes, cached_prefix_bytes) = self.fleet.first_pool();
        MachineProfile {
            pool_bytes,
            cached_prefix_bytes,
            load_bytes_per_second: loading.map(|loading| loading.link.bytes_per_second),
            load_share: loading.map_or(0.0, |loading| loading.share),
            models: models.iter().map(|model| model.profile()).collect(),
        }
    }

    /// Deployed models by name.
    pub fn models(&self) -> Vec<Arc<DeployedModel>> {
        self.models.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// A deployed model.
    pub fn model(&self, name: &str) -> Option<Arc<DeployedModel>> {
        self.models.read().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// Imports the checkpoint at `path` and deploys it as `name`, replacing an older deployment of that name (its
    /// running requests finish). Blocks for as long as reading the checkpoint takes.
    ///
    /// # Errors
    /// When the checkpoint is unusable, does not fit, the disk is full, or `progress` breaks; nothing is left behind.
    pub fn deploy(
        &self,
        name: &str,
        path: &Path,
        progress: &mut dyn FnMut(DeployProgress) -> ControlFlow<()>,
    ) -> Result<Arc<DeployedModel>, DeployError> {
        self.deploy_as(WeightLayout::Auto, name, path, progress)
    }

    /// [`Node::deploy`] with a choice of how weights are stored that are new to this disk.
    ///
    /// # Errors
    /// As [`Node::deploy`].
    pub fn deploy_as(
        &self,
        layout: WeightLayout,
        name: &str,
        path: &Path,
        progress: &mut dyn FnMut(DeployProgress) -> ControlFlow<()>,
    ) -> Result<Arc<DeployedModel>, DeployError> {
        let source = open_source(name, path)?;
        let weight_types = self.check_fits(name, &source)?;
        let layout = match layout {
            WeightLayout::Plain => Layout::Plain,
            WeightLayout::Compressed => Layout::Compressed,
            WeightLayout::Auto => {
                let tensors = source.tensors().iter().filter(|tensor| codec_format(tensor.dtype).is_some());
                let much = tensors.map(|tensor| tensor.bytes).sum::<u64>() >= LEAST_COMPRESSIBLE;
                let link = much.then(|| self.disks.rate()).flatten();
                let speeds = link.map(|link| Speeds { link, decode: self.machine.decoding() });
                speeds.map_or(Layout::Plain, Layout::Fastest)
            }
        };
        let catalog = lock(&self.catalog);
        self.put_into_service(catalog, name, (Import::Model(&source, layout), path), &weight_types, progress)
    }

    /// Deploys the checkpoint at `path` as [`Node::deploy`] does, but leaves its tensors in the files in which they
    /// are, all but those that no file holds in the form in which they are needed. Reads all of it once. The files are
    /// never written to or removed; when one of them has changed, requests that would have to read it fail and say so.
    ///
    /// # Errors
    /// As [`Node::deploy`].
    pub fn deploy_in_place(
        &self,
        name: &str,
        path: &Path,
        progress: &mut dyn FnMut(DeployProgress) -> ControlFlow<()>,
    ) -> Result<Arc<DeployedModel>, DeployError> {
        let source = open_source(name, path)?;
        let weight_types = self.check_fits(name, &source)?;
        let catalog = lock(&self.catalog);
        self.put_into_service(catalog, name, (Import::InPlace(&source), path), &weight_types, progress)
    }

    /// Deploys the LoRA adapter in the PEFT directory `adapter`, made for the model that is deployed as `base`, as a
    /// model `name`. It stays what it is when `base` is removed or deployed anew: its base is the weights, not the
    /// name. Only the adapter's tensors take room on disk.
    ///
    /// # Errors
    /// As [`Node::deploy`], and when there is no model `base` or the adapter is not one for it.
    pub fn deploy_adapter(
        &self,
        name: &str,
        adapter: &Path,
        base: &str,
        progress: &mut dyn FnMut(DeployProgress) -> ControlFlow<()>,
    ) -> Result<Arc<DeployedModel>, DeployError> {
        check_name(name)?;
        if name == base {
            let message = format!("an adapter needs a name of its own; '{name}' is its base's");
            return Err(DeployError::BadName(message));
        }
        let catalog = lock(&self.catalog);
        let deployment = catalog.models().get(base);
        let manifest = &deployment.ok_or_else(|| DeployError::UnknownModel(base.to_owned()))?.manifest;
        let source = AdapterSource::open(adapter, manifest)?;
        let (bytes, pool) = (manifest.weight_bytes() + source.weight_bytes(), self.largest_pool());
        if bytes > pool {
            return Err(does_not_fit(name, bytes, 0, pool));
        }
        // The times of its base's types are known since that was deployed.
        self.put_into_service(catalog, name, (Import::Adapter(&source, base), adapter), &[], progress)
    }

    /// Imports from somewhere and announces; undoes the first if the second fails. Measures what forecasts need of
    /// `weight_types`.
    fn put_into_service(
        &self,
        mut catalog: MutexGuard<'_, Catalog>,
        name: &str,
        (source, origin): (Import<'_>, &Path),
        weight_types: &[DType],
        progress: &mut dyn FnMut(DeployProgress) -> ControlFlow<()>,
    ) -> Result<Arc<DeployedModel>, DeployError> {
        if self.closing.load(Ordering::Acquire) {
            return Err(DeployError::Cancelled);
        }
        let old = catalog.models().get(name).cloned().zip(self.model(name));
        let deployment = catalog.deploy(name, source, origin, progress)?;
        self.disks.measure(&catalog.data_file(&deployment.manifest.checkpoint));
        self.machine.measure(weight_types);
        self.announce_or_undo(catalog, name, &deployment, old)
    }

    /// Announces what has just been catalogued, in the place of an older deployment; undoes both if that fails.
    fn announce_or_undo(
        &self,
        mut catalog: MutexGuard<'_, Catalog>,
        name: &str,
        deployment: &Deployment,
        old: Option<(Deployment, Arc<DeployedModel>)>,
    ) -> Result<Arc<DeployedModel>, DeployError> {
        let pool_bytes = self.largest_pool();
        let announced = self.announce(&catalog, name, deployment, None);
        let (index, problem) = match announced {
            Ok(deployed) if deployed.context > 0 => {
                drop(catalog);
                if let Some((old, model)) = old {
                    self.retire(model.index, &old);
                }
                return Ok(deployed);
            }
            // The weights fit, but not one KV block beside them.
            Ok(deployed) => {
                let (weights, kv) = (deployed.weight_bytes, deployed.kv_bytes_per_token);
                (deployed.index, does_not_fit(name, weights, kv, pool_bytes))
            }
            // One that could not be announced has no key.
            Err(reason) => (usize::MAX, cannot_run(name, &reason)),
        };
        let restored = old.as_ref().map(|(old, _)| catalog.restore(name, old));
        drop(catalog);
        match (restored, old) {
            (Some(Ok(())), Some((_, model))) => {
                // It has been running all the time.
                self.put(name, &model);
                self.retire(index, deployment);
            }
            (restored, old) => {
                if let Some(Err(error)) = restored {
                    tracing::error!(%error, "the older deployment of '{name}' is gone too");
                }
                let _ = self.remove(name);
                if let Some((old, model)) = old {
                    self.retire(model.index, &old);
                }
            }
        }
        Err(problem)
    }

    /// Refuses what can never run here before its bytes are read. Gives the types of its weights.
    fn check_fits(&self, name: &str, source: &Source) -> Result<Vec<DType>, DeployError> {
        let tensors = source.tensors().iter();
        let tensors: Vec<TensorDesc> = tensors
            .map(|tensor| TensorDesc { role: tensor.role, dtype: tensor.dtype, shape: tensor.shape.clone() })
            .collect();
        let engine =
            Model::new(source.spec().clone(), &tensors).map_err(|reason| cannot_run(name, &reason))?;
        let page_bytes = self.fleet.page_bytes();
        let weight_pages = source.weight_bytes().div_ceil(page_bytes);
        let footprint = footprint(&engine, weight_pages, page_bytes);
        if footprint.context(source.spec().context as u64, self.fleet.most_pages()) == 0 {
            let (weights, kv) = (source.weight_bytes(), footprint.kv_bytes_per_token());
            return Err(does_not_fit(name, weights, kv, self.largest_pool()));
        }
        Ok(weight_types(&engine))
    }

    /// Takes a model out of service: new requests are refused, accepted ones finish, then its files go unless other
    /// models refer to them.
    ///
    /// # Errors
    /// When there is no such model or the catalogue cannot be written.
    pub fn remove(&self, name: &str) -> Result<(), DeployError> {
        let mut catalog = lock(&self.catalog);
        let deployment = catalog.models().get(name).cloned();
        let Some(deployment) = deployment else {
            return Err(match self.model(name) {
                Some(_) => DeployError::Arriving(name.to_owned()),
                None => DeployError::UnknownModel(name.to_owned()),
            });
        };
        catalog.remove(name)?;
        drop(catalog);
        let removed = self.models.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        self.fleet.set_models(|| self.models());
        // A model that could not be announced has no key: its files can go at once.
        self.retire(removed.map_or(usize::MAX, |model| model.index), &deployment);
        Ok(())
    }

    fn retire(&self, index: usize, deployment: &Deployment) {
        self.fleet.retire(index, self.cleaning(deployment));
    }

    /// What has to be done when the last request of a deployment has ended.
    fn cleaning(&self, deployment: &Deployment) -> Done {
        let (retired, manifest) = (self.retired.clone(), deployment.manifest.clone());
        Box::new(move || {
            // Without a janitor the node is going down, and its next start cleans up.
            let _ = retired.map(|retired| retired.send(manifest));
        })
    }

    /// Every deployed model, by name. At most a few hundredths of a second old while work is going on.
    pub fn list(&self) -> Vec<ModelStatus> {
        let mut listed = self.fleet.list();
        // The engine loops may not have published yet what is deployed or removed already.
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        listed.retain(|status| models.get(&status.name).is_some_and(|model| model.created == status.created));
        listed
    }

    /// Device memory and counters.
    pub fn status(&self) -> NodeStatus {
        self.fleet.status()
    }

    /// Refuses new requests from now on and returns when everything accepted has ended.
    pub async fn drain(&self) {
        self.closing.store(true, Ordering::Release);
        while self.fleet.in_flight() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.fleet.stop();
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
        // The loops are gone and with them every other sender, so the janitor ends when it has done its work.
        self.retired = None;
        if let Some(measuring) = lock(&self.measuring).take() {
            let _ = measuring.join();
        }
        self.machine.keep();
        self.disks.keep();
        if let Some(janitor) = self.janitor.take() {
            let _ = janitor.join();
        }
    }
}

/// What was measured of the machine. Forecasts take GPUs of a node to be of the first one's kind.
fn open_machine(config: &NodeConfig, threads: usize, opened: &[Opened]) -> Machine {
    let first = opened.first().map(|opened| opened.pool.memory());
    let on_gpu = config.devices.first().is_some_and(|device| !device.is_cpu());
    let gpu = first.filter(|_| on_gpu).map(|memory| memory.name());
    Machine::open(&config.data, threads, first.map_or(1, |memory| memory.streams().len()), gpu)
}

/// With fewer bytes of types that can be compressed, there is less to be won than it takes to measure the disk.
const LEAST_COMPRESSIBLE: u64 = 64 << 20;

/// Opens the checkpoint that is to be deployed as `name`.
fn open_source(name: &str, path: &Path) -> Result<Source, DeployError> {
    check_name(name)?;
    let source = tangram_checkpoint::open(path)?;
    for warning in source.warnings() {
        tracing::warn!(model = name, "{warning}");
    }
    Ok(source)
}

fn check_name(name: &str) -> Result<(), DeployError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':' | '/' | '@');
    if name.is_empty() || name.len() > 200 || !name.chars().all(plain) {
        return Err(DeployError::BadName(format!(
            "model name {name:?} is not usable: 1 to 200 letters, digits and - _ . : / @ are"
        )));
    }
    Ok(())
}

fn cannot_run(name: &str, reason: &dyn std::fmt::Display) -> DeployError {
    DeployError::DoesNotFit(format!("model '{name}' cannot be run: {reason}"))
}

fn does_not_fit(name: &str, weights: u64, kv_per_token: u64, pool: u64) -> DeployError {
    DeployError::DoesNotFit(format!(
        "model '{name}' does not fit: it needs {weights} bytes for weights and {kv_per_token} bytes of KV per token, \
         the device pool has {pool} bytes; start the server with a larger --device-memory"
    ))
}
