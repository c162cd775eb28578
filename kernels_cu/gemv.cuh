// Products of 1 to 8 tokens with a matrix of weights, which is read once and sets the time.
//
// Owns how the matrix is shared out over blocks and warps, and the merge of their sums. What the
// inputs are (gemv_input.cuh), how a warp multiplies (gemv_products.cuh), and what becomes of a sum
// (an Epilogue of gemv.cu) is not its part.
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
// the method and on k_splits (above 1, on k_tile too), not on the grid, the batch or other rows.
#pragma once

#include "gemv_products.cuh"

#ifndef PREFETCH
#define PREFETCH 1
#endif
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 2
#endif

constexpr int LOG_WARPS =
    WARPS == 1 ? 0 : WARPS == 2 ? 1 : WARPS == 4 ? 2 : WARPS == 8 ? 3 : WARPS == 16 ? 4 : 5;

// The matrix, and how its inputs are shared.
struct GemvMatrix {
    const scalar_t* weight;  // [num_outputs, num_inputs], with PAIRS twice as many rows
    int num_outputs;
    int num_inputs;
    int k_splits;  // warps that share a unit: a power of two, at most WARPS
};

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
