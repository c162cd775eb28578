// The types of CUDA's headers: vectors, and 16-bit floats that round to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = bits_of(x);
    if (x != x) return {0x7fff};
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline float __half2float(__half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
    const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 0x3ff;
    if (exponent == 31) return float_of(sign | 0x7f800000u | fraction << 13);
    if (exponent != 0) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
    const float value = float(fraction) * 5.9604644775390625e-8f;  // 2 ** -24
    return sign ? -value : value;
}

inline __half __float2half_rn(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000u) return {0x7fff};
    if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};  // from 65520 on: infinity
    if (magnitude < 0x38800000u) {
        // Subnormal: adding 0.5 leaves the spacing 2 ** -24 to the processor's rounding.
        return {uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
    }
    const uint32_t rebased = magnitude - (112u << 23);
    return {uint16_t(sign | (rebased + 0xfff + (rebased >> 13 & 1)) >> 13)};
}
