//! What a cold start does when: told to whoever draws a picture of it, and to nobody otherwise.

use std::fmt::Debug;
use std::time::Instant;

use tangram_store::Arrived;

/// Sees loads and forward passes as they happen. Its methods are called on the threads that do the work and must not
/// block.
pub trait Observer: Debug + Send + Sync {
    /// A part of a tensor can be computed with, as far as it is concerned.
    fn arrived(&self, arrived: Arrived<'_>);

    /// A stage of a forward pass has been computed, since `started` and until now.
    fn computed(&self, computed: Computed);
}

/// A stage of a pass that was computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Computed {
    /// Which stage: the embedding, each layer, the head.
    pub stage: usize,
    /// Tokens of the pass.
    pub tokens: usize,
    /// When it began.
    pub started: Instant,
}
