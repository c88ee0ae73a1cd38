//! Encodes f32 values as stored elements; quantised types by the straightforward rounding of each block of 32.

use half::{bf16, f16};

use crate::model::Float;

/// Tensor types of GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgmlType {
    /// Plain f32.
    F32,
    /// Plain f16.
    F16,
    /// Plain bf16.
    BF16,
    /// 8 bits and an f16 scale.
    Q8_0,
    /// 4 bits and an f16 scale.
    Q4_0,
    /// 4 bits, an f16 scale and an f16 minimum.
    Q4_1,
}

impl GgmlType {
    /// The number by which GGUF files name it.
    pub(crate) const fn number(self) -> u32 {
        match self {
            GgmlType::F32 => 0,
            GgmlType::F16 => 1,
            GgmlType::Q4_0 => 2,
            GgmlType::Q4_1 => 3,
            GgmlType::Q8_0 => 8,
            GgmlType::BF16 => 30,
        }
    }

    /// Encodes values; their number must be a multiple of 32 for quantised types.
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            GgmlType::F32 => Float::F32.encode(values),
            GgmlType::F16 => Float::F16.encode(values),
            GgmlType::BF16 => Float::BF16.encode(values),
            GgmlType::Q8_0 => blocks(values, q8_0),
            GgmlType::Q4_0 => blocks(values, q4_0),
            GgmlType::Q4_1 => blocks(values, q4_1),
        }
    }
}

impl Float {
    /// The name in safetensors headers.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Float::F32 => "F32",
            Float::F16 => "F16",
            Float::BF16 => "BF16",
        }
    }

    /// Encodes values, little-endian.
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        match self {
            Float::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
            Float::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
            Float::BF16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        }
    }

    /// The inverse of [`Float::encode`].
    pub fn decode(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Float::F32 => bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
            Float::F16 => {
                bytes.as_chunks().0.iter().map(|&bytes| f16::from_le_bytes(bytes).to_f32()).collect()
            }
            Float::BF16 => {
                bytes.as_chunks().0.iter().map(|&bytes| bf16::from_le_bytes(bytes).to_f32()).collect()
            }
        }
    }
}

fn blocks(values: &[f32], encode: fn(&[f32; 32], &mut Vec<u8>)) -> Vec<u8> {
    let (blocks, rest) = values.as_chunks::<32>();
    assert!(rest.is_empty(), "{} values are no whole number of blocks", values.len());
    let mut bytes = Vec::new();
    for block in blocks {
        encode(block, &mut bytes);
    }
    bytes
}

/// 1 / scale, or 0 for a block of zeros.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

fn q8_0(block: &[f32; 32], out: &mut Vec<u8>) {
    let scale = block.iter().fold(0f32, |largest, value| largest.max(value.abs())) / 127.0;
    out.extend(f16::from_f32(scale).to_le_bytes());
    out.extend(block.iter().map(|value| (value * inverse(scale)).round() as i8 as u8));
}

/// Nibbles: the first half of a block in the low ones, the second half in the high ones.
fn nibbles(block: &[f32; 32], out: &mut Vec<u8>, quantise: impl Fn(f32) -> f32) {
    let quantise = |value: f32| quantise(value).clamp(0.0, 15.0) as u8;
    let (low, high) = block.split_at(16);
    out.extend(low.iter().zip(high).map(|(&low, &high)| quantise(low) | quantise(high) << 4));
}

fn q4_0(block: &[f32; 32], out: &mut Vec<u8>) {
    // The value that is largest in size becomes -8, the end of the range that has no opposite.
    let extreme =
        block.iter().fold(0f32, |extreme, &value| if value.abs() > extreme.abs() { value } else { extreme });
    let scale = extreme / -8.0;
    out.extend(f16::from_f32(scale).to_le_bytes());
    nibbles(block, out, |value| (value * inverse(scale) + 8.5).floor());
}

fn q4_1(block: &[f32; 32], out: &mut Vec<u8>) {
    let minimum = block.iter().copied().fold(f32::INFINITY, f32::min);
    let maximum = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scale = (maximum - minimum) / 15.0;
    out.extend(f16::from_f32(scale).to_le_bytes());
    out.extend(f16::from_f32(minimum).to_le_bytes());
    nibbles(block, out, |value| ((value - minimum) * inverse(scale)).round());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes one block by the definition of the types.
    fn decode(kind: GgmlType, block: &[u8]) -> Vec<f32> {
        let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let nibbles = |from: usize| {
            let low = block[from..].iter().map(|byte| f32::from(byte & 15));
            let high = block[from..].iter().map(|byte| f32::from(byte >> 4));
            low.chain(high).collect::<Vec<f32>>()
        };
        match kind {
            GgmlType::Q8_0 => block[2..].iter().map(|&byte| half(0) * f32::from(byte as i8)).collect(),
            GgmlType::Q4_0 => nibbles(2).iter().map(|value| half(0) * (value - 8.0)).collect(),
            _ => nibbles(4).iter().map(|value| half(0) * value + half(2)).collect(),
        }
    }

    #[test]
    fn quantised_values_are_near_the_originals() {
        let values: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 20.0) / 40.0).collect();
        for (kind, bytes, tolerance) in
            [(GgmlType::Q8_0, 34, 0.006), (GgmlType::Q4_0, 18, 0.14), (GgmlType::Q4_1, 20, 0.06)]
        {
            let encoded = kind.encode(&values);
            assert_eq!(encoded.len(), 2 * bytes);
            let decoded: Vec<f32> = encoded.chunks(bytes).flat_map(|block| decode(kind, block)).collect();
            for (value, decoded) in values.iter().zip(decoded) {
                assert!((value - decoded).abs() <= tolerance, "{kind:?}: {value} became {decoded}");
            }
            assert_eq!(kind.encode(&[0.0; 32]).len(), bytes);
        }
    }

    #[test]
    fn floats_come_back() {
        let values = [0.0, -1.5, 2.0, 0.25];
        for float in [Float::F32, Float::F16, Float::BF16] {
            assert_eq!(float.decode(&float.encode(&values)), values);
        }
    }
}
