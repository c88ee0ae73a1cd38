//! What a pass costs before it runs: the work of its stages and the memory that it holds.
//!
//! Counts only; how long a unit of work takes is measured by [`crate::Rates`]. These formulas repeat what `forward.rs`
//! does, so whoever changes a stage there changes its account here. They must never decide anything.

use std::ops::Range;

use tangram_checkpoint::{Attention, DType, Output};

use crate::kernels::attention::{piece_scratch, pieces};
use crate::kernels::kv::BLOCK_TOKENS;
use crate::kernels::matmul::{Packing, scratch_elements, token_blocks};
use crate::kernels::{Buffer, Isa};
use crate::model::{FeedForward, Layer, MlpTensors, Model, NormTensors, Scorer, Tensor};

/// The size of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassShape {
    /// Tokens that it computes.
    pub tokens: usize,
    /// Rows of output: sequences that get logits (for embedding models: sequences).
    pub output_rows: usize,
    /// Length of the longest sequence with this pass's tokens.
    pub longest: usize,
}

/// The work of a stage, in the units that [`crate::Rates`] has times for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StageWork {
    /// Per weight type: what is done with the weights.
    pub weights: Vec<(DType, WeightWork)>,
    /// Multiplications in attention: of query elements with keys, and as many with values.
    pub attention: f64,
    /// Elements that pass through norms, rotations, rearrangements and sums.
    pub elements: f64,
    /// Elements that pass through activations.
    pub activations: f64,
    /// Sines and cosines of rotary angles.
    pub angles: f64,
    /// Times that the threads are called together.
    pub phases: f64,
}

/// How often weights of one type are touched.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WeightWork {
    /// Weights multiplied with one token as they stream by.
    pub single: f64,
    /// Weights read and unpacked for several tokens, once per block of them.
    pub widened: f64,
    /// Multiplications of an unpacked weight with a token's element.
    pub products: f64,
}

impl StageWork {
    fn weights(&mut self, dtype: DType) -> &mut WeightWork {
        let index = self.weights.iter().position(|(known, _)| *known == dtype).unwrap_or_else(|| {
            self.weights.push((dtype, WeightWork::default()));
            self.weights.len() - 1
        });
        &mut self.weights[index].1
    }

    /// Adds `times` products of a matrix with `tokens` tokens.
    fn product(&mut self, tensor: &Tensor, tokens: usize, times: f64) {
        let weights = (tensor.rows * tensor.columns) as f64 * times;
        match tokens {
            0 => {}
            1 => self.weights(tensor.dtype).single += weights,
            tokens => {
                let work = self.weights(tensor.dtype);
                work.widened +=
                    weights * token_blocks(Isa::detect(), tensor.dtype, tensor.columns, tokens) as f64;
                work.products += weights * tokens as f64;
            }
        }
    }

    /// Adds `times` products of matrices that read the same elements of `tokens` tokens.
    fn products(&mut self, tensors: &[&Tensor], tokens: usize, times: f64) {
        tensors.iter().for_each(|tensor| self.product(tensor, tokens, times));
        // Tokens are rearranged first.
        let packing = packing(tensors, tokens);
        self.elements += packing.elements() as f64 * times;
        self.phases += (packing.phases() + 1) as f64 * times;
    }
}

impl Model {
    /// The work of each stage of a pass that computes these positions of its sequences, one range each, and gives
    /// `output_rows` rows of output. With experts: what is to be expected when each is as likely as the others.
    pub fn work(&self, chunks: &[Range<usize>], output_rows: usize) -> Vec<StageWork> {
        let tokens: usize = chunks.iter().map(Range::len).sum();
        let spec = &self.spec;
        let rows = tokens as f64;
        let hidden = spec.hidden as f64;
        let lookups =
            1 + usize::from(self.position_embedding.is_some()) + usize::from(self.type_embedding.is_some());
        let pairs = self.rotation.frequencies.len()
            + self.local_rotation.as_ref().map_or(0, |rotation| rotation.frequencies.len());
        let mut embedding = StageWork { angles: rows * pairs as f64, ..StageWork::default() };
        embedding.elements += rows * hidden * (lookups + usize::from(self.embedding_norm.is_some())) as f64;
        let mut stages = vec![embedding];
        stages.extend(self.layers.iter().map(|layer| self.layer_work(layer, tokens, chunks)));
        let mut head = StageWork::default();
        match (&self.output, spec.output) {
            (Some(tensor), _) if output_rows > 0 => {
                head.elements += output_rows as f64 * hidden;
                head.phases += 1.0;
                head.products(&[tensor], output_rows, 1.0);
            }
            (_, Output::Embedding { .. }) => head.elements += rows * hidden,
            _ => {}
        }
        if let Some(Scorer { pooler, classifier }) = &self.scorer {
            head.elements += output_rows as f64 * hidden;
            head.products(&[&pooler.weight], output_rows, 1.0);
            head.products(&[&classifier.weight], output_rows, 1.0);
        }
        stages.push(head);
        stages
    }

    fn layer_work(&self, layer: &Layer, tokens: usize, chunks: &[Range<usize>]) -> StageWork {
        let spec = &self.spec;
        let rows = tokens as f64;
        let (hidden, queries) = (spec.hidden, spec.heads * spec.head_dim);
        let mut work = StageWork::default();
        work.products(&[&layer.query.weight, &layer.key.weight, &layer.value.weight], tokens, 1.0);
        work.products(&[&layer.attn_out.weight], tokens, 1.0);
        let keys = 2 * spec.kv_heads * spec.head_dim;
        work.elements += rows * (queries + keys) as f64;
        // Positions that the tokens look at, all together.
        let seen: usize = match spec.attention {
            Attention::Bidirectional => chunks.iter().map(|chunk| chunk.len() * chunk.len()).sum(),
            Attention::Causal => {
                let visible = chunks.iter().flat_map(|chunk| chunk.start + 1..chunk.end + 1);
                visible.map(|visible| layer.window.map_or(visible, |window| visible.min(window))).sum()
            }
        };
        work.attention += 2.0 * (seen * queries) as f64;
        work.phases += 2.0;
        match &layer.mlp {
            MlpTensors::Dense(tensors) => feed_forward(&mut work, tensors, tokens, 1.0),
            MlpTensors::Sparse { router, experts } => {
                work.products(&[&router.weight], tokens, 1.0);
                let chosen = spec.experts.as_ref().map_or(0, |experts| experts.per_token) as f64;
                let count = experts.len() as f64;
                let touched = count * (1.0 - (1.0 - chosen / count).powf(rows));
                let each = ((rows * chosen / touched).round() as usize).max(1);
                let times = touched / count;
                experts.iter().for_each(|tensors| feed_forward(&mut work, tensors, each, times));
                work.elements += 3.0 * rows * chosen * hidden as f64;
            }
        }
        let norms =
            2 + usize::from(layer.attn_post_norm.is_some()) + usize::from(layer.mlp_post_norm.is_some());
        work.elements += rows * (norms * hidden) as f64;
        work.phases += norms as f64;
        work
    }

    /// Most bytes that an executor of `threads` threads holds when it has run nothing but passes of this model of at
    /// most this shape, one at a time: activations, outputs and the threads' own memory. A single thread that has run a
    /// pass of exactly this shape (of one sequence, a multiple of 16 tokens) holds exactly this; further threads that
    /// missed a job, and experts that did not get every row, hold less. The lists of tokens and block addresses (some
    /// bytes per token) are not counted.
    pub fn scratch_bytes(&self, shape: PassShape, threads: usize) -> usize {
        let activations: usize = self.activation_elements(shape).into_iter().map(Buffer::bytes_for).sum();
        activations + threads * Buffer::bytes_for(self.thread_elements(shape))
    }

    /// Elements of the buffers of a pass ([`crate::executor::Memory`]).
    fn activation_elements(&self, shape: PassShape) -> [usize; 16] {
        let PassShape { tokens, output_rows, .. } = shape;
        let spec = &self.spec;
        let queries = spec.heads * spec.head_dim;
        let keys = spec.kv_heads * spec.head_dim;
        let mut inner = 0;
        let mut sparse = false;

        for layer in &self.layers {
            let width = match &layer.mlp {
                MlpTensors::Dense(tensors) => tensors.up.weight.rows,
                MlpTensors::Sparse { experts, .. } => {
                    sparse = true;
                    experts.first().map_or(0, |tensors| tensors.up.weight.rows)
                }
            };
            inner = inner.max(width);
        }
        let normalised = if spec.norm_placement.before() { tokens * spec.hidden } else { spec.hidden };
        let apart = self.layers.iter().any(|layer| layer.attn_post_norm.is_some()) || spec.parallel_residual;
        let local_pairs = self.local_rotation.as_ref().map_or(0, |rotation| rotation.frequencies.len());
        let experts = spec.experts.as_ref().map_or(0, |experts| experts.count);
        let scored = if self.scorer.is_some() { output_rows * spec.hidden } else { 0 };
        [
            tokens * spec.hidden,
            normalised.max(tokens * queries).max(scored),
            tokens * queries,
            tokens * keys,
            tokens * keys,
            if spec.mlp.gated() { tokens * inner } else { 0 },
            tokens * inner,
            self.most_of_products(shape, |tensors, tokens| packing(tensors, tokens).elements()),
            tokens * self.rotation.frequencies.len() * 2,
            tokens * local_pairs * 2,
            if apart || sparse { tokens * spec.hidden } else { scored },
            if sparse { tokens * experts } else { 0 },
            if sparse { tokens * spec.hidden } else { 0 },
            if sparse { tokens * spec.hidden } else { 0 },
            self.vector_elements(),
            output_rows * self.output_width(),
        ]
    }

    /// Most elements of the norm weights or biases that are widened together.
    fn vector_elements(&self) -> usize {
        let of = |tensors: &[Option<&Tensor>]| -> usize {
            tensors.iter().flatten().map(|tensor| tensor.columns).sum()
        };
        let norm = |norm: &NormTensors| of(&[Some(&norm.weight), norm.bias.as_ref()]);
        let bias = |tensors: &FeedForward| {
            let widened =
                of(&[tensors.gate.as_ref().and_then(|gate| gate.bias.as_ref()), tensors.up.bias.as_ref()]);
            widened.max(of(&[tensors.down.bias.as_ref()]))
        };
        let layer = |layer: &Layer| {
            let post = [&layer.attn_post_norm, &layer.mlp_post_norm];
            let [query, key, value] =
                [&layer.query, &layer.key, &layer.value].map(|linear| linear.bias.as_ref());
            let mlp = match &layer.mlp {
                MlpTensors::Dense(tensors) => bias(tensors),
                MlpTensors::Sparse { .. } => 0,
            };
            [
                norm(&layer.attn_norm),
                norm(&layer.mlp_norm),
                post.into_iter().flatten().map(norm).max().unwrap_or(0),
                of(&[query, key, value]),
                of(&[layer.query_norm.as_ref(), layer.key_norm.as_ref()]),
                of(&[layer.attn_out.bias.as_ref()]),
                mlp,
            ]
            .into_iter()
            .max()
            .unwrap_or(0)
        };
        let outer = self.embedding_norm.iter().chain(&self.final_norm).map(norm);
        let scorer = self.scorer.iter().map(|scorer| of(&[scorer.pooler.bias.as_ref()]));
        let outer = outer.chain(scorer);
        outer.chain(self.layers.iter().map(layer)).max().unwrap_or(0)
    }

    /// Most elements that a thread works in: the sums and rows of a matrix product, or a piece of attention.
    fn thread_elements(&self, shape: PassShape) -> usize {
        let PassShape { tokens, longest, .. } = shape;
        let spec = &self.spec;
        let isa = Isa::detect();
        let products = self.most_of_products(shape, |tensors, tokens| {
            let of = |tensor: &&Tensor| {
                scratch_elements(isa, tensor.dtype, tensor.row_bytes(), tensor.columns, tokens)
            };
            tensors.iter().map(of).max().unwrap_or(0)
        });
        let group = spec.heads / spec.kv_heads;
        let windows = self.layers.iter().map(|layer| layer.window);
        let attention = windows.collect::<std::collections::BTreeSet<_>>().into_iter().map(|window| {
            let seen = move |count: usize, last: usize| {
                // A piece starts with the tile in which its first token's window does.
                let first = (last + 1).saturating_sub(count);
                let base =
                    window.map_or(0, |window| first.saturating_sub(window) / BLOCK_TOKENS * BLOCK_TOKENS);
                last - base
            };
            pieces(group, longest)
                .map(|(count, last)| (count.min(tokens), last))
                .map(|(count, last)| piece_scratch(count * group, spec.head_dim, seen(count, last)))
                .max()
                .unwrap_or(0)
        });
        attention.max().unwrap_or(0).max(products)
    }

    /// The most that a product in a pass of this shape needs, by `need` of the matrices that are multiplied together and
    /// of the tokens. An expert may get every token.
    fn most_of_products(&self, shape: PassShape, need: impl Fn(&[&Tensor], usize) -> usize) -> usize {
        let PassShape { tokens, output_rows, .. } = shape;
        let feed_forward = |tensors: &FeedForward| {
            let up = &tensors.up.weight;
            let widen = match &tensors.gate {
                Some(gate) => need(&[&gate.weight, up], tokens),
                None => need(&[up], tokens),
            };
            widen.max(need(&[&tensors.down.weight], tokens))
        };
        let layer = |layer: &Layer| {
            let mlp = match &layer.mlp {
                MlpTensors::Dense(tensors) => feed_forward(tensors),
                MlpTensors::Sparse { router, experts } => {
                    let experts = experts.iter().map(feed_forward).max().unwrap_or(0);
                    experts.max(need(&[&router.weight], tokens))
                }
            };
            mlp.max(need(&[&layer.query.weight, &layer.key.weight, &layer.value.weight], tokens))
                .max(need(&[&layer.attn_out.weight], tokens))
        };
        let head = self.output.as_ref().filter(|_| output_rows > 0);
        let head = head.map_or(0, |tensor| need(&[tensor], output_rows));
        let scorer = self.scorer.iter().flat_map(|scorer| [&scorer.pooler, &scorer.classifier]);
        let scorer = scorer.map(|linear| need(&[&linear.weight], output_rows)).max().unwrap_or(0);
        self.layers.iter().map(layer).max().unwrap_or(0).max(head).max(scorer)
    }
}

/// How the input of matrices that are multiplied together is rearranged.
fn packing(tensors: &[&Tensor], tokens: usize) -> Packing {
    let columns = tensors.first().map_or(0, |tensor| tensor.columns);
    Packing::new(Isa::detect(), tensors.iter().map(|tensor| tensor.dtype), columns, tokens)
}

/// The work of a feed-forward block, or of `times` such blocks.
fn feed_forward(work: &mut StageWork, tensors: &FeedForward, tokens: usize, times: f64) {
    let up = &tensors.up.weight;
    match &tensors.gate {
        Some(gate) => work.products(&[&gate.weight, up], tokens, times),
        None => work.products(&[up], tokens, times),
    }
    work.activations += (tokens * up.rows) as f64 * times;
    work.products(&[&tensors.down.weight], tokens, times);
    work.phases += times;
}
