//! Whole models: right against an independent f64 forward pass, and bit-identical in every batch, chunking, thread
//! count and order of arrival of the weights.
#![expect(clippy::expect_used, reason = "helpers of tests, not tests themselves")]

mod adapter;
mod cuda;
mod parity;
mod support;

use proptest::prelude::*;
use support::{Blocks, Sample, reference_embedding, reference_logits, sample, spec};
use tangram_checkpoint::{DType, LayerRole, Output, Pooling, Role};
use tangram_device::Extent;
use tangram_engine::kernels::Isa;
use tangram_engine::{
    Chunk, Executor, KvBlocks, LogitRows, Model, ModelError, PassError, PassShape, TensorDesc,
};

const DECODERS: [&str; 11] = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3",
    "gpt2",
    "opt",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
];

fn tokens(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| (i * 31 + seed * 17 + i * i * 7) % 67).collect()
}

/// Runs one step to the end and gives every chunk's logits.
fn step(
    executor: &Executor,
    sample: &Sample,
    batch: &[Chunk<'_>],
    kv: &mut [KvBlocks<'_>],
) -> Result<Vec<Vec<f32>>, PassError> {
    let mut pass = executor.begin(&sample.model, batch)?;
    assert!(executor.advance(&mut pass, &sample.model, sample, kv, usize::MAX)?);
    let logits = (0..batch.len()).map(|chunk| pass.logits(chunk).to_vec()).collect();
    executor.recycle(pass);
    Ok(logits)
}

/// The logits of all tokens, computed in chunks of the given sizes.
fn in_chunks(executor: &Executor, sample: &Sample, tokens: &[u32], sizes: &[usize]) -> Vec<f32> {
    let mut blocks = Blocks::new(&sample.model).take(tokens.len());
    let mut logits = Vec::new();
    let mut position = 0;
    for &size in sizes {
        let chunk = Chunk { tokens: &tokens[position..position + size], position, logits: LogitRows::All };
        logits.extend(
            step(executor, sample, &[chunk], &mut [blocks.as_mut_slice().into()]).expect("logits").remove(0),
        );
        position += size;
    }
    assert_eq!(position, tokens.len());
    logits
}

fn bits(values: &[f32]) -> Vec<u32> {
    assert!(values.iter().all(|x| x.is_finite()));
    values.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn decoders_agree_with_the_reference() {
    for family in DECODERS {
        for (dtype, tolerance) in
            [(DType::F32, 2e-5), (DType::BF16, 4e-3), (DType::Q8_0, 4e-3), (DType::F16, 4e-3)]
        {
            let sample = sample(spec(family), dtype, 1);
            let tokens = tokens(45, 1);
            let expected = reference_logits(&sample, &tokens).concat();
            let largest = expected.iter().fold(0.0f64, |a, &b| a.max(b.abs()));
            for isa in Isa::available() {
                let found = in_chunks(&Executor::with_isa(2, isa), &sample, &tokens, &[45]);
                assert_eq!(found.len(), expected.len());
                for (i, (&found, expected)) in found.iter().zip(&expected).enumerate() {
                    let error = (f64::from(found) - expected).abs() / largest;
                    assert!(
                        error < tolerance,
                        "{family} {dtype} {} element {i}: {found} {expected}",
                        isa.name()
                    );
                }
            }
        }
    }
}

#[test]
fn embeddings_agree_with_the_reference() {
    for pooling in [Pooling::Mean, Pooling::Cls] {
        for normalise in [true, false] {
            let mut spec = spec("bert");
            spec.output = Output::Embedding { pooling, normalise };
            let sample = sample(spec, DType::F32, 2);
            assert_eq!(sample.model.kv(), None);
            let executor = Executor::new(2);
            let texts: Vec<Vec<u32>> = [30, 1, 17, 100].iter().map(|&n| tokens(n, n as u32)).collect();
            let batch: Vec<Chunk<'_>> =
                texts.iter().map(|tokens| Chunk { tokens, position: 0, logits: LogitRows::None }).collect();
            let run = |batch: &[Chunk<'_>]| -> Vec<Vec<f32>> {
                let mut pass = executor.begin(&sample.model, batch).expect("a pass");
                assert!(
                    executor
                        .advance(&mut pass, &sample.model, &sample, &mut [], usize::MAX)
                        .expect("success")
                );
                assert!(pass.logits(0).is_empty());
                (0..batch.len()).map(|chunk| pass.embedding(chunk).to_vec()).collect()
            };
            for (index, found) in run(&batch).iter().enumerate() {
                let expected = reference_embedding(&sample, &texts[index]);
                for (found, expected) in found.iter().zip(&expected) {
                    assert!((f64::from(*found) - expected).abs() < 2e-5, "{pooling:?} {found} {expected}");
                }
                assert_eq!(bits(found), bits(&run(&batch[index..=index])[0]), "alone");
            }
        }
    }
}

#[test]
fn stages_one_by_one_change_nothing() {
    let executor = Executor::new(2);
    for family in DECODERS {
        let sample = sample(spec(family), DType::BF16, 3);
        let tokens = tokens(20, 3);
        let whole = in_chunks(&executor, &sample, &tokens, &[20]);
        let mut blocks = Blocks::new(&sample.model).take(20);
        let chunk = Chunk { tokens: &tokens, position: 0, logits: LogitRows::All };
        let mut pass = executor.begin(&sample.model, &[chunk]).expect("a pass");
        let stages = sample.model.spec().stages();
        for ready in 0..=stages {
            let kv: &mut [KvBlocks<'_>] = &mut [blocks.as_mut_slice().into()];
            let done = executor.advance(&mut pass, &sample.model, &sample, kv, ready).expect("success");
            assert_eq!((pass.stage(), done), (ready, ready == stages));
        }
        assert_eq!(bits(pass.logits(0)), bits(&whole));
        pass.logits_mut(0)[3] = 7.0;
        assert_eq!(pass.logits(0)[3], 7.0);
    }
}

#[test]
fn only_tensors_of_ready_stages_are_read() {
    struct Guarded<'a>(&'a Sample, std::sync::Mutex<Vec<usize>>);
    impl tangram_engine::Weights for Guarded<'_> {
        fn tensor(&self, index: usize) -> &[u8] {
            self.1.lock().expect("no panic").push(index);
            self.0.tensor(index)
        }
    }
    let sample = sample(spec("qwen2"), DType::F32, 4);
    let spec = sample.model.spec();
    let mut roles = spec.required_roles();
    for layer in 0..spec.layers as u32 {
        let biases = [LayerRole::QueryBias, LayerRole::KeyBias, LayerRole::ValueBias];
        roles.extend(biases.map(|bias| Role::Layer(layer, bias)));
    }
    let executor = Executor::new(1);
    let mut blocks = Blocks::new(&sample.model).take(4);
    let chunk = Chunk { tokens: &[1, 2, 3, 4], position: 0, logits: LogitRows::Last };
    let mut pass = executor.begin(&sample.model, &[chunk]).expect("a pass");
    for ready in 1..=spec.stages() {
        let guarded = Guarded(&sample, std::sync::Mutex::default());
        executor
            .advance(&mut pass, &sample.model, &guarded, &mut [blocks.as_mut_slice().into()], ready)
            .expect("success");
        let read = guarded.1.into_inner().expect("no panic");
        assert!(!read.is_empty());
        assert!(read.iter().all(|&index| spec.stage(roles[index]) < ready));
    }
}

#[test]
fn early_rows_stand_in_for_the_token_embedding_until_the_last_stage() {
    struct Late<'a>(&'a Sample, usize);
    impl tangram_engine::Weights for Late<'_> {
        fn tensor(&self, index: usize) -> &[u8] {
            assert_ne!(index, self.1, "the embedding is not there yet");
            self.0.tensor(index)
        }
    }
    let executor = Executor::new(2);
    let families = ["llama", "gemma3", "gpt2", "mixtral"].map(|family| sample(spec(family), DType::BF16, 5));
    let quantised = sample(spec("qwen2"), DType::Q8_0, 5);
    for sample in families.iter().chain([&quantised]) {
        let roles = sample.model.spec().required_roles();
        let embedding = roles.iter().position(|&role| role == Role::TokenEmbedding).expect("an embedding");
        let (one, two) = (tokens(9, 1), tokens(5, 2));
        let chunk = |tokens| Chunk { tokens, position: 0, logits: LogitRows::All };
        let batch = [chunk(&one), chunk(&two)];
        let row_bytes = sample.model.token_row_bytes();
        let rows = |tokens: &[u32]| -> Vec<u8> {
            let bytes = |&token: &u32| &sample.bytes[embedding][token as usize * row_bytes..][..row_bytes];
            tokens.iter().flat_map(bytes).copied().collect()
        };
        let run = |early: Option<Vec<u8>>| {
            let mut blocks = [one.len(), two.len()].map(|tokens| Blocks::new(&sample.model).take(tokens));
            let [first, second] = &mut blocks;
            let mut kv = [first.as_mut_slice().into(), second.as_mut_slice().into()];
            let mut pass = executor.begin(&sample.model, &batch)?;
            if let Some(rows) = early {
                pass.set_early_rows(Box::new(rows));
                let late = Late(sample, embedding);
                let last = sample.model.spec().stages() - 1;
                assert!(!executor.advance(&mut pass, &sample.model, &late, &mut kv, last)?);
            }
            executor.advance(&mut pass, &sample.model, sample, &mut kv, usize::MAX)?;
            Ok::<_, PassError>([bits(pass.logits(0)), bits(pass.logits(1))])
        };
        let right = [rows(&one), rows(&two)].concat();
        assert_eq!(run(Some(right.clone())), run(None));
        let mut wrong = right.clone();
        wrong[right.len() / 2] ^= 1;
        assert_eq!(run(Some(wrong)), Err(PassError::EarlyRows), "other bytes than those of the embedding");
        assert_eq!(run(Some(right[row_bytes..].to_vec())), Err(PassError::EarlyRows), "too few rows");
    }
}

#[test]
fn experts_that_no_token_goes_to_are_not_read() {
    struct Guarded<'a>(&'a Sample, std::sync::Mutex<Vec<usize>>);
    impl tangram_engine::Weights for Guarded<'_> {
        fn tensor(&self, index: usize) -> &[u8] {
            self.1.lock().expect("no panic").push(index);
            self.0.tensor(index)
        }
    }
    for (family, layers, per_token) in [("mixtral", 3, 2), ("qwen3_moe", 2, 3)] {
        let sample = sample(spec(family), DType::BF16, 9);
        let roles = sample.model.spec().required_roles();
        let mut blocks = Blocks::new(&sample.model).take(1);
        let executor = Executor::new(1);
        let chunk = Chunk { tokens: &[5], position: 0, logits: LogitRows::Last };
        let mut pass = executor.begin(&sample.model, &[chunk]).expect("a pass");
        let guarded = Guarded(&sample, std::sync::Mutex::default());
        let kv = &mut [blocks.as_mut_slice().into()];
        assert!(executor.advance(&mut pass, &sample.model, &guarded, kv, usize::MAX).expect("success"));
        let mut read = guarded.1.into_inner().expect("no panic");
        read.retain(|&index| matches!(roles[index], Role::Layer(_, LayerRole::Expert(..))));
        assert_eq!(read.len(), layers * per_token * 3);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn chunking_changes_no_bit(
        family in prop::sample::select(DECODERS.to_vec()),
        dtype in prop::sample::select(vec![DType::F32, DType::BF16, DType::Q8_0]),
        sizes in prop::collection::vec(1usize..30, 1..6),
        threads in 1usize..4,
    ) {
        let sample = sample(spec(family), dtype, 5);
        let count = sizes.iter().sum::<usize>().min(128);
        let mut cut = Vec::new();
        for size in sizes {
            let size = size.min(count - cut.iter().sum::<usize>());
            cut.extend((size > 0).then_some(size));
        }
        let tokens = tokens(count, 5);
        let whole = in_chunks(&Executor::new(1), &sample, &tokens, &[count]);
        let chunked = in_chunks(&Executor::new(threads), &sample, &tokens, &cut);
        prop_assert_eq!(bits(&whole), bits(&chunked));
    }

    /// Sequences that join, prefill in chunks and decode side by side give what they give alone.
    #[test]
    fn company_changes_no_bit(
        family in prop::sample::select(DECODERS.to_vec()),
        dtype in prop::sample::select(vec![DType::F32, DType::BF16, DType::Q8_0]),
        plans in prop::collection::vec((0usize..4, prop::collection::vec(1usize..20, 1..5)), 1..8),
        threads in 1usize..4,
    ) {
        let sample = sample(spec(family), dtype, 6);
        let executor = Executor::new(threads);
        let mut source = Blocks::new(&sample.model);
        struct Sequence { tokens: Vec<u32>, start: usize, sizes: Vec<usize>, position: usize, blocks: Vec<Extent> }
        let mut sequences: Vec<Sequence> = plans
            .iter()
            .enumerate()
            .map(|(seed, (start, sizes))| {
                let count = sizes.iter().sum();
                let blocks = source.take(count);
                Sequence { tokens: tokens(count, seed as u32), start: *start, sizes: sizes.clone(), position: 0, blocks }
            })
            .collect();
        let mut found = vec![Vec::new(); sequences.len()];
        for now in 0usize..12 {
            let mut who = Vec::new();
            let mut batch = Vec::new();
            let mut kv: Vec<KvBlocks<'_>> = Vec::new();
            for (index, sequence) in sequences.iter_mut().enumerate() {
                let Some(&size) = now.checked_sub(sequence.start).and_then(|step| sequence.sizes.get(step)) else {
                    continue;
                };
                let position = sequence.position;
                sequence.position += size;
                let tokens = &sequence.tokens[position..position + size];
                batch.push(Chunk { tokens, position, logits: LogitRows::Last });
                kv.push(sequence.blocks.as_mut_slice().into());
                who.push((index, position + size - 1));
            }
            if !batch.is_empty() {
                let logits = step(&executor, &sample, &batch, &mut kv).expect("logits");
                for ((index, position), logits) in who.into_iter().zip(logits) {
                    found[index].push((position, logits));
                }
            }
        }
        for (sequence, found) in sequences.iter().zip(&found) {
            prop_assert_eq!(found.len(), sequence.sizes.len());
            let alone = in_chunks(&Executor::new(1), &sample, &sequence.tokens, &[sequence.tokens.len()]);
            for (position, logits) in found {
                prop_assert_eq!(bits(logits), bits(&alone[position * 67..(position + 1) * 67]));
            }
        }
    }
}

#[test]
fn logit_rows_are_what_was_asked_for() {
    let executor = Executor::new(2);
    let sample = sample(spec("llama"), DType::F32, 7);
    let text = tokens(9, 7);
    let mut source = Blocks::new(&sample.model);
    let (mut a, mut b, mut c) = (source.take(9), source.take(9), source.take(9));
    let rows = [LogitRows::All, LogitRows::None, LogitRows::Last];
    let batch = rows.map(|logits| Chunk { tokens: &text, position: 0, logits });
    let logits = step(
        &executor,
        &sample,
        &batch,
        &mut [a.as_mut_slice().into(), b.as_mut_slice().into(), c.as_mut_slice().into()],
    )
    .expect("logits");
    assert_eq!((logits[0].len(), logits[1].len(), logits[2].len()), (9 * 67, 0, 67));
    assert_eq!(logits[0][8 * 67..], logits[2]);
    let silent = [Chunk { logits: LogitRows::None, ..batch[0] }];
    assert!(
        step(&executor, &sample, &silent, &mut [a.as_mut_slice().into()]).expect("success")[0].is_empty()
    );
}

#[test]
fn every_family_holds_the_memory_that_was_foretold() {
    for family in DECODERS.into_iter().chain(["bert"]) {
        for (tokens, output_rows) in [(48, 1), (1, 1)] {
            let sample = sample(spec(family), DType::BF16, 3);
            let executor = Executor::new(1);
            let text = self::tokens(tokens, 3);
            let mut blocks = match sample.model.kv() {
                Some(_) => Blocks::new(&sample.model).take(tokens),
                None => Vec::new(),
            };
            let chunk = Chunk { tokens: &text, position: 0, logits: LogitRows::Last };
            step(&executor, &sample, &[chunk], &mut [blocks.as_mut_slice().into()]).expect("logits");
            let shape = PassShape { tokens, output_rows, longest: tokens };
            let (held, foretold) = (executor.scratch_bytes(), sample.model.scratch_bytes(shape, 1));
            match sample.model.spec().experts {
                // How many rows each expert gets is not known before.
                Some(_) => {
                    assert!(held <= foretold && foretold <= held * 3 / 2, "{family}: {held} {foretold}")
                }
                None => assert_eq!(held, foretold, "{family}, {tokens} tokens"),
            }
        }
    }
}

#[test]
fn bad_steps_are_refused() {
    let executor = Executor::new(1);
    let sample = sample(spec("llama"), DType::F32, 8);
    let bert = support::sample(spec("bert"), DType::F32, 8);
    let begin = |model: &Model, tokens: &[u32], position| {
        executor.begin(model, &[Chunk { tokens, position, logits: LogitRows::Last }]).err()
    };
    assert_eq!(executor.begin(&sample.model, &[]).err(), Some(PassError::EmptyBatch));
    assert_eq!(begin(&sample.model, &[], 0), Some(PassError::EmptyChunk { chunk: 0 }));
    assert_eq!(begin(&sample.model, &[67], 0), Some(PassError::Token { chunk: 0, token: 67, vocab: 67 }));
    assert_eq!(begin(&sample.model, &[1], 127), None);
    assert_eq!(
        begin(&sample.model, &[1], 128),
        Some(PassError::TooLong { chunk: 0, end: 129, context: 128 })
    );
    assert!(matches!(begin(&sample.model, &[1], usize::MAX), Some(PassError::TooLong { .. })));
    assert_eq!(begin(&bert.model, &[1], 1), Some(PassError::Partial { chunk: 0, position: 1 }));
    assert!(matches!(begin(&bert.model, &[1; 101], 0), Some(PassError::TooLong { context: 100, .. })));

    let text = tokens(17, 8);
    let batch = [Chunk { tokens: &text, position: 0, logits: LogitRows::Last }];
    let refused = |kv: &mut [KvBlocks<'_>]| step(&executor, &sample, &batch, kv).err();
    assert_eq!(refused(&mut []), Some(PassError::KvCount { chunks: 1, given: 0 }));
    let mut blocks = Blocks::new(&sample.model).take(17);
    assert!(matches!(refused(&mut [blocks[..1].as_mut().into()]), Some(PassError::Kv(_))));
    let short = blocks[1].split_off(16);
    assert!(matches!(refused(&mut [blocks.as_mut_slice().into()]), Some(PassError::Kv(_))));
    blocks[1].join(short);
    assert_eq!(refused(&mut [blocks.as_mut_slice().into()]), None);

    let mut pass = executor.begin(&sample.model, &batch).expect("a pass");
    let other = executor.advance(&mut pass, &bert.model, &bert, &mut [blocks.as_mut_slice().into()], 1);
    assert_eq!(other, Err(PassError::OtherModel));
    let mut damaged = support::sample(spec("llama"), DType::F32, 8);
    damaged.bytes[0].pop();
    let mut pass = executor.begin(&damaged.model, &batch).expect("a pass");
    let result =
        executor.advance(&mut pass, &damaged.model, &damaged, &mut [blocks.as_mut_slice().into()], 1);
    assert!(matches!(result, Err(PassError::TensorBytes { index: 0, .. })));
}

#[test]
fn bad_models_are_refused() {
    let spec = spec("qwen3");
    let good: Vec<TensorDesc> = spec
        .required_roles()
        .into_iter()
        .map(|role| TensorDesc { role, dtype: DType::F32, shape: spec.shape(role) })
        .collect();
    let error = |spec: &tangram_checkpoint::ModelSpec, tensors: &[TensorDesc]| {
        Model::new(spec.clone(), tensors).err().expect("an error")
    };
    assert!(Model::new(spec.clone(), &good).is_ok());
    for index in 0..good.len() {
        let mut tensors = good.clone();
        let removed = tensors.remove(index);
        assert_eq!(error(&spec, &tensors), ModelError::Missing(removed.role));
        let mut tensors = good.clone();
        tensors[index].shape[0] += 1;
        assert!(matches!(error(&spec, &tensors), ModelError::Shape { .. }));
    }
    let with = |desc: TensorDesc| [&good[..], &[desc]].concat();
    assert_eq!(error(&spec, &with(good[0].clone())), ModelError::Twice(good[0].role));
    let role = Role::PositionEmbedding;
    let extra = TensorDesc { role, dtype: DType::F32, shape: spec.shape(role) };
    assert_eq!(error(&spec, &with(extra)), ModelError::Unexpected(role));
    let mut tensors = good.clone();
    let norm = tensors.iter_mut().find(|t| t.role == Role::FinalNorm).expect("a norm");
    norm.dtype = DType::Q8_0;
    assert_eq!(error(&spec, &tensors), ModelError::DType { role: Role::FinalNorm, dtype: DType::Q8_0 });

    let mut bad = spec.clone();
    bad.kv_heads = 3;
    assert!(matches!(error(&bad, &good), ModelError::Spec(_)));
    let mut bad = spec.clone();
    bad.heads = usize::MAX;
    assert!(matches!(error(&bad, &good), ModelError::Spec(_)));
    let mut bad = spec.clone();
    bad.layers = 0;
    assert!(matches!(error(&bad, &good), ModelError::Spec(_)));
    let mut bad = spec;
    if let Some(rope) = &mut bad.rope {
        rope.dims = 18;
    }
    assert!(matches!(error(&bad, &good), ModelError::Spec(_)));
}
