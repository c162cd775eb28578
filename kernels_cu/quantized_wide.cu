// Products of up to 64 tokens with weights of int8, int4 or fp8 codes on warpgroups' tensor cores, for
// compute capability 9.0a and bfloat16, with what follows folded in: bias, residual, SwiGLU, float32
// logits; the norm before is a kernel of its own (norm.cu). The macros stand in quantized_format.cuh
// (WEIGHT_KIND, GROUP) and quantized_wide_parts.cuh (TOKENS, OUT_TILE, WARPGROUPS, STAGES,
// INPUT_STAGES); nanocupy/ops/launch_quantized_wide.py chooses them.
//
// Launched with or without programmatic overlap: what is read before grid_dependency_wait() is
// weights only, and dependents may start at once.
#include "quantized_wide.cuh"

// quantized_wide_linear: out = x @ weight.T + bias, of num_rows tokens
// grid a cluster for each tile of weights; clusters of 1, 2, 4 or 8 blocks along x, at most K / 128 up
// block 128 * WARPGROUPS + (64 up to 16 TOKENS, else 128)
// shared 128, and the more of: an inbox of 8 * OUT_TILE * cluster * (TOKENS / 2 / cluster up); and
//   1024 + INPUT_STAGES * TOKENS * 256 + STAGES * OUT_TILE / 16 * CHUNK_BYTES, with int4 and
//   TOKENS * 1536 / GROUP
// inputs  a map of x scalar_t [num_rows, K], 1 to TOKENS rows, with a box [TOKENS, 64], swizzled by 128
//   bytes
// packed  [R / 16 up, K / 128 up, CHUNK_BYTES], as quantized_format.cuh says
// unit    of scales and offsets, a power of two
// bias    scalar_t [R], or null
// out     scalar_t [num_rows, R], no part of the inputs
// K a multiple of 8; packed aligned to 16 bytes; any R; bfloat16; all from 1. x may come
// from the kernel before, weights may not.
// REF: numpy_ops.norm_linear
// COST: the packed bytes, R / 16 * K / 128 * CHUNK_BYTES, and 2 * num_rows * R * K flops
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) quantized_wide_linear(
    const __grid_constant__ TensorMap inputs, const uint8_t* packed, float unit,
    const scalar_t* bias, scalar_t* out, int32_t num_rows, int32_t R, int32_t K) {
    grid_dependency_launch();
#if WIDE_CODES
    run_wide_codes<false>(
        SkinnyMatrix{nullptr, nullptr, num_rows, R, K}, &inputs, PackedCodes{packed, unit},
        StoreLinear{bias, out, R});
#endif
}

// quantized_wide_linear_add: residual += x @ weight.T + bias, rounded once, of num_rows tokens
// grid, block, cluster, shared memory as quantized_wide_linear
// inputs    as there
// packed    of [D, K], as there
// bias      scalar_t [D], or null
// residual  residual_t [num_rows, D], read and written
// The rest as quantized_wide_linear; residual may come from the kernel before.
// REF: numpy_ops.linear_add
// COST: the packed bytes, and 2 * num_rows * D * K flops
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) quantized_wide_linear_add(
    const __grid_constant__ TensorMap inputs, const uint8_t* packed, float unit,
    const scalar_t* bias, residual_t* residual, int32_t num_rows, int32_t D, int32_t K) {
    grid_dependency_launch();
#if WIDE_CODES
    run_wide_codes<false>(
        SkinnyMatrix{nullptr, nullptr, num_rows, D, K}, &inputs, PackedCodes{packed, unit},
        AddToResidual{bias, residual, D});
#endif
}

// quantized_wide_swiglu: out = silu(gate) * up, [gate | up] = x @ weight.T + bias, of num_rows tokens
// grid, block, cluster, shared memory as quantized_wide_linear; a tile is OUT_TILE / 2 outputs
// inputs  as there
// packed  of rows 0 to 7 of gate, 0 to 7 of up, 8 to 15 of gate …: [F / 8 up, K / 128 up, CHUNK_BYTES]
// bias    scalar_t [2 F], gate, then up; or null
// out     scalar_t [num_rows, F], no part of the inputs
// The rest as quantized_wide_linear.
// REF: numpy_ops.norm_swiglu
// COST: the packed bytes, and 4 * num_rows * F * K flops
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) quantized_wide_swiglu(
    const __grid_constant__ TensorMap inputs, const uint8_t* packed, float unit,
    const scalar_t* bias, scalar_t* out, int32_t num_rows, int32_t F, int32_t K) {
    grid_dependency_launch();
#if WIDE_CODES
    run_wide_codes<true>(
        SkinnyMatrix{nullptr, nullptr, num_rows, F, K}, &inputs, PackedCodes{packed, unit},
        StoreSwiglu{bias, out, F});
#endif
}

// quantized_wide_logits: out = x @ weight.T in float32, of num_rows tokens
// grid, block, cluster, shared memory as quantized_wide_linear
// inputs  as there
// packed  of [V, K], as there
// out     float [num_rows, V]
// The rest as quantized_wide_linear.
// REF: numpy_ops.lm_head
// COST: the packed bytes, num_rows * V * 4 bytes, and 2 * num_rows * V * K flops
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) quantized_wide_logits(
    const __grid_constant__ TensorMap inputs, const uint8_t* packed, float unit, float* out,
    int32_t num_rows, int32_t V, int32_t K) {
    grid_dependency_launch();
#if WIDE_CODES
    run_wide_codes<false>(
        SkinnyMatrix{nullptr, nullptr, num_rows, V, K}, &inputs, PackedCodes{packed, unit},
        StoreLogits{out, V});
#endif
}
