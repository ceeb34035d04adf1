// The kernel table in use.
#pragma once

#include <string>

#include "kernel_table.h"

namespace fastattn {

// Chosen at the first call by select_isa(); throws what that throws.
const KernelTable& kernels();

// For tests: runs another instruction set from the next call on. Throws std::runtime_error if it cannot.
void force_isa(const std::string& name);

}  // namespace fastattn
