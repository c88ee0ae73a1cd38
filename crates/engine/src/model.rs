//! A model as the executor sees it: which tensor is used where, checked once.
//!
//! Nothing here touches weights; a [`Model`] holds indices, shapes and small tables only, and never changes.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use tangram_checkpoint::{
    Attention, DType, ExpertRole, LayerRole, ModelSpec, Norm, NormPlacement, Output, Role, Rope, RopeScaling,
};

use crate::kernels::kv::{BLOCK_TOKENS, KvElement, KvShape};

/// Largest width of anything (hidden, intermediate, all heads together) in elements: keeps products in range.
const MAX_WIDTH: usize = 1 << 24;
/// Largest vocabulary and context.
const MAX_ROWS: usize = 1 << 28;
/// Most layers.
const MAX_LAYERS: usize = 1 << 16;

/// A tensor of a model: what it is for and how it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorDesc {
    /// What the tensor is for.
    pub role: Role,
    /// How its elements are stored.
    pub dtype: DType,
    /// Outermost dimension first.
    pub shape: Vec<u64>,
}

/// Why tensors do not make a model.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum ModelError {
    /// The spec contradicts itself or is out of range.
    #[error("unusable model description: {0}")]
    Spec(String),
    /// A required tensor is not there.
    #[error("tensor {0:?} is missing")]
    Missing(Role),
    /// Two tensors have the same role.
    #[error("tensor {0:?} is there twice")]
    Twice(Role),
    /// The spec has no use for a tensor.
    #[error("tensor {0:?} has no place in a model of this description")]
    Unexpected(Role),
    /// A tensor has the wrong shape.
    #[error("tensor {role:?} has shape {found:?}, the model needs {expected:?}")]
    Shape {
        /// Which tensor.
        role: Role,
        /// The shape the spec demands.
        expected: Vec<u64>,
        /// The shape given.
        found: Vec<u64>,
    },
    /// A tensor's rows do not divide into the blocks of its type, or a vector is quantised.
    #[error("tensor {role:?} cannot be stored as {dtype}")]
    DType {
        /// Which tensor.
        role: Role,
        /// The type given.
        dtype: DType,
    },
}

/// Sizes of the blocks in which keys and values are cached, `[layer][key|value][kv head][token][head_dim]`, in f32 if
/// the token embedding is stored in f32, else in f16.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// Tokens per block.
    pub block_tokens: usize,
    /// Bytes per block, all layers.
    pub block_bytes: usize,
}

/// A tensor in its place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tensor {
    /// Index in the slice given to [`Model::new`].
    pub(crate) index: usize,
    pub(crate) dtype: DType,
    /// 1 for vectors.
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    /// All of it.
    pub(crate) bytes: usize,
}

impl Tensor {
    pub(crate) fn row_bytes(&self) -> usize {
        self.bytes / self.rows
    }
}

/// A norm's parameters.
pub(crate) struct NormTensors {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
}

/// A matrix with its bias.
pub(crate) struct LinearTensors {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
}

/// The tensors of a layer.
pub(crate) struct Layer {
    pub(crate) attn_norm: NormTensors,
    pub(crate) query: LinearTensors,
    pub(crate) key: LinearTensors,
    pub(crate) value: LinearTensors,
    pub(crate) query_norm: Option<Tensor>,
    pub(crate) key_norm: Option<Tensor>,
    pub(crate) attn_out: LinearTensors,
    pub(crate) attn_post_norm: Option<NormTensors>,
    pub(crate) mlp_norm: NormTensors,
    pub(crate) mlp: MlpTensors,
    pub(crate) mlp_post_norm: Option<NormTensors>,
    /// How many tokens a token looks at; `None` for all.
    pub(crate) window: Option<usize>,
    /// Whether the rotation is that of the local layers.
    pub(crate) local_rotation: bool,
}

/// A feed-forward block, or an expert.
pub(crate) struct FeedForward {
    /// Only gated.
    pub(crate) gate: Option<LinearTensors>,
    pub(crate) up: LinearTensors,
    pub(crate) down: LinearTensors,
}

/// What makes a score of the first token's state.
pub(crate) struct Scorer {
    pub(crate) pooler: LinearTensors,
    pub(crate) classifier: LinearTensors,
}

/// What stands behind a layer's second norm.
pub(crate) enum MlpTensors {
    Dense(FeedForward),
    Sparse { router: LinearTensors, experts: Vec<FeedForward> },
}

/// The plan of a model: its spec, where its tensors are used, and what its passes need.
pub struct Model {
    /// Different for every model of the process; ties a pass to its model.
    pub(crate) id: u64,
    pub(crate) spec: ModelSpec,
    pub(crate) token_embedding: Tensor,
    pub(crate) position_embedding: Option<Tensor>,
    pub(crate) type_embedding: Option<Tensor>,
    pub(crate) embedding_norm: Option<NormTensors>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) final_norm: Option<NormTensors>,
    /// The token embedding where tied; `None` in models that do not generate.
    pub(crate) output: Option<Tensor>,
    /// Only in models that score.
    pub(crate) scorer: Option<Scorer>,
    pub(crate) rotation: Rotation,
    /// The rotation of sequences of more tokens than this.
    long: Option<(usize, Rotation)>,
    /// Of the local layers, where it differs.
    pub(crate) local_rotation: Option<Rotation>,
    /// `None` where nothing is cached.
    pub(crate) kv_shape: Option<KvShape>,
    kv: Option<KvLayout>,
}

impl Model {
    /// Checks that `tensors` are exactly what `spec` describes. A tensor's index in the slice is its index in
    /// [`crate::Weights`]. An output matrix beside tied embeddings is ignored.
    ///
    /// # Errors
    /// [`ModelError`] for a contradictory spec, missing, doubled or superfluous tensors, wrong shapes or types.
    pub fn new(spec: ModelSpec, tensors: &[TensorDesc]) -> Result<Model, ModelError> {
        check_spec(&spec)?;
        let mut roles = Roles::new(&spec);
        for (index, desc) in tensors.iter().enumerate() {
            roles.add(index, desc)?;
        }
        let token_embedding = roles.take(Role::TokenEmbedding)?;
        let position_embedding =
            spec.learned_positions.map(|_| roles.take(Role::PositionEmbedding)).transpose()?;
        let type_embedding = spec.token_types.map(|_| roles.take(Role::TypeEmbedding)).transpose()?;
        let post = spec.norm_placement == NormPlacement::Post;
        let embedding_norm =
            post.then(|| roles.norm(Role::EmbeddingNorm, Role::EmbeddingNormBias)).transpose()?;
        let layers = (0..spec.layers as u32).map(|layer| roles.layer(layer)).collect::<Result<_, _>>()?;
        let final_norm = (!post).then(|| roles.norm(Role::FinalNorm, Role::FinalNormBias)).transpose()?;
        let output = match spec.output {
            Output::Logits { tied: true } => {
                roles.tensors.remove(&Role::Output);
                Some(token_embedding)
            }
            Output::Logits { tied: false } => Some(roles.take(Role::Output)?),
            Output::Embedding { .. } | Output::Score { .. } => None,
        };
        let mut linear = |weight, bias| -> Result<LinearTensors, ModelError> {
            Ok(LinearTensors { weight: roles.take(weight)?, bias: Some(roles.take(bias)?) })
        };
        let scorer = match spec.output {
            Output::Score { .. } => Some(Scorer {
                pooler: linear(Role::Pooler, Role::PoolerBias)?,
                classifier: linear(Role::Classifier, Role::ClassifierBias)?,
            }),
            _ => None,
        };
        if let Some(role) = roles.left() {
            return Err(ModelError::Unexpected(role));
        }
        let kv_shape = (spec.attention == Attention::Causal).then_some(KvShape {
            layers: spec.layers,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            element: if token_embedding.dtype == DType::F32 { KvElement::F32 } else { KvElement::F16 },
        });
        let kv = match kv_shape {
            Some(shape) => {
                let block_bytes =
                    shape.block_bytes().ok_or_else(|| ModelError::Spec("KV blocks are too large".into()))?;
                Some(KvLayout { block_tokens: BLOCK_TOKENS, block_bytes })
            }
            None => None,
        };
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        Ok(Model {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            token_embedding,
            position_embedding,
            type_embedding,
            embedding_norm,
            layers,
            final_norm,
            output,
            scorer,
            rotation: spec.rope.as_ref().map(|rope| rotation(rope, false)).unwrap_or_default(),
            long: spec.rope.as_ref().and_then(|rope| long_rotation(rope, spec.context)),
            local_rotation: spec
                .local
                .as_ref()
                .and_then(|local| local.rope.as_ref())
                .map(|rope| rotation(rope, false)),
            kv_shape,
            kv,
            spec,
        })
    }

    /// The description the model was made from.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Bytes of a row of the token embedding as it is stored.
    pub fn token_row_bytes(&self) -> usize {
        self.token_embedding.row_bytes()
    }

    /// The KV blocks that sequences need; `None` where nothing is cached (embedding models).
    pub fn kv(&self) -> Option<KvLayout> {
        self.kv
    }

    /// The tokens up to which a sequence keeps its keys as it grows (longrope's original context). At the first token
    /// beyond, all of it is rotated by other factors, and what was cached of it is worth nothing. `None` for models
    /// that rotate all sequences alike.
    pub fn short_context(&self) -> Option<usize> {
        self.long.as_ref().map(|(tokens, _)| *tokens)
    }

    /// Whether a sequence of so many tokens goes beyond [`Model::short_context`].
    pub fn is_long(&self, tokens: usize) -> bool {
        self.short_context().is_some_and(|short| tokens > short)
    }

    /// The rotation of long sequences; that of all where there is no other.
    pub(crate) fn long_rotation(&self) -> &Rotation {
        self.long.as_ref().map_or(&self.rotation, |(_, rotation)| rotation)
    }

    /// Elements of an output row.
    pub(crate) fn output_width(&self) -> usize {
        match self.spec.output {
            Output::Logits { .. } => self.spec.vocab,
            Output::Embedding { .. } => self.spec.hidden,
            Output::Score { .. } => 1,
        }
    }
}

/// Tensors that have not found their place yet.
pub(crate) struct Roles<'a> {
    spec: &'a ModelSpec,
    tensors: HashMap<Role, Tensor>,
}

impl<'a> Roles<'a> {
    pub(crate) fn new(spec: &'a ModelSpec) -> Roles<'a> {
        Roles { spec, tensors: HashMap::new() }
    }

    /// A tensor that has not found its place.
    pub(crate) fn left(&self) -> Option<Role> {
        self.tensors.keys().min().copied()
    }

    pub(crate) fn add(&mut self, index: usize, desc: &TensorDesc) -> Result<(), ModelError> {
        let role = desc.role;
        let expected = self.spec.shape(role);
        if desc.shape != expected {
            return Err(ModelError::Shape { role, expected, found: desc.shape.clone() });
        }
        let vector = expected.len() == 1;
        let bytes = desc.dtype.tensor_bytes(&expected).and_then(|bytes| usize::try_from(bytes).ok());
        let (Some(bytes), false) = (bytes, vector && desc.dtype.is_quantised()) else {
            return Err(ModelError::DType { role, dtype: desc.dtype });
        };
        let columns = expected[expected.len() - 1] as usize;
        let rows = if vector { 1 } else { expected[0] as usize };
        match self.tensors.insert(role, Tensor { index, dtype: desc.dtype, rows, columns, bytes }) {
            Some(_) => Err(ModelError::Twice(role)),
            None => Ok(()),
        }
    }

    pub(crate) fn take(&mut self, role: Role) -> Result<Tensor, ModelError> {
        self.tensors.remove(&role).ok_or(ModelError::Missing(role))
    }

    fn norm(&mut self, weight: Role, bias: Role) -> Result<NormTensors, ModelError> {
        let bias = match self.spec.norm {
            Norm::Layer { .. } => Some(self.take(bias)?),
            Norm::Rms { .. } => None,
        };
        Ok(NormTensors { weight: self.take(weight)?, bias })
    }

    fn layer(&mut self, layer: u32) -> Result<Layer, ModelError> {
        use LayerRole::*;
        let role = |role| Role::Layer(layer, role);
        let spec = self.spec;
        let mut linear = |weight, bias| -> Result<LinearTensors, ModelError> {
            Ok(LinearTensors { weight: self.take(role(weight))?, bias: self.tensors.remove(&role(bias)) })
        };
        let query = linear(Query, QueryBias)?;
        let key = linear(Key, KeyBias)?;
        let value = linear(Value, ValueBias)?;
        let attn_out = linear(AttnOut, AttnOutBias)?;
        let mlp = match spec.layer_experts(layer as usize) {
            None => MlpTensors::Dense(FeedForward {
                gate: spec.mlp.gated().then(|| linear(Gate, GateBias)).transpose()?,
                up: linear(Up, UpBias)?,
                down: linear(Down, DownBias)?,
            }),
            Some(experts) => MlpTensors::Sparse {
                router: self.matrix(role(Router))?,
                experts: (0..experts.count as u32)
                    .map(|expert| {
                        let mut matrix = |part| self.matrix(role(Expert(expert, part)));
                        Ok(FeedForward {
                            gate: Some(matrix(ExpertRole::Gate)?),
                            up: matrix(ExpertRole::Up)?,
                            down: matrix(ExpertRole::Down)?,
                        })
                    })
                    .collect::<Result<_, _>>()?,
            },
        };
        let sandwich = spec.norm_placement == NormPlacement::Sandwich;
        let mut post_norm = |weight| -> Result<Option<NormTensors>, ModelError> {
            let weight = sandwich.then(|| self.take(role(weight))).transpose()?;
            Ok(weight.map(|weight| NormTensors { weight, bias: None }))
        };
        let window = spec.window(layer as usize);
        Ok(Layer {
            attn_post_norm: post_norm(AttnPostNorm)?,
            mlp_post_norm: post_norm(MlpPostNorm)?,
            attn_norm: self.norm(role(AttnNorm), role(AttnNormBias))?,
            query,
            key,
            value,
            query_norm: spec.qk_norm.then(|| self.take(role(QueryNorm))).transpose()?,
            key_norm: spec.qk_norm.then(|| self.take(role(KeyNorm))).transpose()?,
            attn_out,
            mlp_norm: self.norm(role(MlpNorm), role(MlpNormBias))?,
            mlp,
            window,
            local_rotation: window.is_some() && spec.local.as_ref().is_some_and(|local| local.rope.is_some()),
        })
    }

    /// A matrix that never has a bias.
    fn matrix(&mut self, role: Role) -> Result<LinearTensors, ModelError> {
        Ok(LinearTensors { weight: self.take(role)?, bias: None })
    }
}

fn check_spec(spec: &ModelSpec) -> Result<(), ModelError> {
    let fail = |message: String| Err(ModelError::Spec(message));
    if !spec.updates.is_empty() {
        return fail("low-rank updates are an adapter's, not a model's".into());
    }
    let within = |name: &str, value: usize, most: usize| {
        if value == 0 || value > most {
            fail(format!("{name} is {value}, allowed is 1 to {most}"))
        } else {
            Ok(())
        }
    };
    within("vocabulary", spec.vocab, MAX_ROWS)?;
    within("context", spec.context, MAX_ROWS)?;
    within("hidden size", spec.hidden, MAX_WIDTH)?;
    within("intermediate size", spec.intermediate, MAX_WIDTH)?;
    within("number of layers", spec.layers, MAX_LAYERS)?;
    within("number of heads", spec.heads, MAX_WIDTH)?;
    within("number of key/value heads", spec.kv_heads, spec.heads)?;
    within("head size", spec.head_dim, MAX_WIDTH / spec.heads)?;
    within("learned positions", spec.learned_positions.unwrap_or(1), MAX_ROWS)?;
    within("token types", spec.token_types.unwrap_or(1), MAX_ROWS)?;
    if !spec.heads.is_multiple_of(spec.kv_heads) {
        return fail(format!("{} heads do not divide among {} key/value heads", spec.heads, spec.kv_heads));
    }
    let (Norm::Rms { epsilon } | Norm::Layer { epsilon }) = spec.norm;
    if !(epsilon.is_finite() && epsilon >= 0.0) {
        return fail(format!("norm epsilon is {epsilon}"));
    }
    let factors = [spec.embedding_scale, spec.query_scale, spec.attention_cap, spec.logit_cap];
    if let Some(factor) = factors.into_iter().flatten().find(|factor| !(factor.is_finite() && *factor > 0.0))
    {
        return fail(format!("{factor} as a scale or cap"));
    }
    if let Some(rope) = &spec.rope {
        check_rope(rope, spec)?;
    }
    if let Some(local) = &spec.local {
        within("window", local.window, MAX_ROWS)?;
        if let Some(rope) = &local.rope {
            check_rope(rope, spec)?;
        }
        if spec.attention == Attention::Bidirectional {
            return fail("a window in bidirectional attention".into());
        }
    }
    if let Some(experts) = &spec.experts {
        within("number of experts", experts.count, MAX_LAYERS)?;
        within("experts per token", experts.per_token, experts.count)?;
        within("intermediate size of an expert", experts.intermediate, MAX_WIDTH)?;
        if !spec.mlp.gated() || spec.norm_placement == NormPlacement::Post || spec.parallel_residual {
            return fail("experts without a gate, behind a post-norm or with a parallel residual".into());
        }
    }
    let centred = matches!(spec.norm, Norm::Layer { .. });
    if centred && (spec.norm_placement == NormPlacement::Sandwich || spec.norm_plus_one) {
        return fail(
            "layer norm on the results of blocks, or with weights stored as their distance from 1".into(),
        );
    }
    if spec.parallel_residual && spec.norm_placement != NormPlacement::Pre {
        return fail("a parallel residual needs norms before the blocks only".into());
    }
    Ok(())
}

fn check_rope(rope: &Rope, spec: &ModelSpec) -> Result<(), ModelError> {
    let fail = |message: String| Err(ModelError::Spec(message));
    if rope.dims == 0 || !rope.dims.is_multiple_of(2) || rope.dims > spec.head_dim {
        return fail(format!("{} of {} elements of a head are rotated", rope.dims, spec.head_dim));
    }
    let factors = match &rope.scaling {
        RopeScaling::Factors { factors } => [factors.len(), factors.len()],
        RopeScaling::LongRope { short, long, .. } => [short.len(), long.len()],
        _ => [rope.dims / 2; 2],
    };
    if factors != [rope.dims / 2; 2] {
        return fail(format!("{factors:?} rotary factors for {} pairs", rope.dims / 2));
    }
    for long in [false, true] {
        let Rotation { frequencies, magnitude } = rotation(rope, long);
        if !frequencies.iter().chain([&magnitude]).all(|value| value.is_finite()) {
            return fail("rotary frequencies are not finite".into());
        }
    }
    Ok(())
}

/// The rotation of a model or of its local layers.
#[derive(Default)]
pub(crate) struct Rotation {
    /// Per pair, radians per token; empty without rotation.
    pub(crate) frequencies: Vec<f32>,
    /// What rotated elements are multiplied with.
    pub(crate) magnitude: f32,
}

/// The rotation of sequences beyond longrope's original context, and how many tokens that is, for a model that serves
/// `context` tokens.
fn long_rotation(rope: &Rope, context: usize) -> Option<(usize, Rotation)> {
    match rope.scaling {
        RopeScaling::LongRope { original_context, .. } if context as f64 > original_context => {
            Some((original_context as usize, rotation(rope, true)))
        }
        _ => None,
    }
}

/// The rotation of a model, as Hugging Face transformers computes it; `long` for a sequence that is longer than
/// longrope's original context.
fn rotation(rope: &Rope, long: bool) -> Rotation {
    let pairs = rope.dims / 2;
    let plain = (0..pairs).map(|pair| 1.0 / rope.theta.powf((2 * pair) as f64 / rope.dims as f64));
    let divided = |factors: &[f32]| -> Vec<f32> {
        plain.clone().zip(factors).map(|(f, &factor)| (f / f64::from(factor)) as f32).collect()
    };
    let mut magnitude = 1.0;
    let frequencies = match &rope.scaling {
        RopeScaling::None => plain.map(|f| f as f32).collect(),
        RopeScaling::Linear { factor } => plain.map(|f| (f / factor) as f32).collect(),
        RopeScaling::Factors { factors } => divided(factors),
        RopeScaling::LongRope { short, long: for_long, original_context: _, magnitude: of_scaling } => {
            magnitude = *of_scaling;
            divided(if long { for_long } else { short })
        }
        &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => plain
            .map(|f| {
                let wavelength = 2.0 * std::f64::consts::PI / f;
                let scaled = if wavelength > original_context / low_freq_factor {
                    f / factor
                } else if wavelength < original_context / high_freq_factor {
                    f
                } else {
                    let smooth = (original_context / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * f / factor + smooth * f
                };
                scaled as f32
            })
            .collect(),
        &RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_context,
            truncate,
            magnitude: of_scaling,
        } => {
            magnitude = of_scaling;
            // The pair (as a real number) that turns this often within the original context.
            let pair_of = |turns: f64| {
                let wavelength = original_context / (turns * 2.0 * std::f64::consts::PI);
                rope.dims as f64 * wavelength.ln() / (2.0 * rope.theta.ln())
            };
            let (mut low, mut high) = (pair_of(beta_fast), pair_of(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            (low, high) = (low.max(0.0), high.min(rope.dims as f64 - 1.0));
            if low == high {
                high += 0.001;
            }
            plain
                .enumerate()
                .map(|(pair, f)| {
                    let scaled = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    (f / factor * scaled + f * (1.0 - scaled)) as f32
                })
                .collect()
        }
    };
    Rotation { frequencies, magnitude: magnitude as f32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope { theta: 10000.0, dims: 8, scaling }
    }

    fn frequencies(rope: Rope) -> Vec<f32> {
        rotation(&rope, false).frequencies
    }

    #[test]
    fn frequencies_follow_the_published_formulas() {
        let plain = frequencies(rope(RopeScaling::None));
        assert_eq!(plain, [1.0, 0.1, 0.01, 0.001]);
        let linear = frequencies(rope(RopeScaling::Linear { factor: 4.0 }));
        assert_eq!(linear, [0.25, 0.025, 0.0025, 0.00025]);
        let factors = frequencies(rope(RopeScaling::Factors { factors: vec![1.0, 2.0, 4.0, 8.0] }));
        assert_eq!(factors, [1.0, 0.05, 0.0025, 0.000125]);
        // Wavelengths 6.28, 62.8, 628, 6283 with borders at 64 / 4 and 64 / 1.
        let llama3 = frequencies(rope(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 64.0,
        }));
        let smooth = (64.0 / (20.0 * std::f64::consts::PI) - 1.0) / 3.0;
        assert_eq!(llama3[0], 1.0);
        assert_eq!(llama3[1], ((1.0 - smooth) * 0.1 / 8.0 + smooth * 0.1) as f32);
        assert_eq!(llama3[2..], [0.00125, 0.000125]);
    }

    #[test]
    fn yarn_keeps_fast_pairs_and_slows_the_others() {
        let yarn = |truncate| {
            rotation(
                &rope(RopeScaling::Yarn {
                    factor: 4.0,
                    beta_fast: 8.0,
                    beta_slow: 1.0,
                    original_context: 512.0,
                    truncate,
                    magnitude: 1.25,
                }),
                false,
            )
        };
        // Pairs turn 81.5, 8.15, 0.815 and 0.08 times; 8 turns are at 1.008 and 1 turn at 1.911.
        assert_eq!((yarn(true).frequencies, yarn(true).magnitude), (vec![1.0, 0.1, 0.0025, 0.00025], 1.25));
        assert_eq!(yarn(false).frequencies[2], 0.0025);
        let wide = rope(RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_context: 512.0,
            truncate: true,
            magnitude: 1.0,
        });
        // From pair 0 to pair 2.
        assert_eq!(rotation(&wide, false).frequencies[1], (0.1 / 4.0 * 0.5 + 0.1 * 0.5) as f32);
    }

    #[test]
    fn longrope_has_two_sets_of_factors() {
        let scaling = RopeScaling::LongRope {
            short: vec![1.0, 2.0, 4.0, 8.0],
            long: vec![2.0, 4.0, 8.0, 16.0],
            original_context: 64.0,
            magnitude: 1.5,
        };
        let scaled = rope(scaling);
        let (short, long) = (rotation(&scaled, false), rotation(&scaled, true));
        assert_eq!((short.frequencies, short.magnitude), (vec![1.0, 0.05, 0.0025, 0.000125], 1.5));
        assert_eq!((long.frequencies, long.magnitude), (vec![0.5, 0.025, 0.00125, 0.0000625], 1.5));
        // The long ones are for a model that goes beyond, and then for sequences of at least 65 tokens.
        assert!(long_rotation(&scaled, 64).is_none());
        assert_eq!(long_rotation(&scaled, 65).map(|(tokens, _)| tokens), Some(64));
    }
}
