//! The stages of a forward pass, for every family that a spec can describe.
//!
//! This file only puts kernels in order. It must not compute anything itself whose result could depend on the batch.

use tangram_checkpoint::{Norm, NormPlacement, Output, Pooling};
use tangram_device::Extent;

use crate::executor::{Executor, Memory, Pass, PassError, Weights};
use crate::kernels::attention::{Heads, Keys, Preparation, attend, prepare};
use crate::kernels::elementwise::{NormWeights, gelu, length, normalise, normalise_in_place, silu_mul};
use crate::kernels::kv::KvView;
use crate::kernels::matmul::{Linear, matmul};
use crate::kernels::{Buffer, dequantise_row};
use crate::model::{Layer, LinearTensors, Model, NormTensors, Tensor};

/// Runs the stages from `pass.stage` to `ready_stages`.
pub(crate) fn run(
    executor: &Executor,
    pass: &mut Pass,
    model: &Model,
    weights: &dyn Weights,
    kv: &mut [&mut [Extent]],
    ready_stages: usize,
) -> Result<(), PassError> {
    let step = Step { executor, model, weights, rows: pass.rows, output_rows: pass.output_rows };
    let mut table = std::mem::take(&mut pass.memory.kv);
    let result = (|| {
        let places = &pass.memory.places;
        let mut view = match model.kv_shape {
            Some(_) if kv.len() != places.len() => {
                return Err(PassError::KvCount { chunks: places.len(), given: kv.len() });
            }
            Some(shape) => {
                Some(table.bind(shape, kv, places.iter().map(|place| place.position + place.tokens))?)
            }
            None => None,
        };
        while pass.stage < ready_stages.min(model.spec.stages()) {
            match pass.stage {
                0 => step.embed(&mut pass.memory)?,
                stage if stage <= model.layers.len() => {
                    step.layer(&mut pass.memory, stage - 1, view.as_mut())?
                }
                _ => step.head(&mut pass.memory)?,
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
    rows: usize,
    output_rows: usize,
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
        let start = row * tensor.row_bytes();
        let bytes = &self.bytes(tensor)?[start..start + tensor.row_bytes()];
        dequantise_row(self.executor.isa, tensor.dtype, bytes, out);
        Ok(())
    }

    /// Widens several vectors at once.
    fn vectors<'b, const N: usize>(
        &self,
        buffer: &'b mut Buffer,
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
                *vector = Some(&*values);
            }
        }
        Ok(vectors)
    }

    fn norm<'b>(&self, buffer: &'b mut Buffer, tensors: &NormTensors) -> Result<NormWeights<'b>, PassError> {
        let [weight, bias] = self.vectors(buffer, [Some(&tensors.weight), tensors.bias.as_ref()])?;
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
        let hidden = self.model.spec.hidden;
        let x = memory.x.get_mut(self.rows * hidden);
        let addend = memory.h.get_mut(hidden);
        for place in &memory.places {
            for token in 0..place.tokens {
                let row = place.row + token;
                let x = &mut x[row * hidden..(row + 1) * hidden];
                self.row(&self.model.token_embedding, memory.tokens[row] as usize, x)?;
                let position = self.model.position_embedding.map(|tensor| (tensor, place.position + token));
                let token_type = self.model.type_embedding.map(|tensor| (tensor, 0));
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
        self.attention(memory, layer, index, kv)?;
        self.mlp(memory, layer)
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
        let pre = spec.norm_placement == NormPlacement::Pre;
        let Memory { spans, x, h, query, key, value, packed, angles, vectors, .. } = memory;
        let shape = Heads { heads: spec.heads, kv_heads: spec.kv_heads, head_dim: spec.head_dim };
        let (query_width, key_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let x = x.get_mut(rows * spec.hidden);
        let query = query.get_mut(rows * query_width);
        let key = key.get_mut(rows * key_width);
        let value = value.get_mut(rows * key_width);

        if pre {
            normalise(isa, pool, self.norm(vectors, &layer.attn_norm)?, x, h.get_mut(x.len()));
        }
        let input = if pre { h.get(x.len()) } else { &*x };
        let biases = [layer.query.bias.as_ref(), layer.key.bias.as_ref(), layer.value.bias.as_ref()];
        let [query_bias, key_bias, value_bias] = self.vectors(vectors, biases)?;
        let linears = [
            self.linear(&layer.query, query_bias, query, false)?,
            self.linear(&layer.key, key_bias, key, false)?,
            self.linear(&layer.value, value_bias, value, false)?,
        ];
        matmul(isa, pool, packed, input, spec.hidden, rows, linears);

        let (Norm::Rms { epsilon } | Norm::Layer { epsilon }) = spec.norm;
        let head_norm = |weight| NormWeights { norm: Norm::Rms { epsilon }, weight, bias: None };
        let [query_norm, key_norm] =
            self.vectors(vectors, [layer.query_norm.as_ref(), layer.key_norm.as_ref()])?;
        let half = self.model.frequencies.len();
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
        attend(isa, pool, shape, spans, keys, query, attended);

        let [bias] = self.vectors(vectors, [layer.attn_out.bias.as_ref()])?;
        let linears = [self.linear(&layer.attn_out, bias, x, true)?];
        matmul(isa, pool, packed, attended, query_width, rows, linears);
        if !pre {
            normalise_in_place(isa, pool, self.norm(vectors, &layer.attn_norm)?, x);
        }
        Ok(())
    }

    fn mlp(&self, memory: &mut Memory, layer: &Layer) -> Result<(), PassError> {
        let Executor { isa, pool, .. } = self.executor;
        let (isa, rows, spec) = (*isa, self.rows, &self.model.spec);
        let pre = spec.norm_placement == NormPlacement::Pre;
        let Memory { x, h, gate, up, packed, vectors, .. } = memory;
        let x = x.get_mut(rows * spec.hidden);
        let up = up.get_mut(rows * spec.intermediate);

        if pre {
            normalise(isa, pool, self.norm(vectors, &layer.mlp_norm)?, x, h.get_mut(x.len()));
        }
        let input = if pre { h.get(x.len()) } else { &*x };
        let gate_bias = layer.gate.as_ref().and_then(|gate| gate.bias.as_ref());
        let [gate_bias, up_bias] = self.vectors(vectors, [gate_bias, layer.up.bias.as_ref()])?;
        let activated = match &layer.gate {
            Some(tensors) => {
                let gate = gate.get_mut(rows * spec.intermediate);
                let linears = [
                    self.linear(tensors, gate_bias, gate, false)?,
                    self.linear(&layer.up, up_bias, up, false)?,
                ];
                matmul(isa, pool, packed, input, spec.hidden, rows, linears);
                silu_mul(isa, pool, gate, up);
                gate
            }
            None => {
                let linears = [self.linear(&layer.up, up_bias, up, false)?];
                matmul(isa, pool, packed, input, spec.hidden, rows, linears);
                gelu(isa, pool, up);
                up
            }
        };
        let [bias] = self.vectors(vectors, [layer.down.bias.as_ref()])?;
        let linears = [self.linear(&layer.down, bias, x, true)?];
        matmul(isa, pool, packed, activated, spec.intermediate, rows, linears);
        if !pre {
            normalise_in_place(isa, pool, self.norm(vectors, &layer.mlp_norm)?, x);
        }
        Ok(())
    }

    /// The last stage: logits of the rows that want them, or one vector per chunk.
    fn head(&self, memory: &mut Memory) -> Result<(), PassError> {
        match self.model.spec.output {
            Output::Logits { .. } => self.logits(memory),
            Output::Embedding { pooling, normalise } => self.pool_rows(memory, pooling, normalise),
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
        if let Some(Tensor { dtype, rows, .. }) = self.model.output
            && let Some(tensor) = &self.model.output
        {
            let out = output.get_mut(self.output_rows * rows);
            let linear =
                Linear { weight: self.bytes(tensor)?, dtype, rows, bias: None, out, accumulate: false };
            matmul(*isa, pool, packed, h, hidden, self.output_rows, [linear]);
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
