//! When the device is lost: what was on it goes, and it is set up anew. The node, its models and who waits stay.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Worker;
use crate::api::RequestError;
use crate::device::Opened;

/// How long the last user of a lost device may take to let it go before that is said.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is asked whether that has let go.
const GLANCE: Duration = Duration::from_millis(5);
/// Between attempts to set it up.
const RETRY: Duration = Duration::from_secs(5);

/// A device that could not be set up again yet.
pub(super) struct Outage {
    reason: String,
    since: Instant,
    pub(super) retry: Instant,
    /// Whether it was tried in vain. Until then requests wait.
    in_vain: bool,
}

impl Worker {
    /// Whether there is a device to compute on. Sets it up anew if it was lost since the last call. Requests wait until
    /// that was tried; when it was in vain they are refused until it succeeds. Never waits itself: a loop answers whoever
    /// deploys.
    pub(super) fn has_device(&mut self) -> bool {
        if self.outage.is_none() {
            let Some(lost) = self.pool.memory().lost() else { return true };
            self.clear_away(&lost.to_string());
        }
        let now = Instant::now();
        let due = self.outage.as_ref().is_some_and(|outage| outage.retry <= now);
        // Its context is reset when nothing of it is left; a new one before that would be reset too.
        if due
            && !self.setup.device.is_clear()
            && let Some(outage) = self.outage.as_mut().filter(|outage| now - outage.since < PATIENCE)
        {
            outage.retry = now + GLANCE;
        } else if due {
            match self.set_up_again() {
                Ok(()) => {
                    self.outage = None;
                    self.rebuilds += 1;
                    // What is known of the device by others is from before it was lost.
                    self.publish(true);
                    self.shared.lost.store(false, Ordering::Release);
                    tracing::warn!(device = self.pool.memory().name(), "the device was set up anew");
                    return true;
                }
                Err(problem) => {
                    tracing::error!("the device cannot be set up again: {problem}");
                    if let Some(outage) = &mut self.outage {
                        (outage.retry, outage.in_vain) = (Instant::now() + RETRY, true);
                    }
                }
            }
        }
        self.hand_over_waiting();
        if self.outage.as_ref().is_some_and(|outage| outage.in_vain) {
            self.refuse_waiting();
        }
        false
    }

    /// What clients are told of an error: if the device is lost, that.
    pub(super) fn cause(&self, error: RequestError) -> RequestError {
        match self.pool.memory().lost() {
            Some(lost) => RequestError::DeviceLost(lost.to_string()),
            None => error,
        }
    }

    /// Ends everything that is on the device and lets it go.
    fn clear_away(&mut self, reason: &str) {
        tracing::error!("{reason}");
        self.shared.lost.store(true, Ordering::Release);
        let error = RequestError::DeviceLost(reason.to_owned());
        for model in 0..self.models.len() {
            if self.models[model].as_ref().is_some_and(|entry| entry.active.is_some()) {
                self.fail_model(model, &error);
            }
        }
        self.hand_over_waiting();
        self.end_prefetch();
        self.waiting.clear();
        let now = Instant::now();
        self.outage = Some(Outage { reason: reason.to_owned(), since: now, retry: now, in_vain: false });
        match self.setup.nothing() {
            Ok(nothing) => self.move_to(nothing),
            // Without a page of memory the lost pool has to stay where it is, and nothing is set up until there is one.
            Err(problem) => tracing::error!("no memory to go on with: {problem}"),
        }
    }

    fn set_up_again(&mut self) -> Result<(), String> {
        if !self.setup.device.is_clear() {
            return Err("something still uses what is left of the lost one".to_owned());
        }
        let opened = self.setup.open()?;
        self.move_to(opened);
        Ok(())
    }

    /// Goes on with another device, whose pool knows the same models and holds nothing of them.
    fn move_to(&mut self, Opened { mut pool, executor, store, host }: Opened) {
        self.disks.serve(self.setup.place, store.clone());
        let counts = self.executor.counts();
        self.replays += counts.replays;
        self.rows_copied += counts.rows_copied;
        pool.succeed(self.pool.stats());
        (self.pool, self.executor, self.store, self.host) = (pool, executor, store, host);
        self.located.clear();
        for index in 0..self.models.len() {
            let Some(mut entry) = self.models[index].take() else { continue };
            (entry.keys, entry.kv) = self.catalogue(&entry.plan).unwrap_or_else(|problem| {
                tracing::error!(model = entry.deployed.name, "cannot be used: {problem}");
                (Vec::new(), None)
            });
            let places = entry.keys.iter().zip(0..).map(|(&key, place)| (key, (index, place)));
            self.located.extend(places);
            self.models[index] = Some(entry);
            self.unappraised.push(index);
        }
    }

    /// What waits for this device goes to another that works, if there is one where it fits. (What ran here ends: it may be
    /// what the device was lost by.)
    fn hand_over_waiting(&mut self) {
        for sequence in self.queue.remove(|_| true) {
            let model = sequence.model;
            let outcome = match &self.models[model] {
                // One that is being removed may be gone there already.
                Some(entry) if entry.retire.is_none() => self.fleet.hand_over(&entry.deployed, sequence),
                _ => Err(sequence),
            };
            if let Err(stays) = outcome {
                self.queue.push(stays);
                continue;
            }
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
            self.shared.in_flight.fetch_sub(1, Ordering::AcqRel);
            if let Some(entry) = self.models[model].as_mut() {
                entry.waiting -= 1;
            }
            self.retire_if_over(model);
        }
    }

    /// Nobody is let wait for a device that may not come back.
    fn refuse_waiting(&mut self) {
        let Some(outage) = &self.outage else { return };
        let error = RequestError::DeviceLost(outage.reason.clone());
        for sequence in self.queue.remove(|_| true) {
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
            if let Some(entry) = self.models[sequence.model].as_mut() {
                entry.waiting -= 1;
            }
            let error = error.clone();
            self.end(*sequence, |sequence| sequence.fail(error));
        }
    }
}
