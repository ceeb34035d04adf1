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
#if FASTATTN_ONLY_D == 0
    case 256: return launch_attention_sm90<T, 256>(args, &next_tile, multiprocessors, nullptr);
#endif
  }
  return "not built";
}

}  // namespace

TWIN_EXPORT const char* attention_args_size(uint64_t size) {
  return size == sizeof(AttentionArgs) ? nullptr : "the test's AttentionArgs has another size";
}

TWIN_EXPORT const char* attention_forward(uint64_t seed, const AttentionArgs* args, int is_bf16,
                                          int multiprocessors) {
  return twin::guarded(seed, [&] {
    const char* error =
        is_bf16 ? forward<bf16>(*args, multiprocessors) : forward<fp16>(*args, multiprocessors);
    if (error) twin::fail(error);
  });
}

// A causal call of one batch and two heads on one key head, S = 300, D = 64: three rounds of both stages, a
// ragged tail, compared with double precision. `attention_sm90 [SEED]`.
int main(int argc, char** argv) {
  constexpr int kHeads = 2, kLength = 300, kD = 64;
  const auto number = [](size_t i) { return float((i * 7919 + i / 64 * 104729) % 2003) / 1001.5f - 1.0f; };
  std::vector<bf16> q(kHeads * kLength * kD), k(kLength * kD), v(kLength * kD), out(q.size(), bf16{0x7fff});
  for (size_t i = 0; i < q.size(); ++i) q[i] = from_float<bf16>(4.0f * number(i));
  for (size_t i = 0; i < k.size(); ++i)
    k[i] = from_float<bf16>(number(i + 11)), v[i] = from_float<bf16>(number(i + 5));
  std::vector<float> lse(kHeads * kLength, NAN);
  AttentionArgs args{};
  args.B = 1, args.Hq = kHeads, args.Hkv = 1, args.Sq = args.Sk = kLength, args.D = args.Dv = kD;
  args.q = {q.data(), kHeads * kLength * kD, kLength * kD, kD};
  args.k = {k.data(), kLength * kD, kLength * kD, kD};
  args.v = {v.data(), kLength * kD, kLength * kD, kD};
  args.out = {out.data(), kHeads * kLength * kD, kLength * kD, kD};
  args.lse = lse.data();
  args.scale = 0.125f;
  args.band_lo = -kUnbounded;
  args.band_hi = 0;
  if (const char* error = attention_forward(argc > 1 ? uint64_t(std::atoi(argv[1])) : 0, &args, 1, 1)) {
    std::printf("%s\n", error);
    return 1;
  }
  for (int row = 0; row < kHeads * kLength; ++row) {
    double sum = 0.0, expected[kD] = {};
    for (int key = 0; key <= row % kLength; ++key) {
      double score = 0.0;
      for (int d = 0; d < kD; ++d)
        score += double(to_float(q[size_t(row * kD + d)])) * to_float(k[size_t(key * kD + d)]);
      const double weight = std::exp(score * 0.125);
      sum += weight;
      for (int d = 0; d < kD; ++d) expected[d] += weight * to_float(v[size_t(key * kD + d)]);
    }
    bool right = std::abs(lse[size_t(row)] - std::log(sum)) < 1e-4;
    for (int d = 0; d < kD; ++d)
      right &= std::abs(to_float(out[size_t(row * kD + d)]) - expected[d] / sum) < 0.01;
    if (!right) {
      std::printf("row %d is wrong: lse %g, expected %g\n", row, double(lse[size_t(row)]), std::log(sum));
      return 1;
    }
  }
  std::printf("attention_sm90 ok\n");
  return 0;
}
