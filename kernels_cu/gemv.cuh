// Products of 1 to 8 tokens with a matrix of weights, which is read once and sets the time.
//
// Owns how the matrix is shared out over blocks and warps, the order in which weights come, and the
// merge of sums. What the inputs are (gemv_input.cuh), how a warp multiplies (gemv_products.cuh),
// and what becomes of a sum (epilogues.cuh) is not its part.
//
// WARPS          of a block (8)
// ROWS_PER_WARP  rows of weights that a warp reads side by side: 1, 2, 4 (2)
// RING           16-byte vectors a thread that are on their way to shared memory, or lie there (16)
// UNROLL         of these, how many come and are used together (4)
// TENSOR         1: 16-bit products on the tensor cores, where the chip has them; a warp then reads
//                8 rows side by side (1)
// PREFETCH       KB a block, beyond the ring, asked for in L2 before the kernel before has ended (0)
// MIN_BLOCKS     blocks that must fit on a multiprocessor, whatever their kernels: bounds the
//                registers (3)
//
// Weights wait for no other kernel. With launches that overlap, the blocks of a kernel come to a
// multiprocessor while the one before still runs there, fill their ring, and only then wait: memory
// has work while kernels change over, which at a few megabytes a matrix is half of the time. So a
// block keeps its weights in shared memory rather than in registers, of which the blocks of three
// kernels must share 64 K, and each thread copies what itself will use, so that nobody waits for
// another warp's weights.
//
// A unit is the rows of weights that a warp, or `k_splits` warps along the inputs, takes at a time;
// with PAIRS they alternate between the matrix's first and second half. Every block gets the same
// number of units, or one more, in a row, and takes WARPS / k_splits of them in a pass. The sum of
// an output is taken in an order that depends on the method and on k_splits (above 1, on k_tile
// too), not on the grid, the batch or other rows.
#pragma once

#include "epilogues.cuh"
#include "gemv_products.cuh"

#ifndef PREFETCH
#define PREFETCH 0
#endif
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 3
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

// What of the matrix is whose: a block's units, and of each what this warp takes.
template <bool PAIRS, typename Product>
struct GemvShare {
    static constexpr int UNIT_ROWS = Product::UNIT_ROWS;
    static constexpr int OUTPUTS = PAIRS ? UNIT_ROWS / 2 : UNIT_ROWS;  // of a unit
    static_assert(!PAIRS || UNIT_ROWS % 2 == 0, "pairs of rows");

    // The chunks of a warp in a tile of a pass: chunk … end - 1.
    struct Part {
        int pass;
        int tile;
        int chunk;
        int end;
    };

    const scalar_t* weight;
    int num_outputs, num_inputs;
    int split_bits, slots, slot, split;
    int first_unit, end_unit, num_passes;
    int num_tiles, num_chunks, tile_chunks;

    // Powers of two by shifts: the first weights wait for all of this.
    __device__ __forceinline__ GemvShare(const GemvMatrix& matrix, int tile_size)
        : weight(matrix.weight), num_outputs(matrix.num_outputs), num_inputs(matrix.num_inputs) {
        const int block = blockIdx.x, blocks = gridDim.x;
        split_bits = lowest_bit(matrix.k_splits);
        slots = WARPS >> split_bits;
        slot = warp_id() >> split_bits;
        split = warp_id() & (matrix.k_splits - 1);
        const int num_units = (num_outputs + OUTPUTS - 1) / OUTPUTS;
        const int each = num_units / blocks, over = num_units - each * blocks;
        first_unit = each * block + min(block, over);
        end_unit = first_unit + each + (block < over ? 1 : 0);
        num_passes = (end_unit - first_unit + slots - 1) >> (LOG_WARPS - split_bits);
        num_tiles = num_inputs <= tile_size ? 1 : (num_inputs + tile_size - 1) / tile_size;
        num_chunks = (num_inputs + Product::CHUNK - 1) / Product::CHUNK;
        tile_chunks = tile_size / Product::CHUNK;
    }

    __device__ __forceinline__ int unit(int pass) const { return first_unit + pass * slots + slot; }

    // A warp without a unit in the pass has no chunks there; one of many splits may have none.
    __device__ __forceinline__ Part part(int pass, int tile) const {
        const int first = tile * tile_chunks;
        const int count = unit(pass) < end_unit ? min(tile_chunks, num_chunks - first) : 0;
        Part part;
        part.pass = pass;
        part.tile = tile;
        part.chunk = first + (count * split >> split_bits);
        part.end = first + (count * (split + 1) >> split_bits);
        return part;
    }

    // The next part that has chunks, or one of a pass beyond the last.
    __device__ __forceinline__ Part after(Part part) const {
        do {
            const bool same_pass = part.tile + 1 < num_tiles;
            part = this->part(same_pass ? part.pass : part.pass + 1, same_pass ? part.tile + 1 : 0);
        } while (part.chunk >= part.end && part.pass < num_passes);
        return part;
    }

    // Row r of the warp's unit. Rows beyond the matrix are the last one again; their sums are not
    // stored.
    __device__ __forceinline__ const scalar_t* row(int pass, int r) const {
        const int output = min(unit(pass) * OUTPUTS + (PAIRS ? r / 2 : r), num_outputs - 1);
        const int index = PAIRS && r % 2 ? num_outputs + output : output;
        return weight + static_cast<int64_t>(index) * num_inputs;
    }
};

// The weights of a warp, in the order of its parts, on their way through the ring: RING_BATCHES
// batches are under way or landed, one group of copies each, empty where nothing is left.
template <bool PAIRS, typename Product>
struct GemvStream {
    typedef GemvShare<PAIRS, Product> Share;
    static constexpr int RING_BATCHES = RING / Product::VECTORS;
    static_assert(RING_BATCHES >= 1, "RING holds no batch: UNROLL or ROWS_PER_WARP is too large");

    typename Share::Part ahead;  // what is to be copied next
    uint4* ring = keep_pointer(own_ring());
    int place = 0;  // the oldest batch's first vector

    __device__ __forceinline__ uint4* oldest() const { return ring + place * BLOCK_THREADS; }

    __device__ __forceinline__ void aim(const Share& share, Product& product) const {
        product.aim([&](int r) { return share.row(ahead.pass, r); });
    }

    // Copy a batch to where the oldest one was.
    __device__ __forceinline__ void bring(const Share& share, Product& product) {
        if (ahead.pass < share.num_passes) {
            product.bring(oldest(), ahead.chunk, ahead.end - ahead.chunk, share.num_inputs);
            ahead.chunk += Product::BATCH;
            if (ahead.chunk >= ahead.end) {
                ahead = share.after(ahead);
                aim(share, product);
            }
        }
        cp_async_commit();
        place = place + Product::VECTORS < RING_BATCHES * Product::VECTORS
                    ? place + Product::VECTORS
                    : 0;
    }

    __device__ __forceinline__ void fill(const Share& share, Product& product) {
        ahead = share.part(0, 0);
        if (ahead.chunk >= ahead.end) ahead = share.after(ahead);
        aim(share, product);
#pragma unroll 1
        for (int i = 0; i < RING_BATCHES; ++i) bring(share, product);
    }

    // Ask for what follows the ring's contents in L2.
    __device__ __forceinline__ void prefetch(const Share& share) const {
        constexpr int BYTES = PREFETCH * 1024 / WARPS / Share::UNIT_ROWS / 128 * 128;  // of a row
        if constexpr (BYTES > 0 && Product::ALIGNED) {
            typename Share::Part part = ahead;
            int left = BYTES;
#pragma unroll 1
            while (left > 0 && part.pass < share.num_passes) {
                const int first = part.chunk * Product::CHUNK;
                const int end = min(part.end * Product::CHUNK, share.num_inputs);
                const int bytes = min((end - first) * static_cast<int>(sizeof(scalar_t)), left);
                if (lane_id() < Share::UNIT_ROWS) {
                    prefetch_l2_span(share.row(part.pass, lane_id()) + first, bytes);
                }
                left -= bytes;
                part = share.after(part);
            }
        }
    }
};

// The whole kernel: a block's units, one pass of WARPS / k_splits of them after the other.
template <bool PAIRS, typename Product, typename Input, typename Epilogue>
__device__ __forceinline__ void run_product(
    const GemvMatrix& matrix, const Input& input, const Epilogue& epilogue) {
    typedef GemvShare<PAIRS, Product> Share;
    constexpr int OUTPUTS = Share::OUTPUTS, UNIT_ROWS = Share::UNIT_ROWS;
    const Share share(matrix, input.tile_size);
    if (share.num_passes == 0) {  // the whole block
        grid_dependency_wait();
        return;
    }
    Product product;
    GemvStream<PAIRS, Product> stream;
    input.request();
    stream.fill(share, product);
    stream.prefetch(share);
    grid_dependency_wait();

    const int splits = matrix.k_splits, slots = share.slots;
    const int end_output = min(share.end_unit * OUTPUTS, share.num_outputs);
    // With splits, the parts of MERGE_PASSES passes are merged together: thread i, and i plus the
    // block's threads …, finishes output i % group_outputs of them, of token i / group_outputs.
    const int group_outputs = MERGE_PASSES * slots * OUTPUTS;
    const int group_bits = lowest_bit(group_outputs);
    const auto own_output = [&](int pass, int v) {
        const int r = Product::value_row(v);
        return share.unit(pass) * OUTPUTS + (PAIRS ? r / 2 : r);
    };
    const auto finishes_own = [&](int pass, int v) {
        return Product::owns_value() && (!PAIRS || Product::value_row(v) % 2 == 0) &&
               own_output(pass, v) < end_output;
    };

    typename Epilogue::Addend addends[Product::VALUES];
    const auto fetch_addends = [&](int pass) {  // early, as they come from far
        if (splits > 1) {
            if (pass % MERGE_PASSES != 0) return;
            const int output = (share.first_unit + pass * slots) * OUTPUTS +
                               (static_cast<int>(threadIdx.x) & (group_outputs - 1));
            const int token = threadIdx.x >> group_bits;
            if (token < ROWS && output < end_output) addends[0] = epilogue.fetch(output, token);
        } else {
#pragma unroll
            for (int v = 0; v < Product::VALUES; ++v) {
                if (finishes_own(pass, v)) {
                    addends[v] = epilogue.fetch(own_output(pass, v), Product::value_token());
                }
            }
        }
    };
    fetch_addends(0);
    input.template start<Product::PAIRS_CROSSED, GemvStream<PAIRS, Product>::RING_BATCHES>();
    product.take(input);

#pragma unroll 1
    for (int pass = 0; pass < share.num_passes; ++pass) {
        if (pass > 0) fetch_addends(pass);
        product.clear();
#pragma unroll 1
        for (int tile = 0; tile < share.num_tiles; ++tile) {
            if (pass + tile > 0 && share.num_tiles > 1) {
                block_sync();
                input.template load<Product::PAIRS_CROSSED>(tile);
                block_sync();
            }
            const typename Share::Part part = share.part(pass, tile);
            int tile_chunk = part.chunk - tile * share.tile_chunks;
#pragma unroll 1
            for (int left = part.end - part.chunk; left > 0; left -= Product::BATCH) {
                cp_async_wait<GemvStream<PAIRS, Product>::RING_BATCHES - 1>();
                product.multiply(stream.oldest(), tile_chunk, left);
                tile_chunk += Product::BATCH;
                stream.bring(share, product);
            }
        }

        float values[Product::VALUES];
        product.reduce(values);
        if (splits == 1) {
            if constexpr (PAIRS) {
                float gate, up;
                Product::pair(values, gate, up);
                if (finishes_own(pass, 0)) {
                    epilogue.store(
                        own_output(pass, 0), Product::value_token(), gate, up, addends[0]);
                }
            } else {
#pragma unroll
                for (int v = 0; v < Product::VALUES; ++v) {
                    if (finishes_own(pass, v)) {
                        epilogue.store(
                            own_output(pass, v), Product::value_token(), values[v], addends[v]);
                    }
                }
            }
            continue;
        }

        const int in_group = pass % MERGE_PASSES;
        float* own = gemv_scratch().partial[in_group] + warp_id() * UNIT_ROWS * ROWS;
#pragma unroll
        for (int v = 0; v < Product::VALUES; ++v) {
            if (Product::owns_value()) {
                own[Product::value_token() * UNIT_ROWS + Product::value_row(v)] = values[v];
            }
        }
        if (in_group + 1 < MERGE_PASSES && pass + 1 < share.num_passes) continue;
        block_sync();
        const int group_output = (share.first_unit + (pass - in_group) * slots) * OUTPUTS;
        const int slot_bits = LOG_WARPS - share.split_bits;
#pragma unroll 1
        for (int i = threadIdx.x; i < group_outputs * ROWS; i += BLOCK_THREADS) {
            const int local = i & (group_outputs - 1), token = i >> group_bits;
            const int output = group_output + local, unit = local / OUTPUTS;
            if (output >= end_output) continue;
            if (i >= BLOCK_THREADS) addends[0] = epilogue.fetch(output, token);
            const float* parts =
                gemv_scratch().partial[unit >> slot_bits] +
                (((unit & (slots - 1)) << share.split_bits) * ROWS + token) * UNIT_ROWS +
                local % OUTPUTS * (PAIRS ? 2 : 1);
            float sums[2] = {0.0f, 0.0f};
#pragma unroll
            for (int s = 0; s < WARPS; ++s) {  // all are read at once
                sums[0] += s < splits ? parts[s * UNIT_ROWS * ROWS] : 0.0f;
                if (PAIRS) sums[1] += s < splits ? parts[s * UNIT_ROWS * ROWS + 1] : 0.0f;
            }
            if constexpr (PAIRS) {
                epilogue.store(output, token, sums[0], sums[1], addends[0]);
            } else {
                epilogue.store(output, token, sums[0], addends[0]);
            }
        }
        if (pass + 1 < share.num_passes) block_sync();
    }
}

// Weights of which no 16 bytes can be read at once. A function of its own, so that it takes no
// registers from the others.
template <bool PAIRS, typename Input, typename Epilogue>
__device__ __noinline__ void run_unaligned(
    const GemvMatrix matrix, const Input input, const Epilogue epilogue) {
    run_product<PAIRS, LaneProduct<Input, PAIRS ? 2 : 1, 1, false>>(matrix, input, epilogue);
}

// Chooses the method by what the weights and the chip allow.
template <bool PAIRS, typename Input, typename Epilogue>
__device__ __forceinline__ void run_gemv(
    const GemvMatrix& matrix, const Input& input, const Epilogue& epilogue) {
    // The next kernel may come at once: it waits by itself for this one's results.
    grid_dependency_launch();
    if (rows_are_wide(matrix.weight, matrix.num_inputs)) {
#if TENSOR && HAS_MMA && SCALAR != 0
        run_product<PAIRS, TensorProduct<Input, UNROLL>>(matrix, input, epilogue);
#else
        constexpr int UNIT = PAIRS && ROWS_PER_WARP == 1 ? 2 : ROWS_PER_WARP;
        constexpr int BATCH = UNROLL / UNIT > 0 ? UNROLL / UNIT : 1;
        run_product<PAIRS, LaneProduct<Input, UNIT, BATCH, true>>(matrix, input, epilogue);
#endif
    } else {
        run_unaligned<PAIRS>(matrix, input, epilogue);
    }
}
