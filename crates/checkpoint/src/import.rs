//! Writes a checkpoint in Tangram's own layout and reads its manifest back.
//!
//! One data file holds the tensors in execution order; a tensor that is already on this disk is referenced instead.
//! Nothing is published here: the caller renames the directory and commits its catalogue.

use std::collections::HashMap;
use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::Checksum;
use crate::compression::{self, Compressor, Layout};
use crate::file::read_limited;
use crate::in_place::{self, FilePlace, InPlace, InPlaceFile};
use crate::manifest::{CHUNK_BYTES, ContentId, Hash, Manifest, TENSOR_ALIGNMENT, TensorEntry};
use crate::{AdapterSource, CheckpointError, DType, Role, Source, layout};

/// Name of the file that holds the tensors' bytes.
pub const DATA_FILE: &str = "data.bin";
/// Name of the manifest.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Name of the tokenizer, if there is one.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// Tensors of at least this many bytes start at a multiple of [`PAGE`], so that direct reads need no bounce buffer.
const LARGE_TENSOR: u64 = 64 << 10;
/// Alignment of large tensors and of the file's end, in bytes.
const PAGE: u64 = 4096;
/// Bytes that the data file is written in at a time: the largest folio of a page cache.
const BLOCK: usize = 2 << 20;
/// Largest manifest in bytes: a model of a terabyte needs about 10 MB of checksums, and needed 40 MB of
/// hashes.
const MAX_MANIFEST_BYTES: u64 = 256 << 20;

/// A tensor that is already on this disk, in the data file of a checkpoint. One that is read in place from a file of the
/// user's is not: what is imported must not depend on it.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownTensor {
    /// The checkpoint whose data file holds it.
    pub checkpoint: String,
    /// Offset in that data file, in bytes.
    pub offset: u64,
    /// The checksum of each [`CHUNK_BYTES`] chunk as it is stored.
    pub chunks: Vec<Checksum>,
    /// Stored bytes of each chunk, if it is compressed; see [`TensorEntry::stored`].
    pub stored: Vec<u32>,
}

impl From<&TensorEntry> for KnownTensor {
    fn from(entry: &TensorEntry) -> KnownTensor {
        let TensorEntry { checkpoint, offset, chunks, stored, .. } = entry;
        let (checkpoint, chunks, stored) = (checkpoint.clone(), chunks.clone(), stored.clone());
        KnownTensor { checkpoint, offset: *offset, chunks, stored }
    }
}

/// How far an import is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ImportProgress {
    /// Bytes of tensors read and hashed.
    pub bytes_done: u64,
    /// Bytes of all tensors.
    pub bytes_total: u64,
    /// Bytes of `bytes_done` that were on this disk already and need no room.
    pub bytes_reused: u64,
}

/// Imports `source` into `dir`, an existing empty directory: writes the data file, the manifest and the tokenizer,
/// and flushes them and the directory to disk. Returns the manifest that it wrote.
///
/// `known` is asked for every distinct tensor; one that it knows is referenced, not written. `progress` is called
/// about every 2 MiB and may stop the import. After an error the directory is for the caller to remove.
///
/// Memory use is bounded whatever the size of the model: a few chunks, and the manifest.
pub fn import(
    source: &Source,
    dir: &Path,
    checkpoint_id: &str,
    known: &dyn Fn(&ContentId) -> Option<KnownTensor>,
    progress: &mut dyn FnMut(ImportProgress) -> ControlFlow<()>,
) -> Result<Manifest, CheckpointError> {
    import_as(Layout::Plain, source, dir, checkpoint_id, known, progress)
}

/// [`import`] with a choice of how tensors are stored that are new to this disk. Their identity is that of their plain
/// bytes, whatever is stored.
pub fn import_as(
    layout: Layout,
    source: &Source,
    dir: &Path,
    checkpoint_id: &str,
    known: &dyn Fn(&ContentId) -> Option<KnownTensor>,
    progress: &mut dyn FnMut(ImportProgress) -> ControlFlow<()>,
) -> Result<Manifest, CheckpointError> {
    import_model(layout, source, None, dir, checkpoint_id, known, progress)
}

/// Imports `source` as [`import`] does, but leaves the bytes of its tensors where they are: every tensor is read once and
/// hashed, and the manifest says in which of the source's files it lies. Only tensors that no file holds in the form in
/// which they are needed (rows in another order, transposed) are written to the data file.
///
/// # Errors
/// As [`import`], and when one of the files changes meanwhile.
pub fn import_in_place(
    source: &Source,
    dir: &Path,
    checkpoint_id: &str,
    known: &dyn Fn(&ContentId) -> Option<KnownTensor>,
    progress: &mut dyn FnMut(ImportProgress) -> ControlFlow<()>,
) -> Result<Manifest, CheckpointError> {
    let files = source.in_place_files()?;
    import_model(Layout::Plain, source, Some(files), dir, checkpoint_id, known, progress)
}

/// Imports a model: all of it, or with `files` only what cannot be read there.
fn import_model(
    layout: Layout,
    source: &Source,
    files: Option<Vec<InPlaceFile>>,
    dir: &Path,
    checkpoint_id: &str,
    known: &dyn Fn(&ContentId) -> Option<KnownTensor>,
    progress: &mut dyn FnMut(ImportProgress) -> ControlFlow<()>,
) -> Result<Manifest, CheckpointError> {
    let mut import = Import::begin(dir, checkpoint_id, source.weight_bytes(), known, progress)?;
    import.compressor = Compressor::new(layout);
    let mut tensors = Vec::with_capacity(source.tensors().len());
    let mut range = Places::default();
    for tensor in source.tensors() {
        let described = Described {
            role: tensor.role,
            dtype: tensor.dtype,
            shape: &tensor.shape,
            bytes: tensor.bytes,
            stage: source.spec().stage(tensor.role),
        };
        let read: ReadAt<'_> = &|at, buffer| source.read_at(tensor, at, buffer);
        tensors.push(match source.file_place(tensor).filter(|_| files.is_some()) {
            Some(place) => import.refer(described, place, range.take(tensor.bytes), read)?,
            None => import.add(described, read)?,
        });
    }
    let in_place = files.map(|files| InPlace { files, range_bytes: range.end });
    for file in in_place.iter().flat_map(|in_place| &in_place.files) {
        file.check().map_err(|change| CheckpointError::invalid(&file.path, change))?;
    }
    let manifest = Manifest {
        version: Manifest::VERSION,
        checkpoint: checkpoint_id.to_owned(),
        spec: source.spec().clone(),
        tensors,
        data_bytes: import.writer.finish()?,
        generation: source.generation().clone(),
        chat_template: source.chat_template().map(str::to_owned),
        special_tokens: source.special_tokens().clone(),
        has_tokenizer: source.tokenizer_json().is_some(),
        base: None,
        in_place,
    };
    if let Some(json) = source.tokenizer_json() {
        write_synced(&dir.join(TOKENIZER_FILE), json)?;
    }
    finish(dir, manifest)
}

/// The model that an adapter is made for.
#[derive(Clone, Copy, Debug)]
pub struct Base<'a> {
    /// Its deployed name.
    pub name: &'a str,
    /// Its manifest.
    pub manifest: &'a Manifest,
    /// The directory of its checkpoint.
    pub dir: &'a Path,
}

/// Imports an adapter as a model of its own, as [`import`] does. The base's tensors are referenced where they lie, its
/// tokenizer is linked; only the adapter's tensors are read and written, one at a time in memory.
pub fn import_adapter(
    adapter: &AdapterSource,
    base: Base<'_>,
    dir: &Path,
    checkpoint_id: &str,
    known: &dyn Fn(&ContentId) -> Option<KnownTensor>,
    progress: &mut dyn FnMut(ImportProgress) -> ControlFlow<()>,
) -> Result<Manifest, CheckpointError> {
    let mut import = Import::begin(dir, checkpoint_id, adapter.weight_bytes(), known, progress)?;
    let mut tensors = base.manifest.tensors.clone();
    for tensor in adapter.tensors() {
        let values = adapter.read(tensor)?;
        let described = Described {
            role: tensor.role,
            dtype: tensor.dtype,
            shape: &tensor.shape,
            bytes: tensor.bytes,
            stage: adapter.spec().stage(tensor.role),
        };
        tensors.push(import.add(described, &|at, buffer| {
            if let Some(part) = values.get(at as usize..at as usize + buffer.len()) {
                buffer.copy_from_slice(part);
            }
            Ok(())
        })?);
    }
    // Stable: within a stage the base's come first, as in a batch without adapters.
    tensors.sort_by_key(|tensor| tensor.stage);
    let template = adapter.chat_template().map(str::to_owned);
    let manifest = Manifest {
        version: Manifest::VERSION,
        checkpoint: checkpoint_id.to_owned(),
        spec: adapter.spec().clone(),
        tensors,
        data_bytes: import.writer.finish()?,
        chat_template: template.or_else(|| base.manifest.chat_template.clone()),
        base: Some(base.name.to_owned()),
        ..base.manifest.clone()
    };
    if manifest.has_tokenizer {
        let (from, to) = (base.dir.join(TOKENIZER_FILE), dir.join(TOKENIZER_FILE));
        // Neither file is ever changed, so both names can be of one; file systems without links get a copy.
        if std::fs::hard_link(&from, &to).is_err() {
            let json = read_limited(&from, crate::tokenizer::MAX_TOKENIZER_BYTES)?;
            write_synced(&to, &json)?;
        }
    }
    finish(dir, manifest)
}

/// Checks and writes the manifest, the last file of an import.
pub(crate) fn finish(dir: &Path, manifest: Manifest) -> Result<Manifest, CheckpointError> {
    let manifest_path = dir.join(MANIFEST_FILE);
    // What `known` gave is checked by the same rules as a manifest read back.
    check_manifest(&manifest).map_err(|message| CheckpointError::invalid(&manifest_path, message))?;
    let json = serde_json::to_vec(&manifest)
        .map_err(|error| CheckpointError::invalid(&manifest_path, format!("cannot be written: {error}")))?;
    write_synced(&manifest_path, &json)?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| CheckpointError::io(dir, error))?;
    Ok(manifest)
}

/// Fills a buffer with a tensor's bytes from an offset in it.
type ReadAt<'a> = &'a dyn Fn(u64, &mut [u8]) -> Result<(), CheckpointError>;

/// A tensor that is to be imported.
struct Described<'a> {
    role: Role,
    dtype: DType,
    shape: &'a [u64],
    bytes: u64,
    stage: usize,
}

/// An import under way.
struct Import<'a> {
    checkpoint_id: &'a str,
    writer: DataWriter,
    /// Tensors that this import has met.
    written: HashMap<ContentId, KnownTensor>,
    known: &'a dyn Fn(&ContentId) -> Option<KnownTensor>,
    state: ImportProgress,
    progress: &'a mut dyn FnMut(ImportProgress) -> ControlFlow<()>,
    buffer: Vec<u8>,
    compressor: Compressor,
}

impl<'a> Import<'a> {
    fn begin(
        dir: &Path,
        checkpoint_id: &'a str,
        bytes_total: u64,
        known: &'a dyn Fn(&ContentId) -> Option<KnownTensor>,
        progress: &'a mut dyn FnMut(ImportProgress) -> ControlFlow<()>,
    ) -> Result<Import<'a>, CheckpointError> {
        if !is_plain_name(checkpoint_id) {
            return Err(CheckpointError::invalid(
                dir,
                format!("{checkpoint_id:?} cannot be the name of a checkpoint"),
            ));
        }
        let writer = DataWriter::create(&dir.join(DATA_FILE))?;
        let state = ImportProgress { bytes_total, ..Default::default() };
        let (written, buffer) = (HashMap::new(), Vec::new());
        let compressor = Compressor::new(Layout::Plain);
        let mut import =
            Import { checkpoint_id, writer, written, known, state, progress, buffer, compressor };
        import.report()?;
        Ok(import)
    }

    fn report(&mut self) -> Result<(), CheckpointError> {
        match (self.progress)(self.state) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(CheckpointError::Cancelled),
        }
    }

    /// Takes up a tensor whose bytes `read` gives, and writes it if it is new.
    fn add(&mut self, tensor: Described<'_>, read: ReadAt<'_>) -> Result<TensorEntry, CheckpointError> {
        let offset = self.writer.places.next(tensor.bytes);
        let (id, chunks, stored) = self.copy(&tensor, Some(offset), read)?;
        let place = match self.written.get(&id).cloned().or_else(|| (self.known)(&id)) {
            Some(place) => {
                self.writer.discard()?;
                self.state.bytes_reused += tensor.bytes;
                self.report()?;
                place
            }
            None => {
                self.writer.keep(offset, tensor.bytes);
                KnownTensor { checkpoint: self.checkpoint_id.to_owned(), offset, chunks, stored }
            }
        };
        self.written.entry(id).or_insert_with(|| place.clone());
        Ok(TensorEntry {
            role: tensor.role,
            dtype: tensor.dtype,
            shape: tensor.shape.to_vec(),
            id,
            bytes: tensor.bytes,
            stage: tensor.stage as u32,
            checkpoint: place.checkpoint,
            offset: place.offset,
            chunks: place.chunks,
            stored: place.stored,
            in_place: None,
        })
    }

    /// Takes up a tensor whose bytes stay where they are; `offset` is its place among those.
    fn refer(
        &mut self,
        tensor: Described<'_>,
        place: FilePlace,
        offset: u64,
        read: ReadAt<'_>,
    ) -> Result<TensorEntry, CheckpointError> {
        let (id, chunks, _) = self.copy(&tensor, None, read)?;
        self.state.bytes_reused += tensor.bytes;
        self.report()?;
        Ok(TensorEntry {
            role: tensor.role,
            dtype: tensor.dtype,
            shape: tensor.shape.to_vec(),
            id,
            bytes: tensor.bytes,
            stage: tensor.stage as u32,
            checkpoint: self.checkpoint_id.to_owned(),
            offset,
            chunks,
            stored: Vec::new(),
            in_place: Some(place),
        })
    }

    /// Reads and hashes a tensor, and copies it to `offset` of the data file on the way, if there is one. Gives its
    /// identity and, as it is stored, the checksums and (if it is compressed) the lengths of its chunks.
    fn copy(
        &mut self,
        tensor: &Described<'_>,
        offset: Option<u64>,
        read: ReadAt<'_>,
    ) -> Result<(ContentId, Vec<Checksum>, Vec<u32>), CheckpointError> {
        let mut id = ContentId::hasher(tensor.dtype, tensor.shape);
        let count = tensor.bytes.div_ceil(CHUNK_BYTES) as usize;
        let (mut chunks, mut stored) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let mut compressed = false;
        let mut at = 0;
        while at < tensor.bytes {
            self.buffer.resize((tensor.bytes - at).min(CHUNK_BYTES) as usize, 0);
            read(at, &mut self.buffer)?;
            id.update(&self.buffer);
            let frame = offset.and_then(|_| self.compressor.frame(tensor.dtype, &self.buffer));
            compressed |= frame.is_some();
            let chunk = frame.as_ref().unwrap_or(&self.buffer);
            chunks.push(Checksum::of(chunk));
            stored.push(chunk.len() as u32);
            if let Some(offset) = offset {
                self.writer.write(offset + at, chunk)?;
            }
            at += self.buffer.len() as u64;
            self.state.bytes_done += self.buffer.len() as u64;
            self.report()?;
        }
        if !compressed {
            stored.clear();
        }
        Ok((Hash(*id.finalize().as_bytes()), chunks, stored))
    }
}

/// Places one after the other.
#[derive(Default)]
struct Places {
    /// End of the last one that was taken.
    end: u64,
}

impl Places {
    /// Where a tensor of `bytes` would start if it came next.
    fn next(&self, bytes: u64) -> u64 {
        place_after(self.end, bytes)
    }

    /// Takes the next place for a tensor of `bytes`.
    fn take(&mut self, bytes: u64) -> u64 {
        let offset = self.next(bytes);
        self.end = offset + bytes;
        offset
    }
}

/// The data file while it is written. A tensor is written first and kept only if its identity, known afterwards, is
/// new: one pass over the source, and at most one tensor of room beyond the result. A compressed one has the place of its
/// plain bytes; what its chunks do not fill is left out, a hole that takes no room on the disk.
///
/// Whole blocks of [`BLOCK`] bytes are written at a time. A page cache with large folios (Linux 6.16 on ext4, earlier on
/// others) then has each in one piece, which a mapping reaches by one entry of the page tables.
struct DataWriter {
    path: PathBuf,
    file: File,
    /// Bytes that are still to be written, all of one block, and where they begin.
    block: Vec<u8>,
    block_start: u64,
    /// Of the tensors that were kept.
    places: Places,
}

impl DataWriter {
    fn create(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::create_new(path).map_err(|error| CheckpointError::io(path, error))?;
        let (block, places) = (Vec::with_capacity(BLOCK), Places::default());
        Ok(DataWriter { path: path.to_path_buf(), file, block, block_start: 0, places })
    }

    /// Writes what comes at `offset`, after all that came before. A gap of less than a page is filled with zeros, a larger
    /// one stays a hole.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), CheckpointError> {
        const ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];
        let end = self.block_start + self.block.len() as u64;
        let gap = offset.checked_sub(end).and_then(|gap| ZEROS.get(..usize::try_from(gap).ok()?));
        match gap {
            Some(zeros) => self.append(zeros)?,
            None => {
                self.flush()?;
                self.block_start = offset;
            }
        }
        self.append(bytes)
    }

    fn append(&mut self, mut bytes: &[u8]) -> Result<(), CheckpointError> {
        while !bytes.is_empty() {
            let room = BLOCK - (self.block_start % BLOCK as u64) as usize - self.block.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.block.extend_from_slice(now);
            if now.len() == room {
                self.flush()?;
            }
            bytes = later;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), CheckpointError> {
        let written = self.file.write_all_at(&self.block, self.block_start);
        written.map_err(|error| CheckpointError::io(&self.path, error))?;
        self.block_start += self.block.len() as u64;
        self.block.clear();
        Ok(())
    }

    /// Makes the tensor at `offset` part of the file.
    fn keep(&mut self, offset: u64, bytes: u64) {
        self.places.end = offset + bytes;
    }

    /// Gives back the room of a tensor that is not kept, so that none of it lies where the next one has holes or gaps.
    fn discard(&mut self) -> Result<(), CheckpointError> {
        let end = self.places.end;
        match end.checked_sub(self.block_start) {
            Some(kept) => self.block.truncate(kept as usize),
            None => {
                self.block.clear();
                self.block_start = end;
            }
        }
        self.file.set_len(end).map_err(|error| CheckpointError::io(&self.path, error))
    }

    /// Cuts off what was not kept, pads to whole pages, flushes to disk; returns the length in bytes.
    fn finish(mut self) -> Result<u64, CheckpointError> {
        self.flush()?;
        let length = self.places.end.next_multiple_of(PAGE);
        self.file
            .set_len(self.places.end)
            .and_then(|()| self.file.set_len(length))
            .and_then(|()| self.file.sync_all())
            .map_err(|error| CheckpointError::io(&self.path, error))?;
        Ok(length)
    }
}

/// Where a tensor of `bytes` starts in a data file whose last one ends at `end`.
pub(crate) fn place_after(end: u64, bytes: u64) -> u64 {
    end.next_multiple_of(if bytes >= LARGE_TENSOR { PAGE } else { TENSOR_ALIGNMENT })
}

pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    File::create_new(path)
        .and_then(|file| file.write_all_at(bytes, 0).and_then(|()| file.sync_all()))
        .map_err(|error| CheckpointError::io(path, error))
}

/// The part of a manifest that every version has.
#[derive(serde::Deserialize)]
struct Version {
    version: u32,
}

/// Reads and checks the manifest in `dir`, the directory of an imported checkpoint.
///
/// A manifest that is accepted is consistent in itself: its sizes follow from its spec and its own tensors lie in
/// the data file, or in place in a file that it lists. Whether the files hold what the checksums say is found when its chunks are read.
pub fn read_manifest(dir: &Path) -> Result<Manifest, CheckpointError> {
    let path = dir.join(MANIFEST_FILE);
    let bytes = read_limited(&path, MAX_MANIFEST_BYTES)?;
    let corrupted = |error| {
        CheckpointError::invalid(&path, format!("is not a manifest: {error}; deploy the model again"))
    };
    let Version { version } = serde_json::from_slice(&bytes).map_err(corrupted)?;
    if !(Manifest::OLDEST_VERSION..=Manifest::VERSION).contains(&version) {
        return Err(CheckpointError::unsupported(
            &path,
            format!(
                "has layout version {version}, this build reads {} to {}; deploy the model again",
                Manifest::OLDEST_VERSION,
                Manifest::VERSION
            ),
        ));
    }
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(corrupted)?;
    check_manifest(&manifest)
        .map_err(|message| CheckpointError::invalid(&path, format!("{message}; deploy the model again")))?;
    Ok(manifest)
}

fn check_manifest(manifest: &Manifest) -> Result<(), String> {
    if !is_plain_name(&manifest.checkpoint) {
        return Err(format!("{:?} cannot be the name of a checkpoint", manifest.checkpoint));
    }
    let spec = &manifest.spec;
    layout::check_spec(spec)?;
    let names: Vec<String> = manifest.tensors.iter().map(|entry| format!("{:?}", entry.role)).collect();
    let described =
        manifest.tensors.iter().zip(&names).map(|(entry, name)| {
            (entry.role, entry.dtype, entry.shape.as_slice(), entry.bytes, name.as_str())
        });
    layout::check_tensors(spec, described)?;
    let mut last_stage = 0;
    for (entry, name) in manifest.tensors.iter().zip(&names) {
        if !is_plain_name(&entry.checkpoint) {
            return Err(format!(
                "tensor {name} lies in {:?}, which cannot be the name of a checkpoint",
                entry.checkpoint
            ));
        }
        if entry.stage as usize != spec.stage(entry.role) || entry.stage < last_stage {
            return Err(format!("tensor {name} is not in execution order"));
        }
        last_stage = entry.stage;
        if entry.chunks.len() as u64 != entry.bytes.div_ceil(CHUNK_BYTES) {
            return Err(format!(
                "tensor {name} of {} bytes has {} chunk hashes",
                entry.bytes,
                entry.chunks.len()
            ));
        }
        compression::check(entry).map_err(|problem| format!("tensor {name} {problem}"))?;
        if entry.in_place.is_some() {
            continue;
        }
        let end = entry.offset.checked_add(entry.bytes);
        let inside =
            end.is_some_and(|end| entry.checkpoint != manifest.checkpoint || end <= manifest.data_bytes);
        if !entry.offset.is_multiple_of(TENSOR_ALIGNMENT) || !inside {
            return Err(format!(
                "tensor {name} cannot start at byte {} of a data file of {}",
                entry.offset, manifest.data_bytes
            ));
        }
    }
    in_place::check(manifest.in_place.as_ref(), &manifest.tensors, &names)
}

/// Whether a name from outside can be used as the name of a directory beside others.
pub(crate) fn is_plain_name(name: &str) -> bool {
    Path::new(name).file_name() == Some(name.as_ref()) && !name.contains(['/', '\0'])
}
