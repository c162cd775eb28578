// The decode batch that lives on the device: what changes it between two steps.
#include "types.cuh"

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
