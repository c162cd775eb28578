// The inputs of a product with packed codes, in shared memory: normalised, rounded, padded with zeros,
// and with int4 summed by group, as an offset is multiplied by the sum of its inputs.
//
// TOKENS       that a build has room for: 8, 16 or 32
// NORM_INPUTS  1: the inputs are normalised here; all of them must then be one tile
//
// A span is 256 inputs of a token, 8 a lane: what a warp takes at a time, all loads of a few spans
// together. Which warp takes which span changes no bit, nor does the batch: squares are summed over a
// span's lanes, then over spans.
#pragma once

#include "quantized_format.cuh"
#include "reduce.cuh"

#ifndef TOKENS
#error "define TOKENS: 8, 16 or 32, at least the tokens of the batch"
#endif
#ifndef NORM_INPUTS
#define NORM_INPUTS 0
#endif

constexpr int WARPS = 8;
constexpr int BLOCK_THREADS = WARPS * 32;
constexpr int SPAN = 256;
constexpr int LANE_INPUTS = SPAN / 32;
constexpr int INPUT_PAD = 32;  // inputs: rows lie 64 bytes off a multiple of 128

template <typename In>
union LaneInputs {
    uint4 words[LANE_INPUTS * sizeof(In) / 16];
    Vec<In, LANE_INPUTS> values;
};

template <typename In>
struct QuantizedInput {
    const In* x;          // [T, num_inputs]
    const int32_t* rows;  // which rows of x; null: the first ones
    const scalar_t* norm_weight;
    float eps;
    int num_rows, num_inputs;
    int tile_inputs;  // a multiple of SPAN
    scalar_t* tile;   // shared, [num_rows, stride]
    int stride;
    float* sums;      // shared, int4: [groups of a tile, TOKENS]
    float* squares;   // shared, with NORM_INPUTS: [num_rows, spans]

    // Spans that a warp asks for before it uses the first.
    static constexpr int HELD = NORM_INPUTS || sizeof(In) == 4 ? 4 : 8;

    __device__ __forceinline__ int spans_of(int tile_number) const {
        const int left = num_inputs - tile_number * tile_inputs;
        return (min(left, tile_inputs) + SPAN - 1) / SPAN;
    }

    __device__ __forceinline__ void read(
        LaneInputs<In>& held, int token, int first, int span) const {
        const int k = first + span * SPAN + lane_id() * LANE_INPUTS;
        const int64_t row = rows == nullptr ? token : rows[token];
#pragma unroll
        for (int w = 0; w < LANE_INPUTS * static_cast<int>(sizeof(In)) / 16; ++w) {
            held.words[w] = make_uint4(0, 0, 0, 0);
            if (k < num_inputs) {
                held.words[w] = reinterpret_cast<const uint4*>(x + row * num_inputs + k)[w];
            }
        }
    }

    // One span to its place. The whole warp comes.
    __device__ __forceinline__ void put(
        const LaneInputs<In>& held, int token, int span, int num_chunks, float factor,
        const Vec<scalar_t, LANE_INPUTS>& scales) const {
        float values[LANE_INPUTS];
#pragma unroll
        for (int j = 0; j < LANE_INPUTS; ++j) {
            values[j] = to_float(held.values.data[j]);
            if (NORM_INPUTS) values[j] = values[j] * factor * to_float(scales.data[j]);
        }
        const int k = span * SPAN + lane_id() * LANE_INPUTS;
        store_floats<scalar_t, LANE_INPUTS>(tile + token * stride + k, values);
        if constexpr (WEIGHT_KIND == 1) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < LANE_INPUTS; ++j) sum += rounded<scalar_t>(values[j]);
            sum = warp_sum<GROUP / LANE_INPUTS>(sum);
            if (k % GROUP == 0 && k / CHUNK < num_chunks) sums[k / GROUP * TOKENS + token] = sum;
        }
    }

    // The norm's weights of a span, 0 beyond the inputs.
    __device__ __forceinline__ Vec<scalar_t, LANE_INPUTS> norm_weights(int span) const {
        Vec<scalar_t, LANE_INPUTS> scales = {};
        const int k = span * SPAN + lane_id() * LANE_INPUTS;
        if (NORM_INPUTS && k < num_inputs) {
            scales = load_vec<scalar_t, LANE_INPUTS>(norm_weight + k);
        }
        return scales;
    }

    // A tile of inputs, of all tokens. A barrier must lie between the last use of the one before and
    // this, and one between this and its use. num_chunks: of the tile.
    __device__ __forceinline__ void load(int tile_number, int num_chunks) const {
        const int first = tile_number * tile_inputs, spans = spans_of(tile_number);
        const int total = num_rows * spans;
        const Vec<scalar_t, LANE_INPUTS> none = {};
#pragma unroll 1
        for (int i = warp_id(); i < total; i += HELD * WARPS) {
            LaneInputs<In> held[HELD];
#pragma unroll
            for (int h = 0; h < HELD; ++h) {
                const int own = i + h * WARPS;
                if (own < total) read(held[h], own / spans, first, own % spans);
            }
#pragma unroll
            for (int h = 0; h < HELD; ++h) {
                const int own = i + h * WARPS;
                if (own < total) put(held[h], own / spans, own % spans, num_chunks, 1.0f, none);
            }
        }
    }

    // What does not depend on the kernel before: the norm's weights of this warp's first spans.
    struct Early {
        Vec<scalar_t, LANE_INPUTS> scales[HELD];
    };
    __device__ __forceinline__ void request(Early& early) const {
        const int spans = spans_of(0), total = num_rows * spans;
#pragma unroll
        for (int h = 0; h < HELD; ++h) {
            const int own = warp_id() + h * WARPS;
            if (own < total) early.scales[h] = norm_weights(own % spans);
        }
    }

    // The only tile, normalised. The whole block comes.
    __device__ __forceinline__ void load_normed(const Early& early, int num_chunks) const {
        const int spans = spans_of(0), total = num_rows * spans;
        LaneInputs<In> held[HELD];
        const auto square = [&](const LaneInputs<In>& values, int own) {
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < LANE_INPUTS; ++j) {
                const float value = to_float(values.values.data[j]);
                sum += value * value;
            }
            sum = warp_sum(sum);
            if (lane_id() == 0) squares[own] = sum;
        };
#pragma unroll
        for (int h = 0; h < HELD; ++h) {
            const int own = warp_id() + h * WARPS;
            if (own < total) read(held[h], own / spans, 0, own % spans);
        }
#pragma unroll
        for (int h = 0; h < HELD; ++h) {
            const int own = warp_id() + h * WARPS;
            if (own < total) square(held[h], own);
        }
#pragma unroll 1
        for (int own = warp_id() + HELD * WARPS; own < total; own += WARPS) {
            LaneInputs<In> other;
            read(other, own / spans, 0, own % spans);
            square(other, own);
        }
        block_sync();
        int known = -1;
        float factor = 0.0f;
        const auto factor_of = [&](int token) {
            if (token != known) {
                float sum = 0.0f;
                for (int i = lane_id(); i < spans; i += 32) sum += squares[token * spans + i];
                factor = 1.0f / sqrtf(warp_sum(sum) / num_inputs + eps);
                known = token;
            }
            return factor;
        };
#pragma unroll
        for (int h = 0; h < HELD; ++h) {
            const int own = warp_id() + h * WARPS;
            if (own < total) {
                const float scale = factor_of(own / spans);
                put(held[h], own / spans, own % spans, num_chunks, scale, early.scales[h]);
            }
        }
#pragma unroll 1
        for (int own = warp_id() + HELD * WARPS; own < total; own += WARPS) {
            LaneInputs<In> other;
            read(other, own / spans, 0, own % spans);
            const float scale = factor_of(own / spans);
            put(other, own / spans, own % spans, num_chunks, scale, norm_weights(own % spans));
        }
    }
};
