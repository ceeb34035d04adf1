// The kernels of one instruction set. Each target fills one table; targets.cpp picks one when the library
// loads.
#pragma once

#include "../attention_args.h"
#include "../attention_bwd_args.h"
#include "../ceiling_kinds.h"
#include "../linear_args.h"
#include "../mask_scan_args.h"
#include "../rows_args.h"

namespace fastattn {

struct KernelTable {
  const char* isa;
  // Indexed by Storage.
  AttentionTask attention[3];
  AttentionScratch attention_scratch;
  bool keeps_heads;  // attention packs keys and values: a thread does well to stay with a head
  AttentionBwdTasks attention_bwd[3];
  AttentionTask decode[3], decode_merge[3];
  AttentionScratch decode_scratch;
  LinearTask linear;
  LinearScratch linear_scratch;
  LinearRows linear_rows;
  CeilingLoop ceiling;
  MaskScan mask_scan;
  RowKernels rows;
};

}  // namespace fastattn
