// What stands for kernels_cu/small_numbers.cuh on the CPU.
#pragma once

template <uint32_t SELECTED>
inline uint32_t pick_bytes(uint32_t low, uint32_t high) {
    static_assert((SELECTED & 0x8888) == 0 && SELECTED <= 0xffff, "four digits from 0 to 7");
    const uint64_t both = uint64_t(high) << 32 | low;
    uint32_t picked = 0;
    for (int i = 0; i < 4; ++i) {
        picked |= uint32_t(both >> (SELECTED >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    }
    return picked;
}

inline uint32_t masked_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
inline uint32_t masked_xor(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) ^ bits; }

// By search, unlike the device's: of all finite numbers of the type the nearest.
inline float e4m3_to_float(uint8_t bits) {
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    const float value = exponent ? ldexpf(float(8 + fraction), exponent - 10)
                                 : ldexpf(float(fraction), -9);
    return bits & 0x80 ? -value : value;
}
inline uint8_t float_to_e4m3(float x) {
    const float size = x < 0 ? -x : x;
    uint8_t best = 0;
    for (int code = 1; code <= 0x7e; ++code) {
        const double off = double(size) - e4m3_to_float(uint8_t(code));
        const double best_off = double(size) - e4m3_to_float(best);
        const double a = off < 0 ? -off : off, b = best_off < 0 ? -best_off : best_off;
        if (a < b || (a == b && code % 2 == 0)) best = uint8_t(code);
    }
    return uint8_t(best | (bits_of(x) >> 24 & 0x80));
}

namespace shim {

template <typename T>
uint32_t of_pairs(uint32_t a, uint32_t b, float (*op)(float, float)) {
    uint32_t result = 0;
    for (int i = 0; i < 2; ++i) {
        T x = {uint16_t(a >> 16 * i)}, y = {uint16_t(b >> 16 * i)}, z;
        if constexpr (std::is_same<T, __half>::value) {
            z = __float2half_rn(op(__half2float(x), __half2float(y)));
        } else {
            z = __float2bfloat16_rn(op(__bfloat162float(x), __bfloat162float(y)));
        }
        result |= uint32_t(z.bits) << 16 * i;
    }
    return result;
}

}  // namespace shim

template <typename T>
inline uint32_t pair_difference(uint32_t a, uint32_t b) {
    return shim::of_pairs<T>(a, b, [](float x, float y) { return x - y; });
}
template <typename T>
inline uint32_t pair_product(uint32_t a, uint32_t b) {
    return shim::of_pairs<T>(a, b, [](float x, float y) { return x * y; });
}

// A build may turn it off, to run the path of cards that have no such instruction.
#ifndef HAS_E4M3_PAIRS
#define HAS_E4M3_PAIRS HAS_MMA
#endif
inline uint32_t e4m3_pair_to_half(uint32_t codes) {
    uint32_t pair = 0;
    for (int i = 0; i < 2; ++i) {
        pair |= uint32_t(__float2half_rn(e4m3_to_float(uint8_t(codes >> 8 * i))).bits) << 16 * i;
    }
    return pair;
}
