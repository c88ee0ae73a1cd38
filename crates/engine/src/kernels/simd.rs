//! The vector operations that kernels are written in: eight f32 lanes, and a portable implementation.
//!
//! A kernel is generic over [`Simd`] and is compiled once per instruction set by [`super::Isa::dispatch`]. The order
//! of additions is part of the contract of each operation: all implementations add in the same order, so results of
//! two instruction sets differ at most in whether a multiply-add rounds once or twice.
#![allow(unsafe_code)]

use half::{bf16, f16};

/// Lanes of a vector.
pub(crate) const LANES: usize = 8;
/// Vectors of a group of 32 elements, and of the partial sums of what adds up whole rows.
pub(crate) const PARTS: usize = 4;

/// Eight f32 lanes. Implementations are tokens whose existence proves that the processor has the instructions.
/// Pointers need no alignment.
pub(crate) trait Simd: Copy {
    /// Eight f32.
    type V: Copy;
    /// 32 bytes, from which formats make small integers.
    type Bytes: Copy;

    /// Asks for the cache line at `p`, which may be any address.
    fn ask_for(self, p: *const u8);

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;

    /// Eight f32 from memory.
    ///
    /// # Safety
    /// `p` is readable for 32 bytes.
    unsafe fn load(self, p: *const f32) -> Self::V;

    /// Eight f32 to memory.
    ///
    /// # Safety
    /// `p` is writable for 32 bytes.
    unsafe fn store(self, p: *mut f32, v: Self::V);

    /// Eight binary16, widened.
    ///
    /// # Safety
    /// `p` is readable for 16 bytes.
    unsafe fn load_f16(self, p: *const u8) -> Self::V;

    /// One binary16, widened, in all lanes.
    ///
    /// # Safety
    /// `p` is readable for 2 bytes.
    unsafe fn splat_f16(self, p: *const u8) -> Self::V;

    /// Narrows to binary16, to nearest even.
    ///
    /// # Safety
    /// `p` is writable for 16 bytes.
    unsafe fn store_f16(self, p: *mut u8, v: Self::V);

    /// Eight bfloat16, widened.
    ///
    /// # Safety
    /// `p` is readable for 16 bytes.
    unsafe fn load_bf16(self, p: *const u8) -> Self::V;

    /// Eight signed bytes as numbers.
    ///
    /// # Safety
    /// `p` is readable for 8 bytes.
    unsafe fn load_i8(self, p: *const u8) -> Self::V;

    /// Integral lanes in −128..=127 as signed bytes.
    ///
    /// # Safety
    /// `p` is writable for 8 bytes.
    unsafe fn store_i8(self, p: *mut i8, v: Self::V);

    /// Sixteen bytes as 32 nibbles: first the low nibble of every byte, then the high ones, as numbers 0..=15.
    ///
    /// # Safety
    /// `p` is readable for 16 bytes.
    unsafe fn load_nibbles(self, p: *const u8) -> [Self::V; 4];

    /// 32 bytes from memory.
    ///
    /// # Safety
    /// `p` is readable for 32 bytes.
    unsafe fn load_bytes(self, p: *const u8) -> Self::Bytes;

    /// Sixteen bytes as 32 nibbles: first the low nibble of every byte, then the high ones.
    ///
    /// # Safety
    /// `p` is readable for 16 bytes.
    unsafe fn load_nibble_bytes(self, p: *const u8) -> Self::Bytes;

    /// 32 bits, the lowest of the first byte first, as bytes: all bits set or none.
    ///
    /// # Safety
    /// `p` is readable for 4 bytes.
    unsafe fn load_bits(self, p: *const u8) -> Self::Bytes;

    /// Every byte `(byte >> shift) & mask`, for a `mask` without bits that come from the byte beside it.
    fn field(self, b: Self::Bytes, shift: u32, mask: u8) -> Self::Bytes;

    /// Every byte `(byte & mask) << shift`, which must fit.
    fn raise(self, b: Self::Bytes, mask: u8, shift: u32) -> Self::Bytes;

    /// a | b.
    fn or_bytes(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;

    /// Every byte, 0..=15, replaced by the entry of the table.
    fn lookup(self, table: &[i8; 16], b: Self::Bytes) -> Self::Bytes;

    /// Every byte minus `x`, as a signed number.
    fn widen(self, b: Self::Bytes, x: u8) -> [Self::V; 4];

    /// a + b.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a − b.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a / b.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, rounded once where the hardware can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger of `a` and `b`; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of `a` and `b`; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The nearest integers, ties to even.
    fn round(self, v: Self::V) -> Self::V;
    /// Two to the power of integral lanes in −126..=127.
    fn pow2(self, v: Self::V) -> Self::V;
    /// `v` with the sign of `sign`.
    fn copysign(self, v: Self::V, sign: Self::V) -> Self::V;
    /// Without the sign.
    fn abs(self, v: Self::V) -> Self::V;
    /// `v` where `x >= bound` or `x` is NaN, else 0.
    fn keep_from(self, x: Self::V, bound: Self::V, v: Self::V) -> Self::V;

    /// ((l0+l4)+(l2+l6)) + ((l1+l5)+(l3+l7)).
    fn sum(self, v: Self::V) -> f32;

    /// [`Simd::sum`] of eight vectors, in lanes.
    fn sums(self, v: [Self::V; 8]) -> Self::V;

    /// The products of two rows with eight, which follow each other, each lane's added in the order of columns.
    ///
    /// # Safety
    /// All rows have `stride` elements, a multiple of the lanes.
    #[inline(always)]
    unsafe fn products(
        self,
        rows: [*const f32; 2],
        eight: *const f32,
        stride: usize,
    ) -> [[Self::V; LANES]; 2] {
        const TOGETHER: usize = LANES / 2;
        let mut products = [[self.splat(0.0); LANES]; 2];
        for from in [0, TOGETHER] {
            let mut sums = [[self.splat(0.0); TOGETHER]; 2];
            for i in (0..stride).step_by(LANES) {
                // SAFETY: by contract.
                unsafe {
                    let (a, b) = (self.load(rows[0].add(i)), self.load(rows[1].add(i)));
                    let [first, second] = &mut sums;
                    for (t, (x, y)) in first.iter_mut().zip(second).enumerate() {
                        let other = self.load(eight.add((from + t) * stride + i));
                        *x = self.fma(a, other, *x);
                        *y = self.fma(b, other, *y);
                    }
                }
            }
            products[0][from..from + TOGETHER].copy_from_slice(&sums[0]);
            products[1][from..from + TOGETHER].copy_from_slice(&sums[1]);
        }
        products
    }

    /// Adds `count` rows, `stride` elements apart, times weights, one after the other, to `R` sums with weights of their
    /// own; `V` vectors of each, which is returned.
    ///
    /// # Safety
    /// `V` vectors of every row and sum are there, and `count` weights for each sum.
    #[inline(always)]
    unsafe fn add_rows<const V: usize, const R: usize>(
        self,
        weights: [*const f32; R],
        count: usize,
        rows: *const f32,
        stride: usize,
        sums: [*mut f32; R],
    ) -> usize {
        for (weights, sums) in weights.into_iter().zip(sums) {
            // SAFETY: the contract is the same.
            unsafe { add_rows_to_one::<Self, V>(self, weights, count, rows, stride, sums) };
        }
        V
    }
}

/// [`Simd::add_rows`] for a single sum. An addition waits for the one before it: many columns keep the processor busy.
///
/// # Safety
/// As there.
#[inline(always)]
pub(crate) unsafe fn add_rows_to_one<S: Simd, const V: usize>(
    s: S,
    weights: *const f32,
    count: usize,
    rows: *const f32,
    stride: usize,
    sums: *mut f32,
) {
    let mut acc = [s.splat(0.0); V];
    // SAFETY: by contract.
    unsafe {
        for (u, acc) in acc.iter_mut().enumerate() {
            *acc = s.load(sums.add(u * LANES));
        }
        for p in 0..count {
            let weight = s.splat(*weights.add(p));
            for (u, acc) in acc.iter_mut().enumerate() {
                *acc = s.fma(weight, s.load(rows.add(p * stride + u * LANES)), *acc);
            }
        }
        for (u, &acc) in acc.iter().enumerate() {
            s.store(sums.add(u * LANES), acc);
        }
    }
}

/// The portable implementation. It fuses no multiply-adds: without hardware that would be a slow library call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar;

#[inline(always)]
fn map2(a: [f32; 8], b: [f32; 8], f: impl Fn(f32, f32) -> f32) -> [f32; 8] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Scalar {
    type V = [f32; 8];
    type Bytes = [u8; 32];

    #[inline(always)]
    fn ask_for(self, _: *const u8) {}

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; 8]
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::V {
        // SAFETY: 32 readable bytes by contract; every bit pattern is an f32.
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Self::V) {
        // SAFETY: 32 writable bytes by contract.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const u8) -> Self::V {
        // SAFETY: 16 readable bytes by contract.
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        bits.map(|b| f16::from_bits(b).to_f32())
    }

    #[inline(always)]
    unsafe fn splat_f16(self, p: *const u8) -> Self::V {
        // SAFETY: 2 readable bytes by contract.
        let bits = unsafe { p.cast::<u16>().read_unaligned() };
        [f16::from_bits(bits).to_f32(); 8]
    }

    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u8, v: Self::V) {
        // SAFETY: 16 writable bytes by contract.
        unsafe { p.cast::<[u16; 8]>().write_unaligned(v.map(|x| f16::from_f32(x).to_bits())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u8) -> Self::V {
        // SAFETY: 16 readable bytes by contract.
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        bits.map(|b| bf16::from_bits(b).to_f32())
    }

    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> Self::V {
        // SAFETY: 8 readable bytes by contract.
        let bytes = unsafe { p.cast::<[i8; 8]>().read_unaligned() };
        bytes.map(f32::from)
    }

    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, v: Self::V) {
        // SAFETY: 8 writable bytes by contract.
        unsafe { p.cast::<[i8; 8]>().write_unaligned(v.map(|x| x as i8)) }
    }

    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> [Self::V; 4] {
        // SAFETY: 16 readable bytes by contract.
        let bytes = unsafe { p.cast::<[u8; 16]>().read_unaligned() };
        let low = |from: usize| std::array::from_fn(|i| f32::from(bytes[from + i] & 15));
        let high = |from: usize| std::array::from_fn(|i| f32::from(bytes[from + i] >> 4));
        [low(0), low(8), high(0), high(8)]
    }

    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> Self::Bytes {
        // SAFETY: 32 readable bytes by contract.
        unsafe { p.cast::<[u8; 32]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_nibble_bytes(self, p: *const u8) -> Self::Bytes {
        // SAFETY: 16 readable bytes by contract.
        let bytes = unsafe { p.cast::<[u8; 16]>().read_unaligned() };
        std::array::from_fn(|i| if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 })
    }

    #[inline(always)]
    unsafe fn load_bits(self, p: *const u8) -> Self::Bytes {
        // SAFETY: 4 readable bytes by contract.
        let bytes = unsafe { p.cast::<[u8; 4]>().read_unaligned() };
        let bits = u32::from_le_bytes(bytes);
        std::array::from_fn(|i| if bits >> i & 1 == 1 { 0xff } else { 0 })
    }

    #[inline(always)]
    fn field(self, b: Self::Bytes, shift: u32, mask: u8) -> Self::Bytes {
        b.map(|byte| (byte >> shift) & mask)
    }

    #[inline(always)]
    fn raise(self, b: Self::Bytes, mask: u8, shift: u32) -> Self::Bytes {
        b.map(|byte| (byte & mask) << shift)
    }

    #[inline(always)]
    fn or_bytes(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        std::array::from_fn(|i| a[i] | b[i])
    }

    #[inline(always)]
    fn lookup(self, table: &[i8; 16], b: Self::Bytes) -> Self::Bytes {
        b.map(|byte| table[usize::from(byte & 15)] as u8)
    }

    #[inline(always)]
    fn widen(self, b: Self::Bytes, x: u8) -> [Self::V; 4] {
        let eight = |from: usize| std::array::from_fn(|i| f32::from(b[from + i].wrapping_sub(x) as i8));
        [eight(0), eight(8), eight(16), eight(24)]
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        map2(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn round(self, v: Self::V) -> Self::V {
        v.map(f32::round_ties_even)
    }

    #[inline(always)]
    fn pow2(self, v: Self::V) -> Self::V {
        v.map(|x| f32::from_bits(((x as i32).wrapping_add(127) as u32) << 23))
    }

    #[inline(always)]
    fn copysign(self, v: Self::V, sign: Self::V) -> Self::V {
        map2(v, sign, f32::copysign)
    }

    #[inline(always)]
    fn abs(self, v: Self::V) -> Self::V {
        v.map(f32::abs)
    }

    #[inline(always)]
    fn keep_from(self, x: Self::V, bound: Self::V, v: Self::V) -> Self::V {
        std::array::from_fn(|i| if x[i] < bound[i] { 0.0 } else { v[i] })
    }

    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    #[inline(always)]
    fn sums(self, v: [Self::V; 8]) -> Self::V {
        v.map(|v| self.sum(v))
    }
}

/// The first `n < 8` lanes from memory, the others 0.
///
/// # Safety
/// `p` is readable for `n` elements.
#[inline(always)]
pub(crate) unsafe fn load_partial<S: Simd>(s: S, p: *const f32, n: usize) -> S::V {
    let mut lanes = [0.0f32; LANES];
    // SAFETY: `n` readable elements by contract, fewer than there are lanes.
    unsafe {
        std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
        s.load(lanes.as_ptr())
    }
}

/// The first `n < 8` lanes to memory.
///
/// # Safety
/// `p` is writable for `n` elements.
#[inline(always)]
pub(crate) unsafe fn store_partial<S: Simd>(s: S, p: *mut f32, v: S::V, n: usize) {
    let mut lanes = [0.0f32; LANES];
    // SAFETY: `n` writable elements by contract, fewer than there are lanes.
    unsafe {
        s.store(lanes.as_mut_ptr(), v);
        std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
    }
}

/// `e^x` to about 2 units in the last place (Cephes' `expf`: reduction by ln 2 in two parts, degree-5 polynomial).
/// 0 below −87.3, saturated at `e^88`, NaN for NaN.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    const LOWEST: f32 = -87.3;
    let clamped = s.min(s.splat(88.0), s.max(s.splat(LOWEST), x));
    let n = s.round(s.mul(clamped, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-0.693_359_4), clamped);
    let r = s.fma(n, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.987_569_2e-4);
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5] {
        p = s.fma(p, r, s.splat(c));
    }
    let p = s.add(s.fma(p, s.mul(r, r), r), s.splat(1.0));
    s.keep_from(x, s.splat(LOWEST), s.mul(p, s.pow2(n)))
}

/// The hyperbolic tangent to a few units in the last place: an odd polynomial for small arguments (Cephes' `tanhf`),
/// `1 − 2 / (e^2|x| + 1)` beyond. NaN for NaN.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    let size = s.abs(x);
    let power = exp(s, s.add(size, size));
    let large = s.sub(one, s.div(s.splat(2.0), s.add(power, one)));
    let bound = s.splat(0.625);
    let near = s.min(size, bound);
    let square = s.mul(near, near);
    let mut p = s.splat(-5.704_988e-3);
    for c in [2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = s.fma(p, square, s.splat(c));
    }
    let small = s.fma(s.mul(p, square), near, near);
    // small − small + large where the argument is large.
    let value = s.add(s.sub(small, s.keep_from(size, bound, small)), s.keep_from(size, bound, large));
    s.copysign(value, x)
}

/// `cap · tanh(x / cap)`.
#[inline(always)]
pub(crate) fn cap_softly<S: Simd>(s: S, x: S::V, cap: f32) -> S::V {
    s.mul(tanh(s, s.div(x, s.splat(cap))), s.splat(cap))
}
