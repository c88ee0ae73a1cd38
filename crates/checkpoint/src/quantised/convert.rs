//! Makes the rows of a matrix from quantised values, scales and zero points. Reads what the rows need and no more;
//! memory is bounded by the rows that are asked for.
//!
//! The formats: e4m3 is the OCP 8-bit format (arXiv 2209.05433); GPTQ's words are AutoGPTQ's, AWQ's are AutoAWQ's "gemm".

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use crate::config::{Packing, ZeroPoint};
use crate::file::{ReadAt, SourceFile};
use crate::{CheckpointError, DType};

/// A tensor in a file.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) file: Arc<SourceFile>,
    /// Its first byte.
    pub(super) offset: u64,
}

impl Part {
    /// Fills `buffer` from byte `at` of the tensor.
    pub(super) fn read(&self, buffer: &mut [u8], at: u64) -> Result<(), CheckpointError> {
        self.file.read_exact_at(buffer, self.offset + at)
    }

    /// 32-bit words from word `at` on.
    fn words(&self, words: &mut Vec<u32>, at: u64, count: usize) -> Result<(), CheckpointError> {
        let mut bytes = vec![0; count * 4];
        self.read(&mut bytes, at * 4)?;
        words.clear();
        words.extend(bytes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)));
        Ok(())
    }

    /// Numbers of type `float` from number `at` on. Each must be finite.
    fn floats(&self, float: Float, name: &str, at: u64, count: usize) -> Result<Vec<f32>, CheckpointError> {
        let size = float.bytes();
        let mut bytes = vec![0; count * size];
        self.read(&mut bytes, at * size as u64)?;
        let floats: Vec<f32> = bytes.chunks_exact(size).map(|bytes| float.value(bytes)).collect();
        if let Some(odd) = floats.iter().find(|float| !float.is_finite()) {
            return Err(self.invalid(format!("a scale of {name} is {odd}; download the file again")));
        }
        Ok(floats)
    }

    fn invalid(&self, message: String) -> CheckpointError {
        CheckpointError::invalid(&self.file.path, message)
    }
}

/// Types of scales.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Float {
    F32,
    F16,
    BF16,
}

impl Float {
    /// The name in safetensors headers.
    pub(super) fn name(self) -> &'static str {
        match self {
            Float::F32 => "F32",
            Float::F16 => "F16",
            Float::BF16 => "BF16",
        }
    }

    fn bytes(self) -> usize {
        match self {
            Float::F32 => 4,
            Float::F16 | Float::BF16 => 2,
        }
    }

    fn value(self, bytes: &[u8]) -> f32 {
        match (self, bytes) {
            (Float::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (Float::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
            (Float::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
            _ => f32::NAN,
        }
    }
}

/// What scales of FP8 values are for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Scales {
    /// One for all.
    Tensor,
    /// One for each output.
    Row,
    /// One for each block of `rows` outputs and `columns` inputs, `across` of them side by side.
    Block { rows: u64, columns: u64, across: u64 },
}

/// How a matrix is stored.
#[derive(Debug)]
pub(super) enum Code {
    Fp8 {
        values: Part,
        scales: Part,
        float: Float,
        kind: Scales,
    },
    Int4 {
        values: Part,
        zeros: Part,
        scales: Part,
        float: Float,
        packing: Packing,
        zero: ZeroPoint,
        outputs: u64,
        /// Inputs of a group.
        group: u64,
        /// The group of every input, where groups do not follow each other.
        order: Option<Vec<u32>>,
    },
}

impl Code {
    /// The bytes of these rows (outputs) as elements of type `dtype`.
    pub(super) fn rows(
        &self,
        name: &str,
        dtype: DType,
        columns: u64,
        rows: Range<u64>,
    ) -> Result<Vec<u8>, CheckpointError> {
        match self {
            Code::Fp8 { values, scales, float, kind } => {
                let mut codes = vec![0; ((rows.end - rows.start) * columns) as usize];
                values.read(&mut codes, rows.start * columns)?;
                // Scales lie in rows of their own, `across` of them for `wide` inputs each.
                let (across, wide) = match *kind {
                    Scales::Tensor | Scales::Row => (1, columns),
                    Scales::Block { columns: wide, across, .. } => (across, wide),
                };
                let scale_row = |row: u64| match *kind {
                    Scales::Tensor => 0,
                    Scales::Row => row,
                    Scales::Block { rows: high, .. } => row / high,
                };
                let first = scale_row(rows.start);
                let count = scale_row(rows.end.saturating_sub(1)) + 1 - first;
                let scales = scales.floats(*float, name, first * across, (count * across) as usize)?;
                let mut bytes = Vec::with_capacity(codes.len() * 2);
                // All values that a code can have under each scale, made when the scales change.
                let mut tables = Vec::new();
                let mut tables_of = None;
                for (row, codes) in rows.zip(codes.chunks_exact(columns as usize)) {
                    let of = scale_row(row) - first;
                    if tables_of.replace(of) != Some(of) {
                        let scales = scales.iter().skip((of * across) as usize).take(across as usize);
                        tables = scales.map(|&scale| scaled(scale)).collect();
                    }
                    for (codes, table) in codes.chunks(wide as usize).zip(&tables) {
                        codes.iter().for_each(|&code| bytes.extend_from_slice(&table[usize::from(code)]));
                    }
                }
                Ok(bytes)
            }
            Code::Int4 { .. } => self.int4(name, dtype, columns as usize, rows),
        }
    }

    fn int4(
        &self,
        name: &str,
        dtype: DType,
        columns: usize,
        rows: Range<u64>,
    ) -> Result<Vec<u8>, CheckpointError> {
        let Code::Int4 { values, zeros, scales, float, packing, zero, outputs, group, order } = self else {
            return Ok(Vec::new());
        };
        // Whole words of eight outputs.
        let (first_word, end_word) = (rows.start / 8, rows.end.div_ceil(8));
        let words = (end_word - first_word) as usize;
        let height = (rows.end - rows.start) as usize;
        let skipped = (rows.start - first_word * 8) as usize;

        let mut codes = vec![0u8; height * columns];
        let mut stored = Vec::new();
        match packing {
            Packing::Gptq => {
                for word in 0..columns / 8 {
                    values.words(&mut stored, word as u64 * outputs + rows.start, height)?;
                    for (row, stored) in codes.chunks_exact_mut(columns).zip(&stored) {
                        for (place, code) in row.iter_mut().skip(word * 8).take(8).enumerate() {
                            *code = nibble(*stored, place);
                        }
                    }
                }
            }
            Packing::Awq => {
                for column in 0..columns {
                    values.words(&mut stored, column as u64 * (outputs / 8) + first_word, words)?;
                    for (row, codes) in codes.chunks_exact_mut(columns).enumerate() {
                        if let Some(code) = codes.get_mut(column) {
                            *code = output_nibble(*packing, &stored, skipped + row);
                        }
                    }
                }
            }
        }

        // Per group, of these rows.
        let groups = columns.div_ceil(*group as usize);
        let mut scale = Vec::with_capacity(groups * height);
        let mut zero_points = Vec::with_capacity(groups * height);
        for group in 0..groups as u64 {
            scale.extend(scales.floats(*float, name, group * outputs + rows.start, height)?);
            zeros.words(&mut stored, group * (outputs / 8) + first_word, words)?;
            for row in 0..height {
                let stored = output_nibble(*packing, &stored, skipped + row);
                zero_points.push(match (zero, stored) {
                    (ZeroPoint::Stored, stored) => stored,
                    (ZeroPoint::OneMore, stored) => (stored + 1) & 15,
                    (ZeroPoint::Symmetric, 7 | 8) => 8,
                    (ZeroPoint::Symmetric, other) => {
                        return Err(zeros.invalid(format!(
                            "{name} is said to be quantised symmetrically (sym), but has {other} as a zero point"
                        )));
                    }
                });
            }
        }
        let group_of = |column: usize| match order {
            None => column / *group as usize,
            Some(order) => order.get(column).map_or(0, |&group| group as usize),
        };
        let of_group = |row: usize, group: usize| {
            let place = group * height + row;
            (scale.get(place).copied().unwrap_or(f32::NAN), zero_points.get(place).copied().unwrap_or(0))
        };

        let mut bytes = Vec::new();
        for (row, codes) in codes.chunks_exact(columns).enumerate() {
            if dtype == DType::F16 {
                for (column, &code) in codes.iter().enumerate() {
                    let (scale, zero) = of_group(row, group_of(column));
                    // At most 16 significant bits: exact in f32.
                    let value = scale * f32::from(i16::from(code) - i16::from(zero));
                    bytes.extend(half_of(value, scales, name)?.to_le_bytes());
                }
                continue;
            }
            for (block, codes) in codes.as_chunks::<32>().0.iter().enumerate() {
                let (scale, zero) = of_group(row, group_of(block * 32));
                bytes.extend(half_of(scale, scales, name)?.to_le_bytes());
                if dtype == DType::Q4_0 {
                    nibbles(&mut bytes, codes);
                } else {
                    let codes = codes.map(|code| (code + 16).wrapping_sub(zero));
                    let fifth = codes.iter().enumerate().map(|(at, code)| u32::from(code >> 4 & 1) << at);
                    bytes.extend(fifth.sum::<u32>().to_le_bytes());
                    nibbles(&mut bytes, &codes);
                }
            }
        }
        Ok(bytes)
    }
}

/// Nibble `place` of a word, from the lowest.
fn nibble(word: u32, place: usize) -> u8 {
    (word >> (4 * place) & 15) as u8
}

/// The value of output `row` in words of eight outputs.
fn output_nibble(packing: Packing, words: &[u32], row: usize) -> u8 {
    /// Where AWQ puts each of eight outputs.
    const AWQ_PLACES: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];
    let place = match packing {
        Packing::Gptq => row % 8,
        Packing::Awq => AWQ_PLACES[row % 8],
    };
    words.get(row / 8).map_or(0, |&word| nibble(word, place))
}

/// The low nibbles of 32 values as the block types hold them.
fn nibbles(bytes: &mut Vec<u8>, codes: &[u8; 32]) {
    let (low, high) = codes.split_at(16);
    bytes.extend(low.iter().zip(high).map(|(low, high)| low & 15 | high << 4));
}

fn half_of(value: f32, from: &Part, name: &str) -> Result<f16, CheckpointError> {
    let half = f16::from_f32(value);
    if half.is_finite() {
        return Ok(half);
    }
    Err(from.invalid(format!("{name} holds {value}, which f16 cannot hold")))
}

/// The value of an e4m3 code: sign, 4 bits of exponent with bias 7, 3 bits of fraction; no infinities.
fn e4m3(code: u8) -> f64 {
    let (exponent, fraction) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let size = match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => fraction / 8.0 * 2f64.powi(-6),
        _ => (1.0 + fraction / 8.0) * 2f64.powi(exponent - 7),
    };
    if code & 128 == 0 { size } else { -size }
}

/// The bf16 bytes of every e4m3 code times `scale`.
fn scaled(scale: f32) -> [[u8; 2]; 256] {
    std::array::from_fn(|code| nearest_bf16(e4m3(code as u8) * f64::from(scale)).to_le_bytes())
}

/// The nearest bf16, of two equally near the even one. By way of an f32 whose last bit says whether anything is lost,
/// so that nothing is rounded twice.
fn nearest_bf16(value: f64) -> bf16 {
    let single = value as f32;
    let mut bits = single.to_bits();
    if f64::from(single) != value && single.is_finite() && bits & 1 == 0 {
        bits = if f64::from(single).abs() < value.abs() { bits + 1 } else { bits - 1 };
    }
    bf16::from_f32(f32::from_bits(bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_by_its_table() {
        for (code, value) in [
            (0x00, 0.0),
            (0x01, 2f64.powi(-9)),
            (0x07, 7.0 * 2f64.powi(-9)),
            (0x08, 2f64.powi(-6)),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0x7e, 448.0),
            (0xfe, -448.0),
            (0xb8, -1.0),
        ] {
            assert_eq!(e4m3(code), value, "{code:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        assert!(e4m3(0x80) == 0.0 && e4m3(0x80).is_sign_negative());
    }

    #[test]
    fn values_are_rounded_once() {
        // Just above the middle of two neighbours, so near that an f32 cannot tell.
        let middle = 1.0 + 2f64.powi(-8);
        assert_eq!(nearest_bf16(middle).to_f64(), 1.0);
        assert_eq!(nearest_bf16(middle + 2f64.powi(-40)).to_f64(), 1.0 + 2f64.powi(-7));
        assert_eq!(nearest_bf16(-middle - 2f64.powi(-40)).to_f64(), -1.0 - 2f64.powi(-7));
        assert_eq!(nearest_bf16(middle + 2f64.powi(-7) - 2f64.powi(-40)).to_f64(), 1.0 + 2f64.powi(-7));
        assert_eq!(nearest_bf16(0.0).to_f64(), 0.0);
        assert_eq!(nearest_bf16(448.0).to_f64(), 448.0);
    }

    #[test]
    fn awq_puts_outputs_where_its_order_says() {
        // Place k of a word holds output ORDER[k].
        const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
        for (place, output) in ORDER.into_iter().enumerate() {
            let word = 9 << (4 * place);
            assert_eq!(output_nibble(Packing::Awq, &[word], output), 9);
        }
        assert_eq!(output_nibble(Packing::Gptq, &[0, 9 << 12], 11), 9);
    }
}
