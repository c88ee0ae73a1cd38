//! What is expected of each model just now, in one number per model: that a request for it waits, what the
//! [`Forecast`] has seen in the order of requests, and whether another device has served it since. [`crate::Retention`]
//! takes it as `Event::Expected` for the model's tensors.
//!
//! Knows models by any numbers, and no tensors.

use std::collections::HashMap;

use crate::prefetch::Forecast;

/// Doublings of worth for what a waiting request will use...
const AWAITED: f64 = 12.0;

/// ...and fewer for each request in front of it.
const PER_PLACE: f64 = 2.0;

/// Doublings for what another device has too, or had later: the next request may well go there.
const SECOND_COPY: f64 = -3.0;

/// Forecasts that changed less are left as they are: each change costs a step for every tensor of the model.
const COARSENESS: f64 = 0.25;

/// Requests from which on the forecast is taken to know enough to act on before anybody asks: until then a model that
/// has just been used would go for another one that was used a little more often.
const TELLING_REQUESTS: u64 = 16;

#[derive(Clone, Copy, Debug, Default)]
struct Expectation {
    boost: f64,
    awaited: f64,
    elsewhere: bool,
    changed: bool,
}

/// The expectations on one device.
#[derive(Debug, Default)]
pub struct Expectations {
    forecast: Forecast,
    models: HashMap<u32, Expectation>,
    awaited: Vec<u32>,
    changed: Vec<u32>,
    observed: u64,
}

impl Expectations {
    /// Nothing is expected.
    pub fn new() -> Self {
        Self::default()
    }

    /// A request for `model` has started.
    pub fn observe(&mut self, model: u32) {
        self.observed += 1;
        self.forecast.observe(model);
        for index in 0..self.forecast.watched().len() {
            let model = self.forecast.watched()[index];
            let boost = self.forecast.boost(model);
            let told = self.models.get(&model).map_or(0.0, |expectation| expectation.boost);
            if (boost - told).abs() >= COARSENESS {
                self.set_boost(model, boost);
            }
        }
    }

    /// Whether enough requests have been seen to bring something in before it is asked for.
    pub fn is_telling(&self) -> bool {
        self.observed >= TELLING_REQUESTS
    }

    /// Somebody knows better than the forecast: log2 of how much likelier `model` is to come than its popularity says.
    pub fn set_boost(&mut self, model: u32, log2: f64) {
        self.change(model, |expectation| expectation.boost = log2);
    }

    /// Requests for these models wait now, the first to be served first; for no others.
    pub fn await_models(&mut self, models: &[u32]) {
        if self.awaited == models {
            return;
        }
        let before = std::mem::replace(&mut self.awaited, models.to_vec());
        for &model in before.iter().filter(|model| !models.contains(model)) {
            self.set_awaited(model, 0.0);
        }
        for (place, &model) in models.iter().enumerate() {
            self.set_awaited(model, (AWAITED - PER_PLACE * place as f64).max(0.0));
        }
    }

    fn set_awaited(&mut self, model: u32, log2: f64) {
        if self.models.get(&model).map_or(0.0, |expectation| expectation.awaited) != log2 {
            self.change(model, |expectation| expectation.awaited = log2);
        }
    }

    /// Whether a request for `model` waits.
    pub fn awaits(&self, model: u32) -> bool {
        self.awaited.contains(&model)
    }

    /// Another device has served `model` since this one did, or no longer.
    pub fn set_elsewhere(&mut self, model: u32, elsewhere: bool) {
        if self.models.get(&model).is_some_and(|expectation| expectation.elsewhere) != elsewhere {
            self.change(model, |expectation| expectation.elsewhere = elsewhere);
        }
    }

    /// `model` is gone.
    pub fn forget(&mut self, model: u32) {
        self.models.remove(&model);
    }

    fn change(&mut self, model: u32, change: impl FnOnce(&mut Expectation)) {
        let expectation = self.models.entry(model).or_default();
        change(expectation);
        if !std::mem::replace(&mut expectation.changed, true) {
            self.changed.push(model);
        }
    }

    /// Models of which something else is expected than when this was asked last.
    pub fn take_changed(&mut self) -> Vec<u32> {
        let changed = std::mem::take(&mut self.changed);
        for model in &changed {
            if let Some(expectation) = self.models.get_mut(model) {
                expectation.changed = false;
            }
        }
        changed
    }

    /// log2 of how much likelier the next use of a tensor of `model` is than its demand so far says, if `owners` models
    /// have it. What several have is used whenever one of them is; a doubt about one says little about it.
    pub fn log2(&self, model: u32, owners: u32) -> f64 {
        let Expectation { boost, awaited, elsewhere, .. } =
            self.models.get(&model).copied().unwrap_or_default();
        let second = if elsewhere { SECOND_COPY } else { 0.0 };
        awaited + if owners <= 1 { boost + second } else { boost.max(0.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cycle_is_expected_to_go_on() {
        let mut expectations = Expectations::new();
        assert!(!expectations.is_telling());
        (0..60).for_each(|i| expectations.observe(i % 4));
        assert!(expectations.is_telling());
        // After 3 comes 0, and 3 itself comes last.
        assert!(expectations.log2(0, 1) > expectations.log2(3, 1) + 1.0);
        assert!(expectations.log2(3, 2) >= 0.0, "what others have too is not given up for that");
        let changed = expectations.take_changed();
        assert_eq!(changed.len(), 4);
        assert!(expectations.take_changed().is_empty());
    }

    #[test]
    fn waiting_requests_count_in_their_order_and_no_longer_than_they_wait() {
        let mut expectations = Expectations::new();
        expectations.await_models(&[7, 8]);
        assert!(expectations.log2(7, 1) > expectations.log2(8, 1));
        assert!(expectations.log2(8, 3) > 8.0 && expectations.awaits(8));
        expectations.take_changed();
        expectations.await_models(&[7, 8]);
        assert!(expectations.take_changed().is_empty(), "nothing is new");
        expectations.await_models(&[8]);
        assert_eq!(expectations.take_changed(), [7, 8]);
        assert_eq!(expectations.log2(7, 1), 0.0);
        let many: Vec<u32> = (0..50).collect();
        expectations.await_models(&many);
        assert_eq!(expectations.log2(49, 1), 0.0, "who waits far back counts as nobody, not as less");
    }

    #[test]
    fn a_copy_elsewhere_lessens_what_only_this_model_has() {
        let mut expectations = Expectations::new();
        expectations.set_elsewhere(1, true);
        assert!(expectations.log2(1, 1) < 0.0);
        assert_eq!(expectations.log2(1, 2), 0.0);
        expectations.forget(1);
        assert_eq!(expectations.log2(1, 1), 0.0);
    }
}
