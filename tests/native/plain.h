// Attention, softmax and the norms as plain loops over doubles: what selftest.cpp holds the kernels against.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace selftest {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One query row against the keys it sees.
struct Row {
  std::vector<double> score, weight;  // weight: of the softmax with the sink in it, before dropout
  double lse;
};

// A call in full precision. Tensors are dense: q [B, Hq, Sq, D], k [B, Hkv, Sk, D], v [B, Hkv, Sk, Dv].
struct Problem {
  int64_t B, Hq, Hkv, Sq, Sk, D, Dv;
  std::vector<double> q, k, v;
  std::vector<char> visible;  // [B, Hq, Sq, Sk]
  double scale, softcap = 0;
  std::vector<double> bias;           // [B, Hq, Sq, Sk], or empty
  std::vector<double> slopes, sinks;  // [Hq], or empty
  std::vector<int32_t> q_pos, k_pos;  // [Sq], [Sk]
  double dropout = 0;
  uint64_t seed = 0;

  int64_t row_index(int64_t b, int64_t h, int64_t i) const { return (b * Hq + h) * Sq + i; }
  int64_t kv_index(int64_t b, int64_t h, int64_t j) const { return (b * Hkv + h / (Hq / Hkv)) * Sk + j; }
  bool sees(int64_t b, int64_t h, int64_t i, int64_t j) const { return visible[row_index(b, h, i) * Sk + j]; }
};

// Philox4x32-10 of Salmon et al.: the word of key position k_pos.
inline uint32_t philox_word(uint64_t seed, uint32_t b, uint32_t h, uint32_t q_pos, uint32_t k_pos) {
  uint32_t c[4] = {b, h, q_pos, k_pos / 4}, key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t x = uint64_t(c[0]) * 0xd2511f53u, y = uint64_t(c[2]) * 0xcd9e8d57u;
    const uint32_t next[4] = {uint32_t(y >> 32) ^ c[1] ^ key[0], uint32_t(y),
                              uint32_t(x >> 32) ^ c[3] ^ key[1], uint32_t(x)};
    for (int n = 0; n < 4; ++n) c[n] = next[n];
    key[0] += 0x9e3779b9u, key[1] += 0xbb67ae85u;
  }
  return c[k_pos % 4];
}

// What dropout multiplies the weight of key j by.
inline double kept(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  if (p.dropout == 0) return 1;
  const uint32_t word =
      philox_word(p.seed, uint32_t(b), uint32_t(h), uint32_t(p.q_pos[i]), uint32_t(p.k_pos[j]));
  return word >= uint32_t(p.dropout * 4294967296.0) ? 1 / (1 - p.dropout) : 0;
}

inline double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t d = 0; d < n; ++d) sum += a[d] * b[d];
  return sum;
}

inline Row forward_row(const Problem& p, int64_t b, int64_t h, int64_t i) {
  Row row{std::vector<double>(p.Sk, -kInfinity), std::vector<double>(p.Sk, 0), -kInfinity};
  const double* q = &p.q[p.row_index(b, h, i) * p.D];
  double top = -kInfinity, sum = 0;
  for (int64_t j = 0; j < p.Sk; ++j) {
    if (!p.sees(b, h, i, j)) continue;
    double s = p.scale * dot(q, &p.k[p.kv_index(b, h, j) * p.D], p.D);
    if (p.softcap != 0) s = p.softcap * std::tanh(s / p.softcap);
    if (!p.bias.empty()) s += p.bias[p.row_index(b, h, i) * p.Sk + j];
    if (!p.slopes.empty()) s -= p.slopes[h] * std::fabs(double(p.q_pos[i]) - p.k_pos[j]);
    row.score[j] = s;
    top = std::fmax(top, s);
  }
  if (top == -kInfinity) return row;
  for (int64_t j = 0; j < p.Sk; ++j) sum += std::exp(row.score[j] - top);
  row.lse = top + std::log(sum);
  const double sink = p.sinks.empty() ? 1 : 1 / (1 + std::exp(p.sinks[h] - row.lse));
  for (int64_t j = 0; j < p.Sk; ++j) row.weight[j] = sink * std::exp(row.score[j] - row.lse);
  return row;
}

struct Forward {
  std::vector<double> out, lse;
};

inline Forward forward(const Problem& p) {
  Forward f{std::vector<double>(p.B * p.Hq * p.Sq * p.Dv, 0), std::vector<double>(p.B * p.Hq * p.Sq)};
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t h = 0; h < p.Hq; ++h) {
      for (int64_t i = 0; i < p.Sq; ++i) {
        const int64_t at = p.row_index(b, h, i);
        const Row row = forward_row(p, b, h, i);
        f.lse[at] = row.lse;
        for (int64_t j = 0; j < p.Sk; ++j) {
          if (row.weight[j] == 0) continue;
          const double w = row.weight[j] * kept(p, b, h, i, j);
          for (int64_t d = 0; d < p.Dv; ++d) f.out[at * p.Dv + d] += w * p.v[p.kv_index(b, h, j) * p.Dv + d];
        }
      }
    }
  }
  return f;
}

struct Backward {
  std::vector<double> dq, dk, dv;
};

inline Backward backward(const Problem& p, const std::vector<double>& dout) {
  Backward g{std::vector<double>(p.q.size(), 0), std::vector<double>(p.k.size(), 0),
             std::vector<double>(p.v.size(), 0)};
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t h = 0; h < p.Hq; ++h) {
      for (int64_t i = 0; i < p.Sq; ++i) {
        const int64_t at = p.row_index(b, h, i);
        const Row row = forward_row(p, b, h, i);
        const double* up = &dout[at * p.Dv];
        std::vector<double> dp(p.Sk, 0);
        double delta = 0;
        for (int64_t j = 0; j < p.Sk; ++j) {
          if (row.weight[j] == 0) continue;
          dp[j] = kept(p, b, h, i, j) * dot(up, &p.v[p.kv_index(b, h, j) * p.Dv], p.Dv);
          delta += row.weight[j] * dp[j];
        }
        for (int64_t j = 0; j < p.Sk; ++j) {
          if (row.weight[j] == 0) continue;
          const int64_t kv = p.kv_index(b, h, j);
          const double w = row.weight[j] * kept(p, b, h, i, j);
          for (int64_t d = 0; d < p.Dv; ++d) g.dv[kv * p.Dv + d] += w * up[d];
          double ds = row.weight[j] * (dp[j] - delta) * p.scale;
          if (p.softcap != 0) {
            const double t = std::tanh(p.scale * dot(&p.q[at * p.D], &p.k[kv * p.D], p.D) / p.softcap);
            ds *= 1 - t * t;
          }
          for (int64_t d = 0; d < p.D; ++d) {
            g.dq[at * p.D + d] += ds * p.k[kv * p.D + d];
            g.dk[kv * p.D + d] += ds * p.q[at * p.D + d];
          }
        }
      }
    }
  }
  return g;
}

}  // namespace selftest
