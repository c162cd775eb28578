// Small-batch products: ROWS tokens (1 to 8) with a matrix of weights, with the norm before and what
// follows folded in. The weights are read once, 16 bytes a lane, and their bytes set the time.
//
// Every block puts the inputs of all tokens into shared memory, once: rounded, normalised where the
// op has a norm. Where they are more than the launch allows (k_tile), a block takes them a tile at a
// time, and again for each pass over its rows: right, but slower; the host makes k_tile as large as
// it can. See gemv.cuh for the macros WARPS, ROWS_PER_WARP, RING, UNROLL, TENSOR, PREFETCH,
// MIN_BLOCKS.
//
// Launched with or without programmatic overlap: what is read before grid_dependency_wait() is
// weights only, and dependents may start at once.
#include "gemv.cuh"

// norm_linear_rows: out = rms_norm(x) @ weight.T + bias, for ROWS tokens
// grid any (nanocupy/ops/launch_gemv.py), block 32 * WARPS, shared memory, in bytes,
// RING * 512 * WARPS + (ROWS + 1) * (min(k_tile, K up to 256s) + 32) * sizeof(scalar_t) +
// ROWS * (K / 256 up) * 4
// x            residual_t [ROWS, K]
// norm_weight  scalar_t [K]
// weight       scalar_t [R, K]
// bias         scalar_t [R], or null
// out          scalar_t [ROWS, R], no part of the inputs
// k_tile a multiple of 256; k_splits a power of two up to WARPS; R, K >= 1. Any K; where rows of
// weights are not multiples of 16 bytes, slowly. x may come from the kernel before, weights may not.
// REF: numpy_ops.norm_linear
// COST: (R * K + R) * sizeof(scalar_t) bytes, and 2 * ROWS * R * K flops
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) norm_linear_rows(
    const residual_t* x, const scalar_t* norm_weight, float eps, const scalar_t* weight,
    const scalar_t* bias, scalar_t* out, int32_t R, int32_t K, int32_t k_tile, int32_t k_splits) {
    const GemvInput<residual_t, scalar_t, true> input = {x, nullptr, norm_weight, eps, K, k_tile};
    run_gemv<false>(GemvMatrix{weight, R, K, k_splits}, input, StoreLinear{bias, out, R});
}

// linear_add_rows: residual += x @ weight.T + bias, rounded once, for ROWS tokens
// grid, block as norm_linear_rows; shared memory RING * 512 * WARPS +
// ROWS * (min(k_tile, K up to 256s) + 32) * sizeof(scalar_t) bytes
// x         scalar_t [ROWS, K]
// weight    scalar_t [D, K]
// bias      scalar_t [D], or null
// residual  residual_t [ROWS, D], read and written
// The rest as norm_linear_rows; residual may come from the kernel before.
// REF: numpy_ops.linear_add
// COST: (D * K + D) * sizeof(scalar_t) bytes, and 2 * ROWS * D * K flops
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) linear_add_rows(
    const scalar_t* x, const scalar_t* weight, const scalar_t* bias, residual_t* residual,
    int32_t D, int32_t K, int32_t k_tile, int32_t k_splits) {
    const GemvInput<scalar_t, scalar_t, false> input = {x, nullptr, nullptr, 0.0f, K, k_tile};
    run_gemv<false>(GemvMatrix{weight, D, K, k_splits}, input, AddToResidual{bias, residual, D});
}

// norm_swiglu_rows: out = silu(gate) * up, [gate | up] = rms_norm(x) @ weight.T + bias, ROWS tokens
// grid, block, shared memory as norm_linear_rows
// x            residual_t [ROWS, K]
// norm_weight  scalar_t [K]
// weight       scalar_t [2 F, K]: rows of gate, then of up
// bias         scalar_t [2 F], or null
// out          scalar_t [ROWS, F], no part of the inputs
// The rest as norm_linear_rows. A warp reads matching rows of gate and up side by side.
// REF: numpy_ops.norm_swiglu
// COST: 2 * (F * K + F) * sizeof(scalar_t) bytes, and 4 * ROWS * F * K flops
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) norm_swiglu_rows(
    const residual_t* x, const scalar_t* norm_weight, float eps, const scalar_t* weight,
    const scalar_t* bias, scalar_t* out, int32_t F, int32_t K, int32_t k_tile, int32_t k_splits) {
    const GemvInput<residual_t, scalar_t, true> input = {x, nullptr, norm_weight, eps, K, k_tile};
    run_gemv<true>(GemvMatrix{weight, F, K, k_splits}, input, StoreSwiglu{bias, out, F});
}

// lm_head_rows: logits of ROWS sampled rows, out = rms_norm(x[rows]) @ weight.T
// grid, block, shared memory as norm_linear_rows
// x            residual_t [T, K]
// rows         int32 [ROWS], each in [0, T)
// norm_weight  scalar_t [K]
// weight       scalar_t [V, K]
// out          float [ROWS, V]
// The rest as norm_linear_rows. A head whose type is not that of the layers is a build of its own.
// REF: numpy_ops.lm_head
// COST: V * K * sizeof(scalar_t) + ROWS * V * 4 bytes, and 2 * ROWS * V * K flops
extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS) lm_head_rows(
    const residual_t* x, const int32_t* rows, const scalar_t* norm_weight, float eps,
    const scalar_t* weight, float* out, int32_t V, int32_t K, int32_t k_tile, int32_t k_splits) {
    const GemvInput<residual_t, scalar_t, true> input = {x, rows, norm_weight, eps, K, k_tile};
    run_gemv<false>(GemvMatrix{weight, V, K, k_splits}, input, StoreLogits{out, V});
}
