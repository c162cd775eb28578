// Token embedding.
#include "types.cuh"

// embed_rows: rows of the embedding table, one for each token
// grid T, block any multiple of 32, no shared memory
// token_ids  int32 [T], each in [0, V)
// table      scalar_t [V, D]
// out        residual_t [T, D]
// D          any width; rows are moved 16 bytes at a time where they can be
// REF: numpy_ops.embed
// COST: T * D * (sizeof(scalar_t) + sizeof(residual_t)) bytes, no flops
extern "C" __global__ void __launch_bounds__(1024) embed_rows(
    const int32_t* token_ids, const scalar_t* table,
    residual_t* out, int32_t D) {
    grid_dependency_launch();
    grid_dependency_wait();
    const scalar_t* from = table + static_cast<int64_t>(token_ids[blockIdx.x]) * D;
    residual_t* to = out + static_cast<int64_t>(blockIdx.x) * D;
    constexpr int N = Wide<scalar_t>::N;
    if (sizeof(scalar_t) == sizeof(residual_t) && rows_are_wide(table, D) && is_aligned_16(out)) {
        for (int i = threadIdx.x * N; i < D; i += blockDim.x * N) {
            float values[N];
            load_floats<scalar_t, N>(from + i, values);
            store_floats<residual_t, N>(to + i, values);
        }
    } else {
        for (int i = threadIdx.x; i < D; i += blockDim.x) {
            to[i] = from_float<residual_t>(to_float(from[i]));
        }
    }
}
