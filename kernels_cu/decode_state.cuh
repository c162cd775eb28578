// How a place of the decode batch, which lives on the device, moves on at the end of a step.
//
// The kernel that finds a row's token does it, with what it has read before: only token_ids needs
// the token, so that stores alone are left when it is known.
#pragma once

#include "device.cuh"

// Arrays of B places, B the rows of logits; kv_lens null: there is no decode batch, nothing moves.
//   block_tables  int32 [B, M]: holds the block of the next position, or 0 beyond those owned
//   token_ids     int32 [B], becomes the row's token; -1 (none could be drawn) counts as 0
//   positions     int32 [B], of the token in token_ids: one more
//   kv_lens       int32 [B]: one more; 0 marks a free place, where nothing is changed
//   slots         int32 [B], becomes the slot of the new position
//   rope_lens     int32 [B], or null: at least the new kv length
//   counters      uint32 [B, 2], position and sample index of the next draw: position one more
// A sequence at the end of its table (M * block_size positions) keeps its position and writes to
// the null block: the host, which sees results a step late, may run it once too often.
#define PLACES_PARAMETERS                                                                          \
    const int32_t *block_tables, int32_t *token_ids, int32_t *positions, int32_t *kv_lens,         \
        int32_t *slots, int32_t *rope_lens, uint32_t *counters, int32_t M, int32_t block_size
#define PLACES \
    {block_tables, token_ids, positions, kv_lens, slots, rope_lens, counters, M, block_size}

struct Places {
    const int32_t* block_tables;
    int32_t *token_ids, *positions, *kv_lens, *slots, *rope_lens;
    uint32_t* counters;
    int32_t table_width, block_size;
};

// What a place becomes, but for its token. In three steps, by one thread, so that other work can
// lie between what is asked of memory and the use of it.
struct NextPlace {
    int32_t position, kv_len, rope_len, slot;  // kv_len: before; the others: next
    uint32_t count;
    bool has_room;

    __device__ __forceinline__ void look(const Places& places, int b) {
        kv_len = 0;
        if (places.kv_lens == nullptr) return;
        kv_len = places.kv_lens[b];
        position = places.positions[b] + 1;
        count = places.counters[2 * b] + 1;
        if (places.rope_lens != nullptr) rope_len = max(places.rope_lens[b], position + 1);
    }

    __device__ __forceinline__ void find_slot(const Places& places, int b) {
        if (kv_len == 0) return;
        const int column = position / places.block_size;
        slot = position % places.block_size;
        has_room = column < places.table_width;
        if (!has_room) return;
        const int64_t entry = static_cast<int64_t>(b) * places.table_width + column;
        slot += places.block_tables[entry] * places.block_size;
    }

    __device__ __forceinline__ void store(const Places& places, int b, int32_t token) const {
        if (kv_len == 0) return;
        places.token_ids[b] = max(token, 0);  // an index of the embedding, whatever happens
        places.slots[b] = slot;
        if (!has_room) return;
        places.positions[b] = position;
        places.kv_lens[b] = position + 1;
        if (places.rope_lens != nullptr) places.rope_lens[b] = rope_len;
        places.counters[2 * b] = count;
    }
};
