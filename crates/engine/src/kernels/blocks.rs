//! GGML's block formats as the quantised matrix product reads them: 32 weights of as many rows as there are lanes.
//!
//! A weight is `scale · q + minimum` with an unsigned `q`; formats with signed weights have a minimum of
//! `−offset · scale`. The layouts are those of `ggml-common.h`; [`tangram_checkpoint::DType`] says what the values mean.
//! Nothing here may read beyond a block.
#![allow(unsafe_code)]

use super::format::IQ4_NL_VALUES;
use super::lanes::Lanes;

/// 32 consecutive weights of a row, for all lanes.
pub(crate) struct Group<L: Lanes> {
    /// Vector `j` has the bytes `q` of weights `4j..4j + 4`, made ready for [`Lanes::dot`].
    pub(crate) weights: [L::I; 8],
    /// Of the first and the last sixteen weights; the same where not [`Blocks::HALVES`].
    pub(crate) scales: [L::F; 2],
    pub(crate) minima: [L::F; 2],
}

/// A block format. For each function, `block` is the same block of the first row, and its `BYTES` are readable there and
/// `stride` bytes further for every other lane.
pub(crate) trait Blocks {
    /// Bytes of a block.
    const BYTES: usize;
    /// Groups of 32 weights in a block.
    const GROUPS: usize = 1;
    /// Groups that are loaded together.
    const TOGETHER: usize = 1;
    /// Bits of `q`.
    const BITS: u32;
    /// Whether sixteen weights have a scale, not 32.
    const HALVES: bool = false;
    /// What the groups of a block share.
    type Common<L: Lanes>;
    /// Bytes from which `TOGETHER` groups are made.
    type Raw<L: Lanes>;

    /// # Safety
    /// See [`Blocks`].
    unsafe fn common<L: Lanes>(l: L, block: *const u8, stride: usize) -> Self::Common<L>;

    /// The bytes of groups `first..first + TOGETHER`.
    ///
    /// # Safety
    /// See [`Blocks`].
    unsafe fn raw<L: Lanes>(l: L, block: *const u8, stride: usize, first: usize) -> Self::Raw<L>;

    /// Group `index`, from the bytes that it was loaded with.
    fn group<L: Lanes>(l: L, common: &Self::Common<L>, raw: &Self::Raw<L>, index: usize) -> Group<L>;
}

/// Bytes of 32 weights, or the nibbles of two groups, of every row.
///
/// # Safety
/// 32 bytes are readable at `p + row · stride` for each row.
#[inline(always)]
unsafe fn thirty_two<L: Lanes>(l: L, p: *const u8, stride: usize) -> [L::I; 8] {
    // SAFETY: by contract.
    let ([a, b, c, d], [e, f, g, h]) = unsafe { (l.sixteen(p, stride), l.sixteen(p.add(16), stride)) };
    [a, b, c, d, e, f, g, h]
}

/// Lower nibbles of sixteen bytes, then upper ones.
#[inline(always)]
fn nibbles<L: Lanes>(l: L, bytes: [L::I; 4]) -> [L::I; 8] {
    let mut out = [bytes[0]; 8];
    for j in 0..4 {
        out[j] = l.field(bytes[j], 0, 0x0f0f_0f0f);
        out[j + 4] = l.field(bytes[j], 4, 0x0f0f_0f0f);
    }
    out
}

/// The same field of every byte.
#[inline(always)]
fn fields<L: Lanes>(l: L, bytes: &[L::I; 8], shift: u32, mask: u8) -> [L::I; 8] {
    let mut out = *bytes;
    for v in &mut out {
        *v = l.field(*v, shift, u32::from_le_bytes([mask; 4]));
    }
    out
}

/// Puts a field of the bytes of `from`, moved to bit `to`, on top of those of `low`.
#[inline(always)]
fn on_top<L: Lanes>(l: L, low: [L::I; 8], from: &[L::I; 8], shift: u32, mask: u8, to: u32) -> [L::I; 8] {
    let mut out = low;
    for j in 0..8 {
        let high = l.field(from[j], shift, u32::from_le_bytes([mask; 4]));
        out[j] = l.raise(out[j], high, u32::MAX, to);
    }
    out
}

/// A group with one scale whose weights are `q − offset`.
#[inline(always)]
fn offset_group<L: Lanes, const BITS: u32>(l: L, weights: [L::I; 8], scale: L::F, offset: f32) -> Group<L> {
    let minimum = l.mul(scale, l.splat(-offset));
    Group { weights: l.ready::<BITS>(weights), scales: [scale; 2], minima: [minimum; 2] }
}

/// Formats whose blocks are single groups.
macro_rules! single_groups {
    ($($format:ident: $bytes:literal bytes, $bits:literal bits, |$l:ident, $p:ident, $stride:ident| $load:expr;)*) => {
        $(
            pub(crate) struct $format;

            impl Blocks for $format {
                const BYTES: usize = $bytes;
                const BITS: u32 = $bits;
                type Common<L: Lanes> = ();
                type Raw<L: Lanes> = Group<L>;

                #[inline(always)]
                unsafe fn common<L: Lanes>(_: L, _: *const u8, _: usize) {}

                #[inline(always)]
                unsafe fn raw<L: Lanes>($l: L, $p: *const u8, $stride: usize, _: usize) -> Group<L> {
                    // SAFETY: every offset and length is inside the block, which is readable by contract.
                    unsafe { $load }
                }

                #[inline(always)]
                fn group<L: Lanes>(_: L, _: &(), raw: &Group<L>, _: usize) -> Group<L> {
                    Group { weights: raw.weights, scales: raw.scales, minima: raw.minima }
                }
            }
        )*
    };
}

single_groups! {
    Q8_0: 34 bytes, 8 bits, |l, p, stride| {
        // −128..=127 as 0..=255.
        let mut weights = thirty_two(l, p.add(2), stride);
        for weight in &mut weights {
            *weight = l.flip(*weight, 0x8080_8080);
        }
        offset_group::<L, 8>(l, weights, l.half(p, stride), 128.0)
    };
    Q4_0: 18 bytes, 4 bits, |l, p, stride| {
        offset_group::<L, 4>(l, nibbles(l, l.sixteen(p.add(2), stride)), l.half(p, stride), 8.0)
    };
    Q4_1: 20 bytes, 4 bits, |l, p, stride| {
        let factors = l.four(p, stride);
        Group {
            weights: l.ready::<4>(nibbles(l, l.sixteen(p.add(4), stride))),
            scales: [l.lower_half(factors); 2],
            minima: [l.upper_half(factors); 2],
        }
    };
    Q5_0: 22 bytes, 5 bits, |l, p, stride| {
        let weights = with_fifth_bits(l, l.sixteen(p.add(6), stride), l.four(p.add(2), stride));
        offset_group::<L, 5>(l, weights, l.half(p, stride), 16.0)
    };
    Q5_1: 24 bytes, 5 bits, |l, p, stride| {
        let factors = l.four(p, stride);
        let weights = with_fifth_bits(l, l.sixteen(p.add(8), stride), l.four(p.add(4), stride));
        Group {
            weights: l.ready::<5>(weights),
            scales: [l.lower_half(factors); 2],
            minima: [l.upper_half(factors); 2],
        }
    };
    Iq4Nl: 18 bytes, 8 bits, |l, p, stride| {
        let mut weights = nibbles(l, l.sixteen(p.add(2), stride));
        for weight in &mut weights {
            *weight = l.lookup(&IQ4_NL_UNSIGNED, *weight);
        }
        offset_group::<L, 8>(l, weights, l.half(p, stride), 128.0)
    };
}

/// [`IQ4_NL_VALUES`] plus 128.
const IQ4_NL_UNSIGNED: [u8; 16] = {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = (IQ4_NL_VALUES[i] as u8).wrapping_add(128);
        i += 1;
    }
    table
};

/// Nibbles with a fifth bit each.
#[inline(always)]
fn with_fifth_bits<L: Lanes>(l: L, bytes: [L::I; 4], bits: L::I) -> [L::I; 8] {
    let mut out = nibbles(l, bytes);
    for (j, v) in out.iter_mut().enumerate() {
        *v = l.raise(*v, l.fifth_bits(bits, j as u32), u32::MAX, 0);
    }
    out
}

/// Two factors, then scales and minima of six bits in twelve bytes, of Q4_K and Q5_K.
pub(crate) struct SixBits<L: Lanes> {
    scale: L::F,
    /// With the sign that minima are added with.
    minimum: L::F,
    words: [L::I; 3],
}

impl<L: Lanes> SixBits<L> {
    /// # Safety
    /// 16 bytes are readable at `p + row · stride` for each row.
    #[inline(always)]
    unsafe fn load(l: L, p: *const u8, stride: usize) -> SixBits<L> {
        // SAFETY: by contract.
        let [factors, a, b, c] = unsafe { l.sixteen(p, stride) };
        let minimum = l.mul(l.upper_half(factors), l.splat(-1.0));
        SixBits { scale: l.lower_half(factors), minimum, words: [a, b, c] }
    }

    /// Scale and minimum of a group.
    #[inline(always)]
    fn of(&self, l: L, group: usize) -> (L::F, L::F) {
        let [a, b, c] = self.words;
        let (scale, minimum) = if group < 4 {
            (l.field(a, 8 * group as u32, 63), l.field(b, 8 * group as u32, 63))
        } else {
            // The lower four bits are in the last word, the upper two on top of the numbers of the first groups.
            let at = 8 * (group as u32 - 4);
            let low = (l.field(c, at, 15), l.field(c, at + 4, 15));
            (l.raise(low.0, l.field(a, at + 6, 3), 3, 4), l.raise(low.1, l.field(b, at + 6, 3), 3, 4))
        };
        (l.mul(self.scale, l.to_float(scale)), l.mul(self.minimum, l.to_float(minimum)))
    }
}

pub(crate) struct Q4K;

impl Blocks for Q4K {
    const BYTES: usize = 144;
    const GROUPS: usize = 8;
    const TOGETHER: usize = 2;
    const BITS: u32 = 4;
    type Common<L: Lanes> = SixBits<L>;
    type Raw<L: Lanes> = [L::I; 8];

    #[inline(always)]
    unsafe fn common<L: Lanes>(l: L, block: *const u8, stride: usize) -> SixBits<L> {
        // SAFETY: bytes 0..16 of the block.
        unsafe { SixBits::load(l, block, stride) }
    }

    #[inline(always)]
    unsafe fn raw<L: Lanes>(l: L, block: *const u8, stride: usize, first: usize) -> [L::I; 8] {
        // SAFETY: 32 of bytes 16..144.
        unsafe { thirty_two(l, block.add(16 + first / 2 * 32), stride) }
    }

    #[inline(always)]
    fn group<L: Lanes>(l: L, common: &SixBits<L>, raw: &[L::I; 8], index: usize) -> Group<L> {
        let (scale, minimum) = common.of(l, index);
        let weights = fields(l, raw, index as u32 % 2 * 4, 15);
        Group { weights: l.ready::<4>(weights), scales: [scale; 2], minima: [minimum; 2] }
    }
}

pub(crate) struct Q5K;

impl Blocks for Q5K {
    const BYTES: usize = 176;
    const GROUPS: usize = 8;
    const TOGETHER: usize = 2;
    const BITS: u32 = 5;
    type Common<L: Lanes> = SixBits<L>;
    /// Nibbles, and a bit of every group in each byte.
    type Raw<L: Lanes> = ([L::I; 8], [L::I; 8]);

    #[inline(always)]
    unsafe fn common<L: Lanes>(l: L, block: *const u8, stride: usize) -> SixBits<L> {
        // SAFETY: bytes 0..16 of the block.
        unsafe { SixBits::load(l, block, stride) }
    }

    #[inline(always)]
    unsafe fn raw<L: Lanes>(l: L, block: *const u8, stride: usize, first: usize) -> Self::Raw<L> {
        // SAFETY: bytes 16..48, and 32 of bytes 48..176.
        unsafe {
            let low = thirty_two(l, block.add(48 + first / 2 * 32), stride);
            (low, thirty_two(l, block.add(16), stride))
        }
    }

    #[inline(always)]
    fn group<L: Lanes>(l: L, common: &SixBits<L>, raw: &Self::Raw<L>, index: usize) -> Group<L> {
        let (scale, minimum) = common.of(l, index);
        let low = fields(l, &raw.0, index as u32 % 2 * 4, 15);
        let weights = on_top(l, low, &raw.1, index as u32, 1, 4);
        Group { weights: l.ready::<5>(weights), scales: [scale; 2], minima: [minimum; 2] }
    }
}

/// A factor and sixteen bytes with scales, a scale per sixteen weights.
pub(crate) struct SixteenScales<L: Lanes> {
    factor: L::F,
    bytes: [L::I; 4],
}

impl<L: Lanes> SixteenScales<L> {
    /// The factor times a byte, as a signed number.
    #[inline(always)]
    fn signed(&self, l: L, byte: usize) -> L::F {
        l.mul(self.factor, l.to_float(l.signed_byte(self.bytes[byte / 4], 8 * (byte as u32 % 4))))
    }

    /// A nibble of a byte: the one from bit `shift` on.
    #[inline(always)]
    fn nibble(&self, l: L, byte: usize, shift: u32) -> L::F {
        l.to_float(l.field(self.bytes[byte / 4], 8 * (byte as u32 % 4) + shift, 15))
    }
}

pub(crate) struct Q6K;

impl Blocks for Q6K {
    const BYTES: usize = 210;
    const GROUPS: usize = 8;
    const TOGETHER: usize = 4;
    const BITS: u32 = 6;
    const HALVES: bool = true;
    type Common<L: Lanes> = SixteenScales<L>;
    /// Nibbles of the first and third, of the second and fourth group; upper bits of all four.
    type Raw<L: Lanes> = ([[L::I; 8]; 2], [L::I; 8]);

    #[inline(always)]
    unsafe fn common<L: Lanes>(l: L, block: *const u8, stride: usize) -> SixteenScales<L> {
        // SAFETY: bytes 192..210 of the block.
        unsafe {
            SixteenScales { factor: l.half(block.add(208), stride), bytes: l.sixteen(block.add(192), stride) }
        }
    }

    #[inline(always)]
    unsafe fn raw<L: Lanes>(l: L, block: *const u8, stride: usize, first: usize) -> Self::Raw<L> {
        let half = first / 4;
        // SAFETY: 64 of bytes 0..128 and 32 of bytes 128..192.
        unsafe {
            let low = block.add(half * 64);
            let low = [thirty_two(l, low, stride), thirty_two(l, low.add(32), stride)];
            (low, thirty_two(l, block.add(128 + half * 32), stride))
        }
    }

    #[inline(always)]
    fn group<L: Lanes>(l: L, common: &SixteenScales<L>, raw: &Self::Raw<L>, index: usize) -> Group<L> {
        let quarter = index % 4;
        let low = fields(l, &raw.0[quarter % 2], quarter as u32 / 2 * 4, 15);
        let weights = on_top(l, low, &raw.1, quarter as u32 * 2, 3, 4);
        let scales = [common.signed(l, 2 * index), common.signed(l, 2 * index + 1)];
        halves_group::<L, 6>(l, weights, scales, 32.0)
    }
}

/// A group with two scales whose weights are `q − offset`.
#[inline(always)]
fn halves_group<L: Lanes, const BITS: u32>(
    l: L,
    weights: [L::I; 8],
    scales: [L::F; 2],
    offset: f32,
) -> Group<L> {
    let minima = [l.mul(scales[0], l.splat(-offset)), l.mul(scales[1], l.splat(-offset))];
    Group { weights: l.ready::<BITS>(weights), scales, minima }
}

pub(crate) struct Q3K;

impl Blocks for Q3K {
    const BYTES: usize = 110;
    const GROUPS: usize = 8;
    const TOGETHER: usize = 4;
    const BITS: u32 = 3;
    const HALVES: bool = true;
    /// The factor; lower four bits of the scales in two words, upper two in the third.
    type Common<L: Lanes> = (L::F, [L::I; 3]);
    /// Two bits of four groups, and a bit of every group, in each byte.
    type Raw<L: Lanes> = ([L::I; 8], [L::I; 8]);

    #[inline(always)]
    unsafe fn common<L: Lanes>(l: L, block: *const u8, stride: usize) -> Self::Common<L> {
        // SAFETY: bytes 96..110 of the block.
        unsafe {
            let words = block.add(96);
            let words = [l.four(words, stride), l.four(words.add(4), stride), l.four(words.add(8), stride)];
            (l.half(block.add(108), stride), words)
        }
    }

    #[inline(always)]
    unsafe fn raw<L: Lanes>(l: L, block: *const u8, stride: usize, first: usize) -> Self::Raw<L> {
        // SAFETY: 32 of bytes 32..96, and bytes 0..32.
        unsafe { (thirty_two(l, block.add(32 + first / 4 * 32), stride), thirty_two(l, block, stride)) }
    }

    #[inline(always)]
    fn group<L: Lanes>(l: L, common: &Self::Common<L>, raw: &Self::Raw<L>, index: usize) -> Group<L> {
        let low = fields(l, &raw.0, index as u32 % 4 * 2, 3);
        let weights = on_top(l, low, &raw.1, index as u32, 1, 2);
        let scales = [Q3K::scale(l, common, 2 * index), Q3K::scale(l, common, 2 * index + 1)];
        halves_group::<L, 3>(l, weights, scales, 4.0)
    }
}

impl Q3K {
    /// Scale `i` of sixteen: a nibble of byte i mod 8, two bits of byte i mod 4 of the third word; minus 32.
    #[inline(always)]
    fn scale<L: Lanes>(l: L, common: &(L::F, [L::I; 3]), i: usize) -> L::F {
        let (factor, [a, b, c]) = common;
        let at = 8 * (i as u32 % 4);
        let low = l.field(if i % 8 < 4 { *a } else { *b }, at + i as u32 / 8 * 4, 15);
        let six = l.raise(low, l.field(*c, at + i as u32 / 4 * 2, 3), 3, 4);
        l.mul(*factor, l.fma(l.to_float(six), l.splat(1.0), l.splat(-32.0)))
    }
}

pub(crate) struct Q2K;

impl Blocks for Q2K {
    const BYTES: usize = 84;
    const GROUPS: usize = 8;
    const TOGETHER: usize = 4;
    const BITS: u32 = 2;
    const HALVES: bool = true;
    /// The scales, whose bytes have a scale and a minimum, and the factor of the minima, with its sign.
    type Common<L: Lanes> = (SixteenScales<L>, L::F);
    /// Two bits of four groups in each byte.
    type Raw<L: Lanes> = [L::I; 8];

    #[inline(always)]
    unsafe fn common<L: Lanes>(l: L, block: *const u8, stride: usize) -> Self::Common<L> {
        // SAFETY: bytes 0..16 and 80..84 of the block.
        unsafe {
            let factors = l.four(block.add(80), stride);
            let scales = SixteenScales { factor: l.lower_half(factors), bytes: l.sixteen(block, stride) };
            (scales, l.mul(l.upper_half(factors), l.splat(-1.0)))
        }
    }

    #[inline(always)]
    unsafe fn raw<L: Lanes>(l: L, block: *const u8, stride: usize, first: usize) -> [L::I; 8] {
        // SAFETY: 32 of bytes 16..80.
        unsafe { thirty_two(l, block.add(16 + first / 4 * 32), stride) }
    }

    #[inline(always)]
    fn group<L: Lanes>(l: L, common: &Self::Common<L>, raw: &[L::I; 8], index: usize) -> Group<L> {
        let weights = fields(l, raw, index as u32 % 4 * 2, 3);
        let (scales, minimum) = common;
        let (first, second) = (2 * index, 2 * index + 1);
        Group {
            weights: l.ready::<2>(weights),
            scales: [
                l.mul(scales.factor, scales.nibble(l, first, 0)),
                l.mul(scales.factor, scales.nibble(l, second, 0)),
            ],
            minima: [
                l.mul(*minimum, scales.nibble(l, first, 4)),
                l.mul(*minimum, scales.nibble(l, second, 4)),
            ],
        }
    }
}
