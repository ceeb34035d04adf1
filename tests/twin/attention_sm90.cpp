// The Hopper attention forward on the twin: for test_twin_hopper.py, and as a program for the sanitizers.
#include <twin/binding.h>

#include <cmath>
#include <cstdio>

#include "../../csrc/cuda/attention_sm90_launch.h"

#ifndef FASTATTN_ONLY_D
#define FASTATTN_ONLY_D 0  // every head size
#endif

using namespace fastattn::cuda;

namespace {

template <class T>
const char* forward(const AttentionArgs& args, int multiprocessors) {
  if (const char* refused = attention_sm90_refusal(args)) twin::fail(refused);
  unsigned next_tile = 0;
  switch (args.D) {
#if FASTATTN_ONLY_D == 0 || FASTATTN_ONLY_D == 64
    case 64: return launch_attention_sm90<T, 64>(args, &next_tile, multiprocessors, nullptr);
#endif
#if FASTATTN_ONLY_D == 0 || FASTATTN_ONLY_D == 128
    case 128: return launch_attention_sm90<T, 128>(args, &next_tile, multiprocessors, nullptr);
#endif
#if FASTATTN_ONLY_D == 0 || FASTATTN_ONLY_D == 256
    case 256: return launch_attention_sm90<T, 256>(args, &next_tile, multiprocessors, nullptr);
#endif
  }
  return "not built";
}

}  // namespace

TWIN_EXPORT const char* attention_args_size(uint64_t size) {
  return size == sizeof(AttentionArgs) ? nullptr : "the test's AttentionArgs has another size";
}

// Every tile of every head comes once, sections of heads in order, each head's tiles in the order of their
// work.
TWIN_EXPORT const char* attention_tiles(uint64_t seed, const AttentionArgs* args, int rows_of_tile,
                                        int64_t cache_bytes) {
  return twin::guarded(seed, [&] {
    const ScheduleSm90 schedule = make_schedule(*args, rows_of_tile, nullptr, cache_bytes);
    std::vector<int> seen(size_t(schedule.tiles)), section_of(size_t(args -> B * args->Hq), -1);
    for (int tile = 0; tile < schedule.tiles; ++tile) {
      const TileIndex index = tile_index(schedule, *args, tile);
      const int head = index.batch * args->Hq + index.head;
      if (index.head >= args->Hq || index.m_block >= schedule.m_blocks)
        twin::fail("a tile outside of the call");
      if (seen[size_t(head * schedule.m_blocks + index.m_block)]++) twin::fail("a tile comes twice");
      if (head / schedule.section != tile / (schedule.section * schedule.m_blocks))
        twin::fail("not in its section");
      const int first = schedule.last_first ? schedule.m_blocks - 1 : 0;
      if (section_of[size_t(head)]++ < 0 && index.m_block != first) twin::fail("not the longest first");
    }
  });
}

TWIN_EXPORT const char* attention_forward(uint64_t seed, const AttentionArgs* args, int is_bf16,
                                          int multiprocessors) {
  return twin::guarded(seed, [&] {
    const char* error =
        is_bf16 ? forward<bf16>(*args, multiprocessors) : forward<fp16>(*args, multiprocessors);
    if (error) twin::fail(error);
  });
}

namespace {

// A call of two heads on one key head, compared with double precision row by row. What lies behind each
// tensor is NaN.
struct Case {
  int D, Sq, Sk;
  int band_lo, band_hi;
  bool padding;  // hi = Sk - 90
  bool bits;     // granules absent, full, and seen in part
  bool hidden_nan = false;
};

struct Problem {
  static constexpr int kHeads = 2, kBehind = 64;

  explicit Problem(const Case& c) : c(c), rows_q(size_t(c.Sq + kBehind)), rows_k(size_t(c.Sk + kBehind)) {
    const auto number = [](size_t i) { return float((i * 7919 + i / 64 * 104729) % 2003) / 1001.5f - 1.0f; };
    const size_t D = size_t(c.D);
    q.assign(kHeads * rows_q * D, kNan), k.assign(rows_k * D, kNan), v = k, out = q;
    lse.assign(size_t(kHeads * c.Sq), NAN);
    for (size_t h = 0; h < kHeads; ++h) {
      for (size_t i = 0; i < size_t(c.Sq) * D; ++i)
        q[h * rows_q * D + i] = from_float<bf16>(4.0f * number(i + h * 77));
    }
    for (size_t i = 0; i < size_t(c.Sk) * D; ++i) {
      k[i] = from_float<bf16>(number(i + 11)), v[i] = from_float<bf16>(number(i + 5));
    }
    args.B = 1, args.Hq = kHeads, args.Hkv = 1, args.Sq = c.Sq, args.Sk = c.Sk, args.D = args.Dv = c.D;
    const int64_t head_q = int64_t(rows_q * D), head_k = int64_t(rows_k * D);
    args.q = {q.data(), head_q * kHeads, head_q, c.D};
    args.k = {k.data(), head_k, head_k, c.D};
    args.v = {v.data(), head_k, head_k, c.D};
    args.out = {out.data(), head_q * kHeads, head_q, c.D};
    args.lse = lse.data();
    args.scale = 0.125f;
    args.band_lo = c.band_lo, args.band_hi = c.band_hi;
    hi = c.Sk - 90;
    if (c.padding) args.hi = &hi;  // all strides 0
    if (c.bits) add_bits();
    for (int key = 0; key < c.Sk && c.hidden_nan; ++key) {
      bool seen = false;
      for (int row = 0; row < c.Sq && !seen; ++row) seen = visible(row, key);
      for (size_t d = 0; d < D && !seen; ++d) v[size_t(key) * D + d] = kNan;
    }
  }

  void add_bits() {
    const int n_q = (c.Sq + 63) / 64, n_k = (c.Sk + 63) / 64;
    offsets.push_back(0);
    tiles.reserve(size_t(n_q * n_k * 64 + 2));
    // bulk_load wants 16 bytes.
    tiles.resize(reinterpret_cast<uintptr_t>(tiles.data()) % 16 == 0 ? 0 : 1);
    const size_t first = tiles.size();
    for (int a = 0; a < n_q; ++a) {
      for (int b = 0; b < n_k; ++b) {
        const int kind = (a * 5 + b * 3) % 7;
        if (kind < 2 || (a % 3 == 0 && b > 1)) continue;  // a consumer with nothing to do for many blocks
        const bool ragged = b == n_k - 1 || a == n_q - 1;
        list.push_back(b);
        list.push_back(kind < 4 && !ragged ? kFullTile : int((tiles.size() - first) / 64));
        if (list.back() == kFullTile) continue;
        for (int r = 0; r < 64; ++r) {
          const int keys = std::min(64, c.Sk - b * 64);
          uint64_t word = r % 9 == 4 ? 0 : 0x9e3779b97f4a7c15ull * uint64_t(a * 977 + b * 131 + r + 1);
          if (keys < 64) word &= (1ull << keys) - 1;
          tiles.push_back(a * 64 + r < c.Sq ? word : 0);
        }
      }
      offsets.push_back(int32_t(list.size() / 2));
    }
    args.block_offsets = offsets.data(), args.block_list = list.data(), args.bit_tiles = tiles.data() + first;
  }

  bool visible(int row, int key) const {
    if (key < row + c.band_lo || key > row + c.band_hi || (c.padding && key >= hi)) return false;
    if (!c.bits) return true;
    for (int e = offsets[size_t(row / 64)]; e < offsets[size_t(row / 64) + 1]; ++e) {
      const int tile = list[size_t(2 * e + 1)];
      if (list[size_t(2 * e)] != key / 64) continue;
      return tile == kFullTile || (args.bit_tiles[tile * 64 + row % 64] >> key % 64 & 1);
    }
    return false;
  }

  bool right(int h, int row) const {
    const size_t D = size_t(c.D);
    const bf16* q_row = &q[(size_t(h) * rows_q + size_t(row)) * D];
    const bf16* out_row = &out[(size_t(h) * rows_q + size_t(row)) * D];
    double sum = 0.0;
    std::vector<double> expected(D);
    for (int key = 0; key < c.Sk; ++key) {
      if (!visible(row, key)) continue;
      double score = 0.0;
      for (size_t d = 0; d < D; ++d) score += double(to_float(q_row[d])) * to_float(k[size_t(key) * D + d]);
      const double weight = std::exp(score * 0.125);
      sum += weight;
      for (size_t d = 0; d < D; ++d) expected[d] += weight * to_float(v[size_t(key) * D + d]);
    }
    const float actual = lse[size_t(h * c.Sq + row)];
    bool right = sum == 0.0 ? actual == -INFINITY : std::abs(actual - std::log(sum)) < 1e-4;
    for (size_t d = 0; d < D; ++d) {
      right &= std::abs(to_float(out_row[d]) - (sum == 0.0 ? 0.0 : expected[d] / sum)) < 0.012;
    }
    return right;
  }

  static constexpr bf16 kNan{0x7fff};
  Case c;
  size_t rows_q, rows_k;
  std::vector<bf16> q, k, v, out;
  std::vector<float> lse;
  int32_t hi = 0;
  std::vector<int32_t> offsets, list;
  std::vector<uint64_t> tiles;
  AttentionArgs args{};
};

}  // namespace

// `attention_sm90 [SEED] [CASES]`: three rounds of both stages and more, ragged tails, consumers that see
// different blocks, two tiles after another; at the end rows that are summed again because a hidden value is
// NaN. The first case alone is tiny.
int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? uint64_t(std::atoi(argv[1])) : 0;
  const int count = argc > 2 ? std::atoi(argv[2]) : 5;
  constexpr int kD = FASTATTN_ONLY_D == 0 ? 64 : FASTATTN_ONLY_D;
  const Case cases[] = {{kD, 100, 100, -kUnbounded, 0, false, false},
                        {kD, 300, 300, -kUnbounded, 0, false, false},
                        {kD, 250, 900, -300, 130, true, true},
                        {kD, 200, 1000, -kUnbounded, kUnbounded, true, false},
                        {kD, 70, 220, -kUnbounded, kUnbounded, true, true, true}};
  AttentionArgs shape{};
  shape.B = 3, shape.Hq = shape.Hkv = 5, shape.Sq = 700, shape.Sk = 50, shape.D = 64;
  if (const char* error = attention_tiles(seed, &shape, 192, 2 * 2 * 50 * 64 * 2)) {  // sections of two heads
    std::printf("tiles: %s\n", error);
    return 1;
  }
  for (int i = 0; i < std::min(count, 5); ++i) {
    Problem problem(cases[i]);
    if (const char* error = attention_forward(seed, &problem.args, 1, 1)) {
      std::printf("case %d: %s\n", i, error);
      return 1;
    }
    for (int row = 0; row < Problem::kHeads * cases[i].Sq; ++row) {
      if (problem.right(row / cases[i].Sq, row % cases[i].Sq)) continue;
      std::printf("case %d: row %d is wrong\n", i, row);
      return 1;
    }
  }
  std::printf("attention_sm90 ok\n");
  return 0;
}
