// The decode batch that lives on the device: what moves it on at the end of a step.
#include "types.cuh"

// advance_decode_state: every sequence takes its sampled token and moves one position on
// grid ceil(B / block), block any multiple of 32, no shared memory
// sampled       int32 [B], of the sampler; -1 (no token could be drawn) counts as 0
// block_tables  int32 [B, M]: holds the block of the next position, or 0 beyond those owned
// token_ids     int32 [B], becomes sampled
// positions     int32 [B], of the token in token_ids: one more
// kv_lens       int32 [B]: one more; 0 marks a free place, where nothing is changed
// slots         int32 [B], becomes the slot of the new position
// rope_lens     int32 [B], or null: at least the new kv length
// counters      uint32 [B, 2], position and sample index of the next draw: position one more
// A sequence at the end of its table (M * P positions) keeps its position and writes to the null
// block: the host, which sees results a step late, may run it once too often.
// REF: engine.batch.build_batch, build_sampler_batch of the next step
// COST: about 44 * B bytes
extern "C" __global__ void __launch_bounds__(1024) advance_decode_state(
    const int32_t* sampled, const int32_t* block_tables,
    int32_t* token_ids, int32_t* positions,
    int32_t* kv_lens, int32_t* slots, int32_t* rope_lens,
    uint32_t* counters, int32_t B, int32_t M, int32_t P) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int b = blockIdx.x * blockDim.x + threadIdx.x;
    if (b >= B || kv_lens[b] == 0) return;
    token_ids[b] = max(sampled[b], 0);  // an index of the embedding, whatever happens
    const int position = positions[b] + 1;
    if (position / P >= M) {
        slots[b] = position % P;
        return;
    }
    positions[b] = position;
    kv_lens[b] = position + 1;
    slots[b] = block_tables[static_cast<int64_t>(b) * M + position / P] * P + position % P;
    if (rope_lens != nullptr) rope_lens[b] = max(rope_lens[b], position + 1);
    counters[2 * b] += 1;
}

// resolve_tokens: tokens that the host has not read yet are put in: -1 - r stands for sampled[r]
// grid ceil(T / block), block any multiple of 32, no shared memory
// token_ids  int32 [T], in place; those from 0 on stay
// sampled    int32 [any], what the step before drew; -1 counts as 0
// REF: engine.decode_state.DecodeState.updates
// COST: 12 * T bytes
extern "C" __global__ void __launch_bounds__(1024) resolve_tokens(
    int32_t* token_ids, const int32_t* sampled, int32_t T) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int t = blockIdx.x * blockDim.x + threadIdx.x;
    if (t < T && token_ids[t] < 0) token_ids[t] = max(sampled[-1 - token_ids[t]], 0);
}

// apply_updates: single words of the decode state change, as the host says between two steps
// grid ceil(count / block), block any multiple of 32, no shared memory
// updates  int32 [count, 2]: index into state, then its new value; indices are distinct
// state    int32 [any]: every index lies in it
// REF: engine.decode_state.DecodeState.updates
// COST: 12 * count bytes
extern "C" __global__ void __launch_bounds__(1024) apply_updates(
    const int32_t* updates, int32_t* state, int32_t count) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) state[updates[2 * i]] = updates[2 * i + 1];
}
