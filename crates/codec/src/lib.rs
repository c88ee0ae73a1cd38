//! Lossless compression of 16-bit floating-point tensors, made to be decoded at the speed of memory.
//!
//! The exponents of trained weights are far from uniform, their signs and mantissas are close to it. So exponents are
//! entropy-coded and the rest is stored as it is: about a third of a bf16 tensor goes, an eighth of an fp16 one. The
//! coder is an interleaved rANS whose tables fit vector registers (see [`decode`]); how it lies on disk is in
//! `docs/compressed-tensors.md`.
//!
//! The crate knows neither files nor tensors. It decodes bytes of any origin: what is damaged gives an error or wrong
//! values, never a panic, an allocation, or an access outside the two slices.

mod block;
mod choice;
mod encoder;
mod frame;
mod kernels;
mod table;

pub use choice::Speeds;
pub use frame::{Corrupt, decode, decode_with, encode};
pub use kernels::Isa;

/// Which 16-bit floating-point numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Upper half of a binary32: 8 exponent bits, 7 of mantissa.
    Bf16,
    /// IEEE 754 binary16: 5 exponent bits, 10 of mantissa.
    F16,
}

impl Format {
    /// Both.
    pub const ALL: [Format; 2] = [Format::Bf16, Format::F16];

    /// Bits below the exponent when the sign is rotated to the lowest bit: mantissa and sign.
    const fn raw_bits(self) -> u32 {
        match self {
            Format::Bf16 => 8,
            Format::F16 => 11,
        }
    }

    /// Raw bits that do not fit the low byte; each makes a plane of one bit per element.
    const fn planes(self) -> usize {
        self.raw_bits() as usize - 8
    }

    /// What the format is called in a frame's header.
    const fn code(self) -> u8 {
        match self {
            Format::Bf16 => 1,
            Format::F16 => 2,
        }
    }
}

/// Elements of a block, except for a frame's last one.
pub const BLOCK_ELEMENTS: usize = 1 << 16;

/// Elements of a round: one of each coder.
const LANES: usize = 128;
