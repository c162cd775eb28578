// What the products of quantized_wide.cuh are made of: copies of codes and of inputs, and codes as a
// warpgroup's first operand.
//
// WEIGHT_KIND, GROUP  as in quantized_format.cuh
// TOKENS        that a block has room for: 16, 32, 48 or 64, at least the batch
// OUT_TILE      rows of weights of a block: a multiple of 64 * WARPGROUPS
// WARPGROUPS    that share these rows: each warp has strips of 16 in a row, of its own
// STAGES        chunks of each of a warp's strips in its ring, on their way or landed; from 2
// INPUT_STAGES  chunks of inputs in their ring: 4 to 7
// MIN_BLOCKS    blocks that must fit on a multiprocessor: bounds the registers
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
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 1
#endif
// Of skinny_parts.cuh: a chunk; and the warps that multiply, none of which share inputs.
#define K_STEP 128
#define WARPS_N (4 * WARPGROUPS)
#define WARPS_K 1

#include "quantized_format.cuh"
#include "skinny.cuh"

// Whether this build has the products; else their entries are empty and must not be launched.
#define WIDE_CODES (HAS_TILE_PRODUCTS && SCALAR == 2 && GROUP >= 32)

// Warps that bring inputs: as many where registers are not what keeps a second block away.
constexpr int FETCH_WARPS = TOKENS > 32 || (TOKENS > 16 && MIN_BLOCKS == 1) ? 4 : 2;
constexpr int ALL_THREADS = BLOCK_THREADS + 32 * FETCH_WARPS;

#if WIDE_CODES

constexpr int HALF = CHUNK / 2;                  // inputs: a row of 128 bytes of an operand, swizzled
constexpr int HALF_BYTES = TOKENS * HALF * 2;
constexpr int ATOM = 1024;                       // bytes of 8 such rows
// Inputs whose codes become operands at once, while products of the ones before are at work: fewer where
// registers are few.
constexpr bool MANY_SUMS = (ROW_TILES + 1) * TOKENS / 2 >= 80;
constexpr int UNIT = GROUP >= HALF && MIN_BLOCKS == 1 && !MANY_SUMS ? HALF : QUARTER;
constexpr int STAGE_CODES = ROW_TILES * CHUNK_BYTES;  // of a warp
constexpr int RING_BYTES = STAGES * STAGE_CODES;
constexpr int GROUP_SUMS = WEIGHT_KIND == 1 ? GROUPS * TOKENS : 0;  // of a chunk's inputs
constexpr int OCTETS = TOKENS / 8;
// Chunks of inputs that are on their way at a time. Of the others one is read, one may be read still, and
// one has its words in their places: so warps that multiply do not wait for those that fetch.
constexpr int INPUTS_AHEAD = INPUT_STAGES - 3;

static_assert(TOKENS % 16 == 0 && TOKENS <= 64 && INPUT_BYTES == 2 * HALF_BYTES, "TOKENS");
static_assert(WARPGROUPS <= 4 && STAGES >= 2 && STRIP == 16 && CHUNK == K_STEP, "WARPGROUPS");

// At the start of shared memory. Full: words are in their places; free: all warps that multiply are done.
struct CodeBarriers {
    uint64_t inbox;
    uint64_t full[INPUT_STAGES], free[INPUT_STAGES];
};
// Behind them those of the inputs' copies, where an inbox may lie afterwards.
constexpr int LANDED_BYTES = 64;
static_assert(INPUT_STAGES * sizeof(uint64_t) <= LANDED_BYTES, "INPUT_STAGES");
static_assert(sizeof(CodeBarriers) <= INBOX_HEAD && INPUTS_AHEAD >= 1, "INPUT_STAGES");

// int4 codes become 16 more than they are, as operands: bits 3 to 6 of a bfloat16 count its ones there. With
// the 128 of code_pair most of a group's sum would be what the offset takes away again, and tensor cores
// cut sums off: eight times as much of the result would be lost.
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

// The inputs on their way through their ring, by the warps that fetch. The copy engine brings boxes of 64
// inputs as they are. An operand of wgmma has in k what the codes have there: of every 32 inputs, lane t of
// four brings 8 t …, two to each of four places. So words of two inputs go to places of their own: word
// 4 t + i of 16 becomes word 4 i + t. A lane reads the 64 bytes of a token's 32 inputs, and writes them
// where they were.
//
// Copies are the engine's, not cp.async of these warps: their fence waits for what they have under way
// themselves.
template <bool PAIRS>
struct InputCopies {
    const SkinnyShare<PAIRS>& share;
    const TensorMap* map;  // of x, with a box [TOKENS, HALF]
    CodeBarriers* bars;
    uint64_t* landed;      // [INPUT_STAGES], as the copy engine left them
    unsigned char* ring;   // [INPUT_STAGES, 2, TOKENS, HALF], swizzled
    float* sums;           // with int4, of the inputs by group: [INPUT_STAGES, GROUPS, TOKENS]
    int fetch_warp;        // has every FETCH_WARPS-th eight tokens

    // By one thread: start the copies of a chunk.
    __device__ __forceinline__ void bring(const RingPlace<INPUT_STAGES>& place, int step) const {
        const uint32_t to = shared_address(ring) + place.stage * INPUT_BYTES;
        const int input = (share.first_step + step) * CHUNK;
        mbarrier_wait(bars->free + place.stage, place.parity ^ 1);
        mbarrier_arrive_expecting(landed + place.stage, INPUT_BYTES);
        copy_box(to, map, landed + place.stage, input, 0);
        copy_box(to + HALF_BYTES, map, landed + place.stage, input + HALF, 0);
    }

    // Words of a chunk to their places, of this warp's tokens; and their sums by group. first: the byte of
    // this lane's first piece, of its warp's first token; ones_by_group: of a product that sums.
    __device__ __forceinline__ void arrange(
        int first, float* to, const uint4& ones_by_group) const {
        constexpr int MOST = (OCTETS + FETCH_WARPS - 1) / FETCH_WARPS, APART = FETCH_WARPS * ATOM;
        const int count = OCTETS % FETCH_WARPS == 0
                              ? MOST
                              : (OCTETS - fetch_warp + FETCH_WARPS - 1) / FETCH_WARPS;
        unsigned char* pieces[4];
#pragma unroll
        for (int t = 0; t < 4; ++t) pieces[t] = ring + (first ^ t * 16);
        uint4 v[MOST][4];
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                if (i < count) v[i][t] = ld_shared_16(pieces[t] + i * APART);
            }
        }
#pragma unroll
        for (int i = 0; i < MOST; ++i) {
            if (i >= count) break;
            const uint4(&w)[4] = v[i];
            const int at = i * APART;
            st_shared_16(pieces[0] + at, make_uint4(w[0].x, w[1].x, w[2].x, w[3].x));
            st_shared_16(pieces[1] + at, make_uint4(w[0].y, w[1].y, w[2].y, w[3].y));
            st_shared_16(pieces[2] + at, make_uint4(w[0].z, w[1].z, w[2].z, w[3].z));
            st_shared_16(pieces[3] + at, make_uint4(w[0].w, w[1].w, w[2].w, w[3].w));
        }
        if constexpr (WEIGHT_KIND == 1) {
            const uint32_t ones[4] = {
                ones_by_group.x, ones_by_group.y, ones_by_group.z, ones_by_group.w};
            float parts[MOST][2][4] = {};  // two of eight tokens: products wait for each other less
#pragma unroll
            for (int t = 0; t < 4; ++t) {
#pragma unroll
                for (int i = 0; i < MOST; ++i) {
                    if (i >= count) break;
                    mma_m16n8k16<scalar_t>(parts[i][0], ones, v[i][t].x, v[i][t].y);
                    mma_m16n8k16<scalar_t>(parts[i][1], ones, v[i][t].z, v[i][t].w);
                }
            }
            to += lane_id() / 4 * TOKENS + fetch_warp * 8 + lane_id() % 4 * 2;
#pragma unroll
            for (int i = 0; i < MOST; ++i) {
                if (i >= count || lane_id() >= 4 * GROUPS) break;  // rows beyond have no groups
                const float total[2] = {
                    parts[i][0][0] + parts[i][1][0], parts[i][0][1] + parts[i][1][1]};
                store_floats<float, 2>(to + i * (FETCH_WARPS * 8), total);
            }
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
        const uint32_t one = lane_id() / 4 % 8 == lane_id() % 4 * QUARTER / GROUP
                                 ? pack_pair<scalar_t>(1.0f, 1.0f)
                                 : 0u;
        uint4 ones = make_uint4(one, one, one, one);
        hold_vector(ones);  // not made anew for every product
        RingPlace<INPUT_STAGES> place, oldest;
#pragma unroll 1
        for (int step = 0; step < share.num_steps + INPUTS_AHEAD; ++step) {
            if (step < share.num_steps) {
                if (fetch_warp == 0 && lane_id() == 0) bring(place, step);
                place.next();
            }
            if (step >= INPUTS_AHEAD) {
                mbarrier_wait(landed + oldest.stage, oldest.parity);
                warp_sync();
                arrange(
                    oldest.stage * INPUT_BYTES + first, sums + oldest.stage * GROUP_SUMS, ones);
                shared_to_async_fence();
                warp_sync();
                if (lane_id() == 0) mbarrier_arrive(bars->full + oldest.stage);
                oldest.next();
            }
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
