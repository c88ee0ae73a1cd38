//! The stages of a forward pass on a GPU, for every family that a spec can describe: `crate::forward`, kernel by kernel.
//!
//! This file only puts kernels in order. Every address that it passes on is of a buffer that it has made large enough,
//! of a table of the pass, or of a tensor whose length it has checked.

use tangram_checkpoint::{Attention, DType, LayerRole, Mlp, Norm, NormPlacement};

use super::executor::{Addressed, CudaPass, ExecuteError};
use super::plan::{Offset, Tables};
use super::working::{Memory, Operands};
use super::{
    ActivateArguments, AddArguments, AngleArguments, AttendArguments, Buffer, EmbedArguments, FactorsEntry,
    Kernels, LowRankArguments, MergeArguments, NormArguments, PlainAttendArguments, PrepareArguments,
    ProductArguments, ProductKind, RowsOut, activation, constants, experts, launch, weight_type,
};
use crate::kernels::kv::KvElement;
use crate::model::{FeedForward, Layer, LinearTensors, MlpTensors, Model, NormTensors, Rotation, Tensor};

/// Runs the stages from `pass.stage` to `ready_stages`.
pub(crate) fn run(
    kernels: &Kernels,
    pass: &mut CudaPass,
    model: &Model,
    weights: Addressed<'_>,
    ready_stages: usize,
) -> Result<(), ExecuteError> {
    while pass.stage < ready_stages.min(model.spec.stages()) {
        let stage = pass.stage;
        let mut step = Step { kernels, pass, model, weights };
        step.constants(stage)?;
        match stage {
            0 => step.embed()?,
            stage if stage <= model.layers.len() => step.layer(stage - 1)?,
            _ => {
                step.head()?;
                // What the head makes of wrong rows is for nobody; so the GPU need not wait for this.
                step.check_early_rows()?;
            }
        }
        pass.stage += 1;
    }
    Ok(())
}

/// Sees to it that what all stages read beside tensors and the tables of the pass is on the GPU.
pub(crate) fn constants(
    kernels: &Kernels,
    pass: &mut CudaPass,
    model: &Model,
    weights: Addressed<'_>,
) -> Result<(), ExecuteError> {
    let mut step = Step { kernels, pass, model, weights };
    (0..model.spec.stages()).try_for_each(|stage| step.constants(stage))
}

/// Which operands the readers of some rows need besides f32.
#[derive(Clone, Copy, Default)]
pub(super) struct Needs {
    bf16: bool,
    f16: bool,
}

impl Needs {
    pub(super) fn of<'a>(linears: impl IntoIterator<Item = &'a LinearTensors>) -> Needs {
        linears.into_iter().fold(Needs::default(), |needs, linear| match linear.weight.dtype {
            DType::F32 => needs,
            DType::BF16 => Needs { bf16: true, ..needs },
            _ => Needs { f16: true, ..needs },
        })
    }
}

impl Operands {
    /// Makes room for `rows` rows of `width`.
    pub(super) fn reserve(
        &mut self,
        rows: usize,
        width: usize,
        needs: Needs,
    ) -> Result<RowsOut, ExecuteError> {
        let operand_bytes = rows * width.next_multiple_of(32) * 2;
        Ok(RowsOut {
            plain: self.plain.reserve(rows * width * 4)?,
            bf16: if needs.bf16 { self.bf16.reserve(operand_bytes)? } else { 0 },
            f16: if needs.f16 { self.f16.reserve(operand_bytes)? } else { 0 },
            scales: if needs.f16 { self.scales.reserve(rows * 4)? } else { 0 },
        })
    }
}

pub(super) fn numbers(buffer: &mut Buffer, count: usize) -> Result<u64, ExecuteError> {
    Ok(buffer.reserve(count.max(1) * 4)?)
}

/// Rows that a product reads, and of which tiles.
#[derive(Clone, Copy)]
pub(super) struct Input {
    pub(super) rows: RowsOut,
    pub(super) columns: usize,
    pub(super) tokens: usize,
}

/// Everything that a stage needs.
pub(super) struct Step<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) pass: &'a mut CudaPass,
    pub(super) model: &'a Model,
    weights: Addressed<'a>,
}

impl Step<'_> {
    pub(super) fn rows(&self) -> usize {
        self.pass.rows
    }

    pub(super) fn memory(&mut self) -> &mut Memory {
        &mut self.pass.memory
    }

    pub(super) fn table(&self, offset: Offset) -> u64 {
        self.pass.memory.tables.address() + offset.0
    }

    pub(super) fn address(&self, tensor: &Tensor) -> Result<u64, ExecuteError> {
        self.weights.tensor(tensor)
    }

    /// Address and type of a tensor that may be missing.
    fn optional(&self, tensor: Option<&Tensor>) -> Result<(u64, u32), ExecuteError> {
        match tensor {
            Some(tensor) => Ok((self.address(tensor)?, weight_type(tensor.dtype))),
            None => Ok((0, 0)),
        }
    }

    /// Stage 0: the residual stream from token ids, and the angles of all layers.
    fn embed(&mut self) -> Result<(), ExecuteError> {
        let (rows, model) = (self.rows(), self.model);
        let spec = &model.spec;
        let out = numbers(&mut self.memory().x, rows * spec.hidden)?;
        let (position_table, position_type) = self.optional(model.position_embedding.as_ref())?;
        let (type_table, type_type) = self.optional(model.type_embedding.as_ref())?;
        let (tokens, token_table) = match self.early_rows()? {
            Some(early) => early,
            None => (self.table(self.pass.layout.tokens), self.address(&model.token_embedding)?),
        };
        let arguments = EmbedArguments {
            tokens,
            positions: self.table(self.pass.layout.positions),
            types: self.pass.layout.types.map_or(0, |types| self.table(types)),
            token_table,
            position_table,
            type_table,
            out,
            token_type: weight_type(model.token_embedding.dtype),
            position_type,
            type_type,
            width: spec.hidden as u32,
            token_bytes: model.token_embedding.row_bytes() as u64,
            position_bytes: model.position_embedding.map_or(0, |tensor| tensor.row_bytes() as u64),
            type_bytes: model.type_embedding.map_or(0, |tensor| tensor.row_bytes() as u64),
            scale: spec.embedding_scale.unwrap_or(1.0),
            position_offset: spec.position_offset as u32,
        };
        // SAFETY: tokens and positions were checked against the tables' rows, types are below their number; `out` has `rows · hidden` elements.
        unsafe { self.kernels.embed(launch::rows(rows, 256), &arguments) }?;
        if let Some(norm) = &model.embedding_norm {
            self.normalise_in_place(norm)?;
        }
        let (positions, longs) = (self.table(self.pass.layout.positions), self.pass.layout.longs);
        let longs = longs.map_or(0, |longs| self.table(longs));
        let Memory { angles, local_angles, constants, .. } = &mut self.pass.memory;
        let [frequencies, long_frequencies, local_frequencies] =
            rotation_starts(model).map(|start| constants.buffer.address() + start as u64);
        let arguments = AngleArguments {
            positions,
            longs,
            frequencies,
            long_frequencies,
            half: model.rotation.frequencies.len() as u32,
            magnitude: model.rotation.magnitude,
            long_magnitude: model.long_rotation().magnitude,
            ..AngleArguments::default()
        };
        fill_angles(self.kernels, rows, angles, arguments)?;
        if let Some(rotation) = &model.local_rotation {
            let arguments = AngleArguments {
                positions,
                frequencies: local_frequencies,
                half: rotation.frequencies.len() as u32,
                magnitude: rotation.magnitude,
                ..AngleArguments::default()
            };
            fill_angles(self.kernels, rows, local_angles, arguments)?;
        }
        Ok(())
    }

    /// Brings the constants of a stage to the GPU, where they are not there: all frequencies before the first, then the
    /// tables of each layer's experts.
    fn constants(&mut self, stage: usize) -> Result<(), ExecuteError> {
        let model = self.model;
        if stage == 0 {
            let of_experts: usize = model.layers.iter().map(experts::tables_bytes).sum();
            let rotations = rotations(model);
            let of_rotations = rotations.map(|rotation| rotation.map_or(0, frequency_bytes)).iter().sum();
            let constants = &mut self.pass.memory.constants;
            constants.begin(model.id, of_rotations + of_experts)?;
            for (rotation, start) in rotations.into_iter().zip(rotation_starts(model)) {
                let mut table = Tables::default();
                table.push(rotation.iter().flat_map(|rotation| rotation.frequencies.iter().copied()));
                if !table.bytes().is_empty() {
                    constants.put(start, table.bytes())?;
                }
            }
            self.pass.constants_end = of_rotations;
        } else if let Some(MlpTensors::Sparse { experts, .. }) =
            model.layers.get(stage - 1).map(|layer| &layer.mlp)
        {
            self.pass.constants_end = self.put_expert_tables(experts, self.pass.constants_end)?;
        }
        Ok(())
    }

    fn layer(&mut self, index: usize) -> Result<(), ExecuteError> {
        let layer = &self.model.layers[index];
        self.attention(layer, index)?;
        self.mlp(layer, index)?;
        if self.model.spec.parallel_residual {
            // Attention's part; the feed-forward block has added its own.
            let (x, block) = (self.pass.memory.x.address(), self.pass.memory.block.address());
            self.add(x, block, self.rows() * self.model.spec.hidden)?;
        }
        Ok(())
    }

    pub(super) fn norm_arguments(
        &self,
        x: u64,
        out: RowsOut,
        norm: &NormTensors,
    ) -> Result<NormArguments, ExecuteError> {
        let spec = &self.model.spec;
        let (centred, epsilon) = match spec.norm {
            Norm::Rms { epsilon } => (false, epsilon),
            Norm::Layer { epsilon } => (true, epsilon),
        };
        let (bias, bias_type) = self.optional(norm.bias.as_ref().filter(|_| centred))?;
        Ok(NormArguments {
            x,
            weight: self.address(&norm.weight)?,
            bias,
            out,
            width: norm.weight.columns as u32,
            weight_type: weight_type(norm.weight.dtype),
            bias_type,
            centred: u32::from(centred),
            epsilon,
            offset: if spec.norm_plus_one { 1.0 } else { 0.0 },
            ..NormArguments::default()
        })
    }

    pub(super) fn normalise(&self, rows: usize, arguments: &NormArguments) -> Result<(), ExecuteError> {
        // SAFETY: called with buffers of `rows · width` elements and parameters of `width` elements.
        unsafe { self.kernels.normalise(launch::rows(rows, 256), arguments) }?;
        Ok(())
    }

    /// Normalises the residual stream.
    pub(super) fn normalise_in_place(&self, norm: &NormTensors) -> Result<(), ExecuteError> {
        let x = self.pass.memory.x.address();
        let out = RowsOut { plain: x, ..RowsOut::default() };
        self.normalise(self.rows(), &self.norm_arguments(x, out, norm)?)
    }

    /// Writes rows of f32 as operands, through `activation`.
    pub(super) fn activate(&self, rows: usize, arguments: &ActivateArguments) -> Result<(), ExecuteError> {
        // SAFETY: called with buffers of `rows · width` elements.
        unsafe { self.kernels.activate(launch::rows(rows, 512), arguments) }?;
        Ok(())
    }

    fn add(&self, x: u64, y: u64, elements: usize) -> Result<(), ExecuteError> {
        let arguments = AddArguments { x, y, elements: elements as u64 };
        // SAFETY: called with buffers of so many elements.
        unsafe { self.kernels.add(launch::elements(elements), &arguments) }?;
        Ok(())
    }

    /// What a block reads: the residual stream, normalised if that comes before.
    pub(super) fn block_input(&mut self, norm: &NormTensors, needs: Needs) -> Result<Input, ExecuteError> {
        let (rows, hidden) = (self.rows(), self.model.spec.hidden);
        let x = self.pass.memory.x.address();
        let out = self.memory().h.reserve(rows, hidden, needs)?;
        if self.model.spec.norm_placement.before() {
            self.normalise(rows, &self.norm_arguments(x, out, norm)?)?;
        } else {
            let width = hidden as u32;
            let activation = activation::NONE;
            self.activate(rows, &ActivateArguments { x, up: 0, gather: 0, out, width, activation })?;
        }
        Ok(Input { rows: out, columns: hidden, tokens: rows })
    }

    /// `out` (`[tokens, features]`) from `input`.
    pub(super) fn product(
        &self,
        input: Input,
        linear: &LinearTensors,
        out: u64,
        accumulate: bool,
    ) -> Result<(), ExecuteError> {
        if input.tokens == 0 {
            return Ok(());
        }
        let (bias, bias_type) = self.optional(linear.bias.as_ref())?;
        let arguments = ProductArguments {
            weight: self.address(&linear.weight)?,
            bias,
            bias_type,
            accumulate: u32::from(accumulate),
            ..product_arguments(input, &linear.weight, out)
        };
        let kind = ProductKind::for_tokens(input.tokens);
        let tiles = input.tokens.div_ceil(tile_tokens(kind, linear.weight.dtype));
        // SAFETY: the weight has its bytes (checked), the input its rows and columns, `out` room for the product.
        unsafe { launch_product(self.kernels, kind, linear.weight.dtype, tiles, &arguments) }
    }

    /// Adds what the adapters of the rows make of `input` to products of the base, `[rows, features]` each.
    fn update(
        &mut self,
        layer: usize,
        input: Input,
        products: &[(LayerRole, u64, usize)],
    ) -> Result<(), ExecuteError> {
        if self.pass.adapters.is_empty() {
            return Ok(());
        }
        for &(matrix, out, width) in products {
            let mut most_rank = 0;
            let mut entries = Vec::new();
            for (slot, adapter) in self.pass.adapters.iter().enumerate() {
                let Some((a, b, scale)) = adapter.update(layer, matrix) else {
                    entries.push(FactorsEntry::default());
                    continue;
                };
                let factor = |tensor: &Tensor| self.weights.adapter_tensor(slot, tensor);
                most_rank = most_rank.max(a.rows);
                entries.push(FactorsEntry {
                    a: factor(a)?,
                    b: factor(b)?,
                    a_type: weight_type(a.dtype),
                    b_type: weight_type(b.dtype),
                    rank: a.rows as u32,
                    scale,
                });
            }
            if most_rank == 0 {
                continue;
            }
            let rows = self.rows();
            let mut tables = Tables::default();
            tables.push(entries);
            let arguments = LowRankArguments {
                x: input.rows.plain,
                inner: numbers(&mut self.memory().inner, rows * most_rank)?,
                out,
                adapters: self.table(self.pass.layout.adapters),
                factors: self.memory().factors.fill(tables.bytes())?,
                columns: input.columns as u32,
                width: width as u32,
                most_rank: most_rank as u32,
                unused: 0,
            };
            // SAFETY: factors have their bytes (checked), the input its rows and columns, `inner` a row of the largest
            // rank each, `out` the rows of the product.
            unsafe {
                self.kernels.low_rank_shrink(launch::low_rank(rows, most_rank, 8), &arguments)?;
                self.kernels.low_rank_expand(launch::low_rank(rows, width, 256), &arguments)?;
            }
        }
        Ok(())
    }

    /// Where a block's result goes, and whether it is added to what is there: to the residual stream, or aside.
    pub(super) fn block_output(&mut self, apart: bool) -> Result<(u64, bool), ExecuteError> {
        let elements = self.rows() * self.model.spec.hidden;
        let block = numbers(&mut self.memory().block, elements)?;
        Ok(if apart { (block, false) } else { (self.pass.memory.x.address(), true) })
    }

    /// What comes after a block: its norm, if there is one, and the sum with the residual stream where that has not
    /// been done by the block itself.
    fn after_block(
        &mut self,
        norm: &NormTensors,
        post_norm: Option<&NormTensors>,
    ) -> Result<(), ExecuteError> {
        if self.model.spec.norm_placement == NormPlacement::Post {
            self.normalise_in_place(norm)?;
        }
        if let Some(norm) = post_norm {
            let Memory { x, block, .. } = &self.pass.memory;
            let out = RowsOut { plain: x.address(), ..RowsOut::default() };
            let arguments =
                NormArguments { accumulate: 1, ..self.norm_arguments(block.address(), out, norm)? };
            self.normalise(self.rows(), &arguments)?;
        }
        Ok(())
    }

    pub(super) fn apart(&self) -> bool {
        self.model.spec.norm_placement == NormPlacement::Sandwich
    }

    fn attention(&mut self, layer: &Layer, index: usize) -> Result<(), ExecuteError> {
        let (rows, model) = (self.rows(), self.model);
        let spec = &model.spec;
        let (query_width, key_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let input =
            self.block_input(&layer.attn_norm, Needs::of([&layer.query, &layer.key, &layer.value]))?;
        let Memory { query, key, value, .. } = self.memory();
        let query = numbers(query, rows * query_width)?;
        let key = numbers(key, rows * key_width)?;
        let value = numbers(value, rows * key_width)?;
        self.product(input, &layer.query, query, false)?;
        self.product(input, &layer.key, key, false)?;
        self.product(input, &layer.value, value, false)?;
        let products = [
            (LayerRole::Query, query, query_width),
            (LayerRole::Key, key, key_width),
            (LayerRole::Value, value, key_width),
        ];
        self.update(index, input, &products)?;

        let by_matrix = model.kv_shape.is_some_and(|shape| shape.element == KvElement::F16);
        let size = launch::attention_size(spec.head_dim).filter(|_| by_matrix);
        let query_f16 = match size {
            Some(_) => self.memory().query_f16.reserve(rows * query_width * 2)?,
            None => 0,
        };
        self.prepare(layer, index, query_f16)?;

        let needs = Needs::of([&layer.attn_out]);
        let out = self.memory().attended.reserve(rows, query_width, needs)?;
        match size {
            Some(size) => self.attend(layer, index, size, out.plain)?,
            None => self.attend_plain(layer, index, out.plain)?,
        }
        if needs.bf16 || needs.f16 {
            let arguments = ActivateArguments {
                x: out.plain,
                out,
                width: query_width as u32,
                activation: activation::NONE,
                ..ActivateArguments::default()
            };
            self.activate(rows, &arguments)?;
        }
        let attended = Input { rows: out, columns: query_width, tokens: rows };
        let (out, accumulate) = self.block_output(self.apart() || spec.parallel_residual)?;
        self.product(attended, &layer.attn_out, out, accumulate)?;
        self.update(index, attended, &[(LayerRole::AttnOut, out, spec.hidden)])?;
        self.after_block(&layer.attn_norm, layer.attn_post_norm.as_ref())
    }

    /// Bytes before a layer in a KV block.
    fn layer_offset(&self, index: usize) -> u64 {
        let bytes = self.model.kv().map_or(0, |layout| layout.block_bytes);
        (bytes / self.model.spec.layers * index) as u64
    }

    fn prepare(&self, layer: &Layer, index: usize, query_f16: u64) -> Result<(), ExecuteError> {
        let model = self.model;
        let spec = &model.spec;
        let Memory { query, key, value, angles, local_angles, blocks, .. } = &self.pass.memory;
        let (angles, rotation) = match &model.local_rotation {
            Some(rotation) if layer.local_rotation => (local_angles, rotation),
            _ => (angles, &model.rotation),
        };
        let (query_norm, query_norm_type) = self.optional(layer.query_norm.as_ref())?;
        let (key_norm, key_norm_type) = self.optional(layer.key_norm.as_ref())?;
        let (Norm::Rms { epsilon } | Norm::Layer { epsilon }) = spec.norm;
        let arguments = PrepareArguments {
            query: query.address(),
            key: key.address(),
            value: value.address(),
            query_f16,
            angles: angles.address(),
            query_norm,
            key_norm,
            positions: self.table(self.pass.layout.positions),
            sequences: self.table(self.pass.layout.sequences),
            blocks: if model.kv_shape.is_some() { blocks.address() } else { 0 },
            first_block: self.table(self.pass.layout.first_block),
            layer_offset: self.layer_offset(index),
            heads: spec.heads as u32,
            kv_heads: spec.kv_heads as u32,
            head_dim: spec.head_dim as u32,
            half: rotation.frequencies.len() as u32,
            query_norm_type,
            key_norm_type,
            epsilon,
            offset: if spec.norm_plus_one { 1.0 } else { 0.0 },
            cache_f32: u32::from(model.kv_shape.is_some_and(|shape| shape.element == KvElement::F32)),
            unused: 0,
        };
        let launch = launch::heads(self.rows(), 1);
        // SAFETY: the heads of all rows are in their buffers, and every row's position in a block (checked).
        unsafe { self.kernels.prepare(launch, &arguments) }?;
        Ok(())
    }

    fn scoring(&self, layer: &Layer) -> (f32, f32, u32) {
        let spec = &self.model.spec;
        let scale = spec.query_scale.unwrap_or_else(|| 1.0 / (spec.head_dim as f32).sqrt());
        (scale, spec.attention_cap.unwrap_or(0.0), layer.window.unwrap_or(0) as u32)
    }

    fn attend(&mut self, layer: &Layer, index: usize, size: usize, out: u64) -> Result<(), ExecuteError> {
        let spec = &self.model.spec;
        let (scale, cap, window) = self.scoring(layer);
        let partials =
            numbers(&mut self.pass.memory.partials, self.pass.cut.slots * spec.heads * (2 + spec.head_dim))?;
        let layout = &self.pass.layout;
        let arguments = AttendArguments {
            query: self.pass.memory.query_f16.address(),
            out,
            items: 0,
            positions: self.table(layout.positions),
            blocks: self.pass.memory.blocks.address(),
            first_block: self.table(layout.first_block),
            partials,
            layer_offset: self.layer_offset(index),
            heads: spec.heads as u32,
            kv_heads: spec.kv_heads as u32,
            head_dim: spec.head_dim as u32,
            window,
            scale,
            cap,
        };
        let cut = &self.pass.cut;
        for (many, items, offset) in [(false, &cut.few, layout.few), (true, &cut.many, layout.many)] {
            if !items.is_empty() {
                let arguments = AttendArguments { items: self.table(offset), ..arguments };
                // SAFETY: items are of rows and sequences of the batch, whose positions are in their blocks (checked);
                // every slot has its place.
                unsafe { self.kernels.attend(size, many, items.len(), &arguments) }?;
            }
        }
        if !cut.merges.is_empty() {
            let arguments = MergeArguments {
                partials,
                out,
                merges: self.table(layout.merges),
                heads: spec.heads as u32,
                head_dim: spec.head_dim as u32,
            };
            let launch = launch::heads(cut.merges.len(), spec.heads);
            // SAFETY: merges are of rows of the batch and of slots that items have filled.
            unsafe { self.kernels.attend_merge(launch, &arguments) }?;
        }
        Ok(())
    }

    fn attend_plain(&self, layer: &Layer, index: usize, out: u64) -> Result<(), ExecuteError> {
        let spec = &self.model.spec;
        let (scale, cap, window) = self.scoring(layer);
        let Memory { query, key, value, blocks, .. } = &self.pass.memory;
        let cached = self.model.kv_shape.is_some();
        let fresh = |buffer: &Buffer| if cached { 0 } else { buffer.address() };
        let arguments = PlainAttendArguments {
            query: query.address(),
            out,
            key: fresh(key),
            value: fresh(value),
            positions: self.table(self.pass.layout.positions),
            sequences: self.table(self.pass.layout.sequences),
            blocks: blocks.address(),
            first_block: self.table(self.pass.layout.first_block),
            sequence_rows: self.table(self.pass.layout.sequence_rows),
            layer_offset: self.layer_offset(index),
            heads: spec.heads as u32,
            kv_heads: spec.kv_heads as u32,
            head_dim: spec.head_dim as u32,
            window,
            scale,
            cap,
            cache_f32: u32::from(self.model.kv_shape.is_some_and(|shape| shape.element == KvElement::F32)),
            bidirectional: u32::from(spec.attention == Attention::Bidirectional),
        };
        let launch = launch::attend_plain(self.rows(), spec.heads, spec.head_dim);
        // SAFETY: as for `attend`; where nothing is cached, sequences are whole.
        unsafe { self.kernels.attend_plain(launch, &arguments) }?;
        Ok(())
    }

    fn mlp(&mut self, layer: &Layer, index: usize) -> Result<(), ExecuteError> {
        match &layer.mlp {
            MlpTensors::Dense(tensors) => self.dense(layer, tensors, index)?,
            MlpTensors::Sparse { router, experts } => self.sparse(layer, router, experts)?,
        }
        self.after_block(&layer.mlp_norm, layer.mlp_post_norm.as_ref())
    }

    fn dense(&mut self, layer: &Layer, tensors: &FeedForward, index: usize) -> Result<(), ExecuteError> {
        let (rows, width) = (self.rows(), tensors.up.weight.rows);
        let needs = Needs::of(tensors.gate.iter().chain([&tensors.up]));
        let input = self.block_input(&layer.mlp_norm, needs)?;
        let needs = Needs::of([&tensors.down]);
        let out = self.memory().gate.reserve(rows, width, needs)?;
        let up = match &tensors.gate {
            Some(gate) => {
                let up = numbers(&mut self.memory().up, rows * width)?;
                self.product(input, gate, out.plain, false)?;
                self.product(input, &tensors.up, up, false)?;
                self.update(
                    index,
                    input,
                    &[(LayerRole::Gate, out.plain, width), (LayerRole::Up, up, width)],
                )?;
                up
            }
            None => {
                self.product(input, &tensors.up, out.plain, false)?;
                self.update(index, input, &[(LayerRole::Up, out.plain, width)])?;
                0
            }
        };
        self.activate_inner(rows, width, up, out)?;
        let inner = Input { rows: out, columns: width, tokens: rows };
        let (out, accumulate) = self.block_output(self.apart())?;
        self.product(inner, &tensors.down, out, accumulate)?;
        self.update(index, inner, &[(LayerRole::Down, out, self.model.spec.hidden)])
    }

    /// The activation of a feed-forward block, in place; `up` is 0 without a gate.
    pub(super) fn activate_inner(
        &self,
        rows: usize,
        width: usize,
        up: u64,
        out: RowsOut,
    ) -> Result<(), ExecuteError> {
        let activation = match self.model.spec.mlp {
            Mlp::GatedSilu => activation::SILU_GATE,
            Mlp::GatedGeluTanh => activation::GELU_TANH_GATE,
            Mlp::Gelu => activation::GELU,
            Mlp::GeluTanh => activation::GELU_TANH,
            Mlp::Relu => activation::RELU,
        };
        let width = width as u32;
        self.activate(rows, &ActivateArguments { x: out.plain, up, gather: 0, out, width, activation })
    }
}

/// Tokens of a tile of the kernel that is used for weights of this type.
fn tile_tokens(kind: ProductKind, dtype: DType) -> usize {
    if dtype == DType::F32 { launch::F32_TILE_TOKENS } else { kind.tile_tokens() }
}

/// Everything but the addresses of weight and bias.
pub(super) fn product_arguments(input: Input, weight: &Tensor, out: u64) -> ProductArguments {
    let (x, scales) = match weight.dtype {
        DType::F32 => (input.rows.plain, 0),
        DType::BF16 => (input.rows.bf16, 0),
        _ => (input.rows.f16, input.rows.scales),
    };
    ProductArguments {
        x,
        scales,
        out,
        row_bytes: weight.row_bytes() as u64,
        rows: weight.rows as u32,
        columns: weight.columns as u32,
        tokens: input.tokens as u32,
        aligned: u32::from(weight.columns.is_multiple_of(32)),
        ..ProductArguments::default()
    }
}

/// # Safety
/// As for [`Kernels::product`].
pub(super) unsafe fn launch_product(
    kernels: &Kernels,
    kind: ProductKind,
    dtype: DType,
    tiles: usize,
    arguments: &ProductArguments,
) -> Result<(), ExecuteError> {
    // SAFETY: as the caller says.
    unsafe {
        match dtype {
            DType::F32 => {
                kernels.product_f32(launch::product_f32(arguments.rows as usize, tiles), arguments)?
            }
            _ => kernels.product(kind, dtype, tiles, arguments)?,
        }
    }
    Ok(())
}

/// Bytes of a rotation's frequencies among the constants.
fn frequency_bytes(rotation: &Rotation) -> usize {
    (rotation.frequencies.len() * 4).next_multiple_of(constants::ALIGNMENT)
}

/// A model's rotations: of all sequences or the short ones, of the long ones, of local layers.
fn rotations(model: &Model) -> [Option<&Rotation>; 3] {
    let long = model.short_context().map(|_| model.long_rotation());
    [Some(&model.rotation), long, model.local_rotation.as_ref()]
}

/// Where their frequencies begin among the constants.
fn rotation_starts(model: &Model) -> [usize; 3] {
    let mut end = 0;
    rotations(model).map(|rotation| {
        let start = end;
        end += rotation.map_or(0, frequency_bytes);
        start
    })
}

/// Cosines and sines of every row's angles, to a buffer.
fn fill_angles(
    kernels: &Kernels,
    rows: usize,
    angles: &mut Buffer,
    arguments: AngleArguments,
) -> Result<(), ExecuteError> {
    if arguments.half == 0 {
        return Ok(());
    }
    let out = numbers(angles, rows * arguments.half as usize * 2)?;
    let arguments = AngleArguments { out, ..arguments };
    let launch = super::Launch { grid: [rows as u32, 1, 1], threads: 64, shared_bytes: 0 };
    // SAFETY: there is a frequency for each pair, and room for two numbers per row and pair.
    unsafe { kernels.angles(launch, &arguments) }?;
    Ok(())
}
