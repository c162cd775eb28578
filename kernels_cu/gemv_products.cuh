// How a warp multiplies a batch of weights with the inputs of all tokens: lanes, or tensor cores.
//
// Owns which weights a thread brings to its part of the ring and multiplies there, the sums in
// registers, and which lane holds which sum at the end. Where a warp's rows and inputs lie in the
// matrix, and when which batch comes, is not its part (gemv.cuh, which names the macros).
#pragma once

#include "gemv_input.cuh"
#include "weight_copy.cuh"

#ifndef ROWS_PER_WARP
#define ROWS_PER_WARP 2
#endif
#ifndef UNROLL
#define UNROLL 4
#endif
#ifndef TENSOR
#define TENSOR 1
#endif
static_assert(
    ROWS_PER_WARP == 1 || ROWS_PER_WARP == 2 || ROWS_PER_WARP == 4, "ROWS_PER_WARP is 1, 2 or 4");

union WeightVector {
    uint4 bits;
    Vec<scalar_t, WIDE> values;
};

// This thread's part of the ring: a vector every BLOCK_THREADS. No other thread writes or reads it,
// so that a wait for one's own copies is all the order there must be.
__device__ __forceinline__ uint4* own_ring() {
    return reinterpret_cast<uint4*>(dynamic_shared()) + threadIdx.x;
}

// Bring the weights from[0 … WIDE - 1], of which the first `count` exist (all, some or none; the
// others are zero). ALIGNED: all or none, by a copy that lands at the wait; else at once.
template <bool ALIGNED>
__device__ __forceinline__ void bring_weights(uint4* to, const scalar_t* from, int count) {
    if constexpr (ALIGNED) {
        copy_weights_16_or_zero(to, from, count > 0);
    } else {
        WeightVector v;
        v.bits = make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < WIDE; ++i) {
            if (i < count) v.values.data[i] = from[i];
        }
        *to = v.bits;
    }
}

// A warp's product, plain: the lanes lie along the inputs, and a lane multiplies its weights of every
// row with its inputs of every token. One value a lane at the end.
template <typename Input, int UNIT, int BATCH_CHUNKS, bool IS_ALIGNED>
struct LaneProduct {
    typedef typename Input::act_t act_t;
    static constexpr bool ALIGNED = IS_ALIGNED;
    static constexpr bool PAIRS_CROSSED = false;
    static constexpr int UNIT_ROWS = UNIT;
    static constexpr int CHUNK = 32 * WIDE;
    static constexpr int BATCH = BATCH_CHUNKS;
    static constexpr int VECTORS = UNIT * BATCH;  // of a batch
    static constexpr int VALUES = 1;
    static constexpr int N = UNIT * ROWS_POWER;
    static_assert(N <= 32, "a value a lane");

    const scalar_t* from[UNIT_ROWS];
    const act_t* inputs;  // of token 0, this lane's of the first chunk of a tile
    int stride;
    float sums[UNIT_ROWS][ROWS];

    __device__ __forceinline__ void take(const Input& input) {
        inputs = input.row(0) + lane_id() * WIDE;
        stride = input.row(1) - input.row(0);
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < UNIT_ROWS; ++r) {
#pragma unroll
            for (int m = 0; m < ROWS; ++m) sums[r][m] = 0.0f;
        }
    }

    // The rows that bring() is to read.
    template <typename RowStart>
    __device__ __forceinline__ void aim(const RowStart& row_start) {
#pragma unroll
        for (int r = 0; r < UNIT_ROWS; ++r) from[r] = row_start(r) + lane_id() * WIDE;
    }

    // A batch from `chunk` on, at most `left` chunks, to vectors of the ring.
    __device__ __forceinline__ void bring(uint4* to, int chunk, int left, int num_inputs) const {
        const int k = chunk * CHUNK, exist = num_inputs - lane_id() * WIDE - k;
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
            if (u >= left) break;
#pragma unroll
            for (int r = 0; r < UNIT_ROWS; ++r) {
                bring_weights<ALIGNED>(to + (u * UNIT_ROWS + r) * BLOCK_THREADS,
                                       from[r] + k + u * CHUNK, exist - u * CHUNK);
            }
        }
    }

    // The first `left` chunks of the batch at `ring`, which is chunk tile_chunk of the tile and on.
    __device__ __forceinline__ void multiply(const uint4* ring, int tile_chunk, int left) {
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
            if (u < left) multiply_chunk(ring + u * UNIT_ROWS * BLOCK_THREADS, tile_chunk + u);
        }
    }

    __device__ __forceinline__ void multiply_chunk(const uint4* ring, int tile_chunk) {
        float w[UNIT_ROWS][WIDE];
#pragma unroll
        for (int r = 0; r < UNIT_ROWS; ++r) {
            WeightVector v;
            v.bits = ld_shared_16(ring + r * BLOCK_THREADS);
#pragma unroll
            for (int i = 0; i < WIDE; ++i) w[r][i] = to_float(v.values.data[i]);
        }
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            float x[WIDE];
            load_values<act_t, WIDE>(inputs + m * stride + tile_chunk * CHUNK, x);
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
//
// The inputs of a lane lie crossed in shared memory, pairs 0, 2, 1, 3. So the same four registers are
// the operand of both products: its upper rows are pairs 0 and 1, for the first half of the weights,
// its lower rows pairs 2 and 3, for the second half. The other half of each result means nothing, and
// neither do rows of tokens that are not there. Chunks go to two pairs of sums in turn, as a product
// waits for the one before.
//
// One token leaves most of the operand empty, and yet this costs a third of the instructions of
// LaneProduct; and a token's sums are the same in every batch.
template <typename Input, int BATCH_CHUNKS>
struct TensorProduct {
    typedef typename Input::act_t act_t;
    static constexpr bool ALIGNED = true;
    static constexpr bool PAIRS_CROSSED = true;
    static constexpr int UNIT_ROWS = 8;
    static constexpr int CHUNK = 4 * WIDE;
    static constexpr int BATCH = BATCH_CHUNKS;
    static constexpr int VECTORS = BATCH;
    static constexpr int VALUES = 2;

    const scalar_t* from;
    const act_t* inputs;  // this lane's of the first chunk of a tile
    float sums[4][4];

    __device__ __forceinline__ void take(const Input& input) {
        inputs = keep_pointer(input.row(min(lane_id() / 4, ROWS - 1)) + lane_id() % 4 * WIDE);
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;
        }
    }

    template <typename RowStart>
    __device__ __forceinline__ void aim(const RowStart& row_start) {
        from = row_start(lane_id() / 4) + lane_id() % 4 * WIDE;
    }

    __device__ __forceinline__ void bring(uint4* to, int chunk, int left, int num_inputs) const {
        const scalar_t* p = from + chunk * CHUNK;
        if (left >= BATCH && (chunk + BATCH) * CHUNK <= num_inputs) {
#pragma unroll
            for (int u = 0; u < BATCH; ++u) copy_weights_16(to + u * BLOCK_THREADS, p + u * CHUNK);
        } else {
            const int exist = num_inputs - lane_id() % 4 * WIDE - chunk * CHUNK;
#pragma unroll 1
            for (int u = 0; u < min(left, BATCH); ++u) {
                bring_weights<true>(to + u * BLOCK_THREADS, p + u * CHUNK, exist - u * CHUNK);
            }
        }
    }

    __device__ __forceinline__ void multiply(const uint4* ring, int tile_chunk, int left) {
        const act_t* x = inputs + tile_chunk * CHUNK;
        if (left >= BATCH) {
#pragma unroll
            for (int u = 0; u < BATCH; ++u) {
                multiply_chunk(sums[u % 2 * 2], sums[u % 2 * 2 + 1], ring + u * BLOCK_THREADS,
                               x + u * CHUNK);
            }
        } else {
#pragma unroll
            for (int u = 0; u < BATCH - 1; ++u) {
                if (u < left) {
                    multiply_chunk(sums[u % 2 * 2], sums[u % 2 * 2 + 1], ring + u * BLOCK_THREADS,
                                   x + u * CHUNK);
                }
            }
        }
    }

    static __device__ __forceinline__ void multiply_chunk(
        float (&first)[4], float (&second)[4], const uint4* ring, const act_t* x) {
        const uint4 w = ld_shared_16(ring), v = ld_shared_16(x);
        const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
        mma_m16n8k16<scalar_t>(first, pairs, w.x, w.y);
        mma_m16n8k16<scalar_t>(second, pairs, w.z, w.w);
    }

    __device__ __forceinline__ void reduce(float (&values)[VALUES]) {
        values[0] = (sums[0][0] + sums[1][2]) + (sums[2][0] + sums[3][2]);
        values[1] = (sums[0][1] + sums[1][3]) + (sums[2][1] + sums[3][3]);
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
