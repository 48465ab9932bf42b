#include "runtime.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "counts.h"
#include "fiber.h"

#if defined(GEMMA4_THREAD_SANITIZER)
extern "C" {
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

namespace emulator {
namespace {

constexpr size_t kLargestInput = 64;  // bytes that a lane may bring to a meeting

// Not memcpy: ThreadSanitizer would see the inputs of a meeting as memory that the lanes share without order.
void copy_bytes(unsigned char* target, const void* source, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) target[i] = static_cast<const unsigned char*>(source)[i];
}

// Where a number of threads wait for each other. Two sides in turn: a thread may come to the next meeting while others have not
// left this one, but not to the one after.
struct Meeting {
  int expected = 0;
  int arrived = 0;
  int side = 0;
  const char* what = nullptr;
  int line = 0;
  char token[2] = {};  // what ThreadSanitizer orders by
  alignas(16) unsigned char inputs[2][kWarp * kLargestInput];
};

struct Copy {
  void* target;
  size_t bytes;
  unsigned char data[16];
};

enum class State { kReady, kWaiting, kDone };

struct Thread {
  std::unique_ptr<Fiber> fiber;
  Index index;
  int number = 0;
  State state = State::kReady;
  Meeting* meeting = nullptr;
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> issued;
};

struct Launch {
  const std::function<void()>* body = nullptr;
  Index grid, block, place;
  Fiber scheduler;
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Meeting whole;
  Thread* running = nullptr;
  void* shared = nullptr;
  size_t shared_bytes = 0;
  char begin_token = 0, end_token = 0;
  std::string failure;
};

Launch* now = nullptr;
std::mutex one_at_a_time;

std::string describe(const Thread& thread) {
  std::string text = "thread " + std::to_string(thread.number);
  if (thread.state == State::kDone) return text + " has finished";
  return text + " waits in " + thread.meeting->what + " (line " + std::to_string(thread.meeting->line) + ")";
}

void back_to_scheduler() { now->scheduler.resume(*now->running->fiber); }

void thread_main() {
  Fiber::arrived();
  for (;;) {
    __tsan_acquire(&now->begin_token);
    (*now->body)();
    __tsan_release(&now->end_token);
    now->running->state = State::kDone;
    back_to_scheduler();
  }
}

// Comes to a meeting, waits for the others, and returns the side on which this one was.
int come(Meeting& meeting, const char* what, int line, bool orders_memory, const void* input, size_t bytes, Combine combine) {
  Thread& thread = *now->running;
  const int side = meeting.side;
  if (meeting.arrived == 0) {
    meeting.what = what;
    meeting.line = line;
  } else if (std::strcmp(meeting.what, what) != 0 || meeting.line != line) {
    fail("divergence: thread " + std::to_string(thread.number) + " came to " + what + " (line " + std::to_string(line) +
         ") where others wait in " + meeting.what + " (line " + std::to_string(meeting.line) + ")");
  }
  if (orders_memory) __tsan_release(&meeting.token[side]);
  copy_bytes(meeting.inputs[side] + size_t(thread.number % kWarp) * bytes, input, bytes);
  if (++meeting.arrived == meeting.expected) {
    if (combine != nullptr) combine(meeting.inputs[side]);
    if (&meeting == &now->whole) {
      count_all_warps();
    } else {
      count_warp(size_t(thread.number / kWarp));
    }
    meeting.arrived = 0;
    meeting.side = 1 - side;
    for (Thread& other : now->threads) {
      if (other.state == State::kWaiting && other.meeting == &meeting) other.state = State::kReady;
    }
  } else {
    thread.state = State::kWaiting;
    thread.meeting = &meeting;
    back_to_scheduler();
  }
  if (orders_memory) __tsan_acquire(&meeting.token[side]);
  return side;
}

void run_block() {
  for (Thread& thread : now->threads) {
    thread.state = State::kReady;
    thread.committed.clear();
    thread.issued.clear();
  }
  __tsan_release(&now->begin_token);
  for (bool progress = true; progress && now->failure.empty();) {
    progress = false;
    for (Thread& thread : now->threads) {
      if (thread.state != State::kReady) continue;
      progress = true;
      now->running = &thread;
      thread.fiber->resume(now->scheduler);
      if (!now->failure.empty()) return;
    }
  }
  __tsan_acquire(&now->end_token);
  count_all_warps();
  const Thread* waiting = nullptr;
  const Thread* other = nullptr;
  for (const Thread& thread : now->threads) {
    if (thread.state == State::kWaiting && waiting == nullptr) waiting = &thread;
  }
  if (waiting == nullptr) return;
  for (const Thread& thread : now->threads) {
    if (thread.state == State::kDone || thread.meeting != waiting->meeting) other = &thread;
  }
  now->failure = "divergence: " + describe(*waiting) + (other ? ", " + describe(*other) : "") + ": nobody can go on";
}

}  // namespace

const Index& thread_index() { return now->running->index; }
const Index& block_index() { return now->place; }
const Index& block_size() { return now->block; }
const Index& grid_size() { return now->grid; }
int lane() { return now->running->number % kWarp; }
int thread_number() { return now->running->number; }
void* shared_memory() { return now->shared; }

Memory memory_of(const void* address, uintptr_t* place) {
  *place = reinterpret_cast<uintptr_t>(address);
  const auto within = [&](const void* first, size_t bytes) { return *place - reinterpret_cast<uintptr_t>(first) < bytes; };
  if (now == nullptr || now->running->fiber->owns(address)) return Memory::kLocal;
  // What stands for special registers and constant memory: threadIdx and its kin, and where the launch finds its parameters.
  if (within(now, sizeof *now) || within(now->threads.data(), now->threads.size() * sizeof(Thread))) return Memory::kLocal;
  if (within(now->body, sizeof *now->body)) return Memory::kLocal;
  if (!within(now->shared, now->shared_bytes)) return Memory::kGlobal;
  *place -= reinterpret_cast<uintptr_t>(now->shared);
  return Memory::kShared;
}

void fail(const std::string& sentence) {
  now->failure = sentence;
  for (;;) back_to_scheduler();
}

void block_barrier(int line) { come(now->whole, "__syncthreads", line, true, nullptr, 0, nullptr); }

void warp_barrier(int line) {
  come(now->warps[now->running->number / kWarp], "__syncwarp", line, true, nullptr, 0, nullptr);
}

void* meet(const char* what, int line, const void* input, size_t bytes, Combine combine) {
  Meeting& meeting = now->warps[now->running->number / kWarp];
  const int side = come(meeting, what, line, false, input, bytes, combine);
  return meeting.inputs[side];
}

void issue_copy(void* target, const void* data, size_t bytes) {
  Copy copy{target, bytes, {}};
  std::memcpy(copy.data, data, bytes);
  now->running->issued.push_back(copy);
}

void commit_copies() {
  now->running->committed.push_back(std::move(now->running->issued));
  now->running->issued.clear();
}

void wait_copies(int groups_under_way, Store store) {
  auto& committed = now->running->committed;
  const size_t done = committed.size() > size_t(groups_under_way) ? committed.size() - groups_under_way : 0;
  for (size_t group = 0; group < done; ++group) {
    for (const Copy& copy : committed[group]) store(copy.target, copy.data, copy.bytes);
  }
  committed.erase(committed.begin(), committed.begin() + done);
}

std::string launch(const std::function<void()>& body, Index grid, Index block, size_t shared_bytes, const void* kernel) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || threads % kWarp != 0) return "a block must have a multiple of 32 threads, at most 1024";
  std::lock_guard<std::mutex> lock(one_at_a_time);
  auto launch = std::make_unique<Launch>();
  now = launch.get();
  now->body = &body;
  now->grid = grid;
  now->block = block;
  now->shared_bytes = shared_bytes;
  now->threads = std::vector<Thread>(threads);
  now->warps = std::vector<Meeting>(threads / kWarp);
  now->whole.expected = int(threads);
  for (Meeting& warp : now->warps) warp.expected = kWarp;
  for (size_t number = 0; number < threads; ++number) {
    Thread& thread = now->threads[number];
    thread.number = int(number);
    thread.index = {unsigned(number % block.x), unsigned(number / block.x % block.y), unsigned(number / block.x / block.y)};
    thread.fiber = std::make_unique<Fiber>(thread_main);
  }
  counting_begins(kernel, now->warps.size());
  Index& place = now->place;
  for (place.z = 0; place.z < grid.z && now->failure.empty(); ++place.z) {
    for (place.y = 0; place.y < grid.y && now->failure.empty(); ++place.y) {
      for (place.x = 0; place.x < grid.x && now->failure.empty(); ++place.x) {
        now->shared = std::malloc(shared_bytes != 0 ? shared_bytes : 1);
        std::memset(now->shared, 0xFF, shared_bytes);
        run_block();
        std::free(now->shared);
      }
    }
  }
  std::string failure = now->failure;
  now = nullptr;
  return failure;
}

}  // namespace emulator
