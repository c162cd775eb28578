// Sums of a persistent decode step whose weights are codes: int8, int4 or fp8, as packed.
//
// Codes become 16-bit numbers in registers, exactly. The products of a group are summed in float32 by
// themselves; then they meet the scales of its rows, and with int4 the sum of its inputs meets their
// offsets. These sums are made once for all rows, as the inputs come. The order of all sums is fixed.
#pragma once

#include "decode_step_memory.cuh"

// Chunk c of a stage is that of warp c % GROUP_WARPS of a group of warps. A warp takes some of its
// chunks at once, so that their sums wait for each other less.
constexpr int WARP_CHUNKS = STAGE_CHUNKS / GROUP_WARPS;
constexpr int CHUNKS_AT_ONCE = GROUP >= 64 ? 2 : 1;  // registers are short
constexpr int CHUNK_DISTANCE = GROUP_WARPS * CHUNK;  // inputs from a warp's chunk to its next
constexpr int CHUNK_DISTANCE_BYTES = GROUP_WARPS * CHUNK_BYTES;
constexpr int QUARTERS = CHUNK / QUARTER;
// A stage's chunks are read while those of the stage before are multiplied, where a warp takes all of a
// stage at once.
constexpr bool READS_AHEAD = CHUNKS_AT_ONCE == WARP_CHUNKS;
// Sums of a group that are added to in turn, so that they wait for each other less.
constexpr int CHAINS = GROUP >= 64 ? 2 : 1;

static_assert(STAGE_CHUNKS % GROUP_WARPS == 0, "as many chunks for every warp");
static_assert(WARP_CHUNKS % CHUNKS_AT_ONCE == 0, "all chunks in whole turns");

// Groups of 16 are the halves of a quarter, of lanes by t / 2: the other half's inputs are taken as 0.
constexpr int QUARTER_GROUPS = GROUP >= QUARTER ? 1 : QUARTER / GROUP;

__device__ __forceinline__ uint4 inputs_of_group(const uint4& inputs, int half) {
    if (QUARTER_GROUPS == 1) return inputs;
    const uint32_t mask = (lane_id() & 2) / 2 == half ? 0xffffffffu : 0u;
    return make_uint4(inputs.x & mask, inputs.y & mask, inputs.z & mask, inputs.w & mask);
}

// With int4, the sums of a tile's inputs by group lie behind its rows: [groups, SUM_TOKENS].
constexpr bool HAS_GROUP_SUMS = WEIGHT_KIND == 1;
constexpr int SUM_TOKENS = SEQUENCES <= 2 ? SEQUENCES : 4, SUM_PAIRS = (SUM_TOKENS + 1) / 2;

// What lane 4 g + t has of some chunks of weights: its vectors of codes, and the scales, with int4 scales
// and offsets, of rows g and g + 8 for every group.
struct ChunkCodes {
    uint4 codes[CHUNKS_AT_ONCE][CODE_VECTORS];
    uint2 scales[CHUNKS_AT_ONCE][GROUPS];

    // from: the first chunk in shared memory, of which `left` inputs exist: all of them where it is
    // WHOLE. What does not exist counts for nothing, and memory that was never written is not read.
    template <bool WHOLE>
    __device__ __forceinline__ void load(const unsigned char* from, int left) {
        if (WHOLE || left > (CHUNKS_AT_ONCE - 1) * CHUNK_DISTANCE) {
#pragma unroll
            for (int c = 0; c < CHUNKS_AT_ONCE; ++c) load_chunk(c, from);
        } else {
#pragma unroll
            for (int c = 0; c < CHUNKS_AT_ONCE; ++c) {
#pragma unroll
                for (int v = 0; v < CODE_VECTORS; ++v) codes[c][v] = make_uint4(0, 0, 0, 0);
#pragma unroll
                for (int i = 0; i < GROUPS; ++i) scales[c][i] = make_uint2(0, 0);
                if (c * CHUNK_DISTANCE < left) load_chunk(c, from);
            }
        }
    }
    __device__ __forceinline__ void load_chunk(int c, const unsigned char* from) {
        const unsigned char* chunk = from + c * CHUNK_DISTANCE_BYTES;
#pragma unroll
        for (int v = 0; v < CODE_VECTORS; ++v) {
            codes[c][v] = ld_shared_16(chunk + v * 512 + lane_id() * 16);
        }
#pragma unroll
        for (int i = 0; i < GROUPS; ++i) {
            scales[c][i] =
                ld_shared_8(chunk + CODE_BYTES + i * (STRIP * 4) + lane_id() / 4 * 8);
        }
    }
};

// What it has of their inputs: of every quarter the inputs 8 t … 8 t + 7 of the token that is column g
// of products, and with int4 the sums of groups, of tokens 2 t and 2 t + 1.
struct ChunkInputs {
    uint4 inputs[CHUNKS_AT_ONCE][QUARTERS];
    float added[CHUNKS_AT_ONCE][GROUPS][2];

    // first: of this lane's token, input 8 t of the first chunk, from which on `left` inputs of the tile
    // exist, a multiple of 32; first_sums: of its groups.
    template <bool WHOLE>
    __device__ __forceinline__ void load(const scalar_t* first, const float* first_sums, int left) {
        if (WHOLE || left >= (CHUNKS_AT_ONCE - 1) * CHUNK_DISTANCE + CHUNK) {
#pragma unroll
            for (int c = 0; c < CHUNKS_AT_ONCE; ++c) {
                load_sums(c, first_sums);
#pragma unroll
                for (int q = 0; q < QUARTERS; ++q) {
                    inputs[c][q] = ld_shared_16(first + c * CHUNK_DISTANCE + q * QUARTER);
                }
            }
        } else {
#pragma unroll
            for (int c = 0; c < CHUNKS_AT_ONCE; ++c) {
#pragma unroll
                for (int i = 0; i < GROUPS; ++i) added[c][i][0] = added[c][i][1] = 0.0f;
                if (c * CHUNK_DISTANCE < left) load_sums(c, first_sums);
#pragma unroll
                for (int q = 0; q < QUARTERS; ++q) {
                    const int k = c * CHUNK_DISTANCE + q * QUARTER;
                    inputs[c][q] = make_uint4(0, 0, 0, 0);
                    if (k < left) inputs[c][q] = ld_shared_16(first + k);
                }
            }
        }
    }
    __device__ __forceinline__ void load_sums(int c, const float* first_sums) {
        if constexpr (HAS_GROUP_SUMS) {
#pragma unroll
            for (int i = 0; i < GROUPS; ++i) {
                const float* from = first_sums + (c * (CHUNK_DISTANCE / GROUP) + i) * SUM_TOKENS;
                if constexpr (SUM_TOKENS == 1) {
                    added[c][i][0] = *from;
                } else {
                    // Of lanes whose tokens do not exist it does not matter.
                    load_floats<float, 2>(from + lane_id() % SUM_PAIRS * 2, added[c][i]);
                }
            }
        }
    }
};

// Their products.
struct ChunkProduct {
    // Added to sums 0 and 1 of row g, of tokens 2 t and 2 t + 1, and to 2 and 3 of row g + 8.
    static __device__ __forceinline__ void multiply(
        float (&sums)[4], const ChunkCodes& weights, const ChunkInputs& values) {
        float group[CHAINS][CHUNKS_AT_ONCE][4];
        clear(group);
#pragma unroll
        for (int q = 0; q < QUARTERS; ++q) {
            uint32_t a[CHUNKS_AT_ONCE][2][4];
#pragma unroll
            for (int c = 0; c < CHUNKS_AT_ONCE; ++c) {
                code_operands(weights.codes[c][code_vector(q)], q, a[c]);
            }
#pragma unroll
            for (int half = 0; half < QUARTER_GROUPS; ++half) {
#pragma unroll
                for (int n = 0; n < 2; ++n) {
#pragma unroll
                    for (int c = 0; c < CHUNKS_AT_ONCE; ++c) {
                        const uint4 b = inputs_of_group(values.inputs[c][q], half);
                        const uint32_t low = n == 0 ? b.x : b.z, high = n == 0 ? b.y : b.w;
                        mma_m16n8k16<scalar_t>(group[n % CHAINS][c], a[c][n], low, high);
                    }
                }
                if ((q + 1) * QUARTER % GROUP != 0) continue;
#pragma unroll
                for (int c = 0; c < CHUNKS_AT_ONCE; ++c) {
                    const int number = q * QUARTER / GROUP + half;
                    if (CHAINS == 2) {
#pragma unroll
                        for (int i = 0; i < 4; ++i) group[0][c][i] += group[CHAINS - 1][c][i];
                    }
                    add_group(sums, group[0][c], values.added[c][number],
                              weights.scales[c][number]);
                }
                clear(group);
            }
        }
    }
    static __device__ __forceinline__ void clear(float (&sums)[CHAINS][CHUNKS_AT_ONCE][4]) {
#pragma unroll
        for (int chain = 0; chain < CHAINS; ++chain) {
#pragma unroll
            for (int c = 0; c < CHUNKS_AT_ONCE; ++c) {
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[chain][c][i] = 0.0f;
            }
        }
    }
    static __device__ __forceinline__ void add_group(
        float (&sums)[4], const float (&group)[4], const float (&added)[2], const uint2& words) {
        union {
            uint2 words;
            Vec<half_t, 4> halves;
            Vec<float, 2> floats;
        } read;
        read.words = words;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i % 2 >= SEQUENCES) continue;
            if constexpr (WEIGHT_KIND == 1) {
                const float scale = to_float(read.halves.data[i / 2 * 2]);
                const float offset =
                    fmaf(-CODE_BIAS, scale, to_float(read.halves.data[i / 2 * 2 + 1]));
                sums[i] = fmaf(scale, group[i], sums[i]);
                sums[i] = fmaf(offset, added[i % 2], sums[i]);
            } else {
                sums[i] = fmaf(read.floats.data[i / 2], group[i], sums[i]);
            }
        }
    }
};

// Add this warp's sums of a strip to `to` [SEQUENCES, STRIP], or store them there.
__device__ __forceinline__ void put_strip_sums(float* to, const float (&sums)[4], bool adds) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int token = lane_id() % 4 * 2 + i % 2;
        if (i % 2 >= SEQUENCES || token >= SEQUENCES) continue;
        float* own = to + token * STRIP + lane_id() / 4 + i / 2 * 8;
        *own = adds ? *own + sums[i] : sums[i];
    }
}

// Where a warp is among the units and stages of a product: at every second stage of the ring.
struct UnitStage {
    int unit = 0, stage = 0;

    // `stages` of a unit. Without a branch, as all that the loop below does besides products costs as
    // much time as these.
    __device__ __forceinline__ UnitStage next(int stages) const {
        const int beyond = stage + 2 - stages;
        UnitStage found;
        found.unit = unit + (beyond < 0 ? 0 : stages == 1 ? 2 : 1);
        found.stage = beyond < 0 ? stage + 2 : stages == 1 ? 0 : beyond;
        return found;
    }
};

// See sum_units; WHOLE: the tile's inputs fill all their stages.
template <bool WHOLE>
__device__ __forceinline__ void sum_own_stages(
    const RingPlace& place, int units, int num_inputs, const scalar_t* inputs,
    const float* group_sums, float* partials, bool adds) {
    StepMemory& memory = step_memory();
    const int stages = (num_inputs + STAGE_INPUTS - 1) / STAGE_INPUTS, total = units * stages;
    const int group = warp_id() / GROUP_WARPS, warp = warp_id() % GROUP_WARPS;
    if (group >= total) return;
    RingPlace own = place;
    UnitStage at;
    if (group > 0) {
        own.next();
        at.unit = stages == 1 ? 1 : 0;
        at.stage = stages == 1 ? 0 : 1;
    }
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    // Turn `turn` of a warp's in a stage: its first chunk, and that one's first input.
    const auto chunk_of = [&](int turn) { return warp + turn * CHUNKS_AT_ONCE * GROUP_WARPS; };
    const auto load_codes = [&](ChunkCodes& weights, int stage, int turn) {
        const int chunk = chunk_of(turn), k = stage * STAGE_INPUTS + chunk * CHUNK;
        weights.load<WHOLE>(memory.stages[own.stage] + chunk * CHUNK_BYTES, num_inputs - k);
    };
    const auto load_inputs = [&](ChunkInputs& values, int stage, int turn) {
        const int k = stage * STAGE_INPUTS + chunk_of(turn) * CHUNK;
        const int first = stage * (STAGE_INPUTS / GROUP) + chunk_of(turn) * GROUPS;
        values.load<WHOLE>(inputs + k, group_sums + first * SUM_TOKENS, num_inputs - k);
    };
    const auto wait = [&] { mbarrier_wait(&memory.is_full[own.stage], own.phase); };
    const auto leave = [&] {
        mbarrier_arrive_warp(&memory.is_free[own.stage]);
        own.next_two();
    };
    // The stage's products are in the sums; `next` is not of its unit: this one has all of its sums.
    const auto go_to = [&](const UnitStage& next) {
        if (next.unit != at.unit) {
            put_strip_sums(
                partials + (at.unit * USER_WARPS + warp_id()) * (SEQUENCES * STRIP), sums, adds);
#pragma unroll
            for (int n = 0; n < 4; ++n) sums[n] = 0.0f;
        }
        at = next;
    };
    if constexpr (READS_AHEAD) {
        ChunkCodes weights, ahead;
        ChunkInputs values;
        wait();
        load_codes(weights, at.stage, 0);
#pragma unroll (WHOLE ? 2 : 1)  // so that codes read ahead need not go to other registers
        for (int i = group + 2; i < total; i += 2) {
            const UnitStage next = at.next(stages);
            leave();  // it was read a turn ago, and nothing is left to wait for
            load_inputs(values, at.stage, 0);
            wait();
            load_codes(ahead, next.stage, 0);
            warp_sync();  // reading begins here: not behind the products, where it would be waited for
            ChunkProduct::multiply(sums, weights, values);
            go_to(next);
            weights = ahead;
        }
        leave();
        load_inputs(values, at.stage, 0);
        ChunkProduct::multiply(sums, weights, values);
        go_to(at.next(stages));
    } else {
#pragma unroll 1
        for (int i = group; i < total; i += 2) {
            wait();
#pragma unroll 1
            for (int turn = 0; turn < WARP_CHUNKS / CHUNKS_AT_ONCE; ++turn) {
                ChunkCodes weights;
                ChunkInputs values;
                load_codes(weights, at.stage, turn);
                load_inputs(values, at.stage, turn);
                ChunkProduct::multiply(sums, weights, values);
            }
            leave();
            go_to(at.next(stages));
        }
    }
}

// The sums of some units and a tile of inputs, each warp's own, to `partials` [units, USER_WARPS,
// SEQUENCES, UNIT_ROWS], or added to what is there. inputs: of this lane's token, from input 8 t of
// the tile on; group_sums: of the tile. Where a unit has one stage, only the warps of its group have
// sums of it: the first ones' of the first unit, the others' of the second, and so on.
__device__ __forceinline__ void sum_units(
    const RingPlace& place, int units, int num_inputs, const scalar_t* inputs,
    const float* group_sums, float* partials, bool adds) {
    if (num_inputs % STAGE_INPUTS == 0) {
        sum_own_stages<true>(place, units, num_inputs, inputs, group_sums, partials, adds);
    } else {
        sum_own_stages<false>(place, units, num_inputs, inputs, group_sums, partials, adds);
    }
}
