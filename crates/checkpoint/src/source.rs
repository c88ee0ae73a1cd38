//! A checkpoint found outside: what model it holds and where its tensors' bytes lie. Opening reads no weights.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::file::{Presence, ReadAt};
use crate::in_place::{FilePlace, InPlaceFile};
use crate::{
    CheckpointError, DType, GenerationDefaults, LayerRole, ModelSpec, Role, gguf_model, hugging_face, layout,
};

/// A checkpoint found outside, checked against its own description. Tensor bytes are read on demand.
#[derive(Debug)]
pub struct Source {
    spec: ModelSpec,
    tensors: Vec<SourceTensor>,
    files: Vec<Arc<dyn ReadAt>>,
    text: TextAssets,
}

/// What a checkpoint says about text: all optional, a model without it is served for token ids.
#[derive(Debug, Default)]
pub(crate) struct TextAssets {
    pub(crate) tokenizer_json: Option<Vec<u8>>,
    pub(crate) chat_template: Option<String>,
    pub(crate) special_tokens: BTreeMap<String, String>,
    pub(crate) generation: GenerationDefaults,
    pub(crate) warnings: Vec<String>,
}

/// One tensor of a [`Source`].
#[derive(Clone, Debug, PartialEq)]
pub struct SourceTensor {
    /// What it is for.
    pub role: Role,
    /// Element type as stored.
    pub dtype: DType,
    /// Outermost dimension first.
    pub shape: Vec<u64>,
    /// Size in bytes.
    pub bytes: u64,
    pub(crate) location: Location,
}

/// Where a tensor's bytes lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Location {
    /// Index into the source's files.
    pub(crate) file: usize,
    /// First byte in that file.
    pub(crate) offset: u64,
    pub(crate) rows: RowOrder,
}

/// How the rows of a matrix (or the elements of a bias) are ordered in the file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum RowOrder {
    /// As they are needed.
    Plain,
    /// Meta's order: within each head the rotary pairs lie side by side. Needed is the Hugging Face order, first
    /// all first members, then all second ones.
    InterleavedPairs {
        /// Rows per head, even.
        head_dim: u64,
    },
    /// Blocks of `rows` rows that start every `stride` rows.
    Blocks {
        /// Rows of a block.
        rows: u64,
        /// Rows from the start of a block to the start of the next.
        stride: u64,
    },
    /// The tensor's rows are columns in the file.
    Columns {
        /// Bytes of a row in the file.
        stride: u64,
    },
}

/// A tensor found by a format's reader, before it is checked against the spec.
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) tensor: SourceTensor,
}

/// Opens a checkpoint: a Hugging Face or ServerlessLLM directory, a `.safetensors` file with `config.json` beside it, a `.gguf` file,
/// or a directory that holds exactly one `.gguf` file.
///
/// Reads headers and small files only. Errors name the file, what is wrong with it and what to do.
pub fn open(path: &Path) -> Result<Source, CheckpointError> {
    open_with(path, None)
}

/// Opens a checkpoint whose weights are still arriving, as [`open`] does: its files lie at their full size already, and
/// every byte that is read of the weights, here and later, is waited for.
pub fn open_arriving(path: &Path, presence: &Arc<dyn Presence>) -> Result<Source, CheckpointError> {
    open_with(path, Some(presence))
}

fn open_with(path: &Path, presence: Option<&Arc<dyn Presence>>) -> Result<Source, CheckpointError> {
    let metadata = std::fs::metadata(path).map_err(|error| CheckpointError::io(path, error))?;
    if metadata.is_dir() {
        if path.join("config.json").exists() {
            return hugging_face::open_directory(path, presence);
        }
        let files = list_files(path, "gguf")?;
        return match files.as_slice() {
            [file] => gguf_model::open(file, presence),
            [] => Err(CheckpointError::invalid(
                path,
                "holds neither a config.json with safetensors nor a .gguf file; give the directory of a model",
            )),
            _ => Err(CheckpointError::invalid(
                path,
                format!("holds {} .gguf files; give the path of the one that you want", files.len()),
            )),
        };
    }
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("safetensors") => hugging_face::open_file(path, presence),
        Some("gguf") => gguf_model::open(path, presence),
        _ => Err(CheckpointError::unsupported(
            path,
            "is not a model that can be read; give a Hugging Face directory, a .safetensors file or a .gguf file",
        )),
    }
}

/// Regular files in `directory` whose name ends in `.extension`, sorted by name.
pub(crate) fn list_files(
    directory: &Path,
    extension: &str,
) -> Result<Vec<std::path::PathBuf>, CheckpointError> {
    let io_error = |error| CheckpointError::io(directory, error);
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(io_error)? {
        let path = entry.map_err(io_error)?.path();
        if path.extension().is_some_and(|found| found == extension) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

impl Source {
    /// Checks the found tensors against the spec and puts them into execution order. `biases` are layer roles that
    /// this model needs beyond [`ModelSpec::required_roles`].
    pub(crate) fn assemble(
        path: &Path,
        spec: ModelSpec,
        found: Vec<Found>,
        biases: &[LayerRole],
        files: Vec<Arc<dyn ReadAt>>,
        text: TextAssets,
    ) -> Result<Source, CheckpointError> {
        let described = found.iter().map(|Found { name, tensor }| {
            (tensor.role, tensor.dtype, tensor.shape.as_slice(), tensor.bytes, name.as_str())
        });
        layout::check_tensors(&spec, described).map_err(|message| CheckpointError::invalid(path, message))?;
        let mut tensors: Vec<SourceTensor> = found.into_iter().map(|found| found.tensor).collect();
        for &role in biases {
            if !tensors.iter().any(|tensor| tensor.role == Role::Layer(0, role)) {
                return Err(CheckpointError::invalid(
                    path,
                    format!(
                        "a {} model as configured needs {role:?}, but there is no such tensor",
                        spec.family
                    ),
                ));
            }
        }
        tensors.sort_by_key(|tensor| (spec.stage(tensor.role), tensor.role));
        Ok(Source { spec, tensors, files, text })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// All tensors in execution order: by stage, then by role.
    pub fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    /// Bytes of all tensors.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// A file and the part of it that all bytes of a tensor (one of this source's) lie in.
    pub fn span(&self, tensor: &SourceTensor) -> Option<(&Path, Range<u64>)> {
        let Location { file, offset, rows } = tensor.location;
        let file = self.files.get(file)?.as_file()?;
        let rows_stored = tensor.shape.first().copied().unwrap_or(1).max(1);
        let row_bytes = tensor.bytes / rows_stored;
        let length = match rows {
            RowOrder::Plain | RowOrder::InterleavedPairs { .. } => tensor.bytes,
            RowOrder::Blocks { rows, stride } => {
                rows_stored.div_ceil(rows.max(1)).saturating_mul(stride).saturating_mul(row_bytes)
            }
            RowOrder::Columns { stride } => stride.saturating_mul(tensor.shape.last().copied().unwrap_or(1)),
        };
        Some((&file.path, offset..offset.saturating_add(length).min(file.length)))
    }

    /// Sampling defaults and end tokens.
    pub fn generation(&self) -> &GenerationDefaults {
        &self.text.generation
    }

    /// The Jinja chat template, if there is one.
    pub fn chat_template(&self) -> Option<&str> {
        self.text.chat_template.as_deref()
    }

    /// Text of `bos_token`, `eos_token`, `unk_token` and `pad_token`, as far as the checkpoint names them.
    pub fn special_tokens(&self) -> &BTreeMap<String, String> {
        &self.text.special_tokens
    }

    /// A tokenizer in the format of the `tokenizers` library, known to parse; without truncation and padding, which
    /// are decisions of whoever serves the model.
    pub fn tokenizer_json(&self) -> Option<&[u8]> {
        self.text.tokenizer_json.as_deref()
    }

    /// What the user should know although the checkpoint is usable.
    pub fn warnings(&self) -> &[String] {
        &self.text.warnings
    }

    /// The files that tensors lie in, as they were when they were opened.
    pub(crate) fn in_place_files(&self) -> Result<Vec<InPlaceFile>, CheckpointError> {
        self.files.iter().filter_map(|file| file.as_file()).map(InPlaceFile::of).collect()
    }

    /// Where in these files the bytes of `tensor` are, if they lie in one just as they are needed.
    pub(crate) fn file_place(&self, tensor: &SourceTensor) -> Option<FilePlace> {
        let Location { file, offset, rows } = tensor.location;
        let before = self.files.get(..file)?.iter().filter(|other| other.as_file().is_some()).count();
        let is_plain = self.files.get(file)?.as_file().is_some() && rows == RowOrder::Plain;
        is_plain.then_some(FilePlace { file: before as u32, offset })
    }

    /// Fills `buffer` with the bytes of `tensor` (one of this source's) from byte `at` of the tensor.
    ///
    /// The bytes are in the order that the spec asks for, whatever the order in the file.
    pub fn read_at(&self, tensor: &SourceTensor, at: u64, buffer: &mut [u8]) -> Result<(), CheckpointError> {
        tensor.read_at(&self.files, at, buffer)
    }
}

impl SourceTensor {
    /// [`Source::read_at`] for a tensor in `files`.
    pub(crate) fn read_at(
        &self,
        files: &[Arc<dyn ReadAt>],
        at: u64,
        buffer: &mut [u8],
    ) -> Result<(), CheckpointError> {
        let Location { file, offset, rows } = self.location;
        let in_range = at.checked_add(buffer.len() as u64).is_some_and(|end| end <= self.bytes);
        let Some(file) = files.get(file).filter(|_| in_range).map(Arc::as_ref) else {
            let error = std::io::Error::from(std::io::ErrorKind::InvalidInput);
            return Err(CheckpointError::io(
                Path::new("tensor of another source, or bytes beyond its end"),
                error,
            ));
        };
        // A checked shape has rows; an element of a bias counts as a row.
        let row_bytes = self.bytes / self.shape.first().copied().unwrap_or(1).max(1);
        let source_row: &dyn Fn(u64) -> u64 = match rows {
            RowOrder::Plain => return file.read_exact_at(buffer, offset + at),
            RowOrder::Columns { stride } => {
                let columns = self.shape.last().copied().unwrap_or(1).max(1);
                let element = row_bytes / columns;
                let strip = Strip { file, offset, stride, columns, element: element as usize };
                return strip.read(at, buffer);
            }
            RowOrder::InterleavedPairs { head_dim } => &move |row| interleaved_row(row, head_dim),
            RowOrder::Blocks { rows, stride } => &move |row| row / rows * stride + row % rows,
        };
        let mut at = at;
        let mut rest = buffer;
        while !rest.is_empty() {
            let row = at / row_bytes;
            let within = at % row_bytes;
            let take = ((row_bytes - within) as usize).min(rest.len());
            let (part, tail) = rest.split_at_mut(take);
            file.read_exact_at(part, offset + source_row(row) * row_bytes + within)?;
            at += take as u64;
            rest = tail;
        }
        Ok(())
    }
}

/// A matrix of plain elements whose rows are columns in the file.
struct Strip<'a> {
    file: &'a dyn ReadAt,
    /// Of the first element, in bytes.
    offset: u64,
    /// Bytes of a row in the file.
    stride: u64,
    /// Rows in the file that hold elements of it: the columns of the matrix.
    columns: u64,
    /// Bytes of an element.
    element: usize,
}

impl Strip<'_> {
    /// Fills `buffer` with the bytes of the matrix from byte `at` on. Needs memory for the buffer once more and two
    /// rows.
    fn read(&self, at: u64, buffer: &mut [u8]) -> Result<(), CheckpointError> {
        let row_bytes = self.columns * self.element as u64;
        let first = at / row_bytes;
        let rows = ((at + buffer.len() as u64).div_ceil(row_bytes) - first) as usize;
        let mut turned = vec![0; rows * row_bytes as usize];
        let mut stored = vec![0; rows * self.element];
        for column in 0..self.columns {
            let start = self.offset + column * self.stride + first * self.element as u64;
            self.file.read_exact_at(&mut stored, start)?;
            let places = turned.chunks_exact_mut(row_bytes as usize);
            for (row, value) in places.zip(stored.chunks_exact(self.element)) {
                let place = column as usize * self.element;
                if let Some(place) = row.get_mut(place..place + self.element) {
                    place.copy_from_slice(value);
                }
            }
        }
        let skipped = (at - first * row_bytes) as usize;
        if let Some(wanted) = turned.get(skipped..skipped + buffer.len()) {
            buffer.copy_from_slice(wanted);
        }
        Ok(())
    }
}

/// The row in Meta's order that holds row `row` of the Hugging Face order: pair member `j` of pair `i` is row
/// `j * head_dim / 2 + i` there and row `2 * i + j` here.
fn interleaved_row(row: u64, head_dim: u64) -> u64 {
    let (head, within) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    let (member, pair) = (within / half, within % half);
    head * head_dim + 2 * pair + member
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_move_apart_within_their_head() {
        let order: Vec<u64> = (0..8).map(|row| interleaved_row(row, 4)).collect();
        assert_eq!(order, [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
