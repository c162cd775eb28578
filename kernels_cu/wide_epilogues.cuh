// The epilogues of epilogues.cuh for eight outputs of a token side by side: the same roundings, in
// accesses of 16 bytes.
//
// begin() reads what all tokens have in common of `output` and the next seven; fetch() what a token's
// sums are added to, which comes from far, and store() writes the result, at place `at` of the output.
// `second` are sums of rows of up, where there are such.
#pragma once

#include "types.cuh"

constexpr int SIDE_BY_SIDE = 8;  // outputs

// As they are stored, which takes fewer registers while products are at work; zeros without any.
typedef Vec<scalar_t, SIDE_BY_SIDE> WideBiases;
__device__ __forceinline__ WideBiases load_biases(const scalar_t* bias, int output) {
    if (bias != nullptr) return load_vec<scalar_t, SIDE_BY_SIDE>(bias + output);
    WideBiases none;
#pragma unroll
    for (int i = 0; i < SIDE_BY_SIDE; ++i) none.data[i] = from_float<scalar_t>(0.0f);
    return none;
}

struct NoAddend {};

struct WideLinear {
    typedef NoAddend Addend;
    const scalar_t* bias;
    scalar_t* out;
    WideBiases biases;

    __device__ __forceinline__ void begin(int output) { biases = load_biases(bias, output); }
    __device__ __forceinline__ void fetch(int64_t, NoAddend&) const {}
    __device__ __forceinline__ void store(
        int64_t at, const float (&sums)[SIDE_BY_SIDE], const float (&)[SIDE_BY_SIDE],
        const NoAddend&) const {
        float result[SIDE_BY_SIDE];
#pragma unroll
        for (int i = 0; i < SIDE_BY_SIDE; ++i) result[i] = sums[i] + to_float(biases.data[i]);
        store_floats<scalar_t, SIDE_BY_SIDE>(out + at, result);
    }
};

struct WideAdd {
    typedef Vec<residual_t, SIDE_BY_SIDE> Addend;  // as it is stored: fewer registers
    const scalar_t* bias;
    residual_t* residual;
    WideBiases biases;

    __device__ __forceinline__ void begin(int output) { biases = load_biases(bias, output); }
    __device__ __forceinline__ void fetch(int64_t at, Addend& addend) const {
        addend = load_vec<residual_t, SIDE_BY_SIDE>(residual + at);
    }
    __device__ __forceinline__ void store(
        int64_t at, const float (&sums)[SIDE_BY_SIDE], const float (&)[SIDE_BY_SIDE],
        const Addend& addend) const {
        float result[SIDE_BY_SIDE];
#pragma unroll
        for (int i = 0; i < SIDE_BY_SIDE; ++i) {
            result[i] = to_float(addend.data[i]) + (sums[i] + to_float(biases.data[i]));
        }
        store_floats<residual_t, SIDE_BY_SIDE>(residual + at, result);
    }
};

struct WideSwiglu {
    typedef NoAddend Addend;
    const scalar_t* bias;
    scalar_t* out;
    int num_outputs;  // of up, its biases are so far behind those of gate
    WideBiases gate_biases, up_biases;

    __device__ __forceinline__ void begin(int output) {
        gate_biases = load_biases(bias, output);
        up_biases = load_biases(bias, num_outputs + output);
    }
    __device__ __forceinline__ void fetch(int64_t, NoAddend&) const {}
    __device__ __forceinline__ void store(
        int64_t at, const float (&sums)[SIDE_BY_SIDE], const float (&second)[SIDE_BY_SIDE],
        const NoAddend&) const {
        float result[SIDE_BY_SIDE];
#pragma unroll
        for (int i = 0; i < SIDE_BY_SIDE; ++i) {
            const float gate = rounded<scalar_t>(sums[i] + to_float(gate_biases.data[i]));
            const float up = rounded<scalar_t>(second[i] + to_float(up_biases.data[i]));
            result[i] = gate / (1.0f + expf(-gate)) * up;
        }
        store_floats<scalar_t, SIDE_BY_SIDE>(out + at, result);
    }
};

struct WideLogits {
    typedef NoAddend Addend;
    float* out;

    __device__ __forceinline__ void begin(int) {}
    __device__ __forceinline__ void fetch(int64_t, NoAddend&) const {}
    __device__ __forceinline__ void store(
        int64_t at, const float (&sums)[SIDE_BY_SIDE], const float (&)[SIDE_BY_SIDE],
        const NoAddend&) const {
        store_floats<float, SIDE_BY_SIDE>(out + at, sums);
    }
};
