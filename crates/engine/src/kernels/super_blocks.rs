//! GGML's formats with blocks of 256 elements in eight groups, whose scales are quantised themselves ("k-quants").
//!
//! The layouts are those of `ggml-common.h`; [`tangram_checkpoint::DType`] says what the values mean.
#![allow(unsafe_code)]

use super::format::{Format, times_plus};
use super::simd::{LANES, Simd};

/// A scale per sixteen elements.
type Sixteen = [f32; 16];

pub(crate) struct Q2K;
pub(crate) struct Q3K;
pub(crate) struct Q4K;
pub(crate) struct Q5K;
pub(crate) struct Q6K;

/// A scale and what is subtracted, per group.
#[derive(Clone, Copy)]
pub(crate) struct ScalesAndMinima {
    scales: [f32; LANES],
    /// With the sign that they are added with.
    minima: [f32; LANES],
}

/// The scales and minima of Q4_K and Q5_K: two f16 factors, then eight scales and eight minima of six bits in twelve
/// bytes.
///
/// # Safety
/// `p` is readable for 16 bytes.
#[inline(always)]
unsafe fn scales_and_minima<S: Simd>(s: S, p: *const u8) -> ScalesAndMinima {
    let mut common = ScalesAndMinima { scales: [0.0; LANES], minima: [0.0; LANES] };
    // SAFETY: 16 readable bytes by contract; the arrays have eight elements.
    unsafe {
        let word = |i: usize| u32::from_le_bytes(p.add(4 + 4 * i).cast::<[u8; 4]>().read_unaligned());
        let (a, b, c) = (word(0), word(1), word(2));
        // Four numbers of six bits at a time. The first four of each are whole; of the others the lower four bits are
        // in the last word, the upper two on top of the first ones.
        let low = 0x0f0f_0f0f;
        let upper = |word: u32| (word >> 2) & 0x3030_3030;
        let halves = |first: u32, second: u32| u64::from(first) | u64::from(second) << 32;
        let scales = halves(a & 0x3f3f_3f3f, (c & low) | upper(a)).to_le_bytes();
        let minima = halves(b & 0x3f3f_3f3f, ((c >> 4) & low) | upper(b)).to_le_bytes();
        let d = s.splat_f16(p);
        let e = s.sub(s.splat(0.0), s.splat_f16(p.add(2)));
        s.store(common.scales.as_mut_ptr(), s.mul(d, s.load_i8(scales.as_ptr())));
        s.store(common.minima.as_mut_ptr(), s.mul(e, s.load_i8(minima.as_ptr())));
    }
    common
}

/// `q · scale`, with one scale for each half of the group.
#[inline(always)]
fn scaled<S: Simd>(s: S, q: [S::V; 4], scales: &[f32], group: usize) -> [S::V; 4] {
    let (a, b) = (s.splat(scales[2 * group]), s.splat(scales[2 * group + 1]));
    [s.mul(a, q[0]), s.mul(a, q[1]), s.mul(b, q[2]), s.mul(b, q[3])]
}

impl Format for Q2K {
    const BLOCK_GROUPS: usize = 8;
    const BLOCK_BYTES: usize = 84;
    type Common = (Sixteen, Sixteen);

    #[inline(always)]
    unsafe fn common<S: Simd>(s: S, block: *const u8) -> Self::Common {
        let (mut scales, mut minima) = ([0.0; 16], [0.0; 16]);
        // SAFETY: 84 readable bytes by contract; a byte for each of the sixteen elements.
        unsafe {
            let d = s.splat_f16(block.add(80));
            let e = s.sub(s.splat(0.0), s.splat_f16(block.add(82)));
            let nibbles = s.load_nibble_bytes(block);
            let [a, b, c, f] = s.widen(nibbles, 0);
            for (i, (scale, minimum)) in [(a, c), (b, f)].into_iter().enumerate() {
                s.store(scales.as_mut_ptr().add(i * LANES), s.mul(d, scale));
                s.store(minima.as_mut_ptr().add(i * LANES), s.mul(e, minimum));
            }
        }
        (scales, minima)
    }

    #[inline(always)]
    unsafe fn load32<S: Simd>(s: S, block: *const u8, common: Self::Common, group: usize) -> [S::V; 4] {
        let (scales, minima) = common;
        // SAFETY: 84 readable bytes by contract, the 2-bit fields in bytes 16..80.
        let q = unsafe { s.load_bytes(block.add(16 + group / 4 * 32)) };
        let q = s.widen(s.field(q, group as u32 % 4 * 2, 3), 0);
        let (a, b) = (s.splat(scales[2 * group]), s.splat(scales[2 * group + 1]));
        let (m, n) = (s.splat(minima[2 * group]), s.splat(minima[2 * group + 1]));
        [s.fma(a, q[0], m), s.fma(a, q[1], m), s.fma(b, q[2], n), s.fma(b, q[3], n)]
    }
}

impl Format for Q3K {
    const BLOCK_GROUPS: usize = 8;
    const BLOCK_BYTES: usize = 110;
    type Common = Sixteen;

    #[inline(always)]
    unsafe fn common<S: Simd>(s: S, block: *const u8) -> Sixteen {
        let mut scales = [0.0; 16];
        // SAFETY: 110 readable bytes by contract: twelve of scales from 96 on, the factor after them.
        unsafe {
            let d = s.splat_f16(block.add(108));
            let packed = block.add(96).cast::<[u8; 12]>().read_unaligned();
            let mut small = [0u8; 16];
            for (i, scale) in small.iter_mut().enumerate() {
                let low = if i < 8 { packed[i] & 15 } else { packed[i - 8] >> 4 };
                let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
                *scale = (low | high << 4).wrapping_sub(32);
            }
            for half in [0, LANES] {
                let scale = s.mul(d, s.load_i8(small.as_ptr().add(half)));
                s.store(scales.as_mut_ptr().add(half), scale);
            }
        }
        scales
    }

    #[inline(always)]
    unsafe fn load32<S: Simd>(s: S, block: *const u8, scales: Sixteen, group: usize) -> [S::V; 4] {
        // SAFETY: 110 readable bytes by contract: a bit of every group in each of the first 32, then 2-bit fields.
        let (high, low) = unsafe { (s.load_bytes(block), s.load_bytes(block.add(32 + group / 4 * 32))) };
        let high = s.raise(s.field(high, group as u32, 1), 1, 2);
        let q = s.or_bytes(s.field(low, group as u32 % 4 * 2, 3), high);
        scaled(s, s.widen(q, 4), &scales, group)
    }
}

impl Format for Q4K {
    const BLOCK_GROUPS: usize = 8;
    const BLOCK_BYTES: usize = 144;
    type Common = ScalesAndMinima;

    #[inline(always)]
    unsafe fn common<S: Simd>(s: S, block: *const u8) -> ScalesAndMinima {
        // SAFETY: 144 readable bytes by contract.
        unsafe { scales_and_minima(s, block) }
    }

    #[inline(always)]
    unsafe fn load32<S: Simd>(s: S, block: *const u8, common: ScalesAndMinima, group: usize) -> [S::V; 4] {
        // SAFETY: 144 readable bytes by contract, the nibbles of two groups in 32 of them from 16 on.
        let q = unsafe { s.load_bytes(block.add(16 + group / 2 * 32)) };
        let (d, m) = (s.splat(common.scales[group]), s.splat(common.minima[group]));
        times_plus(s, d, s.widen(s.field(q, group as u32 % 2 * 4, 15), 0), m)
    }
}

impl Format for Q5K {
    const BLOCK_GROUPS: usize = 8;
    const BLOCK_BYTES: usize = 176;
    type Common = ScalesAndMinima;

    #[inline(always)]
    unsafe fn common<S: Simd>(s: S, block: *const u8) -> ScalesAndMinima {
        // SAFETY: 176 readable bytes by contract.
        unsafe { scales_and_minima(s, block) }
    }

    #[inline(always)]
    unsafe fn load32<S: Simd>(s: S, block: *const u8, common: ScalesAndMinima, group: usize) -> [S::V; 4] {
        // SAFETY: 176 readable bytes by contract: a bit of every group in each of 32 from 16 on, then nibbles.
        let (high, low) =
            unsafe { (s.load_bytes(block.add(16)), s.load_bytes(block.add(48 + group / 2 * 32))) };
        let high = s.raise(s.field(high, group as u32, 1), 1, 4);
        let q = s.or_bytes(s.field(low, group as u32 % 2 * 4, 15), high);
        let (d, m) = (s.splat(common.scales[group]), s.splat(common.minima[group]));
        times_plus(s, d, s.widen(q, 0), m)
    }
}

impl Format for Q6K {
    const BLOCK_GROUPS: usize = 8;
    const BLOCK_BYTES: usize = 210;
    type Common = Sixteen;

    #[inline(always)]
    unsafe fn common<S: Simd>(s: S, block: *const u8) -> Sixteen {
        let mut scales = [0.0; 16];
        // SAFETY: 210 readable bytes by contract, sixteen scales from 192 on, the factor after them.
        unsafe {
            let d = s.splat_f16(block.add(208));
            for half in [0, LANES] {
                let scale = s.mul(d, s.load_i8(block.add(192 + half)));
                s.store(scales.as_mut_ptr().add(half), scale);
            }
        }
        scales
    }

    #[inline(always)]
    unsafe fn load32<S: Simd>(s: S, block: *const u8, scales: Sixteen, group: usize) -> [S::V; 4] {
        let (half, quarter) = (group / 4, group % 4);
        // SAFETY: 210 readable bytes by contract: for each half of the block 64 bytes of nibbles (of the first and
        // third, and of the second and fourth group), from 128 on for each half 32 bytes of upper bits.
        let (low, high) = unsafe {
            (s.load_bytes(block.add(half * 64 + quarter % 2 * 32)), s.load_bytes(block.add(128 + half * 32)))
        };
        let high = s.raise(s.field(high, quarter as u32 * 2, 3), 3, 4);
        let q = s.or_bytes(s.field(low, quarter as u32 / 2 * 4, 15), high);
        scaled(s, s.widen(q, 32), &scales, group)
    }
}
