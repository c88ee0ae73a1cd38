//! What a node offers to the layers above: deployed models, generation, embeddings, status. No HTTP, no text.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tangram_checkpoint::{GenerationDefaults, ModelSpec};

use crate::forecast::Forecast;
pub use tangram_engine::constraint::{CompiledGrammar, Grammar, TokenText, Vocabulary};
pub use tangram_engine::sampling::{SamplingParams, TokenLogprob};

/// A deployed model as the layers above see it. Immutable; a re-deployment under the same name makes a new one.
#[derive(Debug)]
pub struct DeployedModel {
    /// The name that requests use.
    pub name: String,
    /// What the model is.
    pub spec: ModelSpec,
    /// Of an adapter: what its base was deployed as when it was deployed.
    pub base: Option<String>,
    /// Directory of the imported checkpoint; `tokenizer.json` lies in it if `tokenizer` is set.
    pub directory: PathBuf,
    /// BLAKE3 of `tokenizer.json` in hexadecimal, if the model has one; equal for models that share it.
    pub tokenizer: Option<String>,
    /// Jinja chat template.
    pub chat_template: Option<String>,
    /// Text of special tokens that templates refer to (`bos_token`, `eos_token`, ...).
    pub special_tokens: std::collections::BTreeMap<String, String>,
    /// End tokens and sampling defaults.
    pub generation: GenerationDefaults,
    /// Longest sequence in tokens that this node can run: the model's own limit or what the largest pool can hold beside
    /// the weights, whichever is less.
    pub context: usize,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// KV bytes per token (0 for embedding models).
    pub kv_bytes_per_token: u64,
    /// Unix seconds of the deployment.
    pub created: u64,
    /// Its tensors in the order of the forward pass, no content twice.
    pub(crate) tensors: Vec<TensorProfile>,
    /// Key of the model inside the node.
    pub(crate) index: usize,
    /// Sequences that were sent to each of the node's devices and live.
    pub(crate) sent: std::sync::Arc<[std::sync::atomic::AtomicUsize]>,
    pub(crate) forecast: std::sync::Arc<Forecast>,
}

impl DeployedModel {
    /// What the model takes of this node's memory and time.
    pub(crate) fn profile(&self) -> ModelProfile {
        ModelProfile {
            name: self.name.clone(),
            tensors: self.tensors.clone(),
            kv_bytes_per_token: self.kv_bytes_per_token,
            context: self.context,
            prompts: self.forecast().prompts(self.context.min(LONGEST_PROFILED)),
        }
    }

    /// What the model takes on this node.
    pub fn forecast(&self) -> &Forecast {
        &self.forecast
    }
}

/// Longest prompt in a model's profile, tokens.
const LONGEST_PROFILED: usize = 8192;

/// A tensor of a deployed model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TensorProfile {
    /// BLAKE3 of dtype, shape and bytes, hexadecimal.
    pub content: String,
    /// Size.
    pub bytes: u64,
    /// Stage of the forward pass that needs it first.
    pub stage: u32,
}

/// What a prefill takes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PromptProfile {
    /// Length of the prompt.
    pub tokens: usize,
    /// Seconds until the first token when everything is resident.
    pub seconds: f64,
    /// Seconds of each stage of the first pass.
    pub stage_seconds: Vec<f64>,
}

/// A deployed model as a simulator needs it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelProfile {
    /// Deployed name.
    pub name: String,
    /// Its tensors in the order of the forward pass, no content twice.
    pub tensors: Vec<TensorProfile>,
    /// KV bytes per token.
    pub kv_bytes_per_token: u64,
    /// Longest sequence in tokens on this node.
    pub context: usize,
    /// Prompts of growing length; empty before this machine was measured.
    pub prompts: Vec<PromptProfile>,
}

/// This node's device (of several the first) and models as a simulator needs them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineProfile {
    /// Bytes of the pool.
    pub pool_bytes: u64,
    /// Bytes of it that cached prefixes hold now: room that a simulator which knows no prefixes does not have either.
    pub cached_prefix_bytes: u64,
    /// Bytes per second at which weights arrive; `None` before it was measured.
    pub load_bytes_per_second: Option<f64>,
    /// The share (0 to 1) of the device's arithmetic that a running load takes.
    pub load_share: f64,
    /// The deployed models that generate, by name.
    pub models: Vec<ModelProfile>,
}

/// A request for tokens.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// Which model.
    pub model: std::sync::Arc<DeployedModel>,
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How to choose tokens; already validated by [`SamplingParams::validate`].
    pub sampling: SamplingParams,
    /// Most tokens to generate; `None` means up to the context limit.
    pub max_tokens: Option<usize>,
    /// Do not stop at the model's end tokens.
    pub ignore_eos: bool,
    /// Further tokens that end the sequence.
    pub stop_token_ids: Vec<u32>,
    /// What the output must look like, over the model's vocabulary.
    pub grammar: Option<CompiledGrammar>,
}

/// Where tokens come from. A [`crate::Node`] is such a place; the gateway's bench puts a recording there.
pub trait Generator: Send + Sync {
    /// Submits a request for tokens.
    ///
    /// # Errors
    /// When the request can never be served, too many are waiting, or nothing is accepted any more.
    fn generate(&self, request: GenerateRequest) -> Result<crate::Generation, RequestError>;
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token, which is reported as the last token event; or the grammar lets nothing follow.
    Stop,
    /// `max_tokens` or the context limit.
    Length,
}

/// Where a request's time went and which bytes it cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Waiting for admission.
    pub queue: Duration,
    /// From admission until all weights were leased and, where bytes were missing, until the last of them arrived.
    /// Prefill runs during the same time, so the phases may overlap; for a fully resident model this is the
    /// activation itself.
    pub load: Duration,
    /// From admission until the prompt was processed, less the time the forward pass stood waiting for weights.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
    /// From submission to the first token (or the embedding).
    pub first_token: Duration,
    /// Prompt tokens whose keys and values were cached.
    pub cached_tokens: u64,
    /// Weight bytes that this request brought in.
    pub bytes_loaded: u64,
    /// Weight bytes that were resident, or already on their way for another request.
    pub bytes_reused: u64,
}

/// One generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct GeneratedToken {
    /// Token id.
    pub id: u32,
    /// Present when asked for.
    pub logprob: Option<TokenLogprob>,
}

/// What happens to a generation, in this order: `Started`, `Token`s, then `Finished`; or `Failed` at any point.
#[derive(Clone, Debug)]
pub enum GenerateEvent {
    /// The first token is about to follow; everything but `decode` is final.
    Started(Timing),
    /// The next token.
    Token(GeneratedToken),
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Final figures.
        timing: Timing,
    },
    /// The end by an error.
    Failed(RequestError),
}

/// Two texts that a model reads together, as token ids with the special tokens already in place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TextPair {
    /// All tokens.
    pub tokens: Vec<u32>,
    /// Where the second text begins, if the tokenizer tells the two apart.
    pub second: Option<usize>,
}

/// A finished request for embeddings or scores.
#[derive(Clone, Debug)]
pub struct Embeddings {
    /// One vector per input, in order; a score is a vector of one element.
    pub vectors: Vec<Vec<f32>>,
    /// Figures for the whole request.
    pub timing: Timing,
}

/// Why a request was refused or ended early. The text is for the user.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// The request itself cannot be served (HTTP 400).
    #[error("{0}")]
    Invalid(String),
    /// The model is not deployed, or no longer (HTTP 404).
    #[error("model '{0}' is not deployed; `tangram ls` shows what is")]
    UnknownModel(String),
    /// Too many requests are waiting (HTTP 429).
    #[error("{waiting} requests are waiting already, which is this server's limit; try again later")]
    QueueFull {
        /// Requests waiting.
        waiting: usize,
    },
    /// The weights could not be loaded (HTTP 500).
    #[error("model '{model}' could not be loaded: {reason}")]
    LoadFailed {
        /// Deployed name.
        model: String,
        /// What failed and what to do.
        reason: String,
    },
    /// The device failed and what was on it is gone (HTTP 503).
    #[error("{0}; send the request again")]
    DeviceLost(String),
    /// The node is going down (HTTP 503).
    #[error("the server is shutting down")]
    ShuttingDown,
    /// A fault of ours (HTTP 500).
    #[error("internal error: {0}")]
    Internal(String),
}

/// What a deployment is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeployStage {
    /// Bringing the files of a remote source to this disk; bytes are those of files.
    Downloading,
    /// Reading tensors and writing those that are new; bytes are those of weights.
    Importing,
}

/// How far a deployment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeployProgress {
    /// What is being done.
    pub stage: DeployStage,
    /// Bytes that are done with in this stage.
    pub bytes_done: u64,
    /// Bytes of this stage; 0 as long as that is not known.
    pub bytes_total: u64,
    /// Of `bytes_done`, bytes that were already on this disk and were referenced.
    pub bytes_reused: u64,
}

/// Why a deployment or removal failed. The text is for the user.
#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] tangram_checkpoint::CheckpointError),
    /// The source cannot be brought here.
    #[error(transparent)]
    Remote(#[from] tangram_remote::RemoteError),
    /// The model can never run on this node.
    #[error("{0}")]
    DoesNotFit(String),
    /// The name cannot be used.
    #[error("{0}")]
    BadName(String),
    /// No such model.
    #[error("model '{0}' is not deployed")]
    UnknownModel(String),
    /// It is still being downloaded.
    #[error("model '{0}' is still being downloaded; stop its deployment, or wait for its end")]
    Arriving(String),
    /// The node is going down, or the caller gave up.
    #[error("the deployment was cancelled")]
    Cancelled,
    /// The data directory failed.
    #[error("{what}: {source}")]
    Storage {
        /// What was attempted, with the path.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The catalogue failed.
    #[error("catalogue: {0}")]
    Catalogue(String),
}

/// What a model takes of a node's device, known before it is loaded. Times are those of a device that does nothing
/// else, from submission to the first token (or the embedding); absent until the node has measured its machine.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelForecast {
    /// Tokens whose KV fits into the pool beside all weights; absent for models that cache nothing.
    pub tokens_beside_weights: Option<u64>,
    /// Most bytes of host memory for activations, outside the pool: those of the largest batch and the longest
    /// sequence.
    pub scratch_bytes: u64,
    /// Length of the prompt that the times are for, tokens.
    pub prompt_tokens: usize,
    /// When none of the weights is resident, seconds.
    pub cold_first_token_seconds: Option<f64>,
    /// When all weights are resident, seconds.
    pub resident_first_token_seconds: Option<f64>,
    /// Rate at which missing weights arrive.
    pub load_bytes_per_second: Option<f64>,
}

/// How weights are stored that are new to this disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightLayout {
    /// As they are.
    Plain,
    /// bf16 and fp16 without loss in fewer bytes.
    Compressed,
    /// Compressed where they are loaded sooner that way, by what was measured of this machine's disk and processor.
    #[default]
    Auto,
}

/// A model in a listing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelStatus {
    /// Deployed name.
    pub name: String,
    /// Of an adapter: what its base was deployed as when it was deployed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Family as its config names it.
    pub family: String,
    /// `generate`, `embed` or `score`.
    pub task: String,
    /// Type of most of the weight bytes.
    pub dtype: String,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Of these, bytes that are read from files of the user's where they lie; absent for a model that was not deployed
    /// in place (and is no adapter on one).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub in_place_bytes: Option<u64>,
    /// Bytes that are stored of all weights: fewer than these have where some are compressed.
    pub stored_bytes: u64,
    /// Of `weight_bytes`, bytes that some other deployed model has too.
    pub shared_bytes: u64,
    /// Of these, bytes in device memory now; of several devices, in that of the one that has most.
    pub resident_bytes: u64,
    /// The same for each device, in the order of [`NodeStatus::devices`]; empty if there is only one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resident_by_device: Vec<u64>,
    /// Of those that are not, bytes that host memory has.
    #[serde(default)]
    pub hosted_bytes: u64,
    /// KV bytes per token.
    pub kv_bytes_per_token: u64,
    /// Longest sequence in tokens on this node.
    pub context: usize,
    /// What it takes of this node's device.
    pub forecast: ModelForecast,
    /// `idle` (no request), `loading` or `active`.
    pub state: String,
    /// Sequences running now.
    pub running: usize,
    /// Requests waiting for admission.
    pub waiting: usize,
    /// Unix seconds of the deployment.
    pub created: u64,
}

/// One of a node's devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its name.
    pub device: String,
    /// Whether it was lost and has not been set up anew yet.
    pub lost: bool,
    /// Bytes of its pool.
    pub pool_bytes: u64,
    /// Bytes of the pool that are free.
    pub free_bytes: u64,
    /// Bytes of resident tensors, leased or not.
    pub resident_bytes: u64,
    /// Bytes of resident tensors that a running request holds.
    pub leased_bytes: u64,
    /// Bytes of KV blocks in use.
    pub kv_bytes: u64,
    /// Bytes of host memory that is there for copies of weights.
    pub host_tier_bytes: u64,
    /// Of these, bytes taken.
    pub host_weight_bytes: u64,
    /// Sequences running.
    pub running: usize,
    /// Requests waiting.
    pub waiting: usize,
    /// Weight bytes brought in for requests since the start.
    pub bytes_loaded_total: u64,
    /// Weight bytes evicted since the start.
    pub bytes_evicted_total: u64,
    /// Models activated since the start.
    pub activations_total: u64,
    /// Times that it was lost and set up anew.
    pub device_rebuilds_total: u64,
}

/// Device memory and counters of a node, all its devices together.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Device name; of several devices all names.
    pub device: String,
    /// Its devices; empty if there is only one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceStatus>,
    /// How the pool is laid out: `paged` or `segment`.
    pub backend: String,
    /// Bytes of the pool.
    pub pool_bytes: u64,
    /// Bytes of the pool that are free.
    pub free_bytes: u64,
    /// Bytes of this process's memory that the pool has taken so far; 0 where the device has memory of its own.
    #[serde(default)]
    pub pool_taken_bytes: u64,
    /// Bytes of resident tensors, leased or not.
    pub resident_bytes: u64,
    /// Bytes of resident tensors that a running request holds.
    pub leased_bytes: u64,
    /// Bytes of KV blocks in use.
    pub kv_bytes: u64,
    /// KV blocks in use.
    pub kv_blocks: u64,
    /// Bytes of KV blocks that no sequence uses, kept as cached prefixes until their room is worth more.
    pub kv_cached_bytes: u64,
    /// Prompt tokens found in cached prefixes since the start.
    pub cached_tokens_total: u64,
    /// Sequences running.
    pub running: usize,
    /// Requests waiting.
    pub waiting: usize,
    /// Weight bytes brought in for requests since the start.
    pub bytes_loaded_total: u64,
    /// Weight bytes brought in before anybody asked for them, since the start.
    pub bytes_prefetched_total: u64,
    /// Weight bytes found resident by activations since the start.
    pub bytes_reused_total: u64,
    /// Weight bytes evicted since the start.
    pub bytes_evicted_total: u64,
    /// Bytes moved inside the device since the start, to make room in one piece.
    pub bytes_moved_total: u64,
    /// Sequences whose KV was taken since the start.
    pub preemptions_total: u64,
    /// Of these, sequences whose KV was copied to host memory instead of being computed again.
    pub swaps_total: u64,
    /// Bytes of KV in host memory now.
    pub host_kv_bytes: u64,
    /// Bytes of host memory that is there for copies of weights; 0 where the device's memory is the host's own.
    #[serde(default)]
    pub host_tier_bytes: u64,
    /// Of these, bytes taken.
    #[serde(default)]
    pub host_weight_bytes: u64,
    /// Tensors of which host memory has a copy.
    #[serde(default)]
    pub host_tensors: u64,
    /// Of the weight bytes brought in since the start, bytes that came from host memory.
    #[serde(default)]
    pub bytes_from_host_total: u64,
    /// Models activated since the start.
    pub activations_total: u64,
    /// Times that a lost device was set up anew.
    pub device_rebuilds_total: u64,
    /// Graphs of decode steps that there are, on a GPU.
    #[serde(default)]
    pub graphs: u64,
    /// Decode steps that were replayed from a graph, since the device was set up.
    #[serde(default)]
    pub replayed_steps_total: u64,
    /// Rows of logits copied from a GPU to choose a token from, since the device was set up. (Of other rows the GPU found out
    /// what was needed.)
    #[serde(default)]
    pub copied_rows_total: u64,
    /// Bytes of host memory that the executor holds for activations, outside the pool.
    pub scratch_bytes: u64,
}
