// Fibers: a stack, and a switch from one to another, with what the sanitizers must be told of both.
#pragma once

#include <cstddef>

namespace emulator {

class Fiber {
 public:
  // The fiber of the caller: it has a stack already.
  Fiber();
  // A fiber that runs entry() when it is first switched to. entry never returns.
  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Leaves `from`, the running fiber, and goes on with this one.
  void resume(Fiber& from);
  // Whether an address is on its stack.
  bool owns(const void* address) const;
  // What a new fiber does first.
  static void arrived();

 private:
  void* stack_pointer_ = nullptr;
  char* stack_ = nullptr;
  void* portable_ = nullptr;         // ucontext_t, where there is no switch of our own
  void* thread_sanitizer_ = nullptr;
  void* fake_stack_ = nullptr;       // AddressSanitizer's
  const void* bottom_ = nullptr;
  size_t size_ = 0;
};

}  // namespace emulator
