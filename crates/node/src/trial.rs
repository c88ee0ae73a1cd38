//! What a measurement puts in the place of a node's own ways, so that rivals run in the same program on the same device.
//!
//! No user's option sets any of this.

use std::sync::Arc;

use tangram_device::HostBytes;
use tangram_policy::Baseline;
use tangram_pool::Pool;

/// Changes to a node for the length of a measurement. The default changes nothing.
#[derive(Clone, Default)]
pub struct Trial {
    /// Keeps by this rule instead of by worth, starts computing when all weights are there, and prefetches nothing.
    pub baseline: Option<Baseline>,
    /// On a device that the host cannot address, all weights come from parts of so many bytes in pinned host memory (at
    /// least as many as the largest tensor has), whatever their contents are, and no file is read. The function fills a
    /// piece of them. So models can be measured that neither the disk nor host memory would hold.
    pub weights: Option<(usize, Fill)>,
}

/// Fills a piece of the bytes that stand for weights.
pub type Fill = Arc<dyn Fn(&mut [u8]) + Send + Sync>;

/// Bytes that are filled at a time.
const PIECE: usize = 8 << 20;

impl Trial {
    /// Makes a fresh pool, over which host memory has been set up, one of the measurement.
    ///
    /// # Errors
    /// When the bytes cannot be pinned, for the user.
    pub(crate) fn apply(&self, pool: &mut Pool) -> Result<(), String> {
        if let Some(rule) = self.baseline {
            pool.keep_by(rule);
        }
        if let Some((len, fill)) = &self.weights {
            let memory = pool.memory().host_pool().ok_or("this device has no weights in host memory")?;
            while memory.bytes() < *len {
                let rest = (*len - memory.bytes()).next_multiple_of(MIN_PINNED);
                memory.grow(rest).map_err(|error| error.to_string())?;
            }
            let mut bytes: HostBytes = memory.take(*len).ok_or("too little host memory")?;
            let mut piece = vec![0; PIECE];
            for at in (0..*len).step_by(PIECE) {
                let piece = &mut piece[..PIECE.min(*len - at)];
                fill(piece);
                bytes.write(at, piece);
            }
            pool.stand_in_for_all(bytes);
        }
        Ok(())
    }

    /// Whether a pass may begin before all its weights are there, and weights be brought in before anybody asks.
    pub(crate) fn is_ours(&self) -> bool {
        self.baseline.is_none()
    }
}

/// What is pinned is a multiple of this.
const MIN_PINNED: usize = 64 << 10;

impl std::fmt::Debug for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes = self.weights.as_ref().map(|(bytes, _)| bytes);
        f.debug_struct("Trial").field("baseline", &self.baseline).field("weights", &bytes).finish()
    }
}
