//! Imports a checkpoint whose bytes are still coming, so that its tensors can be used one by one before all are there.
//!
//! Every tensor gets its place in the data file first, under an identity that stands for the true one; it is filled in
//! execution order, and what is filled never changes. When all of it is here, the true identities, known by then,
//! replace the others, and what was on this disk before is referenced where it was: the manifest is the one that
//! [`import`](crate::import) writes, but for the room between tensors that the file keeps for what is not its own.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::Checksum;
use crate::import::{DATA_FILE, TOKENIZER_FILE, finish, is_plain_name, place_after, write_synced};
use crate::manifest::{CHUNK_BYTES, ContentId, Hash, Manifest, TensorEntry};
use crate::{CheckpointError, KnownTensor, Source};

/// Returns when these bytes of a file of the source can be read, or stops the import.
pub type WaitFor<'a> = &'a mut dyn FnMut(&Path, Range<u64>) -> Result<(), CheckpointError>;

/// An import under way of a source whose bytes are still coming.
pub struct Arriving<'a> {
    source: &'a Source,
    dir: PathBuf,
    file: File,
    /// With identities and checksums that are true only for what has been filled.
    manifest: Manifest,
}

impl<'a> Arriving<'a> {
    /// Makes the data file at its full size and the tokenizer in `dir`, an existing empty directory. Needs the source's
    /// headers only.
    ///
    /// # Errors
    /// When the directory cannot be written. It is for the caller to remove then.
    pub fn begin(
        source: &'a Source,
        dir: &Path,
        checkpoint_id: &str,
    ) -> Result<Arriving<'a>, CheckpointError> {
        if !is_plain_name(checkpoint_id) {
            let message = format!("{checkpoint_id:?} cannot be the name of a checkpoint");
            return Err(CheckpointError::invalid(dir, message));
        }
        let (mut tensors, mut end) = (Vec::with_capacity(source.tensors().len()), 0);
        for (index, tensor) in source.tensors().iter().enumerate() {
            let offset = place_after(end, tensor.bytes);
            end = offset + tensor.bytes;
            tensors.push(TensorEntry {
                role: tensor.role,
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                // Of this one import: nothing else may ever be taken for it.
                id: Hash::of(format!("tensor {index} of {checkpoint_id}, arriving").as_bytes()),
                bytes: tensor.bytes,
                stage: source.spec().stage(tensor.role) as u32,
                checkpoint: checkpoint_id.to_owned(),
                offset,
                chunks: vec![Checksum::Crc64(0); tensor.bytes.div_ceil(CHUNK_BYTES) as usize],
                stored: Vec::new(),
                in_place: None,
            });
        }
        let data_bytes = place_after(end, u64::MAX);
        let path = dir.join(DATA_FILE);
        let file = File::create_new(&path).and_then(|file| file.set_len(data_bytes).map(|()| file));
        let file = file.map_err(|error| CheckpointError::io(&path, error))?;
        if let Some(json) = source.tokenizer_json() {
            write_synced(&dir.join(TOKENIZER_FILE), json)?;
        }
        let manifest = Manifest {
            version: Manifest::VERSION,
            checkpoint: checkpoint_id.to_owned(),
            spec: source.spec().clone(),
            tensors,
            data_bytes,
            generation: source.generation().clone(),
            chat_template: source.chat_template().map(str::to_owned),
            special_tokens: source.special_tokens().clone(),
            has_tokenizer: source.tokenizer_json().is_some(),
            base: None,
            in_place: None,
        };
        Ok(Arriving { source, dir: dir.to_path_buf(), file, manifest })
    }

    /// What is known: places, sizes and roles are true, identities and checksums stand for what is to come.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Fills the data file in execution order, waiting for the bytes of each tensor. `arrived` is told of every tensor (by
    /// its place in the manifest) when it lies in the data file.
    ///
    /// # Errors
    /// Those of `wait`, of reading and of writing.
    pub fn fill(
        &mut self,
        wait: WaitFor<'_>,
        arrived: &mut dyn FnMut(usize, &TensorEntry),
    ) -> Result<(), CheckpointError> {
        let mut buffer = Vec::new();
        for (index, (tensor, entry)) in
            self.source.tensors().iter().zip(&mut self.manifest.tensors).enumerate()
        {
            if let Some((path, bytes)) = self.source.span(tensor) {
                wait(path, bytes)?;
            }
            let mut id = ContentId::hasher(tensor.dtype, &tensor.shape);
            for (chunk, at) in entry.chunks.iter_mut().zip((0..).step_by(CHUNK_BYTES as usize)) {
                buffer.resize((tensor.bytes - at).min(CHUNK_BYTES) as usize, 0);
                self.source.read_at(tensor, at, &mut buffer)?;
                id.update(&buffer);
                *chunk = Checksum::of(&buffer);
                let written = self.file.write_all_at(&buffer, entry.offset + at);
                written.map_err(|error| CheckpointError::io(&self.dir.join(DATA_FILE), error))?;
            }
            entry.id = Hash(*id.finalize().as_bytes());
            arrived(index, entry);
        }
        Ok(())
    }

    /// Everything is here: writes the manifest and flushes all to disk. A tensor that `known` knows, or that came before
    /// in this checkpoint, is referenced; its bytes stay where they are until nobody reads them any more, and their room
    /// is for the caller to give back.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn settle(
        mut self,
        known: &dyn Fn(&ContentId) -> Option<KnownTensor>,
    ) -> Result<Manifest, CheckpointError> {
        let mut places: HashMap<ContentId, KnownTensor> = HashMap::new();
        for entry in &mut self.manifest.tensors {
            let place = places
                .entry(entry.id)
                .or_insert_with(|| known(&entry.id).unwrap_or_else(|| KnownTensor::from(&*entry)));
            entry.checkpoint.clone_from(&place.checkpoint);
            entry.offset = place.offset;
            entry.chunks.clone_from(&place.chunks);
            entry.stored.clone_from(&place.stored);
        }
        self.file.sync_all().map_err(|error| CheckpointError::io(&self.dir.join(DATA_FILE), error))?;
        finish(&self.dir, self.manifest)
    }
}
