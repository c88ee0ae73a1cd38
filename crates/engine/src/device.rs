//! Passes on whichever device a node has: the executor for processors and the one for GPUs behind one interface.
//!
//! Only passes the calls on. Both keep the promise of this crate, each with the bits of its own arithmetic.

use std::ops::DerefMut;
use std::sync::Arc;

use tangram_device::Extent;

use crate::adapter::Adapter;
use crate::cuda::{Counts, CudaExecutor, CudaPass, ExecuteError};
use crate::executor::{Chunk, Executor, Pass, Weights, Whole};
use crate::kernels::kv::KvBlocks;
use crate::model::Model;
use crate::sampling::{Shortlist, Wish};

/// Where the tensors of a model, and of the adapters of a pass, lie on the device.
pub trait Tensors: Sync {
    /// As [`Weights::tensor`]; `None` for what is not there.
    fn tensor(&self, index: usize) -> Option<&Extent>;

    /// As [`Weights::adapter_tensor`]; `None` for what is not there.
    fn adapter_tensor(&self, adapter: usize, index: usize) -> Option<&Extent> {
        let _ = (adapter, index);
        None
    }
}

/// Host memory for bytes that a pass needs, of whatever kind copies to the device are fastest from.
pub type HostBuffer = Box<dyn DerefMut<Target = [u8]> + Send + Sync>;

/// Tensors where the host can address them; what is not there has no bytes, which executors refuse.
struct OnHost<'a>(&'a dyn Tensors);

impl Weights for OnHost<'_> {
    fn tensor(&self, index: usize) -> &[u8] {
        self.0.tensor(index).and_then(Extent::host_bytes).unwrap_or_default()
    }

    fn adapter_tensor(&self, adapter: usize, index: usize) -> &[u8] {
        self.0.adapter_tensor(adapter, index).and_then(Extent::host_bytes).unwrap_or_default()
    }
}

/// Runs passes on a device.
pub enum DeviceExecutor {
    /// On the processor.
    Cpu(Executor),
    /// On a GPU.
    Cuda(Box<CudaExecutor>),
}

/// A pass under way on a device.
pub enum DevicePass {
    /// Of [`DeviceExecutor::Cpu`].
    Cpu(Box<Pass>),
    /// Of [`DeviceExecutor::Cuda`].
    Cuda(Box<CudaPass>),
}

impl DeviceExecutor {
    /// Makes ready for passes of a model, and of an adapter on it, with up to `sequences` sequences of `tokens` tokens
    /// in a step, so that no later pass has to allocate. `cached_tokens` is what the device has room for in KV blocks.
    ///
    /// # Errors
    /// [`ExecuteError::Gpu`] when there is not enough memory.
    pub fn prepare(
        &self,
        model: &Model,
        adapter: Option<&Arc<Adapter>>,
        (sequences, tokens): (usize, usize),
        cached_tokens: usize,
    ) -> Result<(), ExecuteError> {
        match self {
            DeviceExecutor::Cpu(_) => Ok(()),
            DeviceExecutor::Cuda(cuda) => cuda.prepare(model, adapter, (sequences, tokens), cached_tokens),
        }
    }

    /// As [`Executor::begin_adapted`]; without adapters chunks are computed by the model alone.
    ///
    /// # Errors
    /// As [`Executor::begin_adapted`] and [`CudaExecutor::begin`].
    pub fn begin(
        &self,
        model: &Model,
        batch: &[Chunk<'_>],
        wholes: &[Whole],
        adapters: Vec<Arc<Adapter>>,
        of_chunk: &[Option<usize>],
    ) -> Result<DevicePass, ExecuteError> {
        Ok(match self {
            DeviceExecutor::Cpu(cpu) if adapters.is_empty() => {
                DevicePass::Cpu(Box::new(cpu.begin_parts(model, batch, wholes)?))
            }
            DeviceExecutor::Cpu(cpu) => {
                DevicePass::Cpu(Box::new(cpu.begin_adapted(model, batch, wholes, adapters, of_chunk)?))
            }
            DeviceExecutor::Cuda(cuda) => {
                DevicePass::Cuda(Box::new(cuda.begin(model, batch, wholes, adapters, of_chunk)?))
            }
        })
    }

    /// As [`Executor::advance`]. What is lent is free again when it returns.
    ///
    /// # Errors
    /// As [`Executor::advance`] and [`CudaExecutor::advance`]; [`ExecuteError::OtherDevice`].
    pub fn advance(
        &self,
        pass: &mut DevicePass,
        model: &Model,
        tensors: &dyn Tensors,
        kv: &mut [KvBlocks<'_>],
        ready_stages: usize,
    ) -> Result<bool, ExecuteError> {
        match (self, pass) {
            (DeviceExecutor::Cpu(cpu), DevicePass::Cpu(pass)) => {
                Ok(cpu.advance(pass, model, &OnHost(tensors), kv, ready_stages)?)
            }
            (DeviceExecutor::Cuda(cuda), DevicePass::Cuda(pass)) => {
                cuda.advance_on(pass, model, tensors, kv, ready_stages)
            }
            _ => Err(ExecuteError::OtherDevice),
        }
    }

    /// The logits of a chunk of a pass that is done, as [`Pass::logits_mut`], wherever they are.
    ///
    /// # Errors
    /// [`ExecuteError::Gpu`]; [`ExecuteError::OtherDevice`].
    pub fn row<'a>(&self, pass: &'a mut DevicePass, chunk: usize) -> Result<&'a mut [f32], ExecuteError> {
        match (self, pass) {
            (DeviceExecutor::Cpu(_), DevicePass::Cpu(pass)) => Ok(pass.logits_mut(chunk)),
            (DeviceExecutor::Cuda(cuda), DevicePass::Cuda(pass)) => cuda.row(pass, chunk),
            _ => Err(ExecuteError::OtherDevice),
        }
    }

    /// Bytes of working memory that it holds between passes.
    pub fn scratch_bytes(&self) -> usize {
        match self {
            DeviceExecutor::Cpu(cpu) => cpu.scratch_bytes(),
            DeviceExecutor::Cuda(cuda) => cuda.scratch_bytes(),
        }
    }

    /// As [`CudaExecutor::counts`]; nothing on the processor.
    pub fn counts(&self) -> Counts {
        match self {
            DeviceExecutor::Cpu(_) => Counts::default(),
            DeviceExecutor::Cuda(cuda) => cuda.counts(),
        }
    }

    /// Lets go what is kept for passes of a model that will not come any more.
    pub fn forget(&self, model: &Model) {
        if let DeviceExecutor::Cuda(cuda) = self {
            cuda.forget(model);
        }
    }

    /// Takes the memory of a pass back for later ones.
    pub fn recycle(&self, pass: DevicePass) {
        match (self, pass) {
            (DeviceExecutor::Cpu(cpu), DevicePass::Cpu(pass)) => cpu.recycle(*pass),
            (DeviceExecutor::Cuda(cuda), DevicePass::Cuda(pass)) => cuda.recycle(*pass),
            // Begun on another device, which is gone; its memory goes too.
            _ => {}
        }
    }
}

impl DevicePass {
    /// The stage that runs next.
    pub fn stage(&self) -> usize {
        match self {
            DevicePass::Cpu(pass) => pass.stage(),
            DevicePass::Cuda(pass) => pass.stage(),
        }
    }

    /// Room for so many bytes of rows, or more, to be filled and given to [`DevicePass::set_early_rows`].
    pub fn early_room(&self, bytes: usize) -> HostBuffer {
        match self {
            DevicePass::Cpu(_) => Box::new(vec![0; bytes]),
            DevicePass::Cuda(pass) => pass.early_room(bytes),
        }
    }

    /// As [`Pass::set_early_rows`] and [`CudaPass::set_early_rows`].
    pub fn set_early_rows(&mut self, rows: HostBuffer, verified: bool) {
        match self {
            DevicePass::Cpu(pass) => pass.set_early_rows(rows),
            DevicePass::Cuda(pass) => pass.set_early_rows(rows, verified),
        }
    }

    /// Rows of its output.
    pub fn output_rows(&self) -> usize {
        match self {
            DevicePass::Cpu(pass) => pass.output_rows(),
            DevicePass::Cuda(pass) => pass.output_rows(),
        }
    }

    /// Whether it would be of use to say what sampling wants of the logits, by [`DevicePass::select`].
    pub fn can_select(&self) -> bool {
        matches!(self, DevicePass::Cuda(_))
    }

    /// As [`CudaPass::select`]; on the processor, where the logits are at hand, nothing changes.
    pub fn select(&mut self, wishes: &[Option<Wish>]) {
        if let DevicePass::Cuda(pass) = self {
            pass.select(wishes);
        }
    }

    /// As [`CudaPass::shortlist`].
    pub fn shortlist(&self, chunk: usize) -> Option<&Shortlist> {
        match self {
            DevicePass::Cpu(_) => None,
            DevicePass::Cuda(pass) => pass.shortlist(chunk),
        }
    }

    /// The vector or score of a chunk, as [`Pass::embedding`].
    pub fn embedding(&self, chunk: usize) -> &[f32] {
        match self {
            DevicePass::Cpu(pass) => pass.embedding(chunk),
            DevicePass::Cuda(pass) => pass.embedding(chunk),
        }
    }
}
