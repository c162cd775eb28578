// What becomes of the sums of a tile of wide.cuh, a part of it: they go through shared memory, from
// the order of tensor cores to that of rows of the output, and where a cluster shares the inputs, to
// the block that adds them up. Then bias, residual, SwiGLU and roundings, as in epilogues.cuh.
#pragma once

#include "wide_epilogues.cuh"

// The sums of all splits of a tile on their way to who finishes them: group g of 8 tokens is finished by
// split g % splits, as its group g / splits. First they are laid out by who finishes them, then each warp
// has its part of them copied there, as one piece for each of the other splits. A block's memory,
// behind the barriers:
//   float [splits to, OUT_TILE / 16, slots, 2, 8, 8]        its own sums
//   float [splits - 1 from, OUT_TILE / 16, slots, 2, 8, 8]  what the other splits send it
// that is for each 16 rows and each group of tokens two halves of 8 rows, tokens in the order 0, 2, 4, 6,
// 1, 3, 5, 7, and the rows of one: no bank is asked twice, by writes or by reads.
struct WideMerge {
    static constexpr int GROUP_BYTES = 16 * 8 * 4;   // of 16 rows and 8 tokens
    static constexpr int HALF_BYTES = 8 * 8 * 4;
    static constexpr int SUMS_BYTES = OUT_TILE * TOKENS * 4;

    int log2_splits, split;  // blocks of the tile, and which this is
    int share;               // of the cluster's tiles
    int num_groups;          // that have a token
    unsigned char* sums;
    uint64_t* inbox;         // counts what the other splits send

    __device__ __forceinline__ int splits() const { return 1 << log2_splits; }
    // Groups that a split has room for; there are as many as splits, or a multiple.
    __device__ __forceinline__ int slots() const { return TOKENS / 8 >> log2_splits; }
    // Of the groups before `group`, how many `to` finishes.
    __device__ __forceinline__ int slot_of(int group, int to) const {
        return (group - to + splits() - 1) >> log2_splits;
    }
    __device__ __forceinline__ uint32_t expected_bytes() const {
        return (splits() - 1) * slot_of(num_groups, split) * (OUT_TILE / 16) * GROUP_BYTES;
    }
    // Of 16 rows and a group of tokens: bytes behind those of a split.
    __device__ __forceinline__ int place(int rows, int slot) const {
        return (rows * slots() + slot) * GROUP_BYTES;
    }
    // Own sums that `to` finishes.
    __device__ __forceinline__ unsigned char* own(int to) const {
        return sums + to * (SUMS_BYTES >> log2_splits);
    }
    // Where `to` receives sums of split `from`, another.
    __device__ __forceinline__ unsigned char* received(int from, int to) const {
        return own(splits() + from - (from > to));
    }

    // By a warp: of 16 rows and all tokens from group first_group on, to the block's memory.
    __device__ __forceinline__ void lay_out(
        int rows, int first_group, const float (&values)[PART_TOKENS / 8][4]) const {
        const int word = lane_id() % 4 * 8 + lane_id() / 4;
        float* const to = reinterpret_cast<float*>(sums + place(rows, 0)) + word;
        const int to_next = SUMS_BYTES / 4 >> log2_splits;
#pragma unroll
        for (int n = 0; n < PART_TOKENS / 8; ++n) {
            const int group = first_group + n;
            if (group < num_groups) {
                float* const at = to + (group & (splits() - 1)) * to_next +
                                  (group >> log2_splits) * (GROUP_BYTES / 4);
#pragma unroll
                for (int i = 0; i < 4; ++i) at[i * 32] = values[n][i];
            }
        }
    }

    // By one thread of the warp, when all of it have laid out and made that seen by copies, and all
    // blocks have left their rings.
    __device__ __forceinline__ void send(int rows, int first_group) const {
        const int end_group = min(first_group + PART_TOKENS / 8, num_groups);
#pragma unroll 1
        for (int i = 1; i < splits(); ++i) {
            const int to = (split + i) & (splits() - 1);  // not all to the same at once
            const int first = slot_of(first_group, to), count = slot_of(end_group, to) - first;
            if (count > 0) {
                copy_to_rank(
                    received(split, to) + place(rows, first), own(to) + place(rows, first),
                    count * GROUP_BYTES, inbox, to * SHARERS + share);
            }
        }
    }
};

// What a thread finishes: eight outputs side by side, always the same, of every so many-th token that
// the block finishes. AT_ONCE tokens are worked on together; what the first ones are added to is asked
// for while the sums of other blocks are on their way.
template <bool PAIRS, typename Epilogue>
struct WideFinish {
    static constexpr int OUTPUTS = PAIRS ? OUT_TILE / 2 : OUT_TILE;  // of a tile
    static constexpr int ROWS = OUTPUTS / 16;                        // of sixteen
    static constexpr int STEP = COMPUTE_THREADS / 8 / ROWS / 2;      // groups of tokens
    static constexpr int AT_ONCE = PAIRS || sizeof(residual_t) > 2 ? 2 : 4;  // registers
    static_assert(COMPUTE_THREADS / 8 % (ROWS * 2) == 0, "outputs of a thread");

    const WideMerge& merge;
    Epilogue epilogue;
    int half, rows, output, num_rows, num_outputs;

    // Asks for biases, which are there by when sums are. Eight threads have 16 outputs of four tokens.
    __device__ __forceinline__ WideFinish(
        const WideMerge& merge, const Epilogue& given, int tile, int num_rows, int num_outputs)
        : merge(merge), epilogue(given), num_rows(num_rows), num_outputs(num_outputs) {
        half = threadIdx.x % 2;
        rows = threadIdx.x / 8 % ROWS;
        output = tile * OUTPUTS + rows * 16 + half * 8;
        if (output < num_outputs) epilogue.begin(output);
    }

    // Adds eight sums of a token at `from`: the other four first in the other half, as their banks are
    // those of the first four there.
    __device__ __forceinline__ void add(
        const unsigned char* from, float (&sums)[SIDE_BY_SIDE]) const {
        float first[4], second[4];
        load_floats<float, 4>(reinterpret_cast<const float*>(from + half * 16), first);
        load_floats<float, 4>(reinterpret_cast<const float*>(from + (half ^ 1) * 16), second);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums[i] += first[i];
            sums[4 + i] += second[i];
        }
    }
    __device__ __forceinline__ void in_order(float (&sums)[SIDE_BY_SIDE]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float first = sums[i];
            sums[i] = half ? sums[4 + i] : first;
            sums[4 + i] = half ? first : sums[4 + i];
        }
    }

    __device__ __forceinline__ int64_t output_of(int token) const {
        return static_cast<int64_t>(token) * num_outputs + output;
    }
    __device__ __forceinline__ void fetch(
        int token, int tokens, typename Epilogue::Addend (&addends)[AT_ONCE]) const {
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (token + i * tokens < num_rows) {
                epilogue.fetch(output_of(token + i * tokens), addends[i]);
            }
        }
    }

    // Of AT_ONCE tokens `tokens` apart, whose sums lie at `offset` of those of a split.
    __device__ __forceinline__ void finish(
        int token, int tokens, int offset,
        const typename Epilogue::Addend (&addends)[AT_ONCE]) const {
        float sums[AT_ONCE][SIDE_BY_SIDE], seconds[AT_ONCE][SIDE_BY_SIDE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
            for (int j = 0; j < SIDE_BY_SIDE; ++j) sums[i][j] = seconds[i][j] = 0.0f;
        }
#pragma unroll 1
        for (int source = 0; source < merge.splits(); ++source) {
            const unsigned char* const from =
                offset + (source == merge.split ? merge.own(source)
                                                : merge.received(source, merge.split));
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                if (token + i * tokens >= num_rows) continue;
                const unsigned char* const at = from + i * STEP * WideMerge::GROUP_BYTES;
                add(at, sums[i]);
                if constexpr (PAIRS) add(at + merge.place(ROWS, 0), seconds[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (token + i * tokens >= num_rows) continue;
            in_order(sums[i]);
            in_order(seconds[i]);
            epilogue.store(output_of(token + i * tokens), sums[i], seconds[i], addends[i]);
        }
    }

    // By all threads that multiply; those of a cluster have come to its barrier once more after it.
    __device__ __forceinline__ void run() const {
        // Token 2 * pair + odd of group `slot` of the block's.
        const int pair = threadIdx.x / 2 % 4, unit = threadIdx.x / 8 / ROWS;
        const int odd = unit % 2, slot = unit / 2;
        const int tokens = STEP * 8 << merge.log2_splits;
        int token = (slot << merge.log2_splits | merge.split) * 8 + pair * 2 + odd;
        int offset = merge.place(rows, slot) + half * WideMerge::HALF_BYTES + (pair + odd * 4) * 32;
        if (output >= num_outputs) token = num_rows;

        typename Epilogue::Addend addends[AT_ONCE];
        fetch(token, tokens, addends);
        barrier_sync(1, COMPUTE_THREADS);  // own sums are laid out
        if (merge.log2_splits > 0) {
            mbarrier_wait(merge.inbox, 0);
            warp_sync();
            cluster_arrive();  // nothing more comes, so others may end
        }
#pragma unroll 1
        while (token < num_rows) {
            finish(token, tokens, offset, addends);
            token += AT_ONCE * tokens;
            offset += AT_ONCE * STEP * WideMerge::GROUP_BYTES;
            fetch(token, tokens, addends);
        }
    }
};
