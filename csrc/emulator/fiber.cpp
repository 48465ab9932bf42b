#include "fiber.h"

#include <cstdint>
#include <cstdlib>
#include <new>

#include <sys/mman.h>
#include <ucontext.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define GEMMA4_ADDRESS_SANITIZER 1
#endif

#if defined(GEMMA4_THREAD_SANITIZER)
// This file itself is compiled without -fsanitize=thread, so the header with these is not in force.
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
constexpr unsigned kNoSynchronisation = 1;  // a switch orders nothing; only barriers do
#endif

#if defined(__x86_64__) && !defined(GEMMA4_PORTABLE_FIBERS)
#define GEMMA4_OWN_SWITCH 1
// Twelve nanoseconds instead of the 180 of swapcontext, which asks the kernel for the signal mask.
extern "C" void gemma4_switch_stack(void** save, void* load);
asm(R"(
.text
.globl gemma4_switch_stack
.hidden gemma4_switch_stack
.type gemma4_switch_stack,@function
gemma4_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gemma4_switch_stack,.-gemma4_switch_stack
)");
#endif

namespace emulator {
namespace {
constexpr size_t kStackBytes = 256 * 1024;  // a kernel's locals under AddressSanitizer, with much to spare
Fiber* leaving = nullptr;
Fiber* entering = nullptr;
}  // namespace

Fiber::Fiber() {
#if defined(GEMMA4_THREAD_SANITIZER)
  thread_sanitizer_ = __tsan_get_current_fiber();
#endif
}

Fiber::Fiber(void (*entry)()) {
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory);
  bottom_ = stack_;
  size_ = kStackBytes;
#if defined(GEMMA4_OWN_SWITCH)
  auto* top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;  // entry() must find the stack as after a call: 8 bytes past a multiple of 16
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  stack_pointer_ = top;
#else
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = kStackBytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  portable_ = context;
#endif
#if defined(GEMMA4_THREAD_SANITIZER)
  thread_sanitizer_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
  if (stack_ != nullptr) {
    munmap(stack_, kStackBytes);
#if defined(GEMMA4_THREAD_SANITIZER)
    __tsan_destroy_fiber(thread_sanitizer_);
#endif
  }
  delete static_cast<ucontext_t*>(portable_);
}

bool Fiber::owns(const void* address) const {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(stack_) < kStackBytes;
}

void Fiber::arrived() {
#if defined(GEMMA4_ADDRESS_SANITIZER)
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(entering->fake_stack_, &bottom, &size);
  if (leaving->stack_ == nullptr) {  // the caller's own stack, which only AddressSanitizer knows
    leaving->bottom_ = bottom;
    leaving->size_ = size;
  }
#endif
}

void Fiber::resume(Fiber& from) {
  leaving = &from;
  entering = this;
#if defined(GEMMA4_ADDRESS_SANITIZER)
  __sanitizer_start_switch_fiber(&from.fake_stack_, bottom_, size_);
#endif
#if defined(GEMMA4_THREAD_SANITIZER)
  __tsan_switch_to_fiber(thread_sanitizer_, kNoSynchronisation);
#endif
#if defined(GEMMA4_OWN_SWITCH)
  gemma4_switch_stack(&from.stack_pointer_, stack_pointer_);
#else
  if (from.portable_ == nullptr) from.portable_ = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.portable_), static_cast<ucontext_t*>(portable_));
#endif
  arrived();
}

}  // namespace emulator
