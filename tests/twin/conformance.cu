// What each PTX wrapper means, in kernels of a few lines, checked on the twin (g++) and on a card (nvcc)
// alike. `conformance [SEED]`; the seed is the twin's schedule.
#include "host.h"

using namespace fastattn::cuda;
using host::Buffer;

// Small whole numbers: exact in every type, and so are their products and sums.
FASTATTN_HOST_DEVICE inline int small(int i) { return (i * 37 + 11) % 17 - 8; }

__global__ void convert_kernel(const float* x, uint32_t* out) {
  const int i = int(threadIdx.x);
  const float a = x[2 * i], b = x[2 * i + 1];
  out[4 * i] = pack<bf16>(a, b);
  out[4 * i + 1] = pack<fp16>(a, b);
  out[4 * i + 2] = from_float<bf16>(a).bits | uint32_t(from_float<fp16>(b).bits) << 16;
  out[4 * i + 3] = __float_as_uint(to_float(bf16{uint16_t(pack<bf16>(a, b))}) +
                                   to_float(fp16{uint16_t(pack<fp16>(b, a))}));
}

std::string test_convert() {
  // Values, the bits of bf16, the bits of fp16: ties to even, overflow, denormals, infinities.
  struct Case {
    float x;
    uint16_t b, h;
  };
  const float infinity = HUGE_VALF;
  const Case cases[] = {
      {1.0f, 0x3f80, 0x3c00},          {-2.5f, 0xc020, 0xc100},    {1.00390625f, 0x3f80, 0x3c04},
      {1.01171875f, 0x3f82, 0x3c0c},   {65520.0f, 0x4780, 0x7c00}, {65519.0f, 0x4780, 0x7bff},
      {5.9604645e-8f, 0x3380, 0x0001}, {infinity, 0x7f80, 0x7c00}, {-infinity, 0xff80, 0xfc00},
      {0.0f, 0x0000, 0x0000},          {3.0e38f, 0x7f62, 0x7c00},  {0.33333334f, 0x3eab, 0x3555}};
  std::vector<float> x(64);
  for (int i = 0; i < 64; ++i) x[i] = cases[i % 12].x;
  Buffer<float> in(x);
  Buffer<uint32_t> out(std::vector<uint32_t>(128));
  launch(convert_kernel, dim3(1), dim3(32), 0, nullptr, in.data(), out.data());
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch();
  std::vector<uint32_t> bits;
  for (int i = 0; i < 32; ++i) bits.insert(bits.end(), &out.values[4 * i], &out.values[4 * i + 3]);
  return host::compare(bits, [&](int i) {
    const Case &a = cases[i / 3 * 2 % 12], &b = cases[(i / 3 * 2 + 1) % 12];
    if (i % 3 == 0) return a.b | uint32_t(b.b) << 16;
    if (i % 3 == 1) return a.h | uint32_t(b.h) << 16;
    return a.b | uint32_t(b.h) << 16;
  });
}

__global__ void fast_math_kernel(float* out) {
  const float x = float(int(threadIdx.x) - 16);
  out[threadIdx.x] = exp2_approx(x);
  out[32 + threadIdx.x] = reciprocal_approx(exp2_approx(x));
  out[64 + threadIdx.x] = exp2_approx(x * 1000.0f);  // from 0 to infinity
}

std::string test_fast_math() {
  Buffer<float> out(std::vector<float>(96));
  launch(fast_math_kernel, dim3(1), dim3(32), 0, nullptr, out.data());
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch();
  return host::compare(out.values, [](int i) {
    const int x = i % 32 - 16;
    if (i < 32) return std::ldexp(1.0f, x);
    if (i < 64) return std::ldexp(1.0f, -x);
    return x < 0 ? 0.0f : x > 0 ? HUGE_VALF : 1.0f;
  });
}

__global__ void shuffle_kernel(int* out) {
  const int lane = int(threadIdx.x);
  out[lane] = shfl_xor(lane * 3, 5);
  out[32 + lane] = shfl(lane * 7, 9);
  out[64 + lane] = int(warp_ballot(lane % 3 == 0));
  out[96 + lane] = warp_any(lane == 31) + 2 * warp_any(lane == 32);
  out[128 + lane] = int(warp_or(1u << (lane % 5)));
  out[160 + lane] = warp_min((lane * 11 + 5) % 32 - 20);
  out[192 + lane] = warp_max((lane * 11 + 5) % 32 - 20);
}

std::string test_shuffle() {
  Buffer<int> out(std::vector<int>(224));
  launch(shuffle_kernel, dim3(1), dim3(32), 0, nullptr, out.data());
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch();
  return host::compare(out.values, [](int i) {
    const int lane = i % 32;
    if (i < 32) return (lane ^ 5) * 3;
    if (i < 64) return 63;
    if (i < 96) return int(0x49249249);
    if (i < 160) return i < 128 ? 1 : 31;
    return i < 192 ? -20 : 11;
  });
}

// An 8 x 8 tile's element names itself: tile * 64 + row * 8 + column.
template <bool kTranspose>
__global__ void ldmatrix_kernel(uint32_t* out) {
  auto& tiles = shared_storage<uint16_t[256]>();
  const int lane = int(threadIdx.x);
  for (int i = lane; i < 256; i += 32) tiles[i] = uint16_t(i);
  __syncwarp();
  uint32_t r[4];
  if (kTranspose) ldmatrix_x4_trans(r, &tiles[lane * 8]);
  else ldmatrix_x4(r, &tiles[lane * 8]);
  for (int t = 0; t < 4; ++t) out[lane * 4 + t] = r[t];
}

template <bool kTranspose>
std::string test_ldmatrix() {
  Buffer<uint32_t> out(std::vector<uint32_t>(128));
  launch(ldmatrix_kernel<kTranspose>, dim3(1), dim3(32), 512, nullptr, out.data());
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch();
  return host::compare(out.values, [](int i) {
    const int lane = i / 4, tile = i % 4 * 64, outer = lane / 4, inner = lane % 4 * 2;
    const int first = kTranspose ? inner * 8 + outer : outer * 8 + inner;
    return uint32_t(tile + first) | uint32_t(tile + first + (kTranspose ? 8 : 1)) << 16;
  });
}

// One product by the lane maps that mma.h states, from matrices of small whole numbers.
template <class T>
__global__ void mma_kernel(float* out) {
  const int lane = int(threadIdx.x), row = lane / 4, pair = lane % 4 * 2;
  const auto a = [](int m, int k) { return float(small(m * 16 + k)); };
  const auto b = [](int k, int n) { return float(small(k * 8 + n + 100)); };
  uint32_t ra[4], rb[2];
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j)
      ra[i + 2 * j] = pack<T>(a(row + 8 * i, pair + 8 * j), a(row + 8 * i, pair + 8 * j + 1));
    rb[i] = pack<T>(b(pair + 8 * i, row), b(pair + 8 * i + 1, row));
  }
  float c[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  mma_m16n8k16<T>(c, ra, rb[0], rb[1]);
  for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 8 + pair + i % 2] = c[i];
}

template <class T>
std::string test_mma() {
  Buffer<float> out(std::vector<float>(128));
  launch(mma_kernel<T>, dim3(1), dim3(32), 0, nullptr, out.data());
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch();
  return host::compare(out.values, [](int i) {
    const int row = i / 8, col = i % 8;
    float sum = float(1 + row / 8 * 2 + col % 2);
    for (int k = 0; k < 16; ++k) sum += float(small(row * 16 + k) * small(k * 8 + col + 100));
    return sum;
  });
}

// Two stages of copies; each group is waited for in turn, and a source that is not valid gives zeros.
__global__ void cp_async_kernel(const float* in, float* out, int rounds) {
  auto& stages = shared_storage<float[2][128]>();
  const int lane = int(threadIdx.x);
  const auto copy = [&](int round) {
    const bool valid = (round + lane) % 3 != 0;
    cp_async_16(&stages[round % 2][lane * 4], in + (valid ? round * 128 + lane * 4 : 0), valid);
    cp_async_commit();
  };
  copy(0);
  for (int round = 0; round < rounds; ++round) {
    if (round + 1 < rounds) {
      copy(round + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    for (int i = 0; i < 4; ++i) {
      const int at = i * 32 + lane;
      out[round * 128 + at] = stages[round % 2][127 - at];
    }
    __syncthreads();
  }
}

std::string test_cp_async() {
  const int rounds = 5;
  std::vector<float> x(rounds * 128);
  for (size_t i = 0; i < x.size(); ++i) x[i] = float(i + 1);
  Buffer<float> in(x), out(std::vector<float>(x.size()));
  launch(cp_async_kernel, dim3(1), dim3(32), 1024, nullptr, in.data(), out.data(), rounds);
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch();
  return host::compare(out.values, [](int i) {
    const int round = i / 128, at = 127 - i % 128;
    return (round + at / 4) % 3 == 0 ? 0.0f : float(round * 128 + at + 1);
  });
}

// Warp 0 fills, the others read: full and empty pass the baton through two named barriers.
__global__ void named_barrier_kernel(int* out, int rounds) {
  auto& box = shared_storage<int[32]>();
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  constexpr int kFull = 1, kEmpty = 2, kThreads = 96;
  for (int round = 0; round < rounds; ++round) {
    if (warp == 0) {
      if (round > 0) named_barrier_sync(kEmpty, kThreads);
      box[lane] = round * 32 + lane;
      named_barrier_arrive(kFull, kThreads);
    } else {
      named_barrier_sync(kFull, kThreads);
      out[(round * 2 + warp - 1) * 32 + lane] = box[31 - lane];
      if (round + 1 < rounds) named_barrier_arrive(kEmpty, kThreads);
    }
  }
}

std::string test_named_barrier() {
  const int rounds = 6;
  Buffer<int> out(std::vector<int>(rounds * 64));
  launch(named_barrier_kernel, dim3(1), dim3(96), 128, nullptr, out.data(), rounds);
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch();
  return host::compare(out.values, [](int i) { return i / 64 * 32 + 31 - i % 32; });
}

__global__ void layout_kernel(int* out) {
  // Every element of a tile has a place of its own, and eight rows of a column lie in eight chunks.
  const auto check = [&](auto columns, int at) {
    constexpr int kColumns = decltype(columns)::value;
    for (int i = int(threadIdx.x); i < 64 * kColumns; i += 32) {
      const int place = swizzle<kColumns>(i / kColumns, i % kColumns);
      if (place >= 0 && place < 64 * kColumns && place % 8 == i % 8) out[at + place] = i;
    }
  };
  check(std::integral_constant<int, 32>(), 0);
  check(std::integral_constant<int, 64>(), 2048);
  check(std::integral_constant<int, 96>(), 6144);
}

std::string test_layout() {
  Buffer<int> out(std::vector<int>(12288, -1));
  launch(layout_kernel, dim3(1), dim3(32), 0, nullptr, out.data());
  if (const std::string error = host::finish(); !error.empty()) return error;
  out.fetch();
  std::vector<int> counts(12288);
  for (int i = 0; i < 12288; ++i) {
    const int base = i < 2048 ? 0 : i < 6144 ? 2048 : 6144;
    if (out.values[i] < 0) return "place " + std::to_string(i) + " holds no element";
    ++counts[base + out.values[i]];
  }
  for (int row = 0; row < 64; row += 8) {
    int chunks[3] = {};
    for (int r = row; r < row + 8; ++r) {
      chunks[0] |= 1 << swizzle<32>(r, 8) / 8 % 8;
      chunks[1] |= 1 << swizzle<64>(r, 8) / 8 % 8;
      chunks[2] |= 1 << swizzle<96>(r, 8) / 8 % 8;
    }
    if ((chunks[0] & chunks[1] & chunks[2]) != 255) return "bank conflicts in a column of eight rows";
  }
  return host::compare(counts, [](int) { return 1; });
}

#include "conformance_sm90.h"

int main(int argc, char** argv) {
#if defined(FASTATTN_HOST_TWIN)
  twin::options.seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
#else
  (void)argc, (void)argv;
#endif
  host::test("convert", test_convert);
  host::test("fast math", test_fast_math);
  host::test("shuffle", test_shuffle);
  host::test("ldmatrix_x4", test_ldmatrix<false>);
  host::test("ldmatrix_x4_trans", test_ldmatrix<true>);
  host::test("mma bf16", test_mma<bf16>);
  host::test("mma fp16", test_mma<fp16>);
  host::test("cp_async", test_cp_async);
  host::test("named barriers", test_named_barrier);
  host::test("layout", test_layout);
  test_sm90();
  return host::failures != 0;
}
