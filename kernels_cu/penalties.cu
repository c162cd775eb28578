// Penalties of requests that sample step after step: what they have seen stays on the device.
//
// A request has a slot: a record of its parameters, and a word for each token of the vocabulary.
// Slot 0 is nobody's. A record is int32 words: NUM_BIASES and so on as named below, the floats as
// their bits, then pairs from ENTRIES on: first the biases, a token and what is added to its logit,
// then the banned tokens, with a word that is not used.
#include "types.cuh"

enum RecordWord {
    NUM_BIASES,
    NUM_BANNED,
    BAN_LEFT,    // draws that must not give a banned token
    REPETITION,  // float, not 0
    PRESENCE,    // float
    FREQUENCY,   // float
    COUNTS,      // whether tokens are counted at all
    ENTRIES = 8,
};
// Of a token's word: how often it was drawn, up to MOST; the bit above, whether the prompt has it.
constexpr int MOST = 0x7fff;

// Changes a row's logits by a slot that is not 0: this block's part of the row, all threads alike.
// row float [V]; slot's records and counts as penalize_slots has them; of the num_before tokens at
// `before`, at most 32, each counts once more.
__device__ __forceinline__ void penalize_row(
    float* row, int slot, const int32_t* records, const uint16_t* counts, const int32_t* before,
    int num_before, int V, int R, int W) {
    const int32_t* record = records + static_cast<int64_t>(slot) * R;
    const float* values = reinterpret_cast<const float*>(record);
    const int part = (W / 8 + gridDim.y - 1) / gridDim.y * 8;
    const int start = blockIdx.y * part, end = min(start + part, V);

    const int32_t* entry = record + ENTRIES;
    for (int i = threadIdx.x; i < record[NUM_BIASES]; i += blockDim.x) {
        const int token = entry[2 * i];
        if (start <= token && token < end) row[token] += values[ENTRIES + 2 * i + 1];
    }
    block_sync();  // a token may have a bias and have been seen
    if (record[COUNTS]) {
        const float repetition = values[REPETITION], presence = values[PRESENCE];
        const float frequency = values[FREQUENCY];
        const uint16_t* seen = counts + static_cast<int64_t>(slot) * W;
        const auto penalize = [&](int token, int count) {
            float logit = row[token];
            logit = logit > 0 ? logit / repetition : logit * repetition;
            if (count > 0) logit -= presence;
            row[token] = logit - frequency * static_cast<float>(count);
        };
        for (int t = start + 8 * static_cast<int>(threadIdx.x); t < end; t += 8 * blockDim.x) {
            const Vec<uint16_t, 8> words = load_vec<uint16_t, 8>(seen + t);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (words.data[i] == 0) continue;
                bool is_draft = false;
                for (int n = 0; n < num_before; ++n) is_draft |= before[n] == t + i;
                if (!is_draft) penalize(t + i, words.data[i] & MOST);
            }
        }
        // A thread for each draft, the first of equal ones.
        const int n = threadIdx.x;
        if (n < num_before && start <= before[n] && before[n] < end) {
            int count = 0;
            bool is_first = true;
            for (int m = 0; m < num_before; ++m) {
                if (before[m] != before[n]) continue;
                ++count;
                is_first &= m >= n;
            }
            if (is_first) penalize(before[n], min((seen[before[n]] & MOST) + count, MOST));
        }
    }
    if (record[BAN_LEFT] <= num_before) return;
    block_sync();  // and be banned
    entry += 2 * record[NUM_BIASES];
    for (int i = threadIdx.x; i < record[NUM_BANNED]; i += blockDim.x) {
        const int token = entry[2 * i];
        if (start <= token && token < end) row[token] = -infinity();
    }
}

// penalize_slots: logit bias, banned tokens, repetition, presence and frequency penalties, in place
// grid (S, parts of a row), block any multiple of 32, no shared memory
// logits   float [S, V]
// slots    int32 [S]: 0 leaves a row as it is
// records  int32 [P, R]: tokens distinct among the biases, each in [0, V)
// counts   uint16 [P, W]: zero from V on; W a multiple of 8, rows aligned to 16 bytes
// REF: numpy_ops.penalize
// COST: 2 * V bytes a row with a slot that counts, and 8 bytes for each token that it has seen
extern "C" __global__ void __launch_bounds__(1024) penalize_slots(
    float* logits, const int32_t* slots,
    const int32_t* records, const uint16_t* counts,
    int32_t V, int32_t R, int32_t W) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int slot = slots[blockIdx.x];
    if (slot == 0) return;
    float* row = logits + static_cast<int64_t>(blockIdx.x) * V;
    penalize_row(row, slot, records, counts, nullptr, 0, V, R, W);
}

// count_tokens: what was drawn counts for the penalties of the next draw
// grid ceil(S / block), block any multiple of 32, no shared memory
// sampled  int32 [S]; -1 (no token could be drawn) is not counted
// slots    int32 [S]: 0 counts nothing; the others are distinct
// records  int32 [P, R]: BAN_LEFT is one less, down to 0
// counts   uint16 [P, W]: the token's word one more, up to MOST
// REF: engine.request.Request.output_counts
// COST: about 24 * S bytes
extern "C" __global__ void __launch_bounds__(1024) count_tokens(
    const int32_t* sampled, const int32_t* slots,
    int32_t* records, uint16_t* counts,
    int32_t S, int32_t R, int32_t W) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int s = blockIdx.x * blockDim.x + threadIdx.x;
    if (s >= S || slots[s] == 0) return;
    int32_t* record = records + static_cast<int64_t>(slots[s]) * R;
    if (record[BAN_LEFT] > 0) record[BAN_LEFT] -= 1;
    if (!record[COUNTS] || sampled[s] < 0) return;
    uint16_t* word = counts + static_cast<int64_t>(slots[s]) * W + sampled[s];
    if ((*word & MOST) < MOST) *word += 1;
}

// set_token_counts: the words of what a request has seen, when it gets a slot
// grid ceil(count / block), block any multiple of 32, no shared memory
// pairs   int32 [count, 2]: a token, in [0, W), and its word; tokens are distinct
// counts  uint16 [W], of the slot; cleared before
// REF: engine.device_penalties.PenaltySlots
// COST: 10 * count bytes
extern "C" __global__ void __launch_bounds__(1024) set_token_counts(
    const int32_t* pairs, uint16_t* counts, int32_t count) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) counts[pairs[2 * i]] = static_cast<uint16_t>(pairs[2 * i + 1]);
}

// penalize_draft_rows: penalize_slots for rows that take drafts before them for granted
// grid (T, parts of a row), block any multiple of 32, no shared memory
// logits        float [T, V]
// row_places    int32 [T], the place of each row; -1 leaves it as it is
// drafts        int32 [T]; a row's are those behind its place's first row, up to its own
// query_starts  int32 [B + 1], the first row of each place, of at most 32
// slots         int32 [B], of the places: 0 leaves their rows as they are
// records, counts  see penalize_slots; of a row's drafts each counts once more
// REF: numpy_ops.penalize
// COST: as penalize_slots
extern "C" __global__ void __launch_bounds__(1024) penalize_draft_rows(
    float* logits, const int32_t* row_places, const int32_t* drafts, const int32_t* query_starts,
    const int32_t* slots, const int32_t* records, const uint16_t* counts,
    int32_t V, int32_t R, int32_t W) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int place = row_places[blockIdx.x];
    const int slot = place < 0 ? 0 : slots[place];
    if (slot == 0) return;
    const int first = query_starts[place];
    penalize_row(
        logits + static_cast<int64_t>(blockIdx.x) * V, slot, records, counts, drafts + first + 1,
        blockIdx.x - first, V, R, W);
}

// count_accepted: count_tokens for places that check drafts: those that were right, and one more
// grid ceil(B / block), block any multiple of 32, no shared memory
// sampled  int32 [any], what was chosen after each row; -1 is not counted
// drafts, query_starts, slots, records, counts  as penalize_draft_rows and count_tokens have them;
//     slots that are not 0 are distinct
// REF: engine.request.Request.output_counts
// COST: about 100 * B bytes
extern "C" __global__ void __launch_bounds__(1024) count_accepted(
    const int32_t* sampled, const int32_t* drafts, const int32_t* query_starts,
    const int32_t* slots, int32_t* records, uint16_t* counts, int32_t B, int32_t R, int32_t W) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int b = blockIdx.x * blockDim.x + threadIdx.x;
    if (b >= B || slots[b] == 0) return;
    int32_t* record = records + static_cast<int64_t>(slots[b]) * R;
    uint16_t* seen = counts + static_cast<int64_t>(slots[b]) * W;
    const int last = query_starts[b + 1];
    for (int row = query_starts[b]; row < last; ++row) {
        const int token = sampled[row];
        if (record[BAN_LEFT] > 0) record[BAN_LEFT] -= 1;
        if (record[COUNTS] && token >= 0 && (seen[token] & MOST) < MOST) seen[token] += 1;
        if (row + 1 == last || token != drafts[row + 1]) break;
    }
}
