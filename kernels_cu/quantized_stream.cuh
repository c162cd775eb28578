// Products of 9 to 32 tokens with packed codes: codes stream past inputs that lie in shared memory
// whole, each warp's at its own pace.
//
// Owns the order of a block's work. What a warp copies and multiplies stands in
// quantized_stream_parts.cuh with the macros; how sums meet, in skinny.cuh.
//
// A block takes one tile of rows and, in a cluster, a part of the inputs, of as many chunks as have
// room. Every warp has strips of its own, chunks of these in a ring of its own and their sums in
// registers, from the first chunk to the last: nothing but the arrival of inputs, in INPUT_PARTS
// parts, makes warps wait for each other, so that one's products hide another's latencies.
//
// With int4 the sums of the inputs, by group, are computed once, on tensor cores, when a part is there.
//
// Sums meet where the inputs were. So a cluster's blocks wait for each other once before they send: any
// of them needs sums of all others anyway.
//
// A token's sums are added in an order that depends on the number of inputs, WARPS_K and the cluster
// alone: not on the batch, the tile or the grid.
#pragma once

#include "quantized_stream_parts.cuh"

#if SKINNY_ON_TENSOR_CORES

// The whole kernel.
template <bool PAIRS, typename Epilogue>
__device__ __forceinline__ void run_stream(
    const SkinnyMatrix& matrix, const PackedCodes& codes, const Epilogue& epilogue) {
    const SkinnyShare<PAIRS> share(matrix);
    // Inboxes lie in the same place in all blocks of a cluster: first.
    const SkinnyMerge merge = {
        share.ranks, share.rank, (matrix.num_rows + 1) / 2,
        reinterpret_cast<uint64_t*>(dynamic_shared())};
    const int num_chunks = share.num_steps;
    unsigned char* const inputs = dynamic_shared() + INBOX_HEAD;
    float* const group_sums = reinterpret_cast<float*>(inputs + num_chunks * INPUT_BYTES);
    CodeStream<PAIRS> stream(
        share, codes, reinterpret_cast<unsigned char*>(group_sums + num_chunks * GROUP_SUMS));

#pragma unroll 1
    for (int i = 0; i < EARLY_STAGES; ++i) stream.bring();
    if (share.ranks > 1) {
        if (threadIdx.x == 0) make_inbox(merge.inbox, merge.expected_bytes());
        warp_sync();
    }
    grid_dependency_wait();
    const int num_turns = (num_chunks + WARPS_K - 1) / WARPS_K;  // of chunks for each warp
    const int part_turns = (num_turns + INPUT_PARTS - 1) / INPUT_PARTS;
#pragma unroll 1
    for (int part = 0; part < INPUT_PARTS; ++part) {
        const int first = part * part_turns * WARPS_K;
        bring_inputs(share, inputs, first, min(first + part_turns * WARPS_K, num_chunks));
        cp_async_commit();
    }
#pragma unroll 1
    for (int i = EARLY_STAGES; i < STAGES; ++i) stream.bring();

    WarpSums own;
    own.clear();
    const int lane_place = ChunkProduct::place_of_lane();
    const unsigned char* const first_inputs =
        keep_pointer(inputs + WarpSums::warp_k() * INPUT_BYTES + lane_place);
    const float* const first_sums =
        group_sums + WarpSums::warp_k() * GROUP_SUMS + lane_id() % 4 * 2;
    const unsigned char* own_inputs = first_inputs;
    const float* own_group_sums = first_sums;
    const auto multiply = [&](int pass) {
        warp_sync();  // other lanes copied some of it
        ChunkProduct::multiply(own, pass * STRIPS, stream.oldest(), own_inputs, own_group_sums);
        own_inputs += WARPS_K * INPUT_BYTES;
        own_group_sums += WARPS_K * GROUP_SUMS;
        warp_sync();  // all lanes have read it
    };

    const int own_turns = stream.num_steps;
    // Every turn adds one group of copies. The first stages came before the inputs.
#pragma unroll 1
    for (int part = 0, turn = 0; turn < num_turns; ++part) {
        wait_for_groups<INPUT_PARTS + STAGES>(
            INPUT_PARTS - 1 - part + STAGES - EARLY_STAGES + turn);
        block_sync();  // this part of the inputs is there
        const int end = min(turn + part_turns, num_turns);
        if (GROUP_SUMS > 0) {
            const int first_tile = turn * WARPS_K * TOKEN_TILES;
            const int end_tile = min(end * WARPS_K, num_chunks) * TOKEN_TILES;
#pragma unroll 1
            for (int i = first_tile + warp_id(); i < end_tile; i += WARPS_N * WARPS_K) {
                const int chunk = i / TOKEN_TILES;
                ChunkProduct::sum_inputs(
                    inputs + chunk * INPUT_BYTES + lane_place, i % TOKEN_TILES,
                    group_sums + chunk * GROUP_SUMS);
            }
            block_sync();  // and its sums
        }
#pragma unroll 1
        for (; turn < end; ++turn) {
            if (turn < own_turns) {
                if (turn >= EARLY_STAGES) cp_async_wait<STAGES - 1>();
                multiply(0);
                stream.bring();
            } else {
                cp_async_commit();
            }
        }
    }
#pragma unroll
    for (int pass = 1; pass < PASSES; ++pass) {
        own_inputs = first_inputs;
        own_group_sums = first_sums;
#pragma unroll 1
        for (int turn = 0; turn < own_turns; ++turn) {
            cp_async_wait<STAGES - 1>();
            multiply(pass);
            stream.bring();
        }
    }

    const int tile = share.first_tile;
    SkinnyFinish<PAIRS, Epilogue> finish(share, merge, epilogue);
    finish.fetch(tile);
    ChunkProduct::scale(own, codes.unit);  // exact: it is a power of two
    block_sync();                          // nobody reads the inputs any more
    if (share.ranks > 1) {
        cluster_arrive();
        cluster_wait();  // nor in the other blocks, whose inboxes are there
        merge.send(own);
        wait_for_inbox(merge.inbox);
    } else {
        merge.send(own);
        block_sync();
    }
    finish.finish(tile);
}

#endif  // SKINNY_ON_TENSOR_CORES
