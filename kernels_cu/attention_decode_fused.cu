// A decode step's attention from the QKV product to the result, in one launch: q and k normalised
// and rotated, k and v written to the paged cache, attention, and the merge of a context's parts.
//
// A cluster of blocks shares the context of a sequence and key/value head, 16 positions at a time in
// turn. Before the kernel in front of it has ended, a block finds its positions and starts to copy
// their keys and values; so what follows the QKV product is short. At the end every warp stores its
// sums into the shared memory of the block that merges those columns, which waits for as many bytes
// as are to come: no barrier, no memory, no fence.
//
// Of several queries a sequence each has a cluster of its own, which makes for itself the keys and
// values of those before it in the same step, and writes those of its own position: nobody waits for
// another cluster. The context is read once for each query, which is cheap where it is short.
//
// HEAD_SIZE   d, a multiple of 16; STAGES steps of 16 positions that a warp has under way at first
// READ_EARLY  1: kv_lens, query_starts, block_tables, slots and the caches up to the new positions
//             are read before the kernels in front have ended. Right where no kernel of the same
//             graph, or none that overlaps, writes them: a graph that holds one step. 0: nothing is
// QUERIES     most queries of a sequence, 1 to 8, of more than one only where the cache is not
//             quantised; sequences with more are left alone
// ROW_HALVES  1: H / G is at most 8, which takes fewer registers; else 2
// CLUSTERED   0: the launch has no clusters. Less code, which is read from memory as it runs once
// SCALAR, CACHE: as in the headers. nanocupy/ops/launch_attention_fused.py chooses the launch.
#ifndef READ_EARLY
#define READ_EARLY 1
#endif
#ifndef ROW_HALVES
#define ROW_HALVES 2
#endif
#ifndef CLUSTERED
#define CLUSTERED 1
#endif
#include "attention_decode_codes.cuh"
#include "rope.cuh"

#if QUERIES > 1 && QUANTIZED
#error "several queries of a sequence take a cache that is not quantised"
#endif

#if defined(DECODE_ON_TENSOR_CORES) && HAS_CLUSTERS

// HEAD_SIZE values to row `row` of a tile, rounded to scalar_t.
#if QUANTIZED
typedef CodeRows<1, ROW_HALVES> Rows;

// Sorted, as a product with codes wants them.
__device__ __forceinline__ void store_tile_row(scalar_t* tile, int row, const HeadPairs& x) {
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r) {
        if (pair_index(r) >= HALF) break;
#pragma unroll
        for (int j = 0; j < PAIR_WIDTH; ++j) {
            const int low = pair_index(r) + j, high = HALF + low;
            tile[chunk_at(row, low / 16 * 2 + low % 2) + low % 16 / 2] =
                from_float<scalar_t>(x.low[r][j]);
            tile[chunk_at(row, high / 16 * 2 + high % 2) + high % 16 / 2] =
                from_float<scalar_t>(x.high[r][j]);
        }
    }
}
#else
typedef MmaRows<1, ROW_HALVES> Rows;

__device__ __forceinline__ void store_tile_row(scalar_t* tile, int row, const HeadPairs& x) {
#pragma unroll
    for (int r = 0; r < PAIR_ROUNDS; ++r) {
        const int i = pair_index(r);
        if (i >= HALF) break;
        const int high = HALF + i;
        store_floats<scalar_t, PAIR_WIDTH>(tile + chunk_at(row, i / 8) + i % 8, x.low[r]);
        store_floats<scalar_t, PAIR_WIDTH>(tile + chunk_at(row, high / 8) + high % 8, x.high[r]);
    }
}
#endif

// The columns of a result lie over the blocks of a cluster by 8 in turn: chunk n is merged by block
// n % ranks, which has in its inbox what the warps of the cluster ("sources") have summed. Sources
// are counted as the steps of a context go to them, so that those with any come first. A block alone
// stores to its own memory, as the instructions of clusters are illegal without one.
struct ClusterMerge {
    int ranks, rank, rows;  // ranks: a power of two; rows: query heads
    int sources;            // that have seen any position
    int slots;              // chunks that a block has room for
    uint64_t* inbox;        // behind its 8 bytes: states [ranks * warps, rows, 2], maximum and sum,
                            // then values [ranks * warps, rows, slots, 8]

    __device__ __forceinline__ int own_columns() const {
        return (ROW_CHUNKS - rank + ranks - 1) / ranks * 8;
    }
    __device__ __forceinline__ int state_offset(int source, int row) const {
        return 8 + (source * rows + row) * 8;
    }
    __device__ __forceinline__ int value_offset(int source, int row, int slot) const {
        return state_offset(ranks * num_warps(), 0) + ((source * rows + row) * slots + slot) * 32;
    }
    __device__ __forceinline__ uint32_t expected_bytes() const {
        return sources * rows * (8 + 4 * own_columns());
    }

    __device__ __forceinline__ void put(int to, int offset, float a, float b) const {
        if (CLUSTERED && ranks > 1) {
            send_pair(inbox_of_rank(inbox, to), offset, a, b);
        } else {
            const float pair[2] = {a, b};
            store_floats<float, 2>(
                reinterpret_cast<float*>(reinterpret_cast<char*>(inbox) + offset), pair);
        }
    }

    // This warp's sums to those who merge them. The whole warp must come.
    __device__ __forceinline__ void send(const Rows& own, int source) const {
        const int log2_ranks = lowest_bit(ranks), pair = lane_id() % 4;
#pragma unroll
        for (int h = 0; h < ROW_HALVES; ++h) {
            const int row = h * 8 + lane_id() / 4;
            if (row >= rows) continue;
            const SoftmaxState state = own.state[0][h];
            for (int to = pair; to < ranks; to += 4) {
                put(to, state_offset(source, row), state.max, state.sum);
            }
            const int first = value_offset(source, row, 0) + pair * 8;
#pragma unroll
            for (int n = 0; n < ROW_CHUNKS; ++n) {
                put(n & (ranks - 1), first + (n >> log2_ranks) * 32, own.summed[0][n][h * 2],
                    own.summed[0][n][h * 2 + 1]);
            }
        }
    }

    // What all have sent, into [rows, d]. A thread takes two columns at a time; with clusters, whose
    // sources are many, four lanes share these. All threads come.
    __device__ __forceinline__ void receive(scalar_t* out) const {
        constexpr int SHARERS = CLUSTERED ? 4 : 1;
        const char* start = reinterpret_cast<const char*>(inbox);
        const float* states = reinterpret_cast<const float*>(start + state_offset(0, 0));
        const float* values = reinterpret_cast<const float*>(start + value_offset(0, 0, 0));
        const int pairs = own_columns() / 2, share = lane_id() % SHARERS;
        int row = 0, pair = threadIdx.x / SHARERS;
#pragma unroll 1
        for (int base = 0; base < rows * pairs; base += blockDim.x / SHARERS) {
            for (; pair >= pairs; pair -= pairs) ++row;
            const int own = min(row, rows - 1);
            float max = -infinity(), sum = 0.0f, total[2] = {0.0f, 0.0f};
#pragma unroll 4
            for (int s = share; s < sources; s += SHARERS) {
                max = fmaxf(max, states[(s * rows + own) * 2]);
            }
            if (SHARERS > 1) max = warp_max<SHARERS>(max);
#pragma unroll 4
            for (int s = share; s < sources; s += SHARERS) {
                const int at = s * rows + own;
                float state[2], value[2];
                load_floats<float, 2>(states + at * 2, state);
                load_floats<float, 2>(values + (at * slots * 4 + pair) * 2, value);
                const float weight = softmax_weight(state[0], max);
                sum += weight * state[1];
                total[0] += weight * value[0];
                total[1] += weight * value[1];
            }
            if (SHARERS > 1) {
                sum = warp_sum<SHARERS>(sum);
                total[0] = warp_sum<SHARERS>(total[0]);
                total[1] = warp_sum<SHARERS>(total[1]);
            }
            if (row < rows && share == 0) {
                const int chunk = pair / 4 * ranks + rank;
                total[0] = divided(total[0], sum);
                total[1] = divided(total[1], sum);
                scalar_t* head = out + row * HEAD_SIZE;
#if QUANTIZED
                head[sorted_column(chunk, pair % 4 * 2)] = from_float<scalar_t>(total[0]);
                head[sorted_column(chunk, pair % 4 * 2 + 1)] = from_float<scalar_t>(total[1]);
#else
                store_floats<scalar_t, 2>(head + chunk * 8 + pair % 4 * 2, total);
#endif
            }
            pair += blockDim.x / SHARERS;
        }
    }
};
#endif

// attention_decode_fused: attention of few queries a sequence, with what stands before it, on tensor
//   cores, 16-bit types, the cache's the same as qkv's or quantised
// grid (G * cluster, B * QUERIES), cluster 1, 2, 4 or 8 blocks along x, 1 without CLUSTERED;
//   block 32 to 256; from 9.0;
//   shared: 2 * d * (STAGES * 2 * 16 * warps + 16 (each row as in attention_decode_mma)
//   + 2 * QUERIES), where the cache is quantised warps * STAGES * (32 * codes + 64) for the first;
//   + 8 + 4 * cluster * warps * H / G * (2 + 8 * ceil(d / 8 / cluster))
// qkv scalar_t [T, H + 2 * G, d]; q_norm, k_norm scalar_t [d] or null; rope float [T, 2, d / 2];
//   slots int32 [T]; key_cache, value_cache cache_t [N, G, P, d], N * G * P < 2**32; key_scales,
//   value_scales scale_t [N, G, P] where the cache is quantised, else unused;
//   query_starts int32 [B + 1]; kv_lens int32 [B]; block_tables int32 [B, M]; out scalar_t [T, H, d]
//   H / G at most 8 * ROW_HALVES; arrays aligned to 16 bytes. slots must agree with block_tables.
//   A sequence without queries is left alone; one of length 0 (padding) gives 0 and writes no
//   cache. kv_lens count all queries of a sequence, which are its last positions.
// REF: numpy_ops.attend
// COST: bytes: keys and values of each sequence's positions and its row of qkv, once for each query;
//   64 flops for each query, position, head of keys and d
extern "C" __global__ void __launch_bounds__(256) attention_decode_fused(
    const scalar_t* qkv, const scalar_t* q_norm, const scalar_t* k_norm, float eps,
    const float* rope, const int32_t* slots, cache_t* key_cache, cache_t* value_cache,
    scale_t* key_scales, scale_t* value_scales, const int32_t* query_starts,
    const int32_t* kv_lens, const int32_t* block_tables, float scale,
    scalar_t* out, int num_kv_heads, int heads_per_group, int block_size, int table_width) {
#if defined(DECODE_ON_TENSOR_CORES) && HAS_CLUSTERS
    grid_dependency_launch();
    if (!READ_EARLY) grid_dependency_wait();
    const int ranks = CLUSTERED ? cluster_size() : 1, rank = CLUSTERED ? cluster_rank() : 0;
    const int sequence = blockIdx.y / QUERIES, group = blockIdx.x / ranks;
    const int number = blockIdx.y % QUERIES;  // of the sequence's queries
    const int first_token = query_starts[sequence], token = first_token + number;
    const int num_queries = query_starts[sequence + 1] - first_token;
    // The whole cluster leaves.
    if (QUERIES > 1 ? num_queries <= number || num_queries > QUERIES : num_queries == 0) {
        if (READ_EARLY) grid_dependency_wait();
        return;
    }

    scalar_t* shared_queries = reinterpret_cast<scalar_t*>(dynamic_shared());
    scalar_t* rings = shared_queries + 16 * STRIDE;
    scalar_t* ring = rings + warp_id() * RING;
    // The keys, then the values of the new positions [2, QUERIES, d]; where they are codes, of one
    // position, their scales [2] come behind.
    scalar_t* fresh = rings + num_warps() * RING;

    // Steps go to the blocks in turn, then to their warps: step s of this warp takes the 16 positions
    // from first_position + s * stride on. Those from fresh_from on are not in the cache yet: this
    // query's, the newest that it sees, and those of the queries before it.
    const int32_t* table = block_tables + static_cast<int64_t>(sequence) * table_width;
    const int behind = QUERIES > 1 ? num_queries - 1 - number : 0;  // queries that see more
    const int kv_len = behind > 0 ? max(0, kv_lens[sequence] - behind) : kv_lens[sequence];
    const int newest = kv_len - 1, fresh_from = newest - number;
    const int source = warp_id() * ranks + rank;
    const int first_position = source * STEP_TOKENS;
    const int stride = num_warps() * ranks * STEP_TOKENS;
    const int num_steps = max(0, (kv_len - first_position + stride - 1) / stride);
    const auto row_of_lane = [&](int step) {
        const int position = first_position + step * stride + lane_id() % STEP_TOKENS;
        if (position >= fresh_from) return 0u;
        return cache_row(table, position, block_size, num_kv_heads, group);
    };
    uint32_t next_row = row_of_lane(0);
#if QUANTIZED
    CodeCopies copies = {
        key_cache, value_cache, lane_id() < STEP_TOKENS ? key_scales : value_scales};
    scale_t* fresh_scales = reinterpret_cast<scale_t*>(fresh + HEAD_SIZE);
#endif
    const auto copy_step = [&](int step) {
        if (step < num_steps) {
            const int left = fresh_from - (first_position + step * stride);
            scalar_t* keys = ring + step % STAGES * STAGE;
#if QUANTIZED
            copies.start(keys, next_row, left);
#else
            copy_positions(keys, key_cache, value_cache, next_row, left);
#endif
            next_row = row_of_lane(step + 1);
        }
#if QUANTIZED
        if (step >= num_steps) copies.finish();
#endif
        cp_async_commit();
    };
#pragma unroll 1  // code that runs once is read from memory as it runs: less of it is faster
    for (int s = 0; s < STAGES; ++s) copy_step(s);

    const int sources = min(num_warps() * ranks, (kv_len + STEP_TOKENS - 1) / STEP_TOKENS);
    const ClusterMerge merge = {
        ranks, rank, heads_per_group, max(0, sources), (ROW_CHUNKS + ranks - 1) / ranks,
        reinterpret_cast<uint64_t*>(fresh + 2 * QUERIES * HEAD_SIZE)};
    if (CLUSTERED && ranks > 1) {
        if (threadIdx.x == 0) make_inbox(merge.inbox, merge.expected_bytes());
        warp_sync();
        cluster_arrive();
    }

    Rows rows;
    const bool is_active = rank * STEP_TOKENS < kv_len;  // this block has positions
    if (is_active) {
        const auto is_own = [&](int position) { return position / STEP_TOKENS % ranks == rank; };
        const bool has_newest = is_own(newest);
        HeadPairs q_weight, k_weight;
        if (q_norm != nullptr) q_weight = load_pairs(q_norm);
        if (k_norm != nullptr && (QUERIES > 1 || has_newest)) k_weight = load_pairs(k_norm);
        const int64_t slot = slot_offset(slots[token], group, num_kv_heads, block_size);
        const int num_heads = num_kv_heads * merge.rows;
        const scalar_t* heads = qkv + static_cast<int64_t>(token) * (num_heads + 2 * num_kv_heads) *
                                          HEAD_SIZE;
        if (READ_EARLY) grid_dependency_wait();

        // The heads of q, and of the new positions that are this block's, those of k and v. The
        // rows of the tile behind q's stay as they are: each row has its own sums, and theirs are
        // not sent.
        const HeadPairs angles = load_pairs(rope + static_cast<int64_t>(token) * HEAD_SIZE);
        const int num_fresh = QUERIES > 1 ? number + 1 : has_newest;
        const int num_tasks = merge.rows + 2 * num_fresh;
#pragma unroll 1
        for (int task = warp_id(); task < num_tasks; task += num_warps()) {
            const int rest = max(-1, task - merge.rows);
            const int row = QUERIES > 1 ? max(0, rest) / 2 : 0;  // of the new positions
            const int kind = rest - 2 * row + 1;                 // 0 q, 1 k, 2 v
            if (QUERIES > 1 && kind != 0 && !is_own(fresh_from + row)) continue;
            const int back = kind == 0 ? 0 : number - row;           // tokens before this query's
            const int head = kind == 0 ? group * merge.rows + task
                                       : num_heads + (kind - 1) * num_kv_heads + group;
            const scalar_t* from = heads + head * HEAD_SIZE;
            from -= static_cast<int64_t>(back) * (num_heads + 2 * num_kv_heads) * HEAD_SIZE;
            HeadPairs x = load_pairs(from), turn = angles;
            if (QUERIES > 1 && kind == 1) {
                turn = load_pairs(rope + static_cast<int64_t>(token - back) * HEAD_SIZE);
            }
            if (kind == 0 && q_norm != nullptr) normalize_pairs(x, q_weight, eps);
            if (kind == 1 && k_norm != nullptr) normalize_pairs(x, k_weight, eps);
            if (kind != 2) rotate_pairs(x, turn);
            if (kind == 0) {
                store_tile_row(shared_queries, task, x);
            } else {
#if QUANTIZED
                const scale_t scale = from_float<scale_t>(scale_pairs(x));
                if (lane_id() == 0) {
                    fresh_scales[kind - 1] = scale;
                    (kind == 1 ? key_scales : value_scales)[slot / HEAD_SIZE] = scale;
                }
#endif
                cache_store_pairs(
                    reinterpret_cast<cache_t*>(fresh) + ((kind - 1) * QUERIES + row) * HEAD_SIZE, x);
                if (back == 0) cache_store_pairs((kind == 1 ? key_cache : value_cache) + slot, x);
            }
        }
        block_sync();

        rows.start(shared_queries);
#pragma unroll
        for (int h = 0; h < ROW_HALVES; ++h) rows.limit[0][h] = newest;
#pragma unroll 1
        for (int step = 0; step < num_steps; ++step) {
            cp_async_wait<STAGES - 1>();
            const int position = first_position + step * stride;
            scalar_t* keys = ring + step % STAGES * STAGE;
#if QUANTIZED
            if (STAGES == 1) copies.finish();
#endif
            warp_sync();  // every lane's copies are there
            if (position <= newest && fresh_from < position + STEP_TOKENS) {
#if QUANTIZED
                if (lane_id() < CODE_CHUNKS) {
                    const uint4* from = reinterpret_cast<const uint4*>(fresh) + lane_id();
                    unsigned char* to = reinterpret_cast<unsigned char*>(keys) +
                                        codes_at(newest - position, lane_id());
                    *reinterpret_cast<uint4*>(to) = from[0];
                    *reinterpret_cast<uint4*>(to + 2 * TILE) = from[CODE_CHUNKS];
                }
                if (lane_id() < 2) {
                    *CodeCopies::place_of(keys, newest - position, lane_id()) =
                        fresh_scales[lane_id()];
                }
#else
#pragma unroll 1
                for (int i = lane_id(); i < (number + 1) * ROW_CHUNKS; i += WARP_SIZE) {
                    const int at = fresh_from + i / ROW_CHUNKS - position;
                    if (QUERIES > 1 && (at < 0 || at >= STEP_TOKENS)) continue;
                    const uint4* from = reinterpret_cast<const uint4*>(fresh) + i;
                    const int to = chunk_at(at, i % ROW_CHUNKS);
                    *reinterpret_cast<uint4*>(keys + to) = from[0];
                    *reinterpret_cast<uint4*>(keys + TILE + to) = from[QUERIES * ROW_CHUNKS];
                }
#endif
                warp_sync();
            }
            rows.attend(keys, position, position + STEP_TOKENS > kv_len, scale * LOG2_E);
            warp_sync();  // nobody reads the stage that the next copies take
            copy_step(step + STAGES);
        }
        rows.finish();
    } else if (READ_EARLY) {
        grid_dependency_wait();
    }

    // Every block of the cluster has started, and has its inbox.
    if (CLUSTERED && ranks > 1) cluster_wait();
    if (num_steps > 0) merge.send(rows, source);
    if (CLUSTERED && ranks > 1) {
        wait_for_inbox(merge.inbox);
    } else {
        block_sync();
    }
    const int64_t first_head = static_cast<int64_t>(token) * num_kv_heads + group;
    merge.receive(out + first_head * merge.rows * HEAD_SIZE);
#endif
}
