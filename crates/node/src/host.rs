//! Host memory beside a device that the host cannot address: what of the budget keeps weights, and what is left for the KV
//! of preempted sequences.
//!
//! Where the device's memory is the host's own (the CPU) there is nothing to keep weights in that the pool is not itself,
//! and all of the budget is for KV. Elsewhere KV gets an eighth: it is taken seldom, for short, and the sequence can be
//! computed again where there is none, while copies of weights save a read of the disk each time a model comes back.

use tangram_device::HostPool;
use tangram_pool::Pool;

/// One of so many parts of the budget is for KV.
const KV_PART: u64 = 8;

/// Lets a fresh pool keep copies of weights in host memory, where that is not the device's own. Gives the bytes of `budget`
/// that are left for KV. Memory is pinned beside the server, slab by slab, and used as it comes.
pub(crate) fn keep_weights(pool: &mut Pool, budget: u64) -> u64 {
    let Some(memory) = pool.memory().host_pool() else { return budget };
    let kv = budget / KV_PART;
    pool.keep_in_host(memory.clone());
    let weights = usize::try_from(budget - kv).unwrap_or(usize::MAX);
    let pinning = std::thread::Builder::new().name("pin-host".to_owned());
    if let Err(error) = pinning.spawn(move || pin(&memory, weights)) {
        tracing::warn!("no weights are kept in host memory: {error}");
    }
    kv
}

fn pin(memory: &HostPool, bytes: usize) {
    loop {
        match memory.grow(bytes.saturating_sub(memory.bytes())) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error) => {
                let pinned = memory.bytes();
                tracing::warn!("host memory keeps {pinned} bytes of weights instead of {bytes}: {error}");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use tangram_device::cpu::CpuDevice;
    use tangram_device::cuda::stand_in::{self, Options};
    use tangram_pool::Backend;

    use super::*;

    #[test]
    fn a_gpu_gets_copies_of_weights_and_the_processor_none() {
        let memory = CpuDevice::open(1 << 20, 4096).unwrap();
        let mut pool = Pool::new(memory, Backend::Paged).unwrap();
        assert_eq!((keep_weights(&mut pool, 1000), pool.host()), (1000, None));

        let options = Options { memory_bytes: 8 << 20, granularity: 4096, ..Options::default() };
        let (gpu, device) = stand_in::open(options, 1 << 20, 4096);
        let mut pool = Pool::new(device.unwrap().into_memory(), Backend::Paged).unwrap();
        // The second slab is refused.
        gpu.fail("cuMemHostAlloc", 2, 2);
        assert_eq!(keep_weights(&mut pool, 640 << 20), 80 << 20);
        let deadline = Instant::now() + Duration::from_secs(30);
        while gpu.pending_faults() > 0 {
            assert!(Instant::now() < deadline, "it is never pinned");
            std::thread::sleep(Duration::from_millis(1));
        }
        let host = pool.host().unwrap();
        assert_eq!((host.bytes, host.used_bytes, host.tensors), (256 << 20, 0, 0));
    }
}
