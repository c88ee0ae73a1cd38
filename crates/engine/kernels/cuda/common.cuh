// What all kernels share: number formats, warp and block operations, matrix instructions, asynchronous copies.
//
// Every kernel takes one argument structure by value; its twin in Rust is in src/cuda/kernels.rs, field by field.
// No kernel may depend on how rows are batched: whatever belongs to a row is computed in an order that follows from the
// row alone. Multiply-adds are fused only where `fmaf` says so (-fmad=false), so that two kernels which share a function
// give the same bits. Nothing here needs a header; the same sources are compiled for the host by emulator/emulator.h,
// where each thread is a fiber and every warp operation is checked.
#pragma once

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int i32;
typedef unsigned long long u64;
typedef float f32;
typedef double f64;

#ifdef __CUDACC__

#define DEVICE static __device__ __forceinline__
#define KERNEL(name, Arguments, threads) \
    extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Arguments a)

extern __shared__ __align__(16) unsigned char shared_bytes[];

DEVICE f32 bits_to_f32(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 f32_to_bits(f32 x) { return __float_as_uint(x); }

DEVICE f32 f16_to_f32(u16 bits) {
    f32 x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

DEVICE u16 f32_to_f16(f32 x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

DEVICE u16 f32_to_bf16(f32 x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// From global memory that nobody writes while the kernel runs: such loads may pass stores, and need not be found out
// to be of global memory.
template <class T>
DEVICE T read_only(const T* p) {
    return __ldg(p);
}

DEVICE void barrier() { __syncthreads(); }
// Among the lanes of a warp; what they wrote before is visible to the others after it.
DEVICE void warp_barrier() { __syncwarp(); }

// The value of the lane whose number differs in the bits of `mask`. All 32 lanes must call it, as with all of these.
DEVICE f32 lane_xor(f32 x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE u32 lane_xor(u32 x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE u64 lane_xor(u64 x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
DEVICE f64 lane_xor(f64 x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
// The value of the lane so many below, or one's own in the first lanes.
DEVICE u32 lane_up(u32 x, u32 by) { return __shfl_up_sync(0xffffffffu, x, by); }
// The lanes in which `condition` holds.
DEVICE u32 lanes_where(bool condition) { return __ballot_sync(0xffffffffu, condition); }
DEVICE u32 count_bits(u32 bits) { return __popc(bits); }

// Adds to a counter in shared memory and gives what it was before.
DEVICE u32 count_up(u32* counter, u32 by) { return atomicAdd(counter, by); }

// d += A B with A of 16 x 16, B of 16 x 8. Lane 4g + t holds of A the pairs of columns (2t, 2t + 1) of row g, of row
// g + 8, and the same of columns 2t + 8, 2t + 9; of B the pairs of rows 2t and 2t + 8 of column g; of d columns 2t and
// 2t + 1 of row g, then of row g + 8.
DEVICE void multiply_f16(f32 (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE void multiply_bf16(f32 (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// B of 16 x 8 from shared memory where its rows lie as rows: lanes 0 to 15 give the addresses of rows 0 to 15 (8
// elements, 16 bytes, aligned); the other lanes' addresses must be valid but are not read.
DEVICE void load_columns(u32& b0, u32& b1, const u16* row) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(b0), "=r"(b1) : "r"(address) : "memory");
}

// Begins copying 16 bytes from global to shared memory, both aligned to 16; zeros where not `valid` (`from` must be a
// valid address even then).
DEVICE void copy_16(void* to, const void* from, bool valid) {
    u32 address = static_cast<u32>(__cvta_generic_to_shared(to));
    u32 bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
}

// Closes the group of copies that this thread began since the last call.
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's latest groups are under way.
template <int PENDING>
DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#define THREAD (threadIdx.x)
#define THREADS (blockDim.x)
#define BLOCK_X (blockIdx.x)
#define BLOCK_Y (blockIdx.y)
#define BLOCK_Z (blockIdx.z)
#define UNROLL _Pragma("unroll")
#define UNROLL_4 _Pragma("unroll 4")

#else
#include "../emulator/emulator.h"
#endif

// 16 bytes: what a thread reads at a time, and eight 16-bit operands.
struct __attribute__((aligned(16))) Piece {
    u32 x[4];
};

DEVICE Piece load_piece(const void* p) { return *static_cast<const Piece*>(p); }

#ifdef __CUDACC__
// load_piece for what read_only is for.
DEVICE Piece read_only_piece(const void* p) {
    uint4 words = __ldg(static_cast<const uint4*>(p));
    return Piece{{words.x, words.y, words.z, words.w}};
}
#else
DEVICE Piece read_only_piece(const void* p) { return load_piece(p); }
#endif

DEVICE f32 bf16_to_f32(u16 bits) { return bits_to_f32(static_cast<u32>(bits) << 16); }

DEVICE u32 pair(u16 low, u16 high) { return static_cast<u32>(low) | static_cast<u32>(high) << 16; }

DEVICE u32 least(u32 a, u32 b) { return a < b ? a : b; }

DEVICE u32 whole_groups(u32 elements) { return (elements + 31) / 32; }

// How plain numbers are stored.
enum Plain : u32 { PLAIN_F32 = 0, PLAIN_F16 = 1, PLAIN_BF16 = 2 };

DEVICE f32 plain_element(u64 base, u32 type, u64 index) {
    if (type == PLAIN_F32) return reinterpret_cast<const f32*>(base)[index];
    u16 bits = reinterpret_cast<const u16*>(base)[index];
    return type == PLAIN_F16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}

// The sum over the lanes of a warp, the same in all of them.
DEVICE f32 warp_sum(f32 x) {
    for (u32 mask = 16; mask > 0; mask /= 2) x = x + lane_xor(x, mask);
    return x;
}

DEVICE f32 warp_max(f32 x) {
    for (u32 mask = 16; mask > 0; mask /= 2) x = fmaxf(x, lane_xor(x, mask));
    return x;
}

// The sum over the threads of a block, the same in all of them. `memory`: a number per warp; free again at the next
// barrier.
DEVICE f32 block_sum(f32 x, f32* memory) {
    x = warp_sum(x);
    barrier();
    if (THREAD % 32 == 0) memory[THREAD / 32] = x;
    barrier();
    f32 sum = 0;
    for (u32 warp = 0; warp < THREADS / 32; ++warp) sum = sum + memory[warp];
    return sum;
}

DEVICE f32 block_max(f32 x, f32* memory) {
    x = warp_max(x);
    barrier();
    if (THREAD % 32 == 0) memory[THREAD / 32] = x;
    barrier();
    f32 most = memory[0];
    for (u32 warp = 1; warp < THREADS / 32; ++warp) most = fmaxf(most, memory[warp]);
    return most;
}

// A number whose order as an integer is that of f32's total order.
DEVICE u32 sortable(f32 x) {
    u32 bits = f32_to_bits(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The same with the index as a second criterion: of equal numbers the first is the greatest.
DEVICE u64 sortable_first(f32 x, u32 index) { return static_cast<u64>(sortable(x)) << 32 | (0xffffffffu - index); }

DEVICE u64 warp_max(u64 x) {
    for (u32 mask = 16; mask > 0; mask /= 2) {
        u64 other = lane_xor(x, mask);
        x = other > x ? other : x;
    }
    return x;
}

// Where a row goes that later products read: as f32, and as operands of matrix instructions (0 where not wanted), whose
// rows are filled with zeros up to whole groups of 32. Operands in f16 are divided by a power of two that puts the
// largest of the row between 2^13 and 2^14; it is kept in `scales`.
struct Rows {
    u64 plain;
    u64 bf16;
    u64 f16;
    u64 scales;
};

DEVICE f32* plain_row(const Rows& rows, u64 row, u32 width) {
    return reinterpret_cast<f32*>(rows.plain) + row * width;
}

// Writes the operands of a row from its f32 elements. A thread must have written the elements with index
// THREAD + i · THREADS itself; `largest` is the largest magnitude among them. `memory` as for block_sum.
DEVICE void write_operands(const Rows& rows, u64 row, u32 width, f32 largest, f32* memory) {
    const f32* from = plain_row(rows, row, width);
    u32 padded = whole_groups(width) * 32;
    if (rows.bf16 != 0) {
        u16* to = reinterpret_cast<u16*>(rows.bf16) + row * padded;
        for (u32 i = THREAD; i < padded; i += THREADS) to[i] = i < width ? f32_to_bf16(from[i]) : 0;
    }
    if (rows.f16 != 0) {
        largest = block_max(largest, memory);
        i32 exponent = static_cast<i32>(f32_to_bits(largest) >> 23) - 127 - 13;
        if (exponent < -126 || largest == 0) exponent = largest == 0 ? 0 : -126;
        f32 inverse = bits_to_f32(static_cast<u32>(127 - exponent) << 23);
        u16* to = reinterpret_cast<u16*>(rows.f16) + row * padded;
        for (u32 i = THREAD; i < padded; i += THREADS) to[i] = i < width ? f32_to_f16(from[i] * inverse) : 0;
        if (THREAD == 0) {
            reinterpret_cast<f32*>(rows.scales)[row] = bits_to_f32(static_cast<u32>(127 + exponent) << 23);
        }
    }
}
