// Rotary position embedding: the angles of a step, and q, k, v on their way to attention.
//
// HEAD_SIZE   even, 256 at most: of rope_write_kv (rope_table takes any)
#include "reduce.cuh"
#include "types.cuh"

#ifndef HEAD_SIZE
#define HEAD_SIZE 128
#endif

// rope_table: cosines and sines of every token's angles
// grid T, block any multiple of 32, no shared memory
// positions  int32 [T]
// rope_lens  int32 [T], or null: plain frequencies. Otherwise dynamic NTK by that length
// inv_freq   float [half]
// out        float [T, 2, half], cosines then sines, times attention_factor
// The angle is the float product of position and frequency; the stretched frequency is worked out
// in double, as an error of one unit in its last place is large at position 100 000.
// REF: numpy_ops.rope_table
// COST: 8 * T * half bytes written; two trigonometric functions for each pair
extern "C" __global__ void rope_table(
    const int32_t* __restrict__ positions, const int32_t* __restrict__ rope_lens,
    const float* __restrict__ inv_freq, double ntk_factor, int32_t ntk_context,
    float attention_factor, float* __restrict__ out, int32_t half) {
    const int64_t t = blockIdx.x;
    const float position = static_cast<float>(positions[t]);
    double stretch = 1.0;
    if (rope_lens != nullptr && rope_lens[t] > ntk_context) {
        stretch = ntk_factor * rope_lens[t] / ntk_context - (ntk_factor - 1.0);
    }
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        float frequency = inv_freq[i];
        if (stretch > 1.0) {
            const double exponent = i * (-2.0 / max(2 * half - 2, 1));
            frequency = static_cast<float>(frequency * pow(stretch, exponent));
        }
        const float angle = position * frequency;
        out[(2 * t) * half + i] = cosf(angle) * attention_factor;
        out[(2 * t + 1) * half + i] = sinf(angle) * attention_factor;
    }
}

constexpr int HALF = HEAD_SIZE / 2;
constexpr int PAIR_WIDTH = HALF % 2 == 0 ? 2 : 1;  // pairs that one lane takes at a time
constexpr int PAIR_STEP = 32 * PAIR_WIDTH;
constexpr int PAIR_ROUNDS = (HALF + PAIR_STEP - 1) / PAIR_STEP;

// rope_write_kv: norm q and k by head, rotate them, write k and v to the paged cache
// grid (T, ceil((H + 2 * G) / warps)), block any multiple of 32: a warp takes a head of a token
// qkv          scalar_t [T, H + 2 * G, HEAD_SIZE]: heads of q, of k, of v
// q_norm       scalar_t [HEAD_SIZE], or null: no norm; k_norm the same
// rope         float [T, 2, HEAD_SIZE / 2] of rope_table
// slots        int32 [T]: block * P + row; 0 to P - 1 are the null block's, for padding
// key_cache    cache_t [N, G, P, HEAD_SIZE], value_cache the same
// q_out        scalar_t [T, H, HEAD_SIZE]
// Arrays start at multiples of 16 bytes. Two tokens may share a slot only in the null block.
// REF: numpy_ops.rope_write_kv
// COST: T * (H + 2 * G) * HEAD_SIZE values read and written once
extern "C" __global__ void rope_write_kv(
    const scalar_t* __restrict__ qkv, const scalar_t* __restrict__ q_norm,
    const scalar_t* __restrict__ k_norm, float eps, const float* __restrict__ rope,
    const int32_t* __restrict__ slots, cache_t* __restrict__ key_cache,
    cache_t* __restrict__ value_cache, scalar_t* __restrict__ q_out, int32_t H, int32_t G,
    int32_t P) {
    const int64_t t = blockIdx.x;
    const int head = blockIdx.y * num_warps() + warp_id();
    if (head >= H + 2 * G) return;  // whole warps leave, and no barrier follows
    const bool is_query = head < H, is_value = head >= H + G;
    const scalar_t* from = qkv + (t * (H + 2 * G) + head) * HEAD_SIZE;

    float low[PAIR_ROUNDS][PAIR_WIDTH], high[PAIR_ROUNDS][PAIR_WIDTH];
    float squares = 0.0f;
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r) {
        const int i = r * PAIR_STEP + lane_id() * PAIR_WIDTH;
        if (i >= HALF) break;
        load_floats<scalar_t, PAIR_WIDTH>(from + i, low[r]);
        load_floats<scalar_t, PAIR_WIDTH>(from + HALF + i, high[r]);
#pragma unroll
        for (int j = 0; j < PAIR_WIDTH; ++j) {
            squares += low[r][j] * low[r][j] + high[r][j] * high[r][j];
        }
    }
    const scalar_t* norm = is_value ? nullptr : is_query ? q_norm : k_norm;
    float inverse = 1.0f;
    if (norm != nullptr) inverse = 1.0f / sqrtf(warp_sum(squares) / HEAD_SIZE + eps);

    const int slot = slots[t];
    const int64_t kv_head = is_query ? 0 : (head - H) % G;
    const int64_t at = ((slot / P * static_cast<int64_t>(G) + kv_head) * P + slot % P) * HEAD_SIZE;
    const float* cosines = rope + 2 * t * HALF;
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r) {
        const int i = r * PAIR_STEP + lane_id() * PAIR_WIDTH;
        if (i >= HALF) break;
        if (norm != nullptr) {
#pragma unroll
            for (int j = 0; j < PAIR_WIDTH; ++j) {
                low[r][j] *= inverse * to_float(norm[i + j]);
                high[r][j] *= inverse * to_float(norm[HALF + i + j]);
            }
        }
        if (is_value) {
            cache_store_vec<PAIR_WIDTH>(value_cache + at + i, low[r]);
            cache_store_vec<PAIR_WIDTH>(value_cache + at + HALF + i, high[r]);
            continue;
        }
        float cosine[PAIR_WIDTH], sine[PAIR_WIDTH], first[PAIR_WIDTH], second[PAIR_WIDTH];
        load_floats<float, PAIR_WIDTH>(cosines + i, cosine);
        load_floats<float, PAIR_WIDTH>(cosines + HALF + i, sine);
#pragma unroll
        for (int j = 0; j < PAIR_WIDTH; ++j) {
            first[j] = low[r][j] * cosine[j] - high[r][j] * sine[j];
            second[j] = high[r][j] * cosine[j] + low[r][j] * sine[j];
        }
        if (is_query) {
            scalar_t* to = q_out + (t * H + head) * HEAD_SIZE;
            store_floats<scalar_t, PAIR_WIDTH>(to + i, first);
            store_floats<scalar_t, PAIR_WIDTH>(to + HALF + i, second);
        } else {
            cache_store_vec<PAIR_WIDTH>(key_cache + at + i, first);
            cache_store_vec<PAIR_WIDTH>(key_cache + at + HALF + i, second);
        }
    }
}
