// What common.cuh needs on the host: the kernels' sources compiled as ordinary C++, every thread of a block a fiber.
//
// For tests only. A block's threads run one at a time, each until it waits at a barrier or for its warp; the order in
// which they run is chosen from outside, so that whatever depends on it shows. Shared memory starts as NaN, global
// memory ends at inaccessible pages, asynchronous copies are carried out at once or only when they are waited for. What
// this cannot show: speed, registers, the rounding inside matrix instructions, memory ordering between blocks.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace emulator {

struct Position {
    u32 thread, threads, x, y, z;
};

// The fiber that runs.
extern Position* here;
extern unsigned char* shared;

// Waits for all threads of the block.
void block_barrier(int site);
// Waits for all lanes of the warp; gives what each of them brought (64 bytes apart), valid until the next but one call.
const unsigned char* exchange(const void* value, u32 bytes, int site);
void copy_begin(void* to, const void* from, bool valid);
void copy_commit();
void copy_wait(u32 pending);

// A kernel under its name.
struct Kernel {
    Kernel(const char* name, u32 threads, u32 argument_bytes, void (*run)(const void*));
};

template <class T>
T from_lane(T value, u32 lane, int site) {
    const unsigned char* slots = exchange(&value, sizeof value, site);
    T out;
    memcpy(&out, slots + 64 * lane, sizeof out);
    return out;
}

}  // namespace emulator

#define DEVICE static inline
#define UNROLL
#define UNROLL_4
#define THREAD (emulator::here->thread)
#define THREADS (emulator::here->threads)
#define BLOCK_X (emulator::here->x)
#define BLOCK_Y (emulator::here->y)
#define BLOCK_Z (emulator::here->z)
#define KERNEL(name, Arguments, threads) \
    static void name(const Arguments& a); \
    static emulator::Kernel kernel_##name( \
        #name, threads, sizeof(Arguments), [](const void* a) { name(*static_cast<const Arguments*>(a)); }); \
    static void name(const Arguments& a)

#define shared_bytes (emulator::shared)

DEVICE f32 bits_to_f32(u32 bits) {
    f32 x;
    memcpy(&x, &bits, 4);
    return x;
}

DEVICE u32 f32_to_bits(f32 x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}

DEVICE f32 f16_to_f32(u16 bits) {
    _Float16 x;
    memcpy(&x, &bits, 2);
    return static_cast<f32>(x);
}

DEVICE u16 f32_to_f16(f32 x) {
    _Float16 narrow = static_cast<_Float16>(x);
    u16 bits;
    memcpy(&bits, &narrow, 2);
    return bits;
}

DEVICE u16 f32_to_bf16(f32 x) {
    u32 bits = f32_to_bits(x);
    if (x != x) return 0x7fff;
    return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
DEVICE T read_only(const T* p) {
    return *p;
}

DEVICE void barrier(int site = __builtin_LINE()) { emulator::block_barrier(site); }

DEVICE void warp_barrier(int site = __builtin_LINE()) { emulator::from_lane(0, 0, site); }

template <class T>
DEVICE T lane_xor(T x, u32 mask, int site = __builtin_LINE()) {
    return emulator::from_lane(x, THREAD % 32 ^ mask, site);
}

DEVICE u32 lane_up(u32 x, u32 by, int site = __builtin_LINE()) {
    u32 lane = THREAD % 32;
    return emulator::from_lane(x, lane < by ? lane : lane - by, site);
}

DEVICE u32 lanes_where(bool condition, int site = __builtin_LINE()) {
    const unsigned char* slots = emulator::exchange(&condition, 1, site);
    u32 lanes = 0;
    for (u32 lane = 0; lane < 32; ++lane) lanes |= static_cast<u32>(slots[64 * lane]) << lane;
    return lanes;
}

DEVICE u32 count_bits(u32 bits) { return static_cast<u32>(__builtin_popcount(bits)); }

DEVICE u32 count_up(u32* counter, u32 by) {
    u32 before = *counter;
    *counter += by;
    return before;
}

// A lane brings its eight elements of A and four of B, widened.
template <class Widen>
DEVICE void multiply_emulated(f32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2], Widen widen, int site) {
    f32 own[12];
    for (u32 i = 0; i < 4; ++i) own[2 * i] = widen(a[i] & 0xffff), own[2 * i + 1] = widen(a[i] >> 16);
    for (u32 i = 0; i < 2; ++i) own[8 + 2 * i] = widen(b[i] & 0xffff), own[9 + 2 * i] = widen(b[i] >> 16);
    const unsigned char* slots = emulator::exchange(own, sizeof own, site);
    const u32 lane = THREAD % 32, g = lane / 4, t = lane % 4;
    for (u32 i = 0; i < 4; ++i) {
        u32 column = 2 * t + i % 2, lower = i / 2;
        f64 sum = 0;
        for (u32 k = 0; k < 16; ++k) {
            // Column k of A is in lane k % 8 / 2 of the row, in register 0 or 2 (1 or 3 for the lower rows).
            f32 p, q;
            u32 of_a = 2 * (k / 8 * 2 + lower) + k % 2, of_b = 8 + 2 * (k / 8) + k % 2;
            memcpy(&p, slots + 64 * (4 * g + k % 8 / 2) + 4 * of_a, 4);
            memcpy(&q, slots + 64 * (4 * column + k % 8 / 2) + 4 * of_b, 4);
            sum += static_cast<f64>(p) * static_cast<f64>(q);
        }
        d[i] = static_cast<f32>(static_cast<f64>(d[i]) + sum);
    }
}

DEVICE void multiply_f16(f32 (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int site = __builtin_LINE()) {
    auto widen = [](u32 bits) { return f16_to_f32(static_cast<u16>(bits)); };
    multiply_emulated(d, {a0, a1, a2, a3}, {b0, b1}, widen, site);
}

DEVICE void multiply_bf16(f32 (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, int site = __builtin_LINE()) {
    auto widen = [](u32 bits) { return bits_to_f32(bits << 16); };
    multiply_emulated(d, {a0, a1, a2, a3}, {b0, b1}, widen, site);
}

DEVICE void load_columns(u32& b0, u32& b1, const u16* row, int site = __builtin_LINE()) {
    const unsigned char* slots = emulator::exchange(&row, sizeof row, site);
    const u32 lane = THREAD % 32, g = lane / 4, t = lane % 4;
    auto element = [&](u32 k) {
        const u16* from;
        memcpy(&from, slots + 64 * k, sizeof from);
        if (reinterpret_cast<uintptr_t>(from) % 16 != 0) __builtin_trap();
        return static_cast<u32>(from[g]);
    };
    b0 = element(2 * t) | element(2 * t + 1) << 16;
    b1 = element(2 * t + 8) | element(2 * t + 9) << 16;
}

DEVICE void copy_16(void* to, const void* from, bool valid) { emulator::copy_begin(to, from, valid); }
DEVICE void copies_commit() { emulator::copy_commit(); }
template <int PENDING>
DEVICE void copies_wait() {
    emulator::copy_wait(PENDING);
}
