// Host twin runtime: executes CUDA kernels, compiled as plain C++, on the CPU.
//
// Each thread of a block is a fiber with its own stack; blocks run one after another. A fiber runs until it
// reaches a synchronising operation whose condition does not hold yet, so all threads of a block share one OS
// thread and no locks are needed. What the hardware leaves open (which warp runs next, when an asynchronous
// copy lands) is decided here by Options::seed, to expose missing waits:
//   seed 0   warps and lanes in order, asynchronous operations as late as allowed
//   seed 1   warps and lanes in order, asynchronous operations at once
//   others   both at random, reproducibly; in every second block some warps run only where no other can, so
//            that they fall behind as far as barriers let them
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cuda_types.h"
#include "memory.h"
#include "sanitizers.h"

#if !defined(__x86_64__)
#error "switch_stack() is written for x86-64 only"
#endif

inline thread_local constinit uint3 threadIdx{}, blockIdx{};
inline thread_local constinit dim3 blockDim{1, 1, 1}, gridDim{1, 1, 1};

namespace twin {

constexpr int kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Options {
  uint64_t seed = 0;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  size_t stack_bytes = 128 << 10;
#else
  size_t stack_bytes = 32 << 10;
#endif
};
inline Options options;

// Operations that may take effect at any time between issue and wait, in order: cp.async, bulk stores, wgmma.
// A late operation shows a missing wait, an early one shows a buffer reused too soon.
class AsyncGroups {
 public:
  void issue(std::function<void()> operation);
  void commit() { ++open_group_; }
  void wait(int groups_left_in_flight) { run_until(open_group_ - groups_left_in_flight); }
  bool drained() const { return queue_.empty(); }

 private:
  struct Entry {
    int group;
    std::function<void()> operation;
  };
  void run_until(int group) {
    while (!queue_.empty() && queue_.front().group < group) {
      queue_.front().operation();
      queue_.pop_front();
    }
  }
  std::deque<Entry> queue_;
  int open_group_ = 0;
};

// Stacks outlive their block: the next one takes them, poisoned anew.
inline std::vector<std::unique_ptr<unsigned char[]>> spare_stacks;

struct Fiber {
  uint3 thread{};
  int index = 0;
  bool alive = false;
  void* stack_pointer = nullptr;
  std::unique_ptr<unsigned char[]> stack;
  sanitizer::FiberState sanitizer;

  // A blocked fiber runs again when *wait_word differs from wait_value.
  const uint64_t* wait_word = nullptr;
  uint64_t wait_value = 0;
  const char* wait_what = nullptr;

  AsyncGroups cp_async, bulk_store;

  int warp() const { return index / kWarpSize; }
  int lane() const { return index % kWarpSize; }
};

struct Warp {
  // Two buffers: a lane can be late reading one collective's results while others enter the next.
  alignas(16) unsigned char buffer[2][kWarpSize * 64];
  uint64_t generation = 0;
  uint32_t arrived = 0, mask = 0;
  const char* what = nullptr;

  AsyncGroups wgmma;
  bool wgmma_fenced = false;
};

struct NamedBarrier {
  uint64_t generation = 0;
  int arrived = 0, expected = 0;
};

// Saves the callee-saved registers on the current stack and continues on another one. (noipa: the caller must
// not look inside and conclude that no other register changes.)
__attribute__((naked, noipa)) inline void switch_stack(void** /*save*/, void* /*load*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

class Block;
inline thread_local constinit Block* block = nullptr;  // the block being run, if any
inline thread_local constinit Fiber* self = nullptr;   // the fiber being run, null in the scheduler

// Happens-before: every thread of a launch comes after the host's begin and before its end, but threads of
// different blocks are unordered.
inline char launch_begin, launch_end;

class Block {
 public:
  Block(dim3 dim, size_t smem_bytes, uint64_t seed)
      : smem(smem_bytes),
        fibers(dim.x * dim.y * dim.z),
        warps((fibers.size() + kWarpSize - 1) / kWarpSize),
        rng_(seed) {
    for (size_t i = 0; i < fibers.size(); ++i) {
      fibers[i].index = int(i);
      fibers[i].thread = {unsigned(i % dim.x), unsigned(i / dim.x % dim.y), unsigned(i / dim.x / dim.y)};
      if (spare_stacks.empty()) {
        const sanitizer::Observed fresh;  // new memory, whatever an earlier thread did at this address
        fibers[i].stack.reset(new unsigned char[options.stack_bytes]);
      } else {
        fibers[i].stack = std::move(spare_stacks.back());
        spare_stacks.pop_back();
      }
    }
  }
  ~Block() {
    if (sanitizer::kThread) {  // a stack that is used again would look shared between the two threads
      const sanitizer::Observed freed;
      for (Fiber& fiber : fibers) fiber.stack.reset();
    }
    for (Fiber& fiber : fibers) {
      if (fiber.stack) spare_stacks.push_back(std::move(fiber.stack));
    }
  }

  void run(const std::function<void()>& body) {
    body_ = &body;
    for (Fiber& fiber : fibers) start(fiber);
    scheduler_sanitizer_.start_scheduler();
    // Whether the scheduler stays with one warp step by step, for a while, or until it blocks; and whether
    // asynchronous operations are late, mixed, or early.
    stay_probability_ = randomised() ? std::array{0.0, 0.9, 1.0}[rng_() % 3] : 1.0;
    early_probability_ = randomised() ? std::array{0.0, 0.5, 1.0}[rng_() % 3] : options.seed == 1 ? 1.0 : 0.0;
    if (randomised() && rng_() % 2) {
      const size_t count = warps.size() > 4 && rng_() % 2 ? 4 : 1;  // a warpgroup, or a warp
      laggard_ = rng_() % warps.size() / count * count;
      laggards_ = std::min(count, warps.size() - laggard_);
    }
    while (step()) {
    }
    if (error_) std::rethrow_exception(error_);
    smem.check_red_zones();
    for (size_t id = 0; id < barriers.size(); ++id) {
      if (barriers[id].arrived == 0) continue;
      fail(std::to_string(barriers[id].arrived) + " threads arrived at named barrier " + std::to_string(id) +
           " and nobody took them");
    }
    for (const Fiber& fiber : fibers) {
      if (fiber.stack[0] != kPoison && !sanitizer::kAddress) fail("a thread outgrew its stack");
    }
  }

  // Gives control back to the scheduler until `word` differs from `seen`.
  void wait_change(const uint64_t& word, uint64_t seen, const char* what) {
    self->wait_word = &word;
    self->wait_value = seen;
    self->wait_what = what;
    yield();
    self->wait_word = nullptr;
  }
  // Called by the thread that completes a barrier: others may go on before it does.
  void maybe_yield() {
    if (randomised() && rng_() % 2) yield();
  }

  // Whether an asynchronous operation takes effect now rather than later.
  bool early() { return uniform_(rng_) < early_probability_; }

  SharedMemory smem;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::array<NamedBarrier, 16> barriers;
  std::vector<std::function<void()>> in_flight;  // TMA loads: may land in any order
  std::map<const void*, const Fiber*> unfenced;  // mbarriers that the copy engine may not have seen yet

 private:
  static bool randomised() { return options.seed > 1; }

  void yield() {
    Fiber& fiber = *self;
    sanitizer::leave(fiber.sanitizer, scheduler_sanitizer_);
    switch_stack(&fiber.stack_pointer, scheduler_stack_pointer_);
    sanitizer::enter(fiber.sanitizer, scheduler_sanitizer_);
  }

  void start(Fiber& fiber) {
    sanitizer::unpoison(fiber.stack.get(), options.stack_bytes);
    std::memset(fiber.stack.get(), kPoison, options.stack_bytes);  // "uninitialised registers"
    auto** top = reinterpret_cast<void**>(
        (reinterpret_cast<uintptr_t>(fiber.stack.get()) + options.stack_bytes) & ~uintptr_t{15});
    top[-2] = reinterpret_cast<void*>(&fiber_main);  // where switch_stack returns to
    fiber.stack_pointer = top - 8;                   // above it, six callee-saved registers
    fiber.alive = true;
    fiber.wait_word = nullptr;
    fiber.sanitizer.start(fiber.stack.get(), options.stack_bytes);
  }

  static void fiber_main() {
    Block& b = *block;
    Fiber& fiber = *self;
    sanitizer::enter(fiber.sanitizer, b.scheduler_sanitizer_);
    try {
      sanitizer::acquire(&launch_begin);
      (*b.body_)();
      sanitizer::release(&launch_end);
      const sanitizer::Unobserved unobserved;
      if (!fiber.cp_async.drained() || !fiber.bulk_store.drained() ||
          !b.warps[size_t(fiber.warp())].wgmma.drained()) {
        fail("a thread exited with asynchronous operations it never waited for");
      }
    } catch (...) {
      if (!b.error_) b.error_ = std::current_exception();
    }
    fiber.alive = false;
    sanitizer::leave(fiber.sanitizer, b.scheduler_sanitizer_, /*for_good=*/true);
    switch_stack(&fiber.stack_pointer, b.scheduler_stack_pointer_);
  }

  void resume(Fiber& fiber) {
    self = &fiber;
    threadIdx = fiber.thread;
    sanitizer::leave(scheduler_sanitizer_, fiber.sanitizer);
    switch_stack(&scheduler_stack_pointer_, fiber.stack_pointer);
    sanitizer::enter(scheduler_sanitizer_, fiber.sanitizer);
    self = nullptr;
  }

  // Runs every runnable lane of a warp once; false if there was none.
  bool run_lanes(size_t warp) {
    const size_t first = warp * kWarpSize, count = std::min<size_t>(kWarpSize, fibers.size() - first);
    const size_t start = randomised() ? rng_() : 0, flip = randomised() ? rng_() % kWarpSize : 0;
    bool any = false;
    for (size_t i = 0; i < count && !error_; ++i) {
      Fiber& fiber = fibers[first + ((i + start) % count ^ (count == kWarpSize ? flip : 0))];
      if (!fiber.alive || (fiber.wait_word && *fiber.wait_word == fiber.wait_value)) continue;
      resume(fiber);
      any = true;
    }
    return any;
  }

  // One scheduling decision; false when the block has ended.
  bool step() {
    if (!in_flight.empty() && early()) land_one();
    const size_t start = randomised() ? rng_() : 0;
    for (size_t i = 0; i < warps.size(); ++i) {
      const size_t warp = (start + i) % warps.size();
      if (warp - laggard_ < laggards_ || !run_lanes(warp)) continue;
      while (uniform_(rng_) < stay_probability_ && run_lanes(warp)) {
      }
      return !error_;
    }
    for (size_t i = 0; i < laggards_ && !error_; ++i) {
      if (run_lanes(laggard_ + i)) return !error_;
    }
    if (error_) return false;
    if (!in_flight.empty()) {
      land_one();
      return true;
    }
    report_deadlock();
    return false;
  }

  void land_one() {
    const size_t pick = randomised() ? rng_() % in_flight.size() : 0;
    const auto operation = std::move(in_flight[pick]);
    in_flight.erase(in_flight.begin() + std::ptrdiff_t(pick));
    operation();
  }

  void report_deadlock() const {
    std::map<std::string, int> waiting;
    for (const Fiber& fiber : fibers) {
      if (fiber.alive) ++waiting[fiber.wait_what];
    }
    if (waiting.empty()) return;
    std::string message = "deadlock:";
    for (const auto& [what, count] : waiting)
      message += " " + std::to_string(count) + " threads at " + what + ";";
    throw Error(message);
  }

  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
  void* scheduler_stack_pointer_ = nullptr;
  sanitizer::FiberState scheduler_sanitizer_;
  std::mt19937_64 rng_;
  std::uniform_real_distribution<double> uniform_;
  double stay_probability_ = 1.0, early_probability_ = 0.0;
  size_t laggard_ = 0, laggards_ = 0;  // warps laggard_ .. laggard_ + laggards_ - 1
};

inline void AsyncGroups::issue(std::function<void()> operation) {
  queue_.push_back({open_group_, std::move(operation)});
  if (block->early()) run_until(open_group_ + 1);
}

inline Warp& this_warp() { return block->warps[size_t(self->warp())]; }

// The one warp-level primitive: every lane of `mask` publishes a value; the last to arrive runs `combine` on
// all of them; everyone gets the array. Shuffles, votes, ldmatrix and mma build on it.
template <class T, class Combine>
const T* warp_collective(const char* what, uint32_t mask, const T& mine, Combine combine) {
  static_assert(sizeof(T) * kWarpSize <= sizeof(Warp::buffer[0]) && std::is_trivially_copyable_v<T>);
  const sanitizer::Unobserved unobserved;
  Warp& warp = this_warp();
  const int lane = self->lane();
  if (!(mask >> lane & 1)) fail(std::string(what) + ": the calling lane is not in its own mask");
  if (warp.arrived == 0) {
    warp.mask = mask;
    warp.what = what;
  }
  if (warp.mask != mask || (warp.what != what && std::strcmp(warp.what, what))) {
    fail(std::string("warp diverged: one lane at ") + what + ", another at " + warp.what);
  }
  const uint64_t generation = warp.generation;
  T* all = reinterpret_cast<T*>(warp.buffer[generation % 2]);
  all[lane] = mine;
  warp.arrived |= 1u << lane;
  if (warp.arrived == mask) {
    combine(all);
    warp.arrived = 0;
    ++warp.generation;
  } else {
    block->wait_change(warp.generation, generation, what);
  }
  return all;
}

// bar.sync and bar.arrive. Unlike the hardware, threads that have exited never count.
inline void barrier(int id, int threads, bool wait) {
  const sanitizer::Unobserved unobserved;
  NamedBarrier& b = block->barriers.at(size_t(id));
  if (b.arrived == 0) b.expected = threads;
  if (b.expected != threads || threads % kWarpSize != 0) fail("named barrier: inconsistent thread count");
  const uint64_t generation = b.generation;
  sanitizer::release(&b);
  if (++b.arrived == threads) {
    b.arrived = 0;
    ++b.generation;
    block->maybe_yield();
  } else if (wait) {
    block->wait_change(b.generation, generation, id == 0 ? "__syncthreads" : "named_barrier_sync");
  }
  if (wait) sanitizer::acquire(&b);
}

}  // namespace twin
