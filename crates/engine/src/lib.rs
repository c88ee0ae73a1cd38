//! Executes models from pooled memory: kernels, paged attention, batching, sampling.
//!
//! Weights and KV blocks belong to the pool and are only borrowed for the length of a call. The promise everything
//! here keeps: **a sequence's results are bit-identical whatever else is in the batch, however its prompt was cut
//! into chunks, and however many threads there are.**

mod adapter;
pub mod constraint;
mod cost;
pub mod cuda;
mod device;
mod executor;
mod forward;
pub mod kernels;
mod model;
pub mod pool;
mod rates;
pub mod sampling;

pub use adapter::Adapter;
pub use cost::{PassShape, StageWork, WeightWork};
pub use device::{DeviceExecutor, DevicePass, HostBuffer, Tensors};
pub use executor::{Chunk, Executor, LogitRows, Pass, PassError, Weights, Whole};
pub use kernels::kv::KvBlocks;
pub use model::{KvLayout, Model, ModelError, TensorDesc};
pub use rates::Rates;
