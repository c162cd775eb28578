// Copies of KV blocks, for swapping and for sharing.
#include "types.cuh"

// copy_blocks: copy listed blocks from one pool to another (or within one)
// grid (pairs, parts of a block, planes), block any multiple of 32, no shared memory
// from    bytes: block b of plane z begins at z * from_stride + b * block_bytes
// to      bytes, the same with to_stride; may be `from`, if no block is both source and target
// pairs   int32 [pairs, 2]: source, then target; targets are distinct
// A plane is one layer's keys or values. Host memory works where the device can address it.
// REF: to[z, target] = from[z, source]
// COST: 2 * pairs * planes * block_bytes bytes
extern "C" __global__ void __launch_bounds__(1024) copy_blocks(
    const uint8_t* from, uint8_t* to, const int32_t* pairs, int64_t block_bytes,
    int64_t from_stride, int64_t to_stride) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int64_t source = pairs[2 * static_cast<int64_t>(blockIdx.x)];
    const int64_t target = pairs[2 * static_cast<int64_t>(blockIdx.x) + 1];
    const uint8_t* read = from + blockIdx.z * from_stride + source * block_bytes;
    uint8_t* write = to + blockIdx.z * to_stride + target * block_bytes;
    const int64_t thread = static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.y) * blockDim.x;
    if (block_bytes % 16 == 0 && is_aligned_16(read) && is_aligned_16(write)) {
        for (int64_t i = thread; i < block_bytes / 16; i += threads) {
            reinterpret_cast<uint4*>(write)[i] = reinterpret_cast<const uint4*>(read)[i];
        }
    } else {
        for (int64_t i = thread; i < block_bytes; i += threads) write[i] = read[i];
    }
}
