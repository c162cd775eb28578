// What compute capability 9.0a has beyond device.cuh and bulk_copy.cuh, each instruction behind one
// small function: the copy engine with tensor maps, products of a warpgroup, registers moved between
// warpgroups. There is no twin for the host: kernels that use it run on a device alone.
//
// HAS_WGMMA   1 where a build can use all of it; else nothing below exists but TensorMap.
#pragma once

#include "bulk_copy.cuh"
#include "types.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !FORCE_PLAIN
#define HAS_WGMMA 1
#else
#define HAS_WGMMA 0
#endif

// A CUtensorMap, as a kernel takes it: by value, a `const __grid_constant__` parameter.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

#if HAS_WGMMA

constexpr int WARPGROUP = 128;  // threads

// The other half of device.cuh's barrier_sync: be counted, and go on.
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ------------------------------------------------------------------------------ copy engine

__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Start the copy of a box to shared memory, aligned to the swizzle's 1024 bytes; elements outside
// the tensor arrive as zeros. Coordinates innermost first. The bytes count on `barrier`.
__device__ __forceinline__ void copy_box(
    uint32_t target, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
        : "memory");
}
__device__ __forceinline__ void copy_box(
    uint32_t target, const TensorMap* map, uint64_t* barrier, int c0, int c1, int c2, int c3,
    int c4) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(target),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
        : "memory");
}

// What this thread wrote to shared memory is seen by copies and products that come later.
__device__ __forceinline__ void shared_to_async_fence() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ------------------------------------------------------------------------------ warpgroups

// The whole warpgroup must come; N is a multiple of 8. Registers of a thread from here on.
template <int N>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// Before the first product of a group, and after registers it uses were written.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Wait until at most N of the newest groups are still at work.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The compiler may not move uses of these registers across: products write them unseen.
template <int N, int M>
__device__ __forceinline__ void hold_registers(float (&d)[N][M]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int j = 0; j < M; ++j) asm volatile("" : "+f"(d[i][j])::"memory");
    }
}
template <int N, int M>
__device__ __forceinline__ void hold_registers(uint32_t (&d)[N][M]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int j = 0; j < M; ++j) asm volatile("" : "+r"(d[i][j])::"memory");
    }
}

// Describes an operand in shared memory that lies in atoms of 8 rows of 128 bytes, swizzled as the
// copy engine does it. Each atom is aligned to 1024 bytes.
//   rows are the operand's rows, values of k side by side: `step` bytes from 8 rows to the next 8;
//     the next 16 of k are 32 bytes on, 64 are in an atom. `across` is not used.
//   rows are k, 64 values of the operand's rows side by side (transposed): `step` bytes from 8 of
//     k to the next 8, `across` from 64 values to the next 64.
__device__ __forceinline__ uint64_t operand(uint32_t address, int step, int across = 16) {
    constexpr uint64_t SWIZZLE_128 = 1ull << 62;
    return SWIZZLE_128 | (address & 0x3ffff) >> 4 | static_cast<uint64_t>(across >> 4) << 16 |
           static_cast<uint64_t>(step >> 4) << 32;
}
// The same operand, `num_bytes` further on.
__device__ __forceinline__ uint64_t operand_at(uint64_t operand, int num_bytes) {
    return operand + (num_bytes >> 4);
}

// d[64 x N] = a[64 x 16] @ b[16 x N] (+ d where `add`), started and not waited for; b comes from
// shared memory, a too or from registers. T is __half or __nv_bfloat16, sums are float32. Warp w of
// the group has rows 16 w on, and of those, a lane has what it has of mma_m16n8k16's c and a:
// d[n] are columns 8 n on.
template <typename T, int N>
struct Wgmma;

#define WGMMA_4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define WGMMA_16(d, i) WGMMA_4(d, i), WGMMA_4(d, i + 1), WGMMA_4(d, i + 2), WGMMA_4(d, i + 3)
#define WGMMA_32(d, i) WGMMA_16(d, i), WGMMA_16(d, i + 4)
#define WGMMA_64(d, i) WGMMA_32(d, i), WGMMA_32(d, i + 8)
#define WGMMA_LIST_32                                                         \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "  \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_LIST_64                                                             \
    WGMMA_LIST_32                                                                 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
    "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// COUNT registers of sums a thread; A0 … B2: numbers of the operands behind them.
#define WGMMA_TYPE(TYPE, NAME, N, COUNT, A0, A1, A2, A3, A4, A5)                               \
    template <>                                                                                \
    struct Wgmma<TYPE, N> {                                                                    \
        /* b [N x 16] by rows */                                                               \
        static __device__ __forceinline__ void shared(                                         \
            float (&d)[N / 8][4], uint64_t a, uint64_t b, int add) {                           \
            asm volatile(                                                                      \
                "{.reg .pred p; setp.ne.b32 p, %" #A2 ", 0;\n"                                 \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                \
                " {" WGMMA_LIST_##COUNT "}, %" #A0 ", %" #A1 ", p, 1, 1, 0, 0;}"               \
                : WGMMA_##COUNT(d, 0)                                                          \
                : "l"(a), "l"(b), "r"(add));                                                   \
        }                                                                                      \
        /* b by k: transposed */                                                               \
        static __device__ __forceinline__ void registers(                                      \
            float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, int add) {               \
            asm volatile(                                                                      \
                "{.reg .pred p; setp.ne.b32 p, %" #A5 ", 0;\n"                                 \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME                \
                " {" WGMMA_LIST_##COUNT "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #A4   \
                ", p, 1, 1, 1;}"                                                               \
                : WGMMA_##COUNT(d, 0)                                                          \
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));               \
        }                                                                                      \
    };

WGMMA_TYPE(__nv_bfloat16, "bf16", 64, 32, 32, 33, 34, 35, 36, 37)
WGMMA_TYPE(__nv_bfloat16, "bf16", 128, 64, 64, 65, 66, 67, 68, 69)
WGMMA_TYPE(__half, "f16", 64, 32, 32, 33, 34, 35, 36, 37)
WGMMA_TYPE(__half, "f16", 128, 64, 64, 65, 66, 67, 68, 69)

// Two floats rounded to T in one instruction, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_two(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_two<__nv_bfloat16>(float low, float high) {
    uint32_t x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}
template <>
__device__ __forceinline__ uint32_t pack_two<__half>(float low, float high) {
    uint32_t x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}

#endif  // HAS_WGMMA
