#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "results.h"

namespace fastattn {
namespace {

constexpr size_t kPage = 4096, kLargePage = size_t(2) << 20;
// Blocks from this size on lie on large pages: one fault in the place of 512 the first time.
constexpr size_t kOnLargePages = size_t(4) << 20;

size_t rounded_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Eight sizes to a power of two, so that sequences of nearly one length share blocks. What is beyond the
// result is never touched.
size_t block_size(size_t bytes) {
  size_t unit = kPage;
  while (unit * 16 <= bytes) unit *= 2;
  return rounded_up(bytes, unit);
}

void* map_block(size_t bytes) {
  const size_t align = bytes >= kOnLargePages ? kLargePage : kPage, mapped = bytes + align - kPage;
  void* at = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  char *const begin = static_cast<char*>(at), *const end = begin + mapped;
  char* const data = reinterpret_cast<char*>(rounded_up(uintptr_t(at), align));
  if (data > begin) munmap(begin, data - begin);
  if (data + bytes < end) munmap(data + bytes, end - (data + bytes));
#ifdef MADV_HUGEPAGE
  if (align == kLargePage) madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

size_t allowed_idle() {
  const size_t memory = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGE_SIZE));
  const char* given = std::getenv("FASTATTN_KEEP_MB");
  const size_t wanted = given ? size_t(std::max(std::atoll(given), 0LL)) : 256;
  return std::min(wanted << 20, memory / 16);
}

class Blocks {
 public:
  bool enabled() const { return allowed_ > 0; }

  // Null where the system has no memory left.
  void* take(size_t bytes) {
    bytes = block_size(bytes);
    const std::lock_guard lock(mutex_);
    // The newest first: its lines may still be in a cache.
    const auto found =
        std::find_if(idle_.rbegin(), idle_.rend(), [&](const Block& b) { return b.bytes == bytes; });
    void* data;
    if (found != idle_.rend()) {
      data = found->data;
      idle_bytes_ -= bytes;
      idle_.erase(std::next(found).base());
    } else {
      data = map_block(bytes);
      if (!data && !idle_.empty()) {
        release_to(0);
        data = map_block(bytes);
      }
      if (!data) return nullptr;
    }
    used_.emplace(data, bytes);
    used_bytes_ += bytes;
    return data;
  }

  void give(void* data) {
    const std::lock_guard lock(mutex_);
    const auto found = used_.find(data);
    idle_.push_back({data, found->second});
    idle_bytes_ += found->second, used_bytes_ -= found->second;
    used_.erase(found);
    release_to(allowed_);
  }

  int64_t release() {
    const std::lock_guard lock(mutex_);
    const int64_t bytes = int64_t(idle_bytes_);
    release_to(0);
    return bytes;
  }

  std::vector<int64_t> state() {
    const std::lock_guard lock(mutex_);
    return {int64_t(used_bytes_), int64_t(idle_bytes_), int64_t(allowed_), int64_t(kSmallestBlock)};
  }

  std::mutex& mutex() { return mutex_; }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };

  void release_to(size_t allowed) {
    size_t n = 0;
    for (; idle_bytes_ > allowed; ++n) {
      munmap(idle_[n].data, idle_[n].bytes);
      idle_bytes_ -= idle_[n].bytes;
    }
    idle_.erase(idle_.begin(), idle_.begin() + int64_t(n));
  }

  std::mutex mutex_;
  std::unordered_map<void*, size_t> used_;
  std::vector<Block> idle_;  // the oldest first
  size_t used_bytes_ = 0, idle_bytes_ = 0;
  const size_t allowed_ = allowed_idle();
};

// Never destroyed: tensors may outlive every static.
Blocks& blocks() {
  static Blocks* const all = [] {
    // A child of fork must not find the lock held by a thread that it does not have.
    pthread_atfork([] { blocks().mutex().lock(); }, [] { blocks().mutex().unlock(); },
                   [] { blocks().mutex().unlock(); });
    return new Blocks;
  }();
  return *all;
}

Tensor new_result(std::vector<int64_t> sizes, ScalarType dtype) { return new_tensor(sizes, dtype); }
int64_t release_results() { return blocks().release(); }
std::vector<int64_t> result_memory() { return blocks().state(); }

size_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Bool: return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half: return 2;
    case ScalarType::Float:
    case ScalarType::Int: return 4;
    case ScalarType::Double:
    case ScalarType::Long: return 8;
    default: STD_TORCH_CHECK(false, "fastattn: no result has this dtype");
  }
}

}  // namespace

Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                  torch::headeronly::IntHeaderOnlyArrayRef strides, ScalarType dtype) {
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  size_t bytes = element_size(dtype);
  for (const int64_t size : sizes) bytes *= size_t(size);
  if (bytes >= kSmallestBlock && blocks().enabled()) {
    if (void* data = blocks().take(bytes)) {
      return torch::stable::from_blob(
          data, sizes, strides, torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype,
          static_cast<torch::stable::DeleterFnPtr>([](void* at) { blocks().give(at); }));
    }
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                                                         code, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return new_tensor(sizes, strides, dtype);
}

}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("_new_result", TORCH_BOX(&fastattn::new_result));
  m.impl("_release_results", TORCH_BOX(&fastattn::release_results));
  m.impl("_result_memory", TORCH_BOX(&fastattn::result_memory));
}
