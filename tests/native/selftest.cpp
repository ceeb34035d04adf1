// Runs the kernels of one instruction set against plain loops over doubles: odd shapes, every mask form, all
// score terms. Free of torch, so that a target that this machine only emulates is tested too.
//
//   selftest ISA        prints a line a check that fails; the exit status says whether any did
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <type_traits>

#include "../../csrc/cpu/decode_plan.h"
#include "../../csrc/cpu/targets/targets.h"
#include "plain.h"
#include "support.h"

namespace {

using namespace fastattn;
using selftest::kInfinity;
using selftest::Problem;

// A tensor [B, H, S, width] with rows that lie apart, in either order of heads and rows; NaN between.
template <class T>
struct Tensor4 {
  Tensor4(int64_t B, int64_t H, int64_t S, int64_t width, bool rows_first) {
    const int64_t padded = width + 3;
    batch = H * S * padded, head = rows_first ? padded : S * padded, row = rows_first ? H * padded : padded;
    data.assign(size_t(B * batch + 1), narrow<T>(kNan));
  }
  T* at(int64_t b, int64_t h, int64_t i) { return &data[size_t(b * batch + h * head + i * row)]; }
  Operand operand() const { return {data.data(), batch, head, row}; }

  int64_t batch, head, row;
  std::vector<T> data;
};

// dense[b, h, i, :] of numbers that T can hold -> T.
template <class T>
Tensor4<T> to_tensor(const std::vector<double>& dense, int64_t B, int64_t H, int64_t S, int64_t width,
                     bool rows_first) {
  Tensor4<T> t(B, H, S, width, rows_first);
  for (int64_t n = 0; n < B * H * S; ++n) {
    T* row = t.at(n / (H * S), n / S % H, n % S);
    for (int64_t d = 0; d < width; ++d) row[d] = narrow<T>(dense[size_t(n * width + d)]);
  }
  return t;
}

template <class T>
void expect_close(Tensor4<T>& actual, const std::vector<double>& dense, int64_t B, int64_t H, int64_t S,
                  int64_t width, const std::string& what, double tolerance) {
  double worst = 0, magnitude = 1;
  bool finite = true;
  for (int64_t n = 0; n < B * H * S; ++n) {
    const T* row = actual.at(n / (H * S), n / S % H, n % S);
    for (int64_t d = 0; d < width; ++d) {
      const double x = as_float(row[d]), y = dense[size_t(n * width + d)];
      finite &= std::isfinite(x);
      worst = std::fmax(worst, std::fabs(x - y)), magnitude = std::fmax(magnitude, std::fabs(y));
    }
  }
  check(finite && worst <= tolerance * magnitude,
        what + ": error " + std::to_string(worst) + (finite ? "" : ", not finite"));
}

enum class Mask { kNone, kCausal, kLowerRight, kWindow, kLengths, kBits, kBitsOfHeads, kBitsAndCausal };
const Mask kMasks[] = {Mask::kNone,    Mask::kCausal, Mask::kLowerRight,  Mask::kWindow,
                       Mask::kLengths, Mask::kBits,   Mask::kBitsOfHeads, Mask::kBitsAndCausal};

struct Terms {
  bool softcap = false, bias = false, alibi = false, sinks = false, dropout = false, positions = false;
  bool negative_scale = false;
};
const Terms kTerms[] = {
    {},
    {.softcap = true, .sinks = true},
    {.bias = true},
    {.alibi = true, .positions = true},
    {.dropout = true, .positions = true},
    {.negative_scale = true},
    {.softcap = true, .bias = true, .alibi = true, .sinks = true, .dropout = true, .positions = true},
};

struct Shape {
  int64_t B, Hq, Hkv, Sq, Sk, D, Dv;
};

// Lists of the granules that rows of `visible` show, [maps][n_rows][n_columns] as bools, 64 x 64 a granule.
struct BlockMap {
  std::vector<int32_t> offsets, list;

  template <class See>
  BlockMap(int64_t maps, int64_t q_rows, int64_t keys, bool transposed, const See& see,
           std::vector<uint64_t>* tiles) {
    const int64_t n_q = (q_rows + 63) / 64, n_k = (keys + 63) / 64;
    for (int64_t m = 0; m < maps; ++m) {
      offsets.push_back(int32_t(list.size() / 2));
      for (int64_t a = 0; a < (transposed ? n_k : n_q); ++a) {
        for (int64_t c = 0; c < (transposed ? n_q : n_k); ++c) {
          add(m, transposed ? c : a, transposed ? a : c, int32_t(c), q_rows, keys, see, tiles);
        }
        offsets.push_back(int32_t(list.size() / 2));
      }
    }
  }
  template <class See>
  void add(int64_t m, int64_t qg, int64_t kg, int32_t other, int64_t q_rows, int64_t keys, const See& see,
           std::vector<uint64_t>* tiles) {
    uint64_t tile[64] = {};
    bool any = false, all = true;
    for (int64_t r = 0; r < 64 && qg * 64 + r < q_rows; ++r) {
      for (int64_t c = 0; c < 64 && kg * 64 + c < keys; ++c) {
        const bool seen = see(m, qg * 64 + r, kg * 64 + c);
        tile[r] |= uint64_t(seen) << c;
        any |= seen, all &= seen;
      }
    }
    if (!any) return;
    list.push_back(other);
    list.push_back(all ? -1 : int32_t(tiles->size() / 64));
    if (!all) tiles->insert(tiles->end(), tile, tile + 64);
  }
};

// One random call: the problem in doubles, and the same as the kernels' arguments.
template <class T>
struct Call {
  Call(const Shape& s, Mask mask, const Terms& terms, bool rows_first, bool zero_q)
      : q(s.B, s.Hq, s.Sq, s.D, rows_first),
        k(s.B, s.Hkv, s.Sk, s.D, rows_first),
        v(s.B, s.Hkv, s.Sk, s.Dv, rows_first),
        out(s.B, s.Hq, s.Sq, s.Dv, rows_first),
        lse(size_t(s.B * s.Hq * s.Sq), kNan) {
    p.B = s.B, p.Hq = s.Hq, p.Hkv = s.Hkv, p.Sq = s.Sq, p.Sk = s.Sk, p.D = s.D, p.Dv = s.Dv, p.scale = 0.2;
    fill(&p.q, s.B * s.Hq * s.Sq * s.D, zero_q ? 0 : 2);
    fill(&p.k, s.B * s.Hkv * s.Sk * s.D, 2);
    fill(&p.v, s.B * s.Hkv * s.Sk * s.Dv, 1);
    q = to_tensor<T>(p.q, s.B, s.Hq, s.Sq, s.D, rows_first);
    k = to_tensor<T>(p.k, s.B, s.Hkv, s.Sk, s.D, rows_first);
    v = to_tensor<T>(p.v, s.B, s.Hkv, s.Sk, s.Dv, rows_first);
    static uint64_t calls = 0;
    a = AttentionArgs{};
    a.call = ++calls, a.storage = kStorage<T>;
    a.B = s.B, a.Hq = s.Hq, a.Hkv = s.Hkv, a.Sq = s.Sq, a.Sk = s.Sk, a.D = s.D, a.Dv = s.Dv;
    set_mask(mask);
    poison_hidden();
    set_terms(terms);
    a.q = q.operand(), a.k = k.operand(), a.v = v.operand();
    a.out = out.data.data(), a.out_batch = out.batch, a.out_head = out.head, a.out_row = out.row;
    a.lse = lse.data();
  }
  Call(const Call&) = delete;

  static void fill(std::vector<double>* x, int64_t n, double magnitude) {
    x->resize(size_t(n));
    for (double& e : *x) e = as_float(narrow<T>(magnitude * rng.signed_unit()));
  }

  void set_mask(Mask mask) {
    const bool bits = mask == Mask::kBits || mask == Mask::kBitsOfHeads || mask == Mask::kBitsAndCausal;
    if (mask == Mask::kCausal || mask == Mask::kBitsAndCausal) a.has_band_hi = true, a.band_hi = 0;
    if (mask == Mask::kLowerRight || mask == Mask::kWindow) a.has_band_hi = true, a.band_hi = a.Sk - a.Sq;
    if (mask == Mask::kWindow) a.has_band_lo = true, a.band_lo = a.Sk - a.Sq - 20;
    if (mask == Mask::kLengths) {
      lo.resize(size_t(a.B)), hi.resize(size_t(a.Hq * a.Sq));
      for (int32_t& x : lo) x = int32_t(rng.below(a.Sk / 2 + 1));
      for (int32_t& x : hi) x = int32_t(rng.below(a.Sk + 1));
      a.lo = lo.data(), a.lo_batch = 1;
      a.hi = hi.data(), a.hi_head = a.Sq, a.hi_row = 1;
    }
    const int64_t heads = mask == Mask::kBitsOfHeads ? a.Hq : 1,
                  maps = (mask == Mask::kBitsOfHeads ? a.B : 1) * heads;
    if (bits) {
      // A granule is full, empty or random; rows and columns beyond the tensors do not count.
      const int64_t n_k = (a.Sk + 63) / 64, n_q = (a.Sq + 63) / 64;
      std::vector<int64_t> kind(size_t(maps * n_q * n_k));
      for (int64_t& x : kind) x = rng.below(3);
      shown.resize(size_t(maps * a.Sq * a.Sk));
      for (int64_t n = 0; n < maps * a.Sq * a.Sk; ++n) {
        const int64_t m = n / (a.Sq * a.Sk), i = n / a.Sk % a.Sq, j = n % a.Sk;
        const int64_t of = kind[size_t((m * n_q + i / 64) * n_k + j / 64)];
        shown[size_t(n)] = of == 0 ? 0 : of == 1 ? 1 : char(rng.below(2));
      }
      const auto see = [&](int64_t m, int64_t i, int64_t j) {
        return shown[size_t((m * a.Sq + i) * a.Sk + j)] != 0;
      };
      map.emplace_back(maps, a.Sq, a.Sk, false, see, &tiles);
      map.emplace_back(maps, a.Sq, a.Sk, true, see, &tiles);
      a.block_offsets = map[0].offsets.data(), a.block_list = map[0].list.data();
      a.bit_tiles = tiles.data();
      a.map_head = heads > 1 ? n_q + 1 : 0, a.map_batch = maps > heads ? heads * (n_q + 1) : 0;
    }
    p.visible.resize(size_t(a.B * a.Hq * a.Sq * a.Sk));
    for (size_t n = 0; n < p.visible.size(); ++n) {
      const int64_t b = int64_t(n) / (a.Hq * a.Sq * a.Sk), h = int64_t(n) / (a.Sq * a.Sk) % a.Hq;
      const int64_t i = int64_t(n) / a.Sk % a.Sq, j = int64_t(n) % a.Sk;
      bool seen = !(a.has_band_hi && j > i + a.band_hi) && !(a.has_band_lo && j < i + a.band_lo);
      if (a.lo) seen &= j >= lo[size_t(b)] && j < hi[size_t(h * a.Sq + i)];
      if (bits) seen &= shown[size_t(((heads > 1 ? b * heads + h : 0) * a.Sq + i) * a.Sk + j)] != 0;
      p.visible[n] = seen;
    }
  }

  void poison_hidden() {
    for (int64_t n = 0; n < a.B * a.Hkv * a.Sk; ++n) {
      const int64_t b = n / (a.Hkv * a.Sk), hk = n / a.Sk % a.Hkv, j = n % a.Sk, group = a.Hq / a.Hkv;
      bool seen = false;
      for (int64_t h = hk * group; h < (hk + 1) * group; ++h) {
        for (int64_t i = 0; i < a.Sq; ++i) seen |= p.sees(b, h, i, j);
      }
      if (seen) continue;
      for (int64_t d = 0; d < a.D; ++d) k.at(b, hk, j)[d] = narrow<T>(kNan);
      for (int64_t d = 0; d < a.Dv; ++d) v.at(b, hk, j)[d] = narrow<T>(d % 2 ? kInfinity : kNan);
    }
  }

  void set_terms(const Terms& terms) {
    if (terms.negative_scale) p.scale = -0.2;
    a.scale = float(p.scale), p.scale = a.scale;
    if (terms.softcap) a.softcap = 1.5f, p.softcap = 1.5;
    if (terms.bias) {
      fill(&p.bias, a.B * a.Hq * a.Sq * a.Sk, 1);
      bias.resize(p.bias.size());
      for (size_t n = 0; n < bias.size(); ++n) {
        if (rng.below(8) == 0) p.bias[n] = -kInfinity;
        bias[n] = narrow<T>(p.bias[n]);
      }
      a.bias = bias.data(), a.bias_fp32 = std::is_same_v<T, float>;
      a.bias_batch = a.Hq * a.Sq * a.Sk, a.bias_head = a.Sq * a.Sk, a.bias_row = a.Sk, a.bias_key = 1;
    }
    per_head(terms.alibi, 0.1, &p.slopes, &slopes);
    per_head(terms.sinks, 2, &p.sinks, &sinks);
    if (terms.alibi) a.alibi_slopes = slopes.data(), a.alibi_head = 1;
    if (terms.sinks) a.sinks = sinks.data();
    for (int64_t i = 0; i < a.Sq; ++i)
      p.q_pos.push_back(terms.positions ? int32_t(rng.below(50)) : int32_t(i));
    for (int64_t j = 0; j < a.Sk; ++j)
      p.k_pos.push_back(terms.positions ? int32_t(rng.below(50)) : int32_t(j));
    if (terms.positions) a.q_pos = p.q_pos.data(), a.q_pos_row = 1, a.k_pos = p.k_pos.data(), a.k_pos_key = 1;
    if (terms.dropout) {
      p.dropout = 0.25, p.seed = 0xfedcba9876543210ull;
      a.dropout = true, a.dropout_threshold = 1u << 30, a.dropout_scale = float(1 / 0.75),
      a.dropout_seed = p.seed;
    }
  }

  void per_head(bool wanted, double magnitude, std::vector<double>* exact, std::vector<float>* given) {
    for (int64_t h = 0; wanted && h < a.Hq; ++h) {
      given->push_back(float(magnitude * rng.uniform()));
      exact->push_back(given->back());
    }
  }

  Problem p;
  AttentionArgs a;
  Tensor4<T> q, k, v, out;
  std::vector<float> lse, slopes, sinks;
  std::vector<T> bias;
  std::vector<int32_t> lo, hi;
  std::vector<char> shown;
  std::vector<BlockMap> map;  // and its transpose
  std::vector<uint64_t> tiles;
};

template <class T>
void run_attention(Call<T>& c, const KernelTable& table) {
  Scratch scratch(table.attention_scratch(c.a));
  for (int64_t i = c.a.tasks() - 1; i >= 0; --i) table.attention[int(kStorage<T>)](c.a, i, scratch.data);
}

template <class T>
void run_decode(Call<T>& c, const KernelTable& table) {
  const DecodePlan plan(c.a);
  Scratch partials(plan.tasks() * plan.partial_floats() * 4), scratch(table.decode_scratch(c.a));
  c.a.partials = static_cast<float*>(partials.data);
  for (int64_t i = plan.tasks() - 1; i >= 0; --i) table.decode[int(kStorage<T>)](c.a, i, scratch.data);
  for (int64_t i = 0; i < plan.items; ++i) table.decode_merge[int(kStorage<T>)](c.a, i, scratch.data);
}

template <class T>
void expect_forward(Call<T>& c, const std::string& what, bool count) {
  const selftest::Forward exact = selftest::forward(c.p);
  expect_close(c.out, exact.out, c.a.B, c.a.Hq, c.a.Sq, c.a.Dv, what + " out", kTolerance<T>);
  bool right = true;
  for (size_t n = 0; n < exact.lse.size(); ++n) {
    if (exact.lse[n] == -kInfinity) {
      right &= c.lse[n] == -kInfinity;
    } else {
      right &= std::fabs(c.lse[n] - exact.lse[n]) < 1e-4;
      if (count) right &= std::lround(std::exp(double(c.lse[n]))) == std::lround(std::exp(exact.lse[n]));
    }
  }
  check(right, what + " lse");
}

template <class T>
void run_backward(Call<T>& c, const KernelTable& table, const std::string& what) {
  const AttentionArgs& a = c.a;
  const AttentionBwdTasks& tasks = table.attention_bwd[int(kStorage<T>)];
  std::vector<double> dense;
  Call<T>::fill(&dense, a.B * a.Hq * a.Sq * a.Dv, 1);
  const Tensor4<T> dout = to_tensor<T>(dense, a.B, a.Hq, a.Sq, a.Dv, true);
  const selftest::Backward exact = selftest::backward(c.p, dense);
  for (bool heads : {false, true}) {
    Tensor4<T> dq(a.B, a.Hq, a.Sq, a.D, false), dk(a.B, a.Hkv, a.Sk, a.D, true),
        dv(a.B, a.Hkv, a.Sk, a.Dv, false);
    const size_t rows = size_t(a.B * a.Hq * a.Sq);
    std::vector<float> exponent(rows, kNan), shift = exponent, delta = exponent;
    std::vector<QueryBlock> blocks(size_t(a.tasks()));
    AttentionBwdArgs b{};
    static_cast<AttentionArgs&>(b) = a;
    b.dout = b.dout_as_out = dout.operand();
    b.exponent = exponent.data(), b.shift = shift.data(), b.delta = delta.data(), b.blocks = blocks.data();
    if (!c.map.empty()) {
      b.block_offsets_t = c.map[1].offsets.data(), b.block_list_t = c.map[1].list.data();
      b.map_t_head = a.map_head ? b.k_blocks() + 1 : 0;
      b.map_t_batch = a.map_batch ? a.Hq * (b.k_blocks() + 1) : 0;
    }
    b.dq = {dq.data.data(), dq.batch, dq.head, dq.row};
    b.dk = {dk.data.data(), dk.batch, dk.head, dk.row};
    b.dv = {dv.data.data(), dv.batch, dv.head, dv.row};
    b.batches = 1;
    Scratch scratch(tasks.scratch(b, heads)), row_scratch(tasks.scratch(b, false));
    for (int64_t i = 0; i < a.tasks(); ++i) tasks.rows(b, i, row_scratch.data);
    if (heads) {
      for (int64_t i = 0; i < a.B * a.Hkv; ++i) tasks.heads(b, i, scratch.data);
    } else {
      for (int64_t i = 0; i < a.tasks(); ++i) tasks.queries(b, i, scratch.data);
      for (int64_t i = 0; i < a.B * a.Hkv * b.k_blocks(); ++i) tasks.keys(b, i, scratch.data);
    }
    const std::string way = what + (heads ? " heads" : " blocks");
    const double tolerance = 4 * kTolerance<T>;
    expect_close(dq, exact.dq, a.B, a.Hq, a.Sq, a.D, way + " dq", tolerance);
    expect_close(dk, exact.dk, a.B, a.Hkv, a.Sk, a.D, way + " dk", tolerance);
    expect_close(dv, exact.dv, a.B, a.Hkv, a.Sk, a.Dv, way + " dv", tolerance);
  }
}

template <class T>
void test_attention(const KernelTable& table, const std::string& type) {
  const Shape shapes[] = {
      {1, 2, 1, 70, 131, 19, 37}, {2, 3, 3, 5, 67, 32, 8}, {1, 1, 1, 1, 1, 1, 1}, {1, 2, 2, 66, 64, 6, 64}};
  const Shape few[] = {
      {2, 6, 2, 3, 131, 19, 37}, {1, 9, 1, 8, 66, 40, 17}, {1, 2, 2, 1, 1030, 64, 33}, {1, 1, 1, 1, 1, 1, 1}};
  int n = 0;
  for (const Mask mask : kMasks) {
    for (const Terms& terms : kTerms) {
      // Shapes and layouts in turn: the product of all would take an emulator minutes.
      ++n;
      const std::string what =
          type + " mask " + std::to_string(int(mask)) + " terms " + std::to_string(int(&terms - kTerms));
      const bool plain = &terms == kTerms;
      Call<T> call(shapes[n % 4], mask, terms, n % 2, plain && n % 3 == 0);
      run_attention(call, table);
      expect_forward(call, "attention " + what, plain && n % 3 == 0);
      if (n % 2) run_backward(call, table, "backward " + what);
      Call<T> decode(few[n % 4], mask, terms, n % 2, plain && n % 3 == 0);
      run_decode(decode, table);
      expect_forward(decode, "decode " + what, plain && n % 3 == 0);
    }
  }
}

// Every number that T holds comes through one key unchanged, and half the sum of two is rounded to even.
template <class T>
void test_storage(const KernelTable& table, const std::string& type) {
  constexpr int64_t kWidth = 64, kHeads = 65536 / kWidth;
  for (int64_t keys : {1, 2}) {
    for (bool decode : {false, true}) {
      Call<T> c({1, kHeads, kHeads, 1, keys, 1, kWidth}, Mask::kNone, {}, false, true);
      for (int64_t n = 0; n < 65536; ++n) {
        c.v.at(0, n / kWidth, 0)[n % kWidth].bits = uint16_t(n);
        if (keys == 2) c.v.at(0, n / kWidth, 1)[n % kWidth].bits = uint16_t(n ^ 1);
      }
      decode ? run_decode(c, table) : run_attention(c, table);
      // The products of bf16 may take subnormal numbers as 0; on tiles a weight is 2^-7 or more, not 1.
      const double smallest = table.keeps_heads && !decode ? 0x1p-119 : 0x1p-126;
      int wrong = 0;
      for (int64_t n = 0; n < 65536; ++n) {
        const T x = c.v.at(0, n / kWidth, 0)[n % kWidth], y = c.out.at(0, n / kWidth, 0)[n % kWidth];
        double exact = as_float(x);
        if (keys == 2) exact = (exact + as_float(c.v.at(0, n / kWidth, 1)[n % kWidth])) / 2;
        if (!std::isfinite(exact)) continue;
        if (std::is_same_v<T, BFloat16> && std::fabs(exact) < smallest && as_float(y) == 0) continue;
        // Of two keys, the sum comes before the half.
        if (keys == 2 && (std::fabs(exact) < 0x1p-100 || std::fabs(exact) >= 0x1p126)) continue;
        wrong += as_float(narrow<T>(exact)) != as_float(y);
      }
      check(wrong == 0, type + (decode ? " decode" : " attention") + " of " + std::to_string(keys) +
                            " keys: " + std::to_string(wrong) + " numbers came out wrong");
    }
  }
}

template <class T>
void test_softmax(const KernelTable& table, const std::string& type) {
  for (int64_t width : {1, 3, 16, 67, 1500}) {
    const int64_t rows = 5, padded = width + 2;
    std::vector<T> x(size_t(rows * padded), narrow<T>(kNan)), out = x;
    std::vector<uint8_t> mask(size_t(rows * width));
    std::vector<float> bias(static_cast<size_t>(width));
    for (float& b : bias) b = float(rng.signed_unit());
    for (int64_t n = 0; n < rows * width; ++n) {
      x[size_t(n / width * padded + n % width)] = narrow<T>(3 * rng.signed_unit());
      mask[size_t(n)] = n < width ? 0 : rng.below(3) != 0;  // row 0 sees nothing
    }
    SoftmaxArgs a{};
    a.grid.dims = 1, a.grid.size[0] = a.grid.rows = rows;
    a.width = width, a.rows_per_task = 2, a.scale = 0.7f;
    a.x = {x.data(), kStorage<T>, {padded}, 1}, a.out = {out.data(), kStorage<T>, {padded}, 1};
    a.mask = {mask.data(), Storage::kFloat, {width}, 1}, a.bias = {bias.data(), Storage::kFloat, {0}, 1};
    Scratch scratch(table.rows.softmax_scratch(a));
    const SoftmaxTask task = table.rows.softmax[int(kStorage<T>)][std::is_same_v<T, float>];
    for (int64_t i = 0; i < a.tasks(); ++i) task(a, i, scratch.data);
    double worst = 0;
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      std::vector<double> e(size_t(width), 0);
      for (int64_t j = 0; j < width; ++j) {
        if (!mask[size_t(r * width + j)]) continue;
        e[size_t(j)] = std::exp(double(a.scale) * as_float(x[size_t(r * padded + j)]) + bias[size_t(j)]);
        sum += e[size_t(j)];
      }
      for (int64_t j = 0; j < width; ++j) {
        const double error = as_float(out[size_t(r * padded + j)]) - (sum > 0 ? e[size_t(j)] / sum : 0);
        worst = std::isfinite(error) ? std::fmax(worst, std::fabs(error)) : kInfinity;
      }
    }
    check(worst < kTolerance<T>,
          type + " softmax of " + std::to_string(width) + ": " + std::to_string(worst));
  }
}

template <class T>
void test_norm(const KernelTable& table, const std::string& type) {
  for (int64_t width : {1, 7, 64, 333}) {
    for (bool rms : {false, true}) {
      const int64_t rows = 3;
      const size_t count = size_t(rows * width);
      std::vector<T> x(count), residual(count), sum(count, narrow<T>(kNan)), y = sum;
      std::vector<float> weight(static_cast<size_t>(width)), bias(static_cast<size_t>(width));
      for (size_t n = 0; n < count; ++n) {
        x[n] = narrow<T>(rng.signed_unit() + 0.5), residual[n] = narrow<T>(rng.signed_unit());
      }
      for (float& w : weight) w = float(rng.signed_unit());
      for (float& b : bias) b = float(rng.signed_unit());
      NormArgs a{};
      a.grid.dims = 1, a.grid.size[0] = a.grid.rows = rows;
      a.width = width, a.rows_per_task = 2, a.eps = 1e-5, a.rms = rms;
      const auto tensor = [&](std::vector<T>& t) { return RowTensor{t.data(), kStorage<T>, {width}, 1}; };
      a.x = tensor(x), a.residual = tensor(residual), a.sum = tensor(sum), a.y = tensor(y);
      a.weight = weight.data(), a.bias = rms ? nullptr : bias.data();
      Scratch scratch(table.rows.norm_scratch(a));
      for (int64_t i = 0; i < a.tasks(); ++i) table.rows.norm[int(kStorage<T>)](a, i, scratch.data);
      double worst = 0;
      for (int64_t r = 0; r < rows; ++r) {
        double mean = 0, square = 0;
        const auto h = [&](int64_t j) { return double(as_float(sum[size_t(r * width + j)])); };
        for (int64_t j = 0; j < width; ++j) {
          const size_t at = size_t(r * width + j);
          const float exact = as_float(x[at]) + as_float(residual[at]);
          worst = std::fmax(worst, as_float(narrow<T>(exact)) == as_float(sum[at]) ? 0 : kInfinity);
          mean += rms ? 0 : h(j) / double(width);
        }
        for (int64_t j = 0; j < width; ++j) square += (h(j) - mean) * (h(j) - mean) / double(width);
        for (int64_t j = 0; j < width; ++j) {
          const double scaled = (h(j) - mean) / std::sqrt(square + a.eps) * weight[size_t(j)];
          const double error = as_float(y[size_t(r * width + j)]) - scaled - (rms ? 0 : bias[size_t(j)]);
          worst = std::isfinite(error) ? std::fmax(worst, std::fabs(error)) : kInfinity;
        }
      }
      check(worst < 2 * kTolerance<T>, type + (rms ? " RMSNorm of " : " LayerNorm of ") +
                                           std::to_string(width) + ": " + std::to_string(worst));
    }
  }
}

void test_linear(const KernelTable& table) {
  uint64_t calls = 0;
  for (int64_t K : {0, 3, 33, 771}) {
    for (const Activation activation : {Activation::kNone, Activation::kRelu, Activation::kGelu}) {
      const int64_t M = 71, N = 55;
      const auto numbers = [](int64_t n) {
        std::vector<float> values(static_cast<size_t>(n));
        for (float& v : values) v = float(rng.signed_unit());
        return values;
      };
      const std::vector<float> x = numbers(M * K), weight = numbers(N * K), bias = numbers(N);
      std::vector<float> y(size_t(M * N), float(kNan));
      LinearArgs a{++calls, x.data(), weight.data(), bias.data(), y.data(), M, N, K,
                   K,       K,        activation,    64,          48};
      Scratch scratch(table.linear_scratch(a));
      for (int64_t i = 0; i < a.tasks(); ++i) table.linear(a, i, scratch.data);
      double worst = 0, magnitude = 1;
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t n = 0; n < N; ++n) {
          double sum = bias[size_t(n)];
          for (int64_t k = 0; k < K; ++k) sum += double(x[size_t(m * K + k)]) * weight[size_t(n * K + k)];
          if (activation == Activation::kRelu) sum = std::fmax(sum, 0);
          if (activation == Activation::kGelu) sum *= std::erfc(-sum * std::sqrt(0.5)) / 2;
          const double error = y[size_t(m * N + n)] - sum;
          magnitude = std::fmax(magnitude, std::fabs(sum));
          worst = std::isfinite(error) ? std::fmax(worst, std::fabs(error)) : kInfinity;
        }
      }
      check(worst <= kTolerance<float> * magnitude,
            "linear of " + std::to_string(K) + ": " + std::to_string(worst));
    }
  }
}

template <class U>
void test_scan(const KernelTable& table, U hidden) {
  const int64_t rows = 3, keys = 64 * 3 + 21;
  std::vector<U> mask(size_t(rows * keys));
  for (U& x : mask) {
    const int64_t kind = rng.below(3);
    x = kind == 0 ? hidden : kind == 1 ? U(0) : U(rng.bits() | 1);
    if (sizeof(U) == 1 && x) x = 1;
  }
  const MaskScanArgs a{mask.data(), rows, keys, keys, 1, int(sizeof(U)), hidden};
  const auto words = std::make_unique<ScannedWords>();
  table.mask_scan(a, 0, rows, 0, 4, words.get());
  int wrong = 0;
  for (int64_t n = 0; n < rows * 4 * 64; ++n) {
    const int64_t i = n / 256, j = n % 256;
    const bool seen = j < keys && mask[size_t(i * keys + j)] != (sizeof(U) == 1 ? U(0) : hidden);
    wrong += (words->word[i][j / 64] >> (j % 64) & 1) != seen;
  }
  check(wrong == 0,
        "scan of " + std::to_string(sizeof(U)) + " bytes: " + std::to_string(wrong) + " bits are wrong");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::printf("usage: selftest ISA\n");
    return 2;
  }
  try {
    force_isa(argv[1]);
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 2;
  }
  const KernelTable& table = kernels();
  test_attention<float>(table, "float32");
  test_attention<BFloat16>(table, "bfloat16");
  test_attention<Half>(table, "float16");
  test_storage<BFloat16>(table, "bfloat16");
  test_storage<Half>(table, "float16");
  test_softmax<float>(table, "float32");
  test_softmax<BFloat16>(table, "bfloat16");
  test_softmax<Half>(table, "float16");
  test_norm<float>(table, "float32");
  test_norm<BFloat16>(table, "bfloat16");
  test_norm<Half>(table, "float16");
  test_linear(table);
  test_scan<uint8_t>(table, 0);
  test_scan<uint16_t>(table, 0xfc00);
  test_scan<uint32_t>(table, 0xff800000u);
  std::printf("%s: %d checks, %d failed\n", argv[1], checks, failures);
  return failures != 0;
}
