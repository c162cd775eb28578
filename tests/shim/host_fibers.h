// Threads of a block as fibers: what they are, how they wait for one another, copies under way.
//
// A fiber runs until it waits. Knows nothing of what the collectives compute, nor of the grid.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "host_context.h"

namespace shim {

// ------------------------------------------------------------------------------ a block's threads

struct Index3 {
    unsigned x, y, z;
};

struct AsyncCopy {
    char* to;
    const char* from;  // null: zeros
    int group;
    int num_bytes;
};

// What a waiting lane brought to a warp collective.
struct Arrival {
    void (*perform)(void** lanes, uint32_t mask);
    void* payload;
    uint32_t mask;
    int line;
    const char* what;
};

enum State { READY, AT_BARRIER, AT_COLLECTIVE, DONE };

constexpr int MAX_PENDING_COPIES = 512;
constexpr size_t STACK_BYTES = 128 << 10;  // as in driver.py
constexpr int MAX_IDLE_ROUNDS = 20000;

struct Fiber {
    Context context;
    State state;
    bool paused;  // in a loop that waits for somebody's store
    Index3 thread;
    int lane, warp;
    int barrier_id, barrier_threads, line;
    Arrival arrival;
    int num_copies, group;
    AsyncCopy* copies;
    bool at_cluster;         // has arrived at the cluster's barrier and not waited yet
    unsigned cluster_phase;  // which the barrier was in
};

struct Block {
    Index3 index;
    Fiber* fibers;
    uint32_t waiting[32];  // lanes of each warp that wait at a collective
    int arrived[16];       // threads at each barrier
    int num_done;
    char* static_copy;  // shared memory while another block runs
    char* dynamic_copy;
    bool started;
    uint64_t* barriers[128];  // that were made, while bytes are counted on them
    int num_barriers;
    int cluster_arrived;     // threads at the cluster's barrier; counted in its first block
    unsigned cluster_phase;
};

// What Python fills in.
struct Shape {
    unsigned grid[3];
    unsigned block;
    unsigned shared_bytes;
    unsigned order;     // 0 forward, 1 reversed, other: the seed of a shuffle; from 1000 on, copies
                        // that land together land in reverse, as nothing orders them
    unsigned resident;  // 1: all blocks at once, for kernels whose blocks wait for one another
    unsigned cluster;   // blocks along x that make a cluster, which is resident as a whole
    char* stacks;       // STACK_BYTES for each thread of what runs at once: block, cluster, grid
};

static Fiber* self;
static Block* block;
static Index3 block_size, grid_size;
static unsigned cluster_blocks = 1;
static Context scheduler_context;
static const char* kernel_name;
static void (*call_kernel)(void*);
static void* call_arguments;
static char error_text[600];
static bool failed;
static bool lands_backwards;
static char* dynamic_start;
static size_t dynamic_bytes;

static char* static_start;  // the kernels' __shared__ variables
static size_t static_bytes;

inline bool in_shared(const void* p, size_t bytes) {
    const char* c = static_cast<const char*>(p);
    return (c >= static_start && c + bytes <= static_start + static_bytes) ||
           (c >= dynamic_start && c + bytes <= dynamic_start + dynamic_bytes);
}

inline void to_scheduler() { shim_switch(&self->context, scheduler_context); }

// Notes the first failure and leaves the fiber for good.
[[noreturn]] __attribute__((format(printf, 1, 2), noinline)) static void fail(
    const char* format, ...) {
    if (!failed) {
        failed = true;
        char what[360];
        va_list list;
        va_start(list, format);
        vsnprintf(what, sizeof what, format, list);
        va_end(list);
        snprintf(error_text, sizeof error_text, "%s, block (%u, %u, %u), thread %u: %s",
                 kernel_name, block->index.x, block->index.y, block->index.z, self->thread.x, what);
    }
    self->state = DONE;
    to_scheduler();
    abort();
}

// ------------------------------------------------------------------------------ waiting

inline void wait_in(State state, int line) {
    self->state = state;
    self->line = line;
    to_scheduler();
}

inline void barrier(int id, int threads, int line) {
    if (id < 0 || id > 15) fail("line %d: barrier %d does not exist", line, id);
    if (threads % 32 || threads <= 0) fail("line %d: a barrier of %d threads", line, threads);
    self->barrier_id = id;
    self->barrier_threads = threads;
    if (++block->arrived[id] < threads) {
        wait_in(AT_BARRIER, line);
        return;
    }
    block->arrived[id] = 0;
    for (unsigned i = 0; i < block_size.x; ++i) {
        Fiber& other = block->fibers[i];
        if (other.state != AT_BARRIER || other.barrier_id != id) continue;
        if (id == 0 && other.line != line) {
            fail("divergent barrier: it came to line %d, thread %u to line %d", line,
                 other.thread.x, other.line);
        }
        if (other.barrier_threads != threads) fail("line %d: barrier counts differ", line);
        other.state = READY;
    }
}

// The last lane of the mask to come does the work for all.
inline void collective(
    const char* what, void (*perform)(void**, uint32_t), void* payload, uint32_t mask, int line) {
    Fiber* warp = block->fibers + self->warp * 32;
    uint32_t& waiting = block->waiting[self->warp];
    const uint32_t bit = 1u << self->lane;
    if (!(mask & bit)) fail("line %d: %s with mask %08x, which lacks the lane", line, what, mask);
    self->arrival = {perform, payload, mask, line, what};
    waiting |= bit;
    if ((waiting & mask) != mask) {
        wait_in(AT_COLLECTIVE, line);
        return;
    }
    void* payloads[32] = {};
    for (int i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        const Arrival& other = warp[i].arrival;
        if (other.perform != perform || other.mask != mask || other.line != line) {
            fail("line %d: %s with mask %08x, while lane %d is at line %d: %s with mask %08x", line,
                 what, mask, i, other.line, other.what, other.mask);
        }
        payloads[i] = other.payload;
        warp[i].state = READY;
    }
    waiting &= ~mask;
    perform(payloads, mask);
}

inline void pause() {
    self->paused = true;
    to_scheduler();
}

// ------------------------------------------------------------------------------ clusters

// Blocks of a cluster lie one behind the other, ranks in order.
inline Block* block_of_rank(int rank) {
    return block - int(block->index.x % cluster_blocks) + rank;
}

inline void arrive_at_cluster(int line) {
    Block* first = block_of_rank(0);
    if (self->at_cluster) fail("line %d: came twice to the cluster's barrier", line);
    self->at_cluster = true;
    self->cluster_phase = first->cluster_phase;
    if (++first->cluster_arrived == int(cluster_blocks * block_size.x)) {
        first->cluster_arrived = 0;
        ++first->cluster_phase;
    }
}

inline void wait_for_cluster(int line) {
    Block* first = block_of_rank(0);
    if (!self->at_cluster) fail("line %d: waits for a cluster it has not come to", line);
    while (first->cluster_phase == self->cluster_phase) pause();
    self->at_cluster = false;
}

// Where the block of a rank has what lies at `own` here.
inline void* place_at_rank(void* own, size_t bytes, int rank, int line) {
    if (rank < 0 || rank >= int(cluster_blocks)) fail("line %d: no rank %d", line, rank);
    if (!in_shared(own, bytes)) fail("line %d: not a place in shared memory", line);
    if (uintptr_t(own) % bytes) fail("line %d: not aligned to %d", line, int(bytes));
    Block* to = block_of_rank(rank);
    if (to == block) return own;
    if (!to->started) fail("line %d: the block of rank %d may not have started", line, rank);
    if (to->num_done) fail("line %d: the block of rank %d may have ended", line, rank);
    char* at = static_cast<char*>(own);
    if (at >= static_start && at < static_start + static_bytes) {
        return to->static_copy + (at - static_start);
    }
    return to->dynamic_copy + (at - dynamic_start);
}

// ------------------------------------------------------------------------------ async copies

inline void copy_async(void* to, const void* from, int line, int num_bytes = 16) {
    if (!in_shared(to, num_bytes)) fail("line %d: cp.async not into shared memory", line);
    if ((uintptr_t(to) | uintptr_t(from)) & (num_bytes - 1)) {
        fail("line %d: cp.async not aligned to %d", line, num_bytes);
    }
    if (self->num_copies == MAX_PENDING_COPIES) fail("line %d: too many copies under way", line);
    memset(to, 0xff, num_bytes);
    self->copies[self->num_copies++] = {
        static_cast<char*>(to), static_cast<const char*>(from), self->group, num_bytes};
}

// The copies of all but the newest `left` groups land now. Those that no commit has closed are not
// in any group, and stay under way.
inline void land_copies(int left) {
    const int count = self->num_copies;
    for (int turn = 0; turn < count; ++turn) {
        const AsyncCopy copy = self->copies[lands_backwards ? count - 1 - turn : turn];
        if (copy.group >= self->group - left) continue;
        if (copy.from) {
            memcpy(copy.to, copy.from, copy.num_bytes);
        } else {
            memset(copy.to, 0, copy.num_bytes);
        }
    }
    int kept = 0;
    for (int i = 0; i < count; ++i) {
        if (self->copies[i].group >= self->group - left) self->copies[kept++] = self->copies[i];
    }
    self->num_copies = kept;
}

}  // namespace shim
