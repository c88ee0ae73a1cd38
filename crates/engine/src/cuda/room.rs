//! How much working memory the passes of a model need, found by letting the largest of them run on a GPU that is none: it
//! counts what is asked for and computes nothing. So the first request of a model allocates nothing, and no formula has
//! to repeat what the stages do.

use std::ffi::CStr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tangram_device::DeviceError;

use super::executor::{Addressed, CudaExecutor, ExecuteError};
use super::plan::PARTITION;
use super::{Kernel, Launch, Launcher};
use crate::adapter::Adapter;
use crate::device::HostBuffer;
use crate::executor::{Chunk, LogitRows, Whole, longest};
use crate::kernels::kv::BLOCK_TOKENS;
use crate::model::Model;
use crate::sampling::Wish;

/// Gives addresses of nothing.
struct Nothing {
    multiprocessors: u32,
    next: AtomicU64,
}

// SAFETY: nothing is ever read or written at these addresses: launches and copies do nothing.
unsafe impl Launcher for Nothing {
    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn kernel(&self, _name: &CStr, _shared_bytes: u32) -> Result<Kernel, DeviceError> {
        Ok(Kernel::default())
    }

    unsafe fn launch(&self, _kernel: Kernel, _launch: Launch, _arguments: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        let bytes = bytes.next_multiple_of(256) as u64;
        Ok(self.next.fetch_add(bytes, Ordering::Relaxed))
    }

    unsafe fn free(&self, _address: u64) {}

    fn pin(&self, bytes: usize) -> Result<HostBuffer, DeviceError> {
        Ok(Box::new(vec![0; bytes]))
    }

    unsafe fn upload(&self, _to: u64, _bytes: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }

    unsafe fn copy(&self, _from: u64, _to: u64, _bytes: usize) -> Result<(), DeviceError> {
        Ok(())
    }

    unsafe fn download(&self, _from: u64, _bytes: &mut [u8]) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Bytes of each buffer of a pass's memory, in their order, that suffice for every step of up to `sequences` sequences and
/// `tokens` tokens, whose KV has room for `cached_tokens`.
///
/// # Errors
/// None that a valid model has.
pub(super) fn needed(
    model: &Model,
    adapter: Option<&Arc<Adapter>>,
    multiprocessors: u32,
    (sequences, tokens): (usize, usize),
    cached_tokens: usize,
) -> Result<Vec<usize>, ExecuteError> {
    let nothing = Arc::new(Nothing { multiprocessors, next: AtomicU64::new(256) });
    let executor = CudaExecutor::new(nothing)?;
    let mut most = Vec::new();
    for positions in largest(model, (sequences, tokens), cached_tokens) {
        let ids = vec![0; positions.iter().map(Range::len).max().unwrap_or(0)];
        let chunk = |positions: &Range<usize>| Chunk {
            tokens: &ids[..positions.len()],
            position: positions.start,
            logits: LogitRows::Last,
        };
        let batch: Vec<Chunk<'_>> = positions.iter().map(chunk).collect();
        let tokens: usize = positions.iter().map(Range::len).sum();
        // Where a model knows two types of tokens, there is a table of them.
        let wholes = vec![Whole { second: Some(0), ..Whole::default() }; batch.len()];
        let of_chunk = vec![adapter.map(|_| 0); if adapter.is_some() { batch.len() } else { 0 }];
        let mut pass =
            executor.begin(model, &batch, &wholes, adapter.cloned().into_iter().collect(), &of_chunk)?;
        let wish = Wish { several: true, temperature: 1.0, random: 0.0 };
        pass.select(&vec![Some(wish); batch.len()]);
        let blocks = match model.kv() {
            Some(_) => positions.iter().map(|positions| positions.end.div_ceil(BLOCK_TOKENS)).sum(),
            None => 0,
        };
        // As while weights are on their way, when the first stage gets rows of the token embedding.
        pass.set_early_rows(Box::new(vec![0; tokens * model.token_row_bytes()]), false);
        for ready_stages in [1, usize::MAX] {
            executor.advance_at(&mut pass, model, Addressed::Nowhere, vec![256; blocks], ready_stages)?;
        }
        let sizes = pass.memory.sizes();
        most.resize(sizes.len(), 0);
        most.iter_mut().zip(sizes).for_each(|(most, size)| *most = size.max(*most));
        executor.recycle(pass);
    }
    Ok(most)
}

/// Steps of which one is the largest for every buffer: the positions that each sequence computes.
fn largest(
    model: &Model,
    (sequences, tokens): (usize, usize),
    cached_tokens: usize,
) -> Vec<Vec<Range<usize>>> {
    let context = longest(model);
    if model.kv().is_none() {
        // Sequences are read whole, so one may be longer than a step, and there may be many short ones.
        let count = sequences.min(tokens);
        let each = (tokens / count.max(1)).clamp(1, context);
        return vec![vec![0..context; 1], vec![0..each; count]];
    }
    let reach = |count: usize| (cached_tokens / count.max(1)).clamp(1, context);
    let at_end = |count: usize, each: usize| {
        let end = reach(count);
        vec![end.saturating_sub(each)..end; count]
    };
    // Any number of sequences is filled up to a power of two, and the items of their attention too. The last items of
    // sequences are not whole, so there may be one more for each.
    let decoding = |count: usize| {
        let end = (reach(count) + PARTITION).min(context);
        vec![end - 1..end; count]
    };
    let mut steps = vec![at_end(1, tokens)];
    // Few and many sequences are cut in different ways.
    let counts = (0..).map(|log2| 1usize << log2).take_while(|&count| count < sequences);
    for count in counts.chain([sequences]) {
        steps.push(decoding(count));
        steps.push(at_end(count, (tokens / count).max(1)));
    }
    steps
}
