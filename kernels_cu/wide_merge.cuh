// What becomes of the sums of a tile of wide.cuh, a part of it: they go through shared memory, from
// the order of tensor cores to that of rows of the output, and where a cluster shares the inputs, to
// the block that adds them up. Then bias, residual, SwiGLU and roundings, as in epilogues.cuh.
#pragma once

#include "wide_epilogues.cuh"

// The sums of all splits of a tile on their way to who finishes them: group g of 8 tokens is finished by
// split g % splits, as its group g / splits. They lie as pairs of tokens, behind the barriers:
// float2 [splits, slots, 4, PAIR_STRIDE].
struct WideMerge {
    // Pairs of one row of weights and the next pair of tokens lie in other banks.
    static constexpr int PAIR_STRIDE = OUT_TILE + 4;

    int log2_splits, split;  // blocks of the tile, and which this is
    int share;               // of the cluster's tiles
    int num_groups;          // that have a token
    uint64_t* inbox;

    __device__ __forceinline__ int splits() const { return 1 << log2_splits; }
    // Groups that a split has room for; there are as many as splits, or a multiple.
    __device__ __forceinline__ int slots() const { return TOKENS / 8 >> log2_splits; }
    __device__ __forceinline__ int own_groups() const {
        return (num_groups - split + splits() - 1) >> log2_splits;
    }
    __device__ __forceinline__ uint32_t expected_bytes() const {
        return (own_groups() << log2_splits) * 4 * OUT_TILE * 8;
    }
    // Of pair `pair` of a split's own groups, from split `source`, at row `row`: bytes behind inbox.
    __device__ __forceinline__ int place(int source, int pair, int row) const {
        return HEAD_BYTES + ((source * slots() * 4 + pair) * PAIR_STRIDE + row) * 8;
    }

    // By a warp: of 16 rows from first_row on and all tokens from group first_group on.
    __device__ __forceinline__ void send(
        int first_row, int first_group, const float (&sums)[PART_TOKENS / 8][4]) const {
        const int row = first_row + lane_id() / 4, pair = lane_id() % 4;
        if (log2_splits == 0) {  // a block alone: there is room for every group
            float* to = reinterpret_cast<float*>(
                reinterpret_cast<char*>(inbox) + place(0, first_group * 4 + pair, row));
#pragma unroll
            for (int n = 0; n < PART_TOKENS / 8; ++n) {
                const float upper[2] = {sums[n][0], sums[n][1]}, lower[2] = {sums[n][2], sums[n][3]};
                store_floats<float, 2>(to + n * 4 * PAIR_STRIDE * 2, upper);
                store_floats<float, 2>(to + (n * 4 * PAIR_STRIDE + 8) * 2, lower);
            }
            return;
        }
        const int own = place(split, pair, row);
#pragma unroll
        for (int n = 0; n < PART_TOKENS / 8; ++n) {
            const int group = first_group + n;
            if (group < num_groups) {
                const int rank = (group & (splits() - 1)) * SHARERS + share;
                const RemoteInbox to = inbox_of_rank(inbox, rank);
                const int offset = own + (group >> log2_splits) * (4 * PAIR_STRIDE * 8);
                send_pair(to, offset, sums[n][0], sums[n][1]);
                send_pair(to, offset + 8 * 8, sums[n][2], sums[n][3]);
            }
        }
    }
};

// What a thread finishes: two outputs side by side, always the same, of every STEP-th pair of the
// block's tokens. AT_ONCE pairs are worked on together; what the first ones are added to is asked
// for while the sums of other blocks are on their way.
template <bool PAIRS, typename Epilogue>
struct WideFinish {
    static constexpr int OUTPUTS = PAIRS ? OUT_TILE / 2 : OUT_TILE;  // of a tile
    static constexpr int STEP = COMPUTE_THREADS / (OUTPUTS / 2);     // whole groups
    static constexpr int AT_ONCE = PAIRS ? 2 : 4;
    static constexpr int STEP_BYTES = STEP * WideMerge::PAIR_STRIDE * 8;
    static_assert(COMPUTE_THREADS % (OUTPUTS / 2) == 0 && STEP % 4 == 0, "outputs of a thread");

    const WideMerge& merge;
    Epilogue epilogue;
    int row, output, num_rows, num_outputs;

    // Reads biases, which no kernel writes.
    __device__ __forceinline__ WideFinish(
        const WideMerge& merge, const Epilogue& given, int tile, int num_rows, int num_outputs)
        : merge(merge), epilogue(given), num_rows(num_rows), num_outputs(num_outputs) {
        row = threadIdx.x % (OUTPUTS / 2) * 2;
        output = tile * OUTPUTS + row;
        if (output < num_outputs) epilogue.begin(output);
    }

    // Adds to sums[2 * i + j] those of row i and token j that lie at `from`.
    static __device__ __forceinline__ void add(const char* from, float (&sums)[4]) {
        float part[4];
        load_floats<float, 4>(reinterpret_cast<const float*>(from), part);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += part[i];
    }

    // Of pairs of tokens `tokens` apart, whose sums from split 0 lie at `from`; results from place
    // `at` of the output on.
    __device__ __forceinline__ void finish(
        int token, int tokens, const char* from, int64_t at,
        const typename Epilogue::Addend (&addends)[AT_ONCE][2]) const {
        float sums[AT_ONCE][4], seconds[AT_ONCE][4];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[i][j] = seconds[i][j] = 0.0f;
        }
#pragma unroll 1
        for (int source = 0; source < merge.splits(); ++source) {
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
                if (token + i * tokens >= num_rows) continue;
                add(from + i * STEP_BYTES, sums[i]);
                if constexpr (PAIRS) add(from + i * STEP_BYTES + OUTPUTS * 8, seconds[i]);
            }
            from += merge.place(1, 0, 0) - merge.place(0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int further = i * tokens + j;
                if (token + further >= num_rows) continue;
                const float own[2] = {sums[i][j], sums[i][2 + j]};
                const float second[2] = {seconds[i][j], seconds[i][2 + j]};
                epilogue.store(
                    at + static_cast<int64_t>(further) * num_outputs, own, second, addends[i][j]);
            }
        }
    }

    // By all threads that multiply.
    __device__ __forceinline__ void run() const {
        if (merge.log2_splits == 0) barrier_sync(1, COMPUTE_THREADS);
        if (output >= num_outputs) return;
        const int pair = threadIdx.x / (OUTPUTS / 2), tokens = STEP * 2 << merge.log2_splits;
        const char* from = reinterpret_cast<const char*>(merge.inbox) + merge.place(0, pair, row);
        int token = ((pair / 4 << merge.log2_splits) + merge.split) * 8 + pair % 4 * 2;
#pragma unroll 1
        for (; token < num_rows; token += AT_ONCE * tokens, from += AT_ONCE * STEP_BYTES) {
            const int64_t at = static_cast<int64_t>(token) * num_outputs + output;
            typename Epilogue::Addend addends[AT_ONCE][2];
#pragma unroll
            for (int i = 0; i < AT_ONCE; ++i) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const int further = i * tokens + j;
                    if (token + further < num_rows) {
                        epilogue.fetch(
                            at + static_cast<int64_t>(further) * num_outputs, addends[i][j]);
                    }
                }
            }
            if (merge.log2_splits > 0) wait_for_inbox(merge.inbox);
            finish(token, tokens, from, at, addends);
        }
    }
};
