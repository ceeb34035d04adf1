// Reads a bool or additive mask once: rows of 64 elements become words of visibility.
//
// A bool element shows what is not 0, a float element what is not -inf. Floats are compared as integers, so
// NaN and every finite number are visible. A float that is visible and not a zero is told too: a mask without
// such needs no bias.
#pragma once

#include "attention_args.h"
#include "mask_scan_args.h"
#include "simd/types.h"

namespace fastattn {

namespace {

// Elements that no simd header compares; doubles are for the reference alone.
FASTATTN_INLINE uint64_t differing_64(const uint64_t* p, uint64_t x, uint64_t mask) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= uint64_t((p[i] & mask) != x) << i;
  return bits;
}

template <class U>
FASTATTN_INLINE uint64_t visible_64(const U* p, U hidden, uint64_t* nonzero) {
  if constexpr (sizeof(U) == 1) {
    return differing_64(p, U(0), U(0xff));
  } else {
    const uint64_t seen = differing_64(p, hidden, U(~U(0)));
    *nonzero |= seen & differing_64(p, U(0), U(U(~U(0)) >> 1));  // the sign apart
    return seen;
  }
}

// Rows read side by side. Each lies in pages of its own, where the hardware sees a stream of its own; the
// same rows of the next group are fetched meanwhile into the second cache, where the lines wait without
// driving out the words. From memory 8 rows take 0.8 (bytes) and 1.0 (two bytes) of the time of one plain
// pass over the tensor, 2 rows 1.0 and 1.25, 1 row 1.05 and 1.25.
constexpr int kRowsTogether = 8;

template <class U>
FASTATTN_INLINE uint64_t scan_line(const MaskScanArgs& a, const U* p, U hidden, uint64_t* nonzero) {
  for (size_t n = 0; n < sizeof(U); ++n)
    __builtin_prefetch(p + kRowsTogether * a.row + n * (kGranule / sizeof(U)), 0, 2);
  return visible_64(p, hidden, nonzero);
}

// Granules of one row from `g` on, of which the last may be ragged or the keys apart.
template <class U>
void scan_rest(const MaskScanArgs& a, const U* line, int64_t g, int64_t granules, int64_t keys_left, U hidden,
               uint64_t* nonzero, uint64_t* words) {
  for (; g < granules; ++g) {
    const int64_t left = keys_left - g * kGranule, keys = left < kGranule ? left : kGranule;
    U gathered[kGranule];
    for (int64_t c = 0; c < keys; ++c) gathered[c] = line[(g * kGranule + c) * a.key];
    for (int64_t c = keys; c < kGranule; ++c) gathered[c] = hidden;
    words[g] = visible_64(gathered, hidden, nonzero);
  }
}

// `kRows` rows from `line` on.
template <int kRows, class U>
FASTATTN_INLINE void scan_rows(const MaskScanArgs& a, const U* line, int64_t whole, int64_t granules,
                               int64_t keys_left, U hidden, uint64_t* nonzero,
                               uint64_t (*words)[kScanGranules]) {
  for (int64_t g = 0; g < whole; ++g) {
    uint64_t seen[kRows];
    for (int r = 0; r < kRows; ++r) {
      seen[r] = scan_line(a, line + r * a.row + g * kGranule, hidden, nonzero);
    }
    for (int r = 0; r < kRows; ++r) words[r][g] = seen[r];
  }
  for (int r = 0; r < kRows; ++r) {
    scan_rest(a, line + r * a.row, whole, granules, keys_left, hidden, nonzero, words[r]);
  }
}

template <class U>
void scan_as(const MaskScanArgs& a, int64_t first_row, int64_t rows, int64_t first_key, int64_t granules,
             ScannedWords* out) {
  const U hidden = U(a.hidden);
  uint64_t nonzero = 0;
  const int64_t left = a.Sk - first_key;
  const int64_t whole = a.key == 1 ? (left / kGranule < granules ? left / kGranule : granules) : 0;
  const U* first = static_cast<const U*>(a.data) + first_row * a.row + first_key * a.key;
  int64_t r = 0;
  for (; r + kRowsTogether <= rows; r += kRowsTogether) {
    scan_rows<kRowsTogether>(a, first + r * a.row, whole, granules, left, hidden, &nonzero, out->word + r);
  }
  for (; r < rows; ++r)
    scan_rows<1>(a, first + r * a.row, whole, granules, left, hidden, &nonzero, out->word + r);
  // A pass of its own: words read back in vectors right after they were written one by one would wait for
  // them.
  constexpr int kColumns = 8;
  typedef uint64_t Words __attribute__((vector_size(8 * kColumns), aligned(8), may_alias));
  for (int64_t g = 0; g < granules; g += kColumns) {
    Words any = {}, none = {};
    for (int64_t r = 0; r < rows; ++r) {
      const Words seen = *reinterpret_cast<const Words*>(out->word[r] + g);
      any |= seen, none |= ~seen;
    }
    *reinterpret_cast<Words*>(out->any + g) = any;
    *reinterpret_cast<Words*>(out->all + g) = ~none;
  }
  out->nonzero = nonzero != 0;
}

inline void mask_scan(const MaskScanArgs& a, int64_t first_row, int64_t rows, int64_t first_key,
                      int64_t granules, ScannedWords* out) {
  switch (a.bytes) {
    case 1: return scan_as<uint8_t>(a, first_row, rows, first_key, granules, out);
    case 2: return scan_as<uint16_t>(a, first_row, rows, first_key, granules, out);
    case 4: return scan_as<uint32_t>(a, first_row, rows, first_key, granules, out);
    default: return scan_as<uint64_t>(a, first_row, rows, first_key, granules, out);
  }
}

}  // namespace
}  // namespace fastattn
