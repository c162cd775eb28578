// What a block of a persistent decode step keeps in shared memory, and where.
//
// MAX_NORM_INPUTS   D of the model
#pragma once

#define MAX_QUERY_VALUES 0  // of attention: registers are short here
#include "attention_decode_mma.cuh"
#include "decode_step_pipeline.cuh"

#ifndef MAX_NORM_INPUTS
#define MAX_NORM_INPUTS 4096
#endif

// Pointers of a layer, a row of the table that the launch is given.
struct StepLayer {
    const scalar_t* attention_norm;  // [D]
    const weight_t* qkv;             // [(H + 2 * G) * d, D]
    const scalar_t* qkv_bias;        // [(H + 2 * G) * d], or null; the other biases likewise
    const scalar_t* q_norm;          // [d], or null
    const scalar_t* k_norm;          // [d], or null
    cache_t* key_cache;              // [N, G, P, d]
    cache_t* value_cache;            // [N, G, P, d]
    const weight_t* o;               // [D, H * d]
    const scalar_t* o_bias;          // [D]
    const scalar_t* ffn_norm;        // [D]
    const weight_t* gate_up;         // [2 * F, D]: rows of gate, then of up
    const scalar_t* gate_up_bias;    // [2 * F]
    const weight_t* down;            // [D, F]
    const scalar_t* down_bias;       // [D]
#if HAS_CODES
    float units[4];                  // of the scales and offsets of qkv, o, gate_up and down
#endif
};

// What the step's attention is told, the same for all layers.
struct StepAttention {
    const int32_t* block_tables;  // [SEQUENCES, table_width]
    float eps, scale;
    int num_kv_heads, heads_per_group, block_size, table_width;
    int max_parts, part_tokens;  // most parts of a context; positions that are worth one

    __device__ __forceinline__ int num_parts(int kv_len) const {
        return max(1, min(max_parts, (kv_len + part_tokens - 1) / part_tokens));
    }
    __device__ __forceinline__ int num_items() const {
        return SEQUENCES * num_kv_heads * max_parts;
    }
    __device__ __forceinline__ int64_t part_row(int sequence, int head, int part) const {
        const int num_heads = num_kv_heads * heads_per_group;
        return (static_cast<int64_t>(sequence) * num_heads + head) * max_parts + part;
    }
};

// Where the words are that blocks hand to each other, one behind the other.
struct StepWords {
    uint64_t* x;           // [SEQUENCES, D / 2], the residual stream
    uint64_t* qkv;         // [SEQUENCES, (H + 2 * G) * d / 2]
    uint64_t* attended;    // [SEQUENCES, H * d / 2], of contexts of one part
    uint64_t* activated;   // [SEQUENCES, F / 2]
    uint64_t* part_values; // [SEQUENCES, H, max_parts, d] floats, not divided by the sum yet
    uint64_t* part_states; // [SEQUENCES, H, max_parts, 2], maximum and sum
};

// The model and the step, as every part of the kernel is told; the same for all layers.
struct StepSizes {
    int num_layers, hidden_size, ffn_size, vocab_size, q_size, qkv_size;
    int tile_inputs;  // inputs of a product that shared memory has room for

    // Product `kind` of a layer, or that of the head, without its pointers.
    __device__ __forceinline__ StepProduct product(int kind) const {
        StepProduct product;
        product.kind = kind;
        product.num_outputs = kind == QKV       ? qkv_size
                              : kind == GATE_UP ? ffn_size
                              : kind == HEAD    ? vocab_size
                                                : hidden_size;
        product.num_inputs = kind == OUTPUT ? q_size : kind == DOWN ? ffn_size : hidden_size;
        product.weight = nullptr;
        product.bias = nullptr;
        return product;
    }
};

// The weights of a product, and its bias.
__device__ __forceinline__ void set_pointers(StepProduct& product, const StepLayer& layer) {
    const int kind = product.kind;
    product.weight = kind == QKV       ? layer.qkv
                     : kind == OUTPUT  ? layer.o
                     : kind == GATE_UP ? layer.gate_up
                                       : layer.down;
    product.bias = kind == QKV       ? layer.qkv_bias
                   : kind == OUTPUT  ? layer.o_bias
                   : kind == GATE_UP ? layer.gate_up_bias
                                     : layer.down_bias;
#if HAS_CODES
    product.unit = layer.units[kind];
#endif
}

// Units of a product whose sums are merged at one barrier, at which all warps stand still. Of codes of one
// sequence these are as many rows as there are threads, and the next ones wait until their sums are read;
// else one buffer is written while one is read.
constexpr int GROUP_ROWS = HAS_CODES && SEQUENCES == 1 ? 256 : SEQUENCES <= 2 ? 128 : 64;
constexpr int SUM_BUFFERS = GROUP_ROWS == 256 ? 1 : 2;
constexpr int GROUP_UNITS = GROUP_ROWS / UNIT_ROWS;
constexpr int GROUP_SUMS = GROUP_UNITS * USER_WARPS * SEQUENCES * UNIT_ROWS;
static_assert(GROUP_UNITS * UNIT_ROWS * SEQUENCES <= USERS, "a thread for each sum");

// Everything that is copied to lies at multiples of 16 bytes, as all sizes before it are.
struct alignas(128) StepMemory {
    unsigned char stages[RING_STAGES][STAGE_BYTES];  // the ring of weights
    float partials[SUM_BUFFERS][GROUP_SUMS];  // the warps' sums
    scalar_t norm[MAX_NORM_INPUTS];  // weights of the next norm
    // Attention: each warp's keys and values, then in their place the warps' sums [heads of a group,
    // d]; the queries as a tile; the new key and value; weights of the norms of q and k; cosines and
    // sines.
    scalar_t positions[USER_WARPS][RING];
    scalar_t queries[16 * STRIDE];
    scalar_t fresh[2][HEAD_SIZE];
    scalar_t head_norms[2][HEAD_SIZE];
    float rope[SEQUENCES][HEAD_SIZE];
    StepLayer layers[2];  // this one and the next, in turn
    uint64_t is_full[RING_STAGES];
    uint64_t is_free[RING_STAGES];
    float states[USER_WARPS][8][2];  // maxima and sums of the warps
    StepAttention attention;
    StepWords words;
    StepShare shares[HEAD + 1];  // this block's, of the products by kind
    int32_t kv_lens[4];
    int32_t slots[4];
};
static_assert(RING * sizeof(scalar_t) >= 8 * HEAD_SIZE * sizeof(float), "room for the sums");

__device__ __forceinline__ StepMemory& step_memory() {
    return *reinterpret_cast<StepMemory*>(dynamic_shared());
}
// The inputs of a product, rows of tokens: as many as the launch has room for.
__device__ __forceinline__ scalar_t* step_inputs() {
    return reinterpret_cast<scalar_t*>(dynamic_shared() + sizeof(StepMemory));
}
__device__ __forceinline__ scalar_t* step_norm() { return step_memory().norm; }
__device__ __forceinline__ float* step_partials() { return step_memory().partials[0]; }
