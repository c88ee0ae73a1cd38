//! The stages of a forward pass, for every family that a spec can describe.
//!
//! This file only puts kernels in order. It must not compute anything itself whose result could depend on the batch.

use tangram_checkpoint::{LayerRole, Norm, NormPlacement, Output, Pooling, ScoreActivation};

use crate::adapter::Adapted;
use crate::executor::{Executor, Memory, Pass, PassError, Weights};
use crate::kernels::attention::{Heads, Keys, Preparation, Scoring, attend, prepare};
use crate::kernels::elementwise::{
    NormWeights, activate, activate_gate, add, add_scaled, cap, length, normalise, normalise_in_place,
};
use crate::kernels::kv::{KvBlocks, KvView};
use crate::kernels::low_rank::add_low_rank;
use crate::kernels::matmul::{Linear, matmul};
use crate::kernels::routing::route;
use crate::kernels::{Buffer, dequantise_row};
use crate::model::{FeedForward, Layer, LinearTensors, MlpTensors, Model, NormTensors, Scorer, Tensor};

/// Runs the stages from `pass.stage` to `ready_stages`.
pub(crate) fn run(
    executor: &Executor,
    pass: &mut Pass,
    model: &Model,
    weights: &dyn Weights,
    kv: &mut [KvBlocks<'_>],
    ready_stages: usize,
) -> Result<(), PassError> {
    let adapted = pass.adapted.as_ref();
    let step = Step {
        executor,
        model,
        weights,
        adapted,
        rows: pass.rows,
        output_rows: pass.output_rows,
        early_rows: pass.early_rows.as_ref().map(|rows| &***rows),
    };
    let mut table = std::mem::take(&mut pass.memory.kv);
    let result = (|| {
        let places = &pass.memory.places;
        let mut view = match model.kv_shape {
            Some(_) if kv.len() != places.len() => {
                return Err(PassError::KvCount { chunks: places.len(), given: kv.len() });
            }
            Some(shape) => Some(table.bind(
                shape,
                kv,
                places.iter().map(|place| place.position..place.position + place.tokens),
            )?),
            None => None,
        };
        while pass.stage < ready_stages.min(model.spec.stages()) {
            match pass.stage {
                0 => step.embed(&mut pass.memory)?,
                stage if stage <= model.layers.len() => {
                    step.layer(&mut pass.memory, stage - 1, view.as_mut())?
                }
                _ => {
                    step.check_early_rows(&pass.memory)?;
                    step.head(&mut pass.memory)?;
                }
            }
            pass.stage += 1;
        }
        Ok(())
    })();
    pass.memory.kv = table;
    result
}

/// What all stages of a pass share.
struct Step<'a> {
    executor: &'a Executor,
    model: &'a Model,
    weights: &'a dyn Weights,
    adapted: Option<&'a Adapted>,
    rows: usize,
    output_rows: usize,
    early_rows: Option<&'a [u8]>,
}

impl<'a> Step<'a> {
    fn bytes(&self, tensor: &Tensor) -> Result<&'a [u8], PassError> {
        let bytes = self.weights.tensor(tensor.index);
        if bytes.len() != tensor.bytes {
            let (index, expected, found) = (tensor.index, tensor.bytes, bytes.len());
            return Err(PassError::TensorBytes { index, expected, found });
        }
        Ok(bytes)
    }

    /// Row `row` of a matrix, widened.
    fn row(&self, tensor: &Tensor, row: usize, out: &mut [f32]) -> Result<(), PassError> {
        dequantise_row(self.executor.isa, tensor.dtype, self.row_bytes(tensor, row)?, out);
        Ok(())
    }

    fn row_bytes(&self, tensor: &Tensor, row: usize) -> Result<&'a [u8], PassError> {
        let start = row * tensor.row_bytes();
        Ok(&self.bytes(tensor)?[start..start + tensor.row_bytes()])
    }

    /// The row of the token embedding for row `row` of the batch, which has this token, widened.
    fn token_row(&self, row: usize, token: u32, out: &mut [f32]) -> Result<(), PassError> {
        let tensor = &self.model.token_embedding;
        let Some(early) = self.early_rows else { return self.row(tensor, token as usize, out) };
        let bytes = early.chunks_exact(tensor.row_bytes()).nth(row).ok_or(PassError::EarlyRows)?;
        dequantise_row(self.executor.isa, tensor.dtype, bytes, out);
        Ok(())
    }

    /// Compares the rows that came early with the embedding, which was verified.
    fn check_early_rows(&self, memory: &Memory) -> Result<(), PassError> {
        let Some(early) = self.early_rows else { return Ok(()) };
        let tensor = &self.model.token_embedding;
        for (&token, early) in memory.tokens.iter().zip(early.chunks_exact(tensor.row_bytes())) {
            if self.row_bytes(tensor, token as usize)? != early {
                return Err(PassError::EarlyRows);
            }
        }
        Ok(())
    }

    /// Widens several biases at once.
    fn biases<'b, const N: usize>(
        &self,
        buffer: &'b mut Buffer,
        tensors: [Option<&Tensor>; N],
    ) -> Result<[Option<&'b [f32]>; N], PassError> {
        self.vectors(buffer, 0.0, tensors)
    }

    /// Widens several weights of norms at once.
    fn norm_weights<'b, const N: usize>(
        &self,
        buffer: &'b mut Buffer,
        tensors: [Option<&Tensor>; N],
    ) -> Result<[Option<&'b [f32]>; N], PassError> {
        self.vectors(buffer, if self.model.spec.norm_plus_one { 1.0 } else { 0.0 }, tensors)
    }

    /// Widens several vectors and adds `offset` to their elements.
    fn vectors<'b, const N: usize>(
        &self,
        buffer: &'b mut Buffer,
        offset: f32,
        tensors: [Option<&Tensor>; N],
    ) -> Result<[Option<&'b [f32]>; N], PassError> {
        let total = tensors.iter().flatten().map(|tensor| tensor.columns).sum();
        let mut rest = buffer.get_mut(total);
        let mut vectors = [None; N];
        for (tensor, vector) in tensors.iter().zip(&mut vectors) {
            if let Some(tensor) = tensor {
                let (values, others) = rest.split_at_mut(tensor.columns);
                rest = others;
                self.row(tensor, 0, values)?;
                if offset != 0.0 {
                    values.iter_mut().for_each(|value| *value += offset);
                }
                *vector = Some(&*values);
            }
        }
        Ok(vectors)
    }

    fn norm<'b>(&self, buffer: &'b mut Buffer, tensors: &NormTensors) -> Result<NormWeights<'b>, PassError> {
        let [weight, bias] = self.norm_weights(buffer, [Some(&tensors.weight), tensors.bias.as_ref()])?;
        Ok(NormWeights { norm: self.model.spec.norm, weight: weight.unwrap_or(&[]), bias })
    }

    fn linear<'b>(
        &self,
        tensors: &LinearTensors,
        bias: Option<&'b [f32]>,
        out: &'b mut [f32],
        accumulate: bool,
    ) -> Result<Linear<'b>, PassError>
    where
        'a: 'b,
    {
        let Tensor { dtype, rows, .. } = tensors.weight;
        Ok(Linear { weight: self.bytes(&tensors.weight)?, dtype, rows, bias, out, accumulate })
    }

    /// Stage 0: the residual stream from token ids.
    fn embed(&self, memory: &mut Memory) -> Result<(), PassError> {
        let Executor { isa, pool, .. } = self.executor;
        let spec = &self.model.spec;
        let hidden = spec.hidden;
        let x = memory.x.get_mut(self.rows * hidden);
        let addend = memory.h.get_mut(hidden);
        for place in &memory.places {
            for token in 0..place.tokens {
                let row = place.row + token;
                let x = &mut x[row * hidden..(row + 1) * hidden];
                self.token_row(row, memory.tokens[row], x)?;
                if let Some(scale) = spec.embedding_scale {
                    x.iter_mut().for_each(|x| *x *= scale);
                }
                let position = place.position + token + spec.position_offset;
                let position = self.model.position_embedding.map(|tensor| (tensor, position));
                let second = place.position + token >= place.second && spec.token_types > Some(1);
                let token_type = self.model.type_embedding.map(|tensor| (tensor, usize::from(second)));
                // Token type before position: the order in which the reference implementation of BERT adds.
                for (tensor, row) in token_type.into_iter().chain(position) {
                    self.row(&tensor, row, addend)?;
                    x.iter_mut().zip(&*addend).for_each(|(x, addend)| *x += addend);
                }
            }
        }
        if let Some(tensors) = &self.model.embedding_norm {
            let norm = self.norm(&mut memory.vectors, tensors)?;
            normalise_in_place(*isa, pool, norm, x);
        }
        Ok(())
    }

    /// One transformer layer.
    fn layer(&self, memory: &mut Memory, index: usize, kv: Option<&mut KvView<'_>>) -> Result<(), PassError> {
        let layer = &self.model.layers[index];
        if let Some(adapted) = self.adapted {
            adapted.check(self.weights, index)?;
        }
        self.attention(memory, layer, index, kv)?;
        self.mlp(memory, layer, index)?;
        if self.model.spec.parallel_residual {
            // Attention's part; the feed-forward block has added its own.
            self.add_block(memory);
        }
        Ok(())
    }

    /// Adds what the adapters of the rows make of `input` (`[rows, columns]`) to the products of the base's matrices,
    /// `[rows, features]` each.
    fn update<const N: usize>(
        &self,
        layer: usize,
        input: &[f32],
        columns: usize,
        products: [(LayerRole, &mut [f32]); N],
    ) {
        let Some(adapted) = self.adapted else { return };
        let Executor { isa, pool, .. } = self.executor;
        let matrices = products.each_ref().map(|(matrix, _)| *matrix);
        let outs = products.map(|(_, out)| {
            let width = out.len() / self.rows;
            (out, width)
        });
        let factors = |slot, matrix: usize| adapted.factors(self.weights, slot, layer, matrices[matrix]);
        add_low_rank(*isa, pool, &adapted.grouping, input, columns, outs, &factors);
    }

    /// Whether results of blocks are kept apart before they are added to the residual stream.
    fn apart(&self) -> bool {
        self.model.spec.norm_placement == NormPlacement::Sandwich
    }

    /// Adds the result of a block to the residual stream.
    fn add_block(&self, memory: &mut Memory) {
        let len = self.rows * self.model.spec.hidden;
        add(self.executor.isa, &self.executor.pool, memory.x.get_mut(len), memory.block.get(len));
    }

    /// What comes after a block: its norm, if there is one, and the sum with the residual stream where that has not
    /// been done by the block itself.
    fn after_block(
        &self,
        memory: &mut Memory,
        norm: &NormTensors,
        post_norm: Option<&NormTensors>,
    ) -> Result<(), PassError> {
        let Executor { isa, pool, .. } = self.executor;
        let len = self.rows * self.model.spec.hidden;
        if self.model.spec.norm_placement == NormPlacement::Post {
            normalise_in_place(*isa, pool, self.norm(&mut memory.vectors, norm)?, memory.x.get_mut(len));
        }
        if let Some(tensors) = post_norm {
            let block = memory.block.get_mut(len);
            normalise_in_place(*isa, pool, self.norm(&mut memory.vectors, tensors)?, block);
            self.add_block(memory);
        }
        Ok(())
    }

    fn attention(
        &self,
        memory: &mut Memory,
        layer: &Layer,
        index: usize,
        kv: Option<&mut KvView<'_>>,
    ) -> Result<(), PassError> {
        let Executor { isa, pool, .. } = self.executor;
        let (isa, rows, spec) = (*isa, self.rows, &self.model.spec);
        let before = spec.norm_placement.before();
        let Memory { spans, x, h, query, key, value, packed, vectors, block, .. } = memory;
        let shape = Heads { heads: spec.heads, kv_heads: spec.kv_heads, head_dim: spec.head_dim };
        let (query_width, key_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let x = x.get_mut(rows * spec.hidden);
        let query = query.get_mut(rows * query_width);
        let key = key.get_mut(rows * key_width);
        let value = value.get_mut(rows * key_width);

        if before {
            normalise(isa, pool, self.norm(vectors, &layer.attn_norm)?, x, h.get_mut(x.len()));
        }
        let input = if before { h.get(x.len()) } else { &*x };
        let biases = [layer.query.bias.as_ref(), layer.key.bias.as_ref(), layer.value.bias.as_ref()];
        let [query_bias, key_bias, value_bias] = self.biases(vectors, biases)?;
        let linears = [
            self.linear(&layer.query, query_bias, query, false)?,
            self.linear(&layer.key, key_bias, key, false)?,
            self.linear(&layer.value, value_bias, value, false)?,
        ];
        matmul(isa, pool, packed, input, spec.hidden, rows, linears);
        let products =
            [(LayerRole::Query, &mut *query), (LayerRole::Key, &mut *key), (LayerRole::Value, &mut *value)];
        self.update(index, input, spec.hidden, products);

        let (Norm::Rms { epsilon } | Norm::Layer { epsilon }) = spec.norm;
        let head_norm = |weight| NormWeights { norm: Norm::Rms { epsilon }, weight, bias: None };
        let [query_norm, key_norm] =
            self.norm_weights(vectors, [layer.query_norm.as_ref(), layer.key_norm.as_ref()])?;
        let (angles, rotation) = match &self.model.local_rotation {
            Some(rotation) if layer.local_rotation => (&memory.local_angles, rotation),
            _ => (&memory.angles, &self.model.rotation),
        };
        let half = rotation.frequencies.len();
        let preparation = Preparation {
            query_norm: query_norm.map(head_norm),
            key_norm: key_norm.map(head_norm),
            angles: angles.get(rows * half * 2),
            half,
        };
        let keys = match kv {
            Some(view) => {
                let cache = Some((&mut *view, index));
                prepare(isa, pool, shape, preparation, spans, cache, query, key, value);
                Keys::Cached(view, index)
            }
            None => {
                prepare(isa, pool, shape, preparation, spans, None, query, key, value);
                Keys::Fresh(key, value)
            }
        };
        let attended = h.get_mut(rows * query_width);
        let scale = spec.query_scale.unwrap_or_else(|| 1.0 / (shape.head_dim as f32).sqrt());
        let scoring = Scoring { scale, cap: spec.attention_cap, window: layer.window };
        attend(isa, pool, shape, scoring, spans, keys, query, attended);

        let apart = self.apart() || spec.parallel_residual;
        let out = if apart { block.get_mut(x.len()) } else { x };
        let [bias] = self.biases(vectors, [layer.attn_out.bias.as_ref()])?;
        let linears = [self.linear(&layer.attn_out, bias, out, !apart)?];
        matmul(isa, pool, packed, attended, query_width, rows, linears);
        self.update(index, attended, query_width, [(LayerRole::AttnOut, out)]);
        self.after_block(memory, &layer.attn_norm, layer.attn_post_norm.as_ref())
    }

    fn mlp(&self, memory: &mut Memory, layer: &Layer, index: usize) -> Result<(), PassError> {
        let Executor { isa, pool, .. } = self.executor;
        let (isa, rows, spec) = (*isa, self.rows, &self.model.spec);
        let len = rows * spec.hidden;
        if spec.norm_placement.before() {
            let Memory { x, h, vectors, .. } = memory;
            normalise(isa, pool, self.norm(vectors, &layer.mlp_norm)?, x.get(len), h.get_mut(len));
        }
        match &layer.mlp {
            MlpTensors::Dense(tensors) => {
                let apart = self.apart();
                let Memory { x, h, gate, up, packed, vectors, block, .. } = memory;
                let mut inner = Inner { gate, up, packed, vectors };
                let input = if spec.norm_placement.before() { h.get(len) } else { x.get(len) };
                self.widen(&mut inner, tensors, input, rows, Some(index))?;
                let out = if apart { block } else { x };
                self.narrow(&mut inner, tensors, rows, out.get_mut(len), !apart, Some(index))?;
            }
            MlpTensors::Sparse { router, experts } => self.sparse(memory, router, experts)?,
        }
        self.after_block(memory, &layer.mlp_norm, layer.mlp_post_norm.as_ref())
    }

    /// The first half of a feed-forward block: its inner activations for `rows` rows of `input`. `layer` is not given
    /// for an expert, which adapters do not change.
    fn widen(
        &self,
        inner: &mut Inner<'_>,
        tensors: &FeedForward,
        input: &[f32],
        rows: usize,
        layer: Option<usize>,
    ) -> Result<(), PassError> {
        let Executor { isa, pool, .. } = self.executor;
        let (isa, spec) = (*isa, &self.model.spec);
        let len = rows * tensors.up.weight.rows;
        let up = inner.up.get_mut(len);
        let gate_bias = tensors.gate.as_ref().and_then(|gate| gate.bias.as_ref());
        let [gate_bias, up_bias] = self.biases(inner.vectors, [gate_bias, tensors.up.bias.as_ref()])?;
        match &tensors.gate {
            Some(of_gate) => {
                let gate = inner.gate.get_mut(len);
                let linears = [
                    self.linear(of_gate, gate_bias, gate, false)?,
                    self.linear(&tensors.up, up_bias, up, false)?,
                ];
                matmul(isa, pool, inner.packed, input, spec.hidden, rows, linears);
                if let Some(layer) = layer {
                    let products = [(LayerRole::Gate, &mut *gate), (LayerRole::Up, &mut *up)];
                    self.update(layer, input, spec.hidden, products);
                }
                activate_gate(isa, pool, spec.mlp, gate, up);
            }
            None => {
                let linears = [self.linear(&tensors.up, up_bias, up, false)?];
                matmul(isa, pool, inner.packed, input, spec.hidden, rows, linears);
                if let Some(layer) = layer {
                    self.update(layer, input, spec.hidden, [(LayerRole::Up, &mut *up)]);
                }
                activate(isa, pool, spec.mlp, up);
            }
        }
        Ok(())
    }

    /// The second half: from the inner activations to `out`.
    fn narrow(
        &self,
        inner: &mut Inner<'_>,
        tensors: &FeedForward,
        rows: usize,
        out: &mut [f32],
        accumulate: bool,
        layer: Option<usize>,
    ) -> Result<(), PassError> {
        let Executor { isa, pool, .. } = self.executor;
        let width = tensors.up.weight.rows;
        let activated = if tensors.gate.is_some() { &*inner.gate } else { &*inner.up };
        let [bias] = self.biases(inner.vectors, [tensors.down.bias.as_ref()])?;
        let linears = [self.linear(&tensors.down, bias, out, accumulate)?];
        let activated = activated.get(rows * width);
        matmul(*isa, pool, inner.packed, activated, width, rows, linears);
        if let Some(layer) = layer {
            self.update(layer, activated, width, [(LayerRole::Down, out)]);
        }
        Ok(())
    }

    /// A feed-forward block with experts. Only the weights of experts that some row goes to are touched. A row adds up
    /// its experts in their order, whatever the other rows do.
    fn sparse(
        &self,
        memory: &mut Memory,
        router: &LinearTensors,
        experts: &[FeedForward],
    ) -> Result<(), PassError> {
        let Executor { isa, pool, .. } = self.executor;
        let (isa, rows, spec) = (*isa, self.rows, &self.model.spec);
        let Some(settings) = &spec.experts else { return Ok(()) };
        let hidden = spec.hidden;
        let Memory { h, gate, up, packed, vectors, block, scores, routes, .. } = memory;
        let input = h.get(rows * hidden);
        let scores = scores.get_mut(rows * experts.len());
        matmul(isa, pool, packed, input, hidden, rows, [self.linear(router, None, scores, false)?]);
        route(scores, experts.len(), settings.per_token, settings.normalise, routes);
        let block = block.get_mut(rows * hidden);
        block.fill(0.0);
        let mut inner = Inner { gate, up, packed, vectors };
        for routes in routes.chunk_by(|a, b| a.expert == b.expert) {
            let tensors = &experts[routes[0].expert];
            let input_rows = memory.expert_input.get_mut(routes.len() * hidden);
            for (route, to) in routes.iter().zip(input_rows.chunks_exact_mut(hidden)) {
                to.copy_from_slice(&input[route.row * hidden..(route.row + 1) * hidden]);
            }
            self.widen(&mut inner, tensors, input_rows, routes.len(), None)?;
            let out = memory.expert_output.get_mut(routes.len() * hidden);
            self.narrow(&mut inner, tensors, routes.len(), out, false, None)?;
            for (route, out) in routes.iter().zip(out.chunks_exact(hidden)) {
                let to = &mut block[route.row * hidden..(route.row + 1) * hidden];
                add_scaled(isa, to, out, route.weight);
            }
        }
        if !self.apart() {
            self.add_block(memory);
        }
        Ok(())
    }

    /// The last stage: logits of the rows that want them, or one vector or score per chunk.
    fn head(&self, memory: &mut Memory) -> Result<(), PassError> {
        match self.model.spec.output {
            Output::Logits { .. } => self.logits(memory),
            Output::Embedding { pooling, normalise } => self.pool_rows(memory, pooling, normalise),
            Output::Score { activation } => self.score(memory, activation),
        }
    }

    fn logits(&self, memory: &mut Memory) -> Result<(), PassError> {
        let Executor { isa, pool, .. } = self.executor;
        let hidden = self.model.spec.hidden;
        let Memory { places, x, h, packed, vectors, output, .. } = memory;
        let x = x.get(self.rows * hidden);
        let h = h.get_mut(self.output_rows * hidden);
        for place in places {
            // The chunk's last rows.
            let from = (place.row + place.tokens - place.output_rows) * hidden;
            let len = place.output_rows * hidden;
            h[place.output_row * hidden..][..len].copy_from_slice(&x[from..from + len]);
        }
        if let Some(tensors) = &self.model.final_norm {
            normalise_in_place(*isa, pool, self.norm(vectors, tensors)?, h);
        }
        if let Some(tensor) = &self.model.output {
            let &Tensor { dtype, rows, .. } = tensor;
            let out = output.get_mut(self.output_rows * rows);
            let linear =
                Linear { weight: self.bytes(tensor)?, dtype, rows, bias: None, out, accumulate: false };
            matmul(*isa, pool, packed, h, hidden, self.output_rows, [linear]);
            if let Some(limit) = self.model.spec.logit_cap {
                cap(*isa, pool, limit, output.get_mut(self.output_rows * rows));
            }
        }
        Ok(())
    }

    fn score(&self, memory: &mut Memory, activation: ScoreActivation) -> Result<(), PassError> {
        let Executor { isa, pool, .. } = self.executor;
        let Some(Scorer { pooler, classifier }) = &self.model.scorer else { return Ok(()) };
        let (hidden, rows) = (self.model.spec.hidden, self.output_rows);
        let Memory { places, x, h, block, packed, vectors, output, .. } = memory;
        let x = x.get(self.rows * hidden);
        let first = h.get_mut(rows * hidden);
        for (place, first) in places.iter().zip(first.chunks_exact_mut(hidden)) {
            first.copy_from_slice(&x[place.row * hidden..(place.row + 1) * hidden]);
        }
        let pooled = block.get_mut(rows * hidden);
        let [bias] = self.biases(vectors, [pooler.bias.as_ref()])?;
        matmul(*isa, pool, packed, first, hidden, rows, [self.linear(pooler, bias, pooled, false)?]);
        pooled.iter_mut().for_each(|value| *value = value.tanh());
        let scores = output.get_mut(rows);
        let [bias] = self.biases(vectors, [classifier.bias.as_ref()])?;
        matmul(*isa, pool, packed, pooled, hidden, rows, [self.linear(classifier, bias, scores, false)?]);
        if activation == ScoreActivation::Sigmoid {
            scores.iter_mut().for_each(|score| *score = 1.0 / (1.0 + (-*score).exp()));
        }
        Ok(())
    }

    fn pool_rows(&self, memory: &mut Memory, pooling: Pooling, unit_length: bool) -> Result<(), PassError> {
        let Executor { isa, pool, .. } = self.executor;
        let hidden = self.model.spec.hidden;
        let Memory { places, x, vectors, output, .. } = memory;
        let x = x.get_mut(self.rows * hidden);
        if let Some(tensors) = &self.model.final_norm {
            normalise_in_place(*isa, pool, self.norm(vectors, tensors)?, x);
        }
        let output = output.get_mut(self.output_rows * hidden);
        for (place, out) in places.iter().zip(output.chunks_exact_mut(hidden)) {
            let states = &x[place.row * hidden..(place.row + place.tokens) * hidden];
            out.copy_from_slice(&states[..hidden]);
            if pooling == Pooling::Mean {
                for state in states.chunks_exact(hidden).skip(1) {
                    out.iter_mut().zip(state).for_each(|(out, state)| *out += state);
                }
                let count = place.tokens as f32;
                out.iter_mut().for_each(|out| *out /= count);
            }
            if unit_length {
                // The lower bound is that of the reference implementations.
                let length = length(*isa, out).max(1e-12);
                out.iter_mut().for_each(|out| *out /= length);
            }
        }
        Ok(())
    }
}

/// The memory that a feed-forward block works in.
struct Inner<'a> {
    gate: &'a mut Buffer,
    up: &'a mut Buffer,
    packed: &'a mut Buffer,
    vectors: &'a mut Buffer,
}
