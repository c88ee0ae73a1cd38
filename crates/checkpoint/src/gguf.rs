//! The GGUF container, versions 1 to 3, little-endian: metadata and tensor table. Never allocates by a length that it
//! has not compared with the file and with a limit.
//!
//! Layout: magic, version, counts, metadata, tensor table, padding, data. Version 1 has 32-bit counts and lengths.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Read};

use crate::file::SourceFile;
use crate::{CheckpointError, DType};

const MAX_TENSORS: u64 = 1 << 16;
const MAX_KEYS: u64 = 1 << 16;
/// Longest key or tensor name, in bytes.
const MAX_NAME_BYTES: u64 = 65_535;
/// Longest string value, in bytes; chat templates are the longest.
const MAX_TEXT_BYTES: u64 = 16 << 20;
/// Elements of all metadata arrays together; the largest vocabularies with merges and scores have about a million.
const MAX_ARRAY_ELEMENTS: u64 = 1 << 22;
/// Metadata and tensor table together, in bytes.
const MAX_HEADER_BYTES: u64 = 256 << 20;
const MAX_ALIGNMENT: u64 = 1 << 20;
const MAX_DIMS: u32 = 4;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Integers(Vec<i64>),
    Floats(Vec<f32>),
    Texts(Vec<String>),
}

/// A tensor as the table describes it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    /// Outermost dimension first.
    pub(crate) shape: Vec<u64>,
    /// Offset of the first byte in the file.
    pub(crate) offset: u64,
    /// Size in bytes; `offset + bytes` is within the file.
    pub(crate) bytes: u64,
}

/// What stands in front of the data of a GGUF file.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, Value>,
    pub(crate) tensors: Vec<Tensor>,
}

/// Reads metadata and tensor table; every tensor of the result lies inside the file and overlaps no other.
pub(crate) fn read_header(file: &SourceFile) -> Result<Header, CheckpointError> {
    let mut reader = Reader {
        file,
        input: Box::new(BufReader::with_capacity(1 << 20, file.reader())),
        position: 0,
        version: 0,
        array_elements: 0,
    };
    let magic: [u8; 4] = reader.array()?;
    if &magic != b"GGUF" {
        return Err(reader.invalid("does not start with GGUF; it is not a GGUF file"));
    }
    reader.version = reader.u32()?;
    match reader.version {
        1..=3 => {}
        version if (1..=0xffff).contains(&version.swap_bytes()) => {
            return Err(CheckpointError::unsupported(&file.path, "big-endian GGUF is not supported"));
        }
        version => {
            return Err(CheckpointError::unsupported(
                &file.path,
                format!("GGUF version {version} is not supported; versions 1 to 3 are"),
            ));
        }
    }
    let tensor_count = reader.count("number of tensors", MAX_TENSORS)?;
    let key_count = reader.count("number of metadata keys", MAX_KEYS)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..key_count {
        let key = reader.text("metadata key", MAX_NAME_BYTES)?;
        let kind = reader.u32()?;
        let value = reader.value(&key, kind)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(reader.invalid(format!("metadata key {key} comes twice")));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::Unsigned(alignment)) if alignment.is_power_of_two() && *alignment <= MAX_ALIGNMENT => {
            *alignment
        }
        Some(other) => {
            return Err(reader.invalid(format!("general.alignment is {other:?}, not a power of two")));
        }
    };
    let mut tensors = Vec::new();
    for _ in 0..tensor_count {
        tensors.push(reader.tensor(alignment)?);
    }
    // Bounded by the file length, which was compared while reading.
    let data_start = reader.position.next_multiple_of(alignment);
    let tensors =
        place_tensors(tensors, data_start, file.length).map_err(|message| reader.invalid(message))?;
    Ok(Header { metadata, tensors })
}

/// Turns offsets that count from the start of the data into offsets in the file, and checks that they are sound.
fn place_tensors(mut tensors: Vec<Tensor>, data_start: u64, file_length: u64) -> Result<Vec<Tensor>, String> {
    let mut names = BTreeSet::new();
    for tensor in &mut tensors {
        let begin = data_start.checked_add(tensor.offset);
        let end = begin.and_then(|begin| begin.checked_add(tensor.bytes));
        match (begin, end) {
            (Some(begin), Some(end)) if end <= file_length => tensor.offset = begin,
            _ => {
                return Err(format!(
                    "tensor {} of {} bytes at offset {} ends after the file's {file_length} bytes; \
                     the file is truncated or corrupted, download it again",
                    tensor.name, tensor.bytes, tensor.offset
                ));
            }
        }
        if !names.insert(tensor.name.clone()) {
            return Err(format!("tensor {} is described twice", tensor.name));
        }
    }
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    for pair in tensors.windows(2) {
        if let [first, second] = pair
            && first.offset + first.bytes > second.offset
        {
            return Err(format!(
                "tensors {} and {} overlap; download the file again",
                first.name, second.name
            ));
        }
    }
    Ok(tensors)
}

/// Reads the header front to back and keeps count of where it is.
struct Reader<'a> {
    file: &'a SourceFile,
    input: Box<dyn Read + 'a>,
    position: u64,
    version: u32,
    /// Elements of all arrays so far.
    array_elements: u64,
}

impl Reader<'_> {
    fn invalid(&self, message: impl Into<String>) -> CheckpointError {
        CheckpointError::invalid(&self.file.path, message)
    }

    /// Accounts for `bytes` that are about to be read.
    fn advance(&mut self, bytes: u64) -> Result<(), CheckpointError> {
        let end = self.position.saturating_add(bytes);
        if end > self.file.length {
            return Err(self.invalid(format!(
                "ends in the middle of its header, at byte {} of {}; it is truncated or corrupted, download it again",
                self.position, self.file.length
            )));
        }
        if end > MAX_HEADER_BYTES {
            return Err(self.invalid(format!("has a header of more than {MAX_HEADER_BYTES} bytes")));
        }
        self.position = end;
        Ok(())
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), CheckpointError> {
        self.advance(buffer.len() as u64)?;
        self.input.read_exact(buffer).map_err(|error| CheckpointError::io(&self.file.path, error))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CheckpointError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, CheckpointError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, CheckpointError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count, length or dimension in the width of the version.
    fn size(&mut self) -> Result<u64, CheckpointError> {
        if self.version == 1 { Ok(u64::from(self.u32()?)) } else { self.u64() }
    }

    fn count(&mut self, what: &str, limit: u64) -> Result<u64, CheckpointError> {
        let count = self.size()?;
        if count > limit {
            return Err(
                self.invalid(format!("the {what} is {count}, more than {limit}; the file is corrupted"))
            );
        }
        Ok(count)
    }

    fn text(&mut self, what: &str, limit: u64) -> Result<String, CheckpointError> {
        let length = self.count(&format!("length of the {what}"), limit)?;
        // Compared with the file before anything is allocated.
        self.advance(length)?;
        let mut bytes = vec![0; length as usize];
        self.input.read_exact(&mut bytes).map_err(|error| CheckpointError::io(&self.file.path, error))?;
        String::from_utf8(bytes).map_err(|_| self.invalid(format!("the {what} is not valid UTF-8")))
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value, CheckpointError> {
        Ok(match kind {
            0 => Value::Unsigned(u64::from(u8::from_le_bytes(self.array()?))),
            1 => Value::Signed(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            3 => Value::Signed(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Value::Unsigned(u64::from(self.u32()?)),
            5 => Value::Signed(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array()?))),
            7 => Value::Bool(self.array::<1>()? != [0]),
            8 => Value::Text(self.text(&format!("value of {key}"), MAX_TEXT_BYTES)?),
            9 => self.array_value(key)?,
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(self.invalid(format!("metadata key {key} has the unknown type {other}"))),
        })
    }

    /// An array of plain values; arrays of arrays, which no known key has, are refused.
    fn array_value(&mut self, key: &str) -> Result<Value, CheckpointError> {
        let kind = self.u32()?;
        let count = self.count(&format!("length of {key}"), MAX_ARRAY_ELEMENTS)?;
        self.array_elements += count;
        if self.array_elements > MAX_ARRAY_ELEMENTS {
            return Err(
                self.invalid(format!("the metadata arrays have more than {MAX_ARRAY_ELEMENTS} elements"))
            );
        }
        // The vectors grow as elements arrive, so that a count without elements behind it costs nothing.
        match kind {
            8 => {
                let mut texts = Vec::new();
                for _ in 0..count {
                    texts.push(self.text(&format!("value of {key}"), MAX_TEXT_BYTES)?);
                }
                Ok(Value::Texts(texts))
            }
            6 | 12 => {
                let mut floats = Vec::new();
                for _ in 0..count {
                    if let Value::Float(value) = self.value(key, kind)? {
                        floats.push(value as f32);
                    }
                }
                Ok(Value::Floats(floats))
            }
            0..=5 | 7 | 10 | 11 => {
                let mut integers = Vec::new();
                for _ in 0..count {
                    let integer = match self.value(key, kind)? {
                        Value::Unsigned(value) => i64::try_from(value).ok(),
                        Value::Signed(value) => Some(value),
                        Value::Bool(value) => Some(i64::from(value)),
                        _ => None,
                    };
                    integers.push(integer.ok_or_else(|| {
                        self.invalid(format!("{key} holds an integer of more than 63 bits"))
                    })?);
                }
                Ok(Value::Integers(integers))
            }
            9 => Err(self.invalid(format!("metadata key {key} is an array of arrays"))),
            other => Err(self.invalid(format!("metadata key {key} is an array of the unknown type {other}"))),
        }
    }

    /// One entry of the tensor table; the offset still counts from the start of the data.
    fn tensor(&mut self, alignment: u64) -> Result<Tensor, CheckpointError> {
        let name = self.text("tensor name", MAX_NAME_BYTES)?;
        let rank = self.u32()?;
        if rank == 0 || rank > MAX_DIMS {
            return Err(self.invalid(format!("tensor {name} has {rank} dimensions, not 1 to {MAX_DIMS}")));
        }
        let mut shape = Vec::new();
        for _ in 0..rank {
            shape.push(self.size()?);
        }
        shape.reverse();
        let kind = self.u32()?;
        let Some(dtype) = element_type(kind) else {
            return Err(CheckpointError::unsupported(
                &self.file.path,
                format!(
                    "tensor {name} has type {}, which is not supported yet; \
                     use a file in Q2_K to Q6_K, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, F16, BF16 or F32",
                    type_name(kind)
                ),
            ));
        };
        let offset = self.u64()?;
        if !offset.is_multiple_of(alignment) {
            return Err(
                self.invalid(format!("tensor {name} at offset {offset} is not aligned to {alignment}"))
            );
        }
        let Some(bytes) = dtype.tensor_bytes(&shape) else {
            return Err(
                self.invalid(format!("tensor {name} has the impossible shape {shape:?} for type {dtype}"))
            );
        };
        Ok(Tensor { name, dtype, shape, offset, bytes })
    }
}

fn element_type(kind: u32) -> Option<DType> {
    match kind {
        0 => Some(DType::F32),
        1 => Some(DType::F16),
        2 => Some(DType::Q4_0),
        3 => Some(DType::Q4_1),
        6 => Some(DType::Q5_0),
        7 => Some(DType::Q5_1),
        8 => Some(DType::Q8_0),
        10 => Some(DType::Q2K),
        11 => Some(DType::Q3K),
        12 => Some(DType::Q4K),
        13 => Some(DType::Q5K),
        14 => Some(DType::Q6K),
        20 => Some(DType::Iq4Nl),
        30 => Some(DType::BF16),
        _ => None,
    }
}

/// GGML's name of a type that this build does not know, for messages.
fn type_name(kind: u32) -> String {
    let name = match kind {
        9 => "Q8_1",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        other => return format!("number {other}"),
    };
    name.into()
}
