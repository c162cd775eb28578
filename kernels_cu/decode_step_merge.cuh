// What attention gives a persistent decode step, as inputs of the product behind it: where a context has
// several parts, their sums are merged as they are read.
//
// As with all words, everything that a turn needs is asked for before any of it is looked at.
#pragma once

#include "decode_step_inputs.cuh"

// Spans that a thread merges at once, and parts of each that it asks for at once: registers are short.
constexpr int MERGED_SPANS = 2, PARTS_AHEAD = 2;

// What a thread has of a span's parts, as words: their states, and SPAN values of each.
struct SpanParts {
    uint64_t states[PARTS_AHEAD][2], values[PARTS_AHEAD][SPAN];

    // from: the words of the first part's state; values_from: of its values, those of the next part
    // HEAD_SIZE words behind. Parts from `left` on do not exist: the last one that does is there twice.
    __device__ __forceinline__ void load(
        const uint64_t* states_from, const uint64_t* values_from, int left) {
#pragma unroll
        for (int s = 0; s < PARTS_AHEAD; ++s) {
            const int part = min(s, left - 1);
            load_two_words(states_from + part * 2, states[s][0], states[s][1]);
#pragma unroll
            for (int j = 0; j < SPAN; j += 2) {
                load_two_words(values_from + part * HEAD_SIZE + j, values[s][j], values[s][j + 1]);
            }
        }
    }
    // 0 where all are of that moment.
    __device__ __forceinline__ uint32_t apart(Moment moment) const {
        uint32_t distances = 0;
#pragma unroll
        for (int s = 0; s < PARTS_AHEAD; ++s) {
            distances |= distance(states[s][0], moment) | distance(states[s][1], moment);
#pragma unroll
            for (int j = 0; j < SPAN; ++j) distances |= distance(values[s][j], moment);
        }
        return distances;
    }
};

// Sums of a span, of the parts so far.
struct MergedSpan {
    float highest = -infinity(), sum = 0.0f, values[SPAN] = {};

    __device__ __forceinline__ void add(const SpanParts& parts, int left) {
        const float before = highest;
        float own[PARTS_AHEAD];
#pragma unroll
        for (int s = 0; s < PARTS_AHEAD; ++s) {
            own[s] = s < left ? float_of(static_cast<uint32_t>(parts.states[s][0])) : -infinity();
            highest = fmaxf(highest, own[s]);
        }
        float weight = softmax_weight(before, highest);
        sum *= weight;
#pragma unroll
        for (int j = 0; j < SPAN; ++j) values[j] *= weight;
#pragma unroll
        for (int s = 0; s < PARTS_AHEAD; ++s) {
            weight = softmax_weight(own[s], highest);
            sum += weight * float_of(static_cast<uint32_t>(parts.states[s][1]));
#pragma unroll
            for (int j = 0; j < SPAN; ++j) {
                values[j] += weight * float_of(static_cast<uint32_t>(parts.values[s][j]));
            }
        }
    }
    __device__ __forceinline__ InputSpan finished() const {
        const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
        InputSpan span;
#pragma unroll
        for (int j = 0; j < SPAN; ++j) span.values.data[j] = from_float<scalar_t>(values[j] * inverse);
        return span;
    }
};

// Inputs first … first + count - 1 of a token, merged from its parts, to the rows.
__device__ __forceinline__ void merge_parts(
    const TileRows& rows, int token, int parts, Moment moment, int first, int count) {
    const StepMemory& memory = step_memory();
    const uint64_t* states = memory.words.part_states;
    const uint64_t* values = memory.words.part_values;
#pragma unroll 1
    for (int start = threadIdx.x; start < whole_spans(count); start += MERGED_SPANS * USERS) {
        const auto place_of = [&](int i) { return SpanPlace{token, (start + i * USERS) * SPAN}; };
        int heads[MERGED_SPANS], columns[MERGED_SPANS];
#pragma unroll
        for (int i = 0; i < MERGED_SPANS; ++i) {
            const bool is_there = place_of(i).k < count;  // else the thread's first one again
            const int k = first + min(place_of(is_there ? i : 0).k, count - SPAN);
            heads[i] = static_cast<int>(memory.attention.part_row(token, k / HEAD_SIZE, 0));
            columns[i] = k % HEAD_SIZE;
        }
        MergedSpan merged[MERGED_SPANS];
#pragma unroll 1
        for (int part = 0; part < parts; part += PARTS_AHEAD) {
            SpanParts read[MERGED_SPANS];
#pragma unroll 1
            while (true) {
#pragma unroll
                for (int i = 0; i < MERGED_SPANS; ++i) {
                    const int64_t at = heads[i] + part;
                    read[i].load(states + at * 2, values + at * HEAD_SIZE + columns[i], parts - part);
                }
                uint32_t distances = 0;
#pragma unroll
                for (int i = 0; i < MERGED_SPANS; ++i) distances |= read[i].apart(moment);
                if (distances == 0) break;
                int missing = heads[0];
#pragma unroll
                for (int i = 1; i < MERGED_SPANS; ++i) {
                    if (read[i].apart(moment) != 0) missing = heads[i];
                }
                // Of the turn's first part: one place for all that need something of this part of its head.
                uint32_t state[2];
                wait_for_words(states + static_cast<int64_t>(missing + part) * 2, moment, state);
                spin_wait();  // it may be there before the values, and before the turn's other parts
            }
#pragma unroll
            for (int i = 0; i < MERGED_SPANS; ++i) merged[i].add(read[i], parts - part);
        }
        InputSpan spans[MERGED_SPANS];
#pragma unroll
        for (int i = 0; i < MERGED_SPANS; ++i) spans[i] = merged[i].finished();
        put_inputs(rows, place_of, count, spans);
    }
}

// Inputs first … first + count - 1 of what attention gives, to the rows.
__device__ __noinline__ void load_attended(
    const TileRows rows, Moment moment, int num_inputs, int first, int count) {
    const StepMemory& memory = step_memory();
#pragma unroll 1
    for (int token = 0; token < SEQUENCES; ++token) {
        const int parts = memory.attention.num_parts(memory.kv_lens[token]);
        if (parts > 1) {
            merge_parts(rows, token, parts, moment, first, count);
        } else {
            load_words(rows, memory.words.attended, moment, num_inputs, first, count, token, 1);
        }
    }
}
