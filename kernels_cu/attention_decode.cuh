// What the decode attention kernels share: who works on which part of which sequence, and how the
// parts of a sequence become one.
//
// A launch has a fixed number of items. Every block finds its own from kv_lens: the sequences are
// cut so that all parts are about as long, whatever lengths the batch has, and the items beyond the
// last part do nothing. So a captured launch stays right, and balanced, while sequences grow.
//
// HEAD_SIZE   d
// QUERIES     most queries of a sequence, 1 to 8; sequences with more are left alone
#pragma once

#include "reduce.cuh"
#include "types.cuh"

#ifndef HEAD_SIZE
#error "define HEAD_SIZE"
#endif
#ifndef QUERIES
#define QUERIES 1
#endif

#ifndef TILE_ROWS
#define TILE_ROWS 4
#endif
#ifndef ROW_TILES
#define ROW_TILES 1
#endif
#ifndef STAGES
#define STAGES 3
#endif

// Every entry has the same parameters.
#define DECODE_PARAMETERS                                                                          \
    const scalar_t *q, const cache_t *key_cache, const cache_t *value_cache,                       \
        const scale_t *key_scales, const scale_t *value_scales, const int32_t *query_starts,       \
        const int32_t *kv_lens, const int32_t *block_tables, float scale, scalar_t *out,           \
        float *partial_values, float *partial_states, uint32_t *counters, int num_sequences,       \
        int num_kv_heads, int heads_per_group, int block_size, int table_width, int num_items,     \
        int least_part, int num_row_tiles

#define DECODE_BATCH                                                                               \
    { query_starts, kv_lens, num_sequences, num_items, least_part, num_kv_heads, heads_per_group }

constexpr float LOG2_E = 1.4426950408889634f;
constexpr int PART_TOKENS = 64;  // parts begin at multiples of this
constexpr int MAX_WARPS = 8;     // of a block

// What every kernel here is told of the batch.
struct DecodeBatch {
    const int32_t* query_starts;
    const int32_t* kv_lens;
    int num_sequences;
    int num_items;        // at least num_sequences
    int least_part;       // in units of PART_TOKENS, at least 1
    int num_kv_heads;
    int heads_per_group;  // query heads of a key/value head
};

// Part `part` of the `num_parts` of a sequence, whose items start at first_item.
struct DecodeWork {
    int sequence;  // -1: nothing to do
    int part, num_parts;
    int first_item;
};

// Length of a sequence in units of PART_TOKENS, at least 1; 0 where it is left alone.
__device__ __forceinline__ int sequence_units(const DecodeBatch& batch, int sequence) {
    if (sequence >= batch.num_sequences) return 0;
    const int num_queries = batch.query_starts[sequence + 1] - batch.query_starts[sequence];
    if (num_queries < 1 || num_queries > QUERIES) return 0;
    return max(1, (batch.kv_lens[sequence] + PART_TOKENS - 1) / PART_TOKENS);
}

// The work of an item, or (BY_ITEM false) of part 0 of a sequence. The whole warp must come.
template <bool BY_ITEM>
__device__ __forceinline__ DecodeWork find_work(const DecodeBatch& batch, int wanted) {
    int units = 0, active = 0;
    for (int b = lane_id(); b < batch.num_sequences; b += WARP_SIZE) {
        const int own = sequence_units(batch, b);
        units += own;
        active += own > 0;
    }
    units = warp_sum(units);
    active = warp_sum(active);
    // Rounding up per sequence costs less than one part each, so this length never needs more
    // than num_items parts.
    const int room = max(1, batch.num_items - active + 1);
    const int part_units = max(batch.least_part, (units + room - 1) / room);

    DecodeWork work = {-1, 0, 0, 0};
    int before = 0;
    for (int base = 0; base < batch.num_sequences; base += WARP_SIZE) {
        const int own = (sequence_units(batch, base + lane_id()) + part_units - 1) / part_units;
        const int end = before + warp_prefix_sum(own);
        const int first = end - own;
        const bool hit = BY_ITEM ? first <= wanted && wanted < end : base + lane_id() == wanted;
        const uint32_t votes = warp_ballot(hit);
        if (votes != 0) {
            const int lane = lowest_bit(votes);
            work.first_item = shuffle(first, lane);
            work.num_parts = shuffle(own, lane);
            work.part = BY_ITEM ? wanted - work.first_item : 0;
            work.sequence = work.num_parts > 0 ? base + lane : -1;
            break;
        }
        before = shuffle(end, WARP_SIZE - 1);
    }
    return work;
}

// The rows of a block and the positions it reads. Rows of a sequence and key/value head: query
// after query, each with its heads_per_group heads.
struct DecodeTile {
    int group;             // the key/value head
    int first_token;       // of the sequence, in the flat batch
    int first_row;         // of the tile
    int num_rows;          // of the tile; none: the block has nothing to do
    int first_limit;       // last position that the sequence's first query sees
    int begin, end;        // positions
};

template <int ROWS>
__device__ __forceinline__ DecodeTile find_tile(
    const DecodeBatch& batch, const DecodeWork& work, int column, int num_row_tiles) {
    DecodeTile tile;
    tile.group = column / num_row_tiles;
    tile.first_row = column % num_row_tiles * ROWS;
    tile.first_token = batch.query_starts[work.sequence];
    const int num_queries = batch.query_starts[work.sequence + 1] - tile.first_token;
    const int kv_len = batch.kv_lens[work.sequence];
    tile.num_rows = min(ROWS, num_queries * batch.heads_per_group - tile.first_row);
    tile.first_limit = kv_len - num_queries;
    const int64_t units = sequence_units(batch, work.sequence);
    tile.begin = static_cast<int>(units * work.part / work.num_parts) * PART_TOKENS;
    tile.end = static_cast<int>(units * (work.part + 1) / work.num_parts) * PART_TOKENS;
    tile.end = min(tile.end, kv_len);
    return tile;
}

// Last position that a row of the tile sees; rows beyond the tile's see nothing.
__device__ __forceinline__ int row_limit(
    const DecodeBatch& batch, const DecodeTile& tile, int row) {
    if (row >= tile.num_rows) return -1;
    return tile.first_limit + (tile.first_row + row) / batch.heads_per_group;
}

// Where a row of the sequence has its query and its output, in elements of [T, H, d].
__device__ __forceinline__ int64_t row_offset(
    const DecodeBatch& batch, int first_token, int group, int row) {
    const int token = first_token + row / batch.heads_per_group;
    const int head = group * batch.heads_per_group + row % batch.heads_per_group;
    const int num_heads = batch.num_kv_heads * batch.heads_per_group;
    return (static_cast<int64_t>(token) * num_heads + head) * HEAD_SIZE;
}

// Which row of the cache [N, G, P] holds a position. Rows are counted in 32 bits: the host checks.
__device__ __forceinline__ uint32_t cache_row(
    const int32_t* block_table, int position, int block_size, int num_kv_heads, int group) {
    const uint32_t column = static_cast<uint32_t>(position) / static_cast<uint32_t>(block_size);
    const uint32_t row = static_cast<uint32_t>(position) - column * block_size;
    const uint32_t block = static_cast<uint32_t>(block_table[column]);
    return (block * num_kv_heads + group) * block_size + row;
}

// Where the parts wait for their merge: values [items, G, rows, d], not divided by the sum yet,
// and states [items, G, rows, 2], maximum and sum; rows = heads_per_group * QUERIES.
struct Partials {
    float* values;
    float* states;
};

__device__ __forceinline__ int64_t partial_row(
    const DecodeBatch& batch, int item, int group, int row) {
    const int rows = batch.heads_per_group * QUERIES;
    return (static_cast<int64_t>(item) * batch.num_kv_heads + group) * rows + row;
}

__device__ __forceinline__ float divided(float value, float sum) {
    return sum > 0.0f ? value / sum : 0.0f;  // a row that sees nothing is 0
}

// Make one of what the block's warps have of the tile: values[warp * warp_stride + row * STRIDE +
// column] and states[warp][row] in shared memory. The result goes to `out` where the sequence has
// one part, else to the partials of this item. Barriers before it are the caller's.
template <int ROWS, int STRIDE>
__device__ __forceinline__ void combine_warps(
    const DecodeBatch& batch, const DecodeWork& work, const DecodeTile& tile, const float* values,
    int warp_stride, const SoftmaxState (*states)[ROWS], scalar_t* out, const Partials& partials) {
    for (int i = threadIdx.x; i < tile.num_rows * HEAD_SIZE; i += blockDim.x) {
        const int row = i / HEAD_SIZE, column = i % HEAD_SIZE;
        float max = -infinity(), sum = 0.0f, value = 0.0f;
        for (int w = 0; w < num_warps(); ++w) max = fmaxf(max, states[w][row].max);
        for (int w = 0; w < num_warps(); ++w) {
            const float weight = softmax_weight(states[w][row].max, max);
            sum += weight * states[w][row].sum;
            value += weight * values[w * warp_stride + row * STRIDE + column];
        }
        const int whole_row = tile.first_row + row;
        if (work.num_parts == 1) {
            const int64_t at = row_offset(batch, tile.first_token, tile.group, whole_row);
            out[at + column] = from_float<scalar_t>(divided(value, sum));
        } else {
            const int item = work.first_item + work.part;
            const int64_t at = partial_row(batch, item, tile.group, whole_row);
            partials.values[at * HEAD_SIZE + column] = value;
            if (column == 0) {
                partials.states[at * 2] = max;
                partials.states[at * 2 + 1] = sum;
            }
        }
    }
}

constexpr int MERGE_VEC = HEAD_SIZE % 4 == 0 ? 4 : 1;
constexpr int MERGE_CHUNKS = (HEAD_SIZE / MERGE_VEC + WARP_SIZE - 1) / WARP_SIZE;  // of a lane
constexpr int MERGE_AHEAD = MERGE_CHUNKS > 2 ? 2 : 8;  // parts whose loads are under way at once

// Merge parts [begin, end) of one row, in this order; lane l holds columns from (l + 32 * c) *
// MERGE_VEC on.
__device__ __forceinline__ SoftmaxState merge_parts(
    const DecodeBatch& batch, const Partials& partials, int first_item, int begin, int end,
    int group, int row, float (&merged)[MERGE_CHUNKS][MERGE_VEC]) {
    SoftmaxState state = softmax_start();
#pragma unroll
    for (int c = 0; c < MERGE_CHUNKS; ++c)
#pragma unroll
        for (int i = 0; i < MERGE_VEC; ++i) merged[c][i] = 0.0f;
    for (int base = begin; base < end; base += WARP_SIZE) {
        const int count = min(WARP_SIZE, end - base);
        SoftmaxState own = softmax_start();
        if (lane_id() < count) {
            const int64_t at = partial_row(batch, first_item + base + lane_id(), group, row);
            own.max = partials.states[at * 2];
            own.sum = partials.states[at * 2 + 1];
        }
        const float factor = softmax_raise(state, warp_max(own.max));
        const float weight = softmax_weight(own.max, state.max);
        state.sum += warp_sum(own.sum * weight);
#pragma unroll
        for (int c = 0; c < MERGE_CHUNKS; ++c)
#pragma unroll
            for (int i = 0; i < MERGE_VEC; ++i) merged[c][i] *= factor;
        for (int part = 0; part < count; part += MERGE_AHEAD) {
            float values[MERGE_AHEAD][MERGE_CHUNKS][MERGE_VEC] = {};
#pragma unroll
            for (int a = 0; a < MERGE_AHEAD; ++a) {
                if (part + a >= count) continue;
                const int64_t at = partial_row(batch, first_item + base + part + a, group, row);
#pragma unroll
                for (int c = 0; c < MERGE_CHUNKS; ++c) {
                    const int column = (lane_id() + c * WARP_SIZE) * MERGE_VEC;
                    if (column >= HEAD_SIZE) continue;
                    load_floats<float, MERGE_VEC>(
                        partials.values + at * HEAD_SIZE + column, values[a][c]);
                }
            }
#pragma unroll
            for (int a = 0; a < MERGE_AHEAD; ++a) {
                const float part_weight = shuffle(weight, (part + a) & (WARP_SIZE - 1));
#pragma unroll
                for (int c = 0; c < MERGE_CHUNKS; ++c)
#pragma unroll
                    for (int i = 0; i < MERGE_VEC; ++i) {
                        merged[c][i] += part_weight * values[a][c][i];
                    }
            }
        }
    }
    return state;
}

// Merge all parts of rows [first_row, first_row + num_rows) of a sequence and key/value head into
// `out`. The whole block must come; `scratch` is num_warps() * HEAD_SIZE floats of shared memory
// that nobody uses any more. Where rows are fewer than warps, several warps share a row's parts.
__device__ __forceinline__ void merge_rows(
    const DecodeBatch& batch, const DecodeWork& work, const Partials& partials, int first_token,
    int group, int first_row, int num_rows, float* scratch, scalar_t* out) {
    __shared__ SoftmaxState shares[MAX_WARPS];
    const int sharers = max(1, num_warps() / num_rows);  // warps of a row
    const int share = warp_id() % sharers;
    const int begin = work.num_parts * share / sharers;
    const int end = work.num_parts * (share + 1) / sharers;
    float merged[MERGE_CHUNKS][MERGE_VEC];
    for (int base = 0; base < num_rows; base += num_warps() / sharers) {
        const int row = base + warp_id() / sharers;
        const bool mine = row < num_rows && warp_id() / sharers < num_warps() / sharers;
        SoftmaxState state = softmax_start();
        if (mine) {
            state = merge_parts(
                batch, partials, work.first_item, begin, end, group, first_row + row, merged);
        }
        if (sharers > 1) {
            float* own = scratch + warp_id() * HEAD_SIZE;
            if (mine && share > 0) {
                if (lane_id() == 0) shares[warp_id()] = state;
#pragma unroll
                for (int c = 0; c < MERGE_CHUNKS; ++c) {
                    const int column = (lane_id() + c * WARP_SIZE) * MERGE_VEC;
                    if (column < HEAD_SIZE) store_floats<float, MERGE_VEC>(own + column, merged[c]);
                }
            }
            block_sync();
            for (int w = 1; w < sharers && mine && share == 0; ++w) {
                float scale, other_scale;
                softmax_merge(state, shares[warp_id() + w], scale, other_scale);
#pragma unroll
                for (int c = 0; c < MERGE_CHUNKS; ++c) {
                    const int column = (lane_id() + c * WARP_SIZE) * MERGE_VEC;
                    if (column >= HEAD_SIZE) continue;
                    float other[MERGE_VEC];
                    load_floats<float, MERGE_VEC>(own + w * HEAD_SIZE + column, other);
#pragma unroll
                    for (int i = 0; i < MERGE_VEC; ++i) {
                        merged[c][i] = merged[c][i] * scale + other[i] * other_scale;
                    }
                }
            }
        }
        if (!mine || share > 0) continue;
        const int64_t at = row_offset(batch, first_token, group, first_row + row);
#pragma unroll
        for (int c = 0; c < MERGE_CHUNKS; ++c) {
            const int column = (lane_id() + c * WARP_SIZE) * MERGE_VEC;
            if (column >= HEAD_SIZE) continue;
#pragma unroll
            for (int i = 0; i < MERGE_VEC; ++i) merged[c][i] = divided(merged[c][i], state.sum);
            store_floats<scalar_t, MERGE_VEC>(out + at + column, merged[c]);
        }
    }
}

// Where the sequence has several parts: the block that comes last merges them. `counters` [B,
// columns of the grid] are 0 before the launch and after it; null leaves it to attention_decode_merge.
__device__ __forceinline__ void merge_if_last(
    const DecodeBatch& batch, const DecodeWork& work, const DecodeTile& tile,
    const Partials& partials, uint32_t* counters, float* scratch, scalar_t* out) {
    __shared__ bool others_come;
    if (work.num_parts == 1 || counters == nullptr) return;
    device_fence();
    block_sync();
    if (threadIdx.x == 0) {
        uint32_t* counter = counters + static_cast<int64_t>(work.sequence) * gridDim.x + blockIdx.x;
        const uint32_t last = static_cast<uint32_t>(work.num_parts - 1);
        others_come = atomic_count_to(counter, last) != last;
    }
    block_sync();
    if (others_come) return;
    device_fence();
    merge_rows(batch, work, partials, tile.first_token, tile.group, tile.first_row, tile.num_rows,
               scratch, out);
}
