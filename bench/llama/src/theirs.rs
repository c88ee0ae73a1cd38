//! llama.cpp over the same file.

use std::num::NonZeroU32;
use std::path::Path;

use anyhow::Result;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;

use crate::ours::{prompt, surprise};
use crate::{Clock, Engine, PROMPT, STEPS};

/// Sequences that a context has room for, and tokens of all of them together.
const SEQUENCES: u32 = 8;
const CONTEXT: u32 = 8 * 1024;

/// llama.cpp with a model.
pub struct Library {
    backend: LlamaBackend,
    model: LlamaModel,
}

impl Library {
    /// Loads a model with llama.cpp's own defaults: mapped into memory, repacked where that helps it.
    pub fn open(file: &Path) -> Result<Library> {
        let mut backend = LlamaBackend::init()?;
        backend.void_logs();
        let model = LlamaModel::load_from_file(&backend, file, &LlamaModelParams::default())?;
        Ok(Library { backend, model })
    }

    /// The tokens of a text.
    pub fn tokens(&self, text: &str) -> Vec<u32> {
        let tokens = self.model.vocab().tokenize(text.as_bytes(), false, false);
        tokens.iter().map(|token| token.0 as u32).collect()
    }

    /// A context with `threads` threads.
    pub fn engine(&self, threads: usize) -> Result<Theirs<'_>> {
        let params = LlamaContextParams::default()
            .with_n_ctx(NonZeroU32::new(CONTEXT))
            .with_n_batch(2048)
            .with_n_seq_max(SEQUENCES)
            .with_n_threads(threads as i32)
            .with_n_threads_batch(threads as i32);
        let context = self.model.new_context(&self.backend, params)?;
        Ok(Theirs { context, clock: Clock::for_threads(threads) })
    }
}

/// A context.
pub struct Theirs<'a> {
    context: LlamaContext<'a>,
    clock: Clock,
}

impl Theirs<'_> {
    /// Adds a prompt to a batch; `logits` says for which tokens.
    fn prompt(
        &self,
        tokens: &[u32],
        sequences: usize,
        logits: impl Fn(usize) -> bool,
    ) -> Result<LlamaBatch<'static>> {
        let mut batch = LlamaBatch::new(tokens.len() * sequences, 1);
        for sequence in 0..sequences {
            for (i, &token) in tokens.iter().enumerate() {
                batch.add(LlamaToken(token as i32), i as i32, &[sequence as i32], logits(i))?;
            }
        }
        Ok(batch)
    }
}

impl Engine for Theirs<'_> {
    fn prefill(&mut self, tokens: usize) -> Result<f64> {
        self.context.clear_kv_cache();
        let mut batch = self.prompt(&prompt(tokens), 1, |i| i + 1 == tokens)?;
        let start = self.clock.now();
        self.context.decode(&mut batch)?;
        let _ = self.context.get_logits_ith(tokens as i32 - 1);
        Ok(self.clock.now() - start)
    }

    fn decode(&mut self, batch: usize) -> Result<f64> {
        self.context.clear_kv_cache();
        let mut first = self.prompt(&prompt(PROMPT), batch, |i| i + 1 == PROMPT)?;
        self.context.decode(&mut first)?;
        let mut times = Vec::new();
        for step in 0..STEPS {
            let mut next = LlamaBatch::new(batch, 1);
            for sequence in 0..batch {
                next.add(LlamaToken(7), (PROMPT + step) as i32, &[sequence as i32], true)?;
            }
            let start = self.clock.now();
            self.context.decode(&mut next)?;
            let _ = self.context.get_logits_ith(batch as i32 - 1);
            times.push(self.clock.now() - start);
        }
        times.sort_by(f64::total_cmp);
        Ok(times[STEPS / 2])
    }

    fn loss(&mut self, tokens: &[u32]) -> Result<f64> {
        self.context.clear_kv_cache();
        let mut batch = self.prompt(tokens, 1, |_| true)?;
        self.context.decode(&mut batch)?;
        let next = |i: usize| surprise(self.context.get_logits_ith(i as i32), tokens[i + 1]);
        Ok((0..tokens.len() - 1).map(next).sum::<f64>() / (tokens.len() - 1) as f64)
    }
}
