// The activations of a small-batch product in shared memory: normalised, rounded, padded with zeros.
//
// Owns the layout of shared memory and the RMS norm, which every block computes for itself: the rows
// are few and lie in L2. Knows nothing of weights or outputs.
//
// Dynamic shared memory: the ring of weights (RING_BYTES), a row of inputs for each token, and with a
// norm a row for its weights and a float for each TILE_STEP inputs of each token.
//
// No prefetch hides the time between the end of the kernel before and the first product. So inputs
// are read once, all loads of a thread together, and stay in registers while their squares are
// summed.
#pragma once

#include "reduce.cuh"
#include "types.cuh"

#ifndef ROWS
#error "define ROWS: tokens of the batch, 1 to 8"
#endif
#ifndef WARPS
#define WARPS 8
#endif
#ifndef RING
#define RING 16
#endif

constexpr int BLOCK_THREADS = WARPS * 32;
constexpr int WIDE = Wide<scalar_t>::N;  // weights in one load
// Weights under way to shared memory, RING times 16 bytes a thread.
constexpr int RING_BYTES = RING * BLOCK_THREADS * 16;
// A tile of inputs is a multiple of this, and padded to it: no chunk of a product straddles tiles.
constexpr int TILE_STEP = 256;
// Rows of a tile lie 64 bytes off a multiple of 128, so that eight lanes that read 16 bytes each, of
// two rows, meet no bank twice.
constexpr int ROW_PAD = 32;
// The most rows of weights that a warp works on at once.
constexpr int MAX_UNIT_ROWS = 8;
// Passes over a block's rows whose parts are merged at one barrier: a power of two, and as many as
// a few KB hold.
constexpr int MERGE_PASSES = ROWS <= 4 ? 4 : 2;
// Inputs that a lane takes at a time, a warp TILE_STEP of them.
constexpr int SPAN = TILE_STEP / 32;

static_assert(ROWS >= 1 && ROWS <= 8, "ROWS is 1 to 8");
static_assert(
    WARPS >= 1 && WARPS <= 32 && (WARPS & (WARPS - 1)) == 0, "WARPS is a power of two up to 32");

constexpr int ROWS_POWER = ROWS <= 1 ? 1 : ROWS <= 2 ? 2 : ROWS <= 4 ? 4 : 8;

// What the threads of a block exchange, beside dynamic shared memory.
struct GemvScratch {
    float partial[MERGE_PASSES][WARPS * MAX_UNIT_ROWS * ROWS];
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

// A lane's SPAN inputs as they were read.
template <typename In>
union InputSpan {
    uint4 words[SPAN * sizeof(In) / 16];
    Vec<In, SPAN> values;
};

// x [ROWS, num_inputs] of In as act_t in shared memory, a tile of inputs at a time; with NORM its
// RMS norm. `x` is written by the kernel before: nothing of it is read before start().
//
// The unit of work of a warp is a span: TILE_STEP inputs of one token. A token belongs to
// TOKEN_WARPS warps, which take its spans in turn. Which warp takes a span changes no bit of the
// norm: the squares of a span are summed over its lanes, the spans of a token by one warp again, in
// an order that depends on num_inputs alone.
template <typename In, typename Act, bool NORM>
struct GemvInput {
    typedef Act act_t;

    const In* x;
    const int32_t* rows;  // which rows of x; null: the first ones
    const scalar_t* norm_weight;
    float eps;
    int num_inputs;
    int tile_size;  // inputs of a tile, a multiple of TILE_STEP

    static constexpr int TOKEN_STEP = WARPS < ROWS_POWER ? WARPS : ROWS_POWER;
    static constexpr int TOKEN_WARPS = WARPS / TOKEN_STEP;
    // Spans that a warp reads before it uses the first: all of a thousand inputs or two, within 16
    // registers. Inputs that are not read 16 bytes at a time come one span after the other.
    static constexpr int HELD = (ROWS <= 2 ? 2 : 4) / (sizeof(In) == 4 ? 2 : 1);

    __device__ __forceinline__ Act* row(int token) const {
        const int stride = min(tile_size, padded_inputs(num_inputs)) + ROW_PAD;
        return reinterpret_cast<Act*>(dynamic_shared() + RING_BYTES) + token * stride;
    }
    __device__ __forceinline__ scalar_t* norm_row() const {
        return reinterpret_cast<scalar_t*>(row(ROWS));
    }

    __device__ __forceinline__ const In* source(int token) const {
        const int64_t index = rows == nullptr ? token : rows[token];
        return x + index * num_inputs;
    }

    // Whether all is read 16 bytes at a time.
    __device__ __forceinline__ bool is_wide() const {
        return num_inputs % SPAN == 0 && is_aligned_16(x) && (!NORM || is_aligned_16(norm_weight));
    }
    __device__ __forceinline__ bool is_one_tile() const { return num_inputs <= tile_size; }

    // Before the wait for the kernel before: ask for what does not depend on it, the norm's weights,
    // as one group of copies.
    __device__ __forceinline__ void request() const {
        if (NORM && is_one_tile() && is_wide()) {
#pragma unroll 1
            for (int k = threadIdx.x * WIDE; k < num_inputs; k += BLOCK_THREADS * WIDE) {
                cp_async_16(norm_row() + k, norm_weight + k);
            }
        }
        cp_async_commit();
    }

    // After the wait: the first tile, in place when this returns. GROUPS: groups of copies that
    // were committed after that of request(). CROSSED: of eight inputs, pairs 0, 2, 1, 3.
    template <bool CROSSED, int GROUPS>
    __device__ __forceinline__ void start() const {
        if (is_wide()) {
            start_as<CROSSED, true, HELD, GROUPS>();
        } else {
            start_as<CROSSED, false, 1, GROUPS>();
        }
        block_sync();
    }

    // Another tile. A barrier must lie between the last use of the one before and this, and one
    // between this and its use.
    template <bool CROSSED>
    __device__ __forceinline__ void load(int tile) const {
        if (is_wide()) {
            load_as<CROSSED, true, HELD>(tile);
        } else {
            load_as<CROSSED, false, 1>(tile);
        }
    }

    // ------------------------------------------------------------------ parts of the above

    static __device__ __forceinline__ int first_token() { return warp_id() % TOKEN_STEP; }
    static __device__ __forceinline__ int first_span() { return warp_id() / TOKEN_STEP; }

    // Spans span, span + TOKEN_WARPS, … as far as they begin before `end`, of the row at `from`.
    template <bool IS_WIDE, int N>
    __device__ __forceinline__ void read(
        InputSpan<In> (&held)[N], const In* from, int span, int end) const {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int k = (span + i * TOKEN_WARPS) * TILE_STEP + lane_id() * SPAN;
            if constexpr (IS_WIDE) {
#pragma unroll
                for (int w = 0; w < SPAN * static_cast<int>(sizeof(In)) / 16; ++w) {
                    held[i].words[w] = make_uint4(0, 0, 0, 0);
                    if (k < end) held[i].words[w] = reinterpret_cast<const uint4*>(from + k)[w];
                }
            } else {
#pragma unroll
                for (int j = 0; j < SPAN; ++j) {
                    held[i].values.data[j] = k + j < end ? from[k + j] : from_float<In>(0.0f);
                }
            }
        }
    }

    template <bool CROSSED, bool IS_WIDE, int N, int GROUPS>
    __device__ __forceinline__ void start_as() const {
        if constexpr (NORM) {
            InputSpan<In> held[N];
            sum_squares<IS_WIDE>(held, first_token());
#pragma unroll 1
            for (int token = first_token() + TOKEN_STEP; token < ROWS; token += TOKEN_STEP) {
                InputSpan<In> others[N];
                sum_squares<IS_WIDE>(others, token);
            }
            cp_async_wait<GROUPS>();  // this thread's part of the norm's weights
            block_sync();
            const bool keeps = is_one_tile();
            if (keeps) put<CROSSED, IS_WIDE>(held, first_token(), first_span(), 0);
            load_as<CROSSED, IS_WIDE, N>(0, keeps);
        } else {
            load_as<CROSSED, IS_WIDE, N>(0);
        }
    }

    // Of this warp's spans of a token; `held` gets the first ones.
    template <bool IS_WIDE, int N>
    __device__ __forceinline__ void sum_squares(InputSpan<In> (&held)[N], int token) const {
        if (token >= ROWS) return;
        const In* from = source(token);
        read<IS_WIDE>(held, from, first_span(), num_inputs);
        square<N>(held, token, first_span());
#pragma unroll 1
        for (int span = first_span() + N * TOKEN_WARPS; span * TILE_STEP < num_inputs;
             span += N * TOKEN_WARPS) {
            InputSpan<In> others[N];
            read<IS_WIDE>(others, from, span, num_inputs);
            square<N>(others, token, span);
        }
    }

    template <int N>
    __device__ __forceinline__ void square(
        const InputSpan<In> (&held)[N], int token, int span) const {
        float sums[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            sums[i] = 0.0f;
#pragma unroll
            for (int j = 0; j < SPAN; ++j) {
                const float value = to_float(held[i].values.data[j]);
                sums[i] += value * value;
            }
        }
        const float sum = warp_sum_spread<N>(sums);
        const int own = span + lane_id() / (32 / N) * TOKEN_WARPS;
        if (lane_id() % (32 / N) == 0 && own * TILE_STEP < num_inputs) squares(token)[own] = sum;
    }

    // The sums of squares of a token's spans: behind the last row of shared memory.
    __device__ __forceinline__ float* squares(int token) const {
        return reinterpret_cast<float*>(row(ROWS + 1)) +
               token * (padded_inputs(num_inputs) / TILE_STEP);
    }

    // Spans span, span + TOKEN_WARPS, … of a tile, from registers to their places.
    template <bool CROSSED, bool IS_WIDE, int N>
    __device__ __forceinline__ void put(
        const InputSpan<In> (&held)[N], int token, int span, int tile) const {
        if (token >= ROWS) return;
        const int first = tile * tile_size, end = min(num_inputs - first, tile_size);
        float factor = 1.0f;
        if constexpr (NORM) {
            float sum = 0.0f;
            for (int i = lane_id(); i * TILE_STEP < num_inputs; i += 32) sum += squares(token)[i];
            factor = 1.0f / sqrtf(warp_sum(sum) / num_inputs + eps);
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int k = (span + i * TOKEN_WARPS) * TILE_STEP + lane_id() * SPAN;
            if (k - lane_id() * SPAN >= end) break;
            float values[SPAN], weights[SPAN] = {};
#pragma unroll
            for (int j = 0; j < SPAN; ++j) values[j] = to_float(held[i].values.data[j]);
            if constexpr (NORM) {
                if constexpr (IS_WIDE) {
                    const scalar_t* from = is_one_tile() ? norm_row() + k : norm_weight + first + k;
                    if (k < end) load_values<scalar_t, SPAN>(from, weights);
                } else {
#pragma unroll
                    for (int j = 0; j < SPAN; ++j) {
                        if (k + j < end) weights[j] = to_float(norm_weight[first + k + j]);
                    }
                }
#pragma unroll
                for (int j = 0; j < SPAN; ++j) values[j] = values[j] * factor * weights[j];
            }
            if constexpr (CROSSED) {
                const float crossed[SPAN] = {values[0], values[1], values[4], values[5],
                                             values[2], values[3], values[6], values[7]};
                store_values<Act, SPAN>(row(token) + k, crossed);
            } else {
                store_values<Act, SPAN>(row(token) + k, values);
            }
        }
    }

    // A tile; what `put` has already put into place is left out.
    template <bool CROSSED, bool IS_WIDE, int N>
    __device__ __forceinline__ void load_as(int tile, bool has_first = false) const {
        const int first = tile * tile_size, end = min(num_inputs - first, tile_size);
#pragma unroll 1
        for (int token = first_token(); token < ROWS; token += TOKEN_STEP) {
            int span = first_span();
            if (has_first && token == first_token()) span += N * TOKEN_WARPS;
            const In* from = source(token) + first;
#pragma unroll 1
            for (; span * TILE_STEP < end; span += N * TOKEN_WARPS) {
                InputSpan<In> held[N];
                read<IS_WIDE>(held, from, span, end);
                put<CROSSED, IS_WIDE>(held, token, span, tile);
            }
        }
    }
};
