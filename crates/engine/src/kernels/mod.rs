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
mod blocks;
mod buffer;
pub mod elementwise;
mod format;
pub mod kv;
mod lanes;
#[cfg(target_arch = "x86_64")]
mod lanes_avx2;
#[cfg(target_arch = "x86_64")]
mod lanes_avx512;
pub mod low_rank;
pub mod matmul;
mod pairs;
#[cfg(target_arch = "x86_64")]
mod pairs_avx512;
mod panels;
mod plain;
mod quantised;
pub mod routing;
mod simd;
mod super_blocks;

pub use buffer::Buffer;
pub use format::dequantise_row;

use lanes::LanesKernel;
use simd::{Scalar, Simd};

/// The instruction set that kernels run on.
#[derive(Clone, Copy, Debug)]
pub struct Isa {
    name: &'static str,
    kind: Kind,
    lanes: LanesKind,
}

/// Instructions for floating-point kernels.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
}

/// Instructions for matrix products.
#[derive(Clone, Copy, Debug)]
enum LanesKind {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(lanes_avx2::Lanes8),
    #[cfg(target_arch = "x86_64")]
    AvxVnni(lanes_avx2::Lanes8Vnni),
    #[cfg(target_arch = "x86_64")]
    Avx512(lanes_avx512::Lanes16<false>),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(lanes_avx512::Lanes16<true>),
}

impl Isa {
    /// The best instruction set of this processor.
    pub fn detect() -> Isa {
        Isa::available().last().copied().unwrap_or(Isa::SCALAR)
    }

    const SCALAR: Isa = Isa { name: "scalar", kind: Kind::Scalar, lanes: LanesKind::Scalar };

    /// All that this processor can run, from plain code to the best.
    pub fn available() -> Vec<Isa> {
        let mut available = vec![Isa::SCALAR];
        #[cfg(target_arch = "x86_64")]
        if let Some(proof) = avx2::Avx2::detect() {
            let (kind, lanes) = (Kind::Avx2(proof), LanesKind::Avx2(lanes_avx2::Lanes8::new(proof)));
            available.push(Isa { name: "avx2", kind, lanes });
            let vnni = lanes_avx2::Lanes8Vnni::detect().map(LanesKind::AvxVnni);
            available.extend(vnni.map(|lanes| Isa { name: "avx2-vnni", kind, lanes }));
            if let Some(proof) = avx512::Avx512::detect() {
                let (kind, lanes) =
                    (Kind::Avx512(proof), LanesKind::Avx512(lanes_avx512::Lanes16::new(proof)));
                available.push(Isa { name: "avx512", kind, lanes });
                let vnni = lanes_avx512::Lanes16::detect().map(LanesKind::Avx512Vnni);
                available.extend(vnni.map(|lanes| Isa { name: "avx512-vnni", kind, lanes }));
            }
        }
        available
    }

    /// The name for logs.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Runs a kernel compiled for this instruction set.
    #[inline]
    fn dispatch<K: Kernel>(self, kernel: K) -> K::Output {
        match self.kind {
            Kind::Scalar => kernel.run(Scalar),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the token proves that the processor has the instructions.
            Kind::Avx2(proof) => unsafe { run_avx2(proof, kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Kind::Avx512(proof) => unsafe { run_avx512(proof, kernel) },
        }
    }

    /// [`Isa::dispatch`] for matrix products.
    #[inline]
    fn dispatch_lanes<K: LanesKernel>(self, kernel: K) -> K::Output {
        match self.lanes {
            LanesKind::Scalar => kernel.run(Scalar),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the token proves that the processor has the instructions.
            LanesKind::Avx2(proof) => unsafe { lanes_on_avx2(proof, kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            LanesKind::AvxVnni(proof) => unsafe { lanes_on_avx_vnni(proof, kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            LanesKind::Avx512(proof) => unsafe { lanes_on_avx512(proof, kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            LanesKind::Avx512Vnni(proof) => unsafe { lanes_on_avx512_vnni(proof, kernel) },
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

/// # Safety
/// The processor has AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn lanes_on_avx2<K: LanesKernel>(proof: lanes_avx2::Lanes8, kernel: K) -> K::Output {
    kernel.run(proof)
}

/// # Safety
/// The processor has AVX-VNNI, AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avxvnni,avx2,fma,f16c")]
unsafe fn lanes_on_avx_vnni<K: LanesKernel>(proof: lanes_avx2::Lanes8Vnni, kernel: K) -> K::Output {
    kernel.run(proof)
}

/// # Safety
/// The processor has AVX-512 F, VL, BW and DQ, AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
unsafe fn lanes_on_avx512<K: LanesKernel>(proof: lanes_avx512::Lanes16<false>, kernel: K) -> K::Output {
    kernel.run(proof)
}

/// # Safety
/// The processor has AVX-512 F, VL, BW, DQ and VNNI, AVX2, FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma,f16c")]
unsafe fn lanes_on_avx512_vnni<K: LanesKernel>(proof: lanes_avx512::Lanes16<true>, kernel: K) -> K::Output {
    kernel.run(proof)
}

#[cfg(test)]
mod tests;
