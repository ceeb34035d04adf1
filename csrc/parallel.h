// Runs the tasks of a kernel on torch's threads.
//
// Tasks are independent and write to places of their own, so neither the number of threads nor the order can
// change a result; the order can be shuffled to prove it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <numeric>

namespace fastattn {

// Spread over 64 bits, so that leftovers of other kernels in a scratch do not pass for one.
inline uint64_t next_call() {
  static std::atomic<uint64_t> calls{0};
  return (calls.fetch_add(1, std::memory_order_relaxed) + 1) * 0x9e3779b97f4a7c15ull;
}

// A thread's scratch, kept from call to call unless it is large.
class Scratch {
 public:
  static constexpr int64_t kKept = int64_t(8) << 20;

  void* get(int64_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(4096, size_);
      STD_TORCH_CHECK(data_ != nullptr, "fastattn: out of memory for ", size_, " bytes of scratch");
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

  void done() {
    if (size_ <= kKept) return;
    std::free(data_);
    data_ = nullptr, size_ = 0;
  }

  static Scratch& of_thread() {
    static thread_local Scratch scratch;
    return scratch;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// 0: tasks run in their own order. Else a seed of another order, for tests.
inline std::atomic<int64_t>& task_order_seed() {
  static std::atomic<int64_t> seed{0};
  return seed;
}

// `together`: so many tasks in a row find in a thread's scratch what the first of them left there.
template <class Task>
void run_tasks(int64_t tasks, int64_t scratch_bytes, const Task& task, int64_t together = 1) {
  const int64_t seed = task_order_seed().load(std::memory_order_relaxed);
  int64_t step = 1;
  if (seed != 0 && tasks > 1) {
    step = std::abs(seed) * 7919 % tasks;
    while (std::gcd(step, tasks) != 1) ++step;
  }
  const auto run = [&](int64_t i, void* scratch) { task((i * step + seed) % tasks, scratch); };
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (threads <= 1) {
    Scratch& mine = Scratch::of_thread();
    void* scratch = mine.get(scratch_bytes);
    for (int64_t i = 0; i < tasks; ++i) run(i, scratch);
    mine.done();
    return;
  }
  // Threads take short runs of tasks as they get free: tasks differ in what they see.
  const int64_t run_length = together > 1 ? std::clamp<int64_t>(tasks / (threads * 4), 1, together)
                                          : std::clamp<int64_t>(tasks / (threads * 16), 1, 16);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      Scratch& mine = Scratch::of_thread();
      void* scratch = mine.get(scratch_bytes);
      for (int64_t i; (i = next.fetch_add(run_length, std::memory_order_relaxed)) < tasks;) {
        for (int64_t j = i; j < std::min(i + run_length, tasks); ++j) run(j, scratch);
      }
      mine.done();
    }
  });
}

}  // namespace fastattn
