// Decode attention on tensor cores over a quantised cache: what a warp does with 16 positions.
//
// A stage holds the codes of keys, those of values, and the scales of both. A product takes its inputs
// in any order that both sides have, so that codes go to the registers four at a time, as they are
// read, and are widened there: of each 16 values of a head the even ones come first, then the odd.
// Keys' scales are multiplied into the scores, values' into the weights.
#pragma once

#include "attention_decode_mma.cuh"
#include "codes.cuh"

#if defined(DECODE_ON_TENSOR_CORES) && QUANTIZED

constexpr int CODE_CHUNKS = HEAD_SIZE / 16;  // 16 bytes each, of a row
constexpr bool CODES_SWIZZLED = CODE_CHUNKS % 8 == 0;
constexpr int CODE_STRIDE = (CODES_SWIZZLED ? CODE_CHUNKS : CODE_CHUNKS | 1) * 16;  // bytes
constexpr int TILE = STEP_TOKENS * CODE_STRIDE / 2;  // of keys, counted in scalar_t as all is here
constexpr int STAGE = 2 * TILE + 2 * STEP_TOKENS;
constexpr int RING = STAGES * STAGE;  // of a warp, at least

// Where a tile has 16 codes of a row, in bytes.
__device__ __forceinline__ int codes_at(int row, int chunk) {
    return row * CODE_STRIDE + (CODES_SWIZZLED ? chunk ^ (row & 7) : chunk) * 16;
}

// Brings positions into stages. Codes are copied; scales are of 2 bytes, which a copy cannot bring, so
// each lane loads one and stores it when the next step's copies are started. So a step's are there for
// the warp after a warp_sync that comes behind that start, or behind finish().
struct CodeCopies {
    const cache_t *key_cache, *value_cache;
    const scale_t* scales;          // of keys in lanes 0 to 15, of values in the others
    scale_t* place = nullptr;       // where the scale that is on its way shall be
    scale_t scale;

    // Start to copy keys and values of 16 positions, `left` of them there, into `stage`; the others
    // become zeros. `row`: of the cache, of position lane % 16. The whole warp must come.
    __device__ __forceinline__ void start(scalar_t* stage, uint32_t row, int left) {
        unsigned char* keys = reinterpret_cast<unsigned char*>(stage);
#pragma unroll
        for (int i = 0; i < (STEP_TOKENS * CODE_CHUNKS + WARP_SIZE - 1) / WARP_SIZE; ++i) {
            const int index = i * WARP_SIZE + lane_id();
            const int token = index / CODE_CHUNKS % STEP_TOKENS, chunk = index % CODE_CHUNKS;
            const int64_t from_row = shuffle(row, token);
            if (STEP_TOKENS * CODE_CHUNKS % WARP_SIZE != 0 && index >= STEP_TOKENS * CODE_CHUNKS) {
                continue;
            }
            const int64_t from = from_row * HEAD_SIZE + chunk * 16;
            const int to = codes_at(token, chunk);
            cp_async_16_or_zero(keys + to, key_cache + from, token < left);
            cp_async_16_or_zero(keys + 2 * TILE + to, value_cache + from, token < left);
        }
        finish();
        const int token = lane_id() % STEP_TOKENS, kind = lane_id() / STEP_TOKENS;
        place = place_of(stage, token, kind);
        scale = from_float<scale_t>(0.0f);
        if (token < left) scale = scales[row];
    }

    // Where a stage has the scale of a position's key (kind 0) or value (1). Lanes of attend() read
    // theirs at once: those of keys 2t, 2t + 1, 2t + 8, 2t + 9, then those of the values.
    static __device__ __forceinline__ scale_t* place_of(scalar_t* stage, int token, int kind) {
        return reinterpret_cast<scale_t*>(stage + 2 * TILE) + token % 8 / 2 * 8 + kind * 4 +
               token / 8 * 2 + token % 2;
    }

    // The scale that is on its way goes to its stage.
    __device__ __forceinline__ void finish() {
        if (place != nullptr) *place = scale;
        place = nullptr;
    }
};

// 16 values of a query, 8 in each register, to where a product with codes wants them.
__device__ __forceinline__ void sort_even_odd(uint4& low, uint4& high) {
    const uint4 a = low, b = high;
    low = make_uint4(pick_bytes<0x5410>(a.x, a.y), pick_bytes<0x5410>(a.z, a.w),
                     pick_bytes<0x5410>(b.x, b.y), pick_bytes<0x5410>(b.z, b.w));
    high = make_uint4(pick_bytes<0x7632>(a.x, a.y), pick_bytes<0x7632>(a.z, a.w),
                      pick_bytes<0x7632>(b.x, b.y), pick_bytes<0x7632>(b.z, b.w));
}

// Where column `column` of chunk `chunk` of sorted values is in a head.
__device__ __forceinline__ int sorted_column(int chunk, int column) {
    return chunk / 2 * 16 + column * 2 + chunk % 2;
}

// MmaRows over codes: its queries are sorted, and so are its sums, until they are stored.
template <int TILES, int HALVES = 2>
struct CodeRows : MmaRows<TILES, HALVES> {
    ValueUnit unit;

    // As MmaRows::attend, of a stage of CodeCopies.
    __device__ __forceinline__ void attend(
        const scalar_t* stage, int position, bool masked, float scale_log2) {
        // Lanes 0-7, 8-15, 16-23, 24-31 name the rows of four matrices of 8 rows and 16 codes: row
        // half first, then chunk.
        const int row = lane_id() % 16, high = lane_id() / 16;
        const unsigned char* keys = reinterpret_cast<const unsigned char*>(stage);
        const unsigned char* values = keys + 2 * TILE;
        const Vec<scale_t, 8> steps = load_vec<scale_t, 8>(
            reinterpret_cast<const scale_t*>(stage + 2 * TILE) + lane_id() % 4 * 8);
        float scores[TILES][2][4] = {};
#pragma unroll
        for (int k = 0; k < K_STEPS; k += 2) {
            uint32_t codes[4];
            ldmatrix_x4(codes, keys + codes_at(row, min(k + high, K_STEPS - 1)));
#pragma unroll
            for (int j = 0; j < 2 && k + j < K_STEPS; ++j) {
                uint32_t even[2], odd[2];
                widen(codes[2 * j], even[0], odd[0]);
                widen(codes[2 * j + 1], even[1], odd[1]);
#pragma unroll
                for (int m = 0; m < TILES; ++m) {
                    if (!this->QUERIES_STAY) this->load_queries(m, k + j, 0);
                    const uint32_t(&a)[4] = this->queries[m][this->QUERIES_STAY ? k + j : 0];
                    mma_m16n8k16<scalar_t>(scores[m][0], a, even[0], odd[0]);
                    mma_m16n8k16<scalar_t>(scores[m][1], a, even[1], odd[1]);
                }
            }
        }

        // Of this lane's four positions; scores are scaled, weights are in the unit of all values.
        float key_steps[4], value_steps[4], raised = 1.0f;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            key_steps[i] = to_float(steps.data[i]) * scale_log2;
            value_steps[i] = to_float(steps.data[4 + i]);
        }
        if (ValueUnit::NEEDED) {
            // Their order is that of their bits, in which a NaN comes last.
            uint32_t largest = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) largest = max(largest, bits_of(value_steps[i]));
            largest = max(largest, shuffle_xor(largest, 1));
            largest = max(largest, shuffle_xor(largest, 2));
            raised = unit.raise(float_of(largest));
#pragma unroll
            for (int i = 0; i < 4; ++i) value_steps[i] *= unit.inverse();
        }
        uint32_t weights[TILES][4] = {};
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
#pragma unroll
            for (int h = 0; h < HALVES; ++h) {
                float own[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    own[i] = scores[m][i / 2][h * 2 + i % 2] * key_steps[i];
                    if (masked) {
                        const int column = i / 2 * 8 + lane_id() % 4 * 2 + i % 2;
                        if (position + column > this->limit[m][h]) own[i] = -infinity();
                    }
                }
                float highest = fmaxf(fmaxf(own[0], own[1]), fmaxf(own[2], own[3]));
                highest = warp_max<4>(highest);
                const float factor = softmax_raise(this->state[m][h], highest) * raised;
#pragma unroll
                for (int n = 0; n < HEAD_SIZE / 8; ++n) {
                    this->summed[m][n][h * 2] *= factor;
                    this->summed[m][n][h * 2 + 1] *= factor;
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    own[i] = softmax_weight(own[i], this->state[m][h].max);
                    this->state[m][h].sum += own[i];
                    own[i] *= value_steps[i];
                }
                weights[m][h] = pack_pair<scalar_t>(own[0], own[1]);
                weights[m][2 + h] = pack_pair<scalar_t>(own[2], own[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < K_STEPS; n += 2) {
            uint32_t codes[4];
            ldmatrix_x4_trans(codes, values + codes_at(row, min(n + high, K_STEPS - 1)));
#pragma unroll
            for (int j = 0; j < 2 && n + j < K_STEPS; ++j) {
                uint32_t even[2], odd[2];
                widen(codes[2 * j], even[0], odd[0]);
                widen(codes[2 * j + 1], even[1], odd[1]);
#pragma unroll
                for (int m = 0; m < TILES; ++m) {
                    auto* sums = this->summed[m] + 2 * (n + j);
                    this->add_product(sums[0], weights[m], even[0], even[1]);
                    this->add_product(sums[1], weights[m], odd[0], odd[1]);
                }
            }
        }
    }

    // As MmaRows::finish; the sums leave their unit.
    __device__ __forceinline__ void finish() {
        MmaRows<TILES, HALVES>::finish();
        const float factor = ValueUnit::NEEDED ? unit.value() : 1.0f;
#pragma unroll
        for (int m = 0; m < TILES; ++m)
#pragma unroll
            for (int n = 0; n < HEAD_SIZE / 8; ++n)
#pragma unroll
                for (int i = 0; i < 2 * HALVES; ++i) this->summed[m][n][i] *= factor;
    }
};

#endif
