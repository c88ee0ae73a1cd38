// Rotary positions with writing of keys and values, and attention over the blocks in which they are cached.
//
// A block of the cache holds 16 tokens of all layers as [layer][key|value][kv head][token][head_dim].
//
// The order of operations of a query row follows from its position alone: positions are taken in tiles of 64 that start
// at multiples of 64, four of them are a partition with a softmax of its own, and partitions are merged in ascending
// order. So a long row may be cut among several blocks of threads (`attend_merge` puts the partitions together), or
// computed with many others, with the same bits.
#include "common.cuh"

constexpr u32 BLOCK_TOKENS = 16;
constexpr f32 LOG2_E = 1.44269504f;

DEVICE f32 minus_infinity() { return bits_to_f32(0xff800000u); }

struct AngleArguments {
    // [rows].
    u64 positions;
    // Which rows are of sequences beyond longrope's original context, [rows]; 0 where none can be.
    u64 longs;
    // [half], radians per token; and those of long sequences.
    u64 frequencies;
    u64 long_frequencies;
    // Per row: cosines, then sines.
    u64 out;
    u32 half;
    f32 magnitude;
    f32 long_magnitude;
    u32 unused;
};
static_assert(sizeof(AngleArguments) == 56, "the layout that Rust knows");

KERNEL(angles, AngleArguments, 64) {
    const u64 row = BLOCK_X;
    const f32 position = static_cast<f32>(reinterpret_cast<const u32*>(a.positions)[row]);
    f32* out = reinterpret_cast<f32*>(a.out) + row * 2 * a.half;
    const bool is_long = a.longs != 0 && reinterpret_cast<const u32*>(a.longs)[row] != 0;
    const f32* frequencies = reinterpret_cast<const f32*>(is_long ? a.long_frequencies : a.frequencies);
    const f32 magnitude = is_long ? a.long_magnitude : a.magnitude;
    for (u32 i = THREAD; i < a.half; i += THREADS) {
        // The angle is rounded to f32 as in the reference implementation, its sine is then exact.
        f64 angle = static_cast<f64>(position * frequencies[i]);
        out[i] = static_cast<f32>(cos(angle)) * magnitude;
        out[a.half + i] = static_cast<f32>(sin(angle)) * magnitude;
    }
}

struct PrepareArguments {
    // [rows, heads · head_dim] and twice [rows, kv_heads · head_dim] in f32; queries and keys change in place.
    u64 query;
    u64 key;
    u64 value;
    // Queries once more, in f16; 0 where not wanted.
    u64 query_f16;
    // Per row: cosines, then sines.
    u64 angles;
    // RMS norms of heads, [head_dim]; 0 without.
    u64 query_norm;
    u64 key_norm;
    // Per row: its position, and its sequence.
    u64 positions;
    u64 sequences;
    // Addresses of blocks, and where in them each sequence's begin; 0 where nothing is cached.
    u64 blocks;
    u64 first_block;
    // Bytes before the layer in a block.
    u64 layer_offset;
    u32 heads;
    u32 kv_heads;
    u32 head_dim;
    // Rotated pairs; 0 without rotation.
    u32 half;
    u32 query_norm_type;
    u32 key_norm_type;
    f32 epsilon;
    // Added to the norms' weights.
    f32 offset;
    // Whether the cache is in f32; else in f16.
    u32 cache_f32;
    u32 unused;
};
static_assert(sizeof(PrepareArguments) == 136, "the layout that Rust knows");

// Normalises and rotates a head in place. Lane l reads and writes elements that belong to pairs l, l + 32, .. and
// unpaired ones alike.
DEVICE void prepare_head(f32* x, u64 norm, u32 norm_type, const f32* angles, const PrepareArguments& a) {
    const u32 lane = THREAD % 32;
    f32 factor = 1;
    if (norm != 0) {
        f32 squares = 0;
        for (u32 i = lane; i < a.head_dim; i += 32) squares = fmaf(x[i], x[i], squares);
        factor = 1.0f / sqrtf(warp_sum(squares) / static_cast<f32>(a.head_dim) + a.epsilon);
    }
    auto normalised = [&](u32 i) {
        return norm != 0 ? x[i] * factor * (plain_element(norm, norm_type, i) + a.offset) : x[i];
    };
    for (u32 i = lane; i < a.half; i += 32) {
        f32 c = angles[i], s = angles[a.half + i];
        f32 p = normalised(i), q = normalised(i + a.half);
        x[i] = p * c - q * s;
        x[i + a.half] = q * c + p * s;
    }
    for (u32 i = 2 * a.half + lane; i < a.head_dim; i += 32) x[i] = normalised(i);
}

// A block has a row, a warp one head of it after the other.
KERNEL(prepare, PrepareArguments, 128) {
    const u64 row = BLOCK_X;
    const u32 lane = THREAD % 32;
    const f32* angles = reinterpret_cast<const f32*>(a.angles) + row * 2 * a.half;
    const u32 position = reinterpret_cast<const u32*>(a.positions)[row];
    for (u32 index = THREAD / 32; index < a.heads + 2 * a.kv_heads; index += THREADS / 32) {
        if (index < a.heads) {
            u64 at = (row * a.heads + index) * a.head_dim;
            f32* x = reinterpret_cast<f32*>(a.query) + at;
            prepare_head(x, a.query_norm, a.query_norm_type, angles, a);
            if (a.query_f16 != 0) {
                u16* to = reinterpret_cast<u16*>(a.query_f16) + at;
                // Elements of a pair may have been written by another lane.
                warp_barrier();
                for (u32 i = lane; i < a.head_dim; i += 32) to[i] = f32_to_f16(x[i]);
            }
            continue;
        }
        const bool is_value = index >= a.heads + a.kv_heads;
        const u32 head = index - a.heads - (is_value ? a.kv_heads : 0);
        u64 at = (row * a.kv_heads + head) * a.head_dim;
        f32* x = reinterpret_cast<f32*>(is_value ? a.value : a.key) + at;
        if (!is_value) prepare_head(x, a.key_norm, a.key_norm_type, angles, a);
        if (a.blocks == 0) continue;
        u32 sequence = reinterpret_cast<const u32*>(a.sequences)[row];
        u64 index_of_block = reinterpret_cast<const u32*>(a.first_block)[sequence] + position / BLOCK_TOKENS;
        u64 block = reinterpret_cast<const u64*>(a.blocks)[index_of_block] + a.layer_offset;
        u64 place = ((is_value ? a.kv_heads : 0) + head) * BLOCK_TOKENS + position % BLOCK_TOKENS;
        warp_barrier();
        for (u32 i = lane; i < a.head_dim; i += 32) {
            if (a.cache_f32) {
                reinterpret_cast<f32*>(block)[place * a.head_dim + i] = x[i];
            } else {
                reinterpret_cast<u16*>(block)[place * a.head_dim + i] = f32_to_f16(x[i]);
            }
        }
    }
}

// ---- Attention by matrix instructions: a cache in f16, heads of a multiple of 8 up to 256. ----

constexpr u32 TILE_POSITIONS = 64;
constexpr u32 PARTITION = 256;
constexpr u32 ATTEND_THREADS = 128;

// Query rows that a block of threads works on: some tokens of a sequence, and all their partitions or one of them.
struct Item {
    // Row of the first token.
    u32 row;
    u32 tokens;
    u32 sequence;
    // The partition, if it is only one: then the result goes to this slot of the partial results. Else ~0, and the
    // result is final.
    u32 partition;
    u32 slot;
};

struct AttendArguments {
    // [rows, heads · head_dim] in f16.
    u64 query;
    // [rows, heads · head_dim] in f32.
    u64 out;
    // Items; those without tokens are skipped.
    u64 items;
    u64 positions;
    u64 blocks;
    u64 first_block;
    // [slot][heads][2 + head_dim]: largest score, sum, and unnormalised result.
    u64 partials;
    u64 layer_offset;
    u32 heads;
    u32 kv_heads;
    u32 head_dim;
    // Positions that a token looks at, itself included; 0 for all.
    u32 window;
    f32 scale;
    // 0 without.
    f32 cap;
};
static_assert(sizeof(AttendArguments) == 88, "the layout that Rust knows");

// A softmax under way: the largest score (times log2 e), and the sum of the weights relative to it.
struct Softmax {
    f32 most;
    f32 sum;
};

// Takes up `part` into `total` and gives what the results of both are to be multiplied with.
DEVICE void merge(Softmax& total, const Softmax& part, f32& of_total, f32& of_part) {
    of_total = 1;
    of_part = 0;
    if (part.most == minus_infinity()) return;
    f32 most = fmaxf(total.most, part.most);
    of_total = total.most == minus_infinity() ? 0.0f : exp2f(total.most - most);
    of_part = exp2f(part.most - most);
    total.sum = fmaf(part.sum, of_part, total.sum * of_total);
    total.most = most;
}

DEVICE f32 merged(f32 total, f32 part, f32 of_total, f32 of_part) { return fmaf(part, of_part, total * of_total); }

// The score of a dot product, times log2 e.
DEVICE f32 score_of(f32 dot, f32 scale, f32 cap) {
    f32 score = dot * scale;
    if (cap != 0) score = cap * tanhf(score / cap);
    return score * LOG2_E;
}

// HD: the head dimension rounded up to one of these kernels'. SIXTEENS: query rows in sixteens.
template <u32 HD, u32 SIXTEENS>
DEVICE void attend(const AttendArguments& a) {
    constexpr u32 ROWS = 16 * SIXTEENS;
    constexpr u32 PIECES = HD / 8;         // of a head
    constexpr u32 COLUMNS = HD / 32;       // of the result per warp, in eights
    constexpr u32 V_STRIDE = HD + 8, P_STRIDE = TILE_POSITIONS + 8;
    u16* queries = reinterpret_cast<u16*>(shared_bytes);  // [32 dimensions][row][dimension]
    u16* keys = queries + ROWS * HD;                      // [32 dimensions][position][dimension]
    u16* values = keys + TILE_POSITIONS * HD;             // [position][dimension, padded]
    u16* weights = values + TILE_POSITIONS * V_STRIDE;    // [row][position, padded]
    f32* maxima = reinterpret_cast<f32*>(weights + ROWS * P_STRIDE);  // [warp][row]
    f32* sums = maxima + 4 * ROWS;

    const Item item = reinterpret_cast<const Item*>(a.items)[BLOCK_X];
    if (item.tokens == 0) return;
    const u32 warp = THREAD / 32, lane = THREAD % 32, g = lane / 4, t = lane % 4;
    // Rows are tokens times heads of the group, at most sixteen of which are taken at a time.
    const u32 group = a.heads / a.kv_heads, together = least(group, 16), parts = (group + together - 1) / together;
    const u32 kv_head = BLOCK_Y / parts, first_head = BLOCK_Y % parts * together;
    auto has_row = [&](u32 r) { return r / together < item.tokens && first_head + r % together < group; };
    auto head_of = [&](u32 r) { return kv_head * group + first_head + r % together; };
    const u32* positions = reinterpret_cast<const u32*>(a.positions) + item.row;
    auto limit_of = [&](u32 token) { return positions[token] + 1; };
    auto first_of = [&](u32 limit) { return a.window != 0 && limit > a.window ? limit - a.window : 0; };

    const bool whole = item.slot == 0xffffffffu;
    u32 end = limit_of(item.tokens - 1);
    u32 start = first_of(limit_of(0)) / TILE_POSITIONS * TILE_POSITIONS;
    if (!whole) {
        end = least(end, (item.partition + 1) * PARTITION);
        start = start < item.partition * PARTITION ? item.partition * PARTITION : start;
    }
    const u64* blocks =
        reinterpret_cast<const u64*>(a.blocks) + reinterpret_cast<const u32*>(a.first_block)[item.sequence];

    auto begin_tile = [&](u32 from, bool of_values) {
        for (u32 i = THREAD; i < TILE_POSITIONS * PIECES; i += ATTEND_THREADS) {
            u32 index = i / PIECES, piece = i % PIECES, position = from + index;
            bool valid = position < end && piece * 8 < a.head_dim;
            const void* address = reinterpret_cast<const void*>(a.query);
            if (valid) {
                u64 place = ((of_values ? a.kv_heads : 0) + kv_head) * BLOCK_TOKENS + position % BLOCK_TOKENS;
                u64 block = blocks[position / BLOCK_TOKENS] + a.layer_offset;
                address = reinterpret_cast<const u16*>(block) + place * a.head_dim + piece * 8;
            }
            u16* to = of_values ? values + index * V_STRIDE + piece * 8
                                : keys + (piece / 4 * TILE_POSITIONS + index) * 32 + piece % 4 * 8;
            copy_16(to, address, valid);
        }
    };
    if (start < end) begin_tile(start, false);
    copies_commit();
    if (start < end) begin_tile(start, true);
    copies_commit();
    for (u32 i = THREAD; i < ROWS * PIECES; i += ATTEND_THREADS) {
        u32 r = i / PIECES, piece = i % PIECES;
        Piece query = {};
        if (has_row(r) && piece * 8 < a.head_dim) {
            u64 at = (static_cast<u64>(item.row + r / together) * a.heads + head_of(r)) * a.head_dim + piece * 8;
            query = load_piece(reinterpret_cast<const u16*>(a.query) + at);
        }
        *reinterpret_cast<Piece*>(queries + (piece / 4 * ROWS + r) * 32 + piece % 4 * 8) = query;
    }

    u32 limit[SIXTEENS][2], first[SIXTEENS][2];
    Softmax total[SIXTEENS][2], part[SIXTEENS][2];
    f32 total_out[SIXTEENS][COLUMNS][4] = {}, out[SIXTEENS][COLUMNS][4] = {};
    UNROLL for (u32 s = 0; s < SIXTEENS; ++s) {
        UNROLL for (u32 h = 0; h < 2; ++h) {
            u32 r = s * 16 + h * 8 + g;
            limit[s][h] = has_row(r) ? limit_of(r / together) : 0;
            first[s][h] = first_of(limit[s][h]);
            total[s][h] = part[s][h] = Softmax{minus_infinity(), 0};
        }
    }

    for (u32 tile = start; tile < end; tile += TILE_POSITIONS) {
        copies_wait<1>();
        barrier();
        // Scores of all rows with sixteen positions per warp.
        f32 scores[SIXTEENS][2][4] = {};
        UNROLL for (u32 dims = 0; dims < HD / 32; ++dims) {
            Piece k[2];
            UNROLL for (u32 n = 0; n < 2; ++n) {
                k[n] = load_piece(keys + (dims * TILE_POSITIONS + warp * 16 + n * 8 + g) * 32 + 8 * t);
            }
            UNROLL for (u32 s = 0; s < SIXTEENS; ++s) {
                Piece p = load_piece(queries + (dims * ROWS + s * 16 + g) * 32 + 8 * t);
                Piece q = load_piece(queries + (dims * ROWS + s * 16 + 8 + g) * 32 + 8 * t);
                UNROLL for (u32 n = 0; n < 2; ++n) {
                    multiply_f16(scores[s][n], p.x[0], q.x[0], p.x[1], q.x[1], k[n].x[0], k[n].x[1]);
                    multiply_f16(scores[s][n], p.x[2], q.x[2], p.x[3], q.x[3], k[n].x[2], k[n].x[3]);
                }
            }
        }
        UNROLL for (u32 s = 0; s < SIXTEENS; ++s) {
            UNROLL for (u32 h = 0; h < 2; ++h) {
                f32 most = minus_infinity();
                UNROLL for (u32 n = 0; n < 2; ++n) {
                    UNROLL for (u32 i = 0; i < 2; ++i) {
                        u32 position = tile + warp * 16 + n * 8 + 2 * t + i;
                        bool visible = position < limit[s][h] && position >= first[s][h];
                        f32 score = score_of(scores[s][n][2 * h + i], a.scale, a.cap);
                        scores[s][n][2 * h + i] = visible ? score : minus_infinity();
                        most = fmaxf(most, scores[s][n][2 * h + i]);
                    }
                }
                most = fmaxf(most, lane_xor(most, 1));
                most = fmaxf(most, lane_xor(most, 2));
                if (t == 0) maxima[warp * ROWS + s * 16 + h * 8 + g] = most;
            }
        }
        barrier();
        if (tile + TILE_POSITIONS < end) begin_tile(tile + TILE_POSITIONS, false);
        copies_commit();
        UNROLL for (u32 s = 0; s < SIXTEENS; ++s) {
            UNROLL for (u32 h = 0; h < 2; ++h) {
                u32 r = s * 16 + h * 8 + g;
                f32 most = part[s][h].most;
                UNROLL for (u32 w = 0; w < 4; ++w) most = fmaxf(most, maxima[w * ROWS + r]);
                f32 of_old = part[s][h].most == minus_infinity() ? 0.0f : exp2f(part[s][h].most - most);
                if (part[s][h].most == most) of_old = 1;
                part[s][h] = Softmax{most, part[s][h].sum * of_old};
                f32 sum = 0;
                UNROLL for (u32 n = 0; n < 2; ++n) {
                    u16 narrow[2];
                    UNROLL for (u32 i = 0; i < 2; ++i) {
                        f32 score = scores[s][n][2 * h + i];
                        // Of a row that sees nothing yet, all is minus infinity.
                        narrow[i] = f32_to_f16(score == minus_infinity() ? 0.0f : exp2f(score - most));
                    }
                    // What is added up are the weights that the values will be multiplied with.
                    sum = sum + (f16_to_f32(narrow[0]) + f16_to_f32(narrow[1]));
                    u16* to = weights + r * P_STRIDE + warp * 16 + n * 8 + 2 * t;
                    *reinterpret_cast<u32*>(to) = pair(narrow[0], narrow[1]);
                }
                sum = sum + lane_xor(sum, 1);
                sum = sum + lane_xor(sum, 2);
                if (t == 0) sums[warp * ROWS + r] = sum;
                UNROLL for (u32 n = 0; n < COLUMNS; ++n) {
                    UNROLL for (u32 i = 0; i < 2; ++i) out[s][n][2 * h + i] = out[s][n][2 * h + i] * of_old;
                }
            }
        }
        copies_wait<1>();
        barrier();
        // A quarter of the dimensions of all rows' results per warp.
        UNROLL for (u32 k = 0; k < TILE_POSITIONS / 16; ++k) {
            u32 w[SIXTEENS][4];
            UNROLL for (u32 s = 0; s < SIXTEENS; ++s) {
                UNROLL for (u32 i = 0; i < 4; ++i) {
                    u32 r = s * 16 + i % 2 * 8 + g;
                    w[s][i] = *reinterpret_cast<const u32*>(weights + r * P_STRIDE + k * 16 + i / 2 * 8 + 2 * t);
                }
            }
            UNROLL for (u32 n = 0; n < COLUMNS; ++n) {
                u32 b0, b1;
                load_columns(b0, b1, values + (k * 16 + lane % 16) * V_STRIDE + warp * (HD / 4) + n * 8);
                UNROLL for (u32 s = 0; s < SIXTEENS; ++s) {
                    multiply_f16(out[s][n], w[s][0], w[s][1], w[s][2], w[s][3], b0, b1);
                }
            }
        }
        UNROLL for (u32 s = 0; s < SIXTEENS; ++s) {
            UNROLL for (u32 h = 0; h < 2; ++h) {
                u32 r = s * 16 + h * 8 + g;
                f32 sum = (sums[r] + sums[ROWS + r]) + (sums[2 * ROWS + r] + sums[3 * ROWS + r]);
                part[s][h].sum = part[s][h].sum + sum;
            }
        }
        barrier();
        if (tile + TILE_POSITIONS < end) begin_tile(tile + TILE_POSITIONS, true);
        copies_commit();
        if ((tile + TILE_POSITIONS) % PARTITION == 0 || tile + TILE_POSITIONS >= end) {
            UNROLL for (u32 s = 0; s < SIXTEENS; ++s) {
                UNROLL for (u32 h = 0; h < 2; ++h) {
                    f32 of_total, of_part;
                    merge(total[s][h], part[s][h], of_total, of_part);
                    part[s][h] = Softmax{minus_infinity(), 0};
                    UNROLL for (u32 n = 0; n < COLUMNS; ++n) {
                        UNROLL for (u32 i = 2 * h; i < 2 * h + 2; ++i) {
                            total_out[s][n][i] = merged(total_out[s][n][i], out[s][n][i], of_total, of_part);
                            out[s][n][i] = 0;
                        }
                    }
                }
            }
        }
    }
    copies_wait<0>();

    UNROLL for (u32 s = 0; s < SIXTEENS; ++s) {
        UNROLL for (u32 h = 0; h < 2; ++h) {
            u32 r = s * 16 + h * 8 + g;
            if (!has_row(r)) continue;
            f32* to;
            f32 divisor = 1;
            if (whole) {
                u64 row = item.row + r / together;
                to = reinterpret_cast<f32*>(a.out) + (row * a.heads + head_of(r)) * a.head_dim;
                divisor = total[s][h].sum;
            } else {
                u64 slot = item.slot;
                to = reinterpret_cast<f32*>(a.partials) + (slot * a.heads + head_of(r)) * (2 + a.head_dim);
                if (warp == 0 && t == 0) {
                    to[0] = total[s][h].most;
                    to[1] = total[s][h].sum;
                }
                to += 2;
            }
            UNROLL for (u32 n = 0; n < COLUMNS; ++n) {
                UNROLL for (u32 i = 0; i < 2; ++i) {
                    u32 column = warp * (HD / 4) + n * 8 + 2 * t + i;
                    if (column < a.head_dim) to[column] = total_out[s][n][2 * h + i] / divisor;
                }
            }
        }
    }
}

KERNEL(attend_few_32, AttendArguments, ATTEND_THREADS) { attend<32, 1>(a); }
KERNEL(attend_few_64, AttendArguments, ATTEND_THREADS) { attend<64, 1>(a); }
KERNEL(attend_few_96, AttendArguments, ATTEND_THREADS) { attend<96, 1>(a); }
KERNEL(attend_few_128, AttendArguments, ATTEND_THREADS) { attend<128, 1>(a); }
KERNEL(attend_few_256, AttendArguments, ATTEND_THREADS) { attend<256, 1>(a); }
KERNEL(attend_many_32, AttendArguments, ATTEND_THREADS) { attend<32, 4>(a); }
KERNEL(attend_many_64, AttendArguments, ATTEND_THREADS) { attend<64, 4>(a); }
KERNEL(attend_many_96, AttendArguments, ATTEND_THREADS) { attend<96, 4>(a); }
KERNEL(attend_many_128, AttendArguments, ATTEND_THREADS) { attend<128, 4>(a); }
KERNEL(attend_many_256, AttendArguments, ATTEND_THREADS) { attend<256, 2>(a); }

// A row of which every partition has a slot.
struct Merge {
    u32 row;
    u32 first_slot;
    u32 slots;
};

struct MergeArguments {
    u64 partials;
    u64 out;
    u64 merges;
    u32 heads;
    u32 head_dim;
};
static_assert(sizeof(MergeArguments) == 32, "the layout that Rust knows");

KERNEL(attend_merge, MergeArguments, 128) {
    const Merge row = reinterpret_cast<const Merge*>(a.merges)[BLOCK_X];
    const u32 head = BLOCK_Y;
    f32* out = reinterpret_cast<f32*>(a.out) + (static_cast<u64>(row.row) * a.heads + head) * a.head_dim;
    for (u32 i = THREAD; i < a.head_dim; i += THREADS) {
        Softmax total = {minus_infinity(), 0};
        f32 sum = 0;
        for (u64 slot = row.first_slot; slot < row.first_slot + row.slots; ++slot) {
            const f32* from = reinterpret_cast<const f32*>(a.partials) + (slot * a.heads + head) * (2 + a.head_dim);
            f32 of_total, of_part;
            merge(total, Softmax{from[0], from[1]}, of_total, of_part);
            sum = merged(sum, from[2 + i], of_total, of_part);
        }
        if (row.slots > 0) out[i] = sum / total.sum;
    }
}

// ---- Attention by plain arithmetic: a cache in f32, keys and values that are not cached, heads of any size. A block
// has a head of a row; 128 positions are taken at a time, starting at multiples of 128. ----

struct PlainAttendArguments {
    // [rows, heads · head_dim] in f32.
    u64 query;
    u64 out;
    // [rows, kv_heads · head_dim] in f32 where nothing is cached, 0 otherwise.
    u64 key;
    u64 value;
    // Per row: its position, and its sequence.
    u64 positions;
    u64 sequences;
    u64 blocks;
    u64 first_block;
    // Per sequence: its first row and how many it has.
    u64 sequence_rows;
    u64 layer_offset;
    u32 heads;
    u32 kv_heads;
    u32 head_dim;
    u32 window;
    f32 scale;
    f32 cap;
    u32 cache_f32;
    // Whether a token sees all tokens of its sequence (all of which must be in the batch).
    u32 bidirectional;
};
static_assert(sizeof(PlainAttendArguments) == 112, "the layout that Rust knows");

constexpr u32 PLAIN_THREADS = 128;

KERNEL(attend_plain, PlainAttendArguments, PLAIN_THREADS) {
    f32* query = reinterpret_cast<f32*>(shared_bytes);
    f32* out = query + a.head_dim;
    f32* weights = out + a.head_dim;
    f32* memory = weights + PLAIN_THREADS;
    const u64 row = BLOCK_X;
    const u32 head = BLOCK_Y, kv_head = head / (a.heads / a.kv_heads);
    const u32 sequence = reinterpret_cast<const u32*>(a.sequences)[row];
    const u32* rows = reinterpret_cast<const u32*>(a.sequence_rows) + 2 * sequence;
    const u32 position = reinterpret_cast<const u32*>(a.positions)[row];
    const u32 limit = a.bidirectional ? rows[1] : position + 1;
    const u32 first = a.window != 0 && limit > a.window ? limit - a.window : 0;
    const u64 own = (row * a.heads + head) * a.head_dim;
    for (u32 i = THREAD; i < a.head_dim; i += THREADS) {
        query[i] = reinterpret_cast<const f32*>(a.query)[own + i];
        out[i] = 0;
    }
    // Element `i` of the key or value at a position.
    auto at = [&](u32 position, bool is_value, u32 i) {
        if (a.key != 0) {
            u64 index = (static_cast<u64>(rows[0] + position) * a.kv_heads + kv_head) * a.head_dim + i;
            return reinterpret_cast<const f32*>(is_value ? a.value : a.key)[index];
        }
        u64 first_block = reinterpret_cast<const u32*>(a.first_block)[sequence];
        u64 block = reinterpret_cast<const u64*>(a.blocks)[first_block + position / BLOCK_TOKENS] + a.layer_offset;
        u64 token = ((is_value ? a.kv_heads : 0) + kv_head) * BLOCK_TOKENS + position % BLOCK_TOKENS;
        u64 index = token * a.head_dim + i;
        return a.cache_f32 ? reinterpret_cast<const f32*>(block)[index]
                           : f16_to_f32(reinterpret_cast<const u16*>(block)[index]);
    };
    Softmax total = {minus_infinity(), 0};
    for (u32 tile = first / PLAIN_THREADS * PLAIN_THREADS; tile < limit; tile += PLAIN_THREADS) {
        const u32 mine = tile + THREAD;
        f32 score = minus_infinity();
        // The query is in shared memory, and the weights of the tile before have been used, from here on.
        barrier();
        if (mine >= first && mine < limit) {
            f32 dot = 0;
            for (u32 i = 0; i < a.head_dim; ++i) dot = fmaf(query[i], at(mine, false, i), dot);
            score = score_of(dot, a.scale, a.cap);
        }
        const f32 most = fmaxf(total.most, block_max(score, memory));
        const f32 of_old = total.most == minus_infinity() ? 0.0f : exp2f(total.most - most);
        const f32 weight = score == minus_infinity() ? 0.0f : exp2f(score - most);
        weights[THREAD] = weight;
        total = Softmax{most, fmaf(total.sum, of_old, block_sum(weight, memory))};
        const u32 from = tile > first ? tile : first, to = least(limit, tile + PLAIN_THREADS);
        for (u32 i = THREAD; i < a.head_dim; i += THREADS) {
            f32 sum = out[i] * of_old;
            for (u32 p = from; p < to; ++p) sum = fmaf(weights[p - tile], at(p, true, i), sum);
            out[i] = sum;
        }
    }
    for (u32 i = THREAD; i < a.head_dim; i += THREADS) {
        reinterpret_cast<f32*>(a.out)[own + i] = out[i] / total.sum;
    }
}
