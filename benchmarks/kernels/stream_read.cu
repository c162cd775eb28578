// stream_read: reads memory once, as fast as the card does: the ceiling of kernels that read.
// grid any, block any; no shared memory
// data uint4 [count]; out uint32 [1], written where the bits of everything cancel out, so that the
//   reads are not for nothing
// COST: bytes: 16 * count
extern "C" __global__ void __launch_bounds__(512) stream_read(
    const uint4* data, unsigned int* out, long long count) {
    constexpr int AHEAD = 8;
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    unsigned int bits = 0;
    long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i + (AHEAD - 1) * threads < count; i += AHEAD * threads) {
        uint4 v[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) v[a] = __ldcs(data + i + a * threads);
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) bits ^= v[a].x ^ v[a].y ^ v[a].z ^ v[a].w;
    }
    for (; i < count; i += threads) {
        const uint4 v = data[i];
        bits ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    if (bits == 0x9e3779b9u) *out = bits;
}
