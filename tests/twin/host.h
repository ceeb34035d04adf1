// Host code that starts kernels on the twin or on a card: buffers and checks.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "../../csrc/cuda/ptx.h"

namespace host {

// A vector that kernels can read and write through data(); `values` is brought back by fetch().
template <class T>
class Buffer {
 public:
  explicit Buffer(std::vector<T> initial) : values(std::move(initial)) {
#if !defined(FASTATTN_HOST_TWIN)
    cudaMalloc(&device_, values.size() * sizeof(T));
    cudaMemcpy(device_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
#endif
  }
#if defined(FASTATTN_HOST_TWIN)
  T* data() { return values.data(); }
  void fetch() {}
#else
  ~Buffer() { cudaFree(device_); }
  Buffer(const Buffer&) = delete;
  T* data() { return device_; }
  void fetch() { cudaMemcpy(values.data(), device_, values.size() * sizeof(T), cudaMemcpyDeviceToHost); }
#endif

  std::vector<T> values;

 private:
#if !defined(FASTATTN_HOST_TWIN)
  T* device_ = nullptr;
#endif
};

inline int failures = 0;

inline void report(const char* name, const std::string& error) {
  failures += !error.empty();
  std::printf("%s %s\n", name, error.empty() ? "ok" : ("FAILED " + error).c_str());
}

// Waits for the kernels started so far and gives their error, if any.
inline std::string finish() {
#if !defined(FASTATTN_HOST_TWIN)
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) return cudaGetErrorString(error);
#endif
  return "";
}

// Runs one test: `body` gives an error or nothing.
template <class Body>
void test(const char* name, Body body) {
#if defined(FASTATTN_HOST_TWIN)
  try {
    report(name, body());
  } catch (const std::exception& error) {
    report(name, error.what());
  }
#else
  report(name, body());
#endif
}

// The first place where the two differ.
template <class T, class Expected>
std::string compare(const std::vector<T>& values, Expected expected) {
  for (size_t i = 0; i < values.size(); ++i) {
    const T want = expected(int(i));
    if (values[i] == want || (values[i] != values[i] && want != want)) continue;
    return "[" + std::to_string(i) + "]: " + std::to_string(double(values[i])) + ", expected " +
           std::to_string(double(want));
  }
  return "";
}

}  // namespace host
