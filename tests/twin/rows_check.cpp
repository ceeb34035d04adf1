// The row kernels on tiny shapes, for the sanitizers: `rows_check SEED`. Every kernel, aligned rows and
// others; a result only has to be finite, test_twin_rows.py compares them.
#include "cuda/norm.cuh"
#include "cuda/norm_backward.cuh"
#include "cuda/softmax.cuh"
#include "cuda/softmax_backward.cuh"
#include "twin/host.h"

using namespace fastattn;
using namespace fastattn::cuda;

constexpr int kRows = 2;

template <class T>
Storage storage = sizeof(T) == 4 ? Storage::kFloat : Storage::kBFloat16;

// Rows whose buffer ends with the last of them.
template <class T>
struct Rows {
  Rows(int rows, int width, float first) : rows(rows), width(width), values(new T[rows * width]) {
    for (int i = 0; i < rows * width; ++i) values[i] = from_float<T>(first + float(i % 23) * 0.125f);
  }
  RowOperand operand(bool aligned) {
    RowOperand t{{values.get(), storage<T>, {width}, 1}, aligned};
    return t;
  }
  std::string check() const {
    for (int i = 0; i < rows * width; ++i) {
      if (!std::isfinite(to_float(values[i]))) return "[" + std::to_string(i) + "] is not finite";
    }
    return "";
  }
  int rows, width;
  std::unique_ptr<T[]> values;
};

RowGrid grid_of(int rows) { return {1, {rows}, rows}; }
RowOperand shared_row(RowOperand t) {
  t.stride[0] = 0;
  return t;
}

template <class X>
std::string softmax_there_and_back(int width) {
  const bool aligned = width % kPackOf<X> == 0;
  Rows<X> x(kRows, width, 1), y(kRows, width, NAN), dy(kRows, width, -1), dx(kRows, width, NAN),
      bias(1, width, 0);
  Rows<float> dbias(1, width, NAN), dots(kRows, 1, NAN), parts(kRows, width, NAN);
  SoftmaxCall a{grid_of(kRows), width, x.operand(aligned), y.operand(aligned), {}, {}, 0.5f, false};
  a.bias = shared_row(bias.operand(aligned));
  softmax<X, X>(a, nullptr);
  SoftmaxBackwardCall b{grid_of(kRows),      width, dy.operand(aligned), y.operand(aligned),
                        dx.operand(aligned), 0.5f};
  b.dots = dots.values.get(), b.parts = parts.values.get(), b.dbias = dbias.operand(true);
  b.shared = kRows, b.split = kRows;
  softmax_backward<X, X>(b, nullptr);
  return y.check() + dx.check() + dbias.check();
}

template <class X>
std::string norm_there_and_back(int width) {
  const bool aligned = width % kPackOf<X> == 0;
  constexpr int groups = 5;
  Rows<X> x(kRows, width, 1), residual(kRows, width, 2), sum(kRows, width, NAN), y(kRows, width, NAN),
      dx(kRows, width, NAN);
  Rows<float> weight(1, width, 1), stats(kNormStats, kRows, NAN), dweight(1, width, NAN),
      dbias(1, width, NAN);
  Rows<float> weight_parts(groups, width, NAN), bias_parts(groups, width, NAN);
  NormCall a{grid_of(kRows),    width, x.operand(aligned), residual.operand(aligned), sum.operand(aligned),
             y.operand(aligned)};
  a.weight = a.bias = shared_row(weight.operand(aligned));
  a.eps = 1e-5f, a.stats = stats.values.get();
  norm<X>(a, nullptr);
  NormBackwardCall b{grid_of(kRows),       width,
                     y.operand(aligned),   sum.operand(aligned),
                     sum.operand(aligned), dx.operand(aligned)};
  b.weight = a.weight, b.stats = a.stats, b.groups = groups;
  b.dweight = dweight.operand(true), b.dbias = dbias.operand(true);
  b.weight_parts = weight_parts.values.get(), b.bias_parts = bias_parts.values.get();
  norm_backward<X>(b, nullptr);
  return sum.check() + y.check() + stats.check() + dx.check() + dweight.check() + dbias.check();
}

int main(int argc, char** argv) {
  twin::options.seed = argc > 1 ? std::atoi(argv[1]) : 0;
  twin::options.stack_bytes = 32 << 10;
  for (int i = 2; i < argc; ++i) {
    const int width = std::atoi(argv[i]);
    host::test((std::string("softmax ") + argv[i]).c_str(),
               [&] { return softmax_there_and_back<bf16>(width); });
    host::test((std::string("norm ") + argv[i]).c_str(), [&] { return norm_there_and_back<bf16>(width); });
  }
  return host::failures;
}
