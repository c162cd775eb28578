// The inputs of a persistent decode step's products: from the words of other blocks to rows of shared
// memory.
//
// What is read here was written a moment ago and comes from L2, so a thread asks for many words at once:
// nothing that says whether one is needed, or there, may stand between the loads, or they wait for each
// other, one way to L2 and back after the other.
#pragma once

#include "decode_step_words.cuh"
#include "reduce.cuh"
#if HAS_CODES
#include "decode_step_codes.cuh"
#else
#include "decode_step_sums.cuh"
#endif

constexpr int SPAN = 4;  // inputs that a lane takes at a time, as they come

constexpr int SEQUENCES_POWER = SEQUENCES <= 2 ? SEQUENCES : 4;
constexpr int TOKEN_WARPS = USER_WARPS / SEQUENCES_POWER;  // that normalise a token
constexpr int ROW_SPANS = 32;                              // of a warp's lanes, side by side
constexpr int NORM_STEP = TOKEN_WARPS * ROW_SPANS * SPAN;  // inputs of a token taken at a time

// Spans that a thread asks for at once, at most: of what is normalised, and of all else.
constexpr int NORM_SPANS_AHEAD = MAX_NORM_INPUTS <= NORM_STEP       ? 1
                                 : MAX_NORM_INPUTS <= 2 * NORM_STEP ? 2
                                 : SEQUENCES <= 2                   ? 4
                                                                    : 8;
constexpr int SPANS_AHEAD = SEQUENCES == 1 ? 16 : 8;

// Two words: 16 bytes a lane, side by side, are what memory gives without waste.
union InputSpan {
    uint32_t pairs[SPAN / 2];
    Vec<scalar_t, SPAN> values;
};

__device__ __forceinline__ InputSpan load_span(const scalar_t* p) {
    InputSpan span;
    span.values = load_vec<scalar_t, SPAN>(p);
    return span;
}
__device__ __forceinline__ void put_span(scalar_t* p, const InputSpan& span) {
    store_vec<scalar_t, SPAN>(p, span.values);
}

// N spans of words of one moment: span i is number_of(i) of `words`. Where there is none, the number is that
// of another of the same thread or, in a tile's last warp, of its last span: one that all threads ask for
// would keep its part of L2 busy for microseconds. While some are missing, one of them alone is asked for
// again: all that all blocks wait for would leave L2 no time for anything else.
template <int N, typename NumberOf>
__device__ __forceinline__ void wait_for_spans(
    const uint64_t* words, const NumberOf& number_of, Moment moment, InputSpan (&spans)[N]) {
    constexpr int WORDS = SPAN / 2;
    static_assert(SPAN == 4, "two words");
#pragma unroll 1
    while (true) {
        uint64_t found[N][WORDS];
#pragma unroll
        for (int i = 0; i < N; ++i) {
            load_two_words(words + number_of(i) * WORDS, found[i][0], found[i][1]);
        }
        uint32_t distances[2] = {0, 0};  // added up without a branch, in two chains
#pragma unroll
        for (int i = 0; i < N; ++i) {
            distances[0] |= distance(found[i][0], moment);
            distances[1] |= distance(found[i][1], moment);
            spans[i].pairs[0] = static_cast<uint32_t>(found[i][0]);
            spans[i].pairs[1] = static_cast<uint32_t>(found[i][1]);
        }
        if ((distances[0] | distances[1]) == 0) break;
        int missing = 0;
#pragma unroll
        for (int i = 1; i < N; ++i) {
            if (!is_of(found[i][0], moment) || !is_of(found[i][1], moment)) missing = i;
        }
        uint32_t alone[WORDS];
        wait_for_words(words + number_of(missing) * WORDS, moment, alone);
    }
}

// The inputs of all tokens, a tile of them, as rows of shared memory.
struct TileRows {
    int stride;  // inputs from a row to the next: 64 bytes off a multiple of 128

    __device__ __forceinline__ TileRows(int num_inputs, int tile_inputs)
        : stride((min(num_inputs, tile_inputs) + 63) / 64 * 64 + 32) {}

    __device__ __forceinline__ scalar_t* row(int token) const {
        return step_inputs() + token * stride;
    }
    // Behind them.
    __device__ __forceinline__ float* group_sums() const {
        return reinterpret_cast<float*>(row(SEQUENCES));
    }
};

// Spans of `count` inputs that lanes take side by side: as many as there are, and more to a whole warp.
__device__ __forceinline__ int whole_spans(int count) {
    return (count / SPAN + ROW_SPANS - 1) / ROW_SPANS * ROW_SPANS;
}

// Where a span is: `k` is the first of its inputs in the tile. From the tile's end on there is none.
struct SpanPlace {
    int token, k;

    __device__ __forceinline__ int chunk() const {
        return static_cast<uint32_t>(k) / (ROW_SPANS * SPAN);
    }
};

#if HAS_CODES
// With int4, sums of groups are made of those of SPAN inputs a lane, of a warp's lanes side by side: a chunk.
constexpr int GROUP_LANES = GROUP / SPAN;

// Of N sums of every lane, 1, 2 or 4, one over the lanes of its group: that of number own_sum<N>(), which
// the first of some lanes with the same number stores. Lanes hand each other half of what they have, so
// that N sums take hardly more shuffles than one.
template <int N>
__device__ __forceinline__ float sum_groups(float (&sums)[N]) {
#pragma unroll
    for (int left = N / 2, lanes = GROUP_LANES / 2; left > 0; left /= 2, lanes /= 2) {
        const bool is_upper = lane_id() & lanes;
#pragma unroll
        for (int i = 0; i < left; ++i) {
            const float lower = sums[2 * i], upper = sums[2 * i + 1];
            sums[i] = (is_upper ? upper : lower) + shuffle_xor(is_upper ? lower : upper, lanes);
        }
    }
    return warp_sum<GROUP_LANES / N>(sums[0]);
}
template <int N>
__device__ __forceinline__ int own_sum() {
    const int part = lane_id() % GROUP_LANES / (GROUP_LANES / N);
    return N == 4 ? part / 2 + part % 2 * 2 : part;
}
template <int N>
__device__ __forceinline__ bool stores_sum() { return lane_id() % (GROUP_LANES / N) == 0; }
#endif

// N spans to the rows of a tile of `count` inputs, with int4 also the sums of their groups. place_of(i):
// of span i of this lane; the warp's lanes have ROW_SPANS side by side. Whole warps come.
template <int N, typename PlaceOf>
__device__ __forceinline__ void put_inputs(
    const TileRows& rows, const PlaceOf& place_of, int count, const InputSpan (&spans)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const SpanPlace place = place_of(i);
        if (place.k < count) put_span(rows.row(place.token) + place.k, spans[i]);
    }
#if HAS_CODES
    if constexpr (HAS_GROUP_SUMS) {
        static_assert(SPAN * ROW_SPANS == CHUNK, "sums of a warp are of whole groups");
        constexpr int TOGETHER = N < 4 ? N : 4;
#pragma unroll
        for (int first = 0; first < N; first += TOGETHER) {
            float sums[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                static_assert(SPAN == 4, "two words");
                const Vec<scalar_t, SPAN>& values = spans[first + i].values;
                const float sum = (to_float(values.data[0]) + to_float(values.data[1])) +
                                  (to_float(values.data[2]) + to_float(values.data[3]));
                sums[i] = place_of(first + i).k < count ? sum : 0.0f;
            }
            const float sum = sum_groups(sums);
            const SpanPlace place = place_of(first + own_sum<TOGETHER>());
            if (stores_sum<TOGETHER>() && place.chunk() * CHUNK < count) {
                const int group = static_cast<uint32_t>(place.k) / GROUP;
                rows.group_sums()[group * SUM_TOKENS + place.token] = sum;
            }
        }
    }
#endif
}

__device__ __forceinline__ int first_norm_input() {
    return (warp_id() % TOKEN_WARPS * ROW_SPANS + lane_id()) * SPAN;
}
// A norm's weights are asked for early, as they wait for nobody. All threads that compute come, and
// meet between their copies' end and the norm.
__device__ __forceinline__ void request_norm(const scalar_t* weight, int num_inputs) {
#pragma unroll 1
    for (int k = threadIdx.x * 8; k < num_inputs; k += USERS * 8) {
        cp_async_16(step_norm() + k, weight + k);
    }
}

// The RMS norm of x to the rows, with the weights that were asked for. moment: of the words of x;
// 0: it lies in `embeddings` [SEQUENCES, num_inputs].
__device__ __noinline__ void load_normed(
    const TileRows rows, const scalar_t* embeddings, Moment moment, float eps, int num_inputs) {
    __shared__ float sums[USER_WARPS];
    const int token = warp_id() / TOKEN_WARPS;
    scalar_t* row = rows.row(token);
    const int64_t start = static_cast<int64_t>(token) * num_inputs;
    const uint64_t* words = step_memory().words.x + start / 2;
    const int end = token < SEQUENCES ? num_inputs : 0;
    float sum = 0.0f;
#pragma unroll 1
    for (int first = first_norm_input(); first < end; first += NORM_SPANS_AHEAD * NORM_STEP) {
        InputSpan spans[NORM_SPANS_AHEAD];
        const auto number_of = [&](int i) {
            const uint32_t k = first + i * NORM_STEP;
            return (k < end ? k : first) / SPAN;
        };
        if (moment == 0) {
#pragma unroll
            for (int i = 0; i < NORM_SPANS_AHEAD; ++i) {
                spans[i] = load_span(embeddings + start + number_of(i) * SPAN);
            }
        } else {
            wait_for_spans(words, number_of, moment, spans);
        }
#pragma unroll
        for (int i = 0; i < NORM_SPANS_AHEAD; ++i) {
            const int k = first + i * NORM_STEP;
            if (k >= end) break;
#pragma unroll
            for (int j = 0; j < SPAN; ++j) {
                const float value = to_float(spans[i].values.data[j]);
                sum += value * value;
            }
            put_span(row + k, spans[i]);
        }
    }
    sum = warp_sum(sum);
    cp_async_wait<0>();  // the norm's weights that this thread has copied, for all
    if (lane_id() == 0) sums[warp_id()] = sum;
    users_sync();
    sum = 0.0f;
#pragma unroll
    for (int w = 0; w < TOKEN_WARPS; ++w) sum += sums[token * TOKEN_WARPS + w];
    const float factor = rsqrtf(sum / num_inputs + eps);
#pragma unroll 1
    for (int first = first_norm_input(); first < whole_spans(end) * SPAN;
         first += NORM_SPANS_AHEAD * NORM_STEP) {
        InputSpan spans[NORM_SPANS_AHEAD] = {}, weights[NORM_SPANS_AHEAD] = {};
        const auto place_of = [&](int i) { return SpanPlace{token, first + i * NORM_STEP}; };
#pragma unroll
        for (int i = 0; i < NORM_SPANS_AHEAD; ++i) {
            const int k = place_of(i).k;  // others change theirs meanwhile
            if (k < end) spans[i] = load_span(row + k);
            if (k < end) weights[i] = load_span(step_norm() + k);
        }
#pragma unroll
        for (int i = 0; i < NORM_SPANS_AHEAD; ++i) {
#pragma unroll
            for (int j = 0; j < SPAN; ++j) {
                spans[i].values.data[j] =
                    from_float<scalar_t>(to_float(spans[i].values.data[j]) * factor *
                                         to_float(weights[i].values.data[j]));
            }
        }
        put_inputs(rows, place_of, end, spans);
    }
    users_sync();
}

// As load_words, of which it is a part: N spans of a thread at a time.
template <int N>
__device__ __forceinline__ void load_words_by(
    const TileRows& rows, const uint64_t* words, Moment moment, int num_inputs, int first,
    int count, int first_token, int num_tokens) {
    const int spans = whole_spans(count), total = num_tokens * spans;  // of a token, of all
#pragma unroll 1
    for (int start = threadIdx.x; start < total; start += N * USERS) {
        InputSpan found[N];
        const auto place_of = [&](int i) {
            const int span = start + i * USERS;
            int number = 0;
#pragma unroll
            for (int n = 1; n < SEQUENCES; ++n) number += n < num_tokens && span >= n * spans ? 1 : 0;
            return SpanPlace{first_token + number, (span - number * spans) * SPAN};
        };
        const auto number_of = [&](int i) {
            const SpanPlace place = place_of(start + i * USERS < total ? i : 0);
            const uint32_t k = place.token * num_inputs + first + min(place.k, count - SPAN);
            return k / SPAN;
        };
        wait_for_spans(words, number_of, moment, found);
        put_inputs(rows, place_of, count, found);
    }
}

// Inputs first … first + count - 1 of some tokens in a row, from words [SEQUENCES, num_inputs / 2], to
// the rows. All threads that compute come; a barrier must follow.
__device__ __noinline__ void load_words(
    const TileRows rows, const uint64_t* words, Moment moment, int num_inputs, int first,
    int count, int first_token, int num_tokens) {
    const int total = num_tokens * whole_spans(count);
    if (total <= 4 * USERS) {
        load_words_by<4>(rows, words, moment, num_inputs, first, count, first_token, num_tokens);
    } else if (SPANS_AHEAD == 8 || total <= 8 * USERS) {
        load_words_by<8>(rows, words, moment, num_inputs, first, count, first_token, num_tokens);
    } else {
        load_words_by<SPANS_AHEAD>(
            rows, words, moment, num_inputs, first, count, first_token, num_tokens);
    }
}
