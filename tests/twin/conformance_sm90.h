// The part of conformance.cu that needs a Hopper card: mbarrier, TMA, wgmma, setmaxnreg.
#pragma once

#include "host.h"

#if !defined(FASTATTN_HOST_TWIN)
#include <cuda_runtime.h>
#endif

// Matrices of 16-bit elements as tensor maps: 128-byte swizzle, boxes of 64 columns.
inline TensorMap tensor_map(uint16_t* base, int columns, int rows, int box_rows) {
#if defined(FASTATTN_HOST_TWIN)
  return {base, columns, rows, columns, 64, box_rows};
#else
  TensorMap map{};
  void* encode = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
  const cuuint64_t shape[] = {cuuint64_t(columns), cuuint64_t(rows)}, stride[] = {cuuint64_t(columns) * 2};
  const cuuint32_t box[] = {64, cuuint32_t(box_rows)}, step[] = {1, 1};
  reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, base, shape, stride, box, step,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return map;
#endif
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

struct WgmmaSmem {
  uint16_t a[64 * 64], b[64 * 64];
};

// d = 2 a b by warpgroup 1, with k = 64 in four steps, twice; b lies by n or by k.
template <Major kMajorB>
__global__ void __launch_bounds__(256, 1) wgmma_kernel(float* out) {
#if !defined(FASTATTN_NO_SM90)
  auto& smem = shared_storage<WgmmaSmem>();
  for (int i = int(threadIdx.x); i < 64 * 64; i += 256) {
    const int row = i / 64;
    const int col = i % 64;
    smem.a[swizzle_128b(row, col)] = from_float<bf16>(float(small(row * 64 + col))).bits;
    const int b = kMajorB == Major::K ? col * 64 + row : row * 64 + col;  // k * 64 + n
    smem.b[swizzle_128b(row, col)] = from_float<bf16>(float(small(b + 5))).bits;
  }
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<40>();
    return;
  }
  setmaxnreg_inc<232>();
  float d[32];
  wgmma_fence();
  for (int k = 0; k < 8; ++k) {
    const uint32_t step = kMajorB == Major::K ? 32 : 2048;
    wgmma_m64n64k16_bf16<Major::K, kMajorB>(
        d, wgmma_descriptor(smem_address(smem.a) + k % 4 * 32, 0, 1024),
        wgmma_descriptor(smem_address(smem.b) + uint32_t(k % 4) * step, 0, 1024), k > 0);
  }
  wgmma_commit();
  wgmma_wait<0>(d);
  const int tid = int(threadIdx.x) - 128;
  for (int i = 0; i < 32; ++i) {
    const int row = tid / 32 * 16 + tid % 32 / 4 + i / 2 % 2 * 8;
    out[row * 64 + i / 4 * 8 + tid % 4 * 2 + i % 2] = d[i];
  }
#endif
}

template <Major kMajorB>
std::string test_wgmma() {
  Buffer<float> out(std::vector<float>(64 * 64));
  launch(wgmma_kernel<kMajorB>, dim3(1), dim3(256), sizeof(WgmmaSmem), nullptr, out.data());
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch();
  return host::compare(out.values, [](int i) {
    float sum = 0.0f;
    for (int k = 0; k < 64; ++k) sum += float(2 * small(i / 64 * 64 + k) * small(k * 64 + i % 64 + 5));
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
  host::test("wgmma K-major", test_wgmma<Major::K>);
  host::test("wgmma MN-major", test_wgmma<Major::MN>);
}
