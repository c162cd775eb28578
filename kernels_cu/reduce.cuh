// Sums and maxima over a warp or a block, and the running state of a softmax.
//
// Right for every block of whole warps, up to 1024 threads. The order of additions depends on the
// block's size alone, so two runs give the same bits. The block forms end with a barrier: their
// scratch may be used again at once.
#pragma once

#include "device.cuh"

struct Sum {
    template <typename T>
    static __device__ __forceinline__ T identity() {
        return T(0);
    }
    template <typename T>
    static __device__ __forceinline__ T combine(T a, T b) {
        return a + b;
    }
};

// Of floats; a NaN is passed over.
struct Max {
    template <typename T>
    static __device__ __forceinline__ T identity() {
        return -infinity();
    }
    static __device__ __forceinline__ float combine(float a, float b) { return fmaxf(a, b); }
};

// Every lane gets the result. WIDTH lanes in a row (a power of two) make a group of their own.
template <typename Op, int WIDTH = 32, typename T>
__device__ __forceinline__ T warp_reduce(T value) {
#pragma unroll
    for (int lanes = WIDTH / 2; lanes > 0; lanes /= 2) {
        value = Op::combine(value, shuffle_xor(value, lanes));
    }
    return value;
}

template <int WIDTH = 32, typename T>
__device__ __forceinline__ T warp_sum(T value) {
    return warp_reduce<Sum, WIDTH>(value);
}

template <int WIDTH = 32>
__device__ __forceinline__ float warp_max(float value) {
    return warp_reduce<Max, WIDTH>(value);
}

// Every thread of the block must come, and gets the result.
template <typename Op, typename T>
__device__ __forceinline__ T block_reduce(T value) {
    __shared__ T partial[32];
    value = warp_reduce<Op>(value);
    if (blockDim.x == WARP_SIZE) return value;
    if (lane_id() == 0) partial[warp_id()] = value;
    block_sync();
    value = lane_id() < num_warps() ? partial[lane_id()] : Op::template identity<T>();
    value = warp_reduce<Op>(value);
    block_sync();
    return value;
}

template <typename T>
__device__ __forceinline__ T block_sum(T value) {
    return block_reduce<Sum>(value);
}

__device__ __forceinline__ float block_max(float value) { return block_reduce<Max>(value); }

// Sums of `value` over the lanes below and this one.
template <typename T>
__device__ __forceinline__ T warp_prefix_sum(T value) {
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
        const T below = shuffle_up(value, lanes);
        if (lane_id() >= lanes) value += below;
    }
    return value;
}

// ------------------------------------------------------------------------------ online softmax

// The largest score so far, and the sum of exp2(score - max): scores are in units of log2(e).
// `max` is -inf before the first score; the weighted values are kept beside it by the caller.
struct SoftmaxState {
    float max;
    float sum;
};

__device__ __forceinline__ SoftmaxState softmax_start() {
    SoftmaxState state;
    state.max = -infinity();
    state.sum = 0.0f;
    return state;
}

// exp2(score - max), 0 for a masked score (-inf), also while everything is masked.
__device__ __forceinline__ float softmax_weight(float score, float max) {
    return score == -infinity() ? 0.0f : exp2_approx(score - max);
}

// Take in scores whose maximum is `score_max`: returns the factor by which what was summed before
// must be multiplied. The caller then adds the weights of the new scores to `sum`.
__device__ __forceinline__ float softmax_raise(SoftmaxState& state, float score_max) {
    const float max = fmaxf(state.max, score_max);
    const float factor = softmax_weight(state.max, max);
    state.max = max;
    state.sum *= factor;
    return factor;
}

// Merge `other` into `state`: the weighted values of `state` must be multiplied by `scale`, those
// of `other` by `other_scale`, and added.
__device__ __forceinline__ void softmax_merge(
    SoftmaxState& state, const SoftmaxState& other, float& scale, float& other_scale) {
    const float max = fmaxf(state.max, other.max);
    scale = softmax_weight(state.max, max);
    other_scale = softmax_weight(other.max, max);
    state.max = max;
    state.sum = state.sum * scale + other.sum * other_scale;
}
