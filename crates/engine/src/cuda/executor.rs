//! Forward passes on a GPU: the counterpart of [`crate::Executor`], with the same stages and the same promises.
//!
//! Weights and KV blocks are addresses of GPU memory, lent for the length of a call: every call waits until the GPU has
//! done what it submitted.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tangram_device::{DeviceError, Extent};

use super::early::EarlyRows;
use super::graphs::{Graphs, Noted, Shape};
use super::plan::{Cut, Offset, Tables};
use super::select::Selection;
use super::working::Memory;
use super::{Kernels, Launcher, launch, room};
use crate::adapter::Adapter;
use crate::device::Tensors;
use crate::executor::{Chunk, LogitRows, PassError, Place, Whole, check, places};
use crate::kernels::kv::{BLOCK_TOKENS, KvBlocks, KvElement, KvProblem};
use crate::model::{Model, Tensor};
use crate::sampling::{Shortlist, Wish};

/// Why a pass cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ExecuteError {
    /// What was asked for does not fit the model.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// The GPU cannot.
    #[error(transparent)]
    Gpu(#[from] DeviceError),
    /// A tensor does not start at a multiple of [`ALIGNMENT`].
    #[error("tensor {index} starts at {address:#x}")]
    Misaligned {
        /// Index of the tensor.
        index: usize,
        /// Its address.
        address: u64,
    },
    /// The pass was begun on another device.
    #[error("the pass belongs to another device")]
    OtherDevice,
}

/// What tensors must be aligned to, in bytes.
pub const ALIGNMENT: u64 = 16;

/// A tensor in GPU memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its first byte.
    pub address: u64,
    /// Its length.
    pub bytes: usize,
}

/// Where a model's tensors are in GPU memory; see [`crate::Weights`].
///
/// # Safety
/// A region must be readable by kernels, and nobody may write it, for the length of the call that asked for it.
pub unsafe trait Addresses {
    /// A tensor, by its index in the slice given to [`Model::new`]. Called only for stages that were declared ready.
    fn tensor(&self, index: usize) -> Region;

    /// A tensor of adapter `adapter` of the pass, by its index in the slice given to [`Adapter::new`].
    fn adapter_tensor(&self, adapter: usize, index: usize) -> Region {
        let _ = (adapter, index);
        Region { address: 0, bytes: 0 }
    }
}

/// Where a pass finds its tensors.
#[derive(Clone, Copy)]
pub(crate) enum Addressed<'a> {
    /// At addresses that somebody vouches for.
    At(&'a dyn Addresses),
    /// Under extents of the pool.
    Lent(&'a dyn Tensors),
    /// Where somebody else has them, and noted there.
    Noted(&'a Noted<'a>),
    /// Nowhere: nothing is computed.
    Nowhere,
}

impl Addressed<'_> {
    pub(crate) fn tensor(self, tensor: &Tensor) -> Result<u64, ExecuteError> {
        match self {
            Addressed::At(addresses) => checked(addresses.tensor(tensor.index), tensor),
            Addressed::Lent(tensors) => checked(region(tensors.tensor(tensor.index)), tensor),
            Addressed::Noted(noted) => noted.tensor(tensor),
            Addressed::Nowhere => Ok(ALIGNMENT),
        }
    }

    pub(crate) fn adapter_tensor(self, adapter: usize, tensor: &Tensor) -> Result<u64, ExecuteError> {
        match self {
            Addressed::At(addresses) => checked(addresses.adapter_tensor(adapter, tensor.index), tensor),
            Addressed::Lent(tensors) => {
                checked(region(tensors.adapter_tensor(adapter, tensor.index)), tensor)
            }
            // Passes with adapters are not noted.
            Addressed::Noted(_) | Addressed::Nowhere => Ok(ALIGNMENT),
        }
    }
}

/// Where an extent is. While it is lent its bytes stay there, and nobody writes them.
fn region(extent: Option<&Extent>) -> Region {
    extent.map_or(Region { address: 0, bytes: 0 }, |extent| Region {
        address: extent.address() as u64,
        bytes: extent.len(),
    })
}

/// The address of a tensor that has its bytes.
fn checked(region: Region, tensor: &Tensor) -> Result<u64, ExecuteError> {
    let index = tensor.index;
    if region.bytes != tensor.bytes {
        return Err(PassError::TensorBytes { index, expected: tensor.bytes, found: region.bytes }.into());
    }
    match region.address.is_multiple_of(ALIGNMENT) {
        true => Ok(region.address),
        false => Err(ExecuteError::Misaligned { index, address: region.address }),
    }
}

/// Where the tables of a batch are in [`Memory::tables`].
#[derive(Default)]
pub(crate) struct Layout {
    pub(crate) tokens: Offset,
    pub(crate) positions: Offset,
    /// Per row, its chunk.
    pub(crate) sequences: Offset,
    /// Per chunk, its first row and how many it has.
    pub(crate) sequence_rows: Offset,
    /// Per chunk, where its KV blocks begin.
    pub(crate) first_block: Offset,
    /// Rows of the output.
    pub(crate) output_rows: Offset,
    /// Per row, whether its sequence is beyond longrope's original context; for models that have two rotations.
    pub(crate) longs: Option<Offset>,
    /// Per row, its token type, where not all are of the first.
    pub(crate) types: Option<Offset>,
    /// Per row, its adapter.
    pub(crate) adapters: Offset,
    pub(crate) few: Offset,
    pub(crate) many: Offset,
    pub(crate) merges: Offset,
}

/// A forward pass under way on a GPU.
pub struct CudaPass {
    pub(crate) model: u64,
    pub(crate) stage: usize,
    stages: usize,
    /// Chunks that somebody asked for: the first ones of `places`.
    chunks: usize,
    /// Their tokens.
    pub(crate) tokens: Vec<u32>,
    /// Until the embedding itself is needed.
    pub(crate) early: Option<EarlyRows>,
    /// Whether these are single tokens that all want logits, filled up with sequences that are none.
    decodes: bool,
    pub(crate) rows: usize,
    pub(crate) output_rows: usize,
    output_width: usize,
    generates: bool,
    pub(crate) places: Vec<Place>,
    pub(crate) cut: Cut,
    pub(crate) layout: Layout,
    pub(crate) memory: Memory,
    pub(crate) adapters: Vec<Arc<Adapter>>,
    /// Where the constants of the stages so far end, and the tables of experts that the stage under way still takes.
    pub(crate) constants_end: usize,
    pub(crate) expert_tables: VecDeque<u64>,
    /// Until the first call of [`CudaExecutor::advance`].
    tables: Option<Tables>,
    /// `None` where all of the output is copied to the host.
    pub(crate) selection: Option<Selection>,
    /// What was found out about the rows of the output, once the pass is done.
    shortlists: Vec<Shortlist>,
    /// On the host, once the pass is done: all of the output, or the one row that was asked for last.
    output: Vec<f32>,
}

impl CudaPass {
    /// The stage that runs next.
    pub fn stage(&self) -> usize {
        self.stage
    }

    /// Rows of its output.
    pub fn output_rows(&self) -> usize {
        self.places[..self.chunks].iter().map(|place| place.output_rows).sum()
    }

    /// What its launches depend on besides addresses, if it is one of those that are put together in graphs.
    fn shape(&self) -> Option<Shape> {
        self.decodes.then(|| Shape {
            model: self.model,
            rows: self.rows,
            items: self.cut.few.len(),
            merges: self.cut.merges.len(),
            wanted: self.selection.as_ref().map(|selection| selection.wanted),
        })
    }

    /// Has the GPU find out what sampling wants of the chunks' logits (one wish per chunk, for those with
    /// [`LogitRows::Last`](crate::LogitRows::Last)) and keeps the logits there: see [`CudaPass::shortlist`] and
    /// [`CudaExecutor::row`]. To be called before the pass advances. Without any wish nothing changes.
    pub fn select(&mut self, wishes: &[Option<Wish>]) {
        let one_each = self.places.iter().all(|place| place.output_rows <= 1);
        if !self.generates || !one_each || wishes.iter().all(Option::is_none) || self.output_width == 0 {
            return;
        }
        let Some(tables) = &mut self.tables else { return };
        let rows = self.places.iter().enumerate().filter(|(_, place)| place.output_rows == 1);
        let wishes = rows.map(|(chunk, _)| wishes.get(chunk).copied().flatten());
        self.selection = Some(Selection::new(tables, wishes, self.output_width));
    }

    /// What the GPU found out about a chunk's logits. `None` before the pass is done, and where nothing was wished for.
    pub fn shortlist(&self, chunk: usize) -> Option<&Shortlist> {
        let Place { output_row, output_rows, .. } = self.places[chunk];
        self.shortlists.get(output_row).filter(|_| output_rows == 1)
    }

    /// The logits of a chunk, as [`crate::Pass::logits`]; empty where they were kept on the GPU.
    pub fn logits(&self, chunk: usize) -> &[f32] {
        if self.generates { self.output(chunk) } else { &[] }
    }

    /// [`CudaPass::logits`] for changing in place.
    pub fn logits_mut(&mut self, chunk: usize) -> &mut [f32] {
        let Place { output_row, output_rows, .. } = self.places[chunk];
        let range = output_row * self.output_width..(output_row + output_rows) * self.output_width;
        if self.selection.is_some() {
            return &mut [];
        }
        if self.generates { self.output.get_mut(range).unwrap_or_default() } else { &mut [] }
    }

    /// The vector of a chunk, as [`crate::Pass::embedding`].
    pub fn embedding(&self, chunk: usize) -> &[f32] {
        if self.generates { &[] } else { self.output(chunk) }
    }

    /// Empty before the pass is done.
    fn output(&self, chunk: usize) -> &[f32] {
        if self.selection.is_some() {
            return &[];
        }
        let Place { output_row, output_rows, .. } = self.places[chunk];
        let range = output_row * self.output_width..(output_row + output_rows) * self.output_width;
        self.output.get(range).unwrap_or_default()
    }
}

/// Sets of working memory kept for later passes.
const SPARE_MEMORY: usize = 2;

/// Runs passes on a GPU.
pub struct CudaExecutor {
    /// Before the kernels, of which they are made.
    graphs: Graphs,
    pub(crate) kernels: Kernels,
    spare: Mutex<Vec<Memory>>,
    /// Rows of logits copied to the host.
    rows_copied: AtomicU64,
}

/// What an executor for a GPU has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Graphs of decode steps that there are.
    pub graphs: u64,
    /// Decode steps that were replayed from a graph.
    pub replays: u64,
    /// Rows of logits that were copied to the host because what the GPU found out about them did not suffice.
    pub rows_copied: u64,
}

impl CudaExecutor {
    /// An executor on this GPU.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] if a kernel is missing.
    pub fn new(gpu: Arc<dyn Launcher>) -> Result<CudaExecutor, DeviceError> {
        Ok(CudaExecutor {
            graphs: Graphs::default(),
            kernels: Kernels::load(gpu)?,
            spare: Mutex::default(),
            rows_copied: AtomicU64::new(0),
        })
    }

    /// What it has done so far.
    pub fn counts(&self) -> Counts {
        Counts {
            graphs: self.graphs.count() as u64,
            replays: self.graphs.replays(),
            rows_copied: self.rows_copied.load(Ordering::Relaxed),
        }
    }

    /// Lets go what is kept for passes of a model that will not come any more.
    pub fn forget(&self, model: &Model) {
        self.graphs.forget(model.id);
    }

    /// Makes room for all passes of a model, as [`crate::DeviceExecutor::prepare`].
    ///
    /// # Errors
    /// As [`CudaExecutor::begin`].
    pub fn prepare(
        &self,
        model: &Model,
        adapter: Option<&Arc<Adapter>>,
        step: (usize, usize),
        cached_tokens: usize,
    ) -> Result<(), ExecuteError> {
        let gpu = self.kernels.gpu();
        let sizes = room::needed(model, adapter, gpu.multiprocessors(), step, cached_tokens)?;
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        while spare.len() < SPARE_MEMORY {
            spare.push(Memory::new(gpu));
        }
        spare.iter_mut().try_for_each(|memory| memory.reserve(&sizes))?;
        Ok(())
    }

    /// Bytes of working memory that it holds between passes.
    pub fn scratch_bytes(&self) -> usize {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        spare.iter().map(|memory| memory.sizes().iter().sum::<usize>()).sum()
    }

    /// Begins a pass over one step's chunks, chunk `i` of the sequence `wholes[i]` (without that it ends its sequence),
    /// with adapter `adapters[of_chunk[i]]` or by the model alone. Nothing is computed yet.
    ///
    /// # Errors
    /// As [`crate::Executor::begin_adapted`]; [`DeviceError`] when there is not enough memory.
    pub fn begin(
        &self,
        model: &Model,
        batch: &[Chunk<'_>],
        wholes: &[Whole],
        adapters: Vec<Arc<Adapter>>,
        of_chunk: &[Option<usize>],
    ) -> Result<CudaPass, ExecuteError> {
        check(model, batch)?;
        let spec = model.spec();
        check_adapters(model, batch.len(), &adapters, of_chunk)?;
        let chunks = batch.len();
        let single = |chunk: &Chunk<'_>| chunk.tokens.len() == 1 && chunk.logits == LogitRows::Last;
        let decodes =
            model.kv().is_some() && spec.generates() && adapters.is_empty() && batch.iter().all(single);
        let filled: Vec<Chunk<'_>>;
        let batch = if decodes {
            // Any token does: what comes of it is for nobody.
            let nobody = Chunk { tokens: &[0], position: 0, logits: LogitRows::Last };
            let others = filled_up(model, chunks) - chunks;
            filled = batch.iter().copied().chain(std::iter::repeat_n(nobody, others)).collect();
            &filled
        } else {
            batch
        };
        let mut of_batch = Vec::new();
        let output_rows = places(model, batch, wholes, &mut of_batch);
        let gpu = self.kernels.gpu();
        let group = spec.heads / spec.kv_heads;
        let mut cut = match (model.kv_shape, launch::attention_size(spec.head_dim)) {
            (Some(shape), Some(size)) if shape.element == KvElement::F16 => {
                let enough = gpu.multiprocessors() as usize * 4;
                Cut::new(&of_batch, size, group, spec.kv_heads, enough)
            }
            _ => Cut::default(),
        };
        if decodes {
            cut.fill_up(of_batch.len());
        }
        let mut tables = Tables::default();
        let rows = |value: fn(&Place, usize) -> usize| {
            of_batch
                .iter()
                .flat_map(move |place| (0..place.tokens).map(move |token| value(place, token) as u32))
        };
        let generates = spec.generates();
        // Never in decode steps, whose tables have the same places every time.
        let two_types = !generates
            && spec.token_types > Some(1)
            && of_batch.iter().any(|place| place.second < place.position + place.tokens);
        let mut block = 0;
        let first_blocks: Vec<u32> = of_batch
            .iter()
            .map(|place| {
                block += (place.position + place.tokens).div_ceil(BLOCK_TOKENS) as u32;
                block - (place.position + place.tokens).div_ceil(BLOCK_TOKENS) as u32
            })
            .collect();
        let layout = Layout {
            tokens: tables.push(batch.iter().flat_map(|chunk| chunk.tokens.iter().copied())),
            positions: tables.push(rows(|place, token| place.position + token)),
            sequences: tables.push(
                of_batch
                    .iter()
                    .enumerate()
                    .flat_map(|(chunk, place)| std::iter::repeat_n(chunk as u32, place.tokens)),
            ),
            sequence_rows: tables
                .push(of_batch.iter().flat_map(|place| [place.row as u32, place.tokens as u32])),
            first_block: tables.push(first_blocks),
            output_rows: tables.push(of_batch.iter().flat_map(|place| {
                // The chunk's last rows; its first one for a score.
                let end = if generates { place.row + place.tokens } else { place.row + 1 };
                (end - place.output_rows..end).map(|row| row as u32)
            })),
            longs: model.short_context().map(|_| tables.push(rows(|place, _| usize::from(place.long)))),
            types: two_types.then(|| {
                tables.push(rows(|place, token| usize::from(place.position + token >= place.second)))
            }),
            adapters: tables.push(of_batch.iter().enumerate().flat_map(|(chunk, place)| {
                let adapter = of_chunk.get(chunk).copied().flatten().map_or(u32::MAX, |index| index as u32);
                std::iter::repeat_n(adapter, place.tokens)
            })),
            few: tables.push(cut.few.iter().map(|&item| super::Item::from(item))),
            many: tables.push(cut.many.iter().map(|&item| super::Item::from(item))),
            merges: tables.push(cut.merges.iter().map(|&merge| super::Merge::from(merge))),
        };
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let mut memory = spare.pop().unwrap_or_else(|| Memory::new(gpu));
        drop(spare);
        if let Some(layout) = model.kv().filter(|_| decodes) {
            memory.padding.reserve(layout.block_bytes)?;
        }
        Ok(CudaPass {
            model: model.id,
            stage: 0,
            stages: spec.stages(),
            chunks,
            tokens: batch.iter().take(chunks).flat_map(|chunk| chunk.tokens).copied().collect(),
            early: None,
            decodes,
            rows: of_batch.iter().map(|place| place.tokens).sum(),
            output_rows,
            output_width: model.output_width(),
            generates,
            places: of_batch,
            cut,
            layout,
            memory,
            adapters,
            constants_end: 0,
            expert_tables: VecDeque::new(),
            tables: Some(tables),
            selection: None,
            shortlists: Vec::new(),
            output: Vec::new(),
        })
    }

    /// Runs stages while `pass.stage() < ready_stages` and says whether the pass is done, as
    /// [`crate::Executor::advance`].
    ///
    /// # Errors
    /// As [`crate::Executor::advance`]; [`DeviceError`] when the GPU fails; [`ExecuteError::Misaligned`].
    pub fn advance(
        &self,
        pass: &mut CudaPass,
        model: &Model,
        weights: &dyn Addresses,
        kv: &mut [KvBlocks<'_>],
        ready_stages: usize,
    ) -> Result<bool, ExecuteError> {
        let blocks = block_addresses(model, &pass.places[..pass.chunks], kv)?;
        self.advance_at(pass, model, Addressed::At(weights), blocks, ready_stages)
    }

    /// [`CudaExecutor::advance`] with tensors that the pool lends.
    ///
    /// # Errors
    /// As [`CudaExecutor::advance`].
    pub fn advance_on(
        &self,
        pass: &mut CudaPass,
        model: &Model,
        tensors: &dyn Tensors,
        kv: &mut [KvBlocks<'_>],
        ready_stages: usize,
    ) -> Result<bool, ExecuteError> {
        let blocks = block_addresses(model, &pass.places[..pass.chunks], kv)?;
        self.advance_at(pass, model, Addressed::Lent(tensors), blocks, ready_stages)
    }

    /// `blocks` are the addresses of the KV blocks of all chunks.
    pub(super) fn advance_at(
        &self,
        pass: &mut CudaPass,
        model: &Model,
        weights: Addressed<'_>,
        mut blocks: Vec<u64>,
        ready_stages: usize,
    ) -> Result<bool, ExecuteError> {
        if pass.model != model.id {
            return Err(PassError::OtherModel.into());
        }
        if let Some(tables) = pass.tables.take() {
            pass.memory.tables.fill(tables.bytes())?;
        }
        if !blocks.is_empty() {
            // All that is nobody's writes the same keys and values to the same block.
            let padding = pass.memory.padding.address();
            blocks.resize(blocks.len() + pass.places.len() - pass.chunks, padding);
            let mut tables = Tables::default();
            tables.push(blocks);
            pass.memory.blocks.fill(tables.bytes())?;
        }
        let whole = pass.stage == 0 && ready_stages >= pass.stages;
        if whole {
            // The embedding is here.
            pass.early = None;
        }
        let result = match pass.shape().filter(|_| whole) {
            Some(shape) => self.graphs.run(&self.kernels, pass, model, weights, shape),
            None => super::forward::run(&self.kernels, pass, model, weights, ready_stages),
        };
        let done = pass.stage >= pass.stages;
        // Waits in every case, so that what was lent is free again when this returns.
        let selected = pass.selection.as_ref().filter(|_| done && result.is_ok());
        let (from, bytes) = match selected {
            Some(selection) => (&pass.memory.selection, selection.bytes(pass.output_rows)),
            None if done => (&pass.memory.output, pass.output_rows() * pass.output_width * 4),
            None => (&pass.memory.output, 0),
        };
        let mut output = vec![0; bytes];
        let waited = match bytes {
            0 => pass.memory.tables.read(&mut [0; 4]),
            _ => from.read(&mut output),
        };
        result?;
        waited?;
        match selected {
            Some(selection) => pass.shortlists = selection.shortlists(&output, pass.output_rows),
            None => pass.output = floats(&output),
        }
        Ok(done)
    }

    /// The logits of a chunk of a pass that is done, for changing in place; copied from the GPU if they were kept there.
    ///
    /// # Errors
    /// [`ExecuteError::Gpu`].
    pub fn row<'a>(&self, pass: &'a mut CudaPass, chunk: usize) -> Result<&'a mut [f32], ExecuteError> {
        if pass.shortlist(chunk).is_none() {
            return Ok(pass.logits_mut(chunk));
        }
        let mut row = vec![0; pass.output_width * 4];
        pass.memory.output.read_at(pass.places[chunk].output_row * row.len(), &mut row)?;
        self.rows_copied.fetch_add(1, Ordering::Relaxed);
        pass.output = floats(&row);
        Ok(&mut pass.output)
    }

    /// Takes the memory of a pass back for later ones.
    pub fn recycle(&self, pass: CudaPass) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE_MEMORY {
            spare.push(pass.memory);
        }
    }
}

/// How many sequences a decode step of so many is filled up to, so that there are few different steps. The kernels of
/// products take rows by such numbers anyway; but each row of a model with experts may need further weights.
fn filled_up(model: &Model, sequences: usize) -> usize {
    if model.spec().experts.is_some() { sequences } else { sequences.next_power_of_two() }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

fn check_adapters(
    model: &Model,
    chunks: usize,
    adapters: &[Arc<Adapter>],
    of_chunk: &[Option<usize>],
) -> Result<(), PassError> {
    if adapters.is_empty() && of_chunk.is_empty() {
        return Ok(());
    }
    if of_chunk.len() != chunks {
        return Err(PassError::Adapter("there must be one choice per chunk"));
    }
    if of_chunk.iter().flatten().any(|&adapter| adapter >= adapters.len()) {
        return Err(PassError::Adapter("a chunk's adapter is not there"));
    }
    if adapters.iter().any(|adapter| !adapter.fits(model.spec())) {
        return Err(PassError::Adapter("an adapter is for another base"));
    }
    Ok(())
}

/// The addresses of the KV blocks of every chunk, one after the other; none where nothing is cached.
fn block_addresses(model: &Model, places: &[Place], kv: &mut [KvBlocks<'_>]) -> Result<Vec<u64>, PassError> {
    let Some(layout) = model.kv() else { return Ok(Vec::new()) };
    if kv.len() != places.len() {
        return Err(PassError::KvCount { chunks: places.len(), given: kv.len() });
    }
    let mut addresses = Vec::new();
    for (chunk, (place, KvBlocks { shared, own })) in places.iter().zip(kv).enumerate() {
        let needed = (place.position + place.tokens).div_ceil(BLOCK_TOKENS);
        let given = shared.len() + own.len();
        if given < needed {
            return Err(KvProblem::TooFew { chunk, needed, given }.into());
        }
        if place.position < shared.len() * BLOCK_TOKENS {
            return Err(KvProblem::Shared { chunk }.into());
        }
        let extents = shared.iter().map(|extent| &**extent).chain(own.iter()).take(needed);
        for extent in extents {
            let address = extent.address() as u64;
            if extent.len() < layout.block_bytes {
                return Err(KvProblem::Short { chunk }.into());
            }
            if !address.is_multiple_of(ALIGNMENT) {
                return Err(PassError::Kv(format!("a block of chunk {chunk} starts at {address:#x}")));
            }
            addresses.push(address);
        }
    }
    Ok(addresses)
}
