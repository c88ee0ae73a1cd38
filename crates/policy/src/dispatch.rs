//! To which of a node's devices a request goes when it comes: to the one where its first token is foretold soonest, with
//! what the model's living there costs in the long run ([`Candidate::cost_of_living`], as the simulator's devices are
//! compared).
//!
//! Unlike a simulated device a real one serves many requests at once, so nobody is held back for a busy one: a request is
//! sent off at once, and what was sent is written down, because a device says only later what has become of it. Loads
//! follow each other on a device's link and prefills on its multiprocessors; a request for a model that is on its way
//! joins its load. What a device does not say is foretold; what was foretold for a request is forgotten when the request
//! has its first result, so errors do not add up.
//!
//! Pure: time is an argument, in seconds from any moment.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::placement::{Candidate, Popularity, Tenant, crowding};

/// Counts of requests per model halve in so many seconds, as those of [`crate::Retention`].
const HALF_LIFE_SECONDS: f64 = 600.0;

/// What a device says so long after something was sent there takes account of it.
const SETTLED_SECONDS: f64 = 0.1;

/// What was sent somewhere is seen in flight there not later than that.
const UNDER_WAY_SECONDS: f64 = 0.005;

/// The rate at which a device ends requests is that of about the last so many seconds.
const RATE_SECONDS: f64 = 10.0;

/// A request that comes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Coming {
    /// Which model it asks for.
    pub model: u32,
    /// Sequences that it consists of, which all go to the same device.
    pub sequences: usize,
    /// Seconds that its prompts take to compute, all of them; 0 if that is not known.
    pub compute_seconds: f64,
    /// Seconds of a load that its own computing hides.
    pub hidden_seconds: f64,
    /// Bytes per second at which weights come from the disk; above 0.
    pub bytes_per_second: f64,
}

/// What is seen of a device when a request comes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    /// Whether it works.
    pub usable: bool,
    /// Whether the model and the longest of the request's sequences fit there together.
    pub fits: bool,
    /// Bytes of its pool.
    pub pool_bytes: u64,
    /// Of these, bytes that nothing is kept in.
    pub free_bytes: u64,
    /// Sequences that were sent there and have not ended.
    pub in_flight: usize,
    /// Of these, sequences that wait because there is no room for them.
    pub waiting: usize,
    /// Of these, sequences that have no first result yet.
    pub unstarted: usize,
    /// Seconds that its link takes for what it lacks of the model's weights; 0 if all are there or on their way.
    pub load_seconds: f64,
    /// When it said how much is free, waits and is lacked.
    pub as_of: f64,
}

/// A deployed model.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    /// Its bytes, less what others that share them are charged with.
    bytes: f64,
    /// Of these, bytes that came unnoticed while its last request computed.
    hidden_bytes: f64,
    /// The device that it was last sent to.
    home: Option<usize>,
}

/// What was sent to a device, and what is foretold of it.
#[derive(Debug, Default)]
struct Ledger {
    /// When its link will have brought what was sent for.
    link_until: f64,
    /// When it will have computed the prompts.
    compute_until: f64,
    /// When sequences without a result were sent and how many seconds each computes. The first that was sent is taken to be
    /// the first to have one.
    prompts: VecDeque<(f64, f64)>,
    /// When models that were sent for will be there, and when that was. Kept until the device itself can tell.
    arrivals: HashMap<u32, (f64, f64)>,
    sent: u64,
    last_sent: f64,
    /// Sequences that have ended, and when that was looked at last, with something in flight or not.
    ended: u64,
    looked: f64,
    was_busy: bool,
    /// Sequences ended and seconds with something in flight, both fading.
    lately: (f64, f64),
}

impl Ledger {
    /// Sees how many sequences are left there, how many of them without a result, and of when the device's word is.
    fn look(&mut self, &Seen { in_flight, unstarted, as_of, .. }: &Seen, now: f64) {
        let seconds = (now - self.looked).max(0.0);
        let fade = (-seconds / RATE_SECONDS).exp2();
        let ended = self.sent.saturating_sub(in_flight as u64).max(self.ended);
        let busy = if self.was_busy { seconds } else { 0.0 };
        self.lately = (self.lately.0 * fade + (ended - self.ended) as f64, self.lately.1 * fade + busy);
        (self.ended, self.looked, self.was_busy) = (ended, now, in_flight > 0);
        let mut over = self.prompts.len().saturating_sub(unstarted);
        while over > 0 && self.prompts.front().is_some_and(|&(sent, _)| now - sent > UNDER_WAY_SECONDS) {
            self.prompts.pop_front();
            over -= 1;
        }
        let left: f64 = self.prompts.iter().map(|(_, seconds)| seconds).sum();
        self.compute_until = self.compute_until.min(now + left);
        if self.prompts.is_empty() {
            // Whatever was loaded is there: a request has its first result only then.
            self.link_until = now;
            self.arrivals.values_mut().for_each(|(at, _)| *at = at.min(now));
        }
        self.arrivals.retain(|_, (at, sent)| as_of < at.max(*sent + SETTLED_SECONDS));
    }

    /// Seconds until room is made for one more behind so many that wait. One in a second is what a device ends of which
    /// nothing is known.
    fn queue_seconds(&self, waiting: usize) -> f64 {
        waiting as f64 * (self.lately.1 + 1.0) / (self.lately.0 + 1.0)
    }

    /// Seconds until the model's weights are there.
    fn load_seconds(&self, model: u32, load_seconds: f64, now: f64) -> f64 {
        match self.arrivals.get(&model) {
            Some((at, _)) => (at - now).max(0.0),
            None if load_seconds > 0.0 => (self.link_until - now).max(0.0) + load_seconds,
            None => 0.0,
        }
    }

    fn send(&mut self, request: &Coming, load_seconds: f64, now: f64) {
        let arrival = now + self.load_seconds(request.model, load_seconds, now);
        if arrival > now {
            self.link_until = self.link_until.max(arrival);
        }
        self.arrivals.insert(request.model, (arrival, now));
        self.compute_until = self.compute_until.max(now) + request.compute_seconds;
        let each = request.compute_seconds / request.sequences.max(1) as f64;
        self.prompts.extend(std::iter::repeat_n((now, each), request.sequences));
        self.sent += request.sequences as u64;
        self.last_sent = now;
        self.was_busy = true;
    }
}

/// Sends requests to devices.
#[derive(Debug)]
pub struct Dispatch {
    ledgers: Vec<Ledger>,
    models: BTreeMap<u32, Known>,
    popularity: Popularity,
}

impl Dispatch {
    /// For so many devices, to which nothing was sent yet.
    pub fn new(devices: usize) -> Dispatch {
        Dispatch {
            ledgers: (0..devices).map(|_| Ledger::default()).collect(),
            models: BTreeMap::new(),
            popularity: Popularity::new(HALF_LIFE_SECONDS),
        }
    }

    /// These models are deployed, and no others, with the bytes that each is charged with: what several models share is
    /// charged to them in equal parts.
    pub fn set_models(&mut self, models: impl IntoIterator<Item = (u32, f64)>) {
        let known = models.into_iter().map(|(model, bytes)| {
            let known = self.models.get(&model).copied().unwrap_or_default();
            (model, Known { bytes, ..known })
        });
        self.models = known.collect();
    }

    /// The device that requests for a model were sent to last.
    pub fn home(&self, model: u32) -> Option<usize> {
        self.models.get(&model)?.home
    }

    /// The device that a request goes to, of which `seen` has what is seen of each; notes that it goes there. One that
    /// does not work is taken only where the request fits on no other. `None` if it fits nowhere.
    pub fn send(&mut self, request: &Coming, seen: &[Seen], now: f64) -> Option<usize> {
        for (ledger, seen) in self.ledgers.iter_mut().zip(seen) {
            ledger.look(seen, now);
            if !seen.usable {
                ledger.arrivals.clear();
            }
        }
        self.popularity.observe(request.model, now);
        if let Some(known) = self.models.get_mut(&request.model) {
            known.hidden_bytes = request.hidden_seconds * request.bytes_per_second;
        }
        let devices = self.ledgers.iter().enumerate().zip(seen);
        let costs: Vec<f64> = devices
            .map(|(device, seen)| self.candidate(request, device, seen, now).cost_of_living())
            .collect();
        let best = |usable: bool| {
            let fitting = seen.iter().zip(&costs).enumerate();
            let fitting = fitting.filter(|(_, (seen, _))| seen.fits && seen.usable == usable);
            let rank = |seen: &Seen| (seen.in_flight, Reverse(seen.free_bytes));
            fitting.min_by(|(_, (a, cost)), (_, (b, other))| {
                cost.total_cmp(other).then_with(|| rank(a).cmp(&rank(b)))
            })
        };
        let (device, (seen, _)) = best(true).or_else(|| best(false))?;
        self.ledgers.get_mut(device)?.send(request, seen.load_seconds, now);
        if let Some(known) = self.models.get_mut(&request.model) {
            known.home = Some(device);
        }
        Some(device)
    }

    fn candidate(
        &self,
        request: &Coming,
        (device, ledger): (usize, &Ledger),
        seen: &Seen,
        now: f64,
    ) -> Candidate {
        let computing = (ledger.compute_until - now).max(0.0);
        let load = ledger.load_seconds(request.model, seen.load_seconds, now);
        Candidate {
            device: device as u32,
            wait: computing + ledger.queue_seconds(seen.waiting),
            // Its weights come while others compute, and while it does.
            stall: (load - request.hidden_seconds - computing).max(0.0),
            // What an eviction costs soon is not seen from here; what it costs for ever is in the crowding.
            damage: 0.0,
            crowding: self.crowding(request, device, seen.pool_bytes, now),
            fits: seen.fits,
        }
    }

    /// What the model's living on the device costs per use, beside those that live there.
    fn crowding(&self, request: &Coming, device: usize, room: u64, now: f64) -> f64 {
        let Some(own) = self.models.get(&request.model) else { return 0.0 };
        let tenant = |model: u32, known: &Known| Tenant {
            share: self.popularity.share(model, now),
            felt_bytes: known.bytes - known.hidden_bytes,
        };
        let mut others: Vec<Tenant> = self
            .models
            .iter()
            .filter(|&(&model, known)| model != request.model && known.home == Some(device))
            .map(|(&model, known)| tenant(model, known))
            .collect();
        others.sort_by(|a, b| b.share.total_cmp(&a.share));
        crowding(tenant(request.model, own), &others, room, request.bytes_per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GB: u64 = 1 << 30;

    fn coming(model: u32) -> Coming {
        Coming {
            model,
            sequences: 1,
            compute_seconds: 0.01,
            hidden_seconds: 0.0,
            bytes_per_second: GB as f64,
        }
    }

    /// A device with room for 10 GB that does nothing and lacks nothing.
    fn seen() -> Seen {
        Seen {
            usable: true,
            fits: true,
            pool_bytes: 10 * GB,
            free_bytes: 10 * GB,
            in_flight: 0,
            waiting: 0,
            unstarted: 0,
            load_seconds: 0.0,
            as_of: f64::INFINITY,
        }
    }

    fn cold(load_seconds: f64) -> Seen {
        Seen { load_seconds, ..seen() }
    }

    fn two() -> Dispatch {
        let mut dispatch = Dispatch::new(2);
        dispatch.set_models((0..3).map(|model| (model, 6.0 * GB as f64)));
        dispatch
    }

    #[test]
    fn a_model_goes_where_its_weights_are() {
        let mut dispatch = two();
        assert_eq!(dispatch.home(0), None);
        for (at, holder) in [(0.0, 1), (1.0, 0), (2.0, 1)] {
            let devices = [0, 1].map(|device| if device == holder { seen() } else { cold(3.0) });
            assert_eq!(dispatch.send(&coming(0), &devices, at), Some(holder));
        }
        assert_eq!(dispatch.home(0), Some(1));
        // Most of them is better than none of them, and host memory better than the disk.
        assert_eq!(dispatch.send(&coming(0), &[cold(0.2), cold(0.1)], 3.0), Some(1));
    }

    #[test]
    fn models_that_do_not_fit_together_part_and_stay_apart() {
        let mut dispatch = two();
        let all = |a: f64, b: f64| [cold(a), cold(b)];
        assert_eq!(dispatch.send(&coming(0), &all(6.0, 6.0), 0.0), Some(0));
        assert_eq!(dispatch.send(&coming(1), &all(6.0, 6.0), 10.0), Some(1));
        for turn in 2..10 {
            let model = turn % 2;
            let devices = if model == 0 { all(0.0, 6.0) } else { all(6.0, 0.0) };
            assert_eq!(dispatch.send(&coming(model), &devices, f64::from(turn) * 10.0), Some(model as usize));
        }
        // The third lives with one of them, always the same.
        assert_eq!(dispatch.send(&coming(2), &all(6.0, 6.0), 100.0), Some(0));
        assert_eq!(dispatch.send(&coming(2), &all(0.0, 6.0), 110.0), Some(0));
    }

    #[test]
    fn what_fits_beside_others_fills_the_first_device_with_room() {
        let mut dispatch = two();
        dispatch.set_models((0..3).map(|model| (model, GB as f64)));
        let half_full = Seen { free_bytes: 5 * GB, ..cold(1.0) };
        assert_eq!(dispatch.send(&coming(0), &[half_full, cold(1.0)], 0.0), Some(1));
        assert_eq!(dispatch.send(&coming(1), &[cold(1.0), half_full], 10.0), Some(0));
    }

    #[test]
    fn a_request_joins_the_load_of_another() {
        let mut dispatch = two();
        assert_eq!(dispatch.send(&coming(0), &[cold(3.0), cold(3.0)], 0.0), Some(0));
        // The device has not said yet that it loads; the prompts before this one are short.
        for count in 1..20 {
            let loading = Seen { in_flight: count, unstarted: count, as_of: 0.0, ..cold(3.0) };
            assert_eq!(dispatch.send(&coming(0), &[loading, cold(3.0)], 0.01 * count as f64), Some(0));
        }
        // Another model's load would come behind it.
        let loading = Seen { in_flight: 20, unstarted: 20, as_of: 0.0, ..cold(3.0) };
        assert_eq!(dispatch.send(&coming(1), &[loading, cold(3.0)], 0.5), Some(1));
    }

    #[test]
    fn a_long_queue_is_worth_another_load() {
        let mut dispatch = two();
        let long = Coming { compute_seconds: 1.0, ..coming(0) };
        let mut sent = [0, 0];
        for _ in 0..20 {
            let lacking = if sent[1] == 0 { 5.0 } else { 0.0 };
            let busy = |sent, of| Seen { in_flight: sent, unstarted: sent, ..of };
            let devices = [busy(sent[0], seen()), busy(sent[1], cold(lacking))];
            sent[dispatch.send(&long, &devices, 0.0).unwrap()] += 1;
        }
        // Five seconds of prompts are as long as the load; from then on they take turns.
        assert!(sent[0] >= 10 && sent[1] >= 6, "{sent:?}");
        // A queue for which there is no room counts by how fast the device ends requests.
        let (mut dispatch, full) = (two(), Seen { in_flight: 70, waiting: 6, ..seen() });
        dispatch.ledgers[0].sent = 70;
        assert_eq!(dispatch.send(&coming(0), &[full, cold(5.0)], 100.0), Some(1), "nothing has ended");
        let (mut dispatch, full) = (two(), Seen { in_flight: 70, waiting: 6, ..seen() });
        dispatch.ledgers[0].sent = 1000;
        (dispatch.ledgers[0].was_busy, dispatch.ledgers[0].looked) = (true, 95.0);
        assert_eq!(dispatch.send(&coming(0), &[full, cold(5.0)], 100.0), Some(0), "the queue is short");
    }

    #[test]
    fn equal_devices_get_equally_many() {
        let mut dispatch = two();
        let quick = Coming { compute_seconds: 0.0, ..coming(0) };
        let mut sent = [0, 0];
        for _ in 0..9 {
            let devices = sent.map(|in_flight| Seen { in_flight, ..seen() });
            sent[dispatch.send(&quick, &devices, 0.0).unwrap()] += 1;
        }
        assert_eq!(sent, [5, 4]);
    }

    #[test]
    fn what_was_foretold_of_an_idle_device_is_forgotten() {
        let mut dispatch = two();
        assert_eq!(dispatch.send(&coming(0), &[cold(100.0), cold(200.0)], 0.0), Some(0));
        // It took no time at all.
        assert_eq!(dispatch.send(&coming(0), &[cold(1.0), cold(1.5)], 1.0), Some(0));
    }

    /// A device that computes faster than foretold and always has something to decode.
    #[test]
    fn errors_do_not_add_up_on_a_device_that_is_never_idle() {
        let mut dispatch = two();
        let slow = Coming { compute_seconds: 1.0, ..coming(0) };
        for turn in 0..1000 {
            let busy = Seen { in_flight: 20, unstarted: 1, ..seen() };
            assert_eq!(dispatch.send(&slow, &[busy, cold(5.0)], 0.1 * f64::from(turn)), Some(0), "{turn}");
        }
        // Only what has no result yet is waited for.
        let busy = |unstarted| Seen { in_flight: 20, unstarted, ..seen() };
        for unstarted in 1..5 {
            assert_eq!(dispatch.send(&slow, &[busy(unstarted), cold(5.0)], 100.0), Some(0));
        }
        let crowded = (0..9).find(|unstarted| {
            dispatch.send(&slow, &[busy(5 + unstarted), cold(5.0)], 100.0 + 1e-4 * *unstarted as f64)
                == Some(1)
        });
        assert!(crowded.is_some_and(|after| after < 4), "{crowded:?}");
    }

    #[test]
    fn what_was_sent_is_known_before_the_device_says_so() {
        let mut dispatch = two();
        let devices = |as_of| [cold(0.01), Seen { as_of, ..cold(0.01) }];
        assert_eq!(dispatch.send(&coming(0), &[cold(0.02), devices(0.0)[1]], 1.0), Some(1));
        // It has ended already; the device's word is from before.
        assert_eq!(dispatch.send(&coming(0), &devices(0.9), 1.02), Some(1));
        assert_eq!(dispatch.send(&coming(0), &devices(1.05), 1.06), Some(1), "perhaps too early");
        // It has gone since.
        assert_eq!(dispatch.send(&coming(0), &devices(2.0), 2.0), Some(0));
    }

    #[test]
    fn what_was_sent_a_moment_ago_counts_although_it_is_not_seen() {
        let mut dispatch = two();
        dispatch.set_models((0..2).map(|model| (model, GB as f64)));
        assert_eq!(dispatch.send(&coming(0), &[cold(3.0), cold(3.0)], 0.0), Some(0));
        assert_eq!(dispatch.send(&coming(1), &[cold(3.0), cold(3.0)], 0.001), Some(1));
    }

    #[test]
    fn a_lost_device_is_avoided_but_not_for_one_where_the_request_does_not_fit() {
        let lost = Seen { usable: false, ..seen() };
        let small = Seen { fits: false, ..seen() };
        assert_eq!(two().send(&coming(0), &[lost, cold(60.0)], 0.0), Some(1));
        assert_eq!(two().send(&coming(0), &[small, lost], 0.0), Some(1));
        assert_eq!(two().send(&coming(0), &[small, cold(60.0)], 0.0), Some(1));
        assert_eq!(two().send(&coming(0), &[small, small], 0.0), None);
    }

    #[test]
    fn a_model_that_is_not_deployed_any_more_crowds_nobody() {
        let mut dispatch = two();
        assert_eq!(dispatch.send(&coming(0), &[cold(6.0), cold(6.1)], 0.0), Some(0));
        let first = Seen { free_bytes: 4 * GB, ..cold(6.0) };
        let mut again = two();
        again.send(&coming(0), &[cold(6.0), cold(6.1)], 0.0);
        again.set_models([(1, 6.0 * GB as f64)]);
        assert_eq!(again.send(&coming(1), &[first, cold(6.1)], 50.0), Some(0));
        assert_eq!(dispatch.send(&coming(1), &[first, cold(6.1)], 50.0), Some(1));
    }

    proptest! {
        /// Whatever is seen, a request goes where it fits, to a device that works if there is one, and of devices that are
        /// alike in all else to one that lacks no more than the others.
        #[test]
        fn requests_go_where_they_fit(
            steps in proptest::collection::vec(
                (0u32..4, 0.0f64..5.0, proptest::collection::vec(
                    (any::<bool>(), any::<bool>(), 0usize..100, 0usize..20, 0.0f64..9.0), 3)), 1..40)
        ) {
            let mut dispatch = Dispatch::new(3);
            dispatch.set_models((0..3).map(|model| (model, 4.0 * GB as f64)));
            let mut now = 0.0;
            for (model, seconds, devices) in steps {
                now += seconds;
                let devices: Vec<Seen> = devices
                    .into_iter()
                    .map(|(usable, fits, in_flight, waiting, load_seconds)| Seen {
                        usable, fits, in_flight, waiting, unstarted: in_flight / 2, load_seconds, ..seen()
                    })
                    .collect();
                let sent = dispatch.send(&coming(model), &devices, now);
                let works = |seen: &Seen| seen.usable && seen.fits;
                match sent {
                    None => prop_assert!(!devices.iter().any(|seen| seen.fits)),
                    Some(device) => {
                        prop_assert!(devices[device].fits);
                        prop_assert!(devices[device].usable || !devices.iter().any(works));
                    }
                }
                for ledger in &dispatch.ledgers {
                    prop_assert!(ledger.link_until.is_finite() && ledger.compute_until.is_finite());
                    prop_assert!(ledger.queue_seconds(3).is_finite() && ledger.queue_seconds(3) > 0.0);
                }
            }
            // Idle devices on which nothing lives differ by what they lack alone.
            let mut fresh = Dispatch::new(3);
            let lacks = [2.0, 1.0, 3.0].map(cold);
            prop_assert_eq!(fresh.send(&coming(9), &lacks, now), Some(1));
        }
    }
}
