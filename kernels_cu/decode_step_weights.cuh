// The warp of a persistent decode step that brings weights, and nothing else.
//
// PACE   cycles from a stage to the next, at least, of 16 KB: about what the memory needs for a block's
//        share, so that copies are hardly the slower for it. Stages of codes have theirs by their size.
//        Without a pace all blocks would ask for many stages at once whenever they have used some, and
//        what they then write, read and wait for would have to queue behind these.
#pragma once

#include "decode_step_memory.cuh"

#ifndef PACE
#define PACE 1200
#endif

// Before anything else; the whole block must come.
__device__ __forceinline__ void make_ring() {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < RING_STAGES; ++stage) {
            mbarrier_init(&step_memory().is_full[stage], 1);
            // Those of a group.
            mbarrier_init(&step_memory().is_free[stage], USER_WARPS / 2 * WARP_ARRIVALS);
        }
        mbarrier_init_fence();
    }
    block_sync();
}

#if HAS_CODES

// All codes of a step, in the order of their use. One thread comes.
__device__ __forceinline__ void bring_codes(const StepSizes& sizes, const StepLayer* layers) {
    StepMemory& memory = step_memory();
    RingPlace place;
    uint32_t last = clock_cycles() - PACE, pace = PACE;
#pragma unroll 1
    for (int i = 0; i < 4 * sizes.num_layers; ++i) {
        StepProduct product = sizes.product(i % 4);
        set_pointers(product, layers[i / 4]);
        const StepShare share(product);
        const int num_inputs = product.num_inputs, num_chunks = (num_inputs + CHUNK - 1) / CHUNK;
#pragma unroll 1
        for (int first = 0; first < num_inputs; first += sizes.tile_inputs) {
            const int end = min(num_inputs, first + sizes.tile_inputs);
#pragma unroll 1
            for (int unit = share.first_unit; unit < share.end_unit; ++unit) {
                const weight_t* strip =
                    product.weight + static_cast<int64_t>(unit) * num_chunks * CHUNK_BYTES;
#pragma unroll 1
                for (int k = first; k < end; k += STAGE_INPUTS) {
                    const int chunks = (min(STAGE_INPUTS, end - k) + CHUNK - 1) / CHUNK;
                    const int bytes = chunks * CHUNK_BYTES;
                    uint64_t* full = &memory.is_full[place.stage];
                    mbarrier_wait(&memory.is_free[place.stage], place.phase ^ 1);
                    while (clock_cycles() - last < pace) {}
                    last = clock_cycles();
                    pace = bytes * PACE >> 14;
                    mbarrier_arrive_expecting(full, bytes);
                    copy_bulk(memory.stages[place.stage], strip + k / CHUNK * CHUNK_BYTES, bytes,
                              full);
                    place.next();
                }
            }
        }
    }
}

#else

// All weights of a step, in the order of their use. A whole warp comes.
__device__ __forceinline__ void bring_weights(
    const StepSizes& sizes, const StepLayer* layers, const scalar_t* head) {
    StepMemory& memory = step_memory();
    const int row = lane_id();
    RingPlace place;
    uint32_t last = clock_cycles() - PACE;
#pragma unroll 1
    for (int i = 0; i < 4 * sizes.num_layers + HAS_HEAD; ++i) {
        StepProduct product = sizes.product(i < 4 * sizes.num_layers ? i % 4 : HEAD);
        product.weight = head;
        if (product.kind != HEAD) set_pointers(product, layers[i / 4]);
        const StepShare share(product);
        const int outputs = product.unit_outputs(), num_inputs = product.num_inputs;
#pragma unroll 1
        for (int first = 0; first < num_inputs; first += sizes.tile_inputs) {
            const int end = min(num_inputs, first + sizes.tile_inputs);
#pragma unroll 1
            for (int unit = share.first_unit; unit < share.end_unit; ++unit) {
                int rows = min(outputs, product.num_outputs - unit * outputs);
                int index = unit * outputs + row;
                if (product.has_pairs()) {
                    rows *= 2;
                    index = unit * outputs + row / 2 + row % 2 * product.num_outputs;
                }
                const scalar_t* from = product.weight + static_cast<int64_t>(index) * num_inputs;
#pragma unroll 1
                for (int k = first; k < end; k += STAGE_INPUTS) {
                    const int bytes = min(STAGE_INPUTS, end - k) * static_cast<int>(sizeof(scalar_t));
                    uint64_t* full = &memory.is_full[place.stage];
                    mbarrier_wait(&memory.is_free[place.stage], place.phase ^ 1);
                    while (clock_cycles() - last < PACE) {}
                    last = clock_cycles();
                    if (row == 0) mbarrier_arrive_expecting(full, rows * bytes);
                    warp_sync();
                    if (row < rows) {
                        copy_bulk(memory.stages[place.stage] + row * STAGE_ROW_BYTES, from + k, bytes,
                                  full);
                    }
                    place.next();
                }
            }
        }
    }
}

#endif
