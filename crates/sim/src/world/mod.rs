//! The simulated world: events in order of time, one request at a time on each device.
//!
//! Deterministic: integer time, events at the same time in the order in which they were made, no iteration over hash
//! maps, nothing that depends on the machine but the measured decision times, which are reported and never acted upon
//! or logged.

mod evict;
mod host;
mod prefetch;
mod route;
mod start;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::fmt::Write;
use std::rc::Rc;

use tangram_policy::placement::Popularity;

use crate::device::Device;
use crate::economy::Economy;
use crate::host::HostTier;
use crate::layout::Layout;
use crate::model::{ALIGNMENT, Model, Pace, number_contents};
use crate::profile::Profile;
use crate::report::{Record, Recorded, Residency};
use crate::system::{Keep, System};
use crate::trace::{Nanos, Request, nanos, seconds};

/// In what time the demand for a model halves. LayerWeave's is not known; ours is taken.
const HALF_LIFE_SECONDS: f64 = 600.0;

/// Lengths of prompts remembered per model.
const LENGTHS: usize = 32;

/// Points of the residency chart.
const RESIDENCY_POINTS: usize = 400;

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// The machines.
    pub profile: Profile,
    /// How many devices.
    pub devices: usize,
    /// Bytes of host memory per node for checkpoints; `None` if all fit.
    pub host_bytes: Option<u64>,
    /// The models; requests name them by index.
    pub models: Vec<Model>,
    /// The requests in order of arrival.
    pub requests: Vec<Request>,
    /// If given, a request arrives so long after the one before it has ended, and arrival times are ignored: everything
    /// idle whenever a request is placed. The authors' replays do so without a pause.
    pub closed_loop: Option<Nanos>,
    /// Longest answer, in tokens.
    pub max_output: u64,
    /// Whether KV takes memory.
    pub kv: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A device has ended its request.
    Finish(u32),
    /// A device's link is free.
    Link(u32),
    /// Someone who was held back for a busy device may go now.
    Retry,
    /// A request arrives.
    Arrive(u32),
}

/// A model as the world needs it.
struct Known {
    groups: Vec<(u32, u64)>,
    shares: Vec<f64>,
    pace: Option<Pace>,
    weight_bytes: u64,
    kv_bytes_per_token: u64,
    max_prompt: u64,
    /// The last prompt lengths.
    lengths: VecDeque<u64>,
    /// What its median prompt of late computes in prefill.
    compute_seconds: f64,
    /// Requests so far, decayed, at `demand_at` seconds, for the baselines.
    demand: f64,
    demand_at: f64,
    uses: u64,
    /// Indices of the requests that ask for it.
    occurrences: Vec<u32>,
    /// Devices on which it was used, the most recent first.
    devices: Vec<u32>,
}

/// A request that waits.
#[derive(Clone, Copy)]
struct Pending {
    request: u32,
    overtaken: u32,
}

/// Host memory of a node: whole checkpoints, the one used longest ago goes.
#[derive(Default)]
struct Host {
    bytes: u64,
    last_use: BTreeMap<u32, u64>,
}

struct World<'a> {
    scenario: &'a Scenario,
    system: &'a System,
    models: Vec<Known>,
    devices: Vec<Device>,
    economies: Vec<Economy>,
    hosts: Vec<Host>,
    /// In place of `hosts`, under ours where host memory is limited.
    tiers: Vec<HostTier>,
    idle: BTreeSet<u32>,
    /// Devices that know of requests which wait for them.
    told: Vec<u32>,
    /// Over all devices.
    popularity: Popularity,
    pending: VecDeque<Pending>,
    events: BinaryHeap<Reverse<(Nanos, u64, Event)>>,
    /// When the next `Retry` comes.
    retry: Option<Nanos>,
    made: u64,
    now: Nanos,
    /// Number of starts so far: the order of uses.
    sequence: u64,
    records: Vec<Record>,
    totals: Totals,
    /// Stall of each resident prefix, by model and bucket of prompt length.
    stalls: HashMap<(u32, u32), Rc<Vec<f64>>>,
    residency: Vec<Residency>,
    log: Option<String>,
}

#[derive(Default)]
struct Totals {
    fetched_bytes: u64,
    background_moved: u64,
    evicted_bytes: u64,
    /// Nanoseconds of real time spent in policy code since the last start.
    thinking: u64,
}

impl Known {
    /// Seconds that a pass over `tokens` new tokens computes on this machine.
    fn prefill_seconds(&self, profile: &Profile, tokens: u64) -> f64 {
        match &self.pace {
            Some(pace) => pace.prefill_seconds(tokens),
            None => profile.prefill_seconds(self.weight_bytes, tokens),
        }
    }
}

/// Runs the scenario on a system. `progress` is told the number of requests served, now and then; `log` asks for the
/// event log.
pub fn run(scenario: &Scenario, system: &System, log: bool, mut progress: impl FnMut(usize)) -> Recorded {
    let mut world = World::new(scenario, system, log);
    let step = (scenario.requests.len() / 200).max(1);
    let mut told = 0;
    while world.step() {
        if world.records.len() >= told + step {
            told = world.records.len();
            progress(told);
        }
    }
    progress(scenario.requests.len());
    debug_assert!(world.pending.is_empty());
    Recorded {
        system: system.name.clone(),
        end: world.records.iter().map(|record| record.finish).max().unwrap_or(0),
        records: world.records,
        fetched_bytes: world.totals.fetched_bytes,
        background_moved_bytes: world.totals.background_moved,
        evicted_bytes: world.totals.evicted_bytes,
        residency: world.residency,
        log: world.log,
    }
}

impl<'a> World<'a> {
    fn new(scenario: &'a Scenario, system: &'a System, log: bool) -> Self {
        let pool = scenario.profile.pool_bytes / ALIGNMENT * ALIGNMENT;
        let adapt = |(model, salt): (&Model, u64)| {
            let model = if system.sharing { model.clone() } else { model.unshared(salt) };
            system.merged.map_or(model.clone(), |parts| model.merged(parts))
        };
        let adapted: Vec<Model> = scenario.models.iter().zip(0..).map(adapt).collect();
        let (numbers, _) = number_contents(&adapted);
        let mut models: Vec<Known> = adapted
            .iter()
            .zip(numbers)
            .map(|(model, numbers)| {
                let weight_bytes = model.weight_bytes();
                let beside = pool.saturating_sub(weight_bytes) / model.kv_bytes_per_token.max(1);
                Known {
                    groups: numbers.into_iter().zip(model.groups.iter().map(|group| group.bytes)).collect(),
                    shares: model.compute_shares(),
                    pace: model.pace.clone(),
                    weight_bytes,
                    kv_bytes_per_token: model.kv_bytes_per_token,
                    max_prompt: model.max_prompt.min(beside.saturating_sub(scenario.max_output + 1)).max(1),
                    compute_seconds: 0.0,
                    lengths: VecDeque::new(),
                    demand: 0.0,
                    demand_at: 0.0,
                    uses: 0,
                    occurrences: Vec::new(),
                    devices: Vec::new(),
                }
            })
            .collect();
        for (index, request) in scenario.requests.iter().enumerate() {
            models[request.model as usize].occurrences.push(index as u32);
        }
        let device = |_| Device::new(pool, system.packing.map(|strategy| Layout::new(pool, strategy)));
        let economies = match system.keep {
            Keep::Worth(parts) => (0..scenario.devices).map(|_| Economy::new(parts)).collect(),
            _ => Vec::new(),
        };
        let nodes = scenario.devices.div_ceil(scenario.profile.devices_per_node);
        let mut world = World {
            scenario,
            system,
            models,
            devices: (0..scenario.devices).map(device).collect(),
            economies,
            hosts: (0..nodes).map(|_| Host::default()).collect(),
            tiers: match (system.keep, scenario.host_bytes) {
                (Keep::Worth(_), Some(bytes)) => (0..nodes).map(|_| HostTier::new(bytes)).collect(),
                _ => Vec::new(),
            },
            idle: (0..scenario.devices as u32).collect(),
            told: Vec::new(),
            popularity: Popularity::new(HALF_LIFE_SECONDS),
            pending: VecDeque::new(),
            events: BinaryHeap::new(),
            retry: None,
            made: 0,
            now: 0,
            sequence: 0,
            records: Vec::with_capacity(scenario.requests.len()),
            totals: Totals::default(),
            stalls: HashMap::new(),
            residency: Vec::new(),
            log: log.then(String::new),
        };
        world.arrive_next(0);
        world
    }

    /// Handles the next event; `false` if there is none.
    fn step(&mut self) -> bool {
        let Some(Reverse((at, _, event))) = self.events.pop() else { return false };
        self.now = at;
        self.handle(event);
        true
    }

    /// Makes the arrival of request `index` an event.
    fn arrive_next(&mut self, index: u32) {
        if let Some(request) = self.scenario.requests.get(index as usize) {
            let at = match self.scenario.closed_loop {
                // Nobody has ended before the first one.
                Some(pause) => self.now + if index == 0 { 0 } else { pause },
                None => request.arrival.max(self.now),
            };
            self.schedule(at, Event::Arrive(index));
        }
    }

    fn schedule(&mut self, at: Nanos, event: Event) {
        self.made += 1;
        self.events.push(Reverse((at, self.made, event)));
    }

    fn note(&mut self, write: impl FnOnce(&mut String) -> std::fmt::Result) {
        if let Some(log) = &mut self.log {
            // Writing to a string does not fail.
            let _ = write!(log, "{} ", self.now).and_then(|()| write(log));
            log.push('\n');
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive(index) => {
                let model = self.request(index).model;
                self.note(|log| write!(log, "arrive request={index} model={model}"));
                self.pending.push_back(Pending { request: index, overtaken: 0 });
                if self.scenario.closed_loop.is_none() {
                    self.arrive_next(index + 1);
                }
                self.dispatch();
            }
            Event::Finish(device) => {
                self.finish(device);
                if self.scenario.closed_loop.is_some() {
                    self.arrive_next(self.sequence as u32);
                }
                self.dispatch();
                self.pump(device);
            }
            Event::Link(device) => {
                self.devices[device as usize].link_event = false;
                self.settle_fetch(device);
                self.pump(device);
            }
            Event::Retry => {
                self.retry = None;
                self.dispatch();
            }
        }
    }

    fn request(&self, index: u32) -> Request {
        self.scenario.requests[index as usize]
    }

    /// Prompt and answer as they are served: cut to what the model and the run allow.
    fn tokens(&self, request: Request) -> (u64, u64) {
        let output = request.output.min(self.scenario.max_output);
        (request.prompt.min(self.models[request.model as usize].max_prompt), output)
    }

    /// KV bytes of the whole answer.
    fn kv_bytes(&self, request: Request) -> u64 {
        if !self.scenario.kv {
            return 0;
        }
        let (prompt, output) = self.tokens(request);
        ((prompt + output) * self.models[request.model as usize].kv_bytes_per_token)
            .next_multiple_of(ALIGNMENT)
    }

    fn finish(&mut self, index: u32) {
        let device = &mut self.devices[index as usize];
        let Some(running) = device.running.take() else { return };
        device.kv_bytes = 0;
        if let Some(layout) = &mut device.layout {
            layout.give_kv();
        }
        let slots: Vec<u32> = device.slots_of(running.model).unwrap_or_default().to_vec();
        for slot in slots {
            let entry = &mut device.slots[slot as usize];
            entry.holders -= 1;
            if entry.holders == 0
                && entry.arriving.is_none()
                && let Some(economy) = self.economies.get_mut(index as usize)
            {
                economy.idle(slot);
            }
        }
        self.idle.insert(index);
        self.note(|log| write!(log, "finish device={index} model={}", running.model));
        self.sample_residency(index);
    }

    /// Notes what device 0 holds, for the chart.
    fn sample_residency(&mut self, index: u32) {
        let every = (self.scenario.requests.len() / self.scenario.devices / RESIDENCY_POINTS).max(1) as u64;
        if index != 0 || !self.sequence.is_multiple_of(every) {
            return;
        }
        let device = &self.devices[0];
        let bytes = (0..self.models.len().min(8) as u32).map(|model| device.resident_of(model)).collect();
        self.residency.push(Residency { at: seconds(self.now), bytes });
    }

    /// The next request for the model after the one that starts now, as an index into the trace.
    fn next_use(&self, model: u32, current: u32) -> Option<u32> {
        let occurrences = &self.models[model as usize].occurrences;
        occurrences.get(occurrences.partition_point(|&index| index <= current)).copied()
    }

    /// Bytes per second at which the model comes to the device: over the device's link, or from disk if host memory
    /// does not have it.
    fn bytes_per_second(&self, model: u32, device: u32) -> f64 {
        let profile = &self.scenario.profile;
        if let Some(rate) = self.tier_bytes_per_second(model, device) {
            return rate;
        }
        let host = &self.hosts[device as usize / profile.devices_per_node];
        if self.scenario.host_bytes.is_none() || host.last_use.contains_key(&model) {
            profile.link.bytes_per_second
        } else {
            self.disk_bytes_per_second()
        }
    }

    /// Bytes per second of what comes from disk.
    fn disk_bytes_per_second(&self) -> f64 {
        let profile = &self.scenario.profile;
        profile.link.bytes_per_second.min(profile.disk_bytes_per_second)
    }

    /// Seconds until the device is free.
    fn wait(&self, device: u32) -> f64 {
        let until = self.devices[device as usize].running.map_or(0, |running| running.until);
        seconds(until.saturating_sub(self.now))
    }

    fn spent(&mut self, since: std::time::Instant) {
        self.totals.thinking += since.elapsed().as_nanos() as u64;
    }

    /// A moment `seconds` from now.
    fn after(&self, seconds: f64) -> Nanos {
        self.now + nanos(seconds)
    }
}

#[cfg(test)]
mod tests;
