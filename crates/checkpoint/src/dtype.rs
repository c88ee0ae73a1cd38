//! Element types of stored tensors and the size arithmetic for them.
//!
//! All sizes are checked: a hostile header must never make this module overflow.

use serde::{Deserialize, Serialize};

/// How the elements of a tensor are stored. Quantised types hold blocks of 32 elements along the last dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// Upper half of a binary32.
    BF16,
    /// GGML blocks of 32: f16 scale `d`, 32 × i8 `q`; value = d·q.
    Q8_0,
    /// GGML blocks of 32: f16 scale `d`, 16 bytes of nibbles `q`; value = d·(q−8).
    Q4_0,
    /// GGML blocks of 32: f16 scale `d`, f16 minimum `m`, 16 bytes of nibbles `q`; value = d·q + m.
    Q4_1,
}

impl DType {
    /// Elements per storage block (1 for plain types).
    pub const fn block_elements(self) -> u64 {
        match self {
            DType::F32 | DType::F16 | DType::BF16 => 1,
            DType::Q8_0 | DType::Q4_0 | DType::Q4_1 => 32,
        }
    }

    /// Bytes per storage block.
    pub const fn block_bytes(self) -> u64 {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::Q8_0 => 34,
            DType::Q4_0 => 18,
            DType::Q4_1 => 20,
        }
    }

    /// Whether elements are stored in quantised blocks.
    pub const fn is_quantised(self) -> bool {
        self.block_elements() > 1
    }

    /// Bytes of a tensor with this shape (outermost dimension first). `None` if the product overflows or if the
    /// last dimension does not divide into whole blocks.
    pub fn tensor_bytes(self, shape: &[u64]) -> Option<u64> {
        let last = shape.last().copied().unwrap_or(1);
        if !last.is_multiple_of(self.block_elements()) {
            return None;
        }
        let elements = shape.iter().try_fold(1u64, |product, &dim| product.checked_mul(dim))?;
        (elements / self.block_elements()).checked_mul(self.block_bytes())
    }

    /// The name used in manifests, listings and error messages.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::Q8_0 => "q8_0",
            DType::Q4_0 => "q4_0",
            DType::Q4_1 => "q4_1",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
