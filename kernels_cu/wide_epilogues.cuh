// The epilogues of epilogues.cuh for two outputs of a token side by side, which are one access: the
// same roundings.
//
// begin() reads what all tokens have in common of `output` and the next; fetch() what a token's sums
// are added to, which comes from far, and store() writes the result, at place `at` of the output.
// `second` are sums of rows of up, where there are such.
#pragma once

#include "types.cuh"

__device__ __forceinline__ void load_biases(const scalar_t* bias, int output, float (&x)[2]) {
    x[0] = x[1] = 0.0f;
    if (bias != nullptr) load_floats<scalar_t, 2>(bias + output, x);
}

struct NoAddend {};

struct WideLinear {
    typedef NoAddend Addend;
    const scalar_t* bias;
    scalar_t* out;
    float biases[2];

    __device__ __forceinline__ void begin(int output) { load_biases(bias, output, biases); }
    __device__ __forceinline__ void fetch(int64_t, NoAddend&) const {}
    __device__ __forceinline__ void store(
        int64_t at, const float (&sums)[2], const float (&)[2], NoAddend) const {
        const float result[2] = {sums[0] + biases[0], sums[1] + biases[1]};
        store_floats<scalar_t, 2>(out + at, result);
    }
};

struct WideAdd {
    struct Addend {
        float values[2];
    };
    const scalar_t* bias;
    residual_t* residual;
    float biases[2];

    __device__ __forceinline__ void begin(int output) { load_biases(bias, output, biases); }
    __device__ __forceinline__ void fetch(int64_t at, Addend& addend) const {
        load_floats<residual_t, 2>(residual + at, addend.values);
    }
    __device__ __forceinline__ void store(
        int64_t at, const float (&sums)[2], const float (&)[2],
        const Addend& addend) const {
        const float result[2] = {
            addend.values[0] + (sums[0] + biases[0]), addend.values[1] + (sums[1] + biases[1])};
        store_floats<residual_t, 2>(residual + at, result);
    }
};

struct WideSwiglu {
    typedef NoAddend Addend;
    const scalar_t* bias;
    scalar_t* out;
    int num_outputs;  // of up, its biases are so far behind those of gate
    float gate_biases[2], up_biases[2];

    __device__ __forceinline__ void begin(int output) {
        load_biases(bias, output, gate_biases);
        load_biases(bias, num_outputs + output, up_biases);
    }
    __device__ __forceinline__ void fetch(int64_t, NoAddend&) const {}
    __device__ __forceinline__ void store(
        int64_t at, const float (&sums)[2], const float (&second)[2], NoAddend) const {
        float result[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float gate = rounded<scalar_t>(sums[i] + gate_biases[i]);
            const float up = rounded<scalar_t>(second[i] + up_biases[i]);
            result[i] = gate / (1.0f + expf(-gate)) * up;
        }
        store_floats<scalar_t, 2>(out + at, result);
    }
};

struct WideLogits {
    typedef NoAddend Addend;
    float* out;

    __device__ __forceinline__ void begin(int) {}
    __device__ __forceinline__ void fetch(int64_t, NoAddend&) const {}
    __device__ __forceinline__ void store(
        int64_t at, const float (&sums)[2], const float (&)[2], NoAddend) const {
        store_floats<float, 2>(out + at, sums);
    }
};
