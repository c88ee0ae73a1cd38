//! Adapters: low-rank updates of a base model's matrices, applied beside the base's products and never merged.
//!
//! Chunks with different adapters, and with none, share a pass: the base's weights are read once for all of them.

use std::sync::Arc;

use tangram_checkpoint::{Factor, LayerRole, LowRank, ModelSpec, Role};

use crate::executor::{PassError, Place, Weights};
use crate::kernels::low_rank::{FactorBytes, Factors, Grouping};
use crate::model::{ModelError, Tensor, TensorDesc};

/// The factors of one update.
struct Update {
    a: Tensor,
    b: Tensor,
    scale: f32,
}

/// The updates of an adapter: which tensor is used where, checked once. Fits every [`crate::Model`] of its base's
/// description.
pub struct Adapter {
    /// The base's description.
    base: ModelSpec,
    /// `[layer][matrix]`, the matrices in the order of [`LowRank::MATRICES`].
    layers: Vec<[Option<Update>; LowRank::MATRICES.len()]>,
}

impl Adapter {
    /// Checks that `tensors` are exactly what the updates of `spec` need. A tensor's index in the slice is its index
    /// in [`Weights::adapter_tensor`].
    ///
    /// # Errors
    /// [`ModelError`] for updates of what the base does not have, missing, doubled or superfluous tensors, wrong
    /// shapes or types.
    pub fn new(spec: &ModelSpec, tensors: &[TensorDesc]) -> Result<Adapter, ModelError> {
        let unusable = |message: String| ModelError::Spec(message);
        if !spec.generates() {
            return Err(unusable("an adapter on a model that does not generate".into()));
        }
        let mut roles = crate::model::Roles::new(spec);
        for (index, desc) in tensors.iter().enumerate() {
            let (role, dtype) = (desc.role, desc.dtype);
            if !matches!(role, Role::LowRank(..)) {
                return Err(ModelError::Unexpected(role));
            }
            if dtype.is_quantised() {
                return Err(ModelError::DType { role, dtype });
            }
            roles.add(index, desc)?;
        }
        let mut layers: Vec<[Option<Update>; LowRank::MATRICES.len()]> =
            (0..spec.layers).map(|_| Default::default()).collect();
        for update in &spec.updates {
            let matrix = LowRank::MATRICES.iter().position(|&matrix| matrix == update.matrix);
            let layer = layers.get_mut(update.layer as usize);
            let Some((place, matrix)) = layer.zip(matrix).and_then(|(layer, m)| Some((layer.get_mut(m)?, m)))
            else {
                return Err(unusable(format!("an update of {:?} in layer {}", update.matrix, update.layer)));
            };
            let in_mlp = matrix >= 4;
            if in_mlp && spec.layer_experts(update.layer as usize).is_some() {
                return Err(unusable(format!("an update of {:?} among experts", update.matrix)));
            }
            if !(update.scale.is_finite() && update.rank > 0) {
                return Err(unusable(format!(
                    "an update of rank {} and scale {}",
                    update.rank, update.scale
                )));
            }
            let mut take = |factor| roles.take(Role::LowRank(update.layer, update.matrix, factor));
            *place = Some(Update { a: take(Factor::A)?, b: take(Factor::B)?, scale: update.scale });
        }
        match roles.left() {
            Some(role) => Err(ModelError::Unexpected(role)),
            None => Ok(Adapter { base: spec.base(), layers }),
        }
    }
}

impl Adapter {
    /// Whether it is for a base of this description.
    pub(crate) fn fits(&self, spec: &ModelSpec) -> bool {
        self.base == *spec
    }

    /// `A`, `B` and the scale of the update of a matrix of a layer.
    pub(crate) fn update(&self, layer: usize, matrix: LayerRole) -> Option<(&Tensor, &Tensor, f32)> {
        let index = LowRank::MATRICES.iter().position(|&known| known == matrix)?;
        let Update { a, b, scale } = self.layers.get(layer)?.get(index)?.as_ref()?;
        Some((a, b, *scale))
    }
}

/// The adapters of a pass and the rows that they are for.
pub(crate) struct Adapted {
    adapters: Vec<Arc<Adapter>>,
    pub(crate) grouping: Grouping,
}

impl Adapted {
    /// `of_chunk[i]` is the index in `adapters` of the adapter of chunk `i`.
    pub(crate) fn new(
        spec: &ModelSpec,
        places: &[Place],
        adapters: Vec<Arc<Adapter>>,
        of_chunk: &[Option<usize>],
    ) -> Result<Adapted, PassError> {
        if of_chunk.len() != places.len() {
            return Err(PassError::Adapter("there must be one choice per chunk"));
        }
        if of_chunk.iter().flatten().any(|&adapter| adapter >= adapters.len()) {
            return Err(PassError::Adapter("a chunk's adapter is not there"));
        }
        if adapters.iter().any(|adapter| !adapter.fits(spec)) {
            return Err(PassError::Adapter("an adapter is for another base"));
        }
        let rows = places.iter().zip(of_chunk);
        let of_row = rows.flat_map(|(place, &adapter)| std::iter::repeat_n(adapter, place.tokens));
        Ok(Adapted { grouping: Grouping::new(of_row), adapters })
    }

    /// Checks that the factors of a layer are there as described.
    pub(crate) fn check(&self, weights: &dyn Weights, layer: usize) -> Result<(), PassError> {
        for slot in self.grouping.adapters() {
            let updates = self.adapters.get(slot).and_then(|adapter| adapter.layers.get(layer));
            for tensor in updates.into_iter().flatten().flatten().flat_map(|update| [&update.a, &update.b]) {
                let found = weights.adapter_tensor(slot, tensor.index).len();
                if found != tensor.bytes {
                    return Err(PassError::TensorBytes {
                        index: tensor.index,
                        expected: tensor.bytes,
                        found,
                    });
                }
            }
        }
        Ok(())
    }

    /// The factors of an adapter for a matrix of a layer.
    pub(crate) fn factors<'a>(
        &self,
        weights: &'a dyn Weights,
        slot: usize,
        layer: usize,
        matrix: LayerRole,
    ) -> Option<Factors<'a>> {
        let (a, b, scale) = self.adapters.get(slot)?.update(layer, matrix)?;
        let factor = |tensor: &Tensor| FactorBytes {
            bytes: weights.adapter_tensor(slot, tensor.index),
            dtype: tensor.dtype,
        };
        Some(Factors { a: factor(a), b: factor(b), rank: a.rows, scale })
    }
}
