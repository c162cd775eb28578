// What products of codes by warpgroups need beyond tile_products.cuh: their first operand in registers
// and the second by rows, 16 to 64 columns; and stores of 16 bytes.
// The host has twins.
#pragma once

#include "tile_products.cuh"

#ifndef HOST_SHIM

#if HAS_TILE_PRODUCTS

// 16 bytes to shared memory, aligned to 16.
__device__ __forceinline__ void st_shared_16(void* p, const uint4& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(p)), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// The compiler may not move what uses these registers before it.
__device__ __forceinline__ void hold_vector(uint4& v) {
    asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)::"memory");
}

// d[64 x N] = a[64 x 16] @ b[16 x N] (+ d where `add`), bfloat16, started and not waited for; a from
// registers, b [N x 16] by rows from shared memory. As Wgmma of hopper.cuh, which says what a lane has.
template <int N>
struct CodeWgmma;

#define CODE_WGMMA_8(d, i) WGMMA_4(d, i), WGMMA_4(d, i + 1)
#define CODE_WGMMA_16(d, i) WGMMA_16(d, i)
#define CODE_WGMMA_24(d, i) WGMMA_16(d, i), CODE_WGMMA_8(d, i + 4)
#define CODE_WGMMA_32(d, i) WGMMA_32(d, i)
#define CODE_WGMMA_LIST_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define CODE_WGMMA_LIST_16 CODE_WGMMA_LIST_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define CODE_WGMMA_LIST_24 \
    CODE_WGMMA_LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define CODE_WGMMA_LIST_32 WGMMA_LIST_32

#define CODE_WGMMA_TYPE(N, COUNT, A0, A1, A2, A3, B, ADD)                                        \
    template <>                                                                                \
    struct CodeWgmma<N> {                                                                      \
        static __device__ __forceinline__ void registers(                                      \
            float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int add) {               \
            asm volatile(                                                                      \
                "{.reg .pred p; setp.ne.b32 p, %" #ADD ", 0;\n"                                \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16"                     \
                " {" CODE_WGMMA_LIST_##COUNT "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3         \
                "}, %" #B ", p, 1, 1, 0;}"                                                     \
                : CODE_WGMMA_##COUNT(d, 0)                                                     \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                       \
        }                                                                                      \
    };

CODE_WGMMA_TYPE(16, 8, 8, 9, 10, 11, 12, 13)
CODE_WGMMA_TYPE(32, 16, 16, 17, 18, 19, 20, 21)
CODE_WGMMA_TYPE(48, 24, 24, 25, 26, 27, 28, 29)
CODE_WGMMA_TYPE(64, 32, 32, 33, 34, 35, 36, 37)

#endif  // HAS_TILE_PRODUCTS
#endif  // HOST_SHIM
