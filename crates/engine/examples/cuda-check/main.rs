//! Checks every kernel on a real GPU against its twin, then measures those that matter; needs the NVIDIA driver and
//! nothing else.
//!
//! ```text
//! cargo run --release -p tangram-engine --example cuda-check [ROUNDS] [SEED]
//! ```

mod speed;
mod suite;

use tangram_device::cuda::{Driver, Gpu};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse::<u64>());
    let rounds = arguments.next().transpose()?.unwrap_or(50);
    let seed = arguments.next().transpose()?.unwrap_or(1);
    let gpu = Gpu::open(&Driver::load()?, 0)?;
    println!("{}, {rounds} rounds from seed {seed}", gpu.name());
    let gpu = tangram_engine::cuda::load(&gpu)?;
    let mut bench = suite::Bench::new(gpu.clone(), seed, 10);
    for (name, check) in suite::CHECKS {
        (0..rounds).for_each(|_| check(&mut bench));
        println!("{name}: good; the largest error was {:.0} % of what it may be", bench.take_worst() * 100.0);
    }
    drop(bench);
    speed::run(&gpu)
}
