#include "counts.h"

#if defined(GEMMA4_COUNTED)

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <unordered_map>

#include <dlfcn.h>

#include "runtime.h"

namespace emulator {
namespace {

constexpr uintptr_t kBankBytes = 4, kBanks = 32, kSectorBytes = 32;

// A warp instruction in the making.
struct Instruction {
  uint32_t lanes = 0;
  uintptr_t addresses[kWarp];
  size_t bytes[kWarp];
};

// The instructions from one place since the warp last met.
struct Recorded {
  const void* address = nullptr;
  const char* what = nullptr;
  Traffic traffic{};
  size_t seen[kWarp] = {};
  std::vector<Instruction> instructions;
};

using Key = uintptr_t;  // a place and a kind of traffic: addresses of code are below 2^62

std::vector<std::unordered_map<Key, Recorded>> warps;
std::map<const void*, std::map<Key, Place>> found;  // by kernel
std::map<const void*, uint64_t> launches;
const void* running_kernel = nullptr;

// The hardware serves 32 lanes at a time where each wants up to 4 bytes, 16 where 8, and 8 where 16. To those a bank gives one
// word at a time, to everyone who wants it.
Count shared_count(const Instruction& instruction) {
  size_t widest = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (instruction.lanes >> lane & 1) widest = std::max(widest, instruction.bytes[lane]);
  }
  const int together = widest <= 4 ? 32 : widest <= 8 ? 16 : 8;
  Count count{1, 0, 0};
  for (int first = 0; first < kWarp; first += together) {
    std::vector<uintptr_t> words;
    for (int lane = first; lane < first + together; ++lane) {
      if (!(instruction.lanes >> lane & 1)) continue;
      const uintptr_t begin = instruction.addresses[lane], end = begin + instruction.bytes[lane];
      for (uintptr_t word = begin / kBankBytes; word * kBankBytes < end; ++word) words.push_back(word);
    }
    if (words.empty()) continue;
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    uint64_t of_bank[kBanks] = {};
    for (uintptr_t word : words) ++of_bank[word % kBanks];
    count.taken += *std::max_element(of_bank, of_bank + kBanks);
    ++count.ideal;
  }
  return count;
}

Count global_count(const Instruction& instruction) {
  std::map<uintptr_t, uint32_t> sectors;  // which of its bytes are wanted
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(instruction.lanes >> lane & 1)) continue;
    for (size_t i = 0; i < instruction.bytes[lane]; ++i) {
      const uintptr_t byte = instruction.addresses[lane] + i;
      sectors[byte / kSectorBytes] |= 1u << byte % kSectorBytes;
    }
  }
  uint64_t bytes = 0;
  for (const auto& [sector, wanted] : sectors) bytes += uint64_t(__builtin_popcount(wanted));
  return {1, sectors.size(), (bytes + kSectorBytes - 1) / kSectorBytes};
}

void add(Count& to, const Count& more) {
  to.instructions += more.instructions;
  to.taken += more.taken;
  to.ideal += more.ideal;
}

void record(const char* what, bool is_store, const void* address, size_t bytes, const void* from) {
  if (running_kernel == nullptr || bytes == 0) return;
  uintptr_t place = 0;
  const Memory memory = memory_of(address, &place);
  if (memory == Memory::kLocal) return;
  const bool shared = memory == Memory::kShared;
  const auto traffic = shared ? (is_store ? Traffic::kSharedStores : Traffic::kSharedLoads)
                              : (is_store ? Traffic::kGlobalStores : Traffic::kGlobalLoads);
  const int number = thread_number(), lane = number % kWarp;
  Recorded& recorded = warps[size_t(number / kWarp)][reinterpret_cast<Key>(from) << 2 | Key(traffic)];
  recorded.address = from;
  recorded.what = what;
  recorded.traffic = traffic;
  // No instruction has more than 16 bytes: a longer copy is several.
  for (size_t done = 0; done < bytes; done += 16) {
    const size_t which = recorded.seen[lane]++;
    if (which == recorded.instructions.size()) recorded.instructions.emplace_back();
    Instruction& instruction = recorded.instructions[which];
    instruction.lanes |= 1u << lane;
    instruction.addresses[lane] = place + done;
    instruction.bytes[lane] = std::min<size_t>(16, bytes - done);
  }
}

unsigned long offset_in_file(const void* address) {
  Dl_info info{};
  if (dladdr(address, &info) == 0) return 0;
  return static_cast<unsigned long>(static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase));
}

}  // namespace

Count Counts::total(Traffic traffic) const {
  Count sum;
  for (const Place& place : places) {
    if (place.traffic == traffic) add(sum, place.count);
  }
  return sum;
}

void counting_begins(const void* kernel, size_t count) {
  running_kernel = kernel;
  warps.assign(count, {});
  ++launches[kernel];
}

void count_warp(size_t warp) {
  for (auto& [key, recorded] : warps[warp]) {
    auto& places = found[running_kernel];
    Place& place = places.try_emplace(key, Place{recorded.address, recorded.what, recorded.traffic, {}}).first->second;
    const bool shared = recorded.traffic == Traffic::kSharedLoads || recorded.traffic == Traffic::kSharedStores;
    for (const Instruction& instruction : recorded.instructions) {
      add(place.count, shared ? shared_count(instruction) : global_count(instruction));
    }
  }
  warps[warp].clear();
}

void count_all_warps() {
  for (size_t warp = 0; warp < warps.size(); ++warp) count_warp(warp);
}

std::vector<Counts> take_counts() {
  std::vector<Counts> all;
  for (const auto& [kernel, times] : launches) {
    Counts counts{kernel, times, {}};
    for (const auto& [key, place] : found[kernel]) counts.places.push_back(place);
    all.push_back(std::move(counts));
  }
  found.clear();
  launches.clear();
  return all;
}

std::string take_counts_as_text() {
  static const char* const kNames[kKindsOfTraffic] = {"shared-loads", "shared-stores", "global-loads", "global-stores"};
  std::string text;
  char line[256];
  for (const Counts& counts : take_counts()) {
    std::snprintf(line, sizeof line, "kernel %lx %lu\n", offset_in_file(counts.kernel),
                  static_cast<unsigned long>(counts.launches));
    text += line;
    for (const Place& place : counts.places) {
      const Count& count = place.count;
      std::snprintf(line, sizeof line, "place %lx %s %s %lu %lu %lu\n", offset_in_file(place.address),
                    kNames[int(place.traffic)], place.what, static_cast<unsigned long>(count.instructions),
                    static_cast<unsigned long>(count.taken), static_cast<unsigned long>(count.ideal));
      text += line;
    }
  }
  return text;
}

void count_load(const char* what, const void* address, size_t bytes) {
  record(what, false, address, bytes, __builtin_return_address(0));
}
void count_store(const char* what, void* address, size_t bytes) {
  record(what, true, address, bytes, __builtin_return_address(0));
}
void count_copy(void* target, const void* source, size_t bytes) {
  record("plain", false, source, bytes, __builtin_return_address(0));
  record("plain", true, target, bytes, __builtin_return_address(0));
  std::memcpy(target, source, bytes);
}

}  // namespace emulator

// What GCC calls before each access in code that it compiles with -fsanitize=thread.
extern "C" {

#define GEMMA4_LOAD(name, bytes) \
  void name(void* at) { emulator::record("plain", false, at, bytes, __builtin_return_address(0)); }
#define GEMMA4_STORE(name, bytes) \
  void name(void* at) { emulator::record("plain", true, at, bytes, __builtin_return_address(0)); }
#define GEMMA4_ACCESSES(bytes)                        \
  GEMMA4_LOAD(__tsan_read##bytes, bytes)              \
  GEMMA4_STORE(__tsan_write##bytes, bytes)            \
  GEMMA4_LOAD(__tsan_unaligned_read##bytes, bytes)    \
  GEMMA4_STORE(__tsan_unaligned_write##bytes, bytes)
GEMMA4_ACCESSES(1)
GEMMA4_ACCESSES(2)
GEMMA4_ACCESSES(4)
GEMMA4_ACCESSES(8)
GEMMA4_ACCESSES(16)
void __tsan_read_range(void* at, size_t bytes) { emulator::record("plain", false, at, bytes, __builtin_return_address(0)); }
void __tsan_write_range(void* at, size_t bytes) { emulator::record("plain", true, at, bytes, __builtin_return_address(0)); }
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// For who loads a module of the counted build: see take_counts_as_text. The text holds until the next call.
__attribute__((visibility("default"))) const char* gemma4_emulator_counts() {
  static std::string text;
  text = emulator::take_counts_as_text();
  return text.c_str();
}

}  // extern "C"

#endif
