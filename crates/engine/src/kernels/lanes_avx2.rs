//! [`Lanes`] with eight rows: products by AVX2, or by AVX-VNNI where the processor has it (Intel since Alder Lake,
//! AMD since Zen 5).
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::avx2::Avx2;
use super::lanes::Lanes;

/// Eight rows, with the byte products of AVX2.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lanes8(Avx2);

/// Proof that this processor has AVX-VNNI, and all that [`Avx2`] proves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lanes8Vnni(Lanes8);

impl Lanes8 {
    pub(crate) fn new(proof: Avx2) -> Lanes8 {
        Lanes8(proof)
    }
}

impl Lanes8Vnni {
    /// The proof, if the processor and the operating system support it.
    pub(crate) fn detect() -> Option<Lanes8Vnni> {
        Avx2::detect().filter(|_| is_x86_feature_detected!("avxvnni")).map(|proof| Lanes8Vnni(Lanes8(proof)))
    }
}

/// The methods in which the two do not differ.
macro_rules! shared {
    () => {
        type F = __m256;
        type I = __m256i;
        const ROWS: usize = 8;

        #[inline(always)]
        fn splat(self, x: f32) -> __m256 {
            // SAFETY: see below.
            unsafe { _mm256_set1_ps(x) }
        }

        #[inline(always)]
        unsafe fn broadcast(self, p: *const f32) -> __m256 {
            // SAFETY: see below.
            unsafe { _mm256_set1_ps(p.read_unaligned()) }
        }

        #[inline(always)]
        unsafe fn load(self, p: *const f32) -> __m256 {
            // SAFETY: see below.
            unsafe { _mm256_loadu_ps(p) }
        }

        #[inline(always)]
        unsafe fn store(self, p: *mut f32, v: __m256) {
            // SAFETY: see below.
            unsafe { _mm256_storeu_ps(p, v) }
        }

        #[inline(always)]
        fn mul(self, a: __m256, b: __m256) -> __m256 {
            // SAFETY: see below.
            unsafe { _mm256_mul_ps(a, b) }
        }

        #[inline(always)]
        fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: see below.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        fn to_float(self, v: __m256i) -> __m256 {
            // SAFETY: see below.
            unsafe { _mm256_cvtepi32_ps(v) }
        }

        #[inline(always)]
        fn add_ints(self, a: __m256i, b: __m256i) -> __m256i {
            // SAFETY: see below.
            unsafe { _mm256_add_epi32(a, b) }
        }

        #[inline(always)]
        unsafe fn sixteen(self, p: *const u8, stride: usize) -> [__m256i; 4] {
            // SAFETY: see below.
            unsafe {
                // Rows `i` and `i + 4`; then a transposition of 4 × 4 words within each half.
                let (a, b) = (pair(p, stride), pair(p.add(stride), stride));
                let (c, d) = (pair(p.add(2 * stride), stride), pair(p.add(3 * stride), stride));
                let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
                let (ef, gh) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
                [
                    _mm256_unpacklo_epi64(ab, cd),
                    _mm256_unpackhi_epi64(ab, cd),
                    _mm256_unpacklo_epi64(ef, gh),
                    _mm256_unpackhi_epi64(ef, gh),
                ]
            }
        }

        #[inline(always)]
        unsafe fn four(self, p: *const u8, stride: usize) -> __m256i {
            // SAFETY: see below.
            unsafe { _mm256_set_m128i(four_words(p.add(4 * stride), stride), four_words(p, stride)) }
        }

        #[inline(always)]
        unsafe fn half(self, p: *const u8, stride: usize) -> __m256 {
            // SAFETY: see below.
            unsafe { _mm256_cvtph_ps(eight_halves(p, stride)) }
        }

        #[inline(always)]
        fn lower_half(self, v: __m256i) -> __m256 {
            // SAFETY: see below.
            unsafe {
                let halves = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
                let packed = _mm256_packus_epi32(halves, halves);
                let packed = _mm256_permute4x64_epi64::<0b10_00>(packed);
                _mm256_cvtph_ps(_mm256_castsi256_si128(packed))
            }
        }

        #[inline(always)]
        fn upper_half(self, v: __m256i) -> __m256 {
            // SAFETY: see below.
            self.lower_half(unsafe { _mm256_srli_epi32::<16>(v) })
        }

        #[inline(always)]
        fn lower_bf16(self, v: __m256i) -> __m256 {
            // SAFETY: see below.
            unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(v)) }
        }

        #[inline(always)]
        fn upper_bf16(self, v: __m256i) -> __m256 {
            // SAFETY: see below.
            unsafe { _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(0xffff_0000_u32 as i32))) }
        }

        #[inline(always)]
        fn bits(self, v: __m256i) -> __m256 {
            // SAFETY: see below.
            unsafe { _mm256_castsi256_ps(v) }
        }

        #[inline(always)]
        fn field(self, v: __m256i, shift: u32, mask: u32) -> __m256i {
            // SAFETY: see below.
            unsafe {
                let shifted = _mm256_srl_epi32(v, _mm_cvtsi32_si128(shift as i32));
                _mm256_and_si256(shifted, _mm256_set1_epi32(mask as i32))
            }
        }

        #[inline(always)]
        fn raise(self, a: __m256i, b: __m256i, mask: u32, shift: u32) -> __m256i {
            // SAFETY: see below.
            unsafe {
                let masked = _mm256_and_si256(b, _mm256_set1_epi32(mask as i32));
                _mm256_or_si256(a, _mm256_sll_epi32(masked, _mm_cvtsi32_si128(shift as i32)))
            }
        }

        #[inline(always)]
        fn flip(self, v: __m256i, bits: u32) -> __m256i {
            // SAFETY: see below.
            unsafe { _mm256_xor_si256(v, _mm256_set1_epi32(bits as i32)) }
        }

        #[inline(always)]
        fn signed_byte(self, v: __m256i, shift: u32) -> __m256i {
            // SAFETY: see below.
            unsafe {
                let top = _mm256_sll_epi32(v, _mm_cvtsi32_si128(24 - shift as i32));
                _mm256_srai_epi32::<24>(top)
            }
        }

        #[inline(always)]
        fn fifth_bits(self, v: __m256i, j: u32) -> __m256i {
            // SAFETY: see below.
            unsafe {
                // The products of four bits with the factor do not touch, and bit i lands on bit 8 i + 4.
                let spread = _mm256_mullo_epi32(self.field(v, 4 * j, 15), _mm256_set1_epi32(0x0204_0810));
                _mm256_and_si256(spread, _mm256_set1_epi32(0x1010_1010))
            }
        }

        #[inline(always)]
        fn lookup(self, table: &[u8; 16], v: __m256i) -> __m256i {
            // SAFETY: see below; the table has 16 bytes.
            unsafe {
                let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
                _mm256_shuffle_epi8(table, v)
            }
        }

        #[inline(always)]
        fn prefetch(self, p: *const u8) {
            // SAFETY: see below; a prefetch of an invalid address does nothing.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
    };
}

/// Sixteen bytes of rows 0 and 4.
///
/// # Safety
/// The processor has AVX2; the bytes are readable.
#[inline(always)]
unsafe fn pair(p: *const u8, stride: usize) -> __m256i {
    // SAFETY: by contract.
    unsafe {
        let low = _mm256_castsi128_si256(_mm_loadu_si128(p.cast()));
        _mm256_inserti128_si256::<1>(low, _mm_loadu_si128(p.add(4 * stride).cast()))
    }
}

/// A word of each of four rows.
///
/// # Safety
/// Four bytes are readable at `p + row · stride` for each row.
#[inline(always)]
pub(super) unsafe fn four_words(p: *const u8, stride: usize) -> __m128i {
    let mut words = [0; 4];
    for (row, word) in words.iter_mut().enumerate() {
        // SAFETY: by contract.
        *word = unsafe { p.add(row * stride).cast::<i32>().read_unaligned() };
    }
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { _mm_setr_epi32(words[0], words[1], words[2], words[3]) }
}

/// Two bytes of each of eight rows.
///
/// # Safety
/// Two bytes are readable at `p + row · stride` for each row.
#[inline(always)]
pub(super) unsafe fn eight_halves(p: *const u8, stride: usize) -> __m128i {
    let mut v = [0; 8];
    for (row, half) in v.iter_mut().enumerate() {
        // SAFETY: by contract.
        *half = unsafe { p.add(row * stride).cast::<i16>().read_unaligned() };
    }
    // SAFETY: every x86-64 processor has the instruction.
    unsafe { _mm_setr_epi16(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]) }
}

/// Four bytes of `x` in every lane.
///
/// # Safety
/// The processor has AVX2; `x` is readable for `4 j + 4` bytes.
#[inline(always)]
unsafe fn broadcast_four(x: *const i8, j: usize) -> __m256i {
    // SAFETY: by contract.
    unsafe { _mm256_set1_epi32(x.add(4 * j).cast::<i32>().read_unaligned()) }
}

// SAFETY (for every block below and in `shared`): the tokens exist only where `detect` found the instructions; memory
// operands are readable or writable by the contract of the trait, and all loads and stores are the unaligned kind.
impl Lanes for Lanes8 {
    shared!();

    #[inline(always)]
    fn ready<const BITS: u32>(self, weights: [__m256i; 8]) -> [__m256i; 8] {
        if BITS < 8 {
            return weights;
        }
        // Signed, for what `dot` does with them.
        let mut signed = weights;
        for weight in &mut signed {
            // SAFETY: see above.
            *weight = unsafe { _mm256_xor_si256(*weight, _mm256_set1_epi8(-128)) };
        }
        signed
    }

    #[inline(always)]
    unsafe fn dot<const BITS: u32>(
        self,
        weights: &[__m256i; 8],
        x: *const i8,
        sum: *const i32,
    ) -> [__m256i; 2] {
        // The instruction adds two products of an unsigned and a signed byte in 16 bits. With weights below
        // 2^BITS, 2^(7 − BITS) such sums fit together. Weights of eight bits are made signed, and their sign is moved
        // to x: 2 · 128 · 127 fits; what that takes away, 128 times the sum of x, comes back at the start.
        // SAFETY: see above.
        unsafe {
            let mut sums = [_mm256_setzero_si256(); 2];
            if BITS == 8 {
                sums[0] = _mm256_slli_epi32::<7>(_mm256_set1_epi32(sum.read_unaligned()));
            }
            let ones = _mm256_set1_epi16(1);
            let together = if BITS == 8 { 1 } else { 1 << (7 - BITS).min(2) };
            for j in (0..8).step_by(together) {
                let mut pairs = _mm256_setzero_si256();
                for (k, &w) in weights.iter().enumerate().skip(j).take(together) {
                    let x = broadcast_four(x, k);
                    let products = if BITS == 8 {
                        _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
                    } else {
                        _mm256_maddubs_epi16(w, x)
                    };
                    pairs = _mm256_add_epi16(pairs, products);
                }
                sums[j / 4] = _mm256_add_epi32(sums[j / 4], _mm256_madd_epi16(pairs, ones));
            }
            sums
        }
    }
}

impl Lanes for Lanes8Vnni {
    shared!();

    #[inline(always)]
    fn ready<const BITS: u32>(self, weights: [__m256i; 8]) -> [__m256i; 8] {
        weights
    }

    #[inline(always)]
    unsafe fn dot<const BITS: u32>(
        self,
        weights: &[__m256i; 8],
        x: *const i8,
        _: *const i32,
    ) -> [__m256i; 2] {
        // SAFETY: see above.
        unsafe {
            let mut sums = [_mm256_setzero_si256(); 2];
            for j in 0..8 {
                sums[j / 4] = _mm256_dpbusd_avx_epi32(sums[j / 4], weights[j], broadcast_four(x, j));
            }
            sums
        }
    }
}
