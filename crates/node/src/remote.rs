//! Deploying from a remote source: the model is served while its bytes still come.
//!
//! 1. The small files and the headers of the weights are fetched. From then on everything is known but the weights: what
//!    the model is, whether it fits, where each tensor will lie in the data file.
//! 2. If the name is free, the model is announced under identities that stand for the true ones and belong to this one
//!    deployment, so that nothing else is ever taken for its tensors. Requests are accepted. A load of a tensor waits in
//!    the engine loop (`arrival.rs`) until the tensor lies in the data file, then takes the way that every load takes:
//!    verified by chunk hashes, made from the bytes that arrived. The forward pass runs behind the download, stage by stage.
//! 3. Tensors are fetched and imported in execution order. When all are here and the files match the hashes that their
//!    source states, the true identities replace the others: in the manifest, where tensors that this disk had before are
//!    referenced, in the catalogue by one transaction, and in the pool, so that what is resident stays (`Pool::identify`).
//!    Requests that began before run to their end on what they hold; their model is retired as if it had been replaced.
//! 4. When anything fails before that, the model is withdrawn: its requests end with an error, its directory goes. The
//!    download is kept and gone on with by the next attempt. A crash leaves the same: a directory that no catalogued model
//!    refers to, which the next start removes, and the download.
//!
//! Bytes are used before the hash of their whole file is known only where they cannot be changed on their way: over TLS,
//! or from this machine. Elsewhere, and where the name is taken by a model that goes on serving, requests see the model
//! when it is committed.

use std::cell::RefCell;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tangram_checkpoint::{Arriving, CheckpointError, Presence, open_arriving};
use tangram_remote::{Fetch, FetchProgress, Remote, RemoteError, RemoteSource};

use crate::api::{DeployError, DeployProgress, DeployStage, DeployedModel};
use crate::arrival::Arrival;
use crate::catalog::Deployment;
use crate::{Node, check_name, lock};

/// Whoever deploys, to be told how far it is; may stop it.
type Progress<'a> = &'a mut dyn FnMut(DeployProgress) -> ControlFlow<()>;
type Downloading<'a> = &'a mut dyn FnMut(FetchProgress) -> ControlFlow<()>;

/// Lets a reader of headers and tensors wait for a download.
#[derive(Debug)]
struct Gate(Arc<Fetch>);

impl Presence for Gate {
    fn wait_for(&self, path: &Path, bytes: Range<u64>) -> std::io::Result<()> {
        let waited = self.0.ensure(path, &bytes, &mut |_| ControlFlow::Continue(()));
        waited.map_err(std::io::Error::other)
    }
}

/// A model that is served before it is committed.
struct Early {
    arrival: Arc<Arrival>,
    model: Arc<DeployedModel>,
    deployment: Deployment,
}

impl Node {
    /// Brings the checkpoint at a remote source to this disk and deploys it as [`Node::deploy`] does. Where that is safe,
    /// the model is there for requests as soon as its headers are; their first token comes when the last weight has.
    /// What has arrived when this fails or is cancelled is kept for the next attempt.
    ///
    /// # Errors
    /// As [`Node::deploy`], and when the source cannot be brought here.
    pub fn deploy_remote(
        &self,
        name: &str,
        source: &RemoteSource,
        progress: Progress<'_>,
    ) -> Result<Arc<DeployedModel>, DeployError> {
        check_name(name)?;
        let remote = self.remote()?;
        let mut anew = true;
        loop {
            let told = RefCell::new(&mut *progress);
            let none = DeployProgress {
                stage: DeployStage::Downloading,
                bytes_done: 0,
                bytes_total: 0,
                bytes_reused: 0,
            };
            let fetch = remote.fetch(source, &|| (told.borrow_mut())(none).is_break()).map_err(refusal)?;
            match self.deploy_arriving(name, (source, &fetch), progress) {
                Err(DeployError::Remote(RemoteError::Changed { object })) if std::mem::take(&mut anew) => {
                    tracing::warn!(object, "it was changed at its source; the download begins anew");
                }
                deployed => {
                    // A checkpoint that cannot be read is no better the next time.
                    if matches!(deployed, Ok(_) | Err(DeployError::Checkpoint(_))) {
                        fetch.discard();
                    }
                    return deployed;
                }
            }
        }
    }

    /// The downloader. It has threads, which most nodes never need.
    fn remote(&self) -> Result<Arc<Remote>, DeployError> {
        let mut remote = lock(&self.remote);
        if let Some(remote) = &*remote {
            return Ok(remote.clone());
        }
        let (directory, options) = self.downloads.clone();
        Ok(remote.insert(Arc::new(Remote::new(directory, options)?)).clone())
    }

    fn deploy_arriving(
        &self,
        name: &str,
        (remote_source, fetch): (&RemoteSource, &Arc<Fetch>),
        progress: Progress<'_>,
    ) -> Result<Arc<DeployedModel>, DeployError> {
        let downloading = &mut |FetchProgress { bytes_done, bytes_total }| {
            let stage = DeployStage::Downloading;
            progress(DeployProgress { stage, bytes_done, bytes_total, bytes_reused: 0 })
        };
        fetch.ensure_assets(downloading).map_err(refusal)?;
        let gate: Arc<dyn Presence> = Arc::new(Gate(fetch.clone()));
        let source = open_arriving(fetch.path(), &gate).map_err(|error| cause(error, None))?;
        for warning in source.warnings() {
            tracing::warn!(model = name, "{warning}");
        }
        let weight_types = self.check_fits(name, &source)?;
        fetch.arrange(source.tensors().iter().filter_map(|tensor| source.span(tensor)));
        self.machine.measure(&weight_types);
        let (id, created) = lock(&self.catalog).begin()?;
        let directory = lock(&self.catalog).checkpoint_dir(&id);
        let mut early = None;
        let deployed = Arriving::begin(&source, &directory, &id)
            .map_err(|error| cause(error, Some(&directory)))
            .and_then(|mut arriving| {
                early = self.announce_early(name, created, fetch, &arriving);
                self.fill(&mut arriving, fetch, early.as_ref(), downloading, &directory)?;
                self.commit_arrived(name, (created, remote_source), arriving, early.as_ref())
            });
        match (&deployed, early) {
            (Ok(_), Some(early)) => self.retire(early.model.index, &early.deployment),
            (Ok(_), None) => {}
            (Err(error), Some(early)) => self.withdraw(name, &early, &error.to_string()),
            // What is left over, if even this fails, goes at the next start.
            (Err(_), None) => {
                let _ = std::fs::remove_dir_all(&directory);
            }
        }
        deployed
    }

    /// Announces a model of which only the headers are here, if its bytes can be trusted as they come and no other model
    /// has its name.
    fn announce_early(
        &self,
        name: &str,
        created: u64,
        fetch: &Fetch,
        arriving: &Arriving<'_>,
    ) -> Option<Early> {
        let catalog = lock(&self.catalog);
        if !fetch.is_guarded() || self.model(name).is_some() || catalog.models().contains_key(name) {
            return None;
        }
        let arrival = Arc::new(Arrival::new(arriving.manifest().tensors.len()));
        let deployment = Deployment { created, manifest: Arc::new(arriving.manifest().clone()) };
        let model = self.announce(&catalog, name, &deployment, Some(&arrival)).ok()?;
        Some(Early { arrival, model, deployment })
    }

    /// Imports tensors as they arrive, and waits until the files have been compared with their hashes.
    fn fill(
        &self,
        arriving: &mut Arriving<'_>,
        fetch: &Fetch,
        early: Option<&Early>,
        downloading: Downloading<'_>,
        directory: &PathBuf,
    ) -> Result<(), DeployError> {
        let wait = &mut |path: &Path, bytes: Range<u64>| {
            fetch.ensure(path, &bytes, downloading).map_err(|error| CheckpointError::Io {
                path: path.to_path_buf(),
                source: std::io::Error::other(error),
            })
        };
        let arrived = &mut |index, entry: &tangram_checkpoint::TensorEntry| {
            if let Some(early) = early {
                early.arrival.arrived(index, &entry.chunks);
                self.fleet.wake();
            }
        };
        arriving.fill(wait, arrived).map_err(|error| cause(error, Some(directory)))?;
        fetch.wait(downloading).map_err(refusal)
    }

    /// Makes what has arrived a deployment like any other.
    fn commit_arrived(
        &self,
        name: &str,
        (created, remote_source): (u64, &RemoteSource),
        arrived: Arriving<'_>,
        early: Option<&Early>,
    ) -> Result<Arc<DeployedModel>, DeployError> {
        let mut catalog = lock(&self.catalog);
        if self.closing.load(Ordering::Acquire) {
            return Err(DeployError::Cancelled);
        }
        let old = catalog.models().get(name).cloned().zip(self.model(name));
        let deployment = catalog.adopt(name, created, &remote_source.to_string(), arrived)?;
        if let Some(early) = early {
            let stand_ins = early.deployment.manifest.tensors.iter();
            let own = deployment.manifest.tensors.iter();
            let pairs: Vec<_> = stand_ins.zip(own).map(|(stand_in, own)| (stand_in.id, own.id)).collect();
            self.fleet.identify(&pairs);
        }
        self.announce_or_undo(catalog, name, &deployment, old)
    }

    /// Takes back a model that was announced early.
    fn withdraw(&self, name: &str, early: &Early, reason: &str) {
        early.arrival.fail(reason);
        let mut models = self.models.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if models.get(name).is_some_and(|model| model.index == early.model.index) {
            models.remove(name);
        }
        drop(models);
        self.fleet.set_models(|| self.models());
        self.fleet.withdraw(early.model.index, reason, self.cleaning(&early.deployment));
    }
}

fn refusal(error: RemoteError) -> DeployError {
    match error {
        RemoteError::Cancelled => DeployError::Cancelled,
        other => DeployError::Remote(other),
    }
}

/// What is behind an error of an import: the download, the data directory, or the checkpoint itself.
fn cause(error: CheckpointError, directory: Option<&PathBuf>) -> DeployError {
    match error {
        CheckpointError::Io { path, source } => {
            let remote = source.get_ref().and_then(|inner| inner.downcast_ref::<RemoteError>()).cloned();
            match remote {
                Some(remote) => refusal(remote),
                None if directory.is_some_and(|directory| path.starts_with(directory)) => {
                    DeployError::Storage { what: format!("writing {}", path.display()), source }
                }
                None => DeployError::Checkpoint(CheckpointError::Io { path, source }),
            }
        }
        other => DeployError::Checkpoint(other),
    }
}
