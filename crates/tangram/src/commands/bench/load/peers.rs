//! Other loaders on the same files, each run in a Python process of its own that reports one line of JSON.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde::Deserialize;

use super::Cost;
use super::raw::{drop_cache, fill_cache};

/// Loads with one library and says what it took.
const SCRIPT: &str = include_str!("../../../../../../bench/loaders/peers.py");

/// What the script says about a run.
#[derive(Deserialize)]
struct Answer {
    bytes: u64,
    seconds: f64,
    cpu_seconds: f64,
    peak_bytes: u64,
}

/// The loaders that there are, and the files that they load.
pub(super) struct Peers {
    python: PathBuf,
    loaders: Vec<String>,
    files: Vec<PathBuf>,
}

impl Peers {
    /// Nobody.
    pub(super) fn none() -> Peers {
        Peers { python: PathBuf::new(), loaders: Vec::new(), files: Vec::new() }
    }

    /// What this Python can import, for the safetensors files of a checkpoint.
    pub(super) fn find(python: &Path, source: &Path) -> anyhow::Result<Peers> {
        let mut files: Vec<PathBuf> = match source.is_dir() {
            true => {
                std::fs::read_dir(source)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<_>>()?
            }
            false => vec![source.to_owned()],
        };
        files.retain(|file| file.extension().is_some_and(|extension| extension == "safetensors"));
        files.sort();
        if files.is_empty() {
            bail!("--peers needs safetensors files, and {} has none", source.display());
        }
        let mut peers = Peers { python: python.to_owned(), loaders: Vec::new(), files };
        let listed = peers.script(&["list"])?;
        peers.loaders = serde_json::from_str(&listed)?;
        if peers.loaders.is_empty() {
            bail!("{} has none of the loaders: see bench/loaders/run.sh", python.display());
        }
        Ok(peers)
    }

    /// Runs every loader with nothing in the page cache.
    pub(super) fn cold(&self) -> anyhow::Result<Vec<(String, Cost)>> {
        self.all("cold", drop_cache)
    }

    /// Runs every loader with everything in the page cache.
    pub(super) fn warm(&self) -> anyhow::Result<Vec<(String, Cost)>> {
        self.all("warm", fill_cache)
    }

    fn all(
        &self,
        mode: &str,
        prepare: impl Fn(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<Vec<(String, Cost)>> {
        let run = |loader: &String| {
            self.files.iter().try_for_each(|file| prepare(file))?;
            let Answer { bytes, seconds, cpu_seconds, peak_bytes } =
                serde_json::from_str(&self.script(&[loader])?)?;
            let cost = Cost { bytes, seconds, cpu_seconds, peak_bytes: Some(peak_bytes) };
            Ok((format!("{mode}, {loader}"), cost))
        };
        self.loaders.iter().map(run).collect()
    }

    fn script(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(&self.python);
        command.args(["-c", SCRIPT]).args(arguments).args(&self.files).stderr(Stdio::inherit());
        let output = command.output().with_context(|| format!("running {}", self.python.display()))?;
        if !output.status.success() {
            bail!("{} {}: {}", self.python.display(), arguments.join(" "), output.status);
        }
        let text = String::from_utf8_lossy(&output.stdout);
        // Libraries print, too; the last line is ours.
        Ok(text.lines().last().unwrap_or_default().to_owned())
    }
}
