// The product of gate and up with SwiGLU for prompts, on warpgroups' tensor cores, for compute
// capability 9.0a. The macros, SHARERS and STAGES, stand in tall.cuh; nanocupy/ops/launch_tall.py
// chooses them.
//
// Launched with or without programmatic overlap; dependents may start at once.
#include "types.cuh"
#include "tall.cuh"

// tall_swiglu: out = silu(gate) * up, [gate | up] = x @ weight.T, of num_rows tokens
// grid SHARERS times as many as tiles, or fewer: those of which a multiprocessor has one; clusters of
//   SHARERS along x
// block 384, shared 2048 + STAGES * 49152
// inputs   a map of x scalar_t [num_rows, K] with a box [128, 64]
// weights  a map of weight scalar_t [2 F, K], rows of gate, then of up, with a box [256 / SHARERS, 64],
//   128 rows at most; both swizzled by 128 bytes
// out      scalar_t [num_rows, F], aligned to 16 bytes, no part of the inputs
// group    tiles of 128 * SHARERS rows that are taken with all outputs before the next ones, from 1
// K and F multiples of 8; K above 448; 16-bit types; num_rows and F from 1; tiles below 2**31. Gate and
// up are rounded to scalar_t before the activation.
// REF: numpy_ops.norm_swiglu
// COST: 4 * num_rows * F * K flops, and 2 * (num_rows * (K + F) + 2 * F * K) bytes at least
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1) tall_swiglu(
    const __grid_constant__ TensorMap inputs, const __grid_constant__ TensorMap weights,
    scalar_t* out, int32_t num_rows, int32_t F, int32_t K, int32_t group) {
    grid_dependency_launch();
    grid_dependency_wait();
#if TALL_BUILD
    run_tall(TallMatrix{&inputs, &weights, num_rows, F, K, group}, out);
#endif
}
