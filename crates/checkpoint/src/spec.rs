//! The declarative model description: one `ModelSpec` says everything the executor needs to know about a family.
//!
//! A new family should be a new combination of these fields, not a new file of code. The spec never names a
//! tensor of a foreign format; `names.rs` maps foreign names to [`Role`]s.

use serde::{Deserialize, Serialize};

/// What a model is, independent of where its weights came from. All sizes are element counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelSpec {
    /// The family as its config names it ("llama", "gemma2", "bert"); for people, not for decisions.
    pub family: String,
    /// Rows of the token embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width inside the feed-forward block.
    pub intermediate: usize,
    /// Transformer layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Longest sequence (prompt plus output) in tokens.
    pub context: usize,
    /// The normalisation used throughout.
    pub norm: Norm,
    /// Where the layer's norms sit.
    pub norm_placement: NormPlacement,
    /// Whether all norm weights are stored as their distance from 1 (Gemma's own files).
    #[serde(default)]
    pub norm_plus_one: bool,
    /// Whether attention and feed-forward block both read the layer's input and are added to it together (GPT-NeoX);
    /// else the feed-forward block reads what attention left.
    #[serde(default)]
    pub parallel_residual: bool,
    /// Whether query and key heads are RMS-normalised before the rotation (Qwen3, Gemma 3).
    pub qk_norm: bool,
    /// What token embeddings are multiplied with (Gemma: √hidden).
    #[serde(default)]
    pub embedding_scale: Option<f32>,
    /// What scores of queries with keys are multiplied with; `None` is 1/√head_dim.
    #[serde(default)]
    pub query_scale: Option<f32>,
    /// Attention scores `s` become `cap · tanh(s / cap)` (Gemma 2).
    #[serde(default)]
    pub attention_cap: Option<f32>,
    /// Logits `l` become `cap · tanh(l / cap)` (Gemma 2).
    #[serde(default)]
    pub logit_cap: Option<f32>,
    /// Rotary positions; `None` for models with learned positions.
    pub rope: Option<Rope>,
    /// Layers that look at the latest tokens only; `None` if every layer looks at everything.
    #[serde(default)]
    pub local: Option<LocalLayers>,
    /// Rows of the learned position embedding, if there is one (BERT, GPT-2, OPT).
    pub learned_positions: Option<usize>,
    /// The row of the first token's position in the learned position embedding (OPT: 2).
    #[serde(default)]
    pub position_offset: usize,
    /// Rows of the token-type embedding, if there is one (BERT). Tokens are of type 0; those of the second of two texts
    /// of type 1, if there is one.
    pub token_types: Option<usize>,
    /// The feed-forward block.
    pub mlp: Mlp,
    /// Layers whose feed-forward block is a choice among experts; `None` if there are none.
    #[serde(default)]
    pub experts: Option<Experts>,
    /// Which positions a token may look at.
    pub attention: Attention,
    /// What the model gives.
    pub output: Output,
    /// Low-rank updates of matrices (an adapter on a base model), ascending by layer and role. Empty for a model of its
    /// own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub updates: Vec<LowRank>,
}

impl Default for ModelSpec {
    /// A decoder in which everything optional is off and all sizes are 0: what families start from.
    fn default() -> ModelSpec {
        ModelSpec {
            family: String::new(),
            vocab: 0,
            hidden: 0,
            intermediate: 0,
            layers: 0,
            heads: 0,
            kv_heads: 0,
            head_dim: 0,
            context: 0,
            norm: Norm::Rms { epsilon: 1e-6 },
            norm_placement: NormPlacement::Pre,
            norm_plus_one: false,
            parallel_residual: false,
            qk_norm: false,
            embedding_scale: None,
            query_scale: None,
            attention_cap: None,
            logit_cap: None,
            rope: None,
            local: None,
            learned_positions: None,
            position_offset: 0,
            token_types: None,
            mlp: Mlp::GatedSilu,
            experts: None,
            attention: Attention::Causal,
            output: Output::Logits { tied: false },
            updates: Vec::new(),
        }
    }
}

/// A low-rank update of a layer's matrix (LoRA, arXiv 2106.09685): where the base computes `W x`, this model computes
/// `W x + scale · B (A x)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LowRank {
    /// Which layer.
    pub layer: u32,
    /// Which of its matrices: one of [`LowRank::MATRICES`].
    pub matrix: LayerRole,
    /// Rows of `A` and columns of `B`.
    pub rank: usize,
    /// What the product is multiplied with.
    pub scale: f32,
}

impl LowRank {
    /// The matrices that can have an update.
    pub const MATRICES: [LayerRole; 7] = [
        LayerRole::Query,
        LayerRole::Key,
        LayerRole::Value,
        LayerRole::AttnOut,
        LayerRole::Gate,
        LayerRole::Up,
        LayerRole::Down,
    ];
}

/// Which of the two matrices of a [`LowRank`] update.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Factor {
    /// `A`, `[rank, in_features]`.
    A,
    /// `B` transposed, `[rank, out_features]`: so both are read row by row.
    B,
}

/// Normalisation with its epsilon.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Norm {
    /// x / rms(x) · weight.
    Rms {
        /// Added to the mean square.
        epsilon: f32,
    },
    /// (x − mean) / std · weight + bias.
    Layer {
        /// Added to the variance.
        epsilon: f32,
    },
}

/// Where the norms of a layer sit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormPlacement {
    /// Before attention and before the feed-forward block, with a final norm after the last layer (Llama, Qwen).
    Pre,
    /// As [`NormPlacement::Pre`], and on the result of each of the two before it is added (Gemma 2 and 3).
    Sandwich,
    /// After each residual addition, with a norm on the embeddings and none at the end (BERT).
    Post,
}

impl NormPlacement {
    /// Whether a layer normalises what its blocks read; if not, it normalises what they leave.
    pub fn before(self) -> bool {
        self != NormPlacement::Post
    }
}

/// Layers in which a token looks at the latest tokens only (sliding window attention).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LocalLayers {
    /// How many tokens it looks at, itself included.
    pub window: usize,
    /// Which layers, ascending.
    pub layers: Vec<u32>,
    /// Rotary positions of these layers, where they differ from the others' (Gemma 3).
    pub rope: Option<Rope>,
}

/// A feed-forward block of which a router picks a few parts for every token. An expert is the gated block of
/// [`ModelSpec::mlp`] with its own width; its result counts by the router's softmax.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Experts {
    /// Experts of a layer.
    pub count: usize,
    /// Experts that a token goes to.
    pub per_token: usize,
    /// Width inside an expert, in elements.
    pub intermediate: usize,
    /// Whether the weights of the chosen experts are scaled to add up to 1.
    pub normalise: bool,
    /// Layers with an ordinary feed-forward block instead, ascending.
    pub dense_layers: Vec<u32>,
}

/// Rotary position embedding. Pairs are (i, i + dims/2), the Hugging Face order; Meta's interleaved order is
/// converted at import.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Elements of a head that are rotated (from the start of the head).
    pub dims: usize,
    /// Stretching beyond the trained length.
    pub scaling: RopeScaling,
}

/// Changes to the rotary frequencies for longer contexts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// How many times longer the context is.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, smooth in between.
    Llama3 {
        /// How many times longer the context is.
        factor: f64,
        /// Wavelengths above `original_context / low_freq_factor` are scaled fully.
        low_freq_factor: f64,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length in tokens before stretching.
        original_context: f64,
    },
    /// Frequency `i` divided by `factors[i]` (GGUF's `rope_freqs.weight`).
    Factors {
        /// One divisor per rotated pair.
        factors: Vec<f32>,
    },
    /// YaRN (arXiv 2309.00071): slow pairs divided by `factor`, fast ones kept, a ramp in between; the rotated
    /// elements are multiplied with `magnitude`.
    Yarn {
        /// How many times longer the context is.
        factor: f64,
        /// Turns within the original context above which a pair is kept.
        beta_fast: f64,
        /// Turns within the original context below which a pair is scaled fully.
        beta_slow: f64,
        /// Context length in tokens before stretching.
        original_context: f64,
        /// Whether the ends of the ramp are rounded outwards to whole pairs.
        truncate: bool,
        /// Of query and key, after the rotation.
        magnitude: f64,
    },
    /// LongRoPE (arXiv 2402.13753): frequency `i` divided by `short[i]`, or by `long[i]` for all tokens of a sequence
    /// that is longer than the original context; the rotated elements are multiplied with `magnitude`.
    LongRope {
        /// One divisor per rotated pair, for sequences up to the original context.
        short: Vec<f32>,
        /// One divisor per rotated pair, for longer ones.
        long: Vec<f32>,
        /// Context length in tokens before stretching.
        original_context: f64,
        /// Of query and key, after the rotation.
        magnitude: f64,
    },
}

/// The feed-forward block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mlp {
    /// down(silu(gate(x)) · up(x)).
    GatedSilu,
    /// down(gelu(gate(x)) · up(x)) with the tanh approximation of GELU (Gemma).
    GatedGeluTanh,
    /// down(gelu(up(x))) with the exact (erf) GELU.
    Gelu,
    /// down(gelu(up(x))) with the tanh approximation of GELU (GPT-2).
    GeluTanh,
    /// down(max(up(x), 0)) (OPT).
    Relu,
}

impl Mlp {
    /// Whether there is a gate.
    pub fn gated(self) -> bool {
        matches!(self, Mlp::GatedSilu | Mlp::GatedGeluTanh)
    }
}

/// Which positions a token may look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attention {
    /// Itself and everything before; keys and values are cached in KV blocks.
    Causal,
    /// The whole sequence; nothing is cached.
    Bidirectional,
}

/// What a forward pass gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Output {
    /// Next-token logits over the vocabulary.
    Logits {
        /// The output matrix is the token embedding.
        tied: bool,
    },
    /// One vector per sequence.
    Embedding {
        /// How token states become one vector.
        pooling: Pooling,
        /// Scale the vector to length one.
        normalise: bool,
    },
    /// One number per sequence, how well two texts fit (a cross-encoder): a row of [`Role::Classifier`] applied to
    /// tanh([`Role::Pooler`] · the first token's state).
    Score {
        /// What the number goes through at the end.
        activation: ScoreActivation,
    },
}

/// What a score goes through at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoreActivation {
    /// Nothing.
    Identity,
    /// 1 / (1 + exp(−x)).
    Sigmoid,
}

/// How token states become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// Mean over the tokens.
    Mean,
    /// The first token's state.
    Cls,
}

/// What a tensor is for. Matrices are `[out_features, in_features]`, row-major; vectors are `[features]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// `[vocab, hidden]`.
    TokenEmbedding,
    /// `[learned_positions, hidden]`.
    PositionEmbedding,
    /// `[token_types, hidden]`.
    TypeEmbedding,
    /// `[hidden]`, only with [`NormPlacement::Post`].
    EmbeddingNorm,
    /// `[hidden]`.
    EmbeddingNormBias,
    /// A tensor of layer `.0`.
    Layer(u32, LayerRole),
    /// `[hidden]`, not with [`NormPlacement::Post`].
    FinalNorm,
    /// `[hidden]`.
    FinalNormBias,
    /// `[vocab, hidden]`; absent when tied.
    Output,
    /// `[hidden, hidden]`. This and the next ones only with [`Output::Score`].
    Pooler,
    /// `[hidden]`.
    PoolerBias,
    /// `[1, hidden]`.
    Classifier,
    /// `[1]`.
    ClassifierBias,
    /// A factor of the update of matrix `.1` of layer `.0`, never quantised.
    LowRank(u32, LayerRole, Factor),
}

/// What a tensor inside a layer is for, in the order in which the forward pass asks for it (pre-norm families).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerRole {
    /// `[hidden]`; with [`NormPlacement::Post`] applied after the attention residual.
    AttnNorm,
    /// `[hidden]`.
    AttnNormBias,
    /// `[heads · head_dim, hidden]`.
    Query,
    /// `[heads · head_dim]`.
    QueryBias,
    /// `[kv_heads · head_dim, hidden]`.
    Key,
    /// `[kv_heads · head_dim]`.
    KeyBias,
    /// `[kv_heads · head_dim, hidden]`.
    Value,
    /// `[kv_heads · head_dim]`.
    ValueBias,
    /// `[head_dim]`.
    QueryNorm,
    /// `[head_dim]`.
    KeyNorm,
    /// `[hidden, heads · head_dim]`.
    AttnOut,
    /// `[hidden]`.
    AttnOutBias,
    /// `[hidden]`, only with [`NormPlacement::Sandwich`].
    AttnPostNorm,
    /// `[hidden]`; with [`NormPlacement::Post`] applied after the feed-forward residual.
    MlpNorm,
    /// `[hidden]`.
    MlpNormBias,
    /// `[experts, hidden]`, only in layers with experts.
    Router,
    /// A matrix of expert `.0`, only in layers with experts.
    Expert(u32, ExpertRole),
    /// `[intermediate, hidden]`, only gated. This and the next ones not in layers with experts.
    Gate,
    /// `[intermediate]`.
    GateBias,
    /// `[intermediate, hidden]`.
    Up,
    /// `[intermediate]`.
    UpBias,
    /// `[hidden, intermediate]`.
    Down,
    /// `[hidden]`.
    DownBias,
    /// `[hidden]`, only with [`NormPlacement::Sandwich`].
    MlpPostNorm,
}

/// What a tensor of an expert is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertRole {
    /// `[expert intermediate, hidden]`.
    Gate,
    /// `[expert intermediate, hidden]`.
    Up,
    /// `[hidden, expert intermediate]`.
    Down,
}

impl ModelSpec {
    /// Stages of a forward pass: 0 is the embedding, 1..=layers the layers, layers + 1 the head. The executor needs
    /// the tensors of stage `s` only when it gets there; loading follows the same order.
    pub fn stages(&self) -> usize {
        self.layers + 2
    }

    /// The stage that first needs a tensor.
    pub fn stage(&self, role: Role) -> usize {
        match role {
            Role::TokenEmbedding
            | Role::PositionEmbedding
            | Role::TypeEmbedding
            | Role::EmbeddingNorm
            | Role::EmbeddingNormBias => 0,
            Role::Layer(layer, _) | Role::LowRank(layer, ..) => 1 + layer as usize,
            Role::FinalNorm
            | Role::FinalNormBias
            | Role::Output
            | Role::Pooler
            | Role::PoolerBias
            | Role::Classifier
            | Role::ClassifierBias => self.layers + 1,
        }
    }

    /// The model without its updates.
    pub fn base(&self) -> ModelSpec {
        ModelSpec { updates: Vec::new(), ..self.clone() }
    }

    /// The update of a matrix, if it has one.
    pub fn update(&self, layer: u32, matrix: LayerRole) -> Option<&LowRank> {
        let place = |update: &LowRank| (update.layer, update.matrix);
        let index = self.updates.binary_search_by_key(&(layer, matrix), place).ok()?;
        self.updates.get(index)
    }

    /// Whether the model generates text (as opposed to giving embeddings or scores).
    pub fn generates(&self) -> bool {
        matches!(self.output, Output::Logits { .. })
    }

    /// Whether the model gives scores of pairs of texts.
    pub fn scores(&self) -> bool {
        matches!(self.output, Output::Score { .. })
    }

    /// How many tokens a token of this layer looks at, itself included; `None` for all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let local = self.local.as_ref()?;
        local.layers.iter().any(|&local| local as usize == layer).then_some(local.window)
    }

    /// The experts of this layer, if it has any.
    pub fn layer_experts(&self, layer: usize) -> Option<&Experts> {
        self.experts
            .as_ref()
            .filter(|experts| !experts.dense_layers.iter().any(|&dense| dense as usize == layer))
    }

    /// The shape that a tensor of this role must have, outermost dimension first.
    pub fn shape(&self, role: Role) -> Vec<u64> {
        let hidden = self.hidden as u64;
        let intermediate = self.intermediate as u64;
        let queries = (self.heads * self.head_dim) as u64;
        let keys = (self.kv_heads * self.head_dim) as u64;
        let (experts, expert_intermediate) = self
            .experts
            .as_ref()
            .map_or((0, 0), |experts| (experts.count as u64, experts.intermediate as u64));
        match role {
            Role::TokenEmbedding | Role::Output => vec![self.vocab as u64, hidden],
            Role::PositionEmbedding => vec![self.learned_positions.unwrap_or(0) as u64, hidden],
            Role::TypeEmbedding => vec![self.token_types.unwrap_or(0) as u64, hidden],
            Role::EmbeddingNorm
            | Role::EmbeddingNormBias
            | Role::FinalNorm
            | Role::FinalNormBias
            | Role::PoolerBias => vec![hidden],
            Role::Pooler => vec![hidden, hidden],
            Role::Classifier => vec![1, hidden],
            Role::ClassifierBias => vec![1],
            Role::Layer(_, layer_role) => match layer_role {
                LayerRole::AttnNorm
                | LayerRole::AttnNormBias
                | LayerRole::AttnOutBias
                | LayerRole::AttnPostNorm
                | LayerRole::MlpNorm
                | LayerRole::MlpNormBias
                | LayerRole::DownBias
                | LayerRole::MlpPostNorm => vec![hidden],
                LayerRole::Query => vec![queries, hidden],
                LayerRole::QueryBias => vec![queries],
                LayerRole::Key | LayerRole::Value => vec![keys, hidden],
                LayerRole::KeyBias | LayerRole::ValueBias => vec![keys],
                LayerRole::QueryNorm | LayerRole::KeyNorm => vec![self.head_dim as u64],
                LayerRole::AttnOut => vec![hidden, queries],
                LayerRole::Router => vec![experts, hidden],
                LayerRole::Expert(_, ExpertRole::Gate | ExpertRole::Up) => vec![expert_intermediate, hidden],
                LayerRole::Expert(_, ExpertRole::Down) => vec![hidden, expert_intermediate],
                LayerRole::Gate | LayerRole::Up => vec![intermediate, hidden],
                LayerRole::GateBias | LayerRole::UpBias => vec![intermediate],
                LayerRole::Down => vec![hidden, intermediate],
            },
            Role::LowRank(layer, matrix, factor) => {
                let rank = self.update(layer, matrix).map_or(0, |update| update.rank as u64);
                let (outputs, inputs) = match self.shape(Role::Layer(layer, matrix))[..] {
                    [outputs, inputs] => (outputs, inputs),
                    _ => (0, 0),
                };
                vec![rank, if factor == Factor::A { inputs } else { outputs }]
            }
        }
    }

    /// Roles without which the model cannot run, in execution order.
    pub fn required_roles(&self) -> Vec<Role> {
        let mut roles = vec![Role::TokenEmbedding];
        if self.learned_positions.is_some() {
            roles.push(Role::PositionEmbedding);
        }
        if self.token_types.is_some() {
            roles.push(Role::TypeEmbedding);
        }
        let layer_norm = matches!(self.norm, Norm::Layer { .. });
        if self.norm_placement == NormPlacement::Post {
            roles.push(Role::EmbeddingNorm);
            if layer_norm {
                roles.push(Role::EmbeddingNormBias);
            }
        }
        for layer in 0..self.layers as u32 {
            let mut push = |role| roles.push(Role::Layer(layer, role));
            push(LayerRole::AttnNorm);
            if layer_norm {
                push(LayerRole::AttnNormBias);
            }
            push(LayerRole::Query);
            push(LayerRole::Key);
            push(LayerRole::Value);
            if self.qk_norm {
                push(LayerRole::QueryNorm);
                push(LayerRole::KeyNorm);
            }
            push(LayerRole::AttnOut);
            let sandwich = self.norm_placement == NormPlacement::Sandwich;
            if sandwich {
                push(LayerRole::AttnPostNorm);
            }
            push(LayerRole::MlpNorm);
            if layer_norm {
                push(LayerRole::MlpNormBias);
            }
            if let Some(experts) = self.layer_experts(layer as usize) {
                push(LayerRole::Router);
                for expert in 0..experts.count as u32 {
                    for role in [ExpertRole::Gate, ExpertRole::Up, ExpertRole::Down] {
                        push(LayerRole::Expert(expert, role));
                    }
                }
            } else {
                if self.mlp.gated() {
                    push(LayerRole::Gate);
                }
                push(LayerRole::Up);
                push(LayerRole::Down);
            }
            if sandwich {
                push(LayerRole::MlpPostNorm);
            }
        }
        if self.norm_placement.before() {
            roles.push(Role::FinalNorm);
            if layer_norm {
                roles.push(Role::FinalNormBias);
            }
        }
        if self.output == (Output::Logits { tied: false }) {
            roles.push(Role::Output);
        }
        if self.scores() {
            roles.extend([Role::Pooler, Role::PoolerBias, Role::Classifier, Role::ClassifierBias]);
        }
        for update in &self.updates {
            roles.extend([Factor::A, Factor::B].map(|f| Role::LowRank(update.layer, update.matrix, f)));
        }
        roles.sort_by_key(|&role| self.stage(role));
        roles
    }
}
