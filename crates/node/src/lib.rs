//! One machine: composes catalog, store, pool and engine; owns threads and lifecycles.

mod api;

pub use api::*;
