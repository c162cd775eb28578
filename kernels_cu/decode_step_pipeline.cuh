// The stream of weights through a persistent decode step: one warp brings them, the others use them.
//
// SEQUENCES         tokens of the step, 1 to 8
// RING_STAGES  stages of the ring
//
// A stage holds the same 1024 inputs, or fewer, of 8 rows of weights. Every matrix is cut into units
// of 8 rows; a block has some of them in a row, so that what it reads lies in one piece, and takes
// them one after the other, every warp a part of the inputs. The warp that brings weights goes
// through the same matrices, units and stages as those that use them, but waits for nothing but room
// in the ring: while these wait for other blocks, it fills the ring for what comes next.
//
// With PAIRS, rows of a unit alternate between the matrix's first and second half.
#pragma once

#include "bulk_copy.cuh"
#include "types.cuh"

#ifndef SEQUENCES
#error "define SEQUENCES: tokens of the step, 1 to 8"
#endif
#ifndef RING_STAGES
#define RING_STAGES 4
#endif

constexpr int USER_WARPS = 8;
constexpr int USERS = USER_WARPS * 32;       // threads that compute
constexpr int STEP_THREADS = USERS + 32;     // and a warp that brings weights
constexpr int UNIT_ROWS = 8;
constexpr int STAGE_INPUTS = 1024;
// Rows lie 64 bytes off a multiple of 128, so that eight lanes that read 16 bytes each, of two rows,
// meet no bank twice.
constexpr int STAGE_ROW_BYTES = STAGE_INPUTS * static_cast<int>(sizeof(scalar_t)) + 64;
constexpr int STAGE_BYTES = UNIT_ROWS * STAGE_ROW_BYTES;
constexpr int RING_BYTES = RING_STAGES * STAGE_BYTES;
constexpr int BARRIER_BYTES = 2 * RING_STAGES * 8;

static_assert(SEQUENCES >= 1 && SEQUENCES <= 8, "SEQUENCES is 1 to 8");
static_assert(sizeof(scalar_t) == 2, "weights of 16 bits");

// All threads that compute meet; those that bring weights do not come.
__device__ __forceinline__ void users_sync() { barrier_sync(1, USERS); }

// A matrix, [num_outputs, num_inputs], with PAIRS [2 * num_outputs, num_inputs]; num_inputs is a
// multiple of 32.
struct StepMatrix {
    const scalar_t* weight;
    int num_outputs;
    int num_inputs;
};

// What of a matrix is this block's: units first_unit … end_unit - 1, and the inputs in tiles.
template <bool PAIRS>
struct StepShare {
    static constexpr int OUTPUTS = PAIRS ? UNIT_ROWS / 2 : UNIT_ROWS;  // of a unit

    int first_unit, end_unit, num_tiles;

    __device__ __forceinline__ StepShare(const StepMatrix& matrix, int tile_inputs) {
        const int block = blockIdx.x, blocks = gridDim.x;
        const int num_units = (matrix.num_outputs + OUTPUTS - 1) / OUTPUTS;
        const int each = num_units / blocks, over = num_units - each * blocks;
        first_unit = each * block + min(block, over);
        end_unit = first_unit + each + (block < over ? 1 : 0);
        num_tiles = (matrix.num_inputs + tile_inputs - 1) / tile_inputs;
    }
};

// A place in the ring, and which time round it is.
struct RingPlace {
    int stage = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void next() {
        if (++stage == RING_STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// At the start of dynamic shared memory: the stages, then two barriers a stage.
__device__ __forceinline__ unsigned char* ring_stage(int stage) {
    return dynamic_shared() + stage * STAGE_BYTES;
}
__device__ __forceinline__ uint64_t* stage_is_full(int stage) {
    return reinterpret_cast<uint64_t*>(dynamic_shared() + RING_BYTES) + stage;
}
__device__ __forceinline__ uint64_t* stage_is_free(int stage) {
    return stage_is_full(RING_STAGES + stage);
}

// Before anything else; the whole block must come.
__device__ __forceinline__ void make_ring() {
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < RING_STAGES; ++stage) {
            mbarrier_init(stage_is_full(stage), 1);
            mbarrier_init(stage_is_free(stage), USER_WARPS);
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
                uint64_t* full = stage_is_full(place.stage);
                mbarrier_wait(stage_is_free(place.stage), place.phase ^ 1);
                if (row == 0) mbarrier_arrive_expecting(full, rows * bytes);
                warp_sync();
                if (row < rows) {
                    copy_bulk(ring_stage(place.stage) + row * STAGE_ROW_BYTES, from + k, bytes, full);
                }
                place.next();
            }
        }
    }
    return place;
}
