// Attention of a persistent decode step: q and k normalised and rotated, k and v written to the paged
// cache, attention of one query a sequence, over parts of its context.
//
// An item is a part of the context of a sequence and key/value head; the blocks take items in turn.
// A context has as many parts as its length asks for and the grid has blocks for. One that has
// several leaves their sums in memory, and the product that follows merges them as it reads its
// inputs: that costs it a few loads, and saves a barrier of the whole grid.
#pragma once

#include "attention_decode_mma.cuh"
#include "decode_step_products.cuh"
#include "rope.cuh"

// What the step's attention is told, the same for all layers.
struct StepAttention {
    const scalar_t* qkv;          // [SEQUENCES, H + 2 * G, d]
    const float* rope;            // [SEQUENCES, 2, d / 2]
    const int32_t* slots;         // [SEQUENCES]
    const int32_t* kv_lens;       // [SEQUENCES]
    const int32_t* block_tables;  // [SEQUENCES, table_width]
    scalar_t* attended;           // [SEQUENCES, H, d], of contexts of one part
    float* part_values;           // [SEQUENCES, H, max_parts, d], not divided by the sum yet
    float* part_states;           // [SEQUENCES, H, max_parts, 2], maximum and sum
    float eps, scale;
    int num_kv_heads, heads_per_group, block_size, table_width;
    int max_parts, part_tokens;   // most parts of a context; positions that are worth one

    __device__ __forceinline__ int num_parts(int kv_len) const {
        return max(1, min(max_parts, (kv_len + part_tokens - 1) / part_tokens));
    }
    __device__ __forceinline__ int num_items() const { return SEQUENCES * num_kv_heads * max_parts; }
    __device__ __forceinline__ int64_t part_row(int sequence, int head, int part) const {
        const int num_heads = num_kv_heads * heads_per_group;
        return (static_cast<int64_t>(sequence) * num_heads + head) * max_parts + part;
    }
};

// Which part of what an item is: parts of a context lie far from each other in the order of items, so
// that those without work are the last.
struct StepItem {
    int sequence, group, part, parts, kv_len;

    __device__ __forceinline__ StepItem(const StepAttention& a, int item) {
        group = item % a.num_kv_heads;
        const int rest = item / a.num_kv_heads;
        sequence = rest % SEQUENCES;
        part = rest / SEQUENCES;
        kv_len = a.kv_lens[sequence];
        parts = a.num_parts(kv_len);
    }
    // Steps of 16 positions go to the parts in turn, then to their warps.
    __device__ __forceinline__ int source() const { return warp_id() * parts + part; }
    __device__ __forceinline__ int first_position() const { return source() * STEP_TOKENS; }
    __device__ __forceinline__ int stride() const { return USER_WARPS * parts * STEP_TOKENS; }
    __device__ __forceinline__ int num_steps() const {
        return max(0, (kv_len - first_position() + stride() - 1) / stride());
    }
};

// Shared memory of the work area: queries, each warp's keys and values, the new key and value; the
// warps' sums take the place of keys and values at the end.
struct StepTiles {
    scalar_t* queries;
    scalar_t* rings;
    scalar_t* fresh;
    float* states;  // [USER_WARPS, 16, 2]
    float* values;  // [USER_WARPS, heads_per_group, d]

    __device__ __forceinline__ StepTiles() {
        queries = reinterpret_cast<scalar_t*>(step_work());
        fresh = queries + 16 * STRIDE;
        states = reinterpret_cast<float*>(fresh + 2 * HEAD_SIZE);
        rings = reinterpret_cast<scalar_t*>(states + USER_WARPS * 16 * 2);
        values = reinterpret_cast<float*>(rings);
    }
};

// Ask for this block's keys and values of a layer in L2: those of its first item, as far as they wait
// for nobody.
__device__ __forceinline__ void prefetch_positions(
    const StepAttention& a, const cache_t* key_cache, const cache_t* value_cache) {
    if (static_cast<int>(blockIdx.x) >= a.num_items()) return;
    const StepItem item(a, blockIdx.x);
    if (item.part >= item.parts) return;
    const int32_t* table = a.block_tables + static_cast<int64_t>(item.sequence) * a.table_width;
    const int step = lane_id() / STEP_TOKENS;  // the first two
    const int position = item.first_position() + step * item.stride() + lane_id() % STEP_TOKENS;
    if (position >= item.kv_len - 1) return;
    const int64_t row = cache_row(table, position, a.block_size, a.num_kv_heads, item.group);
    constexpr int LINE = 128 / static_cast<int>(sizeof(cache_t));
#pragma unroll
    for (int i = 0; i < HEAD_SIZE; i += LINE) {
        prefetch_l2(key_cache + row * HEAD_SIZE + i);
        prefetch_l2(value_cache + row * HEAD_SIZE + i);
    }
}

// HEAD_SIZE values to row `row` of a tile, rounded to scalar_t.
__device__ __forceinline__ void put_tile_row(scalar_t* tile, int row, const HeadPairs& x) {
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r) {
        const int i = pair_index(r);
        if (i >= HALF) break;
        const int high = HALF + i;
        store_floats<scalar_t, PAIR_WIDTH>(tile + chunk_at(row, i / 8) + i % 8, x.low[r]);
        store_floats<scalar_t, PAIR_WIDTH>(tile + chunk_at(row, high / 8) + high % 8, x.high[r]);
    }
}

// The heads of q to their tile; where the newest position is this part's, those of k and v to `fresh`
// and the cache. A warp a head.
__device__ __forceinline__ void rotate_heads(
    const StepAttention& a, const StepItem& item, const StepTiles& tiles, const scalar_t* q_norm,
    const scalar_t* k_norm, cache_t* key_cache, cache_t* value_cache) {
    const int newest = item.kv_len - 1, heads = a.heads_per_group;
    const bool has_newest = newest / STEP_TOKENS % item.parts == item.part;
    const int num_heads = a.num_kv_heads * heads, num_tasks = heads + (has_newest ? 2 : 0);
    const scalar_t* from = a.qkv + static_cast<int64_t>(item.sequence) *
                                       (num_heads + 2 * a.num_kv_heads) * HEAD_SIZE;
    for (int task = warp_id(); task < num_tasks; task += USER_WARPS) {
        const int kind = max(0, task - heads + 1);  // 0 q, 1 k, 2 v
        const int head = kind == 0 ? item.group * heads + task
                                   : num_heads + (kind - 1) * a.num_kv_heads + item.group;
        HeadPairs x = load_pairs(from + head * HEAD_SIZE);
        if (kind == 0 && q_norm != nullptr) normalize_pairs(x, load_pairs(q_norm), a.eps);
        if (kind == 1 && k_norm != nullptr) normalize_pairs(x, load_pairs(k_norm), a.eps);
        if (kind != 2) {
            rotate_pairs(x, load_pairs(a.rope + static_cast<int64_t>(item.sequence) * HEAD_SIZE));
        }
        if (kind == 0) {
            put_tile_row(tiles.queries, task, x);
        } else {
            const int64_t slot = slot_offset(
                a.slots[item.sequence], item.group, a.num_kv_heads, a.block_size);
            cache_store_pairs(tiles.fresh + (kind - 1) * HEAD_SIZE, x);
            cache_store_pairs((kind == 1 ? key_cache : value_cache) + slot, x);
        }
    }
}

// What the warps have summed, to the result where the context has one part, else to its parts.
__device__ __forceinline__ void merge_warps(
    const StepAttention& a, const StepItem& item, const StepTiles& tiles, int sources) {
    const int heads = a.heads_per_group, num_heads = a.num_kv_heads * heads;
#pragma unroll 1
    for (int i = threadIdx.x; i < heads * HEAD_SIZE; i += USERS) {
        const int row = i / HEAD_SIZE, column = i % HEAD_SIZE;
        float highest = -infinity(), sum = 0.0f, value = 0.0f;
#pragma unroll
        for (int s = 0; s < USER_WARPS; ++s) {
            if (s < sources) highest = fmaxf(highest, tiles.states[(s * 16 + row) * 2]);
        }
#pragma unroll
        for (int s = 0; s < USER_WARPS; ++s) {
            if (s >= sources) break;
            const float weight = softmax_weight(tiles.states[(s * 16 + row) * 2], highest);
            sum += weight * tiles.states[(s * 16 + row) * 2 + 1];
            value += weight * tiles.values[(s * heads + row) * HEAD_SIZE + column];
        }
        const int head = item.group * heads + row;
        if (item.parts == 1) {
            a.attended[(static_cast<int64_t>(item.sequence) * num_heads + head) * HEAD_SIZE +
                       column] = from_float<scalar_t>(divided(value, sum));
        } else {
            const int64_t at = a.part_row(item.sequence, head, item.part);
            a.part_values[at * HEAD_SIZE + column] = value;
            if (column == 0) {
                a.part_states[at * 2] = highest;
                a.part_states[at * 2 + 1] = sum;
            }
        }
    }
}

__device__ __forceinline__ void attend_item(
    const StepAttention& a, const StepItem& item, const scalar_t* q_norm, const scalar_t* k_norm,
    cache_t* key_cache, cache_t* value_cache) {
    const StepTiles tiles;
    const int kv_len = item.kv_len, newest = kv_len - 1, num_steps = item.num_steps();
    const int32_t* table = a.block_tables + static_cast<int64_t>(item.sequence) * a.table_width;
    scalar_t* ring = tiles.rings + warp_id() * RING;
    const auto copy_step = [&](int step) {
        if (step < num_steps) {
            const int first = item.first_position() + step * item.stride();
            const int position = first + lane_id() % STEP_TOKENS;
            const uint32_t row =
                position < newest
                    ? cache_row(table, position, a.block_size, a.num_kv_heads, item.group)
                    : 0u;
            scalar_t* keys = ring + step % STAGES * 2 * TILE;
            copy_positions(keys, key_cache, value_cache, row, newest - first);
        }
        cp_async_commit();
    };
    MmaRows<1> rows;
#pragma unroll 1  // one copy of the code for the first steps' copies and all others'
    for (int step = -STAGES; step < num_steps || step < 0; ++step) {
        if (step >= 0) {
            cp_async_wait<STAGES - 1>();
            const int position = item.first_position() + step * item.stride();
            scalar_t* keys = ring + step % STAGES * 2 * TILE;
            warp_sync();  // every lane's copies are there
            if (position <= newest && newest < position + STEP_TOKENS) {
                if (lane_id() < ROW_CHUNKS) {
                    const uint4* from = reinterpret_cast<const uint4*>(tiles.fresh) + lane_id();
                    const int to = chunk_at(newest - position, lane_id());
                    *reinterpret_cast<uint4*>(keys + to) = from[0];
                    *reinterpret_cast<uint4*>(keys + TILE + to) = from[ROW_CHUNKS];
                }
                warp_sync();
            }
            rows.attend(keys, position, position + STEP_TOKENS > kv_len, a.scale * LOG2_E);
            warp_sync();  // nobody reads the stage that the next copies take
        }
        copy_step(step + STAGES);
        if (step == -1) {
            if (kv_len > 0) rotate_heads(a, item, tiles, q_norm, k_norm, key_cache, value_cache);
            users_sync();
            rows.start(tiles.queries);
            rows.limit[0][0] = rows.limit[0][1] = newest;
        }
    }
    rows.finish();

    // Sources are counted as the steps go to them, so that those with any come first.
    users_sync();  // nobody reads keys and values where sums go
    if (num_steps > 0) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = h * 8 + lane_id() / 4;
            if (row >= a.heads_per_group) continue;
            if (lane_id() % 4 == 0) {
                tiles.states[(warp_id() * 16 + row) * 2] = rows.state[0][h].max;
                tiles.states[(warp_id() * 16 + row) * 2 + 1] = rows.state[0][h].sum;
            }
            float* to = tiles.values + (warp_id() * a.heads_per_group + row) * HEAD_SIZE;
#pragma unroll
            for (int n = 0; n < HEAD_SIZE / 8; ++n) {
                const float pair[2] = {rows.summed[0][n][h * 2], rows.summed[0][n][h * 2 + 1]};
                store_floats<float, 2>(to + n * 8 + lane_id() % 4 * 2, pair);
            }
        }
    }
    users_sync();
    const int steps = (kv_len + STEP_TOKENS - 1) / STEP_TOKENS;  // of the whole context
    merge_warps(a, item, tiles,
                max(0, min(USER_WARPS, (steps - item.part + item.parts - 1) / item.parts)));
}

// All items of this block, in a layer. All threads that compute come.
__device__ __forceinline__ void attend_items(
    const StepAttention& a, const scalar_t* q_norm, const scalar_t* k_norm, cache_t* key_cache,
    cache_t* value_cache) {
    bool is_first = true;
#pragma unroll 1
    for (int i = blockIdx.x; i < a.num_items(); i += gridDim.x) {
        const StepItem item(a, i);
        if (item.part >= item.parts) continue;
        if (!is_first) users_sync();  // nobody reads the sums of the item before
        is_first = false;
        attend_item(a, item, q_norm, k_norm, key_cache, value_cache);
    }
}

// The results of attention as the inputs of a product.
struct AttendedInputs {
    const StepAttention& a;
    int num_inputs;  // H * d

    __device__ __forceinline__ void load(int tile, int tile_inputs) const {
        const TileRows rows(num_inputs, tile_inputs);
        const int first = tile * tile_inputs, count = min(tile_inputs, num_inputs - first);
#pragma unroll 1
        for (int token = 0; token < SEQUENCES; ++token) {
            const int parts = a.num_parts(a.kv_lens[token]);
            const scalar_t* from = a.attended + static_cast<int64_t>(token) * num_inputs + first;
#pragma unroll 1
            for (int k = threadIdx.x * SPAN; k < count; k += USERS * SPAN) {
                rows.put(token, k, parts == 1 ? load_span(from + k) : merged(token, first + k, parts));
            }
        }
        users_sync();
    }

    // Values k … k + 7 of a token, of one head.
    __device__ __forceinline__ InputSpan merged(int token, int k, int parts) const {
        const int64_t at = a.part_row(token, k / HEAD_SIZE, 0);
        const float* values = a.part_values + at * HEAD_SIZE + k % HEAD_SIZE;
        float highest = -infinity(), sum = 0.0f, summed[SPAN] = {};
#pragma unroll 1
        for (int s = 0; s < parts; ++s) highest = fmaxf(highest, a.part_states[(at + s) * 2]);
#pragma unroll 2
        for (int s = 0; s < parts; ++s) {
            const float weight = softmax_weight(a.part_states[(at + s) * 2], highest);
            sum += weight * a.part_states[(at + s) * 2 + 1];
            float low[4], high[4];
            load_floats<float, 4>(values + s * HEAD_SIZE, low);
            load_floats<float, 4>(values + s * HEAD_SIZE + 4, high);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                summed[j] += weight * low[j];
                summed[4 + j] += weight * high[j];
            }
        }
        InputSpan span;
#pragma unroll
        for (int j = 0; j < SPAN; ++j) {
            span.values.data[j] = from_float<scalar_t>(divided(summed[j], sum));
        }
        return span;
    }
};
