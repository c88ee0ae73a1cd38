//! What a model's KV blocks are worth as cached prefixes: the prefill time that they save, times the chance that they are
//! ever asked for again. The order in which they go is [`crate::Retention`]'s.

/// What is known of a model's prefixes: how dear they are to compute and how often they come again.
#[derive(Clone, Copy, Debug, Default)]
pub struct PrefixUse {
    /// Seconds of prefill per token, smoothed.
    token_seconds: f64,
    /// Blocks published, and blocks found by later sequences.
    published: u64,
    found: u64,
    /// The chance that cached blocks were last appraised with.
    appraised: Option<f64>,
}

impl PrefixUse {
    /// Prefills of at least this many tokens tell what a token costs; smaller steps mostly tell what a step costs.
    const TELLING_TOKENS: usize = 16;

    /// A step of `tokens` tokens took `seconds`.
    pub fn measured(&mut self, tokens: usize, seconds: f64) {
        if tokens >= Self::TELLING_TOKENS {
            let sample = seconds / tokens as f64;
            let known = self.token_seconds > 0.0;
            self.token_seconds = if known { self.token_seconds.mul_add(0.9, 0.1 * sample) } else { sample };
        }
    }

    /// Seconds that a cached block saves when it is found.
    pub fn block_seconds(&self, block_tokens: usize) -> f64 {
        self.token_seconds * block_tokens as f64
    }

    /// Chance that a new block is ever found again: a block that nobody has asked for twice must not push out weights
    /// that somebody has. Starts at one in twenty.
    fn reuse_chance(&self) -> f64 {
        (1 + self.found) as f64 / (20 + self.published) as f64
    }

    /// What a block that was never found again is worth by now (seconds), when that is less than half of what was said
    /// before: blocks that were published early, when little was known, must not keep the worth that they had then.
    pub fn reappraised(&mut self, block_tokens: usize) -> Option<f64> {
        let chance = self.reuse_chance();
        let said = self.appraised.get_or_insert(chance);
        if chance > *said / 2.0 {
            *said = said.max(chance);
            return None;
        }
        *said = chance;
        Some(self.block_seconds(block_tokens) * chance)
    }

    /// A later sequence found `blocks` blocks cached.
    pub fn found(&mut self, blocks: usize) {
        self.found += blocks as u64;
    }

    /// A block is about to be published: the seconds that it is expected to save.
    pub fn publish(&mut self, block_tokens: usize) -> f64 {
        let worth = self.block_seconds(block_tokens) * self.reuse_chance();
        self.published += 1;
        worth
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_are_never_found_again_lose_their_worth_and_hits_restore_it() {
        let mut uses = PrefixUse::default();
        uses.measured(64, 0.64);
        let first = uses.publish(16);
        assert!((first - 0.16 / 20.0).abs() < 1e-12, "{first}");
        let later = (0..1000).map(|_| uses.publish(16)).last().unwrap();
        assert!(later < first / 40.0, "{later}");
        uses.found(500);
        assert!(uses.publish(16) > first);
    }

    #[test]
    fn early_blocks_are_appraised_anew_each_time_that_the_chance_has_halved() {
        let mut uses = PrefixUse::default();
        uses.measured(64, 0.64);
        let mut told = Vec::new();
        for _ in 0..1000 {
            uses.publish(16);
            told.extend(uses.reappraised(16));
        }
        assert!(told.len() >= 4 && told.len() <= 6, "{told:?}");
        assert!(told.is_sorted_by(|a, b| *b <= a / 2.0), "{told:?}");
        let now = uses.publish(16);
        assert!(told.last().is_some_and(|last| *last < 2.1 * now), "{told:?} {now}");
    }

    #[test]
    fn small_steps_do_not_tell_what_a_token_costs() {
        let mut uses = PrefixUse::default();
        uses.measured(1, 1.0);
        assert_eq!(uses.block_seconds(16), 0.0);
        uses.measured(16, 0.16);
        uses.measured(2, 9.0);
        assert!((uses.block_seconds(16) - 0.16).abs() < 1e-12);
    }
}
