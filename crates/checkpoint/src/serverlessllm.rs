//! Reads the checkpoint format of ServerlessLLM as its Transformers backend writes it: `tensor_index.json` and
//! `tensor.data_0`, `tensor.data_1`, ... Never trusts an offset before comparing it with the files.
//!
//! The index maps a name to `[offset, size, shape, stride, dtype]`. Offsets count through all data files, one after the
//! other; a data file begins with a tensor and holds whole ones (a new one begins where 10 GiB would be exceeded), each
//! padded to 8 bytes. There is no checksum. Tensors with the same storage have the same offset.
//!
//! ServerlessLLM writes with `O_DIRECT` and ignores that the unaligned end of a file is refused, so that files without
//! their last megabytes are about (its issue 322); these are refused here, by name.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use crate::CheckpointError;
use crate::file::{SourceFile, read_limited};
use crate::hugging_face::{Headers, MAX_JSON_BYTES};
use crate::safetensors::{self, Tensor};

const INDEX: &str = "tensor_index.json";
/// More data files than any model has: 5 TiB of weights.
const MAX_FILES: usize = 512;

/// `offset, size, shape, stride, dtype`.
type Entry = (u64, u64, Vec<u64>, Vec<u64>, String);

/// Whether `directory` holds such a checkpoint.
pub(crate) fn is_here(directory: &Path) -> bool {
    directory.join(INDEX).exists()
}

/// Whether `directory` holds one for vLLM, which has its own names and cuts tensors for its ranks.
pub(crate) fn is_for_vllm(directory: &Path) -> bool {
    directory.join("rank_0").join(INDEX).exists()
}

/// Opens the data files and lists the tensors, whose offsets count within their file.
pub(crate) fn read_headers(directory: &Path) -> Result<Headers, CheckpointError> {
    let path = directory.join(INDEX);
    let index: BTreeMap<String, Entry> = serde_json::from_slice(&read_limited(&path, MAX_JSON_BYTES)?)
        .map_err(|error| CheckpointError::invalid(&path, format!("is not an index of tensors: {error}")))?;
    let mut files = Vec::new();
    loop {
        let path = directory.join(format!("tensor.data_{}", files.len()));
        if !path.exists() {
            break;
        }
        if files.len() == MAX_FILES {
            return Err(CheckpointError::invalid(directory, format!("has more than {MAX_FILES} data files")));
        }
        files.push(Arc::new(SourceFile::open(&path)?));
    }
    let lengths: Vec<u64> = files.iter().map(|file| file.length).collect();
    let tensors = place(index, &lengths).map_err(|problem| match problem {
        Problem::Index(message) => CheckpointError::invalid(&path, message),
        Problem::Data(message) => CheckpointError::invalid(
            directory,
            format!(
                "{message}. ServerlessLLM loses the end of data files whose length is no multiple of the disk's \
                 blocks; deploy the original checkpoint"
            ),
        ),
    })?;
    Ok((files, tensors))
}

/// What is wrong with a checkpoint.
#[derive(Debug)]
enum Problem {
    /// The index contradicts itself.
    Index(String),
    /// The data files are not what the index needs.
    Data(String),
}

/// Finds every tensor's file, and its offset there, in data files of these lengths.
fn place(index: BTreeMap<String, Entry>, lengths: &[u64]) -> Result<Vec<(usize, Tensor)>, Problem> {
    let mut starts = Vec::with_capacity(lengths.len());
    let mut total = 0u64;
    for length in lengths {
        starts.push(total);
        total = total.saturating_add(*length);
    }
    let mut tensors = Vec::with_capacity(index.len());
    for (name, entry) in index {
        tensors.push(describe(name, entry).map_err(Problem::Index)?);
    }
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    for pair in tensors.windows(2) {
        if let [first, second] = pair
            && first.offset != second.offset
            && first.offset.saturating_add(first.bytes) > second.offset
        {
            return Err(Problem::Index(format!("tensors {} and {} overlap", first.name, second.name)));
        }
    }
    // Where a file lost its end, all that follows would be found too early. A file begins with a tensor, so that shows.
    for (file, start) in starts.iter().enumerate().skip(1) {
        let first = tensors.partition_point(|tensor| tensor.offset < *start);
        if tensors.get(first).is_some_and(|tensor| tensor.offset != *start) {
            return Err(Problem::Data(format!(
                "no tensor begins with tensor.data_{file}, so the files before it do not have the length that they had"
            )));
        }
    }
    tensors
        .into_iter()
        .map(|mut tensor| {
            let file = starts.partition_point(|start| *start <= tensor.offset).checked_sub(1);
            let (Some(file), Some(end)) = (file, tensor.offset.checked_add(tensor.bytes)) else {
                return Err(Problem::Data("there is no tensor.data_0".to_owned()));
            };
            let (start, length) = (
                starts.get(file).copied().unwrap_or_default(),
                lengths.get(file).copied().unwrap_or_default(),
            );
            if end > start.saturating_add(length) {
                return Err(Problem::Data(format!(
                    "tensor {} needs the bytes {}..{} of tensor.data_{file}, which has {length}",
                    tensor.name,
                    tensor.offset - start,
                    end - start
                )));
            }
            tensor.offset -= start;
            Ok((file, tensor))
        })
        .collect()
}

/// A tensor as the index describes it, with the offset as it is there. Views that are not the whole of their storage in
/// its order are refused: the index does not say where in it they begin.
fn describe(name: String, (offset, size, shape, stride, dtype): Entry) -> Result<Tensor, String> {
    let dtype = match dtype.strip_prefix("torch.").unwrap_or(&dtype) {
        "float64" => "F64",
        "float32" => "F32",
        "float16" => "F16",
        "bfloat16" => "BF16",
        "int64" => "I64",
        "int32" => "I32",
        "int16" => "I16",
        "int8" => "I8",
        "uint8" => "U8",
        "bool" => "BOOL",
        _ => dtype.as_str(),
    }
    .to_owned();
    if stride.len() != shape.len() {
        return Err(format!("tensor {name} has {} dimensions and {} strides", shape.len(), stride.len()));
    }
    let mut elements = Some(1u64);
    let mut in_order = true;
    for (&dim, &stride) in shape.iter().zip(&stride).rev() {
        in_order &= dim == 1 || elements == Some(stride);
        elements = elements.and_then(|elements| elements.checked_mul(dim));
    }
    if !in_order {
        return Err(format!(
            "tensor {name} of shape {shape:?} is a view with strides {stride:?}; save the model with contiguous tensors"
        ));
    }
    let bytes = safetensors::element_bytes(&dtype)
        .map(|element| elements.and_then(|count| count.checked_mul(element)));
    if bytes.is_some_and(|bytes| bytes != Some(size)) {
        return Err(format!(
            "tensor {name} of shape {shape:?} and type {dtype} does not fill its storage of {size} bytes, and the index \
             does not say where it begins"
        ));
    }
    Ok(Tensor { name, dtype, shape, offset, bytes: size })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Tensors of bytes at (offset, size).
    fn index(places: &[(u64, u64)]) -> BTreeMap<String, Entry> {
        let entry = |(number, &(offset, size)): (usize, &(u64, u64))| {
            (format!("t{number}"), (offset, size, vec![size], vec![1], "torch.uint8".to_owned()))
        };
        places.iter().enumerate().map(entry).collect()
    }

    fn places(index: BTreeMap<String, Entry>, lengths: &[u64]) -> Vec<(usize, u64)> {
        place(index, lengths).unwrap().into_iter().map(|(file, tensor)| (file, tensor.offset)).collect()
    }

    #[test]
    fn offsets_count_through_the_files() {
        let index = index(&[(0, 5), (8, 8), (16, 3), (24, 100)]);
        assert_eq!(places(index.clone(), &[124]), [(0, 0), (0, 8), (0, 16), (0, 24)]);
        assert_eq!(places(index.clone(), &[16, 8, 104]), [(0, 0), (0, 8), (1, 0), (2, 0)]);
        // Padding, and what an older and longer file left, harms only in front of another file.
        assert_eq!(places(index.clone(), &[16, 8, 999]), [(0, 0), (0, 8), (1, 0), (2, 0)]);
    }

    #[test]
    fn equal_places_are_one_storage_and_other_overlaps_an_error() {
        assert_eq!(places(index(&[(0, 8), (0, 8), (8, 8)]), &[16]), [(0, 0), (0, 0), (0, 8)]);
        assert!(matches!(place(index(&[(0, 9), (8, 8)]), &[16]), Err(Problem::Index(_))));
    }

    #[test]
    fn lost_ends_are_found_wherever_they_were_lost() {
        let sound = index(&[(0, 5), (8, 8), (16, 3), (24, 100)]);
        for lengths in
            [&[][..], &[0], &[123], &[16, 8, 99], &[8, 8, 104], &[16, 7, 104], &[16, 8], &[17, 8, 103]]
        {
            let problem = place(sound.clone(), lengths);
            assert!(matches!(problem, Err(Problem::Data(_))), "{lengths:?}: {problem:?}");
        }
        let wrapping = index(&[(u64::MAX - 3, 8)]);
        assert!(matches!(place(wrapping, &[16]), Err(Problem::Data(_))));
    }

    #[test]
    fn only_whole_storages_in_order_are_tensors() {
        let tensor = |size, shape: &[u64], stride: &[u64]| {
            describe("t".to_owned(), (0, size, shape.to_vec(), stride.to_vec(), "torch.bfloat16".to_owned()))
        };
        assert_eq!(tensor(12, &[2, 3], &[3, 1]).unwrap().dtype, "BF16");
        // The stride of a dimension of one says nothing.
        assert!(tensor(6, &[1, 3], &[77, 1]).is_ok());
        assert!(tensor(12, &[2, 3], &[1, 2]).unwrap_err().contains("view"));
        assert!(tensor(24, &[2, 3], &[3, 1]).unwrap_err().contains("storage"));
        assert!(tensor(12, &[2, 3], &[1]).is_err());
        assert!(tensor(12, &[u64::MAX, 3], &[3, 1]).is_err());
    }
}
