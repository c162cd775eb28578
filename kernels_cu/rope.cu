// Rotary position embedding: the angles of a step, and q, k, v on their way to attention.
//
// HEAD_SIZE   even, 256 at most: of rope_write_kv (rope_table takes any)
#ifndef HEAD_SIZE
#define HEAD_SIZE 128
#endif
#include "rope.cuh"

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
extern "C" __global__ void __launch_bounds__(1024) rope_table(
    const int32_t* positions, const int32_t* rope_lens, const float* inv_freq, double ntk_factor,
    int32_t ntk_context, float attention_factor, float* out, int32_t half) {
    grid_dependency_launch();
    grid_dependency_wait();
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

// rope_write_kv: norm q and k by head, rotate them, write k and v to the paged cache
// grid (T, ceil((H + 2 * G) / warps)), block any multiple of 32: a warp takes a head of a token
// qkv          scalar_t [T, H + 2 * G, HEAD_SIZE]: heads of q, of k, of v
// q_norm       scalar_t [HEAD_SIZE], or null: no norm; k_norm the same
// rope         float [T, 2, HEAD_SIZE / 2] of rope_table
// slots        int32 [T]: block * P + row; 0 to P - 1 are the null block's, for padding
// key_cache    cache_t [N, G, P, HEAD_SIZE], value_cache the same
// key_scales   scale_t [N, G, P] where the cache is quantised, else unused; value_scales the same
// q_out        scalar_t [T, H, HEAD_SIZE]
// Arrays start at multiples of 16 bytes. Two tokens may share a slot only in the null block.
// REF: numpy_ops.rope_write_kv
// COST: T * (H + 2 * G) * HEAD_SIZE values read and written once, and 2 * T * G scales written
extern "C" __global__ void __launch_bounds__(1024) rope_write_kv(
    const scalar_t* qkv, const scalar_t* q_norm, const scalar_t* k_norm, float eps,
    const float* rope, const int32_t* slots, cache_t* key_cache, cache_t* value_cache,
    scale_t* key_scales, scale_t* value_scales, scalar_t* q_out, int32_t H, int32_t G, int32_t P) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int64_t t = blockIdx.x;
    const int head = blockIdx.y * num_warps() + warp_id();
    if (head >= H + 2 * G) return;  // whole warps leave, and no barrier follows
    const bool is_query = head < H, is_value = head >= H + G;
    const scalar_t* norm = is_value ? nullptr : is_query ? q_norm : k_norm;

    // All loads before the sum that the norm waits for.
    HeadPairs x = load_pairs(qkv + (t * (H + 2 * G) + head) * HEAD_SIZE);
    const int slot = slots[t];
    HeadPairs angles, weight;
    if (!is_value) angles = load_pairs(rope + t * HEAD_SIZE);
    if (norm != nullptr) {
        weight = load_pairs(norm);
        normalize_pairs(x, weight, eps);
    }
    if (!is_value) rotate_pairs(x, angles);
    if (is_query) {
        store_pairs(q_out + (t * H + head) * HEAD_SIZE, x);
    } else {
        cache_t* cache = is_value ? value_cache : key_cache;
        const int64_t at = slot_offset(slot, (head - H) % G, G, P);
#if QUANTIZED
        const float scale = scale_pairs(x);
        scale_t* scales = is_value ? value_scales : key_scales;
        if (lane_id() == 0) scales[at / HEAD_SIZE] = from_float<scale_t>(scale);
#endif
        cache_store_pairs(cache + at, x);
    }
}
