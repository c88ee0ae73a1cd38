//! Keys and values of preempted sequences in host memory, within a budget.
//!
//! Never decides who is preempted or how (`tangram_policy::pressure` does); it copies, and counts what it holds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use tangram_device::Extent;

/// Bytes per second taken for a copy until one has been measured; low, so that only clear cases are copied.
const FIRST_RATE: f64 = 1e9;

/// The budget, and how fast copies have been.
pub(crate) struct HostMemory {
    free: Arc<AtomicU64>,
    budget: u64,
    rate: f64,
}

/// What a sequence had in its blocks. Its bytes count against the budget while it lives.
pub(crate) struct Swapped {
    blocks: Vec<Vec<u8>>,
    /// Tokens whose keys and values these are.
    pub(crate) tokens: usize,
    bytes: u64,
    free: Arc<AtomicU64>,
}

impl HostMemory {
    pub(crate) fn new(budget: u64) -> HostMemory {
        HostMemory { free: Arc::new(AtomicU64::new(budget)), budget, rate: FIRST_RATE }
    }

    /// Bytes that can still be taken.
    pub(crate) fn free(&self) -> u64 {
        self.free.load(Ordering::Acquire)
    }

    /// Bytes held.
    pub(crate) fn used(&self) -> u64 {
        self.budget - self.free()
    }

    /// Bytes per second of copies so far.
    pub(crate) fn rate(&self) -> f64 {
        self.rate
    }

    /// Copies blocks out that hold `tokens` tokens. `None` if the budget does not allow it or the device does not
    /// give them.
    pub(crate) fn save<'a>(
        &mut self,
        blocks: impl Iterator<Item = &'a Extent> + Clone,
        tokens: usize,
    ) -> Option<Swapped> {
        let bytes: u64 = blocks.clone().map(|block| block.len() as u64).sum();
        let started = Instant::now();
        let blocks = blocks.map(Extent::to_vec).collect::<Result<Vec<_>, _>>().ok()?;
        self.rate = self.rate.mul_add(0.5, 0.5 * bytes as f64 / started.elapsed().as_secs_f64().max(1e-9));
        // Only this thread takes from the budget, so what is free can only have grown since it was read.
        (bytes <= self.free()).then(|| {
            self.free.fetch_sub(bytes, Ordering::AcqRel);
            Swapped { blocks, tokens, bytes, free: self.free.clone() }
        })
    }
}

impl Swapped {
    /// How many blocks there are.
    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Copies block `index` back; `false` if that is not possible.
    pub(crate) fn restore(&self, index: usize, block: &mut Extent) -> bool {
        let saved = self.blocks.get(index).filter(|saved| saved.len() == block.len());
        saved.is_some_and(|saved| block.write(0, saved).is_ok())
    }
}

impl Drop for Swapped {
    fn drop(&mut self) {
        self.free.fetch_add(self.bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tangram_device::Arena;
    use tangram_device::cpu::CpuDevice;

    #[test]
    fn what_is_saved_comes_back_and_the_budget_holds() {
        let memory = CpuDevice::open(64 << 10, 4096).unwrap();
        let arena = Arena::reserve(memory, 64 << 10).unwrap();
        let mut blocks: Vec<Extent> = (0..3).map(|i| arena.claim(i * 5000, 5000).unwrap()).collect();
        for (i, block) in blocks.iter_mut().enumerate() {
            block.host_bytes_mut().unwrap().fill(i as u8 + 1);
        }
        let mut host = HostMemory::new(16_000);
        let saved = host.save(blocks.iter(), 40).unwrap();
        assert_eq!((saved.len(), saved.tokens, host.free(), host.used()), (3, 40, 1000, 15_000));
        assert!(host.save(blocks[..1].iter(), 16).is_none(), "the budget is spent");
        for (i, block) in blocks.iter_mut().enumerate() {
            block.host_bytes_mut().unwrap().fill(9);
            assert!(saved.restore(i, block));
            assert!(block.host_bytes().unwrap().iter().all(|&byte| byte == i as u8 + 1));
        }
        assert!(!saved.restore(3, &mut blocks[0]));
        drop(saved);
        assert_eq!(host.used(), 0);
    }
}
