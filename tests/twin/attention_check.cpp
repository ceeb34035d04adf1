// The sm_80 attention kernels on tiny shapes against the same formulas in double, for the sanitizers and for
// planted bugs: every mask form and term, one stage and two, there and back. `attention_check [SCHEDULE]`.
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <random>

#include "cuda/attention_sm80.cuh"
#include "host.h"

// Planted bugs of the forward are compiled without the backward.
#if !defined(FASTATTN_ONLY_FORWARD)
#include "cuda/attention_bwd_bias.cuh"
#endif

using namespace fastattn::cuda;

namespace {

// [head, row, column], heads first in memory; or rows so far apart that their places need 64 bits.
template <class T>
struct Tensor {
  Tensor(int heads, int rows, int columns, bool far)
      : heads(heads), rows(rows), columns(columns), head(far ? columns : int64_t(rows) * columns) {
    row = far ? (1 << 25) + 8 : columns;
    if (far) {
      bytes = size_t(rows * row + heads * head) * sizeof(T);
      void* place =
          mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (place == MAP_FAILED) twin::fail("no room for rows far apart");
      data = static_cast<T*>(place);
    } else {
      data = new T[size_t(heads) * size_t(head)];
    }
    for_each([](T& x) { x = from_float<T>(NAN); });
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() {
    if (bytes) munmap(data, bytes);
    else delete[] data;
  }

  Tensor& randomise(unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    for_each([&](T& x) { x = from_float<T>(normal(engine)); });
    return *this;
  }
  T& at(int h, int r, int d) const { return data[h * head + r * row + d]; }
  double operator()(int h, int r, int d) const { return to_float(at(h, r, d)); }
  template <class F>
  void for_each(F f) const {
    for (int i = 0; i < heads * rows * columns; ++i) {
      f(at(i / columns / rows, i / columns % rows, i % columns));
    }
  }
  // Of `per_batch` heads a batch.
  template <class O>
  O operand(int per_batch) const {
    return {data, per_batch * head, head, row};
  }

  int heads, rows, columns;
  int64_t head, row;
  size_t bytes = 0;
  T* data;
};

struct Shape {
  int B, Sq, Sk, D;
  bool terms = false, far = false;
  float sink = 0.5f;  // of the first head
};

constexpr int kGroup = 2;  // query heads on a KV head, of which there is one
constexpr int kBand = 3, kWindow = 80, kFarTile = 1 << 26;
constexpr float kScale = 0.2f, kCap = 4.0f, kDropped = 0.25f;
constexpr int64_t kSeed = 7;

// Which granules the lists name: none above the diagonal, and not all below it.
bool listed(int a, int b) { return b <= a && (a + 2 * b) % 5 != 2; }

// The inputs, and what the formulas make of them.
template <class T>
struct Problem : Shape {
  MaskForm form;
  int heads;
  Tensor<T> q, k, v, dout;
  std::vector<float> bias, dlse, slopes{0.1f, 0.2f}, sinks{sink, -0.5f};
  std::vector<int> lo, hi;
  std::vector<uint64_t> tiles = std::vector<uint64_t>(2 * 64);  // of the diagonal, by turns
  std::vector<double> out, lse, dq, dk, dv, dbias, dslopes, dsinks;

  Problem(const Shape& s, MaskForm form)
      : Shape(s),
        form(form),
        heads(B * kGroup),
        q(heads, Sq, D, far),
        k(B, Sk, D, far),
        v(B, Sk, D, far),
        dout(heads, Sq, D, far),
        bias(size_t(Sk)),
        dlse(size_t(heads * Sq)),
        out(size_t(heads * Sq * D)),
        lse(dlse.size()),
        dq(out.size()),
        dk(size_t(B * Sk * D)),
        dv(dk.size()),
        dbias(bias.size()),
        dslopes(size_t(heads)),
        dsinks(size_t(heads)) {
    q.randomise(1), dout.randomise(2), k.randomise(3), v.randomise(4);
    std::mt19937 engine(5);
    std::normal_distribution<float> normal;
    for (float& x : bias) x = normal(engine);
    for (float& x : dlse) x = normal(engine);
    for (size_t r = 0; r < 128; ++r) {
      tiles[r] = 0x5555555555555555u << (r / 64 + r) % 2 | 1;
      if (r % 64 < 32)
        tiles[r] &= 0xffffffffu;  // the other half of the columns is for the other half of the rows
    }
    tiles[5] = 0;  // row 5 sees nothing at all
    for (int i = 0; i < Sq; ++i) {
      lo.push_back(i - kWindow);
      hi.push_back(i % 50 == 7 ? 0 : Sk - 2);
    }
    poison();
    for (int h = 0; h < heads; ++h) {
      for (int i = 0; i < Sq; ++i) add_row(h, i);
    }
  }

  // Rows that see nothing and keys that nobody sees hold NaN.
  void poison() {
    std::vector<bool> row_sees(lo.size()), key_seen(bias.size());
    for (int i = 0; i < Sq; ++i) {
      for (int j = 0; j < Sk; ++j) {
        if (visible(i, j)) row_sees[size_t(i)] = key_seen[size_t(j)] = true;
      }
    }
    const auto hide = [](const Tensor<T>& x, const std::vector<bool>& seen) {
      int i = 0;
      x.for_each([&](T& element) {
        if (!seen[size_t(i++ / x.columns % x.rows)]) element = from_float<T>(NAN);
      });
    };
    hide(q, row_sees), hide(dout, row_sees), hide(k, key_seen), hide(v, key_seen);
  }

  bool visible(int i, int j) const {
    if (form != MaskForm::None && j > i + kBand) return false;
    if (form == MaskForm::Ranges) return j >= lo[size_t(i)] && j < hi[size_t(i)];
    if (form != MaskForm::Bits) return true;
    const int a = i / 64, b = j / 64;
    return listed(a, b) && (a != b || (tiles[size_t(a % 2 * 64 + i % 64)] >> (j % 64) & 1));
  }

  void add_row(int h, int i) {
    const int b = h / kGroup, row = h * Sq + i;
    std::vector<double> p(size_t(Sk), 0.0), cap_slope(size_t(Sk), 1.0), kept(size_t(Sk), 1.0),
        dp(size_t(Sk), 0.0);
    double sum = 0, delta = 0;
    for (int j = 0; j < Sk; ++j) {
      if (!visible(i, j)) continue;
      double s = 0;
      for (int d = 0; d < D; ++d) s += q(h, i, d) * k(b, j, d) * kScale;
      if (terms) {
        const double t = std::tanh(s / kCap);
        s = kCap * t + bias[size_t(j)] - slopes[size_t(h % kGroup)] * std::abs(i - j);
        cap_slope[size_t(j)] = 1 - t * t;
        uint32_t words[4];
        philox(kSeed, uint32_t(b), uint32_t(h % kGroup), uint32_t(i), uint32_t(j / 4), words);
        kept[size_t(j)] = words[j % 4] >= uint32_t(kDropped * 4294967296.0) ? 1 / (1 - kDropped) : 0;
      }
      sum += p[size_t(j)] = std::exp(s);
    }
    lse[size_t(row)] = std::log(sum);
    if (sum == 0) return;
    // dlse is of the sum without the sink.
    const double of_lse = terms ? dlse[size_t(row)] / sum : 0;
    const double sink = terms ? std::exp(double(sinks[size_t(h % kGroup)])) : 0;
    sum += sink;
    for (int j = 0; j < Sk; ++j) {
      if (!visible(i, j)) continue;
      const double weight = p[size_t(j)] / sum * kept[size_t(j)];
      for (int d = 0; d < D; ++d) {
        out[size_t(row * D + d)] += weight * v(b, j, d);
        dp[size_t(j)] += dout(h, i, d) * v(b, j, d) * kept[size_t(j)];
        dv[size_t((b * Sk + j) * D + d)] += weight * dout(h, i, d);
      }
      delta += p[size_t(j)] / sum * dp[size_t(j)];
    }
    for (int j = 0; j < Sk; ++j) {
      if (!visible(i, j)) continue;
      const double ds = p[size_t(j)] * ((dp[size_t(j)] - delta) / sum + of_lse);
      dbias[size_t(j)] += ds;
      dslopes[size_t(h)] -= ds * std::abs(i - j);
      for (int d = 0; d < D; ++d) {
        dq[size_t(row * D + d)] += ds * cap_slope[size_t(j)] * kScale * k(b, j, d);
        dk[size_t((b * Sk + j) * D + d)] += ds * cap_slope[size_t(j)] * kScale * q(h, i, d);
      }
    }
    dsinks[size_t(h)] -= sink / sum * delta;
  }
};

// Within a tolerance of the largest element.
template <class T>
std::string differs(const char* name, const Tensor<T>& ours, const std::vector<double>& exact,
                    double tolerance) {
  double largest = 1e-6;
  for (const double x : exact) largest = std::max(largest, std::isfinite(x) ? std::abs(x) : 0.0);
  size_t i = 0;
  std::string error;
  ours.for_each([&](const T& element) {
    const double x = to_float(element), want = exact[i++];
    if (!error.empty() || x == want || std::abs(x - want) <= tolerance * largest) return;
    error = std::string(name) + "[" + std::to_string(i - 1) + "] is " + std::to_string(x) + ", not " +
            std::to_string(want) + "; ";
  });
  return error;
}

template <class T, int kHead, MaskForm kForm>
std::string run(const Shape& shape) {
  const Problem<T> x(shape, kForm);
  const int B = x.B, Sq = x.Sq, Sk = x.Sk, D = x.D, heads = x.heads;
  const int q_granules = (Sq + 63) / 64, k_granules = (Sk + 63) / 64;
  const Tensor<T> out(heads, Sq, D, x.far), dq(heads, Sq, D, x.far), dk(B, Sk, D, x.far), dv(B, Sk, D, x.far);
  const Tensor<float> lse(1, heads, Sq, false), exponent(1, heads, Sq, false), delta(1, heads, Sq, false);
  const Tensor<float> dbias(1, 1, Sk, false), dslopes(1, 1, heads, false), dsinks(1, 1, heads, false);
  const Tensor<float> sink_terms(1, heads, Sq, false);
  std::vector<int> extents(size_t(heads * q_granules * 4)), offsets, list, offsets_t, list_t;
  const int first_tile = x.far ? kFarTile : 0;
  for (int a = 0; a < q_granules; ++a) {
    offsets.push_back(int(list.size()) / 2);
    for (int b = 0; b < k_granules; ++b) {
      if (listed(a, b)) list.insert(list.end(), {b, a == b ? first_tile + a % 2 : kFull});
    }
  }
  offsets.push_back(int(list.size()) / 2);
  for (int b = 0; b < k_granules; ++b) {
    offsets_t.push_back(int(list_t.size()) / 2);
    for (int a = 0; a < q_granules; ++a) {
      if (listed(a, b)) list_t.insert(list_t.end(), {a, a == b ? first_tile + a % 2 : kFull});
    }
  }
  offsets_t.push_back(int(list_t.size()) / 2);

  AttentionBwdArgs a{};
  a.B = B, a.Hq = kGroup, a.Hkv = 1, a.Sq = Sq, a.Sk = Sk, a.D = a.Dv = D;
  a.q = x.q.template operand<Operand>(kGroup), a.dout = x.dout.template operand<Operand>(kGroup);
  a.k = x.k.template operand<Operand>(1), a.v = x.v.template operand<Operand>(1);
  a.out = out.template operand<Result>(kGroup), a.dq = dq.template operand<Result>(kGroup);
  a.dk = dk.template operand<Result>(1), a.dv = dv.template operand<Result>(1);
  a.lse = lse.data;
  a.scale = kScale;
  a.band_lo = -kUnbounded;
  a.band_hi = kForm == MaskForm::None ? kUnbounded : kBand;
  if (kForm == MaskForm::Ranges) a.lo = x.lo.data(), a.hi = x.hi.data(), a.lo_row = a.hi_row = 1;
  if (kForm == MaskForm::Bits) {
    a.block_offsets = offsets.data(), a.block_list = list.data();
    a.block_offsets_t = offsets_t.data(), a.block_list_t = list_t.data();
    // The first tile may be a distant one: those before it are not there.
    a.bit_tiles = reinterpret_cast<const uint64_t*>(reinterpret_cast<uintptr_t>(x.tiles.data()) -
                                                    size_t(first_tile) * 64 * 8);
  }
  if (x.terms) {
    a.softcap = kCap;
    a.bias = x.bias.data(), a.bias_fp32 = true, a.bias_key = 1;
    a.alibi_slopes = x.slopes.data(), a.alibi_head = 1;
    a.sinks = x.sinks.data();
    a.dropout_seed = &kSeed, a.dropout_threshold = uint32_t(kDropped * 4294967296.0);
    a.dropout_scale = 1 / (1 - kDropped);
    a.dlse = x.dlse.data();
    a.dbias = dbias.data, a.dbias_fp32 = true, a.bias_B = a.bias_H = a.bias_Sq = 1, a.bias_Sk = Sk;
    a.dslopes = dslopes.data, a.dsinks = dsinks.data, a.sink_terms = sink_terms.data;
  }
  a.exponent = exponent.data, a.delta = delta.data, a.extents = extents.data();
  launch_attention_forward_sm80<T, kHead, kForm>(a, nullptr);

  const double tolerance = std::is_same_v<T, bf16> ? 0.02 : 0.003;
  std::string error = differs("out", out, x.out, tolerance) + differs("lse", lse, x.lse, 1e-5);
#if !defined(FASTATTN_ONLY_FORWARD)
  launch_attention_backward_sm80<T, kHead, kForm>(a, nullptr);
  error += differs("dq", dq, x.dq, tolerance) + differs("dk", dk, x.dk, tolerance) +
           differs("dv", dv, x.dv, tolerance);
  if (x.terms) {
    error += differs("dbias", dbias, x.dbias, tolerance) + differs("dslopes", dslopes, x.dslopes, tolerance) +
             differs("dsinks", dsinks, x.dsinks, tolerance);
  }
#endif
  return error;
}

}  // namespace

int main(int argc, char** argv) {
  twin::options.seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  host::test("two stages, bits, terms",
             [] { return run<fp16, 32, MaskForm::Bits>({1, 200, 210, 24, true}); });
  host::test("two stages, halves, ranges", [] { return run<bf16, 96, MaskForm::Ranges>({1, 140, 140, 96}); });
  host::test("two stages, halves, bits", [] { return run<bf16, 96, MaskForm::Bits>({1, 140, 140, 96}); });
  host::test("one stage, plain", [] { return run<bf16, 192, MaskForm::None>({1, 70, 200, 176}); });
  host::test("single elements", [] { return run<fp16, 32, MaskForm::Bits>({2, 70, 75, 17}); });
  // exp(sink) is beyond float's range, and lse has a gradient of its own.
  host::test("a far sink", [] { return run<fp16, 32, MaskForm::None>({1, 5, 9, 17, true, false, 150.0f}); });
  host::test("far apart", [] { return run<fp16, 32, MaskForm::Bits>({1, 70, 75, 24, false, true}); });
  host::test("banks", [] {
    return twin::bank_conflicts == 0 ? "" : std::to_string(twin::bank_conflicts) + " bank conflicts";
  });
  return host::failures != 0;
}
