// Introspection without torch: what the machine can do and which instruction set runs.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/targets/select.h"

namespace py = pybind11;
using namespace fastattn;

PYBIND11_MODULE(_info, m) {
  m.doc() = "CPU features, the chosen instruction set and the facts of the build.";
  m.def(
      "cpu_features",
      [] {
        std::map<std::string, bool> features;
        for (const CpuFeature& f : cpu_features()) features[f.name] = f.present;
        return features;
      },
      "Features the kernels ask for, each True where this process may use it.");
  m.def(
      "available_isas",
      [] {
        std::vector<std::string> names;
        for (const Isa& isa : known_isas()) {
          if (isa.supported) names.push_back(isa.name);
        }
        return names;
      },
      "Instruction sets that run here, from the plainest to the best.");
  m.def(
      "missing_for",
      [] {
        std::map<std::string, std::string> missing;
        for (const Isa& isa : known_isas()) {
          if (!isa.supported) missing[isa.name] = isa.missing;
        }
        return missing;
      },
      "Instruction sets of this build that do not run here, with what the machine lacks.");
  m.def(
      "isa", [] { return select_isa(); },
      "The instruction set in use. RuntimeError: FASTATTN_ISA names none.");
  m.def(
      "isa_reason",
      [] {
        std::string reason;
        select_isa(&reason);
        return reason;
      },
      "Why that one.");
  m.def(
      "build_info",
      [] {
        return std::map<std::string, std::string>{{"compiler", __VERSION__},
                                                  {"flags", FASTATTN_BUILD_FLAGS},
                                                  {"torch_headers", FASTATTN_TORCH_VERSION},
                                                  {"version", FASTATTN_VERSION}};
      },
      "Compiler, flags, the torch whose headers were used, and the package's version.");
}
