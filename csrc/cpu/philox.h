// Dropout bits by counter: Philox4x32-10 (Salmon et al., 2011), key = seed, counter = (b, h, q_pos, k_pos /
// 4), one 32-bit word a key. The same mask on every backend, whatever the tiling.
#pragma once

namespace fastattn {
namespace {

// The multipliers, and the key of each round.
class Philox {
 public:
  explicit Philox(uint64_t seed) {
    for (uint32_t i = 0; i < kRounds; ++i) {
      k0[i] = uint32_t(seed) + i * 0x9e3779b9u;
      k1[i] = uint32_t(seed >> 32) + i * 0xbb67ae85u;
    }
  }

  // Words for four keys of N vectors of queries, a query a lane: four of the first, four of the next. (A core
  // waits for the ten rounds of one, and works on two in the same time.)
  template <int N>
  FASTATTN_INLINE void words(I32 c0, I32 c1, const I32* c2, I32 c3, I32* out) const {
    State state[N];
    for (int n = 0; n < N; ++n) state[n] = State(c0, c1, c2[n], c3);
    for (int i = 0; i < kRounds; ++i) {
      for (int n = 0; n < N; ++n) state[n].round(k0[i], k1[i]);
    }
    for (int n = 0; n < N; ++n) state[n].get(out + 4 * n);
  }

 private:
  static constexpr uint32_t kM0 = 0xd2511f53u, kM1 = 0xcd9e8d57u;
  static constexpr int kRounds = 10;

#ifdef FASTATTN_HAS_LOW_WORDS
  // Even and odd lanes apart, as their products are: two operations a product, where putting both words of
  // each back into lanes takes five more.
  struct State {
    LowWords even[4], odd[4];

    State() = default;
    FASTATTN_INLINE State(I32 c0, I32 c1, I32 c2, I32 c3)
        : even{even_words(c0), even_words(c1), even_words(c2), even_words(c3)},
          odd{odd_words(c0), odd_words(c1), odd_words(c2), odd_words(c3)} {}

    FASTATTN_INLINE void round(uint32_t k0, uint32_t k1) { round(even, k0, k1), round(odd, k0, k1); }
    FASTATTN_INLINE void get(I32* out) const {
      for (int i = 0; i < 4; ++i) out[i] = join_words(even[i], odd[i]);
    }

   private:
    static FASTATTN_INLINE LowWords every(uint32_t word) { return even_words(splat_int(int32_t(word))); }
    static FASTATTN_INLINE void round(LowWords* c, uint32_t k0, uint32_t k1) {
      const LowWords p0 = multiply(c[0], every(kM0)), p1 = multiply(c[2], every(kM1));
      c[0] = xor3(high_word(p1), c[1], every(k0));
      c[1] = p1;
      c[2] = xor3(high_word(p0), c[3], every(k1));
      c[3] = p0;
    }
  };
#else
  struct State {
    I32 c[4];

    State() = default;
    FASTATTN_INLINE State(I32 c0, I32 c1, I32 c2, I32 c3) : c{c0, c1, c2, c3} {}

    FASTATTN_INLINE void round(uint32_t k0, uint32_t k1) {
      I32 high0, low0, high1, low1;
      multiply_wide(c[0], kM0, &high0, &low0);
      multiply_wide(c[2], kM1, &high1, &low1);
      c[0] = high1 ^ c[1] ^ splat_int(int32_t(k0));
      c[1] = low1;
      c[2] = high0 ^ c[3] ^ splat_int(int32_t(k1));
      c[3] = low0;
    }
    FASTATTN_INLINE void get(I32* out) const {
      for (int i = 0; i < 4; ++i) out[i] = c[i];
    }
  };
#endif

  uint32_t k0[kRounds], k1[kRounds];
};

}  // namespace
}  // namespace fastattn
