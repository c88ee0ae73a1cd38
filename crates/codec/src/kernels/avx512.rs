//! AVX-512 with VBMI2 (Ice Lake, Zen 4 and newer): 32 lanes of 16 bits in a register, all tables in registers, no
//! gathers and no branch that depends on the data.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use crate::block::{Coded, Cursor};
use crate::{Format, LANES};

/// Lanes of a register.
const WIDTH: usize = 32;

/// Proof that the processor has the instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Proof(());

impl Proof {
    pub(super) fn detect() -> Option<Proof> {
        let there = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx512vbmi2")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("popcnt");
        there.then_some(Proof(()))
    }
}

/// Decodes as many whole rounds as can be read without leaving the block; returns how many.
pub(super) fn rounds(_proof: Proof, coded: &Coded<'_>, cursor: &mut Cursor, out: &mut [u8]) -> usize {
    match coded.format {
        // SAFETY: the proof exists only where the processor has the instructions.
        Format::Bf16 => unsafe { run::<8, 0>(coded, cursor, out) },
        // SAFETY: as above.
        Format::F16 => unsafe { run::<11, 3>(coded, cursor, out) },
    }
}

/// Sixteen- or eight-bit table entries as a vector.
#[target_feature(enable = "avx512f")]
fn table<T: Copy, const N: usize>(entries: &[T; N]) -> __m512i {
    const { assert!(size_of::<T>() * N == 64) };
    // SAFETY: the array has 64 bytes.
    unsafe { _mm512_loadu_si512(entries.as_ptr().cast()) }
}

/// `RAW` bits below the exponent, `PLANES` of them in planes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,popcnt")]
fn run<const RAW: u32, const PLANES: usize>(coded: &Coded<'_>, cursor: &mut Cursor, out: &mut [u8]) -> usize {
    let data = coded.data;
    // A round takes at most a byte per lane from the coders' bytes and from the escaped exponents, and what it loads
    // beyond what it takes is inside the same limit. Wandering out of its own part is found at the block's end.
    let Some(reach) = data.len().checked_sub(LANES) else { return 0 };
    let rounds = coded.elements / LANES;
    let planes_per_round = PLANES * LANES / 8;
    assert!(
        out.len() >= 2 * LANES * rounds
            && data.len() >= coded.low_at + LANES * rounds
            && data.len() >= coded.planes_at + planes_per_round * rounds
    );

    let lookups = &coded.lookups;
    let (quarters, _) = lookups.symbol.as_chunks::<64>();
    let [s0, s1, s2, s3] = quarters else { return 0 };
    let (s0, s1, s2, s3) = (table(s0), table(s1), table(s2), table(s3));
    let (frequencies, starts, values) =
        (table(&lookups.frequency), table(&lookups.start), table(&lookups.value));
    let (one, upper_half, low_byte, limit) =
        (_mm512_set1_epi16(1), _mm512_set1_epi16(128), _mm512_set1_epi16(255), _mm512_set1_epi16(256));

    let mut states = [_mm512_setzero_si512(); LANES / WIDTH];
    for (state, stored) in states.iter_mut().zip(cursor.states.as_chunks::<WIDTH>().0) {
        *state = table(stored);
    }
    let (mut code, mut literal) = (cursor.code, cursor.literal);
    let mut done = 0;
    while done < rounds && code <= reach && literal <= reach {
        for (group, state) in states.iter_mut().enumerate() {
            let x = *state;
            // The symbol of slot x mod 256. Lookups by byte take the lowest seven bits of an index, those by word the
            // lowest five, so nothing needs to be cleared in between.
            let low = _mm512_permutex2var_epi8(s0, x, s1);
            let high = _mm512_permutex2var_epi8(s2, x, s3);
            let symbol = _mm512_mask_blend_epi16(_mm512_test_epi16_mask(x, upper_half), low, high);
            let frequency = _mm512_permutexvar_epi16(symbol, frequencies);
            let start = _mm512_permutexvar_epi16(symbol, starts);
            let mut value = _mm512_permutexvar_epi16(symbol, values);
            // x := frequency · (x div 256) + x mod 256 − start, and a byte more where that is below 256.
            let product = _mm512_mullo_epi16(frequency, _mm512_srli_epi16::<8>(x));
            let offset = _mm512_sub_epi16(_mm512_and_si512(x, low_byte), start);
            let next = _mm512_add_epi16(product, offset);
            let hungry = _mm512_cmplt_epu16_mask(next, limit);
            // SAFETY: `code` is at most `reach` + 32 for each earlier group of the round, so 32 bytes can be read.
            let fresh = unsafe { load_bytes(data.as_ptr().add(code)) };
            let shifted = _mm512_mask_slli_epi16::<8>(next, hungry, next);
            *state = _mm512_or_si512(shifted, _mm512_maskz_expand_epi16(hungry, fresh));
            code += hungry.count_ones() as usize;

            let escaped = _mm512_test_epi16_mask(value, one);
            // SAFETY: as for `code`.
            let literals = unsafe { load_bytes(data.as_ptr().add(literal)) };
            value = _mm512_mask_expand_epi16(value, escaped, _mm512_slli_epi16::<RAW>(literals));
            literal += escaped.count_ones() as usize;

            let element = LANES * done + WIDTH * group;
            // SAFETY: the low bytes of all `rounds` are in `data`, as asserted.
            let raw = unsafe { load_bytes(data.as_ptr().add(coded.low_at + element)) };
            let mut word = _mm512_or_si512(value, raw);
            for plane in 0..PLANES {
                let at = coded.planes_at + planes_per_round * done + LANES / 8 * plane + WIDTH / 8 * group;
                // SAFETY: the planes of all `rounds` are in `data`, as asserted.
                let bits = unsafe { data.as_ptr().add(at).cast::<u32>().read_unaligned() };
                // The bit is clear in every lane, so adding sets it.
                word = _mm512_mask_add_epi16(word, bits, word, _mm512_set1_epi16(256 << plane));
            }
            let word = _mm512_shrdi_epi16::<1>(word, word);
            // SAFETY: `out` has room for all `rounds`, as asserted.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().add(2 * element).cast(), word) };
        }
        done += 1;
    }
    (cursor.code, cursor.literal) = (code, literal);
    for (state, kept) in states.iter().zip(cursor.states.as_chunks_mut::<WIDTH>().0) {
        // SAFETY: 32 lanes of 16 bits are 64 bytes.
        unsafe { _mm512_storeu_si512(kept.as_mut_ptr().cast(), *state) };
    }
    done
}

/// 32 bytes, widened.
///
/// # Safety
/// `p` is readable for 32 bytes.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load_bytes(p: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_cvtepu8_epi16(unsafe { _mm256_loadu_si256(p.cast()) })
}
