// Codes of a quantised cache as 16-bit numbers, four of a register at a time, for tensor cores.
//
// Every code is exact in float16 and in bfloat16. Conversions of single numbers are slow, so bits are
// put where they make 16-bit numbers of known exponents, and one subtraction or product makes them
// right. CACHE, SCALAR: as in types.cuh; both 16-bit types, from compute capability 8.0.
#pragma once

#include "types.cuh"

#if HAS_MMA && QUANTIZED && SCALAR != 0

// The even bytes of `codes`, 0 and 2, as two scalar_t; what is in the odd bytes does not matter.
__device__ __forceinline__ uint32_t widen_even(uint32_t codes) {
#if CACHE == 3 && SCALAR == 1
    // 0x6400 | n is 1024 + n, and n the code + 128.
    return pair_difference<scalar_t>(masked_xor(codes, 0x00ff00ffu, 0x64806480u), 0x64806480u);
#elif CACHE == 3
    // 0x4300 | n is 128 + n for n up to 127; with the sign bit as well it is 256, so that the
    // difference of the two is n, or n - 128.
    return pair_difference<scalar_t>(
        masked_or(codes, 0x007f007fu, 0x43004300u), masked_or(codes, 0x00800080u, 0x43004300u));
#elif SCALAR == 1
    // The exponent's bias is 7, that of float16 15.
    const uint32_t high = codes << 8;
    return pair_product<scalar_t>((high & 0x80008000u) | (high >> 1 & 0x3f803f80u), 0x5c005c00u);
#else
    // That of bfloat16 is 127. The smallest numbers are subnormal before the product.
    const uint32_t high = codes << 8;
    return pair_product<scalar_t>((high & 0x80008000u) | (high >> 4 & 0x07f007f0u), 0x7b807b80u);
#endif
}

// `codes` as scalar_t: bytes 0 and 2 in `even`, 1 and 3 in `odd`, the lower byte's in the low half.
__device__ __forceinline__ void widen(uint32_t codes, uint32_t& even, uint32_t& odd) {
#if CACHE == 4 && SCALAR == 1 && HAS_E4M3_PAIRS
    const uint32_t sorted = pick_bytes<0x3120>(codes, 0);
    even = e4m3_pair_to_half(sorted);
    odd = e4m3_pair_to_half(sorted >> 16);
#else
    even = widen_even(codes);
    odd = widen_even(codes >> 8);
#endif
}

// 16 codes as scalar_t in their order: the first 8 in `low`.
__device__ __forceinline__ void widen_in_order(const uint4& codes, uint4& low, uint4& high) {
    widen(pick_bytes<0x3120>(codes.x, 0), low.x, low.y);
    widen(pick_bytes<0x3120>(codes.y, 0), low.z, low.w);
    widen(pick_bytes<0x3120>(codes.z, 0), high.x, high.y);
    widen(pick_bytes<0x3120>(codes.w, 0), high.z, high.w);
}

#endif

// Probabilities are multiplied by the scales of values before they are rounded to scalar_t and meet the
// codes. In float16 most products would fall below its numbers. So there they are kept in a unit: a
// power of two, that of the largest scale so far, by which what was summed is to be multiplied at last.
struct ValueUnit {
    static constexpr bool NEEDED = SCALAR == 1;

    uint32_t exponent = 0;  // the unit's bits as a float; 0 before any scale

    // Take in scales, of which `largest` is the largest: returns the factor by which what was summed
    // before must be multiplied. A scale that is no number leads to sums that are none.
    __device__ __forceinline__ float raise(float largest) {
        const uint32_t own = bits_of(largest) & 0x7f800000u;
        const uint32_t before = exponent;
        exponent = max(exponent, own);
        return before == exponent ? 1.0f : float_of(before) * inverse();
    }
    __device__ __forceinline__ float inverse() const {
        return float_of((254u << 23) - exponent);
    }
    __device__ __forceinline__ float value() const { return float_of(exponent); }
};
