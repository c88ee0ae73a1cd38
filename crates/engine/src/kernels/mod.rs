//! CPU kernels: vector operations, weight formats, matrix products, attention, element-wise functions.
//!
//! The rule of this module: **a row's result never depends on what else is computed**. Every output element has one
//! order of additions, whatever the number of rows, the blocking, the thread and the thread count. The functions
//! exported to the rest of the crate are safe; unsafe code stays inside the kernel files.
#![allow(unsafe_code)]

pub mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod buffer;
pub mod elementwise;
mod format;
pub mod kv;
pub mod low_rank;
pub mod matmul;
pub mod routing;
mod simd;
mod super_blocks;

pub use buffer::Buffer;
pub use format::dequantise_row;

use simd::{Scalar, Simd};

/// The instruction set that kernels run on.
#[derive(Clone, Copy, Debug)]
pub struct Isa(Kind);

#[derive(Clone, Copy, Debug)]
enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
}

impl Isa {
    /// The best instruction set of this processor.
    pub fn detect() -> Isa {
        Isa::available().last().copied().unwrap_or(Isa(Kind::Scalar))
    }

    /// All that this processor can run, from plain code to the best.
    pub fn available() -> Vec<Isa> {
        let mut available = vec![Isa(Kind::Scalar)];
        #[cfg(target_arch = "x86_64")]
        {
            available.extend(avx2::Avx2::detect().map(|proof| Isa(Kind::Avx2(proof))));
            available.extend(avx512::Avx512::detect().map(|proof| Isa(Kind::Avx512(proof))));
        }
        available
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

    /// Runs a kernel compiled for this instruction set.
    #[inline]
    fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Kind::Scalar => kernel.run(Scalar),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the token proves that the processor has the instructions.
            Kind::Avx2(proof) => unsafe { run_avx2(proof, kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Kind::Avx512(proof) => unsafe { run_avx512(proof, kernel) },
        }
    }
}

/// The arguments of a kernel. `run` must be `#[inline(always)]`, as must everything it calls that handles vectors:
/// only then is it compiled with the instructions of the caller.
trait Kernel {
    type Output;
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// # Safety
/// The processor has AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<K: Kernel>(proof: avx2::Avx2, kernel: K) -> K::Output {
    kernel.run(proof)
}

/// # Safety
/// The processor has AVX-512 F, VL, BW and DQ, AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
unsafe fn run_avx512<K: Kernel>(proof: avx512::Avx512, kernel: K) -> K::Output {
    kernel.run(proof)
}

#[cfg(test)]
mod tests;
