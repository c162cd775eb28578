// Products of a persistent decode step: the sums of a block's rows of weights, and what becomes of them.
#pragma once

#include "decode_step_inputs.cuh"

// ------------------------------------------------------------------------------ what becomes of a sum

// What a sum is added to beside the residual stream: a bias, of GATE_UP that of gate, then of up.
struct Biases {
    float first, second;
};

__device__ __forceinline__ Biases fetch_biases(const StepProduct& product, int output) {
    Biases biases = {0.0f, 0.0f};
    if (product.bias != nullptr) {
        biases.first = to_float(product.bias[output]);
        if (product.has_pairs()) {
            biases.second = to_float(product.bias[product.num_outputs + output]);
        }
    }
    return biases;
}

// What becomes of a sum, to be rounded; `second`: of GATE_UP, the sum for up. stream: the value of the
// residual stream that this thread has, from one product to the next.
__device__ __forceinline__ float finished(
    const StepProduct& product, float sum, float second, const Biases& biases, float& stream) {
    sum += biases.first;
    if (product.has_pairs()) {
        const float gate = rounded<scalar_t>(sum), up = rounded<scalar_t>(second + biases.second);
        return gate / (1.0f + expf(-gate)) * up;
    }
    if (!product.adds_to_stream()) return sum;
    stream = rounded<scalar_t>(stream + sum);
    return stream;
}

// ------------------------------------------------------------------------------ the product

// The token that is this lane's column of products.
__device__ __forceinline__ int own_token() { return min(lane_id() / 4 % 4, SEQUENCES - 1); }

// Which sums of a group of units this thread finishes: output i % group_outputs of token
// i / group_outputs, the same one in all products with as many outputs.
struct Finisher {
    int outputs;  // of a unit
    int own_output, token;

    __device__ __forceinline__ explicit Finisher(const StepProduct& product)
        : outputs(product.unit_outputs()) {
        own_output = threadIdx.x & (GROUP_UNITS * outputs - 1);
        token = threadIdx.x >> lowest_bit(GROUP_UNITS * outputs);
    }
    __device__ __forceinline__ int output_of(int first_unit) const {
        return first_unit * outputs + own_output;
    }
    __device__ __forceinline__ bool finishes(
        const StepProduct& product, int first_unit, int units) const {
        return token < SEQUENCES && own_output < units * outputs &&
               output_of(first_unit) < product.num_outputs;
    }
    // The sums of all warps that have any, `second` of the other row of a pair: the one behind it, of
    // codes that of the strip's other half.
    __device__ __forceinline__ void add_up(
        const float* partials, int num_inputs, float& sum, float& second) const {
        const int unit = own_output >> lowest_bit(outputs), width = UNIT_ROWS / outputs;
        const int stride = HAS_CODES ? 1 : width, other = HAS_CODES ? UNIT_ROWS / 2 : 1;
        const int warps = num_inputs > STAGE_INPUTS ? USER_WARPS : GROUP_WARPS;
        const int first_warp = num_inputs > STAGE_INPUTS ? 0 : unit % 2 * GROUP_WARPS;
        const float* parts = partials + ((unit * USER_WARPS + first_warp) * SEQUENCES + token) * UNIT_ROWS +
                             (own_output & (outputs - 1)) * stride;
#pragma unroll
        for (int w = 0; w < USER_WARPS; ++w) {
            if (w >= warps) break;
            sum += parts[w * SEQUENCES * UNIT_ROWS];
            if (width > 1) second += parts[w * SEQUENCES * UNIT_ROWS + other];
        }
    }
};

// Outputs of this block's part of a product, to `words` of `moment`, those of HEAD to `logits`. load(…)
// puts a tile of its inputs to the rows; all threads that compute come. Where there are several tiles,
// and where the residual stream is added to, a block must have GROUP_UNITS units at most.
template <typename Load>
__device__ __forceinline__ void run_product(
    RingPlace& place, const StepProduct& product, Moment moment, uint64_t* words, float* logits,
    float& stream, int tile_inputs, const Load& load) {
    const StepShare share = step_memory().shares[product.kind];
    const TileRows rows(product.num_inputs, tile_inputs);
    const scalar_t* own_inputs = rows.row(own_token()) + lane_id() % 4 * 8;
    const Finisher own(product);
    int buffer = 0;
    if (share.first_unit == share.end_unit) {
        // Nothing to load, but what was asked for early must be there, and asked for once, here too.
        cp_async_wait<0>();
        users_sync();
    }
#pragma unroll 1
    for (int first = share.first_unit; first < share.end_unit; first += GROUP_UNITS) {
        const int units = min(GROUP_UNITS, share.end_unit - first);
        const int output = own.output_of(first);
        const bool finishes = own.finishes(product, first, units);
        Biases biases = {0.0f, 0.0f};
        if (finishes) biases = fetch_biases(product, output);  // early, as they come from far
        float* partials = step_partials() + buffer * GROUP_SUMS;
#pragma unroll 1
        for (int start = 0; start < product.num_inputs; start += tile_inputs) {
            const int count = min(tile_inputs, product.num_inputs - start);
            if (first == share.first_unit) {
                if (start > 0) users_sync();  // nobody uses the tile before
                load(rows, start, count);
            }
            if (SUM_BUFFERS == 1 && first > share.first_unit) users_sync();  // nobody reads the sums before
            sum_units(place, units, count, own_inputs, rows.group_sums(), partials, start > 0);
            place.advance(units * ((count + STAGE_INPUTS - 1) / STAGE_INPUTS));
        }
        users_sync();
        float sum = 0.0f, second = 0.0f;
        if (finishes) own.add_up(partials, min(tile_inputs, product.num_inputs), sum, second);
#if HAS_CODES
        sum *= product.unit;
        second *= product.unit;
#endif
        const int64_t at = static_cast<int64_t>(own.token) * product.num_outputs + output;
        if (product.kind == HEAD) {
            if (finishes) logits[at] = sum;
        } else {
            // Neighbours have the two values of a word; numbers of outputs are even.
            if (finishes) sum = finished(product, sum, second, biases, stream);
            const float neighbour = shuffle_xor(sum, 1);
            if (finishes && output % 2 == 0) store_pair(words + at / 2, sum, neighbour, moment);
        }
        buffer = (buffer + 1) % SUM_BUFFERS;
    }
}
