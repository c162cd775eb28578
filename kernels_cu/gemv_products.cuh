// How a warp multiplies a batch of weights with the inputs of all tokens: lanes, or tensor cores.
//
// Owns the loads of weights, the sums in registers, and which lane holds which sum at the end. Where
// a warp's rows and inputs lie in the matrix is not its part (gemv.cuh, which names the macros).
#pragma once

#include "gemv_input.cuh"

#ifndef ROWS_PER_WARP
#define ROWS_PER_WARP 2
#endif
#ifndef UNROLL
#define UNROLL 4
#endif
#ifndef TENSOR
#define TENSOR (ROWS >= 3)
#endif
static_assert(
    ROWS_PER_WARP == 1 || ROWS_PER_WARP == 2 || ROWS_PER_WARP == 4, "ROWS_PER_WARP is 1, 2 or 4");

constexpr int ROWS_POWER = ROWS <= 1 ? 1 : ROWS <= 2 ? 2 : ROWS <= 4 ? 4 : 8;

// Sums over the lanes of N values (a power of two), spread: lane l gets that of value l / (32 / N).
// The tree of additions is that of warp_sum.
template <int N, int LANES = 16>
__device__ __forceinline__ float warp_sum_spread(const float (&values)[N]) {
    if constexpr (N == 1) {
        return warp_sum<2 * LANES>(values[0]);
    } else {
        const bool upper = (lane_id() & LANES) != 0;
        float halves[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float send = upper ? values[i] : values[i + N / 2];
            const float keep = upper ? values[i + N / 2] : values[i];
            halves[i] = keep + shuffle_xor(send, LANES);
        }
        return warp_sum_spread<N / 2, LANES / 2>(halves);
    }
}

union WeightVector {
    uint4 bits;
    Vec<scalar_t, WIDE> values;
};

// The weights p[0 … WIDE - 1], of which the first `count` exist (all, some or none); else zero.
template <bool ALIGNED>
__device__ __forceinline__ uint4 load_weights(const scalar_t* p, int count) {
    WeightVector v;
    v.bits = make_uint4(0, 0, 0, 0);
    if constexpr (ALIGNED) {
        if (count > 0) v.bits = ld_nc_16(p);
    } else {
#pragma unroll
        for (int i = 0; i < WIDE; ++i) {
            if (i < count) v.values.data[i] = p[i];
        }
    }
    return v.bits;
}

// A warp's product, plain: the lanes lie along the inputs, and a lane multiplies its weights of every
// row with its inputs of every token. One value a lane at the end.
template <typename Input, int UNIT, int BATCH_CHUNKS, bool ALIGNED>
struct LaneProduct {
    static constexpr int UNIT_ROWS = UNIT;
    static constexpr int CHUNK = 32 * WIDE;
    static constexpr int BATCH = BATCH_CHUNKS;
    static constexpr int VALUES = 1;
    static constexpr int N = UNIT * ROWS_POWER;
    static_assert(N <= 32, "a value a lane");

    uint4 weights[BATCH][UNIT_ROWS];
    float sums[UNIT_ROWS][ROWS];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < UNIT_ROWS; ++r) {
#pragma unroll
            for (int m = 0; m < ROWS; ++m) sums[r][m] = 0.0f;
        }
    }

    template <typename RowStart>
    __device__ __forceinline__ void load(const RowStart& row_start, int chunk, int limit) {
        const int k = chunk * CHUNK + lane_id() * WIDE;
#pragma unroll
        for (int r = 0; r < UNIT_ROWS; ++r) {
            const scalar_t* p = row_start(r) + k;
#pragma unroll
            for (int u = 0; u < BATCH; ++u) {
                weights[u][r] = load_weights<ALIGNED>(p + u * CHUNK, limit - k - u * CHUNK);
            }
        }
    }

    // Chunk u of the batch, which is chunk tile_chunk of the tile.
    __device__ __forceinline__ void multiply(const Input& input, int u, int tile_chunk) {
        float w[UNIT_ROWS][WIDE];
#pragma unroll
        for (int r = 0; r < UNIT_ROWS; ++r) {
            WeightVector v;
            v.bits = weights[u][r];
#pragma unroll
            for (int i = 0; i < WIDE; ++i) w[r][i] = to_float(v.values.data[i]);
        }
        const int k = tile_chunk * CHUNK + lane_id() * WIDE;
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            float x[WIDE];
            load_values<typename Input::act_t, WIDE>(input.row(m) + k, x);
#pragma unroll
            for (int r = 0; r < UNIT_ROWS; ++r) {
#pragma unroll
                for (int i = 0; i < WIDE; ++i) sums[r][m] += w[r][i] * x[i];
            }
        }
    }

    // The sums over all lanes: the value of row value_row, token value_token, where owns_value.
    __device__ __forceinline__ void reduce(float (&values)[VALUES]) {
        float spread[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int r = i / ROWS_POWER, m = i % ROWS_POWER;
            spread[i] = m < ROWS ? sums[r][m < ROWS ? m : 0] : 0.0f;
        }
        values[0] = warp_sum_spread<N>(spread);
    }
    static __device__ __forceinline__ int value_row(int) {
        return lane_id() / (32 / N) / ROWS_POWER;
    }
    static __device__ __forceinline__ int value_token() {
        return lane_id() / (32 / N) % ROWS_POWER;
    }
    static __device__ __forceinline__ bool owns_value() {
        return lane_id() % (32 / N) == 0 && value_token() < ROWS;
    }
    // Of a pair of rows: the lane that owns the first gets both.
    static __device__ __forceinline__ void pair(
        const float (&values)[VALUES], float& gate, float& up) {
        gate = values[0];
        up = shuffle_xor(values[0], 32 / N * ROWS_POWER);
    }
};

#if TENSOR && HAS_MMA && SCALAR != 0
// A warp's product on the tensor cores: tokens are the operand's rows, eight rows of weights its
// columns. Lane 4 g + t reads the inputs 8 t … 8 t + 7 of row g and of token g, 16 bytes each, and
// gives them to two products as they lie: which input a lane calls first is the same on both sides,
// so the sum is the same. Two values a lane at the end, of neighbouring rows.
template <typename Input, int BATCH_CHUNKS>
struct TensorProduct {
    static constexpr int UNIT_ROWS = 8;
    static constexpr int CHUNK = 4 * WIDE;
    static constexpr int BATCH = BATCH_CHUNKS;
    static constexpr int VALUES = 2;

    uint4 weights[BATCH];
    float sums[2][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[0][i] = sums[1][i] = 0.0f;
    }

    template <typename RowStart>
    __device__ __forceinline__ void load(const RowStart& row_start, int chunk, int limit) {
        const int k = chunk * CHUNK + lane_id() % 4 * WIDE;
        const scalar_t* p = row_start(lane_id() / 4) + k;
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
            weights[u] = load_weights<true>(p + u * CHUNK, limit - k - u * CHUNK);
        }
    }

    __device__ __forceinline__ void multiply(const Input& input, int u, int tile_chunk) {
        const int token = lane_id() / 4, k = tile_chunk * CHUNK + lane_id() % 4 * WIDE;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (token < ROWS) v = *reinterpret_cast<const uint4*>(input.row(token) + k);
        const uint32_t low[4] = {v.x, 0, v.y, 0}, high[4] = {v.z, 0, v.w, 0};
        mma_m16n8k16<scalar_t>(sums[0], low, weights[u].x, weights[u].y);
        mma_m16n8k16<scalar_t>(sums[1], high, weights[u].z, weights[u].w);
    }

    __device__ __forceinline__ void reduce(float (&values)[VALUES]) {
        values[0] = sums[0][0] + sums[1][0];
        values[1] = sums[0][1] + sums[1][1];
    }
    static __device__ __forceinline__ int value_row(int v) { return lane_id() % 4 * 2 + v; }
    static __device__ __forceinline__ int value_token() { return lane_id() / 4; }
    static __device__ __forceinline__ bool owns_value() { return value_token() < ROWS; }
    static __device__ __forceinline__ void pair(
        const float (&values)[VALUES], float& gate, float& up) {
        gate = values[0];
        up = values[1];
    }
};
#endif
