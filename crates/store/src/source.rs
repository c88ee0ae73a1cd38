//! One disk: its queue, and the thread (or threads) that read for it.
//!
//! With io_uring one thread keeps as many reads under way as the disk was measured to need; where that is refused a few
//! threads read one part each. What the page cache has is not read but handed on to be copied. Each disk has threads of its
//! own, so a slow one holds up nobody else's; and none of these threads copies or hashes.

use std::collections::VecDeque;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::buffer::Buffer;
use crate::control::{Control, Meter};
use crate::job::{Arrival, Job};
use crate::landing::Landings;
use crate::plan::{self, Place, Plan};
use crate::probe::{Measured, Tuning};
use crate::reuse::{self, Reuse};
use crate::ring::{Bell, Ring};
use crate::schedule::{LoadId, Schedule, Urgency};

/// Buffers that are kept to be used again.
const MOST_SPARE: usize = 32;

/// Threads that read for a disk without io_uring.
const READERS: usize = 4;

/// Sizes of buffers are multiples of this, but of those for torn blocks: any of them then suits the next chunk.
const BUFFER_STEP: usize = 2 << 20;
/// Buffers below are for torn blocks.
const LEAST_ROUNDED: usize = 64 << 10;

/// How a disk is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    /// By io_uring where it is allowed, else by threads.
    Best,
    /// By threads.
    #[cfg_attr(not(test), allow(dead_code))]
    Threads,
}

struct State {
    schedule: Schedule<Job>,
    control: Control,
    /// What the control has found better than what it was told.
    corrected: Option<Measured>,
    /// Jobs that are being copied or verified.
    landing: usize,
    reuse: Reuse,
    /// Buffers to use again.
    spare: Vec<Buffer>,
    closed: bool,
}

/// A disk.
pub(crate) struct Source {
    state: Mutex<State>,
    changed: Condvar,
    bell: Option<Arc<Bell>>,
    /// Jobs that may be copied or verified at a time: enough to keep everybody busy, few enough that a more urgent load
    /// does not wait behind them.
    most_landing: usize,
}

impl Source {
    /// A disk with threads that read.
    ///
    /// # Errors
    /// When no thread can be started.
    pub(crate) fn start(
        tuning: Tuning,
        engine: Engine,
        landings: &Arc<Landings>,
        name: &str,
    ) -> io::Result<Arc<Source>> {
        let ring = match engine {
            Engine::Best => {
                Bell::new().map(Arc::new).and_then(|bell| Ok((Ring::new(bell.clone())?, bell))).ok()
            }
            Engine::Threads => None,
        };
        let (ring, bell) = ring.unzip();
        let state = State {
            schedule: Schedule::default(),
            control: Control::new(tuning),
            corrected: None,
            landing: 0,
            reuse: Reuse::new(reuse::budget()),
            spare: Vec::new(),
            closed: false,
        };
        let source = Arc::new(Source {
            state: Mutex::new(state),
            changed: Condvar::new(),
            bell,
            most_landing: 4 * landings.workers().max(1),
        });
        let spawn = |body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.to_owned()).spawn(body).map(drop)
        };
        match ring {
            Some(ring) => {
                let (source, landings) = (source.clone(), landings.clone());
                spawn(Box::new(move || source.read_by_ring(ring, &landings)))?;
            }
            None => {
                for started in 0..READERS {
                    let (source, landings) = (source.clone(), landings.clone());
                    let spawned = spawn(Box::new(move || source.read_one_by_one(&landings)));
                    if started == 0 {
                        spawned?;
                    }
                }
            }
        }
        Ok(source)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self) {
        match &self.bell {
            Some(bell) => bell.ring(),
            None => self.changed.notify_all(),
        }
    }

    /// Adds a load's parts.
    pub(crate) fn push(&self, load: LoadId, urgency: Urgency, jobs: VecDeque<Job>) {
        self.lock().schedule.push(load, urgency, jobs);
        self.notify();
    }

    /// Makes what is left of a load urgent.
    pub(crate) fn hasten(&self, load: LoadId) {
        self.lock().schedule.hasten(load);
    }

    /// How it is read from now on, until something better is found.
    pub(crate) fn tune(&self, tuning: Tuning) {
        let mut state = self.lock();
        state.control = Control::new(tuning);
        state.corrected = None;
    }

    /// What was found better since it was told how to read.
    pub(crate) fn corrected(&self) -> Option<Measured> {
        self.lock().corrected
    }

    /// A job has landed, and left a buffer; `found` is what the page cache had.
    pub(crate) fn landed(&self, buffer: Option<Buffer>, found: Option<(reuse::Key, u64)>) {
        let mut state = self.lock();
        state.landing -= 1;
        if let Some((key, len)) = found {
            state.reuse.found(key, len);
        }
        if let Some(buffer) = buffer {
            // As much as is under way, and being decoded, at a time.
            let Tuning { block, depth } = state.control.tuning();
            let kept: usize = state.spare.iter().map(Buffer::len).sum();
            if kept + buffer.len() <= 2 * block * depth && state.spare.len() < MOST_SPARE {
                state.spare.push(buffer);
            }
        }
        drop(state);
        self.notify();
    }

    /// A job that was to be copied has to be read.
    pub(crate) fn put_back(&self, mut job: Job) {
        // What waits must not keep others from being read.
        job.part.unstage();
        let (load, urgency) = (job.load, job.urgency);
        self.lock().schedule.put_back(load, urgency, job);
        self.notify();
    }

    /// Gives up everything that waits; the threads end with what is under way.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let jobs = state.schedule.drain();
        drop(state);
        drop(jobs);
        self.notify();
    }

    /// The next job, if there is one and room for what becomes of it.
    fn take(&self, state: &mut State) -> Option<Job> {
        if state.landing >= self.most_landing {
            return None;
        }
        let (_, urgency, mut job) = state.schedule.next()?;
        job.urgency = urgency;
        Some(job)
    }

    /// Hands a job over to be copied or verified.
    fn land(self: &Arc<Self>, job: Job, arrival: Arrival, landings: &Arc<Landings>) {
        self.lock().landing += 1;
        landings.push(job, arrival, self.clone());
    }

    /// Decides how a job's bytes come. Waits for a place to put them only if it `may_wait`: if no other job of this
    /// thread holds one.
    fn begin(self: &Arc<Self>, mut job: Job, may_wait: bool, landings: &Arc<Landings>) -> Begun {
        if job.part.is_unwanted() {
            job.abandon();
            return Begun::Over;
        }
        let skew = job.offset as usize;
        let staged = if may_wait { job.part.stage(skew).map(|()| true) } else { job.part.try_stage(skew) };
        match staged {
            Ok(true) => {}
            Ok(false) => return Begun::NoRoom(job),
            Err(error) => {
                let _ = job.finish(Err(error.to_string()));
                return Begun::Over;
            }
        }
        let Some(address) = job.part.bytes_mut().map(|bytes| bytes.as_ptr() as usize) else {
            let _ = job.finish(Err("it has no place in memory".to_owned()));
            return Begun::Over;
        };
        if !job.uncached && job.file.may_be_cached(job.offset, job.len) {
            if job.frame.is_some() {
                job.buffer = self.buffer(job.len);
            }
            self.land(job, Arrival::Cached, landings);
            return Begun::Over;
        }
        let (offset, len) = (job.offset, job.len);
        let mut direct = false;
        let mut state = self.lock();
        let block = state.control.tuning().block;
        let cached = state.reuse.read((job.file.identity(), offset), len as u64);
        drop(state);
        let (file, plan) = match job.file.direct() {
            Some((file, alignment)) if !cached => {
                direct = true;
                let block = block.next_multiple_of(alignment.offset);
                let plan = match job.frame {
                    Some(_) => plan::whole(offset, len, alignment.offset, block),
                    None => plan::direct(offset, len, address, alignment, block),
                };
                (file.clone(), plan)
            }
            _ if job.frame.is_some() => (job.file.cached().clone(), plan::whole(offset, len, 1, block)),
            _ => (job.file.cached().clone(), plan::buffered(offset, len, block)),
        };
        let Plan { pieces, buffer, copies } = plan;
        // One that it has had from an earlier attempt goes first: none is lost.
        self.lock().spare.extend(job.buffer.take());
        job.buffer = self.buffer(buffer);
        job.copies = copies;
        Begun::Reads(job, Reads { file, pieces, direct })
    }

    /// A buffer of at least so many bytes, if any are wanted.
    fn buffer(&self, bytes: usize) -> Option<Buffer> {
        if bytes == 0 {
            return None;
        }
        let mut state = self.lock();
        let fits = state.spare.iter().position(|spare| spare.len() >= bytes);
        let spare = fits.map(|at| state.spare.swap_remove(at));
        drop(state);
        let rounded = if bytes < LEAST_ROUNDED { bytes } else { bytes.next_multiple_of(BUFFER_STEP) };
        spare.or_else(|| Some(Buffer::new(rounded)))
    }

    /// Deals with the end of a job's reads. Gives it back if it has to be read another way.
    fn end(self: &Arc<Self>, mut job: Job, result: io::Result<()>, landings: &Arc<Landings>) -> Option<Job> {
        let refused = result
            .as_ref()
            .is_err_and(|error| [Some(libc::EINVAL), Some(libc::EOPNOTSUPP)].contains(&error.raw_os_error()));
        if refused && job.file.direct().is_some() {
            job.file.refuse_direct();
            job.copies.clear();
            return Some(job);
        }
        self.land(job, Arrival::Read(result), landings);
        None
    }

    fn read_by_ring(self: Arc<Self>, mut ring: Ring<Job>, landings: &Arc<Landings>) {
        let (mut again, mut meter) = (Vec::new(), Meter::default());
        loop {
            let mut busy = true;
            loop {
                let mut state = self.lock();
                let depth = state.control.tuning().depth;
                if ring.operations() >= state.schedule.most_under_way(depth) {
                    busy &= ring.operations() >= depth;
                    break;
                }
                let Some(job) = again.pop().or_else(|| self.take(&mut state)) else {
                    busy = false;
                    break;
                };
                drop(state);
                match self.begin(job, ring.operations() == 0 && again.is_empty(), landings) {
                    Begun::Reads(job, Reads { file, pieces, direct }) => {
                        // What goes through the page cache says little of the disk.
                        busy &= direct;
                        ring.start(job, file, pieces);
                    }
                    Begun::Over => {}
                    Begun::NoRoom(job) => {
                        // Those that have a place go first, so that it becomes free.
                        again.insert(0, job);
                        busy = false;
                        break;
                    }
                }
            }
            if self.lock().closed {
                return;
            }
            if !busy {
                meter.interrupted();
                self.lock().control.interrupted();
            }
            for (job, result) in ring.wait() {
                if let Some(rate) = meter.read(job.len as u64, Instant::now()) {
                    self.window(rate);
                }
                again.extend(self.end(job, result, landings));
            }
        }
    }

    /// The disk was kept busy for a window and gave so many bytes per second.
    fn window(&self, rate: f64) {
        let mut state = self.lock();
        let found = state.control.window(rate);
        state.corrected = found.or(state.corrected);
    }

    fn read_one_by_one(self: Arc<Self>, landings: &Arc<Landings>) {
        loop {
            let mut state = self.lock();
            let job = loop {
                if state.closed {
                    return;
                }
                if let Some(job) = self.take(&mut state) {
                    break job;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            let mut next = Some(job);
            while let Some(job) = next.take() {
                if let Begun::Reads(mut job, reads) = self.begin(job, true, landings) {
                    let result = reads.carry_out(&mut job);
                    next = self.end(job, result, landings);
                }
            }
        }
    }
}

/// What becomes of a job.
enum Begun {
    /// This has to be read for it.
    Reads(Job, Reads),
    /// Nothing is left to be read.
    Over,
    /// There is no place for its bytes now.
    NoRoom(Job),
}

/// What has to be read for a job.
struct Reads {
    file: Arc<std::fs::File>,
    pieces: Vec<plan::Piece>,
    /// Past the page cache.
    direct: bool,
}

impl Reads {
    /// Reads it on this thread.
    fn carry_out(self, job: &mut Job) -> io::Result<()> {
        let short = || io::Error::from(io::ErrorKind::UnexpectedEof);
        for piece in self.pieces {
            let memory = match piece.place {
                Place::Part => job.part.bytes_mut(),
                Place::Buffer => job.buffer.as_mut().map(Buffer::bytes),
            };
            let memory = memory.and_then(|memory| memory.get_mut(piece.at)).ok_or_else(short)?;
            let mut done = 0;
            while done < piece.needed {
                match self.file.read_at(&mut memory[done..], piece.offset + done as u64) {
                    Ok(0) => return Err(short()),
                    Ok(read) if done + read < piece.needed && !read.is_multiple_of(512) => {
                        return Err(short());
                    }
                    Ok(read) => done += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}
