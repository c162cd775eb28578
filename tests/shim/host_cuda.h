// What stands for CUDA, and for the wrappers of kernels_cu/device.cuh, when a kernel file is built
// with g++ and run on the CPU: the same names, the same meaning, and stricter about misuse.
//
// Collectives carry the line they are called from, so that lanes that meet at different places are
// found. Fragments lie over the lanes as the PTX ISA defines them.
#pragma once

#include <chrono>
#include <cmath>
#include <type_traits>

#include "host_entry.h"
#include "host_types.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
// One thread runs all fibers, so that thread-local memory is a place of their own for the shared
// variables of a library, those of templates too: it can be poisoned and swapped as a whole.
#define __shared__ static thread_local
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __restrict__

#define threadIdx (shim::self->thread)
#define blockIdx (shim::block->index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid_size)

#define CALLER int line = __builtin_LINE()

#ifndef FORCE_PLAIN
#define FORCE_PLAIN 0
#endif
#define HAS_MMA (!FORCE_PLAIN)
#define HAS_CP_ASYNC (!FORCE_PLAIN)
#define HAS_CLUSTERS (!FORCE_PLAIN)

constexpr int WARP_SIZE = 32;
constexpr uint32_t FULL_WARP = 0xffffffffu;

// ------------------------------------------------------------------------------ bits, arithmetic

inline float infinity() { return __builtin_inff(); }
inline int count_bits(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t ones) { return (x & mask) | ones; }
inline int lowest_bit(uint32_t x) { return __builtin_ctz(x); }
inline bool is_aligned_16(const void* p) { return (uintptr_t(p) & 15) == 0; }
inline float exp2_approx(float x) { return exp2f(x); }
inline float rsqrtf(float x) { return float(1 / sqrt(double(x))); }
template <typename T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <typename T>
inline T max(T a, T b) {
    return a < b ? b : a;
}

// ------------------------------------------------------------------------------ threads

inline int lane_id() { return shim::self->lane; }
inline int warp_id() { return shim::self->warp; }
inline int num_warps() { return int(shim::block_size.x) / 32; }

inline void block_sync(CALLER) { shim::barrier(0, int(shim::block_size.x), line); }
inline void barrier_sync(int id, int threads, CALLER) { shim::barrier(id, threads, line); }

namespace shim {

template <typename T>
struct Shuffled {
    T value, result;
    int source;
};

template <typename T>
void shuffle_lanes(void** lanes, uint32_t mask) {
    for (int i = 0; i < 32; ++i) {
        if (!(mask >> i & 1)) continue;
        auto* own = static_cast<Shuffled<T>*>(lanes[i]);
        auto* from = static_cast<Shuffled<T>*>(lanes[own->source]);
        if (!from) {
            fail("shuffle: lane %d reads lane %d, which mask %08x lacks", i, own->source, mask);
        }
        own->result = from->value;
    }
}

template <typename T>
T shuffle_from(T value, int source, uint32_t mask, const char* what, int line) {
    static_assert(std::is_arithmetic<T>::value && sizeof(T) >= 4, "4- or 8-byte numbers");
    Shuffled<T> payload = {value, value, source};
    collective(what, shuffle_lanes<T>, &payload, mask, line);
    return payload.result;
}

struct Vote {
    bool predicate;
    uint32_t result;
};

inline void count_votes(void** lanes, uint32_t mask) {
    uint32_t votes = 0;
    for (int i = 0; i < 32; ++i) {
        if (mask >> i & 1) votes |= uint32_t(static_cast<Vote*>(lanes[i])->predicate) << i;
    }
    for (int i = 0; i < 32; ++i) {
        if (mask >> i & 1) static_cast<Vote*>(lanes[i])->result = votes;
    }
}

inline void only_meet(void**, uint32_t) {}

}  // namespace shim

inline void warp_sync(uint32_t mask = FULL_WARP, CALLER) {
    shim::collective("warp_sync", shim::only_meet, nullptr, mask, line);
}
template <typename T>
inline T shuffle(T value, int source, uint32_t mask = FULL_WARP, CALLER) {
    return shim::shuffle_from(value, source & 31, mask, "shuffle", line);
}
template <typename T>
inline T shuffle_xor(T value, int lanes, uint32_t mask = FULL_WARP, CALLER) {
    return shim::shuffle_from(value, (lane_id() ^ lanes) & 31, mask, "shuffle_xor", line);
}
template <typename T>
inline T shuffle_up(T value, int lanes, uint32_t mask = FULL_WARP, CALLER) {
    const int source = lane_id() < lanes ? lane_id() : lane_id() - lanes;
    return shim::shuffle_from(value, source, mask, "shuffle_up", line);
}
template <typename T>
inline T shuffle_down(T value, int lanes, uint32_t mask = FULL_WARP, CALLER) {
    const int source = lane_id() + lanes > 31 ? lane_id() : lane_id() + lanes;
    return shim::shuffle_from(value, source, mask, "shuffle_down", line);
}
inline uint32_t warp_ballot(bool predicate, uint32_t mask = FULL_WARP, CALLER) {
    shim::Vote vote = {predicate, 0};
    shim::collective("ballot", shim::count_votes, &vote, mask, line);
    return vote.result;
}

// ------------------------------------------------------------------------------ memory

// Addresses of dynamic shared memory as instructions take them, aligned to 128 bytes and no more.
namespace shim {
constexpr uint32_t FIRST_ADDRESS = 1024 + 384;
inline char* shared_pointer(uint32_t address) { return dynamic_start + (address - FIRST_ADDRESS); }
}  // namespace shim
inline uint32_t shared_address(const void* p) {
    return uint32_t(static_cast<const char*>(p) - shim::dynamic_start) + shim::FIRST_ADDRESS;
}
inline unsigned char* dynamic_shared() {
    return reinterpret_cast<unsigned char*>(shim::dynamic_start);
}

inline uint4 ld_shared_16(const void* p, CALLER) {
    if (!shim::in_shared(p, 16)) shim::fail("line %d: a load not from shared memory", line);
    if (!is_aligned_16(p)) shim::fail("line %d: a 16-byte load not aligned to 16", line);
    return *static_cast<const uint4*>(p);
}
inline uint2 ld_shared_8(const void* p, CALLER) {
    if (!shim::in_shared(p, 8)) shim::fail("line %d: a load not from shared memory", line);
    if (uintptr_t(p) & 7) shim::fail("line %d: an 8-byte load not aligned to 8", line);
    return *static_cast<const uint2*>(p);
}
template <typename T>
inline T* keep_pointer(T* p) {
    return p;
}
inline void prefetch_l2_span(const void* p, uint32_t bytes, CALLER) {
    if (!is_aligned_16(p) || bytes % 16) shim::fail("line %d: a span not in units of 16", line);
    if (bytes == 0) return;
    const auto* first = static_cast<const volatile char*>(p);
    (void)*first, (void)first[bytes - 1];  // a fault where they lie in no allocation
}

inline void cp_async_16(void* shared, const void* global, CALLER) {
#if HAS_CP_ASYNC
    shim::copy_async(shared, global, line);
#else
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}
inline void cp_async_16_or_zero(void* shared, const void* global, bool valid, CALLER) {
#if HAS_CP_ASYNC
    shim::copy_async(shared, valid ? global : nullptr, line);
#else
    *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#endif
}
inline void cp_async_commit() { ++shim::self->group; }
template <int N>
inline void cp_async_wait() {
    shim::land_copies(N);
}

// ------------------------------------------------------------------------------ tensor cores

namespace shim {

struct MatrixRows {
    const uint16_t* row;
    uint32_t (*out)[4];
    int line;
};

template <bool TRANSPOSED>
void load_matrices(void** lanes, uint32_t) {
    for (int lane = 0; lane < 32; ++lane) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint32_t pair = 0;
            for (int i = 0; i < 2; ++i) {
                const int r = lane / 4, c = lane % 4 * 2 + i;
                const int row = TRANSPOSED ? c : r, column = TRANSPOSED ? r : c;
                const auto* source = static_cast<MatrixRows*>(lanes[matrix * 8 + row]);
                pair |= uint32_t(source->row[column]) << 16 * i;
            }
            (*static_cast<MatrixRows*>(lanes[lane])->out)[matrix] = pair;
        }
    }
}

template <bool TRANSPOSED>
void load_matrices_checked(uint32_t (&r)[4], const void* row, int line) {
    if (!in_shared(row, 16)) fail("line %d: ldmatrix not from shared memory", line);
    if (!is_aligned_16(row)) fail("line %d: ldmatrix row not aligned to 16", line);
    MatrixRows payload = {static_cast<const uint16_t*>(row), &r, line};
    collective("ldmatrix", load_matrices<TRANSPOSED>, &payload, FULL_WARP, line);
}

struct MmaOperands {
    float (*c)[4];
    uint32_t a[4], b[2];
};

inline float half_of(uint32_t pair, int i, __half*) {
    return __half2float({uint16_t(pair >> 16 * i)});
}
inline float half_of(uint32_t pair, int i, __nv_bfloat16*) {
    return __bfloat162float({uint16_t(pair >> 16 * i)});
}

template <typename T>
void multiply_tiles(void** lanes, uint32_t) {
    float a[16][16], b[8][16];  // b by column
    for (int lane = 0; lane < 32; ++lane) {
        const auto* own = static_cast<MmaOperands*>(lanes[lane]);
        const int g = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < 2; ++i) {
            for (int r = 0; r < 4; ++r) {
                a[g + r % 2 * 8][t + i + r / 2 * 8] = half_of(own->a[r], i, (T*)nullptr);
            }
            for (int r = 0; r < 2; ++r) {
                b[g][t + i + r * 8] = half_of(own->b[r], i, (T*)nullptr);
            }
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        float(&c)[4] = *static_cast<MmaOperands*>(lanes[lane])->c;
        const int g = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) {
            const float *row = a[g + i / 2 * 8], *column = b[t + i % 2];
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
            c[i] += sum;
        }
    }
}

}  // namespace shim

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, CALLER) {
    shim::load_matrices_checked<false>(r, row, line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, CALLER) {
    shim::load_matrices_checked<true>(r, row, line);
}

#if HAS_MMA
template <typename T>
inline void mma_m16n8k16(
    float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, CALLER) {
    shim::MmaOperands payload = {&c, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    shim::collective("mma", shim::multiply_tiles<T>, &payload, FULL_WARP, line);
}
#endif

namespace shim {

inline uint32_t bits_of_half(float x, __half*) { return __float2half_rn(x).bits; }
inline uint32_t bits_of_half(float x, __nv_bfloat16*) { return __float2bfloat16_rn(x).bits; }

}  // namespace shim

template <typename T>
inline uint32_t subtract_pairs(uint32_t a, uint32_t b) {
    uint32_t y = 0;
    for (int i = 0; i < 2; ++i) {
        const float x = shim::half_of(a, i, (T*)nullptr) - shim::half_of(b, i, (T*)nullptr);
        y |= shim::bits_of_half(x, (T*)nullptr) << 16 * i;
    }
    return y;
}
template <typename T>
inline uint32_t multiply_pairs(uint32_t a, uint32_t b) {
    uint32_t y = 0;
    for (int i = 0; i < 2; ++i) {
        const float x = shim::half_of(a, i, (T*)nullptr) * shim::half_of(b, i, (T*)nullptr);
        y |= shim::bits_of_half(x, (T*)nullptr) << 16 * i;
    }
    return y;
}

// ------------------------------------------------------------------------------ across blocks

template <typename T>
inline T atomic_add(T* p, T x) {
    const T before = *p;
    *p = before + x;
    return before;
}
inline uint32_t atomic_count_to(uint32_t* p, uint32_t last) {
    const uint32_t before = *p;
    *p = before >= last ? 0 : before + 1;
    return before;
}
inline void device_fence() {}
inline uint32_t load_acquire(const uint32_t* p) {
    return *const_cast<const volatile uint32_t*>(p);
}
inline void store_word(uint64_t* p, uint64_t x) { *const_cast<volatile uint64_t*>(p) = x; }
inline uint64_t load_word(const uint64_t* p) { return *const_cast<const volatile uint64_t*>(p); }
inline void load_two_words(const uint64_t* p, uint64_t& a, uint64_t& b, CALLER) {
    if (!is_aligned_16(p)) shim::fail("line %d: two words not aligned to 16", line);
    a = load_word(p);
    b = load_word(p + 1);
}
template <typename T>
inline T load_volatile(const T* p) {
    return *const_cast<const volatile T*>(p);
}
inline void spin_pause() { shim::pause(); }
inline void spin_wait() { shim::pause(); }

inline int cluster_size() { return int(shim::cluster_blocks); }
inline int cluster_rank() { return int(shim::block->index.x % shim::cluster_blocks); }
inline void cluster_arrive(CALLER) {
    if (shim::cluster_blocks == 1) shim::fail("line %d: illegal without a cluster", line);
    shim::arrive_at_cluster(line);
}
inline void cluster_wait(CALLER) { shim::wait_for_cluster(line); }

inline void cluster_sync(CALLER) {
    if (shim::cluster_blocks == 1) shim::fail("line %d: illegal without a cluster", line);
    shim::arrive_at_cluster(line);
    shim::wait_for_cluster(line);
}
template <typename T>
inline T load_at_rank(const T* own, int rank, CALLER) {
    if (shim::cluster_blocks == 1) shim::fail("line %d: illegal without a cluster", line);
    return *static_cast<T*>(shim::place_at_rank(const_cast<T*>(own), sizeof(T), rank, line));
}
template <typename T>
inline void store_at_rank(T* own, int rank, T value, CALLER) {
    if (shim::cluster_blocks == 1) shim::fail("line %d: illegal without a cluster", line);
    *static_cast<T*>(shim::place_at_rank(own, sizeof(T), rank, line)) = value;
}

struct RemoteInbox {
    uint64_t* own;
    int rank;
};
inline void make_inbox(uint64_t* inbox, uint32_t bytes, CALLER) {
    if (shim::cluster_blocks == 1) shim::fail("line %d: illegal without a cluster", line);
    if (!shim::in_shared(inbox, 8)) shim::fail("line %d: an inbox not in shared memory", line);
    *inbox = bytes;
}
inline void wait_for_inbox(uint64_t* inbox) {
    while (*const_cast<volatile uint64_t*>(inbox) != 0) shim::pause();
}
inline RemoteInbox inbox_of_rank(uint64_t* own, int rank) { return {own, rank}; }
inline void send_pair(RemoteInbox inbox, int offset, float a, float b, CALLER) {
    if (shim::cluster_blocks == 1) shim::fail("line %d: illegal without a cluster", line);
    char* own = reinterpret_cast<char*>(inbox.own) + offset;
    auto* to = static_cast<float*>(shim::place_at_rank(own, 8, inbox.rank, line));
    auto* left = static_cast<uint64_t*>(shim::place_at_rank(inbox.own, 8, inbox.rank, line));
    if (*left < 8 || *left > 1 << 20) shim::fail("line %d: more than the inbox expects", line);
    to[0] = a;
    to[1] = b;
    *left -= 8;
}
inline void grid_dependency_wait() {}
inline void grid_dependency_launch() {}
inline uint32_t clock_cycles() {
    static uint32_t cycles;
    return cycles += 100;
}
inline uint64_t globaltimer_ns() {
    return std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
}

#include "host_bulk_copy.h"
#include "host_tile_products.h"
#include "host_tall_products.h"
#include "host_code_products.h"
#include "host_small_numbers.h"
