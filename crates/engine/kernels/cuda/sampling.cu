// What sampling needs of a row of logits: bias and penalties, masks, the most likely token, the most likely ones with the
// weight of all, and the token on which a number of the host's generator falls. The choice is the host's, which knows by
// how much the sums here may differ from its own.
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

// A token, and the sums of the weights of all tokens before it and up to it.
struct Drawn {
    u32 token;
    u32 unused;
    f64 below;
    f64 upto;
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
    // Per row, in f64 and below 1: the share of the total at which a token is drawn, in the order of the tokens.
    u64 randoms;
    // Per row, a Drawn.
    u64 drawn;
    u32 vocab;
    // At most 1024 and no more than there are tokens; 1 for the most likely token alone.
    u32 wanted;
};
static_assert(sizeof(CandidatesArguments) == 56, "the layout that Rust knows");

constexpr u32 MOST_CANDIDATES = 1024;

// Sorts 1024 keys, the greatest first.
DEVICE void sort_keys(u64* keys) {
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
}

// Puts the keys of the `most` most likely tokens into `keys`, which is zero elsewhere, whatever the distribution. The order
// in which threads put them there is not fixed; the set of keys is.
DEVICE void select_by_digits(const f32* logits, u32 vocab, u32 most, u64* keys, u32* counts, u32* state) {
    const u32 warp = THREAD / 32, lane = THREAD % 32;
    // The key of the last one wanted, eight bits at a time from the top: how many are wanted among those that share the
    // bits found so far.
    u32 threshold = 0, wanted = most;
    for (i32 shift = 24; shift >= 0; shift -= 8) {
        if (THREAD < 256) counts[THREAD] = 0;
        barrier();
        for (u32 i = THREAD; i < vocab; i += THREADS) {
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
    for (u32 i = THREAD; i < vocab; i += THREADS) {
        if (sortable(logits[i]) > threshold) keys[count_up(&state[2], 1)] = sortable_first(logits[i], i);
    }
    barrier();
    const u32 above = state[2];
    u32 found = 0;
    for (u32 from = 0; from < vocab && found < wanted; from += THREADS) {
        const u32 i = from + THREAD;
        const bool equal = i < vocab && sortable(logits[i]) == threshold;
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
}

// Leaves the keys of the `most` most likely tokens at the beginning of `keys`, sorted.
DEVICE void most_likely(const f32* logits, u32 vocab, u32 most, u64* keys, u32* counts, u32* state) {
    // Of the threads' best keys as many are at or above this one as are wanted, and seldom many more of all keys.
    u64 best = 0;
    for (u32 i = THREAD; i < vocab; i += THREADS) {
        const u64 key = sortable_first(logits[i], i);
        best = key > best ? key : best;
    }
    keys[THREAD] = best;
    barrier();
    sort_keys(keys);
    const u64 least_key = keys[most - 1];
    barrier();
    keys[THREAD] = 0;
    if (THREAD == 0) state[2] = 0;
    barrier();
    for (u32 i = THREAD; i < vocab; i += THREADS) {
        const u64 key = sortable_first(logits[i], i);
        if (key >= least_key) {
            const u32 place = count_up(&state[2], 1);
            if (place < MOST_CANDIDATES) keys[place] = key;
        }
    }
    barrier();
    if (state[2] > MOST_CANDIDATES) select_by_digits(logits, vocab, most, keys, counts, state);
    sort_keys(keys);
}

// Leaves the key of the most likely token in keys[0].
DEVICE void most_likely_one(const f32* logits, u32 vocab, u64* keys) {
    u64 best = 0;
    for (u32 i = THREAD; i < vocab; i += THREADS) {
        const u64 key = sortable_first(logits[i], i);
        best = key > best ? key : best;
    }
    best = warp_max(best);
    if (THREAD % 32 == 0) keys[THREAD / 32] = best;
    barrier();
    if (THREAD == 0) {
        for (u32 w = 1; w < THREADS / 32; ++w) best = keys[w] > best ? keys[w] : best;
        keys[0] = best;
    }
    barrier();
}

// The first of `count` sums with which the running sum passes `target`, the last one if none does; `below` becomes the
// running sum before it.
DEVICE u32 passing(const f64* sums, u32 count, f64 target, f64& below) {
    u32 i = 0;
    while (i + 1 < count && below + sums[i] <= target) below = below + sums[i++];
    return i;
}

// A block has a row.
KERNEL(candidates, CandidatesArguments, 1024) {
    u64* keys = reinterpret_cast<u64*>(shared_bytes);           // [1024]
    f64* sums = reinterpret_cast<f64*>(keys + MOST_CANDIDATES);  // [32]
    u32* counts = reinterpret_cast<u32*>(sums + 32);             // [256]
    u32* state = counts + 256;                                   // [4]
    const u64 row = BLOCK_X;
    const u32 warp = THREAD / 32, lane = THREAD % 32;
    const f32* logits = reinterpret_cast<const f32*>(a.logits) + row * a.vocab;
    if (a.wanted == 1) {
        most_likely_one(logits, a.vocab, keys);
    } else {
        most_likely(logits, a.vocab, a.wanted, keys, counts, state);
    }
    Candidate* out = reinterpret_cast<Candidate*>(a.candidates) + row * a.wanted;
    if (THREAD < a.wanted) {
        u32 token = 0xffffffffu - static_cast<u32>(keys[THREAD]);
        out[THREAD] = Candidate{token, logits[token]};
    }
    const f32 highest = logits[0xffffffffu - static_cast<u32>(keys[0])];
    const f32 temperature = reinterpret_cast<const f32*>(a.temperatures)[row];
    auto weight = [&](u32 token) { return static_cast<f64>(expf((logits[token] - highest) / temperature)); };
    // Each warp has a range of consecutive tokens.
    const u32 range = (a.vocab + THREADS / 32 - 1) / (THREADS / 32);
    f64 of_warp = 0;
    for (u32 i = warp * range + lane; i < least(warp * range + range, a.vocab); i += 32) of_warp = of_warp + weight(i);
    for (u32 mask = 16; mask > 0; mask /= 2) of_warp = of_warp + lane_xor(of_warp, mask);
    if (lane == 0) sums[warp] = of_warp;
    barrier();
    f64 total = 0, below = 0;
    for (u32 w = 0; w < THREADS / 32; ++w) total = total + sums[w];
    const f64 target = reinterpret_cast<const f64*>(a.randoms)[row] * total;
    // The range in which the target falls is gone through by all threads, each with a piece of it.
    const u32 first = passing(sums, THREADS / 32, target, below) * range, end = least(first + range, a.vocab);
    const u32 piece = (range + THREADS - 1) / THREADS, own = first + THREAD * piece;
    f64 of_thread = 0;
    for (u32 i = own; i < least(own + piece, end); ++i) of_thread = of_thread + weight(i);
    f64* parts = reinterpret_cast<f64*>(keys);
    // The sums and the first key have been read from here on.
    barrier();
    parts[THREAD] = of_thread;
    for (u32 mask = 16; mask > 0; mask /= 2) of_thread = of_thread + lane_xor(of_thread, mask);
    if (lane == 0) sums[warp] = of_thread;
    barrier();
    if (THREAD == 0) {
        const u32 of_warps = passing(sums, THREADS / 32, target, below) * 32;
        const u32 thread = of_warps + passing(parts + of_warps, 32, target, below);
        u32 token = least(first + thread * piece, a.vocab - 1);
        const u32 last = least(token + piece, end);
        while (token + 1 < last && below + weight(token) <= target) below = below + weight(token++);
        reinterpret_cast<f64*>(a.totals)[row] = total;
        reinterpret_cast<Drawn*>(a.drawn)[row] = Drawn{token, 0, below, below + weight(token)};
    }
}
