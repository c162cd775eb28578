// What stands for kernels_cu/tall_products.cuh on the host, and for what its users take of hopper.cuh.
// Wgmma of any number of columns stands in host_tile_products.h.
#pragma once

template <int N>
inline void take_registers() {}
template <int N>
inline void give_registers() {}

template <typename T>
inline T from_float_for_pack(float x);
template <>
inline __half from_float_for_pack(float x) {
    return __float2half_rn(x);
}
template <>
inline __nv_bfloat16 from_float_for_pack(float x) {
    return __float2bfloat16_rn(x);
}

template <typename T>
inline uint32_t pack_two(float low, float high) {
    return from_float_for_pack<T>(low).bits | uint32_t(from_float_for_pack<T>(high).bits) << 16;
}

template <typename T>
inline void unpack_two(uint32_t x, float& low, float& high) {
    low = shim::value_of(T{uint16_t(x)});
    high = shim::value_of(T{uint16_t(x >> 16)});
}

inline float reciprocal_approx(float x) { return 1.0f / x; }
