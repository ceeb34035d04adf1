// What the row kernels share: the threads of a row and their reductions, packs of a row in registers,
// launches.
//
// A row belongs to a team: 8 or 32 lanes of a warp, or a block. Thread t holds pack p of the row, the columns
// from (p * threads + t) * kPack on, where a pack is 16 bytes of the tensor that decides. Rows whose packs
// are aligned are read a pack at a time; others go by single elements, adjacent lanes adjacent elements, and
// change hands in shared memory. Either way a thread gets the same columns, so alignment does not change a
// result.
//
// A reduction adds a thread's columns in order, then lanes and warps by a butterfly: its order is a function
// of the width and the dtype, nothing else.
#pragma once

#include "ptx.h"
#include "rows_args.cuh"

namespace fastattn::cuda {

constexpr int kWarpBlock = 128;    // threads of a block whose warps have rows of their own
constexpr int kMaxThreads = 1024;  // of a block that shares a row
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLargest = 3.402823466e38f;

// Columns in a thread's registers. A warp takes twice as many a thread rather than share a row of 1024 with
// others, which costs barriers; a block of 1024 threads leaves 64 registers to each.
FASTATTN_INLINE constexpr int elements_of(int lanes) { return lanes == 32 ? 32 : 16; }
// The longest row that a team of 8 or 32 lanes, or a block (0), holds in registers.
FASTATTN_INLINE constexpr int width_of(int lanes) {
  return (lanes == 0 ? kMaxThreads : lanes) * elements_of(lanes);
}

template <class T>
constexpr int kPackOf = 16 / int(sizeof(T));

__device__ __forceinline__ float infinity() { return from_bits(0x7f800000u); }
__device__ __forceinline__ float not_a_number() { return from_bits(0x7fc00000u); }

struct Add {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
// The larger one; NaN counts as none.
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The start of every row kernel's shared memory; the lanes' exchange follows where rows are not aligned.
struct RowShared {
  float slots[2][2][32];  // turn, value, warp
};
constexpr int kStageBytes = 32 * 8 * 4;  // a warp's packs, at most fp32 by eights

// The threads that share a row: kLanes of a warp, or a block where kLanes is 0.
template <int kLanes>
class Team {
 public:
  static constexpr int kGroup = kLanes == 0 ? 32 : kLanes;  // lanes that exchange elements

  __device__ __forceinline__ Team() : shared_(shared_storage<RowShared>()) {}

  __device__ __forceinline__ int thread() const {
    return kLanes == 0 ? int(threadIdx.x) : int(threadIdx.x) % kLanes;
  }
  __device__ __forceinline__ int threads() const { return kLanes == 0 ? int(blockDim.x) : kLanes; }
  __device__ __forceinline__ int lane() const { return int(threadIdx.x) % kGroup; }
  // The team within its block, and how many there are.
  __device__ __forceinline__ int index() const { return kLanes == 0 ? 0 : int(threadIdx.x) / kGroup; }
  __device__ __forceinline__ int count() const { return kLanes == 0 ? 1 : int(blockDim.x) / kGroup; }
  __device__ __forceinline__ unsigned char* stage() const {
    return reinterpret_cast<unsigned char*>(&shared_ + 1) +
           int(threadIdx.x) / kGroup * (kStageBytes / 32 * kGroup);
  }

  // Whether one of the threads that must go the same way says so: the warp's, or the block's, for which all
  // threads of a row agree already.
  __device__ __forceinline__ bool some(bool predicate) const {
    return kLanes != 0 && kLanes != 32 ? warp_or(predicate) != 0 : predicate;
  }

  // Combines up to two values of every thread; all get the same result. Blocks have a power of two of warps.
  template <int kCount, class Op>
  __device__ __forceinline__ void reduce(float (&value)[kCount], Op op) {
#pragma unroll
    for (int offset = kGroup / 2; offset > 0; offset /= 2) combine(value, op, offset);
    if constexpr (kLanes == 0) {
      // Two sets of slots by turns: who writes one has passed the barrier behind the other's last reading.
      float (&slot)[2][32] = shared_.slots[turn_];
      turn_ ^= 1;
      const int warps = int(blockDim.x) / 32, lane = int(threadIdx.x) % 32;
      if (lane == 0) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) slot[k][threadIdx.x / 32] = value[k];
      }
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kCount; ++k) value[k] = slot[k][lane & (warps - 1)];
      for (int offset = warps / 2; offset > 0; offset /= 2) combine(value, op, offset);
    }
  }
  template <class Op>
  __device__ __forceinline__ float reduce_one(float value, Op op) {
    float one[1] = {value};
    reduce(one, op);
    return one[0];
  }

 private:
  template <int kCount, class Op>
  __device__ __forceinline__ static void combine(float (&value)[kCount], Op op, int offset) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) value[k] = op(value[k], shfl_xor(value[k], offset));
  }

  RowShared& shared_;
  int turn_ = 0;
};

struct alignas(16) FourWords {
  uint32_t word[4];
};
struct alignas(8) TwoWords {
  uint32_t word[2];
};

// kWords words at an address that is a multiple of their bytes, or of 16.
template <int kWords>
__device__ __forceinline__ void load_words(const void* from, uint32_t (&word)[kWords]) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const FourWords four = static_cast<const FourWords*>(from)[i / 4];
      word[i] = four.word[0], word[i + 1] = four.word[1], word[i + 2] = four.word[2],
      word[i + 3] = four.word[3];
    }
  } else if constexpr (kWords == 2) {
    const TwoWords two = *static_cast<const TwoWords*>(from);
    word[0] = two.word[0], word[1] = two.word[1];
  } else {
    static_assert(kWords == 1);
    word[0] = *static_cast<const uint32_t*>(from);
  }
}
template <int kWords>
__device__ __forceinline__ void store_words(const uint32_t (&word)[kWords], void* to) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      static_cast<FourWords*>(to)[i / 4] = {{word[i], word[i + 1], word[i + 2], word[i + 3]}};
    }
  } else {
    static_assert(kWords == 2);
    *static_cast<TwoWords*>(to) = {{word[0], word[1]}};
  }
}

// A mask's byte as a number: 1 where it shows.
__device__ __forceinline__ float to_float(uint8_t byte) { return byte != 0 ? 1.f : 0.f; }

template <class T, int kPack>
__device__ __forceinline__ void unpack(const uint32_t (&word)[kPack * sizeof(T) / 4], float (&x)[kPack]) {
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    if constexpr (sizeof(T) == 4) x[e] = from_bits(word[e]);
    else if constexpr (sizeof(T) == 2) x[e] = to_float(T{uint16_t(word[e / 2] >> e % 2 * 16)});
    else x[e] = to_float(uint8_t(word[e / 4] >> e % 4 * 8));
  }
}
template <class T, int kPack>
__device__ __forceinline__ void pack_up(const float (&x)[kPack], uint32_t (&word)[kPack * sizeof(T) / 4]) {
#pragma unroll
  for (int w = 0; w < int(kPack * sizeof(T) / 4); ++w) {
    if constexpr (sizeof(T) == 4) word[w] = as_bits(x[w]);
    else word[w] = pack<T>(x[2 * w], x[2 * w + 1]);
  }
}

// The columns from `first` on that this thread holds as pack p.
template <int kPack, int kLanes>
__device__ __forceinline__ int column_of(const Team<kLanes>& team, int first, int p) {
  return first + (p * team.threads() + team.thread()) * kPack;
}

// One pack of a row; columns from `limit` on are not read, and come as anything.
template <bool kAligned, int kPack, class T, int kLanes>
__device__ __forceinline__ void load_pack(const Team<kLanes>& team, const T* row, int first, int p, int limit,
                                          float (&x)[kPack]) {
  uint32_t word[kPack * sizeof(T) / 4] = {};
  const int column = column_of<kPack>(team, first, p);
  if constexpr (kAligned) {
    if (column < limit) load_words(row + column, word);
  } else {
    T* stage = reinterpret_cast<T*>(team.stage());
    const int lane = team.lane(), base = column - lane * kPack;
    __syncwarp();
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const int c = e * Team<kLanes>::kGroup + lane;
      stage[c] = base + c < limit ? row[base + c] : T{};
    }
    __syncwarp();
    load_words(stage + lane * kPack, word);
  }
  unpack<T>(word, x);
}

// One pack to a row, up to its `width`.
template <bool kAligned, int kPack, class T, int kLanes>
__device__ __forceinline__ void store_pack(const Team<kLanes>& team, T* row, int first, int p, int width,
                                           const float (&x)[kPack]) {
  uint32_t word[kPack * sizeof(T) / 4];
  pack_up<T>(x, word);
  const int column = column_of<kPack>(team, first, p);
  if constexpr (kAligned) {
    if (column < width) store_words(word, row + column);
  } else {
    T* stage = reinterpret_cast<T*>(team.stage());
    const int lane = team.lane(), base = column - lane * kPack;
    __syncwarp();
    store_words(word, stage + lane * kPack);
    __syncwarp();
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const int c = e * Team<kLanes>::kGroup + lane;
      if (base + c < width) row[base + c] = stage[c];
    }
  }
}

// The branch on alignment stands outside the loop over packs, so that all their loads are under way at once.
template <int kPack, int kPacks, class T, int kLanes>
__device__ __forceinline__ void load_packs(const Team<kLanes>& team, const T* row, bool aligned, int first,
                                           int limit, float (&x)[kPacks][kPack]) {
  if (aligned) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) load_pack<true>(team, row, first, p, limit, x[p]);
  } else {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) load_pack<false>(team, row, first, p, limit, x[p]);
  }
}
template <int kPack, int kPacks, class T, int kLanes>
__device__ __forceinline__ void store_packs(const Team<kLanes>& team, T* row, bool aligned, int first,
                                            int width, const float (&x)[kPacks][kPack]) {
  if (aligned) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) store_pack<true>(team, row, first, p, width, x[p]);
  } else {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) store_pack<false>(team, row, first, p, width, x[p]);
  }
}

// f(typed pointer) for row `row` of a tensor of any storage.
template <class F>
__device__ __forceinline__ void with_storage(const RowTensor& t, int64_t offset, const F& f) {
  switch (t.storage) {
    case Storage::kFloat: return f(static_cast<float*>(t.data) + offset);
    case Storage::kBFloat16: return f(static_cast<bf16*>(t.data) + offset);
    case Storage::kHalf: return f(static_cast<fp16*>(t.data) + offset);
  }
}

// x as a tensor of this storage will hold it.
__device__ __forceinline__ float rounded(float x, Storage storage) {
  if (storage == Storage::kBFloat16) return to_float(from_float<bf16>(x));
  if (storage == Storage::kHalf) return to_float(from_float<fp16>(x));
  return x;
}

__device__ __forceinline__ int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

// The threads of a block that shares rows of `width`, `elements` to a thread: a power of two of warps.
inline int block_threads(int64_t width, int elements) {
  int threads = 128;
  while (threads < kMaxThreads && int64_t(threads) * elements < width) threads *= 2;
  return threads;
}

// Shared memory of a row kernel; the exchange only where an operand needs it.
inline size_t row_shared_bytes(int threads, bool exchange) {
  return sizeof(RowShared) + (exchange ? size_t(threads / 32) * kStageBytes : 0);
}

inline bool staged(const RowOperand& t) { return t.data != nullptr && !t.aligned; }

template <class Call>
int start(void (*kernel)(Call), int64_t blocks, int threads, size_t shared, void* stream, const Call& call) {
  return int(launch(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), shared,
                    static_cast<cudaStream_t>(stream), call));
}

}  // namespace fastattn::cuda
