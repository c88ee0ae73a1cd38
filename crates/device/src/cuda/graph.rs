//! Launches of kernels that are put together once and then given to the GPU by one call, again and again: a CUDA graph.
//!
//! Built from the launches themselves, one node each, which waits for the one before. Nothing is captured from a stream: so
//! nothing has to be kept from happening meanwhile, on this thread or on one that maps memory, and what a graph does is
//! what it was given, byte by byte. It holds addresses; whoever replays it must know that they still hold.

use std::ffi::c_void;
use std::sync::Arc;

use super::driver::{FunctionHandle, GraphExecHandle, GraphHandle, KernelNodeParams, NodeHandle};
use super::gpu::Gpu;
use super::program::{Grid, Kernel, Program};
use crate::DeviceError;

/// A launch of a kernel whose one parameter is a structure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launched {
    /// The kernel.
    pub kernel: Kernel,
    /// How many threads run it, and with what.
    pub grid: Grid,
    /// The bytes of the structure.
    pub arguments: Vec<u8>,
}

/// Launches that are given to the GPU together.
pub struct Graph {
    gpu: Arc<Gpu>,
    exec: GraphExecHandle,
    launches: usize,
}

// SAFETY: the graph is a name that the driver takes from any thread; it is launched only through `Program::replay`, whose
// caller keeps to one thread at a time.
unsafe impl Send for Graph {}

/// The description of a graph, which is of no use any more once it can be launched.
struct Description<'a> {
    gpu: &'a Gpu,
    graph: GraphHandle,
}

impl Drop for Description<'_> {
    fn drop(&mut self) {
        // SAFETY: made in `Program::graph`, destroyed once.
        let _ = self.gpu.must("letting a graph's description go", |driver| unsafe {
            (driver.cuGraphDestroy)(self.graph)
        });
    }
}

impl Program {
    /// Puts launches together, to be done in their order. Allocates memory of the driver's own on the GPU, and takes some
    /// microseconds per launch.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when the driver refuses: a launch that it would refuse, or not enough memory.
    ///
    /// # Safety
    /// The kernels must be of this program, and the arguments of each its structure.
    pub unsafe fn graph(&self, launches: &[Launched]) -> Result<Graph, DeviceError> {
        let (gpu, mut graph) = (self.gpu(), std::ptr::null_mut());
        gpu.call("beginning a graph", |driver| {
            // SAFETY: the pointer is to a live variable.
            unsafe { (driver.cuGraphCreate)(&mut graph, 0) }
        })?;
        let description = Description { gpu, graph };
        let mut last: Option<NodeHandle> = None;
        for Launched { kernel, grid, arguments } in launches {
            let mut parameters = [arguments.as_ptr().cast::<c_void>()];
            let [grid_x, grid_y, grid_z] = grid.blocks;
            let node = KernelNodeParams {
                function: kernel.0 as FunctionHandle,
                grid_x,
                grid_y,
                grid_z,
                block_x: grid.threads,
                block_y: 1,
                block_z: 1,
                shared_bytes: grid.shared_bytes,
                parameters: parameters.as_mut_ptr(),
                extra: std::ptr::null_mut(),
                kernel: std::ptr::null_mut(),
                context: std::ptr::null_mut(),
            };
            let mut handle = std::ptr::null_mut();
            let before = last.as_slice();
            gpu.call("adding to a graph", |driver| {
                // SAFETY: the pointers are to live variables; the driver copies the structure, which the caller says is
                // the kernel's, before it returns.
                unsafe {
                    (driver.cuGraphAddKernelNode_v2)(&mut handle, graph, before.as_ptr(), before.len(), &node)
                }
            })?;
            last = Some(handle);
        }
        let mut exec = std::ptr::null_mut();
        gpu.call("making a graph", |driver| {
            // SAFETY: the pointer is to a live variable, and the description is whole.
            unsafe { (driver.cuGraphInstantiateWithFlags)(&mut exec, description.graph, 0) }
        })?;
        let made = Graph { gpu: gpu.clone(), exec, launches: launches.len() };
        gpu.call("bringing a graph to the GPU", |driver| {
            // SAFETY: graph and stream are alive.
            unsafe { (driver.cuGraphUpload)(made.exec, self.stream()) }
        })?;
        Ok(made)
    }

    /// Launches all that a graph holds, after everything launched so far.
    ///
    /// # Errors
    /// As [`Program::launch`].
    ///
    /// # Safety
    /// The graph must be of this program, live until it has been waited for, and be replayed by one thread at a time; for
    /// each of its launches what [`Program::launch`] demands must hold.
    pub unsafe fn replay(&self, graph: &Graph) -> Result<(), DeviceError> {
        self.gpu().call("launching a graph", |driver| {
            // SAFETY: graph and stream are alive; the rest is the caller's promise.
            unsafe { (driver.cuGraphLaunch)(graph.exec, self.stream()) }
        })
    }
}

impl Graph {
    /// How many launches it holds.
    pub fn launches(&self) -> usize {
        self.launches
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made in `Program::graph`, destroyed once, and nothing of it is under way, as the caller of `replay` says.
        let _ =
            self.gpu.must("letting a graph go", |driver| unsafe { (driver.cuGraphExecDestroy)(self.exec) });
    }
}
