//! Stored tensors that did not match their checksums, remembered over restarts.
//!
//! What is damaged on disk stays damaged, so a start refuses the models that need it by name instead of letting their first
//! request fail; and no new deployment refers to it. The list is a file of JSON lines in the data directory; an entry goes
//! when its data file does, or when a file that is served in place is deployed again.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// In the data directory.
const FILE: &str = "damaged.jsonl";

/// Where a damaged tensor is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Place {
    file: PathBuf,
    offset: u64,
}

/// The damaged tensors of a data directory.
pub(crate) struct Damaged {
    path: PathBuf,
    places: Mutex<BTreeSet<Place>>,
}

impl Damaged {
    /// Reads the list, and forgets what lies in files that are gone.
    pub(crate) fn open(root: &Path) -> Damaged {
        let path = root.join(FILE);
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        // A line that was cut off by a crash says nothing; the damage will be found again.
        let listed: Vec<Place> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let places: BTreeSet<Place> = listed.iter().filter(|place| place.file.exists()).cloned().collect();
        let damaged = Damaged { path, places: Mutex::new(places.clone()) };
        if places.len() < listed.len() {
            let _ = match places.is_empty() {
                true => std::fs::remove_file(&damaged.path),
                false => damaged.rewrite(&places),
            };
        }
        damaged
    }

    fn rewrite(&self, places: &BTreeSet<Place>) -> std::io::Result<()> {
        let part = self.path.with_extension("part");
        let mut file = File::create(&part)?;
        for place in places {
            file.write_all(&line(place)?)?;
        }
        file.sync_all()?;
        std::fs::rename(&part, &self.path)
    }

    /// Adds the tensor that starts at `offset` of `file`.
    pub(crate) fn add(&self, file: &Path, offset: u64, tensor: &str) {
        let place = Place { file: file.to_owned(), offset };
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if !places.insert(place.clone()) {
            return;
        }
        tracing::error!(tensor, offset, "{} is damaged", file.display());
        let written = OpenOptions::new().append(true).create(true).open(&self.path).and_then(|mut list| {
            list.write_all(&line(&place)?)?;
            list.sync_data()
        });
        if let Err(error) = written {
            tracing::warn!("the damage was not noted in {}: {error}", self.path.display());
        }
    }

    /// Takes out what is said of `file`, whose bytes have been hashed anew.
    pub(crate) fn forget(&self, file: &Path) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let before = places.len();
        places.retain(|place| place.file != file);
        if places.len() < before
            && let Err(error) = self.rewrite(&places)
        {
            tracing::warn!("{} could not be written: {error}", self.path.display());
        }
    }

    /// Whether the tensor that starts at `offset` of `file` is damaged.
    pub(crate) fn has(&self, file: &Path, offset: u64) -> bool {
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        !places.is_empty() && places.contains(&Place { file: file.to_owned(), offset })
    }
}

fn line(place: &Place) -> std::io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(place)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_remembered_as_long_as_its_file_is_there() {
        let root = tempfile::tempdir().unwrap();
        let files = ["a.bin", "b.bin"].map(|name| root.path().join(name));
        for file in &files {
            std::fs::write(file, b"x").unwrap();
        }
        let damaged = Damaged::open(root.path());
        assert!(!damaged.has(&files[0], 0));
        damaged.add(&files[0], 256, "t");
        damaged.add(&files[0], 256, "t");
        damaged.add(&files[1], 0, "u");
        let list = root.path().join(FILE);
        assert_eq!(std::fs::read_to_string(&list).unwrap().lines().count(), 2, "each once");
        // As a crash would leave it.
        OpenOptions::new().append(true).open(&list).unwrap().write_all(b"{\"file\":\"").unwrap();
        let again = Damaged::open(root.path());
        assert!(again.has(&files[0], 256) && again.has(&files[1], 0) && !again.has(&files[0], 0));
        std::fs::remove_file(&files[0]).unwrap();
        let again = Damaged::open(root.path());
        assert!(!again.has(&files[0], 256) && again.has(&files[1], 0));
        std::fs::remove_file(&files[1]).unwrap();
        Damaged::open(root.path());
        assert!(!list.exists(), "nothing is left");
    }
}
