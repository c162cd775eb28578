// Attention of sequences with 1 to QUERIES queries each over the paged cache, split along the
// context over the grid (Flash-Decoding: Dao, Haziza, Massa, Sizov 2023; online softmax: Milakov,
// Gimelshein 2018). All query heads of a key/value head, and all queries, share each read of it.
//
// HEAD_SIZE         attention_decode: any; attention_decode_mma: a multiple of 16
// TILE_ROWS         attention_decode: rows (query, head) of a block
// ROW_TILES         attention_decode_mma: rows of a block, in units of 16
// STAGES            attention_decode_mma: steps of 16 positions that a warp has under way, from 2, over
//                   a quantised cache from 3
// SCALAR, CACHE, QUERIES: as in the headers.
// nanocupy/ops/launch_attention_decode.py chooses the macros and the grid.
#include "attention_decode_codes.cuh"

// ------------------------------------------------------------------------------ any card

__device__ constexpr int widest_vector() {
    int n = 16 / (QUANTIZED ? 2 : sizeof(cache_t));  // more codes would need more registers
    while (HEAD_SIZE % n != 0) n /= 2;
    return n;
}

__device__ constexpr int lanes_for(int chunks) {
    int lanes = 1;
    while (lanes < chunks && lanes < WARP_SIZE) lanes *= 2;
    return lanes;
}

constexpr int VEC = widest_vector();
constexpr int CHUNKS = HEAD_SIZE / VEC;                            // loads of a position
constexpr int LANES = lanes_for(CHUNKS);                           // that share a position
constexpr int LANE_CHUNKS = (CHUNKS + LANES - 1) / LANES;          // loads of a lane for it
constexpr int AHEAD = LANE_CHUNKS > 2 ? 1 : 4 / LANE_CHUNKS;       // positions it loads at once
constexpr int STEP = AHEAD * (WARP_SIZE / LANES);                  // positions of a warp at once

// attention_decode: attention of few queries a sequence, float32 arithmetic on any card.
// grid (G * row tiles, items), row tiles = ceil(H / G * QUERIES / TILE_ROWS); block 32 to 128;
//   shared: warps * TILE_ROWS * d * 4 bytes
// q scalar_t [T, H, d]; key_cache, value_cache cache_t [N, G, P, d], N * G * P < 2**32; key_scales,
//   value_scales scale_t [N, G, P] where the cache is quantised, else unused;
//   query_starts int32 [B + 1]; kv_lens int32 [B]; block_tables int32 [B, M]; out scalar_t [T, H, d];
//   partial_values float32 [items, G, H / G * QUERIES, d]; partial_states the same with 2 for d;
//   counters uint32 [B, grid x], 0 before, or null with attention_decode_merge behind; items >= B.
//   Sequences without queries or with more than QUERIES are left alone; arrays aligned to 16 bytes.
// REF: numpy_ops.attention
// COST: bytes: keys and values of each sequence's positions, once for each row tile; 4 flops for
//   each row, position and d
extern "C" __global__ void __launch_bounds__(128, 2) attention_decode(DECODE_PARAMETERS) {
    grid_dependency_launch();
    grid_dependency_wait();
    const DecodeBatch batch = DECODE_BATCH;
    const DecodeWork work = find_work<true>(batch, blockIdx.y);
    if (work.sequence < 0) return;
    const DecodeTile tile = find_tile<TILE_ROWS>(batch, work, blockIdx.x, num_row_tiles);
    if (tile.num_rows <= 0) return;

    const int own_lane = lane_id() % LANES;
    float queries[TILE_ROWS][LANE_CHUNKS][VEC];
    float summed[TILE_ROWS][LANE_CHUNKS][VEC];
    SoftmaxState state[TILE_ROWS];
    int limit[TILE_ROWS];
#pragma unroll
    for (int r = 0; r < TILE_ROWS; ++r) {
        state[r] = softmax_start();
        limit[r] = row_limit(batch, tile, r);
        const int row = tile.first_row + min(r, tile.num_rows - 1);
        const int64_t at = row_offset(batch, tile.first_token, tile.group, row);
#pragma unroll
        for (int c = 0; c < LANE_CHUNKS; ++c) {
            const int column = (own_lane + c * LANES) * VEC;
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                const bool inside = column < HEAD_SIZE && r < tile.num_rows;
                queries[r][c][i] = inside ? to_float(q[at + column + i]) * (scale * LOG2_E) : 0.0f;
                summed[r][c][i] = 0.0f;
            }
        }
    }

    const int32_t* table = block_tables + static_cast<int64_t>(work.sequence) * table_width;
    for (int step = tile.begin + warp_id() * STEP; step < tile.end; step += num_warps() * STEP) {
        const int first = step + lane_id() / LANES;
        float keys[AHEAD][LANE_CHUNKS][VEC] = {};  // what lies beyond the end stays 0
        float values[AHEAD][LANE_CHUNKS][VEC] = {};
        float key_steps[AHEAD] = {}, value_steps[AHEAD] = {};  // the scales of quantised rows
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            const int position = first + a * (WARP_SIZE / LANES);
            if (position >= tile.end) continue;
            const uint32_t row = cache_row(table, position, block_size, num_kv_heads, tile.group);
            key_steps[a] = cache_scale(key_scales, row);
            value_steps[a] = cache_scale(value_scales, row);
#pragma unroll
            for (int c = 0; c < LANE_CHUNKS; ++c) {
                const int column = (own_lane + c * LANES) * VEC;
                if (column >= HEAD_SIZE) continue;
                const int64_t at = static_cast<int64_t>(row) * HEAD_SIZE + column;
                cache_load_vec<VEC>(key_cache + at, keys[a][c]);
                cache_load_vec<VEC>(value_cache + at, values[a][c]);
            }
        }
#pragma unroll
        for (int r = 0; r < TILE_ROWS; ++r) {
            float scores[AHEAD], highest = -infinity();
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                float dot = 0.0f;
#pragma unroll
                for (int c = 0; c < LANE_CHUNKS; ++c)
#pragma unroll
                    for (int i = 0; i < VEC; ++i) dot += queries[r][c][i] * keys[a][c][i];
                dot = warp_sum<LANES>(dot);
                if (QUANTIZED) dot *= key_steps[a];
                const int position = first + a * (WARP_SIZE / LANES);
                scores[a] = position < tile.end && position <= limit[r] ? dot : -infinity();
                highest = fmaxf(highest, scores[a]);
            }
            const float factor = softmax_raise(state[r], highest);
#pragma unroll
            for (int c = 0; c < LANE_CHUNKS; ++c)
#pragma unroll
                for (int i = 0; i < VEC; ++i) summed[r][c][i] *= factor;
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                float weight = softmax_weight(scores[a], state[r].max);
                state[r].sum += weight;
                if (QUANTIZED) weight *= value_steps[a];
#pragma unroll
                for (int c = 0; c < LANE_CHUNKS; ++c)
#pragma unroll
                    for (int i = 0; i < VEC; ++i) summed[r][c][i] += weight * values[a][c][i];
            }
        }
    }

    // The groups of lanes took different positions, as did the warps.
    __shared__ SoftmaxState states[MAX_WARPS][TILE_ROWS];
    float* warps = reinterpret_cast<float*>(dynamic_shared());
#pragma unroll
    for (int r = 0; r < TILE_ROWS; ++r) {
#pragma unroll
        for (int lanes = LANES; lanes < WARP_SIZE; lanes *= 2) {
            SoftmaxState other;
            float scale_own, scale_other;
            other.max = shuffle_xor(state[r].max, lanes);
            other.sum = shuffle_xor(state[r].sum, lanes);
            softmax_merge(state[r], other, scale_own, scale_other);
#pragma unroll
            for (int c = 0; c < LANE_CHUNKS; ++c)
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    const float value = shuffle_xor(summed[r][c][i], lanes);
                    summed[r][c][i] = summed[r][c][i] * scale_own + value * scale_other;
                }
        }
        if (lane_id() < LANES) {
            if (lane_id() == 0) states[warp_id()][r] = state[r];
#pragma unroll
            for (int c = 0; c < LANE_CHUNKS; ++c) {
                const int column = (own_lane + c * LANES) * VEC;
                if (column >= HEAD_SIZE) continue;
                float* at = warps + (warp_id() * TILE_ROWS + r) * HEAD_SIZE + column;
#pragma unroll
                for (int i = 0; i < VEC; ++i) at[i] = summed[r][c][i];
            }
        }
    }
    block_sync();
    const Partials partials = {partial_values, partial_states};
    combine_warps<TILE_ROWS, HEAD_SIZE>(
        batch, work, tile, warps, TILE_ROWS * HEAD_SIZE, states, out, partials);
    merge_if_last(batch, work, tile, partials, counters, warps, out);
}

// ------------------------------------------------------------------------------ tensor cores

// attention_decode_mma: attention of few queries a sequence on tensor cores, 16-bit types, the
//   cache's the same as q's or quantised. Each warp pipes its own positions, 16 at a step, through
//   shared memory.
// grid (G * row tiles, items), row tiles = ceil(H / G * QUERIES / (16 * ROW_TILES)); block 32 to 256;
//   shared: (warps * 2 * STAGES + ROW_TILES) * 16 * row, row = d * 2 bytes where d is a multiple of
//   64, else (d / 8 | 1) * 16; over a quantised cache warps * max(STAGES * (32 * codes + 64),
//   64 * ROW_TILES * (d + 8)) + ROW_TILES * 16 * row, codes = d where that is a multiple of 128, else
//   (d / 16 | 1) * 16
// arrays: as attention_decode; probabilities are rounded to scalar_t before they meet the values
// REF: numpy_ops.attention
// COST: bytes: keys and values of each sequence's positions, once for each row tile; 64 * ROW_TILES
//   flops for each position and d
extern "C" __global__ void __launch_bounds__(256) attention_decode_mma(DECODE_PARAMETERS) {
#ifdef DECODE_ON_TENSOR_CORES
    constexpr int ROWS = 16 * ROW_TILES;
    constexpr int OUT_STRIDE = HEAD_SIZE + 8;  // floats: rows in different banks
    constexpr int RESULTS = 2 * ROWS * OUT_STRIDE;  // which take the ring's place
    constexpr int WARP_ROOM = RING > RESULTS ? RING : RESULTS;
    static_assert(QUANTIZED || RING >= RESULTS, "only rings of codes are as short");
    static_assert(!QUANTIZED || STAGES >= 3, "scales are stored a step behind");

    grid_dependency_launch();
    grid_dependency_wait();
    const DecodeBatch batch = DECODE_BATCH;
    const DecodeWork work = find_work<true>(batch, blockIdx.y);
    if (work.sequence < 0) return;
    const DecodeTile tile = find_tile<ROWS>(batch, work, blockIdx.x, num_row_tiles);
    if (tile.num_rows <= 0) return;

    scalar_t* shared_queries = reinterpret_cast<scalar_t*>(dynamic_shared());
    scalar_t* rings = shared_queries + ROWS * STRIDE;
    scalar_t* ring = rings + warp_id() * WARP_ROOM;

    // Step s of this warp takes the 16 positions from first_position + s * stride on.
    const int32_t* table = block_tables + static_cast<int64_t>(work.sequence) * table_width;
    const int first_position = tile.begin + warp_id() * STEP_TOKENS;
    const int stride = num_warps() * STEP_TOKENS;
    const int num_steps = max(0, (tile.end - first_position + stride - 1) / stride);
    // Lane l (and l + 16) knows where position l of a step lies in the cache; it looks one step
    // ahead of the copies, so that these need not wait for the block table.
    const auto row_of_lane = [&](int step) {
        const int position = first_position + step * stride + lane_id() % STEP_TOKENS;
        return position < tile.end
                   ? cache_row(table, position, block_size, num_kv_heads, tile.group)
                   : 0u;
    };
    uint32_t next_row = row_of_lane(0);
#if QUANTIZED
    CodeCopies copies = {
        key_cache, value_cache, lane_id() < STEP_TOKENS ? key_scales : value_scales};
#endif
    const auto copy_step = [&](int step) {
        if (step < num_steps) {
            const int left = tile.end - (first_position + step * stride);
            scalar_t* keys = ring + step % STAGES * STAGE;
#if QUANTIZED
            copies.start(keys, next_row, left);
#else
            copy_positions(keys, key_cache, value_cache, next_row, left);
#endif
            next_row = row_of_lane(step + 1);
        }
#if QUANTIZED
        if (step >= num_steps) copies.finish();
#endif
        cp_async_commit();
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) copy_step(s);

#if QUANTIZED
    for (int i = threadIdx.x; i < ROWS * CODE_CHUNKS; i += blockDim.x) {
        const int row = i / CODE_CHUNKS, chunk = i % CODE_CHUNKS;
        uint4 low = make_uint4(0, 0, 0, 0), high = low;
        if (row < tile.num_rows) {
            const int64_t at =
                row_offset(batch, tile.first_token, tile.group, tile.first_row + row);
            low = *reinterpret_cast<const uint4*>(q + at + chunk * 16);
            high = *reinterpret_cast<const uint4*>(q + at + chunk * 16 + 8);
        }
        sort_even_odd(low, high);
        *reinterpret_cast<uint4*>(shared_queries + chunk_at(row, 2 * chunk)) = low;
        *reinterpret_cast<uint4*>(shared_queries + chunk_at(row, 2 * chunk + 1)) = high;
    }
    block_sync();
    CodeRows<ROW_TILES> rows;
#else
    for (int i = threadIdx.x; i < ROWS * ROW_CHUNKS; i += blockDim.x) {
        const int row = i / ROW_CHUNKS, chunk = i % ROW_CHUNKS;
        uint4 bits = make_uint4(0, 0, 0, 0);
        if (row < tile.num_rows) {
            const int64_t at =
                row_offset(batch, tile.first_token, tile.group, tile.first_row + row);
            bits = *reinterpret_cast<const uint4*>(q + at + chunk * 8);
        }
        *reinterpret_cast<uint4*>(shared_queries + chunk_at(row, chunk)) = bits;
    }
    block_sync();
    MmaRows<ROW_TILES> rows;
#endif

    rows.start(shared_queries);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            rows.limit[m][h] = row_limit(batch, tile, m * 16 + h * 8 + lane_id() / 4);
        }
    for (int step = 0; step < num_steps; ++step) {
        cp_async_wait<STAGES - 2>();
        warp_sync();  // every lane's copies are there, and nobody reads the slot that comes next
        copy_step(step + STAGES - 1);
        const int position = first_position + step * stride;
        const bool masked = position + STEP_TOKENS - 1 > tile.first_limit;
        rows.attend(ring + step % STAGES * STAGE, position, masked, scale * LOG2_E);
    }
    rows.finish();

    __shared__ SoftmaxState states[MAX_WARPS][ROWS];
    cp_async_wait<0>();
    warp_sync();  // the ring is this warp's own, and done with
    float* results = reinterpret_cast<float*>(ring);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = m * 16 + h * 8 + lane_id() / 4;
            if (lane_id() % 4 == 0) states[warp_id()][row] = rows.state[m][h];
#pragma unroll
            for (int n = 0; n < HEAD_SIZE / 8; ++n) {
#if QUANTIZED
                float* at = results + row * OUT_STRIDE + sorted_column(n, lane_id() % 4 * 2);
                at[0] = rows.summed[m][n][h * 2];
                at[2] = rows.summed[m][n][h * 2 + 1];
#else
                float* at = results + row * OUT_STRIDE + n * 8 + lane_id() % 4 * 2;
                at[0] = rows.summed[m][n][h * 2];
                at[1] = rows.summed[m][n][h * 2 + 1];
#endif
            }
        }
    block_sync();
    const Partials partials = {partial_values, partial_states};
    float* all_results = reinterpret_cast<float*>(rings);
    combine_warps<ROWS, OUT_STRIDE>(
        batch, work, tile, all_results, WARP_ROOM / 2, states, out, partials);
    merge_if_last(batch, work, tile, partials, counters, all_results, out);
#endif
}

// ------------------------------------------------------------------------------ the merge

// attention_decode_merge: makes one of the parts that attention_decode or attention_decode_mma left,
//   where their counters are null. Sequences of one part are done already.
// grid (G * H / G * QUERIES, B); block 32 to 128; shared: warps * d * 4 bytes
// arrays: as attention_decode, with the same numbers; q, caches, block_tables and counters unread
// REF: numpy_ops.attention
// COST: bytes: 4 * (d + 2) for each part and row
extern "C" __global__ void __launch_bounds__(128, 4) attention_decode_merge(DECODE_PARAMETERS) {
    grid_dependency_launch();
    grid_dependency_wait();
    const DecodeBatch batch = DECODE_BATCH;
    const DecodeWork work = find_work<false>(batch, blockIdx.y);
    if (work.sequence < 0 || work.num_parts == 1) return;
    const DecodeTile tile = find_tile<1>(batch, work, blockIdx.x, heads_per_group * QUERIES);
    if (tile.num_rows <= 0) return;
    const Partials partials = {partial_values, partial_states};
    float* scratch = reinterpret_cast<float*>(dynamic_shared());
    merge_rows(batch, work, partials, tile.first_token, tile.group, tile.first_row, 1, scratch, out);
}
