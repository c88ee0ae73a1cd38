//! What each packing strategy moves, and how long it plans, on segments that random loads and evictions have
//! fragmented: `cargo run --release -p tangram-policy --example packing [SEED]`.
//!
//! Models of published sizes are requested at random (Zipf). What is missing of one is loaded in tensor groups: others
//! are evicted until there are enough free bytes, then every strategy plans the same state, and the state goes on with
//! the plan of [`Strategy::PartitionedGain`]. Nothing is copied; only plans are made.

use std::hint::black_box;
use std::time::Instant;

use tangram_policy::packing::{Extent, Packer, Strategy};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const ALIGNMENT: u64 = 256;
const REQUESTS: usize = 2000;
/// A plan's time is the shortest of so many runs: being preempted is not planning.
const RUNS: usize = 3;

/// A 16-bit checkpoint.
struct Model {
    name: &'static str,
    /// Of all tensors together.
    bytes: u64,
    layers: u64,
    hidden: u64,
    /// Width of the keys, which is that of the values.
    keys: u64,
    ffn: u64,
    vocabulary: u64,
    /// Matrices of the feed-forward part per layer.
    ffn_matrices: u64,
    /// Whether it has an output matrix beside the embedding.
    head: bool,
}

#[rustfmt::skip]
const MODELS: [Model; 13] = [
    Model { name: "qwen2-3b", bytes: 6_171_877_376, layers: 36, hidden: 2048, keys: 256, ffn: 11008, vocabulary: 151_936, ffn_matrices: 3, head: false },
    Model { name: "phi3-mini", bytes: 7_642_159_104, layers: 32, hidden: 3072, keys: 3072, ffn: 8192, vocabulary: 32_064, ffn_matrices: 3, head: true },
    Model { name: "llama3-8b", bytes: 16_060_522_496, layers: 32, hidden: 4096, keys: 1024, ffn: 14336, vocabulary: 128_256, ffn_matrices: 3, head: true },
    Model { name: "yi-9b", bytes: 17_658_814_464, layers: 48, hidden: 4096, keys: 512, ffn: 11008, vocabulary: 64_000, ffn_matrices: 3, head: true },
    Model { name: "qwen2-14b", bytes: 29_540_067_328, layers: 48, hidden: 5120, keys: 1024, ffn: 13824, vocabulary: 152_064, ffn_matrices: 3, head: true },
    Model { name: "gpt-20b", bytes: 41_109_135_360, layers: 44, hidden: 6144, keys: 6144, ffn: 24576, vocabulary: 50_432, ffn_matrices: 2, head: true },
    Model { name: "llava-7b", bytes: 14_126_854_144, layers: 32, hidden: 4096, keys: 4096, ffn: 11008, vocabulary: 32_064, ffn_matrices: 3, head: true },
    Model { name: "r1-14b", bytes: 29_540_067_328, layers: 48, hidden: 5120, keys: 1024, ffn: 13824, vocabulary: 152_064, ffn_matrices: 3, head: true },
    Model { name: "opt-1.3b", bytes: 2_631_647_232, layers: 24, hidden: 2048, keys: 2048, ffn: 8192, vocabulary: 50_272, ffn_matrices: 2, head: false },
    Model { name: "opt-2.7b", bytes: 5_303_357_440, layers: 32, hidden: 2560, keys: 2560, ffn: 10240, vocabulary: 50_272, ffn_matrices: 2, head: false },
    Model { name: "llama2-3b", bytes: 7_000_563_712, layers: 26, hidden: 3200, keys: 3200, ffn: 8640, vocabulary: 32_000, ffn_matrices: 3, head: true },
    Model { name: "opt-6.7b", bytes: 13_317_210_112, layers: 32, hidden: 4096, keys: 4096, ffn: 16384, vocabulary: 50_272, ffn_matrices: 2, head: false },
    Model { name: "opt-13b", bytes: 25_707_274_240, layers: 40, hidden: 5120, keys: 5120, ffn: 20480, vocabulary: 50_272, ffn_matrices: 2, head: false },
];

/// Bytes of the groups in the order of the forward pass; a group ends as soon as it has `at_least` bytes.
fn groups(model: &Model, at_least: u64) -> Vec<u64> {
    let embedding = 2 * model.vocabulary * model.hidden;
    let square = 2 * model.hidden * model.hidden;
    let keys = 2 * model.hidden * model.keys;
    let mut layer = vec![square, keys, keys, square];
    layer.extend((0..model.ffn_matrices).map(|_| 2 * model.hidden * model.ffn));
    let known = embedding * (1 + u64::from(model.head)) + model.layers * layer.iter().sum::<u64>();
    // Norms, biases, positions, a vision tower: whatever is left, shared out evenly.
    layer.push(model.bytes.saturating_sub(known) / model.layers);

    let mut tensors = vec![embedding];
    tensors.extend((0..model.layers).flat_map(|_| &layer));
    tensors.extend(model.head.then_some(embedding));
    let mut groups = Vec::new();
    let mut group = 0;
    for tensor in tensors {
        group += tensor;
        if group >= at_least {
            groups.push(std::mem::take(&mut group));
        }
    }
    groups.extend((group > 0).then_some(group));
    groups
}

/// Which groups go first.
#[derive(Clone, Copy, PartialEq)]
enum Evict {
    /// The smallest value as published: bytes times the probability of the model.
    Value,
    /// The least demanded model first, its last layers first.
    Tail,
    /// Any.
    Random,
}

struct Scenario {
    name: &'static str,
    segment: u64,
    models: usize,
    /// The least size of a group.
    group: Group,
    evict: Evict,
    /// How many of the models requested last hold leases on all that they have resident.
    leased: usize,
}

enum Group {
    /// This fraction of the model's bytes (the denominator).
    Share(u64),
    Bytes(u64),
}

#[rustfmt::skip]
const SCENARIOS: [Scenario; 6] = [
    Scenario { name: "8 models, 42 GiB, about 40 groups each, least value out", segment: 42 * GIB, models: 8, group: Group::Share(40), evict: Evict::Value, leased: 0 },
    Scenario { name: "8 models, 42 GiB, groups from 8 MiB, last layers out", segment: 42 * GIB, models: 8, group: Group::Bytes(8 * MIB), evict: Evict::Tail, leased: 0 },
    Scenario { name: "8 models, 42 GiB, groups from 8 MiB, random out", segment: 42 * GIB, models: 8, group: Group::Bytes(8 * MIB), evict: Evict::Random, leased: 0 },
    Scenario { name: "13 models, 120 GiB, groups from 8 MiB, last layers out", segment: 120 * GIB, models: 13, group: Group::Bytes(8 * MIB), evict: Evict::Tail, leased: 0 },
    Scenario { name: "13 models, 120 GiB, groups from 8 MiB, random out", segment: 120 * GIB, models: 13, group: Group::Bytes(8 * MIB), evict: Evict::Random, leased: 0 },
    Scenario { name: "13 models, 120 GiB, groups from 8 MiB, random out, 2 models leased", segment: 120 * GIB, models: 13, group: Group::Bytes(8 * MIB), evict: Evict::Random, leased: 2 },
];

const STRATEGIES: [Strategy; 5] = [
    Strategy::PartitionedGain,
    Strategy::Published,
    Strategy::MoveEverything,
    Strategy::GreedyWindow,
    Strategy::BestFitThenGreedy,
];

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In 0..1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// A group that is in the segment.
#[derive(Clone, Copy)]
struct Resident {
    offset: u64,
    len: u64,
    model: usize,
    group: usize,
}

#[derive(Default)]
struct Tally {
    failed: usize,
    moved_bytes: u64,
    /// What moving everything moved in the plans that succeeded.
    against: u64,
    without_moves: usize,
    micros: Vec<f64>,
}

struct World<'a> {
    scenario: &'a Scenario,
    groups: Vec<Vec<u64>>,
    residents: Vec<Resident>,
    requests: Vec<u64>,
    /// Models in order of their last request.
    recent: Vec<usize>,
    random: Random,
    packer: Packer,
    tallies: [Tally; STRATEGIES.len()],
    extents: Vec<usize>,
    holes: Vec<usize>,
    tensors: Vec<usize>,
    /// Plans with enough free bytes, but no way to use them around the leased groups.
    no_room_for_walls: usize,
}

impl World<'_> {
    fn leased(&self, model: usize) -> bool {
        self.recent.iter().rev().take(self.scenario.leased).any(|&leased| leased == model)
    }

    /// The model asked for next, by Zipf's law over the models in their order.
    fn next_model(&mut self) -> usize {
        let weights = (1..=self.groups.len()).map(|rank| 1.0 / rank as f64);
        let mut left = self.random.unit() * weights.clone().sum::<f64>();
        let mut chosen = 0;
        for (model, weight) in weights.enumerate() {
            chosen = model;
            left -= weight;
            if left <= 0.0 {
                break;
            }
        }
        chosen
    }

    /// Evicts one group of another model than `model`; false if all are needed.
    fn evict(&mut self, model: usize) -> bool {
        let mut worst: Option<(f64, usize)> = None;
        for (index, resident) in self.residents.iter().enumerate() {
            if resident.model == model || self.leased(resident.model) {
                continue;
            }
            let demand = self.requests[resident.model] as f64;
            let worth = match self.scenario.evict {
                Evict::Value => resident.len as f64 * demand,
                Evict::Tail => demand - resident.group as f64 / self.groups[resident.model].len() as f64,
                Evict::Random => self.random.unit(),
            };
            if worst.is_none_or(|(least, _)| worth < least) {
                worst = Some((worth, index));
            }
        }
        worst.map(|(_, index)| self.residents.remove(index)).is_some()
    }

    fn request(&mut self, model: usize) {
        self.requests[model] += 1;
        let mut absent = vec![true; self.groups[model].len()];
        for resident in self.residents.iter().filter(|resident| resident.model == model) {
            absent[resident.group] = false;
        }
        let missing: Vec<usize> = (0..absent.len()).filter(|&group| absent[group]).collect();
        if !missing.is_empty() {
            self.load(model, &missing);
        }
        self.recent.retain(|&other| other != model);
        self.recent.push(model);
    }

    fn load(&mut self, model: usize, missing: &[usize]) {
        let sizes: Vec<u64> = missing.iter().map(|&group| self.groups[model][group]).collect();
        let mut needed: u64 = sizes.iter().map(|size| size.next_multiple_of(ALIGNMENT)).sum();
        let mut free = self.scenario.segment
            - self.residents.iter().map(|resident| resident.len.next_multiple_of(ALIGNMENT)).sum::<u64>();
        loop {
            if free >= needed {
                if self.pack(model, missing, &sizes) {
                    return;
                }
                self.no_room_for_walls += 1;
                // One by one would take thousands of attempts.
                needed += needed / 16;
            }
            let before: u64 = self.residents.iter().map(|resident| resident.len).sum();
            if !self.evict(model) {
                return;
            }
            free += before - self.residents.iter().map(|resident| resident.len).sum::<u64>();
        }
    }

    /// Plans with every strategy and carries out the first one's plan, if there is one.
    fn pack(&mut self, model: usize, missing: &[usize], sizes: &[u64]) -> bool {
        let extents: Vec<Extent> = self
            .residents
            .iter()
            .map(|resident| Extent {
                offset: resident.offset,
                len: resident.len,
                movable: !self.leased(resident.model),
            })
            .collect();
        let ends = extents.iter().map(|extent| extent.offset + extent.len.next_multiple_of(ALIGNMENT));
        let starts = extents.iter().map(|extent| extent.offset).chain([self.scenario.segment]);
        self.holes.push(starts.zip([0].into_iter().chain(ends)).filter(|(start, end)| start > end).count());
        self.extents.push(extents.len());
        self.tensors.push(sizes.len());

        let mut ours = None;
        let mut moved = [None; STRATEGIES.len()];
        for ((tally, moved), strategy) in self.tallies.iter_mut().zip(&mut moved).zip(STRATEGIES) {
            let mut micros = f64::INFINITY;
            for _ in 0..RUNS {
                let start = Instant::now();
                black_box(self.packer.pack(strategy, &extents, sizes));
                micros = micros.min(start.elapsed().as_secs_f64() * 1e6);
            }
            tally.micros.push(micros);
            let packing = self.packer.pack(strategy, &extents, sizes);
            *moved = packing.map(|packing| packing.moved_bytes);
            if strategy == Strategy::PartitionedGain {
                ours = packing.cloned();
            }
        }
        let everything = moved[2];
        for (tally, moved) in self.tallies.iter_mut().zip(moved) {
            let Some(moved) = moved else {
                tally.failed += 1;
                continue;
            };
            tally.without_moves += usize::from(moved == 0);
            if let Some(everything) = everything {
                tally.moved_bytes += moved;
                tally.against += everything;
            }
        }
        let Some(packing) = ours else { return false };
        for step in &packing.moves {
            if let Some(resident) = self.residents.iter_mut().find(|resident| resident.offset == step.from) {
                resident.offset = step.to;
            }
        }
        for &(index, offset) in &packing.placements {
            self.residents.push(Resident { offset, len: sizes[index], model, group: missing[index] });
        }
        self.residents.sort_unstable_by_key(|resident| resident.offset);
        true
    }
}

fn mean(counts: &[usize]) -> usize {
    counts.iter().sum::<usize>() / counts.len().max(1)
}

fn main() {
    let seed = std::env::args().nth(1).and_then(|seed| seed.parse().ok()).unwrap_or(1);
    println!("seed {seed}, {REQUESTS} requests per scenario, times are the best of {RUNS}");
    for scenario in &SCENARIOS {
        let models = &MODELS[..scenario.models];
        let groups = models.iter().map(|model| match scenario.group {
            Group::Share(share) => groups(model, model.bytes / share),
            Group::Bytes(bytes) => groups(model, bytes),
        });
        let mut world = World {
            scenario,
            groups: groups.collect(),
            residents: Vec::new(),
            requests: vec![0; models.len()],
            recent: Vec::new(),
            random: Random(seed),
            packer: Packer::new(scenario.segment, ALIGNMENT),
            tallies: Default::default(),
            extents: Vec::new(),
            holes: Vec::new(),
            tensors: Vec::new(),
            no_room_for_walls: 0,
        };
        for _ in 0..REQUESTS {
            let model = world.next_model();
            world.request(model);
        }
        report(&mut world, models);
    }
}

fn report(world: &mut World<'_>, models: &[Model]) {
    println!("\n{}", world.scenario.name);
    let counts: Vec<String> = models
        .iter()
        .zip(&world.groups)
        .map(|(model, groups)| format!("{} {}", model.name, groups.len()))
        .collect();
    println!("  groups: {}", counts.join(", "));
    println!(
        "  {} plans; per plan on average {} residents (at most {}), {} holes, {} groups to place; {} had the bytes, but no room for walls",
        world.extents.len(),
        mean(&world.extents),
        world.extents.iter().max().unwrap_or(&0),
        mean(&world.holes),
        mean(&world.tensors),
        world.no_room_for_walls,
    );
    println!(
        "  {:<18} {:>7} {:>9} {:>12} {:>14} {:>9} {:>9} {:>9}",
        "strategy", "failed", "no moves", "GiB moved", "of everything", "p50 us", "p99 us", "max us"
    );
    for (tally, strategy) in world.tallies.iter_mut().zip(STRATEGIES) {
        tally.micros.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| {
            let index = (tally.micros.len() as f64 * share) as usize;
            tally.micros.get(index.min(tally.micros.len().saturating_sub(1))).copied().unwrap_or_default()
        };
        println!(
            "  {:<18} {:>7} {:>9} {:>12.2} {:>13.2}% {:>9.1} {:>9.1} {:>9.1}",
            format!("{strategy:?}"),
            tally.failed,
            tally.without_moves,
            tally.moved_bytes as f64 / GIB as f64,
            100.0 * tally.moved_bytes as f64 / tally.against.max(1) as f64,
            at(0.5),
            at(0.99),
            at(1.0),
        );
    }
}
