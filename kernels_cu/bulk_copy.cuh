// Barriers in shared memory that count bytes, and the copies that they count: from compute
// capability 9.0. Each instruction is behind one small function, with a twin for the host.
//
// HAS_BULK_COPY       1 where a build can use them; else nothing below exists.
// EVERY_LANE_ARRIVES  1: of a warp that arrives, every lane does. That one lane arrives for all once
//                     they have met is as good and cheaper, but a tool that watches single accesses
//                     for races does not see that order, as the meeting itself is no instruction
//                     where lanes cannot be apart: it is run on builds with this.
#pragma once

#include "device.cuh"

#ifndef HOST_SHIM

#if __CUDA_ARCH__ >= 900 && !FORCE_PLAIN
#define HAS_BULK_COPY 1
#else
#define HAS_BULK_COPY 0
#endif

#if HAS_BULK_COPY

// A barrier in shared memory. A phase ends when `arrivals` have come and all announced bytes have
// landed; `parity` is that of the phase waited for, 0 for the first.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}

// Barriers just made are seen by the copy engine. A block_sync must follow for the other threads.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// Arrive, and let the phase wait for `num_bytes` of the copy engine too.
__device__ __forceinline__ void mbarrier_arrive_expecting(uint64_t* barrier, int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(num_bytes)
                 : "memory");
}

// What was written or copied before the phase's end is seen after. A barrier nobody has arrived at
// lets a wait for parity 1 through, as if a phase had been before.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// Start to copy bytes that are read once from memory to shared memory: both aligned to 16, and so is
// their number. They count on `barrier`.
__device__ __forceinline__ void copy_bulk(
    void* shared, const void* global, int num_bytes, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
        "l"(global), "r"(num_bytes), "r"(shared_address(barrier)),
        "l"(0x12f0000000000000ull)  // createpolicy.fractional.L2::evict_first, all of them
        : "memory");
}

#endif
#endif  // HOST_SHIM

#if HAS_BULK_COPY

#ifndef EVERY_LANE_ARRIVES
#define EVERY_LANE_ARRIVES 0
#endif
constexpr int WARP_ARRIVALS = EVERY_LANE_ARRIVES ? 32 : 1;  // of mbarrier_arrive_warp

// What all lanes of the warp have read or written comes before the phase's end. Every lane must come.
__device__ __forceinline__ void mbarrier_arrive_warp(uint64_t* barrier) {
    warp_sync();
    if (EVERY_LANE_ARRIVES || lane_id() == 0) mbarrier_arrive(barrier);
}

#endif
