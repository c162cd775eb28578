// The warp of a persistent decode step that brings weights, and nothing else.
#pragma once

#include "decode_step_memory.cuh"

// Before anything else; the whole block must come.
__device__ __forceinline__ void make_ring() {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < RING_STAGES; ++stage) {
            mbarrier_init(&step_memory().is_full[stage], 1);
            mbarrier_init(&step_memory().is_free[stage], USER_WARPS);
        }
        mbarrier_init_fence();
    }
    block_sync();
}

// Bring this block's part of a matrix; returns the place behind it. A whole warp comes. A function of
// its own, as are others of a step: the code of a layer must stay small, as it runs once a layer and
// what the multiprocessor's cache doesn't hold comes from L2.
template <bool PAIRS>
__device__ __noinline__ RingPlace bring_matrix(
    RingPlace place, const StepMatrix matrix, int tile_inputs) {
    const StepShare<PAIRS> share(matrix, tile_inputs);
    constexpr int OUTPUTS = StepShare<PAIRS>::OUTPUTS;
    const int row = lane_id();
#pragma unroll 1
    for (int tile = 0; tile < share.num_tiles; ++tile) {
        const int first = tile * tile_inputs, end = min(matrix.num_inputs, first + tile_inputs);
#pragma unroll 1
        for (int unit = share.first_unit; unit < share.end_unit; ++unit) {
            const int outputs = min(OUTPUTS, matrix.num_outputs - unit * OUTPUTS);
            const int rows = PAIRS ? 2 * outputs : outputs;
            const int output = unit * OUTPUTS + (PAIRS ? row / 2 : row);
            const int index = PAIRS && row % 2 ? matrix.num_outputs + output : output;
            const scalar_t* from = matrix.weight + static_cast<int64_t>(index) * matrix.num_inputs;
#pragma unroll 1
            for (int k = first; k < end; k += STAGE_INPUTS) {
                const int bytes = min(STAGE_INPUTS, end - k) * static_cast<int>(sizeof(scalar_t));
                uint64_t* full = &step_memory().is_full[place.stage];
                mbarrier_wait(&step_memory().is_free[place.stage], place.phase ^ 1);
                if (row == 0) mbarrier_arrive_expecting(full, rows * bytes);
                warp_sync();
                if (row < rows) {
                    copy_bulk(step_memory().stages[place.stage] + row * STAGE_ROW_BYTES, from + k, bytes, full);
                }
                place.next();
            }
        }
    }
    return place;
}
