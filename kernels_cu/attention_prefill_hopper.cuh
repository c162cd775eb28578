// What attention_prefill_hopper.cu is made of: the shape of a tile, what lies in shared memory, the
// softmax of a warpgroup's scores, and its products.
#pragma once

#include "attention_prefill.cuh"
#include "hopper.cuh"

// Whether this build has attention_prefill_wgmma; else its entry is empty, not to be launched.
#define WGMMA_BUILD (HAS_WGMMA && SCALAR != 0 && CACHE == SCALAR && \
                     (HEAD_SIZE == 64 || HEAD_SIZE == 128))

#ifndef WARPGROUPS
#define WARPGROUPS (HEAD_SIZE == 64 ? 3 : 2)
#endif
#ifndef KEY_TILE
#define KEY_TILE 128
#endif
#ifndef STAGES
#define STAGES (HEAD_SIZE == 64 ? 3 : 2)
#endif
#ifndef L2_BYTES
#define L2_BYTES (32 << 20)
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

// Tiles of queries in shared memory: one at work, the next on its way.
constexpr int QUERY_STAGES = 2;

// What a block works on, as the warp that finds it tells the others.
struct Work {
    RowTile tile;  // num_keys 0: there is no more work
    int kv_head;
};

// Shared memory: stages of queries [HALVES][MOST_ROWS][64], then stages of keys, then of values,
// each [KEY_TILE / 8][HALVES][8][64], all swizzled. Here is who waits for what: full, that it came;
// free, that all who use it are done.
struct Barriers {
    uint64_t work_full[QUERY_STAGES];  // known, its queries may be on their way still
    uint64_t queries_full[QUERY_STAGES], queries_free[QUERY_STAGES];
    uint64_t keys_full[STAGES], keys_free[STAGES];
    uint64_t values_full[STAGES], values_free[STAGES];
    uint64_t end_of_values;  // came, but must be cleared behind the sequence's end
};

// A place in a ring of stages, and the parity of its round.
template <int COUNT>
struct Place {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == COUNT) {
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

// The blocks of the cache that one stage holds.
struct Copies {
    int keys;   // that one copy brings: of one block of the cache
    int count;  // of a stage: lane i makes copy i
};

// Bring a tile's keys, or its values, stage by stage from the last to the first, as then the masked
// ones come first, and what is left to do needs no mask.
template <bool VALUES>
__device__ __forceinline__ void fetch(
    const TensorMap* map, const Work& work, const int32_t* block_tables, int num_columns,
    int num_kv_heads, int block_size, int group, Copies copies, unsigned char* stages,
    uint64_t* full, uint64_t* free, uint64_t* end_of_values, Place<STAGES>& place,
    uint32_t& end_parity) {
    const int lane = lane_id(), num_keys = work.tile.num_keys;
    const int32_t* table = block_tables + static_cast<int64_t>(work.tile.sequence) * num_columns;
    const int end = work.tile.first_position + work.tile.num_rows / group;  // of all its keys
    int j = (num_keys - 1) / KEY_TILE;
    int position = j * KEY_TILE + lane * copies.keys;
    // Rows nobody sees are zeros, not looked up: their column of the table may hold anything.
    int row = -1;
    if (lane < copies.count && position < num_keys) {
        row = table[position / block_size] * num_kv_heads + work.kv_head;
    }
    for (; j >= 0; --j) {
        const int own_row = row, row_group = position % block_size / 8;
        position -= KEY_TILE;
        if (lane < copies.count && j > 0) {  // looked up a step ahead
            row = table[position / block_size] * num_kv_heads + work.kv_head;
        }
        // Of the sequence's last block, values behind its end must be cleared.
        const bool clears = VALUES && end < (j + 1) * KEY_TILE && end % copies.keys != 0;
        uint64_t* landed = clears ? end_of_values : full + place.stage;
        unsigned char* stage = stages + place.stage * STAGE_BYTES;
        mbarrier_wait(free + place.stage, place.parity ^ 1);
        if (lane == 0) mbarrier_arrive_expecting(landed, STAGE_BYTES);
        warp_sync();
        if (lane < copies.count) {
            copy_box(
                shared_address(stage) + lane * copies.keys * HEAD_SIZE * 2, map, landed, 0, 0, 0,
                row_group, own_row);
        }
        if (clears) {
            mbarrier_wait(landed, end_parity);
            end_parity ^= 1;
            const int first = end - j * KEY_TILE;
            clear_rows(stage, first, (first + copies.keys - 1) / copies.keys * copies.keys);
            if (lane == 0) mbarrier_arrive(full + place.stage);
        }
        place.next();
    }
}

// The largest of the lanes' numbers, in all of them.
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

// What a lane knows of its two rows.
struct Rows {
    float max[2], sum[2];  // sum: of the lane's own columns
    float factor[2];       // what sums so far must be scaled by
};

// Mask, where MASKED, and raise the rows' maxima to those of new scores.
// limit: of each row, the last column seen, counted from the lane's first.
template <bool MASKED>
__device__ __forceinline__ void raise_maxima(
    float (&scores)[KEY_GROUPS][4], Rows& rows, float exponent_scale, const int (&limit)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float largest[4];  // apart, so that comparisons need not wait for each other
#pragma unroll
        for (int n = 0; n < KEY_GROUPS; ++n) {
#pragma unroll
            for (int i = 2 * h; i < 2 * h + 2; ++i) {
                if (MASKED && n * 8 + i % 2 > limit[h]) scores[n][i] = -infinity();
                float& part = largest[n % 2 * 2 + i % 2];
                part = n < 2 ? scores[n][i] : fmaxf(part, scores[n][i]);
            }
        }
        const float before = rows.max[h];
        rows.max[h] = warp_max<4>(fmaxf(
            fmaxf(largest[0], largest[1]), fmaxf(fmaxf(largest[2], largest[3]), before)));
        // A row that has seen no key yet has no maximum: infinity less itself must not come.
        rows.factor[h] = MASKED && rows.max[h] == -infinity()
                             ? 1.0f
                             : exp2_approx((before - rows.max[h]) * exponent_scale);
    }
}

// Scores become weights.
__device__ __forceinline__ void weigh(
    float (&scores)[KEY_GROUPS][4], Rows& rows, float exponent_scale) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float shift = rows.max[h] == -infinity() ? 0.0f : rows.max[h] * exponent_scale;
        float sum = rows.sum[h] * rows.factor[h];
#pragma unroll
        for (int n = 0; n < KEY_GROUPS; ++n) {
#pragma unroll
            for (int i = 2 * h; i < 2 * h + 2; ++i) {
                scores[n][i] = exp2_approx(scores[n][i] * exponent_scale - shift);
                sum += scores[n][i];
            }
        }
        rows.sum[h] = sum;
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

__device__ __forceinline__ void scale_sums(float (&sums)[HEAD_GROUPS][4], const Rows& rows) {
    if (!warp_ballot(rows.factor[0] != 1.0f || rows.factor[1] != 1.0f)) return;  // most often
#pragma unroll
    for (int n = 0; n < HEAD_GROUPS; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n][i] *= rows.factor[i / 2];
    }
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

// The lane's two rows of results: `row` and row + 8 of the tile `work`, where they are of it. Four
// lanes share a row, and each stores the 16 bytes of every fourth group of 8 columns.
__device__ __forceinline__ void store_results(
    const float (&sums)[HEAD_GROUPS][4], const Rows& rows, const Work& work, int row,
    int tile_rows, int group, int num_heads, scalar_t* out) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float inverse = 1.0f / warp_sum<4>(rows.sum[h]);
        const int local_row = row + 8 * h, sequence_row = work.tile.first_row + local_row;
        const bool valid = local_row < tile_rows && sequence_row < work.tile.num_rows;
        const int query = sequence_row / group, head = sequence_row - query * group;
        const int64_t token = work.tile.first_token + query;
        scalar_t* target = out + (token * num_heads + work.kv_head * group + head) * HEAD_SIZE +
                           lane_id() % 4 * 8;
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
