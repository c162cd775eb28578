// What products of many tokens need of compute capability 9.0a beyond tile_products.cuh: products of
// 256 columns, pairs of 16-bit values in a register, a reciprocal that costs one instruction. The host
// has twins, and of what else of hopper.cuh such products use.
#pragma once

#include "tile_products.cuh"

#ifndef HOST_SHIM
#if HAS_TILE_PRODUCTS

#define WGMMA_128(d, i) WGMMA_64(d, i), WGMMA_64(d, i + 16)
#define WGMMA_LIST_128                                                                    \
    WGMMA_LIST_64                                                                         \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "  \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "    \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "    \
    "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
    "%124, %125, %126, %127"

WGMMA_TYPE(__nv_bfloat16, "bf16", 256, 128, 128, 129, 130, 131, 132, 133)
WGMMA_TYPE(__half, "f16", 256, 128, 128, 129, 130, 131, 132, 133)

// The two values of pack_two.
template <typename T>
__device__ __forceinline__ void unpack_two(uint32_t x, float& low, float& high);
template <>
__device__ __forceinline__ void unpack_two<__nv_bfloat16>(uint32_t x, float& low, float& high) {
    low = float_of(x << 16);
    high = float_of(x & 0xffff0000u);
}
template <>
__device__ __forceinline__ void unpack_two<__half>(uint32_t x, float& low, float& high) {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(low), "=f"(high)
        : "r"(x));
}

// 1 / x, with an error of one unit in the last place.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif  // HAS_TILE_PRODUCTS
#endif  // HOST_SHIM
