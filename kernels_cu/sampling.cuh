// What argmax and sampling share: the order of logits, and one row's logits spread over blocks.
//
// Weights are summed as integers (the largest is 2^40), so that sums do not depend on the order of
// the additions, nor on how many blocks share a row, and two runs draw alike. A vocabulary has less
// than 2^23 tokens.
#pragma once

#include "reduce.cuh"
#include "types.cuh"

// ------------------------------------------------------------------------------ orders, keys

// Larger for larger numbers; -0 and 0 alike, and NaN above all.
__device__ __forceinline__ uint32_t order_of(float x) {
    if (x != x) return 0xffffffffu;
    const uint32_t bits = bits_of(x == 0.0f ? 0.0f : x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The logit of an order.
__device__ __forceinline__ float logit_of(uint32_t order) {
    return float_of(order >> 31 ? order & 0x7fffffffu : ~order);
}

// The order of a logit, then of its index: the largest of them is the lowest argmax; 0 of none.
struct LargestKey {
    template <typename T>
    static __device__ __forceinline__ T identity() {
        return T(0);
    }
    static __device__ __forceinline__ uint64_t combine(uint64_t a, uint64_t b) {
        return a < b ? b : a;
    }
};

__device__ __forceinline__ uint64_t key_of(uint32_t order, int index) {
    return static_cast<uint64_t>(order) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

__device__ __forceinline__ uint32_t order_of_key(uint64_t key) {
    return static_cast<uint32_t>(key >> 32);
}

// The token of a row's largest key; -1 where that logit is NaN or infinite: no token can be told.
__device__ __forceinline__ int token_of(uint64_t key) {
    const uint32_t order = order_of_key(key);
    const bool is_number = order_of(-infinity()) < order && order < order_of(infinity());
    return is_number ? static_cast<int>(0xffffffffu - static_cast<uint32_t>(key)) : -1;
}

// The largest key of what this thread reads of `size` logits, whose ids start at `first`. All of
// them are written to `copy`, aligned to 16 bytes, unless it is null.
__device__ __forceinline__ uint64_t largest_key(
    const float* logits, int first, int size, float* copy) {
    constexpr int N = Wide<float>::N, BATCH = 4;  // loads that a thread has under way
    uint32_t best = 0;
    int index = 0;
    const auto see = [&](float x, int i) {  // ids rise, so the lowest of a tie comes first
        const uint32_t order = order_of(x);
        if (order <= best) return;
        best = order;
        index = first + i;
    };
    if (rows_are_wide(logits, size)) {
        const int step = blockDim.x * N;
        for (int base = threadIdx.x * N; base < size; base += BATCH * step) {
            Vec<float, N> v[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const int i = base + b * step;
                if (i < size) v[b] = load_vec<float, N>(logits + i);
            }
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const int i = base + b * step;
                if (i >= size) break;
                if (copy != nullptr) store_vec<float, N>(copy + i, v[b]);
#pragma unroll
                for (int j = 0; j < N; ++j) see(v[b].data[j], i + j);
            }
        }
    } else {
        const int step = blockDim.x;
        for (int base = threadIdx.x; base < size; base += BATCH * step) {
            float x[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                if (base + b * step < size) x[b] = logits[base + b * step];
            }
#pragma unroll
            for (int b = 0; b < BATCH; ++b) {
                const int i = base + b * step;
                if (i >= size) break;
                if (copy != nullptr) copy[i] = x[b];
                see(x[b], i);
            }
        }
    }
    return best == 0 ? 0 : key_of(best, index);
}

// ------------------------------------------------------------------------------ blocks of a row

constexpr int MAX_RANKS = 8;

// The blocks that share a row: a cluster, or one block. All threads come to what waits.
struct Team {
    int ranks, rank;  // ranks: a power of two
    int turn;

    // Every block's value, by rank, to every block; all of a block's threads give the same.
    __device__ __forceinline__ const uint64_t* share(uint64_t value) {
        // Two, by turns: a block may come to the next while another still reads this one.
        __shared__ uint64_t values[2][MAX_RANKS];
        uint64_t* own = values[turn++ % 2];
        if (ranks == 1) {
            if (threadIdx.x == 0) own[0] = value;
            block_sync();
        } else {
            if (threadIdx.x < ranks) store_at_rank(own + rank, threadIdx.x, value);
            cluster_sync();
        }
        return own;
    }

    // Sums of each of `size` (a multiple of MAX_RANKS) numbers over the blocks, in all of them.
    __device__ __forceinline__ void add_up(uint64_t* numbers, int size) const {
        if (ranks == 1) {
            block_sync();
            return;
        }
        cluster_sync();
        const int part = size / ranks, end = (rank + 1) * part;
        for (int i = rank * part + threadIdx.x; i < end; i += blockDim.x) {
            uint64_t sum = 0;
#pragma unroll
            for (int r = 0; r < MAX_RANKS; ++r) {
                if (r < ranks) sum += load_at_rank(numbers + i, r);
            }
            for (int r = 0; r < ranks; ++r) store_at_rank(numbers + i, r, sum);
        }
        cluster_sync();
    }

    // To the first block; whoever reads it must wait for the team.
    template <typename T>
    __device__ __forceinline__ void send_to_first(T* own, T value) const {
        if (ranks == 1) {
            *own = value;
        } else {
            store_at_rank(own, 0, value);
        }
    }

    __device__ __forceinline__ void wait() const {
        if (ranks == 1) {
            block_sync();
        } else {
            cluster_sync();
        }
    }
};

// Things in an order, each with an amount: every block has a part of them, as ranks rise, and every
// warp a run of its block's. `before`: the sum of the amounts in front of the run.
struct Run {
    int start, end;
    uint64_t sum, before, total;

    // Whether here the running sum passes `level`, which is less than the total.
    __device__ __forceinline__ bool passes(uint64_t level) const {
        return before <= level && level - before < sum;
    }
};

// amount(i), for i from 0 on: of the i-th thing of this block. A barrier must come before the next.
template <typename Amount>
__device__ __forceinline__ Run sum_up(Team& team, int size, const Amount& amount) {
    __shared__ uint64_t sums[32];
    Run run;
    const int length = (size + num_warps() - 1) / num_warps();
    run.start = min(warp_id() * length, size);
    run.end = min(run.start + length, size);
    uint64_t sum = 0;
#pragma unroll 4
    for (int i = run.start + lane_id(); i < run.end; i += 32) sum += amount(i);
    run.sum = warp_sum(sum);
    if (lane_id() == 0) sums[warp_id()] = run.sum;
    block_sync();
    const uint64_t of_warp = lane_id() < num_warps() ? sums[lane_id()] : 0;
    run.before = warp_sum(lane_id() < warp_id() ? of_warp : 0);
    run.total = warp_sum(of_warp);
    if (team.ranks > 1) {
        const uint64_t* totals = team.share(run.total);
        run.total = 0;
        for (int r = 0; r < team.ranks; ++r) {
            if (r < team.rank) run.before += totals[r];
            run.total += totals[r];
        }
    }
    return run;
}

// The thing at which the running sum passes `level`, in a run where it does; run.before becomes the
// sum in front of it. The lanes share what is left, and go on with the share that it lies in.
template <typename Amount>
__device__ __forceinline__ int find_in(Run& run, uint64_t level, const Amount& amount) {
    int length;
    do {
        length = (run.end - run.start + 31) / 32;
        const int start = min(run.start + lane_id() * length, run.end);
        const int end = min(start + length, run.end);
        uint64_t sum = 0;
        for (int i = start; i < end; ++i) sum += amount(i);
        const uint64_t up_to = run.before + warp_prefix_sum(sum);
        const int lane = lowest_bit(warp_ballot(up_to > level));
        run.start = shuffle(start, lane);
        run.end = shuffle(end, lane);
        run.before = shuffle(up_to - sum, lane);
    } while (length > 1);
    return run.start;
}
