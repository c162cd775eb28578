// What products of tiles need of compute capability 9.0a beyond hopper.cuh: boxes of matrices, also for
// several blocks at once, copies between blocks, and products of 96 columns. The host has twins, and
// of what else of hopper.cuh such products use.
//
// HAS_TILE_PRODUCTS   1 where a build can use them; else nothing below exists.
#pragma once

#include "hopper.cuh"

#ifndef HOST_SHIM

#define HAS_TILE_PRODUCTS HAS_WGMMA

#if HAS_TILE_PRODUCTS

// As copy_box of hopper.cuh, of a matrix. The bytes that count on `barrier` are those of the whole
// box, zeros too.
__device__ __forceinline__ void copy_box(
    uint32_t target, const TensorMap* map, uint64_t* barrier, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(target),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1)
        : "memory");
}

// The same to all blocks of the cluster that have a bit in `ranks`: to the place that each has where
// this one has `target`, counted on the barrier that it has where this one has `barrier`.
__device__ __forceinline__ void copy_box_to_ranks(
    uint32_t target, const TensorMap* map, uint64_t* barrier, uint32_t ranks, int c0, int c1) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(target),
        "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1),
        "h"(static_cast<uint16_t>(ranks))
        : "memory");
}

// Arrive at the barrier that block `rank` of the cluster has where this one has `own`. The block must
// have made it, and not have ended.
__device__ __forceinline__ void mbarrier_arrive_at_rank(const uint64_t* own, int rank) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_at_rank(own, rank))
                 : "memory");
}

// Start to copy bytes of this block's shared memory to the place that block `rank` of the cluster has
// where this one has `to`: both aligned to 16, and so is their number. They count on the barrier that it
// has where this one has `barrier`; until then neither block may end, nor the source change. What threads
// have written there needs a shared_to_async_fence by each of them, before.
__device__ __forceinline__ void copy_to_rank(
    const void* to, const void* from, int num_bytes, const uint64_t* barrier, int rank) {
    asm volatile(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
        "[%0], [%1], %2, [%3];" ::"r"(address_at_rank(to, rank)),
        "r"(shared_address(from)), "r"(num_bytes), "r"(address_at_rank(barrier, rank))
        : "memory");
}

#define WGMMA_48(d, i) WGMMA_32(d, i), WGMMA_16(d, i + 8)
#define WGMMA_LIST_48                                                               \
    WGMMA_LIST_32                                                                   \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"

WGMMA_TYPE(__nv_bfloat16, "bf16", 96, 48, 48, 49, 50, 51, 52, 53)
WGMMA_TYPE(__half, "f16", 96, 48, 48, 49, 50, 51, 52, 53)

#endif  // HAS_TILE_PRODUCTS
#endif  // HOST_SHIM
