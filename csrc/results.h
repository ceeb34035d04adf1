// Memory of an operation's results.
//
// The system hands out memory that costs a page fault every 4 KB, and clears it: for a result of some
// megabytes that is more than the work of a row kernel, and malloc gives blocks of that size back when they
// are freed, so that every call pays again. Large results therefore lie in blocks of ours, which wait for the
// next result when a tensor dies: what torch's own allocator does on a GPU. The idle ones are bounded,
// FASTATTN_KEEP_MB of them (default 256, at most a sixteenth of the machine's memory), and given back oldest
// first; 0 turns this off.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "bind.h"

namespace fastattn {

// Results from this size on come from our blocks.
constexpr size_t kSmallestBlock = size_t(1) << 20;

// An uninitialised tensor on the CPU, without the dispatcher's six microseconds. Its storage cannot be
// resized where it is a block of ours.
Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes,
                  torch::headeronly::IntHeaderOnlyArrayRef strides, ScalarType dtype);

// The same, contiguous.
Tensor new_tensor(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype);

}  // namespace fastattn
