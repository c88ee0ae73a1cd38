//! Every kernel against its twin: plain f64 arithmetic on the same stored numbers, over random shapes; and the bitwise
//! rules, kernel against kernel. Runs on whatever is behind [`Launcher`]: a real one (`cuda-check`), or the emulator (a test).
//!
//! A check panics with its case when a kernel is wrong. Outputs start as NaN, so an element that is not written shows.
#![allow(unsafe_code)]
#![allow(clippy::expect_used, reason = "a check that cannot run is a check that fails")]

use std::sync::Arc;

use half::{bf16, f16};
use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};
use tangram_checkpoint::DType;
use tangram_engine::cuda::*;
use tangram_engine::kernels::{Isa, dequantise_row};

mod attention;
mod others;

/// Where checks run, and the numbers they run on.
pub struct Bench {
    gpu: Arc<dyn Launcher>,
    kernels: Kernels,
    random: Xoshiro256PlusPlus,
    /// Sizes are at most these many times the smallest interesting ones.
    pub scale: usize,
    worst: f64,
}

type Check = fn(&mut Bench);

/// The checks by name.
pub const CHECKS: [(&str, Check); 13] = [
    ("rows as operands", Bench::check_operands),
    ("products", Bench::check_product),
    ("products of experts", Bench::check_expert_products),
    ("embedding", Bench::check_embed),
    ("norms", Bench::check_norm),
    ("activations", Bench::check_activation),
    ("element-wise", Bench::check_elements),
    ("pooling", Bench::check_pool),
    ("heads and cache", Bench::check_prepare),
    ("attention", Bench::check_attention),
    ("plain attention", Bench::check_plain_attention),
    ("low-rank products", Bench::check_low_rank),
    ("sampling", Bench::check_sampling),
];

impl Bench {
    pub fn new(gpu: Arc<dyn Launcher>, seed: u64, scale: usize) -> Bench {
        let kernels = Kernels::load(gpu.clone()).expect("kernels");
        Bench { gpu, kernels, random: Xoshiro256PlusPlus::seed_from_u64(seed), scale, worst: 0.0 }
    }

    /// The largest error of any check since the last call, as a share of what it may be.
    pub fn take_worst(&mut self) -> f64 {
        std::mem::take(&mut self.worst)
    }

    /// From `low` to `high`, both included.
    fn between(&mut self, low: usize, high: usize) -> usize {
        low + (self.random.next_u64() % (high - low + 1) as u64) as usize
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.between(1, 100) <= percent
    }

    fn choose<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.between(0, from.len() - 1)]
    }

    /// Roughly normal, of this size.
    fn number(&mut self, size: f32) -> f32 {
        let sum: f32 = (0..4).map(|_| self.random.next_u32() as f32 / u32::MAX as f32 - 0.5).sum();
        sum * 1.7 * size
    }

    fn numbers(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|_| self.number(size)).collect()
    }

    /// Stored elements and what they mean. `count` must be whole blocks.
    fn weights(&mut self, dtype: DType, count: usize) -> (Vec<u8>, Vec<f32>) {
        let mut bytes = vec![0; dtype.tensor_bytes(&[count as u64]).expect("whole blocks") as usize];
        match dtype {
            DType::F32 | DType::F16 | DType::BF16 => bytes = stored(&self.numbers(count, 1.0), dtype),
            quantised => {
                self.random.fill_bytes(&mut bytes);
                for block in bytes.chunks_exact_mut(quantised.block_bytes() as usize) {
                    for &(place, size) in factors(quantised) {
                        let factor = f16::from_f32(self.number(size));
                        block[place..place + 2].copy_from_slice(&factor.to_le_bytes());
                    }
                }
            }
        }
        let mut values = vec![0.0; count];
        dequantise_row(Isa::detect(), dtype, &bytes, &mut values);
        (bytes, values)
    }

    /// A vector in a plain type.
    fn vector(&mut self, count: usize) -> (Buffer, u32, Vec<f32>) {
        let dtype = self.choose(&[DType::F32, DType::F16, DType::BF16]);
        let (bytes, values) = self.weights(dtype, count);
        (self.upload(&bytes), weight_type(dtype), values)
    }

    fn upload(&self, bytes: &[u8]) -> Buffer {
        Buffer::with(&self.gpu, bytes).expect("memory")
    }

    fn upload_f32(&self, values: &[f32]) -> Buffer {
        self.upload(&stored(values, DType::F32))
    }

    fn upload_u32(&self, values: &[u32]) -> Buffer {
        self.upload(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
    }

    fn upload_u64(&self, values: &[u64]) -> Buffer {
        self.upload(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
    }

    /// Room for so many f32, all NaN.
    fn output(&self, count: usize) -> Buffer {
        self.upload(&vec![0xff; count * 4])
    }

    fn read(&self, buffer: &Buffer, count: usize) -> Vec<f32> {
        let mut bytes = vec![0; count * 4];
        buffer.read(&mut bytes).expect("a result");
        bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
    }

    fn read_u32(&self, buffer: &Buffer, count: usize) -> Vec<u32> {
        self.read(buffer, count).into_iter().map(f32::to_bits).collect()
    }

    fn read_u16(&self, buffer: &Buffer, count: usize) -> Vec<u16> {
        let mut bytes = vec![0; count * 2];
        buffer.read(&mut bytes).expect("a result");
        bytes.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes)).collect()
    }

    /// Each number must be as expected, up to its bound.
    fn compare(&mut self, case: &str, found: &[f32], expected: impl IntoIterator<Item = (f64, f64)>) {
        let mut count = 0;
        for (index, (expected, bound)) in expected.into_iter().enumerate() {
            let share = (f64::from(found[index]) - expected).abs() / bound;
            assert!(
                share <= 1.0,
                "{case}: element {index} is {}, expected {expected} ± {bound}",
                found[index]
            );
            self.worst = self.worst.max(share);
            count += 1;
        }
        assert_eq!(count, found.len(), "{case}");
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn stored(values: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
    }
}

/// Where a block has factors, and of which size they are when weights should be about 1.
fn factors(dtype: DType) -> &'static [(usize, f32)] {
    match dtype {
        DType::Q4_1 | DType::Q5_1 => &[(0, 0.05), (2, 1.0)],
        DType::Q2K => &[(80, 0.02), (82, 0.1)],
        DType::Q3K => &[(108, 0.01)],
        DType::Q4K | DType::Q5K => &[(0, 0.002), (2, 0.02)],
        DType::Q6K => &[(208, 0.001)],
        DType::Iq4Nl => &[(0, 0.01)],
        _ => &[(0, 0.05)],
    }
}

/// Rows as operands, and what the operands mean.
struct Packed {
    out: RowsOut,
    bf16: Vec<f64>,
    /// With the factor of the row.
    f16: Vec<f64>,
    /// Kept alive.
    _buffers: [Buffer; 4],
}

impl Bench {
    /// Rows of random sizes as operands.
    fn pack(&mut self, rows: usize, width: usize) -> (Vec<f32>, Packed) {
        let mut x = Vec::new();
        for _ in 0..rows {
            let size = self.choose(&[1.0, 1.0, 1e-6, 3e5]);
            x.extend(self.numbers(width, size));
        }
        if self.chance(10) {
            x[..width].fill(0.0);
        }
        let padded = width.next_multiple_of(32);
        let plain = self.upload_f32(&x);
        let (narrow, f16, scales) = (
            self.upload(&vec![0xff; rows * padded * 2]),
            self.upload(&vec![0xff; rows * padded * 2]),
            self.output(rows),
        );
        let out = RowsOut {
            plain: plain.address(),
            bf16: narrow.address(),
            f16: f16.address(),
            scales: scales.address(),
        };
        let arguments = ActivateArguments {
            x: plain.address(),
            out,
            width: width as u32,
            activation: activation::NONE,
            ..ActivateArguments::default()
        };
        // SAFETY: all buffers have `rows` rows.
        unsafe { self.kernels.activate(launch::rows(rows, 512), &arguments) }.expect("a launch");
        let bf16_values = self.read_u16(&narrow, rows * padded);
        let f16_values = self.read_u16(&f16, rows * padded);
        let factors = self.read(&scales, rows);
        let packed = Packed {
            out,
            bf16: bf16_values.iter().map(|&bits| bf16::from_bits(bits).to_f64()).collect(),
            f16: f16_values
                .iter()
                .enumerate()
                .map(|(i, &bits)| f16::from_bits(bits).to_f64() * f64::from(factors[i / padded]))
                .collect(),
            _buffers: [plain, narrow, f16, scales],
        };
        (x, packed)
    }

    fn check_operands(&mut self) {
        let (rows, width) = (self.between(1, 5), self.between(1, 300 * self.scale));
        let (x, packed) = self.pack(rows, width);
        let padded = width.next_multiple_of(32);
        for row in 0..rows {
            let x = &x[row * width..(row + 1) * width];
            let largest = x.iter().fold(0.0f32, |a, b| a.max(b.abs()));
            for i in 0..padded {
                let (in_bf16, in_f16) = (packed.bf16[row * padded + i], packed.f16[row * padded + i]);
                let expected = x.get(i).copied().unwrap_or(0.0);
                assert_eq!(in_bf16, bf16::from_f32(expected).to_f64(), "{rows}x{width}");
                // Half a unit in the last place, and what is tiny beside the largest.
                let bound = f64::from(expected.abs()) / 2048.0 + f64::from(largest) / 2f64.powi(37);
                assert!((in_f16 - f64::from(expected)).abs() <= bound, "{rows}x{width}: {in_f16} {expected}");
            }
        }
    }

    /// The shape of a product and its operands' meaning.
    fn check_product(&mut self) {
        for dtype in WEIGHT_TYPES {
            self.product_of(dtype);
        }
    }

    fn product_of(&mut self, dtype: DType) {
        let block = dtype.block_elements() as usize;
        let columns = match block {
            1 => self.choose(&[1, 2, 31, 32, 40, 64, 100, 250, 256, 288, 416]),
            32 => 32 * self.between(1, 20),
            _ => 256 * self.between(1, 3),
        };
        let rows = self.between(1, 150 * self.scale);
        let tokens = self.choose(&[1, 2, 7, 8, 9, 30, 33, 64, 129]);
        let case = format!("{dtype} {rows}x{columns} by {tokens}");
        let (bytes, weights) = self.weights(dtype, rows * columns);
        let (x, packed) = self.pack(tokens, columns);
        let padded = columns.next_multiple_of(32);
        let (bias, bias_type, bias_values) = self.vector(rows);
        let with_bias = self.chance(50);
        let accumulate = self.chance(50);
        let before = self.numbers(tokens * rows, 1.0);
        let weight = self.upload(&bytes);
        // What the kernel multiplies.
        let x_of = |t: usize, k: usize| match dtype {
            DType::F32 => f64::from(x[t * columns + k]),
            DType::BF16 => packed.bf16[t * padded + k],
            _ => packed.f16[t * padded + k],
        };
        let weight_of = |weight: f32| match dtype.is_quantised() {
            true => f16::from_f32(weight).to_f64(),
            false => f64::from(weight),
        };
        let expected: Vec<(f64, f64)> = (0..tokens * rows)
            .map(|index| {
                let (token, row) = (index / rows, index % rows);
                let (mut sum, mut size) = (0.0, 0.0);
                for k in 0..columns {
                    let product = weight_of(weights[row * columns + k]) * x_of(token, k);
                    sum += product;
                    size += product.abs();
                }
                if with_bias {
                    sum += f64::from(bias_values[row]);
                }
                if accumulate {
                    sum += f64::from(before[index]);
                }
                (sum, 2e-5 * size + 1e-6 * (1.0 + sum.abs()))
            })
            .collect();
        let quarters = if dtype == DType::F32 {
            vec![None]
        } else {
            [ProductKind::Few8, ProductKind::Few32, ProductKind::Many].map(Some).to_vec()
        };
        let mut first = None;
        for kind in quarters {
            let out = if accumulate { self.upload_f32(&before) } else { self.output(tokens * rows) };
            let (x, scales) = operand(&packed.out, dtype);
            let arguments = ProductArguments {
                weight: weight.address(),
                x,
                scales,
                bias: if with_bias { bias.address() } else { 0 },
                out: out.address(),
                row_bytes: (bytes.len() / rows) as u64,
                rows: rows as u32,
                columns: columns as u32,
                tokens: tokens as u32,
                bias_type,
                accumulate: u32::from(accumulate),
                aligned: u32::from(columns.is_multiple_of(32)),
                ..ProductArguments::default()
            };
            // SAFETY: all buffers have their rows and columns.
            unsafe {
                match kind {
                    Some(kind) => {
                        self.kernels.product(kind, dtype, tokens.div_ceil(kind.tile_tokens()), &arguments)
                    }
                    None => {
                        self.kernels.product_f32(launch::product_f32(rows, tokens.div_ceil(8)), &arguments)
                    }
                }
            }
            .expect("a launch");
            let found = self.read(&out, tokens * rows);
            self.compare(&format!("{case} {kind:?}"), &found, expected.iter().copied());
            let first = first.get_or_insert_with(|| bits(&found));
            assert_eq!(*first, bits(&found), "{case}: {kind:?} differs from Few8");
        }
    }

    /// Routes, their grouping, grouped products, and the sum of results.
    fn check_expert_products(&mut self) {
        let (rows, experts, columns, width) =
            (self.between(1, 40), self.between(1, 40), 32 * self.between(1, 4), self.between(1, 40));
        let per_token = self.between(1, experts.min(8));
        let normalise = self.chance(50);
        let case = format!("{rows} rows to {per_token} of {experts}, {width}x{columns}");
        let routes = rows * per_token;
        // Few different scores, so that some are equal.
        let scores: Vec<f32> = (0..rows * experts).map(|_| self.between(0, 20) as f32 / 4.0).collect();
        let mut expected_routes = Vec::new();
        tangram_engine::kernels::routing::route(&scores, experts, per_token, normalise, &mut expected_routes);

        let of_scores = self.upload_f32(&scores);
        let (chosen, weights, gather, places) =
            (self.output(routes), self.output(routes), self.output(routes), self.output(routes));
        let kind = self.choose(&[ProductKind::Few8, ProductKind::Few32, ProductKind::Many]);
        let most_tiles = launch::most_tiles(routes, experts, kind.tile_tokens());
        let tiles = self.output(3 * most_tiles);
        let route = RouteArguments {
            scores: of_scores.address(),
            chosen: chosen.address(),
            weights: weights.address(),
            rows: rows as u32,
            experts: experts as u32,
            per_token: per_token as u32,
            normalise: u32::from(normalise),
        };
        let group = GroupArguments {
            chosen: chosen.address(),
            gather: gather.address(),
            places: places.address(),
            tiles: tiles.address(),
            routes: routes as u32,
            per_token: per_token as u32,
            experts: experts as u32,
            tile_rows: kind.tile_tokens() as u32,
            most_tiles: most_tiles as u32,
            unused: 0,
        };
        // SAFETY: all buffers have their elements.
        unsafe {
            self.kernels.route(launch::route(rows), &route).expect("a launch");
            self.kernels.group_routes(launch::group_routes(experts), &group).expect("a launch");
        }
        let chosen = self.read_u32(&chosen, routes);
        let found_weights = self.read(&weights, routes);
        let found_places = self.read_u32(&places, routes);
        let found_gather = self.read_u32(&gather, routes);
        for (place, expected) in expected_routes.iter().enumerate() {
            let of_row = expected.row * per_token..(expected.row + 1) * per_token;
            let route =
                of_row.clone().find(|&route| chosen[route] == expected.expert as u32).expect("the route");
            assert_eq!(found_places[route], place as u32, "{case}");
            assert_eq!(found_gather[place], expected.row as u32, "{case}");
            let weight = f64::from(expected.weight);
            self.compare(&case, &found_weights[route..=route], [(weight, 1e-5 * weight)]);
            assert!(chosen[of_row].is_sorted(), "{case}: experts are not ascending");
        }

        let (_, packed) = self.pack(rows, columns);
        let matrices: Vec<(Vec<u8>, Vec<f32>)> =
            (0..experts).map(|_| self.weights(DType::Q4_0, width * columns)).collect();
        let on_gpu: Vec<Buffer> = matrices.iter().map(|(bytes, _)| self.upload(bytes)).collect();
        let addresses: Vec<u64> = on_gpu.iter().map(Buffer::address).collect();
        let table = self.upload_u64(&addresses);
        let (results, out) = (self.output(routes * width), self.output(rows * width));
        let arguments = ProductArguments {
            weight: table.address(),
            x: packed.out.f16,
            scales: packed.out.scales,
            out: results.address(),
            tiles: tiles.address(),
            gather: gather.address(),
            row_bytes: (matrices[0].0.len() / width) as u64,
            rows: width as u32,
            columns: columns as u32,
            tokens: rows as u32,
            ..ProductArguments::default()
        };
        let combine = CombineArguments {
            results: results.address(),
            places: places.address(),
            weights: weights.address(),
            out: out.address(),
            width: width as u32,
            per_token: per_token as u32,
            accumulate: 0,
            unused: 0,
        };
        // SAFETY: as above.
        unsafe {
            self.kernels.product(kind, DType::Q4_0, most_tiles, &arguments).expect("a launch");
            self.kernels.combine(launch::rows(rows, 256), &combine).expect("a launch");
        }
        let found = self.read(&out, rows * width);
        let expected = (0..rows * width).map(|index| {
            let (row, n) = (index / width, index % width);
            let (mut sum, mut size) = (0.0, 0.0);
            for route in row * per_token..(row + 1) * per_token {
                let matrix = &matrices[chosen[route] as usize].1;
                for k in 0..columns {
                    let weight = f16::from_f32(matrix[n * columns + k]).to_f64();
                    let product = weight * packed.f16[row * columns + k] * f64::from(found_weights[route]);
                    sum += product;
                    size += product.abs();
                }
            }
            (sum, 2e-5 * size + 1e-9)
        });
        let expected: Vec<(f64, f64)> = expected.collect();
        self.compare(&case, &found, expected);
    }
}

/// The operand that weights of this type are multiplied with.
fn operand(out: &RowsOut, dtype: DType) -> (u64, u64) {
    match dtype {
        DType::F32 => (out.plain, 0),
        DType::BF16 => (out.bf16, 0),
        _ => (out.f16, out.scales),
    }
}
