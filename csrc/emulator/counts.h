// Counts what warps do to memory: wavefronts of shared memory, sectors of global memory, each beside the fewest there can be.
//
// Only in the counted build (csrc/build.py), which compiles kernels with -fsanitize=thread and links counts.cpp in place of
// ThreadSanitizer: the compiler then calls a function of ours before each access. One access of the source is taken for one
// instruction of the machine. Accesses of a warp's lanes from one place in the code, each lane's first there since the warp
// last met, each one's second, and so on, are one warp instruction. In other builds everything here is empty.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

#if defined(GEMMA4_COUNTED)

enum class Traffic { kSharedLoads, kSharedStores, kGlobalLoads, kGlobalStores };
constexpr int kKindsOfTraffic = 4;

struct Count {
  uint64_t instructions = 0;  // of warps
  uint64_t taken = 0;         // wavefronts of shared memory, or sectors of 32 bytes of global memory
  uint64_t ideal = 0;         // the same without bank conflicts, or with every byte of each sector wanted
};

// An instruction of a kernel: where it was called from, and its name if it is not a plain load or store.
struct Place {
  const void* address;
  const char* what;
  Traffic traffic;
  Count count;
};

struct Counts {
  const void* kernel;
  uint64_t launches = 0;
  std::vector<Place> places;
  Count total(Traffic traffic) const;
};

// Of each kernel that ran since they were last taken.
std::vector<Counts> take_counts();
// The same as lines "kernel ADDRESS LAUNCHES" and "place ADDRESS TRAFFIC WHAT INSTRUCTIONS TAKEN IDEAL". Addresses count from
// the start of the program or library as it was loaded.
std::string take_counts_as_text();

// What the twin of an instruction does to memory. Where it touches it itself is GEMMA4_UNCOUNTED.
void count_load(const char* what, const void* address, size_t bytes);
void count_store(const char* what, void* address, size_t bytes);
// Copies a vector: a load and a store, of which those count that are not of registers.
void count_copy(void* target, const void* source, size_t bytes);

// The machinery's part: a launch begins; a warp, or each of them, has met or ended.
void counting_begins(const void* kernel, size_t warps);
void count_warp(size_t warp);
void count_all_warps();

#define GEMMA4_UNCOUNTED __attribute__((no_sanitize("thread")))
// Inlined, so that an instruction's address is that of the kernel's statement.
#define GEMMA4_COUNTED_INLINE inline __attribute__((always_inline))

#else

inline void count_load(const char*, const void*, size_t) {}
inline void count_store(const char*, void*, size_t) {}
inline void counting_begins(const void*, size_t) {}
inline void count_warp(size_t) {}
inline void count_all_warps() {}

#define GEMMA4_UNCOUNTED
#define GEMMA4_COUNTED_INLINE inline

#endif

}  // namespace emulator
