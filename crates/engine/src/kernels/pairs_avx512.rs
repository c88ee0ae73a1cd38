//! The kernels of `pairs` for AVX-512 with VNNI.
#![allow(unsafe_code)]

use std::arch::asm;
use std::arch::x86_64::*;

use super::pairs::{GROUP, GROUP_ELEMENTS, HUGE_WEIGHT, LANES, Places, QUAD, SEGMENT};
use super::panels::{MOST_ROWS, Task};

/// Vectors of 32 columns that a group has.
const VECTORS: usize = GROUP / 32;
/// Groups of four rows of a panel.
const QUADS: usize = MOST_ROWS / QUAD;
/// Tokens that pass by together: so many sums of four rows fit the registers, as integers and as numbers.
const TOKENS: usize = 3;
/// How many bytes ahead a single token asks for its weights, which it reads from front to back.
const BYTES_AHEAD: usize = 4096;

/// `sums + a · b`, where lanes are pairs of 16-bit integers. As an instruction of its own: compilers take the intrinsic
/// apart into a multiplication and an addition, which is shorter to wait for and slower when nobody waits.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_pairs(mut sums: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the instruction reads and writes registers only.
    unsafe {
        asm!(
            "vpdpwssd {}, {}, {}", inout(zmm_reg) sums, in(zmm_reg) a, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// The sums over the lanes of four vectors.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn add_lanes([a, b, c, d]: [__m512; QUAD]) -> __m128 {
    let ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    let cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    let low = _mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd));
    let high = _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd));
    let quarters = _mm512_add_ps(low, high);
    let halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps::<1>(quarters));
    _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves))
}

/// A group of weights of one row, or as many vectors as the last group has.
struct Integers<const V: usize> {
    weights: [__m512i; V],
    /// 103 more than the biased exponent of the group's largest, where an f32 has its exponent.
    factor: __m512i,
    /// Twice the magnitude of the group's largest, in the first lane.
    largest: __m128i,
}

/// Makes integers of bf16 weights.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
fn integers<const V: usize>(stored: [__m512i; V]) -> Integers<V> {
    // Without their signs, numbers are ordered as integers are.
    let mut largest = _mm512_add_epi16(stored[0], stored[0]);
    for &stored in &stored[1..] {
        largest = _mm512_max_epu16(largest, _mm512_add_epi16(stored, stored));
    }
    let largest = _mm256_max_epu16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64::<1>(largest));
    let largest = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256::<1>(largest));
    let ones = _mm_set1_epi32(-1);
    let largest = _mm_xor_si128(_mm_minpos_epu16(_mm_xor_si128(largest, ones)), ones);
    let exponent = _mm512_srli_epi16::<8>(_mm512_broadcastw_epi16(largest));
    // Below, the scale would be infinite.
    let exponent = _mm512_max_epu16(exponent, _mm512_set1_epi16(13));
    // Brings the exponent of the largest to 2¹¹: 127 + 11 + 127.
    let scale = _mm512_sub_epi32(_mm512_set1_epi32(265 << 23), _mm512_slli_epi32::<23>(exponent));
    let scale = _mm512_castsi512_ps(scale);
    // Added to a number, it leaves the nearest integer in the lower bits.
    let magic = _mm512_set1_ps(12_582_912.0);
    let mut weights = stored;
    for weights in &mut weights {
        let even = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(*weights));
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        let odd = _mm512_castsi512_ps(_mm512_and_si512(*weights, upper));
        let even = _mm512_castps_si512(_mm512_fmadd_ps(even, scale, magic));
        let odd = _mm512_castps_si512(_mm512_fmadd_ps(odd, scale, magic));
        *weights = _mm512_mask_blend_epi16(0x5555_5555, _mm512_slli_epi32::<16>(odd), even);
    }
    let factor = _mm512_slli_epi32::<23>(_mm512_add_epi16(exponent, _mm512_set1_epi16(103)));
    Integers { weights, factor, largest }
}

/// The product of the factors of weights and activations: exponents subtracted, or 0.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn factor(weights: __m512i, activations: __m512i) -> __m512 {
    _mm512_castsi512_ps(_mm512_subs_epu16(weights, activations))
}

/// Whether a weight is too large to be an integer, by the largest of [`Integers`].
#[inline]
#[target_feature(enable = "avx512f")]
fn is_huge(largest: __m128i) -> bool {
    _mm_cvtsi128_si32(largest) as u32 & 0xffff >= HUGE_WEIGHT << 8
}

/// `columns` stored weights, at most `V` vectors, with zeros after them.
///
/// # Safety
/// `columns` weights are readable.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load<const V: usize>(p: *const u8, columns: usize) -> [__m512i; V] {
    let mut stored = [_mm512_setzero_si512(); V];
    for (v, stored) in stored.iter_mut().enumerate() {
        // SAFETY: all vectors are inside the weights if they are whole; a masked load reads no more than it says.
        *stored = unsafe {
            if columns == V * 32 {
                _mm512_loadu_si512(p.add(64 * v).cast())
            } else {
                let count = columns.saturating_sub(32 * v).min(32);
                _mm512_maskz_loadu_epi16(((1u64 << count) - 1) as u32, p.wrapping_add(64 * v).cast())
            }
        };
    }
    stored
}

/// Asks for the cache lines of a group of weights, which may be anywhere.
#[inline]
#[target_feature(enable = "avx512f")]
fn ask_for(p: *const u8) {
    for v in 0..VECTORS {
        _mm_prefetch::<_MM_HINT_T0>(p.wrapping_add(64 * v).cast());
    }
}

/// See `pairs::pack_group`.
///
/// # Safety
/// The processor has the instructions; `x` has at most [`GROUP`] elements, `to` is writable for [`GROUP`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub(super) unsafe fn pack_group(x: &[f32], to: *mut i16) -> u32 {
    let mut numbers = [_mm512_setzero_ps(); GROUP / LANES];
    let mut largest = _mm512_setzero_si512();
    for (v, numbers) in numbers.iter_mut().enumerate() {
        let count = x.len().saturating_sub(LANES * v).min(LANES);
        // SAFETY: a masked load reads no more than it says.
        *numbers = unsafe {
            _mm512_maskz_loadu_ps(((1u32 << count) - 1) as u16, x.as_ptr().wrapping_add(LANES * v))
        };
        largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(*numbers)));
    }
    // Below, the scale would be infinite.
    let exponent = (_mm512_reduce_max_epu32(largest) >> 23).max(14);
    // Brings the exponent of the largest to 2¹⁴: 127 + 14 + 127.
    let scale = _mm512_set1_ps(f32::from_bits((268 - exponent) << 23));
    for (v, &numbers) in numbers.iter().enumerate() {
        let integers = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(numbers, scale)));
        // SAFETY: by contract.
        unsafe { _mm256_storeu_si256(to.add(LANES * v).cast(), integers) };
    }
    exponent
}

/// See `Task::run_pairs`.
///
/// # Safety
/// The processor has the instructions; the task's rows have `columns` bf16 weights, its activations are those that `pack`
/// makes, and no other thread touches these rows of these tokens in `out`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
pub(super) unsafe fn run(mut task: Task<'_>, columns: usize) {
    let (rows, tokens) = (task.rows.len(), task.tokens.len());
    let places = Places::new(columns, tokens);
    let scratch = std::mem::take(&mut task.scratch);
    let (integers, scratch) = scratch.split_at_mut(SEGMENT * QUAD * GROUP_ELEMENTS);
    let (factors, scratch) = scratch.split_at_mut(SEGMENT * QUAD);
    let (sums, unfinished) = scratch.split_at_mut(tokens * MOST_ROWS);
    assert!(places.groups <= SEGMENT || unfinished.len() >= tokens * MOST_ROWS * LANES);
    for first in (0..rows).step_by(MOST_ROWS) {
        let count = MOST_ROWS.min(rows - first);
        // Behind the last row, it comes again.
        let row = |row: usize| (first + row).min(rows - 1) * task.row_bytes;
        let weights =
            |quad: usize| [0, 1, 2, 3].map(|r| task.weight.as_ptr().wrapping_add(row(quad * QUAD + r)));
        let x = task.x.as_ptr();
        let mut largest = [[_mm_setzero_si128(); QUAD]; QUADS];
        // A segment of all rows before the next: so long its activations stay in the second-level cache.
        let segments = if tokens == 1 { 1 } else { places.groups.div_ceil(SEGMENT) };
        for segment in 0..segments {
            for (quad, largest) in largest.iter_mut().enumerate().take(count.div_ceil(QUAD)) {
                let sums = sums[quad * QUAD..].as_mut_ptr();
                // SAFETY: rows and activations by contract; sums are `[token][MOST_ROWS]`, from this quad's on; the
                // scratch memory was just cut to size.
                unsafe {
                    if tokens == 1 {
                        single(weights(quad), columns, places, x, sums, largest);
                        continue;
                    }
                    let scratch = Scratch {
                        integers: integers.as_mut_ptr().cast(),
                        factors: factors.as_mut_ptr().cast(),
                        unfinished: unfinished.as_mut_ptr().wrapping_add(quad * tokens * QUAD * LANES),
                    };
                    several(weights(quad), columns, segment * SEGMENT, places, x, sums, scratch, largest);
                }
                if segment + 1 == segments && quad == 0 && tokens > MOST_ROWS {
                    task.ask_for_out(first, count);
                }
            }
        }
        for (row, &largest) in largest.as_flattened().iter().enumerate() {
            if is_huge(largest) {
                sums.iter_mut().skip(row).step_by(MOST_ROWS).for_each(|sum| *sum = f32::NAN);
            }
        }
        task.finish(first, count, &sums[..tokens * MOST_ROWS], MOST_ROWS);
    }
}

/// The products of four rows with a single token, one row after the other: memory is read from front to back.
///
/// # Safety
/// `columns` weights are readable from each of `weights`, the activations that `places` says from `x`; `sums` is writable
/// for four.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
unsafe fn single(
    weights: [*const u8; QUAD],
    columns: usize,
    places: Places,
    x: *const f32,
    sums: *mut f32,
    largest: &mut [__m128i; QUAD],
) {
    let mut rows = [_mm512_setzero_ps(); QUAD];
    // SAFETY: groups are inside the rows, and the activations of a single token's groups follow each other.
    unsafe {
        let (factors, mark) = (x.add(places.factors(0)), _mm512_set1_ps(*x.add(places.mark(0))));
        for (r, row) in rows.iter_mut().enumerate() {
            *row = mark;
            for group in 0..places.groups {
                let p = weights[r].add(group * GROUP * 2);
                ask_for(p.wrapping_add(BYTES_AHEAD));
                let (x, factors) = (x.add(group * GROUP_ELEMENTS), factors.add(group));
                let columns = GROUP.min(columns - group * GROUP);
                *row = if columns > GROUP / 2 {
                    add_group::<VECTORS>(p, columns, x, factors, *row, &mut largest[r])
                } else {
                    add_group::<{ VECTORS / 2 }>(p, columns, x, factors, *row, &mut largest[r])
                };
            }
        }
        _mm_storeu_ps(sums, add_lanes(rows));
    }
}

/// Adds the products of a group of a row with a single token.
///
/// # Safety
/// `columns` weights, at most `V` vectors, are readable, and the activations of the group and their factor.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
unsafe fn add_group<const V: usize>(
    p: *const u8,
    columns: usize,
    x: *const f32,
    activations: *const f32,
    row: __m512,
    largest: &mut __m128i,
) -> __m512 {
    // SAFETY: by contract.
    unsafe {
        let group = integers(load::<V>(p, columns));
        let mut products = [_mm512_setzero_si512(); 2];
        for (v, &weights) in group.weights.iter().enumerate() {
            let x = _mm512_loadu_si512(x.add(LANES * v).cast());
            products[v % 2] = add_pairs(products[v % 2], weights, x);
        }
        *largest = _mm_max_epu16(*largest, group.largest);
        let product = _mm512_cvtepi32_ps(_mm512_add_epi32(products[0], products[1]));
        let activations = _mm512_set1_epi32(activations.cast::<i32>().read());
        _mm512_fmadd_ps(product, factor(group.factor, activations), row)
    }
}

/// Memory of a thread for what [`several`] keeps between its loops.
#[derive(Clone, Copy)]
struct Scratch {
    /// `[group of the segment][vector][row][32]`.
    integers: *mut i16,
    /// `[group of the segment][row]`.
    factors: *mut i32,
    /// `[token][row][LANES]` of these four rows; not used by matrices of a single segment.
    unfinished: *mut f32,
}

/// The products of the segment of four rows that begins with group `first` with some tokens: its weights become integers
/// once, and all tokens pass by.
///
/// # Safety
/// `columns` weights are readable from each of `weights`, the activations that `places` says from `x`; `sums` is writable
/// for four of every [`MOST_ROWS`] up to the last token; `scratch` is as large as it says, and the segments before have
/// been multiplied with it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
#[expect(clippy::too_many_arguments, reason = "a kernel's operands")]
unsafe fn several(
    weights: [*const u8; QUAD],
    columns: usize,
    first: usize,
    places: Places,
    x: *const f32,
    sums: *mut f32,
    scratch: Scratch,
    largest: &mut [__m128i; QUAD],
) {
    for group in 0..places.segment(first) {
        for (r, largest) in largest.iter_mut().enumerate() {
            let column = (first + group) * GROUP;
            // SAFETY: the group is inside the row, its place inside the scratch memory.
            unsafe {
                let p = weights[r].add(column * 2);
                // The next four rows.
                ask_for(p.wrapping_add(QUAD * columns * 2));
                let factor = scratch.factors.add(group * QUAD + r);
                let to = scratch.integers.add((group * VECTORS * QUAD + r) * 32);
                let columns = GROUP.min(columns - column);
                let group_largest = if columns > GROUP / 2 {
                    keep::<VECTORS>(p, columns, to, factor)
                } else {
                    keep::<{ VECTORS / 2 }>(p, columns, to, factor)
                };
                *largest = _mm_max_epu16(*largest, group_largest);
            }
        }
    }
    let mut token = 0;
    while token < places.tokens {
        // SAFETY: the contract is the same, and the tokens are those that are left.
        token += unsafe {
            match places.tokens - token {
                1 => pass::<1>(places, first, token, x, sums, scratch),
                2 => pass::<2>(places, first, token, x, sums, scratch),
                _ => pass::<TOKENS>(places, first, token, x, sums, scratch),
            }
        };
    }
}

/// Writes the integers of a group of a row, in every fourth vector, and their factor. The group's largest, as
/// [`Integers`] has it.
///
/// # Safety
/// `columns` weights, at most `V` vectors, are readable; `to` is writable for the vectors, `factor` for one.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
unsafe fn keep<const V: usize>(p: *const u8, columns: usize, to: *mut i16, factor: *mut i32) -> __m128i {
    // SAFETY: by contract.
    unsafe {
        let group = integers(load::<V>(p, columns));
        factor.write(_mm_cvtsi128_si32(_mm512_castsi512_si128(group.factor)));
        for (v, &weights) in group.weights.iter().enumerate() {
            _mm512_storeu_si512(to.add(v * QUAD * 32).cast(), weights);
        }
        group.largest
    }
}

/// Multiplies a segment of four rows with `T` tokens; how many.
///
/// # Safety
/// As of [`several`]; the scratch memory holds the segment that begins with group `first`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")]
unsafe fn pass<const T: usize>(
    places: Places,
    first: usize,
    token: usize,
    x: *const f32,
    sums: *mut f32,
    scratch: Scratch,
) -> usize {
    let groups = places.segment(first);
    let mut rows = [[_mm512_setzero_ps(); QUAD]; T];
    // `[token][group][row]`
    let mut factors = [[0.0f32; SEGMENT * QUAD]; T];
    // SAFETY: everything is where `places` and `scratch` say, and masked loads read no more than they say.
    unsafe {
        let mask = (1u32 << (groups * QUAD)) - 1;
        let of_weights = _mm512_maskz_loadu_epi32(mask as u16, scratch.factors);
        let four_times = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        for (t, factors) in factors.iter_mut().enumerate() {
            let x = x.add(places.factors(token + t) + first);
            let of_token = _mm512_maskz_loadu_epi32(((1u32 << groups) - 1) as u16, x.cast());
            let of_token = _mm512_permutexvar_epi32(four_times, of_token);
            _mm512_storeu_ps(factors.as_mut_ptr(), factor(of_weights, of_token));
        }
        for (t, rows) in rows.iter_mut().enumerate() {
            let mark = _mm512_set1_ps(*x.add(places.mark(token + t)));
            for (r, row) in rows.iter_mut().enumerate() {
                let unfinished = scratch.unfinished.wrapping_add(((token + t) * QUAD + r) * LANES);
                *row = if first == 0 { mark } else { _mm512_loadu_ps(unfinished) };
            }
        }
        for group in 0..groups {
            let mut products = [[_mm512_setzero_si512(); QUAD]; T];
            for v in 0..places.vectors(first + group) {
                let weights = scratch.integers.add((group * VECTORS + v) * QUAD * 32);
                let weights = [0, 1, 2, 3].map(|r| weights.add(r * 32));
                let mut vectors = [_mm512_setzero_si512(); QUAD];
                for (vector, weights) in vectors.iter_mut().zip(weights) {
                    *vector = _mm512_loadu_si512(weights.cast());
                }
                for (t, products) in products.iter_mut().enumerate() {
                    let x = x.add(places.integers(token + t, first) + group * GROUP_ELEMENTS + v * LANES);
                    let x = _mm512_loadu_si512(x.cast());
                    for (product, weights) in products.iter_mut().zip(vectors) {
                        *product = add_pairs(*product, weights, x);
                    }
                }
            }
            for ((rows, products), factors) in rows.iter_mut().zip(products).zip(&factors) {
                for (r, (row, product)) in rows.iter_mut().zip(products).enumerate() {
                    let factor = _mm512_set1_ps(*factors.as_ptr().add(group * QUAD + r));
                    *row = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), factor, *row);
                }
            }
        }
        for (t, &rows) in rows.iter().enumerate() {
            if first + groups == places.groups {
                _mm_storeu_ps(sums.add((token + t) * MOST_ROWS), add_lanes(rows));
                continue;
            }
            for (r, &row) in rows.iter().enumerate() {
                _mm512_storeu_ps(scratch.unfinished.add(((token + t) * QUAD + r) * LANES), row);
            }
        }
    }
    T
}
