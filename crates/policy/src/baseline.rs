//! What ours is measured against: other rules of what to keep, so that one program on one device can run them all.
//!
//! The simulator has the same rules for its own world (`crates/sim`). Like everything here this frees nothing: it says what
//! goes, the pool carries it out. It knows no expectation, no decay and no cached prefixes, which go first.

use std::collections::HashMap;

use crate::retention::TensorKey;

/// A rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Baseline {
    /// Nothing stays: every request brings in its whole model.
    NoReuse,
    /// Whole models stay; the one used longest ago goes.
    WholeModels,
    /// Tangram as published (arXiv 2512.01357): groups of neighbouring tensors, each at least a fortieth of its model, by
    /// size / bandwidth × share of the requests. Not per byte, without decay.
    Published,
}

/// Groups per model at most, under [`Baseline::Published`].
const GROUPS: u64 = 40;

#[derive(Debug, Default)]
struct Model {
    last_use: u64,
    uses: u64,
}

/// Tensors that go together.
#[derive(Clone, Copy, Debug)]
struct Group {
    model: usize,
    bytes: u64,
}

/// The state of a rule: which models there are, how often and when each was used.
#[derive(Debug)]
pub struct Baselines {
    rule: Baseline,
    models: Vec<Model>,
    groups: Vec<Group>,
    /// Group of each tensor. A tensor belongs to the model that brought it first.
    of: HashMap<TensorKey, usize>,
    activations: u64,
}

impl Baselines {
    /// Nothing is known.
    pub fn new(rule: Baseline) -> Baselines {
        Baselines { rule, models: Vec::new(), groups: Vec::new(), of: HashMap::new(), activations: 0 }
    }

    /// Whether nothing is to stay that no request uses.
    pub fn keeps_nothing(&self) -> bool {
        self.rule == Baseline::NoReuse
    }

    /// One more model has these tensors, in the order of the forward pass, with their bytes.
    pub fn catalogue(&mut self, tensors: &[(TensorKey, u64)]) {
        let model = self.models.len();
        self.models.push(Model::default());
        let all: u64 = tensors.iter().map(|&(_, bytes)| bytes).sum();
        let least = if self.rule == Baseline::Published { all / GROUPS } else { u64::MAX };
        let mut open = false;
        for &(tensor, bytes) in tensors {
            if !open {
                self.groups.push(Group { model, bytes: 0 });
            }
            let index = self.groups.len() - 1;
            if let Some(group) = self.groups.last_mut() {
                group.bytes += bytes;
                open = group.bytes < least;
            }
            self.of.entry(tensor).or_insert(index);
        }
    }

    /// A request uses the model that has this tensor.
    pub fn used(&mut self, tensor: TensorKey) {
        self.activations += 1;
        let Some(&group) = self.of.get(&tensor) else { return };
        if let Some(model) = self.groups.get(group).and_then(|group| self.models.get_mut(group.model)) {
            model.uses += 1;
            model.last_use = self.activations;
        }
    }

    /// What goes of these idle tensors (with their bytes), so that at least `shortage` bytes become free: whole groups, all
    /// of them if that is too little.
    pub fn victims(&self, idle: impl Iterator<Item = (TensorKey, u64)>, shortage: u64) -> Vec<TensorKey> {
        let mut idle: Vec<((u64, usize), TensorKey, u64)> =
            idle.map(|(tensor, bytes)| (self.order(tensor), tensor, bytes)).collect();
        idle.sort_unstable();
        let mut freed = 0;
        let mut last = None;
        let chosen = idle.into_iter().take_while(|&(group, _, bytes)| {
            if freed >= shortage && last != Some(group) {
                return false;
            }
            last = Some(group);
            freed += bytes;
            true
        });
        chosen.map(|(_, tensor, _)| tensor).collect()
    }

    /// What orders a tensor's group among others, and tells it from them; what is no model's comes first.
    fn order(&self, tensor: TensorKey) -> (u64, usize) {
        let group = self.of.get(&tensor).and_then(|&index| Some((index, self.groups.get(index)?)));
        let Some((index, group)) = group else { return (0, usize::MAX) };
        let Some(model) = self.models.get(group.model) else { return (0, usize::MAX) };
        match self.rule {
            Baseline::NoReuse | Baseline::WholeModels => (model.last_use, index),
            // Bandwidth and the number of all requests are the same for all.
            Baseline::Published => (group.bytes.saturating_mul(model.uses), index),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(range: std::ops::Range<u32>) -> Vec<(TensorKey, u64)> {
        range.map(|key| (TensorKey(key), 10)).collect()
    }

    fn victims(of: &Baselines, idle: &[(TensorKey, u64)], shortage: u64) -> Vec<u32> {
        of.victims(idle.iter().copied(), shortage).into_iter().map(|key| key.0).collect()
    }

    #[test]
    fn whole_models_go_by_their_last_use() {
        let mut lru = Baselines::new(Baseline::WholeModels);
        let models = [keys(0..3), keys(3..5), keys(5..9)];
        models.iter().for_each(|model| lru.catalogue(model));
        for model in [1, 0, 2, 1usize] {
            lru.used(models[model][0].0);
        }
        let idle = models.concat();
        assert_eq!(victims(&lru, &idle, 1), [0, 1, 2]);
        assert_eq!(victims(&lru, &idle, 31), [0, 1, 2, 5, 6, 7, 8]);
        assert_eq!(victims(&lru, &idle, 1000).len(), 9);
        assert!(victims(&lru, &idle, 0).is_empty());
        // What no model has, a cached prefix, goes before.
        assert_eq!(victims(&lru, &[idle.clone(), keys(20..21)].concat(), 5), [20]);
        assert!(!lru.keeps_nothing() && Baselines::new(Baseline::NoReuse).keeps_nothing());
    }

    #[test]
    fn the_published_value_is_of_groups_and_not_per_byte() {
        let mut published = Baselines::new(Baseline::Published);
        // Groups of two: a fortieth of 800 is 20.
        let (often, seldom) =
            (keys(0..80), [(TensorKey(100), 900), (TensorKey(101), 15), (TensorKey(102), 15)]);
        published.catalogue(&often);
        published.catalogue(&seldom);
        (0..5).for_each(|_| published.used(TensorKey(0)));
        published.used(TensorKey(101));
        let idle = [&often[..4], &seldom[..]].concat();
        // 30 × 1, then 20 × 5 each; the large one is worth most although it is wanted least.
        assert_eq!(victims(&published, &idle, 1), [101, 102]);
        assert_eq!(victims(&published, &idle, 31), [101, 102, 0, 1]);
        assert_eq!(victims(&published, &idle, 71), [101, 102, 0, 1, 2, 3, 100]);
    }
}
