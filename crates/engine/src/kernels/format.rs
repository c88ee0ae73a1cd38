//! Weight formats: how 32 consecutive weights of a row become four vectors of f32.
//!
//! Every kernel gets its weights from [`Format::load32`], so a stored weight has one f32 value everywhere. The formats
//! with blocks of 256 are in `super_blocks`.
#![allow(unsafe_code)]

use tangram_checkpoint::DType;

use super::simd::{LANES, Simd};
use super::super_blocks::{Q2K, Q3K, Q4K, Q5K, Q6K};
use super::{Isa, Kernel};

/// Elements that are loaded at a time; also the GGML block.
pub(crate) const GROUP: usize = 32;

/// A stored element type. Rows are made of blocks of one or several groups.
pub(crate) trait Format {
    /// Groups of a block.
    const BLOCK_GROUPS: usize = 1;

    /// Bytes of a block.
    const BLOCK_BYTES: usize;

    /// What the groups of a block share, made ready once per block.
    type Common: Copy;

    /// # Safety
    /// `block` is readable for `BLOCK_BYTES`; no alignment is needed.
    unsafe fn common<S: Simd>(s: S, block: *const u8) -> Self::Common;

    /// The 32 elements of a group of the block at `block`.
    ///
    /// # Safety
    /// `block` is readable for `BLOCK_BYTES`; no alignment is needed. `common` is this block's, `group` less than
    /// `BLOCK_GROUPS`.
    unsafe fn load32<S: Simd>(s: S, block: *const u8, common: Self::Common, group: usize) -> [S::V; 4];
}

/// Chooses the format of a type: `$run` is a macro that is given the format.
macro_rules! with_format {
    ($dtype:expr, $run:ident) => {
        match $dtype {
            DType::F32 => $run!(F32),
            DType::F16 => $run!(F16),
            DType::BF16 => $run!(Bf16),
            DType::Q8_0 => $run!(Q8_0),
            DType::Q4_0 => $run!(Q4_0),
            DType::Q4_1 => $run!(Q4_1),
            DType::Q5_0 => $run!(Q5_0),
            DType::Q5_1 => $run!(Q5_1),
            DType::Q2K => $run!(Q2K),
            DType::Q3K => $run!(Q3K),
            DType::Q4K => $run!(Q4K),
            DType::Q5K => $run!(Q5K),
            DType::Q6K => $run!(Q6K),
            DType::Iq4Nl => $run!(Iq4Nl),
        }
    };
}

/// A format whose blocks are single groups with nothing to make ready.
macro_rules! single_groups {
    ($($format:ident: $bytes:literal bytes, |$s:ident, $p:ident| $load:expr;)*) => {
        $(
            pub(crate) struct $format;

            impl Format for $format {
                const BLOCK_BYTES: usize = $bytes;
                type Common = ();

                #[inline(always)]
                unsafe fn common<S: Simd>(_: S, _: *const u8) {}

                #[inline(always)]
                unsafe fn load32<S: Simd>($s: S, $p: *const u8, _: (), _: usize) -> [S::V; 4] {
                    // SAFETY: every offset and length is inside the block, which is readable by contract.
                    unsafe { $load }
                }
            }
        )*
    };
}

single_groups! {
    F32: 128 bytes, |s, p| {
        [s.load(p.cast()), s.load(p.add(32).cast()), s.load(p.add(64).cast()), s.load(p.add(96).cast())]
    };
    F16: 64 bytes, |s, p| {
        [s.load_f16(p), s.load_f16(p.add(16)), s.load_f16(p.add(32)), s.load_f16(p.add(48))]
    };
    Bf16: 64 bytes, |s, p| {
        [s.load_bf16(p), s.load_bf16(p.add(16)), s.load_bf16(p.add(32)), s.load_bf16(p.add(48))]
    };
    Q8_0: 34 bytes, |s, p| {
        let d = s.splat_f16(p);
        times(s, d, [s.load_i8(p.add(2)), s.load_i8(p.add(10)), s.load_i8(p.add(18)), s.load_i8(p.add(26))])
    };
    Q4_0: 18 bytes, |s, p| {
        let d = s.splat_f16(p);
        let eight = s.splat(8.0);
        let [q, r, t, u] = s.load_nibbles(p.add(2));
        times(s, d, [s.sub(q, eight), s.sub(r, eight), s.sub(t, eight), s.sub(u, eight)])
    };
    Q4_1: 20 bytes, |s, p| {
        let (d, m) = (s.splat_f16(p), s.splat_f16(p.add(2)));
        times_plus(s, d, s.load_nibbles(p.add(4)), m)
    };
    Q5_0: 22 bytes, |s, p| {
        let d = s.splat_f16(p);
        let high = s.raise(s.load_bits(p.add(2)), 1, 4);
        times(s, d, s.widen(s.or_bytes(s.load_nibble_bytes(p.add(6)), high), 16))
    };
    Q5_1: 24 bytes, |s, p| {
        let (d, m) = (s.splat_f16(p), s.splat_f16(p.add(2)));
        let high = s.raise(s.load_bits(p.add(4)), 1, 4);
        times_plus(s, d, s.widen(s.or_bytes(s.load_nibble_bytes(p.add(8)), high), 0), m)
    };
    Iq4Nl: 18 bytes, |s, p| {
        let d = s.splat_f16(p);
        times(s, d, s.widen(s.lookup(&IQ4_NL_VALUES, s.load_nibble_bytes(p.add(2))), 0))
    };
}

/// d · q. No closure over the four vectors: those are not inlined reliably (see `elementwise`).
#[inline(always)]
fn times<S: Simd>(s: S, d: S::V, q: [S::V; 4]) -> [S::V; 4] {
    [s.mul(d, q[0]), s.mul(d, q[1]), s.mul(d, q[2]), s.mul(d, q[3])]
}

/// d · q + m.
#[inline(always)]
pub(super) fn times_plus<S: Simd>(s: S, d: S::V, q: [S::V; 4], m: S::V) -> [S::V; 4] {
    [s.fma(d, q[0], m), s.fma(d, q[1], m), s.fma(d, q[2], m), s.fma(d, q[3], m)]
}

/// What the nibbles of IQ4_NL stand for.
pub(crate) const IQ4_NL_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The last, incomplete group of a row of a plain type, padded with zeros to 32 elements.
///
/// # Safety
/// `p` is readable for `elements · BLOCK_BYTES / 32` bytes and `elements < 32`; the format is plain.
#[inline(always)]
pub(crate) unsafe fn load_tail<S: Simd, F: Format>(s: S, p: *const u8, elements: usize) -> [S::V; 4] {
    let mut padded = [0u8; 128];
    assert!(F::BLOCK_GROUPS == 1 && F::BLOCK_BYTES <= padded.len());
    // SAFETY: the source by contract; fewer than BLOCK_BYTES <= 128 bytes are written, BLOCK_BYTES are read.
    unsafe {
        std::ptr::copy_nonoverlapping(p, padded.as_mut_ptr(), elements * (F::BLOCK_BYTES / GROUP));
        F::load32(s, padded.as_ptr(), F::common(s, padded.as_ptr()), 0)
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
            let blocks = len / (GROUP * F::BLOCK_GROUPS);
            for block in 0..blocks {
                let weights = row.add(block * F::BLOCK_BYTES);
                let common = F::common(s, weights);
                for group in 0..F::BLOCK_GROUPS {
                    let to = out.add((block * F::BLOCK_GROUPS + group) * GROUP);
                    for (u, &value) in F::load32(s, weights, common, group).iter().enumerate() {
                        s.store(to.add(u * LANES), value);
                    }
                }
            }
            let tail = len % GROUP;
            if tail > 0 {
                let mut padded = [0.0f32; GROUP];
                let values = load_tail::<S, F>(s, row.add(blocks * F::BLOCK_BYTES), tail);
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
    with_format!(dtype, run)
}
