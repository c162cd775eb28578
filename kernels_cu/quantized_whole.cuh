// Products with packed codes where all inputs of a block's tokens lie in shared memory at once: few
// tokens, where nothing but reading the codes may take time.
//
// A warp keeps its sums in registers along all inputs, chunks warp, warp + WARPS …, and the warps meet
// once for every STRIPS strips. So they run apart as far as their rings allow, and a barrier stands
// behind as many bytes as can be. An output is the sum over warps, in their order, of the sum over the
// warp's chunks, in theirs: the grid and the batch change no bit among the launches of this form.
#pragma once

#include "quantized.cuh"

constexpr int RING_TURNS = STAGES / STRIPS;          // times STRIPS chunks, of a warp
constexpr int TURN_BYTES = STRIPS * CHUNK_BYTES;

#if QUANTIZED_ON_TENSOR_CORES

// A warp's chunks on their way, STRIPS of them at a time: along the inputs, then to the next strips.
// One group of copies each time, empty where there is nothing.
template <bool PAIRS>
struct WholeStream {
    const QuantizedShare<PAIRS>& share;
    const unsigned char* from;  // this lane's vector of the next chunk of the first strip
    unsigned char* ring;        // the warp's
    int strip_bytes;
    int strip = 0, chunk = warp_id();
    int place = 0;              // of the oldest chunks, in bytes

    __device__ __forceinline__ WholeStream(
        const QuantizedShare<PAIRS>& share, const unsigned char* packed)
        : share(share), strip_bytes(share.num_chunks * CHUNK_BYTES) {
        const int64_t start = static_cast<int64_t>(share.first_strip) * strip_bytes;
        from = packed + start + warp_id() * CHUNK_BYTES + lane_id() * 16;
        ring = keep_pointer(dynamic_shared() + warp_id() * (RING_TURNS * TURN_BYTES));
    }

    // The oldest chunk of strip `i` of those at once.
    __device__ __forceinline__ const unsigned char* chunk_at(int i) const {
        return ring + place + i * CHUNK_BYTES;
    }

    // Copy to where the oldest chunks were. The warp's lanes have all used these.
    __device__ __forceinline__ void bring() {
        unsigned char* to = ring + place + lane_id() * 16;
        const unsigned char* source = from;
#pragma unroll
        for (int s = 0; s < STRIPS; ++s) {
            if (chunk < share.num_chunks && strip + s < share.num_strips) {
#pragma unroll
                for (int i = 0; i < CODE_VECTORS; ++i) copy_weights_16(to + i * 512, source + i * 512);
                if (lane_id() < SCALE_BYTES / 16) copy_weights_16(to + CODE_BYTES, source + CODE_BYTES);
            }
            to += CHUNK_BYTES;
            source += strip_bytes;
        }
        cp_async_commit();
        place = place + TURN_BYTES < RING_TURNS * TURN_BYTES ? place + TURN_BYTES : 0;
        from += WARPS * CHUNK_BYTES;
        chunk += WARPS;
        if (chunk >= share.num_segments * WARPS) {
            chunk = warp_id();
            strip += STRIPS;
            from += static_cast<int64_t>(STRIPS) * strip_bytes -
                    share.num_segments * (WARPS * CHUNK_BYTES);
        }
    }
};

// The whole kernel.
template <bool PAIRS, typename In, typename Epilogue>
__device__ __forceinline__ void run_whole(
    const QuantizedWeights& weights, QuantizedInput<In> input, const Epilogue& epilogue) {
    typedef QuantizedItems<PAIRS> Items;
    const QuantizedShare<PAIRS> share(weights.num_outputs, input.num_inputs);
    if (share.num_strips == 0) {  // the whole block
        grid_dependency_wait();
        return;
    }
    const int num_rows = input.num_rows, num_chunks = share.num_chunks;
    input.tile_inputs = share.num_segments * SEGMENT;
    input.stride = (num_chunks * CHUNK + SPAN - 1) / SPAN * SPAN + INPUT_PAD;
    input.tile = reinterpret_cast<scalar_t*>(dynamic_shared() + RING_BYTES);
    input.sums = reinterpret_cast<float*>(input.tile + num_rows * input.stride);
    float* const partial = input.sums + (WEIGHT_KIND == 1 ? num_chunks * GROUPS * TOKENS : 0);
    // Done with before the first sums.
    input.norm_row = reinterpret_cast<scalar_t*>(partial);
    input.squares = partial + (input.num_inputs + 1) / 2;

#if NORM_INPUTS
    input.request();
#endif
    WholeStream<PAIRS> stream(share, weights.packed);
#pragma unroll 1
    for (int i = 0; i < RING_TURNS; ++i) stream.bring();
    grid_dependency_wait();
#if NORM_INPUTS
    input.template load_normed<RING_TURNS>(num_chunks);
#else
    input.load(0, num_chunks);
#endif
    block_sync();

    const scalar_t* first_inputs[TOKEN_TILES];
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
        const int token = min(lane_id() / 4 + n * 8, num_rows - 1);  // others are not looked at
        first_inputs[n] = input.tile + token * input.stride + warp_id() * CHUNK + lane_id() % 4 * 8;
    }
    const float* const first_sums = input.sums + warp_id() * (GROUPS * TOKENS) + lane_id() % 4 * 2;
    ChunkSums own;
    int buffer = 0;
#pragma unroll 1
    for (int strip = 0; strip < share.num_strips; strip += STRIPS) {
        const auto item = [&](int i) {
            return Items::item(share, weights, num_rows, strip, i);
        };
        typename Epilogue::Addend addends[Items::EARLY];
#pragma unroll
        for (int i = 0; i < Items::EARLY; ++i) {
            const auto one = item(i);
            if (one.valid) addends[i] = epilogue.fetch(one.output, one.token);
        }
        own.clear_all();
        const scalar_t* inputs[TOKEN_TILES];
#pragma unroll
        for (int n = 0; n < TOKEN_TILES; ++n) inputs[n] = first_inputs[n];
        const float* input_sums = first_sums;
#pragma unroll 1
        for (int chunk = warp_id(); chunk < share.num_segments * WARPS; chunk += WARPS) {
            cp_async_wait<RING_TURNS - 1>();
            warp_sync();  // other lanes copied some of it
            if (chunk < num_chunks) own.multiply(stream, inputs, input_sums);
            warp_sync();  // all lanes have read it
            stream.bring();
#pragma unroll
            for (int n = 0; n < TOKEN_TILES; ++n) inputs[n] += SEGMENT;
            input_sums += WARPS * (GROUPS * TOKENS);
        }
        float* const sums = partial + buffer * SUM_FLOATS;
        own.store(sums + warp_id() * (TOKENS * SUM_STRIDE), TOKENS);
        block_sync();  // all warps' sums are there

#pragma unroll
        for (int i = 0; i < Items::ITEMS; ++i) {
            const auto one = item(i);
            if (!one.valid) continue;
            float values[Items::VALUES];
#pragma unroll
            for (int v = 0; v < Items::VALUES; ++v) {
                const float* read = sums + one.token * SUM_STRIDE + one.row + 8 * v;
                float value = read[0];
#pragma unroll
                for (int w = 1; w < WARPS; ++w) value += read[w * (TOKENS * SUM_STRIDE)];
                values[v] = value * weights.unit;
            }
            typename Epilogue::Addend late;
            if (i < Items::EARLY) {
                late = addends[i < Items::EARLY ? i : 0];
            } else {
                late = epilogue.fetch(one.output, one.token);
            }
            if constexpr (PAIRS) {
                epilogue.store(one.output, one.token, values[0], values[1], late);
            } else {
                epilogue.store(one.output, one.token, values[0], late);
            }
        }
        if (SUM_BUFFERS == 2) {
            buffer = 1 - buffer;
        } else {
            block_sync();  // nobody reads the sums any more
        }
    }
}

#endif  // QUANTIZED_ON_TENSOR_CORES
