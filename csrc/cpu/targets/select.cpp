#include "select.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastattn {
namespace {

#if defined(__x86_64__)
// Linux hands out the tile registers a process at a time: ARCH_REQ_XCOMP_PERM for XTILEDATA.
bool request_amx() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
}

bool has_amx_bits() {
  unsigned a = 7, b, c = 0, d;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  const bool tile = d >> 24 & 1, bf16 = d >> 22 & 1;
  return tile && bf16;
}
#endif

}  // namespace

std::vector<CpuFeature> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool amx = has_amx_bits();
  return {{"avx2", bool(__builtin_cpu_supports("avx2"))},
          {"fma", bool(__builtin_cpu_supports("fma"))},
          {"f16c", bool(__builtin_cpu_supports("f16c"))},
          {"avx512f", bool(__builtin_cpu_supports("avx512f"))},
          {"avx512bw", bool(__builtin_cpu_supports("avx512bw"))},
          {"avx512vl", bool(__builtin_cpu_supports("avx512vl"))},
          {"avx512dq", bool(__builtin_cpu_supports("avx512dq"))},
          {"avx512bf16", bool(__builtin_cpu_supports("avx512bf16"))},
          {"avx512vbmi", bool(__builtin_cpu_supports("avx512vbmi"))},
          {"amx", amx && request_amx()}};
#elif defined(__aarch64__)
  return {{"neon", true}};
#else
  return {};
#endif
}

std::vector<Isa> known_isas() {
  const std::vector<CpuFeature> features = cpu_features();
  const auto isa = [&](const char* name, std::vector<std::string> needs, bool automatic = true) {
    std::string missing;
    for (const std::string& need : needs) {
      bool present = false;
      for (const CpuFeature& f : features) present |= need == f.name && f.present;
      if (!present) missing += (missing.empty() ? "" : ", ") + need;
    }
    return Isa{name, missing.empty(), automatic, missing};
  };
  std::vector<Isa> isas = {isa("scalar", {})};
#if defined(__x86_64__)
  isas.push_back(isa("avx2", {"avx2", "fma", "f16c"}));
  std::vector<std::string> needs = {"avx512f", "avx512bw", "avx512vl", "avx512dq"};
  isas.push_back(isa("avx512", needs));
  needs.push_back("avx512bf16");
  isas.push_back(isa("avx512_bf16", needs));
  needs.push_back("avx512vbmi");
  isas.push_back(isa("amx_emulated", needs, false));  // for tests
  needs.push_back("amx");
  isas.push_back(isa("amx", needs));
#elif defined(__aarch64__)
  isas.push_back(isa("neon", {"neon"}));
#endif
  return isas;
}

void check_isa(const std::string& name) {
  std::string supported, missing;
  bool known = false;
  for (const Isa& isa : known_isas()) {
    if (isa.supported) supported += (supported.empty() ? "" : ", ") + std::string(isa.name);
    if (name != isa.name) continue;
    known = true;
    if (isa.supported) return;
    missing = isa.missing;
  }
  throw std::runtime_error("instruction set '" + name + "' is " +
                           (known ? "not supported by this machine (it lacks " + missing + ")" : "unknown") +
                           "; FASTATTN_ISA may be one of: " + supported);
}

std::string select_isa(std::string* reason) {
  const char* forced = std::getenv("FASTATTN_ISA");
  if (forced && *forced) {
    check_isa(forced);
    if (reason) *reason = "forced by FASTATTN_ISA";
    return forced;
  }
  std::string best, better;
  for (const Isa& isa : known_isas()) {
    if (!isa.automatic) continue;
    if (isa.supported) {
      best = isa.name, better.clear();
    } else {
      better += (better.empty() ? "" : "; ") + std::string(isa.name) + " lacks " + isa.missing;
    }
  }
  if (reason) *reason = "the best this machine supports" + (better.empty() ? "" : " (" + better + ")");
  return best;
}

}  // namespace fastattn
