//! Reads safetensors and GGUF checkpoints, describes the model in them, writes Tangram's own layout.
//!
//! Depends on no runtime. Everything read from outside is untrusted: every function here returns an error that
//! names the file, the tensor and what to do, and never panics.

mod adapter;
mod adapter_config;
mod arriving;
mod checksum;
mod compression;
mod config;
pub mod dtype;
mod error;
mod file;
mod fused;
mod gguf;
mod gguf_model;
mod gguf_spec;
mod gguf_tokenizer;
mod hugging_face;
pub mod import;
pub mod in_place;
mod layout;
pub mod manifest;
mod names;
mod quantised;
mod safetensors;
mod serverlessllm;
pub mod source;
pub mod spec;
mod tekken;
mod tokenizer;

pub use adapter::AdapterSource;
pub use arriving::{Arriving, WaitFor};
pub use checksum::{Checksum, ChecksumRun};
pub use compression::{Layout, codec_format, stored_chunk_bytes};
pub use dtype::DType;
pub use error::CheckpointError;
pub use file::Presence;
pub use import::{
    Base, DATA_FILE, ImportProgress, KnownTensor, MANIFEST_FILE, TOKENIZER_FILE, import, import_adapter,
    import_as, import_in_place, read_manifest,
};
pub use in_place::{FilePlace, InPlace, InPlaceFile};
pub use manifest::{
    CHUNK_BYTES, ContentId, GenerationDefaults, Hash, Manifest, TENSOR_ALIGNMENT, TensorEntry,
};
pub use source::{Source, SourceTensor, open, open_arriving};
pub use spec::{
    Attention, ExpertRole, Experts, Factor, LayerRole, LocalLayers, LowRank, Mlp, ModelSpec, Norm,
    NormPlacement, Output, Pooling, Role, Rope, RopeScaling, ScoreActivation,
};
