// Contiguous elements whose type is known at run time: to float64 and back, and the count of non-finite ones.
#pragma once

#include <array>

#include "types.h"

namespace gac {

constexpr int64_t kBlock = 1024;  // elements converted, or mixed after their sums are taken, at a time

template <class T>
int64_t count_nonfinite(const void* data, int64_t n) {
  const T* x = static_cast<const T*>(data);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += !is_finite_bits(x[i]);
  return count;
}

inline int64_t count_nonfinite(int dtype, const void* data, int64_t n) {
  switch (dtype) {
    case kFloat32: return count_nonfinite<float>(data, n);
    case kBFloat16: return count_nonfinite<bf16>(data, n);
    case kFloat16: return count_nonfinite<fp16>(data, n);
    case kFloat8E4M3: return count_nonfinite<e4m3>(data, n);
    case kFloat8E5M2: return count_nonfinite<e5m2>(data, n);
    default: return count_nonfinite<double>(data, n);
  }
}

template <class T, class A>
void convert(const void* data, int64_t n, A* out) {
  const T* x = static_cast<const T*>(data);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(to_double(x[i]));
}

// The same of 8 bits: there are no more than 256 of them.
template <class T, class A>
void look_up(const void* data, int64_t n, A* out) {
  static const std::array<float, 256> numbers = [] {
    std::array<float, 256> all{};
    for (int code = 0; code < 256; ++code) all[code] = to_float(T{static_cast<uint8_t>(code)});
    return all;
  }();
  const T* x = static_cast<const T*>(data);
  for (int64_t i = 0; i < n; ++i) out[i] = numbers[x[i].bits];
}

// A is double, or float for what is no float64.
template <class A>
void widen(int dtype, const void* x, int64_t n, A* out) {
  switch (dtype) {
    case kFloat32: return convert<float>(x, n, out);
    case kBFloat16: return convert<bf16>(x, n, out);
    case kFloat16: return convert<fp16>(x, n, out);
    case kFloat8E4M3: return look_up<e4m3>(x, n, out);
    case kFloat8E5M2: return look_up<e5m2>(x, n, out);
    default: return convert<double>(x, n, out);
  }
}

inline void to_doubles(int dtype, const void* x, int64_t n, double* out) { widen(dtype, x, n, out); }

template <class T>
void round_doubles(const double* x, int64_t n, void* out) {
  T* y = static_cast<T*>(out);
  for (int64_t i = 0; i < n; ++i) y[i] = from_double<T>(x[i]);
}

inline void from_doubles(int dtype, const double* x, int64_t n, void* out) {
  switch (dtype) {
    case kFloat32: return round_doubles<float>(x, n, out);
    case kBFloat16: return round_doubles<bf16>(x, n, out);
    case kFloat16: return round_doubles<fp16>(x, n, out);
    default: return round_doubles<double>(x, n, out);
  }
}

}  // namespace gac
