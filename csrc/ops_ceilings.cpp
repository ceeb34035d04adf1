// Ops that measure the machine: the ceilings that benchmarks print shares of, and one pass over a tensor.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "bind.h"
#include "cpu/ceiling_kinds.h"
#include "cpu/targets/targets.h"
#include "parallel.h"

namespace fastattn {
namespace {

constexpr const char* kCeilingNames[] = {"fma_f32", "dot_bf16", "tile_bf16", "read", "copy", "copy_stream"};

int ceiling_of(const std::string& name) {
  for (int i = 0; i < int(std::size(kCeilingNames)); ++i) {
    if (name == kCeilingNames[i]) return i;
  }
  std::string known;
  for (const char* each : kCeilingNames) known += std::string(known.empty() ? "" : ", ") + each;
  STD_TORCH_CHECK(false, "fastattn: kind must be one of ", known, "; got '", name, "'");
}

// One thread's memory, touched first by that thread.
struct Buffers {
  std::unique_ptr<void, decltype(&std::free)> source{nullptr, std::free}, destination{nullptr, std::free};

  bool allocate(int64_t bytes) {
    source.reset(std::aligned_alloc(4096, bytes));
    destination.reset(std::aligned_alloc(4096, bytes));
    if (!source || !destination) return false;
    // Random bf16 numbers in +-[0.5, 1), which in pairs are random fp32 numbers in the same range.
    uint32_t state = 0x9e3779b9;
    uint16_t* words = static_cast<uint16_t*>(source.get());
    for (int64_t i = 0; i < bytes / 2; ++i) {
      state = state * 1664525 + 1013904223;
      words[i] = uint16_t(0x3f00 | (state >> 24 & 0x7f) | (state >> 16 & 0x8000));
    }
    std::memset(destination.get(), 1, bytes);
    return true;
  }
};

template <class Body>
void on_all_threads(int64_t threads, const Body& body) {
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// FLOP/s or bytes/s of all threads together: the best of short bursts within the time given, 0 where the
// instruction set in use has no such instruction.
double measure_ceiling(std::string name, double seconds, int64_t bytes) {
  const int kind = ceiling_of(name);
  STD_TORCH_CHECK(seconds > 0 && seconds <= 60, "fastattn: seconds must be in (0, 60], got ", seconds);
  STD_TORCH_CHECK(bytes >= 0, "fastattn: bytes must not be negative, got ", bytes);
  const auto run = kernels().ceiling;
  const int64_t threads = torch::stable::get_num_threads();
  // A copy's working set is what is read and what is written together.
  int64_t share = bytes / threads / (kind > int(Ceiling::kRead) ? 2 : 1);
  share = std::max(share / kCeilingBlock, int64_t(1)) * kCeilingBlock;
  const int64_t room = (std::max(share, kCeilingData) + 4095) / 4096 * 4096;

  std::vector<Buffers> buffers(threads);
  std::atomic<bool> allocated{true};
  on_all_threads(threads, [&](int64_t i) {
    if (!buffers[i].allocate(room)) allocated = false;
  });
  STD_TORCH_CHECK(allocated, "fastattn: out of memory for ", 2 * room * threads, " bytes to measure '", name,
                  "' on");

  std::vector<double> work(threads);
  const auto burst = [&](int64_t count, int64_t rounds) {
    const auto start = std::chrono::steady_clock::now();
    on_all_threads(count, [&](int64_t i) {
      work[i] = run(kind, rounds, buffers[i].source.get(), buffers[i].destination.get(), share);
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  // Alone, so that what it costs to wake the other threads does not pass for work.
  int64_t rounds = 1;
  while (burst(1, rounds) < 4e-3 && work[0] > 0) rounds *= 2;
  double best = 0, spent = 0;
  do {
    const double time = burst(threads, rounds);
    double total = 0;
    for (double each : work) total += each;
    best = std::max(best, total / time);
    spent += time;
  } while (spent < seconds && best > 0);
  return best;
}

// Reads a tensor once, on all threads, and returns the bytes read: what any scan of it has to pay.
int64_t read_once(const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), "fastattn: the tensor to read must be contiguous");
  const int64_t bytes = t.numel() * int64_t(t.element_size());
  const char* data = static_cast<const char*>(t.data_ptr());
  const auto run = kernels().ceiling;
  const int64_t blocks = bytes / kCeilingBlock, chunk = 256;
  run_tasks((blocks + chunk - 1) / chunk, 4096, [&](int64_t i, void* scratch) {
    const int64_t count = std::min(chunk, blocks - i * chunk);
    run(int(Ceiling::kRead), 1, data + i * chunk * kCeilingBlock, scratch, count * kCeilingBlock);
  });
  return blocks * kCeilingBlock;
}

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn, m) {
  m.def("measure_ceiling(str kind, float seconds, int bytes) -> float");
  m.def("read_once(Tensor t) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("measure_ceiling", TORCH_BOX(&fastattn::measure_ceiling));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) { m.impl("read_once", TORCH_BOX(&fastattn::read_once)); }
