// Clusters, whose blocks run at once and reach each other's shared memory: a part of device.cuh,
// which includes it.
#pragma once

// The blocks of a cluster (launched along x) run at once and reach each other's shared memory.
// Without a cluster's size at the launch, and below 9.0, a block is a cluster of its own, which must
// not use what follows the two functions below: barrier and inbox are illegal then.
__device__ __forceinline__ int cluster_size() {
#if __CUDA_ARCH__ >= 900
    uint32_t size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return static_cast<int>(size);
#else
    return 1;
#endif
}
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return static_cast<int>(rank);
#else
    return 0;
#endif
}

// The barrier of a cluster in two halves; every thread of every block comes to both, in turn. After
// the second all blocks have started, and their make_inbox before the first is seen; no other memory
// is ordered, as that would cost a fence of the whole device.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// The barrier of a cluster for all memory: what any thread stored before, also in another block's
// shared memory, every thread sees after it. Every thread of every block comes.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// What block `rank` of the cluster has in shared memory where this one has *own. T is a 4- or
// 8-byte number; the block must have started and not have ended. From 9.0.
__device__ __forceinline__ uint32_t address_at_rank(const void* own, int rank) {
    uint32_t address = 0;
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(shared_address(own)), "r"(rank));
#endif
    return address;
}
template <typename T>
__device__ __forceinline__ T load_at_rank(const T* own, int rank) {
    union {
        T value;
        uint32_t word;
        uint64_t words;
    } x = {};
#if __CUDA_ARCH__ >= 900
    const uint32_t address = address_at_rank(own, rank);
    if (sizeof(T) == 8) {
        asm volatile("ld.shared::cluster.b64 %0, [%1];" : "=l"(x.words) : "r"(address) : "memory");
    } else {
        asm volatile("ld.shared::cluster.b32 %0, [%1];" : "=r"(x.word) : "r"(address) : "memory");
    }
#endif
    return x.value;
}
template <typename T>
__device__ __forceinline__ void store_at_rank(T* own, int rank, T value) {
#if __CUDA_ARCH__ >= 900
    union {
        T value;
        uint32_t word;
        uint64_t words;
    } x = {value};
    const uint32_t address = address_at_rank(own, rank);
    if (sizeof(T) == 8) {
        asm volatile("st.shared::cluster.b64 [%0], %1;" ::"r"(address), "l"(x.words) : "memory");
    } else {
        asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(address), "r"(x.word) : "memory");
    }
#endif
}

// An inbox is shared memory, 8 bytes of bookkeeping and what follows, that the blocks of the cluster
// store into: one thread says how many bytes will come, before the cluster's barrier, and after
// wait_for_inbox a thread sees them. It serves once. From 9.0.
__device__ __forceinline__ void make_inbox(uint64_t* inbox, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n"
        "fence.mbarrier_init.release.cluster;\n"
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(inbox)),
        "r"(bytes)
        : "memory");
#endif
}
__device__ __forceinline__ void wait_for_inbox(uint64_t* inbox) {
#if __CUDA_ARCH__ >= 900
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(inbox))
            : "memory");
    }
#endif
}

// The inbox that block `rank` of the cluster has where this one has its own.
struct RemoteInbox {
    uint32_t address;
};
__device__ __forceinline__ RemoteInbox inbox_of_rank(uint64_t* own, int rank) {
    RemoteInbox inbox = {};
#if __CUDA_ARCH__ >= 900
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(inbox.address)
        : "r"(shared_address(own)), "r"(rank));
#endif
    return inbox;
}

// Two floats to byte `offset`, a multiple of 8, of an inbox.
__device__ __forceinline__ void send_pair(RemoteInbox inbox, int offset, float a, float b) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::
            "r"(inbox.address + offset),
        "r"(__float_as_uint(a)), "r"(__float_as_uint(b)), "r"(inbox.address)
        : "memory");
#endif
}
