// Asks for memory that will be read or written next, a few cache lines between one register tile and another.
//
// A burst of requests waits as reading does: a core has so many lines under way and no more. Between the
// products, which need all of its arithmetic and little of its memory, the lines arrive unnoticed.
#pragma once

#include "attention_args.h"

namespace fastattn {
namespace {

class Prefetch {
 public:
  // In the order in which they are asked for. Out: to be written. Far: much at a time and for later, so into
  // the second-level cache.
  // clang-format off
  enum Use {
    kKeys, kValues, kOut, kOutKeys, kOutValues, kNextQueries, kNextKeys, kNextValues,
    kFarQueries, kFarGradients, kFarResults, kFarKeys, kFarValues, kUses
  };
  // clang-format on

  // `count` rows of so many bytes; whatever was left of an earlier request for this use is dropped.
  void ask(Use use, const void* data, int64_t row_bytes, int64_t count, int64_t stride_bytes) {
    if (row_bytes == stride_bytes) row_bytes *= count, count = 1;
    if (row_bytes <= 0 || count <= 0) return;
    request_[use] = {(const char*)data, row_bytes, stride_bytes, 0, count};
    waiting_ |= 1u << use;
  }

  // Rows [first, first + count) of a head, `width` numbers of `size` bytes each.
  void ask(Use use, const Operand& x, int64_t size, int64_t b, int64_t h, int64_t first, int64_t count,
           int64_t width) {
    const int64_t at = b * x.batch + h * x.head + first * x.row;
    ask(use, (const char*)x.data + at * size, width * size, count, x.row * size);
  }

  // The next lines; called between register tiles.
  FASTATTN_INLINE void step() {
    if (waiting_) next_lines();
  }

 private:
  static constexpr int kLine = 64, kLines = 12;

  struct Request {
    const char* row;
    int64_t bytes, stride, at, rows;
  };

  __attribute__((noinline)) void next_lines() {
    const int use = __builtin_ctz(waiting_);
    Request& r = request_[use];
    for (int64_t left = kLines * kLine; left > 0;) {
      const int64_t n = r.bytes - r.at < left ? r.bytes - r.at : left;
      const char *p = r.row + r.at, *end = p + n;
      if (use >= kOut && use <= kOutValues) {
        for (; p < end; p += kLine) __builtin_prefetch(p, 1);
      } else if (use >= kFarQueries) {
        for (; p < end; p += kLine) __builtin_prefetch(p, 0, 2);
      } else {
        for (; p < end; p += kLine) __builtin_prefetch(p);
      }
      left -= n, r.at += n;
      if (r.at < r.bytes) return;
      r.row += r.stride, r.at = 0;
      if (--r.rows == 0) {
        waiting_ &= waiting_ - 1;
        return;
      }
    }
  }

  uint32_t waiting_ = 0;
  Request request_[kUses];
};

}  // namespace
}  // namespace fastattn
