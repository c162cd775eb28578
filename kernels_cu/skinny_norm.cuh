// The RMS norm of a product's inputs, in place, in the blocks' shared memory: NORM_INPUTS of
// skinny_parts.cuh. A block has the inputs of its own steps, of all tokens. It sums their squares,
// sends the sums to every block of its cluster, and rounds its inputs, normalised, to where they were.
#pragma once

#include "reduce.cuh"
#include "skinny_parts.cuh"

#if SKINNY_ON_TENSOR_CORES && NORM_INPUTS

struct SkinnyNorm {
    int ranks, rank, num_pairs;  // of tokens
    uint64_t* inbox;    // INBOX_HEAD bytes, then pairs of floats [ranks, TOKEN_PAIRS]: squares
    scalar_t* weights;  // [num_steps * K_STEP]: the norm's, of the block's inputs

    static __device__ __forceinline__ int inbox_bytes(int ranks) {
        return (INBOX_HEAD + ranks * TOKEN_PAIRS * 8 + 127) / 128 * 128;
    }
    __device__ __forceinline__ uint32_t expected_bytes() const { return ranks * num_pairs * 8; }

    // Start the copy of the norm's weights; what is not there becomes 0.
    template <typename Share>
    __device__ __forceinline__ void copy_weights(const Share& share) const {
        const SkinnyMatrix& matrix = share.matrix;
#pragma unroll 1
        for (int i = threadIdx.x; i < share.num_steps * PIECES; i += BLOCK_THREADS) {
            const int input = share.first_step * K_STEP + i * 8;
            const bool valid = input < matrix.num_inputs;
            cp_async_16_or_zero(weights + i * 8, matrix.norm_weight + (valid ? input : 0), valid);
        }
    }

    // inputs: [num_steps, INPUT_BYTES], there for the whole block, which must come. Another barrier
    // must follow before they are read.
    template <typename Share>
    __device__ __forceinline__ void normalize(const Share& share, unsigned char* inputs) const {
        constexpr int WARPS = BLOCK_THREADS / 32;
        const int num_pieces = share.num_steps * PIECES;
        const auto piece_of = [&](int token, int i) {
            return reinterpret_cast<scalar_t*>(
                inputs + i / PIECES * INPUT_BYTES + place(token, i % PIECES));
        };
#pragma unroll 1
        for (int pair = warp_id(); pair < num_pairs; pair += WARPS) {
            float squares[2] = {0.0f, 0.0f};
#pragma unroll 2
            for (int i = lane_id(); i < num_pieces; i += 32) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float values[8];
                    load_floats<scalar_t, 8>(piece_of(2 * pair + j, i), values);
#pragma unroll
                    for (int v = 0; v < 8; ++v) squares[j] += values[v] * values[v];
                }
            }
            squares[0] = warp_sum(squares[0]);
            squares[1] = warp_sum(squares[1]);
            const int offset = INBOX_HEAD + (rank * TOKEN_PAIRS + pair) * 8;
            if (lane_id() < ranks) {
                put_pair(ranks, inbox, lane_id(), offset, squares[0], squares[1]);
            }
        }
        if (ranks > 1) {
            wait_for_inbox(inbox);
        } else {
            warp_sync();  // a warp alone has its tokens' squares
        }

        const float* received = reinterpret_cast<const float*>(
            reinterpret_cast<const char*>(inbox) + INBOX_HEAD);
#pragma unroll 1
        for (int pair = warp_id(); pair < num_pairs; pair += WARPS) {
            float inverse[2] = {0.0f, 0.0f};
#pragma unroll 4
            for (int r = 0; r < ranks; ++r) {
                float squares[2];
                load_floats<float, 2>(received + (r * TOKEN_PAIRS + pair) * 2, squares);
                inverse[0] += squares[0];
                inverse[1] += squares[1];
            }
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                inverse[j] =
                    1.0f / sqrtf(inverse[j] / share.matrix.num_inputs + share.matrix.eps);
            }
#pragma unroll 2
            for (int i = lane_id(); i < num_pieces; i += 32) {
                float scales[8];
                load_floats<scalar_t, 8>(weights + i * 8, scales);
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    float values[8];
                    load_floats<scalar_t, 8>(piece_of(2 * pair + j, i), values);
#pragma unroll
                    for (int v = 0; v < 8; ++v) values[v] *= inverse[j] * scales[v];
                    store_floats<scalar_t, 8>(piece_of(2 * pair + j, i), values);
                }
            }
        }
    }
};

#endif  // SKINNY_ON_TENSOR_CORES && NORM_INPUTS
