//! Kernels against plain f64 arithmetic, and the bitwise rules.

use half::{bf16, f16};
use proptest::prelude::*;
use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, SeedableRng};
use tangram_checkpoint::{Attention, DType, Mlp, Norm};

use super::attention::{Heads, Keys, Preparation, Scoring, Spans, attend, prepare};
use super::elementwise::{
    NormWeights, activate, activate_gate, add, add_scaled, cap, length, normalise, normalise_in_place,
};
use super::matmul::{Linear, matmul};
use super::simd::{LANES, Scalar, Simd, exp, tanh};
use super::{Buffer, Isa, Kernel, dequantise_row};
use crate::pool::Pool;

const DTYPES: [DType; 14] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q8_0,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q2K,
    DType::Q3K,
    DType::Q4K,
    DType::Q5K,
    DType::Q6K,
    DType::Iq4Nl,
];

/// `count` or a little more: whole blocks.
fn whole_blocks(dtype: DType, count: usize) -> usize {
    count.next_multiple_of(dtype.block_elements() as usize)
}

struct Random(Xoshiro256PlusPlus);

impl Random {
    fn new(seed: u64) -> Random {
        Random(Xoshiro256PlusPlus::seed_from_u64(seed))
    }

    /// Roughly normal, variance 1.
    fn value(&mut self) -> f32 {
        (0..4).map(|_| self.0.next_u32() as f32 / u32::MAX as f32 - 0.5).sum::<f32>() * 1.7
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.value()).collect()
    }

    /// Stored elements and what they mean.
    fn weights(&mut self, dtype: DType, count: usize) -> (Vec<u8>, Vec<f64>) {
        let mut bytes = Vec::new();
        let mut values = Vec::new();
        match dtype {
            DType::F32 => self.values(count).iter().for_each(|x| {
                bytes.extend(x.to_le_bytes());
                values.push(f64::from(*x));
            }),
            DType::F16 => self.values(count).iter().for_each(|&x| {
                bytes.extend(f16::from_f32(x).to_le_bytes());
                values.push(f16::from_f32(x).to_f64());
            }),
            DType::BF16 => self.values(count).iter().for_each(|&x| {
                bytes.extend(bf16::from_f32(x).to_le_bytes());
                values.push(bf16::from_f32(x).to_f64());
            }),
            quantised => {
                let (elements, size) =
                    (quantised.block_elements() as usize, quantised.block_bytes() as usize);
                for _ in 0..count / elements {
                    let mut block = vec![0u8; size];
                    self.0.fill_bytes(&mut block);
                    for (place, scale) in half_floats(quantised) {
                        let half = f16::from_f32(self.value() * scale);
                        block[place..place + 2].copy_from_slice(&half.to_le_bytes());
                    }
                    values.extend((0..elements).map(|i| element(quantised, &block, i)));
                    bytes.extend(block);
                }
            }
        }
        (bytes, values)
    }
}

/// Where a block has factors, and of which size they are when values should be about 1.
fn half_floats(dtype: DType) -> Vec<(usize, f32)> {
    match dtype {
        DType::Q4_1 | DType::Q5_1 => vec![(0, 0.05), (2, 1.0)],
        DType::Q2K => vec![(80, 0.02), (82, 0.1)],
        DType::Q3K => vec![(108, 0.01)],
        DType::Q4K | DType::Q5K => vec![(0, 0.002), (2, 0.02)],
        DType::Q6K => vec![(208, 0.001)],
        DType::Iq4Nl => vec![(0, 0.01)],
        _ => vec![(0, 0.05)],
    }
}

/// Element `i` of a quantised block, straight from the description of its type.
fn element(dtype: DType, block: &[u8], i: usize) -> f64 {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f64();
    let bits = |at: usize, shift: usize, count: u32| u32::from(block[at]) >> shift & ((1 << count) - 1);
    // The nibble of an element of a block of 32 whose nibbles start at `at`.
    let nibble = |at: usize| bits(at + i % 16, i / 16 * 4, 4);
    let fifth = |at: usize| bits(at + i / 8, i % 8, 1) << 4;
    let group = i / 32;
    // Number `j` of eight with six bits, of which the last four are taken apart.
    let six = |first: usize, j: usize, lower: usize| match j {
        0..4 => bits(first + j, 0, 6),
        _ => bits(12 + j - 4, lower, 4) | bits(first + j - 4, 6, 2) << 4,
    };
    let pair = |q: u32| half(0) * f64::from(six(4, group, 0) * q) - half(2) * f64::from(six(8, group, 4));
    match dtype {
        DType::Q8_0 => half(0) * f64::from(block[2 + i] as i8),
        DType::Q4_0 => half(0) * (f64::from(nibble(2)) - 8.0),
        DType::Q4_1 => half(0) * f64::from(nibble(4)) + half(2),
        DType::Q5_0 => half(0) * (f64::from(nibble(6) | fifth(2)) - 16.0),
        DType::Q5_1 => half(0) * f64::from(nibble(8) | fifth(4)) + half(2),
        DType::Iq4Nl => half(0) * f64::from(super::format::IQ4_NL_VALUES[nibble(2) as usize]),
        DType::Q2K => {
            let q = bits(16 + i / 128 * 32 + i % 32, group % 4 * 2, 2);
            half(80) * f64::from(bits(i / 16, 0, 4) * q) - half(82) * f64::from(bits(i / 16, 4, 4))
        }
        DType::Q3K => {
            let q = bits(32 + i / 128 * 32 + i % 32, group % 4 * 2, 2) | bits(i % 32, group, 1) << 2;
            let j = i / 16;
            let scale = bits(96 + j % 8, j / 8 * 4, 4) | bits(104 + j % 4, j / 4 * 2, 2) << 4;
            half(108) * (f64::from(scale) - 32.0) * (f64::from(q) - 4.0)
        }
        DType::Q4K => pair(bits(16 + i / 64 * 32 + i % 32, group % 2 * 4, 4)),
        DType::Q5K => {
            pair(bits(48 + i / 64 * 32 + i % 32, group % 2 * 4, 4) | bits(16 + i % 32, group, 1) << 4)
        }
        DType::Q6K => {
            let low = bits(i / 128 * 64 + i % 64, i % 128 / 64 * 4, 4);
            let high = bits(128 + i / 128 * 32 + i % 32, group % 4 * 2, 2);
            half(208) * f64::from(block[192 + i / 16] as i8) * (f64::from(low | high << 4) - 32.0)
        }
        DType::F32 | DType::F16 | DType::BF16 => unreachable!("not quantised"),
    }
}

/// Copies bytes to an address that is aligned to nothing.
fn misaligned(bytes: &[u8]) -> Vec<u8> {
    let mut copy = vec![0u8];
    copy.extend(bytes);
    copy
}

fn close(found: f32, expected: f64, scale: f64) -> bool {
    (f64::from(found) - expected).abs() <= 1e-5 * scale.max(1e-3)
}

/// The most by which a product with quantised weights can differ because activations are rounded: half a step, and
/// the largest of a group of 32 has 32384 steps.
fn activation_rounding(weights: &[f64], x: &[f32]) -> f64 {
    let groups = weights.chunks(32).zip(x.chunks(32));
    let most = |(weights, x): (&[f64], &[f32])| {
        let largest = x.iter().fold(0.0f32, |a, x| a.max(x.abs()));
        weights.iter().map(|w| w.abs()).sum::<f64>() * f64::from(largest) / 32384.0 / 2.0
    };
    groups.map(most).sum()
}

/// Whether weights of this type are multiplied as integers of sixteen bits.
fn is_pairs(isa: Isa, dtype: DType) -> bool {
    dtype == DType::BF16 && isa.pairs().is_some()
}

/// The most by which a product with bf16 weights can differ because both sides are rounded to integers: half a step, and
/// the largest of a group of 256 has at least 2¹¹ steps as a weight, 2¹⁴ as an activation.
fn pairs_rounding(weights: &[f64], x: &[f32]) -> f64 {
    let groups = weights.chunks(256).zip(x.chunks(256));
    let most = |(weights, x): (&[f64], &[f32])| {
        let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, |a: f64, x| a.max(x.abs()));
        let sum = |values: &mut dyn Iterator<Item = f64>| values.map(f64::abs).sum::<f64>();
        let mut x = x.iter().map(|&x| f64::from(x));
        let weight_part = largest(&mut weights.iter().copied()) / 2048.0 * sum(&mut x.clone());
        let x_part = largest(&mut x) / 16384.0 * sum(&mut weights.iter().copied());
        (weight_part + x_part) / 2.0 * 1.001
    };
    groups.map(most).sum()
}

#[test]
fn every_vector_operation_equals_the_portable_one() {
    struct All<'a> {
        a: &'a [f32; 8],
        b: &'a [f32; 8],
    }
    impl Kernel for All<'_> {
        type Output = Vec<u32>;

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Vec<u32> {
            let mut out = Vec::new();
            let mut put = |v: S::V| {
                let mut lanes = [0.0f32; LANES];
                // SAFETY: eight lanes.
                unsafe { s.store(lanes.as_mut_ptr(), v) };
                out.extend(lanes.map(f32::to_bits));
            };
            // SAFETY: all operands are arrays of eight f32, 32 bytes.
            unsafe {
                let (a, b) = (s.load(self.a.as_ptr()), s.load(self.b.as_ptr()));
                for v in [s.add(a, b), s.sub(a, b), s.mul(a, b), s.div(a, b), s.max(a, b), s.min(a, b)] {
                    put(v);
                }
                for v in [s.round(a), s.copysign(a, b), s.abs(a), s.keep_from(a, b, a), s.splat(self.a[3])] {
                    put(v);
                }
                put(s.pow2(s.round(s.max(s.splat(-120.0), s.min(s.splat(120.0), b)))));
                let bytes = self.a.as_ptr().cast::<u8>();
                put(s.load_f16(bytes));
                put(s.load_bf16(bytes));
                put(s.load_i8(bytes));
                s.load_nibbles(bytes).into_iter().for_each(&mut put);
                let whole = s.load_bytes(bytes);
                let nibbles = s.load_nibble_bytes(bytes);
                let raised = s.raise(nibbles, 7, 4);
                for b in [
                    s.field(whole, 0, 0xff),
                    s.field(whole, 5, 7),
                    s.or_bytes(s.load_bits(bytes), nibbles),
                    s.or_bytes(raised, s.field(nibbles, 1, 3)),
                    s.lookup(&[3, -7, 127, -128, 0, 1, 2, 9, -1, 5, 6, 7, 8, 11, -50, 40], nibbles),
                ] {
                    s.widen(b, 32).into_iter().for_each(&mut put);
                }
                put(s.sums(std::array::from_fn(|i| s.mul(a, s.splat(i as f32 - 2.5)))));
                let mut narrow = [0u8; 32];
                s.store_f16(narrow.as_mut_ptr(), b);
                put(s.load(narrow.as_ptr().cast()));
                put(s.splat(s.sum(a)));
            }
            out
        }
    }
    let mut random = Random::new(1);
    for round in 0..500 {
        let scale = [1.0, 1e-7, 1e5, 1e30][round % 4];
        let a: [f32; 8] = std::array::from_fn(|_| random.value() * scale);
        let b: [f32; 8] = std::array::from_fn(|_| random.value() * scale);
        let expected = All { a: &a, b: &b }.run(Scalar);
        for isa in Isa::available() {
            let found = isa.dispatch(All { a: &a, b: &b });
            for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let nan = f32::from_bits(*found).is_nan() && f32::from_bits(*expected).is_nan();
                assert!(
                    found == expected || nan,
                    "{} {index}: {found:x} {expected:x} of {a:?} {b:?}",
                    isa.name()
                );
            }
        }
    }
}

#[test]
fn every_f16_scale_is_widened_exactly() {
    for isa in Isa::available() {
        for bits in 0..=u16::MAX {
            let mut block = [1u8; 34];
            block[..2].copy_from_slice(&bits.to_le_bytes());
            let mut out = [0.0f32; 32];
            dequantise_row(isa, DType::Q8_0, &block, &mut out);
            let expected = f16::from_bits(bits).to_f32();
            assert!(out[0] == expected || (out[0].is_nan() && expected.is_nan()), "{bits:x}");
        }
    }
}

#[test]
fn exp_is_accurate_and_bounded() {
    struct Exp<'a>(&'a mut [f32; 8]);
    impl Kernel for Exp<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            // SAFETY: eight lanes.
            unsafe { s.store(self.0.as_mut_ptr(), exp(s, s.load(self.0.as_ptr()))) }
        }
    }
    for isa in Isa::available() {
        for i in -87_000..88_000i32 {
            let x = i as f32 * 1e-3;
            let mut lanes = [x; 8];
            isa.dispatch(Exp(&mut lanes));
            let expected = f64::from(x).exp();
            assert!((f64::from(lanes[0]) / expected - 1.0).abs() < 3e-7, "{x}: {} {expected}", lanes[0]);
        }
        let mut lanes = [f32::NEG_INFINITY, -1e30, -88.0, 0.0, 1e30, f32::INFINITY, f32::NAN, -0.0];
        isa.dispatch(Exp(&mut lanes));
        assert_eq!(lanes[..4], [0.0, 0.0, 0.0, 1.0]);
        assert!(lanes[4] > 1e38 && lanes[4] == lanes[5] && lanes[5].is_finite() && lanes[6].is_nan());
    }
}

#[test]
fn tanh_is_accurate_and_bounded() {
    struct Tanh<'a>(&'a mut [f32; 8]);
    impl Kernel for Tanh<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            // SAFETY: eight lanes.
            unsafe { s.store(self.0.as_mut_ptr(), tanh(s, s.load(self.0.as_ptr()))) }
        }
    }
    for isa in Isa::available() {
        for i in 1..20_000i32 {
            let x = (i as f32 * 1e-3).powi(2) * 0.1;
            let mut lanes = [x, -x, 0.0, -0.0, 0.0, 0.0, 0.0, 0.0];
            isa.dispatch(Tanh(&mut lanes));
            let expected = f64::from(x).tanh();
            assert!((f64::from(lanes[0]) / expected - 1.0).abs() < 4e-7, "{x}: {} {expected}", lanes[0]);
            assert_eq!((lanes[1], lanes[2].to_bits(), lanes[3].to_bits()), (-lanes[0], 0, 1 << 31));
        }
        let mut lanes = [f32::INFINITY, f32::NEG_INFINITY, 1e30, 0.625, -0.625, f32::NAN, 100.0, 9.0];
        isa.dispatch(Tanh(&mut lanes));
        assert_eq!(lanes[..3], [1.0, -1.0, 1.0]);
        assert!((lanes[3] - 0.554_599_7).abs() < 1e-6 && lanes[3] == -lanes[4] && lanes[5].is_nan());
    }
}

#[test]
fn a_token_has_the_same_product_in_every_company() {
    for isa in Isa::available() {
        let mut random = Random::new(2);
        for (dtype, columns) in DTYPES
            .iter()
            .flat_map(|&d| [32, 160, 1056].map(|columns| (d, whole_blocks(d, columns))))
            .chain([(DType::BF16, 77), (DType::F32, 3)])
        {
            let rows = 21;
            let (weight, _) = random.weights(dtype, rows * columns);
            let x = random.values(40 * columns);
            let bias = random.values(rows);
            let start = random.values(40 * rows);
            let run = |pool: &Pool, first: usize, tokens: usize, accumulate: bool| {
                let mut out = start[first * rows..(first + tokens) * rows].to_vec();
                let linear =
                    Linear { weight: &weight, dtype, rows, bias: Some(&bias), out: &mut out, accumulate };
                let x = &x[first * columns..(first + tokens) * columns];
                matmul(isa, pool, &mut Buffer::new(), x, columns, tokens, [linear]);
                out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            let pools = [Pool::new(1), Pool::new(3)];
            for accumulate in [false, true] {
                let alone: Vec<u32> =
                    (0..40).flat_map(|token| run(&pools[0], token, 1, accumulate)).collect();
                for tokens in 1..=40 {
                    let found = run(&pools[tokens % 2], 0, tokens, accumulate);
                    assert_eq!(found, alone[..tokens * rows], "{dtype} {columns} {tokens}");
                }
            }
        }
    }
}

/// Sums of sixteen bits inside the products must hold the largest weights times the largest activations.
#[test]
fn the_largest_numbers_do_not_overflow() {
    let (rows, columns) = (17, 256);
    for dtype in DTYPES.into_iter().filter(|dtype| dtype.is_quantised()) {
        for fill in [0x00, 0x7f, 0x80, 0xff] {
            let mut block = vec![fill; dtype.block_bytes() as usize];
            for (place, scale) in half_floats(dtype) {
                block[place..place + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes());
            }
            let elements = dtype.block_elements() as usize;
            let weights: Vec<f64> = (0..columns).map(|i| element(dtype, &block, i % elements)).collect();
            let bytes = block.repeat(rows * columns / elements);
            for x in [1.0f32, -1.0] {
                let product = |isa| {
                    let mut out = vec![0.0; rows];
                    let linear =
                        Linear { weight: &bytes, dtype, rows, bias: None, out: &mut out, accumulate: false };
                    matmul(isa, &Pool::new(1), &mut Buffer::new(), &vec![x; columns], columns, 1, [linear]);
                    out
                };
                let expected = weights.iter().sum::<f64>() * f64::from(x);
                // Signed weights are stored with an offset of up to 128, whose part is taken away again.
                let scale = 130.0 * 0.05 * columns as f64;
                for found in product(Isa::detect()) {
                    assert!((f64::from(found) - expected).abs() < 1e-6 * scale, "{dtype} {found} {expected}");
                }
                // Not all instruction sets go through sixteen bits: a saturated sum would differ.
                let fused = Isa::available().into_iter().filter(|isa| isa.name() != "scalar");
                let products: Vec<Vec<f32>> = fused.map(product).collect();
                assert!(products.windows(2).all(|pair| pair[0] == pair[1]), "{dtype} {fill:x}");
            }
        }
    }
}

#[test]
fn avx512_and_avx2_give_the_same_bits() {
    let (rows, tokens) = (13, 11);
    let fused: Vec<Isa> = Isa::available().into_iter().filter(|isa| isa.name() != "scalar").collect();
    for dtype in DTYPES {
        let columns = whole_blocks(dtype, 352);
        let mut random = Random::new(4);
        let (weight, _) = random.weights(dtype, rows * columns);
        let x = random.values(tokens * columns);
        // Not where only one of them multiplies integers.
        let fused = fused.iter().filter(|&&isa| !is_pairs(isa, dtype));
        let products = fused.map(|&isa| {
            let mut out = vec![0.0; tokens * rows];
            let linear =
                Linear { weight: &weight, dtype, rows, bias: None, out: &mut out, accumulate: false };
            matmul(isa, &Pool::new(1), &mut Buffer::new(), &x, columns, tokens, [linear]);
            out
        });
        let products: Vec<Vec<f32>> = products.collect();
        assert!(products.windows(2).all(|pair| pair[0] == pair[1]), "{dtype}");
    }
}

/// The product of a row of bf16 weights with a token, as `pairs` says.
fn pairs_product(weights: &[f64], x: &[f32]) -> f32 {
    let exponent = |largest: f64| largest.log2().floor();
    let mut sums = [0.0f32; 16];
    for (weights, x) in weights.chunks(256).zip(x.chunks(256)) {
        let weight_step = exponent(weights.iter().fold(0.0, |a, w| a.max(w.abs()))) - 11.0;
        let x_step = exponent(x.iter().fold(0.0, |a, &x| a.max(f64::from(x).abs()))) - 14.0;
        let integers =
            |v: f64, step: f64| (v / step.exp2()).round_ties_even().clamp(-32768.0, 32767.0) as i32;
        let mut products = [0i32; 16];
        for (i, (&w, &x)) in weights.iter().zip(x).enumerate() {
            products[i / 2 % 16] += integers(w, weight_step) * integers(f64::from(x), x_step);
        }
        for (sum, product) in sums.iter_mut().zip(products) {
            *sum = (product as f32).mul_add((weight_step + x_step).exp2() as f32, *sum);
        }
    }
    let quarters: [f32; 4] = std::array::from_fn(|q| {
        let s = &sums[4 * q..4 * q + 4];
        // Lanes 0 and 2, then 1 and 3: what two unpackings bring together.
        (s[0] + s[2]) + (s[1] + s[3])
    });
    (quarters[0] + quarters[2]) + (quarters[1] + quarters[3])
}

#[test]
fn bf16_products_are_those_of_integers() {
    let mut random = Random::new(6);
    for isa in Isa::available().into_iter().filter(|&isa| is_pairs(isa, DType::BF16)) {
        for (columns, largest) in [(128, 1.0), (600, 1e-20), (1100, 1e9)] {
            let rows = 6;
            let (bytes, weights) = random.weights(DType::BF16, rows * columns);
            let x: Vec<f32> = random.values(5 * columns).iter().map(|x| x * largest).collect();
            let mut out = vec![0.0; 5 * rows];
            let linear = Linear {
                weight: &bytes,
                dtype: DType::BF16,
                rows,
                bias: None,
                out: &mut out,
                accumulate: false,
            };
            matmul(isa, &Pool::new(1), &mut Buffer::new(), &x, columns, 5, [linear]);
            for (at, found) in out.iter().enumerate() {
                let (row, x) =
                    (&weights[at % rows * columns..][..columns], &x[at / rows * columns..][..columns]);
                assert_eq!(found.to_bits(), pairs_product(row, x).to_bits(), "{columns} {at}");
            }
        }
    }
}

#[test]
fn the_largest_bf16_products_do_not_overflow_and_infinities_are_nan() {
    let (rows, columns) = (5, 256);
    for isa in Isa::available() {
        let product = |weights: &[bf16], x: &[f32], tokens: usize| {
            let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
            let mut out = vec![0.0; tokens * rows];
            let linear = Linear {
                weight: &bytes,
                dtype: DType::BF16,
                rows,
                bias: None,
                out: &mut out,
                accumulate: false,
            };
            matmul(isa, &Pool::new(1), &mut Buffer::new(), x, columns, tokens, [linear]);
            out
        };
        let weight = bf16::from_f32(1.992_187_5);
        for tokens in [1, 4] {
            for sign in [1.0f32, -1.0] {
                let x = vec![sign * 1.999_999_9; tokens * columns];
                let expected = f64::from(weight.to_f32()) * f64::from(x[0]) * columns as f64;
                for found in product(&vec![weight; rows * columns], &x, tokens) {
                    assert!(
                        (f64::from(found) - expected).abs() < 1e-4 * expected.abs(),
                        "{found} {expected}"
                    );
                }
            }
            for strange in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let (mut weights, mut x) = (vec![weight; rows * columns], vec![1.0; tokens * columns]);
                x[7] = strange;
                weights[2 * columns + 200] = bf16::from_f32(strange);
                for (at, found) in product(&weights, &x, tokens).into_iter().enumerate() {
                    assert_eq!(found.is_finite(), at >= rows && at % rows != 2, "{strange} {at}");
                }
            }
            let (tiny, zeros) = (vec![bf16::from_f32(1e-38); rows * columns], vec![0.0; tokens * columns]);
            assert!(product(&tiny, &zeros, tokens).iter().all(|&found| found == 0.0));
        }
    }
}

#[test]
fn token_blocks_do_not_change_products() {
    // Wide enough that so many tokens make several blocks.
    let (columns, rows, tokens) = (8192, 6, 140);
    let mut random = Random::new(3);
    let (weight, _) = random.weights(DType::BF16, rows * columns);
    let x = random.values(tokens * columns);
    let run = |x: &[f32], tokens| {
        let mut out = vec![0.0; tokens * rows];
        let linear = Linear {
            weight: &weight,
            dtype: DType::BF16,
            rows,
            bias: None,
            out: &mut out,
            accumulate: false,
        };
        matmul(Isa::detect(), &Pool::new(2), &mut Buffer::new(), x, columns, tokens, [linear]);
        out
    };
    let all = run(&x, tokens);
    for token in 0..tokens {
        assert_eq!(run(&x[token * columns..(token + 1) * columns], 1), all[token * rows..(token + 1) * rows]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn products_are_right(
        dtype in prop::sample::select(DTYPES.to_vec()),
        columns in 1usize..300,
        rows in 1usize..50,
        tokens in 1usize..40,
        isa in prop::sample::select(Isa::available()),
        threads in 1usize..4,
        seed: u64,
    ) {
        let columns = whole_blocks(dtype, columns);
        let mut random = Random::new(seed);
        let (bytes, weights) = random.weights(dtype, rows * columns);
        let (other_bytes, other) = random.weights(DType::F32, 5 * columns);
        let x = random.values(tokens * columns);
        let bytes = misaligned(&bytes);
        let (mut out, mut other_out) = (vec![f32::NAN; tokens * rows], vec![1.0; tokens * 5]);
        let linears = [
            Linear { weight: &bytes[1..], dtype, rows, bias: None, out: &mut out, accumulate: false },
            Linear {
                weight: &other_bytes, dtype: DType::F32, rows: 5, bias: Some(&[0.0, 1.0, 2.0, 3.0, 4.0]),
                out: &mut other_out, accumulate: true,
            },
        ];
        matmul(isa, &Pool::new(threads), &mut Buffer::new(), &x, columns, tokens, linears);
        for token in 0..tokens {
            let x = &x[token * columns..(token + 1) * columns];
            let dot = |row: &[f64]| {
                let products = || row.iter().zip(x).map(|(w, &x)| w * f64::from(x));
                (products().sum::<f64>(), products().map(f64::abs).sum::<f64>())
            };
            for row in 0..rows {
                let weights = &weights[row * columns..(row + 1) * columns];
                let (expected, scale) = dot(weights);
                let error = (f64::from(out[token * rows + row]) - expected).abs();
                let allowed = if dtype.is_quantised() {
                    activation_rounding(weights, x) + 3e-6 * scale.max(1e-3)
                } else if is_pairs(isa, dtype) {
                    pairs_rounding(weights, x) + 3e-6 * scale.max(1e-3)
                } else {
                    1e-5 * scale.max(1e-3)
                };
                prop_assert!(error <= allowed, "token {} row {}: {} > {}", token, row, error, allowed);
            }
            for row in 0..5 {
                let (expected, scale) = dot(&other[row * columns..(row + 1) * columns]);
                prop_assert!(close(other_out[token * 5 + row], expected + 1.0 + row as f64, scale + 6.0));
            }
        }
    }

    #[test]
    fn rows_are_widened_right(
        dtype in prop::sample::select(DTYPES.to_vec()), count in 1usize..200, seed: u64,
    ) {
        let count = whole_blocks(dtype, count);
        let (bytes, expected) = Random::new(seed).weights(dtype, count);
        let bytes = misaligned(&bytes);
        for isa in Isa::available() {
            let mut out = vec![0.0; count];
            dequantise_row(isa, dtype, &bytes[1..], &mut out);
            for (out, expected) in out.iter().zip(&expected) {
                // A sum rounds relative to its parts, which are below 10.
                let sum = [DType::Q4_1, DType::Q5_1, DType::Q2K, DType::Q4K, DType::Q5K].contains(&dtype);
                let rounding = expected.abs() * 1.3e-7 + 3e-6 * f64::from(sum);
                prop_assert!((f64::from(*out) - expected).abs() <= rounding, "{} {} {}", dtype, out, expected);
            }
        }
    }

    #[test]
    fn norms_are_right(width in 1usize..300, rows in 1usize..20, layer: bool, with_bias: bool, seed: u64) {
        let mut random = Random::new(seed);
        let (x, weight, bias) = (random.values(rows * width), random.values(width), random.values(width));
        let epsilon = 1e-2;
        let norm = if layer { Norm::Layer { epsilon } } else { Norm::Rms { epsilon } };
        let weights = NormWeights { norm, weight: &weight, bias: with_bias.then_some(&bias[..]) };
        for isa in Isa::available() {
            let pool = Pool::new(2);
            let mut out = vec![0.0; rows * width];
            normalise(isa, &pool, weights, &x, &mut out);
            let mut in_place = x.clone();
            normalise_in_place(isa, &pool, weights, &mut in_place);
            prop_assert_eq!(&out, &in_place);
            for (x, out) in x.chunks(width).zip(out.chunks(width)) {
                let n = width as f64;
                let mean = if layer { x.iter().map(|&x| f64::from(x)).sum::<f64>() / n } else { 0.0 };
                let square = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
                for i in 0..width {
                    let bias = if layer && with_bias { f64::from(bias[i]) } else { 0.0 };
                    let scale = f64::from(weight[i]) / (square + f64::from(epsilon)).sqrt();
                    let expected = (f64::from(x[i]) - mean) * scale + bias;
                    prop_assert!(close(out[i], expected, 30.0), "{} {}", out[i], expected);
                }
            }
        }
    }

    #[test]
    fn activations_are_right_at_every_place(len in 1usize..70, limit in 0.5f32..60.0, seed: u64) {
        let mut random = Random::new(seed);
        let x: Vec<f32> = random.values(len).iter().map(|x| x * 5.0).collect();
        let up = random.values(len);
        let pool = Pool::new(1);
        type Function<'a> = (&'a dyn Fn(Isa, &mut [f32], &[f32]), &'a dyn Fn(f64, f64) -> f64);
        let gelu = |x: f64| x * 0.5 * (1.0 + erf(x / std::f64::consts::SQRT_2));
        let gelu_tanh = |x: f64| x * 0.5 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
        let functions: [Function<'_>; 8] = [
            (&|isa, x, up| activate_gate(isa, &pool, Mlp::GatedSilu, x, up), &|x, up| x / (1.0 + (-x).exp()) * up),
            (&|isa, x, up| activate_gate(isa, &pool, Mlp::GatedGeluTanh, x, up), &|x, up| gelu_tanh(x) * up),
            (&|isa, x, _| activate(isa, &pool, Mlp::Gelu, x), &|x, _| gelu(x)),
            (&|isa, x, _| activate(isa, &pool, Mlp::GeluTanh, x), &|x, _| gelu_tanh(x)),
            (&|isa, x, _| activate(isa, &pool, Mlp::Relu, x), &|x, _| x.max(0.0)),
            (&|isa, x, _| cap(isa, &pool, limit, x), &|x, _| f64::from(limit) * (x / f64::from(limit)).tanh()),
            (&|isa, x, up| add(isa, &pool, x, up), &|x, up| x + up),
            (&|isa, x, up| add_scaled(isa, x, up, limit), &|x, up| x + up * f64::from(limit)),
        ];
        for isa in Isa::available() {
            for (number, (function, expected)) in functions.iter().enumerate() {
                let mut found = x.clone();
                function(isa, &mut found, &up);
                for i in 0..len {
                    let expected = expected(f64::from(x[i]), f64::from(up[i]));
                    prop_assert!(close(found[i], expected, 1.0 + expected.abs()), "{} {} {}", number, found[i], expected);
                    let mut alone = [x[i]];
                    function(isa, &mut alone, &up[i..=i]);
                    prop_assert_eq!(alone[0].to_bits(), found[i].to_bits());
                }
            }
            let expected = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            prop_assert!(close(length(isa, &x), expected, expected));
        }
    }

    /// Attention over the rows of the batch, rotation and head norm included, against the textbook.
    #[test]
    fn attention_is_right(
        kv_heads in 1usize..3,
        group in 1usize..4,
        head_dim in (1usize..40).prop_map(|half| half * 2),
        lengths in prop::collection::vec(1usize..50, 1..4),
        causal: bool,
        normed: bool,
        window in prop::option::of(1usize..40),
        limit in prop::option::of(0.5f32..20.0),
        isa in prop::sample::select(Isa::available()),
        seed: u64,
    ) {
        let shape = Heads { heads: kv_heads * group, kv_heads, head_dim };
        let rows: usize = lengths.iter().sum();
        let mut random = Random::new(seed);
        let queries = random.values(rows * shape.heads * head_dim);
        let keys = random.values(rows * kv_heads * head_dim);
        let values = random.values(rows * kv_heads * head_dim);
        let half = head_dim / 2 - head_dim / 4;
        let angles = random.values(rows * half);
        let table: Vec<f32> = angles
            .chunks(half)
            .flat_map(|row| row.iter().map(|a| a.cos()).chain(row.iter().map(|a| a.sin())).collect::<Vec<_>>())
            .collect();
        let norm_weight = random.values(head_dim);
        let norm = NormWeights { norm: Norm::Rms { epsilon: 1e-3 }, weight: &norm_weight, bias: None };

        let attention = if causal { Attention::Causal } else { Attention::Bidirectional };
        let mut spans = Spans::default();
        lengths.iter().for_each(|&tokens| spans.push(tokens, 0, attention, group));
        let pool = Pool::new(2);
        let (mut query, mut key) = (queries.clone(), keys.clone());
        let norm = normed.then_some(norm);
        let preparation = Preparation { query_norm: norm, key_norm: norm, angles: &table, half };
        prepare(isa, &pool, shape, preparation, &spans, None, &mut query, &mut key, &values);
        let mut out = vec![0.0; query.len()];
        let window = window.filter(|_| causal);
        let scoring = Scoring { scale: 1.0 / (head_dim as f32).sqrt(), cap: limit, window };
        attend(isa, &pool, shape, scoring, &spans, Keys::Fresh(&key, &values), &query, &mut out);

        let ready = |x: &[f32], row: usize, heads: usize, head: usize| -> Vec<f64> {
            let start = (row * heads + head) * head_dim;
            let mut x: Vec<f64> = x[start..start + head_dim].iter().map(|&x| f64::from(x)).collect();
            if normed {
                let square = x.iter().map(|x| x * x).sum::<f64>() / head_dim as f64;
                let epsilon = f64::from(1e-3f32);
                x.iter_mut().zip(&norm_weight).for_each(|(x, &w)| *x *= f64::from(w) / (square + epsilon).sqrt());
            }
            for i in 0..half {
                let (sin, cos) = f64::from(angles[row * half + i]).sin_cos();
                (x[i], x[i + half]) = (x[i] * cos - x[i + half] * sin, x[i + half] * cos + x[i] * sin);
            }
            x
        };
        let mut first = 0;
        for &tokens in &lengths {
            for token in 0..tokens {
                for head in 0..shape.heads {
                    let q = ready(&queries, first + token, shape.heads, head);
                    let seen = if causal { token + 1 } else { tokens };
                    let hidden = window.map_or(0, |window| seen.saturating_sub(window));
                    let weights: Vec<f64> = (hidden..seen)
                        .map(|position| {
                            let k = ready(&keys, first + position, kv_heads, head / group);
                            let dot: f64 = q.iter().zip(&k).map(|(q, k)| q * k).sum();
                            let score = dot / (head_dim as f64).sqrt();
                            match limit.map(f64::from) {
                                Some(cap) => (cap * (score / cap).tanh()).exp(),
                                None => score.exp(),
                            }
                        })
                        .collect();
                    for i in 0..head_dim {
                        let value = |p: usize| f64::from(values[((first + p) * kv_heads + head / group) * head_dim + i]);
                        let sum: f64 = weights.iter().zip(hidden..).map(|(w, p)| w * value(p)).sum();
                        let expected = sum / weights.iter().sum::<f64>();
                        let found = out[((first + token) * shape.heads + head) * head_dim + i];
                        prop_assert!(close(found, expected, 10.0), "{} {}", found, expected);
                    }
                }
            }
            first += tokens;
        }
    }
}

/// erf by its power series, for moderate arguments, and its limit beyond.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let mut term = x;
    let mut sum = x;
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * std::f64::consts::FRAC_2_SQRT_PI
}
