// Products of up to 256 tokens on warpgroups' tensor cores, for compute capability 9.0a, with what
// follows folded in: bias, residual, SwiGLU, float32 logits; the norm before is a kernel of its own
// (norm.cu). The macros, TOKENS, OUT_TILE and SHARERS, stand in wide.cuh;
// nanocupy/ops/launch_wide.py chooses them.
//
// Launched with or without programmatic overlap: what is read before grid_dependency_wait() is
// weights and biases only, and dependents may start at once.
#include "wide.cuh"

// wide_linear: out = x @ weight.T + bias, of num_rows tokens
// grid tiles of OUT_TILE rows of weights, SHARERS up, * splits, which are 1, 2, 4 or 8, and at most
//   K / 64 up; clusters of SHARERS * splits, up to 8, along x
// block 128 * (OUT_TILE / 64) * (1 up to 128 TOKENS, else 2) + 64
// shared 2048 + the larger of weight_stages * 128 * OUT_TILE + input_stages * 128 * TOKENS, and
//   4 * TOKENS * OUT_TILE * (2 - 1 / splits)
// inputs   a map of x scalar_t [num_rows, K], 1 to TOKENS rows, with a box [TOKENS / SHARERS,
//   64]
// weights  a map of weight scalar_t [R, K] with a box [OUT_TILE, 64]; both swizzled by 128 bytes
// bias     scalar_t [R], or null
// out      scalar_t [num_rows, R], no part of the inputs
// weight_stages, input_stages: steps of 64 inputs in the rings, from 2 (1 where a block has one) to 16
// K and R multiples of 8; bias and out aligned to 16 bytes; 16-bit types; all from 1. x may come from
// the kernel before, weights and bias may not.
// REF: numpy_ops.norm_linear
// COST: (R * K + R) * sizeof(scalar_t) bytes, and 2 * num_rows * R * K flops
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, RESIDENT_BLOCKS) wide_linear(
    const __grid_constant__ TensorMap inputs, const __grid_constant__ TensorMap weights,
    const scalar_t* bias, scalar_t* out, int32_t num_rows, int32_t R, int32_t K,
    int32_t weight_stages, int32_t input_stages) {
    grid_dependency_launch();
#if WIDE_BUILD
    run_wide<false>(
        WideMatrix{&inputs, &weights, num_rows, R, K, weight_stages, input_stages},
        WideLinear{bias, out});
#endif
}

// wide_linear_add: residual += x @ weight.T + bias, rounded once, of num_rows tokens
// grid, block, cluster, shared memory as wide_linear
// inputs    as there
// weights   a map of weight scalar_t [D, K]
// bias      scalar_t [D], or null
// residual  residual_t [num_rows, D], read and written, no part of the inputs
// The rest as wide_linear; residual may come from the kernel before.
// REF: numpy_ops.linear_add
// COST: (D * K + D) * sizeof(scalar_t) bytes, and 2 * num_rows * D * K flops
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, RESIDENT_BLOCKS) wide_linear_add(
    const __grid_constant__ TensorMap inputs, const __grid_constant__ TensorMap weights,
    const scalar_t* bias, residual_t* residual, int32_t num_rows, int32_t D, int32_t K,
    int32_t weight_stages, int32_t input_stages) {
    grid_dependency_launch();
#if WIDE_BUILD
    run_wide<false>(
        WideMatrix{&inputs, &weights, num_rows, D, K, weight_stages, input_stages},
        WideAdd{bias, residual});
#endif
}

// wide_swiglu: out = silu(gate) * up, [gate | up] = x @ weight.T + bias, of num_rows tokens
// grid, block, cluster, shared memory as wide_linear; a tile is OUT_TILE / 2 outputs
// inputs   as there
// weights  a map of weight scalar_t [2 F, K], rows of gate, then of up, with a box [OUT_TILE / 2, 64]
// bias     scalar_t [2 F], or null
// out      scalar_t [num_rows, F], no part of the inputs
// The rest as wide_linear.
// REF: numpy_ops.norm_swiglu
// COST: 2 * (F * K + F) * sizeof(scalar_t) bytes, and 4 * num_rows * F * K flops
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, RESIDENT_BLOCKS) wide_swiglu(
    const __grid_constant__ TensorMap inputs, const __grid_constant__ TensorMap weights,
    const scalar_t* bias, scalar_t* out, int32_t num_rows, int32_t F, int32_t K,
    int32_t weight_stages, int32_t input_stages) {
    grid_dependency_launch();
#if WIDE_BUILD
    run_wide<true>(
        WideMatrix{&inputs, &weights, num_rows, F, K, weight_stages, input_stages},
        WideSwiglu{bias, out, F});
#endif
}

// wide_logits: out = x @ weight.T in float32, of num_rows tokens
// grid, block, cluster, shared memory as wide_linear
// inputs   as there
// weights  a map of weight scalar_t [V, K]
// out      float [num_rows, V]
// The rest as wide_linear.
// REF: numpy_ops.lm_head
// COST: V * K * sizeof(scalar_t) + num_rows * V * 4 bytes, and 2 * num_rows * V * K flops
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, RESIDENT_BLOCKS) wide_logits(
    const __grid_constant__ TensorMap inputs, const __grid_constant__ TensorMap weights, float* out,
    int32_t num_rows, int32_t V, int32_t K, int32_t weight_stages, int32_t input_stages) {
    grid_dependency_launch();
#if WIDE_BUILD
    run_wide<false>(
        WideMatrix{&inputs, &weights, num_rows, V, K, weight_stages, input_stages},
        WideLogits{out});
#endif
}
