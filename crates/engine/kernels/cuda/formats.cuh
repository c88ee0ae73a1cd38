// Weight formats: how eight consecutive weights of a stored row become numbers. The layouts are those of ggml-common.h.
//
// A row is groups of 32 weights; a piece is eight of them, number 0 to 3. Nothing here reads beyond a block. Rows of
// quantised types need an alignment of 2 bytes (4 where a block's size is a multiple of 4).
#pragma once
#include "common.cuh"

// A matrix row's place: its bytes, and for plain types how many elements are there.
struct Row {
    const u8* bytes;
    u32 columns;
    // Plain types: every piece of the row is whole and aligned to 16 bytes.
    bool aligned;
};

DEVICE u32 word_2(const u8* p) {
    const u16* half = reinterpret_cast<const u16*>(p);
    return pair(read_only(half), read_only(half + 1));
}

DEVICE u32 word_4(const u8* p) { return read_only(reinterpret_cast<const u32*>(p)); }

// Eight bytes at an address aligned to ALIGNMENT.
template <int ALIGNMENT>
DEVICE u64 bytes_8(const u8* p) {
    u32 low = ALIGNMENT == 4 ? word_4(p) : word_2(p);
    u32 high = ALIGNMENT == 4 ? word_4(p + 4) : word_2(p + 4);
    return static_cast<u64>(low) | static_cast<u64>(high) << 32;
}

DEVICE f32 half_at(const u8* p) { return f16_to_f32(read_only(reinterpret_cast<const u16*>(p))); }

DEVICE i32 byte_of(u64 bytes, u32 i) { return static_cast<i32>(bytes >> (8 * i) & 0xff); }

DEVICE i32 nibble_of(u64 bytes, u32 i, u32 piece) {
    return static_cast<i32>(bytes >> (8 * i + piece / 2 * 4) & 15);
}

struct F32 {
    static constexpr bool QUANTISED = false;
    static constexpr u32 SIZE = 4;
    DEVICE f32 number(const u8* p) { return read_only(reinterpret_cast<const f32*>(p)); }
};

struct F16 {
    static constexpr bool QUANTISED = false;
    static constexpr bool BF16_OPERANDS = false;
    static constexpr u32 SIZE = 2;
    DEVICE f32 number(const u8* p) { return half_at(p); }
};

struct Bf16 {
    static constexpr bool QUANTISED = false;
    static constexpr bool BF16_OPERANDS = true;
    static constexpr u32 SIZE = 2;
    DEVICE f32 number(const u8* p) { return bf16_to_f32(read_only(reinterpret_cast<const u16*>(p))); }
};

// Marks a format whose weights become f16 operands.
struct Quantised {
    static constexpr bool QUANTISED = true;
    static constexpr bool BF16_OPERANDS = false;
};

struct Q8_0 : Quantised {
    DEVICE void weights(const u8* row, u32 group, u32 piece, f32 (&w)[8]) {
        const u8* block = row + group * 34ull;
        f32 d = half_at(block);
        u64 q = bytes_8<2>(block + 2 + 8 * piece);
        UNROLL for (u32 i = 0; i < 8; ++i) w[i] = d * static_cast<f32>(static_cast<i8>(byte_of(q, i)));
    }
};

struct Q4_0 : Quantised {
    DEVICE void weights(const u8* row, u32 group, u32 piece, f32 (&w)[8]) {
        const u8* block = row + group * 18ull;
        f32 d = half_at(block);
        u64 q = bytes_8<2>(block + 2 + 8 * (piece % 2));
        UNROLL for (u32 i = 0; i < 8; ++i) w[i] = d * static_cast<f32>(nibble_of(q, i, piece) - 8);
    }
};

struct Q4_1 : Quantised {
    DEVICE void weights(const u8* row, u32 group, u32 piece, f32 (&w)[8]) {
        const u8* block = row + group * 20ull;
        f32 d = half_at(block), m = half_at(block + 2);
        u64 q = bytes_8<2>(block + 4 + 8 * (piece % 2));
        UNROLL for (u32 i = 0; i < 8; ++i) w[i] = fmaf(d, static_cast<f32>(nibble_of(q, i, piece)), m);
    }
};

struct Q5_0 : Quantised {
    DEVICE void weights(const u8* row, u32 group, u32 piece, f32 (&w)[8]) {
        const u8* block = row + group * 22ull;
        f32 d = half_at(block);
        u32 fifth = word_2(block + 2) >> (8 * piece);
        u64 q = bytes_8<2>(block + 6 + 8 * (piece % 2));
        UNROLL for (u32 i = 0; i < 8; ++i) {
            i32 number = nibble_of(q, i, piece) | static_cast<i32>(fifth >> i & 1) << 4;
            w[i] = d * static_cast<f32>(number - 16);
        }
    }
};

struct Q5_1 : Quantised {
    DEVICE void weights(const u8* row, u32 group, u32 piece, f32 (&w)[8]) {
        const u8* block = row + group * 24ull;
        f32 d = half_at(block), m = half_at(block + 2);
        u32 fifth = word_2(block + 4) >> (8 * piece);
        u64 q = bytes_8<2>(block + 8 + 8 * (piece % 2));
        UNROLL for (u32 i = 0; i < 8; ++i) {
            i32 number = nibble_of(q, i, piece) | static_cast<i32>(fifth >> i & 1) << 4;
            w[i] = fmaf(d, static_cast<f32>(number), m);
        }
    }
};

struct Iq4Nl : Quantised {
    DEVICE void weights(const u8* row, u32 group, u32 piece, f32 (&w)[8]) {
        // -127, -104, -83, -65, -49, -35, -22, -10, then 1, 13, 25, 38, 53, 69, 89, 113.
        const u64 lower = 0xf6eaddcfbfad9881ull, upper = 0x7159453526190d01ull;
        const u8* block = row + group * 18ull;
        f32 d = half_at(block);
        u64 q = bytes_8<2>(block + 2 + 8 * (piece % 2));
        UNROLL for (u32 i = 0; i < 8; ++i) {
            u32 nibble = static_cast<u32>(nibble_of(q, i, piece));
            u64 half = nibble < 8 ? lower : upper;
            w[i] = d * static_cast<f32>(static_cast<i8>(byte_of(half, nibble % 8)));
        }
    }
};

// Blocks of 256 have eight groups. The scale of a piece is that of the sixteen weights it belongs to.

struct Q2K : Quantised {
    DEVICE void weights(const u8* row, u32 group, u32 piece, f32 (&w)[8]) {
        const u8* block = row + group / 8 * 84ull;
        group %= 8;
        u32 packed = read_only(block + 2 * group + piece / 2);
        f32 scale = half_at(block + 80) * static_cast<f32>(packed & 15);
        f32 minimum = -half_at(block + 82) * static_cast<f32>(packed >> 4);
        u64 q = bytes_8<4>(block + 16 + group / 4 * 32 + 8 * piece);
        UNROLL for (u32 i = 0; i < 8; ++i) {
            w[i] = fmaf(scale, static_cast<f32>(byte_of(q, i) >> (group % 4 * 2) & 3), minimum);
        }
    }
};

struct Q3K : Quantised {
    DEVICE void weights(const u8* row, u32 group, u32 piece, f32 (&w)[8]) {
        const u8* block = row + group / 8 * 110ull;
        group %= 8;
        const u8* packed = block + 96;
        u32 j = 2 * group + piece / 2;
        u32 low = j < 8 ? read_only(packed + j) & 15 : read_only(packed + j - 8) >> 4;
        u32 high = read_only(packed + 8 + j % 4) >> (j / 4 * 2) & 3;
        f32 scale = half_at(block + 108) * static_cast<f32>(static_cast<i32>(low | high << 4) - 32);
        u64 q = bytes_8<2>(block + 32 + group / 4 * 32 + 8 * piece);
        u64 third = bytes_8<2>(block + 8 * piece);
        UNROLL for (u32 i = 0; i < 8; ++i) {
            i32 number = (byte_of(q, i) >> (group % 4 * 2) & 3) | (byte_of(third, i) >> group & 1) << 2;
            w[i] = scale * static_cast<f32>(number - 4);
        }
    }
};

// Scale and minimum of a group of Q4_K and Q5_K.
DEVICE void scale_and_minimum(const u8* block, u32 group, f32& scale, f32& minimum) {
    auto packed = [&](u32 i) { return static_cast<u32>(read_only(block + 4 + i)); };
    u32 s, m;
    if (group < 4) {
        s = packed(group) & 63;
        m = packed(group + 4) & 63;
    } else {
        s = (packed(group + 4) & 15) | packed(group - 4) >> 6 << 4;
        m = (packed(group + 4) >> 4) | packed(group) >> 6 << 4;
    }
    scale = half_at(block) * static_cast<f32>(s);
    minimum = -half_at(block + 2) * static_cast<f32>(m);
}

struct Q4K : Quantised {
    DEVICE void weights(const u8* row, u32 group, u32 piece, f32 (&w)[8]) {
        const u8* block = row + group / 8 * 144ull;
        group %= 8;
        f32 scale, minimum;
        scale_and_minimum(block, group, scale, minimum);
        u64 q = bytes_8<4>(block + 16 + group / 2 * 32 + 8 * piece);
        UNROLL for (u32 i = 0; i < 8; ++i) {
            w[i] = fmaf(scale, static_cast<f32>(byte_of(q, i) >> (group % 2 * 4) & 15), minimum);
        }
    }
};

struct Q5K : Quantised {
    DEVICE void weights(const u8* row, u32 group, u32 piece, f32 (&w)[8]) {
        const u8* block = row + group / 8 * 176ull;
        group %= 8;
        f32 scale, minimum;
        scale_and_minimum(block, group, scale, minimum);
        u64 fifth = bytes_8<4>(block + 16 + 8 * piece);
        u64 q = bytes_8<4>(block + 48 + group / 2 * 32 + 8 * piece);
        UNROLL for (u32 i = 0; i < 8; ++i) {
            i32 number = (byte_of(q, i) >> (group % 2 * 4) & 15) | (byte_of(fifth, i) >> group & 1) << 4;
            w[i] = fmaf(scale, static_cast<f32>(number), minimum);
        }
    }
};

struct Q6K : Quantised {
    DEVICE void weights(const u8* row, u32 group, u32 piece, f32 (&w)[8]) {
        const u8* block = row + group / 8 * 210ull;
        u32 half = group % 8 / 4, quarter = group % 4;
        i32 of_sixteen = static_cast<i8>(read_only(block + 192 + group % 8 * 2 + piece / 2));
        f32 scale = half_at(block + 208) * static_cast<f32>(of_sixteen);
        u64 low = bytes_8<2>(block + half * 64 + quarter % 2 * 32 + 8 * piece);
        u64 high = bytes_8<2>(block + 128 + half * 32 + 8 * piece);
        UNROLL for (u32 i = 0; i < 8; ++i) {
            i32 number = (byte_of(low, i) >> (quarter / 2 * 4) & 15) | (byte_of(high, i) >> (quarter * 2) & 3) << 4;
            w[i] = scale * static_cast<f32>(number - 32);
        }
    }
};

// Eight weights as f32; zeros beyond the row's end.
template <class Format>
DEVICE void numbers(const Row& row, u32 group, u32 piece, f32 (&w)[8]) {
    if constexpr (Format::QUANTISED) {
        Format::weights(row.bytes, group, piece, w);
    } else {
        u32 first = group * 32 + piece * 8;
        UNROLL for (u32 i = 0; i < 8; ++i) {
            w[i] = first + i < row.columns ? Format::number(row.bytes + static_cast<u64>(first + i) * Format::SIZE) : 0;
        }
    }
}

// Eight weights as 16-bit operands.
template <class Format>
DEVICE Piece operands(const Row& row, u32 group, u32 piece) {
    Piece out;
    if constexpr (Format::QUANTISED) {
        f32 w[8];
        Format::weights(row.bytes, group, piece, w);
        UNROLL for (u32 i = 0; i < 4; ++i) out.x[i] = pair(f32_to_f16(w[2 * i]), f32_to_f16(w[2 * i + 1]));
    } else {
        u32 first = group * 32 + piece * 8;
        const u16* from = reinterpret_cast<const u16*>(row.bytes) + first;
        if (row.aligned) return read_only_piece(from);
        UNROLL for (u32 i = 0; i < 4; ++i) {
            u16 low = first + 2 * i < row.columns ? read_only(from + 2 * i) : static_cast<u16>(0);
            u16 high = first + 2 * i + 1 < row.columns ? read_only(from + 2 * i + 1) : static_cast<u16>(0);
            out.x[i] = pair(low, high);
        }
    }
    return out;
}

template <class Format>
DEVICE void multiply(f32 (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if constexpr (Format::BF16_OPERANDS) {
        multiply_bf16(d, a0, a1, a2, a3, b0, b1);
    } else {
        multiply_f16(d, a0, a1, a2, a3, b0, b1);
    }
}

// Every format with its number, which is that of `weight_type` in src/cuda/kernels.rs.
#define ALL_FORMATS(X) \
    X(0, F32, f32) X(1, F16, f16) X(2, Bf16, bf16) X(3, Q8_0, q8_0) X(4, Q4_0, q4_0) X(5, Q4_1, q4_1) \
    X(6, Q5_0, q5_0) X(7, Q5_1, q5_1) X(8, Q2K, q2_k) X(9, Q3K, q3_k) X(10, Q4K, q4_k) X(11, Q5K, q5_k) \
    X(12, Q6K, q6_k) X(13, Iq4Nl, iq4_nl)

// Those that matrix instructions multiply.
#define OPERAND_FORMATS(X) \
    X(F16, f16) X(Bf16, bf16) X(Q8_0, q8_0) X(Q4_0, q4_0) X(Q4_1, q4_1) X(Q5_0, q5_0) X(Q5_1, q5_1) X(Q2K, q2_k) \
    X(Q3K, q3_k) X(Q4K, q4_k) X(Q5K, q5_k) X(Q6K, q6_k) X(Iq4Nl, iq4_nl)

// numbers() of a format known only at run time.
DEVICE void numbers_of(u32 type, const Row& row, u32 group, u32 piece, f32 (&w)[8]) {
    switch (type) {
#define CASE(number, Format, name) \
    case number: numbers<Format>(row, group, piece, w); break;
        ALL_FORMATS(CASE)
#undef CASE
    }
}
