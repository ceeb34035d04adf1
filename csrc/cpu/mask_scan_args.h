// A plain mask tensor as the scan sees it: one plane of one batch and head. No torch, no ownership.
#pragma once

#include <cstdint>

namespace fastattn {

struct MaskScanArgs {
  const void* data;
  int64_t Sq, Sk;
  int64_t row, key;  // strides in elements
  int bytes;         // of an element: 1 is bool, 2, 4 and 8 are floats
  uint64_t hidden;   // the bits of -inf
};

// Granules of keys at once: 8 KiB of a row of bools, read in order as memory likes it, and 64 KiB of words,
// which stay in the second cache.
constexpr int kScanGranules = 128;

// What 64 rows and up to kScanGranules granules of keys show.
struct ScannedWords {
  uint64_t word[64][kScanGranules];  // row, granule; bit c is key c
  uint64_t any[kScanGranules];       // the rows' words joined by or, and by and
  uint64_t all[kScanGranules];
  bool nonzero;  // some float is visible and not a zero
};

// Scans rows first_row .. first_row + rows - 1 and `granules` granules of keys from first_key on. Bits beyond
// Sk are 0, rows beyond `rows` are not written.
using MaskScan = void (*)(const MaskScanArgs&, int64_t first_row, int64_t rows, int64_t first_key,
                          int64_t granules, ScannedWords* out);

}  // namespace fastattn
