// Matrices of codes between their forms: packed for quantized.cu, once, when they are loaded; unpacked
// to 16 or 32 bits for batches that cuBLAS takes; random ones for benches; and inputs in the order in
// which such a matrix has its columns.
#include "philox.cuh"
#include "quantized_format.cuh"

// The strip and chunk of this warp, and whether there are any.
struct PackPlace {
    int64_t strip;
    int chunk, num_chunks;
    bool exists;

    __device__ __forceinline__ PackPlace(int num_strips, int num_inputs) {
        num_chunks = (num_inputs + CHUNK - 1) / CHUNK;
        const int64_t index = static_cast<int64_t>(blockIdx.x) * num_warps() + warp_id();
        strip = index / num_chunks;
        chunk = static_cast<int>(index - strip * num_chunks);
        exists = strip < num_strips;
    }
    __device__ __forceinline__ int64_t offset() const {
        return (strip * num_chunks + chunk) * CHUNK_BYTES;
    }
};

// pack_quantized: rows of codes, scales and offsets to the packed form
// grid: num_rows / 16 up * K / 128 up / warps of a block, up; block any multiple of 32
// codes    uint8 [num_rows, K], with int4 [num_rows, K / 2]: as nanocupy.quantized.QuantizedMatrix
// scales   float [num_rows, K / group_size]
// offsets  float, as scales, with int4; else null
// packed   [num_rows / 16 up, K / 128 up, CHUNK_BYTES]; what is beyond rows or K gets code 0
// group_size  a multiple of GROUP, or K; inverse_unit: scales and offsets are stored times this
// K even. The rows are in the order of the strips: for SwiGLU 8 of gate, 8 of up in turn.
// REF: numpy_ops.norm_linear, whose weight it is; a test unpacks it
// COST: reads and writes a byte a code, or half of one
extern "C" __global__ void __launch_bounds__(256) pack_quantized(
    const uint8_t* codes, const float* scales, const float* offsets, uint8_t* packed,
    float inverse_unit, int32_t num_rows, int32_t K, int32_t group_size) {
    grid_dependency_wait();
    grid_dependency_launch();
    const PackPlace place((num_rows + STRIP - 1) / STRIP, K);
    if (!place.exists) return;
    uint8_t* const to = packed + place.offset();
    const int g = lane_id() / 4, t = lane_id() % 4;
    const int64_t first_row = place.strip * STRIP;
    const auto row_of = [&](int r) { return min(first_row + r, static_cast<int64_t>(num_rows - 1)); };
    for (int q = 0; q < CHUNK / QUARTER; ++q) {
        const int first = place.chunk * CHUNK + q * QUARTER + t * 8;
        for (int second = 0; second < 2; ++second) {
            const int64_t row = row_of(g + second * 8);
            uint32_t words[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int k = first + i;
                uint32_t code = 0;
                if (k < K && WEIGHT_KIND == 1) code = codes[row * (K / 2) + k / 2] >> k % 2 * 4 & 15;
                if (k < K && WEIGHT_KIND != 1) code = codes[row * K + k];
                words[code_word(i)] |= code << code_shift(i);
            }
#pragma unroll
            for (int w = 0; w < (WEIGHT_KIND == 1 ? 1 : 2); ++w) {
                uint32_t* vector =
                    reinterpret_cast<uint32_t*>(to + code_vector(q) * 512 + lane_id() * 16);
                vector[word_of_vector(q, w, second)] = words[w];
            }
        }
    }
    for (int i = lane_id(); i < GROUPS * STRIP; i += 32) {
        const int row = i % STRIP, k = place.chunk * CHUNK + i / STRIP * GROUP;
        float scale = 0.0f, offset = 0.0f;
        if (k < K) {
            const int64_t from = row_of(row) * (K / group_size) + k / group_size;
            scale = scales[from];
            if (WEIGHT_KIND == 1) offset = offsets[from];
        }
        uint32_t* word =
            reinterpret_cast<uint32_t*>(to + CODE_BYTES) + i / STRIP * STRIP + scale_place(row);
        if (WEIGHT_KIND == 1) {
            *word = pack_pair<half_t>(scale * inverse_unit, offset * inverse_unit);
        } else {
            *word = bits_of(scale * inverse_unit);
        }
    }
}

// dequantize_rows: a packed matrix as scalar_t, each weight rounded once
// grid: strips * K / 128 up / warps of a block, up; block any multiple of 32
// packed  [strips, K / 128 up, CHUNK_BYTES]
// order   int32 [K]: the input of each column; or null: k itself
// out     scalar_t [R, K]; strips = R / 16 up, or with pairs (gate, then up) R / 16 with R / 2 up to 8s
// unit    of scales and offsets
// K a multiple of 8; out aligned to 16 bytes.
// REF: numpy_ops.norm_linear, whose weight it is
// COST: the packed bytes read, R * K * sizeof(scalar_t) written
extern "C" __global__ void __launch_bounds__(256) dequantize_rows(
    const uint8_t* packed, const int32_t* order, scalar_t* out, float unit, int32_t R, int32_t K,
    int32_t pairs) {
    grid_dependency_wait();
    grid_dependency_launch();
    const int half = R / 2;
    const PackPlace place(pairs ? (half + 7) / 8 : (R + STRIP - 1) / STRIP, K);
    if (!place.exists) return;
    const uint8_t* const from = packed + place.offset();
    const int g = lane_id() / 4, t = lane_id() % 4;
    for (int q = 0; q < CHUNK / QUARTER; ++q) {
        const int first = q * QUARTER + t * 8, k = place.chunk * CHUNK + first;
        if (k >= K) break;
        const uint32_t* vector =
            reinterpret_cast<const uint32_t*>(from + code_vector(q) * 512 + lane_id() * 16);
        for (int second = 0; second < 2; ++second) {
            const int64_t output = pairs ? place.strip * 8 + g : place.strip * STRIP + g + second * 8;
            if (output >= (pairs ? half : R)) continue;
            const int64_t row = pairs && second ? half + output : output;
            // Eight inputs in a row share a scale.
            const uint8_t* scale = from + CODE_BYTES + first / GROUP * (STRIP * 4) +
                                   scale_place(g + second * 8) * 4;
            float pair[2] = {0.0f, 0.0f};
            if constexpr (WEIGHT_KIND == 1) {
                load_floats<half_t, 2>(reinterpret_cast<const half_t*>(scale), pair);
            } else {
                pair[0] = *reinterpret_cast<const float*>(scale);
            }
            float values[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const uint32_t word = vector[word_of_vector(q, code_word(i), second)];
                values[i] = (pair[0] * code_value(word >> code_shift(i)) + pair[1]) * unit;
            }
            if (order != nullptr) {
                for (int i = 0; i < 8; ++i) {
                    out[row * K + order[k + i]] = from_float<scalar_t>(values[i]);
                }
                continue;
            }
            constexpr int N = Wide<scalar_t>::N;
#pragma unroll
            for (int i = 0; i < 8; i += N) {
                float piece[N];
#pragma unroll
                for (int j = 0; j < N; ++j) piece[j] = values[i + j];
                store_floats<scalar_t, N>(out + row * K + k + i, piece);
            }
        }
    }
}

// fill_quantized: a packed matrix of random codes, each as likely, under equal scales
// grid ceil(n / block) or fewer, block any multiple of 32
// packed      uint8 [16 * n], whole chunks
// scale_word  of every row and group: the bits of a float, or with int4 of two halves
// seed        the same gives the same codes. fp8 values are below 2.
// REF: philox of ops.philox; a test computes it
// COST: 16 * n bytes written; a Philox call for each 16
extern "C" __global__ void __launch_bounds__(1024) fill_quantized(
    uint8_t* packed, int64_t n, uint32_t scale_word, uint64_t seed) {
    grid_dependency_wait();
    grid_dependency_launch();
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
         i += stride) {
        PhiloxWords words;
        if (i * 16 % CHUNK_BYTES >= CODE_BYTES) {
            for (int w = 0; w < 4; ++w) words.word[w] = scale_word;
        } else {
            words.word[0] = static_cast<uint32_t>(i);
            words.word[1] = static_cast<uint32_t>(i >> 32);
            words.word[2] = words.word[3] = 0;
            words = philox4x32(words, seed);
            for (int w = 0; w < 4; ++w) {
                if (WEIGHT_KIND == 2) words.word[w] &= 0xbfbfbfbfu;
            }
        }
        reinterpret_cast<uint4*>(packed)[i] =
            make_uint4(words.word[0], words.word[1], words.word[2], words.word[3]);
    }
}

// gather_inputs: out[r, k] = x[r, order[k]]
// grid: num_rows, block any multiple of 32
// x      scalar_t [num_rows, K]
// order  int32 [K], each in [0, K)
// out    scalar_t [num_rows, K], no part of x
// REF: numpy_ops.linear_add, of a weight with an order of inputs
// COST: num_rows * K * (2 * sizeof(scalar_t) + 4) bytes
extern "C" __global__ void __launch_bounds__(1024) gather_inputs(
    const scalar_t* x, const int32_t* order, scalar_t* out, int32_t K) {
    grid_dependency_wait();
    grid_dependency_launch();
    const int64_t first = static_cast<int64_t>(blockIdx.x) * K;
    for (int k = threadIdx.x; k < K; k += blockDim.x) out[first + k] = x[first + order[k]];
}
