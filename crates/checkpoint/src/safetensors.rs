//! The safetensors container: parses and checks its header. Never trusts an offset before comparing it with the file.
//!
//! Format: u64 little-endian header length, JSON header, then the tensors' bytes; offsets count from the header's end.

use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};

use crate::file::{ReadAt, SourceFile};
use crate::{CheckpointError, DType};

/// The reference implementation's limit on the header, in bytes.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A tensor as the header describes it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    /// The dtype as written, e.g. `BF16`.
    pub(crate) dtype: String,
    /// Outermost dimension first.
    pub(crate) shape: Vec<u64>,
    /// Offset of the first byte in the file.
    pub(crate) offset: u64,
    /// Size in bytes; `offset + bytes` is within the file.
    pub(crate) bytes: u64,
}

impl Tensor {
    /// The element type, if this build can compute with it.
    pub(crate) fn element_type(&self) -> Option<DType> {
        match self.dtype.as_str() {
            "F32" => Some(DType::F32),
            "F16" => Some(DType::F16),
            "BF16" => Some(DType::BF16),
            _ => None,
        }
    }
}

/// Reads the header of a safetensors file: all tensors, in the order of their offsets, inside the file and disjoint.
pub(crate) fn read_header(file: &SourceFile) -> Result<Vec<Tensor>, CheckpointError> {
    let invalid = |message: String| CheckpointError::invalid(&file.path, message);
    if file.length < 8 {
        return Err(invalid(format!("{} bytes are too few for a safetensors file", file.length)));
    }
    let mut prefix = [0u8; 8];
    file.read_exact_at(&mut prefix, 0)?;
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > MAX_HEADER_BYTES || header_bytes > file.length - 8 {
        return Err(invalid(format!(
            "claims a header of {header_bytes} bytes in a file of {} (limit {MAX_HEADER_BYTES}); \
             it is truncated or not a safetensors file",
            file.length
        )));
    }
    let mut header = vec![0u8; header_bytes as usize];
    file.read_exact_at(&mut header, 8)?;
    parse_header(&header, file.length - 8 - header_bytes)
        .map_err(|message| invalid(format!("{message}; download the file again")))
        .map(|mut tensors| {
            for tensor in &mut tensors {
                tensor.offset += 8 + header_bytes;
            }
            tensors
        })
}

/// Parses the JSON header for `data_bytes` bytes of data; offsets in the result count from the start of the data.
fn parse_header(header: &[u8], data_bytes: u64) -> Result<Vec<Tensor>, String> {
    let mut deserializer = serde_json::Deserializer::from_slice(header);
    let entries = Entries
        .deserialize(&mut deserializer)
        .map_err(|error| format!("the header is not valid JSON: {error}"))?;
    // Writers pad the header with spaces; anything else behind the object is refused.
    deserializer.end().map_err(|error| format!("the header is not valid JSON: {error}"))?;
    let mut tensors = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        let (begin, end) = entry.data_offsets;
        if begin > end || end > data_bytes {
            return Err(format!(
                "tensor {name} claims the bytes {begin}..{end} of {data_bytes}; the file is truncated or corrupted"
            ));
        }
        let tensor =
            Tensor { name, dtype: entry.dtype, shape: entry.shape, offset: begin, bytes: end - begin };
        let element_bytes = element_bytes(&tensor.dtype);
        let elements = tensor.shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim));
        let expected = element_bytes.map(|size| elements.and_then(|elements| elements.checked_mul(size)));
        if let Some(expected) = expected
            && expected != Some(tensor.bytes)
        {
            return Err(format!(
                "tensor {} of shape {:?} and type {} does not fill its {} bytes",
                tensor.name, tensor.shape, tensor.dtype, tensor.bytes
            ));
        }
        tensors.push(tensor);
    }
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    for pair in tensors.windows(2) {
        if let [first, second] = pair
            && first.offset + first.bytes > second.offset
        {
            return Err(format!("tensors {} and {} overlap", first.name, second.name));
        }
    }
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    let twice = names.windows(2).find_map(|pair| match pair {
        [first, second] if first == second => Some(*first),
        _ => None,
    });
    if let Some(name) = twice {
        return Err(format!("tensor {name} is described twice"));
    }
    Ok(tensors)
}

/// Bytes per element of the types that the format defines with whole bytes; `None` for types unknown here.
pub(crate) fn element_bytes(dtype: &str) -> Option<u64> {
    match dtype {
        "F64" | "I64" | "U64" | "C64" => Some(8),
        "F32" | "I32" | "U32" => Some(4),
        "F16" | "BF16" | "I16" | "U16" => Some(2),
        "I8" | "U8" | "BOOL" | "F8_E4M3" | "F8_E5M2" => Some(1),
        _ => None,
    }
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Collects the header's entries in order, so that a name that comes twice is seen.
struct Entries;

impl<'de> DeserializeSeed<'de> for Entries {
    type Value = Vec<(String, Entry)>;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Entries {
    type Value = Vec<(String, Entry)>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                entries.push((name, map.next_value()?));
            }
        }
        Ok(entries)
    }
}
