// The types of a build, their conversions to and from float, and vectors of them.
//
// SCALAR     0 float32, 1 float16, 2 bfloat16: scalar_t, of weights and activations
// RESIDUAL   the same of the residual stream, residual_t (default: SCALAR)
// CACHE      the same of the KV cache, cache_t (default: SCALAR); or 3 int8, 4 float8 e4m3, whose
//            bits are uint8: codes, with a scale_t for each row
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

#define QUANTIZED (CACHE >= 3)

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
template <>
struct TypeOf<3> {
    typedef int8_t type;
};
template <>
struct TypeOf<4> {
    typedef uint8_t type;
};

typedef TypeOf<SCALAR>::type scalar_t;
typedef TypeOf<RESIDUAL>::type residual_t;
typedef TypeOf<CACHE>::type cache_t;
typedef bfloat_t scale_t;  // of a row of a quantised cache

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

// The only places that know how a cache value is stored. Of a quantised cache they give and take
// codes, as floats: a value is code * scale.
#if QUANTIZED

constexpr float CODE_LIMIT = CACHE == 3 ? 127.0f : 448.0f;  // the largest code

__device__ __forceinline__ float code_to_float(int8_t code) { return static_cast<float>(code); }
__device__ __forceinline__ float code_to_float(uint8_t code) { return e4m3_to_float(code); }

template <typename T>
__device__ __forceinline__ T nearest_code(float x);
template <>
__device__ __forceinline__ int8_t nearest_code<int8_t>(float x) {
    return static_cast<int8_t>(rintf(x));
}
template <>
__device__ __forceinline__ uint8_t nearest_code<uint8_t>(float x) {
    return float_to_e4m3(x);
}

__device__ __forceinline__ float cache_load(const cache_t* p) { return code_to_float(*p); }

template <int N>
__device__ __forceinline__ void cache_load_vec(const cache_t* p, float (&out)[N]) {
    const Vec<cache_t, N> v = load_vec<cache_t, N>(p);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = code_to_float(v.data[i]);
}

// `in` are values over the row's scale: rounded to codes here.
template <int N>
__device__ __forceinline__ void cache_store_vec(cache_t* p, const float (&in)[N]) {
    Vec<cache_t, N> v;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        v.data[i] = nearest_code<cache_t>(fminf(fmaxf(in[i], -CODE_LIMIT), CODE_LIMIT));
    }
    store_vec<cache_t, N>(p, v);
}

// The scale of a row whose largest magnitude has these bits, which order as magnitudes do: 0 where it
// would be subnormal, NaN where the row is not finite.
__device__ __forceinline__ float row_scale(uint32_t largest_bits) {
    if (largest_bits >= 0x7f800000u) return float_of(0x7fc00000u);
    const float scale = float_of(largest_bits) / CODE_LIMIT;
    return scale < 1.17549435e-38f ? 0.0f : rounded<scale_t>(scale);
}

#else

__device__ __forceinline__ float cache_load(const cache_t* p) { return to_float(*p); }

template <int N>
__device__ __forceinline__ void cache_load_vec(const cache_t* p, float (&out)[N]) {
    load_floats<cache_t, N>(p, out);
}

template <int N>
__device__ __forceinline__ void cache_store_vec(cache_t* p, const float (&in)[N]) {
    store_floats<cache_t, N>(p, in);
}

#endif

// The scale of row `row` of the cache, counted over [N, G, P]; 1 where rows have none.
__device__ __forceinline__ float cache_scale(const scale_t* scales, int64_t row) {
    return QUANTIZED ? to_float(scales[row]) : 1.0f;
}
