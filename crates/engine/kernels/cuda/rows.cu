// Functions of rows: embedding, norms, activations, sums, soft caps. A block has a row.
#include "formats.cuh"

struct EmbedArguments {
    // Token ids and positions, [rows].
    u64 tokens;
    u64 positions;
    // Which row of its table a row's type is, [rows]; 0 where it is the first for all.
    u64 types;
    // The tables; 0 where the model has none.
    u64 token_table;
    u64 position_table;
    u64 type_table;
    // [rows, width] in f32.
    u64 out;
    u32 token_type;
    u32 position_type;
    u32 type_type;
    u32 width;
    // Bytes of a row of the tables.
    u64 token_bytes;
    u64 position_bytes;
    u64 type_bytes;
    f32 scale;
    u32 position_offset;
};
static_assert(sizeof(EmbedArguments) == 104, "the layout that Rust knows");

// Token, then type, then position: the order in which the reference implementation of BERT adds.
KERNEL(embed, EmbedArguments, 256) {
    const u64 row = BLOCK_X;
    const u64 token = reinterpret_cast<const u32*>(a.tokens)[row];
    const u64 position = reinterpret_cast<const u32*>(a.positions)[row] + a.position_offset;
    f32* out = reinterpret_cast<f32*>(a.out) + row * a.width;
    const u8* of_token = reinterpret_cast<const u8*>(a.token_table) + token * a.token_bytes;
    const u8* of_position = reinterpret_cast<const u8*>(a.position_table) + position * a.position_bytes;
    const u64 type = a.types != 0 ? reinterpret_cast<const u32*>(a.types)[row] : 0;
    const u8* of_type = reinterpret_cast<const u8*>(a.type_table) + type * a.type_bytes;
    for (u32 piece = THREAD; piece < whole_groups(a.width) * 4; piece += THREADS) {
        f32 x[8], y[8];
        numbers_of(a.token_type, Row{of_token, a.width, false}, piece / 4, piece % 4, x);
        UNROLL for (u32 i = 0; i < 8; ++i) x[i] = x[i] * a.scale;
        if (a.type_table != 0) {
            numbers_of(a.type_type, Row{of_type, a.width, false}, piece / 4, piece % 4, y);
            UNROLL for (u32 i = 0; i < 8; ++i) x[i] = x[i] + y[i];
        }
        if (a.position_table != 0) {
            numbers_of(a.position_type, Row{of_position, a.width, false}, piece / 4, piece % 4, y);
            UNROLL for (u32 i = 0; i < 8; ++i) x[i] = x[i] + y[i];
        }
        UNROLL for (u32 i = 0; i < 8; ++i) {
            if (piece * 8 + i < a.width) out[piece * 8 + i] = x[i];
        }
    }
}

struct NormArguments {
    // [rows, width] in f32.
    u64 x;
    // Added to x before, and kept there; 0 without.
    u64 addend;
    // Which row of x each row of the output is of; 0 where they are the same.
    u64 gather;
    // [width].
    u64 weight;
    u64 bias;
    Rows out;
    u32 width;
    u32 weight_type;
    u32 bias_type;
    // Layer norm, not RMS norm.
    u32 centred;
    f32 epsilon;
    // Added to the weights.
    f32 offset;
    // Whether the result is added to what `out` holds instead of replacing it (a norm on the result of a block).
    u32 accumulate;
    u32 unused;
};
static_assert(sizeof(NormArguments) == 104, "the layout that Rust knows");

// `out.plain` may be `x`: every thread reads an element before it writes it.
KERNEL(normalise, NormArguments, 256) {
    f32* memory = reinterpret_cast<f32*>(shared_bytes);
    const u64 row = BLOCK_X;
    const u64 from = a.gather != 0 ? reinterpret_cast<const u32*>(a.gather)[row] : row;
    f32* x = reinterpret_cast<f32*>(a.x) + from * a.width;
    f32* out = plain_row(a.out, row, a.width);
    const f32 width = static_cast<f32>(a.width);
    if (a.addend != 0) {
        const f32* addend = reinterpret_cast<const f32*>(a.addend) + from * a.width;
        for (u32 i = THREAD; i < a.width; i += THREADS) x[i] = x[i] + addend[i];
    }
    f32 mean = 0;
    if (a.centred) {
        f32 sum = 0;
        for (u32 i = THREAD; i < a.width; i += THREADS) sum = sum + x[i];
        mean = block_sum(sum, memory) / width;
    }
    f32 squares = 0;
    for (u32 i = THREAD; i < a.width; i += THREADS) {
        f32 centred = x[i] - mean;
        squares = fmaf(centred, centred, squares);
    }
    const f32 factor = 1.0f / sqrtf(block_sum(squares, memory) / width + a.epsilon);
    f32 largest = 0;
    for (u32 i = THREAD; i < a.width; i += THREADS) {
        f32 weight = plain_element(a.weight, a.weight_type, i) + a.offset;
        f32 y = (x[i] - mean) * factor * weight;
        if (a.bias != 0) y = y + plain_element(a.bias, a.bias_type, i);
        if (a.accumulate) y = out[i] + y;
        out[i] = y;
        largest = fmaxf(largest, fabsf(y));
    }
    write_operands(a.out, row, a.width, largest, memory);
}

enum Activation : u32 { SILU_GATE = 0, GELU_TANH_GATE = 1, GELU = 2, GELU_TANH = 3, RELU = 4, TANH = 5, SIGMOID = 6, NONE = 7 };

struct ActivateArguments {
    // [rows, width] in f32: the gate, or what has none.
    u64 x;
    // For the gated ones.
    u64 up;
    // Which row of x each row of the output is of; 0 where they are the same.
    u64 gather;
    Rows out;
    u32 width;
    u32 activation;
};
static_assert(sizeof(ActivateArguments) == 64, "the layout that Rust knows");

DEVICE f32 gelu_tanh(f32 x) {
    f32 inner = 0.7978845608f * fmaf(0.044715f * x * x, x, x);
    return 0.5f * x * (1.0f + tanhf(inner));
}

DEVICE f32 activated(u32 activation, f32 x) {
    switch (activation) {
        case SILU_GATE: return x / (1.0f + expf(-x));
        case GELU_TANH_GATE:
        case GELU_TANH: return gelu_tanh(x);
        case GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678f));
        case RELU: return fmaxf(x, 0.0f);
        case TANH: return tanhf(x);
        case SIGMOID: return 1.0f / (1.0f + expf(-x));
        default: return x;
    }
}

// Also writes rows as operands, with no activation at all.
KERNEL(activate, ActivateArguments, 512) {
    f32* memory = reinterpret_cast<f32*>(shared_bytes);
    const u64 row = BLOCK_X;
    const u64 from = a.gather != 0 ? reinterpret_cast<const u32*>(a.gather)[row] : row;
    const f32* x = reinterpret_cast<const f32*>(a.x) + from * a.width;
    const f32* up = reinterpret_cast<const f32*>(a.up) + from * a.width;
    f32* out = plain_row(a.out, row, a.width);
    f32 largest = 0;
    for (u32 i = THREAD; i < a.width; i += THREADS) {
        f32 y = activated(a.activation, x[i]);
        if (a.up != 0) y = y * up[i];
        out[i] = y;
        largest = fmaxf(largest, fabsf(y));
    }
    write_operands(a.out, row, a.width, largest, memory);
}

struct AddArguments {
    // x += y, element by element.
    u64 x;
    u64 y;
    u64 elements;
};
static_assert(sizeof(AddArguments) == 24, "the layout that Rust knows");

KERNEL(add, AddArguments, 256) {
    const u64 i = static_cast<u64>(BLOCK_X) * THREADS + THREAD;
    if (i >= a.elements) return;
    f32* x = reinterpret_cast<f32*>(a.x) + i;
    *x = *x + reinterpret_cast<const f32*>(a.y)[i];
}

struct CapArguments {
    // Every element becomes cap · tanh(element / cap).
    u64 x;
    u64 elements;
    f32 cap;
    u32 unused;
};
static_assert(sizeof(CapArguments) == 24, "the layout that Rust knows");

KERNEL(cap, CapArguments, 256) {
    const u64 i = static_cast<u64>(BLOCK_X) * THREADS + THREAD;
    if (i >= a.elements) return;
    f32* x = reinterpret_cast<f32*>(a.x) + i;
    *x = a.cap * tanhf(*x / a.cap);
}

struct PoolArguments {
    // [rows, width] in f32.
    u64 x;
    // Per sequence: its first row and how many it has.
    u64 sequences;
    // [sequences, width].
    u64 out;
    u32 width;
    // The mean over the rows, not the first one.
    u32 mean;
    u32 unit_length;
    u32 unused;
};
static_assert(sizeof(PoolArguments) == 40, "the layout that Rust knows");

// One vector of each sequence.
KERNEL(pool, PoolArguments, 256) {
    f32* memory = reinterpret_cast<f32*>(shared_bytes);
    const u32* sequence = reinterpret_cast<const u32*>(a.sequences) + 2 * BLOCK_X;
    const f32* x = reinterpret_cast<const f32*>(a.x) + static_cast<u64>(sequence[0]) * a.width;
    f32* out = reinterpret_cast<f32*>(a.out) + static_cast<u64>(BLOCK_X) * a.width;
    f32 squares = 0;
    for (u32 i = THREAD; i < a.width; i += THREADS) {
        f32 y = x[i];
        if (a.mean) {
            for (u64 row = 1; row < sequence[1]; ++row) y = y + x[row * a.width + i];
            y = y / static_cast<f32>(sequence[1]);
        }
        out[i] = y;
        squares = fmaf(y, y, squares);
    }
    if (!a.unit_length) return;
    // The lower bound is that of the reference implementations.
    const f32 length = fmaxf(sqrtf(block_sum(squares, memory)), 1e-12f);
    for (u32 i = THREAD; i < a.width; i += THREADS) out[i] = out[i] / length;
}
