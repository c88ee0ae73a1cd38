//! Matrices that a Hugging Face checkpoint stores quantised in ways that no kernel reads: FP8 with scales, GPTQ and AWQ
//! with 4 bits. Here: which tensors make up a matrix and what it becomes; `convert` makes its bytes when they are read.
//!
//! What a matrix becomes is the nearest stored type that holds its values without loss, where there is one:
//!
//! - **4 bits**, value = s·(q − z) with an f16 scale: `q4_0` if every zero point is 8, else `q5_0`, because q − z lies
//!   within −15 and 15 and so has its place in d·(q' − 16). Both have a scale for 32 inputs, so this needs groups that
//!   are whole blocks of 32 neighbouring inputs. (`q4_1` would be smaller than `q5_0`, but its minimum −s·z must be
//!   rounded to f16.) Where groups are not (GPTQ's act-order), it is f16, each value rounded once to 11 significant
//!   bits: what the formats' own kernels compute with.
//! - **FP8**: bf16, each value rounded once to 8 significant bits; exact where the scale is a power of two, because e4m3
//!   has 4 bits. A block type would not do: e4m3 is no integer.

mod convert;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use crate::config::{Packing, Quantisation, ZeroPoint};
use crate::file::{ReadAt, SourceFile};
use crate::safetensors::Tensor;
use crate::{CheckpointError, DType};
use convert::{Code, Float, Part, Scales};

/// Inputs that have a common scale in the block types.
const BLOCK: u64 = 32;

/// A matrix that is made when it is read.
#[derive(Debug)]
pub(crate) struct Matrix {
    /// What it would be called if it were plain.
    pub(crate) name: String,
    /// Index of the file that holds its values.
    pub(crate) file: usize,
    pub(crate) dtype: DType,
    /// Outputs, inputs.
    pub(crate) shape: [u64; 2],
    /// All of it, as it becomes.
    pub(crate) bytes: u64,
    code: Code,
}

impl ReadAt for Matrix {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), CheckpointError> {
        let [_, columns] = self.shape;
        let row_bytes = (self.bytes / self.shape[0]).max(1);
        let first = offset / row_bytes;
        let end = (offset + buffer.len() as u64).div_ceil(row_bytes);
        let rows = self.code.rows(&self.name, self.dtype, columns, first..end)?;
        let skipped = (offset - first * row_bytes) as usize;
        if let Some(wanted) = rows.get(skipped..skipped + buffer.len()) {
            buffer.copy_from_slice(wanted);
        }
        Ok(())
    }
}

/// Takes the tensors that make up quantised matrices out of `tensors` (each with the index of its file) and gives the
/// matrices and what the user should know about them.
pub(crate) fn gather(
    quantisation: Quantisation,
    files: &[Arc<SourceFile>],
    tensors: &mut Vec<(usize, Tensor)>,
) -> Result<(Vec<Matrix>, Vec<String>), CheckpointError> {
    let mut parts: HashMap<String, (usize, Tensor)> =
        tensors.drain(..).map(|(file, tensor)| (tensor.name.clone(), (file, tensor))).collect();
    let values = match quantisation {
        Quantisation::Fp8 { .. } => ".weight",
        Quantisation::Int4 { .. } => ".qweight",
    };
    let mut modules: Vec<String> = parts
        .values()
        .filter(|(_, tensor)| values != ".weight" || tensor.dtype == "F8_E4M3")
        .filter_map(|(_, tensor)| tensor.name.strip_suffix(values))
        .map(str::to_owned)
        .collect();
    modules.sort();
    let mut matrices = Vec::with_capacity(modules.len());
    let mut gatherer = Gatherer { files, parts: &mut parts };
    for module in &modules {
        matrices.push(match quantisation {
            Quantisation::Fp8 { block } => gatherer.fp8(module, block)?,
            Quantisation::Int4 { packing, group, zero, act_order } => {
                gatherer.int4(module, packing, group, zero, act_order)?
            }
        });
    }
    let before = parts.len();
    if let Quantisation::Fp8 { .. } = quantisation {
        parts.retain(|name, _| !is_activation_scale(name));
    }
    let mut warnings = describe(quantisation, &matrices);
    if parts.len() < before {
        warnings.push(
            "the scales of activations and of the KV cache are not used: both stay in floating point here"
                .into(),
        );
    }
    tensors.extend(parts.into_values());
    // As they were: by file, then by place.
    tensors.sort_by_key(|(file, tensor)| (*file, tensor.offset, tensor.bytes));
    Ok((matrices, warnings))
}

/// Scales of what is not quantised here.
fn is_activation_scale(name: &str) -> bool {
    [".input_scale", ".output_scale", ".activation_scale", ".k_scale", ".v_scale", ".kv_scale"]
        .iter()
        .any(|suffix| name.ends_with(suffix))
}

/// What becomes of the matrices.
fn describe(quantisation: Quantisation, matrices: &[Matrix]) -> Vec<String> {
    let method = match quantisation {
        Quantisation::Fp8 { .. } => "fp8",
        Quantisation::Int4 { packing: Packing::Gptq, .. } => "gptq",
        Quantisation::Int4 { packing: Packing::Awq, .. } => "awq",
    };
    let mut counts: BTreeMap<&str, (usize, DType)> = BTreeMap::new();
    for matrix in matrices {
        counts.entry(matrix.dtype.name()).or_insert((0, matrix.dtype)).0 += 1;
    }
    let describe = |&(count, dtype): &(usize, DType)| {
        let consequence = match dtype {
            DType::BF16 => {
                "exactly where a scale is a power of two, else rounded once to 8 significant bits; \
                 they take twice the bytes"
            }
            DType::F16 => {
                "because their groups are not whole blocks of 32 neighbouring inputs (act-order): \
                 rounded once to 11 significant bits; they take four times the bytes"
            }
            DType::Q5_0 => "without loss, at 5.5 bits a weight",
            _ => "without loss",
        };
        format!("{count} matrices quantised by {method} are stored as {dtype}, {consequence}")
    };
    counts.values().map(describe).collect()
}

/// Tensors that have not found their matrix.
struct Gatherer<'a> {
    files: &'a [Arc<SourceFile>],
    parts: &'a mut HashMap<String, (usize, Tensor)>,
}

impl Gatherer<'_> {
    fn path(&self, file: usize) -> &Path {
        self.files.get(file).map_or(Path::new("?"), |file| &file.path)
    }

    fn take(&mut self, module: &str, suffix: &str) -> Option<(usize, Tensor)> {
        self.parts.remove(&format!("{module}{suffix}"))
    }

    /// A tensor that must be there, beside one in `file`.
    fn need(&mut self, module: &str, suffix: &str, file: usize) -> Result<(usize, Tensor), CheckpointError> {
        self.take(module, suffix).ok_or_else(|| {
            let message =
                format!("{module} is quantised, but there is no {module}{suffix}; is the download complete?");
            CheckpointError::invalid(self.path(file), message)
        })
    }

    fn part(&self, (file, tensor): &(usize, Tensor)) -> Result<Part, CheckpointError> {
        match self.files.get(*file) {
            Some(file) => Ok(Part { file: file.clone(), offset: tensor.offset }),
            None => Err(CheckpointError::invalid(self.path(*file), "is not open")),
        }
    }

    fn wrong(&self, (file, tensor): &(usize, Tensor), wanted: &str) -> CheckpointError {
        let Tensor { name, dtype, shape, .. } = tensor;
        let message = format!(
            "tensor {name} has type {dtype} and shape {shape:?}, which does not fit its matrix ({wanted})"
        );
        CheckpointError::unsupported(self.path(*file), message)
    }

    fn scale_type(&self, scales: &(usize, Tensor), known: &[Float]) -> Result<Float, CheckpointError> {
        let found = known.iter().find(|float| float.name() == scales.1.dtype);
        found.copied().ok_or_else(|| self.wrong(scales, "scales of another type"))
    }

    fn fp8(&mut self, module: &str, block: Option<[u64; 2]>) -> Result<Matrix, CheckpointError> {
        let values = self.need(module, ".weight", 0)?;
        let &[rows, columns] = values.1.shape.as_slice() else {
            return Err(self.wrong(&values, "a matrix"));
        };
        let scales = match self.take(module, ".weight_scale_inv") {
            Some(scales) => scales,
            None => self.need(module, ".weight_scale", values.0)?,
        };
        let float = self.scale_type(&scales, &[Float::F32, Float::BF16, Float::F16])?;
        let kind = match (scales.1.shape.as_slice(), block) {
            (&[down, across], Some([high, wide]))
                if (down, across) == (rows.div_ceil(high), columns.div_ceil(wide)) =>
            {
                Scales::Block { rows: high, columns: wide, across }
            }
            ([] | [1] | [1, 1], _) => Scales::Tensor,
            (&[count] | &[count, 1], _) if count == rows => Scales::Row,
            _ => {
                return Err(
                    self.wrong(&scales, &format!("{rows} outputs and {columns} inputs, blocks {block:?}"))
                );
            }
        };
        let code = Code::Fp8 { values: self.part(&values)?, scales: self.part(&scales)?, float, kind };
        self.matrix(module, values.0, DType::BF16, [rows, columns], code)
    }

    fn int4(
        &mut self,
        module: &str,
        packing: Packing,
        group: Option<u64>,
        zero: ZeroPoint,
        act_order: bool,
    ) -> Result<Matrix, CheckpointError> {
        let values = self.need(module, ".qweight", 0)?;
        let shape = match (values.1.shape.as_slice(), packing) {
            (&[words, rows], Packing::Gptq) => [Some(rows), words.checked_mul(8)],
            (&[columns, words], Packing::Awq) => [words.checked_mul(8), Some(columns)],
            _ => [None, None],
        };
        let [Some(rows), Some(columns)] = shape else {
            return Err(self.wrong(&values, "words of 4-bit values"));
        };
        // Zero points of eight outputs share a word.
        if values.1.dtype != "I32" || !rows.is_multiple_of(8) || rows == 0 || columns == 0 {
            return Err(self.wrong(&values, "words of 4-bit values of a multiple of 8 outputs"));
        }
        let group = group.unwrap_or(columns);
        let groups = columns.div_ceil(group);
        let scales = self.need(module, ".scales", values.0)?;
        let float = self.scale_type(&scales, &[Float::F16, Float::BF16])?;
        if scales.1.shape != [groups, rows] {
            return Err(self.wrong(&scales, &format!("{groups} groups of {group} inputs, {rows} outputs")));
        }
        let zeros = self.need(module, ".qzeros", values.0)?;
        if zeros.1.dtype != "I32" || zeros.1.shape != [groups, rows / 8] {
            return Err(self.wrong(&zeros, &format!("{groups} groups of {group} inputs, {rows} outputs")));
        }
        let index = match act_order {
            true => Some(self.need(module, ".g_idx", values.0)?),
            false => self.take(module, ".g_idx"),
        };
        let order = match index {
            Some(index) if packing == Packing::Gptq => self.group_order(&index, columns, group, groups)?,
            Some(index) => return Err(self.wrong(&index, "which has no order of groups")),
            None => None,
        };
        let whole_blocks = match &order {
            None => group.is_multiple_of(BLOCK) || groups == 1,
            Some(order) => {
                order.chunks(BLOCK as usize).all(|block| block.iter().all(|of| Some(of) == block.first()))
            }
        };
        let dtype = match zero {
            _ if !whole_blocks || !columns.is_multiple_of(BLOCK) => DType::F16,
            ZeroPoint::Symmetric => DType::Q4_0,
            ZeroPoint::Stored | ZeroPoint::OneMore => DType::Q5_0,
        };
        let code = Code::Int4 {
            values: self.part(&values)?,
            zeros: self.part(&zeros)?,
            scales: self.part(&scales)?,
            float,
            packing,
            zero,
            outputs: rows,
            group,
            order,
        };
        self.matrix(module, values.0, dtype, [rows, columns], code)
    }

    /// The group of every input; `None` if they follow each other.
    fn group_order(
        &self,
        index: &(usize, Tensor),
        columns: u64,
        group: u64,
        groups: u64,
    ) -> Result<Option<Vec<u32>>, CheckpointError> {
        if index.1.dtype != "I32" || index.1.shape != [columns] {
            return Err(self.wrong(index, &format!("the group of each of {columns} inputs")));
        }
        let mut bytes = vec![0; index.1.bytes as usize];
        self.part(index)?.read(&mut bytes, 0)?;
        let order: Vec<u32> = bytes.as_chunks().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect();
        if let Some(beyond) = order.iter().find(|&&of| u64::from(of) >= groups) {
            let message = format!("tensor {} puts an input into group {beyond} of {groups}", index.1.name);
            return Err(CheckpointError::invalid(self.path(index.0), message));
        }
        let in_turn = order.iter().zip(0u64..).all(|(&of, input)| u64::from(of) == input / group);
        Ok((!in_turn).then_some(order))
    }

    fn matrix(
        &self,
        module: &str,
        file: usize,
        dtype: DType,
        shape: [u64; 2],
        code: Code,
    ) -> Result<Matrix, CheckpointError> {
        let name = format!("{module}.weight");
        match dtype.tensor_bytes(&shape) {
            Some(bytes) if bytes > 0 => Ok(Matrix { name, file, dtype, shape, bytes, code }),
            _ => {
                let message = format!("tensor {name} of shape {shape:?} has no elements or far too many");
                Err(CheckpointError::invalid(self.path(file), message))
            }
        }
    }
}
