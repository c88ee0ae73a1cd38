//! Grids and shared memory of every kernel, as functions of shapes alone. The constants are those of the sources.

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks in each dimension, all above 0.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory of a block.
    pub shared_bytes: u32,
}

/// Which kernel computes a matrix product of operands. The result is the same, bit by bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProductKind {
    /// Up to eight tokens per block.
    Few8,
    /// Up to 32.
    Few32,
    /// Up to 128, and 128 rows.
    Many,
}

impl ProductKind {
    /// What is fastest for so many tokens: the weights are read once for each tile of tokens.
    pub fn for_tokens(tokens: usize) -> ProductKind {
        match tokens {
            0..=8 => ProductKind::Few8,
            9..=64 => ProductKind::Few32,
            _ => ProductKind::Many,
        }
    }

    /// Tokens of a block.
    pub fn tile_tokens(self) -> usize {
        match self {
            ProductKind::Few8 => 8,
            ProductKind::Few32 => 32,
            ProductKind::Many => 128,
        }
    }

    /// Shared memory of a block.
    pub const fn shared_bytes(self) -> u32 {
        match self {
            // A sum for each of eight slices, tokens and sixteen rows.
            ProductKind::Few8 => 8 * 8 * 16 * 4,
            ProductKind::Few32 => 8 * 32 * 16 * 4,
            // Four stages of 32 columns of 128 rows and 128 tokens.
            ProductKind::Many => 4 * (128 + 128) * 32 * 2,
        }
    }
}

fn count(value: usize) -> u32 {
    // A grid that does not fit is refused by the driver, not cut short.
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn grid(x: usize, y: usize) -> [u32; 3] {
    [count(x), count(y), 1]
}

/// A product of `rows` weight rows with `tiles` tiles of tokens.
pub fn product(kind: ProductKind, rows: usize, tiles: usize) -> Launch {
    let (block_rows, threads) = match kind {
        ProductKind::Few8 | ProductKind::Few32 => (16, 256),
        ProductKind::Many => (128, 256),
    };
    Launch { grid: grid(rows.div_ceil(block_rows), tiles), threads, shared_bytes: kind.shared_bytes() }
}

/// Tokens of a tile of [`product_f32`].
pub const F32_TILE_TOKENS: usize = 8;

/// A product with weights in f32.
pub fn product_f32(rows: usize, tiles: usize) -> Launch {
    Launch { grid: grid(rows.div_ceil(8), tiles), threads: 256, shared_bytes: 0 }
}

/// A function of rows, one per block.
pub fn rows(rows: usize, threads: u32) -> Launch {
    // A number per warp, for sums over the block.
    Launch { grid: grid(rows, 1), threads, shared_bytes: threads / 32 * 4 }
}

/// A function of elements, one per thread of 256.
pub fn elements(elements: usize) -> Launch {
    Launch { grid: grid(elements.div_ceil(256), 1), threads: 256, shared_bytes: 0 }
}

/// Head dimensions that the attention kernels are made for.
pub const HEAD_DIMS: [usize; 5] = [32, 64, 96, 128, 256];

/// Which attention kernel computes heads of this size, as an index in [`HEAD_DIMS`]; `None` where only plain arithmetic
/// does.
pub fn attention_size(head_dim: usize) -> Option<usize> {
    if !head_dim.is_multiple_of(8) {
        return None;
    }
    HEAD_DIMS.iter().position(|&most| head_dim <= most)
}

/// Query rows of a block of the attention kernels: tokens times the heads that are taken together.
pub fn attention_rows(size: usize, many: bool) -> usize {
    match (many, HEAD_DIMS.get(size)) {
        (false, _) => 16,
        (true, Some(256)) => 32,
        (true, _) => 64,
    }
}

/// Heads of a group that a block takes together.
pub fn heads_together(group: usize) -> usize {
    group.min(16)
}

/// Shared memory of an attention kernel.
pub fn attention_shared_bytes(size: usize, many: bool) -> u32 {
    let dims = HEAD_DIMS.get(size).copied().unwrap_or(0);
    let rows = attention_rows(size, many);
    // Queries, keys, values and weights in 16 bits, then a largest score and a sum per row and warp.
    let operands = rows * dims + 64 * dims + 64 * (dims + 8) + rows * (64 + 8);
    count(operands * 2 + 2 * 4 * rows * 4)
}

/// Attention of `items` items.
pub fn attend(size: usize, many: bool, items: usize, heads: usize, kv_heads: usize) -> Launch {
    let group = heads / kv_heads.max(1);
    let parts = group.div_ceil(heads_together(group).max(1));
    Launch {
        grid: grid(items, kv_heads * parts),
        threads: 128,
        shared_bytes: attention_shared_bytes(size, many),
    }
}

/// A head of a row per block.
pub fn heads(rows: usize, heads: usize) -> Launch {
    Launch { grid: grid(rows, heads), threads: 128, shared_bytes: 0 }
}

/// Attention by plain arithmetic: the query, the result and 128 weights, and a number per warp.
pub fn attend_plain(rows: usize, query_heads: usize, head_dim: usize) -> Launch {
    Launch { shared_bytes: count((2 * head_dim + 128 + 4) * 4), ..heads(rows, query_heads) }
}

/// The choice of experts, four rows per block.
pub fn route(rows: usize) -> Launch {
    Launch { grid: grid(rows.div_ceil(4), 1), threads: 128, shared_bytes: 0 }
}

/// Places of routes: three numbers per expert.
pub fn group_routes(experts: usize) -> Launch {
    Launch { grid: [1; 3], threads: 1024, shared_bytes: count(experts * 12) }
}

/// The most tiles of `tile_rows` that `routes` routes to `experts` experts can need.
pub fn most_tiles(routes: usize, experts: usize, tile_rows: usize) -> usize {
    // Each expert in use has at most one tile that is not full.
    routes / tile_rows + experts.min(routes)
}

/// Low-rank products: `work` elements of each row, so many per block.
pub fn low_rank(rows: usize, work: usize, per_block: usize) -> Launch {
    Launch { grid: grid(rows, work.div_ceil(per_block)), threads: 256, shared_bytes: 0 }
}

/// Most tokens that [`candidates`] gives.
pub const MOST_CANDIDATES: usize = 1024;

/// The most likely tokens of rows: keys, sums, counters and state.
pub fn candidates(rows: usize) -> Launch {
    Launch { grid: grid(rows, 1), threads: 1024, shared_bytes: 1024 * 8 + 32 * 8 + 256 * 4 + 4 * 4 }
}

/// Masks of `rows` rows over `vocab` tokens.
pub fn mask(vocab: usize, rows: usize) -> Launch {
    Launch { grid: grid(vocab.div_ceil(256), rows), threads: 256, shared_bytes: 0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a block may have on the smallest GPUs that are served (compute capability 8.6, 8.9 and 12.0).
    const LEAST_SHARED: u32 = 99 << 10;

    #[test]
    fn shared_memory_fits_every_gpu() {
        for kind in [ProductKind::Few8, ProductKind::Few32, ProductKind::Many] {
            assert!(product(kind, 1, 1).shared_bytes <= LEAST_SHARED);
        }
        for (size, dims) in HEAD_DIMS.iter().enumerate() {
            for many in [false, true] {
                let bytes = attention_shared_bytes(size, many);
                assert!(bytes <= LEAST_SHARED, "{dims} {many}: {bytes}");
            }
        }
        assert!(candidates(1).shared_bytes <= 48 << 10);
    }

    #[test]
    fn heads_find_their_kernel() {
        assert_eq!([8, 64, 80, 128, 192].map(attention_size), [Some(0), Some(1), Some(2), Some(3), Some(4)]);
        assert_eq!([12, 264, 100].map(attention_size), [None; 3]);
    }

    proptest! {
        #[test]
        fn blocks_cover_everything_once(rows in 1usize..100_000, tokens in 1usize..5000) {
            let kind = ProductKind::for_tokens(tokens);
            let tiles = tokens.div_ceil(kind.tile_tokens());
            let launch = product(kind, rows, tiles);
            let block_rows = if kind == ProductKind::Many { 128 } else { 16 };
            prop_assert!(launch.grid[0] as usize * block_rows >= rows);
            prop_assert!((launch.grid[0] as usize - 1) * block_rows < rows);
            prop_assert!(launch.grid[1] as usize * kind.tile_tokens() >= tokens);
        }

        #[test]
        fn tiles_of_experts_suffice(
            counts in proptest::collection::vec(0usize..40, 1..30), tile_rows in 1usize..130
        ) {
            let needed: usize = counts.iter().map(|count| count.div_ceil(tile_rows)).sum();
            prop_assert!(needed <= most_tiles(counts.iter().sum(), counts.len(), tile_rows));
        }
    }
}
