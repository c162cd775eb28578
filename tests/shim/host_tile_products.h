// What stands for kernels_cu/tile_products.cuh on the host, and for what its users take of hopper.cuh:
// boxes of matrices, copies between blocks, and products of a warpgroup whose operands lie in shared
// memory. As late as the device may be: a box or copy poisons its target when it starts and lands when
// somebody waits for its barrier, a product reads its operands when its own thread waits for it.
#pragma once

#define HAS_TILE_PRODUCTS (!FORCE_PLAIN)
#define __grid_constant__

namespace shim {

constexpr int MAX_PRODUCTS = 64;  // of a thread, not waited for

struct Product {
    void (*perform)(const Product& product);
    float* d;
    uint64_t a, b;
    int add, group;
    const uint32_t* registers;  // of a, where it lies there: they may not change meanwhile
    uint32_t quad[4][4];        // and those of the four lanes that have the same rows
};

struct Products {
    int count, group;
    Product list[MAX_PRODUCTS];
};
static Products all_products[8 * 1024];  // of a cluster's threads

inline Products& own_products() {
    return all_products[block->index.x % cluster_blocks * 1024 + self->thread.x];
}

inline float value_of(__half x) { return __half2float(x); }
inline float value_of(__nv_bfloat16 x) { return __bfloat162float(x); }

// Where a product finds element (row, k): rows of 128 bytes, whose pieces of 16 are exchanged by bits
// of the address.
template <typename T>
inline float operand_value(uint64_t operand, int row, int k) {
    if (operand >> 62 != 1) fail("an operand that is not swizzled by 128 bytes");
    const uint32_t start = (operand & 0x3fff) << 4, step = (operand >> 32 & 0x3fff) << 4;
    uint32_t address = start + row / 8 * step + row % 8 * 128 + k * 2;
    address ^= (address >> 7 & 7) << 4;
    const auto* at = reinterpret_cast<const T*>(shared_pointer(address));
    if (!in_shared(at, 2)) fail("an operand outside of shared memory");
    return value_of(*at);
}

template <typename T, int N>
void multiply_rows(const Product& product, const float (&rows)[2][16]) {
    const int first_column = self->lane % 4 * 2;
    float* const d = product.d;
    for (int n = 0; n < N / 8; ++n) {
        for (int j = 0; j < 2; ++j) {
            float column[16];
            for (int k = 0; k < 16; ++k) {
                column[k] = operand_value<T>(product.b, n * 8 + first_column + j, k);
            }
            for (int h = 0; h < 2; ++h) {
                float sum = product.add ? d[n * 4 + 2 * h + j] : 0.0f;
                for (int k = 0; k < 16; ++k) sum += rows[h][k] * column[k];
                d[n * 4 + 2 * h + j] = sum;
            }
        }
    }
}

template <typename T, int N>
void multiply(const Product& product) {
    const int first_row = self->warp % 4 * 16 + self->lane / 4;
    float rows[2][16];
    for (int h = 0; h < 2; ++h) {
        for (int k = 0; k < 16; ++k) rows[h][k] = operand_value<T>(product.a, first_row + 8 * h, k);
    }
    multiply_rows<T, N>(product, rows);
}

inline Product& new_product(int add) {
    Products& own = own_products();
    if (!add) own.count = 0;  // what a launch that failed has left
    if (own.count == MAX_PRODUCTS) fail("too many products under way");
    return own.list[own.count++];
}

}  // namespace shim

inline void prefetch_tensor_map(const void*) {}

template <typename Map>
inline void copy_box(
    uint32_t target, const Map* map, uint64_t* barrier, int c0, int c1, CALLER) {
    shim::HostMap host;
    memcpy(&host, map->bytes, sizeof host);
    if (host.magic != shim::HostMap::MAGIC) shim::fail("line %d: no tensor map", line);
    if (target % 1024) shim::fail("line %d: a box must be aligned to 1024 bytes", line);
    char* const to = shim::shared_pointer(target);
    const int num_bytes = host.box_rows * 128;
    if (!shim::in_shared(to, num_bytes)) shim::fail("line %d: not into shared memory", line);
    if (host.box_columns != 64) shim::fail("line %d: rows of a box have 128 bytes", line);
    shim::start_copy(
        {shim::block, to, nullptr, num_bytes, shim::bytes_barrier(barrier, line), host, c0, c1, target},
        line);
}

template <typename Map>
inline void copy_box_to_ranks(
    uint32_t target, const Map* map, uint64_t* barrier, uint32_t ranks, int c0, int c1, CALLER) {
    if (ranks >> shim::cluster_blocks) shim::fail("line %d: no such ranks", line);
    char* const own = shim::shared_pointer(target);
    for (int rank = 0; rank < int(shim::cluster_blocks); ++rank) {
        shim::Block* const to = shim::block_of_rank(rank);
        if (!(ranks >> rank & 1)) continue;
        if (to == shim::block) {
            copy_box(target, map, barrier, c0, c1, line);
            shim::bulk_copies[shim::num_bulk_copies - 1].from_other = true;
            continue;
        }
        shim::bytes_barrier(barrier, line);
        const auto* made = static_cast<shim::BytesBarrier*>(
            shim::place_at_rank(barrier, 8, rank, line));
        if (made->is_made != 0x5a) shim::fail("line %d: its barrier was not made", line);
        shim::HostMap host;
        memcpy(&host, map->bytes, sizeof host);
        const int num_bytes = host.box_rows * 128;
        for (int i = 0; i < num_bytes; i += 8) {
            memset(shim::place_at_rank(own + i, 8, rank, line), 0xff, 8);
        }
        if (shim::num_bulk_copies == shim::MAX_BULK_COPIES) shim::fail("line %d: too many", line);
        shim::bulk_copies[shim::num_bulk_copies++] = {
            to, own, nullptr, num_bytes, reinterpret_cast<shim::BytesBarrier*>(barrier), host, c0, c1,
            target, true};
    }
}

inline void mbarrier_arrive_at_rank(uint64_t* own, int rank, CALLER) {
    auto* barrier = static_cast<shim::BytesBarrier*>(shim::place_at_rank(own, 8, rank, line));
    if (barrier->is_made != 0x5a) shim::fail("line %d: a barrier that was not made", line);
    if (!barrier->pending) shim::fail("line %d: more arrivals than the barrier has", line);
    --barrier->pending;
    shim::end_phase_if_complete(barrier);
}

// Whether a thread has made what it wrote seen by copies.
static bool has_fenced[8 * 1024];
inline bool& fenced(int lane) {
    return has_fenced[shim::block->index.x % shim::cluster_blocks * 1024 + shim::self->warp * 32 + lane];
}
inline void shared_to_async_fence() {
    fenced(shim::self->lane) = true;
    shim::stored(shim::self->lane) = false;
}

// Lands as late as any copy: what its source is then, is copied. All of the warp must have fenced.
inline void copy_to_rank(
    void* to, const void* from, int num_bytes, uint64_t* barrier, int rank, CALLER) {
    if (!is_aligned_16(to) || !is_aligned_16(from) || num_bytes % 16 || num_bytes <= 0) {
        shim::fail("line %d: a copy not in units of 16", line);
    }
    if (!shim::in_shared(from, num_bytes)) shim::fail("line %d: not from shared memory", line);
    for (int lane = 0; lane < 32; ++lane) {
        if (!fenced(lane)) shim::fail("line %d: lane %d has not fenced", line, lane);
    }
    const auto* made = static_cast<shim::BytesBarrier*>(shim::place_at_rank(barrier, 8, rank, line));
    if (made->is_made != 0x5a) shim::fail("line %d: its barrier was not made", line);
    for (int i = 0; i < num_bytes; i += 8) {
        memset(shim::place_at_rank(static_cast<char*>(to) + i, 8, rank, line), 0xff, 8);
    }
    if (shim::num_bulk_copies == shim::MAX_BULK_COPIES) shim::fail("line %d: too many", line);
    shim::BulkCopy copy = {};
    copy.owner = shim::block_of_rank(rank);
    copy.to = static_cast<char*>(to);
    copy.from = static_cast<const char*>(from);
    copy.num_bytes = num_bytes;
    copy.barrier = reinterpret_cast<shim::BytesBarrier*>(barrier);
    copy.from_other = true;
    copy.source = shim::block;
    shim::bulk_copies[shim::num_bulk_copies++] = copy;
}

inline void wgmma_fence() {}
inline void wgmma_commit() { ++shim::own_products().group; }
template <int N>
inline void wgmma_wait() {
    shim::Products& own = shim::own_products();
    int kept = 0;
    for (int i = 0; i < own.count; ++i) {
        const shim::Product product = own.list[i];
        if (product.group < own.group - N) {
            product.perform(product);
        } else {
            own.list[kept++] = product;
        }
    }
    own.count = kept;
}
// As the compiler sees it, products may have written them.
template <int N, int M>
__attribute__((noinline)) void hold_registers(float (&d)[N][M]) {
    asm volatile("" : : "r"(d) : "memory");
}

inline uint64_t operand(uint32_t address, int step, int across = 16) {
    if (address % 1024) shim::fail("an operand must be aligned to 1024 bytes");
    return 1ull << 62 | (address & 0x3ffff) >> 4 | uint64_t(across >> 4) << 16 |
           uint64_t(step >> 4) << 32;
}
inline uint64_t operand_at(uint64_t operand, int num_bytes) { return operand + (num_bytes >> 4); }

template <typename T, int N>
struct Wgmma {
    static void shared(float (&d)[N / 8][4], uint64_t a, uint64_t b, int add) {
        shim::new_product(add) = {
            shim::multiply<T, N>, &d[0][0], a, b, add, shim::own_products().group, nullptr, {}};
    }
};
