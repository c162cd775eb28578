// A tensor-core product with double-buffered copies: what the shim itself is tried on.
#include "types.cuh"

// tiled_gemm: c = a @ b.T in tiles of 64 x 64 x 32
// grid (ceil(N / 64), ceil(M / 64)), block 128, shared 2 * 2 * 64 * 40 * 2 bytes
// a scalar_t [M, K], b scalar_t [N, K], c float [M, N]; K a multiple of 8
// COST: 2 * M * N * K flops
constexpr int TILE = 64, STEP = 32, PITCH = 40;  // the pitch keeps ldmatrix free of bank conflicts

__device__ __forceinline__ void copy_tile(
    scalar_t* to, const scalar_t* from, int32_t first, int32_t rows, int32_t k, int32_t K) {
    for (int i = threadIdx.x; i < TILE * STEP / 8; i += blockDim.x) {
        const int row = i / (STEP / 8), column = i % (STEP / 8) * 8;
        const bool inside = first + row < rows && k + column < K;
        const int64_t at = inside ? static_cast<int64_t>(first + row) * K + k + column : 0;
        cp_async_16_or_zero(to + row * PITCH + column, from + at, inside);
    }
}

extern "C" __global__ void __launch_bounds__(128) tiled_gemm(
    const scalar_t* __restrict__ a, const scalar_t* __restrict__ b, float* __restrict__ c,
    int32_t M, int32_t N, int32_t K) {
#if HAS_MMA && SCALAR != 0
    scalar_t* tiles_a = reinterpret_cast<scalar_t*>(dynamic_shared());
    scalar_t* tiles_b = tiles_a + 2 * TILE * PITCH;
    const int row0 = blockIdx.y * TILE, column0 = blockIdx.x * TILE;
    const int lane = lane_id(), warp = warp_id();
    float sums[8][4] = {};
    const int steps = (K + STEP - 1) / STEP;
    copy_tile(tiles_a, a, row0, M, 0, K);
    copy_tile(tiles_b, b, column0, N, 0, K);
    cp_async_commit();
    for (int s = 0; s < steps; ++s) {
        const int stage = s % 2 * TILE * PITCH, next = (s + 1) % 2 * TILE * PITCH;
        if (s + 1 < steps) {
            copy_tile(tiles_a + next, a, row0, M, (s + 1) * STEP, K);
            copy_tile(tiles_b + next, b, column0, N, (s + 1) * STEP, K);
        }
        cp_async_commit();
        cp_async_wait<1>();
        block_sync();  // the tile is there
        for (int k = 0; k < STEP; k += 16) {
            uint32_t left[4];
            ldmatrix_x4(left, tiles_a + stage + (warp * 16 + lane % 16) * PITCH + k + lane / 16 * 8);
            for (int n = 0; n < 4; ++n) {
                uint32_t right[4];
                const int row = n * 16 + lane % 8 + lane / 16 * 8;
                ldmatrix_x4(right, tiles_b + stage + row * PITCH + k + lane / 8 % 2 * 8);
                mma_m16n8k16<scalar_t>(sums[2 * n], left, right[0], right[1]);
                mma_m16n8k16<scalar_t>(sums[2 * n + 1], left, right[2], right[3]);
            }
        }
        block_sync();  // the tile may be overwritten
    }
    for (int n = 0; n < 8; ++n) {
        for (int i = 0; i < 4; ++i) {
            const int row = row0 + warp * 16 + lane / 4 + i / 2 * 8;
            const int column = column0 + n * 8 + lane % 4 * 2 + i % 2;
            if (row < M && column < N) c[static_cast<int64_t>(row) * N + column] = sums[n][i];
        }
    }
#endif
}
