// Softmax of rows: y = exp(s - max s) / sum, s = scale * x + bias over the visible columns, 0 elsewhere.
//
// Four regimes, chosen by width and strides:
//   lanes     up to 128 columns a row to 8 lanes, up to 1024 to a warp; the row stays in registers
//   block     up to 16384 columns; the row stays in registers
//   looped    any width: the online softmax of Milakov and Gimelshein (a maximum and a sum a thread, merged),
//   then
//             the row is read again
//   columns   rows whose elements are not adjacent: a lane a row, so that lanes read neighbours where the
//   rows are
//
// A row of which nothing is visible is 0; visible columns that are all -inf give NaN, as in torch.
#pragma once

#include "rows.cuh"

namespace fastattn::cuda {

// The scores of one row, -inf where hidden.
template <class X, int kLanes>
class SoftmaxScores {
 public:
  static constexpr int kPack = kPackOf<X>;

  __device__ __forceinline__ SoftmaxScores(const SoftmaxCall& a, int64_t row)
      : a_(a),
        x_(static_cast<const X*>(a.x.data) + a.grid.offset(a.x.stride, row)),
        mask_(static_cast<const uint8_t*>(a.mask.data) +
              (a.mask.data ? a.grid.offset(a.mask.stride, row) : 0)),
        bias_(a.bias.data ? a.grid.offset(a.bias.stride, row) : 0),
        seen_(a.causal ? int(smaller(row % a.grid.size[a.grid.dims - 1] + 1, a.width)) : int(a.width)) {}

  __device__ __forceinline__ int seen() const { return seen_; }
  // Whether a column that this thread has loaded was visible.
  __device__ __forceinline__ bool visible() const { return visible_; }

  template <int kPacks>
  __device__ __forceinline__ void load(const Team<kLanes>& team, int first, float (&s)[kPacks][kPack]) {
    load_packs(team, x_, a_.x.aligned, first, seen_, s);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) s[p][e] *= a_.scale;
    }
    uint32_t hidden[(kPacks * kPack + 31) / 32] = {};
    if (a_.bias.data) {
      with_storage(a_.bias, bias_, [&](const auto* bias) {
        float b[kPacks][kPack];
        load_packs(team, bias, a_.bias.aligned, first, seen_, b);
#pragma unroll
        for (int p = 0; p < kPacks; ++p) {
#pragma unroll
          for (int e = 0; e < kPack; ++e) {
            s[p][e] += b[p][e];
            hidden[(p * kPack + e) / 32] |= uint32_t(b[p][e] < -kLargest) << (p * kPack + e) % 32;
          }
        }
      });
    }
    if (a_.mask.data) {
      float shown[kPacks][kPack];
      load_packs(team, mask_, a_.mask.aligned, first, seen_, shown);
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          hidden[(p * kPack + e) / 32] |= uint32_t(shown[p][e] == 0.f) << (p * kPack + e) % 32;
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int column = column_of<kPack>(team, first, p);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        const bool shows = column + e < seen_ && !(hidden[(p * kPack + e) / 32] >> (p * kPack + e) % 32 & 1);
        s[p][e] = shows ? s[p][e] : -infinity();
        visible_ |= shows;
      }
    }
  }

 private:
  const SoftmaxCall& a_;
  const X* x_;
  const uint8_t* mask_;
  int64_t bias_;
  int seen_;
  bool visible_ = false;
};

// e^(x - top). The difference comes first: a product of its own would round where x is large, and overflow
// where x is the lowest number, a common way to write a mask.
__device__ __forceinline__ float weight_of(float x, float top) { return exp2_approx((x - top) * kLog2E); }

// What stands in a row without a score above -inf.
template <int kLanes>
__device__ __forceinline__ float empty_value(Team<kLanes>& team, bool visible) {
  return team.reduce_one(visible ? 1.f : 0.f, Max{}) > 0.f ? not_a_number() : 0.f;
}

template <class X, class Out, int kLanes>
__global__ void __launch_bounds__(kLanes == 0 ? kMaxThreads : kWarpBlock) softmax_rows(SoftmaxCall a) {
  constexpr int kPack = kPackOf<X>, kPacks = elements_of(kLanes) / kPack;
  Team<kLanes> team;
  const int64_t row = int64_t(blockIdx.x) * team.count() + team.index(), last = a.grid.rows - 1;
  SoftmaxScores<X, kLanes> scores(a,
                                  smaller(row, last));  // the last block's idle teams repeat a row, unwritten

  float s[kPacks][kPack];
  scores.load(team, 0, s);
  float top = -infinity();
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) top = fmaxf(top, s[p][e]);
  }
  top = team.reduce_one(top, Max{});
  const bool empty = !(top > -infinity());
  const float pivot = empty ? 0.f : top;
  float sum = 0.f;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      s[p][e] = weight_of(s[p][e], pivot);
      sum += s[p][e];
    }
  }
  const float inverse = 1.f / team.reduce_one(sum, Add{});
  const float fill = team.some(empty) ? empty_value(team, scores.visible()) : 0.f;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int e = 0; e < kPack; ++e) s[p][e] = empty ? fill : s[p][e] * inverse;
  }
  Out* out = static_cast<Out*>(a.out.data) + a.grid.offset(a.out.stride, smaller(row, last));
  store_packs(team, out, a.out.aligned, 0, row <= last ? int(a.width) : 0, s);
}

// One block a row of any width.
constexpr int kSoftmaxLoopThreads = 512, kSoftmaxLoopElements = 8;

template <class X, class Out>
__global__ void __launch_bounds__(kSoftmaxLoopThreads, 2) softmax_looped(SoftmaxCall a) {
  constexpr int kPack = kPackOf<X>, kPacks = kSoftmaxLoopElements / kPack;
  Team<0> team;
  const int64_t row = blockIdx.x;
  const int width = int(a.width), step = team.threads() * kSoftmaxLoopElements;
  SoftmaxScores<X, 0> scores(a, row);
  float s[kPacks][kPack];

  // The weights of a thread's columns so far, relative to its own largest score.
  float top = -infinity(), sum = 0.f;
  for (int first = 0; first < scores.seen(); first += step) {
    scores.load(team, first, s);
    float higher = top;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) higher = fmaxf(higher, s[p][e]);
    }
    const float pivot = higher > -infinity() ? higher : 0.f;
    sum *= weight_of(top, pivot);
    top = higher;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
#pragma unroll
      for (int e = 0; e < kPack; ++e) sum += weight_of(s[p][e], pivot);
    }
  }
  const float row_top = team.reduce_one(top, Max{});
  const bool empty = !(row_top > -infinity());
  const float pivot = empty ? 0.f : row_top;
  const float inverse = 1.f / team.reduce_one(sum * weight_of(top, pivot), Add{});
  const float fill = empty ? empty_value(team, scores.visible()) : 0.f;
  Out* out = static_cast<Out*>(a.out.data) + a.grid.offset(a.out.stride, row);
  for (int first = 0; first < width; first += step) {
    if (!empty && first < scores.seen()) {
      scores.load(team, first, s);
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) s[p][e] = weight_of(s[p][e], pivot) * inverse;
      }
    } else {
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
#pragma unroll
        for (int e = 0; e < kPack; ++e) s[p][e] = fill;
      }
    }
    store_packs(team, out, a.out.aligned, first, width, s);
  }
}

// 32 rows a block, a lane each, and the columns dealt to its warps by turns.
constexpr int kColumnWarps = 8;

struct SoftmaxColumnsShared {
  float top[kColumnWarps][32], sum[kColumnWarps][32];
  int visible[kColumnWarps][32];
};

template <class X, class Out>
__global__ void __launch_bounds__(kColumnWarps * 32) softmax_columns(SoftmaxCall a) {
  auto& shared = shared_storage<SoftmaxColumnsShared>();
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32, width = int(a.width);
  const int64_t given = int64_t(blockIdx.x) * 32 + lane, row = smaller(given, a.grid.rows - 1);
  const X* x = static_cast<const X*>(a.x.data) + a.grid.offset(a.x.stride, row);
  const auto* mask =
      static_cast<const uint8_t*>(a.mask.data) + (a.mask.data ? a.grid.offset(a.mask.stride, row) : 0);
  const int64_t bias_row = a.bias.data ? a.grid.offset(a.bias.stride, row) : 0;
  bool visible = false;
  const auto score = [&](int column) -> float {
    float s = to_float(x[column * a.x.column]) * a.scale;
    bool shows = !a.mask.data || mask[column] != 0;
    if (a.bias.data) {
      with_storage(a.bias, bias_row + column, [&](const auto* bias) {
        s += to_float(*bias);
        shows = shows && !(to_float(*bias) < -kLargest);
      });
    }
    visible |= shows;
    return shows ? s : -infinity();
  };

  float top = -infinity(), sum = 0.f;
#pragma unroll 4
  for (int column = warp; column < width; column += kColumnWarps) {
    const float s = score(column), higher = fmaxf(top, s);
    const float pivot = higher > -infinity() ? higher : 0.f;
    sum = sum * weight_of(top, pivot) + weight_of(s, pivot);
    top = higher;
  }
  shared.top[warp][lane] = top, shared.sum[warp][lane] = sum, shared.visible[warp][lane] = visible;
  __syncthreads();
  float row_top = -infinity(), total = 0.f;
  for (int w = 0; w < kColumnWarps; ++w) {
    row_top = fmaxf(row_top, shared.top[w][lane]);
    visible |= shared.visible[w][lane] != 0;
  }
  const bool empty = !(row_top > -infinity());
  const float pivot = empty ? 0.f : row_top;
  for (int w = 0; w < kColumnWarps; ++w) total += shared.sum[w][lane] * weight_of(shared.top[w][lane], pivot);
  if (given != row) return;
  const float inverse = 1.f / total, fill = visible ? not_a_number() : 0.f;
  Out* out = static_cast<Out*>(a.out.data) + a.grid.offset(a.out.stride, row);
#pragma unroll 4
  for (int column = warp; column < width; column += kColumnWarps) {
    const float y = empty ? fill : weight_of(score(column), pivot) * inverse;
    out[column * a.out.column] = from_float<Out>(y);
  }
}

template <class X, class Out>
int softmax(const SoftmaxCall& a, void* stream) {
  const int64_t rows = a.grid.rows;
  if (a.x.column != 1 || a.out.column != 1) {
    return start(softmax_columns<X, Out>, (rows + 31) / 32, kColumnWarps * 32, sizeof(SoftmaxColumnsShared),
                 stream, a);
  }
  const bool exchange = staged(a.x) || staged(a.out) || staged(a.mask) || staged(a.bias);
  const auto by_warps = [&](auto kernel, int lanes) {
    const int teams = kWarpBlock / lanes;
    return start(kernel, (rows + teams - 1) / teams, kWarpBlock, row_shared_bytes(kWarpBlock, exchange),
                 stream, a);
  };
  if (a.width <= width_of(8)) return by_warps(softmax_rows<X, Out, 8>, 8);
  if (a.width <= width_of(32)) return by_warps(softmax_rows<X, Out, 32>, 32);
  if (a.width <= width_of(0)) {
    const int threads = block_threads(a.width, elements_of(0));
    return start(softmax_rows<X, Out, 0>, rows, threads, row_shared_bytes(threads, exchange), stream, a);
  }
  return start(softmax_looped<X, Out>, rows, kSoftmaxLoopThreads,
               row_shared_bytes(kSoftmaxLoopThreads, exchange), stream, a);
}

}  // namespace fastattn::cuda
