//! The engine loop: one thread that admits, steps and ends sequences, and the only one that changes the pool.
//!
//! Decisions are the policy crate's: who may start (`Admission`), what a step computes (`compose`), what is evicted
//! (`Retention`). These files carry them out. It never waits for a load: a forward pass whose next layer has not
//! arrived is set aside while other models run, and taken up again where it stopped.

mod adapters;
mod admit;
mod end;
mod mend;
mod prefetch;
mod status;
mod step;
mod worth;

pub(crate) use admit::MAX_BATCH;
pub(crate) use step::step_tokens;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tangram_checkpoint::ContentId;
use tangram_engine::{DeviceExecutor, DevicePass, HostBuffer};
use tangram_policy::{Admission, Expectations, PrefixUse, Share, TensorKey};
use tangram_pool::{KvKey, Lease, Pool};
use tangram_store::{LoadId, Store, Wake};

use self::adapters::ActiveAdapter;
use self::mend::Outage;
use self::step::Progress;
use self::worth::Prompts;
use crate::api::{DeployedModel, ModelStatus, NodeStatus, RequestError};
use crate::arrival::Waiting;
use crate::device::{Opened, Setup};
use crate::disks::Disks;
use crate::fleet::{Fleet, Member};
use crate::forecast::LoadMeter;
use crate::model::ModelPlan;
use crate::observe::Observer;
use crate::sequence::Sequence;
use crate::swap::HostMemory;

/// How long the loop sleeps at most when nothing can go on; every event that matters wakes it before.
const IDLE_WAIT: Duration = Duration::from_millis(500);

/// How long a busy loop goes on with what was expected before. Telling the pool takes a step for every tensor of the
/// models concerned.
const TELLING_INTERVAL: Duration = Duration::from_millis(20);

/// What the loop is told.
pub(crate) enum Command {
    /// A new sequence.
    Submit(Box<Sequence>),
    /// A model is deployed under this key. The answer says why it could not be taken up.
    Register { model: Box<Registration>, answer: Sender<Result<(), String>> },
    /// A model is no longer deployed. It goes when its last sequence has ended; then `done` runs, which must not block.
    Retire { model: usize, done: Box<dyn FnOnce() + Send> },
    /// Another device has been sent requests for a model since this one was, or no longer.
    Elsewhere { model: usize, elsewhere: bool },
    /// Contents that were registered under identities that stood for their own, and their own.
    Identify { pairs: Vec<(ContentId, ContentId)>, answer: Sender<()> },
    /// A model that was still arriving will not come: its requests fail, then it goes as by `Retire`.
    Withdraw { model: usize, reason: String, done: Box<dyn FnOnce() + Send> },
    /// Something happened elsewhere: a tensor arrived, a client went away.
    Wake,
    /// End the loop; running sequences fail.
    Stop,
}

/// A model for the loop to take up.
pub(crate) struct Registration {
    pub(crate) deployed: Arc<DeployedModel>,
    /// What is the same for every worker.
    pub(crate) plan: Arc<ModelPlan>,
    /// The base of an adapter, for the case that no deployed model is it.
    pub(crate) base: Option<(Arc<DeployedModel>, Arc<ModelPlan>)>,
}

/// The loop's figures.
#[derive(Default)]
pub(crate) struct Published {
    pub(crate) node: NodeStatus,
    /// By name.
    pub(crate) models: Vec<ModelStatus>,
    /// Sequences that have a first result.
    pub(crate) started: usize,
    /// When that was.
    pub(crate) at: Option<Instant>,
    /// Rate at which weights come from host memory, once that was seen.
    pub(crate) host_bytes_per_second: Option<f64>,
}

/// What the loop publishes for everybody else.
#[derive(Default)]
pub(crate) struct Shared {
    pub(crate) status: Mutex<Published>,
    /// Whether there is no device just now.
    pub(crate) lost: AtomicBool,
    /// Sequences submitted and not admitted yet.
    pub(crate) waiting: AtomicUsize,
    /// Sequences submitted and not ended yet.
    pub(crate) in_flight: AtomicUsize,
}

struct ModelEntry {
    deployed: Arc<DeployedModel>,
    plan: Arc<ModelPlan>,
    keys: Vec<TensorKey>,
    kv: Option<KvKey>,
    prefixes: PrefixUse,
    prompts: Prompts,
    active: Option<Active>,
    waiting: usize,
    /// Its sequences that run, in whichever batch.
    running: usize,
    /// Of an adapter: the model in whose batch its sequences start.
    base: Option<usize>,
    /// Adapters whose sequences start in this model's batch. While there are any, the model stays although it is no
    /// longer deployed.
    adapters: usize,
    retire: Option<Box<dyn FnOnce() + Send>>,
}

/// A model with running sequences: its lease, and the step under way.
struct Active {
    lease: Lease,
    /// Leading tensors known to have arrived. When it reaches all of them, nothing is checked any more.
    arrived: usize,
    /// When the last tensor was there.
    complete: Option<Instant>,
    sequences: Vec<Sequence>,
    /// Adapters that some of the sequences have.
    adapters: Vec<ActiveAdapter>,
    step: Option<Step>,
    meter: LoadMeter,
}

/// A forward pass under way and whose tokens it computes; `shares[i].sequence` indexes `Active::sequences`.
struct Step {
    pass: DevicePass,
    shares: Vec<Share>,
    /// Keys of the adapters of the pass, in its numbering.
    adapters: Vec<usize>,
    /// Rows of the token embedding that the first stage waits for.
    rows: Option<AwaitedRows>,
    /// Time computed so far.
    spent: Duration,
    /// Whether all weights were there from its beginning, so that its time is that of computing alone.
    undisturbed: bool,
}

/// Rows of a token embedding that are being read.
struct AwaitedRows {
    rows: Receiver<io::Result<HostBuffer>>,
    /// Whether they come from where the embedding was verified.
    verified: bool,
}

/// The loop's state.
pub(crate) struct Worker {
    commands: Receiver<Command>,
    shared: Arc<Shared>,
    /// This worker and those of the node's other devices.
    fleet: Arc<Fleet>,
    executor: DeviceExecutor,
    pool: Pool,
    setup: Setup,
    disks: Arc<Disks>,
    /// While there is no device.
    outage: Option<Outage>,
    /// Times that a lost device was set up anew.
    rebuilds: u64,
    host: HostMemory,
    store: Arc<Store>,
    models: Vec<Option<ModelEntry>>,
    queue: Admission<Box<Sequence>>,
    expectations: Expectations,
    /// Models whose prompts have changed so much that their tensors have to be appraised anew.
    unappraised: Vec<usize>,
    /// Loads of tensors that are not on this disk yet.
    waiting: Vec<Waiting>,
    /// What is being brought in before anybody asks for it.
    prefetching: Option<(Lease, LoadId)>,
    /// For every catalogued tensor a model that has it, and its place among the model's tensors.
    located: HashMap<TensorKey, (usize, usize)>,
    epoch: Instant,
    wake: Wake,
    wake_pending: Arc<AtomicBool>,
    preemptions: u64,
    swaps: u64,
    activations: u64,
    cached_tokens: u64,
    /// Of executors before this one.
    replays: u64,
    rows_copied: u64,
    published: Instant,
    told: Instant,
    stopping: bool,
    observer: Option<Arc<dyn Observer>>,
}

impl Worker {
    pub(crate) fn new(
        setup: Setup,
        Opened { pool, executor, store, host }: Opened,
        disks: Arc<Disks>,
        commands: Receiver<Command>,
        fleet: Arc<Fleet>,
    ) -> Worker {
        let Member { commands: wake_sender, shared, .. } = fleet.member(setup.place);
        let (wake_sender, shared) = (wake_sender.clone(), shared.clone());
        let wake_pending = Arc::new(AtomicBool::new(false));
        let pending = wake_pending.clone();
        let wake: Wake = Arc::new(move || {
            // One wake in the channel is enough, however many tensors arrive before it is read.
            if !pending.swap(true, Ordering::AcqRel) {
                let _ = wake_sender.send(Command::Wake);
            }
        });
        let now = Instant::now();
        let mut worker = Worker {
            commands,
            shared,
            fleet,
            executor,
            pool,
            setup,
            disks,
            outage: None,
            rebuilds: 0,
            host,
            store,
            models: Vec::new(),
            queue: Admission::default(),
            expectations: Expectations::new(),
            unappraised: Vec::new(),
            waiting: Vec::new(),
            prefetching: None,
            located: HashMap::new(),
            epoch: now,
            wake,
            wake_pending,
            preemptions: 0,
            swaps: 0,
            activations: 0,
            cached_tokens: 0,
            replays: 0,
            rows_copied: 0,
            published: now,
            told: now,
            stopping: false,
            observer: None,
        };
        worker.publish(true);
        worker
    }

    /// Tells `observer`, if there is one, what is computed when.
    pub(crate) fn observed_by(self, observer: Option<Arc<dyn Observer>>) -> Worker {
        Worker { observer, ..self }
    }

    /// Runs until told to stop.
    pub(crate) fn run(mut self) {
        while !self.stopping {
            self.read_commands();
            self.drop_cancelled();
            if !self.has_device() {
                self.publish(true);
                let now = Instant::now();
                let retry = self.outage.as_ref().map(|outage| outage.retry.saturating_duration_since(now));
                self.wait(retry.unwrap_or_default().min(IDLE_WAIT));
                continue;
            }
            self.start_arrived();
            self.admit();
            let mut advanced = false;
            for model in 0..self.models.len() {
                if self.models[model].as_ref().is_some_and(|entry| entry.active.is_some()) {
                    advanced |= matches!(self.step(model), Progress::Advanced);
                }
            }
            self.keep_headroom();
            if !advanced || self.told.elapsed() >= TELLING_INTERVAL {
                self.told = Instant::now();
                self.tell_worth();
            }
            if !advanced {
                self.pool.settle();
                self.prefetch();
            }
            self.publish(!advanced);
            if !advanced && !self.stopping {
                self.wait(IDLE_WAIT);
            }
        }
        self.end_prefetch();
        self.fail_everything();
        self.publish(true);
    }

    fn read_commands(&mut self) {
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.handle(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.stopping = true;
                    return;
                }
            }
        }
    }

    fn wait(&mut self, at_most: Duration) {
        match self.commands.recv_timeout(at_most) {
            Ok(command) => self.handle(command),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.stopping = true,
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit(mut sequence) => match self.models.get_mut(sequence.model) {
                Some(Some(entry)) => {
                    entry.waiting += 1;
                    sequence.adapter = entry.plan.adapter.as_ref().map(|_| entry.plan.identity);
                    self.queue.push(sequence);
                }
                _ => {
                    self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
                    self.end(*sequence, |sequence| {
                        sequence.fail(RequestError::UnknownModel("(removed)".to_owned()));
                    });
                }
            },
            Command::Register { model, answer } => {
                let registered = self.register(*model);
                // Whoever waits for the answer then finds the model in the status.
                self.publish(true);
                let _ = answer.send(registered);
            }
            Command::Retire { model, done } => {
                match self.models.get_mut(model) {
                    Some(Some(entry)) => entry.retire = Some(done),
                    _ => done(),
                }
                self.bind_adapters();
                self.retire_if_over(model);
            }
            Command::Elsewhere { model, elsewhere } => {
                self.expectations.set_elsewhere(model as u32, elsewhere);
            }
            Command::Identify { pairs, answer } => {
                self.pool.identify(&pairs);
                let _ = answer.send(());
            }
            Command::Withdraw { model, reason, done } => {
                self.withdraw(model, &reason);
                self.handle(Command::Retire { model, done });
            }
            Command::Wake => {
                // A swap and no store: whoever found the flag set before this has its arrival seen after it.
                self.wake_pending.swap(false, Ordering::AcqRel);
            }
            Command::Stop => self.stopping = true,
        }
    }

    fn register(&mut self, registration: Registration) -> Result<(), String> {
        let Registration { deployed, plan, base } = registration;
        let is_there = |base: &ModelPlan| {
            let entries = &mut self.models.iter().flatten();
            entries.any(|entry| entry.plan.adapter.is_none() && entry.plan.identity == base.identity)
        };
        if let Some((deployed, plan)) = base
            && !is_there(&plan)
        {
            // Not deployed, so it goes with its last adapter.
            self.enter(deployed, plan, Some(Box::new(|| ())))?;
        }
        let entered = self.enter(deployed, plan, None);
        self.bind_adapters();
        entered
    }

    fn enter(
        &mut self,
        deployed: Arc<DeployedModel>,
        plan: Arc<ModelPlan>,
        retire: Option<Box<dyn FnOnce() + Send>>,
    ) -> Result<(), String> {
        let (keys, kv) = self.catalogue(&plan)?;
        let index = deployed.index;
        if self.models.len() <= index {
            self.models.resize_with(index + 1, || None);
        }
        self.located.extend(keys.iter().zip(0..).map(|(&key, place)| (key, (index, place))));
        self.models[index] = Some(ModelEntry {
            deployed,
            plan,
            keys,
            kv,
            prefixes: PrefixUse::default(),
            prompts: Prompts::default(),
            active: None,
            waiting: 0,
            running: 0,
            base: None,
            adapters: 0,
            retire,
        });
        Ok(())
    }

    /// Makes a model's tensors and KV known to the pool, and the executor ready for its passes.
    fn catalogue(&mut self, plan: &ModelPlan) -> Result<(Vec<TensorKey>, Option<KvKey>), String> {
        let pages = self.pool.memory().page_count() as u64;
        let tokens = plan.forecast.footprint().tokens_beside(pages).unwrap_or(0);
        let adapter = plan.adapter.as_ref().map(|adapter| &adapter.engine);
        self.executor
            .prepare(
                &plan.engine,
                adapter,
                (MAX_BATCH, self.step_tokens()),
                usize::try_from(tokens).unwrap_or(usize::MAX),
            )
            .map_err(|error| error.to_string())?;
        let sizes: HashMap<&str, u64> =
            plan.data_bytes.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
        let keys = self
            .pool
            .catalogue(&plan.entries, |checkpoint| sizes.get(checkpoint).copied().unwrap_or(0))
            .map_err(|error| error.to_string())?;
        let kv = match plan.engine.kv() {
            // An adapter's sequences have their KV among the base's.
            _ if plan.adapter.is_some() => None,
            None => None,
            Some(layout) => match self.pool.add_kv(plan.identity, layout.block_bytes) {
                Ok(kv) => Some(kv),
                Err(error) => {
                    self.pool.forget(&keys);
                    return Err(error.to_string());
                }
            },
        };
        Ok((keys, kv))
    }

    fn retire_if_over(&mut self, model: usize) {
        let over = |entry: &ModelEntry| {
            let used = entry.active.is_some() || entry.waiting + entry.running + entry.adapters > 0;
            entry.retire.is_some() && !used
        };
        if self.models.get(model).and_then(Option::as_ref).is_some_and(over)
            && let Some(entry) = self.models[model].take()
        {
            self.end_prefetch();
            self.expectations.forget(model as u32);
            self.pool.forget(&entry.keys);
            self.located.retain(|_, &mut (at, _)| at != model);
            let others = self.models.iter().enumerate();
            for (at, entry) in others.filter_map(|(at, entry)| Some((at, entry.as_ref()?))) {
                for (&key, place) in entry.keys.iter().zip(0..) {
                    self.located.entry(key).or_insert((at, place));
                }
            }
            if let Some(kv) = entry.kv {
                self.pool.remove_kv(kv);
            }
            self.executor.forget(&entry.plan.engine);
            if let Some(done) = entry.retire {
                done();
            }
            if entry.plan.adapter.is_some() {
                self.bind_adapters();
            }
        }
    }

    /// Counts a sequence out and tells its client.
    fn end(&mut self, sequence: Sequence, tell: impl FnOnce(Sequence)) {
        debug_assert!(sequence.blocks() == 0, "KV goes back to the pool before its sequence ends");
        self.shared.in_flight.fetch_sub(1, Ordering::AcqRel);
        let model = sequence.model;
        tell(sequence);
        self.retire_if_over(model);
    }
}
