// Matrix products: out[token][row] (+)= Σ_k weight[row][k] · x[token][k] + bias[row], the weights as stored.
//
// The order of additions of an output element follows from the number of columns alone: they are cut into eight slices
// of whole groups of 32 (the last ones may be empty); in a slice the matrix unit adds sixteen products at a time, in
// ascending order; the slices are added in ascending order. `product_few` gives a slice to each warp, `product_many`
// takes one after the other: they have the same result, bit by bit, so a row's does not depend on the batch.
//
// Columns of a group are permuted in the same way on both sides of every matrix instruction: lane 4g + t has columns
// 8t to 8t + 7, so that it reads 16 bytes at a time; the first instruction takes the first four of them, the second
// the others.
#include "formats.cuh"

struct ProductArguments {
    // [rows, columns] as stored; with tiles, the addresses of the experts' matrices, 0 for those that are not computed.
    u64 weight;
    // Operands, [.., columns rounded up to whole groups]; f32 and not rounded up for weights in f32.
    u64 x;
    // Factors of the rows of x in f16.
    u64 scales;
    // [rows], 0 without.
    u64 bias;
    // [.., rows] in f32.
    u64 out;
    // For experts: TILE_NUMBERS numbers per tile; 0 without.
    u64 tiles;
    // For experts: which row of x each row of the output is of; 0 where they are the same.
    u64 gather;
    u64 row_bytes;
    u32 rows;
    u32 columns;
    u32 tokens;
    u32 bias_type;
    // Whether the product is added to what `out` holds.
    u32 accumulate;
    // Whether columns are whole groups and rows start at multiples of 16 bytes (plain types).
    u32 aligned;
};
static_assert(sizeof(ProductArguments) == 88, "the layout that Rust knows");

constexpr u32 SLICES = 8;

// Groups of a slice.
DEVICE u32 slice_groups(u32 columns) { return (whole_groups(columns) + SLICES - 1) / SLICES; }

// The tokens of a block, and the matrix that they are multiplied with.
struct Tile {
    const u8* weight;
    u32 first;
    u32 count;
};

// A tile of experts: which expert, its first row of the output, how many rows. Only the first tiles of the table are in
// use; the others have no rows.
constexpr u32 TILE_NUMBERS = 3;

DEVICE Tile find_tile(const ProductArguments& a, u32 most) {
    Tile tile;
    if (a.tiles != 0) {
        const u32* numbers = reinterpret_cast<const u32*>(a.tiles) + BLOCK_Y * TILE_NUMBERS;
        tile.weight = reinterpret_cast<const u8*>(reinterpret_cast<const u64*>(a.weight)[numbers[0]]);
        tile.first = numbers[1];
        tile.count = tile.weight != nullptr ? numbers[2] : 0;
    } else {
        tile.weight = reinterpret_cast<const u8*>(a.weight);
        tile.first = BLOCK_Y * most;
        tile.count = least(most, a.tokens - tile.first);
    }
    return tile;
}

// The row of x that a row of the output is of.
DEVICE u64 input_row(const ProductArguments& a, u32 token) {
    return a.gather != 0 ? reinterpret_cast<const u32*>(a.gather)[token] : token;
}

DEVICE void finish(const ProductArguments& a, u32 token, u32 row, f32 sum) {
    if (a.scales != 0) sum = sum * reinterpret_cast<const f32*>(a.scales)[input_row(a, token)];
    if (a.bias != 0) sum = sum + plain_element(a.bias, a.bias_type, row);
    f32* out = reinterpret_cast<f32*>(a.out) + static_cast<u64>(token) * a.rows + row;
    *out = a.accumulate ? *out + sum : sum;
}

// ---- Few tokens: a block has sixteen rows, a warp one slice of them. ----

constexpr u32 FEW_THREADS = 32 * SLICES;
constexpr u32 FEW_ROWS = 16;

template <class Format, u32 EIGHTS>
DEVICE void product_few(const ProductArguments& a) {
    f32* parts = reinterpret_cast<f32*>(shared_bytes);  // [slice][token][row]
    const u32 slice = THREAD / 32, lane = THREAD % 32, g = lane / 4, t = lane % 4;
    const Tile tile = find_tile(a, 8 * EIGHTS);
    if (tile.count == 0) return;
    const u32 groups = whole_groups(a.columns), per_slice = slice_groups(a.columns);
    const u32 first_row = BLOCK_X * FEW_ROWS;

    // Rows and tokens beyond the last are the last once more; their sums are not used.
    Row rows[2];
    UNROLL for (u32 i = 0; i < 2; ++i) {
        u64 row = least(first_row + g + 8 * i, a.rows - 1);
        rows[i] = Row{tile.weight + row * a.row_bytes, a.columns, a.aligned != 0};
    }
    const u16* x[EIGHTS];
    UNROLL for (u32 n = 0; n < EIGHTS; ++n) {
        u64 token = input_row(a, tile.first + least(n * 8 + g, tile.count - 1));
        x[n] = reinterpret_cast<const u16*>(a.x) + token * (groups * 32) + 8 * t;
    }
    f32 sums[EIGHTS][4] = {};
    const u32 end = least(groups, (slice + 1) * per_slice);
    UNROLL_4
    for (u32 group = slice * per_slice; group < end; ++group) {
        Piece w0 = operands<Format>(rows[0], group, t), w1 = operands<Format>(rows[1], group, t);
        UNROLL for (u32 n = 0; n < EIGHTS; ++n) {
            Piece b = read_only_piece(x[n] + group * 32);
            multiply<Format>(sums[n], w0.x[0], w1.x[0], w0.x[1], w1.x[1], b.x[0], b.x[1]);
            multiply<Format>(sums[n], w0.x[2], w1.x[2], w0.x[3], w1.x[3], b.x[2], b.x[3]);
        }
    }
    UNROLL for (u32 n = 0; n < EIGHTS; ++n) {
        UNROLL for (u32 i = 0; i < 4; ++i) {
            u32 token = n * 8 + 2 * t + i % 2, row = g + i / 2 * 8;
            parts[(slice * EIGHTS * 8 + token) * FEW_ROWS + row] = sums[n][i];
        }
    }
    barrier();
    for (u32 i = THREAD; i < EIGHTS * 8 * FEW_ROWS; i += FEW_THREADS) {
        u32 token = i / FEW_ROWS, row = first_row + i % FEW_ROWS;
        if (token >= tile.count || row >= a.rows) continue;
        f32 total = 0;
        for (u32 s = 0; s * per_slice < groups && s < SLICES; ++s) {
            total = total + parts[s * EIGHTS * 8 * FEW_ROWS + i];
        }
        finish(a, tile.first + token, row, total);
    }
}

// ---- Many tokens: a block has 128 rows and 128 tokens, a warp 32 rows and 64 tokens. ----

constexpr u32 MANY_THREADS = 256;
constexpr u32 MANY_ROWS = 128;
constexpr u32 MANY_TOKENS = 128;
constexpr u32 STAGES = 4;
// 16-bit operands of a stage: 32 columns of the rows, then of the tokens.
constexpr u32 STAGE = (MANY_ROWS + MANY_TOKENS) * 32;
// Pieces of the rows (and as many of the tokens) that a thread brings in per stage.
constexpr u32 PIECES = MANY_ROWS * 4 / MANY_THREADS;

template <class Format>
DEVICE void product_many(const ProductArguments& a) {
    u16* stages = reinterpret_cast<u16*>(shared_bytes);
    const u32 warp = THREAD / 32, lane = THREAD % 32, g = lane / 4, t = lane % 4;
    const Tile tile = find_tile(a, MANY_TOKENS);
    if (tile.count == 0) return;
    const u32 groups = whole_groups(a.columns), per_slice = slice_groups(a.columns);
    const u32 first_row = BLOCK_X * MANY_ROWS;
    // Plain weights that are aligned are copied without passing through registers.
    const bool direct = !Format::QUANTISED && a.aligned != 0;

    // What this thread brings in: piece `t` of these rows and tokens. Those beyond the last are the last once more.
    Row rows[PIECES];
    const u16* x[PIECES];
    UNROLL for (u32 i = 0; i < PIECES; ++i) {
        u32 index = i * (MANY_THREADS / 4) + THREAD / 4;
        u64 row = least(first_row + index, a.rows - 1);
        rows[i] = Row{tile.weight + row * a.row_bytes, a.columns, a.aligned != 0};
        u64 token = input_row(a, tile.first + least(index, tile.count - 1));
        x[i] = reinterpret_cast<const u16*>(a.x) + token * (groups * 32) + 8 * t;
    }
    auto place = [&](u32 stage, u32 i) {
        return stages + stage % STAGES * STAGE + (i * (MANY_THREADS / 4) + THREAD / 4) * 32 + 8 * t;
    };
    auto begin_stage = [&](u32 group) {
        if (group < groups) {
            UNROLL for (u32 i = 0; i < PIECES; ++i) {
                copy_16(place(group, i) + MANY_ROWS * 32, x[i] + group * 32, true);
                if (direct) {
                    const u16* from = reinterpret_cast<const u16*>(rows[i].bytes) + group * 32 + 8 * t;
                    copy_16(place(group, i), from, true);
                }
            }
        }
        copies_commit();
    };
    Piece fetched[PIECES];
    auto fetch = [&](u32 group) {
        UNROLL for (u32 i = 0; i < PIECES; ++i) fetched[i] = operands<Format>(rows[i], group, t);
    };
    auto put = [&](u32 group) {
        UNROLL for (u32 i = 0; i < PIECES; ++i) *reinterpret_cast<Piece*>(place(group, i)) = fetched[i];
    };

    f32 total[2][8][4] = {}, sums[2][8][4] = {};
    const u32 warp_row = warp % 4 * 32, warp_token = warp / 4 * 64;
    for (u32 group = 0; group < STAGES - 1; ++group) begin_stage(group);
    if (!direct) {
        fetch(0);
        put(0);
    }
    for (u32 group = 0; group < groups; ++group) {
        copies_wait<STAGES - 2>();
        // This group has arrived for all threads, and all have done with the one before it.
        barrier();
        begin_stage(group + STAGES - 1);
        const bool more = !direct && group + 1 < groups;
        if (more) fetch(group + 1);

        const u16* stage = stages + group % STAGES * STAGE;
        Piece w[2][2];
        UNROLL for (u32 m = 0; m < 2; ++m) {
            UNROLL for (u32 i = 0; i < 2; ++i) {
                w[m][i] = load_piece(stage + (warp_row + m * 16 + i * 8 + g) * 32 + 8 * t);
            }
        }
        UNROLL for (u32 n = 0; n < 8; ++n) {
            Piece b = load_piece(stage + (MANY_ROWS + warp_token + n * 8 + g) * 32 + 8 * t);
            UNROLL for (u32 m = 0; m < 2; ++m) {
                const Piece &p = w[m][0], &q = w[m][1];
                multiply<Format>(sums[m][n], p.x[0], q.x[0], p.x[1], q.x[1], b.x[0], b.x[1]);
                multiply<Format>(sums[m][n], p.x[2], q.x[2], p.x[3], q.x[3], b.x[2], b.x[3]);
            }
        }
        // The stage of the next group was last read three groups ago.
        if (more) put(group + 1);
        if ((group + 1) % per_slice == 0 || group + 1 == groups) {
            UNROLL for (u32 m = 0; m < 2; ++m) {
                UNROLL for (u32 n = 0; n < 8; ++n) {
                    UNROLL for (u32 i = 0; i < 4; ++i) {
                        total[m][n][i] = total[m][n][i] + sums[m][n][i];
                        sums[m][n][i] = 0;
                    }
                }
            }
        }
    }
    copies_wait<0>();
    UNROLL for (u32 m = 0; m < 2; ++m) {
        UNROLL for (u32 n = 0; n < 8; ++n) {
            UNROLL for (u32 i = 0; i < 4; ++i) {
                u32 row = first_row + warp_row + m * 16 + g + i / 2 * 8;
                u32 token = warp_token + n * 8 + 2 * t + i % 2;
                if (row < a.rows && token < tile.count) finish(a, tile.first + token, row, total[m][n][i]);
            }
        }
    }
}

#define PRODUCTS(Format, name) \
    KERNEL(product_few_8_##name, ProductArguments, FEW_THREADS) { product_few<Format, 1>(a); } \
    KERNEL(product_few_32_##name, ProductArguments, FEW_THREADS) { product_few<Format, 4>(a); } \
    KERNEL(product_many_##name, ProductArguments, MANY_THREADS) { product_many<Format>(a); }
OPERAND_FORMATS(PRODUCTS)
#undef PRODUCTS

// ---- Weights in f32: a warp has one row and eight tokens; lane l adds columns l, l + 32, .. in ascending order, and
// the lanes are added by a fixed tree. ----

KERNEL(product_f32, ProductArguments, 256) {
    const u32 lane = THREAD % 32, row = BLOCK_X * 8 + THREAD / 32;
    const Tile tile = find_tile(a, 8);
    if (row >= a.rows || tile.count == 0) return;
    const f32* weight = reinterpret_cast<const f32*>(tile.weight + row * a.row_bytes);
    const f32* x[8];
    UNROLL for (u32 n = 0; n < 8; ++n) {
        u64 token = input_row(a, tile.first + least(n, tile.count - 1));
        x[n] = reinterpret_cast<const f32*>(a.x) + token * a.columns;
    }
    f32 sums[8] = {};
    for (u32 k = lane; k < a.columns; k += 32) {
        f32 w = read_only(weight + k);
        UNROLL for (u32 n = 0; n < 8; ++n) sums[n] = fmaf(w, read_only(x[n] + k), sums[n]);
    }
    UNROLL for (u32 n = 0; n < 8; ++n) {
        f32 sum = warp_sum(sums[n]);
        if (lane == 0 && n < tile.count) finish(a, tile.first + n, row, sum);
    }
}
