// What sampling needs of a row of logits: bias and penalties, masks, the most likely token, and the most likely ones
// with the weight of all. The choice among those is the host's, with its own generator.
#include "common.cuh"

// Changes of one token's logit of one row; no two for the same.
struct Adjustment {
    u32 row;
    u32 token;
    f32 bias;
    // Divides positive and multiplies negative logits; 1 for none.
    f32 repetition;
    // Subtracted one after the other.
    f32 frequency;
    f32 presence;
};

struct AdjustArguments {
    u64 logits;
    u64 adjustments;
    u32 count;
    u32 vocab;
};
static_assert(sizeof(AdjustArguments) == 24, "the layout that Rust knows");

KERNEL(adjust_logits, AdjustArguments, 256) {
    const u32 i = BLOCK_X * 256 + THREAD;
    if (i >= a.count) return;
    const Adjustment change = reinterpret_cast<const Adjustment*>(a.adjustments)[i];
    f32* logit = reinterpret_cast<f32*>(a.logits) + static_cast<u64>(change.row) * a.vocab + change.token;
    f32 x = *logit + change.bias;
    x = x > 0 ? x / change.repetition : x * change.repetition;
    x = x - change.frequency;
    *logit = x - change.presence;
}

struct MaskArguments {
    u64 logits;
    // Which rows have a mask, and the masks: a bit per token, set where it is allowed.
    u64 rows;
    u64 masks;
    u32 vocab;
    u32 unused;
};
static_assert(sizeof(MaskArguments) == 32, "the layout that Rust knows");

KERNEL(mask_logits, MaskArguments, 256) {
    const u32 token = BLOCK_X * 256 + THREAD;
    if (token >= a.vocab) return;
    const u32 words = (a.vocab + 31) / 32;
    const u32 word = reinterpret_cast<const u32*>(a.masks)[static_cast<u64>(BLOCK_Y) * words + token / 32];
    if (word >> token % 32 & 1) return;
    const u64 row = reinterpret_cast<const u32*>(a.rows)[BLOCK_Y];
    reinterpret_cast<f32*>(a.logits)[row * a.vocab + token] = bits_to_f32(0xff800000u);
}

struct Candidate {
    u32 token;
    f32 logit;
};

struct CandidatesArguments {
    // [rows, vocab].
    u64 logits;
    // [rows, wanted]: the most likely tokens, most likely first, of equals the one with the lower number.
    u64 candidates;
    // Per row, in f64: Σ e^((logit − highest) / temperature) over all tokens; NaN if a logit is NaN or infinite, or all
    // are minus infinity.
    u64 totals;
    // Per row.
    u64 temperatures;
    u32 vocab;
    // At most 1024 and no more than there are tokens; 1 for the most likely token alone.
    u32 wanted;
};
static_assert(sizeof(CandidatesArguments) == 40, "the layout that Rust knows");

constexpr u32 MOST_CANDIDATES = 1024;

// A block has a row. The order in which threads put keys into `keys` is not fixed; the set of keys is, and then they
// are sorted.
KERNEL(candidates, CandidatesArguments, 1024) {
    u64* keys = reinterpret_cast<u64*>(shared_bytes);           // [1024]
    f64* sums = reinterpret_cast<f64*>(keys + MOST_CANDIDATES);  // [32]
    u32* counts = reinterpret_cast<u32*>(sums + 32);             // [256]
    u32* state = counts + 256;                                   // [4]
    const u64 row = BLOCK_X;
    const u32 warp = THREAD / 32, lane = THREAD % 32;
    const f32* logits = reinterpret_cast<const f32*>(a.logits) + row * a.vocab;

    // The key of the last one wanted, eight bits at a time from the top: how many are wanted among those that share the
    // bits found so far.
    u32 threshold = 0, wanted = a.wanted;
    for (i32 shift = 24; shift >= 0; shift -= 8) {
        if (THREAD < 256) counts[THREAD] = 0;
        barrier();
        for (u32 i = THREAD; i < a.vocab; i += THREADS) {
            u32 key = sortable(logits[i]);
            bool shares = shift == 24 || key >> (shift + 8) == threshold >> (shift + 8);
            if (shares) count_up(&counts[key >> shift & 255], 1);
        }
        barrier();
        if (THREAD == 0) {
            u32 left = wanted, digit = 255;
            while (counts[digit] < left) left -= counts[digit--];
            state[0] = digit;
            state[1] = left;
        }
        barrier();
        threshold |= state[0] << shift;
        wanted = state[1];
    }
    // All above the threshold, then the first `wanted` of those at it.
    if (THREAD == 0) state[2] = 0;
    keys[THREAD] = 0;
    barrier();
    for (u32 i = THREAD; i < a.vocab; i += THREADS) {
        if (sortable(logits[i]) > threshold) keys[count_up(&state[2], 1)] = sortable_first(logits[i], i);
    }
    barrier();
    const u32 above = state[2];
    u32 found = 0;
    for (u32 from = 0; from < a.vocab && found < wanted; from += THREADS) {
        const u32 i = from + THREAD;
        const bool equal = i < a.vocab && sortable(logits[i]) == threshold;
        const u32 lanes = lanes_where(equal);
        if (lane == 0) counts[warp] = count_bits(lanes);
        barrier();
        u32 before = found + count_bits(lanes & ((1u << lane) - 1)), all = found;
        for (u32 w = 0; w < THREADS / 32; ++w) {
            before += w < warp ? counts[w] : 0;
            all += counts[w];
        }
        if (equal && before < wanted) keys[above + before] = sortable_first(logits[i], i);
        found = all;
        barrier();
    }
    barrier();
    // Bitonic sort, descending; unused places are 0 and come last.
    for (u32 size = 2; size <= MOST_CANDIDATES; size *= 2) {
        for (u32 stride = size / 2; stride > 0; stride /= 2) {
            u32 other = THREAD ^ stride;
            u64 mine = keys[THREAD], theirs = keys[other];
            bool descending = (THREAD & size) == 0;
            bool greater = (THREAD < other) == descending;
            barrier();
            keys[THREAD] = (mine > theirs) == greater ? mine : theirs;
            barrier();
        }
    }
    Candidate* out = reinterpret_cast<Candidate*>(a.candidates) + row * a.wanted;
    if (THREAD < a.wanted) {
        u32 token = 0xffffffffu - static_cast<u32>(keys[THREAD]);
        out[THREAD] = Candidate{token, logits[token]};
    }
    const f32 highest = logits[0xffffffffu - static_cast<u32>(keys[0])];
    const f32 temperature = reinterpret_cast<const f32*>(a.temperatures)[row];
    f64 total = 0;
    for (u32 i = THREAD; i < a.vocab; i += THREADS) {
        total = total + static_cast<f64>(expf((logits[i] - highest) / temperature));
    }
    for (u32 mask = 16; mask > 0; mask /= 2) total = total + lane_xor(total, mask);
    if (lane == 0) sums[warp] = total;
    barrier();
    if (THREAD == 0) {
        f64 sum = 0;
        for (u32 w = 0; w < THREADS / 32; ++w) sum = sum + sums[w];
        reinterpret_cast<f64*>(a.totals)[row] = sum;
    }
}
