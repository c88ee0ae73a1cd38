//! The kernels as Rust sees them: their argument structures, field by field as in the sources, and their functions.
//!
//! Addresses are of GPU memory; what they must point to, and with which shape, is said in the sources.

use std::ffi::CString;
use std::sync::Arc;

use tangram_checkpoint::DType;
use tangram_device::DeviceError;

use super::{Kernel, Launch, Launcher, ProductKind, launch};

/// Defines argument structures whose size the sources assert too.
macro_rules! arguments {
    ($($(#[$doc:meta])* $name:ident, $bytes:literal bytes { $($field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Clone, Copy, Debug, Default)]
            #[allow(missing_docs)]
            pub struct $name { $(pub $field: $type,)* }
            // No byte of it is padding.
            const _: () = assert!(size_of::<$name>() == $bytes && $bytes == 0 $(+ size_of::<$type>())*);
        )*
    };
}

arguments! {
    /// Where rows go: as f32 and as operands.
    RowsOut, 32 bytes { plain: u64, bf16: u64, f16: u64, scales: u64, }
    /// Of `embed`.
    EmbedArguments, 104 bytes {
        tokens: u64, positions: u64, types: u64, token_table: u64, position_table: u64, type_table: u64, out: u64,
        token_type: u32, position_type: u32, type_type: u32, width: u32, token_bytes: u64, position_bytes: u64,
        type_bytes: u64, scale: f32, position_offset: u32,
    }
    /// Of `normalise`.
    NormArguments, 104 bytes {
        x: u64, addend: u64, gather: u64, weight: u64, bias: u64, out: RowsOut, width: u32, weight_type: u32,
        bias_type: u32, centred: u32, epsilon: f32, offset: f32, accumulate: u32, unused: u32,
    }
    /// Of `activate`.
    ActivateArguments, 64 bytes { x: u64, up: u64, gather: u64, out: RowsOut, width: u32, activation: u32, }
    /// Of `add`.
    AddArguments, 24 bytes { x: u64, y: u64, elements: u64, }
    /// Of `cap`.
    CapArguments, 24 bytes { x: u64, elements: u64, cap: f32, unused: u32, }
    /// Of `pool`.
    PoolArguments, 40 bytes {
        x: u64, sequences: u64, out: u64, width: u32, mean: u32, unit_length: u32, unused: u32,
    }
    /// Of the matrix products.
    ProductArguments, 88 bytes {
        weight: u64, x: u64, scales: u64, bias: u64, out: u64, tiles: u64, gather: u64, row_bytes: u64, rows: u32,
        columns: u32, tokens: u32, bias_type: u32, accumulate: u32, aligned: u32,
    }
    /// Of `angles`.
    AngleArguments, 56 bytes {
        positions: u64, longs: u64, frequencies: u64, long_frequencies: u64, out: u64, half: u32, magnitude: f32,
        long_magnitude: f32, unused: u32,
    }
    /// Of `prepare`.
    PrepareArguments, 136 bytes {
        query: u64, key: u64, value: u64, query_f16: u64, angles: u64, query_norm: u64, key_norm: u64,
        positions: u64, sequences: u64, blocks: u64, first_block: u64, layer_offset: u64, heads: u32,
        kv_heads: u32, head_dim: u32, half: u32, query_norm_type: u32, key_norm_type: u32, epsilon: f32,
        offset: f32, cache_f32: u32, unused: u32,
    }
    /// An element of the items of attention.
    Item, 20 bytes { row: u32, tokens: u32, sequence: u32, partition: u32, slot: u32, }
    /// Of the attention kernels.
    AttendArguments, 88 bytes {
        query: u64, out: u64, items: u64, positions: u64, blocks: u64, first_block: u64, partials: u64,
        layer_offset: u64, heads: u32, kv_heads: u32, head_dim: u32, window: u32, scale: f32, cap: f32,
    }
    /// An element of the merges of attention.
    Merge, 12 bytes { row: u32, first_slot: u32, slots: u32, }
    /// Of `attend_merge`.
    MergeArguments, 32 bytes { partials: u64, out: u64, merges: u64, heads: u32, head_dim: u32, }
    /// Of `attend_plain`.
    PlainAttendArguments, 112 bytes {
        query: u64, out: u64, key: u64, value: u64, positions: u64, sequences: u64, blocks: u64, first_block: u64,
        sequence_rows: u64, layer_offset: u64, heads: u32, kv_heads: u32, head_dim: u32, window: u32, scale: f32,
        cap: f32, cache_f32: u32, bidirectional: u32,
    }
    /// Of `route`.
    RouteArguments, 40 bytes {
        scores: u64, chosen: u64, weights: u64, rows: u32, experts: u32, per_token: u32, normalise: u32,
    }
    /// Of `group_routes`.
    GroupArguments, 56 bytes {
        chosen: u64, gather: u64, places: u64, tiles: u64, routes: u32, per_token: u32, experts: u32,
        tile_rows: u32, most_tiles: u32, unused: u32,
    }
    /// Of `combine`.
    CombineArguments, 48 bytes {
        results: u64, places: u64, weights: u64, out: u64, width: u32, per_token: u32, accumulate: u32, unused: u32,
    }
    /// An adapter's factors for a matrix.
    FactorsEntry, 32 bytes { a: u64, b: u64, a_type: u32, b_type: u32, rank: u32, scale: f32, }
    /// Of `low_rank_shrink` and `low_rank_expand`.
    LowRankArguments, 56 bytes {
        x: u64, inner: u64, out: u64, adapters: u64, factors: u64, columns: u32, width: u32, most_rank: u32,
        unused: u32,
    }
    /// Changes of a token's logit.
    Adjustment, 24 bytes { row: u32, token: u32, bias: f32, repetition: f32, frequency: f32, presence: f32, }
    /// Of `adjust_logits`.
    AdjustArguments, 24 bytes { logits: u64, adjustments: u64, count: u32, vocab: u32, }
    /// Of `mask_logits`.
    MaskArguments, 32 bytes { logits: u64, rows: u64, masks: u64, vocab: u32, unused: u32, }
    /// Of `candidates`.
    CandidatesArguments, 56 bytes {
        logits: u64, candidates: u64, totals: u64, temperatures: u64, randoms: u64, drawn: u64, vocab: u32,
        wanted: u32,
    }
}

/// A type's number in the sources, which is that of [`WEIGHT_TYPES`].
pub fn weight_type(dtype: DType) -> u32 {
    WEIGHT_TYPES.iter().position(|&known| known == dtype).unwrap_or(0) as u32
}

/// The types in the order in which the sources number them.
pub const WEIGHT_TYPES: [DType; 14] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q8_0,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q2K,
    DType::Q3K,
    DType::Q4K,
    DType::Q5K,
    DType::Q6K,
    DType::Iq4Nl,
];

/// `activation` of [`ActivateArguments`].
#[allow(missing_docs)]
pub mod activation {
    pub const SILU_GATE: u32 = 0;
    pub const GELU_TANH_GATE: u32 = 1;
    pub const GELU: u32 = 2;
    pub const GELU_TANH: u32 = 3;
    pub const RELU: u32 = 4;
    pub const TANH: u32 = 5;
    pub const SIGMOID: u32 = 6;
    pub const NONE: u32 = 7;
}

/// Kernels without variants: function, shared memory that it may need at most, argument structure.
macro_rules! kernels {
    ($($(#[$doc:meta])* $name:ident($arguments:ty), $shared:expr;)*) => {
        #[derive(Clone, Copy)]
        struct Single { $($name: Kernel,)* }

        impl Single {
            fn load(gpu: &dyn Launcher) -> Result<Single, DeviceError> {
                Ok(Single { $($name: kernel(gpu, stringify!($name), $shared)?,)* })
            }
        }

        impl Kernels {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// [`DeviceError::Cuda`] when the driver refuses.
                ///
                /// # Safety
                /// The addresses in `arguments` must be of what the sources say, for this launch.
                pub unsafe fn $name(&self, launch: Launch, arguments: &$arguments) -> Result<(), DeviceError> {
                    // SAFETY: as the caller says.
                    unsafe { self.launch(self.single.$name, launch, arguments) }
                }
            )*
        }
    };
}

/// Shared memory up to which nothing has to be asked for.
const ORDINARY: u32 = 48 << 10;

kernels! {
    /// Sums of rows of embedding tables.
    embed(EmbedArguments), ORDINARY;
    /// RMS or layer norm of rows.
    normalise(NormArguments), ORDINARY;
    /// Activations, with or without a gate; and rows as operands.
    activate(ActivateArguments), ORDINARY;
    /// Element-wise sums.
    add(AddArguments), ORDINARY;
    /// Soft caps.
    cap(CapArguments), ORDINARY;
    /// One vector of each sequence.
    pool(PoolArguments), ORDINARY;
    /// Products with weights in f32.
    product_f32(ProductArguments), ORDINARY;
    /// Cosines and sines of rotations.
    angles(AngleArguments), ORDINARY;
    /// Norms and rotation of heads, writing of keys and values.
    prepare(PrepareArguments), ORDINARY;
    /// Partitions of attention put together.
    attend_merge(MergeArguments), ORDINARY;
    /// Attention by plain arithmetic.
    attend_plain(PlainAttendArguments), ORDINARY;
    /// The choice of experts.
    route(RouteArguments), ORDINARY;
    /// Rows of experts together.
    group_routes(GroupArguments), ORDINARY;
    /// Sums of experts' results.
    combine(CombineArguments), ORDINARY;
    /// The first half of low-rank products.
    low_rank_shrink(LowRankArguments), ORDINARY;
    /// The second half.
    low_rank_expand(LowRankArguments), ORDINARY;
    /// Bias and penalties of logits.
    adjust_logits(AdjustArguments), ORDINARY;
    /// Masks of logits.
    mask_logits(MaskArguments), ORDINARY;
    /// The most likely tokens.
    candidates(CandidatesArguments), ORDINARY;
}

/// All kernels, ready to be launched.
pub struct Kernels {
    gpu: Arc<dyn Launcher>,
    single: Single,
    /// By [`ProductKind`] and weight type; none for f32.
    products: [[Option<Kernel>; WEIGHT_TYPES.len()]; 3],
    /// For few and many query rows, by size.
    attention: [[Kernel; launch::HEAD_DIMS.len()]; 2],
}

fn kernel(gpu: &dyn Launcher, name: &str, shared_bytes: u32) -> Result<Kernel, DeviceError> {
    let c_name = CString::new(name).unwrap_or_default();
    gpu.kernel(&c_name, shared_bytes)
}

impl Kernels {
    /// Finds all kernels.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] if one is missing.
    pub fn load(gpu: Arc<dyn Launcher>) -> Result<Kernels, DeviceError> {
        let single = Single::load(&*gpu)?;
        let mut products = [[None; WEIGHT_TYPES.len()]; 3];
        let kinds = [
            (ProductKind::Few8, "product_few_8"),
            (ProductKind::Few32, "product_few_32"),
            (ProductKind::Many, "product_many"),
        ];
        for (products, (kind, name)) in products.iter_mut().zip(kinds) {
            for (product, dtype) in products.iter_mut().zip(WEIGHT_TYPES).skip(1) {
                *product = Some(kernel(&*gpu, &format!("{name}_{}", dtype.name()), kind.shared_bytes())?);
            }
        }
        let mut attention = [[Kernel::default(); launch::HEAD_DIMS.len()]; 2];
        for (many, (functions, name)) in attention.iter_mut().zip(["few", "many"]).enumerate() {
            for (size, (attend, dims)) in functions.iter_mut().zip(launch::HEAD_DIMS).enumerate() {
                let shared_bytes = launch::attention_shared_bytes(size, many == 1);
                *attend = kernel(&*gpu, &format!("attend_{name}_{dims}"), shared_bytes)?;
            }
        }
        Ok(Kernels { gpu, single, products, attention })
    }

    /// The GPU they run on.
    pub fn gpu(&self) -> &Arc<dyn Launcher> {
        &self.gpu
    }

    /// The same kernels, launched elsewhere.
    pub(super) fn on(&self, gpu: Arc<dyn Launcher>) -> Kernels {
        Kernels { gpu, single: self.single, products: self.products, attention: self.attention }
    }

    /// # Safety
    /// `arguments` must be of the structure of `function`, one of those that are defined above; its addresses as
    /// [`Launcher::launch`] says.
    unsafe fn launch<A>(&self, function: Kernel, launch: Launch, arguments: &A) -> Result<(), DeviceError> {
        // SAFETY: these structures have no padding, so all of their bytes are initialised.
        let bytes =
            unsafe { std::slice::from_raw_parts((&raw const *arguments).cast::<u8>(), size_of::<A>()) };
        // SAFETY: as the caller says.
        unsafe { self.gpu.launch(function, launch, bytes) }
    }

    /// A product with weights of `dtype`, which is not f32, on `tiles` tiles of tokens.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when the driver refuses, or there is no kernel for the type.
    ///
    /// # Safety
    /// As for the other kernels.
    pub unsafe fn product(
        &self,
        kind: ProductKind,
        dtype: DType,
        tiles: usize,
        arguments: &ProductArguments,
    ) -> Result<(), DeviceError> {
        let function = self.products[kind as usize][weight_type(dtype) as usize];
        let function =
            function.ok_or_else(|| DeviceError::BadConfig(format!("no kernel multiplies with {dtype}")))?;
        let launch = launch::product(kind, arguments.rows as usize, tiles);
        // SAFETY: as the caller says.
        unsafe { self.launch(function, launch, arguments) }
    }

    /// Attention of `items` items by the kernel for heads of `size`.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] when the driver refuses.
    ///
    /// # Safety
    /// As for the other kernels.
    pub unsafe fn attend(
        &self,
        size: usize,
        many: bool,
        items: usize,
        arguments: &AttendArguments,
    ) -> Result<(), DeviceError> {
        let (heads, kv_heads) = (arguments.heads as usize, arguments.kv_heads as usize);
        let launch = launch::attend(size, many, items, heads, kv_heads);
        // SAFETY: as the caller says.
        unsafe { self.launch(self.attention[usize::from(many)][size], launch, arguments) }
    }
}
