// Products of 1 to 32 tokens with weights of int8, int4 or fp8 codes, with what belongs to them folded
// in: the norm before (or a kernel of its own, norm.cu), bias, residual, SwiGLU, float32 logits. The
// macros stand in quantized_format.cuh (WEIGHT_KIND, GROUP), quantized_input.cuh (TOKENS,
// NORM_INPUTS), quantized_sums.cuh (STRIPS) and quantized.cuh (STAGES, MIN_BLOCKS).
//
// Launched with or without programmatic overlap: what is read before grid_dependency_wait() is
// weights only, and dependents may start at once.
#include "quantized_whole.cuh"

// 1: all inputs of a block lie in shared memory at once, as they must with NORM_INPUTS.
#ifndef WHOLE
#define WHOLE NORM_INPUTS
#endif
static_assert(WHOLE || !NORM_INPUTS, "a norm takes all inputs");

#if NORM_INPUTS
typedef residual_t input_t;
#else
typedef scalar_t input_t;
#endif

#if QUANTIZED_ON_TENSOR_CORES
template <bool PAIRS, typename Epilogue>
__device__ __forceinline__ void run_quantized(
    const QuantizedWeights& weights, const QuantizedInput<input_t>& input,
    const Epilogue& epilogue) {
#if WHOLE
    run_whole<PAIRS>(weights, input, epilogue);
#else
    run_tiles<PAIRS>(weights, input, epilogue);
#endif
}
#define QUANTIZED_INPUT(x, rows) \
    QuantizedInput<input_t> { x, rows, norm_weight, eps, num_rows, K }
#endif

// quantized_linear: out = x @ weight.T + bias, of num_rows tokens; x is rms_norm(x) with NORM_INPUTS
// grid any; more blocks than strips of 16 rows have nothing to do
// block 256
// shared, with C = min(8 * tile_segments, K / 128 up), chunks of a tile, all with WHOLE, whose STAGES
//   are a multiple of STRIPS: 8 * STAGES * CHUNK_BYTES, the
//   rings; num_rows * (128 * C up to 256s, + 32) * 2; with int4 C * 128 / GROUP * TOKENS * 4;
//   sums, 32 * TOKENS * (16 * STRIPS + 4), twice with TOKENS up to 16; without WHOLE and with more than
//   one segment of 1024 inputs, of each pass of STRIPS strips in a round, TOKENS * 16 * STRIPS up to 256s floats
// x            input_t [num_rows, K], residual_t with NORM_INPUTS, else scalar_t
// norm_weight  scalar_t [K] with NORM_INPUTS, else, like eps, not read
// packed       [R / 16 up, K / 128 up, CHUNK_BYTES], as quantized_format.cuh says
// bias         scalar_t [R], or null
// out          scalar_t [num_rows, R], no part of the inputs
// num_rows 1 to TOKENS; K a multiple of 8, with NORM_INPUTS such that 2 * K + 4 * num_rows * K / 256
// up bytes fit in the sums' room; x, norm_weight and packed
// aligned to 16 bytes; any R; 16-bit types; tile_segments from 1, all segments with NORM_INPUTS;
// round_strips a multiple of STRIPS. x may come from the kernel before, weights may not.
// REF: numpy_ops.norm_linear
// COST: the packed bytes, R / 16 * K / 128 * CHUNK_BYTES, and 2 * num_rows * R * K flops
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, MIN_BLOCKS) quantized_linear(
    const input_t* x, const scalar_t* norm_weight, float eps, const uint8_t* packed, float unit,
    const scalar_t* bias, scalar_t* out, int32_t num_rows, int32_t R, int32_t K,
    int32_t tile_segments, int32_t round_strips) {
    grid_dependency_launch();
#if QUANTIZED_ON_TENSOR_CORES
    run_quantized<false>(
        QuantizedWeights{packed, unit, R, tile_segments, round_strips}, QUANTIZED_INPUT(x, nullptr),
        StoreLinear{bias, out, R});
#endif
}

// quantized_linear_add: residual += x @ weight.T + bias, rounded once, of num_rows tokens
// grid, block, shared memory as quantized_linear
// x         scalar_t [num_rows, K]
// packed    of [D, K], as there
// bias      scalar_t [D], or null
// residual  residual_t [num_rows, D], read and written
// The rest as quantized_linear, without NORM_INPUTS; residual may come from the kernel before.
// REF: numpy_ops.linear_add
// COST: the packed bytes, and 2 * num_rows * D * K flops
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, MIN_BLOCKS) quantized_linear_add(
    const input_t* x, const uint8_t* packed, float unit, const scalar_t* bias, residual_t* residual,
    int32_t num_rows, int32_t D, int32_t K, int32_t tile_segments, int32_t round_strips) {
    grid_dependency_launch();
#if QUANTIZED_ON_TENSOR_CORES && !NORM_INPUTS
    const scalar_t* norm_weight = nullptr;
    const float eps = 0.0f;
    run_quantized<false>(
        QuantizedWeights{packed, unit, D, tile_segments, round_strips}, QUANTIZED_INPUT(x, nullptr),
        AddToResidual{bias, residual, D});
#endif
}

// quantized_swiglu: out = silu(gate) * up, [gate | up] = x @ weight.T + bias, of num_rows tokens
// grid, block, shared memory as quantized_linear, with sums so far for twice TOKENS * 8 * STRIPS up to
//   256s floats
// x       as quantized_linear; norm_weight, eps as there
// packed  of rows 0 to 7 of gate, 0 to 7 of up, 8 to 15 of gate …: [F / 8 up, K / 128 up, CHUNK_BYTES]
// bias    scalar_t [2 F], gate, then up; or null
// out     scalar_t [num_rows, F], no part of the inputs
// The rest as quantized_linear.
// REF: numpy_ops.norm_swiglu
// COST: the packed bytes, and 4 * num_rows * F * K flops
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, MIN_BLOCKS) quantized_swiglu(
    const input_t* x, const scalar_t* norm_weight, float eps, const uint8_t* packed, float unit,
    const scalar_t* bias, scalar_t* out, int32_t num_rows, int32_t F, int32_t K,
    int32_t tile_segments, int32_t round_strips) {
    grid_dependency_launch();
#if QUANTIZED_ON_TENSOR_CORES
    run_quantized<true>(
        QuantizedWeights{packed, unit, F, tile_segments, round_strips}, QUANTIZED_INPUT(x, nullptr),
        StoreSwiglu{bias, out, F});
#endif
}

// quantized_logits: out = x[rows] @ weight.T in float32, of num_rows rows; normalised with NORM_INPUTS
// grid, block, shared memory as quantized_linear
// x       input_t [T, K]; norm_weight, eps as there
// rows    int32 [num_rows], each in [0, T); or null: the first ones
// packed  of [V, K], as there
// out     float [num_rows, V]
// The rest as quantized_linear.
// REF: numpy_ops.lm_head
// COST: the packed bytes, num_rows * V * 4 bytes, and 2 * num_rows * V * K flops
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, MIN_BLOCKS) quantized_logits(
    const input_t* x, const int32_t* rows, const scalar_t* norm_weight, float eps,
    const uint8_t* packed, float unit, float* out, int32_t num_rows, int32_t V, int32_t K,
    int32_t tile_segments, int32_t round_strips) {
    grid_dependency_launch();
#if QUANTIZED_ON_TENSOR_CORES
    run_quantized<false>(
        QuantizedWeights{packed, unit, V, tile_segments, round_strips}, QUANTIZED_INPUT(x, rows),
        StoreLogits{out, V});
#endif
}
