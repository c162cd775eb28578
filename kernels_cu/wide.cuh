// Products of up to 256 tokens with a matrix of weights for compute capability 9.0a: products of
// warpgroups (wgmma), whose rows are rows of weights and whose columns are tokens, on tiles that the
// copy engine brings.
//
// Owns the order of a block's work. What becomes of the sums stands in wide_merge.cuh.
//
// A block has one tile of weights. One of its warps brings the weights and never waits for another
// kernel: with launches that overlap its ring is full before the kernel in front has ended. Another
// brings the inputs, through a ring of their own, as these come from near and must wait for that
// kernel. Where there are fewer tiles than multiprocessors a cluster shares the inputs of a tile:
// each of its blocks takes a part of the steps. And with SHARERS, so many blocks of a cluster have the
// same steps of tiles side by side, each brings a part of the tokens, and the copy engine gives it to all
// of them: fewer reads of L2.
//
// A token's sums are added in an order that depends on K and on the blocks that share its inputs: not
// on the batch, other tokens, the tile, SHARERS or TOKENS.
//
// TOKENS     that a block has room for: 64, 128, 192 or 256, at least the batch
// OUT_TILE   rows of weights of a block: 64 to 256, a multiple of 64; up to 128 above 128 tokens
// SHARERS    blocks that get the same inputs by one copy: 1, 2 or 4
#pragma once

#include "tile_products.cuh"

// Whether this build has the products; else their entries are empty and must not be launched.
#define WIDE_BUILD (HAS_TILE_PRODUCTS && SCALAR != 0)

#ifndef TOKENS
#error "define TOKENS: 64, 128, 192 or 256, at least the tokens of the batch"
#endif
#ifndef OUT_TILE
#define OUT_TILE 128
#endif
#ifndef SHARERS
#define SHARERS 1
#endif

constexpr int TOKEN_PARTS = TOKENS > 128 ? 2 : 1;  // warpgroups that share rows of weights
constexpr int PART_TOKENS = TOKENS / TOKEN_PARTS;
constexpr int WARPGROUPS = OUT_TILE / 64 * TOKEN_PARTS;
constexpr int COMPUTE_THREADS = WARPGROUPS * 128;
constexpr int BLOCK_THREADS = COMPUTE_THREADS + 64;        // and two warps that fetch
constexpr int RESIDENT_BLOCKS = WARPGROUPS <= 2 ? 2 : 1;   // whose registers a multiprocessor holds

static_assert(TOKENS % 64 == 0 && TOKENS <= 256 && OUT_TILE % 64 == 0 && WARPGROUPS <= 4, "TOKENS");
static_assert(SHARERS == 1 || SHARERS == 2 || SHARERS == 4, "SHARERS");

#if WIDE_BUILD

constexpr int K_STEP = 64;             // inputs of a step: rows of 128 bytes, swizzled
constexpr int ATOM = 1024;             // bytes of 8 such rows
constexpr int WEIGHT_BYTES = OUT_TILE * K_STEP * 2;  // of a step
constexpr int INPUT_BYTES = TOKENS * K_STEP * 2;
constexpr int MOST_STAGES = 16;        // of a ring
constexpr int HEAD_BYTES = 1024;       // before the rings

// At the start of shared memory. Full: the copies landed; free: all warps that multiply are done.
struct WideBarriers {
    uint64_t inbox;  // of a cluster: sums of the other splits have come
    uint64_t weights_full[MOST_STAGES], weights_free[MOST_STAGES];
    uint64_t inputs_full[MOST_STAGES], inputs_free[MOST_STAGES];
};
static_assert(sizeof(WideBarriers) <= HEAD_BYTES, "HEAD_BYTES");

struct WideMatrix {
    const TensorMap* inputs;   // x [num_rows, num_inputs], box [TOKENS / SHARERS, 64]
    const TensorMap* weights;  // box [OUT_TILE, 64], half as many rows with PAIRS
    int num_rows;
    int num_outputs;
    int num_inputs;
    int weight_stages, input_stages;  // of the rings; two at least where there are two steps
};

// A place in a ring of `count` stages, and the parity of its round.
struct WidePlace {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next(int count) {
        if (++stage == count) {
            stage = 0;
            parity ^= 1;
        }
    }
};

#include "wide_merge.cuh"

// The steps of this block, in its rings.
template <bool PAIRS>
struct WideSteps {
    WideMatrix matrix;
    WideBarriers* bars;
    unsigned char* weights;  // [weight_stages, WEIGHT_BYTES]
    unsigned char* inputs;   // [input_stages, INPUT_BYTES]
    int first_step, num_steps;
    int split, share;        // of the blocks of its tile; of those that get the same inputs

    // By one thread. Rows of gate, then of up, with PAIRS.
    __device__ __forceinline__ void fetch_weights(int tile) const {
        WidePlace place;
#pragma unroll 1
        for (int step = 0; step < num_steps; ++step) {
            uint64_t* const full = bars->weights_full + place.stage;
            const uint32_t to = shared_address(weights) + place.stage * WEIGHT_BYTES;
            const int k = (first_step + step) * K_STEP;
            mbarrier_wait(bars->weights_free + place.stage, place.parity ^ 1);
            mbarrier_arrive_expecting(full, WEIGHT_BYTES);
            if constexpr (PAIRS) {
                const int row = tile * (OUT_TILE / 2);
                copy_box(to, matrix.weights, full, k, row);
                copy_box(
                    to + WEIGHT_BYTES / 2, matrix.weights, full, k, matrix.num_outputs + row);
            } else {
                copy_box(to, matrix.weights, full, k, tile * OUT_TILE);
            }
            place.next(matrix.weight_stages);
        }
    }

    // By one thread, which has waited for the kernel in front.
    __device__ __forceinline__ void fetch_inputs() const {
        WidePlace place;
#pragma unroll 1
        for (int step = 0; step < num_steps; ++step) {
            uint64_t* const full = bars->inputs_full + place.stage;
            mbarrier_wait(bars->inputs_free + place.stage, place.parity ^ 1);
            mbarrier_arrive_expecting(full, INPUT_BYTES);
            const uint32_t to = shared_address(inputs) + place.stage * INPUT_BYTES;
            const int k = (first_step + step) * K_STEP;
            if constexpr (SHARERS == 1) {
                copy_box(to, matrix.inputs, full, k, 0);
            } else {  // the other parts come from the other blocks, before or after
                copy_box_to_ranks(
                    to + share * (INPUT_BYTES / SHARERS), matrix.inputs, full,
                    ((1 << SHARERS) - 1) << (split * SHARERS), k, share * (TOKENS / SHARERS));
            }
            place.next(matrix.input_stages);
        }
    }

    // By a warpgroup: of 64 rows of the tile and PART_TOKENS tokens. Nothing is at work after it.
    __device__ __forceinline__ void multiply(
        int row_part, int token_part, float (&sums)[PART_TOKENS / 8][4]) const {
        const uint64_t first_weights = operand(shared_address(weights) + row_part * 64 * 128, ATOM);
        const uint64_t first_inputs =
            operand(shared_address(inputs) + token_part * PART_TOKENS * 128, ATOM);
        WidePlace weight, input;
        int weight_before = 0, input_before = 0;
#pragma unroll 1
        for (int step = 0; step < num_steps; ++step) {
            const uint64_t a = operand_at(first_weights, weight.stage * WEIGHT_BYTES);
            const uint64_t b = operand_at(first_inputs, input.stage * INPUT_BYTES);
            mbarrier_wait(bars->weights_full + weight.stage, weight.parity);
            mbarrier_wait(bars->inputs_full + input.stage, input.parity);
            hold_registers(sums);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < K_STEP / 16; ++k) {
                Wgmma<scalar_t, PART_TOKENS>::shared(
                    sums, operand_at(a, k * 32), operand_at(b, k * 32), step > 0 || k > 0);
            }
            wgmma_commit();
            wgmma_wait<1>();  // the step before is done, and its places are free
            hold_registers(sums);
            if (step > 0 && lane_id() == 0) {
                mbarrier_arrive(bars->weights_free + weight_before);
                if constexpr (SHARERS == 1) {
                    mbarrier_arrive(bars->inputs_free + input_before);
                } else if (step - 1 + matrix.input_stages < num_steps) {
                    // Just where a copy will wait for it: no block may have ended when it comes.
#pragma unroll
                    for (int i = 0; i < SHARERS; ++i) {
                        mbarrier_arrive_at_rank(
                            bars->inputs_free + input_before, split * SHARERS + i);
                    }
                }
            }
            weight_before = weight.stage;
            input_before = input.stage;
            weight.next(matrix.weight_stages);
            input.next(matrix.input_stages);
        }
        wgmma_wait<0>();
        hold_registers(sums);
    }
};

// The whole kernel.
template <bool PAIRS, typename Epilogue>
__device__ __forceinline__ void run_wide(const WideMatrix& matrix, const Epilogue& epilogue) {
    const int ranks = cluster_size(), split = cluster_rank() / SHARERS;
    const int log2_splits = lowest_bit(ranks / SHARERS);  // powers of two
    const int share = cluster_rank() % SHARERS;
    const int tile = (blockIdx.x >> log2_splits) / SHARERS * SHARERS + share;
    const int all_steps = (matrix.num_inputs + K_STEP - 1) / K_STEP;
    const int warp = shuffle(warp_id(), 0);  // known to be the same in all lanes
    const uint32_t misplaced = shared_address(dynamic_shared()) % ATOM;
    unsigned char* const head = dynamic_shared() + (ATOM - misplaced) % ATOM;

    WideSteps<PAIRS> steps;
    steps.matrix = matrix;
    steps.bars = reinterpret_cast<WideBarriers*>(head);
    steps.weights = head + HEAD_BYTES;
    steps.inputs = steps.weights + matrix.weight_stages * WEIGHT_BYTES;
    steps.first_step = all_steps * split >> log2_splits;
    steps.num_steps = (all_steps * (split + 1) >> log2_splits) - steps.first_step;
    steps.split = split;
    steps.share = share;
    const WideMerge merge = {
        log2_splits, split, share, (matrix.num_rows + 7) / 8, steps.weights, &steps.bars->inbox};

    if (lane_id() == 0) {
        if (warp == WARPGROUPS * 4) prefetch_tensor_map(matrix.weights);
        if (warp == WARPGROUPS * 4 + 1) prefetch_tensor_map(matrix.inputs);
#pragma unroll 1
        for (int i = warp; i < MOST_STAGES; i += BLOCK_THREADS / 32) {
            mbarrier_init(steps.bars->weights_full + i, 1);
            mbarrier_init(steps.bars->weights_free + i, WARPGROUPS * 4);
            mbarrier_init(steps.bars->inputs_full + i, 1);
            mbarrier_init(steps.bars->inputs_free + i, WARPGROUPS * 4 * SHARERS);
        }
        if (warp == 0) mbarrier_init(merge.inbox, 1);
        mbarrier_init_fence();
        if (warp == 0) mbarrier_arrive_expecting(merge.inbox, merge.expected_bytes());
    }
    block_sync();
    if (SHARERS > 1) cluster_arrive();  // to all its blocks' barriers being made

    if (warp >= WARPGROUPS * 4) {  // ------------------------------------------ warps that fetch
        if (warp == WARPGROUPS * 4) {
            if (lane_id() == 0) steps.fetch_weights(tile);
            warp_sync();
            if (SHARERS > 1) cluster_wait();
        } else {
            if (SHARERS > 1) cluster_wait();
            if (lane_id() == 0) {
                grid_dependency_wait();
                steps.fetch_inputs();
            }
            warp_sync();
        }
#pragma unroll 1
        for (int i = 0; i < (ranks > 1) + (merge.splits() > 1); ++i) {  // where every thread comes to
            cluster_arrive();
            cluster_wait();
        }
        return;
    }

    // ---------------------------------------------------------------- warpgroups that multiply
    float sums[PART_TOKENS / 8][4];
    const int row_part = warp / 4 / TOKEN_PARTS, token_part = warp / 4 % TOKEN_PARTS;
    if (SHARERS > 1) cluster_wait();
    grid_dependency_wait();
    steps.multiply(row_part, token_part, sums);
    // The rings become the place of sums when nobody reads them any more: of its own a block's, of
    // those of others a cluster's. All copies have landed: each was waited for.
    warp_sync();
    if (ranks > 1) cluster_arrive();
    barrier_sync(1, COMPUTE_THREADS);
    const WideFinish<PAIRS, Epilogue> finish(
        merge, epilogue, tile, matrix.num_rows, matrix.num_outputs);
    const int rows = row_part * 4 + warp % 4, first_group = token_part * (PART_TOKENS / 8);
    merge.lay_out(rows, first_group, sums);
    if (ranks > 1) {
        shared_to_async_fence();
        warp_sync();
        cluster_wait();
        if (lane_id() == 0) merge.send(rows, first_group);
        warp_sync();
    }
    finish.run();
    // Nobody leaves before all have received what they will, also from its memory.
    if (merge.splits() > 1) {
        warp_sync();
        cluster_wait();
    }
}

#endif  // WIDE_BUILD
