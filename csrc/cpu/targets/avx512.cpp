#include "../simd/avx512.h"

#include "kernels.inc"

namespace fastattn {
FASTATTN_TABLE(avx512_kernels, "avx512");
}
