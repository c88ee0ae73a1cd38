//! Which experts a token goes to. A token's choice depends on its own scores only.

/// A token's way to one of its experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Route {
    /// Which expert.
    pub expert: usize,
    /// The token's row in the batch.
    pub row: usize,
    /// What the expert's result is multiplied with.
    pub weight: f32,
}

/// Chooses the `per_token` experts with the highest scores for every row of `scores` (`[rows, experts]`; of equal
/// ones the first) and weighs them by the softmax over all experts, scaled to add up to 1 if `normalise`. The routes
/// come in the order of experts, those of an expert in the order of rows. Panics if a row is not whole.
pub fn route(scores: &[f32], experts: usize, per_token: usize, normalise: bool, routes: &mut Vec<Route>) {
    assert_eq!(scores.len() % experts, 0);
    routes.clear();
    let mut order: Vec<usize> = Vec::with_capacity(experts);
    for (row, scores) in scores.chunks_exact(experts).enumerate() {
        order.clear();
        order.extend(0..experts);
        // Stable, so that of equal scores the first comes first.
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let highest = scores[order[0]];
        let total: f32 = scores.iter().map(|score| (score - highest).exp()).sum();
        let first = routes.len();
        let chosen = &mut order[..per_token.min(experts)];
        chosen.sort_unstable();
        routes.extend(chosen.iter().map(|&expert| {
            let weight = (scores[expert] - highest).exp() / total;
            Route { expert, row, weight }
        }));
        if normalise {
            let chosen = &mut routes[first..];
            let total: f32 = chosen.iter().map(|route| route.weight).sum();
            chosen.iter_mut().for_each(|route| route.weight /= total);
        }
    }
    routes.sort_by_key(|route| route.expert);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_experts_share_the_weight() {
        let mut routes = Vec::new();
        let scores = [0.0, 2.0, 1.0, -1.0, 3.0, 3.0, 3.0, f32::NEG_INFINITY];
        route(&scores, 4, 2, true, &mut routes);
        let places: Vec<(usize, usize)> = routes.iter().map(|route| (route.expert, route.row)).collect();
        assert_eq!(places, [(0, 1), (1, 0), (1, 1), (2, 0)]);
        let share = 1f64.exp() / (1.0 + 1f64.exp());
        assert!((f64::from(routes[1].weight) - share).abs() < 1e-6 && routes[0].weight == 0.5);
        assert!((routes[1].weight + routes[3].weight - 1.0).abs() < 1e-6);
        route(&scores[..4], 4, 2, false, &mut routes);
        let total: f64 = scores[..4].iter().map(|&score| f64::from(score).exp()).sum();
        assert!((f64::from(routes[0].weight) - 2f64.exp() / total).abs() < 1e-6);
    }

    #[test]
    fn other_rows_change_nothing() {
        let scores: Vec<f32> = (0..60).map(|i| ((i * 37 % 17) as f32).sin()).collect();
        let (mut all, mut alone) = (Vec::new(), Vec::new());
        route(&scores, 6, 3, true, &mut all);
        for row in 0..10 {
            route(&scores[row * 6..(row + 1) * 6], 6, 3, true, &mut alone);
            let mut of_row: Vec<Route> = all.iter().filter(|route| route.row == row).copied().collect();
            of_row.iter_mut().for_each(|route| route.row = 0);
            assert_eq!(of_row, alone);
        }
    }
}
