//! Random programs of deployments, requests, loads, KV growth, prefix sharing, failures and removals against the real
//! pool and a plain model of it; every byte that anybody holds is read after every step.
//!
//! `TANGRAM_MODEL_OPS` sets the operations per layout and page size, `TANGRAM_MODEL_SEED` the first seed,
//! `TANGRAM_MODEL_READS` that only one piece of so many is read after a step; see `docs/testing.md`.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod invariants;
mod paged;
mod program;
mod reference;
mod segment;
mod sequences;
mod threads;
mod universe;

use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;

use program::{Counts, Program};
use tangram_device::cuda::stand_in;
use tangram_pool::Backend;
use universe::Universe;

/// Operations of one program; then the next seed begins with an empty pool of another size and other tensors.
const PROGRAM: usize = 2000;

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

fn run(backend: Backend, page_bytes: usize) {
    // Nothing depends on pages in a segment, so there they need not be as large as a GPU's.
    let page_bytes = match backend {
        Backend::Paged => page_bytes * stand_in::page_scale(),
        Backend::Segment if stand_in::page_scale() > 1 => 16 * page_bytes,
        Backend::Segment => page_bytes,
    };
    let (first, mut left) = (number("TANGRAM_MODEL_SEED", 1), number("TANGRAM_MODEL_OPS", 60_000) as usize);
    let enough = left >= 10_000;
    let has_host = universe::pool(backend, page_bytes, 1).host().is_some();
    let mut seed = first;
    let mut counts = Counts::default();
    while left > 0 {
        let steps = left.min(PROGRAM);
        let name = format!("seed {seed}, {backend:?}, pages of {page_bytes} bytes");
        let program = Program::new(backend, page_bytes, seed, name).run(steps);
        program.0.into_iter().for_each(|(what, number)| counts.add(what, number));
        left -= steps;
        seed += 1;
    }
    println!("{backend:?}, pages of {page_bytes} bytes, seeds {first} to {}: no violation", seed - 1);
    for what in Counts::ALL {
        let number = counts.0.get(what).copied().unwrap_or(0);
        println!("  {what}: {number}");
        // In pages nothing moves, and room is never in the wrong place.
        let never = ["bytes moved", "refused although the bytes would do"];
        let expected = enough && (backend == Backend::Segment || !never.contains(&what));
        let expected = expected && (has_host || what != "bytes from host memory");
        assert!(number > 0 || !expected, "the programs never came to: {what}");
    }
}

#[test]
fn paged_with_pages_of_4_kib() {
    run(Backend::Paged, 4 << 10);
}

#[test]
fn paged_with_pages_of_16_kib() {
    run(Backend::Paged, 16 << 10);
}

#[test]
fn paged_with_pages_of_64_kib() {
    run(Backend::Paged, 64 << 10);
}

/// Every read and write is a call of the driver there, so there are fewer of them.
#[test]
fn all_of_this_holds_on_stand_ins_too() {
    let operations = number("TANGRAM_MODEL_OPS", 60_000) / 6;
    stand_in::run_suite_again(&[("TANGRAM_MODEL_OPS", operations.to_string())]);
}

#[test]
fn segment() {
    run(Backend::Segment, 4 << 10);
}

/// The programs are the seeds', the timing is not.
fn race(backend: Backend) {
    let (first, mut left) =
        (number("TANGRAM_MODEL_SEED", 1), number("TANGRAM_MODEL_OPS", 60_000) as usize / 3);
    for seed in first.. {
        println!("{backend:?}, copy streams at work, seed {seed}");
        let mut random = Xoshiro256PlusPlus::seed_from_u64(seed);
        let page_bytes = ([4, 16, 64][seed as usize % 3] << 10) * stand_in::page_scale();
        let steps = left.min(PROGRAM);
        threads::race(Universe::random(backend, page_bytes, &mut random), seed, steps);
        left -= steps;
        if left == 0 {
            break;
        }
    }
}

#[test]
fn paged_with_copy_streams_at_work() {
    race(Backend::Paged);
}

#[test]
fn segment_with_copy_streams_at_work() {
    race(Backend::Segment);
}
