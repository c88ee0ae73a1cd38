//! How the disks of this machine are best read: measured once for each, kept in the data directory.
//!
//! Takes about a second of reading. Done when a model is deployed or, if an earlier run has left nothing, beside a server
//! that is ready; until then disks are read as most like it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tangram_store::{Measured, Store, disk_of, measure};

/// In the data directory.
const FILE: &str = "disks.json";

#[derive(Default, Serialize, Deserialize)]
struct Kept {
    /// The figures of another machine are worth nothing.
    machine: String,
    /// By what tells a disk from others.
    disks: BTreeMap<String, Measured>,
}

/// What is known of disks, for the store that reads them.
pub(crate) struct Disks {
    data: PathBuf,
    store: Arc<Store>,
    kept: Mutex<Kept>,
    /// Held while measuring: two measurements at once would disturb each other.
    measuring: Mutex<()>,
}

impl Disks {
    /// Reads what was measured before on this machine.
    pub(crate) fn open(data: &Path, machine: String, store: Arc<Store>) -> Disks {
        let kept = std::fs::read(data.join(FILE)).ok();
        let kept = kept.and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok());
        let kept = kept.filter(|kept| kept.machine == machine);
        let kept = Mutex::new(kept.unwrap_or(Kept { machine, ..Kept::default() }));
        Disks { data: data.to_owned(), store, kept, measuring: Mutex::new(()) }
    }

    /// Tells the store how to read the disk that `path` lies on; `false` if it has not been measured.
    pub(crate) fn tune(&self, path: &Path) -> bool {
        let Ok((number, disk)) = disk_of(path) else { return false };
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(measured) = kept.disks.get(&disk) else { return false };
        self.store.tune(number, measured.tuning);
        true
    }

    /// Measures the disk that `file` lies on, by reading it, unless that was done before.
    pub(crate) fn measure(&self, file: &Path) {
        let _measuring = self.measuring.lock().unwrap_or_else(PoisonError::into_inner);
        if self.tune(file) {
            return;
        }
        let measured = disk_of(file).and_then(|(_, disk)| Ok((disk, measure(file)?)));
        let (disk, measured) = match measured {
            Ok((disk, Some(measured))) => (disk, measured),
            Ok((_, None)) => return,
            Err(error) => {
                tracing::warn!("the disk of {} was not measured: {error}", file.display());
                return;
            }
        };
        tracing::debug!(disk, ?measured, "measured a disk");
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.disks.insert(disk, measured);
        let (path, part) = (self.data.join(FILE), self.data.join("disks.json.part"));
        let written = serde_json::to_vec(&*kept)
            .map_err(std::io::Error::from)
            .and_then(|bytes| std::fs::write(&part, bytes))
            .and_then(|()| std::fs::rename(&part, &path));
        drop(kept);
        if let Err(error) = written {
            tracing::warn!("the measured disk was not kept in {}: {error}", path.display());
        }
        self.tune(file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tangram_device::cpu::CpuDevice;

    #[test]
    fn what_was_measured_is_kept_for_the_same_machine() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::new(CpuDevice::open(1 << 20, 4096).unwrap());
        let open = |machine: &str| Disks::open(data.path(), machine.to_owned(), store.clone());
        let disks = open("this");
        assert!(!disks.tune(data.path()));
        let file = data.path().join("data.bin");
        std::fs::write(&file, [0; 100]).unwrap();
        disks.measure(&file);
        assert!(!disks.tune(data.path()), "so small a file says nothing");
        std::fs::write(&file, vec![3; 64 << 20]).unwrap();
        std::fs::File::open(&file).unwrap().sync_all().unwrap();
        disks.measure(&file);
        if !disks.tune(data.path()) {
            println!("skipped: no direct reads through io_uring here");
            return;
        }
        assert!(open("this").tune(data.path()), "found again");
        assert!(!open("another").tune(data.path()), "another machine, other figures");
        std::fs::write(data.path().join(FILE), "{").unwrap();
        assert!(!open("this").tune(data.path()), "a damaged file is as none");
    }
}
