//! A model that is served while its bytes still come: which of its tensors lie on this disk already.
//!
//! Written by the thread that deploys it, read by the engine loop. A load of a tensor that is not there yet waits in the
//! loop and takes no stream of the store, so a slow source holds up nobody else.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tangram_checkpoint::Checksum;
use tangram_pool::{LoadFailure, Vacancy};
use tangram_store::TensorLoad;

use crate::model::Location;

/// The tensors of one deployment under way, by their place in its manifest.
#[derive(Debug)]
pub(crate) struct Arrival {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Checksums of those that are there.
    here: Vec<Option<Arc<[Checksum]>>>,
    failure: Option<String>,
}

impl Arrival {
    /// None of `tensors` is there.
    pub(crate) fn new(tensors: usize) -> Arrival {
        Arrival { state: Mutex::new(State { here: vec![None; tensors], failure: None }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A tensor lies in the data file.
    pub(crate) fn arrived(&self, index: usize, chunks: &[Checksum]) {
        if let Some(place) = self.lock().here.get_mut(index) {
            *place = Some(chunks.into());
        }
    }

    /// The others will never come; the reason is for the user.
    pub(crate) fn fail(&self, reason: &str) {
        self.lock().failure.get_or_insert_with(|| reason.to_owned());
    }

    /// The checksums of a tensor that is there.
    pub(crate) fn chunks(&self, index: usize) -> Option<Arc<[Checksum]>> {
        self.lock().here.get(index)?.clone()
    }

    fn failure(&self) -> Option<String> {
        self.lock().failure.clone()
    }
}

/// A load that cannot start before its tensor is on this disk.
pub(crate) struct Waiting {
    pub(crate) vacancy: Vacancy,
    pub(crate) location: Location,
}

/// Sorts out what has waited: what can start, and what goes on waiting. What nobody wants any more, or will never come,
/// is settled.
pub(crate) fn sort_out(waiting: Vec<Waiting>) -> (Vec<TensorLoad>, Vec<Waiting>) {
    let (mut ready, mut still) = (Vec::new(), Vec::new());
    for Waiting { vacancy, location } in waiting {
        let failure = location.arrival.as_ref().and_then(|(arrival, _)| arrival.failure());
        if vacancy.is_unwanted() {
            vacancy.fail(LoadFailure::Abandoned);
        } else if let Some(reason) = failure {
            vacancy.fail(LoadFailure::Failed(reason));
        } else {
            match location.load(vacancy) {
                Ok(load) => ready.push(load),
                Err(waits) => still.push(*waits),
            }
        }
    }
    (ready, still)
}
