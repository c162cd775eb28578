// From logits to token ids: penalties, argmax, and one draw without sorting the vocabulary.
#include "decode_state.cuh"
#include "philox.cuh"
#include "sampling.cuh"

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

// argmax_rows: the lowest index of each row's largest logit; the decode batch moves on with it
// grid (S, parts), block any multiple of 32, no dynamic shared memory
// logits    float [S, V]
// keys      uint64 [S, parts], and arrivals uint32 [S], 0 before and after: null with one part
// out       int32 [S]; -1 where the largest is infinite or NaN
// places    as decode_state.cuh says, for B = S; kv_lens null: nothing moves on
// The block of a row that comes last has the keys of all.
// REF: numpy_ops.sample (temperature 0)
// COST: 4 * S * V bytes
extern "C" __global__ void __launch_bounds__(1024) argmax_rows(
    const float* logits, uint64_t* keys, uint32_t* arrivals, int32_t* out, int32_t V,
    PLACES_PARAMETERS) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int s = blockIdx.x, parts = gridDim.y;
    const Places places = PLACES;
    NextPlace next;
    if (threadIdx.x == 0) next.look(places, s);
    const int length = (V + 4 * parts - 1) / (4 * parts) * 4;
    const int start = min(static_cast<int>(blockIdx.y) * length, V);
    const float* part = logits + static_cast<int64_t>(s) * V + start;
    uint64_t best = largest_key(part, start, min(length, V - start), nullptr);
    if (threadIdx.x == 0) next.find_slot(places, s);
    best = block_reduce<LargestKey>(best);
    if (warp_id() != 0) return;
    if (parts > 1) {
        const uint32_t last = parts - 1;
        uint64_t* of_row = keys + static_cast<int64_t>(s) * parts;
        uint32_t arrival = 0;
        if (lane_id() == 0) {
            of_row[blockIdx.y] = best;
            device_fence();
            arrival = atomic_count_to(arrivals + s, last);
        }
        if (shuffle(arrival, 0) != last) return;
        device_fence();
        for (int i = lane_id(); i < parts; i += 32) {
            best = LargestKey::combine(best, load_volatile(of_row + i));
        }
        best = warp_reduce<LargestKey>(best);
    }
    if (lane_id() != 0) return;
    out[s] = token_of(best);
    next.store(places, s, token_of(best));
}

// ------------------------------------------------------------------------------ one draw

constexpr float WEIGHT_ONE = 1099511627776.0f;  // 2^40
constexpr int DIGIT_BITS = 11, NUM_BINS = 1 << DIGIT_BITS;
// Tokens are first told apart by the exponent of their weight, in steps of 28 / 2^11: beyond the
// last bin but one it is below 2^-40, and the weight 0. Such a token is never drawn.
constexpr float EXPONENTS = 28.0f;
constexpr int NUM_WEIGHTY = NUM_BINS - 1;
constexpr int MAX_CANDIDATES = 2048;  // tokens that are left, for one block to end with

// How a row is sampled.
struct Row {
    float top, temperature;
    float bins_of_one;  // bins for a difference of 1 between logits; a bin is 1 / bins_of_one wide
    uint32_t floor;     // tokens whose order is below are cut

    __device__ __forceinline__ uint64_t weight(float x) const {
        return static_cast<uint64_t>(expf((x - top) / temperature) * WEIGHT_ONE);
    }
    __device__ __forceinline__ uint64_t kept_weight(float x) const {
        return order_of(x) >= floor ? weight(x) : 0;
    }
    // Rises as x falls; NUM_WEIGHTY for what has no weight, and for a NaN of infinity times 0.
    __device__ __forceinline__ int bin_of(float x) const {
        return static_cast<int>(fminf((top - x) * bins_of_one, NUM_WEIGHTY));
    }
};

// What a block has of a row.
struct Part {
    const float* logits;
    const int32_t* ids;  // null: first_id and the next
    int first_id, size;

    __device__ __forceinline__ int id_of(int i) const {
        return ids == nullptr ? first_id + i : ids[i];
    }
};

// 64 bits in two halves, as shared memory adds 32 at once: both are right when all have added.
__device__ __forceinline__ void add_to_bin(uint64_t* bin, uint64_t amount) {
    uint32_t* halves = reinterpret_cast<uint32_t*>(bin);  // the low one first
    const uint32_t low = static_cast<uint32_t>(amount);
    const uint32_t before = atomic_add(halves, low);
    const uint32_t high = static_cast<uint32_t>(amount >> 32) + (before + low < before ? 1 : 0);
    if (high != 0) atomic_add(halves + 1, high);
}

// Where the amounts of the tokens reach a target, taken bin by bin from bin 0 on.
struct Crossing {
    int bin;        // -1: all of them do not
    uint64_t left;  // of the target, for the tokens of this bin
};

// bin_of(logit): of tokens from row.floor on; outside 0 to NUM_BINS - 1, one does not count. An
// amount is a weight, or 1; target(sum of all amounts) is 1 at least.
template <typename BinOf, typename Target>
__device__ __forceinline__ Crossing find_crossing(
    const Row& row, const Part& part, const Team& team, uint64_t* bins, bool by_weight,
    const BinOf& bin_of, const Target& target) {
    __shared__ Crossing found;
    for (int i = threadIdx.x; i < NUM_BINS; i += blockDim.x) bins[i] = 0;
    if (threadIdx.x == 0) found.bin = -1;
    block_sync();
#pragma unroll 4
    for (int i = threadIdx.x; i < part.size; i += blockDim.x) {
        const float x = part.logits[i];
        const uint32_t bin = bin_of(x);
        if (order_of(x) < row.floor || bin >= NUM_BINS) continue;
        const uint64_t amount = by_weight ? row.weight(x) : 1;
        if (amount != 0) add_to_bin(bins + bin, amount);
    }
    team.add_up(bins, NUM_BINS);
    const auto amount = [&](int i) { return bins[i]; };
    Team alone = {1, 0, 0};
    Run run = sum_up(alone, NUM_BINS, amount);
    const uint64_t level = target(run.total) - 1;
    if (run.passes(level)) {
        const int bin = find_in(run, level, amount);
        if (lane_id() == 0) {
            found.bin = bin;
            found.left = level + 1 - run.before;
        }
    }
    block_sync();
    const Crossing crossing = found;
    block_sync();  // before it is set again
    return crossing;
}

// The same by the bins of a row, for all tokens of any weight.
template <typename Target>
__device__ __forceinline__ Crossing find_bin(
    const Row& row, const Part& part, const Team& team, uint64_t* bins, bool by_weight,
    const Target& target) {
    const auto bin_of = [&](float x) {
        const int bin = row.bin_of(x);
        return bin < NUM_WEIGHTY ? bin : -1;
    };
    return find_crossing(row, part, team, bins, by_weight, bin_of, target);
}

// The smallest order v for which the tokens of the crossing's bin above v measure less than what is
// left of the target: those of v reach it. Digit by digit, from the highest in which the orders of
// the bin can differ.
__device__ __forceinline__ uint32_t find_floor(
    const Row& row, const Part& part, const Team& team, uint64_t* bins, bool by_weight,
    const Crossing& crossing) {
    if (crossing.bin < 0) return row.floor;
    // Bounds on the bin's logits, wider than rounding by nearly the width of a bin.
    const float width = 1.0f / row.bins_of_one;
    const uint64_t highest = order_of(
        crossing.bin <= 1 ? row.top : row.top - static_cast<float>(crossing.bin - 1) * width);
    const uint64_t lowest = order_of(row.top - static_cast<float>(crossing.bin + 2) * width);
    int shift = 0;
    while (highest >> shift != lowest >> shift) shift += DIGIT_BITS;
    uint64_t floor = highest >> shift << shift, left = crossing.left;
    while (shift > 0) {
        const uint64_t agreed = floor >> shift;
        shift -= DIGIT_BITS;
        const auto bin_of = [&](float x) {
            const uint64_t order = order_of(x);
            const bool agrees = order >> (shift + DIGIT_BITS) == agreed;
            const bool is_in = agrees && row.bin_of(x) == crossing.bin;
            return is_in ? NUM_BINS - 1 - static_cast<int>(order >> shift & (NUM_BINS - 1)) : -1;
        };
        const Crossing digit = find_crossing(
            row, part, team, bins, by_weight, bin_of, [&](uint64_t) { return left; });
        floor |= static_cast<uint64_t>(NUM_BINS - 1 - digit.bin) << shift;
        left = digit.left;
    }
    return static_cast<uint32_t>(floor);
}

// The tokens up to bin `last` to the first block, in the order of their ids, unless they are more
// than MAX_CANDIDATES. Returns their number.
__device__ __forceinline__ uint64_t gather(
    const Row& row, const Part& part, Team& team, int last, float* logits, int32_t* ids) {
    const auto is_candidate = [&](int i) -> uint64_t {
        const float x = part.logits[i];
        return order_of(x) >= row.floor && row.bin_of(x) <= last;
    };
    const Run run = sum_up(team, part.size, is_candidate);
    if (run.total > MAX_CANDIDATES) return run.total;
    int at = static_cast<int>(run.before);
    for (int base = run.start; base < run.end; base += 32) {
        const int i = base + lane_id();
        const bool goes = i < run.end && is_candidate(i) != 0;
        const uint32_t going = warp_ballot(goes);
        if (goes) {
            const int to = at + count_bits(going & ((1u << lane_id()) - 1));
            team.send_to_first(logits + to, part.logits[i]);
            team.send_to_first(ids + to, static_cast<int32_t>(part.id_of(i)));
        }
        at += count_bits(going);
    }
    team.wait();
    return run.total;
}

// sample_rows: one token of each row: temperature, min-p, top-k, top-p, one draw; the decode batch
//   moves on with it
// grid S * cluster, cluster 1, 2, 4 or 8 blocks (from 9.0; else 1) that share a row; block any
//   multiple of 32; shared: 16 KB, and with `keep` 4 bytes for each of ceil(V / cluster) to 4s
// logits       float [S, V]
// temperature  float [S]: 0 takes the argmax, the lowest id of a tie
// top_k        int32 [S]: below 1, or V and more, is off; ties with the k-th stay
// top_p        float [S], from 1 on off; min_p float [S], 0 is off
// seeds        uint64 [S]; counters uint32 [S, 2]: position and sample index
// out          int32 [S]; -1 where the largest logit is infinite or NaN
// keep         whether a block keeps its part of the row in shared memory, not to read it again
// places       as decode_state.cuh says, for B = S; kv_lens null: nothing moves on
// Top-k and top-p find the bin in which they cut; if few tokens are left, the first block has them
// all and ends alone.
// REF: numpy_ops.sample
// COST: reads a row once if kept; else once more for a draw, or three times more with cuts
extern "C" __global__ void __launch_bounds__(1024) sample_rows(
    const float* logits, const float* temperature, const int32_t* top_k, const float* top_p,
    const float* min_p, const uint64_t* seeds, int32_t* out, int32_t V, int32_t keep,
    PLACES_PARAMETERS) {
    grid_dependency_launch();
    grid_dependency_wait();
    __shared__ uint64_t bins[NUM_BINS];
    __shared__ double uniform;
    __shared__ NextPlace next_place;
    Team team = {cluster_size(), cluster_rank(), 0};
    if (team.ranks > 1) cluster_arrive();
    const int s = blockIdx.x / team.ranks;
    const Places places = PLACES;
    NextPlace next;
    if (threadIdx.x == 0) next.look(places, s);
    const uint64_t seed = seeds[s];
    const uint32_t position = counters[2 * s], index = counters[2 * s + 1];
    Row row = {0.0f, temperature[s], 0.0f, 0};
    const float share = top_p[s], least = min_p[s];
    const int count = top_k[s];

    float* candidates = reinterpret_cast<float*>(dynamic_shared());
    int32_t* candidate_ids = reinterpret_cast<int32_t*>(candidates + MAX_CANDIDATES);
    float* kept = keep ? candidates + 2 * MAX_CANDIDATES : nullptr;
    const int length = (V + 4 * team.ranks - 1) / (4 * team.ranks) * 4;
    const int first = min(team.rank * length, V), size = min(length, V - first);
    const float* own = logits + static_cast<int64_t>(s) * V + first;
    Part part = {keep ? kept : own, nullptr, first, size};
    uint64_t best = largest_key(own, first, size, kept);
    if (threadIdx.x == 0) next.find_slot(places, s);
    best = block_reduce<LargestKey>(best);
    if (team.ranks > 1) cluster_wait();  // all have started: they may be written to
    const uint64_t* largest = team.share(best);
    for (int r = 0; r < team.ranks; ++r) best = LargestKey::combine(best, largest[r]);
    if (row.temperature == 0.0f || token_of(best) < 0) {
        if (team.rank == 0 && threadIdx.x == 0) {
            out[s] = token_of(best);
            next.store(places, s, token_of(best));
        }
        return;
    }
    if (threadIdx.x == 0) {  // for the thread that will know the token; barriers lie between
        next_place = next;
        uniform = philox_uniform(seed, position, index);
    }

    row.top = logit_of(order_of_key(best));
    row.bins_of_one = fminf(NUM_BINS / (EXPONENTS * row.temperature), 1e37f);
    if (least > 0.0f) {
        // weight >= min_p, in terms of logits; rounded up, and never above the largest
        const double bound = row.top + row.temperature * log(static_cast<double>(least));
        float lowest = static_cast<float>(bound);
        if (lowest < bound) lowest = nextafterf(lowest, infinity());
        row.floor = order_of(fminf(lowest, row.top));
    }
    const bool limits_count = 0 < count && count < V, limits_weight = share < 1.0f;
    const auto number = [&](uint64_t) -> uint64_t { return count; };
    const auto weight = [&](uint64_t total) {
        return static_cast<uint64_t>(ceil(fmax(share * static_cast<double>(total), 1.0)));
    };
    if (limits_count || limits_weight) {
        Crossing crossing = limits_count ? find_bin(row, part, team, bins, false, number)
                                         : find_bin(row, part, team, bins, true, weight);
        const int last = crossing.bin < 0 ? NUM_WEIGHTY - 1 : crossing.bin;
        const uint64_t left = gather(row, part, team, last, candidates, candidate_ids);
        if (left <= MAX_CANDIDATES) {
            if (team.rank != 0) return;
            team.ranks = 1;
            part = {candidates, candidate_ids, 0, static_cast<int>(left)};
        }
        row.floor = max(row.floor, find_floor(row, part, team, bins, !limits_count, crossing));
        if (limits_count && limits_weight) {
            crossing = find_bin(row, part, team, bins, true, weight);
            row.floor = max(row.floor, find_floor(row, part, team, bins, true, crossing));
        }
    }

    // The token at which the running sum of weights, in the order of ids, passes uniform * sum.
    const auto kept_weight = [&](int i) { return row.kept_weight(part.logits[i]); };
    Run run = sum_up(team, part.size, kept_weight);
    uint64_t level = static_cast<uint64_t>(uniform * static_cast<double>(run.total));
    level = level < run.total ? level : run.total - 1;
    if (!run.passes(level)) return;  // another warp's
    const int token = part.id_of(find_in(run, level, kept_weight));
    if (lane_id() != 0) return;
    out[s] = token;
    next_place.store(places, s, token);
}
