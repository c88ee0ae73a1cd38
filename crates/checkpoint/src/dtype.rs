//! Element types of stored tensors and the size arithmetic for them.
//!
//! All sizes are checked: a hostile header must never make this module overflow.

use serde::{Deserialize, Serialize};

/// How the elements of a tensor are stored. Quantised types hold blocks of 32 or 256 elements along the last dimension;
/// nibbles hold the first half of their 32 elements in the low bits, the second half in the high ones.
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
    /// GGML blocks of 32: f16 scale `d`, 32 fifth bits, 16 bytes of nibbles; value = d·(q−16).
    Q5_0,
    /// GGML blocks of 32: f16 scale `d`, f16 minimum `m`, 32 fifth bits, 16 bytes of nibbles; value = d·q + m.
    Q5_1,
    /// GGML blocks of 256: 16 bytes of 4-bit scales `s` and minima `m` of 16 elements each, 2-bit `q`, f16 `d` and
    /// `e`; value = d·s·q − e·m.
    #[serde(rename = "q2_k")]
    Q2K,
    /// GGML blocks of 256: third bits, 2-bit `q`, 6-bit scales `s` of 16 elements each, f16 `d`;
    /// value = d·(s−32)·(q−4).
    #[serde(rename = "q3_k")]
    Q3K,
    /// GGML blocks of 256: f16 `d` and `e`, 6-bit scales `s` and minima `m` of 32 elements each, nibbles `q`;
    /// value = d·s·q − e·m.
    #[serde(rename = "q4_k")]
    Q4K,
    /// As [`DType::Q4K`] with fifth bits of `q`.
    #[serde(rename = "q5_k")]
    Q5K,
    /// GGML blocks of 256: nibbles and upper two bits of `q`, i8 scales `s` of 16 elements each, f16 `d`;
    /// value = d·s·(q−32).
    #[serde(rename = "q6_k")]
    Q6K,
    /// GGML blocks of 32: f16 scale `d`, 16 bytes of nibbles that choose from 16 unevenly spaced values `v`;
    /// value = d·v.
    #[serde(rename = "iq4_nl")]
    Iq4Nl,
}

impl DType {
    /// Elements per storage block (1 for plain types).
    pub const fn block_elements(self) -> u64 {
        match self {
            DType::F32 | DType::F16 | DType::BF16 => 1,
            DType::Q8_0 | DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 | DType::Iq4Nl => 32,
            DType::Q2K | DType::Q3K | DType::Q4K | DType::Q5K | DType::Q6K => 256,
        }
    }

    /// Bytes per storage block.
    pub const fn block_bytes(self) -> u64 {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::Q8_0 => 34,
            DType::Q4_0 | DType::Iq4Nl => 18,
            DType::Q4_1 => 20,
            DType::Q5_0 => 22,
            DType::Q5_1 => 24,
            DType::Q2K => 84,
            DType::Q3K => 110,
            DType::Q4K => 144,
            DType::Q5K => 176,
            DType::Q6K => 210,
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
            DType::Q5_0 => "q5_0",
            DType::Q5_1 => "q5_1",
            DType::Q2K => "q2_k",
            DType::Q3K => "q3_k",
            DType::Q4K => "q4_k",
            DType::Q5K => "q5_k",
            DType::Q6K => "q6_k",
            DType::Iq4Nl => "iq4_nl",
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
