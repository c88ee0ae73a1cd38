//! What the CPU device takes to give a GiB to an owner and take it back, with memory that was written before:
//! `cargo run --release -p tangram-device --example map_cost`. Processor milliseconds, medians.

use rustix::time::{ClockId, clock_gettime};
use tangram_device::cpu::CpuDevice;
use tangram_device::{Arena, Claim, Contents, Extent};

const BYTES: usize = 1 << 30;
const ROUNDS: usize = 9;

fn processor_ms() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for page in [64 << 10, 256 << 10, 2 << 20] {
        let memory = CpuDevice::open(BYTES, page)?;
        let arena = Arena::reserve(memory, BYTES)?;
        let (mut given, mut taken) = (Vec::new(), Vec::new());
        for round in 0..=ROUNDS {
            let started = processor_ms();
            let claims = [Claim { offset: 0, len: BYTES }];
            let mut extents = arena.claim_all(&claims, Contents::Overwritten)?;
            extents.iter_mut().for_each(Extent::prepare_write);
            let between = processor_ms();
            // The first time the system gives the memory.
            if round == 0 {
                extents.iter_mut().filter_map(Extent::host_bytes_mut).for_each(|bytes| bytes.fill(1));
            }
            let written = processor_ms();
            drop(extents);
            if round > 0 {
                given.push(between - started);
                taken.push(processor_ms() - written);
            }
        }
        given.sort_by(f64::total_cmp);
        taken.sort_by(f64::total_cmp);
        println!(
            "pages of {:4} KiB: {:6.2} ms to give, {:6.2} ms to take back",
            page >> 10,
            given[ROUNDS / 2],
            taken[ROUNDS / 2]
        );
    }
    Ok(())
}
