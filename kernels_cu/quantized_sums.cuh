// The sums of a warp: codes of a chunk of some strips times the inputs of all tokens, on tensor cores
// (mma.sync, from 8.0), for 16-bit types.
//
// STRIPS  of 16 rows that a warp works on at once: inputs are read from shared memory once for all of
//         them, and their sums wait for each other less (1)
//
// A group's products are summed in float32 by themselves; then they meet the scales of its rows, and
// with int4 the sum of its inputs meets their offsets.
#pragma once

#include "quantized_input.cuh"

#ifndef STRIPS
#define STRIPS 1
#endif
// Whether this build has the products; else their entries are empty and must not be launched.
#define QUANTIZED_ON_TENSOR_CORES (HAS_MMA && SCALAR != 0)

constexpr int TOKEN_TILES = TOKENS / 8;
constexpr int SUM_STRIDE = STRIPS * STRIP + 4;  // so that a warp's sums meet no bank twice

static_assert(TOKENS == 8 || TOKENS == 16 || TOKENS == 32, "TOKENS");

#if QUANTIZED_ON_TENSOR_CORES

// A warp's sums of STRIPS strips.
struct ChunkSums {
    float sums[STRIPS][TOKEN_TILES][4];

    __device__ __forceinline__ void clear_all() {
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) clear(sums[s]);
    }

    // A chunk's products are added. inputs: of each tile of tokens, this lane's token, from input 8 t of the chunk on, in shared
    // memory; input_sums: with int4, of the chunk's first group, from token 2 t on.
    template <typename Stream>
    __device__ __forceinline__ void multiply(
        const Stream& stream, const scalar_t* (&inputs)[TOKEN_TILES], const float* input_sums) {
        const unsigned char* chunks[STRIPS];
        uint4 codes[STRIPS];
        float group[STRIPS][TOKEN_TILES][4];
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) {
            chunks[s] = stream.chunk_at(s);
        }
#pragma unroll
        for (int q = 0; q < CHUNK / QUARTER; ++q) {
            uint4 b[TOKEN_TILES];
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) b[n] = ld_shared_16(inputs[n] + q * QUARTER);
#pragma unroll
            for (int s = 0; s < STRIPS; ++s) {
                if (WEIGHT_KIND != 1 || q % 2 == 0) {
                    codes[s] = ld_shared_16(chunks[s] + code_vector(q) * 512 + lane_id() * 16);
                }
                uint32_t a[2][4];
                code_operands(codes[s], q, a);
                if constexpr (GROUP >= QUARTER) {
                    if (q * QUARTER % GROUP == 0) clear(group[s]);
#pragma unroll
                    for (int n = 0; n < TOKEN_TILES; ++n) {
                        mma_m16n8k16<scalar_t>(group[s][n], a[0], b[n].x, b[n].y);
                        mma_m16n8k16<scalar_t>(group[s][n], a[1], b[n].z, b[n].w);
                    }
                    if ((q + 1) * QUARTER % GROUP == 0) {
                        add_group(s, chunks[s], (q + 1) * QUARTER / GROUP - 1, group[s], input_sums);
                    }
                } else {
                    // The lanes' inputs 8 t … belong to a group by t: the others' are taken as 0.
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const uint32_t mask = (lane_id() & 2) / 2 == half ? 0xffffffffu : 0u;
                        clear(group[s]);
#pragma unroll
                        for (int n = 0; n < TOKEN_TILES; ++n) {
                            mma_m16n8k16<scalar_t>(
                                group[s][n], a[0], b[n].x & mask, b[n].y & mask);
                            mma_m16n8k16<scalar_t>(
                                group[s][n], a[1], b[n].z & mask, b[n].w & mask);
                        }
                        add_group(s, chunks[s], 2 * q + half, group[s], input_sums);
                    }
                }
            }
        }
    }

    static __device__ __forceinline__ void clear(float (&sums)[TOKEN_TILES][4]) {
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
        }
    }

    // The sums of group `number` times its rows' scales, and the sum of its inputs times their offsets.
    __device__ __forceinline__ void add_group(
        int s, const unsigned char* chunk, int number, const float (&group)[TOKEN_TILES][4],
        const float* input_sums) {
        const unsigned char* place = chunk + CODE_BYTES + number * (STRIP * 4) + lane_id() / 4 * 8;
        float scales[2], offsets[2] = {0.0f, 0.0f};
        union {
            uint2 words;
            Vec<half_t, 4> halves;
            Vec<float, 2> floats;
        } read;
        read.words = ld_shared_8(place);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if constexpr (WEIGHT_KIND == 1) {
                scales[r] = to_float(read.halves.data[2 * r]);
                offsets[r] = fmaf(-CODE_BIAS, scales[r], to_float(read.halves.data[2 * r + 1]));
            } else {
                scales[r] = read.floats.data[r];
            }
        }
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
            float inputs[2] = {0.0f, 0.0f};
            if constexpr (WEIGHT_KIND == 1) {
                load_floats<float, 2>(input_sums + number * TOKENS + n * 8, inputs);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float& sum = sums[s][n][i];
                sum = fmaf(scales[i / 2], group[n][i], sum);
                if (WEIGHT_KIND == 1) sum = fmaf(offsets[i / 2], inputs[i % 2], sum);
            }
        }
    }

    // To `to` [TOKENS, SUM_STRIDE] in shared memory.
    __device__ __forceinline__ void store(float* to, int num_rows) const {
        const int g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = n * 8 + 2 * t + i % 2;
                if (token >= num_rows) continue;
#pragma unroll
                for (int s = 0; s < STRIPS; ++s) {
                    to[token * SUM_STRIDE + s * STRIP + g + i / 2 * 8] = sums[s][n][i];
                }
            }
        }
    }
};

#endif  // QUANTIZED_ON_TENSOR_CORES
