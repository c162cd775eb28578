// Products of many tokens with gate and up together, and SwiGLU before anything is written, for
// compute capability 9.0a: products of warpgroups (wgmma), whose rows are tokens and whose columns are
// rows of weights, on tiles that the copy engine brings.
//
// Owns the order of a block's work. Blocks stay and take one tile after another: 128 tokens by 128
// outputs, which are as many rows of gate and of up. A warp brings rows of x and weights, step by step
// of 64 inputs, through a ring that goes on from tile to tile; two warpgroups have 64 tokens each. What
// a tile's sums become is worked out while the products of the next tile run: rounded to the model's
// type, as they must be, sums take half of their registers, and are a unit a step turned into results
// and stored. So the tensor cores wait for neither exponentials nor stores.
//
// With SHARERS, so many blocks of a cluster have tiles of tokens side by side and the same outputs:
// each brings a part of the weights, and the copy engine gives it to all of them.
//
// A token's sums are added in the order of its inputs, whatever the tile, the batch or the card.
//
// SHARERS    blocks that get the same weights by one copy: 1, 2 or 4
// STAGES     steps in the ring, from 2
// STAGGERED  1: one warpgroup begins a step behind the other, and stays there, so that they do not
//            come to the end of a tile together: one's products run while the other waits for its
//            last and rounds its sums
#pragma once

#include "tall_products.cuh"

// Whether this build has the products; else their entries are empty and must not be launched.
#define TALL_BUILD (HAS_TILE_PRODUCTS && SCALAR != 0)

#ifndef SHARERS
#define SHARERS 2
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef STAGGERED
#define STAGGERED 1
#endif

constexpr int WARPGROUPS = 2;  // that compute
constexpr int WARPS = WARPGROUPS * 4;
constexpr int BLOCK_THREADS = (WARPGROUPS + 1) * 128;

static_assert(SHARERS == 1 || SHARERS == 2 || SHARERS == 4, "SHARERS");

#if TALL_BUILD

constexpr int K_STEP = 64;     // inputs of a step: rows of 128 bytes, swizzled
constexpr int ATOM = 1024;     // bytes of 8 such rows
constexpr int ROW_TILE = 64 * WARPGROUPS;
constexpr int OUT_TILE = 128;  // of gate, and of up
constexpr int INPUT_BYTES = ROW_TILE * K_STEP * 2;
constexpr int WEIGHT_BYTES = 2 * OUT_TILE * K_STEP * 2;
constexpr int STAGE_BYTES = INPUT_BYTES + WEIGHT_BYTES;
constexpr int HEAD_BYTES = 1024;  // before the ring
// Parts of a tile's results: a step of the next tile each, so there are so many steps at least.
constexpr int UNITS = 8;
constexpr float LOG2_E = 1.4426950408889634f;

// Registers a thread: what all warpgroups have together is what the launch gave them.
constexpr int FETCH_REGISTERS = 24, COMPUTE_REGISTERS = 240;

// At the start of shared memory. Full: the copies landed; free: all warps that multiply are done, of
// all blocks that get the same weights.
struct TallBarriers {
    uint64_t full[STAGES], free[STAGES];
    uint64_t begun;  // the first warpgroup's first step is done
};
static_assert(sizeof(TallBarriers) <= HEAD_BYTES, "HEAD_BYTES");

// A place in the ring, and the parity of its round.
struct TallPlace {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// The whole product, and how it is cut: blocks at work together have few groups of rows and all outputs
// one after the other, so that rows and weights are read from L2.
struct TallMatrix {
    const TensorMap* inputs;   // x [num_rows, num_inputs], box [ROW_TILE, 64]
    const TensorMap* weights;  // [2 num_outputs, num_inputs], box [min(128, 256 / SHARERS), 64]
    int num_rows, num_outputs, num_inputs;
    int group;  // tiles of rows, of a cluster, that are taken before the next ones

    __device__ __forceinline__ int row_tiles() const {
        return (num_rows + ROW_TILE * SHARERS - 1) / (ROW_TILE * SHARERS);
    }
    __device__ __forceinline__ int out_tiles() const {
        return (num_outputs + OUT_TILE - 1) / OUT_TILE;
    }
    __device__ __forceinline__ int num_tiles() const { return row_tiles() * out_tiles(); }
    __device__ __forceinline__ int num_steps() const { return (num_inputs + K_STEP - 1) / K_STEP; }

    // The first row of block `share` of the cluster that has tile `index`, and the first output.
    __device__ __forceinline__ void find(int index, int share, int& row, int& output) const {
        const int of_group = group * out_tiles(), first = index / of_group * group;
        const int within = index % of_group, rows = min(group, row_tiles() - first);
        row = ((first + within % rows) * SHARERS + share) * ROW_TILE;
        output = within / rows * OUT_TILE;
    }
};

// By one thread: all tiles of this block.
__device__ __forceinline__ void fetch_tiles(
    const TallMatrix& matrix, TallBarriers* bars, unsigned char* ring, int first_tile, int share) {
    const int num_tiles = matrix.num_tiles(), num_steps = matrix.num_steps();
    const int clusters = gridDim.x / SHARERS;
    TallPlace place;
#pragma unroll 1
    for (int index = first_tile; index < num_tiles; index += clusters) {
        int row, output;
        matrix.find(index, share, row, output);
#pragma unroll 1
        for (int step = 0; step < num_steps; ++step) {
            uint64_t* const full = bars->full + place.stage;
            const uint32_t to = shared_address(ring) + place.stage * STAGE_BYTES;
            const uint32_t weights_to = to + INPUT_BYTES;
            const int k = step * K_STEP;
            mbarrier_wait(bars->free + place.stage, place.parity ^ 1);
            mbarrier_arrive_expecting(full, STAGE_BYTES);
            copy_box(to, matrix.inputs, full, k, row);
            if constexpr (SHARERS == 1) {
                copy_box(weights_to, matrix.weights, full, k, output);
                copy_box(
                    weights_to + WEIGHT_BYTES / 2, matrix.weights, full, k,
                    matrix.num_outputs + output);
            } else {  // the other parts come from the other blocks, before or after
                const int part = share * (2 * OUT_TILE / SHARERS);  // of gate, then of up
                const int weight = part < OUT_TILE ? output + part
                                                   : matrix.num_outputs + output + part - OUT_TILE;
                copy_box_to_ranks(
                    weights_to + part * 128, matrix.weights, full, (1 << SHARERS) - 1, k, weight);
            }
            place.next();
        }
    }
}

// A 4 x 4 transpose within each four lanes: a[i] of lane t becomes lane i's a[t].
__device__ __forceinline__ void exchange_four(uint32_t (&a)[4]) {
    const bool odd = lane_id() & 1, upper = lane_id() & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t got = shuffle_xor(odd ? a[i] : a[i + 1], 1);
        a[i] = odd ? got : a[i];
        a[i + 1] = odd ? a[i + 1] : got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t got = shuffle_xor(upper ? a[i] : a[i + 2], 2);
        a[i] = upper ? got : a[i];
        a[i + 2] = upper ? a[i + 2] : got;
    }
}

__device__ __forceinline__ float swiglu(float gate, float up) {
    return gate * reciprocal_approx(1.0f + exp2_approx(-LOG2_E * gate)) * up;
}

// A warpgroup's sums of a tile, rounded to the model's type, until they are results: of the lane's two
// rows groups of 8 outputs from `output` on, two side by side in a register. `row` is the tile's first;
// where that does not exist nothing is stored.
struct TallResults {
    uint32_t gate[OUT_TILE / 8][2], up[OUT_TILE / 8][2];
    int row, output;

    __device__ __forceinline__ void clear(int num_rows) {
#pragma unroll
        for (int n = 0; n < OUT_TILE / 8; ++n) {
            gate[n][0] = gate[n][1] = up[n][0] = up[n][1] = 0;
        }
        row = num_rows;
        output = 0;
    }

    __device__ __forceinline__ void take(const float (&sums)[2 * OUT_TILE / 8][4]) {
        constexpr int UP = OUT_TILE / 8;
#pragma unroll
        for (int n = 0; n < OUT_TILE / 8; ++n) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                gate[n][h] = pack_two<scalar_t>(sums[n][2 * h], sums[n][2 * h + 1]);
                up[n][h] = pack_two<scalar_t>(sums[UP + n][2 * h], sums[UP + n][2 * h + 1]);
            }
        }
    }

    // Part `unit` of all: 32 outputs of one of the rows lane_row and lane_row + 8 of the tile. Four
    // lanes share a row, and each stores 8 side by side.
    __device__ __forceinline__ void store(
        int unit, int lane_row, const TallMatrix& matrix, scalar_t* out) const {
        // Also so that products that were started before this are not held up: code does not move
        // across a branch.
        if (row >= matrix.num_rows) return;
        const int h = unit / 4, first = unit % 4 * 4;
        uint32_t four[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float gates[2], ups[2];
            unpack_two<scalar_t>(gate[first + i][h], gates[0], gates[1]);
            unpack_two<scalar_t>(up[first + i][h], ups[0], ups[1]);
            four[i] = pack_two<scalar_t>(swiglu(gates[0], ups[0]), swiglu(gates[1], ups[1]));
        }
        exchange_four(four);
        const int at_row = row + lane_row + 8 * h, at = output + (first + lane_id() % 4) * 8;
        if (at_row < matrix.num_rows && at < matrix.num_outputs) {
            *reinterpret_cast<uint4*>(
                out + static_cast<int64_t>(at_row) * matrix.num_outputs + at) =
                make_uint4(four[0], four[1], four[2], four[3]);
        }
    }
};

// By a warpgroup: 64 rows of all tiles of this block.
__device__ __forceinline__ void multiply_tiles(
    const TallMatrix& matrix, TallBarriers* bars, unsigned char* ring, int first_tile, int share,
    int warp, scalar_t* out) {
    const int num_tiles = matrix.num_tiles(), num_steps = matrix.num_steps();
    const int clusters = gridDim.x / SHARERS, lane = lane_id();
    const int lane_row = warp * 16 + lane / 4;  // of the tile; and that + 8
    const uint64_t first_rows = operand(shared_address(ring) + warp / 4 * 64 * 128, ATOM);
    const uint64_t first_weights = operand(shared_address(ring) + INPUT_BYTES, ATOM);
    TallPlace place;
    int before = 0;  // the stage of the step in front
    if (STAGGERED && warp >= 4) mbarrier_wait(&bars->begun, 0);
    float sums[2 * OUT_TILE / 8][4];
    TallResults results;
    results.clear(matrix.num_rows);

    const auto start_step = [&](bool adds) {
        const uint64_t a = operand_at(first_rows, place.stage * STAGE_BYTES);
        const uint64_t b = operand_at(first_weights, place.stage * STAGE_BYTES);
        mbarrier_wait(bars->full + place.stage, place.parity);
        hold_registers(sums);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < K_STEP / 16; ++k) {
            Wgmma<scalar_t, 2 * OUT_TILE>::shared(
                sums, operand_at(a, k * 32), operand_at(b, k * 32), adds || k > 0);
        }
        wgmma_commit();
    };
    const auto free_stage = [&](int stage) {
        if constexpr (SHARERS == 1) {
            if (lane == 0) mbarrier_arrive(bars->free + stage);
        } else {
            if (lane < SHARERS) mbarrier_arrive_at_rank(bars->free + stage, lane);
        }
    };
    // The step in front is done, of which the tile's first has none.
    const auto end_step = [&](bool is_first) {
        wgmma_wait<1>();
        hold_registers(sums);
        if (!is_first) free_stage(before);
        before = place.stage;
        place.next();
    };

#pragma unroll 1
    for (int index = first_tile; index < num_tiles; index += clusters) {
#pragma unroll
        for (int unit = 0; unit < UNITS; ++unit) {
            start_step(unit > 0);
            results.store(unit, lane_row, matrix, out);
            end_step(unit == 0);
            if (STAGGERED && unit == 1 && warp < 4 && index == first_tile && lane == 0) {
                mbarrier_arrive(&bars->begun);
            }
        }
        matrix.find(index, share, results.row, results.output);  // of what is taken next
#pragma unroll 1
        for (int step = UNITS; step < num_steps; ++step) {
            start_step(true);
            end_step(false);
        }
        wgmma_wait<0>();
        hold_registers(sums);
        free_stage(before);
        results.take(sums);
    }
#pragma unroll
    for (int unit = 0; unit < UNITS; ++unit) results.store(unit, lane_row, matrix, out);
}

// The whole kernel.
__device__ __forceinline__ void run_tall(const TallMatrix& matrix, scalar_t* out) {
    const int share = cluster_rank() % SHARERS, first_tile = blockIdx.x / SHARERS;
    const int warp = shuffle(warp_id(), 0);  // known to be the same in all lanes
    const uint32_t misplaced = shared_address(dynamic_shared()) % ATOM;
    unsigned char* const head = dynamic_shared() + (ATOM - misplaced) % ATOM;
    TallBarriers* const bars = reinterpret_cast<TallBarriers*>(head);
    unsigned char* const ring = head + HEAD_BYTES;
    if (threadIdx.x == 0) {
        prefetch_tensor_map(matrix.inputs);
        prefetch_tensor_map(matrix.weights);
        mbarrier_init(&bars->begun, 4);
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(bars->full + i, 1);
            mbarrier_init(bars->free + i, WARPS * SHARERS);
        }
        mbarrier_init_fence();
    }
    block_sync();
    if (SHARERS > 1) {  // all blocks' barriers are made
        cluster_arrive();
        cluster_wait();
    }
    if (warp < 4) {
        give_registers<FETCH_REGISTERS>();
        if (warp == 0) {
            if (lane_id() == 0) fetch_tiles(matrix, bars, ring, first_tile, share);
            warp_sync();
        }
    } else {
        take_registers<COMPUTE_REGISTERS>();
        multiply_tiles(matrix, bars, ring, first_tile, share, warp - 4, out);
        warp_sync();
    }
    // Nobody leaves while others bring weights here, or say that a stage is free.
    if (SHARERS > 1) cluster_sync();
}

#endif  // TALL_BUILD
