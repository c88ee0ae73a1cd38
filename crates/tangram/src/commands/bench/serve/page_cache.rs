//! Drops files from the page cache, so that whoever reads them next reads the disk.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::fs::{Advice, fadvise};

/// Files to drop, open for as long as it may be asked for.
#[derive(Debug, Default)]
pub(super) struct Files(Vec<File>);

impl Files {
    /// The files named, and those below the directories named. What of them is not on the disk yet is written there:
    /// only clean pages can be dropped.
    ///
    /// # Errors
    /// When one cannot be read.
    pub(super) fn find(paths: &[PathBuf]) -> anyhow::Result<Files> {
        let mut files = Files::default();
        paths.iter().try_for_each(|path| files.add(path))?;
        Ok(files)
    }

    fn add(&mut self, path: &Path) -> anyhow::Result<()> {
        let reading = || format!("--drop-cache: reading {}", path.display());
        if path.is_dir() {
            for entry in path.read_dir().with_context(reading)? {
                self.add(&entry.with_context(reading)?.path())?;
            }
        } else {
            let file = File::open(path).with_context(reading)?;
            file.sync_all().with_context(reading)?;
            self.0.push(file);
        }
        Ok(())
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Asks the system to forget the pages of all files that nobody has mapped.
    pub(super) fn drop_from_cache(&self) {
        for file in &self.0 {
            // Advice that is not taken leaves a warm cache, which the figures show; there is nothing else to do.
            let _ = fadvise(file, 0, None, Advice::DontNeed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_searched_and_missing_files_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("below")).unwrap();
        for name in ["a", "below/b"] {
            std::fs::write(dir.path().join(name), [1; 5000]).unwrap();
        }
        let files = Files::find(&[dir.path().to_owned(), dir.path().join("a")]).unwrap();
        assert_eq!(files.len(), 3);
        files.drop_from_cache();
        let error = Files::find(&[dir.path().join("gone")]).unwrap_err();
        assert!(format!("{error:#}").contains("gone"), "{error:#}");
    }
}
