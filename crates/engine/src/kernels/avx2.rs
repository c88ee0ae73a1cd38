//! [`Simd`] by AVX2, FMA and F16C (x86-64-v3: Intel since Haswell, AMD since Excavator).
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::simd::Simd;

/// Proof that this processor has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The proof, if the processor and the operating system support it.
    pub(crate) fn detect() -> Option<Avx2> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Avx2(()))
    }
}

// SAFETY (for every block below): an `Avx2` exists only where `detect` found the instructions; memory operands are
// readable or writable by the contract of the trait, and all loads and stores are the unaligned kind.
impl Simd for Avx2 {
    type V = __m256;
    type Bytes = __m256i;

    #[inline(always)]
    fn ask_for(self, p: *const u8) {
        // SAFETY: see above; a prefetch of an invalid address does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m256) {
        // SAFETY: see above.
        unsafe { _mm256_storeu_ps(p, v) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn splat_f16(self, p: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtph_ps(_mm_set1_epi16(p.cast::<i16>().read_unaligned())) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u8, v: __m256) {
        // SAFETY: see above.
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) }
    }

    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: __m256) {
        // SAFETY: see above.
        unsafe {
            let words = _mm256_cvtps_epi32(v);
            let halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storel_epi64(p.cast(), _mm_packs_epi16(halves, halves));
        }
    }

    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> [__m256; 4] {
        // SAFETY: see above.
        unsafe {
            let bytes = _mm_loadu_si128(p.cast());
            let mask = _mm_set1_epi8(15);
            let low = _mm_and_si128(bytes, mask);
            let high = _mm_and_si128(_mm_srli_epi16::<4>(bytes), mask);
            [
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(low))),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128::<8>(high))),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }

    #[inline(always)]
    unsafe fn load_nibble_bytes(self, p: *const u8) -> __m256i {
        // SAFETY: see above.
        unsafe {
            let bytes = _mm_loadu_si128(p.cast());
            let both = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
            _mm256_and_si256(both, _mm256_set1_epi8(15))
        }
    }

    #[inline(always)]
    unsafe fn load_bits(self, p: *const u8) -> __m256i {
        // SAFETY: see above.
        unsafe {
            let all = _mm256_set1_epi32(p.cast::<i32>().read_unaligned());
            // Eight copies of every byte, then one bit of each.
            let byte = |i: i64| i * 0x0101_0101_0101_0101;
            let copies = _mm256_shuffle_epi8(all, _mm256_set_epi64x(byte(3), byte(2), byte(1), byte(0)));
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            _mm256_cmpeq_epi8(_mm256_and_si256(copies, bit), bit)
        }
    }

    #[inline(always)]
    fn field(self, b: __m256i, shift: u32, mask: u8) -> __m256i {
        // SAFETY: see above.
        unsafe {
            let shifted = _mm256_srl_epi16(b, _mm_cvtsi32_si128(shift as i32));
            _mm256_and_si256(shifted, _mm256_set1_epi8(mask as i8))
        }
    }

    #[inline(always)]
    fn raise(self, b: __m256i, mask: u8, shift: u32) -> __m256i {
        // SAFETY: see above.
        unsafe {
            let masked = _mm256_and_si256(b, _mm256_set1_epi8(mask as i8));
            _mm256_sll_epi16(masked, _mm_cvtsi32_si128(shift as i32))
        }
    }

    #[inline(always)]
    fn or_bytes(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: see above.
        unsafe { _mm256_or_si256(a, b) }
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; 16], b: __m256i) -> __m256i {
        // SAFETY: see above; the table has 16 bytes.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, b)
        }
    }

    #[inline(always)]
    fn widen(self, b: __m256i, x: u8) -> [__m256; 4] {
        // SAFETY: see above.
        unsafe {
            let b = _mm256_sub_epi8(b, _mm256_set1_epi8(x as i8));
            let (low, high) = (_mm256_castsi256_si128(b), _mm256_extracti128_si256::<1>(b));
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(low))),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(high))),
            ]
        }
    }

    #[inline(always)]
    fn add(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m256, b: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_min_ps(a, b) }
    }

    #[inline(always)]
    fn round(self, v: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v) }
    }

    #[inline(always)]
    fn pow2(self, v: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
        }
    }

    #[inline(always)]
    fn copysign(self, v: __m256, sign: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe {
            let mask = _mm256_set1_ps(-0.0);
            _mm256_or_ps(_mm256_andnot_ps(mask, v), _mm256_and_ps(mask, sign))
        }
    }

    #[inline(always)]
    fn abs(self, v: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_andnot_ps(_mm256_set1_ps(-0.0), v) }
    }

    #[inline(always)]
    fn keep_from(self, x: __m256, bound: __m256, v: __m256) -> __m256 {
        // SAFETY: see above.
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(x, bound), v) }
    }

    #[inline(always)]
    fn sum(self, v: __m256) -> f32 {
        // SAFETY: see above.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }

    #[inline(always)]
    fn sums(self, v: [__m256; 8]) -> __m256 {
        // Three rounds halve the number of partial sums per vector, in the order of `sum`. Vector i and vector i + 4
        // share a register after the first round, so that the results come out in order.
        // SAFETY: see above.
        unsafe {
            let (a, b) = (add_halves(v[0], v[4]), add_halves(v[1], v[5]));
            let (c, d) = (add_halves(v[2], v[6]), add_halves(v[3], v[7]));
            let (ab, cd) = (add_quarters(a, b), add_quarters(c, d));
            _mm256_add_ps(
                _mm256_shuffle_ps::<0b10_00_10_00>(ab, cd),
                _mm256_shuffle_ps::<0b11_01_11_01>(ab, cd),
            )
        }
    }
}

/// Lower plus upper half of `a`, then of `b`.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn add_halves(a: __m256, b: __m256) -> __m256 {
    // SAFETY: by contract.
    unsafe { _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b)) }
}

/// In each half: lower plus upper pair of lanes of `a`, then of `b`.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn add_quarters(a: __m256, b: __m256) -> __m256 {
    // SAFETY: by contract.
    unsafe {
        _mm256_add_ps(_mm256_shuffle_ps::<0b01_00_01_00>(a, b), _mm256_shuffle_ps::<0b11_10_11_10>(a, b))
    }
}
