//! The GPU's executor and kernels on the stand-in of the driver, which runs them by the emulator (`kernels/emulator`): the
//! same sources compiled as C++. Needs a C++ compiler with `_Float16` (GCC 12, Clang 15) on x86-64; says so otherwise.
//!
//! What this proves and what it cannot is said in `kernels/emulator/emulator.h`.
#![allow(unsafe_code)]

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

#[path = "../../examples/cuda-check/suite/mod.rs"]
mod suite;

use tangram_checkpoint::{DType, Output, Pooling, Role};
use tangram_device::Extent;
use tangram_device::cuda::Gpu;
use tangram_device::cuda::stand_in::{self, Options, StandIn};
use tangram_engine::cuda::{self, Addresses, Buffer, CudaExecutor, ExecuteError, Launcher, Region};
use tangram_engine::sampling::{Sampler, SamplingParams};
use tangram_engine::{Chunk, KvBlocks, LogitRows, PassError};

use crate::adapter::{Stored, merged, random_adapter};
use crate::support::{Blocks, Sample, reference_embedding, reference_logits, sample, spec};
use crate::{DECODERS, bits, tokens};

/// The emulated GPU. It is one for the process, so tests take turns.
pub(crate) struct Emulated {
    pub(crate) gpu: Arc<dyn Launcher>,
    _turn: MutexGuard<'static, ()>,
}

impl Emulated {
    pub(crate) fn open() -> Option<Emulated> {
        static TURN: Mutex<()> = Mutex::new(());
        static GPU: OnceLock<Option<Arc<dyn Launcher>>> = OnceLock::new();
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let open = || {
            let emulator = stand_in::build_emulator(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
            stand_in::run_kernels(&emulator);
            let options = Options { memory_bytes: 1 << 30, abort_on_misuse: true, ..Options::default() };
            let device = StandIn::new(options);
            let gpu = Gpu::open(&stand_in::driver(), device.ordinal()).expect("the stand-in");
            Some(cuda::load(&gpu).expect("the kernels"))
        };
        let Some(gpu) = GPU.get_or_init(open).clone() else {
            println!("skipped: no C++ compiler here that can compile the emulator");
            return None;
        };
        Some(Emulated { gpu, _turn: turn })
    }

    /// The order in which threads and blocks run: 0 ascending, 1 descending, else random.
    pub(crate) fn order(&self, order: u64) {
        stand_in::order_threads(order);
    }
}

/// A model's tensors in GPU memory.
struct OnGpu<'a> {
    sample: &'a Sample,
    tensors: Vec<Buffer>,
    adapters: Vec<(&'a Stored, Vec<Buffer>)>,
}

// SAFETY: the buffers live as long as this, have the tensors' bytes, and nobody writes them.
unsafe impl Addresses for OnGpu<'_> {
    fn tensor(&self, index: usize) -> Region {
        Region { address: self.tensors[index].address(), bytes: self.sample.bytes[index].len() }
    }

    fn adapter_tensor(&self, adapter: usize, index: usize) -> Region {
        let (stored, buffers) = &self.adapters[adapter];
        Region { address: buffers[index].address(), bytes: stored.bytes[index].len() }
    }
}

impl<'a> OnGpu<'a> {
    fn new(gpu: &Arc<dyn Launcher>, sample: &'a Sample) -> OnGpu<'a> {
        let tensors = sample.bytes.iter().map(|bytes| Buffer::with(gpu, bytes).expect("memory"));
        OnGpu { sample, tensors: tensors.collect(), adapters: Vec::new() }
    }

    fn with_adapter(mut self, gpu: &Arc<dyn Launcher>, stored: &'a Stored) -> OnGpu<'a> {
        let buffers = stored.bytes.iter().map(|bytes| Buffer::with(gpu, bytes).expect("memory")).collect();
        self.adapters.push((stored, buffers));
        self
    }

    /// All logits of several sequences in one pass, sequence `i` with adapter `of[i]`.
    fn together(&self, executor: &CudaExecutor, sequences: &[&[u32]], of: &[Option<usize>]) -> Vec<Vec<f32>> {
        let model = &self.sample.model;
        let chunk = |tokens| Chunk { tokens, position: 0, logits: LogitRows::All };
        let batch: Vec<Chunk<'_>> = sequences.iter().copied().map(chunk).collect();
        let adapters = self.adapters.iter().map(|(stored, _)| stored.adapter.clone()).collect();
        let mut pass = executor.begin(model, &batch, &[], adapters, of).expect("a pass");
        let mut blocks = Blocks::aligned(model, 16);
        let mut taken: Vec<_> = sequences.iter().map(|tokens| blocks.take(tokens.len())).collect();
        let mut kv: Vec<KvBlocks<'_>> = taken.iter_mut().map(|blocks| blocks.as_mut_slice().into()).collect();
        // Stage by stage, as when weights are still arriving.
        for stage in 1..=model.spec().stages() {
            let done = executor.advance(&mut pass, model, self, &mut kv, stage).expect("success");
            assert_eq!(done, stage == model.spec().stages());
        }
        let logits = (0..batch.len()).map(|chunk| pass.logits(chunk).to_vec()).collect();
        executor.recycle(pass);
        logits
    }

    /// Runs one step to the end and gives every chunk's logits or vector.
    fn step(&self, executor: &CudaExecutor, batch: &[Chunk<'_>], kv: &mut [KvBlocks<'_>]) -> Vec<Vec<f32>> {
        let model = &self.sample.model;
        let mut pass = executor.begin(model, batch, &[], Vec::new(), &[]).expect("a pass");
        assert!(executor.advance(&mut pass, model, self, kv, usize::MAX).expect("success"));
        let generates = model.spec().generates();
        let output = (0..batch.len())
            .map(|chunk| if generates { pass.logits(chunk) } else { pass.embedding(chunk) }.to_vec())
            .collect();
        executor.recycle(pass);
        output
    }

    /// The logits of all tokens, computed in chunks of the given sizes.
    fn in_chunks(&self, executor: &CudaExecutor, tokens: &[u32], sizes: &[usize]) -> Vec<f32> {
        let mut blocks = Blocks::aligned(&self.sample.model, 16).take(tokens.len());
        let mut logits = Vec::new();
        let mut position = 0;
        for &size in sizes {
            let tokens = &tokens[position..position + size];
            let chunk = Chunk { tokens, position, logits: LogitRows::All };
            logits.extend(self.step(executor, &[chunk], &mut [blocks.as_mut_slice().into()]).remove(0));
            position += size;
        }
        logits
    }
}

/// The largest difference, as a share of the largest number.
fn error(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f64, |a, &b| a.max(b.abs()));
    let differences =
        found.iter().zip(expected).map(|(&found, expected)| (f64::from(found) - expected).abs());
    // A NaN is not smaller than anything.
    differences.fold(0.0, |a, b| if b <= a { a } else { b }) / largest
}

#[test]
fn kernels_agree_with_their_twins() {
    let Some(emulated) = Emulated::open() else { return };
    let rounds =
        std::env::var("TANGRAM_CUDA_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(3);
    // A round has an order and a seed of its own.
    for round in 0..rounds {
        emulated.order(round);
        let mut bench = suite::Bench::new(emulated.gpu.clone(), round + 1, 1);
        for (name, check) in suite::CHECKS {
            check(&mut bench);
            println!("round {round}, {name}: {:.0} % of what the error may be", bench.take_worst() * 100.0);
        }
    }
    emulated.order(0);
}

#[test]
fn decoders_on_the_gpu_agree_with_the_reference() {
    let Some(emulated) = Emulated::open() else { return };
    let executor = CudaExecutor::new(emulated.gpu.clone()).expect("kernels");
    let narrow = [(DType::BF16, 4e-2), (DType::F16, 6e-3), (DType::Q8_0, 6e-3)];
    for (index, family) in DECODERS.into_iter().enumerate() {
        // With activations in bf16 another expert may come out best.
        let narrow = if spec(family).experts.is_some() { narrow[1] } else { narrow[index % 3] };
        for (dtype, tolerance) in [(DType::F32, 2e-5), narrow] {
            let sample = sample(spec(family), dtype, 1);
            let tokens = tokens(45, 1);
            let expected = reference_logits(&sample, &tokens).concat();
            let weights = OnGpu::new(&emulated.gpu, &sample);
            let found = weights.in_chunks(&executor, &tokens, &[45]);
            let error = error(&found, &expected);
            println!("{family} {dtype}: {error:.1e}");
            assert!(error < tolerance, "{family} {dtype}: {error}");
        }
    }
}

#[test]
fn embeddings_on_the_gpu_agree_with_the_reference() {
    let Some(emulated) = Emulated::open() else { return };
    let executor = CudaExecutor::new(emulated.gpu.clone()).expect("kernels");
    for (pooling, normalise) in [(Pooling::Mean, true), (Pooling::Cls, false)] {
        let mut spec = spec("bert");
        spec.output = Output::Embedding { pooling, normalise };
        let sample = sample(spec, DType::F32, 2);
        let weights = OnGpu::new(&emulated.gpu, &sample);
        let texts: Vec<Vec<u32>> = [30, 1, 17].iter().map(|&n| tokens(n, n as u32)).collect();
        let batch: Vec<Chunk<'_>> =
            texts.iter().map(|tokens| Chunk { tokens, position: 0, logits: LogitRows::None }).collect();
        let found = weights.step(&executor, &batch, &mut []);
        for (index, found) in found.iter().enumerate() {
            let error = error(found, &reference_embedding(&sample, &texts[index]));
            assert!(error < 2e-5, "{error}");
            assert_eq!(
                bits(found),
                bits(&weights.step(&executor, &batch[index..=index], &mut [])[0]),
                "alone"
            );
        }
    }
}

#[test]
fn chunks_and_orders_on_the_gpu_change_nothing() {
    let Some(emulated) = Emulated::open() else { return };
    let executor = CudaExecutor::new(emulated.gpu.clone()).expect("kernels");
    for (family, dtype) in
        [("qwen2", DType::BF16), ("qwen3", DType::Q8_0), ("gemma3", DType::F16), ("mixtral", DType::F32)]
    {
        let sample = sample(spec(family), dtype, 3);
        let tokens = tokens(45, 3);
        let weights = OnGpu::new(&emulated.gpu, &sample);
        let whole = weights.in_chunks(&executor, &tokens, &[45]);
        let cuts: [&[usize]; 3] = [&[1, 1, 20, 23], &[44, 1], &[10, 3, 30, 1, 1]];
        for (order, cut) in (0..).zip(cuts) {
            emulated.order(order);
            let found = weights.in_chunks(&executor, &tokens, cut);
            assert_eq!(bits(&found), bits(&whole), "{family} {dtype} {cut:?}");
        }
        emulated.order(0);
    }
}

#[test]
fn sequences_on_the_gpu_go_on_together_as_alone() {
    let Some(emulated) = Emulated::open() else { return };
    let executor = CudaExecutor::new(emulated.gpu.clone()).expect("kernels");
    for (family, dtype) in [("qwen2", DType::BF16), ("mistral", DType::Q8_0)] {
        let sample = sample(spec(family), dtype, 6);
        let weights = OnGpu::new(&emulated.gpu, &sample);
        let texts = [tokens(21, 1), tokens(34, 2), tokens(40, 3)];
        // All but the last token of the first two, the whole third one together with these.
        let mut blocks = Blocks::aligned(&sample.model, 16);
        let mut taken: Vec<_> = texts.iter().map(|tokens| blocks.take(tokens.len())).collect();
        let mut batch = Vec::new();
        for (index, (tokens, blocks)) in texts.iter().zip(&mut taken).enumerate() {
            let position = if index < 2 { tokens.len() - 1 } else { 0 };
            if position > 0 {
                let chunk = Chunk { tokens: &tokens[..position], position: 0, logits: LogitRows::None };
                assert!(weights.step(&executor, &[chunk], &mut [blocks.as_mut_slice().into()])[0].is_empty());
            }
            batch.push(Chunk { tokens: &tokens[position..], position, logits: LogitRows::Last });
        }
        let mut kv: Vec<KvBlocks<'_>> = taken.iter_mut().map(|blocks| blocks.as_mut_slice().into()).collect();
        let found = weights.step(&executor, &batch, &mut kv);
        for (found, tokens) in found.iter().zip(&texts) {
            let alone = weights.in_chunks(&executor, tokens, &[tokens.len()]);
            assert_eq!(bits(found), bits(&alone[alone.len() - found.len()..]), "{family}");
        }
    }
}

/// Sequences that go on token by token, together.
struct Decoding<'a> {
    weights: &'a OnGpu<'a>,
    texts: Vec<Vec<u32>>,
    kv: Vec<Vec<Extent>>,
    /// Tokens of each that have been computed.
    computed: Vec<usize>,
    /// The logits of all tokens of each, computed at once.
    expected: Vec<Vec<f32>>,
}

impl<'a> Decoding<'a> {
    /// Prompts of these lengths.
    fn start(executor: &CudaExecutor, weights: &'a OnGpu<'a>, prompts: &[usize]) -> Decoding<'a> {
        let texts: Vec<Vec<u32>> = prompts.iter().map(|n| tokens(n + 12, *n as u32)).collect();
        let expected =
            texts.iter().map(|text| weights.in_chunks(executor, text, &[text.len()])).collect::<Vec<_>>();
        let mut blocks = Blocks::aligned(&weights.sample.model, 16);
        let mut kv: Vec<Vec<Extent>> = texts.iter().map(|text| blocks.take(text.len())).collect();
        for ((text, kv), &length) in texts.iter().zip(&mut kv).zip(prompts) {
            let chunk = Chunk { tokens: &text[..length], position: 0, logits: LogitRows::Last };
            weights.step(executor, &[chunk], &mut [kv.as_mut_slice().into()]);
        }
        Decoding { weights, texts, kv, computed: prompts.to_vec(), expected }
    }

    /// One more token of each of the first `count`, whose logits must be those of the whole text.
    fn step(&mut self, executor: &CudaExecutor, count: usize) {
        let next = self.texts.iter().zip(&self.computed).take(count);
        let batch: Vec<Chunk<'_>> = next
            .map(|(text, &at)| Chunk { tokens: &text[at..=at], position: at, logits: LogitRows::Last })
            .collect();
        let mut kv: Vec<KvBlocks<'_>> =
            self.kv.iter_mut().take(count).map(|blocks| blocks.as_mut_slice().into()).collect();
        let found = self.weights.step(executor, &batch, &mut kv);
        for (index, found) in found.iter().enumerate() {
            let row = self.computed[index] * found.len();
            assert_eq!(
                bits(found),
                bits(&self.expected[index][row..row + found.len()]),
                "sequence {index} of {count}, token {}",
                self.computed[index]
            );
            self.computed[index] += 1;
        }
    }
}

fn graphs_and_replays(executor: &CudaExecutor) -> (u64, u64) {
    (executor.counts().graphs, executor.counts().replays)
}

/// From its third step on a batch is replayed, with the bits of plain launches, whatever is in the batch.
#[test]
fn decode_steps_are_replayed_with_the_same_bits() {
    let Some(emulated) = Emulated::open() else { return };
    for (family, dtype) in
        [("qwen2", DType::BF16), ("gemma3", DType::F16), ("qwen3_moe", DType::F16), ("gpt2", DType::F32)]
    {
        let executor = CudaExecutor::new(emulated.gpu.clone()).expect("kernels");
        let sample = sample(spec(family), dtype, 2);
        let weights = OnGpu::new(&emulated.gpu, &sample);
        executor.prepare(&sample.model, None, (4, 64), 200).expect("room");
        let mut decoding = Decoding::start(&executor, &weights, &[9, 30, 3]);
        // The shape of three is that of four. Replays come in other orders of threads than what they repeat.
        for (step, (count, expected)) in [
            (3, (0, 0)),
            (3, (1, 0)),
            (3, (1, 1)),
            (3, (1, 2)),
            (1, (1, 2)),
            (3, (1, 3)),
            (1, (2, 3)),
            (1, (2, 4)),
        ]
        .into_iter()
        .enumerate()
        {
            emulated.order(step as u64);
            decoding.step(&executor, count);
            assert_eq!(graphs_and_replays(&executor), expected, "{family}, step {step}");
        }
        emulated.order(0);
        executor.forget(&sample.model);
        assert_eq!(graphs_and_replays(&executor), (0, 4));
    }
}

/// Sequences that grow into further partitions of attention have another graph; so does one that begins among long ones.
#[test]
fn graphs_follow_how_attention_is_cut() {
    let Some(emulated) = Emulated::open() else { return };
    let executor = CudaExecutor::new(emulated.gpu.clone()).expect("kernels");
    let mut spec = spec("qwen2");
    (spec.context, spec.layers) = (700, 1);
    let sample = sample(spec, DType::BF16, 5);
    let weights = OnGpu::new(&emulated.gpu, &sample);
    let mut decoding = Decoding::start(&executor, &weights, &[253, 2]);
    let counts: Vec<(u64, u64)> = (0..8)
        .map(|_| {
            decoding.step(&executor, 2);
            graphs_and_replays(&executor)
        })
        .collect();
    // Two items up to position 256, then three, which are filled up to four.
    assert_eq!(counts, [(0, 0), (1, 0), (1, 1), (1, 1), (2, 1), (2, 2), (2, 3), (2, 4)]);
}

/// Models that share working memory, tensors that move, and buffers that grow: what is replayed is still what would be
/// launched.
#[test]
fn graphs_fall_away_with_the_addresses_that_they_hold() {
    let Some(emulated) = Emulated::open() else { return };
    let executor = CudaExecutor::new(emulated.gpu.clone()).expect("kernels");
    let [one, two] =
        [("qwen3_moe", 1), ("mixtral", 2)].map(|(family, seed)| sample(spec(family), DType::Q8_0, seed));
    let (of_one, of_two) = (OnGpu::new(&emulated.gpu, &one), OnGpu::new(&emulated.gpu, &two));
    executor.prepare(&one.model, None, (4, 64), 200).expect("room");
    executor.prepare(&two.model, None, (4, 64), 200).expect("room");
    let mut first = Decoding::start(&executor, &of_one, &[5, 8]);
    let mut second = Decoding::start(&executor, &of_two, &[7, 4]);
    for expected in [(0, 0), (2, 0), (2, 2), (2, 4)] {
        first.step(&executor, 2);
        second.step(&executor, 2);
        assert_eq!(graphs_and_replays(&executor), expected);
    }
    // The same bytes elsewhere: one plain step, after which there is a graph again.
    let moved = OnGpu::new(&emulated.gpu, &one);
    first.weights = &moved;
    for expected in [(2, 4), (2, 5)] {
        first.step(&executor, 2);
        assert_eq!(graphs_and_replays(&executor), expected);
    }
    // A larger model has other buffers made.
    let mut large = spec("llama");
    (large.hidden, large.vocab) = (256, 300);
    let large = sample(large, DType::F16, 3);
    executor.prepare(&large.model, None, (16, 128), 400).expect("room");
    for expected in [(2, 5), (3, 5), (3, 6)] {
        first.step(&executor, 2);
        assert_eq!(graphs_and_replays(&executor), expected);
    }
}

/// What the GPU finds out about rows of logits gives the tokens that the rows give.
#[test]
fn lists_of_the_gpu_choose_as_its_rows() {
    let Some(emulated) = Emulated::open() else { return };
    let executor = CudaExecutor::new(emulated.gpu.clone()).expect("kernels");
    let sample = sample(spec("qwen2"), DType::F16, 3);
    let (model, weights) = (&sample.model, OnGpu::new(&emulated.gpu, &sample));
    let with = |temperature| SamplingParams { temperature, ..SamplingParams::default() };
    let params = [
        (with(0.0), true),
        (with(1.0), true),
        (SamplingParams { top_k: Some(7), ..with(0.8) }, true),
        (SamplingParams { top_p: 0.2, ..with(0.5) }, true),
        (SamplingParams { min_p: 0.7, ..with(0.7) }, true),
        (SamplingParams { repetition_penalty: 1.3, ..with(0.0) }, false),
    ];
    let texts: Vec<Vec<u32>> = (0..params.len()).map(|n| tokens(5 + n, n as u32)).collect();
    let last = |tokens| Chunk { tokens, position: 0, logits: LogitRows::Last };
    let mut batch: Vec<Chunk<'_>> = texts.iter().map(|text| last(text)).collect();
    // One whose prompt goes on has no row.
    batch.insert(2, Chunk { logits: LogitRows::None, ..last(&texts[0]) });
    let mut sufficed = [0; 6];
    for seed in 0..4 {
        emulated.order(seed);
        let sampler = |index: usize| {
            let params = SamplingParams { seed: Some(seed), ..params[index].0.clone() };
            Sampler::new(params, &texts[index], model.spec().vocab)
        };
        let mut samplers: Vec<Sampler> = (0..params.len()).map(sampler).collect();
        let mut wishes: Vec<_> = samplers.iter().map(Sampler::wish).collect();
        wishes.insert(2, None);
        let mut pass = executor.begin(model, &batch, &[], Vec::new(), &[]).expect("a pass");
        pass.select(&wishes);
        let mut blocks = Blocks::aligned(model, 16);
        let mut taken: Vec<_> = batch.iter().map(|chunk| blocks.take(chunk.tokens.len())).collect();
        let mut kv: Vec<KvBlocks<'_>> = taken.iter_mut().map(|blocks| blocks.as_mut_slice().into()).collect();
        assert!(executor.advance(&mut pass, model, &weights, &mut kv, usize::MAX).expect("success"));
        assert!(pass.shortlist(2).is_none() && executor.row(&mut pass, 2).expect("nothing").is_empty());
        for index in 0..params.len() {
            let chunk = index + usize::from(index >= 2);
            let list = pass.shortlist(chunk).expect("every row has one").clone();
            let row = executor.row(&mut pass, chunk).expect("the logits");
            let expected = sampler(index).sample(row).expect("a token");
            if let Some(found) = samplers[index].sample_from(&list) {
                assert_eq!(found, expected, "{:?}", params[index].0);
                sufficed[index] += 1;
            }
        }
        executor.recycle(pass);
    }
    emulated.order(0);
    for ((params, suffices), sufficed) in params.iter().zip(sufficed) {
        assert_eq!(sufficed > 0, *suffices, "{params:?}: {sufficed} of 4");
    }
}

#[test]
fn a_kernel_that_is_missing_is_named() {
    let Some(emulated) = Emulated::open() else { return };
    let refused = emulated.gpu.kernel(c"no_such_kernel", 0).expect_err("there is none");
    assert!(refused.to_string().contains("NOT_FOUND"), "{refused}");
}

#[test]
fn long_sequences_on_the_gpu_are_cut_without_a_trace() {
    let Some(emulated) = Emulated::open() else { return };
    let executor = CudaExecutor::new(emulated.gpu.clone()).expect("kernels");
    let mut spec = spec("qwen2");
    (spec.context, spec.layers) = (700, 2);
    let sample = sample(spec, DType::BF16, 5);
    let tokens = tokens(520, 5);
    let weights = OnGpu::new(&emulated.gpu, &sample);
    let whole = weights.in_chunks(&executor, &tokens, &[520]);
    // The last ones are single tokens, which are cut into partitions.
    let found = weights.in_chunks(&executor, &tokens, &[255, 1, 1, 256, 6, 1]);
    assert_eq!(bits(&found), bits(&whole));
}

/// Which tensor is the token embedding, and its rows for these tokens as they are stored.
fn embedding_rows(sample: &Sample, tokens: &[u32]) -> (usize, Vec<u8>) {
    let roles = sample.model.spec().required_roles();
    let index = roles.iter().position(|&role| role == Role::TokenEmbedding).expect("an embedding");
    let row_bytes = sample.model.token_row_bytes();
    let row = |&token: &u32| &sample.bytes[index][token as usize * row_bytes..][..row_bytes];
    (index, tokens.iter().flat_map(row).copied().collect())
}

/// The bits are those of the embedding itself, which nobody asks for before the last stage. Rows that nobody vouches for
/// are compared with it; those that are wrong end the pass without a result.
#[test]
fn early_rows_on_the_gpu_stand_in_for_the_token_embedding() {
    struct Late<'a>(&'a OnGpu<'a>, usize);
    // SAFETY: as for what it passes on.
    unsafe impl Addresses for Late<'_> {
        fn tensor(&self, index: usize) -> Region {
            assert_ne!(index, self.1, "the embedding is not there yet");
            self.0.tensor(index)
        }
    }
    let Some(emulated) = Emulated::open() else { return };
    let executor = CudaExecutor::new(emulated.gpu.clone()).expect("kernels");
    for (family, dtype) in [
        ("llama", DType::BF16),
        ("qwen2", DType::Q8_0),
        ("gemma3", DType::Q8_0),
        ("gpt2", DType::F32),
        ("qwen3_moe", DType::F16),
        ("bert", DType::BF16),
    ] {
        let sample = sample(spec(family), dtype, 5);
        let (model, weights) = (&sample.model, OnGpu::new(&emulated.gpu, &sample));
        let last = model.spec().stages() - 1;
        // Two prompts, and a decode step of three sequences, which is filled up to four.
        for lengths in [&[9, 5][..], &[1, 1, 1]] {
            let all: Vec<Vec<u32>> = lengths.iter().map(|&n| tokens(n, 7 * n as u32 + 1)).collect();
            let chunk = |tokens| Chunk { tokens, position: 0, logits: LogitRows::Last };
            let batch: Vec<Chunk<'_>> = all.iter().map(|tokens| chunk(tokens.as_slice())).collect();
            let (embedding, right) = embedding_rows(&sample, &all.concat());
            let run = |early: Option<(&[u8], bool)>| {
                let mut blocks = Blocks::aligned(model, 16);
                let mut taken: Vec<_> = match model.kv() {
                    Some(_) => all.iter().map(|tokens| blocks.take(tokens.len())).collect(),
                    None => Vec::new(),
                };
                let mut kv: Vec<KvBlocks<'_>> =
                    taken.iter_mut().map(|blocks| blocks.as_mut_slice().into()).collect();
                let mut pass = executor.begin(model, &batch, &[], Vec::new(), &[])?;
                if let Some((rows, verified)) = early {
                    let mut room = pass.early_room(rows.len());
                    room[..rows.len()].copy_from_slice(rows);
                    pass.set_early_rows(room, verified);
                    assert!(!executor.advance(
                        &mut pass,
                        model,
                        &Late(&weights, embedding),
                        &mut kv,
                        last
                    )?);
                }
                let done = executor.advance(&mut pass, model, &weights, &mut kv, usize::MAX);
                let results: Vec<Vec<u32>> = (0..batch.len())
                    .map(|chunk| [bits(pass.logits(chunk)), bits(pass.embedding(chunk))].concat())
                    .collect();
                executor.recycle(pass);
                if done.is_err() {
                    assert!(results.iter().all(Vec::is_empty), "there is a result");
                }
                done.map(|_| results)
            };
            let expected = run(None).expect("a result");
            assert!(expected.iter().all(|bits| !bits.is_empty()));
            for verified in [false, true] {
                let found = run(Some((&right, verified))).expect("a result");
                assert_eq!(found, expected, "{family} {dtype} {lengths:?}");
            }
            let refused = |rows: &[u8]| {
                matches!(run(Some((rows, false))), Err(ExecuteError::Pass(PassError::EarlyRows)))
            };
            for at in [0, right.len() / 2, right.len() - 1] {
                let mut wrong = right.clone();
                wrong[at] ^= 1;
                assert!(refused(&wrong), "{family} {dtype}: byte {at} is another");
            }
            assert!(refused(&right[model.token_row_bytes()..]), "{family} {dtype}: too few rows");
        }
    }
}

#[test]
fn adapters_on_the_gpu_share_a_batch() {
    let Some(emulated) = Emulated::open() else { return };
    let executor = CudaExecutor::new(emulated.gpu.clone()).expect("kernels");
    for family in ["llama", "gpt_neox", "mixtral"] {
        let base = sample(spec(family), DType::F32, 4);
        let (one, two) = (random_adapter(base.model.spec(), 6), random_adapter(base.model.spec(), 7));
        let both = OnGpu::new(&emulated.gpu, &base)
            .with_adapter(&emulated.gpu, &one)
            .with_adapter(&emulated.gpu, &two);
        let all: Vec<Vec<u32>> = [1, 21, 9, 3].map(|length| tokens(length, length as u32)).to_vec();
        let sequences: Vec<&[u32]> = all.iter().map(Vec::as_slice).collect();
        let of = [Some(1), None, Some(0), Some(1)];
        let together = both.together(&executor, &sequences, &of);
        for (index, sequence) in sequences.iter().enumerate() {
            let alone = both.together(&executor, &[sequence], &of[index..=index]).remove(0);
            assert_eq!(bits(&together[index]), bits(&alone), "{family}: sequence {index}");
            let expected = match of[index] {
                Some(adapter) => reference_logits(&merged(&base, [&one, &two][adapter]), sequence),
                None => reference_logits(&base, sequence),
            };
            let error = error(&together[index], &expected.concat());
            assert!(error < 2e-5, "{family}: sequence {index}: {error}");
        }
    }
}

#[test]
fn prepared_passes_on_the_gpu_allocate_nothing() {
    const CACHED: usize = 690;
    let Some(emulated) = Emulated::open() else { return };
    for (family, adapted) in [("qwen2", false), ("llama", true), ("mixtral", false), ("bert", false)] {
        let executor = CudaExecutor::new(emulated.gpu.clone()).expect("kernels");
        let mut spec = spec(family);
        if family == "qwen2" {
            // Long enough for attention to be cut.
            (spec.context, spec.layers) = (700, 1);
        }
        let context = spec.context;
        let sample = sample(spec, DType::Q8_0, 8);
        let model = &sample.model;
        let stored = adapted.then(|| random_adapter(model.spec(), 9));
        let adapter = stored.as_ref().map(|stored| &stored.adapter);
        executor.prepare(model, adapter, (8, 32), CACHED).expect("room");
        let prepared = executor.scratch_bytes();
        assert!(prepared > 0);
        let mut weights = OnGpu::new(&emulated.gpu, &sample);
        if let Some(stored) = &stored {
            weights = weights.with_adapter(&emulated.gpu, stored);
        }
        let causal = model.kv().is_some();
        // One prompt, several together, and single tokens as far behind as there is room.
        let single = |count: usize| (vec![1; count], (CACHED / count).min(context) - 1);
        let mut steps = vec![(vec![32], 0), (vec![9, 1, 3, 7, 2, 4, 1, 5], 0)];
        steps.extend([8, 1, 2, 3, 5, 7].map(single));
        for (step, (lengths, position)) in steps.iter().enumerate() {
            let ids = tokens(64, 3);
            let position = if causal { *position } else { 0 };
            let chunk = |&length: &usize| Chunk { tokens: &ids[..length], position, logits: LogitRows::Last };
            let batch: Vec<Chunk<'_>> = lengths.iter().map(chunk).collect();
            let of = vec![Some(0); if adapted { batch.len() } else { 0 }];
            let adapters = adapter.cloned().into_iter().collect();
            let mut pass = executor.begin(model, &batch, &[], adapters, &of).expect("a pass");
            let mut blocks = Blocks::aligned(model, 16);
            let mut taken: Vec<_> = lengths
                .iter()
                .map(|length| if causal { blocks.take(position + length) } else { vec![] })
                .collect();
            let mut kv: Vec<KvBlocks<'_>> =
                taken.iter_mut().map(|blocks| blocks.as_mut_slice().into()).collect();
            // Every other step as one whose weights are still on their way.
            if step % 2 == 0 {
                let all: Vec<u32> = batch.iter().flat_map(|chunk| chunk.tokens).copied().collect();
                let rows = embedding_rows(&sample, &all).1;
                let mut room = pass.early_room(rows.len());
                room[..rows.len()].copy_from_slice(&rows);
                // One at a time has what was made for this; there is more of it than these few rows take.
                assert_eq!([room.len() > rows.len(), pass.early_room(5).len() > 5], [true, false]);
                pass.set_early_rows(room, false);
                assert!(!executor.advance(&mut pass, model, &weights, &mut kv, 1).expect("success"));
            }
            assert!(executor.advance(&mut pass, model, &weights, &mut kv, usize::MAX).expect("success"));
            assert!(pass.early_room(5).len() > 5, "it has come back");
            executor.recycle(pass);
            assert_eq!(executor.scratch_bytes(), prepared, "{family}, step {step}");
        }
    }
}
