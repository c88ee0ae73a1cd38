//! Owns device memory: residency by content, leases, KV blocks; carries out the policy's plans.
//!
//! Nothing here belongs to a model. A tensor is identified by its content, has a stable place in the arena of the
//! checkpoint file that brought it, and is resident or not; a [`Lease`] keeps tensors from being evicted, a KV block is
//! an extent that its sequence owns. Both come out of the same physical pages and push each other out by worth.
//!
//! The pool has one owner and no locks; only filling a tensor happens on other threads, through [`Part`]s.

mod kv;
mod pages;
mod pool;
mod prefix;
mod tensor;

pub use kv::{BlockHash, KvKey, Prefix};
pub use pool::{Activation, CatalogueEntry, Lease, Logged, Pool, PoolStats, Shortage, pages_alone};
pub use tensor::{LoadFailure, Part, Tensor, Vacancy};
