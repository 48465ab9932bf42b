// Kernels with planted faults, each beside the same kernel without it: what the emulator claims to catch.
//
//   faults NAME       runs one; prints what came of it. Exit 0: nothing found; 1: a wrong result; 2: the emulator ended the launch.
//   faults            prints the names
//
// AddressSanitizer and ThreadSanitizer end the program themselves, with their own status.
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "../../csrc/common/device.cuh"

using namespace gemma4;

namespace {

constexpr int kThreads = 128;
constexpr int kTile = 4 * kThreads;  // words of a stage: 16 bytes a thread

// Each thread gives its number to its neighbour in the next warp.
template <bool BARRIER>
__global__ void neighbours(const uint32_t* in, uint32_t* out) {
  GEMMA4_SHARED(memory);
  auto* words = reinterpret_cast<volatile uint32_t*>(memory);
  words[threadIdx.x] = in[threadIdx.x];
  if (BARRIER) __syncthreads();
  out[threadIdx.x] = words[(threadIdx.x + kThreads - 32) % kThreads];
}

// The same within a warp.
template <bool BARRIER>
__global__ void neighbour_lanes(const uint32_t* in, uint32_t* out) {
  GEMMA4_SHARED(memory);
  auto* words = reinterpret_cast<volatile uint32_t*>(memory);
  words[threadIdx.x] = in[threadIdx.x];
  if (BARRIER) __syncwarp();
  out[threadIdx.x] = words[threadIdx.x / 32 * 32 + (threadIdx.x + 31) % 32];
}

// One copy, read by the thread that made it, or (`BARRIER` left out) by another one.
template <bool WAIT, bool BARRIER>
__global__ void one_copy(const uint32_t* in, uint32_t* out) {
  GEMMA4_SHARED(memory);
  auto* words = reinterpret_cast<volatile uint32_t*>(memory);
  ptx::copy_16(memory + 16 * threadIdx.x, in + 4 * threadIdx.x, 16);
  ptx::commit();
  if (WAIT) ptx::wait<0>();
  if (BARRIER) __syncthreads();
  out[threadIdx.x] = words[(4 * threadIdx.x + 512 - 64) % 512];
}

// Sums tiles through a ring. Right for SLOTS = STAGES; with one slot less, the copy of a tile goes where another is still read.
template <int SLOTS>
__global__ void ring(const uint32_t* in, uint32_t* out, int tiles) {
  constexpr int STAGES = 3;
  GEMMA4_SHARED(memory);
  auto load = [&](int tile) {
    if (tile < tiles) {
      ptx::copy_16(memory + tile % SLOTS * kTile * 4 + 16 * threadIdx.x, in + tile * kTile + 4 * threadIdx.x, 16);
    }
    ptx::commit();
  };
  uint32_t sum = 0;
  for (int tile = 0; tile < STAGES - 1; ++tile) load(tile);
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::wait<STAGES - 2>();
    __syncthreads();
    load(tile + STAGES - 1);
    const auto* words = reinterpret_cast<volatile uint32_t*>(memory) + tile % SLOTS * kTile;
    for (int i = 0; i < 4; ++i) sum += words[(4 * threadIdx.x + 64 + i) % kTile];
  }
  out[threadIdx.x] = sum;
}

template <bool ALL>
__global__ void barrier_of_some(const uint32_t* in, uint32_t* out) {
  if (ALL || threadIdx.x < 96) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

// Some come to the one, some to the other.
__global__ void two_barriers(const uint32_t* in, uint32_t* out) {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = in[threadIdx.x];
}

template <bool ALL>
__global__ void collective_of_some(const uint32_t* in, uint32_t* out) {
  uint32_t value = in[threadIdx.x];
  if (ALL || threadIdx.x % 32 < 16) value = emulator::shuffle(value, (threadIdx.x + 1) % 32, __LINE__);
  out[threadIdx.x] = value;
}

template <int BEYOND>
__global__ void reads_global(const uint32_t* in, uint32_t* out) {
  out[threadIdx.x] = in[threadIdx.x * 4 + 3 + BEYOND];
}

template <int BEYOND>
__global__ void writes_shared(const uint32_t* in, uint32_t* out) {
  GEMMA4_SHARED(memory);
  auto* words = reinterpret_cast<volatile uint32_t*>(memory);
  words[threadIdx.x + BEYOND] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = words[threadIdx.x];
}

template <int BEYOND>
__global__ void copies_global(const uint32_t* in, uint32_t* out) {
  GEMMA4_SHARED(memory);
  ptx::copy_16(memory + 16 * threadIdx.x, in + 4 * (threadIdx.x + BEYOND), 16);
  ptx::commit();
  ptx::wait<0>();
  out[threadIdx.x] = reinterpret_cast<volatile uint32_t*>(memory)[4 * threadIdx.x];
}

// D[r][c] = sum over k of A[r][k] B[k][c], A[r][k] = r, B[k][c] = c: 16 r c, with bf16 operands. Warps do the same.
template <bool RIGHT>
__global__ void fragments(uint32_t* out) {
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  auto both = [](uint32_t value) { return ptx::round_to_bf16(float(value)) * 0x10001u; };
  const uint32_t upper = RIGHT ? 1 : 2, lower = RIGHT ? 2 : 1;
  uint32_t a[4] = {both(g)}, b[2] = {both(g), both(g)};
  a[upper] = both(g + 8);
  a[lower] = both(g);
  a[3] = both(g + 8);
  float d[4], zero[4] = {0, 0, 0, 0};
  ptx::multiply<ptx::Bf16>(d, a, b, zero);
  for (uint32_t i = 0; i < 4; ++i) {
    if (threadIdx.x < 32) out[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = uint32_t(d[i]);
  }
}

// Four matrices whose 16-bit element (matrix, row, column) is 64 matrix + 8 row + column.
template <bool RIGHT>
__global__ void matrices(uint32_t* out) {
  GEMMA4_SHARED(memory);
  auto* halves = reinterpret_cast<volatile uint16_t*>(memory);
  for (uint32_t i = threadIdx.x; i < 256; i += kThreads) halves[i] = uint16_t(i);
  __syncthreads();
  const uint32_t lane = threadIdx.x % 32;
  uint32_t got[4];
  ptx::load_matrices(got, memory + 16 * (RIGHT ? lane : lane ^ 8));
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t first = 64 * i + 2 * lane;
    if (threadIdx.x < 32) out[4 * lane + i] = got[i] == (first | (first + 1) << 16);
  }
}

using Words = std::vector<uint32_t>;

struct Program {
  int inputs;
  size_t shared_bytes;
  std::function<std::string(const uint32_t*, uint32_t*, size_t)> run;
  std::function<uint32_t(const Words&, int)> expected;
};

template <class Kernel, class... More>
std::function<std::string(const uint32_t*, uint32_t*, size_t)> with_input(Kernel kernel, More... more) {
  return [=](const uint32_t* in, uint32_t* out, size_t shared) {
    return launch(kernel, 2, 1, kThreads, shared, nullptr, in, out, more...);
  };
}

std::function<std::string(const uint32_t*, uint32_t*, size_t)> without_input(void (*kernel)(uint32_t*)) {
  return [=](const uint32_t*, uint32_t* out, size_t shared) { return launch(kernel, 1, 1, kThreads, shared, nullptr, out); };
}

std::map<std::string, Program> programs() {
  auto same = [](const Words& in, int i) { return in[i]; };
  auto rotated = [](const Words& in, int i) { return in[(i + kThreads - 32) % kThreads]; };
  auto within = [](const Words& in, int i) { return in[i / 32 * 32 + (i + 31) % 32]; };
  auto copied = [](const Words& in, int i) { return in[(4 * i + 512 - 64) % 512]; };
  auto fourth = [](const Words& in, int i) { return in[4 * i]; };
  auto tiles = [](const Words& in, int i) {
    uint32_t sum = 0;
    for (int tile = 0; tile < 8; ++tile) {
      for (int j = 0; j < 4; ++j) sum += in[tile * kTile + (4 * i + 64 + j) % kTile];
    }
    return sum;
  };
  auto shuffled = [](const Words& in, int i) { return in[i / 32 * 32 + (i + 1) % 32]; };
  auto product = [](const Words&, int i) { return uint32_t(16 * (i / 8) * (i % 8)); };
  auto one = [](const Words&, int) { return uint32_t(1); };
  return {
      {"barrier", {128, 512, with_input(neighbours<true>), rotated}},
      {"barrier-missing", {128, 512, with_input(neighbours<false>), rotated}},
      {"warp-barrier", {128, 512, with_input(neighbour_lanes<true>), within}},
      {"warp-barrier-missing", {128, 512, with_input(neighbour_lanes<false>), within}},
      {"copy", {512, 2048, with_input(one_copy<true, true>), copied}},
      {"copy-wait-missing", {512, 2048, with_input(one_copy<false, true>), copied}},
      {"copy-barrier-missing", {512, 2048, with_input(one_copy<true, false>), copied}},
      {"ring", {8 * kTile, 3 * 2048, with_input(ring<3>, 8), tiles}},
      {"ring-short", {8 * kTile, 3 * 2048, with_input(ring<2>, 8), tiles}},
      {"divergence", {128, 0, with_input(barrier_of_some<true>), same}},
      {"divergence-some", {128, 0, with_input(barrier_of_some<false>), same}},
      {"divergence-places", {128, 0, with_input(two_barriers), same}},
      {"collective", {128, 0, with_input(collective_of_some<true>), shuffled}},
      {"collective-some", {128, 0, with_input(collective_of_some<false>), shuffled}},
      {"global", {512, 0, with_input(reads_global<0>), [](const Words& in, int i) { return in[4 * i + 3]; }}},
      {"global-beyond", {512, 0, with_input(reads_global<1>), [](const Words& in, int i) { return in[(4 * i + 4) % 512]; }}},
      {"shared", {128, 512, with_input(writes_shared<0>), same}},
      {"shared-beyond", {128, 512, with_input(writes_shared<1>), same}},
      {"global-copy", {512, 2048, with_input(copies_global<0>), fourth}},
      {"global-copy-beyond", {512, 2048, with_input(copies_global<1>), fourth}},
      {"fragments", {128, 0, without_input(fragments<true>), product}},
      {"fragments-wrong", {128, 0, without_input(fragments<false>), product}},
      {"matrices", {128, 512, without_input(matrices<true>), one}},
      {"matrices-wrong", {128, 512, without_input(matrices<false>), one}},
  };
}

}  // namespace

int main(int count, char** arguments) {
  const auto all = programs();
  if (count < 2) {
    for (const auto& [name, program] : all) std::printf("%s\n", name.c_str());
    return 0;
  }
  const Program& program = all.at(arguments[1]);
  Words in(program.inputs);
  for (int i = 0; i < program.inputs; ++i) in[i] = 1 + 7 * i;
  Words out(kThreads, 0xDEADu);
  const std::string failure = program.run(in.data(), out.data(), program.shared_bytes);
  if (!failure.empty()) {
    std::printf("%s\n", failure.c_str());
    return 2;
  }
  for (int i = 0; i < kThreads; ++i) {
    if (out[i] != program.expected(in, i)) {
      std::printf("wrong result: element %d is %u, expected %u\n", i, out[i], program.expected(in, i));
      return 1;
    }
  }
  std::printf("right\n");
  return 0;
}
