// How a matrix of codes lies on the device, packed for the tensor cores, and what its codes mean.
//
// WEIGHT_KIND  0 int8, signed codes; 1 int4, codes 0 to 15; 2 fp8, e4m3 values
// GROUP        inputs that share a scale here: 16, 32, 64 or 128. Groups of more are repeated, others
//              are cut to the largest of these that divides them
//
// A strip is 16 rows, a chunk of it 128 inputs, and chunks lie one after the other along the inputs,
// then strips: [num_strips, num_chunks, CHUNK_BYTES]. So what a warp reads is one run of memory, and
// needs no rearranging: lane l = 4 * g + t finds in its 16 bytes the codes of rows g and g + 8 that
// are its operands of mma_m16n8k16. The order of inputs in a product is free; here lane t has, of
// every 32 inputs, 8 t … 8 t + 7, which are the first 4 of two operands and the last 4 of the same
// rows. Its inputs are then 16 bytes in a row, in their natural order.
//
// A chunk is
//   uint4 [CODE_VECTORS, 32 lanes]
//     int4: words (rows g, g + 8 of 32 inputs), and again of the next 32; of a word's 8 codes, code
//       2 i is nibble i and code 2 i + 1 nibble i + 4: a shift and a mask give two in two halves
//     8 bits: words of inputs 0 to 3 of row g, of row g + 8, then of inputs 4 to 7; codes 0, 2, 1, 3
//       in the bytes of a word, from the lowest
//   of each group, of rows 0, 8, 1, 9, … 7, 15: float scale, or with int4 two halves, scale and
//     offset, in units of the matrix's `unit`
// What is beyond the matrix, rows or inputs, may have any codes and finite scales.
#pragma once

#include "types.cuh"
#include "weight_copy.cuh"

#ifndef WEIGHT_KIND
#error "define WEIGHT_KIND: 0 int8, 1 int4, 2 fp8"
#endif
#ifndef GROUP
#define GROUP 128
#endif

constexpr int STRIP = 16;          // rows
constexpr int CHUNK = 128;         // inputs
constexpr int QUARTER = 32;        // inputs of a lane's 8 codes a row, times 4
constexpr int GROUPS = CHUNK / GROUP;
constexpr int CODE_VECTORS = WEIGHT_KIND == 1 ? 2 : 4;  // of 16 bytes, a lane
constexpr int CODE_BYTES = CODE_VECTORS * 512;
constexpr int SCALE_BYTES = GROUPS * STRIP * 4;
constexpr int CHUNK_BYTES = CODE_BYTES + SCALE_BYTES;

static_assert(GROUP == 16 || GROUP == 32 || GROUP == 64 || GROUP == 128, "GROUP");

// Where the scale of row `row` of a strip stands among the 16 of its group.
__device__ __forceinline__ int scale_place(int row) { return row % 8 * 2 + row / 8; }

// The bits that code `i` of a lane's 8 is moved by, in its word of a row: words 0 and, of 8-bit
// codes, 1.
__device__ __forceinline__ int code_word(int i) { return WEIGHT_KIND == 1 ? 0 : i / 4; }
__device__ __forceinline__ int code_shift(int i) {
    return WEIGHT_KIND == 1 ? i / 2 * 4 + i % 2 * 16 : i % 4 / 2 * 8 + i % 2 * 16;
}
// Of 32 inputs `quarter`, the vector and the word of it that has word `word` of the first or second
// row.
__device__ __forceinline__ int code_vector(int quarter) {
    return WEIGHT_KIND == 1 ? quarter / 2 : quarter;
}
__device__ __forceinline__ int word_of_vector(int quarter, int word, int second) {
    return (WEIGHT_KIND == 1 ? quarter % 2 : word) * 2 + second;
}

// The number that a code stands for, for any card.
__device__ __forceinline__ float code_value(uint32_t code) {
    if (WEIGHT_KIND == 1) return static_cast<float>(code & 15);
    if (WEIGHT_KIND == 0) return static_cast<float>(static_cast<int8_t>(code & 255));
    const uint32_t magnitude = code & 127;  // exponents 0 are subnormal, and would be flushed to 0
    const float value = magnitude < 8 ? magnitude * 0.001953125f
                                      : float_of((magnitude << 20) + (120u << 23));
    return code & 128 ? -value : value;
}

#if HAS_MMA && SCALAR != 0

// Numbers whose lowest bits count ones: 128 in bfloat16, 1024 in float16, twice.
template <typename T>
struct PairCodes;
template <>
struct PairCodes<bfloat_t> {
    static constexpr uint32_t ONES = 0x43004300u;
    // Of e4m3: to the bits of a bfloat16 2 ** 120 times smaller, and that number.
    static constexpr int SHIFT = 4;
    static constexpr uint32_t MASK = 0x07f007f0u, FACTOR = 0x7b807b80u;
    // What int4 codes are larger by as operands, left to the offset.
    static constexpr float BIAS = 128.0f;
};
template <>
struct PairCodes<half_t> {
    static constexpr uint32_t ONES = 0x64006400u;
    static constexpr int SHIFT = 1;
    static constexpr uint32_t MASK = 0x3f803f80u, FACTOR = 0x5c005c00u;
    static constexpr float BIAS = 0.0f;
};
constexpr float CODE_BIAS = WEIGHT_KIND == 1 ? PairCodes<scalar_t>::BIAS : 0.0f;

// Codes 2 i and 2 i + 1 of a lane's 8, from their word, as two values of scalar_t: exact.
__device__ __forceinline__ uint32_t code_pair(uint32_t word, int i) {
    typedef PairCodes<scalar_t> Pair;
    if constexpr (WEIGHT_KIND == 1) {
        const uint32_t bits = and_or(word >> (4 * i), 0x000f000fu, Pair::ONES);
        return Pair::BIAS != 0.0f ? bits : subtract_pairs<scalar_t>(bits, Pair::ONES);
    } else if constexpr (WEIGHT_KIND == 0) {
        if (i % 2) word >>= 8;
        // A byte is its low seven bits less 128 where the eighth is set.
        return subtract_pairs<scalar_t>(
            and_or(word, 0x007f007fu, Pair::ONES), and_or(word, 0x00800080u, Pair::ONES));
    } else {
        if (i % 2 == 0) word <<= 8;
        const uint32_t bits = and_or(word >> Pair::SHIFT, Pair::MASK, word & 0x80008000u);
        return multiply_pairs<scalar_t>(bits, Pair::FACTOR);
    }
}

// The codes of 32 inputs as operands of two products of 16. `vector`: that of code_vector(quarter).
__device__ __forceinline__ void code_operands(
    const uint4& vector, int quarter, uint32_t (&a)[2][4]) {
    const bool upper = WEIGHT_KIND == 1 && quarter % 2;
    const uint32_t first[2] = {upper ? vector.z : vector.x, WEIGHT_KIND == 1 ? 0 : vector.z};
    const uint32_t second[2] = {upper ? vector.w : vector.y, WEIGHT_KIND == 1 ? 0 : vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int word = code_word(2 * i);
        a[i / 2][i % 2 * 2] = code_pair(first[word], i);
        a[i / 2][i % 2 * 2 + 1] = code_pair(second[word], i);
    }
}

#endif  // HAS_MMA && SCALAR != 0
