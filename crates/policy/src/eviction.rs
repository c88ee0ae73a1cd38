//! Which idle tensors to evict so that enough bytes go at little cost.
//!
//! Least worth per byte first is the rule, and the best one as long as tensors are small against what is needed. A
//! large tensor at the end of the list would throw out far more than that, so the end is looked at more closely: a few
//! dearer but smaller ones may cost less in all, and what turns out not to be needed stays.

use crate::retention::TensorKey;

/// An idle tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Which tensor.
    pub tensor: TensorKey,
    /// Its size in bytes.
    pub bytes: u64,
    /// log2 of its worth per byte ([`crate::Retention::log2_worth`]); −∞ if it was never used.
    pub log2_worth: f64,
}

/// How many candidates behind one that is too large are looked at.
const LOOK_AHEAD: usize = 64;

/// Chooses tensors of at least `shortage` bytes together, from candidates in ascending order of worth per byte. Gives
/// all of them if they are not enough. Looks at no more candidates than it chooses, and [`LOOK_AHEAD`] further ones.
pub fn choose(candidates: impl Iterator<Item = Candidate>, shortage: u64) -> Vec<TensorKey> {
    let mut candidates = candidates.peekable();
    // Only ratios of costs matter; a reference near the values keeps them in the range of a float.
    let reference = candidates.peek().map_or(0.0, |candidate| candidate.log2_worth.max(-1e6));
    let cost = |candidate: &Candidate| (candidate.log2_worth - reference).exp2() * candidate.bytes as f64;
    let mut chosen: Vec<Candidate> = Vec::new();
    let mut left = shortage;
    while left > 0
        && let Some(candidate) = candidates.next()
    {
        if candidate.bytes <= left {
            left -= candidate.bytes;
            chosen.push(candidate);
            continue;
        }
        let (mut smaller, mut smaller_cost, mut still_left) = (Vec::new(), 0.0, left);
        for other in candidates.by_ref().take(LOOK_AHEAD) {
            if still_left == 0 {
                break;
            }
            if smaller_cost + cost(&other) < cost(&candidate) {
                smaller_cost += cost(&other);
                still_left = still_left.saturating_sub(other.bytes);
                smaller.push(other);
            }
        }
        if still_left == 0 {
            chosen.append(&mut smaller);
        } else {
            chosen.push(candidate);
        }
        left = 0;
    }
    let mut spare = chosen.iter().map(|candidate| candidate.bytes).sum::<u64>().saturating_sub(shortage);
    if left > 0 {
        spare = 0;
    }
    // The dearest of what is not needed is kept first.
    if chosen.iter().any(|candidate| candidate.bytes <= spare) {
        let mut dearest: Vec<(f64, usize)> = chosen.iter().map(cost).zip(0..).collect();
        dearest.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut kept = vec![false; chosen.len()];
        for (_, index) in dearest {
            if chosen[index].bytes <= spare {
                spare -= chosen[index].bytes;
                kept[index] = true;
            }
        }
        let mut kept = kept.into_iter();
        chosen.retain(|_| kept.next() != Some(true));
    }
    chosen.into_iter().map(|candidate| candidate.tensor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidates(list: &[(u64, f64)]) -> Vec<Candidate> {
        let candidate = |(i, &(bytes, log2_worth)): (usize, &(u64, f64))| Candidate {
            tensor: TensorKey(i as u32),
            bytes,
            log2_worth,
        };
        list.iter().enumerate().map(candidate).collect()
    }

    fn chosen(list: &[(u64, f64)], shortage: u64) -> Vec<u32> {
        choose(candidates(list).into_iter(), shortage).into_iter().map(|key| key.0).collect()
    }

    #[test]
    fn least_worth_goes_first() {
        assert_eq!(chosen(&[(10, 0.0), (10, 1.0), (10, 2.0)], 20), [0, 1]);
    }

    #[test]
    fn a_large_tensor_is_spared_where_smaller_ones_do() {
        assert_eq!(chosen(&[(10, 0.0), (1000, 0.1), (3, 0.2), (3, 0.3), (3, 0.4)], 14), [0, 2, 3]);
    }

    #[test]
    fn a_large_tensor_goes_alone_where_it_is_cheaper() {
        assert_eq!(chosen(&[(10, 0.0), (20, 0.1), (15, 5.0)], 25), [0, 1]);
        // It makes the smaller one before it unnecessary.
        assert_eq!(chosen(&[(10, 0.0), (30, 0.1)], 25), [1]);
    }

    #[test]
    fn never_used_ones_cost_nothing() {
        assert_eq!(chosen(&[(10, f64::NEG_INFINITY), (10, f64::NEG_INFINITY), (10, 0.0)], 15), [0, 1]);
    }

    #[test]
    fn too_little_gives_everything() {
        assert_eq!(chosen(&[(10, 0.0), (10, 1.0)], 25), [0, 1]);
        assert!(chosen(&[], 25).is_empty());
        assert!(chosen(&[(10, 0.0)], 0).is_empty());
    }

    proptest! {
        /// Enough goes, nothing that is chosen could have stayed, and it never costs more than taking the list in
        /// order.
        #[test]
        fn enough_and_not_more(
            mut list in proptest::collection::vec((1u64..1000, -20.0f64..20.0), 0..80), shortage in 0u64..4000
        ) {
            list.sort_by(|a, b| a.1.total_cmp(&b.1));
            let chosen = chosen(&list, shortage);
            let bytes = |keys: &[u32]| keys.iter().map(|&key| list[key as usize].0).sum::<u64>();
            let cost = |keys: &[u32]| {
                keys.iter().map(|&key| list[key as usize].1.exp2() * list[key as usize].0 as f64).sum::<f64>()
            };
            let total: u64 = list.iter().map(|item| item.0).sum();
            prop_assert!(bytes(&chosen) >= shortage.min(total));
            if total >= shortage {
                for &key in &chosen {
                    prop_assert!(bytes(&chosen) - list[key as usize].0 < shortage);
                }
            }
            let mut in_order = Vec::new();
            while bytes(&in_order) < shortage && in_order.len() < list.len() {
                in_order.push(in_order.len() as u32);
            }
            prop_assert!(cost(&chosen) <= cost(&in_order) * (1.0 + 1e-9));
        }
    }
}
