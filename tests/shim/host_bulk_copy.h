// Barriers that count bytes, and their copies, on the host: a copy poisons its target when it starts
// and lands when somebody waits for its barrier.
//
// A barrier's 8 bytes: arrivals of a phase, those still to come, the phase, bytes still to land.
#pragma once

#define HAS_BULK_COPY (!FORCE_PLAIN)

namespace shim {

struct BytesBarrier {
    uint8_t arrivals, pending, parity, is_made;
    int32_t bytes;
};

// What Python puts into the bytes of a tensor map: a matrix of 16-bit values, and a box of it.
struct HostMap {
    static constexpr uint64_t MAGIC = 0x2d70616d2d324478;
    uint64_t magic;
    const char* start;
    int64_t rows, columns, row_bytes;
    int32_t box_rows, box_columns;
};

struct BulkCopy {
    Block* owner;
    char* to;
    const char* from;  // null: a box
    int num_bytes;
    BytesBarrier* barrier;
    HostMap map;
    int column, row;
    uint32_t address;  // of `to`, by which its pieces are exchanged
    bool from_other;   // block: it may be there before its bytes are announced
    Block* source;     // whose shared memory has `from`, a place of the running block's; or null
};

// Rows of 64 values, zeros outside the matrix, pieces of 16 bytes exchanged by the row's number.
inline void land_box(const BulkCopy& copy) {
    const HostMap& map = copy.map;
    for (int row = 0; row < map.box_rows; ++row) {
        for (int piece = 0; piece < 8; ++piece) {
            uint32_t offset = row * 128 + piece * 16;
            offset = (copy.address + offset ^ (copy.address + offset >> 7 & 7) << 4) - copy.address;
            const int64_t from_row = copy.row + row, column = copy.column + piece * 8;
            for (int i = 0; i < 8; ++i) {
                const bool inside = from_row < map.rows && column + i < map.columns;
                const char* from = map.start + from_row * map.row_bytes + (column + i) * 2;
                if (inside) {
                    memcpy(copy.to + offset + i * 2, from, 2);
                } else {
                    memset(copy.to + offset + i * 2, 0, 2);
                }
            }
        }
    }
}

constexpr int MAX_BULK_COPIES = 1 << 14;
static BulkCopy bulk_copies[MAX_BULK_COPIES];
static int num_bulk_copies;

inline BytesBarrier* bytes_barrier(uint64_t* p, int line) {
    static_assert(sizeof(BytesBarrier) == 8, "a barrier has 8 bytes");
    if (!in_shared(p, 8)) fail("line %d: a barrier not in shared memory", line);
    auto* barrier = reinterpret_cast<BytesBarrier*>(p);
    if (barrier->is_made != 0x5a) fail("line %d: a barrier that was not made", line);
    return barrier;
}

// What lies where a barrier was may change when an arrival at it comes late.
static void check_barriers() {
    for (int i = 0; i < block->num_barriers; ++i) {
        auto* barrier = reinterpret_cast<BytesBarrier*>(block->barriers[i]);
        if (barrier->is_made != 0x5a) fail("something was put where a barrier is");
    }
}
[[maybe_unused]] static const bool checks_barriers = (block_ends = check_barriers, true);

// Lanes that have stored what the copy engine or products will read, and not fenced since.
static bool has_stored[8 * 1024];
inline bool& stored(int lane) {
    return has_stored[block->index.x % cluster_blocks * 1024 + self->warp * 32 + lane];
}

inline void end_phase_if_complete(BytesBarrier* barrier) {
    if (barrier->pending || barrier->bytes) return;
    barrier->parity ^= 1;
    barrier->pending = barrier->arrivals;
}

inline void arrive_at_bytes(uint64_t* p, int num_bytes, int line) {
    BytesBarrier* barrier = bytes_barrier(p, line);
    if (!barrier->pending) fail("line %d: more arrivals than the barrier has", line);
    if (stored(self->lane)) fail("line %d: what was stored before is not fenced", line);
    barrier->bytes += num_bytes;
    --barrier->pending;
    end_phase_if_complete(barrier);
}

inline void land_bulk_copies(BytesBarrier* barrier) {
    int kept = 0;
    for (int i = 0; i < num_bulk_copies; ++i) {
        const BulkCopy copy = bulk_copies[i];
        // A phase counts the bytes of copies that come before their announcement too, but here the
        // announcement comes first: what lands without one is a mistake of the kernel.
        const bool early = copy.from_other && barrier->bytes < copy.num_bytes;
        if (copy.owner != block || copy.barrier != barrier || early) {
            bulk_copies[kept++] = copy;
            continue;
        }
        if (barrier->bytes < copy.num_bytes) fail("more bytes land than were announced");
        if (copy.from) {
            const char* from = copy.from;
            if (copy.source && copy.source->num_done) fail("the source of a copy has ended");
            if (copy.source && copy.source != block) {
                from = copy.source->dynamic_copy + (from - dynamic_start);
            }
            memcpy(copy.to, from, copy.num_bytes);
        } else {
            land_box(copy);
        }
        barrier->bytes -= copy.num_bytes;
        end_phase_if_complete(barrier);
    }
    num_bulk_copies = kept;
}

inline void start_copy(const BulkCopy& copy, int line) {
    if (num_bulk_copies == MAX_BULK_COPIES) fail("line %d: too many copies", line);
    memset(copy.to, 0xff, copy.num_bytes);
    bulk_copies[num_bulk_copies++] = copy;
}

}  // namespace shim

inline void mbarrier_init(uint64_t* p, int arrivals, CALLER) {
    if (!shim::in_shared(p, 8)) shim::fail("line %d: a barrier not in shared memory", line);
    if (arrivals < 1 || arrivals > 255) shim::fail("line %d: %d arrivals", line, arrivals);
    const shim::BytesBarrier made = {uint8_t(arrivals), uint8_t(arrivals), 0, 0x5a, 0};
    memcpy(static_cast<void*>(p), &made, 8);
    if (shim::block->num_barriers == 128) shim::fail("line %d: too many barriers", line);
    shim::block->barriers[shim::block->num_barriers++] = p;
    memset(shim::has_stored + shim::block->index.x % shim::cluster_blocks * 1024, 0, 1024);
    int kept = 0;  // what a launch that failed has left
    for (int i = 0; i < shim::num_bulk_copies; ++i) {
        const shim::BulkCopy copy = shim::bulk_copies[i];
        if (copy.owner != shim::block || (void*)copy.barrier != p) shim::bulk_copies[kept++] = copy;
    }
    shim::num_bulk_copies = kept;
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* p, CALLER) { shim::arrive_at_bytes(p, 0, line); }
inline void mbarrier_arrive_expecting(uint64_t* p, int num_bytes, CALLER) {
    shim::arrive_at_bytes(p, num_bytes, line);
}
inline void mbarrier_wait(uint64_t* p, uint32_t parity, CALLER) {
    shim::BytesBarrier* barrier = shim::bytes_barrier(p, line);
    while (barrier->parity == parity) {
        shim::land_bulk_copies(barrier);
        if (barrier->parity == parity) shim::pause();
    }
}
inline void copy_bulk(void* to, const void* from, int num_bytes, uint64_t* p, CALLER) {
    shim::BytesBarrier* barrier = shim::bytes_barrier(p, line);
    if (!is_aligned_16(to) || !is_aligned_16(from) || num_bytes % 16 || num_bytes <= 0) {
        shim::fail("line %d: a bulk copy not in units of 16", line);
    }
    if (!shim::in_shared(to, num_bytes)) shim::fail("line %d: not into shared memory", line);
    shim::start_copy(
        {shim::block, static_cast<char*>(to), static_cast<const char*>(from), num_bytes, barrier}, line);
}
