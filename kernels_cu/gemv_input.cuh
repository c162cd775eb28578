// The activations of a small-batch product in shared memory: normalised, rounded, padded with zeros.
//
// Owns the layout there and the RMS norm, which every block computes for itself: the rows are few
// and lie in L2. Knows nothing of weights or outputs.
#pragma once

#include "reduce.cuh"
#include "types.cuh"

#ifndef ROWS
#error "define ROWS: tokens of the batch, 1 to 8"
#endif
#ifndef WARPS
#define WARPS 8
#endif

constexpr int BLOCK_THREADS = WARPS * 32;
constexpr int WIDE = Wide<scalar_t>::N;  // weights in one load
// A tile of inputs is a multiple of this, and padded to it: no chunk of a product straddles tiles.
constexpr int TILE_STEP = 256;
// Rows of a tile lie 64 bytes off a multiple of 128, so that eight lanes that read 16 bytes each, of
// two rows, meet no bank twice.
constexpr int ROW_PAD = 32;
// The most rows of weights that a warp works on at once.
constexpr int MAX_UNIT_ROWS = 8;

static_assert(ROWS >= 1 && ROWS <= 8, "ROWS is 1 to 8");
static_assert(
    WARPS >= 1 && WARPS <= 32 && (WARPS & (WARPS - 1)) == 0, "WARPS is a power of two up to 32");

template <typename A, typename B>
constexpr bool same_type = false;
template <typename A>
constexpr bool same_type<A, A> = true;

// What the threads of a block exchange, beside the tile of inputs.
struct GemvScratch {
    float squares[ROWS][WARPS];
    float partial[2][WARPS * MAX_UNIT_ROWS * ROWS];
};

__device__ __forceinline__ GemvScratch& gemv_scratch() {
    __shared__ GemvScratch scratch;
    return scratch;
}

__device__ __forceinline__ int padded_inputs(int inputs) {
    return (inputs + TILE_STEP - 1) / TILE_STEP * TILE_STEP;
}

// N values, 16 bytes at a time whatever their type.
template <typename T, int N>
__device__ __forceinline__ void load_values(const T* p, float (&out)[N]) {
    constexpr int PIECE = Wide<T>::N < N ? Wide<T>::N : N;
#pragma unroll
    for (int i = 0; i < N; i += PIECE) {
        float piece[PIECE];
        load_floats<T, PIECE>(p + i, piece);
#pragma unroll
        for (int j = 0; j < PIECE; ++j) out[i + j] = piece[j];
    }
}

template <typename T, int N>
__device__ __forceinline__ void store_values(T* p, const float (&in)[N]) {
    constexpr int PIECE = Wide<T>::N < N ? Wide<T>::N : N;
#pragma unroll
    for (int i = 0; i < N; i += PIECE) {
        float piece[PIECE];
#pragma unroll
        for (int j = 0; j < PIECE; ++j) piece[j] = in[i + j];
        store_floats<T, PIECE>(p + i, piece);
    }
}

// x [ROWS, num_inputs] of In as act_t in shared memory, a tile of inputs at a time; with NORM its
// RMS norm. `x` is written by the kernel before: nothing of it is read before start().
template <typename In, typename Act, bool NORM>
struct GemvInput {
    typedef Act act_t;

    const In* x;
    const int32_t* rows;  // which rows of x; null: the first ones
    const scalar_t* norm_weight;
    float eps;
    int num_inputs;
    int tile_size;  // inputs of a tile, a multiple of TILE_STEP

    // The norm's weights wait in the tile's first row, each vector for the thread that overwrites it.
    static constexpr bool PARKED = NORM && same_type<Act, scalar_t>;

    __device__ __forceinline__ Act* row(int token) const {
        const int stride = min(tile_size, padded_inputs(num_inputs)) + ROW_PAD;
        return reinterpret_cast<Act*>(dynamic_shared()) + token * stride;
    }

    __device__ __forceinline__ const In* source(int token) const {
        const int64_t index = rows == nullptr ? token : rows[token];
        return x + index * num_inputs;
    }

    // Whether all is read 16 bytes at a time.
    __device__ __forceinline__ bool is_wide() const {
        return num_inputs % 8 == 0 && is_aligned_16(x) && (!NORM || is_aligned_16(norm_weight));
    }

    // Before the wait for the kernel before: ask for what does not depend on it.
    __device__ __forceinline__ void request(int tile) const {
        if constexpr (PARKED) {
            if (!is_wide()) return;
            const int first = tile * tile_size, end = min(num_inputs - first, tile_size);
#pragma unroll 1
            for (int k = threadIdx.x * WIDE; k < end; k += BLOCK_THREADS * WIDE) {
                cp_async_16(row(0) + k, norm_weight + first + k);
            }
            cp_async_commit();
        }
    }

    // After the wait: sums of squares. A barrier must follow before load().
    __device__ __forceinline__ void start() const {
        if constexpr (NORM) {
            float squares[ROWS] = {};
            if (is_wide()) {
#pragma unroll(ROWS < 4 ? 2 : 1)
                for (int k = threadIdx.x * WIDE; k < num_inputs; k += BLOCK_THREADS * WIDE) {
#pragma unroll
                    for (int m = 0; m < ROWS; ++m) {
                        float values[WIDE];
                        load_values<In, WIDE>(source(m) + k, values);
#pragma unroll
                        for (int i = 0; i < WIDE; ++i) squares[m] += values[i] * values[i];
                    }
                }
            } else {
#pragma unroll 1
                for (int k = threadIdx.x; k < num_inputs; k += BLOCK_THREADS) {
#pragma unroll
                    for (int m = 0; m < ROWS; ++m) {
                        const float value = to_float(source(m)[k]);
                        squares[m] += value * value;
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < ROWS; ++m) {
                const float sum = warp_sum(squares[m]);
                if (lane_id() == 0) gemv_scratch().squares[m][warp_id()] = sum;
            }
        }
    }

    // Put a tile in place; its request() came before. A barrier must follow before it is read, and
    // one must lie between the last use of another tile and the request.
    __device__ __forceinline__ void load(int tile) const {
        const int first = tile * tile_size;
        const int end = min(num_inputs - first, tile_size), padded_end = padded_inputs(end);
        float inverse[ROWS];
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            if constexpr (NORM) {
                const float sum = lane_id() < WARPS ? gemv_scratch().squares[m][lane_id()] : 0.0f;
                inverse[m] = 1.0f / sqrtf(warp_sum(sum) / num_inputs + eps);
            } else {
                inverse[m] = 1.0f;
            }
        }
        if (is_wide()) {
            if constexpr (!NORM && same_type<In, Act>) {
                copy(first, end, padded_end);
            } else {
                load_wide(first, end, padded_end, inverse);
            }
        } else {
#pragma unroll 1
            for (int k = threadIdx.x; k < padded_end; k += BLOCK_THREADS) {
                const float weight = NORM && k < end ? to_float(norm_weight[first + k]) : 1.0f;
#pragma unroll
                for (int m = 0; m < ROWS; ++m) {
                    const float value = k < end ? to_float(source(m)[first + k]) : 0.0f;
                    row(m)[k] = from_float<Act>(NORM ? value * inverse[m] * weight : value);
                }
            }
        }
    }

    __device__ __forceinline__ void copy(int first, int end, int padded_end) const {
        if constexpr (!NORM && same_type<In, Act>) {
#pragma unroll 1
            for (int k = threadIdx.x * WIDE; k < padded_end; k += BLOCK_THREADS * WIDE) {
#pragma unroll
                for (int m = 0; m < ROWS; ++m) {
                    const In* p = source(m) + first + (k < end ? k : 0);
                    cp_async_16_or_zero(row(m) + k, p, k < end);
                }
            }
            cp_async_commit();
            cp_async_wait<0>();
        }
    }

    __device__ __forceinline__ void load_wide(
        int first, int end, int padded_end, const float (&inverse)[ROWS]) const {
        // No more than the registers hold beside the weights that are under way.
        constexpr int MOST = sizeof(In) > sizeof(scalar_t) ? 2 : 4;
        constexpr int TOGETHER = ROWS < MOST ? ROWS : MOST;
        if constexpr (PARKED) cp_async_wait<0>();
#pragma unroll 1
        for (int k = threadIdx.x * WIDE; k < padded_end; k += BLOCK_THREADS * WIDE) {
            float weights[WIDE] = {};
            if (NORM && k < end) {
                if constexpr (PARKED) {
                    load_values<scalar_t, WIDE>(
                        reinterpret_cast<const scalar_t*>(row(0)) + k, weights);
                } else {
                    load_values<scalar_t, WIDE>(norm_weight + first + k, weights);
                }
            }
#pragma unroll
            for (int token = 0; token < ROWS; token += TOGETHER) {
                // All loads before the first store, or they would wait for each other.
                float values[TOGETHER][WIDE] = {};
                if (k < end) {
#pragma unroll
                    for (int m = 0; m < TOGETHER; ++m) {
                        if (token + m >= ROWS) break;
                        load_values<In, WIDE>(source(token + m) + first + k, values[m]);
                    }
                }
#pragma unroll
                for (int m = 0; m < TOGETHER; ++m) {
                    if (token + m >= ROWS) break;
#pragma unroll
                    for (int i = 0; i < WIDE; ++i) {
                        if (NORM) values[m][i] = values[m][i] * inverse[token + m] * weights[i];
                    }
                    store_values<Act, WIDE>(row(token + m) + k, values[m]);
                }
            }
        }
    }
};
