// Random weights for benches, made where they are used.
#include "philox.cuh"
#include "types.cuh"

// fill_normal: normal values of mean 0
// grid ceil(n / (4 * block)) or fewer, block any multiple of 32, no shared memory
// out        scalar_t [n]
// deviation  standard deviation; seed: the same gives the same values, element by element
// REF: Box and Muller 1958 over ops.philox; a test computes it
// COST: n * sizeof(scalar_t) bytes written; a Philox call and two Box-Muller pairs for 4 values
extern "C" __global__ void __launch_bounds__(1024) fill_normal(
    scalar_t* out, int64_t n, float deviation, uint64_t seed) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; 4 * i < n;
         i += stride) {
        PhiloxWords counter;
        counter.word[0] = static_cast<uint32_t>(i);
        counter.word[1] = static_cast<uint32_t>(i >> 32);
        counter.word[2] = counter.word[3] = 0;
        const PhiloxWords w = philox4x32(counter, seed);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            // In (0, 1], so that the logarithm is finite.
            const float u = ((w.word[2 * pair] >> 8) + 1) * (1.0f / 16777216.0f);
            const float angle = (w.word[2 * pair + 1] >> 8) * (6.2831853f / 16777216.0f);
            const float radius = deviation * sqrtf(-2.0f * logf(u));
            const int64_t at = 4 * i + 2 * pair;
            if (at < n) out[at] = from_float<scalar_t>(radius * cosf(angle));
            if (at + 1 < n) out[at + 1] = from_float<scalar_t>(radius * sinf(angle));
        }
    }
}
