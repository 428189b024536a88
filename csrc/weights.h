// Elements in the optimizer's space: x / (sqrt(v) + eps), 0 where v is 0.
#pragma once

#include "dispatch.h"
#include "elements.h"
#include "lists.h"

namespace gac {

struct Weights {
  const Table& seconds;
  double eps;

  // Calls body(y, count) for blocks of weighted elements in float64.
  template <class Body>
  void for_blocks(int dtype, int second, const char* x, const char* v, int64_t n, Body&& body) const {
    double value[kBlock], moment[kBlock];
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t m = std::min(kBlock, n - i);
      to_doubles(dtype, x + i * bytes_of(dtype), m, value);
      to_doubles(second, v + i * bytes_of(second), m, moment);
      kernels().weigh(value, moment, m, eps);
      body(value, m);
    }
  }

  // Sum of squares and number of non-finite ones among elements [begin, begin + count) of a tensor, in float64: it has
  // room for those that float32 has not.
  void moments(const Tensor& t, const Tensor& v, int64_t begin, int64_t count, double* sums) const {
    sums[0] = sums[1] = 0;
    for_pair_runs(t, v, begin, count, [&](const char* x, const char* y, int64_t, int64_t n) {
      for_blocks(t.dtype, v.dtype, x, y, n, [&](const double* block, int64_t m) {
        sums[0] += kernels().moments[kFloat64](block, m);
        sums[1] += static_cast<double>(count_nonfinite<double>(block, m));
      });
    });
  }
};

}  // namespace gac
