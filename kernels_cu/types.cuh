// The types of a build, their conversions to and from float, and vectors of them.
//
// SCALAR     0 float32, 1 float16, 2 bfloat16: scalar_t, of weights and activations
// RESIDUAL   the same of the residual stream, residual_t (default: SCALAR)
// CACHE      the same of the KV cache, cache_t (default: SCALAR)
//
// Every conversion to 16 bits rounds to nearest, ties to even. All arithmetic is done in float.
#pragma once

#include "device.cuh"

#ifndef SCALAR
#error "define SCALAR: 0 float32, 1 float16, 2 bfloat16"
#endif
#ifndef RESIDUAL
#define RESIDUAL SCALAR
#endif
#ifndef CACHE
#define CACHE SCALAR
#endif

typedef __half half_t;
typedef __nv_bfloat16 bfloat_t;

template <int CODE>
struct TypeOf;
template <>
struct TypeOf<0> {
    typedef float type;
};
template <>
struct TypeOf<1> {
    typedef half_t type;
};
template <>
struct TypeOf<2> {
    typedef bfloat_t type;
};

typedef TypeOf<SCALAR>::type scalar_t;
typedef TypeOf<RESIDUAL>::type residual_t;
typedef TypeOf<CACHE>::type cache_t;

// ------------------------------------------------------------------------------ single values

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half_t x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat_t x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ half_t from_float<half_t>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ bfloat_t from_float<bfloat_t>(float x) {
    return __float2bfloat16_rn(x);
}

// x as it reads after being stored in T.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
    return to_float(from_float<T>(x));
}

// ------------------------------------------------------------------------------ vectors

// N values that one load or store moves (two and more from 16 bytes on): aligned to their size, to
// 16 bytes at most. N is a power of two.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
    T data[N];
};

// Values of T in 16 bytes: the widest single load.
template <typename T>
struct Wide {
    static constexpr int N = 16 / sizeof(T);
};

template <typename T, int N>
__device__ __forceinline__ Vec<T, N> load_vec(const T* p) {
    return *reinterpret_cast<const Vec<T, N>*>(p);
}

template <typename T, int N>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& v) {
    *reinterpret_cast<Vec<T, N>*>(p) = v;
}

template <typename T, int N>
__device__ __forceinline__ void load_floats(const T* p, float (&out)[N]) {
    const Vec<T, N> v = load_vec<T, N>(p);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(v.data[i]);
}

template <typename T, int N>
__device__ __forceinline__ void store_floats(T* p, const float (&in)[N]) {
    Vec<T, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i) v.data[i] = from_float<T>(in[i]);
    store_vec<T, N>(p, v);
}

// Whether rows of `count` values from p on can all be read 16 bytes at a time.
template <typename T>
__device__ __forceinline__ bool rows_are_wide(const T* p, int64_t count) {
    return count % Wide<T>::N == 0 && is_aligned_16(p);
}

// Two floats rounded to T, the first in the low half: an operand register of mma_m16n8k16.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    union {
        Vec<T, 2> values;
        uint32_t bits;
    } v;
    v.values.data[0] = from_float<T>(low);
    v.values.data[1] = from_float<T>(high);
    return v.bits;
}

// ------------------------------------------------------------------------------ the KV cache

// The only places that know how a cache value is stored; quantised types come in here.
__device__ __forceinline__ float cache_load(const cache_t* p) { return to_float(*p); }

template <int N>
__device__ __forceinline__ void cache_load_vec(const cache_t* p, float (&out)[N]) {
    load_floats<cache_t, N>(p, out);
}

template <int N>
__device__ __forceinline__ void cache_store_vec(cache_t* p, const float (&in)[N]) {
    store_floats<cache_t, N>(p, in);
}
