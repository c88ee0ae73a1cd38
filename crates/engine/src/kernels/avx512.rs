//! [`Simd`] by AVX-512 (Intel since Skylake-SP, AMD since Zen 4): the vector operations of AVX2, compiled for twice the
//! registers. Its sums are bit-identical to those of AVX2; where attention spends its time, two of them share a wider
//! vector. `lanes_avx512` has the other wide ones.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::avx2::Avx2;
use super::simd::{LANES, Simd, add_rows_to_one};

/// Proof that this processor has AVX-512 (F, VL, BW, DQ), AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(Avx2);

impl Avx512 {
    /// The proof, if the processor and the operating system support it.
    pub(crate) fn detect() -> Option<Avx512> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq");
        Avx2::detect().filter(|_| found).map(Avx512)
    }
}

macro_rules! as_in_avx2 {
    ($(fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty;)*) => {
        $(
            #[inline(always)]
            fn $name(self, $($arg: $type),*) -> $result {
                self.0.$name($($arg),*)
            }
        )*
    };
    ($(unsafe fn $name:ident($($arg:ident: $type:ty),*) -> $result:ty;)*) => {
        $(
            #[inline(always)]
            unsafe fn $name(self, $($arg: $type),*) -> $result {
                // SAFETY: the contract is the same.
                unsafe { self.0.$name($($arg),*) }
            }
        )*
    };
}

impl Simd for Avx512 {
    type V = __m256;
    type Bytes = __m256i;

    as_in_avx2! {
        unsafe fn load(p: *const f32) -> __m256;
        unsafe fn store(p: *mut f32, v: __m256) -> ();
        unsafe fn load_f16(p: *const u8) -> __m256;
        unsafe fn splat_f16(p: *const u8) -> __m256;
        unsafe fn store_f16(p: *mut u8, v: __m256) -> ();
        unsafe fn load_bf16(p: *const u8) -> __m256;
        unsafe fn load_i8(p: *const u8) -> __m256;
        unsafe fn store_i8(p: *mut i8, v: __m256) -> ();
        unsafe fn load_nibbles(p: *const u8) -> [__m256; 4];
        unsafe fn load_bytes(p: *const u8) -> __m256i;
        unsafe fn load_nibble_bytes(p: *const u8) -> __m256i;
        unsafe fn load_bits(p: *const u8) -> __m256i;
    }

    as_in_avx2! {
        fn ask_for(p: *const u8) -> ();
        fn splat(x: f32) -> __m256;
        fn field(b: __m256i, shift: u32, mask: u8) -> __m256i;
        fn raise(b: __m256i, mask: u8, shift: u32) -> __m256i;
        fn or_bytes(a: __m256i, b: __m256i) -> __m256i;
        fn lookup(table: &[i8; 16], b: __m256i) -> __m256i;
        fn widen(b: __m256i, x: u8) -> [__m256; 4];
        fn add(a: __m256, b: __m256) -> __m256;
        fn sub(a: __m256, b: __m256) -> __m256;
        fn mul(a: __m256, b: __m256) -> __m256;
        fn div(a: __m256, b: __m256) -> __m256;
        fn fma(a: __m256, b: __m256, c: __m256) -> __m256;
        fn max(a: __m256, b: __m256) -> __m256;
        fn min(a: __m256, b: __m256) -> __m256;
        fn round(v: __m256) -> __m256;
        fn pow2(v: __m256) -> __m256;
        fn copysign(v: __m256, sign: __m256) -> __m256;
        fn abs(v: __m256) -> __m256;
        fn keep_from(x: __m256, bound: __m256, v: __m256) -> __m256;
        fn sum(v: __m256) -> f32;
        fn sums(v: [__m256; 8]) -> __m256;
    }

    #[inline(always)]
    unsafe fn products(
        self,
        rows: [*const f32; 2],
        eight: *const f32,
        stride: usize,
    ) -> [[__m256; LANES]; 2] {
        // SAFETY: the proof; all rows have `stride` elements, a multiple of the lanes.
        unsafe {
            // One row in the lower half, the other in the upper half.
            let mut both = [_mm512_setzero_ps(); LANES];
            for i in (0..stride).step_by(LANES) {
                let lower = _mm512_castps256_ps512(_mm256_loadu_ps(rows[0].add(i)));
                let row = _mm512_insertf32x8::<1>(lower, _mm256_loadu_ps(rows[1].add(i)));
                for (t, both) in both.iter_mut().enumerate() {
                    let other = _mm512_broadcast_f32x8(_mm256_loadu_ps(eight.add(t * stride + i)));
                    *both = _mm512_fmadd_ps(row, other, *both);
                }
            }
            let mut products = [[_mm256_setzero_ps(); LANES]; 2];
            for (t, &both) in both.iter().enumerate() {
                products[0][t] = _mm512_castps512_ps256(both);
                products[1][t] = _mm512_extractf32x8_ps::<1>(both);
            }
            products
        }
    }

    #[inline(always)]
    unsafe fn add_rows<const V: usize, const R: usize>(
        self,
        weights: [*const f32; R],
        count: usize,
        rows: *const f32,
        stride: usize,
        sums: [*mut f32; R],
    ) -> usize {
        /// Wide vectors of the most columns that come together.
        const MOST: usize = 4;
        if V % 2 == 1 || V > 2 * MOST || R == 1 {
            for (weights, sums) in weights.into_iter().zip(sums) {
                // SAFETY: the contract is the same.
                unsafe { add_rows_to_one::<Self, V>(self, weights, count, rows, stride, sums) };
            }
            return V;
        }
        let wide = V / 2;
        // SAFETY: the proof, and the contract.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); MOST]; R];
            for (acc, sums) in acc.iter_mut().zip(sums) {
                for (u, acc) in acc.iter_mut().enumerate().take(wide) {
                    *acc = _mm512_loadu_ps(sums.add(u * 2 * LANES));
                }
            }
            for p in 0..count {
                let mut row = [_mm512_setzero_ps(); MOST];
                for (u, row) in row.iter_mut().enumerate().take(wide) {
                    *row = _mm512_loadu_ps(rows.add(p * stride + u * 2 * LANES));
                }
                for (acc, weights) in acc.iter_mut().zip(weights) {
                    let weight = _mm512_set1_ps(*weights.add(p));
                    for (acc, &row) in acc.iter_mut().zip(&row).take(wide) {
                        *acc = _mm512_fmadd_ps(weight, row, *acc);
                    }
                }
            }
            for (acc, sums) in acc.iter().zip(sums) {
                for (u, &acc) in acc.iter().enumerate().take(wide) {
                    _mm512_storeu_ps(sums.add(u * 2 * LANES), acc);
                }
            }
        }
        V
    }
}
