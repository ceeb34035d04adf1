// Host twins of csrc/cuda/ptx.h: the same functions, with the instructions' documented effect and checks of
// what the hardware requires.
#pragma once

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
