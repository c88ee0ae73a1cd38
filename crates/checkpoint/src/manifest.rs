//! The manifest of an imported checkpoint: what its tensors are, where their bytes lie, and how to verify them.
//!
//! A manifest is written once, before the import is committed, and never changed.

use serde::{Deserialize, Serialize};

use crate::in_place::{FilePlace, InPlace};
use crate::{Checksum, DType, ModelSpec, Role};

/// Bytes covered by one checksum. Chunks start at the tensor's first byte; the last one may be shorter.
pub const CHUNK_BYTES: u64 = 2 << 20;

/// Every tensor starts at a multiple of this in its data file, and in memory.
pub const TENSOR_ALIGNMENT: u64 = 256;

/// A BLAKE3 hash, written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// BLAKE3 of some bytes.
    pub fn of(bytes: &[u8]) -> Hash {
        Hash(*blake3::hash(bytes).as_bytes())
    }

    /// Starts the identity of a tensor ([`ContentId`]); its bytes follow. In front of them stand the length of the
    /// dtype's name, the name, the rank and the dimensions, all numbers u64 little-endian.
    pub(crate) fn hasher(dtype: DType, shape: &[u64]) -> blake3::Hasher {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&(dtype.name().len() as u64).to_le_bytes()).update(dtype.name().as_bytes());
        hasher.update(&(shape.len() as u64).to_le_bytes());
        for dim in shape {
            hasher.update(&dim.to_le_bytes());
        }
        hasher
    }

    /// The identity of a whole tensor: its shape (outermost dimension first) and its bytes as stored.
    pub fn of_tensor(dtype: DType, shape: &[u64], bytes: &[u8]) -> ContentId {
        Hash(*Hash::hasher(dtype, shape).update(bytes).finalize().as_bytes())
    }

    /// Reads 64 hexadecimal digits.
    ///
    /// # Errors
    /// When they are something else.
    pub(crate) fn from_hex(text: &str) -> Result<Hash, blake3::HexError> {
        blake3::Hash::from_hex(text).map(|hash| Hash(*hash.as_bytes()))
    }

    /// 64 lower-case hexadecimal digits.
    pub fn to_hex(self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }
}

impl std::fmt::Debug for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.to_hex())
    }
}

impl Serialize for Hash {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_hex())
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Hash::from_hex(&text).map_err(serde::de::Error::custom)
    }
}

/// The identity of a tensor: BLAKE3 over dtype, shape and bytes, so equal content has equal identity whichever
/// model brought it.
pub type ContentId = Hash;

/// One tensor of an imported checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// What it is for.
    pub role: Role,
    /// Element type.
    pub dtype: DType,
    /// Outermost dimension first.
    pub shape: Vec<u64>,
    /// Content identity.
    pub id: ContentId,
    /// Size in bytes.
    pub bytes: u64,
    /// Which stage of the forward pass needs it first ([`ModelSpec::stage`]).
    pub stage: u32,
    /// The checkpoint whose data file holds the bytes; another one's when the content was already on this disk.
    pub checkpoint: String,
    /// Offset in that data file, a multiple of [`TENSOR_ALIGNMENT`]. With `in_place`, which no data file holds, the
    /// place among the tensors of that checkpoint that are read in place.
    pub offset: u64,
    /// The checksum of each [`CHUNK_BYTES`] chunk as it is stored, in order.
    pub chunks: Vec<Checksum>,
    /// Of a compressed tensor, the bytes that are stored of each chunk; as many as the chunk has where it is stored as it
    /// is. Empty for a tensor that is not compressed. A chunk's stored bytes begin where its plain bytes would.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stored: Vec<u32>,
    /// Where the bytes are, of a tensor that is read from a file of the user's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_place: Option<FilePlace>,
}

impl TensorEntry {
    /// Bytes that are stored of it.
    pub fn stored_bytes(&self) -> u64 {
        match self.stored.is_empty() {
            true => self.bytes,
            false => self.stored.iter().map(|&stored| u64::from(stored)).sum(),
        }
    }
}

/// Defaults for sampling that the checkpoint's author recommends (`generation_config.json`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GenerationDefaults {
    /// Token ids that end a sequence.
    pub eos: Vec<u32>,
    /// Token put in front of a prompt when the tokenizer is told to add special tokens; informative.
    pub bos: Option<u32>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Nucleus sampling threshold.
    pub top_p: Option<f32>,
    /// Candidates kept.
    pub top_k: Option<u32>,
    /// Minimum probability relative to the best candidate.
    pub min_p: Option<f32>,
    /// Multiplicative repetition penalty.
    pub repetition_penalty: Option<f32>,
}

/// An imported checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this layout; readers refuse what they do not know.
    pub version: u32,
    /// This checkpoint's id, also the name of its directory.
    pub checkpoint: String,
    /// What the model is.
    pub spec: ModelSpec,
    /// Tensors in execution order. No two have the same role.
    pub tensors: Vec<TensorEntry>,
    /// Bytes of this checkpoint's own data file.
    pub data_bytes: u64,
    /// Sampling defaults and end tokens.
    pub generation: GenerationDefaults,
    /// Jinja chat template, if the checkpoint has one.
    pub chat_template: Option<String>,
    /// Text of special tokens that templates refer to, e.g. `bos_token` -> `<s>`.
    pub special_tokens: std::collections::BTreeMap<String, String>,
    /// Whether `tokenizer.json` lies beside the manifest.
    pub has_tokenizer: bool,
    /// Of an adapter: what its base was deployed as then. For people; what is computed with is in `tensors`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Of a model deployed in place, and of adapters on it: the files that its tensors are read from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_place: Option<InPlace>,
}

impl Manifest {
    /// The layout version that this build writes.
    pub const VERSION: u32 = 3;

    /// The oldest version that this build reads. Version 1 had no compressed tensors, and version 2 BLAKE3
    /// for checksums.
    pub const OLDEST_VERSION: u32 = 1;

    /// Bytes of all tensors, wherever they lie.
    pub fn weight_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    /// The manifest of the model that an adapter is made for; of another model, the model itself.
    pub fn without_adapter(&self) -> Manifest {
        let mut base = self.clone();
        base.spec.updates.clear();
        base.tensors.retain(|tensor| !matches!(tensor.role, Role::LowRank(..)));
        base
    }
}
