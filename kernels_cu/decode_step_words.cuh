// What the blocks of a persistent decode step hand to each other, without ever meeting.
//
// A word is 8 bytes of memory: 4 of data (two values of 16 bits, or a float), and a flag that says of
// which moment of which step they are. It is written and read as one, so whoever reads it knows at
// once whether it is there: no barrier, no fence, and nobody waits for more than he needs. Whoever
// needs a value asks for its word until the flag is right.
//
// A buffer of words is written once a layer. That nobody still reads what is overwritten follows from
// the order of the parts of a layer: each needs all that the one before gives, so a block that has
// what it needs to write a buffer again knows that all others have done with it.
#pragma once

#include "decode_step_memory.cuh"

// A moment: a part of a layer, of a step. Zero is before all.
typedef uint32_t Moment;

__device__ __forceinline__ uint64_t word_of(uint32_t data, Moment moment) {
    return static_cast<uint64_t>(moment) << 32 | data;
}
// 0 where the word is of that moment.
__device__ __forceinline__ uint32_t distance(uint64_t word, Moment moment) {
    return static_cast<uint32_t>(word >> 32) ^ moment;
}
__device__ __forceinline__ bool is_of(uint64_t word, Moment moment) {
    return distance(word, moment) == 0;
}

// Two values; the pair's word.
__device__ __forceinline__ void store_pair(
    uint64_t* word, float first, float second, Moment moment) {
    store_word(word, word_of(pack_pair<scalar_t>(first, second), moment));
}
__device__ __forceinline__ void store_float(uint64_t* word, float x, Moment moment) {
    store_word(word, word_of(bits_of(x), moment));
}

// N words in a row, an even number, aligned to 16 bytes, all of one moment: whether they are there.
template <int N>
__device__ __forceinline__ bool try_words(
    const uint64_t* words, Moment moment, uint32_t (&data)[N]) {
    uint64_t found[N];
#pragma unroll
    for (int i = 0; i < N; i += 2) load_two_words(words + i, found[i], found[i + 1]);
    bool all = true;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        all = all && is_of(found[i], moment);
        data[i] = static_cast<uint32_t>(found[i]);
    }
    return all;
}
template <int N>
__device__ __forceinline__ void wait_for_words(
    const uint64_t* words, Moment moment, uint32_t (&data)[N]) {
    while (!try_words(words, moment, data)) spin_wait();
}
// The two values of a pair's data.
__device__ __forceinline__ void unpack_pair(uint32_t data, float (&out)[2]) {
    union {
        uint32_t bits;
        Vec<scalar_t, 2> values;
    } pair = {data};
    out[0] = to_float(pair.values.data[0]);
    out[1] = to_float(pair.values.data[1]);
}
