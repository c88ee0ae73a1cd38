//! Weight formats: how 32 consecutive weights of a row become four vectors of f32.
//!
//! Every kernel gets its weights from [`Format::load32`], so a stored weight has one f32 value everywhere.
#![allow(unsafe_code)]

use tangram_checkpoint::DType;

use super::simd::{LANES, Simd};
use super::{Isa, Kernel};

/// Elements that are loaded at a time; also the GGML block.
pub(crate) const GROUP: usize = 32;

/// A stored element type.
pub(crate) trait Format {
    /// Bytes of 32 elements.
    const GROUP_BYTES: usize;

    /// The 32 elements at `p`.
    ///
    /// # Safety
    /// `p` is readable for `GROUP_BYTES`; no alignment is needed.
    unsafe fn load32<S: Simd>(s: S, p: *const u8) -> [S::V; 4];
}

pub(crate) struct F32;
pub(crate) struct F16;
pub(crate) struct Bf16;
pub(crate) struct Q8_0;
pub(crate) struct Q4_0;
pub(crate) struct Q4_1;

impl Format for F32 {
    const GROUP_BYTES: usize = 128;

    #[inline(always)]
    unsafe fn load32<S: Simd>(s: S, p: *const u8) -> [S::V; 4] {
        // SAFETY: 128 readable bytes by contract.
        unsafe {
            [s.load(p.cast()), s.load(p.add(32).cast()), s.load(p.add(64).cast()), s.load(p.add(96).cast())]
        }
    }
}

impl Format for F16 {
    const GROUP_BYTES: usize = 64;

    #[inline(always)]
    unsafe fn load32<S: Simd>(s: S, p: *const u8) -> [S::V; 4] {
        // SAFETY: 64 readable bytes by contract.
        unsafe { [s.load_f16(p), s.load_f16(p.add(16)), s.load_f16(p.add(32)), s.load_f16(p.add(48))] }
    }
}

impl Format for Bf16 {
    const GROUP_BYTES: usize = 64;

    #[inline(always)]
    unsafe fn load32<S: Simd>(s: S, p: *const u8) -> [S::V; 4] {
        // SAFETY: 64 readable bytes by contract.
        unsafe { [s.load_bf16(p), s.load_bf16(p.add(16)), s.load_bf16(p.add(32)), s.load_bf16(p.add(48))] }
    }
}

impl Format for Q8_0 {
    const GROUP_BYTES: usize = 34;

    #[inline(always)]
    unsafe fn load32<S: Simd>(s: S, p: *const u8) -> [S::V; 4] {
        // SAFETY: 34 readable bytes by contract.
        unsafe {
            let d = s.splat_f16(p);
            [
                s.mul(d, s.load_i8(p.add(2))),
                s.mul(d, s.load_i8(p.add(10))),
                s.mul(d, s.load_i8(p.add(18))),
                s.mul(d, s.load_i8(p.add(26))),
            ]
        }
    }
}

impl Format for Q4_0 {
    const GROUP_BYTES: usize = 18;

    #[inline(always)]
    unsafe fn load32<S: Simd>(s: S, p: *const u8) -> [S::V; 4] {
        // SAFETY: 18 readable bytes by contract.
        unsafe {
            let d = s.splat_f16(p);
            let eight = s.splat(8.0);
            let [a, b, c, e] = s.load_nibbles(p.add(2));
            [
                s.mul(d, s.sub(a, eight)),
                s.mul(d, s.sub(b, eight)),
                s.mul(d, s.sub(c, eight)),
                s.mul(d, s.sub(e, eight)),
            ]
        }
    }
}

impl Format for Q4_1 {
    const GROUP_BYTES: usize = 20;

    #[inline(always)]
    unsafe fn load32<S: Simd>(s: S, p: *const u8) -> [S::V; 4] {
        // SAFETY: 20 readable bytes by contract.
        unsafe {
            let d = s.splat_f16(p);
            let m = s.splat_f16(p.add(2));
            let [a, b, c, e] = s.load_nibbles(p.add(4));
            [s.fma(d, a, m), s.fma(d, b, m), s.fma(d, c, m), s.fma(d, e, m)]
        }
    }
}

/// The last, incomplete group of a row of a plain type, padded with zeros to 32 elements.
///
/// # Safety
/// `p` is readable for `elements · GROUP_BYTES / 32` bytes and `elements < 32`.
#[inline(always)]
pub(crate) unsafe fn load_tail<S: Simd, F: Format>(s: S, p: *const u8, elements: usize) -> [S::V; 4] {
    let mut padded = [0u8; 128];
    // SAFETY: the source by contract; fewer than GROUP_BYTES <= 128 bytes are written, GROUP_BYTES are read.
    unsafe {
        std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), elements * (F::GROUP_BYTES / GROUP));
        F::load32(s, padded.as_ptr())
    }
}

struct Dequantise<'a, F> {
    row: &'a [u8],
    out: &'a mut [f32],
    format: std::marker::PhantomData<F>,
}

impl<F: Format> Kernel for Dequantise<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let len = self.out.len();
        let out = self.out.as_mut_ptr();
        let row = self.row.as_ptr();
        // SAFETY: `dequantise_row` checked that `row` holds `len` elements.
        unsafe {
            for group in 0..len / GROUP {
                let values = F::load32(s, row.add(group * F::GROUP_BYTES));
                for (u, &value) in values.iter().enumerate() {
                    s.store(out.add(group * GROUP + u * LANES), value);
                }
            }
            let tail = len % GROUP;
            if tail > 0 {
                let mut padded = [0.0f32; GROUP];
                let values = load_tail::<S, F>(s, row.add(len / GROUP * F::GROUP_BYTES), tail);
                for (u, &value) in values.iter().enumerate() {
                    s.store(padded.as_mut_ptr().add(u * LANES), value);
                }
                std::ptr::copy_nonoverlapping(padded.as_ptr(), out.add(len - tail), tail);
            }
        }
    }
}

/// Widens the stored elements of one row (or vector) to f32. `row` must be exactly the bytes of `out.len()` elements;
/// panics otherwise.
pub fn dequantise_row(isa: Isa, dtype: DType, row: &[u8], out: &mut [f32]) {
    let bytes = dtype.tensor_bytes(&[out.len() as u64]);
    assert_eq!(bytes, Some(row.len() as u64), "{} elements of {dtype}", out.len());
    macro_rules! run {
        ($format:ty) => {
            isa.dispatch(Dequantise::<$format> { row, out, format: std::marker::PhantomData })
        };
    }
    match dtype {
        DType::F32 => run!(F32),
        DType::F16 => run!(F16),
        DType::BF16 => run!(Bf16),
        DType::Q8_0 => run!(Q8_0),
        DType::Q4_0 => run!(Q4_0),
        DType::Q4_1 => run!(Q4_1),
    }
}
