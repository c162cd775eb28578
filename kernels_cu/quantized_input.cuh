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

// A warp's spans of a tile, one after the other: every WARPSth of all tokens'.
struct Turn {
    int spans, token = 0, span = warp_id();

    __device__ __forceinline__ explicit Turn(int spans) : spans(spans) { settle(); }
    __device__ __forceinline__ void next() {
        span += WARPS;
        settle();
    }
    __device__ __forceinline__ void settle() {
#pragma unroll 1
        while (span >= spans) {
            span -= spans;
            ++token;
        }
    }
};

template <typename In>
struct QuantizedInput {
    const In* x;          // [T, num_inputs]
    const int32_t* rows;  // with NORM_INPUTS, which rows of x; null: the first ones
    const scalar_t* norm_weight;
    float eps;
    int num_rows, num_inputs;
    int tile_inputs;  // a multiple of SPAN
    scalar_t* tile;   // shared, [num_rows, stride]
    int stride;
    float* sums;      // shared, int4: [groups of a tile, TOKENS]
    // Shared, with NORM_INPUTS: its weights, and the squares of spans, [num_rows, spans].
    scalar_t* norm_row;
    float* squares;

    // Spans that a warp asks for before it uses the first.
    static constexpr int HELD = NORM_INPUTS || sizeof(In) == 4 ? 4 : 8;

    __device__ __forceinline__ int spans_of(int tile_number) const {
        const int left = num_inputs - tile_number * tile_inputs;
        return (min(left, tile_inputs) + SPAN - 1) / SPAN;
    }

    __device__ __forceinline__ void read(
        LaneInputs<In>& held, int token, int first, int span) const {
        const int k = first + span * SPAN + lane_id() * LANE_INPUTS;
        const int64_t row = NORM_INPUTS && rows != nullptr ? rows[token] : token;
#pragma unroll
        for (int w = 0; w < LANE_INPUTS * static_cast<int>(sizeof(In)) / 16; ++w) {
            held.words[w] = make_uint4(0, 0, 0, 0);
            if (k < num_inputs) {
                held.words[w] = reinterpret_cast<const uint4*>(x + row * num_inputs + k)[w];
            }
        }
    }

    // One span to its place, as it is stored. The whole warp comes.
    __device__ __forceinline__ void put(
        const float (&values)[LANE_INPUTS], const Turn& turn, int num_chunks) const {
        const int k = turn.span * SPAN + lane_id() * LANE_INPUTS;
        store_floats<scalar_t, LANE_INPUTS>(tile + turn.token * stride + k, values);
        float stored[LANE_INPUTS];
#pragma unroll
        for (int j = 0; j < LANE_INPUTS; ++j) stored[j] = rounded<scalar_t>(values[j]);
        put_sums(stored, turn, num_chunks);
    }

    // With int4, the sums of a span's groups. The whole warp comes.
    __device__ __forceinline__ void put_sums(
        const float (&stored)[LANE_INPUTS], const Turn& turn, int num_chunks) const {
        if constexpr (WEIGHT_KIND == 1) {
            const int k = turn.span * SPAN + lane_id() * LANE_INPUTS;
            float sum = 0.0f;
#pragma unroll
            for (int j = 0; j < LANE_INPUTS; ++j) sum += stored[j];
            sum = warp_sum<GROUP / LANE_INPUTS>(sum);
            if (k % GROUP == 0 && k / CHUNK < num_chunks) {
                sums[k / GROUP * TOKENS + turn.token] = sum;
            }
        }
    }

    static __device__ __forceinline__ void to_floats(
        const LaneInputs<In>& held, float (&values)[LANE_INPUTS]) {
#pragma unroll
        for (int j = 0; j < LANE_INPUTS; ++j) values[j] = to_float(held.values.data[j]);
    }

    // A tile of inputs, of all tokens. A barrier must lie between the last use of the one before and
    // this, and one between this and its use. num_chunks: of the tile.
    //
    // Few tokens' inputs go through registers, so that nobody waits for more than these. Many tokens'
    // are all asked for at once, and come behind the weights that are under way, which memory brings
    // meanwhile: tokens have most of the bytes that a multiprocessor reads.
    __device__ __forceinline__ void load(int tile_number, int num_chunks) const {
        const int first = tile_number * tile_inputs, spans = spans_of(tile_number);
        Turn turn(spans);
        if constexpr (TOKENS > 8 && sizeof(In) == sizeof(scalar_t)) {
#pragma unroll 1
            for (; turn.token < num_rows; turn.next()) {
                const int k = first + turn.span * SPAN + lane_id() * LANE_INPUTS;
                const bool valid = k < num_inputs;
                const int64_t offset = static_cast<int64_t>(turn.token) * num_inputs + k;
                cp_async_16_or_zero(place(turn), x + (valid ? offset : 0), valid);
            }
            cp_async_commit();
            cp_async_wait<0>();
            if constexpr (WEIGHT_KIND == 1) {
#pragma unroll 2
                for (turn = Turn(spans); turn.token < num_rows; turn.next()) {
                    float values[LANE_INPUTS];  // this lane's copy, which needs no barrier
                    load_floats<scalar_t, LANE_INPUTS>(
                        reinterpret_cast<const scalar_t*>(place(turn)), values);
                    put_sums(values, turn, num_chunks);
                }
            }
        } else {
#pragma unroll 1
            while (turn.token < num_rows) {
                LaneInputs<In> held[HELD];
                Turn ahead = turn;
#pragma unroll
                for (int h = 0; h < HELD; ++h, ahead.next()) {
                    if (ahead.token < num_rows) read(held[h], ahead.token, first, ahead.span);
                }
#pragma unroll
                for (int h = 0; h < HELD; ++h, turn.next()) {
                    if (turn.token >= num_rows) continue;
                    float values[LANE_INPUTS];
                    to_floats(held[h], values);
                    put(values, turn, num_chunks);
                }
            }
        }
    }

    // Before the wait for the kernel before: ask for the norm's weights, as one group of copies.
    __device__ __forceinline__ void request() const {
#pragma unroll 1
        for (int k = threadIdx.x * LANE_INPUTS; k < num_inputs; k += BLOCK_THREADS * LANE_INPUTS) {
            cp_async_16(norm_row + k, norm_weight + k);
        }
        cp_async_commit();
    }

    // The only tile, normalised. The whole block comes. GROUPS: of copies that were committed after
    // that of request().
    template <int GROUPS_AFTER>
    __device__ __forceinline__ void load_normed(int num_chunks) const {
        constexpr bool STAYS = sizeof(In) == sizeof(scalar_t);  // in its place, until normalised
        const int spans = spans_of(0);
        Turn turn(spans);
#pragma unroll 1
        while (turn.token < num_rows) {
            LaneInputs<In> held[HELD];
            Turn ahead = turn;
#pragma unroll
            for (int h = 0; h < HELD; ++h, ahead.next()) {
                if (ahead.token < num_rows) read(held[h], ahead.token, 0, ahead.span);
            }
#pragma unroll
            for (int h = 0; h < HELD; ++h, turn.next()) {
                if (turn.token >= num_rows) continue;
                float values[LANE_INPUTS], sum = 0.0f;
                to_floats(held[h], values);
#pragma unroll
                for (int j = 0; j < LANE_INPUTS; ++j) sum += values[j] * values[j];
                sum = warp_sum(sum);
                if (lane_id() == 0) squares[turn.token * spans + turn.span] = sum;
                if constexpr (STAYS) *place(turn) = held[h].words[0];
            }
        }
        cp_async_wait<GROUPS_AFTER>();
        block_sync();
        int known = -1;
        float factor = 0.0f;
#pragma unroll 1
        for (turn = Turn(spans); turn.token < num_rows; turn.next()) {
            LaneInputs<In> own;
            if constexpr (STAYS) {
                own.words[0] = *place(turn);
            } else {
                read(own, turn.token, 0, turn.span);
            }
            if (turn.token != known) {
                float sum = 0.0f;
                for (int i = lane_id(); i < spans; i += 32) {
                    sum += squares[turn.token * spans + i];
                }
                factor = 1.0f / sqrtf(warp_sum(sum) / num_inputs + eps);
                known = turn.token;
            }
            const int k = turn.span * SPAN + lane_id() * LANE_INPUTS;
            float values[LANE_INPUTS], weights[LANE_INPUTS] = {};
            to_floats(own, values);
            if (k < num_inputs) load_floats<scalar_t, LANE_INPUTS>(norm_row + k, weights);
#pragma unroll
            for (int j = 0; j < LANE_INPUTS; ++j) values[j] = values[j] * factor * weights[j];
            put(values, turn, num_chunks);
        }
    }

    // Of this lane's inputs of a span, where they will lie.
    __device__ __forceinline__ uint4* place(const Turn& turn) const {
        return reinterpret_cast<uint4*>(
            tile + turn.token * stride + turn.span * SPAN + lane_id() * LANE_INPUTS);
    }
};
