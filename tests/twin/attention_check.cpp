// The sm_80 attention kernels on tiny shapes against the same formulas in double, for the sanitizers and for
// planted bugs: every mask form and term, one stage and two, there and back. `attention_check [SCHEDULE]`.
#include <cmath>
#include <cstdio>
#include <random>

#include "cuda/attention_bwd_bias.cuh"
#include "cuda/attention_sm80.cuh"
#include "host.h"

using namespace fastattn::cuda;

namespace {

template <class T>
std::vector<T> random_values(int count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(size_t(count), T{});
  for (T& value : values) value = from_float<T>(normal(engine));
  return values;
}

template <class T>
std::vector<T> poisoned(int count) {
  return std::vector<T>(size_t(count), from_float<T>(NAN));
}

constexpr int kHq = 2, kBand = 3;
constexpr float kScale = 0.2f, kCap = 4.0f, kDropped = 0.25f;
constexpr int64_t kSeed = 7;

// Two query heads on one KV head, [head, row, column] in memory, and what the formulas make of them.
template <class T>
struct Problem {
  int Sq, Sk, D;
  MaskForm form;
  bool terms;
  std::vector<T> q, k, v, dout;
  std::vector<float> bias, slopes{0.1f, 0.2f}, sinks{0.5f, -0.5f};
  std::vector<uint64_t> tile = std::vector<uint64_t>(64);
  std::vector<double> out, lse, dq, dk, dv, dbias, dslopes, dsinks;

  Problem(int Sq, int Sk, int D, MaskForm form, bool terms)
      : Sq(Sq),
        Sk(Sk),
        D(D),
        form(form),
        terms(terms),
        q(random_values<T>(kHq * Sq * D, 1)),
        k(random_values<T>(Sk * D, 3)),
        v(random_values<T>(Sk * D, 4)),
        dout(random_values<T>(kHq * Sq * D, 2)),
        bias(random_values<float>(Sk, 5)),
        out(q.size()),
        lse(size_t(kHq * Sq)),
        dq(q.size()),
        dk(k.size()),
        dv(k.size()),
        dbias(size_t(Sk), 0.0),
        dslopes(kHq),
        dsinks(kHq) {
    for (int r = 0; r < 64; ++r) tile[size_t(r)] = 0x5555555555555555u << (r % 2) | 1;
    for (int h = 0; h < kHq; ++h) {
      for (int i = 0; i < Sq; ++i) add_row(h, i);
    }
  }

  // The diagonal granules show half of their keys, the others all, within the band.
  bool visible(int i, int j) const {
    if (form != MaskForm::None && j > i + kBand) return false;
    return form != MaskForm::Bits || i / 64 != j / 64 || (tile[size_t(i % 64)] >> (j % 64) & 1);
  }

  void add_row(int h, int i) {
    const auto at = [&](const std::vector<T>& x, int row, int d) {
      return double(to_float(x[size_t(row * D + d)]));
    };
    const int row = h * Sq + i;
    std::vector<double> p(size_t(Sk), 0.0), cap_slope(size_t(Sk), 1.0), kept(size_t(Sk), 1.0),
        dp(size_t(Sk), 0.0);
    double sum = 0, delta = 0;
    for (int j = 0; j < Sk; ++j) {
      double s = 0;
      for (int d = 0; d < D; ++d) s += at(q, row, d) * at(k, j, d) * kScale;
      if (terms) {
        const double t = std::tanh(s / kCap);
        s = kCap * t + bias[size_t(j)] - slopes[size_t(h)] * std::abs(i - j);
        cap_slope[size_t(j)] = 1 - t * t;
        uint32_t words[4];
        philox(kSeed, 0, uint32_t(h), uint32_t(i), uint32_t(j / 4), words);
        kept[size_t(j)] = words[j % 4] >= uint32_t(kDropped * 4294967296.0) ? 1 / (1 - kDropped) : 0;
      }
      if (visible(i, j)) sum += p[size_t(j)] = std::exp(s);
    }
    lse[size_t(row)] = std::log(sum);
    if (terms) sum += std::exp(double(sinks[size_t(h)]));
    for (int j = 0; j < Sk; ++j) {
      p[size_t(j)] /= sum;
      for (int d = 0; d < D; ++d) {
        out[size_t(row * D + d)] += p[size_t(j)] * kept[size_t(j)] * at(v, j, d);
        dp[size_t(j)] += at(dout, row, d) * at(v, j, d) * kept[size_t(j)];
        dv[size_t(j * D + d)] += p[size_t(j)] * kept[size_t(j)] * at(dout, row, d);
      }
      delta += p[size_t(j)] * dp[size_t(j)];
    }
    for (int j = 0; j < Sk; ++j) {
      const double ds = p[size_t(j)] * (dp[size_t(j)] - delta);
      dbias[size_t(j)] += ds;
      dslopes[size_t(h)] -= ds * std::abs(i - j);
      for (int d = 0; d < D; ++d) {
        dq[size_t(row * D + d)] += ds * cap_slope[size_t(j)] * kScale * at(k, j, d);
        dk[size_t(j * D + d)] += ds * cap_slope[size_t(j)] * kScale * at(q, row, d);
      }
    }
    if (terms) dsinks[size_t(h)] -= std::exp(double(sinks[size_t(h)])) / sum * delta;
  }
};

// Within a tolerance of the largest element.
template <class T>
std::string differs(const char* name, const std::vector<T>& ours, const std::vector<double>& exact,
                    double tolerance) {
  double largest = 1e-6;
  for (const double x : exact) largest = std::max(largest, std::abs(x));
  for (size_t i = 0; i < exact.size(); ++i) {
    const double x = to_float(ours[i]);
    if (std::abs(x - exact[i]) <= tolerance * largest) continue;
    return std::string(name) + "[" + std::to_string(i) + "]: " + std::to_string(x) + ", expected " +
           std::to_string(exact[i]);
  }
  return "";
}

template <class T, int kHead, MaskForm kForm>
std::string run(int Sq, int Sk, int D, bool terms) {
  Problem<T> x(Sq, Sk, D, kForm, terms);
  const int q_granules = (Sq + 63) / 64, k_granules = (Sk + 63) / 64;
  auto out = poisoned<T>(kHq * Sq * D), dq = out, dk = poisoned<T>(Sk * D), dv = dk;
  auto lse = poisoned<float>(kHq * Sq), exponent = lse, delta = lse, dbias = poisoned<float>(Sk);
  std::vector<float> dslopes(kHq), dsinks(kHq);
  std::vector<int> extents(size_t(kHq * q_granules * 4)), offsets, list, offsets_t, list_t;
  const auto fill = [](int outer, int inner, std::vector<int>& starts, std::vector<int>& pairs) {
    for (int a = 0; a < outer; ++a) {
      starts.push_back(int(pairs.size()) / 2);
      for (int b = 0; b < inner; ++b) pairs.insert(pairs.end(), {b, a == b ? 0 : kFull});
    }
    starts.push_back(int(pairs.size()) / 2);
  };
  fill(q_granules, k_granules, offsets, list);
  fill(k_granules, q_granules, offsets_t, list_t);

  AttentionBwdArgs a{};
  a.B = 1, a.Hq = kHq, a.Hkv = 1, a.Sq = Sq, a.Sk = Sk, a.D = a.Dv = D;
  a.q = {x.q.data(), 0, int64_t(Sq) * D, D};
  a.k = {x.k.data(), 0, 0, D};
  a.v = {x.v.data(), 0, 0, D};
  a.dout = {x.dout.data(), 0, int64_t(Sq) * D, D};
  a.out = {out.data(), 0, int64_t(Sq) * D, D};
  a.lse = lse.data();
  a.scale = kScale;
  a.band_lo = -kUnbounded;
  a.band_hi = kForm == MaskForm::None ? kUnbounded : kBand;
  if (kForm == MaskForm::Bits) {
    a.block_offsets = offsets.data(), a.block_list = list.data();
    a.block_offsets_t = offsets_t.data(), a.block_list_t = list_t.data();
    a.bit_tiles = x.tile.data();
  }
  if (terms) {
    a.softcap = kCap;
    a.bias = x.bias.data(), a.bias_fp32 = true, a.bias_key = 1;
    a.alibi_slopes = x.slopes.data(), a.alibi_head = 1;
    a.sinks = x.sinks.data();
    a.dropout_seed = &kSeed, a.dropout_threshold = uint32_t(kDropped * 4294967296.0);
    a.dropout_scale = 1 / (1 - kDropped);
    a.dbias = dbias.data(), a.dbias_fp32 = true, a.bias_B = a.bias_H = a.bias_Sq = 1, a.bias_Sk = Sk;
    a.dslopes = dslopes.data(), a.dsinks = dsinks.data();
  }
  a.exponent = exponent.data(), a.delta = delta.data(), a.extents = extents.data();
  a.dq = {dq.data(), 0, int64_t(Sq) * D, D};
  a.dk = {dk.data(), 0, 0, D};
  a.dv = {dv.data(), 0, 0, D};
  launch_attention_forward_sm80<T, kHead, kForm>(a, nullptr);
  launch_attention_backward_sm80<T, kHead, kForm>(a, nullptr);

  const double tolerance = std::is_same_v<T, bf16> ? 0.02 : 0.003;
  std::string error = differs("out", out, x.out, tolerance) + differs("lse", lse, x.lse, 1e-5) +
                      differs("dq", dq, x.dq, tolerance) + differs("dk", dk, x.dk, tolerance) +
                      differs("dv", dv, x.dv, tolerance);
  if (terms) {
    error += differs("dbias", dbias, x.dbias, tolerance) + differs("dslopes", dslopes, x.dslopes, tolerance) +
             differs("dsinks", dsinks, x.dsinks, tolerance);
  }
  return error;
}

}  // namespace

int main(int argc, char** argv) {
  twin::options.seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  host::test("two stages, bits, terms", [] { return run<fp16, 32, MaskForm::Bits>(200, 210, 24, true); });
  host::test("two stages, halves, ranges",
             [] { return run<bf16, 96, MaskForm::Ranges>(140, 140, 96, false); });
  host::test("one stage, plain", [] { return run<bf16, 192, MaskForm::None>(70, 200, 176, false); });
  host::test("single elements", [] { return run<fp16, 32, MaskForm::Bits>(70, 75, 17, false); });
  return host::failures != 0;
}
