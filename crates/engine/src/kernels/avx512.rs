//! [`Simd`] by AVX-512 (Intel since Skylake-SP, AMD since Zen 4): the vector operations of AVX2, and the inner loop of
//! the matrix product with sixteen lanes and twice the registers. Its sums are bit-identical to those of AVX2.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::avx2::Avx2;
use super::simd::{PANEL_ROWS, Simd, Totals};

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

    const PASSES: usize = 1;

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
        fn splat(x: f32) -> __m256;
        fn prefetch(p: *const u8) -> ();
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
    unsafe fn panel_times_tokens<const T: usize>(
        self,
        panel: *const f32,
        x: *const f32,
        groups: usize,
    ) -> Totals<__m256> {
        // SAFETY: the instructions exist (see `Avx512`); the contract makes `groups` times 4 · 32 elements readable at
        // `panel` and `groups` times T · 32 at `x`.
        unsafe {
            let zero = _mm512_setzero_ps();
            // Partial vectors 0 and 1, then 2 and 3, of every token and row: 24 accumulators of 32 registers.
            let mut front = [[zero; PANEL_ROWS]; T];
            let mut back = [[zero; PANEL_ROWS]; T];
            let (mut w, mut x) = (panel, x);
            for _ in 0..groups {
                add_products(w, x, &mut front);
                add_products(w.add(16), x.add(16), &mut back);
                w = w.add(PANEL_ROWS * 32);
                x = x.add(T * 32);
            }
            let mut totals = [_mm256_setzero_ps(); _];
            let sums = front.as_flattened().iter().zip(back.as_flattened());
            for (total, (&front, &back)) in totals.iter_mut().zip(sums) {
                *total = _mm256_add_ps(add_halves(front), add_halves(back));
            }
            totals
        }
    }
}

/// Adds the products of sixteen lanes of four rows and `T` tokens, which lie 32 elements apart.
///
/// # Safety
/// The processor has AVX-512 F; 16 elements of each row are readable at `w`, of each token at `x`.
#[inline(always)]
unsafe fn add_products<const T: usize>(w: *const f32, x: *const f32, acc: &mut [[__m512; PANEL_ROWS]; T]) {
    // SAFETY: by contract.
    unsafe {
        let mut tokens = [_mm512_setzero_ps(); T];
        for (t, token) in tokens.iter_mut().enumerate() {
            *token = _mm512_loadu_ps(x.add(t * 32));
        }
        for row in 0..PANEL_ROWS {
            let weight = _mm512_loadu_ps(w.add(row * 32));
            for (acc, &token) in acc.iter_mut().zip(&tokens) {
                acc[row] = _mm512_fmadd_ps(weight, token, acc[row]);
            }
        }
    }
}

/// Lower plus upper half.
///
/// # Safety
/// The processor has AVX-512 DQ.
#[inline(always)]
unsafe fn add_halves(v: __m512) -> __m256 {
    // SAFETY: by contract.
    unsafe { _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)) }
}
