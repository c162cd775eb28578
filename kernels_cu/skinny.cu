// Products of 3 to 64 tokens on tensor cores, with what follows folded in: bias, residual, SwiGLU,
// float32 logits; the norm before is a kernel of its own (norm.cu), or folded in. The macros, TOKENS,
// OUT_TILE, WARPS_N, WARPS_K, K_STEP, STAGES, INPUTS_STAY and NORM_INPUTS, stand in skinny_parts.cuh.
//
// Launched with or without programmatic overlap: what is read before grid_dependency_wait() is
// weights only, and dependents may start at once.
#include "skinny.cuh"

// skinny_linear: out = x @ weight.T + bias, of num_rows tokens; x is rms_norm(x) with NORM_INPUTS
// grid any multiple of the cluster up to a cluster for each tile of weights, and just that with
//   clusters above 1, which exist from 9.0: 2, 4, 8 blocks along x, at most K / K_STEP up
// block 32 * WARPS_N * WARPS_K
// shared, with S = K / K_STEP up / cluster up, steps of a block in a tile: 128, an inbox of
//   8 * OUT_TILE * WARPS_K * cluster * (TOKENS / 2 / cluster up), a ring of min(STAGES, all steps of
//   the block) * 2 * K_STEP * (OUT_TILE, and TOKENS unless INPUTS_STAY), with INPUTS_STAY
//   S * 2 * K_STEP * TOKENS, with NORM_INPUTS S * 2 * K_STEP + (128 + 4 * TOKENS * cluster, up to
//   128s)
// x            scalar_t [num_rows, K], 1 to TOKENS rows
// norm_weight  scalar_t [K] with NORM_INPUTS, else, like eps, not read
// weight       scalar_t [R, K]
// bias         scalar_t [R], or null
// out          scalar_t [num_rows, R], no part of the inputs
// K a multiple of 8; x, norm_weight and weight aligned to 16 bytes; any R; 16-bit types; all from 1.
// x may come from the kernel before, weights may not.
// REF: numpy_ops.norm_linear
// COST: (R * K + R) * sizeof(scalar_t) bytes, and 2 * num_rows * R * K flops
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, RESIDENT_BLOCKS) skinny_linear(
    const scalar_t* x, const scalar_t* norm_weight, float eps, const scalar_t* weight,
    const scalar_t* bias, scalar_t* out, int32_t num_rows, int32_t R, int32_t K) {
    grid_dependency_launch();
#if SKINNY_ON_TENSOR_CORES
    run_skinny<false>(
        SkinnyMatrix{x, weight, num_rows, R, K, norm_weight, eps}, StoreLinear{bias, out, R});
#endif
}

// skinny_linear_add: residual += x @ weight.T + bias, rounded once, of num_rows tokens
// grid, block, cluster, shared memory as skinny_linear
// x         scalar_t [num_rows, K]
// weight    scalar_t [D, K]
// bias      scalar_t [D], or null
// residual  residual_t [num_rows, D], read and written
// The rest as skinny_linear, without NORM_INPUTS; residual may come from the kernel before.
// REF: numpy_ops.linear_add
// COST: (D * K + D) * sizeof(scalar_t) bytes, and 2 * num_rows * D * K flops
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, RESIDENT_BLOCKS) skinny_linear_add(
    const scalar_t* x, const scalar_t* weight, const scalar_t* bias, residual_t* residual,
    int32_t num_rows, int32_t D, int32_t K) {
    grid_dependency_launch();
#if SKINNY_ON_TENSOR_CORES
    run_skinny<false>(SkinnyMatrix{x, weight, num_rows, D, K}, AddToResidual{bias, residual, D});
#endif
}

// skinny_swiglu: out = silu(gate) * up, [gate | up] = x @ weight.T + bias, of num_rows tokens
// grid, block, cluster, shared memory as skinny_linear; a tile is OUT_TILE / 2 outputs
// x       scalar_t [num_rows, K]; norm_weight, eps as there
// weight  scalar_t [2 F, K]: rows of gate, then of up
// bias    scalar_t [2 F], or null
// out     scalar_t [num_rows, F], no part of the inputs
// The rest as skinny_linear.
// REF: numpy_ops.norm_swiglu
// COST: 2 * (F * K + F) * sizeof(scalar_t) bytes, and 4 * num_rows * F * K flops
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, RESIDENT_BLOCKS) skinny_swiglu(
    const scalar_t* x, const scalar_t* norm_weight, float eps, const scalar_t* weight,
    const scalar_t* bias, scalar_t* out, int32_t num_rows, int32_t F, int32_t K) {
    grid_dependency_launch();
#if SKINNY_ON_TENSOR_CORES
    run_skinny<true>(
        SkinnyMatrix{x, weight, num_rows, F, K, norm_weight, eps}, StoreSwiglu{bias, out, F});
#endif
}

// skinny_logits: out = x @ weight.T in float32, of num_rows tokens
// grid, block, cluster, shared memory as skinny_linear
// x       scalar_t [num_rows, K]
// weight  scalar_t [V, K]
// out     float [num_rows, V]
// The rest as skinny_linear, without NORM_INPUTS.
// REF: numpy_ops.lm_head
// COST: V * K * sizeof(scalar_t) + num_rows * V * 4 bytes, and 2 * num_rows * V * K flops
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, RESIDENT_BLOCKS) skinny_logits(
    const scalar_t* x, const scalar_t* weight, float* out, int32_t num_rows, int32_t V, int32_t K) {
    grid_dependency_launch();
#if SKINNY_ON_TENSOR_CORES
    run_skinny<false>(SkinnyMatrix{x, weight, num_rows, V, K}, StoreLogits{out, V});
#endif
}
