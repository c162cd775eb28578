// What follows a product that cuBLAS has done: bias, residual, SwiGLU.
//
// PRODUCT   type code of the product (default: SCALAR). 0, float32, where a bias or a residual is
//           still to be added, so that the sum is rounded once, as by the fused kernels.
#include "types.cuh"

#ifndef PRODUCT
#define PRODUCT SCALAR
#endif
typedef TypeOf<PRODUCT>::type product_t;

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// fill_bias_rows: out[t] = bias, for a product that then adds to what is there (beta = 1)
// grid T, block any multiple of 32, no shared memory
// bias  scalar_t [R]
// out   scalar_t [T, R]
// REF: numpy_ops.norm_linear
// COST: T * R * sizeof(scalar_t) bytes written
extern "C" __global__ void __launch_bounds__(1024) fill_bias_rows(
    const scalar_t* bias, scalar_t* out, int32_t R) {
    grid_dependency_launch();
    grid_dependency_wait();
    scalar_t* to = out + static_cast<int64_t>(blockIdx.x) * R;
    constexpr int N = Wide<scalar_t>::N;
    if (rows_are_wide(out, R) && is_aligned_16(bias)) {
        for (int i = threadIdx.x * N; i < R; i += blockDim.x * N) {
            store_vec<scalar_t, N>(to + i, load_vec<scalar_t, N>(bias + i));
        }
    } else {
        for (int i = threadIdx.x; i < R; i += blockDim.x) to[i] = bias[i];
    }
}

// add_bias_rows: out = product + bias
// grid T, block any multiple of 32, no shared memory
// product  product_t [T, R]
// bias     scalar_t [R], or null
// out      scalar_t [T, R]
// REF: numpy_ops.norm_linear
// COST: T * R * (sizeof(product_t) + sizeof(scalar_t)) bytes, T * R flops
extern "C" __global__ void __launch_bounds__(1024) add_bias_rows(
    const product_t* product, const scalar_t* bias,
    scalar_t* out, int32_t R) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * R;
    for (int i = threadIdx.x; i < R; i += blockDim.x) {
        const float addend = bias != nullptr ? to_float(bias[i]) : 0.0f;
        out[row + i] = from_float<scalar_t>(to_float(product[row + i]) + addend);
    }
}

// add_residual_rows: residual += product + bias, in place
// grid T, block any multiple of 32, no shared memory
// product   product_t [T, D]
// bias      scalar_t [D], or null
// residual  residual_t [T, D]
// REF: numpy_ops.linear_add
// COST: T * D * (sizeof(product_t) + 2 * sizeof(residual_t)) bytes, 2 * T * D flops
extern "C" __global__ void __launch_bounds__(1024) add_residual_rows(
    const product_t* product, const scalar_t* bias,
    residual_t* residual, int32_t D) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int64_t row = static_cast<int64_t>(blockIdx.x) * D;
    for (int i = threadIdx.x; i < D; i += blockDim.x) {
        const float addend = bias != nullptr ? to_float(bias[i]) : 0.0f;
        const float sum = to_float(product[row + i]) + addend;
        residual[row + i] = from_float<residual_t>(to_float(residual[row + i]) + sum);
    }
}

// swiglu_rows: out = silu(gate) * up, where [gate | up] = product + bias, rounded to scalar_t
// grid (T, ceil(F / (block * 8)) or fewer), block any multiple of 32, no shared memory
// product  product_t [T, 2 * F], gate then up
// bias     scalar_t [2 * F], or null
// out      scalar_t [T, F]
// REF: numpy_ops.norm_swiglu
// COST: T * F * (2 * sizeof(product_t) + sizeof(scalar_t)) bytes, about 10 * T * F flops
extern "C" __global__ void __launch_bounds__(1024) swiglu_rows(
    const product_t* product, const scalar_t* bias,
    scalar_t* out, int32_t F) {
    grid_dependency_launch();
    grid_dependency_wait();
    const product_t* gates = product + 2 * static_cast<int64_t>(blockIdx.x) * F;
    scalar_t* to = out + static_cast<int64_t>(blockIdx.x) * F;
    const int thread = blockIdx.y * blockDim.x + threadIdx.x, threads = gridDim.y * blockDim.x;
    constexpr int N = 8;
    if (bias == nullptr && F % N == 0 && is_aligned_16(product) && is_aligned_16(out)) {
        for (int i = thread * N; i < F; i += threads * N) {
            float gate[N], up[N];
            load_floats<product_t, N>(gates + i, gate);
            load_floats<product_t, N>(gates + F + i, up);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                gate[j] = silu(rounded<scalar_t>(gate[j])) * rounded<scalar_t>(up[j]);
            }
            store_floats<scalar_t, N>(to + i, gate);
        }
        return;
    }
    for (int i = thread; i < F; i += threads) {
        float gate = to_float(gates[i]), up = to_float(gates[F + i]);
        if (bias != nullptr) {
            gate += to_float(bias[i]);
            up += to_float(bias[F + i]);
        }
        to[i] = from_float<scalar_t>(silu(rounded<scalar_t>(gate)) * rounded<scalar_t>(up));
    }
}
