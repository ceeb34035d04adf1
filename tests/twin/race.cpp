// Small kernels, right and wrong, that show what the twin itself detects. `race NAME` runs one.
#include <cstdio>

#include "../../csrc/cuda/ptx.h"

using namespace fastattn::cuda;

// Blocks add to the same word, each from one thread.
void add(float* out) {
  if (threadIdx.x == blockIdx.x) *out += 1.0f;
}

// Lanes read what their mirror images wrote.
void mirror(float* out, bool sync) {
  auto& tile = shared_storage<float[32]>();
  tile[threadIdx.x] = float(threadIdx.x);
  if (sync) __syncwarp();
  out[threadIdx.x] = tile[31 - threadIdx.x];
}

void half_a_barrier(float*) {
  if (threadIdx.x < 32) named_barrier_sync(3, 64);
}

void divergent_shuffle(float* out) {
  out[threadIdx.x % 32] = threadIdx.x < 16 ? shfl_xor(1.0f, 1) : float(warp_ballot(true));
}

void unfinished_copy(float* out) {
  auto& tile = shared_storage<float[32]>();
  cp_async_16(&tile[threadIdx.x * 4 % 32], out, true);
  cp_async_commit();
}

void one_past_the_end(float* out) {
  auto& tile = shared_storage<float[32]>();
  if (threadIdx.x == 0) tile[32] = out[0];
}

int main(int argc, char** argv) {
  alignas(16) static float out[32];
  const std::string name = argc > 1 ? argv[1] : "";
  const auto start = [&](auto kernel, unsigned blocks, unsigned threads, auto... rest) {
    launch(kernel, dim3(blocks), dim3(threads), 128, nullptr, out, rest...);
  };
  try {
    if (name == "fine") start(mirror, 1, 32, true);
    else if (name == "blocks") start(add, 4, 32);
    else if (name == "lanes") start(mirror, 1, 32, false);
    else if (name == "deadlock") start(half_a_barrier, 1, 64);
    else if (name == "divergence") start(divergent_shuffle, 1, 32);
    else if (name == "unfinished") start(unfinished_copy, 1, 32);
    else if (name == "bounds") start(one_past_the_end, 1, 32);
    else return 2;
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
  return 0;
}
