//! Test support: writes small random checkpoints, and serves files badly. Never part of the product.
//!
//! Depends on no crate of this workspace, so that every crate can use it in its tests. Values are drawn from a seed:
//! equal arguments give equal bytes. Everything here panics when it cannot write, which is what a test wants.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod adapter;
mod gguf;
mod hugging_face;
mod model;
mod quant;
mod quantised;
mod serverlessllm;
mod tokenizer;
pub mod web;

pub use adapter::{RandomAdapter, write_adapter, write_adapter_of, write_merged};
pub use gguf::{GgufOptions, write_gguf, write_tuned_gguf};
pub use hugging_face::{mutate_layer, write_cross_encoder, write_hf_model};
pub use model::{EXPERTS, Family, Float, RandomModel, Scaling, WINDOW};
pub use quant::GgmlType;
pub use quantised::{Quantised, write_quantised_model};
pub use serverlessllm::write_serverlessllm;
pub use tokenizer::{CHAT_TEMPLATE, EOS_TOKEN, SPECIAL_TOKENS, byte_token_id};
