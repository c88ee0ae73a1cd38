//! The vector operations of the matrix products: a lane is a row of the matrix.
//!
//! A kernel is generic over [`Lanes`] and compiled once per instruction set by [`super::Isa::dispatch_lanes`]. Sums of
//! integers are exact, and every floating-point operation works on each lane alone, so all implementations give the
//! same bits, but for the portable one, which rounds a multiply-add twice.
#![allow(unsafe_code)]

use half::f16;

use super::simd::Scalar;

/// Vectors of 32-bit lanes. Implementations are tokens whose existence proves that the processor has the
/// instructions. Pointers need no alignment.
pub(crate) trait Lanes: Copy {
    /// An f32 per lane.
    type F: Copy;
    /// A 32-bit integer, or four bytes, per lane.
    type I: Copy;
    /// Lanes, at most [`MOST_LANES`].
    const ROWS: usize;
    /// Vectors of eight weights that the registers have room for, 1 or 2.
    const VECTORS: usize = 1;

    /// The same number in all lanes.
    fn splat(self, x: f32) -> Self::F;
    /// A number from memory in all lanes.
    ///
    /// # Safety
    /// `p` is readable.
    unsafe fn broadcast(self, p: *const f32) -> Self::F;
    /// One f32 per lane from memory.
    ///
    /// # Safety
    /// `p` is readable for `ROWS` elements.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// One f32 per lane to memory.
    ///
    /// # Safety
    /// `p` is writable for `ROWS` elements.
    unsafe fn store(self, p: *mut f32, v: Self::F);
    /// a · b.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, rounded once where the hardware can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Signed integers as numbers.
    fn to_float(self, v: Self::I) -> Self::F;
    /// a + b.
    fn add_ints(self, a: Self::I, b: Self::I) -> Self::I;

    /// Sixteen bytes of every row: vector `j` has bytes `4j..4j + 4` of the row of each lane.
    ///
    /// # Safety
    /// Sixteen bytes are readable at `p + row · stride` for each of the `ROWS` rows.
    unsafe fn sixteen(self, p: *const u8, stride: usize) -> [Self::I; 4];
    /// 64 bytes of every row, as [`Lanes::sixteen`] gives sixteen. Where rows lie a power of two apart their lines
    /// compete for few places in the first-level cache, so a line should be read once, not bit by bit.
    ///
    /// # Safety
    /// 64 bytes are readable at `p + row · stride` for each of the `ROWS` rows.
    #[inline(always)]
    unsafe fn line(self, p: *const u8, stride: usize) -> [Self::I; 16] {
        // SAFETY: four times sixteen bytes.
        unsafe {
            let [a, b, c, d] = self.sixteen(p, stride);
            let [e, f, g, h] = self.sixteen(p.add(16), stride);
            let [i, j, k, l] = self.sixteen(p.add(32), stride);
            let [m, n, o, q] = self.sixteen(p.add(48), stride);
            [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, q]
        }
    }
    /// Four bytes of every row.
    ///
    /// # Safety
    /// Four bytes are readable at `p + row · stride` for each of the `ROWS` rows.
    unsafe fn four(self, p: *const u8, stride: usize) -> Self::I;
    /// A binary16 of every row, widened.
    ///
    /// # Safety
    /// Two bytes are readable at `p + row · stride` for each of the `ROWS` rows.
    unsafe fn half(self, p: *const u8, stride: usize) -> Self::F;
    /// The lower two bytes of every lane as binary16, widened.
    fn lower_half(self, v: Self::I) -> Self::F;
    /// The upper two bytes of every lane as binary16, widened.
    fn upper_half(self, v: Self::I) -> Self::F;

    /// The lower two bytes of every lane as bfloat16, widened.
    fn lower_bf16(self, v: Self::I) -> Self::F;
    /// The upper two bytes of every lane as bfloat16, widened.
    fn upper_bf16(self, v: Self::I) -> Self::F;
    /// Every lane as an f32.
    fn bits(self, v: Self::I) -> Self::F;

    /// `(v >> shift) & mask`, in lanes of 32 bits.
    fn field(self, v: Self::I, shift: u32, mask: u32) -> Self::I;
    /// `a | ((b & mask) << shift)`, in lanes of 32 bits.
    fn raise(self, a: Self::I, b: Self::I, mask: u32, shift: u32) -> Self::I;
    /// `v ^ bits`.
    fn flip(self, v: Self::I, bits: u32) -> Self::I;
    /// The low byte after a shift to the right by `shift`, as a signed number.
    fn signed_byte(self, v: Self::I, shift: u32) -> Self::I;
    /// Bits `4j..4j + 4` of every lane, each moved to bit 4 of a byte of its own.
    fn fifth_bits(self, v: Self::I, j: u32) -> Self::I;
    /// Every byte, 0..=15, replaced by the entry of the table.
    fn lookup(self, table: &[u8; 16], v: Self::I) -> Self::I;

    /// Makes weights of at most `BITS` bits, as 32 unsigned bytes per row, ready for [`Lanes::dot`].
    fn ready<const BITS: u32>(self, weights: [Self::I; 8]) -> [Self::I; 8];
    /// For each row the products of 16 + 16 weights with 32 signed bytes at `x`, added up exactly over each half.
    /// `sum` is the sum of the 32 bytes. Only the sum of the two results is what it says where `BITS` is 8.
    ///
    /// # Safety
    /// `x` is readable for 32 bytes, all of which are in −127..=127; `weights` come from `ready` with the same
    /// `BITS`.
    unsafe fn dot<const BITS: u32>(
        self,
        weights: &[Self::I; 8],
        x: *const i8,
        sum: *const i32,
    ) -> [Self::I; 2];

    /// Asks for the cache line at `p`, which may be any address.
    fn prefetch(self, p: *const u8);
}

/// The most lanes that an implementation has.
pub(crate) const MOST_LANES: usize = 16;

/// The arguments of a kernel over [`Lanes`]; the rules of [`super::Kernel`] hold.
pub(crate) trait LanesKernel {
    type Output;
    fn run<L: Lanes>(self, l: L) -> Self::Output;
}

#[inline(always)]
fn map(v: [u32; 8], f: impl Fn(u32) -> u32) -> [u32; 8] {
    v.map(f)
}

impl Lanes for Scalar {
    type F = [f32; 8];
    type I = [u32; 8];
    const ROWS: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 8] {
        [x; 8]
    }

    #[inline(always)]
    unsafe fn broadcast(self, p: *const f32) -> [f32; 8] {
        // SAFETY: readable by contract.
        [unsafe { p.read_unaligned() }; 8]
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> [f32; 8] {
        // SAFETY: eight readable elements by contract.
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: [f32; 8]) {
        // SAFETY: eight writable elements by contract.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v) }
    }

    #[inline(always)]
    fn mul(self, a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn fma(self, a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn to_float(self, v: [u32; 8]) -> [f32; 8] {
        v.map(|x| x as i32 as f32)
    }

    #[inline(always)]
    fn add_ints(self, a: [u32; 8], b: [u32; 8]) -> [u32; 8] {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }

    #[inline(always)]
    unsafe fn sixteen(self, p: *const u8, stride: usize) -> [[u32; 8]; 4] {
        // SAFETY: four times four bytes of every row are readable by contract.
        std::array::from_fn(|j| unsafe { self.four(p.add(4 * j), stride) })
    }

    #[inline(always)]
    unsafe fn four(self, p: *const u8, stride: usize) -> [u32; 8] {
        // SAFETY: four bytes of every row are readable by contract.
        std::array::from_fn(|row| unsafe {
            u32::from_le_bytes(p.add(row * stride).cast::<[u8; 4]>().read_unaligned())
        })
    }

    #[inline(always)]
    unsafe fn half(self, p: *const u8, stride: usize) -> [f32; 8] {
        // SAFETY: two bytes of every row are readable by contract.
        std::array::from_fn(|row| unsafe {
            f16::from_le_bytes(p.add(row * stride).cast::<[u8; 2]>().read_unaligned()).to_f32()
        })
    }

    #[inline(always)]
    fn lower_half(self, v: [u32; 8]) -> [f32; 8] {
        v.map(|x| f16::from_bits(x as u16).to_f32())
    }

    #[inline(always)]
    fn upper_half(self, v: [u32; 8]) -> [f32; 8] {
        v.map(|x| f16::from_bits((x >> 16) as u16).to_f32())
    }

    #[inline(always)]
    fn lower_bf16(self, v: [u32; 8]) -> [f32; 8] {
        v.map(|x| f32::from_bits(x << 16))
    }

    #[inline(always)]
    fn upper_bf16(self, v: [u32; 8]) -> [f32; 8] {
        v.map(|x| f32::from_bits(x & 0xffff_0000))
    }

    #[inline(always)]
    fn bits(self, v: [u32; 8]) -> [f32; 8] {
        v.map(f32::from_bits)
    }

    #[inline(always)]
    fn field(self, v: [u32; 8], shift: u32, mask: u32) -> [u32; 8] {
        map(v, |x| (x >> shift) & mask)
    }

    #[inline(always)]
    fn raise(self, a: [u32; 8], b: [u32; 8], mask: u32, shift: u32) -> [u32; 8] {
        std::array::from_fn(|i| a[i] | ((b[i] & mask) << shift))
    }

    #[inline(always)]
    fn flip(self, v: [u32; 8], bits: u32) -> [u32; 8] {
        map(v, |x| x ^ bits)
    }

    #[inline(always)]
    fn signed_byte(self, v: [u32; 8], shift: u32) -> [u32; 8] {
        map(v, |x| (x >> shift) as u8 as i8 as i32 as u32)
    }

    #[inline(always)]
    fn fifth_bits(self, v: [u32; 8], j: u32) -> [u32; 8] {
        map(v, |x| (0..4).fold(0, |bytes, i| bytes | (x >> (4 * j + i) & 1) << (8 * i + 4)))
    }

    #[inline(always)]
    fn lookup(self, table: &[u8; 16], v: [u32; 8]) -> [u32; 8] {
        map(v, |x| u32::from_le_bytes(x.to_le_bytes().map(|byte| table[usize::from(byte & 15)])))
    }

    #[inline(always)]
    fn ready<const BITS: u32>(self, weights: [[u32; 8]; 8]) -> [[u32; 8]; 8] {
        weights
    }

    #[inline(always)]
    unsafe fn dot<const BITS: u32>(
        self,
        weights: &[[u32; 8]; 8],
        x: *const i8,
        _: *const i32,
    ) -> [[u32; 8]; 2] {
        // SAFETY: 32 readable bytes by contract.
        let x = unsafe { x.cast::<[i8; 32]>().read_unaligned() };
        std::array::from_fn(|half| {
            std::array::from_fn(|row| {
                let mut sum = 0;
                for j in 4 * half..4 * half + 4 {
                    for (i, byte) in weights[j][row].to_le_bytes().into_iter().enumerate() {
                        sum += i32::from(byte) * i32::from(x[4 * j + i]);
                    }
                }
                sum as u32
            })
        })
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
}
