// Products of a persistent decode step: the tokens' inputs in shared memory, the sums of a block's
// rows of weights, and what becomes of them.
//
// What is read here was written by other blocks a moment ago and comes from L2, so a thread asks for
// several words at once.
#pragma once

#include "decode_step_words.cuh"
#include "reduce.cuh"

constexpr int SEQUENCES_POWER = SEQUENCES <= 1 ? 1 : SEQUENCES <= 2 ? 2 : SEQUENCES <= 4 ? 4 : 8;
constexpr int TOKEN_WARPS = USER_WARPS / SEQUENCES_POWER;  // that normalise a token
constexpr int SPAN = 8;                                    // inputs that a lane takes at a time
constexpr int NORM_STEP = TOKEN_WARPS * 32 * SPAN;         // inputs of a token taken at a time

constexpr int SPAN_WORDS = SPAN / 2;
constexpr int SPANS_AHEAD = 4;  // that a thread asks for at once

union InputSpan {
    uint4 bits;
    uint32_t pairs[SPAN_WORDS];
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

// The RMS norm of x to the rows, with the weights that were asked for. moment: of the words of x;
// 0: it lies in `embeddings` [SEQUENCES, num_inputs].
__device__ __noinline__ void load_normed(
    const TileRows rows, const scalar_t* embeddings, Moment moment, float eps, int num_inputs) {
    __shared__ float sums[USER_WARPS];
    const int token = warp_id() / TOKEN_WARPS;
    scalar_t* row = rows.row(token);
    const int64_t start = static_cast<int64_t>(token) * num_inputs;
    const uint64_t* words = step_memory().words.x + start / 2;
    const int end = token < SEQUENCES ? num_inputs : 0;
    float sum = 0.0f;
#pragma unroll 1
    for (int first = first_norm_input(); first < end; first += SPANS_AHEAD * NORM_STEP) {
        InputSpan spans[SPANS_AHEAD];
        bool all;
        do {
            all = true;
#pragma unroll
            for (int i = 0; i < SPANS_AHEAD; ++i) {
                const int k = first + i * NORM_STEP;
                spans[i].bits = make_uint4(0, 0, 0, 0);
                if (k >= end) continue;
                if (moment == 0) {
                    spans[i] = load_span(embeddings + start + k);
                } else {
                    all = try_words(words + k / 2, moment, spans[i].pairs) && all;
                }
            }
            if (!all) spin_wait();
        } while (!all);
#pragma unroll
        for (int i = 0; i < SPANS_AHEAD; ++i) {
#pragma unroll
            for (int j = 0; j < SPAN; ++j) {
                const float value = to_float(spans[i].values.data[j]);
                sum += value * value;
            }
            const int k = first + i * NORM_STEP;
            if (k < end) *reinterpret_cast<uint4*>(row + k) = spans[i].bits;
        }
    }
    sum = warp_sum(sum);
    cp_async_wait<0>();  // the norm's weights that this thread has copied
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

// Inputs first … first + count - 1 of all tokens, from words [SEQUENCES, num_inputs / 2], to the rows.
// All threads that compute come; a barrier must follow.
__device__ __noinline__ void load_words(
    const TileRows rows, const uint64_t* words, Moment moment, int num_inputs, int first,
    int count) {
    const int spans = count / SPAN;  // of a token
#pragma unroll 1
    for (int start = threadIdx.x; start < SEQUENCES * spans; start += SPANS_AHEAD * USERS) {
        InputSpan found[SPANS_AHEAD];
        bool all;
        do {
            all = true;
#pragma unroll
            for (int i = 0; i < SPANS_AHEAD; ++i) {
                const int span = start + i * USERS;
                if (span >= SEQUENCES * spans) continue;
                const int token = SEQUENCES == 1 ? 0 : span / spans;
                const int k = first + (span - token * spans) * SPAN;
                const int64_t at = (static_cast<int64_t>(token) * num_inputs + k) / 2;
                all = try_words(words + at, moment, found[i].pairs) && all;
            }
            if (!all) spin_wait();
        } while (!all);
#pragma unroll
        for (int i = 0; i < SPANS_AHEAD; ++i) {
            const int span = start + i * USERS;
            if (span >= SEQUENCES * spans) continue;
            const int token = SEQUENCES == 1 ? 0 : span / spans;
            *reinterpret_cast<uint4*>(rows.row(token) + (span - token * spans) * SPAN) =
                found[i].bits;
        }
    }
}

// ------------------------------------------------------------------------------ what becomes of a sum

// What a sum is added to: a bias; of GATE_UP that of gate, then of up; the residual stream, by the word
// that has it.
struct Addends {
    float bias, second;
    uint64_t word;
};

// before: the moment of the words of x; 0: it lies in `embeddings`. The words are this block's own.
__device__ __forceinline__ Addends fetch_addends(
    const StepProduct& product, const scalar_t* embeddings, Moment before, int output, int64_t at) {
    Addends addends = {0.0f, 0.0f, 0};
    if (product.bias != nullptr) {
        addends.bias = to_float(product.bias[output]);
        if (product.has_pairs()) {
            addends.second = to_float(product.bias[product.num_outputs + output]);
        }
    }
    if (product.adds_to_stream()) {
        if (before == 0) {
            addends.second = to_float(embeddings[at]);
        } else {
            addends.word = load_word(step_memory().words.x + at / 2);
        }
    }
    return addends;
}

// What becomes of a sum, rounded; `second`: of GATE_UP, the sum for up.
__device__ __forceinline__ float finished(
    const StepProduct& product, float sum, float second, Addends& addends, Moment before,
    int64_t at) {
    sum += addends.bias;
    if (product.has_pairs()) {
        const float gate = rounded<scalar_t>(sum), up = rounded<scalar_t>(second + addends.second);
        return gate / (1.0f + expf(-gate)) * up;
    }
    if (product.adds_to_stream() && before != 0) {
        while (!is_of(addends.word, before)) {
            addends.word = load_word(step_memory().words.x + at / 2);
        }
        InputSpan span;
        span.pairs[0] = static_cast<uint32_t>(addends.word);
        addends.second = to_float(at % 2 ? span.values.data[1] : span.values.data[0]);
    }
    return addends.second + sum;
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
    // on. What does not exist is zero, and no memory that was never written is multiplied with it.
    __device__ __forceinline__ void load(const void* first, int left) {
        const unsigned char* from = static_cast<const unsigned char*>(first);
        if (left >= STAGE_INPUTS) {  // nearly always: no branches on the way
#pragma unroll
            for (int c = 0; c < 4; ++c) data[c] = ld_shared_16(from + c * 64);
        } else {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                data[c] = make_uint4(0, 0, 0, 0);
                if (warp_id() * 128 + c * 32 < left) data[c] = ld_shared_16(from + c * 64);
            }
        }
    }
};

// The weights of the next stage, which may then be filled again.
__device__ __forceinline__ void take_stage(StageChunks& weights, RingPlace& place, int left) {
    StepMemory& memory = step_memory();
    mbarrier_wait(&memory.is_full[place.stage], place.phase);
    weights.load(memory.stages[place.stage] + lane_id() / 4 * STAGE_ROW_BYTES + warp_id() * 256 +
                     lane_id() % 4 * 16, left);
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
    values.load(own_inputs, num_inputs);
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
            const uint4 v = values.data[c], w = weights.data[c];
            const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
            mma_m16n8k16<scalar_t>(sums[c % 2 * 2], pairs, w.x, w.z);
            mma_m16n8k16<scalar_t>(sums[c % 2 * 2 + 1], pairs, w.y, w.w);
        }
        k = ends ? 0 : k + STAGE_INPUTS;
        if (num_inputs > STAGE_INPUTS) values.load(own_inputs + k, num_inputs - k);
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

// Outputs of this block's part of a product, to `words` of `moment`, those of HEAD to `logits`. load(…)
// puts a tile of its inputs to the rows; all threads that compute come. Where there are several tiles,
// a block must have GROUP_UNITS units at most. before: the moment of the residual stream, as above.
template <typename Load>
__device__ __forceinline__ void run_product(
    RingPlace& place, const StepProduct& product, const scalar_t* embeddings, Moment before,
    Moment moment, uint64_t* words, float* logits, int tile_inputs, const Load& load) {
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
        Addends addends = {0.0f, 0.0f, 0};
        const int64_t at = static_cast<int64_t>(token) * product.num_outputs + output;
        if (finishes) addends = fetch_addends(product, embeddings, before, output, at);  // early
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
        float sum = 0.0f, second = 0.0f;
        if (finishes) {
#pragma unroll
            for (int w = 0; w < USER_WARPS; ++w) {
                const float* parts = partials + own_sum + w * SEQUENCES * UNIT_ROWS;
                sum += parts[0];
                if (width > 1) second += parts[1];
            }
        }
        if (product.kind == HEAD) {
            if (finishes) logits[at] = sum;
        } else {
            // Neighbours have the two values of a word; numbers of outputs are even.
            if (finishes) sum = finished(product, sum, second, addends, before, at);
            const float neighbour = shuffle_xor(sum, 1);
            if (finishes && output % 2 == 0) store_pair(words + at / 2, sum, neighbour, moment);
        }
        buffer ^= 1;
    }
}
