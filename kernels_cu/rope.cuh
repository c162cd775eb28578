// One head of one token in the registers of a warp: loaded, normalised, rotated.
//
// Pairs are (i, i + HEAD_SIZE / 2). Products and sums are fused as written here and not as a
// compiler likes, so that every kernel that rotates the same head gets the same bits.
//
// HEAD_SIZE   even, 256 at most
#pragma once

#include "reduce.cuh"
#include "types.cuh"

#ifndef HEAD_SIZE
#error "define HEAD_SIZE"
#endif

constexpr int HALF = HEAD_SIZE / 2;
constexpr int PAIR_WIDTH = HALF % 2 == 0 ? 2 : 1;  // pairs that one lane takes at a time
constexpr int PAIR_STEP = 32 * PAIR_WIDTH;
constexpr int PAIR_ROUNDS = (HALF + PAIR_STEP - 1) / PAIR_STEP;

// Of round r, this lane has pairs pair_index(r) and PAIR_WIDTH - 1 more, where that is below HALF.
__device__ __forceinline__ int pair_index(int round) {
    return round * PAIR_STEP + lane_id() * PAIR_WIDTH;
}

struct HeadPairs {
    float low[PAIR_ROUNDS][PAIR_WIDTH];   // values i
    float high[PAIR_ROUNDS][PAIR_WIDTH];  // values i + HALF
};

// HEAD_SIZE values of T from `from` on: a head, a norm's weights, or cosines and sines of a token.
template <typename T>
__device__ __forceinline__ HeadPairs load_pairs(const T* from) {
    HeadPairs x = {};
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r) {
        const int i = pair_index(r);
        if (i >= HALF) break;
        load_floats<T, PAIR_WIDTH>(from + i, x.low[r]);
        load_floats<T, PAIR_WIDTH>(from + HALF + i, x.high[r]);
    }
    return x;
}

// x / sqrt(mean(x**2) + eps) * weight; the whole warp must come.
__device__ __forceinline__ void normalize_pairs(
    HeadPairs& x, const HeadPairs& weight, float eps) {
    float squares = 0.0f;
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r)
#pragma unroll
        for (int j = 0; j < PAIR_WIDTH; ++j) {
            squares = fmaf(x.low[r][j], x.low[r][j], squares);
            squares = fmaf(x.high[r][j], x.high[r][j], squares);
        }
    const float inverse = 1.0f / sqrtf(warp_sum(squares) / HEAD_SIZE + eps);
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r)
#pragma unroll
        for (int j = 0; j < PAIR_WIDTH; ++j) {
            x.low[r][j] *= inverse * weight.low[r][j];
            x.high[r][j] *= inverse * weight.high[r][j];
        }
}

// Turn by the angles whose cosines are `angles.low`, whose sines are `angles.high`.
__device__ __forceinline__ void rotate_pairs(HeadPairs& x, const HeadPairs& angles) {
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r)
#pragma unroll
        for (int j = 0; j < PAIR_WIDTH; ++j) {
            const float low = x.low[r][j], high = x.high[r][j];
            x.low[r][j] = fmaf(low, angles.low[r][j], -(high * angles.high[r][j]));
            x.high[r][j] = fmaf(high, angles.low[r][j], low * angles.high[r][j]);
        }
}

// HEAD_SIZE values of T to `to`.
template <typename T>
__device__ __forceinline__ void store_pairs(T* to, const HeadPairs& x) {
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r) {
        const int i = pair_index(r);
        if (i >= HALF) break;
        store_floats<T, PAIR_WIDTH>(to + i, x.low[r]);
        store_floats<T, PAIR_WIDTH>(to + HALF + i, x.high[r]);
    }
}

// The same into a row of the cache. Of a quantised one, x are values over the row's scale.
__device__ __forceinline__ void cache_store_pairs(cache_t* to, const HeadPairs& x) {
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r) {
        const int i = pair_index(r);
        if (i >= HALF) break;
        cache_store_vec<PAIR_WIDTH>(to + i, x.low[r]);
        cache_store_vec<PAIR_WIDTH>(to + HALF + i, x.high[r]);
    }
}

#if QUANTIZED
// x becomes what its codes are rounded from, and the scale of the row is given back. The whole warp
// must come; every lane gets the scale.
__device__ __forceinline__ float scale_pairs(HeadPairs& x) {
    uint32_t largest = 0;  // bits of magnitudes, so that a NaN is the largest of all
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r)
#pragma unroll
        for (int j = 0; j < PAIR_WIDTH; ++j) {
            largest = max(largest, bits_of(x.low[r][j]) & 0x7fffffffu);
            largest = max(largest, bits_of(x.high[r][j]) & 0x7fffffffu);
        }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
        largest = max(largest, shuffle_xor(largest, lanes));
    }
    const float scale = row_scale(largest);
    const bool usable = scale > 0.0f;
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r)
#pragma unroll
        for (int j = 0; j < PAIR_WIDTH; ++j) {
            x.low[r][j] = usable ? x.low[r][j] / scale : 0.0f;
            x.high[r][j] = usable ? x.high[r][j] / scale : 0.0f;
        }
    return scale;
}
#endif

// Where slot `slot` (block * block_size + row) of head `group` begins in a cache [N, G, P, d].
__device__ __forceinline__ int64_t slot_offset(
    int slot, int group, int num_kv_heads, int block_size) {
    const int64_t block = slot / block_size;
    return ((block * num_kv_heads + group) * block_size + slot % block_size) * HEAD_SIZE;
}
