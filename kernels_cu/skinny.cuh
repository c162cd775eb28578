// Products of a batch of 9 to 128 tokens with a matrix of weights, on tensor cores (mma.sync, from
// 8.0), for 16-bit types.
//
// Owns how the matrix is shared out over clusters, blocks and warps, the ring of shared memory that
// weights and inputs come through, and the merge of sums. What becomes of a sum is an Epilogue of
// epilogues.cuh.
//
// TOKENS       that a block has room for: a multiple of 16, at least the batch
// OUT_TILE     rows of weights that a block takes at a time: a multiple of 16 * WARPS_N
// WARPS_N      warps that share these rows, 16 or a multiple of 16 each
// WARPS_M      warps that share the tokens: 1, or 2 where many warps would read all of them
// WARPS_K      warps that share the inputs of a step: a power of two, as is K_STEP / 16 / WARPS_K
// K_STEP       inputs of a step: 64, or a power of two above
// STAGES       steps in the ring, on their way or landed; from 2
// INPUTS_STAY  1: a block's inputs are copied once, whole, and stay: for many tiles, or where they
//              are small. 0: they come through the ring beside the weights, again for each tile
// MIN_BLOCKS   blocks that must fit on a multiprocessor: bounds the registers
//
// Weights wait for no other kernel. With launches that overlap, a block fills its ring while the
// kernel before still runs, and only then waits for it and asks for its inputs. All other blocks read
// these too: at 32 tokens and 64 rows of weights a block, half as many bytes from L2 as weights from
// memory. So tiles are tall, and where that leaves multiprocessors without one, a cluster of blocks
// shares the inputs of a tile: rank r takes a part of the steps, and finishes some of the pairs of
// tokens. Every warp stores its sums into the shared memory of the block that finishes them, which
// waits for as many bytes as are to come: no barrier, no memory, no fence.
//
// A token's sums are added in an order that depends on the weights' shape and on these macros other
// than TOKENS: not on the batch, other tokens or the grid.
#pragma once

#include "epilogues.cuh"

// Whether this build has the products; else their entries are empty and must not be launched.
#define SKINNY_ON_TENSOR_CORES (HAS_MMA && SCALAR != 0)

#ifndef TOKENS
#error "define TOKENS: a multiple of 16, at least the tokens of the batch"
#endif
#ifndef OUT_TILE
#define OUT_TILE 64
#endif
#ifndef WARPS_N
#define WARPS_N 4
#endif
#ifndef WARPS_M
#define WARPS_M 1
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
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 1
#endif

constexpr int BLOCK_THREADS = WARPS_N * WARPS_M * WARPS_K * 32;

#if SKINNY_ON_TENSOR_CORES

constexpr int TOKEN_PAIRS = TOKENS / 2;
constexpr int ROW_TILES = OUT_TILE / WARPS_N / 16;     // of a warp, 16 rows of weights each
constexpr int WARP_TOKENS = TOKENS / WARPS_M;
constexpr int WARP_K_TILES = K_STEP / 16 / WARPS_K;    // of a warp in a step, 16 inputs each
constexpr int PIECES = K_STEP / 8;                     // of 16 bytes, of a row in a step
constexpr int ROW_BYTES = K_STEP * 2;
constexpr int WEIGHT_BYTES = OUT_TILE * ROW_BYTES;     // of a step
constexpr int INPUT_BYTES = TOKENS * ROW_BYTES;
constexpr int STAGE_BYTES = WEIGHT_BYTES + (INPUTS_STAY ? 0 : INPUT_BYTES);
constexpr int INBOX_HEAD = 128;  // bytes before what an inbox receives

static_assert(TOKENS % (16 * WARPS_M) == 0 && OUT_TILE % (16 * WARPS_N) == 0 && STAGES >= 2, "");
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
};

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

// A warp's sums: ROW_TILES x 16 rows of weights, WARP_TOKENS tokens, some of the inputs of each step.
struct WarpSums {
    float sums[ROW_TILES][WARP_TOKENS / 8][4];
    int weight_row, weight_turn, input_row, input_turn;  // where this lane reads, in bytes

    __device__ __forceinline__ static int warp_n() { return warp_id() % WARPS_N; }
    __device__ __forceinline__ static int warp_m() { return warp_id() / WARPS_N % WARPS_M; }
    __device__ __forceinline__ static int warp_k() { return warp_id() / (WARPS_N * WARPS_M); }

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
        input_row = (warp_m() * WARP_TOKENS + (lane & 7) + (lane >> 4) * 8) * ROW_BYTES;
        input_turn = turn_of(lane >> 3 & 1);
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
            for (int n = 0; n < WARP_TOKENS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
            }
        }
    }

    __device__ __forceinline__ void multiply(
        const unsigned char* weights, const unsigned char* inputs) {
#pragma unroll
        for (int k = 0; k < WARP_K_TILES; ++k) {
            const unsigned char* weight = weights + weight_row + (weight_turn ^ k * 32);
            const unsigned char* input = inputs + input_row + (input_turn ^ k * 32);
            uint32_t a[ROW_TILES][4];
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) ldmatrix_x4(a[m], weight + m * 16 * ROW_BYTES);
#pragma unroll
            for (int n = 0; n < WARP_TOKENS / 16; ++n) {
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

// Sums of a tile by "source", a warp_k of a block of the cluster, on their way to who finishes them:
// pair p of tokens is finished by rank p % ranks, as its pair p / ranks. A block alone stores to its
// own memory, as the instructions of clusters are illegal without one.
struct SkinnyMerge {
    int ranks, rank, num_pairs;
    uint64_t* inbox;  // INBOX_HEAD bytes, then pairs of floats [ranks * WARPS_K, slots, OUT_TILE]

    __device__ __forceinline__ int num_sources() const { return ranks * WARPS_K; }
    __device__ __forceinline__ int slots() const { return (TOKEN_PAIRS + ranks - 1) / ranks; }
    // A multiple of 128.
    __device__ __forceinline__ int num_bytes() const {
        return INBOX_HEAD + num_sources() * slots() * OUT_TILE * 8;
    }
    __device__ __forceinline__ int own_pairs() const { return (num_pairs - rank + ranks - 1) / ranks; }
    __device__ __forceinline__ uint32_t expected_bytes() const {
        return num_sources() * own_pairs() * OUT_TILE * 8;
    }

    __device__ __forceinline__ void put(int to, int offset, float a, float b) const {
        if (ranks > 1) {
            send_pair(inbox_of_rank(inbox, to), offset, a, b);
        } else {
            const float pair[2] = {a, b};
            store_floats<float, 2>(
                reinterpret_cast<float*>(reinterpret_cast<char*>(inbox) + offset), pair);
        }
    }

    // The whole warp must come.
    __device__ __forceinline__ void send(const WarpSums& own) const {
        const int log2_ranks = lowest_bit(ranks);
        const int source = rank * WARPS_K + WarpSums::warp_k();
        const int first_row = WarpSums::warp_n() * ROW_TILES * 16 + lane_id() / 4;
#pragma unroll
        for (int n = 0; n < WARP_TOKENS / 8; ++n) {
            const int pair = WarpSums::warp_m() * (WARP_TOKENS / 2) + n * 4 + lane_id() % 4;
            if (pair >= num_pairs) continue;
            const int at = (source * slots() + (pair >> log2_ranks)) * OUT_TILE + first_row;
#pragma unroll
            for (int m = 0; m < ROW_TILES; ++m) {
                const float(&sum)[4] = own.sums[m][n];
                const int offset = INBOX_HEAD + (at + m * 16) * 8;
                put(pair & (ranks - 1), offset, sum[0], sum[1]);
                put(pair & (ranks - 1), offset + 8 * 8, sum[2], sum[3]);
            }
        }
    }

    // Of the sums of `row` and own pair `slot`, those of all sources added.
    __device__ __forceinline__ void add_up(int slot, int row, float (&total)[2]) const {
        const float* from = reinterpret_cast<const float*>(
            reinterpret_cast<const char*>(inbox) + INBOX_HEAD + (slot * OUT_TILE + row) * 8);
        const int stride = slots() * OUT_TILE * 2;
        total[0] = total[1] = 0.0f;
#pragma unroll 4
        for (int s = 0; s < num_sources(); ++s) {
            float pair[2];
            load_floats<float, 2>(from + s * stride, pair);
            total[0] += pair[0];
            total[1] += pair[1];
        }
    }
};

// What a thread finishes: items i = thread, thread + BLOCK_THREADS … of (own pair, output), outputs
// side by side. The addends of the first EARLY of them are asked for when a tile begins.
template <bool PAIRS, typename Epilogue>
struct SkinnyFinish {
    typedef SkinnyShare<PAIRS> Share;
    static constexpr int OUTPUTS = Share::OUTPUTS;
    static constexpr int ITEMS = (TOKEN_PAIRS * OUTPUTS + BLOCK_THREADS - 1) / BLOCK_THREADS;
    static constexpr int EARLY = ITEMS < 4 ? ITEMS : 4;

    const Share& share;
    const SkinnyMerge& merge;
    const Epilogue& epilogue;
    typename Epilogue::Addend addends[EARLY][2];

    __device__ __forceinline__ SkinnyFinish(
        const Share& share, const SkinnyMerge& merge, const Epilogue& epilogue)
        : share(share), merge(merge), epilogue(epilogue) {}

    struct Item {
        int slot, row, output, token;
        bool valid[2];  // of its two tokens
    };
    __device__ __forceinline__ Item item(int tile, int i) const {
        const int index = i * BLOCK_THREADS + threadIdx.x;
        Item item;
        item.slot = index / OUTPUTS;
        item.row = Share::row_of_output(index % OUTPUTS);
        item.output = tile * OUTPUTS + index % OUTPUTS;
        item.token = 2 * (item.slot * merge.ranks + merge.rank);
        const bool inside = item.slot < merge.own_pairs() && item.output < share.matrix.num_outputs;
        item.valid[0] = inside;
        item.valid[1] = inside && item.token + 1 < share.matrix.num_rows;
        return item;
    }

    __device__ __forceinline__ void fetch(int tile) {
#pragma unroll
        for (int i = 0; i < EARLY; ++i) {
            const Item item = this->item(tile, i);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (item.valid[j]) addends[i][j] = epilogue.fetch(item.output, item.token + j);
            }
        }
    }

    __device__ __forceinline__ void finish_item(
        const Item& item, const typename Epilogue::Addend (&addend)[2]) const {
        float first[2], second[2];
        if (!item.valid[0]) return;
        merge.add_up(item.slot, item.row, first);
        if constexpr (PAIRS) merge.add_up(item.slot, item.row + 8, second);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            if (!item.valid[j]) continue;
            if constexpr (PAIRS) {
                epilogue.store(item.output, item.token + j, first[j], second[j], addend[j]);
            } else {
                epilogue.store(item.output, item.token + j, first[j], addend[j]);
            }
        }
    }

    __device__ __forceinline__ void finish(int tile) const {
#pragma unroll
        for (int i = 0; i < EARLY; ++i) finish_item(item(tile, i), addends[i]);
#pragma unroll 1
        for (int i = EARLY; i < ITEMS; ++i) {
            const Item late = item(tile, i);
            typename Epilogue::Addend addend[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                if (late.valid[j]) addend[j] = epilogue.fetch(late.output, late.token + j);
            }
            finish_item(late, addend);
        }
    }
};

// The whole kernel.
template <bool PAIRS, typename Epilogue>
__device__ __forceinline__ void run_skinny(const SkinnyMatrix& matrix, const Epilogue& epilogue) {
    typedef SkinnyShare<PAIRS> Share;
    const Share share(matrix);
    // The inbox lies in the same place in all blocks of a cluster: first.
    const SkinnyMerge merge = {
        share.ranks, share.rank, (matrix.num_rows + 1) / 2,
        reinterpret_cast<uint64_t*>(dynamic_shared())};
    unsigned char* const stayed = dynamic_shared() + merge.num_bytes();  // [num_steps, INPUT_BYTES]
    unsigned char* const ring = stayed + (INPUTS_STAY ? share.num_steps * INPUT_BYTES : 0);

    // The steps of all tiles in a row; what is copied next, and to where.
    int ahead_tile = share.first_tile, ahead_step = 0, ahead_stage = 0;
    const auto go_ahead = [&]() {
        if (++ahead_step == share.num_steps) {
            ahead_step = 0;
            ahead_tile += share.tile_step;
        }
        if (++ahead_stage == STAGES) ahead_stage = 0;
    };
#pragma unroll 1  // code that runs once is read from memory as it runs: less of it is faster
    for (int i = 0; i < STAGES; ++i) {
        if (ahead_tile < share.num_tiles) {
            share.copy_weights(ring + ahead_stage * STAGE_BYTES, ahead_tile, ahead_step);
            go_ahead();
        }
        cp_async_commit();
    }
    if (share.ranks > 1) {
        if (threadIdx.x == 0) make_inbox(merge.inbox, merge.expected_bytes());
        warp_sync();
        cluster_arrive();
    }
    grid_dependency_wait();

    // As many groups again, in the order of their use; where inputs stay, the last has all the rest.
#pragma unroll 1
    for (int i = 0, step = 0; i < STAGES; ++i) {
        if (INPUTS_STAY) {
            const int end = i < STAGES - 1 ? min(step + 1, share.num_steps) : share.num_steps;
#pragma unroll 1
            for (; step < end; ++step) share.copy_inputs(stayed + step * INPUT_BYTES, step);
        } else if (i < share.total_steps()) {
            share.copy_inputs(ring + i * STAGE_BYTES + WEIGHT_BYTES, step);
            if (++step == share.num_steps) step = 0;
        }
        cp_async_commit();
    }

    WarpSums own;
    SkinnyFinish<PAIRS, Epilogue> finish(share, merge, epilogue);
    int stage = 0;
    bool ring_is_full = true;
#pragma unroll 1
    for (int tile = share.first_tile; tile < share.num_tiles; tile += share.tile_step) {
        finish.fetch(tile);
        own.clear();
#pragma unroll 1
        for (int step = 0; step < share.num_steps; ++step) {
            if (ring_is_full) {
                cp_async_wait<STAGES - 1>();
            } else {
                cp_async_wait<STAGES - 2>();
            }
            block_sync();  // the step is there, and nobody reads the one before any more
            if (!ring_is_full) {
                if (ahead_tile < share.num_tiles) {
                    unsigned char* to = ring + ahead_stage * STAGE_BYTES;
                    share.copy_weights(to, ahead_tile, ahead_step);
                    if (!INPUTS_STAY) share.copy_inputs(to + WEIGHT_BYTES, ahead_step);
                    go_ahead();
                }
                cp_async_commit();
            }
            ring_is_full = false;
            const unsigned char* from = ring + stage * STAGE_BYTES;
            own.multiply(from, INPUTS_STAY ? stayed + step * INPUT_BYTES : from + WEIGHT_BYTES);
            if (++stage == STAGES) stage = 0;
        }
        if (share.ranks > 1) {
            cluster_wait();  // every block of the cluster has started, and has its inbox
            merge.send(own);
            wait_for_inbox(merge.inbox);
        } else {
            merge.send(own);
            block_sync();
        }
        finish.finish(tile);
        // The next tile's sums are stored after another barrier at least: that of its first step.
    }
}

#endif  // SKINNY_ON_TENSOR_CORES
