// Tells AddressSanitizer and ThreadSanitizer about fibers, red zones and happens-before edges.
// Without a sanitizer everything here is empty.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_read16(void* address);
}
#endif

namespace sanitizer {

// Fibers: call leave() just before a stack switch, enter() just after it.

#if defined(__SANITIZE_ADDRESS__)

struct FiberState {
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;

  void start(void* new_stack, size_t bytes) {
    stack = new_stack;
    stack_bytes = bytes;
    fake_stack = nullptr;
  }
  void start_scheduler() {}
};
inline void leave(FiberState& from, FiberState& to, bool for_good = false) {
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
}
inline void enter(FiberState& now, FiberState& from) {
  __sanitizer_finish_switch_fiber(now.fake_stack, &from.stack, &from.stack_bytes);
}

#elif defined(__SANITIZE_THREAD__)

struct FiberState {
  void* fiber = nullptr;
  bool finished = false;

  void start(void*, size_t) {
    if (!fiber) fiber = __tsan_create_fiber(0);
  }
  void start_scheduler() { fiber = __tsan_get_current_fiber(); }
  ~FiberState() {
    if (finished) __tsan_destroy_fiber(fiber);  // one abandoned after an error is leaked
  }
};
inline void leave(FiberState& from, FiberState& to, bool for_good = false) {
  from.finished = for_good;
  __tsan_switch_to_fiber(to.fiber, __tsan_switch_to_fiber_no_sync);
}
inline void enter(FiberState&, FiberState&) {}

#else

struct FiberState {
  void start(void*, size_t) {}
  void start_scheduler() {}
};
inline void leave(FiberState&, FiberState&, bool = false) {}
inline void enter(FiberState&, FiberState&) {}

#endif

#if defined(__SANITIZE_THREAD__)
constexpr bool kThread = true;
#else
constexpr bool kThread = false;
#endif

// Red zones.

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kAddress = true;
inline void poison(void* p, size_t bytes) { ASAN_POISON_MEMORY_REGION(p, bytes); }
inline void unpoison(void* p, size_t bytes) { ASAN_UNPOISON_MEMORY_REGION(p, bytes); }
#else
constexpr bool kAddress = false;
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
#endif

// Races: synchronisation edges, and which accesses take part in race detection.

#if defined(__SANITIZE_THREAD__)

inline void release(void* object) { __tsan_release(object); }
inline void acquire(void* object) { __tsan_acquire(object); }

inline void observe(bool on) {
  (on ? AnnotateIgnoreReadsEnd : AnnotateIgnoreReadsBegin)(__FILE__, __LINE__);
  (on ? AnnotateIgnoreWritesEnd : AnnotateIgnoreWritesBegin)(__FILE__, __LINE__);
}
// A read of shared memory that the twin performs elsewhere, through the async proxy's view.
inline void observe_read16(const void* p) { __tsan_read16(const_cast<void*>(p)); }

#else

inline void release(void*) {}
inline void acquire(void*) {}
inline void observe(bool) {}
inline void observe_read16(const void*) {}

#endif

// Scope of the runtime's own bookkeeping.
struct Unobserved {
  Unobserved() { observe(false); }
  ~Unobserved() { observe(true); }
  Unobserved(const Unobserved&) = delete;
};
// Inside Unobserved: scope of an access made on behalf of the kernel.
struct Observed {
  Observed() { observe(true); }
  ~Observed() { observe(false); }
  Observed(const Observed&) = delete;
};

}  // namespace sanitizer
