// What amx.cpp compiles, for machines without AMX: slow, for tests, never chosen by itself.
#define FASTATTN_EMULATE_TILES 1
#include "../simd/amx.h"
#include "kernels.inc"

namespace fastattn {
FASTATTN_TABLE(amx_emulated_kernels, "amx_emulated");
}
