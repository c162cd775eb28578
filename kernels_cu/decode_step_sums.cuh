// Sums of a persistent decode step whose weights are of 16 bits.
#pragma once

#include "decode_step_memory.cuh"

constexpr int WARP_INPUTS = STAGE_INPUTS / GROUP_WARPS;
constexpr int CHUNKS = WARP_INPUTS / 32;  // of a warp in a stage

// What a warp has of a stage: chunks of 32 inputs. Lane 4 g + t has, of row g of the weights and of a
// token, the inputs 8 t … 8 t + 7 of a chunk: pairs 0 to 3. Which input a lane calls first is the same
// on both sides, so the sum is the same.
//
// A chunk takes one product of tensor cores. Its upper rows are the weights' pairs 0 and 2, its lower
// rows pairs 1 and 3; its columns 0 to 3 are the tokens' pairs 0 and 2, columns 4 to 7 their pairs 1
// and 3. Upper left and lower right of the result are what is wanted, the rest means nothing.
__device__ __forceinline__ void multiply_chunk(
    float (&sums)[4], const uint4& weights, const uint4& values) {
    const uint32_t pairs[4] = {weights.x, weights.y, weights.z, weights.w};
    const bool is_lower = lane_id() >= 16;
    mma_m16n8k16<scalar_t>(
        sums, pairs, is_lower ? values.y : values.x, is_lower ? values.w : values.z);
}

// Add this warp's sums of a unit to `to` [SEQUENCES, UNIT_ROWS], or store them there. A whole warp
// comes.
__device__ __forceinline__ void put_sums(float* to, const float (&sums)[4][4], bool adds) {
    // Lane 4 g + t has of row g the tokens 2 t and 2 t + 1; what lane 4 g + t + 2 has, belongs to it.
    const int token = lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float upper = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
        const float lower =
            (sums[0][2 + i] + sums[1][2 + i]) + (sums[2][2 + i] + sums[3][2 + i]);
        const float sum = upper + shuffle_xor(lower, 2);
        if (token + i < SEQUENCES) {
            float* own = to + (token + i) * UNIT_ROWS + lane_id() / 4;
            *own = adds ? *own + sum : sum;
        }
    }
}

struct StageChunks {
    uint4 data[CHUNKS];

    // first: this lane's of chunk 0 of this warp, of which `left` inputs exist. What does not exist is
    // zero, so that memory that was never written is not multiplied with it.
    __device__ __forceinline__ void load(const void* first, int left) {
        const unsigned char* from = static_cast<const unsigned char*>(first);
        if (left >= WARP_INPUTS) {  // nearly always: no branches on the way
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) data[c] = ld_shared_16(from + c * 64);
        } else {
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                data[c] = make_uint4(0, 0, 0, 0);
                if (c * 32 < left) data[c] = ld_shared_16(from + c * 64);
            }
        }
    }
};

// The sums of some units and a tile of inputs, each warp's own, to `partials` [units, USER_WARPS,
// SEQUENCES, UNIT_ROWS], or added to what is there. Where a unit has one stage, only the warps of its
// group have sums of it: the first ones' of the first unit, the others' of the second, and so on.
__device__ __forceinline__ void sum_units(
    const RingPlace& place, int units, int num_inputs, const scalar_t* inputs, const float*,
    float* partials, bool adds) {
    StepMemory& memory = step_memory();
    const int stages = (num_inputs + STAGE_INPUTS - 1) / STAGE_INPUTS, total = units * stages;
    const int group = warp_id() / GROUP_WARPS, first_input = warp_id() % GROUP_WARPS * WARP_INPUTS;
    const int own_weights = lane_id() / 4 * STAGE_ROW_BYTES + first_input * 2 + lane_id() % 4 * 16;
    RingPlace own = place;
    int unit = 0, stage = 0;
    if (group > 0) {
        own.next();
        unit = 1 / stages;
        stage = 1 % stages;
    }
    StageChunks values, weights;
    float sums[4][4] = {};
#pragma unroll 1
    for (int i = group; i < total; i += 2) {
        const int k = stage * STAGE_INPUTS + first_input, left = num_inputs - k;
        if (i == group || stages > 1) values.load(inputs + k, left);
        mbarrier_wait(&memory.is_full[own.stage], own.phase);
        weights.load(memory.stages[own.stage] + own_weights, left);
        mbarrier_arrive_warp(&memory.is_free[own.stage]);
        own.next();
        own.next();
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            multiply_chunk(sums[c % 4], weights.data[c], values.data[c]);
        }
        int next_unit = unit;
        for (stage += 2; stage >= stages; stage -= stages) ++next_unit;
        if (next_unit == unit) continue;
        put_sums(partials + (unit * USER_WARPS + warp_id()) * SEQUENCES * UNIT_ROWS, sums, adds);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int n = 0; n < 4; ++n) sums[j][n] = 0.0f;
        }
        unit = next_unit;
    }
}
