// Decode attention on tensor cores: what one warp does with 16 positions of a sequence.
//
// A warp has a ring of STAGES stages in shared memory, each with the keys, then the values of 16
// positions. It copies into one while it works on another; no other warp looks in.
//
// MAX_QUERY_VALUES   tiles of queries times d up to which a warp keeps them in registers (128)
#pragma once

#include "attention_decode.cuh"

#ifndef MAX_QUERY_VALUES
#define MAX_QUERY_VALUES 128
#endif

#if HAS_MMA && SCALAR != 0 && (CACHE == SCALAR || QUANTIZED) && HEAD_SIZE % 16 == 0
#define DECODE_ON_TENSOR_CORES 1

constexpr int STEP_TOKENS = 16;
constexpr int ROW_CHUNKS = HEAD_SIZE / 8;  // 16 bytes each
// Eight rows of a column of chunks must lie in different banks: chunks change places by the row
// where that closes within a row, else the row's length in chunks is odd.
constexpr bool SWIZZLED = ROW_CHUNKS % 8 == 0;
constexpr int STRIDE = (SWIZZLED ? ROW_CHUNKS : ROW_CHUNKS | 1) * 8;  // elements
constexpr int K_STEPS = HEAD_SIZE / 16;
#if !QUANTIZED  // else attention_decode_codes.cuh says what a stage is
constexpr int TILE = STEP_TOKENS * STRIDE;  // elements of keys
constexpr int STAGE = 2 * TILE;
constexpr int RING = STAGES * STAGE;        // elements of a warp
#endif

// Where a tile has 8 elements of a row.
__device__ __forceinline__ int chunk_at(int row, int chunk) {
    return row * STRIDE + (SWIZZLED ? chunk ^ (row & 7) : chunk) * 8;
}

#if !QUANTIZED
// Start to copy keys and values of 16 positions, `left` of them there, into a stage; the others
// become zeros. `row`: of the cache, of position lane % 16. The whole warp must come.
__device__ __forceinline__ void copy_positions(
    scalar_t* keys, const cache_t* key_cache, const cache_t* value_cache, uint32_t row, int left) {
#pragma unroll
    for (int i = 0; i < STEP_TOKENS * ROW_CHUNKS / WARP_SIZE; ++i) {
        const int token = (i * WARP_SIZE + lane_id()) / ROW_CHUNKS;
        const int chunk = (i * WARP_SIZE + lane_id()) % ROW_CHUNKS;
        const int64_t from_row = shuffle(row, token);
        const int64_t from = from_row * HEAD_SIZE + chunk * 8;
        const int to = chunk_at(token, chunk);
        cp_async_16_or_zero(keys + to, key_cache + from, token < left);
        cp_async_16_or_zero(keys + TILE + to, value_cache + from, token < left);
    }
}
#endif

// Of 16 * TILES rows (query, head) what a warp knows; this lane has rows lane / 4 and 8 more of
// each row tile. `sum` is that of the lane's own columns until finish(). HALVES: 1 where only the first
// 8 rows of the tiles are there, which takes fewer registers.
template <int TILES, int HALVES = 2>
struct MmaRows {
    static constexpr bool QUERIES_STAY = TILES * HEAD_SIZE <= MAX_QUERY_VALUES;  // in registers

    const scalar_t* shared_queries;  // [16 * TILES, d] as chunk_at has it
    uint32_t queries[TILES][QUERIES_STAY ? K_STEPS : 1][4];
    SoftmaxState state[TILES][HALVES];
    int limit[TILES][HALVES];  // last position that the row sees
    float summed[TILES][HEAD_SIZE / 8][2 * HALVES];

    __device__ __forceinline__ void load_queries(int m, int k, int to) {
        const int inner_row = lane_id() % 8, low = lane_id() / 8 % 2, high = lane_id() / 16;
        ldmatrix_x4(
            queries[m][to], shared_queries + chunk_at(m * 16 + low * 8 + inner_row, 2 * k + high));
    }

    // The queries are there; limits are the caller's.
    __device__ __forceinline__ void start(const scalar_t* shared) {
        shared_queries = shared;
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
            if (QUERIES_STAY) {
#pragma unroll
                for (int k = 0; k < K_STEPS; ++k) load_queries(m, k, QUERIES_STAY ? k : 0);
            }
#pragma unroll
            for (int h = 0; h < HALVES; ++h) state[m][h] = softmax_start();
#pragma unroll
            for (int n = 0; n < HEAD_SIZE / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2 * HALVES; ++i) summed[m][n][i] = 0.0f;
        }
    }

#if !QUANTIZED
    // Take in the 16 positions from `position` on that a stage holds. `masked`: limits may hide
    // some of them. The whole warp must come, after a wait for every lane's copies.
    __device__ __forceinline__ void attend(
        const scalar_t* keys, int position, bool masked, float scale_log2) {
        // Lanes 0-7, 8-15, 16-23, 24-31 name the rows of four 8x8 matrices: values go row half
        // first, then chunk; keys chunk first, then row half.
        const int inner_row = lane_id() % 8, low = lane_id() / 8 % 2, high = lane_id() / 16;
        const scalar_t* values = keys + TILE;
        float scores[TILES][2][4] = {};
#pragma unroll
        for (int k = 0; k < K_STEPS; ++k) {
            uint32_t b[4];
            ldmatrix_x4(b, keys + chunk_at(high * 8 + inner_row, 2 * k + low));
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
                if (!QUERIES_STAY) load_queries(m, k, 0);
                const uint32_t(&a)[4] = queries[m][QUERIES_STAY ? k : 0];
                mma_m16n8k16<scalar_t>(scores[m][0], a, b[0], b[1]);
                mma_m16n8k16<scalar_t>(scores[m][1], a, b[2], b[3]);
            }
        }
        uint32_t weights[TILES][4] = {};
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
#pragma unroll
            for (int h = 0; h < HALVES; ++h) {
                float own[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    own[i] = scores[m][i / 2][h * 2 + i % 2] * scale_log2;
                    if (masked) {
                        const int column = i / 2 * 8 + lane_id() % 4 * 2 + i % 2;
                        if (position + column > limit[m][h]) own[i] = -infinity();
                    }
                }
                float highest = fmaxf(fmaxf(own[0], own[1]), fmaxf(own[2], own[3]));
                highest = warp_max<4>(highest);
                const float factor = softmax_raise(state[m][h], highest);
#pragma unroll
                for (int n = 0; n < HEAD_SIZE / 8; ++n) {
                    summed[m][n][h * 2] *= factor;
                    summed[m][n][h * 2 + 1] *= factor;
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    own[i] = softmax_weight(own[i], state[m][h].max);
                    state[m][h].sum += own[i];
                }
                weights[m][h] = pack_pair<scalar_t>(own[0], own[1]);
                weights[m][2 + h] = pack_pair<scalar_t>(own[2], own[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < HEAD_SIZE / 16; ++n) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, values + chunk_at(low * 8 + inner_row, 2 * n + high));
#pragma unroll
            for (int m = 0; m < TILES; ++m) {
                add_product(summed[m][2 * n], weights[m], b[0], b[1]);
                add_product(summed[m][2 * n + 1], weights[m], b[2], b[3]);
            }
        }
    }
#endif

    static __device__ __forceinline__ void add_product(
        float (&sums)[2 * HALVES], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        float all[4] = {sums[0], sums[1]};
        if (HALVES == 2) {
            all[2] = sums[2 * HALVES - 2];
            all[3] = sums[2 * HALVES - 1];
        }
        mma_m16n8k16<scalar_t>(all, a, b0, b1);
#pragma unroll
        for (int i = 0; i < 2 * HALVES; ++i) sums[i] = all[i];
    }

    // The sums become those of whole rows. The whole warp must come.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int m = 0; m < TILES; ++m)
#pragma unroll
            for (int h = 0; h < HALVES; ++h) state[m][h].sum = warp_sum<4>(state[m][h].sum);
    }
};
#endif
