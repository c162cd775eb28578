// What the products of quantized_wide.cuh are made of: copies of codes and of inputs, and codes as a
// warpgroup's first operand.
//
// WEIGHT_KIND, GROUP  as in quantized_format.cuh
// TOKENS        that a block has room for: 16, 32, 48 or 64, at least the batch
// OUT_TILE      rows of weights of a block: a multiple of 64 * WARPGROUPS
// WARPGROUPS    that share these rows: each warp has strips of 16 in a row, of its own
// STAGES        chunks of each of a warp's strips in its ring, on their way or landed; from 2
// INPUT_STAGES  chunks of inputs, in both their rings: 4 to 7
#pragma once

#include "code_products.cuh"

#ifndef WARPGROUPS
#define WARPGROUPS 2
#endif
#ifndef OUT_TILE
#define OUT_TILE (64 * WARPGROUPS)
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef INPUT_STAGES
#define INPUT_STAGES 5
#endif
// Of skinny_parts.cuh: a chunk; and the warps that multiply, none of which share inputs.
#define K_STEP 128
#define WARPS_N (4 * WARPGROUPS)
#define WARPS_K 1

#include "quantized_format.cuh"
#include "skinny.cuh"

// Whether this build has the products; else their entries are empty and must not be launched.
#define WIDE_CODES (HAS_TILE_PRODUCTS && SCALAR == 2 && GROUP >= 32)

constexpr int FETCH_WARPS = TOKENS > 16 ? 4 : 2;  // that bring inputs
constexpr int ALL_THREADS = BLOCK_THREADS + 32 * FETCH_WARPS;

#if WIDE_CODES

constexpr int HALF = CHUNK / 2;                  // inputs: a row of 128 bytes of an operand, swizzled
constexpr int HALF_BYTES = TOKENS * HALF * 2;
constexpr int ATOM = 1024;                       // bytes of 8 such rows
// Inputs whose codes become operands at once, while products of the ones before are at work: fewer where
// registers are few.
constexpr bool MANY_SUMS = (ROW_TILES + 1) * TOKENS / 2 >= 80;
constexpr int UNIT = GROUP >= HALF && !MANY_SUMS ? HALF : QUARTER;
constexpr int STAGE_CODES = ROW_TILES * CHUNK_BYTES;  // of a warp
constexpr int RING_BYTES = STAGES * STAGE_CODES;
constexpr int GROUP_SUMS = WEIGHT_KIND == 1 ? GROUPS * TOKENS : 0;  // of a chunk's inputs
constexpr int OCTETS = TOKENS / 8;
// Chunks of inputs whose words are in their places: one is read, one may be read still and one is made, so
// that warps that multiply do not wait for those that fetch. The others are on their way.
constexpr int OPERANDS = 3;
constexpr int INPUTS_AHEAD = INPUT_STAGES - OPERANDS;

static_assert(TOKENS % 16 == 0 && TOKENS <= 64 && INPUT_BYTES == 2 * HALF_BYTES, "TOKENS");
static_assert(WARPGROUPS <= 4 && STAGES >= 2 && STRIP == 16 && CHUNK == K_STEP, "WARPGROUPS");

// At the start of shared memory. Full: words are in their places; free: all warps that multiply are done;
// landed: as the copy engine left them; taken: all warps that fetch have read them. Sums never come here:
// what arrives at a barrier may still be on its way when others send theirs, as what blocks of a cluster
// wait for there orders no memory.
struct CodeBarriers {
    uint64_t inbox;
    uint64_t full[OPERANDS], free[OPERANDS];
    uint64_t landed[INPUTS_AHEAD], taken[INPUTS_AHEAD];
};
static_assert(sizeof(CodeBarriers) <= INBOX_HEAD && INPUTS_AHEAD >= 1, "INPUT_STAGES");

// int4 codes become 16 more than they are, as operands: bits 3 to 6 of a bfloat16 count its ones there.
// With the 128 of code_pair most of a group's sum would be what the offset takes away again, and tensor
// cores cut sums off: eight times as much of the result would be lost.
constexpr float WIDE_BIAS = 16.0f;

// As code_operands of quantized_format.cuh.
__device__ __forceinline__ void wide_operands(
    const uint4& vector, int quarter, uint32_t (&a)[2][4]) {
    if constexpr (WEIGHT_KIND != 1) {
        code_operands(vector, quarter, a);
    } else {
        const uint32_t words[2] = {
            quarter % 2 ? vector.z : vector.x, quarter % 2 ? vector.w : vector.y};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const uint32_t word = words[i % 2];  // of the first or second row
            const uint32_t bits = i < 2 ? word << 3 : word >> (i / 2 * 4 - 3);
            a[i / 4][i % 4] = and_or(bits, 0x00780078u, 0x41804180u);
        }
    }
}

struct PackedCodes {
    const unsigned char* packed;  // [num_strips, num_chunks, CHUNK_BYTES]
    float unit;                   // of scales and offsets, a power of two
};

// A place in a ring of `COUNT` stages, and the parity of its round.
template <int COUNT>
struct RingPlace {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next() {
        if (++stage == COUNT) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// A warp's chunks on their way through its ring: of all its strips, then the next along the inputs. Each
// lane copies what it reads itself, but for scales. One group of copies a chunk, empty where there is
// nothing.
template <bool PAIRS>
struct WarpCodes {
    const unsigned char* from;  // this lane's vector of the next chunk of the first strip
    unsigned char* ring;        // and where it goes in the first stage
    int strip_bytes;
    int num_strips;             // of the matrix, from the warp's first on
    int steps_left;
    int place = 0;              // of the oldest chunks, in bytes

    __device__ __forceinline__ WarpCodes(
        const SkinnyShare<PAIRS>& share, const PackedCodes& codes, unsigned char* rings) {
        constexpr int OUTPUTS = PAIRS ? STRIP / 2 : STRIP;
        const int all_strips = (share.matrix.num_outputs + OUTPUTS - 1) / OUTPUTS;
        const int first = share.first_tile * (OUT_TILE / STRIP) + WarpSums::warp_n() * ROW_TILES;
        num_strips = all_strips - first;
        steps_left = share.num_steps;
        strip_bytes = (share.matrix.num_inputs + CHUNK - 1) / CHUNK * CHUNK_BYTES;
        from = codes.packed + static_cast<int64_t>(first) * strip_bytes +
               share.first_step * CHUNK_BYTES + lane_id() * 16;
        ring = keep_pointer(rings + warp_id() * RING_BYTES + lane_id() * 16);
    }

    // The oldest chunk of strip `m`, from this lane's first vector on.
    __device__ __forceinline__ const unsigned char* oldest(int m) const {
        return ring + place + m * CHUNK_BYTES;
    }
    // And its scales, of this lane's first row.
    __device__ __forceinline__ const unsigned char* oldest_scales(int m) const {
        return oldest(m) - lane_id() * 16 + lane_id() / 4 * 8 + CODE_BYTES;
    }

    // Copy a chunk of strip `m` to where its oldest was: all lanes have read that.
    __device__ __forceinline__ void bring(int m) {
        if (steps_left > 0 && m < num_strips) {
            unsigned char* const to = keep_pointer(ring + place + m * CHUNK_BYTES);
            const unsigned char* const source = from + m * strip_bytes;
#pragma unroll
            for (int i = 0; i < CODE_VECTORS; ++i) copy_weights_16(to + i * 512, source + i * 512);
            if (lane_id() < SCALE_BYTES / 16) copy_weights_16(to + CODE_BYTES, source + CODE_BYTES);
        }
        cp_async_commit();
    }
    // When those of all strips were brought.
    __device__ __forceinline__ void next() {
        --steps_left;
        from += CHUNK_BYTES;
        place = place == RING_BYTES - STAGE_CODES ? 0 : place + STAGE_CODES;
    }
};

// The inputs on their way, by the warps that fetch. The copy engine brings boxes of 64 inputs as they are.
// An operand of wgmma has in k what the codes have there: of every 32 inputs, lane t of four brings 8 t …,
// two to each of four places. So words of two inputs go to places of their own: word 4 t + i of 16 becomes
// word 4 i + t. A lane reads the 64 bytes of a token's 32 inputs where they landed, and writes them to a ring
// of operands, which the engine never touches.
//
// Copies are the engine's, not cp.async of these warps: their fence waits for what they have under way
// themselves.
template <bool PAIRS>
struct InputCopies {
    const SkinnyShare<PAIRS>& share;
    const TensorMap* map;     // of x, with a box [TOKENS, HALF]
    CodeBarriers* bars;
    unsigned char* operands;  // [OPERANDS, 2, TOKENS, HALF], swizzled
    unsigned char* arrived;   // [INPUTS_AHEAD, 2, TOKENS, HALF], swizzled too
    float* sums;              // with int4, of the inputs by group: [OPERANDS, GROUPS, TOKENS]
    int fetch_warp;           // has every FETCH_WARPS-th eight tokens

    // By one thread: start the copies of a chunk, to where all warps have read the one before.
    __device__ __forceinline__ void bring(int stage, int step) const {
        const uint32_t to = shared_address(arrived) + stage * INPUT_BYTES;
        const int input = (share.first_step + step) * CHUNK;
        mbarrier_arrive_expecting(bars->landed + stage, INPUT_BYTES);
        copy_box(to, map, bars->landed + stage, input, 0);
        copy_box(to + HALF_BYTES, map, bars->landed + stage, input + HALF, 0);
    }

    // Of this warp's eight tokens: all but the last time every warp has some.
    static constexpr int MOST = (OCTETS + FETCH_WARPS - 1) / FETCH_WARPS, APART = FETCH_WARPS * ATOM;
    __device__ __forceinline__ bool has(int i) const {
        return OCTETS % FETCH_WARPS == 0 || i * FETCH_WARPS + fetch_warp < OCTETS;
    }

    // A chunk's words from where they landed, at `from`. first: the byte of this lane's first piece there, of
    // its warp's first token.
    __device__ __forceinline__ void read(
        const unsigned char* from, int first, uint4 (&words)[MOST][4]) const {
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            if (!has(i)) break;
#pragma unroll
            for (int t = 0; t < 4; ++t) words[i][t] = ld_shared_16(from + (first ^ t * 16) + i * APART);
        }
    }

    // And to their places, at `to`.
    __device__ __forceinline__ void write(
        unsigned char* to, int first, const uint4 (&words)[MOST][4]) const {
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            if (!has(i)) break;
            const uint4(&w)[4] = words[i];
            unsigned char* const at = to + i * APART;
            st_shared_16(at + first, make_uint4(w[0].x, w[1].x, w[2].x, w[3].x));
            st_shared_16(at + (first ^ 16), make_uint4(w[0].y, w[1].y, w[2].y, w[3].y));
            st_shared_16(at + (first ^ 32), make_uint4(w[0].z, w[1].z, w[2].z, w[3].z));
            st_shared_16(at + (first ^ 48), make_uint4(w[0].w, w[1].w, w[2].w, w[3].w));
        }
    }

    // Their sums by group. by_group: the first operand of that product.
    __device__ __forceinline__ void sum(
        float* to, const uint4& by_group, const uint4 (&words)[MOST][4]) const {
        const uint32_t ones[4] = {by_group.x, by_group.y, by_group.z, by_group.w};
        float parts[MOST][2][4] = {};  // two of eight tokens: products wait for each other less
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
            for (int i = 0; i < MOST; ++i) {
                if (!has(i)) break;
                mma_m16n8k16<scalar_t>(parts[i][0], ones, words[i][t].x, words[i][t].y);
                mma_m16n8k16<scalar_t>(parts[i][1], ones, words[i][t].z, words[i][t].w);
            }
        }
        to += lane_id() / 4 * TOKENS + fetch_warp * 8 + lane_id() % 4 * 2;
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            if (!has(i) || lane_id() >= 4 * GROUPS) break;  // rows beyond have no groups
            const float total[2] = {
                parts[i][0][0] + parts[i][1][0], parts[i][0][1] + parts[i][1][1]};
            store_floats<float, 2>(to + i * (FETCH_WARPS * 8), total);
        }
    }

    // By whole warps, which have waited for the kernel in front.
    __device__ __forceinline__ void run() const {
        // A lane's token of eight and its 32 inputs of a chunk. Four lanes in a row have one token where
        // it is summed: what is no number in another must not meet it. Else eight have one quarter, whose
        // pieces lie in different banks.
        const int row = WEIGHT_KIND == 1 ? lane_id() / 4 : lane_id() % 8;
        const int quarter = WEIGHT_KIND == 1 ? lane_id() % 4 : lane_id() / 8;
        const int first = fetch_warp * ATOM + quarter / 2 * HALF_BYTES + row * 128 +
                          (quarter % 2 * 4 ^ row) * 16;
        // Row m of that product's first operand has ones where its lanes have inputs of group m.
        const uint32_t one = lane_id() / 4 == lane_id() % 4 * QUARTER / GROUP
                                 ? pack_pair<scalar_t>(1.0f, 1.0f)
                                 : 0u;
        uint4 by_group = make_uint4(one, one, one, one);
        hold_vector(by_group);  // not made anew for every product
        const bool brings = fetch_warp == 0 && lane_id() == 0;
        if (brings) {
#pragma unroll 1
            for (int i = 0; i < INPUTS_AHEAD && i < share.num_steps; ++i) bring(i, i);
        }
        warp_sync();
        RingPlace<INPUTS_AHEAD> from;
        RingPlace<OPERANDS> to;
#pragma unroll 1
        for (int step = 0; step < share.num_steps; ++step) {
            uint4 words[MOST][4];
            mbarrier_wait(bars->landed + from.stage, from.parity);
            read(arrived + from.stage * INPUT_BYTES, first, words);
            mbarrier_wait(bars->free + to.stage, to.parity ^ 1);
            write(operands + to.stage * INPUT_BYTES, first, words);
            if (WEIGHT_KIND == 1) sum(sums + to.stage * GROUP_SUMS, by_group, words);
            shared_to_async_fence();
            mbarrier_arrive_warp(bars->full + to.stage);
            to.next();
            // The next copies come to where this chunk was.
            mbarrier_arrive_warp(bars->taken + from.stage);
            if (fetch_warp == 0 && step + INPUTS_AHEAD < share.num_steps) {
                mbarrier_wait(bars->taken + from.stage, from.parity);
                if (brings) bring(from.stage, step + INPUTS_AHEAD);
                warp_sync();
            }
            from.next();
        }
    }
};

// A group's sums on the way to all those before: the scale and offset of this lane's two rows, as they
// are stored, and the sums of the group's inputs, from this lane's first token on.
struct PendingGroup {
    uint2 scales = make_uint2(0, 0);
    const float* inputs;

    // scales_of_row: of the chunk's group 0, of this lane's first row
    __device__ __forceinline__ void begin(
        const unsigned char* scales_of_row, int number, const float* inputs_of_chunk) {
        scales = ld_shared_8(scales_of_row + number * (STRIP * 4));
        inputs = inputs_of_chunk + number * TOKENS;
    }

    __device__ __forceinline__ void add(
        float (&sums)[TOKENS / 8][4], const float (&group)[TOKENS / 8][4]) const {
        union {
            uint2 words;
            Vec<half_t, 4> halves;
            Vec<float, 2> floats;
        } read;
        read.words = scales;
        float scale[2], offset[2] = {0.0f, 0.0f};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if constexpr (WEIGHT_KIND == 1) {
                scale[r] = to_float(read.halves.data[2 * r]);
                offset[r] = fmaf(-WIDE_BIAS, scale[r], to_float(read.halves.data[2 * r + 1]));
            } else {
                scale[r] = read.floats.data[r];
            }
        }
#pragma unroll
        for (int n = 0; n < TOKENS / 8; ++n) {
            float own[2] = {0.0f, 0.0f};
            if constexpr (WEIGHT_KIND == 1) {
                const uint2 words = ld_shared_8(inputs + n * 8);
                own[0] = float_of(words.x);
                own[1] = float_of(words.y);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sums[n][i] = fmaf(scale[i / 2], group[n][i], sums[n][i]);
                if (WEIGHT_KIND == 1) sums[n][i] = fmaf(offset[i / 2], own[i % 2], sums[n][i]);
            }
        }
    }
};

#endif  // WIDE_CODES
