// Experts: which of them a row goes to, the rows of each expert together for the matrix products, and the sum of their
// results. A row's experts, their weights and the order in which they are added follow from its own scores alone.
#include "common.cuh"

struct RouteArguments {
    // [rows, experts].
    u64 scores;
    // [rows, per_token]: the chosen experts, ascending, and what their results are multiplied with.
    u64 chosen;
    u64 weights;
    u32 rows;
    u32 experts;
    u32 per_token;
    // Whether the weights of the chosen add up to 1.
    u32 normalise;
};
static_assert(sizeof(RouteArguments) == 40, "the layout that Rust knows");

// A warp has a row.
KERNEL(route, RouteArguments, 128) {
    const u32 lane = THREAD % 32, row = BLOCK_X * 4 + THREAD / 32;
    if (row >= a.rows) return;
    const f32* scores = reinterpret_cast<const f32*>(a.scores) + static_cast<u64>(row) * a.experts;
    u32* chosen = reinterpret_cast<u32*>(a.chosen) + static_cast<u64>(row) * a.per_token;
    f32* weights = reinterpret_cast<f32*>(a.weights) + static_cast<u64>(row) * a.per_token;
    u64 last = ~0ull;
    f32 highest = 0;
    for (u32 round = 0; round < a.per_token; ++round) {
        u64 best = 0;
        for (u32 i = lane; i < a.experts; i += 32) {
            u64 key = sortable_first(scores[i], i);
            if (key < last && key > best) best = key;
        }
        last = warp_max(best);
        u32 expert = 0xffffffffu - static_cast<u32>(last);
        if (round == 0) highest = scores[expert];
        if (lane == 0) {
            // Put in its place among those chosen before.
            u32 at = round;
            for (; at > 0 && chosen[at - 1] > expert; --at) chosen[at] = chosen[at - 1];
            chosen[at] = expert;
        }
    }
    f32 total = 0;
    for (u32 i = lane; i < a.experts; i += 32) total = total + expf(scores[i] - highest);
    total = warp_sum(total);
    if (lane != 0) return;
    f32 of_chosen = 0;
    for (u32 i = 0; i < a.per_token; ++i) {
        weights[i] = expf(scores[chosen[i]] - highest) / total;
        of_chosen = of_chosen + weights[i];
    }
    if (!a.normalise) return;
    for (u32 i = 0; i < a.per_token; ++i) weights[i] = weights[i] / of_chosen;
}

struct GroupArguments {
    // [routes]: the expert of each route.
    u64 chosen;
    // [routes]: the row of each place; places are ordered by expert, those of an expert by row.
    u64 gather;
    // [routes]: the place of each route.
    u64 places;
    // Three numbers per tile (see product.cu).
    u64 tiles;
    u32 routes;
    u32 per_token;
    u32 experts;
    // Rows of a tile, and of the table of tiles.
    u32 tile_rows;
    u32 most_tiles;
    u32 unused;
};
static_assert(sizeof(GroupArguments) == 56, "the layout that Rust knows");

// A single block; a warp has one expert after the other.
KERNEL(group_routes, GroupArguments, 1024) {
    u32* counts = reinterpret_cast<u32*>(shared_bytes);
    u32* starts = counts + a.experts;
    u32* first_tiles = starts + a.experts;
    const u32* chosen = reinterpret_cast<const u32*>(a.chosen);
    const u32 warp = THREAD / 32, lane = THREAD % 32, warps = THREADS / 32;
    // Of 32 routes at a time, those of an expert.
    auto those_of = [&](u32 expert, u32 from) {
        return lanes_where(from + lane < a.routes && chosen[from + lane] == expert);
    };
    for (u32 expert = warp; expert < a.experts; expert += warps) {
        u32 count = 0;
        for (u32 from = 0; from < a.routes; from += 32) count += count_bits(those_of(expert, from));
        if (lane == 0) counts[expert] = count;
    }
    barrier();
    if (THREAD == 0) {
        u32 start = 0, tile = 0;
        for (u32 expert = 0; expert < a.experts; ++expert) {
            starts[expert] = start;
            first_tiles[expert] = tile;
            start += counts[expert];
            tile += (counts[expert] + a.tile_rows - 1) / a.tile_rows;
        }
    }
    u32* tiles = reinterpret_cast<u32*>(a.tiles);
    for (u32 i = THREAD; i < 3 * a.most_tiles; i += THREADS) tiles[i] = 0;
    barrier();
    u32* gather = reinterpret_cast<u32*>(a.gather);
    u32* places = reinterpret_cast<u32*>(a.places);
    for (u32 expert = warp; expert < a.experts; expert += warps) {
        u32 place = starts[expert];
        for (u32 from = 0; from < a.routes; from += 32) {
            u32 those = those_of(expert, from);
            if (those >> lane & 1) {
                u32 own = place + count_bits(those & ((1u << lane) - 1));
                gather[own] = (from + lane) / a.per_token;
                places[from + lane] = own;
            }
            place += count_bits(those);
        }
        for (u32 i = lane; i * a.tile_rows < counts[expert]; i += 32) {
            u32* tile = tiles + 3 * (first_tiles[expert] + i);
            tile[0] = expert;
            tile[1] = starts[expert] + i * a.tile_rows;
            tile[2] = least(a.tile_rows, counts[expert] - i * a.tile_rows);
        }
    }
}

struct CombineArguments {
    // [routes, width]: results of experts, by place.
    u64 results;
    // [rows, per_token].
    u64 places;
    u64 weights;
    // [rows, width].
    u64 out;
    u32 width;
    u32 per_token;
    // Whether the sum is added to what `out` holds.
    u32 accumulate;
    u32 unused;
};
static_assert(sizeof(CombineArguments) == 48, "the layout that Rust knows");

KERNEL(combine, CombineArguments, 256) {
    const u64 row = BLOCK_X;
    const u32* places = reinterpret_cast<const u32*>(a.places) + row * a.per_token;
    const f32* weights = reinterpret_cast<const f32*>(a.weights) + row * a.per_token;
    const f32* results = reinterpret_cast<const f32*>(a.results);
    f32* out = reinterpret_cast<f32*>(a.out) + row * a.width;
    for (u32 i = THREAD; i < a.width; i += THREADS) {
        f32 sum = 0;
        for (u32 j = 0; j < a.per_token; ++j) {
            sum = fmaf(results[static_cast<u64>(places[j]) * a.width + i], weights[j], sum);
        }
        out[i] = a.accumulate ? out[i] + sum : sum;
    }
}
