//! The data directory: which models are deployed, and the imported checkpoints on disk.
//!
//! ```text
//! DIR/catalog.redb              deployed name -> checkpoint id, time; locked by the running node
//! DIR/checkpoints/ID/           data.bin, manifest.json, tokenizer.json
//! DIR/staging/ID/               an import under way
//! DIR/damaged.jsonl             tensors that did not match their checksums (`damage.rs`)
//! ```
//! Invariants: a checkpoint becomes part of the catalogue by one committed transaction after its files are durable
//! under their final name; whatever no catalogued model refers to is litter and is removed at the next start. So a
//! process killed at any moment leaves either the whole model or nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use tangram_checkpoint::{
    self as checkpoint, AdapterSource, Arriving, ContentId, DATA_FILE, KnownTensor, Layout, Manifest, Source,
    TensorEntry,
};

use crate::api::{DeployError, DeployProgress, DeployStage};
use crate::damage::Damaged;

const DATABASE_FILE: &str = "catalog.redb";
const MODELS: TableDefinition<&str, &[u8]> = TableDefinition::new("models");

/// What the catalogue stores per deployed name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Record {
    checkpoint: String,
    created: u64,
    /// What it was imported from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    source: Option<String>,
}

/// A deployed model on disk.
#[derive(Clone, Debug)]
pub(crate) struct Deployment {
    pub(crate) created: u64,
    pub(crate) manifest: Arc<Manifest>,
}

/// What is deployed.
#[derive(Clone, Copy)]
pub(crate) enum Import<'a> {
    /// A model of its own, stored in this layout.
    Model(&'a Source, Layout),
    /// A model of its own whose bytes stay in the files in which they are.
    InPlace(&'a Source),
    /// An adapter on the model deployed under this name.
    Adapter(&'a AdapterSource, &'a str),
}

/// Why the data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// Another process has it.
    #[error(
        "data directory {} is in use by another tangram process; stop it, or choose another directory with --data",
        .0.display()
    )]
    Locked(PathBuf),
    /// The system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, with the path.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The database refused.
    #[error("catalogue {}: {message}", path.display())]
    Database {
        /// The database file.
        path: PathBuf,
        /// Its answer.
        message: String,
    },
}

impl From<CatalogError> for DeployError {
    fn from(error: CatalogError) -> Self {
        match error {
            CatalogError::Io { what, source } => DeployError::Storage { what, source },
            other => DeployError::Catalogue(other.to_string()),
        }
    }
}

fn database_error(root: &Path) -> impl Fn(&dyn std::fmt::Display) -> CatalogError + use<> {
    let path = root.join(DATABASE_FILE);
    move |error| CatalogError::Database { path: path.clone(), message: error.to_string() }
}

fn io_error(what: &str, path: &Path) -> impl FnOnce(io::Error) -> CatalogError {
    let what = format!("{what} {}", path.display());
    move |source| CatalogError::Io { what, source }
}

/// The deployed models and their files.
pub(crate) struct Catalog {
    root: PathBuf,
    /// `None` after an error of the disk, until it is opened again.
    database: Option<Database>,
    /// Records that may be on disk or not, because writing them failed, and what was there before. The next change puts
    /// that back.
    doubtful: BTreeMap<String, Option<Record>>,
    models: BTreeMap<String, Deployment>,
    /// Where each content is, and its bytes.
    contents: HashMap<ContentId, (KnownTensor, u64)>,
    /// Checkpoints that no deployed model refers to any more but that running requests may still read.
    retiring: BTreeMap<String, usize>,
    /// The record that the last change has replaced or removed.
    before: Option<Record>,
    damaged: Arc<Damaged>,
}

impl Catalog {
    /// Opens or makes the data directory, takes its lock and removes litter. A deployed model whose manifest cannot be
    /// read, or one of whose tensors is damaged, is reported in the second value and left out, its files untouched.
    pub(crate) fn open(root: &Path) -> Result<(Catalog, Vec<String>), CatalogError> {
        for dir in [root.to_path_buf(), root.join("checkpoints"), root.join("staging")] {
            fs::create_dir_all(&dir).map_err(io_error("creating", &dir))?;
        }
        let mut catalog = Catalog {
            root: root.to_path_buf(),
            database: None,
            doubtful: BTreeMap::new(),
            models: BTreeMap::new(),
            contents: HashMap::new(),
            retiring: BTreeMap::new(),
            before: None,
            damaged: Arc::new(Damaged::open(root)),
        };
        let mut problems = Vec::new();
        let mut unreadable = BTreeSet::new();
        for (name, record) in catalog.records()? {
            match checkpoint::read_manifest(&catalog.checkpoint_dir(&record.checkpoint)) {
                Ok(manifest) => {
                    if let Some(damage) = catalog.damage_of(&manifest) {
                        let from = record.source.as_deref().unwrap_or("its source");
                        problems.push(format!(
                            "model '{name}' cannot be used: {damage}; deploy it again from {from}"
                        ));
                        unreadable.extend(checkpoints_of(&manifest));
                        continue;
                    }
                    // It stays deployed: the file may come back, and what needs no loading is served.
                    let files = manifest.in_place.iter().flat_map(|in_place| &in_place.files);
                    let changes = files.filter_map(|file| file.check().err());
                    problems.extend(changes.map(|change| format!("model '{name}': {change}")));
                    let manifest = Arc::new(manifest);
                    catalog.models.insert(name, Deployment { created: record.created, manifest });
                }
                Err(error) => {
                    problems.push(format!("model '{name}' cannot be used, deploy it again: {error}"));
                    unreadable.insert(record.checkpoint);
                }
            }
        }
        catalog.index_contents();
        catalog.remove_litter(&unreadable)?;
        Ok((catalog, problems))
    }

    /// What is known to be damaged of a model, if anything is.
    fn damage_of(&self, manifest: &Manifest) -> Option<String> {
        manifest.tensors.iter().find_map(|tensor| {
            let (file, offset) = match (tensor.in_place, &manifest.in_place) {
                (Some(place), Some(in_place)) => {
                    (in_place.files.get(place.file as usize)?.path.clone(), place.offset)
                }
                _ => (self.data_file(&tensor.checkpoint), tensor.offset),
            };
            let what = format_args!("the tensor for {:?} in {} is damaged", tensor.role, file.display());
            self.damaged.has(&file, offset).then(|| what.to_string())
        })
    }

    /// Tensors that did not match their checksums.
    pub(crate) fn damaged(&self) -> &Arc<Damaged> {
        &self.damaged
    }

    /// The database, opened if it is not.
    fn database(&mut self) -> Result<&Database, CatalogError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => Database::create(self.root.join(DATABASE_FILE)).map_err(|error| match error {
                redb::DatabaseError::DatabaseAlreadyOpen => CatalogError::Locked(self.root.clone()),
                other => database_error(&self.root)(&other),
            })?,
        };
        Ok(self.database.insert(database))
    }

    fn records(&mut self) -> Result<Vec<(String, Record)>, CatalogError> {
        let records = self.read();
        if records.is_err() {
            self.database = None;
        }
        records
    }

    fn read(&mut self) -> Result<Vec<(String, Record)>, CatalogError> {
        let error = database_error(&self.root);
        let read = self.database()?.begin_read().map_err(|e| error(&e))?;
        let table = match read.open_table(MODELS) {
            Ok(table) => table,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
            Err(other) => return Err(error(&other)),
        };
        let mut records = Vec::new();
        for row in table.iter().map_err(|e| error(&e))? {
            let (name, value) = row.map_err(|e| error(&e))?;
            let record = serde_json::from_slice(value.value()).map_err(|e| error(&e))?;
            records.push((name.value().to_owned(), record));
        }
        Ok(records)
    }

    /// Removes everything from the checkpoint and staging directories that nothing refers to.
    fn remove_litter(&self, keep: &BTreeSet<String>) -> Result<(), CatalogError> {
        let referenced = self.referenced();
        for (dir, all) in [("staging", true), ("checkpoints", false)] {
            let dir = self.root.join(dir);
            for entry in fs::read_dir(&dir).map_err(io_error("listing", &dir))? {
                let entry = entry.map_err(io_error("listing", &dir))?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if all || !(referenced.contains(name.as_str()) || keep.contains(&name)) {
                    fs::remove_dir_all(entry.path()).map_err(io_error("removing", &entry.path()))?;
                }
            }
        }
        Ok(())
    }

    /// Checkpoints that a deployed model is, or whose file holds a tensor of one, or that are still being read.
    fn referenced(&self) -> BTreeSet<&str> {
        let of_models = self.models.values().flat_map(|deployment| {
            let tensors = deployment.manifest.tensors.iter().map(|tensor| tensor.checkpoint.as_str());
            tensors.chain([deployment.manifest.checkpoint.as_str()])
        });
        of_models.chain(self.retiring.keys().map(String::as_str)).collect()
    }

    fn index_contents(&mut self) {
        self.contents.clear();
        for deployment in self.models.values() {
            for tensor in stored_tensors(&deployment.manifest) {
                self.contents.entry(tensor.id).or_insert_with(|| (KnownTensor::from(tensor), tensor.bytes));
            }
        }
    }

    /// Whether the stored bytes of a tensor still match their checksums. A deployment must not refer to damaged bytes:
    /// deploying again is how a damaged model is repaired.
    fn is_intact(&self, known: &KnownTensor, bytes: u64) -> bool {
        let path = self.data_file(&known.checkpoint);
        let Ok(file) = File::open(&path) else { return false };
        if self.damaged.has(&path, known.offset) {
            return false;
        }
        let mut buffer = vec![0; checkpoint::CHUNK_BYTES.min(bytes) as usize];
        known.chunks.iter().zip(0u64..).all(|(sum, index)| {
            let start = index * checkpoint::CHUNK_BYTES;
            let len = checkpoint::stored_chunk_bytes(&known.stored, bytes, index as usize) as usize;
            let Some(chunk) = buffer.get_mut(..len) else { return false };
            file.read_exact_at(chunk, known.offset + start).is_ok() && sum.matches(chunk)
        })
    }

    /// Deployed models by name.
    pub(crate) fn models(&self) -> &BTreeMap<String, Deployment> {
        &self.models
    }

    /// Directory of a checkpoint.
    pub(crate) fn checkpoint_dir(&self, checkpoint: &str) -> PathBuf {
        self.root.join("checkpoints").join(checkpoint)
    }

    /// A checkpoint's data file.
    pub(crate) fn data_file(&self, checkpoint: &str) -> PathBuf {
        self.checkpoint_dir(checkpoint).join(DATA_FILE)
    }

    /// Size of a checkpoint's data file, bytes; 0 if it cannot be read.
    pub(crate) fn data_bytes(&self, checkpoint: &str) -> u64 {
        fs::metadata(self.data_file(checkpoint)).map_or(0, |metadata| metadata.len())
    }

    /// Imports a checkpoint and commits it under `name`. An older deployment of that name is replaced; its files are
    /// kept until [`Catalog::retired`] is called with its manifest. `origin` is what to tell the user to import from
    /// again if it is damaged one day.
    pub(crate) fn deploy(
        &mut self,
        name: &str,
        source: Import<'_>,
        origin: &Path,
        progress: &mut dyn FnMut(DeployProgress) -> ControlFlow<()>,
    ) -> Result<Deployment, DeployError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = format!("{:016x}", now.as_nanos() as u64);
        let staging = self.root.join("staging").join(&id);
        fs::create_dir(&staging).map_err(io_error("creating", &staging))?;
        let imported = self.import_and_publish(&id, source, &staging, progress);
        let record = Record {
            checkpoint: id.clone(),
            created: now.as_secs(),
            source: Some(std::path::absolute(origin).as_deref().unwrap_or(origin).display().to_string()),
        };
        let committed = imported.and_then(|manifest| {
            self.commit(name, Some(&record))?;
            Ok(Deployment { created: record.created, manifest: Arc::new(manifest) })
        });
        // If the catalogue may name the checkpoint, its files stay. What is left over goes at the next start.
        if committed.is_err() && !self.doubtful.contains_key(name) {
            let _ = fs::remove_dir_all(&staging);
            let _ = fs::remove_dir_all(self.checkpoint_dir(&id));
        }
        let deployment = committed?;
        // A file that is served in place keeps its name: what was wrong with it was not there when it was read just now.
        if let (Some(in_place), None) = (&deployment.manifest.in_place, &deployment.manifest.base) {
            in_place.files.iter().for_each(|file| self.damaged.forget(&file.path));
        }
        self.replace(name, deployment.clone());
        Ok(deployment)
    }

    fn replace(&mut self, name: &str, deployment: Deployment) {
        let replaced = self.models.insert(name.to_owned(), deployment);
        self.index_contents();
        if let Some(replaced) = replaced {
            self.retire(&replaced);
        }
    }

    /// A directory for a checkpoint whose bytes are still coming; its name is the checkpoint's id. It lies where
    /// checkpoints lie, so that it can be read from before it is catalogued by [`Catalog::adopt`]; until then it is litter
    /// to the next start. Also gives the time.
    pub(crate) fn begin(&self) -> Result<(String, u64), CatalogError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = format!("{:016x}", now.as_nanos() as u64);
        let dir = self.checkpoint_dir(&id);
        fs::create_dir(&dir).map_err(io_error("creating", &dir))?;
        Ok((id, now.as_secs()))
    }

    /// Commits a checkpoint that has arrived under `name`, as [`Catalog::deploy`] does.
    pub(crate) fn adopt(
        &mut self,
        name: &str,
        created: u64,
        origin: &str,
        arrived: Arriving<'_>,
    ) -> Result<Deployment, DeployError> {
        let id = arrived.manifest().checkpoint.clone();
        let known = |content: &ContentId| {
            let (known, bytes) = self.contents.get(content)?;
            self.is_intact(known, *bytes).then(|| known.clone())
        };
        let manifest = Arc::new(arrived.settle(&known)?);
        let parent = self.root.join("checkpoints");
        File::open(&parent).and_then(|dir| dir.sync_all()).map_err(io_error("syncing", &parent))?;
        let record = Record { checkpoint: id, created, source: Some(origin.to_owned()) };
        self.commit(name, Some(&record))?;
        let deployment = Deployment { created, manifest };
        self.replace(name, deployment.clone());
        Ok(deployment)
    }

    /// Writes a checkpoint and gives its directory its final name. Nothing refers to it yet.
    fn import_and_publish(
        &self,
        id: &str,
        source: Import<'_>,
        staging: &Path,
        progress: &mut dyn FnMut(DeployProgress) -> ControlFlow<()>,
    ) -> Result<Manifest, DeployError> {
        let known = |content: &ContentId| {
            let (known, bytes) = self.contents.get(content)?;
            self.is_intact(known, *bytes).then(|| known.clone())
        };
        let progress = &mut |import| {
            let checkpoint::ImportProgress { bytes_done, bytes_total, bytes_reused } = import;
            progress(DeployProgress { stage: DeployStage::Importing, bytes_done, bytes_total, bytes_reused })
        };
        let imported = match source {
            Import::Model(source, layout) => {
                checkpoint::import_as(layout, source, staging, id, &known, progress)
            }
            Import::InPlace(source) => checkpoint::import_in_place(source, staging, id, &known, progress),
            Import::Adapter(adapter, base) => {
                let deployment = self.models.get(base);
                let manifest =
                    &*deployment.ok_or_else(|| DeployError::UnknownModel(base.to_owned()))?.manifest;
                let dir = &self.checkpoint_dir(&manifest.checkpoint);
                let base = checkpoint::Base { name: base, manifest, dir };
                checkpoint::import_adapter(adapter, base, staging, id, &known, progress)
            }
        };
        let manifest = imported.map_err(|error| match error {
            checkpoint::CheckpointError::Cancelled => DeployError::Cancelled,
            // Writing failed, not reading: not the checkpoint's fault but the data directory's.
            checkpoint::CheckpointError::Io { path, source } if path.starts_with(staging) => {
                DeployError::Storage { what: format!("writing {}", path.display()), source }
            }
            other => DeployError::Checkpoint(other),
        })?;
        let published = self.checkpoint_dir(id);
        fs::rename(staging, &published).map_err(io_error("publishing", &published))?;
        let parent = self.root.join("checkpoints");
        File::open(&parent).and_then(|dir| dir.sync_all()).map_err(io_error("syncing", &parent))?;
        Ok(manifest)
    }

    /// Changes the record of `name`. After an error nothing is changed, or it is `doubtful`.
    fn commit(&mut self, name: &str, record: Option<&Record>) -> Result<(), CatalogError> {
        let before = self.record(name)?;
        let Err(failed) = self.write(name, record) else {
            self.doubtful.clear();
            self.before = before;
            return Ok(());
        };
        // After an error of the disk the database refuses everything until it is opened anew, and only then is it known
        // what the disk has.
        self.database = None;
        match self.record(name) {
            Ok(found) if found.as_ref() == record => {
                self.before = before;
                Ok(())
            }
            Ok(_) => Err(failed),
            Err(error) => {
                self.doubtful.entry(name.to_owned()).or_insert(before);
                tracing::error!(%error, "the catalogue cannot be read; the next change tries again");
                Err(failed)
            }
        }
    }

    /// The record of `name`, as it is on disk.
    fn record(&mut self, name: &str) -> Result<Option<Record>, CatalogError> {
        let records = self.records()?;
        Ok(records.into_iter().find(|(found, _)| found == name).map(|(_, record)| record))
    }

    /// Writes the record of `name`, and those that are doubtful, in one transaction.
    fn write(&mut self, name: &str, record: Option<&Record>) -> Result<(), CatalogError> {
        let error = database_error(&self.root);
        let write = self.database()?.begin_write().map_err(|e| error(&e))?;
        {
            let mut table = write.open_table(MODELS).map_err(|e| error(&e))?;
            let doubtful = self.doubtful.iter().map(|(name, before)| (name.as_str(), before.as_ref()));
            for (name, record) in doubtful.chain([(name, record)]) {
                match record {
                    Some(record) => {
                        let value = serde_json::to_vec(record).map_err(|e| error(&e))?;
                        table.insert(name, value.as_slice()).map_err(|e| error(&e))?;
                    }
                    None => {
                        table.remove(name).map_err(|e| error(&e))?;
                    }
                }
            }
        }
        write.commit().map_err(|e| error(&e))
    }

    /// Gives `name` back to the deployment in whose place another one was just put, which cannot be run; that one is as
    /// one that was removed.
    ///
    /// # Errors
    /// When the catalogue cannot be written; then nothing is changed.
    pub(crate) fn restore(&mut self, name: &str, old: &Deployment) -> Result<(), CatalogError> {
        let checkpoint = &old.manifest.checkpoint;
        let before = self.before.take().filter(|before| before.checkpoint == *checkpoint);
        let record = before.unwrap_or_else(|| Record {
            checkpoint: checkpoint.clone(),
            created: old.created,
            source: None,
        });
        self.commit(name, Some(&record))?;
        self.unretire(&old.manifest);
        self.replace(name, old.clone());
        Ok(())
    }

    /// Takes a model out of the catalogue; its files are kept until [`Catalog::retired`] is called with its manifest.
    pub(crate) fn remove(&mut self, name: &str) -> Result<(), DeployError> {
        if !self.models.contains_key(name) {
            return Err(DeployError::UnknownModel(name.to_owned()));
        }
        self.commit(name, None)?;
        let deployment =
            self.models.remove(name).ok_or_else(|| DeployError::UnknownModel(name.to_owned()))?;
        self.index_contents();
        self.retire(&deployment);
        Ok(())
    }

    fn retire(&mut self, deployment: &Deployment) {
        for checkpoint in checkpoints_of(&deployment.manifest) {
            *self.retiring.entry(checkpoint).or_insert(0) += 1;
        }
    }

    fn unretire(&mut self, manifest: &Manifest) {
        for checkpoint in checkpoints_of(manifest) {
            if let Some(readers) = self.retiring.get_mut(&checkpoint) {
                *readers -= 1;
                if *readers == 0 {
                    self.retiring.remove(&checkpoint);
                }
            }
        }
    }

    /// The last request of a replaced or removed deployment has ended: removes files that nothing needs any more and
    /// gives the room of dead tensors in files that others still refer to back to the file system.
    pub(crate) fn retired(&mut self, manifest: &Manifest) {
        self.unretire(manifest);
        let checkpoints = checkpoints_of(manifest);
        let referenced = self.referenced();
        for checkpoint in checkpoints.iter().filter(|checkpoint| !referenced.contains(checkpoint.as_str())) {
            if let Err(error) = fs::remove_dir_all(self.checkpoint_dir(checkpoint)) {
                tracing::warn!(%checkpoint, %error, "could not remove a checkpoint; the next start will");
            }
        }
        let in_place = self.models.values().flat_map(|deployment| &deployment.manifest.in_place);
        let users: BTreeSet<&Path> =
            in_place.flat_map(|in_place| &in_place.files).map(|file| file.path.as_path()).collect();
        // What lies here and is not used any more has just been removed.
        tangram_store::drop_unused(|path| path.starts_with(&self.root) || users.contains(path));
        let live: BTreeSet<(&str, u64)> = self
            .models
            .values()
            .flat_map(|deployment| stored_tensors(&deployment.manifest))
            .map(|tensor| (tensor.checkpoint.as_str(), tensor.offset))
            .collect();
        for tensor in stored_tensors(manifest) {
            let key = (tensor.checkpoint.as_str(), tensor.offset);
            if referenced.contains(key.0) && !live.contains(&key) && !self.retiring.contains_key(key.0) {
                let path = self.checkpoint_dir(&tensor.checkpoint).join(DATA_FILE);
                // Saves room where the file system can; where it cannot, the bytes stay until the file goes.
                let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
                if let Ok(file) = fs::OpenOptions::new().write(true).open(&path) {
                    let _ = rustix::fs::fallocate(&file, flags, tensor.offset, tensor.bytes);
                }
            }
        }
    }
}

/// The tensors whose bytes are in the data directory, not in a file of the user's.
fn stored_tensors(manifest: &Manifest) -> impl Iterator<Item = &TensorEntry> {
    manifest.tensors.iter().filter(|tensor| tensor.in_place.is_none())
}

/// The checkpoints whose files a model needs.
fn checkpoints_of(manifest: &Manifest) -> BTreeSet<String> {
    let tensors = manifest.tensors.iter().map(|tensor| tensor.checkpoint.clone());
    tensors.chain([manifest.checkpoint.clone()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tangram_testkit::{Family, RandomModel, write_hf_model};

    #[test]
    fn a_start_says_what_is_damaged_and_where_to_get_it_again() {
        let (source, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write_hf_model(source.path(), &RandomModel::tiny(Family::Llama));
        let import = checkpoint::open(source.path()).unwrap();
        let go_on = &mut |_| ControlFlow::Continue(());
        let (mut catalog, _) = Catalog::open(root.path()).unwrap();
        let old = catalog
            .deploy("m", Import::Model(&import, Layout::Plain), source.path(), go_on)
            .unwrap()
            .manifest;
        let file = catalog.data_file(&old.checkpoint);
        catalog.damaged().add(&file, old.tensors[1].offset, "t");
        drop(catalog);
        let (mut catalog, problems) = Catalog::open(root.path()).unwrap();
        let [problem] = problems.as_slice() else { panic!("{problems:?}") };
        let role = format!("{:?}", old.tensors[1].role);
        for part in ["'m'", &role, "damaged", "deploy it again", source.path().to_str().unwrap()] {
            assert!(problem.contains(part), "{problem}");
        }
        assert!(catalog.models().is_empty() && file.exists());
        catalog.deploy("m", Import::Model(&import, Layout::Plain), source.path(), go_on).unwrap();
        drop(catalog);
        let (catalog, problems) = Catalog::open(root.path()).unwrap();
        assert!(problems.is_empty() && catalog.models().contains_key("m"), "{problems:?}");
        assert!(!file.exists(), "nothing refers to the damaged file any more");
    }

    #[test]
    fn a_damaged_file_in_place_is_good_again_when_it_is_deployed_again() {
        let (source, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write_hf_model(source.path(), &RandomModel::tiny(Family::Llama));
        let import = checkpoint::open(source.path()).unwrap();
        let go_on = &mut |_| ControlFlow::Continue(());
        let (mut catalog, _) = Catalog::open(root.path()).unwrap();
        let manifest = catalog.deploy("m", Import::InPlace(&import), source.path(), go_on).unwrap().manifest;
        let file = manifest.in_place.as_ref().unwrap().files[0].path.clone();
        catalog.damaged().add(&file, manifest.tensors[1].in_place.unwrap().offset, "t");
        drop(catalog);
        let (mut catalog, problems) = Catalog::open(root.path()).unwrap();
        assert!(matches!(problems.as_slice(), [problem] if problem.contains("damaged")), "{problems:?}");
        catalog.deploy("m", Import::InPlace(&import), source.path(), go_on).unwrap();
        drop(catalog);
        let (catalog, problems) = Catalog::open(root.path()).unwrap();
        assert!(problems.is_empty() && catalog.models().contains_key("m"), "{problems:?}");
    }
}
