// Products of a persistent decode step: the tokens' inputs in shared memory, the sums of a block's
// rows of weights, and what becomes of them.
//
// Shared memory behind the ring: PARTIAL_BYTES for the warps' sums, NORM_BYTES for a norm's weights,
// then the work area, where a row of inputs lies for each token. Inputs lie crossed: of eight, pairs 0, 2, 1, 3. So the same four
// registers are the operand of two tensor-core products, its upper rows for the first half of eight
// weights, its lower rows for the second, and the sum of a token is in both results.
#pragma once

#include "decode_step_pipeline.cuh"
#include "reduce.cuh"

// Units whose sums are merged at one barrier.
constexpr int GROUP_UNITS = SEQUENCES <= 2 ? 16 : SEQUENCES <= 4 ? 8 : 4;
constexpr int GROUP_SUMS = GROUP_UNITS * USER_WARPS * SEQUENCES * UNIT_ROWS;
constexpr int PARTIAL_BYTES = 2 * GROUP_SUMS * 4;  // one is written while the other is read
static_assert(GROUP_UNITS * UNIT_ROWS * SEQUENCES <= USERS, "a thread for each sum");

#ifndef MAX_NORM_INPUTS
#define MAX_NORM_INPUTS 4096
#endif
constexpr int NORM_BYTES = MAX_NORM_INPUTS * 2;

constexpr int SEQUENCES_POWER = SEQUENCES <= 1 ? 1 : SEQUENCES <= 2 ? 2 : SEQUENCES <= 4 ? 4 : 8;
constexpr int TOKEN_WARPS = USER_WARPS / SEQUENCES_POWER;  // that normalise a token
constexpr int SPAN = 8;                               // inputs that a lane takes at a time
constexpr int NORM_STEP = TOKEN_WARPS * 32 * SPAN;    // inputs that a token's warps take at a time
constexpr int NORM_HELD = 2;                          // such steps that stay in registers
static_assert(NORM_HELD == 2, "as load_normed has it");

__device__ __forceinline__ float* step_partials() {
    return reinterpret_cast<float*>(dynamic_shared() + RING_BYTES + BARRIER_BYTES);
}

__device__ __forceinline__ unsigned char* step_work() {
    return dynamic_shared() + RING_BYTES + BARRIER_BYTES + PARTIAL_BYTES + NORM_BYTES;
}

union InputSpan {
    uint4 bits;
    uint32_t pairs[4];
    Vec<scalar_t, SPAN> values;
};

__device__ __forceinline__ InputSpan load_span(const scalar_t* p) {
    InputSpan span;
    span.bits = *reinterpret_cast<const uint4*>(p);
    return span;
}

// The inputs of all tokens, a tile of them, as rows of shared memory.
struct TileRows {
    int stride;  // inputs from a row to the next: 64 bytes off a multiple of 128

    __device__ __forceinline__ TileRows(int num_inputs, int tile_inputs)
        : stride((min(num_inputs, tile_inputs) + 63) / 64 * 64 + 32) {}

    __device__ __forceinline__ scalar_t* row(int token) const {
        return reinterpret_cast<scalar_t*>(step_work()) + token * stride;
    }
    // Inputs k … k + 7 of the tile.
    __device__ __forceinline__ void put(int token, int k, const InputSpan& span) const {
        *reinterpret_cast<uint4*>(row(token) + k) =
            make_uint4(span.pairs[0], span.pairs[2], span.pairs[1], span.pairs[3]);
    }
};

// The norm's weights in shared memory, behind the partial sums: asked for early, as they wait for
// nobody. Every thread copies what itself will use.
__device__ __forceinline__ scalar_t* norm_weights() {
    return reinterpret_cast<scalar_t*>(step_partials() + PARTIAL_BYTES / 4);
}
__device__ __forceinline__ int first_norm_input() {
    return (warp_id() % TOKEN_WARPS * 32 + lane_id()) * SPAN;
}
__device__ __forceinline__ void request_norm(const scalar_t* weight, int num_inputs) {
    // With several tokens, more than one warp copies the same bytes to the same place.
    for (int k = first_norm_input(); k < num_inputs; k += NORM_STEP) {
        cp_async_16(norm_weights() + k, weight + k);
    }
    cp_async_commit();
}

__device__ __forceinline__ float sum_of_squares(const InputSpan& span) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < SPAN; ++j) {
        const float value = to_float(span.values.data[j]);
        sum += value * value;
    }
    return sum;
}

// The RMS norm of x [SEQUENCES, num_inputs] to the rows, with the weights that were asked for.
__device__ __noinline__ void load_normed(
    const TileRows rows, const scalar_t* x, float eps, int num_inputs) {
    __shared__ float sums[USER_WARPS];
    const int token = warp_id() / TOKEN_WARPS;
    const bool has_token = token < SEQUENCES;
    const scalar_t* from = x + static_cast<int64_t>(token) * num_inputs;
    InputSpan held[NORM_HELD];
    float sum = 0.0f;
    if (has_token) {
#pragma unroll
        for (int i = 0; i < NORM_HELD; ++i) {
            const int k = first_norm_input() + i * NORM_STEP;
            held[i].bits = make_uint4(0, 0, 0, 0);
            if (k < num_inputs) held[i] = load_span(from + k);
        }
#pragma unroll
        for (int i = 0; i < NORM_HELD; ++i) sum += sum_of_squares(held[i]);
#pragma unroll 2
        for (int k = first_norm_input() + NORM_HELD * NORM_STEP; k < num_inputs; k += NORM_STEP) {
            sum += sum_of_squares(load_span(from + k));
        }
    }
    sum = warp_sum(sum);
    cp_async_wait<0>();
    if (TOKEN_WARPS > 1) {
        if (lane_id() == 0) sums[warp_id()] = sum;
        users_sync();
        sum = 0.0f;
#pragma unroll
        for (int w = 0; w < TOKEN_WARPS; ++w) {
            sum += sums[warp_id() / TOKEN_WARPS * TOKEN_WARPS + w];
        }
    }
    const float factor = 1.0f / sqrtf(sum / num_inputs + eps);
#pragma unroll 1
    for (int i = 0; has_token && first_norm_input() + i * NORM_STEP < num_inputs; ++i) {
        const int k = first_norm_input() + i * NORM_STEP;
        const InputSpan span =
            i == 0 ? held[0] : i < NORM_HELD ? held[NORM_HELD - 1] : load_span(from + k);
        const InputSpan weight = load_span(norm_weights() + k);
        InputSpan normed;
#pragma unroll
        for (int j = 0; j < SPAN; ++j) {
            normed.values.data[j] = from_float<scalar_t>(
                to_float(span.values.data[j]) * factor * to_float(weight.values.data[j]));
        }
        rows.put(token, k, normed);
    }
    users_sync();
}

// The RMS norm of x [SEQUENCES, num_inputs], one tile.
struct NormInputs {
    const scalar_t* x;
    float eps;
    int num_inputs;

    __device__ __forceinline__ void load(int, int tile_inputs) const {
        load_normed(TileRows(num_inputs, tile_inputs), x, eps, num_inputs);
    }
};

// x [SEQUENCES, num_inputs] as it is.
struct PlainInputs {
    const scalar_t* x;
    int num_inputs;

    __device__ __forceinline__ void load(int tile, int tile_inputs) const {
        const TileRows rows(num_inputs, tile_inputs);
        const int first = tile * tile_inputs, count = min(tile_inputs, num_inputs - first);
#pragma unroll 1
        for (int token = 0; token < SEQUENCES; ++token) {
            const scalar_t* from = x + static_cast<int64_t>(token) * num_inputs + first;
#pragma unroll 4
            for (int k = threadIdx.x * SPAN; k < count; k += USERS * SPAN) {
                rows.put(token, k, load_span(from + k));
            }
        }
        users_sync();
    }
};

// ------------------------------------------------------------------------------ what becomes of a sum

struct StoreOutputs {  // out = sum + bias
    typedef float Addend;
    const scalar_t* bias;
    scalar_t* out;
    int num_outputs;

    __device__ __forceinline__ float fetch(int output, int) const {
        return bias == nullptr ? 0.0f : to_float(bias[output]);
    }
    __device__ __forceinline__ void store(int output, int token, const float* sum, float bias) const {
        out[static_cast<int64_t>(token) * num_outputs + output] =
            from_float<scalar_t>(sum[0] + bias);
    }
};

struct AddToStream {  // residual += sum + bias
    struct Addend {
        float bias;
        float residual;
    };
    const scalar_t* bias;
    scalar_t* residual;
    int num_outputs;

    __device__ __forceinline__ Addend fetch(int output, int token) const {
        Addend addend;
        addend.bias = bias == nullptr ? 0.0f : to_float(bias[output]);
        addend.residual = to_float(residual[static_cast<int64_t>(token) * num_outputs + output]);
        return addend;
    }
    __device__ __forceinline__ void store(
        int output, int token, const float* sum, const Addend& addend) const {
        residual[static_cast<int64_t>(token) * num_outputs + output] =
            from_float<scalar_t>(addend.residual + (sum[0] + addend.bias));
    }
};

struct StoreSwiglu {  // out = silu(gate) * up, of a pair of sums
    struct Addend {
        float gate;
        float up;
    };
    const scalar_t* bias;
    scalar_t* out;
    int num_outputs;

    __device__ __forceinline__ Addend fetch(int output, int) const {
        Addend addend;
        addend.gate = bias == nullptr ? 0.0f : to_float(bias[output]);
        addend.up = bias == nullptr ? 0.0f : to_float(bias[num_outputs + output]);
        return addend;
    }
    __device__ __forceinline__ void store(
        int output, int token, const float* sum, const Addend& addend) const {
        const float gate = rounded<scalar_t>(sum[0] + addend.gate);
        const float up = rounded<scalar_t>(sum[1] + addend.up);
        out[static_cast<int64_t>(token) * num_outputs + output] =
            from_float<scalar_t>(gate / (1.0f + expf(-gate)) * up);
    }
};

struct StoreLogits {
    struct Addend {};
    float* out;
    int num_outputs;

    __device__ __forceinline__ Addend fetch(int, int) const { return Addend(); }
    __device__ __forceinline__ void store(int output, int token, const float* sum, Addend) const {
        out[static_cast<int64_t>(token) * num_outputs + output] = sum[0];
    }
};

// ------------------------------------------------------------------------------ the product

// This warp's inputs of a stage: four chunks of 32. Lane 4 g + t has, of row g of the weights and of
// token g, the inputs 8 t … 8 t + 7 of a chunk.
__device__ __forceinline__ void multiply_stage(
    float (&sums)[4][4], const unsigned char* stage, const scalar_t* inputs, int num_inputs) {
    const unsigned char* w = stage + lane_id() / 4 * STAGE_ROW_BYTES + warp_id() * 256 +
                             lane_id() % 4 * 16;
    const scalar_t* x = inputs + warp_id() * 128;
    uint4 weights[4], values[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        if (warp_id() * 128 + c * 32 < num_inputs) {
            weights[c] = ld_shared_16(w + c * 64);
            values[c] = ld_shared_16(x + c * 32);
        }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
        if (warp_id() * 128 + c * 32 < num_inputs) {
            const uint32_t pairs[4] = {values[c].x, values[c].y, values[c].z, values[c].w};
            mma_m16n8k16<scalar_t>(sums[c % 2 * 2], pairs, weights[c].x, weights[c].y);
            mma_m16n8k16<scalar_t>(sums[c % 2 * 2 + 1], pairs, weights[c].z, weights[c].w);
        }
    }
}

// The sums of some units and a tile of inputs, each warp's own, to `partials` [units, USER_WARPS,
// SEQUENCES, UNIT_ROWS], or added to what is there. Returns the place in the ring behind them.
__device__ __noinline__ RingPlace sum_units(
    RingPlace place, int units, int num_inputs, const scalar_t* inputs, float* partials, bool adds) {
#pragma unroll 1
    for (int unit = 0; unit < units; ++unit) {
        float sums[4][4] = {};
#pragma unroll 1
        for (int k = 0; k < num_inputs; k += STAGE_INPUTS) {
            mbarrier_wait(stage_is_full(place.stage), place.phase);
            multiply_stage(sums, ring_stage(place.stage), inputs + k, num_inputs - k);
            warp_sync();
            if (lane_id() == 0) mbarrier_arrive(stage_is_free(place.stage));
            place.next();
        }
        if (lane_id() / 4 < SEQUENCES) {
            float* own = partials + ((unit * USER_WARPS + warp_id()) * SEQUENCES + lane_id() / 4) *
                                        UNIT_ROWS + lane_id() % 4 * 2;
            float pair[2] = {(sums[0][0] + sums[1][2]) + (sums[2][0] + sums[3][2]),
                             (sums[0][1] + sums[1][3]) + (sums[2][1] + sums[3][3])};
            if (adds) {
                pair[0] += own[0];
                pair[1] += own[1];
            }
            store_floats<float, 2>(own, pair);
        }
    }
    return place;
}

// Outputs of this block's part of a matrix. All threads that compute come. Where the inputs have
// several tiles, a block must have GROUP_UNITS units at most.
template <bool PAIRS, typename Inputs, typename Epilogue>
__device__ __forceinline__ void multiply_matrix(
    RingPlace& place, const StepMatrix& matrix, int tile_inputs, const Inputs& inputs,
    const Epilogue& epilogue) {
    constexpr int OUTPUTS = StepShare<PAIRS>::OUTPUTS;
    const StepShare<PAIRS> share(matrix, tile_inputs);
    const TileRows rows(matrix.num_inputs, tile_inputs);
    const scalar_t* own_inputs = rows.row(min(lane_id() / 4, SEQUENCES - 1)) + lane_id() % 4 * SPAN;
    const int group_output = threadIdx.x % (GROUP_UNITS * OUTPUTS);
    const int token = threadIdx.x / (GROUP_UNITS * OUTPUTS);
    int buffer = 0;
#pragma unroll 1
    for (int first = share.first_unit; first < share.end_unit; first += GROUP_UNITS) {
        const int units = min(GROUP_UNITS, share.end_unit - first);
        const int output = first * OUTPUTS + group_output;
        const bool finishes =
            token < SEQUENCES && group_output < units * OUTPUTS && output < matrix.num_outputs;
        typename Epilogue::Addend addend;
        if (finishes) addend = epilogue.fetch(output, token);  // early, as it comes from far
        float* partials = step_partials() + buffer * GROUP_SUMS;
#pragma unroll 1
        for (int tile = 0; tile < share.num_tiles; ++tile) {
            if (first == share.first_unit) {
                if (tile > 0) users_sync();  // nobody uses the tile before
                inputs.load(tile, tile_inputs);
            }
            const int count = min(tile_inputs, matrix.num_inputs - tile * tile_inputs);
            place = sum_units(place, units, count, own_inputs, partials, tile > 0);
        }
        users_sync();
        if (finishes) {
            constexpr int WIDTH = UNIT_ROWS / OUTPUTS;
            const float* own = partials + (group_output / OUTPUTS * USER_WARPS * SEQUENCES + token) *
                                              UNIT_ROWS + group_output % OUTPUTS * WIDTH;
            float sum[WIDTH] = {};
#pragma unroll
            for (int w = 0; w < USER_WARPS; ++w) {
#pragma unroll
                for (int i = 0; i < WIDTH; ++i) sum[i] += own[w * SEQUENCES * UNIT_ROWS + i];
            }
            epilogue.store(output, token, sum, addend);
        }
        buffer ^= 1;
    }
}
