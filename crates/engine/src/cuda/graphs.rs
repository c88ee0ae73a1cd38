//! Decode steps as CUDA graphs: one call instead of hundreds of launches, which on a fast GPU take longer than the work.
//!
//! A graph belongs to a model, a number of rows (batches of models without experts are filled up to a power of two with rows
//! of no sequence), a number of items of attention (a power of two), and a set of working memory. All that differs between two such steps (tokens,
//! positions, blocks of keys and values, how attention is cut, random numbers) lies in tables that kernels read; weights
//! and buffers are addresses in the launches. Each graph is made of the launches of a plain step, written down by the code
//! that launches them (`record.rs`), so there is no second description of a step that could differ from the first.
//!
//! Before a graph is replayed every address that it was made with is compared with where that tensor or buffer is now;
//! one that differs drops the graph. So tensors may leave and come back as they like: in the paged layout they come back to
//! their addresses, and the graph still holds.
//!
//! The first step of a shape runs plainly and is remembered; the second runs plainly too, and while the GPU is at work on
//! it the graph is made; from the third on it is replayed. A request never waits for a graph to be made, and a model that
//! is used for a single token makes none. (Capturing a stream would refuse what other code does on this thread meanwhile,
//! and updating the nodes of a shared graph would cost a call per node.)

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tangram_device::DeviceError;
use tangram_device::cuda::{Graph, Launched};

use super::executor::{Addressed, CudaPass, ExecuteError};
use super::record::Recorder;
use super::{Kernels, forward};
use crate::model::{Model, Tensor};

/// Shapes that are remembered. A graph takes some MiB of the GPU's memory, beside the pool.
const MOST_SHAPES: usize = 32;

/// What the launches of a step depend on besides addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) model: u64,
    pub(crate) rows: usize,
    /// Of attention.
    pub(crate) items: usize,
    pub(crate) merges: usize,
    /// Candidates of each row; `None` where nothing is selected.
    pub(crate) wanted: Option<usize>,
}

/// The tensors that a step asked for, and where they were.
pub(crate) struct Noted<'a> {
    weights: Addressed<'a>,
    found: RefCell<Vec<(Tensor, u64)>>,
}

impl Noted<'_> {
    pub(crate) fn tensor(&self, tensor: &Tensor) -> Result<u64, ExecuteError> {
        let address = self.weights.tensor(tensor)?;
        self.found.borrow_mut().push((*tensor, address));
        Ok(address)
    }
}

/// A graph and what it holds for.
struct Made {
    graph: Graph,
    tensors: Vec<(Tensor, u64)>,
    /// The version of the constants that it was made with, or that was found to be the same.
    constants: u64,
    /// For comparison with what would be launched plainly.
    #[cfg(debug_assertions)]
    launches: Vec<Launched>,
}

/// A shape that was seen.
struct Seen {
    shape: Shape,
    /// Address and bytes of every buffer.
    memory: Vec<(u64, usize)>,
    made: Option<Made>,
    /// The driver would not make it.
    refused: bool,
    used: u64,
}

/// The graphs of an executor.
#[derive(Default)]
pub(crate) struct Graphs {
    seen: Mutex<Vec<Seen>>,
    /// Counts steps.
    clock: AtomicU64,
    replays: AtomicU64,
}

impl Graphs {
    /// Steps replayed so far.
    pub(crate) fn replays(&self) -> u64 {
        self.replays.load(Ordering::Relaxed)
    }

    /// Graphs that there are.
    pub(crate) fn count(&self) -> usize {
        self.seen().iter().filter(|seen| seen.made.is_some()).count()
    }

    /// Lets the graphs of a model go. None of them may be under way.
    pub(crate) fn forget(&self, model: u64) {
        self.seen().retain(|seen| seen.shape.model != model);
    }

    fn seen(&self) -> MutexGuard<'_, Vec<Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs all stages of a pass of this shape that has not begun. Its tables must be there.
    pub(crate) fn run(
        &self,
        kernels: &Kernels,
        pass: &mut CudaPass,
        model: &Model,
        weights: Addressed<'_>,
        shape: Shape,
    ) -> Result<(), ExecuteError> {
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        let memory = pass.memory.places();
        let mut all = self.seen();
        let Some(seen) = all.iter_mut().find(|seen| seen.shape == shape && seen.memory == memory) else {
            forward::run(kernels, pass, model, weights, usize::MAX)?;
            // Buffers may have grown.
            let memory = pass.memory.places();
            if all.len() >= MOST_SHAPES
                && let Some(oldest) = (0..all.len()).min_by_key(|&index| all[index].used)
            {
                all.swap_remove(oldest);
            }
            all.push(Seen { shape, memory, made: None, refused: false, used: now });
            return Ok(());
        };
        seen.used = now;
        if let Some(made) = &mut seen.made {
            let here = |(tensor, address): &(Tensor, u64)| {
                weights.tensor(tensor).is_ok_and(|found| found == *address)
            };
            if made.tensors.iter().all(here) {
                return self.replay(made, kernels, pass, model, weights);
            }
            seen.made = None;
        }
        forward::run(kernels, pass, model, weights, usize::MAX)?;
        if !seen.refused {
            seen.made = make(kernels, pass, model, weights)?;
            seen.refused = seen.made.is_none();
        }
        Ok(())
    }

    fn replay(
        &self,
        made: &mut Made,
        kernels: &Kernels,
        pass: &mut CudaPass,
        model: &Model,
        weights: Addressed<'_>,
    ) -> Result<(), ExecuteError> {
        if made.constants != pass.memory.constants.version() {
            // Another model has used this memory meanwhile.
            forward::constants(kernels, pass, model, weights)?;
            made.constants = pass.memory.constants.version();
        }
        #[cfg(debug_assertions)]
        assert!(
            record(kernels, pass, model, weights)?.launches == made.launches,
            "a graph is not what would be launched"
        );
        // SAFETY: what a plain pass launches was checked by `forward` when the graph was made; tensors and buffers are
        // where they were then, and tables have the same shape. Nobody else is in this executor's graphs, and whoever
        // runs a pass waits for it.
        unsafe { kernels.gpu().replay(&made.graph) }?;
        pass.stage = model.spec().stages();
        self.replays.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// What a pass launches, and the tensors that it asks for with their addresses.
struct Recorded {
    launches: Vec<Launched>,
    tensors: Vec<(Tensor, u64)>,
}

/// Writes down a pass whose buffers and constants are there already.
fn record(
    kernels: &Kernels,
    pass: &mut CudaPass,
    model: &Model,
    weights: Addressed<'_>,
) -> Result<Recorded, ExecuteError> {
    let recorder = Arc::new(Recorder::new(kernels.gpu().multiprocessors()));
    let noted = Noted { weights, found: RefCell::default() };
    let stage = std::mem::take(&mut pass.stage);
    let recorded =
        forward::run(&kernels.on(recorder.clone()), pass, model, Addressed::Noted(&noted), usize::MAX);
    pass.stage = stage;
    recorded?;
    Ok(Recorded { launches: recorder.take(), tensors: noted.found.into_inner() })
}

/// The graph of a pass that has just been launched; `None` if the driver refuses.
fn make(
    kernels: &Kernels,
    pass: &mut CudaPass,
    model: &Model,
    weights: Addressed<'_>,
) -> Result<Option<Made>, ExecuteError> {
    let Recorded { launches, tensors } = record(kernels, pass, model, weights)?;
    // SAFETY: these are launches of the kernels, with their structures.
    let graph = match unsafe { kernels.gpu().graph(&launches) } {
        Ok(graph) => graph,
        Err(lost @ DeviceError::Lost { .. }) => return Err(lost.into()),
        Err(_) => return Ok(None),
    };
    Ok(Some(Made {
        graph,
        tensors,
        constants: pass.memory.constants.version(),
        #[cfg(debug_assertions)]
        launches,
    }))
}
