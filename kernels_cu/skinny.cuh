// Products of a batch of 3 to 64 tokens with a matrix of weights, on tensor cores (mma.sync, from
// 8.0), for 16-bit types.
//
// Owns the order of a block's work, from the first copy to the merge of sums. What of the matrix is
// whose and how a warp multiplies stands in skinny_parts.cuh with the macros, what becomes of a sum
// in epilogues.cuh.
//
// Weights wait for no other kernel. With launches that overlap, a block fills its ring while the
// kernel before still runs, and only then waits for it and asks for its inputs. All other blocks read
// these too: at 32 tokens and 64 rows of weights a block, half as many bytes from L2 as weights from
// memory. So tiles are tall, and where that leaves multiprocessors without one, a cluster of blocks
// shares the inputs of a tile: rank r takes a part of the steps, and finishes some of the pairs of
// tokens. Every warp stores its sums into the shared memory of the block that finishes them, which
// waits for as many bytes as are to come: no barrier, no memory, no fence.
//
// A token's sums are added in an order that depends on the weights' shape and on these macros other
// than TOKENS: not on the batch, other tokens or the grid.
#pragma once

#include "epilogues.cuh"
#include "skinny_norm.cuh"
#include "skinny_parts.cuh"

#if SKINNY_ON_TENSOR_CORES

// Sums of a tile by "source", a warp_k of a block of the cluster, on their way to who finishes them:
// pair p of tokens is finished by rank p % ranks, as its pair p / ranks.
struct SkinnyMerge {
    int ranks, rank, num_pairs;
    uint64_t* inbox;  // INBOX_HEAD bytes, then pairs of floats [ranks * WARPS_K, slots, OUT_TILE]

    __device__ __forceinline__ int num_sources() const { return ranks * WARPS_K; }
    __device__ __forceinline__ int slots() const { return (TOKEN_PAIRS + ranks - 1) / ranks; }
    // A multiple of 128.
    __device__ __forceinline__ int num_bytes() const {
        return INBOX_HEAD + num_sources() * slots() * OUT_TILE * 8;
    }
    __device__ __forceinline__ int own_pairs() const {
        return (num_pairs - rank + ranks - 1) / ranks;
    }
    __device__ __forceinline__ uint32_t expected_bytes() const {
        return num_sources() * own_pairs() * OUT_TILE * 8;
    }

    // The whole warp must come.
    __device__ __forceinline__ void send(const WarpSums& own) const {
        const int log2_ranks = lowest_bit(ranks);
        const int source = rank * WARPS_K + WarpSums::warp_k();
        const int first_row = WarpSums::warp_n() * ROW_TILES * 16 + lane_id() / 4;
#pragma unroll
        for (int n = 0; n < TOKENS / 8; ++n) {
            const int pair = n * 4 + lane_id() % 4;
            if (pair >= num_pairs) continue;
            const int at = (source * slots() + (pair >> log2_ranks)) * OUT_TILE + first_row;
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                const float(&sum)[4] = own.sums[m][n];
                const int offset = INBOX_HEAD + (at + m * 16) * 8;
                put_pair(ranks, inbox, pair & (ranks - 1), offset, sum[0], sum[1]);
                put_pair(ranks, inbox, pair & (ranks - 1), offset + 8 * 8, sum[2], sum[3]);
            }
        }
    }

    // Of the sums of `row` and own pair `slot`, those of all sources added.
    __device__ __forceinline__ void add_up(int slot, int row, float (&total)[2]) const {
        const float* from = reinterpret_cast<const float*>(
            reinterpret_cast<const char*>(inbox) + INBOX_HEAD + (slot * OUT_TILE + row) * 8);
        const int stride = slots() * OUT_TILE * 2;
        total[0] = total[1] = 0.0f;
#pragma unroll 4
        for (int s = 0; s < num_sources(); ++s) {
            float pair[2];
            load_floats<float, 2>(from + s * stride, pair);
            total[0] += pair[0];
            total[1] += pair[1];
        }
    }
};

// What a thread finishes: items i = thread, thread + BLOCK_THREADS … of (own pair, output), outputs
// side by side. The addends of the first EARLY of them are asked for when a tile begins.
template <bool PAIRS, typename Epilogue>
struct SkinnyFinish {
    typedef SkinnyShare<PAIRS> Share;
    static constexpr int OUTPUTS = Share::OUTPUTS;
    static constexpr int ITEMS = (TOKEN_PAIRS * OUTPUTS + BLOCK_THREADS - 1) / BLOCK_THREADS;
    static constexpr int EARLY = ITEMS < 4 ? ITEMS : 4;  // registers are few

    const Share& share;
    const SkinnyMerge& merge;
    const Epilogue& epilogue;
    typename Epilogue::Addend addends[EARLY][2];

    __device__ __forceinline__ SkinnyFinish(
        const Share& share, const SkinnyMerge& merge, const Epilogue& epilogue)
        : share(share), merge(merge), epilogue(epilogue) {}

    struct Item {
        int slot, row, output, token;
        bool valid[2];  // of its two tokens
    };
    __device__ __forceinline__ Item item(int tile, int i) const {
        const int index = i * BLOCK_THREADS + threadIdx.x;
        Item item;
        item.slot = index / OUTPUTS;
        item.row = Share::row_of_output(index % OUTPUTS);
        item.output = tile * OUTPUTS + index % OUTPUTS;
        item.token = 2 * (item.slot * merge.ranks + merge.rank);
        const bool inside = item.slot < merge.own_pairs() && item.output < share.matrix.num_outputs;
        item.valid[0] = inside;
        item.valid[1] = inside && item.token + 1 < share.matrix.num_rows;
        return item;
    }

    __device__ __forceinline__ void fetch(int tile) {
#pragma unroll
        for (int i = 0; i < EARLY; ++i) {
            const Item item = this->item(tile, i);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (item.valid[j]) addends[i][j] = epilogue.fetch(item.output, item.token + j);
            }
        }
    }

    __device__ __forceinline__ void finish_item(
        const Item& item, const typename Epilogue::Addend (&addend)[2]) const {
        float first[2], second[2];
        if (!item.valid[0]) return;
        merge.add_up(item.slot, item.row, first);
        if constexpr (PAIRS) merge.add_up(item.slot, item.row + 8, second);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            if (!item.valid[j]) continue;
            if constexpr (PAIRS) {
                epilogue.store(item.output, item.token + j, first[j], second[j], addend[j]);
            } else {
                epilogue.store(item.output, item.token + j, first[j], addend[j]);
            }
        }
    }

    __device__ __forceinline__ void finish(int tile) const {
#pragma unroll
        for (int i = 0; i < EARLY; ++i) finish_item(item(tile, i), addends[i]);
#pragma unroll 1
        for (int i = EARLY; i < ITEMS; ++i) {
            const Item late = item(tile, i);
            typename Epilogue::Addend addend[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (late.valid[j]) addend[j] = epilogue.fetch(late.output, late.token + j);
            }
            finish_item(late, addend);
        }
    }
};

// The whole kernel.
template <bool PAIRS, typename Epilogue>
__device__ __forceinline__ void run_skinny(const SkinnyMatrix& matrix, const Epilogue& epilogue) {
    typedef SkinnyShare<PAIRS> Share;
    const Share share(matrix);
    // Inboxes lie in the same place in all blocks of a cluster: first.
    const int num_pairs = (matrix.num_rows + 1) / 2;
    const SkinnyMerge merge = {
        share.ranks, share.rank, num_pairs, reinterpret_cast<uint64_t*>(dynamic_shared())};
    unsigned char* stayed = dynamic_shared() + merge.num_bytes();  // [num_steps, INPUT_BYTES]
#if NORM_INPUTS
    const SkinnyNorm norm = {
        share.ranks, share.rank, num_pairs, reinterpret_cast<uint64_t*>(stayed),
        reinterpret_cast<scalar_t*>(stayed + SkinnyNorm::inbox_bytes(share.ranks))};
    stayed += SkinnyNorm::inbox_bytes(share.ranks) + share.num_steps * ROW_BYTES;
    norm.copy_weights(share);
#endif
    unsigned char* const ring = stayed + (INPUTS_STAY ? share.num_steps * INPUT_BYTES : 0);

    // The steps of all tiles in a row; what is copied next, and to where.
    int ahead_tile = share.first_tile, ahead_step = 0, ahead_stage = 0;
    const auto go_ahead = [&]() {
        if (++ahead_step == share.num_steps) {
            ahead_step = 0;
            ahead_tile += share.tile_step;
        }
        if (++ahead_stage == STAGES) ahead_stage = 0;
    };
#pragma unroll 1  // code that runs once is read from memory as it runs: less of it is faster
    for (int i = 0; i < STAGES; ++i) {
        if (ahead_tile < share.num_tiles) {
            share.copy_weights(ring + ahead_stage * STAGE_BYTES, ahead_tile, ahead_step);
            go_ahead();
        }
        cp_async_commit();
    }
    if (share.ranks > 1) {
        if (threadIdx.x == 0) {
            make_inbox(merge.inbox, merge.expected_bytes());
#if NORM_INPUTS
            make_inbox(norm.inbox, norm.expected_bytes());
#endif
        }
        warp_sync();
        cluster_arrive();
    }
    grid_dependency_wait();

    // As many groups again, in the order of their use; where inputs stay, the last has all the rest,
    // and where they are normalised, all are waited for.
#pragma unroll 1
    for (int i = 0, step = 0; i < STAGES; ++i) {
        if (INPUTS_STAY) {
            const int end = i < STAGES - 1 ? min(step + 1, share.num_steps) : share.num_steps;
#pragma unroll 1
            for (; step < end; ++step) share.copy_inputs(stayed + step * INPUT_BYTES, step);
        } else if (i < share.total_steps()) {
            share.copy_inputs(ring + i * STAGE_BYTES + WEIGHT_BYTES, step);
            if (++step == share.num_steps) step = 0;
        }
        cp_async_commit();
    }

#if NORM_INPUTS
    cp_async_wait<0>();
    block_sync();
    if (share.ranks > 1) cluster_wait();  // every block of the cluster has started, and its inboxes
    norm.normalize(share, stayed);
#endif

    WarpSums own;
    SkinnyFinish<PAIRS, Epilogue> finish(share, merge, epilogue);
    int stage = 0;
    bool ring_is_full = true;
#pragma unroll 1
    for (int tile = share.first_tile; tile < share.num_tiles; tile += share.tile_step) {
        finish.fetch(tile);
        own.clear();
#pragma unroll 1
        for (int step = 0; step < share.num_steps; ++step) {
            if (ring_is_full) {
                cp_async_wait<STAGES - 1>();
            } else {
                cp_async_wait<STAGES - 2>();
            }
            block_sync();  // the step is there, and nobody reads the one before any more
            if (!ring_is_full) {
                if (ahead_tile < share.num_tiles) {
                    unsigned char* to = ring + ahead_stage * STAGE_BYTES;
                    share.copy_weights(to, ahead_tile, ahead_step);
                    if (!INPUTS_STAY) share.copy_inputs(to + WEIGHT_BYTES, ahead_step);
                    go_ahead();
                }
                cp_async_commit();
            }
            ring_is_full = false;
            const unsigned char* from = ring + stage * STAGE_BYTES;
            own.multiply(from, INPUTS_STAY ? stayed + step * INPUT_BYTES : from + WEIGHT_BYTES);
            if (++stage == STAGES) stage = 0;
        }
        if (share.ranks > 1) {
            if (!NORM_INPUTS) cluster_wait();  // all blocks of the cluster have started
            merge.send(own);
            wait_for_inbox(merge.inbox);
        } else {
            merge.send(own);
            block_sync();
        }
        finish.finish(tile);
        // The next tile's sums are stored after another barrier at least: that of its first step.
    }
}

#endif  // SKINNY_ON_TENSOR_CORES
