// Attention of ragged queries straight from the paged cache without tensor cores: float32, cards
// below 8.0, any head size, any type of cache.
#include "attention_prefill.cuh"

constexpr int PLAIN_THREADS = 128;
constexpr int PLAIN_LANES = 8;  // lanes that share a row
constexpr int PLAIN_STEP = PLAIN_THREADS / PLAIN_LANES;
constexpr int PLAIN_ROWS = 2 * PLAIN_STEP;  // each thread works on two rows, PLAIN_STEP apart
constexpr int PLAIN_KEYS = HEAD_SIZE <= 128 ? 32 : 16;
constexpr int PLAIN_PIECES = (HEAD_SIZE + 31) / 32;  // of 4 values, of a row, in a lane
constexpr int PLAIN_WIDTH = PLAIN_PIECES * 32;

// In value[0 .. 7] of each of 8 lanes, sum over the lanes: lane i gets the sum of value[i].
__device__ __forceinline__ float sum_scattered(float (&value)[PLAIN_LANES]) {
#pragma unroll
    for (int half = PLAIN_LANES / 2; half > 0; half /= 2) {
        const bool upper = lane_id() & half;
#pragma unroll
        for (int i = 0; i < half; ++i) {
            const float kept = upper ? value[half + i] : value[i];
            const float sent = upper ? value[i] : value[half + i];
            value[i] = kept + shuffle_xor(sent, half);
        }
    }
    return value[0];
}

// A row of keys or values into floats of shared memory, zeros where `source` is null; 4 values a
// thread. step: the scale of a quantised row.
__device__ __forceinline__ void load_plain(
    float* target, const cache_t* source, float step, int column) {
    float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (source != nullptr) {
        if (HEAD_SIZE % 4 == 0) {
            if (column < HEAD_SIZE) cache_load_vec<4>(source + column, x);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (column + i < HEAD_SIZE) x[i] = cache_load(source + column + i);
            }
        }
    }
    if (QUANTIZED) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] *= step;
    }
    store_floats<float, 4>(target + column, x);
}

// attention_prefill_plain: the same without tensor cores, all in float32
// grid (G * (T * R / 32 + B)), block (128), R = H / G
// q [T, H, d] scalar_t; key_cache, value_cache [N, G, P, d] cache_t, aligned to 4 values if d is a
// multiple of 4; key_scales, value_scales [N, G, P] scale_t where the cache is quantised, else
// unused; query_starts [B + 1] int32; kv_lens [B] int32, at least the sequence's queries;
// block_tables [B, M] int32; out [T, H, d] scalar_t; scale above 0; B, H, G, P, M from 1
// REF: numpy_ops.attention
// COST: bytes 2 T H d + 2 d G sum of kv_lens values at least; flops 4 H d sum over queries of keys
extern "C" __global__ void __launch_bounds__(PLAIN_THREADS) attention_prefill_plain(
    const scalar_t* q, const cache_t* key_cache,
    const cache_t* value_cache, const scale_t* key_scales,
    const scale_t* value_scales, const int32_t* query_starts,
    const int32_t* kv_lens, const int32_t* block_tables,
    scalar_t* out, float scale, int32_t num_sequences, int32_t num_heads,
    int32_t num_kv_heads, int32_t block_size, int32_t num_columns) {
    grid_dependency_launch();
    grid_dependency_wait();
    __shared__ __align__(16) float keys[PLAIN_KEYS][PLAIN_WIDTH];
    __shared__ __align__(16) float values[PLAIN_KEYS][PLAIN_WIDTH];
    const int group = num_heads / num_kv_heads;
    const int kv_head = blockIdx.x % num_kv_heads;
    const float exponent_scale = scale * LOG2_E;
    const int part = threadIdx.x % PLAIN_LANES;  // pieces part, part + 8, ... of a row are ours

    RowTile tile;
    if (!find_tile(query_starts, kv_lens, num_sequences, group, PLAIN_ROWS,
                   blockIdx.x / num_kv_heads, tile)) {
        return;
    }
    const int32_t* table = block_tables + static_cast<int64_t>(tile.sequence) * num_columns;

    float query[2][PLAIN_PIECES][4], sums[2][PLAIN_PIECES][4];
    int seen[2];  // last key of each row
    SoftmaxState state[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = tile.first_row + threadIdx.x / PLAIN_LANES + r * PLAIN_STEP;
        const bool valid = row < tile.num_rows;
        const scalar_t* source =
            q + query_offset(tile, valid ? row : 0, group, num_heads, kv_head);
        seen[r] = valid ? tile.first_position + row / group : 0;
        state[r] = softmax_start();
#pragma unroll
        for (int p = 0; p < PLAIN_PIECES; ++p) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = (p * PLAIN_LANES + part) * 4 + i;
                query[r][p][i] = column < HEAD_SIZE ? to_float(source[column]) : 0.0f;
                sums[r][p][i] = 0.0f;
            }
        }
    }

    for (int first_key = 0; first_key < tile.num_keys; first_key += PLAIN_KEYS) {
        block_sync();  // nobody reads the tile before any more
        for (int i = threadIdx.x; i < PLAIN_KEYS * (PLAIN_WIDTH / 4); i += PLAIN_THREADS) {
            const int row = i / (PLAIN_WIDTH / 4), column = i % (PLAIN_WIDTH / 4) * 4;
            const int position = first_key + row;
            const bool present = position < tile.num_keys;
            const int64_t offset =
                present ? cache_offset(table, position, block_size, num_kv_heads, kv_head) : 0;
            const int64_t cache_row = offset / HEAD_SIZE;
            load_plain(keys[row], present ? key_cache + offset : nullptr,
                       present ? cache_scale(key_scales, cache_row) : 0.0f, column);
            load_plain(values[row], present ? value_cache + offset : nullptr,
                       present ? cache_scale(value_scales, cache_row) : 0.0f, column);
        }
        block_sync();

        // Of 8 keys at a time, each lane of a row ends with the score of one.
        float weights[2][PLAIN_KEYS / PLAIN_LANES];
#pragma unroll
        for (int b = 0; b < PLAIN_KEYS / PLAIN_LANES; ++b) {
            float score[2][PLAIN_LANES];
#pragma unroll
            for (int k = 0; k < PLAIN_LANES; ++k) {
                score[0][k] = score[1][k] = 0.0f;
#pragma unroll
                for (int p = 0; p < PLAIN_PIECES; ++p) {
                    float key[4];
                    load_floats<float, 4>(
                        &keys[b * PLAIN_LANES + k][(p * PLAIN_LANES + part) * 4], key);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        score[0][k] += query[0][p][i] * key[i];
                        score[1][k] += query[1][p][i] * key[i];
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float sum = sum_scattered(score[r]);
                const int key = first_key + b * PLAIN_LANES + part;
                weights[r][b] = key <= seen[r] ? sum : -infinity();
            }
        }

#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float largest = weights[r][0];
#pragma unroll
            for (int b = 1; b < PLAIN_KEYS / PLAIN_LANES; ++b) {
                largest = fmaxf(largest, weights[r][b]);
            }
            // The maximum is subtracted before the scale is applied: large scores lose nothing.
            largest = fmaxf(state[r].max, warp_max<PLAIN_LANES>(largest));
            const float factor = exp2_approx((state[r].max - largest) * exponent_scale);
            state[r].max = largest;
            state[r].sum *= factor;
#pragma unroll
            for (int b = 0; b < PLAIN_KEYS / PLAIN_LANES; ++b) {
                weights[r][b] = exp2_approx((weights[r][b] - largest) * exponent_scale);
                state[r].sum += weights[r][b];  // of this lane's keys; the lanes are added last
            }
#pragma unroll
            for (int p = 0; p < PLAIN_PIECES; ++p) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[r][p][i] *= factor;
            }
        }

#pragma unroll
        for (int k = 0; k < PLAIN_KEYS; ++k) {
            const int source = (lane_id() & ~(PLAIN_LANES - 1)) + k % PLAIN_LANES;
            const float first = shuffle(weights[0][k / PLAIN_LANES], source);
            const float second = shuffle(weights[1][k / PLAIN_LANES], source);
#pragma unroll
            for (int p = 0; p < PLAIN_PIECES; ++p) {
                float value[4];
                load_floats<float, 4>(&values[k][(p * PLAIN_LANES + part) * 4], value);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    sums[0][p][i] += first * value[i];
                    sums[1][p][i] += second * value[i];
                }
            }
        }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float inverse = 1.0f / warp_sum<PLAIN_LANES>(state[r].sum);
        const int row = tile.first_row + threadIdx.x / PLAIN_LANES + r * PLAIN_STEP;
        if (row >= tile.num_rows) continue;
        scalar_t* target = out + query_offset(tile, row, group, num_heads, kv_head);
#pragma unroll
        for (int p = 0; p < PLAIN_PIECES; ++p) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = (p * PLAIN_LANES + part) * 4 + i;
                if (column < HEAD_SIZE) {
                    target[column] = from_float<scalar_t>(sums[r][p][i] * inverse);
                }
            }
        }
    }
}
