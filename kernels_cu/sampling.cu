// From logits to token ids: penalties, argmax, and one draw without sorting the vocabulary.
//
// Weights are summed as integers (the largest is 2^40), so that sums do not depend on the order of
// the additions, and two runs draw alike. A vocabulary has less than 2^23 tokens.
#include "philox.cuh"
#include "reduce.cuh"
#include "types.cuh"

constexpr float WEIGHT_ONE = 1099511627776.0f;  // 2^40
constexpr int DIGIT_BITS = 11, NUM_BINS = 1 << DIGIT_BITS, BINS_OF_LANE = NUM_BINS / 32;

// Larger for larger numbers; -0 and 0 alike, and NaN above all.
__device__ __forceinline__ uint32_t order_of(float x) {
    if (x != x) return 0xffffffffu;
    const uint32_t bits = bits_of(x == 0.0f ? 0.0f : x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// The order of a logit, then of its index: the largest of them is the lowest argmax.
struct LargestKey {
    template <typename T>
    static __device__ __forceinline__ T identity() {
        return T(0);
    }
    static __device__ __forceinline__ uint64_t combine(uint64_t a, uint64_t b) {
        return a < b ? b : a;
    }
};

__device__ __forceinline__ uint64_t key_of(float x, int index) {
    return static_cast<uint64_t>(order_of(x)) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

__device__ __forceinline__ int index_of(uint64_t key) {
    return static_cast<int>(0xffffffffu - static_cast<uint32_t>(key));
}

// The token of a row's largest key; -1 where that logit is NaN or infinite: no token can be told.
__device__ __forceinline__ int token_of(uint64_t key) {
    const uint32_t order = static_cast<uint32_t>(key >> 32);
    return order_of(-infinity()) < order && order < order_of(infinity()) ? index_of(key) : -1;
}

// penalize_rows: logit bias, repetition, presence and frequency penalties, in place
// grid S, block any multiple of 32, no shared memory
// logits         float [S, V]
// entry_starts   int32 [S + 1]: row s owns entries entry_starts[s] up to entry_starts[s + 1]
// token_ids      int32 [E], distinct within a row, each in [0, V)
// output_counts  int32 [E], in_context bool [E], bias float [E]
// repetition     float [S], not 0; presence, frequency float [S]
// REF: numpy_ops.penalize
// COST: about 21 bytes an entry
extern "C" __global__ void __launch_bounds__(1024) penalize_rows(
    float* logits, const int32_t* entry_starts,
    const int32_t* token_ids, const int32_t* output_counts,
    const bool* in_context, const float* bias,
    const float* repetition, const float* presence,
    const float* frequency, int32_t V) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int s = blockIdx.x;
    float* row = logits + static_cast<int64_t>(s) * V;
    for (int e = entry_starts[s] + threadIdx.x; e < entry_starts[s + 1]; e += blockDim.x) {
        float logit = row[token_ids[e]] + bias[e];
        if (in_context[e]) logit = logit > 0 ? logit / repetition[s] : logit * repetition[s];
        const int count = output_counts[e];
        if (count > 0) logit -= presence[s];
        row[token_ids[e]] = logit - frequency[s] * static_cast<float>(count);
    }
}

// argmax_rows: the lowest index of each row's largest logit, or of its largest within each part
// grid (S, parts), block any multiple of 32
// logits  float [S, V]
// keys    uint64 [S, parts]: for argmax_merge_rows; unused (null) with one part
// out     int32 [S]: written with one part; -1 where the largest is infinite or NaN
// REF: numpy_ops.sample (temperature 0)
// COST: 4 * S * V bytes
extern "C" __global__ void __launch_bounds__(1024) argmax_rows(
    const float* logits, uint64_t* keys, int32_t* out,
    int32_t V) {
    grid_dependency_launch();
    grid_dependency_wait();
    const float* row = logits + static_cast<int64_t>(blockIdx.x) * V;
    const int part = (V + gridDim.y - 1) / gridDim.y;
    const int start = blockIdx.y * part, end = min(start + part, V);
    uint64_t best = 0;
    for (int i = start + threadIdx.x; i < end; i += blockDim.x) {
        best = LargestKey::combine(best, key_of(row[i], i));
    }
    best = block_reduce<LargestKey>(best);
    if (threadIdx.x != 0) return;
    if (gridDim.y == 1) {
        out[blockIdx.x] = token_of(best);
    } else {
        keys[static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y] = best;
    }
}

// argmax_merge_rows: the argmax of each row from the keys of its parts
// grid S, block 32
// keys  uint64 [S, parts] of argmax_rows
// out   int32 [S]; -1 where the largest is infinite or NaN
// REF: numpy_ops.sample (temperature 0)
// COST: 8 * S * parts bytes
extern "C" __global__ void __launch_bounds__(1024) argmax_merge_rows(
    const uint64_t* keys, int32_t* out, int32_t parts) {
    grid_dependency_launch();
    grid_dependency_wait();
    uint64_t best = 0;
    for (int i = lane_id(); i < parts; i += 32) {
        best = LargestKey::combine(best, keys[static_cast<int64_t>(blockIdx.x) * parts + i]);
    }
    best = warp_reduce<LargestKey>(best);
    if (lane_id() == 0) out[blockIdx.x] = token_of(best);
}

// A row of logits as the sampler sees it: what is kept, and what each token weighs.
struct Row {
    const float* logits;
    int size;
    float top, temperature;
    uint32_t floor;  // tokens whose order is below are cut

    __device__ __forceinline__ uint64_t weight(float x) const {
        return static_cast<uint64_t>(expf((x - top) / temperature) * WEIGHT_ONE);
    }
    __device__ __forceinline__ uint64_t kept_weight(float x) const {
        return order_of(x) >= floor ? weight(x) : 0;
    }
};

// A bin's place: a lane's bins lie apart from the next lane's by one more, off its banks.
__device__ __forceinline__ int place_of(int bin) { return bin + bin / BINS_OF_LANE; }

// The smallest order v among the kept tokens for which those above v measure less than `target`
// (at least 1): their number, or where `by_weight` their weight. Digit by digit, the highest first:
// a histogram of the tokens that agree in the digits so far, then the bin where the sum crosses.
__device__ __forceinline__ uint32_t find_floor(const Row& row, uint64_t target, bool by_weight) {
    __shared__ uint64_t bins[NUM_BINS + 32];
    __shared__ uint64_t found_above;
    __shared__ int found_bin;
    uint32_t prefix = 0;
    uint64_t above = 0;
    for (int shift = 32; shift > 0;) {
        const int digit_bits = min(DIGIT_BITS, shift);
        const uint64_t agreed = static_cast<uint64_t>(prefix) >> shift;
        for (int i = threadIdx.x; i < NUM_BINS + 32; i += blockDim.x) bins[i] = 0;
        block_sync();
        for (int i = threadIdx.x; i < row.size; i += blockDim.x) {
            const float x = row.logits[i];
            const uint32_t order = order_of(x);
            if (order < row.floor || static_cast<uint64_t>(order) >> shift != agreed) continue;
            const uint64_t amount = by_weight ? row.weight(x) : 1;
            const int bin = order >> (shift - digit_bits) & ((1 << digit_bits) - 1);
            if (amount != 0) atomic_add(&bins[place_of(bin)], amount);
        }
        block_sync();
        if (warp_id() == 0) {
            const int first = lane_id() * BINS_OF_LANE;
            uint64_t sum = 0;
            for (int i = 0; i < BINS_OF_LANE; ++i) sum += bins[place_of(first + i)];
            const uint64_t up_to = warp_prefix_sum(sum);
            uint64_t running = above + shuffle(up_to, 31) - up_to, bin_above = 0;
            int bin = -1;
            for (int i = BINS_OF_LANE - 1; i >= 0; --i) {
                const uint64_t amount = bins[place_of(first + i)];
                if (amount != 0 && running < target) {
                    bin = first + i;
                    bin_above = running;
                }
                running += amount;
            }
            const int lane = lowest_bit(warp_ballot(bin >= 0));
            if (lane_id() == lane) {
                found_bin = bin;
                found_above = bin_above;
            }
        }
        block_sync();
        shift -= digit_bits;
        prefix |= static_cast<uint32_t>(found_bin) << shift;
        above = found_above;
        block_sync();
    }
    return prefix;
}

// The token at which the running sum of kept weights, in the order of ids, passes uniform * sum.
__device__ __forceinline__ void draw(const Row& row, double uniform, int32_t* out) {
    __shared__ uint64_t sums[32];
    const int part = (row.size + blockDim.x - 1) / blockDim.x * 32;  // of a warp
    const int start = min(warp_id() * part, row.size), end = min(start + part, row.size);
    uint64_t sum = 0;
    for (int i = start + lane_id(); i < end; i += 32) sum += row.kept_weight(row.logits[i]);
    sum = warp_sum(sum);
    if (lane_id() == 0) sums[warp_id()] = sum;
    block_sync();
    uint64_t total = 0, before = 0;
    for (int w = 0; w < num_warps(); ++w) total += sums[w];
    for (int w = 0; w < warp_id(); ++w) before += sums[w];
    uint64_t left = static_cast<uint64_t>(uniform * static_cast<double>(total));
    left = left < total ? left : total - 1;
    if (left < before || left >= before + sum) return;  // another warp's; no barrier follows
    left -= before;
    for (int base = start; base < end; base += 32) {
        const int i = base + lane_id();
        const uint64_t up_to = warp_prefix_sum(i < end ? row.kept_weight(row.logits[i]) : 0);
        const uint32_t passed = warp_ballot(up_to > left);
        if (passed != 0) {
            if (lane_id() == lowest_bit(passed)) *out = i;
            return;
        }
        left -= shuffle(up_to, 31);
    }
}

// sample_rows: one token of each row: temperature, min-p, top-k, top-p, one draw
// grid S, block any multiple of 32; 17 KB of static shared memory
// logits       float [S, V]
// temperature  float [S]: 0 takes the argmax, the lowest id of a tie
// top_k        int32 [S]: below 1, or V and more, is off; ties with the k-th stay
// top_p        float [S], from 1 on off; min_p float [S], 0 is off
// seeds        uint64 [S]; counters uint32 [S, 2]: position and sample index
// out          int32 [S]
// A row whose largest logit is infinite or NaN gives -1.
// REF: numpy_ops.sample
// COST: reads a row 3 times (from L2 after the first), 3 times more for top-k, 4 times for top-p
extern "C" __global__ void __launch_bounds__(1024) sample_rows(
    const float* logits, const float* temperature,
    const int32_t* top_k, const float* top_p,
    const float* min_p, const uint64_t* seeds,
    const uint32_t* counters, int32_t* out, int32_t V) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int s = blockIdx.x;
    Row row;
    row.logits = logits + static_cast<int64_t>(s) * V;
    row.size = V;
    row.temperature = temperature[s];
    uint64_t best = 0;
    for (int i = threadIdx.x; i < V; i += blockDim.x) {
        best = LargestKey::combine(best, key_of(row.logits[i], i));
    }
    best = block_reduce<LargestKey>(best);
    row.top = row.logits[index_of(best)];
    if (row.temperature == 0.0f || !(fabsf(row.top) < infinity())) {
        if (threadIdx.x == 0) out[s] = token_of(best);
        return;
    }

    row.floor = 0;
    if (min_p[s] > 0.0f) {
        // weight >= min_p, in terms of logits; rounded up, and never above the largest
        const double bound = row.top + row.temperature * log(static_cast<double>(min_p[s]));
        float least = static_cast<float>(bound);
        if (least < bound) least = nextafterf(least, infinity());
        row.floor = order_of(fminf(least, row.top));
    }
    if (0 < top_k[s] && top_k[s] < V) {
        Row whole = row;
        whole.floor = 0;
        const uint32_t floor = find_floor(whole, top_k[s], false);
        row.floor = max(row.floor, floor);
    }
    if (top_p[s] < 1.0f) {
        uint64_t sum = 0;
        for (int i = threadIdx.x; i < V; i += blockDim.x) sum += row.kept_weight(row.logits[i]);
        const double short_of = top_p[s] * static_cast<double>(block_sum(sum));
        const uint64_t target = static_cast<uint64_t>(ceil(fmax(short_of, 1.0)));
        row.floor = max(row.floor, find_floor(row, target, true));
    }
    draw(row, philox_uniform(seeds[s], counters[2 * s], counters[2 * s + 1]), out + s);
}
