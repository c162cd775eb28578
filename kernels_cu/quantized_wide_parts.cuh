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

constexpr int FETCH_WARPS = TOKENS > 32 ? 4 : 2;  // that bring inputs
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
// one has landed: so warps that multiply do not wait for those that copy.
constexpr int INPUTS_AHEAD = INPUT_STAGES - 3;

static_assert(TOKENS % 16 == 0 && TOKENS <= 64 && INPUT_BYTES == 2 * HALF_BYTES, "TOKENS");
static_assert(WARPGROUPS <= 4 && STAGES >= 2 && STRIP == 16 && CHUNK == K_STEP, "WARPGROUPS");

// At the start of shared memory. Full: the copies landed; free: all warps that multiply are done.
struct CodeBarriers {
    uint64_t inbox;
    uint64_t full[INPUT_STAGES], free[INPUT_STAGES];
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

// The inputs on their way through their ring, by the warps that fetch. An operand of wgmma has in k what
// the codes have there: of every 32 inputs, lane t of four brings 8 t …, two to each of four places. So
// words of two inputs go to places of their own: word 4 t + i of 16 becomes word 4 i + t.
template <bool PAIRS>
struct InputCopies {
    const SkinnyShare<PAIRS>& share;
    CodeBarriers* bars;
    unsigned char* ring;  // [INPUT_STAGES, 2, TOKENS, HALF], swizzled
    float* sums;          // with int4, of the inputs by group: [INPUT_STAGES, GROUPS, TOKENS]
    int fetch_warp;       // has every FETCH_WARPS-th eight tokens

    __device__ __forceinline__ void copy(unsigned char* to, int step) const {
        const SkinnyMatrix& matrix = share.matrix;
        const int lane = lane_id();
        const int input = (share.first_step + step) * CHUNK + lane * 2;
        const bool inside = input < matrix.num_inputs;
        const bool inside_after = input + HALF < matrix.num_inputs;
        const int place = (lane / 16 * 4 + lane % 4) * 16 + lane / 4 % 4 * 4;
#pragma unroll 1
        for (int octet = fetch_warp; octet < OCTETS; octet += FETCH_WARPS) {
            const scalar_t* from = matrix.x + octet * 8 * matrix.num_inputs + input;
            unsigned char* const own = to + octet * ATOM;
            const int rows = matrix.num_rows - octet * 8;
#pragma unroll
            for (int row = 0; row < 8; ++row) {
                unsigned char* const at = own + row * 128 + (place ^ row * 16);
                cp_async_4_or_zero(at, from, row < rows && inside);
                cp_async_4_or_zero(at + HALF_BYTES, from + HALF, row < rows && inside_after);
                from += matrix.num_inputs;
            }
        }
    }

    // The sums of a chunk's inputs, of the tokens that this warp has copied.
    __device__ __forceinline__ void sum(const unsigned char* inputs, float* to) const {
        const uint32_t one = pack_pair<scalar_t>(1.0f, 1.0f);
        const uint32_t ones[4] = {one, one, one, one};
        const int row = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
        for (int i = 0; i < (OCTETS + FETCH_WARPS - 1) / FETCH_WARPS; ++i) {
            const int octet = i * FETCH_WARPS + fetch_warp;
            if (octet >= OCTETS) break;
            const unsigned char* const from = inputs + octet * ATOM + row * 128;
            // Two sums for each 32 inputs, so that products do not wait for each other.
            float parts[CHUNK / QUARTER][2][4];
#pragma unroll
            for (int q = 0; q < CHUNK / QUARTER; ++q) {
                const uint4 b =
                    ld_shared_16(from + q / 2 * HALF_BYTES + ((q % 2 * 4 + t) ^ row) * 16);
#pragma unroll
                for (int j = 0; j < 4; ++j) parts[q][0][j] = parts[q][1][j] = 0.0f;
                mma_m16n8k16<scalar_t>(parts[q][0], ones, b.x, b.y);
                mma_m16n8k16<scalar_t>(parts[q][1], ones, b.z, b.w);
            }
            if (lane_id() < 4) {  // all rows are alike
                constexpr int EACH = GROUP / QUARTER;
#pragma unroll
                for (int g = 0; g < GROUPS; ++g) {
                    float total[2] = {0.0f, 0.0f};
#pragma unroll
                    for (int q = g * EACH; q < (g + 1) * EACH; ++q) {
                        total[0] += parts[q][0][0] + parts[q][1][0];
                        total[1] += parts[q][0][1] + parts[q][1][1];
                    }
                    store_floats<float, 2>(to + g * TOKENS + octet * 8 + t * 2, total);
                }
            }
        }
    }

    // This warp's oldest copies have landed: they will be seen by products.
    __device__ __forceinline__ void publish(int stage) const {
        warp_sync();
        if (WEIGHT_KIND == 1) sum(ring + stage * INPUT_BYTES, sums + stage * GROUP_SUMS);
        shared_to_async_fence();
        warp_sync();
        if (lane_id() == 0) mbarrier_arrive(bars->full + stage);
    }

    // By whole warps, which have waited for the kernel in front.
    __device__ __forceinline__ void run() const {
        RingPlace<INPUT_STAGES> place, landed;
#pragma unroll 1
        for (int step = 0; step < share.num_steps + INPUTS_AHEAD; ++step) {
            if (step < share.num_steps) {
                mbarrier_wait(bars->free + place.stage, place.parity ^ 1);
                warp_sync();
                copy(ring + place.stage * INPUT_BYTES, step);
                place.next();
            }
            cp_async_commit();
            if (step >= INPUTS_AHEAD) {
                cp_async_wait<INPUTS_AHEAD>();
                publish(landed.stage);
                landed.next();
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
