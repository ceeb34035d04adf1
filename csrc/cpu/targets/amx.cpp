#include "../simd/amx.h"

#include "kernels.inc"

namespace fastattn {
FASTATTN_TABLE(amx_kernels, "amx");
}
