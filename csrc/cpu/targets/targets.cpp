#include "targets.h"

#include <atomic>
#include <stdexcept>

#include "select.h"

namespace fastattn {

extern const KernelTable scalar_kernels;
#if defined(__x86_64__)
extern const KernelTable avx2_kernels, avx512_kernels, avx512_bf16_kernels, amx_kernels, amx_emulated_kernels;
static const KernelTable* const tables[] = {&scalar_kernels,      &avx2_kernels, &avx512_kernels,
                                            &avx512_bf16_kernels, &amx_kernels,  &amx_emulated_kernels};
#elif defined(__aarch64__)
extern const KernelTable neon_kernels;
static const KernelTable* const tables[] = {&scalar_kernels, &neon_kernels};
#else
static const KernelTable* const tables[] = {&scalar_kernels};
#endif

static std::atomic<const KernelTable*> active{nullptr};

static const KernelTable* find(const std::string& name) {
  for (const KernelTable* table : tables) {
    if (name == table->isa) return table;
  }
  throw std::runtime_error("instruction set '" + name + "' has no kernels in this build");
}

const KernelTable& kernels() {
  const KernelTable* table = active.load(std::memory_order_acquire);
  if (!table) {
    table = find(select_isa());
    active.store(table, std::memory_order_release);
  }
  return *table;
}

void force_isa(const std::string& name) {
  check_isa(name);
  active.store(find(name), std::memory_order_release);
}

}  // namespace fastattn
