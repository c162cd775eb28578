// Attention of ragged queries (a chunk and what lies before it) straight from the paged cache, for
// compute capability 9.0a: products of warpgroups (wgmma) on tiles that the copy engine brings
// (FlashAttention-3: Shah, Bikshandi, Zhang, Thakkar, Ramani, Dao 2024). Blocks stay and take one
// tile of rows after another; one warp of a block fetches, the other warpgroups compute in turns:
// one's softmax runs while another's products do.
//
// HEAD_SIZE      64 or 128
// WARPGROUPS     that compute, 64 rows each
// KEY_TILE       keys of a step, 64 or 128
// STAGES         steps of keys and of values in shared memory, from 2
// L2_BYTES       keys and values that blocks at work together may cover: heads are taken in
//                sections of that size, as what is in L2 is read from there
// nanocupy/ops/launch_attention_prefill.py chooses them.
#include "attention_prefill.cuh"
#include "hopper.cuh"

// Whether this build has attention_prefill_wgmma; else its entry is empty, not to be launched.
#define WGMMA_BUILD (HAS_WGMMA && SCALAR != 0 && CACHE == SCALAR && \
                     (HEAD_SIZE == 64 || HEAD_SIZE == 128))

#ifndef WARPGROUPS
#define WARPGROUPS 2
#endif
#ifndef KEY_TILE
#define KEY_TILE 128
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef L2_BYTES
#define L2_BYTES (24 << 20)
#endif

constexpr int THREADS = (WARPGROUPS + 1) * 128;

#if WGMMA_BUILD

constexpr int MOST_ROWS = WARPGROUPS * 64;  // of a tile
constexpr int HALVES = HEAD_SIZE / 64;      // columns of a head in shared memory: 128 bytes each
constexpr int ATOM = 1024;                  // bytes of 8 rows of one of them
constexpr int QUERY_BYTES = MOST_ROWS * HEAD_SIZE * 2;
constexpr int STAGE_BYTES = KEY_TILE * HEAD_SIZE * 2;
constexpr int KEY_GROUPS = KEY_TILE / 8, HEAD_GROUPS = HEAD_SIZE / 8;
constexpr int WARPS = WARPGROUPS * 4;  // that compute

// Registers a thread: what all warpgroups have together is what the launch gave them.
constexpr int FETCH_REGISTERS = WARPGROUPS == 2 ? 56 : 32;
constexpr int COMPUTE_REGISTERS = WARPGROUPS == 2 ? 224 : 160;

// What a block works on, as the fetching warp tells the others.
struct Work {
    int first_token, first_position, first_row, num_rows;  // as RowTile has them
    int num_keys;                                          // 0: there is no more work
    int kv_head;
};

// Shared memory: queries [HALVES][MOST_ROWS][64], then stages of keys, then stages of values, each
// [KEY_TILE / 8][HALVES][8][64], all swizzled.
struct Barriers {
    uint64_t queries_full, queries_free;
    uint64_t keys_full[STAGES], keys_free[STAGES];
    uint64_t values_full[STAGES], values_free[STAGES];
    uint64_t end_of_values;  // of the values that must be cleared behind the sequence's end
};

// A place in a ring of stages, and the parity of its round.
struct Place {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// Zeros in place of the rows of values from `row` up to `end`, which may hold anything; weights of
// 0 would not hide a NaN. Every lane of the warp must come.
__device__ __forceinline__ void clear_rows(unsigned char* values, int row, int end) {
    for (int i = lane_id(); i < (end - row) * HALVES * 8; i += 32) {
        const int r = row + i / (HALVES * 8), piece = i % (HALVES * 8);
        unsigned char* atom = values + (r / 8 * HALVES + piece / 8) * ATOM;
        *reinterpret_cast<uint4*>(atom + (r % 8 * 8 + piece % 8) * 16) = make_uint4(0, 0, 0, 0);
    }
    shared_to_async_fence();
    warp_sync();
}

// The last of 32 or fewer lanes' maxima, in all of them.
__device__ __forceinline__ int warp_max_int(int x) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x = max(x, shuffle_xor(x, lanes));
    return x;
}

// The last sequence that starts before `end`, which the first does.
__device__ __forceinline__ int last_that_starts_before(
    const int32_t* query_starts, int num_sequences, int end) {
    int sequence = 0, count = num_sequences;
    while (count > 1) {
        const int step = (count + 31) / 32, index = lane_id() * step;
        const bool before = index < count && query_starts[sequence + min(index, count - 1)] < end;
        const int skipped = (count_bits(warp_ballot(before)) - 1) * step;
        sequence += skipped;
        count = min(step, count - skipped);
    }
    return sequence;
}

// Mask, where MASKED, and turn scores into weights; factor: what sums so far must be scaled by.
// limit: of the lane's two rows, the last column seen, counted from the lane's first.
template <bool MASKED>
__device__ __forceinline__ void weigh(
    float (&scores)[KEY_GROUPS][4], float (&row_max)[2], float (&row_sum)[2], float (&factor)[2],
    float exponent_scale, const int (&limit)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float largest = row_max[h];
#pragma unroll
        for (int n = 0; n < KEY_GROUPS; ++n) {
#pragma unroll
            for (int i = 2 * h; i < 2 * h + 2; ++i) {
                if (MASKED && n * 8 + i % 2 > limit[h]) scores[n][i] = -infinity();
                largest = fmaxf(largest, scores[n][i]);
            }
        }
        largest = warp_max<4>(largest);
        // A row that has seen no key yet has no maximum to subtract.
        const float shift = MASKED && largest == -infinity() ? 0.0f : largest * exponent_scale;
        factor[h] = exp2_approx(row_max[h] * exponent_scale - shift);
        row_max[h] = largest;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < KEY_GROUPS; ++n) {
#pragma unroll
            for (int i = 2 * h; i < 2 * h + 2; ++i) {
                scores[n][i] = exp2_approx(scores[n][i] * exponent_scale - shift);
                sum += scores[n][i];
            }
        }
        row_sum[h] = row_sum[h] * factor[h] + sum;
    }
}

__device__ __forceinline__ void round_weights(
    const float (&scores)[KEY_GROUPS][4], uint32_t (&weights)[KEY_TILE / 16][4]) {
#pragma unroll
    for (int k = 0; k < KEY_TILE / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float(&pair)[4] = scores[2 * k + i / 2];
            weights[k][i] = pack_two<scalar_t>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
    }
}

// Start scores = queries @ keys.T.
__device__ __forceinline__ void start_scores(
    float (&scores)[KEY_GROUPS][4], uint64_t queries, uint64_t keys) {
#pragma unroll
    for (int k = 0; k < HEAD_SIZE / 16; ++k) {
        Wgmma<scalar_t, KEY_TILE>::shared(
            scores, operand_at(queries, k / 4 * MOST_ROWS * 128 + k % 4 * 32),
            operand_at(keys, k / 4 * ATOM + k % 4 * 32), k > 0);
    }
    wgmma_commit();
}

// Start sums += weights @ values.
__device__ __forceinline__ void start_sums(
    float (&sums)[HEAD_GROUPS][4], const uint32_t (&weights)[KEY_TILE / 16][4], uint64_t values) {
#pragma unroll
    for (int k = 0; k < KEY_TILE / 16; ++k) {
        Wgmma<scalar_t, HEAD_SIZE>::registers(
            sums, weights[k], operand_at(values, k * 2 * HALVES * ATOM), 1);
    }
    wgmma_commit();
}

// A 4 x 4 transpose within each four lanes: a[i] of lane t becomes lane i's a[t].
__device__ __forceinline__ void transpose_four(uint32_t (&a)[4]) {
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        const uint32_t got = shuffle_xor(lane & 1 ? a[i] : a[i + 1], 1);
        if (lane & 1) a[i] = got;
        else a[i + 1] = got;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const uint32_t got = shuffle_xor(lane & 2 ? a[i] : a[i + 2], 2);
        if (lane & 2) a[i] = got;
        else a[i + 2] = got;
    }
}

#endif  // WGMMA_BUILD

// attention_prefill_wgmma: causal attention of ragged queries over the paged cache, on 9.0a
// grid (as many as multiprocessors, or fewer), block (128 * (WARPGROUPS + 1)), shared 1024 +
//     QUERY_BYTES + 2 * STAGES * STAGE_BYTES, R = H / G, of a tile rows = 64 * WARPGROUPS / R * R
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
    __shared__ Work work;
    const uint32_t misplaced = shared_address(dynamic_shared()) % ATOM;
    unsigned char* const query_rows = dynamic_shared() + (ATOM - misplaced) % ATOM;
    unsigned char* const key_stages = query_rows + QUERY_BYTES;
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
        mbarrier_init(&bars.queries_full, 1);
        mbarrier_init(&bars.queries_free, WARPS);
        mbarrier_init(&bars.end_of_values, 1);
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

    if (warp < 4) {  // -------------------------------------------------- the warp that fetches
        give_registers<FETCH_REGISTERS>();
        if (warp > 0) return;
        const int num_queries = query_starts[num_sequences];
        int num_slots = 0, longest = 1;
        if (num_queries > 0) {
            const int last = last_that_starts_before(query_starts, num_sequences, num_queries);
            num_slots = num_queries * group / tile_rows + last + 1;
            for (int i = lane; i <= last; i += 32) longest = max(longest, kv_lens[i]);
            longest = warp_max_int(longest);
        }
        // Heads in sections whose keys and values fit L2; slots in a section, heads of a slot.
        const int fitting = L2_BYTES / (HEAD_SIZE * 4) / longest;
        const int section_heads = max(1, min(fitting, num_kv_heads));
        const int num_tiles = num_slots * num_kv_heads;
        const int copy_keys = min(block_size, KEY_TILE);  // that one copy brings
        const int num_copies = KEY_TILE / copy_keys;

        Place place;
        uint32_t query_parity = 1, end_parity = 0;
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
            if (!find_tile(query_starts, kv_lens, num_sequences, group, tile_rows, slot, tile)) {
                index = shuffle(next_index, 0);
                continue;
            }

            mbarrier_wait(&bars.queries_free, query_parity);
            query_parity ^= 1;
            if (lane == 0) {
                work.first_token = tile.first_token;
                work.first_position = tile.first_position;
                work.first_row = tile.first_row;
                work.num_rows = tile.num_rows;
                work.num_keys = tile.num_keys;
                work.kv_head = kv_head;
                mbarrier_arrive_expecting(&bars.queries_full, tile_rows * HEAD_SIZE * 2);
                for (int i = 0; i < HALVES; ++i) {
                    copy_box(
                        shared_address(query_rows) + i * MOST_ROWS * 128, &queries,
                        &bars.queries_full, 0, kv_head * group,
                        tile.first_token + tile.first_row / group, i);
                }
            }

            // Keys from the last to the first, values one step behind. Each lane brings a block's.
            const int32_t* table = block_tables + static_cast<int64_t>(tile.sequence) * num_columns;
            const int num_key_tiles = (tile.num_keys + KEY_TILE - 1) / KEY_TILE;
            const int end = tile.first_position + tile.num_rows / group;  // of the sequence's keys
            Place value_place = place;
            int value_row = 0, value_group = 0;
            int position = (num_key_tiles - 1) * KEY_TILE + lane * copy_keys;
            // Rows nobody sees are zeros, not looked up: their column of the table may hold anything.
            int row = lane < num_copies && position < tile.num_keys
                          ? table[position / block_size] * num_kv_heads + kv_head
                          : -1;
            for (int j = num_key_tiles - 1; j >= -1; --j) {
                const int key_row = row;
                const int key_group = position % block_size / 8;
                const uint32_t offset = lane * copy_keys * HEAD_SIZE * 2;
                if (j >= 0) {
                    position -= KEY_TILE;
                    if (j > 0 && lane < num_copies) {
                        row = table[position / block_size] * num_kv_heads + kv_head;
                    }
                    uint64_t* full = &bars.keys_full[place.stage];
                    mbarrier_wait(&bars.keys_free[place.stage], place.parity ^ 1);
                    if (lane == 0) mbarrier_arrive_expecting(full, STAGE_BYTES);
                    warp_sync();
                    if (lane < num_copies) {
                        copy_box(
                            shared_address(key_stages) + place.stage * STAGE_BYTES + offset, &keys,
                            full, 0, 0, 0, key_group, key_row);
                    }
                    place.next();
                }
                if (j < num_key_tiles - 1) {
                    const int stage = value_place.stage;
                    const int first = (j + 1) * KEY_TILE;
                    // Of the sequence's last block, what lies behind its end must be cleared.
                    const bool clears = end < first + KEY_TILE && end % copy_keys != 0;
                    uint64_t* full = clears ? &bars.end_of_values : &bars.values_full[stage];
                    mbarrier_wait(&bars.values_free[stage], value_place.parity ^ 1);
                    if (lane == 0) mbarrier_arrive_expecting(full, STAGE_BYTES);
                    warp_sync();
                    if (lane < num_copies) {
                        copy_box(
                            shared_address(value_stages) + stage * STAGE_BYTES + offset, &values,
                            full, 0, 0, 0, value_group, value_row);
                    }
                    if (clears) {
                        mbarrier_wait(full, end_parity);
                        end_parity ^= 1;
                        clear_rows(
                            value_stages + stage * STAGE_BYTES, end - first,
                            (end - first + copy_keys - 1) / copy_keys * copy_keys);
                        if (lane == 0) mbarrier_arrive(&bars.values_full[stage]);
                    }
                    value_place.next();
                }
                value_row = key_row;
                value_group = key_group;
            }
            index = shuffle(next_index, 0);
        }
        mbarrier_wait(&bars.queries_free, query_parity);
        if (lane == 0) {
            work.num_keys = 0;
            mbarrier_arrive(&bars.queries_full);
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
    const uint64_t query_operand =
        operand(shared_address(query_rows) + warpgroup * 64 * 128, ATOM);
    const uint64_t key_operand = operand(shared_address(key_stages), HALVES * ATOM);
    const uint64_t value_operand = operand(shared_address(value_stages), HALVES * ATOM, ATOM);

    Place place;
    uint32_t query_parity = 0;
    while (true) {
        mbarrier_wait(&bars.queries_full, query_parity);
        query_parity ^= 1;
        const int num_keys = work.num_keys;
        if (num_keys == 0) return;
        const int first_token = work.first_token, first_row = work.first_row;
        const int num_rows = work.num_rows, kv_head = work.kv_head;
        const int first_position = work.first_position;
        int j = (num_keys + KEY_TILE - 1) / KEY_TILE - 1;
        // Steps below this one need no mask: the warpgroup's first row sees all their keys.
        const int all_seen =
            (first_position + (first_row + warpgroup * 64) / group + 1) / KEY_TILE;
        int limit[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            limit[h] = first_position + (first_row + lane_row + 8 * h) / group - lane % 4 * 2 -
                       j * KEY_TILE;
        }

        float scores[KEY_GROUPS][4], sums[HEAD_GROUPS][4];
        float row_max[2] = {-infinity(), -infinity()}, row_sum[2] = {0.0f, 0.0f}, factor[2];
        uint32_t weights[KEY_TILE / 16][4];
        mbarrier_wait(&bars.keys_full[place.stage], place.parity);
        wgmma_fence();
        hold_registers(scores);
        start_scores(scores, query_operand, operand_at(key_operand, place.stage * STAGE_BYTES));
#pragma unroll
        for (int n = 0; n < HEAD_GROUPS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
        }
        wgmma_wait<0>();
        hold_registers(scores);
        if (lane == 0) mbarrier_arrive(&bars.keys_free[place.stage]);
        if (j == 0 && lane == 0) mbarrier_arrive(&bars.queries_free);
        weigh<true>(scores, row_max, row_sum, factor, exponent_scale, limit);
        round_weights(scores, weights);

        for (--j; j >= 0; --j) {
            const Place before = place;
            place.next();
            mbarrier_wait(&bars.keys_full[place.stage], place.parity);
            barrier_sync(own_turn, 256);
            hold_registers(scores);
            hold_registers(sums);
            hold_registers(weights);
            wgmma_fence();
            start_scores(scores, query_operand, operand_at(key_operand, place.stage * STAGE_BYTES));
            mbarrier_wait(&bars.values_full[before.stage], before.parity);
            wgmma_fence();
            start_sums(sums, weights, operand_at(value_operand, before.stage * STAGE_BYTES));
            barrier_arrive(next_turn, 256);
            wgmma_wait<1>();
            hold_registers(scores);
            if (lane == 0) mbarrier_arrive(&bars.keys_free[place.stage]);
            if (j == 0 && lane == 0) mbarrier_arrive(&bars.queries_free);
            limit[0] += KEY_TILE;
            limit[1] += KEY_TILE;
            if (j >= all_seen) {
                weigh<true>(scores, row_max, row_sum, factor, exponent_scale, limit);
            } else {
                weigh<false>(scores, row_max, row_sum, factor, exponent_scale, limit);
            }
            wgmma_wait<0>();
            hold_registers(sums);
            hold_registers(weights);
            if (lane == 0) mbarrier_arrive(&bars.values_free[before.stage]);
            if (warp_ballot(factor[0] != 1.0f || factor[1] != 1.0f)) {  // seldom after a few steps
#pragma unroll
                for (int n = 0; n < HEAD_GROUPS; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[n][i] *= factor[i / 2];
                }
            }
            round_weights(scores, weights);
        }

        mbarrier_wait(&bars.values_full[place.stage], place.parity);
        hold_registers(sums);
        hold_registers(weights);
        wgmma_fence();
        start_sums(sums, weights, operand_at(value_operand, place.stage * STAGE_BYTES));
        wgmma_wait<0>();
        hold_registers(sums);
        hold_registers(weights);
        if (lane == 0) mbarrier_arrive(&bars.values_free[place.stage]);
        place.next();

        // Four lanes share a row: each stores the 16 bytes of every fourth group of 8 columns.
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float inverse = 1.0f / warp_sum<4>(row_sum[h]);
            const int local_row = lane_row + 8 * h, row = first_row + local_row;
            const bool valid = local_row < tile_rows && row < num_rows;
            const int query = row / group, head = row - query * group;
            const int64_t token = first_token + query;
            scalar_t* target =
                out + (token * num_heads + kv_head * group + head) * HEAD_SIZE + lane % 4 * 8;
#pragma unroll
            for (int n = 0; n < HEAD_GROUPS; n += 4) {
                uint32_t four[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    four[i] = pack_two<scalar_t>(
                        sums[n + i][2 * h] * inverse, sums[n + i][2 * h + 1] * inverse);
                }
                transpose_four(four);
                if (valid) {
                    *reinterpret_cast<uint4*>(target + n * 8) =
                        make_uint4(four[0], four[1], four[2], four[3]);
                }
            }
        }
    }
#endif  // WGMMA_BUILD
}
