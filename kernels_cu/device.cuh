// Every PTX instruction and intrinsic that the kernels use, each behind one small function.
//
// Kernels contain no inline PTX and call no intrinsic themselves, so that a build for the host
// (HOST_SHIM, for tests) can put functions of the same meaning in place of this file's.
// Blocks are one-dimensional and a multiple of 32 threads.
//
// HAS_MMA, HAS_CP_ASYNC   1 from compute capability 8.0: tensor cores with bfloat16, asynchronous
//                         copies. Below, or with -DFORCE_PLAIN=1, 0: kernels then choose a plain
//                         path. The cp_async functions exist always (they copy at once).
// HAS_CLUSTERS            1 from 9.0, in the same way: clusters of blocks and their inboxes.
#pragma once

#ifdef HOST_SHIM
#include "host_cuda.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
#ifdef __CUDACC_RTC__
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#ifndef FORCE_PLAIN
#define FORCE_PLAIN 0
#endif
#if __CUDA_ARCH__ >= 800 && !FORCE_PLAIN
#define HAS_MMA 1
#define HAS_CP_ASYNC 1
#else
#define HAS_MMA 0
#define HAS_CP_ASYNC 0
#endif
#if __CUDA_ARCH__ >= 900 && !FORCE_PLAIN
#define HAS_CLUSTERS 1
#else
#define HAS_CLUSTERS 0
#endif

constexpr int WARP_SIZE = 32;
constexpr uint32_t FULL_WARP = 0xffffffffu;

// ------------------------------------------------------------------------------ bits

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }
__device__ __forceinline__ int count_bits(uint32_t x) { return __popc(x); }

// (x & mask) | ones, in one instruction: of two constants the compiler makes two.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t ones) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(ones));
    return y;
}

// Index of the lowest bit set; x is not 0.
__device__ __forceinline__ int lowest_bit(uint32_t x) { return __ffs(x) - 1; }

__device__ __forceinline__ bool is_aligned_16(const void* p) {
    return (reinterpret_cast<uint64_t>(p) & 15) == 0;
}

// 2 ** x, with an error of two units in the last place.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// ------------------------------------------------------------------------------ threads

__device__ __forceinline__ int lane_id() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_id() { return threadIdx.x >> 5; }
__device__ __forceinline__ int num_warps() { return blockDim.x >> 5; }

// Every thread of the block must come.
__device__ __forceinline__ void block_sync() { __syncthreads(); }

// `threads` threads (whole warps) meet at barrier `id`, 1 to 15: a part of the block.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void warp_sync(uint32_t mask = FULL_WARP) { __syncwarp(mask); }

// Shuffles: every lane of the mask must come, with the same mask. T is a 4- or 8-byte number.
template <typename T>
__device__ __forceinline__ T shuffle(T value, int source, uint32_t mask = FULL_WARP) {
    return __shfl_sync(mask, value, source);
}
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int lanes, uint32_t mask = FULL_WARP) {
    return __shfl_xor_sync(mask, value, lanes);
}
// From the lane `lanes` below; lanes that have none keep their own.
template <typename T>
__device__ __forceinline__ T shuffle_up(T value, int lanes, uint32_t mask = FULL_WARP) {
    return __shfl_up_sync(mask, value, lanes);
}
// From the lane `lanes` above; lanes that have none keep their own.
template <typename T>
__device__ __forceinline__ T shuffle_down(T value, int lanes, uint32_t mask = FULL_WARP) {
    return __shfl_down_sync(mask, value, lanes);
}
__device__ __forceinline__ uint32_t warp_ballot(bool predicate, uint32_t mask = FULL_WARP) {
    return __ballot_sync(mask, predicate);
}

// ------------------------------------------------------------------------------ memory

extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];

// The shared memory whose size the launch gives, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() { return dynamic_shared_bytes; }

// Ask for `bytes` bytes from p on in L2; both multiples of 16. A hint, from compute capability 9.0;
// they must lie in an allocation.
__device__ __forceinline__ void prefetch_l2_span(const void* p, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes of shared memory, aligned to 16.
__device__ __forceinline__ uint4 ld_shared_16(const void* p) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared_address(p))
                 : "memory");
    return v;
}

// 8 bytes of shared memory, aligned to 8.
__device__ __forceinline__ uint2 ld_shared_8(const void* p) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "r"(shared_address(p))
                 : "memory");
    return v;
}

// p, kept in a register: the compiler would work out a place in shared memory anew in every turn of a
// loop, which takes longer than the load. Such a place is read with ld_shared_16.
template <typename T>
__device__ __forceinline__ T* keep_pointer(T* p) {
    asm volatile("" : "+l"(p));
    return p;
}

// Copy 16 bytes to shared memory, both aligned to 16; they are there for this thread after
// cp_async_wait, and for the block after the barrier that follows.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
#if HAS_CP_ASYNC
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(global)
                 : "memory");
#else
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

// The same; where not `valid`, zeros are written and `global` is not read.
__device__ __forceinline__ void cp_async_16_or_zero(void* shared, const void* global, bool valid) {
#if HAS_CP_ASYNC
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
#else
    *static_cast<uint4*>(shared) =
        valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

// The copies since the last commit become a group (an empty group counts too).
__device__ __forceinline__ void cp_async_commit() {
#if HAS_CP_ASYNC
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Wait until at most N of the newest groups are still under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#if HAS_CP_ASYNC
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// ------------------------------------------------------------------------------ tensor cores

// Four 8x8 matrices of 16-bit values from shared memory. Lane l names row l % 8 of matrix l / 8
// (16 bytes, aligned); r[i] holds of matrix i the values (row lane / 4, columns 2 * (lane % 4) and
// the next). The _trans form gives the transposed matrices in that layout.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c[16x8] += a[16x16] @ b[16x8], operands of T (__half or __nv_bfloat16), sums in float32. With
// g = lane / 4, t = lane % 4, low half of a register first:
//   a[0] (g, 2t..), a[1] (g + 8, 2t..), a[2] (g, 2t + 8..), a[3] (g + 8, 2t + 8..)
//   b0 (k 2t.., n g), b1 (k 2t + 8.., n g);  c[0], c[1] (g, 2t..), c[2], c[3] (g + 8, 2t..)
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(
    float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#if HAS_MMA
template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(
    float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(
    float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// Two 16-bit values of T (__half or __nv_bfloat16) in a register: a - b and a * b, each rounded;
// subnormal numbers count.
template <typename T>
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b);
template <typename T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b);

#if HAS_MMA
template <>
__device__ __forceinline__ uint32_t subtract_pairs<__half>(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
template <>
__device__ __forceinline__ uint32_t multiply_pairs<__half>(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}
template <>
__device__ __forceinline__ uint32_t subtract_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
    uint32_t y;  // b * -1 + a: a subtraction of its own exists from 9.0 only
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(b), "r"(0xbf80bf80u), "r"(a));
    return y;
}
template <>
__device__ __forceinline__ uint32_t multiply_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(0x80008000u));
    return y;
}
#endif

// ------------------------------------------------------------------------------ across blocks

// Returns the value before. Relaxed: fence around them what must be seen with them.
__device__ __forceinline__ uint32_t atomic_add(uint32_t* p, uint32_t x) { return atomicAdd(p, x); }
__device__ __forceinline__ int32_t atomic_add(int32_t* p, int32_t x) { return atomicAdd(p, x); }
__device__ __forceinline__ float atomic_add(float* p, float x) { return atomicAdd(p, x); }
__device__ __forceinline__ uint64_t atomic_add(uint64_t* p, uint64_t x) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(x));
}
// Old value; then *p is 0 if it was `last` or more, else one more. The block that gets `last` is
// the last of last + 1, and the counter is ready for the next launch.
__device__ __forceinline__ uint32_t atomic_count_to(uint32_t* p, uint32_t last) {
    return atomicInc(p, last);
}

// What this thread wrote before is seen by the whole device before what it writes after.
__device__ __forceinline__ void device_fence() { __threadfence(); }

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
    uint32_t x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
// 8 bytes that others may write or read meanwhile: each is seen whole, old or new, and nothing is said
// of other memory. Two of them in a row, the first aligned to 16.
__device__ __forceinline__ void store_word(uint64_t* p, uint64_t x) {
#if __CUDA_ARCH__ >= 700
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(x) : "memory");
#endif
}
__device__ __forceinline__ uint64_t load_word(const uint64_t* p) {
    uint64_t x = 0;
#if __CUDA_ARCH__ >= 700
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
#endif
    return x;
}
__device__ __forceinline__ void load_two_words(const uint64_t* p, uint64_t& a, uint64_t& b) {
#if __CUDA_ARCH__ >= 700
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(a), "=l"(b) : "l"(p) : "memory");
#endif
}

// A read that no cache of this multiprocessor answers: of what other blocks write meanwhile.
template <typename T>
__device__ __forceinline__ T load_volatile(const T* p) {
    return *const_cast<const volatile T*>(p);
}

// Called in every turn of a loop that waits for another block.
__device__ __forceinline__ void spin_pause() { __nanosleep(20); }
// The same where every moment counts and few threads wait.
__device__ __forceinline__ void spin_wait() {}

// ------------------------------------------------------------------------------ launches

// Programmatic dependent launch: wait for the kernels before (their writes are then seen), and let
// the next one start. Without it both do nothing, and the stream's order holds.
__device__ __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Cycles of the multiprocessor's clock, which wrap.
__device__ __forceinline__ uint32_t clock_cycles() {
    uint32_t t;
    asm volatile("mov.u32 %0, %clock;" : "=r"(t));
    return t;
}

// Nanoseconds of a clock that all multiprocessors share.
__device__ __forceinline__ uint64_t globaltimer_ns() {
    uint64_t t;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
    return t;
}

#include "cluster.cuh"
#include "small_numbers.cuh"

#endif  // HOST_SHIM
