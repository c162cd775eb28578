// The scheduler of a grid on one core: blocks one after another, or all at once for kernels whose
// blocks wait for one another; finds what gets no further, and turns faults into messages.
//
// The order in which warps and lanes are tried is forward, reversed or shuffled, as a missing
// barrier shows in one order and hides in another.
#pragma once

#include <csignal>
#include <cstdlib>
#include <link.h>
#include <sys/mman.h>

#include "host_fibers.h"

namespace shim {

// ------------------------------------------------------------------------------ the scheduler

static Fiber* all_fibers;
static Block* all_blocks;
static AsyncCopy* all_copies;
static size_t num_allocated_fibers, num_allocated_blocks;

static void (*block_ends)();  // what is looked at when its last thread is done

static void fiber_main() {
    call_kernel(call_arguments);
    self->state = DONE;
    if (++block->num_done == int(block_size.x) && block_ends) block_ends();
    to_scheduler();
    abort();
}

inline void* map_memory(size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    return p;
}

inline void allocate(size_t num_blocks) {
    const size_t num_fibers = num_blocks * block_size.x;
    if (num_fibers > num_allocated_fibers) {
        all_fibers = static_cast<Fiber*>(map_memory(num_fibers * sizeof(Fiber)));
        all_copies = static_cast<AsyncCopy*>(
            map_memory(num_fibers * MAX_PENDING_COPIES * sizeof(AsyncCopy)));
        num_allocated_fibers = num_fibers;
    }
    if (num_blocks > num_allocated_blocks) {
        all_blocks = static_cast<Block*>(map_memory(num_blocks * sizeof(Block)));
        num_allocated_blocks = num_blocks;
    }
}

static thread_local volatile char first_shared = 1;  // so that there always is a thread-local segment

// Where this library's thread-local memory lies: the segment's size is in its program headers.
static int find_static_shared(dl_phdr_info* info, size_t, void* own) {
    bool is_this = false;
    size_t bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        const char* start = reinterpret_cast<const char*>(info->dlpi_addr + header.p_vaddr);
        if (header.p_type == PT_LOAD && own >= start && own < start + header.p_memsz) is_this = true;
        if (header.p_type == PT_TLS) bytes = header.p_memsz;
    }
    if (!is_this) return 0;
    static_start = static_cast<char*>(info->dlpi_tls_data);
    static_bytes = bytes;
    return 1;
}

inline void poison_shared() {
    memset(static_start, 0xff, static_bytes);
    if (dynamic_bytes) memset(dynamic_start, 0xff, dynamic_bytes);
}

static void start_block(Block* b, char* stacks, Index3 index, size_t place) {
    memset(b, 0, sizeof *b);
    b->index = index;
    b->fibers = all_fibers + place * block_size.x;
    for (unsigned i = 0; i < block_size.x; ++i) {
        const size_t slot = place * block_size.x + i;
        Fiber& fiber = b->fibers[i];
        fiber.context = new_context(stacks + slot * STACK_BYTES, STACK_BYTES, fiber_main);
        fiber.state = READY;
        fiber.paused = false;
        fiber.thread = {i, 0, 0};
        fiber.lane = i & 31;
        fiber.warp = i >> 5;
        fiber.num_copies = fiber.group = 0;
        fiber.at_cluster = false;
        fiber.copies = all_copies + slot * MAX_PENDING_COPIES;
    }
}

// Which of `count` things comes at turn `i`: a permutation that `order` and `salt` decide.
inline unsigned turn(unsigned i, unsigned count, unsigned order, unsigned salt) {
    if (order == 0) return i;
    if (order == 1) return count - 1 - i;
    const unsigned odd = (order * 2654435761u + salt * 40503u) | 1;  // count is a power of 2, or:
    return (count & (count - 1)) ? (i + odd) % count : (i * odd + order) & (count - 1);
}

// Runs the threads of a block until all are done or none gets further. Returns whether any ran
// that was not merely waiting in a loop.
static bool run_block(Block* b, unsigned order) {
    block = b;
    const unsigned num_warps = block_size.x / 32;
    bool useful = false, again = true;
    for (unsigned round = 0; again && !failed; ++round) {
        again = false;
        for (unsigned i = 0; i < num_warps; ++i) {
            const unsigned w = turn(i, num_warps, order, round);
            Fiber* warp = b->fibers + w * 32;
            for (bool moved = true; moved;) {
                moved = false;
                for (unsigned j = 0; j < 32; ++j) {
                    Fiber& fiber = warp[turn(j, 32, order, w)];
                    if (fiber.state != READY || fiber.paused) continue;
                    self = &fiber;
                    shim_switch(&scheduler_context, fiber.context);
                    if (failed) return true;
                    if (!fiber.paused) moved = useful = again = true;
                }
            }
        }
    }
    return useful;
}

// Nothing gets further: say who waits for what.
static void report_stuck(Block* b) {
    block = b;
    const Fiber *waits = nullptr, *gone = nullptr, *loops = nullptr, *lane = nullptr;
    for (unsigned i = 0; i < block_size.x; ++i) {
        const Fiber& fiber = b->fibers[i];
        if (fiber.state == AT_BARRIER && !waits) waits = &fiber;
        if (fiber.state == AT_COLLECTIVE && !lane) lane = &fiber;
        if (fiber.state == DONE && !gone) gone = &fiber;
        if (fiber.state == READY && !loops) loops = &fiber;
    }
    char what[300];
    if (lane) {
        snprintf(what, sizeof what,
                 "thread %u waits at line %d in %s with mask %08x for lanes that never come",
                 lane->thread.x, lane->line, lane->arrival.what, lane->arrival.mask);
    } else if (waits) {
        snprintf(what, sizeof what,
                 "divergent barrier: thread %u waits at line %d for threads that never come%s",
                 waits->thread.x, waits->line, gone ? " (some have left the kernel)" : "");
    } else {
        snprintf(what, sizeof what, "deadlock: thread %u loops without end%s",
                 loops ? loops->thread.x : 0,
                 num_allocated_blocks > 1 ? "" : " (blocks ran one after another)");
    }
    failed = true;
    snprintf(error_text, sizeof error_text, "%s, block (%u, %u, %u): %s", kernel_name, b->index.x,
             b->index.y, b->index.z, what);
}

inline void wake_paused(Block* b) {
    for (unsigned i = 0; i < block_size.x; ++i) b->fibers[i].paused = false;
}

// ------------------------------------------------------------------------------ faults

static void on_fault(int number, siginfo_t* info, void*) {
    if (!self) {
        signal(number, SIG_DFL);
        return;
    }
    if (number == SIGFPE) fail("division by zero");
    fail("access out of bounds at address 0x%llx", (unsigned long long)info->si_addr);
}

struct FaultHandlers {
    static constexpr int SIGNALS[3] = {SIGSEGV, SIGBUS, SIGFPE};
    struct sigaction before[3];
    stack_t stack_before;
    FaultHandlers() {
        static char* memory = static_cast<char*>(map_memory(64 << 10));
        stack_t stack = {};
        stack.ss_sp = memory;
        stack.ss_size = 64 << 10;
        sigaltstack(&stack, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
        for (int i = 0; i < 3; ++i) sigaction(SIGNALS[i], &action, &before[i]);
    }
    ~FaultHandlers() {
        for (int i = 0; i < 3; ++i) sigaction(SIGNALS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
    }
};

// ------------------------------------------------------------------------------ a launch

static void run_one_by_one(const Shape& shape) {
    for (unsigned z = 0; z < shape.grid[2]; ++z)
        for (unsigned y = 0; y < shape.grid[1]; ++y)
            for (unsigned x = 0; x < shape.grid[0] && !failed; ++x) {
                Block* b = all_blocks;
                start_block(b, shape.stacks, {x, y, z}, 0);
                poison_shared();
                for (int idle = 0; !failed && b->num_done < int(block_size.x);) {
                    idle = run_block(b, shape.order) ? 0 : idle + 1;
                    bool any_paused = false;
                    for (unsigned i = 0; i < block_size.x; ++i) {
                        any_paused |= b->fibers[i].paused;
                    }
                    const bool stuck = b->num_done < int(block_size.x) &&
                                       (!any_paused || idle > MAX_IDLE_ROUNDS);
                    if (!failed && stuck) report_stuck(b);
                    wake_paused(b);
                }
            }
}

// `num_blocks` blocks from number `first` of the grid on, at once.
static void run_resident(const Shape& shape, size_t first, size_t num_blocks) {
    const size_t fixed = static_bytes;
    char* memory = static_cast<char*>(map_memory(num_blocks * (fixed + dynamic_bytes) + 1));
    memset(memory, 0xff, num_blocks * (fixed + dynamic_bytes));
    for (size_t i = 0; i < num_blocks; ++i) {
        const unsigned column = (first + i) % shape.grid[0], row = (first + i) / shape.grid[0];
        start_block(all_blocks + i, shape.stacks,
                    {column, row % shape.grid[1], row / shape.grid[1]}, i);
        all_blocks[i].static_copy = memory + i * (fixed + dynamic_bytes);
        all_blocks[i].dynamic_copy = all_blocks[i].static_copy + fixed;
    }
    for (int idle = 0; !failed;) {
        size_t done = 0;
        bool useful = false;
        for (size_t i = 0; i < num_blocks && !failed; ++i) {
            Block& b = all_blocks[i];
            if (b.num_done == int(block_size.x)) {
                ++done;
                continue;
            }
            if (fixed) memcpy(static_start, b.static_copy, fixed);
            if (dynamic_bytes) memcpy(dynamic_start, b.dynamic_copy, dynamic_bytes);
            wake_paused(&b);
            b.started = true;
            useful |= run_block(&b, shape.order);
            if (fixed) memcpy(b.static_copy, static_start, fixed);
            if (dynamic_bytes) memcpy(b.dynamic_copy, dynamic_start, dynamic_bytes);
        }
        if (done == num_blocks) break;
        idle = useful ? 0 : idle + 1;
        if (!failed && idle > MAX_IDLE_ROUNDS) {
            for (size_t i = 0; i < num_blocks && !failed; ++i) {
                if (all_blocks[i].num_done < int(block_size.x)) report_stuck(all_blocks + i);
            }
        }
    }
    munmap(memory, num_blocks * (fixed + dynamic_bytes) + 1);
}

// Runs the grid. Returns null, or what went wrong.
static const char* launch(
    const char* name, const Shape& shape, void (*call)(void*), void* arguments) {
    if (shape.block == 0 || shape.block > 1024 || shape.block % 32) {
        return "a block must have 32 to 1024 threads, a multiple of 32";
    }
    const size_t num_blocks = size_t(shape.grid[0]) * shape.grid[1] * shape.grid[2];
    if (num_blocks == 0) return "an empty grid: the host must not launch it";
    if (shape.cluster == 0 || shape.cluster > 8 || shape.grid[0] % shape.cluster) {
        return "a cluster must have 1 to 8 blocks, and must divide the grid's x";
    }
    kernel_name = name;
    call_kernel = call;
    call_arguments = arguments;
    failed = false;
    lands_backwards = shape.order >= 1000;
    block_size = {shape.block, 1, 1};
    grid_size = {shape.grid[0], shape.grid[1], shape.grid[2]};
    cluster_blocks = shape.cluster;
    allocate(shape.resident ? num_blocks : shape.cluster);
    first_shared = 0;  // the memory is made when it is first touched
    dl_iterate_phdr(find_static_shared, &kernel_name);
    if (!static_start) return "the kernel's shared variables were not found";

    // Dynamic shared memory ends where a page that cannot be touched begins.
    const size_t page = 4096, bytes = (shape.shared_bytes + 127) / 128 * 128;
    const size_t pages = (bytes + page - 1) / page * page;
    char* mapped = static_cast<char*>(map_memory(pages + 2 * page));
    mprotect(mapped, page, PROT_NONE);
    mprotect(mapped + page + pages, page, PROT_NONE);
    dynamic_start = mapped + page + pages - bytes;
    dynamic_bytes = bytes;
    {
        FaultHandlers handlers;
        if (shape.resident) {
            run_resident(shape, 0, num_blocks);
        } else if (shape.cluster > 1) {
            for (size_t i = 0; i < num_blocks && !failed; i += shape.cluster) {
                run_resident(shape, i, shape.cluster);
            }
        } else {
            run_one_by_one(shape);
        }
        self = nullptr;
    }
    munmap(mapped, pages + 2 * page);
    return failed ? error_text : nullptr;
}

}  // namespace shim
