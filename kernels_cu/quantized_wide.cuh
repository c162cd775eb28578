// Products of up to 64 tokens with packed codes for compute capability 9.0a: products of warpgroups
// (wgmma), whose rows are rows of weights, unpacked in registers, and whose columns are tokens.
//
// Owns the order of a block's work. What is copied and unpacked stands in quantized_wide_parts.cuh with
// the macros; how sums meet, in skinny.cuh.
//
// A block takes one tile of rows and, in a cluster, a part of the inputs. Every warp brings the
// codes of its own strips through a ring of its own: with launches that overlap it is full before
// the kernel in front has ended. The inputs come a chunk of 128 at a time, by the copy engine;
// other warps put their words where the codes have them, into a ring that all warps of codes read,
// and with int4 sum them by group, on tensor cores. Codes become operands as they are, while
// products of those before are at work; the sums of a group are multiplied by its scale and added
// to those before, the sum of its inputs by its offset.
//
// Sums meet where the rings were. So a cluster's blocks wait for each other once before they send: any
// of them needs sums of all others anyway.
//
// A token's sums are added in an order that depends on the number of inputs and the cluster alone: not
// on the batch, the tile or the grid.
#pragma once

#include "quantized_wide_parts.cuh"

#if WIDE_CODES

// Products of all chunks of a block's inputs with a warp's strips. Nothing is at work after it.
template <bool PAIRS>
__device__ __forceinline__ void multiply_codes(
    WarpSums& own, WarpCodes<PAIRS>& codes, CodeBarriers* bars, const unsigned char* inputs,
    const float* input_sums, int num_steps) {
    constexpr int UNITS = CHUNK / UNIT, QUARTERS = UNIT / QUARTER;
    const uint64_t first_inputs = operand(shared_address(inputs), ATOM);
    const float* const first_sums = keep_pointer(input_sums + lane_id() % 4 * 2);
    uint32_t a[2][2 * QUARTERS][4];  // of a unit, and of the one before, which is at work
    float group[TOKENS / 8][4] = {};
    PendingGroup pending;
    RingPlace<OPERANDS> place;
    int stage_before = 0;
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) {
        const uint64_t b = operand_at(first_inputs, place.stage * INPUT_BYTES);
        const float* const chunk_sums = first_sums + place.stage * GROUP_SUMS;
        mbarrier_wait(bars->full + place.stage, place.parity);
        if (step == 0) pending.inputs = chunk_sums;  // times a scale of 0
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
            const unsigned char* const chunk = codes.oldest(m);
            uint4 vector;
            cp_async_wait<STAGES * ROW_TILES - 1>();
            warp_sync();  // other lanes copied scales
#pragma unroll
            for (int unit = 0; unit < UNITS; ++unit) {
                wgmma_wait<1>();  // the registers of the unit before the last are free
#pragma unroll
                for (int q = 0; q < QUARTERS; ++q) {
                    const int quarter = unit * QUARTERS + q;
                    uint32_t pairs[2][4];
                    if (WEIGHT_KIND != 1 || quarter % 2 == 0) {
                        vector = ld_shared_16(chunk + code_vector(quarter) * 512);
                    }
                    hold_vector(vector);
                    wide_operands(vector, quarter, pairs);
#pragma unroll
                    for (int i = 0; i < 8; ++i) a[unit % 2][q * 2 + i / 4][i % 4] = pairs[i / 4][i % 4];
                }
                const bool begins = unit * UNIT % GROUP == 0;
                if (begins) {
                    wgmma_wait<0>();
                    hold_registers(group);
                    pending.add(own.sums[unit > 0 ? m : (m + ROW_TILES - 1) % ROW_TILES], group);
                    hold_registers(group);
                    pending.begin(codes.oldest_scales(m), unit * UNIT / GROUP, chunk_sums);
                    if (m == 0 && unit == 0 && step > 0) {
                        mbarrier_arrive_warp(bars->free + stage_before);  // its sums are read too
                    }
                }
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < 2 * QUARTERS; ++k) {
                    const int input = unit * UNIT + k * 16;
                    CodeWgmma<TOKENS>::registers(
                        group, a[unit % 2][k],
                        operand_at(b, input / HALF * HALF_BYTES + input % HALF * 2),
                        !begins || k > 0);
                }
                wgmma_commit();
            }
            warp_sync();  // all lanes have read it
            codes.bring(m);
        }
        codes.next();
        stage_before = place.stage;
        place.next();
    }
    wgmma_wait<0>();
    hold_registers(group);
    pending.add(own.sums[ROW_TILES - 1], group);
}

// The whole kernel.
template <bool PAIRS, typename Epilogue>
__device__ __forceinline__ void run_wide_codes(
    const SkinnyMatrix& matrix, const TensorMap* map, const PackedCodes& packed,
    const Epilogue& epilogue) {
    const SkinnyShare<PAIRS> share(matrix);
    // Inboxes lie in the same place in all blocks of a cluster: first.
    CodeBarriers* const bars = reinterpret_cast<CodeBarriers*>(dynamic_shared());
    const SkinnyMerge merge = {share.ranks, share.rank, (matrix.num_rows + 1) / 2, &bars->inbox};
    const uint32_t misplaced = shared_address(dynamic_shared() + INBOX_HEAD) % ATOM;
    unsigned char* const inputs = dynamic_shared() + INBOX_HEAD + (ATOM - misplaced) % ATOM;
    const int warp = shuffle(warp_id(), 0);  // known to be the same in all lanes

    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 0; i < OPERANDS; ++i) {
            mbarrier_init(bars->full + i, FETCH_WARPS * WARP_ARRIVALS);
            mbarrier_init(bars->free + i, WARPS_N * WARP_ARRIVALS);
        }
#pragma unroll 1
        for (int i = 0; i < INPUTS_AHEAD; ++i) {
            mbarrier_init(bars->landed + i, 1);
            mbarrier_init(bars->taken + i, FETCH_WARPS * WARP_ARRIVALS);
        }
        mbarrier_init_fence();
        if (share.ranks > 1) make_inbox(merge.inbox, merge.expected_bytes());
    }
    unsigned char* const arrived = inputs + OPERANDS * INPUT_BYTES;
    float* const input_sums = reinterpret_cast<float*>(inputs + INPUT_STAGES * INPUT_BYTES);
    WarpCodes<PAIRS> codes(
        share, packed, reinterpret_cast<unsigned char*>(input_sums + OPERANDS * GROUP_SUMS));
    if (warp < WARPS_N) {
#pragma unroll 1
        for (int i = 0; i < STAGES; ++i) {
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) codes.bring(m);
            codes.next();
        }
    }
    if (threadIdx.x == BLOCK_THREADS) prefetch_tensor_map(map);
    block_sync();  // to the barriers being made
    grid_dependency_wait();

    if (warp >= WARPS_N) {  // --------------------------------------------------- warps that fetch
        const InputCopies<PAIRS> copies = {
            share, map, bars, inputs, arrived, input_sums, warp - WARPS_N};
        copies.run();
        warp_sync();
        if (share.ranks > 1) {  // where every thread comes to
            cluster_arrive();
            cluster_wait();
            wait_for_inbox(merge.inbox);  // others store to this block until then
        }
        return;
    }

    // ---------------------------------------------------------------- warpgroups that multiply
    WarpSums own;
    own.clear();
    multiply_codes(own, codes, bars, inputs, input_sums, share.num_steps);

    const int tile = share.first_tile;
    SkinnyFinish<PAIRS, Epilogue> finish(share, merge, epilogue);
    finish.fetch(tile);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < TOKENS / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) own.sums[m][n][i] *= packed.unit;  // exact
        }
    }
    warp_sync();
    if (share.ranks > 1) {
        cluster_arrive();
        cluster_wait();  // nobody reads a ring any more, and all inboxes are there
        merge.send(own);
        wait_for_inbox(merge.inbox);
    } else {
        barrier_sync(1, BLOCK_THREADS);  // nobody reads a ring any more
        merge.send(own);
        barrier_sync(1, BLOCK_THREADS);
    }
    finish.finish(tile);
}

#endif  // WIDE_CODES
