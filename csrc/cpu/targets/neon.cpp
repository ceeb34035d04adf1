#include "../simd/neon.h"

#include "kernels.inc"

namespace fastattn {
FASTATTN_TABLE(neon_kernels, "neon");
}
