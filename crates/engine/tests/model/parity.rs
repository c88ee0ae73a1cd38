//! The goldens of real families, made by transformers in float32: tokens exactly, top logits within 1e-3.
//! Skips, and says so, where the models are not there.

use std::ops::ControlFlow;
use std::path::PathBuf;

use serde_json::Value;
use tangram_device::Extent;
use tangram_engine::sampling::{Sampler, SamplingParams};
use tangram_engine::{Chunk, Executor, KvBlocks, LogitRows, Model, TensorDesc, Weights};

use crate::support::Blocks;

struct Bytes(Vec<Vec<u8>>);

impl Weights for Bytes {
    fn tensor(&self, index: usize) -> &[u8] {
        &self.0[index]
    }
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn check(family: &str) {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/models/parity").join(family);
    if !dir.exists() {
        println!("skipped: {family} is not among the shared models");
        return;
    }
    let source = tangram_checkpoint::open(&dir).expect("a checkpoint");
    let imported = tempfile::tempdir().expect("a directory");
    let manifest = tangram_checkpoint::import(&source, imported.path(), "model", &|_| None, &mut |_| {
        ControlFlow::Continue(())
    })
    .expect("an import");
    let data = std::fs::read(imported.path().join(tangram_checkpoint::DATA_FILE)).expect("data");
    let mut descs: Vec<TensorDesc> = Vec::new();
    let mut bytes = Vec::new();
    for entry in &manifest.tensors {
        descs.push(TensorDesc { role: entry.role, dtype: entry.dtype, shape: entry.shape.clone() });
        bytes.push(data[entry.offset as usize..][..entry.bytes as usize].to_vec());
    }
    let model = Model::new(manifest.spec.clone(), &descs).expect("a model");
    let weights = Bytes(bytes);
    let golden = std::fs::read_to_string(dir.join("golden.json")).expect("goldens");
    let golden: Value = serde_json::from_str(&golden).expect("goldens");
    let prompts = golden["prompts"].as_array().expect("prompts");
    let executor = Executor::new(2);
    // All prompts in one batch, so that decoding mixes lengths.
    let mut source = Blocks::new(&model);
    let mut blocks: Vec<Vec<Extent>> = Vec::new();
    let mut texts: Vec<Vec<u32>> = Vec::new();
    let mut positions = vec![0; prompts.len()];
    for prompt in prompts {
        let text = ids(&prompt["prompt_ids"]);
        blocks.push(source.take(text.len() + ids(&prompt["output_ids"]).len()));
        texts.push(text);
    }
    let mut outputs = vec![Vec::new(); prompts.len()];
    let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    let mut sampler = Sampler::new(greedy, &[], model.spec().vocab);
    for _ in 0..ids(&prompts[0]["output_ids"]).len() {
        let batch: Vec<Chunk<'_>> = texts
            .iter()
            .zip(&positions)
            .map(|(text, &position)| Chunk { tokens: &text[position..], position, logits: LogitRows::Last })
            .collect();
        let mut pass = executor.begin(&model, &batch).expect("a pass");
        let mut kv: Vec<KvBlocks<'_>> =
            blocks.iter_mut().map(|blocks| blocks.as_mut_slice().into()).collect();
        assert!(executor.advance(&mut pass, &model, &weights, &mut kv, usize::MAX).expect("success"));
        for (index, text) in texts.iter_mut().enumerate() {
            let token = sampler.sample(pass.logits_mut(index)).expect("a token").token;
            positions[index] = text.len();
            outputs[index].push(token);
            text.push(token);
        }
        executor.recycle(pass);
    }
    for (index, prompt) in prompts.iter().enumerate() {
        assert_eq!(outputs[index], ids(&prompt["output_ids"]), "{family} prompt {index}");
    }
    // The goldens' logits are those after the last token.
    for (index, prompt) in prompts.iter().enumerate() {
        let batch = [Chunk { tokens: &texts[index], position: 0, logits: LogitRows::Last }];
        let mut own = Blocks::new(&model).take(texts[index].len());
        let mut pass = executor.begin(&model, &batch).expect("a pass");
        assert!(
            executor
                .advance(&mut pass, &model, &weights, &mut [own.as_mut_slice().into()], usize::MAX)
                .expect("success")
        );
        let after = pass.logits(0);
        for expected in prompt["last_logits_top"].as_array().expect("logits") {
            let token = expected[0].as_u64().expect("an id") as u32;
            let logit = expected[1].as_f64().expect("a logit");
            let found = f64::from(after[token as usize]);
            let close = (found - logit).abs() <= 1e-3 * logit.abs().max(1e-2);
            assert!(close, "{family} prompt {index} token {token}: {found}, expected {logit}");
        }
    }
}

macro_rules! families {
    ($($name:ident: $directory:literal,)*) => {
        $(
            #[test]
            fn $name() {
                check($directory);
            }
        )*
    };
}

families! {
    gemma2: "gemma2",
    gemma3: "gemma3",
    gpt2: "gpt2",
    gpt_neox: "gptneox",
    llama: "llama",
    llama_with_stretched_context: "llama3rope",
    mistral: "mistral",
    mixtral: "mixtral",
    opt: "opt",
    phi3: "phi3",
    qwen2: "qwen2",
    qwen3: "qwen3",
    qwen3_moe: "qwen3moe",
}
