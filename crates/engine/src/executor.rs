//! Forward passes: what goes into one, the state of one under way, and who runs it.
//!
//! A pass advances stage by stage, so that it can wait for weights that are still being loaded; waiting is the
//! caller's business. A chunk's results are bit-identical whatever else is in the batch, however its sequence was
//! cut into chunks, and whenever the pass was interrupted.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use tangram_checkpoint::Attention;

use crate::adapter::{Adapted, Adapter};
use crate::device::HostBuffer;
use crate::forward;
use crate::kernels::attention::Spans;
use crate::kernels::kv::{KvBlocks, KvProblem, KvTable};
use crate::kernels::routing::Route;
use crate::kernels::{Buffer, Isa};
use crate::model::{Model, Rotation};
use crate::pool::Pool;

/// Sets of activation buffers kept for later passes.
const SPARE_MEMORY: usize = 2;

/// Where the bytes of a model's tensors are.
pub trait Weights: Sync {
    /// The bytes of a tensor, by its index in the slice given to [`Model::new`]. Called only for tensors of stages
    /// that the caller declared ready; for the token embedding not before the last one, if its rows came early.
    fn tensor(&self, index: usize) -> &[u8];

    /// The bytes of a tensor of adapter `adapter` of the pass (its index in what [`Executor::begin_adapted`] was
    /// given), by its index in the slice given to [`Adapter::new`]. Called for any stage: an adapter must be there as
    /// a whole.
    fn adapter_tensor(&self, adapter: usize, index: usize) -> &[u8] {
        let _ = (adapter, index);
        &[]
    }
}

/// One sequence's part of a step.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Consecutive tokens of the sequence.
    pub tokens: &'a [u32],
    /// Position of the first of them; everything before is in the sequence's KV blocks.
    pub position: usize,
    /// Which tokens' logits are wanted. Other models ignore it and always give the chunk's vector or score.
    pub logits: LogitRows,
}

/// What a chunk's results depend on besides its tokens and those before them: its sequence as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Whole {
    /// Tokens that the sequence has, those of later chunks included. Models with longrope rotate a sequence that is
    /// longer than [`Model::short_context`] in another way, from its first token on.
    pub tokens: usize,
    /// Where the second of two texts begins, for models with token types.
    pub second: Option<usize>,
}

/// Which tokens of a chunk get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogitRows {
    /// None: the prompt goes on in a later chunk.
    None,
    /// The last token.
    Last,
    /// Every token.
    All,
}

/// Why a pass cannot run.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PassError {
    /// There is nothing to do.
    #[error("the batch is empty")]
    EmptyBatch,
    /// A chunk has no tokens.
    #[error("chunk {chunk} has no tokens")]
    EmptyChunk {
        /// Which chunk.
        chunk: usize,
    },
    /// A token id is outside the vocabulary.
    #[error("token {token} of chunk {chunk} is outside the vocabulary of {vocab}")]
    Token {
        /// Which chunk.
        chunk: usize,
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A chunk ends beyond the model's context (or beyond its learned positions).
    #[error("chunk {chunk} ends at position {end}, the context is {context} tokens")]
    TooLong {
        /// Which chunk.
        chunk: usize,
        /// One past the last position.
        end: usize,
        /// Longest sequence.
        context: usize,
    },
    /// A bidirectional model was given a part of a sequence.
    #[error("chunk {chunk} starts at position {position}, but this model reads whole sequences")]
    Partial {
        /// Which chunk.
        chunk: usize,
        /// Its start.
        position: usize,
    },
    /// The pass was begun with another model.
    #[error("the pass belongs to another model")]
    OtherModel,
    /// There must be one list of KV blocks per chunk.
    #[error("{chunks} chunks but KV blocks for {given}")]
    KvCount {
        /// Chunks in the batch.
        chunks: usize,
        /// Lists given.
        given: usize,
    },
    /// The KV blocks of a chunk cannot be used.
    #[error("KV blocks: {0}")]
    Kv(String),
    /// The adapters do not fit the batch or the model.
    #[error("adapters: {0}")]
    Adapter(&'static str),
    /// Rows that were read before their matrix are not those that it has.
    #[error(
        "the rows of the token embedding that were read early are not those that arrived: the file has changed"
    )]
    EarlyRows,
    /// A tensor has not as many bytes as its type and shape demand.
    #[error("tensor {index} has {found} bytes, expected are {expected}")]
    TensorBytes {
        /// Index of the tensor.
        index: usize,
        /// Bytes its type and shape demand.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
}

impl From<KvProblem> for PassError {
    fn from(problem: KvProblem) -> PassError {
        PassError::Kv(match problem {
            KvProblem::TooFew { chunk, needed, given } => {
                format!("chunk {chunk} needs {needed}, has {given}")
            }
            KvProblem::Short { chunk } => format!("an extent of chunk {chunk} is shorter than a block"),
            KvProblem::Shared { chunk } => format!("chunk {chunk} would write into a shared block"),
            KvProblem::NotHost { chunk } => format!("the processor cannot reach the memory of chunk {chunk}"),
        })
    }
}

/// A chunk's place in the batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Row of its first token.
    pub(crate) row: usize,
    pub(crate) tokens: usize,
    pub(crate) position: usize,
    /// Whether its sequence is rotated as one beyond [`Model::short_context`].
    pub(crate) long: bool,
    /// Position from which on tokens are of the second type.
    pub(crate) second: usize,
    /// Its first row in the output, and how many it has.
    pub(crate) output_row: usize,
    pub(crate) output_rows: usize,
}

/// The memory of a pass, reused by later passes.
#[derive(Default)]
pub(crate) struct Memory {
    pub(crate) tokens: Vec<u32>,
    pub(crate) places: Vec<Place>,
    /// The pieces that attention works on; together all rows of the batch.
    pub(crate) spans: Spans,
    /// Residual stream, `[rows, hidden]`.
    pub(crate) x: Buffer,
    /// Normalised input of a block, `[rows, hidden]`, then the result of attention, `[rows, heads · head_dim]`.
    pub(crate) h: Buffer,
    pub(crate) query: Buffer,
    pub(crate) key: Buffer,
    pub(crate) value: Buffer,
    pub(crate) gate: Buffer,
    pub(crate) up: Buffer,
    /// Input of a matrix product, rearranged.
    pub(crate) packed: Buffer,
    /// Per row: cosines, then sines of the rotary angles.
    pub(crate) angles: Buffer,
    /// The same for the local layers, where theirs differ.
    pub(crate) local_angles: Buffer,
    /// The result of a block before it is added to the residual stream, `[rows, hidden]`.
    pub(crate) block: Buffer,
    /// Scores of experts, `[rows, experts]`.
    pub(crate) scores: Buffer,
    pub(crate) routes: Vec<Route>,
    /// Input and result of an expert, `[its rows, hidden]`.
    pub(crate) expert_input: Buffer,
    pub(crate) expert_output: Buffer,
    /// Norm weights and biases, widened.
    pub(crate) vectors: Buffer,
    pub(crate) output: Buffer,
    pub(crate) kv: KvTable,
}

impl Memory {
    /// Bytes of its buffers.
    fn bytes(&self) -> usize {
        let Memory { x, h, query, key, value, gate, up, packed, angles, local_angles, .. } = self;
        let Memory { block, scores, expert_input, expert_output, vectors, output, .. } = self;
        let first = [x, h, query, key, value, gate, up, packed, angles, local_angles];
        let others = [block, scores, expert_input, expert_output, vectors, output];
        first.iter().chain(&others).map(|buffer| buffer.bytes()).sum()
    }
}

/// A forward pass under way.
pub struct Pass {
    pub(crate) model: u64,
    pub(crate) stage: usize,
    /// All of them.
    stages: usize,
    pub(crate) rows: usize,
    pub(crate) output_rows: usize,
    pub(crate) output_width: usize,
    pub(crate) generates: bool,
    pub(crate) memory: Memory,
    pub(crate) adapted: Option<Adapted>,
    /// The row of the token embedding for each row of the batch.
    pub(crate) early_rows: Option<HostBuffer>,
}

impl Pass {
    /// Lets stage 0 take the rows of the token embedding from here: one per token of the batch, in its order, as they
    /// are stored, [`Model::token_row_bytes`] each. The embedding itself need then not be there before the last
    /// stage, which compares the two.
    pub fn set_early_rows(&mut self, rows: HostBuffer) {
        self.early_rows = Some(rows);
    }

    /// The stage that runs next; [`tangram_checkpoint::ModelSpec::stages`] when the pass is done.
    pub fn stage(&self) -> usize {
        self.stage
    }

    /// Rows of its output.
    pub fn output_rows(&self) -> usize {
        self.output_rows
    }

    /// The logits of a chunk, `[rows, vocab]`, once the pass is done: no row, one, or one per token, as its
    /// [`LogitRows`] said. Empty before that, and for embedding models. Panics if there is no such chunk, as the
    /// next two do.
    pub fn logits(&self, chunk: usize) -> &[f32] {
        if self.generates { self.output(chunk) } else { &[] }
    }

    /// [`Pass::logits`] for changing in place, as samplers do.
    pub fn logits_mut(&mut self, chunk: usize) -> &mut [f32] {
        if !self.generates {
            return &mut [];
        }
        let range = self.output_range(chunk);
        &mut self.memory.output.get_mut(range.end)[range]
    }

    /// The vector of a chunk, `[hidden]`, or its score, `[1]`, once the pass is done. Empty for models that generate.
    pub fn embedding(&self, chunk: usize) -> &[f32] {
        if self.generates { &[] } else { self.output(chunk) }
    }

    fn output(&self, chunk: usize) -> &[f32] {
        let range = self.output_range(chunk);
        &self.memory.output.get(range.end)[range]
    }

    /// Empty before the pass is done: the memory still holds an earlier pass's output.
    fn output_range(&self, chunk: usize) -> Range<usize> {
        let place = self.memory.places[chunk];
        if self.stage < self.stages {
            return 0..0;
        }
        place.output_row * self.output_width..(place.output_row + place.output_rows) * self.output_width
    }
}

/// Runs passes: threads, instruction set, and activation memory for reuse.
pub struct Executor {
    pub(crate) isa: Isa,
    pub(crate) pool: Pool,
    spare: Mutex<Vec<Memory>>,
}

impl Executor {
    /// An executor with `threads` threads, the one that calls [`Executor::advance`] included (at least 1).
    pub fn new(threads: usize) -> Executor {
        Executor::with_isa(threads, Isa::detect())
    }

    /// [`Executor::new`] with a chosen instruction set.
    pub fn with_isa(threads: usize, isa: Isa) -> Executor {
        Executor { isa, pool: Pool::new(threads), spare: Mutex::new(Vec::new()) }
    }

    /// Begins a pass over one step's chunks, each of which ends its sequence. Nothing is computed yet.
    ///
    /// # Errors
    /// [`PassError`] for an empty batch or chunk, a token outside the vocabulary, a position beyond the context, or a
    /// part of a sequence for a model that reads whole sequences.
    pub fn begin(&self, model: &Model, batch: &[Chunk<'_>]) -> Result<Pass, PassError> {
        self.begin_parts(model, batch, &[])
    }

    /// [`Executor::begin`] where chunk `i` is of the sequence `wholes[i]`; without that it ends its sequence.
    ///
    /// # Errors
    /// As [`Executor::begin`].
    pub fn begin_parts(
        &self,
        model: &Model,
        batch: &[Chunk<'_>],
        wholes: &[Whole],
    ) -> Result<Pass, PassError> {
        check(model, batch)?;
        let spec = model.spec();
        let mut memory = self.spare.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        memory.tokens.clear();
        memory.spans.clear();
        let output_rows = places(model, batch, wholes, &mut memory.places);
        for chunk in batch {
            memory.spans.push(chunk.tokens.len(), chunk.position, spec.attention, spec.heads / spec.kv_heads);
            memory.tokens.extend_from_slice(chunk.tokens);
        }
        let rows = memory.tokens.len();
        fill_angles(&mut memory.angles, [&model.rotation, model.long_rotation()], &memory.places, rows);
        if let Some(rotation) = &model.local_rotation {
            fill_angles(&mut memory.local_angles, [rotation; 2], &memory.places, rows);
        }
        Ok(Pass {
            model: model.id,
            stage: 0,
            stages: spec.stages(),
            rows,
            output_rows,
            output_width: model.output_width(),
            generates: spec.generates(),
            memory,
            adapted: None,
            early_rows: None,
        })
    }

    /// [`Executor::begin_parts`] where chunk `i` is computed with adapter `adapters[of_chunk[i]]`, or by the model alone.
    ///
    /// # Errors
    /// As [`Executor::begin_parts`], and [`PassError::Adapter`] if an adapter is for another base or the choice of adapters
    /// does not fit the batch.
    pub fn begin_adapted(
        &self,
        model: &Model,
        batch: &[Chunk<'_>],
        wholes: &[Whole],
        adapters: Vec<Arc<Adapter>>,
        of_chunk: &[Option<usize>],
    ) -> Result<Pass, PassError> {
        let mut pass = self.begin_parts(model, batch, wholes)?;
        pass.adapted = Some(Adapted::new(model.spec(), &pass.memory.places, adapters, of_chunk)?);
        Ok(pass)
    }

    /// Runs stages while `pass.stage() < ready_stages` and says whether the pass is done. `kv[i]` are the blocks of
    /// chunk `i` in order, at least enough for all its tokens up to and including this step's, each at least
    /// `block_bytes` long; `kv` is ignored by models that cache nothing. After an error the pass is worthless, and
    /// so are the chunks' positions in the KV blocks from [`Chunk::position`] on.
    ///
    /// # Errors
    /// [`PassError`] if the model is not the one the pass was begun with, if blocks are missing or short, or if a
    /// tensor has the wrong size.
    pub fn advance(
        &self,
        pass: &mut Pass,
        model: &Model,
        weights: &dyn Weights,
        kv: &mut [KvBlocks<'_>],
        ready_stages: usize,
    ) -> Result<bool, PassError> {
        if pass.model != model.id {
            return Err(PassError::OtherModel);
        }
        forward::run(self, pass, model, weights, kv, ready_stages)?;
        Ok(pass.stage >= model.spec.stages())
    }

    /// Bytes of activation memory that it holds between passes, and of its threads' own memory. Passes under way are
    /// not counted.
    pub fn scratch_bytes(&self) -> usize {
        let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        spare.iter().map(Memory::bytes).sum::<usize>() + self.pool.scratch_bytes()
    }

    /// Takes the memory of a pass back for later ones.
    pub fn recycle(&self, pass: Pass) {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < SPARE_MEMORY {
            spare.push(pass.memory);
        }
    }
}

/// Gives every chunk its place and returns the rows of the output.
pub(crate) fn places(model: &Model, batch: &[Chunk<'_>], wholes: &[Whole], places: &mut Vec<Place>) -> usize {
    let (mut row, mut output_row) = (0, 0);
    places.clear();
    for (index, chunk) in batch.iter().enumerate() {
        let whole = wholes.get(index).copied().unwrap_or_default();
        let tokens = chunk.tokens.len();
        let output_rows = match (model.spec().generates(), chunk.logits) {
            (false, _) | (true, LogitRows::Last) => 1,
            (true, LogitRows::None) => 0,
            (true, LogitRows::All) => tokens,
        };
        places.push(Place {
            row,
            tokens,
            position: chunk.position,
            long: model.is_long(whole.tokens.max(chunk.position + tokens)),
            second: whole.second.unwrap_or(usize::MAX),
            output_row,
            output_rows,
        });
        row += tokens;
        output_row += output_rows;
    }
    output_row
}

/// Cosines and sines of every row's angles, by the rotation of short sequences or that of long ones.
fn fill_angles(angles: &mut Buffer, rotations: [&Rotation; 2], places: &[Place], rows: usize) {
    let half = rotations[0].frequencies.len();
    let angles = angles.get_mut(rows * half * 2);
    for place in places {
        let rotation = rotations[usize::from(place.long)];
        for token in 0..place.tokens {
            let row = place.row + token;
            let (cos, sin) = angles[row * half * 2..(row + 1) * half * 2].split_at_mut(half);
            for (pair, frequency) in rotation.frequencies.iter().enumerate() {
                // The angle is rounded to f32 as in the reference implementation, its sine is then exact.
                let angle = f64::from((place.position + token) as f32 * frequency);
                cos[pair] = angle.cos() as f32 * rotation.magnitude;
                sin[pair] = angle.sin() as f32 * rotation.magnitude;
            }
        }
    }
}

/// Positions that the model can compute.
pub(crate) fn longest(model: &Model) -> usize {
    let spec = model.spec();
    let learned = spec.learned_positions.map_or(usize::MAX, |rows| rows.saturating_sub(spec.position_offset));
    spec.context.min(learned)
}

/// Checks that the model can compute these chunks.
pub(crate) fn check(model: &Model, batch: &[Chunk<'_>]) -> Result<(), PassError> {
    let (spec, context) = (model.spec(), longest(model));
    if batch.is_empty() {
        return Err(PassError::EmptyBatch);
    }
    for (index, chunk) in batch.iter().enumerate() {
        if chunk.tokens.is_empty() {
            return Err(PassError::EmptyChunk { chunk: index });
        }
        if spec.attention == Attention::Bidirectional && chunk.position > 0 {
            return Err(PassError::Partial { chunk: index, position: chunk.position });
        }
        let end = chunk.position.saturating_add(chunk.tokens.len());
        if end > context {
            return Err(PassError::TooLong { chunk: index, end, context });
        }
        if let Some(&token) = chunk.tokens.iter().find(|&&token| token as usize >= spec.vocab) {
            return Err(PassError::Token { chunk: index, token, vocab: spec.vocab });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tangram_checkpoint::{
        DType, LayerRole, Mlp, ModelSpec, Norm, NormPlacement, Output, Role, Rope, RopeScaling,
    };
    use tangram_device::cpu::CpuDevice;
    use tangram_device::{Arena, Extent};

    use super::*;
    use crate::cost::PassShape;
    use crate::model::TensorDesc;

    struct Zeros(Vec<Vec<u8>>);

    impl Weights for Zeros {
        fn tensor(&self, index: usize) -> &[u8] {
            &self.0[index]
        }
    }

    fn model() -> (Model, Zeros) {
        model_of(|_| DType::BF16)
    }

    /// A model with matrices of these types.
    fn model_of(dtype: impl Fn(Role) -> DType) -> (Model, Zeros) {
        let spec = ModelSpec {
            family: "llama".into(),
            vocab: 1000,
            hidden: 96,
            intermediate: 288,
            layers: 2,
            heads: 4,
            kv_heads: 2,
            head_dim: 32,
            context: 256,
            norm: Norm::Rms { epsilon: 1e-5 },
            norm_placement: NormPlacement::Pre,
            qk_norm: false,
            rope: Some(Rope { theta: 1e4, dims: 32, scaling: RopeScaling::None }),
            learned_positions: None,
            token_types: None,
            mlp: Mlp::GatedSilu,
            attention: Attention::Causal,
            output: Output::Logits { tied: true },
            ..ModelSpec::default()
        };
        let describe = |role| {
            let shape = spec.shape(role);
            TensorDesc { role, dtype: if shape.len() == 1 { DType::F32 } else { dtype(role) }, shape }
        };
        let tensors: Vec<TensorDesc> = spec.required_roles().into_iter().map(describe).collect();
        let bytes = |tensor: &TensorDesc| tensor.dtype.tensor_bytes(&tensor.shape).unwrap() as usize;
        let zeros = tensors.iter().map(|tensor| vec![0; bytes(tensor)]).collect();
        (Model::new(spec, &tensors).unwrap(), Zeros(zeros))
    }

    fn run(executor: &Executor, model: &Model, weights: &Zeros, tokens: usize, logits: LogitRows) -> Pass {
        let block_bytes = model.kv().unwrap().block_bytes;
        let arena = Arena::reserve(CpuDevice::open(4 << 20, 4096).unwrap(), 4 << 20).unwrap();
        let blocks = 0..tokens.div_ceil(16);
        let mut kv: Vec<Extent> =
            blocks.map(|i| arena.claim(i * block_bytes, block_bytes).unwrap()).collect();
        let tokens = vec![1; tokens];
        let mut pass = executor.begin(model, &[Chunk { tokens: &tokens, position: 0, logits }]).unwrap();
        assert!(
            executor.advance(&mut pass, model, weights, &mut [kv.as_mut_slice().into()], usize::MAX).unwrap()
        );
        pass
    }

    #[test]
    fn an_executor_holds_what_was_foretold() {
        // Values of another type than queries and keys: the input of all three is rearranged in two ways.
        let mixed = |role| match role {
            Role::Layer(_, LayerRole::Value) => DType::BF16,
            Role::Layer(_, LayerRole::Down) => DType::F32,
            _ => DType::Q5_1,
        };
        for (model, weights) in [model(), model_of(|_| DType::Q8_0), model_of(mixed)] {
            for (tokens, logits, rows) in [
                (96, LogitRows::All, 96),
                (96, LogitRows::Last, 1),
                (1, LogitRows::Last, 1),
                (1, LogitRows::None, 0),
            ] {
                let shape = PassShape { tokens, output_rows: rows, longest: tokens };
                let executor = Executor::new(1);
                executor.recycle(run(&executor, &model, &weights, tokens, logits));
                assert_eq!(executor.scratch_bytes(), model.scratch_bytes(shape, 1), "{shape:?}");
                let executor = Executor::new(3);
                executor.recycle(run(&executor, &model, &weights, tokens, logits));
                assert!(executor.scratch_bytes() <= model.scratch_bytes(shape, 3), "{shape:?}");
            }
        }
    }

    #[test]
    fn memory_is_reused() {
        let executor = Executor::new(1);
        let (model, weights) = model();
        let pass = run(&executor, &model, &weights, 64, LogitRows::All);
        let address = pass.logits(0).as_ptr();
        executor.recycle(pass);
        let next =
            executor.begin(&model, &[Chunk { tokens: &[1], position: 0, logits: LogitRows::Last }]).unwrap();
        assert!(next.logits(0).is_empty(), "an earlier pass's output shows");
        executor.recycle(next);
        let pass = run(&executor, &model, &weights, 64, LogitRows::All);
        assert_eq!(pass.logits(0).as_ptr(), address);
    }

    #[test]
    fn what_is_shared_may_be_shared() {
        fn shared<T: Send + Sync>() {}
        shared::<Executor>();
        shared::<Model>();
        shared::<Pass>();
    }
}
