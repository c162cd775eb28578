// Products of 9 to 64 tokens with packed codes, whose inputs have no room in shared memory whole: they
// come through the ring beside the codes, from L2, a step of the inputs at a time.
//
// Owns the order of a block's work. What a warp copies and multiplies stands in
// quantized_stream_parts.cuh with the macros; whose a tile is, and how sums meet, in skinny.cuh.
//
// A block takes one tile of rows and, in a cluster, a part of its steps. All its warps read the same
// inputs, which is why a tile has as many rows as registers allow: 32 tokens are 64 bytes for each
// column of it, 256 rows of int4 are 136. Codes become operands once, for all tokens.
//
// With int4 a step needs the sums of its inputs, by group. They are computed, on tensor cores, one
// step before, so that no warp waits for them: inputs are copied one step further ahead than codes.
//
// Sums meet where the ring was. So a cluster's blocks wait for each other once before they send: any
// of them needs sums of all others anyway.
//
// A token's sums are added in an order that depends on the weights' shape and on OUT_TILE, WARPS_K
// and the cluster alone: not on the batch or the grid.
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
    unsigned char* const group_sums = dynamic_shared() + INBOX_HEAD;
    unsigned char* const input_ring = group_sums + 2 * GROUP_SUM_BYTES;
    const int num_steps = share.num_steps;
    const CodeStream<PAIRS> codes_of(share, codes, input_ring + INPUT_SLOTS * INPUT_BYTES);
    const InputStream inputs_of = {matrix, share.first_step, num_steps, input_ring};

#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) {
        codes_of.bring(i, i * STEP_CODE_BYTES);
        cp_async_commit();
    }
    if (share.ranks > 1) {
        if (threadIdx.x == 0) make_inbox(merge.inbox, merge.expected_bytes());
        warp_sync();
    }
    grid_dependency_wait();

    // As many groups again, in the order of their use.
#pragma unroll 1
    for (int i = 0, ahead = 0; i < STAGES; ++i) {
#pragma unroll 1
        for (; ahead <= i + INPUT_LEAD; ++ahead) inputs_of.bring(ahead, ahead * INPUT_BYTES);
        cp_async_commit();
    }

    WarpSums own;
    own.clear();
    const unsigned char* const own_inputs = keep_pointer(input_ring + StepProduct::place_of_lane());
    float* const own_group_sums = reinterpret_cast<float*>(group_sums);
    if (INPUT_LEAD) {
        cp_async_wait<STAGES - 1>();
        block_sync();  // the first inputs are there
        StepProduct::sum_inputs(own_inputs, own_group_sums);
    }
    int codes_place = 0, inputs_place = 0;  // of this step, in their rings
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
        if (step == 0) {
            cp_async_wait<STAGES - 1>();
        } else {
            cp_async_wait<STAGES - 2>();
        }
        block_sync();  // the step is there, and nobody reads the one before any more
        if (step > 0) {
            codes_of.bring(
                step + STAGES - 1, slot_before<STAGES, STEP_CODE_BYTES>(codes_place));
            inputs_of.bring(
                step + STAGES - 1 + INPUT_LEAD,
                slot_before<INPUT_SLOTS, INPUT_BYTES>(inputs_place));
            cp_async_commit();
        }
        const int next_inputs = slot_after<INPUT_SLOTS, INPUT_BYTES>(inputs_place);
        if (INPUT_LEAD && step + 1 < num_steps) {
            StepProduct::sum_inputs(
                own_inputs + next_inputs, own_group_sums + (step + 1) % 2 * GROUP_SUMS);
        }
        if (WARPS_K == 1 || step < codes_of.num_steps) {
            StepProduct::multiply(
                own, codes_of.ring + codes_place, own_inputs + inputs_place,
                own_group_sums + step % 2 * GROUP_SUMS);
        }
        codes_place = slot_after<STAGES, STEP_CODE_BYTES>(codes_place);
        inputs_place = next_inputs;
    }

    const int tile = share.first_tile;
    SkinnyFinish<PAIRS, Epilogue> finish(share, merge, epilogue);
    finish.fetch(tile);
    StepProduct::scale(own, codes.unit);  // exact: it is a power of two
    block_sync();                         // nobody reads the ring any more
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
