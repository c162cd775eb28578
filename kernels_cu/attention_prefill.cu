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
#include "attention_prefill_tile.cuh"

// attention_prefill: causal attention of ragged queries over the paged cache, on tensor cores
// grid (G * (T * R / TILE_ROWS + B)), block (TILE_WARPS * 32), shared QUERY_BYTES + STAGES *
//     STAGE_BYTES, and 2 * KEY_BYTES where the cache is quantised, R = H / G
// q [T, H, d] scalar_t, aligned to 16; key_cache, value_cache [N, G, P, d] cache_t, aligned to 16;
// key_scales, value_scales [N, G, P] scale_t where the cache is quantised, else unused;
// query_starts [B + 1] int32; kv_lens [B] int32, at least the sequence's queries; block_tables
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
