// Grouped low-rank products: out[row] += scale · B (A x[row]), each row with the factors of its own adapter.
//
// The order of additions: of an element of A x, lane l adds columns l, l + 32, .. and the lanes are added by a fixed
// tree; an element of the product adds the elements of A x in ascending order and is then added to `out`.
#include "common.cuh"

// An adapter's factors for one matrix, both [rank, ..]; no address where it has none.
struct Factors {
    u64 a;
    u64 b;
    u32 a_type;
    u32 b_type;
    u32 rank;
    f32 scale;
};

struct LowRankArguments {
    // [rows, columns] in f32.
    u64 x;
    // [rows, most_rank]: A x.
    u64 inner;
    // [rows, width].
    u64 out;
    // Per row its adapter, ~0 for none.
    u64 adapters;
    // Per adapter.
    u64 factors;
    u32 columns;
    u32 width;
    u32 most_rank;
    u32 unused;
};
static_assert(sizeof(LowRankArguments) == 56, "the layout that Rust knows");

DEVICE Factors factors_of(const LowRankArguments& a, u32 row) {
    u32 adapter = reinterpret_cast<const u32*>(a.adapters)[row];
    if (adapter == 0xffffffffu) return Factors{};
    return reinterpret_cast<const Factors*>(a.factors)[adapter];
}

// A block has a row, a warp an element.
KERNEL(low_rank_shrink, LowRankArguments, 256) {
    const u32 row = BLOCK_X, lane = THREAD % 32, j = BLOCK_Y * 8 + THREAD / 32;
    const Factors factors = factors_of(a, row);
    if (factors.a == 0 || j >= factors.rank) return;
    const f32* x = reinterpret_cast<const f32*>(a.x) + static_cast<u64>(row) * a.columns;
    f32 sum = 0;
    for (u32 k = lane; k < a.columns; k += 32) {
        sum = fmaf(plain_element(factors.a, factors.a_type, static_cast<u64>(j) * a.columns + k), x[k], sum);
    }
    sum = warp_sum(sum);
    if (lane == 0) {
        reinterpret_cast<f32*>(a.inner)[static_cast<u64>(row) * a.most_rank + j] = factors.scale * sum;
    }
}

// A block has a row, a thread an element.
KERNEL(low_rank_expand, LowRankArguments, 256) {
    const u32 row = BLOCK_X, n = BLOCK_Y * 256 + THREAD;
    const Factors factors = factors_of(a, row);
    if (factors.a == 0 || n >= a.width) return;
    const f32* inner = reinterpret_cast<const f32*>(a.inner) + static_cast<u64>(row) * a.most_rank;
    f32 sum = 0;
    for (u32 j = 0; j < factors.rank; ++j) {
        sum = fmaf(plain_element(factors.b, factors.b_type, static_cast<u64>(j) * a.width + n), inner[j], sum);
    }
    f32* out = reinterpret_cast<f32*>(a.out) + static_cast<u64>(row) * a.width + n;
    *out = *out + sum;
}
