//! CPU kernels: vector operations, weight formats, matrix products, attention, element-wise functions.
//!
//! The rule of this module: **a row's result never depends on what else is computed**. Every output element has one
//! order of additions, whatever the number of rows, the blocking, the thread and the thread count. The functions
//! exported to the rest of the crate are safe; unsafe code stays inside the kernel files.
#![allow(unsafe_code)]

pub mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod buffer;
pub mod elementwise;
mod format;
pub mod kv;
pub mod matmul;
mod simd;

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
}

impl Isa {
    /// The best instruction set of this processor.
    pub fn detect() -> Isa {
        #[cfg(target_arch = "x86_64")]
        if let Some(proof) = avx2::Avx2::detect() {
            return Isa(Kind::Avx2(proof));
        }
        Isa::scalar()
    }

    /// Plain code that runs everywhere.
    pub fn scalar() -> Isa {
        Isa(Kind::Scalar)
    }

    /// The name for logs.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
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

#[cfg(test)]
mod tests;
