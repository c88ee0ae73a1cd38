//! The queue in front of the device: who may start next, with bounded overtaking.
//!
//! Requests start in the order of arrival where they can. A request that cannot start yet (its model does not fit
//! beside what is running) may be overtaken by later ones that can, but only [`MAX_OVERTAKES`] times; then nobody
//! behind it starts before it does, what runs drains, and its turn comes. So nothing starves.

use std::collections::VecDeque;

/// How often later requests may start before a waiting one.
pub const MAX_OVERTAKES: u32 = 32;

/// What came of trying to start a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// It runs now.
    Started,
    /// It is over without having run (it failed or was cancelled).
    Gone,
}

struct Waiting<T> {
    request: T,
    overtaken: u32,
}

/// Requests that wait, in order of arrival.
pub struct Admission<T> {
    queue: VecDeque<Waiting<T>>,
}

impl<T> Default for Admission<T> {
    fn default() -> Self {
        Admission { queue: VecDeque::new() }
    }
}

impl<T> Admission<T> {
    /// Adds a request at the end.
    pub fn push(&mut self, request: T) {
        self.queue.push_back(Waiting { request, overtaken: 0 });
    }

    /// Puts a preempted request back at its place: before everything for which `later` says that it arrived later.
    pub fn push_back_in_order(&mut self, request: T, later: impl Fn(&T) -> bool) {
        let at = self.queue.iter().position(|waiting| later(&waiting.request)).unwrap_or(self.queue.len());
        self.queue.insert(at, Waiting { request, overtaken: 0 });
    }

    /// Requests waiting.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// The waiting requests in order.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.queue.iter().map(|waiting| &waiting.request)
    }

    /// Takes out everything for which `unwanted` holds.
    pub fn remove(&mut self, unwanted: impl Fn(&T) -> bool) -> Vec<T> {
        let mut removed = Vec::new();
        for waiting in std::mem::take(&mut self.queue) {
            if unwanted(&waiting.request) {
                removed.push(waiting.request);
            } else {
                self.queue.push_back(waiting);
            }
        }
        removed
    }

    /// Tries the waiting requests in order. `attempt` gets each request and gives it back if it could not start.
    pub fn admit(&mut self, mut attempt: impl FnMut(T) -> Result<Attempt, T>) {
        let mut still_waiting: VecDeque<Waiting<T>> = VecDeque::new();
        while let Some(Waiting { request, overtaken }) = self.queue.pop_front() {
            match attempt(request) {
                Ok(Attempt::Started) => {
                    for waiting in &mut still_waiting {
                        waiting.overtaken += 1;
                    }
                }
                Ok(Attempt::Gone) => {}
                Err(request) => still_waiting.push_back(Waiting { request, overtaken }),
            }
            if still_waiting.iter().any(|waiting| waiting.overtaken >= MAX_OVERTAKES) {
                break;
            }
        }
        still_waiting.append(&mut self.queue);
        self.queue = still_waiting;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_blocked_request_is_overtaken_a_bounded_number_of_times() {
        let mut admission = Admission::default();
        admission.push(0u32);
        for round in 1..100 {
            admission.push(round);
        }
        let mut started = Vec::new();
        admission.admit(|request| {
            if request == 0 {
                return Err(request);
            }
            started.push(request);
            Ok(Attempt::Started)
        });
        assert_eq!(started, (1..=MAX_OVERTAKES).collect::<Vec<_>>());
        admission.admit(|request| {
            assert_eq!(request, 0, "only the head is tried once it has been overtaken often enough");
            Err(request)
        });
        assert_eq!(admission.iter().next(), Some(&0));
    }

    #[test]
    fn a_preempted_request_returns_to_its_place() {
        let mut admission = Admission::default();
        for request in [3, 5, 7] {
            admission.push(request);
        }
        admission.push_back_in_order(4, |&other| other > 4);
        assert_eq!(admission.iter().copied().collect::<Vec<_>>(), [3, 4, 5, 7]);
        assert_eq!(admission.remove(|&request| request % 2 == 1), [3, 5, 7]);
        assert_eq!(admission.len(), 1);
    }

    proptest! {
        /// Whatever can start when, nobody is overtaken more than the bound, and nobody is lost.
        #[test]
        fn overtaking_is_bounded(rounds in proptest::collection::vec((0u32..8, any::<u64>()), 1..60)) {
            let mut admission = Admission::default();
            let mut next = 0u64;
            let mut overtaken: std::collections::BTreeMap<u64, u32> = Default::default();
            for (arrivals, startable) in rounds {
                for _ in 0..arrivals {
                    admission.push(next);
                    overtaken.insert(next, 0);
                    next += 1;
                }
                let mut started = Vec::new();
                admission.admit(|request| {
                    if startable >> (request % 64) & 1 == 1 { started.push(request); Ok(Attempt::Started) }
                    else { Err(request) }
                });
                for request in started {
                    overtaken.remove(&request);
                    for (_, count) in overtaken.range_mut(..request) { *count += 1; }
                }
                prop_assert!(overtaken.values().all(|&count| count <= MAX_OVERTAKES));
                prop_assert_eq!(
                    admission.iter().copied().collect::<Vec<_>>(),
                    overtaken.keys().copied().collect::<Vec<_>>()
                );
            }
        }
    }
}
