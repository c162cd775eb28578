// Attention of ragged queries (a chunk and what lies before it) straight from the paged cache, for
// compute capability 9.0a: products of warpgroups (wgmma) on tiles that the copy engine brings
// (FlashAttention-3: Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao 2024). Blocks stay and take one
// tile of rows after another; two warps fetch, warpgroups compute in turns: one's softmax runs
// while another's products do. A tile's last products start together with the next one's first.
//
// HEAD_SIZE      64 or 128
// WARPGROUPS     that compute, 64 rows each
// KEY_TILE       keys of a step, 64 or 128
// STAGES         steps of keys and of values in shared memory, from 2
// L2_BYTES       keys and values that blocks at work together may cover: heads are taken in
//                sections of that size, as what is in L2 is read from there
// nanocupy/ops/launch_attention_prefill.py chooses them.
#include "attention_prefill_hopper.cuh"

// attention_prefill_wgmma: causal attention of ragged queries over the paged cache, on 9.0a
// grid (as many as multiprocessors, or fewer), block (128 * (WARPGROUPS + 1)), shared 1024 +
//     QUERY_STAGES * QUERY_BYTES + 2 * STAGES * STAGE_BYTES; R = H / G, a tile has
//     rows = 64 * WARPGROUPS / R * R
// queries: a map of q [T, H, d] scalar_t as [d / 64, T, H, 64] with a box [1, rows / R, R, 64];
// keys, values: maps of the caches [N, G, P, d] as [N * G, P / 8, d / 64, 8, 64] with a box [1,
// min(P, KEY_TILE) / 8, d / 64, 8, 64], all swizzled by 128 bytes; query_starts [B + 1] int32;
// kv_lens [B] int32, at least the sequence's queries; block_tables [B, M] int32; out [T, H, d]
// scalar_t, aligned to 16; counter [1] uint32, 0 before and after; scale above 0; B, H, G, P, M
// from 1; R at most 64 * WARPGROUPS; P a multiple of 8 that divides KEY_TILE or is a multiple of
// it; T * R below 2**31
// REF: numpy_ops.attention
// COST: bytes 2 (2 T H d + 2 d G sum of kv_lens) at least; flops 4 H d sum over queries of keys
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_prefill_wgmma(
    const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys,
    const __grid_constant__ TensorMap values, const int32_t* query_starts, const int32_t* kv_lens,
    const int32_t* block_tables, scalar_t* out, uint32_t* counter, float scale,
    int32_t num_sequences, int32_t num_heads, int32_t num_kv_heads, int32_t block_size,
    int32_t num_columns) {
#if WGMMA_BUILD
    __shared__ Barriers bars;
    __shared__ Work works[QUERY_STAGES];
    const uint32_t misplaced = shared_address(dynamic_shared()) % ATOM;
    unsigned char* const query_rows = dynamic_shared() + (ATOM - misplaced) % ATOM;
    unsigned char* const key_stages = query_rows + QUERY_STAGES * QUERY_BYTES;
    unsigned char* const value_stages = key_stages + STAGES * STAGE_BYTES;
    const int lane = lane_id();
    const int warp = shuffle(warp_id(), 0);  // known to be the same in all lanes
    const int group = num_heads / num_kv_heads;
    const int tile_rows = MOST_ROWS / group * group;

    grid_dependency_launch();
    if (threadIdx.x == 0) {
        prefetch_tensor_map(&queries);
        prefetch_tensor_map(&keys);
        prefetch_tensor_map(&values);
        mbarrier_init(&bars.end_of_values, 1);
        for (int i = 0; i < QUERY_STAGES; ++i) {
            mbarrier_init(&bars.work_full[i], 1);
            mbarrier_init(&bars.queries_full[i], 1);
            mbarrier_init(&bars.queries_free[i], (WARPS + 1) * WARP_ARRIVALS);
        }
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(&bars.keys_full[i], 1);
            mbarrier_init(&bars.keys_free[i], WARPS);
            mbarrier_init(&bars.values_full[i], 1);
            mbarrier_init(&bars.values_free[i], WARPS);
        }
        mbarrier_init_fence();
    }
    block_sync();
    grid_dependency_wait();

    if (warp < 4) {  // ------------------------------------------------------- warps that fetch
        give_registers<FETCH_REGISTERS>();
        Copies copies;
        copies.keys = min(block_size, KEY_TILE);
        copies.count = KEY_TILE / copies.keys;
        Place<STAGES> place;
        Place<QUERY_STAGES> query_place;
        uint32_t end_parity = 0;
        if (warp == 1) {  // values
            while (true) {
                mbarrier_wait(&bars.work_full[query_place.stage], query_place.parity);
                const Work& work = works[query_place.stage];
                if (work.tile.num_keys == 0) return;
                fetch<true>(
                    &values, work, block_tables, num_columns, num_kv_heads, block_size, group,
                    copies, value_stages, bars.values_full, bars.values_free, &bars.end_of_values,
                    place, end_parity);
                mbarrier_arrive_warp(&bars.queries_free[query_place.stage]);
                query_place.next();
            }
        }
        if (warp > 0) return;

        // Work, queries and keys.
        const int num_queries = query_starts[num_sequences];
        int num_slots = 0, longest = 1;
        if (num_queries > 0) {
            const int last = last_that_starts_before(query_starts, num_sequences, num_queries);
            num_slots = num_queries * group / tile_rows + last + 1;
            for (int i = lane; i <= last; i += 32) longest = max(longest, kv_lens[i]);
            longest = warp_max_int(longest);
        }
        // Heads in sections whose keys and values fit L2, all of about a size, as the last one's
        // short tiles must even out what the blocks have had; slots in a section, heads of a slot.
        const int fitting = max(1, min(L2_BYTES / (HEAD_SIZE * 4) / longest, num_kv_heads));
        const int num_sections = (num_kv_heads + fitting - 1) / fitting;
        const int section_heads = (num_kv_heads + num_sections - 1) / num_sections;
        const int num_tiles = num_slots * num_kv_heads;

        int index = blockIdx.x;
        while (index < num_tiles) {
            int next_index = 0;
            if (lane == 0) next_index = gridDim.x + atomic_count_to(counter, num_tiles - 1);
            const int section = index / (section_heads * num_slots);
            const int within = index - section * section_heads * num_slots;
            const int heads_here = min(section_heads, num_kv_heads - section * section_heads);
            const int slot = within / heads_here;
            const int kv_head = section * section_heads + within - slot * heads_here;
            RowTile tile;
            if (find_tile(query_starts, kv_lens, num_sequences, group, tile_rows, slot, tile)) {
                Work& work = works[query_place.stage];
                mbarrier_wait(&bars.queries_free[query_place.stage], query_place.parity ^ 1);
                if (lane == 0) {
                    work.tile = tile;
                    work.kv_head = kv_head;
                    mbarrier_arrive(&bars.work_full[query_place.stage]);
                    uint64_t* full = &bars.queries_full[query_place.stage];
                    mbarrier_arrive_expecting(full, tile_rows * HEAD_SIZE * 2);
                    for (int i = 0; i < HALVES; ++i) {
                        copy_box(
                            shared_address(query_rows) + query_place.stage * QUERY_BYTES +
                                i * MOST_ROWS * 128,
                            &queries, full, 0, kv_head * group,
                            tile.first_token + tile.first_row / group, i);
                    }
                }
                warp_sync();
                fetch<false>(
                    &keys, work, block_tables, num_columns, num_kv_heads, block_size, group,
                    copies, key_stages, bars.keys_full, bars.keys_free, nullptr, place, end_parity);
                query_place.next();
            }
            index = shuffle(next_index, 0);
        }
        mbarrier_wait(&bars.queries_free[query_place.stage], query_place.parity ^ 1);
        if (lane == 0) {
            works[query_place.stage].tile.num_keys = 0;
            mbarrier_arrive(&bars.work_full[query_place.stage]);
            mbarrier_arrive(&bars.queries_full[query_place.stage]);
        }
        return;
    }

    // ---------------------------------------------------------------- warpgroups that compute
    take_registers<COMPUTE_REGISTERS>();
    const int warpgroup = warp / 4 - 1;
    const int own_turn = 1 + warpgroup, next_turn = 1 + (warpgroup + 1) % WARPGROUPS;
    if (warpgroup == 0) barrier_arrive(own_turn, 256);  // begins
    const float exponent_scale = scale * LOG2_E;
    const int lane_row = warpgroup * 64 + warp % 4 * 16 + lane / 4;  // of the tile; and that + 8
    const uint64_t first_query_operand =
        operand(shared_address(query_rows) + warpgroup * 64 * 128, ATOM);
    const uint64_t key_operand = operand(shared_address(key_stages), HALVES * ATOM);
    const uint64_t value_operand = operand(shared_address(value_stages), HALVES * ATOM, ATOM);

    Place<STAGES> place;
    Place<QUERY_STAGES> query_place;
    float scores[KEY_GROUPS][4], sums[HEAD_GROUPS][4];
    uint32_t weights[KEY_TILE / 16][4];
    Rows rows;
    int j, limit[2];   // the step at work, and what it must mask
    int all_seen = 0;  // steps below this one need no mask: the first row sees all their keys

    const auto begin_tile = [&](const Work& work) {
        const int first_row = work.tile.first_row, first_position = work.tile.first_position;
        j = (work.tile.num_keys - 1) / KEY_TILE;
        all_seen = (first_position + (first_row + warpgroup * 64) / group + 1) / KEY_TILE;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            limit[h] = first_position + (first_row + lane_row + 8 * h) / group - lane % 4 * 2 -
                       j * KEY_TILE;
            rows.max[h] = -infinity();
            rows.sum[h] = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < HEAD_GROUPS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
        }
    };

    mbarrier_wait(&bars.queries_full[0], 0);
    if (works[0].tile.num_keys == 0) return;
    mbarrier_wait(&bars.keys_full[0], 0);
    wgmma_fence();
    hold_registers(scores);
    start_scores(scores, first_query_operand, key_operand);
    begin_tile(works[0]);
    wgmma_wait<0>();
    hold_registers(scores);
    if (lane == 0) mbarrier_arrive(&bars.keys_free[0]);
    raise_maxima<true>(scores, rows, exponent_scale, limit);
    weigh(scores, rows, exponent_scale);
    round_weights(scores, weights);

    // A turn starts the scores of a step, and the sums of the step before; where that was a tile's
    // last, its results leave.
    while (true) {
        const bool ends = j == 0;
        Place<QUERY_STAGES> scored = query_place;
        if (ends) {
            scored.next();
            mbarrier_wait(&bars.queries_full[scored.stage], scored.parity);
            if (works[scored.stage].tile.num_keys == 0) break;
        }
        const Place<STAGES> before = place;
        place.next();
        mbarrier_wait(&bars.keys_full[place.stage], place.parity);
        barrier_sync(own_turn, 256);
        hold_registers(scores);
        hold_registers(sums);
        hold_registers(weights);
        wgmma_fence();
        start_scores(
            scores, operand_at(first_query_operand, scored.stage * QUERY_BYTES),
            operand_at(key_operand, place.stage * STAGE_BYTES));
        mbarrier_wait(&bars.values_full[before.stage], before.parity);
        wgmma_fence();
        start_sums(sums, weights, operand_at(value_operand, before.stage * STAGE_BYTES));
        barrier_arrive(next_turn, 256);
        if (ends) {
            wgmma_wait<0>();
            hold_registers(scores);
            hold_registers(sums);
            hold_registers(weights);
            store_results(
                sums, rows, works[query_place.stage], lane_row, tile_rows, group, num_heads, out);
            mbarrier_arrive_warp(&bars.queries_free[query_place.stage]);
            query_place = scored;
            begin_tile(works[query_place.stage]);
        } else {
            wgmma_wait<1>();
            hold_registers(scores);
            --j;
            limit[0] += KEY_TILE;
            limit[1] += KEY_TILE;
        }
        if (lane == 0) mbarrier_arrive(&bars.keys_free[place.stage]);
        if (ends || j >= all_seen) {
            raise_maxima<true>(scores, rows, exponent_scale, limit);
        } else {
            raise_maxima<false>(scores, rows, exponent_scale, limit);
        }
        // The sums are done by now. Waiting for them here, not behind the exponentials, lets these,
        // few a cycle, and the rounding of weights, which the products read, go side by side.
        wgmma_wait<0>();
        hold_registers(sums);
        hold_registers(weights);
        if (lane == 0) mbarrier_arrive(&bars.values_free[before.stage]);
        scale_sums(sums, rows);
        weigh(scores, rows, exponent_scale);
        round_weights(scores, weights);
    }

    mbarrier_wait(&bars.values_full[place.stage], place.parity);
    hold_registers(sums);
    hold_registers(weights);
    wgmma_fence();
    start_sums(sums, weights, operand_at(value_operand, place.stage * STAGE_BYTES));
    wgmma_wait<0>();
    hold_registers(sums);
    store_results(
        sums, rows, works[query_place.stage], lane_row, tile_rows, group, num_heads, out);
#endif  // WGMMA_BUILD
}
