//! What one step of a model computes: which sequences take part and with how many tokens.
//!
//! Running sequences always get their next token; what is left of the step's budget goes to prompts in the order of
//! arrival, a long one in chunks, so that it never holds up the others for more than a step.

/// A sequence that could take part in the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runnable {
    /// Tokens that are not in the KV cache yet: 1 while decoding, more while the prompt is being processed.
    pub pending: usize,
    /// Whether the pending tokens must be computed in one step (bidirectional attention).
    pub indivisible: bool,
}

/// A sequence's part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Index into the list that was given.
    pub sequence: usize,
    /// Tokens to compute, at least 1.
    pub tokens: usize,
}

/// Composes a step of at most `budget` tokens from `sequences`, which are in order of arrival. An indivisible
/// sequence larger than the whole budget gets a step of its own. Shares come back in the order of the list.
pub fn compose(sequences: &[Runnable], budget: usize) -> Vec<Share> {
    let mut shares = Vec::new();
    let mut left = budget;
    for (sequence, runnable) in sequences.iter().enumerate() {
        if runnable.pending == 1 && left > 0 {
            shares.push(Share { sequence, tokens: 1 });
            left -= 1;
        }
    }
    for (sequence, runnable) in sequences.iter().enumerate() {
        if runnable.pending <= 1 || left == 0 {
            continue;
        }
        if !runnable.indivisible {
            let tokens = runnable.pending.min(left);
            shares.push(Share { sequence, tokens });
            left -= tokens;
        } else if runnable.pending <= left || shares.is_empty() {
            shares.push(Share { sequence, tokens: runnable.pending });
            left = left.saturating_sub(runnable.pending);
        }
    }
    shares.sort_unstable_by_key(|share| share.sequence);
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn causal(pending: usize) -> Runnable {
        Runnable { pending, indivisible: false }
    }

    #[test]
    fn decoding_goes_first_and_prompts_share_the_rest() {
        let shares = compose(&[causal(100), causal(1), causal(7), causal(1)], 10);
        let expected = [(0, 8), (1, 1), (3, 1)].map(|(sequence, tokens)| Share { sequence, tokens });
        assert_eq!(shares, expected);
    }

    #[test]
    fn an_oversized_indivisible_sequence_runs_alone() {
        let whole = |pending| Runnable { pending, indivisible: true };
        assert_eq!(compose(&[whole(50), whole(3)], 10), [Share { sequence: 0, tokens: 50 }]);
        assert_eq!(compose(&[whole(3), whole(50), whole(4)], 10).len(), 2);
    }

    proptest! {
        #[test]
        fn somebody_always_runs_and_the_budget_holds(
            pending in proptest::collection::vec((1usize..300, any::<bool>()), 1..40), budget in 1usize..200
        ) {
            let sequences: Vec<_> =
                pending.iter().map(|&(pending, indivisible)| Runnable { pending, indivisible }).collect();
            let shares = compose(&sequences, budget);
            prop_assert!(!shares.is_empty());
            let total: usize = shares.iter().map(|share| share.tokens).sum();
            prop_assert!(total <= budget || shares.len() == 1);
            for share in shares {
                let sequence = sequences[share.sequence];
                prop_assert!(share.tokens >= 1 && share.tokens <= sequence.pending);
                prop_assert!(!sequence.indivisible || share.tokens == sequence.pending);
            }
        }
    }
}
