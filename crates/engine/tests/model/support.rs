//! Random small models, KV blocks for them, and a second implementation of the forward pass: plain f64 over whole
//! sequences, sharing no code with the engine.

use std::collections::HashMap;
use std::sync::Arc;

use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};
use tangram_checkpoint::{
    Attention, DType, ExpertRole, Experts, LayerRole, LocalLayers, Mlp, ModelSpec, Norm, NormPlacement,
    Output, Pooling, Role, Rope, RopeScaling,
};
use tangram_device::cpu::CpuDevice;
use tangram_device::{Arena, Extent};
use tangram_engine::{Model, TensorDesc, Weights};

/// A model with its weights as stored and as numbers.
pub(crate) struct Sample {
    pub(crate) model: Model,
    pub(crate) descs: Vec<TensorDesc>,
    pub(crate) bytes: Vec<Vec<u8>>,
    pub(crate) values: HashMap<Role, Vec<f64>>,
}

impl Weights for Sample {
    fn tensor(&self, index: usize) -> &[u8] {
        &self.bytes[index]
    }
}

/// The families of the issue, small and awkward: head sizes that are no multiple of a vector, groups of 3.
pub(crate) fn spec(family: &str) -> ModelSpec {
    let decoder = ModelSpec {
        family: family.into(),
        vocab: 67,
        hidden: 64,
        intermediate: 96,
        layers: 3,
        heads: 6,
        kv_heads: 2,
        head_dim: 12,
        context: 128,
        norm: Norm::Rms { epsilon: 1e-5 },
        norm_placement: NormPlacement::Pre,
        qk_norm: false,
        rope: Some(Rope { theta: 10000.0, dims: 12, scaling: RopeScaling::None }),
        learned_positions: None,
        token_types: None,
        mlp: Mlp::GatedSilu,
        attention: Attention::Causal,
        output: Output::Logits { tied: false },
        ..ModelSpec::default()
    };
    match family {
        "llama" => ModelSpec {
            rope: Some(Rope {
                theta: 10000.0,
                dims: 12,
                scaling: RopeScaling::Factors { factors: vec![1.0, 1.0, 1.5, 2.0, 8.0, 8.0] },
            }),
            heads: 6,
            ..decoder
        },
        "qwen2" => ModelSpec { output: Output::Logits { tied: true }, head_dim: 32, heads: 2, ..decoder },
        "qwen3" => ModelSpec { qk_norm: true, head_dim: 16, heads: 4, ..decoder },
        "mistral" => ModelSpec {
            local: Some(LocalLayers { window: 11, layers: vec![0, 1, 2], rope: None }),
            ..decoder
        },
        "gemma2" => ModelSpec {
            local: Some(LocalLayers { window: 20, layers: vec![0, 2], rope: None }),
            attention_cap: Some(4.0),
            logit_cap: Some(3.0),
            query_scale: Some(0.4),
            ..gemma(decoder)
        },
        "gemma3" => ModelSpec {
            local: Some(LocalLayers {
                window: 5,
                layers: vec![0, 1],
                rope: Some(Rope { theta: 500.0, dims: 12, scaling: RopeScaling::None }),
            }),
            qk_norm: true,
            query_scale: Some(0.2),
            ..gemma(decoder)
        },
        "gpt2" => ModelSpec {
            learned_positions: Some(128),
            mlp: Mlp::GeluTanh,
            output: Output::Logits { tied: true },
            ..ungated(decoder)
        },
        "opt" => {
            ModelSpec { learned_positions: Some(130), position_offset: 2, mlp: Mlp::Relu, ..ungated(decoder) }
        }
        "gpt_neox" => ModelSpec {
            parallel_residual: true,
            rope: Some(Rope { theta: 10000.0, dims: 6, scaling: RopeScaling::None }),
            mlp: Mlp::Gelu,
            ..ungated(decoder)
        },
        "mixtral" => ModelSpec { experts: Some(experts(5, 2, true, vec![])), ..decoder },
        "qwen3_moe" => {
            ModelSpec { experts: Some(experts(7, 3, false, vec![1])), qk_norm: true, head_dim: 16, ..decoder }
        }
        "bert" => ModelSpec {
            heads: 4,
            kv_heads: 4,
            head_dim: 16,
            norm: Norm::Layer { epsilon: 1e-6 },
            norm_placement: NormPlacement::Post,
            rope: None,
            learned_positions: Some(100),
            token_types: Some(2),
            mlp: Mlp::Gelu,
            attention: Attention::Bidirectional,
            output: Output::Embedding { pooling: Pooling::Mean, normalise: true },
            ..decoder
        },
        other => panic!("no family {other}"),
    }
}

fn gemma(decoder: ModelSpec) -> ModelSpec {
    ModelSpec {
        norm_placement: NormPlacement::Sandwich,
        norm_plus_one: true,
        embedding_scale: Some(2.5),
        mlp: Mlp::GatedGeluTanh,
        output: Output::Logits { tied: true },
        ..decoder
    }
}

fn ungated(decoder: ModelSpec) -> ModelSpec {
    ModelSpec { kv_heads: decoder.heads, norm: Norm::Layer { epsilon: 1e-5 }, rope: None, ..decoder }
}

fn experts(count: usize, per_token: usize, normalise: bool, dense_layers: Vec<u32>) -> Experts {
    Experts { count, per_token, intermediate: 32, normalise, dense_layers }
}

/// Random weights for `spec`. Matrices are stored as `dtype`, norms in f32; families with biases get them.
pub(crate) fn sample(spec: ModelSpec, dtype: DType, seed: u64) -> Sample {
    let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut uniform = move || random.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0;
    let plus_one = spec.norm_plus_one;
    let mut roles = spec.required_roles();
    for layer in 0..spec.layers as u32 {
        let biases: &[LayerRole] = match spec.family.as_str() {
            "qwen2" => &[LayerRole::QueryBias, LayerRole::KeyBias, LayerRole::ValueBias],
            "bert" | "gpt2" | "opt" | "gpt_neox" => &[
                LayerRole::QueryBias,
                LayerRole::KeyBias,
                LayerRole::ValueBias,
                LayerRole::AttnOutBias,
                LayerRole::UpBias,
                LayerRole::DownBias,
            ],
            _ => &[],
        };
        roles.extend(biases.iter().map(|&bias| Role::Layer(layer, bias)));
    }
    let mut descs = Vec::new();
    let mut all_bytes = Vec::new();
    let mut values = HashMap::new();
    for role in roles {
        let shape = spec.shape(role);
        let count = shape.iter().product::<u64>() as usize;
        let vector = shape.len() == 1;
        // The rows of some matrices are no multiple of a quantised block.
        let whole = shape[shape.len() - 1].is_multiple_of(32);
        let dtype = match dtype {
            _ if vector => DType::F32,
            quantised if quantised.is_quantised() && !whole => DType::F16,
            dtype => dtype,
        };
        let scale = if vector { 0.3 } else { 2.0 / (shape[1] as f32).sqrt() };
        let norm = vector && !format!("{role:?}").contains("Bias");
        let mut bytes = Vec::new();
        let mut numbers = Vec::new();
        match dtype {
            DType::Q8_0 => {
                for _ in 0..count / 32 {
                    let d = half::f16::from_f32(scale / 127.0);
                    bytes.extend(d.to_le_bytes());
                    for _ in 0..32 {
                        let q = (uniform() * 127.0) as i8;
                        bytes.push(q as u8);
                        numbers.push(d.to_f64() * f64::from(q));
                    }
                }
            }
            _ => {
                for _ in 0..count {
                    let x = uniform() * scale + if norm && !plus_one { 1.0 } else { 0.0 };
                    match dtype {
                        DType::F32 => {
                            bytes.extend(x.to_le_bytes());
                            numbers.push(f64::from(x));
                        }
                        DType::BF16 => {
                            let x = half::bf16::from_f32(x);
                            bytes.extend(x.to_le_bytes());
                            numbers.push(x.to_f64());
                        }
                        _ => {
                            let x = half::f16::from_f32(x);
                            bytes.extend(x.to_le_bytes());
                            numbers.push(x.to_f64());
                        }
                    }
                }
            }
        }
        descs.push(TensorDesc { role, dtype, shape });
        all_bytes.push(bytes);
        values.insert(role, numbers);
    }
    let model = Model::new(spec, &descs).expect("a model");
    Sample { model, descs, bytes: all_bytes, values }
}

/// KV blocks out of a pool.
pub(crate) struct Blocks {
    arena: Arc<Arena>,
    block_bytes: usize,
    /// What blocks are aligned to.
    alignment: usize,
    next: usize,
}

impl Blocks {
    /// Not every block starts at a nice address.
    pub(crate) fn new(model: &Model) -> Blocks {
        Blocks::aligned(model, 4)
    }

    pub(crate) fn aligned(model: &Model, alignment: usize) -> Blocks {
        let block_bytes = model.kv().map_or(64, |kv| kv.block_bytes);
        let memory = CpuDevice::open(4 << 20, 4096).expect("a device");
        let arena = Arena::reserve(memory, 4 << 20).expect("an arena");
        Blocks { arena, block_bytes, alignment, next: 0 }
    }

    /// Blocks for `tokens` tokens, filled with NaN: nothing may be read that was not written.
    pub(crate) fn take(&mut self, tokens: usize) -> Vec<Extent> {
        (0..tokens.div_ceil(16))
            .map(|_| {
                let mut extent = self.arena.claim(self.next, self.block_bytes).expect("an extent");
                self.next = (self.next + self.block_bytes + 1).next_multiple_of(self.alignment);
                extent.host_bytes_mut().expect("host memory").fill(0xff);
                extent
            })
            .collect()
    }
}

/// The final states of a sequence (after the last norm), `[tokens][hidden]`.
fn states(sample: &Sample, tokens: &[u32]) -> Vec<Vec<f64>> {
    let spec = sample.model.spec();
    let get = |role| sample.values.get(&role);
    let row = |role: Role, row: usize| &sample.values[&role][row * spec.hidden..(row + 1) * spec.hidden];
    let norm = |x: &mut Vec<f64>, weight: Role, bias: Role| {
        let n = x.len() as f64;
        let epsilon = match spec.norm {
            Norm::Rms { epsilon } => f64::from(epsilon),
            Norm::Layer { epsilon } => {
                let mean = x.iter().sum::<f64>() / n;
                x.iter_mut().for_each(|x| *x -= mean);
                f64::from(epsilon)
            }
        };
        let scale = 1.0 / (x.iter().map(|x| x * x).sum::<f64>() / n + epsilon).sqrt();
        for i in 0..x.len() {
            let offset = if spec.norm_plus_one { 1.0 } else { 0.0 };
            x[i] =
                x[i] * scale * (sample.values[&weight][i] + offset) + get(bias).map_or(0.0, |bias| bias[i]);
        }
    };
    let linear = |x: &[f64], weight: Role, bias: Option<Role>| -> Vec<f64> {
        let rows = sample.values[&weight].chunks(x.len());
        let mut out: Vec<f64> = rows.map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect();
        if let Some(bias) = bias.and_then(get) {
            out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
        }
        out
    };
    let pre = spec.norm_placement != NormPlacement::Post;
    let sandwich = spec.norm_placement == NormPlacement::Sandwich;
    let block = |x: &[f64], layer: u32, expert: Option<u32>| -> Vec<f64> {
        let role = |part: ExpertRole, whole| {
            Role::Layer(layer, expert.map_or(whole, |expert| LayerRole::Expert(expert, part)))
        };
        let bias = |bias| Some(Role::Layer(layer, bias));
        let mut inner = linear(x, role(ExpertRole::Up, LayerRole::Up), bias(LayerRole::UpBias));
        if spec.mlp.gated() {
            let gate = linear(x, role(ExpertRole::Gate, LayerRole::Gate), None);
            inner.iter_mut().zip(gate).for_each(|(x, gate)| {
                *x *= if spec.mlp == Mlp::GatedSilu { gate / (1.0 + (-gate).exp()) } else { gelu_tanh(gate) }
            });
        } else {
            inner.iter_mut().for_each(|x| {
                *x = match spec.mlp {
                    Mlp::Relu => x.max(0.0),
                    Mlp::GeluTanh => gelu_tanh(*x),
                    _ => *x * 0.5 * (1.0 + erf(*x / std::f64::consts::SQRT_2)),
                }
            });
        }
        linear(&inner, role(ExpertRole::Down, LayerRole::Down), bias(LayerRole::DownBias))
    };
    let feed_forward = |x: &[f64], layer: u32| -> Vec<f64> {
        let Some(experts) = spec.layer_experts(layer as usize) else { return block(x, layer, None) };
        let scores = linear(x, Role::Layer(layer, LayerRole::Router), None);
        let total: f64 = scores.iter().map(|score| score.exp()).sum();
        let mut chosen: Vec<(f64, u32)> =
            scores.iter().zip(0..).map(|(score, expert)| (score.exp() / total, expert)).collect();
        chosen.sort_by(|a, b| b.0.total_cmp(&a.0));
        chosen.truncate(experts.per_token);
        let total: f64 = if experts.normalise { chosen.iter().map(|(weight, _)| weight).sum() } else { 1.0 };
        let mut out = vec![0.0; spec.hidden];
        for (weight, expert) in chosen {
            let result = block(x, layer, Some(expert));
            out.iter_mut().zip(result).for_each(|(out, x)| *out += weight / total * x);
        }
        out
    };
    let d = spec.head_dim;
    let mut x: Vec<Vec<f64>> = Vec::new();
    for (position, &token) in tokens.iter().enumerate() {
        let mut state = row(Role::TokenEmbedding, token as usize).to_vec();
        state.iter_mut().for_each(|x| *x *= spec.embedding_scale.map_or(1.0, f64::from));
        if spec.learned_positions.is_some() {
            let position = row(Role::PositionEmbedding, position + spec.position_offset);
            state.iter_mut().zip(position).for_each(|(x, p)| *x += p);
        }
        if spec.token_types.is_some() {
            state.iter_mut().zip(row(Role::TypeEmbedding, 0)).for_each(|(x, p)| *x += p);
        }
        if !pre {
            norm(&mut state, Role::EmbeddingNorm, Role::EmbeddingNormBias);
        }
        x.push(state);
    }
    for layer in 0..spec.layers as u32 {
        let role = |role| Role::Layer(layer, role);
        let heads = |x: &[f64], weight, bias, head_norm, position: usize| -> Vec<Vec<f64>> {
            let out = linear(x, role(weight), Some(role(bias)));
            let mut heads: Vec<Vec<f64>> = out.chunks(d).map(<[f64]>::to_vec).collect();
            for head in &mut heads {
                if weight == LayerRole::Value {
                    continue;
                }
                if spec.qk_norm {
                    norm(head, role(head_norm), role(LayerRole::AttnNormBias));
                }
                let local = spec.local.as_ref().filter(|_| spec.window(layer as usize).is_some());
                let own = local.and_then(|local| local.rope.as_ref());
                let Some(rope) = own.or(spec.rope.as_ref()) else { continue };
                for i in 0..rope.dims / 2 {
                    let mut frequency = rope.theta.powf(-2.0 * i as f64 / rope.dims as f64);
                    if let RopeScaling::Factors { factors } = &rope.scaling {
                        frequency /= f64::from(factors[i]);
                    }
                    let (sin, cos) = (position as f64 * frequency).sin_cos();
                    let (a, b) = (head[i], head[i + rope.dims / 2]);
                    head[i] = a * cos - b * sin;
                    head[i + rope.dims / 2] = b * cos + a * sin;
                }
            }
            heads
        };
        let mut queries = Vec::new();
        let mut keys = Vec::new();
        let mut values = Vec::new();
        for (position, state) in x.iter().enumerate() {
            let mut input = state.clone();
            if pre {
                norm(&mut input, role(LayerRole::AttnNorm), role(LayerRole::AttnNormBias));
            }
            use LayerRole::*;
            queries.push(heads(&input, Query, QueryBias, QueryNorm, position));
            keys.push(heads(&input, Key, KeyBias, KeyNorm, position));
            values.push(heads(&input, Value, ValueBias, KeyNorm, position));
        }
        for (position, state) in x.iter_mut().enumerate() {
            let before = state.clone();
            let seen = if spec.attention == Attention::Causal { position + 1 } else { tokens.len() };
            let mut attended = Vec::new();
            for (head, query) in queries[position].iter().enumerate() {
                let kv_head = head / (spec.heads / spec.kv_heads);
                let hidden =
                    spec.window(layer as usize).map_or(0, |window| (position + 1).saturating_sub(window));
                let weights: Vec<f64> = keys[hidden..seen]
                    .iter()
                    .map(|k| {
                        let dot: f64 = query.iter().zip(&k[kv_head]).map(|(q, k)| q * k).sum();
                        let score = dot * spec.query_scale.map_or(1.0 / (d as f64).sqrt(), f64::from);
                        spec.attention_cap.map_or(score, |cap| capped(score, cap)).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                attended.extend((0..d).map(|i| {
                    (hidden..seen).map(|p| weights[p - hidden] * values[p][kv_head][i]).sum::<f64>() / total
                }));
            }
            let mut out = linear(&attended, role(LayerRole::AttnOut), Some(role(LayerRole::AttnOutBias)));
            if sandwich {
                norm(&mut out, role(LayerRole::AttnPostNorm), role(LayerRole::AttnNormBias));
            }
            state.iter_mut().zip(out).for_each(|(x, out)| *x += out);
            if !pre {
                norm(state, role(LayerRole::AttnNorm), role(LayerRole::AttnNormBias));
            }
            let mut input = if spec.parallel_residual { before } else { state.clone() };
            if pre {
                norm(&mut input, role(LayerRole::MlpNorm), role(LayerRole::MlpNormBias));
            }
            let mut out = feed_forward(&input, layer);
            if sandwich {
                norm(&mut out, role(LayerRole::MlpPostNorm), role(LayerRole::MlpNormBias));
            }
            state.iter_mut().zip(out).for_each(|(x, out)| *x += out);
            if !pre {
                norm(state, role(LayerRole::MlpNorm), role(LayerRole::MlpNormBias));
            }
        }
    }
    if pre {
        x.iter_mut().for_each(|x| norm(x, Role::FinalNorm, Role::FinalNormBias));
    }
    x
}

/// The logits of every token of a sequence, `[tokens][vocab]`.
pub(crate) fn reference_logits(sample: &Sample, tokens: &[u32]) -> Vec<Vec<f64>> {
    let tied = sample.model.spec().output == Output::Logits { tied: true };
    let output = &sample.values[&if tied { Role::TokenEmbedding } else { Role::Output }];
    let logits = |x: &Vec<f64>| -> Vec<f64> {
        let logit = |row: &[f64]| row.iter().zip(x).map(|(w, x)| w * x).sum();
        let cap = sample.model.spec().logit_cap;
        output.chunks(x.len()).map(logit).map(|l| cap.map_or(l, |cap| capped(l, cap))).collect()
    };
    states(sample, tokens).iter().map(logits).collect()
}

/// The vector of a sequence.
pub(crate) fn reference_embedding(sample: &Sample, tokens: &[u32]) -> Vec<f64> {
    let states = states(sample, tokens);
    let Output::Embedding { pooling, normalise } = sample.model.spec().output else {
        panic!("no embedding model")
    };
    let mut vector = match pooling {
        Pooling::Cls => states[0].clone(),
        Pooling::Mean => (0..states[0].len())
            .map(|i| states.iter().map(|state| state[i]).sum::<f64>() / states.len() as f64)
            .collect(),
    };
    if normalise {
        let length = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
        vector.iter_mut().for_each(|x| *x /= length);
    }
    vector
}

fn capped(x: f64, cap: f32) -> f64 {
    f64::from(cap) * (x / f64::from(cap)).tanh()
}

fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

/// erf by its power series, for moderate arguments, and its limit beyond.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let mut term = x;
    let mut sum = x;
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}
