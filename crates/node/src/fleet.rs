//! The workers of a node, one for each of its devices, and which of them a request goes to.
//!
//! Deployments are announced to all of them; a request goes to one, which policy chooses ([`Dispatch`]) from what the
//! workers publish and from what was sent to them. Never touches device memory and never waits for a worker that computes,
//! but where a deployment is announced, or its tensors get their own identities.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tangram_checkpoint::ContentId;
use tangram_policy::Dispatch;
use tangram_policy::dispatch::{Coming, Seen};

use crate::api::{DeployedModel, ModelStatus, NodeStatus, TensorProfile};
use crate::lock;
use crate::model::ModelPlan;
use crate::sequence::Sequence;
use crate::totals;
use crate::worker::{Command, MAX_BATCH, Published, Registration, Shared};

/// Bytes per second at which weights are taken to come from the disk before that was measured.
const DISK_RATE: f64 = 1e9;
/// The same from host memory.
const HOST_RATE: f64 = 1e10;

/// What is done when every worker has let a model go.
pub(crate) type Done = Box<dyn FnOnce() + Send>;

/// A worker, as far as others deal with it.
pub(crate) struct Member {
    pub(crate) commands: Sender<Command>,
    pub(crate) shared: Arc<Shared>,
    /// Its device, for people.
    pub(crate) name: String,
    /// Pages of its pool.
    pub(crate) pages: u64,
}

/// All workers of a node.
pub(crate) struct Fleet {
    members: Vec<Member>,
    page_bytes: u64,
    dispatch: Mutex<Dispatch>,
    /// Held from when the deployed models are listed until dispatch knows them, so that no older list comes last.
    listing: Mutex<()>,
    epoch: Instant,
}

/// Counts a sequence among those of its model on a device, for as long as it lives.
pub(crate) struct Ticket {
    sent: Arc<[AtomicUsize]>,
    device: usize,
}

impl Ticket {
    fn new(model: &DeployedModel, device: usize) -> Ticket {
        let ticket = Ticket { sent: model.sent.clone(), device };
        if let Some(sent) = ticket.sent.get(device) {
            sent.fetch_add(1, Ordering::AcqRel);
        }
        ticket
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if let Some(sent) = self.sent.get(self.device) {
            sent.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Fleet {
    /// Of these workers, at least one, whose pools have pages of `page_bytes` bytes.
    pub(crate) fn new(members: Vec<Member>, page_bytes: u64) -> Fleet {
        let dispatch = Mutex::new(Dispatch::new(members.len()));
        Fleet { members, page_bytes, dispatch, listing: Mutex::new(()), epoch: Instant::now() }
    }

    /// The worker of a device.
    pub(crate) fn member(&self, device: usize) -> &Member {
        &self.members[device]
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.members.len()
    }

    /// Bytes of a page of any pool.
    pub(crate) fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// Pages of the largest pool: what does not fit there can never run.
    pub(crate) fn most_pages(&self) -> u64 {
        self.members.iter().map(|member| member.pages).max().unwrap_or(0)
    }

    /// Bytes of the first device's pool, and of them those that cached prefixes take now.
    pub(crate) fn first_pool(&self) -> (u64, u64) {
        let pages = self.members.first().map_or(0, |member| member.pages);
        (pages * self.page_bytes, self.status_of(0).kv_cached_bytes)
    }

    /// Bytes of all pools.
    pub(crate) fn pool_bytes(&self) -> u64 {
        self.members.iter().map(|member| member.pages * self.page_bytes).sum()
    }

    fn tell_all(&self, mut command: impl FnMut() -> Command) {
        for member in &self.members {
            // A loop that has ended has nothing to do with it any more.
            let _ = member.commands.send(command());
        }
    }

    /// Announces a model to every worker; `base` is the base of an adapter.
    ///
    /// # Errors
    /// When a worker cannot take it up, for the user; then none has it.
    pub(crate) fn register(
        &self,
        deployed: &Arc<DeployedModel>,
        plan: &Arc<ModelPlan>,
        base: Option<&(Arc<DeployedModel>, Arc<ModelPlan>)>,
    ) -> Result<(), String> {
        let announce = |member: &Member| {
            let (answer, answered) = channel();
            let (deployed, plan) = (deployed.clone(), plan.clone());
            let model = Box::new(Registration { deployed, plan, base: base.cloned() });
            let sent = member.commands.send(Command::Register { model, answer });
            sent.is_ok().then_some(answered)
        };
        let answers: Vec<_> = self.members.iter().map(announce).collect();
        let outcome = |answer: Option<std::sync::mpsc::Receiver<_>>| {
            let ended = || Err("the engine loop has ended".to_owned());
            answer.and_then(|answer| answer.recv().ok()).unwrap_or_else(ended)
        };
        let outcomes: Vec<Result<(), String>> = answers.into_iter().map(outcome).collect();
        let failed = self.members.iter().zip(&outcomes).find_map(|(member, outcome)| match outcome {
            Ok(()) => None,
            Err(problem) if self.members.len() == 1 => Some(problem.clone()),
            Err(problem) => Some(format!("on {}: {problem}", member.name)),
        });
        let Some(problem) = failed else { return Ok(()) };
        for (member, _) in self.members.iter().zip(&outcomes).filter(|(_, outcome)| outcome.is_ok()) {
            let done = Box::new(|| ());
            let _ = member.commands.send(Command::Retire { model: deployed.index, done });
        }
        Err(problem)
    }

    /// For each worker something to call; when all have, `done` is called.
    fn after_all(&self, done: Done) -> impl FnMut() -> Done + use<> {
        let state = Arc::new(Mutex::new((self.members.len(), Some(done))));
        move || {
            let state = state.clone();
            Box::new(move || {
                let mut state = lock(&state);
                state.0 -= 1;
                let last = if state.0 == 0 { state.1.take() } else { None };
                drop(state);
                if let Some(done) = last {
                    done();
                }
            })
        }
    }

    /// Takes a model out of service everywhere; `done`, which must not block, runs when its last request has ended.
    pub(crate) fn retire(&self, model: usize, done: Done) {
        let mut done = self.after_all(done);
        self.tell_all(|| Command::Retire { model, done: done() });
    }

    /// As [`Fleet::retire`], for a model that will not come: its requests fail.
    pub(crate) fn withdraw(&self, model: usize, reason: &str, done: Done) {
        let mut done = self.after_all(done);
        self.tell_all(|| Command::Withdraw { model, reason: reason.to_owned(), done: done() });
    }

    /// Puts contents' own identities in the place of others, and returns when every worker has.
    pub(crate) fn identify(&self, pairs: &[(ContentId, ContentId)]) {
        let (answer, answered) = channel();
        self.tell_all(|| Command::Identify { pairs: pairs.to_vec(), answer: answer.clone() });
        drop(answer);
        // Until the last has answered, or has ended: then nothing is resident there.
        answered.iter().for_each(drop);
    }

    /// Something happened that any of them may wait for.
    pub(crate) fn wake(&self) {
        self.tell_all(|| Command::Wake);
    }

    /// The deployed models are others now; `list` gives them.
    pub(crate) fn set_models(&self, list: impl FnOnce() -> Vec<Arc<DeployedModel>>) {
        if self.members.len() > 1 {
            let _listing = lock(&self.listing);
            let models = list();
            let charged = charges(models.iter().map(|model| (model.index as u32, &model.tensors[..])));
            lock(&self.dispatch).set_models(charged);
        }
    }

    /// The device for a request of sequences with so many tokens each, the longest of which needs room for `longest`. `None`
    /// if that fits nowhere.
    pub(crate) fn choose(
        &self,
        model: &DeployedModel,
        prompts: impl Iterator<Item = usize>,
        longest: usize,
    ) -> Option<usize> {
        if self.members.len() == 1 {
            return Some(0);
        }
        let (sequences, tokens, prompt) =
            prompts.fold((0, 0, 0), |(count, sum, most), tokens| (count + 1, sum + tokens, most.max(tokens)));
        // The others are computed beside it or after it.
        let times = tokens as f64 / prompt.max(1) as f64;
        let forecast = model.forecast();
        let bytes_per_second = forecast.load_bytes_per_second().unwrap_or(DISK_RATE);
        let cold = forecast.first_token(prompt, forecast.bytes_by_stage());
        let seen: Vec<Seen> = (0..self.members.len())
            .map(|device| self.see(device, model, longest, bytes_per_second))
            .collect();
        let request = Coming {
            model: model.index as u32,
            sequences,
            compute_seconds: cold.map_or(0.0, |cold| cold.compute * times),
            hidden_seconds: cold.map_or(0.0, |cold| (cold.load - cold.stall).max(0.0)),
            bytes_per_second,
        };
        let mut dispatch = lock(&self.dispatch);
        let before = dispatch.home(request.model);
        let device = dispatch.send(&request, &seen, self.epoch.elapsed().as_secs_f64())?;
        // What the one before has of it is a second copy from now on. Told before the next is chosen, or it could be the
        // other way round when the messages come.
        for (other, elsewhere) in before
            .filter(|&before| before != device)
            .into_iter()
            .flat_map(|before| [(before, true), (device, false)])
        {
            let _ = self.members[other].commands.send(Command::Elsewhere { model: model.index, elsewhere });
        }
        Some(device)
    }

    /// Longest sequence of a model in tokens that a device can run.
    pub(crate) fn context(&self, device: usize, model: &DeployedModel) -> usize {
        let footprint = model.forecast().footprint();
        footprint.context(model.spec.context as u64, self.members[device].pages) as usize
    }

    /// Sends a sequence that waits for a lost device to another; gives it back if there is none that works and has room.
    pub(crate) fn hand_over(
        &self,
        model: &DeployedModel,
        mut sequence: Box<Sequence>,
    ) -> Result<(), Box<Sequence>> {
        let tokens = sequence.tokens.len();
        let longest = tokens + sequence.left();
        let works = |device: usize| !self.members[device].shared.lost.load(Ordering::Acquire);
        // Asked first: what is chosen is written down as sent.
        let is_place = |device| works(device) && self.context(device, model) >= longest;
        if !(0..self.members.len()).any(is_place) {
            return Err(sequence);
        }
        let device = self.choose(model, std::iter::once(tokens), longest);
        let Some(device) = device.filter(|&device| works(device)) else { return Err(sequence) };
        sequence.swapped = None;
        // Where a loop has ended all will, and clients see that.
        let _ = self.send(device, model, sequence);
        Ok(())
    }

    /// What is known of a device just now, for a request of a model.
    fn see(&self, device: usize, model: &DeployedModel, longest: usize, bytes_per_second: f64) -> Seen {
        let Member { shared, pages, .. } = &self.members[device];
        let (free_bytes, published, started, at, resident, hosted, host_rate) = {
            let status = lock(&shared.status);
            let found = status.models.binary_search_by(|other| other.name.as_str().cmp(&model.name));
            let found = found.ok().and_then(|place| status.models.get(place));
            let (resident, hosted) = found.map_or((0, 0), |found| (found.resident_bytes, found.hosted_bytes));
            let Published { node, at, started, host_bytes_per_second, .. } = &*status;
            (node.free_bytes, node.waiting, *started, *at, resident, hosted, *host_bytes_per_second)
        };
        let missing = model.weight_bytes.saturating_sub(resident);
        let hosted = hosted.min(missing);
        let from_disk = (missing - hosted) as f64 / bytes_per_second;
        let sent = model.sent.get(device).map_or(0, |sent| sent.load(Ordering::Acquire));
        // The status is of the loop's last turn: some of those that waited then may have gone since.
        let waiting = published.min(shared.waiting.load(Ordering::Acquire));
        let in_flight = shared.in_flight.load(Ordering::Acquire);
        Seen {
            usable: !shared.lost.load(Ordering::Acquire),
            fits: self.context(device, model) >= longest,
            pool_bytes: pages * self.page_bytes,
            free_bytes,
            in_flight,
            waiting: waiting.max(sent.saturating_sub(MAX_BATCH)),
            unstarted: in_flight.saturating_sub(started),
            as_of: at.map_or(0.0, |at| at.saturating_duration_since(self.epoch).as_secs_f64()),
            load_seconds: from_disk + hosted as f64 / host_rate.unwrap_or(HOST_RATE),
        }
    }

    /// Sends a sequence to a device; `false` if the loop there has ended, and with it the sequence.
    pub(crate) fn send(&self, device: usize, model: &DeployedModel, mut sequence: Box<Sequence>) -> bool {
        let Member { commands, shared, .. } = &self.members[device];
        shared.waiting.fetch_add(1, Ordering::AcqRel);
        shared.in_flight.fetch_add(1, Ordering::AcqRel);
        sequence.ticket = Some(Ticket::new(model, device));
        let sent = commands.send(Command::Submit(sequence)).is_ok();
        if !sent {
            shared.waiting.fetch_sub(1, Ordering::AcqRel);
            shared.in_flight.fetch_sub(1, Ordering::AcqRel);
        }
        sent
    }

    fn sum(&self, count: fn(&Shared) -> &AtomicUsize) -> usize {
        self.members.iter().map(|member| count(&member.shared).load(Ordering::Acquire)).sum()
    }

    /// Sequences submitted and not admitted yet.
    pub(crate) fn waiting(&self) -> usize {
        self.sum(|shared| &shared.waiting)
    }

    /// Sequences submitted and not ended yet.
    pub(crate) fn in_flight(&self) -> usize {
        self.sum(|shared| &shared.in_flight)
    }

    /// What is published of one device.
    fn status_of(&self, device: usize) -> NodeStatus {
        lock(&self.members[device].shared.status).node.clone()
    }

    /// What is published of all devices together.
    pub(crate) fn status(&self) -> NodeStatus {
        let each = self.members.iter().enumerate().map(|(device, member)| {
            let lost = member.shared.lost.load(Ordering::Acquire);
            (member.name.as_str(), lost, self.status_of(device))
        });
        totals::node(each.collect())
    }

    /// What is published of the models, by name.
    pub(crate) fn list(&self) -> Vec<ModelStatus> {
        let each = self.members.iter().map(|member| lock(&member.shared.status).models.clone());
        totals::models(each.collect())
    }

    /// Ends the loops.
    pub(crate) fn stop(&self) {
        self.tell_all(|| Command::Stop);
    }
}

/// What each model is charged with, bytes: of a tensor that several have an equal part each. A model has no tensor twice.
fn charges<'a>(models: impl Iterator<Item = (u32, &'a [TensorProfile])> + Clone) -> Vec<(u32, f64)> {
    let mut owners: HashMap<&str, f64> = HashMap::new();
    for tensor in models.clone().flat_map(|(_, tensors)| tensors) {
        *owners.entry(&tensor.content).or_default() += 1.0;
    }
    let part = |tensor: &TensorProfile| {
        tensor.bytes as f64 / owners.get(tensor.content.as_str()).copied().unwrap_or(1.0)
    };
    models.map(|(model, tensors)| (model, tensors.iter().map(part).sum())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shared_is_charged_once() {
        let tensor = |content: &str, bytes| TensorProfile { content: content.to_owned(), bytes, stage: 0 };
        let base = [tensor("x", 60), tensor("y", 30)];
        let adapters = ["p", "q"].map(|own| [tensor("x", 60), tensor("y", 30), tensor(own, 5)]);
        let models = [&base[..], &adapters[0], &adapters[1], &[]];
        let charged = charges((7..).zip(models));
        assert_eq!(charged, [(7, 30.0), (8, 35.0), (9, 35.0), (10, 0.0)]);
    }
}
