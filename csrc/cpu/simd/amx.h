// AMX: eight tile registers of up to 16 rows x 64 bytes and the product of bf16 pairs. Includes avx512.h,
// which it adds to.
//
//   TileConfig                   the shape of every register, as the instruction reads it
//   Tiles                        the registers; configured by the constructor, released by the destructor
//   zero<T>, load<T>, store<T>   a whole register; rows lie `row_bytes` apart, at any alignment
//   keep_awake                   a product of whatever the registers hold; changes the first
//   load_free<T>, store_free<T>  the same, of memory that no other code touches up to the next fence
//   load_past<T>                 load_free that leaves the first-level cache as it is
//   multiply<C, A, B>            C[m][n] += sum over k of A[m][2k] B[k][2n] + A[m][2k+1] B[k][2n+1], C fp32,
//                                A and B bf16: a row of B holds two adjacent rows of the matrix, interleaved
//
// With FASTATTN_EMULATE_TILES the registers are arrays and the product is AVX-512 code, so that machines
// without the instructions can execute what is built on them. The emulation computes what the manual writes
// down for TDPBF16PS (two partial sums from 0 over even and odd k, their sum added to C; round to nearest,
// denormals are 0) and stops the process where the processor would fault.
#pragma once

#include "avx512.h"

#define FASTATTN_HAS_TILES 1

namespace fastattn {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

constexpr int kTileRegisters = 8, kTileSide = 16, kTileRowBytes = 64, kTileBytes = 1024;

// All eight registers whole.
inline TileConfig whole_tiles() {
  TileConfig config{};
  config.palette = 1;
  for (int i = 0; i < kTileRegisters; ++i) config.row_bytes[i] = kTileRowBytes, config.rows[i] = kTileSide;
  return config;
}

#ifndef FASTATTN_EMULATE_TILES

// Statements in assembly, since the compiler's intrinsics take no template parameter as a register, and do
// not tell it that a load reads memory. Volatile statements keep their order among each other.
class Tiles {
 public:
  explicit Tiles(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
  ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int T>
  FASTATTN_INLINE void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  template <int T>
  FASTATTN_INLINE void load(const void* p, int64_t row_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
  }
  template <int T>
  FASTATTN_INLINE void store(void* p, int64_t row_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(T) : "memory");
  }
  // Without order among other accesses to memory, so that the vectors around them stay in their registers.
  template <int T>
  FASTATTN_INLINE void load_free(const void* p, int64_t row_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(T));
  }
  template <int T>
  FASTATTN_INLINE void load_past(const void* p, int64_t row_bytes) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(row_bytes), "i"(T));
  }
  template <int T>
  FASTATTN_INLINE void store_free(void* p, int64_t row_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(row_bytes), "i"(T));
  }
  static FASTATTN_INLINE void fence() { __asm__ volatile("" ::: "memory"); }
  // A product that nobody reads: after some 1500 cycles without any, the unit sleeps and takes 700 to wake.
  FASTATTN_INLINE void keep_awake() { zero<0>(), multiply<0, 1, 2>(); }

  template <int C, int A, int B>
  FASTATTN_INLINE void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

#else

class Tiles {
 public:
  explicit Tiles(const TileConfig& config) : config_(config) {
    fault_unless(config.palette == 1 && config.start_row == 0);
    for (int i = 0; i < kTileRegisters; ++i) {
      const bool used = config.rows[i] != 0 && config.row_bytes[i] != 0;
      fault_unless(used || (config.rows[i] == 0 && config.row_bytes[i] == 0));
      fault_unless(config.rows[i] <= kTileSide && config.row_bytes[i] <= kTileRowBytes);
      clear(i);
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  template <int T>
  void zero() {
    fault_unless(config_.rows[T] != 0);
    clear(T);
  }
  template <int T>
  void load(const void* p, int64_t row_bytes) {
    zero<T>();
    for (int m = 0; m < config_.rows[T]; ++m) {
      memcpy(rows_[T][m], (const char*)p + m * row_bytes, config_.row_bytes[T]);
    }
  }
  template <int T>
  void store(void* p, int64_t row_bytes) const {
    fault_unless(config_.rows[T] != 0);
    for (int m = 0; m < config_.rows[T]; ++m) {
      memcpy((char*)p + m * row_bytes, rows_[T][m], config_.row_bytes[T]);
    }
  }
  template <int T>
  void load_free(const void* p, int64_t row_bytes) {
    load<T>(p, row_bytes);
  }
  template <int T>
  void load_past(const void* p, int64_t row_bytes) {
    load<T>(p, row_bytes);
  }
  template <int T>
  void store_free(void* p, int64_t row_bytes) const {
    store<T>(p, row_bytes);
  }
  static void fence() {}
  void keep_awake() { zero<0>(), multiply<0, 1, 2>(); }

  template <int C, int A, int B>
  void multiply() {
    static_assert(C != A && A != B && B != C, "the processor faults on equal registers");
    fault_unless(config_.rows[C] != 0 && config_.rows[A] == config_.rows[C] &&
                 config_.row_bytes[B] == config_.row_bytes[C] &&
                 config_.row_bytes[A] == 4 * config_.rows[B] && config_.row_bytes[C] % 4 == 0);
    multiply_flushed(config_.rows[C], config_.rows[B], rows_[A], rows_[B], rows_[C]);
  }

 private:
  using Row = uint8_t[kTileRowBytes];

  static void fault_unless(bool legal) {
    if (!legal) __builtin_trap();
  }
  void clear(int tile) { memset(rows_[tile], 0, sizeof rows_[tile]); }

  static void set_rounding_control(uint32_t mxcsr) { __asm__ volatile("ldmxcsr %0" ::"m"(mxcsr) : "memory"); }

  // Round to nearest, exceptions masked, denormal inputs and results are 0: the caller's MXCSR has no say.
  static __attribute__((noinline)) void multiply_flushed(int rows, int pairs, const Row* a, const Row* b,
                                                         Row* c) {
    uint32_t mxcsr;
    __asm__ volatile("stmxcsr %0" : "=m"(mxcsr)::"memory");
    set_rounding_control(0x9fc0);
    for (int m = 0; m < rows; ++m) {
      F32 even = ::fastattn::zero(), odd = even;
      for (int k = 0; k < pairs; ++k) {
        int32_t pair;
        memcpy(&pair, a[m] + 4 * k, 4);
        const I32 column = ::fastattn::load((const int32_t*)b[k]);
        even = fma(low_of_pairs(splat_int(pair)), low_of_pairs(column), even);
        odd = fma(high_of_pairs(splat_int(pair)), high_of_pairs(column), odd);
      }
      ::fastattn::store((float*)c[m], ::fastattn::load((const float*)c[m]) + (even + odd));
    }
    set_rounding_control(mxcsr);
  }

  TileConfig config_;
  alignas(64) uint8_t rows_[kTileRegisters][kTileSide][kTileRowBytes];
};

#endif

}  // namespace
}  // namespace fastattn
