//! What serving costs on a GPU, with random models in the shapes of known ones. Needs the NVIDIA driver alone; prints a
//! line of JSON per finding, and per goal whether it is met.
//!
//! ```text
//! cargo build --release -p tangram-node --example gpu_serving
//! gpu_serving parity DIRECTORY [KEY=VALUE...]     the same on the GPU as on the processor, and as others computed
//! gpu_serving serving DIRECTORY [SHAPE...]        resident, and cold from pinned host memory: first tokens, prefill, decoding
//! gpu_serving files DIRECTORY [keep] [SHAPE...]   cold from files in the page cache
//! gpu_serving switching DIRECTORY [KEY=VALUE...]  eight models in turn under ours and what it is measured against
//! ```
//!
//! Only `files` writes weights: as much of the disk as a model has, removed in the end unless `keep` is said.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod alone;
mod ask;
mod files;
mod link;
mod parity;
mod report;
mod serving;
mod shapes;
mod switching;

use std::error::Error;
use std::path::Path;

use serde_json::json;
use shapes::Shape;
use tangram_device::cuda::{Driver, Gpu};

/// Shapes that are measured unless others are named.
const USUAL: [&str; 1] = ["llama-3-8b"];

fn main() -> Result<(), Box<dyn Error>> {
    let usage = "usage: gpu_serving parity|serving|files|switching DIRECTORY [...]";
    let mut arguments = std::env::args().skip(1);
    let (what, directory) = arguments.next().zip(arguments.next()).ok_or(usage)?;
    let rest: Vec<String> = arguments.collect();
    let driver = Driver::load()?;
    let memory = Gpu::open(&driver, 0)?.memory()?;
    println!(
        "{}",
        json!({
            "gpu": driver.gpu_name(0)?, "cuda": format!("{:?}", driver.cuda_version()),
            "free": memory.free, "total": memory.total,
        })
    );
    let directory = Path::new(&directory);
    let names = rest.iter().map(String::as_str).filter(|name| *name != "keep");
    let mut shapes = names.clone().map(Shape::named);
    match what.as_str() {
        "switching" => switching::run(&driver, directory, &rest),
        "parity" => parity::run(&driver, directory, &rest),
        "serving" | "files" => {
            let named = shapes.by_ref().collect::<Result<Vec<Shape>, _>>()?;
            let usual = || USUAL.into_iter().map(Shape::named).collect::<Result<Vec<Shape>, _>>();
            let shapes = if named.is_empty() { usual()? } else { named };
            let keep = rest.iter().any(|name| name == "keep");
            for shape in shapes {
                match what.as_str() {
                    "serving" => serving::run(&driver, &shape, &directory.join(shape.name))?,
                    _ => files::run(&driver, &shape, &directory.join(shape.name), keep)?,
                }
            }
            Ok(())
        }
        _ => Err(usage.into()),
    }
}
