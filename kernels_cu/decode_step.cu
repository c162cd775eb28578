// A whole decode step of few sequences in one launch: all layers and, where all weights are of 16 bits,
// the logits.
//
// The blocks, one on every multiprocessor, go through the layers together; five times a layer each
// needs what others have made, and waits for just that (decode_step_words.cuh). The time of a step is
// that of reading the weights, as long as the reading never stops; so a warp of each block does
// nothing else, and fills a ring of shared memory with the weights of the parts to come while the
// others wait (decode_step_pipeline.cuh). Everything that waits for nobody is asked for early.
//
// SEQUENCES    sequences, 1 to 4, one token each
// RING_STAGES  stages of weights; STAGES: steps of 16 positions that a warp has under way
// SCALAR       1, 2: the types of weights, residual stream and cache are the same, of 16 bits
// WEIGHT_KIND, GROUP   where the matrices of the layers are codes: decode_step_pipeline.cuh
// HAS_HEAD     1: the logits, too, of a head of 16 bits. 0: the step ends with the residual stream, and
//              the head is a launch of its own, whatever its form; so it is with codes
// HEAD_SIZE    d, a multiple of 16. nanocupy/ops/launch_decode_step.py chooses the launch.
#include "bulk_copy.cuh"
#include "types.cuh"

#ifndef HAS_HEAD
#ifdef WEIGHT_KIND
#define HAS_HEAD 0
#else
#define HAS_HEAD 1
#endif
#endif

#if HAS_BULK_COPY && SCALAR != 0 && CACHE == SCALAR && RESIDUAL == SCALAR && HEAD_SIZE % 16 == 0
#define HAS_DECODE_STEP 1
#include "decode_step_attention.cuh"
#include "decode_step_merge.cuh"
#include "decode_step_products.cuh"
#include "decode_step_weights.cuh"
#include "hopper.cuh"

// What of a step is the same for all layers, to shared memory. All threads that compute come.
__device__ __forceinline__ void load_batch(
    const StepSizes& sizes, const StepAttention& attention, const StepWords& words,
    const float* rope, const int32_t* kv_lens, const int32_t* slots) {
    StepMemory& memory = step_memory();
#pragma unroll 1
    for (int i = threadIdx.x; i < SEQUENCES * HEAD_SIZE; i += USERS) {
        memory.rope[i / HEAD_SIZE][i % HEAD_SIZE] = rope[i];
    }
    if (threadIdx.x == 0) {
        memory.attention = attention;
        memory.words = words;
    }
    // Once, as each takes divisions, one behind the other, that all would wait for before every product.
    if (threadIdx.x <= HEAD) {
        memory.shares[threadIdx.x] = StepShare(sizes.product(static_cast<int>(threadIdx.x)));
    }
    if (threadIdx.x < SEQUENCES) {
        memory.kv_lens[threadIdx.x] = kv_lens[threadIdx.x];
        memory.slots[threadIdx.x] = slots[threadIdx.x];
    }
    users_sync();
}

__device__ __forceinline__ void request_layer(const StepLayer* table, int i) {
    constexpr int VECTORS = sizeof(StepLayer) / 16;
    if (threadIdx.x < VECTORS) {
        cp_async_16(reinterpret_cast<uint4*>(&step_memory().layers[i % 2]) + threadIdx.x,
                    reinterpret_cast<const uint4*>(table + i) + threadIdx.x);
    }
}

// Where in x [SEQUENCES, D] the value of the residual stream is that this thread has from one product to
// the next; null where it has none.
__device__ __forceinline__ scalar_t* own_value(scalar_t* x, const StepSizes& sizes) {
    const StepProduct product = sizes.product(OUTPUT);
    const StepShare& share = step_memory().shares[OUTPUT];
    const Finisher own(product);
    if (!own.finishes(product, share.first_unit, share.end_unit - share.first_unit)) return nullptr;
    return x + own.token * sizes.hidden_size + own.output_of(share.first_unit);
}

// The words of all buffers, one behind the other.
__device__ __forceinline__ StepWords words_from(
    uint64_t* words, const StepSizes& sizes, int num_heads, int max_parts) {
    StepWords found;
    found.x = words;
    found.qkv = found.x + SEQUENCES * sizes.hidden_size / 2;
    found.attended = found.qkv + SEQUENCES * sizes.qkv_size / 2;
    found.activated = found.attended + SEQUENCES * sizes.q_size / 2;
    found.part_values = found.activated + SEQUENCES * sizes.ffn_size / 2;
    found.part_states =
        found.part_values + static_cast<int64_t>(SEQUENCES) * num_heads * max_parts * HEAD_SIZE;
    return found;
}
#endif

// decode_step: from embeddings to logits, of SEQUENCES tokens, the next of SEQUENCES sequences
// grid (blocks), all resident at once: at most one for each multiprocessor; block 384; from 9.0;
//   shared: StepMemory of decode_step_memory.cuh and, behind it, SEQUENCES * 2 * (min(tile_inputs,
//   the most inputs of a product, up to 64s) + 32); with int4, + 4 * (SEQUENCES, or 4 for 3) * (these
//   inputs, up to 128s) / GROUP
// layers        uint64 [L, 14], addresses as in StepLayer; all aligned to 16 bytes; with codes [L, 16],
//               of which the last two words are four floats
// final_norm    scalar_t [D]; head scalar_t [V, D]; without HAS_HEAD null, as are logits
// rope          float [SEQUENCES, 2, d / 2]; slots int32 [SEQUENCES]; kv_lens int32 [SEQUENCES], with
//               the new token; 0 marks a place without a sequence; one at least is not 0
// block_tables  int32 [SEQUENCES, M]
// x             scalar_t [SEQUENCES, D], the embeddings; without HAS_HEAD the residual stream behind the
//               last layer takes their place
// logits        float [SEQUENCES, V]
// words         uint64, aligned to 16 bytes: SEQUENCES * ((D + (H + 2 * G) * d + H * d + F) / 2 +
//               H * max_parts * (d + 2)); 0 before the first launch, then left to the next ones,
//               whatever their number of sequences
// moments       uint32 [2], likewise: the last moment of the launches before, and who has left
// widths D, F, H * d multiples of 32, H / G at most 8; tile_inputs a multiple of 1024, at least D;
//   a block has GROUP_UNITS units of D outputs at most
// REF: numpy_ops.norm_linear, numpy_ops.attend, numpy_ops.linear_add, numpy_ops.norm_swiglu and again
//   numpy_ops.linear_add for every layer, then numpy_ops.lm_head
// COST: bytes of all weights, or of their codes and scales, and of the contexts' keys and values;
//   2 flops a weight and token
extern "C" __global__ void __launch_bounds__(384, 1) decode_step(
    const uint64_t* layers, const scalar_t* final_norm, const scalar_t* head, const float* rope,
    const int32_t* slots, const int32_t* kv_lens, const int32_t* block_tables, scalar_t* x,
    float* logits, uint64_t* words, uint32_t* moments, float eps, float scale, int num_layers,
    int hidden_size, int ffn_size, int vocab_size, int num_kv_heads, int heads_per_group,
    int block_size, int table_width, int tile_inputs, int max_parts, int part_tokens) {
#if HAS_DECODE_STEP
    grid_dependency_launch();
    const StepLayer* table = reinterpret_cast<const StepLayer*>(layers);
    const int q_size = num_kv_heads * heads_per_group * HEAD_SIZE;
    const StepSizes sizes = {num_layers, hidden_size, ffn_size, vocab_size, q_size,
                             q_size + 2 * num_kv_heads * HEAD_SIZE, tile_inputs};
    make_ring();
    if (warp_id() >= USER_WARPS) {
#if HAS_WGMMA
        give_registers<40>();
#endif
#if HAS_CODES
        if (threadIdx.x == USERS) bring_codes(sizes, table);  // which wait for nobody
#else
        if (warp_id() == USER_WARPS) bring_weights(sizes, table, head);  // which wait for nobody
#endif
        grid_dependency_wait();
        return;
    }
#if HAS_WGMMA
    take_registers<232>();
#endif

    request_layer(table, 0);
    request_norm(table[0].attention_norm, hidden_size);
    cp_async_commit();
    grid_dependency_wait();
    cp_async_wait<0>();
    load_batch(sizes,
               {block_tables, eps, scale, num_kv_heads, heads_per_group, block_size, table_width,
                max_parts, part_tokens},
               words_from(words, sizes, num_kv_heads * heads_per_group, max_parts), rope, kv_lens, slots);
    // The keys and values of this block's first item lie in the same rows of every layer's cache.
    uint32_t row = 0;
    if (static_cast<int>(blockIdx.x) < step_memory().attention.num_items()) {
        row = row_of_lane(StepItem(blockIdx.x), 0);
    }
    // Every product has a moment, and attention one behind that of QKV; none is 0.
    const Moment start = load_volatile(moments) + 1;
    const StepWords& buffers = step_memory().words;
    RingPlace place;
    float own_stream = 0.0f;
    if (scalar_t* own = own_value(x, sizes)) own_stream = to_float(*own);
#pragma unroll 1
    for (int i = 0; i < 4 * num_layers + HAS_HEAD; ++i) {
        const int kind = i < 4 * num_layers ? i % 4 : HEAD, number = i / 4;
        const bool is_last = number + 1 >= num_layers;
        const Moment moment = start + 2 * i;
        StepProduct product = sizes.product(kind);
#if HAS_HEAD
        product.weight = head;
#endif
        if (kind != HEAD) set_pointers(product, step_memory().layers[number % 2]);
        if (i == 0) {
            request_attention(step_memory().layers[0], row);
            cp_async_commit();
        }
        const auto load = [&](const TileRows& rows, int first, int count) {
            if (kind == OUTPUT) {
                load_attended(rows, start + 2 * (i - 1) + 1, q_size, first, count);
                users_sync();
            } else if (kind == DOWN) {
                load_words(rows, buffers.activated, start + 2 * (i - 1), ffn_size, first, count, 0,
                           SEQUENCES);
                users_sync();
            } else {
                load_normed(rows, x, i == 0 ? 0 : start + 2 * (i - 1), eps, hidden_size);
            }
        };
        uint64_t* out = kind == QKV       ? buffers.qkv
                        : kind == GATE_UP ? buffers.activated
                                          : buffers.x;
        run_product(place, product, moment, out, logits, own_stream, tile_inputs, load);

        // What the next parts need and waits for nobody.
        const StepLayer& next = step_memory().layers[(number + 1) % 2];
        if (kind == QKV) {
            request_norm(step_memory().layers[number % 2].ffn_norm, hidden_size);
            if (!is_last) request_layer(table, number + 1);
            cp_async_commit();
            attend_items(step_memory().layers[number % 2], moment, moment + 1);
        } else if (kind == GATE_UP) {
            if (HAS_HEAD || !is_last) {
                request_norm(is_last ? final_norm : next.attention_norm, hidden_size);
            }
            if (!is_last) request_attention(next, row);
            cp_async_commit();
        }
    }
#if !HAS_HEAD
    // Whoever has summed the last product had all activations, which came after all that read the
    // embeddings: nobody needs these any more.
    if (scalar_t* own = own_value(x, sizes)) *own = from_float<scalar_t>(own_stream);
#endif
    // Whoever is the last to leave says from which moment on the next launch may count.
    users_sync();
    if (threadIdx.x == 0 && atomic_count_to(moments + 1, gridDim.x - 1) == gridDim.x - 1) {
        *moments = start + 8 * num_layers + 7;  // a multiple of 8 for ever: no moment is 0
    }
#endif
}
