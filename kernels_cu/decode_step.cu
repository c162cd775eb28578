// A whole decode step of few sequences in one launch: all layers and the logits.
//
// The blocks, one on every multiprocessor, go through the layers together and meet at a barrier of
// the grid where one part needs what others have made: five times a layer. The time of a step is that
// of reading the weights, as long as the reading never stops; so a warp of each block does nothing
// else, and fills a ring of shared memory with the weights of the parts to come while the others meet
// (decode_step_pipeline.cuh).
//
// SEQUENCES         sequences, 1 to 8, one token each
// RING_STAGES  stages of weights; STAGES: steps of 16 positions that a warp has under way
// SCALAR       1, 2: the types of weights, residual stream and cache are the same, of 16 bits
// HEAD_SIZE    d, a multiple of 16. nanocupy/ops/launch_decode_step.py chooses the launch.
#include "bulk_copy.cuh"
#include "types.cuh"

#if HAS_BULK_COPY && SCALAR != 0 && CACHE == SCALAR && RESIDUAL == SCALAR && HEAD_SIZE % 16 == 0
#define HAS_DECODE_STEP 1
#include "decode_step_attention.cuh"

// Pointers of a layer, a row of the table that the launch is given.
struct StepLayer {
    const scalar_t* attention_norm;  // [D]
    const scalar_t* qkv;             // [(H + 2 * G) * d, D]
    const scalar_t* qkv_bias;        // [(H + 2 * G) * d], or null; the other biases likewise
    const scalar_t* q_norm;          // [d], or null
    const scalar_t* k_norm;          // [d], or null
    cache_t* key_cache;              // [N, G, P, d]
    cache_t* value_cache;            // [N, G, P, d]
    const scalar_t* o;               // [D, H * d]
    const scalar_t* o_bias;          // [D]
    const scalar_t* ffn_norm;        // [D]
    const scalar_t* gate_up;         // [2 * F, D]: rows of gate, then of up
    const scalar_t* gate_up_bias;    // [2 * F]
    const scalar_t* down;            // [D, F]
    const scalar_t* down_bias;       // [D]
};

// Every block has come, and what its threads wrote before is seen after. `counter` is the same for
// all barriers, and needs no reset: its highest bit flips each time. All threads that compute come.
__device__ __forceinline__ void grid_barrier(uint32_t* counter) {
    users_sync();
    if (threadIdx.x == 0) {
        device_fence();
        const uint32_t own = blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u;
        const uint32_t before = atomic_add(counter, own);
        while (((load_acquire(counter) ^ before) & 0x80000000u) == 0) spin_pause();
    }
    users_sync();
}
#endif

// decode_step: logits of SEQUENCES tokens, the next of SEQUENCES sequences, from their embeddings
// grid (blocks), all resident at once: at most one for each multiprocessor; block 288; from 9.0;
//   shared: RING_STAGES * (8 * 2112 + 16) + PARTIAL_BYTES + NORM_BYTES + max(SEQUENCES * 2 * (min(tile_inputs, widest
//   inputs, up to 64s) + 32), the tiles of attention: decode_step_attention.cuh)
// layers        uint64 [L, 14], addresses as in StepLayer; all aligned to 16 bytes
// final_norm    scalar_t [D]; head scalar_t [V, D]
// rope          float [SEQUENCES, 2, d / 2]; slots int32 [SEQUENCES]; kv_lens int32 [SEQUENCES], with the new
//               token; 0 marks a place without a sequence; block_tables int32 [SEQUENCES, M]
// x             scalar_t [SEQUENCES, D], the embeddings; the residual stream is left there
// qkv, attended, activated   scalar_t [SEQUENCES, (H + 2 * G) * d], [SEQUENCES, H * d], [SEQUENCES, F]
// part_values   float [SEQUENCES, H, max_parts, d]; part_states float [SEQUENCES, H, max_parts, 2]
// logits        float [SEQUENCES, V]
// barrier       uint32 [1], 0 before the first launch, then left as it is
// widths D, F, H * d multiples of 32, H / G at most 16; tile_inputs a multiple of 1024, at least D;
//   where it is less than H * d or F, a block has GROUP_UNITS units of D outputs at most
// REF: numpy_ops.norm_linear, numpy_ops.attend, numpy_ops.linear_add, numpy_ops.norm_swiglu and again
//   numpy_ops.linear_add for every layer, then numpy_ops.lm_head
// COST: bytes of all weights, and of the contexts' keys and values; 2 flops a weight and token
extern "C" __global__ void __launch_bounds__(288, 1) decode_step(
    const uint64_t* layers, const scalar_t* final_norm, const scalar_t* head, const float* rope,
    const int32_t* slots, const int32_t* kv_lens, const int32_t* block_tables, scalar_t* x,
    scalar_t* qkv, scalar_t* attended, scalar_t* activated, float* part_values, float* part_states,
    float* logits, uint32_t* barrier, float eps, float scale, int num_layers, int hidden_size,
    int ffn_size, int vocab_size, int num_kv_heads, int heads_per_group, int block_size,
    int table_width, int tile_inputs, int max_parts, int part_tokens) {
#if HAS_DECODE_STEP
    grid_dependency_launch();
    const StepLayer* table = reinterpret_cast<const StepLayer*>(layers);
    const int q_size = num_kv_heads * heads_per_group * HEAD_SIZE;
    const int qkv_size = q_size + 2 * num_kv_heads * HEAD_SIZE;
    make_ring();
    RingPlace place;

    if (warp_id() == USER_WARPS) {  // weights wait for nobody
        for (int i = 0; i < num_layers; ++i) {
            const StepLayer& layer = table[i];
            place = bring_matrix<false>(place, {layer.qkv, qkv_size, hidden_size}, tile_inputs);
            place = bring_matrix<false>(place, {layer.o, hidden_size, q_size}, tile_inputs);
            place = bring_matrix<true>(place, {layer.gate_up, ffn_size, hidden_size}, tile_inputs);
            place = bring_matrix<false>(place, {layer.down, hidden_size, ffn_size}, tile_inputs);
        }
        place = bring_matrix<false>(place, {head, vocab_size, hidden_size}, tile_inputs);
        grid_dependency_wait();
        return;
    }

    const NormInputs normed = {x, eps, hidden_size};
    request_norm(table[0].attention_norm, hidden_size);
    grid_dependency_wait();
    const StepAttention attention = {
        qkv, rope, slots, kv_lens, block_tables, attended, part_values, part_states, eps, scale,
        num_kv_heads, heads_per_group, block_size, table_width, max_parts, part_tokens};
    const AttendedInputs results = {attention, q_size};
#pragma unroll 1
    for (int i = 0; i < num_layers; ++i) {
        const StepLayer layer = table[i];
        if (i > 0) grid_barrier(barrier);
        prefetch_positions(attention, layer.key_cache, layer.value_cache);
        multiply_matrix<false>(place, {layer.qkv, qkv_size, hidden_size}, tile_inputs, normed,
                               StoreOutputs{layer.qkv_bias, qkv, qkv_size});
        grid_barrier(barrier);
        attend_items(attention, layer.q_norm, layer.k_norm, layer.key_cache, layer.value_cache);
        grid_barrier(barrier);
        multiply_matrix<false>(place, {layer.o, hidden_size, q_size}, tile_inputs, results,
                               AddToStream{layer.o_bias, x, hidden_size});
        request_norm(layer.ffn_norm, hidden_size);
        grid_barrier(barrier);
        multiply_matrix<true>(place, {layer.gate_up, ffn_size, hidden_size}, tile_inputs, normed,
                              StoreSwiglu{layer.gate_up_bias, activated, ffn_size});
        grid_barrier(barrier);
        multiply_matrix<false>(place, {layer.down, hidden_size, ffn_size}, tile_inputs,
                               PlainInputs{activated, ffn_size},
                               AddToStream{layer.down_bias, x, hidden_size});
        request_norm(i + 1 < num_layers ? table[i + 1].attention_norm : final_norm, hidden_size);
    }
    grid_barrier(barrier);
    multiply_matrix<false>(place, {head, vocab_size, hidden_size}, tile_inputs, normed,
                           StoreLogits{logits, vocab_size});
#endif
}
