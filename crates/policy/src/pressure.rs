//! On-demand KV under pressure: how much room to keep ahead of growth, which sequence to preempt, and what becomes of
//! its keys and values.
//!
//! Pure: whoever calls it measures, evicts, copies and puts sequences back into the queue.

/// Free room is topped up when it falls below what running sequences will take for this many tokens each...
const LOW_WATER_TOKENS: usize = 16;

/// ...and then to what they will take for this many, so that eviction comes in few, larger pieces and never in a step.
const HIGH_WATER_TOKENS: usize = 64;

/// Tokens for which a preempted sequence must find room before it comes back: else it would be preempted again at its
/// next block.
const RETURN_TOKENS: usize = 256;

/// A running sequence as far as its growth matters, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growing {
    /// Tokens that its blocks have room for.
    pub held: usize,
    /// Tokens it has so far.
    pub tokens: usize,
    /// Tokens it can still get.
    pub left: usize,
}

impl Growing {
    /// Blocks of `block_tokens` tokens that it lacks for its tokens and `ahead` further ones.
    fn blocks_ahead(&self, ahead: usize, block_tokens: usize) -> usize {
        let wanted = self.tokens + ahead.min(self.left);
        wanted.div_ceil(block_tokens).saturating_sub(self.held.div_ceil(block_tokens))
    }
}

/// Blocks of one model that should be free: if fewer than `low` are, as many as `high`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Watermarks {
    /// Blocks below which room is made.
    pub low: usize,
    /// Blocks up to which room is made.
    pub high: usize,
}

/// The watermarks of a model with these running sequences. Without any both are 0: nothing is evicted for nobody.
pub fn watermarks(sequences: impl Iterator<Item = Growing>, block_tokens: usize) -> Watermarks {
    sequences.fold(Watermarks::default(), |marks, sequence| Watermarks {
        low: marks.low + sequence.blocks_ahead(LOW_WATER_TOKENS, block_tokens),
        high: marks.high + sequence.blocks_ahead(HIGH_WATER_TOKENS, block_tokens),
    })
}

/// Tokens for which a sequence of `tokens` tokens, which can get `left` more, must find room to be admitted.
pub fn admission_tokens(tokens: usize, left: usize, preempted: bool) -> usize {
    tokens + if preempted { left.min(RETURN_TOKENS) } else { left.min(1) }
}

/// Which running sequence gives its KV up: of those that hold any (`None` for the others) the one that arrived last, so
/// that the oldest always gets on and nobody starves. Gives an index into the list.
pub fn whom_to_preempt(arrivals: impl Iterator<Item = Option<u64>>) -> Option<usize> {
    let holding = arrivals.enumerate().filter_map(|(index, arrival)| Some((arrival?, index)));
    holding.max().map(|(_, index)| index)
}

/// What becomes of the keys and values of a preempted sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parting {
    /// They are computed again.
    Recompute,
    /// They are copied to host memory and back.
    Swap,
}

/// Chooses the cheaper of the two: `tokens` tokens to compute again at `token_seconds` each, against `bytes` bytes to
/// copy out and back at `copy_bytes_per_second`, if the host has `host_free` bytes left for them. While a token's time
/// is unknown (0) nothing is copied.
pub fn parting(
    tokens: usize,
    token_seconds: f64,
    bytes: u64,
    copy_bytes_per_second: f64,
    host_free: u64,
) -> Parting {
    let recompute = tokens as f64 * token_seconds;
    let swap = 2.0 * bytes as f64 / copy_bytes_per_second;
    if bytes > 0 && bytes <= host_free && swap < recompute { Parting::Swap } else { Parting::Recompute }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_kept_for_growth_and_for_nothing_else() {
        let none = watermarks(std::iter::empty(), 16);
        assert_eq!(none, Watermarks { low: 0, high: 0 });
        let at = |tokens, left| Growing { held: 32, tokens, left };
        // 20 tokens in two blocks: 16 more need a third; 64 more, six in all.
        assert_eq!(watermarks([at(20, 1000)].into_iter(), 16), Watermarks { low: 1, high: 4 });
        assert_eq!(watermarks([at(20, 1000), at(16, 1000)].into_iter(), 16), Watermarks { low: 1, high: 7 });
        assert_eq!(watermarks([at(20, 3)].into_iter(), 16), Watermarks { low: 0, high: 0 }, "it ends before");
        // A prompt of which nothing has been computed needs its own blocks.
        let prompt = Growing { held: 0, tokens: 100, left: 0 };
        assert_eq!(watermarks([prompt].into_iter(), 16), Watermarks { low: 7, high: 7 });
    }

    #[test]
    fn a_preempted_sequence_comes_back_with_room_to_get_on() {
        assert_eq!(admission_tokens(100, 500, false), 101);
        assert_eq!(admission_tokens(100, 500, true), 356);
        assert_eq!(admission_tokens(100, 5, true), 105);
        assert_eq!(admission_tokens(100, 0, false), 100);
    }

    #[test]
    fn the_youngest_holder_is_preempted() {
        assert_eq!(whom_to_preempt([Some(3), None, Some(9), Some(4)].into_iter()), Some(2));
        assert_eq!(whom_to_preempt([None, Some(1)].into_iter()), Some(1));
        assert_eq!(whom_to_preempt([None, None].into_iter()), None);
    }

    #[test]
    fn the_cheaper_parting_is_chosen() {
        // 1,000 tokens at 1 ms against 24 MB at 4 GB/s.
        assert_eq!(parting(1000, 1e-3, 24_000_000, 4e9, 1 << 30), Parting::Swap);
        assert_eq!(parting(1000, 1e-6, 24_000_000, 4e9, 1 << 30), Parting::Recompute, "computing is faster");
        assert_eq!(parting(1000, 1e-3, 24_000_000, 4e9, 1 << 20), Parting::Recompute, "no room on the host");
        assert_eq!(parting(1000, 0.0, 24_000_000, 4e9, 1 << 30), Parting::Recompute, "nothing is known yet");
        assert_eq!(parting(0, 1e-3, 0, 4e9, 1 << 30), Parting::Recompute);
    }
}
