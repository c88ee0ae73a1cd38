//! AVX2: eight lanes of 32 bits in a register, a gather for everything that is to be known of a slot.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use crate::block::{Coded, Cursor};
use crate::table::{SLOT_ESCAPE, SLOT_EXPONENT, SLOT_OFFSET};
use crate::{Format, LANES};

/// Lanes of a register.
const WIDTH: usize = 8;

/// Proof that the processor has the instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Proof(());

impl Proof {
    pub(super) fn detect() -> Option<Proof> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("popcnt")).then_some(Proof(()))
    }
}

/// For each set of lanes, the shuffle that hands it successive bytes: lane i gets byte number "members below i"; a byte
/// with its highest bit set gives zero.
static EXPAND: [u64; 256] = {
    let mut table = [0; 256];
    let mut set = 0;
    while set < 256 {
        let (mut lane, mut next) = (0, 0);
        while lane < WIDTH {
            let byte = if set >> lane & 1 == 1 { next } else { 0x80 };
            next += (set >> lane & 1) as u64;
            table[set] |= byte << (8 * lane);
            lane += 1;
        }
        set += 1;
    }
    table
};

/// Decodes as many whole rounds as can be read without leaving the block; returns how many.
pub(super) fn rounds(_proof: Proof, coded: &Coded<'_>, cursor: &mut Cursor, out: &mut [u8]) -> usize {
    match coded.format {
        // SAFETY: the proof exists only where the processor has the instructions.
        Format::Bf16 => unsafe { run::<8, 0>(coded, cursor, out) },
        // SAFETY: as above.
        Format::F16 => unsafe { run::<11, 3>(coded, cursor, out) },
    }
}

/// `RAW` bits below the exponent, `PLANES` of them in planes.
#[target_feature(enable = "avx2,popcnt")]
fn run<const RAW: i32, const PLANES: usize>(coded: &Coded<'_>, cursor: &mut Cursor, out: &mut [u8]) -> usize {
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

    let mut states = [[0u32; WIDTH]; LANES / WIDTH];
    for (state, &stored) in states.as_flattened_mut().iter_mut().zip(&cursor.states) {
        *state = u32::from(stored);
    }
    let (mut code, mut literal) = (cursor.code, cursor.literal);
    let mut done = 0;
    while done < rounds && code <= reach && literal <= reach {
        for (pair, states) in states.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            // SAFETY: `code` and `literal` are at most `reach` + 8 for each earlier group of the round, so 8 bytes can
            // be read, also by the second of the two.
            let first = unsafe { step(coded, &mut states[0], &mut code, &mut literal) };
            // SAFETY: as above.
            let second = unsafe { step(coded, &mut states[1], &mut code, &mut literal) };
            // Packing works in halves of 128 bits; the permutation puts the lanes in order.
            let exponents = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(first, second));
            let value = _mm256_slli_epi16::<RAW>(exponents);

            let element = LANES * done + 2 * WIDTH * pair;
            // SAFETY: the low bytes of all `rounds` are in `data`, as asserted.
            let raw = unsafe { _mm_loadu_si128(data.as_ptr().add(coded.low_at + element).cast()) };
            let mut word = _mm256_or_si256(value, _mm256_cvtepu8_epi16(raw));
            for plane in 0..PLANES {
                let at = coded.planes_at + planes_per_round * done + LANES / 8 * plane + 2 * pair;
                // SAFETY: the planes of all `rounds` are in `data`, as asserted.
                let bits = unsafe { data.as_ptr().add(at).cast::<i16>().read_unaligned() };
                word = _mm256_or_si256(word, spread(bits, 256 << plane));
            }
            let word = _mm256_or_si256(_mm256_srli_epi16::<1>(word), _mm256_slli_epi16::<15>(word));
            // SAFETY: `out` has room for all `rounds`, as asserted.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().add(2 * element).cast(), word) };
        }
        done += 1;
    }
    (cursor.code, cursor.literal) = (code, literal);
    for (&state, kept) in states.as_flattened().iter().zip(&mut cursor.states) {
        *kept = state as u16;
    }
    done
}

/// Sixteen bits as lanes that are `value` or zero, the lowest bit first.
#[target_feature(enable = "avx2")]
fn spread(bits: i16, value: i16) -> __m256i {
    let each = _mm256_setr_epi16(
        1,
        1 << 1,
        1 << 2,
        1 << 3,
        1 << 4,
        1 << 5,
        1 << 6,
        1 << 7,
        1 << 8,
        1 << 9,
        1 << 10,
        1 << 11,
        1 << 12,
        1 << 13,
        1 << 14,
        i16::MIN,
    );
    let set = _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(bits), each), each);
    _mm256_and_si256(set, _mm256_set1_epi16(value))
}

/// Decodes the exponents of eight elements.
///
/// # Safety
/// Eight bytes can be read from `coded.data` at `code` and at `literal`.
#[target_feature(enable = "avx2,popcnt")]
#[inline]
unsafe fn step(
    coded: &Coded<'_>,
    state: &mut [u32; WIDTH],
    code: &mut usize,
    literal: &mut usize,
) -> __m256i {
    let low_byte = _mm256_set1_epi32(255);
    // SAFETY: eight lanes of 32 bits.
    let x = unsafe { _mm256_loadu_si256(state.as_ptr().cast()) };
    let slots = coded.lookups.slot.as_ptr().cast();
    // SAFETY: the indices are below 256, the number of slots.
    let slot = unsafe { _mm256_i32gather_epi32::<4>(slots, _mm256_and_si256(x, low_byte)) };
    // Both factors are below 2¹⁵ and the upper halves of their lanes zero, so the sum of products is the product.
    let frequency = _mm256_and_si256(slot, _mm256_set1_epi32((1 << SLOT_OFFSET) - 1));
    let product = _mm256_madd_epi16(frequency, _mm256_srli_epi32::<8>(x));
    let offset = _mm256_and_si256(_mm256_srli_epi32::<{ SLOT_OFFSET as i32 }>(slot), low_byte);
    let next = _mm256_add_epi32(product, offset);
    let hungry = _mm256_cmpgt_epi32(_mm256_set1_epi32(256), next);
    let set = _mm256_movemask_ps(_mm256_castsi256_ps(hungry));
    // SAFETY: the caller's promise.
    let fresh = unsafe { successive(coded.data.as_ptr().add(*code), set) };
    *code += set.count_ones() as usize;
    let next = _mm256_blendv_epi8(next, _mm256_or_si256(_mm256_slli_epi32::<8>(next), fresh), hungry);
    // SAFETY: eight lanes of 32 bits.
    unsafe { _mm256_storeu_si256(state.as_mut_ptr().cast(), next) };

    let exponents = _mm256_and_si256(_mm256_srli_epi32::<{ SLOT_EXPONENT as i32 }>(slot), low_byte);
    let marks = _mm256_slli_epi32::<{ 31 - SLOT_ESCAPE as i32 }>(slot);
    let set = _mm256_movemask_ps(_mm256_castsi256_ps(marks));
    // SAFETY: the caller's promise.
    let literals = unsafe { successive(coded.data.as_ptr().add(*literal), set) };
    *literal += set.count_ones() as usize;
    // An escape's own exponent is zero, and so are the literals of all other lanes.
    _mm256_or_si256(exponents, literals)
}

/// Hands successive bytes to the lanes of a set; the others get zero.
///
/// # Safety
/// `p` is readable for eight bytes.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn successive(p: *const u8, set: i32) -> __m256i {
    // SAFETY: the caller's promise.
    let bytes = unsafe { _mm_loadl_epi64(p.cast()) };
    let shuffle = _mm_cvtsi64_si128(EXPAND[set as usize & 255] as i64);
    _mm256_cvtepu8_epi32(_mm_shuffle_epi8(bytes, shuffle))
}
