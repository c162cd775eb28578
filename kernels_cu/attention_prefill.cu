// Attention of ragged queries (a chunk and what lies before it) straight from the paged cache, on
// tensor cores (mma.sync, from 8.0) for 16-bit types; attention_prefill_plain.cu has the rest.
//
// Of a quantised cache codes are copied, and widened once for all warps to a tile of scalar_t that the
// products read. Keys' scales are multiplied into the scores, values' into the weights.
//
// HEAD_SIZE      a multiple of 16
// TILE_WARPS, WARP_ROWS (16 or 32), KEY_TILE (a multiple of 16), STAGES (from 2), MIN_BLOCKS
//                shape of a tile; nanocupy/ops/launch_attention_prefill.py chooses it
// QUERIES_STAY   1 keeps the queries in registers, 0 reads them from shared memory at each use
#include "attention_prefill.cuh"
#include "codes.cuh"

// Whether this build has attention_prefill; else its entry is empty and must not be launched.
#define TENSOR_CORES \
    (HAS_MMA && SCALAR != 0 && (CACHE == SCALAR || QUANTIZED) && HEAD_SIZE % 16 == 0)

#ifndef TILE_WARPS
#define TILE_WARPS 4
#endif
#ifndef WARP_ROWS
#define WARP_ROWS (HEAD_SIZE <= 128 ? 32 : 16)
#endif
#ifndef KEY_TILE
#define KEY_TILE (HEAD_SIZE <= 128 ? 64 : 32)
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 2
#endif
#ifndef QUERIES_STAY
#define QUERIES_STAY (HEAD_SIZE * WARP_ROWS <= 64 * 32)
#endif

constexpr int THREADS = TILE_WARPS * 32;

#if TENSOR_CORES

constexpr int TILE_ROWS = TILE_WARPS * WARP_ROWS;
constexpr int ROW_TILES = WARP_ROWS / 16;  // 16 rows each, of a warp
constexpr int KEY_GROUPS = KEY_TILE / 8;   // columns of score fragments
constexpr int HEAD_GROUPS = HEAD_SIZE / 8;

// Rows in shared memory: pieces of 16 bytes, placed so that 8 rows' pieces of one column lie in
// different banks: exchanged by the row's number, or one piece of padding where that can't be.
constexpr int PIECES = HEAD_SIZE / 8;
constexpr bool EXCHANGED = PIECES % 8 == 0;
constexpr int ROW_PIECES = EXCHANGED ? PIECES : PIECES | 1;
constexpr int QUERY_BYTES = TILE_ROWS * ROW_PIECES * 16;
constexpr int KEY_BYTES = KEY_TILE * ROW_PIECES * 16;
constexpr int CODE_BYTES = KEY_TILE * HEAD_SIZE;
constexpr int STAGE_BYTES = 2 * (QUANTIZED ? CODE_BYTES : KEY_BYTES);  // keys, then values

static_assert(WARP_ROWS % 16 == 0 && KEY_TILE % 16 == 0 && KEY_TILE <= THREADS && STAGES >= 2, "");

__device__ __forceinline__ int place(int row, int piece) {
    return (row * ROW_PIECES + (EXCHANGED ? piece ^ (row & 7) : piece)) * 16;
}

// Where a lane reads its rows of fragments: `lane_row` is the start of the lane's row, the row's
// number is lane's modulo 8, `turn` comes from lane_turn, `piece` is even and known when compiled.
// One exclusive or and one sum for all rows and columns that differ by constants.
__device__ __forceinline__ int lane_turn(int odd_piece) {
    return (EXCHANGED ? odd_piece ^ (lane_id() & 7) : odd_piece) * 16;
}
__device__ __forceinline__ const unsigned char* lane_piece(
    const unsigned char* lane_row, int turn, int piece) {
    if (!EXCHANGED) return lane_row + turn + piece * 16;
    return lane_row + (turn ^ (piece & 6) * 16) + (piece & ~7) * 16;
}

// Start the copies of one tile of keys and values. offsets: of its rows, -1 for zeros.
__device__ __forceinline__ void copy_keys(
    unsigned char* stage, const cache_t* keys, const cache_t* values, const int64_t* offsets) {
    constexpr int WIDTH = 16 / sizeof(cache_t), ROW = HEAD_SIZE / WIDTH;  // pieces of 16 bytes
    constexpr int TOTAL = KEY_TILE * ROW;
#pragma unroll 2  // more would hold addresses in registers that the fragments need
    for (int i = 0; i < (TOTAL + THREADS - 1) / THREADS; ++i) {
        const int index = i * THREADS + threadIdx.x;
        if (TOTAL % THREADS != 0 && index >= TOTAL) break;
        const int row = index / ROW, piece = index % ROW;
        const int64_t offset = offsets[row];
        const bool valid = offset >= 0;
        const int64_t source = (valid ? offset : 0) + piece * WIDTH;
        unsigned char* target = stage + (QUANTIZED ? index * 16 : place(row, piece));
        cp_async_16_or_zero(target, keys + source, valid);
        cp_async_16_or_zero(target + STAGE_BYTES / 2, values + source, valid);
    }
}

#if QUANTIZED
// The codes of a stage, as scalar_t, to the tile that the products read: keys, then values.
__device__ __forceinline__ void widen_keys(unsigned char* tile, const unsigned char* stage) {
    constexpr int ROW = HEAD_SIZE / 16, TOTAL = KEY_TILE * ROW;
#pragma unroll 2
    for (int i = threadIdx.x; i < 2 * TOTAL; i += THREADS) {
        const int index = i % TOTAL, kind = i / TOTAL;
        const int row = index / ROW, piece = index % ROW * 2;
        uint4 low, high;
        widen_in_order(*reinterpret_cast<const uint4*>(stage + i * 16), low, high);
        unsigned char* target = tile + kind * KEY_BYTES;
        *reinterpret_cast<uint4*>(target + place(row, piece)) = low;
        *reinterpret_cast<uint4*>(target + place(row, piece + 1)) = high;
    }
}

// The scales of a row's key and value, 0 where it has none.
__device__ __forceinline__ float2 scales_at(
    const scale_t* key_scales, const scale_t* value_scales, int64_t offset) {
    if (offset < 0) return make_float2(0.0f, 0.0f);
    return make_float2(
        to_float(key_scales[offset / HEAD_SIZE]), to_float(value_scales[offset / HEAD_SIZE]));
}

// Where the scale of a row of the tile is kept: of each 16 rows a lane's four lie together.
__device__ __forceinline__ int step_place(int row) {
    return row / 16 * 16 + row % 8 / 2 * 4 + row % 16 / 8 * 2 + row % 2;
}

// This lane's scales of rows 16 * k + 2t, + 2t + 1, + 2t + 8, + 2t + 9, t = lane % 4. They are read
// where they are wanted: ahead of the products they would take registers from the fragments.
__device__ __forceinline__ void load_steps(const float* steps, int k, float (&out)[4]) {
    const uint4 bits = ld_shared_16(steps + k * 16 + lane_id() % 4 * 4);
    out[0] = float_of(bits.x);
    out[1] = float_of(bits.y);
    out[2] = float_of(bits.z);
    out[3] = float_of(bits.w);
}

// Multiply each column of fragments by its row's scale, and by `factor`.
__device__ __forceinline__ void scale_columns(
    float (&columns)[ROW_TILES][KEY_GROUPS][4], const float* steps, float factor) {
#pragma unroll
    for (int k = 0; k < KEY_TILE / 16; ++k) {
        float own[4];
        load_steps(steps, k, own);
#pragma unroll
        for (int i = 0; i < 4; ++i) own[i] *= factor;
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                columns[m][2 * k + i / 4][i % 4] *= own[i / 4 * 2 + i % 2];
            }
        }
    }
}
#endif

#endif  // TENSOR_CORES

// attention_prefill: causal attention of ragged queries over the paged cache, on tensor cores
// grid (G * (T * R / TILE_ROWS + B)), block (TILE_WARPS * 32), shared QUERY_BYTES + STAGES *
//     STAGE_BYTES, and 2 * KEY_BYTES where the cache is quantised, R = H / G
// q [T, H, d] scalar_t, aligned to 16; key_cache, value_cache [N, G, P, d] cache_t, aligned to 16;
// key_scales, value_scales [N, G, P] scale_t where the cache is quantised, else unused; query_starts [B + 1] int32; kv_lens [B] int32, at least the sequence's queries; block_tables
// [B, M] int32; out [T, H, d] scalar_t, aligned to 16; scale above 0; B, H, G, P, M from 1;
// T * R below 2**31
// REF: numpy_ops.attention
// COST: bytes 4 T H d + 2 d G (sum of kv_lens) * bytes of cache_t at least; flops 4 H d sum over
//     queries of keys
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) attention_prefill(
    const scalar_t* q, const cache_t* key_cache,
    const cache_t* value_cache, const scale_t* key_scales,
    const scale_t* value_scales, const int32_t* query_starts,
    const int32_t* kv_lens, const int32_t* block_tables,
    scalar_t* out, float scale, int32_t num_sequences, int32_t num_heads,
    int32_t num_kv_heads, int32_t block_size, int32_t num_columns) {
    grid_dependency_launch();
    grid_dependency_wait();
#if TENSOR_CORES
    __shared__ int64_t offsets[STAGES][KEY_TILE];
    __shared__ RowTile tile;  // not in registers, which the fragments fill
    unsigned char* const query_rows = dynamic_shared();
#if QUANTIZED
    __shared__ __align__(16) float steps[STAGES][2][KEY_TILE];  // scales of keys, of values
    unsigned char* const widened = query_rows + QUERY_BYTES;
    unsigned char* const stages = widened + 2 * KEY_BYTES;
    ValueUnit unit;
#else
    unsigned char* const stages = query_rows + QUERY_BYTES;
#endif
    const int group = num_heads / num_kv_heads;
    const int kv_head = blockIdx.x % num_kv_heads;
    const int lane = lane_id(), thread = threadIdx.x;

    RowTile found;
    if (!find_tile(query_starts, kv_lens, num_sequences, group, TILE_ROWS,
                   blockIdx.x / num_kv_heads, found)) {
        return;
    }
    if (thread == 0) tile = found;
    block_sync();
    const int32_t* table = block_tables + static_cast<int64_t>(tile.sequence) * num_columns;
    const int num_key_tiles = (tile.num_keys + KEY_TILE - 1) / KEY_TILE;

    // Offsets are looked up by one thread a row, a step before the copies that need them; rows that
    // nobody sees have none: they may hold anything, and their column of the table too.
    for (int i = thread; i < STAGES * KEY_TILE; i += THREADS) {
        offsets[i / KEY_TILE][i % KEY_TILE] =
            i < tile.num_keys ? cache_offset(table, i, block_size, num_kv_heads, kv_head) : -1;
    }
    for (int i = thread; i < TILE_ROWS * PIECES; i += THREADS) {
        const int row = tile.first_row + i / PIECES, piece = i % PIECES;
        const bool valid = row < tile.num_rows;
        const int64_t source =
            query_offset(tile, valid ? row : 0, group, num_heads, kv_head) + piece * 8;
        cp_async_16_or_zero(query_rows + place(i / PIECES, piece), q + source, valid);
    }
    block_sync();
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) {
        if (stage < num_key_tiles) {
            copy_keys(stages + stage * STAGE_BYTES, key_cache, value_cache, offsets[stage]);
#if QUANTIZED
            if (thread < KEY_TILE) {
                const float2 own = scales_at(key_scales, value_scales, offsets[stage][thread]);
                steps[stage][0][step_place(thread)] = own.x;
                steps[stage][1][step_place(thread)] = own.y;
            }
#endif
        }
        cp_async_commit();
    }

    // What this thread holds: of each 16 rows of the warp, rows lane / 4 and that + 8.
    const int warp_row = tile.first_row + warp_id() * WARP_ROWS;
    const int first_seen = tile.first_position + warp_row / group;  // last key of the warp's first
    const int last_seen =                                           // ... and last row, -1 if none
        warp_row < tile.num_rows
            ? tile.first_position + (min(warp_row + WARP_ROWS, tile.num_rows) - 1) / group
            : -1;
    const float exponent_scale = scale * LOG2_E;
    float sums[ROW_TILES][HEAD_GROUPS][4];  // of weighted values
    float row_max[ROW_TILES][2], row_sum[ROW_TILES][2];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < HEAD_GROUPS; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
        }
        row_max[m][0] = row_max[m][1] = -infinity();
        row_sum[m][0] = row_sum[m][1] = 0.0f;
    }

    // Where this lane reads fragments: rows and pieces of the four matrices of an ldmatrix.
    unsigned char* const own_rows = query_rows + warp_id() * WARP_ROWS * ROW_PIECES * 16;
    const int row_step = 16 * ROW_PIECES * 16;  // bytes of 16 rows
    const int low_row = (lane & 15) * ROW_PIECES * 16, low_turn = lane_turn(lane >> 4);
    const int key_row = ((lane & 7) + (lane >> 4) * 8) * ROW_PIECES * 16;
    const int key_turn = lane_turn(lane >> 3 & 1);
#if QUERIES_STAY
    uint32_t queries[ROW_TILES][HEAD_SIZE / 16][4];
#endif

    int stage = 0;
    for (int j = 0; j < num_key_tiles; ++j) {
        cp_async_wait<STAGES - 2>();
        block_sync();  // tile j is there, and nobody reads tile j - 1 or its offsets any more
        const int next = stage == 0 ? STAGES - 1 : stage - 1;  // of tile j + STAGES - 1
        if (j + STAGES - 1 < num_key_tiles) {
            copy_keys(stages + next * STAGE_BYTES, key_cache, value_cache, offsets[next]);
        }
        cp_async_commit();

        const int first_key = j * KEY_TILE;
#if QUANTIZED
        const bool has_next = j + STAGES - 1 < num_key_tiles && thread < KEY_TILE;
        float2 next_steps = make_float2(0.0f, 0.0f);  // under way while this tile is widened
        if (has_next) next_steps = scales_at(key_scales, value_scales, offsets[next][thread]);
        widen_keys(widened, stages + stage * STAGE_BYTES);
        if (has_next) {
            steps[next][0][step_place(thread)] = next_steps.x;
            steps[next][1][step_place(thread)] = next_steps.y;
        }
        block_sync();  // the tile is whole
        const unsigned char* keys = widened + key_row;
        const unsigned char* values = widened + KEY_BYTES + low_row;
#else
        const unsigned char* keys = stages + stage * STAGE_BYTES + key_row;
        const unsigned char* values = stages + stage * STAGE_BYTES + KEY_BYTES + low_row;
#endif
#if QUERIES_STAY
        if (j == 0) {
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
                for (int k = 0; k < HEAD_SIZE / 16; ++k) {
                    ldmatrix_x4(
                        queries[m][k],
                        lane_piece(own_rows + low_row, low_turn, 2 * k) + m * row_step);
                }
            }
        }
#endif
        if (first_key <= last_seen) {
            float scores[ROW_TILES][KEY_GROUPS][4];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
                for (int n = 0; n < KEY_GROUPS; ++n) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) scores[m][n][i] = 0.0f;
                }
            }
#pragma unroll
            for (int k = 0; k < HEAD_SIZE / 16; ++k) {
#if !QUERIES_STAY
                uint32_t queries[ROW_TILES][4];
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
                    ldmatrix_x4(
                        queries[m], lane_piece(own_rows + low_row, low_turn, 2 * k) + m * row_step);
                }
#endif
#pragma unroll
                for (int n = 0; n < KEY_TILE / 16; ++n) {
                    uint32_t b[4];
                    ldmatrix_x4(b, lane_piece(keys, key_turn, 2 * k) + n * row_step);
#pragma unroll
                    for (int m = 0; m < ROW_TILES; ++m) {
#if QUERIES_STAY
                        const uint32_t(&a)[4] = queries[m][k];
#else
                        const uint32_t(&a)[4] = queries[m];
#endif
                        mma_m16n8k16<scalar_t>(scores[m][2 * n], a, b[0], b[1]);
                        mma_m16n8k16<scalar_t>(scores[m][2 * n + 1], a, b[2], b[3]);
                    }
                }
            }

#if QUANTIZED
            float raised = 1.0f;  // what the sums' unit has become smaller by
            scale_columns(scores, steps[stage][0], 1.0f);
            if (ValueUnit::NEEDED) {
                uint32_t largest = 0;  // by their bits, in which a NaN comes last
#pragma unroll
                for (int k = 0; k < KEY_TILE / 16; ++k) {
                    float own[4];
                    load_steps(steps[stage][1], k, own);
#pragma unroll
                    for (int i = 0; i < 4; ++i) largest = max(largest, bits_of(own[i]));
                }
                largest = max(largest, shuffle_xor(largest, 1));
                largest = max(largest, shuffle_xor(largest, 2));
                raised = unit.raise(float_of(largest));
            }
#endif

            if (first_key + KEY_TILE - 1 > first_seen) {
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int row = warp_row + m * 16 + h * 8 + lane / 4;
                        const int seen = tile.first_position + row / group;
#pragma unroll
                        for (int n = 0; n < KEY_GROUPS; ++n) {
                            const int key = first_key + n * 8 + lane % 4 * 2;
                            if (key > seen) scores[m][n][2 * h] = -infinity();
                            if (key + 1 > seen) scores[m][n][2 * h + 1] = -infinity();
                        }
                    }
                }
            }

            // Every row sees position 0, which lies in the first tile: maxima are finite then.
            bool is_raised = false;
            float factor[ROW_TILES][2];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float largest = row_max[m][h];
#pragma unroll
                    for (int n = 0; n < KEY_GROUPS; ++n) {
                        largest = fmaxf(
                            largest, fmaxf(scores[m][n][2 * h], scores[m][n][2 * h + 1]));
                    }
                    largest = warp_max<4>(largest);
                    factor[m][h] = exp2_approx((row_max[m][h] - largest) * exponent_scale);
                    is_raised = is_raised || row_max[m][h] != largest;
                    row_max[m][h] = largest;
                    const float shift = largest * exponent_scale;
                    float sum = 0.0f;
#pragma unroll
                    for (int n = 0; n < KEY_GROUPS; ++n) {
#pragma unroll
                        for (int i = 2 * h; i < 2 * h + 2; ++i) {
                            const float weight =
                                exp2_approx(scores[m][n][i] * exponent_scale - shift);
                            scores[m][n][i] = weight;
                            sum += weight;
                        }
                    }
                    row_sum[m][h] = row_sum[m][h] * factor[m][h] + sum;
#if QUANTIZED
                    if (ValueUnit::NEEDED) {
                        factor[m][h] *= raised;
                        is_raised = is_raised || raised != 1.0f;
                    }
#endif
                }
            }
#if QUANTIZED
            scale_columns(scores, steps[stage][1], ValueUnit::NEEDED ? unit.inverse() : 1.0f);
#endif
            if (warp_ballot(is_raised)) {  // seldom after the first tiles
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
                    for (int n = 0; n < HEAD_GROUPS; ++n) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) sums[m][n][i] *= factor[m][i / 2];
                    }
                }
            }

#pragma unroll
            for (int k = 0; k < KEY_TILE / 16; ++k) {
                uint32_t weights[ROW_TILES][4];
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float(&pair)[4] = scores[m][2 * k + i / 2];
                        weights[m][i] =
                            pack_pair<scalar_t>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
                    }
                }
#pragma unroll
                for (int n = 0; n < HEAD_SIZE / 16; ++n) {
                    uint32_t b[4];
                    ldmatrix_x4_trans(b, lane_piece(values, low_turn, 2 * n) + k * row_step);
#pragma unroll
                    for (int m = 0; m < ROW_TILES; ++m) {
                        mma_m16n8k16<scalar_t>(sums[m][2 * n], weights[m], b[0], b[1]);
                        mma_m16n8k16<scalar_t>(sums[m][2 * n + 1], weights[m], b[2], b[3]);
                    }
                }
            }
        }
        if (thread < KEY_TILE) {
            const int ahead = (j + STAGES) * KEY_TILE + thread;
            offsets[stage][thread] =
                ahead < tile.num_keys
                    ? cache_offset(table, ahead, block_size, num_kv_heads, kv_head)
                    : -1;
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    if (last_seen < 0) return;

    // Each warp's results go through the rows of its queries, so that they leave 16 bytes a thread.
    warp_sync();
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float inverse = 1.0f / warp_sum<4>(row_sum[m][h]);
#if QUANTIZED
            if (ValueUnit::NEEDED) inverse *= unit.value();
#endif
            const int row = m * 16 + h * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < HEAD_GROUPS; ++n) {
                *reinterpret_cast<uint32_t*>(own_rows + place(row, n) + lane % 4 * 4) =
                    pack_pair<scalar_t>(
                        sums[m][n][2 * h] * inverse, sums[m][n][2 * h + 1] * inverse);
            }
        }
    }
    warp_sync();
    for (int i = lane; i < WARP_ROWS * PIECES; i += 32) {
        const int row = i / PIECES, piece = i % PIECES;
        if (warp_row + row >= tile.num_rows) break;
        const int64_t target = query_offset(tile, warp_row + row, group, num_heads, kv_head);
        store_vec(
            out + target + piece * 8,
            *reinterpret_cast<const Vec<scalar_t, 8>*>(own_rows + place(row, piece)));
    }
#endif  // TENSOR_CORES
}
