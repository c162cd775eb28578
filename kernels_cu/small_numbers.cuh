// Bytes, pairs of 16-bit numbers and float8, as instructions have them: a part of device.cuh, which the
// host shim has a twin of.
#pragma once

// Bytes of `low` (0 to 3) and `high` (4 to 7) by their numbers, which are SELECTED's digits in base
// 16: the lowest digit is that of the lowest byte.
template <uint32_t SELECTED>
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high) {
    return __byte_perm(low, high, SELECTED);
}

// (x & mask) | bits, and (x & mask) ^ bits, in one instruction each: of two constants the compiler makes
// two.
__device__ __forceinline__ uint32_t masked_or(uint32_t x, uint32_t mask, uint32_t bits) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}
__device__ __forceinline__ uint32_t masked_xor(uint32_t x, uint32_t mask, uint32_t bits) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(y) : "r"(x), "r"(mask), "r"(bits));
    return y;
}

// The float8 e4m3 number nearest to x, ties to even, 448 at most: its bits.
__device__ __forceinline__ uint8_t float_to_e4m3(float x) {
#if __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    return static_cast<uint8_t>(pair);
#else
    const uint32_t sign = __float_as_uint(x) >> 24 & 0x80u;
    const uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
    if (bits < 0x3c800000u) {  // below 2 ** -6 they are multiples of 2 ** -9
        return static_cast<uint8_t>(sign | __float2uint_rn(__uint_as_float(bits) * 512.0f));
    }
    const uint32_t rounded = (bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20;
    return static_cast<uint8_t>(sign | min(rounded - (120u << 3), 0x7eu));
#endif
}

// The same number as a float; bits of a NaN give 480.
__device__ __forceinline__ float e4m3_to_float(uint8_t bits) {
    const uint16_t half_bits = static_cast<uint16_t>((bits & 0x80) << 8 | (bits & 0x7f) << 7);
    return __half2float(__ushort_as_half(half_bits)) * 256.0f;
}

// Pairs of 16-bit numbers of T (__half or __nv_bfloat16) in a register: a - b, and a * b, each rounded
// once. Subnormal numbers stay what they are. From compute capability 8.0.
template <typename T>
__device__ __forceinline__ uint32_t pair_difference(uint32_t a, uint32_t b);
template <typename T>
__device__ __forceinline__ uint32_t pair_product(uint32_t a, uint32_t b);

#if HAS_MMA
template <>
__device__ __forceinline__ uint32_t pair_difference<__half>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <>
__device__ __forceinline__ uint32_t pair_difference<__nv_bfloat16>(uint32_t a, uint32_t b) {
    uint32_t d;  // b * -1 + a
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return d;
}
template <>
__device__ __forceinline__ uint32_t pair_product<__half>(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
template <>
__device__ __forceinline__ uint32_t pair_product<__nv_bfloat16>(uint32_t a, uint32_t b) {
    uint32_t d;  // a * b + -0
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(0x80008000u));
    return d;
}
#endif

// HAS_E4M3_PAIRS   1 from 8.9: the two e4m3 numbers in the low half of `codes` as two __half
#if __CUDA_ARCH__ >= 890 && !FORCE_PLAIN
#define HAS_E4M3_PAIRS 1
__device__ __forceinline__ uint32_t e4m3_pair_to_half(uint32_t codes) {
    uint32_t d;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(static_cast<uint16_t>(codes)));
    return d;
}
#else
#define HAS_E4M3_PAIRS 0
#endif
