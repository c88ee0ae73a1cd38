//! [`Simd`] by AVX-512 (Intel since Skylake-SP, AMD since Zen 4): the vector operations of AVX2, compiled for twice the
//! registers. Its sums are bit-identical to those of AVX2. `lanes_avx512` has the wider vectors.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::avx2::Avx2;
use super::simd::Simd;

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
}
