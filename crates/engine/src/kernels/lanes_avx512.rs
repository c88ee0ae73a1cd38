//! [`Lanes`] with sixteen rows by AVX-512, with VNNI where the processor has it (Intel since Cascade Lake, AMD since
//! Zen 4).
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::avx512::Avx512;
use super::lanes::Lanes;
use super::lanes_avx2::{eight_halves, four_words};

/// Proof that this processor has what [`Avx512`] proves, and AVX-512 VNNI if `VNNI`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lanes16<const VNNI: bool>(());

impl Lanes16<false> {
    pub(crate) fn new(_: Avx512) -> Lanes16<false> {
        Lanes16(())
    }
}

impl Lanes16<true> {
    /// The proof, if the processor and the operating system support it.
    pub(crate) fn detect() -> Option<Lanes16<true>> {
        Avx512::detect().filter(|_| is_x86_feature_detected!("avx512vnni")).map(|_| Lanes16(()))
    }
}

/// Sixteen bytes of rows 0, 4, 8 and 12.
///
/// # Safety
/// The processor has AVX-512 F; the bytes are readable.
#[inline(always)]
unsafe fn quartet(p: *const u8, stride: usize) -> __m512i {
    // SAFETY: by contract.
    unsafe {
        let v = _mm512_castsi128_si512(_mm_loadu_si128(p.cast()));
        let v = _mm512_inserti32x4::<1>(v, _mm_loadu_si128(p.add(4 * stride).cast()));
        let v = _mm512_inserti32x4::<2>(v, _mm_loadu_si128(p.add(8 * stride).cast()));
        _mm512_inserti32x4::<3>(v, _mm_loadu_si128(p.add(12 * stride).cast()))
    }
}

/// Four bytes of `x` in every lane.
///
/// # Safety
/// The processor has AVX-512 F; `x` is readable for `4 j + 4` bytes.
#[inline(always)]
unsafe fn broadcast_four(x: *const i8, j: usize) -> __m512i {
    // SAFETY: by contract.
    unsafe { _mm512_set1_epi32(x.add(4 * j).cast::<i32>().read_unaligned()) }
}

// SAFETY (for every block below): a `Lanes16` exists only where `detect` found the instructions; memory operands are
// readable or writable by the contract of the trait, and all loads and stores are the unaligned kind.
impl<const VNNI: bool> Lanes for Lanes16<VNNI> {
    type F = __m512;
    type I = __m512i;
    const ROWS: usize = 16;
    const VECTORS: usize = 2;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    unsafe fn broadcast(self, p: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(p.read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: __m512) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(p, v) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn to_float(self, v: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(v) }
    }

    #[inline(always)]
    fn add_ints(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn sixteen(self, p: *const u8, stride: usize) -> [__m512i; 4] {
        // SAFETY: see above.
        unsafe {
            // Rows `i`, `i + 4`, `i + 8` and `i + 12`; then a transposition of 4 × 4 words within each quarter.
            let (a, b) = (quartet(p, stride), quartet(p.add(stride), stride));
            let (c, d) = (quartet(p.add(2 * stride), stride), quartet(p.add(3 * stride), stride));
            let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
            let (ef, gh) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
            [
                _mm512_unpacklo_epi64(ab, cd),
                _mm512_unpackhi_epi64(ab, cd),
                _mm512_unpacklo_epi64(ef, gh),
                _mm512_unpackhi_epi64(ef, gh),
            ]
        }
    }

    #[inline(always)]
    unsafe fn line(self, p: *const u8, stride: usize) -> [__m512i; 16] {
        // SAFETY: see above.
        unsafe {
            let mut rows = [_mm512_setzero_si512(); 16];
            for (i, row) in rows.iter_mut().enumerate() {
                *row = _mm512_loadu_si512(p.add(i * stride).cast());
            }
            // Of every four rows, words 4 q + m in quarter q of vector m.
            for four in rows.as_chunks_mut::<4>().0 {
                let [a, b, c, d] = *four;
                let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
                let (ef, gh) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
                *four = [
                    _mm512_unpacklo_epi64(ab, cd),
                    _mm512_unpackhi_epi64(ab, cd),
                    _mm512_unpacklo_epi64(ef, gh),
                    _mm512_unpackhi_epi64(ef, gh),
                ];
            }
            // Then a transposition of quarters.
            let mut words = rows;
            for m in 0..4 {
                let (a, b, c, d) = (rows[m], rows[4 + m], rows[8 + m], rows[12 + m]);
                let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
                let (even2, odd2) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
                words[m] = _mm512_shuffle_i32x4::<0x88>(even, even2);
                words[8 + m] = _mm512_shuffle_i32x4::<0xdd>(even, even2);
                words[4 + m] = _mm512_shuffle_i32x4::<0x88>(odd, odd2);
                words[12 + m] = _mm512_shuffle_i32x4::<0xdd>(odd, odd2);
            }
            words
        }
    }

    #[inline(always)]
    unsafe fn four(self, p: *const u8, stride: usize) -> __m512i {
        // SAFETY: see above.
        unsafe {
            let v = _mm512_castsi128_si512(four_words(p, stride));
            let v = _mm512_inserti32x4::<1>(v, four_words(p.add(4 * stride), stride));
            let v = _mm512_inserti32x4::<2>(v, four_words(p.add(8 * stride), stride));
            _mm512_inserti32x4::<3>(v, four_words(p.add(12 * stride), stride))
        }
    }

    #[inline(always)]
    unsafe fn half(self, p: *const u8, stride: usize) -> __m512 {
        // SAFETY: see above.
        unsafe {
            _mm512_cvtph_ps(_mm256_set_m128i(
                eight_halves(p.add(8 * stride), stride),
                eight_halves(p, stride),
            ))
        }
    }

    #[inline(always)]
    fn lower_half(self, v: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)) }
    }

    #[inline(always)]
    fn upper_half(self, v: __m512i) -> __m512 {
        // SAFETY: see above.
        self.lower_half(unsafe { _mm512_srli_epi32::<16>(v) })
    }

    #[inline(always)]
    fn lower_bf16(self, v: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(v)) }
    }

    #[inline(always)]
    fn upper_bf16(self, v: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(0xffff_0000_u32 as i32))) }
    }

    #[inline(always)]
    fn bits(self, v: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(v) }
    }

    #[inline(always)]
    fn field(self, v: __m512i, shift: u32, mask: u32) -> __m512i {
        // SAFETY: see above.
        unsafe {
            let shifted = _mm512_srl_epi32(v, _mm_cvtsi32_si128(shift as i32));
            _mm512_and_si512(shifted, _mm512_set1_epi32(mask as i32))
        }
    }

    #[inline(always)]
    fn raise(self, a: __m512i, b: __m512i, mask: u32, shift: u32) -> __m512i {
        // SAFETY: see above.
        unsafe {
            let masked = _mm512_and_si512(b, _mm512_set1_epi32(mask as i32));
            _mm512_or_si512(a, _mm512_sll_epi32(masked, _mm_cvtsi32_si128(shift as i32)))
        }
    }

    #[inline(always)]
    fn flip(self, v: __m512i, bits: u32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_xor_si512(v, _mm512_set1_epi32(bits as i32)) }
    }

    #[inline(always)]
    fn signed_byte(self, v: __m512i, shift: u32) -> __m512i {
        // SAFETY: see above.
        unsafe {
            let top = _mm512_sll_epi32(v, _mm_cvtsi32_si128(24 - shift as i32));
            _mm512_srai_epi32::<24>(top)
        }
    }

    #[inline(always)]
    fn fifth_bits(self, v: __m512i, j: u32) -> __m512i {
        // SAFETY: see above.
        unsafe {
            // The products of four bits with the factor do not touch, and bit i lands on bit 8 i + 4.
            let spread = _mm512_mullo_epi32(self.field(v, 4 * j, 15), _mm512_set1_epi32(0x0204_0810));
            _mm512_and_si512(spread, _mm512_set1_epi32(0x1010_1010))
        }
    }

    #[inline(always)]
    fn lookup(self, table: &[u8; 16], v: __m512i) -> __m512i {
        // SAFETY: see above; the table has 16 bytes.
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, v)
        }
    }

    #[inline(always)]
    fn ready<const BITS: u32>(self, weights: [__m512i; 8]) -> [__m512i; 8] {
        if VNNI || BITS < 8 {
            return weights;
        }
        // Signed, for what `dot` does with them.
        let mut signed = weights;
        for weight in &mut signed {
            *weight = self.flip(*weight, 0x8080_8080);
        }
        signed
    }

    #[inline(always)]
    unsafe fn dot<const BITS: u32>(
        self,
        weights: &[__m512i; 8],
        x: *const i8,
        sum: *const i32,
    ) -> [__m512i; 2] {
        // Without VNNI as in `lanes_avx2`.
        // SAFETY: see above.
        unsafe {
            let mut sums = [_mm512_setzero_si512(); 2];
            if VNNI {
                for (j, &weight) in weights.iter().enumerate() {
                    sums[j / 4] = _mm512_dpbusd_epi32(sums[j / 4], weight, broadcast_four(x, j));
                }
                return sums;
            }
            if BITS == 8 {
                sums[0] = _mm512_slli_epi32::<7>(_mm512_set1_epi32(sum.read_unaligned()));
            }
            let ones = _mm512_set1_epi16(1);
            for (j, &weight) in weights.iter().enumerate() {
                let x = broadcast_four(x, j);
                let products = if BITS == 8 {
                    let negative = _mm512_movepi8_mask(weight);
                    let x = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
                    _mm512_maddubs_epi16(_mm512_abs_epi8(weight), x)
                } else {
                    _mm512_maddubs_epi16(weight, x)
                };
                sums[j / 4] = _mm512_add_epi32(sums[j / 4], _mm512_madd_epi16(products, ones));
            }
            sums
        }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: see above; a prefetch of an invalid address does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
}
