// What the two prefill attention kernels share: which rows a block works on, and where they lie.
//
// Rows: the query heads that share a key/value head are packed, so sequence b has
// (queries of b) * R rows for each of them, R = H / G, row = query * R + head; a tile is a run of
// rows of one sequence and one key/value head. Blocks of the grid come in slots of a tile each;
// sequence b owns the slots from query_starts[b] * R / tile + b on, which is always enough of them,
// so that the grid needs T and B alone and a captured launch stays right when lengths change.
// Within a sequence the longest tiles come first.
#pragma once

#include "device.cuh"
#include "reduce.cuh"
#include "types.cuh"

#ifndef HEAD_SIZE
#error "define HEAD_SIZE: values of a head"
#endif

constexpr float LOG2_E = 1.4426950408889634f;

// The rows that one block works on.
struct RowTile {
    int sequence;
    int first_token;     // of the sequence, in the flat batch
    int first_position;  // of the sequence's first query
    int first_row;       // of the tile, in the sequence
    int num_rows;        // of the sequence
    int num_keys;        // positions that the tile's last row sees
};

// The tile of a slot; false where the slot is one of the unused. Every lane of the warp must come.
__device__ __forceinline__ bool find_tile(
    const int32_t* query_starts, const int32_t* kv_lens, int num_sequences, int group,
    int tile_rows, int slot, RowTile& tile) {
    // The last sequence whose first slot is not behind `slot`, 32 candidates at a time.
    int sequence = 0, count = num_sequences;
    while (count > 1) {
        const int step = (count + 31) / 32, index = lane_id() * step;
        const int candidate = sequence + min(index, count - 1);
        const bool starts =
            index < count && query_starts[candidate] * group / tile_rows + candidate <= slot;
        const int skipped = (count_bits(warp_ballot(starts)) - 1) * step;
        sequence += skipped;
        count = min(step, count - skipped);
    }
    const int start = query_starts[sequence];
    const int num_queries = query_starts[sequence + 1] - start;
    const int index = slot - (start * group / tile_rows + sequence);
    const int num_tiles = (num_queries * group + tile_rows - 1) / tile_rows;
    if (index >= num_tiles) return false;
    tile.sequence = sequence;
    tile.first_token = start;
    tile.first_position = kv_lens[sequence] - num_queries;
    tile.first_row = (num_tiles - 1 - index) * tile_rows;
    tile.num_rows = num_queries * group;
    const int last_row = min(tile.first_row + tile_rows, tile.num_rows) - 1;
    tile.num_keys = tile.first_position + last_row / group + 1;
    return true;
}

// Where a position's key and value begin in a cache [N, G, P, d], in elements.
__device__ __forceinline__ int64_t cache_offset(
    const int32_t* table, int position, int block_size, int num_kv_heads, int kv_head) {
    const int column = position / block_size, row = position - column * block_size;
    const int64_t block = table[column];
    return ((block * num_kv_heads + kv_head) * block_size + row) * HEAD_SIZE;
}

// Where a row of the sequence begins in q and out [T, H, d], in elements.
__device__ __forceinline__ int64_t query_offset(
    const RowTile& tile, int row, int group, int num_heads, int kv_head) {
    const int query = row / group, head = row - query * group;
    const int64_t token = tile.first_token + query;
    return (token * num_heads + kv_head * group + head) * HEAD_SIZE;
}
