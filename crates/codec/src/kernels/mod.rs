//! Decoding of rounds of 128 elements, once per instruction set. All of them give the same bytes.
//!
//! Unsafe code stays in the files of this module: vector loads and stores whose bounds are checked once per round.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;

use crate::block::{Coded, Cursor};

/// The instruction set that decodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Proof),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Proof),
}

impl Isa {
    /// The best of this processor.
    pub fn detect() -> Isa {
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(proof) = avx512::Proof::detect() {
                return Isa(Kind::Avx512(proof));
            }
            if let Some(proof) = avx2::Proof::detect() {
                return Isa(Kind::Avx2(proof));
            }
        }
        Isa(Kind::Scalar)
    }

    /// All that this processor has, from plain code to the best.
    pub fn available() -> Vec<Isa> {
        #[cfg(target_arch = "x86_64")]
        let vector = [avx2::Proof::detect().map(Kind::Avx2), avx512::Proof::detect().map(Kind::Avx512)];
        #[cfg(not(target_arch = "x86_64"))]
        let vector = [None; 0];
        std::iter::once(Kind::Scalar).chain(vector.into_iter().flatten()).map(Isa).collect()
    }

    /// The name for logs.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
        }
    }
}

/// Decodes all elements of a block. What is damaged leaves the cursor elsewhere than at the end of both of its parts, or
/// some coder not at rest.
pub(crate) fn decode(isa: Isa, coded: &Coded<'_>, cursor: &mut Cursor, out: &mut [u8]) {
    let rounds = match isa.0 {
        Kind::Scalar => 0,
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2(proof) => avx2::rounds(proof, coded, cursor, out),
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512(proof) => avx512::rounds(proof, coded, cursor, out),
    };
    scalar::from_round(rounds, coded, cursor, out);
}
