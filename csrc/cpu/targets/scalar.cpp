#include "../simd/scalar.h"

#include "kernels.inc"

namespace fastattn {
FASTATTN_TABLE(scalar_kernels, "scalar");
}
