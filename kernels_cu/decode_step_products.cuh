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
__device__ __forceinline__ void load_normed(
    const TileRows& rows, const scalar_t* x, float eps, int num_inputs) {
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
    const float factor = rsqrtf(sum / num_inputs + eps);
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

// Start to copy `count` inputs to a row. All threads that compute come.
__device__ __forceinline__ void copy_inputs(scalar_t* row, const scalar_t* from, int count) {
#pragma unroll 1
    for (int k = threadIdx.x * SPAN; k < count; k += USERS * SPAN) cp_async_16(row + k, from + k);
}

// ------------------------------------------------------------------------------ what becomes of a sum

// Where the results of the products go, [SEQUENCES, num_outputs] each.
struct StepResults {
    scalar_t* x;  // of OUTPUT and DOWN, which are added to it
    scalar_t* qkv;
    scalar_t* activated;  // silu(gate) * up
    float* logits;
};

// What a sum is added to: a bias; of GATE_UP that of gate, then of up; the residual stream.
struct Addends {
    float bias, second;
};

__device__ __forceinline__ Addends fetch_addends(
    const StepProduct& product, const StepResults& results, int output, int token) {
    Addends addends = {0.0f, 0.0f};
    if (product.bias != nullptr) {
        addends.bias = to_float(product.bias[output]);
        if (product.has_pairs()) {
            addends.second = to_float(product.bias[product.num_outputs + output]);
        }
    }
    if (product.kind == OUTPUT || product.kind == DOWN) {
        addends.second =
            to_float(results.x[static_cast<int64_t>(token) * product.num_outputs + output]);
    }
    return addends;
}

// `second`: of GATE_UP, the sum for up.
__device__ __forceinline__ void store_result(
    const StepProduct& product, const StepResults& results, int output, int token, float sum,
    float second, const Addends& addends) {
    const int64_t at = static_cast<int64_t>(token) * product.num_outputs + output;
    const float biased = sum + addends.bias;
    if (product.kind == HEAD) {
        results.logits[at] = sum;
    } else if (product.kind == QKV) {
        results.qkv[at] = from_float<scalar_t>(biased);
    } else if (product.kind == GATE_UP) {
        const float gate = rounded<scalar_t>(biased);
        const float up = rounded<scalar_t>(second + addends.second);
        results.activated[at] = from_float<scalar_t>(gate / (1.0f + expf(-gate)) * up);
    } else {
        results.x[at] = from_float<scalar_t>(addends.second + biased);
    }
}

// ------------------------------------------------------------------------------ the product

// What a warp has of a stage: four chunks of 32 inputs. Lane 4 g + t has, of row g of the weights and
// of token g, the inputs 8 t … 8 t + 7 of a chunk, and gives them to two products: pairs 0 and 2 of
// them to the first, where they are its operand's upper rows, pairs 1 and 3 to the second, where they
// are its lower rows. So the same four registers of a token's inputs serve both. Which input a lane
// calls first is the same on both sides, so the sum is the same; the other half of each result means
// nothing.
struct StageChunks {
    uint4 data[4];

    // first: this lane's of chunk 0 of this warp; of the inputs, `left` exist from the stage's first
    // on.
    __device__ __forceinline__ void load(const void* first, int chunk_bytes, int left) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (warp_id() * 128 + c * 32 < left) {
                data[c] = ld_shared_16(static_cast<const unsigned char*>(first) + c * chunk_bytes);
            }
        }
    }
};

// The weights of the next stage, which may then be filled again.
__device__ __forceinline__ void take_stage(StageChunks& weights, RingPlace& place, int left) {
    StepMemory& memory = step_memory();
    mbarrier_wait(&memory.is_full[place.stage], place.phase);
    weights.load(memory.stages[place.stage] + lane_id() / 4 * STAGE_ROW_BYTES + warp_id() * 256 +
                     lane_id() % 4 * 16, 64, left);
    warp_sync();
    if (lane_id() == 0) mbarrier_arrive(&memory.is_free[place.stage]);
    place.next();
}

// The sums of some units and a tile of inputs, each warp's own, to `partials` [units, USER_WARPS,
// SEQUENCES, UNIT_ROWS], or added to what is there. While a stage is multiplied the next one comes to
// registers.
__device__ __forceinline__ void sum_units(
    RingPlace& place, int units, int num_inputs, const scalar_t* inputs, float* partials,
    bool adds) {
    const scalar_t* own_inputs = inputs + warp_id() * 128;
    StageChunks next, values;
    take_stage(next, place, num_inputs);
    values.load(own_inputs, 64, num_inputs);
    float sums[4][4] = {};
    int k = 0;
#pragma unroll 1
    for (int unit = 0; unit < units;) {
        const StageChunks weights = next;
        const int left = num_inputs - k;
        const bool ends = left <= STAGE_INPUTS;  // the unit
        if (!ends || unit + 1 < units) take_stage(next, place, ends ? num_inputs : left - STAGE_INPUTS);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            if (warp_id() * 128 + c * 32 < left) {
                const uint4 v = values.data[c], w = weights.data[c];
                const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
                mma_m16n8k16<scalar_t>(sums[c % 2 * 2], pairs, w.x, w.z);
                mma_m16n8k16<scalar_t>(sums[c % 2 * 2 + 1], pairs, w.y, w.w);
            }
        }
        k = ends ? 0 : k + STAGE_INPUTS;
        if (num_inputs > STAGE_INPUTS) values.load(own_inputs + k, 64, num_inputs - k);
        if (!ends) continue;
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
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i][j] = 0.0f;
        }
        ++unit;
    }
}

// Outputs of this block's part of a product. load(tile) puts a tile of its inputs to the rows; all
// threads that compute come. Where there are several tiles, a block must have GROUP_UNITS units at
// most.
template <typename Load>
__device__ __forceinline__ void run_product(
    RingPlace& place, const StepProduct& product, const StepResults& results, int tile_inputs,
    const Load& load) {
    const StepShare share(product);
    const TileRows rows(product.num_inputs, tile_inputs);
    const scalar_t* own_inputs = rows.row(min(lane_id() / 4, SEQUENCES - 1)) + lane_id() % 4 * SPAN;
    // Thread i finishes output i % group_outputs of a group, of token i / group_outputs.
    const int outputs = product.unit_outputs(), group_outputs = GROUP_UNITS * outputs;
    const int width = UNIT_ROWS / outputs;  // sums of an output
    const int own_output = threadIdx.x & (group_outputs - 1);
    const int token = threadIdx.x >> lowest_bit(group_outputs);
    const int own_sum = (own_output >> lowest_bit(outputs)) * USER_WARPS * SEQUENCES * UNIT_ROWS +
                        token * UNIT_ROWS + (own_output & (outputs - 1)) * width;
    int buffer = 0;
#pragma unroll 1
    for (int first = share.first_unit; first < share.end_unit; first += GROUP_UNITS) {
        const int units = min(GROUP_UNITS, share.end_unit - first);
        const int output = first * outputs + own_output;
        const bool finishes = token < SEQUENCES && own_output < units * outputs &&
                              output < product.num_outputs;
        Addends addends;
        if (finishes) addends = fetch_addends(product, results, output, token);  // from far: early
        float* partials = step_partials() + buffer * GROUP_SUMS;
#pragma unroll 1
        for (int start = 0; start < product.num_inputs; start += tile_inputs) {
            if (first == share.first_unit) {
                if (start > 0) users_sync();  // nobody uses the tile before
                load(rows, start, min(tile_inputs, product.num_inputs - start));
            }
            sum_units(place, units, min(tile_inputs, product.num_inputs - start), own_inputs, partials,
                      start > 0);
        }
        users_sync();
        if (finishes) {
            float sum = 0.0f, second = 0.0f;
#pragma unroll
            for (int w = 0; w < USER_WARPS; ++w) {
                const float* parts = partials + own_sum + w * SEQUENCES * UNIT_ROWS;
                sum += parts[0];
                if (width > 1) second += parts[1];
            }
            store_result(product, results, output, token, sum, second, addends);
        }
        buffer ^= 1;
    }
}
