// Stacks and the switch between them: a few instructions where the processor is known.
#pragma once

#include <cstddef>
#include <cstring>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace shim {

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

}  // namespace shim
