//! Decisions: what to keep, evict, pack, prefetch, place, admit, batch and preempt. Pure: no clock, no I/O, no threads.
//!
//! Time enters as seconds in an argument, randomness not at all, so a recorded run replays to the same decisions.
//! The live node drives this code, and a simulator can drive the same.

pub mod admission;
pub mod baseline;
pub mod batch;
pub mod dispatch;
pub mod eviction;
pub mod expectation;
pub mod forecast;
pub mod host;
pub mod packing;
pub mod placement;
pub mod prefetch;
pub mod prefix;
pub mod pressure;
pub mod retention;
pub mod stall;

pub use admission::{Admission, Attempt};
pub use baseline::{Baseline, Baselines};
pub use batch::{Runnable, Share, compose};
pub use dispatch::Dispatch;
pub use expectation::Expectations;
pub use host::HostRetention;
pub use prefetch::Forecast;
pub use prefix::PrefixUse;
pub use retention::{Event, Retention, TensorKey};
