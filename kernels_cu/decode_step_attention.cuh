// Attention of a persistent decode step: q and k normalised and rotated, k and v written to the paged
// cache, attention of one query a sequence, over parts of its context.
//
// An item is a part of the context of a sequence and key/value head; the blocks take items in turn.
// A context has as many parts as its length asks for and the grid has blocks for. One that has
// several leaves the parts' sums, and the product that follows merges them as it reads its inputs: that
// costs it a few loads, and saves blocks from waiting for each other once more.
#pragma once

#include "decode_step_words.cuh"
#include "reduce.cuh"
#include "rope.cuh"

// Which part of what an item is: parts of a context lie far from each other in the order of items, so
// that those without work are the last.
struct StepItem {
    int sequence, group, part, parts, kv_len;

    __device__ __forceinline__ explicit StepItem(int item) {
        const StepAttention& a = step_memory().attention;
        group = item % a.num_kv_heads;
        const int rest = item / a.num_kv_heads;
        sequence = rest % SEQUENCES;
        part = rest / SEQUENCES;
        kv_len = step_memory().kv_lens[sequence];
        parts = a.num_parts(kv_len);
    }
    // Steps of 16 positions go to the parts in turn, then to their warps.
    __device__ __forceinline__ int source() const { return warp_id() * parts + part; }
    __device__ __forceinline__ int first_position() const { return source() * STEP_TOKENS; }
    __device__ __forceinline__ int stride() const { return USER_WARPS * parts * STEP_TOKENS; }
    // Positions from a step's first one on that are in the cache: all but the newest.
    __device__ __forceinline__ int left(int step) const {
        return kv_len - 1 - (first_position() + step * stride());
    }
    __device__ __forceinline__ int num_steps() const {
        return max(0, (kv_len - first_position() + stride() - 1) / stride());
    }
};

// Where a lane's position of a step lies in the cache, of an item.
__device__ __forceinline__ uint32_t row_of_lane(const StepItem& item, int step) {
    const StepAttention& a = step_memory().attention;
    const int position =
        item.first_position() + step * item.stride() + lane_id() % STEP_TOKENS;
    if (position >= item.kv_len - 1) return 0u;
    const int32_t* table = a.block_tables + static_cast<int64_t>(item.sequence) * a.table_width;
    return cache_row(table, position, a.block_size, a.num_kv_heads, item.group);
}

// Start to copy the keys and values of a step to this warp's stage of it. `row`: of this lane; left:
// positions from the step's first one on that are in the cache.
__device__ __forceinline__ void copy_step(int step, int left, uint32_t row, const StepLayer& layer) {
    scalar_t* keys = step_memory().positions[warp_id()] + step % STAGES * 2 * TILE;
#pragma unroll 2
    for (int i = 0; i < STEP_TOKENS * ROW_CHUNKS / WARP_SIZE; ++i) {
        const int token = (i * WARP_SIZE + lane_id()) / ROW_CHUNKS;
        const int chunk = (i * WARP_SIZE + lane_id()) % ROW_CHUNKS;
        const int64_t from = static_cast<int64_t>(shuffle(row, token)) * HEAD_SIZE + chunk * 8;
        const int to = chunk_at(token, chunk);
        cp_async_16_or_zero(keys + to, layer.key_cache + from, token < left);
        cp_async_16_or_zero(keys + TILE + to, layer.value_cache + from, token < left);
    }
}

// Ask for what a layer's attention needs and waits for nobody: the first step of this block's first
// item (whose row `row` is), and the norms of q and k. All threads that compute come.
__device__ __noinline__ void request_attention(const StepLayer& layer, uint32_t row) {
    constexpr int VECTORS = HEAD_SIZE / 8;
    const int vector = threadIdx.x - (USERS - 2 * VECTORS);  // by the last threads
    if (vector >= 0) {
        const scalar_t* norm = vector < VECTORS ? layer.q_norm : layer.k_norm;
        scalar_t* to = &step_memory().head_norms[0][0] + vector * 8;
        if (norm != nullptr) cp_async_16(to, norm + vector % VECTORS * 8);
    }
    if (static_cast<int>(blockIdx.x) < step_memory().attention.num_items()) {
        const StepItem item(blockIdx.x);
        if (item.part < item.parts && item.num_steps() > 0) {
            copy_step(0, item.left(0), row, layer);
        }
    }
    cp_async_commit();
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

// HEAD_SIZE values of the QKV product, from words.
__device__ __forceinline__ HeadPairs load_head(const uint64_t* words, Moment moment) {
    HeadPairs x = {};
    uint32_t low[PAIR_ROUNDS], high[PAIR_ROUNDS];
    bool all;
    do {
        all = true;
#pragma unroll
        for (int r = 0; r < PAIR_ROUNDS; ++r) {
            const int i = pair_index(r);
            if (i >= HALF) break;
            const uint64_t a = load_word(words + i / 2), b = load_word(words + (HALF + i) / 2);
            all = all && is_of(a, moment) && is_of(b, moment);
            low[r] = static_cast<uint32_t>(a);
            high[r] = static_cast<uint32_t>(b);
        }
        if (!all) spin_wait();
    } while (!all);
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r) {
        if (pair_index(r) >= HALF) break;
        unpack_pair(low[r], x.low[r]);
        unpack_pair(high[r], x.high[r]);
    }
    warp_sync();
    return x;
}

// The heads of q to their tile; where the newest position is this part's, those of k and v to `fresh`
// and the cache. A warp a head.
__device__ __forceinline__ void rotate_heads(
    const StepItem& item, const StepLayer& layer, Moment moment) {
    StepMemory& memory = step_memory();
    const StepAttention& a = memory.attention;
    const int newest = item.kv_len - 1, heads = a.heads_per_group;
    const bool has_newest = newest / STEP_TOKENS % item.parts == item.part;
    const int num_heads = a.num_kv_heads * heads, num_tasks = heads + (has_newest ? 2 : 0);
    const uint64_t* from = memory.words.qkv + static_cast<int64_t>(item.sequence) *
                                                  (num_heads + 2 * a.num_kv_heads) * HALF;
#pragma unroll 1
    for (int task = warp_id(); task < num_tasks; task += USER_WARPS) {
        const int kind = max(0, task - heads + 1);  // 0 q, 1 k, 2 v
        const int head = kind == 0 ? item.group * heads + task
                                   : num_heads + (kind - 1) * a.num_kv_heads + item.group;
        HeadPairs x = load_head(from + head * HALF, moment);
        if (kind != 2) {
            if ((kind == 0 ? layer.q_norm : layer.k_norm) != nullptr) {
                normalize_pairs(x, load_pairs(memory.head_norms[kind]), a.eps);
            }
            rotate_pairs(x, load_pairs(memory.rope[item.sequence]));
        }
        if (kind == 0) {
            put_tile_row(memory.queries, task, x);
        } else {
            const int64_t slot = slot_offset(
                memory.slots[item.sequence], item.group, a.num_kv_heads, a.block_size);
            cache_store_pairs(memory.fresh[kind - 1], x);
            cache_store_pairs((kind == 1 ? layer.key_cache : layer.value_cache) + slot, x);
        }
    }
}

// What the warps have summed, to the result where the context has one part, else to its parts. A
// thread has two columns.
__device__ __forceinline__ void merge_warps(const StepItem& item, int sources, Moment moment) {
    const StepMemory& memory = step_memory();
    const StepAttention& a = memory.attention;
    const int heads = a.heads_per_group, num_heads = a.num_kv_heads * heads;
#pragma unroll 1
    for (int i = threadIdx.x; i < heads * HALF; i += USERS) {
        const int row = i / HALF, column = i % HALF * 2;
        float maxima[USER_WARPS], highest = -infinity(), sum = 0.0f, value[2] = {0.0f, 0.0f};
#pragma unroll
        for (int s = 0; s < USER_WARPS; ++s) {
            maxima[s] = s < sources ? memory.states[s][row][0] : -infinity();
            highest = fmaxf(highest, maxima[s]);
        }
#pragma unroll
        for (int s = 0; s < USER_WARPS; ++s) {
            const float weight = softmax_weight(maxima[s], highest);
            const float* values = reinterpret_cast<const float*>(memory.positions[s]);
            float own[2];
            load_floats<float, 2>(values + row * HEAD_SIZE + column, own);
            sum += s < sources ? weight * memory.states[s][row][1] : 0.0f;
            value[0] += s < sources ? weight * own[0] : 0.0f;
            value[1] += s < sources ? weight * own[1] : 0.0f;
        }
        const int head = item.group * heads + row;
        if (item.parts == 1) {
            const int64_t at = (static_cast<int64_t>(item.sequence) * num_heads + head) * HEAD_SIZE;
            store_pair(memory.words.attended + (at + column) / 2, divided(value[0], sum),
                       divided(value[1], sum), moment);
        } else {
            const int64_t at = a.part_row(item.sequence, head, item.part);
            uint64_t* words = memory.words.part_values + at * HEAD_SIZE + column;
            store_float(words, value[0], moment);
            store_float(words + 1, value[1], moment);
            if (column == 0) {
                store_float(memory.words.part_states + at * 2, highest, moment);
                store_float(memory.words.part_states + at * 2 + 1, sum, moment);
            }
        }
    }
}

// One item, from the QKV product's words of the moment `before`. is_requested: its first step is under
// way.
__device__ __forceinline__ void attend_item(
    const StepItem& item, const StepLayer& layer, bool is_requested, Moment before, Moment moment) {
    StepMemory& memory = step_memory();
    const StepAttention& a = memory.attention;
    const int kv_len = item.kv_len, newest = kv_len - 1, num_steps = item.num_steps();
    uint32_t next_row = row_of_lane(item, is_requested ? 1 : 0);
    MmaRows<1, 1> rows;
#pragma unroll 1  // one copy of the code for the first steps' copies and all others'
    for (int step = -STAGES; step < num_steps || step < 0; ++step) {
        if (step >= 0) {
            cp_async_wait<STAGES - 1>();
            const int position = item.first_position() + step * item.stride();
            scalar_t* keys = memory.positions[warp_id()] + step % STAGES * 2 * TILE;
            warp_sync();  // every lane's copies are there
            if (position <= newest && newest < position + STEP_TOKENS) {
                if (lane_id() < ROW_CHUNKS) {
                    const uint4* from = reinterpret_cast<const uint4*>(memory.fresh) + lane_id();
                    const int to = chunk_at(newest - position, lane_id());
                    *reinterpret_cast<uint4*>(keys + to) = from[0];
                    *reinterpret_cast<uint4*>(keys + TILE + to) = from[ROW_CHUNKS];
                }
                warp_sync();
            }
            rows.attend(keys, position, position + STEP_TOKENS > kv_len, a.scale * LOG2_E);
            warp_sync();  // nobody reads the stage that the next copies take
        }
        const int next = step + STAGES;
        if (next < num_steps && !(next == 0 && is_requested)) {
            copy_step(next, item.left(next), next_row, layer);
            next_row = row_of_lane(item, next + 1);
        }
        cp_async_commit();
        if (step == -1) {
            if (kv_len > 0) rotate_heads(item, layer, before);
            users_sync();
            rows.start(memory.queries);
            rows.limit[0][0] = newest;
        }
    }
    rows.finish();

    // Sources are counted as the steps go to them, so that those with any come first. A warp's sums
    // take the place of its keys and values.
    if (num_steps > 0) {
        float* values = reinterpret_cast<float*>(memory.positions[warp_id()]);
        const int row = lane_id() / 4;
        if (row < a.heads_per_group) {
            if (lane_id() % 4 == 0) {
                memory.states[warp_id()][row][0] = rows.state[0][0].max;
                memory.states[warp_id()][row][1] = rows.state[0][0].sum;
            }
#pragma unroll
            for (int n = 0; n < HEAD_SIZE / 8; ++n) {
                const float pair[2] = {rows.summed[0][n][0], rows.summed[0][n][1]};
                store_floats<float, 2>(values + row * HEAD_SIZE + n * 8 + lane_id() % 4 * 2, pair);
            }
        }
    }
    users_sync();
    const int steps = (kv_len + STEP_TOKENS - 1) / STEP_TOKENS;  // of the whole context
    const int sources = (steps - item.part + item.parts - 1) / item.parts;
    merge_warps(item, max(0, min(USER_WARPS, sources)), moment);
}

// All items of this block, in a layer. A function of its own, as are others here, so that what the rest
// of a step keeps in registers is not in the way. All threads that compute come, after request_attention.
__device__ __noinline__ void attend_items(
    const StepLayer& layer, Moment before, Moment moment) {
    const StepAttention& a = step_memory().attention;
#pragma unroll 1
    for (int i = blockIdx.x; i < a.num_items(); i += gridDim.x) {
        const StepItem item(i);
        if (item.part >= item.parts) continue;
        const bool is_first = i == static_cast<int>(blockIdx.x);
        if (!is_first) users_sync();  // nobody reads the sums of the item before
        attend_item(item, layer, is_first, before, moment);
    }
}
