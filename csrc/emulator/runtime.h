// Runs a CUDA kernel on the CPU: one fiber for each thread of a block, one block after the other.
//
// A fiber runs until it meets others: at __syncthreads, or at a collective of its warp (shuffle, ldmatrix, mma, __syncwarp). What
// is wrong with a meeting (threads that wait at different places, threads that are gone) ends the launch with a sentence.
// This file and runtime.cpp are the machinery and are never instrumented by ThreadSanitizer; what kernels do to memory happens in
// device.h, in code that is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace emulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

constexpr int kWarp = 32;

// Where the running fiber is.
const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();
int lane();
// Of the block, counted from 0.
int thread_number();

// What an address is to the running fiber. Local is what is no memory to a kernel: its own stack, where registers live, the
// built-in variables, and everything while no kernel runs. `place` is the address, or its offset from the start of shared
// memory.
enum class Memory { kLocal, kShared, kGlobal };
Memory memory_of(const void* address, uintptr_t* place);

// Bytes of dynamic shared memory of the running block: a heap block of exactly that size, so that AddressSanitizer knows its ends,
// filled with NaN before each block.
void* shared_memory();

// Runs `body` once for each thread of each block. Returns what went wrong, or "". `kernel` is the function that body calls, by
// which counts.h tells kernels apart.
std::string launch(const std::function<void()>& body, Index grid, Index block, size_t shared_bytes,
                   const void* kernel = nullptr);

// Ends the launch with this sentence. Does not return.
[[noreturn]] void fail(const std::string& sentence);

void block_barrier(int line);
void warp_barrier(int line);

// A meeting of all 32 lanes: each leaves `bytes` of input and gets a pointer to all lanes' inputs, one after the other, which holds
// until the warp's meeting after the next. The last lane that comes runs `combine` on them, if there is one. It orders no memory.
using Combine = void (*)(void* inputs);
void* meet(const char* what, int line, const void* input, size_t bytes, Combine combine = nullptr);

// cp.async of the running thread: copies that were issued, and what happens to them at a wait.
using Store = void (*)(void* target, const void* data, size_t bytes);
void issue_copy(void* target, const void* data, size_t bytes);
void commit_copies();
void wait_copies(int groups_under_way, Store store);

}  // namespace emulator
