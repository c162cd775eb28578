// What the products of quantized_stream.cuh are made of: copies of codes and of inputs, and a warp's
// product of a chunk.
//
// WEIGHT_KIND, GROUP  as in quantized_format.cuh
// TOKENS       that a block has room for: a multiple of 16, at least the batch
// OUT_TILE     rows of weights of a block: a multiple of 16 * WARPS_N * STRIPS
// WARPS_N      warps that share these rows, whole strips of 16 each
// WARPS_K      warps that share a block's inputs, a chunk of 128 in turn: 1, 2, 4 or 8
// STRIPS       that a warp works on at once: inputs are read from shared memory once for all of them
// STAGES       chunks of each of these strips in a warp's ring, on their way or landed; from 2
// MIN_BLOCKS   blocks that must fit on a multiprocessor: bounds the registers
#pragma once

#ifndef WARPS_K
#define WARPS_K 1
#endif
#ifndef STRIPS
#define STRIPS 1
#endif
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 1
#endif
#define K_STEP 128  // of skinny_parts.cuh: a chunk

#include "quantized_format.cuh"
#include "skinny.cuh"

#if SKINNY_ON_TENSOR_CORES

constexpr int TOKEN_TILES = TOKENS / 8;
constexpr int PASSES = ROW_TILES / STRIPS;  // of a warp along the inputs
constexpr int INPUT_PARTS = 4;              // in which inputs come: products begin with the first
// Of the stages, those on their way before inputs: nothing is known to be there before all that was
// asked for earlier, and memory should not have come to the end of its work then.
constexpr int EARLY_STAGES = STAGES * 2 / 3;
constexpr int SLOT_BYTES = STRIPS * CHUNK_BYTES;
constexpr int WARP_RING_BYTES = STAGES * SLOT_BYTES;
constexpr int GROUP_SUMS = WEIGHT_KIND == 1 ? GROUPS * TOKENS : 0;  // of a chunk

static_assert(STAGES >= 2 && TOKENS % 16 == 0 && STRIP == 16 && CHUNK == K_STEP, "");
static_assert(PASSES * STRIPS == ROW_TILES && ROW_TILES * WARPS_N * STRIP == OUT_TILE, "OUT_TILE");

struct PackedCodes {
    const unsigned char* packed;  // [num_strips, num_chunks, CHUNK_BYTES]
    float unit;                   // of scales and offsets, a power of two
};

// A warp's chunks on their way through its ring, STRIPS at a time: along the inputs, then those of its
// next strips. One group of copies each time, empty where there is nothing.
template <bool PAIRS>
struct CodeStream {
    const unsigned char* from;  // this lane's vector of the next chunk of the first of STRIPS strips
    unsigned char* ring;
    int strip_bytes;
    int num_strips;             // of the matrix, from those on their way on
    int num_steps;              // chunks of the warp, of each strip
    int passes_left, step = 0;  // what comes next
    int place = 0;              // of the oldest chunks, in bytes

    __device__ __forceinline__ CodeStream(
        const SkinnyShare<PAIRS>& share, const PackedCodes& codes, unsigned char* rings) {
        constexpr int OUTPUTS = PAIRS ? STRIP / 2 : STRIP;
        const int all_strips = (share.matrix.num_outputs + OUTPUTS - 1) / OUTPUTS;
        const int first = share.first_tile * (OUT_TILE / STRIP) + WarpSums::warp_n() * ROW_TILES;
        const int chunk = share.first_step + WarpSums::warp_k();
        num_strips = all_strips - first;
        passes_left = min(PASSES, (max(num_strips, 0) + STRIPS - 1) / STRIPS);
        num_steps = passes_left == 0
                        ? 0
                        : (share.num_steps - WarpSums::warp_k() + WARPS_K - 1) / WARPS_K;
        if (num_steps == 0) passes_left = 0;
        strip_bytes = (share.matrix.num_inputs + CHUNK - 1) / CHUNK * CHUNK_BYTES;
        from = codes.packed + static_cast<int64_t>(first) * strip_bytes + chunk * CHUNK_BYTES +
               lane_id() * 16;
        ring = keep_pointer(rings + warp_id() * WARP_RING_BYTES);
    }

    __device__ __forceinline__ const unsigned char* oldest() const { return ring + place; }

    // Copy to where the oldest chunks were. The warp's lanes have all used these.
    __device__ __forceinline__ void bring() {
        if (passes_left > 0) {
            unsigned char* to = ring + place + lane_id() * 16;
            const unsigned char* source = from;
#pragma unroll
            for (int s = 0; s < STRIPS; ++s) {
                if (s < num_strips) {
#pragma unroll
                    for (int i = 0; i < CODE_VECTORS; ++i) {
                        copy_weights_16(to + i * 512, source + i * 512);
                    }
                    if (lane_id() < SCALE_BYTES / 16) {
                        copy_weights_16(to + CODE_BYTES, source + CODE_BYTES);
                    }
                }
                to += CHUNK_BYTES;
                source += strip_bytes;
            }
            from += WARPS_K * CHUNK_BYTES;
            if (++step == num_steps) {
                step = 0;
                --passes_left;
                num_strips -= STRIPS;
                from += static_cast<int64_t>(STRIPS) * strip_bytes -
                        num_steps * (WARPS_K * CHUNK_BYTES);
            }
        }
        cp_async_commit();
        place = place == WARP_RING_BYTES - SLOT_BYTES ? 0 : place + SLOT_BYTES;
    }
};

// Wait until at most `count` of the newest groups of copies are still under way; MOST that are told
// apart.
template <int MOST>
__device__ __forceinline__ void wait_for_groups(int count) {
    if constexpr (MOST == 0) {
        cp_async_wait<0>();
    } else if (count >= MOST) {
        cp_async_wait<MOST>();
    } else {
        wait_for_groups<MOST - 1>(count);
    }
}

// The byte of piece `piece`, of 8 inputs, of a token in a chunk. Lanes read pieces 4 q … 4 q + 3 of two
// tokens side by side at once: those of odd ones lie in the other half of 128 bytes.
__device__ __forceinline__ int input_place(int token, int piece) {
    return token * ROW_BYTES + (piece ^ (token & 1) * 4) * 16;
}

// Copy a block's inputs of chunks `first` to `end` to `to`, [chunks, TOKENS, CHUNK]; what is beyond
// the matrix or the batch becomes 0.
template <bool PAIRS>
__device__ __forceinline__ void bring_inputs(
    const SkinnyShare<PAIRS>& share, unsigned char* to, int first, int end) {
    const SkinnyMatrix& matrix = share.matrix;
#pragma unroll 2
    for (int i = first * (TOKENS * PIECES) + threadIdx.x; i < end * (TOKENS * PIECES);
         i += BLOCK_THREADS) {
        const int piece = i % PIECES, token = i / PIECES % TOKENS, chunk = i / (TOKENS * PIECES);
        const int input = (share.first_step + chunk) * CHUNK + piece * 8;
        const bool valid = token < matrix.num_rows && input < matrix.num_inputs;
        cp_async_16_or_zero(
            to + chunk * INPUT_BYTES + input_place(token, piece),
            matrix.x + (valid ? token * matrix.num_inputs + input : 0), valid);
    }
}

// Products of a chunk of the inputs of all tokens with STRIPS strips.
struct ChunkProduct {
    typedef float TokenSums[TOKEN_TILES][4];

    // The byte in a chunk's inputs at which this lane reads: its token of the first eight, input 8 t.
    static __device__ __forceinline__ int place_of_lane() {
        return input_place(lane_id() / 4, lane_id() % 4);
    }
    // Its 8 inputs of the 32 of `quarter`, of tile `n` of tokens.
    static __device__ __forceinline__ uint4 inputs_of(
        const unsigned char* inputs, const unsigned char* other, int quarter, int n) {
        return ld_shared_16(
            (quarter % 2 ? other : inputs) + quarter / 2 * 128 + n * (8 * ROW_BYTES));
    }
    // Where it reads of odd quarters: in the other half of 128 bytes.
    static __device__ __forceinline__ const unsigned char* other_half(const unsigned char* inputs) {
        return inputs + (lane_id() & 4 ? -64 : 64);
    }

    // The sums of a chunk's inputs by group, of tile `n` of tokens, to `to` [GROUPS, TOKENS]. The whole
    // warp comes.
    static __device__ __forceinline__ void sum_inputs(
        const unsigned char* inputs, int n, float* to) {
        const uint32_t one = pack_pair<scalar_t>(1.0f, 1.0f);
        const uint32_t ones[4] = {one, one, one, one};
        const unsigned char* const other = other_half(inputs);
        // Two sums for each 32 inputs, so that products do not wait for each other.
        float parts[CHUNK / QUARTER][2][4];
#pragma unroll
        for (int q = 0; q < CHUNK / QUARTER; ++q) {
            const uint4 b = inputs_of(inputs, other, q, n);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int i = 0; i < 4; ++i) parts[q][half][i] = 0.0f;
            }
            if constexpr (GROUP >= QUARTER) {
                mma_m16n8k16<scalar_t>(parts[q][0], ones, b.x, b.y);
                mma_m16n8k16<scalar_t>(parts[q][1], ones, b.z, b.w);
            } else {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t mask = half_mask(half);
                    mma_m16n8k16<scalar_t>(parts[q][half], ones, b.x & mask, b.y & mask);
                    mma_m16n8k16<scalar_t>(parts[q][half], ones, b.z & mask, b.w & mask);
                }
            }
        }
        if (lane_id() >= 4) return;  // all rows are alike
        constexpr int PARTS = 2 * GROUP / QUARTER;  // of a group
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            float total[2] = {0.0f, 0.0f};
#pragma unroll
            for (int p = g * PARTS; p < (g + 1) * PARTS; ++p) {
                total[0] += parts[p / 2][p % 2][0];
                total[1] += parts[p / 2][p % 2][1];
            }
            store_floats<float, 2>(to + g * TOKENS + n * 8 + lane_id() * 2, total);
        }
    }

    // A chunk's products are added to the sums of strips `first_strip` on. weights: of the strips;
    // group_sums: with int4, of the chunk, from token 2 t on.
    static __device__ __forceinline__ void multiply(
        WarpSums& own, int first_strip, const unsigned char* weights, const unsigned char* inputs,
        const float* group_sums) {
        const unsigned char* const other = other_half(inputs);
        uint4 codes[STRIPS];
        TokenSums group[STRIPS];
        const auto finish_group = [&](int s, int number) {
            add_group(
                own.sums[first_strip + s], weights + s * CHUNK_BYTES, number, group[s], group_sums);
        };
#pragma unroll
        for (int q = 0; q < CHUNK / QUARTER; ++q) {
            uint32_t a[STRIPS][2][4];
#pragma unroll
            for (int s = 0; s < STRIPS; ++s) {
                if (WEIGHT_KIND != 1 || q % 2 == 0) {
                    codes[s] = ld_shared_16(
                        weights + s * CHUNK_BYTES + code_vector(q) * 512 + lane_id() * 16);
                }
            }
            if constexpr (GROUP >= QUARTER) {
                constexpr int AT_ONCE = TOKEN_TILES < 4 ? TOKEN_TILES : 4;  // registers are few
#pragma unroll
                for (int first = 0; first < TOKEN_TILES; first += AT_ONCE) {
                    uint4 b[AT_ONCE];
#pragma unroll
                    for (int n = 0; n < AT_ONCE; ++n) b[n] = inputs_of(inputs, other, q, first + n);
#pragma unroll
                    for (int s = 0; s < STRIPS; ++s) {
                        if (first == 0) {
                            code_operands(codes[s], q, a[s]);
                            if (q * QUARTER % GROUP == 0) clear(group[s]);
                        }
#pragma unroll
                        for (int n = 0; n < AT_ONCE; ++n) {
                            mma_m16n8k16<scalar_t>(group[s][first + n], a[s][0], b[n].x, b[n].y);
                        }
#pragma unroll
                        for (int n = 0; n < AT_ONCE; ++n) {
                            mma_m16n8k16<scalar_t>(group[s][first + n], a[s][1], b[n].z, b[n].w);
                        }
                    }
                }
#pragma unroll
                for (int s = 0; s < STRIPS; ++s) {
                    constexpr int EACH = GROUP / QUARTER > 0 ? GROUP / QUARTER : 1;
                    if ((q + 1) % EACH == 0) finish_group(s, (q + 1) / EACH - 1);
                }
            } else {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t mask = half_mask(half);
#pragma unroll
                    for (int s = 0; s < STRIPS; ++s) {
                        if (half == 0) code_operands(codes[s], q, a[s]);
                        clear(group[s]);
#pragma unroll
                        for (int n = 0; n < TOKEN_TILES; ++n) {
                            const uint4 b = inputs_of(inputs, other, q, n);
                            mma_m16n8k16<scalar_t>(group[s][n], a[s][0], b.x & mask, b.y & mask);
                            mma_m16n8k16<scalar_t>(group[s][n], a[s][1], b.z & mask, b.w & mask);
                        }
                        finish_group(s, 2 * q + half);
                    }
                }
            }
        }
    }

    // Of 32 inputs in groups of 16, lanes' inputs 8 t … belong to a group by t: others count as 0.
    static __device__ __forceinline__ uint32_t half_mask(int half) {
        return (lane_id() & 2) / 2 == half ? 0xffffffffu : 0u;
    }

    static __device__ __forceinline__ void clear(TokenSums& sums) {
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] = 0.0f;
        }
    }

    // The sums of group `number` times its rows' scales, and the sum of its inputs times their offsets.
    static __device__ __forceinline__ void add_group(
        TokenSums& sums, const unsigned char* chunk, int number, const TokenSums& group,
        const float* group_sums) {
        union {
            uint2 words;
            Vec<half_t, 4> halves;
            Vec<float, 2> floats;
        } read;
        read.words = ld_shared_8(chunk + CODE_BYTES + number * (STRIP * 4) + lane_id() / 4 * 8);
        float scales[2], offsets[2] = {0.0f, 0.0f};
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
                load_floats<float, 2>(group_sums + number * TOKENS + n * 8, inputs);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums[n][i] = fmaf(scales[i / 2], group[n][i], sums[n][i]);
                if (WEIGHT_KIND == 1) sums[n][i] = fmaf(offsets[i / 2], inputs[i % 2], sums[n][i]);
            }
        }
    }

    static __device__ __forceinline__ void scale(WarpSums& own, float factor) {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) own.sums[m][n][i] *= factor;
            }
        }
    }
};

#endif  // SKINNY_ON_TENSOR_CORES
