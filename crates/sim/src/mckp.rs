//! LayerWeave's Prefix-MCKP: which suffixes of which models to give up so that enough bytes become free at the least
//! predicted stall. A covering multiple-choice knapsack: one class per model, one option per prefix length.
//!
//! The authors solve it exactly over a Pareto frontier; here bytes are counted in 1/512 of what is needed, rounded
//! down, so a solution always frees enough and may free up to one such part per model too much.

/// Steps in which freed bytes are counted.
const STEPS: usize = 512;

/// Giving up a suffix: the bytes that it frees, and its cost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Choice {
    pub(crate) freed: u64,
    pub(crate) cost: f64,
}

/// One option per class so that at least `need` bytes are freed at the least cost; the first option of each class must
/// be to give up nothing. Gives the index chosen in each class and the cost. `None` if everything together is too
/// little (counted in steps).
pub(crate) fn cover(classes: &[Vec<Choice>], need: u64) -> Option<(Vec<usize>, f64)> {
    if need == 0 {
        return Some((vec![0; classes.len()], 0.0));
    }
    let step = need.div_ceil(STEPS as u64);
    let goal = need.div_ceil(step) as usize;
    let mut best = vec![f64::INFINITY; goal + 1];
    best[0] = 0.0;
    // Per class and state: the option taken to get there, and the state from which.
    let mut ways: Vec<Vec<(usize, usize)>> = Vec::with_capacity(classes.len());
    for class in classes {
        let mut next = vec![f64::INFINITY; goal + 1];
        let mut way = vec![(0, 0); goal + 1];
        for (index, option) in class.iter().enumerate() {
            let freed = ((option.freed / step) as usize).min(goal);
            for (from, &cost) in best.iter().enumerate().filter(|(_, cost)| cost.is_finite()) {
                let to = (from + freed).min(goal);
                if cost + option.cost < next[to] {
                    next[to] = cost + option.cost;
                    way[to] = (index, from);
                }
            }
        }
        best = next;
        ways.push(way);
    }
    if !best[goal].is_finite() {
        return None;
    }
    let mut picks = vec![0; classes.len()];
    let mut state = goal;
    for (pick, way) in picks.iter_mut().zip(&ways).rev() {
        (*pick, state) = way[state];
    }
    Some((picks, best[goal]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn exhaustive(classes: &[Vec<Choice>], need: u64) -> f64 {
        let Some((first, rest)) = classes.split_first() else {
            return if need == 0 { 0.0 } else { f64::INFINITY };
        };
        let with = |option: &Choice| option.cost + exhaustive(rest, need.saturating_sub(option.freed));
        first.iter().map(with).fold(f64::INFINITY, f64::min)
    }

    proptest! {
        /// With needs below the number of steps the counting is exact, and so is the solution.
        #[test]
        fn finds_the_cheapest_cover(
            classes in proptest::collection::vec(proptest::collection::vec((1u64..60, 0.0f64..9.0), 0..5), 1..5),
            need in 0u64..200
        ) {
            let class = |options: &Vec<(u64, f64)>| {
                let nothing = [Choice { freed: 0, cost: 0.0 }];
                nothing.into_iter().chain(options.iter().map(|&(freed, cost)| Choice { freed, cost })).collect()
            };
            let classes: Vec<Vec<Choice>> = classes.iter().map(class).collect();
            let best = exhaustive(&classes, need);
            match cover(&classes, need) {
                None => prop_assert!(best.is_infinite()),
                Some((picks, cost)) => {
                    let picked = || classes.iter().zip(&picks).map(|(class, &pick)| class[pick]);
                    prop_assert!(picked().map(|choice| choice.freed).sum::<u64>() >= need);
                    prop_assert!((picked().map(|choice| choice.cost).sum::<f64>() - cost).abs() < 1e-9);
                    prop_assert!((cost - best).abs() < 1e-9, "{cost} instead of {best}");
                }
            }
        }
    }
}
