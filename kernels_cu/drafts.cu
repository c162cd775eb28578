// Steps that check drafts of sequences of the decode batch: what they read, and how it moves on.
//
// Rows of a step lie one behind the other: of each place its own token, then its drafts. Which row is
// whose, and the drafts, come from the host; all else is in the decode batch already.
#include "decode_state.cuh"
#include "types.cuh"

// lay_out_drafts: the inputs of a step that checks drafts, from the decode batch
// grid ceil(max(T, B) / block), block any multiple of 32, no shared memory
// row_places    int32 [T], the place of each row; -1 for padding
// drafts        int32 [T], the token of each row but a place's first, which has the place's own
// query_starts  int32 [B + 1], the first row of each place; a place may have none
// places        see decode_state.cuh, all but slots read: a place's position is its first row's
// seeds uint64 [B]; temperature, top_p, min_p float32 [B]; top_k int32 [B]: of the places
// row_tokens, row_positions, row_slots, row_rope_lens, sample_rows  int32 [T], written
// row_kv_lens   int32 [B], written: with all rows of the place; 0 where it has none
// row_seeds uint64 [T], row_counters uint32 [T, 2], row_temperature, row_top_p, row_min_p float32
//     [T], row_top_k int32 [T]: written; padding is greedy, of no place, in the null block
// REF: engine.batch.build_batch and build_sampler_batch
// COST: 100 * T bytes
extern "C" __global__ void __launch_bounds__(1024) lay_out_drafts(
    const int32_t* row_places, const int32_t* drafts, const int32_t* query_starts,
    PLACES_PARAMETERS, const uint64_t* seeds, const float* temperature, const int32_t* top_k,
    const float* top_p, const float* min_p, int32_t* row_tokens, int32_t* row_positions,
    int32_t* row_slots, int32_t* row_rope_lens, int32_t* row_kv_lens, int32_t* sample_rows,
    uint64_t* row_seeds, uint32_t* row_counters, float* row_temperature, int32_t* row_top_k,
    float* row_top_p, float* row_min_p, int32_t T, int32_t B) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t < B) {
        const int count = query_starts[t + 1] - query_starts[t];
        row_kv_lens[t] = count > 0 ? positions[t] + count : 0;
    }
    if (t >= T) return;
    const int b = row_places[t];
    const int number = b < 0 ? 0 : t - query_starts[b];
    const int position = b < 0 ? 0 : positions[b] + number;
    const int column = position / block_size;
    const bool has_slot = b >= 0 && column < M;
    const int64_t entry = static_cast<int64_t>(b) * M + column;
    row_tokens[t] = b < 0 ? 0 : number == 0 ? token_ids[b] : drafts[t];
    row_positions[t] = position;
    row_slots[t] = has_slot ? block_tables[entry] * block_size + position % block_size : 0;
    row_rope_lens[t] = b < 0 || rope_lens == nullptr ? 1 : max(rope_lens[b], position + 1);
    sample_rows[t] = t;
    row_seeds[t] = b < 0 ? 0 : seeds[b];
    row_counters[2 * t] = b < 0 ? 0 : counters[2 * b] + number;
    row_counters[2 * t + 1] = b < 0 ? 0 : counters[2 * b + 1];
    row_temperature[t] = b < 0 ? 0.0f : temperature[b];
    row_top_k[t] = b < 0 ? -1 : top_k[b];
    row_top_p[t] = b < 0 ? 1.0f : top_p[b];
    row_min_p[t] = b < 0 ? 0.0f : min_p[b];
}

// force_drafts: for benches, what was chosen becomes what the drafts say, where they shall be right
// grid ceil(T / block), block any multiple of 32, no shared memory
// sampled       int32 [T], what was chosen after each row; in place
// drafts        int32 [T], as lay_out_drafts has them
// forced        int32 [T]: above 0 where the row's draft shall be what the row before it chose
// REF: engine.runner.Runner.force_acceptance
// COST: 12 * T bytes
extern "C" __global__ void __launch_bounds__(1024) force_drafts(
    int32_t* sampled, const int32_t* drafts, const int32_t* forced, int32_t T) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t + 1 < T && forced[t + 1] > 0) sampled[t] = drafts[t + 1];
}

// accept_drafts: each place moves on by its right drafts and the token after them
// grid ceil(B / block), block any multiple of 32, no shared memory
// sampled       int32 [any], what was chosen after each row; -1 is right for no draft
// drafts, query_starts, places  as lay_out_drafts has them; places move on, those without rows stay
// A draft is right where the row before it chose it, and all drafts before it are right.
// REF: speculation.acceptance.count_right
// COST: 60 * B bytes
extern "C" __global__ void __launch_bounds__(1024) accept_drafts(
    const int32_t* sampled, const int32_t* drafts, const int32_t* query_starts, PLACES_PARAMETERS,
    int32_t B) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int b = blockIdx.x * blockDim.x + threadIdx.x;
    if (b >= B || kv_lens[b] == 0) return;
    const int first = query_starts[b], last = query_starts[b + 1];
    if (first >= last) return;
    int row = first;
    while (row + 1 < last && sampled[row] == drafts[row + 1]) ++row;
    const int count = row - first + 1;
    const int position = positions[b] + count;
    const int column = position / block_size;
    const bool has_room = column < M;
    const int64_t entry = static_cast<int64_t>(b) * M + column;
    token_ids[b] = max(sampled[row], 0);  // an index of the embedding, whatever happens
    slots[b] = position % block_size + (has_room ? block_tables[entry] * block_size : 0);
    if (!has_room) return;
    positions[b] = position;
    kv_lens[b] = position + 1;
    if (rope_lens != nullptr) rope_lens[b] = max(rope_lens[b], position + 1);
    counters[2 * b] += count;
}
