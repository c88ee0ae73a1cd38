//! Fork-join on a fixed set of threads that spin for a moment between jobs and then sleep.
//!
//! The caller works too, and a job never waits for a worker that has not begun it: on a busy machine a sleeping or
//! preempted worker simply misses the job. Which thread runs a task must never change its result.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::kernels::Buffer;

/// Turns of the spin loop before a thread sleeps: some microseconds, longer than the serial code between two
/// parallel phases of a decode step, shorter than what another process would miss.
const SPINS: u32 = 300;

/// Vector operations below which waking other threads costs more than they save.
const WORTH_SHARING: usize = 8192;

/// What tasks run: task number and the worker's scratch memory (contents arbitrary).
type Body<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// Low bits of [`Shared::state`]: workers inside the job.
const INSIDE: u64 = 0xffff;
/// Workers may enter.
const OPEN: u64 = 1 << 16;
/// One job further; the bits above are the job number.
const NEXT_JOB: u64 = 1 << 17;

/// A pool of worker threads.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held while a job runs: one job at a time.
    running: Mutex<()>,
}

struct Shared {
    /// Job number, whether it is open, and how many workers are inside. A job's fields may change only while it is
    /// closed with nobody inside.
    state: AtomicU64,
    /// The next task to be taken.
    next: AtomicUsize,
    job: UnsafeCell<Job>,
    /// One per thread, the caller's first.
    scratch: Box<[UnsafeCell<Buffer>]>,
    /// Which workers sleep.
    parked: Box<[AtomicBool]>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// The caller sleeps here until the last worker has left.
    left: Mutex<()>,
    all_left: Condvar,
    stop: AtomicBool,
}

struct Job {
    body: *const Body<'static>,
    tasks: usize,
    scratch: usize,
}

// SAFETY: `job` and `scratch` are written only under the protocol of `state` described there; the scratch buffer of a
// thread is touched only by that thread while a job is open.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `job` is only used while the caller of `run` keeps its target alive.
unsafe impl Send for Shared {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool of `threads` threads including the caller of [`Pool::run`]. Where the system refuses a thread, the pool
    /// is smaller.
    pub fn new(threads: usize) -> Pool {
        let threads = threads.clamp(1, INSIDE as usize);
        fn idle(_: usize, _: &mut [f32]) {}
        let body: &'static Body<'static> = &idle;
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
            job: UnsafeCell::new(Job { body, tasks: 0, scratch: 0 }),
            scratch: (0..threads).map(|_| UnsafeCell::new(Buffer::new())).collect(),
            parked: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            panic: Mutex::new(None),
            left: Mutex::new(()),
            all_left: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let mut workers = Vec::new();
        for index in 1..threads {
            let shared = Arc::clone(&shared);
            let builder = std::thread::Builder::new().name(format!("tangram-cpu-{index}"));
            match builder.spawn(move || shared.work(index)) {
                Ok(worker) => workers.push(worker),
                Err(_) => break,
            }
        }
        Pool { shared, workers, running: Mutex::new(()) }
    }

    /// Threads that work on a job, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Bytes of scratch memory that the threads hold.
    pub fn scratch_bytes(&self) -> usize {
        let _running = lock(&self.running);
        // SAFETY: `running` is held, so no job is open, and `run` returned only after all workers had left the last
        // one: nobody touches the buffers. What the workers did to them happened before they left.
        self.shared.scratch.iter().map(|buffer| unsafe { &*buffer.get() }.bytes()).sum()
    }

    /// Runs `body(task, scratch)` for every task in `0..tasks`, in any order, each on one thread with at least
    /// `scratch` elements of that thread's scratch memory, and returns when all are done. `work` is roughly the number
    /// of vector operations of all tasks together; little work is done by the caller alone. A panic of a task is
    /// passed on to the caller once no thread runs tasks any more; some tasks may then not have run.
    pub fn run(&self, tasks: usize, scratch: usize, work: usize, body: &Body<'_>) {
        let _running = lock(&self.running);
        let shared = &*self.shared;
        if tasks <= 1 || work < WORTH_SHARING || self.workers.is_empty() {
            // SAFETY: no job is open, so nobody else touches the caller's buffer.
            let memory = unsafe { &mut *shared.scratch[0].get() }.get_mut(scratch);
            (0..tasks).for_each(|task| body(task, memory));
            return;
        }
        let state = shared.state.load(Ordering::Relaxed);
        debug_assert_eq!(state & (INSIDE | OPEN), 0);
        // SAFETY: the job is closed with nobody inside, and `running` is held: nobody else touches these fields.
        // The pointer loses its lifetime, but is used only by threads inside the job, and this function does not
        // return or unwind before all have left.
        unsafe {
            let body = std::mem::transmute::<*const Body<'_>, *const Body<'static>>(body);
            *shared.job.get() = Job { body, tasks, scratch };
        }
        shared.next.store(0, Ordering::Relaxed);
        // SeqCst orders this store before the reads of `parked`; see `Shared::wait`.
        shared.state.store((state & !(INSIDE | OPEN)).wrapping_add(NEXT_JOB) | OPEN, Ordering::SeqCst);
        for (parked, worker) in shared.parked.iter().zip(&self.workers) {
            if parked.swap(false, Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        // SAFETY: this thread is the caller, index 0, and the job stays valid until the end of this function.
        unsafe { shared.take_tasks(0) };
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        shared.wait_until_left();
        let panic = lock(&shared.panic).take();
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of tasks, so it cannot have panicked itself.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn work(&self, index: usize) {
        let mut served = 0;
        while let Some(state) = self.wait(index, served) {
            served = state & !(INSIDE | OPEN);
            let mut current = state;
            let entered = loop {
                if current & !INSIDE != served | OPEN {
                    break false;
                }
                match self.state.compare_exchange_weak(
                    current,
                    current + 1,
                    Ordering::Acquire,
                    Ordering::Acquire,
                ) {
                    Ok(_) => break true,
                    Err(found) => current = found,
                }
            };
            if entered {
                // SAFETY: this thread has entered the job, and only it uses this index.
                unsafe { self.take_tasks(index) };
                if self.state.fetch_sub(1, Ordering::AcqRel) - 1 == served {
                    let _left = lock(&self.left);
                    self.all_left.notify_one();
                }
            }
        }
    }

    /// The state once there is another job than `served`; `None` when the pool stops.
    fn wait(&self, index: usize, served: u64) -> Option<u64> {
        let mut spins = 0;
        loop {
            if self.stop.load(Ordering::SeqCst) {
                return None;
            }
            let state = self.state.load(Ordering::SeqCst);
            if state & !(INSIDE | OPEN) != served {
                return Some(state);
            }
            if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
                continue;
            }
            // Announce the sleep, then look again: either this thread sees the new job, or the caller, which writes
            // the job first and reads `parked` second, sees the announcement and wakes this thread.
            self.parked[index - 1].store(true, Ordering::SeqCst);
            let state = self.state.load(Ordering::SeqCst);
            if state & !(INSIDE | OPEN) == served && !self.stop.load(Ordering::SeqCst) {
                std::thread::park();
            }
            self.parked[index - 1].store(false, Ordering::SeqCst);
        }
    }

    /// Runs tasks until none is left, catching panics.
    ///
    /// # Safety
    /// The calling thread is inside the job, or is the caller of `run`, and is the only one with this index.
    unsafe fn take_tasks(&self, index: usize) {
        // SAFETY: inside the job, its fields do not change, and the target of `body` is alive.
        let (job, body) = unsafe {
            let job = &*self.job.get();
            (job, &*job.body)
        };
        // SAFETY: the buffer belongs to this index.
        let buffer = unsafe { &mut *self.scratch[index].get() };
        let result = catch_unwind(AssertUnwindSafe(|| {
            let memory = buffer.get_mut(job.scratch);
            loop {
                let task = self.next.fetch_add(1, Ordering::Relaxed);
                if task >= job.tasks {
                    break;
                }
                body(task, memory);
            }
        }));
        if let Err(payload) = result {
            self.next.store(job.tasks, Ordering::Relaxed);
            *lock(&self.panic) = Some(payload);
        }
    }

    /// Waits until no worker is inside the (closed) job.
    fn wait_until_left(&self) {
        for _ in 0..SPINS {
            if self.state.load(Ordering::Acquire) & INSIDE == 0 {
                return;
            }
            std::hint::spin_loop();
        }
        let mut left = lock(&self.left);
        while self.state.load(Ordering::Acquire) & INSIDE != 0 {
            left = self.all_left.wait(left).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum_of(pool: &Pool, tasks: usize) -> usize {
        let sum = AtomicUsize::new(0);
        pool.run(tasks, 4, usize::MAX, &|task, scratch| {
            assert!(scratch.len() >= 4);
            sum.fetch_add(task + 1, Ordering::Relaxed);
        });
        sum.into_inner()
    }

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads);
            assert_eq!(pool.threads(), threads);
            for round in 0..2000 {
                let tasks = round % 37;
                assert_eq!(sum_of(&pool, tasks), tasks * (tasks + 1) / 2);
                if round % 500 == 0 {
                    // Long enough that the workers sleep.
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
            }
        }
    }

    #[test]
    fn concurrent_callers_take_turns() {
        let pool = Pool::new(3);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..300).for_each(|_| assert_eq!(sum_of(&pool, 20), 210)));
            }
        });
    }

    #[test]
    fn panics_reach_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        for bad in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(20, 0, usize::MAX, &|task, _| assert_ne!(task, bad, "task {bad} is bad"));
            }));
            let payload = result.expect_err("the panic was swallowed");
            let message = payload.downcast_ref::<String>().expect("a message");
            assert!(message.contains("is bad"), "{message}");
            assert_eq!(sum_of(&pool, 20), 210);
        }
    }
}
