// The part of conformance.cu that needs a Hopper card: mbarrier, TMA, wgmma, setmaxnreg.
#pragma once

#include "host.h"

// Matrices of 16-bit elements as tensor maps: boxes of 64 columns, 128-byte swizzle.
inline TensorMap tensor_map(const uint16_t* base, int columns, int rows, int box_rows) {
  TensorMap map{};
  const TensorSpec spec{base,
                        true,
                        2,
                        {uint64_t(columns), uint64_t(rows)},
                        {uint64_t(columns) * 2},
                        {64, uint32_t(box_rows)},
                        Swizzle::B128};
  if (const char* reason = make_tensor_map(map, spec)) host::report("tensor_map", reason);
  return map;
}

// On other cards these kernels are empty and are not started.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTATTN_NO_SM90
#endif

struct RingSmem {
  int box[2][32];
  uint64_t full[2], empty[2];
};

// A ring of two boxes: warp 0 fills, warp 1 reads; phases wrap several times.
__global__ void mbarrier_kernel(int* out, int rounds) {
#if !defined(FASTATTN_NO_SM90)
  auto& smem = shared_storage<RingSmem>();
  const int lane = int(threadIdx.x) % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(&smem.full[i], 32);
      mbarrier_init(&smem.empty[i], 32);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  for (int round = 0; round < rounds; ++round) {
    const int stage = round % 2;
    const int parity = round / 2 % 2;
    if (threadIdx.x < 32) {
      mbarrier_wait(&smem.empty[stage], parity ^ 1);
      smem.box[stage][lane] = round * 100 + lane;
      mbarrier_arrive(&smem.full[stage]);
    } else {
      mbarrier_wait(&smem.full[stage], parity);
      out[round * 32 + lane] = smem.box[stage][31 - lane];
      mbarrier_arrive(&smem.empty[stage]);
    }
  }
#endif
}

inline std::string test_mbarrier() {
  const int rounds = 9;
  Buffer<int> out(std::vector<int>(rounds * 32));
  launch(mbarrier_kernel, dim3(1), dim3(64), sizeof(RingSmem), nullptr, out.data(), rounds);
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch();
  return host::compare(out.values, [](int i) { return i / 32 * 100 + 31 - i % 32; });
}

struct TmaSmem {
  uint16_t tile[2][64 * 64];
  uint64_t full;
};

// Two boxes of a 100 x 80 matrix, one half outside it, land swizzled on one barrier; one goes back to `copy`.
__global__ void tma_kernel(const __grid_constant__ TensorMap from, const __grid_constant__ TensorMap to,
                           uint16_t* out) {
#if !defined(FASTATTN_NO_SM90)
  auto& smem = shared_storage<TmaSmem>();
  if (threadIdx.x == 0) {
    mbarrier_init(&smem.full, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect_tx(&smem.full, 2 * 64 * 64 * 2);
    tma_load_2d(smem.tile[0], from, &smem.full, 0, 0);
    tma_load_2d(smem.tile[1], from, &smem.full, 64, 60);
  }
  mbarrier_wait(&smem.full, 0);
  for (int i = int(threadIdx.x); i < 2 * 64 * 64; i += 128) {
    out[i] = smem.tile[i / 4096][swizzle_128b(i / 64 % 64, i % 64)];
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < 64 * 64; i += 128) {
    smem.tile[0][swizzle_128b(i / 64, i % 64)] = uint16_t(i + 1);
  }
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store_2d(to, smem.tile[0], 64, 32);
    bulk_commit();
    bulk_wait<0>();
  }
#endif
}

inline std::string test_tma() {
  const int columns = 80, rows = 100;
  std::vector<uint16_t> x(size_t(columns * rows));
  for (size_t i = 0; i < x.size(); ++i) x[i] = uint16_t(i);
  Buffer<uint16_t> in(x), copy(std::vector<uint16_t>(x.size())), out(std::vector<uint16_t>(2 * 64 * 64));
  const TensorMap from = tensor_map(in.data(), columns, rows, 64),
                  to = tensor_map(copy.data(), columns, rows, 64);
  launch(tma_kernel, dim3(1), dim3(128), sizeof(TmaSmem), nullptr, from, to, out.data());
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch(), copy.fetch();
  const std::string loaded = host::compare(out.values, [&](int i) {
    const int row = i / 64 % 64 + i / 4096 * 60, col = i % 64 + i / 4096 * 64;
    return row < rows && col < columns ? uint16_t(row * columns + col) : uint16_t(0);
  });
  if (!loaded.empty()) return "load " + loaded;
  return host::compare(copy.values, [&](int i) {
    const int row = i / columns - 32, col = i % columns - 64;
    return row >= 0 && row < 64 && col >= 0 && col < 64 ? uint16_t(row * 64 + col + 1) : uint16_t(0);
  });
}

// A tile of 16-bit elements in rows of the swizzle's lines; one of kColumns columns is panels of such rows.
template <Swizzle kSwizzle>
FASTATTN_HOST_DEVICE constexpr int swizzled_index(int element) {
  const int chunks = int(kSwizzle) / 16;
  return element ^ (element / 64 & (chunks - 1)) * 8;
}
template <Swizzle kSwizzle, int kRows>
FASTATTN_HOST_DEVICE constexpr int panel_index(int row, int col) {
  const int line = int(kSwizzle) / 2;
  return col / line * kRows * line + swizzled_index<kSwizzle>(row * line + col % line);
}

// A box of 16 x 6 x 2 of a [3, 7, 40] tensor whose rows lie apart, over its upper corner, and of its middle
// along two batches of a [2, 3, 7, 40] one; rows of 32 bytes and of 64. And 64 bytes as they lie.
struct BoxSmem {
  alignas(1024) uint16_t three[2 * 6 * 16], four[2 * 2 * 4 * 32];
  alignas(16) uint16_t plain[32];
  uint64_t full;
};
constexpr int kBoxBytes = (2 * 6 * 16 + 2 * 2 * 4 * 32 + 32) * 2;

__global__ void box_kernel(const __grid_constant__ TensorMap three, const __grid_constant__ TensorMap four,
                           const uint16_t* x, uint16_t* out) {
#if !defined(FASTATTN_NO_SM90)
  auto& smem = shared_storage<BoxSmem>();
  if (threadIdx.x == 0) {
    mbarrier_init(&smem.full, 1);
    fence_mbarrier_init();
    tma_prefetch(three);
    mbarrier_arrive_expect_tx(&smem.full, kBoxBytes);
    tma_load_3d(smem.three, three, &smem.full, 32, -2, 2);
    tma_load_4d(smem.four, four, &smem.full, 4, 2, 1, 0);
    bulk_load(smem.plain, x + 8, 64, &smem.full);
  }
  __syncthreads();
  mbarrier_wait(&smem.full, 0);
  for (int i = int(threadIdx.x); i < 192; i += 32) out[i] = smem.three[swizzled_index<Swizzle::B32>(i)];
  for (int i = int(threadIdx.x); i < 512; i += 32) out[192 + i] = smem.four[swizzled_index<Swizzle::B64>(i)];
  out[704 + threadIdx.x] = smem.plain[threadIdx.x];
#endif
}

inline std::string test_boxes() {
  // Rows of 40 lie 48 apart, matrices 7 * 48, batches 3 * 7 * 48.
  std::vector<uint16_t> x(2 * 3 * 7 * 48);
  for (size_t i = 0; i < x.size(); ++i) x[i] = uint16_t(i + 1);
  Buffer<uint16_t> in(x), out(std::vector<uint16_t>(736));
  TensorMap three{}, four{};
  const char* refused =
      make_tensor_map(three, {in.data(), false, 3, {40, 7, 3}, {96, 7 * 96}, {16, 6, 2}, Swizzle::B32});
  if (refused) return refused;
  refused = make_tensor_map(
      four, {in.data(), false, 4, {40, 7, 3, 2}, {96, 7 * 96, 21 * 96}, {32, 4, 2, 2}, Swizzle::B64});
  if (refused) return refused;
  if (!make_tensor_map(four, {in.data() + 1, false, 2, {40, 7}, {96}, {32, 4}, Swizzle::B64}))
    return "misaligned";
  make_tensor_map(four,
                  {in.data(), false, 4, {40, 7, 3, 2}, {96, 7 * 96, 21 * 96}, {32, 4, 2, 2}, Swizzle::B64});
  launch(box_kernel, dim3(1), dim3(32), sizeof(BoxSmem), nullptr, three, four, in.data(), out.data());
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch();
  return host::compare(out.values, [&](int i) {
    if (i >= 704) return uint16_t(i - 704 + 9);
    const bool is_three = i < 192;
    const int at = is_three ? i : i - 192, width = is_three ? 16 : 32, height = is_three ? 6 : 4;
    const int x = at % width + (is_three ? 32 : 4), y = at / width % height + (is_three ? -2 : 2);
    const int z = is_three ? at / (width * height) + 2 : at / (width * height) % 2 + 1;
    const int w = is_three ? 0 : at / (width * height * 2);
    const bool inside = x < 40 && y >= 0 && y < 7 && z < 3;
    return inside ? uint16_t(((w * 3 + z) * 7 + y) * 48 + x + 1) : uint16_t(0);
  });
}

// Consumers in turn: warp 1 may go on once warp 0 has arrived, and the other way round.
__global__ void baton_kernel(int* out, int rounds) {
#if !defined(FASTATTN_NO_SM90)
  auto& turns = shared_storage<int>();
  const int warp = int(threadIdx.x) / 32;
  if (threadIdx.x == 0) turns = 0;
  __syncthreads();
  if (warp == 1) named_barrier_arrive(1, 64);
  for (int round = 0; round < rounds; ++round) {
    named_barrier_sync(1 + warp, 64);
    const int turn = turns;
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      out[turn] = warp * 100 + round;
      turns = turn + 1;
    }
    named_barrier_arrive(1 + (warp ^ 1), 64);
  }
  if (warp == 0) named_barrier_sync(1, 64);
#endif
}

inline std::string test_baton() {
  Buffer<int> out(std::vector<int>(10));
  launch(baton_kernel, dim3(1), dim3(64), sizeof(int), nullptr, out.data(), 5);
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch();
  return host::compare(out.values, [](int i) { return i % 2 * 100 + i / 2; });
}

template <int kN>
struct WgmmaSmem {
  alignas(1024) uint16_t a[64 * 64];
  alignas(1024) uint16_t b[64 * kN];
};

// d = 2 a b by warpgroup 1, k = 64 in four steps, twice: once a from shared memory, once from registers. b
// lies by n or by k.
template <class T, int kN, Major kMajorB, Swizzle kSwizzle>
__global__ void __launch_bounds__(256, 1) wgmma_kernel(float* out) {
#if !defined(FASTATTN_NO_SM90)
  auto& smem = shared_storage<WgmmaSmem<kN>>();
  constexpr int kLine = int(kSwizzle) / 2;
  for (int i = int(threadIdx.x); i < 64 * 64; i += 256) {
    smem.a[panel_index<kSwizzle, 64>(i / 64, i % 64)] = from_float<T>(float(small(i))).bits;
  }
  for (int i = int(threadIdx.x); i < 64 * kN; i += 256) {
    const int k = i / kN, n = i % kN;
    const int at = kMajorB == Major::K ? panel_index<kSwizzle, kN>(n, k) : panel_index<kSwizzle, 64>(k, n);
    smem.b[at] = from_float<T>(float(small(i + 5))).bits;
  }
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<40>();
    return;
  }
  setmaxnreg_inc<232>();
  const int tid = int(threadIdx.x) - 128;
  float d[kN / 2];
  uint32_t a[4][4];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int row = tid / 32 * 16 + tid % 32 / 4 + i % 2 * 8, k = i / 4 * 16 + tid % 4 * 2 + i % 4 / 2 * 8;
    a[i / 4][i % 4] = pack<T>(float(small(row * 64 + k)), float(small(row * 64 + k + 1)));
  }
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const uint32_t a_at = smem_address(smem.a) + uint32_t(k * 16 / kLine * 64 * kLine + k * 16 % kLine) * 2;
    const uint32_t b_at = smem_address(smem.b) +
                          (kMajorB == Major::K ? uint32_t(k * 16 / kLine * kN * kLine + k * 16 % kLine) * 2
                                               : uint32_t(k * 16 * kLine) * 2);
    const uint64_t b = wgmma_descriptor<kSwizzle>(b_at, 64 * kLine * 2, 8 * kLine * 2);
    wgmma_ss<T, kN, Major::K, kMajorB>(d, wgmma_descriptor<kSwizzle>(a_at, 0, 8 * kLine * 2), b, k > 0);
    wgmma_rs<T, kN, kMajorB>(d, a[k], b, true);
  }
  wgmma_commit();
  wgmma_wait<0>(d);
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) {
    const int row = tid / 32 * 16 + tid % 32 / 4 + i / 2 % 2 * 8;
    out[row * kN + i / 4 * 8 + tid % 4 * 2 + i % 2] = d[i];
  }
#endif
}

template <class T, int kN, Major kMajorB, Swizzle kSwizzle>
std::string test_wgmma() {
  Buffer<float> out(std::vector<float>(64 * kN));
  launch(wgmma_kernel<T, kN, kMajorB, kSwizzle>, dim3(1), dim3(256), sizeof(WgmmaSmem<kN>), nullptr,
         out.data());
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch();
  return host::compare(out.values, [](int i) {
    float sum = 0.0f;
    for (int k = 0; k < 64; ++k) sum += float(2 * small(i / kN * 64 + k) * small(k * kN + i % kN + 5));
    return sum;
  });
}

inline void test_sm90() {
#if !defined(FASTATTN_HOST_TWIN)
  cudaDeviceProp card{};
  cudaGetDeviceProperties(&card, 0);
  if (card.major != 9) return;
#endif
  host::test("mbarrier", test_mbarrier);
  host::test("tma", test_tma);
  host::test("boxes of three and four dimensions", test_boxes);
  host::test("baton", test_baton);
  host::test("wgmma K-major 64", test_wgmma<bf16, 64, Major::K, Swizzle::B128>);
  host::test("wgmma K-major 128 fp16", test_wgmma<fp16, 128, Major::K, Swizzle::B128>);
  host::test("wgmma K-major 64-byte lines", test_wgmma<bf16, 128, Major::K, Swizzle::B64>);
  host::test("wgmma K-major 32-byte lines", test_wgmma<fp16, 64, Major::K, Swizzle::B32>);
  host::test("wgmma MN-major 64 fp16", test_wgmma<fp16, 64, Major::MN, Swizzle::B128>);
  host::test("wgmma MN-major 128", test_wgmma<bf16, 128, Major::MN, Swizzle::B128>);
  host::test("wgmma MN-major 256", test_wgmma<bf16, 256, Major::MN, Swizzle::B128>);
  host::test("wgmma MN-major 256 fp16", test_wgmma<fp16, 256, Major::MN, Swizzle::B128>);
  host::test("wgmma MN-major 64-byte lines", test_wgmma<bf16, 64, Major::MN, Swizzle::B64>);
}
