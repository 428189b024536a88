#include "reductions.h"

#include "dispatch.h"
#include "elements.h"

namespace gac {

void pair_run(int dtype_a, int dtype_b, const char* x, const char* y, int64_t n, double* sums) {
  const Kernels& table = kernels();
  if (dtype_a == dtype_b) return table.pair[dtype_a](x, y, n, sums);
  double left[kBlock], right[kBlock], part[3];
  std::fill(sums, sums + 3, 0.0);
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = std::min(kBlock, n - i);
    to_doubles(dtype_a, x + i * bytes_of(dtype_a), m, left);
    to_doubles(dtype_b, y + i * bytes_of(dtype_b), m, right);
    table.pair[kFloat64](left, right, m, part);
    for (int w = 0; w < 3; ++w) sums[w] += part[w];
  }
}

void mix_run(int dtype_a, int dtype_b, char* x, const char* y, int64_t n, double mu, double* sums) {
  const Kernels& table = kernels();
  const double rest = 1 - mu;
  if (dtype_a == dtype_b && !sums) return table.mix[dtype_a](x, y, n, mu, rest);
  double left[kBlock], right[kBlock], part[3];
  if (sums) std::fill(sums, sums + 3, 0.0);
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = std::min(kBlock, n - i);
    char* target = x + i * bytes_of(dtype_a);
    const char* source = y + i * bytes_of(dtype_b);
    if (sums) {  // the block stays in the first-level cache until it is mixed
      pair_run(dtype_a, dtype_b, target, source, m, part);
      for (int w = 0; w < 3; ++w) sums[w] += part[w];
    }
    if (dtype_a == dtype_b) {
      table.mix[dtype_a](target, source, m, mu, rest);
    } else {
      to_doubles(dtype_a, target, m, left);
      to_doubles(dtype_b, source, m, right);
      table.mix[kFloat64](left, right, m, mu, rest);
      from_doubles(dtype_a, left, m, target);
    }
  }
}

void moments_chunk(const Tensor& t, int64_t begin, int64_t count, double* sums) {
  const auto kernel = kernels().moments[t.dtype];
  double squares = 0;
  for_runs(t, begin, count, [&](const char* x, int64_t, int64_t n) { squares += kernel(x, n); });
  sums[0] = squares;
  sums[1] = nonfinite_in(t, begin, count, squares);
}

void moments(const Table& tensors, bool per_tensor, double* out, int threads) {
  reduce<2>(tensors, per_tensor, out, threads, [&](int64_t k, int64_t begin, int64_t count, double* sums) {
    moments_chunk(tensors[k], begin, count, sums);
  });
}

void pair_moments(const Table& left, const Table& right, bool per_tensor, double* out, int threads) {
  reduce<3>(left, per_tensor, out, threads, [&](int64_t k, int64_t begin, int64_t count, double* sums) {
    const Tensor x = left[k], y = right[k];
    for_pair_runs(x, y, begin, count, [&](const char* p, const char* q, int64_t, int64_t m) {
      double part[3];
      pair_run(x.dtype, y.dtype, p, q, m, part);
      for (int w = 0; w < 3; ++w) sums[w] += part[w];
    });
  });
}

void mix(const Table& left, const Table& right, double mu, double* out, int threads) {
  if (out) {
    reduce<3>(left, false, out, threads, [&](int64_t k, int64_t begin, int64_t count, double* sums) {
      const Tensor x = left[k], y = right[k];
      for_pair_runs(x, y, begin, count, [&](char* p, const char* q, int64_t, int64_t m) {
        double part[3];
        mix_run(x.dtype, y.dtype, p, q, m, mu, part);
        for (int w = 0; w < 3; ++w) sums[w] += part[w];
      });
    });
    return;
  }
  // Nothing is summed, so chunks may depend on the number of threads: longer ones are 1% faster. Not where a tensor has
  // gaps: chunks cut its runs there, and the last elements of a run are rounded in another way.
  int64_t numel = 0;
  for (int64_t k = 0; k < left.size(); ++k) numel += left[k].numel;
  const int64_t workers = std::clamp<int64_t>(numel / kMixShare, 1, std::max(threads, 1));
  const auto length = [&](int64_t k) {
    const Tensor x = left[k], y = right[k];
    const int64_t share = ceil_div(x.numel, 4 * workers * kChunk) * kChunk;
    return std::min(x.columns, y.columns) < x.numel ? kChunk : std::clamp(share, 2 * kChunk, 8 * kChunk);
  };
  const Chunks chunks(left, length);
  auto body = [&](int64_t c) {
    const int64_t k = chunks.tensor_of(c);
    const Tensor x = left[k], y = right[k];
    const int64_t step = length(k), begin = (c - chunks.first(k)) * step;
    for_pair_runs(x, y, begin, std::min(step, x.numel - begin), [&](char* p, const char* q, int64_t, int64_t m) {
      mix_run(x.dtype, y.dtype, p, q, m, mu, nullptr);
    });
  };
  parallel_for(static_cast<int>(workers), chunks.size(), body);
}

}  // namespace gac
