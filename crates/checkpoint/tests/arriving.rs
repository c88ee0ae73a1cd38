//! A checkpoint whose bytes come one by one is imported as one that is there, and nothing is read before it has come.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use tangram_checkpoint::{Arriving, DATA_FILE, Hash, Presence, import, open, open_arriving, read_manifest};
use tangram_testkit::{Family, GgmlType, GgufOptions, RandomModel, write_gguf, write_hf_model};

/// Copies what is waited for from the files in one folder to those in another, which have holes before.
#[derive(Debug)]
struct Copying {
    from: PathBuf,
    /// What has been copied.
    here: Mutex<Vec<(PathBuf, Range<u64>)>>,
    /// From then on nothing may be read that somebody has not waited for before.
    strict: AtomicBool,
}

impl Copying {
    fn bring(&self, path: &Path, bytes: &Range<u64>) {
        let original = File::open(self.from.join(path.file_name().unwrap())).unwrap();
        let mut buffer = vec![0; (bytes.end - bytes.start) as usize];
        original.read_exact_at(&mut buffer, bytes.start).unwrap();
        File::options().write(true).open(path).unwrap().write_all_at(&buffer, bytes.start).unwrap();
        self.here.lock().unwrap().push((path.to_path_buf(), bytes.clone()));
    }
}

impl Presence for Copying {
    fn wait_for(&self, path: &Path, bytes: Range<u64>) -> std::io::Result<()> {
        if !self.strict.load(Ordering::Relaxed) {
            self.bring(path, &bytes);
            return Ok(());
        }
        let here = self.here.lock().unwrap();
        let covered =
            here.iter().any(|(at, have)| at == path && have.start <= bytes.start && bytes.end <= have.end);
        assert!(covered, "{} is read at {bytes:?} before it was waited for", path.display());
        Ok(())
    }
}

fn is_weights(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "safetensors" || extension == "gguf")
}

/// Imports what is in `from` both ways.
fn compare(from: &Path, what: &str) {
    let (holes, there, arrived) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let copy = holes.path().join(path.file_name().unwrap());
        match is_weights(&path) {
            true => File::create(&copy).unwrap().set_len(fs::metadata(&path).unwrap().len()).unwrap(),
            false => drop(fs::copy(&path, &copy).unwrap()),
        }
    }
    let expected =
        import(&open(from).unwrap(), there.path(), "c", &|_| None, &mut |_| ControlFlow::Continue(()))
            .unwrap();

    let copying = Arc::new(Copying {
        from: from.to_path_buf(),
        here: Mutex::default(),
        strict: AtomicBool::new(false),
    });
    let presence: Arc<dyn Presence> = copying.clone();
    let source = open_arriving(holes.path(), &presence).unwrap();
    copying.here.lock().unwrap().clear();
    copying.strict.store(true, Ordering::Relaxed);
    let mut arriving = Arriving::begin(&source, arrived.path(), "c").unwrap();
    let places: Vec<(u64, u64)> =
        arriving.manifest().tensors.iter().map(|tensor| (tensor.offset, tensor.bytes)).collect();
    let data = File::open(arrived.path().join(DATA_FILE)).unwrap();
    let mut next = 0;
    arriving
        .fill(
            &mut |path, bytes| {
                copying.bring(path, &bytes);
                Ok(())
            },
            &mut |index, entry| {
                assert_eq!((index, entry.offset, entry.bytes), (next, places[index].0, places[index].1));
                let mut bytes = vec![0; entry.bytes as usize];
                data.read_exact_at(&mut bytes, entry.offset).unwrap();
                assert_eq!(
                    Hash::of_tensor(entry.dtype, &entry.shape, &bytes),
                    entry.id,
                    "{what}: it can be read"
                );
                next += 1;
            },
        )
        .unwrap();
    assert_eq!(next, places.len());
    let manifest = arriving.settle(&|_| None).unwrap();
    assert_eq!(read_manifest(arrived.path()).unwrap(), manifest);
    assert_eq!(manifest.spec, expected.spec);
    let contents = |manifest: &tangram_checkpoint::Manifest| {
        let tensors = manifest.tensors.iter();
        tensors.map(|tensor| (tensor.role, tensor.id, tensor.chunks.clone())).collect::<Vec<_>>()
    };
    assert!(contents(&manifest) == contents(&expected), "{what}");
}

#[test]
fn every_order_of_rows_arrives_as_it_is_imported() {
    for family in [Family::Llama, Family::Gpt2, Family::Phi3, Family::GptNeox, Family::Mixtral, Family::Opt] {
        let dir = tempfile::tempdir().unwrap();
        write_hf_model(dir.path(), &RandomModel { shards: 2, ..RandomModel::tiny(family) });
        compare(dir.path(), &format!("{family:?}"));
    }
    for family in [Family::Llama, Family::Qwen3, Family::Gpt2, Family::Mixtral] {
        let dir = tempfile::tempdir().unwrap();
        let options = GgufOptions { dtype: GgmlType::F16, ..GgufOptions::default() };
        write_gguf(&dir.path().join("m.gguf"), &RandomModel::tiny(family), options);
        compare(dir.path(), &format!("{family:?} as GGUF"));
    }
}

#[test]
fn a_wait_that_fails_ends_the_import() {
    let (dir, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_hf_model(dir.path(), &RandomModel::tiny(Family::Llama));
    let source = open(dir.path()).unwrap();
    let mut arriving = Arriving::begin(&source, to.path(), "c").unwrap();
    let mut left = 3;
    let error = arriving.fill(
        &mut |_, _| {
            left -= 1;
            if left > 0 { Ok(()) } else { Err(tangram_checkpoint::CheckpointError::Cancelled) }
        },
        &mut |index, _| assert!(index < 2),
    );
    assert!(matches!(error, Err(tangram_checkpoint::CheckpointError::Cancelled)));
}
