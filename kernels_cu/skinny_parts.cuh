// What the products of skinny.cuh are made of: what of a matrix is whose, and a warp's sums.
//
// TOKENS       that a block has room for: 8 or a multiple of 16, at least the batch
// OUT_TILE     rows of weights that a block takes at a time: a multiple of 16 * WARPS_N
// WARPS_N      warps that share these rows, 16 or a multiple of 16 each
// WARPS_K      warps that share the inputs of a step: a power of two, as is K_STEP / 16 / WARPS_K
// K_STEP       inputs of a step: 64, or a power of two above
// STAGES       steps in the ring, on their way or landed; from 2
// INPUTS_STAY  1: a block's inputs are copied once, whole, and stay: for many tiles, or where they
//              are small. 0: they come through the ring beside the weights, again for each tile
// NORM_INPUTS  1: the inputs are normalised here, by skinny_norm.cuh, and must stay
#pragma once

#include "types.cuh"

// Whether this build has the products; else their entries are empty and must not be launched.
#define SKINNY_ON_TENSOR_CORES (HAS_MMA && SCALAR != 0)

#ifndef TOKENS
#error "define TOKENS: 8 or a multiple of 16, at least the tokens of the batch"
#endif
#ifndef OUT_TILE
#define OUT_TILE 64
#endif
#ifndef WARPS_N
#define WARPS_N 4
#endif
#ifndef WARPS_K
#define WARPS_K 2
#endif
#ifndef K_STEP
#define K_STEP 128
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef INPUTS_STAY
#define INPUTS_STAY 0
#endif
#ifndef NORM_INPUTS
#define NORM_INPUTS 0
#endif

constexpr int BLOCK_THREADS = WARPS_N * WARPS_K * 32;
constexpr int RESIDENT_BLOCKS = 2;  // of a multiprocessor, whose registers must hold them

#if SKINNY_ON_TENSOR_CORES

constexpr int TOKEN_PAIRS = TOKENS / 2;
constexpr int ROW_TILES = OUT_TILE / WARPS_N / 16;     // of a warp, 16 rows of weights each
constexpr int WARP_K_TILES = K_STEP / 16 / WARPS_K;    // of a warp in a step, 16 inputs each
constexpr int PIECES = K_STEP / 8;                     // of 16 bytes, of a row in a step
constexpr int ROW_BYTES = K_STEP * 2;
constexpr int WEIGHT_BYTES = OUT_TILE * ROW_BYTES;     // of a step
constexpr int INPUT_BYTES = TOKENS * ROW_BYTES;
constexpr int STAGE_BYTES = WEIGHT_BYTES + (INPUTS_STAY ? 0 : INPUT_BYTES);
constexpr bool EIGHT_WIDE = TOKENS == 8 && WARP_K_TILES > 1;  // inputs come 32 at a time
constexpr int INBOX_HEAD = 128;  // bytes before what an inbox receives

static_assert((TOKENS == 8 || TOKENS % 16 == 0) && OUT_TILE % (16 * WARPS_N) == 0 && STAGES >= 2, "");
static_assert(INPUTS_STAY || !NORM_INPUTS, "");
static_assert(K_STEP >= 64 && (PIECES & (PIECES - 1)) == 0, "K_STEP");
static_assert(
    WARP_K_TILES >= 1 && (WARP_K_TILES & (WARP_K_TILES - 1)) == 0 &&
        WARP_K_TILES * WARPS_K * 16 == K_STEP, "WARPS_K");

// The byte of piece `piece` of row `row` in a step's weights or inputs: pieces of a row are exchanged
// by the row's number, so that 8 rows' pieces of one number lie in different banks.
__device__ __forceinline__ int place(int row, int piece) {
    return row * ROW_BYTES + (piece ^ (row & 7)) * 16;
}

struct SkinnyMatrix {
    const scalar_t* x;       // [num_rows, num_inputs]
    const scalar_t* weight;  // [num_outputs, num_inputs]; with PAIRS twice as many rows
    int num_rows;
    int num_outputs;
    int num_inputs;
    const scalar_t* norm_weight;  // [num_inputs], with NORM_INPUTS
    float eps;
};

// Two floats to byte `offset` of the inbox of rank `to`. A block alone stores to its own memory, as
// the instructions of clusters are illegal without one.
__device__ __forceinline__ void put_pair(
    int ranks, uint64_t* inbox, int to, int offset, float a, float b) {
    if (ranks > 1) {
        send_pair(inbox_of_rank(inbox, to), offset, a, b);
    } else {
        const float pair[2] = {a, b};
        store_floats<float, 2>(
            reinterpret_cast<float*>(reinterpret_cast<char*>(inbox) + offset), pair);
    }
}

// What of the product is this block's.
template <bool PAIRS>
struct SkinnyShare {
    // Of a tile. With PAIRS, rows of gate and of up alternate, 8 by 8.
    static constexpr int OUTPUTS = PAIRS ? OUT_TILE / 2 : OUT_TILE;

    SkinnyMatrix matrix;
    int ranks, rank;             // the cluster's size, a power of two, and this block's place
    int first_tile, tile_step, num_tiles;
    int first_step, num_steps;   // of each tile

    __device__ __forceinline__ explicit SkinnyShare(const SkinnyMatrix& whole) : matrix(whole) {
        ranks = cluster_size();
        rank = cluster_rank();
        first_tile = blockIdx.x / ranks;
        tile_step = gridDim.x / ranks;
        num_tiles = (matrix.num_outputs + OUTPUTS - 1) / OUTPUTS;
        const int steps = (matrix.num_inputs + K_STEP - 1) / K_STEP;
        first_step = steps * rank / ranks;
        num_steps = steps * (rank + 1) / ranks - first_step;
    }

    __device__ __forceinline__ int total_steps() const {
        return (num_tiles - first_tile + tile_step - 1) / tile_step * num_steps;
    }

    static __device__ __forceinline__ int output_of_row(int row) {
        return PAIRS ? row / 16 * 8 + row % 8 : row;
    }
    static __device__ __forceinline__ int row_of_output(int output) {
        return PAIRS ? output / 8 * 16 + output % 8 : output;
    }

    // Start the copy of the weights of step first_step + `step`; what is not there becomes 0.
    __device__ __forceinline__ void copy_weights(unsigned char* to, int tile, int step) const {
        constexpr int TOTAL = OUT_TILE * PIECES;
        const int first_input = (first_step + step) * K_STEP;
#pragma unroll
        for (int i = 0; i < (TOTAL + BLOCK_THREADS - 1) / BLOCK_THREADS; ++i) {
            const int index = i * BLOCK_THREADS + threadIdx.x;
            if (TOTAL % BLOCK_THREADS != 0 && index >= TOTAL) break;
            const int row = index / PIECES, piece = index % PIECES;
            const int output = tile * OUTPUTS + output_of_row(row);
            const int input = first_input + piece * 8;
            const bool valid = output < matrix.num_outputs && input < matrix.num_inputs;
            const int from = PAIRS && row % 16 >= 8 ? matrix.num_outputs + output : output;
            const int64_t offset = static_cast<int64_t>(from) * matrix.num_inputs + input;
            cp_async_16_or_zero(to + place(row, piece), matrix.weight + (valid ? offset : 0), valid);
        }
    }

    __device__ __forceinline__ void copy_inputs(unsigned char* to, int step) const {
        constexpr int TOTAL = TOKENS * PIECES;
        const int first_input = (first_step + step) * K_STEP;
#pragma unroll
        for (int i = 0; i < (TOTAL + BLOCK_THREADS - 1) / BLOCK_THREADS; ++i) {
            const int index = i * BLOCK_THREADS + threadIdx.x;
            if (TOTAL % BLOCK_THREADS != 0 && index >= TOTAL) break;
            const int row = index / PIECES, piece = index % PIECES;
            const int input = first_input + piece * 8;
            const bool valid = row < matrix.num_rows && input < matrix.num_inputs;
            const int64_t offset = static_cast<int64_t>(row) * matrix.num_inputs + input;
            cp_async_16_or_zero(to + place(row, piece), matrix.x + (valid ? offset : 0), valid);
        }
    }
};

// A warp's sums: ROW_TILES x 16 rows of weights, all tokens, some of the inputs of each step.
struct WarpSums {
    float sums[ROW_TILES][TOKENS / 8][4];
    int weight_row, weight_turn, input_row, input_turn;  // where this lane reads, in bytes

    __device__ __forceinline__ static int warp_n() { return warp_id() % WARPS_N; }
    __device__ __forceinline__ static int warp_k() { return warp_id() / WARPS_N; }

    // Piece `first + odd`, exchanged, of a row whose number modulo 8 is the lane's; the pieces of
    // later 16 inputs differ from it by bits that `first` has not.
    __device__ __forceinline__ static int turn_of(int odd) {
        const int first = warp_k() * WARP_K_TILES * 2;
        return ((first + odd) ^ (lane_id() & 7)) * 16;
    }

    __device__ __forceinline__ WarpSums() {
        const int lane = lane_id();
        weight_row = (warp_n() * ROW_TILES * 16 + (lane & 15)) * ROW_BYTES;
        weight_turn = turn_of(lane >> 4);
        // Lanes 16 to 31 name rows 8 to 15, or with 8 tokens the next 16 inputs of the same rows.
        input_row = ((lane & 7) + (TOKENS == 8 ? 0 : lane >> 4) * 8) * ROW_BYTES;
        input_turn = turn_of(lane >> 3 & 1) ^ (EIGHT_WIDE ? lane >> 4 : 0) * 32;
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int n = 0; n < TOKENS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ void multiply(
        const unsigned char* weights, const unsigned char* inputs) {
        uint32_t pair[4];  // of 8 tokens, those of two times 16 inputs
#pragma unroll
        for (int k = 0; k < WARP_K_TILES; ++k) {
            const unsigned char* weight = weights + weight_row + (weight_turn ^ k * 32);
            const unsigned char* input = inputs + input_row + (input_turn ^ k * 32);
            uint32_t a[ROW_TILES][4];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) ldmatrix_x4(a[m], weight + m * 16 * ROW_BYTES);
            if (TOKENS == 8) {
                const int half = EIGHT_WIDE ? k % 2 * 2 : 0;
                if (half == 0) ldmatrix_x4(pair, input);
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
                    mma_m16n8k16<scalar_t>(sums[m][0], a[m], pair[half], pair[half + 1]);
                }
            }
#pragma unroll
            for (int n = 0; n < TOKENS / 16; ++n) {
                uint32_t b[4];
                ldmatrix_x4(b, input + n * 16 * ROW_BYTES);
#pragma unroll
                for (int m = 0; m < ROW_TILES; ++m) {
                    mma_m16n8k16<scalar_t>(sums[m][2 * n], a[m], b[0], b[1]);
                    mma_m16n8k16<scalar_t>(sums[m][2 * n + 1], a[m], b[2], b[3]);
                }
            }
        }
    }
};

#endif  // SKINNY_ON_TENSOR_CORES
