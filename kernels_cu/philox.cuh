// Philox4x32-10: equal bit for bit to nanocupy/ops/philox.py.
// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include "device.cuh"

struct PhiloxWords {
    uint32_t word[4];
};

// Four random words of a counter under a seed, whose low half is the first key word.
__device__ __forceinline__ PhiloxWords philox4x32(PhiloxWords counter, uint64_t seed) {
    uint32_t c0 = counter.word[0], c1 = counter.word[1];
    uint32_t c2 = counter.word[2], c3 = counter.word[3];
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
        const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
        c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(p1);
        c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    PhiloxWords out;
    out.word[0] = c0;
    out.word[1] = c1;
    out.word[2] = c2;
    out.word[3] = c3;
    return out;
}

// One number in [0, 1) of 53 random bits, for the counter (position, sample, 0, 0).
__device__ __forceinline__ double philox_uniform(uint64_t seed, uint32_t position, uint32_t sample) {
    PhiloxWords counter;
    counter.word[0] = position;
    counter.word[1] = sample;
    counter.word[2] = 0;
    counter.word[3] = 0;
    const PhiloxWords w = philox4x32(counter, seed);
    return ((w.word[0] >> 5) * 67108864.0 + (w.word[1] >> 6)) / 9007199254740992.0;
}
