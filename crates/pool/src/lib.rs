//! Owns device memory: residency by content, leases, KV blocks; carries out the policy's plans.
//!
//! Nothing here belongs to a model. A tensor is identified by its content and is resident or not; a [`Lease`] keeps
//! tensors from being evicted or moved, a KV block is an extent that its sequence owns. Both come out of the same
//! memory, laid out in one of two ways ([`Backend`]), and push each other out by worth.
//!
//! The pool has one owner and no locks; only filling a tensor happens on other threads, through [`Part`]s.

mod fetch;
mod host;
mod kv;
mod paged;
mod pages;
mod pool;
mod prefix;
mod room;
mod segment;
mod tensor;

pub use fetch::Fetch;
pub use host::HostStats;
pub use kv::{BlockHash, KvKey, Prefix};
pub use pool::{Activation, CatalogueEntry, Lease, Logged, Pool, PoolStats, Refusal, Shortage, pages_alone};
pub use room::{ALIGNMENT, Backend, KvReserve};
pub use tensor::{LoadFailure, Part, Tensor, Vacancy};
