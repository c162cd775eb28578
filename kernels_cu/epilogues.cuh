// What becomes of the sums of a product: the bias, the residual, SwiGLU, logits, and the roundings.
//
// fetch() gives what a sum is added to, of a row of weights ("output") and a token: it comes from
// far, so kernels ask for it before they have the sum. store() takes both and writes the result.
#pragma once

#include "types.cuh"

struct Nothing {};

struct StoreLinear {
    typedef float Addend;
    const scalar_t* bias;
    scalar_t* out;
    int num_outputs;

    __device__ __forceinline__ float fetch(int output, int) const {
        return bias == nullptr ? 0.0f : to_float(bias[output]);
    }
    __device__ __forceinline__ void store(int output, int token, float sum, float addend) const {
        out[static_cast<int64_t>(token) * num_outputs + output] = from_float<scalar_t>(sum + addend);
    }
};

struct AddToResidual {
    struct Addend {
        float bias;
        float residual;
    };
    const scalar_t* bias;
    residual_t* residual;
    int num_outputs;

    __device__ __forceinline__ Addend fetch(int output, int token) const {
        Addend addend;
        addend.bias = bias == nullptr ? 0.0f : to_float(bias[output]);
        addend.residual = to_float(residual[static_cast<int64_t>(token) * num_outputs + output]);
        return addend;
    }
    __device__ __forceinline__ void store(
        int output, int token, float sum, const Addend& addend) const {
        residual[static_cast<int64_t>(token) * num_outputs + output] =
            from_float<residual_t>(addend.residual + (sum + addend.bias));
    }
};

struct StoreSwiglu {
    struct Addend {
        float gate;
        float up;
    };
    const scalar_t* bias;
    scalar_t* out;
    int num_outputs;

    __device__ __forceinline__ Addend fetch(int output, int) const {
        Addend addend;
        addend.gate = bias == nullptr ? 0.0f : to_float(bias[output]);
        addend.up = bias == nullptr ? 0.0f : to_float(bias[num_outputs + output]);
        return addend;
    }
    __device__ __forceinline__ void store(
        int output, int token, float gate, float up, const Addend& addend) const {
        gate = rounded<scalar_t>(gate + addend.gate);
        up = rounded<scalar_t>(up + addend.up);
        out[static_cast<int64_t>(token) * num_outputs + output] =
            from_float<scalar_t>(gate / (1.0f + expf(-gate)) * up);
    }
};

struct StoreLogits {
    typedef Nothing Addend;
    float* out;
    int num_outputs;

    __device__ __forceinline__ Nothing fetch(int, int) const { return Nothing(); }
    __device__ __forceinline__ void store(int output, int token, float sum, Nothing) const {
        out[static_cast<int64_t>(token) * num_outputs + output] = sum;
    }
};
