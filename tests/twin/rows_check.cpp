// The row kernels on small shapes against the same formulas in double: for the sanitizers, for many schedules
// and for planted bugs. `rows_check SEED WIDTHxROWS...`, or `far` in place of a shape.
//
// Columns that are 37 apart hold the same numbers, so their results have to be the same bits: threads of a
// row may not disagree about its sums. Nor may alignment change a bit.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>

#include "cuda/norm.cuh"
#include "cuda/norm_backward.cuh"
#include "cuda/softmax.cuh"
#include "cuda/softmax_backward.cuh"
#include "twin/host.h"

using namespace fastattn;
using namespace fastattn::cuda;

namespace {

constexpr int kPeriod = 37;
// The outermost dimension of the rows: bias has a row for each of its indices.
constexpr int kOuter = 2;

// Sums of columns take a block of fibers for every 32, and the sanitizers a long time for a fiber: wider rows
// leave out what narrow ones show as well.
constexpr int kWidestSums = sanitizer::kThread || sanitizer::kAddress ? 64 : 4096;
constexpr int kWidestNormBackward = 16384;

enum class Layout { Rows, Columns, FarRows, FarColumns };  // far: places need 64 bits

template <class T>
constexpr Storage kStorage = sizeof(T) == 4 ? Storage::kFloat : Storage::kBFloat16;

// [rows, width], NaN at first. A page that nobody may touch follows the last element.
template <class T>
class Tensor {
 public:
  Tensor(int rows, int width, Layout layout = Layout::Rows) : rows(rows), width(width) {
    row_ = layout == Layout::Rows ? width : layout == Layout::FarRows ? (int64_t(1) << 31) + 8 : 1;
    column_ = layout == Layout::Columns ? rows : layout == Layout::FarColumns ? (1 << 27) + 1 : 1;
    const auto page = size_t(sysconf(_SC_PAGESIZE));
    const size_t needed = size_t((rows - 1) * row_ + (width - 1) * column_ + 1) * sizeof(T);
    bytes_ = (needed + page - 1) / page * page + page;
    void* start =
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) twin::fail("no room for a tensor");
    start_ = static_cast<char*>(start);
    mprotect(start_ + bytes_ - page, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(start_ + bytes_ - page - needed);
    fill([](int, int) { return NAN; });
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { munmap(start_, bytes_); }

  T& at(int r, int c) const { return data_[r * row_ + c * column_]; }
  double operator()(int r, int c) const { return to_float(at(r, c)); }
  template <class F>
  Tensor& fill(F value) {
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < width; ++c) {
        if constexpr (std::is_same_v<T, uint8_t>) at(r, c) = value(r, c) > 0;
        else at(r, c) = from_float<T>(float(value(r, c)));
      }
    }
    return *this;
  }

  // Over the grid {kOuter, rows / kOuter}; one row of few stands for all with the same outer index.
  RowOperand operand(bool aligned) const {
    const int64_t inner = rows / kOuter * row_;
    RowOperand t{{data_, kStorage<T>, {rows == 1 ? 0 : inner, rows <= kOuter ? 0 : row_}, column_}, aligned};
    if (rows == kOuter) t.stride[0] = row_;
    return t;
  }
  T* data() const { return data_; }

  const int rows, width;

 private:
  int64_t row_, column_;
  size_t bytes_;
  char* start_;
  T* data_;
};

RowGrid grid_of(int rows) { return {2, {kOuter, rows / kOuter}, rows}; }

// In [-1, 1), by the row and by the column modulo the period.
double number(int seed, int row, int column) {
  uint32_t x = uint32_t(seed) * 0x9e3779b9u + uint32_t(row) * 0x85ebca6bu +
               uint32_t(column % kPeriod) * 0xc2b2ae35u + 1;
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return double((x ^ x >> 16) >> 8) / double(1 << 23) - 1;
}

template <class T>
constexpr double kRounding = sizeof(T) == 4 ? 4e-6 : 0.0045;  // relative

bool near(double x, double exact, double tolerance) {
  return x == exact || (std::isnan(x) && std::isnan(exact)) || std::abs(x - exact) <= tolerance;
}

// The first element farther from exact(r, c) than its rounding and `absolute`.
template <class T, class Exact>
std::string differs(const char* name, const Tensor<T>& ours, double absolute, Exact exact) {
  for (int r = 0; r < ours.rows; ++r) {
    for (int c = 0; c < ours.width; ++c) {
      const double want = exact(r, c);
      if (near(ours(r, c), want, kRounding<T> * std::abs(want) + absolute)) continue;
      return std::string(name) + "[" + std::to_string(r) + ", " + std::to_string(c) + "] is " +
             std::to_string(ours(r, c)) + ", not " + std::to_string(want) + "; ";
    }
  }
  return "";
}
template <class T>
std::string not_periodic(const char* name, const Tensor<T>& ours) {
  for (int r = 0; r < ours.rows; ++r) {
    for (int c = kPeriod; c < ours.width; ++c) {
      if (std::memcmp(&ours.at(r, c), &ours.at(r, c % kPeriod), sizeof(T)) != 0)
        return std::string(name) + " has not one result for equal numbers; ";
    }
  }
  return "";
}
template <class T>
std::string not_same(const char* name, const Tensor<T>& a, const Tensor<T>& b) {
  for (int r = 0; r < a.rows; ++r) {
    for (int c = 0; c < a.width; ++c) {
      if (std::memcmp(&a.at(r, c), &b.at(r, c), sizeof(T)) != 0)
        return std::string(name) + " depends on alignment; ";
    }
  }
  return "";
}

enum class Terms { None, MaskAndBias, Causal, Empty };

template <class X>
std::string softmax_forward(int width, int rows, Layout layout, Terms terms, bool aligned, Tensor<X>& y) {
  Tensor<X> x(rows, width, layout), bias(kOuter, width);
  Tensor<uint8_t> mask(rows, width);
  const float scale = 0.75f;
  x.fill([](int r, int c) { return 6 * number(1, r, c); });
  bias.fill([](int r, int c) { return c % kPeriod == 3 ? -INFINITY : number(2, r, c); });
  mask.fill([](int r, int c) { return number(3, r, c) + 0.5; });
  if (terms == Terms::Empty) {  // rows that bias empties; one that mask empties; a visible -inf alone
    bias.fill([](int r, int) { return r == 0 ? 0.0 : -INFINITY; });
    mask.fill([](int r, int c) { return r == 1 ? c % kPeriod == 7 : r != 0 && c % kPeriod != 5; });
    x.fill([](int r, int c) { return r == 1 ? -INFINITY : number(1, r, c); });
  }
  const bool causal = terms == Terms::Causal, biased = terms == Terms::MaskAndBias || terms == Terms::Empty;
  SoftmaxCall a{grid_of(rows), width, x.operand(aligned), y.operand(aligned), {}, {}, scale, causal};
  if (terms != Terms::None) a.mask = mask.operand(aligned);
  if (biased) a.bias = bias.operand(aligned);
  softmax<X, X>(a, nullptr);

  std::vector<double> exact;
  for (int r = 0; r < rows; ++r) {
    double top = -INFINITY, sum = 0;
    bool any = false;
    const auto score = [&](int c) {
      const double b = biased ? bias(r / (rows / kOuter), c) : 0;
      const bool shows =
          (terms == Terms::None || mask.at(r, c)) && b > -INFINITY && !(causal && c > r % (rows / kOuter));
      any |= shows;
      return shows ? x(r, c) * scale + b : -INFINITY;
    };
    for (int c = 0; c < width; ++c) top = std::max(top, score(c));
    for (int c = 0; c < width; ++c) sum += top == -INFINITY ? 0 : std::exp(score(c) - top);
    for (int c = 0; c < width; ++c)
      exact.push_back(top > -INFINITY ? std::exp(score(c) - top) / sum : any ? NAN : 0);
  }
  return differs("y", y, 1e-12, [&](int r, int c) { return exact[size_t(r * width + c)]; }) +
         (causal ? "" : not_periodic("y", y));
}

template <class X>
std::string softmax_backward_of(int width, int rows, Layout layout, int split, bool aligned, Tensor<X>& dx) {
  Tensor<X> y(rows, width, layout), dy(rows, width, layout);
  Tensor<float> dbias(kOuter, width), dots(1, rows), parts(kOuter * split, width);
  y.fill([](int r, int c) { return 1 + number(4, r, c); });
  dy.fill([](int r, int c) { return number(5, r, c); });
  SoftmaxBackwardCall b{};
  b.grid = grid_of(rows), b.width = width, b.scale = 0.5f;
  b.dy = dy.operand(aligned), b.y = y.operand(aligned), b.dx = dx.operand(aligned);
  b.dots = dots.data(), b.parts = parts.data();
  if (width <= kWidestSums) b.dbias = dbias.operand(true);
  b.shared = rows / kOuter, b.split = split;
  softmax_backward<X, X>(b, nullptr);

  std::vector<double> dot(size_t(rows), 0.0), sums(size_t(kOuter * width), 0.0);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < width; ++c) dot[size_t(r)] += y(r, c) * dy(r, c);
    for (int c = 0; c < width; ++c)
      sums[size_t(r / (rows / kOuter) * width + c)] += y(r, c) * (dy(r, c) - dot[size_t(r)]);
  }
  const double size = std::sqrt(width) + 1;  // of a dot
  const auto exact = [&](int r, int c) { return 0.5 * y(r, c) * (dy(r, c) - dot[size_t(r)]); };
  return differs("dx", dx, 2e-6 * size, exact) + not_periodic("dx", dx) +
         differs("dots", dots, 4e-6 * size, [&](int, int r) { return dot[size_t(r)]; }) +
         differs("dbias", dbias, 2e-6 * size * rows,
                 [&](int r, int c) { return width <= kWidestSums ? sums[size_t(r * width + c)] : NAN; });
}

// What the norms know of a row.
struct Moments {
  double mean, rstd;

  template <class T>
  Moments(const Tensor<T>& h, int r, bool rms, double eps) : mean(0) {
    double squares = 0;
    for (int c = 0; c < h.width && !rms; ++c) mean += h(r, c) / h.width;
    for (int c = 0; c < h.width; ++c) squares += (h(r, c) - mean) * (h(r, c) - mean) / h.width;
    rstd = 1 / std::sqrt(squares + eps);
  }
};

template <class X>
std::string norm_forward(int width, int rows, Layout layout, bool rms, bool added, bool aligned,
                         Tensor<X>& y) {
  Tensor<X> x(rows, width, layout), residual(rows, width, layout), sum(rows, width, layout);
  Tensor<float> weight(1, width), bias(1, width), stats(rms ? 1 : kNormStats, rows);
  const float eps = 1e-5f, offset = 0.5f;
  // A mean far from 0, as far as the type allows. The squares of the second row leave float's range.
  const double mean = rms ? 1 : added ? 30 : sizeof(X) == 4 ? 1e4 : 100;
  x.fill([=](int r, int c) { return (mean + number(6, r, c)) * (r == 1 ? 0x1p80 : 1); });
  residual.fill([](int r, int c) { return number(7, r, c); });
  weight.fill([](int, int c) { return number(8, 0, c); });
  bias.fill([](int, int c) { return number(9, 0, c); });
  NormCall a{};
  a.grid = grid_of(rows), a.width = width, a.x = x.operand(aligned), a.y = y.operand(aligned);
  if (added) a.residual = residual.operand(aligned), a.sum = sum.operand(aligned);
  a.weight = weight.operand(aligned), a.weight_offset = offset;
  if (!rms) a.bias = bias.operand(aligned);
  a.eps = eps, a.stats = stats.data(), a.rms = rms;
  norm<X>(a, nullptr);

  const Tensor<X>& h = added ? sum : x;
  std::vector<Moments> moments;
  for (int r = 0; r < rows; ++r) moments.emplace_back(h, r, rms, eps);
  std::string error = differs("y", y, 2e-5, [&](int r, int c) {
    const Moments& m = moments[size_t(r)];
    return (h(r, c) - m.mean) * m.rstd * (weight(0, c) + offset) + (rms ? 0 : bias(0, c));
  });
  error += not_periodic("y", y);
  for (int r = 0; r < rows && added; ++r) {
    for (int c = 0; c < width; ++c) {
      const X want = from_float<X>(to_float(x.at(r, c)) + to_float(residual.at(r, c)));
      if (std::memcmp(&want, &sum.at(r, c), sizeof(X)) != 0) return error + "the sum is not the rounded one";
    }
  }
  for (int r = 0; r < rows; ++r) {
    const Moments& m = moments[size_t(r)];
    if (!near(stats(0, r) / m.rstd, 1, 1e-4)) error += "rstd of row " + std::to_string(r) + "; ";
    if (!rms && !near(stats(1, r) + stats(2, r), m.mean, r == 1 ? 1e-6 * m.mean : 2e-5))
      error += "mean of row " + std::to_string(r) + "; ";
  }
  return error;
}

template <class X>
std::string norm_backward_of(int width, int rows, Layout layout, bool rms, bool added, bool aligned,
                             Tensor<X>& dx) {
  constexpr int groups = 3;
  Tensor<X> h(rows, width, layout), dy(rows, width, layout), dsum(rows, width, layout);
  Tensor<float> weight(1, width), stats(kNormStats, rows), dweight(1, width), dbias(1, width);
  Tensor<float> weight_parts(groups, width), bias_parts(groups, width);
  const double mean = sizeof(X) == 4 ? 1e3 : 10, offset = 0.5;
  h.fill([=](int r, int c) { return mean * r + number(10, r, c); });
  dy.fill([](int r, int c) { return number(11, r, c) + 0.5; });
  dsum.fill([](int r, int c) { return number(12, r, c); });
  weight.fill([](int, int c) { return number(13, 0, c); });
  std::vector<Moments> moments;
  for (int r = 0; r < rows; ++r) {
    const Moments m = moments.emplace_back(h, r, rms, 1e-5);
    stats.at(0, r) = float(m.rstd), stats.at(1, r) = float(m.mean);
    stats.at(2, r) = float(m.mean - stats(1, r));
  }
  NormBackwardCall b{};
  b.grid = grid_of(rows), b.width = width;
  b.dy = dy.operand(aligned), b.h = h.operand(aligned), b.dx = dx.operand(aligned);
  if (added) b.dsum = dsum.operand(aligned);
  b.weight = weight.operand(aligned), b.weight_offset = float(offset), b.stats = stats.data();
  b.groups = groups, b.rms = rms;
  b.dweight = dweight.operand(true), b.dbias = dbias.operand(true);
  const bool sums = width <= kWidestSums,
             weight_sums = sums || (rms && width > 4096);  // the latter by a kernel apart
  b.weight_parts = weight_sums ? weight_parts.data() : nullptr;
  b.bias_parts = sums ? bias_parts.data() : nullptr;
  norm_backward<X>(b, nullptr);

  std::vector<double> exact, of_weight(size_t(width), 0.0), of_bias(size_t(width), 0.0);
  for (int r = 0; r < rows; ++r) {
    const Moments& m = moments[size_t(r)];
    const auto n = [&](int c) { return (h(r, c) - m.mean) * m.rstd; };
    const auto g = [&](int c) { return dy(r, c) * (weight(0, c) + offset); };
    double mean_g = 0, mean_gn = 0;
    for (int c = 0; c < width; ++c) {
      if (!rms) mean_g += g(c) / width;
      mean_gn += g(c) * n(c) / width;
      of_weight[size_t(c)] += dy(r, c) * n(c);
      of_bias[size_t(c)] += dy(r, c);
    }
    for (int c = 0; c < width; ++c)
      exact.push_back(m.rstd * (g(c) - mean_g - n(c) * mean_gn) + (added ? dsum(r, c) : 0));
  }
  return differs("dx", dx, 2e-5, [&](int r, int c) { return exact[size_t(r * width + c)]; }) +
         not_periodic("dx", dx) +
         differs("dweight", dweight, 1e-5 * rows,
                 [&](int, int c) { return weight_sums ? of_weight[size_t(c)] : NAN; }) +
         differs("dbias", dbias, 1e-6 * rows, [&](int, int c) { return sums ? of_bias[size_t(c)] : NAN; });
}

// Aligned, if the width allows it, and not.
template <class X, class Check>
std::string both(int width, int rows, Layout layout, Check check) {
  Tensor<X> plain(rows, width, layout);
  std::string error = check(false, plain);
  const bool whole = width % 8 == 0 && (layout == Layout::Rows || layout == Layout::FarRows);
  if (!whole || !error.empty()) return error;
  Tensor<X> aligned(rows, width, layout);
  error = check(true, aligned);
  return error + not_same("a result", plain, aligned);
}

template <class X>
void check_shape(const std::string& what, int width, int rows, Layout layout) {
  const bool columns = layout == Layout::Columns || layout == Layout::FarColumns;
  const auto test = [&](const char* name, auto check) {
    host::test((std::string(name) + " " + what).c_str(), [&] { return both<X>(width, rows, layout, check); });
  };
  for (const Terms terms : {Terms::None, Terms::MaskAndBias, Terms::Causal, Terms::Empty}) {
    if (columns && terms == Terms::Causal) continue;
    if (rows / kOuter < 2 && terms == Terms::Empty) continue;
    test("softmax", [&](bool aligned, Tensor<X>& y) {
      return softmax_forward<X>(width, rows, layout, terms, aligned, y);
    });
  }
  for (const int split : {1, 3}) {
    test("softmax backward", [&](bool aligned, Tensor<X>& dx) {
      return softmax_backward_of<X>(width, rows, layout, split, aligned, dx);
    });
  }
  if (columns) return;
  for (const bool rms : {false, true}) {
    test("norm", [&](bool aligned, Tensor<X>& y) {
      return norm_forward<X>(width, rows, layout, rms, rms, aligned, y);
    });
    if (width > kWidestNormBackward) continue;
    test("norm backward", [&](bool aligned, Tensor<X>& dx) {
      return norm_backward_of<X>(width, rows, layout, rms, rms, aligned, dx);
    });
  }
  test("add and norm", [&](bool aligned, Tensor<X>& y) {
    return norm_forward<X>(width, rows, layout, false, true, aligned, y);
  });
}

void check_types(const std::string& what, int width, int rows, Layout layout) {
  check_shape<float>(what + " fp32", width, rows, layout);
  check_shape<bf16>(what + " bf16", width, rows, layout);
}

}  // namespace

int main(int argc, char** argv) {
  twin::options.seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
  for (int i = 2; i < argc; ++i) {
    const std::string shape = argv[i];
    if (shape == "far") {
      check_types("far apart", 64, 2, Layout::FarRows);
      check_types("columns far apart", 20, 4, Layout::FarColumns);
      continue;
    }
    const int width = std::atoi(argv[i]), rows = std::atoi(shape.substr(shape.find('x') + 1).c_str());
    check_types(shape, width, rows, Layout::Rows);
    if (width <= 64) check_types(shape + " columns", width, rows, Layout::Columns);
  }
  return host::failures != 0;
}
