//! Adapters: right against the f64 forward pass over merged weights, bit-identical in every batch.

use std::sync::Arc;

use tangram_checkpoint::{DType, Factor, LayerRole, LowRank, ModelSpec, Role};
use tangram_engine::{Adapter, Chunk, Executor, KvBlocks, LogitRows, Model, ModelError, TensorDesc, Weights};

use super::support::{Blocks, Sample, reference_logits, sample, spec};
use super::{DECODERS, bits, tokens};

/// A random adapter with its tensors as stored.
pub(crate) struct Stored {
    pub(crate) adapter: Arc<Adapter>,
    spec: ModelSpec,
    descs: Vec<TensorDesc>,
    pub(crate) bytes: Vec<Vec<u8>>,
}

/// An adapter on every matrix that can have one, ranks and scales that differ.
pub(crate) fn random_adapter(base: &ModelSpec, seed: u32) -> Stored {
    let mut spec = base.clone();
    for layer in 0..base.layers as u32 {
        for (index, matrix) in LowRank::MATRICES.into_iter().enumerate() {
            let in_mlp = index >= 4;
            if (in_mlp && base.layer_experts(layer as usize).is_some())
                || (matrix == LayerRole::Gate && !base.mlp.gated())
            {
                continue;
            }
            let rank = 1 + (index + layer as usize) % 5;
            spec.updates.push(LowRank { layer, matrix, rank, scale: 0.5 + index as f32 * 0.25 });
        }
    }
    let (mut descs, mut bytes) = (Vec::new(), Vec::new());
    let mut state = seed;
    for update in &spec.updates {
        for factor in [Factor::A, Factor::B] {
            let role = Role::LowRank(update.layer, update.matrix, factor);
            let shape = spec.shape(role);
            let count = shape.iter().product::<u64>();
            let mut values = Vec::new();
            for _ in 0..count {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                values.extend(((state >> 8) as f32 / (1 << 23) as f32 * 0.3 - 0.3).to_le_bytes());
            }
            descs.push(TensorDesc { role, dtype: DType::F32, shape });
            bytes.push(values);
        }
    }
    let adapter = Arc::new(Adapter::new(&spec, &descs).expect("an adapter"));
    Stored { adapter, spec, descs, bytes }
}

/// The base with the adapter's products added to its matrices.
pub(crate) fn merged(base: &Sample, stored: &Stored) -> Sample {
    let model = Model::new(base.model.spec().clone(), &base.descs).expect("a model");
    let mut values = base.values.clone();
    let numbers = |role: Role| -> Vec<f64> {
        let index = stored.descs.iter().position(|desc| desc.role == role).expect("a factor");
        let (words, _) = stored.bytes[index].as_chunks::<4>();
        words.iter().map(|&word| f64::from(f32::from_le_bytes(word))).collect()
    };
    for update in &stored.spec.updates {
        let a = numbers(Role::LowRank(update.layer, update.matrix, Factor::A));
        let b = numbers(Role::LowRank(update.layer, update.matrix, Factor::B));
        let (inputs, outputs) = (a.len() / update.rank, b.len() / update.rank);
        let matrix = values.get_mut(&Role::Layer(update.layer, update.matrix)).expect("a matrix");
        for (row, weights) in matrix.chunks_exact_mut(inputs).enumerate() {
            for (column, weight) in weights.iter_mut().enumerate() {
                let product = |j: usize| b[j * outputs + row] * a[j * inputs + column];
                *weight += f64::from(update.scale) * (0..update.rank).map(product).sum::<f64>();
            }
        }
    }
    Sample { model, descs: base.descs.clone(), bytes: Vec::new(), values }
}

struct Both<'a> {
    base: &'a Sample,
    adapters: &'a [&'a Stored],
}

impl Weights for Both<'_> {
    fn tensor(&self, index: usize) -> &[u8] {
        self.base.tensor(index)
    }

    fn adapter_tensor(&self, adapter: usize, index: usize) -> &[u8] {
        &self.adapters[adapter].bytes[index]
    }
}

/// All logits of several sequences in one pass, sequence `i` with adapter `of[i]`.
fn logits(
    executor: &Executor,
    base: &Sample,
    adapters: &[&Stored],
    sequences: &[&[u32]],
    of: &[Option<usize>],
) -> Vec<Vec<f32>> {
    let batch: Vec<Chunk<'_>> =
        sequences.iter().map(|tokens| Chunk { tokens, position: 0, logits: LogitRows::All }).collect();
    let list = adapters.iter().map(|stored| stored.adapter.clone()).collect();
    let mut pass = executor.begin_adapted(&base.model, &batch, &[], list, of).expect("a pass");
    let mut blocks = Blocks::new(&base.model);
    let mut taken: Vec<_> = sequences.iter().map(|tokens| blocks.take(tokens.len())).collect();
    let mut kv: Vec<KvBlocks<'_>> = taken.iter_mut().map(|blocks| blocks.as_mut_slice().into()).collect();
    let weights = Both { base, adapters };
    assert!(executor.advance(&mut pass, &base.model, &weights, &mut kv, usize::MAX).expect("success"));
    (0..batch.len()).map(|chunk| pass.logits(chunk).to_vec()).collect()
}

#[test]
fn adapters_agree_with_merged_weights_in_every_family() {
    for family in DECODERS {
        let base = sample(spec(family), DType::F32, 3);
        let stored = random_adapter(base.model.spec(), 5);
        let tokens = tokens(40, 2);
        let expected = reference_logits(&merged(&base, &stored), &tokens).concat();
        let without = reference_logits(&base, &tokens).concat();
        let largest = expected.iter().fold(0.0f64, |a, &b| a.max(b.abs()));
        let distance = expected.iter().zip(&without).fold(0.0f64, |a, (x, y)| a.max((x - y).abs()));
        assert!(distance / largest > 0.01, "{family}: the adapter changes too little to tell ({distance})");
        let found = logits(&Executor::new(2), &base, &[&stored], &[&tokens], &[Some(0)]).remove(0);
        for (found, expected) in found.iter().zip(&expected) {
            let error = (f64::from(*found) - expected).abs() / largest;
            assert!(error < 2e-5, "{family}: {found} instead of {expected}");
        }
    }
}

#[test]
fn a_sequence_is_the_same_whatever_adapters_share_its_batch() {
    for family in ["llama", "gemma3", "gpt_neox", "mixtral"] {
        let base = sample(spec(family), DType::BF16, 4);
        let (one, two) = (random_adapter(base.model.spec(), 6), random_adapter(base.model.spec(), 7));
        let lengths = [1, 21, 1, 9, 3, 1];
        let all: Vec<Vec<u32>> = lengths.iter().map(|&length| tokens(length, length as u32)).collect();
        let sequences: Vec<&[u32]> = all.iter().map(Vec::as_slice).collect();
        let of = [Some(1), None, Some(0), Some(1), Some(0), Some(1)];
        let executor = Executor::new(2);
        let together = logits(&executor, &base, &[&one, &two], &sequences, &of);
        for (index, sequence) in sequences.iter().enumerate() {
            let own: Vec<&Stored> = of[index].map(|adapter| [&one, &two][adapter]).into_iter().collect();
            let choice = of[index].map(|_| 0);
            let alone = logits(&Executor::new(1), &base, &own, &[sequence], &[choice]).remove(0);
            assert_eq!(bits(&together[index]), bits(&alone), "{family}: sequence {index}");
        }
        let executor = Executor::new(1);
        let plain = super::step(
            &executor,
            &base,
            &[Chunk { tokens: sequences[1], position: 0, logits: LogitRows::All }],
            &mut [Blocks::new(&base.model).take(21).as_mut_slice().into()],
        );
        assert_eq!(bits(&together[1]), bits(&plain.expect("logits")[0]), "{family}: no adapter, no change");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let base = sample(spec("llama"), DType::F32, 1);
    let stored = random_adapter(base.model.spec(), 1);
    let missing = Adapter::new(&stored.spec, &stored.descs[1..]).map(drop);
    assert!(matches!(missing, Err(ModelError::Missing(Role::LowRank(..)))));
    let strange = Adapter::new(&base.model.spec().clone(), &stored.descs).map(drop);
    assert!(strange.is_err());
    let quantised = TensorDesc { dtype: DType::Q8_0, ..stored.descs[0].clone() };
    let mut descs = stored.descs.clone();
    descs[0] = quantised;
    assert!(matches!(Adapter::new(&stored.spec, &descs).map(drop), Err(ModelError::DType { .. })));
    let twice: Vec<TensorDesc> = stored.descs.iter().chain(&stored.descs[..1]).cloned().collect();
    assert!(matches!(Adapter::new(&stored.spec, &twice).map(drop), Err(ModelError::Twice(_))));
    let executor = Executor::new(1);
    let chunk = Chunk { tokens: &[1, 2], position: 0, logits: LogitRows::Last };
    let other = sample(spec("qwen3"), DType::F32, 1);
    let begin = |model: &Model, of: &[Option<usize>]| {
        executor.begin_adapted(model, &[chunk], &[], vec![stored.adapter.clone()], of).map(drop)
    };
    assert!(begin(&other.model, &[Some(0)]).is_err(), "another base");
    assert!(begin(&base.model, &[Some(1)]).is_err(), "no such adapter");
    assert!(begin(&base.model, &[]).is_err(), "a chunk without a choice");
    // A tensor that is not there.
    let mut pass = executor
        .begin_adapted(&base.model, &[chunk], &[], vec![stored.adapter.clone()], &[Some(0)])
        .expect("a pass");
    let mut blocks = Blocks::new(&base.model).take(2);
    let kv = &mut [blocks.as_mut_slice().into()];
    assert!(executor.advance(&mut pass, &base.model, &base, kv, usize::MAX).is_err());
}
