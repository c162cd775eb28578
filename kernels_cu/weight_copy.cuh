// Copies of weights to shared memory, as cp_async_16 of device.cuh makes them. A step reads weights
// once, and more of them than the L2 holds: they are the first to leave it, so that what a step comes
// back to stays there, and that is not its activations alone, but the code of its kernels.
//
// `shared` must come from a pointer that depends on the thread, kept by keep_pointer: where it was a sum
// of a place that all threads know and of a register, NVRTC 13.0 gave one build of many an instruction
// that an H100 calls illegal (in SASS: [R19+UR0], desc[UR1]). So skinny_parts.cuh does without.
#pragma once

#include "device.cuh"

#ifndef HOST_SHIM

#if HAS_CP_ASYNC
__device__ __forceinline__ uint64_t first_to_leave() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
#endif

__device__ __forceinline__ void copy_weights_16(void* shared, const void* global) {
#if HAS_CP_ASYNC
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(
                     shared_address(shared)),
                 "l"(global), "l"(first_to_leave())
                 : "memory");
#else
    cp_async_16(shared, global);
#endif
}

// The same; where not `valid`, zeros are written and `global` is not read.
__device__ __forceinline__ void copy_weights_16_or_zero(
    void* shared, const void* global, bool valid) {
#if HAS_CP_ASYNC
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(valid ? 16 : 0), "l"(first_to_leave())
                 : "memory");
#else
    cp_async_16_or_zero(shared, global, valid);
#endif
}

#else

#define copy_weights_16 cp_async_16
#define copy_weights_16_or_zero cp_async_16_or_zero

#endif  // HOST_SHIM
