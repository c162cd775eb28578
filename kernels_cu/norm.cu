// RMSNorm of rows, for the products that go through cuBLAS.
//
// NORMED   type code of the normed rows (default: SCALAR)
#include "reduce.cuh"
#include "types.cuh"

#ifndef NORMED
#define NORMED SCALAR
#endif
typedef TypeOf<NORMED>::type normed_t;

// rms_norm_rows: out[r] = x / sqrt(mean(x ** 2) + eps) * weight, of row r or of row rows[r]
// grid: rows of out, block any multiple of 32, no dynamic shared memory
// x       residual_t [T, D]
// rows    int32, one for each row of out, each in [0, T); or null: row r itself
// weight  scalar_t [D]
// out     normed_t [rows, D]; does not overlap x
// REF: numpy_ops.norm_linear, numpy_ops.norm_swiglu, numpy_ops.lm_head
// COST: a row of x read (from memory once, from L1 or L2 again), a row of out written; 4 * D flops
extern "C" __global__ void __launch_bounds__(1024) rms_norm_rows(
    const residual_t* x, const int32_t* rows,
    const scalar_t* weight, float eps, normed_t* out, int32_t D) {
    grid_dependency_launch();
    constexpr int N = 8;  // values at a time: 16 or 32 bytes
    const bool wide = D % N == 0 && is_aligned_16(x) && is_aligned_16(weight) && is_aligned_16(out);
    const int first = threadIdx.x * N;
    if (wide && D <= blockDim.x * N) {
        // Few rows: their time is that of the reads one after the other. A thread's weights come
        // before the kernel in front has ended, and its values stay.
        const bool inside = first < D;
        float values[N], scales[N];
        if (inside) load_floats<scalar_t, N>(weight + first, scales);
        grid_dependency_wait();
        const int64_t row = rows != nullptr ? rows[blockIdx.x] : blockIdx.x;
        float squares = 0.0f;
        if (inside) {
            load_floats<residual_t, N>(x + row * D + first, values);
#pragma unroll
            for (int j = 0; j < N; ++j) squares += values[j] * values[j];
        }
        const float inverse = 1.0f / sqrtf(block_sum(squares) / D + eps);
        if (inside) {
#pragma unroll
            for (int j = 0; j < N; ++j) values[j] *= inverse * scales[j];
            store_floats<normed_t, N>(out + static_cast<int64_t>(blockIdx.x) * D + first, values);
        }
        return;
    }
    grid_dependency_wait();
    const int64_t row = rows != nullptr ? rows[blockIdx.x] : blockIdx.x;
    const residual_t* from = x + row * D;
    normed_t* to = out + static_cast<int64_t>(blockIdx.x) * D;
    float squares = 0.0f;
    if (wide) {
        for (int i = first; i < D; i += blockDim.x * N) {
            float values[N];
            load_floats<residual_t, N>(from + i, values);
#pragma unroll
            for (int j = 0; j < N; ++j) squares += values[j] * values[j];
        }
    } else {
        for (int i = threadIdx.x; i < D; i += blockDim.x) {
            const float value = to_float(from[i]);
            squares += value * value;
        }
    }
    const float inverse = 1.0f / sqrtf(block_sum(squares) / D + eps);
    if (wide) {
        for (int i = first; i < D; i += blockDim.x * N) {
            float values[N], scales[N];
            load_floats<residual_t, N>(from + i, values);
            load_floats<scalar_t, N>(weight + i, scales);
#pragma unroll
            for (int j = 0; j < N; ++j) values[j] *= inverse * scales[j];
            store_floats<normed_t, N>(to + i, values);
        }
    } else {
        for (int i = threadIdx.x; i < D; i += blockDim.x) {
            to[i] = from_float<normed_t>(to_float(from[i]) * (inverse * to_float(weight[i])));
        }
    }
}
