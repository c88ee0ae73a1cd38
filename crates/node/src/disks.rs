//! How the disks of this machine are best read: measured once for each, corrected by what loads reach, kept in the data
//! directory.
//!
//! A file with holes says nothing about a disk; then one is written for the purpose. Takes about a second of reading. Done
//! when a model is deployed or, if an earlier run has left nothing, beside a server that is ready; until then disks are
//! read as most like it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use tangram_store::{Measured, Store, disk_of, measure};

/// In the data directory.
const FILE: &str = "disks.json";
/// In the data directory, for as long as a disk is measured.
const PROBE_FILE: &str = "disks.probe";
/// MiB of that file.
const PROBE_MIB: usize = 64;

#[derive(Default, Serialize, Deserialize)]
struct Kept {
    /// The figures of another machine are worth nothing.
    machine: String,
    /// By what tells a disk from others.
    disks: BTreeMap<String, Measured>,
}

/// The stores that are told of disks, one for each device, and which they were told of, by number.
struct Served {
    stores: Vec<Arc<Store>>,
    told: BTreeMap<u64, String>,
}

/// What is known of disks, for the stores that read them.
pub(crate) struct Disks {
    data: PathBuf,
    served: Mutex<Served>,
    kept: Mutex<Kept>,
    /// Held while measuring: two measurements at once would disturb each other.
    measuring: Mutex<()>,
}

impl Disks {
    /// Reads what was measured before on this machine.
    pub(crate) fn open(data: &Path, machine: String, stores: Vec<Arc<Store>>) -> Disks {
        let kept = std::fs::read(data.join(FILE)).ok();
        let kept = kept.and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok());
        let kept = kept.filter(|kept| kept.machine == machine);
        let kept = Mutex::new(kept.unwrap_or(Kept { machine, ..Kept::default() }));
        let served = Mutex::new(Served { stores, told: BTreeMap::new() });
        Disks { data: data.to_owned(), served, kept, measuring: Mutex::new(()) }
    }

    /// Locked after `kept`, where both are.
    fn served(&self) -> MutexGuard<'_, Served> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another store reads the disks for a device from now on; the old one is let go, and what it found better is kept.
    pub(crate) fn serve(&self, device: usize, store: Arc<Store>) {
        self.keep();
        let kept = self.kept();
        let mut served = self.served();
        for (&number, disk) in &served.told {
            if let Some(measured) = kept.disks.get(disk) {
                store.tune(number, measured.tuning);
            }
        }
        served.stores.iter_mut().skip(device).take(1).for_each(|served| *served = store.clone());
    }

    /// Tells the stores how to read the disk that `path` lies on; `false` if it has not been measured.
    pub(crate) fn tune(&self, path: &Path) -> bool {
        let Ok((number, disk)) = disk_of(path) else { return false };
        let kept = self.kept();
        let Some(measured) = kept.disks.get(&disk) else { return false };
        // Told once, for a store may know better by now.
        let mut served = self.served();
        if served.told.insert(number, disk).is_none() {
            served.stores.iter().for_each(|store| store.tune(number, measured.tuning));
        }
        true
    }

    /// Keeps what the stores have found better: of several that read one disk, what the fastest has.
    pub(crate) fn keep(&self) {
        let served = self.served();
        let mut best: BTreeMap<String, Measured> = BTreeMap::new();
        for (number, better) in served.stores.iter().flat_map(|store| store.corrections()) {
            let Some(disk) = served.told.get(&number) else { continue };
            let known = best.entry(disk.clone()).or_insert(better);
            if better.bytes_per_second > known.bytes_per_second {
                *known = better;
            }
        }
        drop(served);
        self.correct(best);
    }

    fn correct(&self, corrections: impl IntoIterator<Item = (String, Measured)>) {
        let mut kept = self.kept();
        let mut changed = false;
        for (disk, better) in corrections {
            changed |= kept.disks.insert(disk, better) != Some(better);
        }
        if changed {
            self.write(&kept);
        }
    }

    /// Bytes per second that the disk of the data directory gives past the page cache; measured if it was not before.
    /// `None` if that is not possible.
    pub(crate) fn rate(&self) -> Option<f64> {
        let _measuring = self.measuring.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.tune(&self.data) {
            self.measure_data();
        }
        let (_, disk) = disk_of(&self.data).ok()?;
        let kept = self.kept();
        kept.disks.get(&disk).map(|measured| measured.bytes_per_second)
    }

    /// Measures the disk that `file` lies on, by reading it, unless that was done before.
    pub(crate) fn measure(&self, file: &Path) {
        let _measuring = self.measuring.lock().unwrap_or_else(PoisonError::into_inner);
        if self.tune(file) {
            return;
        }
        if has_holes(file) {
            self.measure_data();
        } else {
            self.measure_by(file);
        }
    }

    /// Measures the disk of the data directory with a file of its own.
    fn measure_data(&self) {
        let path = self.data.join(PROBE_FILE);
        match write_probe(&path) {
            Ok(()) => self.measure_by(&path),
            Err(error) => tracing::warn!("{} cannot be written: {error}", path.display()),
        }
        let _ = std::fs::remove_file(&path);
    }

    fn measure_by(&self, file: &Path) {
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
        let mut kept = self.kept();
        kept.disks.insert(disk, measured);
        self.write(&kept);
        drop(kept);
        self.tune(file);
    }

    fn write(&self, kept: &Kept) {
        let (path, part) = (self.data.join(FILE), self.data.join("disks.json.part"));
        let written = serde_json::to_vec(kept)
            .map_err(std::io::Error::from)
            .and_then(|bytes| std::fs::write(&part, bytes))
            .and_then(|()| std::fs::rename(&part, &path));
        if let Err(error) = written {
            tracing::warn!("the measured disk was not kept in {}: {error}", path.display());
        }
    }
}

/// Whether reading a file would be reading nothing here and there.
fn has_holes(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|metadata| metadata.blocks() * 512 < metadata.len())
}

/// Writes a file that is worth reading, to the disk.
fn write_probe(path: &Path) -> io::Result<()> {
    let mut file = File::create(path)?;
    let mut random = 1u64;
    let mut block = vec![0; 1 << 20];
    for _ in 0..PROBE_MIB {
        for bytes in block.as_chunks_mut().0 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *bytes = random.to_le_bytes();
        }
        file.write_all(&block)?;
    }
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tangram_device::cpu::CpuDevice;
    use tangram_store::Tuning;

    #[test]
    fn what_was_measured_is_kept_for_the_same_machine() {
        let data = tempfile::tempdir().unwrap();
        let store = Store::new(CpuDevice::open(1 << 20, 4096).unwrap());
        let open = |machine: &str| Disks::open(data.path(), machine.to_owned(), vec![store.clone()]);
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
        let rate = open("this").rate();
        assert!(rate.is_some_and(|rate| rate.is_finite() && rate > 0.0));
        // What the store has found better is kept too.
        let disks = open("this");
        let text = std::fs::read_to_string(data.path().join(FILE)).unwrap();
        disks.keep();
        assert_eq!(std::fs::read_to_string(data.path().join(FILE)).unwrap(), text, "nothing was found");
        let (_, disk) = disk_of(data.path()).unwrap();
        let better = Measured { tuning: Tuning { block: 2 << 20, depth: 16 }, bytes_per_second: 1e9 };
        disks.correct([(disk.clone(), better)]);
        let kept: Kept = serde_json::from_slice(&std::fs::read(data.path().join(FILE)).unwrap()).unwrap();
        assert_eq!(kept.disks.get(&disk), Some(&better));
        std::fs::write(data.path().join(FILE), "{").unwrap();
        assert!(!open("this").tune(data.path()), "a damaged file is as none");
        // What is mostly holes is not read for it, but a file that is gone afterwards.
        std::fs::File::create(&file).unwrap().set_len(64 << 20).unwrap();
        let disks = open("this");
        disks.measure(&file);
        assert!(disks.tune(data.path()));
        let mut left: Vec<_> =
            std::fs::read_dir(data.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["data.bin", FILE]);
    }
}
