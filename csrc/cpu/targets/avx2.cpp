#include "../simd/avx2.h"

#include "kernels.inc"

namespace fastattn {
FASTATTN_TABLE(avx2_kernels, "avx2");
}
