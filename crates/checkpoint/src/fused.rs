//! Takes tensors that a format stores as one apart. Only places are computed here; no bytes move before the import.

use crate::names::{Fused, Name};
use crate::source::{Found, Location, RowOrder, SourceTensor};
use crate::{DType, ExpertRole, LayerRole, ModelSpec, Role};

/// A fused tensor as a format's reader found it.
pub(crate) struct Whole {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    /// Outermost dimension first.
    pub(crate) shape: Vec<u64>,
    pub(crate) bytes: u64,
    /// Index into the source's files.
    pub(crate) file: usize,
    /// First byte in that file.
    pub(crate) offset: u64,
}

/// How the parts lie in the whole.
enum Arrangement {
    /// One after the other.
    Rows,
    /// For each of this many heads, a piece of every part.
    ByHead(u64),
    /// Side by side: the whole is stored as `[in_features, out_features]`.
    Columns,
}

impl Whole {
    /// The tensors with roles of their own that a tensor of this name holds; none for a name that means nothing.
    pub(crate) fn take_apart(self, spec: &ModelSpec, name: Name) -> Result<Vec<Found>, String> {
        match name {
            Name::Role(role) => Ok(vec![Found { tensor: self.plain(role), name: self.name }]),
            Name::Transposed(role) => Ok(vec![self.transposed(role)?]),
            Name::Fused(layer, fused) => self.split(spec, layer, fused),
            Name::Ignored | Name::Unknown => Ok(Vec::new()),
        }
    }

    /// All of it for one purpose.
    pub(crate) fn plain(&self, role: Role) -> SourceTensor {
        let location = Location { file: self.file, offset: self.offset, rows: RowOrder::Plain };
        SourceTensor { role, dtype: self.dtype, shape: self.shape.clone(), bytes: self.bytes, location }
    }

    /// A matrix stored as `[in_features, out_features]`.
    fn transposed(self, role: Role) -> Result<Found, String> {
        let &[columns, rows] = self.shape.as_slice() else {
            return Err(format!("tensor {} of shape {:?} is not a matrix", self.name, self.shape));
        };
        let order = RowOrder::Columns { stride: self.row_bytes(rows)? };
        let location = Location { file: self.file, offset: self.offset, rows: order };
        let shape = vec![rows, columns];
        let tensor = SourceTensor { role, dtype: self.dtype, shape, bytes: self.bytes, location };
        Ok(Found { name: self.name, tensor })
    }

    /// The tensors of `layer` that this one is made of. The spec must have been checked.
    fn split(&self, spec: &ModelSpec, layer: u32, fused: Fused) -> Result<Vec<Found>, String> {
        let queries = (spec.heads * spec.head_dim) as u64;
        let keys = (spec.kv_heads * spec.head_dim) as u64;
        let heads = spec.heads as u64;
        let (experts, inner) = match &spec.experts {
            Some(experts) => (experts.count as u32, experts.intermediate as u64),
            None => (0, 0),
        };
        let intermediate = spec.intermediate as u64;
        let hidden = spec.hidden as u64;
        use LayerRole::{Expert, Gate, Key, KeyBias, Query, QueryBias, Up, Value, ValueBias};
        let matrices = || vec![(Query, queries), (Key, keys), (Value, keys)];
        let biases = || vec![(QueryBias, queries), (KeyBias, keys), (ValueBias, keys)];
        let (parts, arrangement) = match fused {
            Fused::QueryKeyValue => (matrices(), Arrangement::Rows),
            Fused::QueryKeyValueBias => (biases(), Arrangement::Rows),
            Fused::QueryKeyValueTransposed => (matrices(), Arrangement::Columns),
            Fused::QueryKeyValueByHead => (matrices(), Arrangement::ByHead(heads)),
            Fused::QueryKeyValueByHeadBias => (biases(), Arrangement::ByHead(heads)),
            Fused::GateUp => (vec![(Gate, intermediate), (Up, intermediate)], Arrangement::Rows),
            Fused::Experts(role) => {
                let rows = if role == ExpertRole::Down { hidden } else { inner };
                ((0..experts).map(|expert| (Expert(expert, role), rows)).collect(), Arrangement::Rows)
            }
            Fused::ExpertsGateUp => {
                let both =
                    |expert| [ExpertRole::Gate, ExpertRole::Up].map(|role| (Expert(expert, role), inner));
                ((0..experts).flat_map(both).collect(), Arrangement::Rows)
            }
        };
        self.parts(layer, &parts, &arrangement)
    }

    fn parts(
        &self,
        layer: u32,
        parts: &[(LayerRole, u64)],
        arrangement: &Arrangement,
    ) -> Result<Vec<Found>, String> {
        let vector = self.shape.len() == 1;
        let (columns, rows): (u64, u64) = match (self.shape.as_slice(), arrangement) {
            (&[columns, rows], Arrangement::Columns) => (columns, rows),
            // A product cannot overflow: the whole's bytes are in a file.
            (&[rows], _) => (1, rows),
            (&[ref outer @ .., columns], _) => (columns, outer.iter().product()),
            ([], _) => (1, 0),
        };
        let needed: u64 = parts.iter().map(|(_, rows)| rows).sum();
        if rows != needed {
            return Err(format!(
                "tensor {} has shape {:?}, but its {} parts need {needed} rows",
                self.name,
                self.shape,
                parts.len()
            ));
        }
        let row_bytes = self.row_bytes(columns)?;
        let element = self.row_bytes(1);
        let mut before = 0;
        let mut found = Vec::with_capacity(parts.len());
        for &(role, count) in parts {
            let (start, order) = match arrangement {
                Arrangement::Rows => (before * row_bytes, RowOrder::Plain),
                Arrangement::ByHead(heads) => {
                    let order = RowOrder::Blocks { rows: count / heads, stride: rows / heads };
                    (before / heads * row_bytes, order)
                }
                Arrangement::Columns => {
                    let element = element.clone()?;
                    (before * element, RowOrder::Columns { stride: rows * element })
                }
            };
            before += count;
            found.push(Found {
                name: self.name.clone(),
                tensor: SourceTensor {
                    role: Role::Layer(layer, role),
                    dtype: self.dtype,
                    shape: if vector { vec![count] } else { vec![count, columns] },
                    bytes: count * row_bytes,
                    location: Location { file: self.file, offset: self.offset + start, rows: order },
                },
            });
        }
        Ok(found)
    }

    fn row_bytes(&self, columns: u64) -> Result<u64, String> {
        self.dtype.tensor_bytes(&[columns]).ok_or_else(|| {
            format!(
                "tensor {} of shape {:?} has rows that are no whole blocks of {}",
                self.name, self.shape, self.dtype
            )
        })
    }
}
