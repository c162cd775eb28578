// Products of 1 to 32 tokens with a matrix of codes, which is read once and sets the time; codes
// become 16-bit numbers in registers, exactly, and scales meet the float32 sums of their group.
//
// STAGES      chunks a warp in its ring, on their way or landed; at least 2 * STRIPS (4)
// MIN_BLOCKS  blocks that must fit on a multiprocessor: bounds the registers (2)
//
// Every block has a run of strips. Along the inputs, chunk c is warp c % WARPS's, and WARPS chunks are
// a segment. A warp copies its own chunks, which are runs of memory, through a ring of its own, so that
// nobody waits for another warp's weights; at the end of a segment the warps' sums meet in shared
// memory, at a barrier for every STRIPS strips, while the ring goes on filling. Sums of a segment are
// added to those of the ones before by the thread that will finish them.
//
// Weights wait for no other kernel: with launches that overlap, the rings are full before the kernel
// before has ended.
//
// Here inputs come a tile of some segments after the other, each for all strips of a round: their
// number has no room in shared memory at once. An output is the sum over segments, in their order, of
// the sum over warps, in theirs: the tile, the round and the grid change no bit, nor does the batch
// among the launches of this form. Where all inputs have room, quantized_whole.cuh has the kernel.
#pragma once

#include "epilogues.cuh"
#include "quantized_sums.cuh"

#ifndef STAGES
#define STAGES 4
#endif
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 2
#endif

constexpr int SEGMENT = WARPS * CHUNK;  // inputs
constexpr int RING_BYTES = WARPS * STAGES * CHUNK_BYTES;
constexpr int SUM_FLOATS = WARPS * TOKENS * SUM_STRIDE;
constexpr int SUM_BUFFERS = TOKENS <= 16 ? 2 : 1;  // two: one barrier a pass is enough

static_assert(STAGES >= 2 * STRIPS, "the ring holds no chunks beside those in use");

struct QuantizedWeights {
    const unsigned char* packed;  // [num_strips, num_chunks, CHUNK_BYTES]
    float unit;                   // of scales and offsets
    int num_outputs;
    int tile_segments;            // segments of a tile of inputs
    int round_strips;             // a multiple of STRIPS
};

#if QUANTIZED_ON_TENSOR_CORES

// What of the matrix is this block's.
template <bool PAIRS>
struct QuantizedShare {
    static constexpr int OUTPUTS = PAIRS ? STRIP / 2 : STRIP;  // of a strip
    int first_strip, num_strips;  // the block's
    int num_chunks, num_segments;

    __device__ __forceinline__ QuantizedShare(int num_outputs, int num_inputs) {
        const int block = blockIdx.x, blocks = gridDim.x;
        const int strips = (num_outputs + OUTPUTS - 1) / OUTPUTS;
        const int each = strips / blocks, over = strips - each * blocks;
        first_strip = each * block + min(block, over);
        num_strips = each + (block < over ? 1 : 0);
        num_chunks = (num_inputs + CHUNK - 1) / CHUNK;
        num_segments = (num_chunks + WARPS - 1) / WARPS;
    }

    // The strip after the last of the round that begins with strip `first`, in whole passes.
    __device__ __forceinline__ int round_end(int first, int round_strips) const {
        const int count = min(round_strips, num_strips - first);
        return first + (count + STRIPS - 1) / STRIPS * STRIPS;
    }
};

// A warp's chunks on their way through its ring, in the order of their use: rounds, segments, strips.
// One group of copies each, empty where there is none.
template <bool PAIRS>
struct QuantizedStream {
    const QuantizedShare<PAIRS>& share;
    const unsigned char* packed;  // of the block's first strip
    int round_strips;
    unsigned char* ring;          // the warp's
    int round_first = 0, round_end, strip = 0, chunk = warp_id();
    int place = 0;                // of the oldest chunk, in bytes

    __device__ __forceinline__ QuantizedStream(
        const QuantizedShare<PAIRS>& share, const QuantizedWeights& weights)
        : share(share), round_strips(weights.round_strips) {
        const int64_t first = static_cast<int64_t>(share.first_strip) * share.num_chunks;
        packed = weights.packed + first * CHUNK_BYTES;
        ring = keep_pointer(dynamic_shared() + warp_id() * (STAGES * CHUNK_BYTES));
        round_end = share.round_end(0, round_strips);
    }

    // The chunk that is `i` after the oldest.
    __device__ __forceinline__ const unsigned char* chunk_at(int i) const {
        const int at = place + i * CHUNK_BYTES;
        return ring + (at < STAGES * CHUNK_BYTES ? at : at - STAGES * CHUNK_BYTES);
    }

    // Copy a chunk to where the oldest one was. The warp's lanes have all used that.
    __device__ __forceinline__ void bring() {
        if (strip < share.num_strips && chunk < share.num_chunks) {
            const int64_t index = static_cast<int64_t>(strip) * share.num_chunks + chunk;
            const unsigned char* from = packed + index * CHUNK_BYTES + lane_id() * 16;
            unsigned char* to = ring + place + lane_id() * 16;
#pragma unroll
            for (int i = 0; i < CODE_VECTORS; ++i) copy_weights_16(to + i * 512, from + i * 512);
            if (lane_id() < SCALE_BYTES / 16) copy_weights_16(to + CODE_BYTES, from + CODE_BYTES);
        }
        cp_async_commit();
        place = place + CHUNK_BYTES < STAGES * CHUNK_BYTES ? place + CHUNK_BYTES : 0;
        if (++strip == round_end) {
            strip = round_first;
            chunk += WARPS;
            if (chunk >= share.num_segments * WARPS) {
                chunk = warp_id();
                strip = round_first = min(round_first + round_strips, share.num_strips);
                round_end = share.round_end(round_first, round_strips);
            }
        }
    }
};

// What a thread finishes of a pass: items thread, thread + BLOCK_THREADS … of (token, output),
// outputs side by side.
template <bool PAIRS>
struct QuantizedItems {
    typedef QuantizedShare<PAIRS> Share;
    static constexpr int OUTPUTS = Share::OUTPUTS, VALUES = PAIRS ? 2 : 1;
    static constexpr int PASS_OUTPUTS = STRIPS * OUTPUTS;
    static constexpr int ITEMS = (TOKENS * PASS_OUTPUTS + BLOCK_THREADS - 1) / BLOCK_THREADS;
    static constexpr int EARLY = ITEMS < 2 ? ITEMS : 2;  // whose addends are asked for early
    static constexpr int PASS_FLOATS = ITEMS * BLOCK_THREADS * VALUES;  // of sums so far

    struct Item {
        int token, output, row;  // row: of the pass
        bool valid;
    };
    static __device__ __forceinline__ Item item(
        const Share& share, const QuantizedWeights& weights, int num_rows, int strip, int i) {
        const int index = i * BLOCK_THREADS + static_cast<int>(threadIdx.x);
        const int local = index % PASS_OUTPUTS, own = local / OUTPUTS;
        Item item;
        item.token = index / PASS_OUTPUTS;
        item.row = own * STRIP + local % OUTPUTS;
        item.output = (share.first_strip + strip + own) * OUTPUTS + local % OUTPUTS;
        item.valid = item.token < num_rows && strip + own < share.num_strips &&
                     item.output < weights.num_outputs;
        return item;
    }
};

// The whole kernel.
template <bool PAIRS, typename In, typename Epilogue>
__device__ __forceinline__ void run_tiles(
    const QuantizedWeights& weights, QuantizedInput<In> input, const Epilogue& epilogue) {
    typedef QuantizedItems<PAIRS> Items;
    const QuantizedShare<PAIRS> share(weights.num_outputs, input.num_inputs);
    if (share.num_strips == 0) {  // the whole block
        grid_dependency_wait();
        return;
    }
    const int num_rows = input.num_rows, tile_segments = weights.tile_segments;
    const int tile_chunks = min(tile_segments * WARPS, share.num_chunks);
    input.tile_inputs = tile_segments * SEGMENT;
    input.stride = (tile_chunks * CHUNK + SPAN - 1) / SPAN * SPAN + INPUT_PAD;
    input.tile = reinterpret_cast<scalar_t*>(dynamic_shared() + RING_BYTES);
    input.sums = reinterpret_cast<float*>(input.tile + num_rows * input.stride);
    float* const partial =
        input.sums + (WEIGHT_KIND == 1 ? tile_chunks * GROUPS * TOKENS : 0);
    float* const so_far = partial + SUM_BUFFERS * SUM_FLOATS;
    QuantizedStream<PAIRS> stream(share, weights);
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) stream.bring();
    grid_dependency_wait();
    int in_tile = -1;  // the tile that is there

    const scalar_t* own_inputs[TOKEN_TILES];
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
        const int token = min(n * 8 + lane_id() / 4, num_rows - 1);  // more are not stored
        own_inputs[n] = input.tile + token * input.stride + lane_id() % 4 * 8;
    }
    ChunkSums own;
    int buffer = 0;
#pragma unroll 1
    for (int first = 0; first < share.num_strips; first += weights.round_strips) {
        const int end = share.round_end(first, weights.round_strips);
#pragma unroll 1
        for (int segment = 0; segment < share.num_segments; ++segment) {
            const int tile = segment / tile_segments;
            const int tile_chunk = (segment - tile * tile_segments) * WARPS;
            if (tile != in_tile) {
                input.load(tile, min(tile_chunks, share.num_chunks - tile * tile_segments * WARPS));
                in_tile = tile;
                block_sync();
            }
            const int num_active = min(WARPS, share.num_chunks - segment * WARPS);
            const bool is_last = segment + 1 == share.num_segments;
            const scalar_t* inputs[TOKEN_TILES];
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) {
                inputs[n] = own_inputs[n] + (tile_chunk + warp_id()) * CHUNK;
            }
            const float* input_sums = input.sums +
                                      (tile_chunk + warp_id()) * (GROUPS * TOKENS) +
                                      lane_id() % 4 * 2;
#pragma unroll 1
            for (int strip = first; strip < end; strip += STRIPS) {
                const auto item = [&](int i) {
                    return Items::item(share, weights, num_rows, strip, i);
                };
                typename Epilogue::Addend addends[Items::EARLY];
                if (is_last) {
#pragma unroll
                    for (int i = 0; i < Items::EARLY; ++i) {
                        const auto one = item(i);
                        if (one.valid) addends[i] = epilogue.fetch(one.output, one.token);
                    }
                }
                cp_async_wait<STAGES - STRIPS>();
                warp_sync();  // the scales were copied by other lanes
                float* const sums = partial + buffer * SUM_FLOATS;
                if (warp_id() < num_active) {
                    own.clear_all();
                    own.multiply(stream, inputs, input_sums);
                    own.store(sums + warp_id() * (TOKENS * SUM_STRIDE), num_rows);
                }
                warp_sync();
#pragma unroll
                for (int s = 0; s < STRIPS; ++s) stream.bring();
                block_sync();

                float* const before =
                    so_far + (strip - first) / STRIPS * Items::PASS_FLOATS + threadIdx.x;
#pragma unroll
                for (int i = 0; i < Items::ITEMS; ++i) {
                    const auto one = item(i);
                    if (!one.valid) continue;
                    float values[Items::VALUES];
#pragma unroll
                    for (int v = 0; v < Items::VALUES; ++v) {
                        const float* from = sums + one.token * SUM_STRIDE + one.row + v * 8;
                        float value = from[0];
#pragma unroll
                        for (int w = 1; w < WARPS; ++w) {
                            if (w < num_active) value += from[w * (TOKENS * SUM_STRIDE)];
                        }
                        float& kept = before[(i * Items::VALUES + v) * BLOCK_THREADS];
                        if (segment > 0) value = kept + value;
                        if (!is_last) kept = value;
                        values[v] = value * weights.unit;
                    }
                    if (!is_last) continue;
                    typename Epilogue::Addend addend;
                    if (i < Items::EARLY) {
                        addend = addends[i < Items::EARLY ? i : 0];
                    } else {
                        addend = epilogue.fetch(one.output, one.token);
                    }
                    if constexpr (PAIRS) {
                        epilogue.store(one.output, one.token, values[0], values[1], addend);
                    } else {
                        epilogue.store(one.output, one.token, values[0], addend);
                    }
                }
                if (SUM_BUFFERS == 2) {
                    buffer ^= 1;
                } else {
                    block_sync();
                }
            }
        }
    }
}

#endif  // QUANTIZED_ON_TENSOR_CORES
