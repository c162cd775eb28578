// What a block of attention_prefill holds in shared memory: queries, and tiles of keys and values, or of
// their codes; where each lies, and how it comes there.
//
// HEAD_SIZE, TILE_WARPS, WARP_ROWS, KEY_TILE, STAGES, MIN_BLOCKS, QUERIES_STAY: as in attention_prefill.cu
#pragma once

#include "attention_prefill.cuh"
#include "codes.cuh"

// Whether this build has attention_prefill; else its entry is empty and must not be launched.
#define TENSOR_CORES \
    (HAS_MMA && SCALAR != 0 && (CACHE == SCALAR || QUANTIZED) && HEAD_SIZE % 16 == 0)

#ifndef TILE_WARPS
#define TILE_WARPS 4
#endif
#ifndef WARP_ROWS
#define WARP_ROWS (HEAD_SIZE <= 128 ? 32 : 16)
#endif
#ifndef KEY_TILE
#define KEY_TILE (HEAD_SIZE <= 128 ? 64 : 32)
#endif
#ifndef STAGES
#define STAGES 2
#endif
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 2
#endif
#ifndef QUERIES_STAY
#define QUERIES_STAY (HEAD_SIZE * WARP_ROWS <= 64 * 32)
#endif

constexpr int THREADS = TILE_WARPS * 32;

#if TENSOR_CORES

constexpr int TILE_ROWS = TILE_WARPS * WARP_ROWS;
constexpr int ROW_TILES = WARP_ROWS / 16;  // 16 rows each, of a warp
constexpr int KEY_GROUPS = KEY_TILE / 8;   // columns of score fragments
constexpr int HEAD_GROUPS = HEAD_SIZE / 8;

// Rows in shared memory: pieces of 16 bytes, placed so that 8 rows' pieces of one column lie in
// different banks: exchanged by the row's number, or one piece of padding where that can't be.
constexpr int PIECES = HEAD_SIZE / 8;
constexpr bool EXCHANGED = PIECES % 8 == 0;
constexpr int ROW_PIECES = EXCHANGED ? PIECES : PIECES | 1;
constexpr int QUERY_BYTES = TILE_ROWS * ROW_PIECES * 16;
constexpr int KEY_BYTES = KEY_TILE * ROW_PIECES * 16;
constexpr int CODE_BYTES = KEY_TILE * HEAD_SIZE;
constexpr int STAGE_BYTES = 2 * (QUANTIZED ? CODE_BYTES : KEY_BYTES);  // keys, then values

static_assert(WARP_ROWS % 16 == 0 && KEY_TILE % 16 == 0 && KEY_TILE <= THREADS && STAGES >= 2, "");

__device__ __forceinline__ int place(int row, int piece) {
    return (row * ROW_PIECES + (EXCHANGED ? piece ^ (row & 7) : piece)) * 16;
}

// Where a lane reads its rows of fragments: `lane_row` is the start of the lane's row, the row's
// number is lane's modulo 8, `turn` comes from lane_turn, `piece` is even and known when compiled.
// One exclusive or and one sum for all rows and columns that differ by constants.
__device__ __forceinline__ int lane_turn(int odd_piece) {
    return (EXCHANGED ? odd_piece ^ (lane_id() & 7) : odd_piece) * 16;
}
__device__ __forceinline__ const unsigned char* lane_piece(
    const unsigned char* lane_row, int turn, int piece) {
    if (!EXCHANGED) return lane_row + turn + piece * 16;
    return lane_row + (turn ^ (piece & 6) * 16) + (piece & ~7) * 16;
}

// Start the copies of one tile of keys and values. offsets: of its rows, -1 for zeros.
__device__ __forceinline__ void copy_keys(
    unsigned char* stage, const cache_t* keys, const cache_t* values, const int64_t* offsets) {
    constexpr int WIDTH = 16 / sizeof(cache_t), ROW = HEAD_SIZE / WIDTH;  // pieces of 16 bytes
    constexpr int TOTAL = KEY_TILE * ROW;
#pragma unroll 2  // more would hold addresses in registers that the fragments need
    for (int i = 0; i < (TOTAL + THREADS - 1) / THREADS; ++i) {
        const int index = i * THREADS + threadIdx.x;
        if (TOTAL % THREADS != 0 && index >= TOTAL) break;
        const int row = index / ROW, piece = index % ROW;
        const int64_t offset = offsets[row];
        const bool valid = offset >= 0;
        const int64_t source = (valid ? offset : 0) + piece * WIDTH;
        unsigned char* target = stage + (QUANTIZED ? index * 16 : place(row, piece));
        cp_async_16_or_zero(target, keys + source, valid);
        cp_async_16_or_zero(target + STAGE_BYTES / 2, values + source, valid);
    }
}

#if QUANTIZED
// The codes of a stage, as scalar_t, to the tile that the products read: keys, then values.
__device__ __forceinline__ void widen_keys(unsigned char* tile, const unsigned char* stage) {
    constexpr int ROW = HEAD_SIZE / 16, TOTAL = KEY_TILE * ROW;
#pragma unroll 2
    for (int i = threadIdx.x; i < 2 * TOTAL; i += THREADS) {
        const int index = i % TOTAL, kind = i / TOTAL;
        const int row = index / ROW, piece = index % ROW * 2;
        uint4 low, high;
        widen_in_order(*reinterpret_cast<const uint4*>(stage + i * 16), low, high);
        unsigned char* target = tile + kind * KEY_BYTES;
        *reinterpret_cast<uint4*>(target + place(row, piece)) = low;
        *reinterpret_cast<uint4*>(target + place(row, piece + 1)) = high;
    }
}

// The scales of a row's key and value, 0 where it has none.
__device__ __forceinline__ float2 scales_at(
    const scale_t* key_scales, const scale_t* value_scales, int64_t offset) {
    if (offset < 0) return make_float2(0.0f, 0.0f);
    return make_float2(
        to_float(key_scales[offset / HEAD_SIZE]), to_float(value_scales[offset / HEAD_SIZE]));
}

// Where the scale of a row of the tile is kept: of each 16 rows a lane's four lie together.
__device__ __forceinline__ int step_place(int row) {
    return row / 16 * 16 + row % 8 / 2 * 4 + row % 16 / 8 * 2 + row % 2;
}

// This lane's scales of rows 16 * k + 2t, + 2t + 1, + 2t + 8, + 2t + 9, t = lane % 4. They are read
// where they are wanted: ahead of the products they would take registers from the fragments.
__device__ __forceinline__ void load_steps(const float* steps, int k, float (&out)[4]) {
    const uint4 bits = ld_shared_16(steps + k * 16 + lane_id() % 4 * 4);
    out[0] = float_of(bits.x);
    out[1] = float_of(bits.y);
    out[2] = float_of(bits.z);
    out[3] = float_of(bits.w);
}

// Multiply each column of fragments by its row's scale, and by `factor`.
__device__ __forceinline__ void scale_columns(
    float (&columns)[ROW_TILES][KEY_GROUPS][4], const float* steps, float factor) {
#pragma unroll
    for (int k = 0; k < KEY_TILE / 16; ++k) {
        float own[4];
        load_steps(steps, k, own);
#pragma unroll
        for (int i = 0; i < 4; ++i) own[i] *= factor;
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                columns[m][2 * k + i / 4][i % 4] *= own[i / 4 * 2 + i % 2];
            }
        }
    }
}
#endif

#endif  // TENSOR_CORES
