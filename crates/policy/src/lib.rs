//! Decisions: what to keep, evict, admit, batch and preempt. Pure: no clock, no I/O, no threads.
//!
//! Time enters as seconds in an argument, randomness not at all, so a recorded run replays to the same decisions.
//! The live node drives this code, and a simulator can drive the same.

pub mod admission;
pub mod batch;
pub mod retention;

pub use admission::{Admission, Attempt};
pub use batch::{Runnable, Share, compose};
pub use retention::{Event, Retention, TensorKey};
