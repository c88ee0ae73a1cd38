//! Finds out what there is to fetch of a source: lists it, chooses the files of a checkpoint, asks what each of them is.

use std::path::PathBuf;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};

use crate::cloud::Bucket;
use crate::fetch::{Fetch, RemoteFile};
use crate::http::{Http, read_small};
use crate::hub::{Commit, Hub};
use crate::listing::{self, ASSETS, CONFIG, Chosen, INDEX, WHOLE};
use crate::object::{Failure, Object, Stat};
use crate::source::Place;
use crate::web::WebObject;
use crate::{Backoff, Options, RemoteError, RemoteSource};

/// Folder of a download that the files lie in.
pub(crate) const MODEL: &str = "model";
/// Files that are asked about at once.
const AT_ONCE: usize = 8;

/// A place with objects of names relative to it.
enum Root {
    Web { http: Http, base: url::Url },
    Cloud { bucket: Bucket, prefix: String },
    Hub { hub: Hub, commit: Commit },
}

impl Root {
    fn object(&self, name: &str) -> Result<Arc<dyn Object>, Failure> {
        Ok(match self {
            Root::Web { http, base } => {
                let mut url = base.clone();
                if let Ok(mut path) = url.path_segments_mut() {
                    path.pop_if_empty().extend(name.split('/'));
                }
                Arc::new(WebObject::new(http.clone(), &url))
            }
            Root::Cloud { bucket, prefix } if prefix.is_empty() => Arc::new(bucket.object(name)),
            Root::Cloud { bucket, prefix } => Arc::new(bucket.object(&format!("{prefix}/{name}"))),
            Root::Hub { hub, commit } => Arc::new(hub.object(commit, name)?),
        })
    }
}

/// Whether a name is that of a file with weights.
pub(crate) fn is_weights(name: &str) -> bool {
    name.ends_with(".gguf") || name.ends_with(".safetensors")
}

/// Starts fetching a source into `directory`. Must be called inside the runtime that is to do it.
pub(crate) async fn open(
    source: &RemoteSource,
    http: &Http,
    directory: PathBuf,
    options: &Options,
) -> Result<Fetch, RemoteError> {
    let opener = Opener { source: source.to_string(), backoff: options.backoff };
    let (root, chosen, one) = opener.choose(source, http, options).await?;
    let model = directory.join(MODEL);
    let asked = futures::stream::iter(chosen.into_iter().map(|(name, needed)| {
        let (opener, root, path) = (&opener, &root, model.join(&name));
        async move {
            let object = opener.settle(root.object(&name))?;
            match opener.stat(&*object).await {
                Ok(Some(stat)) => Ok(Some(RemoteFile { object, stat, path })),
                Ok(None) if !needed => Ok(None),
                Ok(None) => Err(RemoteError::refused(object.name(), "there is no such object")),
                Err(error) => Err(error),
            }
        }
    }));
    let files: Vec<Option<RemoteFile>> = asked.buffered(AT_ONCE).try_collect().await?;
    let path = one.map_or(model.clone(), |name| model.join(name));
    Fetch::start(files.into_iter().flatten().collect(), directory, path, options)
}

/// Names with whether they have to be there, and the one that a reader opens where it is not the folder.
type Selection = (Root, Vec<(String, bool)>, Option<String>);

struct Opener {
    source: String,
    backoff: Backoff,
}

impl Opener {
    fn no_checkpoint(&self, problem: impl Into<String>) -> RemoteError {
        RemoteError::NoCheckpoint { object: self.source.clone(), problem: problem.into() }
    }

    async fn choose(
        &self,
        source: &RemoteSource,
        http: &Http,
        options: &Options,
    ) -> Result<Selection, RemoteError> {
        match &source.place {
            Place::Web(url) => {
                let last = url.path().rsplit('/').next().unwrap_or_default();
                let last = percent_encoding::percent_decode_str(last).decode_utf8_lossy().into_owned();
                let mut base = url.clone();
                if is_weights(&last)
                    && let Ok(mut path) = base.path_segments_mut()
                {
                    path.pop();
                }
                let root = Root::Web { http: http.clone(), base };
                if is_weights(&last) {
                    return self.single(root, last);
                }
                // There is no listing: what may be there is asked for by name.
                let mut wanted = vec![(CONFIG.to_owned(), true)];
                wanted.extend(ASSETS.iter().map(|&name| (name.to_owned(), false)));
                let whole = self.settle(root.object(WHOLE))?;
                match self.stat(&*whole).await? {
                    Some(_) => wanted.push((WHOLE.to_owned(), true)),
                    None => {
                        let index = self.index(&root).await?;
                        wanted.push((INDEX.to_owned(), true));
                        wanted.extend(index.into_iter().map(|name| (name, true)));
                    }
                }
                Ok((root, wanted, None))
            }
            Place::Cloud { provider, bucket, account, key } => {
                let bucket = Bucket::open(http, *provider, bucket, account.as_deref(), &options.environment)?;
                if is_weights(key) {
                    let (prefix, name) = key.rsplit_once('/').unwrap_or(("", key));
                    let (prefix, name) = (prefix.to_owned(), name.to_owned());
                    return self.single(Root::Cloud { bucket, prefix }, name);
                }
                let listed = self.retrying(|| bucket.list(key)).await?;
                let root = Root::Cloud { bucket, prefix: key.clone() };
                self.listed(root, listed.iter().map(|(name, _)| name.as_str())).await
            }
            Place::Hub { repository, revision, file } => {
                let hub = Hub::new(http.clone(), &options.environment)?;
                let commit = self.retrying(|| hub.commit(repository, revision)).await?;
                let names = commit.files.clone();
                let root = Root::Hub { hub, commit };
                match file {
                    Some(file) if !names.contains(file) => {
                        Err(self.no_checkpoint("the repository has no file of this name"))
                    }
                    Some(file) if is_weights(file) => self.single(root, file.clone()),
                    Some(_) => Err(self.no_checkpoint("name a .gguf or .safetensors file, or none")),
                    None => self.listed(root, names.iter().map(String::as_str)).await,
                }
            }
        }
    }

    /// One file; a safetensors file needs what describes it beside it.
    fn single(&self, root: Root, name: String) -> Result<Selection, RemoteError> {
        if !listing::is_plain(&name) {
            return Err(self.no_checkpoint("its file has a name that cannot be used here"));
        }
        let mut wanted = Vec::new();
        let mut one = name.clone();
        if name.ends_with(".safetensors") {
            let folder = name.rsplit_once('/').map_or(String::new(), |(folder, _)| format!("{folder}/"));
            if !folder.is_empty() {
                return Err(
                    self.no_checkpoint("a .safetensors file has to lie at the top, beside its config.json")
                );
            }
            wanted.push((CONFIG.to_owned(), true));
            wanted.extend(ASSETS.iter().map(|&asset| (asset.to_owned(), false)));
        }
        wanted.push((std::mem::take(&mut one), true));
        Ok((root, wanted, Some(name)))
    }

    async fn listed(&self, root: Root, names: impl Iterator<Item = &str>) -> Result<Selection, RemoteError> {
        let chosen = listing::choose(names).map_err(|problem| self.no_checkpoint(problem))?;
        let files = match chosen {
            Chosen::Files(files) => files,
            Chosen::Indexed(mut files) => {
                files.extend(self.index(&root).await?);
                files
            }
        };
        let one = files.iter().find(|name| name.ends_with(".gguf")).cloned();
        Ok((root, files.into_iter().map(|name| (name, true)).collect(), one))
    }

    /// The files that the index names.
    async fn index(&self, root: &Root) -> Result<Vec<String>, RemoteError> {
        let object = self.settle(root.object(INDEX))?;
        let Some(stat) = self.stat(&*object).await? else {
            return Err(self.no_checkpoint(format!(
                "there is neither {WHOLE} nor {INDEX} in it; give the address of a folder with config.json and \
                 safetensors, or of one .gguf or .safetensors file"
            )));
        };
        let read = || async {
            let bytes = read_small(object.read(None, stat.clone()).await?).await?;
            match bytes.len() as u64 == stat.size {
                true => Ok(bytes),
                false => Err(Failure::retry("the answer has another length than was announced")),
            }
        };
        listing::shards(&self.retrying(read).await?).map_err(|problem| self.no_checkpoint(problem))
    }

    /// What an object is; `None` if there is no such object.
    async fn stat(&self, object: &dyn Object) -> Result<Option<Stat>, RemoteError> {
        let ask = || async {
            match object.stat().await {
                Ok(stat) => Ok(Some(stat)),
                Err(Failure::Missing) => Ok(None),
                Err(failure) => Err(failure),
            }
        };
        self.retrying(ask).await
    }

    fn settle<T>(&self, result: Result<T, Failure>) -> Result<T, RemoteError> {
        result.map_err(|failure| match failure {
            Failure::Fatal(error) => error,
            Failure::Missing => self.no_checkpoint("it does not exist"),
            Failure::Retry { problem, .. } => self.no_checkpoint(problem),
            Failure::Changed | Failure::NoRanges => RemoteError::Changed { object: self.source.clone() },
        })
    }

    /// Does it until it succeeds or the backoff gives up.
    async fn retrying<T, F>(&self, mut attempt: impl FnMut() -> F) -> Result<T, RemoteError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let mut failures = 0;
        loop {
            let (problem, wish) = match attempt().await {
                Err(Failure::Retry { problem, wish }) => (problem, wish),
                // Between two requests about a small object; the next attempt sees one version.
                Err(Failure::Changed | Failure::NoRanges) => ("it was changed meanwhile".to_owned(), None),
                other => return self.settle(other),
            };
            failures += 1;
            match self.backoff.wait(failures, wish, rand::random()) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => {
                    let object = self.source.clone();
                    return Err(RemoteError::GaveUp { object, problem, attempts: failures });
                }
            }
        }
    }
}
