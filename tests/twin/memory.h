// The shared memory of a block on the twin, and how the twin reports what is wrong.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "sanitizers.h"

namespace twin {

constexpr unsigned char kPoison = 0xff;  // NaN in every floating-point format

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

[[noreturn]] inline void fail(const std::string& message) { throw Error(message); }

// Filled with NaN patterns and surrounded by red zones, plus the async proxy's view of it: wgmma and TMA
// stores read that view, and fence.proxy.async brings it up to date, so a forgotten fence reads stale data.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes)
      : size_(bytes),
        storage_(static_cast<unsigned char*>(std::aligned_alloc(kAlign, round_up(bytes) + 2 * kAlign))),
        async_view_(bytes, kPoison) {
    std::memset(storage_.get(), kPoison, round_up(bytes) + 2 * kAlign);
    sanitizer::poison(storage_.get(), kAlign);
    sanitizer::poison(base() + bytes, round_up(bytes) - bytes + kAlign);
  }
  ~SharedMemory() { sanitizer::unpoison(storage_.get(), round_up(size_) + 2 * kAlign); }

  unsigned char* base() const { return storage_.get() + kAlign; }

  // The 32-bit shared address of p. The window starts at kAlign, so address 0 is never valid.
  uint32_t address(const void* p, size_t bytes, size_t alignment) const {
    const auto offset = static_cast<const unsigned char*>(p) - base();
    if (offset < 0 || size_t(offset) + bytes > size_) {
      fail("shared memory access out of bounds at offset " + std::to_string(offset));
    }
    if (size_t(offset) % alignment != 0) {
      fail("misaligned shared memory access at offset " + std::to_string(offset));
    }
    return uint32_t(size_t(offset) + kAlign);
  }
  unsigned char* generic(uint32_t address, size_t bytes) const {
    unsigned char* p = base() + address - kAlign;
    this->address(p, bytes, 1);
    return p;
  }
  unsigned char* async(uint32_t address, size_t bytes) {
    return async_view_.data() + (generic(address, bytes) - base());
  }
  void fence_proxy_async() { std::memcpy(async_view_.data(), base(), size_); }

  void check_red_zones() const {
    if (sanitizer::kAddress) return;  // the sanitizer reports the access itself
    for (size_t i = 0; i < kAlign; ++i) {
      if (storage_[i] != kPoison || base()[size_ + i] != kPoison) {
        fail("write outside shared memory, found at block exit");
      }
    }
  }

 private:
  static constexpr size_t kAlign = 1024;
  static size_t round_up(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  size_t size_;
  std::unique_ptr<unsigned char[], Free> storage_;
  std::vector<unsigned char> async_view_;
};

}  // namespace twin
