// Threads of a block as fibers, and the launch that runs a grid of them on one core.
//
// Owns: context switches, the scheduler, barriers, warp collectives, shared memory and its poison,
// pending asynchronous copies, faults. Knows nothing of what the collectives compute.
//
// A fiber runs until it waits; the order in which warps and lanes are tried is forward, reversed or
// shuffled, as a missing barrier shows in one order and hides in another.
#pragma once

#include <csignal>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace shim {

// ------------------------------------------------------------------------------ switching stacks

#if defined(__x86_64__) || defined(__aarch64__)

typedef void* Context;  // the stack pointer, with the callee's registers below it

extern "C" void shim_switch(Context* save, Context load) __attribute__((visibility("hidden")));

#if defined(__x86_64__)
__asm__(
    ".text\n.hidden shim_switch\nshim_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");

inline Context new_context(char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;  // entry sees the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    return top;
}
#else
__asm__(
    ".text\n.hidden shim_switch\nshim_switch:\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp, #0]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\n"
    "stp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\n"
    "stp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp, #0]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\n"
    "ldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\n"
    "ldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");

inline Context new_context(char* stack, size_t bytes, void (*entry)()) {
    void** frame = reinterpret_cast<void**>(stack + bytes - 160);
    memset(frame, 0, 160);
    frame[11] = reinterpret_cast<void*>(entry);  // x30
    return frame;
}
#endif

#else  // any other processor: slower, as each switch is two system calls

typedef ucontext_t Context;

inline void shim_switch(Context* save, Context& load) { swapcontext(save, &load); }

inline Context new_context(char* stack, size_t bytes, void (*entry)()) {
    Context context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
    return context;
}

#endif

// ------------------------------------------------------------------------------ a block's threads

struct Index3 {
    unsigned x, y, z;
};

struct AsyncCopy {
    char* to;
    const char* from;  // null: zeros
    int group;
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
constexpr size_t STACK_BYTES = 128 << 10;
constexpr int MAX_IDLE_ROUNDS = 20000;

struct Fiber {
    Context context;
    State state;
    bool paused;  // in a loop that waits for somebody's store
    Index3 thread;
    int block, lane, warp;
    int barrier_id, barrier_threads, line;
    Arrival arrival;
    int num_copies, group;
    AsyncCopy* copies;
};

struct Block {
    Index3 index;
    Fiber* fibers;
    uint32_t waiting[32];  // lanes of each warp that wait at a collective
    int arrived[16];       // threads at each barrier
    int num_done;
    char* static_copy;  // shared memory while another block runs
    char* dynamic_copy;
};

// What Python fills in.
struct Shape {
    unsigned grid[3];
    unsigned block;
    unsigned shared_bytes;
    unsigned order;     // 0 forward, 1 reversed, other: the seed of a shuffle
    unsigned resident;  // 1: all blocks at once, for kernels whose blocks wait for one another
};

extern "C" char __start_shim_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_shim_shared[] __attribute__((weak, visibility("hidden")));

static Fiber* self;
static Block* block;
static Index3 block_size, grid_size;
static Context scheduler_context;
static const char* kernel_name;
static void (*call_kernel)(void*);
static void* call_arguments;
static char error_text[600];
static bool failed;
static char* dynamic_start;
static size_t dynamic_bytes;

inline size_t static_bytes() {
    return __start_shim_shared ? __stop_shim_shared - __start_shim_shared : 0;
}

inline bool in_shared(const void* p, size_t bytes) {
    const char* c = static_cast<const char*>(p);
    const bool in_static = static_bytes() != 0 && c >= __start_shim_shared &&
                           c + bytes <= __stop_shim_shared;
    return in_static || (c >= dynamic_start && c + bytes <= dynamic_start + dynamic_bytes);
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

// ------------------------------------------------------------------------------ async copies

inline void copy_async(void* to, const void* from, int line) {
    if (!in_shared(to, 16)) fail("line %d: cp.async not into shared memory", line);
    if ((uintptr_t(to) | uintptr_t(from)) & 15) fail("line %d: cp.async not aligned to 16", line);
    if (self->num_copies == MAX_PENDING_COPIES) fail("line %d: too many copies under way", line);
    memset(to, 0xff, 16);
    self->copies[self->num_copies++] = {
        static_cast<char*>(to), static_cast<const char*>(from), self->group};
}

// The copies of all but the newest `left` groups land now. Those that no commit has closed are not
// in any group, and stay under way.
inline void land_copies(int left) {
    int kept = 0;
    for (int i = 0; i < self->num_copies; ++i) {
        const AsyncCopy copy = self->copies[i];
        if (copy.group >= self->group - left) {
            self->copies[kept++] = copy;
        } else if (copy.from) {
            memcpy(copy.to, copy.from, 16);
        } else {
            memset(copy.to, 0, 16);
        }
    }
    self->num_copies = kept;
}

// ------------------------------------------------------------------------------ the scheduler

static char* stacks;
static Fiber* all_fibers;
static Block* all_blocks;
static AsyncCopy* all_copies;
static size_t num_allocated_fibers, num_allocated_blocks;

static void fiber_main() {
    call_kernel(call_arguments);
    self->state = DONE;
    ++block->num_done;
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
        stacks = static_cast<char*>(map_memory(num_fibers * STACK_BYTES));
        for (size_t i = 0; i < num_fibers; ++i) mprotect(stacks + i * STACK_BYTES, 4096, PROT_NONE);
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

inline void poison_shared() {
    if (static_bytes()) memset(__start_shim_shared, 0xff, static_bytes());
    if (dynamic_bytes) memset(dynamic_start, 0xff, dynamic_bytes);
}

static void start_block(Block* b, Index3 index, size_t number, size_t place) {
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
        fiber.block = int(number);
        fiber.lane = i & 31;
        fiber.warp = i >> 5;
        fiber.num_copies = fiber.group = 0;
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
    size_t number = 0;
    for (unsigned z = 0; z < shape.grid[2]; ++z)
        for (unsigned y = 0; y < shape.grid[1]; ++y)
            for (unsigned x = 0; x < shape.grid[0] && !failed; ++x) {
                Block* b = all_blocks;
                start_block(b, {x, y, z}, number++, 0);
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

static void run_resident(const Shape& shape, size_t num_blocks) {
    const size_t fixed = static_bytes();
    char* memory = static_cast<char*>(map_memory(num_blocks * (fixed + dynamic_bytes) + 1));
    memset(memory, 0xff, num_blocks * (fixed + dynamic_bytes));
    for (size_t i = 0; i < num_blocks; ++i) {
        const unsigned row = i / shape.grid[0];
        start_block(all_blocks + i,
                    {unsigned(i % shape.grid[0]), row % shape.grid[1], row / shape.grid[1]}, i, i);
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
            if (fixed) memcpy(__start_shim_shared, b.static_copy, fixed);
            if (dynamic_bytes) memcpy(dynamic_start, b.dynamic_copy, dynamic_bytes);
            wake_paused(&b);
            useful |= run_block(&b, shape.order);
            if (fixed) memcpy(b.static_copy, __start_shim_shared, fixed);
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
    kernel_name = name;
    call_kernel = call;
    call_arguments = arguments;
    failed = false;
    block_size = {shape.block, 1, 1};
    grid_size = {shape.grid[0], shape.grid[1], shape.grid[2]};
    allocate(shape.resident ? num_blocks : 1);

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
            run_resident(shape, num_blocks);
        } else {
            run_one_by_one(shape);
        }
        self = nullptr;
    }
    munmap(mapped, pages + 2 * page);
    return failed ? error_text : nullptr;
}

}  // namespace shim
