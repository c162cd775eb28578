// What the products of quantized_stream.cuh are made of: copies of codes and of inputs, and a warp's
// product of a step.
//
// WEIGHT_KIND, GROUP  as in quantized_format.cuh
// TOKENS       that a block has room for: a multiple of 16, at least the batch
// OUT_TILE     rows of weights of a block: a multiple of 16 * WARPS_N
// WARPS_N      warps that share these rows, whole strips of 16 each
// WARPS_K      warps that share the inputs of a step, a chunk of 128 each: 1, 2 or 4
// STAGES       steps in the ring, on their way or landed; from 2
// MIN_BLOCKS   blocks that must fit on a multiprocessor: bounds the registers
#pragma once

#ifndef WARPS_K
#define WARPS_K 1
#endif
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 2
#endif
#define K_STEP (128 * WARPS_K)

#include "quantized_format.cuh"
#include "skinny.cuh"

#if SKINNY_ON_TENSOR_CORES

constexpr int TOKEN_TILES = TOKENS / 8;
constexpr int INPUT_LEAD = WEIGHT_KIND == 1 ? 1 : 0;  // steps that inputs are ahead of codes
constexpr int INPUT_SLOTS = STAGES + INPUT_LEAD;
constexpr int GROUP_SUMS = WEIGHT_KIND == 1 ? WARPS_K * GROUPS * TOKENS : 0;  // of a step
constexpr int GROUP_SUM_BYTES = GROUP_SUMS * 4;
constexpr int WARP_CODE_BYTES = ROW_TILES * CHUNK_BYTES;  // of a step
constexpr int STEP_CODE_BYTES = WARPS_N * WARPS_K * WARP_CODE_BYTES;

static_assert(TOKENS % 16 == 0 && STRIP == 16 && CHUNK * WARPS_K == K_STEP, "");
static_assert(BLOCK_THREADS % (2 * PIECES) == 0, "a thread's tokens are all even, or all odd");

struct PackedCodes {
    const unsigned char* packed;  // [num_strips, num_chunks, CHUNK_BYTES]
    float unit;                   // of scales and offsets, a power of two
};

// The slot of a ring before that at byte `place`, of slots of `SLOT_BYTES`.
template <int SLOTS, int SLOT_BYTES>
__device__ __forceinline__ int slot_before(int place) {
    return place == 0 ? (SLOTS - 1) * SLOT_BYTES : place - SLOT_BYTES;
}
template <int SLOTS, int SLOT_BYTES>
__device__ __forceinline__ int slot_after(int place) {
    return place == (SLOTS - 1) * SLOT_BYTES ? 0 : place + SLOT_BYTES;
}

// A warp's chunks on their way to its part of the ring: of every step one of each of its strips. What
// a step's number gives is worked out anew each time, as registers are few.
template <bool PAIRS>
struct CodeStream {
    const unsigned char* from;  // this lane's vector of the first step's chunk of the first strip
    unsigned char* ring;        // the warp's part of the first stage
    int strip_bytes;
    int num_strips;             // of the matrix, from the warp's first on
    int num_steps;              // of the warp, whose last chunk may be beyond the matrix

    __device__ __forceinline__ CodeStream(
        const SkinnyShare<PAIRS>& share, const PackedCodes& codes, unsigned char* whole_ring) {
        constexpr int OUTPUTS = PAIRS ? STRIP / 2 : STRIP;
        const int all_strips = (share.matrix.num_outputs + OUTPUTS - 1) / OUTPUTS;
        const int first = share.first_tile * (OUT_TILE / STRIP) + WarpSums::warp_n() * ROW_TILES;
        const int num_chunks = (share.matrix.num_inputs + CHUNK - 1) / CHUNK;
        const int chunk = share.first_step * WARPS_K + WarpSums::warp_k();
        num_strips = all_strips - first;
        num_steps = share.num_steps;
        if (WARPS_K > 1) num_steps = min(num_steps, (num_chunks - chunk + WARPS_K - 1) / WARPS_K);
        strip_bytes = num_chunks * CHUNK_BYTES;
        from = codes.packed + static_cast<int64_t>(first) * strip_bytes + chunk * CHUNK_BYTES +
               lane_id() * 16;
        ring = keep_pointer(whole_ring + warp_id() * WARP_CODE_BYTES);
    }

    // Copy a step's, if there is one, to byte `to` of the ring.
    __device__ __forceinline__ void bring(int step, int to) const {
        if (step >= num_steps) return;
        unsigned char* place = ring + to + lane_id() * 16;
        const unsigned char* source = from + step * (WARPS_K * CHUNK_BYTES);
#pragma unroll
        for (int s = 0; s < ROW_TILES; ++s) {
            if (s < num_strips) {
#pragma unroll
                for (int i = 0; i < CODE_VECTORS; ++i) {
                    cp_async_16(place + i * 512, source + i * 512);
                }
                if (lane_id() < SCALE_BYTES / 16) {
                    cp_async_16(place + CODE_BYTES, source + CODE_BYTES);
                }
            }
            place += CHUNK_BYTES;
            source += strip_bytes;
        }
    }
};

// The byte of piece `piece`, of 8 inputs, of a token in a step. Lanes read pieces 4 q … 4 q + 3 of two
// tokens side by side at once: those of odd ones lie in the other half of 128 bytes.
__device__ __forceinline__ int input_place(int token, int piece) {
    return token * ROW_BYTES + (piece ^ (token & 1) * 4) * 16;
}

// The inputs of all tokens on their way: of every step the same few pieces by each thread.
struct InputStream {
    static constexpr int TURNS = (TOKENS * PIECES + BLOCK_THREADS - 1) / BLOCK_THREADS;
    static constexpr int TURN_TOKENS = BLOCK_THREADS / PIECES;

    const SkinnyMatrix& matrix;
    int first_step, num_steps;
    unsigned char* ring;

    // Copy a step's, if there is one, to byte `to` of the ring; what is beyond the matrix becomes 0.
    __device__ __forceinline__ void bring(int step, int to) const {
        if (step >= num_steps) return;
        const int token = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;
        const int input = (first_step + step) * K_STEP + piece * 8;
        unsigned char* const place = ring + to + input_place(token, piece);
        int offset = token * matrix.num_inputs + input;
#pragma unroll
        for (int i = 0; i < TURNS; ++i) {
            const int own = token + i * TURN_TOKENS;
            if (TOKENS % TURN_TOKENS != 0 && own >= TOKENS) break;
            const bool valid = own < matrix.num_rows && input < matrix.num_inputs;
            cp_async_16_or_zero(
                place + i * (TURN_TOKENS * ROW_BYTES), matrix.x + (valid ? offset : 0), valid);
            offset += TURN_TOKENS * matrix.num_inputs;
        }
    }
};

// A warp's part of a step: its chunk of the inputs, all tokens, its strips.
struct StepProduct {
    typedef float TokenSums[TOKEN_TILES][4];

    // The byte in a step's inputs at which this lane reads: its token of the first eight, input 8 t of
    // the warp's chunk.
    static __device__ __forceinline__ int place_of_lane() {
        return input_place(lane_id() / 4, WarpSums::warp_k() * (CHUNK / 8) + lane_id() % 4);
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

    // The sums of a step's inputs by group, to `to` [WARPS_K, GROUPS, TOKENS]. Warps of a chunk share
    // the tokens. The whole warp comes.
    static __device__ __forceinline__ void sum_inputs(const unsigned char* inputs, float* to) {
        const uint32_t one = pack_pair<scalar_t>(1.0f, 1.0f);
        const uint32_t ones[4] = {one, one, one, one};
        const unsigned char* const other = other_half(inputs);
        to += WarpSums::warp_k() * (GROUPS * TOKENS) + lane_id() % 4 * 2;
#pragma unroll
        for (int turn = 0; turn < (TOKEN_TILES + WARPS_N - 1) / WARPS_N; ++turn) {
            const int n = turn * WARPS_N + WarpSums::warp_n();
            if (n >= TOKEN_TILES) break;
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
            if (lane_id() >= 4) continue;  // all rows are alike
            constexpr int PARTS = 2 * GROUP / QUARTER;  // of a group
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                float total[2] = {0.0f, 0.0f};
#pragma unroll
                for (int p = g * PARTS; p < (g + 1) * PARTS; ++p) {
                    total[0] += parts[p / 2][p % 2][0];
                    total[1] += parts[p / 2][p % 2][1];
                }
                store_floats<float, 2>(to + g * TOKENS + n * 8, total);
            }
        }
    }

    // A step's products are added. weights: the warp's chunks; group_sums: with int4, of the step.
    static __device__ __forceinline__ void multiply(
        WarpSums& own, const unsigned char* weights, const unsigned char* inputs,
        const float* group_sums) {
        const unsigned char* const other = other_half(inputs);
        group_sums += WarpSums::warp_k() * (GROUPS * TOKENS) + lane_id() % 4 * 2;
        uint4 codes[ROW_TILES];
        TokenSums group[ROW_TILES];
        const auto finish_group = [&](int s, int number) {
            add_group(own.sums[s], weights + s * CHUNK_BYTES, number, group[s], group_sums);
        };
#pragma unroll
        for (int q = 0; q < CHUNK / QUARTER; ++q) {
            uint32_t a[ROW_TILES][2][4];
#pragma unroll
            for (int s = 0; s < ROW_TILES; ++s) {
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
                    for (int s = 0; s < ROW_TILES; ++s) {
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
                for (int s = 0; s < ROW_TILES; ++s) {
                    constexpr int EACH = GROUP / QUARTER > 0 ? GROUP / QUARTER : 1;
                    if ((q + 1) % EACH == 0) finish_group(s, (q + 1) / EACH - 1);
                }
            } else {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const uint32_t mask = half_mask(half);
#pragma unroll
                    for (int s = 0; s < ROW_TILES; ++s) {
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
