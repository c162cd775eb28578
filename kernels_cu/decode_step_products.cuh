// Products of a persistent decode step: the tokens' inputs in shared memory, the sums of a block's
// rows of weights, and what becomes of them.
//
// What is read here was written by other blocks a moment ago and comes from L2, so all of it is asked
// for at once, by copies to shared memory.
#pragma once

#include "decode_step_memory.cuh"
#include "reduce.cuh"

constexpr int SEQUENCES_POWER = SEQUENCES <= 1 ? 1 : SEQUENCES <= 2 ? 2 : SEQUENCES <= 4 ? 4 : 8;
constexpr int TOKEN_WARPS = USER_WARPS / SEQUENCES_POWER;  // that normalise a token
constexpr int SPAN = 8;                                    // inputs that a lane takes at a time
constexpr int NORM_STEP = TOKEN_WARPS * 32 * SPAN;         // inputs of a token taken at a time

union InputSpan {
    uint4 bits;
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
        return step_inputs() + token * stride;
    }
};

// A norm's weights are asked for early, as they wait for nobody. Every thread copies what itself will
// use; with several tokens, several warps copy the same.
__device__ __forceinline__ int first_norm_input() {
    return (warp_id() % TOKEN_WARPS * 32 + lane_id()) * SPAN;
}
__device__ __forceinline__ void request_norm(const scalar_t* weight, int num_inputs) {
#pragma unroll 1
    for (int k = first_norm_input(); k < num_inputs; k += NORM_STEP) {
        cp_async_16(step_norm() + k, weight + k);
    }
}

// The RMS norm of x [SEQUENCES, num_inputs] to the rows, with the weights that were asked for.
__device__ __noinline__ void load_normed(
    const TileRows rows, const scalar_t* x, float eps, int num_inputs) {
    __shared__ float sums[USER_WARPS];
    const int token = warp_id() / TOKEN_WARPS;
    scalar_t* row = rows.row(token);
    const scalar_t* from = x + static_cast<int64_t>(token) * num_inputs;
    const int end = token < SEQUENCES ? num_inputs : 0;
#pragma unroll 1
    for (int k = first_norm_input(); k < end; k += NORM_STEP) cp_async_16(row + k, from + k);
    cp_async_commit();
    cp_async_wait<0>();  // of what this thread has copied, and nobody else uses before the barrier
    float sum = 0.0f;
#pragma unroll 1
    for (int k = first_norm_input(); k < end; k += NORM_STEP) {
        const InputSpan span = load_span(row + k);
#pragma unroll
        for (int j = 0; j < SPAN; ++j) {
            const float value = to_float(span.values.data[j]);
            sum += value * value;
        }
    }
    sum = warp_sum(sum);
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
    for (int k = first_norm_input(); k < end; k += NORM_STEP) {
        InputSpan span = load_span(row + k);
        const InputSpan weight = load_span(step_norm() + k);
#pragma unroll
        for (int j = 0; j < SPAN; ++j) {
            span.values.data[j] = from_float<scalar_t>(
                to_float(span.values.data[j]) * factor * to_float(weight.values.data[j]));
        }
        *reinterpret_cast<uint4*>(row + k) = span.bits;
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

// Start to copy `count` inputs to a row. All threads that compute come.
__device__ __forceinline__ void copy_inputs(scalar_t* row, const scalar_t* from, int count) {
#pragma unroll 1
    for (int k = threadIdx.x * SPAN; k < count; k += USERS * SPAN) cp_async_16(row + k, from + k);
}

// x [SEQUENCES, num_inputs] as it is.
struct PlainInputs {
    const scalar_t* x;
    int num_inputs;

    __device__ __forceinline__ void load(int tile, int tile_inputs) const {
        const TileRows rows(num_inputs, tile_inputs);
        const int first = tile * tile_inputs, count = min(tile_inputs, num_inputs - first);
#pragma unroll 1
        for (int token = 0; token < SEQUENCES; ++token) {
            copy_inputs(rows.row(token), x + static_cast<int64_t>(token) * num_inputs + first, count);
        }
        cp_async_commit();
        cp_async_wait<0>();
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
// token g, the inputs 8 t … 8 t + 7 of a chunk, and gives them to two products: pairs 0 and 2 of them
// to the first, where they are its operand's upper rows, pairs 1 and 3 to the second, where they are
// its lower rows. So the same four registers of a token's inputs serve both. Which input a lane calls
// first is the same on both sides, so the sum is the same; the other half of each result means
// nothing.
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
            mma_m16n8k16<scalar_t>(sums[c % 2 * 2], pairs, weights[c].x, weights[c].z);
            mma_m16n8k16<scalar_t>(sums[c % 2 * 2 + 1], pairs, weights[c].y, weights[c].w);
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
            mbarrier_wait(&step_memory().is_full[place.stage], place.phase);
            multiply_stage(sums, step_memory().stages[place.stage], inputs + k, num_inputs - k);
            warp_sync();
            if (lane_id() == 0) mbarrier_arrive(&step_memory().is_free[place.stage]);
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
