// Each chunk of a tensor is read once, added to its stretch of the total, and leaves its moments.
#include "accumulate.h"

#include <cstring>

#include "weights.h"

namespace gac {
namespace {

struct Accumulate {
  const Table& tensors;
  const Weights* weights;  // null: elements count as they are
  const gac_sum& sum;

  // Elements [begin, begin + count) of tensor k; sums: of squares, and of non-finite elements.
  void chunk(int64_t k, int64_t begin, int64_t count, double* sums) const {
    const Tensor t = tensors[k];
    const bool plain = !weights || !weights->of(k);
    if (!sum.total) return moments(t, k, plain, begin, count, sums);
    float* const total = sum.total + sum.offsets[k];
    float* const previous = sum.previous ? sum.previous + sum.offsets[k] : nullptr;
    if (sum.fresh & 1) std::memset(total + begin, 0, count * sizeof(float));  // the chunk stays in the cache
    if (previous && sum.fresh & 2) std::memset(previous + begin, 0, count * sizeof(float));
    double squares = 0;
    if (!plain && weights->seconds[k].dtype == kScale) {
      weights->for_scaled<float>(t, weights->seconds[k], begin, count, [&](const float* y, int64_t at, int64_t n) {
        squares += kernels().accumulate[kFloat32](y, previous ? previous + at : nullptr, total + at, n, sum.scale);
      });
    } else if (!plain) {
      const Tensor v = weights->seconds[k];
      for_pair_runs(t, v, begin, count, [&](const char* x, const char* y, int64_t at, int64_t n) {
        squares += weighted(t.dtype, v.dtype, x, y, previous ? previous + at : nullptr, total + at, n);
      });
    } else {
      for_runs(t, begin, count, [&](const char* x, int64_t at, int64_t n) {
        squares += kernels().accumulate[t.dtype](x, previous ? previous + at : nullptr, total + at, n, sum.scale);
      });
    }
    sums[0] = squares;
    sums[1] = 0;
    if (std::isfinite(squares)) return;
    if (!plain) {  // a weighted element beyond float32 is not counted, and its square is right
      double wide[2];
      weights->moments(t, weights->seconds[k], begin, count, wide);
      if (!previous) sums[0] = wide[0];
      sums[1] = wide[1];
    } else {
      sums[1] = nonfinite_in(t, begin, count, squares);
    }
  }

  // The same of a list that is added to nothing.
  void moments(const Tensor& t, int64_t k, bool plain, int64_t begin, int64_t count, double* sums) const {
    if (!plain) return weights->moments(t, weights->seconds[k], begin, count, sums);
    sums[0] = 0;
    for_runs(t, begin, count, [&](const char* x, int64_t, int64_t n) { sums[0] += kernels().moments[t.dtype](x, n); });
    sums[1] = nonfinite_in(t, begin, count, sums[0]);
  }

  double weighted(int dtype, int second, const char* x, const char* v, float* previous, float* total, int64_t n) const {
    double squares = 0;
    const auto add = [&](int type, const void* y, int64_t at, int64_t m) {
      squares += kernels().accumulate[type](y, previous ? previous + at : nullptr, total + at, m, sum.scale);
    };
    if (dtype == kFloat64 || second == kFloat64) {
      int64_t at = 0;
      weights->for_blocks(dtype, second, x, v, n, [&](const double* y, int64_t m) {
        add(kFloat64, y, at, m);
        at += m;
      });
      return squares;
    }
    float block[kBlock];
    if (dtype >= kPaired || second >= kPaired) {
      int64_t at = 0;
      weights->for_short_blocks(dtype, second, x, v, n, [&](const float* y, const float* w, int64_t m) {
        kernels().weigh_short[kFloat32][kFloat32](y, w, m, weights->eps, block);
        add(kFloat32, block, at, m);
        at += m;
      });
      return squares;
    }
    for (int64_t at = 0; at < n; at += kBlock) {
      const int64_t m = std::min(kBlock, n - at);
      kernels().weigh_short[dtype][second](x + at * bytes_of(dtype), v + at * bytes_of(second), m, weights->eps, block);
      add(kFloat32, block, at, m);
    }
    return squares;
  }
};

}  // namespace

void accumulate(const Table& tensors, const Table* seconds, const gac_sum& sum, double* moments, int threads) {
  const Weights weights = {seconds ? *seconds : tensors, sum.eps};
  const Accumulate work = {tensors, seconds ? &weights : nullptr, sum};
  std::vector<double> sums(sum.per_tensor ? 2 * tensors.size() : 2);
  reduce<2>(tensors, sum.per_tensor != 0, sums.data(), threads,
            [&](int64_t k, int64_t begin, int64_t count, double* chunk) { work.chunk(k, begin, count, chunk); });
  for (size_t i = 0; i < sums.size(); ++i) moments[i] = (sum.add ? moments[i] : 0.0) + sums[i];
}

}  // namespace gac
