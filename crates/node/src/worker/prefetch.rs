//! When nobody asks for anything: what is expected next is brought in, a few tensors at a time.
//!
//! Never takes anything from a request: it runs only while none is there (on this device copying and computing take the
//! same cores), and lets go when one comes.

use tangram_policy::prefetch::BATCH_BYTES;
use tangram_pool::Vacancy;

use super::Worker;
use crate::model::loads;

impl Worker {
    /// Starts the next piece of prefetching if there is nothing else to do.
    pub(super) fn prefetch(&mut self) {
        if !self.setup.trial.is_ours()
            || !self.expectations.is_telling()
            || !self.queue.is_empty()
            || self.models.iter().flatten().any(|entry| entry.active.is_some())
        {
            return;
        }
        if let Some((lease, _)) = &self.prefetching
            && lease.tensors().iter().any(|tensor| !tensor.is_ready() && tensor.failure().is_none())
        {
            return;
        }
        self.end_prefetch();
        let Some(fetch) = self.pool.fetch(BATCH_BYTES) else { return };
        let located = |vacancy: Vacancy| {
            let &(model, index) = self.located.get(&vacancy.tensor().key())?;
            let location = self.models.get(model)?.as_ref()?.plan.locations.get(index)?;
            Some((vacancy, location))
        };
        let (ready, waiting) = loads(fetch.missing.into_iter().filter_map(located), &self.wake);
        self.waiting.extend(waiting);
        let load = self.store.prefetch(ready, &self.wake);
        self.prefetching = Some((fetch.lease, load));
    }

    /// Gives up what has not arrived and nobody else wants.
    pub(super) fn end_prefetch(&mut self) {
        if let Some((lease, _)) = self.prefetching.take() {
            self.pool.release(lease);
        }
    }
}
