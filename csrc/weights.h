// Elements in the optimizer's space: x / (sqrt(v) + eps), 0 where v is 0. Or scaled in blocks: x[i] * 2^(s[i / 32] - 127).
#pragma once

#include "dispatch.h"
#include "elements.h"
#include "lists.h"

namespace gac {

struct Weights {
  const Table& seconds;
  double eps;

  // What tensor k is weighted or scaled with; null: its elements count as they are.
  const char* of(int64_t k) const { return seconds[k].numel || seconds[k].dtype != kScale ? seconds[k].data : nullptr; }

  // Scaled elements [begin, begin + n) of a contiguous tensor, from x on.
  template <class A>
  static void scaled(int dtype, const char* x, const uint8_t* scales, int64_t begin, int64_t n, A* out) {
    widen(dtype, x, n, out);
    for (int64_t i = 0; i < n;) {
      const A factor = static_cast<A>(scale_of(scales[(begin + i) / kScaled]));
      const int64_t end = std::min(n, i + kScaled - (begin + i) % kScaled);
      for (; i < end; ++i) out[i] *= factor;
    }
  }
  // Calls body(y, position, count) for blocks of scaled elements [begin, begin + n), in A.
  template <class A, class Body>
  static void for_scaled(const Tensor& t, const Tensor& scales, int64_t begin, int64_t n, Body&& body) {
    A block[kBlock];
    for (int64_t i = begin; i < begin + n; i += kBlock) {
      const int64_t m = std::min(kBlock, begin + n - i);
      scaled(t.dtype, t.data + i * bytes_of(t.dtype), reinterpret_cast<const uint8_t*>(scales.data), i, m, block);
      body(block, i, m);
    }
  }

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

  // Calls body(x, v, count) for blocks widened to float32, of types other than float64.
  template <class Body>
  void for_short_blocks(int dtype, int second, const char* x, const char* v, int64_t n, Body&& body) const {
    float value[kBlock], moment[kBlock];
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t m = std::min(kBlock, n - i);
      widen(dtype, x + i * bytes_of(dtype), m, value);
      widen(second, v + i * bytes_of(second), m, moment);
      body(value, moment, m);
    }
  }

  // Sum of squares and number of non-finite ones among elements [begin, begin + count) of a tensor, in float64: it has
  // room for those that float32 has not.
  void moments(const Tensor& t, const Tensor& v, int64_t begin, int64_t count, double* sums) const {
    sums[0] = sums[1] = 0;
    if (v.dtype == kScale)
      return for_scaled<double>(t, v, begin, count, [&](const double* block, int64_t, int64_t m) {
        sums[0] += kernels().moments[kFloat64](block, m);
        sums[1] += static_cast<double>(count_nonfinite<double>(block, m));
      });
    for_pair_runs(t, v, begin, count, [&](const char* x, const char* y, int64_t, int64_t n) {
      for_blocks(t.dtype, v.dtype, x, y, n, [&](const double* block, int64_t m) {
        sums[0] += kernels().moments[kFloat64](block, m);
        sums[1] += static_cast<double>(count_nonfinite<double>(block, m));
      });
    });
  }
};

}  // namespace gac
