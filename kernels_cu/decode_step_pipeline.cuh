// The stream of weights through a persistent decode step: one warp brings them, the others use them.
//
// SEQUENCES     tokens of the step, 1 to 4
// RING_STAGES   stages of the ring
// WEIGHT_KIND, GROUP   of quantized_format.cuh: the matrices of all layers are codes, packed as it says;
//               without these macros they are of 16 bits
//
// A stage holds the same 1024 inputs, or fewer, of 8 rows of weights. Every matrix is cut into units
// of 8 rows; a block has some of them in a row, so that what it reads lies in one piece, and takes
// them one after the other, every warp a part of the inputs. The warp that brings weights goes
// through the same matrices, units and stages as those that use them, but waits for nothing but room
// in the ring: while these wait for other blocks, it fills the ring for what comes next.
//
// Where gate and up are one matrix, the rows of a unit alternate between its halves.
//
// Of codes a unit is a strip, and a stage some of its chunks in a row: one run of memory, as packed.
#pragma once

#include "bulk_copy.cuh"
#include "types.cuh"

#ifdef WEIGHT_KIND
#define HAS_CODES 1
#include "quantized_format.cuh"
typedef unsigned char weight_t;
#else
#define HAS_CODES 0
typedef scalar_t weight_t;
#endif

#ifndef SEQUENCES
#error "define SEQUENCES: tokens of the step, 1 to 4"
#endif
#ifndef RING_STAGES
#define RING_STAGES 4
#endif

constexpr int USER_WARPS = 8;
constexpr int USERS = USER_WARPS * 32;       // threads that compute
// And a warpgroup of which one warp brings weights: registers move between whole warpgroups.
constexpr int STEP_THREADS = USERS + 128;
#if HAS_CODES
constexpr int UNIT_ROWS = STRIP;
constexpr int STAGE_CHUNKS = 8;
constexpr int STAGE_INPUTS = STAGE_CHUNKS * CHUNK;
constexpr int STAGE_BYTES = STAGE_CHUNKS * CHUNK_BYTES;
#else
constexpr int UNIT_ROWS = 8;
constexpr int STAGE_INPUTS = 1024;
// Rows lie 64 bytes off a multiple of 128, so that eight lanes that read 16 bytes each, of two rows,
// meet no bank twice.
constexpr int STAGE_ROW_BYTES = STAGE_INPUTS * static_cast<int>(sizeof(scalar_t)) + 64;
constexpr int STAGE_BYTES = UNIT_ROWS * STAGE_ROW_BYTES;
#endif
// Two groups of four warps take the stages in turn, so that one multiplies while the other waits.
constexpr int GROUP_WARPS = USER_WARPS / 2;

static_assert(SEQUENCES >= 1 && SEQUENCES <= 4, "SEQUENCES is 1 to 4");
static_assert(sizeof(scalar_t) == 2, "weights of 16 bits");
// With an even ring a place in it is, within a product, always the same group's, which so knows that
// the time before has ended when it waits for the next. From one product to the next the groups may
// change places: all have met between them, so all stages before were waited for.
static_assert(RING_STAGES % 2 == 0, "an even ring");

// All threads that compute meet; those that bring weights do not come.
__device__ __forceinline__ void users_sync() { barrier_sync(1, USERS); }

// The products of a layer, in order, and that behind the last one. What differs between them is
// decided as they run, so that their code is there once: it must stay small, as all of it runs once a
// layer, and what the multiprocessor's caches don't hold comes from L2.
enum ProductKind { QKV, OUTPUT, GATE_UP, DOWN, HEAD };

// One of them: weights [num_outputs, num_inputs], of GATE_UP [2 * num_outputs, num_inputs];
// num_inputs is a multiple of 32.
struct StepProduct {
    int kind;
    int num_outputs;
    int num_inputs;
    const weight_t* weight;
    const scalar_t* bias;  // or null
#if HAS_CODES
    float unit;  // of scales and offsets
#endif

    __device__ __forceinline__ bool has_pairs() const { return kind == GATE_UP; }
    __device__ __forceinline__ bool adds_to_stream() const {
        return kind == OUTPUT || kind == DOWN;
    }
    __device__ __forceinline__ int unit_outputs() const {
        return has_pairs() ? UNIT_ROWS / 2 : UNIT_ROWS;
    }
};

// What of a product is this block's: units first_unit … end_unit - 1. Where they do not come out even,
// the first blocks have one more, but of GATE_UP the last: nobody has the most of everything.
struct StepShare {
    int first_unit, end_unit;

    __device__ __forceinline__ explicit StepShare(const StepProduct& product) {
        const int blocks = gridDim.x;
        const int block = product.has_pairs() ? blocks - 1 - blockIdx.x : blockIdx.x;
        const int outputs = product.unit_outputs();
        const int num_units = (product.num_outputs + outputs - 1) / outputs;
        const int each = num_units / blocks, over = num_units - each * blocks;
        first_unit = each * block + min(block, over);
        end_unit = first_unit + each + (block < over ? 1 : 0);
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
    // Twice, as a group of warps does: past the end at most once, so the phase turns once.
    __device__ __forceinline__ void next_two() {
        const bool is_last = stage >= RING_STAGES - 2;
        stage += is_last ? 2 - RING_STAGES : 2;
        phase ^= is_last ? 1 : 0;
    }
    __device__ __forceinline__ void advance(int stages) {
        const int to = stage + stages;
        stage = to % RING_STAGES;
        phase ^= to / RING_STAGES & 1;
    }
};
