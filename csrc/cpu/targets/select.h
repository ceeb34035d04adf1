// Which instruction set this process runs on, and why. Shared by the op library and the introspection module.
#pragma once

#include <string>
#include <vector>

namespace fastattn {

struct CpuFeature {
  const char* name;
  bool present;
};

struct Isa {
  const char* name;
  bool supported;       // by this machine and this build
  bool automatic;       // false: runs only where it is asked for by name
  std::string missing;  // what it would need
};

std::vector<CpuFeature> cpu_features();

// Every instruction set of this build, from the plainest to the best.
std::vector<Isa> known_isas();

// The best supported one that may be chosen by itself, or the one that FASTATTN_ISA names. Throws
// std::runtime_error where that is unknown or not supported; the message lists what is.
std::string select_isa(std::string* reason = nullptr);
void check_isa(const std::string& name);

}  // namespace fastattn
