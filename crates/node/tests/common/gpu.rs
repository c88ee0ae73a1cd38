//! Nodes on stand-ins of GPUs, whose driver runs the kernels' own sources on the processor. Needs a C++ compiler.

use std::path::Path;
use std::sync::Arc;

use tangram_device::cuda::stand_in::{self, Delay, Left, Options, StandIn};
use tangram_node::{Device, Node, NodeConfig};

use super::{config, eventually};

/// Bytes of a page.
pub const PAGE: usize = 64 << 10;

/// A stand-in with room for a pool of these bytes.
pub fn gpu(pool: usize, delay: Delay) -> Option<StandIn> {
    let Some(emulator) = stand_in::build_emulator(Path::new(env!("CARGO_TARGET_TMPDIR"))) else {
        println!("SKIPPED: no C++ compiler here that can compile the kernels");
        return None;
    };
    stand_in::run_kernels(&emulator);
    // Beside the pool: a reserve of 1 GiB, which costs nothing here.
    let memory_bytes = pool + (2 << 30);
    Some(StandIn::new(Options { memory_bytes, granularity: PAGE, delay, abort_on_misuse: true }))
}

pub fn on_gpu(stand_in: &StandIn, data: &Path, pool: usize) -> NodeConfig {
    NodeConfig {
        devices: vec![Device::Cuda { driver: stand_in::driver(), ordinal: stand_in.ordinal() }],
        page_bytes: Some(PAGE as u64),
        ..config(data, pool as u64)
    }
}

/// Ends the node; threads that read for it end a moment later.
pub fn nothing_is_left(node: Arc<Node>, stand_in: &StandIn) {
    drop(node);
    eventually("everything is given back", || stand_in.left() == Left::default());
    assert_eq!(stand_in.violations(), Vec::<String>::new());
}
