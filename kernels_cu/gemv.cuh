// Products of 1 to 8 tokens with a matrix of weights, which is read once and sets the time.
//
// Owns how the matrix is shared out over blocks and warps, the loads, the sums and their merge. What
// the inputs are (gemv_input.cuh) and what becomes of a sum (an Epilogue of gemv.cu) is not its part.
//
// WARPS          of a block (8)
// ROWS_PER_WARP  rows of weights that a warp reads side by side: 1, 2, 4 (2)
// UNROLL         loads of 16 bytes that a lane has under way, for each of those rows (4)
// TENSOR         1: 16-bit products on the tensor cores, where the chip has them; a warp then reads 8
//                rows side by side, and 2 * UNROLL loads a lane are under way (1 from ROWS 3 on)
// PREFETCH       batches of a warp asked for in L2 before the kernel before has ended (1)
// MIN_BLOCKS     blocks that must fit on a multiprocessor: bounds the registers (2)
//
// A unit is the rows of weights that a warp, or `k_splits` warps along the inputs, takes at a time;
// with PAIRS they alternate between the matrix's first and second half. Every block gets the same
// number of units, or one more, in a row. The sum of an output is taken in an order that depends on
// the method and on k_splits, not on the grid, the batch or the other rows.
#pragma once

#include "gemv_input.cuh"

#ifndef ROWS_PER_WARP
#define ROWS_PER_WARP 2
#endif
#ifndef UNROLL
#define UNROLL 4
#endif
#ifndef TENSOR
#define TENSOR (ROWS >= 3)
#endif
#ifndef PREFETCH
#define PREFETCH 1
#endif
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 2
#endif

static_assert(
    ROWS_PER_WARP == 1 || ROWS_PER_WARP == 2 || ROWS_PER_WARP == 4, "ROWS_PER_WARP is 1, 2 or 4");

constexpr int LOG_WARPS =
    WARPS == 1 ? 0 : WARPS == 2 ? 1 : WARPS == 4 ? 2 : WARPS == 8 ? 3 : WARPS == 16 ? 4 : 5;
constexpr int ROWS_POWER = ROWS <= 1 ? 1 : ROWS <= 2 ? 2 : ROWS <= 4 ? 4 : 8;

// The matrix, and where a warp is in it.
struct GemvMatrix {
    const scalar_t* weight;  // [num_outputs, num_inputs], with PAIRS twice as many rows
    int num_outputs;
    int num_inputs;
    int k_splits;  // warps that share a unit: a power of two, at most WARPS
};

// Sums over the lanes of N values (a power of two), spread: lane l gets that of value l / (32 / N).
// The tree of additions is that of warp_sum.
template <int N, int LANES = 16>
__device__ __forceinline__ float warp_sum_spread(const float (&values)[N]) {
    if constexpr (N == 1) {
        return warp_sum<2 * LANES>(values[0]);
    } else {
        const bool upper = (lane_id() & LANES) != 0;
        float halves[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const float send = upper ? values[i] : values[i + N / 2];
            const float keep = upper ? values[i + N / 2] : values[i];
            halves[i] = keep + shuffle_xor(send, LANES);
        }
        return warp_sum_spread<N / 2, LANES / 2>(halves);
    }
}

union WeightVector {
    uint4 bits;
    Vec<scalar_t, WIDE> values;
};

// The weights p[k … k + WIDE - 1], zero from `limit` on.
template <bool ALIGNED>
__device__ __forceinline__ uint4 load_weights(const scalar_t* p, int k, int limit) {
    WeightVector v;
    v.bits = make_uint4(0, 0, 0, 0);
    if constexpr (ALIGNED) {
        if (k < limit) v.bits = ld_nc_16(p + k);
    } else {
#pragma unroll
        for (int i = 0; i < WIDE; ++i) {
            if (k + i < limit) v.values.data[i] = p[k + i];
        }
    }
    return v.bits;
}

// A warp's product, plain: the lanes lie along the inputs, and a lane multiplies its weights of every
// row with its inputs of every token. One value a lane at the end.
template <typename Input, int UNIT, int BATCH_CHUNKS, bool ALIGNED>
struct LaneProduct {
    static constexpr int UNIT_ROWS = UNIT;
    static constexpr int CHUNK = 32 * WIDE;
    static constexpr int BATCH = BATCH_CHUNKS;
    static constexpr int VALUES = 1;
    static constexpr int N = UNIT * ROWS_POWER;
    static_assert(N <= 32, "a value a lane");

    uint4 weights[BATCH][UNIT_ROWS];
    float sums[UNIT_ROWS][ROWS];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < UNIT_ROWS; ++r) {
#pragma unroll
            for (int m = 0; m < ROWS; ++m) sums[r][m] = 0.0f;
        }
    }

    template <typename RowStart>
    __device__ __forceinline__ void load(const RowStart& row_start, int chunk, int limit) {
#pragma unroll
        for (int r = 0; r < UNIT_ROWS; ++r) {
            const scalar_t* p = row_start(r);
#pragma unroll
            for (int u = 0; u < BATCH; ++u) {
                const int k = (chunk + u) * CHUNK + lane_id() * WIDE;
                weights[u][r] = load_weights<ALIGNED>(p, k, limit);
            }
        }
    }

    // Chunk u of the batch, which is chunk tile_chunk of the tile.
    __device__ __forceinline__ void multiply(const Input& input, int u, int tile_chunk) {
        float w[UNIT_ROWS][WIDE];
#pragma unroll
        for (int r = 0; r < UNIT_ROWS; ++r) {
            WeightVector v;
            v.bits = weights[u][r];
#pragma unroll
            for (int i = 0; i < WIDE; ++i) w[r][i] = to_float(v.values.data[i]);
        }
        const int k = tile_chunk * CHUNK + lane_id() * WIDE;
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
            float x[WIDE];
            load_values<typename Input::act_t, WIDE>(input.row(m) + k, x);
#pragma unroll
            for (int r = 0; r < UNIT_ROWS; ++r) {
#pragma unroll
                for (int i = 0; i < WIDE; ++i) sums[r][m] += w[r][i] * x[i];
            }
        }
    }

    // The sums over all lanes: the value of row value_row, token value_token, where owns_value.
    __device__ __forceinline__ void reduce(float (&values)[VALUES]) {
        float spread[N];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int r = i / ROWS_POWER, m = i % ROWS_POWER;
            spread[i] = m < ROWS ? sums[r][m < ROWS ? m : 0] : 0.0f;
        }
        values[0] = warp_sum_spread<N>(spread);
    }
    static __device__ __forceinline__ int value_row(int) {
        return lane_id() / (32 / N) / ROWS_POWER;
    }
    static __device__ __forceinline__ int value_token() {
        return lane_id() / (32 / N) % ROWS_POWER;
    }
    static __device__ __forceinline__ bool owns_value() {
        return lane_id() % (32 / N) == 0 && value_token() < ROWS;
    }
    // Of a pair of rows: the lane that owns the first gets both.
    static __device__ __forceinline__ void pair(
        const float (&values)[VALUES], float& gate, float& up) {
        gate = values[0];
        up = shuffle_xor(values[0], 32 / N * ROWS_POWER);
    }
};

#if TENSOR && HAS_MMA && SCALAR != 0
// A warp's product on the tensor cores: tokens are the operand's rows, eight rows of weights its
// columns. Lane 4 g + t reads the inputs 8 t … 8 t + 7 of row g and of token g, 16 bytes each, and
// gives them to two products as they lie: which input a lane calls first is the same on both sides,
// so the sum is the same. Two values a lane at the end, of neighbouring rows.
template <typename Input, int BATCH_CHUNKS>
struct TensorProduct {
    static constexpr int UNIT_ROWS = 8;
    static constexpr int CHUNK = 4 * WIDE;
    static constexpr int BATCH = BATCH_CHUNKS;
    static constexpr int VALUES = 2;

    uint4 weights[BATCH];
    float sums[2][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[0][i] = sums[1][i] = 0.0f;
    }

    template <typename RowStart>
    __device__ __forceinline__ void load(const RowStart& row_start, int chunk, int limit) {
        const scalar_t* p = row_start(lane_id() / 4);
#pragma unroll
        for (int u = 0; u < BATCH; ++u) {
            const int k = (chunk + u) * CHUNK + lane_id() % 4 * WIDE;
            weights[u] = load_weights<true>(p, k, limit);
        }
    }

    __device__ __forceinline__ void multiply(const Input& input, int u, int tile_chunk) {
        const int token = lane_id() / 4, k = tile_chunk * CHUNK + lane_id() % 4 * WIDE;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (token < ROWS) v = *reinterpret_cast<const uint4*>(input.row(token) + k);
        const uint32_t low[4] = {v.x, 0, v.y, 0}, high[4] = {v.z, 0, v.w, 0};
        mma_m16n8k16<scalar_t>(sums[0], low, weights[u].x, weights[u].y);
        mma_m16n8k16<scalar_t>(sums[1], high, weights[u].z, weights[u].w);
    }

    __device__ __forceinline__ void reduce(float (&values)[VALUES]) {
        values[0] = sums[0][0] + sums[1][0];
        values[1] = sums[0][1] + sums[1][1];
    }
    static __device__ __forceinline__ int value_row(int v) { return lane_id() % 4 * 2 + v; }
    static __device__ __forceinline__ int value_token() { return lane_id() / 4; }
    static __device__ __forceinline__ bool owns_value() { return value_token() < ROWS; }
    static __device__ __forceinline__ void pair(
        const float (&values)[VALUES], float& gate, float& up) {
        gate = values[0];
        up = values[1];
    }
};
#endif

// Where a warp is: pass over the block's units, tile of inputs, chunks left of its part of the tile.
struct GemvPlace {
    int pass;
    int tile;
    int chunk;
    int end;
};

// The whole kernel: a block's units, one pass of WARPS / k_splits of them after the other.
template <bool PAIRS, typename Product, typename Input, typename Epilogue>
__device__ __forceinline__ void run_product(
    const GemvMatrix& matrix, const Input& input, const Epilogue& epilogue) {
    constexpr int UNIT_ROWS = Product::UNIT_ROWS;
    constexpr int CHUNK = Product::CHUNK;
    constexpr int OUTPUTS = PAIRS ? UNIT_ROWS / 2 : UNIT_ROWS;  // of a unit
    static_assert(!PAIRS || UNIT_ROWS % 2 == 0, "pairs of rows");
    // Powers of two by shifts: the first loads wait for all of this.
    const int splits = matrix.k_splits, split_bits = lowest_bit(splits);
    const int slots = WARPS >> split_bits;
    const int slot = warp_id() >> split_bits, split = warp_id() & (splits - 1);
    const int block = blockIdx.x, num_units = (matrix.num_outputs + OUTPUTS - 1) / OUTPUTS;
    const int each = num_units / static_cast<int>(gridDim.x);
    const int over = num_units - each * static_cast<int>(gridDim.x);
    const int first_unit = each * block + min(block, over);
    const int end_unit = first_unit + each + (block < over ? 1 : 0);
    const int num_passes = (end_unit - first_unit + slots - 1) >> (LOG_WARPS - split_bits);
    const int num_tiles = (matrix.num_inputs + input.tile_size - 1) / input.tile_size;
    const int num_chunks = (matrix.num_inputs + CHUNK - 1) / CHUNK;
    const int tile_chunks = input.tile_size / CHUNK;

    // A warp without a unit, or without a chunk of the tile, goes along with nothing to do.
    const auto enter = [&](int pass, int tile) {
        const bool active = pass < num_passes && first_unit + pass * slots + slot < end_unit;
        const int first = tile * tile_chunks;
        const int count = active ? min(tile_chunks, num_chunks - first) : 0;
        GemvPlace place;
        place.pass = pass;
        place.tile = tile;
        place.chunk = first + (count * split >> split_bits);
        place.end = first + (count * (split + 1) >> split_bits);
        return place;
    };
    const auto next = [&](const GemvPlace& place) {
        GemvPlace then = place;
        then.chunk += Product::BATCH;
        if (then.chunk < place.end) return then;
        const bool same_unit = place.tile + 1 < num_tiles;
        return enter(same_unit ? place.pass : place.pass + 1, same_unit ? place.tile + 1 : 0);
    };
    // Rows beyond the matrix read the last one again; their sums are not stored.
    const auto row_start = [&](int pass, int r) {
        const int unit = first_unit + pass * slots + slot;
        const int output = min(unit * OUTPUTS + (PAIRS ? r / 2 : r), matrix.num_outputs - 1);
        const int row = PAIRS && r % 2 ? matrix.num_outputs + output : output;
        return matrix.weight + static_cast<int64_t>(row) * matrix.num_inputs;
    };
    const auto limit_of = [&](const GemvPlace& place) {
        return min(place.end * CHUNK, matrix.num_inputs);
    };

    Product product;
    const auto load = [&](const GemvPlace& place) {
        const auto rows = [&](int r) { return row_start(place.pass, r); };
        product.load(rows, place.chunk, limit_of(place));
    };

    GemvPlace place = enter(0, 0);
    load(place);  // weights wait for no other kernel
    GemvPlace ahead = place;
#pragma unroll 1
    for (int i = 0; i < PREFETCH; ++i) {
        ahead = next(ahead);
        constexpr int LINE = 128 / sizeof(scalar_t);
        constexpr int LINES = (Product::BATCH * CHUNK + LINE - 1) / LINE;  // of a row
        const int limit = limit_of(ahead);
        for (int line = lane_id(); line < LINES * UNIT_ROWS; line += WARP_SIZE) {
            const int k = ahead.chunk * CHUNK + line / UNIT_ROWS * LINE;
            if (k < limit) prefetch_l2(row_start(ahead.pass, line % UNIT_ROWS) + k);
        }
    }
    input.request(0);
    grid_dependency_wait();
    input.start();
    block_sync();

    typename Epilogue::Addend addends[Product::VALUES];
    product.clear();
    bool first_tile = true, enters = true;
    while (place.pass < num_passes) {
        if (enters && (first_tile || num_tiles > 1)) {
            if (!first_tile) {
                block_sync();
                input.request(place.tile);
            }
            input.load(place.tile);
            block_sync();
            if (first_tile) grid_dependency_launch();
            first_tile = false;
        }
        const int first_output = (first_unit + place.pass * slots) * OUTPUTS;
        const int end_output = min(end_unit * OUTPUTS, matrix.num_outputs);
        // With splits, thread i of the block finishes output i % pass_outputs of the pass.
        const int pass_outputs = slots * OUTPUTS;
        const int thread = threadIdx.x;
        const int shared_output = first_output + (thread & (pass_outputs - 1));
        const int shared_token = thread >> lowest_bit(pass_outputs);
        const bool finishes_shared = shared_token < ROWS && shared_output < end_output;
        const auto own_output = [&](int v) {
            const int r = Product::value_row(v);
            return first_output + slot * OUTPUTS + (PAIRS ? r / 2 : r);
        };
        const auto finishes_own = [&](int v) {
            return Product::owns_value() && (!PAIRS || Product::value_row(v) % 2 == 0) &&
                   own_output(v) < end_output;
        };
        if (enters && place.tile == 0) {  // early, as they come from far
            if (splits > 1) {
                if (finishes_shared) addends[0] = epilogue.fetch(shared_output, shared_token);
            } else {
#pragma unroll
                for (int v = 0; v < Product::VALUES; ++v) {
                    if (finishes_own(v)) {
                        addends[v] = epilogue.fetch(own_output(v), Product::value_token());
                    }
                }
            }
        }

        const int tile_chunk = place.chunk - place.tile * tile_chunks;
        if (place.chunk + Product::BATCH <= place.end) {
#pragma unroll
            for (int u = 0; u < Product::BATCH; ++u) product.multiply(input, u, tile_chunk + u);
        } else {
#pragma unroll
            for (int u = 0; u < Product::BATCH; ++u) {
                if (place.chunk + u < place.end) product.multiply(input, u, tile_chunk + u);
            }
        }
        const GemvPlace then = next(place);
        load(then);
        if (then.pass != place.pass) {
            float values[Product::VALUES];
            product.reduce(values);
            product.clear();
            if (splits == 1) {
                if constexpr (PAIRS) {
                    float gate, up;
                    Product::pair(values, gate, up);
                    if (finishes_own(0)) {
                        epilogue.store(
                            own_output(0), Product::value_token(), gate, up, addends[0]);
                    }
                } else {
#pragma unroll
                    for (int v = 0; v < Product::VALUES; ++v) {
                        if (finishes_own(v)) {
                            epilogue.store(
                                own_output(v), Product::value_token(), values[v], addends[v]);
                        }
                    }
                }
            } else {
                // Two buffers in turn: a pass writes while the one before is still being read.
                float* partial = gemv_scratch().partial[place.pass % 2];
                float* own = partial + warp_id() * UNIT_ROWS * ROWS;
#pragma unroll
                for (int v = 0; v < Product::VALUES; ++v) {
                    if (Product::owns_value()) {
                        own[Product::value_token() * UNIT_ROWS + Product::value_row(v)] = values[v];
                    }
                }
                block_sync();
                if (finishes_shared) {
                    const int local = shared_output - first_output;
                    const float* parts =
                        partial + ((local / OUTPUTS << split_bits) * ROWS + shared_token) * UNIT_ROWS +
                        local % OUTPUTS * (PAIRS ? 2 : 1);
                    float sums[2] = {0.0f, 0.0f};
                    for (int s = 0; s < splits; ++s) {
                        sums[0] += parts[s * UNIT_ROWS * ROWS];
                        if (PAIRS) sums[1] += parts[s * UNIT_ROWS * ROWS + 1];
                    }
                    if constexpr (PAIRS) {
                        epilogue.store(shared_output, shared_token, sums[0], sums[1], addends[0]);
                    } else {
                        epilogue.store(shared_output, shared_token, sums[0], addends[0]);
                    }
                }
            }
        }
        enters = then.pass != place.pass || then.tile != place.tile;
        place = then;
    }
}

// Chooses the method by what the weights and the chip allow.
template <bool PAIRS, typename Input, typename Epilogue>
__device__ __forceinline__ void run_gemv(
    const GemvMatrix& matrix, const Input& input, const Epilogue& epilogue) {
    constexpr int UNIT = PAIRS && ROWS_PER_WARP == 1 ? 2 : ROWS_PER_WARP;
    if (rows_are_wide(matrix.weight, matrix.num_inputs)) {
#if TENSOR && HAS_MMA && SCALAR != 0
        if constexpr (same_type<typename Input::act_t, scalar_t>) {
            run_product<PAIRS, TensorProduct<Input, 2 * UNROLL>>(matrix, input, epilogue);
        } else {
            run_product<PAIRS, LaneProduct<Input, UNIT, UNROLL, true>>(matrix, input, epilogue);
        }
#else
        run_product<PAIRS, LaneProduct<Input, UNIT, UNROLL, true>>(matrix, input, epilogue);
#endif
    } else {
        run_product<PAIRS, LaneProduct<Input, UNIT, 1, false>>(matrix, input, epilogue);
    }
}
