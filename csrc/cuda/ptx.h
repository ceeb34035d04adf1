// The one header that kernels include for what is beyond C++: each PTX instruction behind a thin function,
// one header a family. A test build takes the host twins of the same names instead (tests/twin), which
// execute kernels on a CPU; keep every signature the same on both sides.
#pragma once

#include "layout.h"
#include "types.h"

#if defined(FASTATTN_HOST_TWIN)
#include <twin/ptx.h>
#else
#include "ptx/barrier.h"
#include "ptx/convert.h"
#include "ptx/cp_async.h"
#include "ptx/fence.h"
#include "ptx/launch.h"
#include "ptx/ldmatrix.h"
#include "ptx/mbarrier.h"
#include "ptx/mma.h"
#include "ptx/shuffle.h"
#include "ptx/tma.h"
#include "ptx/wgmma.h"
#endif
