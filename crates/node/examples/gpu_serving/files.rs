//! Cold first tokens of a model whose file is in the page cache: it was just written and read.

use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde_json::json;
use tangram_device::cuda::Driver;
use tangram_node::Node;

use crate::ask::{ask, close, config, exposed, model, run as request};
use crate::report::say;
use crate::shapes::{Shape, write};

/// Cold starts; each begins with an empty pool.
const ROUNDS: usize = 3;

pub(crate) fn run(
    driver: &Arc<Driver>,
    shape: &Shape,
    path: &Path,
    keep: bool,
) -> Result<(), Box<dyn Error>> {
    let measured = measure(driver, shape, path);
    let _ = std::fs::remove_dir_all(path.join("data"));
    if !keep {
        let _ = std::fs::remove_dir_all(path);
    }
    measured
}

fn measure(driver: &Arc<Driver>, shape: &Shape, path: &Path) -> Result<(), Box<dyn Error>> {
    let (source, data) = (path.join("source"), path.join("data"));
    let prompt = if shape.is_tiny() { 16 } else { 1024 };
    let started = Instant::now();
    let bytes = write(shape, &source)?;
    let seconds = started.elapsed().as_secs_f64();
    say(shape.name, "written", json!({ "bytes": bytes, "seconds": seconds, "source": source }));
    let started = Instant::now();
    let mut node = Node::open(config(driver, &data))?;
    let (seconds, pool_bytes) = (started.elapsed().as_secs_f64(), node.pool_bytes());
    say(shape.name, "node_opened", json!({ "seconds": seconds, "pool_bytes": pool_bytes }));
    let started = Instant::now();
    node.deploy_in_place("m", &source, &mut |_| ControlFlow::Continue(()))?;
    say(shape.name, "deployed", json!({ "seconds": started.elapsed().as_secs_f64() }));
    for round in 0..ROUNDS {
        if round > 0 {
            close(node);
            node = Node::open(config(driver, &data))?;
        }
        let timing = request(&node, ask(&model(&node, "m")?, prompt, 1, round))?;
        let load = timing.load.as_secs_f64();
        say(
            shape.name,
            "cold_first_token_from_page_cache",
            json!({
                "seconds": timing.first_token.as_secs_f64(), "load_seconds": load,
                "exposed_seconds": exposed(&timing), "bytes_loaded": timing.bytes_loaded,
                "gb_per_s": timing.bytes_loaded as f64 / load.max(1e-9) / 1e9,
            }),
        );
    }
    close(node);
    Ok(())
}
