//! A deployed model made ready to run: the executor's plan, where each tensor lies, what it needs of the pool.
//!
//! Costs no device memory: a model is only a list of tensors until a request asks for it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tangram_checkpoint::{Checksum, Hash, InPlaceFile, Manifest, Role, TensorEntry};
use tangram_device::Extent;
use tangram_engine::{Adapter, Model, TensorDesc, Tensors};
use tangram_pool::{CatalogueEntry, LoadFailure, Tensor, Vacancy, pages_alone};
use tangram_store::{Compressed, TensorLoad, Wake};

use crate::api::TensorProfile;
use crate::arrival::{Arrival, Waiting};
use crate::catalog::{Catalog, Deployment};
use crate::forecast::{Forecast, footprint};
use crate::machine::Machine;

/// A smaller token embedding is here before its rows could be.
const LEAST_EMBEDDING: u64 = 1 << 20;

/// Where a tensor's bytes are on disk.
#[derive(Clone, Debug)]
pub(crate) struct Location {
    pub(crate) file: PathBuf,
    pub(crate) offset: u64,
    pub(crate) chunks: Arc<[Checksum]>,
    pub(crate) compressed: Option<Compressed>,
    pub(crate) name: String,
    /// What the file must still be, if it is the user's.
    pub(crate) in_place: Option<Arc<InPlaceFile>>,
    /// Of a model that is still arriving: where it is told whether the tensor is there, and under which number.
    pub(crate) arrival: Option<(Arc<Arrival>, usize)>,
}

impl Location {
    /// The task of filling `vacancy` from here; what waits if the bytes are not here yet.
    pub(crate) fn load(&self, vacancy: Vacancy) -> Result<TensorLoad, Box<Waiting>> {
        let chunks = match &self.arrival {
            None => self.chunks.clone(),
            Some((arrival, index)) => match arrival.chunks(*index) {
                Some(chunks) => chunks,
                None => return Err(Box::new(Waiting { vacancy, location: self.clone() })),
            },
        };
        let (file, compressed, name) = (self.file.clone(), self.compressed.clone(), self.name.clone());
        Ok(TensorLoad { vacancy, file, offset: self.offset, chunks, compressed, name })
    }
}

/// The tasks of filling vacancies from where their tensors lie, and those whose bytes are not on this disk yet. One whose
/// file is no longer what was deployed fails here, with the reason; `wake` is called for it as the store would.
pub(crate) fn loads<'a>(
    vacancies: impl Iterator<Item = (Vacancy, &'a Location)>,
    wake: &Wake,
) -> (Vec<TensorLoad>, Vec<Waiting>) {
    let mut checked: HashMap<&Path, Result<(), String>> = HashMap::new();
    let (mut ready, mut waiting) = (Vec::new(), Vec::new());
    for (vacancy, location) in vacancies {
        if let Some(in_place) = &location.in_place
            && let Err(change) = checked.entry(&in_place.path).or_insert_with(|| in_place.check())
        {
            vacancy.fail(LoadFailure::Failed(change.clone()));
            wake();
            continue;
        }
        match location.load(vacancy) {
            Ok(load) => ready.push(load),
            Err(waits) => waiting.push(*waits),
        }
    }
    (ready, waiting)
}

/// Everything about a deployed model that does not change while it runs. "Unique" tensors are those of the manifest
/// without the ones whose content came earlier in it; residency and leases speak of unique tensors.
pub(crate) struct ModelPlan {
    /// The model; of an adapter, its base.
    pub(crate) engine: Arc<Model>,
    /// What an adapter adds to it.
    pub(crate) adapter: Option<AdapterPlan>,
    pub(crate) manifest: Arc<Manifest>,
    /// Catalogue entries of the unique tensors, in the order in which they are loaded ([`load_order`]).
    pub(crate) entries: Vec<CatalogueEntry>,
    /// Where the unique tensors lie.
    pub(crate) locations: Vec<Location>,
    /// Unique tensor of each tensor in the manifest.
    pub(crate) unique_of: Vec<usize>,
    /// For each stage of the forward pass, how many unique tensors it and all earlier ones need.
    pub(crate) needed_by_stage: Vec<usize>,
    /// The token embedding, of a model whose passes can do with rows of it until their last stage.
    pub(crate) early_rows: Option<EarlyRows>,
    /// Sizes of the address ranges that the entries refer to, of data files and of what is read in place, bytes.
    pub(crate) data_bytes: Vec<(String, u64)>,
    /// What it takes of the pool, and how long it takes.
    pub(crate) forecast: Arc<Forecast>,
    /// Equal for models that compute the same function from the same tensors, whatever they are called.
    pub(crate) identity: Hash,
}

/// A token embedding whose rows can be read before it is loaded.
#[derive(Clone, Copy)]
pub(crate) struct EarlyRows {
    /// Which unique tensor it is.
    pub(crate) unique: usize,
    pub(crate) row_bytes: usize,
}

/// What an adapter adds to its base.
pub(crate) struct AdapterPlan {
    pub(crate) engine: Arc<Adapter>,
    /// Identity of the base: sequences run in batches of any model that has it.
    pub(crate) base: Hash,
    /// Unique tensors that the base does not have, in execution order.
    pub(crate) own: Vec<usize>,
    /// Where each of the adapter's tensors is.
    pub(crate) places: Arc<[AdapterPlace]>,
}

/// Where a tensor of an adapter is: its content may happen to be one of the base's.
#[derive(Clone, Copy)]
pub(crate) enum AdapterPlace {
    /// Index in the lease of the adapter's own tensors.
    Own(usize),
    /// Index in the lease of the base's unique tensors.
    Base(usize),
}

impl ModelPlan {
    /// Builds the plan; the error is for the user.
    pub(crate) fn new(
        catalog: &Catalog,
        deployment: &Deployment,
        machine: &Arc<Machine>,
        page_bytes: u64,
        arrival: Option<&Arc<Arrival>>,
    ) -> Result<ModelPlan, String> {
        let manifest = deployment.manifest.clone();
        let descs = manifest.tensors.iter().map(|tensor| TensorDesc {
            role: tensor.role,
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
        });
        let (of_adapter, of_base): (Vec<_>, Vec<_>) = descs.partition(|desc| is_adapters(desc.role));
        let engine = Model::new(manifest.spec.base(), &of_base).map_err(|error| error.to_string())?;
        let engine = Arc::new(engine);
        let stages = manifest.spec.stages();
        let (mut entries, mut locations, mut unique_of) =
            (Vec::<CatalogueEntry>::new(), Vec::new(), Vec::new());
        let mut needed_by_stage = vec![0; stages];
        let mut bytes_by_stage = vec![0; stages];
        let files = manifest.in_place.iter().flat_map(|in_place| &in_place.files);
        let files: Vec<Arc<InPlaceFile>> = files.cloned().map(Arc::new).collect();
        let mut seen = HashMap::new();
        let (order, late) = load_order(&manifest, arrival.is_none());
        unique_of.resize(manifest.tensors.len(), 0);
        for index in order {
            let tensor = &manifest.tensors[index];
            let stage = if late == Some(index) { stages - 1 } else { tensor.stage as usize };
            let unique = *seen.entry(tensor.id).or_insert_with(|| {
                if let Some(bytes) = bytes_by_stage.get_mut(stage) {
                    *bytes += tensor.bytes;
                }
                entries.push(CatalogueEntry {
                    id: tensor.id,
                    checkpoint: range_of(tensor),
                    offset: tensor.offset,
                    bytes: tensor.bytes,
                    depth: stage as f64 / stages as f64,
                });
                let mut location = locate(catalog, tensor, &files);
                location.arrival = arrival.map(|arrival| (arrival.clone(), index));
                locations.push(location);
                entries.len() - 1
            });
            unique_of[index] = unique;
            if let Some(needed) = needed_by_stage.get_mut(stage) {
                *needed = entries.len();
            }
        }
        // A stage without tensors of its own needs what came before it.
        for stage in 1..stages {
            needed_by_stage[stage] = needed_by_stage[stage].max(needed_by_stage[stage - 1]);
        }
        let mut data_bytes: Vec<(String, u64)> = Vec::new();
        for (entry, location) in entries.iter().zip(&locations) {
            if !data_bytes.iter().any(|(range, _)| *range == entry.checkpoint) {
                let bytes = match (&location.in_place, &manifest.in_place) {
                    (Some(_), Some(in_place)) => in_place.range_bytes,
                    _ => catalog.data_bytes(&entry.checkpoint),
                };
                data_bytes.push((entry.checkpoint.clone(), bytes));
            }
        }
        for entry in &entries {
            let size = data_bytes.iter().find(|(checkpoint, _)| *checkpoint == entry.checkpoint);
            // Whatever a manifest says, its numbers must not wrap around.
            let end = entry.offset.checked_add(entry.bytes);
            if size.zip(end).is_none_or(|(&(_, size), end)| end > size) {
                return Err("its data file is missing or truncated; deploy the model again".to_owned());
            }
        }
        let places = entries.iter().map(|entry| (entry.checkpoint.as_str(), entry.offset, entry.bytes));
        let weight_pages = pages_alone(places, page_bytes);
        let footprint = footprint(&engine, weight_pages, page_bytes);
        let forecast = Arc::new(Forecast::new(engine.clone(), machine.clone(), footprint, bytes_by_stage));
        let adapter = match manifest.spec.updates.is_empty() {
            true => None,
            false => Some(AdapterPlan::new(&manifest, &of_adapter, &unique_of)?),
        };
        let early_rows = late.and_then(|index| {
            Some(EarlyRows { unique: *unique_of.get(index)?, row_bytes: engine.token_row_bytes() })
        });
        Ok(ModelPlan {
            identity: identity(&manifest)?,
            engine,
            adapter,
            manifest,
            entries,
            locations,
            unique_of,
            needed_by_stage,
            early_rows,
            data_bytes,
            forecast,
        })
    }

    /// Whether the model is still arriving, so that how fast it loads says nothing about this machine.
    pub(crate) fn is_arriving(&self) -> bool {
        self.locations.iter().any(|location| location.arrival.is_some())
    }

    /// Bytes of the unique tensors: what the model takes on a device.
    pub(crate) fn unique_bytes(&self) -> u64 {
        self.entries.iter().map(|entry| entry.bytes).sum()
    }

    /// Bytes of the unique tensors that are read from files of the user's.
    pub(crate) fn in_place_bytes(&self) -> u64 {
        let tensors = self.entries.iter().zip(&self.locations);
        tensors.filter(|(_, location)| location.in_place.is_some()).map(|(entry, _)| entry.bytes).sum()
    }

    /// The unique tensors, for a simulator.
    pub(crate) fn tensor_profiles(&self) -> Vec<TensorProfile> {
        let mut stage = 0;
        let profile = |(index, entry): (usize, &CatalogueEntry)| {
            while self.needed_by_stage.get(stage).is_some_and(|&needed| needed <= index) {
                stage += 1;
            }
            TensorProfile { content: entry.id.to_hex(), bytes: entry.bytes, stage: stage as u32 }
        };
        self.entries.iter().enumerate().map(profile).collect()
    }

    /// KV blocks for a sequence of this many tokens (0 for models without a KV cache).
    pub(crate) fn kv_blocks(&self, tokens: usize) -> usize {
        self.forecast.footprint().kv_blocks(tokens as u64) as usize
    }
}

impl AdapterPlan {
    fn new(manifest: &Manifest, descs: &[TensorDesc], unique_of: &[usize]) -> Result<AdapterPlan, String> {
        let engine = Adapter::new(&manifest.spec, descs).map_err(|error| error.to_string())?;
        // In the order in which the base's own plan numbers them: by first appearance.
        let mut of_base: Vec<usize> = Vec::new();
        let mut index_in_base = HashMap::new();
        let (order, _) = load_order(manifest, true);
        for unique in of_role(manifest, unique_of, &order, |role| !is_adapters(role)) {
            index_in_base.entry(unique).or_insert_with(|| {
                of_base.push(unique);
                of_base.len() - 1
            });
        }
        let mut own: Vec<usize> = Vec::new();
        let mut index_in_own = HashMap::new();
        let places = of_role(manifest, unique_of, &order, is_adapters).into_iter().map(|unique| {
            if let Some(&index) = index_in_base.get(&unique) {
                return AdapterPlace::Base(index);
            }
            AdapterPlace::Own(*index_in_own.entry(unique).or_insert_with(|| {
                own.push(unique);
                own.len() - 1
            }))
        });
        let places = places.collect();
        let base = identity(&manifest.without_adapter())?;
        Ok(AdapterPlan { engine: Arc::new(engine), base, own, places })
    }
}

/// The address range of a tensor: that of the data file in which it lies, or the one for all of a checkpoint's tensors
/// that are read in place. The name of a checkpoint has no slash.
fn range_of(tensor: &TensorEntry) -> String {
    match tensor.in_place {
        None => tensor.checkpoint.clone(),
        Some(_) => format!("{}/in-place", tensor.checkpoint),
    }
}

/// Where a tensor's bytes are. `files` are those that the manifest lists.
fn locate(catalog: &Catalog, tensor: &TensorEntry, files: &[Arc<InPlaceFile>]) -> Location {
    let (chunks, name) = (tensor.chunks.clone().into(), role_name(tensor.role));
    let in_place = tensor.in_place.and_then(|place| Some((place, files.get(place.file as usize)?)));
    match in_place {
        Some((place, file)) => Location {
            file: file.path.clone(),
            offset: place.offset,
            chunks,
            compressed: None,
            name,
            in_place: Some(file.clone()),
            arrival: None,
        },
        None => Location {
            file: catalog.checkpoint_dir(&tensor.checkpoint).join(tangram_checkpoint::DATA_FILE),
            offset: tensor.offset,
            chunks,
            compressed: Compressed::of(tensor),
            name,
            in_place: None,
            arrival: None,
        },
    }
}

/// Whether a tensor belongs to an adapter and not to its base.
fn is_adapters(role: Role) -> bool {
    matches!(role, Role::LowRank(..))
}

/// The unique tensors of those tensors of a manifest whose role is wanted, in this order.
fn of_role(
    manifest: &Manifest,
    unique_of: &[usize],
    order: &[usize],
    wanted: impl Fn(Role) -> bool,
) -> Vec<usize> {
    let tensors =
        order.iter().filter_map(|&index| Some((manifest.tensors.get(index)?, unique_of.get(index)?)));
    tensors.filter(|(tensor, _)| wanted(tensor.role)).map(|(_, &unique)| unique).collect()
}

/// The order in which the tensors of a manifest are loaded: that of execution, in which they stand there. With
/// `rows_first` the token embedding, of which a pass needs only the rows of its tokens before the head, goes to the end
/// (of the base's tensors; behind them are an adapter's own) if its rows can be read from the file; it is the second of
/// the results then. A quarter of the bytes of a small model is not waited for that way.
fn load_order(manifest: &Manifest, rows_first: bool) -> (Vec<usize>, Option<usize>) {
    let tensors = &manifest.tensors;
    let late = tensors.iter().position(|tensor| tensor.role == Role::TokenEmbedding);
    let late = late.filter(|&index| {
        let embedding = &tensors[index];
        rows_first && embedding.stored.is_empty() && embedding.bytes >= LEAST_EMBEDDING
    });
    let others = (0..tensors.len()).filter(|&index| late != Some(index));
    (others.chain(late).collect(), late)
}

/// [`ModelPlan::identity`].
fn identity(manifest: &Manifest) -> Result<Hash, String> {
    let tensors: Vec<_> = manifest.tensors.iter().map(|tensor| (tensor.role, tensor.id)).collect();
    let text = serde_json::to_vec(&(&manifest.spec, tensors)).map_err(|error| error.to_string())?;
    Ok(Hash::of(&text))
}

fn role_name(role: Role) -> String {
    match serde_json::to_value(role) {
        Ok(serde_json::Value::String(name)) => name,
        Ok(value) => value.to_string(),
        Err(_) => "?".to_owned(),
    }
}

/// The tensors of a leased model and of the adapters of a pass, as the executor asks for them. What has not arrived is not
/// there; the worker only declares stages ready that are.
pub(crate) struct LeasedTensors<'a> {
    pub(crate) tensors: &'a [Arc<Tensor>],
    pub(crate) unique_of: &'a [usize],
    /// For each adapter of the pass its own tensors and where its tensors are.
    pub(crate) adapters: Vec<(&'a [Arc<Tensor>], &'a [AdapterPlace])>,
}

impl Tensors for LeasedTensors<'_> {
    fn tensor(&self, index: usize) -> Option<&Extent> {
        self.tensors.get(*self.unique_of.get(index)?)?.extent()
    }

    fn adapter_tensor(&self, adapter: usize, index: usize) -> Option<&Extent> {
        let (own, places) = self.adapters.get(adapter)?;
        match *places.get(index)? {
            AdapterPlace::Own(index) => own.get(index)?.extent(),
            AdapterPlace::Base(index) => self.tensors.get(index)?.extent(),
        }
    }
}
